"""The ops under a mask, on every backend that has them, against float64 and the reference.

What is computed from Rademacher signs alone must equal the reference bit for bit; normals may
differ by 2e-6 (:mod:`test_conformance`). Products may lose twice what torch loses at that dtype.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_conformance import DTYPES, NOISE_ATOL, PID, rand, run, same, seeds_of, table
from torch import Tensor

from zokernels import _ops, _registry, noise, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SPARSE = [op for op in _ops.SCHEMAS if op.startswith("sparse_")]
BACKENDS = [
    name
    for name, backend in _registry.backends().items()
    if backend.reason is None and "sparse_linear" in backend.kernels
]


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def masked(w: Tensor, count: int, *, every: int = 2, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Random indices, and a shadow that rounds to what ``w`` holds but at every ``every``-th."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(w.numel(), generator=generator)[:count].sort().values
    held = w.reshape(-1)[indices].float()
    # Less than half a unit of bfloat16's last place: rounds back.
    shadow = held if w.dtype == torch.float32 else held * (1 + 2.0**-12)
    shadow = torch.where(shadow.to(w.dtype).float() == held, shadow, held)
    if every:
        shadow[::every] = shadow[::every] * 1.5 + 1
    return indices, shadow


def values(w: Tensor, indices: Tensor, shadow: Tensor) -> Tensor:
    """The rule in one line: the shadow counts where its rounding is what the weight holds."""
    held = w.reshape(-1)[indices]
    return torch.where(shadow.to(w.dtype) == held, shadow, held.float())


def test_cpp_and_the_reference_have_every_sparse_op() -> None:
    for backend in ("cpp", "reference"):
        assert set(SPARSE) <= set(_registry.backends()[backend].kernels)


# --- values ---------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (3, 7, 4), (5, 300, 900), (1, 4097, 2500), (64, 130, 0), (40, 260, 10400)]


@pytest.mark.parametrize("offset", [0, 17, 255, 256, 5000, 2**34 - 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_displace(name: str, dtype: torch.dtype, offset: int) -> None:
    for i, (rows, cols, count) in enumerate(SIZES):
        branches, terms = [(1, 1), (2, 1), (5, 3), (2, 0), (3, 2)][i % 5]
        w = rand(rows, cols, dtype=dtype, seed=i)
        indices, shadow = masked(w, count)
        c = table(branches, terms)
        for distribution in noise.DISTRIBUTIONS:
            rest = (indices, shadow, seeds_of(terms), c, PID, offset, distribution)
            got = run(name, "sparse_displace", w, *rest)
            base = values(w, indices, shadow)
            want = reference.displace(
                base[None], *rest[2:4], PID, 0, offset, distribution, "nearest", None
            )[:, 0]
            if distribution == "rademacher":
                same(got, want)
            else:
                slack = NOISE_ATOL * float(c.abs().sum(1).max()) + terms * 4e-7 if terms else 0.0
                torch.testing.assert_close(got, want, rtol=1e-6, atol=slack)


def test_displace_is_the_noise_of_a_vector(name: str) -> None:
    """Not of the matrix: element k of the list gets normal k of row 0."""
    w = torch.zeros(9, 50)
    indices = torch.tensor([3, 44, 49, 50, 120, 449])
    got = run(
        name, "sparse_displace", w, indices, torch.zeros(6), seeds_of(1), torch.ones(1, 1), PID, 0,
        "gaussian",
    )  # fmt: skip
    torch.testing.assert_close(
        got, noise.gaussian(1, 6, seeds_of(1)[0], PID), rtol=0, atol=NOISE_ATOL
    )


def test_displace_reads_any_strides(name: str) -> None:
    big = rand(40, 90)
    for w in (big.t(), big[:, ::2], big[3:9, 5:60], rand(4, 5, 6).transpose(0, 2), rand(7)[::2]):
        indices, shadow = masked(w, min(w.numel(), 30))
        rest = (indices, shadow, seeds_of(2), table(2, 2), PID, 0, "gaussian")
        same(
            run(name, "sparse_displace", w, *rest),
            run(name, "sparse_displace", w.contiguous(), *rest),
        )


def test_part_of_the_list_with_its_offset_is_part_of_the_values(name: str) -> None:
    w = rand(30, 200)
    indices, shadow = masked(w, 3000)
    rest = (seeds_of(2), table(2, 2), PID)
    whole = run(name, "sparse_displace", w, indices, shadow, *rest, 0, "gaussian")
    for low, high in [(0, 1), (1, 300), (255, 2049), (2999, 3000)]:
        part = run(
            name, "sparse_displace", w, indices[low:high], shadow[low:high], *rest, low, "gaussian"
        )
        same(part, whole[:, low:high].contiguous())


# --- update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [False, True], ids=["", "decay"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update(name: str, dtype: torch.dtype, decay: bool) -> None:
    terms = 3
    factors = torch.tensor([0.9, 1.0, 0.5]) if decay else None
    for distribution in noise.DISTRIBUTIONS:
        weights = [rand(r, c, dtype=dtype, seed=i) for i, (r, c, _) in enumerate(SIZES)]
        lists = [masked(w, n) for w, (_, _, n) in zip(weights, SIZES, strict=True)]
        got_w = [w.clone() for w in weights]
        indices, got_s = [i for i, _ in lists], [s.clone() for _, s in lists]
        ids = [PID - i for i in range(len(weights))]
        rest = (seeds_of(terms), table(1, terms)[0].contiguous(), factors, ids, distribution)
        run(name, "sparse_update_", got_w, indices, got_s, *rest)
        for i, (w, (index, shadow)) in enumerate(zip(weights, lists, strict=True)):
            want = values(w, index, shadow)
            reference.update_([want], *rest[:3], None, [ids[i]], [], [], distribution, "nearest")
            if distribution == "rademacher":
                same(got_s[i], want)
            else:
                torch.testing.assert_close(got_s[i], want, rtol=1e-6, atol=3e-6)
            # Exactly the masked elements moved, and hold the shadow's rounding.
            left = torch.ones(w.numel(), dtype=torch.bool)
            left[index] = False
            same(got_w[i].view(-1)[left], w.view(-1)[left])
            same(got_w[i].view(-1)[index], got_s[i].to(dtype))


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replay_is_its_steps_bit_for_bit(
    name: str, dtype: torch.dtype, distribution: str
) -> None:
    w = rand(20, 400, dtype=dtype)
    indices, shadow = masked(w, 3000)
    terms = 7
    seeds, c = seeds_of(terms), table(1, terms)[0].contiguous()
    decay = torch.linspace(0.9, 1, terms)
    once, once_s = w.clone(), shadow.clone()
    run(name, "sparse_update_", [once], [indices], [once_s], seeds, c, decay, [PID], distribution)
    step, step_s = w.clone(), shadow.clone()
    for k in range(terms):
        part = (seeds[k : k + 1], c[k : k + 1], decay[k : k + 1])
        run(name, "sparse_update_", [step], [indices], [step_s], *part, [PID], distribution)
    same(once, step)
    same(once_s, step_s)


def test_update_writes_through_any_strides(name: str) -> None:
    for make in (
        lambda: rand(40, 90).t(),
        lambda: rand(40, 90)[:, ::2],
        lambda: rand(4, 5, 6).transpose(0, 2),
        lambda: rand(9)[::2],
        lambda: rand(),
    ):
        w = make()
        indices, shadow = masked(w, min(w.numel(), 30))
        rest = (seeds_of(2), table(1, 2)[0].contiguous(), None, [PID], "gaussian")
        flat, flat_s = w.contiguous().clone(), shadow.clone()
        run(name, "sparse_update_", [flat], [indices], [flat_s], *rest)
        run(name, "sparse_update_", [w], [indices], [shadow], *rest)
        same(w.contiguous(), flat)
        same(shadow, flat_s)


def test_overflow_and_nan_stay_what_they_are(name: str) -> None:
    """An infinite float16 holds a finite shadow; NaN is never silently replaced."""
    w = torch.tensor([1.0, 60000.0, float("nan"), float("inf")]).half()
    indices, shadow = torch.arange(4), torch.tensor([1.0, 60000.0, 2.0, 70000.0])
    rest = (seeds_of(1), torch.zeros(1), torch.tensor([1.2]), [PID], "rademacher")
    run(name, "sparse_update_", [w], [indices], [shadow], *rest)
    torch.testing.assert_close(shadow[[0, 1, 3]], torch.tensor([1.2, 72000.0, 84000.0]))
    assert torch.isnan(w[2]) and torch.isnan(shadow[2])
    assert torch.isinf(w[1]) and torch.isinf(w[3])
    run(name, "sparse_update_", [w], [indices], [shadow], rest[0], rest[1],
        torch.tensor([0.5]), [PID], "rademacher")  # fmt: skip
    torch.testing.assert_close(
        w[[0, 1, 3]].float(), torch.tensor([0.6, 36000.0, 42000.0]).half().float()
    )


# --- linear ---------------------------------------------------------------------------------------

# fan out, fan in, elements, tokens: cut vectors of columns and tokens, dense, empty, single.
PRODUCTS = [
    (5, 40, 30, (2, 7)),
    (48, 33, 80, (3,)),
    (16, 16, 256, (32,)),
    (130, 65, 100, (1, 33)),
    (7, 300, 0, (5,)),
    (64, 48, 9, (70,)),
    (3, 4, 6, ()),
    (6, 8, 10, (0,)),
]


def oracle(
    x: Tensor, w: Tensor, bias: Tensor | None, moved: Tensor, indices: Tensor, shared: bool
) -> Tensor:
    """``x_g W_g^T + bias_g`` in float64, W_g written out."""
    out = []
    for g in range(moved.shape[0]):
        wg = w.double().clone()
        wg.view(-1)[indices] = moved[g].double()
        y = F.linear((x if shared else x[g]).double(), wg)
        if bias is not None:
            y = y + (bias if bias.dim() == 1 else bias[g]).double()
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shared", [False, True], ids=["stacked", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(name: str, dtype: torch.dtype, shared: bool, transposed: bool) -> None:
    for i, (fan_out, fan_in, count, lead) in enumerate(PRODUCTS):
        branches, terms = [(2, 1), (1, 1), (5, 3), (3, 2)][i % 4]
        w = rand(fan_out, fan_in, dtype=dtype, seed=i)
        indices, shadow = masked(w, count)
        x = rand(*(() if shared else (branches,)), *lead, fan_in, dtype=dtype, seed=9)
        kinds = [
            None,
            rand(fan_out, dtype=dtype),
            rand(branches, fan_out),
            rand(branches, fan_out, dtype=dtype),
        ]
        bias = kinds[i % 4]
        seeds, c = seeds_of(terms), table(branches, terms)
        stored, where, shade = w, indices, shadow
        if transposed:
            # The same weight, stored as [in, out]: its list has another order.
            stored = w.t().contiguous()
            turned = indices % fan_in * fan_out + indices // fan_in
            order = turned.argsort()
            where, shade = turned[order], shadow[order]
        rest = (where, shade, seeds, c, PID, 3, "gaussian")
        moved = run(name, "sparse_displace", stored, *rest)
        got = run(name, "sparse_linear", x, stored, bias, *rest, shared, transposed)
        plain_w = stored.t() if transposed else stored
        flat = torch.arange(w.numel()).view(w.shape)
        place = flat.t().reshape(-1)[where] if transposed else where
        exact = oracle(x, plain_w.contiguous(), bias, moved, place, shared)
        assert got.dtype == dtype and got.shape == exact.shape
        # Twice torch's own loss on the plain product, and the rounding of the corrected sum.
        single = F.linear(x, plain_w, bias if bias is not None and bias.dim() == 1 else None)
        loss = (single.double() - F.linear(x.double(), plain_w.double(),
                bias.double() if bias is not None and bias.dim() == 1 else None)).abs()  # fmt: skip
        eps = torch.finfo(dtype).eps
        bound = 2 * (loss.max() if loss.numel() else 0) + eps * exact.abs() + 1e-5
        assert bool(((got.double() - exact).abs() <= bound).all())


def test_the_probe_acts_in_float32_on_low_precision_weights(name: str) -> None:
    """A displacement far below a unit of the weight's last place is still there in the product."""
    w = torch.full((8, 8), 1.0, dtype=torch.bfloat16)  # a unit is 2**-7
    indices = torch.arange(64)
    x = torch.eye(8, dtype=torch.bfloat16)
    c = torch.tensor([[2.0**-12], [-(2.0**-12)]])
    rest = (indices, torch.ones(64), seeds_of(1), c, PID, 0, "rademacher")
    y = run(name, "sparse_linear", x - x, w, None, *rest, True, False)
    same(y, torch.zeros(2, 8, 8, dtype=torch.bfloat16))
    # 1 + 2**-12 s would round to 1 in bfloat16; against a 1 of the other sign it shows.
    both = torch.cat([x, -x], dim=1)
    twice = torch.cat([w, w], dim=1)
    where = torch.cat([torch.arange(8) + 16 * r for r in range(8)])  # the first halves
    rest = (where, torch.ones(64), seeds_of(1), c, PID, 0, "rademacher")
    y = run(name, "sparse_linear", both, twice, None, *rest, True, False)
    z = noise.rademacher(1, 64, seeds_of(1)[0], PID).view(8, 8)
    same(y[0].float(), (z * 2.0**-12).t().contiguous())
    same(y[1], -y[0])


