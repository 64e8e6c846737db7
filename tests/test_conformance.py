"""Every usable backend against the noise contract and float64, op by op.

Rademacher signs, rounding bits and everything computed from them must equal the reference bit for
bit. Normals may differ from the formula by 2e-6, so what is built on them is bounded by
``2e-6 * sum |coefficient|`` before rounding. Products may lose twice what torch loses at that
dtype.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zokernels import _registry, noise, reference

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = [n for n, b in _registry.backends().items() if b.reason is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISE_ATOL = 2e-6
PID = 0xFEDCBA98
# Rows, columns: empty, single, below and above one group of 256, whole and cut panels of 2048.
SHAPES = [
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 300),
    (7, 1),
    (4, 64),
    (3, 129),
    (2, 256),
    (2, 511),
    (1, 2313),
]
# Row and column offsets: none, inside a group, across panels, at the end of the row space.
OFFSETS = [(0, 0), (3, 17), (1, 2047), (2**32 - 8, 256), (0, 2**34 - 4096)]
SEEDS = [0, 1, -1, -(2**63), 2**63 - 1]


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def device(name: str) -> torch.device:
    served = _registry.backends()[name].devices
    return torch.device("cpu" if "cpu" in served or "*" in served else served[0])


def whole(t: Tensor) -> Tensor:
    """All the memory that a tensor is a view of."""
    return t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def run(name: str, op: str, *args: object) -> Tensor:
    """Call one backend's op on its device, on memory laid out as here.

    All of it comes back to the CPU, what lies around the tensors included.
    """
    dev = device(name)
    memory: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def move(a: object) -> object:
        if isinstance(a, list):
            return [move(t) for t in a]
        if not isinstance(a, Tensor) or dev.type == "cpu":
            return a
        key = (a.untyped_storage().data_ptr(), a.dtype)
        if key not in memory:
            memory[key] = (whole(a), whole(a).to(dev))
        return memory[key][1].as_strided(a.shape, a.stride(), a.storage_offset())

    out = _registry.kernel(name, op)(*[move(a) for a in args])
    if dev.type == "cuda" and name in ("triton", "cuda"):
        # A kernel's index errors come when the device is waited for.
        module = {"triton": "zokernels.triton.backend", "cuda": "zokernels.cuda"}[name]
        importlib.import_module(module).synchronize(dev)
    for here, there in memory.values():
        here.copy_(there)
    return out.cpu() if isinstance(out, Tensor) else out  # type: ignore[return-value]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeds_of(count: int) -> Tensor:
    return torch.tensor([SEEDS[i % len(SEEDS)] + i // len(SEEDS) for i in range(count)]).long()


def table(branches: int, terms: int, scale: float = 0.1) -> Tensor:
    return rand(branches, terms, seed=3) * scale


def same(a: Tensor, b: Tensor) -> None:
    """Equal bits, any NaN counting as the same."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of ``dtype`` at |x|."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double().abs().clamp(min=info.tiny))[1].double() - 1
    return info.eps * 2.0**exponent


def close_to_rounding(got: Tensor, exact: Tensor, slack: float) -> None:
    """Within half a unit of the last place, and ``slack`` from the noise and float32 sums."""
    bound = 0.5 * ulp(exact, got.dtype) + slack + 4 * exact.abs() * 2.0**-24
    assert bool(((got.double() - exact).abs() <= bound).all())


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_sample(name: str, distribution: str, offset: tuple[int, int]) -> None:
    for i, (rows, cols) in enumerate(SHAPES):
        seed = torch.tensor(SEEDS[i % len(SEEDS)])
        got = run(name, "sample", rows, cols, seed, PID, *offset, distribution)
        want = noise.direction(rows, cols, seed, PID, *offset, distribution)
        if distribution == "rademacher":
            same(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=NOISE_ATOL)


def test_sample_is_the_same_from_any_tile(name: str) -> None:
    seed = torch.tensor(-5)
    for distribution in noise.DISTRIBUTIONS:
        whole = run(name, "sample", 9, 700, seed, PID, 0, 0, distribution)
        for r, c, rows, cols in [(0, 0, 1, 700), (2, 1, 3, 255), (8, 300, 1, 400), (3, 699, 6, 1)]:
            part = run(name, "sample", rows, cols, seed, PID, r, c, distribution)
            same(part, whole[r : r + rows, c : c + cols].contiguous())


