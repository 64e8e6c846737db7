"""Flower as the transport: the same bits as in process, and nothing from the wire is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import fed_flower as ff
import fed_zoo as zoo
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedzo.client import Memory
from fedzo.messages import Dense, Report
from fedzo.simulation import Federation
from fedzo.transports import TransportError
from fedzo.transports.flower import (
    RECORD,
    STRANGER,
    FlowerTransport,
    client_app,
    read_memory,
    read_reply,
    read_request,
)

EVERY = [*zoo.SCALAR, *zoo.VARIANTS, *zoo.DENSE]
PARTIAL = {"clients_per_round": 2, "dropout": 0.2, "stragglers": 0.2}


@pytest.mark.parametrize("name", EVERY)
def test_the_same_bits_records_and_bytes_as_in_process(name):
    """Clients take part now and then, fail, and are late; the two transports agree on all of it."""
    grid, fed = ff.federation(name, **PARTIAL)
    here = zoo.federation(name, **PARTIAL)
    start = zoo.weights(here.model)
    there, records = list(fed.run(5)), list(here.run(5))
    assert ff.timeless(there) == ff.timeless(records)
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))
    assert zoo.differing(zoo.weights(fed.model), start)
    assert any(r.dropped for r in records) or any(r.late for r in records)
    assert fed.rejections == here.rejections
    assert (grid.inner_up, grid.inner_down) == (fed.bytes_up, fed.bytes_down)
    assert grid.received > fed.bytes_up and grid.sent > fed.bytes_down


@pytest.mark.parametrize("name", ["meerkat", "full_fedzo", "fedspzo", "fedkseed", "fedmezo"])
def test_the_same_bits_in_bfloat16(name):
    _, fed = ff.federation(name, dtype=torch.bfloat16, **PARTIAL)
    here = zoo.federation(name, model=zoo.build(torch.bfloat16), **PARTIAL)
    assert ff.timeless(fed.run(4)) == ff.timeless(here.run(4))
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))


@pytest.mark.parametrize("name", ["fedavg", "fedmezo"])
def test_replies_may_come_in_any_order(name):
    """A mean of weights is a sum in float32: its order is the clients' and not that of arrival."""
    grid, fed = ff.federation(name)
    grid.backwards = True
    here = zoo.federation(name)
    assert ff.timeless(fed.run(2)) == ff.timeless(here.run(2))
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["meerkat", "full_fedzo", "fedkseed", "fedavg"])
def test_a_client_may_be_a_new_process_every_round(name, cached, tmp_path):
    """What a client keeps is in Flower's state: a fresh model and that are enough; weights in a
    file only spare work."""
    caches = tmp_path if cached else None
    grid = ff.Grid(ff.app(lambda: ff.host(name), caches=caches))
    _, fed = ff.federation(name, grid=grid, clients_per_round=2)
    here = zoo.federation(name, clients_per_round=2)
    assert ff.timeless(fed.run(4)) == ff.timeless(here.run(4))
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))
    assert bool(list(tmp_path.iterdir())) == (cached and name != "fedavg")


@pytest.mark.parametrize("name", ["meerkat_vp", "full_fedzo", "fedspzo", "fedkseed", "lora_fedzo"])
def test_clients_rebuild_the_weights_and_are_never_sent_them(name):
    """The replica is the server's model, from less than its moving values on the wire."""
    one = ff.host(name)
    grid = ff.Grid(ff.app(lambda: one))
    _, fed = ff.federation(name, grid=grid, clients_per_round=2)
    list(fed.run(3))
    memory = Memory(3, fed.updates(0))
    one.replica.follow_(memory)
    assert not zoo.differing(one.method.space.values(), fed.space.values())
    assert zoo.differing(fed.space.values(), ff.host(name).method.space.values())
    if name != "meerkat_vp" and name != "lora_fedzo":  # a handful of values move there
        assert fed.bytes_down < fed.space.nbytes


