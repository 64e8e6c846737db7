"""Plot helpers: one look for all benchmarks, PNG beside the CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#e08214", "#5aae61", "#9970ab", "#b2182b", "#666666")


def panels(
    count: int, *, columns: int = 2, width: float = 5.2, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes in rows of ``columns``."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    for ax in flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, flat[:count]


def grouped_bars(
    ax: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    fmt: str = "{:.1f}",
) -> None:
    """Bars of every series side by side in each group, labelled with their values."""
    width = 0.8 / len(series)
    places = np.arange(len(groups))
    for i, (label, values) in enumerate(series.items()):
        at = places + (i - (len(series) - 1) / 2) * width
        bars = ax.bar(at, values, width, label=label, color=COLOURS[i % len(COLOURS)])
        ax.bar_label(bars, [fmt.format(v) for v in values], fontsize=7, padding=1)
    ax.set_xticks(places, groups)


def band(
    ax: Axes,
    x: Sequence[float],
    runs: np.ndarray,
    *,
    label: str,
    colour: str,
    log: bool = False,
) -> None:
    """Mean of several runs ``[runs, points]`` with their range as a band."""
    mean = runs.mean(axis=0)
    ax.plot(x, mean, label=label, color=colour)
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    if log:
        ax.set_yscale("log")


def save(figure: Figure, path: Path) -> Path:
    """Write ``path`` with the suffix ``.png``."""
    path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
