"""What the documentation says of fedzo: its commands have these options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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
