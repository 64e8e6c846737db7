"""What a :class:`~zokernels.MeZO` run needs to go on, as plain numbers, and its way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zokernels.displacement import UnknownVersionError, check_distribution, check_rounding
from zokernels.noise import CONTRACT_VERSION, signed_seed
from zokernels.optim_arguments import (
    ESTIMATORS,
    NONFINITE,
    check_choice,
    check_count,
    check_group,
    check_positive,
)
from zokernels.spsa import Past

if TYPE_CHECKING:
    from zokernels.optim import MeZO

STATE_KEY = "mezo"
_STATE_FORMAT = 1


OPTIONS = (
    "seed",
    "distribution",
    "rounding",
    "estimator",
    "num_directions",
    "clip",
    "nonfinite",
    "momentum_window",
)
COUNTERS = ("_step", "_skipped", "_window")
KEPT = (
    *OPTIONS,
    *COUNTERS,
    "fuse_update",
    "sequential",
    "max_branches",
    "_model",
    "_explicit",
    "_mask",
    "_journal",
    "_warned",
    "_last",
)


def run_state(optimizer: MeZO) -> dict[str, Any]:
    """The entry ``STATE_KEY`` of a state dict."""
    return {
        "format": _STATE_FORMAT,
        "contract_version": CONTRACT_VERSION,
        "step": optimizer._step,
        "skipped": optimizer._skipped,
        **{name: getattr(optimizer, name) for name in OPTIONS},
        "mask": None if optimizer._mask is None else optimizer._mask.fingerprint(),
        "shadow": optimizer._shadows(),
        "window": [
            {
                "step": past.step,
                "seeds": list(past.seeds),
                "gradients": [list(row) for row in past.gradients],
            }
            for past in optimizer._window
        ],
    }


def accepted_state(optimizer: MeZO, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Check a state dict before torch takes it; the attributes that torch does not know.

    Raises:
        ValueError, UnknownVersionError: as :meth:`zokernels.MeZO.load_state_dict`.
    """
    if STATE_KEY not in state_dict:
        raise ValueError(f"the state dict has no {STATE_KEY!r}: it is of another optimizer")
    saved = state_dict[STATE_KEY]
    try:
        for label, known in (("format", _STATE_FORMAT), ("contract_version", CONTRACT_VERSION)):
            if saved[label] != known:
                raise UnknownVersionError(f"{label} must be {known}; got {saved[label]!r}")
        clip = saved["clip"]
        incoming: dict[str, Any] = {
            "seed": signed_seed(int(saved["seed"])),
            "distribution": check_distribution(saved["distribution"]),
            "rounding": check_rounding(saved["rounding"]),
            "estimator": check_choice("estimator", saved["estimator"], ESTIMATORS),
            "num_directions": check_count("num_directions", saved["num_directions"]),
            "clip": None if clip is None else check_positive("clip", clip),
            "nonfinite": check_choice("nonfinite", saved["nonfinite"], NONFINITE),
            "momentum_window": check_count("momentum_window", saved["momentum_window"]),
            "_step": int(saved["step"]),
            "_skipped": int(saved["skipped"]),
            "_window": tuple(
                Past(
                    int(past["step"]),
                    tuple(signed_seed(int(s)) for s in past["seeds"]),
                    tuple(tuple(map(float, row)) for row in past["gradients"]),
                )
                for past in saved["window"]
            ),
        }
        mask = None if optimizer._mask is None else optimizer._mask.fingerprint()
        if saved.get("mask") != mask:
            raise ValueError(
                f"the state dict is of a run under mask {saved.get('mask')}; this optimizer has "
                f"{mask}"
            )
        incoming["_shadow"] = dict(saved.get("shadow", {}))
        expected = {n: tuple(v.shape) for n, v in optimizer._shadows().items()}
        if mask is not None and {n: tuple(v.shape) for n, v in incoming["_shadow"].items()} != (
            expected
        ):
            raise ValueError(
                "the state dict's shadow does not fit the masked parameters: another dtype?"
            )
        groups = state_dict["param_groups"]
        for group in groups:
            check_group(group)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the state dict is damaged: {error!r}") from error
    for i, (ours, theirs) in enumerate(zip(optimizer.param_groups, groups, strict=False)):
        names = theirs.get("param_names", ours["param_names"])
        for mine, name in zip(ours["param_names"], names, strict=False):
            if mine != name:
                raise ValueError(
                    f"the state dict is of another model: group {i} has {name!r} where this "
                    f"optimizer has {mine!r}"
                )
    journal = optimizer._journal
    for label in ("distribution", "rounding"):
        if journal is not None and getattr(journal, label) != incoming[label]:
            raise ValueError(
                f"the state dict has {label} {incoming[label]!r}, but the journal has "
                f"{getattr(journal, label)!r}: attach another journal"
            )
    return incoming
