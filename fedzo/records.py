"""What a round leaves behind: numbers to print, plot and store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ScalarStats:
    """Statistics of the projected gradients of a round; NaN when there were none."""

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> ScalarStats:
        """Count, mean, population standard deviation, smallest and largest."""
        numbers = list(values)
        if not numbers:
            return cls(0, math.nan, math.nan, math.nan, math.nan)
        mean = math.fsum(numbers) / len(numbers)
        variance = math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)
        return cls(len(numbers), mean, math.sqrt(variance), min(numbers), max(numbers))


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round, as the server and the simulation saw it.

    Attributes:
        round: number of the round, from 1; 0 for a calibration before the first.
        phase: ``"train"``, or ``"calibration"`` (the weights did not move).
        invited: clients that were asked.
        accepted: clients whose message counted.
        dropped: invited clients that sent nothing, or nothing in time.
        late: invited clients whose message was held back until the round was over (simulated).
        rejected: why a message did not count, by client that sent it (the last reason, where one
            sent several), or the client failed; messages of earlier rounds that arrived in this one
            are among them.
        losses: mean of ``L(w + eps z)`` over a client's batches (of ``L(w)``, where a method has
            it); what the clients say, for the record only.
        lrs: learning rate by client.
        steps: local steps by client.
        scalars: statistics of the accepted projected gradients.
        gradip: by client, one GradIP a local step, where the method computes them.
        flagged: clients that a method singled out (Meerkat-vp: early stopping).
        bytes_up: bytes sent by all clients, from the real encoding, rejected ones included.
        bytes_down: bytes sent to all invited clients: orders, and the updates they had missed.
        seconds: wall time of the round.
    """

    round: int
    phase: Literal["train", "calibration"] = "train"
    invited: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    rejected: dict[int, str] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    lrs: dict[int, float] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    scalars: ScalarStats = field(default_factory=lambda: ScalarStats.of(()))
    gradip: dict[int, tuple[float, ...]] = field(default_factory=dict)
    flagged: tuple[int, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean of the clients' losses; NaN when there is none."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-compatible values (client numbers become strings in JSON objects)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoundRecord:
        """Read what :meth:`to_dict` gave, also after JSON."""
        kept = dict(values)
        kept["scalars"] = ScalarStats(**kept["scalars"])
        for name in ("invited", "accepted", "dropped", "late", "flagged"):
            kept[name] = tuple(kept[name])
        for name in ("rejected", "losses", "lrs", "steps", "gradip"):
            kept[name] = {int(k): v for k, v in kept[name].items()}
        kept["gradip"] = {k: tuple(v) for k, v in kept["gradip"].items()}
        return cls(**kept)
