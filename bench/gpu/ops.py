"""Every op at sizes that fill the GPU: what to call, and what it must move, multiply and draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import zokernels as zo
from bench import harness, models
from bench.gpu.floors import Floors
from bench.gpu.machine import setting
from bench.gpu.sizes import Shape, Sizes
from zokernels import _ops

KEY = ("op", "case", "dtype", "distribution", "shape", "backend", "setting")
GAUSSIAN, RADEMACHER = zo.noise.DISTRIBUTIONS
MIXES = (("bf16", GAUSSIAN), ("fp32", GAUSSIAN), ("bf16", RADEMACHER), ("fp32", RADEMACHER))
EPS = 1e-3


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    Attributes:
        op: name in the schemas; case: what of it.
        arguments: makes the op's arguments, and with them all its memory.
        moved: bytes; flops: of a product in bf16; noise: values drawn.
        wanted: the lower, the earlier it is timed.
    """

    op: str
    case: str
    dtype: str
    distribution: str
    shape: str
    arguments: Callable[[], tuple[Any, ...]]
    moved: float = 0
    flops: float = 0
    noise: float = 0
    wanted: int = 1

    @property
    def label(self) -> str:
        """One line."""
        return f"{self.op} {self.case}, {self.dtype} {self.distribution} {self.shape}"

    def key(self, backend: str) -> tuple[str, ...]:
        """What identifies its row."""
        mine = (self.op, self.case, self.dtype, self.distribution, self.shape)
        return (*mine, backend, setting())

    def row(self, backend: str, milliseconds: harness.Stat, floors: Floors) -> harness.Row:
        """The CSV row; ``of_floor`` is the floor's share of the measured time."""
        least = floors.seconds(
            moved=self.moved,
            flops=self.flops,
            noise=self.noise,
            distribution=self.distribution,
        )
        seconds = milliseconds.median / 1e3
        rate = floors.noise.get(self.distribution)
        return {
            **dict(zip(KEY, self.key(backend), strict=True)),
            "ms": round(milliseconds.median, 4),
            "ms_p20": round(milliseconds.low, 4),
            "ms_p80": round(milliseconds.high, 4),
            "floor_ms": round(least * 1e3, 4),
            "of_floor": round(least / seconds, 3),
            "of_bandwidth": round(self.moved / floors.bandwidth / seconds, 3),
            "of_generator": round(self.noise / rate / seconds, 3) if self.noise and rate else "",
        }


@dataclass(frozen=True)
class _Maker:
    """Tensors of the cases, on one device."""

    device: str

    def weight(self, shape: Shape, kind: str) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(0.02).to(models.DTYPES[kind])

    def activations(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).bfloat16()

    def seeds(self, count: int = 1) -> Tensor:
        return torch.arange(count, device=self.device)

    def steps(self, count: int) -> Tensor:
        return torch.full((count,), 1e-6, device=self.device)

    def branches(self) -> Tensor:
        return torch.tensor([[EPS], [-EPS]], device=self.device)

    def ids(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), device=self.device)

    def indices(self, numel: int, count: int) -> Tensor:
        """``count`` increasing ones, one somewhere in each stretch of equal length."""
        stretch = numel // count
        return torch.arange(count, device=self.device) * stretch + self.ids(stretch, count)

    def masked(self, w: Tensor, count: int) -> tuple[Tensor, Tensor]:
        indices = self.indices(w.numel(), count)
        return indices, w.view(-1)[indices].float()


def cases(sizes: Sizes, device: str) -> list[OpCase]:
    """All cases, most wanted first."""
    make = _Maker(device)
    found = [*_updates(sizes, make), *_elementwise(sizes, make), *_products(sizes, make)]
    found += [*_transposed(sizes, make), *_heads(sizes, make), *_sparse(sizes, make)]
    return sorted(found, key=lambda case: case.wanted)


def _bytes(kind: str) -> int:
    return models.DTYPES[kind].itemsize


