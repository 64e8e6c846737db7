"""Launching kernels, and errors that a kernel finds in its data.

A kernel cannot raise. An index outside its table makes it write NaN (never another row's numbers)
and leave the value in pinned host memory, which the host reads, without waiting for the device, at
the next op; :func:`raise_errors` waits. So an ``IndexError`` comes late, as CUDA's own errors do,
but it comes, and no step has to synchronise for it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from zokernels.triton.noise import INTERPRETED

_NOTHING = -(1 << 62)  # of a flag: no error; no index has this value
_flags: dict[torch.device, Tensor] = {}


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches inside go to the tensor's device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def flag(device: torch.device) -> Tensor:
    """int64 ``[2]`` that kernels leave a bad index and its limit in."""
    found = _flags.get(device)
    if found is None:
        found = torch.tensor([_NOTHING, 0])
        _flags[device] = found = found if INTERPRETED else found.pin_memory()
    return found


def look(device: torch.device, what: str) -> None:
    """Raise what an earlier call left; the interpreter's calls are over when they return.

    Raises:
        IndexError: an index was outside its range. The results of that call are NaN there.
    """
    found = _flags.get(device)
    if found is None:
        return
    value, limit = found.numpy().tolist()
    if value != _NOTHING:
        found.numpy()[0] = _NOTHING
        late = "" if INTERPRETED else " (of an earlier call: kernels run asynchronously)"
        raise IndexError(f"{what} must be in [0, {limit}); got {value}{late}")


def raise_errors(device: torch.device | str) -> None:
    """Wait for the device and raise what its kernels found.

    Raises:
        IndexError: an id or target of an earlier call was out of range.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
    look(where, "ids and targets")


def signed32(value: int) -> int:
    """A 32-bit word as the int32 of the same bits: one kernel argument type for all values."""
    return value - (1 << 32) if value >> 31 else value


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, **meta: Any
) -> None:
    """Launch on the current device; the interpreter knows no compiler options."""
    if INTERPRETED:
        kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
