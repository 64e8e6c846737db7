"""Adapters of the ops under a mask, from their positional signatures to the kernels.

A product is the vendor's, of the weight as it is and the stacked rows of all branches, and a
correction whose work is that of the elements that move. Which elements belong to which output
depends on the indices alone: it is worked out on the device, once for each list, and kept as long
as the list lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernels._native import ByList, plain_product, put_back
from zokernels.deferred import recording
from zokernels.noise import matrix_shape
from zokernels.triton import sparse as _sparse
from zokernels.triton.launch import FLAGS, cdiv, indexed, launch, reachable, signed32
from zokernels.triton.noise import INTERPRETED
from zokernels.triton.plan import MOST_PROGRAMS
from zokernels.triton.tables import Group, group, kept

# Groups of 256 elements of a tile. The interpreter pays for operations, not for their size.
_ROWS = 16 if INTERPRETED else 4
# Outputs and rows of activations of a tile, rows where they are few, elements of an output at once.
_OUTPUTS, _TOKENS, _FEW_TOKENS, _STEP = (128, 64, 64, 4) if INTERPRETED else (32, 64, 16, 4)
# More rows than this are turned, so that an element reads neighbours, this many bytes at a time.
_FEW, _TURNED = 64, 32 << 20


# --- which element belongs to which output --------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A list of elements by output.

    Attributes:
        starts: int64 ``[fan_out + 1]``, the first element of every output.
        source: int32 ``[n]``, the inputs of the elements.
        rank: int64 ``[n]``, places of the elements in this order; None: the list's own.
    """

    starts: Tensor
    source: Tensor
    rank: Tensor | None


_layouts = ByList()


def _layout(indices: Tensor, shape: torch.Size, transposed: bool) -> _Layout:
    """The layout of a list in a weight of this shape. Nothing waits for the device."""
    return _layouts.get(
        indices,
        (shape, transposed),
        lambda: _laid_out(indices, shape, transposed),
        keep=not recording(indices.device),
    )


def _laid_out(indices: Tensor, shape: torch.Size, transposed: bool) -> _Layout:
    rows, cols = shape
    outputs = torch.arange((cols if transposed else rows) + 1, device=indices.device)
    col = indices % max(cols, 1)
    if not transposed:
        return _Layout(torch.searchsorted(indices, outputs * cols), col.int(), None)
    # A bad index makes its output NaN, but must not lead outside the activations.
    row = (indices // max(cols, 1)).clamp(0, max(rows - 1, 0))
    col, order = torch.sort(col, stable=True)
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )
    return _Layout(torch.searchsorted(col, outputs), row[order].int(), rank)


# --- values ---------------------------------------------------------------------------------------


def _matrix(w: Tensor) -> Tensor:
    """``w`` as a matrix; a copy where no matrix has its strides."""
    return w.detach().reshape(matrix_shape(w.shape))


