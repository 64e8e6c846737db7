"""Whole steps in bf16 with random weights: ours on every backend, MeZO's loop, two forwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import zokernels as zo
from bench import harness, models
from bench.gpu.machine import Machine, Run, setting
from bench.peers.mezo import VARIANTS, MeZOLoop
from zokernels import _registry
from zokernels.planner import plan_linear

FORWARDS, FORWARDS_GRAPH = "two forwards", "two forwards, graph"
STEP, STEP_GRAPH = "step", "step, graph"
MASKED, FUSED = ", mask", ", fused update"  # what follows them with these options
RUN = 4  # steps of a call with fused updates: the last one's is made apart
MEZO = tuple(f"mezo {v}" for v in VARIANTS)
KEY = ("model", "batch", "length", "case", "backend", "setting")

# A case, and the backend under which it runs ("torch": none of ours takes part).
Name = tuple[str, str]
TORCH = "torch"


@dataclass
class StepCases:
    """Callables to time in turns.

    Attributes:
        runs: ``case [backend]`` -> one step, or two forwards; names: what that key stands for.
        steps: of a call, where it is not one.
        after: untimed work after a call; left_out: what could not be made, with the reason.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    names: dict[str, Name] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    after: dict[str, Run] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def each(self, timings: harness.Timings) -> harness.Timings:
        """Of one step, from timings of calls."""
        return harness.Timings(
            {
                k: [s / self.steps.get(k, 1) for s in of_call]
                for k, of_call in timings.seconds.items()
            }
        )

    def add(self, case: str, backend: str, run: Run, after: Run | None = None) -> None:
        """One more case."""
        key = f"{case} [{backend}]"
        self.runs[key], self.names[key] = run, (case, backend)
        if after:
            self.after[key] = after

    def attempt(self, case: str, backend: str, make: Callable[[], Run]) -> None:
        """A case that may be impossible: it is made and run once, or left out with the reason."""
        try:
            run = make()
            run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's errors have no common base
            self.left_out.append(f"{case} [{backend}]: {brief(error)}")
        else:
            self.add(case, backend, run)


