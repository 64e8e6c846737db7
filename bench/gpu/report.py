"""Tables on the console, CSV and JSON files, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import harness, plots
from bench.gpu import ops, steps

console = Console(width=150)

OP_COLUMNS = ("op", "case", "dtype", "distribution", "shape", "backend", "ms", "of_floor")
STEP_COLUMNS = ("case", "backend", "ms", "speedup", "vs_two_forwards", "peak_vs_stacked_forward")
TEXT = ("op", "case", "dtype", "distribution", "shape", "backend")


def show(title: str, rows: Sequence[harness.Row], columns: Sequence[str]) -> None:
    """Print rows as a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT else "right")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)


def label(row: harness.Row | dict[str, str]) -> str:
    """An op's case, without backend and distribution."""
    return f"{row['case']} {row['dtype']}\n{row['shape']}"


def _served(row: dict[str, str]) -> str:
    """The backend, and what was overridden."""
    return f"{row['backend']} {row.get('setting') or ''}".strip()


def plot_ops(path: Path) -> Path:
    """Share of the floor: a panel an op, a bar a backend and distribution."""
    rows = harness.read_rows(path)
    names = list(dict.fromkeys(r["op"] for r in rows))
    series = list(dict.fromkeys((_served(r), r["distribution"]) for r in rows))
    widest = max(len({label(r) for r in rows if r["op"] == op}) for op in names)
    figure, axes = plots.panels(len(names), columns=1, width=3 + 1.1 * widest, height=2.6)
    for ax, op in zip(axes, names, strict=True):
        value = {
            (label(r), _served(r), r["distribution"]): float(r["of_floor"])
            for r in rows
            if r["op"] == op
        }
        labels = list(dict.fromkeys(key[0] for key in value))
        bars = {
            f"{b} {d}": [value.get((text, b, d), float("nan")) for text in labels]
            for b, d in series
            if any((text, b, d) in value for text in labels)
        }
        plots.grouped_bars(ax, labels, bars, fmt="{:.2f}")
        ax.set_title(op, fontsize=8, loc="left")
        ax.axhline(1, color="#999999", linewidth=0.8)
        ax.tick_params(axis="x", labelsize=5)
        ax.set_ylabel("floor / time", fontsize=7)
        ax.legend(fontsize=6)
    return plots.save(figure, path)


def plot_steps(path: Path) -> Path:
    """A step in two plain forwards, and its speed-up over MeZO's loop."""
    rows = harness.read_rows(path)
    ours = [r for r in rows if str(r["case"]).startswith(steps.STEP)]
    labels = list(dict.fromkeys(f"{r['model']}\n{r['batch']}x{r['length']}" for r in ours))
    series = list(dict.fromkeys((r["case"], _served(r)) for r in ours))
    figure, axes = plots.panels(2, columns=1, width=3 + 1.1 * len(labels))
    for ax, column, title in (
        (axes[0], "vs_two_forwards", "step / two plain forwards"),
        (axes[1], "speedup", "x faster than MeZO's loop"),
    ):
        value = {
            (f"{r['model']}\n{r['batch']}x{r['length']}", r["case"], _served(r)): float(r[column])
            for r in ours
        }
        bars = {
            f"{case} {backend}": [value.get((text, case, backend), float("nan")) for text in labels]
            for case, backend in series
        }
        plots.grouped_bars(ax, labels, bars, fmt="{:.2f}")
        ax.axhline(1, color="#999999", linewidth=0.8)
        ax.tick_params(axis="x", labelsize=6)
        ax.set_ylabel(title, fontsize=8)
    axes[0].legend(fontsize=7)
    return plots.save(figure, path)


def write_ops(
    rows: Sequence[harness.Row], device: str, results: Path | None, notes: harness.Row
) -> Path:
    """The ops' CSV, with its environment beside it."""
    return harness.record("gpu_ops", rows, key=ops.KEY, device=device, results=results, notes=notes)


def write_steps(
    rows: Sequence[harness.Row], device: str, results: Path | None, notes: harness.Row
) -> Path:
    """The steps' CSV, with its environment beside it."""
    return harness.record(
        "gpu_steps", rows, key=steps.KEY, device=device, results=results, notes=notes
    )


def summary(op_rows: Sequence[harness.Row], step_rows: Sequence[harness.Row]) -> list[str]:
    """The figures asked for first, one a line."""
    found = []
    for row in op_rows:
        if row["op"] != "update_" or not row["of_bandwidth"]:
            continue
        what = f"{row['backend']}: update_ {row['case']}, {row['dtype']} {row['distribution']}"
        if row["case"] == "1 seed":
            found.append(f"{what}: {row['of_bandwidth']} of copy bandwidth")
        elif str(row["case"]).endswith("seeds") and row["of_generator"] != "":
            found.append(f"{what}: {row['of_generator']} of the bare generator")
    for row in step_rows:
        if str(row["case"]).startswith(steps.STEP):
            line = (
                f"{row['backend']}: {row['model']} {row['batch']}x{row['length']}, {row['case']}: "
                f"{row['vs_two_forwards']} of {row['against']}, "
                f"{row['speedup']} x faster than {row['best_mezo']}"
            )
            if row["peak_vs_stacked_forward"] != "":
                line += f", peak {row['peak_vs_stacked_forward']} of the stacked forward's"
            found.append(line)
    return found
