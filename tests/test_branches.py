"""Behaviour of the branches layer: what it evaluates, what it refuses, what it leaves untouched.

Whole model families are in test_branches_models.py; here models are a few lines long, so that one
thing can go wrong at a time.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import model_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zokernels as zo

ROOT = Path(__file__).resolve().parents[1]
EPS = 0.05
PAIR = [[EPS], [-EPS]]

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    """Two layers, a norm, a bare parameter, one parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.norm(self.first(x)))) * self.scale


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def at_weights(
    model: nn.Module, seeds: list[int], table: list[list[float]], fn: Any, **options: Any
) -> list[Any]:
    """The oracle: write the weights of each branch, run, put them back."""
    z = [zo.directions(model, seed=s, **options) for s in seeds]
    parameters = dict(model.named_parameters())
    out = []
    with torch.no_grad():
        for row in table:
            kept = {n: parameters[n].clone() for n in z[0]}
            for c, direction in zip(row, z, strict=True):
                for n, d in direction.items():
                    parameters[n].add_(d, alpha=c)
            out.append(fn())
            for n, value in kept.items():
                parameters[n].copy_(value)
    return out


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def state_of(model: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    return {n: (id(p), p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, int, Tensor]]) -> None:
    """The very same parameter objects, on the same storage, with the same bits."""
    after = state_of(model)
    assert list(after) == list(before)
    for name, (identity, pointer, value) in before.items():
        assert after[name][:2] == (identity, pointer), name
        assert torch.equal(after[name][2], value), name
    for module in model.modules():
        assert all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [None, True, False])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_a_table_of_branches(distribution, sequential):
    model, before = net(), state_of(net())
    seeds, table = (
        [3, -7, 2**64 - 1],
        [[0.1, 0.0, -0.2], [0.0, 0.0, 0.0], [1e-3, 0.05, 0.1], [0, 0, 1]],
    )
    br = zo.branches(model, seeds, table, distribution=distribution, sequential=sequential)
    assert br.num_branches == 4
    got = br(lambda: model(X))
    want = at_weights(model, seeds, table, lambda: model(X), distribution=distribution)
    close(got, torch.stack(want))
    assert [v[2].tolist() for v in state_of(model).values()] == [
        v[2].tolist() for v in before.values()
    ]


def test_seeds_and_coefficients_as_tensors_and_lists_agree():
    model = net()
    seeds, table = [3, 2**63 + 1], [[0.1, 0.2], [0.3, 0.4]]
    as_lists = zo.branches(model, seeds, table)(lambda: model(X))
    tensors = (torch.tensor([3, -(2**63) + 1]), torch.tensor(table))
    assert torch.equal(zo.branches(model, *tensors)(lambda: model(X)), as_lists)
    tuples = (tuple(seeds), tuple(tuple(r) for r in table))
    assert torch.equal(zo.branches(model, *tuples)(lambda: model(X)), as_lists)


def test_scale_multiplies_one_parameters_coefficients():
    model = net()
    got = zo.branches(model, [5], PAIR, scale={"first.weight": 3.0, "scale": 0.0})(lambda: model(X))
    z = zo.directions(model, seed=5)
    parameters = dict(model.named_parameters())
    for g, (c,) in enumerate(PAIR):
        kept = {n: p.detach().clone() for n, p in parameters.items()}
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(z[n], alpha=c * {"first.weight": 3.0, "scale": 0.0}.get(n, 1.0))
            want = model(X)
            for n, p in parameters.items():
                p.copy_(kept[n])
        close(got[g], want)


@pytest.mark.parametrize("sequential", [None, True, False])
def test_scale_by_seed(sequential):
    """One evaluation in which two parameters move along different seeds."""
    model = net()
    seeds, table = [5, 9, 4], [[0.1, 0.2, 0.3], [-0.1, 0.2, 0.0]]
    scale = {n: (0.0, 1.0, 0.5) for n, _ in model.named_parameters()}
    scale["first.weight"] = (2.0, 0.0, 0.0)
    got = zo.branches(model, seeds, table, scale=scale, sequential=sequential)(lambda: model(X))
    parameters = dict(model.named_parameters())
    for g, row in enumerate(table):
        kept = {n: p.detach().clone() for n, p in parameters.items()}
        with torch.no_grad():
            for k, (seed, c) in enumerate(zip(seeds, row, strict=True)):
                for n, z in zo.directions(model, seed=seed).items():
                    parameters[n].add_(z, alpha=c * scale[n][k])
            want = model(X)
            for n, p in parameters.items():
                p.copy_(kept[n])
        close(got[g], want)


def test_scale_by_seed_must_fit_the_seeds():
    with pytest.raises(ValueError, match="3 numbers"):
        zo.branches(net(), [1, 2, 3], [[0.1] * 3], scale={"first.weight": (1.0, 2.0)})


@pytest.mark.parametrize("sequential", [None, True, False])
def test_inputs_of_every_branch(sequential):
    """Branch g sees slice g of what is given stacked, and what is shared as it is."""
    model = net()
    inputs = torch.stack([X, X + 1, X * 2])
    offsets = torch.tensor([1.0, 2.0, 3.0])
    table = [[0.1, 0.0], [0.0, 0.2], [0.0, 0.0]]
    br = zo.branches(model, [3, 4], table, sequential=sequential)
    for _ in range(2):  # the first evaluation is compared with one branch at a time
        got = br(lambda x, offset: model(x) + offset + X.sum(), inputs, offsets)
        want = [
            at_weights(model, [3, 4], [row], lambda x=x, c=c: model(x) + c + X.sum())[0]
            for row, x, c in zip(table, inputs, offsets, strict=True)
        ]
        close(got, torch.stack(want))
    with pytest.raises(ValueError, match="3 branches in dimension 0"):
        br(lambda x: model(x), inputs[:2])
    close(br(lambda: model(X))[2], model(X).detach())


def test_no_terms_is_the_model_itself():
    model = net()
    close(zo.branches(model, [], [[], []])(lambda: model(X)), torch.stack([model(X)] * 2).detach())


def test_directions_are_what_the_branches_add():
    model = net()
    z = zo.directions(model, seed=9)
    assert list(z) == [n for n, _ in model.named_parameters()]
    for n, p in model.named_parameters():
        assert z[n].shape == p.shape and z[n].dtype == torch.float32
    with zo.displaced(model, [9], [1.0]):
        shown = {n: t.clone() for n, t in model.state_dict().items()}
    for n, p in model.named_parameters():
        close(shown[n], p.detach() + z[n])
    only = zo.directions(model, seed=torch.tensor(9), params=["scale"])
    assert list(only) == ["scale"] and torch.equal(only["scale"], z["scale"])
    signs = zo.directions(model, seed=9, distribution="rademacher")
    assert {v for t in signs.values() for v in t.flatten().tolist()} == {1.0, -1.0}