def test_what_flower_adds_does_not_grow_with_the_report():
    """The envelope of a message is of one size but for the widths of its lengths."""
    extra = []
    for steps in (1, 40):
        grid, fed = ff.federation("full_fedzo", options={"steps": steps})
        before = grid.sent, grid.received
        (record,) = list(fed.run(1))
        assert len(record.accepted) == 4
        up = (grid.received - before[1] - record.bytes_up) / 4
        down = (grid.sent - before[0] - record.bytes_down) / 4
        extra.append((up, down))
        assert 100 < up < 400 and 100 < down < 400
    assert max(abs(a - b) for a, b in zip(*extra, strict=True)) <= 10


# --- clients that fail ------------------------------------------------------------------------


def test_a_client_that_lost_its_memory_is_sent_everything_again():
    grid, fed = ff.federation("meerkat")
    here = zoo.federation("meerkat")
    rounds, expected = fed.run(4), here.run(4)
    for _ in range(2):
        next(rounds), next(expected)
    blank = ff.Grid(grid.app).contexts
    grid.contexts[grid.node(2)] = blank[grid.node(2)]
    record, same = next(rounds), next(expected)
    again = len(fed.method.order(3, 2).encode()) + sum(map(len, fed.updates(0)[:2]))
    assert record.accepted == same.accepted and record.bytes_up == same.bytes_up
    assert record.bytes_down == same.bytes_down + again
    assert grid.inner_down == fed.bytes_down
    assert next(rounds).bytes_down == next(expected).bytes_down
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))


def test_a_client_that_says_twice_that_it_has_nothing_is_left_out():
    grid, fed = ff.federation("meerkat")
    rounds = fed.run(3)
    next(rounds), next(rounds)
    node = grid.node(1)

    def forgetful(message: Message) -> list[Message]:
        if message.metadata.src_node_id == node:
            ff.changed(message, data=None, position=None, known=0)
        return [message]

    grid.way = forgetful
    record = next(rounds)
    assert record.accepted == (0, 2, 3) and record.dropped == (1,)


def test_a_client_that_lost_its_memory_and_then_fails_is_one_drop_out():
    one = ff.host("meerkat")
    good = ff.app(lambda: one)
    grid = ff.Grid(good)
    _, fed = ff.federation("meerkat", grid=grid)
    rounds = fed.run(3)
    next(rounds), next(rounds)
    calls: list[int] = []

    def worse(message: Message, context: Any) -> Message:
        if context.node_config["client"] == 2:
            calls.append(1)
            context.state.clear()
            if len(calls) == 2:
                raise MemoryError("full")
        return good(message, context)

    grid.app = ClientApp()
    grid.app.train()(worse)
    record = next(rounds)
    assert len(calls) == 2 and record.accepted == (0, 1, 3) and record.dropped == (2,)
    assert record.rejected == {2: "failed: MemoryError: full"}


@pytest.mark.parametrize("name", ["meerkat", "fedkseed", "fedavg"])
def test_a_run_resumes_with_clients_that_start_anew(name, tmp_path):
    file = tmp_path / "run.safetensors"
    _, first = ff.federation(name, clients_per_round=2, checkpoint=file)
    list(first.run(2))
    _, second = ff.federation(name, clients_per_round=2)
    second.load(file)
    here = zoo.federation(name, clients_per_round=2)
    expected = list(here.run(5))[2:]
    for got, want in zip(second.run(5), expected, strict=True):
        assert (got.accepted, got.losses, got.scalars) == (want.accepted, want.losses, want.scalars)
        assert got.bytes_up == want.bytes_up
    assert not zoo.differing(zoo.weights(second.model), zoo.weights(here.model))


def test_a_checkpoint_of_other_clients_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    _, fed = ff.federation("meerkat", checkpoint=file)
    list(fed.run(1))
    with pytest.raises(ValueError, match="shards is"):
        zoo.federation("meerkat").load(file)


def failing(name: str, *clients: int) -> ff.Grid:
    """Clients of which some raise at work, from the second round on."""
    one = ff.host(name)
    good = ff.app(lambda: one)
    calls: dict[int, int] = {}

    def join(message: Message, context: Any) -> Message:
        client = int(context.node_config["client"])
        if message.metadata.message_type == "train":
            calls[client] = calls.get(client, 0) + 1
            if client in clients and calls[client] > 1:
                raise RuntimeError("out of memory")
        return good(message, context)

    both = ClientApp()
    both.query()(join)
    both.train()(join)
    return ff.Grid(both)


