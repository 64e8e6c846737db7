"""Language tasks of a federation: encoded examples, their loss, and what is measured held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedzo.data.sources import Record, find, read_records
from fedzo.data.templates import MASK, TEMPLATES, Classification, Instruction, RowError, Template
from zokernels.finetune.config import UserError
from zokernels.finetune.data import Batch, Example, Prepared, collate
from zokernels.finetune.objective import Objective, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTIVES = ("candidates", "label")

# The split of one source into training and held-out examples does not depend on the run's seed.
_SPLIT_SEED = 0x5EED

# What a causal batch holds besides the model's inputs.
_EXTRA = ("labels", "targets", "candidates")


class CausalTask:
    """Classification by answer words, instructions or plain text with a causal language model.

    Args:
        model: decides how its loss is had cheapest; it is not kept.
        prepared: encoded examples.
        objective: ``candidates`` (cross entropy among the answer words, as MeZO trains classifiers)
            or ``label`` (of the right word's tokens over the whole vocabulary).
        natural_ids: natural id of every training example.
        eval_batch_size: held-out examples at once.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        *,
        objective: str = "candidates",
        natural_ids: Sequence[str] | None = None,
        eval_batch_size: int = 32,
    ) -> None:
        self.prepared = prepared
        self.natural_ids = natural_ids
        self.eval_batch_size = eval_batch_size
        self._objective = Objective(model, objective)
        self._objective.settle(model, self._collate(prepared.train[:2], _device(model)))
        self._device = _device(model)

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.prepared.train)

    @property
    def labels(self) -> list[int] | None:
        """Label of every training example; None where there are none."""
        return _labels(self.prepared)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The training examples ``indices``, padded on the left: ``input_ids``, ``attention_mask``,
        ``position_ids`` int64 ``[N, T]``, and what their loss is taken from."""
        batch = self._collate([self.prepared.train[i] for i in indices], self._device)
        extra = {name: getattr(batch, name) for name in _EXTRA}
        return {**batch.inputs, **{name: t for name, t in extra.items() if t is not None}}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of a batch: a scalar, differentiable where gradients are enabled."""
        inputs = {name: tensor for name, tensor in batch.items() if name not in _EXTRA}
        whole = Batch(inputs, *(batch.get(name) for name in _EXTRA))
        if whole.targets is None and torch.is_grad_enabled():
            # The loss without logits has no backward pass.
            per_token, weight = self._objective.token_losses(model, whole)
            return per_token.sum() / weight.sum()
        return self._objective(model, whole)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``loss``, ``accuracy`` (classification) or ``perplexity``, and ``examples``, held out."""
        score = evaluate(
            model,
            self._objective,
            self.prepared,
            self.prepared.held_out,
            batch_size=self.eval_batch_size,
            device=self._device,
        )
        values = {"loss": score.loss, "examples": float(score.examples)}
        if score.accuracy is None:
            return {**values, "perplexity": score.perplexity}
        return {**values, "accuracy": score.accuracy}

    def _collate(self, examples: Sequence[Example], device: torch.device) -> Batch:
        return collate(self.prepared, examples, device)


class MaskedTask:
    """Classification by the word at ``<mask>`` of a masked language model (RoBERTa, BERT).

    Arguments and members as :class:`CausalTask`; an example's ``start`` is the mask's position.

    Source: Malladi et al. 2023, appendix E (prompts of RoBERTa-large).
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        *,
        objective: str = "candidates",
        natural_ids: Sequence[str] | None = None,
        eval_batch_size: int = 32,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
        self.prepared = prepared
        self.natural_ids = natural_ids
        self.eval_batch_size = eval_batch_size
        self.objective = objective
        self._device = _device(model)
        self._candidates = torch.tensor([c[0] for c in prepared.candidates], device=self._device)
        self._head = self._short_cut(model)

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.prepared.train)

    @property
    def labels(self) -> list[int] | None:
        """Label of every training example."""
        return _labels(self.prepared)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The training examples ``indices``: ``input_ids`` and ``attention_mask`` int64 ``[B, T]``
        (padded on the right), ``positions`` of the masks and ``targets`` int64 ``[B]``."""
        return self._collate([self.prepared.train[i] for i in indices])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross entropy among the answer words (``candidates``) or over the vocabulary."""
        return self._losses(self._scores(model, batch), batch).mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``loss``, ``accuracy`` among the answer words, and ``examples``, held out."""
        examples = sorted(self.prepared.held_out, key=lambda e: len(e.tokens))
        loss, right = 0.0, 0
        with torch.inference_mode():
            for at in range(0, len(examples), self.eval_batch_size):
                batch = self._collate(examples[at : at + self.eval_batch_size])
                scores = self._scores(model, batch)
                loss += float(self._losses(scores, batch).double().sum())
                if self.objective == "label":
                    scores = scores[:, self._candidates]
                right += int((scores.argmax(1) == batch["targets"]).sum())
        count = len(examples)
        return {"loss": loss / count, "accuracy": right / count, "examples": float(count)}

    def _losses(self, scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy of every example: float32 ``[B]``."""
        right = batch["targets"]
        if self.objective == "label":
            right = self._candidates[right]
        return F.cross_entropy(scores, right, reduction="none")

    def _scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits at the masks, of the answer words alone where these are all that counts: float32
        ``[B, C]``, or ``[B, V]`` for the objective ``label``."""
        positions = batch["positions"]
        rows = torch.arange(positions.numel(), device=positions.device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        whole = _base(model)
        if self._head is None:
            logits: Tensor = model(**inputs).logits[rows, positions].float()
            return logits if self.objective == "label" else logits[:, self._candidates]
        hidden = whole.base_model(**inputs).last_hidden_state[rows, positions]
        if self.objective == "label":
            return getattr(whole, self._head)(hidden).float()  # type: ignore[no-any-return]
        # An embedding, not an index: of a weight that moves only these rows are displaced.
        decoder = whole.get_output_embeddings()
        weight = F.embedding(self._candidates, decoder.weight)
        return F.linear(_HEADS[self._head](whole, hidden), weight, decoder.bias[self._candidates])

    def _short_cut(self, model: nn.Module) -> str | None:
        """The head's name, when applying it to the mask alone is what the model gives."""
        batch = self._collate(self.prepared.train[:2])
        for name in _HEADS:
            if not isinstance(getattr(_base(model), name, None), nn.Module):
                continue
            with torch.no_grad():
                self._head = None
                full = self._scores(model, batch)
                self._head = name
                try:
                    short = self._scores(model, batch)
                except (AttributeError, TypeError, RuntimeError):
                    continue
            if torch.allclose(full, short, rtol=1e-3, atol=1e-3 * float(full.abs().max())):
                return name
        return None

    def _collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        width = max(len(e.tokens) for e in examples)
        ids = torch.full((len(examples), width), self.prepared.pad)
        mask = torch.zeros((len(examples), width), dtype=torch.int64)
        for i, e in enumerate(examples):
            ids[i, : len(e.tokens)] = torch.tensor(e.tokens)
            mask[i, : len(e.tokens)] = 1
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "positions": torch.tensor([e.start for e in examples]),
            "targets": torch.tensor([e.label for e in examples]),
        }
        return {name: tensor.to(self._device) for name, tensor in batch.items()}


