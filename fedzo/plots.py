"""Pictures of runs: loss, accuracy, bytes, GradIP trajectories, learning rates of clients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedzo import metrics
from zokernels.finetune.config import UserError

COLOURS = ("#1f5fa8", "#e08214", "#5aae61", "#9970ab", "#b2182b", "#666666", "#01665e", "#c51b7d")

# Clients drawn with a line and a name of their own; the rest would only be a blur.
_MOST_CLIENTS = 20

Points = tuple[list[float], list[float]]


def plot_run(folder: Path) -> list[Path]:
    """Draw what a run's metrics hold, into the run's folder.

    Returns:
        The pictures: ``loss.png`` and ``bytes.png``, and where there is something to see
        ``accuracy.png``, ``gradip.png`` and ``rates.png``.

    Raises:
        UserError: the folder holds no metrics, or matplotlib is missing.
    """
    rows = metrics.read(folder)
    if not rows:
        raise UserError(f"{folder} holds no run: there is no {metrics.LINES} with rounds in it")
    train = [row for row in rows if row["phase"] == "train"]
    made = []
    lines = {
        "clients' batches": points(train, "loss"),
        "held out": points(rows, "eval_loss"),
    }
    made.append(_draw(folder / "loss.png", lines, "round", "loss"))
    if any(row.get("accuracy") is not None for row in rows):
        lines = {"held out": points(rows, "accuracy")}
        made.append(_draw(folder / "accuracy.png", lines, "round", "accuracy"))
    lines = {"up": points(train, "total_up"), "down": points(train, "total_down")}
    made.append(_draw(folder / "bytes.png", lines, "round", "bytes in all", log=True))
    paths = trajectories(rows)
    if paths:
        flagged = {str(c) for row in rows for c in row.get("flagged") or ()}
        named = {
            f"client {c}{' (flagged)' if c in flagged else ''}": line for c, line in paths.items()
        }
        made.append(_draw(folder / "gradip.png", named, "local step", "GradIP"))
    rates = of_clients(train, "lrs")
    if (
        any(len(set(y)) > 1 for _, y in rates.values())
        or len({y[0] for _, y in rates.values()}) > 1
    ):
        named = {f"client {c}": line for c, line in rates.items()}
        made.append(_draw(folder / "rates.png", named, "round", "learning rate"))
    return made


def plot_compare(path: Path, runs: Mapping[str, Sequence[Sequence[metrics.Row]]]) -> Path:
    """Held-out loss and accuracy of several methods, over rounds and over bytes.

    Args:
        path: of the picture.
        runs: by name, the rows of every seed: a line for the mean, a band for lowest to highest.

    Raises:
        UserError: matplotlib is missing, or no run has a held-out score.
    """
    names = [
        name
        for name in ("eval_loss", "accuracy")
        if any(
            row.get(name) is not None for seeds in runs.values() for rows in seeds for row in rows
        )
    ]
    if not names:
        raise UserError("the runs hold no held-out score to plot")
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(names), 2, figsize=(10.4, 3.4 * len(names)), squeeze=False, sharey="row"
    )
    for line, name in enumerate(names):
        for i, (label, seeds) in enumerate(runs.items()):
            x, low, mean, high, sent = band(seeds, name)
            colour = COLOURS[i % len(COLOURS)]
            for ax, horizontal in ((axes[line][0], x), (axes[line][1], sent)):
                ax.plot(horizontal, mean, color=colour, label=label)
                ax.fill_between(horizontal, low, high, color=colour, alpha=0.18, linewidth=0)
        axes[line][0].set(xlabel="round", ylabel=name.replace("eval_", "held-out "))
        axes[line][1].set(xlabel="bytes on the wire, all clients", xscale="log")
    axes[0][0].legend(fontsize=7)
    return _save(plt, figure, path)


def band(
    seeds: Sequence[Sequence[metrics.Row]], name: str
) -> tuple[list[float], list[float], list[float], list[float], list[float]]:
    """Rounds scored under every seed; lowest, mean and highest score; mean bytes so far."""
    tables = [
        {
            row["round"]: row
            for row in rows
            if row.get(name) is not None and row["phase"] != "calibration"
        }
        for rows in seeds
    ]
    rounds = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = [[table[r][name] for table in tables] for r in rounds]
    sent = [
        statistics.mean(table[r]["total_up"] + table[r]["total_down"] for table in tables)
        for r in rounds
    ]
    return (
        [float(r) for r in rounds],
        [min(v) for v in values],
        [statistics.mean(v) for v in values],
        [max(v) for v in values],
        sent,
    )


def points(rows: Sequence[metrics.Row], name: str) -> Points:
    """Rounds and values of one column, where it has a value."""
    found = [(row["round"], row[name]) for row in rows if _number(row.get(name))]
    return [float(x) for x, _ in found], [float(y) for _, y in found]


def of_clients(rows: Sequence[metrics.Row], name: str) -> dict[str, Points]:
    """Rounds and values of a table of clients, by client."""
    lines: dict[str, Points] = {}
    for row in rows:
        for client, value in (row.get(name) or {}).items():
            if _number(value):
                x, y = lines.setdefault(str(client), ([], []))
                x.append(float(row["round"]))
                y.append(float(value))
    return _first(lines)


def trajectories(rows: Sequence[metrics.Row]) -> dict[str, Points]:
    """GradIP of every client over its local steps: the calibration's where there was one, else
    those of all rounds in a row."""
    calibration = [row for row in rows if row["phase"] == "calibration" and row.get("gradip")]
    lines: dict[str, Points] = {}
    for row in calibration or rows:
        for client, path in (row.get("gradip") or {}).items():
            x, y = lines.setdefault(str(client), ([], []))
            x.extend(float(i) for i in range(len(x) + 1, len(x) + len(path) + 1))
            y.extend(math.nan if value is None else float(value) for value in path)
    return _first(lines)


def _first(lines: dict[str, Points]) -> dict[str, Points]:
    chosen = sorted(lines, key=lambda c: (len(c), c))[:_MOST_CLIENTS]
    return {client: lines[client] for client in chosen}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw(path: Path, lines: Mapping[str, Points], x: str, y: str, *, log: bool = False) -> Path:
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(6.4, 3.8))
    for i, (label, (horizontal, values)) in enumerate(lines.items()):
        ax.plot(horizontal, values, label=label, color=COLOURS[i % len(COLOURS)], linewidth=1)
    ax.set(xlabel=x, ylabel=y)
    if log and any(v > 0 for _, values in lines.values() for v in values):
        ax.set_yscale("log")
    if len(lines) > 1:
        ax.legend(fontsize=7, ncols=2 if len(lines) > 8 else 1)
    return _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> Path:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
