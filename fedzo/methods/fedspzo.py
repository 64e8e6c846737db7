"""FedSPZO (arXiv 2502.10239): two blocks, more perturbations in the second, activations reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedzo.messages import Order
from fedzo.methods.base import Method, Setting, Site, at_least_one, choice
from fedzo.space import Space, Terms, Update
from fedzo.split import BlockSplit, SplitError, flop_shares, layers_of
from zokernels.subset import fp32

ESTIMATORS = ("nested", "separate")


@dataclass(kw_only=True)
class FedSPZO(Method):
    r"""SPSA on ``y = f2(theta2; f1(theta1; x))`` with P1 directions for block 1, P2 for block 2.

    ::

        for i <= P1:  a+ = f1(theta1 + eps z1_i; x);  a- = f1(theta1 - eps z1_i; x)
          for j <= P2:  g_ij = [L(f2(theta2 + eps z2_ij; a+)) - L(f2(theta2 - eps z2_ij; a-))]
                               / (2 eps)
        G1 = mean_i (mean_j g_ij) z1_i;   G2 = mean_ij g_ij z2_ij
        theta1 -= lr G1;   theta2 -= lr G2
        upload: H P1 P2 scalars; the server replays every client from the round's weights

    A step costs 2 P1 forwards of block 1 and 2 P1 P2 of block 2, each as one stacked forward:
    ``1 / (c1 / P2 + 1 - c1)`` times less than as many directions of the whole model, where ``c1``
    is block 1's share of the FLOPs.

    Blocks, extra perturbations and reused activations are the paper's; the loop, and every default
    here, is reconstructed, consistent with every published fact; so are batches of 8. A parameter
    of both blocks, such as a tied embedding, belongs to block 1.

    Args:
        block1: P1.
        block2: P2.
        estimator: ``"nested"`` as above, or ``"separate"``, with P1 + P2 scalars a step and block
            2's directions at the clean activation ``a``:
            ``g2_j = [L(f2(theta2 + eps z2_j; a)) - L(f2(theta2 - eps z2_j; a))] / (2 eps)``,
            ``g1_i = [L(f2(theta2; a+)) - L(f2(theta2; a-))] / (2 eps)``. A step then costs
            2 P1 + 1 forwards of block 1 and 2 (P1 + P2) of block 2.
        split_layer: first layer of block 2; None: by share.
        split_share: share of block 1.
        split_by: the share is of the ``"layers"`` or of the forward ``"flops"``.
        Otherwise as :class:`~fedzo.methods.base.Method`.

    Attributes:
        split: the blocks.
        flop_share: c1, block 1's share of a forward pass.
    """

    name: ClassVar[str] = "fedspzo"

    lr: float = 1e-6
    eps: float = 1e-3
    steps: int = 10
    seeds: str = "client"
    block1: int = 1
    block2: int = 4
    estimator: str = "nested"
    split_layer: int | None = None
    split_share: float = 0.75
    split_by: str = "layers"

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        at_least_one(self, "block1")
        at_least_one(self, "block2")
        choice(self, "estimator", ESTIMATORS)
        choice(self, "split_by", ("layers", "flops"))
        if not 0 < self.split_share < 1:
            raise ValueError(f"split_share must be in (0, 1); got {self.split_share!r}")

    def moving(self, setting: Setting) -> Space:
        """Both blocks."""
        model, task = setting.model, setting.task
        batch = task.batch([0])
        loss = lambda: task.loss(model, batch)  # noqa: E731
        shares = flop_shares(model, loss)
        last = len(layers_of(model)) - 1
        if self.split_layer is not None:
            at = self.split_layer
        elif self.split_by == "layers":
            at = min(max(round(self.split_share * (last + 1)), 1), last)
        else:
            at = min(range(1, last + 1), key=lambda i: abs(shares[i] - self.split_share))
        self.split = BlockSplit(model, at, loss, distribution=self.distribution)
        self.flop_share = shares[at]
        self.split.check(loss, self.seed(0, 0, 0), self.eps)
        return Space(
            self.split.first,
            self.split.second,
            distribution=self.distribution,
            rounding=self.rounding,
        )

    @property
    def per_step(self) -> int:
        """P1 P2, or P1 + P2 where the estimators are separate."""
        p, q = self.block1, self.block2
        return p * q if self.estimator == "nested" else p + q

    def client(self, site: Site, order: Order) -> list[float]:
        """H steps of the two-block estimate."""
        probe = self.nested if self.estimator == "nested" else self.separate
        sent: list[float] = []
        for t in range(order.steps):
            site.settle()
            losses = probe(site, order, t)
            site.losses.append(losses[0])
            pairs = zip(losses[::2], losses[1::2], strict=True)
            g = fp32([(plus - minus) / (2 * self.eps) for plus, minus in pairs])
            sent += g
            if not self.step_(site, order, t, g):
                break
        return sent

    def nested(self, site: Site, order: Order, t: int) -> tuple[float, ...]:
        """Losses of ``(i, j, +)`` and ``(i, j, -)``, in this order."""
        p, q = self.block1, self.block2
        z1 = [self.direction(order, t, i) for i in range(p)]
        z2 = [self.direction(order, t, p + k) for k in range(p * q)]
        loss = site.loss_of(site.next_batch())
        a = self.split.activations(loss, z1, self.signed(p))
        rows = [2 * (k // q) + sign for k in range(p * q) for sign in (0, 1)]
        early = self.signed(p)
        return self.split.losses(
            loss,
            a,
            rows,
            z2,
            self.signed(p * q),
            early_seeds=z1,
            early_coeffs=[early[row] for row in rows],
        )

    def separate(self, site: Site, order: Order, t: int) -> tuple[float, ...]:
        """Losses of block 1's pairs at clean ``theta2``, then block 2's at the clean activation."""
        p, q = self.block1, self.block2
        z1 = [self.direction(order, t, i) for i in range(p)]
        z2 = [self.direction(order, t, p + j) for j in range(q)]
        loss = site.loss_of(site.next_batch())
        early = [*self.signed(p), [0.0] * p]
        a = self.split.activations(loss, z1, early)
        rows = [*range(2 * p), *[2 * p] * (2 * q)]
        return self.split.losses(
            loss,
            a,
            rows,
            z2,
            [*[[0.0] * q] * (2 * p), *self.signed(q)],
            early_seeds=z1,
            early_coeffs=[early[row] for row in rows],
        )

    def signed(self, count: int) -> list[list[float]]:
        """``+eps`` and ``-eps`` along each of ``count`` directions: ``[2 count][count]``."""
        return [
            [sign * self.eps if k == i else 0.0 for k in range(count)]
            for i in range(count)
            for sign in (1.0, -1.0)
        ]

    def step(self, round: int, owner: int, t: int, coeffs: Sequence[float]) -> Update:
        """``theta1 += sum_i c_i z1_i`` and ``theta2 += sum_ij c_ij z2_ij`` of one step."""
        p, q = self.block1, self.block2
        if self.estimator == "nested":
            one = [sum(coeffs[i * q : (i + 1) * q]) / (p * q) for i in range(p)]
            two = [c / (p * q) for c in coeffs]
        else:
            one, two = [c / p for c in coeffs[:p]], [c / q for c in coeffs[p:]]
        z1 = [self.seed(round, owner, t, i) for i in range(p)]
        z2 = [self.seed(round, owner, t, p + k) for k in range(len(two))]
        return Update((Terms.one(z1, one), Terms.one(z2, two)))


__all__ = ["FedSPZO", "SplitError"]
