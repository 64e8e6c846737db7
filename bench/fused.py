"""The update made by the next step's forward pass (``fuse_update``) against one of its own.

    python -m bench.fused --model opt-125m --dtype fp32,bf16 --size 1x16,1x64

A measurement is a run of steps that ends with the last update made, so that each update is paid for
once; the fused run makes all but one of them inside a product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import zokernels as zo
from bench import harness, models

APART, FUSED = "apart", "fused"
KEY = ("model", "dtype", "batch", "length", "distribution", "case")

console = Console(width=110)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def case(
    model: PreTrainedModel, batch: models.Batch, distribution: str, *, fuse: bool, steps: int
) -> Callable[[], None]:
    """A run of steps, with their updates all made at its end."""
    options = {"lr": 1e-9, "eps": 1e-3, "distribution": distribution}
    optimizer = zo.MeZO(model, fuse_update=fuse, **options)  # type: ignore[arg-type]

    def run() -> None:
        for _ in range(steps):
            optimizer.step(batch)
        optimizer.flush()

    return run


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Shapes (bench.models).")] = "opt-125m",
    dtype: Annotated[str, typer.Option(help="Of fp32, bf16, fp16.")] = "fp32,bf16",
    size: Annotated[str, typer.Option(help="BATCHxLENGTH.")] = "1x16,1x64",
    steps: Annotated[int, typer.Option(help="Of a measurement.")] = 8,
    rounds: Annotated[int, typer.Option()] = 7,
    device: Annotated[str, typer.Option()] = "cpu",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Time runs of steps with and without ``fuse_update``."""
    table = Table("model", "dtype", "size", "noise", "apart, ms a step", "fused", "fused / apart")
    for name, kind in itertools.product(harness.listed(model), harness.listed(dtype)):
        built = models.build(name, kind, device=device)
        for (b, t), distribution in itertools.product(
            map(harness.parse_size, harness.listed(size)), zo.noise.DISTRIBUTIONS
        ):
            batch = models.random_batch(built, b, t)
            timings = harness.interleave(
                {
                    label: case(built, batch, distribution, fuse=label == FUSED, steps=steps)
                    for label in (APART, FUSED)
                },
                rounds=rounds,
                sync=harness.sync_for(device),
            )
            ratio = timings.ratio(FUSED, APART)
            rows: list[harness.Row] = []
            for label in (APART, FUSED):
                ms = timings.stat(label)
                rows.append(
                    {
                        **{"model": name, "dtype": kind, "batch": b, "length": t},
                        "distribution": distribution,
                        "case": label,
                        "ms": round(ms.median * 1e3 / steps, 2),
                        "ms_p20": round(ms.low * 1e3 / steps, 2),
                        "ms_p80": round(ms.high * 1e3 / steps, 2),
                        "rounds": ms.rounds,
                        "vs_apart": round(timings.ratio(label, APART).median, 3),
                    }
                )
            table.add_row(
                *(name, kind, f"{b}x{t}", distribution, f"{rows[0]['ms']}", f"{rows[1]['ms']}"),
                f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})",
            )
            path = harness.record("fused", rows, key=KEY, device=device, results=results)
    console.print(table)
    console.print(f"results: {path}")


if __name__ == "__main__":
    app()
