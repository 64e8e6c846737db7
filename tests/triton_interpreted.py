"""What the Triton backend does beyond the conformance suite, run by test_triton_interpreter.py.

Triton decides when its kernels are decorated whether they are interpreted, so these tests run in a
process of their own with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

from zokernels import _registry, reference
from zokernels.planner import plan_linear
from zokernels.triton import backend, devices, launch, tables
from zokernels.triton.plan import Plan, Tiles

PID = 77


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(*values: float) -> Tensor:
    return torch.tensor([[v] for v in values])


def exact_product(x: Tensor, w: Tensor, c: Tensor, seeds: Tensor) -> Tensor:
    z = reference.sample(*w.shape, seeds[0], PID, 0, 0, "gaussian").double()
    return torch.stack(
        [F.linear(x[g].double(), w.double() + c[g, 0].double() * z) for g in range(c.shape[0])]
    )


def product(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    seeds = torch.tensor([5])
    return backend.linear(x, w, None, seeds, c, PID, 0, 0, "gaussian", False, False)


def test_it_serves_cpu_tensors_here_and_every_op() -> None:
    found = _registry.backends()["triton"]
    assert found.reason is None and found.serves("cpu")
    assert set(found.kernels) == set(reference.KERNELS)


@pytest.mark.parametrize(("rows", "splits"), [(16, 1), (16, 3), (64, 2)])
def test_a_product_is_the_same_in_any_tiles(
    monkeypatch: pytest.MonkeyPatch, rows: int, splits: int
) -> None:
    """Tiles as a GPU gets them, split sums included."""
    x, w, c = rand(2, 5, 600), rand(70, 600, seed=2), table(0.1, -0.1)
    chosen = Plan(True, Tiles(64, rows, 16, 4, 1), splits, 70, 1, 0.0, 0, 0, 0)
    monkeypatch.setattr(backend, "_plan", lambda *a: chosen)
    monkeypatch.setattr(backend, "_choices", lambda chosen, w, transposed: [chosen.tiles])
    want = exact_product(x, w, c, torch.tensor([5]))
    got = product(x, w, c)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, product(x, w, c))


def no_room(limit: int) -> Callable[..., Any]:
    """A launch that fails for tiles with more outputs than ``limit``."""
    real = launch.launch

    def run(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        if meta.get("OUT", 0) > limit:
            raise OutOfResources(200_000, 100_000, "shared memory")
        real(kernel, grid, *args, **meta)

    return run


def test_a_launch_that_does_not_fit_gets_smaller_tiles_and_is_reported_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, c = rand(2, 3, 40), rand(20, 40, seed=2), table(0.1, -0.1)
    tiles = [Tiles(128, 16, 64, 8, 3), Tiles(64, 16, 64, 4, 1)]
    monkeypatch.setattr(backend, "_choices", lambda *a: tiles)
    monkeypatch.setattr(backend, "_reported", set())
    want = exact_product(x, w, c, torch.tensor([5]))
    for limit, words in ((64, "outputs=64"), (32, "the vendor's product")):
        monkeypatch.setattr(backend, "_reported", set())
        monkeypatch.setattr(backend, "launch", no_room(limit))
        with pytest.warns(backend.LaunchWarning, match=words):
            got = product(x, w, c)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            product(x, w, c)


# --- an update that the next product makes --------------------------------------------------------


def pending_case(
    dtype: torch.dtype, tokens: int = 3, cols: int = 600, decay: bool = True
) -> tuple[Tensor, Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """Weight, activations, the probe and the pending update."""
    w, x = rand(70, cols, dtype=dtype), rand(2, tokens, cols, dtype=dtype, seed=2)
    probe = (torch.tensor([5]), table(0.1, -0.1))
    factor = torch.tensor([0.9, 1.0]) if decay else None
    return w, x, probe, (torch.tensor([8, 9]), torch.tensor([0.1, 0.0]), factor)


def apart(
    w: Tensor, x: Tensor, probe: tuple[Any, ...], last: tuple[Any, ...], rounding: str
) -> tuple[Tensor, Tensor]:
    """The update, then the product."""
    w = w.clone()
    backend.update_([w], *last, None, [PID], [3], [300], "gaussian", rounding)
    return w, backend.linear(x, w, None, *probe, PID, 3, 300, "gaussian", False, False)


def at_once(
    w: Tensor, x: Tensor, probe: tuple[Any, ...], last: tuple[Any, ...], rounding: str
) -> Tensor:
    return backend.update_linear_(
        x, w, None, *probe, *last, rounding, PID, 3, 300, "gaussian", False
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that the products launch."""
    names: list[str] = []
    real = launch.launch

    def noted(kernel: Any, *args: Any, **meta: Any) -> None:
        names.append(kernel.fn.__name__)
        real(kernel, *args, **meta)

    monkeypatch.setattr(backend, "launch", noted)
    return names


