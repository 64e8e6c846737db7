"""What every method is: what a client computes, what is sent, how it is merged.

A method is three verbs over a round's order (:class:`fedzo.messages.Order`):

- :meth:`Method.client` runs on the client and gives the scalars it sends (or, for the baselines
  that send weights, leaves the weights where they are sent from);
- :meth:`Method.path` is what the client's weights did, rebuilt from the order and the scalars;
- :meth:`Method.merge` makes one list of coefficients of all scalars, and :meth:`Method.update`
  says what these coefficients do to everybody's weights.

Paths and updates are seeds and coefficients; the seeds derive from the run's root, the round, the
client and the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from fedzo.aggregate import aggregate
from fedzo.messages import SHARED, Block, Order
from fedzo.space import Space, Update
from fedzo.task import Batch, Task
from zokernels.binding import bind
from zokernels.displacement import check_distribution, check_rounding
from zokernels.masks import Mask
from zokernels.noise import derive_seed
from zokernels.subset import fp32

PAYLOADS = ("scalars", "tensors")
SEEDINGS = ("shared", "client")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method needs to know before the first round.

    Attributes:
        model: the one copy.
        task: what it learns.
        clients: clients that have examples.
        samples: number of examples of each client.
        seed: of the run.
        calibration: batches of pre-training text with labels, for masks and gradients.
        server: whether this is the server's copy, or the one of a client in its own process.
    """

    model: nn.Module
    task: Task
    clients: tuple[int, ...]
    samples: Mapping[int, int]
    seed: int
    calibration: Sequence[Batch] = ()
    server: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """How scalars of several clients become one list (:mod:`fedzo.aggregate`)."""

    aggregate: str = "mean"
    trim: float = 0.1
    weights: Mapping[int, float] = field(default_factory=dict)

    def shares(self, clients: Iterable[int]) -> dict[int, float]:
        """Weight of each of these clients, summing to 1."""
        raw = {c: self.weights.get(c, 1.0) for c in clients}
        total = math.fsum(raw.values())
        return {c: w / total for c, w in raw.items()}


