"""The noise contract on the device: Philox, Box-Muller, signs, rounding bits, roundings.

Everything works on a tile of ``[R, C]`` counters and yields a tuple of four ``[R, C]`` tensors: the
values of columns ``c``, ``c + 64``, ``c + 128``, ``c + 192`` of one group of 256, ``c`` being a
part of ``0..63``. A kernel therefore owns four sub-tiles of its weight whose layouts are equal, and
no value ever crosses a lane.

Formulas: :mod:`zokernels.noise`. Rows enter as ``[R, 1]`` and columns as ``[1, C]`` and are not
broadcast by hand: the first two of Philox's ten rounds then cost a row or a column, not a tile.

Cost of two normals, besides half a Philox call (8 rounds of 2 wide multiplications and 2 three-way
xors, 16 instructions): about 28, of which two go to the special function unit (``lg2``, ``sqrt``).
Sine and cosine are polynomials: the unit's own are good to 5e-7 absolute, which a radius of 5.77
turns into more than the contract's 2e-6, and the unit would be the bottleneck (four of its
operations, at a quarter of the rate, against eight multiply-adds). Next to ``u = 1`` the unit's
logarithm is good to 2**-22 absolute only, so a series in ``1 - u`` (exact) takes over there. The
operations are those of csrc/cuda/noise.h, so both GPU backends draw the same bits on one GPU.
No function has a slow path, so no kernel needs a stack.

Rademacher: one Philox call serves a row and 128 columns; each thread draws it for its rows, which
is a few instructions an element, and two more set the sign of 1.0.

Bits: integers, uniforms, signs and roundings equal the reference. Every fused multiply-add is
written as ``tl.fma`` and kernels are compiled without contraction, so the result of a formula does
not depend on the kernel it is in.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Read when the kernels are decorated, as Triton itself does. The interpreter has no inline
# assembly, no bfloat16 arithmetic and truncates float32 to bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)

# Box-Muller polynomials of csrc/numeric.h, in s = uniform(b) - 1/2.
_S0: tl.constexpr = tl.constexpr(1.5707963050854572)
_S1: tl.constexpr = tl.constexpr(-0.6459629381673255)
_S2: tl.constexpr = tl.constexpr(0.07967590297003356)
_S3: tl.constexpr = tl.constexpr(-0.004592289076045072)
_C0: tl.constexpr = tl.constexpr(0.9999999724233207)
_C1: tl.constexpr = tl.constexpr(-1.2336970142479016)
_C2: tl.constexpr = tl.constexpr(0.2535986441112713)
_C3: tl.constexpr = tl.constexpr(-0.020408352539511364)
# -2 ln(1 - v) ~= v (2 + _NEAR v) for v < _NEAR_ONE: there the hardware's logarithm is no better.
_NEAR: tl.constexpr = tl.constexpr(1.0085)
_NEAR_ONE: tl.constexpr = tl.constexpr(0.0145)
_MINUS_2_LN_2: tl.constexpr = tl.constexpr(-1.3862943611198906)


@triton.jit
def number(x, dtype: tl.constexpr):
    """A scalar, such as a loop's counter (a plain int in the interpreter), as ``dtype``."""
    return tl.cast(x, dtype)


@triton.jit
def key_of(seed):
    """The two key words of an int64 seed."""
    bits = seed.to(tl.uint64, bitcast=True)
    return (bits & 0xFFFFFFFF).to(tl.uint32), (bits >> 32).to(tl.uint32)


