"""The noise contract: how every backend draws a direction ``z``.

A direction is a pure function of ``(seed, parameter, row, column)``. It does not depend on block
sizes, threads, SIMD width, device, dtype, sharding, the order of the parameters or torch's global
random state. This module is the contract's text and its plain-torch reference; every backend is
held to it.

Generator
    Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), known-answer
    vectors of Random123. Key: the 64-bit seed, low word first. Counter words:
    ``(column block, row, parameter id, stream)``. Seeds travel in int64 tensors as the bit pattern
    of a uint64.

Streams
    0 directions; 1 stochastic rounding of updates; 2 stochastic rounding of probes; 3 derivation of
    seeds from a root seed.

Parameter id
    First four bytes, little-endian, of SHA-256 of the parameter's qualified name in UTF-8. Two
    names of one model with equal ids are refused when the model is bound.

Rows and columns
    A parameter is seen as a matrix ``(rows, last dimension)``: ``(1, d)`` for a vector, ``(1, 1)``
    for a scalar, ``(prod(shape[:-1]), shape[-1])`` otherwise. Row and column are those of the whole
    parameter: a shard or a tile passes its offset.

Masks
    Of a parameter under a mask (:mod:`zokernels.masks`) only the listed elements move. They are a
    vector of their own under the parameter's id: the element at position ``i`` of the sorted list
    of flat indices has row 0 and column ``i``, whatever its place in the parameter.

Uniform
    ``uniform(w) = ((w >> 9) + 1/2) * 2**-23``: exact in float32, in ``[2**-24, 1 - 2**-24]``. As
    bits: ``bitcast(0x3f800000 | w >> 9) - (1 - 2**-24)``.

Gaussian (Box-Muller without range reduction)
    Columns go in groups of 256. Counter word 0 is ``(c // 256) * 64 + c % 64``, and one Philox
    call's words ``w0..w3`` give the normals of columns ``c, c + 64, c + 128, c + 192``. A pair of
    words ``(a, b)``, ``(w0, w1)`` or ``(w2, w3)``, gives two of them::

        r = sqrt(-2 ln uniform(a))
        phi = pi/2 * (uniform(b) - 1/2)                  in (-pi/4, pi/4)
        (p, q) = (cos phi, sin phi); swapped if b & 1; both negated if b & 2
        normals = r * p, r * q

    The two low bits of ``b`` choose the wedge of the circle and the upper 23 the angle inside it,
    so no backend reduces an argument. ``|z| <= sqrt(48 ln 2) = 5.77``. Backends agree with the
    float64 value of this formula to 2e-6 absolute.

Rademacher
    Counter word 0 is ``c // 128``; column ``c`` owns bit ``c % 32`` of word ``(c % 128) // 32``;
    ``z = 1 - 2 * bit``. Equal on every backend.

Rounding bits
    Sixteen bits an element: counter word 0 is ``(c // 512) * 64 + c % 64``, word
    ``(c % 256) // 64``, low half for even ``c // 256``, high half for odd. Equal on every backend.

Derived seeds
    ``derive_seed(root, a, b)`` is words 0 and 1 (low first) of
    ``Philox(counter=(a mod 2**32, a >> 32, b, 3), key=root)``: for one root no two ``(a, b)`` share
    a 128-bit output block.

A change of any number drawn is a new :data:`CONTRACT_VERSION`; files and messages carry it and a
reader refuses one it does not know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

CONTRACT_VERSION = 1

STREAM_DIRECTION = 0
STREAM_UPDATE_ROUNDING = 1
STREAM_PROBE_ROUNDING = 2
STREAM_SEED = 3

DISTRIBUTIONS = ("gaussian", "rademacher")
ROUNDINGS = ("nearest", "stochastic")

# No |z| can exceed this; backends and tests may rely on it.
GAUSSIAN_BOUND = math.sqrt(48 * math.log(2))

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_MASK64 = (1 << 64) - 1


def parameter_id(name: str) -> int:
    """The 32-bit stable id of a parameter's qualified name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def parameter_ids(names: Iterable[str]) -> dict[str, int]:
    """Ids of several names.

    Raises:
        ValueError: two names share an id, so their directions would be equal.
    """
    ids: dict[str, int] = {}
    owner: dict[int, str] = {}
    for name in names:
        pid = parameter_id(name)
        if pid in owner and owner[pid] != name:
            raise ValueError(
                f"parameters {owner[pid]!r} and {name!r} share the id {pid:#010x}, so they would "
                f"get the same noise: rename one of them"
            )
        owner[pid] = name
        ids[name] = pid
    return ids


