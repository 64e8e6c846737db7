"""What is particular to the CUDA backend, on the CPU: device functions, indexing, fused products.

Everything runs the sources of ``csrc/cuda`` compiled by the host compiler (tests/cuda_emulated.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cuda_emulated
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zokernels import _registry, cpp, noise, reference
from zokernels._cuda_ops import FEW_TOKENS, FUSED_TOKENS, Native
from zokernels.planner import plan_linear

PID = 0x9ABCDEF0
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeds_of(count: int) -> Tensor:
    return torch.arange(count) * 1_000_003 - 5


def table(branches: int, terms: int) -> Tensor:
    return rand(branches, terms, seed=3) * 0.05


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def alike(a: Tensor, b: Tensor) -> None:
    """Of normals 2e-6 apart: where 16 bits round the other way it is by a step, and rare."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.dtype == torch.float32:
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-5, equal_nan=True)
        return
    steps = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
    steps[(a == b) | (a.isnan() & b.isnan())] = 0  # -0.0 and 0.0, kinds of NaN
    assert int(steps.max() if steps.numel() else 0) <= 2  # of a rounding each
    assert int((steps > 0).sum()) <= max(2, a.numel() // 200)


# --- device functions -----------------------------------------------------------------------------


@functools.cache
def functions() -> ctypes.CDLL:
    output = Path(tempfile.mkdtemp(prefix="zokernels-")) / "functions.so"
    cuda_emulated.compile_host([Path(__file__).with_name("cuda_device_functions.cpp")], output)
    library = ctypes.CDLL(str(output))
    library.t_normals_differ.restype = ctypes.c_double
    library.t_units.restype = ctypes.c_int64
    return library


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def u64(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


def u32(value: int) -> ctypes.c_uint32:
    return ctypes.c_uint32(value)


def i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 0xDEADBEEF12345678, 2**64 - 1])
def test_philox_with_a_rows_shortcut(seed: int, stream: int) -> None:
    for row, param_id in [(0, 0), (1, 7), (2**32 - 1, 2**32 - 1), (123456, PID)]:
        c0 = np.array([0, 1, 63, 64, 12345, 2**31, 2**32 - 1], dtype=np.uint32)
        out = np.zeros((c0.size, 4), dtype=np.uint32)
        functions().t_philox(
            u64(seed), u32(row), u32(param_id), u32(stream), pointer(c0), i64(c0.size), pointer(out)
        )
        key = (seed & 0xFFFFFFFF, seed >> 32)
        for c, words in zip(c0.tolist(), out.tolist(), strict=True):
            assert tuple(words) == noise.philox4x32((c, row, param_id, stream), key)


