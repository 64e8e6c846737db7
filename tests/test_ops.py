"""Every op on every usable backend: schema, fake implementation, value, offsets, layouts.

Values are compared with the formula in float64, from the noise of :mod:`zokernels.noise`.
Rademacher noise and integers are equal on every backend, so there the comparison is exact; normals
may differ by 2e-6 absolute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from zokernels import _ops, _registry, noise

ops = torch.ops.zokernels

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PID = 0x9ABCDEF0
NOISE_ATOL = 2e-6


def seeds_of(*values: int) -> Tensor:
    return torch.tensor([noise.signed_seed(v) for v in values], dtype=torch.int64)


SEEDS = seeds_of(7, 2**64 - 3)
TABLE = torch.tensor([[0.02, -0.5], [-0.02, 0.25], [0.0, 0.0]])


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def exact(
    w: Tensor,
    seeds: Tensor = SEEDS,
    table: Tensor = TABLE,
    pid: int = PID,
    r0: int = 0,
    c0: int = 0,
    distribution: str = "gaussian",
) -> Tensor:
    """``W + sum_k C[g, k] z_k`` in float64, ``[G, rows, cols]``."""
    out = w.double().expand(table.shape[0], *w.shape).clone()
    for k in range(seeds.numel()):
        z = noise.direction(*w.shape, seeds[k], pid, r0, c0, distribution).double()
        out += table[:, k, None, None].double() * z
    return out


def by_fma(w: Tensor, seeds: Tensor, row: Tensor, pid: int, distribution: str) -> Tensor:
    """The same for one row of coefficients, with the contract's float32 fused multiply-adds."""
    acc = w.float()
    for k in range(seeds.numel()):
        z = noise.direction(*noise.matrix_shape(w.shape), seeds[k], pid, distribution=distribution)
        acc = (row[k].double() * z.view(w.shape).double() + acc.double()).float()
    return acc