def test_linear_takes_any_strides(name: str) -> None:
    big, wide = rand(40, 90), rand(2, 30, 6)
    for w in (big.t()[:20, :30], big[:20, ::3], big[::2, :30], big[:1, :30].expand(20, 30)):
        indices, shadow = masked(w, 40)
        rest = (indices, shadow, seeds_of(1), table(2, 1), PID, 0, "gaussian", False, False)
        x = wide.transpose(1, 2)
        got = run(name, "sparse_linear", x, w, None, *rest)
        want = run(name, "sparse_linear", x.contiguous(), w.contiguous(), None, *rest)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous()


def test_linear_leaves_its_inputs_alone(name: str) -> None:
    w, x = rand(20, 30), rand(2, 5, 30)
    indices, shadow = masked(w, 40)
    before = [t.clone() for t in (w, x, indices, shadow)]
    run(name, "sparse_linear", x, w, None, indices, shadow, seeds_of(1), table(2, 1), PID, 0,
        "gaussian", False, False)  # fmt: skip
    for now, then in zip((w, x, indices, shadow), before, strict=True):
        same(now, then)


@given(data=st.data())
def test_linear_of_any_shape(data: st.DataObject) -> None:
    fan_out, fan_in = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    tokens, branches = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 4))
    count = data.draw(st.integers(0, fan_out * fan_in))
    shared, transposed = data.draw(st.booleans()), data.draw(st.booleans())
    w = rand(*((fan_in, fan_out) if transposed else (fan_out, fan_in)))
    indices, shadow = masked(w, count, seed=count)
    x = rand(*(() if shared else (branches,)), tokens, fan_in)
    bias = rand(branches, fan_out) if data.draw(st.booleans()) else None
    args = (x, w, bias, indices, shadow, seeds_of(2), table(branches, 2), PID, 0, "rademacher")
    want = reference.sparse_linear(*args, shared, transposed)
    for name in BACKENDS:
        got = run(name, "sparse_linear", *args, shared, transposed)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    w = rand(300, 200).bfloat16()
    indices, shadow = masked(w, 9000)
    args = (indices, shadow, seeds_of(2), table(2, 2), PID, 0, "gaussian")
    update = (seeds_of(2), table(1, 2)[0].contiguous(), None, [PID], "gaussian")

    def everything() -> list[Tensor]:
        moved, shade = w.clone(), shadow.clone()
        run("cpp", "sparse_update_", [moved], [indices], [shade], *update)
        return [run("cpp", "sparse_displace", w, *args), moved, shade]

    want = everything()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(everything(), want, strict=True):
            same(a, b)
    finally:
        torch.set_num_threads(1)


