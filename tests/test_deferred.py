"""Steps whose numbers stay on the device: the same run, bit for bit, and nothing waits for it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_zoo as mz
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import zokernels as zo
from zokernels import deferred, graphs


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Make optimizers keep their numbers on the (CPU) device; losses arrive only when asked for."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(zo.MeZO, "_stays_on_device", lambda self: on)
        monkeypatch.setattr(deferred.Fetch, "ready", property(lambda self: False))

    return switch


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def loss_fn(net: nn.Module, batch: tuple[Tensor, float]) -> Tensor:
    x, spoil = batch
    return net(x).float().square().mean() * spoil


def batches(dtype: torch.dtype, steps: int, bad: tuple[int, ...]) -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, generator=generator).to(dtype), float("nan") if i in bad else 1.0)
        for i in range(steps)
    ]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "directions": {"num_directions": 3, "distribution": "rademacher"},
    "forward": {"estimator": "forward", "num_directions": 2, "weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "momentum_window": 3, "num_directions": 2},
    "clip": {"clip": 0.05, "momentum": 0.5, "momentum_window": 2, "weight_decay": 0.01},
    "beyond float32": {"lr": 1e38, "eps": 1e-6},
    "in parts": {"num_directions": 2, "max_branches": 3},
    "mask": {"mask": 0.5, "num_directions": 2, "weight_decay": 0.1, "momentum": 0.5},
}


def masked(net: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Options with a mask of this density of every parameter, where they ask for one."""
    if "mask" not in options:
        return options
    mask = zo.Mask.random(net, options["mask"], seed=2, params=lambda name, p: True)
    return {**options, "mask": mask}