def test_dual_loss_is_plus_then_minus():
    model = net()

    def loss_fn(m, x):
        return m(x).square().mean()

    plus, minus = zo.dual_loss(model, X, seed=4, eps=EPS, loss_fn=loss_fn)
    want = at_weights(model, [4], PAIR, lambda: loss_fn(model, X))
    close(plus, want[0])
    close(minus, want[1])
    assert abs(float(plus - minus)) > 1e-3
    swapped = zo.branches(model, [4], [[-EPS], [EPS]])(lambda: loss_fn(model, X))
    close(torch.stack([minus, plus]), swapped)
    tensor_seed = zo.dual_loss(model, X, seed=torch.tensor(4), eps=EPS, loss_fn=loss_fn)
    assert (float(tensor_seed[0]), float(tensor_seed[1])) == (float(plus), float(minus))


def test_the_estimate_is_the_directional_derivative():
    """(L+ - L-) / 2 eps against <grad L, z> by backpropagation."""
    model = net()

    def loss_fn(m, x):
        return m(x).square().mean()

    loss_fn(model, X).backward()
    for seed in range(4):
        z = zo.directions(model, seed=seed)
        slope = sum(
            float((p.grad * z[n]).sum()) for n, p in model.named_parameters() if p.grad is not None
        )
        plus, minus = zo.dual_loss(model, X, seed=seed, eps=2e-3, loss_fn=loss_fn)
        assert float(plus - minus) / 4e-3 == pytest.approx(slope, rel=3e-3, abs=3e-3)


def test_repeated_evaluations_are_bit_equal_and_independent_of_random_state():
    model = net()
    br = zo.branches(model, [1], PAIR)
    first = br(lambda: model(X))
    torch.manual_seed(77)
    for _ in range(3):
        assert torch.equal(br(lambda: model(X)), first)
    other = zo.branches(net(), [1], PAIR)
    assert torch.equal(other(lambda: other.binding.model(X)), first)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "opt_lora"])
