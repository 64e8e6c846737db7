"""The product by wgmma and TMA (``csrc/cuda/linear_sm90.cu``): when it serves a call, and the call.

For compute capability 9.0 alone. By its instruction count it should pay from 65 to 128 tokens a
branch; it has not run on a device, so it serves nothing until ``ZOKERNELS_GPU="wgmma=128"`` (or the
table of :mod:`zokernels.triton.devices`) gives it a range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zokernels._native import DISTRIBUTION, remembered


class Wgmma:
    """The product over one native namespace.

    Args:
        ops: the namespace with the native functions.
        stream: the raw stream to launch on, for a device.
        multiprocessors: of a device.
        limit: tokens a branch up to which a device's products may go here; 0: none do.
    """

    def __init__(
        self,
        ops: Any,
        *,
        stream: Callable[[torch.device], int],
        multiprocessors: Callable[[torch.device], int],
        limit: Callable[[torch.device], int],
    ) -> None:
        self._linear = ops.linear_sm90_.default
        self._parts = remembered(ops.linear_sm90_parts.default)
        self._built = remembered(ops.has_sm90a.default)
        self._stream = stream
        self._multiprocessors = multiprocessors
        self._limit = limit

    def takes(self, x: Tensor, w: Tensor, tokens: int) -> bool:
        """Whether a call is served whose layout suits the other fused product.

        ``x`` contiguous ``[G or 1, tokens, in]``. The copy engine asks for rows that do not overlap
        and activations at a multiple of 16 bytes.
        """
        return (
            tokens <= self._limit(w.device)
            and (w.shape[0] == 1 or w.stride(0) >= w.shape[1])
            and x.data_ptr() % 16 == 0
            and bool(self._built())
        )

    def linear(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
        shared: bool,
    ) -> Tensor:
        """``y [G, tokens, out]``, where :meth:`takes` holds or would but for the limit."""
        branches, tokens, device = coeffs.shape[0], x.shape[1], w.device
        y = torch.empty((branches, tokens, w.shape[0]), dtype=w.dtype, device=device)
        parts = self._parts(*w.shape, tokens, branches, self._multiprocessors(device))
        partial = None
        if parts > 1:
            partial = torch.empty((parts, *y.shape), dtype=torch.float32, device=device)
        self._linear(
            y,
            x,
            w,
            None if bias is None else bias.contiguous(),
            seeds.contiguous(),
            coeffs.contiguous(),
            partial,
            param_id,
            row_offset,
            col_offset,
            DISTRIBUTION[distribution],
            shared,
            self._stream(device),
        )
        return y
