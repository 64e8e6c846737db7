"""How the Triton backend computes a product: fused, or tiles for cuBLAS, and with which tiles.

A plan depends on shapes and on an :class:`~zokernels.triton.devices.Architecture`: it can be asked
for a device that is not there. The model is the simplest that has a crossover::

    fused  max(weight bytes / bandwidth,  noise instructions / rate)  +  2 products on stacked rows
           where noise is drawn again for every tile of stacked rows
    tiles  the same noise once, (1 + 2 G) weights moved (the second half through the cache)
           +  1 product on stacked rows at the vendor's rate
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from zokernels.triton.devices import MIB, Architecture

# Instructions a value of noise, counted in the machine code of the generator alone (README.md).
NOISE_INSTRUCTIONS = {"gaussian": 24, "rademacher": 6}
# Everything else a displaced weight costs: loads, conversions, addresses.
_OTHER_INSTRUCTIONS = 6
# What a fused product reaches of the matrix units' rate, and what the vendor's does.
_FUSED_RATE, _VENDOR_RATE = 0.35, 0.75
# Between two kernels of a stream.
_LAUNCH = 2e-6
# A partial sum is written and read; more splits than this cost more than they fill.
_MOST_SPLITS = 16
# CUDA's limit along the second and the third axis of a grid.
MOST_PROGRAMS = 65535


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of a fused kernel: outputs, stacked rows, columns of 64 at once; warps, stages."""

    outputs: int
    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One product.

    Attributes:
        fused: or displaced tiles and the vendor's product.
        tiles: of the fused kernel.
        splits: programs that share an output tile (fused).
        chunk: weight rows displaced at once (tiles).
        row_blocks: tiles of stacked rows, each of which draws the noise again (fused).
        seconds: by the model; noise: values drawn; instructions: for them; moved: bytes.
    """

    fused: bool
    tiles: Tiles
    splits: int
    chunk: int
    row_blocks: int
    seconds: float
    noise: int
    instructions: int
    moved: int


def fused_tiles(stacked: int, itemsize: int, transposed: bool) -> list[Tiles]:
    """Tiles for a number of stacked rows, the preferred first and then ever smaller ones.

    Chosen by registers, spills and shared memory of the compiled kernels (README.md): sixteen
    counters at once leave room for several blocks on a multiprocessor.
    """
    least = Tiles(64, 16, 16, 4, 1)
    if transposed:
        wide = Tiles(64, 32, 32, 8, 3) if itemsize == 2 else Tiles(64, 16, 16, 4, 2)
        return [wide, least] if stacked > 16 else [Tiles(64, 16, 16, 4, 2), least]
    if stacked <= 32 or itemsize == 4:
        return [Tiles(64, 32, 16, 4, 3 if itemsize == 2 else 2), least]
    # Twice as many outputs as rows: then a warp owns rows of the weight and no noise is shared.
    return [Tiles(128, 64, 16, 8, 3), Tiles(64, 32, 16, 4, 2), least]


def updating_tiles(tiles: Tiles) -> Tiles:
    """Tiles of a product that updates its weights on the way.

    A prefetched weight goes through registers here; with a third stage they are spilled.
    """
    return replace(tiles, stages=min(tiles.stages, 2))


def plan(
    rows: int,
    cols: int,
    *,
    tokens: int,
    branches: int,
    terms: int,
    itemsize: int,
    architecture: Architecture,
    distribution: str = "gaussian",
    shared: bool = False,
    transposed: bool = False,
    tf32: bool = False,
    scratch: int | None = None,
) -> Plan:
    """The plan of a product with a stored weight ``[rows, cols]``.

    Args:
        rows, cols: of the weight; tokens: rows of activations a branch; branches: G; terms: K.
        itemsize: bytes of an element; architecture: of the GPU; distribution: of the noise.
        shared: activations without a branch dimension; transposed: stored ``[in, out]``.
        tf32: float32 products may round to TF32: the matrix units have no other float32, so without
            it float32 weights are displaced for the vendor's product.
        scratch: bytes for displaced tiles; None: half of the second-level cache, 16 MiB at least.
    """
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    weights = max(rows * cols, 1)
    stacked = max(tokens * (1 if shared and terms == 1 else branches), 1)
    each = NOISE_INSTRUCTIONS[distribution]
    rate = architecture.matrix16 if itemsize == 2 else architecture.matrix32
    size = weights * itemsize

    tiles = fused_tiles(stacked, itemsize, transposed)[0]
    blocks = -(-stacked // tiles.rows)
    output_tiles = -(-fan_out // (256 if transposed else tiles.outputs))
    steps = -(-fan_in // (tiles.columns if transposed else 256))
    wanted = -(-2 * architecture.multiprocessors // max(output_tiles * blocks, 1))
    splits = max(1, min(wanted, steps, _MOST_SPLITS))
    fused_noise = weights * terms * blocks
    fused_instructions = fused_noise * each
    results = 2 * 4 * splits * tokens * branches * fan_out if splits > 1 else 0
    moved = size + results
    fused_seconds = max(
        moved / architecture.bandwidth,
        (fused_instructions + weights * blocks * _OTHER_INSTRUCTIONS) / architecture.instructions,
    ) + 2 * stacked * weights * (1 + terms) / (rate * _FUSED_RATE)
    fused_seconds += _LAUNCH * (1 if splits == 1 else 2)

    limit = scratch if scratch is not None else max(16 * MIB, architecture.cache // 2)
    line = (rows if transposed else cols) * itemsize * branches
    chunk = min(fan_out, max(256, limit // max(line, 1)))
    tile_instructions = weights * terms * each
    tile_seconds = max(
        size * (1 + branches) / architecture.bandwidth,
        (tile_instructions + weights * (1 + branches) * _OTHER_INSTRUCTIONS)
        / architecture.instructions,
    ) + max(
        2 * tokens * branches * weights / (rate * _VENDOR_RATE),
        size * branches / (3 * architecture.bandwidth),
    )
    tile_seconds += _LAUNCH * (1 + branches) * -(-fan_out // chunk)

    fused = fused_seconds <= tile_seconds
    if architecture.crossover is not None:
        fused = stacked <= architecture.crossover
    fused = fused and (itemsize == 2 or tf32) and blocks <= MOST_PROGRAMS
    return Plan(
        fused=fused,
        tiles=tiles,
        splits=splits if fused else 1,
        chunk=fan_out if fused else chunk,
        row_blocks=blocks if fused else 1,
        seconds=fused_seconds if fused else tile_seconds,
        noise=fused_noise if fused else weights * terms,
        instructions=fused_instructions if fused else tile_instructions,
        moved=moved if fused else size * (1 + 2 * branches),
    )
