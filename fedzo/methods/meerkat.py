"""Meerkat (arXiv 2506.03337): a fixed sparse mask, shared seeds, few local steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedzo.gradients import pretraining_gradient
from fedzo.messages import Block
from fedzo.methods.base import Method, Reports, Rule, Setting
from fedzo.space import Space
from zokernels.masks import Mask, linear_weights
from zokernels.selection import unwrap


@dataclass(kw_only=True)
class Meerkat(Method):
    r"""Zeroth-order steps on the 0.1% of the weights with the largest pre-training gradients.

    ::

        server, once: score_j = mean over calibration batches of (dL/dw_j)^2;  m = the top u d
        round:        the round's seeds s^1..s^T
        client k:     for t in 1..T:  z = z(s^t) on m
                                      g = [f_k(w + eps z) - f_k(w - eps z)] / (2 eps)
                                      w <- w - lr g z;  send g
        server:       w <- mean_k w_k^T  =  w - lr sum_t mean_k(g_k^t) z(s^t)

    With shared seeds T scalars travel each way.

    Args:
        density: u.
        mask: a mask or its file, in place of one calibrated here.
        scope: ranking of the weights, ``"global"`` over the transformer's linear weights or
            ``"layer"`` within each [reconstructed: global]. Frozen parameters are left out; where
            no linear weight may move, all that may are ranked.
        seeds: ``"shared"`` by all clients of a round, or ``"client"`` [reconstructed: shared].
        track_gradip: compute every client's GradIP (needs calibration text).
        Otherwise as :class:`~fedzo.methods.base.Method`. Means are uniform over clients unless the
        federation weights them by samples [reconstructed: uniform].
    """

    name: ClassVar[str] = "meerkat"

    lr: float = 1e-4
    eps: float = 1e-3
    steps: int = 10
    density: float = 1e-3
    mask: Mask | str | os.PathLike[str] | None = None
    scope: str = "global"
    track_gradip: bool = False

    def __post_init__(self) -> None:
        self.pretraining: dict[str, Tensor] = {}
        super().__post_init__()

    def check(self) -> None:
        """Raise ValueError for an option out of range."""
        super().check()
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1]; got {self.density!r}")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer'; got {self.scope!r}")
        if self.track_gradip and self.payload == "tensors":
            raise ValueError("track_gradip needs payload 'scalars'; got 'tensors'")

    def prepare(self, setting: Setting) -> None:
        """The mask; and the server's pre-training gradient on it, where GradIP is asked for."""
        super().prepare(setting)
        if self.track_gradip and setting.server:
            self.pretraining = pretraining_gradient(self.space, setting.calibration)

    def moving(self, setting: Setting) -> Space:
        """The masked weights."""
        return self.whole(setting.model, self.choose(setting))

    def choose(self, setting: Setting) -> Mask:
        """The mask, once, at the server."""
        if isinstance(self.mask, Mask):
            return self.mask
        if self.mask is not None:
            return Mask.load(self.mask)
        if not setting.calibration:
            raise ValueError(
                f"{self.name} needs calibration: batches of pre-training text, or a mask"
            )
        return Mask.calibrate(
            setting.model,
            setting.calibration,
            self.density,
            params=candidates(setting.model),
            scope=self.scope,
        )

    def merge(self, round: int, reports: Reports, rule: Rule) -> tuple[Block, ...]:
        """The mean of the clients; and their GradIP."""
        self.gradip = self.gradips(reports) if self.pretraining else {}
        return super().merge(round, reports, rule)

    def gradips(self, reports: Reports) -> dict[int, tuple[float, ...]]:
        """``GradIP_k^t = g_k^t <grad_p, z(s^t)>``; each seed's inner product once.

        Source: Meerkat, definition of GradIP.
        """
        seeds = {
            client: [self.direction(order, t) for t in range(order.steps)]
            for client, (order, _) in reports.items()
        }
        distinct = list(dict.fromkeys(s for own in seeds.values() for s in own))
        inner = dict(zip(distinct, self.space.project(self.pretraining, distinct), strict=True))
        return gradip(seeds, {c: scalars for c, (_, scalars) in reports.items()}, inner)


def candidates(model: nn.Module) -> list[str] | None:
    """What a mask is chosen from: the linear weights that may move (``requires_grad``), or whatever
    may where none of them does; None (the linear weights) where everything is frozen."""
    model = unwrap(model)
    may = [name for name, p in model.named_parameters() if p.requires_grad]
    linear = linear_weights(model)
    return [name for name in may if name in linear] or may or None


def gradip(
    seeds: Mapping[int, list[int]],
    scalars: Mapping[int, tuple[float, ...]],
    inner: Mapping[int, float],
) -> dict[int, tuple[float, ...]]:
    """``g_k^t * inner[s_k^t]`` by client.

    Args:
        seeds: by client, ``[T_k]``.
        scalars: by client, projected gradients ``[T_k]``.
        inner: ``<grad_p, z(s)>`` by seed.
    """
    return {
        client: tuple(g * inner[s] for g, s in zip(scalars[client], own, strict=True))
        for client, own in seeds.items()
    }
