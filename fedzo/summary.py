"""The table of a comparison: mean and spread over seeds."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.table import Table

from fedzo.experiment import Result

FILE = "compare.csv"

Line = dict[str, Any]


def table(results: Mapping[str, Sequence[Result]]) -> list[Line]:
    """A line a method: held-out numbers after the last round, bytes, time and memory.

    Spread is the standard deviation over seeds (0 for a single one).
    """
    lines = []
    for name, runs in results.items():
        line: Line = {"name": name, "method": runs[0].method, "seeds": len(runs)}
        for score in runs[0].after:
            if score != "examples":
                values = [run.after[score] for run in runs]
                line[score] = statistics.mean(values)
                line[f"{score}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
                line[f"{score}_before"] = statistics.mean(run.before[score] for run in runs)
        line["bytes_up"] = statistics.mean(run.bytes_up for run in runs)
        line["bytes_down"] = statistics.mean(run.bytes_down for run in runs)
        line["saving"] = statistics.mean(run.saving for run in runs)
        line["moving"] = runs[0].moving
        line["seconds"] = statistics.mean(run.seconds for run in runs)
        line["memory"] = max(run.memory for run in runs)
        lines.append(line)
    return lines


def write(folder: Path, lines: Sequence[Line]) -> Path:
    """The table as CSV."""
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


def rendered(lines: Sequence[Line]) -> Table:
    """The table for a console."""
    scores = [n for n in ("loss", "accuracy", "perplexity") if n in lines[0]]
    shown = Table(box=box.SIMPLE_HEAD)
    for name in ("method", *scores, "up", "saving", "moving", "seconds"):
        shown.add_column(name, no_wrap=name in ("method", *scores))
    for line in lines:
        shown.add_row(
            line["name"],
            *(f"{line[s]:.4f} ± {line[f'{s}_std']:.4f}" for s in scores),
            decimal(int(line["bytes_up"])),
            f"{line['saving']:,.0f}x" if line["bytes_up"] else "",
            f"{line['moving']:,}",
            f"{line['seconds']:.1f}",
        )
    return shown
