"""Cross-entropy from statistics of pieces of the vocabulary: the end of ``linear_cross_entropy``.

    loss[g] = mean over kept tokens t of  log sum_v exp(logit[g, t, v]) - logit[g, t, target_t]

The fused product leaves (maximum, sum of exponentials, target's logit) of every tile of the
vocabulary; ``logits_kernel`` computes the same from a chunk of logits that cuBLAS wrote. Both are
joined in order by ``join_kernel``, so the loss does not depend on which program finished first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zokernels.triton.noise import number, wide

# What the code is no better for knowing: every batch and model would compile it again.
_FREE = "targets rows tokens vocab".split()


@triton.jit(do_not_specialize=[*_FREE, "bias", "chunk", "chunks", "start"])
def logits_kernel(
    statistics,  # float32 [3, chunks, rows]
    logits,  # [rows, width]; columns beyond the vocabulary do not count
    bias,  # [G, vocabulary] or nothing
    targets,
    chunk,
    chunks,
    start,  # first vocabulary entry of the chunk
    width,
    rows,
    tokens,
    vocab,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program a row of a chunk: online maximum and sum over blocks of the chunk."""
    row = tl.program_id(0).to(tl.int64)
    branch = row // tokens
    target = tl.load(targets + row % tokens) - start
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        v = first + i
        x = wide(tl.load(logits + row * width + v, mask=v < width, other=0.0))
        inside = (v < width) & (start + v < vocab)
        if BIAS:
            x += wide(tl.load(bias + branch * vocab + start + v, mask=inside, other=0.0))
        x = tl.where(inside, x, float("-inf"))
        nan = x != x
        broken = broken | nan.to(tl.int32)
        x = tl.where(nan, float("-inf"), x)
        new = tl.maximum(top, x)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = new
        picked += tl.where(v == target, x, 0.0)
    best = tl.max(top, axis=0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(total * tl.exp(top - shift), axis=0)
    best = tl.where(tl.max(broken, axis=0) != 0, float("nan"), best)
    place = statistics + number(chunk, tl.int64) * rows + row
    tl.store(place, best)
    tl.store(place + number(chunks, tl.int64) * rows, total)
    tl.store(place + 2 * number(chunks, tl.int64) * rows, tl.sum(picked, axis=0))


@triton.jit(do_not_specialize=[*_FREE, "pieces", "ignore_index"])
def join_kernel(
    losses,  # float32 [rows]
    statistics,  # float32 [3, pieces, rows]
    targets,
    flag,
    pieces,
    rows,
    tokens,
    vocab,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Losses of BLOCK rows; 0 where the target is ignored, NaN and a flag where it is no entry."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    broken = row < 0
    step = number(pieces, tl.int64) * rows
    for piece in range(pieces):
        place = statistics + number(piece, tl.int64) * rows + row
        best = tl.load(place, mask=inside, other=0.0)
        part = tl.load(place + step, mask=inside, other=0.0)
        picked += tl.load(place + 2 * step, mask=inside, other=0.0)
        broken = broken | (best != best)
        new = tl.maximum(top, tl.where(best != best, float("-inf"), best))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + part * tl.exp(best - shift)
        top = new
    target = tl.load(targets + row % tokens, mask=inside, other=0)
    bad = inside & (target != ignore_index) & ((target < 0) | (target >= vocab))
    tl.store(flag + tl.zeros_like(row), target, mask=bad)
    tl.store(flag + 1 + tl.zeros_like(row), vocab + tl.zeros_like(row), mask=bad)
    loss = top + tl.log(total) - picked
    loss = tl.where(broken | bad, float("nan"), loss)
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, loss), mask=inside)
