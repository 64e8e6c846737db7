"""Where the time of one of our steps goes.

    python -m bench.step --breakdown --model opt-125m --dtype fp32 --size 1x64

Parts of a step, in milliseconds and as a share of it:

``weights``    the ops on displaced weights (linear, embedding, small vectors): drawing the noise,
               displacing and multiplying
``update``     the fused update
``other_ops``  attention, norms, activations, loss: all other torch operations
``python``     what no operation accounts for: module calls, dispatch, the optimizer

The op times come from one profiled step, scaled to the unprofiled median. Beside them, measured in
the same run: ``generator`` is every weight's noise drawn twice by the bare generator on all
threads, the share of the step that noise costs at the least; ``plain_products`` torch's products of
the same inputs with plain weights; ``update_traffic`` the bare read and write of all weights;
``dispatch_floor`` the whole step of a model of the same depth at width 16, and
``dispatch_forwards`` two plain forwards of that model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import zokernels as zo
from bench import harness, models
from bench.noise import drawing, groups_for
from zokernels import cpp, noise

KEY = ("model", "dtype", "batch", "length", "distribution", "part")
PARTS = ("weights", "update", "other_ops", "python")
EXTRA = (
    "generator",
    "plain_products",
    "update_traffic",
    "two_forwards",
    "dispatch_floor",
    "dispatch_forwards",
)


def linear_calls(model: nn.Module, batch: models.Batch) -> list[tuple[Tensor, Tensor]]:
    """Input and weight of every ``nn.Linear`` call of one plain forward."""
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: calls.append((args[0].clone(), m.weight)))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def products(calls: list[tuple[Tensor, Tensor]], branches: int = 2) -> Callable[[], None]:
    """The plain products of a step."""

    def run() -> None:
        with torch.inference_mode():
            for x, w in calls:
                for _ in range(branches):
                    F.linear(x, w)

    return run


def traffic(model: nn.Module) -> Callable[[], None]:
    """One read and write of every trainable weight: what no update can avoid."""
    params = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        with torch.no_grad():
            for p in params:
                p.mul_(1.0)

    return run


def annotation(event: FunctionEvent) -> bool:
    """Whether an event marks a region (``Optimizer.step``) and is no operation itself."""
    return event.is_user_annotation or event.name.startswith("Optimizer.")


def op_seconds(step: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Wall seconds of one profiled step, and those inside outermost ops by group."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
    spent = {"weights": 0.0, "update": 0.0, "other": 0.0}
    main = None
    for event in record.events():
        if annotation(event) or not (event.cpu_parent is None or annotation(event.cpu_parent)):
            continue
        main = event.thread if main is None else main
        if event.thread != main:
            continue
        name = event.name
        group = "other"
        if name.startswith("zokernels::"):
            group = "update" if name.endswith("::update_") else "weights"
        spent[group] += event.cpu_time_total * 1e-6
    return wall, spent


def rows(
    model: PreTrainedModel,
    name: str,
    dtype: str,
    batch: models.Batch,
    base: harness.Row,
    *,
    rounds: int = 5,
) -> list[harness.Row]:
    """The breakdown of both distributions for one model and batch."""

    def dual(
        target: PreTrainedModel, data: models.Batch, distribution: str
    ) -> Callable[[], object]:
        optimizer = zo.MeZO(target, lr=1e-6, eps=1e-3, distribution=distribution)
        return lambda: optimizer.step(data)

    def forwards(target: PreTrainedModel, data: models.Batch) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                target(**data)
                target(**data)

        return run

    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    threads, isa = torch.get_num_threads(), cpp.instruction_set()
    pool = ThreadPoolExecutor(threads)
    drawn: dict[str, int] = {}
    cases: dict[str, Callable[[], object]] = {d: dual(model, batch, d) for d in noise.DISTRIBUTIONS}
    cases |= {
        "plain_products": products(linear_calls(model, batch)),
        "update_traffic": traffic(model),
        "two_forwards": forwards(model, batch),
    }
    for d in noise.DISTRIBUTIONS:
        groups = groups_for(isa, d)
        cases[f"generator {d}"] = drawing(pool, isa, d, threads, groups)
        drawn[d] = 256 * groups * threads
    if not name.startswith("tiny"):
        thin = models.build(f"{name}-skeleton", dtype)
        thin_batch = models.random_batch(thin, 1, 8)
        cases["dispatch_floor"] = dual(thin, thin_batch, "gaussian")
        cases["dispatch_forwards"] = forwards(thin, thin_batch)
    with pool:
        timings = harness.interleave(
            cases, rounds=rounds, warmup=2, sync=harness.sync_for(str(model.device))
        )
    out: list[harness.Row] = []
    for distribution in noise.DISTRIBUTIONS:
        total = timings.stat(distribution).median
        profiled = sorted((op_seconds(cases[distribution]) for _ in range(3)), key=lambda p: p[0])
        wall, spent = profiled[1]
        scale = total / wall
        parts = {
            "weights": spent["weights"] * scale,
            "update": spent["update"] * scale,
            "other_ops": spent["other"] * scale,
            "python": max(0.0, (wall - sum(spent.values())) * scale),
        }
        rate = drawn[distribution] / timings.stat(f"generator {distribution}").median
        parts["generator"] = 2 * elements / rate
        for extra in EXTRA:
            if extra in cases:
                parts[extra] = timings.stat(extra).median
        parts["step"] = total
        out += [
            {
                **base,
                "distribution": distribution,
                "part": part,
                "ms": round(seconds * 1e3, 3),
                "share": round(seconds / total, 4),
            }
            for part, seconds in parts.items()
        ]
    return out


def show(rows: list[harness.Row], console: Console) -> None:
    """Print one breakdown."""
    first = rows[0]
    table = Table(
        title=f"{first['model']} {first['dtype']} {first['batch']}x{first['length']}: our step",
        title_justify="left",
    )
    table.add_column("part")
    for distribution in noise.DISTRIBUTIONS:
        table.add_column(f"{distribution} ms", justify="right")
        table.add_column("share", justify="right")
    by = {(r["distribution"], r["part"]): r for r in rows}
    for part in dict.fromkeys(r["part"] for r in rows):
        cells = []
        for distribution in noise.DISTRIBUTIONS:
            r = by[distribution, part]
            cells += [f"{r['ms']:.1f}", f"{100 * float(str(r['share'])):.0f} %"]
        table.add_row(str(part), *cells, end_section=part == PARTS[-1])
    console.print(table)
