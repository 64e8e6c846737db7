"""Records of a file, a folder or a hub data set."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from zokernels.finetune.config import UserError
from zokernels.finetune.data import SUFFIXES, read

Record = dict[str, Any]

TRAIN, HELD_OUT = ("train",), ("validation", "dev", "eval", "test")


def read_records(
    source: str,
    *,
    option: str = "--data",
    known: Collection[str] = (),
    columns: Sequence[str] = (),
) -> list[Record]:
    """Records of one file or hub data set ``name[:config][@split]``.

    A ``.tsv`` file is split at tabs and nothing else (GLUE does not quote). It needs no header:
    when no ``known`` column name stands in its first line, its columns are ``columns``.

    Args:
        source: the file or name.
        option: what error messages call the source.
        known: column names that make a first line a header.
        columns: names of the columns of a file without header.

    Raises:
        UserError: there is no such file or data set, it is empty, or a row is malformed; the
            message names the row.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".tsv" and path.is_file():
        records = _tsv(path, option, known, columns)
    elif "@" in source and not path.exists():
        records = _hub(source, option)
    else:
        records = read(source, option)
    if not records:
        raise UserError(f"{option}: {source} holds no example")
    return records


def find(source: str, eval_source: str | None) -> tuple[str, str | None]:
    """Training and held-out source: a folder is searched for ``train.*`` and ``validation.*``,
    ``dev.*``, ``eval.*`` or ``test.*``; a folder with a single file is that file.

    Raises:
        UserError: a folder without a file to train on, or with two.
    """
    folder = Path(source).expanduser()
    saved = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if not folder.is_dir() or saved:
        return source, eval_source
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    train = [p for p in files if p.stem.lower() in TRAIN]
    if not train and len(files) == 1:
        train = files
    if len(train) != 1:
        raise UserError(
            f"--data: {folder} must hold one train file ({', '.join(SUFFIXES)}) or "
            f"a single file; it holds {', '.join(p.name for p in files) or 'none'}"
        )
    if eval_source is None:
        order = {name: at for at, name in enumerate(HELD_OUT)}
        known = [p for p in files if p.stem.lower() in order]
        held = sorted(known, key=lambda p: order[p.stem.lower()])
        eval_source = str(held[0]) if held else None
    return str(train[0]), eval_source


def _tsv(path: Path, option: str, known: Collection[str], columns: Sequence[str]) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path} is not UTF-8 text: {error}") from error
    table = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line]
    if not table:
        raise UserError(f"{option}: {path} is empty")
    header = [cell.strip() for cell in table[0][1]]
    if any(cell in known for cell in header):
        del table[0]
    elif len(header) == len(columns):
        header = list(columns)
    elif columns or known:
        raise UserError(
            f"{option}: the first line of {path} names none of the columns "
            f"{', '.join(sorted(known))}; got {header[:5]}"
        )
    else:
        del table[0]
    for number, row in table:
        if len(row) != len(header):
            raise UserError(
                f"{option}: {path} line {number} has {len(row)} columns; expected {len(header)}"
            )
    return [dict(zip(header, row, strict=True)) for _, row in table]


def _hub(source: str, option: str) -> list[Record]:
    name, _, split = source.rpartition("@")
    name, _, config = name.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{option} {source} needs: pip install datasets") from error
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{option}: {source} cannot be loaded: {reason}") from error
    return [dict(row) for row in loaded]
