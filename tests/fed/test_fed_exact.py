"""Server and clients agree bit for bit: virtual paths, updates, catch-up, leftovers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import fed_zoo as zoo
import pytest
import torch
from torch import Tensor

from fedzo.client import apply_merged_
from fedzo.messages import Merged, Order, Report
from fedzo.methods import Method

DTYPES = [torch.float32, torch.bfloat16]
EVERY = [*zoo.SCALAR, *zoo.VARIANTS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_server_and_client_have_the_same_weights(name, dtype):
    """What the server rebuilds from a report is what the client had; what a client rebuilds from
    the updates is what the server has."""
    model = zoo.build(dtype)
    reported: dict[tuple[int, int], tuple[float, ...]] = {}
    seen: list[tuple[Any, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    def up(client: int, data: bytes) -> list[bytes]:
        report = Report.decode(data)
        reported[report.round, client] = report.scalars
        return [data]

    fed = zoo.federation(name, model=model, channel=up, clients_per_round=2)
    adapted = zoo.weights(fed.model)  # with adapters, where the method adds some

    def see(order: Any, start: dict[str, Tensor], scalars: list[float]) -> None:
        values = {n: v.clone() for n, v in fed.space.values().items()}
        seen.append((order, start, values, zoo.weights(fed.model)))

    zoo.spy(fed, see)
    for record in fed.run(2):
        assert len(record.accepted) == len(record.invited) > 0
    final = zoo.weights(fed.model)
    moved = zoo.differing(adapted, final)
    assert moved and set(moved) <= {p.name for p in fed.space.params}

    for order, start, own, whole in seen:
        fed.space.load_(start)
        path = fed.method.path(order, reported[order.round, order.client])
        fed.space.apply_(path)
        assert not zoo.differing(fed.space.values(), own), (order.round, order.client)
        assert not zoo.differing(zoo.weights(fed.model), whole)
        assert zoo.differing(own, start)

    other = zoo.federation(name, model=zoo.build(dtype), clients_per_round=2)
    assert not zoo.differing(zoo.weights(other.model), adapted)
    base = other.space.snapshot() if other.method.from_base else None
    for update in fed.updates(0):
        apply_merged_(other.method, update, base)
    assert not zoo.differing(zoo.weights(other.model), final)


@pytest.mark.parametrize("name", [*EVERY, *zoo.DENSE])
def test_the_weights_are_the_servers_after_every_client(name):
    """One copy serves all: a client leaves nothing behind, whatever it did."""
    fed = zoo.federation(name)
    starts: list[tuple[int, dict[str, Tensor]]] = []
    work = fed.transport.work

    def watched(request: Any) -> Any:
        before = zoo.weights(fed.model)
        reply = work(request)
        assert not zoo.differing(zoo.weights(fed.model), before)
        starts.append((Order.decode(request.order).round, before))
        return reply

    fed.transport.work = watched
    list(fed.run(2))
    rounds = {r for r, _ in starts}
    assert rounds >= {1, 2}
    for r in rounds:
        same = [before for round_, before in starts if round_ == r]
        assert len(same) == 4 and not any(zoo.differing(same[0], b) for b in same)


@pytest.mark.parametrize("name", ["meerkat", "full_fedzo", "fedspzo", "fedavg"])
def test_the_weights_come_back_when_a_client_fails(name):
    fed = zoo.federation(name)
    next(fed.run(1))
    before = zoo.weights(fed.model)

    def fails(order: Any, start: Any, scalars: Any) -> None:
        assert zoo.differing(zoo.weights(fed.model), before)
        raise RuntimeError("power failure")

    zoo.spy(fed, fails)
    with pytest.raises(RuntimeError, match="power failure"):
        next(fed.run(2))
    assert not zoo.differing(zoo.weights(fed.model), before)
    assert fed.round == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["meerkat", "fedmezo", "fedspzo", "fedkseed", "decomfl"])
def test_a_client_that_was_away_catches_up(name, dtype):
    """From any round on: the missed updates lead to the server's weights."""
    fed = zoo.federation(name, model=zoo.build(dtype))
    kept = [zoo.weights(fed.model)]
    values = [{n: v.clone() for n, v in fed.space.values().items()}]
    for _ in fed.run(4):
        kept.append(zoo.weights(fed.model))
        values.append({n: v.clone() for n, v in fed.space.values().items()})
    other = zoo.federation(name, model=zoo.build(dtype))
    base = other.space.snapshot() if other.method.from_base else None
    for known in (1, 3):
        other.space.load_(values[known])
        assert not zoo.differing(zoo.weights(other.model), kept[known])
        missed = fed.updates(known)
        assert len(missed) == (1 if other.method.from_base else 4 - known)
        for update in missed:
            apply_merged_(other.method, update, base)
        assert not zoo.differing(zoo.weights(other.model), kept[-1])


@pytest.mark.parametrize("name", ["full_fedzo", "fedspzo", "meerkat"])
def test_steps_of_zero_leave_even_the_sign_of_zero(name):
    """A loss that does not change moves nothing; the path of such steps is as exact as any."""
    model = zoo.build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.0)
    fed = zoo.federation(name, model=model, options={"density": 0.1} if name == "meerkat" else {})
    order = fed.method.order(1, 0)
    start = {n: v.clone() for n, v in fed.space.values().items()}
    assert any(bool((v.signbit() & (v == 0)).any()) for v in start.values())
    n = fed.method.per_step
    scalars = [0.0] * n + [0.5] * n + [0.0] * (n * (order.steps - 2))
    for step in fed.method.steps_of(1, fed.method.owner(order), fed.method.rates(order, scalars)):
        fed.space.apply_(step)
    apart = {n: v.clone() for n, v in fed.space.values().items()}
    fed.space.load_(start)
    fed.space.apply_(fed.method.path(order, scalars))
    assert not zoo.differing(fed.space.values(), apart)
    fed.space.load_(start)
    fed.space.apply_(fed.method.path(order, [0.0] * len(scalars)))
    assert not zoo.differing(fed.space.values(), start)


