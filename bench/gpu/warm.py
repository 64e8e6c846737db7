"""Triton's kernels compiled ahead of the timing, by several processes at once.

A kernel is compiled where it is first called, one after another, and that takes seconds. Here every
process makes its share of all calls once; what it compiles stays in Triton's cache on the disk.

    python -m bench.gpu.warm SHARE OF      share 0, 1, ... of so many
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM

import zokernels as zo
from bench import models
from bench.gpu import ops, steps
from bench.gpu.checks import Check
from bench.gpu.sizes import FULL, Sizes
from bench.harness import ROOT
from zokernels import _registry

Call = tuple[str, Callable[[], object]]

# Of every model: the kernels of further layers are the same.
LAYERS = 1


def calls(sizes: Sizes, device: str, backend: str) -> list[Call]:
    """What is timed later, with models of few layers: the longest calls first."""
    found: list[Call] = [
        (f"{name} {b}x{t}", lambda name=name, b=b, t=t: _steps(sizes, name, (b, t), device))
        for name in sizes.models
        for b, t in sizes.batches
    ]
    having = _registry.backends()[backend].kernels
    for case in ops.cases(sizes, device):
        if case.op in having:
            found.append((case.label, lambda c=case: having[c.op](*c.arguments())))
    return found


def _steps(sizes: Sizes, name: str, size: tuple[int, int], device: str) -> None:
    config = models.config(name, num_hidden_layers=LAYERS)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    batch = models.random_batch(model, *size)
    kinds = [{}, {"fuse_update": True}]
    if name in sizes.masked_models:
        kinds.append({"mask": zo.Mask.random(model, sizes.density, seed=0)})
    for options in kinds:
        optimizer = zo.MeZO(model, lr=1e-9, eps=1e-3, **options)
        for _ in range(3):
            optimizer.step(batch)
        optimizer.flush()


def make(some: Sequence[Call], backend: str) -> list[str]:
    """Make calls; what fails is named, and fails again where it is timed."""
    failed = []
    for label, call in some:
        try:
            with zo.use_backend(backend):
                call()
        except Exception as error:  # a compiler's errors have no common base
            failed.append(f"{label}: {steps.brief(error)}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def ahead(workers: int, limit: float) -> Check:
    """All calls by so many processes. What there is no time for is compiled when it is timed."""
    begin = time.perf_counter()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.warm", str(i), str(workers)],
            cwd=ROOT,
            start_new_session=True,
        )
        for i in range(workers)
    ]
    done = 0
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=max(1.0, limit - (time.perf_counter() - begin)))
            done += child.returncode == 0
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=20)
    detail = f"{done} of {workers} processes came to their end"
    state = "passed" if done == workers else "not run"
    return Check("compiled ahead", state, detail, time.perf_counter() - begin)


def main(share: int, of: int, sizes: Sizes = FULL) -> int:
    """One share, on the current CUDA device; the number of calls that failed."""
    failed = make(calls(sizes, "cuda", "triton")[share::of], "triton")
    for line in failed:
        print(f"not compiled ahead: {line}")
    return len(failed)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
