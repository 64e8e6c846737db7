"""Messages: round trips, sizes, damage; the server refuses whatever is hostile and goes on."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import fed_zoo as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.messages import (
    OVERHEAD,
    SHARED,
    Block,
    CorruptError,
    Dense,
    EncodingError,
    Merged,
    Message,
    NonFiniteError,
    Order,
    Report,
    TrailingBytesError,
    TruncatedError,
    UnknownVersionError,
)
from fedzo.server import (
    DAMAGED,
    DUPLICATE,
    EARLY,
    FINGERPRINT,
    LATE,
    LENGTH,
    NOT_FINITE,
    SENDER,
    UNINVITED,
    VERSION,
    Expected,
    Server,
)
from zokernels.noise import CONTRACT_VERSION

f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ids = st.integers(0, 2**32 - 2)
heads = st.fixed_dictionaries({"round": u32, "client": ids, "fingerprint": u64})
rows = st.lists(f32, max_size=20).map(tuple)
blocks = st.lists(st.builds(Block, u32, rows), max_size=4, unique_by=lambda b: b.client).map(tuple)
orders = st.builds(
    lambda head, **rest: Order(**head, **rest),
    heads,
    root=st.integers(-(2**63), 2**63 - 1),
    steps=u32,
    lr=st.floats(0, 2.0**100, width=32),
    values=rows,
)
reports = st.builds(lambda head, scalars: Report(**head, scalars=scalars), heads, rows)
updates = st.builds(
    lambda round, fingerprint, blocks: Merged(round=round, fingerprint=fingerprint, blocks=blocks),
    u32,
    u64,
    blocks,
)
messages = st.one_of(orders, reports, updates)


def report(**changes: Any) -> Report:
    return Report(**{"round": 3, "client": 1, "fingerprint": 77, "scalars": (1.0, -2.5), **changes})


def resealed(data: bytes) -> bytes:
    """The same bytes with a right checksum: a liar, not an accident."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


@given(messages)
def test_what_is_encoded_is_decoded(message):
    data = message.encode()
    assert type(message).decode(data) == message
    assert type(message).decode(bytearray(data)) == message


@given(reports)
def test_a_report_costs_four_bytes_a_scalar_and_32(message):
    assert len(message.encode()) == OVERHEAD + 4 * len(message.scalars)
    assert OVERHEAD == 32 <= 64


def test_known_bytes():
    """The format is a contract: these bytes must not change."""
    data = report().encode()
    assert data[:28].hex() == (
        "5a4f666d" "01" "02" f"{CONTRACT_VERSION:02x}00"
        "03000000" "01000000" "4d00000000000000" "08000000"
    )  # fmt: skip
    assert data[28:36] == struct.pack("<2f", 1.0, -2.5)
    assert data[36:] == struct.pack("<I", zlib.crc32(data[:36]))


def test_dense_values_are_bytes():
    dense = Dense(round=1, client=2, fingerprint=3, data=b"abcd")
    data = dense.encode()
    assert len(data) == OVERHEAD + 4
    assert bytes(Dense.decode(data).data) == b"abcd"


@given(messages, st.data())
def test_damage_is_noticed(message, data):
    """Any change of a byte, any cut, anything after it: an error, and always an EncodingError."""
    good = bytearray(message.encode())
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    if kind == "flip":
        place = data.draw(st.integers(0, len(good) - 1))
        good[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del good[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        good += data.draw(st.binary(min_size=1, max_size=9))
    with pytest.raises(EncodingError):
        type(message).decode(bytes(good))


@given(st.binary(max_size=80), st.sampled_from([Order, Report, Merged, Dense]))
def test_arbitrary_bytes_are_refused(data, kind):
    with pytest.raises(EncodingError):
        kind.decode(data)


@given(messages, st.integers(0, 27), st.integers(0, 255), st.binary(max_size=40))
def test_a_liar_with_a_right_checksum_is_no_crash(message, place, value, payload):
    """Every header field and any payload: decoded or refused, never anything else."""
    raw = bytearray(message.encode())
    raw[place] = value
    for data in (
        resealed(bytes(raw)),
        resealed(bytes(raw[:24]) + struct.pack("<I", len(payload)) + payload + b"\0\0\0\0"),
    ):
        for kind in (Order, Report, Merged):
            try:
                decoded = kind.decode(data)
            except EncodingError:
                continue
            assert isinstance(decoded, Message)
            assert decoded == kind.decode(decoded.encode())


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, b"ZOdp", EncodingError),
        (4, b"\x02", UnknownVersionError),
        (5, b"\x01", EncodingError),
        (6, struct.pack("<H", CONTRACT_VERSION + 1), UnknownVersionError),
        (24, struct.pack("<I", 7), TrailingBytesError),
        (24, struct.pack("<I", 9), TruncatedError),
        (24, struct.pack("<I", 2**32 - 1), TruncatedError),
        (28, struct.pack("<f", math.nan), NonFiniteError),
        (28, struct.pack("<f", math.inf), NonFiniteError),
    ],
)
def test_every_field_is_checked(place, value, error):
    raw = bytearray(report().encode())
    raw[place : place + len(value)] = value
    with pytest.raises(error):
        Report.decode(resealed(bytes(raw)))


