"""Everything on one GPU: conformance first, then ops against floors, then whole steps.

    python -m bench.gpu                    everything, in nine minutes
    python -m bench.gpu --budget 240       as much as fits
    python -m bench.gpu --dry-run          what would be done, and by which plans; needs no GPU

1. The conformance suite on the device. Where it fails there are no numbers.
2. Floors measured in this run: copy bandwidth, cuBLAS in bf16, the bare generator.
3. Every op against its floor, the larger of bytes over bandwidth and noise over the generator's
   rate (a product: or FLOPs over cuBLAS's rate).
4. Whole steps in bf16 with random weights: ours, as they are and as a CUDA graph, MeZO's loop (the
   better of two spellings) and two plain forwards (inference mode, eager and as a graph), and the
   peak of the allocator against a plain forward of the stacked batch.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import zokernels as zo
from bench import harness, models, plots
from bench.peers.mezo import VARIANTS, MeZOLoop
from bench.step import parse_size
from zokernels.planner import plan_linear
from zokernels.triton import devices

MODELS = "opt-125m,opt-1.3b,llama-3.2-1b,opt-6.7b,opt-13b"
SIZES = "1x32,1x256,16x64,16x256"
FORWARDS, FORWARDS_GRAPH = "two forwards", "two forwards, graph"
STEP, STEP_GRAPH = "step", "step, graph"
MEZO = tuple(f"mezo {v}" for v in VARIANTS)
OP_KEY = ("op", "dtype", "distribution", "shape")
STEP_KEY = ("model", "batch", "length", "case")
# Share of the budget: conformance and floors, ops, steps.
SHARES = (0.2, 0.2, 0.6)

console = Console(width=150)


@dataclass(frozen=True)
class Floors:
    """Rates measured in this run: bytes, FLOP (bf16) and values of noise a second."""

    bandwidth: float
    flops: float
    noise: dict[str, float]

    def seconds(
        self, *, moved: float = 0, flops: float = 0, noise: float = 0, distribution: str = ""
    ) -> float:
        """The least time of an op: the largest of its three."""
        drawn = noise / self.noise[distribution] if noise else 0.0
        return max(moved / self.bandwidth, flops / self.flops, drawn)


@dataclass(frozen=True)
class OpCase:
    """One op: what to run, and what it must move, multiply and draw."""

    op: str
    dtype: str
    distribution: str
    shape: str
    run: Callable[[], object]
    moved: float = 0
    flops: float = 0
    noise: float = 0

    def row(self, milliseconds: harness.Stat, floors: Floors) -> harness.Row:
        """The CSV row; ``of_floor`` is the floor's share of the measured time."""
        least = floors.seconds(
            moved=self.moved,
            flops=self.flops,
            noise=self.noise,
            distribution=self.distribution,
        )
        seconds = milliseconds.median / 1e3
        return {
            "op": self.op,
            "dtype": self.dtype,
            "distribution": self.distribution,
            "shape": self.shape,
            "ms": round(milliseconds.median, 4),
            "ms_p20": round(milliseconds.low, 4),
            "ms_p80": round(milliseconds.high, 4),
            "floor_ms": round(least * 1e3, 4),
            "of_floor": round(least / seconds, 3),
            "of_bandwidth": round(self.moved / floors.bandwidth / seconds, 3),
            "of_generator": (
                round(self.noise / floors.noise[self.distribution] / seconds, 3)
                if self.noise
                else ""
            ),
        }


def on_device(fn: Callable[[], object], *, seconds: float = 0.3, least: int = 5) -> harness.Stat:
    """Milliseconds of ``fn`` on the device, by events; median and spread over repetitions."""
    for _ in range(2):
        fn()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return harness.Stat.of(times)


def measure_floors(device: str) -> Floors:
    """Copy, multiply and draw: sizes several times the second-level cache."""
    from bench import generator

    def copy() -> harness.Stat:
        source = torch.empty(1 << 30, dtype=torch.int8, device=device).random_()
        target = torch.empty_like(source)
        return on_device(lambda: target.copy_(source))

    def product() -> harness.Stat:
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        return on_device(lambda: a @ b)

    bandwidth = 2 * (1 << 30) / (copy().median / 1e3)
    flops = 2 * 8192**3 / (product().median / 1e3)
    noise = {}
    for distribution in zo.noise.DISTRIBUTIONS:
        run, count = generator.drawing(1 << 32, distribution, device)
        noise[distribution] = count / (on_device(run).median / 1e3)
    return Floors(bandwidth, flops, noise)


