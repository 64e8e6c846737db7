"""A federated run from its configuration: model, data, rounds, results."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fedzo import metrics
from fedzo.checkpoint import CheckpointError
from fedzo.config import RunConfig, build
from fedzo.data import Split, custom, load_task, partition
from fedzo.data.pretraining import calibration_batches
from fedzo.data.tasks import LanguageTask, fingerprint
from fedzo.data.templates import TEMPLATES, Template
from fedzo.methods import Meerkat, Method, RandomMask, WeightMagnitude
from fedzo.options import make_method
from fedzo.records import RoundRecord
from fedzo.simulation import Federation
from fedzo.task import Batch
from fedzo.transports import Transport
from zokernels._files import write_atomically
from zokernels.finetune import assets, models
from zokernels.finetune.config import UserError
from zokernels.finetune.memory import resident

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, RESULT, CHECKPOINT = "config.json", "result.json", "federation.safetensors"

# A model or data of this name are the demo's of ``zokernels finetune --demo``.
DEMO = "demo"

# Called after every round with its row.
Watch = Callable[[metrics.Row], None]

# Finds the clients, where they are not in process.
Connect = Callable[[], Transport]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        method, seed, rounds: what was run.
        before, after: held-out numbers.
        best: highest accuracy (or lowest loss) seen on the way.
        bytes_up, bytes_down: on the wire, all clients and rounds.
        uplink: bytes of one client's message, the mean over all messages.
        dense: bytes of one dense upload of the whole model.
        seconds: in rounds, without evaluations.
        memory: peak resident bytes of the process (CUDA: of the allocator).
        moving, parameters: values that move, values in all.
        flagged: clients singled out.
        rejections: refused messages by reason.
    """

    method: str
    seed: int
    rounds: int
    before: dict[str, float]
    after: dict[str, float]
    best: float
    bytes_up: int
    bytes_down: int
    uplink: float
    dense: int
    seconds: float
    memory: int
    moving: int
    parameters: int
    flagged: list[int]
    rejections: dict[str, int]

    @property
    def saving(self) -> float:
        """How many times smaller a message is than a dense upload of the model."""
        return self.dense / self.uplink if self.uplink else float("inf")


