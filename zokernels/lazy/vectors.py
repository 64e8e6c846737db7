"""Small lazy parameters: norms and elementwise arithmetic, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from zokernels.lazy.parameter import LazyParameter, State, autocast_dtype, handles, no_derivative


def _norm(
    state: State,
    x: Tensor,
    weight: Any,
    bias: Any,
    run: Callable[[Tensor, Any, Any], Tensor],
    mixed: bool = False,
) -> Tensor:
    """A norm branch by branch, with float32 affine parameters: equal to the norm of one branch.

    ``mixed``: ``run`` takes a low-precision input beside float32 affine parameters.
    """

    def affine(value: Any) -> tuple[Any, bool]:
        if value is None:
            return None, True
        if isinstance(value, LazyParameter):
            return value.branches(torch.float32), False
        return state.lower(value)

    with DisableTorchFunctionSubclass():
        physical, shared = state.lower(x)
        (w, w_shared), (b, b_shared) = affine(weight), affine(bias)
        assert state.coeffs is not None
        wide = physical.dtype != torch.float32 and not mixed
        count = state.coeffs.shape[0]

        def each(value: Any, same: bool) -> Any:
            return (value,) * count if same else value.unbind(0)

        parts = []
        for xg, wg, bg in zip(
            each(physical, shared), each(w, w_shared), each(b, b_shared), strict=True
        ):
            if wide:
                xg = xg.float()
                wg = None if wg is None else wg.float()
                bg = None if bg is None else bg.float()
            parts.append(run(xg, wg, bg).to(physical.dtype))
        return state.lift(parts[0][None] if len(parts) == 1 else torch.stack(parts))


@handles(F.layer_norm, torch.layer_norm)
@no_derivative
def _layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        lazy = next((p for p in (weight, bias) if isinstance(p, LazyParameter)), None)
        if lazy is None or isinstance(input, LazyParameter) or autocast_dtype(lazy):
            return NotImplemented
        return _norm(
            lazy.state,
            input,
            weight,
            bias,
            lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps),
            mixed=input.device.type == "cpu"
            and isinstance(weight, LazyParameter)
            and isinstance(bias, LazyParameter),
        )

    return call(*args, **kwargs)


@handles(F.rms_norm, torch.rms_norm)
@no_derivative
def _rms_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
        if not isinstance(weight, LazyParameter) or isinstance(input, LazyParameter):
            return NotImplemented
        if autocast_dtype(weight):
            return NotImplemented
        if eps is None:
            eps = torch.finfo(input.dtype).eps
        return _norm(
            weight.state,
            input,
            weight,
            None,
            lambda x, w, b: F.rms_norm(x, normalized_shape, w, eps),
        )

    return call(*args, **kwargs)


_ARITHMETIC = [
    getattr(holder, name)
    for holder in (torch, Tensor)
    for name in (
        "add mul sub div multiply subtract divide true_divide rsub __add__ __radd__ __mul__ "
        "__rmul__ __sub__ __rsub__ __truediv__ __rtruediv__ __rdiv__ __div__"
    ).split()
    if hasattr(holder, name)
]


@handles(*_ARITHMETIC)
def _arithmetic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Elementwise arithmetic with a small parameter: in float32, result in torch's dtype."""
    if kwargs or len(args) != 2:
        return NotImplemented
    lazies = [a for a in args if isinstance(a, LazyParameter)]
    if not all(p.small() for p in lazies):
        return NotImplemented
    if all(p.dtype == torch.float32 for p in lazies):
        return NotImplemented  # the generic path is already float32
    with DisableTorchFunctionSubclass():
        dtype = torch.result_type(
            *(
                torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a
                for a in args
            )
        )
    formed = [a.form(torch.float32) if isinstance(a, LazyParameter) else a for a in args]
    result = func(*formed)
    return result.to(dtype) if isinstance(result, Tensor) else result