def op_cases(device: str) -> list[OpCase]:
    """Every op at sizes that fill the GPU, most wanted first."""
    ops = torch.ops.zokernels
    seeds = torch.arange(64, device=device)
    coeffs = torch.full((64,), 1e-6, device=device)
    table = torch.tensor([[1e-3], [-1e-3]], device=device)
    found: list[OpCase] = []
    gaussian, rademacher = zo.noise.DISTRIBUTIONS

    def weight(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, cols, device=device, dtype=dtype) * 0.02

    for kind, distribution in (
        ("bf16", gaussian),
        ("bf16", rademacher),
        ("fp32", gaussian),
        ("fp32", rademacher),
    ):
        dtype = models.DTYPES[kind]
        w = weight(1 << 16, 4096, dtype)
        n, size = w.numel(), w.element_size()

        def update(w: Tensor, terms: int, distribution: str) -> Callable[[], object]:
            return lambda: ops.update_(
                [w],
                *(seeds[:terms], coeffs[:terms], None, None, [1], [], []),
                *(distribution, "stochastic"),
            )

        found.append(
            OpCase(
                *("update_", kind, distribution, "65536x4096"),
                update(w, 1, distribution),
                moved=2 * n * size,
                noise=n,
            )
        )
        part = w[: 1 << 13]
        found.append(
            OpCase(
                *("update_, 64 seeds", kind, distribution, "8192x4096"),
                update(part, 64, distribution),
                moved=2 * part.numel() * size,
                noise=64 * part.numel(),
            )
        )
        found.append(
            OpCase(
                *("displace, 2 branches", kind, distribution, "8192x4096"),
                lambda part=part, distribution=distribution: ops.displace(
                    *(part, seeds[:1], table, 1, 0, 0, distribution, "nearest", None)
                ),
                moved=3 * part.numel() * size,
                noise=part.numel(),
            )
        )
        found.append(
            OpCase(
                *("project, 4 seeds", kind, distribution, "8192x4096"),
                lambda part=part, distribution=distribution: ops.project(
                    *([part], seeds[:4], [1], [], [], distribution)
                ),
                moved=part.numel() * size,
                noise=4 * part.numel(),
            )
        )
    for distribution, tokens, (rows, cols) in itertools.product(
        (gaussian, rademacher),
        (32, 256, 1024, 4096),
        ((2048, 2048), (8192, 2048), (5120, 20480)),
    ):
        w = weight(rows, cols, torch.bfloat16)
        x = torch.randn(2, tokens, cols, device=device, dtype=torch.bfloat16)
        found.append(
            OpCase(
                *("linear, 2 branches", "bf16", distribution, f"{tokens}x{cols}x{rows}"),
                lambda x=x, w=w, distribution=distribution: ops.linear(
                    *(x, w, None, seeds[:1], table, 1, 0, 0, distribution, False, False)
                ),
                moved=2 * (w.numel() + x.numel() + 2 * tokens * rows),
                flops=2 * 2 * tokens * w.numel(),
                noise=w.numel(),
            )
        )
    head = weight(50272, 2048, torch.bfloat16)
    for tokens in (32, 1024):
        x = torch.randn(2, tokens, 2048, device=device, dtype=torch.bfloat16)
        targets = torch.randint(0, 50272, (tokens,), device=device)
        found.append(
            OpCase(
                *("linear_cross_entropy", "bf16", gaussian, f"{tokens}x2048x50272"),
                lambda x=x, targets=targets: ops.linear_cross_entropy(
                    *(x, head, None, targets, seeds[:1], table, 1, 0, 0, gaussian, False, -100)
                ),
                moved=2 * (head.numel() + x.numel()),
                flops=2 * 2 * tokens * head.numel(),
                noise=head.numel(),
            )
        )
    ids = torch.randint(0, 50272, (4096,), device=device)
    found.append(
        OpCase(
            *("embedding, 2 branches", "bf16", gaussian, "4096 of 50272x2048"),
            lambda: ops.embedding(ids, head, seeds[:1], table, 1, 0, 0, gaussian, True),
            moved=3 * 2 * 4096 * 2048,
            noise=4096 * 2048,
        )
    )
    return found