def test_weights_changed_between_rounds_are_the_servers():
    """Whoever writes the weights between rounds has the last word."""
    fed = zoo.federation("full_fedzo", dropout=0.0, channel=lambda client, data: [])
    rounds = fed.run(2)
    assert next(rounds).accepted == ()
    with torch.no_grad():
        for p in fed.model.parameters():
            p.add_(1e-3)
    changed = zoo.weights(fed.model)
    next(rounds)
    assert not zoo.differing(zoo.weights(fed.model), changed)


@pytest.mark.parametrize("name", ["full_fedzo", "meerkat", "fedmezo", "lora_fedzo", "fedspzo"])
def test_tensors_and_scalars_give_the_same_weights(name):
    """The mean of the clients' weights, sent dense or as scalars: equal to float32 rounding."""
    finals, sizes = [], []
    for payload in ("scalars", "tensors"):
        fed = zoo.federation(name, options={"payload": payload})
        start = {n: v.clone() for n, v in fed.space.values().items()}
        (record,) = list(fed.run(1))
        finals.append({n: v.clone() for n, v in fed.space.values().items()})
        sizes.append(record.bytes_up)
    for n, a in finals[0].items():
        change = (a - start[n]).abs().max()
        assert float((a - finals[1][n]).abs().max()) <= 1e-3 * float(change) + 1e-6, n
    assert any(not zoo.same_bits(start[n], a) for n, a in finals[0].items())
    assert sizes[1] > 2 * sizes[0]


@dataclass(kw_only=True)
class SignMeZO(Method):
    """A method of one's own: steps of one size, along the sign of the projected gradient."""

    name: ClassVar[str] = "sign_mezo"
    lr: float = 1e-2

    def rates(self, order: Order, scalars: Iterable[float]) -> list[float]:
        return [-order.lr * math.copysign(1.0, g) for g in scalars]


def test_a_new_method_is_a_few_lines():
    """Paths, merging and catch-up follow from what its scalars do to the weights."""
    task = zoo.ToyTask()
    feds = [
        zoo.Federation(zoo.build(), task, SignMeZO(steps=3), zoo.shards(3, task), batch_size=2)
        for _ in range(2)
    ]
    ends: list[tuple[Any, Any, Any, Any]] = []
    zoo.spy(feds[0], lambda o, s, g: ends.append((o, s, g, copy.deepcopy(feds[0].space.values()))))
    list(feds[0].run(2))
    final = zoo.weights(feds[0].model)
    for order, start, scalars, end in ends:
        feds[0].space.load_(start)
        feds[0].space.apply_(feds[0].method.path(order, scalars))
        assert not zoo.differing(feds[0].space.values(), end)
    for update in feds[0].updates(0):
        (block,) = Merged.decode(update).blocks
        assert all(
            abs(3e2 * x) == pytest.approx(round(abs(3e2 * x)), abs=1e-5) for x in block.values
        )
        apply_merged_(feds[1].method, update)
    assert not zoo.differing(zoo.weights(feds[1].model), final)


def test_the_mean_of_clients_is_the_plain_mean():
    """Shared seeds: ``w - lr sum_t mean_k(g_k^t) z(s^t)`` equals the mean of the clients' ends."""
    fed = zoo.federation("full_fedzo")
    ends: list[dict[str, Tensor]] = []
    zoo.spy(fed, lambda *_: ends.append(copy.deepcopy(fed.space.values())))
    list(fed.run(1))
    for n, v in fed.space.values().items():
        mean = torch.stack([e[n].double() for e in ends]).mean(0)
        torch.testing.assert_close(v.double(), mean, rtol=0, atol=3e-6)


def test_weights_by_samples():
    """``weights='samples'`` weights by the examples a client used in the round."""
    fed = zoo.federation("full_fedzo", weights="samples", batch_size=9)
    ends: dict[int, dict[str, Tensor]] = {}
    zoo.spy(fed, lambda order, *_: ends.update({order.client: copy.deepcopy(fed.space.values())}))
    list(fed.run(1))
    used = {k: min(9, len(s)) for k, s in enumerate(fed.shards)}
    assert len(set(used.values())) > 1
    for n, v in fed.space.values().items():
        mean = sum(ends[k][n].double() * used[k] for k in used) / sum(used.values())
        torch.testing.assert_close(v.double(), mean, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", EVERY)
def test_uplink_is_four_bytes_a_scalar_and_a_little(name):
    sent: list[bytes] = []

    def up(client: int, data: bytes) -> list[bytes]:
        sent.append(data)
        return [data]

    fed = zoo.federation(name, channel=up)
    records = list(fed.run(1))
    for data in sent:
        scalars = Report.decode(data).scalars
        assert scalars and len(data) <= 4 * len(scalars) + 64
    assert sum(r.bytes_up for r in records) == sum(map(len, sent)) == fed.bytes_up


def test_shared_seeds_send_t_scalars_down():
    fed = zoo.federation("meerkat")
    records = list(fed.run(3))
    (update,) = fed.updates(2)
    assert len(update) <= 4 * fed.method.steps + 64
    order = records[0].bytes_down // len(records[0].invited)
    assert order <= 64
    assert records[1].bytes_down == len(records[1].invited) * (order + len(update))