def test_a_client_that_fails_is_counted_and_the_others_go_on():
    _, fed = ff.federation("full_fedzo", grid=failing("full_fedzo", 2))
    first, second = fed.run(2)
    assert first.accepted == (0, 1, 2, 3) and not first.rejected
    assert second.accepted == (0, 1, 3) and second.dropped == (2,)
    assert second.rejected[2].startswith("failed: RuntimeError: out of memory")
    assert fed.rejections == {"failed": 1}
    here = zoo.federation("full_fedzo", channel=lambda c, d: [] if silent(c, d) else [d])
    list(here.run(2))
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))


def silent(client: int, data: bytes) -> bool:
    return client == 2 and Report.decode(data).round == 2


def test_a_round_in_which_every_client_fails_ends_the_run():
    _, fed = ff.federation("full_fedzo", grid=failing("full_fedzo", 0, 1, 2, 3))
    rounds = fed.run(2)
    next(rounds)
    kept = zoo.weights(fed.model)
    with pytest.raises(TransportError, match="all 4 clients of a round failed: RuntimeError"):
        next(rounds)
    assert fed.round == 1 and not zoo.differing(zoo.weights(fed.model), kept)


def test_a_reply_after_the_rounds_time_is_late():
    """The round goes on without it; it is refused when it comes, and the client goes on."""
    grid, fed = ff.federation("meerkat", timeout=0.05)
    rounds = fed.run(3)
    next(rounds)
    slow: list[Message] = []
    node = grid.node(3)

    def hold(message: Message) -> list[Message]:
        if message.metadata.src_node_id == node:
            slow.append(message)
            return []
        return [message]

    grid.way = hold
    second = next(rounds)
    assert second.accepted == (0, 1, 2) and second.dropped == (3,) and not second.rejected
    (held,) = slow
    grid.way = lambda m: [m, held] if m.metadata.src_node_id == grid.node(0) else [m]
    third = next(rounds)
    assert third.accepted == (0, 1, 2, 3)
    assert third.rejected == {3: "late: of round 2 in round 3"}
    assert third.bytes_up == second.bytes_up // 3 * 5
    assert third.losses[3] != held.content.metric_records[f"{RECORD}.metrics"]["loss"]
    here = zoo.federation("meerkat", channel=lambda c, d: [] if tardy(c, d) else [d])
    list(here.run(2))
    assert fed.updates(0)[:2] == here.updates(0)


def tardy(client: int, data: bytes) -> bool:
    return client == 3 and Report.decode(data).round == 2


# --- clients that lie -------------------------------------------------------------------------


def report(message: Message, **fields: Any) -> bytes:
    """A client's report with other fields."""
    sent = Report.decode(bytes(message.content.config_records[RECORD]["data"]))
    values = {n: getattr(sent, n) for n in ("round", "client", "fingerprint", "scalars")}
    return Report(**{**values, **fields}).encode()


def data_of(message: Message) -> bytes:
    return bytes(message.content.config_records[RECORD]["data"])


DAMAGE = {
    "truncated": (lambda m: {"data": data_of(m)[:-1]}, "damaged"),
    "empty": (lambda m: {"data": b""}, "damaged"),
    "flipped": (lambda m: {"data": bytes([data_of(m)[0] ^ 1]) + data_of(m)[1:]}, "damaged"),
    "text": (lambda m: {"data": "hello"}, "damaged"),
    "number": (lambda m: {"data": 3}, "damaged"),
    "position": (lambda m: {"position": -1}, "damaged"),
    "huge position": (lambda m: {"position": 1 << 60}, "damaged"),
    "wrong type": (lambda m: {"position": 1.5}, "damaged"),
    "known": (lambda m: {"known": -1}, "damaged"),
    "foreign": (lambda m: {"data": report(m, fingerprint=1)}, "foreign model"),
    "another's": (lambda m: {"data": report(m, client=0)}, "another's name"),
    "early": (lambda m: {"data": report(m, round=9)}, "early"),
    "late": (lambda m: {"data": report(m, round=0)}, "late"),
    "length": (lambda m: {"data": report(m, scalars=(1.0,))}, "wrong length"),
    "nan": (lambda m: {"data": report(m, scalars=(math.nan,) * 3)}, "not finite"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_hostile_reply_is_refused_and_changes_nothing(kind):
    make, reason = DAMAGE[kind]
    grid, fed = ff.federation("meerkat")
    node = grid.node(1)

    def damaged(message: Message) -> list[Message]:
        if message.metadata.src_node_id == node:
            ff.changed(message, **make(message))
        return [message]

    grid.way = damaged
    records = list(fed.run(2))
    for record in records:
        assert record.accepted == (0, 2, 3)
        assert record.rejected[1].startswith(reason), record.rejected
    assert fed.rejections == {reason: 2}
    here = zoo.federation("meerkat", channel=lambda client, data: [] if client == 1 else [data])
    list(here.run(2))
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))


