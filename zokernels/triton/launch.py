"""Launching kernels, and errors that a kernel finds in its data.

A kernel cannot raise: an index outside its table makes it write NaN (never another row's numbers),
and an ``IndexError`` comes with a later op (:mod:`zokernels._late`); :func:`raise_errors` waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zokernels._late import Flags
from zokernels.triton.devices import of_device
from zokernels.triton.noise import INTERPRETED
from zokernels.triton.plan import MOST_PROGRAMS

SERVED = ("cpu",) if INTERPRETED else ("cuda",)

# Where kernels leave a bad index, of every device.
FLAGS = Flags("ids, targets and indices")


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


@contextlib.contextmanager
def indexed(tensor: Tensor) -> Iterator[None]:
    """Launches, on the tensor's device, of kernels that may find a bad index.

    Raises:
        IndexError: an earlier call found one (in the interpreter: one of these launches).
    """
    if not INTERPRETED:
        FLAGS.look(tensor.device)
    with device_guard(tensor):
        yield
    if INTERPRETED:
        FLAGS.look(tensor.device)


def raise_errors(device: torch.device | str) -> None:
    """Wait for the device and raise what its kernels found.

    Raises:
        IndexError: an id, a target or an index of an earlier call was out of range.
    """
    FLAGS.wait(torch.device(device))


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
