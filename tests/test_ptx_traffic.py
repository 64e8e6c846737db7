"""Sectors and bank conflicts: the counter on kernels whose counts are known, then the kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from ptx import cuda_gpu, triton_gpu
from ptx.traffic import Traffic, measured
from test_ptx_emulator import run

# %r0 is the lane (of two warps), %d1 holds the input and %d0 the output, both of them aligned.
SHARED = """
  and.b32 %r0, %r0, 31; mov.u32 %r2, tile; {address}
  add.s32 %r1, %r1, %r2; ld.shared.{load}, [%r1];
"""
LOADS = {4: "b32 %r3", 8: "v2.b32 {%r3, %r4}", 16: "v4.b32 {%r3, %r4, %r5, %r6}"}


def count(body: str, *, threads: int = 32, size: int = 8192) -> Traffic:
    def zeros() -> Any:
        spare = np.zeros(size + 32, np.uint32)
        return spare[-spare.ctypes.data // 4 % 32 :][:size]

    with measured() as traffic:
        run(body, zeros(), zeros(), threads=threads)
    return traffic


@pytest.mark.parametrize(
    ("address", "size", "used", "least"),
    [
        # Bytes between the threads of a warp -> wavefronts.
        ("shl.b32 %r1, %r0, 2;", 4, 1, 1),
        ("shl.b32 %r1, %r0, 3;", 4, 2, 1),
        ("shl.b32 %r1, %r0, 4;", 4, 4, 1),
        ("shl.b32 %r1, %r0, 7;", 4, 32, 1),
        ("mul.lo.u32 %r1, %r0, 124;", 4, 1, 1),  # a column of a padded matrix
        ("mov.u32 %r1, 64;", 4, 1, 1),  # one word for all
        ("and.b32 %r1, %r0, 1; shl.b32 %r1, %r1, 7;", 4, 2, 1),  # two words of one bank
        ("shl.b32 %r1, %r0, 3;", 8, 2, 2),
        ("shl.b32 %r1, %r0, 4;", 8, 4, 2),  # half of sixteen bytes each
        ("mov.u32 %r1, 64;", 8, 2, 2),
        ("shl.b32 %r1, %r0, 4;", 16, 4, 4),
        ("shl.b32 %r1, %r0, 5;", 16, 8, 4),
        ("shl.b32 %r1, %r0, 6;", 16, 16, 4),
        ("and.b32 %r1, %r0, 7; mul.lo.u32 %r1, %r1, 80;", 16, 4, 4),  # one word for four lanes
    ],
)
def test_wavefronts(address: str, size: int, used: int, least: int) -> None:
    traffic = count(SHARED.format(address=address, load=LOADS[size]), threads=64)
    (access,) = traffic.of("k", "shared")
    assert (access.warps, access.used, access.least) == (2, 2 * used, 2 * least)
    assert access.factor == used / least


@pytest.mark.parametrize(
    ("address", "size", "used", "least"),
    [
        # Bytes between the threads of a warp -> sectors.
        ("shl.b32 %r1, %r0, 2;", 4, 4, 4),
        ("shl.b32 %r1, %r0, 3;", 4, 8, 4),
        ("shl.b32 %r1, %r0, 7;", 4, 32, 4),
        ("mov.u32 %r1, 64;", 4, 1, 1),
        ("mad.lo.u32 %r1, %r0, 4, 16;", 4, 5, 4),  # begins within a sector
        ("shl.b32 %r1, %r0, 4;", 8, 16, 8),
        ("shl.b32 %r1, %r0, 4;", 16, 16, 16),
        # Eight rows of 64 and of 32 bytes.
        ("shr.u32 %r2, %r0, 2; shl.b32 %r2, %r2, 10; and.b32 %r1, %r0, 3; "
         "mad.lo.u32 %r1, %r1, 16, %r2;", 8, 16, 8),
        ("shr.u32 %r2, %r0, 2; shl.b32 %r2, %r2, 10; and.b32 %r1, %r0, 3; "
         "mad.lo.u32 %r1, %r1, 8, %r2;", 8, 8, 8),
    ],
)  # fmt: skip
def test_sectors(address: str, size: int, used: int, least: int) -> None:
    to_64 = "cvt.u64.u32 %d3, %r1; add.s64 %d4, %d1, %d3; add.s64 %d5, %d0, %d3;"
    body = f"  {address} {to_64} ld.global.{LOADS[size]}, [%d4];\n"
    if size == 4:
        body += "  st.global.b32 [%d5], 7;\n"
    accesses = count(body).of("k", "global")
    assert [(a.used, a.least) for a in accesses] == [(used, least)] * len(accesses)
    assert len(accesses) == (2 if size == 4 else 1)


def test_a_copy_counts_on_both_sides() -> None:
    """Zeros that are filled in are read nowhere; a copy that lands is not counted again."""
    body = """
  mov.u32 %r2, tile; shl.b32 %r1, %r0, 5; add.s32 %r1, %r1, %r2;
  shl.b64 %d3, %d2, 4; add.s64 %d4, %d1, %d3;
  setp.lt.u32 %p1, %r0, 8; selp.b32 %r3, 16, 0, %p1;
  cp.async.cg.shared.global [%r1], [%d4], 16, %r3;
  cp.async.commit_group; cp.async.wait_group 0;
