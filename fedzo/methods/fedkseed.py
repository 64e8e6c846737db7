"""FedKSeed (arXiv 2312.06353): a fixed set of candidate seeds; the model is their coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedzo.messages import SHARED, Block, Order
from fedzo.methods.base import Method, Reports, Rule, Site, at_least_one, choice
from fedzo.sampling import CANDIDATES, generator
from fedzo.space import Update
from zokernels.noise import derive_seed
from zokernels.subset import fp32

UNSEEN = ("mean", "least")


@dataclass(kw_only=True)
class FedKSeed(Method):
    r"""The whole run is one coefficient for each of K seeds, A.

    ::

        client: w = w_0 + sum_s A[s] z(s)
                for t in 1..T:  s ~ the candidates;  g = [L(w + eps z) - L(w - eps z)] / (2 eps)
                                w <- w - lr g z(s)
        server: A[s] <- A[s] + mean_k sum of (-lr g) over the client's steps with seed s

    A client's draws derive from the run's seed, so it sends T scalars and no indices.

    FedKSeed-Pro draws seed ``s`` with the probability ``softmax(minmax(mean |g| of s))``; where all
    are equal the draw is uniform.

    The weights of a round are always formed from the first weights of the run, of which one more
    copy is kept. The paper's batches are of 1.

    Args:
        candidates: K.
        pro: FedKSeed-Pro.
        unseen: what a seed never drawn counts as: the ``"mean"`` of the drawn ones, or the
            ``"least"`` of them [reconstructed].
        steps: T.
        Otherwise as :class:`~fedzo.methods.base.Method`; ``seeds`` has no effect.
    """

    name: ClassVar[str] = "fedkseed"
    from_base: ClassVar[bool] = True

    lr: float = 3e-7
    eps: float = 5e-4
    steps: int = 200
    candidates: int = 4096
    pro: bool = False
    unseen: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.accumulated = [0.0] * self.candidates  # A
        self.sizes = [0.0] * self.candidates  # sum of |g|
        self.counts = [0] * self.candidates

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        at_least_one(self, "candidates")
        choice(self, "unseen", UNSEEN)

    @property
    def comparable(self) -> bool:
        """Clients draw seeds of their own."""
        return False

    def candidate(self, index: int) -> int:
        """Candidate seed ``index``."""
        return derive_seed(derive_seed(self.root, CANDIDATES), index)

    def draws(self, order: Order) -> list[int]:
        """The candidates of a client's steps."""
        random = generator(order.root, CANDIDATES, order.round, order.client).random(order.steps)
        if not order.values:
            return [int(u * self.candidates) for u in random]
        bounds = np.cumsum(np.asarray(order.values, dtype=np.float64))
        places = np.searchsorted(bounds, random * bounds[-1], side="right")
        return [min(int(place), self.candidates - 1) for place in places]

    def orders(self, round: int, clients: Sequence[int]) -> dict[int, Order]:
        """The order; with the probabilities for Pro."""
        values = tuple(fp32(self.probabilities())) if self.pro and any(self.counts) else ()
        return {c: self.order(round, c, values=values) for c in clients}

    def probabilities(self) -> list[float]:
        """Of each candidate, for Pro."""
        return [float(p) for p in seed_probabilities(self.sizes, self.counts, self.unseen)]

    def client(self, site: Site, order: Order) -> list[float]:
        """T steps along candidates drawn at random."""
        sent: list[float] = []
        for index in self.draws(order):
            z = self.candidate(index)
            plus, minus = site.evaluate(site.next_batch(), [z], [[self.eps], [-self.eps]])
            (g,) = fp32([(plus - minus) / (2 * self.eps)])
            sent.append(g)
            if not np.isfinite(g):
                break
            site.apply_(Update.one([z], self.rates(order, [g])))
        return sent

    def path(self, order: Order, scalars: Sequence[float]) -> Update:
        """The client's steps along the candidates it drew."""
        seeds = [self.candidate(i) for i in self.draws(order)]
        coeffs = self.rates(order, scalars)
        return Update.path(Update.one([s], [c]) for s, c in zip(seeds, coeffs, strict=True))

    def merge(self, round: int, reports: Reports, rule: Rule) -> tuple[Block, ...]:
        """Add the mean of the clients to A; the whole of A is sent."""
        shares = rule.shares(reports)
        for client, (order, scalars) in reports.items():
            coeffs = self.rates(order, scalars)
            for index, g, coeff in zip(self.draws(order), scalars, coeffs, strict=True):
                self.accumulated[index] += shares[client] * coeff
                self.sizes[index] += abs(g)
                self.counts[index] += 1
        return (Block(SHARED, fp32(self.accumulated)),)

    def update(self, round: int, blocks: Sequence[Block]) -> Update:
        """``sum_s A[s] z(s)``, from the first weights of the run."""
        used = [(i, a) for i, a in enumerate(blocks[0].values) if a]
        return Update.one([self.candidate(i) for i, _ in used], [a for _, a in used])

    def state(self) -> dict[str, Any]:
        """A, and the statistics of the scalars."""
        return {
            "accumulated": list(self.accumulated),
            "sizes": list(self.sizes),
            "counts": list(self.counts),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """A, and the statistics of the scalars."""
        self.accumulated = [float(a) for a in state["accumulated"]]
        self.sizes = [float(a) for a in state["sizes"]]
        self.counts = [int(n) for n in state["counts"]]


def seed_probabilities(
    sizes: Sequence[float], counts: Sequence[int], unseen: str = "mean"
) -> NDArray[np.float64]:
    """``softmax(minmax(mean |g|))`` over the candidates; see :class:`FedKSeed`.

    Args:
        sizes: sum of ``|g|`` by candidate.
        counts: how often each was drawn.
        unseen: see :class:`FedKSeed`.
    """
    total, drawn = np.asarray(sizes, dtype=np.float64), np.asarray(counts)
    seen = drawn > 0
    if not seen.any():
        return np.full(len(drawn), 1 / len(drawn))
    means = np.divide(total, drawn, out=np.zeros_like(total), where=seen)
    means[~seen] = means[seen].mean() if unseen == "mean" else means[seen].min()
    spread = means.max() - means.min()
    scaled = (means - means.min()) / spread if spread > 0 else np.zeros_like(means)
    weights = np.exp(scaled)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
