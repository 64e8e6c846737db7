"""Peak memory of one piece of work, in a process of its own.

The child builds the case, notes its resident set, clears the kernel's high-water mark, runs the
work and reads the mark: the result is what the work needed on top of everything that was loaded
before. On CUDA it is the allocator's peak over what was allocated before. Large blocks are mapped
and unmapped one by one (``MALLOC_MMAP_THRESHOLD_``), so that the heap's fragmentation is not
counted.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.harness import ROOT

_MARK = "PEAK "


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")


def measure(work: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Bytes held before ``work``, and the peak on top of them while it ran."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return before, _status("VmHWM") - before


def peak_of(target: str, **kwargs: object) -> tuple[int, int]:
    """Run ``measure(target(**kwargs))`` in a fresh process.

    Args:
        target: ``"module:function"``; the function sets up and returns the work.
        kwargs: JSON values; ``device`` (default "cpu") says which memory is meant.

    Returns:
        Bytes before, and peak on top.

    Raises:
        RuntimeError: the child failed; the message ends with its last lines.
    """
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.peak", target, json.dumps(kwargs)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            before, peak = json.loads(line[len(_MARK) :])
            return before, peak
    raise RuntimeError(f"{target}({kwargs}) failed:\n{done.stderr[-2000:]}")


def hold(mib: int, device: str = "cpu") -> Callable[[], object]:
    """Work of a known size, to check the probe itself.

    Raises:
        ValueError: ``mib`` is not positive.
    """
    import torch

    if mib <= 0:
        raise ValueError(f"mib must be positive; got {mib}")
    return lambda: torch.ones(mib << 18, dtype=torch.float32, device=device)


def main() -> None:
    """Child side: ``python -m bench.peak module:function '{"json": "kwargs"}'``."""
    target, kwargs = sys.argv[1], json.loads(sys.argv[2])
    module, function = target.split(":")
    work = getattr(importlib.import_module(module), function)(**kwargs)
    print(_MARK + json.dumps(measure(work, kwargs.get("device", "cpu"))))


if __name__ == "__main__":
    main()