def test_the_default_dtype_does_not_matter(name, default):
    """``opt_lora`` has a fixed head under the fused loss."""
    batch = zoo.lm_batch()
    options: dict[str, Any] = {"seed": 1, "eps": EPS, "loss_fn": zo.causal_lm_loss}
    want = zo.dual_loss(zoo.build(name), batch, **options)
    model = zoo.build(name)
    try:
        torch.set_default_dtype(default)
        got = zo.dual_loss(model, batch, **options)
        z = zo.directions(model, seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(loss.dtype == torch.float32 for loss in got)
    close(torch.stack(got), torch.stack(want))
    assert all(t.dtype == torch.float32 for t in z.values())


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_grad_modes_do_not_matter(context):
    """Used under one mode first and under another later: what is kept fits both."""
    model = net()
    want = torch.stack(at_weights(model, [1], PAIR, lambda: model(X)))
    br = zo.branches(model, [1], PAIR)
    for mode in (context, contextlib.nullcontext, context):
        with mode():
            got = br(lambda: model(X))
            with zo.displaced(model, [1], [EPS]):
                close(model(X).clone(), want[0])
        close(got.clone(), want)
    model(X).sum().backward()
    assert model.first.weight.grad is not None


def test_a_displacement_displaces():
    model = net()
    terms = zo.Displacement(seeds=[3, 4], coeffs=[0.1, -0.2], distribution="rademacher")
    with zo.displaced(model, terms):
        got = model(X)
    options = {"distribution": "rademacher"}
    close(got, at_weights(model, [3, 4], [[0.1, -0.2]], lambda: model(X), **options)[0])


def test_values_made_from_parameters_alone():
    """A weight norm, a soft prompt, a table lookup by position: no input anywhere near them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(5, 4))
            self.g = nn.Parameter(torch.rand(5, 1) + 0.5)
            self.position = nn.Embedding(8, 4)
            self.prompt = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)
            table = self.position(torch.arange(x.shape[0] + 2))
            h = torch.cat([self.prompt, x]) + table
            return (h @ weight.T).exp() + (1 + self.g.float()).mean()

    torch.manual_seed(0)
    model = Model()
    table = [[0.1], [-0.1], [0.0]]
    close(
        zo.branches(model, [6], table, sequential=False)(lambda: model(X)),
        torch.stack(at_weights(model, [6], table, lambda: model(X))),
    )

    # ... and a result that no input has touched at all, or that is a parameter.
    def fn():
        return (model.v.sum(), model.g * 2, model.prompt)

    for got, want in zip(
        zo.branches(model, [6], table)(fn),
        zip(*at_weights(model, [6], table, lambda: [t.clone() for t in fn()]), strict=True),
        strict=True,
    ):
        close(got, torch.stack(want))


USES = {
    "conv1d": lambda w, x: F.conv1d(x[None], w.reshape(4, 3, 2)),
    "bilinear": lambda w, x: F.bilinear(x, x, w.reshape(1, 4, 6)[..., :4]),
    "einsum": lambda w, x: torch.einsum("ni,ij->nj", x, w.reshape(4, 6)),
    "left_matmul": lambda w, x: w.reshape(8, 3) @ x,
    "matmul_t": lambda w, x: x @ w.reshape(6, 4).T,
    "addmm": lambda w, x: torch.addmm(torch.ones(6), x, w.reshape(4, 6)),
    "bmm": lambda w, x: torch.bmm(x[None].expand(2, 3, 4), w.reshape(2, 4, 3)),
    "baddbmm": lambda w, x: torch.baddbmm(torch.ones(1), x.expand(2, 3, 4), w.view(2, 4, 3)),
    "index": lambda w, x: x * w[1:4, 2:3] + w[0, 0] + w[-1].sum(),
    "index_tensor": lambda w, x: x.sum() * w[torch.tensor([0, 2])] + w[2, torch.tensor([1])],
    "mask": lambda w, x: x.sum() + w[:, torch.tensor([True, False, False, True])],
    "gather": lambda w, x: x.sum() + w.gather(1, torch.zeros(6, 1, dtype=torch.long)),
    "chunk": lambda w, x: sum((x @ c.T).sum() for c in w.chunk(3)),
    "unbind": lambda w, x: torch.stack([x @ row for row in w.unbind(0)]),
    "iterate": lambda w, x: torch.stack([x @ row for row in w]),
    "split": lambda w, x: sum((x[:, :2] @ c.T).sum() for c in w.split(2, dim=1)),
    "norm": lambda w, x: x / w.norm() + w.abs().max() + w.std(),
    "softmax": lambda w, x: x @ w.softmax(-1).T,
    "cat": lambda w, x: torch.cat([w, x]).cumsum(0),
    "where": lambda w, x: torch.where(w > 0, w, x.sum()),
    "clone": lambda w, x: x @ w.clone().t(),
    "view": lambda w, x: x @ w.view(-1)[:4] + w.flatten().sum() + w.ravel()[3],
    "unsqueeze": lambda w, x: (w[None] * x[:, None]).sum(1),
    "expand": lambda w, x: (w.expand(2, 6, 4) * x.sum()).mean((0, 1)),
    "permute": lambda w, x: x @ w.permute(1, 0) + x @ w.transpose(-1, 0) + x @ w.mT,
    "contiguous": lambda w, x: x @ w.T.contiguous(),
    "double": lambda w, x: (x.double() @ w.double().T).float(),
    "power": lambda w, x: x @ (w**2).T + (2.0**w).sum() + (-w).sum(),
    "reflected": lambda w, x: x @ (1 - w).T + (1 / (5 + w)).sum() + (2 * w).sum() + w.add(1).sum(),
    "inplace_result": lambda w, x: (w * 2).mul_(3).add_(x.sum()),
    "out_of_place_setitem": lambda w, x: torch.zeros(6, 4).copy_(w) * x.sum(),
    "clamp": lambda w, x: w.clamp(-0.1, 0.1) * x.sum(),
    "compare": lambda w, x: (w > 0.1).float() * x.sum(),
    "embedding": lambda w, x: F.embedding(torch.tensor([[1, 5], [0, 0]]), w) + x.sum(),
    "embedding_of_view": lambda w, x: F.embedding(torch.tensor([0, 1]), w[2:5]) * x[:2],
    "linear_of_view": lambda w, x: F.linear(x, w[1:4]) + F.linear(x, w[-1:]),
    "linear_own_bias": lambda w, x: F.linear(x, w, w[:, 0]),
    "linear_keywords": lambda w, x: F.linear(input=x, weight=w, bias=None),
    "linear_vector": lambda w, x: F.linear(x[0], w),
    "linear_4d": lambda w, x: F.linear(x.expand(2, 5, 3, 4), w),
    "linear_of_itself": lambda w, x: F.linear(w, w) + x.sum(),
    "sequence": lambda w, x: torch.stack([w, w + x.sum()]).mean(0),
    "layer_norm": lambda w, x: F.layer_norm(x, (4,), w[0], w[1]),
    "layer_norm_1": lambda w, x: F.layer_norm(x, (4,), w[0]),
    "group_norm": lambda w, x: F.group_norm(x[None].mT, 2, w[0], w[1]),
    "batch_norm": lambda w, x: F.batch_norm(x, torch.zeros(4), torch.ones(4), w[0], w[1]),
    "rms_norm": lambda w, x: F.rms_norm(x, (4,), w[0]),
    "prelu": lambda w, x: F.prelu(x, w[0]),
    "attention": lambda w, x: F.scaled_dot_product_attention(x @ w.T[:, :4], x, x),
    "multi_use": lambda w, x: F.linear(F.linear(x, w), w.T),
    "no_input": lambda w, x: w.sum().exp(),
    "item_shape": lambda w, x: x.new_zeros(w.shape) + w.new_ones(w.size()) * w.numel() + w.dim(),
    "like": lambda w, x: torch.ones_like(w) * w + torch.empty_like(w).fill_(2) + x.sum(),
    "type_as": lambda w, x: x.type_as(w) @ w.T + x.to(w) @ w.T,
    "detach": lambda w, x: x @ w.detach().T + x @ w.data.T,
    "kron": lambda w, x: torch.kron(w[:2, :2], x[:2, :2]),
    "inverse": lambda w, x: torch.linalg.inv(w[:4] + 3 * torch.eye(4)) @ x.T,
    "sort": lambda w, x: w.sort(dim=0).values * x.sum(),
    "fft": lambda w, x: torch.fft.rfft(w).abs() * x.sum(),
}  # fmt: skip


class One(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.w = nn.Parameter(torch.randn(6, 4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.w, x)


@pytest.mark.filterwarnings("ignore::zokernels.StackingWarning")
@pytest.mark.parametrize("use", USES)
def test_uses_of_a_parameter(use):
    """However a model uses a weight, the numbers are right: stacked or else one by one."""
    model = One(USES[use])
    before = state_of(model)
    table = [[0.3], [-0.3], [0.0]]
    want = torch.stack(at_weights(model, [6], table, lambda: model(X)))
    for sequential in (True, None, None):
        got = zo.branches(model, [6], table, sequential=sequential)(lambda: model(X))
        close(got, want)
    with zo.branches(model, [6], table).at(1):
        close(model(X), want[1])
    assert_untouched(model, before)


ONE_BY_ONE = {"inplace_result", "out_of_place_setitem"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointed_models_do_to_activations_is_no_obstacle(reentrant: bool) -> None:
    """transformers' hooks on embeddings ask for gradients so that checkpointed layers have some."""

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).requires_grad_()
            h = torch.utils.checkpoint.checkpoint(self.norm, h, use_reentrant=reentrant)
            return self.second(F.gelu(h)) * self.scale

    plain, held = net(), Checkpointed().eval()
    held.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        got = zo.branches(held, [1], PAIR)(lambda: held(X))
    torch.testing.assert_close(got, zo.branches(plain, [1], PAIR)(lambda: plain(X)))
    assert not got.requires_grad
    # The switch is torch's, and it is back.
    with pytest.raises(RuntimeError, match="requires_grad_"):
        torch.func.vmap(lambda x: (x * 2).requires_grad_())(X)


@pytest.mark.parametrize("use", [u for u in USES if u not in ONE_BY_ONE])
def test_common_uses_stack(use):
    model = One(USES[use])
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        zo.branches(model, [6], [[0.3], [-0.3]], sequential=False)(lambda: model(X))


WIDTH, STEPS = 6, 5


