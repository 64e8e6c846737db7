"""Products with lazy weights: linear layers, embeddings, experts, the language-model head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from zokernels.lazy.masked import MaskedLazyParameter
from zokernels.lazy.parameter import LazyParameter, State, autocast_dtype, handles, no_derivative
from zokernels.lazy.views import rows_of
from zokernels.losses import linear_cross_entropy

_ops = torch.ops.zokernels


def _vector(bias: Any, state: State) -> Any:
    """A bias as ``[G, out]`` or ``[out]``, None, or NotImplemented for anything else."""
    if bias is None:
        return None
    if isinstance(bias, LazyParameter):
        return bias.branches(torch.float32) if bias.dim() == 1 else NotImplemented
    if bias.dim() != 1:
        return NotImplemented
    return state.lower(bias)[0]


def _linear(x: Any, weight: LazyParameter, bias: Any, flip: bool) -> Any:
    """``x @ weight^T + bias`` (``x @ weight + bias`` with ``flip``) through the op."""
    if isinstance(x, LazyParameter) or weight.matrix.dim() != 2 or weight.dim() != 2:
        return NotImplemented
    if (low := autocast_dtype(weight)) is not None and weight.dtype == torch.float32:
        formed = weight.form(low)  # one rounding, and half the memory of float32
        if flip and bias is not None:
            return torch.addmm(bias, x, formed)
        return F.linear(x, formed.mT if flip else formed, bias)
    if low is not None or x.dtype != weight.dtype or x.device != weight.device:
        return NotImplemented
    if x.dim() == 0 or x.shape[-1] != weight.shape[0 if flip else 1]:
        return NotImplemented  # let torch raise its own error
    state = weight.state
    with DisableTorchFunctionSubclass():
        rows = _vector(bias, state)
        if rows is NotImplemented:
            return NotImplemented
        physical, shared = state.lower(x)
        return state.lift(weight.product(physical, rows, shared, flip))


@handles(F.linear)
@no_derivative
def _f_linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(input: Any, weight: Any, bias: Any = None) -> Any:
        if isinstance(weight, LazyParameter):
            return _linear(input, weight, bias, False)
        return NotImplemented

    return call(*args, **kwargs)


@handles(torch.addmm, Tensor.addmm)
@no_derivative
def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or not isinstance(args[2], LazyParameter):
        return NotImplemented
    bias, x, weight = args
    if isinstance(x, LazyParameter) or x.dim() != 2:
        return NotImplemented
    return _linear(x, weight, bias, True)


@handles(
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
)
@no_derivative
def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2 or not isinstance(args[1], LazyParameter):
        return NotImplemented
    if isinstance(args[0], LazyParameter):
        return NotImplemented
    return _linear(args[0], args[1], None, True)


@handles(Tensor.__rmatmul__)
@no_derivative
def _rmatmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _matmul(func, (args[1], args[0]), kwargs)


@handles(F.embedding)
def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(
        input: Any,
        weight: Any,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        if not isinstance(weight, LazyParameter) or weight.transposed or max_norm is not None:
            return NotImplemented
        if isinstance(input, LazyParameter) or weight.dim() != 2:
            return NotImplemented
        state = weight.state
        with DisableTorchFunctionSubclass():
            ids, shared = state.lower(input)
            if ids.dtype not in (torch.int64, torch.int32):
                return NotImplemented
            return state.lift(weight.lookup(ids, shared))

    return call(*args, **kwargs)


@handles(F.grouped_mm, torch._grouped_mm)
@no_derivative
def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens sorted by expert ``[S, in]`` times expert weights ``[E, in, out]``, one by one."""

    def call(
        x: Any, weight: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> Any:
        if not isinstance(weight, LazyParameter) or isinstance(x, LazyParameter) or offs is None:
            return NotImplemented
        if (
            weight.dim() != 3
            or x.dim() != 2
            or bias is not None
            or autocast_dtype(weight) is not None
        ):
            return NotImplemented
        if x.dtype != weight.dtype or out_dtype not in (None, x.dtype):
            return NotImplemented
        state = weight.state
        with DisableTorchFunctionSubclass():
            tokens, x_shared = state.lower(x)
            stops, stops_shared = state.lower(offs)
            count = state.terms(weight.parameter, weight.matrix.device)[1].shape[0]
            tokens = tokens[None].expand(count, -1, -1) if x_shared else tokens
            stops = stops[None].expand(count, -1) if stops_shared else stops
            if _counts_on_host(tokens):
                return state.lift(_by_expert(weight, tokens, stops.tolist()))
            return state.lift(_by_groups(func, weight, tokens, stops))

    return call(*args, **kwargs)


def _counts_on_host(tokens: Tensor) -> bool:
    """Whether to read how many tokens an expert has, which on a GPU means to wait for it.

    In other types than bfloat16 torch's own product reads it too.
    """
    return tokens.device.type != "cuda" or tokens.dtype != torch.bfloat16


def _by_expert(weight: LazyParameter, tokens: Tensor, stops: list[list[int]]) -> Tensor:
    """One expert's weights formed at a time, and none without tokens: ``[G, S, out]``."""
    y = tokens.new_zeros((*tokens.shape[:2], weight.shape[2]))
    for e in range(weight.shape[0]):
        spans = [(row[e - 1] if e else 0, row[e]) for row in stops]
        if all(start == stop for start, stop in spans):
            continue
        formed = rows_of(None, (weight, e), {}).branches(weight.dtype)  # [G, in, out]
        for g, (start, stop) in enumerate(spans):
            y[g, start:stop] = tokens[g, start:stop] @ formed[g]
    return y


# Displaced experts of all branches that are formed at a time.
_EXPERT_BYTES = 1 << 30


def _by_groups(func: Any, weight: LazyParameter, tokens: Tensor, stops: Tensor) -> Tensor:
    """All experts formed, some at a time, for torch's own product: ``[G, S, out]``."""
    experts, branches = weight.shape[0], tokens.shape[0]
    each = branches * weight.matrix.numel() // experts * weight.matrix.element_size()
    width = max(1, _EXPERT_BYTES // max(1, each))
    places = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    y: list[Tensor] = []
    for first in range(0, experts, width):
        some = slice(first, min(experts, first + width))
        formed = rows_of(None, (weight, some), {}).branches(weight.dtype)  # [G, width, in, out]
        # The first group has the tokens of all earlier experts too: they keep what they have.
        parts = [func(tokens[g], formed[g], offs=stops[g, some]) for g in range(branches)]
        if first:
            after = [places >= stops[g, first - 1] for g in range(branches)]
            parts = [torch.where(*case) for case in zip(after, parts, y, strict=True)]
        y = parts
    return torch.stack(y)


@handles(linear_cross_entropy)
@no_derivative
def _linear_cross_entropy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, targets, bias = args
    if not isinstance(weight, LazyParameter) or weight.dim() != 2 or weight.transposed:
        return NotImplemented
    state = weight.state
    if (
        isinstance(x, LazyParameter)
        or autocast_dtype(weight) is not None
        or x.dtype != weight.dtype
    ):
        return NotImplemented
    if isinstance(weight, MaskedLazyParameter):
        return F.cross_entropy(
            F.linear(x, weight, bias).float(), targets, ignore_index=kwargs["ignore_index"]
        )
    with DisableTorchFunctionSubclass():
        labels, same = state.lower(targets)
        rows = _vector(bias, state)
        if not same or rows is NotImplemented:
            return NotImplemented
        physical, shared = state.lower(x)
        seeds, coeffs = state.terms(weight.parameter, weight.matrix.device)
        if rows is not None and rows.dim() == 1:
            rows = rows.expand(coeffs.shape[0], -1)
        losses = _ops.linear_cross_entropy(
            physical,
            weight.matrix,
            rows,
            labels,
            seeds,
            coeffs,
            weight.param_id,
            weight.row_offset,
            0,
            state.distribution,
            shared,
            kwargs["ignore_index"],
        )
        return state.lift(losses)
