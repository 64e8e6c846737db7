"""What a federated run is told: one file, every field documented, checked and overridable.

A file is TOML, YAML or JSON with the fields of :class:`RunConfig` (or :class:`CompareConfig`) by
name. Values on the command line win over the file's.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedzo.data.partition import Split
from fedzo.data.pretraining import BUILTIN
from fedzo.data.templates import TEMPLATES
from zokernels.finetune.config import UserError

C = TypeVar("C", bound="RunConfig")

DATA, FEDERATION, TRAINING, RUN = "Model and data", "Federation", "Training", "Run"

# What a data set's name says about its task, longest first.
_NAMES = {
    "codealpaca": "codealpaca",
    "code_alpaca": "codealpaca",
    "ag_news": "agnews",
    "agnews": "agnews",
    "ag-news": "agnews",
    "alpaca": "alpaca",
    "sst-2": "sst2",
    "sst2": "sst2",
    "boolq": "boolq",
    "dolly": "dolly",
    "gsm8k": "gsm8k",
    "rte": "rte",
    "wic": "wic",
    "reviews": "reviews",
    "demo": "reviews",
}

# Fields that may differ when a run goes on: they do not change what is computed.
FREE_ON_RESUME = frozenset(
    {"output", "resume", "tensorboard", "rounds", "plots", "patience", "round_timeout"}
)


def _field(panel: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)


class RunConfig(BaseModel):
    """A federated run. Every field says what it is in its description (``fedzo run --help``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)

    model: str = _field(
        DATA,
        ...,
        "transformers model id or folder; demo: SmolLM2-135M, fetched once.",
        min_length=1,
    )
    data: str = _field(
        DATA,
        ...,
        "File (.csv, .tsv, .json, .jsonl, .txt), folder with train.* and dev.*, or "
        "name[:config][@split] of a data set; demo: rated reviews, fetched once.",
        min_length=1,
    )
    eval_data: str | None = _field(
        DATA, None, "Held-out examples; default: the folder's, or a part of --data."
    )
    task: str = _field(
        DATA,
        "auto",
        f"{', '.join(TEMPLATES)}, custom (--prompt, --words), or auto: by the name of --data.",
    )
    prompt: str | None = _field(
        DATA, None, "Prompt of --task custom, columns in braces; <mask> for a masked model."
    )
    words: dict[str, str] = _field(
        DATA, {}, "Answer words of --task custom, LABEL=WORD once per label ('1= great')."
    )
    label_column: str = _field(DATA, "label", "Label column of --task custom.", min_length=1)
    objective: Literal["candidates", "label"] = _field(
        DATA, "candidates", "Cross entropy among the answer words, or over the vocabulary."
    )
    max_length: int = _field(DATA, 128, "Tokens per example; longer ones are cut.", ge=8)
    train_limit: int = _field(DATA, 0, "Most training examples; 0: all.", ge=0)
    eval_limit: int = _field(DATA, 500, "Most held-out examples; 0: all.", ge=0)
    eval_fraction: float = _field(
        DATA, 0.1, "Part of --data held out when there is no other.", gt=0, lt=1
    )
    calibration: str = _field(
        DATA,
        BUILTIN,
        "Pre-training text for masks and GradIP: file or data set with a text column (a sample of "
        "C4), or builtin: Python's documentation.",
    )
    calibration_batches: int = _field(DATA, 16, "Batches of 8 x 64 tokens of that text.", ge=1)

    method: str = _field(FEDERATION, "meerkat", "See `fedzo methods`.")
    clients: int = _field(FEDERATION, 10, "Clients.", ge=1)
    split: str = _field(
        FEDERATION, "iid", "iid, dirichlet:ALPHA, natural[:COLUMN] or label[:CLIENTS]."
    )
    clients_per_round: int | None = _field(
        FEDERATION, None, "Clients drawn for each round; default: all.", ge=1
    )
    dropout: float = _field(
        FEDERATION, 0.0, "Probability that a client of a round sends nothing.", ge=0, lt=1
    )
    stragglers: float = _field(
        FEDERATION, 0.0, "Probability that a client's message comes a round late.", ge=0, lt=1
    )
    aggregate: Literal["mean", "median", "trimmed_mean"] = _field(
        FEDERATION, "mean", "How the server merges the clients' scalars."
    )
    trim: float = _field(
        FEDERATION, 0.1, "Share cut off on each side by trimmed_mean.", ge=0, lt=0.5
    )
    clip: float | None = _field(
        FEDERATION, None, "Limit of the size of a scalar at the server; default: none.", gt=0
    )
    weights: Literal["uniform", "samples"] = _field(
        FEDERATION, "uniform", "Weights of the mean: uniform, or the clients' sample counts."
    )

    transport: Literal["inprocess", "flower"] = _field(
        FEDERATION,
        "inprocess",
        "What carries the messages: inprocess (one copy of the model), or flower (Flower's apps).",
    )
    round_timeout: float | None = _field(
        FEDERATION, None, "Seconds a round of flower waits for replies; default: for all.", gt=0
    )

    rounds: int = _field(TRAINING, 100, "Rounds.", ge=1)
    steps: int | None = _field(
        TRAINING, None, "Local steps a round (T); default: the method's.", ge=1
    )
    lr: float | None = _field(TRAINING, None, "Learning rate; default: the method's.", gt=0)
    eps: float | None = _field(TRAINING, None, "Size of the probes; default: the method's.", gt=0)
    batch_size: int = _field(TRAINING, 16, "Examples of a local step.", ge=1)
    options: dict[str, Any] = _field(
        TRAINING, {}, "Further options of the method, NAME=VALUE (see `fedzo methods`)."
    )
    trainable: str = _field(
        TRAINING,
        "full",
        "What may move, before a method's own choice: full, norms, biases, layers:SLICE, "
        "regex:PATTERN; + joins, & intersects.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = _field(
        TRAINING, "float32", "Of the weights."
    )
    device: str = _field(TRAINING, "auto", "auto, cpu or cuda[:N].")

    seed: int = _field(RUN, 0, "Of everything random.", ge=0, lt=2**32)
    output: str = _field(RUN, "runs/fedzo", "Folder of the results.", min_length=1)
    resume: bool = _field(RUN, False, "Go on with the run in --output.")
    eval_every: int = _field(RUN, 10, "Rounds between held-out scores; 0: only at the end.", ge=0)
    patience: int = _field(
        RUN, 0, "Stop after so many rounds without a better held-out loss; 0: never.", ge=0
    )
    checkpoint_every: int = _field(RUN, 1, "Rounds between checkpoints.", ge=1)
    eval_batch_size: int = _field(RUN, 64, "Held-out examples at once.", ge=1)
    tensorboard: bool = _field(RUN, False, "Also write TensorBoard events (needs tensorboard).")
    plots: bool = _field(RUN, True, "Draw the plots at the end (needs matplotlib).")

    @field_validator("words", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    @field_validator("split")
    @classmethod
    def _known_split(cls, value: str) -> str:
        Split.parse(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.clients_per_round is not None and self.clients_per_round > self.clients:
            raise ValueError(
                f"clients_per_round must be at most the {self.clients} clients; "
                f"got {self.clients_per_round}"
            )
        if self.round_timeout is not None and self.transport != "flower":
            raise ValueError("round_timeout belongs to transport flower")
        if self.patience and not self.eval_every:
            raise ValueError(f"patience must be 0 where eval_every is 0; got {self.patience}")
        if self.task not in (*TEMPLATES, "custom", "auto"):
            raise ValueError(
                f"task must be one of {', '.join((*TEMPLATES, 'custom', 'auto'))}; "
                f"got {self.task!r}"
            )
        custom = self.task == "custom"
        if custom and (self.prompt is None or len(self.words) < 2):
            raise ValueError("task custom needs prompt and words for two labels or more")
        if not custom and (self.prompt is not None or self.words):
            raise ValueError("prompt and words belong to task custom")
        return self

    @property
    def resolved_task(self) -> str:
        """The task, with ``auto`` decided by the name of the data.

        Raises:
            UserError: the name says nothing.
        """
        if self.task != "auto":
            return self.task
        name = self.data.lower()
        found = next((task for part, task in _NAMES.items() if part in name), None)
        if found is None:
            raise UserError(
                f"--task must be given: the name of --data {self.data} is none of "
                f"{', '.join(dict.fromkeys(_NAMES.values()))}"
            )
        return found

    def difference(self, other: RunConfig) -> str | None:
        """The first field that matters to the result and differs, in words."""
        mine, theirs = self.model_dump(), other.model_dump()
        for name, value in mine.items():
            if name not in FREE_ON_RESUME and value != theirs[name]:
                return f"--{name.replace('_', '-')} was {value!r} and is {theirs[name]!r} now"
        return None


class Entry(BaseModel):
    """One row of a comparison: any field of :class:`RunConfig` that differs from the base."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="How the row is called.", min_length=1)


class CompareConfig(RunConfig):
    """Several methods under several seeds: a base, and what differs in each row."""

    methods: list[str] = _field(RUN, [], "Methods to compare, each with the options given.")
    entries: list[Entry] = _field(
        RUN, [], "Rows of a file: name, and any field that differs from the base."
    )
    seeds: list[int] = _field(RUN, [0, 1, 2], "Seeds of every row.", min_length=1)

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        if not self.methods and not self.entries:
            raise ValueError("methods or entries must name what is compared")
        names = [*self.methods, *(entry.name for entry in self.entries)]
        if len(set(names)) < len(names):
            raise ValueError(f"methods and entries must have different names; got {names}")
        return self

    def runs(self) -> list[tuple[str, int, RunConfig]]:
        """Name, seed and configuration of every run.

        Raises:
            UserError: an entry has an unknown field or a bad value.
        """
        own = {"methods", "entries", "seeds"}
        base = self.model_dump(exclude=own)
        rows: list[tuple[str, dict[str, Any]]] = [(m, {"method": m}) for m in self.methods]
        rows += [(e.name, dict(e.model_extra or {})) for e in self.entries]
        made = []
        for name, changes in rows:
            for seed in self.seeds:
                folder = str(Path(self.output) / name / f"seed-{seed}")
                layers = [base, {**changes, "seed": seed, "output": folder}]
                made.append((name, seed, build(RunConfig, *layers, where=f"entry {name}: ")))
        return made


def read_file(path: str) -> dict[str, Any]:
    """Fields from a TOML, YAML or JSON file; names with ``-`` or ``_``.

    Raises:
        UserError: the file is missing, malformed, or holds no fields.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config: no such file: {path}")
    suffix = file.suffix.lower()
    try:
        text = file.read_text(encoding="utf-8")
        if suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif suffix in (".yaml", ".yml"):
            values = _yaml(text)
        elif suffix == ".json":
            values = json.loads(text)
        else:
            raise UserError(f"--config must be a .toml, .yaml or .json file; got {path}")
    except ValueError as error:
        raise UserError(f"--config {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold fields by name")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _yaml(text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("YAML files are read with: pip install pyyaml") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def build(kind: type[C], *layers: Mapping[str, Any], where: str = "") -> C:
    """A configuration from layers of fields, later ones winning; ``options`` and ``words`` of
    several layers are joined.

    Raises:
        UserError: an unknown field or a bad value; the message names the field, the value and what
            is allowed.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(values.get(name), Mapping) and isinstance(value, Mapping)
            values[name] = {**values[name], **value} if both else value
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(where + _explain(kind, error)) from error


def _explain(kind: type[RunConfig], error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return f"unknown field {place!r}; known: {known}"
    if first["type"] == "missing":
        return f"--{place.replace('_', '-')} is required"
    if not place or first["type"] == "value_error":
        return message
    return f"--{place.replace('_', '-')}: {message}; got {first['input']!r}"


def parse_pairs(entries: Sequence[str], option: str) -> dict[str, str]:
    """``NAME=VALUE`` entries of the command line.

    Raises:
        UserError: an entry has no ``=`` or no name.
    """
    pairs = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.strip():
            raise UserError(f"{option} must be NAME=VALUE; got {entry!r}")
        pairs[name.strip().replace("-", "_") if option == "--set" else name] = value
    return pairs


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
