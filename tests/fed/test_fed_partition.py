"""Client splits: disjoint, complete, deterministic, and as skewed as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.data import Split, partition


@given(
    text=st.sampled_from(
        ["iid", "dirichlet:0.1", "dirichlet:0.5", "dirichlet:100", "label", "natural"]
    ),
    labels=st.lists(st.integers(0, 2), min_size=24, max_size=90),
    clients=st.integers(3, 6),
    seed=st.integers(0, 5),
)
def test_every_example_has_one_client_and_every_client_an_example(text, labels, clients, seed):
    labels += [0, 1, 2] * 6  # enough of each for single-label clients
    ids = [f"author {i % 7}" for i in range(len(labels))]
    split = Split.parse(text)
    shards = partition(split, len(labels), clients, labels=labels, natural_ids=ids, seed=seed)
    assert len(shards) == clients and all(shards)
    assert sorted(i for shard in shards for i in shard) == list(range(len(labels)))
    again = partition(split, len(labels), clients, labels=labels, natural_ids=ids, seed=seed)
    assert again == shards


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large():
    labels = np.arange(4000) % 4

    def skew(alpha: str) -> float:
        """Mean over clients of the share of the most frequent label."""
        shares = []
        for seed in range(5):
            for shard in partition(Split.parse(alpha), 4000, 10, labels=labels, seed=seed):
                counts = np.bincount(labels[shard], minlength=4)
                shares.append(counts.max() / counts.sum())
        return float(np.mean(shares))

    assert skew("dirichlet:0.05") > 0.75 > skew("dirichlet:0.5") > 0.45
    assert skew("dirichlet:1000") < 0.3


def test_dirichlet_shares_have_the_distributions_mean_and_variance():
    """A share of Dirichlet(a, ..., a) over n clients has variance (n - 1) / (n^2 (n a + 1))."""
    clients, alpha, count = 5, 0.8, 1000
    split = Split.parse(f"dirichlet:{alpha}")
    sizes = np.array(
        [
            [len(s) for s in partition(split, count, clients, labels=[0] * count, seed=seed)]
            for seed in range(400)
        ]
    )
    shares = sizes / count
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.mean(0) == pytest.approx(np.full(clients, 1 / clients), abs=0.03)
    assert shares.var() == pytest.approx(variance, rel=0.1)


def test_more_dirichlet_clients_than_draws_can_fill_still_have_an_example_each():
    shards = partition(Split.parse("dirichlet:0.01"), 60, 50, labels=[0, 1] * 30)
    assert min(map(len, shards)) == 1 and sum(map(len, shards)) == 60


def test_single_label_clients_hold_one_label_and_the_rest_all():
    labels = [i % 4 for i in range(400)]
    shards = partition(Split.parse("label"), 400, 8, labels=labels)
    held = [{labels[i] for i in shard} for shard in shards]
    assert held == [{0}, {1}, {2}, {3}] * 2
    mixed = partition(Split.parse("label:3"), 400, 10, labels=labels)
    held = [{labels[i] for i in shard} for shard in mixed]
    assert held[:3] == [{0}, {1}, {2}] and all(h == {0, 1, 2, 3} for h in held[3:])
    assert max(map(len, mixed)) - min(map(len, mixed)) <= 1


def test_natural_groups_stay_whole_and_are_balanced():
    ids = [f"id{i % 9}" for i in range(90)] + ["id0"] * 30
    shards = partition(Split.parse("natural:author"), 120, 4, natural_ids=ids)
    owners = {
        key: {k for k, s in enumerate(shards) if any(ids[i] == key for i in s)} for key in ids
    }
    assert all(len(clients) == 1 for clients in owners.values())
    assert max(map(len, shards)) <= 40


def test_a_seed_changes_the_split():
    first, second = (partition(Split.parse("iid"), 50, 5, seed=s) for s in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipf", "split must be iid, dirichlet"),
        ("iid:3", "split must be iid"),
        ("dirichlet:", "split must be iid"),
        ("dirichlet:0", "number above 0"),
        ("dirichlet:inf", "number above 0"),
        ("dirichlet:x", "number above 0"),
        ("label:0", "count of clients above 0"),
        ("label:1.5", "count of clients above 0"),
    ],
)
def test_a_bad_split_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Split.parse(text)


@pytest.mark.parametrize(
    ("split", "count", "clients", "arguments", "message"),
    [
        ("iid", 3, 4, {}, "at most the 3 examples; got 4"),
        ("iid", 3, 0, {}, "at least 1; got 0"),
        ("natural", 4, 2, {}, "needs an id column"),
        ("natural", 4, 3, {"natural_ids": "aabb"}, "the 2 different ids"),
        ("dirichlet:1", 4, 2, {}, "needs labelled examples"),
        ("label", 4, 2, {}, "needs labelled examples"),
        ("label", 6, 2, {"labels": [0, 1, 2] * 2}, "a client for each of 3 labels; got 2"),
        ("label:5", 6, 2, {"labels": [0, 1] * 3}, "5 single-label clients of 2 clients"),
        ("label:2", 6, 4, {"labels": [0, 0, 0, 0, 0, 1]}, "label 1 has 1 examples for 1 clients"),
    ],
)
def test_a_split_that_cannot_be_had_says_why(split, count, clients, arguments, message):
    with pytest.raises(ValueError, match=message):
        partition(Split.parse(split), count, clients, **arguments)
