"""A federation: the server's rounds, over a transport; by default all of it in one process.

A round::

    server   chooses clients, sends each its order and the updates it has missed
    client   walks its local steps in place, from one copy of the values that move; reports;
             the values come back bit for bit
    server   checks each report, merges those that count, updates the weights, keeps the update

Everything that travels is encoded and decoded for real; its bytes are counted. What the server
keeps for each client is a few numbers. Every draw depends on the seed, the round and the client, so
a run that was killed in the middle of a round continues from the last checkpoint bit for bit, and
a run comes to the same bits over every transport.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedzo import checkpoint as files
from fedzo.aggregate import RULES, check_trim, clipped
from fedzo.checkpoint import CheckpointError
from fedzo.client import apply_merged_, describe
from fedzo.messages import OVERHEAD, SHARED, Block, Dense, Merged, Order
from fedzo.methods.base import Calibrated, Method, Rule, Setting
from fedzo.records import RoundRecord, ScalarStats
from fedzo.sampling import DROPOUT, STRAGGLER, happens, participants
from fedzo.server import FAILED, NOT_FINITE, Expected, Rejected, Server
from fedzo.task import Batch, Task
from fedzo.transports import Reply, Request, Transport, TransportError
from fedzo.transports.inprocess import InProcess
from zokernels.binding import unwrap

WEIGHTS = ("uniform", "samples")

# What a client's message becomes on its way: tests put damage here.
Channel = Callable[[int, bytes], Iterable[bytes]]


class Federation:
    """A method over clients: the server's side, and in process the clients' too.

    Args:
        model: the server's copy, in process the only one; it ends each round with the server's
            weights. Evaluation mode is set, as MeZO has it.
        task: what is learned.
        method: a fresh method of :mod:`fedzo.methods`.
        shards: the examples of each client, numbers in ``[0, task.train_size)``: the clients work
            in process. Clients without examples are never invited.
        transport: to clients elsewhere, in place of ``shards``.
        seed: of everything random, 64 bits.
        clients_per_round: how many are invited; None: all.
        batch_size: examples a local step; smaller for a client that has fewer.
        dropout: probability that an invited client sends nothing.
        stragglers: probability that a client's report arrives one round late, and is refused.
        aggregate: of the scalars: ``"mean"``, ``"median"`` or ``"trimmed_mean"``; the latter two
            only where clients share directions.
        trim: share cut off on each side by ``"trimmed_mean"``.
        weights: of the clients: ``"uniform"`` or ``"samples"`` (the examples it used in the round).
        clip: the server moves every projected gradient into ``[-clip, clip]``; None: it does not.
        calibration: batches of pre-training text with labels, for masks and GradIP.
        checkpoint: file that is written after rounds and continued by :meth:`load`; None: none.
        checkpoint_every: rounds between checkpoints; the last round of a run always gets one.
        channel: what happens to messages on their way up.

    Attributes:
        round: rounds done.
        last: record of the last round; None before the first.
        bytes_up, bytes_down: of the whole run.
        rejections: refused messages of the whole run by reason.

    Raises:
        ValueError: an argument out of range, an index that is no example, no client with examples,
            a method that another federation has used, a client that is set up differently.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        method: Method,
        shards: Sequence[Sequence[int]] | None = None,
        *,
        transport: Transport | None = None,
        seed: int = 0,
        clients_per_round: int | None = None,
        batch_size: int = 16,
        dropout: float = 0.0,
        stragglers: float = 0.0,
        aggregate: str = "mean",
        trim: float = 0.1,
        weights: str = "uniform",
        clip: float | None = None,
        calibration: Sequence[Batch] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        channel: Channel | None = None,
    ) -> None:
        if (shards is None) == (transport is None):
            raise ValueError("one of shards and transport must be given")
        for label, count in (("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
            if count < 1:
                raise ValueError(f"{label} must be at least 1; got {count}")
        if shards is not None:
            transport = InProcess(method, task, shards, batch_size=batch_size)
        assert transport is not None
        self.transport: Transport = transport
        self.samples = dict(sorted(transport.samples.items()))
        self.clients = tuple(self.samples)
        per_round = len(self.clients) if clients_per_round is None else clients_per_round
        if not 1 <= per_round <= len(self.clients):
            raise ValueError(
                f"clients_per_round must be in [1, {len(self.clients)}]; got {clients_per_round}"
            )
        for label, share in (("dropout", dropout), ("stragglers", stragglers)):
            if not 0 <= share <= 1:
                raise ValueError(f"{label} must be in [0, 1]; got {share!r}")
        for label, value, allowed in (
            ("aggregate", aggregate, RULES),
            ("weights", weights, WEIGHTS),
        ):
            if value not in allowed:
                raise ValueError(f"{label} must be one of {list(allowed)}; got {value!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or None; got {clip!r}")
        if aggregate != "mean" and (method.payload != "scalars" or not method.comparable):
            raise ValueError(
                f"aggregate {aggregate!r} compares scalars of the same directions, which clients "
                f"of this {method.name} do not share: use 'mean' (or seeds='shared')"
            )
        if method.prepared:
            raise ValueError(f"method must be a fresh one; this {method.name} has been in a run")
        self.task, self.method, self.shards = task, method, shards
        self.seed, self.clients_per_round, self.batch_size = seed, per_round, batch_size
        self.dropout, self.stragglers = dropout, stragglers
        self.aggregate, self.trim, self.weights = aggregate, check_trim(trim), weights
        self.clip, self.checkpoint = clip, checkpoint
        self.checkpoint_every, self.channel = checkpoint_every, channel

        self.model = unwrap(model).eval()
        method.prepare(
            Setting(
                self.model,
                task,
                self.clients,
                self.samples,
                seed,
                tuple(calibration),
            )
        )
        self.space = method.space
        self.server = Server(method.fingerprint)
        self.round = 0
        self.last: RoundRecord | None = None
        self.bytes_up = self.bytes_down = 0
        self._base = self.space.snapshot() if method.from_base else None
        # By client, only for those that were ever invited: next batch, last round known.
        self._positions: dict[int, int] = {}
        self._known: dict[int, int] = {}
        # The encoded updates of all rounds; one, where it replaces those before.
        self._history: list[bytes] = []
        self._late: list[tuple[int, bytes]] = []
        # The mean of dense messages in the making.
        self._sum: dict[str, Tensor] = {}
        self._weight = 0.0
        self._orders: dict[int, Order] = {}
        common = describe(method, self.model, batch_size)
        self._identity = self._describe(common)
        transport.open(common)

    @property
    def rejections(self) -> dict[str, int]:
        """Refused messages of the whole run, by reason."""
        return dict(self.server.rejections)

    # --- a run ------------------------------------------------------------------------------------

    def run(self, rounds: int) -> Iterator[RoundRecord]:
        """Go on until ``rounds`` rounds are done in all, those before a :meth:`load` included.

        Yields:
            A record a round, after its checkpoint; before the first round the calibration's, where
            the method has one.

        Raises:
            TransportError: every client of a round failed, or none can be reached.
        """
        if isinstance(self.method, Calibrated) and not self.method.calibrated:
            yield self._calibrate(self.method)
        while self.round < rounds:
            record = self._round(self.round + 1)
            last = self.round == rounds
            if self.checkpoint is not None and (last or self.round % self.checkpoint_every == 0):
                self.save(self.checkpoint)
            yield record

    def _calibrate(self, method: Calibrated) -> RoundRecord:
        """Round 0: every client, no update; their places in the data stay at the start."""
        begin = time.perf_counter()
        orders = {k: method.calibration_order(k) for k in self.clients}
        seen = self._collect(0, orders)
        method.calibrate(self._reports(orders))
        return self._record(0, "calibration", orders, seen, begin)

    def _round(self, number: int) -> RoundRecord:
        begin = time.perf_counter()
        invited = participants(self.seed, number, self.clients, self.clients_per_round)
        orders = self.method.orders(number, invited)
        seen = self._collect(number, orders)
        self._merge(number, orders)
        self._positions.update(seen.positions)
        # The order brought these clients up to the round before; its update is new to them.
        self._known.update(dict.fromkeys(seen.reached, number - 1))
        self.round = number
        return self._record(number, "train", orders, seen, begin)

    # --- the clients ------------------------------------------------------------------------------

    def _collect(self, number: int, orders: Mapping[int, Order]) -> _Seen:
        """Let every invited client work and report."""
        dense = self.method.payload == "tensors"
        self.server.open(
            number,
            [
                Expected(o, self.space.nbytes if dense else self.method.scalars(o))
                for o in orders.values()
            ],
            self._add if dense else None,
        )
        self.space.renew()
        self._sum, self._weight = {}, 0.0
        self._orders = dict(orders)
        for sender, data in self._late:
            self.server.receive(sender, data)
        self._late = []
        seen = _Seen()
        requests = [
            Request(
                client=client,
                order=order.encode(),
                known=self._known.get(client, 0),
                position=self._positions.get(client, 0),
                drops=happens(self.seed, DROPOUT, number, client, self.dropout),
            )
            for client, order in orders.items()
        ]
        for reply, request in self._exchange(requests, seen):
            if reply.data is None:
                continue
            if reply.position is not None:
                seen.positions.setdefault(request.client, reply.position)
            if reply.loss is not None:
                seen.losses.setdefault(request.client, reply.loss)
            seen.heard.add(request.client)
            if happens(self.seed, STRAGGLER, number, request.client, self.stragglers):
                seen.late.append(request.client)
                self._late.append((request.client, reply.data))
                continue
            self._receive(request.client, reply.data)
        if len(seen.failed) == len(orders):
            reason = next(iter(seen.failed.values()))
            raise TransportError(f"all {len(orders)} clients of a round failed: {reason}")
        seen.dropped = [client for client in orders if client not in seen.heard]
        return seen

    def _exchange(
        self, requests: Sequence[Request], seen: _Seen
    ) -> Iterator[tuple[Reply, Request]]:
        """The answers to a round's requests.

        A client that has fewer updates than was thought is sent the others, once. Failures and
        answers to earlier rounds are refused here.
        """
        behind: list[Request] = []
        for again in (False, True):
            listed, behind = (behind if again else list(requests)), []
            asked = {request.client: request for request in listed}
            seen.bytes_down += sum(len(r.order) + self._missed(r.known) for r in listed)
            for reply in self.transport.exchange(listed, self.updates) if listed else ():
                seen.bytes_up += len(reply.data or b"")
                request = asked.get(reply.client)
                if reply.late or request is None:
                    self.server.receive(reply.client, reply.data or b"")
                elif reply.error is not None:
                    seen.failed[reply.client] = reply.error
                    self.server.refuse(reply.client, FAILED, reply.error)
                elif reply.known is not None and reply.known < request.known:
                    self._known[reply.client] = reply.known
                    if not again:
                        behind.append(replace(request, known=reply.known))
                else:
                    seen.reached.append(reply.client)
                    yield reply, request

    def _receive(self, client: int, data: bytes) -> None:
        for arrived in [data] if self.channel is None else self.channel(client, data):
            self.server.receive(client, arrived)

    def _missed(self, known: int) -> int:
        """Bytes of the updates after a round."""
        if known == self.round:
            return 0
        if self.method.payload == "tensors":
            return OVERHEAD + self.space.nbytes
        return sum(map(len, self.updates(known)))

    def updates(self, known: int = 0) -> list[bytes]:
        """The encoded updates that bring a client from round ``known`` to the present, in order.

        What a returning client replays (:func:`~fedzo.client.apply_merged_`). A method whose
        updates start from the first weights has one at most; one that sends weights, the weights.
        """
        if self.method.payload == "tensors":
            if known == self.round:
                return []
            message = Dense(
                round=self.round,
                client=SHARED,
                fingerprint=self.method.fingerprint,
                data=self.space.to_bytes(),
            )
            return [message.encode()]
        if self.method.from_base:
            return self._history[-1:] if known < self.round else []
        return self._history[known:]

    # --- the server -------------------------------------------------------------------------------

    def _reports(self, orders: Mapping[int, Order]) -> dict[int, tuple[Order, tuple[float, ...]]]:
        """What counts of a round, by client in increasing order."""
        found = {}
        for client in sorted(self.server.received):
            order, scalars = orders[client], self.server.received[client]
            count = order.steps * self.method.per_step
            found[client] = (order, (*clipped(scalars[:count], self.clip), *scalars[count:]))
        return found

    def _samples(self, order: Order) -> float:
        """A client's weight."""
        if self.weights == "uniform":
            return 1.0
        return float(order.steps * min(self.batch_size, self.samples[order.client]))

    def _add(self, client: int, data: memoryview) -> None:
        """Take a client's weights into the mean."""
        values = self.space.from_bytes(data)
        if not all(bool(torch.isfinite(v).all()) for v in values.values()):
            raise Rejected(NOT_FINITE, "a weight is NaN or infinite")
        weight = self._samples(self._orders[client])
        for name, value in values.items():
            if name not in self._sum:
                self._sum[name] = torch.zeros_like(value, dtype=torch.float32)
            self._sum[name].add_(value.float(), alpha=weight)
        self._weight += weight

    def _merge(self, number: int, orders: Mapping[int, Order]) -> None:
        """Make the round's update, on the weights and for the clients."""
        reports = self._reports(orders)
        if self.method.payload == "tensors":
            if reports:
                live = self.space.values()
                self.space.load_(
                    {n: (s / self._weight).to(live[n].dtype) for n, s in self._sum.items()}
                )
            self._sum = {}
            return
        blocks: tuple[Block, ...] = ()
        if reports:
            rule = Rule(
                self.aggregate, self.trim, {c: self._samples(o) for c, (o, _) in reports.items()}
            )
            before = self.method.state()
            blocks = self.method.merge(number, reports, rule)
            if not all(math.isfinite(x) for block in blocks for x in block.values):
                self.method.load_state(before)
                self.server.rejections[NOT_FINITE] += 1
                blocks = ()
        if self.method.from_base and not blocks:
            return  # the last update still stands
        update = Merged(round=number, fingerprint=self.method.fingerprint, blocks=blocks).encode()
        apply_merged_(self.method, update, self._base)
        self._history = [update] if self.method.from_base else [*self._history, update]

    def _record(
        self,
        number: int,
        phase: Literal["train", "calibration"],
        orders: Mapping[int, Order],
        seen: _Seen,
        begin: float,
    ) -> RoundRecord:
        reports = self._reports(orders)
        per_step = self.method.per_step
        self.bytes_up += seen.bytes_up
        self.bytes_down += seen.bytes_down
        self.last = RoundRecord(
            round=number,
            phase=phase,
            invited=tuple(orders),
            accepted=tuple(reports),
            dropped=tuple(seen.dropped),
            late=tuple(seen.late),
            rejected=dict(self.server.rejected),
            losses=dict(seen.losses),
            lrs={c: o.lr for c, o in orders.items()},
            steps={c: o.steps for c, o in orders.items()},
            scalars=ScalarStats.of(
                x for order, row in reports.values() for x in row[: order.steps * per_step]
            ),
            gradip={c: g for c, g in self.method.gradip.items() if c in reports},
            flagged=self.method.flagged,
            bytes_up=seen.bytes_up,
            bytes_down=seen.bytes_down,
            seconds=time.perf_counter() - begin,
        )
        return self.last

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything a run goes on from; an existing file is replaced only by a whole one.

        Raises:
            OSError: the file cannot be written.
        """
        files.save(
            path,
            values=self.space.values(),
            state={
                "identity": self._identity,
                "round": self.round,
                "method": self.method.state(),
                "positions": list(self._positions.items()),
                "known": list(self._known.items()),
                "rejections": dict(self.server.rejections),
                "bytes": [self.bytes_up, self.bytes_down],
                "late": [sender for sender, _ in self._late],
                "last": None if self.last is None else self.last.to_dict(),
            },
            messages={"history": self._history, "late": [data for _, data in self._late]},
        )

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, in a federation made with the same arguments and first weights.

        Raises:
            CheckpointError: no checkpoint, damaged, or of another run; the message names what
                differs. Nothing is changed.
            OSError: the file cannot be read.
        """
        values, state, messages = files.load(path)
        try:
            given, mine = state["identity"], json.loads(json.dumps(self._identity))
            differing = [k for k in {**given, **mine} if given.get(k) != mine.get(k)]
            if differing:
                raise CheckpointError(
                    f"{path} is of another run: "
                    + "; ".join(
                        f"{k} is {given.get(k)!r} there and {mine.get(k)!r} here"
                        for k in differing[:3]
                    )
                )
            last = None if state["last"] is None else RoundRecord.from_dict(state["last"])
            late = list(zip(state["late"], messages["late"], strict=True))
            positions = {int(k): int(v) for k, v in state["positions"]}
            known = {int(k): int(v) for k, v in state["known"]}
            bytes_up, bytes_down = map(int, state["bytes"])
            self.space.load_(values)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error
        self.method.load_state(state["method"])
        self.round, self.last = int(state["round"]), last
        self._positions, self._known, self._late = positions, known, late
        self.bytes_up, self.bytes_down = bytes_up, bytes_down
        self.server.rejections = Counter(state["rejections"])
        self._history = messages["history"]

    def _describe(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            **common,
            "shards": self.transport.identity(),
            "clients_per_round": self.clients_per_round,
            "dropout": self.dropout,
            "stragglers": self.stragglers,
            "aggregate": self.aggregate,
            "trim": self.trim,
            "weights": self.weights,
            "clip": self.clip,
        }


@dataclass
class _Seen:
    """What happened to the clients of a round."""

    reached: list[int] = field(default_factory=list)
    heard: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
