"""The CUDA backend's own launches on CPU tensors, with nvcc's PTX in place of a device.

The sources are built twice: for the host, where ``launch_hook.h`` takes each launch and what the
driver is asked for, and to PTX. The binding and the Python adapter are those of the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cuda_emulated
import torch
from filelock import FileLock

from ptx import tensors
from ptx.machine import launch
from ptx.memory import GlobalMemory
from ptx.parser import Kernel, PTXError, parse
from ptx.tma import MAP_BYTES, TensorMap
from zokernels._cuda_ops import Native

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = sorted(cuda_emulated.SOURCES.glob("*.cu"))
_FLAGS = re.search(
    r"COMPILE_LANGUAGE:CUDA>:([^$]+);--threads",
    (cuda_emulated.ROOT / "csrc" / "CMakeLists.txt").read_text(),
)
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    *[ctypes.c_void_p, *[ctypes.c_int64] * 5],
    *[ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64), ctypes.c_int64],
)
_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p],
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint32)] * 2,
    *[ctypes.c_int] * 4,
)
_INVALID_VALUE = 1


def to_ptx(source: Path, output: Path) -> None:
    """Compile to PTX with the flags of the build: for Hopper where nothing else will do.

    What other sources become for 9.0a is, line by line, what they become for 8.0.
    """
    assert NVCC and _FLAGS
    arch = "90a" if "sm90" in source.name else "80"
    command = [NVCC, "-std=c++17", *_FLAGS.group(1).split(";"), f"-arch=compute_{arch}", "-ptx"]
    done = subprocess.run(
        [*command, "-o", str(output), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def plain(name: str) -> str:
    """A mangled name without its unnamed namespace, which each compiler calls something else."""
    found = re.search(r"(?<!\d)(\d+)(?=_GLOBAL__N_)", name)
    if not found:
        return name
    return name[: found.start()] + name[found.end() + int(found.group(1)) :]


class Backend:
    """The built backend; launches go to the emulator."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "_zokernels_cuda_ptx.so"
        torch.ops.load_library(str(self.path))
        self._library = ctypes.CDLL(str(self.path))
        self._hook = _HOOK(self._launch)  # kept: the library calls it
        hook = ctypes.c_void_p.in_dll(self._library, "zk_launch_hook")
        hook.value = ctypes.cast(self._hook, ctypes.c_void_p).value
        self._encoder = _ENCODE(self._encode)
        encoder = ctypes.c_void_p.in_dll(self._library, "zk_encode_hook")
        encoder.value = ctypes.cast(self._encoder, ctypes.c_void_p).value
        self.refused = ""  # why a tensor map was, the last time
        symbols = subprocess.run(["nm", str(self.path)], capture_output=True, text=True, check=True)
        places = {
            name: int(at, 16)
            for at, _, name in re.findall(r"^(\w+) (\w) (\S+)$", symbols.stdout, re.M)
        }
        self._base = ctypes.addressof(hook) - places["zk_launch_hook"]
        self._names = {at: name for name, at in places.items()}
        self._message = ctypes.create_string_buffer(b"")
        self.launched: set[str] = set()

    @functools.cached_property
    def kernels(self) -> dict[str, Kernel]:
        found: dict[str, Kernel] = {}
        for text in sorted(self.folder.glob("*.ptx")):
            found |= {plain(name): k for name, k in parse(text.read_text()).items()}
        return found

    def _encode(
        self,
        to: int,
        kind: int,
        rank: int,
        address: int,
        sizes: ctypes._Pointer[ctypes.c_uint64],
        strides: ctypes._Pointer[ctypes.c_uint64],
        box: ctypes._Pointer[ctypes.c_uint32],
        steps: ctypes._Pointer[ctypes.c_uint32],
        *modes: int,
    ) -> int:
        """``cuTensorMapEncodeTiled``."""
        found = TensorMap(
            address,
            *(tuple(sizes[:rank]), tuple(strides[: rank - 1])),
            *(tuple(box[:rank]), tuple(steps[:rank])),
            *(kind, *modes),
        )
        self.refused = found.wrong() or ("" if to % 64 == 0 else "a map at a multiple of 64 bytes")
        if self.refused:
            return _INVALID_VALUE
        ctypes.memmove(to, found.packed(), MAP_BYTES)
        return 0

    def _launch(
        self,
        address: int,
        *rest: object,
    ) -> int | None:
        try:
            self._run(plain(self._names[address - self._base]), *rest)  # type: ignore[arg-type]
        except Exception as error:
            self._message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(self._message)
        return None

    def _run(
        self,
        name: str,
        x: int,
        y: int,
        z: int,
        threads: int,
        shared: int,
        arguments: ctypes._Pointer[ctypes.c_void_p],
        sizes: ctypes._Pointer[ctypes.c_int64],
        count: int,
    ) -> None:
        kernel = self.kernels[name]
        self.launched.add(name)
        if [p.size for p in kernel.parameters] != list(sizes[:count]):
            raise PTXError(f"{name}: the host's arguments have {list(sizes[:count])} bytes")
        parameters = bytearray(kernel.parameter_bytes)
        for place, start in zip(kernel.parameters, arguments[:count], strict=True):
            data = ctypes.string_at(start, place.size)
            parameters[place.offset : place.offset + place.size] = data
        launch(
            kernel,
            (x, y, z),
            threads,
            bytes(parameters),
            GlobalMemory(tensors.living()),
            dynamic_shared=shared,
            loose=True,
        )


def _digest() -> str:
    """Of everything that the builds are made from."""
    digest = hashlib.sha256(cuda_emulated._digest().encode())
    assert NVCC
    digest.update(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    for path in (HERE / "launch_hook.h", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _headers() -> Path:
    """Of the toolkit."""
    assert NVCC
    places = [Path(NVCC).resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    return next(p for p in places if (p / "cuda.h").exists())


@functools.cache
def built() -> Backend:
    """Both builds, made once for all processes."""
    folder = Path(tempfile.gettempdir()) / f"zokernels-ptx-{_digest()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / "_zokernels_cuda_ptx.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            with ThreadPool(2) as pool:
                pool.starmap(to_ptx, [(s, folder / f"{s.stem}.ptx") for s in SOURCES])
            cuda_emulated.build(
                folder / "partial.so",
                *("-include", str(HERE / "launch_hook.h")),
                *("-Dzokernels_cuda_emulated=zokernels_cuda_ptx", "-O0"),
                *("-isystem", str(_headers()), "-Wno-unused-parameter"),
            )
            (folder / "partial.so").rename(library)
    return Backend(folder)


@contextlib.contextmanager
def changeable() -> Iterator[dict[str, Kernel]]:
    """The kernels of both builds; changes are undone."""
    found = built().kernels
    before = dict(found)
    try:
        yield found
    finally:
        found.update(before)


def native(multiprocessors: int = 4, wgmma_tokens: int = 0) -> Native:
    """The backend's ops for CPU tensors; tokens a branch up to which Hopper's product serves."""
    built()
    return Native(
        torch.ops.zokernels_cuda_ptx,
        stream=lambda device: 0,
        multiprocessors=lambda device: multiprocessors,
        capturing=lambda: False,
        wgmma_tokens=lambda device: wgmma_tokens,
    )
