"""The bare generator on a GPU: noise drawn in registers, nothing loaded, almost nothing stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokernels.triton.launch import launch
from zokernels.triton.noise import direction, key_of

_ROWS = 8


@triton.jit
def generate_kernel(out, seed, groups, ROWS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Sum of ``ROWS x 256`` values of ``groups`` groups, one number a program."""
    pid = tl.program_id(0)
    row = (pid * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.uint32)
    col = tl.arange(0, 64)[None, :].to(tl.uint32)
    k0, k1 = key_of(tl.load(seed))
    zero = tl.zeros((), tl.uint32)
    total = tl.zeros((ROWS, 64), tl.float32)
    for group in range(groups):
        counter = tl.cast(group, tl.uint32)
        z = direction(row, col, counter, zero, k0, k1, zero, GAUSSIAN)
        for j in tl.static_range(4):
            total += z[j]
    tl.store(out + pid, tl.sum(tl.sum(total, axis=1), axis=0))


def drawing(
    count: int, distribution: str, device: str, *, programs: int = 4096
) -> tuple[Callable[[], Tensor], int]:
    """A function that draws about ``count`` values, and how many they are."""
    groups = max(1, count // (programs * _ROWS * 256))
    out = torch.empty(programs, dtype=torch.float32, device=device)
    seed = torch.ones((), dtype=torch.int64, device=device)

    def run() -> Tensor:
        launch(
            generate_kernel,
            (programs,),
            *(out, seed, groups),
            ROWS=_ROWS,
            GAUSSIAN=distribution == "gaussian",
        )
        return out

    return run, programs * groups * _ROWS * 256
