"""Clients that are function calls: one copy of the model serves them all, one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedzo.client import work
from fedzo.messages import Order
from fedzo.methods.base import Method
from fedzo.task import Task
from fedzo.transports import Reply, Request, Updates


class InProcess:
    """Clients that work on the server's own copy of the model.

    They hold the server's weights already, so updates are not sent; their bytes are counted by the
    federation all the same.

    Args:
        method, task: the federation's.
        shards: the examples of each client, numbers in ``[0, task.train_size)``.
        batch_size: examples a local step.

    Raises:
        ValueError: no client with examples, or an index that is no example.
    """

    def __init__(
        self, method: Method, task: Task, shards: Sequence[Sequence[int]], *, batch_size: int
    ) -> None:
        self.method, self.task, self.shards = method, task, shards
        self.batch_size = batch_size
        self._samples = {k: len(shard) for k, shard in enumerate(shards) if len(shard)}
        if not self._samples:
            raise ValueError("shards must have at least one client with examples; got none")
        for k in self._samples:
            low, high = min(shards[k]), max(shards[k])
            if low < 0 or high >= task.train_size:
                raise ValueError(
                    f"shards[{k}] must be in [0, {task.train_size}); got {low} to {high}"
                )

    @property
    def samples(self) -> Mapping[int, int]:
        """Number of examples of each client that has some."""
        return self._samples

    def identity(self) -> str:
        """Digest of the shards."""
        listed = repr([list(map(int, s)) for s in self.shards])
        return hashlib.sha256(listed.encode()).hexdigest()

    def open(self, common: Mapping[str, Any]) -> None:
        """Nothing to agree on: the clients have the server's method and model."""

    def exchange(self, requests: Sequence[Request], updates: Updates) -> Iterator[Reply]:
        """Let the clients work, each when its reply is asked for."""
        for request in requests:
            yield Reply(client=request.client) if request.drops else self.work(request)

    def work(self, request: Request) -> Reply:
        """A client's round."""
        done = work(
            self.method,
            self.task,
            self.shards[request.client],
            Order.decode(request.order),
            batch_size=self.batch_size,
            position=request.position,
        )
        return Reply(client=request.client, data=done.data, position=done.position, loss=done.loss)
