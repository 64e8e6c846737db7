"""Lazy parameters of which only the elements of a mask move.

Products use the weight as it is, once for all branches, and add what the masked elements change.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from zokernels.lazy.parameter import LazyParameter, State
from zokernels.subset import BoundParameter, Masked

_ops = torch.ops.zokernels


class MaskedLazyParameter(LazyParameter):
    """A lazy parameter, or a view of its rows, with few elements that move.

    ``masked`` are the elements of the view itself; the first one is element ``offset`` of the
    parameter's compact vector (:mod:`zokernels.subset`).
    """

    masked: Masked
    offset: int

    @staticmethod
    def of(
        state: State,
        name: str,
        param_id: int,
        source: Tensor,
        matrix: Tensor,
        transposed: bool,
        masked: Masked,
        offset: int,
    ) -> MaskedLazyParameter:
        self = LazyParameter.__new__(
            MaskedLazyParameter, state, name, param_id, source, matrix, 0, transposed
        )
        assert isinstance(self, MaskedLazyParameter)
        self.masked, self.offset = masked, offset
        return self

    def branches(self, dtype: torch.dtype) -> Tensor:
        with DisableTorchFunctionSubclass():
            seeds, coeffs = self.state.terms(self.parameter, self.matrix.device)
            formed = displaced(
                self.matrix,
                self.masked.indices,
                self.masked.shadow,
                seeds,
                coeffs,
                self.param_id,
                self.offset,
                self.state.distribution,
                dtype,
            )
            formed = formed.view(coeffs.shape[0], *self.stored_shape)
            return formed.transpose(-1, -2) if self.transposed else formed

    def product(self, x: Tensor, bias: Tensor | None, shared: bool, flip: bool) -> Tensor:
        seeds, coeffs = self.state.terms(self.parameter, self.matrix.device)
        if bias is not None and bias.dim() == 1 and bias.dtype != self.matrix.dtype:
            bias = bias.expand(coeffs.shape[0], -1)
        y: Tensor = _ops.sparse_linear(
            x,
            self.matrix,
            bias,
            self.masked.indices,
            self.masked.shadow,
            seeds,
            coeffs,
            self.param_id,
            self.offset,
            self.state.distribution,
            shared,
            self.transposed ^ flip,
        )
        return y

    def lookup(self, ids: Tensor, shared: bool) -> Tensor:
        seeds, coeffs = self.state.terms(self.parameter, self.matrix.device)
        rows: Tensor = _ops.sparse_embedding(
            ids,
            self.matrix,
            self.masked.indices,
            self.masked.shadow,
            seeds,
            coeffs,
            self.param_id,
            self.offset,
            self.state.distribution,
            shared,
        )
        return rows

    def _view(self, source: Tensor, matrix: Tensor, row: int, transposed: bool) -> LazyParameter:
        first = row * self.matrix.shape[1]
        skipped, masked = self.masked.part(first, first + matrix.numel())
        return MaskedLazyParameter.of(
            self.state,
            self.parameter,
            self.param_id,
            source,
            matrix,
            transposed,
            masked,
            self.offset + skipped,
        )


def displaced(
    matrix: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
    dtype: torch.dtype,
) -> Tensor:
    """A weight with the masked values of every branch in it: ``[G, rows, cols]`` of ``dtype``."""
    values = _ops.sparse_displace(
        matrix, indices, shadow, seeds, coeffs, param_id, offset, distribution
    )
    formed = matrix.to(dtype).expand(coeffs.shape[0], *matrix.shape).contiguous()
    formed = formed.clone() if formed.data_ptr() == matrix.data_ptr() else formed
    formed.view(coeffs.shape[0], -1)[:, indices] = values.to(dtype)
    return formed


def masked_parameter(state: State, bound: BoundParameter) -> MaskedLazyParameter:
    """The lazy stand-in of a bound parameter under a mask."""
    assert bound.masked is not None
    source = bound.tensor.detach()
    return MaskedLazyParameter.of(
        state,
        bound.name,
        bound.id,
        source,
        source.reshape(bound.matrix),
        False,
        bound.masked,
        0,
    )
