"""Adapters of the CUDA backend for the ops under a mask; their arithmetic is in ``csrc/cuda``.

Nothing here waits for the device but the range check of a list of indices that was not seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zokernels._native import DISTRIBUTION, ByList, check_index, plain_product, put_back


class Sparse:
    """The ops under a mask over one native namespace.

    Args:
        ops: the namespace with the native functions.
        values: ``Native._vectors``, many displaced vectors in one launch.
        embedding: ``Native.embedding``, for rows without terms.
        table: scratch for a table of so many tensors on a device.
        stream: the raw stream to launch on, for a device.
        capturing: whether a CUDA graph is being recorded.
    """

    def __init__(
        self,
        ops: Any,
        *,
        values: Callable[..., Tensor],
        embedding: Callable[..., Tensor],
        table: Callable[[int, torch.device], Tensor],
        stream: Callable[[torch.device], int],
        capturing: Callable[[], bool],
    ) -> None:
        self._update = ops.sparse_update_.default
        self._correct = ops.sparse_correct_.default
        self._rows = ops.sparse_rows_.default
        self._values = values
        self._embedding = embedding
        self._table = table
        self._stream = stream
        self._capturing = capturing
        self._lists = ByList()

    def _check(self, indices: Tensor, size: int) -> None:
        if self._capturing():
            return

        def check() -> bool:
            check_index("indices", indices, size)
            return True

        self._lists.get(indices, ("inside", size), check, keep=True)

    def _displaced(
        self,
        w: Tensor,
        indices: Tensor,
        shadow: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        offset: int,
        distribution: str,
        less_held: bool = False,
    ) -> Tensor:
        """float32 ``[G, n]``: the masked values, less what ``w`` holds if so asked."""
        self._check(indices, w.numel())
        w = w.detach()
        if not w.is_contiguous():  # its values, in torch, and their noise
            w = torch.take(w, indices)
            indices = torch.arange(indices.numel(), device=indices.device)
        out = self._values(
            [w],
            [indices.contiguous()],
            [shadow.contiguous()],
            seeds,
            coeffs,
            [param_id],
            offset,
            distribution,
            less_held,
        )
        return out.view(coeffs.shape[0], indices.numel())

    def sparse_displace(
        self,
        w: Tensor,
        indices: Tensor,
        shadow: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        offset: int,
        distribution: str,
    ) -> Tensor:
        return self._displaced(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)

    def sparse_update_(
        self,
        params: list[Tensor],
        indices: list[Tensor],
        shadows: list[Tensor],
        seeds: Tensor,
        coeffs: Tensor,
        decay: Tensor | None,
        param_ids: list[int],
        distribution: str,
    ) -> None:
        for param, index in zip(params, indices, strict=True):
            self._check(index, param.numel())
        dense = [p.detach().contiguous() for p in params]
        held = [s.contiguous() for s in shadows]
        self._update(
            dense,
            [i.contiguous() for i in indices],
            held,
            seeds.contiguous(),
            coeffs.contiguous(),
            None if decay is None else decay.contiguous(),
            param_ids,
            DISTRIBUTION[distribution],
            self._table(len(params), seeds.device),
            self._stream(seeds.device),
        )
        put_back([*params, *shadows], [*dense, *held])

    def _by_output(
        self, indices: Tensor, rows: int, cols: int, transposed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A list as ``output * inputs + input``, increasing, and where its elements stood."""
        if not transposed:
            return indices.contiguous(), None

        def turned() -> tuple[Tensor, Tensor]:
            keys, order = torch.sort(indices % cols * rows + indices // cols)
            return keys, order

        # Made while a graph is recorded it lives in the graph's memory, and is not kept.
        found: tuple[Tensor, Tensor] = self._lists.get(
            indices, ("turned", rows, cols), turned, keep=not self._capturing()
        )
        return found

    def sparse_linear(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        shadow: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        offset: int,
        distribution: str,
        shared: bool,
        transposed: bool,
    ) -> Tensor:
        x, w = x.detach().contiguous(), w.detach()
        bias = None if bias is None else bias.detach()
        branches, count = coeffs.shape[0], indices.numel()
        difference = self._displaced(
            w, indices, shadow, seeds, coeffs, param_id, offset, distribution, True
        )
        plain, late = plain_product(x, w, bias, transposed)
        plain = plain.contiguous()
        fan_in, fan_out = x.shape[-1], plain.shape[-1]
        y = plain.new_empty((branches, *plain.shape)) if shared else plain
        if y.numel() == 0:
            return y
        tokens = y.numel() // (branches * fan_out)
        flat_x = x.reshape(1 if shared else branches, tokens, fan_in)
        if count * 4 > fan_in and tokens > 1:
            # Tokens next to each other: most columns are read, and read in runs.
            flat_x = flat_x.transpose(1, 2).contiguous().transpose(1, 2)
        keys, order = self._by_output(indices, w.shape[0], w.shape[1], transposed)
        self._correct(
            y.view(branches, tokens, fan_out),
            plain.view(1 if shared else branches, tokens, fan_out),
            flat_x,
            late,
            difference,
            keys,
            order,
            shared,
            self._stream(y.device),
        )
        return y

    def sparse_embedding(
        self,
        ids: Tensor,
        w: Tensor,
        indices: Tensor,
        shadow: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        offset: int,
        distribution: str,
        shared: bool,
    ) -> Tensor:
        branches, cols = coeffs.shape[0], w.shape[1]
        values = self._displaced(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
        rows = self._embedding(
            ids, w, seeds[:0], coeffs[:, :0], param_id, 0, 0, distribution, shared
        )
        if rows.numel():
            self._rows(
                rows.view(branches, -1, cols),
                ids.contiguous(),
                values,
                indices.contiguous(),
                not shared,
                self._stream(rows.device),
            )
        return rows

    def kernels(self) -> dict[str, Callable[..., object]]:
        """Op name -> function with the op's positional signature."""
        return {
            "sparse_displace": self.sparse_displace,
            "sparse_update_": self.sparse_update_,
            "sparse_linear": self.sparse_linear,
            "sparse_embedding": self.sparse_embedding,
        }