def _displaced(
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
    *,
    less: bool = False,
    rank: Tensor | None = None,
) -> Tensor:
    """float32 ``[G, n]``: masked values, ``less`` what ``w`` holds, in the order of ``rank``."""
    (branches, terms), count = coeffs.shape, indices.numel()
    out = torch.empty((branches, count), dtype=torch.float32, device=w.device)
    if count:
        matrix = _matrix(w)
        skip = offset % 256
        launch(
            _sparse.sparse_displace_kernel,
            (cdiv(skip + count, 256 * _ROWS), branches),
            *(out, matrix, indices.contiguous(), shadow.contiguous()),
            *(indices if rank is None else rank, seeds.contiguous(), coeffs.contiguous()),
            *(FLAGS.of(w.device), count, matrix.numel(), matrix.shape[1], *matrix.stride()),
            *(offset // 256, skip, signed32(param_id), terms),
            ROWS=_ROWS,
            FLAT=matrix.is_contiguous(),
            LESS=less,
            RANKED=rank is not None,
            GAUSSIAN=distribution == "gaussian",
        )
    return out


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
    reachable(w)
    with indexed(w):
        return _displaced(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)


# --- update ---------------------------------------------------------------------------------------


def _lists(
    matrices: Sequence[Tensor],
    indices: Sequence[Tensor],
    shadows: Sequence[Tensor],
    param_ids: Sequence[int],
) -> list[Group]:
    """Tables of masked parameters, as :data:`zokernels.triton.sparse.FIELDS` says."""
    members = [
        (w, i.data_ptr(), s.data_ptr(), i.numel(), param_id)
        for w, i, s, param_id in zip(matrices, indices, shadows, param_ids, strict=True)
        if i.numel()
    ]

    def make() -> list[Group]:
        classes: dict[tuple[torch.dtype, bool], list[tuple[Tensor, int, int, int, int]]] = {}
        for member in members:
            kind = member[0].dtype, member[0].is_contiguous()
            classes.setdefault(kind, []).append(member)
        groups = []
        for (_, flat), alike in classes.items():
            entries, counts, first = [], [], 0
            for w, index, shadow, count, param_id in alike:
                place = (w.numel(), w.shape[1], *w.stride(), param_id, first)
                entries.append((w.data_ptr(), index, shadow, count, *place))
                counts.append(cdiv(count, 256 * _ROWS))
                first += counts[-1]
            groups.append(group(entries, counts, alike[0][0], flat))
        return groups

    device = matrices[0].device
    key = [(w.data_ptr(), w.dtype, w.shape, w.stride(), *rest) for w, *rest in members]
    return kept(("masked", tuple(key), device), device, make)


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
    reachable(params[0])
    matrices = [_matrix(p) for p in params]
    lists, held = [i.contiguous() for i in indices], [s.contiguous() for s in shadows]
    with indexed(params[0]):
        for some in _lists(matrices, lists, held, param_ids):
            launch(
                _sparse.sparse_update_kernel,
                (some.tiles,),
                *(some.table, some.owners, some.like, seeds.contiguous(), coeffs.contiguous()),
                *(coeffs if decay is None else decay.contiguous(), FLAGS.of(seeds.device)),
                seeds.numel(),
                ROWS=_ROWS,
                FLAT=some.dense,
                DECAY=decay is not None,
                GAUSSIAN=distribution == "gaussian",
            )
        put_back([*params, *shadows], [*matrices, *held])


# --- products and rows ----------------------------------------------------------------------------


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
    reachable(w)
    x, w = x.detach(), w.detach()
    bias = None if bias is None else bias.detach()
    branches, fan_out = coeffs.shape[0], w.shape[1 if transposed else 0]
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    tokens = lead.numel()
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    plain, late = plain_product(flat, w, bias, transposed)
    plain = plain.view(1 if shared else branches, tokens, fan_out)
    rows = flat.view(plain.shape[0], tokens, flat.shape[1])
    y = plain.new_empty((branches, tokens, fan_out)) if shared and branches > 1 else plain
    if not y.numel() or (late is None and not indices.numel()):
        y = plain.expand(branches, -1, -1).contiguous()
    else:
        with indexed(w):
            by_output = _layout(indices, w.shape, transposed)
            difference = _displaced(
                *(w, indices, shadow, seeds, coeffs, param_id, offset, distribution),
                less=True,
                rank=by_output.rank,
            )
            _correct(y, plain, rows, late, difference, by_output)
    return y.view(branches, *lead, fan_out)


def _correct(
    y: Tensor,  # [G, tokens, out]; may be plain
    plain: Tensor,  # [G, tokens, out], or [1, tokens, out]
    x: Tensor,  # [G, tokens, in], or [1, tokens, in]
    bias: Tensor | None,  # [G, out]
    difference: Tensor,  # [G, n]
    by_output: _Layout,
) -> None:
    """``y = round(plain + x D^T + bias)``."""
    (branches, tokens, fan_out), count = y.shape, difference.shape[1]
    # Turning all of x costs what an element in four of its columns costs: not for fewer.
    turn = tokens > _FEW and 4 * count > x.shape[2]
    tile = _TOKENS if turn else _FEW_TOKENS
    fit = _TURNED // (x.shape[0] * x.shape[2] * x.element_size()) if turn else tokens
    chunk = min(tokens, max(tile, fit // tile * tile), MOST_PROGRAMS * tile)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        some = _turned(x[:, part], tile) if turn else x[:, part]
        launch(
            _sparse.correct_kernel,
            (cdiv(fan_out, _OUTPUTS), cdiv(some.shape[1], tile), branches),
            *(y[:, part], plain[:, part], some, y if bias is None else bias),
            *(difference, by_output.source, by_output.starts),
            *(some.shape[1], fan_out, count, int(y is plain), y.stride(0)),
            *[0 if t.shape[0] == 1 else t.stride(0) for t in (plain, some)],
            *some.stride()[1:],
            OUT=_OUTPUTS,
            TOKENS=tile,
            STEP=_STEP,
            TURNED=turn,
            BIAS=bias is not None,
        )


def _turned(x: Tensor, tile: int) -> Tensor:
    """A copy of ``[G, tokens, in]`` with whole tiles of tokens next to each other."""
    branches, tokens, fan_in = x.shape
    memory = x.new_empty((branches, fan_in, cdiv(tokens, tile) * tile))
    copy = memory[:, :, :tokens].transpose(1, 2)
    copy.copy_(x)
    return copy


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
    reachable(w)
    w = w.detach()
    branches, lead = coeffs.shape[0], ids.shape if shared else ids.shape[1:]
    tokens, count = lead.numel(), indices.numel()
    out = w.new_empty((branches, tokens, w.shape[1]))
    if ids.numel() and not w.shape[0]:
        raise IndexError("ids must be in [0, 0): the table has no rows")
    if out.numel():
        with indexed(w):
            values = _displaced(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
            launch(
                _sparse.rows_kernel,
                (tokens, branches),
                *(out, w, ids.contiguous(), indices.contiguous(), values),
                *(_layout(indices, w.shape, False).starts, FLAGS.of(w.device), count, tokens),
                *(*w.shape, 0 if shared else tokens, *w.stride()),
                BLOCK=1024,
                PATCH=128,
            )
    return out.view(branches, *lead, w.shape[1])


KERNELS: dict[str, Callable[..., object]] = {
    "sparse_displace": sparse_displace,
    "sparse_update_": sparse_update_,
    "sparse_linear": sparse_linear,
    "sparse_embedding": sparse_embedding,
}
