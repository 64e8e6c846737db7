"""Adapters from the ops' positional signatures to the Triton kernels.

On when Triton and a CUDA device of compute capability 8.0 or newer are there, or in Triton's
interpreter (``TRITON_INTERPRET=1``, for tests: CPU tensors, very slow).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton.runtime.errors import OutOfResources
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}): pip install triton") from error

from zokernels._native import written
from zokernels.noise import matrix_shape
from zokernels.triton import displace as _displace
from zokernels.triton import linear as _linear
from zokernels.triton import loss as _loss
from zokernels.triton import sparse_ops
from zokernels.triton import update as _update
from zokernels.triton.devices import OLDEST, Architecture, of_device, tf32_allowed
from zokernels.triton.launch import (
    FLAGS,
    SERVED,
    cdiv,
    device_guard,
    launch,
    raise_errors,
    reachable,
    signed32,
)
from zokernels.triton.noise import INTERPRETED
from zokernels.triton.plan import Plan, Tiles, fused_tiles, plan, updating_tiles
from zokernels.triton.tables import TILE_ROWS, grouped

if not INTERPRETED:
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    _found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if all(10 * major + minor < OLDEST for major, minor in _found):
        raise ImportError(f"compute capability 8.0 or newer is needed; found {_found}")

DEVICES = SERVED

# project: programs that keep partial sums, and seeds of a program.
_PROGRAMS, _SEEDS = 4096, 2
# Bytes of logits of one chunk of the vocabulary.
_LOGITS = 64 << 20


# Terms of an update that a product makes first: seeds, coefficients, decay, rounding.
_Pending = tuple[Tensor, Tensor, Tensor | None, str]
_PENDING = ("pending_seeds", "pending_coeffs", "pending_decay")


class LaunchWarning(UserWarning):
    """A kernel did not fit this GPU and a smaller one, or another plan, took its place."""


def _power(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _architecture(device: torch.device) -> Architecture:
    return of_device(str(device))


def sample(
    rows: int,
    cols: int,
    seed: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
) -> Tensor:
    reachable(seed)
    out = torch.empty((rows, cols), dtype=torch.float32, device=seed.device)
    if out.numel():
        skip = col_offset % 256
        groups = cdiv(skip + cols, 256)
        with device_guard(out):
            launch(
                _displace.sample_kernel,
                (cdiv(rows, TILE_ROWS) * groups,),
                out,
                seed,
                rows,
                cols,
                groups,
                col_offset // 256,
                skip,
                row_offset,
                signed32(param_id),
                ROWS=TILE_ROWS,
                GAUSSIAN=distribution == "gaussian",
            )
    return out


def _rows_of(
    out: Tensor,
    w: Tensor,
    ids: Tensor | None,
    shared: bool,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    rounding: str,
) -> None:
    """``out[g, i]`` is row ``i``, or ``ids[i]``, or ``ids[g, i]``, of branch ``g``."""
    branches, count, cols = out.shape
    if not out.numel():
        return
    terms, seeds = seeds.numel(), seeds.contiguous()
    if terms == 0:  # nothing moves: one term with coefficient 0
        seeds, terms = seeds.new_zeros(1), 1
        coeffs = coeffs.new_zeros(branches, 1)
    one = terms == 1
    gather = 0 if ids is None else 1 if shared else 2
    chunk = 0 if one else 1 if gather == 2 else min(_power(branches), 4)
    skip = col_offset % 256
    groups = cdiv(skip + cols, 256)
    second = branches if gather == 2 else 1 if one else cdiv(branches, chunk)
    rows = 4 if chunk == 4 else TILE_ROWS
    with device_guard(out):
        launch(
            _displace.displace_kernel,
            (cdiv(count, rows) * groups, second),
            out,
            w,
            w if ids is None else ids,
            seeds,
            coeffs.contiguous(),
            FLAGS.of(w.device),
            count,
            w.shape[0],
            cols,
            groups,
            col_offset // 256,
            skip,
            row_offset,
            signed32(param_id),
            terms,
            branches,
            *out.stride(),
            *w.stride(),
            ROWS=rows,
            BRANCHES=chunk,
            GATHER=gather,
            GAUSSIAN=distribution == "gaussian",
            STOCHASTIC=rounding == "stochastic" and out.dtype != torch.float32,
        )


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
    reachable(w)
    # Without terms the reference rounds to nearest.
    rounding = rounding if seeds.numel() else "nearest"
    place = (param_id, row_offset, col_offset)
    _rows_of(out, w, None, True, seeds, coeffs, *place, distribution, rounding)
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
    displace_(out, w, seeds, coeffs, param_id, row_offset, col_offset, distribution, rounding)
    return out


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
    reachable(w)
    if not INTERPRETED:
        FLAGS.look(w.device)
    lead = ids.shape if shared else ids.shape[1:]
    out = w.new_empty((coeffs.shape[0], lead.numel(), w.shape[1]))
    place = (param_id, row_offset, col_offset)
    flat = ids.contiguous()
    if w.shape[0] == 0 and flat.numel():
        raise IndexError("ids must be in [0, 0): the table has no rows")
    _rows_of(out, w, flat, shared, seeds, coeffs, *place, distribution, "nearest")
    if INTERPRETED:
        FLAGS.look(w.device, "ids")
    return out.view(coeffs.shape[0], *lead, w.shape[1])


# --- many tensors ---------------------------------------------------------------------------------


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
    reachable(params[0])
    if seeds.numel() == 0:
        return
    matrices, copies = [], []
    for p in params:
        shape = matrix_shape(p.shape)
        try:
            matrix = p.detach().view(shape)
        except RuntimeError:  # no matrix has these strides: update a copy
            matrix = p.detach().reshape(shape)
            copies.append((p, matrix))
        matrices.append(matrix)
    gaussian = distribution == "gaussian"
    ends = ends if seeds.numel() > 1 else None  # one term is the last
    # Smaller tiles for float16: with larger ones Triton 3.9 puts a mask on the stack on sm_100.
    half = gaussian and any(m.dtype == torch.float16 for m in matrices)
    rows = TILE_ROWS // 2 if half else TILE_ROWS
    # A copy has another address each time: its table is not worth keeping.
    with device_guard(params[0]):
        for group in grouped(matrices, param_ids, row_offsets, col_offsets, tile_rows=rows):
            single = group.like.dtype == torch.float32
            launch(
                _update.update_kernel,
                (group.tiles,),
                group.table,
                group.owners,
                group.like,
                seeds.contiguous(),
                coeffs.contiguous(),
                coeffs if decay is None else decay.contiguous(),
                seeds if ends is None else ends.contiguous().view(torch.int8),
                seeds.numel(),
                ROWS=rows,
                GAUSSIAN=gaussian,
                STOCHASTIC=rounding == "stochastic" and not single,
                DECAY=decay is not None,
                ENDS=ends is not None,
                DENSE=group.dense,
                # Twice the elements a thread would want more registers than there are, with normals
                # of float32 and where every element has an address of its own.
                warps=rows if gaussian and (single or not group.dense) else 4,
            )
    with torch.no_grad():
        for p, matrix in copies:
            p.copy_(matrix.view(p.shape))
    written(params)


def displace_vectors(
    vectors: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    param_ids: list[int],
    distribution: str,
) -> Tensor:
    reachable(vectors[0])
    branches, terms = coeffs.shape
    total = branches * sum(v.numel() for v in vectors)
    out = torch.empty(total, dtype=torch.float32, device=seeds.device)
    rows = [v.detach()[None] for v in vectors]
    with device_guard(out):
        for group in grouped(rows, param_ids, [], [], tile_rows=1):
            launch(
                _update.vectors_kernel,
                (group.tiles, branches),
                out,
                group.table,
                group.owners,
                group.like,
                seeds.contiguous(),
                coeffs.contiguous(),
                branches,
                terms,
                GAUSSIAN=distribution == "gaussian",
                warps=2,
            )
    return out


def project(
    vectors: list[Tensor],
    seeds: Tensor,
    param_ids: list[int],
    row_offsets: list[int],
    col_offsets: list[int],
    distribution: str,
) -> Tensor:
    reachable(vectors[0])
    terms = seeds.numel()
    out = torch.empty(terms, dtype=torch.float32, device=seeds.device)
    if terms == 0:
        return out
    matrices = [v.detach().reshape(matrix_shape(v.shape)) for v in vectors]
    groups = grouped(matrices, param_ids, row_offsets, col_offsets)
    runs = [cdiv(group.tiles, _PROGRAMS) for group in groups]
    programs = [cdiv(g.tiles, run) for g, run in zip(groups, runs, strict=True)]
    partial = torch.empty((sum(programs), terms), dtype=torch.float64, device=seeds.device)
    with device_guard(seeds):
        start = 0
        for group, run, count in zip(groups, runs, programs, strict=True):
            launch(
                _update.project_kernel,
                (cdiv(terms, _SEEDS), count),
                partial[start:],
                group.table,
                group.owners,
                group.like,
                seeds.contiguous(),
                group.tiles,
                run,
                terms,
                ROWS=TILE_ROWS,
                SEEDS=min(_SEEDS, _power(terms)),
                GAUSSIAN=distribution == "gaussian",
                DENSE=group.dense,
                warps=8,
            )
            start += count
        launch(_update.project_sum_kernel, (terms,), out, partial, start, terms, BLOCK=1024)
    return out


# --- products -------------------------------------------------------------------------------------


def _precision(dtype: torch.dtype) -> str:
    """Float32 products in float32, unless torch was told otherwise."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


