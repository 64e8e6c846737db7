"""Examples from files and datasets, encoded for a causal language model.

Three tasks: ``text`` (documents joined and cut into blocks), ``completion`` (loss on what follows
a prompt) and ``classify`` (label words scored after a prompt, as MeZO does). Which examples a step
sees depends on the seed and the step alone, so a resumed run sees what the first one would have
seen.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zokernels.finetune.config import Config, UserError, _one_line
from zokernels.noise import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")

# The split of one data source into training and held-out examples is the same for every seed.
_SPLIT_SEED = 0x5EED
_ORDER_STREAM = 1


@dataclass(frozen=True)
class Example:
    """Token ids of one example.

    ``text`` and ``completion``: ``tokens`` with ``start`` the first position that is predicted.
    ``classify``: ``tokens`` is the prompt and ``label`` indexes the candidates. ``cut`` says that
    the example was longer than ``max_length``.
    """

    tokens: tuple[int, ...]
    start: int = 1
    label: int = -1
    cut: bool = False


@dataclass(frozen=True)
class Prepared:
    """Encoded examples.

    Attributes:
        task: text, completion or classify.
        train, held_out: examples.
        labels: label values of ``classify``, in the order of ``candidates``.
        candidates: the label words' token ids.
        pad: token id of the padding.
        notes: what was dropped or cut, for the report.
    """

    task: str
    train: list[Example]
    held_out: list[Example]
    labels: list[str] = field(default_factory=list)
    candidates: list[tuple[int, ...]] = field(default_factory=list)
    pad: int = 0
    notes: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """Digest of the training examples: what a resumed run must find again."""
        digest = hashlib.sha256(repr((self.task, self.candidates)).encode())
        for e in self.train:
            digest.update(repr((e.tokens, e.start, e.label)).encode())
        return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------


def read(source: str, option: str = "--data") -> list[Record]:
    """Records of a file or of ``name[:config]`` of a dataset (its ``train`` split).

    A ``.txt`` file gives one record ``{"text": ...}`` per block of lines between blank lines.

    Raises:
        UserError: no such file or dataset, or it is empty or malformed.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES or path.is_file():
        records = list(_read_file(path, option))
    elif path.is_dir() or not source.startswith((".", "/", "~")):
        records = _read_dataset(source, option)
    else:
        raise UserError(f"{option}: no such file: {source}")
    if not records:
        raise UserError(f"{option}: {source} holds no example")
    return records


def _read_file(path: Path, option: str) -> Iterator[Record]:
    if not path.is_file():
        raise UserError(f"{option}: no such file: {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{option} must be one of {', '.join(SUFFIXES)}; got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path} is not UTF-8 text: {_one_line(error)}") from error
    if suffix == ".txt":
        for block in text.split("\n\n"):
            if block.strip():
                yield {"text": block.strip("\n")}
    elif suffix in (".csv", ".tsv"):
        yield from _table(text, "," if suffix == ".csv" else "\t", f"{option}: {path}")
    elif suffix == ".jsonl":
        # Not splitlines: JSON may hold U+2028 and the like as they are.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _object(line, f"{option}: {path} line {number}")
    else:
        listed = _json(text, f"{option}: {path}")
        if not isinstance(listed, list):
            raise UserError(f"{option}: {path} must hold a list of objects")
        for number, entry in enumerate(listed, 1):
            if not isinstance(entry, dict):
                raise UserError(f"{option}: {path} entry {number} must be an object")
            yield entry


