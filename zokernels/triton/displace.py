"""Rows of displaced weights, all branches: ``displace``, ``displace_``, ``embedding``, ``sample``.

    out[g, i, c] = round(w[r_i, c] + sum_k coeffs[g, k] z_k[r_i, c])        one fma a term, in order

``r_i = i`` for a tile of the weight, ``r_i = ids[i]`` (or ``ids[g, i]``) for an embedding.

Program -> tile: axis 0 counts (block of ROWS rows) x (group of 256 columns), groups fastest; axis 1
counts chunks of BRANCHES branches, or single branches where each has ids of its own. A tile is four
sub-tiles of 64 columns. With one term, noise is drawn once and every branch of the program reuses
it; with more, BRANCHES accumulators live in registers and noise is drawn once per chunk.

Napkin (gaussian, bf16, G = 2): 24 instructions of noise and 2 x 3 of fma, rounding and store a
weight, for 2 bytes read and 4 written. An H100 issues about 27 instructions a weight in the time
3.35 TB/s moves 6 bytes, so noise and bandwidth are of the same size.
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
    rounding_words,
    wide,
)


@triton.jit(do_not_specialize=["seed", "rows", "groups", "group0", "row0", "param_id"])
def sample_kernel(
    out,
    seed,
    rows,
    cols,
    groups,
    group0,
    skip,
    row0,
    param_id,
    ROWS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    """``z`` itself, float32 ``[rows, cols]`` contiguous."""
    pid = tl.program_id(0)  # of 32 bits: a division of 64 is a call
    group = pid % groups
    r = (pid // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, 64)[None, :]
    k0, k1 = key_of(tl.load(seed))
    z = direction(
        (r + row0).to(tl.uint32),
        c.to(tl.uint32),
        (group0 + group).to(tl.uint32),
        number(param_id, tl.uint32),
        k0,
        k1,
        tl.zeros((), tl.uint32),
        GAUSSIAN,
    )
    for j in tl.static_range(4):
        col = group.to(tl.int64) * 256 + (64 * j - skip) + c
        tl.store(out + r * cols + col, z[j], mask=(r < rows) & (col >= 0) & (col < cols))


# What the code is no better for knowing: every batch and parameter would compile it again.
_FREE = "seeds coeffs count rows groups group0 row0 param_id terms branches".split()


@triton.jit(do_not_specialize=_FREE)
def displace_kernel(
    out,
    w,
    ids,
    seeds,
    coeffs,
    flag,
    count,  # rows to make (of one branch)
    rows,  # rows of w
    cols,
    groups,
    group0,
    skip,
    row0,
    param_id,
    terms,
    branches,
    out_g,
    out_r,
    out_c,
    w_r,
    w_c,
    ROWS: tl.constexpr,
    BRANCHES: tl.constexpr,  # 0: one term, all branches
    GATHER: tl.constexpr,  # 0: rows of w in order; 1: ids shared by the branches; 2: ids of each
    GAUSSIAN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    pid = tl.program_id(0)
    chunk = tl.program_id(1)
    group = pid % groups
    i = (pid // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, 64)[None, :]
    there = i < count
    bad = i < 0
    r = i
    if GATHER:
        at = i + (chunk.to(tl.int64) * count if GATHER == 2 else 0)
        r = tl.load(ids + at, mask=there, other=0).to(tl.int64)
        bad = there & ((r < 0) | (r >= rows))
        # The value travels to the host with the next look at the flag; the row becomes NaN.
        tl.store(flag + tl.zeros_like(i), r, mask=bad)
        tl.store(flag + 1 + tl.zeros_like(i), rows + tl.zeros_like(i), mask=bad)
        r = tl.where(bad, 0, r)
    row = (r + row0).to(tl.uint32)
    col_bits = c.to(tl.uint32)
    counter = (group0 + group).to(tl.uint32)
    param = number(param_id, tl.uint32)

    base = ()
    words = ()
    for j in tl.static_range(4):
        col = group.to(tl.int64) * 256 + (64 * j - skip) + c
        inside = there & (col >= 0) & (col < cols)
        x = wide(tl.load(w + r * w_r + col * w_c, mask=inside, other=0.0))
        base = base + (tl.where(bad, float("nan"), x) if GATHER else x,)
    zeros = anchor(base[0])
    if STOCHASTIC:
        s0, s1 = key_of(tl.load(seeds))
        words = rounding_words(row, col_bits, counter >> 1, param, s0, s1, zeros, 2)

    if BRANCHES == 0:
        k0, k1 = key_of(tl.load(seeds))
        z = direction(row, col_bits, counter, param, k0, k1, zeros, GAUSSIAN)
        first = chunk if GATHER == 2 else 0
        last = chunk + 1 if GATHER == 2 else branches
        for g in range(first, last):
            found = moved(base, z, tl.load(coeffs + g), 1.0, False)
            found = last_rounded(found, words, counter & 1, dtype, STOCHASTIC)
            for j in tl.static_range(4):
                col = group.to(tl.int64) * 256 + (64 * j - skip) + c
                place = out + number(g, tl.int64) * out_g + i * out_r + col * out_c
                tl.store(place, found[j], mask=there & (col >= 0) & (col < cols))
    else:
        acc = ()
        for _ in tl.static_range(BRANCHES):
            acc = acc + (base,)
        for k in range(terms):
            k0, k1 = key_of(tl.load(seeds + k))
            z = direction(row, col_bits, counter, param, k0, k1, zeros, GAUSSIAN)
            new = ()
            for b in tl.static_range(BRANCHES):
                g = chunk * BRANCHES + b
                scale = tl.load(coeffs + g * terms + k, mask=g < branches, other=0.0)
                new = new + (moved(acc[b], z, scale, 1.0, False),)
            acc = new
        for b in tl.static_range(BRANCHES):
            g = chunk * BRANCHES + b
            if g < branches:
                found = last_rounded(acc[b], words, counter & 1, dtype, STOCHASTIC)
                for j in tl.static_range(4):
                    col = group.to(tl.int64) * 256 + (64 * j - skip) + c
                    place = out + number(g, tl.int64) * out_g + i * out_r + col * out_c
                    tl.store(place, found[j], mask=there & (col >= 0) & (col < cols))