class Gate(nn.Module):
    """Bare parameters, elementwise: one of them a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH))
        self.b = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.exp() * 0.5 + self.b.tanh()


class Shared(nn.Module):
    """One weight used twice, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.f(x)) * F.linear(x, self.f.weight.t(), self.f.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x, x, x, need_weights=False)[0]


PIECES = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    lambda: nn.LayerNorm(WIDTH),
    lambda: nn.LayerNorm(WIDTH, bias=False),
    lambda: nn.RMSNorm(WIDTH),
    lambda: nn.GELU(),
    lambda: nn.Softmax(-1),
    lambda: nn.Dropout(0.3),
    lambda: nn.Conv1d(STEPS, STEPS, 3, padding=1),
    lambda: nn.Conv1d(STEPS, STEPS, 3, padding=1, groups=STEPS),
    lambda: nn.BatchNorm1d(STEPS),
    lambda: nn.GroupNorm(STEPS, STEPS),
    Gate,
    Shared,
    Attention,
]


@pytest.mark.filterwarnings("ignore::zokernels.StackingWarning")
@pytest.mark.parametrize("number", range(32))
def test_random_networks(number):
    """Random pieces, selections, tables and modes: stacked, one by one and in place agree."""
    choose = random.Random(number)
    torch.manual_seed(number)
    pieces = [choose.choice(PIECES)() for _ in range(choose.randint(1, 6))]
    pieces.append(choose.choice([pieces[0], nn.Linear(WIDTH, WIDTH)]))  # tied, now and then
    if not any(list(piece.parameters()) for piece in pieces):
        pieces.append(Gate())
    model = nn.Sequential(*pieces).train(choose.random() < 0.3)
    parameters = list(model.parameters())
    for p in parameters[1:]:
        p.requires_grad_(choose.random() < 0.8)
    terms, branches = choose.randint(1, 3), choose.randint(1, 4)
    seeds = [choose.randrange(-(2**63), 2**64) for _ in range(terms)]
    table = [[choose.gauss(0, 0.1) for _ in range(terms)] for _ in range(branches)]
    options = {"distribution": choose.choice(["gaussian", "rademacher"])}
    x = torch.randn(2, STEPS, WIDTH)

    def fn() -> Tensor:
        torch.manual_seed(77)
        return model(x)

    before = state_of(model)
    want = torch.stack(at_weights(model, seeds, table, fn, **options))
    for sequential in (None, True, None):
        got = zo.branches(model, seeds, table, sequential=sequential, **options)(fn)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert_untouched(model, before)


# --- results --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Tensor
    b: list[Tensor]


def test_results_keep_their_structure():
    model = net()

    def fn() -> dict[str, Any]:
        y = model(X)
        return {
            "tuple": (y, y.sum()),
            "named": Pair(y.mean(), [y.max()]),
            "ordered": OrderedDict(x=y[0]),
            "none": None,
            "number": 3,
            "text": "label",
            "constant": torch.arange(3),
            "integers": y.argmax(-1),
        }

    for sequential in (None, True):
        got = zo.branches(model, [1], PAIR, sequential=sequential)(fn)
        want = at_weights(model, [1], PAIR, fn)
        assert list(got) == list(want[0])
        assert isinstance(got["named"], Pair) and isinstance(got["ordered"], OrderedDict)
        assert (got["none"], got["number"], got["text"]) == (None, 3, "label")
        close(got["tuple"][0], torch.stack([w["tuple"][0] for w in want]))
        close(got["tuple"][1], torch.stack([w["tuple"][1] for w in want]))
        close(got["named"].b[0], torch.stack([w["named"].b[0] for w in want]))
        close(got["ordered"]["x"], torch.stack([w["ordered"]["x"] for w in want]))
        assert got["constant"].tolist() == [[0, 1, 2]] * 2
        assert torch.equal(got["integers"], torch.stack([w["integers"] for w in want]))


def test_transformers_outputs_come_back_as_themselves():
    model, batch = zoo.build("opt"), zoo.lm_batch()
    out = zo.branches(model, [1], PAIR)(lambda: model(**batch, use_cache=False))
    assert type(out).__name__ == "CausalLMOutputWithPast"
    assert out.loss.shape == (2,) and out.logits.shape == (2, *batch["input_ids"].shape, zoo.VOCAB)
    plus, minus = zo.dual_loss(model, batch, seed=1, eps=EPS)
    close(out.loss, torch.stack([plus, minus]))


def test_results_that_are_no_tensors():
    model = net()
    with pytest.raises(TypeError, match="must return a tensor; got float"):
        zo.branches(model, [1], PAIR)(lambda: 1.0)
    with pytest.raises(TypeError, match=r"must return tensors.*got a Net"):
        zo.branches(model, [1], PAIR)(lambda: (model(X), model))


def test_results_outlive_the_evaluation():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        got = zo.branches(model, [1], PAIR)(lambda: {"y": model(X), "w": model.first.weight})
    again = {k: v.clone() for k, v in got.items()}
    with torch.no_grad():
        model.first.weight.zero_()
    for k, v in got.items():
        assert type(v) is Tensor and not v.requires_grad
        assert torch.equal(v + 0, again[k])


# --- .at and displaced ----------------------------------------------------------------------------


def test_at_runs_any_code_at_one_branch():
    model, before = net(), state_of(net())
    table = [[0.1, 0.0], [0.0, -0.2]]
    br = zo.branches(model, [1, 2], table)
    want = at_weights(model, [1, 2], table, lambda: model(X))
    for g in (0, 1):
        with br.at(g):
            got = [
                model(X[i : i + 1]) for i in range(3)
            ]  # loops, several calls, numpy, control flow
            positive = float(got[0].sum()) > 0
            array = model(X).numpy()
        close(torch.cat(got), want[g])
        close(torch.from_numpy(array), want[g])
        assert positive == (float(want[g][0].sum()) > 0)
    assert [v[2].tolist() for v in state_of(model).values()] == [
        v[2].tolist() for v in before.values()
    ]


@pytest.mark.parametrize("branch", [2, -1, 99])
def test_at_outside_the_table(branch):
    br = zo.branches(net(), [1], PAIR)
    with (
        pytest.raises(IndexError, match=rf"branch must be in \[0, 2\); got {branch}"),
        br.at(branch),
    ):
        pass


def test_displaced():
    model = net()
    before = state_of(model)
    want = at_weights(model, [1, 2], [[0.3, -0.1]], lambda: model(X))[0]
    with zo.displaced(model, [1, 2], [0.3, -0.1]) as inside:
        assert inside is model
        close(model(X), want)
    with zo.displaced(model, [1, 2], torch.tensor([0.3, -0.1])):
        close(model(X), want)
    assert_untouched(model, before)