def run(
    config: RunConfig, watch: Watch = lambda row: None, connect: Connect | None = None
) -> Result:
    """Run a configuration, or the rest of it.

    Args:
        config: what to run.
        watch: called after every round.
        connect: gives the transport to clients elsewhere; None: they are in process.

    Raises:
        UserError: something the user can put right; nothing is left half done.
    """
    folder = Path(config.output)
    method = make_method(config.method, method_options(config))
    local = fetched(config)
    model, tokenizer, masked = load_model(local)
    task = make_task(local, model, tokenizer, masked)
    _open_folder(config, folder, fingerprint(task))
    if config.resume and (folder / RESULT).is_file():
        done = read_result(folder)
        if done.rounds == config.rounds:
            return done
    federation = make_federation(
        config, model, tokenizer, masked, task, method, None if connect is None else connect()
    )
    checkpoint = folder / CHECKPOINT
    start = -1
    if config.resume and checkpoint.is_file():
        try:
            federation.load(checkpoint)
        except CheckpointError as error:
            raise UserError(f"--resume: {error}") from error
        start = federation.round
    with metrics.Metrics(folder, upto=start, tensorboard=config.tensorboard) as rows:
        if start <= 0 and not rows.rows:
            empty = RoundRecord(round=0).to_dict() | {"phase": "start"}
            _add(rows, watch, model, empty, task.evaluate(model))
        elif start > 0 and federation.last is not None:
            if not rows.rows or rows.rows[-1]["round"] < start:
                # Killed between the checkpoint of a round and its row.
                _round(config, rows, watch, model, task, federation.last)
            watch(rows.rows[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            rounds = federation.run(config.rounds)
            while not out_of_patience(config.patience, rows.rows):
                record = next(rounds, None)
                if record is None:
                    break
                _round(config, rows, watch, model, task, record)
        if federation.round < config.rounds:
            federation.save(checkpoint)
        result = _result(config, federation, model, rows.rows)
    _write(folder / RESULT, dataclasses.asdict(result))
    return result


def out_of_patience(patience: int, rows: Sequence[metrics.Row]) -> bool:
    """Whether the held-out loss has not become better for so many rounds (0: for ever)."""
    if not patience or not rows or rows[-1].get("eval_loss") is None:
        return False
    losses = {r["round"]: r["eval_loss"] for r in rows if r.get("eval_loss") is not None}
    best = min(losses, key=lambda n: losses[n] if math.isfinite(losses[n]) else math.inf)
    return bool(rows[-1]["round"] - best >= patience)


def fetched(config: RunConfig) -> RunConfig:
    """The configuration with the paths of the demo's model and data in place of ``demo``.

    Raises:
        UserError: they cannot be fetched.
    """
    paths: dict[str, str] = {}
    folder = assets.cache_folder()
    if config.model == DEMO:
        paths["model"] = str(assets.smollm2(folder))
    if config.data == DEMO:
        parts = assets.reviews(folder)
        paths |= {"data": str(parts["train"]), "eval_data": str(parts["test"])}
    return config.model_copy(update=paths)


def method_options(config: RunConfig) -> dict[str, Any]:
    """The options of the method: those of the configuration that every method has, and its own."""
    common = {name: getattr(config, name) for name in ("lr", "eps", "steps")}
    return {n: v for n, v in common.items() if v is not None} | dict(config.options)


def load_model(config: RunConfig) -> tuple[nn.Module, PreTrainedTokenizerBase, bool]:
    """Model in evaluation mode, tokenizer, and whether it is a masked language model.

    Raises:
        UserError: it cannot be loaded, or ``trainable`` selects nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    tokenizer = models.load_tokenizer(config.model)
    with models.quiet():
        try:
            settings = AutoConfig.from_pretrained(config.model)
            masked = any(n.endswith("ForMaskedLM") for n in settings.architectures or ())
            factory: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
            model: Any = factory.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--model {config.model} cannot be loaded: {reason}") from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise UserError(
            f"--max-length must be at most the model's {limit}; got {config.max_length}"
        )
    model.to(models.device_of(cast(Any, config)))
    names = models.select(model, config.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model.eval(), tokenizer, masked


def make_task(
    config: RunConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, masked: bool
) -> LanguageTask:
    """The task of a configuration.

    Raises:
        UserError: see :func:`fedzo.data.load_task`.
    """
    name = config.resolved_task
    try:
        template: Template = (
            custom(
                prompt=str(config.prompt),
                words=config.words,
                label_column=config.label_column,
                masked=masked,
            )
            if name == "custom"
            else TEMPLATES[name]
        )
    except ValueError as error:
        raise UserError(f"--prompt, --words: {error}") from error
    return load_task(
        model,
        tokenizer,
        config.data,
        template=template,
        eval_data=config.eval_data,
        masked=masked,
        objective=config.objective,
        natural_column=Split.parse(config.split).column,
        max_length=config.max_length,
        train_limit=config.train_limit,
        eval_limit=config.eval_limit,
        eval_fraction=config.eval_fraction,
        eval_batch_size=config.eval_batch_size,
    )


def make_shards(config: RunConfig, task: LanguageTask) -> list[list[int]]:
    """The examples of every client of a configuration.

    Raises:
        UserError: a split that does not fit the data.
    """
    try:
        return partition(
            Split.parse(config.split),
            task.train_size,
            config.clients,
            labels=task.labels,
            natural_ids=task.natural_ids,
            seed=config.seed,
        )
    except ValueError as error:
        raise UserError(f"--split {config.split}: {error}") from error


def make_calibration(
    config: RunConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    masked: bool,
    method: Method,
) -> list[Batch]:
    """The pre-training text a method looks at; none for most."""
    if not needs_calibration(method):
        return []
    return calibration_batches(
        tokenizer,
        config.calibration,
        masked=masked,
        batches=config.calibration_batches,
        seed=config.seed,
        device=next(model.parameters()).device,
    )


def make_federation(
    config: RunConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    masked: bool,
    task: LanguageTask,
    method: Method,
    transport: Transport | None = None,
) -> Federation:
    """The federation of a configuration.

    Args:
        transport: to clients elsewhere; None: the configuration's split, in process.

    Raises:
        UserError: a split or an option that does not fit the data or the method.
    """
    shards = make_shards(config, task) if transport is None else None
    batches = make_calibration(config, model, tokenizer, masked, method)
    try:
        return Federation(
            model,
            task,
            method,
            shards,
            transport=transport,
            seed=config.seed,
            clients_per_round=config.clients_per_round,
            batch_size=config.batch_size,
            dropout=config.dropout,
            stragglers=config.stragglers,
            aggregate=config.aggregate,
            trim=config.trim,
            weights=config.weights,
            clip=config.clip,
            calibration=batches,
            checkpoint=Path(config.output) / CHECKPOINT,
            checkpoint_every=config.checkpoint_every,
        )
    except ValueError as error:
        raise UserError(f"method {config.method}: {error}") from error


def needs_calibration(method: Method) -> bool:
    """Whether a method looks at pre-training text."""
    if not isinstance(method, Meerkat):
        return False
    calibrates = not isinstance(method, RandomMask | WeightMagnitude) and method.mask is None
    return calibrates or method.track_gradip


def read_result(folder: Path) -> Result:
    """The result of a finished run."""
    return Result(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def resumed(output: str) -> dict[str, Any]:
    """The fields of the run in a folder, for ``--resume`` without repeating them.

    Raises:
        UserError: there is no run.
    """
    path = Path(output) / CONFIG
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--resume: {output} holds no run to go on with") from error
    return fields


def _open_folder(config: RunConfig, folder: Path, data: str) -> None:
    path = folder / CONFIG
    if path.is_file():
        if not config.resume:
            raise UserError(
                f"--output {folder} already holds a run: add --resume to go on with it, or name "
                f"another folder"
            )
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = build(RunConfig, saved["config"]).difference(config)
        if changed:
            raise UserError(f"--resume: {changed}; a resumed run must have the same options")
        if saved["data"] != data:
            raise UserError("--resume: the training examples are not those the run began with")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be created: {error}") from error
    _write(path, {"config": config.model_dump(), "data": data})


def _round(
    config: RunConfig,
    rows: metrics.Metrics,
    watch: Watch,
    model: nn.Module,
    task: LanguageTask,
    record: RoundRecord,
) -> None:
    """Add a round's row, with held-out scores where they are due."""
    every = config.eval_every and record.round % config.eval_every == 0
    due = record.phase == "train" and (record.round == config.rounds or bool(every))
    _add(rows, watch, model, record.to_dict(), task.evaluate(model) if due else {})


def _add(
    rows: metrics.Metrics,
    watch: Watch,
    model: nn.Module,
    record: dict[str, Any],
    scores: dict[str, float],
) -> None:
    before = rows.rows[-1] if rows.rows else None
    row = metrics.row_of(record, before, scores, _memory(model)[0])
    rows.write(row)
    watch(row)


def _result(
    config: RunConfig, federation: Federation, model: nn.Module, rows: list[metrics.Row]
) -> Result:
    names = {"eval_loss": "loss", "accuracy": "accuracy", "perplexity": "perplexity"}
    scored = [
        {short: row[name] for name, short in names.items() if row.get(name) is not None}
        for row in rows
        if row.get("eval_loss") is not None
    ]
    accuracies = [s["accuracy"] for s in scored if "accuracy" in s]
    sent = sum(len(r["invited"]) - len(r["dropped"]) for r in rows)
    return Result(
        method=config.method,
        seed=config.seed,
        rounds=federation.round,
        before=scored[0],
        after=scored[-1],
        best=max(accuracies) if accuracies else min(s["loss"] for s in scored),
        bytes_up=rows[-1]["total_up"],
        bytes_down=rows[-1]["total_down"],
        uplink=rows[-1]["total_up"] / sent if sent else 0.0,
        dense=sum(
            p.numel() * p.element_size()
            for name, p in model.named_parameters()
            if ".lora_" not in name
        ),
        seconds=rows[-1]["total_seconds"],
        memory=_memory(model)[1],
        moving=federation.space.numel,
        parameters=sum(p.numel() for p in model.parameters()),
        flagged=list(federation.method.flagged),
        rejections=federation.rejections,
    )


def _memory(model: nn.Module) -> tuple[int, int]:
    """Bytes held now, and at most so far."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return resident()


def _write(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


__all__ = [
    "Result",
    "fetched",
    "load_model",
    "make_calibration",
    "make_federation",
    "make_shards",
    "make_task",
    "method_options",
    "read_result",
    "resumed",
    "run",
]
