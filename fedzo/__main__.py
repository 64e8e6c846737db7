"""``python -m fedzo``."""

from fedzo.cli import main

main()
