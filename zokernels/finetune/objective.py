"""The loss of a batch, and what is measured on the held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.finetune.data import Batch, Example, Prepared, collate
from zokernels.finetune.models import takes
from zokernels.finetune.ranks import ALONE, Ranks
from zokernels.losses import causal_lm_loss

# Logits of an evaluation batch held at once: 256 MiB in float32.
_MOST_LOGITS = 1 << 26


class Objective:
    """The loss of one task on one model class.

    Args:
        model: decides which optional arguments (positions, fewer logits) its ``forward`` gets.
        objective: ``candidates`` or ``label`` (classify only).

    Source: Malladi et al. 2023, appendix E (label words, prompts).
    """

    def __init__(self, model: nn.Module, objective: str) -> None:
        self.objective = objective
        self.positions = takes(model, "position_ids")
        self.fewer = takes(model, "logits_to_keep")
        self.cache = takes(model, "use_cache")
        self._rows = False  # whether the label words' rows of the head are enough
        self._fused = False  # whether the loss can be had without logits

    def settle(self, model: nn.Module, batch: Batch) -> None:
        """Look, on a batch, whether the loss can be had without the logits of the vocabulary."""
        self._rows = batch.candidates is not None and self._rows_are_enough(model, batch)
        self._fused = batch.targets is None and self._fuses(model, batch)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch: a scalar."""
        if batch.targets is None:
            if self._fused:
                return self._without_logits(model, batch)
            per_token, weight = self.token_losses(model, batch)
            return per_token.sum() / weight.sum()
        if self.objective == "candidates":
            return F.cross_entropy(self.scores(model, batch), batch.targets)
        if batch.candidates is not None:
            logits = self._logits(model, batch, 1)[:, -1].float()
            return F.cross_entropy(logits, batch.candidates[batch.targets])
        right = self._log_likelihoods(model, batch).gather(1, batch.targets[:, None])
        return -right.mean()

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-likelihood of every candidate, up to a constant per example: float32 ``[B, C]``."""
        if batch.candidates is not None:
            if self._rows:
                return self._few_logits(model, batch, batch.candidates).float()
            return self._logits(model, batch, 1)[:, -1, batch.candidates].float()
        return self._log_likelihoods(model, batch)

    def token_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy of the predicted tokens, and 1 where one is: float32 ``[N, width]``."""
        assert batch.labels is not None
        keep = batch.labels[:, 1:] != -100
        # Left padding: what is predicted lies in the last columns.
        width = int(keep.any(0).sum())
        targets = batch.labels[:, -width:]
        logits = self._logits(model, batch, width + 1)[:, -width - 1 : -1].float()
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
        )
        return losses.view(targets.shape), (targets != -100).float()

    def _log_likelihoods(self, model: nn.Module, batch: Batch) -> Tensor:
        losses, _ = self.token_losses(model, batch)
        assert batch.targets is not None
        return -losses.sum(1).view(batch.targets.numel(), -1)

    def _few_logits(self, model: nn.Module, batch: Batch, candidates: Tensor) -> Tensor:
        """The label words' logits at the last position, without the rest of the vocabulary."""
        whole: Any = model
        hidden = whole.base_model(**self._arguments(batch)).last_hidden_state[:, -1]
        head = whole.get_output_embeddings()
        bias = None if head.bias is None else head.bias[candidates]
        return F.linear(hidden, head.weight[candidates], bias)

    def _rows_are_enough(self, model: nn.Module, batch: Batch) -> bool:
        """Whether :meth:`_few_logits` is what the model gives: tried on this batch.

        Not for a head that moves (its rows would have to be displaced one by one), nor for adapters
        or models that do more to the logits than a linear layer.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        known = type(head) is nn.Linear and not head.weight.requires_grad
        if not known or not hasattr(model, "base_model") or hasattr(model, "peft_config"):
            return False
        assert batch.candidates is not None
        with torch.no_grad():
            whole = self._logits(model, batch, 1)[:, -1, batch.candidates].float()
            try:
                few = self._few_logits(model, batch, batch.candidates).float()
            except (AttributeError, TypeError):
                return False
        size = whole.abs().max().item()
        return whole.shape == few.shape and (whole - few).abs().max().item() <= 1e-3 * size

    def _without_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        arguments = self._arguments(batch)
        arguments.pop("use_cache", None)
        return causal_lm_loss(model, {**arguments, "labels": batch.labels})

    def _fuses(self, model: nn.Module, batch: Batch) -> bool:
        with torch.no_grad():
            per_token, weight = self.token_losses(model, batch)
            try:
                value = self._without_logits(model, batch).item()
            except (ValueError, TypeError, AttributeError):
                return False
            expected = (per_token.sum() / weight.sum()).item()
        return abs(value - expected) <= 1e-2 * abs(expected)

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = dict(batch.inputs)
        if not self.positions:
            del inputs["position_ids"]
        if self.cache:
            inputs["use_cache"] = False
        return inputs

    def _logits(self, model: nn.Module, batch: Batch, last: int) -> Tensor:
        """Logits of at least the last positions."""
        arguments = self._arguments(batch)
        if self.fewer:
            arguments["logits_to_keep"] = last
        logits: Tensor = model(**arguments).logits
        return logits


@dataclass(frozen=True)
class Score:
    """Held-out measurements.

    Attributes:
        loss, loss_se: mean over the examples (over the tokens for text) and its standard error.
        accuracy, accuracy_se: share of right labels and its standard error; None without labels.
        examples: number of examples.
    """

    loss: float
    loss_se: float
    accuracy: float | None
    accuracy_se: float | None
    examples: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    objective: Objective,
    prepared: Prepared,
    examples: Sequence[Example],
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda _: None,
    ranks: Ranks = ALONE,
) -> Score:
    """Loss and accuracy of the weights as they are, on ``examples``: the same on every rank.

    ``text`` and ``completion``: mean cross entropy per token, its error from the spread of the
    examples' token-weighted losses (a ratio estimate). ``classify``: cross entropy among the label
    words and the share of examples whose right label scores highest. Ranks take the batches in
    turn.
    """
    ordered = sorted(examples, key=lambda e: len(e.tokens))
    if prepared.task != "classify":
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1 << 16)
        per_example = len(ordered[-1].tokens) * vocabulary
        batch_size = max(1, min(batch_size, _MOST_LOGITS // per_example))
    mine: dict[int, tuple[Tensor, Tensor, int]] = {}  # start -> losses, weights, right ones
    with torch.inference_mode():
        for number, at in enumerate(range(0, len(ordered), batch_size)):
            part = ordered[at : at + batch_size]
            progress(len(part))
            if number % ranks.count != ranks.rank:
                continue
            batch = collate(prepared, part, device)
            if batch.targets is None:
                losses, weight = objective.token_losses(model, batch)
                mine[at] = losses.sum(1).double().cpu(), weight.sum(1).double().cpu(), 0
            else:
                scores = objective.scores(model, batch)
                losses = F.cross_entropy(scores, batch.targets, reduction="none")
                ones = torch.ones(len(part), dtype=torch.float64)
                hits = int((scores.argmax(1) == batch.targets).sum())
                mine[at] = losses.double().cpu(), ones, hits
    found = {at: score for theirs in ranks.gather(mine) for at, score in theirs.items()}
    parts = [found[at] for at in sorted(found)]
    total = torch.cat([losses for losses, _, _ in parts])
    weight = torch.cat([weights for _, weights, _ in parts])
    count = len(ordered)
    mean = (total.sum() / weight.sum()).item()
    residual = total - mean * weight
    spread = (residual.square().sum() / max(count - 1, 1)).sqrt().item()
    error = spread / (weight.mean().item() * math.sqrt(count))
    if prepared.task != "classify":
        return Score(mean, error, None, None, count)
    accuracy = sum(right for _, _, right in parts) / count
    return Score(mean, error, accuracy, math.sqrt(accuracy * (1 - accuracy) / count), count)
