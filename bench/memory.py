"""Peak memory of our steps against plain forwards, each in a process of its own.

    python -m bench.memory

``dual``     ``opt.step(batch)``, one stacked pass, against a plain forward of the stacked batch
             (twice the rows), which needs the same activations;
``closure``  ``opt.step(closure)``, one branch after the other, against a plain forward of the
             batch.

MeZO's loop and torchzero are there for comparison, against the plain forward of the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import zokernels as zo
from bench import harness, models, peak, step
from bench.peers import torchzero_peer

KEY = ("model", "dtype", "batch", "length", "case")
# Case -> the plain forward it is held against.
AGAINST = {
    "plain": "plain",
    "plain stacked": "plain stacked",
    "dual": "plain stacked",
    "closure": "plain",
    "mezo plain": "plain",
    "mezo add_": "plain",
    "torchzero": "plain",
}


def peak_case(
    name: str, model: str, dtype: str, batch: int, length: int, device: str = "cpu"
) -> Callable[[], object]:
    """Set-up of one case for :mod:`bench.peak`.

    The case runs once on a batch of one short row first: libraries load, code is generated, and the
    first evaluation's comparison is done, none of which grows with the batch.
    """
    built = models.build(model, dtype, device=device)
    copies = 2 if name == "plain stacked" else 1
    data = models.random_batch(built, 1, 8)

    work: Callable[[], object]
    if name in ("plain", "plain stacked"):

        def work() -> None:
            with torch.inference_mode():
                built(**data)
    elif name == "dual":
        dual = zo.MeZO(built, lr=1e-6, eps=1e-3)

        def work() -> None:
            dual.step(data)
    elif name == "closure":
        closure = zo.MeZO(built, lr=1e-6, eps=1e-3)

        def work() -> None:
            closure.step(lambda: built(**data).loss)
    else:
        work = step.case(name, built, data)
    work()
    data.update(models.random_batch(built, batch * copies, length))
    return work


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Comma separated.")] = "opt-125m,smollm2-135m",
    dtype: Annotated[str, typer.Option()] = "fp32,bf16",
    size: Annotated[str, typer.Option(help="BATCHxLENGTH.")] = "1x64,8x256",
    cases: Annotated[str, typer.Option(help="Comma separated; empty for all.")] = "",
    device: Annotated[str, typer.Option()] = "cpu",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Measure peak memory over what was loaded before."""
    console = Console(width=120)
    names = harness.listed(cases) or list(AGAINST)
    unknown = set(names) - set(AGAINST)
    if unknown:
        raise typer.BadParameter(f"cases must be among {list(AGAINST)}; got {sorted(unknown)}")
    names = list(dict.fromkeys([*(AGAINST[n] for n in names), *names]))
    missing = torchzero_peer.unavailable()
    if missing and "torchzero" in names:
        names.remove("torchzero")
        console.print(f"[yellow]left out: torchzero: {missing}")
    path: Path | None = None
    for name, kind, text in itertools.product(*map(harness.listed, (model, dtype, size))):
        b, t = step.parse_size(text)
        measured: dict[str, tuple[int, int]] = {}
        for case in names:
            measured[case] = peak.peak_of(
                "bench.memory:peak_case",
                name=case,
                model=name,
                dtype=kind,
                batch=b,
                length=t,
                device=device,
            )
        table = Table(title=f"{name} {kind} {text}", title_justify="left")
        for column in ("case", "peak MiB", "over its plain forward", "loaded before"):
            table.add_column(column, justify="left" if column == "case" else "right")
        rows: list[harness.Row] = []
        for case, (before, top) in measured.items():
            over = (top - measured[AGAINST[case]][1]) / 2**20
            rows.append(
                {
                    "model": name,
                    "dtype": kind,
                    "batch": b,
                    "length": t,
                    "case": case,
                    "peak_mib": round(top / 2**20, 1),
                    "against": AGAINST[case],
                    "over_mib": round(over, 1),
                    "before_mib": round(before / 2**20, 1),
                }
            )
            table.add_row(case, f"{top / 2**20:.1f}", f"{over:+.1f}", f"{before / 2**20:.0f}")
        console.print(table)
        notes: harness.Row = {"left_out": {"torchzero": missing} if missing else {}}
        path = harness.record("memory", rows, key=KEY, device=device, results=results, notes=notes)
    console.print(f"results: {path}")


if __name__ == "__main__":
    app()
