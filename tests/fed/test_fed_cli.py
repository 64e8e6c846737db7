"""The command from end to end on a model and data that the tests write; resume; plots; tables."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re

import pytest
import tiny_lm
from typer.testing import CliRunner

from fedzo import experiment, metrics, plots, summary
from fedzo.cli import app, main
from fedzo.config import RunConfig, build
from zokernels.finetune.config import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fed")
    tiny_lm.save(folder / "model")
    rows = [
        {"text": ("xx" if i % 2 else "yy") + str(i), "label": i % 2, "author": f"a{i % 4}"}
        for i in range(80)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "c4.jsonl").write_text("".join(json.dumps({"text": "the cat sat " * 99}) + "\n"))
    return folder


def fields(place, output, **more):
    return {
        "model": str(place / "model"),
        "data": str(place / "data.jsonl"),
        "task": "custom",
        "prompt": "{text} is",
        "words": {"0": " bad", "1": " good"},
        "calibration": str(place / "c4.jsonl"),
        "calibration_batches": 2,
        "clients": 4,
        "split": "dirichlet:0.5",
        "rounds": 4,
        "steps": 2,
        "lr": 1e-2,
        "batch_size": 4,
        "eval_every": 2,
        "eval_limit": 20,
        "max_length": 32,
        "output": str(output),
        "plots": False,
        **more,
    }


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_a_run_in_which_nobody_answers(place, tmp_path):
    result = experiment.run(
        build(RunConfig, fields(place, tmp_path / "out", rounds=1, dropout=0.99))
    )
    assert result.bytes_up == 0 and math.isinf(result.saving)
    lines = [f"{k} = {json.dumps(v)}" for k, v in fields(place, "x").items() if k != "words"]
    path = tmp_path / "run.toml"
    path.write_text("\n".join(lines) + '\n[words]\n0 = " bad"\n1 = " good"\n')
    again = tmp_path / "again"
    shown = invoke("run", "--config", path, "--output", again, "--rounds", 1, "--dropout", 0.99)
    assert shown.exit_code == 0, shown.output
    assert "bytes up, down" in shown.output and "infx" not in shown.output


def test_run_prints_accuracy_bytes_time_and_memory(place, tmp_path):
    path = tmp_path / "run.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in fields(place, "x").items() if k != "words"]
    words = '[words]\n0 = " bad"\n1 = " good"\n'
    path.write_text("\n".join(lines) + "\n" + words)
    out = tmp_path / "out"
    result = invoke(
        "run", "--config", path, "--method", "meerkat", "--output", out,
        "--set", "density=0.01", "--set", "track-gradip=true", "--plots", "--tensorboard",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for round in (0, 2, 4):
        line = rf"round +{round}  loss \d\.\d+  accuracy \d\.\d+  up .*  down .*  s  memory .*B"
        assert re.search(line.replace("  s", r"  [\d.]+ s"), result.output), result.output
    assert "a client's message" in result.output
    for name in ("loss", "accuracy", "bytes", "gradip"):
        assert (out / f"{name}.png").stat().st_size > 5000
    assert list((out / "tensorboard").glob("events*"))
    rows = metrics.read(out)
    assert [r["round"] for r in rows] == [0, 1, 2, 3, 4] and rows[-1]["total_up"] > 0
    with (out / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [r["round"] for r in table] == ["0", "1", "2", "3", "4"]
    assert float(table[-1]["accuracy"]) == rows[-1]["accuracy"]
    assert int(table[-1]["total_up"]) == sum(int(r["bytes_up"]) for r in table)
    saved = experiment.read_result(out)
    assert saved.bytes_up == rows[-1]["total_up"]
    # T = 2 float32 scalars, and at most 64 bytes around them.
    assert saved.uplink <= 4 * 2 + 64


def test_a_run_that_stopped_goes_on_to_the_same_numbers(place, tmp_path):
    whole = experiment.run(build(RunConfig, fields(place, tmp_path / "whole")))

    class Stop(Exception):
        pass

    def stop(row):
        if row["round"] == 3:
            raise Stop

    parts = fields(place, tmp_path / "parts")
    with pytest.raises(Stop):
        experiment.run(build(RunConfig, parts), stop)
    # A kill between the checkpoint of round 3 and its line, which it cut short.
    path = tmp_path / "parts" / metrics.LINES
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    resumed = experiment.run(build(RunConfig, {**parts, "resume": True}))
    assert resumed.after == whole.after and resumed.bytes_up == whole.bytes_up
    times = ("seconds", "total_seconds", "memory")
    kept = [
        [{k: v for k, v in row.items() if k not in times} for row in metrics.read(folder)]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert kept[0] == kept[1]


def test_resume_refuses_other_options_and_other_data(place, tmp_path):
    values = fields(place, tmp_path / "run", rounds=1)
    experiment.run(build(RunConfig, values))
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        experiment.run(build(RunConfig, values))
    with pytest.raises(UserError, match=r"--lr was 0\.01 and is 0\.02 now"):
        experiment.run(build(RunConfig, {**values, "lr": 0.02, "resume": True}))
    other = tmp_path / "other.jsonl"
    other.write_text((place / "data.jsonl").read_text().replace("xx", "zz"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["data"] = str(other)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="training examples are not those"):
        experiment.run(build(RunConfig, {**values, "data": str(other), "resume": True}))


def test_resume_on_the_command_line_needs_only_the_folder(place, tmp_path):
    out = tmp_path / "run"
    experiment.run(build(RunConfig, fields(place, out, rounds=2)))
    result = invoke("run", "--resume", "--output", out, "--rounds", "3")
    assert result.exit_code == 0, result.output
    assert experiment.read_result(out).rounds == 3
    assert "holds no run" in invoke("run", "--resume", "--output", tmp_path / "no").stderr


def test_patience_ends_a_run_that_gets_no_better(place, tmp_path):
    out = tmp_path / "run"
    values = fields(place, out, rounds=20, eval_every=1, checkpoint_every=9, patience=2, lr=3.0)
    done = experiment.run(build(RunConfig, values))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows]
    assert done.rounds == losses.index(min(losses)) + 2 < 20
    again = invoke("run", "--resume", "--output", out)
    assert again.exit_code == 0, again.output
    same = experiment.read_result(out)
    assert same == dataclasses.replace(done, memory=same.memory)
    assert invoke("run", "--resume", "--output", out, "--patience", "4").exit_code == 0
    assert experiment.read_result(out).rounds >= done.rounds + 2
    with pytest.raises(UserError, match="patience must be 0 where eval_every is 0; got 2"):
        build(RunConfig, {**values, "eval_every": 0})


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([3.0, 2.0, 2.5, 2.5], True),
        ([3.0, 2.0, 2.5, None], False),  # not scored: the run ends where it is scored
        ([3.0, 2.0, None, 1.9], False),
        ([3.0, float("nan"), float("inf"), 2.9], False),
        ([float("nan"), 5.0, 5.0, 5.0], True),
        ([], False),
    ],
)
def test_out_of_patience(losses, ends):
    rows = [{"round": i, "eval_loss": loss} for i, loss in enumerate(losses)]
    assert experiment.out_of_patience(2, rows) is ends
    assert not experiment.out_of_patience(0, rows)


def test_compare_makes_one_table_and_one_plot(place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    path = tmp_path / "compare.json"
    values = fields(place, tmp_path / "all", rounds=2, eval_every=1, plots=True)
    entry = {"name": "adapters", "method": "lora_fedzo", "options": {"lora_rank": 2}}
    path.write_text(json.dumps({**values, "entries": [entry]}))
    command = ("compare", "--config", path, "--methods", "meerkat,full_fedzo", "--seeds", "0,1")
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    for name in ("meerkat", "full_fedzo", "adapters"):
        assert re.search(rf"{name} +\d\.\d+ ± \d\.\d+", result.output), result.output
    with (tmp_path / "all" / summary.FILE).open() as file:
        lines = {row["name"]: row for row in csv.DictReader(file)}
    scores = [
        experiment.read_result(tmp_path / "all" / "meerkat" / f"seed-{s}").after["loss"]
        for s in (0, 1)
    ]
    assert float(lines["meerkat"]["loss"]) == pytest.approx(sum(scores) / 2)
    assert float(lines["meerkat"]["loss_std"]) == pytest.approx(
        abs(scores[0] - scores[1]) / math.sqrt(2)
    )
    # Full-FedZO sends weights.
    assert float(lines["full_fedzo"]["bytes_up"]) > 100 * float(lines["meerkat"]["bytes_up"])
    assert (tmp_path / "all" / "compare.png").stat().st_size > 5000
    assert "add --resume" in invoke(*command).stderr
    again = invoke(*command, "--resume")
    assert again.exit_code == 0, again.output


def test_plot_again_and_together(place, tmp_path):
    for seed in (0, 1):
        experiment.run(build(RunConfig, fields(place, tmp_path / str(seed), rounds=2, seed=seed)))
    result = invoke("plot", tmp_path / "0")
    assert result.exit_code == 0 and (tmp_path / "0" / "loss.png").is_file()
    result = invoke("plot", tmp_path / "0", tmp_path / "1", "--output", tmp_path / "both.png")
    assert result.exit_code == 0 and (tmp_path / "both.png").is_file()
    assert "holds no run" in invoke("plot", tmp_path / "2").stderr


def test_methods_are_listed_with_their_options():
    assert "full_fedzo" in invoke("methods").output
    text = invoke("methods", "meerkat_vp").output
    assert "tau_quiet" in text and "[reconstructed]" in text
    assert "--method must be one of" in invoke("methods", "nothing").stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nowhere"}, "--model: no such folder"),
        ({"data": "./nowhere.csv"}, "--data: no such file"),
        ({"split": "natural:writer"}, "no such column"),
        ({"clients": 500}, "--split dirichlet:0.5: clients must be at most the 72 examples"),
        ({"method": "nothing"}, "--method must be one of"),
        ({"options": {"nothing": 1}}, "has no option 'nothing'"),
        ({"trainable": "regex:nothing"}, "selects no parameter"),
        ({"max_length": 4096}, "--max-length must be at most the model's 256"),
        ({"calibration": "./nowhere.txt"}, "--calibration: no such file"),
        ({"aggregate": "median", "options": {"seeds": "client"}}, "aggregate 'median'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, tmp_path, change, message):
    out = tmp_path / "run"
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**fields(place, out), **change}))
    result = invoke("run", "--config", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (out / metrics.LINES).exists()


def test_without_a_command_there_is_help_and_no_error(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fedzo"])
    with pytest.raises(SystemExit):
        main()
    out, err = capfd.readouterr()
    assert "Usage" in out and "error" not in err


def test_a_natural_split_and_failing_clients(place, tmp_path):
    values = fields(place, tmp_path / "run", split="natural:author", dropout=0.3, stragglers=0.2)
    result = experiment.run(build(RunConfig, {**values, "rounds": 6, "clients_per_round": 3}))
    rows = metrics.read(tmp_path / "run")
    assert sum(len(row["dropped"]) for row in rows) > 0 and result.rounds == 6
    assert sum(len(row["invited"]) for row in rows) == 18


def test_the_demos_model_and_data_go_by_name(place, tmp_path, monkeypatch):
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("sentence,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(20)))
    monkeypatch.setattr(experiment.assets, "smollm2", lambda folder: place / "model")
    parts = {"train": reviews, "test": reviews}
    monkeypatch.setattr(experiment.assets, "reviews", lambda folder: parts)
    values = fields(place, tmp_path / "run", model="demo", data="demo", task="auto", rounds=1)
    del values["prompt"], values["words"]
    result = experiment.run(build(RunConfig, {**values, "max_length": 64}))
    assert metrics.read(tmp_path / "run")[-1]["examples"] == 20 and result.rounds == 1
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert saved["model"] == saved["data"] == "demo"


def test_the_lines_of_the_plots_are_the_rows():
    rows = [
        {"round": 0, "phase": "start", "eval_loss": 2.0, "total_up": 0, "total_down": 0},
        {"round": 0, "phase": "calibration", "gradip": {"0": [1.0, None], "1": [3.0, 4.0]}},
        {"round": 1, "phase": "train", "loss": 1.5, "lrs": {"0": 0.1, "1": 0.2}, "eval_loss": 1.0,
         "gradip": {"0": [9.0]}, "total_up": 5, "total_down": 3},
        {"round": 2, "phase": "train", "loss": None, "lrs": {"0": 0.3}, "total_up": 9,
         "total_down": 6},
    ]  # fmt: skip
    assert plots.points(rows, "eval_loss") == ([0.0, 1.0], [2.0, 1.0])
    assert plots.points(rows, "loss") == ([1.0], [1.5])
    assert plots.of_clients(rows, "lrs") == {"0": ([1.0, 2.0], [0.1, 0.3]), "1": ([1.0], [0.2])}
    paths = plots.trajectories(rows)
    assert paths["1"] == ([1.0, 2.0], [3.0, 4.0]) and math.isnan(paths["0"][1][1])
    second = [{**rows[0], "eval_loss": 4.0}, {**rows[2], "eval_loss": 2.0, "total_up": 7}]
    x, low, mean, high, sent = plots.band([rows, second], "eval_loss")
    assert (x, low, mean, high) == ([0.0, 1.0], [2.0, 1.0], [3.0, 1.5], [4.0, 2.0])
    assert sent == [0.0, 9.0]
