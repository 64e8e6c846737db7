"""MeZO as a torch optimizer: the formula, groups, state, schedulers, and every refusal."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import signal
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

import zokernels as zo
from zokernels import noise
from zokernels.binding import ModelChangedError
from zokernels.displacement import UnknownVersionError
from zokernels.groups import param_groups
from zokernels.optim import MeZO, NonFiniteLossError
from zokernels.trajectory import Trajectory
from zokernels.trajectory_format import TrajectoryError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """A small classifier that knows both ways to a loss, and counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1
        h = torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype))))
        logits = self.last(h).float()
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def model(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(8, 6, generator=GENERATOR)
Y = torch.randint(0, 3, (8,), generator=GENERATOR)
BATCH = {"x": X, "labels": Y}


def loss_fn(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(net(x).logits, y)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in net.state_dict().items()}


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    """Bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    assert list(a) == list(b)
    return all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def fma(a: float, b: Tensor, c: Tensor) -> Tensor:
    """One rounding to float32."""
    return (torch.tensor(a, dtype=torch.float32).double() * b.double() + c.double()).float()


def step_seed(seed: int, step: int, direction: int = 0) -> int:
    return noise.derive_seed(seed, step, direction)


def directions(
    net: nn.Module, seed: int, step: int, direction: int = 0, distribution: str = "gaussian"
) -> dict[str, Tensor]:
    key = step_seed(seed, step, direction)
    return zo.directions(net, seed=key, distribution=distribution)


# --- the formula ----------------------------------------------------------------------------------


def plain_mezo_step(
    net: nn.Module, z: dict[str, Tensor], lr: float, eps: float, weight_decay: float
) -> float:
    """Algorithm 1 as its authors run it, in place: +eps, -2 eps, +eps, update."""
    params = dict(net.named_parameters())

    def perturb(scale: float) -> None:
        for name, p in params.items():
            p.add_(z[name].to(p.dtype), alpha=scale)

    with torch.no_grad():
        perturb(eps)
        plus = loss_fn(net, (X.to(torch.float64), Y))
        perturb(-2 * eps)
        minus = loss_fn(net, (X.to(torch.float64), Y))
        perturb(eps)
        g = ((plus - minus) / (2 * eps)).item()
        for name, p in params.items():
            p.sub_(lr * (g * z[name].to(p.dtype) + weight_decay * p))
    return g


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["batch", "loss_fn", "closure"])
def test_follows_plain_mezo(distribution: str, weight_decay: float, mode: str) -> None:
    net, lr, eps = model(), 2e-2, 1e-2
    opt = MeZO(net, lr=lr, eps=eps, weight_decay=weight_decay, distribution=distribution, seed=7)
    # The loop in float64: what is compared is the formula, not two roundings.
    twin = copy.deepcopy(net).double()
    arguments = {
        "batch": (BATCH,),
        "loss_fn": ((X, Y), loss_fn),
        "closure": (lambda: loss_fn(net, (X, Y)),),
    }[mode]
    for step in range(6):
        z = directions(net, 7, step, distribution=distribution)
        g = plain_mezo_step(twin, z, lr, eps, weight_decay)
        opt.step(*arguments)
        assert opt.projected_gradients[0][0] == pytest.approx(g, abs=3e-5 * (step + 1), rel=1e-4)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, atol=1e-5 * (step + 1), rtol=1e-4, msg=name)


@pytest.mark.parametrize("directions_per_step", [1, 3])
def test_the_update_is_one_fused_sum(directions_per_step: int) -> None:
    net, lr, decay = model(), 1e-2, 0.25
    opt = MeZO(net, lr=lr, weight_decay=decay, num_directions=directions_per_step, seed=3)
    for step in range(2):
        expected = {n: p.detach() * (1 - lr * decay) for n, p in net.named_parameters()}
        opt.step(BATCH)
        for k, g in enumerate(opt.projected_gradients[0]):
            z = directions(net, 3, step, k)
            expected = {n: fma(-lr * g / directions_per_step, z[n], w) for n, w in expected.items()}
        for name, p in net.named_parameters():
            assert torch.equal(p, expected[name]), name


def test_losses_seeds_and_counts_of_a_central_step() -> None:
    net = model()
    opt = MeZO(net, num_directions=2, eps=1e-2, seed=9, lr=0.0)
    assert opt.last is None and opt.projected_gradients == ()
    mean = opt.step(BATCH)
    last = opt.last
    assert last.seeds == (step_seed(9, 0, 0), step_seed(9, 0, 1))
    assert last.step == 0 and not last.skipped and opt.num_steps == 1
    assert mean.shape == () and mean.dtype == torch.float32
    assert mean.item() == pytest.approx(sum(last.losses) / 4, rel=1e-6)
    for k in range(2):
        plus, minus = zo.dual_loss(net, BATCH, seed=last.seeds[k], eps=1e-2)
        assert last.losses[2 * k : 2 * k + 2] == pytest.approx(
            (plus.item(), minus.item()), rel=1e-6
        )
        g = (last.losses[2 * k] - last.losses[2 * k + 1]) / 2e-2
        assert last.projected_gradients[0][k] == pytest.approx(g)


def test_forward_estimator() -> None:
    net, eps = model(), 1e-2
    opt = MeZO(net, num_directions=3, eps=eps, estimator="forward", lr=1e-3, seed=2)
    start = weights(net)
    base = loss_fn(net, (X, Y)).item()
    calls = net.calls
    opt.step(lambda: loss_fn(net, (X, Y)))
    assert net.calls - calls == 4
    losses = opt.last.losses
    assert losses[0] == pytest.approx(base, rel=1e-6)
    expected = dict(start)
    for k in range(3):
        g = (losses[k + 1] - losses[0]) / eps
        assert opt.projected_gradients[0][k] == pytest.approx(g)
        z = directions(net, 2, 0, k)
        expected = {n: fma(-1e-3 * g / 3, z[n], w) for n, w in expected.items()}
    assert same(net, expected)


def test_the_closure_is_called_twice_per_direction() -> None:
    net = model()
    opt = MeZO(net, num_directions=3)
    opt.step(lambda: loss_fn(net, (X, Y)))
    assert net.calls == 6
    opt.step(closure=lambda: loss_fn(net, (X, Y)))
    assert net.calls == 12


def test_a_stacked_step_is_one_forward() -> None:
    net = model()
    opt = MeZO(net, num_directions=2, sequential=False)
    opt.step(BATCH)  # the first use compares with one branch at a time
    calls = net.calls
    opt.step(BATCH)
    assert net.calls - calls == 1


@pytest.mark.parametrize("most", [1, 2, 3, 100])
@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_max_branches_splits_the_same_evaluation(most: int, estimator: str) -> None:
    kwargs = {"num_directions": 3, "lr": 1e-2, "seed": 1, "estimator": estimator}
    whole, split = model(), model()
    a, b = MeZO(whole, **kwargs), MeZO(split, max_branches=most, **kwargs)
    for _ in range(2):
        a.step(BATCH)
        b.step(BATCH)
        assert b.last.losses == pytest.approx(a.last.losses, rel=1e-5)


def test_clip_bounds_the_projected_gradient() -> None:
    net, lr = model(), 1e-2
    opt = MeZO(net, lr=lr, clip=0.01, seed=4)
    start = weights(net)
    opt.step(BATCH)
    g = opt.projected_gradients[0][0]
    assert abs(g) > 0.01
    z = directions(net, 4, 0)
    assert same(net, {n: fma(-lr * math.copysign(0.01, g), z[n], w) for n, w in start.items()})


def test_momentum_is_a_sum_over_the_window() -> None:
    net, lr, mu, window = model(), 1e-2, 0.7, 3
    opt = MeZO(net, lr=lr, momentum=mu, momentum_window=window, seed=6, num_directions=2)
    history: list[tuple[float, ...]] = []
    for step in range(5):
        expected = {n: p.detach().clone() for n, p in net.named_parameters()}
        opt.step(BATCH)
        history.append(opt.projected_gradients[0])
        for past in range(max(0, step - window + 1), step + 1):
            for k, g in enumerate(history[past]):
                z = directions(net, 6, past, k)
                c = -lr * mu ** (step - past) / 2 * g
                expected = {n: fma(c, z[n], w) for n, w in expected.items()}
        for name, p in net.named_parameters():
            assert torch.equal(p, expected[name]), (step, name)
    assert len(opt.state_dict()["mezo"]["window"]) == window


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
def test_low_precision_updates_round_once(dtype: torch.dtype, rounding: str) -> None:
    net, lr = model(dtype), 1e-2
    opt = MeZO(net, lr=lr, rounding=rounding, seed=8)
    before = {n: p.detach().float() for n, p in net.named_parameters()}
    opt.step(BATCH)
    z, seed = directions(net, 8, 0), step_seed(8, 0)
    for name, p in net.named_parameters():
        exact = fma(-lr * opt.projected_gradients[0][0], z[name], before[name])
        bits = None
        if rounding == "stochastic":
            shape = noise.matrix_shape(p.shape)
            bits = noise.rounding_bits(*shape, torch.tensor(seed), noise.parameter_id(name), 1)
            bits = bits.reshape(p.shape)
        assert torch.equal(p, noise.round_to(exact, dtype, bits)), name


def test_small_updates_count_with_stochastic_rounding_only() -> None:
    def mean_move(rounding: str) -> float:
        layer = nn.Linear(512, 512, bias=False).to(torch.bfloat16)
        layer.weight.data.fill_(1.0)
        z = directions(layer, 0, 0, distribution="rademacher")["weight"]
        opt = MeZO(layer, lr=1e-4, rounding=rounding, distribution="rademacher")
        # The loss is the mean of w z, so g is 1 up to the rounding of the probes.
        opt.step(lambda: (layer.weight.float() * z).mean())
        assert opt.projected_gradients[0][0] == pytest.approx(1, rel=0.01)
        return (layer.weight.float() - 1).mul(-z).mean().item()

    assert mean_move("nearest") == 0.0
    assert mean_move("stochastic") == pytest.approx(1e-4, rel=0.05)


def test_it_learns() -> None:
    net = model()
    opt = MeZO(net, lr=5e-2, num_directions=2)
    first = loss_fn(net, (X, Y)).item()
    for _ in range(60):
        opt.step(BATCH)
    assert loss_fn(net, (X, Y)).item() < 0.6 * first


def test_accumulation_equals_the_big_batch() -> None:
    whole, parts = model(), model()
    a, b = MeZO(whole, lr=1e-2, eps=1e-2), MeZO(parts, lr=1e-2, eps=1e-2)
    micro = [{"x": X[i : i + 2], "labels": Y[i : i + 2]} for i in range(0, 8, 2)]
    pairs = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 8, 2)]
    for _ in range(2):
        assert b.step(micro).item() == pytest.approx(a.step(BATCH).item(), rel=1e-5)
    assert b.step(pairs, loss_fn).item() == pytest.approx(a.step((X, Y), loss_fn).item(), rel=1e-5)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    # A list of tensors is one batch, as a DataLoader over a TensorDataset collates it.
    assert b.step([X, Y], loss_fn).item() == pytest.approx(a.step((X, Y), loss_fn).item(), rel=1e-4)


def halves() -> list[tuple[Tensor, Tensor]]:
    return [(X[:4], Y[:4]), (X[4:], Y[4:])]


def half_loss(net: nn.Module, batch: Any) -> Tensor:
    return loss_fn(net, batch) / 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_directions": 3, "estimator": "forward", "max_branches": 2},
        {"momentum": 0.9, "clip": 0.1},
        {"fuse_update": True, "weight_decay": 0.1},
        {"sequential": True},
        {"mask": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_losses_make_the_step_of_their_sum(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Bit for bit what a list of micro-batches makes, whose mean is exact here."""
    found = []
    for way in ("list", "accumulate"):
        net, given = model(dtype), dict(options)
        if "mask" in given:
            given["mask"] = zo.Mask.random(net, given["mask"], seed=1)
        journal = Trajectory()
        opt = MeZO(net, lr=1e-2, eps=1e-2, journal=journal, **given)
        losses = []
        for _ in range(3):
            if way == "list":
                losses.append(opt.step(halves(), loss_fn))
                continue
            parts = [opt.accumulate(part, half_loss) for part in halves()]
            losses.append(opt.step())
            torch.testing.assert_close(parts[0] + parts[1], losses[-1])
        opt.flush()
        assert opt.num_steps == 3
        found.append((weights(net), losses, [s.coeffs for s in journal]))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert not same(found[0][0], model(dtype))


def test_accumulate_takes_closures_and_models_without_names() -> None:
    found = []
    for named in (False, True):
        net = model()
        opt = MeZO(list(net.named_parameters()) if named else net, lr=1e-2, eps=1e-2)
        for part in halves():
            opt.accumulate(closure=lambda part=part, net=net: half_loss(net, part))
        opt.step()
        found.append(net)
    torch.testing.assert_close(found[0].state_dict(), found[1].state_dict(), atol=1e-6, rtol=1e-5)


def test_what_was_accumulated_is_dropped_or_refused() -> None:
    net = model()
    opt = MeZO(net, lr=1e-2, eps=1e-2)
    start = weights(net)
    opt.accumulate((X, Y), loss_fn)
    assert opt.num_steps == 0 and same(net, start)
    with pytest.raises(ValueError, match=r"no batch after accumulate\(\)"):
        opt.step((X, Y), loss_fn)
    opt.zero_grad()
    with pytest.raises(TypeError, match="step needs a closure"):
        opt.step()
    for change, back, name in (
        (lambda: opt.param_groups[0].update(eps=2e-2), lambda: None, "eps"),
        (lambda: setattr(opt, "num_directions", 2), lambda: None, "num_directions"),
        (
            lambda: net.norm.requires_grad_(False),
            lambda: net.norm.requires_grad_(),
            "requires_grad",
        ),
        (lambda: opt.load_state_dict(opt.state_dict()), lambda: None, None),
    ):
        opt.accumulate((X, Y), loss_fn)
        change()
        again = [lambda: opt.accumulate((X, Y), loss_fn), opt.step]
        if name is None:
            with pytest.raises(TypeError, match="step needs a closure"):
                opt.step()
            continue
        for call in again:
            with pytest.raises(ValueError, match=f"{name} changed from .* since accumulate"):
                call()
        back()
        opt.zero_grad()
    assert same(net, start) and opt.num_steps == 0


def test_an_error_adds_nothing() -> None:
    net, other = model(), model()
    opt, plain = MeZO(net, lr=1e-2, eps=1e-2), MeZO(other, lr=1e-2, eps=1e-2)
    opt.accumulate((X, Y), loss_fn)
    with pytest.raises(ZeroDivisionError):
        opt.accumulate((X, Y), lambda net, batch: 1 / 0)
    with pytest.raises(TypeError, match="accumulate needs a closure"):
        opt.accumulate()
    opt.step()
    plain.step((X, Y), loss_fn)
    assert same(net, other)


def test_a_non_finite_sum_is_kept_for_whoever_asks() -> None:
    net = model()
    opt = MeZO(net, nonfinite="raise")
    opt.accumulate((X, Y), loss_fn)
    opt.accumulate((X * torch.nan, Y), loss_fn)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError):
            opt.step()
    opt.zero_grad()
    opt.accumulate((X, Y), loss_fn)
    opt.step()
    assert opt.num_steps == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_steps_without_learning_change_no_bit(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight[0] = torch.tensor([-0.0, 0.0, 1e-7, 60000.0])
    start = weights(layer)
    opt = MeZO(layer, lr=0.0, eps=1e-2, distribution="rademacher", momentum=0.5, momentum_window=2)
    x = torch.ones(1, 4, dtype=dtype)
    x[0, 3] = 0
    for _ in range(1000):
        opt.step(x, lambda net, batch: net(batch).float().square().mean())
    assert opt.num_steps == 1000 and opt.skipped == 0
    assert any(opt.projected_gradients[0])
    assert same(layer, start)


# --- groups ---------------------------------------------------------------------------------------


def test_groups_keep_their_own_lr_decay_and_eps() -> None:
    net = model()
    named = dict(net.named_parameters())
    split = [
        {"params": [("first.weight", named["first.weight"])], "lr": 1e-2, "weight_decay": 0.5},
        {"params": [("first.bias", named["first.bias"])], "lr": 3e-2, "eps": 5e-3},
        {"params": [("norm.weight", named["norm.weight"])], "lr": 0.0, "weight_decay": 0.9},
    ]
    start = weights(net)
    opt = MeZO(split, model=net, lr=1e-9, eps=1e-2, seed=5)
    opt.step(BATCH)
    z = directions(net, 5, 0)
    sizes = {"first.weight": 1e-2, "first.bias": 5e-3, "norm.weight": 1e-2}
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        moved.load_state_dict(
            {n: w + sign * sizes[n] * z[n] if n in sizes else w for n, w in start.items()}
        )
        losses.append(loss_fn(moved, (X, Y)).item())
    assert opt.last.losses == pytest.approx(losses, rel=1e-5)
    difference = opt.last.losses[0] - opt.last.losses[1]
    (g0,), (g1,), (g2,) = opt.projected_gradients
    assert g0 == g2 == pytest.approx(difference / 2e-2)
    assert g1 == pytest.approx(difference / 1e-2)
    expected = dict(start)
    expected["first.weight"] = fma(-1e-2 * g0, z["first.weight"], start["first.weight"] * 0.995)
    expected["first.bias"] = fma(-3e-2 * g1, z["first.bias"], start["first.bias"])
    assert same(net, expected)


def test_frozen_parameters_do_not_move_and_can_be_thawed() -> None:
    net = model()
    net.first.requires_grad_(False)
    start = weights(net)
    opt = MeZO(net.named_parameters(), lr=1e-2, model=net)
    opt.step(BATCH)
    moved = {n for n, w in weights(net).items() if not torch.equal(w, start[n])}
    assert moved == {"norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert opt.last.losses != (opt.last.losses[0],) * 2
    net.first.requires_grad_(True)
    opt.step(BATCH)
    assert not torch.equal(net.first.weight, start["first.weight"])
    net.last.requires_grad_(False)
    kept = net.last.weight.detach().clone()
    opt.step(BATCH)
    assert torch.equal(net.last.weight, kept)


def test_a_binding_chooses_whatever_requires_grad_says() -> None:
    net = model().requires_grad_(False)
    binding = zo.Binding(net, ["norm.weight", "last.bias"])
    start = weights(net)
    opt = MeZO(binding, lr=1e-2)
    assert opt._bound is binding
    opt.step(BATCH)
    moved = {n for n, w in weights(net).items() if not torch.equal(w, start[n])}
    assert moved == {"norm.weight", "last.bias"}
    twin, its = copy.deepcopy((net, opt))
    opt.step(BATCH)
    its.step(BATCH)
    assert same(net, twin)


def test_a_tied_weight_has_one_direction() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    net = Tied()
    start = net.embed.weight.detach().clone()
    ids = torch.tensor([0, 3, 1])

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(m(batch), batch)

    opt = MeZO(net.named_parameters(remove_duplicate=False), lr=1e-2, eps=1e-2, model=net)
    assert [len(g["params"]) for g in opt.param_groups] == [1]
    opt.step((ids), loss)
    z = directions(net, 0, 0)
    assert set(z) == {"embed.weight"}
    twin = Tied()
    losses = []
    for sign in (1, -1):
        twin.embed.weight.data = start + sign * 1e-2 * z["embed.weight"]
        losses.append(loss(twin, ids).item())
    assert opt.last.losses == pytest.approx(losses, rel=1e-5)
    g = opt.projected_gradients[0][0]
    assert torch.equal(net.head.weight, fma(-1e-2 * g, z["embed.weight"], start))
    assert net.head.weight is net.embed.weight


def test_add_param_group() -> None:
    net = model()
    named = list(net.named_parameters())
    opt = MeZO(named[:2], lr=1e-2, model=net)
    start = weights(net)
    opt.step(BATCH)
    assert torch.equal(net.last.weight, start["last.weight"])
    opt.add_param_group({"params": net.last.weight, "lr": 5e-3, "eps": 2e-3})
    assert opt.param_groups[1]["param_names"] == ["last.weight"]
    assert opt.param_groups[1]["momentum"] == 0.0
    before = net.last.weight.detach().clone()
    opt.step(BATCH)
    z = directions(net, 0, 1)["last.weight"]
    assert torch.equal(net.last.weight, fma(-5e-3 * opt.projected_gradients[1][0], z, before))
    state = copy.deepcopy(opt.state_dict())
    for group, message in [
        ({"params": [net.last.weight]}, "more than one parameter group"),
        ({"params": [net.last.bias], "lr": -1.0}, "lr must be"),
        ({"params": [nn.Parameter(torch.zeros(2))]}, "does not belong"),
        ({"lr": 1.0}, "must have the key 'params'"),
    ]:
        with pytest.raises(ValueError, match=message):
            opt.add_param_group(group)
    with pytest.raises(TypeError, match="must be a dict"):
        opt.add_param_group([net.last.bias])
    assert opt.state_dict() == state
    opt.step(BATCH)


def test_a_group_that_cannot_be_bound_is_not_added() -> None:
    net = model()
    net.odd = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = MeZO([net.first.weight], model=net)
    with pytest.raises(TypeError, match=r"'odd' has dtype torch\.float64"):
        opt.add_param_group({"params": [net.odd]})
    assert len(opt.param_groups) == 1
    opt.step(BATCH)


# --- ways to say which parameters -----------------------------------------------------------------


def forms(net: nn.Module) -> dict[str, Callable[[], MeZO]]:
    return {
        "module": lambda: MeZO(net, lr=1e-2),
        "binding": lambda: MeZO(zo.Binding(net), lr=1e-2),
        "wrapped": lambda: MeZO(nn.DataParallel(net), lr=1e-2),
        "named": lambda: MeZO(net.named_parameters(), lr=1e-2),
        "named and model": lambda: MeZO(list(net.named_parameters()), lr=1e-2, model=net),
        "bare and model": lambda: MeZO(net.parameters(), lr=1e-2, model=net),
        "groups": lambda: MeZO([{"params": list(net.named_parameters())}], lr=1e-2),
        "bare groups": lambda: MeZO([{"params": net.parameters()}], lr=1e-2, model=net),
        "wrapper's names": lambda: MeZO(
            nn.DataParallel(net).named_parameters(), lr=1e-2, model=nn.DataParallel(net)
        ),
        "helper": lambda: MeZO(param_groups(net, weight_decay=0.0), lr=1e-2, model=net),
    }


@pytest.mark.parametrize("form", list(forms(model())))
def test_every_way_to_name_the_parameters_is_the_same_run(form: str) -> None:
    net, reference = model(), model()
    opt, plain = forms(net)[form](), MeZO(reference, lr=1e-2)
    for _ in range(2):
        opt.step(lambda: loss_fn(net, (X, Y)))
        plain.step(lambda: loss_fn(reference, (X, Y)))
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_named_parameters_without_a_model_survive_a_closure_that_raises() -> None:
    net = model()
    opt = MeZO(net.named_parameters())
    start, places = weights(net), [p.data_ptr() for p in net.parameters()]

    def closure() -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        opt.step(closure)
    assert same(net, start) and places == [p.data_ptr() for p in net.parameters()]
    with pytest.raises(TypeError, match="needs the model"):
        opt.step(BATCH)


@pytest.mark.parametrize("form", ["module", "named"])
def test_a_closure_may_hold_the_parameters_themselves(form: str) -> None:
    net, reference = model(), model()
    opt, plain = forms(net)[form](), MeZO(reference, lr=1e-2)
    weight, bias = net.last.weight, net.last.bias

    def closure() -> Tensor:
        h = torch.tanh(net.norm(net.first(X)))
        return nn.functional.cross_entropy(nn.functional.linear(h, weight, bias), Y)

    for _ in range(3):
        opt.step(closure)
        plain.step(lambda: loss_fn(reference, (X, Y)))
        assert opt.last.losses == pytest.approx(plain.last.losses, rel=1e-4)


@pytest.mark.parametrize("form", ["module", "named"])
def test_both_probes_see_the_same_dropout(form: str) -> None:
    net = model().train()
    opt = forms(net)[form]()
    masks = []

    def closure() -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(64)))
        return loss_fn(net, (X, Y))

    for _ in range(2):
        opt.step(closure)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_split_branches_see_the_same_dropout(estimator: str, width: int) -> None:
    def losses(max_branches: int | None) -> list[tuple[float, ...]]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3)).train()
        opt = MeZO(net, lr=0.0, num_directions=2, estimator=estimator, max_branches=max_branches)
        seen = []
        for _ in range(3):
            opt.step([(X, Y), (X, Y)], lambda n, b: nn.functional.cross_entropy(n(b[0]), b[1]))
            assert opt.last is not None
            seen.append(opt.last.losses)
        return seen

    for split, whole in zip(losses(width), losses(None), strict=True):
        assert split == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("form", ["module", "named"])