def test_displaced_state_dict_loads_into_another_model():
    model, other = net(), net()
    with zo.displaced(model, [5], [0.5]):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        want = model(X)
    other.load_state_dict(weights)
    close(other(X), want)


def test_generation_at_a_branch():
    model = zoo.build("gpt2")
    ids = zoo.lm_batch()["input_ids"][:, :4]

    def generate():
        return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)

    with zo.displaced(model, [5], [0.2]):
        got = generate()
    want = at_weights(model, [5], [[0.2]], generate)[0]
    assert torch.equal(got, want)
    assert not torch.equal(got, generate())


# --- nothing leaks --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["branches", "sequential", "at", "displaced", "dual_loss"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("used_before", [False, True])
def test_the_model_is_whole_after_an_exception(how, error, used_before):
    model = net()
    before = state_of(model)
    if used_before:
        zo.branches(model, [1], PAIR)(lambda: model(X))

    def fail(*args: Any) -> Tensor:
        model(X)
        raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        if how == "branches":
            zo.branches(model, [1], PAIR)(fail)
        elif how == "sequential":
            zo.branches(model, [1], PAIR, sequential=True)(fail)
        elif how == "dual_loss":
            zo.dual_loss(model, X, seed=1, eps=EPS, loss_fn=fail)
        elif how == "at":
            with zo.branches(model, [1], PAIR).at(0):
                fail()
        else:
            with zo.displaced(model, [1], [0.1]):
                fail()
    assert_untouched(model, before)
    assert torch.is_grad_enabled()
    assert model(X).requires_grad
    got = zo.branches(model, [1], PAIR)(lambda: model(X))  # and it still works
    close(got, torch.stack(at_weights(model, [1], PAIR, lambda: model(X))))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("stacks", [True, False])
def test_an_interruption_at_any_point_of_the_first_use(call, error, stacks):
    """The first use evaluates several times, with the originals hidden in between."""
    model = net()
    before = state_of(model)
    calls = []

    def fn() -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise error("on purpose")
        y = model(X)
        return y if stacks else y * float(y.detach().sum() > -1e9)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zo.StackingWarning)
        # An error of one call out of many may be taken for a failure to stack; an interrupt is not.
        with contextlib.suppress(error):
            zo.branches(model, [1], PAIR)(fn)
            assert error is ValueError or len(calls) < call
        assert_untouched(model, before)
        call = 0
        got = zo.branches(model, [1], PAIR)(fn)
    close(got, torch.stack(at_weights(model, [1], PAIR, lambda: model(X))))
    assert_untouched(model, before)


def test_a_bug_of_the_users_function_is_not_taken_for_a_stacking_problem():
    model = net()
    zo.branches(model, [1], PAIR)(lambda: model(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        with pytest.raises(
            RuntimeError, match=r"shapes cannot be multiplied|must end in a dimension"
        ):
            zo.branches(model, [1], PAIR)(lambda: model(torch.ones(3, 5)))
        zo.branches(model, [1], PAIR, sequential=False)(lambda: model(X))


def test_training_afterwards_works():
    model = net()
    zo.branches(model, [1], PAIR)(lambda: model(X))
    model(X).sum().backward()
    assert model.first.weight.grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_updates_between_evaluations_are_seen():
    model = net()
    br = zo.branches(model, [1], PAIR)
    br(lambda: model(X))
    for change in (
        lambda: model.first.weight.mul_(2),
        lambda: model.norm.weight.add_(1),
        lambda: setattr(model.second.weight, "data", torch.ones(2, 6)),
        lambda: model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}),
    ):
        with torch.no_grad():
            change()
        want = torch.stack(at_weights(model, [1], PAIR, lambda: model(X)))
        close(br(lambda: model(X)), want)
        close(zo.branches(model, [1], PAIR, sequential=True)(lambda: model(X)), want)


LAYOUTS: dict[str, Any] = {
    "transposed": torch.randn(4, 6).t(),
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "strided": torch.randn(12, 8)[::2, ::2],
    "shifted": torch.randn(40)[8:32].view(6, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_follow_updates(layout):
    """In-place updates are seen also where a parameter cannot be viewed as the noise's matrix."""
    model = One(lambda w, x: (x.sum() + w).square().sum(0) + x.sum())
    model.w = nn.Parameter(LAYOUTS[layout].clone(memory_format=torch.preserve_format))
    assert model.w.stride() == LAYOUTS[layout].stride() or layout in ("strided", "shifted")
    br = zo.branches(model, [1], PAIR)
    for _ in range(3):
        close(br(lambda: model(X)), torch.stack(at_weights(model, [1], PAIR, lambda: model(X))))
        with zo.displaced(model, [1], [EPS]):
            got = model(X)
        close(got, at_weights(model, [1], [[EPS]], lambda: model(X))[0])
        with torch.no_grad():
            model.w.mul_(0.7)


def test_memory_formats_follow_updates():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = model.to(memory_format=torch.channels_last)
    images = zoo.plain_image_batch()[0]
    br = zo.branches(model, [1], PAIR)
    for _ in range(3):
        want = torch.stack(at_weights(model, [1], PAIR, lambda: model(images)))
        torch.testing.assert_close(br(lambda: model(images)), want, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.7)


def test_unselected_parameters_are_the_users_own():
    """Frozen parameters are not swapped at all: identity, hooks and subclasses survive."""
    model = net()
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda m, args, out: seen.append(m.weight))
    zo.branches(model, [1], PAIR, params=["first.weight"])(lambda: model(X))
    assert seen and all(w is model.norm.weight for w in seen)


def test_gradients_are_off_inside():
    model = net()
    flags = []

    def fn() -> Tensor:
        flags.append(torch.is_grad_enabled())
        return model(X)

    assert not zo.branches(model, [1], PAIR)(fn).requires_grad
    with zo.displaced(model, [1], [0.1]):
        fn()
    assert not any(flags) and torch.is_grad_enabled()


def test_evaluations_do_not_nest():
    model = net()
    br = zo.branches(model, [1], PAIR)
    br(lambda: model(X))
    with br.at(0), pytest.raises(RuntimeError, match="already active"):
        br(lambda: model(X))
    with br.at(0), pytest.raises(RuntimeError, match="already active"), br.at(1):
        pass
    with pytest.raises(RuntimeError, match="already active"):
        br(lambda: br(lambda: model(X)))
    br(lambda: model(X))


def test_evaluations_of_two_selections_of_one_model_do_not_nest_either():
    """Every selection has its own binding; the model is one."""
    model = net()
    before = state_of(model)
    inner = zo.branches(model, [1], PAIR, params=["scale"])
    for params in (["scale"], ["first.weight"], None):
        with (
            zo.branches(model, [1], PAIR).at(0),
            pytest.raises(RuntimeError, match="already active"),
        ):
            zo.branches(model, [1], PAIR, params=params)(lambda: model(X))
    with zo.branches(model, [1], PAIR).at(0), pytest.raises(RuntimeError, match="already active"):
        inner(lambda: model(X))
    with zo.branches(model, [1], PAIR).at(0), pytest.raises(RuntimeError, match="already active"):
        zo.directions(model, seed=1)
    assert_untouched(model, before)


def test_two_models_nest():
    """A teacher at its own branch inside a student's evaluation, with no shared state."""
    student, teacher = net(), zoo.build("conv")
    images = zoo.plain_image_batch()[0]
    with zo.displaced(teacher, [3], [0.1]):
        target = teacher(images)
    br = zo.branches(student, [1], PAIR)

    def fn() -> Tensor:
        with zo.displaced(teacher, [3], [0.1]):
            y = teacher(images)
        return (student(X)[:, :1] - y[:, :1]).square().mean()

    want = at_weights(
        student, [1], PAIR, lambda: (student(X)[:, :1] - target[:, :1]).square().mean()
    )
    close(br(fn), torch.stack(want))


def test_a_parameter_kept_from_an_evaluation_is_refused_later():
    model = net()
    kept = []

    def fn() -> Tensor:
        kept.append(model.first.weight)
        return model(X)

    zo.branches(model, [1], PAIR)(fn)
    for weight in kept:
        with pytest.raises(RuntimeError, match=r"'first\.weight'.*kept after its evaluation ended"):
            F.linear(X, weight)


def test_writing_a_parameter_inside_is_refused():
    model = net()

    def fn() -> Tensor:
        model.scale.mul_(2)
        return model(X)

    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"mul_ changes parameter 'scale' in place"):
        zo.branches(model, [1], PAIR)(fn)
    assert_untouched(model, before)


