"""The emulator of PTX: values worked out from the manual, and kernels that it must refuse."""

from __future__ import annotations

import math
import struct
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton
from ptx import numeric
from ptx.machine import launch
from ptx.memory import GlobalMemory
from ptx.parser import PTXError, parse

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>;
  .reg .b64 %d<20>; .reg .f64 %g<9>;
  .shared .align 16 .b8 tile[4096];
  ld.param.u64 %d0, [k_out]; ld.param.u64 %d1, [k_in];
  cvta.to.global.u64 %d0, %d0; cvta.to.global.u64 %d1, %d1;
  mov.u32 %r0, %tid.x; cvt.u64.u32 %d2, %r0;
"""
Array = Any


def kernel(body: str) -> str:
    """A kernel of ``k_out`` (in %d0) and ``k_in`` (in %d1); %r0 and %d2 hold the thread."""
    head = ".visible .entry k(.param .u64 k_out, .param .u64 k_in)\n{"
    return f"{HEADER}{head}{REGISTERS}{body}\n  ret;\n}}\n"


def assembles(text: str, tmp_path: Path) -> None:
    """``ptxas`` takes it: the test means something."""
    (tmp_path / "k.ptx").write_text(text)
    arch = text.split(".target ", 1)[1].split(maxsplit=1)[0]
    command = [
        str(PTXAS),
        f"-arch={arch}",
        str(tmp_path / "k.ptx"),
        "-o",
        str(tmp_path / "k.cubin"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(
    body: str,
    out: Array,
    given: Array,
    *,
    threads: int = 32,
    blocks: int = 1,
    races: bool = True,
) -> Array:
    """Run a kernel on arrays; what it wrote."""
    memory = GlobalMemory([(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (out, given)])
    (found,) = parse(kernel(body)).values()
    parameters = struct.pack("QQ", out.ctypes.data, given.ctypes.data)
    launch(found, (blocks, 1, 1), threads, parameters, memory, races=races)
    return out


def words(values: Any) -> Array:
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


# --- one thread -----------------------------------------------------------------------------------

NAN, INF, TINY = 0x7FC00001, 0x7F800000, 0x00000001
# Instruction, the 32 bits of its operands (%r1 to %r3, %f1 to %f3), of its result (%r4 or %f4).
ONE: list[tuple[str, tuple[int, ...], int]] = [
    ("mul.hi.u32 %r4, %r1, %r2", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.hi.s32 %r4, %r1, %r2", (-1, 5), -1),
    ("mul.lo.s32 %r4, %r1, %r2", (0x10001, 0x10001), 0x20001),
    ("mad.lo.s32 %r4, %r1, %r2, %r3", (-3, 4, 5), -7),
    ("mad.hi.u32 %r4, %r1, %r2, %r3", (0x80000000, 6, 7), 10),
    ("shl.b32 %r4, %r1, %r2", (1, 31), 0x80000000),
    ("shl.b32 %r4, %r1, %r2", (1, 32), 0),
    ("shr.u32 %r4, %r1, %r2", (0x80000000, 33), 0),
    ("shr.s32 %r4, %r1, %r2", (0x80000000, 40), -1),
    ("shr.s32 %r4, %r1, %r2", (-8, 1), -4),
    ("shf.r.wrap.b32 %r4, %r1, %r2, %r3", (0x11223344, 0x7F, 9), 0x3F889119),
    ("shf.l.wrap.b32 %r4, %r1, %r2, %r3", (0x80000000, 1, 33), 3),
    ("shf.l.clamp.b32 %r4, %r1, %r2, %r3", (0xABCD, 1, 33), 0xABCD),
    # Bytes 7..0 are b3..b0 a3..a0; a nibble with its upper bit spreads the sign of the byte.
    ("prmt.b32 %r4, %r1, %r2, 0x5410", (0x33221100, 0x77665544), 0x55441100),
    ("prmt.b32 %r4, %r1, %r2, 0x7701", (0x33221100, 0x77665544), 0x77770011),
    ("prmt.b32 %r4, %r1, %r2, 0xF8A9", (0x33802100, 0xFF665544), 0xFF00FF00),
    ("bfe.u32 %r4, %r1, 4, 3", (0xFFFFFFFF,), 7),
    ("bfe.s32 %r4, %r1, 4, 1", (0x10,), -1),
    ("bfe.u32 %r4, %r1, 28, 8", (0xF0000000,), 0xF),
    ("bfe.s32 %r4, %r1, 28, 8", (0x90000000,), -7),
    ("bfe.u32 %r4, %r1, 3, 0", (0xFF,), 0),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0x96", (0b1100, 0b1010, 0b1111), 0b1001),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0xEA", (0b1100, 0b1010, 0b0001), 0b1001),
    ("div.s32 %r4, %r1, %r2", (-7, 2), -3),
    ("rem.s32 %r4, %r1, %r2", (-7, 2), -1),
    ("div.u32 %r4, %r1, %r2", (0xFFFFFFFF, 2), 0x7FFFFFFF),
    ("min.s32 %r4, %r1, %r2", (-1, 1), -1),
    ("min.u32 %r4, %r1, %r2", (-1, 1), 1),
    ("popc.b32 %r4, %r1", (0xF0F0,), 8),
    # The first source is the upper half.
    ("cvt.rn.bf16x2.f32 %r4, %f1, %f2", (bits(1.0), bits(-2.0)), 0x3F80C000),
    ("cvt.rn.f16x2.f32 %r4, %f1, %f2", (bits(1.0), bits(-2.0)), 0x3C00C000),
    # Ties to even; a half is 0x8000.
    ("cvt.rn.bf16x2.f32 %r4, %f1, %f2", (0x3F808000, 0x3F818000), 0x3F803F82),
    ("cvt.rn.bf16x2.f32 %r4, %f1, %f2", (NAN, 0x7F7FFFFF), 0x7FFF7F80),
    ("cvt.rn.f16x2.f32 %r4, %f1, %f2", (NAN, bits(65520.0)), 0x7FFF7C00),
    ("cvt.rna.tf32.f32 %r4, %f1", (0x3F801000,), 0x3F802000),
    ("cvt.rni.s32.f32 %r4, %f1", (bits(2.5),), 2),
    ("cvt.rzi.u32.f32 %r4, %f1", (bits(-1.5),), 0),
    ("cvt.rzi.s32.f32 %r4, %f1", (bits(3e9),), 0x7FFFFFFF),
    ("cvt.rzi.s32.f32 %r4, %f1", (NAN,), 0),
    ("cvt.rn.f32.u32 %f4, %r1", (0xFFFFFFFF,), bits(2.0**32)),
    ("cvt.rmi.f32.f32 %f4, %f1", (bits(-0.5),), bits(-1.0)),
    ("add.rn.f32 %f4, %f1, %f2", (INF, INF | 1 << 31), 0x7FFFFFFF),
    ("add.rn.f32 %f4, %f1, %f2", (TINY, TINY), 2),
    ("add.rn.ftz.f32 %f4, %f1, %f2", (TINY, TINY | 1 << 31), 0),
    ("mul.rn.ftz.f32 %f4, %f1, %f2", (bits(-1.0), 0x00400000), 1 << 31),
    ("max.f32 %f4, %f1, %f2", (NAN, bits(-1.0)), bits(-1.0)),
    ("max.NaN.f32 %f4, %f1, %f2", (NAN, bits(-1.0)), 0x7FFFFFFF),
    ("max.f32 %f4, %f1, %f2", (1 << 31, 0), 0),
    ("min.f32 %f4, %f1, %f2", (0, 1 << 31), 1 << 31),
    # a b is a hair below half a unit of c: rounding to float64 first makes a tie of it.
    (
        "fma.rn.f32 %f4, %f1, %f2, %f3",
        (bits(2.0**-12 * (1 + 2.0**-18)), bits(2.0**-12 * (1 - 2.0**-18)), 0x3F800001),
        0x3F800001,
    ),
    ("sqrt.rn.f32 %f4, %f1", (bits(2.0),), 0x3FB504F3),
    ("neg.f32 %f4, %f1", (0,), 1 << 31),
    ("mov.b32 %r4, {%h1, %h2}", (0x2222, 0x1111), 0x11112222),
]
COMPARISONS: list[tuple[str, tuple[int, int], bool]] = [
    ("lt.s32", (-1, 0), True),
    ("lt.u32", (-1, 0), False),
    ("eq.f32", (0, 1 << 31), True),
    ("ne.f32", (NAN, NAN), False),
    ("neu.f32", (NAN, NAN), True),
    ("geu.f32", (NAN, 0), True),
    ("ge.f32", (NAN, 0), False),
    ("num.f32", (NAN, 0), False),
    ("nan.f32", (NAN, 0), True),
]


def test_one_thread(tmp_path: Path) -> None:
    """Each on a thread of its own: the others' operands may not matter."""
    cases = list(ONE)
    for comparison, values, result in COMPARISONS:
        of = "f" if "f32" in comparison else "r"
        text = f"setp.{comparison} %p2, %{of}1, %{of}2; selp.b32 %r4, 1, 0, %p2"
        cases.append((text, values, int(result)))
    body = ""
    for i, (text, *_) in enumerate(cases):
        body += f"  setp.eq.u32 %p1, %r0, {i};\n  @!%p1 bra L{i};\n"
        for j in (1, 2, 3):
            body += f"  ld.global.b32 %r{j}, [%d1+{12 * i + 4 * j - 4}]; mov.b32 %f{j}, %r{j};\n"
        body += f"  cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2;\n  {text};\n"
        body += "  mov.b32 %r4, %f4;\n" if "%f4" in text else ""
        body += f"  st.global.b32 [%d0+{4 * i}], %r4;\nL{i}:\n"
    assembles(kernel(body), tmp_path)
    given = words(v for _, values, _ in cases for v in (*values, 0, 0, 0)[:3])
    got = run(body, np.zeros(len(cases), np.uint32), given, threads=96)
    want = words(result for *_, result in cases)
    wrong = [(cases[i], hex(got[i])) for i in np.flatnonzero(got != want)]
    assert not wrong


