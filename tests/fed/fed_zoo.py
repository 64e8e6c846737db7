"""A tiny language model, a tiny task, and every method with options that make the model move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import model_zoo as zoo
import torch
from torch import Tensor, nn

from fedzo.methods import Method, Setting, Site, make
from fedzo.methods.base import Rule
from fedzo.sampling import Examples
from fedzo.simulation import Federation

__all__ = ["Examples", "Federation", "Rule", "Site"]

EXAMPLES, LENGTH = 60, 8

# Rates are large: a coefficient must show in the last bit of a bfloat16 weight.
OPTIONS: dict[str, dict[str, Any]] = {
    "fedmezo": {"lr": 1e-2, "steps": 3, "lora_rank": 2, "lora_alpha": 4},
    "meerkat": {"lr": 1e-1, "steps": 3, "density": 0.02},
    "meerkat_vp": {
        "lr": 1e-1,
        "steps": 3,
        "density": 0.02,
        "calibration_steps": 6,
        "initial_steps": 2,
        "later_steps": 3,
    },
    "fedspzo": {"lr": 1e-2, "steps": 2, "block2": 2},
    "full_fedzo": {"lr": 1e-2, "steps": 3, "payload": "scalars"},
    "lora_fedzo": {"lr": 1e-1, "steps": 3, "lora_rank": 2},
    "weight_magnitude": {"lr": 1e-1, "steps": 3, "density": 0.02},
    "random_mask": {"lr": 1e-1, "steps": 3, "density": 0.02},
    "decomfl": {"lr": 1e-2, "steps": 2, "perturbations": 2},
    "fedkseed": {"lr": 1e-2, "steps": 3, "candidates": 8},
    "fedavg": {"lr": 1e-1, "steps": 2},
    "fedavg_lora": {"lr": 1e-1, "steps": 2, "lora_rank": 2},
}
# Other ways of the same methods that send scalars.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedmezo-shared": ("fedmezo", {"seeds": "shared"}),
    "fedmezo-loss": ("fedmezo", {"signal": "loss"}),
    "fedmezo-rademacher": ("fedmezo", {"distribution": "rademacher"}),
    "meerkat-client": ("meerkat", {"seeds": "client"}),
    "meerkat-layer": ("meerkat", {"scope": "layer"}),
    "fedspzo-separate": ("fedspzo", {"estimator": "separate", "block1": 2, "block2": 3}),
    "fedspzo-two": ("fedspzo", {"block1": 2, "seeds": "shared"}),
    "full_fedzo-nearest": ("full_fedzo", {"rounding": "nearest"}),
    "fedkseed-pro": ("fedkseed", {"pro": True}),
}
DENSE = ("fedavg", "fedavg_lora")
SCALAR = [name for name in OPTIONS if name not in DENSE]


def method(name: str, **options: Any) -> Method:
    """A method or variant with its options here, and others."""
    base, extra = VARIANTS.get(name, (name, {}))
    return make(base, **{**OPTIONS[base], **extra, **options})


class ToyTask:
    """Next-token prediction on fixed random tokens."""

    natural_ids = None

    def __init__(self, examples: int = EXAMPLES) -> None:
        g = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(3, zoo.VOCAB, (examples, LENGTH), generator=g)
        self.labels = [i % 3 for i in range(examples)]

    @property
    def train_size(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        ids = self.tokens[list(indices)]
        return {"input_ids": ids, "labels": ids.clone()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(self.loss(model, self.batch(range(self.train_size))))}


def build(dtype: torch.dtype = torch.float32, architecture: str = "llama") -> nn.Module:
    """The same tiny model every time; its input and output embeddings are tied in ``opt``."""
    return zoo.build(architecture).to(dtype).eval()


def shards(clients: int, task: ToyTask) -> list[list[int]]:
    """Every example to one client, of different sizes."""
    cuts = [task.train_size * i * (i + 1) // (clients * (clients + 1)) for i in range(clients + 1)]
    return [list(range(a, b)) for a, b in itertools.pairwise(cuts)]


def setting(model: nn.Module, task: ToyTask, seed: int = 5) -> Setting:
    """What a method is prepared with."""
    return Setting(model, task, (0,), {0: task.train_size}, seed, (task.batch(range(4)),))


def federation(
    name: str,
    *,
    model: nn.Module | None = None,
    clients: int = 4,
    options: Mapping[str, Any] | None = None,
    **given: Any,
) -> Federation:
    """A federation of a method with its options here."""
    task = ToyTask()
    return Federation(
        build() if model is None else model,
        task,
        method(name, **(options or {})),
        shards(clients, task),
        **{"seed": 5, "batch_size": 2, "calibration": [task.batch(range(8))], **given},
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert a.keys() == b.keys()
    return [n for n in a if not same_bits(a[n], b[n])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, the sign of zero included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def spy(federation: Federation, see: Callable[[Any, Any, list[float]], None]) -> None:
    """Call ``see(order, start, scalars)`` after each client's work, with the client's weights."""
    work = federation.method.client

    def client(site: Any, order: Any) -> list[float]:
        start = {n: v.clone() for n, v in federation.space.values().items()}
        scalars = work(site, order)
        site.settle()
        see(order, start, scalars)
        return scalars

    federation.method.client = client  # type: ignore[method-assign]
