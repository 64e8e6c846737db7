"""Many tensors in one launch: ``update_``, ``project`` and ``displace_vectors``.

    update_:  for k in order:  w = fma(coeffs[k], z_k, w * decay[k]);  if ends[k]:  w = round(w)
    project:  out[k] = sum over tensors of <v, z_k>, products and sums in float64
    displace_vectors:  out[g, i] = v[i] + sum_k coeffs[g, k] z_k[i], float32, vector after vector

Many tensors, one launch: row ``t`` of ``table`` (int64) describes tensor ``t`` (:data:`FIELDS`) and
``owners[tile]`` says whose a tile is. A tile is ROWS x 512 columns, eight sub-tiles of 64, because
two groups of 256 share one draw of rounding bits.

Program -> tile (update_): one each. A weight is read once and written once, whatever the number of
terms: everything between happens in registers, roundings included, so a replay equals the separate
steps bit for bit. A term of coefficient 0 and decay 1 is left out (its rounding is idempotent).

Program -> tiles (project): a contiguous run of tiles, and SEEDS seeds; partial sums of one program
are added in a fixed order by ``project_sum_kernel``, one program a seed.

Napkin (bf16, stochastic, one term): 4 bytes a weight; gaussian 24 instructions of noise, 4 of
rounding words (half a Philox call for eight weights), about 8 of conversion and rounding. On a
GPU with 2 TB/s for every 19e12 instructions/s, as the A100, the generator and the bytes take the
same time within a factor of 1.2; rademacher is bound by the bytes everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zokernels.triton.noise import (
    anchor,
    direction,
    key_of,
    last_rounded,
    moved,
    number,
    rounded,
    rounding_words,
    wide,
)

# Columns of the table: address, rows, columns, strides in elements, parameter id, row offset, first
# pair of groups, columns left out of it, pairs, first tile.
FIELDS = (
    "address",
    "rows",
    "cols",
    "stride_r",
    "stride_c",
    "param_id",
    "row0",
    "pair0",
    "skip",
    "pairs",
    "tile0",
    "start",  # elements of the tensors before this one
)
_WIDTH: tl.constexpr = tl.constexpr(len(FIELDS))


@triton.jit
def _place(table, owners, tile, dtype: tl.constexpr, ROWS: tl.constexpr, DENSE: tl.constexpr):
    """Where a tile is: pointers to its first sub-tile and the step to the next, its rows' mask, the
    columns that are the tensor's (from ``first``, before ``last``), counters.
    """
    entry = table + tl.load(owners + tile).to(tl.int64) * _WIDTH
    pointer = tl.load(entry).to(tl.pointer_type(dtype))
    rows = tl.load(entry + 1)
    cols = tl.load(entry + 2)
    stride_r = tl.load(entry + 3)
    stride_c = tl.load(entry + 4)
    pairs = tl.load(entry + 9).to(tl.int32)
    # Of 32 bits: a division of 64 is a call.
    local = (tile - tl.load(entry + 10)).to(tl.int32)
    pair = (local % pairs).to(tl.int64)
    row0 = (local // pairs).to(tl.int64) * ROWS
    start = pair * 512 - tl.load(entry + 8)
    r = row0 + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, 64)[None, :]
    there = tl.arange(0, ROWS)[:, None] < tl.minimum(rows - row0, ROWS).to(tl.int32)
    first = tl.maximum(-start, 0).to(tl.int32)
    last = tl.minimum(cols - start, 512).to(tl.int32)
    if DENSE:
        # Aligned contiguous rows without a column offset: sixteen bytes at a time.
        pointer = tl.multiple_of(pointer, 16)
        stride_r = tl.multiple_of(stride_r, 16)
        first = 0
        last = tl.multiple_of(last, 16)
        places = pointer + r * stride_r + (pair * 512 + c)
        step = 64
    else:
        places = pointer + r * stride_r + (start + c) * stride_c
        step = 64 * stride_c
    row = (r + tl.load(entry + 6)).to(tl.uint32)
    number = (tl.load(entry + 7) + pair).to(tl.uint32)
    param = tl.load(entry + 5).to(tl.uint32)
    return places, step, there, first, last, row, number, param


@triton.jit
def _inside(there, j: tl.constexpr, first, last):
    """Elements of sub-tile ``j`` that are the tensor's."""
    at = tl.arange(0, 64)[None, :] + 64 * j
    return there & (at >= first) & (at < last)


# One term is a kernel of its own, all other numbers of terms share one.
_TERMS = ["terms"]


