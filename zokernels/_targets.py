"""What an update is applied to: a bound model, or plain named tensors such as a state dict."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zokernels.binding import Binding, BoundParameter, ModelChangedError, _check_parameter, bind
from zokernels.noise import parameter_ids


class NamedTensors:
    """Named tensors with their ids, for use where there is no module to bind.

    Tensors that share memory (a tied weight of a state dict) count once, under their first name.

    Raises:
        ValueError: nothing is given, two names share an id, or a tensor is on the meta device.
        TypeError: a tensor is not float32, bfloat16 or float16, or a value is no tensor.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        seen: set[tuple[object, ...]] = set()
        kept: list[tuple[str, Tensor]] = []
        for name, tensor in named:
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise TypeError(
                    f"named tensors must be (str, Tensor) pairs; got ({type(name).__name__}, "
                    f"{type(tensor).__name__})"
                )
            _check_parameter(name, tensor)
            place = (
                (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
                if tensor.numel()
                else (id(tensor),)
            )
            if place not in seen:
                seen.add(place)
                kept.append((name, tensor))
        if not kept:
            raise ValueError("no tensor is given")
        repeated = [name for name, count in Counter(name for name, _ in kept).items() if count > 1]
        if repeated:
            raise ValueError(f"names must be unique; repeated: {repeated[:5]}")
        ids = parameter_ids(name for name, _ in kept)
        self.params: tuple[BoundParameter, ...] = tuple(
            BoundParameter(name, ids[name], t, t.shape, t.dtype, t.device, ()) for name, t in kept
        )
        self.by_name = {p.name: p for p in self.params}

    def check(self) -> None:
        """Raise when a tensor was resized, moved or converted.

        Raises:
            ModelChangedError: the message names the tensor.
        """
        for p in self.params:
            if (p.tensor.shape, p.tensor.dtype, p.tensor.device) != (p.shape, p.dtype, p.device):
                raise ModelChangedError(
                    f"parameter {p.name!r} was {tuple(p.shape)} {p.dtype} on {p.device} when it "
                    f"was bound and is {tuple(p.tensor.shape)} {p.tensor.dtype} on "
                    f"{p.tensor.device} now"
                )


Bound = Binding | NamedTensors
Target = nn.Module | Binding | NamedTensors | Mapping[str, Tensor]


def resolve(target: Target) -> Bound:
    """Bind whatever can hold weights.

    Raises:
        TypeError: ``target`` is none of module, binding, mapping of names to tensors.
        ModelChangedError: a given binding no longer fits its model.
    """
    if isinstance(target, NamedTensors):
        target.check()
        return target
    if isinstance(target, Mapping):
        return NamedTensors(target.items())
    if isinstance(target, (nn.Module, Binding)):
        return bind(target)
    raise TypeError(
        f"model must be a torch.nn.Module, a Binding or a mapping of names to tensors; got "
        f"{type(target).__name__}"
    )


def fp32(values: Iterable[float]) -> tuple[float, ...]:
    """Round numbers to float32 (nearest, overflow to infinity), as Python floats."""
    return tuple(array("f", [float(v) for v in values]))


def idle(coeffs: Sequence[float], decay: Sequence[float] | None) -> bool:
    """Whether terms change nothing: every coefficient is 0 and every decay 1.

    Such an update is left out altogether, so that it cannot even turn a weight of -0 into +0.
    """
    return not any(coeffs) and (decay is None or all(d == 1.0 for d in decay))


def update_(
    params: Iterable[BoundParameter],
    seeds: Sequence[int],
    coeffs: Sequence[float],
    decay: Sequence[float] | None,
    ends: Sequence[bool],
    distribution: str,
    rounding: str,
) -> None:
    """One fused update of every parameter, one op call a device.

    Args:
        params: parameters that get the same terms.
        seeds: K signed 64-bit seeds.
        coeffs: K coefficients, rounded to float32.
        decay: K factors applied to the weight before each term, or None for 1.
        ends: K flags: round to the parameter's dtype after this term. The last must be True.
        distribution: ``"gaussian"`` or ``"rademacher"``.
        rounding: ``"nearest"`` or ``"stochastic"``.
    """
    by_device: dict[torch.device, list[BoundParameter]] = {}
    for p in params:
        by_device.setdefault(p.tensor.device, []).append(p)
    with torch.no_grad():
        for device, members in by_device.items():
            torch.ops.zokernels.update_(
                [p.tensor for p in members],
                torch.tensor(seeds, dtype=torch.int64, device=device),
                torch.tensor(coeffs, dtype=torch.float32, device=device),
                None if decay is None else torch.tensor(decay, device=device, dtype=torch.float32),
                torch.tensor(ends, dtype=torch.bool, device=device),
                [p.id for p in members],
                [],
                [],
                distribution,
                rounding,
            )