def test_normals_are_the_contracts() -> None:
    """With libm's logarithm and root; tests/test_ptx_cuda.py has the device's, at their worst."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2**32, 2_000_000, dtype=np.uint32)
    b = rng.integers(0, 2**32, a.size, dtype=np.uint32)
    # The ends and the seams: powers of two, three quarters of them, both sides of each, and where
    # the series takes over from the logarithm.
    edges = {0, 2**32 - 1}
    for e in range(32):
        for m in (1 << e, 3 << e >> 1, 2**32 - (1 << e), int((1 - 0.0145) * 2**32)):
            edges |= {(m + d) & 0xFFFFFFFF for d in (-513, -512, -1, 0, 1, 511, 512)}
    grid = np.array(sorted(edges), dtype=np.uint32)
    left, right = (np.ascontiguousarray(g.ravel()) for g in np.meshgrid(grid, grid))
    for x, y in ((a, b), (left, right)):
        far = functions().t_normals_differ(pointer(x), pointer(y), i64(x.size))
        assert 0 < far < 1.2e-6


@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_of_every_kind_of_number(dtype: torch.dtype, rounding: str) -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32)
    special = [0, 1, 2**31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x38800000, 0x387FFFFF, 0x33000000]
    special += [0x477FE000, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF, 0x33800000, 0x387FC000, 0x7F7F8000]
    # Signalling NaNs cannot come out of an fma; make them quiet as it does.
    raw = np.concatenate([raw, np.repeat(np.array(special, dtype=np.uint32), 64)])
    raw = np.where((raw & 0x7FFFFFFF) > 0x7F800000, raw | 0x00400000, raw)
    near = (rng.standard_normal(500_000) * 2.0 ** rng.integers(-30, 18, 500_000)).astype(np.float32)
    x = np.concatenate([raw.view(np.float32), near])
    r16 = rng.integers(0, 2**16, x.size, dtype=np.uint32)
    out = np.empty_like(x)
    stochastic = rounding == "stochastic"
    kind = {torch.bfloat16: 1, torch.float16: 2}[dtype]
    functions().t_round(kind, int(stochastic), pointer(x), pointer(r16), i64(x.size), pointer(out))
    bits = torch.from_numpy(r16.astype(np.int64)) if stochastic else None
    want = noise.round_to(torch.from_numpy(x), dtype, bits).float()
    same(torch.from_numpy(out), want)


@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_draw_of_every_place_in_a_group(distribution: str, columns: int) -> None:
    kind = noise.DISTRIBUTIONS.index(distribution)
    for seed, row, group in [(5, 0, 0), (2**64 - 3, 2**32 - 1, 2**26 - 1), (77, 9, 3)]:
        signed = torch.tensor(noise.signed_seed(seed))
        want = noise.direction(1, 256, signed, PID, row, group * 256, distribution)[0].view(4, 64)
        for start in range(0, 64, columns):
            out = np.zeros((4, columns), dtype=np.float32)
            functions().t_draw(
                *(kind, u64(seed), u32(row), u32(PID), u32(group), u32(start), columns),
                pointer(out),
            )
            got = torch.from_numpy(out)
            torch.testing.assert_close(got, want[:, start : start + columns], rtol=0, atol=2e-6)


# --- indexing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("columns", [4, 8])
def test_units_cover_every_element_once(columns: int, pairs: int) -> None:
    for rows, cols, offset in [
        (1, 1, 0),
        (3, 700, 0),
        (2, 256, 256),
        (5, 13, 1000),
        (2, 1030, 2**34 - 2048),
    ]:
        seen = np.zeros((rows, cols), dtype=int)
        units = functions().t_units(columns, i64(rows), i64(offset), i64(cols), pairs)
        out = np.zeros(4, dtype=np.int64)
        for index in range(units):
            functions().t_unit(columns, i64(index), i64(offset), i64(cols), pairs, pointer(out))
            row, group, start, col = out.tolist()
            assert start % columns == 0
            assert col + offset == group * 256 + start
            if pairs:  # the other half of a pair is eight (sixteen) threads away, in the same warp
                assert index // (64 // columns) % 2 == group % 2
            for j, i in itertools.product(range(4), range(columns)):
                if 0 <= col + 64 * j + i < cols:
                    seen[row, col + 64 * j + i] += 1
        assert (seen == 1).all()


def test_units_of_more_than_32_bits() -> None:
    """A vocabulary of 2**31 rows: the index of a unit needs more than 32 bits."""
    out = np.zeros(4, dtype=np.int64)
    for row in (0, 2**27 + 1, 2**31 - 1):
        index = row * 3 * 16 + 2 * 16 + 5
        functions().t_unit(4, i64(index), i64(0), i64(768), 0, pointer(out))
        assert out.tolist() == [row, 2, 20, 532]


def test_every_tile_finds_its_entry() -> None:
    firsts = np.array([0, 1, 5, 6, 100, 2**33], dtype=np.int64)
    for tile in [0, 1, 2, 4, 5, 6, 7, 99, 100, 2**33 - 1, 2**33, 2**40]:
        want = int(np.searchsorted(firsts, tile, side="right")) - 1
        for count in range(want + 1, firsts.size + 1):
            last = min(want, count - 1)
            assert functions().t_entry_of(pointer(firsts), count, i64(tile)) == last


# --- the elementwise kernels ----------------------------------------------------------------------


@functools.cache
def native(multiprocessors: int = 4) -> Native:
    return cuda_emulated.native(multiprocessors)


def results(kernels: dict, dtype: torch.dtype, distribution: str, rounding: str) -> list[Tensor]:
    """Everything but products with displaced weights; those under a mask are torch's, corrected."""
    w = rand(9, 1700, dtype=dtype)
    w[0, :4] = torch.tensor([float("nan"), float("inf"), 1e-40, -0.0]).to(dtype)
    seeds, c = seeds_of(3), table(3, 3)
    c[1, 0] = c[2, 1] = c[0, 2] = c[1, 2] = 0.0  # a pair of branches that lacks a seed
    place = (PID, 5, 77, distribution)
    out = [kernels["sample"](4, 2500, seeds[1].clone(), PID, 3, 1111, distribution)]
    for target in DTYPES:
        out.append(kernels["displace"](w, seeds, c, *place, rounding, target))
        out.append(kernels["displace"](w[:, 3:], seeds[:1], c[:, :1], *place, rounding, target))
    params = [
        w.clone(),
        rand(33, dtype=dtype),
        rand(5, 3, 7, dtype=dtype),
        rand(40, 9).to(dtype).t(),
        rand(4, 6, 8, dtype=dtype).permute(2, 0, 1),
        rand(3, 1024, dtype=dtype),
    ]
    ids, r0, c0 = [1, 2, 3, 4, 5, 6], [0, 0, 9, 0, 1, 2**32 - 3], [300, 5, 0, 0, 8, 2**34 - 1024]
    decay = torch.tensor([1.0, 0.9, 0.99])
    ends = torch.tensor([True, False, True])
    for term_ends in (None, ends):
        kernels["update_"](
            params, seeds, c[0], decay, term_ends, ids, r0, c0, distribution, rounding
        )
        out += [p.clone() for p in params]
    ids_of = torch.tensor([[0, 8], [3, 8], [1, 1]])
    out.append(kernels["embedding"](ids_of, w, seeds, c, *place, False))
    out.append(kernels["embedding"](ids_of, w, seeds, c, *place, True))
    vectors = [w[0], rand(257, dtype=dtype), rand(0, dtype=dtype), rand(1, dtype=dtype)]
    out.append(kernels["displace_vectors"](vectors, seeds, c, [1, 2, 3, 4], distribution))
    index = torch.arange(0, w.numel(), 7)
    shadow = w.reshape(-1)[index].float() * (1 + 2.0**-12)
    masked = (index, shadow, seeds, c, PID, 300, distribution)
    out.append(kernels["sparse_displace"](w, *masked))
    params, shadows = [w.clone()], [shadow.clone()]
    kernels["sparse_update_"](params, [index], shadows, seeds, c[0], decay, [PID], distribution)
    # Rows full of elements and with few, two blocks of tokens; very few elements; none.
    v, x = rand(70, 70, dtype=dtype), rand(3, 66, 70, dtype=dtype, seed=5)
    dense = torch.cat([torch.arange(140), torch.arange(140, v.numel(), 97)])
    tokens, biases = (66, 2, 2), (rand(3, 70), rand(70, dtype=dtype), None)
    for index, count, bias in zip((dense, dense[-9:], dense[:0]), tokens, biases, strict=True):
        shadow = v.reshape(-1)[index].float()
        masked = (index, shadow, seeds, c, PID, 300, distribution)
        out.append(kernels["sparse_linear"](x[:, :count], v, bias, *masked, False, False))
        out.append(kernels["sparse_linear"](x[0, :2], v, bias, *masked, True, False))
        out.append(kernels["sparse_linear"](x[:, :2], v, None, *masked, False, True))
        out.append(kernels["sparse_embedding"](ids_of, v, *masked, False))
    return out + params + shadows


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_numbers_as_the_cpp_backend(
    dtype: torch.dtype, distribution: str, rounding: str
) -> None:
    """Signs bit for bit; normals come by another logarithm."""
    mine = results(native().kernels(), dtype, distribution, rounding)
    theirs = results(cpp.KERNELS, dtype, distribution, rounding)
    for got, want in zip(mine, theirs, strict=True):
        (same if distribution == "rademacher" else alike)(got, want)


