"""The CUDA backend compiles for every architecture without a GPU, and what ptxas says of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CMAKE = (ROOT / "csrc" / "CMakeLists.txt").read_text()

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def option(pattern: str) -> list[str]:
    """A list out of CMakeLists.txt, so that what is tested is what is built."""
    found = re.search(pattern, CMAKE)
    assert found, pattern
    return found.group(1).split(";")


ARCHITECTURES = option(r'ZOKERNELS_CUDA_ARCHITECTURES "([^"]+)" CACHE')
FLAGS = option(r"COMPILE_LANGUAGE:CUDA>:([^$]+);--threads")

# Registers a thread: two blocks of 256 threads a multiprocessor, but for most products. Those of 16
# bits hold both factors of a half panel (or slice) and up to 64 sums (of transposed weights 128),
# those by wgmma 128 sums, and those of float32 weights stored [in, out] 64.
MOST = dict.fromkeys(
    ("linear_kernel", "linear_transposed_kernel", "few_transposed_kernel", "linear_sm90_kernel"),
    255,
)
MOST_OTHERWISE = 128


def known_architectures() -> set[str]:
    assert NVCC
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"compute_(\d+)", listed.stdout))


def test_the_architectures_are_the_promised_ones() -> None:
    assert ARCHITECTURES == ["80", "86", "89", "90a", "100"]
    assert "-fmad=false" in FLAGS
    assert not any("fast" in flag for flag in FLAGS)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: str, tmp_path: Path) -> None:
    if re.sub("[a-z]", "", arch) not in known_architectures():
        pytest.skip(f"this nvcc does not know compute capability {arch}")
    kernels: dict[str, tuple[int, ...]] = {}
    for source in sorted(SOURCES.glob("*.cu")):
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [
            NVCC,
            "-std=c++17",
            *FLAGS,
            target,
            "-Xptxas=-v",
            "-Werror=all-warnings",
            "-cubin",
        ]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "out.cubin"), str(source)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        # ptxas only informs of products that it makes wait for each other (C7510 and its kin).
        assert "wgmma" not in done.stdout + done.stderr
        report = re.findall(
            r"Compiling entry function '(\w+)' for 'sm_\w+'.*?"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers",
            done.stdout + done.stderr,
            re.DOTALL,
        )
        kernels |= {name: tuple(map(int, numbers)) for name, *numbers in report}
    # displace, update, project: 2 widths x 2 distributions; vectors: 2 x 2; masks: 3 types and
    # rows; products: 2 types x 2 x 4, and 2 in float32; of transposed weights 2 types x 2 x 3,
    # and 2 in float32; losses: 3 types; 3 helpers. By wgmma: 2 types x 2, empty but on sm_90a.
    assert len(kernels) == 3 * 4 + 2 * 2 + 4 + 16 + 2 + 12 + 2 + 3 + 3 + 4, sorted(kernels)
    for name, (stack, stores, loads, registers) in kernels.items():
        most = next((n for part, n in MOST.items() if part in name), MOST_OTHERWISE)
        assert (stack, stores, loads) == (0, 0, 0), f"{name} uses {stack} bytes of stack"
        assert registers <= most, f"{name} uses {registers} registers"


def listed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_symbols(library: Path) -> None:
    """Of torch only what any torch has; of CUDA nothing: its runtime is inside and stays there."""
    given = re.findall(r" T (\w+)", listed("nm", "-D", "--defined-only", str(library)))
    assert sorted(given) == [
        "zokernels_abi_version",
        "zokernels_contract_version",
        "zokernels_cuda_probe",
    ]
    names = listed("nm", "-D", str(library)).split()
    assert not [n for n in names if re.match(r"_*(cuda|cu[A-Z]|nv[A-Z])", n)]
    dynamic = listed("readelf", "-d", str(library))
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic)}
    own = {"libtorch_cpu", "libc10"}
    assert own <= needed <= own | {"libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64"}
    assert "PATH" not in dynamic


def disassembler() -> str | None:
    """cuobjdump of a CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(own) if own.exists() else None
    return found