def test_records_that_are_not_fedzos_are_refused():
    grid, fed = ff.federation("meerkat")

    def other(message: Message) -> list[Message]:
        client = message.metadata.src_node_id - grid.node(0)
        metric = MetricRecord({"loss": [1.0, 2.0]})
        strange = {
            1: RecordDict({"other": ConfigRecord({"data": data_of(message)})}),
            2: RecordDict({RECORD: MetricRecord({"data": 1.0})}),
            3: RecordDict({**message.content, f"{RECORD}.metrics": metric}),
        }
        if client in strange:
            message.content = strange[client]
        return [message]

    grid.way = other
    (record,) = list(fed.run(1))
    assert record.accepted == (0,) and set(record.losses) == {0}
    assert {c: r.split(":")[0] for c, r in record.rejected.items()} == dict.fromkeys(
        (1, 2, 3), "damaged"
    )


@pytest.mark.parametrize("name", ["meerkat", "fedavg"])
def test_a_reply_counts_once(name):
    grid, fed = ff.federation(name)
    grid.way = lambda message: [message, message]
    here = zoo.federation(name, channel=lambda client, data: [data, data])
    for record, same in zip(fed.run(2), here.run(2), strict=True):
        assert record.accepted == (0, 1, 2, 3) and record.losses == same.losses
        assert {r.split(":")[0] for r in record.rejected.values()} == {"duplicate"}
        assert record.bytes_up == 2 * same.bytes_up
    assert not zoo.differing(zoo.weights(fed.model), zoo.weights(here.model))


def test_an_unknown_nodes_message_is_refused():
    grid, fed = ff.federation("meerkat")

    def stranger(message: Message) -> list[Message]:
        if message.metadata.src_node_id == grid.node(1):
            message.metadata.__dict__["_src_node_id"] = 77
        return [message]

    grid.way = stranger
    (record,) = list(fed.run(1))
    assert record.accepted == (0, 2, 3) and record.dropped == (1,)
    assert record.rejected[STRANGER].startswith("another's name")


def test_dense_values_that_are_not_finite_are_refused():
    grid, fed = ff.federation("fedavg")
    node = grid.node(0)

    def poisoned(message: Message) -> list[Message]:
        if message.metadata.src_node_id == node:
            sent = Dense.decode(data_of(message))
            nan = torch.tensor([math.nan]).numpy().tobytes()
            bad = Dense(
                round=sent.round,
                client=sent.client,
                fingerprint=sent.fingerprint,
                data=nan + bytes(sent.data)[4:],
            )
            ff.changed(message, data=bad.encode())
        return [message]

    grid.way = poisoned
    (record,) = list(fed.run(1))
    assert record.accepted == (1, 2, 3) and record.rejected[0].startswith("not finite")


# --- who is who -------------------------------------------------------------------------------


