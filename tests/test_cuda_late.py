"""Indices out of range, which the CUDA backend's kernels find: csrc/cuda compiled for the host."""

from __future__ import annotations

import cuda_emulated
import pytest
import torch
from test_cuda_kernels import DTYPES, PID, rand, seeds_of, table
from torch import Tensor

from zokernels._cuda_ops import Native
from zokernels._late import Flags


class Late(Flags):
    """As on a device: when an op returns its kernels are not over."""

    def look(self, device: torch.device, what: str | None = None) -> None:
        if what is None:
            super().look(device)


@pytest.fixture
def ops() -> Native:
    found = cuda_emulated.native()
    found.flags = Late()
    return found


def embed(ops: Native, ids: Tensor, w: Tensor, *, shared: bool = True) -> Tensor:
    rest = (seeds_of(1), table(2, 1), PID, 0, 0, "gaussian", shared)
    return ops.embedding(ids, w, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_a_bad_id_is_nan_and_raised_by_the_next_op(
    ops: Native, wide: bool, dtype: torch.dtype
) -> None:
    w = rand(11, 300, dtype=dtype)
    good = torch.tensor([[3, 0, 10], [10, 2, 1]], dtype=torch.int64 if wide else torch.int32)
    bad = good.clone()
    bad[0, 1], bad[1, 2] = 11, -1
    want, got = (embed(ops, ids, w, shared=False) for ids in (good, bad))
    inside = bad == good
    torch.testing.assert_close(got[inside], want[inside], rtol=0, atol=0)
    assert bool(got[~inside].isnan().all())
    with pytest.raises(IndexError, match=r"ids or targets must be in \[0, 11\); got (11|-1)$"):
        embed(ops, good, w, shared=False)
    torch.testing.assert_close(embed(ops, good, w, shared=False), want, rtol=0, atol=0)  # once


def test_a_bad_target_is_nan_and_raised_by_the_next_op(ops: Native) -> None:
    x, w = rand(2, 4, 8), rand(700, 8)
    rest = (seeds_of(1), table(2, 1), PID, 0, 0, "gaussian", False, -100)
    fine = torch.tensor([0, 699, -100, 5])
    want = ops.linear_cross_entropy(x, w, None, fine, *rest)
    assert bool(want.isfinite().all())
    for value in (700, -1, 2**40):
        bad = torch.where(fine == 5, value, fine)
        assert bool(ops.linear_cross_entropy(x, w, None, bad, *rest).isnan().all())
        with pytest.raises(IndexError, match=rf"\[0, 700\); got {value}$"):
            ops.linear_cross_entropy(x, w, None, fine, *rest)
        again = ops.linear_cross_entropy(x, w, None, fine, *rest)
        torch.testing.assert_close(again, want, rtol=0, atol=0)


def test_a_table_without_rows(ops: Native) -> None:
    with pytest.raises(IndexError, match=r"\[0, 0\)"):
        embed(ops, torch.tensor([0]), rand(0, 8))
    assert embed(ops, torch.zeros(0, dtype=torch.int64), rand(0, 8)).shape == (2, 0, 8)


def test_flags_are_a_devices_own() -> None:
    flags, cpu = Flags(), torch.device("cpu")
    flags.look(cpu)  # nothing was found yet
    with torch.inference_mode():
        found = flags.of(cpu)
        found[0], found[1] = 9, 4
    assert flags.of(cpu) is found
    flags.look(torch.device("cuda", 1))
    with pytest.raises(IndexError, match=r"ids must be in \[0, 4\); got 9$"):
        flags.look(cpu, "ids")
    flags.wait(cpu)  # raised once
