"""A fine-tuning run from a configuration: train, measure, keep what is needed to go on.

What it leaves is in :mod:`zokernels.finetune.folder`. A resumed run loads the base model, replays
the journal up to the checkpoint and goes on, bit for bit as if it had never stopped. Several ranks
(:mod:`zokernels.finetune.ranks`) share out each step's micro-batches and each evaluation's batches,
and compute what one process computes with ``accumulate`` as many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from zokernels.distributed import RankMismatchError
from zokernels.finetune import data as data_
from zokernels.finetune import models
from zokernels.finetune.config import Config, UserError, lr_factor
from zokernels.finetune.data import Batch, Example, Prepared
from zokernels.finetune.folder import (
    BEFORE,
    CHECKPOINT,
    CONFIG,
    JOURNAL,
    METRICS,
    RESULT,
    SUMMARY,
    WEIGHTS,
    Folder,
)
from zokernels.finetune.memory import Peak
from zokernels.finetune.objective import Objective, Score, evaluate
from zokernels.finetune.peer import Comparison, compare, drift
from zokernels.finetune.ranks import ALONE, Ranks
from zokernels.groups import param_groups
from zokernels.interrupts import whole
from zokernels.optim import MeZO
from zokernels.trajectory import Trajectory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Run:
    """What one seed gave.

    Attributes:
        seed: of directions and data order.
        after: held-out score of the fine-tuned weights.
        curve: training loss of each step.
        evaluations: (steps done, score) in between.
        seconds_per_step: median, the first step left out.
        memory_before, memory_peak: bytes before the first step, and the peak during steps; of the
            first rank.
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
            "ranks": self.config.ranks,
            "effective_batch_size": self.config.effective_batch_size,
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


def finetune(config: Config, console: Console, ranks: Ranks = ALONE) -> Summary:
    """Run a configuration and write its folder.

    Args:
        config: of the run.
        console: for what it says as it goes.
        ranks: the processes that run it, every one of which calls this function. The group of
            several is left when the training is done; the first rank goes on alone.

    Raises:
        UserError: something in the configuration or the folder that the user can put right.
    """
    if config.ranks != ranks.count:
        raise UserError(f"ranks must be the number of processes, {ranks.count}; got {config.ranks}")
    start = time.perf_counter()
    device = models.device_of(config, ranks)
    folder = Folder(Path(config.output), ranks)
    folder.open(config)
    tokenizer = models.load_tokenizer(config.model)
    prepared = data_.prepare(config, tokenizer)
    console.print(
        f"{len(prepared.train)} training and {len(prepared.held_out)} held-out examples, "
        f"task {prepared.task}",
        highlight=False,
    )
    for note in prepared.notes:
        console.print(note, highlight=False)

    runs: list[Run] = []
    with _progress(console) as progress, _warnings_to(console):
        model = models.load_model(config, config.seed, device)
        # Only now: a run that cannot begin leaves none. Read again, it is a run and no resumption.
        folder.write(CONFIG, {**config.to_dict(), "resume": False})
        if config.trainable == "lora":
            folder.adapter(model)
        moving = [p for p in model.parameters() if p.requires_grad]
        # Later seeds start from the same weights.
        start_weights = [p.detach().clone() for p in moving] if config.repeats > 1 else []
        shared = _Shared(config, prepared, model, device, progress, ranks, ranks.group(device))
        before = _before(_Trainer(shared, config.seed, folder), folder)
        for seed in config.seeds:
            if runs:
                with torch.no_grad():
                    for parameter, saved in zip(moving, start_weights, strict=True):
                        parameter.copy_(saved)
            place = folder.part(f"seed-{seed}")
            runs.append(_Trainer(shared, seed, place).run())
            progress.console.print(_finished(before, runs[-1]), highlight=False, soft_wrap=True)
            if config.save_weights and ranks.first:
                model.save_pretrained(place.path / WEIGHTS)  # type: ignore[operator]
                tokenizer.save_pretrained(place.path / WEIGHTS)
        del start_weights
        ranks.leave()
        comparisons: list[Comparison] = []
        mezo_drift = None
        if config.compare_mezo and ranks.first:
            comparisons = _compare(shared)
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
    folder.write(SUMMARY, summary.to_dict())
    return summary


@dataclass(frozen=True)
class _Shared:
    """What the seeds of a run have in common."""

    config: Config
    prepared: Prepared
    model: nn.Module
    device: torch.device
    progress: Progress
    ranks: Ranks
    group: ProcessGroup | None


