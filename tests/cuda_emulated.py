"""The CUDA backend's own kernels on the CPU: csrc/cuda compiled by the host compiler.

``csrc/cuda/emulate.h`` runs every thread of a grid; the binding and the Python adapter are those of
the GPU. What a device does with the instructions themselves is not tested here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from zokernels._cuda_ops import Native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found, "a C++ compiler is needed, as for the C++ backend"
    return found


def compile_host(
    sources: list[Path], output: Path, *flags: str, libraries: tuple[str, ...] = ()
) -> None:
    """Compile CUDA sources as C++ for the host."""
    command = [compiler(), "-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    command += ["-x", "c++", *map(str, sources), "-x", "none", *libraries, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(output: Path, *flags: str) -> None:
    """Build the emulated backend."""
    torch_dir = Path(torch.__file__).parent
    compile_host(
        [SOURCES / "binding.cpp", *sorted(SOURCES.glob("*.cu"))],
        output,
        "-DZK_EMULATE",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-fvisibility=hidden",
        f"-isystem{torch_dir / 'include'}",
        *flags,
        libraries=(f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"),
    )


@functools.cache
def library() -> Path:
    """The emulated library, loaded: ZOKERNELS_CUDA_EMULATED, or built once for all processes."""
    given = os.environ.get("ZOKERNELS_CUDA_EMULATED")
    if given:
        output = Path(given)
    else:
        folder = Path(tempfile.gettempdir()) / f"zokernels-emulated-{_digest()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        output = folder / "_zokernels_cuda_emulated.so"
        with FileLock(folder / "lock"):
            if not output.exists():
                build(folder / "partial.so")
                (folder / "partial.so").rename(output)
    torch.ops.load_library(str(output))
    return output


def _digest() -> str:
    """Of everything that the library is made from."""
    digest = hashlib.sha256(f"{torch.__version__} {compiler()} {os.getuid()}".encode())
    headers = SOURCES.parent.glob("*.h")
    for path in sorted([*SOURCES.iterdir(), *headers, Path(__file__)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def native(multiprocessors: int = 4) -> Native:
    """The backend over the emulation; ``multiprocessors`` moves how products are split."""
    library()
    return Native(
        torch.ops.zokernels_cuda_emulated,
        stream=lambda device: 0,
        multiprocessors=lambda device: multiprocessors,
        capturing=lambda: False,
    )
