"""Checks of a model's first evaluation: do two results agree, and who reads the weights unseen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from zokernels.binding import BoundParameter, exchanged

# A stacked evaluation differs from one branch at a time by the order of sums only. Relative to the
# largest value of an output.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# Evaluations that the search for the readers of original weights may cost.
_SEARCH = 64


def difference(stacked: Any, single: Any, dtypes: AbstractSet[torch.dtype]) -> str | None:
    """How two results differ beyond rounding, in words; None when they agree.

    Args:
        stacked, single: the same structure of tensors.
        dtypes: what the model computes in; the loosest sets the tolerance.
    """
    for x, y in zip(tree_flatten(stacked)[0], tree_flatten(single)[0], strict=True):
        if not isinstance(x, Tensor):
            continue
        if x.shape != y.shape:
            return f"shapes {tuple(x.shape)} stacked and {tuple(y.shape)} one by one"
        if x.dtype != y.dtype:
            return f"dtypes {x.dtype} stacked and {y.dtype} one by one"
        if not x.is_floating_point():
            continue
        usable = torch.isfinite(x) & torch.isfinite(y)
        if bool((torch.isfinite(x) != torch.isfinite(y)).any()):
            return "finite in one evaluation and not in the other"
        if not bool(usable.any()):
            continue
        size = y[usable].abs().max().item()
        gap = (x.double() - y.double())[usable].abs().max().item()
        tolerance = max(_TOLERANCE.get(dtype, 5e-2) for dtype in {x.dtype, *dtypes})
        if gap > tolerance * max(size, 1e-6):
            return (
                f"stacked and one-by-one results differ by {gap:.3g} of {size:.3g} (allowed: "
                f"{tolerance:g} relative)"
            )
    return None


def has_nan(result: Any) -> bool:
    """Whether a floating-point tensor of a result holds NaN."""
    return any(
        bool(torch.isnan(leaf).any())
        for leaf in tree_flatten(result)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


def poisoned(params: Sequence[BoundParameter]) -> AbstractContextManager[None]:
    """Parameters read NaN for a while, at the cost of one element each.

    While a model is evaluated its module tree holds stand-ins, so the parameters themselves must
    not matter; what reads them anyway (a list made earlier) gets NaN.
    """

    def nan(p: BoundParameter, data: Tensor) -> Tensor:
        return torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape)

    return exchanged(params, nan)


def readers(
    params: Sequence[BoundParameter], clean: Callable[[Sequence[BoundParameter]], bool]
) -> tuple[BoundParameter, ...]:
    """The parameters whose poisoning shows, by bisection; a superset when there are many.

    Args:
        params: candidates.
        clean: whether an evaluation with those poisoned is clean.
    """
    left = _SEARCH

    def search(part: Sequence[BoundParameter]) -> tuple[BoundParameter, ...]:
        nonlocal left
        if left <= 0:
            return tuple(part)
        left -= 1
        if clean(part):
            return ()
        if len(part) == 1:
            return tuple(part)
        half = len(part) // 2
        return search(part[:half]) + search(part[half:])

    return search(params)