def test_data_ptr_of_a_stacked_parameter_is_no_address():
    """A raw kernel would read address 0: stacked it is refused, one by one it is a real address."""
    model = One(lambda w, x: x.sum() * float(w.data_ptr() != 0) + w.sum() * 0)
    with pytest.raises(Exception, match="data_ptr of parameter 'w'"):
        zo.branches(model, [1], PAIR, sequential=False)(lambda: model(X))
    with pytest.warns(zo.StackingWarning, match="data_ptr of parameter 'w'"):
        got = zo.branches(model, [1], PAIR)(lambda: model(X))
    close(got, torch.stack([X.sum(), X.sum()]))


# --- stacking and its limits ----------------------------------------------------------------------


class Branching(nn.Module):
    """Python control flow on an activation: no vmap can follow both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.02, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        if (x.sum() + self.w[0]) > 0:
            return self.w.sum()
        return self.w.prod() * 100


def test_control_flow_on_values_falls_back_with_one_warning():
    model = Branching()
    x = torch.zeros(2)
    with pytest.warns(
        zo.StackingWarning, match="Branching: branches run one after another"
    ) as record:
        got = zo.branches(model, [1], [[0.5], [-0.5]])(lambda: model(x))
        zo.branches(model, [2], [[0.5], [-0.5]])(lambda: model(x))
        zo.dual_loss(model, x, seed=3, eps=0.1, loss_fn=lambda m, b: m(b))
    assert len(record) == 1 and record[0].filename == __file__
    want = at_weights(model, [1], [[0.5], [-0.5]], lambda: model(x))
    close(got, torch.stack(want))
    with pytest.raises(RuntimeError):
        zo.branches(model, [1], [[0.5], [-0.5]], sequential=False)(lambda: model(x))


@pytest.mark.parametrize("params", [None, ["first.weight"], lambda n, p: p.dim() > 1])
def test_the_check_of_a_new_model_runs_once_for_a_selection(params):
    model, calls = net(), []

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        return m(x).sum()

    zo.dual_loss(model, X, seed=1, eps=EPS, loss_fn=loss_fn, params=params)
    first = len(calls)
    for seed in range(5):
        zo.dual_loss(model, X, seed=seed, eps=EPS, loss_fn=loss_fn, params=params)
    assert len(calls) == first + 5, "one stacked call a step"


def test_failing_to_stack_later_falls_back_too():
    model = net()
    flag = [False]

    def fn() -> Tensor:
        y = model(X)
        return y.sum() if not flag[0] else y.sum() * float(y.sum())

    br = zo.branches(model, [1], PAIR)
    br(fn)
    flag[0] = True
    with pytest.warns(zo.StackingWarning, match="one after another") as record:
        got = br(fn)
        br(fn)
    assert len(record) == 1
    close(got, torch.stack(at_weights(model, [1], PAIR, fn)))


class Cheat(nn.Module):
    """Tells branches apart by the batch it sees, so that stacking gives another number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x @ self.w).sum() * (1.0 if self.calls == 1 else 2.0)


def test_a_model_that_is_not_a_function_of_its_weights_is_found_out():
    """The stacked number differs from branch by branch: never silently one of the two."""
    model = Cheat()
    with pytest.warns(zo.StackingWarning, match="stacked and one-by-one results differ by"):
        zo.branches(model, [1], PAIR)(lambda: model(X))
    strict = Cheat()
    with pytest.raises(RuntimeError, match="stacked evaluation is not exact for this model"):
        zo.branches(strict, [1], PAIR, sequential=False)(lambda: strict(X))


def test_parameters_used_behind_the_module_trees_back():
    """A Python list of parameters keeps the originals: found on first use, and displaced too."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 4))
            self.b = nn.Parameter(torch.randn(4))
            self.cache = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.cache[0] + self.b).tanh().sum()

    torch.manual_seed(0)
    model = Hidden()
    before = state_of(model)
    want = torch.stack(at_weights(model, [2], PAIR, lambda: model(X)))
    with pytest.warns(zo.StackingWarning, match="outside the module tree: a"):
        got = zo.branches(model, [2], PAIR)(lambda: model(X))
    close(got, want)
    close(zo.branches(model, [2], PAIR)(lambda: model(X)), want)
    with zo.branches(model, [2], PAIR).at(1):
        close(model(X), want[1])
    assert_untouched(model, before)


def test_parameters_used_through_the_tree_and_behind_its_back():
    """An L2 term over a list made before: its weights must be the displaced ones, or an error."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    kept = list(model.parameters())

    def fn() -> Tensor:
        return model(X).mean() + sum(p.square().sum() for p in kept)

    before = state_of(model)
    want = torch.stack(at_weights(model, [2], PAIR, fn))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", zo.StackingWarning)
            got = zo.branches(model, [2], PAIR)(fn)
    except RuntimeError as error:
        assert "outside the module tree" in str(error)
    else:
        close(got, want)
    assert_untouched(model, before)


