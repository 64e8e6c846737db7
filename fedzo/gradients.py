"""Gradients on the values that move: of pre-training text at the server, of a step by backprop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedzo.space import Space
from fedzo.task import Batch
from zokernels.losses import own_loss


def pretraining_gradient(space: Space, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """``grad_p``: the mean over batches of ``dL(w; b) / dw``, on the values that move.

    Args:
        space: what moves; of masked parameters only the masked elements are kept.
        batches: mappings for ``model(**batch).loss``.

    Returns:
        float32 by parameter name: of the parameter's shape, or ``[n]`` under a mask.

    Raises:
        ValueError: no batch, or a gradient that is not finite.
    """
    total: dict[str, Tensor] = {}
    count = 0
    with differentiable(space):
        for batch in batches:
            count += 1
            for name, gradient in gradients(space, own_loss(space.model, batch)).items():
                total[name] = total[name] + gradient if name in total else gradient
    if not count:
        raise ValueError("batches must have at least one batch of pre-training text")
    for name, gradient in total.items():
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"the gradient of parameter {name!r} is not finite")
    return {name: gradient / count for name, gradient in total.items()}


@contextlib.contextmanager
def differentiable(space: Space) -> Iterator[None]:
    """The parameters that move require gradients for a while, and gradients are on."""
    flags = [p.tensor.requires_grad for p in space.params]
    try:
        for p in space.params:
            p.tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in zip(space.params, flags, strict=True):
            p.tensor.requires_grad_(flag)


def gradients(space: Space, loss: Tensor) -> dict[str, Tensor]:
    """``dloss/dw`` on the values that move, float32; parameters without a gradient are left out."""
    found = torch.autograd.grad(loss, [p.tensor for p in space.params], allow_unused=True)
    return {
        p.name: g.float() if p.masked is None else torch.take(g, p.masked.indices).float()
        for p, g in zip(space.params, found, strict=True)
        if g is not None
    }
