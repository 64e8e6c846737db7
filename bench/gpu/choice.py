"""Which backend was measured faster: the entries of the registry's table.

A backend wins an op where it is faster in the geometric mean over all cases that both were timed
at, by more than the spread: the mean, over these cases, of how far the 80th percentile of a time is
above the 20th (half of it, of both times together).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zokernels import _choice


@dataclass(frozen=True)
class Comparison:
    """Two backends at the cases of one op.

    Attributes:
        op: name; first: the backend the registry's order serves; other: the one held against it.
        ratio: time of ``first`` over that of ``other``, geometric mean; spread: a factor above 1.
        cases: how many.
    """

    op: str
    first: str
    other: str
    ratio: float
    spread: float
    cases: int

    @property
    def winner(self) -> str | None:
        """The faster one, or None within the spread."""
        if self.ratio > self.spread:
            return self.other
        return self.first if 1 / self.ratio > self.spread else None


def compare(rows: Iterable[Mapping[str, object]], order: list[str]) -> list[Comparison]:
    """Every later backend of ``order`` against the first one that has the op.

    Args:
        rows: of the ops' CSV.
        order: backends as the registry tries them.
    """
    timed: dict[str, dict[tuple[object, ...], dict[str, Mapping[str, object]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        case = tuple(row[k] for k in ("case", "dtype", "distribution", "shape"))
        timed[str(row["op"])][case][str(row["backend"])] = row
    found = []
    for op, cases in timed.items():
        present = [b for b in order if any(b in of_case for of_case in cases.values())]
        for other in present[1:]:
            both = [c for c in cases.values() if present[0] in c and other in c]
            if both:
                found.append(_compared(op, present[0], other, both))
    return found


def _compared(
    op: str, first: str, other: str, cases: list[dict[str, Mapping[str, object]]]
) -> Comparison:
    ratios, spreads = [], []
    for case in cases:
        mine, theirs = case[first], case[other]
        ratios.append(_log(mine, "ms") - _log(theirs, "ms"))
        widths = [_log(r, "ms_p80") - _log(r, "ms_p20") for r in (mine, theirs)]
        spreads.append(math.hypot(*widths) / 2)
    n = len(cases)
    return Comparison(op, first, other, math.exp(sum(ratios) / n), math.exp(sum(spreads) / n), n)


def _log(row: Mapping[str, object], column: str) -> float:
    return math.log(max(float(str(row[column])), 1e-6))


def updated(
    table: _choice.Table, architecture: str, comparisons: Iterable[Comparison]
) -> _choice.Table:
    """The table with what was measured: an entry where another backend than the first is faster.

    Ops that were compared and are not won by another backend lose their entry, others keep it.
    """
    by_op: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        by_op[comparison.op].append(comparison)
    entries = {op: b for op, b in table.get(architecture, {}).items() if op not in by_op}
    for op, found in by_op.items():
        best = max(found, key=lambda c: c.ratio)
        if best.winner == best.other:
            entries[op] = best.other
    return {**table, architecture: entries}
