"""What an update is applied to: a bound model, or plain named tensors such as a state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from zokernels.binding import Binding, _check_parameter, bind, masked_part
from zokernels.masks import Mask
from zokernels.noise import parameter_ids
from zokernels.subset import BoundParameter, ModelChangedError, Subset, fp32, update_

__all__ = ["Bound", "NamedTensors", "Target", "fp32", "idle", "resolve", "update_"]


class NamedTensors(Subset):
    """Named tensors with their ids, for use where there is no module to bind.

    Tensors that share memory (a tied weight of a state dict) count once, under their first name.
    With a mask, of those given the ones that it touches move, at its elements.

    Raises:
        ValueError: nothing is given, two names share an id, or a tensor is on the meta device.
        TypeError: a tensor is not float32, bfloat16 or float16, or a value is no tensor.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], mask: Mask | None = None) -> None:
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
        if mask is not None:
            mask.check(dict(kept))
            kept = [(name, t) for name, t in kept if mask.touches(name)]
        ids = parameter_ids(name for name, _ in kept)
        self.mask = mask
        self.params: tuple[BoundParameter, ...] = tuple(
            BoundParameter(
                name,
                ids[name],
                t,
                t.shape,
                t.dtype,
                t.device,
                (),
                None if mask is None else masked_part(mask, name, t),
            )
            for name, t in kept
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


def resolve(target: Target, mask: Mask | None = None) -> Bound:
    """Bind whatever can hold weights.

    Args:
        target: module, binding, or mapping of names to tensors.
        mask: for a module or a mapping; a binding has its own.

    Raises:
        TypeError: ``target`` is none of module, binding, mapping of names to tensors.
        ModelChangedError: a given binding no longer fits its model.
    """
    if isinstance(target, NamedTensors):
        if mask is not None:
            raise ValueError("mask must be None when named tensors are given: they have their own")
        target.check()
        return target
    if isinstance(target, Mapping):
        return NamedTensors(target.items(), mask)
    if isinstance(target, (nn.Module, Binding)):
        return bind(target, mask=mask)
    raise TypeError(
        f"model must be a torch.nn.Module, a Binding or a mapping of names to tensors; got "
        f"{type(target).__name__}"
    )


def idle(coeffs: Sequence[float], decay: Sequence[float] | None) -> bool:
    """Whether terms change nothing: every coefficient is 0 and every decay 1.

    Such an update is left out altogether, so that it cannot even turn a weight of -0 into +0.
    """
    return not any(coeffs) and (decay is None or all(d == 1.0 for d in decay))
