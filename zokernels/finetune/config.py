"""What a fine-tuning run is told, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from zokernels.noise import DISTRIBUTIONS, ROUNDINGS

TASKS = ("auto", "text", "completion", "classify")
OBJECTIVES = ("candidates", "label")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")

# Fields that may differ when a run is resumed: they do not change what is computed.
FREE_ON_RESUME = frozenset(
    {"output", "resume", "compare_mezo", "save_weights", "cache_dir", "checkpoint_every", "preset"}
)


class UserError(Exception):
    """Something the user can put right: shown as one line, exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A fine-tuning run.

    Attributes:
        model: transformers model id, or a folder that ``save_pretrained`` wrote.
        data: file (``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv``) or ``name[:config]`` of a
            dataset.
        eval_data: the same for the held-out examples; None splits ``eval_fraction`` off ``data``.
        task: ``text`` (causal language modelling of a text column), ``completion`` (loss on the
            completion after a prompt), ``classify`` (label words after a prompt template); ``auto``
            takes the one whose columns are given.
        text_column, prompt_column, completion_column, label_column: column names.
        prompt: template of ``classify`` with columns in braces.
        verbalizers: label value -> the word that stands for it; empty: the values themselves.
        objective: ``candidates`` (cross entropy among the label words) or ``label`` (cross entropy
            of the right label's tokens over the whole vocabulary).
        trainable: see :func:`zokernels.finetune.models.select`.
        lora_rank, lora_alpha, lora_targets: of ``trainable="lora"``; no targets: peft's default.
        steps, lr, eps, batch_size, weight_decay, momentum, distribution, num_directions, clip,
            rounding: of :class:`zokernels.MeZO`.
        accumulate: batches of ``batch_size`` that each rank takes for a step; the mean losses of
            all batches of all ranks count alike.
        ranks: processes that run it; the command line takes their number from the environment.
        max_length: tokens per example.
        schedule, warmup: learning rate over the steps; ``warmup`` steps rise linearly.
        dtype, device: of the model.
        seed, repeats: run ``repeats`` times, with ``seed``, ``seed + 1``, ...
        eval_every: steps between held-out evaluations; 0: only before and after.
        eval_batch_size, eval_limit, eval_fraction: held-out examples.
        train_limit: at most that many training examples; 0: all.
        output: folder of the results.
        resume: go on with the run in ``output``.
        checkpoint_every: steps between checkpoints.
        compare_mezo: measure MeZO's own loop on the same model and batch afterwards.
        save_weights: save the fine-tuned model with ``save_pretrained``.
        cache_dir: where the demo's model and data are kept.
        preset: name of the preset the configuration started from.

    Raises:
        UserError: a value is not allowed; the message names the option, the value and what is.
    """

    model: str = ""
    data: str = ""
    eval_data: str | None = None
    task: str = "auto"
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    label_column: str | None = None
    prompt: str | None = None
    verbalizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    objective: str = "candidates"
    trainable: str = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()
    steps: int = 1000
    lr: float = 1e-6
    eps: float = 1e-3
    batch_size: int = 16
    accumulate: int = 1
    ranks: int = 1
    max_length: int = 128
    weight_decay: float = 0.0
    momentum: float = 0.0
    distribution: str = "gaussian"
    num_directions: int = 1
    clip: float | None = None
    rounding: str | None = None
    schedule: str = "constant"
    warmup: int = 0
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    repeats: int = 1
    eval_every: int = 0
    eval_batch_size: int = 32
    eval_limit: int = 1000
    eval_fraction: float = 0.1
    train_limit: int = 0
    output: str = "runs/finetune"
    resume: bool = False
    checkpoint_every: int = 20
    compare_mezo: bool = True
    save_weights: bool = False
    cache_dir: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "data", "trainable", "output"):
            if not getattr(self, name):
                raise UserError(f"{_flag(name)} is required")
        for name, allowed in (
            ("task", TASKS),
            ("objective", OBJECTIVES),
            ("schedule", SCHEDULES),
            ("dtype", DTYPES),
            ("distribution", DISTRIBUTIONS),
        ):
            _choice(name, getattr(self, name), allowed)
        if self.rounding is not None:
            _choice("rounding", self.rounding, ROUNDINGS)
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "ranks",
            "num_directions",
            "repeats",
            "eval_batch_size",
            "lora_rank",
            "checkpoint_every",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "warmup", "eval_limit", "train_limit", "seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("max_length", self.max_length, 2)
        if self.seed + self.repeats > 1 << 32:
            raise UserError(f"--seed must be below 2**32; got {self.seed}")
        for name in ("eps", "lora_alpha"):
            _number(name, getattr(self, name), above=0.0)
        _number("lr", self.lr, least=0.0)
        _number("weight_decay", self.weight_decay, least=0.0)
        _number("momentum", self.momentum, least=0.0, below=1.0)
        _number("eval_fraction", self.eval_fraction, above=0.0, below=1.0)
        if self.clip is not None:
            _number("clip", self.clip, above=0.0)
        if self.warmup > self.steps:
            raise UserError(
                f"--warmup must be at most the number of steps, {self.steps}; got {self.warmup}"
            )
        if self.task == "classify" and self.label_column is None:
            raise UserError("--task classify needs --label-column")
        if self.prompt is not None and self.resolved_task != "classify":
            raise UserError(
                "--prompt is the template of --task classify, which needs --label-column"
            )

    @property
    def resolved_task(self) -> str:
        """The task, with ``auto`` decided by the columns that are given."""
        if self.task != "auto":
            return self.task
        if self.label_column is not None:
            return "classify"
        if self.completion_column is not None or self.prompt_column is not None:
            return "completion"
        return "text"

    @property
    def effective_batch_size(self) -> int:
        """Examples of a step, over all ranks."""
        return self.ranks * self.accumulate * self.batch_size

    @property
    def seeds(self) -> list[int]:
        """The seed of every repetition."""
        return list(range(self.seed, self.seed + self.repeats))

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        values = dataclasses.asdict(self)
        values["verbalizers"] = dict(self.verbalizers)
        values["lora_targets"] = list(self.lora_targets)
        return values

    def difference(self, other: Config) -> str | None:
        """The first field that matters to the result and differs, in words."""
        for name, value in self.to_dict().items():
            theirs = other.to_dict()[name]
            if name not in FREE_ON_RESUME and value != theirs:
                return f"{_flag(name)} was {value!r} and is {theirs!r} now"
        return None


def lr_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Learning rate of step ``step`` in [0, steps) relative to the peak.

    Linear and cosine fall to 0 at step ``steps``, so the last step still moves.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def read_file(path: str) -> dict[str, Any]:
    """Options from a JSON or TOML file; names with ``-`` or ``_``.

    Raises:
        UserError: the file is missing, malformed, or names an unknown option.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config: no such file: {path}")
    try:
        if file.suffix == ".toml":
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".json":
            values = json.loads(file.read_text(encoding="utf-8"))
        else:
            raise UserError(f"--config must be a .json or .toml file; got {path}")
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold an object of options")
    return {key.replace("-", "_"): value for key, value in values.items()}


def build(*layers: Mapping[str, Any]) -> Config:
    """A configuration from layers of options, later ones winning.

    Raises:
        UserError: an unknown option, a value of the wrong type, or one that is not allowed.
    """
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in hints:
                known = ", ".join(sorted(f.name for f in dataclasses.fields(Config)))
                raise UserError(f"unknown option {name!r}; known: {known}")
            values[name] = _convert(name, value, hints[name])
    return Config(**values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if name == "verbalizers":
        if not isinstance(value, Mapping):
            raise UserError(f"verbalizers must map label values to words; got {value!r}")
        return {str(k): str(v) for k, v in value.items()}
    if name == "lora_targets":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"lora_targets must be a list of names; got {value!r}")
        return tuple(str(v) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{_flag(name)} must be a {kind.__name__}; got {value!r}")
    return value


def _flag(name: str) -> str:
    if name == "ranks":
        return "the number of ranks"
    return "--" + {"verbalizers": "verbalizer", "lora_targets": "lora-target"}.get(
        name, name.replace("_", "-")
    )


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{_flag(name)} must be one of {', '.join(allowed)}; got {value!r}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{_flag(name)} must be at least {least}; got {value}")


def _number(
    name: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    if not (math.isfinite(value) and least <= value and above < value < below):
        limits = [
            text
            for text, limit in (
                (f"at least {least:g}", least),
                (f"above {above:g}", above),
                (f"below {below:g}", below),
            )
            if math.isfinite(limit)
        ]
        raise UserError(f"{_flag(name)} must be finite and {' and '.join(limits)}; got {value!r}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