def test_sixty_four_bits(tmp_path: Path) -> None:
    a, b = 0x9123456789ABCDEF, 0xFEDCBA9876543210
    body = """
  ld.global.v2.u64 {%d3, %d4}, [%d1];
  mul.hi.u64 %d5, %d3, %d4;      st.global.u64 [%d0], %d5;
  mul.hi.s64 %d5, %d3, %d4;      st.global.u64 [%d0+8], %d5;
  mul.lo.s64 %d5, %d3, %d4;      st.global.u64 [%d0+16], %d5;
  shr.s64 %d5, %d3, 70;          st.global.u64 [%d0+24], %d5;
  shl.b64 %d5, %d3, 64;          st.global.u64 [%d0+32], %d5;
  mov.b64 {_, %r1}, %d3;
  mul.wide.s32 %d5, %r1, -2;     st.global.u64 [%d0+40], %d5;
  mad.wide.u32 %d5, %r1, %r1, 1; st.global.u64 [%d0+48], %d5;
  ld.global.s32 %d5, [%d1+4];    st.global.u64 [%d0+56], %d5;
  ld.global.u8 %h1, [%d1+7];     cvt.s32.s8 %r2, %h1;
  mov.b64 %d5, {%r2, %r1};       st.global.u64 [%d0+64], %d5;
"""
    assembles(kernel(body), tmp_path)
    got = run(body, np.zeros(9, np.uint64), np.array([a, b], np.uint64), threads=1)
    signed = [v - (1 << 64) for v in (a, b)]
    top = a >> 32
    want = [
        *(a * b >> 64, signed[0] * signed[1] >> 64, a * b, -1, 0),
        *((top - (1 << 32)) * -2, top * top + 1, top - (1 << 32), top << 32 | 0xFFFFFF91),
    ]
    assert [hex(v) for v in got.tolist()] == [hex(v % (1 << 64)) for v in want]


