"""A fine-tuning run from a configuration: train, measure, keep what is needed to go on.

The folder of a run holds ``config.json``, ``summary.json``, ``loss.png`` and for each seed
``metrics.jsonl``, ``trajectory.zo`` (the journal: the fine-tuned model as seeds and numbers),
``checkpoint.json`` and ``result.json``. A resumed run loads the base model, replays the journal up
to the checkpoint and goes on, bit for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import nn

from zokernels.branches import dual_loss
from zokernels.finetune import data as data_
from zokernels.finetune import models
from zokernels.finetune.config import Config, UserError, build, lr_factor
from zokernels.finetune.data import Prepared
from zokernels.finetune.memory import Peak
from zokernels.finetune.objective import Objective, Score, evaluate
from zokernels.finetune.peer import Comparison, compare, drift
from zokernels.groups import param_groups
from zokernels.interrupts import whole
from zokernels.optim import MeZO
from zokernels.trajectory import Trajectory
from zokernels.trajectory_format import TrajectoryError

CONFIG, SUMMARY, PICTURE = "config.json", "summary.json", "loss.png"
METRICS, JOURNAL, CHECKPOINT, RESULT = (
    "metrics.jsonl",
    "trajectory.zo",
    "checkpoint.json",
    "result.json",
)
ADAPTER, WEIGHTS = "adapter_start.safetensors", "weights"


@dataclass
class Run:
    """What one seed gave.

    Attributes:
        seed: of directions and data order.
        after: held-out score of the fine-tuned weights.
        curve: training loss of each step.
        evaluations: (steps done, score) in between.
        seconds_per_step: median, the first step left out.
        memory_before, memory_peak: bytes before the first step, and the peak during steps.
        skipped: steps without an update because a loss was not finite.
        weights_sha256: of the fine-tuned parameters.
    """

    seed: int
    after: Score
    curve: list[float]
    evaluations: list[tuple[int, Score]]
    seconds_per_step: float
    memory_before: int
    memory_peak: int
    skipped: int
    weights_sha256: str


@dataclass
class Summary:
    """What a run gave, over all seeds."""

    config: Config
    before: Score
    runs: list[Run]
    trainable_parameters: int
    parameters: int
    train_examples: int
    seconds: float
    comparisons: list[Comparison] = field(default_factory=list)
    mezo_drift: float | None = None
    notes: list[str] = field(default_factory=list)

    def spread(self, values: list[float]) -> tuple[float, float | None]:
        """Mean and standard error over the seeds (None for one seed)."""
        if len(values) < 2:
            return values[0], None
        return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))

    @property
    def loss_gain(self) -> tuple[float, float | None]:
        """How far the held-out loss fell: mean and standard error over the seeds."""
        return self.spread([self.before.loss - run.after.loss for run in self.runs])

    @property
    def accuracy_gain(self) -> tuple[float, float | None] | None:
        """How far the held-out accuracy rose; None without labels."""
        if self.before.accuracy is None:
            return None
        return self.spread([(r.after.accuracy or 0.0) - self.before.accuracy for r in self.runs])

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        gains = {"loss": self.loss_gain}
        if self.accuracy_gain is not None:
            gains["accuracy"] = self.accuracy_gain
        return {
            "config": self.config.to_dict(),
            "environment": environment(),
            "before": dataclasses.asdict(self.before),
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "improvement": {
                name: {"mean": mean, "standard_error_over_seeds": error}
                for name, (mean, error) in gains.items()
            },
            "trainable_parameters": self.trainable_parameters,
            "parameters": self.parameters,
            "train_examples": self.train_examples,
            "seconds": self.seconds,
            "comparisons": [dataclasses.asdict(row) for row in self.comparisons],
            "mezo_drift": self.mezo_drift,
            "notes": self.notes,
        }


def _finished(before: Score, run: Run) -> str:
    text = f"seed {run.seed}: held-out loss {before.loss:.4f} -> {run.after.loss:.4f}"
    if before.accuracy is not None:
        text += f", accuracy {before.accuracy:.4f} -> {run.after.accuracy:.4f}"
    return text


def environment() -> dict[str, Any]:
    """What a number depends on besides the configuration."""
    import transformers

    import zokernels

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zokernels": zokernels.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def finetune(config: Config, console: Console) -> Summary:
    """Run a configuration and write its folder.

    Raises:
        UserError: something in the configuration or the folder that the user can put right.
    """
    start = time.perf_counter()
    folder = Path(config.output)
    _open_folder(config, folder)
    tokenizer = models.load_tokenizer(config.model)
    prepared = data_.prepare(config, tokenizer)
    console.print(
        f"{len(prepared.train)} training and {len(prepared.held_out)} held-out examples, "
        f"task {prepared.task}",
        highlight=False,
    )
    for note in prepared.notes:
        console.print(note, highlight=False)
    _write(folder / CONFIG, config.to_dict())

    runs: list[Run] = []
    with _progress(console) as progress, _warnings_to(console):
        model = models.load_model(config, config.seed)
        _keep_adapter(model, folder, config)
        moving = [p for p in model.parameters() if p.requires_grad]
        # Later seeds start from the same weights.
        start_weights = [p.detach().clone() for p in moving] if config.repeats > 1 else []
        before = _before(_Trainer(config, prepared, model, config.seed, folder, progress), folder)
        for seed in config.seeds:
            if runs:
                with torch.no_grad():
                    for parameter, saved in zip(moving, start_weights, strict=True):
                        parameter.copy_(saved)
            place = folder / f"seed-{seed}"
            place.mkdir(exist_ok=True)
            runs.append(_Trainer(config, prepared, model, seed, place, progress).run())
            progress.console.print(_finished(before, runs[-1]), highlight=False, soft_wrap=True)
            if config.save_weights:
                model.save_pretrained(place / WEIGHTS)  # type: ignore[operator]
                tokenizer.save_pretrained(place / WEIGHTS)
        del start_weights
        comparisons: list[Comparison] = []
        mezo_drift = None
        if config.compare_mezo:
            comparisons = _compare(config, prepared, model, progress)
            mezo_drift = drift(model, eps=config.eps)
    summary = Summary(
        config,
        before,
        runs,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
        len(prepared.train),
        time.perf_counter() - start,
        comparisons,
        mezo_drift,
        prepared.notes,
    )
    _write(folder / SUMMARY, summary.to_dict())
    return summary


class _Trainer:
    """One seed's training and what it leaves on disk."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        model: nn.Module,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.config, self.prepared, self.model, self.seed = config, prepared, model, seed
        self.folder, self.progress = folder, progress
        self.device = models.device_of(config)
        self.data_sha256 = prepared.sha256()
        self.objective = Objective(model, config.objective)
        self.objective.settle(model, data_.collate(prepared, prepared.train[:2], self.device))

    def score(self, label: str) -> Score:
        task = self.progress.add_task(label, total=len(self.prepared.held_out), note="")
        try:
            return evaluate(
                self.model,
                self.objective,
                self.prepared,
                self.prepared.held_out,
                batch_size=self.config.eval_batch_size,
                device=self.device,
                progress=lambda n: self.progress.advance(task, n),
            )
        finally:
            self.progress.remove_task(task)

    def run(self) -> Run:
        config, result = self.config, self.folder / RESULT
        journal = _open_journal(self.folder / JOURNAL, config, self.seed)
        if result.is_file():  # finished before: only its weights are wanted
            with journal:
                journal.replay_(self.model)
            return _run_from(json.loads(result.read_text()))
        with journal:
            optimizer = make_optimizer(config, self.model, self.seed)
            lines, history = self._continue(optimizer, journal)
            optimizer.journal = journal
            label = f"seed {self.seed}"
            task = self.progress.add_task(
                label, total=config.steps, completed=optimizer.num_steps, note=""
            )
            try:
                self._check(optimizer)
                with lines.open("a", encoding="utf-8") as metrics:
                    self._steps(optimizer, metrics, history, task)
            finally:
                self.progress.remove_task(task)
                self._checkpoint(optimizer, history)
        after = self.score(f"{label}: held-out")
        times = history.times
        run = Run(
            self.seed,
            after,
            history.curve,
            history.evaluations,
            statistics.median(times[1:] or times or [0.0]),
            history.before,
            history.peak,
            optimizer.skipped,
            weights_sha256(self.model),
        )
        _write(result, dataclasses.asdict(run))
        return run

    def _check(self, optimizer: MeZO) -> None:
        """Let the first use of a model, which runs every branch on its own too, be a small one."""
        if optimizer.num_steps < self.config.steps:
            dual_loss(
                self.model,
                data_.collate(self.prepared, self.prepared.train[:2], self.device),
                seed=0,
                eps=self.config.eps,
                loss_fn=self.objective,
                distribution=self.config.distribution,
            )

    def _steps(self, optimizer: MeZO, metrics: Any, history: _History, task: TaskID) -> None:
        config = self.config
        while (done := optimizer.num_steps) < config.steps:
            stop = config.steps
            if config.eval_every:
                stop = min(stop, (done // config.eval_every + 1) * config.eval_every)
                scored = {step for step, _ in history.evaluations}
                if done and done % config.eval_every == 0 and done not in scored:
                    score = self.score(f"seed {self.seed}: held-out")
                    history.evaluations.append((done, score))
                    _line(metrics, {"step": done - 1, **_held_out(score)})
                    self._checkpoint(optimizer, history)
            with Peak(self.device) as peak:
                while optimizer.num_steps < stop:
                    self._one(optimizer, metrics, history, task)
                    if optimizer.num_steps % config.checkpoint_every == 0:
                        self._checkpoint(optimizer, history)
            history.before = history.before or peak.before
            history.peak = max(history.peak, peak.peak)

    @whole
    def _one(self, optimizer: MeZO, metrics: Any, history: _History, task: TaskID) -> None:
        config, step = self.config, optimizer.num_steps
        lr = config.lr * lr_factor(config.schedule, step, config.steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        indices = data_.order(len(self.prepared.train), config.batch_size, self.seed, step)
        examples = [self.prepared.train[i] for i in indices]
        batch = data_.collate(self.prepared, examples, self.device)
        loss = float(optimizer.step(batch, self.objective))
        seconds = time.perf_counter() - start
        gradients = [g for row in optimizer.projected_gradients[:1] for g in row]
        history.curve.append(loss)
        history.times.append(seconds)
        _line(
            metrics,
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "projected_gradients": gradients,
                "seconds": round(seconds, 4),
            },
        )
        recent = statistics.mean(history.curve[-20:])
        speed = len(history.times[-20:]) / sum(history.times[-20:])
        mean_g = statistics.mean(map(abs, gradients)) if gradients else math.nan
        note = f"loss {recent:.4f}  lr {lr:.2e}  |g| {mean_g:.2f}  {speed:.2f} it/s"
        self.progress.update(task, advance=1, note=note)
        if not self.progress.console.is_terminal and (step + 1) % max(config.steps // 5, 1) == 0:
            self.progress.console.print(
                f"seed {self.seed} step {step + 1}/{config.steps}  {note}",
                highlight=False,
                soft_wrap=True,
            )

    # --- going on ---------------------------------------------------------------------------------

    def _checkpoint(self, optimizer: MeZO, history: _History) -> None:
        if len(history.curve) != optimizer.num_steps:
            return  # interrupted between a step and its entry: the checkpoint before stays
        state = {
            "optimizer": optimizer.state_dict(),
            "history": dataclasses.asdict(history),
            "data_sha256": self.data_sha256,
        }
        _write(self.folder / CHECKPOINT, state)

    def _continue(self, optimizer: MeZO, journal: Trajectory) -> tuple[Path, _History]:
        """Weights, optimizer, metrics and history as they were at the checkpoint."""
        path, lines = self.folder / CHECKPOINT, self.folder / METRICS
        history = _History()
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["data_sha256"] != self.data_sha256:
                raise UserError(
                    "--resume: the training examples are not those the run began with (the data "
                    "file or the tokenizer changed)"
                )
            optimizer.load_state_dict(saved["optimizer"])
            history = _History.of(saved["history"])
        if journal.next_step < optimizer.num_steps:
            raise UserError(
                f"--resume: {self.folder / JOURNAL} ends at step {journal.next_step}, before the "
                f"checkpoint's {optimizer.num_steps}: start again in another --output"
            )
        journal.truncate(optimizer.num_steps)
        if len(journal):
            journal.replay_(self.model)
        kept = []
        if lines.is_file():
            for line in lines.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] < optimizer.num_steps:
                        kept.append(line + "\n")
        _replace(lines, "".join(kept))
        return lines, history


@dataclass
class _History:
    """What a run has seen, for its report."""

    curve: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, Score]] = field(default_factory=list)
    before: int = 0
    peak: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> _History:
        evaluations = [(step, Score(**score)) for step, score in saved.pop("evaluations")]
        return cls(**saved, evaluations=evaluations)


