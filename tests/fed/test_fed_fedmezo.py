"""FedMeZO: the four signals, random and default rates, against plain formulas; the MeZO loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import fed_zoo as zoo
import pytest
import torch

import zokernels as zo
from fedzo.lora import ensure_lora_, has_lora
from fedzo.messages import Report
from fedzo.methods.fedmezo import SIGNALS, FedMeZO, deviations


def run(signal: str, rounds: int, **given: Any) -> tuple[Any, list[Any]]:
    options = {"signal": signal, "lr": 1e-3, **given.pop("options", {})}
    fed = zoo.federation("fedmezo", options=options, **given)
    return fed, list(fed.run(rounds))


def plain(values: dict[int, float]) -> dict[int, float]:
    """h_i, as the paper's code has it, without its division by zero."""
    mean = sum(values.values()) / len(values)
    largest = max(abs(v - mean) for v in values.values())
    return {k: (v - mean) / largest if largest else 0.0 for k, v in values.items()}


def rates(h: dict[int, float], phi: float = 0.5, lr: float = 1e-3) -> dict[int, float]:
    return {k: lr * (1 + phi * x) for k, x in h.items()}


def close(got: dict[int, float], want: dict[int, float], tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for k, value in want.items():
        assert got[k] == pytest.approx(value, rel=tolerance), k


def test_signal_to_rate():
    h = deviations({1: 1.0, 2: 2.0, 5: 6.0})
    assert h == pytest.approx({1: -2 / 3, 2: -1 / 3, 5: 1.0})
    assert max(map(abs, h.values())) == 1.0


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, -1e30])
def test_equal_signals_divide_nothing_by_zero(value):
    assert deviations({1: value, 2: value, 3: value}) == {1: 0.0, 2: 0.0, 3: 0.0}
    assert deviations({7: value}) == {7: 0.0}
    assert deviations({}) == {}
    assert deviations({1: value, 2: value + 1e-3 * abs(value) + 1e-3})[2] == 1.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_signals_that_are_not_finite_give_default_rates(value):
    assert deviations({1: 1.0, 2: value, 3: 2.0}) == {1: 0.0, 2: 0.0, 3: 0.0}


@pytest.mark.parametrize("clients", [2, 3, 5])
def test_any_number_of_clients(clients):
    """The official code has three written into it."""
    _, records = run("loss", 2, clients=clients)
    assert len(records[1].lrs) == clients
    assert len(set(records[1].lrs.values())) == clients


def test_default_rates():
    _, records = run("default", 2)
    for record in records:
        close(record.lrs, dict.fromkeys(range(4), 1e-3))


def test_random_rates():
    fed, _ = run("random", 1)
    h = [x for r in range(60) for x in fed.method.personal(r, range(4)).values()]
    assert all(-1 <= x <= 1 for x in h)
    assert abs(sum(h)) < 40 and min(h) < -0.9 and max(h) > 0.9
    order = fed.method.orders(9, [0, 1])
    assert 0.5e-3 <= order[0].lr <= 1.5e-3 and order[0].lr != order[1].lr
    assert fed.method.orders(9, [0, 1]) == order


def test_round_wise_loss():
    _, records = run("loss", 4)
    close(records[0].lrs, dict.fromkeys(range(4), 1e-3))
    for before, record in itertools.pairwise(records):
        close(record.lrs, rates(plain(before.losses)), 1e-5)


def test_five_round_loss():
    _, records = run("five_round_loss", 7, options={"steps": 1})
    for record in records[:5]:
        close(record.lrs, dict.fromkeys(range(4), 1e-3))
    for t in (5, 6):
        window = records[t - 5 : t]
        means = {k: sum(r.losses[k] for r in window) / 5 for k in range(4)}
        close(records[t].lrs, rates(plain(means)), 1e-4)


def test_model_difference():
    """q_i from the clients' tensors themselves, tensor by tensor."""
    fed = zoo.federation("fedmezo", options={"signal": "model_difference", "lr": 1e-3})
    ends: dict[int, dict[str, torch.Tensor]] = {}
    starts: list[dict[str, torch.Tensor]] = []

    def see(order: Any, start: Any, scalars: Any) -> None:
        starts.append(start)
        ends[order.client] = {n: v.clone() for n, v in fed.space.values().items()}

    zoo.spy(fed, see)
    run_ = fed.run(2)
    first = next(run_)
    close(first.lrs, dict.fromkeys(range(4), 1e-3))
    moves = {k: {n: (v - starts[0][n]).double() for n, v in e.items()} for k, e in ends.items()}
    mean = {n: sum(m[n] for m in moves.values()) / 4 for n in moves[0]}
    q = {k: sum(float((m[n] - mean[n]).norm()) for n in m) for k, m in moves.items()}
    assert fed.method.differences == pytest.approx(q, rel=1e-3)
    close(next(run_).lrs, rates(plain(q)), 1e-3)


def test_model_difference_in_tiles(monkeypatch):
    """Matrices and vectors cut into tiles have the same norms."""
    fed = zoo.federation("full_fedzo")
    orders = fed.method.orders(1, [0, 1, 2])
    paths = [fed.method.path(o, [0.5 * k, -1.0, 2.0]) for k, o in orders.items()]
    want = fed.space.deviations(paths)
    assert min(want[0], want[2]) > 0
    monkeypatch.setattr("fedzo.space._TILE", 1)
    assert fed.space.deviations(paths) == pytest.approx(want, rel=1e-6)


