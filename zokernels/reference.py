"""Every op in plain torch: the executable specification and the universal fallback.

Each function takes its op's positional arguments (:mod:`zokernels._ops`) and runs on any device
that has int64 and float64. Rows go in chunks so that the noise of a huge parameter is never held
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zokernels import noise

# Elements of noise drawn at once. The generator's int64 and float64 temporaries cost about 100
# bytes an element.
CHUNK = 1 << 18


def _row_chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(cols, 1))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` with one rounding to float32 (the product is exact in float64)."""
    return (a.double() * b.double() + c.double()).float()


def sample(
    rows: int,
    cols: int,
    seed: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
) -> Tensor:
    z = torch.empty((rows, cols), dtype=torch.float32, device=seed.device)
    for start, stop in _row_chunks(rows, cols):
        z[start:stop] = noise.direction(
            stop - start, cols, seed, param_id, row_offset + start, col_offset, distribution
        )
    return z


def displace_(
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
    rows, cols = w.shape
    for start, stop in _row_chunks(rows, cols):
        region = (stop - start, cols)
        place = (row_offset + start, col_offset)
        acc = w[start:stop].float().expand(coeffs.shape[0], *region)
        for k in range(seeds.numel()):
            z = noise.direction(*region, seeds[k], param_id, *place, distribution)
            acc = _fma(coeffs[:, k, None, None], z, acc)
        bits = None
        if rounding == "stochastic" and seeds.numel():
            bits = noise.rounding_bits(
                *region, seeds[0], param_id, noise.STREAM_PROBE_ROUNDING, *place
            )
        out[:, start:stop] = noise.round_to(acc, out.dtype, bits)


def displace(
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
    out = w.new_empty((coeffs.shape[0], *w.shape), dtype=dtype or w.dtype)
    displace_(out, w, seeds, coeffs, param_id, row_offset, col_offset, distribution, rounding)
    return out


def displace_vectors(
    vectors: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    param_ids: list[int],
    distribution: str,
) -> Tensor:
    """Every vector's ``[G, numel]`` in float32, one after the other in a flat tensor."""
    parts = [
        displace(v[None], seeds, coeffs, i, 0, 0, distribution, "nearest", torch.float32)
        for v, i in zip(vectors, param_ids, strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def update_(
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
    for i, param in enumerate(params):
        rows, cols = noise.matrix_shape(param.shape)
        row0 = row_offsets[i] if row_offsets else 0
        col0 = col_offsets[i] if col_offsets else 0
        result = torch.empty((rows, cols), dtype=param.dtype, device=param.device)
        flat = param.reshape(rows, cols)
        for start, stop in _row_chunks(rows, cols):
            region = (stop - start, cols)
            place = (row0 + start, col0)
            acc = flat[start:stop].float()
            for k in range(seeds.numel()):
                if float(coeffs[k]) or (decay is not None and float(decay[k]) != 1.0):
                    z = noise.direction(*region, seeds[k], param_ids[i], *place, distribution)
                    acc = _fma(coeffs[k], z, acc if decay is None else acc * decay[k])
                if ends is None or bool(ends[k]) or k == seeds.numel() - 1:
                    bits = None
                    if rounding == "stochastic" and param.dtype != torch.float32:
                        stream = noise.STREAM_UPDATE_ROUNDING
                        bits = noise.rounding_bits(*region, seeds[k], param_ids[i], stream, *place)
                    acc = noise.round_to(acc, param.dtype, bits).float()
            result[start:stop] = acc.to(param.dtype)
        param.copy_(result.reshape(param.shape))


def project(
    vectors: list[Tensor],
    seeds: Tensor,
    param_ids: list[int],
    row_offsets: list[int],
    col_offsets: list[int],
    distribution: str,
) -> Tensor:
    total = torch.zeros(seeds.shape, dtype=torch.float64, device=seeds.device)
    for i, vector in enumerate(vectors):
        rows, cols = noise.matrix_shape(vector.shape)
        row0 = row_offsets[i] if row_offsets else 0
        col0 = col_offsets[i] if col_offsets else 0
        flat = vector.reshape(rows, cols)
        for start, stop in _row_chunks(rows, cols):
            v = flat[start:stop].double()
            for k in range(seeds.numel()):
                z = noise.direction(
                    stop - start, cols, seeds[k], param_ids[i], row0 + start, col0, distribution
                )
                total[k] += (v * z.double()).sum()
    return total.float()


def linear(
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
    # One branch at a time: a single displaced copy of w exists at once.
    ys = []
    for g in range(coeffs.shape[0]):
        wg = displace(
            w,
            seeds,
            coeffs[g : g + 1],
            param_id,
            row_offset,
            col_offset,
            distribution,
            "nearest",
            None,
        )[0]
        y = F.linear(x if shared else x[g], wg.t() if transposed else wg)
        ys.append(y if bias is None else (y + bias[g]).to(y.dtype))
    return torch.stack(ys)


def update_linear_(
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
    place = ([param_id], [row_offset], [col_offset], distribution)
    update_([w], pending_seeds, pending_coeffs, pending_decay, None, *place, rounding)
    region = (param_id, row_offset, col_offset, distribution)
    return linear(x, w, bias, seeds, coeffs, *region, shared, False)


def embedding(
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
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= w.shape[0]):
        raise IndexError(
            f"ids must be in [0, {w.shape[0]}); got values from {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    branches = coeffs.shape[0]
    used, where = torch.unique(ids, return_inverse=True)
    rows = torch.empty((branches, used.numel(), w.shape[1]), dtype=w.dtype, device=w.device)
    for i, r in enumerate(used.tolist()):
        rows[:, i : i + 1] = displace(
            w[r : r + 1],
            seeds,
            coeffs,
            param_id,
            row_offset + r,
            col_offset,
            distribution,
            "nearest",
            None,
        )
    if shared:
        return rows[:, where]
    return torch.stack([rows[g][where[g]] for g in range(branches)])


def linear_cross_entropy(
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
    branches, vocab = coeffs.shape[0], w.shape[0]
    keep = targets != ignore_index
    if targets[keep].numel() and (
        int(targets[keep].min()) < 0 or int(targets[keep].max()) >= vocab
    ):
        raise IndexError(
            f"targets must be in [0, {vocab}) or ignore_index={ignore_index}; got values from "
            f"{int(targets[keep].min())} to {int(targets[keep].max())}"
        )
    tokens = targets.numel()
    top = torch.full((branches, tokens), -torch.inf, dtype=torch.float32, device=x.device)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    # Online logsumexp over chunks of the vocabulary.
    for start, stop in _row_chunks(vocab, max(w.shape[1], tokens)):
        part = None if bias is None else bias[:, start:stop]
        logits = linear(
            x,
            w[start:stop],
            part,
            seeds,
            coeffs,
            param_id,
            row_offset + start,
            col_offset,
            distribution,
            shared,
            False,
        ).float()  # [G, N, chunk]
        new_top = torch.maximum(top, logits.amax(-1))
        total = total * torch.exp(top - new_top) + torch.exp(logits - new_top[..., None]).sum(-1)
        top = new_top
        here = (targets >= start) & (targets < stop) & keep
        index = (targets - start).clamp(0, stop - start - 1).expand(branches, tokens)
        value = logits.gather(-1, index[..., None])[..., 0]
        picked = torch.where(here, value, picked)
    losses = torch.where(keep, top + total.log() - picked, 0.0)
    return losses.sum(-1) / keep.sum()


# --- under a mask ---------------------------------------------------------------------------------

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _masked_values(w: Tensor, indices: Tensor, shadow: Tensor) -> tuple[Tensor, Tensor]:
    """What w holds at the indices, and the float32 values that it stands for."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= w.numel()):
        raise IndexError(
            f"indices must be in [0, {w.numel()}); got values from {int(indices.min())} to "
            f"{int(indices.max())}"
        )
    stored = torch.take(w, indices)
    bits = _BITS[w.dtype]
    same = noise.round_to(shadow, w.dtype).view(bits) == stored.view(bits)
    return stored, torch.where(same, shadow, stored.float())


def scatter_(param: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write float32 values, rounded to nearest, at flat indices of a tensor of any strides."""
    rounded = values.to(param.dtype)
    if param.is_contiguous():
        param.view(-1)[indices] = rounded
    else:
        param[torch.unravel_index(indices, param.shape)] = rounded


def sparse_displace(
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
) -> Tensor:
    values = _masked_values(w, indices, shadow)[1]
    return displace(
        values[None], seeds, coeffs, param_id, 0, offset, distribution, "nearest", None
    )[:, 0]


def sparse_update_(
    params: list[Tensor],
    indices: list[Tensor],
    shadows: list[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decay: Tensor | None,
    param_ids: list[int],
    distribution: str,
) -> None:
    every = [_masked_values(*parts)[1] for parts in zip(params, indices, shadows, strict=True)]
    update_(every, seeds, coeffs, decay, None, param_ids, [], [], distribution, "nearest")
    for param, index, shadow, values in zip(params, indices, shadows, every, strict=True):
        shadow.copy_(values)
        scatter_(param, index, values)


def sparse_linear(
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
    branches = coeffs.shape[0]
    y = F.linear(x, w.t() if transposed else w, bias if bias is None or bias.dim() == 1 else None)
    y = y.expand(branches, *y.shape) if shared else y
    stored = _masked_values(w, indices, shadow)[0].float()
    moved = sparse_displace(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
    difference = moved - stored  # [G, n]
    row, col = indices // w.shape[1], indices % w.shape[1]
    source, target = (row, col) if transposed else (col, row)
    flat_x = x.reshape(*(() if shared else (branches,)), -1, x.shape[-1])
    out = y.float().reshape(branches, -1, y.shape[-1]).clone()
    tokens = max(1, CHUNK // max(indices.numel(), 1))
    for g in range(branches):
        xg = flat_x if shared else flat_x[g]
        for start in range(0, xg.shape[0], tokens):
            part = xg[start : start + tokens][:, source].float() * difference[g]
            out[g, start : start + tokens].index_add_(1, target, part)
        if bias is not None and bias.dim() == 2:
            out[g] += bias[g].float()
    return out.to(w.dtype).reshape(y.shape)


def sparse_embedding(
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
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= w.shape[0]):
        raise IndexError(
            f"ids must be in [0, {w.shape[0]}); got values from {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    branches, cols = coeffs.shape[0], w.shape[1]
    moved = sparse_displace(w, indices, shadow, seeds, coeffs, param_id, offset, distribution)
    moved = moved.to(w.dtype)
    rows = w[ids]
    out = rows.expand(branches, *rows.shape) if shared else rows
    out = out.clone(memory_format=torch.contiguous_format)
    flat = out.reshape(branches, -1, cols)
    for g in range(branches):
        looked_up = (ids if shared else ids[g]).reshape(-1).to(torch.int64)
        # The entries of a looked-up row are neighbours in the sorted list.
        first = torch.searchsorted(indices, looked_up * cols)
        count = torch.searchsorted(indices, (looked_up + 1) * cols) - first
        token = torch.repeat_interleave(count)
        within = torch.arange(token.numel(), device=ids.device) - (count.cumsum(0) - count)[token]
        entry = first[token] + within
        flat[g, token, indices[entry] % cols] = moved[g, entry]
    return out


KERNELS: dict[str, Callable[..., object]] = {
    "sample": sample,
    "displace": displace,
    "displace_": displace_,
    "displace_vectors": displace_vectors,
    "update_": update_,
    "project": project,
    "linear": linear,
    "update_linear_": update_linear_,
    "embedding": embedding,
    "linear_cross_entropy": linear_cross_entropy,
    "sparse_displace": sparse_displace,
    "sparse_update_": sparse_update_,
    "sparse_linear": sparse_linear,
    "sparse_embedding": sparse_embedding,
}
