"""A client with its own copy of the model: what it replays, what it refuses, what it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fed_zoo as zoo
import pytest
import torch

from fedzo import client
from fedzo.client import BehindError, Host, Memory, Replica, apply_dense_
from fedzo.messages import Block, Dense, EncodingError, Merged, Order, Report
from fedzo.methods import Meerkat
from fedzo.transports import Request


def host(name: str, dtype: torch.dtype = torch.float32) -> Host:
    task = zoo.ToyTask()
    return Host(
        zoo.build(dtype),
        task,
        zoo.method(name),
        batch_size=2,
        seed=5,
        calibration=[task.batch(range(8))],
    )


def after(name: str, rounds: int) -> Any:
    """A federation in process, some rounds on."""
    fed = zoo.federation(name)
    list(fed.run(rounds))
    return fed


def request(fed: Any, round: int, client: int = 1, **given: Any) -> Request:
    order = fed.method.order(round, client)
    return Request(
        **{"client": client, "order": order.encode(), "known": 0, "position": 0, **given}
    )


def values(replica: Replica) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in replica.method.space.values().items()}


@pytest.mark.parametrize("name", ["meerkat", "fedkseed", "fedmezo", "fedspzo", "fedavg"])
def test_one_replica_serves_clients_at_any_round(name):
    """Forwards, backwards and aside: the weights are those of the memory."""
    fed, one = after(name, 4), host(name)
    first = values(one.replica)
    at: dict[int, dict[str, torch.Tensor]] = {0: first}
    here = zoo.federation(name)
    updates: dict[int, list[bytes]] = {0: []}
    for record in here.run(4):
        at[record.round] = {n: v.clone() for n, v in here.space.values().items()}
        updates[record.round] = here.updates(0)
    assert not zoo.differing(at[4], fed.space.values())
    for known in (4, 2, 3, 0, 1, 1, 4):
        dense = name == "fedavg"
        memory = Memory(known, [] if dense else updates[known])
        weights = updates[known][0] if dense and known else None
        one.replica.follow_(memory, weights)
        assert not zoo.differing(values(one.replica), at[known]), known


def test_a_replica_does_not_go_on_from_weights_it_does_not_know():
    """An update that cannot be made leaves nothing behind that a later one would build on."""
    fed, one = after("full_fedzo", 3), host("full_fedzo")
    good = fed.updates(0)
    bad = Merged(round=2, fingerprint=1, blocks=()).encode()
    with pytest.raises(ValueError, match="about parameters"):
        one.replica.follow_(Memory(3, [good[0], bad, good[2]]))
    one.replica.follow_(Memory(3, good))
    assert not zoo.differing(values(one.replica), fed.space.values())


@pytest.mark.parametrize("name", ["meerkat", "fedspzo", "fedavg", "fedkseed"])
def test_the_answer_is_the_clients_message_in_process(name):
    sent: dict[tuple[int, int], bytes] = {}

    def up(client: int, data: bytes) -> list[bytes]:
        sent[len(sent) // 4 + 1, client] = data
        return [data]

    fed, one = zoo.federation(name, channel=up), host(name)
    list(fed.run(1))
    shards = zoo.shards(4, zoo.ToyTask())
    updates = fed.updates(0)
    before = fed._positions[1]
    list(fed.run(2))
    ask = replace(request(fed, 2), position=before)
    kept = values(one.replica)
    reply, memory = one.answer(ask, updates, shards[1], Memory())
    assert reply.data == sent[2, 1] and memory.round == 1
    assert reply.position == fed._positions[1] and reply.error is None and reply.known is None
    # Every round starts from a message of weights there.
    given = updates if name == "fedavg" else []
    again, same = one.answer(replace(ask, known=1), given, shards[1], memory)
    assert again == reply and same == memory
    assert zoo.differing(values(one.replica), kept)
    silent, told = one.answer(replace(ask, drops=True), updates, shards[1], Memory())
    assert silent.data is None and told == memory


def test_updates_that_are_known_already_are_left_out():
    fed, one = after("meerkat", 3), host("meerkat")
    order = Order.decode(request(fed, 4).order)
    updates = fed.updates(0)
    whole = Memory(3, updates)
    for known in range(4):
        for sent_after in range(known + 1):
            memory = Memory(known, updates[:known])
            got, _ = one.replica.learn(memory, order, sent_after, updates[sent_after:])
            assert got == whole


def test_a_client_that_has_less_than_the_server_thinks_says_so():
    fed, one = after("meerkat", 3), host("meerkat")
    with pytest.raises(BehindError, match="after round 1 are missing"):
        one.replica.learn(
            Memory(1, fed.updates(0)[:1]), Order.decode(request(fed, 4).order), 2, fed.updates(2)
        )
    memory = Memory(1, fed.updates(0)[:1])
    reply, same = one.answer(request(fed, 4, known=2), fed.updates(2), [0, 1], memory)
    assert (reply.known, reply.data) == (1, None) and same is memory
    kseed = after("fedkseed", 3)  # its last update stands for those before
    got, _ = host("fedkseed").replica.learn(
        Memory(), Order.decode(request(kseed, 4).order), 2, kseed.updates(2)
    )
    assert got == Memory(3, kseed.updates(2))


def other(order: Order, **fields: Any) -> bytes:
    return replace(order, **fields).encode()


def test_what_a_client_refuses():
    """A message of another run, another client, another round, or damaged: nothing is changed."""
    fed, one = after("meerkat", 3), host("meerkat")
    order = Order.decode(request(fed, 4).order)
    good, shard = fed.updates(0), [0, 1, 2]
    skipped = Merged(round=9, fingerprint=fed.method.fingerprint, blocks=()).encode()
    foreign = Merged(round=3, fingerprint=1, blocks=()).encode()
    report = Report(round=4, client=1, fingerprint=fed.method.fingerprint, scalars=(1.0,)).encode()
    start = zoo.weights(one.replica.method.space.model)
    cases: list[tuple[Request, list[bytes], Memory]] = [
        (request(fed, 4, order=other(order, fingerprint=7)), good, Memory()),
        (request(fed, 4, order=other(order, root=6)), good, Memory()),
        (request(fed, 4, order=other(order, client=2)), good, Memory()),
        (request(fed, 4, order=order.encode()[:-1]), good, Memory()),
        (request(fed, 4, order=report), good, Memory()),
        (request(fed, 4, position=-1), good, Memory()),
        (request(fed, 4), good[:2], Memory()),
        (request(fed, 4), good[1:], Memory()),
        (request(fed, 4), [good[1], good[0], good[2]], Memory()),
        (request(fed, 4), [*good[:2], skipped], Memory()),
        (request(fed, 4), [*good, skipped], Memory()),
        (request(fed, 4), [*good[:2], good[2][:-1]], Memory()),
        (request(fed, 4), [*good[:2], report], Memory()),
        (request(fed, 4), [foreign], Memory(2, good[:2])),
        (request(fed, 2), [], Memory(3, good)),
    ]
    for ask, updates, memory in cases:
        kept = Memory(memory.round, list(memory.updates))
        with pytest.raises((ValueError, EncodingError)):
            one.answer(ask, updates, shard, memory)
        assert memory == kept
    one.replica.follow_(Memory())
    assert not zoo.differing(zoo.weights(one.replica.method.space.model), start)
    reply, _ = one.answer(request(fed, 4), good, shard, Memory())
    assert reply.data is not None


def test_what_a_client_of_dense_or_first_weights_refuses():
    fed, one = after("fedavg", 1), host("fedavg")
    (weights,) = fed.updates(0)
    short = Dense.decode(weights)
    cut = Dense(
        round=1, client=0, fingerprint=short.fingerprint, data=bytes(short.data)[:-4]
    ).encode()
    foreign = Dense(round=1, client=0, fingerprint=3, data=short.data).encode()
    kept = values(one.replica)
    for updates in ([], [weights, weights], [cut], [foreign], [weights[:-1]]):
        with pytest.raises((ValueError, EncodingError)):
            one.answer(request(fed, 2), updates, [0, 1], Memory())
        assert not zoo.differing(values(one.replica), kept)
    with pytest.raises(ValueError, match="bytes"):
        apply_dense_(one.method, cut)
    kseed, two = after("fedkseed", 1), host("fedkseed")
    fingerprint = kseed.method.fingerprint
    late = Merged(round=8, fingerprint=fingerprint, blocks=(Block(0, (1.0,)),)).encode()
    with pytest.raises(ValueError, match="future"):
        two.answer(request(kseed, 2), [late], [0, 1], Memory())


def test_a_client_computes_no_gradient_of_the_pretraining_text(monkeypatch):
    """GradIP is the server's."""
    calls: list[int] = []
    from fedzo.methods import meerkat

    found = meerkat.pretraining_gradient
    monkeypatch.setattr(
        meerkat, "pretraining_gradient", lambda *given: calls.append(1) or found(*given)
    )
    one = host("meerkat_vp")
    assert not calls and isinstance(one.method, Meerkat)
    fed = zoo.federation("meerkat_vp")
    assert calls == [1] and fed.method.fingerprint == one.method.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["full_fedzo", "meerkat", "fedkseed", "fedspzo"])
