"""Fused products with displaced weights: ``linear`` and ``linear_cross_entropy`` for few tokens.

    y[g, m, n] = sum_c x[g, m, c] (w[n, c] + sum_k coeffs[g, k] z_k[n, c]) + bias[g, n]

The displaced weight is not formed. With one term (a MeZO step) the stacked rows of all branches
meet the weight and the noise apart, ::

    base[n, m] = sum_c w[n, c] x[m, c]        noise[n, m] = sum_c z[n, c] x[m, c]
    y[m, n]    = base[n, m] + coeffs[g(m)] noise[n, m] + bias[g(m), n]

so a weight is read once and drawn once for all branches of a program's rows, the product of the
weights is a plain pipelined matrix product, and ``eps z`` is not lost under the last bit of a
16-bit weight: only ``z`` itself is rounded, by a relative 2**-9 (bf16) or 2**-11 (fp16). With
several terms, ``x`` is scaled by ``coeffs[g(m), k] / max |coeffs|`` before it meets ``z_k``, and
``noise`` by the maximum at the end.

Program -> tile (``linear_kernel``): axis 0 an output tile of OUT weight rows, axis 1 a tile of
TOKENS stacked rows, axis 2 a run of steps along the columns (split K, where there are too few
output tiles to fill the GPU; partial sums are added in order by ``reduce_kernel``). The weight is
the left operand, so that a warp owns rows of it and no two warps draw the same noise. A step takes
COLUMNS of the 64 counters of a group of 256 columns, that is four sub-tiles of COLUMNS columns, 64
apart, from one Philox call a counter: the K dimension of the products needs no re-layout.

``conv1d_kernel`` is the same for a weight stored ``[in, out]`` (GPT-2): the sub-tiles lie along the
outputs, each with accumulators of its own.

Napkin (bf16, G = 2, one term): a weight costs 2 bytes, 24 instructions of noise and 4 FLOP a row of
activations. H100: 2 bytes take 0.6 ps, 24 instructions 0.8 ps, 64 rows 0.3 ps of matrix units. So
up to about a hundred rows the generator and the bytes decide, and the products are free; with more
rows noise is drawn again for each tile of TOKENS, and displacing once for cuBLAS wins
(:mod:`zokernels.planner`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zokernels.triton.noise import (
    _INTERPRETED,
    anchor,
    direction,
    key_of,
    moved,
    narrow,
    nearest,
    number,
    rounded,
    rounding_words,
    wide,
)


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """A tile as the matrix unit takes it; the interpreter multiplies in float32."""
    if not _INTERPRETED:
        return x.to(dtype)
    elif x.dtype == dtype:
        return wide(x)
    else:
        return nearest(x, dtype)


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _largest(coeffs, branches, terms, COEFFS: tl.constexpr):
    """``max |coeffs|`` and its inverse (0 for 0)."""
    i = tl.arange(0, COEFFS)
    values = tl.load(coeffs + i, mask=i < branches * terms, other=0.0)
    top = tl.max(tl.abs(values), axis=0)
    return top, tl.where(top > 0.0, 1.0 / tl.where(top > 0.0, top, 1.0), 0.0)


@triton.jit
def _updated(
    w,  # four sub-tiles of a group
    seeds,
    coeffs,
    decay,
    terms,
    row,
    col,
    counter,
    param,
    GAUSSIAN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The sub-tiles after ``update_``, every term rounded (:mod:`zokernels.triton.update`)."""
    dtype: tl.constexpr = w[0].dtype
    x = ()
    for j in tl.static_range(4):
        x = x + (wide(w[j]),)
    zeros = anchor(x[0])
    for k in range(terms):
        k0, k1 = key_of(tl.load(seeds + k))
        scale = tl.load(coeffs + k)
        factor = 1.0
        if decay is not None:
            factor = tl.load(decay + k)
        if (scale != 0.0) | (factor != 1.0):
            z = direction(row, col, counter, param, k0, k1, zeros, GAUSSIAN)
            x = moved(x, z, scale, factor, decay is not None)
            words = ()
            if STOCHASTIC:
                words = rounding_words(row, col, counter >> 1, param, k0, k1, zeros, 1)
            x = rounded(x, words, counter & 1, dtype, STOCHASTIC)
    new = ()
    for j in tl.static_range(4):
        new = new + (narrow(x[j], dtype),)
    return new