def test_normals_are_bounded_normals(name: str) -> None:
    """The bound on |z| is strict, and mean and variance are those of a normal."""
    z = run(name, "sample", 4, 1 << 16, torch.tensor(3), PID, 0, 0, "gaussian").double()
    assert float(z.abs().max()) <= noise.GAUSSIAN_BOUND
    assert abs(float(z.mean())) < 0.01
    assert abs(float(z.var()) - 1) < 0.01


# --- displace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_displace_rademacher_is_exact(
    name: str, dtype: torch.dtype, out: torch.dtype, rounding: str
) -> None:
    for i, (rows, cols) in enumerate(SHAPES):
        branches, terms = [(1, 1), (2, 1), (5, 3), (2, 0), (3, 2)][i % 5]
        offset = OFFSETS[i % len(OFFSETS)]
        w = rand(rows, cols, dtype=dtype)
        rest = (seeds_of(terms), table(branches, terms), PID, *offset, "rademacher", rounding, out)
        same(run(name, "displace", w, *rest), reference.displace(w, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_displace_gaussian(name: str, dtype: torch.dtype) -> None:
    for i, (rows, cols) in enumerate(SHAPES):
        branches, terms = [(1, 1), (2, 1), (5, 3), (2, 0), (3, 2)][i % 5]
        offset = OFFSETS[i % len(OFFSETS)]
        w, seeds, c = rand(rows, cols, dtype=dtype), seeds_of(terms), table(branches, terms)
        exact = w.double().expand(branches, rows, cols).clone()
        for k in range(terms):
            z = noise.gaussian(rows, cols, seeds[k], PID, *offset).double()
            exact += c[:, k, None, None].double() * z
        got = run(name, "displace", w, seeds, c, PID, *offset, "gaussian", "nearest", None)
        slack = NOISE_ATOL * float(c.abs().sum(1).max()) + terms * 4e-7 if terms else 0.0
        close_to_rounding(got, exact, slack)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_displace_reads_any_strides(name: str, distribution: str) -> None:
    big = rand(40, 1400)
    seeds, c = seeds_of(2), table(2, 2)
    for w in (
        big.t()[:700, :20],
        big[:, ::2],
        big[3:9, 5:600],
        big[::3, 1::3],
        big[:1].expand(3, 1400),
        big[:, :1].expand(40, 5),
    ):
        rest = (seeds, c, PID, 1, 300, distribution, "nearest", None)
        same(run(name, "displace", w, *rest), run(name, "displace", w.contiguous(), *rest))


def test_displace_into_scratch(name: str) -> None:
    w, seeds, c = rand(6, 300), seeds_of(1), table(2, 1)
    want = run(name, "displace", w, seeds, c, PID, 0, 0, "gaussian", "nearest", torch.bfloat16)
    frame = torch.full((2, 8, 640), 7.0, dtype=torch.bfloat16)
    for out in (frame[:, 1:7, :300], frame[:, 1:7, ::2][..., :300], torch.empty_like(want)):
        before = frame.clone()
        rest = (seeds, c, PID, 0, 0, "gaussian", "nearest")
        run(name, "displace_", out, w, *rest)
        same(out.contiguous(), want)
        out.fill_(7.0)
        same(frame, before)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_displaced_vectors_are_those_of_displace(
    name: str, dtype: torch.dtype, distribution: str
) -> None:
    """Odd lengths, none, strided, several terms: what ``displace`` gives in float32, in order."""
    vectors = [rand(n, dtype=dtype) for n in (5, 0, 300, 1)] + [rand(40, 9, dtype=dtype)[:, 4]]
    ids = [PID, 7, 1, 0, 2**32 - 1]
    for terms in (0, 1, 3):
        seeds, c = seeds_of(terms), table(2, terms)
        flat = run(name, "displace_vectors", vectors, seeds, c, ids, distribution)
        assert flat.dtype == torch.float32
        parts = flat.split([2 * v.numel() for v in vectors])
        for v, i, part in zip(vectors, ids, parts, strict=True):
            rest = (seeds, c, i, 0, 0, distribution, "nearest", torch.float32)
            same(part.view(2, v.numel()), run(name, "displace", v[None], *rest)[:, 0])


def test_non_finite_weights_stay_non_finite(name: str) -> None:
    special = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, 1e-40, 1e-7]
    )
    for dtype in DTYPES:
        w = special.repeat(40)[None].to(dtype)
        for rounding in noise.ROUNDINGS:
            for out in DTYPES:
                rest = (seeds_of(1), table(2, 1), PID, 0, 0, "rademacher", rounding, out)
                got, want = run(name, "displace", w, *rest), reference.displace(w, *rest)
                same(got, want)
                assert bool(got[:, :, ::8].isnan().all())
            mine, wanted = w.clone(), w.clone()
            args = (seeds_of(2), table(1, 2)[0], None, None, [PID], [], [], "rademacher", rounding)
            run(name, "update_", [mine], *args)
            reference.update_([wanted], *args)
            same(mine, wanted)