"""
    traffic = count(body)
    ((read,), (written,)) = (traffic.of("k", space) for space in ("global", "shared"))
    assert (read.used, read.least) == (4, 4)
    assert (written.used, written.least) == (8, 4)
    assert traffic.factor("k", "shared") == 2


def test_rows_of_a_fragment() -> None:
    """`ldmatrix` reads eight rows of sixteen bytes a wavefront."""
    for stride, used in ((16, 4), (80, 4), (64, 16), (128, 32)):
        body = f"""
  mov.u32 %r2, tile; mul.lo.u32 %r1, %r0, {stride}; add.s32 %r1, %r1, %r2;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r7, %r8, %r9, %r10}}, [%r1];
"""
        (access,) = count(body).of("k", "shared")
        assert (access.used, access.least) == (used, 4)


def test_instructions_of_warps() -> None:
    """A warp goes through a loop as often as its longest thread."""
    body = """
  mov.u32 %r1, 0;
LOOP:
  add.s32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, %r0;
  @%p1 bra LOOP;
"""
    traffic = count(body, threads=64)
    before = 1  # cvt.u64.u32 of the frame
    per_round = 3
    assert traffic.instructions["k"] == 2 * before + per_round * (31 + 63) + 2  # ret
    assert traffic.per_element("k", 64) == traffic.instructions["k"] / 2


def test_what_did_not_run_is_no_zero() -> None:
    with pytest.raises(KeyError, match="no shared access of k"):
        count("  add.s32 %r1, %r0, 1;\n").of("k", "shared")


# --- both GPU backends ----------------------------------------------------------------------------

BF16, F32 = torch.bfloat16, torch.float32
# Of [128, 512] weights: an op, their dtype, tokens a branch, whether they are stored [in, out].
Call = tuple[str, torch.dtype, int, bool]


def call(kernels: dict[str, Any], given: Call) -> Traffic:
    op, dtype, tokens, transposed = given
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(128, 512, generator=generator).to(dtype)
    seeds, coeffs = torch.tensor([5]), torch.tensor([[0.1], [-0.1]])
    place = (77, 0, 0, "gaussian")
    x = torch.randn(2, tokens, 128 if transposed else 512, generator=generator).to(dtype)
    with measured() as traffic:
        if op == "update_":
            rest = ([1], [0], [0], "gaussian", "stochastic")
            kernels[op]([w], seeds, coeffs[0], None, None, *rest)
        elif op == "displace":
            kernels[op](w, seeds, coeffs, *place, "nearest", None)
        elif op == "project":
            kernels[op]([w], seeds, [1], [], [], "gaussian")
        else:
            kernels[op](x, w, None, seeds, coeffs, *place, False, transposed)
    return traffic


def worst(traffic: Traffic, kernel: str) -> dict[str, float]:
    """The worst factor of each kind of access."""
    found: dict[str, float] = {}
    for space in ("global", "shared"):
        with contextlib.suppress(KeyError):
            for access in traffic.of(kernel, space):
                name = access.text.split(" ", 1)[1] if access.text.startswith("@") else access.text
                kind = f"{space} {name.split('.')[0]}"
                found[kind] = max(found.get(kind, 0.0), access.factor)
    return found


READS = {"global ld": 1.0, "shared ld": 1.0, "shared st": 1.0}
COPIES = {**READS, "shared cp": 1.0, "shared ldmatrix": 1.0}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(cuda_gpu.NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("given", "kernel", "most"),
    [
        (("update_", BF16, 1, False), "update_kernel", {"global ld": 1.0, "global st": 1.0}),
        (("update_", F32, 1, False), "update_kernel", {"global ld": 1.0, "global st": 1.0}),
        (("displace", BF16, 1, False), "displace_kernel", {"global ld": 1.0, "global st": 1.0}),
        (("displace", F32, 1, False), "displace_kernel", {"global ld": 1.0, "global st": 1.0}),
        (("project", BF16, 1, False), "project_kernel", {**READS, "global st": 1.0}),
        (("project", F32, 1, False), "project_kernel", {**READS, "global st": 1.0}),
        # A warp stores eight outputs of four tokens at a time: half sectors of 16 bits.
        *(
            (
                ("linear", BF16, tokens, False),
                "linear_kernel",
                {**COPIES, "global cp": 1.0, "global st": 2.0},
            )
            for tokens in (1, 9, 32, 64)
        ),
        # A warp's eight columns are half a sector; the warp beside it finds the other half cached.
        *(
            (
                ("linear", BF16, tokens, True),
                "linear_transposed",
                {**COPIES, "global cp": 2.0, "global st": 2.0},
            )
            for tokens in (1, 9, 32, 64)
        ),
        # Two outputs of each token.
        (("linear", F32, 8, False), "linear_few", {"global ld": 1.0, "global st": 4.0}),
        (("linear", F32, 8, True), "linear_few_transposed", {**READS, "global st": 1.0}),
    ],
)
def test_no_bank_conflicts_and_whole_sectors(
    given: Call, kernel: str, most: dict[str, float]
) -> None:
    traffic = call(cuda_gpu.native(8).kernels(), given)
    found = worst(traffic, kernel)
    assert set(found) <= set(most)
    assert all(factor <= most[kind] for kind, factor in found.items()), found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", ["update_", "displace", "linear"])
def test_triton_has_no_bank_conflicts_and_whole_sectors(op: str) -> None:
    with triton_gpu.backend() as kernels:
        traffic = call(dict(kernels), (op, BF16, 16, False))
    found = worst(traffic, op.strip("_") + "_kernel")
    assert "global ld" in found
    assert set(found.values()) == {1.0}
