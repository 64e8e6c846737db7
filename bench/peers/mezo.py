"""MeZO's own loop, written from the paper's Algorithm 1.

    reset the generator to the step's seed before every pass over the parameters
    theta <- theta + eps z;   l+ = L(theta)
    theta <- theta - 2 eps z; l- = L(theta)
    theta <- theta + eps z
    g = (l+ - l-) / (2 eps);  theta <- theta - lr (g z + wd theta)

``z`` is drawn per tensor with ``torch.normal`` in the parameter's dtype; weight decay leaves out
parameters whose name contains "bias", "layer_norm" or "layernorm". Two spellings of the arithmetic:

``"plain"``  ``theta = theta + scale * z * eps``: the expression as one writes it, three
             temporaries.
``"add_"``   ``theta.add_(z, alpha=scale * eps)``: in place, one temporary. Usually faster.

Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VARIANTS = ("plain", "add_")
_NO_DECAY = ("bias", "layer_norm", "layernorm")


class MeZOLoop:
    """MeZO over the trainable parameters of a model.

    Args:
        model: any module; put it in eval mode yourself.
        lr, eps, weight_decay: the algorithm's.
        variant: ``"plain"`` or ``"add_"``.

    Raises:
        ValueError: unknown variant.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        variant: str = "plain",
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}; got {variant!r}")
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay
        self.variant = variant

    @staticmethod
    def _normal(param: Tensor) -> Tensor:
        return torch.normal(
            mean=0.0, std=1.0, size=param.size(), device=param.device, dtype=param.dtype
        )

    def perturb(self, seed: int, scale: float) -> None:
        """``theta += scale * eps * z(seed)`` in one pass over the parameters."""
        torch.manual_seed(seed)
        for _, param in self.named:
            z = self._normal(param)
            if self.variant == "add_":
                param.data.add_(z, alpha=scale * self.eps)
            else:
                param.data = param.data + scale * z * self.eps

    def update(self, seed: int, g: float) -> None:
        """``theta -= lr (g z(seed) + wd theta)`` in one pass over the parameters."""
        torch.manual_seed(seed)
        for name, param in self.named:
            z = self._normal(param)
            decays = self.weight_decay and not any(part in name for part in _NO_DECAY)
            if self.variant == "add_":
                if decays:
                    param.data.mul_(1 - self.lr * self.weight_decay)
                param.data.add_(z, alpha=-self.lr * g)
            elif decays:
                param.data = param.data - self.lr * (g * z + self.weight_decay * param.data)
            else:
                param.data = param.data - self.lr * (g * z)

    def step(self, loss: Callable[[], Tensor], seed: int) -> tuple[Tensor, float]:
        """One MeZO step.

        Args:
            loss: evaluates the loss at the current weights; called twice, in inference mode.
            seed: of this step's direction.

        Returns:
            The loss at ``theta + eps z``, and ``g``.
        """
        self.perturb(seed, 1)
        with torch.inference_mode():
            plus = loss()
        self.perturb(seed, -2)
        with torch.inference_mode():
            minus = loss()
        self.perturb(seed, 1)
        g = ((plus - minus) / (2 * self.eps)).item()
        self.update(seed, g)
        return plus, g