@pytest.mark.parametrize(
    "draw", [random.random, lambda: float(np.random.rand())], ids=["python", "numpy"]
)
def test_branches_draw_the_same_numbers_of_python_and_numpy(
    form: str, draw: Callable[[], float]
) -> None:
    net = model()
    opt = forms(net)[form]()
    drawn = []

    def closure() -> Tensor:
        drawn.append(draw())
        return loss_fn(net, (X * drawn[-1], Y))

    for _ in range(2):
        opt.step(closure)
    # The first use of a bound model evaluates a branch once more.
    assert len(set(drawn)) == 2 and drawn[-1] == drawn[-2]


BARE = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: ([],), ValueError, "empty parameter list"),
        (lambda: (iter(()),), ValueError, "empty parameter list"),
        (lambda: ([BARE],), ValueError, "needs the parameters' names"),
        (lambda: ([{"params": [BARE]}],), ValueError, "model.named_parameters"),
        (lambda: ([{"params": {BARE}}],), TypeError, "ordered collection"),
        (lambda: (BARE,), TypeError, "params must be a module"),
        (lambda: ("weights",), TypeError, "params must be a module"),
        (lambda: (3,), TypeError, "params must be a module"),
        (lambda: ({"params": [BARE]},), TypeError, "params must be a module"),
        (lambda: ([{"lr": 1.0}],), TypeError, "key 'params'"),
        (lambda: ([("w", 3.0)],), TypeError, r"\(name, tensor\) pairs"),
        (lambda: ([(3, BARE)],), TypeError, r"\(name, tensor\) pairs"),
        (lambda: ([("w", BARE), ("w", nn.Parameter(BARE.clone()))],), ValueError, "unique"),
        (lambda: ([("w", BARE.detach())],), ValueError, "no parameter requires a gradient"),
        (lambda: (nn.ReLU(),), ValueError, "no trainable parameter"),
        (lambda: (nn.Linear(2, 2).requires_grad_(False),), ValueError, "no trainable parameter"),
        (lambda: (nn.Linear(2, 2).double(),), TypeError, "'weight' has dtype torch.float64"),
        (
            lambda: ([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))],),
            TypeError,
            "'w' has dtype torch.complex64",
        ),
        (
            lambda: ([("w", nn.Parameter(torch.zeros(2, dtype=torch.int8), False))],),
            ValueError,
            "no parameter requires a gradient",
        ),
        (lambda: (nn.Linear(2, 2, device="meta"),), ValueError, "meta device"),
        (lambda: ([("w", BARE * 2)],), ValueError, "non-leaf"),
    ],
)
def test_bad_parameters(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeZO(*arguments())


def test_model_argument_is_checked() -> None:
    net = model()
    with pytest.raises(ValueError, match="given as params"):
        MeZO(net, model=model())
    with pytest.raises(TypeError, match="model must be"):
        MeZO(net.named_parameters(), model="net")
    with pytest.raises(ValueError, match=r"a parameter \(3,\) does not belong to the model"):
        MeZO([BARE], model=net)
    with pytest.raises(ValueError, match="'w' does not belong"):
        MeZO([("w", BARE)], model=net)
    MeZO(net, model=net)
    with pytest.raises(ValueError, match="more than one parameter group"):
        MeZO([{"params": [net.first.weight]}, {"params": [net.first.weight]}], model=net)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("lr", -1e-6, ValueError),
        ("lr", math.nan, ValueError),
        ("lr", math.inf, ValueError),
        ("lr", "fast", TypeError),
        ("lr", None, TypeError),
        ("lr", True, TypeError),
        ("lr", torch.zeros(2), TypeError),
        ("eps", 0.0, ValueError),
        ("eps", -1e-3, ValueError),
        ("eps", math.nan, ValueError),
        ("eps", 1e-60, ValueError),
        ("eps", 1e60, ValueError),
        ("eps", "small", TypeError),
        ("weight_decay", -0.1, ValueError),
        ("weight_decay", math.nan, ValueError),
        ("momentum", 1.0, ValueError),
        ("momentum", -0.1, ValueError),
        ("momentum", math.nan, ValueError),
        ("momentum_window", 0, ValueError),
        ("momentum_window", 2.0, TypeError),
        ("num_directions", 0, ValueError),
        ("num_directions", 1.5, TypeError),
        ("num_directions", True, TypeError),
        ("max_branches", 0, ValueError),
        ("clip", 0.0, ValueError),
        ("clip", -1.0, ValueError),
        ("clip", math.nan, ValueError),
        ("distribution", "cauchy", ValueError),
        ("estimator", "backward", ValueError),
        ("rounding", "up", ValueError),
        ("nonfinite", "ignore", ValueError),
        ("seed", 1 << 64, ValueError),
        ("seed", 1.0, TypeError),
        ("seed", None, TypeError),
        ("sequential", "yes", TypeError),
        ("journal", "run.zo", TypeError),
    ],
)
def test_bad_options(option: str, value: Any, error: type[Exception]) -> None:
    net = model()
    start = weights(net)
    with pytest.raises(error, match=option):
        MeZO(net, **{option: value})
    if option in ("lr", "eps", "weight_decay", "momentum"):
        with pytest.raises(error, match=option):
            MeZO([{"params": net.parameters(), option: value}], model=net)
        # A scheduler, or the user, may set it later.
        opt = MeZO(net)
        opt.param_groups[0][option] = value
        with pytest.raises(error, match=option):
            opt.step(BATCH)
        assert opt.num_steps == 0
    assert same(net, start)


