"""Meerkat-vp (arXiv 2506.03337): clients with one-sided data are found and stopped early."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedzo.messages import Order
from fedzo.methods.base import Calibrated, Reports, Setting, at_least_one, choice
from fedzo.methods.meerkat import Meerkat

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Signature:
    """The two statistics of a client's calibration run.

    Attributes:
        later: ``rho_later = A_init / (A_later + tiny)``.
        quiet: ``rho_quie``, share of the later steps with ``|GradIP| < sigma``.
        flagged: whether the rule singles the client out.
    """

    later: float
    quiet: float
    flagged: bool


@dataclass(kw_only=True)
class MeerkatVP(Calibrated, Meerkat):
    r"""Meerkat with client selection by virtual path (VPCS).

    ::

        calibration: every client runs T_cali steps from w^0 and sends its scalars; no update
        A_init    = mean of |GradIP| over the first T_init steps
        A_later   = mean of |GradIP| over the last T_later steps
        rho_later = A_init / (A_later + tiny)
        rho_quie  = share of the last T_later steps with |GradIP| < sigma
        flag if rho_later > tau_later and rho_quie > tau_quie
        rounds:      flagged clients make 1 local step, the others T

    A flagged client goes on through its data where it stopped in the last round (every client of a
    federation keeps its place). The statistics and the rule are the paper's; the windows, the
    thresholds, sigma and the absolute values are reconstructed.

    Args:
        calibration_steps: T_cali [reconstructed].
        initial_steps: T_init [reconstructed].
        later_steps: T_later [reconstructed].
        sigma: threshold of quiet; None: ``sigma_share`` times the median ``|GradIP|`` of the
            initial window [reconstructed].
        sigma_share: see ``sigma`` [reconstructed].
        tau_later, tau_quiet: thresholds of the two statistics [reconstructed].
        absolute: take ``|GradIP|``, as above; False: GradIP with its sign, but not in the median
            that sets sigma [reconstructed].
        rule: ``"all"``: both must exceed their thresholds; ``"any"``: one must [paper: all].
        flagged_steps: local steps of a flagged client.
        Otherwise as :class:`~fedzo.methods.meerkat.Meerkat`; GradIP is always computed.
    """

    name: ClassVar[str] = "meerkat_vp"

    track_gradip: bool = True
    calibration_steps: int = 100
    initial_steps: int = 20
    later_steps: int = 50
    sigma: float | None = None
    sigma_share: float = 0.1
    tau_later: float = 3.0
    tau_quiet: float = 0.8
    absolute: bool = True
    rule: str = "all"
    flagged_steps: int = 1

    def __post_init__(self) -> None:
        self.calibrated = False
        self.signatures: dict[int, Signature] = {}
        super().__post_init__()

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        for label in ("calibration_steps", "initial_steps", "later_steps", "flagged_steps"):
            at_least_one(self, label)
        if max(self.initial_steps, self.later_steps) > self.calibration_steps:
            raise ValueError(
                f"initial_steps and later_steps must be at most calibration_steps; got "
                f"{self.initial_steps}, {self.later_steps} and {self.calibration_steps}"
            )
        choice(self, "rule", ("all", "any"))
        if not self.track_gradip:
            raise ValueError("track_gradip must be True: VPCS is made of GradIP")

    def prepare(self, setting: Setting) -> None:
        """The mask and the pre-training gradient."""
        super().prepare(setting)
        self.flagged = tuple(sorted(c for c, s in self.signatures.items() if s.flagged))

    def calibration_order(self, client: int) -> Order:
        """T_cali steps, in round 0."""
        return self.order(0, client, steps=self.calibration_steps)

    def calibrate(self, reports: Reports) -> None:
        """Flag the clients whose GradIP has died down."""
        self.gradip = self.gradips(reports)
        self.signatures = {c: self.signature(path) for c, path in self.gradip.items()}
        self.flagged = tuple(sorted(c for c, s in self.signatures.items() if s.flagged))
        self.calibrated = True

    def signature(self, trajectory: Sequence[float]) -> Signature:
        """The statistics of a GradIP trajectory."""
        return vpcs(
            trajectory,
            initial=self.initial_steps,
            later=self.later_steps,
            sigma=self.sigma,
            sigma_share=self.sigma_share,
            tau_later=self.tau_later,
            tau_quiet=self.tau_quiet,
            absolute=self.absolute,
            rule=self.rule,
        )

    def orders(self, round: int, clients: Sequence[int]) -> dict[int, Order]:
        """One step for the flagged, T for the others."""
        few = set(self.flagged)
        return {
            c: self.order(round, c, steps=self.flagged_steps if c in few else self.steps)
            for c in clients
        }

    def state(self) -> dict[str, Any]:
        """The flags and what they rest on."""
        return {
            "calibrated": self.calibrated,
            "signatures": {
                str(c): [s.later, s.quiet, s.flagged] for c, s in self.signatures.items()
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The flags and what they rest on."""
        self.calibrated = bool(state["calibrated"])
        self.signatures = {int(c): Signature(*values) for c, values in state["signatures"].items()}
        self.flagged = tuple(sorted(c for c, s in self.signatures.items() if s.flagged))


def vpcs(
    trajectory: Sequence[float],
    *,
    initial: int,
    later: int,
    sigma: float | None = None,
    sigma_share: float = 0.1,
    tau_later: float = 3.0,
    tau_quiet: float = 0.8,
    absolute: bool = True,
    rule: str = "all",
) -> Signature:
    """Client selection by virtual path for one client; see :class:`MeerkatVP`.

    Args:
        trajectory: GradIP of every calibration step, at least ``max(initial, later)``.
        initial, later: windows, in steps.
        sigma, sigma_share, tau_later, tau_quiet, absolute, rule: see :class:`MeerkatVP`.

    Raises:
        ValueError: the trajectory is too short.
    """
    if len(trajectory) < max(initial, later, 1):
        raise ValueError(
            f"the trajectory must have at least {max(initial, later)} steps; got {len(trajectory)}"
        )
    sizes = [abs(x) if absolute else x for x in trajectory]
    first, last = sizes[:initial], sizes[-later:]
    size = math.fsum(last) / later + _TINY
    rho_later = math.fsum(first) / initial / size if size else math.inf
    limit = sigma_share * statistics.median(map(abs, first)) if sigma is None else sigma
    rho_quiet = sum(x < limit for x in last) / later
    together = all if rule == "all" else any
    return Signature(rho_later, rho_quiet, together((rho_later > tau_later, rho_quiet > tau_quiet)))
