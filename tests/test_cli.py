"""The command line: what it prints, and that a mistake costs one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_lm
import torch
from typer.testing import CliRunner, Result

import zokernels
from zokernels import _ops, _registry
from zokernels.cli import app, main
from zokernels.finetune import data as data_


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return tiny_lm.save_labelled(tmp_path / "data.csv")


def test_info_json() -> None:
    result = call("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["versions"]["zokernels"] == zokernels.__version__
    assert facts["versions"]["noise contract"] == zokernels.CONTRACT_VERSION
    assert set(facts["serving"]["cpu"]) == set(_ops.SCHEMAS)
    for name, backend in _registry.backends().items():
        assert facts["backends"][name]["on"] == (backend.reason is None)
        assert facts["backends"][name]["reason"] == backend.reason
    for op, name in facts["serving"]["cpu"].items():
        assert name == _registry.serving(op, "cpu")


def test_info_says_why_a_backend_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    off = _registry.Backend("broken", ("cpu",), reason="ImportError: no library")
    monkeypatch.setitem(_registry._backends, "broken", off)
    result = call("info")
    assert result.exit_code == 0
    assert "off: ImportError: no library" in " ".join(result.stdout.split())


def test_module_runs_without_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zokernels"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "reference" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--steps", "many"], "'--steps'"),
        (["finetune", "--stepz", "1"], "--stepz"),
        (["finetune", "--model", "m"], "--data is required"),
        (["tune"], "tune"),
    ],
)
def test_usage_errors_cost_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["zokernels", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_asked_for_backend_that_cannot_be_had() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zokernels", "info"],
        env={**os.environ, "ZOKERNELS_BACKEND": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "'abacus'" in done.stderr


def test_finetune(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    common = ["finetune", "--model", model_dir, "--data", labelled, "--output", tmp_path / "out"]
    common += ["--label-column", "label", "--verbalizer", "0= bad", "--verbalizer", "1= good"]
    common += ["--prompt", "{text}\\nIt was", "--steps", 5, "--batch-size", 4, "--repeats", 2]
    result = call(*common)
    assert result.exit_code == 0, result.output
    assert "seed 1: held-out loss" in result.output
    assert "MeZO's own loop" in result.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["prompt"] == "{text}\nIt was"
    assert config["verbalizers"] == {"0": " bad", "1": " good"}
    assert (tmp_path / "out/loss.png").is_file()
    # Going on with a run that is done needs its folder only.
    again = call("finetune", "--resume", "--output", tmp_path / "out", "--no-compare-mezo")
    assert again.exit_code == 0, again.output
    scores = [
        [line for line in output.splitlines() if ": held-out loss" in line]
        for output in (result.output, again.output)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_config_file_and_command_line(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'model = "{model_dir}"\ndata = "{labelled}"\nsteps = 50\nlr = 1e-4\n')
    result = call(
        *["finetune", "--config", file, "--steps", 2, "--max-length", 8, "--no-compare-mezo"],
        *["--output", tmp_path / "out", "--batch-size", 3, "--accumulate", 2],
    )
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["steps"], config["lr"], config["task"]) == (2, 1e-4, "auto")
    assert "perplexity" in result.output and "accuracy" not in result.output
    assert "batch 6 (2 micro-batches x 3)" in result.output


def test_out_of_memory(
    model_dir: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(data_, "order", fails)
    result = call(
        *["finetune", "--model", model_dir, "--data", labelled, "--output", tmp_path / "out"],
        *["--max-length", 8],
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out of memory: give a smaller --batch-size")
    assert "Tried to allocate 2.00 GiB" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is required"),
        (["--model", "MODEL"], "--data is required"),
        (["--model", "MODEL", "--data", "none.csv"], "--data: no such file: none.csv"),
        (["--model", "MODEL", "--data", "EMPTY"], "holds no example"),
        (["--model", "/no/where", "--data", "DATA"], "--model: no such folder: /no/where"),
        (["--model", "MODEL", "--data", "DATA", "--steps", "0"], "--steps must be at least 1"),
        (["--model", "MODEL", "--data", "DATA", "--text-column", "body"], "no column 'body'"),
        (["--model", "MODEL", "--data", "DATA", "--verbalizer", "bad"], "must be LABEL=WORD"),
        (["--model", "MODEL", "--data", "DATA", "--trainable", "some"], "--trainable must be made"),
        (["--model", "MODEL", "--data", "DATA", "--dtype", "int8"], "--dtype must be one of"),
        (["--model", "MODEL", "--data", "DATA", "--config", "no.toml"], "no such file: no.toml"),
        (["--resume"], "--resume needs the --output folder"),
        (["--demo", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_mistakes_cost_one_line(
    arguments: list[str], message: str, model_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    names = {"MODEL": model_dir, "DATA": labelled, "EMPTY": tmp_path / "empty.txt"}
    extra = [] if "--resume" in arguments else ["--output", tmp_path / "out"]
    result = call("finetune", *(names.get(a, a) for a in arguments), *extra)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