class Site:
    """A client at work: its next batches, and the model displaced to where the client is.

    Updates are made when the weights are next looked at, so a last step whose result nobody reads
    costs nothing.

    Attributes:
        losses: one per step, what the client reports as its loss.
    """

    def __init__(self, space: Space, task: Task, examples: Iterator[Sequence[int]]) -> None:
        self.space, self.task = space, task
        self._examples = examples
        self._pending: list[Update] = []
        self.losses: list[float] = []

    @property
    def model(self) -> nn.Module:
        """The model with the client's weights."""
        self.settle()
        return self.space.model

    def next_batch(self) -> Batch:
        """The next batch of the client's examples."""
        return self.task.batch(next(self._examples))

    def loss_of(self, batch: Batch) -> Callable[[], Tensor]:
        """The loss of a batch as a function, to be evaluated at branches."""
        return lambda: self.task.loss(self.space.model, batch)

    def evaluate(
        self, batch: Batch, seeds: Sequence[int], coeffs: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Losses at ``w + sum_k coeffs[g][k] z(seeds[k])``; the first counts as the step's loss."""
        self.settle()
        losses = self.space.losses(self.loss_of(batch), seeds, coeffs)
        self.losses.append(losses[0])
        return losses

    def apply_(self, update: Update) -> None:
        """A local step."""
        self._pending.append(update)

    def settle(self) -> None:
        """Make the updates that are waiting."""
        for update in self._pending:
            self.space.move_(update)
        self._pending.clear()

    @property
    def loss(self) -> float:
        """Mean loss over the steps; NaN when there was none."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else math.nan


Reports = Mapping[int, tuple[Order, tuple[float, ...]]]


@dataclass(kw_only=True)
class Method:
    """A federated method; see the module's text. Options every method has:

    Args:
        lr: learning rate eta.
        eps: size of the probes (mu).
        steps: local steps a round (H, T, K).
        seeds: ``"shared"`` (all clients of a round walk the same directions, so the mean of their
            weights is T coefficients) or ``"client"`` (directions of their own).
        payload: what travels up: ``"scalars"``, or ``"tensors"`` (every moving value, as in the
            papers' dense baselines).
        distribution: of the directions, ``"gaussian"`` or ``"rademacher"``.
        rounding: of bfloat16 and float16 weights, ``"stochastic"`` or ``"nearest"``.

    Attributes:
        space: the values that move, once the method is prepared.
        fingerprint: of the space.
        gradip: of the last round, by client: one GradIP a step; empty where there is none.
        flagged: clients singled out.
    """

    name: ClassVar[str]
    # Whether a round's update starts from the first weights of the run and not from the last.
    from_base: ClassVar[bool] = False

    lr: float = 1e-6
    eps: float = 1e-3
    steps: int = 10
    seeds: str = "shared"
    payload: str = "scalars"
    distribution: str = "gaussian"
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        self.root = 0
        self.fingerprint = 0
        self.prepared = False
        self.gradip: dict[int, tuple[float, ...]] = {}
        self.flagged: tuple[int, ...] = ()
        self.check()

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        for label in ("lr", "eps"):
            value = getattr(self, label)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{label} must be positive and finite; got {value!r}")
        at_least_one(self, "steps")
        choice(self, "seeds", SEEDINGS)
        choice(self, "payload", PAYLOADS)
        check_distribution(self.distribution)
        check_rounding(self.rounding)

    # --- before the first round -------------------------------------------------------------------

    def prepare(self, setting: Setting) -> None:
        """Choose what moves, and whatever else the server does once."""
        self.root = setting.seed
        self.space = self.moving(setting)
        self.fingerprint = self.space.fingerprint
        self.prepared = True

    def moving(self, setting: Setting) -> Space:
        """The values that move: every parameter that requires a gradient."""
        return self.whole(setting.model)

    def whole(self, model: nn.Module, mask: Mask | None = None) -> Space:
        """A space of one group."""
        return Space(bind(model, mask=mask), distribution=self.distribution, rounding=self.rounding)

    @property
    def per_step(self) -> int:
        """Scalars of a local step."""
        return 1

    @property
    def comparable(self) -> bool:
        """Whether scalars of different clients belong to the same directions."""
        return self.seeds == "shared"

    # --- a round ----------------------------------------------------------------------------------

    def orders(self, round: int, clients: Sequence[int]) -> dict[int, Order]:
        """What the server asks of each client of a round."""
        return {client: self.order(round, client) for client in clients}

    def order(
        self,
        round: int,
        client: int,
        *,
        steps: int | None = None,
        lr: float | None = None,
        values: tuple[float, ...] = (),
    ) -> Order:
        """An order with the method's own number of steps and rate where none is given."""
        return Order(
            round=round,
            client=client,
            fingerprint=self.fingerprint,
            root=self.root,
            steps=self.steps if steps is None else steps,
            lr=self.lr if lr is None else lr,
            values=values,
        ).received()

    def scalars(self, order: Order) -> int:
        """How many scalars a client sends."""
        return order.steps * self.per_step

    def client(self, site: Site, order: Order) -> list[float]:
        """What a client computes: MeZO steps, unless a method says otherwise.

        For each step: ``g = [L(w + eps z) - L(w - eps z)] / (2 eps)``; ``w <- w - lr g z``.
        A loss that is not finite ends the run with NaN, which the server refuses.

        Returns:
            The scalars to send.
        """
        sent: list[float] = []
        for t in range(order.steps):
            z = self.direction(order, t)
            plus, minus = site.evaluate(site.next_batch(), [z], [[self.eps], [-self.eps]])
            g = fp32([(plus - minus) / (2 * self.eps)])
            sent += g
            if not self.step_(site, order, t, g):
                break
        return sent

    def step_(self, site: Site, order: Order, t: int, gradients: Sequence[float]) -> bool:
        """Make local step ``t`` along these projected gradients, float32 as they are sent.

        Returns:
            False when one is not finite; nothing is done then.
        """
        if not all(map(math.isfinite, gradients)):
            return False
        site.apply_(self.step(order.round, self.owner(order), t, self.rates(order, gradients)))
        return True

    # --- seeds and coefficients -------------------------------------------------------------------

    def owner(self, order: Order) -> int:
        """Whose directions these are: the client's or everybody's."""
        return SHARED if self.seeds == "shared" else order.client

    def seed(self, round: int, owner: int, t: int, j: int = 0) -> int:
        """Seed of direction ``j`` of step ``t``."""
        return derive_seed(derive_seed(self.root, round, owner), t, j)

    def direction(self, order: Order, t: int, j: int = 0) -> int:
        """Seed of direction ``j`` of step ``t`` under an order."""
        return self.seed(order.round, self.owner(order), t, j)

    def rates(self, order: Order, scalars: Iterable[float]) -> list[float]:
        """``-lr g``: the coefficients of a client's own steps."""
        return [-order.lr * g for g in scalars]

    def step(self, round: int, owner: int, t: int, coeffs: Sequence[float]) -> Update:
        """What step ``t`` adds to the weights, given one coefficient per scalar."""
        seeds = [self.seed(round, owner, t, j) for j in range(len(coeffs))]
        return Update.one(seeds, [c / len(coeffs) for c in coeffs])

    def steps_of(self, round: int, owner: int, coeffs: Sequence[float]) -> list[Update]:
        """Steps of a list of coefficients."""
        n = self.per_step
        return [
            self.step(round, owner, t, coeffs[t * n : (t + 1) * n]) for t in range(len(coeffs) // n)
        ]

    def path(self, order: Order, scalars: Sequence[float]) -> Update:
        """The client's virtual path: from the round's weights to the client's own, bit for bit."""
        own = scalars[: order.steps * self.per_step]
        return Update.path(self.steps_of(order.round, self.owner(order), self.rates(order, own)))

    # --- the server -------------------------------------------------------------------------------

    def merge(self, round: int, reports: Reports, rule: Rule) -> tuple[Block, ...]:
        """The round's coefficients: ``w <- mean_k w_k``, written as ``sum of share_k (-lr_k g_k)``.

        With shared seeds one list for all; with seeds of their own a block for each client.
        """
        shares = rule.shares(reports)
        rows = {
            client: self.rates(order, scalars[: order.steps * self.per_step])
            for client, (order, scalars) in reports.items()
        }
        if self.seeds == "shared":
            merged = aggregate(
                list(rows.values()), list(shares.values()), rule=rule.aggregate, trim=rule.trim
            )
            return (Block(SHARED, fp32(merged)),)
        return tuple(Block(c, fp32([shares[c] * x for x in row])) for c, row in rows.items())

    def update(self, round: int, blocks: Sequence[Block]) -> Update:
        """What merged coefficients add to everybody's weights; one rounding in all."""
        return Update.sum(
            step for block in blocks for step in self.steps_of(round, block.client, block.values)
        )

    # --- memory -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the method remembers between rounds, JSON-compatible."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

    def options(self) -> dict[str, Any]:
        """The options by name, for records."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Calibrated(Method, ABC):
    """A method whose clients run once before the first round, without moving the weights."""

    calibrated: bool = False

    @abstractmethod
    def calibration_order(self, client: int) -> Order:
        """What a client does for the calibration, round 0."""

    @abstractmethod
    def calibrate(self, reports: Reports) -> None:
        """Use what the clients sent."""


def choice(owner: object, name: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless an option is one of these."""
    value = getattr(owner, name)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}; got {value!r}")


def at_least_one(owner: object, name: str) -> None:
    """Raise ValueError unless an option is an integer >= 1."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
