"""Federations over Flower in this process, as test_fed_flower builds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fed_zoo as zoo
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedzo.client import Host
from fedzo.records import RoundRecord
from fedzo.simulation import Federation
from fedzo.transports.flower import RECORD, FlowerTransport, Seat, client_app
from fedzo.transports.local_grid import LocalGrid

SEED, BATCH = 5, 2


def host(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Host:
    """A process of clients: its own copy of the model."""
    task = zoo.ToyTask()
    return Host(
        zoo.build(dtype),
        task,
        zoo.method(name, **options),
        batch_size=BATCH,
        seed=SEED,
        calibration=[task.batch(range(8))],
    )


def app(hosts: Callable[[], Host], clients: int = 4, caches: Path | None = None) -> ClientApp:
    """Clients that are called by node-config ``client``."""
    shards = zoo.shards(clients, zoo.ToyTask())

    def join(context: Context) -> Seat:
        client = int(context.node_config["client"])
        cache = None if caches is None else str(caches / f"{client}.safetensors")
        return Seat(hosts(), client, shards[client], cache)

    return client_app(join)


class Grid(LocalGrid):
    """A local grid that counts what lies in the records, and passes replies through ``way``."""

    def __init__(self, apps: ClientApp, clients: int = 4) -> None:
        super().__init__(apps, [{"client": k} for k in range(clients)])
        self.inner_down = self.inner_up = 0
        self.way: Callable[[Message], Iterable[Message]] = lambda message: [message]
        self.backwards = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        for message in listed:
            record = message.content.config_records[RECORD]
            updates = record.get("updates", [])
            self.inner_down += len(record.get("order", b"")) + sum(map(len, updates))
        return super().push_messages(listed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for message in super().pull_messages(message_ids):
            if message.has_content():
                self.inner_up += len(message.content.config_records[RECORD].get("data", b""))
            found += self.way(message)
        return found[::-1] if self.backwards else found

    def node(self, client: int) -> int:
        """The node of a client."""
        return list(self.contexts)[client]


def federation(
    name: str,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    clients: int = 4,
    **given: Any,
) -> tuple[Grid, Federation]:
    """A federation over Flower, otherwise as ``fed_zoo.federation``."""
    options = dict(options or {})
    if grid is None:
        one = host(name, dtype, **options)
        grid = Grid(app(lambda: one, clients), clients)
    task = zoo.ToyTask()
    made = Federation(
        zoo.build(dtype),
        task,
        zoo.method(name, **options),
        transport=FlowerTransport(grid, clients, timeout=timeout, patience=5.0, poll=0.01),
        **{
            "seed": SEED,
            "batch_size": BATCH,
            "calibration": [task.batch(range(8))],
            **given,
        },
    )
    return grid, made


def timeless(records: Iterable[RoundRecord]) -> list[str]:
    """Everything of the records but the seconds."""
    return [repr(replace(record, seconds=0.0)) for record in records]


def changed(message: Message, **fields: Any) -> Message:
    """The message with other fields in its record; None takes one out."""
    record = dict(message.content.config_records[RECORD])
    record.update(fields)
    content = RecordDict(dict(message.content))
    content[RECORD] = ConfigRecord({k: v for k, v in record.items() if v is not None})
    message.content = content
    return message