def masked(w: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """Indices, and a shadow of which every second value counts."""
    generator = torch.Generator().manual_seed(7)
    indices = torch.randperm(w.numel(), generator=generator)[:count].sort().values
    shadow = w.reshape(-1)[indices].float()
    shadow[::2] += 1
    return indices, shadow


# --- schema, fake, registration -------------------------------------------------------------------


def cases() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every op, over the branches of its signature."""
    w, wb = rand(6, 40), rand(6, 40, dtype=torch.bfloat16)
    x, xb = rand(3, 2, 4, 40), rand(2, 4, 40, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 5, 5], [2, 0, 1]])
    place = (PID, 3, 300)
    targets = torch.tensor([0, 5, -100, 2])
    one = (SEEDS[:1], TABLE[:2, :1].contiguous())
    both = (SEEDS, TABLE)
    return {
        "sample": [
            (3, 300, SEEDS[0].clone(), *place, "gaussian"),
            (2, 130, SEEDS[1].clone(), PID, 0, 0, "rademacher"),
            (0, 4, SEEDS[1].clone(), PID, 0, 0, "gaussian"),
        ],
        "displace": [
            (w, *both, *place, "gaussian", "nearest", None),
            (wb, *one, *place, "rademacher", "stochastic", None),
            (wb, *one, *place, "gaussian", "nearest", torch.float32),
            (w.t(), *both, *place, "gaussian", "nearest", torch.float16),
            (w[:, ::2], *one, *place, "gaussian", "nearest", None),
            (w[:0], *one, *place, "gaussian", "nearest", None),
        ],
        "displace_": [
            (torch.zeros(3, 6, 40), w, *both, *place, "gaussian", "nearest"),
            (torch.zeros(2, 6, 40).to(torch.bfloat16), w, *one, *place, "rademacher", "stochastic"),
        ],
        "displace_vectors": [
            ([rand(7), rand(300), wb[0]], *both, [1, 2, 3], "gaussian"),
            ([wb[:, 3], rand(0)], *one, [1, 2], "rademacher"),
        ],
        "update_": [
            (
                [rand(3, 20), rand(7), rand(2, 3, 5), rand()],
                SEEDS,
                TABLE[0].clone(),
                torch.tensor([0.9, 1.0]),
                torch.tensor([False, True]),
                [1, 2, 3, 4],
                [],
                [],
                "gaussian",
                "nearest",
            ),
            (
                [wb.clone()],
                SEEDS,
                TABLE[0].clone(),
                None,
                None,
                [5],
                [2],
                [9],
                "gaussian",
                "stochastic",
            ),
        ],
        "project": [
            ([rand(3, 20), rand(7, dtype=torch.bfloat16)], SEEDS, [1, 2], [], [], "gaussian"),
            ([rand(3, 20)], SEEDS, [1], [4], [5], "rademacher"),
        ],
        "linear": [
            (x, w, rand(3, 6), *both, *place, "gaussian", False, False),
            (xb, wb, None, *one, *place, "gaussian", True, False),
            (rand(5, 6), w, rand(2, 40), *one, *place, "rademacher", True, True),
            (rand(3, 6), w, None, *both, *place, "gaussian", False, True),
            (rand(3, 0, 40), w, None, *both, *place, "gaussian", False, False),
            (rand(2, 5, 40).half(), w.half(), None, *one, *place, "gaussian", False, False),
        ],
        "update_linear_": [
            (
                x, w.clone(), rand(3, 6), *both, SEEDS[:1] + 9, torch.tensor([0.1]),
                torch.tensor([0.9]), "nearest", *place, "gaussian", False,
            ),
            (
                xb, wb.clone(), None, *one, SEEDS + 9, torch.tensor([0.1, 0.2]), None,
                "stochastic", *place, "rademacher", True,
            ),
        ],
        "embedding": [
            (ids, w, *both, *place, "gaussian", True),
            (ids.int().expand(3, 2, 3).contiguous(), wb, *both, *place, "rademacher", False),
            (torch.tensor(4), w, *one, *place, "gaussian", True),
            (ids[:0], w, *one, *place, "gaussian", True),
        ],
        "linear_cross_entropy": [
            (rand(3, 4, 40), w, None, targets, *both, *place, "gaussian", False, -100),
            (xb[0], wb, rand(2, 6), targets, *one, *place, "gaussian", True, -100),
        ],
        "sparse_displace": [
            (w, *masked(w), *both, PID, 0, "gaussian"),
            (wb, *masked(wb), *one, PID, 300, "rademacher"),
            (w[:, ::2], *masked(w[:, ::2]), *one, PID, 0, "gaussian"),
            (rand(7), *masked(rand(7)), *both, PID, 0, "gaussian"),
            (w, *masked(w, 0), *both, PID, 0, "gaussian"),
        ],
        "sparse_update_": [
            (
                [w.clone(), rand(7)],
                [masked(w)[0], masked(rand(7), 2)[0]],
                [masked(w)[1], masked(rand(7), 2)[1]],
                SEEDS,
                TABLE[0].clone(),
                torch.tensor([0.9, 1.0]),
                [1, 2],
                "gaussian",
            ),
            (
                [wb.clone()],
                [masked(wb)[0]],
                [masked(wb)[1]],
                SEEDS,
                TABLE[0].clone(),
                None,
                [5],
                "rademacher",
            ),
        ],
        "sparse_linear": [
            (x, w, rand(6), *masked(w), *both, PID, 0, "gaussian", False, False),
            (xb, wb, rand(2, 6), *masked(wb), *one, PID, 7, "gaussian", True, False),
            (rand(5, 6), w, rand(2, 40), *masked(w), *one, PID, 0, "rademacher", True, True),
            (rand(3, 6), w, None, *masked(w), *both, PID, 0, "gaussian", False, True),
            (rand(3, 0, 40), w, None, *masked(w), *both, PID, 0, "gaussian", False, False),
            (rand(2, 40), w, None, *masked(w, 0), *one, PID, 0, "gaussian", False, False),
        ],
        "sparse_embedding": [
            (ids, w, *masked(w), *both, PID, 0, "gaussian", True),
            (
                ids.int().expand(3, 2, 3).contiguous(), wb, *masked(wb), *both, PID, 3,
                "rademacher", False,
            ),
            (torch.tensor(4), w, *masked(w), *one, PID, 0, "gaussian", True),
            (ids[:0], w, *masked(w), *one, PID, 0, "gaussian", True),
        ],
    }  # fmt: skip


EVERY = [
    pytest.param(op, i, id=f"{op}-{i}") for op, lists in cases().items() for i in range(len(lists))
]


def test_the_cases_cover_every_op():
    assert set(cases()) == set(_ops.SCHEMAS)


def served(op: str, backend: str) -> None:
    """Fail when a backend that the test forces does not have the op (missing is not passing)."""
    assert op in _registry.backends()[backend].kernels, f"{backend} has no {op}"


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_opcheck(backend, op, i):
    served(op, backend)
    torch.library.opcheck(getattr(ops, op).default, cases()[op][i])


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_fake_has_the_real_shape_dtype_and_strides(backend, op, i):
    real, args = getattr(ops, op)(*cases()[op][i]), cases()[op][i]
    with FakeTensorMode() as mode:
        fake = getattr(ops, op)(*tree_map_only(Tensor, mode.from_tensor, args))
    if real is None:
        assert fake is None
        return
    assert isinstance(real, Tensor)
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_no_random_state_and_no_gradient(backend, op, i):
    state = torch.get_rng_state()
    first = getattr(ops, op)(*cases()[op][i])
    torch.manual_seed(99)
    again = getattr(ops, op)(*cases()[op][i])
    if first is not None:
        assert torch.equal(first, again)
        assert not first.requires_grad
    torch.set_rng_state(state)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("op", "i"), EVERY)
def test_the_default_dtype_does_not_matter(backend, op, i, default):
    want, arguments = getattr(ops, op)(*cases()[op][i]), cases()[op][i]
    try:
        torch.set_default_dtype(default)
        got = getattr(ops, op)(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    if want is not None:
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("place", [(0, 0), (5, 0), (0, 77), (2**32 - 4, 2**34 - 600)])
def test_sample(backend, distribution, place):
    for seed in SEEDS:
        z = ops.sample(4, 600, seed, PID, *place, distribution)
        want = noise.direction(4, 600, seed, PID, *place, distribution)
        assert z.dtype == torch.float32 and z.shape == (4, 600) and z.is_contiguous()
        atol = NOISE_ATOL if distribution == "gaussian" else 0
        torch.testing.assert_close(z, want, rtol=0, atol=atol)


@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("out", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_displace_is_the_formula(backend, dtype, out, rounding):
    w = rand(5, 300, dtype=dtype)
    got = ops.displace(w, SEEDS, TABLE, PID, 0, 0, "rademacher", rounding, out)
    to = out or dtype
    assert got.dtype == to and got.shape == (3, 5, 300) and got.is_contiguous()
    bits = None
    if rounding == "stochastic":
        bits = noise.rounding_bits(5, 300, SEEDS[0], PID, noise.STREAM_PROBE_ROUNDING)
    for g in range(3):
        acc = by_fma(w, SEEDS, TABLE[g], PID, "rademacher")
        assert torch.equal(got[g], noise.round_to(acc, to, bits)), g
    into = torch.full((3, 5, 300), 9.0, dtype=to)
    ops.displace_(into, w, SEEDS, TABLE, PID, 0, 0, "rademacher", rounding)
    assert torch.equal(into, got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_displace_by_normals(backend, dtype):
    w = rand(5, 300, dtype=dtype)
    got = ops.displace(w, SEEDS, TABLE, PID, 11, 130, "gaussian", "nearest", None).double()
    want = exact(w, r0=11, c0=130)
    unit = torch.finfo(dtype).eps / 2
    slack = 2 * unit * want.abs() + NOISE_ATOL * TABLE.abs().sum(1).double()[:, None, None]
    assert bool(((got - want).abs() <= slack + 2.0**-24).all())
    assert torch.equal(got[2], w.double())  # coefficients 0


def test_displace_without_terms_is_a_copy(backend):
    w = rand(3, 9)
    none = ops.displace(w, SEEDS[:0], torch.zeros(2, 0), PID, 0, 0, "gaussian", "nearest", None)
    assert torch.equal(none, w.expand(2, 3, 9))
    assert none.data_ptr() != w.data_ptr()


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(backend, distribution, dtype, transposed, shared, with_bias):
    w = rand(48, 300, dtype=dtype)
    fan_in, fan_out = (48, 300) if transposed else (300, 48)
    x = rand(2, 5, fan_in, dtype=dtype, seed=1) if shared else rand(3, 2, 5, fan_in, dtype=dtype)
    bias = rand(3, fan_out, seed=2) if with_bias else None
    y = ops.linear(x, w, bias, SEEDS, TABLE, PID, 2, 64, distribution, shared, transposed)
    assert y.shape == (3, 2, 5, fan_out) and y.dtype == dtype

    wg = exact(w, r0=2, c0=64, distribution=distribution)
    wg = wg if transposed else wg.mT
    xs = (x.expand(3, *x.shape) if shared else x).double()
    want = xs @ wg[:, None]
    magnitude = xs.abs() @ wg.abs()[:, None]
    if bias is not None:
        want = want + bias.double()[:, None, None]
    eps = torch.finfo(dtype).eps
    # Rounded weights (half a unit each), float32 accumulation, results rounded before and after
    # the bias.
    bound = eps * magnitude + fan_in * 2.0**-24 * magnitude + eps * (want.abs() + magnitude.sqrt())
    bound = bound + NOISE_ATOL * TABLE.abs().sum() * xs.abs().sum(-1, keepdim=True)
    assert bool(((y.double() - want).abs() <= bound).all())
    # In the root mean square, far tighter: at most twice what torch loses with written weights.
    written = wg.to(dtype)
    plain = torch.stack([(xs[g].to(dtype) @ written[g]) for g in range(3)]).double()
    if bias is not None:
        plain = (plain + bias.double()[:, None, None]).to(dtype).double()
    ours = (y.double() - want).square().mean().sqrt()
    theirs = (plain - want).square().mean().sqrt()
    assert ours <= 2 * theirs + NOISE_ATOL, (float(ours), float(theirs))


@pytest.mark.parametrize("shared", [False, True])
def test_linear_of_a_vector_and_of_nothing(backend, shared):
    w = rand(6, 40)
    x = rand(40) if shared else rand(3, 40)
    y = ops.linear(x, w, None, SEEDS, TABLE, PID, 0, 0, "gaussian", shared, False)
    wide = x[None] if shared else x[:, None]
    same = ops.linear(wide, w, None, SEEDS, TABLE, PID, 0, 0, "gaussian", shared, False)
    torch.testing.assert_close(y, same[:, 0], rtol=1e-6, atol=1e-6)
    empty = ops.linear(
        wide[..., :0, :], w, None, SEEDS, TABLE, PID, 0, 0, "gaussian", shared, False
    )
    assert empty.shape == (3, 0, 6)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_embedding_is_rows_of_the_displaced_table(backend, distribution, dtype, id_dtype):
    w = rand(30, 300, dtype=dtype)
    ids = torch.randint(0, 30, (3, 2, 7), dtype=id_dtype)
    table = ops.displace(w, SEEDS, TABLE, PID, 4, 9, distribution, "nearest", None)
    own = ops.embedding(ids, w, SEEDS, TABLE, PID, 4, 9, distribution, False)
    assert torch.equal(own, torch.stack([F.embedding(ids[g], table[g]) for g in range(3)]))
    shared = ops.embedding(ids[0], w, SEEDS, TABLE, PID, 4, 9, distribution, True)
    assert torch.equal(shared, torch.stack([F.embedding(ids[0], table[g]) for g in range(3)]))


@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_embedding_refuses_ids_outside_the_table(backend, bad):
    w = rand(30, 8)
    for ids, shared in ((torch.tensor([0, bad]), True), (torch.tensor([[0], [bad], [1]]), False)):
        with pytest.raises(IndexError, match=rf"ids must be in \[0, 30\).*{bad}"):
            ops.embedding(ids, w, SEEDS, TABLE, PID, 0, 0, "gaussian", shared)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(backend, dtype, shared, with_bias):
    vocab, hidden, tokens = 500, 24, 9
    w = rand(vocab, hidden, dtype=dtype)
    x = rand(tokens, hidden, dtype=dtype) if shared else rand(3, tokens, hidden, dtype=dtype)
    bias = rand(3, vocab, seed=3) if with_bias else None
    targets = torch.randint(0, vocab, (tokens,))
    targets[2] = -100
    got = ops.linear_cross_entropy(
        x, w, bias, targets, SEEDS, TABLE, PID, 0, 0, "gaussian", shared, -100
    )
    assert got.shape == (3,) and got.dtype == torch.float32
    logits = (x.expand(3, *x.shape) if shared else x).double() @ exact(w).mT
    if bias is not None:
        logits = logits + bias.double()[:, None]
    want = torch.stack([F.cross_entropy(logits[g], targets) for g in range(3)])
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)


def test_linear_cross_entropy_with_large_logits_and_other_ignore_index(backend):
    w, x = rand(50, 8) * 100, rand(6, 8) * 10
    targets = torch.tensor([0, 1, 2, 3, 49, 3])
    zero = torch.zeros(1, 1)
    got = ops.linear_cross_entropy(
        x, w, None, targets, SEEDS[:1], zero, PID, 0, 0, "gaussian", True, 3
    )
    want = F.cross_entropy(x.double() @ w.double().T, targets, ignore_index=3)
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-3)


def test_linear_cross_entropy_of_ignored_tokens_only_is_nan_as_in_torch(backend):
    targets = torch.full((4,), -100)
    args = (targets, SEEDS, TABLE, PID, 0, 0, "gaussian", True, -100)
    got = ops.linear_cross_entropy(rand(4, 8), rand(5, 8), None, *args)
    assert bool(F.cross_entropy(rand(4, 5), targets).isnan())
    assert bool(got.isnan().all())


@pytest.mark.parametrize("bad", [-1, 5, 7])
def test_linear_cross_entropy_refuses_targets_outside_the_vocabulary(backend, bad):
    targets = torch.tensor([0, bad, -100])
    with pytest.raises(IndexError, match=rf"targets must be in \[0, 5\).*{bad}"):
        ops.linear_cross_entropy(
            rand(3, 8), rand(5, 8), None, targets, SEEDS, TABLE, PID, 0, 0, "gaussian", True, -100
        )


# --- updates --------------------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(5, 300), (70,), (2, 3, 130), ()]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    return [rand(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


IDS = [PID, 1, 2, 3]


def update(
    params: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decay: Tensor | None = None,
    ends: Tensor | None = None,
    rounding: str = "nearest",
    distribution: str = "gaussian",
) -> list[Tensor]:
    ops.update_(
        params, seeds, coeffs, decay, ends, IDS[: len(params)], [], [], distribution, rounding
    )
    return params


@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_the_formula(backend, dtype, rounding):
    """Exact: decay, fused multiply-add, one rounding at each end with the bits of that term."""
    seeds, coeffs = seeds_of(3, 4, 5), torch.tensor([0.01, -0.02, 0.5])
    decay = torch.tensor([0.75, 1.0, 0.999])
    for ends in (None, [True] * 3, [False, True, True], [False, False, True]):
        flags = None if ends is None else torch.tensor(ends)
        got = update(parameters(dtype), seeds, coeffs, decay, flags, rounding, "rademacher")
        for i, w in enumerate(parameters(dtype)):
            rows, cols = noise.matrix_shape(w.shape)
            acc = w.float().reshape(rows, cols)
            for k in range(3):
                z = noise.rademacher(rows, cols, seeds[k], IDS[i])
                base = acc * decay[k]
                acc = (coeffs[k].double() * z.double() + base.double()).float()
                if ends is None or ends[k]:
                    bits = None
                    if rounding == "stochastic":
                        stream = noise.STREAM_UPDATE_ROUNDING
                        bits = noise.rounding_bits(rows, cols, seeds[k], IDS[i], stream)
                    acc = noise.round_to(acc, dtype, bits).float()
            assert torch.equal(got[i].float(), acc.view(w.shape)), (i, ends)


def test_the_last_term_ends_whatever_ends_says(backend):
    seeds, coeffs = seeds_of(3, 4), torch.tensor([1e-3, 2e-3])
    open_end, closed = torch.tensor([False, False]), torch.tensor([False, True])
    a = update(parameters(torch.bfloat16), seeds, coeffs, None, open_end, "stochastic")
    b = update(parameters(torch.bfloat16), seeds, coeffs, None, closed, "stochastic")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_replay_is_bit_identical_to_separate_steps(backend, dtype, rounding, distribution):
    count = 17
    seeds = torch.tensor([noise.derive_seed(5, k) for k in range(count)])
    coeffs = rand(count, seed=9) * 1e-3
    decay = 1 - torch.rand(count) * 1e-3
    fused = update(parameters(dtype), seeds, coeffs, decay, None, rounding, distribution)
    stepped = parameters(dtype)
    for k in range(count):
        one = slice(k, k + 1)
        update(stepped, seeds[one], coeffs[one], decay[one], None, rounding, distribution)
    halves = parameters(dtype)
    for part in (slice(0, 8), slice(8, count)):
        update(halves, seeds[part], coeffs[part], decay[part], None, rounding, distribution)
    for a, b, c, before in zip(fused, stepped, halves, parameters(dtype), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert not torch.equal(a, before) or a.numel() == 1


def test_update_probe_and_sample_share_one_direction(backend):
    """The z of the update is the z of the probe (in PyPI's mezo it is not)."""
    w = rand(9, 300)
    z = ops.sample(9, 300, SEEDS[0], PID, 0, 0, "gaussian")
    probe = ops.displace(w, SEEDS[:1], torch.ones(1, 1), PID, 0, 0, "gaussian", "nearest", None)[0]
    moved = update([w.clone()], SEEDS[:1], torch.ones(1))[0]
    assert torch.equal(probe, moved)
    torch.testing.assert_close(probe - w, z, rtol=0, atol=1e-6)
    assert torch.equal(probe, (z.double() + w.double()).float())


def test_stochastic_update_keeps_the_mean_where_nearest_stands_still(backend):
    """Steps of 1/50 of a bfloat16 ulp: nearest never moves, stochastic drifts as asked."""
    w = torch.ones(64, 256, dtype=torch.bfloat16)
    count, step = 50, 2.0**-7 / 50
    seeds = torch.tensor([noise.derive_seed(1, k) for k in range(count)])
    z = sum(noise.rademacher(64, 256, s, PID) for s in seeds) * step
    coeffs = torch.full((count,), step)
    still = update([w.clone()], seeds, coeffs, distribution="rademacher")[0]
    assert float((still != 1).float().mean()) < 0.02  # below 1 the ulp is half, and still 25 steps
    moved = update([w.clone()], seeds, coeffs, rounding="stochastic", distribution="rademacher")[0]
    gap = (moved.float() - 1 - z).double()
    # Each rounding is off by at most an ulp, with mean 0: 4.5 standard errors.
    assert abs(float(gap.mean())) < 4.5 * float(gap.std()) / gap.numel() ** 0.5
    slope = float((moved.float() - 1).mul(z).sum() / z.square().sum())
    assert slope == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_in_place_whatever_the_layout(backend, dtype):
    base = rand(6, 40, dtype=dtype)
    seeds, coeffs = SEEDS, TABLE[0].clone()
    want = update([base.clone()], seeds, coeffs)[0]
    storage = torch.full((12, 80), 5.0, dtype=dtype)
    layouts: dict[str, Tensor] = {
        "transposed": base.t().contiguous().t(),
        "strided": storage[::2, ::2],
        "offset": storage[3:9, 20:60],
    }
    for name, w in layouts.items():
        w.copy_(base)
        before = w.data_ptr()
        update([w], seeds, coeffs)
        assert w.data_ptr() == before
        assert torch.equal(w, want), name
    deep = rand(2, 3, 5, 4, dtype=dtype)
    want = update([deep.clone()], seeds, coeffs)[0]
    for order in ((0, 2, 3, 1), (3, 1, 0, 2)):  # channels last; nothing in place
        back = [order.index(d) for d in range(4)]
        w = deep.permute(order).contiguous().permute(back)
        assert not w.is_contiguous()
        update([w], seeds, coeffs)
        assert torch.equal(w, want), order
        dots = ops.project([w], seeds, [PID], [], [], "gaussian")
        assert torch.equal(dots, ops.project([want], seeds, [PID], [], [], "gaussian"))
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[::2, ::2] = False
    outside[3:9, 20:60] = False
    assert bool((storage[outside] == 5).all()), "an update wrote outside its parameter"


def test_update_of_a_leaf_that_requires_grad_counts_as_a_change(backend):
    w = torch.nn.Parameter(rand(3, 8))
    version = w._version
    with torch.no_grad():
        update([w], SEEDS, TABLE[0].clone())
    assert w._version > version, "autograd must see that saved tensors are stale"
    assert w.requires_grad and w.is_leaf and w.grad_fn is None

    x = rand(4, 8).requires_grad_()
    y = (x @ w.t()).square().sum()
    with torch.no_grad():
        update([w], SEEDS, TABLE[0].clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- projections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(backend, dtype, distribution):
    vectors = parameters(dtype)
    seeds = seeds_of(1, 2, 3)
    got = ops.project(vectors, seeds, IDS, [], [], distribution)
    assert got.shape == (3,) and got.dtype == torch.float32
    for k in range(3):
        want, size = 0.0, 0.0
        for v, pid in zip(vectors, IDS, strict=True):
            matrix = noise.matrix_shape(v.shape)
            z = noise.direction(*matrix, seeds[k], pid, distribution=distribution).double()
            want += float((v.double().view(matrix) * z).sum())
            size += float(v.double().abs().sum())
        assert abs(float(got[k]) - want) <= NOISE_ATOL * size + 2.0**-23 * abs(want)


def test_project_of_the_direction_itself_is_its_norm(backend):
    z = ops.sample(32, 256, SEEDS[0], PID, 0, 0, "gaussian")
    own, other = ops.project([z], SEEDS, [PID], [], [], "gaussian").tolist()
    assert own == pytest.approx(float(z.double().square().sum()), rel=1e-6)
    assert abs(other) < 4.5 * 32 * 16  # independent directions: sqrt(8192) = 90 standard deviation


# --- offsets: a shard is a slice of the whole -----------------------------------------------------

CUTS = [(0, 2, 0, 300), (2, 6, 0, 256), (1, 5, 33, 300), (3, 4, 64, 65)]


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("cut", CUTS)
def test_shards(backend, cut, distribution):
    r0, r1, c0, c1 = cut
    w = rand(6, 300)
    part = w[r0:r1, c0:c1]
    rest = (distribution, "nearest", None)
    whole = ops.displace(w, SEEDS, TABLE, PID, 0, 0, *rest)
    shard = ops.displace(part, SEEDS, TABLE, PID, r0, c0, *rest)
    assert torch.equal(shard, whole[:, r0:r1, c0:c1])

    ids = torch.arange(r1 - r0)
    rows = ops.embedding(ids, part, SEEDS, TABLE, PID, r0, c0, distribution, True)
    assert torch.equal(rows, shard)

    one = whole[0].clone()
    coeffs = TABLE[0].clone()
    ops.update_([one], SEEDS, coeffs, None, None, [PID], [], [], distribution, "nearest")
    two = shard[0].clone()
    ops.update_([two], SEEDS, coeffs, None, None, [PID], [r0], [c0], distribution, "nearest")
    assert torch.equal(two, one[r0:r1, c0:c1])

    x = rand(2, c1 - c0)
    y = ops.linear(x, part, None, SEEDS, TABLE, PID, r0, c0, distribution, True, False)
    torch.testing.assert_close(y, x @ shard.mT, rtol=1e-5, atol=1e-4)


def test_shards_of_update_and_project_together(backend):
    w = rand(6, 300)
    seeds, coeffs = SEEDS, TABLE[0].clone()
    whole = w.clone()
    ops.update_([whole], seeds, coeffs, None, None, [PID], [], [], "gaussian", "nearest")
    shards = [w[:2].clone(), w[2:, :100].clone(), w[2:, 100:].clone()]
    r, c = [0, 2, 2], [0, 0, 100]
    sums = ops.project(shards, seeds, [PID] * 3, r, c, "gaussian")
    ops.update_(shards, seeds, coeffs, None, None, [PID] * 3, r, c, "gaussian", "nearest")
    built = torch.cat([shards[0], torch.cat(shards[1:], dim=1)])
    assert torch.equal(built, whole)
    total = ops.project([w], seeds, [PID], [], [], "gaussian")
    torch.testing.assert_close(sums, total, rtol=1e-6, atol=1e-4)


def test_vocabulary_shards_of_the_loss(backend):
    """Two vocabulary halves, combined by hand, give the loss of the whole."""
    w, x = rand(40, 24), rand(5, 24)
    targets = torch.tensor([0, 39, 17, 20, 3])
    rest = ("gaussian", True, -100)
    whole = ops.linear_cross_entropy(x, w, None, targets, SEEDS, TABLE, PID, 0, 0, *rest)
    logits = [
        ops.linear(x, w[a:b], None, SEEDS, TABLE, PID, a, 0, "gaussian", True, False)
        for a, b in itertools.pairwise((0, 16, 40))
    ]
    joined = torch.cat(logits, dim=-1)
    want = torch.stack([F.cross_entropy(joined[g], targets) for g in range(3)])
    torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-6)


# --- layouts, threads, special values -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_inputs_does_not_matter(backend, dtype):
    w, x = rand(12, 40, dtype=dtype), rand(3, 5, 40, dtype=dtype)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: F.pad(t, (3, 5))[..., 3:-5],
    ]

    def run(x, w):
        return ops.linear(x, w, None, SEEDS, TABLE, PID, 0, 0, "gaussian", False, False)

    def show(w):
        return ops.displace(w, SEEDS, TABLE, PID, 0, 0, "gaussian", "nearest", None)

    ids = torch.tensor([3, 11, 0])

    def look(w):
        return ops.embedding(ids, w, SEEDS, TABLE, PID, 0, 0, "gaussian", True)

    def dot(w):
        return ops.project([w], SEEDS, [PID], [], [], "gaussian")

    for layout in layouts:
        assert torch.equal(layout(w), w)
        assert torch.equal(show(layout(w)), show(w))
        assert torch.equal(look(layout(w)), look(w))
        assert torch.equal(dot(layout(w)), dot(w))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(run(layout(x), layout(w)), run(x, w), rtol=eps, atol=40 * eps)


def test_threads_do_not_change_a_bit(backend):
    w, x = rand(70, 300), rand(3, 9, 300)
    bias, targets = rand(3, 70), torch.randint(0, 70, (9,))

    def everything() -> list[Tensor]:
        moved = w.clone()
        ops.update_(
            [moved], SEEDS, TABLE[0].clone(), None, None, [PID], [], [], "gaussian", "nearest"
        )
        return [
            moved,
            ops.sample(70, 300, SEEDS[0], PID, 0, 0, "gaussian"),
            ops.displace(w, SEEDS, TABLE, PID, 0, 0, "gaussian", "nearest", None),
            ops.project([w], SEEDS, [PID], [], [], "gaussian"),
            ops.embedding(targets, w, SEEDS, TABLE, PID, 0, 0, "gaussian", True),
        ]  # fmt: skip

    def products() -> list[Tensor]:
        place = (SEEDS, TABLE, PID, 0, 0, "gaussian", False)
        return [
            ops.linear(x, w, bias, *place, False),
            ops.linear_cross_entropy(x, w, bias, targets, *place, -100),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, one_product = everything(), products()
        torch.set_num_threads(2)
        two, two_product = everything(), products()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for a, b in zip(
        one_product, two_product, strict=True
    ):  # the vendor's GEMM may split differently
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40])
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_weights(backend, value, rounding, dtype):
    w = torch.full((2, 70), value, dtype=dtype)
    got = ops.displace(w, SEEDS[:1], torch.zeros(1, 1), PID, 0, 0, "gaussian", rounding, None)[0]
    if math.isnan(value):
        assert bool(got.isnan().all())
    else:
        assert torch.equal(got, w)
    moved = w.clone()
    args = (SEEDS[:1], torch.tensor([0.5]), None, None, [PID], [], [], "gaussian", rounding)
    ops.update_([moved], *args)
    assert bool(torch.isfinite(moved).all()) == bool(torch.isfinite(w).all())


def test_subnormal_results_are_kept(backend):
    """No flush to zero: float32 subnormals survive a displacement."""
    w = torch.full((1, 64), 1e-40)
    got = ops.displace(
        w, SEEDS[:1], torch.full((1, 1), 1e-41), PID, 0, 0, "rademacher", "nearest", None
    )
    want = by_fma(w, SEEDS[:1], torch.tensor([1e-41]), PID, "rademacher")
    assert torch.equal(got[0], want)
    assert bool((got > 0).all())  # fmt: skip