def hello(grid: ff.Grid, client: int, fields: dict[str, Any]) -> None:
    """Let a client introduce itself differently."""
    node = grid.node(client)

    def other(message: Message) -> Iterable[Message]:
        if message.metadata.src_node_id == node:
            ff.changed(message, **fields)
        return [message]

    grid.way = other


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"client": 0}, "two nodes say they are client 0"),
        ({"client": -1}, "is no fedzo client"),
        ({"client": "one"}, "is no fedzo client"),
        ({"client": 0xFFFFFFFF}, "is no fedzo client"),
        ({"samples": None}, "is no fedzo client"),
        ({"common": "[]"}, "is no fedzo client"),
        ({"common": "{"}, "is no fedzo client"),
    ],
)
def test_nodes_that_are_no_clients(fields, problem):
    one = ff.host("meerkat")
    grid = ff.Grid(ff.app(lambda: one))
    hello(grid, 1, fields)
    with pytest.raises(TransportError, match=problem):
        FlowerTransport(grid, 4)


def test_a_client_without_examples_is_never_invited():
    one = ff.host("meerkat")
    grid = ff.Grid(ff.app(lambda: one))
    hello(grid, 1, {"samples": 0})
    _, fed = ff.federation("meerkat", grid=grid)
    assert fed.clients == (0, 2, 3)
    (record,) = list(fed.run(1))
    assert record.invited == (0, 2, 3)


def test_too_few_and_silent_nodes():
    one = ff.host("meerkat")
    grid = ff.Grid(ff.app(lambda: one))
    with pytest.raises(TransportError, match=r"5 clients were expected; 4 came in 0\.05 s"):
        FlowerTransport(grid, 5, patience=0.05)
    grid.way = lambda message: []
    with pytest.raises(TransportError, match="4 of 4 nodes said nothing"):
        FlowerTransport(grid, 4, patience=0.05)
    for wrong in ({"clients": 0}, {"clients": 4, "timeout": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            FlowerTransport(grid, **wrong)

    def broken(context: Any) -> Any:
        raise OSError("no such model")

    with pytest.raises(TransportError, match="cannot start: OSError: no such model"):
        FlowerTransport(ff.Grid(client_app(broken)), 4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lr": 0.5}, "method.lr of client 0 must be 0.1"),
        ({"steps": 4}, "method.steps of client 0 must be 3"),
        ({"density": 0.03}, "method.density of client 0 must be 0.02"),
    ],
)
def test_clients_that_are_set_up_differently_are_named(options, problem):
    other = ff.host("meerkat", **options)
    with pytest.raises(ValueError, match=problem):
        ff.federation("meerkat", grid=ff.Grid(ff.app(lambda: other)))


def test_clients_with_other_first_weights_are_named():
    other = ff.host("meerkat")
    other.common["first weights"] += 1
    with pytest.raises(ValueError, match="first weights of client 0 must be"):
        ff.federation("meerkat", grid=ff.Grid(ff.app(lambda: other)))


def test_a_federation_has_shards_or_a_transport():
    task = zoo.ToyTask()
    with pytest.raises(ValueError, match="one of shards and transport"):
        Federation(zoo.build(), task, zoo.method("meerkat"))


# --- records ----------------------------------------------------------------------------------


def test_requests_and_memories_of_the_wrong_shape():
    good = {"order": b"o", "known": 0, "position": 0, "drops": False, "updates": [b"u"]}
    request, updates = read_request(3, RecordDict({RECORD: ConfigRecord(good)}))
    assert (request.client, request.order, updates) == (3, b"o", [b"u"])
    for wrong in (
        {"order": "text"},
        {"known": -1},
        {"known": True},
        {"position": 1 << 53},
        {"updates": b"u"},
        {"updates": [1]},
    ):
        with pytest.raises(ValueError, match=r"no request of fedzo|must be"):
            read_request(3, RecordDict({RECORD: ConfigRecord({**good, **wrong})}))
    with pytest.raises(ValueError, match="no request of fedzo"):
        read_request(3, RecordDict())
    assert read_memory(RecordDict()) == Memory()
    kept = RecordDict({RECORD: ConfigRecord({"round": 2, "updates": [b"a", b"b"]})})
    assert read_memory(kept) == Memory(2, [b"a", b"b"])


def test_a_failure_without_a_reason_is_one():
    grid, _ = ff.federation("meerkat")
    asked = Message(RecordDict(), dst_node_id=grid.node(0), message_type="train")
    failure = read_reply(0, Message(Error(code=0), reply_to=asked))
    assert failure.error is not None and failure.data is None
