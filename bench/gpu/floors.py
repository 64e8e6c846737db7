"""What no implementation can beat: rates of the device, measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.gpu.machine import Machine
from bench.gpu.sizes import Sizes


@dataclass(frozen=True)
class Floors:
    """Bytes, FLOP (bf16) and values of noise a second; no noise where there is no generator."""

    bandwidth: float
    flops: float
    noise: dict[str, float]

    def seconds(
        self, *, moved: float = 0, flops: float = 0, noise: float = 0, distribution: str = ""
    ) -> float:
        """The least time of an op: the largest of its three."""
        rate = self.noise.get(distribution)
        drawn = noise / rate if noise and rate else 0.0
        return max(moved / self.bandwidth, flops / self.flops, drawn)


def _copy(machine: Machine, count: int) -> float:
    source = torch.empty(count, dtype=torch.int8, device=machine.device).random_()
    target = torch.empty_like(source)
    return machine.time(lambda: target.copy_(source)).median


def _product(machine: Machine, n: int) -> float:
    # Random values: zeros cost less power, and so run faster.
    a, b = (torch.randn(n, n, device=machine.device).bfloat16() for _ in range(2))
    return machine.time(lambda: a @ b).median


def measure(machine: Machine, sizes: Sizes) -> Floors:
    """Copy and multiply: sizes several times the second-level cache. No noise yet."""
    n = sizes.square
    copied, multiplied = _copy(machine, sizes.copy), _product(machine, n)
    return Floors(2e3 * sizes.copy / copied, 2e3 * n**3 / multiplied, {})


def generator(machine: Machine, sizes: Sizes, distribution: str) -> float | None:
    """Values of noise a second, or None where there is no bare generator."""
    found = machine.drawing(sizes.draws, distribution)
    if found is None:
        return None
    run, count = found
    return count / (machine.time(run).median / 1e3)
