"""What a federation trains on: examples by number, a loss, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

Batch = dict[str, Tensor]


@runtime_checkable
class Task(Protocol):
    """A training set that clients hold parts of, and how a model is judged on it.

    Attributes:
        train_size: number of training examples; clients hold indices in ``[0, train_size)``.
        labels: one class per example, for splits by label; None where there are none.
        natural_ids: one group (an author, a category) per example, for natural splits; or None.
    """

    @property
    def train_size(self) -> int: ...

    @property
    def labels(self) -> Sequence[int] | None: ...

    @property
    def natural_ids(self) -> Sequence[str] | Sequence[int] | None: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The model's inputs for these training examples, with ``labels`` (transformers)."""
        ...

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of a batch, a 0-d tensor.

        Must not read values on the host (``.item()``): it runs at several branches at once. Where
        gradients are enabled it must be differentiable (the FedAvg baselines need that)."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers on held-out examples, such as ``loss`` and ``accuracy``."""
        ...
