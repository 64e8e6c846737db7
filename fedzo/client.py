"""A client's side of a round: what it makes of the server's messages, and what it sends back.

The same code runs in process, where one copy of the model serves every client, and in a client
that is a process of its own with a :class:`Replica`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedzo import checkpoint as files
from fedzo.checkpoint import CheckpointError
from fedzo.messages import Dense, Merged, Order, Report
from fedzo.methods.base import Method, Setting, Site
from fedzo.sampling import Examples
from fedzo.task import Batch, Task
from fedzo.transports import Reply, Request
from zokernels.binding import unwrap
from zokernels.subset import Snapshot


@dataclass(frozen=True, slots=True)
class Work:
    """What a client's round came to.

    Attributes:
        data: the encoded message for the server.
        position: number of the client's next batch.
        loss: mean of what :class:`~fedzo.methods.base.Site` calls the losses.
    """

    data: bytes
    position: int
    loss: float


def work(
    method: Method,
    task: Task,
    shard: Sequence[int],
    order: Order,
    *,
    batch_size: int,
    position: int = 0,
) -> Work:
    """A client's round, from the weights the method's space holds; they come back bit for bit.

    Args:
        method: prepared.
        task: what is learned.
        shard: the client's examples.
        order: what the server asks.
        batch_size: examples a local step.
        position: number of the client's next batch.
    """
    examples = Examples(shard, batch_size, seed=method.root, client=order.client, position=position)
    site = Site(method.space, task, examples)
    head = {"round": order.round, "client": order.client, "fingerprint": order.fingerprint}
    message: Report | Dense
    try:
        scalars = method.client(site, order)
        if method.payload == "tensors":
            site.settle()
            message = Dense(**head, data=method.space.to_bytes())
        else:
            message = Report(**head, scalars=tuple(scalars))
    finally:
        method.space.restore_()
    return Work(message.encode(), examples.position, site.loss)


def apply_merged_(method: Method, message: bytes, base: tuple[Snapshot, ...] | None = None) -> None:
    """What a client does with an update of the server: the same as the server, bit for bit.

    Args:
        method: prepared on the client's model.
        message: an encoded :class:`~fedzo.messages.Merged`.
        base: the first weights of the run, for methods that start from them.

    Raises:
        EncodingError: not an update. Nothing is changed.
        ValueError: an update for other parameters. Nothing is changed.
    """
    merged = Merged.decode(message)
    check_fingerprint(method, merged.fingerprint)
    update = method.update(merged.round, merged.blocks)
    if base is not None:
        load_first_(method, base)
    method.space.apply_(update)


def apply_dense_(method: Method, message: bytes) -> None:
    """Take over the server's weights, for the methods that send weights.

    Raises:
        EncodingError: not a dense message. Nothing is changed.
        ValueError: of other parameters or of another size. Nothing is changed.
    """
    dense = Dense.decode(message)
    check_fingerprint(method, dense.fingerprint)
    method.space.load_(method.space.from_bytes(dense.data))


def load_first_(method: Method, first: tuple[Snapshot, ...]) -> None:
    """Set the values that move to those of a snapshot."""
    method.space.load_({n: v for snapshot in first for n, v in snapshot.values.items()})


def check_fingerprint(method: Method, fingerprint: int) -> None:
    """Raise ValueError for a message about other parameters."""
    if fingerprint != method.fingerprint:
        raise ValueError(
            f"the message is about parameters {fingerprint:016x}; these are "
            f"{method.fingerprint:016x}"
        )


def describe(method: Method, model: nn.Module, batch_size: int) -> dict[str, Any]:
    """What server and clients must have in common: the method, what moves, the first weights."""
    options = {k: v for k, v in method.options().items() if k != "mask"}
    sample = 0
    for _, p in sorted(model.named_parameters()):
        if p.is_floating_point():
            head = p.detach().reshape(-1)[:4096].float().cpu().contiguous()
            sample = zlib.crc32(head.numpy().data, sample)
    return {
        "method": method.name,
        **{f"method.{k}": v for k, v in options.items()},
        "fingerprint": f"{method.fingerprint:016x}",
        "first weights": sample,
        "seed": method.root,
        "batch_size": batch_size,
    }


class BehindError(Exception):
    """A client lacks updates that the server takes it to have.

    Attributes:
        round: the last one it has.
    """

    def __init__(self, round: int) -> None:
        super().__init__(f"the updates after round {round} are missing")
        self.round = round


@dataclass
class Memory:
    """What a client keeps between rounds: its displacement from the first weights, as updates.

    Attributes:
        round: last round whose update is in.
        updates: the encoded updates of rounds 1 to ``round``; the last one where it replaces those
            before; empty for methods that send weights.
    """

    round: int = 0
    updates: list[bytes] = field(default_factory=list)


class Replica:
    """A client's own copy of the server's weights, rebuilt from the server's updates alone.

    One replica serves any number of clients of one process, since a client's weights follow from
    its memory: it goes on from where it is when the memory begins with the updates it has made, and
    from the first weights otherwise.

    Args:
        method: prepared on the client's model, which holds the first weights of the run.
        run: of the run, for files of :meth:`save`.
    """

    def __init__(self, method: Method, run: bytes = b"") -> None:
        self.method, self.run = method, run
        self._first = method.space.snapshot()
        # How many updates the weights have, and their digest. None: not known.
        self._made: tuple[int, bytes] | None = (0, _chain(run, ())[0])

    def learn(
        self, memory: Memory, order: Order, known: int, updates: Sequence[bytes]
    ) -> tuple[Memory, bytes | None]:
        """A memory with what came with an order. Nothing is changed.

        Args:
            memory: what the client has.
            order: brings the client to the round before its own.
            known: the round the updates start after.
            updates: encoded, in order; those the memory has already are left out.

        Returns:
            The memory, and the encoded weights of a dense method (None: the first ones).

        Raises:
            BehindError: the memory ends before ``known``.
            EncodingError: an update is damaged.
            ValueError: an order or an update of another run, a round is missing.
        """
        check_fingerprint(self.method, order.fingerprint)
        if order.root != self.method.root:
            raise ValueError(f"the order's seed is {order.root}; this run's is {self.method.root}")
        now = max(0, order.round - 1)
        if self.method.payload == "tensors":
            if len(updates) > 1 or (now and not updates):
                raise ValueError(
                    f"round {order.round} starts from one message of weights; got {len(updates)}"
                )
            return Memory(now), updates[0] if updates else None
        if memory.round < known and not (self.method.from_base and updates):
            raise BehindError(memory.round)
        if memory.round > now:
            raise ValueError(f"round {order.round} is over: updates to {memory.round} are known")
        merged = [(Merged.decode(update).round, update) for update in updates]
        new = [(number, update) for number, update in merged if number > memory.round]
        if self.method.from_base:
            if any(number > now for number, _ in new):
                raise ValueError(f"an update of the future of round {order.round}")
            kept = [update for _, update in new[-1:]] or memory.updates
            return Memory(now, kept), None
        if [number for number, _ in new] != list(range(memory.round + 1, now + 1)):
            raise ValueError(
                f"updates of rounds {memory.round + 1} to {now} are needed; got "
                f"{[number for number, _ in new]}"
            )
        return Memory(now, [*memory.updates, *(update for _, update in new)]), None

    def follow_(self, memory: Memory, weights: bytes | None = None) -> None:
        """Make the weights those of a memory, or those sent by a dense method.

        Raises:
            EncodingError, ValueError: see :func:`apply_merged_` and :func:`apply_dense_`.
        """
        if self.method.payload == "tensors":
            if weights is not None:
                apply_dense_(self.method, weights)
            else:
                load_first_(self.method, self._first)
            return
        chain = _chain(self.run, memory.updates)
        done, digest = self._made or (0, b"")
        if done >= len(chain) or chain[done] != digest:
            load_first_(self.method, self._first)
            done = 0
        self._made = None
        base = self._first if self.method.from_base else None
        for update in memory.updates[done:]:
            apply_merged_(self.method, update, base)
        self._made = len(memory.updates), chain[-1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights that move, so that a new process need not replay; see :meth:`load`.

        Nothing is written where there is nothing to replay.

        Raises:
            OSError: the file cannot be written; an existing one is then untouched.
        """
        if self._made is None or not self._made[0] or self.method.payload == "tensors":
            return
        count, digest = self._made
        state = {"updates": count, "digest": digest.hex()}
        files.save(path, values=self.method.space.values(), state=state, messages={})

    def load(self, path: str | os.PathLike[str]) -> bool:
        """Go on from a file of :meth:`save`, where it is whole and this replica has made nothing.

        A file of other updates or another run does no harm: :meth:`follow_` starts anew.

        Returns:
            Whether the weights are the file's.
        """
        if self._made is None or self._made[0] or not os.path.exists(path):
            return False
        try:
            values, state, _ = files.load(path)
            made = int(state["updates"]), bytes.fromhex(state["digest"])
            self.method.space.load_(values)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"the weights in {path} are of no use: {error}", stacklevel=2)
            return False
        self._made = made
        return True


