"""Ops that vmap takes apart: their precision, and attention of all branches at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from zokernels.attention import stacked_attention

_LOSSES = frozenset(
    (
        F.cross_entropy,
        F.nll_loss,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.kl_div,
        F.binary_cross_entropy_with_logits,
        F.cosine_embedding_loss,
    )
)


class CompositeOps(TorchFunctionMode):
    """Losses in float32; attention in autocast's dtype, and in one call for all branches.

    For low-precision models the losses are taken in float32 without autocast too: a bfloat16 loss
    near 4 has steps of 0.03, more than two probes differ by.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:
            args, kwargs = _cast((args, kwargs), torch.float32)
        elif func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            device = query.device.type
            if torch.is_autocast_enabled(device):
                args, kwargs = _cast((args, kwargs), torch.get_autocast_dtype(device))
            return stacked_attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)
