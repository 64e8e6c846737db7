"""LoRA-FedZO: MeZO steps on low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedzo.lora import ensure_lora_
from fedzo.methods.base import Method, Setting, at_least_one
from fedzo.space import Space


@dataclass(kw_only=True)
class LoRAFedZO(Method):
    r"""Full-FedZO on the adapters of a frozen model.

    ::

        client: for t in 1..T:  g = [L(w + eps z) - L(w - eps z)] / (2 eps);  w <- w - lr g z
        server: w <- mean_k w_k

    Args:
        lora_rank, lora_alpha: of adapters added where the model has none (MeZO's defaults).
        lora_targets: names of the adapted layers; None: query and value projections.
        Otherwise as :class:`~fedzo.methods.base.Method`.
    """

    name: ClassVar[str] = "lora_fedzo"

    lr: float = 1e-4
    eps: float = 1e-2
    steps: int = 10
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] | None = None

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        at_least_one(self, "lora_rank")

    def moving(self, setting: Setting) -> Space:
        """The adapters."""
        ensure_lora_(
            setting.model,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
            seed=setting.seed,
        )
        return self.whole(setting.model)
