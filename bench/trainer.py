"""transformers' Trainer with zeroth-order steps: its time against the bare loop, its memory.

    python -m bench.trainer

``loop``     ``opt.step(batch)``, nothing around it;
``trainer``  ``MeZOTrainer.train()``, by its own ``train_runtime``, which leaves out its set-up;
``adamw``    ``Trainer.train()`` with AdamW, which needs gradients and two moments.

Memory is the peak over the loaded model, each case in a process of its own, beside a plain forward
of the stacked batch (``plain stacked``, twice the rows).
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

import zokernels as zo
from bench import harness, models, peak
from zokernels.integrations.transformers import MeZOTrainer

LOOP, TRAINER, ADAMW, PLAIN = "loop", "trainer", "adamw", "plain stacked"
KEY = ("model", "dtype", "batch", "length", "case")
LR = 1e-9  # the same weights in every round

console = Console(width=110)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def examples(batch: models.Batch, steps: int) -> list[dict[str, Tensor]]:
    """The rows of a batch, for so many steps."""
    count = len(batch["input_ids"])
    return [{k: v[i] for k, v in batch.items()} for _ in range(steps) for i in range(count)]


def trainer(
    model: PreTrainedModel, batch: models.Batch, steps: int, device: str, cls: type[Trainer]
) -> Trainer:
    """A trainer that makes so many steps and keeps nothing."""
    logging.set_verbosity_error()
    arguments = TrainingArguments(
        tempfile.mkdtemp(prefix="zokernels-bench-"),
        learning_rate=LR,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(batch["input_ids"]),
        max_steps=steps,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        max_grad_norm=0.0,
    )
    more: dict[str, Any] = {"mezo": {"eps": 1e-3}} if cls is MeZOTrainer else {}
    built = cls(model, arguments, train_dataset=examples(batch, steps), **more)
    built.remove_callback(PrinterCallback)
    return built


def case(
    name: str, model: PreTrainedModel, batch: models.Batch, steps: int, device: str
) -> Callable[[], float]:
    """So many steps of one kind: their seconds."""
    if name == LOOP:
        optimizer, wait = zo.MeZO(model, lr=LR, eps=1e-3), harness.sync_for(device)

        def loop() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.step(batch)
            if wait:
                wait()
            return time.perf_counter() - start

        return loop
    built = trainer(model, batch, steps, device, MeZOTrainer if name == TRAINER else Trainer)
    return lambda: float(built.train().metrics["train_runtime"])


def seconds(cases: dict[str, Callable[[], float]], rounds: int) -> harness.Timings:
    """Round robin, in turning order, after one run of each."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for name in names:
        cases[name]()
    for r in range(rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(cases[name]())
    return harness.Timings(found)


def peak_case(
    name: str, model: str, dtype: str, batch: int, length: int, device: str = "cpu"
) -> Callable[[], object]:
    """Set-up of one case for :mod:`bench.peak`; two steps."""
    built = models.build(model, dtype, device=device)
    with torch.inference_mode():
        built(**models.random_batch(built, 1, 8))  # libraries load
    data = models.random_batch(built, batch * (2 if name == PLAIN else 1), length)
    if name != PLAIN:
        return case(name, built, data, 2, device)

    def plain() -> None:
        with torch.inference_mode():
            built(**data)

    return plain


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Shapes (bench.models).")] = "opt-125m",
    dtype: Annotated[str, typer.Option(help="Of fp32, bf16, fp16.")] = "fp32,bf16",
    size: Annotated[str, typer.Option(help="BATCHxLENGTH.")] = "1x64,8x64",
    steps: Annotated[int, typer.Option(help="Of a measurement.")] = 8,
    rounds: Annotated[int, typer.Option()] = 5,
    device: Annotated[str, typer.Option()] = "cpu",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Time and peak memory of a trainer's steps."""
    table = Table("model", "dtype", "size", "case", "ms a step", "vs loop", "peak MiB")
    for name, kind, (b, t) in itertools.product(
        harness.listed(model),
        harness.listed(dtype),
        map(harness.parse_size, harness.listed(size)),
    ):
        built = models.build(name, kind, device=device)
        batch = models.random_batch(built, b, t)
        timings = seconds(
            {label: case(label, built, batch, steps, device) for label in (LOOP, TRAINER)}, rounds
        )
        # AdamW's gradients and moments would stay on the model: apart, and last.
        adamw = seconds({ADAMW: case(ADAMW, built, batch, steps, device)}, min(2, rounds))
        del built
        rows: list[harness.Row] = []
        for label in (LOOP, TRAINER, ADAMW, PLAIN):
            _, top = peak.peak_of(
                "bench.trainer:peak_case",
                **{"name": label, "model": name, "dtype": kind, "batch": b, "length": t},
                device=device,
            )
            row: harness.Row = {"model": name, "dtype": kind, "batch": b, "length": t}
            row |= {"case": label, "ms": "", "rounds": "", "vs_loop": ""}
            if label != PLAIN:
                source = adamw if label == ADAMW else timings
                ms = source.stat(label)
                row |= {"ms": round(ms.median * 1e3 / steps, 1), "rounds": ms.rounds}
                row["vs_loop"] = round(
                    timings.ratio(label, LOOP).median
                    if source is timings
                    else ms.median / timings.stat(LOOP).median,
                    3,
                )
            rows.append(row | {"peak_mib": round(top / 2**20, 1)})
            shown = [str(row[column]) for column in ("ms", "vs_loop")]
            table.add_row(name, kind, f"{b}x{t}", label, *shown, f"{top / 2**20:.1f}")
        path = harness.record("trainer", rows, key=KEY, device=device, results=results)
    console.print(table)
    console.print(f"results: {path}")


if __name__ == "__main__":
    app()
