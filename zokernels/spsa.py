"""The numbers of a step: probes, projected gradients, and the terms of the update.

With ``n`` directions ``z_i``, learning rate ``lr``, momentum ``mu`` and weight decay ``wd``::

    g_i = (L(w + eps z_i) - L(w - eps z_i)) / (2 eps)        "central"
    g_i = (L(w + eps z_i) - L(w)) / eps                      "forward"
    w   = (1 - lr wd) w - lr sum_j mu**j sum_i g_i z_i / n   over the steps j back, 0 first

Everything here is Python floats (float64) until a coefficient is rounded to float32; what
:func:`zokernels.deferred.coefficients` computes on a device has the same bits.

Source: Spall 1992; Malladi et al. 2023, Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zokernels.subset import fp32


@dataclass(frozen=True, slots=True)
class Rates:
    """Hyperparameters of a group at one step."""

    lr: float
    eps: float
    weight_decay: float
    momentum: float

    def decay(self, terms: int) -> tuple[float, ...]:
        """Factors on the weight before each of so many terms, in float32."""
        return fp32([1.0 - self.lr * self.weight_decay, *[1.0] * (terms - 1)])

    def weights(self, step: int, window: Sequence[tuple[int, int]]) -> list[float]:
        """Factors of what ``(step, directions)`` found in the update of ``step``."""
        return [
            -self.lr * self.momentum ** (step - at) / count
            for at, count in window
            for _ in range(count)
        ]


@dataclass(frozen=True, slots=True)
class Past:
    """A step in the momentum window."""

    step: int
    seeds: tuple[int, ...]
    gradients: tuple[tuple[float, ...], ...]  # [groups][directions], clipped


@dataclass(frozen=True, slots=True)
class Spsa:
    """The estimator.

    Attributes:
        central: probes on both sides of the weights, or on one.
        clip: limit of ``|g|``, or None.
        momentum_window: number of steps the momentum looks back.
    """

    central: bool
    clip: float | None
    momentum_window: int

    def probes(self, directions: int, eps: float) -> list[list[float]]:
        """Coefficients of the directions in every branch: ``[G][directions]``."""
        rows = [] if self.central else [[0.0] * directions]
        for i in range(directions):
            for size in (eps, -eps) if self.central else (eps,):
                rows.append([size if k == i else 0.0 for k in range(directions)])
        return rows

    def project(
        self, losses: Sequence[float], rates: Sequence[Rates]
    ) -> tuple[tuple[float, ...], ...]:
        """Projected gradients ``[groups][directions]`` of the branches' losses."""
        if self.central:
            differences = [(p - m) / 2 for p, m in zip(losses[::2], losses[1::2], strict=True)]
        else:
            differences = [moved - losses[0] for moved in losses[1:]]
        return tuple(tuple(d / rate.eps for d in differences) for rate in rates)

    def clipped(self, gradients: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        limit = self.clip
        if limit is None:
            return tuple(map(tuple, gradients))
        return tuple(tuple(max(-limit, min(limit, g)) for g in row) for row in gradients)

    def recent(self, window: Sequence[Past], step: int) -> tuple[Past, ...]:
        """What of the momentum window still counts at a step."""
        return tuple(past for past in window if past.step > step - self.momentum_window)

    def terms(
        self, window: Sequence[Past], now: Past, rates: Sequence[Rates]
    ) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
        """Seeds ``[K]``, coefficients and decay ``[groups][K]`` of the update of ``now``.

        The newest direction comes last: its seed, fresh in every step, keys the rounding.
        """
        keeps = any(rate.momentum for rate in rates)
        steps = (*(self.recent(window, now.step) if keeps else ()), now)
        counts = [(past.step, len(past.seeds)) for past in steps]
        coeffs, decay = [], []
        for index, rate in enumerate(rates):
            row: list[float] = []
            for past in steps:
                # A group added later has no part in earlier steps.
                known = index < len(past.gradients)
                row += past.gradients[index] if known else (0.0,) * len(past.seeds)
            weights = rate.weights(now.step, counts)
            coeffs.append(fp32(w * g for w, g in zip(weights, row, strict=True)))
            decay.append(rate.decay(len(row)))
        return (tuple(s for past in steps for s in past.seeds), tuple(coeffs), tuple(decay))
