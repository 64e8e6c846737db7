"""``python -m bench.gpu``; says what is missing before it imports anything of that."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec

BEGIN = time.perf_counter()

NEEDED = ("torch", "numpy", "safetensors", "tqdm", "typer", "rich", "transformers", "matplotlib")


def missing() -> list[str]:
    """Packages that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def main() -> None:
    """Run the command line, or say what to install."""
    absent = missing()
    if absent:
        sys.exit(f"bench.gpu needs {', '.join(absent)}: pip install {' '.join(absent)}")
    from bench.gpu import cli

    cli.BEGIN = BEGIN
    cli.app(prog_name="python -m bench.gpu")


if __name__ == "__main__":
    main()
