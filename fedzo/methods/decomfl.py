"""DeComFL (arXiv 2405.15861): shared seeds, one-sided estimates, dimension-free traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedzo.messages import Order
from fedzo.methods.base import Method, Site, at_least_one
from zokernels.subset import fp32


@dataclass(kw_only=True)
class DeComFL(Method):
    r"""K local steps of P one-sided perturbations; K P scalars up, their means down.

    ::

        client: first replays the averaged scalars of the rounds it has missed
                for k in 1..K:  g_p = [L(w + mu z_p) - L(w)] / mu,  p in 1..P
                                w <- w - lr/P sum_p g_p z_p
        server: w <- w - lr/P sum_kp mean_i(g_i^kp) z_kp

    The P + 1 losses of a step are one stacked forward. The catch-up is what the server sends with
    an order: every update the client has not seen.

    The paper's federation: 8 clients, 2 of them in a round, batches of 32.

    Args:
        perturbations: P.
        steps: K.
        Otherwise as :class:`~fedzo.methods.base.Method`; ``eps`` is the paper's mu.
    """

    name: ClassVar[str] = "decomfl"

    lr: float = 5e-6
    eps: float = 1e-3
    steps: int = 1
    perturbations: int = 5

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        at_least_one(self, "perturbations")

    @property
    def per_step(self) -> int:
        """P."""
        return self.perturbations

    def client(self, site: Site, order: Order) -> list[float]:
        """K steps of P perturbations."""
        sent: list[float] = []
        here = [0.0] * self.perturbations
        probes = [
            [self.eps if p == q else 0.0 for q in range(self.perturbations)]
            for p in range(self.perturbations)
        ]
        for k in range(order.steps):
            z = [self.direction(order, k, p) for p in range(self.perturbations)]
            base, *moved = site.evaluate(site.next_batch(), z, [here, *probes])
            g = fp32([(loss - base) / self.eps for loss in moved])
            sent += g
            if not self.step_(site, order, k, g):
                break
        return sent
