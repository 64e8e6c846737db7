"""How the server makes one list of scalars of many: mean, median, trimmed mean; clipping.

Only scalars of the same direction can be compared, so median and trimmed mean are for methods
whose clients share their seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RULES = ("mean", "median", "trimmed_mean")

Scalars = Sequence[float]


def clipped(scalars: Scalars, limit: float | None) -> tuple[float, ...]:
    """Each scalar moved into ``[-limit, limit]``; unchanged when ``limit`` is None.

    Raises:
        ValueError: the limit is not positive.
    """
    if limit is None:
        return tuple(scalars)
    if not limit > 0:
        raise ValueError(f"clip must be positive or None; got {limit!r}")
    return tuple(max(-limit, min(limit, x)) for x in scalars)


def _table(scalars: Sequence[Scalars]) -> NDArray[np.float64]:
    lengths = {len(row) for row in scalars}
    if len(lengths) != 1:
        raise ValueError(f"clients must have equally many scalars; got lengths {sorted(lengths)}")
    return np.asarray(scalars, dtype=np.float64)


def mean(scalars: Sequence[Scalars], weights: Scalars | None = None) -> tuple[float, ...]:
    """``sum_k w_k g_k[t] / sum_k w_k`` for every ``t``.

    Args:
        scalars: ``[clients][T]``.
        weights: one per client, not negative, with a positive sum; None for equal ones.

    Raises:
        ValueError: lengths differ, or the weights are unusable.
    """
    table = _table(scalars)
    w = _weights(weights, len(table))
    return tuple((w[:, None] * table).sum(axis=0).tolist())


def median(scalars: Sequence[Scalars]) -> tuple[float, ...]:
    """The coordinate-wise median; the mean of the middle two for an even number of clients.

    Source: Yin et al. 2018, definition 1.

    Args:
        scalars: ``[clients][T]``.
    """
    return tuple(np.median(_table(scalars), axis=0).tolist())


def trimmed_mean(scalars: Sequence[Scalars], trim: float = 0.1) -> tuple[float, ...]:
    """The coordinate-wise mean without the ``floor(trim * clients)`` smallest and largest.

    Source: Yin et al. 2018, definition 2.

    Args:
        scalars: ``[clients][T]``.
        trim: share cut off on each side, in [0, 0.5).

    Raises:
        ValueError: ``trim`` is out of range.
    """
    check_trim(trim)
    table = np.sort(_table(scalars), axis=0)
    cut = math.floor(trim * len(table))
    return tuple(table[cut : len(table) - cut].mean(axis=0).tolist())


def check_trim(trim: float) -> float:
    """Return ``trim`` or raise ValueError."""
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be in [0, 0.5); got {trim!r}")
    return trim


def aggregate(
    scalars: Sequence[Scalars],
    weights: Scalars | None = None,
    *,
    rule: str = "mean",
    trim: float = 0.1,
) -> tuple[float, ...]:
    """Scalars of clients that may have stopped early: lists of different lengths.

    Coordinate ``t`` is the rule's value over the clients that have one, times their share of the
    weight: a client that made fewer steps adds nothing to the later ones, as in the mean of the
    clients' weights.

    Args:
        scalars: by client, ``[T_k]``.
        weights: one per client; None for equal ones. Median and trimmed mean use them only for the
            share.
        rule: ``"mean"``, ``"median"`` or ``"trimmed_mean"``.
        trim: see :func:`trimmed_mean`.

    Raises:
        ValueError: unknown rule, no client, unusable weights.
    """
    if rule not in RULES:
        raise ValueError(f"aggregate must be one of {list(RULES)}; got {rule!r}")
    if not scalars:
        raise ValueError("there is no client to aggregate")
    w = _weights(weights, len(scalars))
    values: list[float] = []
    for t in range(max(map(len, scalars))):
        present = [k for k, row in enumerate(scalars) if len(row) > t]
        column = [(scalars[k][t],) for k in present]
        shares = [float(w[k]) for k in present]
        share = math.fsum(shares)
        if share == 0:
            values.append(0.0)
        elif rule == "mean":
            values.append(mean(column, shares)[0] * share)
        elif rule == "median":
            values.append(median(column)[0] * share)
        else:
            values.append(trimmed_mean(column, trim)[0] * share)
    return tuple(values)


def _weights(weights: Scalars | None, count: int) -> NDArray[np.float64]:
    """Weights that sum to 1."""
    if weights is None:
        return np.full(count, 1 / count)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (count,) or not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise ValueError(
            f"weights must be {count} finite numbers, not negative, with a positive sum; got "
            f"{list(weights)}"
        )
    normalised: NDArray[np.float64] = w / w.sum()
    return normalised
