"""Federated methods by name: what a client computes, what is sent, how it is merged."""

from __future__ import annotations

from typing import Any

from fedzo.methods.base import Method, Setting, Site
from fedzo.methods.decomfl import DeComFL
from fedzo.methods.fedavg import FedAvg, FedAvgLoRA
from fedzo.methods.fedkseed import FedKSeed
from fedzo.methods.fedmezo import FedMeZO
from fedzo.methods.fedspzo import FedSPZO
from fedzo.methods.full_fedzo import FullFedZO
from fedzo.methods.lora_fedzo import LoRAFedZO
from fedzo.methods.meerkat import Meerkat
from fedzo.methods.meerkat_vp import MeerkatVP
from fedzo.methods.random_mask import RandomMask
from fedzo.methods.weight_magnitude import WeightMagnitude

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FedMeZO,
        Meerkat,
        MeerkatVP,
        FedSPZO,
        FullFedZO,
        LoRAFedZO,
        WeightMagnitude,
        RandomMask,
        DeComFL,
        FedKSeed,
        FedAvg,
        FedAvgLoRA,
    )
}


def make(name: str, **options: Any) -> Method:
    """A method by its name.

    Args:
        name: a key of ``METHODS``.
        options: of the method's class.

    Raises:
        ValueError: an unknown name or option, or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}; got {name!r}")
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


__all__ = [
    "METHODS",
    "DeComFL",
    "FedAvg",
    "FedAvgLoRA",
    "FedKSeed",
    "FedMeZO",
    "FedSPZO",
    "FullFedZO",
    "LoRAFedZO",
    "Meerkat",
    "MeerkatVP",
    "Method",
    "RandomMask",
    "Setting",
    "Site",
    "WeightMagnitude",
    "make",
]
