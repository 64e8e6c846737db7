"""Arguments of an optimizer: parameters with their names, hyperparameters in their ranges."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zokernels.binding import BUSY, Binding, unwrap
from zokernels.masks import Mask
from zokernels.subset import fp32

ESTIMATORS = ("central", "forward")
NONFINITE = ("skip", "raise")


def sources(
    params: nn.Module | Binding | Iterable[Any], model: nn.Module | None, mask: Mask | None
) -> tuple[nn.Module | None, list[dict[str, Any]]]:
    """The model, if known, and parameter groups of (name, parameter) pairs."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None; got {type(model).__name__}")
    whole = params.model if isinstance(params, Binding) else params
    if isinstance(whole, nn.Module):
        whole = unwrap(whole)
        if model is not None and unwrap(model) is not whole:
            raise ValueError("model must be None, or the module given as params")
        if isinstance(params, Binding):
            params.check()
            named: list[tuple[str, Tensor]] = [(p.name, p.tensor) for p in params.params]
        elif mask is not None:
            held = dict(whole.named_parameters())
            mask.check(held)
            named = [(n, p) for n, p in held.items() if mask.touches(n)]
        else:
            named = [(n, p) for n, p in whole.named_parameters() if p.requires_grad]
        if not named:
            if any(getattr(p, "is_stand_in", False) for p in whole.parameters()):
                raise RuntimeError(BUSY)
            raise ValueError("the model has no trainable parameter (requires_grad)")
        return whole, [{"params": named}]
    holder = None if model is None else unwrap(model)
    if isinstance(params, (Tensor, Mapping, str)) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be a module, a Binding, named parameters or parameter groups; got "
            f"{type(params).__name__}"
        )
    entries = list(params)
    if not entries:
        raise ValueError("optimizer got an empty parameter list")
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    listed: list[dict[str, Any]] = []
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError("every parameter group must be a dict with the key 'params'")
        listed.append({**group, "params": named_tensors(group["params"], holder)})
    return holder, listed


def named_tensors(params: Any, model: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Parameters as (qualified name, tensor), each tensor once."""
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, set):
        raise TypeError("parameters must be in an ordered collection such as a list; got a set")
    names = {} if model is None else {id(p): n for n, p in model.named_parameters()}
    named: dict[int, tuple[str, Tensor]] = {}
    for entry in params:
        name, tensor = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
        if not isinstance(tensor, Tensor) or not isinstance(name, (str, type(None))):
            raise TypeError(
                f"parameters must be tensors or (name, tensor) pairs; got {type(entry).__name__}"
            )
        if model is not None:
            if id(tensor) not in names:
                label = f"parameter {name!r}" if name else f"a parameter {tuple(tensor.shape)}"
                raise ValueError(f"{label} does not belong to the model")
            name = names[id(tensor)]
        if name is None:
            raise ValueError(
                "MeZO needs the parameters' names, because the noise of a parameter is keyed by "
                "its name: pass the model (zo.MeZO(model)), model.named_parameters(), or the bare "
                "parameters together with model=model"
            )
        named.setdefault(id(tensor), (name, tensor))
    return list(named.values())


def pairs(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return zip(group["param_names"], group["params"], strict=True)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    return float(value)


def check_group(group: Mapping[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        value = _number(name, group[name])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0; got {value}")
    check_positive("eps", group["eps"])
    momentum = _number("momentum", group["momentum"])
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1); got {momentum}")


def check_positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if not (math.isfinite(fp32([number])[0]) and fp32([number])[0] > 0):
        raise ValueError(f"{name} must be > 0 and finite in float32; got {number}")
    return number


def check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return int(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}; got {value!r}")
    return str(value)
