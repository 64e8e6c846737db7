"""Flower (flwr.ai) as the transport: fedzo's bytes in Flower's messages.

::

    ServerApp   FlowerTransport   ConfigRecord {order, updates, known, position}   ->   ClientApp
                                  <-   ConfigRecord {data, position}, MetricRecord {loss}

``order``, ``updates`` and ``data`` are encoded :mod:`fedzo.messages`; the rest is an envelope. A
client keeps its updates in Flower's ``Context.state`` and rebuilds the weights from them, so it may
be a new process every round, as Flower's SuperNodes have it. A reply that comes after the round's
time is handed to the server when it comes, and refused as late.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedzo.client import Host, Memory
from fedzo.messages import SHARED
from fedzo.transports import Reply, Request, TransportError, Updates

# The record that holds everything of fedzo, in messages and in a client's state.
RECORD = "fedzo"

# The client number of a node that never said hello.
STRANGER = -1


@dataclass(frozen=True)
class Seat:
    """A client of a process.

    Attributes:
        host: the process's model, method and task.
        client: the client's number.
        shard: its examples.
        cache: file for the weights between processes; None: every new process replays all updates.
    """

    host: Host
    client: int
    shard: Sequence[int]
    cache: str | None = None


def client_app(join: Callable[[Context], Seat]) -> ClientApp:
    """A Flower ClientApp of fedzo clients.

    Args:
        join: the client that a Flower node is.
    """
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        seat = join(context)
        record = ConfigRecord(
            {
                "client": seat.client,
                "samples": len(seat.shard),
                "common": json.dumps(seat.host.common),
            }
        )
        return Message(RecordDict({RECORD: record}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seat = join(context)
        request, updates = read_request(seat.client, message.content)
        memory = read_memory(context.state)
        if seat.cache is not None:
            seat.host.replica.load(seat.cache)
        reply, memory = seat.host.answer(request, updates, seat.shard, memory)
        if seat.cache is not None:
            seat.host.replica.save(seat.cache)
        context.state[RECORD] = ConfigRecord({"round": memory.round, "updates": memory.updates})
        return Message(write_reply(reply), reply_to=message)

    return app


class FlowerTransport:
    """The server's side: which Flower node is which client, requests out, replies back.

    Every node is asked once who it is; from then on a client is a node. Who sent a message is
    Flower's word, which rests on the nodes' keys where the SuperLink authenticates them.

    Args:
        grid: of the ServerApp.
        clients: how many nodes to wait for.
        timeout: seconds a round waits for replies; None: for all of them.
        patience: seconds to wait for the nodes before the first round.
        poll: seconds between two looks at what has come, at most.

    Raises:
        TransportError: too few nodes, a node that does not answer or says who another one is.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        *,
        timeout: float | None = None,
        patience: float = 600.0,
        poll: float = 2.0,
    ) -> None:
        if clients < 1:
            raise ValueError(f"clients must be at least 1; got {clients}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None; got {timeout!r}")
        self.grid, self.timeout, self.poll = grid, timeout, poll
        self._pending: dict[str, int] = {}  # node by message without an answer
        self._nodes: dict[int, int] = {}
        self._clients: dict[int, int] = {}
        self._samples: dict[int, int] = {}
        self._common: dict[int, dict[str, Any]] = {}
        self._greet(self._wait(clients, patience), patience)

    @property
    def samples(self) -> Mapping[int, int]:
        """Number of examples of each client that has some."""
        return self._samples

    def identity(self) -> str:
        """The clients and their numbers of examples."""
        return json.dumps(sorted(self._samples.items()))

    def open(self, common: Mapping[str, Any]) -> None:
        """Compare what the clients have with what the server has.

        Raises:
            ValueError: a client's differs; the message says what.
        """
        mine = json.loads(json.dumps(common))
        for client, theirs in self._common.items():
            for name in {**mine, **theirs}:
                if mine.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{name} of client {client} must be {mine.get(name)!r}, as the server has "
                        f"it; got {theirs.get(name)!r}"
                    )

    def exchange(self, requests: Sequence[Request], updates: Updates) -> Iterator[Reply]:
        """Send the requests and give the replies, late ones first.

        Raises:
            TransportError: Flower takes none of the messages.
        """
        missed: dict[int, list[bytes]] = {}
        messages = []
        for request in requests:
            if request.known not in missed:
                missed[request.known] = updates(request.known)
            content = write_request(request, missed[request.known])
            messages.append(
                Message(
                    content=content,
                    dst_node_id=self._nodes[request.client],
                    message_type=MessageType.TRAIN,
                )
            )
        replies = [
            read_reply(self._clients.get(node, STRANGER), message, late)
            for node, message, late in self._send(messages, self.timeout)
        ]
        # A failure that comes late has been a missing reply before.
        yield from sorted(
            (r for r in replies if not (r.late and r.data is None)),
            key=lambda r: (not r.late, r.client),
        )

    # --- nodes ------------------------------------------------------------------------------------

    def _wait(self, clients: int, patience: float) -> list[int]:
        end = time.monotonic() + patience
        for pause in self._pauses():
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= clients:
                return nodes
            if time.monotonic() > end:
                break
            time.sleep(pause)
        raise TransportError(
            f"{clients} clients were expected; {len(nodes)} came in {patience:g} s"
        )

    def _pauses(self) -> Iterator[float]:
        """Seconds between looks: short at first."""
        pause = 0.01
        while True:
            yield min(pause, self.poll)
            pause *= 1.5

    def _greet(self, nodes: Sequence[int], patience: float) -> None:
        """Ask every node who it is."""
        messages = [
            Message(
                content=RecordDict({RECORD: ConfigRecord()}),
                dst_node_id=node,
                message_type=MessageType.QUERY,
            )
            for node in nodes
        ]
        for node, message, _ in self._send(messages, patience):
            if message.has_error():
                raise TransportError(f"a client cannot start: {message.error.reason}")
            try:
                record = message.content.config_records[RECORD]
                client, samples = _whole(record["client"]), _whole(record["samples"])
                if client >= SHARED:
                    raise ValueError(f"client must be below {SHARED}; got {client}")
                common = json.loads(str(record["common"]))
                if not isinstance(common, dict):
                    raise TypeError("common must be an object")
            except (KeyError, TypeError, ValueError) as error:
                raise TransportError(f"node {node} is no fedzo client: {error!r}") from error
            if client in self._nodes:
                raise TransportError(f"two nodes say they are client {client}")
            self._nodes[client], self._clients[node] = node, client
            self._common[client] = common
            if samples:
                self._samples[client] = samples
        silent = len(nodes) - len(self._nodes)
        if silent:
            raise TransportError(f"{silent} of {len(nodes)} nodes said nothing in {patience:g} s")
        if not self._samples:
            raise TransportError("no client has examples")

    def _send(
        self, messages: Sequence[Message], timeout: float | None
    ) -> list[tuple[int, Message, bool]]:
        """Send, and collect the replies: node, message, whether it answers an earlier call."""
        names = list(self.grid.push_messages(messages))
        current = {
            name: message.metadata.dst_node_id
            for name, message in zip(names, messages, strict=False)
            if name
        }
        if messages and not current:
            raise TransportError(f"Flower took none of {len(messages)} messages")
        self._pending |= current
        end = None if timeout is None else time.monotonic() + timeout
        found: list[tuple[int, Message, bool]] = []
        for pause in self._pauses():
            for message in self.grid.pull_messages(list(self._pending)):
                answered = message.metadata.reply_to_message_id
                asked = self._pending.pop(answered, STRANGER)
                # A node's failure is told by Flower itself.
                node = asked if message.has_error() else message.metadata.src_node_id
                found.append((node, message, answered not in current))
            if not current.keys() & self._pending.keys():
                break
            if end is not None and time.monotonic() >= end:
                break
            time.sleep(pause)
        return found


