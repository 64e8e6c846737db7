"""Mean, median, trimmed mean and clipping of scalars, against plain formulas."""

from __future__ import annotations

import math

import fed_zoo as zoo
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.aggregate import aggregate, clipped, mean, median, trimmed_mean
from fedzo.messages import Report

TABLE = [[1.0, -2.0, 10.0], [2.0, 0.0, -1.0], [9.0, 4.0, 0.5], [0.0, 1.0, 1.0]]


def test_mean_is_weighted():
    assert mean(TABLE) == pytest.approx([3.0, 0.75, 2.625])
    weights = [1, 0, 3, 4]
    want = [sum(w * r[t] for w, r in zip(weights, TABLE, strict=True)) / 8 for t in range(3)]
    assert mean(TABLE, weights) == pytest.approx(want)


def test_median_is_by_coordinate():
    assert median(TABLE) == pytest.approx([1.5, 0.5, 0.75])
    assert median(TABLE[:3]) == pytest.approx([2.0, 0.0, 0.5])


def test_trimmed_mean_leaves_out_both_ends():
    assert trimmed_mean(TABLE, 0.25) == pytest.approx([1.5, 0.5, 0.75])
    assert trimmed_mean(TABLE, 0.2) == pytest.approx(mean(TABLE))
    assert trimmed_mean(TABLE, 0.0) == pytest.approx(mean(TABLE))
    with pytest.raises(ValueError, match=r"trim must be in \[0, 0.5\); got 0.5"):
        trimmed_mean(TABLE, 0.5)


def test_clipping():
    assert clipped([-3.0, 0.5, 2.0], 1.0) == (-1.0, 0.5, 1.0)
    assert clipped([-3.0, 0.5], None) == (-3.0, 0.5)
    with pytest.raises(ValueError, match="clip must be positive"):
        clipped([1.0], 0.0)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=9))
def test_against_numpy(rows):
    table = np.array(rows)
    for rule, want in (("mean", table.mean(0)), ("median", np.median(table, axis=0))):
        assert aggregate(rows, rule=rule) == pytest.approx(want.tolist(), abs=1e-6)


@given(
    st.lists(st.floats(-10, 10), min_size=5, max_size=5),
    st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2),
)
def test_few_liars_do_not_move_median_and_trimmed_mean_far(honest, lies):
    """Two of seven: the result stays within what honest clients said."""
    rows = [[x] for x in (*lies, *honest)]
    low, high = min(honest), max(honest)
    (m,) = aggregate(rows, rule="median")
    (t,) = aggregate(rows, rule="trimmed_mean", trim=0.3)
    assert low <= m <= high
    assert low - 1e-9 <= t <= high + 1e-9


def test_clients_that_stopped_early_add_nothing_later():
    """As in the mean of the clients' weights: their missing coordinates are zeros."""
    rows = [[1.0, 2.0, 3.0], [4.0], [7.0, 8.0, 9.0]]
    assert aggregate(rows) == pytest.approx([4.0, 10 / 3, 4.0])
    assert aggregate(rows, [1, 2, 1]) == pytest.approx([4.0, 2.5, 3.0])
    # Median and trimmed mean are over those that have the coordinate, times their share.
    assert aggregate(rows, rule="median") == pytest.approx([4.0, 5 * 2 / 3, 6 * 2 / 3])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no client"),
        ([[1.0]], {"rule": "mode"}, "aggregate must be one of"),
        ([[1.0]], {"weights": [-1.0]}, "weights must be"),
        ([[1.0], [2.0]], {"weights": [0.0, 0.0]}, "weights must be"),
        ([[1.0], [2.0]], {"weights": [1.0]}, "weights must be"),
        ([[1.0]], {"weights": [math.nan]}, "weights must be"),
    ],
)
def test_what_cannot_be_aggregated(rows, options, message):
    with pytest.raises(ValueError, match=message):
        aggregate(rows, **options)


def poisoned(limit: float):
    """A channel on which client 3 lies by a large factor."""

    def channel(client: int, data: bytes) -> list[bytes]:
        if client != 3:
            return [data]
        r = Report.decode(data)
        lie = Report(round=r.round, client=3, fingerprint=r.fingerprint, scalars=(limit,) * 3)
        return [lie.encode()]

    return channel


@pytest.mark.parametrize("defence", [{"aggregate": "median"}, {"clip": 5.0}, {"trim": 0.3}])
def test_a_federation_withstands_a_liar(defence):
    """With a defence the weights move as far as without the liar, up to a small factor."""
    if "trim" in defence:
        defence = {"aggregate": "trimmed_mean", **defence}

    def distance(**given):
        fed = zoo.federation("meerkat", **given)
        start = zoo.weights(fed.model)
        list(fed.run(1))
        return max(
            float((p.detach() - start[n]).abs().max()) for n, p in fed.model.named_parameters()
        )

    honest = distance()
    assert distance(channel=poisoned(1e6)) > 1e3 * honest
    assert distance(channel=poisoned(1e6), **defence) < 20 * honest


def test_rules_that_compare_need_shared_directions():
    for name in ("fedmezo", "fedkseed", "fedavg"):
        with pytest.raises(ValueError, match="do not share"):
            zoo.federation(name, aggregate="median")
    zoo.federation("fedmezo", aggregate="median", options={"seeds": "shared"})