def _text(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _updates(sizes: Sizes, make: _Maker) -> Iterator[OpCase]:
    def update(shapes: list[Shape], kind: str, terms: int, distribution: str) -> Any:
        n = len(shapes)
        return lambda: (
            *([make.weight(s, kind) for s in shapes], make.seeds(terms), make.steps(terms)),
            *(None, None, list(range(n)), [0] * n, [0] * n, distribution, "stochastic"),
        )

    whole, part = sizes.whole, sizes.part
    for kind, distribution in MIXES:
        n = whole[0] * whole[1]
        yield OpCase(
            *("update_", "1 seed", kind, distribution, _text(whole)),
            update([whole], kind, 1, distribution),
            moved=2 * n * _bytes(kind),
            noise=n,
            wanted=0,
        )
        n = part[0] * part[1]
        yield OpCase(
            *("update_", f"{sizes.replayed} seeds", kind, distribution, _text(part)),
            update([part], kind, sizes.replayed, distribution),
            moved=2 * n * _bytes(kind),
            noise=sizes.replayed * n,
            wanted=0,
        )
    shapes = parameter_shapes(sizes.listed)
    n = sum(rows * cols for rows, cols in shapes)
    for distribution in (GAUSSIAN, RADEMACHER):
        yield OpCase(
            *("update_", f"all of {sizes.listed}", "bf16", distribution, f"{len(shapes)} tensors"),
            update(shapes, "bf16", 1, distribution),
            moved=2 * 2 * n,
            noise=n,
        )


def parameter_shapes(name: str) -> list[Shape]:
    """Every parameter of a model as a matrix; the model is not made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config(name), dtype=torch.bfloat16)
    return [(p.numel() // p.shape[-1], p.shape[-1]) for p in model.parameters()]


def _elementwise(sizes: Sizes, make: _Maker) -> Iterator[OpCase]:
    n, shape = sizes.part[0] * sizes.part[1], sizes.part
    for kind, distribution in MIXES:
        yield OpCase(
            *("displace", "2 branches", kind, distribution, _text(shape)),
            lambda kind=kind, distribution=distribution: (
                *(make.weight(shape, kind), make.seeds(), make.branches(), 1, 0, 0),
                *(distribution, "nearest", None),
            ),
            moved=3 * n * _bytes(kind),
            noise=n,
        )
        yield OpCase(
            *("project", "4 seeds", kind, distribution, _text(shape)),
            lambda kind=kind, distribution=distribution: (
                *([make.weight(shape, kind)], make.seeds(4), [1], [0], [0], distribution),
            ),
            moved=n * _bytes(kind),
            noise=4 * n,
        )


def _products(sizes: Sizes, make: _Maker) -> Iterator[OpCase]:
    many = [(t, d, s) for d in (GAUSSIAN, RADEMACHER) for t in sizes.tokens for s in sizes.products]
    few = [(t, d, s) for d in (GAUSSIAN, RADEMACHER) for t in sizes.few for s in sizes.products]
    pending = "update_linear_" in _ops.SCHEMAS
    for tokens, distribution, shape in [*few, *many]:
        rows, cols = shape

        def arguments(
            tokens: int = tokens, distribution: str = distribution, shape: Shape = shape
        ) -> tuple[Any, ...]:
            return (
                *(make.activations(2, tokens, shape[1]), make.weight(shape, "bf16"), None),
                *(make.seeds(), make.branches(), 1, 0, 0, distribution, False, False),
            )

        def pending_arguments(
            tokens: int = tokens, distribution: str = distribution, shape: Shape = shape
        ) -> tuple[Any, ...]:
            return (
                *(make.activations(2, tokens, shape[1]), make.weight(shape, "bf16"), None),
                *(make.seeds(), make.branches(), make.seeds() + 1, make.steps(1), None),
                *("stochastic", 1, 0, 0, distribution, False),
            )

        n, activations = rows * cols, 2 * tokens * (rows + cols)
        flops = 2 * 2 * tokens * n
        text = f"{tokens}x{cols}x{rows}"
        yield OpCase(
            *("linear", "2 branches", "bf16", distribution, text),
            arguments,
            moved=2 * (n + activations),
            flops=flops,
            noise=n,
            wanted=1 if distribution == GAUSSIAN else 2,
        )
        if pending and tokens in (*sizes.few[:1], *sizes.tokens[:1]):
            yield OpCase(
                *("update_linear_", "2 branches", "bf16", distribution, text),
                pending_arguments,
                moved=2 * (2 * n + activations),
                flops=flops,
                noise=2 * n,
                wanted=1 if distribution == GAUSSIAN else 2,
            )


def _transposed(sizes: Sizes, make: _Maker) -> Iterator[OpCase]:
    """Products with weights stored [in, out], as GPT-2 has them."""
    for tokens in (sizes.few[-1], sizes.tokens[0]):
        for rows, cols in sizes.products:
            n = rows * cols
            yield OpCase(
                *("linear", "2 branches, [in, out]", "bf16", GAUSSIAN, f"{tokens}x{cols}x{rows}"),
                lambda tokens=tokens, rows=rows, cols=cols: (
                    *(make.activations(2, tokens, cols), make.weight((cols, rows), "bf16"), None),
                    *(make.seeds(), make.branches(), 1, 0, 0, GAUSSIAN, False, True),
                ),
                moved=2 * (n + 2 * tokens * (rows + cols)),
                flops=2 * 2 * tokens * n,
                noise=n,
                wanted=2,
            )


def _heads(sizes: Sizes, make: _Maker) -> Iterator[OpCase]:
    vocab, width = sizes.head
    for tokens in sizes.scored:
        yield OpCase(
            *("linear_cross_entropy", "2 branches", "bf16", GAUSSIAN, f"{tokens}x{width}x{vocab}"),
            lambda tokens=tokens: (
                *(make.activations(2, tokens, width), make.weight(sizes.head, "bf16"), None),
                *(make.ids(vocab, tokens), make.seeds(), make.branches(), 1, 0, 0, GAUSSIAN),
                *(False, -100),
            ),
            moved=2 * (vocab * width + 2 * tokens * width),
            flops=2 * 2 * tokens * vocab * width,
            noise=vocab * width,
        )
    n = sizes.looked_up
    yield OpCase(
        *("embedding", "2 branches", "bf16", GAUSSIAN, f"{n} of {vocab}x{width}"),
        lambda: (
            *(make.ids(vocab, n), make.weight(sizes.head, "bf16"), make.seeds(), make.branches()),
            *(1, 0, 0, GAUSSIAN, True),
        ),
        moved=3 * 2 * n * width,
        noise=n * width,
    )


def _sparse(sizes: Sizes, make: _Maker) -> Iterator[OpCase]:
    """Under a mask: an index of 8 bytes and a value of 4 for every element that moves."""
    shape = sizes.masked
    count = max(1, int(shape[0] * shape[1] * sizes.density))
    text = f"{count} of {_text(shape)}"

    def masked(kind: str) -> tuple[Tensor, Tensor, Tensor]:
        w = make.weight(shape, kind)
        return (w, *make.masked(w, count))

    for kind in ("bf16", "fp32"):
        size = _bytes(kind)

        def update(kind: str = kind) -> tuple[Any, ...]:
            w, indices, shadow = masked(kind)
            return (*([w], [indices], [shadow], make.seeds(), make.steps(1), None, [1], GAUSSIAN),)

        yield OpCase(
            *("sparse_update_", "1 seed", kind, GAUSSIAN, text),
            update,
            moved=count * (8 + 2 * 4 + 2 * size),
            noise=count,
        )
        yield OpCase(
            *("sparse_displace", "2 branches", kind, GAUSSIAN, text),
            lambda kind=kind: (*masked(kind), make.seeds(), make.branches(), 1, 0, GAUSSIAN),
            moved=count * (8 + 4 + size + 2 * 4),
            noise=count,
        )
    for tokens in (*sizes.few[:1], *sizes.tokens):
        activations = 2 * tokens * sum(shape)
        yield OpCase(
            *("sparse_linear", "2 branches", "bf16", GAUSSIAN, f"{tokens} by {text}"),
            lambda tokens=tokens: (
                *(make.activations(2, tokens, shape[1]), (held := masked("bf16"))[0], None),
                *(*held[1:], make.seeds(), make.branches(), 1, 0, GAUSSIAN, False, False),
            ),
            moved=2 * (shape[0] * shape[1] + activations) + 12 * count,
            flops=2 * 2 * tokens * (shape[0] * shape[1] + count),
            noise=count,
        )
    n = sizes.looked_up
    yield OpCase(
        *("sparse_embedding", "2 branches", "bf16", GAUSSIAN, f"{n} rows, {text}"),
        lambda: (
            *(make.ids(shape[0], n), *masked("bf16"), make.seeds(), make.branches()),
            *(1, 0, GAUSSIAN, True),
        ),
        moved=3 * 2 * n * shape[1] + 12 * count,
        noise=count,
    )