# --- errors in a step -----------------------------------------------------------------------------


def failing(net: nn.Module) -> dict[str, tuple[Callable[[MeZO], Any], type[Exception], str]]:
    def closure_raises() -> Tensor:
        net(X)
        raise KeyError("inside")

    calls = iter((torch.tensor(1.0), "not a tensor"))
    return {
        "nothing": (lambda o: o.step(), TypeError, "needs a closure"),
        "both": (lambda o: o.step(BATCH, closure=lambda: 1), TypeError, "not both"),
        "closure value": (lambda o: o.step(closure=3), TypeError, "closure must be callable"),
        "loss_fn value": (lambda o: o.step(BATCH, 3), TypeError, "loss_fn must be callable"),
        "float": (lambda o: o.step(lambda: 1.0), TypeError, "must be a tensor"),
        "none": (lambda o: o.step(lambda: None), TypeError, "must be a tensor"),
        "second": (lambda o: o.step(lambda: next(calls)), TypeError, "got str"),
        "vector": (lambda o: o.step(lambda: torch.ones(3)), ValueError, r"got shape \(3,\)"),
        "integer": (lambda o: o.step(lambda: torch.tensor(3)), TypeError, "floating point"),
        "complex": (lambda o: o.step(lambda: torch.tensor(1j)), TypeError, "floating point"),
        "raises": (lambda o: o.step(closure_raises), KeyError, "inside"),
        "no labels": (lambda o: o.step({"x": X}), ValueError, "no loss"),
        "tuple": (lambda o: o.step((X, Y)), TypeError, "must be a mapping"),
        "tensor list": (lambda o: o.step([X, Y]), TypeError, "must be a mapping"),
        "empty": (lambda o: o.step([]), ValueError, "empty list"),
        "bad micro": (lambda o: o.step([BATCH, (X, Y)]), TypeError, "must be a mapping"),
        "bad keys": (lambda o: o.step({"z": X}), TypeError, "unexpected keyword"),
        "bad shape": (lambda o: o.step({"x": X[:, :2], "labels": Y}), RuntimeError, "shape"),
        "vector loss_fn": (
            lambda o: o.step(X, lambda m, b: m(b).logits),
            ValueError,
            "must be a scalar",
        ),
    }


