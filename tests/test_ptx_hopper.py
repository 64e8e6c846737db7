"""The emulator of PTX for compute capability 9.0a: products of warpgroups, boxes, barriers."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx import numeric
from ptx.machine import launch
from ptx.memory import GlobalMemory
from ptx.parser import PTXError, parse
from ptx.tma import TensorMap
from test_ptx_emulator import REGISTERS, assembles

Array = Any
THREADS = 128
IMAGE = 16384  # bytes of shared memory
HEAD = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 k_out, .param .u64 k_in, .param .align 64 .b8 k_map[128])
{
"""
MORE = f"""  .shared .align 1024 .b8 image[{IMAGE}];
  .shared .align 8 .b64 full; .shared .align 8 .b64 empty;
  setp.eq.u32 %p0, %r0, 0; and.b32 %r39, %r0, 31; setp.eq.u32 %p8, %r39, 0;
  mov.u32 %r37, full; mov.u32 %r38, empty; mov.u32 %r36, image;
  mov.b64 %d19, k_map; cvta.param.u64 %d19, %d19;
"""


def kernel(body: str) -> str:
    """As in ``test_ptx_emulator``, with more shared memory, barriers and a tensor map (%d19).

    %p0 holds in the first thread, %p8 in the first of every warp.
    """
    return f"{HEAD}{REGISTERS}{MORE}{body}\n  ret;\n}}\n"


