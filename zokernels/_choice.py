"""Which backend serves an op ahead of the registry's order: measurements, as data.

``backends.json`` beside this module maps an architecture to ops and the backend that was measured
faster for each, ``{"sm_90": {"linear": "cuda"}}``. ``python -m bench.gpu --write-choice`` writes
it; an op that is not in it, or whose backend is off, is served in the registry's order.

``ZOKERNELS_CHOICE`` overrides entries, on every architecture: ``"linear=cuda,project=triton"``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

FILE = Path(__file__).resolve().with_name("backends.json")
VARIABLE = "ZOKERNELS_CHOICE"

# Architecture -> op -> backend.
Table = dict[str, dict[str, str]]


def _entry(where: str, op: str, name: object, ops: Collection[str], names: Collection[str]) -> str:
    if op not in ops:
        raise ValueError(f"{where}: op must be one of {sorted(ops)}; got {op!r}")
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{where}: backend of {op!r} must be one of {sorted(names)}; got {name!r}")
    return name


def parse(text: str, where: str, *, ops: Collection[str], names: Collection[str]) -> Table:
    """The table in a JSON text.

    Args:
        text: an object of objects, architecture -> op -> backend.
        where: what errors call it.
        ops, names: the ops and backends there are.

    Raises:
        ValueError: not JSON, not of that form, or an unknown architecture name, op or backend.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} must be an object of architectures; got {found!r}")
    for architecture, entries in found.items():
        if not re.fullmatch(r"sm_\d+", architecture):
            raise ValueError(
                f"{where}: architecture must have the form sm_90; got {architecture!r}"
            )
        if not isinstance(entries, Mapping):
            raise ValueError(f"{where}: {architecture} must be an object of ops; got {entries!r}")
        for op, name in entries.items():
            _entry(f"{where}, {architecture}", op, name, ops, names)
    return {architecture: dict(entries) for architecture, entries in found.items()}


def read(path: Path, *, ops: Collection[str], names: Collection[str]) -> Table:
    """The table in a file; see :func:`parse`.

    Raises:
        ValueError: the file does not exist, or as in :func:`parse`.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return parse(text, str(path), ops=ops, names=names)


def write(path: Path, table: Table) -> None:
    """Write a table, sorted, without architectures that have no entry."""
    kept = {a: dict(sorted(entries.items())) for a, entries in sorted(table.items()) if entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n")


def overrides(*, ops: Collection[str], names: Collection[str]) -> dict[str, str]:
    """The entries of ``ZOKERNELS_CHOICE``.

    Raises:
        ValueError: not of the form ``op=backend,...``, or an unknown op or backend.
    """
    found = {}
    for entry in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        op, equals, name = entry.partition("=")
        if not equals:
            raise ValueError(f"{VARIABLE} must be entries op=backend; got {entry!r}")
        found[op.strip()] = _entry(VARIABLE, op.strip(), name.strip(), ops, names)
    return found