def _table(text: str, delimiter: str, where: str) -> list[Record]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    limit = csv.field_size_limit(sys.maxsize)  # 128 KiB would be too little for a document
    listed: list[Record] = []
    try:
        names = list(rows.fieldnames or [])
        if len(set(names)) < len(names):
            raise UserError(f"{where} has two columns of the same name: {', '.join(names)}")
        for row in rows:
            if None in row or None in row.values():
                raise UserError(
                    f"{where} line {rows.line_num} does not have the header's {len(names)} columns"
                )
            listed.append(dict(row))
    except csv.Error as error:
        raise UserError(f"{where} line {rows.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return listed


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error


def _object(text: str, where: str) -> Record:
    value = _json(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object; got {type(value).__name__}")
    return value


def _read_dataset(source: str, option: str) -> list[Record]:
    name, _, config = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{option} {source}: datasets are read with: pip install datasets"
        ) from error
    try:
        loaded: Any = (
            datasets.load_from_disk(name)
            if (Path(name) / "dataset_info.json").is_file()
            or (Path(name) / "dataset_dict.json").is_file()
            else datasets.load_dataset(name, config or None)
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{option}: {source} is neither a file nor a loadable dataset: {_one_line(error)}"
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise UserError(f"{option}: {source} has no train split; it has {sorted(loaded)}")
        loaded = loaded["train"]
    return [dict(row) for row in loaded]


# --- encoding -------------------------------------------------------------------------------------


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, split and encode the examples of a run.

    Raises:
        UserError: see :func:`read`; an unknown column, a label without a word, too few examples.
    """
    records = read(config.data)
    held = read(config.eval_data, "--eval-data") if config.eval_data is not None else None
    task = config.resolved_task
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    if task == "text":
        column = config.text_column or "text"
        train, held_out = _text(config, tokenizer, records, held, column)
        return _limited(config, Prepared(task, train, held_out, pad=pad))
    if held is None:
        records, held = _split(records, config.eval_fraction)
    if task == "completion":
        columns = (config.prompt_column or "prompt", config.completion_column or "completion")
        train = [_completion(config, tokenizer, r, columns, "--data") for r in records]
        held_out = [_completion(config, tokenizer, r, columns, "--eval-data") for r in held]
        return _limited(config, Prepared(task, train, held_out, pad=pad))
    labels, candidates = _label_words(config, tokenizer, records + held)
    train = [_classify(config, tokenizer, r, labels, candidates) for r in records]
    held_out = [_classify(config, tokenizer, r, labels, candidates) for r in held]
    return _limited(config, Prepared(task, train, held_out, labels, candidates, pad))


def _limited(config: Config, prepared: Prepared) -> Prepared:
    if not prepared.train or not prepared.held_out:
        part = "training" if not prepared.train else "held-out"
        raise UserError(
            f"--data {config.data} gives no {part} example: it is too short, or --eval-fraction "
            f"{config.eval_fraction:g} is too small or too large"
        )
    if config.train_limit:
        del prepared.train[config.train_limit :]
    if config.eval_limit:
        del prepared.held_out[config.eval_limit :]
    cut = sum(e.cut for e in prepared.train + prepared.held_out)
    if cut:
        prepared.notes.append(f"{cut} examples are longer than {config.max_length} tokens: cut")
    return prepared


def _split(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records by a fixed shuffle; no record is in both."""
    order = torch.randperm(
        len(records), generator=torch.Generator().manual_seed(_SPLIT_SEED)
    ).tolist()
    count = max(1, round(len(records) * fraction))
    held = [records[i] for i in order[:count]]
    known = {_key(r) for r in held}
    return [records[i] for i in order[count:] if _key(records[i]) not in known], held


def _key(record: Record) -> str:
    return json.dumps(record, sort_keys=True, default=str)


def _column(record: Record, name: str, option: str) -> str:
    if name not in record:
        raise UserError(
            f"{option}: no column {name!r}; the columns are {', '.join(record) or 'none'}"
        )
    value = record[name]
    if value is None:
        raise UserError(f"{option}: an example has no {name!r} (null): leave it out")
    return value if isinstance(value, str) else json.dumps(value)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, truncation=False).input_ids)


def _text(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    held: list[Record] | None,
    column: str,
) -> tuple[list[Example], list[Example]]:
    """Documents joined by the end-of-text token and cut into blocks of ``max_length``.

    Without held-out data the last ``eval_fraction`` of the blocks are held out.
    """

    def blocks(rows: list[Record]) -> list[Example]:
        stream: list[int] = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for row in rows:
            tokens = _encode(tokenizer, _column(row, column, "--text-column"), special=False)
            stream += tokens + end
        size = min(config.max_length, len(stream))
        if size < 2:
            return []
        return [
            Example(tuple(stream[at : at + size])) for at in range(0, len(stream) - size + 1, size)
        ]

    train = blocks(records)
    if held is not None:
        return train, blocks(held)
    if len(train) < 2:
        raise UserError(
            f"--data {config.data} gives {len(train)} block of {config.max_length} tokens, too few "
            f"to hold some out: give more text, a smaller --max-length, or --eval-data"
        )
    count = min(len(train) - 1, max(1, round(len(train) * config.eval_fraction)))
    return train[:-count], train[-count:]


def _completion(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    columns: tuple[str, str],
    option: str,
) -> Example:
    prompt = _encode(tokenizer, _column(record, columns[0], "--prompt-column"), special=True)
    tail = _encode(tokenizer, _column(record, columns[1], "--completion-column"), special=False)
    if tokenizer.eos_token_id is not None:
        tail.append(tokenizer.eos_token_id)
    if not tail:
        raise UserError(f"{option}: an example's completion is empty")
    cut = len(prompt) + len(tail) > config.max_length
    tail = tail[: config.max_length - 1]
    prompt = prompt[-(config.max_length - len(tail)) :]
    if not prompt:
        raise UserError(f"{option}: an example's prompt is empty")
    return Example(tuple(prompt + tail), start=len(prompt), cut=cut)


