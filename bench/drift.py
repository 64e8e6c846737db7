"""How far the weights move when nothing is learnt: many steps with a learning rate of 0.

    python -m bench.drift --steps 1000

MeZO's loop perturbs the weights in place three times a step (+eps, -2 eps, +eps) and so does not
come back to where it was: every rounding stays. Ours never writes the weights in a probe, so the
drift has to be exactly 0. Measured: ``|theta_t - theta_0| / |theta_0|`` over all parameters, in
float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import zokernels as zo
from bench import harness, models, plots
from bench.peers.mezo import VARIANTS, MeZOLoop

CASES = (*(f"mezo {v}" for v in VARIANTS), "zokernels")
KEY = ("dtype", "case", "step")


def model_for(dtype: str) -> PreTrainedModel:
    """An OPT of 0.5 M parameters, initialised as the real ones are."""
    return models.build(
        "tiny-opt",
        dtype,
        vocab_size=512,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_attention_heads=4,
    )


def relative(model: PreTrainedModel, start: list[Tensor]) -> float:
    """Relative L2 distance of the weights from ``start``."""
    moved = norm = 0.0
    for p, s in zip(model.parameters(), start, strict=True):
        moved += float((p.detach().double() - s.double()).square().sum())
        norm += float(s.double().square().sum())
    return (moved / norm) ** 0.5


def stepper(case: str, model: PreTrainedModel, batch: models.Batch) -> Callable[[int], object]:
    """One step with lr = 0, given its number.

    Raises:
        ValueError: unknown case.
    """
    if case == "zokernels":
        optimizer = zo.MeZO(model, lr=0.0, eps=1e-3)
        return lambda t: optimizer.step(batch)
    if case in CASES:
        loop = MeZOLoop(model, lr=0.0, eps=1e-3, variant=case.split()[1])
        return lambda t: loop.step(lambda: model(**batch).loss, t)
    raise ValueError(f"case must be one of {CASES}; got {case!r}")


def run(case: str, dtype: str, steps: int, every: int) -> list[harness.Row]:
    """Drift of one case at steps ``every, 2 every, ...``."""
    model = model_for(dtype)
    batch = models.random_batch(model, 1, 16)
    start = [p.detach().clone() for p in model.parameters()]
    one = stepper(case, model, batch)
    rows: list[harness.Row] = []
    for t in range(1, steps + 1):
        one(t)
        if t % every == 0 or t == steps:
            rows.append(
                {
                    "dtype": dtype,
                    "case": case,
                    "step": t,
                    "drift": relative(model, start),
                }
            )
    return rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    every: Annotated[int, typer.Option(help="Steps between readings.", min=1)] = 50,
    dtype: Annotated[str, typer.Option(help="Comma separated.")] = "fp32,bf16,fp16",
    threads: Annotated[int, typer.Option(help="The model is small: one thread is best.")] = 1,
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Measure the drift of MeZO's loop and of ours."""
    console = Console(width=120)
    kinds = harness.listed(dtype)
    rows: list[harness.Row] = []
    with harness.threads(threads):
        for kind, case in itertools.product(kinds, CASES):
            rows += run(case, kind, steps, every)
            console.print(f"{kind:5} {case:12} drift after {steps} steps: {rows[-1]['drift']:.3e}")
        path = harness.record("drift", rows, key=KEY, results=results)
    figure, axes = plots.panels(1)
    styles = dict(zip(CASES, ("-", "--", ":"), strict=True))
    for colour, kind in zip(plots.COLOURS, kinds, strict=False):
        for case in CASES:
            here = [r for r in rows if r["dtype"] == kind and r["case"] == case]
            axes[0].plot(
                [r["step"] for r in here],
                [r["drift"] for r in here],
                styles[case],
                color=colour,
                label=f"{case}, {kind}",
            )
    axes[0].set_yscale("symlog", linthresh=1e-8)
    axes[0].set_xlabel("steps with lr = 0")
    axes[0].set_ylabel("relative L2 distance from the start")
    axes[0].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.02, 0.5))
    plots.save(figure, path)
    console.print(f"results: {path}")
    ours = [r for r in rows if r["case"] == "zokernels" and r["drift"] != 0.0]
    if ours:
        console.print(f"[red]zokernels drifted: {ours[0]}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
