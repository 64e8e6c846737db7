"""Random mask: Meerkat on weights drawn at random, the control of every mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedzo.methods.base import Setting
from fedzo.methods.meerkat import Meerkat, candidates
from zokernels.masks import Mask


@dataclass(kw_only=True)
class RandomMask(Meerkat):
    r"""Meerkat with ``m`` = ``u d`` weights drawn uniformly from the run's seed.

    Options as :class:`~fedzo.methods.meerkat.Meerkat`.
    """

    name: ClassVar[str] = "random_mask"

    def choose(self, setting: Setting) -> Mask:
        """Random weights."""
        if self.mask is not None:
            return super().choose(setting)
        return Mask.random(
            setting.model,
            self.density,
            seed=setting.seed,
            params=candidates(setting.model),
            scope=self.scope,
        )
