"""What the documentation says of fedzo and Flower: the commands have these options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from fedzo.cli import app

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str, *programs: str) -> list[list[str]]:
    """The lines of code that call these programs, in words, comments left out."""
    code = "\n".join(m.group(2) for m in FENCE.finditer(text))
    lines = [line for line in code.splitlines() if line.split(" ")[0] in programs]
    return [shlex.split(line, comments=True) for line in lines]


PROGRAMS = ("fedzo", "flwr", "flower-superlink", "flower-supernode")


def help_of(called: tuple[str, ...]) -> str:
    """What a command of a program says of itself."""
    environment = {"COLUMNS": "200", "FLWR_TELEMETRY_ENABLED": "0"}
    if called[0] == "fedzo":
        return CliRunner().invoke(app, [*called[1:], "--help"], env=environment).output
    out = subprocess.run(
        [str(Path(sys.executable).parent / called[0]), *called[1:], "--help"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, **environment},
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_commands_for_flower_have_their_options():
    """Those of fedzo's README, Flower's included."""
    found = commands((ROOT / "fedzo" / "README.md").read_text(), *PROGRAMS)
    assert {words[0] for words in found} == set(PROGRAMS)
    shown: dict[tuple[str, ...], str] = {}
    for words in found:
        # Words before the first option or argument name a command of the program.
        depth = {"fedzo": 1, "flwr": 2 if words[1] == "supernode" else 1}.get(words[0], 0)
        called = tuple(words[: 1 + depth])
        if called not in shown:
            shown[called] = help_of(called)
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", shown[called]), (called, option)


def test_the_readmes_fedzo_commands_have_their_options():
    text = (ROOT / "README.md").read_text()
    code = "\n".join(m.group(2) for m in FENCE.finditer(text))
    inline = re.findall(r"`(fedzo [^`]+)`", text)
    lines = [line for line in code.splitlines() if line.startswith("fedzo ")] + inline
    assert any("--split" in line for line in lines)
    for line in lines:
        command, *arguments = shlex.split(line)[1:]
        out = subprocess.run(
            [sys.executable, "-m", "fedzo", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )
        assert out.returncode == 0, out.stderr
        for option in (a for a in arguments if a.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", out.stdout), option
