"""Interleaved timing, the environment record, and the keyed CSV files every benchmark writes.

Method: all callables of a comparison run in one process, round robin, and the order rotates by
one every round, so that a machine that gets slower or busier for a while does so for all of them.
A ratio is taken inside each round; what is reported is the median over rounds, with the 20th and
80th percentile as spread.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, object]


@dataclass(frozen=True)
class Stat:
    """Median and spread (20th and 80th percentile) over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        """Statistics of one value a round.

        Raises:
            ValueError: no values.
        """
        if not len(values):
            raise ValueError("values must hold at least one measurement; got none")
        low, mid, high = np.percentile(np.asarray(values, dtype=np.float64), [20, 50, 80])
        return cls(float(mid), float(low), float(high), len(values))


@dataclass(frozen=True)
class Timings:
    """Seconds of every case in every round, ``seconds[case][round]``."""

    seconds: Mapping[str, Sequence[float]]

    def stat(self, case: str) -> Stat:
        """Seconds of one case."""
        return Stat.of(self.seconds[case])

    def ratio(self, numerator: str, denominator: str) -> Stat:
        """``seconds[numerator] / seconds[denominator]``, taken inside each round."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return Stat.of([a / b for a, b in pairs])

    def fastest(self, cases: Iterable[str]) -> str:
        """The case with the smallest median."""
        return min(cases, key=lambda case: self.stat(case).median)


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    min_rounds: int = 2,
    warmup: int | Mapping[str, int] = 1,
    budget: float | None = None,
    chunk: float = 0.3,
    max_repeats: int = 10,
    sync: Callable[[], object] | None = None,
    after: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time several callables round robin.

    A fast callable runs several times in a row inside a round, for about ``chunk`` seconds; its
    value for the round is the median of those.

    Args:
        cases: name -> callable.
        rounds: rounds to run.
        min_rounds: rounds to run even when the budget is spent.
        warmup: untimed calls of every case before the first round, or of each case by name.
        budget: seconds after which no new round starts; None for no limit. Warm-up counts.
        chunk: seconds a fast case fills inside a round.
        max_repeats: most calls of one case inside a round.
        sync: waits for the device, called before every reading of the clock.
        after: untimed work after every call of a case, by its name.
        clock: seconds; tests pass their own.

    Raises:
        ValueError: no case, or rounds or min_rounds out of range.
    """
    if not cases:
        raise ValueError("cases must hold at least one callable; got none")
    if not 1 <= min_rounds <= rounds:
        raise ValueError(
            f"min_rounds must be in [1, rounds]; got min_rounds={min_rounds}, rounds={rounds}"
        )

    undo = after or {}

    def once(name: str) -> float:
        if sync:
            sync()
        start = clock()
        cases[name]()
        if sync:
            sync()
        seconds = clock() - start
        if name in undo:
            undo[name]()
        return seconds

    begin = clock()
    repeats = dict.fromkeys(cases, 1)
    for name in cases:
        calls = warmup if isinstance(warmup, int) else warmup.get(name, 1)
        for _ in range(calls):
            last = once(name)
            repeats[name] = min(max_repeats, max(1, int(chunk / max(last, 1e-9))))

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            if r >= min_rounds and budget is not None and clock() - begin >= budget:
                break
            shift = r % len(names)
            for name in names[shift:] + names[:shift]:
                values = [once(name) for _ in range(repeats[name])]
                seconds[name].append(float(np.median(values)))
    finally:
        if collecting:
            gc.enable()
    return Timings(seconds)


def listed(text: str) -> list[str]:
    """The entries of a comma separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_size(text: str) -> tuple[int, int]:
    """``"8x64"`` -> (8, 64).

    Raises:
        ValueError: not of that form.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"size must be BATCHxLENGTH, such as 8x64; got {text!r}")
    return int(parts[0]), int(parts[1])


def sync_for(device: str) -> Callable[[], object] | None:
    """What waits for a device's queued work."""
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else None


def device_name(device: str = "cpu") -> str:
    """Marketing name of a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_slug(device: str = "cpu") -> str:
    """Folder name of a device: its name, and for a CPU the number of cores."""
    name = device_name(device)
    if torch.device(device).type == "cpu":
        name = f"{name} {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many torch threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """Short commit of the package; ``+`` marks uncommitted changes to code that is measured.

    A checkout without its history is told by ``ZOKERNELS_COMMIT``.
    """
    given = os.environ.get("ZOKERNELS_COMMIT")
    if given:
        return given
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain", "--", "zokernels", "csrc") else "")


def environment(device: str = "cpu") -> Row:
    """What a number depends on besides the code: machine, threads, versions, load."""
    import transformers

    import zokernels
    from zokernels import _registry, noise

    return {
        "device": device_name(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "load_1min": round(os.getloadavg()[0], 2),
        "utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zokernels": zokernels.__version__,
        "contract": noise.CONTRACT_VERSION,
        "backend": _registry.serving("linear", torch.device(device).type),
        "commit": commit(),
    }


# The part of the environment that stands in every row; the rest is in the JSON beside the CSV.
_ROW_ENVIRONMENT = (
    "device",
    "threads",
    "torch",
    "backend",
    "commit",
    "load_1min",
    "utc",
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a results file; empty when there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Row], *, key: Sequence[str]) -> None:
    """Write rows, replacing those of the file that agree in ``key``.

    A subset can so be measured again without losing the rest.

    Raises:
        ValueError: a row lacks a key column.
    """
    merged: dict[tuple[str, ...], Mapping[str, object]] = {}
    for row in [*read_rows(path), *rows]:
        missing = [column for column in key if column not in row]
        if missing:
            raise ValueError(f"rows must have the key columns {list(key)}; missing {missing}")
        merged[tuple(str(row[column]) for column in key)] = row
    columns = list(dict.fromkeys(column for row in merged.values() for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())


def record(
    name: str,
    rows: Iterable[Row],
    *,
    key: Sequence[str],
    device: str = "cpu",
    results: Path | None = None,
    notes: Row | None = None,
) -> Path:
    """Store a benchmark's rows in ``results/<device>/<name>.csv`` and its environment beside them.

    Args:
        name: benchmark, the file's stem.
        rows: measurements; a few environment columns are added to each, unless it has its own.
        key: columns that identify a row.
        device: torch device measured.
        results: folder instead of ``bench/results``.
        notes: further entries of the JSON (options used, peers left out and why).

    Returns:
        The CSV's path.
    """
    env = environment(device)
    path = (results or RESULTS) / device_slug(device) / f"{name}.csv"
    stamp = {column: env[column] for column in _ROW_ENVIRONMENT}
    write_rows(path, [{**row, **stamp, **row} for row in rows], key=key)
    path.with_suffix(".json").write_text(json.dumps({**env, **(notes or {})}, indent=2) + "\n")
    return path