def _roberta_features(model: Any, hidden: Tensor) -> Tensor:
    head = model.lm_head
    features: Tensor = head.layer_norm(F.gelu(head.dense(hidden)))
    return features


# What the heads of masked language models do before the output embedding, by the head's name.
_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cls": lambda model, hidden: model.cls.predictions.transform(hidden),
    "lm_head": _roberta_features,
}

LanguageTask = CausalTask | MaskedTask


def load_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    *,
    template: str | Template,
    eval_data: str | None = None,
    masked: bool = False,
    objective: str = "candidates",
    natural_column: str | None = None,
    max_length: int = 128,
    train_limit: int = 0,
    eval_limit: int = 1000,
    eval_fraction: float = 0.1,
    eval_batch_size: int = 32,
) -> LanguageTask:
    """A task from files, a folder or hub data sets.

    Args:
        model: the model that is trained.
        tokenizer: its tokenizer.
        data: training examples: file, folder (:func:`fedzo.data.sources.find`) or
            ``name[:config][@split]``.
        template: a name of :data:`~fedzo.data.templates.TEMPLATES`, or a template.
        eval_data: held-out examples; None takes the folder's, or splits ``eval_fraction`` off.
        masked: whether the model is a masked language model.
        objective: ``candidates`` or ``label``.
        natural_column: column of the natural id; None takes the template's.
        max_length: tokens of an example; longer ones are cut.
        train_limit, eval_limit: at most that many examples, chosen at random once; 0: all.
        eval_fraction: part of ``data`` held out when there is nothing else.
        eval_batch_size: held-out examples at once.

    Raises:
        UserError: unreadable or empty data, a bad row (the message names it), an answer word that
            is not one token of a masked model, or a template the model cannot serve.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise UserError(f"--task must be one of {', '.join(TEMPLATES)}; got {template!r}")
        template = TEMPLATES[template]
    if masked and not isinstance(template, Classification):
        raise UserError(f"--task {template.name} needs a causal language model; this one is masked")
    known, columns = _columns(template)
    source, eval_source = find(data, eval_data)
    records = read_records(source, known=known, columns=columns)
    if eval_source is not None:
        held = read_records(eval_source, option="--eval-data", known=known, columns=columns)
    else:
        records, held = _split(records, eval_fraction)
    column = natural_column or (template.natural if isinstance(template, Instruction) else None)
    encoder = _Encoder(tokenizer, template, masked, max_length)
    train = encoder.all(list(enumerate(records, 1)), f"--data {source}", train_limit)
    held_out = encoder.all(list(enumerate(held, 1)), f"--eval-data {eval_source}", eval_limit)
    examples, chosen = [e for _, e in train], [record for record, _ in train]
    ids = None
    if column is not None and all(column in record for record in chosen):
        ids = [str(record[column]) for record in chosen]
    elif natural_column is not None:
        raise UserError(
            f"--split natural:{natural_column}: no such column in {source}; the columns are "
            f"{', '.join(chosen[0])}"
        )
    labelled = isinstance(template, Classification)
    prepared = Prepared(
        "classify" if labelled else ("completion" if isinstance(template, Instruction) else "text"),
        examples,
        [e for _, e in held_out],
        list(template.names) if isinstance(template, Classification) else [],
        encoder.candidates,
        encoder.pad,
    )
    kind = MaskedTask if masked else CausalTask
    return kind(
        model,
        prepared,
        objective=objective,
        natural_ids=ids,
        eval_batch_size=eval_batch_size,
    )


def fingerprint(task: LanguageTask) -> str:
    """Digest of the training examples: what a resumed run must find again."""
    digest = hashlib.sha256(task.prepared.sha256().encode())
    digest.update(repr(task.natural_ids).encode())
    return digest.hexdigest()[:16]


class _Encoder:
    """Turns the records of a task into examples."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        masked: bool,
        max_length: int,
    ) -> None:
        self.tokenizer, self.template, self.masked = tokenizer, template, masked
        self.max_length = max_length
        pad = tokenizer.pad_token_id
        self.pad: int = next(
            (int(i) for i in (pad, tokenizer.eos_token_id) if i is not None),
            0,
        )
        self.candidates: list[tuple[int, ...]] = []
        if isinstance(template, Classification):
            self.candidates = self._words(template)

    def all(
        self, records: list[tuple[int, Record]], where: str, limit: int
    ) -> list[tuple[Record, Example]]:
        if limit and limit < len(records):
            order = torch.randperm(
                len(records), generator=torch.Generator().manual_seed(_SPLIT_SEED)
            )
            records = [records[i] for i in sorted(order[:limit].tolist())]
        done = []
        for number, record in records:
            try:
                done.append((record, self.one(record)))
            except RowError as error:
                raise UserError(f"{where} row {number}: {error}") from error
        return done

    def one(self, record: Record) -> Example:
        """One example.

        Raises:
            RowError: the record does not fit the template.
        """
        template = self.template
        if isinstance(template, Classification):
            if self.masked:
                return self._masked(template, record)
            room = self.max_length - max(map(len, self.candidates))
            tokens = self._tokens(template.render(record), special=True)
            # Cut from the left, as MeZO does: the end of the prompt asks the question.
            cut = len(tokens) > room
            return Example(tuple(tokens[-room:]), label=template.label(record), cut=cut)
        if isinstance(template, Instruction):
            prompt, answer = template.render(record)
            return self._completion(prompt, answer)
        if not str(record.get(template.column) or "").strip():
            raise RowError(f"no text in column {template.column!r}")
        tokens = self._tokens(str(record[template.column]), special=True)[: self.max_length]
        if len(tokens) < 2:
            raise RowError("the text has fewer than two tokens")
        return Example(tuple(tokens))

    def _completion(self, prompt: str, answer: str) -> Example:
        head = self._tokens(prompt, special=True)
        tail = self._tokens(f" {answer.strip()}", special=False)
        if self.tokenizer.eos_token_id is not None:
            tail.append(int(self.tokenizer.eos_token_id))
        cut = len(head) + len(tail) > self.max_length
        tail = tail[: self.max_length // 2] if cut else tail
        head = head[-(self.max_length - len(tail)) :]
        return Example(tuple(head + tail), start=len(head), cut=cut)

    def _masked(self, template: Classification, record: Record) -> Example:
        text = template.render(record, masked=True)
        before, _, after = text.partition(MASK)
        # The mask token goes in by its id: the data may spell the tokenizer's own.
        body = self._tokens(before.rstrip(), special=False)
        at = len(body)
        body = [*body, int(self.tokenizer.mask_token_id), *self._tokens(after, special=False)]
        room = self.max_length - 2
        start = max(0, min(len(body) - room, at - room // 2))
        window = body[start : start + room]
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        tokens = [first, *window, last]
        return Example(
            tuple(int(t) for t in tokens),
            start=at - start + 1,
            label=template.label(record),
            cut=len(body) > room,
        )

    def _words(self, template: Classification) -> list[tuple[int, ...]]:
        if not self.masked:
            words = template.words
        elif template.masked is None:
            raise UserError(f"--task {template.name} has no prompt for masked language models")
        elif self.tokenizer.mask_token_id is None:
            raise UserError("--model: the tokenizer of a masked language model needs a mask token")
        else:
            words = tuple(f" {word}" for word in template.masked_words)
        candidates = [tuple(self._tokens(word, special=False)) for word in words]
        for word, tokens in zip(words, candidates, strict=True):
            if not tokens or (self.masked and len(tokens) != 1):
                need = "must be one token" if self.masked else "has no token"
                raise UserError(f"--task {template.name}: the answer word {word.strip()!r} {need}")
        if len(set(candidates)) < len(candidates):
            raise UserError(f"--task {template.name}: two labels have the same word: {words}")
        if max(map(len, candidates)) >= self.max_length:
            raise UserError(
                f"--max-length {self.max_length} leaves no room beside the answer words"
            )
        return candidates

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        return list(ids.input_ids)


def _columns(template: Template) -> tuple[set[str], tuple[str, ...]]:
    """Names that make a TSV line a header, and the columns of a file without one."""
    if isinstance(template, Classification):
        return {*template.columns, template.label_column}, template.columns
    if isinstance(template, Instruction):
        return {name for names in template.columns.values() for name in names} | {"prompt"}, ()
    return {template.column}, (template.column,)


def _split(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    count = max(1, round(len(records) * fraction))
    if count >= len(records):
        raise UserError(f"--data holds {len(records)} example, too few to hold some out")
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held = set(torch.randperm(len(records), generator=generator)[:count].tolist())
    return (
        [r for i, r in enumerate(records) if i not in held],
        [r for i, r in enumerate(records) if i in held],
    )


def _labels(prepared: Prepared) -> list[int] | None:
    return [e.label for e in prepared.train] if prepared.labels else None


def _base(model: nn.Module) -> Any:
    """The model under peft's adapters."""
    holder: Any = model
    return holder.get_base_model() if hasattr(model, "get_base_model") else holder


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


__all__ = ["OBJECTIVES", "CausalTask", "MaskedTask", "fingerprint", "load_task"]
