"""The conformance suite of the ops under a mask over the CUDA kernels' emulation."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulated
import pytest
import test_sparse_conformance as suite
import torch
from test_sparse_conformance import *  # noqa: F403
from torch import Tensor

from zokernels import _cuda_sparse, _registry
from zokernels._cuda_ops import Native


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kernels = cuda_emulated.native().kernels()
    backend = _registry.Backend("cuda_emulated", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    yield backend.name


# The suite's own loop over the backends.
@pytest.fixture(autouse=True)
def only_this_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BACKENDS", [name])


def test_the_backend_has_every_op_under_a_mask() -> None:
    assert set(suite.SPARSE) <= set(cuda_emulated.native().kernels())


# --- particular to the backend --------------------------------------------------------------------


def masked_product(ops: Native, indices: Tensor, transposed: bool = False) -> Tensor:
    w, x = suite.rand(12, 12), suite.rand(2, 3, 12, seed=2)
    rest = (indices, w.reshape(-1)[indices.clamp(0, 143)], suite.seeds_of(1), suite.table(2, 1))
    kernel = ops.kernels()["sparse_linear"]
    return kernel(x, w, None, *rest, suite.PID, 0, "gaussian", False, transposed)  # type: ignore


@pytest.mark.parametrize("transposed", [False, True])
def test_a_list_is_checked_and_turned_once(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    """What waits for the device or sorts is done again only for a list that was written to."""
    ops, seen, sort = cuda_emulated.native(), [], torch.sort
    check = _cuda_sparse.check_index
    monkeypatch.setattr(_cuda_sparse, "check_index", lambda *a: seen.append("check") or check(*a))
    monkeypatch.setattr(torch, "sort", lambda *a: seen.append("sort") or sort(*a))
    once = ["check", "sort"] if transposed else ["check"]
    indices = torch.tensor([3, 14, 15, 92])
    first = masked_product(ops, indices, transposed)
    assert seen == once
    suite.same(masked_product(ops, indices, transposed), first)
    assert seen == once
    indices[1:3] = torch.tensor([30, 80])
    moved = masked_product(ops, indices, transposed)
    assert seen == once * 2
    suite.same(moved, masked_product(ops, indices.clone(), transposed))
    assert not torch.equal(moved, first)
    indices[3] = 144
    with pytest.raises(IndexError, match=r"indices must be in \[0, 144\)"):
        masked_product(ops, indices, transposed)


def test_nothing_waits_or_is_kept_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording = True
    ops = cuda_emulated.native()
    ops._sparse._capturing = lambda: recording
    monkeypatch.setattr(_cuda_sparse, "check_index", lambda *a: pytest.fail("waits"))
    indices = torch.tensor([3, 14, 15, 92])
    inside = masked_product(ops, indices, True)
    assert len(ops._sparse._lists) == 0
    monkeypatch.undo()
    recording = False
    suite.same(masked_product(ops, indices, True), inside)
    assert len(ops._sparse._lists) == 1


def test_lists_are_forgotten_with_their_tensors() -> None:
    ops = cuda_emulated.native()
    masked_product(ops, torch.tensor([3, 14]), True)
    assert len(ops._sparse._lists) == 0
    with torch.inference_mode():  # whose tensors count no versions
        indices = torch.tensor([3, 14])
        first = masked_product(ops, indices, True)
        indices[1] = 15
        assert not torch.equal(masked_product(ops, indices, True), first)


@pytest.mark.parametrize("tokens", [1, 3])
def test_elements_beyond_32_bits(tokens: int) -> None:
    """A weight of more than 2**32 elements: its list, and no weight, is what the kernels read."""
    library = torch.ops.zokernels_cuda_emulated
    cuda_emulated.library()
    outputs, inputs, count = 70_000, 1 << 16, 3000
    generator = torch.Generator().manual_seed(3)
    last = torch.arange(outputs * inputs - 40, outputs * inputs)
    some = torch.randint(outputs * inputs, (count,), generator=generator)
    indices = torch.cat([some, last]).unique()
    d = suite.rand(1, indices.numel())
    x, plain = suite.rand(1, tokens, inputs), suite.rand(1, tokens, outputs)
    y = torch.empty_like(plain)
    library.sparse_correct_(y, plain, x, None, d, indices, None, False, 0)
    source, target = indices % inputs, indices // inputs
    want = plain.double().index_add(2, target, x[:, :, source].double() * d.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)
    ids = torch.tensor([outputs - 1, int(target[5]), 0])[:tokens]
    rows = torch.zeros(1, tokens, inputs)
    library.sparse_rows_(rows, ids, d, indices, False, 0)
    for t, row in enumerate(ids.tolist()):
        own = target == row
        want_row = torch.zeros(inputs).index_put((source[own],), d[0, own])
        suite.same(rows[0, t], want_row)