def signed_seed(seed: int) -> int:
    """A 64-bit seed as the int64 that carries its bits.

    Raises:
        ValueError: ``seed`` is outside [-2**63, 2**64).
    """
    if not -(1 << 63) <= seed <= _MASK64:
        raise ValueError(f"seed must fit in 64 bits, in [-2**63, 2**64); got {seed}")
    seed &= _MASK64
    return seed - (1 << 64) if seed >> 63 else seed


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10
) -> tuple[int, int, int, int]:
    """One Philox4x32 block in plain integers: the specification the fast code is tested against."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & _MASK32,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def derive_seed(root: int, a: int, b: int = 0) -> int:
    """A seed for ``(a, b)`` (step and direction, say) from a root seed, as a signed 64-bit integer.

    Args:
        root: 64-bit root seed.
        a: in [0, 2**64), the step.
        b: in [0, 2**32), the direction inside the step.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= a <= _MASK64:
        raise ValueError(f"a must be in [0, 2**64); got {a}")
    if not 0 <= b <= _MASK32:
        raise ValueError(f"b must be in [0, 2**32); got {b}")
    root = signed_seed(root) & _MASK64
    words = philox4x32((a & _MASK32, a >> 32, b, STREAM_SEED), (root & _MASK32, root >> 32))
    return signed_seed(words[0] | words[1] << 32)


def matrix_shape(shape: Iterable[int]) -> tuple[int, int]:
    """The contract's (rows, columns) of a parameter's shape."""
    dims = tuple(shape)
    if len(dims) == 2:
        return dims[0], dims[1]
    return (math.prod(dims[:-1]), dims[-1]) if dims else (1, 1)


