"""How a product with displaced weights is computed, and what it costs.

Plans, all giving the same numbers:

``fused``
    Few tokens: some rows are displaced for all branches into the first cache and multiplied there;
    no displaced weight reaches memory (CPU with AVX2 or AVX-512).
``tiles``
    A tile of output rows is displaced for all branches into scratch that stays in the cache, and
    the vendor's matrix product multiplies it (CPU; measurements in ``csrc/README.md``).
On a GPU (Triton): ``fused`` draws the noise inside the matrix product and splits it over programs,
``tiles`` displaces as many outputs as fit half of the second-level cache and calls cuBLAS; the
choice is a model's (:mod:`zokernels.triton.plan`) with data per architecture. The CUDA backend
fuses up to 64 tokens a branch in 16 bits, up to 8 in float32, and has scratch tiles of 16 MiB.

``whole``
    The displaced weight of one branch at a time, whole, and torch's product: the reference backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zokernels import _registry
from zokernels._cuda_ops import FEW_TOKENS, FUSED_TOKENS, tile_outputs
from zokernels.triton.devices import architecture, of_device, tf32_allowed
from zokernels.triton.plan import plan


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """The plan of one product ``[G, tokens, fan_in] x [fan_in, fan_out]``.

    Attributes:
        kind: ``"fused"``, ``"tiles"`` or ``"whole"``.
        tile_outputs: outputs (rows of the weight, columns of a transposed one) a tile holds.
        tiles: number of tiles; token_blocks: blocks of tokens that draw a tile's noise again.
        scratch_bytes: displaced weights that exist at once, on all threads.
        weight_bytes: bytes of weights read; flops: 2 G tokens fan_in fan_out; noise: values drawn.
        instructions: of one thread, for the noise; seconds: by the model (GPU plans only).
    """

    kind: str
    tile_outputs: int
    tiles: int
    token_blocks: int
    scratch_bytes: int
    weight_bytes: int
    flops: int
    noise: int
    instructions: int | None = None
    seconds: float | None = None


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
    distribution: str = "gaussian",
) -> LinearPlan:
    """The plan that the serving backend follows for a weight ``[rows, cols]``.

    Args:
        rows, cols: the stored weight; ``[in, out]`` when ``transposed``.
        tokens: rows of the activations of one branch.
        branches: G; terms: K, seeds of the displacement.
        dtype: of weights and activations.
        device: device type, or a GPU architecture such as ``"sm_90"``, present or not.
        transposed: GPT-2's Conv1D layout.
        threads: torch's thread count when None.
        distribution: of the noise; GPU plans depend on it.

    Raises:
        ValueError: a size is not positive, an architecture is older than sm_80.
    """
    for name, value in (("rows", rows), ("cols", cols), ("tokens", tokens), ("branches", branches)):
        if value < 1:
            raise ValueError(f"{name} must be positive; got {value}")
    size = dtype.itemsize
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    if device.startswith("sm_") or _registry.serving("linear", device) == "triton":
        return _gpu_plan(
            rows, cols, tokens, branches, terms, size, device, transposed, distribution
        )
    kind, outputs, tiles, blocks, held = "whole", fan_out, 1, 1, rows * cols * size
    serving = _registry.serving("linear", device)
    if serving == "cuda":
        # Two branches from one draw, in every plan.
        blocks = -(-branches // 2)
        most = FEW_TOKENS if dtype == torch.float32 else FUSED_TOKENS
        whole_runs = cols * size % 16 == 0 and (not transposed or rows * size % 16 == 0)
        if whole_runs and tokens <= most:
            kind, held = "fused", 0
        else:
            kind, outputs = "tiles", tile_outputs(fan_in, fan_out, branches, size)
            tiles, held = -(-fan_out // outputs), branches * outputs * fan_in * size
    if serving == "cpp":
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


def _gpu_plan(
    rows: int,
    cols: int,
    tokens: int,
    branches: int,
    terms: int,
    itemsize: int,
    device: str,
    transposed: bool,
    distribution: str,
) -> LinearPlan:
    found = plan(
        rows,
        cols,
        tokens=tokens,
        branches=branches,
        terms=terms,
        itemsize=itemsize,
        architecture=architecture(device) if device.startswith("sm_") else of_device(device),
        distribution=distribution,
        transposed=transposed,
        tf32=tf32_allowed(),
    )
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    outputs = min(fan_out, (256 if transposed else found.tiles.outputs))
    held = 4 * found.splits * branches * tokens * fan_out if found.splits > 1 else 0
    if not found.fused:
        outputs = found.chunk
        held = branches * outputs * fan_in * itemsize
    return LinearPlan(
        kind="fused" if found.fused else "tiles",
        tile_outputs=outputs,
        tiles=-(-fan_out // outputs),
        token_blocks=found.row_blocks,
        scratch_bytes=held,
        weight_bytes=rows * cols * itemsize * found.row_blocks,
        flops=2 * branches * tokens * rows * cols,
        noise=found.noise,
        instructions=found.instructions,
        seconds=found.seconds,
    )
