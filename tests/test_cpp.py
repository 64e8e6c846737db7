"""What is particular to the C++ backend: instruction sets, threads, tiles, scratch, loading."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zokernels import _load, _ops, cpp, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = cpp.instruction_sets()
PID = 0x12345678
K = cpp.KERNELS


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    isa, threads = cpp.instruction_set(), torch.get_num_threads()
    yield
    cpp.use_instruction_set(isa)
    cpp.set_tile_sizes()
    cpp.set_fused_tokens()
    cpp.widen_products()
    torch.set_num_threads(threads)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeds_of(count: int) -> Tensor:
    return torch.arange(count) * 1_000_003 - 5


def table(branches: int, terms: int) -> Tensor:
    return rand(branches, terms, seed=3) * 0.05


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def noise_results(dtype: torch.dtype, distribution: str, rounding: str) -> list[Tensor]:
    """Everything a vendor product has no part in."""
    w = rand(9, 1700, dtype=dtype)
    w[0, :4] = torch.tensor([float("nan"), float("inf"), 1e-40, -0.0]).to(dtype)
    seeds, c = seeds_of(3), table(2, 3)
    place = (PID, 5, 77, distribution)
    out = [K["sample"](4, 2500, seeds[1].clone(), PID, 3, 1111, distribution)]
    for target in DTYPES:
        out.append(K["displace"](w, seeds, c, *place, rounding, target))
        out.append(K["displace"](w, seeds[:1], c[:, :1], *place, rounding, target))
    params = [
        w.clone(),
        rand(33, dtype=dtype),
        rand(5, 3, 7, dtype=dtype),
        rand(40, 9).to(dtype).t(),
    ]
    ids, r0, c0 = [1, 2, 3, 4], [0, 0, 9, 0], [300, 5, 0, 0]
    decay = torch.tensor([1.0, 0.9, 0.99])
    K["update_"](params, seeds, c[0], decay, None, ids, r0, c0, distribution, rounding)
    out += params
    finite = [p.nan_to_num(0.0, 0.0, 0.0) for p in params]
    out.append(K["project"](finite, seeds, ids, r0, c0, distribution))
    out.append(K["embedding"](torch.tensor([[0, 8], [3, 8]]), w, seeds, c, *place, False))
    return [bits(t) for t in out]


def all_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"result {i} differs in {int((x != y).sum())} elements"


def test_every_op_has_a_kernel() -> None:
    assert set(K) == set(_ops.SCHEMAS)


# --- instruction sets -----------------------------------------------------------------------------


def test_portable_is_always_there_and_last() -> None:
    assert ISAS[-1] == "portable"
    assert len(set(ISAS)) == len(ISAS)


@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_agree_bit_for_bit(
    dtype: torch.dtype, distribution: str, rounding: str
) -> None:
    results = []
    for isa in ISAS:
        cpp.use_instruction_set(isa)
        assert cpp.instruction_set() == isa
        results.append(noise_results(dtype, distribution, rounding))
    for other in results[1:]:
        all_equal(other, results[0])


def test_instruction_sets_agree_on_a_million_normals() -> None:
    drawn = []
    for isa in ISAS:
        cpp.use_instruction_set(isa)
        drawn.append(K["sample"](64, 1 << 14, torch.tensor(11), PID, 0, 0, "gaussian"))
    for other in drawn[1:]:
        assert torch.equal(bits(other), bits(drawn[0]))
    exact = noise.gaussian(64, 1 << 14, torch.tensor(11), PID)
    assert float((drawn[0].double() - exact.double()).abs().max()) < 1e-6


def test_cross_entropy_statistics_agree() -> None:
    x, w = rand(2, 6, 24), rand(500, 24)
    args = (x, w, None, torch.arange(6), seeds_of(1), table(2, 1), PID, 0, 0)
    losses = []
    for isa in ISAS:
        cpp.use_instruction_set(isa)
        losses.append(K["linear_cross_entropy"](*args, "rademacher", False, -100))
    for other in losses[1:]:
        assert torch.equal(other, losses[0])


def test_unknown_instruction_set() -> None:
    with pytest.raises(
        ValueError, match=r"must be one of \['avx512', 'avx2', 'portable'\]; got 'sse'"
    ):
        cpp.use_instruction_set("sse")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_environment_chooses_the_instruction_set() -> None:
    code = "from zokernels import cpp; print(cpp.instruction_set())"
    assert run_python(code, ZOKERNELS_CPU="portable").stdout.strip() == "portable"


def test_environment_with_an_unknown_instruction_set_is_an_error() -> None:
    code = """
