"""Which client holds which training examples.

Written here because ``flwr-datasets`` does not serve: importing its partitioners needs seaborn and
pandas, they hand out rows where a simulation wants indices, its natural-id partitioner makes one
client of every id, and its IID partitioner does not shuffle. The distributions are the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("iid", "dirichlet", "natural", "label")

# Draws of the Dirichlet shares before it is said that they cannot be had.
_ATTEMPTS = 100


@dataclass(frozen=True)
class Split:
    """How the examples are spread over the clients.

    ``iid``; ``dirichlet:ALPHA`` (each label's examples in Dirichlet(alpha) shares; small alpha is
    far from IID); ``natural[:COLUMN]`` (whole groups by an id in the data); ``label[:N]`` (the
    first N clients, default all, hold one label each, the rest are IID).
    """

    kind: str
    alpha: float = 0.5
    column: str | None = None
    clients: int | None = None

    @classmethod
    def parse(cls, text: str) -> Split:
        """A split from its text.

        Raises:
            ValueError: another form or value.
        """
        kind, colon, value = text.partition(":")
        forms = "iid, dirichlet:ALPHA, natural[:COLUMN] or label[:CLIENTS]"
        if kind not in KINDS or (colon and not value) or (kind == "iid" and colon):
            raise ValueError(f"split must be {forms}; got {text!r}")
        try:
            if kind == "dirichlet":
                alpha = float(value or 0.5)
                if not 0.0 < alpha < float("inf"):
                    raise ValueError
                return cls(kind, alpha=alpha)
            if kind == "label" and value:
                count = int(value)
                if count < 1:
                    raise ValueError
                return cls(kind, clients=count)
        except ValueError:
            what = "a number above 0" if kind == "dirichlet" else "a count of clients above 0"
            raise ValueError(f"split {kind} takes {what}; got {text!r}") from None
        return cls(kind, column=value or None)


def partition(
    split: Split,
    count: int,
    clients: int,
    *,
    labels: Sequence[int] | None = None,
    natural_ids: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Example indices of every client: disjoint, covering ``range(count)``, none empty.

    Raises:
        ValueError: more clients than the split can serve, or no labels or ids where it needs them.
    """
    if clients < 1:
        raise ValueError(f"clients must be at least 1; got {clients}")
    if clients > count:
        raise ValueError(f"clients must be at most the {count} examples; got {clients}")
    if split.kind == "iid":
        return iid(count, clients, seed=seed)
    if split.kind == "natural":
        if natural_ids is None:
            raise ValueError("split natural needs an id column: natural:COLUMN")
        return natural(natural_ids, clients, seed=seed)
    if labels is None:
        raise ValueError(f"split {split.kind} needs labelled examples; this task has no labels")
    if split.kind == "dirichlet":
        return dirichlet(labels, clients, alpha=split.alpha, seed=seed)
    return single_label(labels, clients, single=split.clients, seed=seed)


def iid(count: int, clients: int, *, seed: int = 0) -> list[list[int]]:
    """A random permutation cut into parts whose sizes differ by at most one."""
    order = np.random.default_rng(seed).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, clients)]


def dirichlet(
    labels: Sequence[int], clients: int, *, alpha: float, seed: int = 0
) -> list[list[int]]:
    """Each label's examples dealt in shares ``p ~ Dirichlet(alpha, ..., alpha)``.

    Drawn again until every client has an example; where 100 draws do not do (many clients, small
    alpha), a client without any takes one from the largest.

    Source: Hsu et al. 2019 (arXiv 1909.06335).
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    for _ in range(_ATTEMPTS):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(values):
            members = rng.permutation(np.flatnonzero(values == label))
            shares = rng.dirichlet(np.full(clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chosen in zip(parts, np.split(members, cuts), strict=True):
                part += chosen.tolist()
        if all(parts):
            break
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [sorted(part) for part in parts]


def natural(ids: Sequence[Hashable], clients: int, *, seed: int = 0) -> list[list[int]]:
    """Whole groups of equal id; when there are more ids than clients, the next group goes to the
    client with the fewest examples, largest group first.

    Raises:
        ValueError: fewer ids than clients.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(ids):
        groups.setdefault(key, []).append(index)
    if len(groups) < clients:
        raise ValueError(
            f"clients must be at most the {len(groups)} different ids of a natural split; "
            f"got {clients}"
        )
    shuffled = [
        list(groups.values())[i] for i in np.random.default_rng(seed).permutation(len(groups))
    ]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for group in sorted(shuffled, key=len, reverse=True):
        min(parts, key=len).extend(group)
    return [sorted(part) for part in parts]


def single_label(
    labels: Sequence[int], clients: int, *, single: int | None = None, seed: int = 0
) -> list[list[int]]:
    """The first ``single`` clients (default all) hold one label each, in turn; the rest are IID.

    Every client gets about ``len(labels) / clients`` examples.

    Raises:
        ValueError: ``single`` exceeds ``clients``, or a label has too few examples.
    """
    single = clients if single is None else single
    if single > clients:
        raise ValueError(f"split label: {single} single-label clients of {clients} clients")
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    names = np.unique(values)
    if single == clients and clients < len(names):
        raise ValueError(
            f"split label needs a client for each of {len(names)} labels; got {clients}"
        )
    pools = {label: rng.permutation(np.flatnonzero(values == label)).tolist() for label in names}
    holders = {
        label: [k for k in range(single) if names[k % len(names)] == label] for label in names
    }
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label, pool in pools.items():
        if not holders[label]:
            continue
        # With IID clients left, a single-label client takes no more than its share of the whole.
        share = len(pool) // len(holders[label])
        if single < clients:
            # Some of each label stays for them.
            share = min(share, len(values) // clients, len(pool) // (len(holders[label]) + 1))
        if share < 1:
            raise ValueError(
                f"split label: label {label} has {len(pool)} examples for "
                f"{len(holders[label])} clients"
            )
        for k in holders[label]:
            parts[k] = [pool.pop() for _ in range(share)]
        if single == clients:
            parts[holders[label][0]] += pool
            pools[label] = []
    rest = rng.permutation([index for pool in pools.values() for index in pool]).astype(int)
    if single < clients:
        for k, chosen in enumerate(np.array_split(rest, clients - single), start=single):
            parts[k] = chosen.tolist()
    if not all(parts):
        raise ValueError(f"split label leaves a client without examples: {len(labels)} are too few")
    return [sorted(part) for part in parts]