def test_fields_that_contradict_each_other():
    head = {"round": 1, "client": SHARED, "fingerprint": 2}
    twice = Merged(round=1, fingerprint=2, blocks=(Block(4, (1.0,)), Block(4, (2.0,))))
    with pytest.raises(CorruptError, match="two blocks"):
        Merged.decode(twice.encode())
    data = bytearray(Merged(**head, blocks=(Block(4, (1.0, 2.0)),)).encode())
    data[36:40] = struct.pack("<I", 2**32 - 1)  # numbers of the block
    with pytest.raises(TruncatedError, match="numbers"):
        Merged.decode(resealed(bytes(data)))
    data[36:40] = struct.pack("<I", 1)
    with pytest.raises(CorruptError, match="after the last block"):
        Merged.decode(resealed(bytes(data)))
    order = Order(**head, root=1, steps=1, lr=-1.0)
    with pytest.raises(NonFiniteError, match="lr"):
        Order.decode(order.encode())


# --- the server's door ----------------------------------------------------------------------------


def door() -> Server:
    server = Server(77)
    server.open(
        3,
        [
            Expected(Order(round=3, client=k, fingerprint=77, root=0, steps=2, lr=1.0), 2)
            for k in (1, 2)
        ],
    )
    return server


@pytest.mark.parametrize(
    ("sender", "data", "reason"),
    [
        (1, report(scalars=(math.nan, 1.0)).encode(), NOT_FINITE),
        (1, report(scalars=(1.0, -math.inf)).encode(), NOT_FINITE),
        (1, report(scalars=(1.0,)).encode(), LENGTH),
        (1, report(scalars=(1.0,) * 3).encode(), LENGTH),
        (1, report(scalars=()).encode(), LENGTH),
        (1, report(fingerprint=78).encode(), FINGERPRINT),
        (1, report(round=2).encode(), LATE),
        (1, report(round=4).encode(), EARLY),
        (2, report().encode(), SENDER),
        (5, report(client=5).encode(), UNINVITED),
        (1, b"", DAMAGED),
        (1, report().encode()[:-1], DAMAGED),
        (1, report().encode() + b"x", DAMAGED),
        (1, Dense(round=3, client=1, fingerprint=77, data=b"").encode(), DAMAGED),
    ],
)
def test_why_a_message_does_not_count(sender, data, reason):
    server = door()
    refusal = server.receive(sender, data)
    assert refusal is not None and refusal.startswith(reason)
    assert server.rejections == {reason: 1} and server.rejected == {sender: refusal}
    assert not server.received
    assert server.receive(1, report().encode()) is None  # it goes on
    assert server.received == {1: (1.0, -2.5)}


def test_versions_are_refused_by_name():
    server = door()
    for place in (4, 6):
        raw = bytearray(report().encode())
        raw[place] += 1
        refusal = server.receive(1, resealed(bytes(raw)))
        assert refusal is not None and refusal.startswith(VERSION)
    assert server.rejections == {VERSION: 2}


def test_the_first_message_of_a_client_counts():
    server = door()
    assert server.receive(1, report().encode()) is None
    refusal = server.receive(1, report(scalars=(9.0, 9.0)).encode())
    assert refusal is not None and refusal.startswith(DUPLICATE)
    assert server.received == {1: (1.0, -2.5)}


@pytest.fixture(scope="module")
def fed() -> Iterator[Any]:
    yield zoo.federation("meerkat", options={"steps": 1})