# --- records --------------------------------------------------------------------------------------


def write_request(request: Request, updates: Sequence[bytes]) -> RecordDict:
    """A request as Flower's records."""
    record = ConfigRecord(
        {
            "order": request.order,
            "known": request.known,
            "position": request.position,
            "drops": request.drops,
        }
    )
    if updates:
        record["updates"] = list(updates)
    return RecordDict({RECORD: record})


def read_request(client: int, content: RecordDict) -> tuple[Request, list[bytes]]:
    """What :func:`write_request` wrote.

    Raises:
        ValueError: something else.
    """
    try:
        record = content.config_records[RECORD]
        request = Request(
            client=client,
            order=_bytes(record["order"]),
            known=_whole(record["known"]),
            position=_whole(record["position"]),
            drops=bool(record["drops"]),
        )
        return request, [_bytes(u) for u in _list(record.get("updates", []))]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the message is no request of fedzo: {error!r}") from error


def write_reply(reply: Reply) -> RecordDict:
    """A reply as Flower's records."""
    given = {"data": reply.data, "position": reply.position, "known": reply.known}
    record = ConfigRecord({k: v for k, v in given.items() if v is not None})
    content = RecordDict({RECORD: record})
    if reply.loss is not None:
        content[f"{RECORD}.metrics"] = MetricRecord({"loss": reply.loss})
    return content


def read_reply(client: int, message: Message, late: bool = False) -> Reply:
    """What a client sent; anything that is no reply of fedzo becomes an empty message, which the
    server refuses."""
    if message.has_error():
        reason = " ".join(str(message.error.reason).split())[:300]
        return Reply(client=client, error=reason or "no reason given", late=late)
    try:
        record = message.content.config_records[RECORD]
        metrics = message.content.metric_records.get(f"{RECORD}.metrics")
        loss = None if metrics is None else metrics["loss"]
        if loss is not None and not isinstance(loss, float):
            raise TypeError(f"loss must be a float; got {loss!r}")
        return Reply(
            client=client,
            data=_bytes(record["data"]) if "data" in record else None,
            position=_whole(record["position"]) if "position" in record else None,
            known=_whole(record["known"]) if "known" in record else None,
            loss=loss,
            late=late,
        )
    except (KeyError, TypeError, ValueError):
        return Reply(client=client, data=b"", late=late)


def read_memory(state: RecordDict) -> Memory:
    """What a client kept; nothing at first."""
    if RECORD not in state.config_records:
        return Memory()
    record = state.config_records[RECORD]
    return Memory(_whole(record["round"]), [_bytes(u) for u in _list(record["updates"])])


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise ValueError(f"a count must be an integer in [0, 2**53); got {value!r}")
    return value


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"a message must be bytes; got {type(value).__name__}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"updates must be a list; got {type(value).__name__}")
    return value