def test_instruction_sets_agree_bit_for_bit() -> None:
    from zokernels import cpp

    w, x = rand(130, 75).bfloat16(), rand(2, 37, 75).bfloat16()
    indices, shadow = masked(w, 900)
    args = (indices, shadow, seeds_of(2), table(2, 2), PID, 0, "gaussian")
    native = cpp.instruction_set()
    results = []
    try:
        for isa in cpp.instruction_sets():
            cpp.use_instruction_set(isa)
            y = run("cpp", "sparse_linear", x, w, rand(2, 130), *args, False, False)
            results.append((run("cpp", "sparse_displace", w, *args), y))
    finally:
        cpp.use_instruction_set(native)
    for values_, y in results[1:]:
        same(values_, results[0][0])
        same(y, results[0][1])


# --- embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["stacked", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(name: str, dtype: torch.dtype, shared: bool, ids_dtype: torch.dtype) -> None:
    w = rand(20, 37, dtype=dtype)
    for count in (0, 1, 60, 740):
        indices, shadow = masked(w, count)
        rest = (indices, shadow, seeds_of(2), table(3, 2), PID, 5, "rademacher")
        ids = torch.randint(20, (4, 6) if shared else (3, 4, 6)).to(ids_dtype)
        got = run(name, "sparse_embedding", ids, w, *rest, shared)
        moved = run(name, "sparse_displace", w, *rest)
        for g in range(3):
            wg = w.clone()
            wg.view(-1)[indices] = moved[g].to(dtype)
            same(got[g], F.embedding((ids if shared else ids[g]).long(), wg))