@settings(max_examples=60)
@given(data=st.data())
def test_hostile_messages_change_nothing(fed, data):
    """Fuzz over a real federation: junk, damage and lies, in any number, before the truth.

    The weights, the history and the honest clients' part are those of a run without them.
    """
    order = fed.method.order(1, 0)
    good = Report(round=1, client=0, fingerprint=order.fingerprint, scalars=(0.5,))
    hostile = st.one_of(
        st.binary(max_size=64),
        st.builds(
            lambda i, v: bytes([*good.encode()[:i], v, *good.encode()[i + 1 :]]),
            st.integers(0, 31),
            st.integers(0, 255),
        ).filter(lambda d: d != good.encode()),
        st.builds(
            lambda **kw: Report(**kw).encode(),
            round=st.sampled_from([0, 1, 2, 2**32 - 1]),
            client=st.sampled_from([1, 7, 2**32 - 2]),
            fingerprint=st.sampled_from([order.fingerprint, 0, 2**64 - 1]),
            scalars=st.lists(st.floats(width=32), max_size=3).map(tuple),
        ),
        st.just(Report(round=1, client=0, fingerprint=order.fingerprint, scalars=(math.nan,)))
        .map(lambda r: r.encode()),
        updates.map(lambda m: m.encode()),
    )  # fmt: skip
    attacks = data.draw(st.lists(hostile, max_size=6))
    before = zoo.weights(fed.model)
    state = fed.method.state()
    fed.server.open(1, [Expected(order, 1)])
    counted = sum(fed.rejections.values())
    for attack in attacks:
        assert fed.server.receive(0, attack) is not None
        assert not fed.server.received
        assert not zoo.differing(zoo.weights(fed.model), before)
        assert fed.method.state() == state
    assert sum(fed.rejections.values()) == counted + len(attacks)
    assert fed.server.receive(0, good.encode()) is None
    assert fed.server.received == {0: (0.5,)}


def test_a_run_among_attackers_equals_a_run_without_the_attacked():
    """Clients whose messages are damaged count as absent; the others' mean is theirs alone."""

    def damaging(client: int, data: bytes) -> list[bytes]:
        if client == 1:
            return [data[:-2], b"junk", data[:10] + b"\xff" + data[11:]]
        return [data, data] if client == 2 else [data]

    def losing(client: int, data: bytes) -> list[bytes]:
        return [] if client == 1 else [data]

    finals = []
    for channel in (damaging, losing):
        fed = zoo.federation("meerkat", channel=channel)
        records = list(fed.run(2))
        assert all(r.accepted == (0, 2, 3) for r in records)
        finals.append(zoo.weights(fed.model))
        if channel is damaging:
            assert fed.rejections == {DAMAGED: 6, DUPLICATE: 2}
            assert set(records[0].rejected) == {1, 2}
    assert not zoo.differing(*finals)


def test_hostile_tensors():
    """Dense messages: NaN, wrong sizes and scalars in their place are refused as well."""
    fed = zoo.federation("fedavg")
    before = zoo.weights(fed.model)

    def attack(client: int, data: bytes) -> list[bytes]:
        head = {"round": 1, "client": client, "fingerprint": fed.method.fingerprint}
        poisoned = bytearray(fed.space.to_bytes())
        poisoned[:4] = struct.pack("<f", math.nan)
        return [
            Dense(**head, data=bytes(poisoned)).encode(),
            Dense(**head, data=b"\0" * 8).encode(),
            Report(**head, scalars=(1.0,)).encode(),
            data[:-1],
        ]

    fed.channel = attack
    (record,) = list(fed.run(1))
    assert record.accepted == ()
    assert fed.rejections == {NOT_FINITE: 4, LENGTH: 4, DAMAGED: 8}
    assert not zoo.differing(zoo.weights(fed.model), before)


def test_scalars_beyond_the_update_are_no_update():
    """A finite lie that overflows in the merge is dropped; the weights stay finite."""
    fed = zoo.federation("full_fedzo", options={"lr": 1e3, "steps": 1})
    before = zoo.weights(fed.model)

    def attack(client: int, data: bytes) -> list[bytes]:
        honest = Report.decode(data)
        lie = Report(
            round=honest.round,
            client=client,
            fingerprint=honest.fingerprint,
            scalars=(3e38,),
        )
        return [lie.encode()]

    fed.channel = attack
    (record,) = list(fed.run(1))
    assert record.accepted == (0, 1, 2, 3) and fed.rejections == {NOT_FINITE: 1}
    assert not zoo.differing(zoo.weights(fed.model), before)
    assert all(torch.isfinite(p).all() for p in fed.model.parameters())