def test_update_of_a_model_of_many_tensors_and_types() -> None:
    """More tensors than one launch's arguments hold, of three types, some of them empty."""
    shapes = [(3, 300), (700,), (0, 5), (2, 2, 40), (1,)]
    params = [rand(*shapes[i % 5], dtype=DTYPES[i % 3], seed=i) for i in range(131)]
    wanted = [p.clone() for p in params]
    rest = (seeds_of(2), table(1, 2)[0], None, None, list(range(131)), [], [])
    for distribution, compare in (("gaussian", alike), ("rademacher", same)):
        native().update_(params, *rest, distribution, "stochastic")
        cpp.update_(wanted, *rest, distribution, "stochastic")
        for got, want in zip(params, wanted, strict=True):
            compare(got, want)
            want.copy_(got)


def test_nothing_outside_is_written() -> None:
    frame = torch.full((3, 12, 1100), 7.0).to(torch.bfloat16)
    out = frame[:, 2:9, 5:1005]
    w = rand(7, 1000, dtype=torch.bfloat16)
    args = (w, seeds_of(1), table(3, 1), PID, 1, 9, "gaussian", "stochastic")
    native().displace_(out, *args)
    same(out.contiguous(), native().displace(*args, None))
    outside = frame.clone()
    outside[:, 2:9, 5:1005] = 7.0
    assert bool((outside == 7.0).all())
    before = frame.clone()
    native().update_(
        [frame[1, 2:9, 5:1005]],
        *(seeds_of(1), table(1, 1)[0], None, None, [PID], [], [], "gaussian", "stochastic"),
    )
    assert not torch.equal(frame, before)
    before[1, 2:9, 5:1005] = frame[1, 2:9, 5:1005]
    same(frame, before)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_project_of_many_seeds_and_tiles(distribution: str) -> None:
    """Several blocks, both widths, more seeds than a pass takes; the sum is exact to float32."""
    vectors = [rand(70, 3000, dtype=torch.bfloat16), rand(9, 2000), rand(5, dtype=torch.float16)]
    ids, seeds = [3, 4, 5], seeds_of(3)
    got = native().project(vectors, seeds, ids, [], [], distribution)
    want = reference.project(vectors, seeds, ids, [], [], distribution)
    slack = 2e-6 * sum(float(v.float().abs().sum()) for v in vectors)
    assert bool(((got - want).abs() <= (0 if distribution == "rademacher" else slack)).all())
    many = seeds_of(300)
    tiny = [vectors[2]]
    all_at_once = native().project(tiny, many, [5], [], [], distribution)
    one_by_one = [
        native().project(tiny, many[k : k + 1], [5], [], [], distribution) for k in (0, 299)
    ]
    same(all_at_once[[0, 299]], torch.cat(one_by_one))


