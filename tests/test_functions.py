"""Custom autograd functions in a stacked evaluation."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import zokernels as zo
from zokernels.functions import forward_alone

PAIR = [[0.05], [-0.05]]
X = torch.linspace(-1, 1, 12).reshape(3, 4)
APPLY = Function.__dict__["apply"]


class Quantised(Function):
    """As products with quantised weights are written: the context comes first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        assert not any(ctx.needs_input_grad) and ctx.saved_tensors == ()
        return x @ (weight * scale).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing asks for a gradient")


class Separate(Function):
    """The newer form, without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: float = 0.5) -> tuple[Tensor, Tensor]:
        return x @ (weight * scale).T, x.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing asks for a gradient")


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing asks for a gradient")


class ByAddress(Function):
    """As a kernel is called: the memory is read, which a batch of a vmap has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: dict[str, Any]) -> tuple[Tensor, int, Tensor]:
        address = x.contiguous().data_ptr()
        assert address
        out = torch.from_numpy(x.numpy() * factor["by"].numpy())
        return out, 3, x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing asks for a gradient")


class Ruled(Function):
    """A rule of its own, which counts its uses."""

    used = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        Ruled.used += 1
        return x.exp(), dims[0]


class Net(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(4, 4)
        self.register_buffer("fixed", torch.randn(4, 4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.first(x)).square().sum()


class Outer(Function):
    """Its inner function is called with plain tensors where this one is, once a branch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.contiguous().data_ptr()
        return ByAddress.apply(x, {"by": torch.ones(4)})[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing asks for a gradient")


def by_address(h: Tensor, factor: Tensor) -> Tensor:
    out, three, total = ByAddress.apply(h, {"by": factor})
    return out * three + total


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "context first": lambda net, h: Quantised.apply(h, net.fixed, 0.5),
    "moving weight": lambda net, h: Quantised.apply(h, net.first.weight, 0.5),
    "separate context": lambda net, h: sum(Separate.apply(h, net.fixed)),
    "by address": lambda net, h: by_address(h, net.fixed[0]),
    "one in another": lambda net, h: Outer.apply(h),
    "in place": lambda net, h: InPlace.apply(h * 1) + h,
    "own rule": lambda net, h: Ruled.apply(h),
}


@pytest.mark.parametrize("use", USES)
def test_they_stack(use: str) -> None:
    net = Net(USES[use])
    Ruled.used = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        got = zo.branches(net, [1], PAIR)(lambda: net(X))
        again = zo.branches(net, [1], PAIR, sequential=False)(lambda: net(X))
    assert torch.equal(got, again)
    assert Function.__dict__["apply"] is APPLY
    torch.testing.assert_close(got, zo.branches(net, [1], PAIR, sequential=True)(lambda: net(X)))
    assert got[0] != got[1]
    assert Ruled.used == (2 if use == "own rule" else 0)


def test_a_moving_weight_read_by_address_runs_one_branch_after_another() -> None:
    net = Net(lambda net, h: h + ByAddress.apply(net.first.weight, {"by": net.fixed})[2])
    with pytest.warns(zo.StackingWarning, match="one after another"):
        got = zo.branches(net, [1], PAIR)(lambda: net(X))
    torch.testing.assert_close(got, zo.branches(net, [1], PAIR, sequential=True)(lambda: net(X)))


def test_gradients_asked_for_inside_are_torchs_business() -> None:
    class Straight(Function):
        """Its gradient is not that of its forward pass."""

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

        generate_vmap_rule = True

    def loss(net: Any, h: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.func.grad(lambda x: (Straight.apply(x) * x).sum())(h)

    net = Net(loss)
    got = zo.branches(net, [1], PAIR)(lambda: net(X))
    torch.testing.assert_close(got, zo.branches(net, [1], PAIR, sequential=True)(lambda: net(X)))


def test_other_threads_keep_torchs_own() -> None:
    inside, done = threading.Event(), threading.Event()
    found: list[Any] = []

    def other() -> None:
        inside.wait(30)
        try:
            torch.vmap(lambda x: Quantised.apply(x, torch.eye(4), 1.0))(X)
        except RuntimeError as error:
            found.append(error)
        x = X.clone().requires_grad_()
        found.append(Separate.apply(x, torch.eye(4))[0].grad_fn)
        done.set()

    def use(net: Any, h: Tensor) -> Tensor:
        inside.set()
        assert done.wait(30)
        return h

    thread = threading.Thread(target=other)
    thread.start()
    net = Net(use)
    zo.branches(net, [1], PAIR)(lambda: net(X))
    thread.join()
    assert "setup_context" in str(found[0]) and "Separate" in str(found[1])


def test_what_others_put_in_place_of_apply_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(cls.__name__)
        return APPLY.__func__(cls, *args, **kwargs)

    theirs = classmethod(counted)
    monkeypatch.setattr(Function, "apply", theirs)
    net = Net(lambda net, h: Ruled.apply(h))
    zo.branches(net, [1], PAIR)(lambda: net(X))
    assert Function.__dict__["apply"] is theirs
    assert set(seen) == {"Ruled"}


def test_it_ends_with_the_evaluation_whatever_happens() -> None:
    with pytest.raises(ZeroDivisionError), forward_alone():
        with forward_alone():
            assert Function.__dict__["apply"] is not APPLY
        assert Function.__dict__["apply"] is not APPLY
        raise ZeroDivisionError
    assert Function.__dict__["apply"] is APPLY
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.vmap(lambda x: Quantised.apply(x, torch.eye(4), 1.0))(X)
