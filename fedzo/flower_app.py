"""A configuration's run as Flower apps: in one process, or on a SuperLink and its SuperNodes.

``flwr run`` takes a folder with a ``pyproject.toml`` that names two apps; :func:`write` makes it.
The run's configuration travels in Flower's run configuration. What belongs to a machine is in the
SuperNode's ``--node-config``: ``client`` (its number), and, where they differ from the run's,
``data``, ``model`` and ``device``. A node that names ``data`` learns from all of it; the others
share out the run's data by its split. A node that names a file as its ``cache`` keeps the weights
there between messages, and replays new updates only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzo import experiment
from fedzo.client import Host
from fedzo.config import RunConfig, build
from fedzo.options import make_method
from fedzo.transports import TransportError, flower
from fedzo.transports.local_grid import LocalGrid
from zokernels.finetune.config import UserError

# Fields of a run that a node may have otherwise.
LOCAL = ("data", "model", "device")

_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedzo-run"
version = "1.0.0"
description = "A run of fedzo"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedzo"

[tool.flwr.app.components]
serverapp = "fedzo_run:server"
clientapp = "fedzo_run:client"

[tool.flwr.app.config]
"""

_MODULE = '''"""The apps of a run of fedzo, which is installed where they run."""

from fedzo.flower_app import client_app, server_app

server = server_app()
client = client_app()
'''


def run(config: RunConfig, watch: experiment.Watch = lambda row: None) -> experiment.Result:
    """Run a configuration with its clients as Flower apps in this process.

    Raises:
        UserError: something the user can put right.
    """
    results: list[experiment.Result] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(_serve(config, grid, watch))

    try:
        LocalGrid(client_app(config), [{"client": k} for k in range(config.clients)]).start(app)
    finally:
        _load.cache_clear()
    return results[0]


def server_app(config: RunConfig | None = None) -> ServerApp:
    """The server of a run: as ``fedzo run``, with the clients that Flower knows.

    Args:
        config: the run; None: Flower's run configuration (:func:`read`).
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _serve(read(context.run_config) if config is None else config, grid, _say)

    return app


def client_app(config: RunConfig | None = None) -> ClientApp:
    """The clients of a run. Model and data are loaded once a process.

    Args:
        config: the run; None: Flower's run configuration (:func:`read`).
    """

    def join(context: Context) -> flower.Seat:
        node = context.node_config
        mine = read(context.run_config) if config is None else config
        own = "data" in node
        mine = mine.model_copy(update={k: str(node[k]) for k in LOCAL if k in node})
        client = node.get("client", node.get("partition-id"))
        if isinstance(client, bool) or not isinstance(client, int) or client < 0:
            raise ValueError(f"node-config must have client, a number from 0; got {client!r}")
        host, shards = _load(mine.model_dump_json(), own)
        if not own and client >= len(shards):
            raise ValueError(f"client must be below {len(shards)}; got {client}")
        cache = str(node["cache"]) if "cache" in node else None
        return flower.Seat(host, client, shards[0] if own else shards[client], cache)

    return flower.client_app(join)


def write(folder: Path, config: RunConfig) -> None:
    """Write the folder that ``flwr run`` takes; ``--run-config resume=true`` goes on with a run.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    values = {
        name: value
        for name, value in config.model_dump(exclude={"transport"}).items()
        if value != RunConfig.model_fields[name].default or name == "resume"
    }
    lines = [
        f"{name} = {json.dumps(json.dumps(v) if isinstance(v, dict) else v, ensure_ascii=False)}"
        for name, v in values.items()
    ]
    try:
        folder.mkdir(parents=True)
        (folder / "pyproject.toml").write_text(_PROJECT + "\n".join(lines) + "\n", "utf-8")
        (folder / "fedzo_run.py").write_text(_MODULE, "utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error


def read(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from Flower's: fields by name, ``options`` and ``words`` as JSON text.

    Raises:
        UserError: an unknown field or a bad value.
    """
    fields = {name.replace("-", "_"): value for name, value in values.items()}
    for name in ("options", "words"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = json.loads(fields[name])
            except ValueError as error:
                raise UserError(f"{name} must be JSON; got {fields[name]!r}") from error
    return build(RunConfig, fields, {"transport": "flower"})


def _serve(config: RunConfig, grid: Grid, watch: experiment.Watch) -> experiment.Result:
    def connect() -> flower.FlowerTransport:
        return flower.FlowerTransport(grid, config.clients, timeout=config.round_timeout)

    try:
        return experiment.run(config, watch, connect)
    except TransportError as error:
        raise UserError(f"--transport flower: {error}") from error


@functools.lru_cache(maxsize=1)
def _load(fields: str, own: bool) -> tuple[Host, Sequence[Sequence[int]]]:
    """Model, method and data of a process of clients."""
    config = build(RunConfig, json.loads(fields))
    if own:  # nothing of a client's data is held out
        config = config.model_copy(update={"eval_data": config.data, "eval_limit": 1})
    local = experiment.fetched(config)
    model, tokenizer, masked = experiment.load_model(local)
    task = experiment.make_task(local, model, tokenizer, masked)
    method = make_method(config.method, experiment.method_options(config))
    host = Host(
        model,
        task,
        method,
        batch_size=config.batch_size,
        seed=config.seed,
        calibration=experiment.make_calibration(local, model, tokenizer, masked, method),
    )
    shards = [list(range(task.train_size))] if own else experiment.make_shards(config, task)
    return host, shards


def _say(row: Mapping[str, Any]) -> None:
    print(
        f"round {row['round']} loss {row.get('loss')} held out {row.get('eval_loss')}", flush=True
    )
