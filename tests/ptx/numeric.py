"""Floating point as the manual defines it: one rounding an operation, the worst approximations.

Arrays in, arrays out. 16-bit floats are uint16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or a numpy scalar, which stands for every lane

_NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)


def canonical(x: Array) -> Array:
    """Float32 results that are NaN are 0x7fffffff."""
    bad = np.isnan(x)
    return np.where(bad, _NAN32, x) if bad.any() else x


def flush(x: Array) -> Array:
    """Subnormals (.ftz) as zeros of their sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _odd(s: Array, error: Array) -> Array:
    """The exact ``s + error`` in float64, rounded to odd, ``s`` being its nearest."""
    s = np.asarray(s, np.float64)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0)
    away = inexact & ((error < 0) != (s < 0))  # s is larger in size than the exact sum
    return np.where(inexact, (bits - away) | 1, bits).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Float32 ``a b + c``, rounded once: 53 bits rounded to odd keep what 24 bits need."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    s, error = _two_sum(product, np.asarray(c, np.float64))
    return canonical(_odd(s, error).astype(np.float32))


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Float64 ``a b + c``, rounded once (Boldo and Melquiond 2008)."""

    def halves(x: Array) -> tuple[Array, Array]:
        t = x * 134217729.0
        high = t - (t - x)
        return high, x - high

    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    (ah, al), (bh, bl) = halves(a), halves(b)
    p = a * b
    low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    th, tl = _two_sum(c, low)
    vh, vl = _two_sum(p, th)
    s, error = _two_sum(tl, vl)
    exact = vh + _odd(s, error)
    return np.where(np.isfinite(exact), exact, p + c)


def to_bf16(x: Array) -> Array:
    """Float32 to the nearest bfloat16, ties to even; NaN is 0x7fff."""
    u = np.asarray(x, np.float32).view(np.uint32)
    even = (
        (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), even)


def from_bf16(h: Array) -> Array:
    return (np.asarray(h, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: Array) -> Array:
    """Float32 to the nearest float16, ties to even; NaN is 0x7fff."""
    h = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), h)


def from_f16(h: Array) -> Array:
    return canonical(np.asarray(h, np.uint16).view(np.float16).astype(np.float32))


def toward_zero(x: Array) -> Array:
    """Float64 cut to float32."""
    r = x.astype(np.float32)
    return np.where(np.abs(r) > np.abs(x), np.nextafter(r, np.float32(0)), r)


# --- approximations -------------------------------------------------------------------------------


def _direction(x: Array) -> Array:
    """+1 or -1 by the bits of the argument: the same each time, unlike its neighbour's."""
    u = np.asarray(x, np.float32).view(np.uint32)
    return 1.0 - 2.0 * ((u * np.uint32(0x9E3779B1)) >> np.uint32(31)).astype(np.float64)


def _off(x: Array, exact: Array, bound: Array) -> Array:
    """The float32 furthest from ``exact``, on one side, that is within ``bound``."""
    r = (exact + _direction(x) * bound).astype(np.float32)
    outside = np.abs(r.astype(np.float64) - exact) > bound
    return np.where(outside, np.nextafter(r, exact.astype(np.float32)), r)


def _ulps_off(x: Array, exact: Array, ulps: int) -> Array:
    """``ulps`` from the nearest float32, but where that has no neighbours."""
    r = exact.astype(np.float32)
    end = np.where(_direction(x) > 0, np.float32(np.inf), np.float32(-np.inf))
    moved = r
    for _ in range(ulps):
        moved = np.nextafter(moved, end)
    return np.where(np.isfinite(r) & (r != 0), moved, r)


def lg2(x: Array) -> Array:
    """Absolute error 2**-22 in (0.5, 2), relative outside."""
    exact = np.log2(np.asarray(x, np.float64))
    bound = 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(exact))
    return canonical(np.where(np.isfinite(exact), _off(x, exact, bound), exact.astype(np.float32)))


def ex2(x: Array) -> Array:
    """2 ulp."""
    exact = np.exp2(np.asarray(x, np.float64))
    return canonical(np.where(x == 0, np.float32(1), _ulps_off(x, exact, 2)))


def _relative(x: Array, exact: Array, bound: float) -> Array:
    usual = np.isfinite(exact) & (exact != 0)
    return canonical(
        np.where(usual, _off(x, exact, bound * np.abs(exact)), exact.astype(np.float32))
    )


def sqrt(x: Array) -> Array:
    """Relative error 2**-23."""
    return _relative(x, np.sqrt(np.asarray(x, np.float64)), 2.0**-23)


def rsqrt(x: Array) -> Array:
    """Relative error 2**-22.9."""
    return _relative(x, 1 / np.sqrt(np.asarray(x, np.float64)), 2.0**-22.9)


def rcp(x: Array) -> Array:
    """1 ulp."""
    return canonical(_ulps_off(x, 1 / np.asarray(x, np.float64), 1))


def div(a: Array, b: Array) -> Array:
    """2 ulp."""
    exact = np.asarray(a, np.float64) / np.asarray(b, np.float64)
    return canonical(_ulps_off(a, exact, 2))
