"""Peak memory of a stretch of work: CUDA's allocator, or the process's resident set."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident() -> tuple[int, int]:
    """Resident bytes now, and their high-water mark (both the mark where there is no ``/proc``)."""
    if _STATUS.exists():
        fields = dict(
            line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line
        )
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    import resource

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mark *= 1 if sys.platform == "darwin" else 1024
    return mark, mark


def _trim() -> None:
    """Give back what the heap keeps of earlier work, which would hide what this work needs."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """Context manager that measures the peak inside it.

    Attributes:
        before: bytes held when it was entered.
        peak: highest number of bytes held inside.

    Where the high-water mark cannot be reset (no ``/proc``, or not writable) ``peak`` is the
    process's so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.before = self.peak = 0

    @property
    def above(self) -> int:
        """Bytes on top of what was held before."""
        return max(self.peak - self.before, 0)

    def __enter__(self) -> Self:
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.before = torch.cuda.memory_allocated(self.cuda)
        else:
            _trim()
            with contextlib.suppress(OSError):  # sandboxes forbid it
                _CLEAR.write_text("5")
            self.before = resident()[0]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            self.peak = torch.cuda.max_memory_allocated(self.cuda)
        else:
            self.peak = resident()[1]
