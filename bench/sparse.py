"""A sparse step against two plain forwards and a dense step.

    python -m bench.sparse
    python -m bench.sparse --dtype bf16 --size 1x64 --density 1e-3 --threads 1 --cpu-time

A random mask over the transformer's linear weights (which ones move does not matter to the time).
``dual`` is the two losses, ``step`` the whole of ``opt.step(batch)``. The goal is 1.05 of two plain
forwards. Everything in one process on one model, round robin (:mod:`bench.harness`).
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
from bench import harness, models
from bench.step import FORWARDS, parse_size
from bench.step import case as step_case

DUAL, STEP, DENSE = "sparse dual", "sparse step", "dense step"
KEY = ("model", "dtype", "batch", "length", "density", "case")

console = Console(width=120)


def case(
    name: str, model: PreTrainedModel, batch: models.Batch, mask: zo.Mask
) -> Callable[[], object]:
    """The callable of one case.

    Raises:
        ValueError: unknown name.
    """
    if name == FORWARDS:
        return step_case(FORWARDS, model, batch)
    if name == DENSE:
        return step_case("zokernels gaussian", model, batch)
    if name == DUAL:
        seeds = itertools.count(1)
        return lambda: zo.dual_loss(model, batch, seed=next(seeds), eps=1e-3, mask=mask)
    if name == STEP:
        optimizer = zo.MeZO(model, lr=1e-6, eps=1e-3, mask=mask)
        return lambda: optimizer.step(batch)
    raise ValueError(f"case must be one of {(FORWARDS, DUAL, STEP, DENSE)}; got {name!r}")


def rows_of(timings: harness.Timings, base: harness.Row) -> list[harness.Row]:
    """One row a case: milliseconds, and the ratio to two plain forwards."""
    rows: list[harness.Row] = []
    for name in timings.seconds:
        ms, ratio = timings.stat(name), timings.ratio(name, FORWARDS)
        rows.append(
            {
                **base,
                "case": name,
                "ms": round(ms.median * 1e3, 2),
                "ms_p20": round(ms.low * 1e3, 2),
                "ms_p80": round(ms.high * 1e3, 2),
                "rounds": ms.rounds,
                "vs_two_forwards": round(ratio.median, 3),
                "vs_two_forwards_p20": round(ratio.low, 3),
                "vs_two_forwards_p80": round(ratio.high, 3),
            }
        )
    return rows


def show(rows: list[harness.Row]) -> None:
    """Print one model, dtype, size and density."""
    first = rows[0]
    title = (
        f"{first['model']} {first['dtype']} {first['batch']}x{first['length']}, density "
        f"{first['density']} ({first['clock']})"
    )
    table = Table(title=title, title_justify="left")
    for column in ("case", "ms", "p20-p80", "x two forwards", "p20-p80 "):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in rows:
        table.add_row(
            str(r["case"]),
            f"{r['ms']:.1f}",
            f"{r['ms_p20']:.0f}-{r['ms_p80']:.0f}",
            f"{r['vs_two_forwards']:.3f}",
            f"{r['vs_two_forwards_p20']:.3f}-{r['vs_two_forwards_p80']:.3f}",
        )
    console.print(table)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Shapes (bench.models).")] = "opt-125m",
    dtype: Annotated[str, typer.Option(help="Of fp32, bf16, fp16.")] = "fp32,bf16",
    size: Annotated[str, typer.Option(help="BATCHxLENGTH.")] = "1x64,8x256",
    density: Annotated[str, typer.Option(help="Shares of the linear weights.")] = "1e-3",
    rounds: Annotated[int, typer.Option(help="Most rounds per size.")] = 9,
    budget: Annotated[float, typer.Option(help="Seconds for all timings together.")] = 300.0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves them.")] = 0,
    cpu_time: Annotated[
        bool,
        typer.Option(help="Processor time of the process: for a machine shared with others."),
    ] = False,
    dense: Annotated[bool, typer.Option(help="A dense step too.")] = True,
    device: Annotated[str, typer.Option()] = "cpu",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Time a sparse step."""
    if threads:
        torch.set_num_threads(threads)
    sizes = [parse_size(s) for s in harness.listed(size)]
    todo = list(
        itertools.product(harness.listed(model), harness.listed(dtype), sizes,
                          map(float, harness.listed(density)))
    )  # fmt: skip
    start = time.perf_counter()
    built: PreTrainedModel | None = None
    built_for = ("", "")
    for i, (name, kind, (b, t), share) in enumerate(todo):
        if (name, kind) != built_for:
            built = None
            built, built_for = models.build(name, kind, device=device), (name, kind)
        assert built is not None
        batch = models.random_batch(built, b, t)
        mask = zo.Mask.random(built, share, seed=0)
        names = [FORWARDS, DUAL, STEP, *([DENSE] if dense else [])]
        left = budget - (time.perf_counter() - start)
        timings = harness.interleave(
            {n: case(n, built, batch, mask) for n in names},
            rounds=rounds,
            min_rounds=min(3, rounds),
            budget=max(0.0, left / (len(todo) - i)),
            sync=harness.sync_for(device),
            clock=time.process_time if cpu_time else time.perf_counter,
        )
        base: harness.Row = {
            "model": name,
            "dtype": kind,
            "batch": b,
            "length": t,
            "density": share,
            "moving": mask.nnz,
            "clock": "processor time" if cpu_time else "wall time",
        }
        rows = rows_of(timings, base)
        show(rows)
        path = harness.record("sparse", rows, key=KEY, device=device, results=results)
        console.print(f"results: {path}")


if __name__ == "__main__":
    app()