# --- update ---------------------------------------------------------------------------------------


def update_case(dtype: torch.dtype) -> tuple[list[Tensor], list[int], list[int], list[int]]:
    shapes = [(), (1,), (13,), (700,), (3, 600), (9, 8), (2, 3, 70), (0, 4), (4, 0), (2, 2, 2, 3)]
    params = [rand(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    n = len(params)
    return (
        params,
        [PID + i for i in range(n)],
        [i % 3 for i in range(n)],
        [i * 100 for i in range(n)],
    )


@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_rademacher_is_exact(name: str, dtype: torch.dtype, rounding: str) -> None:
    decay = torch.tensor([1.0, 0.99, 0.5])
    for d, ends in [(None, None), (decay, torch.tensor([False, True, True])), (decay, None)]:
        params, ids, r0, c0 = update_case(dtype)
        wanted = [p.clone() for p in params]
        for offsets in ((r0, c0), ([], [])):
            args = (seeds_of(3), table(1, 3)[0], d, ends, ids, *offsets, "rademacher", rounding)
            run(name, "update_", params, *args)
            reference.update_(wanted, *args)
            for p, w in zip(params, wanted, strict=True):
                same(p, w)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_of_many_seeds_is_the_separate_updates(
    name: str, dtype: torch.dtype, rounding: str, distribution: str
) -> None:
    params, ids, r0, c0 = update_case(dtype)
    apart = [p.clone() for p in params]
    seeds, c, decay = seeds_of(7), table(1, 7)[0] * 1e-2, 1 - 1e-3 * torch.arange(7.0)
    tail = (ids, r0, c0, distribution, rounding)
    run(name, "update_", params, seeds, c, decay, None, *tail)
    for k in range(7):
        one = slice(k, k + 1)
        run(name, "update_", apart, seeds[one], c[one], decay[one], None, *tail)
    for p, q in zip(params, apart, strict=True):
        same(p, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_gaussian(name: str, dtype: torch.dtype) -> None:
    params, ids, r0, c0 = update_case(dtype)
    before = [p.clone() for p in params]
    seeds, c = seeds_of(2), table(1, 2)[0]
    ends = torch.tensor([False, True])
    run(name, "update_", params, seeds, c, None, ends, ids, r0, c0, "gaussian", "nearest")
    for i, (now, w) in enumerate(zip(params, before, strict=True)):
        exact = w.double()
        for k in range(2):
            z = noise.gaussian(*noise.matrix_shape(w.shape), seeds[k], ids[i], r0[i], c0[i])
            exact = exact + c[k].double() * z.double().view(w.shape)
        close_to_rounding(now, exact, NOISE_ATOL * float(c.abs().sum()) + 8e-7)


def test_update_of_no_terms_changes_nothing(name: str) -> None:
    params, ids, _, _ = update_case(torch.bfloat16)
    before = [p.clone() for p in params]
    none = (torch.zeros(0).long(), torch.zeros(0), None, None)
    run(name, "update_", params, *none, ids, [], [], "gaussian", "stochastic")
    for p, b in zip(params, before, strict=True):
        same(p, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_leaves_out_idle_terms(name: str, dtype: torch.dtype) -> None:
    """Coefficient 0 and decay 1, as of a step that was skipped on the device: -0 stays -0."""
    w = torch.full((3, 600), -0.0, dtype=dtype)
    w[:, ::3] = rand(3, 200, dtype=dtype)
    seeds, zero, one = seeds_of(2), torch.zeros(2), torch.ones(2)
    for decay, rounding in ((None, "nearest"), (one, "stochastic")):
        got = w.clone()
        run(name, "update_", [got], seeds, zero, decay, None, [PID], [], [], "gaussian", rounding)
        assert torch.equal(got.view(torch.uint8), w.view(torch.uint8))
    moved, apart = w.clone(), w.clone()
    c = torch.tensor([0.1, 0.0])
    place = ([PID], [], [], "gaussian", "stochastic")
    run(name, "update_", [moved], seeds, c, one, torch.tensor([False, True]), *place)
    run(name, "update_", [apart], seeds[:1], c[:1], None, None, *place)
    near = (moved.double() - apart.double()).abs() <= ulp(apart, dtype)
    assert bool(near.all())  # rounded by the second term's bits, not the first's


def test_update_of_any_layout(name: str) -> None:
    """A parameter is its shape, not its memory: strided, transposed, channels-last, in a frame."""
    for distribution in noise.DISTRIBUTIONS:
        frame = rand(12, 24, 18)
        layouts = {
            "transposed": frame[0].t(),
            "strided columns": frame[1][:, ::2],
            "permuted": frame.permute(2, 0, 1),
            "inner frame": frame[2:5, 3:20, 4:11],
            "channels last": rand(4, 5, 6, 7).contiguous(memory_format=torch.channels_last),
            "strided vector": frame[3][:, 5],
            "one column": frame[4][:, 5:6],
        }
        for what, p in layouts.items():
            dense = p.contiguous().clone()
            args = (seeds_of(2), table(1, 2)[0], None, None, [PID], [2], [200], distribution)
            run(name, "update_", [dense], *args, "nearest")
            outside = frame.clone()
            run(name, "update_", [p], *args, "nearest")
            assert torch.equal(p, dense), what
            if what == "inner frame":
                outside[2:5, 3:20, 4:11] = p
                same(frame, outside)


def test_update_says_that_it_wrote(name: str) -> None:
    p = rand(3, 4)
    version = p._version
    args = (seeds_of(1), table(1, 1)[0], None, None, [PID], [], [], "gaussian", "nearest")
    run(name, "update_", [p], *args)
    assert p._version > version


# --- project --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project(name: str, dtype: torch.dtype, distribution: str) -> None:
    params, ids, r0, c0 = update_case(dtype)
    params.append(rand(30, 20, dtype=dtype).t())
    ids, r0, c0 = [*ids, 5], [*r0, 1], [*c0, 70]
    seeds = seeds_of(4)
    got = run(name, "project", params, seeds, ids, r0, c0, distribution)
    want = torch.zeros(4, dtype=torch.float64)
    size = torch.zeros(4, dtype=torch.float64)
    for i, v in enumerate(params):
        for k in range(4):
            shape = noise.matrix_shape(v.shape)
            z = noise.direction(*shape, seeds[k], ids[i], r0[i], c0[i], distribution).double()
            want[k] += (v.double().reshape(shape) * z).sum()
            size[k] += v.double().abs().sum()
    assert got.dtype == torch.float32
    slack = 0.0 if distribution == "rademacher" else NOISE_ATOL
    assert bool(((got.double() - want).abs() <= slack * size + want.abs() * 2.0**-23).all())


def test_project_of_nothing(name: str) -> None:
    none = run(name, "project", [rand(3, 4)], torch.zeros(0).long(), [1], [], [], "gaussian")
    assert none.shape == (0,)
    empty = run(name, "project", [torch.zeros(0, 4)], seeds_of(2), [1], [], [], "gaussian")
    same(empty, torch.zeros(2))


# --- products -------------------------------------------------------------------------------------


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if exact.numel() else 0.0


def lost_by_torch(x: Tensor, w: Tensor, exact: Tensor, bias: Tensor | None) -> float:
    """What one rounding of the displaced weights and torch's own product lose."""
    if not exact.numel():
        return 0.0
    y = torch.stack([F.linear(a, b) for a, b in zip(x, w, strict=True)])
    if bias is not None:
        lift = bias.view(bias.shape[0], *[1] * (y.dim() - 2), bias.shape[1])
        y = (y + lift).to(y.dtype)
    # One unit in the last place at the scale of the result: the least any of them can be held to.
    return max(error(y, exact), torch.finfo(w.dtype).eps * float(exact.abs().max()))


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(name: str, dtype: torch.dtype, transposed: bool, distribution: str) -> None:
    cases = [
        # branches, terms, tokens, in, out, shared, bias
        (2, 1, (3, 5), 300, 70, False, True),
        (1, 1, (1,), 64, 1, False, False),
        (5, 2, (2,), 33, 17, True, True),
        (2, 3, (), 520, 40, False, False),
        (2, 1, (4,), 1, 130, True, True),
        (2, 0, (3,), 31, 5, False, True),
        (2, 1, (0,), 16, 8, False, True),
        (3, 1, (70,), 40, 600, False, True),
    ]
    for branches, terms, tokens, fan_in, fan_out, shared, with_bias in cases:
        w = rand(fan_out, fan_in, dtype=dtype) * 0.3
        w = w.t() if transposed else w
        for stored in (w, w.contiguous()):
            x = rand(*(() if shared else (branches,)), *tokens, fan_in, dtype=dtype, seed=2)
            bias = rand(branches, fan_out, dtype=dtype, seed=4) if with_bias else None
            seeds, c = seeds_of(terms), table(branches, terms)
            rest = (seeds, c, PID, 2, 300, distribution)
            got = run(name, "linear", x, stored, bias, *rest, shared, transposed)
            assert got.dtype == dtype
            assert got.shape == (branches, *tokens, fan_out)
            shape = stored.shape
            exact_w = stored.double().expand(branches, *shape).clone()
            for k in range(terms):
                z = noise.direction(*shape, seeds[k], PID, 2, 300, distribution).double()
                exact_w += c[:, k, None, None].double() * z
            if transposed:
                exact_w = exact_w.transpose(1, 2)
            xs = x.expand(branches, *x.shape) if shared else x
            lift = 0.0
            if bias is not None:
                lift = bias.double().view(branches, *[1] * len(tokens), fan_out)
            exact = torch.stack([F.linear(a.double(), b) for a, b in zip(xs, exact_w, strict=True)])
            exact = exact + lift
            lost = lost_by_torch(xs, exact_w.to(dtype), exact, bias)
            noise_part = (
                NOISE_ATOL * float(c.abs().sum()) * float(x.double().abs().sum(-1).max())
                if x.numel()
                else 0.0
            )
            assert error(got, exact) <= 2 * lost + noise_part


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_whole_groups(
    name: str, dtype: torch.dtype, transposed: bool, distribution: str
) -> None:
    """Aligned weights at the start of a group of columns: what fused products on a GPU take."""
    for branches, terms, tokens, fan_in, fan_out in [(2, 1, 5, 264, 40), (3, 2, 17, 72, 296)]:
        w = rand(*((fan_in, fan_out) if transposed else (fan_out, fan_in)), dtype=dtype) * 0.3
        x = rand(branches, tokens, fan_in, dtype=dtype, seed=2)
        bias, seeds, c = rand(branches, fan_out, seed=4), seeds_of(terms), table(branches, terms)
        rest = (seeds, c, PID, 3, 256, distribution)
        got = run(name, "linear", x, w, bias, *rest, False, transposed)
        weights = w.double().expand(branches, *w.shape).clone()
        for k in range(terms):
            z = noise.direction(*w.shape, seeds[k], PID, 3, 256, distribution).double()
            weights += c[:, k, None, None].double() * z
        weights = weights.mT if transposed else weights
        exact = torch.bmm(x.double(), weights.mT) + bias.double()[:, None]
        lost = lost_by_torch(x, weights.to(dtype), exact, bias)
        noise_part = NOISE_ATOL * float(c.abs().sum()) * float(x.double().abs().sum(-1).max())
        assert got.dtype == dtype
        assert error(got, exact) <= 2 * lost + noise_part


def test_linear_of_strided_activations(name: str) -> None:
    w, seeds, c = rand(20, 24), seeds_of(1), table(2, 1)
    x = rand(6, 24, 2).permute(2, 0, 1)
    rest = (w, None, seeds, c, PID, 0, 0, "gaussian", False, False)
    same(run(name, "linear", x, *rest), run(name, "linear", x.contiguous(), *rest))


def test_seeds_and_coefficients_of_any_stride(name: str) -> None:
    seeds, c = seeds_of(4)[::2], table(4, 2).t()[:, ::2]
    assert not seeds.is_contiguous() and not c.is_contiguous()
    w, x, rest = rand(20, 24), rand(2, 3, 24), (PID, 0, 0, "gaussian")
    targets = torch.tensor([0, 5, 19])
    for op, before, after in [
        ("linear", (x, w, None), (False, False)),
        ("displace", (w,), ("nearest", None)),
        ("embedding", (targets, w), (True,)),
        ("linear_cross_entropy", (x, w, None, targets), (False, -100)),
    ]:
        got = run(name, op, *before, seeds, c, *rest, *after)
        same(got, run(name, op, *before, seeds.clone(), c.contiguous(), *rest, *after))
    apart = w.clone()
    place = ([PID], [], [], "gaussian", "nearest")
    run(name, "update_", [w], seeds, c[0], c[1], None, *place)
    run(name, "update_", [apart], seeds.clone(), c[0].clone(), c[1].clone(), None, *place)
    same(w, apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_a_float32_bias(name: str, dtype: torch.dtype) -> None:
    """Small vectors are displaced in float32; the result keeps the dtype of the weights."""
    w, x, bias = rand(20, 24, dtype=dtype), rand(2, 3, 24, dtype=dtype), rand(2, 20)
    rest = (seeds_of(1), table(2, 1), PID, 0, 0, "rademacher", False, False)
    got = run(name, "linear", x, w, bias, *rest)
    exact = run(name, "linear", x, w, None, *rest).double() + bias[:, None].double()
    assert got.dtype == dtype
    assert error(got, exact) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_linear_is_its_update_and_its_product(
    name: str, dtype: torch.dtype, distribution: str
) -> None:
    for (rows, cols), tokens, branches, terms, shared, rounding in [
        ((20, 264), 5, 2, 1, False, "stochastic"),
        ((33, 520), 3, 1, 2, False, "nearest"),
        ((17, 40), 1, 2, 1, True, "stochastic"),
        ((9, 21), 2, 3, 1, False, "stochastic"),
        ((16, 256), 70, 2, 1, False, "stochastic"),
    ]:
        x = rand(*(() if shared else (branches,)), tokens, cols, dtype=dtype)
        bias = rand(branches, rows, seed=4)
        probe = (seeds_of(1), table(branches, 1))
        last = (seeds_of(terms) + 7, rand(terms) * 0.1, 1 - rand(terms, seed=8).abs() * 0.1)
        place = (PID, 3, 256)
        at_once, apart = rand(rows, cols, dtype=dtype), rand(rows, cols, dtype=dtype)
        where = ([PID], [3], [256], distribution, rounding)
        run(name, "update_", [apart], *last, None, *where)
        want = run(name, "linear", x, apart, bias, *probe, *place, distribution, shared, False)
        got = run(
            *(name, "update_linear_", x, at_once, bias, *probe, *last, rounding),
            *(*place, distribution, shared),
        )
        same(at_once, apart)
        same(got, want)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_rows_of_the_displaced_table(
    name: str, dtype: torch.dtype, distribution: str
) -> None:
    w, seeds, c = rand(11, 300, dtype=dtype), seeds_of(2), table(3, 2)
    rest = (seeds, c, PID, 4, 90, distribution)
    rows = run(name, "displace", w, *rest, "nearest", None)
    shared = torch.tensor([[0, 10, 3], [3, 3, 0]])
    same(run(name, "embedding", shared, w, *rest, True), rows[:, shared])
    own = torch.tensor([[0, 10, 3], [0, 1, 3], [0, 2, 3]], dtype=torch.int32)
    got = run(name, "embedding", own, w, *rest, False)
    same(got, torch.stack([rows[g][own[g].long()] for g in range(3)]))
    assert run(name, "embedding", shared[:, :0], w, *rest, True).shape == (3, 2, 0, 300)
    assert run(name, "embedding", torch.tensor(7), w, *rest, True).shape == (3, 300)
    same(
        run(name, "embedding", shared.t(), w.t().contiguous().t(), *rest, True), rows[:, shared.t()]
    )


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_embedding_refuses_an_id_outside(name: str, bad: int) -> None:
    ids = torch.tensor([0, bad, 3])
    rest = (rand(11, 8), seeds_of(1), table(2, 1), PID, 0, 0, "gaussian", True)
    with pytest.raises(IndexError, match=r"\[0, 11\)"):
        run(name, "embedding", ids, *rest)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(name: str, dtype: torch.dtype, distribution: str) -> None:
    for branches, tokens, hidden, vocab, shared, with_bias in [
        (2, 5, 70, 1300, False, True),
        (1, 1, 33, 3, False, False),
        (3, 9, 16, 700, True, True),
    ]:
        w = rand(vocab, hidden, dtype=dtype)
        x = rand(*(() if shared else (branches,)), tokens, hidden, dtype=dtype, seed=2)
        bias = rand(branches, vocab, dtype=dtype, seed=4) if with_bias else None
        targets = (torch.arange(tokens) * 7) % vocab
        targets[-1:] = vocab - 1
        if tokens > 2:
            targets[1] = -100
        seeds, c = seeds_of(1), table(branches, 1, 0.01)
        got = run(
            name,
            "linear_cross_entropy",
            *(x, w, bias, targets, seeds, c, PID, 0, 0, distribution, shared, -100),
        )
        assert got.dtype == torch.float32
        z = noise.direction(vocab, hidden, seeds[0], PID, 0, 0, distribution).double()
        xs = x.expand(branches, *x.shape) if shared else x
        for g in range(branches):
            weights = w.double() + c[g, 0].double() * z
            extra = None if bias is None else bias[g].double()
            exact = F.cross_entropy(F.linear(xs[g].double(), weights, extra), targets)
            low = F.linear(xs[g], weights.to(dtype))
            if bias is not None:
                low = low + bias[g]
            torch_loses = abs(float(F.cross_entropy(low.float(), targets).double() - exact))
            floor = torch.finfo(dtype).eps * float(low.abs().max())
            assert abs(float(got[g].double() - exact)) <= 2 * max(torch_loses, floor)


def test_linear_cross_entropy_ignores_and_refuses(name: str) -> None:
    x, w = rand(2, 3, 8), rand(12, 8)
    rest = (seeds_of(1), table(2, 1), PID, 0, 0, "gaussian", False)
    none = torch.full((3,), -100)
    loss = run(name, "linear_cross_entropy", x, w, None, none, *rest, -100)
    assert bool(loss.isnan().all())  # a mean over no token, as in torch
    some = run(name, "linear_cross_entropy", x, w, None, torch.tensor([1, 5, 5]), *rest, 5)
    one = run(name, "linear_cross_entropy", x[:, :1], w, None, torch.tensor([1]), *rest, 5)
    torch.testing.assert_close(some, one, rtol=1e-6, atol=0)
    for bad in (-1, 12):
        with pytest.raises(IndexError, match=r"\[0, 12\)"):
            run(name, "linear_cross_entropy", x, w, None, torch.tensor([0, bad, 1]), *rest, -100)


def test_linear_cross_entropy_of_huge_and_nan_logits(name: str) -> None:
    w = rand(40, 8)
    x = torch.stack([rand(2, 8) * 1e4, rand(2, 8)])
    x[1, 1, 0] = float("nan")
    rest = (seeds_of(1), torch.zeros(2, 1), PID, 0, 0, "gaussian", False, -100)
    loss = run(name, "linear_cross_entropy", x, w, None, torch.tensor([3, 7]), *rest)
    want = F.cross_entropy(F.linear(x[0].double(), w.double()), torch.tensor([3, 7]))
    torch.testing.assert_close(loss[0].double(), want, rtol=1e-5, atol=0)
    assert bool(loss[1].isnan())
