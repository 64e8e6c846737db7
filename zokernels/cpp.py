"""The C++ CPU backend: adapters from the ops' positional signatures to the native functions.

The arithmetic is in ``csrc/cpu``; this module allocates outputs, makes inputs contiguous and turns
a refused index into the error the reference raises. ``ZOKERNELS_CPU=avx512|avx2|portable`` chooses
the instruction set; the results do not depend on it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zokernels import cpp_sparse
from zokernels._load import native_library
from zokernels._native import DISTRIBUTION, check_index, written

_library = native_library("_zokernels_cpu")
_library.zokernels_cpu_isa.restype = ctypes.c_char_p
_library.zokernels_cpu_isas.restype = ctypes.c_char_p
_library.zokernels_cpu_select.argtypes = [ctypes.c_char_p]
_library.zokernels_cpu_tiles.argtypes = [ctypes.c_int64, ctypes.c_int64]
_library.zokernels_cpu_fused.argtypes = [ctypes.c_int64]
_library.zokernels_cpu_generate.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int64]
_library.zokernels_cpu_generate.restype = ctypes.c_float

_library.zokernels_cpu_plan.argtypes = [
    *[ctypes.c_int64] * 4,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_int64),
]
_library.zokernels_cpu_plan.restype = None

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUNDING = {"nearest": 0, "stochastic": 1}

_sample = torch.ops.zokernels_cpp.sample.default
_displace = torch.ops.zokernels_cpp.displace_.default
_displace_vectors = torch.ops.zokernels_cpp.displace_vectors.default
_update = torch.ops.zokernels_cpp.update_.default
_project = torch.ops.zokernels_cpp.project.default
_linear = torch.ops.zokernels_cpp.linear.default
_update_linear = torch.ops.zokernels_cpp.update_linear_.default
_embedding = torch.ops.zokernels_cpp.embedding.default
_cross_entropy = torch.ops.zokernels_cpp.linear_cross_entropy.default


def instruction_sets() -> list[str]:
    """Instruction sets this machine can run, widest first."""
    return str(_library.zokernels_cpu_isas().decode()).split(",")


def instruction_set() -> str:
    """The instruction set in use."""
    return str(_library.zokernels_cpu_isa().decode())


def use_instruction_set(name: str) -> None:
    """Choose the instruction set of all following calls in this process.

    Raises:
        ValueError: ``name`` is not one of avx512, avx2, portable.
        RuntimeError: this machine or build cannot run it.
    """
    status = _library.zokernels_cpu_select(name.encode())
    if status == 1:
        raise ValueError(
            f"instruction set must be one of ['avx512', 'avx2', 'portable']; got {name!r}"
        )
    if status == 2:
        raise RuntimeError(
            f"instruction set {name!r} is not supported here; available: {instruction_sets()}"
        )


def set_tile_sizes(*, tile_bytes: int = 4 << 20, min_rows: int = 64) -> None:
    """How many bytes of displaced weights a tile of a product holds, and its least rows.

    For measurements and tests: results of noise do not depend on it, products may in the last bit.
    """
    _library.zokernels_cpu_tiles(tile_bytes, min_rows)


def set_fused_tokens(most: int = -1) -> None:
    """Up to how many tokens a branch a product goes without tiles: 0 never, -1 where it is faster.

    For measurements and tests.
    """
    _library.zokernels_cpu_fused(most)


class ProductPlan(NamedTuple):
    """How ``linear`` cuts a product into tasks; see ``csrc/cpu/products.h``."""

    fused: bool
    outputs: int
    tiles: int
    token_blocks: int
    held_bytes: int


def product_plan(
    fan_in: int,
    fan_out: int,
    tokens: int,
    branches: int,
    dtype: torch.dtype,
    transposed: bool,
    threads: int,
) -> ProductPlan:
    """The plan ``linear`` chooses: outputs a task, tasks, token blocks, bytes a task holds."""
    out = (ctypes.c_int64 * 5)()
    _library.zokernels_cpu_plan(
        fan_in, fan_out, tokens, branches, _DTYPE[dtype], int(transposed), threads, out
    )
    return ProductPlan(bool(out[0]), out[1], out[2], out[3], out[4])


def generate(distribution: str, seed: int, groups: int) -> float:
    """Draw ``256 * groups`` values in registers on the calling thread and return their sum.

    This is the generator alone, with nothing loaded or stored: the noise floor of every op.
    """
    return float(_library.zokernels_cpu_generate(DISTRIBUTION[distribution], seed, groups))


def _vendor_supports(name: str) -> bool:
    query = getattr(torch.ops.mkldnn, name, None)
    return bool(query()) if query is not None else False


_asked = os.environ.get("ZOKERNELS_CPU")
if _asked:
    try:
        use_instruction_set(_asked)
    except (ValueError, RuntimeError) as error:
        # Not an error the registry would keep as a reason and go on without: it was asked for.
        raise ValueError(f"ZOKERNELS_CPU: {error}") from None


def widen_products(*, bf16: bool | None = None, f16: bool | None = None) -> None:
    """Multiply tiles of a half type in float32: True, False, or None where torch is slow at it."""
    _library.zokernels_cpu_widen(
        int(not _vendor_supports("_is_mkldnn_bf16_supported") if bf16 is None else bf16),
        int(not _vendor_supports("_is_mkldnn_fp16_supported") if f16 is None else f16),
    )


widen_products()


def sample(
    rows: int,
    cols: int,
    seed: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
) -> Tensor:
    out: Tensor = _sample(
        rows, cols, seed, param_id, row_offset, col_offset, DISTRIBUTION[distribution]
    )
    return out


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
) -> None:
    dense = (
        out
        if out.stride(2) == 1 or out.shape[2] == 1
        else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    _displace(
        dense,
        w,
        seeds,
        coeffs,
        param_id,
        row_offset,
        col_offset,
        DISTRIBUTION[distribution],
        _ROUNDING[rounding],
    )
    if dense is not out:
        out.copy_(dense)
    else:
        written([out])


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
) -> Tensor:
    out = w.new_empty((coeffs.shape[0], *w.shape), dtype=dtype or w.dtype)
    _displace(
        out,
        w,
        seeds,
        coeffs,
        param_id,
        row_offset,
        col_offset,
        DISTRIBUTION[distribution],
        _ROUNDING[rounding],
    )
    return out


def displace_vectors(
    vectors: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    param_ids: list[int],
    distribution: str,
) -> Tensor:
    out: Tensor = _displace_vectors(vectors, seeds, coeffs, param_ids, DISTRIBUTION[distribution])
    return out


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
) -> None:
    _update(
        params,
        seeds,
        coeffs,
        decay,
        ends,
        param_ids,
        row_offsets,
        col_offsets,
        DISTRIBUTION[distribution],
        _ROUNDING[rounding],
    )
    written(params)


def project(
    vectors: list[Tensor],
    seeds: Tensor,
    param_ids: list[int],
    row_offsets: list[int],
    col_offsets: list[int],
    distribution: str,
) -> Tensor:
    out: Tensor = _project(
        vectors, seeds, param_ids, row_offsets, col_offsets, DISTRIBUTION[distribution]
    )
    return out


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
) -> Tensor:
    y: Tensor = _linear(
        x.contiguous(),
        w,
        None if bias is None else bias.contiguous(),
        seeds,
        coeffs,
        param_id,
        row_offset,
        col_offset,
        DISTRIBUTION[distribution],
        shared,
        transposed,
    )
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    return y if len(lead) == 1 else y.view(y.shape[0], *lead, y.shape[2])


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
) -> Tensor:
    y: Tensor = _update_linear(
        x.contiguous(),
        w,
        None if bias is None else bias.contiguous(),
        seeds,
        coeffs,
        pending_seeds,
        pending_coeffs,
        pending_decay,
        _ROUNDING[rounding],
        param_id,
        row_offset,
        col_offset,
        DISTRIBUTION[distribution],
        shared,
    )
    written([w])
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    return y if len(lead) == 1 else y.view(y.shape[0], *lead, y.shape[2])


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
) -> Tensor:
    try:
        y: Tensor = _embedding(
            ids.contiguous(),
            w,
            seeds,
            coeffs,
            param_id,
            row_offset,
            col_offset,
            DISTRIBUTION[distribution],
            shared,
        )
    except RuntimeError:
        check_index("ids", ids, w.shape[0])
        raise
    lead = ids.shape if shared else ids.shape[1:]
    return y if len(lead) == 1 else y.view(y.shape[0], *lead, y.shape[2])


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
) -> Tensor:
    try:
        loss: Tensor = _cross_entropy(
            x.contiguous(),
            w,
            None if bias is None else bias.contiguous(),
            targets,
            seeds,
            coeffs,
            param_id,
            row_offset,
            col_offset,
            DISTRIBUTION[distribution],
            shared,
            ignore_index,
        )
    except RuntimeError:
        kept = targets[targets != ignore_index]
        check_index("targets", kept, w.shape[0], f" or ignore_index={ignore_index}")
        raise
    return loss


KERNELS: dict[str, Callable[..., object]] = {
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
    **cpp_sparse.KERNELS,
}
