"""How a graph is recorded: on which stream and device, and what is left when that fails.

No CUDA device takes part: torch.cuda is a stand-in that writes down what is asked of it.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokernels as zo
from zokernels import deferred, graphs


class FakeStream:
    def __init__(self, device: int) -> None:
        self.device = device
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """``torch.cuda`` with two devices; ``broken``: what the end of a capture raises."""
    main = [FakeStream(0), FakeStream(1)]
    state = SimpleNamespace(current=main[0], main=main, device=0, modes=[], broken=None, replays=0)

    class Graph:
        def replay(self) -> None:
            state.replays += 1

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        before, state.current = state.current, stream
        try:
            yield
        finally:
            state.current = before

    class Capture:
        """As torch's: where the capture cannot be ended, the stream is not given back."""

        def __init__(self, graph: Graph, *, stream: FakeStream, capture_error_mode: str) -> None:
            state.modes.append(capture_error_mode)
            self.stream = on(stream)

        def __enter__(self) -> None:
            self.stream.__enter__()

        def __exit__(self, *error: Any) -> None:
            if state.broken is not None:
                raise state.broken
            self.stream.__exit__(None, None, None)

    stand_ins: dict[str, Any] = {
        "current_stream": lambda device=None: state.current,
        "set_stream": lambda stream: setattr(state, "current", stream),
        "current_device": lambda: state.device,
        "Stream": FakeStream,
        "stream": on,
        "CUDAGraph": Graph,
        "graph": Capture,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs._stream.cache_clear()
    yield state
    graphs._stream.cache_clear()


def test_warm_up_and_capture_are_on_a_stream_of_the_current_device(cuda: SimpleNamespace) -> None:
    seen: list[FakeStream] = []

    def run() -> Tensor:
        seen.append(cuda.current)
        return torch.ones(())

    for device in (0, 1):
        cuda.device, cuda.current = device, cuda.main[device]
        for _ in range(2):  # one stream a device, however many graphs: each has a workspace
            replay, output = graphs.record(run, run)
        assert len({id(s) for s in seen}) == 1
        assert seen[0].device == device and seen[0] is not cuda.main[device]
        assert seen[0].waited == [cuda.main[device]] * 2
        assert cuda.main[device].waited == [seen[0]] * 2
        assert cuda.current is cuda.main[device]
        seen.clear()
    replay()
    assert cuda.replays == 1 and output.item() == 1
    assert set(cuda.modes) == {"thread_local"}


@pytest.mark.parametrize("when", ["warm up", "run", "end"])
def test_what_fails_says_why_and_leaves_the_stream(cuda: SimpleNamespace, when: str) -> None:
    def fails(at: str) -> Any:
        def run() -> Tensor:
            if when == at:
                raise ValueError(f"in the {at}")
            return torch.ones(())

        return run

    if when != "warm up":
        cuda.broken = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        graphs.record(fails("run"), fails("warm up"))
    want = "previous error during capture" if when == "end" else f"in the {when}"
    assert want in str(caught.value)
    assert cuda.current is cuda.main[0]


def test_the_losses_are_waited_for_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device may be another one, whose stream has nothing to wait for."""
    recorded: list[object] = []

    class Event:
        def record(self, stream: object) -> None:
            recorded.append(stream)

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 1)  # type: ignore[assignment]

    streams = {torch.device("cuda", i): f"stream of {i}" for i in range(2)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[device])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **k: empty(*shape, **k))
    values = torch.tensor([1.0, 2.0]).as_subclass(OnCuda)
    deferred.Fetch(values)
    assert recorded == ["stream of 1"]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def loss_fn(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(run: Any, warm_up: Any) -> tuple[Any, Tensor]:
        warm_up()
        output = torch.empty(2)
        return (lambda: output.copy_(run())), output

    monkeypatch.setattr(zo.MeZO, "_stays_on_device", lambda self: True)
    monkeypatch.setattr(graphs, "record", again)


def test_a_graph_keeps_what_only_the_optimizer_holds(graphed: None) -> None:
    opt = zo.MeZO(Toy(), lr=1e-2)
    step = graphs.GraphedStep(opt, torch.ones(2, 4), loss_fn)
    tables = [weakref.ref(t) for t in opt._tables.values()]
    assert tables
    opt.load_state_dict(opt.state_dict())  # its tables are made again when they are needed
    assert not opt._tables
    assert all(t() is not None for t in tables)
    step(torch.ones(2, 4))


CHANGED: dict[str, Any] = {
    "clip": 0.5,
    "distribution": "rademacher",
    "estimator": "forward",
    "num_directions": 2,
    "rounding": "nearest",
    "nonfinite": "raise",
    "max_branches": 1,
    "sequential": True,
    "fuse_update": True,
}


@pytest.mark.parametrize("name", CHANGED)
def test_options_that_a_replay_would_not_follow_are_noticed(graphed: None, name: str) -> None:
    net = Toy()
    opt = zo.MeZO(net, lr=1e-2)
    step = graphs.GraphedStep(opt, torch.ones(2, 4), loss_fn)
    step()
    before = net.linear.weight.detach().clone()
    had = getattr(opt, name)
    setattr(opt, name, CHANGED[name])
    with pytest.raises(ValueError, match=f"^{name} was .* at the capture"):
        step()
    assert torch.equal(net.linear.weight, before) and opt.num_steps == 1
    setattr(opt, name, had)
    step()


def test_the_state_of_another_run_and_another_mode_are_noticed(graphed: None) -> None:
    net = Toy()
    opt = zo.MeZO(net, lr=1e-2)
    step = graphs.GraphedStep(opt, torch.ones(2, 4), loss_fn)
    net.eval()
    with pytest.raises(ValueError, match=r"model\.training was True"):
        step()
    net.train()
    opt.load_state_dict(zo.MeZO(Toy(), lr=1e-2, seed=5).state_dict())
    step()  # a seed is an input
    opt.load_state_dict(zo.MeZO(Toy(), lr=1e-2, clip=0.1).state_dict())
    with pytest.raises(ValueError, match=r"clip was None at the capture and is 0\.1"):
        step()


def test_losses_are_exchanged_before_the_recording(
    graphed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks connect at their first exchange, which a graph cannot hold."""
    exchanged: list[int] = []

    def reduce(self: zo.MeZO, losses: Tensor) -> Tensor:
        exchanged.append(losses.numel())
        return losses

    monkeypatch.setattr(zo.MeZO, "_reduce_losses", reduce)
    net = Toy()
    before = net.linear.weight.detach().clone()
    step = graphs.GraphedStep(zo.MeZO(net, lr=1e-2), torch.ones(2, 4), loss_fn)
    count = len(exchanged)
    assert count and torch.equal(net.linear.weight, before)
    step()
    assert len(exchanged) == count + 1 and not torch.equal(net.linear.weight, before)


@pytest.mark.filterwarnings("ignore::zokernels.StackingWarning")
def test_a_model_that_cannot_be_stacked_is_refused(graphed: None) -> None:
    net = nn.Sequential(Toy(), nn.BatchNorm1d(3)).train()
    opt = zo.MeZO(net, lr=1e-2)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="branches cannot be stacked"):
        graphs.GraphedStep(opt, torch.randn(4, 4), lambda m, x: m(x).square().mean())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_what_fails_while_a_graph_is_recorded_is_not_tried_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Toy()
    view = zo.branches(net, [1], [[1e-2], [-1e-2]])
    x = torch.ones(2, 4)
    view(lambda: loss_fn(net, x))

    def reads() -> Tensor:
        return loss_fn(net, x) * float(loss_fn(net, x))

    monkeypatch.setattr(sys.modules["zokernels.branches"], "recording", lambda device: True)
    with pytest.raises(RuntimeError, match=r"item\(\)"):
        view(reads)
    assert view.stacked
