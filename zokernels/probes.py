"""Losses at the branches of a step: from a batch or a closure, stacked or one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokernels import deferred
from zokernels._targets import NamedTensors
from zokernels.binding import Binding
from zokernels.branches import Branches, displaced_storage
from zokernels.deferred import recording
from zokernels.losses import loss_of, scalar
from zokernels.randomness import rewinder
from zokernels.spsa import Spsa

# Coefficients of probes by their values and device.
Tables = dict[tuple[tuple[tuple[float, ...], ...], torch.device], Tensor]

# More of them than this means that eps has a schedule.
_MOST_TABLES = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a step evaluates.

    Attributes:
        functions: the losses of the micro-batches, as functions without arguments.
        sequential: how to evaluate them, see :class:`~zokernels.Branches`.
    """

    functions: list[Callable[[], Tensor]]
    sequential: bool | None

    @classmethod
    def of(
        cls,
        model: nn.Module | None,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
        closure: Callable[[], Tensor] | None,
        sequential: bool | None,
        caller: str,
    ) -> Evaluation:
        """From the arguments of ``step`` or ``accumulate``, the ``caller``.

        Raises:
            TypeError, ValueError: not a batch, a list of micro-batches or a closure.
        """
        if closure is None and loss_fn is None and callable(batch):
            batch, closure = None, batch
        if closure is not None:
            if batch is not None or loss_fn is not None:
                raise TypeError(f"{caller} takes a closure, or a batch and loss_fn, not both")
            if not callable(closure):
                raise TypeError(f"closure must be callable; got {type(closure).__name__}")
            function = closure
            return cls([lambda: scalar(_called(function), "the closure")], True)
        if batch is None:
            raise TypeError(
                f"{caller} needs a closure that returns the loss, or a batch: opt.{caller}(lambda: "
                f"model(**batch).loss), opt.{caller}(batch) or opt.{caller}(batch, loss_fn). "
                "step() without arguments makes the update of what accumulate() has evaluated; a "
                "trainer that calls backward() before it evaluates nothing: take "
                "zokernels.integrations.transformers.MeZOTrainer"
            )
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}")
        if model is None:
            raise TypeError(
                f"{caller}(batch) needs the model: give it to the optimizer, zo.MeZO(model) or "
                "zo.MeZO(params, model=model), or use a closure"
            )
        parts = [batch]
        if isinstance(batch, list) and not (batch and all(isinstance(b, Tensor) for b in batch)):
            parts = batch
            if not parts:
                raise ValueError(f"{caller} got an empty list of micro-batches")
        return cls([loss_of(model, part, loss_fn) for part in parts], sequential)


def _called(closure: Callable[[], Tensor]) -> Tensor:
    try:
        return closure()
    except RuntimeError as error:
        if "does not require grad" in str(error):
            error.add_note("MeZO's closures return the loss and call no backward()")
        raise


@dataclass(frozen=True, slots=True)
class Probes:
    """The displaced weights of a step.

    Attributes:
        bound: what moves.
        eps: size of the probes by parameter.
        spsa: the estimator.
        distribution: of the noise.
        max_branches: most branches in one evaluation, or None.
        tables: kept from step to step.
    """

    bound: Binding | NamedTensors
    eps: Mapping[str, float]
    spsa: Spsa
    distribution: str
    max_branches: int | None
    tables: Tables

    def losses(self, evaluation: Evaluation, seeds: Sequence[int] | Tensor) -> Tensor:
        """Losses of all branches, meaned over the micro-batches: float32 ``[G]``.

        Makes the update that is pending.
        """
        if isinstance(self.bound, Binding):
            with self.bound.pending.open():
                return self._losses(evaluation, seeds)
        return self._losses(evaluation, seeds)

    def _losses(self, evaluation: Evaluation, seeds: Sequence[int] | Tensor) -> Tensor:
        sizes = set(self.eps.values())
        common = len(sizes) == 1
        scale = {} if common else self.eps
        count = len(seeds)
        rows = self.spsa.probes(count, sizes.pop() if common else 1.0)
        width = self.max_branches or len(rows)
        rewind = self._rewinder() if width < len(rows) else None
        parts = []
        for start in range(0, len(rows), width):
            if start and rewind is not None:
                rewind()  # the same dropout in all of them
            part = rows[start : start + width]
            # Only the directions of these branches are drawn.
            used = [k for k in range(count) if any(row[k] for row in part)] or [0]
            table = [[row[k] for k in used] for row in part]
            keys: list[int] | Tensor
            held: list[list[float]] | Tensor
            if isinstance(seeds, Tensor):
                keys = torch.stack([seeds[k] for k in used])
                held = self._kept(table, seeds.device)
            else:
                keys, held = [seeds[k] for k in used], table
            total: Tensor | None = None
            for function in evaluation.functions:
                losses = self._at(function, keys, held, scale, evaluation.sequential).float()
                total = losses if total is None else total + losses
            assert total is not None
            many = len(evaluation.functions)
            parts.append(total / many if many > 1 else total)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _at(
        self,
        function: Callable[[], Tensor],
        seeds: list[int] | Tensor,
        coeffs: list[list[float]] | Tensor,
        scale: Mapping[str, float],
        sequential: bool | None,
    ) -> Tensor:
        bound = self.bound
        if isinstance(bound, Binding):
            view = Branches(
                bound,
                seeds,
                coeffs,
                distribution=self.distribution,
                scale=scale,
                sequential=sequential,
            )
            losses: Tensor = view(function)
            return losses
        bound.check()
        rewind = self._rewinder()
        keys = seeds if isinstance(seeds, Tensor) else torch.tensor(seeds, dtype=torch.int64)
        table = torch.as_tensor(coeffs, dtype=torch.float32)
        outputs = []
        for row in table:
            rewind()
            with displaced_storage(bound.params, keys, row[None], scale, self.distribution):
                outputs.append(function())
        return torch.stack(outputs)

    def _rewinder(self) -> Callable[[], None]:
        devices = [p.device for p in self.bound.params]
        if not any(map(recording, devices)):
            return rewinder(devices)
        bound = self.bound
        if isinstance(bound, Binding) and any(m.training for m in bound.model.modules()):
            raise RuntimeError(
                "max_branches splits the branches, and a graph cannot give all parts the same "
                "dropout: call model.eval() or raise max_branches"
            )
        return lambda: None

    def _kept(self, rows: list[list[float]], device: torch.device) -> Tensor:
        """Coefficients of the probes on the device: the same in every step, and in a graph."""
        key = (tuple(map(tuple, rows)), device)
        if key not in self.tables:
            if len(self.tables) >= _MOST_TABLES:
                self.tables.clear()
            self.tables[key] = deferred.table(rows, torch.float32, device)
        return self.tables[key]
