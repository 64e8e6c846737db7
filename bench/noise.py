"""The bare generator of the C++ backend: values drawn in registers, nothing loaded or stored.

    python -m bench.noise
    python -m bench.noise --elements 124e6 --draws 2 --step-ms 600

This is the floor under every op: no kernel can displace, update or project faster than it draws.
One row per distribution, instruction set and number of threads, and ``torch.normal`` beside them,
which is what a step without a generator of its own would call. ``rate`` is 1e9 values a second
over all threads; ``per_thread`` the same for one. Busy machines give low numbers: the load stands
in every row, and ``cpu_rate`` counts only the time a thread ran (one thread).

With ``--elements`` (parameters) the time to draw them ``--draws`` times (a step draws each twice:
probes and update) is listed, and with ``--step-ms`` its share of a measured step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import harness
from zokernels import cpp, noise

KEY = ("distribution", "isa", "threads")
TORCH = "torch.normal"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def groups_for(isa: str, distribution: str) -> int:
    """Groups of 256 values a call draws: a few milliseconds on any of them."""
    base = 1 << (10 if isa == "portable" else 15)
    return base * (4 if distribution == "rademacher" else 1)


def drawing(
    pool: ThreadPoolExecutor, isa: str, distribution: str, threads: int, groups: int
) -> Callable[[], object]:
    """A callable that draws ``256 * groups`` values on each of ``threads`` threads."""

    def one(seed: int) -> float:
        return cpp.generate(distribution, seed, groups)

    def run() -> object:
        cpp.use_instruction_set(isa)
        return one(0) if threads == 1 else list(pool.map(one, range(threads)))

    return run


def measure(
    distributions: list[str], isas: list[str], threads: list[int], rounds: int
) -> list[harness.Row]:
    """Rates of every combination, interleaved.

    Raises:
        ValueError: an instruction set or distribution is unknown.
        RuntimeError: an instruction set does not run here.
    """
    unknown = [d for d in distributions if d not in noise.DISTRIBUTIONS]
    if unknown:
        raise ValueError(f"distributions must be among {noise.DISTRIBUTIONS}; got {unknown}")
    before = cpp.instruction_set()
    for isa in isas:
        cpp.use_instruction_set(isa)
    cases: dict[str, Callable[[], object]] = {}
    values: dict[str, int] = {}
    of_case: dict[str, tuple[str, str, int]] = {}
    with ThreadPoolExecutor(max(threads)) as pool:
        for distribution in distributions:
            for isa in isas:
                groups = groups_for(isa, distribution)
                for count in threads:
                    name = f"{distribution} {isa} {count}"
                    cases[name] = drawing(pool, isa, distribution, count, groups)
                    values[name] = 256 * groups * count
                    of_case[name] = (distribution, isa, count)
        if "gaussian" in distributions:
            z = torch.empty(1 << 20)
            cases[TORCH] = z.normal_
            values[TORCH] = z.numel()
            of_case[TORCH] = ("gaussian", TORCH, 1)
        try:
            wall = harness.interleave(cases, rounds=rounds)
            alone = {n: c for n, c in cases.items() if of_case[n][2] == 1}
            cpu = harness.interleave(alone, rounds=rounds, clock=time.thread_time)
        finally:
            cpp.use_instruction_set(before)
    rows: list[harness.Row] = []
    for name, (distribution, isa, count) in of_case.items():
        stat = wall.stat(name)
        rate = values[name] / stat.median / 1e9
        rows.append(
            {
                "distribution": distribution,
                "isa": isa,
                "threads": count,
                "rate": round(rate, 4),
                "rate_low": round(values[name] / stat.high / 1e9, 4),
                "rate_high": round(values[name] / stat.low / 1e9, 4),
                "per_thread": round(rate / count, 4),
                "cpu_rate": round(values[name] / cpu.stat(name).median / 1e9, 4)
                if name in alone
                else "",
                "rounds": stat.rounds,
            }
        )
    return rows


@app.command()
def main(
    distributions: Annotated[str, typer.Option(help="Comma separated.")] = "gaussian,rademacher",
    isas: Annotated[
        str, typer.Option(help="Instruction sets; empty for all of this machine.")
    ] = "",
    threads: Annotated[str, typer.Option(help="Thread counts; empty for 1 and all cores.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 7,
    elements: Annotated[float, typer.Option(help="Parameters of a step; 0 for none.")] = 0.0,
    draws: Annotated[float, typer.Option(help="Times a step draws each of them.")] = 2.0,
    step_ms: Annotated[float, typer.Option(help="Measured step, for the generator's share.")] = 0.0,
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Measure the bare generator."""
    if step_ms and not elements:
        raise typer.BadParameter("--step-ms needs --elements: the share is of drawing that many")
    console = Console()
    counts = [int(t) for t in harness.listed(threads)] or sorted({1, harness.cores()})
    rows = measure(
        harness.listed(distributions),
        harness.listed(isas) or cpp.instruction_sets(),
        counts,
        rounds,
    )
    table = Table(title="bare generator, 1e9 values a second")
    shown = ["distribution", "isa", "threads", "rate", "rate_low", "rate_high", "cpu_rate"]
    for row in rows:
        if elements:
            row["elements"], row["draws"] = int(elements), draws
            row["draw_ms"] = round(elements * draws / float(str(row["rate"])) / 1e6, 3)
        if step_ms:
            row["step_ms"] = step_ms
            row["share_of_step"] = round(float(str(row["draw_ms"])) / step_ms, 4)
    shown += [c for c in ("draw_ms", "share_of_step") if c in rows[0]]
    for column in shown:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[c]) for c in shown))
    console.print(table)
    path = harness.record("noise", rows, key=KEY, results=results)
    console.print(f"results: {path}")


if __name__ == "__main__":
    app()