def test_the_loss_travels_and_has_no_part_in_the_step():
    sent: list[Report] = []

    def up(client: int, data: bytes) -> list[bytes]:
        sent.append(Report.decode(data))
        return [data]

    fed, (record,) = run("loss", 1, channel=up)
    assert [len(r.scalars) for r in sent] == [4] * 4
    assert {r.client: r.scalars[-1] for r in sent} == pytest.approx(record.losses)
    other, _ = run("default", 1)
    assert not zoo.differing(fed.space.values(), other.space.values())


def test_signals_with_partial_participation():
    """A client's last known loss counts; who has none gets the default."""
    _, records = run("loss", 6, clients=5, clients_per_round=2, options={"steps": 1})
    known: dict[int, float] = {}
    for record in records:
        have = {k: known[k] for k in record.invited if k in known}
        h = {**dict.fromkeys(record.invited, 0.0), **(plain(have) if have else {})}
        close(record.lrs, rates(h), 1e-5)
        known.update({k: record.losses[k] for k in record.accepted})
    assert len(known) == 5


def test_a_client_is_a_mezo_run():
    """The local loop against the optimizer of zokernels, on the same seeds and batches."""
    fed = zoo.federation("fedmezo", clients=2)
    got: dict[int, Any] = {}
    zoo.spy(
        fed,
        lambda order, start, scalars: got.update(
            {order.client: (order, scalars, {n: v.clone() for n, v in fed.space.values().items()})}
        ),
    )
    start = {n: v.clone() for n, v in fed.space.values().items()}
    list(fed.run(1))
    order, scalars, end = got[1]
    fed.space.load_(start)
    examples = zoo.Examples(fed.shards[1], 2, seed=5, client=1)
    for t, g in enumerate(scalars):
        batch = fed.task.batch(next(examples))
        z = fed.method.direction(order, t)
        plus, minus = zo.dual_loss(fed.model, batch, seed=z, eps=1e-3, loss_fn=fed.task.loss)
        assert g == pytest.approx(float(plus - minus) / 2e-3, rel=1e-6, abs=1e-6)
        zo.Displacement([z], [-order.lr * g]).apply_(fed.model)
    for n, v in fed.space.values().items():
        torch.testing.assert_close(v, end[n], rtol=1e-6, atol=1e-7)


def test_clients_have_their_own_directions():
    method = zoo.federation("fedmezo").method
    seeds = {
        method.direction(method.order(r, c), t)
        for r in range(1, 4)
        for c in range(5)
        for t in range(6)
    }
    assert len(seeds) == 3 * 5 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "loudness"}, "signal must be one of"),
        ({"phi": 1.0}, r"phi must be in \[0, 1\)"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"eps": math.nan}, "eps must be positive"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"seeds": "many"}, "seeds must be one of"),
        ({"signal": "loss", "payload": "tensors"}, "needs payload 'scalars'"),
        ({"distribution": "cauchy"}, "distribution"),
        ({"rounding": "up"}, "rounding"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FedMeZO(**options)


def test_the_papers_defaults():
    method = FedMeZO()
    assert (method.lr, method.eps, method.steps) == (1e-5, 1e-3, 30)
    assert (method.lora_rank, method.lora_alpha, method.phi) == (128, 256, 0.5)
    assert SIGNALS == ("default", "random", "loss", "five_round_loss", "model_difference")


# --- adapters -------------------------------------------------------------------------------------


def test_adapters_start_where_the_model_was():
    model, plain_model = zoo.build(), zoo.build()
    batch = zoo.ToyTask().batch([0, 1])
    state = torch.get_rng_state()
    ensure_lora_(model, rank=3, alpha=6, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert has_lora(model) and not has_lora(plain_model)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, plain_model(**batch).loss)
    moving = [n for n, p in model.named_parameters() if p.requires_grad]
    assert moving and all(".lora_" in n for n in moving)
    again = zoo.build()
    ensure_lora_(again, rank=3, alpha=6, seed=4)
    assert not zoo.differing(zoo.weights(model), zoo.weights(again))
    other = zoo.build()
    ensure_lora_(other, rank=3, alpha=6, seed=5)
    assert zoo.differing(zoo.weights(model), zoo.weights(other))
    before = zoo.weights(model)
    ensure_lora_(model, rank=7, alpha=6)  # it has some already
    assert not zoo.differing(before, zoo.weights(model))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert_classifier"])
def test_query_and_value_are_found_in_other_families(architecture):
    import model_zoo

    if architecture == "bert_classifier":
        from transformers import BertConfig, BertForSequenceClassification

        model: Any = BertForSequenceClassification(
            BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            )
        )
    else:
        model = model_zoo.build(architecture)
    ensure_lora_(model, rank=2)
    assert any(p.requires_grad for p in model.parameters())


def test_targets_must_exist():
    with pytest.raises(ValueError, match="targets must name layers"):
        ensure_lora_(zoo.build(), targets=["nothing"])
    with pytest.raises(ValueError, match="targets must be given"):
        ensure_lora_(torch.nn.Sequential(torch.nn.Linear(2, 2)))