@pytest.mark.parametrize("case", list(failing(model())))
@pytest.mark.filterwarnings("ignore::zokernels.StackingWarning")
def test_an_error_in_a_step_changes_nothing(case: str) -> None:
    net = model(torch.bfloat16)
    journal = Trajectory()
    opt = MeZO(net, lr=1e-2, momentum=0.5, journal=journal)
    opt.step(BATCH)
    start, state = weights(net), copy.deepcopy(opt.state_dict())
    call, error, message = failing(net)[case]
    with pytest.raises(error, match=message):
        call(opt)
    assert same(net, start)
    assert opt.state_dict() == state
    assert len(journal) == 1
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    twin, plain = model(torch.bfloat16), None
    plain = MeZO(twin, lr=1e-2, momentum=0.5)
    plain.step(BATCH)
    opt.step(lambda: loss_fn(net, (X, Y)))
    plain.step(lambda: loss_fn(twin, (X, Y)))
    assert same(net, twin)


@pytest.mark.parametrize("fuse", [False, True])
def test_an_interrupt_at_any_moment_leaves_whole_steps(fuse: bool) -> None:
    net, journal = model(), Trajectory()
    opt = MeZO(net, lr=1e-2, journal=journal, fuse_update=fuse)
    opt.step(BATCH)

    def step(at: int) -> int:
        """A step, interrupted at a call or return of a function; how many there were."""
        count = 0

        def look(*_: object) -> None:
            nonlocal count
            count += 1
            if count == at:
                signal.raise_signal(signal.SIGINT)

        sys.setprofile(look)
        try:
            opt.step(BATCH)
        finally:
            sys.setprofile(None)
        return count

    whole, interrupted = step(0), 0
    for at in range(1, whole, max(whole // 100, 1)):
        try:
            step(at)
        except KeyboardInterrupt:
            interrupted += 1
        assert opt.num_steps == len(journal)
    assert interrupted >= 90
    opt.flush()
    replayed = model()
    journal.replay_(replayed)
    assert same(replayed, net)


def test_a_second_interrupt_does_not_wait() -> None:
    net = model()
    opt = MeZO(net, lr=1e-2)
    start = weights(net)

    def closure() -> Tensor:
        signal.raise_signal(signal.SIGINT)
        reached.append("once")
        signal.raise_signal(signal.SIGINT)
        reached.append("twice")
        return loss_fn(net, (X, Y))

    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert reached == ["once"] and opt.num_steps == 0 and same(start, net)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    opt.step(BATCH)


def test_a_failing_update_takes_its_journal_record_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net, journal = model(), Trajectory()
    opt = MeZO(net, lr=1e-2, journal=journal)
    opt.step(BATCH)

    def broken(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("zokernels._targets.update_", broken)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step(BATCH)
    assert len(journal) == 1 and opt.num_steps == 1
    opt.step(BATCH)
    assert len(journal) == 2


def test_a_journal_that_cannot_be_written_stops_the_step_before_the_weights() -> None:
    net, journal = model(), Trajectory()
    opt = MeZO(net, lr=1e-2, journal=journal)

    def broken(*arguments: Any) -> None:
        raise OSError("disk full")

    journal._write = broken
    start = weights(net)
    with pytest.raises(OSError, match="disk full"):
        opt.step(BATCH)
    assert same(net, start) and opt.num_steps == 0 and len(journal) == 0


def test_a_changed_model_is_an_error() -> None:
    net = model()
    opt = MeZO(net, lr=1e-2)
    opt.step(BATCH)
    kept = net.last.weight
    net.last.weight = nn.Parameter(torch.zeros(3, 8))
    state = opt.state_dict()
    with pytest.raises(ModelChangedError, match=r"'last\.weight' was replaced"):
        opt.step(BATCH)
    net.last.weight = kept
    net.last.bfloat16()
    with pytest.raises(ModelChangedError, match=r"torch\.bfloat16"):
        opt.step(BATCH)
    assert opt.state_dict() == state
    loose = MeZO(net.named_parameters())
    net.last.float()
    with pytest.raises(ModelChangedError, match=r"'last\.weight' was"):
        loose.step(lambda: torch.tensor(1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_losses_are_skipped(bad: float) -> None:
    net = model()
    opt = MeZO(net, lr=1e-2, momentum=0.5)
    opt.step(BATCH)
    start, window = weights(net), opt.state_dict()["mezo"]["window"]
    values = iter((torch.tensor(1.0), torch.tensor(bad)))
    with pytest.warns(UserWarning, match="step 1: losses .* not finite") as caught:
        mean = opt.step(lambda: next(values))
    assert caught[0].filename == __file__
    assert not math.isfinite(mean.item())
    assert same(net, start)
    assert (opt.skipped, opt.num_steps, opt.last.skipped) == (1, 2, True)
    assert opt.state_dict()["mezo"]["window"] == window
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        opt.step(lambda: torch.tensor(bad))
    assert opt.skipped == 2
    opt.step(BATCH)
    assert not same(net, start) and not opt.last.skipped


def test_a_closure_with_backward_is_told() -> None:
    net = model()

    def closure() -> Tensor:
        loss = loss_fn(net, (X, Y))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError) as error:
        MeZO(net).step(closure)
    assert error.value.__notes__ == ["MeZO's closures return the loss and call no backward()"]


@pytest.mark.parametrize("form", ["module", "named"])
def test_losses_that_never_differ_are_worth_one_word(form: str) -> None:
    net = model()
    elsewhere = copy.deepcopy(net)
    opt = forms(net)[form]()

    def step(of: nn.Module) -> None:
        opt.step(lambda: loss_fn(of, (X, Y)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for of in (elsewhere, elsewhere, net, elsewhere, elsewhere):  # not three in a row
            step(of)
    start = weights(net)
    with pytest.warns(UserWarning, match="equal losses at all branches.*another model") as caught:
        step(elsewhere)
    assert caught[0].filename == __file__ and same(net, start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        for _ in range(4):
            step(elsewhere)
    assert opt.num_steps == 10


def test_updates_beyond_float32_are_skipped_too() -> None:
    net = model()
    opt = MeZO(net, lr=1e30, eps=1e-30)
    values = iter((torch.tensor(1e10), torch.tensor(0.0)))
    start = weights(net)
    with pytest.warns(UserWarning, match="beyond float32"):
        opt.step(lambda: next(values))
    assert same(net, start) and opt.skipped == 1


def test_non_finite_losses_can_raise() -> None:
    net, journal = model(), Trajectory()
    opt = MeZO(net, lr=1e-2, nonfinite="raise", journal=journal)
    start = weights(net)
    with pytest.raises(NonFiniteLossError, match="step 0: losses"):
        opt.step(lambda: torch.tensor(math.nan))
    assert same(net, start)
    assert (opt.num_steps, opt.skipped, len(journal), opt.last) == (0, 0, 0, None)


# --- state ----------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.6, "momentum_window": 3, "num_directions": 2, "clip": 0.5},
    "forward": {
        "estimator": "forward",
        "distribution": "rademacher",
        "weight_decay": 0.1,
        "rounding": "nearest",
        "seed": -3,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_resume_is_bit_exact(dtype: torch.dtype, options: str) -> None:
    def new(net: nn.Module, **arguments: Any) -> tuple[MeZO, lr_scheduler.LRScheduler]:
        opt = MeZO(param_groups(net, weight_decay=0.0), model=net, lr=1e-2, **arguments)
        return opt, lr_scheduler.CosineAnnealingLR(opt, T_max=8)

    whole = model(dtype)
    opt, schedule = new(whole, **OPTIONS[options])
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            saved = [whole.state_dict(), opt.state_dict(), schedule.state_dict()]
            torch.save(saved, file)
        opt.step(BATCH)
        schedule.step()

    file.seek(0)
    weights_then, state, schedule_state = torch.load(file, weights_only=True)
    resumed = model(dtype)
    resumed.load_state_dict(weights_then)
    torch.manual_seed(12345)  # must not matter
    opt2, schedule2 = new(resumed)  # the options come from the state
    schedule2.load_state_dict(schedule_state)
    opt2.load_state_dict(state)
    for _ in range(3):
        opt2.step(BATCH)
        schedule2.step()
    assert same(resumed, whole)
    assert opt2.state_dict() == opt.state_dict()
    assert opt2.num_steps == 6


@given(
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    step=st.integers(0, (1 << 40)),
    lr=st.floats(0, 1),
    momentum=st.floats(0, 0.99),
    count=st.integers(1, 5),
)
@settings(max_examples=30)
def test_state_dict_round_trip(
    seed: int, step: int, lr: float, momentum: float, count: int
) -> None:
    net = model()
    opt = MeZO(net, lr=lr, momentum=momentum, seed=seed, num_directions=count)
    opt._step = step
    other = MeZO(net)
    other.load_state_dict(opt.state_dict())
    assert other.state_dict() == opt.state_dict()
    assert other.seed == noise.signed_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["module", "named"])
@pytest.mark.parametrize("options", OPTIONS)
def test_resume_from_the_journal_alone(dtype: torch.dtype, form: str, options: str) -> None:
    def new(journal: Trajectory | None = None) -> tuple[nn.Module, MeZO]:
        net = model(dtype)
        source = net if form == "module" else net.named_parameters()
        return net, MeZO(source, lr=1e-2, journal=journal, **OPTIONS[options])

    def steps(net: nn.Module, opt: MeZO, count: int) -> None:
        for _ in range(count):
            opt.step(lambda: loss_fn(net, (X, Y)))

    whole, opt = new(journal := Trajectory())
    steps(whole, opt, 2)
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(lambda: torch.tensor(math.nan))
    steps(whole, opt, 1)
    cut = copy.deepcopy(journal)
    steps(whole, opt, 2)
    resumed, opt2 = new(cut)
    opt2.resume()
    assert (opt2.num_steps, opt2.skipped) == (4, 1)
    steps(resumed, opt2, 2)
    assert same(resumed, whole)
    assert opt2.state_dict() == opt.state_dict()
    assert cut == journal


def test_resume_after_momentum_was_switched_off_and_on() -> None:
    def new(journal: Trajectory) -> tuple[nn.Module, MeZO]:
        net = model()
        return net, MeZO(net, lr=1e-2, journal=journal)

    def steps(opt: MeZO, momenta: list[float]) -> None:
        for momentum in momenta:
            opt.param_groups[0]["momentum"] = momentum
            opt.step(BATCH)

    whole, opt = new(journal := Trajectory())
    steps(opt, [0.0, 0.5, 0.5, 0.0, 0.5])
    resumed, opt2 = new(copy.deepcopy(journal))
    opt2.resume()
    assert opt2.state_dict()["mezo"] == opt.state_dict()["mezo"]
    steps(opt, [0.5])
    steps(opt2, [0.5])
    assert same(resumed, whole)


def test_resume_refusals() -> None:
    net, journal = model(), Trajectory()
    with pytest.raises(ValueError, match="needs a journal"):
        MeZO(net).resume()
    opt = MeZO(net, lr=1e-2, seed=1, journal=journal)
    opt.resume()  # an empty journal: the run begins
    opt.step(BATCH)
    with pytest.raises(ValueError, match="before the first step; 1 were made"):
        opt.resume()
    start = weights(net)
    for options in ({"seed": 2}, {"seed": 1, "num_directions": 2}):
        other = MeZO(net, journal=journal, **options)
        with pytest.raises(ValueError, match="another seed or num_directions"):
            other.resume()
        assert other.num_steps == 0
    assert same(net, start)


def test_state_dict_is_plain_and_a_snapshot() -> None:
    net = model()
    opt = MeZO(net, momentum=0.9, lr=1e-2)
    opt.step(BATCH)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups", "mezo"}

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (str, int, float))

    assert plain(state)
    kept = copy.deepcopy(state["mezo"])
    opt.step(BATCH)
    assert state["mezo"] == kept


def test_hooks() -> None:
    net = model()
    opt = MeZO(net, lr=1e-2)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda o, a, k: seen.append("step pre"))
    opt.register_step_post_hook(lambda o, a, k: seen.append(f"step post {o.num_steps}"))
    opt.register_state_dict_pre_hook(lambda o: seen.append("save pre"))

    def post(o: MeZO, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(f"save post {'mezo' in state}")
        return {**state, "extra": 1}

    opt.register_state_dict_post_hook(post)

    def load_pre(o: MeZO, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(f"load pre {state['extra']}")
        mezo = {**state["mezo"], "step": 41}
        return {**state, "mezo": mezo}

    opt.register_load_state_dict_pre_hook(load_pre)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(f"load post {o.num_steps}"))
    opt.step(BATCH)
    opt.load_state_dict(opt.state_dict())
    assert seen == [
        "step pre",
        "step post 1",
        "save pre",
        "save post True",
        "load pre 1",
        "load post 41",
    ]
    opt.load_state_dict(opt.state_dict())  # no hook of ours stays behind
    assert len(seen) == 10


def damaged(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    net = model()
    opt = MeZO(net, lr=1e-2, momentum=0.5)
    opt.step(BATCH)
    state = copy.deepcopy(opt.state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("mezo"), ValueError, "another optimizer"),
        (lambda s: s["mezo"].pop("step"), ValueError, "damaged: KeyError"),
        (lambda s: s["mezo"].update(format=2), UnknownVersionError, "format must be 1; got 2"),
        (
            lambda s: s["mezo"].update(contract_version=7),
            UnknownVersionError,
            "contract_version must be 1; got 7",
        ),
        (lambda s: s["mezo"].update(distribution="x"), ValueError, "distribution must be"),
        (lambda s: s["mezo"].update(seed=1 << 70), ValueError, "64 bits"),
        (lambda s: s["mezo"].update(window=[{}]), ValueError, "damaged"),
        (lambda s: s["mezo"].update(num_directions="2"), ValueError, "damaged"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), ValueError, "lr must be"),
        (lambda s: s["param_groups"][0].pop("eps"), ValueError, "damaged"),
        (
            lambda s: s["param_groups"][0]["param_names"].__setitem__(2, "other.weight"),
            ValueError,
            "group 0 has 'other.weight' where this optimizer has 'norm.weight'",
        ),
        (lambda s: s["param_groups"].append({}), ValueError, "damaged"),
        (
            lambda s: s["param_groups"].append(copy.deepcopy(s["param_groups"][0])),
            ValueError,
            "number of parameter groups",
        ),
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "size of optimizer's group"),
    ],
)
def test_bad_state_changes_nothing(change: Any, error: type[Exception], message: str) -> None:
    net = model()
    opt = MeZO(net, lr=3e-3)
    opt.step(BATCH)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=message):
        opt.load_state_dict(damaged(change))
    assert opt.state_dict() == before
    opt.step(BATCH)


def test_state_that_does_not_fit_the_journal() -> None:
    net = model()
    opt = MeZO(net, journal=Trajectory())
    before = opt.state_dict()
    for label, value in (("distribution", "rademacher"), ("rounding", "nearest")):
        state = MeZO(net, **{label: value}).state_dict()
        with pytest.raises(ValueError, match=f"{label} '{value}', but the journal has"):
            opt.load_state_dict(state)
        assert opt.state_dict() == before


def test_state_of_another_optimizer_and_to_another_optimizer() -> None:
    net = model()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="another optimizer"):
        MeZO(net).load_state_dict(sgd.state_dict())


def test_copies_go_on_alike_and_apart() -> None:
    net = model(torch.bfloat16)
    opt = MeZO(net, lr=1e-2, momentum=0.5, journal=Trajectory(), num_directions=2)
    opt.register_step_post_hook(print)  # hooks stay with the original, as torch's do
    opt.step(BATCH)
    copies = [(net, opt), copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))]
    lone = copy.deepcopy(opt)
    copies.append((lone._model, lone))
    for twin, its in copies:
        its.step(BATCH)
        assert len(its.journal) == 2
        assert its.param_groups[0]["params"][0] is next(twin.parameters())
        assert its.state_dict() == opt.state_dict()
    assert all(same(twin, net) for twin, _ in copies)
    copies[1][1].step(BATCH)
    assert not same(copies[1][0], net)


