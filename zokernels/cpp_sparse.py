"""Adapters of the C++ backend for the ops under a mask; their arithmetic is in ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zokernels._load import native_library
from zokernels._native import DISTRIBUTION, check_index, plain_product, written

native_library("_zokernels_cpu")

_displace = torch.ops.zokernels_cpp.sparse_displace.default
_update = torch.ops.zokernels_cpp.sparse_update_.default
_correct = torch.ops.zokernels_cpp.sparse_correct_.default
_rows = torch.ops.zokernels_cpp.sparse_rows_.default


def sparse_displace(
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
) -> Tensor:
    try:
        values: Tensor = _displace(
            w,
            indices.contiguous(),
            shadow.contiguous(),
            seeds,
            coeffs,
            param_id,
            offset,
            DISTRIBUTION[distribution],
        )
    except RuntimeError:
        check_index("indices", indices, w.numel())
        raise
    return values


def sparse_update_(
    params: list[Tensor],
    indices: list[Tensor],
    shadows: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decay: Tensor | None,
    param_ids: list[int],
    distribution: str,
) -> None:
    dense = [shadow.contiguous() for shadow in shadows]
    try:
        _update(
            params,
            [index.contiguous() for index in indices],
            dense,
            seeds,
            coeffs,
            decay,
            param_ids,
            DISTRIBUTION[distribution],
        )
    except RuntimeError:
        for param, index in zip(params, indices, strict=True):
            check_index("indices", index, param.numel())
        raise
    for shadow, copy in zip(shadows, dense, strict=True):
        if copy is not shadow:
            shadow.copy_(copy)
    written([*params, *shadows])


def sparse_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
    shared: bool,
    transposed: bool,
) -> Tensor:
    x = x.contiguous()
    y, late = plain_product(x, w, bias, transposed)
    if shared:
        y = y.expand(coeffs.shape[0], *y.shape).clone(memory_format=torch.contiguous_format)
    y = y.contiguous()
    try:
        _correct(
            y,
            x,
            w,
            late,
            indices.contiguous(),
            shadow.contiguous(),
            seeds,
            coeffs,
            param_id,
            offset,
            DISTRIBUTION[distribution],
            shared,
            transposed,
        )
    except RuntimeError:
        check_index("indices", indices, w.numel())
        raise
    return y


def sparse_embedding(
    ids: Tensor,
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
    shared: bool,
) -> Tensor:
    check_index("ids", ids, w.shape[0])
    ids = ids.to(torch.int64).contiguous()
    rows = w[ids]
    if shared:
        rows = rows.expand(coeffs.shape[0], *rows.shape)
        rows = rows.clone(memory_format=torch.contiguous_format)
    rows = rows.contiguous()
    try:
        _rows(
            rows,
            ids,
            w,
            indices.contiguous(),
            shadow.contiguous(),
            seeds,
            coeffs,
            param_id,
            offset,
            DISTRIBUTION[distribution],
            shared,
        )
    except RuntimeError:
        check_index("indices", indices, w.numel())
        raise
    return rows


KERNELS: dict[str, Callable[..., object]] = {
    "sparse_displace": sparse_displace,
    "sparse_update_": sparse_update_,
    "sparse_linear": sparse_linear,
    "sparse_embedding": sparse_embedding,
}
