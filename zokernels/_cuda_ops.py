"""Adapters from the ops' positional signatures to the native CUDA functions.

The arithmetic is in ``csrc/cuda``; this module allocates, makes inputs contiguous, chooses the plan
of a product and turns a refused index into the error the reference raises. :func:`kernels` binds it
to a native namespace: the library's own on a GPU, or an emulation of it on the CPU in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zokernels._cuda_hopper import Wgmma
from zokernels._cuda_sparse import Sparse
from zokernels._late import Flags
from zokernels._native import DISTRIBUTION, remembered, written
from zokernels.noise import matrix_shape

# Tokens a branch up to which a product draws its noise once and multiplies in registers. Above it
# the noise would be drawn again for every 64 tokens, and a tile in scratch is multiplied by the
# vendor's product instead. From instruction counts (csrc/cuda/linear.cu, linear_transposed.cu); not
# measured.
FUSED_TOKENS = 64
# The same for float32 weights, by plain fma (csrc/cuda/linear_few.cu).
FEW_TOKENS = 8
# Displaced weights of all branches that a scratch tile holds: a fraction of a current GPU's cache.
TILE_BYTES = 16 << 20
# Logits of all branches that exist at once.
LOGIT_BYTES = 64 << 20
# Seeds a pass of `project` takes: bounds the scratch for partial sums.
PROJECT_SEEDS = 256


def _matrix(t: Tensor) -> Tensor | None:
    """``t`` as a tensor whose rows have one stride, sharing its memory, or None."""
    if t.dim() <= 2 or t.is_contiguous():
        return t
    try:
        return t.detach().view(matrix_shape(t.shape))
    except RuntimeError:
        return None


def tile_outputs(
    fan_in: int, fan_out: int, branches: int, itemsize: int, target: int = TILE_BYTES
) -> int:
    """Outputs a scratch tile of a product holds: a multiple of 256, or all."""
    step = max(1, target // (branches * fan_in * itemsize))
    return min(fan_out, (step + 255) // 256 * 256)


def _whole_runs(w: Tensor, col_offset: int) -> bool:
    """Whether the rows of a weight are whole, aligned runs of sixteen bytes, and begin a group."""
    run = 16 // w.element_size()
    return (
        w.shape[1] > 0
        and w.shape[1] % run == 0
        and w.stride(1) == 1
        and (w.shape[0] == 1 or w.stride(0) % run == 0)
        and w.data_ptr() % 16 == 0
        and col_offset % 256 == 0
    )


def _lead(x: Tensor, shared: bool) -> tuple[int, ...]:
    return tuple(x.shape if shared else x.shape[1:])


class Native:
    """The ops over one native namespace.

    Args:
        ops: the namespace with the native functions.
        stream: the raw stream to launch on, for a device.
        multiprocessors: of a device.
        capturing: whether a CUDA graph is being recorded: then no value may be read on the host,
            and lists of indices go unchecked.
        wgmma_tokens: tokens a branch up to which a device multiplies by wgmma; 0: it has none.
    """

    def __init__(
        self,
        ops: Any,
        *,
        stream: Callable[[torch.device], int],
        multiprocessors: Callable[[torch.device], int],
        capturing: Callable[[], bool],
        wgmma_tokens: Callable[[torch.device], int] = lambda device: 0,
    ) -> None:
        self._displace = ops.displace_.default
        self._chunk_loss = ops.chunk_loss_.default
        self._update = ops.update_.default
        self._project_rows = ops.project_rows.default
        self._project = ops.project_.default
        self._displace_vectors = ops.displace_vectors_.default
        self._linear = ops.linear_.default
        self._linear_parts = remembered(ops.linear_parts.default)
        self._linear_transposed = ops.linear_transposed_.default
        self._linear_transposed_parts = remembered(ops.linear_transposed_parts.default)
        self._table_bytes = ops.table_bytes.default
        self._stream = stream
        self._multiprocessors = multiprocessors
        self.flags = Flags("ids or targets")
        self.wgmma = Wgmma(ops, stream=stream, multiprocessors=multiprocessors, limit=wgmma_tokens)
        self._sparse = Sparse(
            ops,
            values=self._vectors,
            embedding=self.embedding,
            table=self._table,
            stream=stream,
            capturing=capturing,
        )

    def sample(
        self,
        rows: int,
        cols: int,
        seed: Tensor,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
    ) -> Tensor:
        out = torch.empty((rows, cols), dtype=torch.float32, device=seed.device)
        self._displace(
            out[None],
            None,
            seed.reshape(1),
            None,
            None,
            False,
            None,
            param_id,
            row_offset,
            col_offset,
            DISTRIBUTION[distribution],
            False,
            self._stream(out.device),
        )
        return out

    def displace_(
        self,
        out: Tensor,
        w: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
        rounding: str,
    ) -> None:
        adjacent = out.stride(2) == 1 or out.shape[2] == 1
        dense = out if adjacent else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        self._displace(
            dense,
            w,
            seeds.contiguous(),
            coeffs.contiguous(),
            None,
            False,
            None,
            param_id,
            row_offset,
            col_offset,
            DISTRIBUTION[distribution],
            rounding == "stochastic",
            self._stream(out.device),
        )
        if dense is out:
            written([out])
        else:
            out.copy_(dense)

    def displace(
        self,
        w: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
        rounding: str,
        dtype: torch.dtype | None,
    ) -> Tensor:
        shape = (coeffs.shape[0], *w.shape)
        out = torch.empty(shape, dtype=dtype or w.dtype, device=w.device)
        self.displace_(
            out, w, seeds, coeffs, param_id, row_offset, col_offset, distribution, rounding
        )
        return out

    def _table(self, count: int, device: torch.device) -> Tensor:
        return torch.empty(self._table_bytes(count), dtype=torch.uint8, device=device)

    def update_(
        self,
        params: list[Tensor],
        seeds: Tensor,
        coeffs: Tensor,
        decay: Tensor | None,
        ends: Tensor | None,
        param_ids: list[int],
        row_offsets: list[int],
        col_offsets: list[int],
        distribution: str,
        rounding: str,
    ) -> None:
        # A layout whose rows have no single stride is updated in a copy.
        views = [_matrix(p) for p in params]
        flat = [
            p.detach().reshape(matrix_shape(p.shape)) if v is None else v
            for p, v in zip(params, views, strict=True)
        ]
        device = params[0].device
        self._update(
            flat,
            seeds.contiguous(),
            coeffs.contiguous(),
            None if decay is None else decay.contiguous(),
            None if ends is None else ends.contiguous(),
            param_ids,
            row_offsets,
            col_offsets,
            DISTRIBUTION[distribution],
            rounding == "stochastic",
            self._table(len(params), device),
            self._stream(device),
        )
        for param, view, copy in zip(params, views, flat, strict=True):
            if view is None:
                param.detach().copy_(copy.view(param.shape))
        written(params)

    def project(
        self,
        vectors: list[Tensor],
        seeds: Tensor,
        param_ids: list[int],
        row_offsets: list[int],
        col_offsets: list[int],
        distribution: str,
    ) -> Tensor:
        flat = [v if _matrix(v) is not None else v.contiguous() for v in vectors]
        flat = [
            v.detach() if v.dim() <= 2 else v.detach().view(matrix_shape(v.shape)) for v in flat
        ]
        out = torch.zeros(seeds.shape, dtype=torch.float32, device=seeds.device)
        rows = self._project_rows(flat, col_offsets)
        seeds = seeds.contiguous()
        for start in range(0, seeds.numel(), PROJECT_SEEDS):
            some = seeds[start : start + PROJECT_SEEDS]
            partial = torch.empty((rows, some.numel()), dtype=torch.float64, device=out.device)
            self._project(
                out[start : start + PROJECT_SEEDS],
                flat,
                some,
                param_ids,
                row_offsets,
                col_offsets,
                DISTRIBUTION[distribution],
                self._table(len(flat), out.device),
                partial,
                self._stream(out.device),
            )
        return out

    def _vectors(
        self,
        tensors: list[Tensor],
        indices: list[Tensor],
        shadows: list[Tensor],
        seeds: Tensor,
        coeffs: Tensor,
        param_ids: list[int],
        offset: int,
        distribution: str,
        less_held: bool = False,
    ) -> Tensor:
        lengths = [t.numel() for t in (indices or tensors)]
        size = coeffs.shape[0] * sum(lengths)
        out = torch.empty(size, dtype=torch.float32, device=seeds.device)
        self._displace_vectors(
            out,
            tensors,
            indices,
            shadows,
            seeds.contiguous(),
            coeffs.contiguous(),
            param_ids,
            offset,
            DISTRIBUTION[distribution],
            less_held,
            self._table(len(tensors), out.device),
            self._stream(out.device),
        )
        return out

    def displace_vectors(
        self,
        vectors: list[Tensor],
        seeds: Tensor,
        coeffs: Tensor,
        param_ids: list[int],
        distribution: str,
    ) -> Tensor:
        dense = [v.detach().contiguous() for v in vectors]
        return self._vectors(dense, [], [], seeds, coeffs, param_ids, 0, distribution)

    def takes_fused(
        self, x: Tensor, w: Tensor, tokens: int, col_offset: int, transposed: bool
    ) -> bool:
        """Whether the fused product serves a call: 16-bit weights in aligned rows, few tokens."""
        return (
            w.dtype != torch.float32
            and 0 < tokens <= FUSED_TOKENS
            and x.data_ptr() % 16 == 0
            and (not transposed or w.shape[0] % 8 == 0)
            and _whole_runs(w, col_offset)
        )

    def takes_few(
        self, x: Tensor, w: Tensor, tokens: int, col_offset: int, transposed: bool
    ) -> bool:
        """Whether the product of a few tokens serves a call: float32 weights in aligned rows."""
        return (
            w.dtype == torch.float32
            and 0 < tokens <= FEW_TOKENS
            and x.data_ptr() % 16 == 0
            and (not transposed or w.shape[0] % 4 == 0)
            and _whole_runs(w, col_offset)
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
        transposed: bool,
    ) -> Tensor:
        branches = coeffs.shape[0]
        lead = _lead(x, shared)[:-1]
        fan_in, fan_out = (w.shape[0], w.shape[1]) if transposed else (w.shape[1], w.shape[0])
        x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
        x = x.contiguous().view(1 if shared else branches, -1, fan_in) if x.numel() else x
        tokens = x.shape[1] if x.numel() else 0
        place = (param_id, row_offset, col_offset, distribution)
        if x.numel() == 0 or fan_out == 0:
            y = torch.zeros((branches, *lead, fan_out), dtype=w.dtype, device=w.device)
            return y if bias is None else y + bias.to(w.dtype).view(branches, *[1] * len(lead), -1)
        call = (x, w, tokens, col_offset, transposed)
        if self.takes_fused(*call) or self.takes_few(*call):
            y = self._fused(x, w, bias, seeds, coeffs, *place, shared, transposed, None)
        elif (
            not transposed
            and self.takes_fused(x, w, 1, col_offset, False)
            and self.wgmma.takes(x, w, tokens)
        ):
            y = self.wgmma.linear(x, w, bias, seeds, coeffs, *place, shared)
        else:
            y = self._tiles(x, w, bias, seeds, coeffs, *place, transposed)
        return y.view(branches, *lead, fan_out)

    def _fused(
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
        transposed: bool,
        pending: tuple[Tensor, Tensor, Tensor | None, str] | None,
    ) -> Tensor:
        branches, tokens, processors = coeffs.shape[0], x.shape[1], self._multiprocessors(w.device)
        outputs, wide = w.shape[1 if transposed else 0], w.dtype == torch.float32
        y = torch.empty((branches, tokens, outputs), dtype=w.dtype, device=w.device)
        parts_of = self._linear_transposed_parts if transposed else self._linear_parts
        parts = parts_of(*w.shape, tokens, branches, not wide, processors)
        partial = None
        if parts > 1:
            partial = torch.empty((parts, *y.shape), dtype=torch.float32, device=w.device)
        bias = None if bias is None else bias.contiguous()
        operands = (y, x, w, bias, seeds.contiguous(), coeffs.contiguous(), partial)
        place = (param_id, row_offset, col_offset, DISTRIBUTION[distribution], shared)
        machine = (processors, self._stream(w.device))
        if transposed:
            self._linear_transposed(*operands, *place, *machine)
        else:
            last = (None, None, None) if pending is None else pending[:3]
            terms = [None if t is None else t.contiguous() for t in last]
            stochastic = pending is not None and pending[3] == "stochastic"
            self._linear(*operands, *terms, stochastic, *place, *machine)
        return y

    def _tiles(
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
        transposed: bool,
    ) -> Tensor:
        """Displace a tile of outputs for all branches into scratch, and multiply it."""
        branches = coeffs.shape[0]
        fan_in, fan_out = (w.shape[0], w.shape[1]) if transposed else (w.shape[1], w.shape[0])
        step = tile_outputs(fan_in, fan_out, branches, w.element_size(), TILE_BYTES)
        shape = (fan_in, step) if transposed else (step, fan_in)
        scratch = torch.empty((branches, *shape), dtype=w.dtype, device=w.device)
        y = torch.empty((branches, x.shape[1], fan_out), dtype=w.dtype, device=w.device)
        x = x.expand(branches, *x.shape[1:])
        for start in range(0, fan_out, step):
            stop = min(fan_out, start + step)
            if transposed:
                tile, part = scratch[:, :, : stop - start], w[:, start:stop]
                place = (param_id, row_offset, col_offset + start)
            else:
                tile, part = scratch[:, : stop - start], w[start:stop]
                place = (param_id, row_offset + start, col_offset)
            self.displace_(tile, part, seeds, coeffs, *place, distribution, "nearest")
            factor = tile if transposed else tile.transpose(1, 2)
            torch.bmm(x, factor, out=y[:, :, start:stop])
        if bias is not None:
            y += bias[:, None]
        return y

    def takes_update(
        self, x: Tensor, w: Tensor, coeffs: Tensor, shared: bool, distribution: str
    ) -> bool:
        """Whether :meth:`update_linear_` of a whole weight is one pass over it."""
        tokens = (x.shape[:-1] if shared else x.shape[1:-1]).numel()
        return coeffs.shape[0] <= 2 and self.takes_fused(x, w, tokens, 0, False)

    def update_linear_(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        seeds: Tensor,
        coeffs: Tensor,
        pending_seeds: Tensor,
        pending_coeffs: Tensor,
        pending_decay: Tensor | None,
        rounding: str,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
        shared: bool,
    ) -> Tensor:
        """``update_`` of ``w`` by pending terms, then ``linear``: in one pass over ``w`` where the
        fused product takes the call with one pair of branches. The same numbers either way.
        """
        branches = coeffs.shape[0]
        tokens = x.numel() // x.shape[-1] // (1 if shared else branches) if x.numel() else 0
        dense = x.detach().contiguous()
        if branches <= 2 and self.takes_fused(dense, w, tokens, col_offset, False):
            y = self._fused(
                dense.view(1 if shared else branches, tokens, w.shape[1]),
                w.detach(),
                bias,
                seeds,
                coeffs,
                param_id,
                row_offset,
                col_offset,
                distribution,
                shared,
                False,
                (pending_seeds, pending_coeffs, pending_decay, rounding),
            )
            written([w])
            return y.view(branches, *_lead(x, shared)[:-1], w.shape[0])
        self.update_(
            [w],
            pending_seeds,
            pending_coeffs,
            pending_decay,
            None,
            [param_id],
            [row_offset],
            [col_offset],
            distribution,
            rounding,
        )
        return self.linear(
            x,
            w,
            bias,
            seeds,
            coeffs,
            param_id,
            row_offset,
            col_offset,
            distribution,
            shared,
            False,
        )

    def embedding(
        self,
        ids: Tensor,
        w: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
        shared: bool,
    ) -> Tensor:
        self.flags.look(w.device)
        if w.shape[0] == 0 and ids.numel():
            raise IndexError("ids must be in [0, 0): w has no rows")
        branches, lead = coeffs.shape[0], _lead(ids, shared)
        tokens = ids.numel() if shared else ids[0].numel()
        out = torch.empty((branches, tokens, w.shape[1]), dtype=w.dtype, device=w.device)
        self._displace(
            out,
            w.detach(),
            seeds.contiguous(),
            coeffs.contiguous(),
            ids.contiguous(),
            not shared,
            self.flags.of(w.device),
            param_id,
            row_offset,
            col_offset,
            DISTRIBUTION[distribution],
            False,
            self._stream(w.device),
        )
        if w.device.type == "cpu":
            self.flags.look(w.device, "ids")
        return out.view(branches, *lead, w.shape[1])

    def linear_cross_entropy(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        param_id: int,
        row_offset: int,
        col_offset: int,
        distribution: str,
        shared: bool,
        ignore_index: int,
    ) -> Tensor:
        device = w.device
        self.flags.look(device)
        branches, vocab, tokens = coeffs.shape[0], w.shape[0], targets.numel()
        targets, flag = targets.contiguous(), self.flags.of(device)
        state = torch.empty((2, branches, tokens), dtype=torch.float32, device=device)
        losses = torch.empty((branches, tokens), dtype=torch.float32, device=device)
        chunk = LOGIT_BYTES // max(1, w.element_size() * branches * tokens)
        step = max(256, chunk // 256 * 256)
        for start in range(0, max(1, vocab), step):
            stop = min(vocab, start + step)
            logits = self.linear(
                x,
                w[start:stop],
                None if bias is None else bias[:, start:stop],
                seeds,
                coeffs,
                param_id,
                row_offset + start,
                col_offset,
                distribution,
                shared,
                False,
            )  # [G, N, chunk]
            self._chunk_loss(
                logits,
                targets,
                state,
                losses,
                flag,
                start,
                vocab,
                ignore_index,
                self._stream(device),
            )
        if device.type == "cpu":
            self.flags.look(device, f"targets other than ignore_index={ignore_index}")
        return losses.sum(-1) / (targets != ignore_index).sum()

    def kernels(self) -> dict[str, Callable[..., object]]:
        """Op name -> function with the op's positional signature."""
        return {
            "sample": self.sample,
            "displace": self.displace,
            "displace_": self.displace_,
            "update_": self.update_,
            "project": self.project,
            "linear": self.linear,
            "update_linear_": self.update_linear_,
            "embedding": self.embedding,
            "linear_cross_entropy": self.linear_cross_entropy,
            "displace_vectors": self.displace_vectors,
            **self._sparse.kernels(),
        }
