"""Full-FedZO: MeZO steps on every weight, the baseline of the sparse methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedzo.methods.base import Method


@dataclass(kw_only=True)
class FullFedZO(Method):
    r"""Meerkat's loop with the mask of ones: every parameter that requires a gradient moves.

    ::

        client: for t in 1..T:  g = [L(w + eps z) - L(w - eps z)] / (2 eps);  w <- w - lr g z
        server: w <- mean_k w_k

    Args:
        payload: ``"tensors"``, what FedZO (Fang et al. 2022) sends in the papers that compare with
            it; ``"scalars"`` sends T numbers for the same result up to rounding.
        Otherwise as :class:`~fedzo.methods.base.Method`.
    """

    name: ClassVar[str] = "full_fedzo"

    lr: float = 1e-6
    eps: float = 1e-3
    steps: int = 10
    payload: str = "tensors"
