"""Configurations: every field documented, files and layers, errors that name the value."""

from __future__ import annotations

import json

import pytest

from fedzo.config import CompareConfig, RunConfig, build, parse_pairs, read_file
from fedzo.methods import METHODS
from fedzo.options import make_method, options_of
from zokernels.finetune.config import UserError

LEAST = {"model": "m", "data": "sst2"}


@pytest.mark.parametrize("kind", [RunConfig, CompareConfig])
def test_every_field_says_what_it_is_and_where_it_belongs(kind):
    for name, field in kind.model_fields.items():
        assert field.description and field.description.endswith("."), name
        assert isinstance(field.json_schema_extra, dict) and field.json_schema_extra["panel"], name


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_every_method_is_described(method):
    for option in options_of(method).values():
        assert option.text, f"{method}.{option.name}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "run.toml",
            'model = "m"\ndata = "sst2"\nclients-per-round = 2\n[options]\ndensity = 0.01\n',
        ),
        ("run.yaml", "model: m\ndata: sst2\nclients_per_round: 2\noptions:\n  density: 0.01\n"),
        (
            "run.json",
            json.dumps({**LEAST, "clients_per_round": 2, "options": {"density": 0.01}}),
        ),
    ],
)
def test_the_three_kinds_of_files_say_the_same(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    config = build(RunConfig, read_file(str(path)))
    assert config.clients_per_round == 2 and config.options == {"density": 0.01}


def test_later_layers_win_and_options_are_joined():
    config = build(
        RunConfig,
        {**LEAST, "clients": 4, "options": {"density": 0.1, "scope": "layer"}},
        {"clients": 6, "options": {"density": 0.2}},
    )
    assert config.clients == 6
    assert config.options == {"density": 0.2, "scope": "layer"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m"}, "--data is required"),
        ({**LEAST, "client": 3}, "unknown field 'client'; known: .*clients"),
        ({**LEAST, "clients": 0}, "--clients: .*greater than or equal to 1; got 0"),
        ({**LEAST, "clients": "many"}, "--clients: .*integer.*; got 'many'"),
        ({**LEAST, "dropout": 1.0}, "--dropout: .*less than 1; got 1.0"),
        ({**LEAST, "lr": -1}, "--lr: .*greater than 0; got -1"),
        ({**LEAST, "split": "zipf"}, "split must be iid, dirichlet:ALPHA.*; got 'zipf'"),
        ({**LEAST, "clients": 2, "clients_per_round": 3}, "at most the 2 clients; got 3"),
        ({**LEAST, "dtype": "int8"}, "--dtype: .*'float32'.*; got 'int8'"),
        ({**LEAST, "task": "sst9"}, "task must be one of sst2.*; got 'sst9'"),
        ({**LEAST, "task": "custom"}, "needs prompt and words"),
        ({**LEAST, "prompt": "{x}"}, "belong to task custom"),
        ({**LEAST, "seed": -1}, "--seed: .*; got -1"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, message):
    with pytest.raises(UserError, match=message):
        build(RunConfig, fields)


@pytest.mark.parametrize(
    ("data", "task"),
    [
        ("/data/SST-2/train.tsv", "sst2"),
        ("glue:rte", "rte"),
        ("ag_news", "agnews"),
        ("sahil2801/CodeAlpaca-20k", "codealpaca"),
        ("tatsu-lab/alpaca", "alpaca"),
        ("databricks/databricks-dolly-15k", "dolly"),
    ],
)
def test_the_task_follows_from_the_name_of_the_data(data, task):
    assert build(RunConfig, {**LEAST, "data": data}).resolved_task == task


def test_data_whose_name_says_nothing_need_a_task():
    with pytest.raises(UserError, match=r"--task must be given: the name of --data mine\.csv"):
        _ = build(RunConfig, {**LEAST, "data": "mine.csv"}).resolved_task


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "no such file"),
        ("bad.toml", "x = ", "cannot be read"),
        ("bad.yaml", "a: [", "cannot be read"),
        ("list.yaml", "- a", "must hold fields by name"),
        ("run.ini", "x", "must be a .toml, .yaml or .json file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_file(str(tmp_path / name))


def test_options_from_a_command_line_get_their_types():
    method = make_method(
        "fedmezo", {"lr": "1e-4", "steps": "3", "lora_rank": "none", "lora_targets": "q,v"}
    )
    assert (method.lr, method.steps) == (1e-4, 3)
    assert method.lora_rank is None and method.lora_targets == ("q", "v")
    assert make_method("meerkat", {"track_gradip": "true", "mask": "m.safetensors"}).mask == (
        "m.safetensors"
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("meercat", {}, "--method must be one of .*meerkat.*; got 'meercat'"),
        ("meerkat", {"densty": "1"}, "no option 'densty'; it has density"),
        ("meerkat", {"density": "much"}, "option density: .*number.*; got 'much'"),
        ("meerkat", {"density": 2}, r"density must be in \(0, 1\]; got 2"),
        ("meerkat", {"steps": "1.5"}, "option steps: .*integer.*; got '1.5'"),
        ("fedmezo", {"signal": "loud"}, "signal must be one of .*; got 'loud'"),
    ],
)
def test_bad_options_of_methods_are_named(method, options, message):
    with pytest.raises(UserError, match=message):
        make_method(method, options)


def test_a_comparison_is_rows_times_seeds():
    config = build(
        CompareConfig,
        {
            **LEAST,
            "methods": ["meerkat", "full_fedzo"],
            "entries": [{"name": "wide", "method": "meerkat", "options": {"density": 0.1}}],
            "seeds": [3, 4],
            "options": {"eps": 0.01},
            "output": "out",
        },
    )
    runs = config.runs()
    assert [(name, seed) for name, seed, _ in runs] == [
        (name, seed) for name in ("meerkat", "full_fedzo", "wide") for seed in (3, 4)
    ]
    last = runs[-1][2]
    assert last.options == {"eps": 0.01, "density": 0.1} and last.output == "out/wide/seed-4"
    assert type(last) is RunConfig and last.seed == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "methods or entries must name"),
        ({"methods": ["meerkat", "meerkat"]}, "different names"),
        ({"methods": ["meerkat"], "seeds": []}, "--seeds: "),
        ({"entries": [{"name": "a", "clints": 3}]}, "entry a: unknown field 'clints'"),
    ],
)
def test_a_bad_comparison_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build(CompareConfig, {**LEAST, **fields}).runs()


def test_pairs():
    assert parse_pairs(["later-steps=3", "x=a=b"], "--set") == {"later_steps": "3", "x": "a=b"}
    assert parse_pairs(["1= great"], "--word") == {"1": " great"}
    with pytest.raises(UserError, match="--set must be NAME=VALUE; got 'x'"):
        parse_pairs(["x"], "--set")