def test_weights_in_a_file_spare_the_replay(name, dtype, tmp_path, monkeypatch):
    """A new process makes the updates after the file's, and comes to the same bits."""
    made: list[bytes] = []
    make = client.apply_merged_

    def counted(method: Any, update: bytes, base: Any = None) -> None:
        made.append(update)
        make(method, update, base)

    fed, file = zoo.federation(name, model=zoo.build(dtype)), tmp_path / "weights"
    monkeypatch.setattr(client, "apply_merged_", counted)
    for record in fed.run(4):
        made.clear()
        replica = host(name, dtype).replica
        assert replica.load(file) == (record.round > 1)
        replica.follow_(Memory(record.round, fed.updates(0)))
        assert not zoo.differing(values(replica), fed.space.values())
        assert made == fed.updates(0)[-1:]
        replica.save(file)


def test_a_file_of_something_else_does_no_harm(tmp_path):
    """Another run's, other updates', a later round's, a damaged one, none."""
    fed, file = after("full_fedzo", 3), tmp_path / "weights"
    updates = fed.updates(0)
    memory = Memory(3, updates)

    def followed(known: Memory, loaded: bool) -> dict[str, torch.Tensor]:
        replica = host("full_fedzo").replica
        assert replica.load(file) == loaded
        replica.follow_(known)
        return values(replica)

    one = host("full_fedzo").replica
    one.save(file)  # nothing to replay yet
    assert not file.exists() and not zoo.differing(followed(memory, False), fed.space.values())
    one.follow_(memory)
    one.save(file)
    early = host("full_fedzo").replica
    early.follow_(Memory(1, updates[:1]))
    assert not zoo.differing(followed(Memory(1, updates[:1]), True), values(early))
    assert zoo.differing(values(early), fed.space.values())
    stranger = Replica(host("full_fedzo").method, b"another run")
    assert stranger.load(file)
    stranger.follow_(memory)
    assert not zoo.differing(values(stranger), fed.space.values())
    assert not one.load(file)  # it has made updates of its own
    whole = file.read_bytes()
    for damaged in (whole[:-5], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="of no use"):
            assert not zoo.differing(followed(memory, False), fed.space.values())
    other = host("meerkat").replica
    other.follow_(Memory(1, after("meerkat", 1).updates(0)))
    other.save(file)
    with pytest.warns(UserWarning, match="of no use"):
        assert not zoo.differing(followed(memory, False), fed.space.values())
