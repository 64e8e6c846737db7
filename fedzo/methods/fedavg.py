"""FedAvg and FedAvg(LoRA): local SGD by backprop and dense uploads, the reference of the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedzo.gradients import differentiable, gradients
from fedzo.lora import ensure_lora_
from fedzo.messages import Order
from fedzo.methods.base import Method, Setting, Site, at_least_one
from fedzo.space import Space


@dataclass(kw_only=True)
class FedAvg(Method):
    r"""Local SGD by backprop on every parameter that requires a gradient.

    ::

        client: for t in 1..T:  w <- w - lr dL/dw
        server: w <- mean_k w_k

    Args:
        payload: ``"tensors"``: there are no scalars to send.
        Otherwise as :class:`~fedzo.methods.base.Method`; ``eps``, ``seeds`` and ``distribution``
        have no effect. Updates are rounded to nearest. Means are uniform over clients unless the
        federation weights them by the samples they used; the source's weights are their numbers of
        examples.

    Source: McMahan et al. 2017, algorithm 1.
    """

    name: ClassVar[str] = "fedavg"

    lr: float = 1e-3
    payload: str = "tensors"

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        if self.payload != "tensors":
            raise ValueError(f"payload must be 'tensors' for {self.name}; got {self.payload!r}")

    def client(self, site: Site, order: Order) -> list[float]:
        """T steps of SGD, made on the weights."""
        model = site.model
        site.space.leave()
        for _ in range(order.steps):
            batch = site.next_batch()
            with differentiable(site.space):
                loss = site.task.loss(model, batch)
                if not loss.requires_grad:
                    raise ValueError(
                        f"{self.name} needs a loss that can be differentiated; this task's cannot"
                    )
                found = gradients(site.space, loss)
            site.losses.append(float(loss.detach()))
            with torch.no_grad():
                for p in site.space.params:
                    if p.name in found:
                        p.tensor.copy_(p.tensor.float() - order.lr * found[p.name])
        return []


@dataclass(kw_only=True)
class FedAvgLoRA(FedAvg):
    r"""FedAvg on low-rank adapters of a frozen model.

    Args:
        lora_rank, lora_alpha: of adapters added where the model has none; FedMeZO's by default.
        lora_targets: names of the adapted layers; None: query and value projections.
        Otherwise as :class:`FedAvg`.
    """

    name: ClassVar[str] = "fedavg_lora"

    lora_rank: int = 128
    lora_alpha: int = 256
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