def check_machine_code(library: Path, chosen: list[str]) -> None:
    """Every source for every architecture; for newer ones PTX without an "a", which they refuse."""
    tool = disassembler()
    if tool is None:
        return
    sources = len(list(SOURCES.glob("*.cu")))
    machine = Counter(re.findall(r"\.sm_(\w+)\.cubin", listed(tool, "-lelf", str(library))))
    assert machine == dict.fromkeys(chosen, sources)
    ptx = Counter(re.findall(r"\.sm_(\w+)\.ptx", listed(tool, "-lptx", str(library))))
    newest = max((a for a in chosen if a.isdigit()), key=int)
    assert ptx == {newest: sources}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chosen", ["80", ";".join(ARCHITECTURES)])
def test_the_library_builds_and_loads_without_a_gpu(chosen: str, tmp_path: Path) -> None:
    """CMake with ZOKERNELS_CUDA=ON, and all architectures: the ops register without a driver."""
    if not {re.sub("[a-z]", "", arch) for arch in chosen.split(";")} <= known_architectures():
        pytest.skip(f"this nvcc does not know all of {chosen}")
    configure = [
        *("cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release"),
        *("-DZOKERNELS_CPU_BACKEND=OFF", "-DZOKERNELS_CUDA=ON"),
        f"-DZOKERNELS_CUDA_ARCHITECTURES={chosen}",
        f"-DZOKERNELS_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CUDA_COMPILER={NVCC}",
    ]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    library = tmp_path / "_zokernels_cuda.so"
    check_symbols(library)
    check_machine_code(library, chosen.split(";"))
    code = (
        "import torch, ctypes, zokernels\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "ops = torch.ops.zokernels_cuda\n"
        "assert ops.table_bytes(3) == 3 * ops.table_bytes(1) > 0\n"
        "for op in ('update_', 'project_', 'linear_', 'linear_transposed_', 'sparse_rows_'):\n"
        "    getattr(ops, op)\n"
        f"assert ops.has_sm90a() is {'90a' in chosen}\n"
        "from zokernels import _load\n"
        f"native = ctypes.CDLL({str(library)!r})\n"
        "assert native.zokernels_abi_version() == _load.ABI_VERSION\n"
        "assert native.zokernels_contract_version() == _load.CONTRACT_VERSION\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_nvcc
def test_auto_builds_for_a_cuda_torch(tmp_path: Path) -> None:
    """The same headers and libraries under a version that says CUDA."""
    real, fake = Path(torch.__file__).parent, tmp_path / "torch"
    fake.mkdir()
    for part in ("include", "lib"):
        (fake / part).symlink_to(real / part)
    (fake / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    cmake = shutil.which("cmake")
    assert NVCC
    assert cmake
    command = [cmake, "-S", str(ROOT / "csrc"), "-B", str(tmp_path / "build")]
    command += [f"-DZOKERNELS_TORCH_DIR={fake}", "-DZOKERNELS_CPU_BACKEND=OFF"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    # nvcc is found where CUDA_HOME says, too.
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    env = {**os.environ, "PATH": os.pathsep.join(folders), "CUDA_HOME": str(Path(NVCC).parents[1])}
    for given, built in (("AUTO", True), ("OFF", False)):
        done = subprocess.run(
            [*command, f"-DZOKERNELS_CUDA={given}"], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        helped = subprocess.run(
            [cmake, "--build", str(tmp_path / "build"), "--target", "help"],
            capture_output=True,
            text=True,
        )
        assert ("zokernels_cuda" in helped.stdout) is built


def test_auto_builds_nothing_for_a_cpu_torch(tmp_path: Path) -> None:
    """A CPU torch cannot use the library: AUTO neither looks for nvcc nor fails without it."""
    fake = tmp_path / "torch"
    (fake / "include" / "torch" / "csrc" / "stable" / "c").mkdir(parents=True)
    (fake / "include" / "torch" / "csrc" / "stable" / "c" / "shim.h").write_text("")
    (fake / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    command = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path / "build")]
    command += [f"-DZOKERNELS_TORCH_DIR={fake}", "-DZOKERNELS_CPU_BACKEND=OFF"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no CUDA backend: torch is built without CUDA" in done.stdout
    wrong = subprocess.run([*command, "-DZOKERNELS_CUDA=maybe"], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "ZOKERNELS_CUDA must be AUTO, ON or OFF" in wrong.stderr
