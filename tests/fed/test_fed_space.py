"""The values that move: copies, bytes, fingerprints, and what is refused with nothing changed."""

from __future__ import annotations

import math

import fed_zoo as zoo
import pytest
import torch

import zokernels as zo
from fedzo.space import Space, Terms, Update
from zokernels.masks import Mask


def space(dtype: torch.dtype = torch.float32, masked: bool = False, **options: str) -> Space:
    model = zoo.build(dtype)
    mask = Mask.random(model, 0.05, seed=1) if masked else None
    return Space(zo.bind(model, mask=mask), **options)


SPACES = [(d, m) for d in (torch.float32, torch.bfloat16) for m in (False, True)]


@pytest.mark.parametrize(("dtype", "masked"), SPACES)
def test_what_moved_comes_back(dtype, masked):
    """Many clients from one copy: after each, the very bits of the server."""
    s = space(dtype, masked)
    before, values = zoo.weights(s.model), {n: v.clone() for n, v in s.values().items()}
    copies = set()
    for client in range(3):
        for t in range(2):
            s.move_(Update.one([10 * client + t], [0.5]))
        assert zoo.differing(zoo.weights(s.model), before)
        copies.add(id(s._held))
        s.restore_()
        assert not zoo.differing(zoo.weights(s.model), before)
        assert not zoo.differing(s.values(), values)
    assert len(copies) == 1
    s.restore_()  # twice does no harm
    assert not zoo.differing(zoo.weights(s.model), before)
    s.apply_(Update.one([3], [0.5]))
    moved = zoo.weights(s.model)
    s.move_(Update.one([4], [0.5]))
    s.restore_()
    assert not zoo.differing(zoo.weights(s.model), moved)


@pytest.mark.parametrize(("dtype", "masked"), SPACES)
def test_bytes_are_the_values(dtype, masked):
    s = space(dtype, masked)
    data = s.to_bytes()
    assert len(data) == s.nbytes == s.numel * (2 if dtype == torch.bfloat16 and not masked else 4)
    before = {n: v.clone() for n, v in s.values().items()}
    s.apply_(Update.one([1], [1.0]))
    assert zoo.differing(s.values(), before)
    s.load_(s.from_bytes(data))
    assert not zoo.differing(s.values(), before)
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(ValueError, match=f"are {len(data)} bytes; got {len(wrong)}"):
            s.from_bytes(wrong)


def test_fingerprints_tell_meanings_apart():
    prints = [
        space().fingerprint,
        space(torch.bfloat16).fingerprint,
        space(masked=True).fingerprint,
        space(distribution="rademacher").fingerprint,
        space(rounding="nearest").fingerprint,
    ]
    assert len(set(prints)) == 5 and space().fingerprint == prints[0]
    assert all(0 <= p < 2**64 for p in prints)


def test_what_is_refused_changes_nothing():
    s = space()
    before = zoo.weights(s.model)
    values = {n: v.clone() for n, v in s.values().items()}
    name = next(iter(values))
    for update, message in (
        (Update.one([1, 2], [0.1, math.nan]), "finite in float32"),
        (Update.one([1], [1e39]), "finite in float32"),
        (Update((Terms.one([1], [0.1]),) * 2), "must have 1 groups; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            s.apply_(update)
    for bad, message in (
        ({k: v for k, v in values.items() if k != name}, "differing"),
        ({**values, "more": torch.zeros(1)}, "differing"),
        ({**values, name: values[name][:1]}, "must be"),
        ({**values, name: values[name].double()}, "must be"),
    ):
        with pytest.raises(ValueError, match=message):
            s.load_(bad)
    with pytest.raises(ValueError, match="equal lengths; got 1, 2"):
        Update.one([1], [1.0, 2.0])
    assert not zoo.differing(zoo.weights(s.model), before)


def test_groups_are_apart():
    model = zoo.build()
    names = [n for n, _ in model.named_parameters()]
    one, two = zo.bind(model, names[:3]), zo.bind(model, names[3:])
    both = Space(one, two)
    before = zoo.weights(model)
    both.apply_(Update((Terms(), Terms.one([1], [0.5]))))
    assert set(zoo.differing(zoo.weights(model), before)) == set(names[3:])
    with pytest.raises(ValueError, match="in common"):
        Space(one, zo.bind(model, names[2:]))
    with pytest.raises(ValueError, match="one model"):
        Space(one, zo.bind(zoo.build()))
    with pytest.raises(ValueError, match="one group"):
        both.losses(lambda: torch.zeros(()), [1], [[0.1]])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("masked", [False, True])
def test_projections_and_distances_by_hand(distribution, masked):
    """``<v, z(s)>`` and ``sum_p ||D_k - mean D||`` with the directions written out."""
    s = space(masked=masked, distribution=distribution)
    seeds = [5, 6, 7]

    def direction(p, seed):
        rows, cols = p.matrix if p.masked is None else (1, p.moving)
        z = torch.ops.zokernels.sample(rows, cols, torch.tensor(seed), p.id, 0, 0, distribution)
        return z.double().flatten()

    vectors = {p.name: torch.randn(p.moving).view(v.shape) for p, v in zip(
        s.params, s.values().values(), strict=True)}  # fmt: skip
    want = [sum(float(vectors[p.name].double().flatten() @ direction(p, k)) for p in s.params)
            for k in seeds]  # fmt: skip
    assert s.project(vectors, seeds) == pytest.approx(want, rel=1e-5, abs=1e-4)

    coeffs = [[1.0, 0.5, 0.0], [0.0, -2.0, 1.0]]
    paths = [Update.path(Update.one([k], [c]) for k, c in zip(seeds, row, strict=True))
             for row in coeffs]  # fmt: skip
    distances = [0.0, 0.0]
    for p in s.params:
        moves = [sum(c * direction(p, k) for k, c in zip(seeds, row, strict=True))
                 for row in coeffs]  # fmt: skip
        middle = (moves[0] + moves[1]) / 2
        distances = [d + float((m - middle).norm()) for d, m in zip(distances, moves, strict=True)]
    assert s.deviations(paths) == pytest.approx(distances, rel=1e-5)
