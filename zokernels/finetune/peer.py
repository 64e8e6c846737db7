"""MeZO's own loop, for comparison: written from Algorithm 1 of the paper.

Three passes over the weights put the probes in place and take them away, each drawing every normal
again from the step's seed, and a fourth makes the update. ``"plain"`` writes the arithmetic out as
``theta + scale * z * eps``; ``"add_"`` uses ``add_(z, alpha=)``, which is faster.

Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", Algorithm 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernels.finetune.memory import Peak

VARIANTS = ("plain", "add_")
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
    """Our step beside MeZO's loop on one batch and model, measured in turns.

    Attributes:
        what: which parameters move.
        parameters: how many those are.
        directions: directions a step.
        ours, mezo: median seconds a step; ``mezo`` is the faster of the two variants.
        variant: which one that is.
        ratio: median over the rounds of ``mezo / ours``.
        rounds: how often each was measured.
        measured: whether MeZO's loop ran with this many directions; else its time is that of one
            direction times their number.
        peak_ours, peak_mezo: bytes on top of what was held before.
    """

    what: str
    parameters: int
    directions: int
    ours: float
    mezo: float
    variant: str
    ratio: float
    rounds: int
    measured: bool
    peak_ours: int
    peak_mezo: int


def compare(
    model: nn.Module,
    ours: Callable[[], object],
    loss: Callable[[], Tensor],
    *,
    what: str,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
    several: tuple[int, Callable[[], object]] | None = None,
    seconds: float = 15.0,
    progress: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """Measure our step of one direction and MeZO's in turns; the weights are moved.

    Args:
        model: with ``requires_grad`` on what moves; done with, since its weights change.
        ours: one step of ours.
        loss: the same batch's loss at the weights as they are.
        what: name of what moves.
        lr, eps, weight_decay: of MeZO's loop.
        several: a number of directions and one step of ours with so many: a second row, beside as
            many times MeZO's loop with one direction.
        seconds: about how long to measure, after one warm-up of each; at least two rounds. When
            that is too short for both variants of MeZO's loop, the one that was faster in its
            warm-up is measured.
        progress: called after each measurement.
    """
    device = next(model.parameters()).device
    steps: dict[str, Callable[[], object]] = {"ours": ours}
    if several is not None:
        steps["several"] = several[1]
    for variant in VARIANTS:
        steps[variant] = lambda variant=variant: mezo_step(  # type: ignore[misc]
            model, loss, seed=1, lr=lr, eps=eps, weight_decay=weight_decay, variant=variant
        )
    warm: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for name, step in steps.items():
        with Peak(device) as peak:
            start = time.perf_counter()
            step()
            _synchronize(device)
            warm[name] = time.perf_counter() - start
        peaks[name] = peak.above
        progress()
    if 3 * sum(warm.values()) > seconds:
        del steps[max(VARIANTS, key=lambda name: warm[name])]
    rounds = min(max(int(seconds / sum(warm[name] for name in steps)), 2), 20)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
            progress()
    peers = [name for name in VARIANTS if name in steps]
    best = min(peers, key=lambda name: statistics.median(times[name]))
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def row(name: str, directions: int) -> Comparison:
        pairs = zip(times[best], times[name], strict=True)
        return Comparison(
            what,
            moving,
            directions,
            statistics.median(times[name]),
            directions * statistics.median(times[best]),
            best,
            directions * statistics.median(theirs / ours for theirs, ours in pairs),
            rounds,
            directions == 1,
            peaks[name],
            peaks[best],
        )

    return [row("ours", 1)] + ([] if several is None else [row("several", several[0])])


def drift(model: nn.Module, *, eps: float, steps: int = 10) -> float:
    """How far MeZO's loop moves the weights in steps without an update, relative to their norm.

    Its probes are put in place and taken away in the weights' own precision; ours never are.
    """
    moving = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in moving]
    nothing = torch.zeros((), device=moving[0].device)
    for i in range(steps):
        mezo_step(model, lambda: nothing, seed=100 + i, lr=0.0, eps=eps)
    moved = sum(
        (p.detach().double() - b.double()).square().sum().item()
        for p, b in zip(moving, before, strict=True)
    )
    size = sum(b.double().square().sum().item() for b in before)
    return math.sqrt(moved / size) if size else 0.0


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Seconds one call takes."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