def brief(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def build(name: str, device: str) -> PreTrainedModel:
    """Random weights in bf16, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(models.config(name), dtype=torch.bfloat16)
    return model.eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


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


def _under(backend: str, run: Run) -> Run:
    def forced() -> object:
        with zo.use_backend(backend):
            return run()

    return forced


def cases(
    machine: Machine,
    model: PreTrainedModel,
    batch: models.Batch,
    backends: list[str],
    density: float | None = None,
) -> StepCases:
    """What is timed on a model and a batch.

    Args:
        machine: on what.
        model, batch: of the steps.
        backends: of ours.
        density: of a random mask, for steps under one as well; None: none.
    """
    found = StepCases()

    def plain() -> None:
        with torch.inference_mode():
            model(**batch)
            model(**batch)

    @torch.no_grad()
    def forwards() -> None:
        model(**batch)
        model(**batch)

    found.add(FORWARDS, TORCH, plain)
    found.attempt(FORWARDS_GRAPH, TORCH, lambda: machine.graph(forwards))
    # What a kind of step is called, the options it is made with, and the op it rests on.
    kinds: list[tuple[str, dict[str, Any], str]] = [("", {}, "linear")]
    kinds.append((FUSED, {"fuse_update": True}, "update_linear_"))
    if density is not None:
        kinds.append((MASKED, {"mask": zo.Mask.random(model, density, seed=0)}, "sparse_linear"))
    for backend, (suffix, options, op) in itertools.product(backends, kinds):
        if op in _registry.backends()[backend].kernels:
            _add_steps(found, machine, model, batch, backend, suffix, options)
    _add_mezo(found, machine, model, batch)
    return found


def _add_steps(
    found: StepCases,
    machine: Machine,
    model: PreTrainedModel,
    batch: models.Batch,
    backend: str,
    suffix: str,
    options: dict[str, Any],
) -> None:
    """Steps of one kind, as they are and as a graph."""
    count = RUN if suffix == FUSED else 1

    def repeated(optimizer: zo.MeZO, step: Callable[[Any], object]) -> Run:
        def run() -> None:
            for _ in range(count):
                step(batch)
            if count > 1:
                optimizer.flush()

        return _under(backend, run)

    def stepped() -> Run:
        optimizer = zo.MeZO(model, lr=1e-9, eps=1e-3, **options)
        return repeated(optimizer, optimizer.step)

    def graphed() -> Run:
        with zo.use_backend(backend):
            optimizer = zo.MeZO(model, lr=1e-9, eps=1e-3, seed=1, **options)
            step = machine.graphed_step(optimizer, batch)
        return repeated(optimizer, step)

    for case, make in ((STEP + suffix, stepped), (STEP_GRAPH + suffix, graphed)):
        found.steps[f"{case} [{backend}]"] = count
        found.attempt(case, backend, make)


def _add_mezo(
    found: StepCases, machine: Machine, model: PreTrainedModel, batch: models.Batch
) -> None:
    held = [(p, p.data) for p in model.parameters()]

    def restore() -> None:
        # "plain" gives every parameter new memory; graphs were recorded with the old.
        for p, data in held:
            p.data = data

    for variant in VARIANTS:
        again = restore if variant == "plain" else None
        if again and machine.free() < 1.2 * weight_bytes(model):
            found.left_out.append(
                f"mezo {variant} [{TORCH}]: no memory for a second set of weights"
            )
            continue
        loop = MeZOLoop(model, lr=1e-9, eps=1e-3, variant=variant)
        seeds = itertools.count(1)
        found.add(
            f"mezo {variant}",
            TORCH,
            lambda loop=loop, seeds=seeds: loop.step(lambda: model(**batch).loss, next(seeds)),
            again,
        )


def peaks(
    machine: Machine, model: PreTrainedModel, batch: models.Batch, backends: list[str]
) -> tuple[dict[Name, int], list[str]]:
    """Peak bytes above the weights; besides the steps, a forward and one of the stacked batch.

    Returns:
        The peaks, and why a backend's step has none.
    """
    found: dict[Name, int] = {}
    failed = []
    for backend in backends:
        optimizer = zo.MeZO(model, lr=1e-9, eps=1e-3)
        run = _under(backend, lambda o=optimizer: o.step(batch))
        try:
            found[STEP, backend] = machine.peak(run)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's errors have no common base
            failed.append(f"{STEP} [{backend}]: {brief(error)}")
    loop = MeZOLoop(model, lr=1e-9, eps=1e-3, variant="add_")
    found["mezo add_", TORCH] = machine.peak(lambda: loop.step(lambda: model(**batch).loss, 1))
    stacked = {k: torch.cat([v, v]) for k, v in batch.items()}
    with torch.inference_mode():
        found["stacked forward", TORCH] = machine.peak(lambda: model(**stacked))
        found["forward", TORCH] = machine.peak(lambda: model(**batch))
    return found, failed


def rows(
    base: harness.Row,
    names: dict[str, Name],
    timings: harness.Timings,
    weights: int,
    memory: dict[Name, int],
) -> list[harness.Row]:
    """One row a case: milliseconds, speed-up over the better MeZO, cost in two forwards.

    A graph is held against two forwards in a graph where there is one, everything else against
    them as they are.
    """
    key = {name: k for k, name in names.items()}
    best = timings.fastest(k for k, (case, _) in names.items() if case in MEZO)
    stacked = memory["stacked forward", TORCH]
    found = []
    for k, (case, backend) in names.items():
        time_of = timings.stat(k)
        against = FORWARDS
        if ", graph" in case and (FORWARDS_GRAPH, TORCH) in key:
            against = FORWARDS_GRAPH
        peak = memory.get((case, backend))
        found.append(
            {
                **base,
                "case": case,
                "backend": backend,
                "setting": setting(),
                "ms": round(time_of.median * 1e3, 3),
                "ms_p20": round(time_of.low * 1e3, 3),
                "ms_p80": round(time_of.high * 1e3, 3),
                "rounds": time_of.rounds,
                "speedup": round(timings.ratio(best, k).median, 3),
                "vs_two_forwards": round(timings.ratio(k, key[against, TORCH]).median, 3),
                "against": against,
                "best_mezo": names[best][0],
                "peak_mib": "" if peak is None else round((weights + peak) / 2**20, 1),
                "peak_vs_stacked_forward": (
                    "" if peak is None else round((weights + peak) / (weights + stacked), 4)
                ),
            }
        )
    return found
