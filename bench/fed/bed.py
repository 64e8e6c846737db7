"""What every experiment here shares: a model and data loaded once, runs stored as they finish."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness
from fedzo import experiment
from fedzo.config import RunConfig, build
from fedzo.data import Split, partition
from fedzo.data.pretraining import calibration_batches
from fedzo.options import make_method
from fedzo.simulation import Federation
from zokernels.finetune.config import UserError

# Seed of the runs that choose a learning rate; the reported ones have others.
TUNING_SEED = 1000

# A learning rate that wins at an end of its grid makes the grid longer, at most this often.
EXTENSIONS = 3
HALF_DECADE = math.sqrt(10.0)

# Options that are fields of a run's configuration.
_FIELDS = ("model", "data", "eval_data", "task", "calibration", "clients", "split", "batch_size",
           "max_length", "train_limit", "eval_limit")  # fmt: skip


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options of an experiment."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="transformers folder or id")
    parser.add_argument("--data", required=True, help="as fedzo run --data")
    parser.add_argument("--eval-data")
    parser.add_argument("--task", default="auto")
    parser.add_argument("--calibration", default="builtin", help="pre-training text, such as C4")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--split", default="iid")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--train-limit", type=int, default=0)
    parser.add_argument("--eval-limit", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="folder instead of bench/results")
    parser.set_defaults(**defaults)
    return parser


class Bed:
    """A model, a task and a table of finished runs.

    Half of the held-out examples choose learning rates, the other half judges.

    Args:
        name: of the table, ``<name>.csv``.
        args: of :func:`arguments`.
        key: columns that identify a run.
    """

    def __init__(self, name: str, args: argparse.Namespace, key: Sequence[str]) -> None:
        self.name, self.args, self.key = name, args, tuple(key)
        fields = {name: getattr(args, name) for name in _FIELDS}
        self.config = build(RunConfig, fields)
        self.model, self.tokenizer, self.masked = experiment.load_model(self.config)
        task = experiment.make_task(self.config, self.model, self.tokenizer, self.masked)
        held = task.prepared.held_out
        self.tasks = []
        for part in (held[::2], held[1::2]):
            judged = copy.copy(task)
            judged.prepared = dataclasses.replace(task.prepared, held_out=part)
            self.tasks.append(judged)
        self.batches = calibration_batches(
            self.tokenizer,
            self.config.calibration,
            masked=self.masked,
            batches=self.config.calibration_batches,
            seed=0,
        )
        self.before = [t.evaluate(self.model) for t in self.tasks]

    @property
    def path(self) -> Path:
        """The table."""
        folder = self.args.results or harness.RESULTS
        return Path(folder) / harness.device_slug() / f"{self.name}.csv"

    def rows(self) -> list[dict[str, str]]:
        """Finished runs."""
        return harness.read_rows(self.path)

    def find(self, wanted: Mapping[str, Any]) -> dict[str, str] | None:
        """A finished run."""
        texts = {name: str(wanted[name]) for name in self.key}
        return next(
            (row for row in self.rows() if all(row[n] == t for n, t in texts.items())), None
        )

    def store(self, row: Mapping[str, Any]) -> None:
        """Add a run to the table at once."""
        harness.record(
            self.name,
            [dict(row)],
            key=self.key,
            results=self.args.results,
            # The names of files, not where they happened to lie.
            notes={"options": {k: Path(str(v)).name for k, v in vars(self.args).items()}},
        )

    def federation(
        self,
        method: str,
        options: Mapping[str, Any],
        *,
        seed: int,
        tuning: bool = False,
        split: str | None = None,
    ) -> Federation:
        """A federation on a fresh copy of the model."""
        task = self.tasks[0 if tuning else 1]
        shards = partition(
            Split.parse(split or self.config.split),
            task.train_size,
            self.config.clients,
            labels=task.labels,
            natural_ids=task.natural_ids,
            seed=seed,
        )
        return Federation(
            copy.deepcopy(self.model),
            task,
            make_method(method, options),
            shards,
            seed=seed,
            batch_size=self.config.batch_size,
            calibration=self.batches,
        )

    def run(
        self,
        key: Mapping[str, Any],
        method: str,
        options: Mapping[str, Any],
        *,
        rounds: int,
        seed: int,
        tuning: bool = False,
        every: int = 0,
    ) -> dict[str, Any]:
        """A run, or its stored row: held-out numbers before and after, bytes, time.

        A run whose loss is no number, or grew by more than 3 nats, counts as diverged: its loss is
        infinite. With ``every``, the row's ``curve`` is the held-out loss after so many rounds,
        twice as many, and so on.
        """
        found = self.find(key)
        if found is not None:
            return dict(found)
        begin = time.process_time()
        federation = self.federation(method, options, seed=seed, tuning=tuning)
        train_loss, curve = math.nan, []
        for record in federation.run(rounds):
            train_loss = record.loss
            if every and record.round % every == 0:
                curve.append(federation.task.evaluate(federation.model)["loss"])
        before = self.before[0 if tuning else 1]
        after = federation.task.evaluate(federation.model)
        if not after["loss"] < before["loss"] + 3.0:
            after["loss"] = math.inf
        dense = sum(p.numel() * p.element_size() for p in self.model.parameters())
        sent = rounds * len(federation.clients)
        row = {
            **key,
            "method": method,
            "rounds": rounds,
            "loss_before": round(before["loss"], 5),
            "loss": round(after["loss"], 5),
            "accuracy_before": round(before.get("accuracy", math.nan), 5),
            "accuracy": round(after.get("accuracy", math.nan), 5),
            "train_loss": round(train_loss, 5),
            "moving": federation.space.numel,
            "bytes_up": federation.bytes_up,
            "bytes_down": federation.bytes_down,
            "uplink": round(federation.bytes_up / sent, 1),
            "dense_uplink": dense,
            "cpu_seconds": round(time.process_time() - begin, 2),
        }
        if every:
            row["curve"] = " ".join(f"{loss:.4f}" for loss in curve)
        self.store(row)
        print(
            {k: row[k] for k in (*key, "loss_before", "loss", "accuracy", "cpu_seconds")},
            flush=True,
        )
        return row

    def tuned(
        self,
        key: Mapping[str, Any],
        method: str,
        options: Mapping[str, Any],
        grid: Sequence[float],
        *,
        rounds: int,
    ) -> float:
        """The learning rate of lowest held-out loss on the tuning half, under the tuning seed.

        Half-decades are added at an end that wins, at most three times.
        """
        losses: dict[float, float] = {}
        rates = sorted(grid)
        for extension in range(EXTENSIONS + 1):
            for lr in rates:
                if lr not in losses:
                    row = self.run(
                        {**key, "phase": "tune", "lr": f"{lr:.2e}", "seed": TUNING_SEED},
                        method,
                        {**options, "lr": lr},
                        rounds=rounds,
                        seed=TUNING_SEED,
                        tuning=True,
                    )
                    losses[lr] = float(row["loss"])
            best = min(losses, key=lambda lr: losses[lr])
            if extension == EXTENSIONS or rates[0] < best < rates[-1]:
                break
            rates = sorted({*rates, best / HALF_DECADE if best == rates[0] else best * HALF_DECADE})
        return best


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


__all__ = ["Bed", "UserError", "arguments", "spread"]