def _chain(run: bytes, updates: Sequence[bytes]) -> list[bytes]:
    """The digest of a run and the first k of its updates, for every k from 0."""
    chain = [hashlib.sha256(run).digest()]
    for update in updates:
        chain.append(hashlib.sha256(chain[-1] + update).digest())
    return chain


class Host:
    """What the clients of a process have in common: a method, a task, one copy of the model.

    Args:
        model: holds the first weights of the run; evaluation mode is set.
        task: what is learned.
        method: a fresh method with the server's options.
        batch_size: examples a local step.
        seed: of the run.
        calibration: as the server's, where a mask is chosen from it.

    Attributes:
        common: what must be as the server has it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        method: Method,
        *,
        batch_size: int,
        seed: int,
        calibration: Sequence[Batch] = (),
    ) -> None:
        model = unwrap(model).eval()
        method.prepare(Setting(model, task, (), {}, seed, tuple(calibration), server=False))
        self.task, self.method, self.batch_size = task, method, batch_size
        self.common = describe(method, model, batch_size)
        self.replica = Replica(method, json.dumps(self.common, sort_keys=True).encode())

    def answer(
        self,
        request: Request,
        updates: Sequence[bytes],
        shard: Sequence[int],
        memory: Memory,
    ) -> tuple[Reply, Memory]:
        """A client's round.

        Args:
            request: what the server sent.
            updates: encoded, those after ``request.known``.
            shard: the client's examples.
            memory: what the client has.

        Returns:
            The reply, and what the client has from now on.

        Raises:
            EncodingError: a message is damaged.
            ValueError: a message of another run, for another client, out of order.
        """
        order = Order.decode(request.order)
        if order.client != request.client:
            raise ValueError(f"an order for client {order.client} came to client {request.client}")
        if request.position < 0:
            raise ValueError(f"position must be at least 0; got {request.position}")
        try:
            memory, weights = self.replica.learn(memory, order, request.known, updates)
        except BehindError as behind:
            return Reply(client=request.client, known=behind.round), memory
        if request.drops:
            return Reply(client=request.client), memory
        self.replica.follow_(memory, weights)
        done = work(
            self.method,
            self.task,
            shard,
            order,
            batch_size=self.batch_size,
            position=request.position,
        )
        reply = Reply(client=request.client, data=done.data, position=done.position, loss=done.loss)
        return reply, memory