def exactly_rounded(x: Fraction, single: bool) -> float:
    if not single:
        return float(x)  # Python rounds a quotient of integers once
    near = np.float32(float(x))
    around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    best = min(abs(Fraction(float(c)) - x) for c in around)
    closest = [c for c in around if abs(Fraction(float(c)) - x) == best]
    return float(min(closest, key=lambda c: int(c.view(np.uint32)) & 1))


@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
def test_fma_is_rounded_once(single: bool) -> None:
    generator = np.random.default_rng(1)
    dtype: Any = np.float32 if single else np.float64
    scale = [0, 0, 20, -70] if single else [0, 0, 100, -200]  # -70: subnormal products
    cases = []
    for power in scale:
        a, b = (generator.standard_normal((2, 500)) * 2.0**power).astype(dtype)
        other = generator.standard_normal(500) * 2.0 ** (2 * power - 20)
        c = (other - a.astype(np.float64) * b).astype(dtype)
        cases.append((a, b, np.where(np.arange(500) % 2 == 0, c, a)))
    for a, b, c in cases:
        got = (numeric.fma32 if single else numeric.fma64)(a, b, c)
        for i in range(500):
            x = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
            assert float(got[i]) == exactly_rounded(x, single)


@pytest.mark.parametrize(
    ("name", "exact", "bound"),
    [
        ("sqrt", math.sqrt, 2.0**-23),
        ("rsqrt", lambda x: 1 / math.sqrt(x), 2.0**-22.9),
        ("rcp", lambda x: 1 / x, 1.5 * 2.0**-23),
        ("lg2", math.log2, 2.0**-22),
        ("ex2", lambda x: 2.0**x, 2.5 * 2.0**-23),
    ],
)
def test_approximations_are_as_bad_as_allowed(
    name: str, exact: Callable[[float], float], bound: float
) -> None:
    x = np.exp(np.random.default_rng(2).uniform(-3, 3, 4000)).astype(np.float32)
    got = getattr(numeric, name)(x).astype(np.float64)
    want = np.array([exact(float(v)) for v in x])
    size = np.where((x > 0.5) & (x < 2), 1.0, np.abs(want)) if name == "lg2" else np.abs(want)
    error = (got - want) / size
    assert np.abs(error).max() <= bound
    assert error.max() > 0.4 * bound and error.min() < -0.4 * bound
    assert (got == getattr(numeric, name)(x)).all()