@pytest.mark.parametrize(
    ("dtype", "rounding", "decay", "splits"),
    [
        (torch.bfloat16, "stochastic", True, 3),
        (torch.float16, "stochastic", False, 1),
        (torch.float16, "nearest", True, 3),
        (torch.float32, "stochastic", False, 3),
    ],
)
def test_an_update_on_the_way_in_tiles_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    launched: list[str],
    dtype: torch.dtype,
    rounding: str,
    decay: bool,
    splits: int,
) -> None:
    """One pass over the weight, whatever its columns are split into: the same bits."""
    chosen = Plan(True, Tiles(64, 16, 16, 4, 1), splits, 70, 1, 0.0, 0, 0, 0)
    monkeypatch.setattr(backend, "_plan", lambda *a: chosen)
    monkeypatch.setattr(backend, "_choices", lambda chosen, w, transposed: [chosen.tiles])
    w, x, probe, last = pending_case(dtype, cols=300, decay=decay)
    want_w, want = apart(w, x, probe, last, rounding)
    launched.clear()
    version = w._version
    got = at_once(w, x, probe, last, rounding)
    assert launched == ["linear_kernel"] + (["reduce_kernel"] if splits > 1 else [])
    assert torch.equal(w.view(torch.uint8), want_w.view(torch.uint8))
    assert torch.equal(got, want)
    assert w._version > version


def test_an_update_is_made_first_where_a_weight_would_have_two_writers(
    launched: list[str],
) -> None:
    w, x, probe, last = pending_case(torch.float16, tokens=40)
    want_w, want = apart(w, x, probe, last, "stochastic")
    launched.clear()
    got = at_once(w, x, probe, last, "stochastic")
    assert launched[0] == "update_kernel" and "linear_kernel" in launched
    assert torch.equal(w, want_w) and torch.equal(got, want)
    # Nor is there anything to fuse without rows.
    launched.clear()
    empty = at_once(w, x[:, :0], probe, last, "stochastic")
    assert launched == ["update_kernel"] and empty.shape == (2, 0, 70)


def test_an_update_is_made_once_whatever_does_not_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w, x, probe, last = pending_case(torch.float16)
    tiles = [Tiles(128, 16, 64, 8, 3), Tiles(64, 16, 64, 4, 1)]
    monkeypatch.setattr(backend, "_choices", lambda chosen, w, transposed: tiles)
    for limit, words in ((64, "outputs=64"), (32, "an update and a product")):
        monkeypatch.setattr(backend, "_reported", set())
        monkeypatch.setattr(backend, "launch", no_room(limit))
        want_w, want = apart(w, x, probe, last, "stochastic")
        found = w.clone()
        with pytest.warns(backend.LaunchWarning, match=words):
            got = at_once(found, x, probe, last, "stochastic")
        assert torch.equal(found, want_w) and torch.equal(got, want)


