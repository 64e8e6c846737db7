"""Argument checks of every op, in one place: each backend gets arguments that passed them.

A check returns the device type that serves the call and raises before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zokernels.noise import DISTRIBUTIONS, ROUNDINGS, matrix_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}; got {value!r}")


def _dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16; got {dtype}")


def _device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the weights; got {tensor.device}")


def _seeds(seeds: Tensor, device: torch.device, name: str = "seeds") -> None:
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise TypeError(
            f"{name} must be an int64 vector; got {seeds.dtype} of shape {tuple(seeds.shape)}"
        )
    _device(name, seeds, device)


def _coeffs(
    coeffs: Tensor, shape: tuple[int | None, ...], device: torch.device, name: str = "coeffs"
) -> None:
    fits = len(shape) == coeffs.dim() and all(
        want is None or want == got for want, got in zip(shape, coeffs.shape, strict=True)
    )
    if coeffs.dtype != torch.float32 or not fits:
        wanted = ", ".join("branches" if n is None else str(n) for n in shape)
        raise TypeError(
            f"{name} must be float32 of shape [{wanted}]; got {coeffs.dtype} of shape "
            f"{tuple(coeffs.shape)}"
        )
    _device(name, coeffs, device)


def _region(rows: int, cols: int, param_id: int, row_offset: int, col_offset: int) -> None:
    if not 0 <= param_id < 1 << 32:
        raise ValueError(f"param_id must be in [0, 2**32); got {param_id}")
    if row_offset < 0 or row_offset + rows > 1 << 32:
        raise ValueError(
            f"rows must stay in [0, 2**32); got row_offset {row_offset} and {rows} rows"
        )
    if col_offset < 0 or col_offset + cols > 1 << 34:
        raise ValueError(
            f"columns must stay in [0, 2**34); got col_offset {col_offset} and {cols} columns"
        )


def _weight(
    w: Tensor, seeds: Tensor, coeffs: Tensor, param_id: int, row_offset: int, col_offset: int
) -> None:
    _dtype("w", w.dtype)
    if w.dim() != 2:
        raise ValueError(f"w must be a matrix; got shape {tuple(w.shape)}")
    _seeds(seeds, w.device)
    _coeffs(coeffs, (None, seeds.numel()), w.device)
    if coeffs.shape[0] == 0:
        raise ValueError("coeffs must have at least one branch (row); got none")
    _region(w.shape[0], w.shape[1], param_id, row_offset, col_offset)


def sample(
    rows: int,
    cols: int,
    seed: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
) -> str:
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(f"seed must be a 0-d int64 tensor; got {seed.dtype} {tuple(seed.shape)}")
    if rows < 0 or cols < 0:
        raise ValueError(f"rows and cols must not be negative; got {rows} and {cols}")
    _region(rows, cols, param_id, row_offset, col_offset)
    _choice("distribution", distribution, DISTRIBUTIONS)
    return seed.device.type


def displace(
    w: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    rounding: str,
    dtype: torch.dtype | None,
) -> str:
    _weight(w, seeds, coeffs, param_id, row_offset, col_offset)
    _choice("distribution", distribution, DISTRIBUTIONS)
    _choice("rounding", rounding, ROUNDINGS)
    if dtype is not None:
        _dtype("dtype", dtype)
    return w.device.type


def displace_(
    out: Tensor,
    w: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    rounding: str,
) -> str:
    device = displace(
        w, seeds, coeffs, param_id, row_offset, col_offset, distribution, rounding, out.dtype
    )
    if tuple(out.shape) != (coeffs.shape[0], *w.shape):
        raise ValueError(
            f"out must have shape {(coeffs.shape[0], *w.shape)}; got {tuple(out.shape)}"
        )
    _device("out", out, w.device)
    return device


def _many(
    name: str,
    tensors: list[Tensor],
    seeds: Tensor,
    param_ids: list[int],
    row_offsets: list[int],
    col_offsets: list[int],
    distribution: str,
) -> str:
    if not tensors:
        raise ValueError(f"{name} must not be empty")
    if len(param_ids) != len(tensors):
        raise ValueError(f"param_ids must have {len(tensors)} entries; got {len(param_ids)}")
    for label, offsets in (("row_offsets", row_offsets), ("col_offsets", col_offsets)):
        if offsets and len(offsets) != len(tensors):
            raise ValueError(
                f"{label} must be empty or have {len(tensors)} entries; got {len(offsets)}"
            )
    device = tensors[0].device
    for i, tensor in enumerate(tensors):
        # Hundreds of tensors a step: a name is made where it is needed.
        if tensor.dtype not in DTYPES:
            _dtype(f"{name}[{i}]", tensor.dtype)
        if tensor.device != device:
            _device(f"{name}[{i}]", tensor, device)
        _region(
            *matrix_shape(tensor.shape),
            param_ids[i],
            row_offsets[i] if row_offsets else 0,
            col_offsets[i] if col_offsets else 0,
        )
    _seeds(seeds, device)
    _choice("distribution", distribution, DISTRIBUTIONS)
    return device.type


def displace_vectors(
    vectors: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    param_ids: list[int],
    distribution: str,
) -> str:
    device = _many("vectors", vectors, seeds, param_ids, [], [], distribution)
    for i, vector in enumerate(vectors):
        if vector.dim() != 1:
            raise ValueError(f"vectors[{i}] must be a vector; got shape {tuple(vector.shape)}")
    _coeffs(coeffs, (None, seeds.numel()), vectors[0].device)
    if coeffs.shape[0] == 0:
        raise ValueError("coeffs must have at least one branch (row); got none")
    return device


def update_(
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decay: Tensor | None,
    ends: Tensor | None,
    param_ids: list[int],
    row_offsets: list[int],
    col_offsets: list[int],
    distribution: str,
    rounding: str,
) -> str:
    device = _many("params", params, seeds, param_ids, row_offsets, col_offsets, distribution)
    _choice("rounding", rounding, ROUNDINGS)
    terms = seeds.numel()
    _terms(coeffs, decay, terms, params[0].device)
    if ends is not None and (ends.dtype != torch.bool or tuple(ends.shape) != (terms,)):
        raise TypeError(
            f"ends must be bool of shape [{terms}]; got {ends.dtype} of shape {tuple(ends.shape)}"
        )
    if ends is not None:
        _device("ends", ends, params[0].device)
    return device


def project(
    vectors: list[Tensor],
    seeds: Tensor,
    param_ids: list[int],
    row_offsets: list[int],
    col_offsets: list[int],
    distribution: str,
) -> str:
    return _many("vectors", vectors, seeds, param_ids, row_offsets, col_offsets, distribution)


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
    transposed: bool,
) -> str:
    _weight(w, seeds, coeffs, param_id, row_offset, col_offset)
    _choice("distribution", distribution, DISTRIBUTIONS)
    branches = coeffs.shape[0]
    rows, cols = w.shape
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    _input(x, w, branches, fan_in, shared)
    if bias is not None and tuple(bias.shape) != (branches, fan_out):
        raise ValueError(
            f"bias must have shape {(branches, fan_out)}; got shape {tuple(bias.shape)}"
        )
    if bias is not None:
        _dtype("bias", bias.dtype)
        _device("bias", bias, w.device)
    return w.device.type


def update_linear_(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    coeffs: Tensor,
    pending_seeds: Tensor,
    pending_coeffs: Tensor,
    pending_decay: Tensor | None,
    rounding: str,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
) -> str:
    place = (param_id, row_offset, col_offset, distribution)
    device = linear(x, w, bias, seeds, coeffs, *place, shared, False)
    _seeds(pending_seeds, w.device, "pending_seeds")
    _terms(pending_coeffs, pending_decay, pending_seeds.numel(), w.device, "pending_")
    _choice("rounding", rounding, ROUNDINGS)
    return device


def embedding(
    ids: Tensor,
    w: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
) -> str:
    _weight(w, seeds, coeffs, param_id, row_offset, col_offset)
    _choice("distribution", distribution, DISTRIBUTIONS)
    _ids(ids, w, coeffs.shape[0], shared)
    return w.device.type


def _ids(ids: Tensor, w: Tensor, branches: int, shared: bool) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32; got {ids.dtype}")
    _device("ids", ids, w.device)
    if not shared and (ids.dim() == 0 or ids.shape[0] != branches):
        raise ValueError(f"ids must start with {branches} branches; got shape {tuple(ids.shape)}")


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
    ignore_index: int,
) -> str:
    device = linear(
        x,
        w,
        bias,
        seeds,
        coeffs,
        param_id,
        row_offset,
        col_offset,
        distribution,
        shared,
        False,
    )
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    if targets.dtype != torch.int64 or tuple(targets.shape) != tuple(lead) or len(lead) != 1:
        raise ValueError(
            f"targets must be int64 of shape [tokens] = {tuple(lead)}; got {targets.dtype} of "
            f"shape {tuple(targets.shape)}"
        )
    _device("targets", targets, w.device)
    return device


def _compact(
    indices: Tensor, shadow: Tensor, numel: int, device: torch.device, at: str = ""
) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise TypeError(
            f"indices{at} must be an int64 vector; got {indices.dtype} of shape "
            f"{tuple(indices.shape)}"
        )
    if indices.shape[0] > numel:
        raise ValueError(f"indices{at} must have at most {numel} entries; got {indices.shape[0]}")
    if shadow.dtype != torch.float32 or shadow.shape != indices.shape:
        raise TypeError(
            f"shadow{at} must be float32 of shape {tuple(indices.shape)}; got {shadow.dtype} of "
            f"shape {tuple(shadow.shape)}"
        )
    _device(f"indices{at}", indices, device)
    _device(f"shadow{at}", shadow, device)


def _masked(
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
) -> None:
    _dtype("w", w.dtype)
    _compact(indices, shadow, w.numel(), w.device)
    _seeds(seeds, w.device)
    _coeffs(coeffs, (None, seeds.numel()), w.device)
    if coeffs.shape[0] == 0:
        raise ValueError("coeffs must have at least one branch (row); got none")
    _offset(indices.shape[0], param_id, offset)
    _choice("distribution", distribution, DISTRIBUTIONS)


def _offset(count: int, param_id: int, offset: int) -> None:
    if not 0 <= param_id < 1 << 32:
        raise ValueError(f"param_id must be in [0, 2**32); got {param_id}")
    if offset < 0 or offset + count > 1 << 34:
        raise ValueError(
            f"the vector must stay in [0, 2**34); got offset {offset} and {count} indices"
        )


def sparse_displace(
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
) -> str:
    _masked(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
    return w.device.type


def sparse_update_(
    params: list[Tensor],
    indices: list[Tensor],
    shadows: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decay: Tensor | None,
    param_ids: list[int],
    distribution: str,
) -> str:
    if not params:
        raise ValueError("params must not be empty")
    for label, given in (("indices", indices), ("shadows", shadows), ("param_ids", param_ids)):
        if len(given) != len(params):
            raise ValueError(f"{label} must have {len(params)} entries; got {len(given)}")
    device = params[0].device
    for i, param in enumerate(params):
        _dtype(f"params[{i}]", param.dtype)
        _device(f"params[{i}]", param, device)
        _compact(indices[i], shadows[i], param.numel(), device, f"[{i}]")
        _offset(indices[i].shape[0], param_ids[i], 0)
    _seeds(seeds, device)
    _terms(coeffs, decay, seeds.numel(), device)
    _choice("distribution", distribution, DISTRIBUTIONS)
    return device.type


def _terms(
    coeffs: Tensor, decay: Tensor | None, terms: int, device: torch.device, prefix: str = ""
) -> None:
    _coeffs(coeffs, (terms,), device, f"{prefix}coeffs")
    if decay is not None and (decay.dtype != torch.float32 or tuple(decay.shape) != (terms,)):
        raise TypeError(
            f"{prefix}decay must be float32 of shape [{terms}]; got {decay.dtype} of shape "
            f"{tuple(decay.shape)}"
        )
    if decay is not None:
        _device(f"{prefix}decay", decay, device)


def _input(x: Tensor, w: Tensor, branches: int, fan_in: int, shared: bool) -> None:
    if x.dtype != w.dtype:
        raise TypeError(f"x must have the dtype of w, {w.dtype}; got {x.dtype}")
    _device("x", x, w.device)
    if x.dim() < (1 if shared else 2) or x.shape[-1] != fan_in:
        raise ValueError(f"x must end in a dimension of {fan_in}; got shape {tuple(x.shape)}")
    if not shared and x.shape[0] != branches:
        raise ValueError(f"x must start with {branches} branches; got shape {tuple(x.shape)}")


def _matrix(w: Tensor) -> None:
    if w.dim() != 2:
        raise ValueError(f"w must be a matrix; got shape {tuple(w.shape)}")


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
) -> str:
    _masked(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
    _matrix(w)
    branches = coeffs.shape[0]
    fan_out, fan_in = w.shape[::-1] if transposed else w.shape
    _input(x, w, branches, fan_in, shared)
    if bias is not None:
        if tuple(bias.shape) not in ((fan_out,), (branches, fan_out)):
            raise ValueError(
                f"bias must have shape {(fan_out,)} or {(branches, fan_out)}; got shape "
                f"{tuple(bias.shape)}"
            )
        _dtype("bias", bias.dtype)
        if bias.dim() == 1 and bias.dtype != w.dtype:
            raise TypeError(f"bias must have the dtype of w, {w.dtype}; got {bias.dtype}")
        _device("bias", bias, w.device)
    return w.device.type


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
) -> str:
    _masked(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
    _matrix(w)
    _ids(ids, w, coeffs.shape[0], shared)
    return w.device.type


CHECKS: dict[str, Callable[..., str]] = {
    "sample": sample,
    "displace": displace,
    "displace_": displace_,
    "displace_vectors": displace_vectors,
    "update_": update_,
    "project": project,
    "linear": linear,
    "update_linear_": update_linear_,
    "embedding": embedding,
    "linear_cross_entropy": linear_cross_entropy,
    "sparse_displace": sparse_displace,
    "sparse_update_": sparse_update_,
    "sparse_linear": sparse_linear,
    "sparse_embedding": sparse_embedding,
}