# What the code is no better for knowing: every batch and parameter would compile it again.
_FREE = "bias seeds coeffs rows tokens branches group0 row0 param_id run".split()
_MORE = "targets steps pending_seeds pending_coeffs pending_decay".split()
# One term is a kernel of its own, all other numbers of terms share one.
_TERMS = ["terms"]


@triton.jit(do_not_specialize=[*_FREE, *_MORE], do_not_specialize_on_alignment=_TERMS)
def linear_kernel(
    y,  # [G tokens, out]; float32 [splits, G tokens, out]; or float32 [3, tiles, G tokens]
    x,
    w,
    bias,
    targets,
    seeds,
    coeffs,
    rows,  # stacked rows of activations
    tokens,  # of one branch
    fan_in,
    fan_out,
    branches,
    terms,
    steps,  # of COLUMNS counters: 64 / COLUMNS a group
    group0,
    skip,
    row0,
    param_id,
    run,  # steps a program
    x_m,
    w_r,
    w_c,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the 64 counters at once
    COEFFS: tl.constexpr,  # 0: one term
    SHARED: tl.constexpr,  # activations without a branch dimension
    BIAS: tl.constexpr,
    MODE: tl.constexpr,  # 0: y; 1: partial sums of a split; 2: softmax statistics
    GAUSSIAN: tl.constexpr,
    PRECISION: tl.constexpr,
    pending_seeds=None,  # of an update of w that is made first; all rows are in one tile then
    pending_coeffs=None,
    pending_decay=None,
    pending_terms=0,
    STOCHASTIC: tl.constexpr = False,
):
    dtype: tl.constexpr = w.dtype.element_ty
    # Tiles are counted in 32 bits, addresses in 64.
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, :]
    split = tl.program_id(2)
    row = n.to(tl.uint32) + number(row0, tl.uint32)
    param = number(param_id, tl.uint32)
    # Several terms need a row for every branch; one term shares the products of shared rows.
    expand: tl.constexpr = SHARED and COEFFS > 0
    at = x + (m % tokens if expand else m).to(tl.int64) * x_m
    weights = w + n.to(tl.int64) * w_r
    nothing = tl.zeros((), tl.uint32)  # noise goes where the products want it
    base = tl.zeros((OUT, TOKENS), tl.float32)
    noise = tl.zeros((OUT, TOKENS), tl.float32)
    k0, k1 = key_of(tl.load(seeds))
    top = 1.0
    inverse = 1.0
    if COEFFS > 0:
        top, inverse = _largest(coeffs, branches, terms, COEFFS)
    for step in range(split * run, tl.minimum(split * run + run, steps)):
        group = step // (64 // COLUMNS)
        c = (step % (64 // COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
        counter = number(group0 + group, tl.uint32)
        first = group * 256 - skip
        col = c[None, :].to(tl.uint32)
        wj = ()
        for j in tl.static_range(4):
            k = (first + 64 * j + c)[None, :]
            inside = (k >= 0) & (k < fan_in) & (n < fan_out)
            wj = wj + (tl.load(weights + k.to(tl.int64) * w_c, mask=inside, other=0.0),)
        if pending_seeds is not None:
            wj = _updated(
                wj,
                pending_seeds,
                pending_coeffs,
                pending_decay,
                pending_terms,
                row,
                col,
                counter,
                param,
                GAUSSIAN,
                STOCHASTIC,
            )
            for j in tl.static_range(4):
                k = (first + 64 * j + c)[None, :]
                inside = (k >= 0) & (k < fan_in) & (n < fan_out)
                tl.store(weights + k.to(tl.int64) * w_c, wj[j], mask=inside)
        if COEFFS == 0:
            z = direction(row, col, counter, param, k0, k1, nothing, GAUSSIAN)
        for j in tl.static_range(4):
            k = (first + 64 * j + c)[:, None]
            xj = tl.load(at + k, mask=(k >= 0) & (k < fan_in) & (m < rows), other=0.0)
            xj = _operand(xj, dtype)
            base = _multiply(_operand(wj[j], dtype), xj, base, PRECISION)
            if COEFFS == 0:
                noise = _multiply(_operand(z[j], dtype), xj, noise, PRECISION)
        if COEFFS > 0:
            for term in range(terms):
                k0, k1 = key_of(tl.load(seeds + term))
                z = direction(row, col, counter, param, k0, k1, nothing, GAUSSIAN)
                place = coeffs + (m // tokens).to(tl.int64) * terms + term
                scale = tl.load(place, mask=m < rows, other=0.0) * inverse
                for j in tl.static_range(4):
                    k = (first + 64 * j + c)[:, None]
                    xj = tl.load(at + k, mask=(k >= 0) & (k < fan_in) & (m < rows), other=0.0)
                    xj = _operand(wide(xj) * scale, dtype)
                    noise = _multiply(_operand(z[j], dtype), xj, noise, PRECISION)

    # One pass for stacked rows; a pass a branch where all branches share the products.
    passes = 1
    if SHARED and COEFFS == 0:
        passes = branches
    outputs = branches * number(tokens, tl.int64)
    for g in range(passes):
        own = m + number(g, tl.int64) * tokens  # row of the stacked output
        branch = number(g, tl.int64) + m // tokens
        if COEFFS == 0:
            result = tl.fma(noise, tl.load(coeffs + branch, mask=m < rows, other=0.0), base)
        else:
            result = tl.fma(noise, top, base)
        inside = (n < fan_out) & (m < rows)
        if BIAS and MODE != 1:
            result += wide(tl.load(bias + branch * fan_out + n, mask=inside, other=0.0))
        if MODE == 0:
            out = narrow(nearest(result, dtype), dtype)
            tl.store(y + own * fan_out + n, out, mask=inside)
        elif MODE == 1:
            place = y + (split.to(tl.int64) * outputs + own) * fan_out + n
            tl.store(place, result, mask=inside)
        else:
            _softmax_statistics(y, result, targets, own, n, m, rows, tokens, fan_out, outputs)


@triton.jit
def _softmax_statistics(y, logits, targets, own, n, m, rows, tokens, vocab, outputs):
    """Maximum, sum of exponentials and the target's logit over the tile's outputs."""
    logits = tl.where(n < vocab, logits, float("-inf"))
    # A NaN must not vanish in a maximum.
    broken = tl.max((logits != logits).to(tl.int32), axis=0)[None, :] != 0
    top = tl.max(tl.where(logits != logits, float("-inf"), logits), axis=0)[None, :]
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(logits - shift), axis=0)[None, :]
    target = tl.load(targets + own % tokens, mask=m < rows, other=-1)
    picked = tl.sum(tl.where(n == target, logits, 0.0), axis=0)[None, :]
    tiles = tl.num_programs(0)
    place = y + tl.program_id(0).to(tl.int64) * outputs + own
    tl.store(place, tl.where(broken, float("nan"), top), mask=m < rows)
    tl.store(place + tiles * outputs, total, mask=m < rows)
    tl.store(place + 2 * tiles * outputs, picked, mask=m < rows)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_TERMS)
def conv1d_kernel(
    y,
    x,
    w,
    bias,
    seeds,
    coeffs,
    rows,
    tokens,
    fan_in,
    fan_out,
    branches,
    terms,
    group0,
    skip,
    row0,
    param_id,
    run,  # inputs a program, a multiple of INPUTS
    x_m,
    w_r,
    w_c,
    INPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    COEFFS: tl.constexpr,
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    MODE: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y_g = x_g W_g + bias_g``, the weight stored ``[in, out]``; a group of outputs a program."""
    dtype: tl.constexpr = w.dtype.element_ty
    group = tl.program_id(0)
    c = tl.arange(0, 64)[:, None]
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, :]
    split = tl.program_id(2)
    counter = number(group0 + group, tl.uint32)
    first = group * 256 - skip
    param = number(param_id, tl.uint32)
    expand: tl.constexpr = SHARED and COEFFS > 0
    at = x + (m % tokens if expand else m).to(tl.int64) * x_m
    nothing = tl.zeros((), tl.uint32)
    base = ()
    noise = ()
    for _ in tl.static_range(4):
        base = base + (tl.zeros((64, TOKENS), tl.float32),)
        noise = noise + (tl.zeros((64, TOKENS), tl.float32),)
    k0, k1 = key_of(tl.load(seeds))
    top = 1.0
    inverse = 1.0
    if COEFFS > 0:
        top, inverse = _largest(coeffs, branches, terms, COEFFS)
    for start in range(split * run, tl.minimum(split * run + run, fan_in), INPUTS):
        k = (start + tl.arange(0, INPUTS))[None, :]
        row = k.to(tl.uint32) + number(row0, tl.uint32)
        inputs = (start + tl.arange(0, INPUTS))[:, None]
        xk = tl.load(at + inputs, mask=(inputs < fan_in) & (m < rows), other=0.0)
        xs = _operand(xk, dtype)
        added = ()
        for j in tl.static_range(4):
            n = first + 64 * j + c
            wj = tl.load(
                w + k.to(tl.int64) * w_r + n.to(tl.int64) * w_c,
                mask=(k < fan_in) & (n >= 0) & (n < fan_out),
                other=0.0,
            )
            added = added + (_multiply(_operand(wj, dtype), xs, base[j], PRECISION),)
        base = added
        if COEFFS == 0:
            z = direction(row, c.to(tl.uint32), counter, param, k0, k1, nothing, GAUSSIAN)
            added = ()
            for j in tl.static_range(4):
                added = added + (_multiply(_operand(z[j], dtype), xs, noise[j], PRECISION),)
            noise = added
        else:
            for term in range(terms):
                k0, k1 = key_of(tl.load(seeds + term))
                z = direction(row, c.to(tl.uint32), counter, param, k0, k1, nothing, GAUSSIAN)
                place = coeffs + (m // tokens).to(tl.int64) * terms + term
                scale = tl.load(place, mask=m < rows, other=0.0) * inverse
                scaled = _operand(wide(xk) * scale, dtype)
                added = ()
                for j in tl.static_range(4):
                    added = added + (_multiply(_operand(z[j], dtype), scaled, noise[j], PRECISION),)
                noise = added

    passes = 1
    if SHARED and COEFFS == 0:
        passes = branches
    outputs = branches * number(tokens, tl.int64)
    for g in range(passes):
        own = m + number(g, tl.int64) * tokens
        branch = number(g, tl.int64) + m // tokens
        scale = top
        if COEFFS == 0:
            scale = tl.load(coeffs + branch, mask=m < rows, other=0.0)
        for j in tl.static_range(4):
            n = first + 64 * j + c
            inside = (n >= 0) & (n < fan_out) & (m < rows)
            result = tl.fma(noise[j], scale, base[j])
            if BIAS and MODE != 1:
                result += wide(tl.load(bias + branch * fan_out + n, mask=inside, other=0.0))
            if MODE == 0:
                out = narrow(nearest(result, dtype), dtype)
                tl.store(y + own * fan_out + n, out, mask=inside)
            else:
                place = y + (split.to(tl.int64) * outputs + own) * fan_out + n
                tl.store(place, result, mask=inside)


@triton.jit(do_not_specialize=["bias", "size", "tokens", "fan_out", "splits"])
def reduce_kernel(
    y,
    partial,  # float32 [splits, rows, out]
    bias,
    size,  # rows times out
    tokens,
    fan_out,
    splits,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Partial sums of a split product, added in order, with the bias, rounded once."""
    dtype: tl.constexpr = y.dtype.element_ty
    # Split are products with few outputs: 32 bits count them.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        total += tl.load(partial + number(s, tl.int64) * size + i, mask=inside, other=0.0)
    if BIAS:
        row = i // fan_out
        column = i - row * fan_out
        total += wide(tl.load(bias + row // tokens * fan_out + column, mask=inside, other=0.0))
    tl.store(y + i, narrow(nearest(total, dtype), dtype), mask=inside)