def built(name: str, device: str) -> PreTrainedModel:
    """Random weights, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(models.config(name), dtype=torch.bfloat16)
    return model.eval()


def graph_of(run: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of ``run``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def step_cases(model: PreTrainedModel, batch: models.Batch) -> dict[str, Callable[[], object]]:
    """Name -> one step, or two forwards."""
    optimizer = zo.MeZO(model, lr=1e-9, eps=1e-3)
    graphed = zo.MeZO(model, lr=1e-9, eps=1e-3, seed=1)
    step = zo.GraphedStep(graphed, batch)

    def forwards() -> None:
        with torch.no_grad():
            model(**batch)
            model(**batch)

    def plain() -> None:
        with torch.inference_mode():
            model(**batch)
            model(**batch)

    cases: dict[str, Callable[[], object]] = {
        FORWARDS: plain,
        FORWARDS_GRAPH: graph_of(forwards),
        STEP: lambda: optimizer.step(batch),
        STEP_GRAPH: lambda: step(batch),
    }
    seeds = itertools.count(1)
    for variant in VARIANTS:
        loop = MeZOLoop(model, lr=1e-9, eps=1e-3, variant=variant)
        cases[f"mezo {variant}"] = lambda loop=loop: loop.step(
            lambda: model(**batch).loss, next(seeds)
        )
    return cases


def peaks(model: PreTrainedModel, batch: models.Batch) -> dict[str, int]:
    """Peak bytes of the allocator above what was allocated before."""

    def peak(run: Callable[[], object]) -> int:
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    stacked = {k: torch.cat([v, v]) for k, v in batch.items()}
    optimizer = zo.MeZO(model, lr=1e-9, eps=1e-3)
    ours = peak(lambda: optimizer.step(batch))
    with torch.inference_mode():
        return {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            STEP: ours,
            "stacked forward": peak(lambda: model(**stacked)),
            "forward": peak(lambda: model(**batch)),
        }


def step_rows(
    base: harness.Row, timings: harness.Timings, memory: dict[str, int]
) -> list[harness.Row]:
    """One row a case: milliseconds, speed-up over the better MeZO, cost in two forwards."""
    best = timings.fastest(n for n in timings.seconds if n in MEZO)
    rows = []
    for name in timings.seconds:
        time_of = timings.stat(name)
        reference = FORWARDS_GRAPH if name in (STEP_GRAPH, FORWARDS_GRAPH) else FORWARDS
        rows.append(
            {
                **base,
                "case": name,
                "ms": round(time_of.median * 1e3, 3),
                "ms_p20": round(time_of.low * 1e3, 3),
                "ms_p80": round(time_of.high * 1e3, 3),
                "rounds": time_of.rounds,
                "speedup": round(timings.ratio(best, name).median, 3),
                "vs_two_forwards": round(timings.ratio(name, reference).median, 3),
                "against": reference,
                "best_mezo": best,
                "peak_mib": (
                    round((memory["weights"] + memory[STEP]) / 2**20, 1) if name == STEP else ""
                ),
                "peak_vs_stacked_forward": (
                    round(
                        (memory["weights"] + memory[STEP])
                        / (memory["weights"] + memory["stacked forward"]),
                        4,
                    )
                    if name == STEP
                    else ""
                ),
            }
        )
    return rows


def weights_of(name: str) -> int:
    """Bytes of a model's weights in bf16, without making it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config(name), dtype=torch.bfloat16)
    return sum(p.numel() * 2 for p in model.parameters())


def describe(name: str, size: tuple[int, int], architecture: str) -> str:
    """The plans of a model's layers for a batch, by the planner's model."""
    config = models.config(name)
    hidden = config.hidden_size
    wide = getattr(config, "ffn_dim", None) or config.intermediate_size
    tokens = math.prod(size)
    parts = []
    for rows, cols in ((hidden, hidden), (wide, hidden), (hidden, wide)):
        found = plan_linear(rows, cols, tokens=tokens, dtype=torch.bfloat16, device=architecture)
        parts.append(f"{rows}x{cols} {found.kind} {(found.seconds or 0) * 1e6:.0f} us")
    return ", ".join(parts)


