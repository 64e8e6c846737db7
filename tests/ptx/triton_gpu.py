"""Triton's compiled kernels on CPU tensors: its own specialisation and compiler, then the emulator.

In place of a GPU's driver stands one that knows an architecture; in place of the launch of machine
code the PTX that it was assembled from.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from ptx import tensors
from ptx.machine import launch
from ptx.memory import GlobalMemory
from ptx.parser import Kernel, PTXError, parse

_FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"},
}
# Older ones put no fence between copies (cp.async) and a warpgroup's product that reads them.
PROXY_FENCES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes a block may take


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.lru_cache(maxsize=256)
def _kernel(ptx: str) -> Kernel:
    (kernel,) = parse(ptx).values()
    return kernel


def run_compiled(
    compiled: CompiledKernel, grid: tuple[int, int, int], args: tuple[Any, ...]
) -> None:
    """Run a compiled Triton kernel; ``args`` in the order of its Python parameters."""
    kernel = _kernel(compiled.asm["ptx"])
    places, used = kernel.parameters, 0
    parameters = bytearray(kernel.parameter_bytes)
    given: list[Tensor] = []
    for (name, kind), value in zip(compiled.src.signature.items(), args, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            value = _pointer(value, given)
            kind = "u64"
        elif kind not in _FORMATS:
            raise PTXError(f"{kernel.name}: parameter {name} of type {kind}")
        packed = struct.pack(_FORMATS[kind], value)
        if len(packed) != places[used].size:
            raise PTXError(
                f"{kernel.name}: {name} has {len(packed)} bytes, not {places[used].size}"
            )
        parameters[places[used].offset : places[used].offset + len(packed)] = packed
        used += 1
    # Scratch of the compiler's own, which none of these kernels has, follows.
    if len(places) - used > 2 or getattr(compiled.metadata, "global_scratch_size", 0):
        raise PTXError(f"{kernel.name}: {len(places) - used} parameters are left")
    launch(
        kernel,
        grid,
        32 * compiled.metadata.num_warps,
        bytes(parameters),
        GlobalMemory(tensors.ranges(given), tensors.living),
        dynamic_shared=compiled.metadata.shared,
        proxies=PROXY_FENCES,
    )


def _pointer(value: Tensor | None, given: list[Tensor]) -> int:
    if value is None:
        return 0
    given.append(value)
    return value.data_ptr()


def _launcher(compiled: CompiledKernel) -> Callable[..., None]:
    limit = _SHARED[driver.active.capability]
    if compiled.metadata.shared > limit:
        raise OutOfResources(compiled.metadata.shared, limit, "shared memory")

    def run(x: int, y: int, z: int, *rest: Any) -> None:
        # Stream, function, metadata and hooks stand before the arguments.
        run_compiled(compiled, (x, y, z), rest[6:])

    return run


@contextlib.contextmanager
def emulated(capability: int = 80) -> Iterator[None]:
    """Launches of Triton kernels go to the emulator."""
    original, active = CompiledKernel._init_handles, driver._active

    def init(self: CompiledKernel) -> None:
        if self._run is None:
            self._run = _launcher(self)

    driver.set_active(_Driver(capability))
    CompiledKernel._init_handles = init
    try:
        yield
    finally:
        CompiledKernel._init_handles = original
        driver.set_active(active)


@contextlib.contextmanager
def backend(capability: int = 80) -> Iterator[dict[str, Callable[..., object]]]:
    """The Triton backend's ops, for CPU tensors; an index out of range is raised at once."""
    modules = ["zokernels.triton.backend", "zokernels.triton.sparse_ops"]
    before = {name: sys.modules.pop(name, None) for name in modules}
    base = importlib.import_module("zokernels.triton.launch")
    served, base.SERVED = base.SERVED, ("cpu",)  # type: ignore[attr-defined]
    cpu = torch.device("cpu")
    with _a_gpu(capability):
        kernels = dict(importlib.import_module(modules[0]).KERNELS)

    def checked(kernel: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(kernel)
        def call(*args: Any) -> object:
            out = kernel(*args)
            base.raise_errors(cpu)  # type: ignore[attr-defined]
            return out

        return call

    try:
        with emulated(capability):
            yield {name: checked(kernel) for name, kernel in kernels.items()}
    finally:
        base.SERVED = served  # type: ignore[attr-defined]
        # As if they had never been imported, which without a GPU they cannot be.
        package = sys.modules["zokernels.triton"]
        for name, module in before.items():
            sys.modules.pop(name, None)
            vars(package).pop(name.rsplit(".", 1)[1], None)
            if module is not None:
                sys.modules[name] = module
                setattr(package, name.rsplit(".", 1)[1], module)


@contextlib.contextmanager
def _a_gpu(capability: int) -> Iterator[None]:
    """Modules imported inside find one."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda index=None: divmod(capability, 10),
    }
    before = {name: getattr(torch.cuda, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        yield
    finally:
        for name, answer in before.items():
            setattr(torch.cuda, name, answer)