_VENDOR = "displaced tiles and the vendor's product"
_reported: set[str] = set()


def _report(what: str, error: Exception, instead: str) -> None:
    if what not in _reported:
        _reported.add(what)
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"{what} did not launch ({reason}); {instead} instead", LaunchWarning, stacklevel=5
        )


def _first_that_launches(
    what: str, otherwise: str, choices: Sequence[Tiles], run: Callable[[Tiles], None]
) -> bool:
    """Launch with the first tiles that fit the GPU; False when none does. Reported once."""
    for i, tiles in enumerate(choices):
        try:
            run(tiles)
            return True
        except OutOfResources as error:
            last = i == len(choices) - 1
            _report(
                f"{what} with {tiles}",
                error,
                otherwise if last else str(choices[i + 1]),
            )
    return False


def _choices(chosen: Plan, w: Tensor, transposed: bool) -> list[Tiles]:
    """Tiles to try. The interpreter pays for every operation, not for its size: one large tile."""
    if INTERPRETED:
        return [Tiles(64 if transposed else 128, max(chosen.tiles.rows, 64), 64, 4, 1)]
    return fused_tiles(chosen.tiles.rows, w.element_size(), transposed)


def _plan(
    x: Tensor,
    w: Tensor,
    coeffs: Tensor,
    tokens: int,
    shared: bool,
    transposed: bool,
    distribution: str,
) -> Plan:
    return plan(
        w.shape[0],
        w.shape[1],
        tokens=tokens,
        branches=coeffs.shape[0],
        terms=coeffs.shape[1],
        itemsize=w.element_size(),
        architecture=_architecture(w.device),
        distribution=distribution,
        shared=shared,
        transposed=transposed,
        # The interpreter multiplies in float32 whatever it is told.
        tf32=INTERPRETED or tf32_allowed(),
    )


