"""What a run leaves on disk: JSON lines, a CSV table, TensorBoard events."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zokernels._files import write_atomically
from zokernels.finetune.config import UserError

LINES, TABLE, EVENTS = "metrics.jsonl", "metrics.csv", "tensorboard"

# One number a round; the JSON lines hold what has a value per client as well.
COLUMNS = (
    "round",
    "phase",
    "loss",
    "eval_loss",
    "accuracy",
    "perplexity",
    "invited",
    "accepted",
    "dropped",
    "late",
    "rejected",
    "flagged",
    "scalar_std",
    "bytes_up",
    "bytes_down",
    "total_up",
    "total_down",
    "seconds",
    "total_seconds",
    "memory",
)

Row = dict[str, Any]


class Metrics:
    """Writes a row a round into a folder, each one at once.

    Args:
        folder: created where it is missing.
        upto: rows of later rounds are removed first: a resumed run makes them again.
        tensorboard: also write TensorBoard events.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, upto: int = -1, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read(folder) if row["round"] <= upto]
        self._writer: Any = _summary_writer(folder / EVENTS, upto) if tensorboard else None
        self._lines = _rewritten(folder / LINES, (json.dumps(_plain(r)) for r in self.rows))
        self._table = _rewritten(folder / TABLE, [])
        self._csv = csv.DictWriter(self._table, COLUMNS, extrasaction="ignore", lineterminator="\n")
        self._csv.writeheader()
        self._csv.writerows(map(flat, self.rows))

    def write(self, row: Row) -> None:
        """Add a row: what :func:`row_of` makes."""
        self.rows.append(row)
        self._lines.write(json.dumps(_plain(row)) + "\n")
        self._lines.flush()
        self._csv.writerow(flat(row))
        self._table.flush()
        if self._writer is not None:
            self._events(row)

    def _events(self, row: Row) -> None:
        step = row["round"]
        numbers = {
            name: value
            for name, value in flat(row).items()
            if name != "round" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, value in numbers.items():
            self._writer.add_scalar(f"{row['phase']}/{name}", value, step)
        for name in ("losses", "lrs"):
            for client, value in (row.get(name) or {}).items():
                if math.isfinite(value):
                    self._writer.add_scalar(f"client {client}/{name[:-1]}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        self._table.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read(folder: Path) -> list[Row]:
    """The rows of a folder; a line that a kill cut short is left out."""
    rows = []
    path = folder / LINES
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("round"), int):
                rows.append(row)
    return rows


def row_of(
    record: Mapping[str, Any], before: Row | None, scores: Mapping[str, float], memory: int
) -> Row:
    """A row: a round's record, totals so far, held-out scores and memory.

    Args:
        record: :meth:`fedzo.records.RoundRecord.to_dict`.
        before: the row before, whose totals go on.
        scores: held-out numbers; empty when nothing was measured in this round.
        memory: resident bytes (or those of CUDA's allocator).
    """
    totals = {
        f"total_{short}": (before or {}).get(f"total_{short}", 0) + record[name]
        for short, name in (("up", "bytes_up"), ("down", "bytes_down"), ("seconds", "seconds"))
    }
    losses = [x for x in record["losses"].values() if math.isfinite(x)]
    row = {**record, **totals, "memory": memory}
    row["loss"] = math.fsum(losses) / len(losses) if losses else math.nan
    row["scalar_std"] = record["scalars"]["std"]
    for name, value in scores.items():
        row["eval_loss" if name == "loss" else name] = value
    return row


def flat(row: Mapping[str, Any]) -> Row:
    """One value a column: counts for lists and tables of clients, empty for what is missing."""
    values: Row = {}
    for name in COLUMNS:
        value = row.get(name)
        if isinstance(value, list | tuple | dict):
            value = len(value)
        values[name] = "" if value is None or value != value else value
    return values


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rewritten(path: Path, lines: Iterable[str]) -> Any:
    """A file with these lines, open at its end; the old one stays until the new one is whole."""
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
    return path.open("a", encoding="utf-8", newline="")


def _summary_writer(folder: Path, upto: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=upto + 1 if upto >= 0 else None)