@triton.jit
def anchor(x):
    """Zeros (uint32) that the compiler lays out like ``x``, float32, and removes at the end.

    Xored into the counters they make it draw the noise where the weights are; otherwise it draws in
    a layout of its own choice and moves every value through shared memory.
    """
    return (x.to(tl.uint32, bitcast=True) >> 31) >> 1


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, zeros):
    """Philox4x32-10 of uint32 counters that broadcast, with the key words ``k0``, ``k1``.

    ``zeros``: :func:`anchor` of the tile that the noise is for, or a scalar 0.
    """
    for i in tl.static_range(10):
        if i == 2 or i == 3:  # where the counters first fill the tile
            c2 = c2 ^ zeros
        # One wide multiplication (IMAD.WIDE) each; umulhi and mul would be two instructions.
        p0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        p2 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        c0 = (p2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p2.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _log2(x):
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sqrt(x):
    if _INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _one_to_two(word):
    """``1 + (word >> 9) * 2**-23``."""
    return tl.add(word >> 9, 0x3F800000, sanitize_overflow=False).to(tl.float32, bitcast=True)


@triton.jit
def box_muller(a, b):
    """Two normals of two words."""
    u = _one_to_two(a) - 0.999999940395355224609375  # 1 - 2**-24: exact
    v = 1.0 - u
    near = v * tl.fma(v, _NEAR, 2.0)
    r = _sqrt(tl.where(v < _NEAR_ONE, near, _log2(u) * _MINUS_2_LN_2))
    s = (_one_to_two(b) - 1.5) + 5.9604644775390625e-08  # + 2**-24: exact
    t = s * s
    sine = s * tl.fma(tl.fma(tl.fma(t, _S3, _S2), t, _S1), t, _S0)
    cosine = tl.fma(tl.fma(tl.fma(t, _C3, _C2), t, _C1), t, _C0)
    sign = (b << 30) & 0x80000000
    r = (r.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    swap = (b & 1) != 0
    return r * tl.where(swap, sine, cosine), r * tl.where(swap, cosine, sine)


@triton.jit
def gaussian(row, col, group, param_id, k0, k1, zeros):
    """Normals of a group of 256 columns: ``row`` uint32 ``[R, 1]``, ``col`` ``[1, C]`` in 0..63."""
    stream = tl.zeros((), tl.uint32)
    w0, w1, w2, w3 = philox(group * 64 + col, row, param_id, stream, k0, k1, zeros)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _sign(low, high, col, zeros):
    """+1 or -1 of 64 columns from two words."""
    word = tl.where(col >= 32, high, low) ^ zeros
    bits = ((word << (31 - (col & 31))) & 0x80000000) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rademacher(row, col, group, param_id, k0, k1, zeros):
    """Signs of ``group`` (256 columns), arguments as :func:`gaussian`."""
    stream = tl.zeros((), tl.uint32)
    a0, a1, a2, a3 = philox(group * 2, row, param_id, stream, k0, k1, stream)
    b0, b1, b2, b3 = philox(group * 2 + 1, row, param_id, stream, k0, k1, stream)
    n0 = _sign(a0, a1, col, zeros)
    n1 = _sign(a2, a3, col, zeros)
    n2 = _sign(b0, b1, col, zeros)
    n3 = _sign(b2, b3, col, zeros)
    return n0, n1, n2, n3


@triton.jit
def direction(row, col, group, param_id, k0, k1, zeros, GAUSSIAN: tl.constexpr):
    """Float32 values of four sub-tiles of a group, under either distribution."""
    if GAUSSIAN:
        return gaussian(row, col, group, param_id, k0, k1, zeros)
    else:
        return rademacher(row, col, group, param_id, k0, k1, zeros)


@triton.jit
def rounding_words(row, col, pair, param_id, k0, k1, zeros, STREAM: tl.constexpr):
    """Words of a pair of groups (512 columns): low halves for the even group, high for the odd."""
    stream = tl.full((), STREAM, tl.uint32)
    return philox(pair * 64 + col, row, param_id, stream, k0, k1, zeros)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """Float32 rounded to ``dtype`` (to nearest, ties to even), as float32."""
    if dtype == tl.float32:
        return x
    elif dtype == tl.bfloat16 and _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        even = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) & 0xFFFF0000
        return tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _upper_half(x, bits):
    """The int32 whose upper half is float32 ``x``, rounded to bfloat16 by 16 random ``bits``.

    An infinity has no low bits to carry from. A NaN out of an fma is positive with all of its
    payload's bits set, and would carry into the sign: the largest NaN without low bits comes first.
    """
    raw = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000)
    return tl.add(raw, bits.to(tl.int32, bitcast=True), sanitize_overflow=False)


@triton.jit
def stochastic(x, bits, dtype: tl.constexpr):
    """Float32 rounded to ``dtype`` by 16 random ``bits`` (uint32), as float32.

    What :func:`zokernels.noise.round_to` does: bfloat16 adds the bits below the kept half and drops
    it; float16 adds 13 of them above 2**-14, and rounds down on its grid of 2**-24 below.
    """
    if dtype == tl.float32:
        return x
    elif dtype == tl.bfloat16:
        return (_upper_half(x, bits) & -65536).to(tl.float32, bitcast=True)
    else:
        # Infinities have no low bits to carry from; a NaN's payload must not overflow.
        raw = x.to(tl.uint32, bitcast=True)
        moved = tl.add(raw, bits >> 3, sanitize_overflow=False) & 0xFFFFE000
        size = tl.abs(x)
        # Both products are exact, so is the sum: 24 bits.
        grid = tl.floor(size * 16777216.0 + (bits >> 3).to(tl.float32) * 0.0001220703125)
        small = (grid * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | (raw & 0x80000000)
        moved = tl.where(size < 6.103515625e-05, small, moved)
        y = tl.where(x == x, moved.to(tl.float32, bitcast=True), x)
        return y.to(tl.float16).to(tl.float32)


@triton.jit
def moved(x, z, scale, factor, DECAY: tl.constexpr):
    """Four sub-tiles after one term: ``fma(scale, z, x * factor)``."""
    new = ()
    for j in tl.static_range(4):
        new = new + (tl.fma(scale, z[j], x[j] * factor if DECAY else x[j]),)
    return new


@triton.jit
def rounded(x, words, odd, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Four sub-tiles of the even or the odd group of the pair that ``words`` belong to, rounded."""
    new = ()
    for j in tl.static_range(4):
        if STOCHASTIC:
            new = new + (stochastic(x[j], (words[j] >> (16 * odd)) & 0xFFFF, dtype),)
        else:
            new = new + (nearest(x[j], dtype),)
    return new


@triton.jit
def last_rounded(x, words, odd, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """:func:`rounded` as ``dtype``, without the way back to float32."""
    new = ()
    for j in tl.static_range(4):
        if STOCHASTIC and dtype == tl.bfloat16:
            half = _upper_half(x[j], (words[j] >> (16 * odd)) & 0xFFFF) >> 16
            new = new + (half.to(tl.int16).to(tl.bfloat16, bitcast=True),)
        elif STOCHASTIC:
            found = stochastic(x[j], (words[j] >> (16 * odd)) & 0xFFFF, dtype)
            new = new + (narrow(found, dtype),)
        else:
            new = new + (narrow(nearest(x[j], dtype), dtype),)
    return new


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 that ``dtype`` holds exactly, as ``dtype``."""
    if dtype == tl.bfloat16 and _INTERPRETED:
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def wide(x):
    """Any float as float32."""
    if x.dtype == tl.bfloat16 and _INTERPRETED:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)
