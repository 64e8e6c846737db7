"""torchzero's MeZO (PyPI ``torchzero``): the modular optimizer with its memory-efficient estimator.

It draws from ``torch.Generator(seed)`` for all parameters at once, so a whole direction exists as
tensors. ``return_approx_loss`` spares it the third forward it would run by default, and the
distribution is set to normal, which is what the paper and the other rows use.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor, nn


def unavailable() -> str | None:
    """Why the peer cannot run here, or None."""
    try:
        importlib.metadata.version("torchzero")
    except importlib.metadata.PackageNotFoundError:
        return "torchzero is not installed (pip install --no-deps torchzero)"
    return None


def stepper(
    model: nn.Module, *, lr: float = 1e-6, eps: float = 1e-3
) -> Callable[[Callable[[], Tensor]], Tensor]:
    """A function that takes one step given a closure for the loss.

    Raises:
        ImportError: torchzero is not installed.
    """
    import torchzero as tz

    build = getattr(tz, "Optimizer", None) or tz.Modular
    optimizer = build(
        [p for p in model.parameters() if p.requires_grad],
        tz.m.MeZO(h=eps, distribution="gaussian", return_approx_loss=True),
        tz.m.LR(lr),
    )

    def step(loss: Callable[[], Tensor]) -> Tensor:
        def closure(backward: bool = True) -> Tensor:
            with torch.no_grad():
                return loss()

        return optimizer.step(closure)

    return step
