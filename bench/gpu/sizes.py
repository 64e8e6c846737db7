"""How large everything is: what fills a GPU, and what a rehearsal gets by with."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Shapes of what is timed.

    Attributes:
        copy: bytes copied for the bandwidth; square: n of the product for cuBLAS's rate;
        draws: values of the bare generator.
        whole: the weight of an update pass; part: of replay, displace and project.
        replayed: seeds of a replay.
        products: weights of products; tokens: a branch, many; few: few.
        head: vocabulary and width; looked_up: rows of an embedding; scored: tokens of a loss.
        masked: the weight under a mask; density: of the mask.
        listed: model whose list of parameters is updated in one call.
        models, batches: of the steps; wanted: those that come first; masked_models: those that
        are stepped under a mask as well.
    """

    copy: int
    square: int
    draws: int
    whole: Shape
    part: Shape
    replayed: int
    products: tuple[Shape, ...]
    tokens: tuple[int, ...]
    few: tuple[int, ...]
    head: Shape
    looked_up: int
    scored: tuple[int, ...]
    masked: Shape
    density: float
    listed: str
    models: tuple[str, ...]
    batches: tuple[Shape, ...]
    wanted: tuple[tuple[str, Shape], ...]
    masked_models: tuple[str, ...]


FULL = Sizes(
    copy=1 << 30,
    square=8192,
    draws=1 << 32,
    whole=(1 << 16, 4096),
    part=(1 << 13, 4096),
    replayed=64,
    products=((2048, 2048), (8192, 2048), (5120, 20480)),
    tokens=(32, 64, 128, 256, 1024, 4096),
    few=(1, 2, 4, 8, 16),
    head=(50272, 2048),
    looked_up=4096,
    scored=(32, 1024),
    masked=(8192, 2048),
    density=1e-3,
    listed="opt-1.3b",
    models=("opt-125m", "opt-1.3b", "llama-3.2-1b", "opt-6.7b", "opt-13b"),
    batches=((1, 32), (1, 256), (16, 64), (16, 256)),
    wanted=(("opt-1.3b", (1, 32)), ("opt-1.3b", (16, 256))),
    masked_models=("opt-125m", "opt-1.3b"),
)

TINY = Sizes(
    copy=1 << 12,
    square=32,
    draws=1 << 12,
    whole=(4, 320),
    part=(3, 256),
    replayed=3,
    products=((24, 64),),
    tokens=(8,),
    few=(1, 2),
    head=(70, 64),
    looked_up=5,
    scored=(4,),
    masked=(16, 64),
    density=0.05,
    listed="tiny-opt",
    models=("tiny-opt", "tiny-llama"),
    batches=((1, 8), (2, 8)),
    wanted=(("tiny-llama", (2, 8)),),
    masked_models=("tiny-opt",),
)