def conformance(limit: float) -> bool:
    """The conformance suite with the Triton backend on the device; prints what pytest says."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "tests/test_conformance.py"],
        cwd=harness.ROOT,
        env={**os.environ, "ZOKERNELS_TEST_REQUIRE": "reference,triton"},
        timeout=max(limit, 60),
        check=False,
    )
    return done.returncode == 0


def show(title: str, rows: list[harness.Row], columns: list[str]) -> None:
    """Print rows as a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column not in ("op", "case") else "left")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)


def plot_ops(path: Path) -> None:
    """Share of the floor, by op."""
    rows = harness.read_rows(path)
    labels = list(dict.fromkeys(f"{r['op']} {r['dtype']}\n{r['shape']}" for r in rows))
    figure, (ax,) = plots.panels(1, width=2 + 0.9 * len(labels))
    value = {
        (f"{r['op']} {r['dtype']}\n{r['shape']}", r["distribution"]): float(r["of_floor"])
        for r in rows
    }
    series = {
        d: [value.get((label, d), float("nan")) for label in labels] for d in zo.noise.DISTRIBUTIONS
    }
    plots.grouped_bars(ax, labels, series, fmt="{:.2f}")
    ax.tick_params(axis="x", labelsize=5)
    ax.set_ylabel("floor / measured time")
    ax.legend(fontsize=7)
    plots.save(figure, path)


