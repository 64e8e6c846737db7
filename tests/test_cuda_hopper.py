"""The product by wgmma and TMA (csrc/cuda/linear_sm90.cu), on the CPU and on a Hopper GPU.

The kernel that nvcc compiles for sm_90a runs thread by thread over csrc/cuda/emulate_hopper.h; that
this header sees mistakes is tested here too. With a device of compute capability 9.0 and the CUDA
backend built, the same cases run on the device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cuda_emulated
import pytest
import test_conformance as conformance
import torch
import torch.nn.functional as F
from test_cuda_build import FLAGS, NVCC, disassembler, known_architectures, needs_nvcc
from test_cuda_kernels import HALVES, PID, exact_linear, rand, seeds_of, table
from torch import Tensor

from zokernels import _cuda_ops, _registry, noise, reference
from zokernels._cuda_ops import FUSED_TOKENS, Native
from zokernels.triton.devices import ARCHITECTURES, architecture

ROOT = Path(__file__).resolve().parents[1]
EVERY = 1 << 30
# In which the emulation runs threads: by turns, or a warp as far ahead as it can get.
ORDERS = ("forward", "reverse", "warps", "reverse warps")


def devices() -> list[str]:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return ["cpu"]
    on_device = _registry.backends().get("cuda")
    return ["cpu", "cuda"] if on_device is not None and on_device.reason is None else ["cpu"]


DEVICES = devices()


def native(*, multiprocessors: int = 1, limit: int = EVERY, device: str = "cpu") -> Native:
    """The backend with the product on; one multiprocessor: a product is one part."""
    if device == "cuda":
        return Native(
            torch.ops.zokernels_cuda,
            stream=lambda device: torch.cuda.current_stream(device).cuda_stream,
            multiprocessors=lambda device: multiprocessors,
            capturing=lambda: False,
            wgmma_tokens=lambda device: limit,
        )
    cuda_emulated.library()
    return Native(
        torch.ops.zokernels_cuda_emulated,
        stream=lambda device: 0,
        multiprocessors=lambda device: multiprocessors,
        capturing=lambda: False,
        wgmma_tokens=lambda device: limit,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one product, and how far its result may be from the exact one."""

    tokens: int
    fan_in: int
    fan_out: int
    branches: int = 2
    dtype: torch.dtype = torch.bfloat16
    distribution: str = "gaussian"
    terms: int = 1
    shared: bool = False
    bias: bool = False
    offset: tuple[int, int] = (3, 512)
    multiprocessors: int = 1
    device: str = "cpu"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, tuple]:
        w = rand(self.fan_out, self.fan_in + 8, dtype=self.dtype)[:, : self.fan_in]
        lead = 1 if self.shared else self.branches
        x = rand(lead, self.tokens, self.fan_in, dtype=self.dtype, seed=2)
        b = rand(self.branches, self.fan_out, seed=4) if self.bias else None
        seeds, coeffs = seeds_of(self.terms), table(self.branches, self.terms)
        return x, w, b, (seeds, coeffs, PID, *self.offset, self.distribution)

    def result(self, *, wgmma: bool = True) -> Tensor:
        x, _, b, (seeds, coeffs, *place) = self.inputs()
        x, seeds, coeffs = (t.to(self.device) for t in (x, seeds, coeffs))
        w = rand(self.fan_out, self.fan_in + 8, dtype=self.dtype).to(self.device)[:, : self.fan_in]
        b = None if b is None else b.to(self.device)
        ops = native(multiprocessors=self.multiprocessors, device=self.device)
        assert ops.takes_fused(x, w, 1, self.offset[1], False)
        assert ops.wgmma.takes(x, w, self.tokens)
        if wgmma:
            return ops.wgmma.linear(x, w, b, seeds, coeffs, *place, self.shared).cpu()
        return ops._fused(x, w, b, seeds, coeffs, *place, self.shared, False, None).cpu()

    def check(self) -> None:
        x, w, b, rest = self.inputs()
        got = self.result()
        exact = exact_linear(x.expand(self.branches, -1, -1), w, b, *rest)
        # float32 sums of exact products, rounded once; the two fused products and the reference
        # are no further from each other than both are from the exact one.
        scale = F.linear(x.double().abs(), w.double().abs() + 0.5).amax()
        slack = 2**-24 * 40 * scale
        bound = 0.5 * torch.finfo(self.dtype).eps * exact.abs() + slack
        assert got.dtype == self.dtype
        assert bool(((got.double() - exact).abs() <= bound).all()), self
        mma = self.result(wgmma=False)
        assert bool(((got.double() - mma.double()).abs() <= 2 * bound).all()), self
        plain = reference.linear(x[0] if self.shared else x, w, b, *rest, self.shared, False)
        # Its normals differ by up to 2e-6: now and then a displaced weight rounds the other way.
        far = torch.finfo(self.dtype).eps * (exact.abs() + 2**-6 * scale)
        assert bool(((got.double() - plain.double()).abs() <= far).all()), self


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_product(dtype: torch.dtype, distribution: str, device: str) -> None:
    case = Case(100, 520, 70, dtype=dtype, distribution=distribution, bias=True, device=device)
    case.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tokens", "fan_in", "fan_out"),
    [
        (1, 8, 1),
        (65, 64, 64),
        (128, 248, 130),
        (100, 264, 65),
        (256, 40, 129),
        (300, 776, 200),
    ],
)
def test_shapes(tokens: int, fan_in: int, fan_out: int, device: str) -> None:
    Case(tokens, fan_in, fan_out, device=device).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["stacked", "shared"])