def run(case: str, dtype: torch.dtype, bad: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    net = Toy(dtype)
    journal = zo.Trajectory()
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 7, **masked(net, CASES[case])}
    opt = zo.MeZO(net, journal=journal, **options)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returned = []
        for batch in batches(dtype, 7, bad):
            returned.append(opt.step(batch, loss_fn))
            schedule.step()
        return {
            "weights": {n: p.detach().clone() for n, p in net.named_parameters()},
            "returned": torch.stack(returned),
            "last": repr(opt.last),
            "skipped": opt.skipped,
            "state": repr(opt.state_dict()),
            "journal": [repr(step) for step in journal],
            "trajectory": journal,
            "mask": options.get("mask"),
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_same_run_bit_for_bit(
    on_device: Callable[[bool], None], case: str, dtype: torch.dtype
) -> None:
    on_device(False)
    host = run(case, dtype)
    on_device(True)
    device = run(case, dtype)
    assert host["skipped"] >= 2
    for what in ("last", "skipped", "state", "journal"):
        assert device[what] == host[what], what
    torch.testing.assert_close(device["returned"], host["returned"], rtol=0, atol=0, equal_nan=True)
    for name, weight in host["weights"].items():
        assert torch.equal(device["weights"][name], weight), name
    fresh = Toy(dtype)
    device["trajectory"].replay_(fresh, mask=device["mask"])
    for name, p in fresh.named_parameters():
        assert torch.equal(p, host["weights"][name]), name


def test_groups_and_a_group_added_later(on_device: Callable[[bool], None]) -> None:
    def go() -> tuple[Any, ...]:
        net = Toy(torch.bfloat16)
        named = dict(net.named_parameters())
        groups = [
            {"params": [("first.weight", named["first.weight"])], "lr": 1e-2, "weight_decay": 0.5},
            {"params": [("norm.weight", named["norm.weight"])], "eps": 5e-3, "lr": 0.0},
        ]
        journal = zo.Trajectory()
        opt = zo.MeZO(
            groups, model=net, lr=1e-3, eps=1e-2, momentum=0.9, momentum_window=4, journal=journal
        )
        data = batches(torch.bfloat16, 6, (1,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in data[:3]:
                opt.step(batch, loss_fn)
            opt.add_param_group({"params": [("last.weight", named["last.weight"])], "lr": 2e-2})
            for batch in data[3:]:
                opt.step(batch, loss_fn)
        return [p.detach().clone() for p in net.parameters()], [repr(s) for s in journal], opt.last

    on_device(False)
    weights, journal, last = go()
    on_device(True)
    others = go()
    assert others[1:] == (journal, last)
    assert all(torch.equal(a, b) for a, b in zip(weights, others[0], strict=True))


def test_what_is_pending_is_there_when_it_is_asked_for(
    on_device: Callable[[bool], None], tmp_path: Path
) -> None:
    on_device(True)
    net, data = Toy(torch.float32), batches(torch.float32, 4, (3,))
    path = tmp_path / "run.zo"
    with zo.Trajectory.open(path) as journal:
        opt = zo.MeZO(net, lr=1e-2, eps=1e-2, journal=journal)
        for batch in data[:3]:
            opt.step(batch, loss_fn)
        assert len(opt._pending) == 3
        assert len(pickle.loads(pickle.dumps(journal))) == 3  # a copy has what is pending
        assert not opt._pending and journal.pending is None
        with pytest.warns(UserWarning, match="step 3: losses .*not finite"):
            opt.step(data[3], loss_fn)
            assert opt.num_steps == 4  # does not wait
            assert opt.skipped == 1  # does
        opt.step(data[0], loss_fn)
        assert len(opt._pending) == 1
    assert len(zo.Trajectory.load(path)) == 5  # closing wrote it
    assert copy.deepcopy(opt).last == opt.last


def test_losses_that_have_arrived_are_written_down(
    on_device: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(True)
    monkeypatch.setattr(deferred.Fetch, "ready", property(lambda self: True))
    opt = zo.MeZO(Toy(torch.float32), lr=1e-2, eps=1e-2)
    for batch in batches(torch.float32, 5, ()):
        opt.step(batch, loss_fn)
        assert len(opt._pending) == 1


class NoWaiting(TorchDispatchMode):
    """Refuses operators that read a value back to the host."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if any(name == read or name.startswith("_" + read) for read in self.READS):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Refuses Python's ways to a value."""

    READS = tuple(
        getattr(Tensor, name)
        for name in "item tolist numpy cpu __bool__ __float__ __int__ __index__ __array__".split()
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.READS:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def masks_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a graph is recorded: else transformers reads causal masks, also those it makes."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)


@pytest.mark.parametrize("kind", ["opt", "llama", "roberta"])
@pytest.mark.parametrize("extra", [{}, {"momentum": 0.5}, {"mask": 0.1}], ids=str)
def test_a_step_does_not_wait(
    on_device: Callable[[bool], None], masks_unread: None, kind: str, extra: dict[str, Any]
) -> None:
    on_device(True)
    model, batch = mz.build(kind), mz.lm_batch()
    batch.pop("attention_mask", None)  # transformers looks at a mask's values
    options = {"num_directions": 2, "clip": 1.0, "momentum_window": 2, **masked(model, extra)}
    opt = zo.MeZO(model, lr=1e-3, eps=1e-3, **options)
    opt.step(batch)  # the first one compares stacked and single evaluations
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with NoWaiting(), NoReading():
        for _ in range(3):
            opt.step(batch)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert opt.skipped == 0 and opt.num_steps == 4


def test_the_modes_notice_what_waits() -> None:
    value = torch.ones(())
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        value.item()
    with NoReading(), pytest.raises(AssertionError, match="waits"):
        value.tolist()
    opt = zo.MeZO(Toy(torch.float32), lr=1e-2, eps=1e-2)
    (batch,) = batches(torch.float32, 1, ())
    opt.step(batch, loss_fn)
    with NoWaiting(), NoReading(), pytest.raises(AssertionError, match="waits"):
        opt.step(batch, loss_fn)  # on the CPU a step reads its losses


def replayed(
    run: Callable[[], Tensor], warm_up: Callable[[], None]
) -> tuple[Callable[[], None], Tensor]:
    """What stands for a CUDA graph here: the same work again, into the same output."""
    warm_up()
    with NoWaiting(), NoReading():
        output = torch.empty(2)

    def replay() -> None:
        with NoWaiting(), NoReading():
            output.copy_(run())

    return replay, output


@pytest.mark.parametrize("extra", [{}, {"mask": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["toy", "opt"])
def test_a_graph_of_a_step_is_the_step(
    on_device: Callable[[bool], None],
    masks_unread: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    extra: dict[str, Any],
) -> None:
    on_device(True)
    monkeypatch.setattr(graphs, "record", replayed)
    loss = loss_fn if kind == "toy" else None

    def data() -> list[Any]:
        if kind == "toy":
            spoiled = [torch.tensor(s) for s in (1.0, 1.0, float("nan"), 1.0)]
            return [
                (x, s) for (x, _), s in zip(batches(torch.float32, 4, ()), spoiled, strict=True)
            ]
        return [{k: v for k, v in mz.lm_batch().items() if k != "attention_mask"}] * 4

    def go(graphed: bool) -> tuple[Any, ...]:
        net = Toy(torch.float32) if kind == "toy" else mz.build("opt")
        journal = zo.Trajectory()
        options = {"weight_decay": 0.1, "clip": 1.0, **masked(net, extra)}
        opt = zo.MeZO(net, lr=1e-2, eps=1e-2, journal=journal, **options)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        step = graphs.GraphedStep(opt, data()[0], loss) if graphed else None
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, batch in enumerate(data()):
                opt.param_groups[0]["lr"] = 1e-2 / (i + 1)
                if step is None or i == 1:  # both can be mixed
                    opt.step(batch, loss)
                else:
                    step(batch)
            lines = [repr(s) for s in journal]
        return [p.detach().clone() for p in net.parameters()], lines, repr(opt.last), opt.skipped

    weights, *rest = go(False)
    others, *same = go(True)
    assert same == rest
    assert rest[2] == (1 if kind == "toy" else 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("bad", [(), (2,)], ids=["", "skipped"])
def test_momentum_that_is_switched_on_counts_the_same_steps(
    on_device: Callable[[bool], None], bad: tuple[int, ...]
) -> None:
    """Steps without momentum end the window, also while their losses are on their way."""

    def go(on: bool) -> tuple[str, list[str], list[Tensor]]:
        on_device(on)
        net, journal = Toy(torch.float32), zo.Trajectory()
        opt = zo.MeZO(net, lr=1e-2, eps=1e-2, momentum=0.9, momentum_window=3, journal=journal)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, batch in enumerate(batches(torch.float32, 6, bad)):
                opt.param_groups[0]["momentum"] = 0.0 if i in (1, 2) else 0.9
                opt.step(batch, loss_fn)
        lines = [repr(step) for step in journal]
        return repr(opt.state_dict()), lines, [p.detach().clone() for p in net.parameters()]

    state, lines, weights = go(False)
    same, others, moved = go(True)
    assert (same, others) == (state, lines)
    assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))


def test_what_a_graph_cannot_do(
    on_device: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(False)
    monkeypatch.setattr(graphs, "record", replayed)
    (batch,) = batches(torch.float32, 1, ())
    net = Toy(torch.float32)
    with pytest.raises(ValueError, match="must keep its steps on one CUDA device"):
        graphs.GraphedStep(zo.MeZO(net), batch, loss_fn)
    on_device(True)
    with pytest.raises(ValueError, match="momentum 0"):
        graphs.GraphedStep(zo.MeZO(net, momentum=0.5), batch, loss_fn)
    with pytest.raises(ValueError, match="must not be sequential"):
        graphs.GraphedStep(zo.MeZO(net, sequential=True), batch, loss_fn)
    opt = zo.MeZO(net, lr=1e-3)
    step = graphs.GraphedStep(opt, batch, loss_fn)
    for other in ((batch[0][:2], 1.0), (batch[0].double(), 1.0), (batch[0], 2.0), batch[0]):
        with pytest.raises(ValueError, match="batch must have"):
            step(other)
    opt.param_groups[0]["eps"] = 0.5
    with pytest.raises(ValueError, match="eps was changed"):
        step(batch)
    opt.param_groups[0]["eps"] = 1e-3
    net.last.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad was changed"):
        step(batch)
    net.last.weight.requires_grad_(True)
    held = net.norm.weight.data
    net.norm.weight.data = held.clone()
    with pytest.raises(ValueError, match="given other memory after the capture"):
        step(batch)
    assert opt.num_steps == 0
    net.norm.weight.data = held
    step(batch)
    assert opt.num_steps == 1