def make_optimizer(config: Config, model: nn.Module, seed: int) -> MeZO:
    """The optimizer of a configuration."""
    groups: Any = model
    if config.weight_decay:
        groups = param_groups(model, weight_decay=config.weight_decay)
    return MeZO(
        groups,
        lr=config.lr,
        eps=config.eps,
        distribution=config.distribution,
        num_directions=config.num_directions,
        clip=config.clip,
        momentum=config.momentum,
        rounding=config.rounding or "stochastic",
        seed=seed,
        model=model,
    )


def weights_sha256(model: nn.Module) -> str:
    """Digest of the bytes of all parameters that move, in the order of their names."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _before(trainer: _Trainer, folder: Path) -> Score:
    """The score of the base model; adapters start at zero, so it is the same for every seed."""
    path = folder / "before.json"
    if path.is_file():
        return Score(**json.loads(path.read_text()))
    score = trainer.score("held-out, before")
    _write(path, dataclasses.asdict(score))
    return score


def _compare(
    config: Config, prepared: Prepared, model: nn.Module, progress: Progress
) -> list[Comparison]:
    """A step beside MeZO's loop, for what moves and for all parameters; moves the weights."""
    device = models.device_of(config)
    indices = data_.order(len(prepared.train), config.batch_size, config.seed, 0)
    batch = data_.collate(prepared, [prepared.train[i] for i in indices], device)
    task = progress.add_task("MeZO's loop beside ours", total=None, note="")

    def rows(what: str, directions: int) -> list[Comparison]:
        objective = Objective(model, config.objective)
        objective.settle(model, batch)

        def ours(count: int) -> Callable[[], object]:
            single = dataclasses.replace(config, num_directions=count, momentum=0.0)
            optimizer = make_optimizer(single, model, config.seed)
            return lambda: optimizer.step(batch, objective)

        return compare(
            model,
            ours(1),
            lambda: objective(model, batch),
            what=what,
            lr=config.lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            several=(directions, ours(directions)) if directions > 1 else None,
            progress=lambda: progress.advance(task),
        )

    try:
        table = rows(config.trainable, config.num_directions)
        if config.trainable not in ("full", "lora"):
            moving = [p for p in model.parameters() if p.requires_grad]
            everything = models.select(model, "full")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in everything)
            table += rows("full", 1)
            model.requires_grad_(False)
            for parameter in moving:
                parameter.requires_grad_(True)
        return table
    finally:
        progress.remove_task(task)