import torch, zokernels
torch.ops.zokernels.sample(1, 1, torch.tensor(1), 1, 0, 0, "gaussian")
"""
    done = run_python(code, ZOKERNELS_CPU="avx9000")
    assert done.returncode != 0
    assert "ZOKERNELS_CPU: instruction set must be one of" in done.stderr
    assert "got 'avx9000'" in done.stderr


# --- threads and tiles ----------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_noise_does_not_depend_on_threads(distribution: str) -> None:
    w = rand(300, 700, dtype=torch.bfloat16)
    wide = rand(1, 150_001)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [w.clone(), wide.clone(), rand(5)]
        seeds, c = seeds_of(2), table(2, 2)
        tail = ([1, 2, 3], [], [0, 321, 0], distribution)
        K["update_"](params, seeds, c[0], None, None, *tail, "stochastic")
        results.append(
            [
                *map(bits, params),
                bits(K["project"](params, seeds, *tail)),
                bits(K["displace"](wide, seeds, c, PID, 0, 5, distribution, "nearest", None)),
                bits(K["sample"](3, 100_000, seeds[0].clone(), PID, 0, 5, distribution)),
            ]
        )
    for other in results[1:]:
        all_equal(other, results[0])


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_a_product_do_not_depend_on_tiles(dtype: torch.dtype, transposed: bool) -> None:
    """The identity as input reads the displaced weights back, exactly, through any tiling."""
    w = rand(130, 700, dtype=dtype)
    seeds, c = seeds_of(1), table(2, 1)
    place = (seeds, c, PID, 1, 100, "gaussian")
    want = K["displace"](w, *place, "nearest", None)
    x = torch.eye(130 if transposed else 700, dtype=dtype)
    fused = K["linear"](x, w, None, *place, True, transposed)
    assert torch.equal(fused if transposed else fused.transpose(1, 2), want)
    cpp.set_fused_tokens(0)
    for tile, threads in itertools.product([(1, 1), (1 << 16, 16), (1 << 30, 4096)], [1, 3]):
        cpp.set_tile_sizes(tile_bytes=tile[0], min_rows=tile[1])
        torch.set_num_threads(threads)
        got = K["linear"](x, w, None, *place, True, transposed)
        got = got if transposed else got.transpose(1, 2)
        assert torch.equal(got, want), (tile, threads)


def test_products_agree_across_tiles_and_threads() -> None:
    x, w, bias = rand(2, 70, 96), rand(800, 96), rand(2, 800)
    targets = torch.arange(70) * 11
    seeds, c = seeds_of(1), table(2, 1)
    y0 = loss0 = None
    cpp.set_fused_tokens(0)
    for tile, threads in itertools.product([(1, 1), (1 << 16, 16), (1 << 30, 4096)], [1, 3]):
        cpp.set_tile_sizes(tile_bytes=tile[0], min_rows=tile[1])
        torch.set_num_threads(threads)
        y = K["linear"](x, w, bias, seeds, c, PID, 0, 0, "gaussian", False, False)
        loss = K["linear_cross_entropy"](
            x, w, bias, targets, seeds, c, PID, 0, 0, "gaussian", False, -100
        )
        if y0 is None or loss0 is None:
            y0, loss0 = y, loss
            want = torch.stack([F.cross_entropy(y[g].double(), targets) for g in range(2)])
            torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(y, y0, rtol=0, atol=2e-5)
        torch.testing.assert_close(loss, loss0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_threads_than_tiles_split_the_tokens(dtype: torch.dtype) -> None:
    x, w, bias = rand(2, 1601, 24, dtype=dtype), rand(40, 24, dtype=dtype), rand(2, 40)
    rest = (seeds_of(1), table(2, 1), PID, 0, 0, "gaussian", False)
    for weights, transposed in ((w, False), (w.t().contiguous(), True)):
        one = K["linear"](x, weights, bias, *rest, transposed)
        torch.set_num_threads(4)
        several = K["linear"](x, weights, bias, *rest, transposed)
        torch.set_num_threads(1)
        scale = torch.finfo(dtype).eps * float(one.abs().max())
        torch.testing.assert_close(several, one, rtol=0, atol=2 * scale)


def test_many_tokens_take_several_blocks() -> None:
    """Beyond 2048 tokens logits and widened results go in blocks."""
    for dtype in (torch.float32, torch.float16):
        x, w = rand(1, 4500, 8, dtype=dtype), rand(37, 8, dtype=dtype)
        rest = (seeds_of(1), torch.zeros(1, 1), PID, 0, 0, "rademacher", False)
        y = K["linear"](x, w, None, *rest, False)
        exact = F.linear(x.double(), w.double())
        torch.testing.assert_close(
            y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max())
        )
        targets = torch.arange(4500) % 37
        loss = K["linear_cross_entropy"](x, w, None, targets, *rest, -100)
        want = F.cross_entropy(exact[0], targets)
        torch.testing.assert_close(loss[0].double(), want, rtol=1e-3, atol=0)


# --- fused products -------------------------------------------------------------------------------


def exact_product(
    x: Tensor, w: Tensor, bias: Tensor, rest: tuple[object, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """In float64 from the displaced weights, and torch's own in ``dtype``."""
    seeds, c, *place = rest
    formed = K["displace"](w, seeds, c, *place, "nearest", None)
    exact = torch.stack([F.linear(a.double(), b.double()) for a, b in zip(x, formed, strict=True)])
    own = torch.stack([F.linear(a, b) for a, b in zip(x, formed, strict=True)])
    return exact + bias[:, None].double(), (own.float() + bias[:, None]).to(dtype)