def test_branches(branches: int, shared: bool, device: str) -> None:
    case = Case(65, 264, 66, branches=branches, shared=shared, bias=shared, device=device)
    dataclasses.replace(case, terms=branches).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("branches", [2, 3])
def test_parts_of_the_columns(branches: int, device: str) -> None:
    """Parts that meet in global memory, of several half panels each and the last one shorter."""
    case = Case(129, 1288, 70, branches=branches, bias=True, multiprocessors=2 * branches + 2)
    case = dataclasses.replace(case, device=device)
    parts = native().wgmma._parts(70, 1288, 129, branches, case.multiprocessors)
    assert 1 < parts < 6
    case.check()
    whole = dataclasses.replace(case, multiprocessors=1)
    torch.testing.assert_close(case.result(), whole.result(), rtol=2**-7, atol=0.02)


def test_a_seed_that_no_branch_of_a_pair_has() -> None:
    case = Case(66, 256, 64, branches=4, terms=3)
    x, w, b, rest = case.inputs()
    coeffs = rest[1]
    coeffs[:2, 0] = 0.0
    coeffs[2:, 1] = 0.0
    got = native().wgmma.linear(x, w, b, *rest, False)
    exact = exact_linear(x, w, b, *rest)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-3)


def test_how_a_product_is_split() -> None:
    parts = native().wgmma._parts
    assert parts(8192, 2048, 128, 2, 132) == 2  # 64 blocks of outputs
    assert parts(2048, 2048, 128, 2, 132) == 8  # 16
    assert parts(50304, 2048, 128, 2, 132) == 1  # three waves as they are
    for rows, cols, tokens, branches in [(70, 1288, 129, 3), (64, 8, 1, 1), (4096, 11008, 128, 2)]:
        found = parts(rows, cols, tokens, branches, 132)
        groups = -(-cols // 256)
        each = -(-groups // found)
        assert 1 <= found <= 8
        assert each * (found - 1) < groups  # no part is empty


def test_threads_in_another_order_give_the_same_bits() -> None:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda_hopper as t\n"
        "print(t.digest())\n"
    )
    given = {**os.environ, "ZOKERNELS_CUDA_EMULATED": str(cuda_emulated.library())}
    digests = []
    for order in ORDERS:
        env = {**given, "ZK_EMULATE_ORDER": order}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert len(set(digests)) == 1


def digest() -> str:
    found = hashlib.sha256()
    for case in (
        Case(100, 776, 130, branches=3, bias=True),
        Case(65, 1288, 70, terms=2, dtype=torch.float16, distribution="rademacher", shared=True),
        Case(129, 1288, 70, multiprocessors=6),
    ):
        found.update(case.result().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_access_outside_of_any_tensor(tmp_path: Path) -> None:
    """The product under the address sanitizer."""
    output = tmp_path / "_zokernels_cuda_emulated.so"
    cuda_emulated.build(output, "-fsanitize=address", "-O1")
    runtimes = [
        subprocess.run(
            [cuda_emulated.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda_hopper as t\n"
        "t.digest()\n"
        "t.Case(1, 8, 1).result()\n"
        "t.Case(128, 248, 130, shared=True).result()\n"
        "print('done')\n"
    )
    env = {
        **os.environ,
        "ZOKERNELS_CUDA_EMULATED": str(output),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LD_PRELOAD": " ".join(runtimes),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "done\n"


# --- when it serves -------------------------------------------------------------------------------


class Served(Exception):
    """A call came to the product by wgmma."""


def serves(ops: Native, x: Tensor, w: Tensor, *, offset: int = 0, transposed: bool = False) -> bool:
    def raise_served(*args: object) -> Tensor:
        raise Served

    ops.wgmma.linear = raise_served  # type: ignore[method-assign]
    rest = (seeds_of(1), table(2, 1), PID, 0, offset, "gaussian", True, transposed)
    try:
        ops.linear(x, w, None, *rest)
    except Served:
        return True
    return False


def test_it_serves_nothing_unless_asked() -> None:
    x, w = rand(100, 64, dtype=torch.bfloat16), rand(8, 64, dtype=torch.bfloat16)
    assert not serves(cuda_emulated.native(), x, w)
    assert all(a.wgmma == 0 for a in ARCHITECTURES.values())
    assert serves(native(limit=128), x, w)


def test_it_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOKERNELS_GPU", "wgmma=128")
    assert architecture("sm_90").wgmma == 128


def test_it_serves_a_range_of_tokens_and_its_layouts() -> None:
    ops = native(limit=128)
    w = rand(8, 64, dtype=torch.bfloat16)
    for tokens in (FUSED_TOKENS, FUSED_TOKENS + 1, 128, 129):
        x = rand(tokens, 64, dtype=torch.bfloat16)
        assert serves(ops, x, w) is (FUSED_TOKENS < tokens <= 128)
    x = rand(100, 64, dtype=torch.bfloat16)
    assert serves(ops, x, w, offset=256)
    assert not serves(ops, x, w, offset=8)
    assert not serves(ops, x.float(), w.float())
    assert not serves(ops, x, rand(64, 8, dtype=torch.bfloat16), transposed=True)
    assert not serves(ops, x, rand(1, 64, dtype=torch.bfloat16).expand(8, 64))  # rows overlap
    assert not serves(ops, rand(100, 60, dtype=torch.bfloat16), rand(8, 60, dtype=torch.bfloat16))
    base = rand(100 * 64 + 8, dtype=torch.bfloat16)
    assert not serves(ops, base[4:][: 100 * 64].view(100, 64), w)  # eight bytes past sixteen


def test_the_conformance_suites_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models of layouts and shapes, all products of more than one token that fit going here."""
    monkeypatch.setattr(_cuda_ops, "FUSED_TOKENS", 1)
    ops = native()
    calls = []
    product = ops.wgmma.linear
    monkeypatch.setattr(ops.wgmma, "linear", lambda *a: calls.append(1) or product(*a))
    backend = _registry.Backend("hopper_emulated", ("cpu",), ops.kernels())
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    for dtype in HALVES:
        for distribution in noise.DISTRIBUTIONS:
            conformance.test_linear(backend.name, dtype, False, distribution)
            conformance.test_linear_cross_entropy(backend.name, dtype, distribution)
    conformance.test_linear_of_strided_activations(backend.name)
    assert calls


# --- the machine code -----------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")
def test_machine_code(tmp_path: Path) -> None:
    """TMA and wgmma are there, and nothing touches a register of a product in flight."""
    if "90" not in known_architectures():
        pytest.skip("this nvcc does not know compute capability 9.0")
    source, cubin = cuda_emulated.SOURCES / "linear_sm90.cu", tmp_path / "out.cubin"
    command = [str(NVCC), "-std=c++17", *FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    subprocess.run([*command, "-o", str(cubin), str(source)], check=True, capture_output=True)
    listing = subprocess.run(
        [str(disassembler()), "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    kernels = [k for k in listing.split("Function : ")[1:] if "linear_sm90_kernel" in k[:200]]
    assert len(kernels) == 4
    for kernel in kernels:
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", kernel, re.MULTILINE)
        names = Counter(re.sub(r"^@!?U?P\d+ ", "", line).split()[0].split(".")[0] for line in code)
        # Eight products a slice, in the loop and behind it; three boxes, at three places.
        assert names["HGMMA"] == 16
        assert names["UTMALDG"] == 9
        assert not {"HMMA", "LDL", "STL"} & set(names)
        in_flight: set[int] = set()
        meanwhile = 0
        for line in code:
            if product := re.search(r"HGMMA\.64x128x16\S* R(\d+), R(\d+), gdesc", line):
                sums, left = (int(r) for r in product.groups())
                in_flight |= {*range(sums, sums + 64), *range(left, left + 4)}
            elif "WARPGROUP.DEPBAR" in line:
                in_flight.clear()
            elif in_flight:
                # A name stands for up to four registers.
                named = {int(r) + i for r in re.findall(r"\bR(\d+)", line) for i in range(4)}
                first = {int(r) for r in re.findall(r"\bR(\d+)", line)}
                wide = re.search(r"\.(64|128|WIDE|M88)", line)
                assert not (named if wide else first) & in_flight, line
                meanwhile += 1
        assert meanwhile > 200  # half of the next slice's noise


# --- bits that the emulation could misread as the kernel miswrites them ---------------------------


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("layout") / "layout.so"
    cuda_emulated.compile_host([Path(__file__).with_name("cuda_hopper_layout.cpp")], output)
    library = ctypes.CDLL(str(output))
    library.t_factor_at.restype = ctypes.c_uint64
    return library


@pytest.mark.parametrize(
    ("address", "offset", "start"),
    [(0x400, 0, 0x40), (0x400, 32, 0x42), (0x18400, 0x6000, 0x1E40), (0x38000, 0xBE0, 0x38BE)],
)
def test_descriptor(layout: ctypes.CDLL, address: int, offset: int, start: int) -> None:
    """PTX manual, wgmma's matrix descriptor: 14 bits each, of offsets without their low four."""
    found = layout.t_factor_at(address, offset)
    fields = {
        "start": found & 0x3FFF,
        "leading": found >> 16 & 0x3FFF,  # not read where rows are swizzled
        "stride": found >> 32 & 0x3FFF,  # from eight rows of 64 bytes to the next eight
        "base": found >> 49 & 7,
        "swizzle": found >> 62,  # 1: 128 bytes, 2: 64, 3: 32
    }
    assert fields == {"start": start, "leading": 1, "stride": 512 >> 4, "base": 0, "swizzle": 2}
    named = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
    assert found & ~named == 0


def test_swizzle_of_64_bytes(layout: ctypes.CDLL) -> None:
    """PTX manual, tensor swizzling modes: where the four chunks of eight rows lie."""
    manual = ["0123", "0123", "1032", "1032", "2301", "2301", "3210", "3210"]
    for row in range(128):
        for chunk in range(4):
            place = row * 64 + int(manual[row % 8][chunk]) * 16
            assert layout.t_swizzled(row, chunk) == place


# --- that the emulation sees mistakes -------------------------------------------------------------

IN_FLIGHT = "of a product in flight was written"
STUCK = "some threads wait for others"
UNSEEN = r"before (other threads and units could see it|it was made)"
# As enum Mistake of cuda_hopper_mistakes.cpp; a number: how many of the results are not 16.
MISTAKES: list[str | int] = [
    0,
    "shared memory that a product in flight reads was written",
    128,
    f"a sum {IN_FLIGHT}",
    f"a register operand {IN_FLIGHT}",
    "shared memory that a product in flight reads was written",
    "without begin_products",
    "more bytes than a barrier expects",
    STUCK,
    UNSEEN,
    UNSEEN,
    "a thread ended with products in flight",
    STUCK,
    "a box is not at a multiple of 512 bytes",
    "an arrival too many",
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("mistakes") / "mistakes.so"
    cuda_emulated.compile_host([Path(__file__).with_name("cuda_hopper_mistakes.cpp")], output)
    return output


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_a_mistake_is_seen(mistakes: Path, mistake: int, order: str) -> None:
    code = (
        "import ctypes, sys\n"
        "f = ctypes.CDLL(sys.argv[1]).t_mistake\n"
        "f.restype = ctypes.c_char_p\n"
        "out = (ctypes.c_float * (128 * 64))()\n"
        "assert f(int(sys.argv[2]), out) is None\n"
        "print(sum(value != 16.0 for value in out))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(mistakes), str(mistake)],
        capture_output=True,
        text=True,
        env={**os.environ, "ZK_EMULATE_ORDER": order},
    )
    expected = MISTAKES[mistake]
    if isinstance(expected, int):
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == expected
    else:
        assert done.returncode != 0
        assert re.search(expected, done.stderr), done.stderr