def _fused(
    y: Tensor,  # [G, tokens, out], contiguous
    x: Tensor,  # [G tokens, in] or [tokens, in], rows contiguous
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
    tiles: Tiles,
    splits: int,
    pending: _Pending | None,
) -> None:
    """One fused product with given tiles; ``pending`` terms update ``w`` on the way.

    Raises:
        OutOfResources: the tiles need more than the GPU has.
    """
    branches, tokens, fan_out = y.shape
    fan_in = x.shape[1]
    terms = coeffs.shape[1]
    rows = tokens if shared and terms == 1 else branches * tokens
    skip = col_offset % 256
    columns = fan_out if transposed else fan_in
    groups = cdiv(skip + columns, 256)
    steps = cdiv(fan_in, tiles.columns) if transposed else groups * (64 // tiles.columns)
    run = cdiv(steps, splits)
    splits = cdiv(steps, run)
    target = y
    if splits > 1:
        target = torch.empty((splits, *y.shape), dtype=torch.float32, device=y.device)
    added = bias if splits == 1 else None  # else with the sum of the parts
    meta: dict[str, Any] = {
        "COEFFS": 0 if terms == 1 else _power(coeffs.numel()),
        "SHARED": shared,
        "BIAS": added is not None,
        "MODE": 0 if splits == 1 else 1,
        "GAUSSIAN": distribution == "gaussian",
        "PRECISION": _precision(w.dtype),
    }
    place = (col_offset // 256, skip, row_offset, signed32(param_id))
    with device_guard(y):
        if transposed:
            launch(
                _linear.conv1d_kernel,
                (groups, cdiv(rows, tiles.rows), splits),
                *(target, x, w, coeffs if added is None else added, seeds, coeffs),
                *(rows, tokens, fan_in, fan_out, branches, terms),
                *place,
                run * tiles.columns,
                x.stride(0),
                *w.stride(),
                INPUTS=tiles.columns,
                TOKENS=tiles.rows,
                **meta,
                warps=tiles.warps,
                stages=tiles.stages,
            )
        else:
            if pending is not None:
                meta |= dict(zip(_PENDING, pending, strict=False))
                meta["pending_terms"] = pending[0].numel()
                meta["STOCHASTIC"] = pending[3] == "stochastic" and w.dtype != torch.float32
            launch(
                _linear.linear_kernel,
                (cdiv(fan_out, tiles.outputs), cdiv(rows, tiles.rows), splits),
                *(target, x, w, coeffs if added is None else added, seeds, seeds, coeffs),
                *(rows, tokens, fan_in, fan_out, branches, terms, steps),
                *place,
                run,
                x.stride(0),
                *w.stride(),
                OUT=tiles.outputs,
                TOKENS=tiles.rows,
                COLUMNS=tiles.columns,
                **meta,
                warps=tiles.warps,
                stages=tiles.stages,
            )
        if splits > 1:
            launch(
                _linear.reduce_kernel,
                (cdiv(y.numel(), 128),),
                *(y, target, coeffs if bias is None else bias),
                *(y.numel(), tokens, fan_out, splits),
                BLOCK=128,  # one a thread: adjacent threads read adjacent elements
                BIAS=bias is not None,
            )


@torch.no_grad()
def _by_tiles(
    y: Tensor,
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
    chunk: int,
) -> None:
    """Displace ``chunk`` outputs for all branches into scratch and let the vendor multiply."""
    branches, tokens, fan_out = y.shape
    xs = [x] * branches if shared else list(x.view(branches, tokens, -1))
    scratch: Tensor | None = None
    for start in range(0, fan_out, chunk):
        stop = min(start + chunk, fan_out)
        part = w[:, start:stop] if transposed else w[start:stop]
        if scratch is None or scratch.shape[1:] != part.shape:
            scratch = w.new_empty((branches, *part.shape))
        row0 = row_offset + (0 if transposed else start)
        col0 = col_offset + (start if transposed else 0)
        displace_(scratch, part, seeds, coeffs, param_id, row0, col0, distribution, "nearest")
        for g in range(branches):
            left = scratch[g] if transposed else scratch[g].t()
            out = y[g, :, start:stop]
            if bias is None:
                torch.mm(xs[g], left, out=out)
            else:
                # In the weight's dtype the vendor adds it for free in the product's last pass.
                torch.addmm(bias[g, start:stop].to(y.dtype), xs[g], left, out=out)


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
    place = (param_id, row_offset, col_offset, distribution)
    return _product(x, w, bias, seeds, coeffs, *place, shared, transposed, None)


def takes_update(x: Tensor, w: Tensor, coeffs: Tensor, shared: bool, distribution: str) -> bool:
    """Whether ``update_linear_`` of a whole weight is one pass over it, if its kernel launches."""
    branches, terms = coeffs.shape
    tokens = (x.shape[:-1] if shared else x.shape[1:-1]).numel()
    chosen = _plan(x, w, coeffs, tokens, shared, False, distribution)
    rows = tokens if shared and terms == 1 else branches * tokens
    return chosen.fused and any(t.rows >= rows for t in _choices(chosen, w, False))


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
    """``update_`` of ``w`` by pending terms, then ``linear``: in one pass over ``w`` where the plan
    fuses the product and one tile holds all its rows: no weight has two writers. The same numbers
    either way.
    """
    pending = None
    if pending_seeds.numel():
        decay = None if pending_decay is None else pending_decay.contiguous()
        pending = (pending_seeds.contiguous(), pending_coeffs.contiguous(), decay, rounding)
    place = (param_id, row_offset, col_offset, distribution)
    return _product(x, w, bias, seeds, coeffs, *place, shared, False, pending)


def _product(
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
    pending: _Pending | None,
) -> Tensor:
    reachable(w)
    branches = coeffs.shape[0]
    fan_in, fan_out = w.shape if transposed else (w.shape[1], w.shape[0])
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    shared = shared and branches > 1  # one branch is the same either way, and one kernel
    tokens = lead.numel()
    y = x.new_empty((branches, tokens, fan_out))
    flat = x.reshape(-1, fan_in) if fan_in else x.reshape(x.shape[:-1].numel(), 0)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    bias = None if bias is None else bias.contiguous()
    seeds, coeffs = seeds.contiguous(), coeffs.contiguous()
    rest = (flat, w, bias, seeds, coeffs, param_id, row_offset, col_offset)
    kind = (distribution, shared, transposed)
    chosen = _plan(x, w, coeffs, tokens, shared, transposed, distribution)
    choices: list[Tiles] = []
    if chosen.fused and y.numel() and seeds.numel() and fan_in:
        choices = _choices(chosen, w, transposed)
    done = False
    if pending is not None:
        rows = tokens if shared and coeffs.shape[1] == 1 else branches * tokens
        whole = [updating_tiles(tiles) for tiles in choices if tiles.rows >= rows]
        done = _first_that_launches(
            "update_linear_",
            "an update and a product",
            whole,
            lambda tiles: _fused(y, *rest, *kind, tiles, chosen.splits, pending),
        )
        if done:
            written([w])
        else:
            last, scales, decay, rounding = pending
            where = ([param_id], [row_offset], [col_offset])
            update_([w], last, scales, decay, None, *where, distribution, rounding)
    if choices and not done:
        done = _first_that_launches(
            "linear",
            _VENDOR,
            choices,
            lambda tiles: _fused(y, *rest, *kind, tiles, chosen.splits, None),
        )
    if y.numel() and not done:
        chunk = chosen.chunk if not chosen.fused else _fallback_chunk(w, branches)
        _by_tiles(y, *rest, *kind, chunk)
    return y.view(branches, *lead, fan_out)


def _fallback_chunk(w: Tensor, branches: int) -> int:
    """Outputs a tile where the planner had not foreseen tiles."""
    return max(256, (16 << 20) // max(1, w.shape[1] * w.element_size() * branches))


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
    reachable(w)
    if not INTERPRETED:
        FLAGS.look(w.device)
    branches, (vocab, hidden), tokens = coeffs.shape[0], w.shape, targets.numel()
    shared = shared and branches > 1
    losses = torch.zeros((branches, tokens), dtype=torch.float32, device=w.device)
    if losses.numel():
        flat = x.reshape(-1, hidden)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        bias = None if bias is None else bias.contiguous()
        targets = targets.contiguous()
        seeds, coeffs = seeds.contiguous(), coeffs.contiguous()
        place = (param_id, row_offset, col_offset, distribution)
        chosen = _plan(x, w, coeffs, tokens, shared, False, distribution)
        statistics: list[Tensor] = []
        done = False
        if chosen.fused and seeds.numel() and hidden and vocab:
            choices = _choices(chosen, w, False)
            done = _first_that_launches(
                "linear_cross_entropy",
                _VENDOR,
                choices,
                lambda tiles: statistics.append(
                    _fused_statistics(flat, w, bias, targets, seeds, coeffs, *place, shared, tiles)
                ),
            )
        if not done:
            statistics.append(
                _chunk_statistics(flat, w, bias, targets, seeds, coeffs, *place, shared)
            )
        with device_guard(w):
            launch(
                _loss.join_kernel,
                (cdiv(losses.numel(), 128),),
                *(losses, statistics[0], targets, FLAGS.of(w.device), statistics[0].shape[1]),
                *(losses.numel(), tokens, vocab, ignore_index),
                BLOCK=128,
            )
    if INTERPRETED:
        FLAGS.look(w.device, "targets")
    return losses.sum(-1) / (targets != ignore_index).sum()


def _fused_statistics(
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
    tiles: Tiles,
) -> Tensor:
    """Softmax statistics ``[3, tiles of the vocabulary, G tokens]`` from fused products."""
    branches, terms = coeffs.shape
    tokens, vocab = targets.numel(), w.shape[0]
    rows = tokens if shared and terms == 1 else branches * tokens
    pieces = cdiv(vocab, tiles.outputs)
    found = torch.empty((3, pieces, branches * tokens), dtype=torch.float32, device=w.device)
    skip = col_offset % 256
    steps = cdiv(skip + w.shape[1], 256) * (64 // tiles.columns)
    with device_guard(w):
        launch(
            _linear.linear_kernel,
            (pieces, cdiv(rows, tiles.rows), 1),
            *(found, x, w, coeffs if bias is None else bias, targets, seeds, coeffs),
            *(rows, tokens, w.shape[1], vocab, branches, terms, steps),
            *(col_offset // 256, skip, row_offset, signed32(param_id), steps, x.stride(0)),
            *w.stride(),
            OUT=tiles.outputs,
            TOKENS=tiles.rows,
            COLUMNS=tiles.columns,
            COEFFS=0 if terms == 1 else _power(coeffs.numel()),
            SHARED=shared,
            BIAS=bias is not None,
            MODE=2,
            GAUSSIAN=distribution == "gaussian",
            PRECISION=_precision(w.dtype),
            warps=tiles.warps,
            stages=tiles.stages,
        )
    return found


@torch.no_grad()
def _chunk_statistics(
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
) -> Tensor:
    """The same from chunks of float32 logits of the vendor's product."""
    branches, tokens, vocab = coeffs.shape[0], targets.numel(), w.shape[0]
    rows = branches * tokens
    scratch_rows = _fallback_chunk(w, branches)
    # Rows of whole runs of 16: they are read 16 bytes at a time, by one kernel for every chunk.
    most = min(scratch_rows, max(256, _LOGITS // (4 * rows)))
    chunk = max(1, min(vocab, cdiv(most, 16) * 16))
    chunks = cdiv(vocab, chunk)
    found = torch.empty((3, chunks, rows), dtype=torch.float32, device=w.device)
    xs = [x] * branches if shared else list(x.view(branches, tokens, -1))
    for i in range(chunks):
        start, stop = i * chunk, min(vocab, (i + 1) * chunk)
        part = displace(
            *(w[start:stop], seeds, coeffs, param_id, row_offset + start, col_offset),
            *(distribution, "nearest", None),
        )
        width = cdiv(stop - start, 16) * 16
        logits = torch.empty((branches, tokens, width), dtype=torch.float32, device=w.device)
        for g in range(branches):
            _float32_product(xs[g], part[g].t(), logits[g, :, : stop - start])
        with device_guard(w):
            launch(
                _loss.logits_kernel,
                (rows,),
                *(found, logits, found if bias is None else bias, targets, i, chunks, start),
                *(width, rows, tokens, vocab),
                BLOCK=1024,
                BIAS=bias is not None,
            )
    return found


def _float32_product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``x @ w`` without a rounding of the result to 16 bits."""
    if x.dtype == torch.float32:
        torch.mm(x, w, out=out)
    elif x.device.type == "cuda":
        torch.mm(x, w, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), w.float(), out=out)


def synchronize(device: torch.device | str) -> None:
    """Wait for the device and raise the index errors of earlier calls."""
    raise_errors(device)


@functools.cache
def version() -> str:
    """Triton's version."""
    return str(triton.__version__)


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
    **sparse_ops.KERNELS,
}