def plot_steps(path: Path) -> None:
    """A step in two plain forwards, and its speed-up over MeZO's loop."""
    rows = harness.read_rows(path)
    labels = list(dict.fromkeys(f"{r['model']}\n{r['batch']}x{r['length']}" for r in rows))
    figure, axes = plots.panels(2, columns=1, width=2 + 0.8 * len(labels))
    for ax, column, title in (
        (axes[0], "vs_two_forwards", "step / two plain forwards"),
        (axes[1], "speedup", "x faster than MeZO's loop"),
    ):
        value = {
            (f"{r['model']}\n{r['batch']}x{r['length']}", r["case"]): float(r[column]) for r in rows
        }
        series = {
            c: [value.get((label, c), float("nan")) for label in labels] for c in (STEP, STEP_GRAPH)
        }
        plots.grouped_bars(ax, labels, series, fmt="{:.2f}")
        ax.axhline(1, color="#999999", linewidth=0.8)
        ax.tick_params(axis="x", labelsize=6)
        ax.set_ylabel(title, fontsize=8)
    axes[0].legend(fontsize=7)
    plots.save(figure, path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Shapes, comma separated.")] = MODELS,
    size: Annotated[str, typer.Option(help="BATCHxLENGTH.")] = SIZES,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 540.0,
    rounds: Annotated[int, typer.Option(help="Most rounds of a step.")] = 7,
    steps_only: Annotated[bool, typer.Option(help="Leave out floors and ops.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done; needs no GPU.")] = False,
    architecture: Annotated[str, typer.Option(help="For the plans of a dry run.")] = "sm_90",
    device: Annotated[str, typer.Option()] = "cuda",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Conformance, floors, ops and steps on a CUDA device."""
    if budget <= 0:
        raise typer.BadParameter(f"budget must be positive; got {budget}")
    names = harness.listed(model)
    try:
        devices.architecture(architecture)
        sizes = [parse_size(text) for text in harness.listed(size)]
        todo = [(name, weights_of(name), one) for name in names for one in sizes]
        described = [describe(name, one, architecture) for name, _, one in todo]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if dry_run:
        console.print(f"{budget:.0f} s: conformance and floors up to {budget * SHARES[0]:.0f} s,")
        console.print(f"ops {budget * SHARES[1]:.0f} s, steps {budget * SHARES[2]:.0f} s:")
        for (name, held, (b, t)), plans in zip(todo, described, strict=True):
            console.print(f"  {name} {b}x{t}, weights {held / 2**30:.1f} GiB; {plans}")
        console.print(f"plans and times by the model for {architecture}, not measured")
        return
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        console.print(
            "bench.gpu needs a CUDA device and a torch built for it; there is none here. "
            "--dry-run says what it would do."
        )
        raise typer.Exit(2)
    begin = time.perf_counter()

    def spent() -> float:
        return time.perf_counter() - begin

    backend = str(harness.environment(device)["backend"])
    console.print(f"{harness.device_name(device)}, backend {backend}")
    if not conformance(budget * SHARES[0]):
        console.print("[red]the conformance suite fails on this device: no numbers")
        raise typer.Exit(1)
    paths = [] if steps_only else [measure_ops(device, results, spent, budget)]
    paths += measure_steps(todo, device, results, rounds, spent, budget)
    console.print("results: " + ", ".join(map(str, paths)))


def measure_ops(
    device: str, results: Path | None, spent: Callable[[], float], budget: float
) -> Path:
    """Floors and ops; returns the CSV."""
    floors = measure_floors(device)
    console.print(
        f"copy {floors.bandwidth / 1e12:.2f} TB/s, bf16 {floors.flops / 1e12:.0f} TFLOP/s, "
        + ", ".join(f"{d} {r / 1e9:.0f} G/s" for d, r in floors.noise.items())
    )
    rows: list[harness.Row] = []
    skipped = []
    for case in op_cases(device):
        if spent() > budget * (SHARES[0] + SHARES[1]):
            skipped.append(f"{case.op} {case.shape}")
            continue
        rows.append(case.row(on_device(case.run), floors))
    if skipped:
        console.print(f"[yellow]left out for the budget: {', '.join(skipped)}")
    show("ops", rows, [*OP_KEY, "ms", "floor_ms", "of_floor", "of_bandwidth", "of_generator"])
    notes: harness.Row = {
        "bandwidth": floors.bandwidth,
        "flops": floors.flops,
        "noise": floors.noise,
        "left_out": skipped,
    }
    path = harness.record("gpu_ops", rows, key=OP_KEY, device=device, results=results, notes=notes)
    plot_ops(path)
    torch.cuda.empty_cache()
    return path


def measure_steps(
    todo: list[tuple[str, int, tuple[int, int]]],
    device: str,
    results: Path | None,
    rounds: int,
    spent: Callable[[], float],
    budget: float,
) -> list[Path]:
    """Whole steps; returns the CSV, if there is one."""
    rows: list[harness.Row] = []
    left_out = []
    held: tuple[str, PreTrainedModel] | None = None
    for i, (name, weights, (b, t)) in enumerate(todo):
        label = f"{name} {b}x{t}"
        free = torch.cuda.mem_get_info()[0] + (weights if held and held[0] == name else 0)
        remaining = budget - spent()
        if remaining < 5 or free < 1.2 * weights:
            left_out.append(f"{label} ({'memory' if remaining >= 5 else 'budget'})")
            continue
        if held is None or held[0] != name:
            held = None
            torch.cuda.empty_cache()
            held = name, built(name, device)
        try:
            batch = models.random_batch(held[1], b, t)
            memory = peaks(held[1], batch)
            timings = harness.interleave(
                step_cases(held[1], batch),
                rounds=rounds,
                min_rounds=2,
                budget=remaining / (len(todo) - i),
                sync=torch.cuda.synchronize,
            )
        except torch.OutOfMemoryError:
            left_out.append(f"{label} (memory)")
            torch.cuda.empty_cache()
            continue
        base: harness.Row = {"model": name, "dtype": "bf16", "batch": b, "length": t}
        fresh = step_rows(base, timings, memory)
        show(label, fresh, ["case", "ms", "speedup", "vs_two_forwards", "peak_vs_stacked_forward"])
        rows += fresh
    if left_out:
        console.print(f"[yellow]left out: {', '.join(left_out)}")
    if not rows:
        return []
    notes: harness.Row = {"left_out": left_out}
    path = harness.record(
        "gpu_steps", rows, key=STEP_KEY, device=device, results=results, notes=notes
    )
    plot_steps(path)
    return [path]


if __name__ == "__main__":
    app()
