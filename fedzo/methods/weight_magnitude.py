"""Weight-Magnitude: Meerkat on the largest weights, a baseline that needs no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedzo.methods.base import Setting
from fedzo.methods.meerkat import Meerkat, candidates
from zokernels.masks import Mask


@dataclass(kw_only=True)
class WeightMagnitude(Meerkat):
    r"""Meerkat with ``m`` = the ``u d`` weights of largest ``|w|``, chosen before the first round.

    Options as :class:`~fedzo.methods.meerkat.Meerkat`.
    """

    name: ClassVar[str] = "weight_magnitude"

    def choose(self, setting: Setting) -> Mask:
        """The largest weights."""
        if self.mask is not None:
            return super().choose(setting)
        return Mask.magnitude(
            setting.model, self.density, params=candidates(setting.model), scope=self.scope
        )