def template_of(config: Config) -> str:
    """The prompt template of ``classify``; by default the text column and ``Label:``."""
    return config.prompt or f"{{{config.text_column or 'text'}}}\nLabel:"


def _label_words(
    config: Config, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> tuple[list[str], list[tuple[int, ...]]]:
    column = str(config.label_column)
    present = sorted({_column(record, column, "--label-column") for record in records})
    if "" in present:
        raise UserError(f"--label-column: an example has an empty {column!r}: leave it out")
    words = dict(config.verbalizers) or {value: f" {value}" for value in present}
    unknown = [value for value in present if value not in words]
    if unknown:
        raise UserError(
            f"--verbalizer has no word for label {unknown[0]!r}, only for {', '.join(words)}"
        )
    if len(words) < 2:
        raise UserError(f"--label-column {column} needs two labels or more; got {present}")
    if len(words) > 256:
        raise UserError(
            f"--label-column {column} has {len(words)} values: too many for label words"
        )
    candidates = [tuple(_encode(tokenizer, word, special=False)) for word in words.values()]
    for word, tokens in zip(words.values(), candidates, strict=True):
        if not tokens:
            raise UserError(f"--verbalizer: the word {word!r} has no tokens")
    if len(set(candidates)) < len(candidates):
        raise UserError(f"--verbalizer: two labels have the same word: {list(words.values())}")
    return list(words), candidates


def _classify(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    labels: list[str],
    candidates: list[tuple[int, ...]],
) -> Example:
    template = template_of(config)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"--prompt {template!r} is no template: {error}") from error
    if not names:
        raise UserError(f"--prompt {template!r} must name a column in braces, such as {{text}}")
    values = {name: _column(record, name, "--prompt") for name in names}
    room = config.max_length - max(map(len, candidates))
    if room < 1:
        raise UserError(f"--max-length {config.max_length} leaves no room beside the label words")
    # Cut from the left, as MeZO does: the end of the prompt asks the question.
    tokens = _encode(tokenizer, template.format(**values), special=True)
    label = labels.index(_column(record, str(config.label_column), "--label-column"))
    return Example(tuple(tokens[-room:]), label=label, cut=len(tokens) > room)


# --- batches --------------------------------------------------------------------------------------


def order(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step: epoch by epoch, each a fresh permutation."""
    chosen: list[int] = []
    at = step * batch_size
    while len(chosen) < batch_size:
        epoch, offset = divmod(at + len(chosen), count)
        chosen += _permutation(count, seed, epoch)[
            offset : offset + batch_size - len(chosen)
        ].tolist()
    return chosen


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    key = derive_seed(seed, epoch, _ORDER_STREAM) & (1 << 63) - 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(key))


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some examples.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, int64 ``[N, T]``, padded on the left (so the
            last position is every example's last token) and ``position_ids``.
        labels: int64 ``[N, T]``, -100 where nothing is predicted; empty for single-token labels.
        targets: int64 ``[B]``, the right candidate of each example (classify).
        candidates: int64 ``[C]``, single-token label words; None when some have several tokens,
            then ``N = B * C``, one row per example and candidate.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    targets: Tensor | None = None
    candidates: Tensor | None = None


def collate(prepared: Prepared, examples: Sequence[Example], device: torch.device) -> Batch:
    """One batch on ``device``."""
    if prepared.task != "classify":
        inputs, labels = _pad([(e.tokens, e.start) for e in examples], prepared.pad, device)
        return Batch(inputs, labels)
    targets = torch.tensor([e.label for e in examples], device=device)
    if all(len(c) == 1 for c in prepared.candidates):
        inputs, _ = _pad([(e.tokens, 1) for e in examples], prepared.pad, device)
        single = torch.tensor([c[0] for c in prepared.candidates], device=device)
        return Batch(inputs, None, targets, single)
    rows = [(e.tokens + c, len(e.tokens)) for e in examples for c in prepared.candidates]
    inputs, labels = _pad(rows, prepared.pad, device)
    return Batch(inputs, labels, targets)


def _pad(
    rows: Sequence[tuple[tuple[int, ...], int]], pad: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), width), -100)
    for i, (tokens, start) in enumerate(rows):
        left = width - len(tokens)
        ids[i, left:] = mask_values = torch.tensor(tokens)
        mask[i, left:] = 1
        labels[i, left + start :] = mask_values[start:]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)