@pytest.mark.parametrize("sequential", [None, True])
def test_infinite_logits_do_not_hide_a_use_behind_the_trees_back(sequential):
    """Masked logits are minus infinity by design."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    kept = list(model.parameters())
    calls = []

    def fn() -> Tensor:
        calls.append(1)
        logits = model(X) * kept[0].sum()
        return logits.masked_fill(torch.tensor([True, False]), -math.inf)

    want = torch.stack(at_weights(model, [2], PAIR, fn))
    br = zo.branches(model, [2], PAIR, sequential=sequential)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zo.StackingWarning)
        close(br(fn), want)
        calls.clear()
        close(br(fn), want)
    assert len(calls) <= 2, "what the first use found is remembered"


def test_a_penalty_over_the_models_parameters():
    model = net()

    def fn() -> Tensor:
        return model(X).mean() + 0.1 * sum(p.square().sum() for p in model.parameters())

    got = zo.branches(model, [2], PAIR, sequential=False)(fn)
    close(got, torch.stack(at_weights(model, [2], PAIR, fn)))


DERIVATIVES: dict[str, Any] = {
    "grad": lambda m: torch.func.grad(lambda x: m(x).sum())(X),
    "jvp": lambda m: torch.func.jvp(m, (X,), (X,))[1],
    "vjp": lambda m: torch.func.vjp(m, X)[1](torch.ones(3, 2))[0],
    "jacrev": lambda m: torch.func.jacrev(m)(X[:1]),
    "vmap": lambda m: torch.func.vmap(m)(X),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_inputs_inside_an_evaluation(derivative):
    """A gradient penalty, a tangent: right or refused, never a path that is silently dropped."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))
    fn = DERIVATIVES[derivative]
    want = torch.stack(at_weights(model, [2], PAIR, lambda: fn(model)))
    for sequential in (None, True):
        try:
            got = zo.branches(model, [2], PAIR, sequential=sequential)(lambda: fn(model))
        except (RuntimeError, NotImplementedError):
            continue
        close(got, want)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backward_to_an_input_at_a_branch():
    model = net()

    def slope() -> Tensor:
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            y = model(x).square().sum()
            return torch.autograd.grad(y, x)[0]

    want = at_weights(model, [2], PAIR, slope)
    with zo.branches(model, [2], PAIR).at(1):
        try:
            got = slope()
        except RuntimeError:
            return
    close(got, want[1])


def test_unused_parameters_need_no_word():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zo.branches(model, [1], PAIR, sequential=False)(lambda: model(X))


def test_a_large_parameter_formed_whole_is_reported_once():
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2048, 2049))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.sum() * x.sum()

    model = Large()
    with pytest.warns(
        zo.StackingWarning, match=r"formed whole.*w \(4\.2 M elements, 1x\)"
    ) as record:
        zo.branches(model, [1], PAIR)(lambda: model(X))
        zo.branches(model, [1], PAIR)(lambda: model(X))
    assert len(record) == 1


def test_batch_norm_statistics_move_as_in_one_forward():
    """The first use evaluates several times; running statistics end as after the stacked one."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    br = zo.branches(model, [1], [[0.0], [0.0]], sequential=True)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    plain.load_state_dict(model.state_dict())
    got = br(lambda: model(X))
    with torch.no_grad():
        want = plain(X)
    close(got, torch.stack([want, want]))


class Keeping(nn.Module):
    """Keeps what it computed, as an attribute, a buffer, and once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.once: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x)
        self.mean = 0.5 * self.mean + self.hidden.mean(0)
        if self.once is None:
            self.once = self.hidden.detach().abs().max()
        return self.last(self.hidden)


def test_what_a_model_keeps_is_of_one_branch_afterwards():
    model = Keeping()
    wanted = []
    for eps in PAIR:
        with zo.displaced(model, [1], eps):
            model(X)
            wanted.append(model.hidden)
    model.once = None
    for _ in range(3):
        zo.branches(model, [1], PAIR, sequential=None)(lambda: model(X))
        assert any(torch.allclose(model.hidden, w, rtol=0, atol=1e-6) for w in wanted)
        assert not torch.equal(*wanted)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        torch.testing.assert_close(twin(X), model(X))
        assert set(twin.state_dict()) == set(model.state_dict())
        assert model.mean.shape == (4,) and model.once is not None and model.once.dim() == 0


