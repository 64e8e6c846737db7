"""The CUDA C++ backend (``csrc/cuda``): needs a torch built for CUDA, a device, and the library
built next to this package (CMake option ``ZOKERNELS_CUDA``).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from zokernels._cuda_ops import Native
from zokernels._load import native_library
from zokernels.triton.devices import of_device

if torch.version.cuda is None:
    raise ImportError(f"torch {torch.__version__} is built without CUDA")
if not torch.cuda.is_available():
    raise ImportError("torch finds no CUDA device")

_library = native_library("_zokernels_cuda")
_library.zokernels_cuda_probe.restype = ctypes.c_char_p


def _probe() -> None:
    torch.cuda.init()
    error = _library.zokernels_cuda_probe()
    if error is not None:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise ImportError(
            f"_zokernels_cuda.so does not run on {name} (sm_{major}{minor}; it is built for sm_80 "
            f"and newer): {error.decode()}"
        )


_probe()


def _stream(device: torch.device) -> int:
    # torch.cuda.current_stream makes a Stream first, which takes several times as long.
    return torch._C._cuda_getCurrentRawStream(
        torch.cuda.current_device() if device.index is None else device.index
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _wgmma_tokens(device: torch.device) -> int:
    nine = torch.cuda.get_device_capability(device) == (9, 0)
    return of_device(str(device)).wgmma if nine else 0


native = Native(
    torch.ops.zokernels_cuda,
    stream=_stream,
    multiprocessors=_multiprocessors,
    capturing=torch.cuda.is_current_stream_capturing,
    wgmma_tokens=_wgmma_tokens,
)

synchronize = native.flags.wait

takes_update = native.takes_update

KERNELS: dict[str, Callable[..., object]] = native.kernels()
