"""``python -m bench``: what there is to run."""

from pathlib import Path

print((Path(__file__).parent / "README.md").read_text())