@pytest.mark.timeout(600)
def test_threads_in_another_order_give_the_same_bits() -> None:
    """A kernel whose threads race for shared or global memory would notice."""
    code = (
        "import hashlib, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda_kernels as t\n"
        "h = hashlib.sha256()\n"
        "for d in t.HALVES:\n"
        "    for x in t.results(t.native().kernels(), d, 'gaussian', 'stochastic'):\n"
        "        h.update(x.contiguous().view(torch.uint8).numpy().tobytes())\n"
        "    h.update(t.fused_digest(d))\n"
        "print(h.hexdigest())\n"
    )
    digests = []
    for order in ("forward", "reverse"):
        env = {**os.environ, "ZK_EMULATE_ORDER": order}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1]


@pytest.mark.timeout(300)
def test_warps_that_run_ahead_give_the_same_bits() -> None:
    """The fused products have no barrier between warps but at their end."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda_kernels as t\n"
        "print(t.fused_digest(t.HALVES[0]).hex())\n"
    )
    for order in ("warps", "reverse warps"):
        env = {**os.environ, "ZK_EMULATE_ORDER": order}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{fused_digest(HALVES[0]).hex()}\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_access_outside_of_any_tensor(tmp_path: Path) -> None:
    """The kernels under the address sanitizer: what a memory checker is to a GPU."""
    output = tmp_path / "_zokernels_cuda_emulated.so"
    cuda_emulated.build(output, "-fsanitize=address", "-O1")
    runtimes = [
        subprocess.run(
            [cuda_emulated.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda_kernels as t\n"
        "kernels = t.native().kernels()\n"
        "for distribution in t.noise.DISTRIBUTIONS:\n"
        "    for dtype in t.DTYPES:\n"
        "        t.results(kernels, dtype, distribution, 'stochastic')\n"
        "for dtype in t.HALVES:\n"
        "    t.fused_digest(dtype)\n"
        "for case in [(1, 8, 1), (8, 248, 33), (9, 256, 17), (33, 40, 20), (64, 72, 40)]:\n"
        "    t.fused_case(*case)\n"
        "    t.fused_case(*case, multiprocessors=1000)\n"
        "for case in [(1, 8, 8), (8, 248, 40), (9, 256, 264), (33, 40, 520), (64, 72, 40)]:\n"
        "    t.fused_case(*case, transposed=True)\n"
        "    t.fused_case(*case, transposed=True, multiprocessors=1000)\n"
        "for case in [(1, 4, 1), (8, 252, 33), (3, 1028, 17)]:\n"
        "    t.fused_case(*case, dtype=torch.float32)\n"
        "    t.fused_case(*case, dtype=torch.float32, multiprocessors=1000)\n"
        "for case in [(1, 4, 4), (8, 252, 36), (3, 1028, 268)]:\n"
        "    t.fused_case(*case, dtype=torch.float32, transposed=True)\n"
        "    t.fused_case(*case, dtype=torch.float32, transposed=True, multiprocessors=1000)\n"
        "vectors = [t.rand(70, 300, dtype=torch.bfloat16), t.rand(9, 200)]\n"
        "t.native().project(vectors, t.seeds_of(3), [3, 4], [], [], 'gaussian')\n"
        "for vocab in (256, 257):\n"
        "    rest = (t.seeds_of(1), t.table(2, 1), 1, 0, 0, 'gaussian', False)\n"
        "    x, w = t.rand(2, 3, 64), t.rand(vocab, 64)\n"
        "    targets = torch.tensor([0, vocab - 1, -100])\n"
        "    t.native().linear_cross_entropy(x, w, None, targets, *rest, -100)\n"
        "try:\n"
        "    t.native().embedding(torch.tensor([[0, 2**40], [-1, 9]]), w, *rest)\n"
        "except IndexError:\n"
        "    print('refused')\n"
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
    assert done.stdout == "refused\ndone\n"


# --- the fused product ----------------------------------------------------------------------------


def exact_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, *rest: object, transposed: bool = False
) -> Tensor:
    """float64 product of the rounded displaced weights: they are the same bits in every plan."""
    branches = rest[1].shape[0]  # type: ignore[attr-defined]
    displaced = native().displace(w, *rest, "nearest", None).double()
    displaced = displaced.mT if transposed else displaced
    y = torch.stack([F.linear(x[g].double(), displaced[g]) for g in range(branches)])
    return y if bias is None else y + bias.double()[:, None]


def fused_case(
    tokens: int,
    fan_in: int,
    fan_out: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    branches: int = 2,
    terms: int = 1,
    shared: bool = False,
    bias: bool = False,
    distribution: str = "gaussian",
    multiprocessors: int = 4,
    offset: tuple[int, int] = (3, 512),
    transposed: bool = False,
) -> None:
    ops = native(multiprocessors)
    rows, cols = (fan_in, fan_out) if transposed else (fan_out, fan_in)
    w = rand(rows, cols + 8, dtype=dtype)[:, :cols]
    x = rand(1 if shared else branches, tokens, fan_in, dtype=dtype, seed=2)
    b = rand(branches, fan_out, seed=4) if bias else None
    rest = (seeds_of(terms), table(branches, terms), PID, *offset, distribution)
    takes = ops.takes_few if dtype == torch.float32 else ops.takes_fused
    assert takes(x, w, tokens, offset[1], transposed)
    got = ops.linear(x[0] if shared else x, w, b, *rest, shared, transposed)
    exact = exact_linear(x.expand(branches, tokens, fan_in), w, b, *rest, transposed=transposed)
    # float32 sums of exact products, rounded once.
    scale = F.linear(x.double().abs(), (w.mT if transposed else w).double().abs() + 0.5).amax()
    bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 2**-24 * 40 * scale
    assert got.dtype == dtype
    assert bool(((got.double() - exact).abs() <= bound).all()), (tokens, fan_in, fan_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_fused_product(dtype: torch.dtype, distribution: str) -> None:
    fused_case(5, 520, 70, dtype=dtype, distribution=distribution, bias=True)


@pytest.mark.parametrize(
    ("tokens", "fan_in", "fan_out"),
    [(1, 8, 1), (1, 64, 16), (8, 248, 33), (9, 256, 17), (32, 264, 16), (33, 40, 20), (64, 72, 40)],
)
def test_fused_product_of_any_size(tokens: int, fan_in: int, fan_out: int) -> None:
    fused_case(tokens, fan_in, fan_out)


@pytest.mark.parametrize(
    ("tokens", "fan_in", "fan_out"),
    [(1, 4, 1), (1, 64, 16), (8, 252, 33), (7, 256, 17), (2, 264, 16), (8, 1028, 5)],
)
def test_float32_product_of_any_size(tokens: int, fan_in: int, fan_out: int) -> None:
    fused_case(tokens, fan_in, fan_out, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_transposed_product(dtype: torch.dtype, distribution: str) -> None:
    """Outputs on both sides of the signs' words, of 32 columns, and of the group's end."""
    fused_case(5, 520, 344, dtype=dtype, distribution=distribution, bias=True, transposed=True)


@pytest.mark.parametrize(
    ("tokens", "fan_in", "fan_out"),
    [
        *((1, 8, 8), (1, 64, 16), (8, 248, 40), (9, 256, 264), (32, 264, 256), (33, 40, 520)),
        (64, 72, 328),
    ],
)
def test_transposed_product_of_any_size(tokens: int, fan_in: int, fan_out: int) -> None:
    """Less and more than a slice of rows, than a block's outputs, than a group of columns."""
    fused_case(tokens, fan_in, fan_out, transposed=True)


