"""Seed-space algebra: the list operations, the bytes, and what a displacement does to weights."""

from __future__ import annotations

import copy
import math
import pickle
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zokernels as zo
from zokernels import noise
from zokernels.binding import ModelChangedError
from zokernels.displacement import (
    Displacement,
    EncodingError,
    NonFiniteError,
    TrailingBytesError,
    TruncatedError,
    UnknownVersionError,
)

HEADER = 12

seeds = st.integers(-(1 << 63), (1 << 64) - 1)
coeffs = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
distributions = st.sampled_from(noise.DISTRIBUTIONS)


def displacements(values: st.SearchStrategy[float] = coeffs, keys=seeds) -> st.SearchStrategy:
    return st.builds(
        lambda terms, kind: Displacement(
            [s for s, _ in terms], [c for _, c in terms], distribution=kind
        ),
        st.lists(st.tuples(keys, values), max_size=12),
        distributions,
    )


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    return {
        "a.weight": torch.randn(5, 300, generator=gen).to(dtype),
        "a.bias": torch.randn(7, generator=gen).to(dtype),
        "scalar": torch.randn((), generator=gen).to(dtype),
    }


def written_out(d: Displacement, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The displacement as dense float64 tensors, from the contract alone."""
    dense = {}
    for name, w in named.items():
        rows, cols = noise.matrix_shape(w.shape)
        total = torch.zeros(rows, cols, dtype=torch.float64)
        for seed, coeff in d:
            key = torch.tensor(seed)
            z = noise.direction(
                rows, cols, key, noise.parameter_id(name), distribution=d.distribution
            )
            total += coeff * z.double()
        dense[name] = total.reshape(w.shape)
    return dense


# --- terms ----------------------------------------------------------------------------------------


def test_terms_are_signed_seeds_and_float32_coefficients() -> None:
    d = Displacement([0, (1 << 64) - 1, -5], [0.1, 1, -2.5])
    assert d.seeds == (0, -1, -5)
    assert d.coeffs == (torch.tensor(0.1).item(), 1.0, -2.5)
    assert list(d) == list(zip(d.seeds, d.coeffs, strict=True))
    assert len(d) == 3
    assert d[1] == (-1, 1.0)
    assert d[1:] == Displacement([-1, -5], [1, -2.5])
    assert d.distribution == "gaussian"
    assert d.version == noise.CONTRACT_VERSION


def test_immutable_and_hashable() -> None:
    d = Displacement([1], [2.0])
    with pytest.raises(AttributeError, match="immutable"):
        d._coeffs = (3.0,)
    with pytest.raises(AttributeError):
        d.other = 1
    assert hash(d) == hash(Displacement([1], [2.0]))
    assert d != Displacement([1], [2.0], distribution="rademacher")
    assert d != "something else"
    assert {d: 1}[Displacement([1], [2.0])] == 1


def test_repr_is_short() -> None:
    text = repr(Displacement(range(1000), [1.0] * 1000))
    assert "997 more" in text and len(text) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1], "coeffs": []}, "equal lengths"),
        ({"seeds": [1 << 64], "coeffs": [1]}, "64 bits"),
        ({"seeds": [-(1 << 63) - 1], "coeffs": [1]}, "64 bits"),
        ({"seeds": [1], "coeffs": [math.nan]}, r"coeffs\[0\] must be finite"),
        ({"seeds": [1, 2], "coeffs": [0, math.inf]}, r"coeffs\[1\] must be finite"),
        ({"seeds": [1], "coeffs": [1e39]}, "finite in float32"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
        ({"version": 99}, "version must be 1; got 99"),
    ],
)
def test_bad_terms(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Displacement(**arguments)


# --- algebra --------------------------------------------------------------------------------------


@given(displacements(small), displacements(small), displacements(small))
def test_addition_concatenates(a: Displacement, b: Displacement, c: Displacement) -> None:
    b, c = (Displacement(d.seeds, d.coeffs, distribution=a.distribution) for d in (b, c))
    total = a + b + c
    assert total.seeds == a.seeds + b.seeds + c.seeds
    assert total.coeffs == a.coeffs + b.coeffs + c.coeffs
    assert total == a + (b + c) == Displacement.concatenate([a, b, c])
    assert a + Displacement(distribution=a.distribution) == a
    assert a - b == a + (-b)
    negated = -a
    assert -negated == a


@given(displacements(small), st.floats(-1e3, 1e3))
def test_scaling_rounds_once(a: Displacement, factor: float) -> None:
    scaled = a * factor
    assert scaled == factor * a == a.scale(factor)
    assert scaled.seeds == a.seeds
    for got, c in zip(scaled.coeffs, a.coeffs, strict=True):
        assert got == torch.tensor(c * factor, dtype=torch.float64).float().item()
    assert a * 1 == a
    assert a * -1 == -a
    assert a / 2 == a * 0.5


@given(displacements(small, st.integers(0, 4)))
def test_merging_sums_exactly_and_rounds_once(a: Displacement) -> None:
    merged = a.merged()
    assert len(set(merged.seeds)) == len(merged) == len(set(a.seeds))
    for seed, coeff in merged:
        exact = sum((Fraction(c) for s, c in a if s == seed), Fraction(0))
        assert coeff == torch.tensor(float(exact), dtype=torch.float64).float().item()
    assert merged.merged() == merged
    cancelled = (a - a).merged(drop_zeros=True)
    assert len(cancelled) == 0
    assert all(c == 0 for _, c in (a - a).merged())


def test_merging_keeps_the_order_of_first_occurrence() -> None:
    d = Displacement([3, 1, 3, 2], [1, 1, 1, 1])
    assert d.merged() == Displacement([3, 1, 2], [2, 1, 1])


def test_distributions_do_not_mix() -> None:
    a, b = Displacement([1], [1]), Displacement([1], [1], distribution="rademacher")
    for combine in (lambda: a + b, lambda: a - b, lambda: Displacement.concatenate([a, b])):
        with pytest.raises(ValueError, match="one distribution"):
            combine()


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e39])
def test_scaling_out_of_range(factor: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Displacement([1], [1.0]) * factor


@pytest.mark.parametrize("other", ["x", None, [1.0]])
def test_operators_refuse_other_types(other: object) -> None:
    d = Displacement([1], [1.0])
    for combine in (lambda: d + other, lambda: d - other, lambda: d * other, lambda: d / other):
        with pytest.raises(TypeError):
            combine()
    with pytest.raises(TypeError):
        d * d
    with pytest.raises(ValueError, match="not 0"):
        d / 0


# --- tensors and bytes ----------------------------------------------------------------------------


@given(displacements())
def test_round_trips(a: Displacement) -> None:
    keys, values = a.tensors()
    assert keys.dtype == torch.int64 and values.dtype == torch.float32
    assert Displacement.from_tensors(keys, values, distribution=a.distribution) == a
    data = a.encode()
    assert len(data) == HEADER + 12 * len(a)
    assert Displacement.decode(data) == a
    assert Displacement.decode(memoryview(bytearray(data))).encode() == data
    assert pickle.loads(pickle.dumps(a)) == a == copy.deepcopy(a)


def test_the_bytes_are_little_endian_and_stable() -> None:
    d = Displacement([1, -2], [1.5, -0.25], distribution="rademacher")
    assert d.encode() == b"ZOdp" + struct.pack("<BBHI2q2f", 1, 1, 1, 2, 1, -2, 1.5, -0.25)


def test_bad_tensors() -> None:
    good = torch.tensor([1])
    with pytest.raises(TypeError, match="int64 vector"):
        Displacement.from_tensors(torch.tensor([1.0]), torch.tensor([1.0]))
    with pytest.raises(TypeError, match="int64 vector"):
        Displacement.from_tensors(torch.tensor(1), torch.tensor([1.0]))
    with pytest.raises(TypeError, match="floating-point vector"):
        Displacement.from_tensors(good, torch.tensor([1]))
    with pytest.raises(TypeError, match="floating-point vector"):
        Displacement.from_tensors(good, torch.tensor(1.0))
    with pytest.raises(ValueError, match="finite"):
        Displacement.from_tensors(good, torch.tensor([torch.nan]))


EXAMPLE = Displacement([1, 2, 3], [0.5, 1.5, 2.5]).encode()


@pytest.mark.parametrize("length", range(len(EXAMPLE)))
def test_every_truncation_is_refused(length: int) -> None:
    with pytest.raises(EncodingError) as caught:
        Displacement.decode(EXAMPLE[:length])
    assert isinstance(caught.value, TruncatedError) or length == 0


def changed(offset: int, value: bytes) -> bytes:
    return EXAMPLE[:offset] + value + EXAMPLE[offset + len(value) :]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (EXAMPLE + b"\0", TrailingBytesError, "1 more"),
        (changed(0, b"PNG!"), EncodingError, "no encoded displacement"),
        (changed(4, b"\x07"), UnknownVersionError, "format must be 1; got 7"),
        (changed(5, b"\x09"), EncodingError, "distribution code"),
        (changed(6, b"\x02\0"), UnknownVersionError, "contract version must be 1; got 2"),
        (changed(8, b"\xff\xff\xff\xff"), TruncatedError, "4294967295 terms"),
        (changed(8, b"\x02\0\0\0"), TrailingBytesError, "12 more"),
        (changed(HEADER + 24, struct.pack("<f", math.nan)), NonFiniteError, "coefficient 0"),
        (changed(HEADER + 32, struct.pack("<f", -math.inf)), NonFiniteError, "coefficient 2"),
    ],
)
def test_bad_bytes(data: bytes, error: type[EncodingError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Displacement.decode(data)
    assert type(caught.value) is error


@given(st.binary(max_size=64), displacements(), st.integers(0, 200), st.integers(1, 255))
@settings(max_examples=300)
def test_arbitrary_bytes_decode_or_raise(
    noise_bytes: bytes, a: Displacement, at: int, flip: int
) -> None:
    damaged = bytearray(a.encode())
    damaged[at % len(damaged)] ^= flip
    for data in (noise_bytes, bytes(damaged)):
        try:
            decoded = Displacement.decode(data)
        except EncodingError:
            continue
        assert decoded.encode() == data


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_apply_adds_the_written_out_vector(distribution: str) -> None:
    d = Displacement([11, -4, 11], [0.5, -0.125, 1e-3], distribution=distribution)
    named = weights()
    expected = {
        n: w.double() + v
        for (n, w), v in zip(named.items(), written_out(d, named).values(), strict=True)
    }
    d.apply_(named)
    for name, w in named.items():
        torch.testing.assert_close(w.double(), expected[name], atol=2e-6, rtol=1e-6)


def test_apply_and_its_negative_cancel_to_rounding_and_parts_commute() -> None:
    d = Displacement([1, 2], [1e-2, 3e-2])
    named, before = weights(), weights()
    d.apply_(named)
    (-d).apply_(named)
    for name in named:
        torch.testing.assert_close(named[name], before[name], atol=5e-7, rtol=0)
    together, apart = weights(), weights()
    (d + d).apply_(together)
    d.apply_(apart)
    d.apply_(apart)
    for name in named:
        assert torch.equal(together[name], apart[name])  # float32: the same sums in the same order
    merged = weights()
    (d + d).merged().apply_(merged)
    for name in named:
        torch.testing.assert_close(merged[name], together[name], atol=5e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apply_rounds_once(dtype: torch.dtype) -> None:
    d = Displacement([5, 6, 7], [1e-2, -2e-2, 1e-2])
    exact = {n: w.float() for n, w in weights(dtype).items()}
    d.apply_(exact)
    nearest = weights(dtype)
    d.apply_(nearest, rounding="nearest")
    for name, w in nearest.items():
        assert torch.equal(w, exact[name].to(dtype))
    stochastic = weights(dtype)
    d.apply_(stochastic)
    for name, w in stochastic.items():
        shape = noise.matrix_shape(w.shape)
        bits = noise.rounding_bits(*shape, torch.tensor(7), noise.parameter_id(name), 1)
        assert torch.equal(w, noise.round_to(exact[name], dtype, bits.reshape(w.shape)))


def test_scale_of_single_parameters() -> None:
    d = Displacement([1, 2], [0.5, 0.25])
    named = weights()
    d.apply_(named, scale={"a.bias": 2.0, "scalar": 0.0})
    plain, twice = weights(), weights()
    d.apply_(plain)
    (d * 2).apply_(twice)
    assert torch.equal(named["a.weight"], plain["a.weight"])
    assert torch.equal(named["a.bias"], twice["a.bias"])
    assert torch.equal(named["scalar"], weights()["scalar"])


def test_apply_to_a_module_moves_trainable_parameters_and_ties_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["c"] = nn.Linear(4, 4)
    model["b"].weight = model["a"].weight
    model["c"].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    d = Displacement([9], [1.0])
    d.apply_(model)
    z = zo.directions(model, seed=9)
    assert set(z) == {"a.weight", "c.bias"}
    torch.testing.assert_close(model["a"].weight.data, before["a.weight"] + z["a.weight"])
    assert torch.equal(model["c"].weight, before["c.weight"])
    d.apply_(zo.bind(model))
    # A state dict holds the tied weight twice, in one storage: it moves once too.
    state = {n: t for n, t in model.state_dict().items() if n != "c.weight"}
    d.apply_(state)
    torch.testing.assert_close(
        model["b"].weight.data, before["a.weight"] + 3 * z["a.weight"], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_displaced_and_applied_weights_are_the_same(distribution: str) -> None:
    model = nn.Linear(300, 4)
    d = Displacement([3, 4, 5], [0.5, -0.25, 1e-3], distribution=distribution)
    with zo.displaced(model, d):
        seen = {n: t.clone() for n, t in model.state_dict().items()}
    d.apply_(model)
    for name, w in model.state_dict().items():
        assert torch.equal(w, seen[name])


def test_nothing_to_add_changes_no_bit() -> None:
    named = {"w": torch.tensor([-0.0, 0.0, 1.0])}
    for d in (Displacement(), Displacement([1], [0.0]), Displacement([1], [1.0]) * -0.0):
        d.apply_(named)
        assert torch.signbit(named["w"]).tolist() == [True, False, False]


def test_apply_errors_change_nothing() -> None:
    d = Displacement([1], [1.0])
    named = weights()
    model = nn.Linear(3, 3)
    binding = zo.Binding(model)
    kept = copy.deepcopy(model.state_dict())
    cases = [
        (lambda: d.apply_(named, rounding="up"), ValueError, "rounding must be one of"),
        (lambda: d.apply_(named, scale={"b": 1.0}), ValueError, "'b', which is no parameter"),
        (lambda: d.apply_(named, scale={"scalar": math.nan}), ValueError, "must be finite"),
        (lambda: d.apply_(named, scale={"scalar": 1e39}), ValueError, "finite"),
        (lambda: d.apply_({}), ValueError, "no tensor"),
        (lambda: d.apply_({"i": torch.zeros(3, dtype=torch.int64)}), TypeError, "'i' has dtype"),
        (lambda: d.apply_(torch.zeros(3)), TypeError, "model must be"),
        (lambda: d.apply_({"x": 1.0}), TypeError, "pairs"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ModelChangedError, match="'weight' was replaced"):
        d.apply_(binding)
    assert all(torch.equal(w, v) for w, v in zip(named.values(), weights().values(), strict=True))
    assert torch.equal(model.bias, kept["bias"])


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_norm_estimate(distribution: str) -> None:
    d = Displacement([1, 2, 1], [0.5, -1.0, 0.25], distribution=distribution)
    named = {"w": torch.zeros(64, 1000)}
    d.apply_(named)
    exact = named["w"].norm().item()
    assert d.norm_estimate(64_000) == pytest.approx(exact, rel=0.02)
    assert d.norm_estimate(64_000) == pytest.approx(math.sqrt(64_000 * (0.75**2 + 1)))
    assert Displacement().norm_estimate(10) == 0.0
    with pytest.raises(ValueError, match="negative"):
        d.norm_estimate(-1)