def philox_words(
    word0: Tensor, row: Tensor, param_id: int, stream: int, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 over broadcast int64 tensors that hold 32-bit words.

    Args:
        word0: int64, counter word 0.
        row: int64, counter word 1; broadcasts with ``word0``.
        param_id: counter word 2.
        stream: counter word 3.
        seed: int64, 0-d: the key's bits.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    word0, row = torch.broadcast_tensors(word0, row)
    c0, c1 = word0, row
    c2 = torch.full_like(word0, param_id)
    c3 = torch.full_like(word0, stream)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # The int64 products wrap modulo 2**64; masking after the shift undoes the sign extension.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """The contract's uniform of 32-bit words, float64 (exact in float32 too)."""
    return ((words >> 9).double() + 0.5) * 2.0**-23


def _blocks(start: int, count: int, width: int, device: torch.device) -> tuple[Tensor, int]:
    """Indices of the column groups that cover [start, start + count), and where ``start`` falls."""
    first = start // width
    last = -(-(start + count) // width)
    return torch.arange(first, max(last, first), device=device), start - first * width


def _rows(rows: int, row_offset: int, device: torch.device) -> Tensor:
    return torch.arange(row_offset, row_offset + rows, device=device)[:, None, None]


def gaussian(
    rows: int, cols: int, seed: Tensor, param_id: int, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Normals of a region, computed in float64 and rounded once: float32 ``[rows, cols]``."""
    dev = seed.device
    block, skip = _blocks(col_offset, cols, 256, dev)
    word0 = (block[:, None] * 64 + torch.arange(64, device=dev))[None]
    w = philox_words(word0, _rows(rows, row_offset, dev), param_id, STREAM_DIRECTION, seed)
    out = []
    for a, b in ((w[0], w[1]), (w[2], w[3])):
        r = torch.sqrt(-2.0 * torch.log(uniform(a)))
        r = torch.where((b & 2) != 0, -r, r)
        phi = (math.pi / 2) * (uniform(b) - 0.5)
        swap = (b & 1) != 0
        p, q = torch.cos(phi), torch.sin(phi)
        out += [r * torch.where(swap, q, p), r * torch.where(swap, p, q)]
    z = torch.stack(out, dim=2).to(torch.float32)  # [rows, blocks, 4, 64]
    return z.reshape(rows, block.numel() * 256)[:, skip : skip + cols]


def rademacher(
    rows: int, cols: int, seed: Tensor, param_id: int, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """Signs of a region: float32 ``[rows, cols]`` of +1 and -1."""
    dev = seed.device
    block, skip = _blocks(col_offset, cols, 128, dev)
    w = philox_words(
        block[None, :, None], _rows(rows, row_offset, dev), param_id, STREAM_DIRECTION, seed
    )
    words = torch.stack([x.squeeze(-1) for x in w], dim=-1)[..., None]  # [rows, blocks, 4, 1]
    bits = (words >> torch.arange(32, device=dev)) & 1
    z = (1 - 2 * bits).to(torch.float32)
    return z.reshape(rows, block.numel() * 128)[:, skip : skip + cols]


def rounding_bits(
    rows: int,
    cols: int,
    seed: Tensor,
    param_id: int,
    stream: int,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """Sixteen random bits an element of a region: int64 ``[rows, cols]`` in [0, 65535]."""
    dev = seed.device
    block, skip = _blocks(col_offset, cols, 512, dev)
    word0 = (block[:, None] * 64 + torch.arange(64, device=dev))[None]
    w = philox_words(word0, _rows(rows, row_offset, dev), param_id, stream, seed)
    words = torch.stack(w, dim=2)  # [rows, blocks, 4, 64]
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [rows, blocks, 2, 4, 64]
    return halves.reshape(rows, block.numel() * 512)[:, skip : skip + cols]


def direction(
    rows: int,
    cols: int,
    seed: Tensor,
    param_id: int,
    row_offset: int = 0,
    col_offset: int = 0,
    distribution: str = "gaussian",
) -> Tensor:
    """The direction ``z`` of a region under either distribution: float32 ``[rows, cols]``."""
    draw = gaussian if distribution == "gaussian" else rademacher
    return draw(rows, cols, seed, param_id, row_offset, col_offset)


def round_to(x: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """Round float32 to ``dtype``: to nearest, or stochastically with 16 random ``bits`` an element.

    bfloat16: the bits are added to the float32 bit pattern and the low half is dropped, so a value
    goes to its upper neighbour (in magnitude) with probability equal to its distance from the lower
    one. float16: the upper 13 of the 16 bits do the same above ``2**-14``; below, where float16 is
    a fixed grid of ``2**-24``, the value is moved by ``(bits >> 3) * 2**-37`` and rounded down in
    magnitude (13 bits, so that the sum is exact in float32 for every value of the grid). Values
    beyond the largest finite number become infinite; NaN and infinities stay.

    Args:
        x: float32.
        dtype: float32, bfloat16 or float16.
        bits: int64 in [0, 65535] of ``x``'s shape, or None for round-to-nearest-even.
    """
    if dtype == torch.float32 or bits is None:
        return x.to(dtype)
    raw = x.contiguous().view(torch.int32).to(torch.int64) & _MASK32
    if dtype == torch.bfloat16:
        moved = (raw + bits) & 0xFFFF0000
    elif dtype == torch.float16:
        moved = (raw + (bits >> 3)) & 0xFFFFE000
    else:
        raise ValueError(f"dtype must be float32, bfloat16 or float16; got {dtype}")
    rounded = torch.where(moved >> 31 != 0, moved - (1 << 32), moved).to(torch.int32)
    y = rounded.view(torch.float32)
    if dtype == torch.float16:
        small = x.abs() < 2.0**-14
        grid = torch.floor(x.abs() * 2.0**24 + (bits >> 3).to(torch.float32) * 2.0**-13) * 2.0**-24
        y = torch.where(small, torch.copysign(grid, x), y)
    return torch.where(torch.isfinite(x), y, x).to(dtype)
