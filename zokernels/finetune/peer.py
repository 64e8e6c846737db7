"""MeZO's own loop, for comparison: written from Algorithm 1 of the paper.

Three passes over the weights put the probes in place and take them away, each drawing every normal
again from the step's seed, and a fourth makes the update. ``"plain"`` writes the arithmetic out as
``theta + scale * z * eps``; ``"add_"`` uses ``add_(z, alpha=)``, which is faster.

Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", Algorithm 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernels.finetune.memory import Peak

VARIANTS = ("plain", "add_")
_DRIFT_STEPS = 10
_NO_DECAY = ("bias", "layer_norm", "layernorm")


def mezo_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    seed: int,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
    directions: int = 1,
    variant: str = "add_",
) -> float:
    """One step of MeZO's loop on the parameters with ``requires_grad``; returns the first loss.

    With several directions the updates follow after all probes, as in Algorithm 2 (n-SPSA).

    Raises:
        ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}; got {variant!r}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def normal(p: Tensor) -> Tensor:
        return torch.normal(0.0, 1.0, size=p.size(), device=p.device, dtype=p.dtype)

    def perturb(key: int, scale: float) -> None:
        torch.manual_seed(key)
        for _, p in named:
            if variant == "add_":
                p.data.add_(normal(p), alpha=scale * eps)
            else:
                p.data = p.data + scale * normal(p) * eps

    gradients = []
    first = 0.0
    for key in range(seed, seed + directions):
        perturb(key, 1)
        with torch.inference_mode():
            plus = loss()
        perturb(key, -2)
        with torch.inference_mode():
            minus = loss()
        perturb(key, 1)
        gradients.append(((plus - minus) / (2 * eps)).item() / directions)
        first = plus.item() if key == seed else first
    for i, gradient in enumerate(gradients):
        torch.manual_seed(seed + i)
        for name, p in named:
            decay = weight_decay if not any(part in name for part in _NO_DECAY) else 0.0
            decay = decay if i == 0 else 0.0
            if variant == "add_":
                if decay:
                    p.data.mul_(1 - lr * decay)
                p.data.add_(normal(p), alpha=-lr * gradient)
            else:
                p.data = p.data - lr * (gradient * normal(p) + decay * p.data)
    return first


@dataclass(frozen=True)
class Comparison:
    """Seconds a step on one batch and model, measured in turns.

    Attributes:
        ours, mezo: medians; ``mezo`` is the faster of the two variants.
        variant: which one that is.
        ratio: median over the rounds of ``mezo / ours``.
        rounds: how often each was measured.
        peak_ours, peak_mezo: bytes on top of what was held before.
        drift: how far MeZO's loop at learning rate 0 has moved the weights after ``drift_steps``
            steps, relative to their norm; ours is 0.
    """

    ours: float
    mezo: float
    variant: str
    ratio: float
    rounds: int
    peak_ours: int
    peak_mezo: int
    drift: float
    drift_steps: int


def compare(
    model: nn.Module,
    ours: Callable[[], object],
    loss: Callable[[], Tensor],
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    directions: int,
    seconds: float = 20.0,
    progress: Callable[[], object] = lambda: None,
) -> Comparison:
    """Measure our step and MeZO's in turns. The weights are moved: use a model that is done with.

    Args:
        model: with ``requires_grad`` on what moves.
        ours: one step of ours.
        loss: the same batch's loss at the weights as they are.
        lr, eps, weight_decay, directions: of both.
        seconds: about how long to measure, after one warm-up of each; at least two rounds. When
            that is too short for both variants of MeZO's loop, the one that was faster in its
            warm-up is measured.
        progress: called after each measurement.
    """
    device = next(model.parameters()).device
    steps: dict[str, Callable[[], object]] = {"ours": ours}
    for variant in VARIANTS:
        steps[variant] = lambda variant=variant: mezo_step(  # type: ignore[misc]
            model,
            loss,
            seed=1,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            directions=directions,
            variant=variant,
        )
    warm: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for name, step in steps.items():
        start = time.perf_counter()
        with Peak(device) as peak:
            step()
        warm[name] = time.perf_counter() - start
        peaks[name] = peak.above
        progress()
    if 3 * sum(warm.values()) > seconds:
        del steps[max(VARIANTS, key=lambda name: warm[name])]
    rounds = min(max(int(seconds / sum(warm[name] for name in steps)), 2), 20)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            times[name].append(time.perf_counter() - start)
            progress()
    peers = [name for name in VARIANTS if name in steps]
    best = min(peers, key=lambda name: statistics.median(times[name]))
    moving = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in moving]
    nothing = torch.zeros((), device=device)
    for i in range(_DRIFT_STEPS):
        mezo_step(model, lambda: nothing, seed=100 + i, lr=0.0, eps=eps, variant="add_")
    moved = sum(
        (p.detach().double() - b.double()).square().sum().item()
        for p, b in zip(moving, before, strict=True)
    )
    size = sum(b.double().square().sum().item() for b in before)
    return Comparison(
        statistics.median(times["ours"]),
        statistics.median(times[best]),
        best,
        statistics.median(m / o for m, o in zip(times[best], times["ours"], strict=True)),
        rounds,
        peaks["ours"],
        peaks[best],
        (moved / size) ** 0.5 if size else 0.0,
        _DRIFT_STEPS,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