class _Trainer:
    """One seed's training and what it leaves on disk."""

    def __init__(self, shared: _Shared, seed: int, folder: Folder) -> None:
        self.config, self.prepared, self.model = shared.config, shared.prepared, shared.model
        self.device, self.progress = shared.device, shared.progress
        self.ranks, self.group = shared.ranks, shared.group
        self.seed, self.folder = seed, folder
        self.data_sha256 = self.prepared.sha256()
        self.objective = Objective(self.model, self.config.objective)
        self.objective.settle(self.model, self._batch(self.prepared.train[:2]))

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return data_.collate(self.prepared, examples, self.device)

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
                ranks=self.ranks,
            )
        finally:
            self.progress.remove_task(task)

    def run(self) -> Run:
        config = self.config
        done = self.folder.read(RESULT)
        journal = self.folder.journal(config, self.seed)
        if done is not None:  # finished before: only its weights are wanted
            with journal:
                journal.replay_(self.model)
            return _run_from(done)
        with journal:
            optimizer = make_optimizer(config, self.model, self.seed, self.group)
            history = self._continue(optimizer, journal)
            if self.ranks.first:
                optimizer.journal = journal
            label = f"seed {self.seed}"
            task = self.progress.add_task(
                label, total=config.steps, completed=optimizer.num_steps, note=""
            )
            try:
                self._agree(optimizer)
                self._check(optimizer)
                self._steps(optimizer, history, task)
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
        self.folder.write(RESULT, dataclasses.asdict(run))
        return run

    def _check(self, optimizer: MeZO) -> None:
        """Let the first use of a model, which runs every branch on its own too, be a small one."""
        if optimizer.num_steps < self.config.steps:
            dual_loss(
                self.model,
                self._batch(self.prepared.train[:2]),
                seed=0,
                eps=self.config.eps,
                loss_fn=self.objective,
                distribution=self.config.distribution,
            )

    def _agree(self, optimizer: MeZO) -> None:
        """Find ranks that would train on other data or weights, before anything moves.

        Raises:
            UserError: on every rank.
        """
        seen = self.ranks.gather((self.data_sha256, len(self.prepared.held_out)))
        for rank, other in enumerate(seen):
            if other != seen[0]:
                raise UserError(f"--data: the examples of rank {rank} are not those of rank 0")
        try:
            optimizer.check_ranks()
        except RankMismatchError as error:
            raise UserError(str(error)) from error

    def _steps(self, optimizer: MeZO, history: _History, task: TaskID) -> None:
        config = self.config
        while (done := optimizer.num_steps) < config.steps:
            stop = config.steps
            if config.eval_every:
                stop = min(stop, (done // config.eval_every + 1) * config.eval_every)
                scored = {step for step, _ in history.evaluations}
                if done and done % config.eval_every == 0 and done not in scored:
                    score = self.score(f"seed {self.seed}: held-out")
                    history.evaluations.append((done, score))
                    self.folder.append(METRICS, {"step": done - 1, **_held_out(score)})
                    self._checkpoint(optimizer, history)
            with Peak(self.device) as peak:
                while optimizer.num_steps < stop:
                    self._one(optimizer, history, task)
                    if optimizer.num_steps % config.checkpoint_every == 0:
                        self._checkpoint(optimizer, history)
            history.before = history.before or peak.before
            history.peak = max(history.peak, peak.peak)

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of a step: the ranks' shares follow one another in the order."""
        config, train = self.config, self.prepared.train
        size, count = config.batch_size, config.accumulate
        order = data_.order(len(train), config.effective_batch_size, self.seed, step)
        first = self.ranks.rank * count
        return [
            self._batch([train[i] for i in order[at * size : (at + 1) * size]])
            for at in range(first, first + count)
        ]

    @whole
    def _one(self, optimizer: MeZO, history: _History, task: TaskID) -> None:
        config, step = self.config, optimizer.num_steps
        lr = config.lr * lr_factor(config.schedule, step, config.steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        loss = float(optimizer.step(self._micro_batches(step), self.objective))
        seconds = time.perf_counter() - start
        gradients = [g for row in optimizer.projected_gradients[:1] for g in row]
        history.curve.append(loss)
        history.times.append(seconds)
        self.folder.append(
            METRICS,
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "projected_gradients": gradients,
                "seconds": round(seconds, 4),
                "ranks": config.ranks,
                "examples": config.effective_batch_size,
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
        if not self.ranks.first or len(history.curve) != optimizer.num_steps:
            return  # interrupted between a step and its entry: the checkpoint before stays
        state = {
            "optimizer": optimizer.state_dict(),
            "history": dataclasses.asdict(history),
            "data_sha256": self.data_sha256,
        }
        self.folder.write(CHECKPOINT, state)

    def _continue(self, optimizer: MeZO, journal: Trajectory) -> _History:
        """Weights, optimizer, metrics and history as they were at the checkpoint."""
        saved, history = self.folder.read(CHECKPOINT), _History()
        if saved is not None:
            if saved["data_sha256"] != self.data_sha256:
                raise UserError(
                    "--resume: the training examples are not those the run began with (the data "
                    "file or the tokenizer changed)"
                )
            optimizer.load_state_dict(saved["optimizer"])
            history = _History.of(saved["history"])
        if journal.next_step < optimizer.num_steps:
            raise UserError(
                f"--resume: {self.folder.path / JOURNAL} ends at step {journal.next_step}, before "
                f"the checkpoint's {optimizer.num_steps}: start again in another --output"
            )
        journal.truncate(optimizer.num_steps)
        if len(journal):
            journal.replay_(self.model)
        self.folder.keep(METRICS, optimizer.num_steps)
        return history


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


def make_optimizer(
    config: Config, model: nn.Module, seed: int, group: ProcessGroup | None = None
) -> MeZO:
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
        process_group=group,
    )


def weights_sha256(model: nn.Module) -> str:
    """Digest of the bytes of all parameters that move, in the order of their names."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _before(trainer: _Trainer, folder: Folder) -> Score:
    """The score of the base model; adapters start at zero, so it is the same for every seed."""
    known = folder.read(BEFORE)
    if known is not None:
        return Score(**known)
    score = trainer.score("held-out, before")
    folder.write(BEFORE, dataclasses.asdict(score))
    return score


def _compare(shared: _Shared) -> list[Comparison]:
    """A step beside MeZO's loop, for what moves and for all parameters; moves the weights."""
    config, prepared, model = shared.config, shared.prepared, shared.model
    progress = shared.progress
    indices = data_.order(len(prepared.train), config.batch_size, config.seed, 0)
    batch = data_.collate(prepared, [prepared.train[i] for i in indices], shared.device)
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


def _held_out(score: Score) -> dict[str, Any]:
    return {f"held_out_{name}": value for name, value in dataclasses.asdict(score).items()}


def _run_from(saved: dict[str, Any]) -> Run:
    saved["after"] = Score(**saved["after"])
    saved["evaluations"] = [(step, Score(**score)) for step, score in saved["evaluations"]]
    return Run(**saved)


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