def test_activations_that_require_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is differentiated, and nothing fails for it."""
    monkeypatch.setenv("ZOKERNELS_GPU", "crossover=0")
    x, w = rand(2, 3, 40).requires_grad_(), rand(20, 40, seed=2).requires_grad_()
    probe, place = (torch.tensor([5]), table(0.1, -0.1)), (PID, 0, 0, "gaussian", False)
    bias, targets = rand(2, 20).requires_grad_(), torch.tensor([1, 2, 3])
    want = torch.ops.zokernels.linear(x.detach(), w.detach(), bias.detach(), *probe, *place, False)
    assert torch.equal(torch.ops.zokernels.linear(x, w, bias, *probe, *place, False), want)
    torch.ops.zokernels.linear_cross_entropy(x, w, bias, targets, *probe, *place, -100)


def test_tf32_however_it_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x, w, c = rand(2, 3, 40), rand(20, 40, seed=2), table(0.1, -0.1)
    try:
        for setting, allowed in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = setting
            assert devices.tf32_allowed() is allowed
            product(x, w, c)
            plan_linear(64, 64, tokens=1, device="sm_90")
    finally:
        matmul.fp32_precision = before


def test_sixty_four_bit_addresses() -> None:
    """Rows further apart than an int32 of elements; only their own pages are ever touched."""
    far = (1 << 31) + 64
    memory = torch.empty(far + 1024, dtype=torch.float16)
    w = memory.as_strided((2, 300), (far, 1))
    w.copy_(rand(2, 300, dtype=torch.float16))
    small = w.contiguous()
    seeds, c = torch.tensor([3]), table(0.5)
    rest = (seeds, c, PID, 0, 0, "rademacher", "nearest", None)
    assert torch.equal(backend.displace(w, *rest), reference.displace(small, *rest))
    update = (seeds, c[0], None, None, [PID], [], [], "rademacher", "nearest")
    backend.update_([w], *update)
    reference.update_([small], *update)
    assert torch.equal(w, small)


def test_a_term_of_zero_changes_nothing_not_even_the_sign_of_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.tensor([-0.0, 0.0, 1e-7, -3.0], dtype=dtype).repeat(150)
        bits = w.view(torch.int16 if dtype.itemsize == 2 else torch.int32).clone()
        zeros, ones = torch.zeros(2), torch.ones(2)
        for decay in (None, ones):
            args = (torch.tensor([1, 2]), zeros, decay, None, [PID], [], [], "gaussian")
            backend.update_([w], *args, "stochastic")
            assert torch.equal(w.view(bits.dtype), bits)


def test_many_tensors_go_in_one_launch_a_dtype_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = launch.launch

    def counted(kernel: Any, *args: Any, **meta: Any) -> None:
        calls.append(kernel)
        real(kernel, *args, **meta)

    monkeypatch.setattr(backend, "launch", counted)
    params = [rand(8, 32, dtype=torch.bfloat16) for _ in range(5)] + [rand(3), rand(7)]
    args = (torch.tensor([1]), torch.tensor([0.1]), None, None, list(range(7)), [], [])
    backend.update_(params, *args, "rademacher", "nearest")
    assert len(calls) == 2
    calls.clear()
    known = len(tables._groups)
    backend.update_(params, *args, "rademacher", "nearest")
    assert len(calls) == 2 and len(tables._groups) == known  # the same tables again


def test_tables_of_a_graph_are_made_before_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    p = rand(2, 16)
    args = (torch.tensor([1]), torch.tensor([0.1]), None, None, [PID], [], [], "rademacher")
    monkeypatch.setattr(tables, "recording", lambda device: True)
    before = p.clone()
    with pytest.raises(RuntimeError, match="once with the same tensors before capturing"):
        backend.update_([p], *args, "nearest")
    assert torch.equal(p, before)
    monkeypatch.setattr(tables, "recording", lambda device: False)
    backend.update_([p], *args, "nearest")
    monkeypatch.setattr(tables, "recording", lambda device: True)
    backend.update_([p], *args, "nearest")
    kept = tables._captured[-1]
    tables._groups.clear()
    assert kept[0].tiles == 1


def test_an_inner_product_has_one_order() -> None:
    v = [rand(5, 700), rand(900, seed=2)]
    args = (torch.tensor([1, 2, 3]), [1, 2], [], [], "gaussian")
    assert torch.equal(backend.project(v, *args), backend.project(v, *args))


def test_a_bad_index_gives_nan_and_an_error() -> None:
    w, seeds, c = rand(4, 10), torch.tensor([1]), table(0.1, -0.1)
    out = torch.zeros(2, 3, 10)
    ids = torch.tensor([0, 9, 1])
    backend._rows_of(out, w, ids, True, seeds, c, PID, 0, 0, "gaussian", "nearest")
    assert bool(out[:, 1].isnan().all()) and not bool(out[:, [0, 2]].isnan().any())
    with pytest.raises(IndexError, match=r"must be in \[0, 4\); got 9"):
        backend.synchronize("cpu")
    backend.synchronize("cpu")  # raised once


def test_tensors_out_of_reach_are_refused() -> None:
    with pytest.raises(ValueError, match="needs tensors on cpu; got one on meta"):
        backend.sample(1, 1, torch.empty((), dtype=torch.int64, device="meta"), 0, 0, 0, "gaussian")
    w = rand(2, 3)
    with pytest.raises(ValueError, match="seeds must be on cpu like the weights; got meta"):
        torch.ops.zokernels.displace(
            w, torch.zeros(1, dtype=torch.int64, device="meta"), table(0.1), 0, 0, 0, "gaussian",
            "nearest", None,
        )  # fmt: skip
    with pytest.raises(TypeError, match="w must be float32, bfloat16 or float16"):
        torch.ops.zokernels.displace(
            w.double(), torch.zeros(1).long(), table(0.1), 0, 0, 0, "gaussian", "nearest", None
        )
