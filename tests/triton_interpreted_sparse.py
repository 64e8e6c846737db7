"""What the Triton ops under a mask do beyond the conformance suite; see triton_interpreted.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreted import PID, rand

import zokernels as zo
from zokernels import _registry, reference
from zokernels.triton import launch, sparse_ops, tables

SEEDS, COEFFS = torch.tensor([3, -9]), torch.tensor([[0.5, -0.25], [-0.5, 0.125]])


def masked(w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    indices = torch.randperm(w.numel(), generator=generator)[:count].sort().values
    return indices, torch.take(w, indices).float()


def product(
    x: Tensor, w: Tensor, bias: Tensor | None, indices: Tensor, shadow: Tensor, *how: bool
) -> tuple[Tensor, Tensor]:
    args = (x, w, bias, indices, shadow, SEEDS, COEFFS, PID, 3, "rademacher", *how)
    return sparse_ops.sparse_linear(*args), reference.sparse_linear(*args)


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shared", [False, True], ids=["stacked", "shared"])
def test_many_tokens_are_turned_a_piece_at_a_time(
    monkeypatch: pytest.MonkeyPatch, shared: bool, transposed: bool
) -> None:
    monkeypatch.setattr(sparse_ops, "_TURNED", 64 * 40 * 4)  # pieces of 64 tokens
    turned: list[int] = []
    real = sparse_ops._turned

    def counted(x: Tensor, tile: int) -> Tensor:
        turned.append(x.shape[1])
        return real(x, tile)

    monkeypatch.setattr(sparse_ops, "_turned", counted)
    w = rand(*((40, 70) if transposed else (70, 40)))
    x = rand(*(() if shared else (2,)), 150, 40, seed=4)
    for bias in (None, rand(70), rand(2, 70)):
        got, want = product(x, w, bias, *masked(w, 60), shared, transposed)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert turned == [64, 64, 22] * 3
    # An element in twenty columns is read where it lies.
    got, want = product(x, w, None, *masked(w, 2), shared, transposed)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(turned) == 9


def test_a_product_has_one_order() -> None:
    w, x = rand(30, 50), rand(2, 5, 50, seed=2)
    indices, shadow = masked(w, 700)
    first = product(x, w, None, indices, shadow, False, False)[0]
    assert torch.equal(first, product(x, w, None, indices, shadow, False, False)[0])


def test_outputs_without_elements_are_the_plain_product() -> None:
    w, x = rand(300, 20).bfloat16(), rand(2, 3, 20, seed=2).bfloat16()
    got = product(x, w, None, torch.tensor([5, 19]), torch.tensor([9.0, 9.0]), False, False)[0]
    plain = torch.nn.functional.linear(x, w)
    assert torch.equal(got[:, :, 1:], plain[:, :, 1:])
    w[0, 5], w[0, 19] = 9.0, 9.0
    assert not torch.equal(got[:, :, 0], torch.nn.functional.linear(x, w)[:, :, 0])


# --- the layout of a list -------------------------------------------------------------------------


def test_a_layout_is_made_once_and_goes_with_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    real = sparse_ops._laid_out

    def counted(indices: Tensor, shape: torch.Size, transposed: bool) -> Any:
        made.append(transposed)
        return real(indices, shape, transposed)

    monkeypatch.setattr(sparse_ops, "_laid_out", counted)
    w, x, t = rand(20, 20), rand(2, 3, 20, seed=2), [False, False, True, True]
    indices, shadow = masked(w, 30)
    before = len(sparse_ops._layouts)
    for transposed in t:
        product(x, w, None, indices, shadow, False, transposed)
    assert made == [False, True] and len(sparse_ops._layouts) == before + 1
    # A list that was written is another list.
    indices.copy_(masked(w, 60)[0][::2])
    for transposed in t:
        got, want = product(x, w, None, indices, shadow, False, transposed)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert made == [False, True] * 2
    del indices
    gc.collect()
    assert len(sparse_ops._layouts) == before
    # In inference mode there is no telling; in a graph the layout is a part of it.
    with torch.inference_mode():
        indices = masked(w, 30)[0]
        for _ in range(2):
            product(x, w, None, indices, shadow, False, False)
    monkeypatch.setattr(sparse_ops, "recording", lambda device: True)
    product(x, w, None, masked(w, 30)[0], shadow, False, False)
    assert len(made) == 7 and len(sparse_ops._layouts) == before


def test_a_layout_lists_the_elements_of_every_output() -> None:
    shape = torch.Size((7, 5))
    indices = masked(rand(7, 5), 13)[0]
    for transposed in (False, True):
        found = sparse_ops._laid_out(indices, shape, transposed)
        output, source = (indices % 5, indices // 5) if transposed else (indices // 5, indices % 5)
        order = output.argsort(stable=True)
        assert torch.equal(found.source.long(), source[order])
        counts = torch.bincount(output, minlength=5 if transposed else 7)
        assert torch.equal(found.starts.diff(), counts) and found.starts[0] == 0
        rank = torch.arange(13) if found.rank is None else found.rank
        assert torch.equal(rank[order], torch.arange(13))


# --- update ---------------------------------------------------------------------------------------


def test_many_parameters_go_in_one_launch_a_dtype_and_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    real = launch.launch

    def counted(kernel: Any, *args: Any, **meta: Any) -> None:
        calls.append(kernel)
        real(kernel, *args, **meta)

    monkeypatch.setattr(sparse_ops, "launch", counted)
    params = [rand(8, 32, seed=i).bfloat16() for i in range(4)] + [rand(9), rand(6, 4).t()]
    lists = [masked(p, 5) for p in params]
    lists[1] = (lists[1][0][:0], lists[1][1][:0])  # nothing of it moves
    indices, shadows = [i for i, _ in lists], [s for _, s in lists]
    args = (SEEDS, COEFFS[0], None, list(range(6)), "rademacher")
    copies = [p.clone() for p in params], [s.clone() for s in shadows]
    sparse_ops.sparse_update_(params, indices, shadows, *args)
    reference.sparse_update_(copies[0], indices, copies[1], *args)
    for got, want in zip([*params, *shadows], [*copies[0], *copies[1]], strict=True):
        assert torch.equal(got, want)
    assert len(calls) == 3
    known = len(tables._groups)
    sparse_ops.sparse_update_(params, indices, shadows, *args)
    assert len(calls) == 6 and len(tables._groups) == known  # the same tables again
    monkeypatch.setattr(tables, "recording", lambda device: True)
    with pytest.raises(RuntimeError, match="once with the same tensors before capturing"):
        sparse_ops.sparse_update_(params[:2], indices[:2], shadows[:2], *args[:3], [0, 1], args[4])
    sparse_ops.sparse_update_(params, indices, shadows, *args)


def test_lists_and_shadows_of_any_strides() -> None:
    w = rand(6, 40)
    indices, shadow = masked(w, 20)
    apart, apart_s = torch.zeros(20, 2).long(), torch.zeros(20, 3)
    apart[:, 1], apart_s[:, 0] = indices, shadow
    args = (SEEDS, COEFFS[0], None, [PID], "rademacher")
    got = w.clone()
    sparse_ops.sparse_update_([got], [apart[:, 1]], [apart_s[:, 0]], *args)
    reference.sparse_update_([w], [indices], [shadow], *args)
    assert torch.equal(got, w) and torch.equal(apart_s[:, 0], shadow)


def test_a_skipped_step_changes_nothing_not_even_the_sign_of_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.tensor([-0.0, 0.0, 1e-7, -3.0], dtype=dtype).repeat(150)
        bits = w.view(torch.int16 if dtype.itemsize == 2 else torch.int32).clone()
        indices, shadow = torch.arange(600), w.float()
        for decay in (None, torch.ones(2)):
            args = (SEEDS, torch.zeros(2), decay, [PID], "gaussian")
            sparse_ops.sparse_update_([w], [indices], [shadow], *args)
            assert torch.equal(w.view(bits.dtype), bits)
            assert torch.equal(shadow.view(torch.int32), w.float().view(torch.int32))


def test_sixty_four_bit_addresses() -> None:
    """Rows further apart than an int32 of elements; only their own pages are ever touched."""
    far = (1 << 31) + 64
    memory = torch.empty(far + 1024, dtype=torch.float16)
    apart = memory.as_strided((2, 300), (far, 1))
    apart.copy_(rand(2, 300).half())
    small = apart.contiguous()
    indices, shadow = masked(small, 50)
    across = torch.where(indices >= 300, indices - 300 + far, indices)
    args = (SEEDS, COEFFS, PID, 0, "rademacher")
    want = reference.sparse_displace(small, indices, shadow, *args)
    assert torch.equal(sparse_ops.sparse_displace(apart, indices, shadow, *args), want)
    assert torch.equal(sparse_ops.sparse_displace(memory, across, shadow, *args), want)
    update = (SEEDS, COEFFS[0], None, [PID], "rademacher")
    reference.sparse_update_([small], [indices], [shadow.clone()], *update)
    sparse_ops.sparse_update_([memory], [across], [shadow], *update)
    assert torch.equal(apart, small)


# --- what no kernel can raise ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 40])
def test_a_bad_index_gives_nan_and_an_error(bad: int) -> None:
    w = rand(4, 10)
    indices, shadow = torch.tensor([1, 7, bad]).sort().values, torch.zeros(3)
    rest = (indices, shadow, SEEDS, COEFFS, PID, 0, "rademacher")
    out = sparse_ops._displaced(w, *rest)
    assert torch.equal(out.isnan(), (indices == bad).expand(2, 3))
    before, shades = w.clone(), shadow.clone()
    calls: list[Callable[[], object]] = [
        lambda: launch.raise_errors("cpu"),
        lambda: sparse_ops.sparse_displace(w, *rest),
        lambda: sparse_ops.sparse_linear(rand(2, 3, 10), w, None, *rest, False, False),
        lambda: sparse_ops.sparse_linear(rand(2, 3, 4), w, None, *rest, False, True),
        lambda: sparse_ops.sparse_embedding(torch.tensor([0, 3]), w, *rest, True),
        lambda: sparse_ops.sparse_update_(
            [w], [indices], [shadow], SEEDS, COEFFS[0], None, [PID], "rademacher"
        ),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=rf"must be in \[0, 40\); got {bad}"):
            call()
    launch.raise_errors("cpu")  # raised once
    good = indices[indices != bad]
    left = torch.ones(40, dtype=torch.bool)
    left[good] = False
    assert torch.equal(w.view(-1)[left], before.view(-1)[left])
    assert torch.equal(shadow[indices == bad], shades[indices == bad])


def test_a_bad_id_gives_nan_and_an_error() -> None:
    w = rand(4, 10)
    indices, shadow = masked(w, 12)
    args = (w, indices, shadow, SEEDS, COEFFS, PID, 0, "rademacher")
    with pytest.raises(IndexError, match=r"must be in \[0, 4\); got 9"):
        sparse_ops.sparse_embedding(torch.tensor([0, 9]), *args, True)
    with pytest.raises(IndexError, match=r"must be in \[0, 0\)"):
        sparse_ops.sparse_embedding(
            torch.tensor([0]), w[:0], indices[:0], shadow[:0], *args[3:], True
        )


class NothingWaits(TorchDispatchMode):
    """Fails where torch would wait for a device to learn a number or a size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(
            word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select")
        ), name
        return func(*args, **(kwargs or {}))


