"""Training in bfloat16: stochastic rounding of the updates against round-to-nearest and float32.

    python -m bench.precision

A character model is trained with backpropagation on English prose (the Python language reference
that ships with the interpreter), rounded to bfloat16 once, and fine-tuned with MeZO on the same
prose in capital letters, three ways from the same start:

``fp32``             float32 weights;
``bf16 stochastic``  bfloat16 weights, updates rounded stochastically (the default);
``bf16 nearest``     bfloat16 weights, updates rounded to nearest.

``lr * g * z`` is mostly below half a unit in the last place of a bfloat16 weight, so rounding to
nearest drops it and training stalls; stochastic rounding keeps it in expectation. Every seed draws
other batches and other directions; the loss is that of held-out text, evaluated in float32 whatever
the weights are stored in.
"""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import zokernels as zo
from bench import harness, models, plots

ARMS = {
    "fp32": ("fp32", "nearest"),
    "bf16 stochastic": ("bf16", "stochastic"),
    "bf16 nearest": ("bf16", "nearest"),
}
KEY = ("arm", "seed", "step")
_SEED_STRIDE = 1 << 20


def start_model(steps: int, *, seed: int = 0) -> PreTrainedModel:
    """The pre-trained character model, its weights rounded to bfloat16 and held in float32."""
    model = models.text_model(seed=seed)
    models.pretrain(model, models.english(), steps=steps, seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
    return model.eval()


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, batch: models.Batch) -> float:
    """Loss in float32 of weights stored in any dtype."""
    return float(models.cast_(copy.deepcopy(model), "fp32")(**batch).loss)


@torch.inference_mode()
def unchanged(model: PreTrainedModel, start: list[Tensor]) -> float:
    """Share of the weights that still have their first value."""
    params = list(model.parameters())
    same = sum(int((p.float() == s.float()).sum()) for p, s in zip(params, start, strict=True))
    return same / sum(p.numel() for p in params)


def train(
    start: PreTrainedModel,
    arm: str,
    seed: int,
    *,
    steps: int,
    every: int,
    lr: float,
    eps: float,
    size: int,
    length: int,
) -> list[harness.Row]:
    """One fine-tuning run: held-out loss at step 0, ``every``, ``2 every``, ...

    Raises:
        KeyError: unknown arm.
    """
    dtype, rounding = ARMS[arm]
    model = models.cast_(copy.deepcopy(start), dtype)
    first = [p.detach().clone() for p in model.parameters()]
    text = models.capitals()
    evaluation = text.evaluation(64, length)
    generator = torch.Generator().manual_seed(seed)
    optimizer = zo.MeZO(model, lr=lr, eps=eps, rounding=rounding, seed=seed * _SEED_STRIDE)
    rows: list[harness.Row] = []
    for t in range(steps + 1):
        if t % every == 0 or t == steps:
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "step": t,
                    "loss": held_out_loss(model, evaluation),
                    "unchanged": unchanged(model, first),
                }
            )
        if t < steps:
            optimizer.step(text.batch(size, length, generator))
    return rows


def curves(rows: list[harness.Row], arm: str, column: str = "loss") -> tuple[list[int], np.ndarray]:
    """Steps, and ``[seeds, steps]`` of a column for one arm."""
    here = [r for r in rows if r["arm"] == arm]
    seeds = sorted({int(str(r["seed"])) for r in here})
    steps = sorted({int(str(r["step"])) for r in here})
    value = {(int(str(r["seed"])), int(str(r["step"]))): float(str(r[column])) for r in here}
    return steps, np.array([[value[s, t] for t in steps] for s in seeds])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    every: Annotated[int, typer.Option(min=1)] = 100,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    lr: Annotated[float, typer.Option()] = 3e-6,
    eps: Annotated[float, typer.Option()] = 1e-3,
    size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Characters of a row.")] = 64,
    pretraining: Annotated[int, typer.Option(help="Backpropagation steps before.")] = 600,
    threads: Annotated[int, typer.Option(help="The model is small: one thread is best.")] = 1,
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Train the three arms and compare their curves."""
    console = Console(width=120)
    begin = time.perf_counter()
    rows: list[harness.Row] = []
    with harness.threads(threads):
        start = start_model(pretraining)
        for seed, arm in itertools.product(range(seeds), ARMS):
            rows += train(
                start,
                arm,
                seed,
                steps=steps,
                every=every,
                lr=lr,
                eps=eps,
                size=size,
                length=length,
            )
        seconds = round(time.perf_counter() - begin, 1)
        notes: harness.Row = {
            "options": {
                "steps": steps,
                "seeds": seeds,
                "lr": lr,
                "eps": eps,
                "size": size,
                "length": length,
                "pretraining": pretraining,
            },
            "seconds": seconds,
        }
        path = harness.record("precision", rows, key=KEY, results=results, notes=notes)

    table = Table(title=f"held-out loss, lr {lr:g}, {seeds} seeds", title_justify="left")
    for column in ("arm", "start", "end: mean (min-max)", "weights never changed"):
        table.add_column(column)
    figure, axes = plots.panels(2)
    for colour, arm in zip(plots.COLOURS, ARMS, strict=False):
        t, loss = curves(rows, arm)
        _, same = curves(rows, arm, "unchanged")
        plots.band(axes[0], t, loss, label=arm, colour=colour)
        plots.band(axes[1], t, 100 * same, label=arm, colour=colour)
        end = loss[:, -1]
        table.add_row(
            arm,
            f"{loss[:, 0].mean():.4f}",
            f"{end.mean():.4f} ({end.min():.4f}-{end.max():.4f})",
            f"{100 * same[:, -1].mean():.1f} %",
        )
    axes[0].set_ylabel("held-out loss")
    axes[1].set_ylabel("weights equal to their start, %")
    for ax in axes:
        ax.set_xlabel("MeZO steps")
        ax.legend(fontsize=7)
    console.print(table)
    plots.save(figure, path)
    console.print(f"results: {path} ({seconds} s)")


if __name__ == "__main__":
    app()