@pytest.mark.skipif(ISAS == ["portable"], reason="no fused kernel is compiled")
@pytest.mark.parametrize("isa", [i for i in ISAS if i != "portable"])
@pytest.mark.parametrize("shape", [(1, 7, 5), (8, 48, 64), (33, 50, 3001), (70, 97, 2050)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_products_lose_no_more_than_torch(
    dtype: torch.dtype, shape: tuple[int, int, int], isa: str
) -> None:
    tokens, fan_out, fan_in = shape
    cpp.use_instruction_set(isa)
    cpp.set_fused_tokens(1 << 30)
    if isa == "avx2":
        cpp.widen_products(bf16=True, f16=True)  # it has no product of bfloat16 pairs
    assert cpp.product_plan(fan_in, fan_out, tokens, 3, dtype, False, 1).fused
    x, w = rand(3, tokens, fan_in, dtype=dtype), rand(fan_out, fan_in, dtype=dtype) * 0.1
    bias, targets = rand(3, fan_out), torch.arange(tokens) % fan_out
    rest = (seeds_of(2), table(3, 2), PID, 3, 7, "gaussian")
    exact, own = exact_product(x, w, bias, rest, dtype)
    y = K["linear"](x, w, bias, *rest, False, False)
    rounding = torch.finfo(dtype).eps * float(exact.abs().max())
    lost = float((own.double() - exact).abs().max())
    assert float((y.double() - exact).abs().max()) <= 2 * lost + rounding
    loss = K["linear_cross_entropy"](x, w, bias, targets, *rest, False, -100)
    want = torch.stack([F.cross_entropy(e, targets) for e in exact])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=0)


@pytest.mark.skipif(ISAS == ["portable"], reason="no fused kernel is compiled")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_products_do_not_depend_on_threads_or_other_branches(
    dtype: torch.dtype, shared: bool
) -> None:
    x, w, bias = rand(2, 70, 300, dtype=dtype), rand(333, 300, dtype=dtype), rand(2, 333)
    x = x[0] if shared else x
    targets = (torch.arange(70) * 5) % 333
    seeds, c = seeds_of(1), table(2, 1)
    at = (PID, 0, 0, "gaussian", shared)
    results = []
    for threads in (1, 3, 16):
        torch.set_num_threads(threads)
        y = K["linear"](x, w, bias, seeds, c, *at, False)
        loss = K["linear_cross_entropy"](x, w, bias, targets, seeds, c, *at, -100)
        results.append([bits(y), bits(loss)])
    for other in results[1:]:
        all_equal(other, results[0])
    one = K["linear"](x if shared else x[1:], w, bias[1:], seeds, c[1:], *at, False)
    assert torch.equal(bits(one[0]), bits(K["linear"](x, w, bias, seeds, c, *at, False)[1]))


@pytest.mark.skipif(len(ISAS) < 3, reason="one instruction set has a fused kernel")
def test_fused_products_in_float32_agree_across_instruction_sets() -> None:
    x, w, bias = rand(2, 70, 600), rand(100, 600), rand(2, 100)
    results = []
    for isa in ("avx512", "avx2"):
        cpp.use_instruction_set(isa)
        y = K["linear"](x, w, bias, seeds_of(1), table(2, 1), PID, 0, 0, "gaussian", False, False)
        results.append([bits(y)])
    all_equal(results[1], results[0])


def test_fused_losses_of_non_finite_logits_are_torch_s() -> None:
    """Infinite and NaN logits give what torch gives; masked vocabulary rows of -inf are fine."""
    x, targets = torch.ones(16, 4), torch.arange(16) % 3
    rest = (seeds_of(1), torch.zeros(1, 1), PID, 0, 0, "rademacher", True, -100)
    for value in (float("inf"), float("nan"), float("-inf")):
        w = rand(500, 4)
        bias = torch.zeros(1, 500)
        bias[0, 100:200] = value
        loss = K["linear_cross_entropy"](x, w, bias, targets, *rest)
        want = F.cross_entropy(F.linear(x, w) + bias[0], targets)
        torch.testing.assert_close(loss[0], want, rtol=1e-6, atol=0, equal_nan=True)


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replay_is_the_steps_bit_for_bit(isa: str, distribution: str, dtype: torch.dtype) -> None:
    cpp.use_instruction_set(isa)
    torch.set_num_threads(2)
    steps = 12
    params = [rand(40, 900, dtype=dtype), rand(1300, dtype=dtype), rand(3, 5, 6, dtype=dtype)]
    apart = [p.clone() for p in params]
    seeds, c = seeds_of(steps), table(1, steps)[0] * 0.01
    decay = 1 - 1e-3 * torch.arange(float(steps))
    tail = ([7, 8, 9], [0, 0, 4], [3, 0, 0], distribution, "stochastic")
    K["update_"](params, seeds, c, decay, None, *tail)
    for k in range(steps):
        one = slice(k, k + 1)
        K["update_"](apart, seeds[one], c[one], decay[one], None, *tail)
    all_equal([bits(p) for p in params], [bits(p) for p in apart])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_of_whole_groups_are_those_of_any_parts(isa: str, dtype: torch.dtype) -> None:
    """Columns end after a pair of groups of 256, after half a pair, and inside a group."""
    cpp.use_instruction_set(isa)
    seeds, c = seeds_of(2), table(1, 2)[0]
    for cols in (256, 512, 768, 1000):
        whole = rand(3, cols, dtype=dtype)
        whole[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")]).to(dtype)
        parts = whole.clone()
        at = ("gaussian", "stochastic")
        K["update_"]([whole], seeds, c, None, None, [PID], [], [], *at)
        for begin, end in itertools.pairwise((0, 100, 131, cols)):
            K["update_"]([parts[:, begin:end]], seeds, c, None, None, [PID], [0], [begin], *at)
        all_equal([bits(whole)], [bits(parts)])
        assert torch.isnan(whole[0, 0]) and whole[0, 1:3].isinf().all()


def test_arguments_may_be_strided() -> None:
    w = rand(6, 80)
    seeds, c = seeds_of(6)[::2], table(6, 2).t()[:, ::2]
    args = (PID, 0, 0, "gaussian", "nearest", None)
    want = K["displace"](w, seeds.contiguous(), c.contiguous(), *args)
    assert torch.equal(K["displace"](w, seeds, c, *args), want)
    p, q = w.clone(), w.clone()
    tail = (None, None, [1], [], [], "gaussian", "nearest")
    K["update_"]([p], seeds, c[0], *tail)
    K["update_"]([q], seeds.contiguous(), c[0].contiguous(), *tail)
    assert torch.equal(p, q)


def test_addresses_beyond_32_bits(tmp_path: Path) -> None:
    """Rows 2**31 elements apart, in a sparse file of which a few pages are ever touched."""
    far = (1 << 31) + 512
    path = tmp_path / "sparse"
    with path.open("wb") as f:
        f.truncate((far + 4096) * 2)
    flat = torch.from_file(str(path), shared=True, size=far + 4096, dtype=torch.bfloat16)
    w = flat.as_strided((2, 700), (far, 1))
    w.copy_(rand(2, 700))
    dense = w.contiguous()
    assert w.storage_offset() == 0 and w.stride(0) > 1 << 31
    seeds, c = seeds_of(2), table(2, 2)
    place = (seeds, c, PID, 2**32 - 2, 2**34 - 700, "gaussian")
    want = K["displace"](dense, *place, "nearest", None)
    assert torch.equal(K["displace"](w, *place, "nearest", None), want)
    columns = flat.as_strided((700, 2), (1, far))
    got = K["displace"](columns, seeds, c, PID, 0, 0, "gaussian", "nearest", None)
    flipped = dense.t().contiguous()
    assert torch.equal(
        got, K["displace"](flipped, seeds, c, PID, 0, 0, "gaussian", "nearest", None)
    )
    tail = (None, None, [PID], [5], [6], "gaussian", "stochastic")
    K["update_"]([w], seeds, c[0], *tail)
    K["update_"]([dense], seeds, c[0], *tail)
    assert torch.equal(w, dense)


# --- scratch, concurrency, loading ----------------------------------------------------------------


def test_scratch_does_not_grow() -> None:
    torch.set_num_threads(2)
    process = psutil.Process()

    def call(i: int) -> None:
        # Every third product has rows so long that a tile exceeds what a thread keeps.
        fan_in = 60_000 if i % 3 == 0 else 200 + i
        x, w = torch.zeros(2, 2, fan_in), torch.zeros(48, fan_in)
        K["linear"](x, w, None, seeds_of(1), table(2, 1), PID, 0, 0, "rademacher", False, False)

    for i in range(60):  # each thread meets its largest tile
        call(i)
    before = process.memory_info().rss
    for i in range(60):
        call(i)
    assert process.memory_info().rss - before < 48 << 20


def test_calls_from_several_threads() -> None:
    x, w, seeds, c = rand(2, 9, 300), rand(400, 300), seeds_of(1), table(2, 1)
    rest = (None, seeds, c, PID, 0, 0, "gaussian", False, False)
    want = K["linear"](x, w, *rest)
    failed: list[object] = []

    def work() -> None:
        for _ in range(10):
            if not torch.allclose(K["linear"](x, w, *rest), want, rtol=0, atol=1e-5):
                failed.append("differs")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


def test_generate_draws_the_noise_of_the_contract() -> None:
    for distribution in noise.DISTRIBUTIONS:
        want = (
            noise.direction(1, 2048, torch.tensor(9), 0, distribution=distribution).double().sum()
        )
        assert cpp.generate(distribution, 9, 8) == pytest.approx(float(want), abs=1e-3)


def test_a_missing_library_says_so() -> None:
    with pytest.raises(ImportError, match=r"_zokernels_none\.so does not exist.*pip install"):
        _load.native_library("_zokernels_none")


def test_a_broken_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_zokernels_cpu.so").write_text("not a library")
    monkeypatch.setattr(_load, "__file__", str(tmp_path / "_load.py"))
    with pytest.raises(ImportError, match="does not load with torch"):
        _load.native_library("_zokernels_cpu")


@pytest.mark.parametrize("constant", ["ABI_VERSION", "CONTRACT_VERSION"])
def test_a_library_of_another_version_is_refused(
    constant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, constant, 999)
    with pytest.raises(ImportError, match="this package needs 999"):
        _load.native_library("_zokernels_cpu")


def test_inference_tensors_are_written() -> None:
    with torch.inference_mode():
        p, out = torch.zeros(2, 5), torch.zeros(1, 2, 5)
    rest = (seeds_of(1), torch.ones(1, 1), PID, 0, 0, "rademacher", "nearest")
    K["displace_"](out, p, *rest)
    tail = (seeds_of(1), torch.ones(1), None, None, [PID], [], [], "rademacher", "nearest")
    K["update_"]([p], *tail)
    assert torch.equal(out[0], p)
    assert torch.equal(p.abs(), torch.ones(2, 5))