def test_no_op_waits_for_the_device() -> None:
    w, ids = rand(20, 30), torch.tensor([[1, 2], [2, 3]])
    indices, shadow = masked(w, 40)
    rest = (indices, shadow, SEEDS, COEFFS, PID, 0, "gaussian")
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingWaits():
        reference.sparse_displace(w, *rest)
    with NothingWaits():
        sparse_ops.sparse_displace(w, *rest)
        sparse_ops.sparse_linear(rand(2, 3, 30), w, rand(2, 20), *rest, False, False)
        sparse_ops.sparse_linear(rand(80, 20), w, None, *rest, True, True)
        sparse_ops.sparse_embedding(ids, w, *rest, False)
        sparse_ops.sparse_update_(
            [w], [indices], [shadow], SEEDS, COEFFS[0], None, [PID], "gaussian"
        )


def test_steps_of_a_model_under_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that stay on the device, against the reference's."""
    monkeypatch.setattr(zo.MeZO, "_stays_on_device", lambda self: True)
    ids = torch.tensor([[1, 4, 1], [0, 9, 3]])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()

    def made() -> tuple[nn.Module, zo.Mask]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 7), nn.LayerNorm(7))
        return model, zo.Mask.random(model, 0.3, seed=2, params=lambda name, p: True)

    def run(backend: str) -> tuple[dict[str, Tensor], Tensor]:
        model, mask = made()
        opt = zo.MeZO(model, lr=1e-2, eps=1e-2, distribution="rademacher", mask=mask)
        with _registry.use_backend(backend):
            for _ in range(2):
                opt.step(ids, loss)
        return dict(model.named_parameters()), torch.tensor(opt.last.projected_gradients)

    (got, g), (want, h) = run("triton"), run("reference")
    torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4)
    before, mask = made()
    for name, start in before.named_parameters():
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)
        left = torch.ones(start.numel(), dtype=torch.bool)
        left[mask.indices[name]] = False
        assert torch.equal(got[name].view(-1)[left], start.view(-1)[left])
        moved = got[name].view(-1)[~left] != start.view(-1)[~left]
        assert bool(moved.all())
