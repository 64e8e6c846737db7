"""Uses of a lazy parameter that stay lazy: metadata, transposes, rows; and casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from zokernels._checks import DTYPES
from zokernels.lazy.parameter import HANDLERS, LazyParameter, UnsupportedUse, handles


def _metadata(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


for _name in (
    "shape dtype device ndim is_cuda is_cpu is_meta is_sparse is_quantized is_nested layout names "
    "requires_grad grad grad_fn is_leaf itemsize nbytes is_xpu is_mps is_mkldnn is_xla is_hpu "
    "is_ipu is_vulkan is_maia is_sparse_csr _backward_hooks _version output_nr retains_grad name"
).split():
    if isinstance(getattr(Tensor, _name, None), property) or hasattr(
        getattr(Tensor, _name, None), "__get__"
    ):
        HANDLERS[getattr(Tensor, _name).__get__] = _metadata
for _name in (
    "size dim stride numel nelement element_size is_floating_point is_complex is_signed "
    "is_contiguous storage_offset get_device __len__ __hash__ ndimension is_shared "
    "is_inference has_names "
    "is_same_size __format__ __repr__"
).split():
    if hasattr(Tensor, _name):
        HANDLERS[getattr(Tensor, _name)] = _metadata
for _name in "is_floating_point is_complex numel is_inference".split():
    HANDLERS[getattr(torch, _name)] = _metadata


@handles(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Nothing is recorded, and the parameter's own flag stays: peft's disable_adapter() turns those
    # of adapters off and on again.
    return args[0]


@handles(Tensor.data_ptr, Tensor.untyped_storage)
def _storage(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy = args[0]
    if lazy.state.level is not None:
        raise UnsupportedUse(f"{func.__name__} of parameter {lazy.parameter!r}")
    return func(lazy.state.keep(lazy.form(lazy.dtype)), *args[1:], **kwargs)


@handles(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def _detach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # With one branch this is how state_dict reads a parameter: give it the displaced weights.
    lazy = args[0]
    return lazy.form(lazy.dtype) if lazy.state.level is None else lazy


@handles(Tensor.contiguous)
def _contiguous(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy = args[0]
    return NotImplemented if lazy.transposed or kwargs or len(args) > 1 else lazy


_CASTS = {Tensor.float: torch.float32, Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16}


@handles(*_CASTS, Tensor.to, Tensor.type)
def _cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy, rest = args[0], args[1:]
    if not isinstance(lazy, LazyParameter) or kwargs:
        return NotImplemented
    if func in _CASTS and not rest:
        dtype = _CASTS[func]
    elif len(rest) == 1 and isinstance(rest[0], torch.dtype):
        dtype = rest[0]
    elif len(rest) == 1 and func is Tensor.to and torch.device(lazy.device) == rest[0]:
        return lazy
    else:
        return NotImplemented
    if dtype == lazy.dtype:
        return lazy
    return lazy.form(dtype) if dtype in DTYPES else NotImplemented


def _flip(lazy: LazyParameter) -> Any:
    """The last two dimensions exchanged."""
    source = lazy.matrix.view(lazy.stored_shape)
    if not lazy.transposed:
        source = source.transpose(-1, -2)
    return lazy.view_of("t", source, lazy.matrix, 0, True)


@handles(
    Tensor.t,
    torch.t,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
)
def _t(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _flip(args[0]) if args[0].dim() == 2 else NotImplemented


@handles(Tensor.transpose, torch.transpose, Tensor.permute, torch.permute)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy, dims = args[0], args[1:]
    if kwargs or not isinstance(lazy, LazyParameter) or lazy.dim() < 2:
        return NotImplemented
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if not all(isinstance(d, int) for d in dims):
        return NotImplemented
    rank = lazy.dim()
    order = [d % rank for d in dims]
    if func in (Tensor.permute, torch.permute):
        swaps = order == [*range(rank - 2), rank - 1, rank - 2]
    else:
        swaps = sorted(order) == [rank - 2, rank - 1]
    return _flip(lazy) if swaps else NotImplemented


@handles(Tensor.__getitem__)
def rows_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leading index or slice of a contiguous parameter: a lazy view of its rows."""
    lazy, key = args
    if not isinstance(lazy, LazyParameter) or lazy.dim() < (3 if lazy.transposed else 2):
        return NotImplemented
    stored = lazy.stored_shape
    each = lazy.matrix.shape[0] // stored[0] if stored[0] else 0  # matrix rows per leading index
    if isinstance(key, Tensor) and key.dim() == 0 and lazy.state.lower(key)[1]:
        if key.dtype not in (torch.int64, torch.int32):
            return NotImplemented
        key = int(key)
    if isinstance(key, slice) and key.step in (None, 1):
        start, stop, _ = key.indices(stored[0])
        count = max(stop - start, 0)
        rest: tuple[int, ...] = (count, *stored[1:])
        identity: object = (start, stop)
    elif isinstance(key, int) and not isinstance(key, bool):
        if not -stored[0] <= key < stored[0]:
            return NotImplemented  # let torch raise its own error
        start, count = key % stored[0], 1
        rest, identity = stored[1:], start
    else:
        return NotImplemented
    matrix = lazy.matrix[start * each : (start + count) * each]
    source = matrix.view(rest)
    if lazy.transposed:
        source = source.transpose(-1, -2)
    return lazy.view_of(identity, source, matrix, start * each, False)
