"""A federation of kinds of text: records with a text and the kind it is, for ``natural:kind``.

::

    python -m bench.fed.mixture --out DATA --per-kind 400 \
        plays=shakespeare.txt news=ag_news.tsv:text maths=gsm8k.jsonl:question,answer

A source is ``KIND=FILE[:COLUMN,COLUMN]``; a text file gives a record for every block of lines.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from fedzo.data.sources import read_records


def texts(path: str, columns: list[str]) -> list[str]:
    """The records of a file, the columns joined by line ends."""
    records = read_records(path, known=columns, columns=[*columns, "label"])
    return ["\n".join(str(record[column]) for column in columns) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="KIND=FILE[:COLUMNS]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-kind", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=80, help="per kind")
    parser.add_argument("--least", type=int, default=60, help="characters")
    args = parser.parse_args()
    parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for source in args.sources:
        kind, _, rest = source.partition("=")
        path, _, columns = rest.partition(":")
        found = [t for t in texts(path, (columns or "text").split(",")) if len(t) >= args.least]
        random.Random(0).shuffle(found)
        rows = [{"text": text, "kind": kind} for text in found]
        parts["test"] += rows[: args.held_out]
        parts["train"] += rows[args.held_out : args.held_out + args.per_kind]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
