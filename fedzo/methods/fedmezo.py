"""FedMeZO (arXiv 2402.05926): local MeZO steps, learning rates that follow each client."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedzo.lora import ensure_lora_
from fedzo.messages import Block, Order
from fedzo.methods.base import Method, Reports, Rule, Setting, Site, at_least_one, choice
from fedzo.sampling import RATES, generator
from fedzo.space import Space

SIGNALS = ("default", "random", "loss", "five_round_loss", "model_difference")


@dataclass(kw_only=True)
class FedMeZO(Method):
    r"""Every client runs H MeZO steps with its own seeds; the server takes the mean.

    ::

        client i:  for h in 1..H:  g = [L(w + mu z) - L(w - mu z)] / (2 mu);  w <- w - eta_i g z
        server:    w <- mean_i w_i

    A client's run is a displacement, so H scalars travel and not the weights.

    Personalised rates (proposition 3.7), ``eta_i = eta (1 + phi h_i)``, ``h_i`` in [-1, 1]::

        h_i = a_i / max_j |a_j|                     0 where max |a| is 0 or not finite
        loss              a_i = l_i - mean_j l_j    l: mean of L(w + mu z) in the last round
        five_round_loss   the same, l the mean over the client's last five rounds
        model_difference  a_i = q_i - mean_j q_j    q_i = sum over tensors ||D_i - mean_j D_j||_2
        random            h_i ~ U(-1, 1)
        default           h_i = 0

    A client has ``h_i = 0`` until its signal exists: in its first round, and in its first five for
    ``five_round_loss``.
    With partial participation a client's last known signal counts, and the means are over the
    round's clients that have one [reconstructed: the paper's clients all take part].

    The paper's federation: 3 clients, batches of 1.

    Args:
        signal: one of the above.
        phi: half-width of the rates relative to ``lr``, in [0, 1) [from the official code: 5e-6
            around 1e-5].
        lora_rank, lora_alpha: adapters that are added where the model has none; rank None moves
            whatever requires a gradient.
        lora_targets: names of the adapted layers; None: query and value projections.
        Otherwise as :class:`~fedzo.methods.base.Method`. Means are uniform over clients unless the
        federation weights them by samples.
    """

    name: ClassVar[str] = "fedmezo"

    lr: float = 1e-5
    eps: float = 1e-3
    steps: int = 30
    seeds: str = "client"
    signal: str = "default"
    phi: float = 0.5
    lora_rank: int | None = 128
    lora_alpha: int = 256
    lora_targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.losses: dict[int, list[float]] = {}  # the last five rounds of each client
        self.differences: dict[int, float] = {}
        super().__post_init__()

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        choice(self, "signal", SIGNALS)
        if not 0 <= self.phi < 1:
            raise ValueError(f"phi must be in [0, 1); got {self.phi!r}")
        if self.lora_rank is not None:
            at_least_one(self, "lora_rank")
        if self.payload == "tensors" and self.signal not in SIGNALS[:2]:
            raise ValueError(f"signal {self.signal!r} needs payload 'scalars'; got 'tensors'")

    def moving(self, setting: Setting) -> Space:
        """The adapters."""
        if self.lora_rank is not None:
            ensure_lora_(
                setting.model,
                rank=self.lora_rank,
                alpha=self.lora_alpha,
                targets=self.lora_targets,
                seed=setting.seed,
            )
        return self.whole(setting.model)

    def orders(self, round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Every client's learning rate."""
        h = self.personal(round, clients)
        return {c: self.order(round, c, lr=self.lr * (1 + self.phi * h[c])) for c in clients}

    def personal(self, round: int, clients: Sequence[int]) -> dict[int, float]:
        """``h_i`` of a round's clients."""
        if self.signal == "random":
            return {c: generator(self.root, RATES, round, c).uniform(-1, 1) for c in clients}
        known: dict[int, float] = {}
        if self.signal == "model_difference":
            known = self.differences
        elif self.signal == "loss":
            known = {c: losses[-1] for c, losses in self.losses.items()}
        elif self.signal == "five_round_loss":
            full = {c: losses for c, losses in self.losses.items() if len(losses) == 5}
            known = {c: math.fsum(losses) / 5 for c, losses in full.items()}
        h = deviations({c: known[c] for c in clients if c in known})
        return {c: h.get(c, 0.0) for c in clients}

    @property
    def sends_loss(self) -> bool:
        """Whether a client's loss travels as one more scalar."""
        return self.signal in ("loss", "five_round_loss")

    def scalars(self, order: Order) -> int:
        """H projected gradients, and the loss where the signal needs it."""
        return super().scalars(order) + self.sends_loss

    def client(self, site: Site, order: Order) -> list[float]:
        """H MeZO steps."""
        sent = super().client(site, order)
        return [*sent, site.loss] if self.sends_loss else sent

    def merge(self, round: int, reports: Reports, rule: Rule) -> tuple[Block, ...]:
        """The mean; and the signals of the next round."""
        if self.sends_loss:
            for client, (_, scalars) in reports.items():
                self.losses[client] = [*self.losses.get(client, []), scalars[-1]][-5:]
        if self.signal == "model_difference":
            paths = [self.path(order, scalars) for order, scalars in reports.values()]
            self.differences.update(zip(reports, self.space.deviations(paths), strict=True))
        return super().merge(round, reports, rule)

    def state(self) -> dict[str, Any]:
        """The signals."""
        return {
            "losses": {str(c): list(v) for c, v in self.losses.items()},
            "differences": {str(c): v for c, v in self.differences.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The signals."""
        self.losses = {int(c): list(v) for c, v in state["losses"].items()}
        self.differences = {int(c): float(v) for c, v in state["differences"].items()}


def deviations(signals: Mapping[int, float]) -> dict[int, float]:
    """``h_i = a_i / max_j |a_j|`` with ``a_i = signal_i - mean_j signal_j``; 0 where undefined."""
    if not signals:
        return {}
    mean = math.fsum(signals.values()) / len(signals)
    a = {client: value - mean for client, value in signals.items()}
    largest = max(map(abs, a.values()))
    # Signals that differ by no more than the rounding of their mean are equal.
    rounding = 4 * sys.float_info.epsilon * max(map(abs, signals.values()))
    if not rounding < largest < math.inf:
        return dict.fromkeys(signals, 0.0)
    return {client: value / largest for client, value in a.items()}
