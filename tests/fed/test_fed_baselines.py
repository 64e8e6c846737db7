"""DeComFL, FedKSeed, Full-FedZO and FedAvg against their formulas written out."""

from __future__ import annotations

import math
from typing import Any

import fed_zoo as zoo
import pytest
import torch
from torch import Tensor

import zokernels as zo
from fedzo.messages import SHARED, Dense, Merged, Order
from fedzo.methods import METHODS, DeComFL, FedAvg, FedKSeed, make
from fedzo.methods.fedkseed import seed_probabilities


def loss_at(
    model: torch.nn.Module, batch: Any, moves: list[tuple[float, dict[str, Tensor]]]
) -> float:
    """The loss at ``w + sum c z``, with the weights written and put back."""
    kept = zoo.weights(model)
    with torch.no_grad():
        for c, z in moves:
            for n, p in model.named_parameters():
                p.add_(z[n], alpha=c)
        value = float(model(**batch, use_cache=False).loss)
        for n, p in model.named_parameters():
            p.copy_(kept[n])
    return value


# --- DeComFL --------------------------------------------------------------------------------------


def test_decomfl_is_forward_differences():
    """``g_p = [L(w + mu z_p) - L(w)] / mu``; ``w <- w - lr / P sum_p g_p z_p``, K times."""
    mu, lr, p = 1e-2, 0.05, 3
    fed = zoo.federation("decomfl", options={"eps": mu, "lr": lr, "perturbations": p}, clients=2)
    model = fed.model
    got: dict[int, Any] = {}
    zoo.spy(fed, lambda o, s, g: got.update({o.client: (o, g, zoo.weights(model))}))
    start = zoo.weights(model)
    list(fed.run(1))
    order, scalars, end = got[1]
    assert len(scalars) == 2 * p
    with torch.no_grad():
        for n, w in model.named_parameters():
            w.copy_(start[n])
    examples = zoo.Examples(fed.shards[1], 2, seed=5, client=1)
    for k in range(2):
        batch = fed.task.batch(next(examples))
        z = [zo.directions(model, seed=fed.method.direction(order, k, i)) for i in range(p)]
        base = loss_at(model, batch, [])
        g = [(loss_at(model, batch, [(mu, zi)]) - base) / mu for zi in z]
        assert scalars[k * p : (k + 1) * p] == pytest.approx(g, rel=2e-2, abs=2e-3)
        with torch.no_grad():
            for n, w in model.named_parameters():
                for gi, zi in zip(scalars[k * p : (k + 1) * p], z, strict=True):
                    w.add_(zi[n], alpha=-lr / p * gi)
    for n, w in model.named_parameters():
        torch.testing.assert_close(w.detach(), end[n], rtol=1e-5, atol=1e-6)


def test_a_returning_client_is_sent_every_missed_average():
    """Bytes down: the order and the K P averages of each missed round."""
    fed = zoo.federation("decomfl", clients=6, clients_per_round=2)
    known: dict[int, int] = {}
    size = 0
    for record in fed.run(6):
        want = 0
        for k in record.invited:
            want += len(fed.method.order(record.round, k).encode())
            want += sum(
                map(len, fed.updates(known.get(k, 0))[: record.round - 1 - known.get(k, 0)])
            )
            known[k] = record.round - 1
        assert record.bytes_down == want
        size = len(fed.updates(record.round - 1)[0])
    assert size <= 4 * 2 * 2 + 64


def test_decomfl_defaults():
    method = DeComFL()
    assert (method.lr, method.eps, method.steps, method.perturbations) == (5e-6, 1e-3, 1, 5)
    assert method.seeds == "shared"
    with pytest.raises(ValueError, match="perturbations"):
        DeComFL(perturbations=0)


# --- FedKSeed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pro", [False, True])
def test_the_model_is_one_coefficient_a_candidate(pro):
    """After R rounds ``w = w0 + sum_s A[s] z(s)``, with A summed from the reports."""
    fed = zoo.federation("fedkseed", options={"pro": pro, "lr": 5e-3}, clients=3)
    model = fed.model
    start = zoo.weights(model)
    wanted = [0.0] * 8
    zoo.spy(
        fed,
        lambda o, s, g: [
            wanted.__setitem__(i, wanted[i] - 5e-3 * x / 3)
            for i, x in zip(fed.method.draws(o), g, strict=True)
        ],
    )
    list(fed.run(4))
    assert fed.method.accumulated == pytest.approx(wanted, rel=1e-6)
    assert sum(fed.method.counts) == 4 * 3 * 3
    z = [zo.directions(model, seed=fed.method.candidate(i)) for i in range(8)]
    for n, p in model.named_parameters():
        want = start[n].double() + sum(a * zi[n].double() for a, zi in zip(wanted, z, strict=True))
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=2e-6)
    (update,) = fed.updates(0)
    (block,) = Merged.decode(update).blocks
    assert block.client == SHARED and len(block.values) == 8


def test_no_rounding_piles_up_over_rounds():
    """Each round starts from the first weights: bfloat16 weights are one rounding from them."""
    fed = zoo.federation("fedkseed", model=zoo.build(torch.bfloat16), options={"lr": 1e-3})
    first = zoo.weights(fed.model)
    list(fed.run(5))
    used = [(fed.method.candidate(i), a) for i, a in enumerate(fed.method.accumulated) if a]
    exact = zo.Displacement([s for s, _ in used], [a for _, a in used])
    model = zoo.build(torch.bfloat16)
    assert not zoo.differing(zoo.weights(model), first)
    exact.apply_(model)
    assert not zoo.differing(zoo.weights(model), zoo.weights(fed.model))