@pytest.mark.parametrize(
    ("tokens", "fan_in", "fan_out"),
    [(1, 4, 4), (1, 64, 16), (8, 252, 36), (7, 256, 268), (2, 264, 256), (8, 40, 516)],
)
def test_transposed_float32_product_of_any_size(tokens: int, fan_in: int, fan_out: int) -> None:
    fused_case(tokens, fan_in, fan_out, dtype=torch.float32, transposed=True)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 1000])
def test_transposed_product_split_in_any_way(multiprocessors: int, distribution: str) -> None:
    """One, two and four warps behind each other; slices without a warp; parts of the rows."""
    for tokens, fan_in in [(3, 768), (3, 200), (20, 1288), (40, 72)]:
        split = {"multiprocessors": multiprocessors, "distribution": distribution}
        fused_case(tokens, fan_in, 152, bias=True, transposed=True, **split)
    for tokens, fan_in in [(3, 1288), (8, 60)]:
        fused_case(tokens, fan_in, 152, dtype=torch.float32, bias=True, transposed=True, **split)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 1000])
def test_fused_product_split_in_any_way(multiprocessors: int) -> None:
    """From all warps side by side to all behind each other, of more and of fewer half panels; in
    parts of the columns where blocks are fewer than multiprocessors.
    """
    for tokens, fan_in in [(3, 768), (3, 200), (20, 1288), (40, 768)]:
        fused_case(tokens, fan_in, 150, multiprocessors=multiprocessors, bias=True)
    for tokens, fan_in in [(3, 1288), (8, 260)]:
        fused_case(tokens, fan_in, 70, dtype=torch.float32, multiprocessors=multiprocessors)


