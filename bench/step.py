"""One optimiser step of zokernels against MeZO's loop, torchzero and two plain forwards.

    python -m bench.step                          all models, dtypes and sizes
    python -m bench.step --model opt-125m --dtype bf16 --size 1x64 --memory
    python -m bench.step --breakdown              where the time of our step goes

Everything runs in one process on one model, round robin (:mod:`bench.harness`). A speed-up is
held against the faster of MeZO's two spellings in the same run; "two forwards" is the part of a
step that no implementation can avoid.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import zokernels as zo
from bench import breakdown, harness, models, peak, plots
from bench.harness import parse_size
from bench.peers import torchzero_peer
from bench.peers.mezo import VARIANTS, MeZOLoop

FORWARDS = "two forwards"
OURS = tuple(f"zokernels {d}" for d in zo.noise.DISTRIBUTIONS)
MEZO = tuple(f"mezo {v}" for v in VARIANTS)
TORCHZERO = "torchzero"
KEY = ("model", "dtype", "batch", "length", "case")

console = Console(width=120)


def case(name: str, model: PreTrainedModel, batch: models.Batch) -> Callable[[], object]:
    """The callable that takes one step (or two forwards) on ``model``.

    Raises:
        ValueError: unknown name.
    """
    if name == FORWARDS:

        def forwards() -> None:
            with torch.inference_mode():
                model(**batch)
                model(**batch)

        return forwards
    if name in OURS:
        optimizer = zo.MeZO(model, lr=1e-6, eps=1e-3, distribution=name.split()[1])
        return lambda: optimizer.step(batch)
    if name in MEZO:
        loop = MeZOLoop(model, lr=1e-6, eps=1e-3, variant=name.split()[1])
        seeds = itertools.count(1)
        return lambda: loop.step(lambda: model(**batch).loss, next(seeds))
    if name == TORCHZERO:
        step = torchzero_peer.stepper(model)
        return lambda: step(lambda: model(**batch).loss)
    raise ValueError(f"case must be one of {(FORWARDS, *OURS, *MEZO, TORCHZERO)}; got {name!r}")


def peak_case(
    name: str, model: str, dtype: str, batch: int, length: int, device: str = "cpu"
) -> Callable[[], object]:
    """Set-up of one case for :mod:`bench.peak`: the libraries are warm, the case is not."""
    built = models.build(model, dtype, device=device)
    with torch.inference_mode():
        built(**models.random_batch(built, 1, 8))
    return case(name, built, models.random_batch(built, batch, length))


def measure(
    model: PreTrainedModel,
    batch: models.Batch,
    names: list[str],
    *,
    rounds: int,
    budget: float | None,
    warm_peers: bool = True,
) -> harness.Timings:
    """Interleaved timings of several cases on one model."""
    warmup = {n: 1 if warm_peers or n in (FORWARDS, *OURS) else 0 for n in names}
    return harness.interleave(
        {n: case(n, model, batch) for n in names},
        rounds=rounds,
        min_rounds=min(2, rounds),
        warmup=warmup,
        budget=budget,
        sync=harness.sync_for(str(model.device)),
    )


def rows_of(timings: harness.Timings, base: harness.Row) -> list[harness.Row]:
    """One row a case: milliseconds, speed-up over the better MeZO, cost in two forwards."""
    best = timings.fastest(n for n in timings.seconds if n in MEZO)
    rows: list[harness.Row] = []
    for name in timings.seconds:
        ms, against = timings.stat(name), timings.ratio(best, name)
        forwards = timings.ratio(name, FORWARDS)
        rows.append(
            {
                **base,
                "case": name,
                "ms": round(ms.median * 1e3, 2),
                "ms_p20": round(ms.low * 1e3, 2),
                "ms_p80": round(ms.high * 1e3, 2),
                "rounds": ms.rounds,
                "speedup": round(against.median, 3),
                "speedup_p20": round(against.low, 3),
                "speedup_p80": round(against.high, 3),
                "vs_two_forwards": round(forwards.median, 3),
                "vs_two_forwards_p20": round(forwards.low, 3),
                "vs_two_forwards_p80": round(forwards.high, 3),
                "best_mezo": best,
                "peak_mib": "",
            }
        )
    return rows


def show(rows: list[harness.Row]) -> None:
    """Print one model, dtype and size."""
    first = rows[0]
    table = Table(
        title=f"{first['model']} {first['dtype']} {first['batch']}x{first['length']}",
        title_justify="left",
    )
    for column in (
        "case",
        "ms",
        "p20-p80",
        "x faster than MeZO",
        "x two forwards",
        "peak MiB",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in rows:
        table.add_row(
            str(r["case"]) + (" *" if r["case"] == r["best_mezo"] else ""),
            f"{r['ms']:.1f}",
            f"{r['ms_p20']:.0f}-{r['ms_p80']:.0f}",
            f"{r['speedup']:.2f} ({r['speedup_p20']:.2f}-{r['speedup_p80']:.2f})",
            f"{r['vs_two_forwards']:.2f}",
            str(r["peak_mib"]),
        )
    console.print(table)


def plot(csv_path: Path) -> None:
    """Speed-up of our cases (and torchzero) by size, one panel a model and dtype."""
    rows = harness.read_rows(csv_path)
    groups = list(dict.fromkeys((r["model"], r["dtype"]) for r in rows))
    figure, axes = plots.panels(len(groups))
    for ax, (model, dtype) in zip(axes, groups, strict=True):
        here = [r for r in rows if (r["model"], r["dtype"]) == (model, dtype)]
        sizes = list(dict.fromkeys(f"{r['batch']}x{r['length']}" for r in here))
        value = {(f"{r['batch']}x{r['length']}", r["case"]): float(r["speedup"]) for r in here}
        shown = [n for n in (*OURS, FORWARDS) if any((s, n) in value for s in sizes)]
        series = {n: [value.get((s, n), float("nan")) for s in sizes] for n in shown}
        plots.grouped_bars(ax, sizes, series)
        ax.axhline(1, color="#999999", linewidth=0.8)
        ax.set_title(f"{model}, {dtype}", fontsize=10)
        ax.set_ylabel("x faster than MeZO's loop", fontsize=8)
        ax.set_xlabel("batch x length", fontsize=8)
    axes[0].legend(fontsize=7, title="(two forwards: the bound)", title_fontsize=7)
    plots.save(figure, csv_path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str, typer.Option(help="Shapes (bench.models), comma separated.")
    ] = "opt-125m,smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Of fp32, bf16, fp16.")] = "fp32,bf16",
    size: Annotated[str, typer.Option(help="BATCHxLENGTH.")] = "1x64,1x256,8x64,8x256",
    torchzero_size: Annotated[str, typer.Option(help="Sizes torchzero runs at.")] = "1x64",
    rounds: Annotated[int, typer.Option(help="Most rounds per size.")] = 7,
    budget: Annotated[float, typer.Option(help="Seconds for all timings together.")] = 720.0,
    memory: Annotated[bool, typer.Option(help="Peak memory too, a process per case.")] = False,
    breakdown_only: Annotated[
        bool, typer.Option("--breakdown", help="Only where our step's time goes.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves them.")] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Time one step of every implementation."""
    if threads:
        torch.set_num_threads(threads)
    missing = torchzero_peer.unavailable()
    sizes = [parse_size(s) for s in harness.listed(size)]
    todo = list(itertools.product(harness.listed(model), harness.listed(dtype), sizes))
    notes: harness.Row = {"left_out": {TORCHZERO: missing} if missing else {}}
    if missing:
        console.print(f"[yellow]left out: {TORCHZERO}: {missing}")
    built: PreTrainedModel | None = None
    built_for = ("", "")
    backend = harness.environment(device)["backend"]
    hint = ": not what to measure speed with" if backend == "reference" else ""
    console.print(f"backend {backend}{hint}")
    start = time.perf_counter()
    path: Path | None = None
    for i, (name, kind, (b, t)) in enumerate(todo):
        fresh = (name, kind) != built_for
        if fresh:
            built = None
            built, built_for = models.build(name, kind, device=device), (name, kind)
        assert built is not None
        batch = models.random_batch(built, b, t)
        base: harness.Row = {"model": name, "dtype": kind, "batch": b, "length": t}
        if breakdown_only:
            rows = breakdown.rows(built, name, kind, batch, base, rounds=rounds)
            breakdown.show(rows, console)
            path = harness.record(
                "breakdown", rows, key=breakdown.KEY, device=device, results=results
            )
            continue
        names = [FORWARDS, *OURS, *MEZO]
        if not missing and f"{b}x{t}" in harness.listed(torchzero_size):
            names.append(TORCHZERO)
        left = budget - (time.perf_counter() - start)
        timings = measure(
            built,
            batch,
            names,
            rounds=rounds,
            budget=max(0.0, left / (len(todo) - i)),
            warm_peers=fresh,
        )
        rows = rows_of(timings, base)
        if memory:
            for row in rows:
                arguments = {"model": name, "dtype": kind, "batch": b, "length": t}
                _, top = peak.peak_of(
                    "bench.step:peak_case", name=row["case"], device=device, **arguments
                )
                row["peak_mib"] = round(top / 2**20, 1)
        show(rows)
        path = harness.record("step", rows, key=KEY, device=device, results=results, notes=notes)
    if path is not None and not breakdown_only:
        plot(path)
    if path is not None:
        console.print(f"results: {path}")


if __name__ == "__main__":
    app()