# --- the rest of torch.optim ----------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[MeZO], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=6),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_change_the_step(name: str) -> None:
    net, journal = model(), Trajectory()
    opt = MeZO(net, lr=1e-2, journal=journal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as "step() of the scheduler before the optimizer"
        schedule = SCHEDULERS[name](opt)
        rates = []
        for _ in range(4):
            rates.append(opt.param_groups[0]["lr"])
            opt.step(BATCH)
            # The newest term is last; OneCycleLR cycles the momentum too.
            expected = -rates[-1] * opt.projected_gradients[0][0]
            assert journal[-1].coeffs[0][-1] == pytest.approx(expected, rel=1e-6)
            schedule.step()
    assert len(set(rates)) > 1


def test_plateau_scheduler_and_tensor_lr() -> None:
    net = model()
    opt = MeZO(net, lr=torch.tensor(0.5))
    schedule = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        opt.step(BATCH)
        schedule.step(1.0)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.005)


def test_small_habits_of_torch_optim(capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    opt = MeZO(net, 1e-2, 1e-3, 0.0)
    assert isinstance(opt, torch.optim.Optimizer)
    opt.zero_grad()
    opt.zero_grad(set_to_none=False)
    print(opt)
    text = capsys.readouterr().out
    assert text.startswith("MeZO (") and "lr: 0.01" in text and "first.weight" in text
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step(BATCH)
    assert any("Optimizer.step#MeZO.step" in event.name for event in profile.events())
    assert opt.defaults["lr"] == 1e-2
    assert all(p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()


def test_gradients_are_left_alone_and_not_needed() -> None:
    net = model()
    loss_fn(net, (X, Y)).backward()
    grads = [p.grad.clone() for p in net.parameters()]
    MeZO(net, lr=1e-2).step(BATCH)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    loss_fn(net, (X, Y)).backward()


def test_the_journal_can_be_attached_later_and_is_checked() -> None:
    net = model()
    opt = MeZO(net, lr=1e-2)
    opt.step(BATCH)
    start = weights(net)
    opt.journal = journal = Trajectory()
    opt.step(BATCH)
    opt.step(BATCH)
    assert [s.step for s in journal] == [1, 2]
    assert journal[0].meta["loss"] == pytest.approx(sum(opt.last.losses) / 2, rel=0.5)
    journal.replay_(start)
    assert same(net, start)
    with pytest.raises(TrajectoryError, match="distribution"):
        MeZO(net, distribution="rademacher", journal=journal)
    again = MeZO(net, journal=journal)
    state = again.state_dict()
    with pytest.raises(TrajectoryError, match=r"steps up to 2, and this is step 0.*truncate\(0\)"):
        again.step(BATCH)
    assert again.state_dict() == state and same(net, start)


def test_a_transformers_model_with_labels() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        word_embed_proj_dim=16,
        max_position_embeddings=16,
    )
    net = transformers.OPTForCausalLM(config).eval()
    ids = torch.randint(2, 32, (2, 6))
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": ids})
    opt = MeZO(net, lr=1e-3, sequential=False)
    start = weights(net)
    journal = opt.journal = Trajectory()
    for _ in range(2):
        loss = opt.step(batch)
    assert loss.item() == pytest.approx(math.log(32), rel=0.2)
    assert "lm_head.weight" not in opt.param_groups[0]["param_names"]
    fresh = transformers.OPTForCausalLM(config)
    fresh.load_state_dict(start)
    journal.replay_(fresh)
    assert same(net, fresh)


# --- weight decay groups --------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """A normalisation that is no subclass of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, 4, 4))
        self.up_bias = nn.Parameter(torch.ones(2, 4))
        self.state = nn.Parameter(torch.ones(2, 4))
        self.state._no_weight_decay = True


def test_weight_decay_groups() -> None:
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "normal_name": nn.LayerNorm([2, 4]),
            "batch": nn.BatchNorm1d(4),
            "own": OwnNorm(),
            "experts": Experts(),
            "bias_free": nn.Linear(4, 4, bias=False),
            "layernorm_proj": nn.Linear(4, 4),
            "head": nn.Linear(4, 5, bias=False),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    net["head"].weight = net["embed"].weight
    decayed, spared = param_groups(net, weight_decay=0.1, lr=1e-3)
    assert [n for n, _ in decayed["params"]] == [
        "experts.up",
        "bias_free.weight",
        "layernorm_proj.weight",
    ]
    assert len(spared["params"]) == len([p for p in net.parameters() if p.requires_grad]) - 3
    assert (decayed["weight_decay"], spared["weight_decay"], spared["lr"]) == (0.1, 0.0, 1e-3)
    with_embedding, _ = param_groups(net, weight_decay=0.1, no_decay=[nn.LayerNorm])
    assert "embed.weight" in [n for n, _ in with_embedding["params"]]
    only = param_groups(nn.Linear(3, 3, bias=False), weight_decay=0.1)
    assert len(only) == 1 and only[0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(net.requires_grad_(False), weight_decay=0.1)
    opt = MeZO(param_groups(model(), weight_decay=0.1, lr=1e-3))
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