@pytest.mark.parametrize("sixteen_bit", [True, False], ids=["16 bit", "float32"])
def test_parts_of_the_columns_are_whole_and_not_for_nothing(sixteen_bit: bool) -> None:
    """Every part has columns; outputs that fill the device keep one part."""
    parts = native()._linear_parts
    seen = set()
    for rows, cols in itertools.product((1, 16, 100, 512, 1024, 5000), (8, 256, 264, 4096, 11008)):
        for branches, processors in itertools.product((1, 2, 6), (1, 108, 132)):
            count = parts(rows, cols, 5, branches, sixteen_bit, processors)
            pieces = -(-cols // 256) * (2 if sixteen_bit else 1)
            assert 1 <= count <= 8
            assert -(-pieces // count) * (count - 1) < pieces
            seen.add(count)
            if processors == 1:
                assert count == 1
    assert parts(1024, 4096, 5, 2, sixteen_bit, 132) > 1
    assert len(seen) > 3


@pytest.mark.parametrize("sixteen_bit", [True, False], ids=["16 bit", "float32"])
def test_parts_of_the_rows_are_whole_and_not_for_nothing(sixteen_bit: bool) -> None:
    parts = native()._linear_transposed_parts
    seen = set()
    for rows, cols in itertools.product((8, 256, 264, 4096, 11008), (8, 100, 768, 3072, 50000)):
        for branches, processors in itertools.product((1, 2, 6), (1, 108, 132)):
            count = parts(rows, cols, 5, branches, sixteen_bit, processors)
            assert 1 <= count <= 8
            slices = -(-rows // 32)
            assert -(-slices // count) * (count - 1) < slices
            seen.add(count)
            if processors == 1:
                assert count == 1
    assert parts(3072, 768, 5, 2, sixteen_bit, 132) > 1
    assert len(seen) > 3


def test_the_product_refuses_parts_that_do_not_fit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w = rand(2, 3, 256, dtype=dtype), rand(16, 256, dtype=dtype)
        y = torch.empty(2, 3, 16, dtype=dtype)
        for parts in (3, 7):  # of one group, two half panels
            partial = torch.empty(parts, *y.shape)
            with pytest.raises(RuntimeError, match="a part without columns"):
                native()._linear(
                    *(y, x, w, None, seeds_of(1), table(2, 1), partial, None, None, None, False),
                    *(PID, 0, 0, 0, False, 4, 0),
                )
        w = rand(256, 16, dtype=dtype)
        for parts in (9, 7):  # of eight slices
            partial = torch.empty(parts, *y.shape)
            with pytest.raises(RuntimeError, match="a part without rows"):
                native()._linear_transposed(
                    *(y, x, w, None, seeds_of(1), table(2, 1), partial, PID, 0, 0, 0, False, 4, 0)
                )


@pytest.mark.parametrize(("branches", "terms"), [(1, 1), (2, 0), (3, 2), (5, 3), (4, 4)])
def test_fused_product_of_branches_and_terms(branches: int, terms: int) -> None:
    for shared, dtype in itertools.product((False, True), (torch.bfloat16, torch.float32)):
        fused_case(
            4, 264, 24, dtype=dtype, branches=branches, terms=terms, shared=shared, bias=shared
        )
    for shared, distribution, dtype in itertools.product(
        (False, True), noise.DISTRIBUTIONS, (torch.bfloat16, torch.float32)
    ):
        fused_case(
            *(4, 264, 24),
            dtype=dtype,
            branches=branches,
            terms=terms,
            shared=shared,
            bias=shared,
            distribution=distribution,
            transposed=True,
        )


def test_fused_and_tiled_products_share_their_weights() -> None:
    """A product with the identity is the displaced weight itself, bit for bit."""
    dtype = torch.bfloat16
    w = rand(40, 64, dtype=dtype)
    x = torch.eye(64, dtype=dtype).expand(2, 64, 64)
    for distribution in noise.DISTRIBUTIONS:
        rest = (seeds_of(2), table(2, 2), PID, 7, 256, distribution)
        turned = rand(64, 352, dtype=dtype)
        assert native().takes_fused(x.contiguous(), turned, 64, 256, True)
        displaced = native().displace(turned, *rest, "nearest", None)
        same(native().linear(x, turned, None, *rest, False, True), displaced)
        wide = turned.float()
        few = native().linear(x[:, 8:16].float(), wide, None, *rest, False, True)
        same(few, native().displace(wide, *rest, "nearest", None)[:, 8:16].contiguous())
    rest = (*rest[:-1], "gaussian")
    displaced = native().displace(w, *rest, "nearest", None).transpose(1, 2)
    same(native().linear(x, w, None, *rest, False, False), displaced.contiguous())
    big = x.repeat(1, 2, 1)
    assert big.shape[1] > FUSED_TOKENS
    tiled = native().linear(big, w, None, *rest, False, False)
    same(tiled[:, :64].contiguous(), displaced.contiguous())


def test_what_the_fused_product_leaves_to_tiles() -> None:
    ops, w = native(), rand(16, 64, dtype=torch.bfloat16)
    x = rand(2, 4, 64, dtype=torch.bfloat16)
    assert ops.takes_fused(x, w, 4, 0, False)
    wide = (x.float(), w.float())
    assert ops.takes_few(*wide, FEW_TOKENS, 0, False)
    assert not ops.takes_few(*wide, FEW_TOKENS + 1, 0, False)
    assert not ops.takes_few(x, w, 4, 0, False)
    assert ops.takes_few(wide[0][..., :16].contiguous(), wide[1], FEW_TOKENS, 256, True)
    assert not ops.takes_few(wide[0][..., :14].contiguous(), wide[1][:14], 4, 0, True)
    assert ops.takes_fused(x[..., :16].contiguous(), w, FUSED_TOKENS, 256, True)
    assert not ops.takes_few(*wide, 4, 4, False)
    assert not ops.takes_few(wide[0], w.float()[:, :62], 4, 0, False)
    for x_, w_, tokens, offset, transposed in [
        (x, w.float(), 4, 0, False),
        (x, w, FUSED_TOKENS + 1, 0, False),
        (x, w, 0, 0, False),
        (x, w, 4, 255, False),
        (x, w[:, :60], 4, 0, False),
        (x, w.t().contiguous().t(), 4, 0, False),
        (x, rand(16, 65, dtype=torch.bfloat16)[:, :64], 4, 0, False),
        (x, rand(16 * 64 + 1, dtype=torch.bfloat16)[1:].view(16, 64), 4, 0, False),
        (rand(513, dtype=torch.bfloat16)[1:].view(2, 4, 64), w, 4, 0, False),
        (rand(516, dtype=torch.bfloat16)[4:].view(2, 4, 64), w, 4, 0, False),
    ]:
        assert not ops.takes_fused(x_, w_, tokens, offset, transposed)
    turned, x = rand(64, 16, dtype=torch.bfloat16), rand(2, 4, 64, dtype=torch.bfloat16)
    for x_, w_, tokens, offset in [
        (x, turned.float(), 4, 0),
        (x, turned, FUSED_TOKENS + 1, 0),
        (x, turned, 4, 8),
        (x[..., :60].contiguous(), turned[:60], 4, 0),
        (x, turned[:, :12], 4, 0),
        (x, turned.t().contiguous().t(), 4, 0),
        (x, rand(64, 17, dtype=torch.bfloat16)[:, :16], 4, 0),
        (rand(516, dtype=torch.bfloat16)[4:].view(2, 4, 64), turned, 4, 0),
    ]:
        assert not ops.takes_fused(x_, w_, tokens, offset, True)
    rest = (seeds_of(1), table(2, 1), PID, 0, 255, "gaussian", False)
    with pytest.raises(RuntimeError, match="does not take"):
        ops._fused(x, w, None, *rest, False, None)
    with pytest.raises(RuntimeError, match="does not take"):
        ops._fused(x, turned, None, *rest, True, None)
    rest = (*rest[:4], 0, *rest[5:])
    with pytest.raises(RuntimeError, match="does not take"):
        ops._fused(x[..., :60].contiguous(), turned[:60], None, *rest, True, None)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_update_fused_into_the_next_product(
    dtype: torch.dtype, rounding: str, distribution: str
) -> None:
    """The same weights and the same products as the update and the product one after the other."""
    ops = native()
    for tokens, fan_in, fan_out, branches, terms in [
        (3, 520, 40, 2, 1),
        (1, 256, 17, 1, 3),
        (40, 72, 16, 2, 2),
        (3, 64, 20, 3, 1),  # two pairs of branches: not in one pass
        (FUSED_TOKENS + 2, 64, 20, 2, 1),
    ]:
        w, x = rand(fan_out, fan_in, dtype=dtype), rand(branches, tokens, fan_in, dtype=dtype)
        rest = (seeds_of(2), table(branches, 2), PID, 5, 256, distribution)
        seeds = seeds_of(terms + 4)[4:]
        c = table(1, terms)[0]
        for decay in (None, 1 - 0.1 * torch.arange(1.0, terms + 1)):
            apart, at_once = w.clone(), w.clone()
            tail = ([PID], [5], [256], distribution, rounding)
            ops.update_([apart], seeds, c, decay, None, *tail)
            want = ops.linear(x, apart, None, *rest, False, False)
            version = at_once._version
            got = ops.update_linear_(
                *(x, at_once, None, rest[0], rest[1], seeds, c, decay, rounding),
                *rest[2:],
                False,
            )
            same(at_once, apart)
            same(got, want)
            assert at_once._version > version


def fused_digest(dtype: torch.dtype) -> bytes:
    """What the fused product and the fused update give, as a digest."""
    w, x = rand(50, 520, dtype=dtype), rand(2, 9, 520, dtype=dtype)
    rest = (seeds_of(1), table(2, 1))
    y = native().update_linear_(
        x,
        w,
        None,
        *rest,
        *(seeds_of(2), table(1, 2)[0], None, "stochastic"),
        PID,
        0,
        0,
        "gaussian",
        False,
    )
    turned = []
    for distribution in noise.DISTRIBUTIONS:
        stored = rand(520, 328, dtype=dtype, seed=7)
        turned.append(native().linear(x, stored, None, *rest, PID, 0, 0, distribution, False, True))
    parts = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (w, y, *turned)]
    return hashlib.sha256(b"".join(parts)).digest()


# --- choosing the backend -------------------------------------------------------------------------


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, _registry.Backend]]:
    """A registry with all three GPU backends on, each with a kernel that gives its name."""
    fakes = {
        name: _registry.Backend(name, ("cuda",), {"linear": lambda name=name: name})
        for name in ("triton", "cuda")
    }
    fakes["reference"] = _registry.Backend("reference", ("*",), {"linear": lambda: "reference"})
    monkeypatch.setattr(_registry, "_backends", fakes)
    monkeypatch.setattr(_registry, "_forced", None)
    monkeypatch.setattr(_registry, "_table", {})
    yield fakes


def test_cuda_serves_where_triton_does_not(
    serving: dict[str, _registry.Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(_registry._KNOWN)
    assert names.index("triton") < names.index("cuda") < names.index("reference")
    assert _registry.serving("linear", "cuda") == "triton"
    monkeypatch.setitem(_registry._FASTER, "linear", "cuda")
    assert _registry.serving("linear", "cuda") == "cuda"
    monkeypatch.delitem(_registry._FASTER, "linear")
    with _registry.use_backend("cuda"):
        assert _registry.serving("linear", "cuda") == "cuda"
    serving["triton"].reason = "not installed"
    assert _registry.serving("linear", "cuda") == "cuda"
    serving["cuda"].reason = "not built"
    assert _registry.serving("linear", "cuda") == "reference"


def test_the_backend_says_why_it_is_off() -> None:
    reason = _registry.backends()["cuda"].reason
    if torch.version.cuda is None:
        assert reason is not None
        assert "built without CUDA" in reason
    elif not torch.cuda.is_available():
        assert reason is not None
        assert "no CUDA device" in reason
    elif reason is not None:
        assert "_zokernels_cuda.so" in reason


def test_the_plan_of_a_product_is_the_backends(
    serving: dict[str, _registry.Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving["triton"].reason = "not installed"
    fused = plan_linear(512, 264, tokens=64, branches=4, dtype=torch.bfloat16, device="cuda")
    assert (fused.kind, fused.scratch_bytes, fused.noise) == ("fused", 0, 2 * 512 * 264)
    few = plan_linear(512, 260, tokens=8, dtype=torch.float32, device="cuda")
    assert (few.kind, few.scratch_bytes, few.noise) == ("fused", 0, 512 * 260)
    turned = plan_linear(264, 512, tokens=64, dtype=torch.bfloat16, device="cuda", transposed=True)
    assert (turned.kind, turned.scratch_bytes, turned.noise) == ("fused", 0, 512 * 264)
    odd = plan_linear(260, 512, tokens=1, dtype=torch.bfloat16, device="cuda", transposed=True)
    assert odd.kind == "tiles"
    for change in (
        {"tokens": 65},
        {"tokens": 9, "dtype": torch.float32},
        {"tokens": 65, "transposed": True},
        {"tokens": 9, "dtype": torch.float32, "transposed": True},
    ):
        given = {"tokens": 64, "dtype": torch.bfloat16, "device": "cuda", **change}
        assert plan_linear(512, 264, **given).kind == "tiles"
    # As many outputs as 16 MiB hold, and no more scratch than that.
    wide = plan_linear(40000, 4096, tokens=100, dtype=torch.bfloat16, device="cuda")
    assert wide.scratch_bytes == 16 << 20
    assert wide.tiles == -(-40000 // wide.tile_outputs)