# --- warps ----------------------------------------------------------------------------------------

SHUFFLES: list[tuple[str, int, int, Callable[[int], int]]] = [
    # mode, b, c -> source lane of each lane, by the manual: c is 0 for up, 31 else, and above it a
    # mask of the lanes' bits that stay.
    ("up", 1, 0x0000, lambda i: max(i - 1, 0)),
    ("up", 3, 0x1800, lambda i: i - 3 if i % 8 >= 3 else i),
    ("down", 2, 0x001F, lambda i: i + 2 if i + 2 <= 31 else i),
    ("down", 2, 0x181F, lambda i: i + 2 if i % 8 + 2 <= 7 else i),
    ("bfly", 16, 0x001F, lambda i: i ^ 16),
    ("bfly", 5, 0x181F, lambda i: i ^ 5),
    ("idx", 7, 0x001F, lambda i: 7),
    ("idx", 9, 0x181F, lambda i: i // 8 * 8 + 1),
]


@pytest.mark.parametrize(("mode", "b", "c", "source"), SHUFFLES)
def test_shuffle(mode: str, b: int, c: int, source: Callable[[int], int], tmp_path: Path) -> None:
    body = f"""
  mad.lo.u32 %r1, %r0, 3, 5;
  shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;
  shl.b64 %d3, %d2, 2; add.s64 %d3, %d0, %d3; st.global.b32 [%d3], %r2;
"""
    assembles(kernel(body), tmp_path)
    got = run(body, np.zeros(64, np.uint32), words([0]), threads=64)
    assert got.tolist() == [3 * (i // 32 * 32 + source(i % 32)) + 5 for i in range(64)]


def test_ways_that_part_meet_again(tmp_path: Path) -> None:
    """A loop whose threads part: some go by a block behind the loop's end, some round at once."""
    body = """
  mov.u32 %r5, 0; mov.u32 %r4, 0;
HEAD:
  shfl.sync.bfly.b32 %r2|%p1, %r0, 1, 31, -1;
  add.u32 %r4, %r4, %r2;
  and.b32 %r3, %r0, 1; setp.eq.u32 %p2, %r3, 1;
  @%p2 bra LATE;
AGAIN:
  add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 3;
  @%p3 bra HEAD;
  bra END;
LATE:
  add.u32 %r4, %r4, 100;
  bra AGAIN;
END:
  shl.b64 %d3, %d2, 2; add.s64 %d3, %d0, %d3; st.global.b32 [%d3], %r4;
"""
    assembles(kernel(body), tmp_path)
    got = run(body, np.zeros(64, np.uint32), words([0]), threads=64)
    assert got.tolist() == [3 * ((i ^ 1) + 100 * (i % 2)) for i in range(64)]


def test_votes_and_reductions(tmp_path: Path) -> None:
    body = """
  and.b32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 1;
  vote.sync.ballot.b32 %r2, %p1, -1;
  sub.s32 %r3, 20, %r0;
  redux.sync.max.s32 %r4, %r3, -1;
  redux.sync.max.u32 %r5, %r3, -1;
  shl.b64 %d3, %d2, 4; add.s64 %d3, %d0, %d3;
  st.global.v4.b32 [%d3], {%r2, %r4, %r5, %r0};
"""
    assembles(kernel(body), tmp_path)
    got = run(body, np.zeros((64, 4), np.uint32), words([0]), threads=64)
    assert (got[:, 0] == 0x22222222).all()
    assert (got[:, 1].view(np.int32) == np.repeat([20, -12], 32)).all()
    assert (got[:, 2].view(np.int32) == np.repeat([-1, -12], 32)).all()  # the largest unsigned


FILL = """
  shl.b32 %r1, %r0, 4; mov.u32 %r2, tile; add.s32 %r2, %r2, %r1;
  shl.b64 %d3, %d2, 4; add.s64 %d4, %d1, %d3;
  ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d4];
  st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};
  bar.sync 0;
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans: str, tmp_path: Path) -> None:
    body = f"""{FILL}
  ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r7, %r8, %r9, %r10}}, [%r2];
  add.s64 %d5, %d0, %d3; st.global.v4.b32 [%d5], {{%r7, %r8, %r9, %r10}};
"""
    assembles(kernel(body), tmp_path)
    given = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    got = run(body, np.zeros((32, 4), np.uint32), given).view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if trans:
                    row, column = column, row
                assert got[lane, matrix, half] == given[matrix, row, column]


PRODUCTS = {
    # Type, depth, elements a register -> where element i of a lane's A, B is, by the manual's
    # figures (g = lane / 4, t = lane % 4).
    "bf16": (
        16,
        lambda g, t, i: (g if i % 4 < 2 else g + 8, t * 2 + i % 2 + (8 if i >= 4 else 0)),
        lambda g, t, i: (t * 2 + i % 2 + (8 if i >= 2 else 0), g),
    ),
    "tf32": (
        8,
        lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i // 2)),
        lambda g, t, i: (t + 4 * i, g),
    ),
}
PRODUCTS["f16"] = PRODUCTS["bf16"]


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_product_of_fragments(kind: str, tmp_path: Path) -> None:
    depth, place_a, place_b = PRODUCTS[kind]
    body = f"""
  mul.lo.s64 %d3, %d2, 40; add.s64 %d4, %d1, %d3;
  ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d4+4]; ld.global.b32 %r3, [%d4+8];
  ld.global.b32 %r4, [%d4+12]; ld.global.b32 %r5, [%d4+16]; ld.global.b32 %r6, [%d4+20];
  ld.global.f32 %f1, [%d4+24]; ld.global.f32 %f2, [%d4+28]; ld.global.f32 %f3, [%d4+32];
  ld.global.f32 %f4, [%d4+36];
  mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f5, %f6, %f7, %f8}},
    {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
  shl.b64 %d5, %d2, 4; add.s64 %d6, %d0, %d5;
  st.global.v4.f32 [%d6], {{%f5, %f6, %f7, %f8}};
"""
    assembles(kernel(body), tmp_path)
    generator = np.random.default_rng(5)
    a, b = generator.integers(-8, 9, (16, depth)), generator.integers(-8, 9, (depth, 8))
    c = generator.integers(-8, 9, (16, 8))
    to_bits = {
        "bf16": numeric.to_bf16,
        "f16": numeric.to_f16,
        # What is below a tf32 is not looked at.
        "tf32": lambda x: x.view(np.uint32) | np.uint32(0x1FFF),
    }[kind]
    given = np.zeros((32, 40), np.uint8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        one = 4 * depth // 8
        pick_a = [a[place_a(g, t, i)] for i in range(one)]
        pick_b = [b[place_b(g, t, i)] for i in range(one // 2)]
        if kind == "tf32":  # zeros would not stay zeros
            pick_a, pick_b = ([v or 4 for v in p] for p in (pick_a, pick_b))
        given[lane, :16] = to_bits(np.array(pick_a, np.float32)).view(np.uint8)
        given[lane, 16:24] = to_bits(np.array(pick_b, np.float32)).view(np.uint8)
        sums = [c[g + 8 * (i // 2), t * 2 + i % 2] for i in range(4)]
        given[lane, 24:] = np.array(sums, np.float32).view(np.uint8)
    if kind == "tf32":
        a, b = np.where(a == 0, 4, a), np.where(b == 0, 4, b)
    got = run(body, np.zeros((32, 4), np.float32), given)
    want = a @ b + c
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            assert got[lane, i] == want[g + 8 * (i // 2), t * 2 + i % 2]


# --- asynchronous copies --------------------------------------------------------------------------

COPIES = """
  shl.b32 %r1, %r0, 4; mov.u32 %r2, tile; add.s32 %r2, %r2, %r1;
  shl.b64 %d3, %d2, 4; add.s64 %d4, %d1, %d3; add.s64 %d5, %d0, %d3;
  cp.async.cg.shared.global [%r2], [%d4], 16;
  cp.async.commit_group;
  cp.async.ca.shared.global [%r2+2048], [%d4], 8, 4;
  cp.async.commit_group;
"""


def test_copies_land_group_by_group(tmp_path: Path) -> None:
    body = f"""{COPIES}
  cp.async.wait_group 1;
  ld.shared.v2.b32 {{%r3, %r4}}, [%r2+8];
  cp.async.wait_group 0;
  ld.shared.v2.b32 {{%r5, %r6}}, [%r2+2048];
  st.global.v4.b32 [%d5], {{%r3, %r4, %r5, %r6}};
"""
    assembles(kernel(body), tmp_path)
    given = np.arange(1, 129, dtype=np.uint32).reshape(32, 4)
    got = run(body, np.zeros((32, 4), np.uint32), given)
    assert (got[:, :2] == given[:, 2:]).all()
    assert (got[:, 2] == given[:, 0]).all()
    assert (got[:, 3] == 0).all()  # zeros follow the four bytes


# --- mistakes -------------------------------------------------------------------------------------

PLACE = "  shl.b64 %d3, %d2, 2; add.s64 %d4, %d1, %d3; add.s64 %d5, %d0, %d3;\n"
EXCHANGE = f"""{PLACE}
  shl.b32 %r1, %r0, 2; mov.u32 %r2, tile; add.s32 %r3, %r2, %r1;
  ld.global.b32 %r4, [%d4]; st.shared.b32 [%r3], %r4;
  $
  xor.b32 %r5, %r1, BIT; add.s32 %r5, %r5, %r2;
  ld.shared.b32 %r6, [%r5]; st.global.b32 [%d5], %r6;
"""
MISTAKES = {
    "no barrier": (EXCHANGE.replace("$", "").replace("BIT", "128"), "a race"),
    "a barrier of the warp only": (
        EXCHANGE.replace("$", "bar.warp.sync -1;").replace("BIT", "128"),
        "a race",
    ),
    "no barrier in a warp": (EXCHANGE.replace("$", "").replace("BIT", "4"), "a race"),
    "written again before all have read": (
        EXCHANGE.replace("$", "bar.sync 0;").replace("BIT", "128") + "st.shared.b32 [%r3], %r0;",
        "a race",
    ),
    "out of bounds": (f"{PLACE}  ld.global.b32 %r1, [%d4+4];", "out of bounds"),
    "out of bounds below": (f"{PLACE}  st.global.b32 [%d5+-4], %r0;", "out of bounds"),
    "a vector not aligned": (
        f"{PLACE}  ld.global.v2.b32 {{%r1, %r2}}, [%d4];",
        "not aligned to 8 bytes",
    ),
    "beyond shared memory": ("  ld.shared.b32 %r1, [tile+4096];", "outside 4096 bytes"),
    "read before the wait": (
        f"{COPIES}  cp.async.wait_group 1;\n  ld.shared.b32 %r3, [%r2+2048];",
        "was not waited for",
    ),
    "another thread's copy after the wait": (
        f"{COPIES}  cp.async.wait_group 0;\n  xor.b32 %r3, %r2, 16; ld.shared.b32 %r3, [%r3];",
        "a race",
    ),
    "an end before the wait": (COPIES, "asynchronous copies in flight"),
    "a barrier that some do not reach": (
        "  setp.lt.u32 %p1, %r0, 32;\n  @%p1 bra L;\n  bar.sync 0;\nL:",
        "never reach",
    ),
    "half a warp at a barrier": (
        "  setp.lt.u32 %p1, %r0, 16;\n  @%p1 bra L;\n  bar.sync 0;\nL:",
        "some threads of a warp do not reach",
    ),
    "a shuffle with half a warp": (
        "  setp.lt.u32 %p1, %r0, 16;\n  @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
        "named do not take part",
    ),
    "blocks that write one place": (
        f"{PLACE}  mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;\n"
        "  @%p1 st.global.b32 [%d5], 1;\n  @!%p1 st.global.b32 [%d5], 2;",
        "a race",
    ),
    "threads that write one place": (
        "  st.global.b32 [%d0], %r0;",
        "different values",
    ),
    "an instruction nobody knows": ("  brkpt;", "unknown opcode 'brkpt'"),
    "a carry": ("  add.cc.u32 %r1, %r0, %r0;", r"unknown modifiers \['cc'\]"),
    "a barrier of some warps": ("  bar.sync 1, 64;", "only barrier 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    body, words_ = MISTAKES[mistake]
    assembles(kernel(body), tmp_path)
    given = np.zeros(256, np.uint32)
    size = 64 if "out of bounds" in mistake else 256
    with pytest.raises(PTXError, match=words_):
        run(body, np.zeros(size, np.uint32), given[:size], threads=64, blocks=2)


def test_what_is_right_passes() -> None:
    """The exchanges of above with the barrier that they need."""
    given = np.arange(64, dtype=np.uint32)
    for bit, barrier in (("128", "bar.sync 0;"), ("4", "bar.warp.sync -1;")):
        body = EXCHANGE.replace("$", barrier).replace("BIT", bit)
        got = run(body, np.zeros(64, np.uint32), given, threads=64)
        assert got.tolist() == [i ^ int(bit) // 4 for i in range(64)]


def test_shared_memory_starts_as_no_number() -> None:
    body = (
        f"{PLACE}  ld.shared.f32 %f1, [tile]; add.rn.f32 %f1, %f1, %f1; st.global.f32 [%d5], %f1;"
    )
    assert np.isnan(run(body, np.zeros(32, np.float32), words([0] * 32))).all()


def test_threads_part_and_meet() -> None:
    """A loop of a different length for every thread, then a shuffle of all."""
    body = f"""{PLACE}
  mov.u32 %r1, 0; mov.u32 %r2, 0;
LOOP:
  setp.gt.u32 %p1, %r1, %r0;
  @%p1 bra DONE;
  add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1;
  bra.uni LOOP;
DONE:
  shfl.sync.idx.b32 %r3, %r2, 31, 31, -1;
  add.s32 %r2, %r2, %r3;
  st.global.b32 [%d5], %r2;
"""
    got = run(body, np.zeros(32, np.uint32), words([0] * 32))
    assert got.tolist() == [i * (i + 1) // 2 + 496 for i in range(32)]


def test_races_can_be_allowed() -> None:
    body, given = MISTAKES["no barrier"][0], np.arange(64, dtype=np.uint32)
    got = run(body, np.zeros(64, np.uint32), given, threads=64, races=False)
    assert got.tolist() == [i ^ 32 for i in range(64)]