def test_a_penalty_on_what_a_model_keeps_is_stacked():
    model = Keeping()

    def loss() -> Tensor:
        return F.cross_entropy(model(X), torch.zeros(len(X), dtype=torch.int64)) + (
            model.hidden.square().mean()
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        losses = [zo.branches(model, [1], PAIR)(loss) for _ in range(2)]
    for got in losses:
        close(got, torch.stack(at_weights(model, [1], PAIR, loss)))


# --- threads --------------------------------------------------------------------------------------


def test_models_on_threads():
    """Different models at once, each with its own state."""
    models = [net() for _ in range(3)]
    want = [at_weights(m, [i], PAIR, lambda m=m: m(X)) for i, m in enumerate(models)]
    got: list[Any] = [None] * 3
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(5):
                got[i] = zo.branches(models[i], [i], PAIR)(lambda: models[i](X))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for g, w in zip(got, want, strict=True):
        close(g, torch.stack(w))


def test_overlapping_evaluations_on_threads_leave_torch_compile_alone():
    """First in, first out: what each of them set for the process must not stay behind."""
    import torch._dynamo

    first, second = net(), net()
    events = [threading.Event() for _ in range(3)]

    def one() -> None:
        with zo.displaced(first, [1], [0.1]):
            events[0].set()
            events[1].wait(30)
        events[2].set()

    def two() -> None:
        events[0].wait(30)
        with zo.displaced(second, [1], [0.1]):
            events[1].set()
            events[2].wait(30)

    threads = [threading.Thread(target=work) for work in (one, two)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(e.is_set() for e in events)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(lambda x: x + 1, backend="eager")(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (
        "compilation is off for good"
    )


def test_one_model_on_two_threads_is_refused():
    model = net()
    br = zo.branches(model, [1], PAIR)
    br(lambda: model(X))
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with br.at(0):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(RuntimeError, match="already active"):
            br(lambda: model(X))
    finally:
        leave.set()
        thread.join()
    br(lambda: model(X))


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"seeds": torch.tensor([1.0])},
            TypeError,
            r"seeds must be an int64 vector.*torch\.float32",
        ),
        ({"seeds": torch.tensor([[1]])}, TypeError, r"seeds must be an int64 vector.*\(1, 1\)"),
        ({"seeds": [1.5]}, TypeError, r"seeds must be integers; got 1\.5"),
        ({"seeds": [True]}, TypeError, "seeds must be integers; got True"),
        ({"seeds": [2**64]}, ValueError, "seed must fit in 64 bits"),
        (
            {"seeds": [1, 2]},
            ValueError,
            r"coeffs must have shape \[branches, 2\].*got shape \(2, 1\)",
        ),
        ({"coeffs": [[0.1, 0.2]]}, ValueError, r"coeffs must have shape \[branches, 1\].*\(1, 2\)"),
        ({"coeffs": []}, ValueError, r"coeffs must have shape"),
        ({"coeffs": torch.zeros(2)}, ValueError, r"coeffs must have shape .*got shape \(2,\)"),
        ({"coeffs": [[0.1], [0.1, 0.2]]}, TypeError, r"coeffs must be \[branches, 1\] numbers"),
        ({"coeffs": [0.1]}, TypeError, r"coeffs must be \[branches, 1\] numbers"),
        ({"coeffs": [["a"]]}, TypeError, r"coeffs must be \[branches, 1\] numbers"),
        ({"coeffs": [[math.nan]]}, ValueError, "coeffs must be finite"),
        ({"coeffs": [[math.inf]]}, ValueError, "coeffs must be finite"),
        ({"distribution": "cauchy"}, ValueError, "distribution must be one of.*got 'cauchy'"),
        (
            {"scale": {"nobody": 2.0}},
            ValueError,
            r"scale must name moving parameters.*\['nobody'\]",
        ),
        ({"params": ["nobody"]}, ValueError, r"params must name parameters.*\['nobody'\]"),
        ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module or a Binding; got int"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments: dict[str, Any] = {"model": net(), "seeds": [1], "coeffs": PAIR, **change}
    with pytest.raises(error, match=message):
        zo.branches(
            arguments.pop("model"), arguments.pop("seeds"), arguments.pop("coeffs"), **arguments
        )


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf, "1"])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps must be a positive finite number"):
        zo.dual_loss(net(), X, seed=1, eps=eps, loss_fn=lambda m, x: m(x).sum())


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, x: m(x), r"loss_fn must be a scalar; got shape \(3, 2\)"),
        (lambda m, x: 1.0, "loss_fn must be a tensor, the loss; got float"),
        (lambda m, x: None, "loss_fn must be a tensor, the loss; got NoneType"),
        (lambda m, x: m(x).argmax(), r"loss_fn must be floating point; got torch\.int64"),
    ],
)
def test_bad_losses(loss_fn, message):
    with pytest.raises((ValueError, TypeError), match=message):
        zo.dual_loss(net(), X, seed=1, eps=EPS, loss_fn=loss_fn)


def test_a_loss_of_one_element_is_a_scalar():
    plus, minus = zo.dual_loss(
        net(), X, seed=1, eps=EPS, loss_fn=lambda m, x: m(x).sum().view(1, 1)
    )
    assert plus.shape == minus.shape == ()


def test_batches_without_a_loss():
    model = zoo.build("opt")
    with pytest.raises(TypeError, match=r"batch must be a mapping.*got Tensor"):
        zo.dual_loss(model, X, seed=1, eps=EPS)
    batch = zoo.lm_batch()
    del batch["labels"]
    with pytest.raises(
        ValueError, match="the model's output has no loss: put labels into the batch"
    ):
        zo.dual_loss(model, batch, seed=1, eps=EPS)


def test_nan_losses_are_handed_back():
    model = net()

    def loss_fn(m, x):
        return m(x).sum() * math.nan

    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        losses = zo.dual_loss(model, X, seed=1, eps=EPS, loss_fn=loss_fn)
    assert all(bool(loss.isnan()) for loss in losses)


def test_a_changed_model_is_an_error():
    model = net()
    br = zo.branches(model, [1], PAIR)
    br(lambda: model(X))
    model.first.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(zo.ModelChangedError, match=r"'first\.weight' was replaced"):
        br(lambda: model(X))
    close(
        zo.branches(model, [1], PAIR)(lambda: model(X)),
        torch.stack(at_weights(model, [1], PAIR, lambda: model(X))),
    )


def evaluate(model: nn.Module) -> None:
    zo.branches(model, [1], PAIR)(lambda: model(X))
    with zo.displaced(model, [1], [0.1]):
        model(X)


def test_a_model_is_freed_after_use():
    model = net()
    evaluate(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import torch, transformers as tf, zokernels as zo
torch.set_num_threads(1)
torch.manual_seed(0)
config = tf.OPTConfig(vocab_size=4096, hidden_size=768, num_hidden_layers=4, num_attention_heads=12,
                      ffn_dim=3072, max_position_embeddings=64, word_embed_proj_dim=768)
model = tf.OPTForCausalLM(config).eval()
ids = torch.randint(3, 4096, (2, 16))
both = torch.cat([ids, ids])
def mib():  # not ru_maxrss: a child starts with its parent's
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of building the model
with torch.no_grad():
    for _ in range(2):
        model(input_ids=both, labels=both, use_cache=False)
plain = mib()
zo.dual_loss(model, dict(input_ids=ids, labels=ids), seed=1, eps=1e-3)
dual = mib()
both = [[p.detach() + s for p in model.parameters()] for s in (1, -1)]
print(plain, dual, mib())
"""


def test_dual_step_peaks_no_higher_than_a_stacked_forward():
    """32 M parameters (120 MiB): a displaced copy of the weights would show, let alone two."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # freed means given back
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    plain, dual, copy = map(float, run.stdout.split()[-3:])
    assert dual - plain <= 64, (plain, dual)
    assert copy - plain > 150, "the measure does not see copies of the weights"