def run(body: str, out: Array, given: Array, *, of: TensorMap | None = None) -> Array:
    memory = GlobalMemory([(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (out, given)])
    (found,) = parse(kernel(body)).values()
    parameters = bytearray(found.parameter_bytes)
    parameters[:16] = struct.pack("QQ", out.ctypes.data, given.ctypes.data)
    if of is not None:
        at = found.parameters[2].offset
        parameters[at : at + 128] = of.packed()
    launch(found, (1, 1, 1), THREADS, bytes(parameters), memory)
    return out


def without(text: str, line: str, instead: str = "") -> str:
    assert text.count(line) == 1
    return text.replace(line, instead)


# --- what is stored by matrices -------------------------------------------------------------------


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix(trans: str, tmp_path: Path) -> None:
    body = f"""
  shl.b32 %r1, %r0, 4; add.s32 %r2, %r36, %r1;
  shl.b64 %d3, %d2, 4; add.s64 %d4, %d1, %d3; add.s64 %d5, %d0, %d3;
  ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d4];
  stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {{%r3, %r4, %r5, %r6}};
  bar.sync 0;
  ld.shared.v4.b32 {{%r7, %r8, %r9, %r10}}, [%r2];
  st.global.v4.b32 [%d5], {{%r7, %r8, %r9, %r10}};
"""
    assembles(kernel(body), tmp_path)
    given = np.arange(THREADS * 8, dtype=np.uint16).reshape(4, 32, 4, 2)  # warp, lane, matrix
    got = run(body, np.zeros((4, 4, 8, 8), np.uint16), given)  # warp, matrix, row, column
    for lane in range(32):
        for half in range(2):
            row, column = lane // 4, lane % 4 * 2 + half
            if trans:
                row, column = column, row
            assert (got[:, :, row, column] == given[:, lane, :, half]).all()


# --- products -------------------------------------------------------------------------------------


def layout(index: int, shape: Sequence[int], stride: Sequence[int]) -> int:
    """A mode of a CuTe layout."""
    at = 0
    for size, step in zip(shape, stride, strict=True):
        at += index % size * step
        index //= size
    return at


@dataclasses.dataclass(frozen=True)
class Factor:
    """One of a product, in a canonical layout of the manual.

    ``mode``: the descriptor's swizzle; offsets in bytes.
    """

    mode: int
    turned: bool
    unit: int
    leading: int
    stride: int
    start: int = 0

    def at(self, row: int, k: int) -> int:
        """The byte of an element, Swizzle<b, 4, 3> o (rows, k), units of elements."""
        t, span = 16 // self.unit, {0: 1, 3: 2, 2: 4, 1: 8}[self.mode]
        leading, stride = self.leading // self.unit, self.stride // self.unit
        if self.turned and self.mode:
            rows = layout(row, (t, span, 64), (1, t, leading))
            depth = layout(k, (8, 64), (span * t, stride))
        elif self.turned:
            rows = layout(row, (t, 1, 64), (1, t, stride))
            depth = layout(k, (8, 64), (t, leading))
        else:
            rows = layout(row, (8, 64), (span * t, stride))
            depth = layout(k, (t, 64), (1, t if self.mode else leading))
        byte = self.start + (rows + depth) * self.unit
        return byte ^ ((byte & ((span - 1) << 7)) >> 3)

    @property
    def descriptor(self) -> int:
        """Without the address of the image."""
        high = self.stride >> 4 | self.mode << 30
        return high << 32 | self.leading >> 4 << 16 | self.start >> 4

    def write(self, image: Array, values: Array, kind: str) -> None:
        data = as_bits(values, kind)
        for (row, k), value in np.ndenumerate(data):
            at = self.at(row, k)
            image[at : at + self.unit] = np.frombuffer(value.tobytes(), np.uint8)


def as_bits(values: Array, kind: str) -> Array:
    x = values.astype(np.float32)
    if kind == "tf32":
        return x.view(np.uint32) | np.uint32(0xFFF)  # what is below is not looked at
    return (numeric.to_bf16 if kind == "bf16" else numeric.to_f16)(x)


FILL = f"""
  mul.lo.s64 %d3, %d2, {IMAGE // THREADS}; add.s64 %d4, %d1, %d3;
  cvt.u32.u64 %r1, %d3; add.s32 %r2, %r36, %r1;
""" + "".join(
    f"""  ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d4+{i}];
  st.shared.v4.b32 [%r2+{i}], {{%r3, %r4, %r5, %r6}};
"""
    for i in range(0, IMAGE // THREADS, 16)
)
READY = "  fence.proxy.async.shared::cta;\n  bar.sync 0;\n"
# Sums %f0 to %f7 begin at 2, and are stored.
BEGIN = "".join(f"  mov.f32 %f{i}, 0f40000000;\n" for i in range(8))
SUMS = "{%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}"
LEFT = f"""  shl.b64 %d7, %d2, 4; add.s64 %d7, %d1, %d7;
  ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%d7+{IMAGE}];
"""
END = """  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
"""
STORE = """  shl.b64 %d5, %d2, 5; add.s64 %d5, %d0, %d5;
  st.global.v4.f32 [%d5], {%f0, %f1, %f2, %f3}; st.global.v4.f32 [%d5+16], {%f4, %f5, %f6, %f7};
"""
# Spans of the modes: 0, 128, 64, 32 bytes. Eight rows or columns of a swizzled atom are 8 spans.
LAYOUTS = {
    "plain": Factor(0, False, 2, 1024, 128),
    "plain-apart": Factor(0, False, 2, 128, 256),
    "128": Factor(1, False, 2, 16, 1024),
    "64": Factor(2, False, 2, 16, 512),
    "32": Factor(3, False, 2, 16, 256),
    "128-inside": Factor(1, False, 2, 16, 1024, start=32),
    "64-inside": Factor(2, False, 2, 16, 512, start=32),
    "turned-plain": Factor(0, True, 2, 1024, 128),
    "turned-128": Factor(1, True, 2, 1024, 1024),
    "turned-64": Factor(2, True, 2, 512, 1024),
    "turned-32": Factor(3, True, 2, 256, 1024),
}


def operands(left: Factor | None, right: Factor) -> tuple[str, str]:
    """The descriptors (%d8, %d9) made, and the operands."""
    text = "  shr.u32 %r35, %r36, 4; cvt.u64.u32 %d18, %r35;\n"
    text += f"  add.s64 %d9, %d18, {right.descriptor};\n"
    if left is None:
        return text, "{%r7, %r8, %r9, %r10}, %d9"
    return f"{text}  add.s64 %d8, %d18, {left.descriptor};\n", "%d8, %d9"


def product(kind: str, left: Factor | None, right: Factor, *, adds: int = 1, sign: int = 1) -> str:
    text, factors = operands(left, right)
    depth = 32 // right.unit
    turns = [] if kind == "tf32" else [str(int(f.turned)) for f in (left, right) if f is not None]
    rest = ", ".join([str(adds), "1", str(sign), *turns])
    return f"""{text}{BEGIN}  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n16k{depth}.f32.{kind}.{kind} {SUMS}, {factors}, {rest};
{END}"""


def fragment(a: Array) -> Array:
    """[64, depth] -> [threads, registers, elements] by the manual's figures, or CUTLASS's layouts.

    Thread 4 r + q of warp w has rows 16 w + r and 8 further, columns 2 q, 2 q + 1 and 8 further (of
    tf32 q and 4 further).
    """
    pair = 2 if a.shape[1] == 16 else 1
    found = np.zeros((THREADS, 4, pair), a.dtype)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            for e in range(pair):
                row = 16 * warp + lane // 4 + i % 2 * 8
                found[thread, i, e] = a[row, lane % 4 * pair + e + i // 2 * 4 * pair]
    return found


def gathered(out: Array) -> Array:
    """[threads, 8] sums -> [64, 16]."""
    d = np.zeros((64, 16))
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        for i in range(8):
            d[16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2] = out[
                thread, i
            ]
    return d


def multiply(
    kind: str, left: Factor | None, right: Factor, tmp_path: Path, **how: int
) -> tuple[Array, Array]:
    """The emulator's product, and the exact one, of small whole numbers."""
    generator = np.random.default_rng(3)
    depth = 32 // right.unit
    a, b = generator.integers(-4, 5, (64, depth)), generator.integers(-4, 5, (16, depth))
    if kind == "tf32":  # zeros would not stay zeros
        a, b = np.where(a == 0, 3, a), np.where(b == 0, 3, b)
    image = np.zeros(IMAGE + THREADS * 16, np.uint8)
    if left is None:
        image[IMAGE:] = np.ascontiguousarray(as_bits(fragment(a), kind)).view(np.uint8).ravel()
    else:
        left.write(image, a, kind)
    right.write(image, b, kind)
    body = f"{FILL}{LEFT}{READY}{product(kind, left, right, **how)}{STORE}"
    assembles(kernel(body), tmp_path)
    got = gathered(run(body, np.zeros((THREADS, 8), np.float32), image))
    return got, how.get("sign", 1) * a @ b.T + (2 if how.get("adds", 1) else 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_product_of_shared_factors(name: str, tmp_path: Path) -> None:
    """Each layout, of both factors, with the right one behind the left."""
    left = LAYOUTS[name]
    right = dataclasses.replace(left, start=left.start + 8192)
    got, want = multiply("bf16", left, right, tmp_path)
    assert (got == want).all()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("name", ["plain", "128"])
def test_a_product_of_registers(kind: str, name: str, tmp_path: Path) -> None:
    right = dataclasses.replace(LAYOUTS[name], unit=4 if kind == "tf32" else 2)
    got, want = multiply(kind, None, right, tmp_path)
    assert (got == want).all()


@pytest.mark.parametrize("how", [{"adds": 0}, {"sign": -1}], ids=["sums-begin", "negative"])
def test_a_product_alone(how: dict[str, int], tmp_path: Path) -> None:
    got, want = multiply("f16", None, LAYOUTS["64"], tmp_path, **how)
    assert (got == want).all()


def test_groups_end_in_order(tmp_path: Path) -> None:
    """The older of two groups may be read while the other runs."""
    text, factors = operands(None, LAYOUTS["32"])
    one = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    body = f"""{FILL}{LEFT}{READY}{text}{BEGIN}  wgmma.fence.sync.aligned;
  {one} {{%f0, %f1, %f2, %f3}}, {factors}, 1, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  {one} {{%f4, %f5, %f6, %f7}}, {factors}, 1, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 1;
  mov.f32 %f8, %f0;
  wgmma.wait_group.sync.aligned 0;
{STORE}"""
    assembles(kernel(body), tmp_path)
    out, image = np.zeros((THREADS, 8), np.float32), np.zeros(IMAGE + THREADS * 16, np.uint8)
    assert (run(body, out, image) == 2).all()
    with pytest.raises(PTXError, match="not waited for"):
        run(body.replace("mov.f32 %f8, %f0", "mov.f32 %f8, %f4"), out, image)


PRODUCT = f"{FILL}{LEFT}{READY}{product('bf16', LAYOUTS['32'], LAYOUTS['64'])}{STORE}"
REGISTER_PRODUCT = f"{FILL}{LEFT}{READY}{product('bf16', None, LAYOUTS['64'])}{STORE}"
PRODUCT_MISTAKES = {
    "no proxy fence": (
        without(PRODUCT, "  fence.proxy.async.shared::cta;\n"),
        "no fence.proxy.async since an ordinary write",
    ),
    "no barrier": (without(PRODUCT, "  bar.sync 0;\n"), "a race"),
    "a proxy fence too early": (
        without(PRODUCT, READY, "  bar.sync 0;\n").replace(
            FILL, f"  fence.proxy.async.shared::cta;\n{FILL}"
        ),
        "no fence.proxy.async since an ordinary write",
    ),
    "no fence of registers": (
        without(PRODUCT, "  wgmma.fence.sync.aligned;\n"),
        "no wgmma.fence before the first",
    ),
    "a fence before registers are written": (
        without(REGISTER_PRODUCT, "  wgmma.fence.sync.aligned;\n").replace(
            BEGIN, f"  wgmma.fence.sync.aligned;\n{BEGIN}"
        ),
        "no wgmma.fence since another use",
    ),
    "no commit": (without(PRODUCT, "  wgmma.commit_group.sync.aligned;\n"), "not waited for"),
    "no wait": (without(PRODUCT, "  wgmma.wait_group.sync.aligned 0;\n"), "not waited for"),
    "a wait for all but one": (
        without(PRODUCT, "wgmma.wait_group.sync.aligned 0", "wgmma.wait_group.sync.aligned 1"),
        "not waited for",
    ),
    "an end before the wait": (
        without(without(PRODUCT, STORE), "  wgmma.wait_group.sync.aligned 0;\n"),
        "products in flight",
    ),
    "a factor written meanwhile": (
        without(PRODUCT, "  wgmma.wait", "  st.shared.b32 [%r2], %r0;\n  wgmma.wait"),
        "a race",
    ),
    "a register of the left factor written meanwhile": (
        without(REGISTER_PRODUCT, "  wgmma.wait", "  mov.b32 %r7, 0;\n  wgmma.wait"),
        "not waited for",
    ),
    "warps that ask for different products": (
        PRODUCT.replace(BEGIN, f"  shr.u64 %d10, %d2, 5; add.s64 %d9, %d9, %d10;\n{BEGIN}"),
        "different products",
    ),
    "lanes that ask for different products": (
        PRODUCT.replace(BEGIN, f"  add.s64 %d9, %d9, %d2;\n{BEGIN}"),
        "not one for the warp",
    ),
    "a factor outside": (
        PRODUCT.replace(BEGIN, f"  add.s64 %d9, %d9, {IMAGE // 16};\n{BEGIN}"),
        "outside of shared memory",
    ),
    "a swizzle pattern that begins elsewhere": (
        PRODUCT.replace(BEGIN, f"  add.s64 %d9, %d9, 4;\n{BEGIN}"),
        "does not begin at a multiple",
    ),
}


@pytest.mark.parametrize("mistake", PRODUCT_MISTAKES)
def test_a_mistake_of_a_product_is_found(mistake: str, tmp_path: Path) -> None:
    body, words = PRODUCT_MISTAKES[mistake]
    assembles(kernel(body), tmp_path)
    image = np.zeros(IMAGE + THREADS * 16, np.uint8)
    with pytest.raises(PTXError, match=words):
        run(body, np.zeros((THREADS, 8), np.float32), image)


# --- barriers in memory ---------------------------------------------------------------------------

WAIT = """
  {
  .reg .pred done;
again:
  mbarrier.try_wait.parity.shared::cta.b64 done, [BARRIER], PARITY;
  @!done bra again;
  }
"""


def wait(barrier: str, parity: int) -> str:
    return WAIT.replace("BARRIER", barrier).replace("PARITY", str(parity))


MADE = f"""  @%p0 mbarrier.init.shared::cta.b64 [%r37], {THREADS};
  bar.sync 0;
"""
# Values go to the next warp and, in a second phase, on to the one behind it.
PASSED_ON = f"""
  shl.b32 %r1, %r0, 2; add.s32 %r2, %r36, %r1; xor.b32 %r3, %r2, 128; xor.b32 %r4, %r2, 256;
{MADE}  st.shared.b32 [%r2], %r0;
  mbarrier.arrive.shared::cta.b64 _, [%r37];{wait("%r37", 0)}  ld.shared.b32 %r5, [%r3];
  st.shared.b32 [%r2+1024], %r5;
  mbarrier.arrive.shared::cta.b64 _, [%r37];{wait("%r37", 1)}  ld.shared.b32 %r5, [%r4+1024];
  shl.b64 %d3, %d2, 2; add.s64 %d3, %d0, %d3; st.global.b32 [%d3], %r5;
"""


def test_a_barrier_has_phases(tmp_path: Path) -> None:
    assembles(kernel(PASSED_ON), tmp_path)
    got = run(PASSED_ON, np.zeros(THREADS, np.uint32), np.zeros(4, np.uint32))
    assert got.tolist() == [i ^ 32 ^ 64 for i in range(THREADS)]


BARRIER_MISTAKES = {
    "not made": (
        without(PASSED_ON, f"  @%p0 mbarrier.init.shared::cta.b64 [%r37], {THREADS};\n"),
        "no barrier has been made",
    ),
    "made, and used by others at once": (
        without(PASSED_ON, "  bar.sync 0;\n"),
        "nothing orders this after the barrier was made",
    ),
    "made twice": (PASSED_ON.replace(MADE, MADE + MADE), "where there is one"),
    "made for one more": (
        PASSED_ON.replace(f"], {THREADS};", f"], {THREADS + 1};"),
        "a phase that never ends",
    ),
    "made for one less": (
        PASSED_ON.replace(f"], {THREADS};", f"], {THREADS - 1};"),
        "a race|a phase that never ends|more arrivals",
    ),
    "no wait": (without(PASSED_ON, wait("%r37", 0)), "a race"),
    "no second wait": (without(PASSED_ON, wait("%r37", 1)), "a race"),
    "the other parity": (
        PASSED_ON.replace("[%r37], 1;", "[%r37], 0;"),
        "a race|a phase that never ends",
    ),
    "half a warp arrives": (
        PASSED_ON.replace("  mbarrier.arrive", "  @%p0 mbarrier.arrive"),
        "a phase that never ends",
    ),
    "a barrier read as a number": (
        f"{MADE}  ld.shared.b32 %r5, [%r37];",
        "an ordinary access to a barrier",
    ),
}


@pytest.mark.parametrize("mistake", BARRIER_MISTAKES)
def test_a_mistake_with_a_barrier_is_found(mistake: str, tmp_path: Path) -> None:
    body, words = BARRIER_MISTAKES[mistake]
    assembles(kernel(body), tmp_path)
    with pytest.raises(PTXError, match=words):
        run(body, np.zeros(THREADS, np.uint32), np.zeros(4, np.uint32))


# --- boxes ----------------------------------------------------------------------------------------


def boxed(given: Array, columns: int, rows: int, swizzle: int) -> TensorMap:
    """Boxes of a matrix of 16-bit elements; its first columns, to leave a stride."""
    return TensorMap(
        address=given.ctypes.data,
        sizes=(given.shape[1] - 8, given.shape[0]),
        strides=(given.strides[0],),
        box=(columns, rows),
        steps=(1, 1),
        kind=1,
        interleave=0,
        swizzle=swizzle,
        promotion=2,
        fill=0,
    )


BOX = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
ONE_MADE = """  @%p0 mbarrier.init.shared::cta.b64 [%r37], 1;
  @%p0 fence.mbarrier_init.release.cluster;
  bar.sync 0;
"""
COPIED = f"""
{ONE_MADE}  mov.u32 %r1, COLUMN; mov.u32 %r2, ROW;
  @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r37], BYTES;
  @%p0 {BOX} [%r36], [%d19, {{%r1, %r2}}], [%r37];{wait("%r37", 0)}"""
DUMP = """  shl.b32 %r3, %r0, 4; add.s32 %r3, %r36, %r3;
  shl.b64 %d3, %d2, 4; add.s64 %d3, %d0, %d3;
  ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.b32 [%d3], {%r4, %r5, %r6, %r7};
"""


def copied(column: int, row: int, bytes_: int = 2048) -> str:
    text = COPIED.replace("COLUMN", str(column)).replace("ROW", str(row))
    return text.replace("BYTES", str(bytes_))


# Where the 16-byte chunks of consecutive lines of 128 bytes go, from the manual's tables.
LINES = ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301"]
LINES = [*LINES, "76543210"]


@pytest.mark.parametrize(("swizzle", "lines"), [(0, 1), (1, 2), (2, 4), (3, 8)])
@pytest.mark.parametrize(("column", "row"), [(0, 0), (-3, -1), (40, 60)])
def test_a_box_is_swizzled(swizzle: int, lines: int, column: int, row: int, tmp_path: Path) -> None:
    """Zeros lie outside of the matrix, whose rows are longer than its columns."""
    columns = (64, 16, 32, 64)[swizzle]
    given = np.arange(1, 70 * 80 + 1, dtype=np.uint16).reshape(70, 80)
    rows = 1024 // columns
    body = copied(column, row) + DUMP
    assembles(kernel(body), tmp_path)
    got = run(body, np.zeros((16, 8, 8), np.uint16), given, of=boxed(given, columns, rows, swizzle))
    padded = np.zeros((400, 400), np.uint16)
    padded[100:170, 100:172] = given[:, :72]
    box = padded[100 + row :][:rows, 100 + column :][:, :columns].reshape(16, 8, 8)
    for line in range(16):
        for chunk in range(8):
            place = int(LINES[line % lines][chunk])
            assert (got[line, place] == box[line, chunk]).all()


MATRIX = np.arange(1, 70 * 80 + 1, dtype=np.uint16).reshape(70, 80)
RIGHT = copied(0, 0) + DUMP
# All read the box by ordinary means, then another one takes its place.
AGAIN = f"""
  @%p0 mbarrier.init.shared::cta.b64 [%r38], {THREADS // 32};
{copied(0, 0)}  shl.b32 %r3, %r0, 4; add.s32 %r3, %r36, %r3; ld.shared.b32 %r4, [%r3];
  fence.proxy.async.shared::cta;
  bar.warp.sync -1;
  @%p8 mbarrier.arrive.shared::cta.b64 _, [%r38];
  @!%p0 bra OTHERS;
{wait("%r38", 0)}  mov.u32 %r2, 16;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r37], 2048;
  {BOX} [%r36], [%d19, {{%r1, %r2}}], [%r37];
OTHERS:
  bar.warp.sync 0xffffffff;
{wait("%r37", 1)}{DUMP}"""


def test_a_box_takes_the_place_of_another(tmp_path: Path) -> None:
    assembles(kernel(AGAIN), tmp_path)
    got = run(AGAIN, np.zeros((16, 64), np.uint16), MATRIX, of=boxed(MATRIX, 64, 16, 0))
    assert (got == MATRIX[16:32, :64]).all()


BOX_MISTAKES = {
    "no wait": (without(RIGHT, wait("%r37", 0)), "was not waited for"),
    "the other parity": (without(RIGHT, wait("%r37", 0), wait("%r37", 1)), "was not waited for"),
    "a barrier not fenced": (
        without(RIGHT, "  @%p0 fence.mbarrier_init.release.cluster;\n"),
        "not fenced since it was made",
    ),
    "no bytes expected": (
        RIGHT.replace(
            "arrive.expect_tx.shared::cta.b64 _, [%r37], 2048", "arrive.shared::cta.b64 _, [%r37]"
        ),
        "was not waited for",
    ),
    "too many bytes expected": (copied(0, 0, 4096) + DUMP, "a phase that never ends"),
    "too few bytes expected": (copied(0, 0, 1024) + DUMP, "a phase that never ends"),
    "no box": (
        without(RIGHT, f"  @%p0 {BOX} [%r36], [%d19, {{%r1, %r2}}], [%r37];"),
        "a phase that never ends",
    ),
    "a place that is not aligned": (RIGHT.replace("[%r36], [%d19", "[%r36+16], [%d19"), "of 128"),
    "a place that ends outside": (
        RIGHT.replace("[%r36], [%d19", f"[%r36+{IMAGE}], [%d19"),
        "multiples of 128",
    ),
    "an end before it lands": (
        without(copied(0, 0), wait("%r37", 0)),
        "copies in flight",
    ),
    "written before": (
        f"  st.shared.b32 [%r36], 0;\n{RIGHT}",
        "no fence.proxy.async since an ordinary access",
    ),
    "written before by others": (
        f"  @!%p0 st.shared.b32 [%r36], 0;\n{without(RIGHT, '  bar.sync 0;')}",
        "a race",
    ),
    "replaced without a fence": (
        without(AGAIN, "  fence.proxy.async.shared::cta;\n"),
        "no fence.proxy.async since an ordinary access",
    ),
    "replaced before all lanes have read": (without(AGAIN, "  bar.warp.sync -1;\n"), "a race"),
    "replaced before all warps have read": (without(AGAIN, wait("%r38", 0)), "a race"),
    "replaced, and read at once": (without(AGAIN, wait("%r37", 1)), "was not waited for"),
    "a lane that goes ahead of its warp": (
        without(AGAIN, "  bar.warp.sync 0xffffffff;\n", "  @!%p0 bar.warp.sync 0xffffffff;\n"),
        "named do not take part",
    ),
}


@pytest.mark.parametrize("mistake", BOX_MISTAKES)
def test_a_mistake_with_a_box_is_found(mistake: str, tmp_path: Path) -> None:
    body, words = BOX_MISTAKES[mistake]
    assembles(kernel(body), tmp_path)
    with pytest.raises(PTXError, match=words):
        run(body, np.zeros((16, 64), np.uint16), MATRIX, of=boxed(MATRIX, 64, 16, 0))


def test_a_box_is_read_by_a_product(tmp_path: Path) -> None:
    """Both by units beside the threads: no proxy fence; with one the copy is not early."""
    right = dataclasses.replace(LAYOUTS["64"], stride=512)
    generator = np.random.default_rng(4)
    a, b = generator.integers(-4, 5, (64, 16)), generator.integers(-4, 5, (32, 40))
    given = np.zeros(32 * 40 + THREADS * 8, np.uint16)
    given[: 32 * 40] = as_bits(b, "f16").ravel()
    given[32 * 40 :] = as_bits(fragment(a), "f16").ravel()
    matrix = given[: 32 * 40].reshape(32, 40)
    body = f"""{copied(0, 0)}  shl.b64 %d7, %d2, 4; add.s64 %d7, %d1, %d7;
  ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%d7+{32 * 40 * 2}];
{product("f16", None, right)}{STORE}"""
    assembles(kernel(body), tmp_path)
    out = np.zeros((THREADS, 8), np.float32)
    got = gathered(run(body, out, given, of=boxed(matrix, 32, 32, 2)))
    assert (got == a @ b[:16, :16].T + 2).all()
    with pytest.raises(PTXError, match="was not waited for"):
        run(without(body, wait("%r37", 0)), out, given, of=boxed(matrix, 32, 32, 2))


REFUSED = {
    "16 bytes": {"address": 8},
    "multiples of 16": {"strides": (72,)},
    "do not overlap": {"strides": (128,)},
    "1 to 256": {"box": (32, 257)},
    "multiple of 16 bytes": {"box": (12, 8)},
    "within the swizzle": {"box": (64, 8)},
    "1 to 2": {"sizes": (72, 0)},
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_the_driver_refuses(rule: str) -> None:
    good = dataclasses.replace(boxed(MATRIX, 32, 8, 2), address=1 << 20)
    assert good.wrong() == ""
    bad = dataclasses.replace(good, **REFUSED[rule])  # type: ignore[arg-type]
    assert re.search(re.escape(rule), bad.wrong())
