"""``fedzo run --transport flower`` and the apps that ``flwr run`` takes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedzo import experiment, flower_app, metrics
from fedzo.cli import app
from fedzo.config import RunConfig, build
from fedzo.transports.local_grid import LocalGrid
from zokernels.finetune.config import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    tiny_lm.save(folder / "model")
    for name, words in (("data", ("xx", "yy")), ("mine", ("xx", "zz"))):
        rows = [{"text": words[i % 2] + str(i), "label": i % 2} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "c4.jsonl").write_text(json.dumps({"text": "the cat sat " * 99}) + "\n")
    return folder


def config(place: Path, output: Path, **more: Any) -> RunConfig:
    given = {
        "model": str(place / "model"),
        "data": str(place / "data.jsonl"),
        "task": "custom",
        "prompt": "{text} is",
        "words": {"0": " bad", "1": " good"},
        "method": "meerkat",
        "options": {"density": 0.01},
        "calibration": str(place / "c4.jsonl"),
        "calibration_batches": 2,
        "clients": 3,
        "clients_per_round": 2,
        "rounds": 3,
        "steps": 2,
        "lr": 1e-2,
        "batch_size": 4,
        "eval_every": 2,
        "eval_limit": 20,
        "max_length": 32,
        "output": str(output),
        "plots": False,
    }
    return build(RunConfig, {**given, **more})


def state(folder: Path) -> dict[str, Any]:
    """The weights that moved, as bits, and the rows without times and memory."""
    tensors = load_file(folder / experiment.CHECKPOINT)
    values = {k: v.numpy().tobytes() for k, v in tensors.items() if k.startswith("value/")}
    rows = [
        {k: v for k, v in row.items() if "seconds" not in k and k not in ("memory", "time")}
        for row in metrics.read(folder)
    ]
    return {"values": values, "rows": rows}


@pytest.mark.parametrize("method", ["meerkat", "fedmezo"])
def test_a_run_over_flower_is_the_run_in_process(place, tmp_path, method):
    options = {"meerkat": {"density": 0.01}, "fedmezo": {"lora_rank": 2}}[method]
    given = {"method": method, "options": options, "dropout": 0.2}
    experiment.run(config(place, tmp_path / "a", **given))
    flower_app.run(config(place, tmp_path / "b", transport="flower", **given))
    here, there = state(tmp_path / "a"), state(tmp_path / "b")
    assert here == there and here["values"]


def test_a_run_over_flower_resumes(place, tmp_path):
    experiment.run(config(place, tmp_path / "a", rounds=4))
    flower_app.run(config(place, tmp_path / "b", transport="flower", rounds=2))
    flower_app.run(config(place, tmp_path / "b", transport="flower", rounds=4, resume=True))
    assert state(tmp_path / "a")["values"] == state(tmp_path / "b")["values"]
    with pytest.raises(UserError, match="--transport was 'flower' and is 'inprocess' now"):
        experiment.run(config(place, tmp_path / "b", rounds=5, resume=True))


def test_the_command_runs_over_flower(place, tmp_path):
    out = tmp_path / "out"
    fields = config(place, out).model_dump(exclude={"words", "output", "plots", "options"})
    arguments = ["run", "--transport", "flower", "--output", str(out), "--no-plots"]
    for name, value in fields.items():
        if value not in (None, False, "inprocess") and name != "transport":
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    arguments += ["--word", "0= bad", "--word", "1= good", "--set", "density=0.01"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "a client's message" in shown.output and (out / experiment.RESULT).is_file()


def test_the_folder_for_flwr_run(place, tmp_path):
    """What the command writes is a Flower app; its two apps run the configuration."""
    folder, here, out = tmp_path / "app", tmp_path / "here", tmp_path / "out"
    given = config(place, out)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(given.model_dump(exclude_defaults=True)))
    arguments = ["flower-app", str(folder), "--config", str(file)]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0 and "flwr run" in shown.output
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    from flwr.cli.config_utils import load_and_validate

    _, warnings = load_and_validate(folder / "pyproject.toml")
    assert not warnings
    values = project["tool"]["flwr"]["app"]["config"]
    assert flower_app.read(values) == given.model_copy(update={"transport": "flower"})
    names: dict[str, Any] = {}
    exec((folder / "fedzo_run.py").read_text(), names)
    nodes = [{"partition-id": k} for k in range(3)]
    LocalGrid(names["client"], nodes, values).start(names["server"])
    experiment.run(config(place, here))
    assert state(out) == state(here)
    more = {**values, "resume": True, "rounds": 4}
    LocalGrid(names["client"], nodes, more).start(names["server"])
    experiment.run(config(place, here, rounds=4, resume=True))
    assert state(out)["values"] == state(here)["values"]
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 2


def test_nodes_with_data_of_their_own(place, tmp_path):
    """All of a node's file is its shard; nothing of it is held out."""
    given = config(place, tmp_path / "out", clients=2, clients_per_round=None, transport="flower")
    cache = tmp_path / "weights"
    mine = {"data": str(place / "mine.jsonl"), "device": "cpu", "cache": str(cache)}
    nodes = [{"client": 0}, {"client": 1, **mine}]
    clients = flower_app.client_app(given)
    grid = LocalGrid(clients, nodes)
    grid.start(flower_app.server_app(given))
    assert len(metrics.read(tmp_path / "out")) == 4 and cache.is_file()
    sizes = {}
    for node in nodes:
        context = Context(run_id=1, node_id=5, node_config=node, state=RecordDict(), run_config={})
        asked = Message(RecordDict(), dst_node_id=5, message_type="query")
        record = clients(asked, context).content.config_records["fedzo"]
        sizes[record["client"]] = record["samples"]
    held = round(60 * given.eval_fraction)
    assert sizes == {0: (60 - held) // 2, 1: 60}


@pytest.mark.parametrize("node", [{}, {"client": "one"}, {"client": -1}, {"client": True}])
def test_nodes_that_do_not_say_who_they_are(place, tmp_path, node):
    given = config(place, tmp_path / "out", clients=1, clients_per_round=1, transport="flower")
    grid = LocalGrid(flower_app.client_app(given), [node])
    with pytest.raises(UserError, match="node-config must have client, a number from 0"):
        grid.start(flower_app.server_app(given))


def test_a_node_beyond_the_clients(place, tmp_path):
    given = config(place, tmp_path / "out", transport="flower")
    grid = LocalGrid(flower_app.client_app(given), [{"client": k} for k in (0, 1, 3)])
    with pytest.raises(UserError, match="client must be below 3; got 3"):
        grid.start(flower_app.server_app(given))


def test_configurations_that_flower_cannot_have(place, tmp_path):
    with pytest.raises(UserError, match="round_timeout belongs to transport flower"):
        config(place, tmp_path, round_timeout=3.0)
    with pytest.raises(UserError, match="words must be JSON"):
        flower_app.read({"model": "m", "data": "d", "words": "{"})
    with pytest.raises(UserError, match="unknown field 'round'"):
        flower_app.read({"model": "m", "data": "d", "round": 3})
    folder = tmp_path / "é \"'\n"
    given = config(place, tmp_path / "out", prompt='"{text}"\n\té 😀\\n is', transport="flower")
    flower_app.write(folder, given)
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    assert flower_app.read(project["tool"]["flwr"]["app"]["config"]) == given
    with pytest.raises(UserError, match="cannot be written"):
        flower_app.write(folder, given)


def test_without_flower_the_command_says_what_to_install(place, tmp_path):
    code = (
        "import sys; sys.modules['flwr'] = None; sys.argv[0] = 'fedzo'\n"
        "from fedzo.cli import main; main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "flower-app", str(tmp_path / "a"), "--model", "m",
         "--data", "sst2"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert out.returncode == 2 and "pip install 'flwr" in out.stderr, out.stderr
