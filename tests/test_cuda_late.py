"""Indices out of range, which the CUDA backend's kernels find: csrc/cuda compiled for the host.

And that its adapters wait for nothing: their tensors are on a fake device, which has no values.
"""

from __future__ import annotations

import types
from pathlib import Path

import cuda_emulated
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import enter_devices
from test_cuda_kernels import DTYPES, PID, rand, seeds_of, table
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from zokernels import _cuda_ops, noise
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
    found.flags = Late("ids or targets")
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
    flags, cpu = Flags("ids"), torch.device("cpu")
    flags.look(cpu)  # nothing was found yet
    with torch.inference_mode():
        found = flags.of(cpu)
        found[0], found[1] = 9, 4
    assert flags.of(cpu) is found
    flags.look(torch.device("cuda", 1))
    with pytest.raises(IndexError, match=r"ids must be in \[0, 4\); got 9$"):
        flags.look(cpu, "ids")
    flags.wait(cpu)  # raised once


# --- a fake device --------------------------------------------------------------------------------


class Unread(Flags):
    """Of a device whose kernels find nothing."""

    def of(self, device: torch.device) -> Tensor:
        return torch.empty(2, dtype=torch.int64)

    def look(self, device: torch.device, what: str | None = None) -> None:
        assert device.type == "cuda"


def native_calls() -> tuple[Native, list[str]]:
    """The adapters over functions that only note their names."""
    calls: list[str] = []
    results = {"table_bytes": 8, "project_rows": 3, "has_sm90a": False}

    class Namespace:
        def __getattr__(self, name: str) -> object:
            result = results.get(name, 2 if name.endswith("_parts") else None)

            def call(*args: object) -> object:
                assert all(a.device.type == "cuda" for a in args if isinstance(a, Tensor)) or (
                    name in ("displace_", "chunk_loss_")  # with the flag on the host
                )
                calls.append(name)
                return result

            return types.SimpleNamespace(default=call)

    ops = Native(
        Namespace(),
        stream=lambda device: 0,
        multiprocessors=lambda device: 132,
        capturing=lambda: False,
    )
    ops.flags = Unread("ids")
    return ops, calls


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_adapter_waits_for_the_device(dtype: torch.dtype, tmp_path: Path) -> None:
    enter_devices(tmp_path)
    ops, calls = native_calls()
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        seeds, c = torch.empty(2, dtype=torch.int64), torch.empty(2, 2)
        w, ids = torch.empty(300, 64, dtype=dtype), torch.empty(3, 5, dtype=torch.int64)
        place, kind = (PID, 0, 0), noise.DISTRIBUTIONS[0]
        with pytest.raises(DataDependentOutputException):
            ids[0, 0].item()
        assert ops.embedding(ids, w, seeds, c, *place, kind, True).shape == (2, 3, 5, 64)
        for tokens in (1, 7, 100):
            x = torch.empty(2, tokens, 64, dtype=dtype)
            for turned in (False, True):
                weight = w.t().contiguous() if turned else w
                y = ops.linear(x, weight, None, seeds, c, *place, kind, False, turned)
                assert y.shape == (2, tokens, 300)
            y = ops.update_linear_(
                *(x, w, None, seeds, c, seeds, c[0], None, "stochastic", *place, kind, False)
            )
            assert y.shape == (2, tokens, 300)
            targets = torch.empty(tokens, dtype=torch.int64)
            loss = ops.linear_cross_entropy(
                *(x, w, None, targets, seeds, c, *place, kind, False, -100)
            )
            assert loss.shape == (2,)
        ops.update_([w, w[0]], seeds, c[0], None, None, [1, 2], [], [], kind, "nearest")
        assert ops.project([w, w[0]], seeds, [1, 2], [], [], kind).shape == (2,)
        assert ops.displace_vectors([w[0]], seeds, c, [1], kind).shape == (2 * 64,)
        assert ops.displace(w, seeds, c, *place, kind, "nearest", None).shape == (2, 300, 64)
        assert ops.sample(3, 4, seeds[0], *place, kind).shape == (3, 4)
    assert {"displace_", "chunk_loss_", "update_", "project_", "displace_vectors_"} <= set(calls)


# --- the loss of a vocabulary in chunks -----------------------------------------------------------


@pytest.mark.parametrize("vocab", [256, 257, 1028, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_of_chunks(dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are aligned and not, a last chunk of one column, and -inf among the logits."""
    monkeypatch.setattr(_cuda_ops, "LOGIT_BYTES", 1)  # 256 columns a chunk
    x, w = rand(2, 5, 64, dtype=dtype), rand(vocab, 64, dtype=dtype, seed=2) * 4
    bias = rand(2, vocab, seed=3)
    bias[1, 255] = -torch.inf
    targets = torch.tensor([0, vocab - 1, -100, 255, 254])
    place = (seeds_of(1), torch.zeros(2, 1), PID, 0, 0, "gaussian", False)
    ops = cuda_emulated.native()
    logits = ops.linear(x, w, bias, *place, False)
    got = ops.linear_cross_entropy(x, w, bias, targets, *place, -100)
    want = torch.stack([F.cross_entropy(rows, targets) for rows in logits.double()])
    assert bool(want[1].isinf())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    if vocab > 512:
        whole = got
        monkeypatch.undo()
        got = ops.linear_cross_entropy(x, w, bias, targets, *place, -100)
        torch.testing.assert_close(got, whole, rtol=1e-6, atol=0)