@triton.jit(
    do_not_specialize=["seeds", "coeffs", "decay", "ends"], do_not_specialize_on_alignment=_TERMS
)
def update_kernel(
    table,
    owners,
    like,  # only its dtype counts
    seeds,
    coeffs,
    decay,
    ends,
    terms,
    ROWS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DECAY: tl.constexpr,
    ENDS: tl.constexpr,
    DENSE: tl.constexpr,
):
    dtype: tl.constexpr = like.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    places, step, there, first, last, row, pair, param = _place(
        table, owners, tile, dtype, ROWS, DENSE
    )
    col = tl.arange(0, 64)[None, :].to(tl.uint32)
    both = last > 256  # the second group has columns of the tensor
    even = ()
    odd = ()
    for j in tl.static_range(4):
        inside = _inside(there, j, first, last)
        even = even + (wide(tl.load(places + step * j, mask=inside, other=0.0)),)
    for j in tl.static_range(4, 8):
        inside = _inside(there, j, first, last)
        odd = odd + (wide(tl.load(places + step * j, mask=inside, other=0.0)),)
    zeros = anchor(even[0])
    for k in range(terms):
        k0, k1 = key_of(tl.load(seeds + k))
        scale = tl.load(coeffs + k)
        factor = 1.0
        if DECAY:
            factor = tl.load(decay + k)
        if (scale != 0.0) | (factor != 1.0):
            z = direction(row, col, pair * 2, param, k0, k1, zeros, GAUSSIAN)
            even = moved(even, z, scale, factor, DECAY)
            if both:
                z = direction(row, col, pair * 2 + 1, param, k0, k1, zeros, GAUSSIAN)
                odd = moved(odd, z, scale, factor, DECAY)
        if dtype != tl.float32:
            end = k < terms - 1  # the last one follows behind
            if ENDS:
                end = end & (tl.load(ends + k) != 0)
            if end:
                words = ()
                if STOCHASTIC:
                    words = rounding_words(row, col, pair, param, k0, k1, zeros, 1)
                even = rounded(even, words, 0, dtype, STOCHASTIC)
                odd = rounded(odd, words, 1, dtype, STOCHASTIC)
    words = ()
    if STOCHASTIC:
        k0, k1 = key_of(tl.load(seeds + terms - 1))
        words = rounding_words(row, col, pair, param, k0, k1, zeros, 1)
    new = last_rounded(even, words, 0, dtype, STOCHASTIC)
    new = new + last_rounded(odd, words, 1, dtype, STOCHASTIC)
    for j in tl.static_range(8):
        inside = _inside(there, j, first, last)
        tl.store(places + step * j, new[j], mask=inside)


@triton.jit(
    do_not_specialize=["seeds", "coeffs", "branches"], do_not_specialize_on_alignment=_TERMS
)
def vectors_kernel(
    out,
    table,
    owners,
    like,
    seeds,
    coeffs,
    branches,
    terms,
    GAUSSIAN: tl.constexpr,
):
    """One program a tile of 512 columns of a vector and a branch: they are few."""
    dtype: tl.constexpr = like.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    places, step, there, first, last, row, pair, param = _place(
        table, owners, tile, dtype, 1, False
    )
    entry = table + tl.load(owners + tile).to(tl.int64) * _WIDTH
    made = out + tl.load(entry + 11) * branches + g.to(tl.int64) * tl.load(entry + 2)
    made += pair.to(tl.int64) * 512 + tl.arange(0, 64)[None, :]
    col = tl.arange(0, 64)[None, :].to(tl.uint32)
    for half in tl.static_range(2):
        acc = ()
        for j in tl.static_range(4):
            inside = _inside(there, 4 * half + j, first, last)
            x = tl.load(places + step * (4 * half + j), mask=inside, other=0.0)
            acc = acc + (wide(x),)
        zeros = anchor(acc[0])
        for k in range(terms):
            k0, k1 = key_of(tl.load(seeds + k))
            scale = tl.load(coeffs + g * terms + k)
            z = direction(row, col, pair * 2 + half, param, k0, k1, zeros, GAUSSIAN)
            acc = moved(acc, z, scale, 1.0, False)
        for j in tl.static_range(4):
            inside = _inside(there, 4 * half + j, first, last)
            tl.store(made + 64 * (4 * half + j), acc[j], mask=inside)


@triton.jit(
    do_not_specialize=["partial", "seeds", "tiles", "run"], do_not_specialize_on_alignment=_TERMS
)
def project_kernel(
    partial,  # float64 [programs, terms]
    table,
    owners,
    like,
    seeds,
    tiles,
    run,  # tiles a program
    terms,
    ROWS: tl.constexpr,
    SEEDS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    DENSE: tl.constexpr,
):
    dtype: tl.constexpr = like.dtype.element_ty
    # Programs that share tiles run next to each other.
    chunk = tl.program_id(0)
    program = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, 64)[None, :].to(tl.uint32)
    sums = ()
    for _ in tl.static_range(SEEDS):
        sums = sums + (tl.zeros((ROWS, 64), tl.float64),)
    for tile in range(program * run, tl.minimum(program * run + run, tiles)):
        places, step, there, first, last, row, pair, param = _place(
            table, owners, tile, dtype, ROWS, DENSE
        )
        for half in tl.static_range(2):
            v = ()
            for j in tl.static_range(4):
                inside = _inside(there, 4 * half + j, first, last)
                x = tl.load(places + step * (4 * half + j), mask=inside, other=0.0)
                x = wide(x)
                zeros = anchor(x)
                v = v + (x.to(tl.float64),)
            new = ()
            for s in tl.static_range(SEEDS):
                k = tl.minimum(chunk * SEEDS + s, terms - 1)
                k0, k1 = key_of(tl.load(seeds + k))
                z = direction(row, col, pair * 2 + half, param, k0, k1, zeros, GAUSSIAN)
                total = sums[s]
                for j in tl.static_range(4):
                    total = tl.fma(v[j], z[j].to(tl.float64), total)
                new = new + (total,)
            sums = new
    for s in tl.static_range(SEEDS):
        k = chunk * SEEDS + s
        value = tl.sum(tl.sum(sums[s], axis=1), axis=0)
        tl.store(partial + program * terms + k, value, mask=k < terms)


@triton.jit(do_not_specialize=["programs", "terms"])
def project_sum_kernel(out, partial, programs, terms, BLOCK: tl.constexpr):
    """``out[k] = sum over programs of partial[:, k]``, in a fixed order, rounded once."""
    k = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        at = number(start, tl.int64) + i
        total += tl.load(partial + at * terms + k, mask=at < programs, other=0.0)
    tl.store(out + k, tl.sum(total, axis=0).to(tl.float32))
