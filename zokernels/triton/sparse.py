"""Under a mask: values of the elements that move, their update, products and rows with them in.

    value[e] = shadow[e] where round(shadow[e]) is what w holds at indices[e], else what w holds

    sparse_displace:   out[g, e] = value[e] + sum_k coeffs[g, k] z_k[e]        one fma a term
    sparse_update_:    for k in order:  value = fma(coeffs[k], z_k, value * decay[k])
    sparse_linear:     y[g, t, o] = round(plain[g, t, o] + sum_e D[g, e] x[g, t, source[e]] + bias)
    sparse_embedding:  out[g, i] = w[ids[i]], then out[g, i, col(e)] = round(value[g, e])

The noise is that of a vector: element ``e`` is column ``offset + e`` of row 0. ``D[g, e]`` is
``sparse_displace`` less what ``w`` holds.

Program -> tile (displace, update): ROWS groups of 256 elements, four sub-tiles ``[ROWS, 64]``.
Indices and shadows are read in order, weights one by one. Every branch draws its own noise and the
values wait in memory for their product: of a mask of 0.1%, a thousandth of the weight's elements.

Program -> tile (``correct_kernel``): OUT outputs x TOKENS rows of activations x one branch. The
elements of an output are neighbours (``starts``). The outputs of a tile step through theirs
together, so a tile takes as long as its longest output, and every sum has one order. Activations
of many tokens come turned, tokens next to each other.

Program -> row (``rows_kernel``): one looked-up row of one branch.

Source: Meerkat (arXiv 2506.03337) trains a fixed sparse subset; its kernels are not public.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zokernels.triton.noise import anchor, direction, key_of, moved, narrow, nearest, number, wide

# Columns of the table of sparse_update_: addresses of the weight, of its indices and its shadow,
# their count, the weight's elements, its columns and strides, the parameter id, the first tile.
FIELDS = (
    "address",
    "indices",
    "shadow",
    "count",
    "numel",
    "cols",
    "stride_r",
    "stride_c",
    "param_id",
    "tile0",
)
_WIDTH: tl.constexpr = tl.constexpr(len(FIELDS))


@triton.jit
def _places(w, i, cols, stride_r, stride_c, FLAT: tl.constexpr):
    """Pointers to elements with flat indices ``i``."""
    if FLAT:
        return w + i
    else:
        r = i // cols
        return w + r * stride_r + (i - r * cols) * stride_c


@triton.jit
def _masked(
    w, indices, shadow, flag, e, inside, numel, cols, stride_r, stride_c, FLAT: tl.constexpr
):
    """Of elements ``e``: whether they are in ``w``, what it holds, and what counts."""
    i = tl.load(indices + e, mask=inside, other=0)
    there = inside & (i >= 0) & (i < numel)
    tl.store(flag + tl.zeros_like(i), i, mask=inside & ~there)
    tl.store(flag + 1 + tl.zeros_like(i), numel + tl.zeros_like(i), mask=inside & ~there)
    places = _places(w, i, cols, stride_r, stride_c, FLAT)
    held = wide(tl.load(places, mask=there, other=0.0))
    shade = tl.load(shadow + e, mask=inside, other=0.0)
    rounded = nearest(shade, w.dtype.element_ty)
    same = rounded.to(tl.uint32, bitcast=True) == held.to(tl.uint32, bitcast=True)
    return there, held, tl.where(same, shade, held)


# What the code is no better for knowing: every list and parameter would compile it again.
_FREE = "seeds coeffs count numel cols stride_r group0 skip param_id".split()
# One term is a kernel of its own, all other numbers of terms share one.
_TERMS = ["terms"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_TERMS)
def sparse_displace_kernel(
    out,  # float32 [G, count]
    w,
    indices,
    shadow,
    rank,  # int64 [count]
    seeds,
    coeffs,
    flag,
    count,
    numel,
    cols,
    stride_r,
    stride_c,
    group0,
    skip,
    param_id,
    terms,
    ROWS: tl.constexpr,
    FLAT: tl.constexpr,  # w is contiguous
    LESS: tl.constexpr,  # less what w holds
    RANKED: tl.constexpr,  # element e goes to rank[e]
    GAUSSIAN: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    g = tl.program_id(1)
    c = tl.arange(0, 64)[None, :]
    row = tl.zeros((), tl.uint32)
    col = c.to(tl.uint32)
    counter = (group + group0).to(tl.uint32)
    param = number(param_id, tl.uint32)
    less = ()
    acc = ()
    for j in tl.static_range(4):
        e = group * 256 + (64 * j - skip) + c
        inside = (e >= 0) & (e < count)
        there, held, value = _masked(
            w, indices, shadow, flag, e, inside, numel, cols, stride_r, stride_c, FLAT
        )
        less = less + (held,)
        acc = acc + (tl.where(there, value, float("nan")),)
    zeros = anchor(acc[0])
    for k in range(terms):
        k0, k1 = key_of(tl.load(seeds + k))
        scale = tl.load(coeffs + g * terms + k)
        z = direction(row, col, counter, param, k0, k1, zeros, GAUSSIAN)
        acc = moved(acc, z, scale, 1.0, False)
    first = out + g.to(tl.int64) * count
    for j in tl.static_range(4):
        e = group * 256 + (64 * j - skip) + c
        inside = (e >= 0) & (e < count)
        x = acc[j] - less[j] if LESS else acc[j]
        at = e
        if RANKED:
            at = tl.load(rank + e, mask=inside, other=0)
        tl.store(first + at, x, mask=inside)


@triton.jit(do_not_specialize=["seeds", "coeffs", "decay"], do_not_specialize_on_alignment=_TERMS)
def sparse_update_kernel(
    table,
    owners,
    like,  # only its dtype counts
    seeds,
    coeffs,
    decay,
    flag,
    terms,
    ROWS: tl.constexpr,
    FLAT: tl.constexpr,
    DECAY: tl.constexpr,
    GAUSSIAN: tl.constexpr,
):
    dtype: tl.constexpr = like.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(owners + tile).to(tl.int64) * _WIDTH
    w = tl.load(entry).to(tl.pointer_type(dtype))
    indices = tl.load(entry + 1).to(tl.pointer_type(tl.int64))
    shadow = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    count = tl.load(entry + 3)
    numel = tl.load(entry + 4)
    cols = tl.load(entry + 5)
    stride_r = tl.load(entry + 6)
    stride_c = tl.load(entry + 7)
    param = tl.load(entry + 8).to(tl.uint32)
    group = (tile - tl.load(entry + 9)) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, 64)[None, :]
    row = tl.zeros((), tl.uint32)
    col = c.to(tl.uint32)
    counter = group.to(tl.uint32)
    acc = ()
    for j in tl.static_range(4):
        e = group * 256 + 64 * j + c
        _there, _held, value = _masked(
            w, indices, shadow, flag, e, e < count, numel, cols, stride_r, stride_c, FLAT
        )
        acc = acc + (value,)
    zeros = anchor(acc[0])
    for k in range(terms):
        k0, k1 = key_of(tl.load(seeds + k))
        scale = tl.load(coeffs + k)
        factor = 1.0
        if DECAY:
            factor = tl.load(decay + k)
        # A step that was not finite: not even the sign of a zero may change.
        if (scale != 0.0) | (factor != 1.0):
            z = direction(row, col, counter, param, k0, k1, zeros, GAUSSIAN)
            acc = moved(acc, z, scale, factor, DECAY)
    for j in tl.static_range(4):
        e = group * 256 + 64 * j + c
        i = tl.load(indices + e, mask=e < count, other=-1)
        there = (i >= 0) & (i < numel)
        places = _places(w, i, cols, stride_r, stride_c, FLAT)
        tl.store(shadow + e, acc[j], mask=there)
        tl.store(places, narrow(nearest(acc[j], dtype), dtype), mask=there)


@triton.jit(do_not_specialize=["bias", "count", "tokens", "in_place"])
def correct_kernel(
    out,  # [G, tokens, fan_out], rows contiguous
    plain,  # [G, tokens, fan_out], or [tokens, fan_out] with plain_g = 0
    x,
    bias,  # [G, fan_out]
    difference,  # float32 [G, count], by output
    source,  # int32 [count]: the input of an element
    starts,  # int64 [fan_out + 1]: the first element of an output
    tokens,
    fan_out,
    count,
    in_place,  # 1: out is plain
    out_g,
    plain_g,
    x_g,
    x_t,
    x_c,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,  # elements of an output at once
    TURNED: tl.constexpr,  # tokens lie next to each other and end with a whole tile
    BIAS: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    o = tl.program_id(0).to(tl.int64) * OUT + tl.arange(0, OUT)[:, None]
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[None, :]
    g = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + o, mask=o < fan_out, other=0)
    stop = tl.load(starts + o + 1, mask=o < fan_out, other=0)
    longest = tl.max(stop - start, axis=0)  # [1]
    acc = tl.zeros((OUT, TOKENS), tl.float32)
    for step in range(0, tl.max(longest, axis=0), STEP):
        for i in tl.static_range(STEP):
            e = start + step + i
            d = tl.load(difference + g * count + e, mask=e < stop, other=0.0)
            c = tl.load(source + e, mask=e < stop, other=0).to(tl.int64)
            if TURNED:
                v = tl.load(x + g * x_g + c * x_c + t, mask=e < stop, other=0.0)
            else:
                places = x + g * x_g + c * x_c + t * x_t
                v = tl.load(places, mask=(e < stop) & (t < tokens), other=0.0)
            acc = tl.fma(d, wide(v), acc)
    here = (o < fan_out) & (t < tokens)
    if not BIAS:
        here = here & (longest[:, None] >= in_place)  # else nothing to add
    y = wide(tl.load(plain + g * plain_g + t * fan_out + o, mask=here, other=0.0)) + acc
    if BIAS:
        y += wide(tl.load(bias + g * fan_out + o, mask=o < fan_out, other=0.0))
    tl.store(out + g * out_g + t * fan_out + o, narrow(nearest(y, dtype), dtype), mask=here)


@triton.jit(do_not_specialize=["ids", "count", "tokens", "rows", "ids_g"])
def rows_kernel(
    out,  # [G, tokens, cols]
    w,
    ids,  # [tokens], or [G, tokens] with ids_g = tokens
    indices,
    values,  # float32 [G, count]
    starts,  # int64 [rows + 1]
    flag,
    count,
    tokens,
    rows,
    cols,
    ids_g,
    w_r,
    w_c,
    BLOCK: tl.constexpr,
    PATCH: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    r = tl.load(ids + g * ids_g + i).to(tl.int64)
    bad = (r < 0) | (r >= rows)
    tl.store(flag, r, mask=bad)
    tl.store(flag + 1, number(rows, tl.int64), mask=bad)
    r = tl.where(bad, 0, r)
    first = out + (g * tokens + i) * cols
    for block in range(0, cols, BLOCK):
        c = number(block, tl.int64) + tl.arange(0, BLOCK)
        x = wide(tl.load(w + r * w_r + c * w_c, mask=c < cols, other=0.0))
        tl.store(first + c, narrow(tl.where(bad, float("nan"), x), dtype), mask=c < cols)
    # The row is there before any of its elements is replaced.
    tl.debug_barrier()
    start = tl.load(starts + r)
    stop = tl.where(bad, start, tl.load(starts + r + 1))
    for patch in range(start, stop, PATCH):
        e = patch + tl.arange(0, PATCH)
        c = tl.load(indices + e, mask=e < stop, other=-1) - r * cols
        x = tl.load(values + g * count + e, mask=e < stop, other=0.0)
        inside = (e < stop) & (c >= 0) & (c < cols)
        tl.store(first + c, narrow(nearest(x, dtype), dtype), mask=inside)