def test_draws_are_the_same_at_server_and_client():
    method = zoo.federation("fedkseed", options={"steps": 400}).method
    order = method.order(3, 1)
    draws = method.draws(order)
    assert draws == method.draws(Order.decode(order.encode()))
    assert draws != method.draws(method.order(4, 1)) and draws != method.draws(method.order(3, 2))
    assert min(draws.count(i) for i in range(8)) > 20  # 50 each


def test_pro_draws_by_probability():
    method = zoo.federation("fedkseed", options={"pro": True, "steps": 3000}).method
    p = (0.5, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0)
    draws = method.draws(method.order(1, 0, values=p))
    shares = [draws.count(i) / 3000 for i in range(8)]
    assert shares == pytest.approx(p, abs=0.04)
    assert shares[1] == 0.0 and shares[7] == 0.0


def test_pro_probabilities_are_softmax_of_minmax():
    sizes, counts = [4.0, 3.0, 0.0, 1.0], [2, 1, 0, 1]
    means = [2.0, 3.0, 2.0, 1.0]  # the one never drawn counts as the mean of the drawn
    scaled = [(m - 1.0) / 2.0 for m in means]
    want = [math.exp(s) / sum(map(math.exp, scaled)) for s in scaled]
    assert seed_probabilities(sizes, counts).tolist() == pytest.approx(want)
    assert (
        seed_probabilities(sizes, counts, "least")[2]
        == seed_probabilities(sizes, counts, "least").min()
    )
    with pytest.raises(ValueError, match="unseen must be one of"):
        FedKSeed(unseen="none")
    assert seed_probabilities([0.0] * 4, [0] * 4).tolist() == [0.25] * 4
    assert seed_probabilities([3.0] * 4, [3] * 4).tolist() == pytest.approx([0.25] * 4)


def test_fedkseed_sends_no_indices_and_little_down():
    """T scalars up; the whole state down is 4 K bytes: below 18 KB at the paper's K and T."""
    method = FedKSeed()
    assert (method.candidates, method.steps, method.lr, method.eps) == (4096, 200, 3e-7, 5e-4)
    order = method.order(1, 0)
    assert method.scalars(order) == 200
    update = Merged(round=1, fingerprint=0, blocks=method.merge(1, {}, zoo.Rule()))
    assert len(update.encode()) + 4 * 200 + 32 + len(order.encode()) < 18_000


# --- dense baselines ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedavg_lora"])
def test_fedavg_is_the_mean_of_sgd_runs(name):
    fed = zoo.federation(name, clients=3)
    start = {n: v.clone() for n, v in fed.space.values().items()}
    (record,) = list(fed.run(1))
    got = {n: v.clone() for n, v in fed.space.values().items()}
    ends, losses = [], {}
    parameters = {p.name: p.tensor for p in fed.space.params}
    for client in range(3):
        fed.space.load_(start)
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        examples = zoo.Examples(fed.shards[client], 2, seed=5, client=client)
        seen = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = fed.task.loss(fed.model, fed.task.batch(next(examples)))
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        losses[client] = sum(seen) / 2
        ends.append({n: p.detach().double() for n, p in parameters.items()})
    for n, value in got.items():
        mean = torch.stack([e[n] for e in ends]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    assert record.losses == pytest.approx(losses, rel=1e-5)
    assert record.scalars.count == 0


def test_dense_traffic_is_every_value_both_ways():
    fed = zoo.federation("fedavg")
    values = sum(p.numel() * 4 for p in fed.model.parameters())
    records = list(fed.run(2))
    order = len(fed.method.order(1, 0).encode())
    size = len(Dense(round=1, client=0, fingerprint=0, data=fed.space.to_bytes()).encode())
    assert size == values + 32
    assert [r.bytes_up for r in records] == [4 * size] * 2
    assert [r.bytes_down for r in records] == [4 * order, 4 * (order + size)]


def test_a_loss_without_derivative_is_refused():
    fed = zoo.federation("fedavg")
    loss = fed.task.loss
    fed.task.loss = lambda m, b: loss(m, b).detach()  # type: ignore[method-assign]
    before = zoo.weights(fed.model)
    with pytest.raises(ValueError, match="can be differentiated"):
        list(fed.run(1))
    assert not zoo.differing(before, zoo.weights(fed.model))
    with pytest.raises(ValueError, match="payload must be 'tensors'"):
        FedAvg(payload="scalars")


def test_sparse_training_sends_a_thousandth_of_dense():
    """T scalars against every value: the ratio the papers report, on this model's own bytes."""
    dense = zoo.federation("full_fedzo", options={"payload": "tensors"})
    sparse = zoo.federation("meerkat", options={"steps": 1})
    up = [next(iter(fed.run(1))).bytes_up for fed in (dense, sparse)]
    assert up[0] / up[1] > 1000


# --- the registry ---------------------------------------------------------------------------------


def test_methods_by_name():
    assert set(METHODS) == set(zoo.OPTIONS)
    for name, kind in METHODS.items():
        assert kind.name == name and isinstance(make(name), kind)
        text = kind.__doc__ or ""
        assert "Args:" in text or "Options as" in text
    with pytest.raises(ValueError, match="method must be one of"):
        make("sgd")
    with pytest.raises(ValueError, match="learning_rate"):
        make("meerkat", learning_rate=1.0)
