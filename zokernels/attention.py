"""Attention of all branches in one call.

``torch.func.vmap`` has rules for torch's attention kernels, but on CUDA they refuse a mask that all
branches share (https://github.com/pytorch/pytorch/issues/161310, up to torch 2.11 at least), and
transformers makes such a mask for every padded batch, and for any batch while a CUDA graph is
recorded. On a CPU there is no rule, and branches go one after another. Here the branches are laid
beside the batch, as they would be in a batch of so many examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch


def stacked_attention(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``attend(query, key, value, ...)`` under vmap, by one call on ``[G batch, heads, ...]``.

    Args:
        attend: ``torch.nn.functional.scaled_dot_product_attention``.
        query, key, value: ``[batch, heads, tokens, width]`` as the evaluated function sees them.
        attn_mask: anything that broadcasts to ``[batch, heads, tokens, tokens]``, or None.
        dropout_p, is_causal, options: as ``attend`` takes them.

    Other layouts, dropout (its masks must be those of one branch) and tensors of no vmap or of
    several go to ``attend`` as they are.
    """
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    levels = {functorch.maybe_get_level(t) for t in given} - {-1}
    if (
        len(levels) != 1
        or dropout_p
        or any(t.dim() != 4 or t.shape[0] != query.shape[0] for t in (query, key, value))
        or (attn_mask is not None and attn_mask.dim() > 4)
        or any(functorch.maybe_get_level(t) != -1 for t in given if not _batched(t))
    ):
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **options)
    branches = next(
        functorch.get_unwrapped(t).shape[functorch.maybe_get_bdim(t)] for t in given if _batched(t)
    )

    def beside(t: Tensor) -> Tensor:
        """``[G batch, ...]``; a copy only where all branches share ``t``."""
        if not _batched(t):
            return t.expand(branches, *t.shape).flatten(0, 1)
        physical: Tensor = functorch.get_unwrapped(t)
        return physical.movedim(functorch.maybe_get_bdim(t), 0).flatten(0, 1)

    mask = attn_mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if _batched(mask) or mask.shape[0] > 1:
            mask = beside(mask.expand(query.shape[0], *mask.shape[1:]))
    y = attend(beside(query), beside(key), beside(value), mask, 0.0, is_causal, **options)
    lifted: Tensor = functorch._add_batch_dim(y.unflatten(0, (branches, -1)), 0, levels.pop())
    return lifted


def _batched(t: Tensor) -> bool:
    return bool(functorch.is_batchedtensor(t))
