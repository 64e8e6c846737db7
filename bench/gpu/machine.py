"""What the timing asks of a device: a CUDA device's answers, and a CPU's for rehearsals."""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

import zokernels as zo
from bench import harness, models, peak
from zokernels import _registry, graphs

Run = Callable[[], object]

MIB = 1 << 20


class Machine(ABC):
    """A device under measurement.

    Attributes:
        device: torch device; name: of the part; architecture: such as ``"sm_90"``.
        synchronize: waits for queued work, or None where nothing is queued.
    """

    device: str
    name: str
    architecture: str
    synchronize: Callable[[], object] | None

    @abstractmethod
    def backends(self) -> list[str]:
        """Backends that can be timed here, in the registry's order."""

    @abstractmethod
    def time(self, run: Run, *, seconds: float = 0.15, least: int = 5) -> harness.Stat:
        """Milliseconds of ``run`` on the device: median and spread over repetitions."""

    @abstractmethod
    def drawing(self, count: int, distribution: str) -> tuple[Run, int] | None:
        """What draws about ``count`` values and keeps none, and how many; None: nothing can."""

    @abstractmethod
    def graph(self, run: Run) -> Run:
        """What replays a recording of ``run``."""

    @abstractmethod
    def graphed_step(self, optimizer: zo.MeZO, batch: models.Batch) -> Callable[[Any], object]:
        """Steps of an optimizer as one recording."""

    @abstractmethod
    def peak(self, run: Run) -> int:
        """Peak bytes of ``run`` above what was held before."""

    @abstractmethod
    def free(self) -> int:
        """Bytes that could still be allocated."""

    @abstractmethod
    def release(self) -> None:
        """Give back the memory of objects that are gone."""

    @abstractmethod
    def facts(self) -> harness.Row:
        """What a reader of the numbers should know about the device."""


class Cuda(Machine):
    """A CUDA device. An op is timed by events around it, with nothing of its data in the cache.

    Before the first event a buffer larger than the second-level cache is read, often enough that
    the launches of the op are queued by the time the reading ends: what is between the events is
    the device's time, not the host's, wherever the op does not itself wait for the device.
    """

    def __init__(self, device: str = "cuda") -> None:
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(where)
        self.device = str(where)
        self._properties = torch.cuda.get_device_properties(where)
        self.name = self._properties.name
        self.architecture = f"sm_{self._properties.major}{self._properties.minor}"
        self.synchronize = torch.cuda.synchronize
        cache = getattr(self._properties, "L2_cache_size", 0) or 64 * MIB
        self._scratch = torch.zeros(max(256 * MIB, 4 * cache) // 4, device=where)
        self._sink = torch.zeros((), device=where)
        self._flush_seconds = 1e-4
        self._flush_seconds = self.time(self._flush).median / 1e3

    def backends(self) -> list[str]:
        known = _registry.backends()
        return [name for name in _registry.choosable() if known[name].serves("cuda")]

    def _flush(self) -> None:
        # Reading leaves no lines behind that would have to be written back meanwhile.
        torch.amax(self._scratch, dim=0, out=self._sink)

    def time(self, run: Run, *, seconds: float = 0.15, least: int = 5) -> harness.Stat:
        run()  # compiles
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        flushes = min(30, 1 + math.ceil(1.5 * host / self._flush_seconds))
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < 200):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                self._flush()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return harness.Stat.of(times)

    def drawing(self, count: int, distribution: str) -> tuple[Run, int] | None:
        if _registry.backends()["triton"].reason is not None:
            return None
        from bench import generator

        return generator.drawing(count, distribution, self.device)

    def graph(self, run: Run) -> Run:
        return graphs.record(run, run)[0]

    def graphed_step(self, optimizer: zo.MeZO, batch: models.Batch) -> Callable[[Any], object]:
        return zo.GraphedStep(optimizer, batch)

    def peak(self, run: Run) -> int:
        run()
        torch.cuda.synchronize()
        self.release()
        return peak.measure(run, self.device)[1]

    def free(self) -> int:
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held

    def release(self) -> None:
        gc.collect()  # models and optimizers refer to each other
        torch.cuda.empty_cache()

    def facts(self) -> harness.Row:
        properties = self._properties
        return {
            "architecture": self.architecture,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cache": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "triton": _triton(),
            "empty_ms": round(self.time(lambda: None).median, 4),
        }


class Rehearsal(Machine):
    """This CPU in the place of a GPU: the same calls, and numbers that mean nothing."""

    def __init__(self) -> None:
        self.device = "cpu"
        self.name = f"rehearsal on {harness.device_name()}"
        self.architecture = "sm_90"
        self.synchronize = None

    def backends(self) -> list[str]:
        return [name for name, b in _registry.backends().items() if b.serves("cpu")]

    def time(self, run: Run, *, seconds: float = 0.15, least: int = 5) -> harness.Stat:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
        return harness.Stat.of(times)

    def drawing(self, count: int, distribution: str) -> tuple[Run, int] | None:
        sample = _registry.kernel(self.backends()[0], "sample")
        seed = torch.tensor(1)
        return lambda: sample(1, count, seed, 1, 0, 0, distribution), count

    def graph(self, run: Run) -> Run:
        run()
        return run

    def graphed_step(self, optimizer: zo.MeZO, batch: models.Batch) -> Callable[[Any], object]:
        return optimizer.step

    def peak(self, run: Run) -> int:
        run()
        return max(0, peak.measure(run, self.device)[1])

    def free(self) -> int:
        return 1 << 40

    def release(self) -> None:
        gc.collect()

    def facts(self) -> harness.Row:
        return {"architecture": None, "empty_ms": round(self.time(lambda: None).median, 4)}


def setting() -> str:
    """``ZOKERNELS_GPU``: what of the plans is overridden. Part of a row's key."""
    return os.environ.get("ZOKERNELS_GPU", "")


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] or None
