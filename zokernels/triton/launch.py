"""Launching kernels, and errors that a kernel finds in its data.

A kernel cannot raise. An index outside its table makes it write NaN (never another row's numbers)
and leave the value in pinned host memory, which the host reads, without waiting for the device, at
the next op; :func:`raise_errors` waits. So an ``IndexError`` comes late, as CUDA's own errors do,
but it comes, and no step has to synchronise for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zokernels.triton.devices import of_device
from zokernels.triton.noise import INTERPRETED
from zokernels.triton.plan import MOST_PROGRAMS

SERVED = ("cpu",) if INTERPRETED else ("cuda",)

_NOTHING = -(1 << 62)  # of a flag: no error; no index has this value
_flags: dict[torch.device, Tensor] = {}


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def reachable(tensor: Tensor) -> None:
    """Refuse tensors that these kernels cannot reach.

    Raises:
        ValueError: a CPU tensor. RuntimeError: an older GPU beside one that is served.
    """
    if tensor.device.type not in SERVED:
        raise ValueError(
            f"the Triton backend needs tensors on {' or '.join(SERVED)}; got one on {tensor.device}"
        )
    if tensor.device.type == "cuda":
        try:
            of_device(str(tensor.device))
        except ValueError as error:
            raise RuntimeError(f"{tensor.device}: {error}") from error


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


def look(device: torch.device, what: str = "ids, targets and indices") -> None:
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


@contextlib.contextmanager
def indexed(tensor: Tensor) -> Iterator[None]:
    """Launches, on the tensor's device, of kernels that may find a bad index.

    Raises:
        IndexError: an earlier call found one (in the interpreter: one of these launches).
    """
    if not INTERPRETED:
        look(tensor.device)
    with device_guard(tensor):
        yield
    if INTERPRETED:
        look(tensor.device)


def raise_errors(device: torch.device | str) -> None:
    """Wait for the device and raise what its kernels found.

    Raises:
        IndexError: an id, a target or an index of an earlier call was out of range.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
    look(where)


def signed32(value: int) -> int:
    """A 32-bit word as the int32 of the same bits: one kernel argument type for all values."""
    return value - (1 << 32) if value >> 31 else value


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, **meta: Any
) -> None:
    """Launch on the current device; the interpreter knows no compiler options.

    Raises:
        ValueError: more programs along the second or third axis than CUDA has.
    """
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise ValueError(
            f"{kernel.fn.__name__} would need a grid of {grid}, but an axis after the first holds "
            f"{MOST_PROGRAMS} programs: evaluate fewer branches at once"
        )
    if INTERPRETED:
        kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
