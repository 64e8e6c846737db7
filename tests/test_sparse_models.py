"""Models under a mask: evaluation equals moving the masked elements in place.

As :mod:`test_branches_models`, for every family of the zoo, with a mask over all parameters at
once: matrices, norms, biases, embeddings, tied weights, fused experts, convolutions.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import model_zoo as zoo
import pytest
import torch
from test_branches_models import RTOL, SEEDS, TABLE, assert_untouched, close, perturbed, snapshot
from torch import Tensor, nn

import zokernels as zo

EPS = 0.05


def everything(name: str, p: nn.Parameter) -> bool:
    return True


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.simplefilter("ignore", zo.StackingWarning)
        yield


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("name", zoo.CASES)
def test_dual_loss_is_in_place_perturbation_of_the_masked_elements(name, distribution):
    case, model = zoo.CASES[name], zoo.build(name)
    batch = case.batch()
    mask = zo.Mask.random(model, 0.2, seed=4, params=everything)
    before = snapshot(model)
    options: dict[str, Any] = {"seed": 5, "distribution": distribution, "mask": mask}
    got = zo.dual_loss(model, batch, eps=EPS, loss_fn=case.loss_fn, **options)
    again = zo.dual_loss(model, batch, eps=EPS, loss_fn=case.loss_fn, **options)
    assert_untouched(model, before)

    z = zo.directions(model, **options)
    for n, direction in z.items():
        moves = torch.zeros(direction.numel(), dtype=torch.bool)
        moves[mask.indices[n]] = True
        assert torch.equal(direction.view(-1) != 0, moves)
    wanted = []
    for sign in (1, -1):
        with perturbed(model, [(sign * EPS, z)]), torch.no_grad():
            wanted.append(zoo.loss_of(name, model, batch))
    for loss, repeated, want in zip(got, again, wanted, strict=True):
        close(loss, want)
        close(repeated, loss, 1e-6)
    with torch.no_grad():
        plain = float(zoo.loss_of(name, model, batch))
    moved = max(abs(float(want) - plain) for want in wanted)
    assert moved > 10 * RTOL * plain, "the test would not see a missing displacement"


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama_tied", "gemma2", "t5", "mixtral", "bert"])
def test_one_parameter_at_a_time(name):
    """A correction that is wrong in a single small tensor shows."""
    case, model = zoo.CASES[name], zoo.build(name)
    batch = case.batch()
    named = dict(model.named_parameters())
    names = list(named)
    chosen = {names[0], names[len(names) // 2], names[-1]}
    chosen |= set([n for n in names if named[n].dim() == 1][:3])
    for one in sorted(chosen):
        mask = zo.Mask.random(model, 0.5, seed=1, params=[one])
        z = zo.directions(model, seed=3, mask=mask)
        got = zo.dual_loss(model, batch, seed=3, eps=0.1, loss_fn=case.loss_fn, mask=mask)
        with torch.no_grad():
            for loss, sign in zip(got, (1, -1), strict=True):
                with perturbed(model, [(sign * 0.1, z)]):
                    close(loss, zoo.loss_of(name, model, batch))


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen3_moe", "roberta", "conv", "lstm"])
def test_three_branches_of_two_directions(name):
    case, model = zoo.CASES[name], zoo.build(name)
    batch = case.batch()
    mask = zo.Mask.random(model, 0.3, seed=2, params=everything)
    some = next(iter(zo.bind(model, mask=mask).by_name))
    view = zo.branches(model, SEEDS, TABLE, mask=mask, scale={some: 3.0})
    got = view(lambda: zoo.loss_of(name, model, batch))
    zs = [zo.directions(model, seed=s, mask=mask) for s in SEEDS]
    for z in zs:
        z[some] = z[some] * 3
    with torch.no_grad():
        for g, row in enumerate(TABLE):
            with perturbed(model, list(zip(row, zs, strict=True))):
                want = zoo.loss_of(name, model, batch)
            close(got[g], want)
            with view.at(g):
                close(zoo.loss_of(name, model, batch), want)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "mixtral"])
def test_a_full_mask_is_every_element(name):
    case, model = zoo.CASES[name], zoo.build(name)
    mask = zo.Mask.full(model, params=everything)
    z = zo.directions(model, seed=1, mask=mask)
    assert all(bool((direction != 0).all()) for direction in z.values())
    got = zo.dual_loss(model, case.batch(), seed=1, eps=1e-2, mask=mask)
    for loss, sign in zip(got, (1, -1), strict=True):
        with perturbed(model, [(sign * 1e-2, z)]), torch.no_grad():
            close(loss, zoo.loss_of(name, model, case.batch()))


def test_displaced_gives_the_displaced_weights_to_any_code():
    model, case = zoo.build("opt"), zoo.CASES["opt"]
    mask = zo.Mask.random(model, 0.2, seed=1, params=everything)
    z = zo.directions(model, seed=9, mask=mask)
    before = snapshot(model)
    with zo.displaced(model, [9], [0.1], mask=mask):
        inside = {n: t.clone() for n, t in model.state_dict().items()}
        loss = model(**case.batch()).loss
    assert_untouched(model, before)
    with perturbed(model, [(0.1, z)]):
        for n, t in model.state_dict().items():
            torch.testing.assert_close(inside[n], t, rtol=0, atol=1e-6)
        close(loss, model(**case.batch()).loss.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_shadow_is_what_a_low_precision_model_is_evaluated_at(dtype):
    """After many small updates the weights lag behind their shadow by up to half a unit.

    The projected gradient must be that of the shadow: a float32 model whose masked elements are the
    shadow's (and whose others are the stored ones) has the same losses up to the activations'
    precision, and the correction reaches them: the logits move towards it.
    """
    model = zoo.build("opt").to(dtype)
    case = zoo.CASES["opt"]
    mask = zo.Mask.random(model, 0.3, seed=4)
    binding = zo.bind(model, mask=mask)
    binding.apply_([1], [2e-4])  # below a unit of most weights' last place
    shadows = {p.name: p.values() for p in binding.params}
    held = torch.cat([p.tensor.detach().view(-1)[p.masked.indices] for p in binding.params])
    lag = torch.cat(list(shadows.values())) - held.float()
    assert float((lag != 0).float().mean()) > 0.5
    wide = copy.deepcopy(model).float()
    for p in binding.params:
        with torch.no_grad():
            wide.get_parameter(p.name).view(-1)[p.masked.indices] = shadows[p.name]
    exact = wide.model.decoder.layers[0].fc1
    x = torch.randn(3, 7, 32).to(dtype)
    stacked = zo.branches(model, [1], [[0.0], [0.0]], mask=mask, sequential=False)
    got = stacked(lambda: model.model.decoder.layers[0].fc1(x))[0].double()
    want = exact(x.float()).double()
    plain = model.model.decoder.layers[0].fc1(x).double()
    assert float((got - want).detach().abs().mean()) < float((plain - want).detach().abs().mean())
    loss = zo.dual_loss(model, case.batch(), seed=3, eps=1e-2, mask=mask)[0]
    assert torch.isfinite(loss)


def test_other_masks_other_directions_and_the_dense_one():
    model = zoo.build("opt")
    a, b = (zo.Mask.random(model, 0.1, seed=s) for s in (1, 2))
    losses = {
        tuple(float(v) for v in zo.dual_loss(model, zoo.CASES["opt"].batch(), seed=1, eps=0.1, **o))
        for o in ({"mask": a}, {"mask": b}, {})
    }
    assert len(losses) == 3
    again = zo.dual_loss(model, zoo.CASES["opt"].batch(), seed=1, eps=0.1, mask=a)
    assert tuple(map(float, again)) in losses


def test_a_view_of_rows_has_its_part_of_the_noise():
    """Indexing a parameter inside the model (fused experts) takes the list's part."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (
                sum((x @ self.w[e].transpose(0, 1).T.mT).sum() * (e + 1) for e in range(4))
                + (x @ self.w[1:3].mT).square().sum()
            )

    model, x = Rows(), torch.randn(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = sum((x @ self.w[e].mT).square().sum() * (e + 1) for e in range(4))
        return first + torch.nn.functional.linear(x, self.w[1:3][1]).sum()

    Rows.forward = forward
    mask = zo.Mask.random(model, 0.4, seed=1, params=everything)
    got = zo.branches(model, [3], [[0.1], [-0.1]], mask=mask, sequential=False)(lambda: model(x))
    z = zo.directions(model, seed=3, mask=mask)
    for value, sign in zip(got, (1, -1), strict=True):
        with perturbed(model, [(sign * 0.1, z)]), torch.no_grad():
            close(value, model(x))


def test_views_under_a_mask_read_their_places_once(monkeypatch):
    """Only the first step over fused experts looks its elements up (and waits for a device)."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return sum((x @ self.up[1:][e].mT).square().mean() for e in range(2))

    model, x, looked_up = Experts(), torch.randn(7, 5), []
    mask = zo.Mask.random(model, 0.4, seed=1)
    opt = zo.MeZO(model, lr=1e-2, eps=1e-2, mask=mask)
    search = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a: looked_up.append(a) or search(*a))
    counts = []
    for _ in range(4):
        opt.step(lambda: model(x))
        counts.append(len(looked_up))
    assert counts[0] > 0
    assert counts == [counts[0]] * 4


def test_capture_keeps_one_graph_under_a_mask():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    mask = zo.Mask.random(model, 0.3, seed=1)

    def losses(seeds: Tensor, coeffs: Tensor, x: Tensor) -> Tensor:
        return zo.branches(model, seeds, coeffs, mask=mask)(lambda: model(x).square().mean())

    args = (torch.tensor([3]), torch.tensor([[0.1], [-0.1]]), torch.randn(5, 8))
    want = losses(*args)
    graph = zo.capture(losses, *args)
    close(graph(*args), want, 1e-6)
    moved = (torch.tensor([4]), *args[1:])
    close(graph(*moved), losses(*moved), 1e-6)
