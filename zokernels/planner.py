"""How a product with displaced weights is computed, and what it costs.

Plans, all giving the same numbers:

``fused``
    Few tokens: some rows are displaced for all branches into the first cache and multiplied there;
    no displaced weight reaches memory (CPU with AVX2 or AVX-512).
``tiles``
    A tile of output rows is displaced for all branches into scratch that stays in the cache, and
    the vendor's matrix product multiplies it (CPU; measurements in ``csrc/README.md``).
``whole``
    The displaced weight of one branch at a time, whole, and torch's product: the reference backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zokernels import _registry


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """The plan of one product ``[G, tokens, fan_in] x [fan_in, fan_out]``.

    Attributes:
        kind: ``"fused"``, ``"tiles"`` or ``"whole"``.
        tile_outputs: outputs (rows of the weight, columns of a transposed one) a tile holds.
        tiles: number of tiles; token_blocks: blocks of tokens that draw a tile's noise again.
        scratch_bytes: displaced weights that exist at once, on all threads.
        weight_bytes: bytes of weights read; flops: 2 G tokens fan_in fan_out; noise: values drawn.
    """

    kind: str
    tile_outputs: int
    tiles: int
    token_blocks: int
    scratch_bytes: int
    weight_bytes: int
    flops: int
    noise: int


def plan_linear(
    rows: int,
    cols: int,
    *,
    tokens: int,
    branches: int = 2,
    terms: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    transposed: bool = False,
    threads: int | None = None,
) -> LinearPlan:
    """The plan that the serving backend follows for a weight ``[rows, cols]``.

    Args:
        rows, cols: the stored weight; ``[in, out]`` when ``transposed``.
        tokens: rows of the activations of one branch.
        branches: G; terms: K, seeds of the displacement.
        dtype: of weights and activations.
        device: device type.
        transposed: GPT-2's Conv1D layout.
        threads: torch's thread count when None.

    Raises:
        ValueError: a size is not positive.
    """
    for name, value in (("rows", rows), ("cols", cols), ("tokens", tokens), ("branches", branches)):
        if value < 1:
            raise ValueError(f"{name} must be positive; got {value}")
    size = dtype.itemsize
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    kind, outputs, tiles, blocks, held = "whole", fan_out, 1, 1, rows * cols * size
    if _registry.serving("linear", device) == "cpp":
        from zokernels import cpp

        workers = threads or torch.get_num_threads()
        found = cpp.product_plan(fan_in, fan_out, tokens, branches, dtype, transposed, workers)
        kind = "fused" if found.fused else "tiles"
        outputs, tiles, blocks = found.outputs, found.tiles, found.token_blocks
        held = found.held_bytes * min(workers, tiles * blocks)
    again = branches if kind == "whole" else blocks
    return LinearPlan(
        kind=kind,
        tile_outputs=outputs,
        tiles=tiles,
        token_blocks=blocks,
        scratch_bytes=held,
        weight_bytes=rows * cols * size * again,
        flops=2 * branches * tokens * rows * cols,
        noise=rows * cols * terms * again,
    )