def resumed_options(output: str) -> dict[str, Any]:
    """The options of the run in a folder, for ``--resume`` without repeating them.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    path = Path(output) / CONFIG
    if not path.is_file():
        raise UserError(f"--resume: {output} holds no run to go on with")
    try:
        options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged: {error}") from error
    return options


def _open_folder(config: Config, folder: Path) -> None:
    existing = (folder / CONFIG).is_file()
    if config.resume:
        changed = build(resumed_options(config.output)).difference(config)
        if changed:
            raise UserError(f"--resume: {changed}; a resumed run must have the same options")
    elif existing:
        raise UserError(
            f"--output {folder} already holds a run: add --resume to go on with it, or name "
            f"another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be created: {error}") from error


def _open_journal(path: Path, config: Config, seed: int) -> Trajectory:
    metadata = {
        "base_model": config.model,
        "trainable": config.trainable,
        "adapter_start": f"../{ADAPTER}" if config.trainable == "lora" else None,
        "seed": seed,
    }
    try:
        with warnings.catch_warnings():
            # A record cut short by a kill lies after the checkpoint, and its step is made again.
            warnings.simplefilter("ignore")
            return Trajectory.open(path, metadata=metadata, recover=True)
    except (TrajectoryError, OSError) as error:
        raise UserError(f"--resume: {error}") from error


def _keep_adapter(model: nn.Module, folder: Path, config: Config) -> None:
    """Keep new adapter weights, which the trajectory starts from; load them when they are kept."""
    if config.trainable != "lora":
        return
    from safetensors.torch import load_file, save_file

    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    path = folder / ADAPTER
    if path.is_file():
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(saved[name])
    else:
        partial = path.with_suffix(".part")
        save_file({n: p.detach().cpu().contiguous() for n, p in moving.items()}, partial)
        partial.replace(path)


def _held_out(score: Score) -> dict[str, Any]:
    return {f"held_out_{name}": value for name, value in dataclasses.asdict(score).items()}


def _run_from(saved: dict[str, Any]) -> Run:
    saved["after"] = Score(**saved["after"])
    saved["evaluations"] = [(step, Score(**score)) for step, score in saved["evaluations"]]
    return Run(**saved)


def _line(file: Any, values: dict[str, Any]) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()


def _write(path: Path, value: Any) -> None:
    _replace(path, json.dumps(value, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )


@contextlib.contextmanager
def _warnings_to(console: Console) -> Iterator[None]:
    """Warnings above the progress bar, one line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = escape(str(message))
        console.print(f"[yellow]{category.__name__}[/]: {text}", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        # Libraries' notes to each other are not the user's concern.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.showwarning = show
        yield
