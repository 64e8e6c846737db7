"""Before any number: the CUDA library built for the GPU that is present, conformance, sanitizer.

A backend is timed once the conformance suites have passed with it on this device. A pass is kept
in ``build/gpu-checks.json`` and counts as long as neither the sources, nor torch, nor the device
change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.gpu.machine import setting
from bench.harness import ROOT, cores

SUITES = (
    "tests/test_conformance.py",
    "tests/test_sparse_conformance.py",
    "tests/test_device.py",
)
BUILD = ROOT / "build"
KEPT = BUILD / "gpu-checks.json"
LIBRARY = ROOT / "zokernels" / "_zokernels_cuda.so"
# One test of every kind of kernel, of the dtype that every backend treats apart.
SANITIZED = (
    "test_sample_is_the_same_from_any_tile or test_displace_into_scratch or "
    "(test_update_rademacher_is_exact and bfloat16) or (test_project and bfloat16) or "
    "(test_linear and bfloat16) or (test_embedding_is and bfloat16) or "
    "(test_linear_cross_entropy and bfloat16) or (test_update and bfloat16)"
)
TOOLS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Check:
    """What became of a check.

    Attributes:
        what: its name; state: ``"passed"``, ``"failed"``, ``"no time"`` or ``"not run"``.
        detail: counts, or the reason; seconds: it took.
    """

    what: str
    state: str
    detail: str
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ran and passed."""
        return self.state == "passed"

    def __str__(self) -> str:
        return f"{self.what}: {self.state}, {self.detail}, {self.seconds:.0f} s"


def run(
    command: Sequence[str], limit: float, env: Mapping[str, str] | None = None
) -> tuple[int | None, float]:
    """Run a command from the repository's root; its output goes where ours goes.

    Returns:
        Exit status, or None when it was ended, with all its children, at ``limit`` seconds; and
        the seconds it took.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(env or {})}
    begin = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env=given, start_new_session=True)
    status: int | None = None
    try:
        status = child.wait(timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        pass
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=20)  # a driver may hold it for longer
    return status, time.perf_counter() - begin


def architecture_option(capability: tuple[int, int]) -> str:
    """A compute capability as ``csrc/CMakeLists.txt`` spells it, such as ``90a``."""
    number = f"{capability[0]}{capability[1]}"
    text = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    listed = re.search(r'ZOKERNELS_CUDA_ARCHITECTURES "([^"]+)" CACHE', text)
    known = listed.group(1).split(";") if listed else []
    return next((k for k in known if re.sub("[a-z]", "", k) == number), number)


def _program(name: str) -> str | None:
    """A program on the path, beside this interpreter, or of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places = (name, str(Path(sys.executable).with_name(name)), f"{home}/bin/{name}")
    return next(filter(None, map(shutil.which, places)), None)


def build_cuda(capability: tuple[int, int], limit: float, output: Path = LIBRARY) -> Check:
    """Build ``csrc/cuda`` for one architecture, and put the library next to the package."""
    what = f"build for {architecture_option(capability)}"
    compiler, cmake = _program("nvcc"), _program("cmake")
    if compiler is None or cmake is None:
        return Check(what, "not run", "nvcc is missing" if cmake else "cmake is missing")
    ninja = _program("ninja")
    folder = BUILD / f"gpu-{architecture_option(capability)}"
    configure = [
        *(cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
        *("-DZOKERNELS_CPU_BACKEND=OFF", "-DZOKERNELS_CUDA=ON"),
        f"-DZOKERNELS_CUDA_ARCHITECTURES={architecture_option(capability)}",
        f"-DZOKERNELS_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CUDA_COMPILER={compiler}",
        *(("-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
    ]
    spent = 0.0
    for command in (configure, [cmake, "--build", str(folder), "--parallel", str(cores())]):
        status, seconds = run(command, limit - spent)
        spent += seconds
        if status != 0:
            state = "no time" if status is None else "failed"
            return Check(what, state, " ".join(command[:4]), spent)
    # Whole or not at all: a process that loads it meanwhile must not see half a file.
    fresh = output.with_suffix(".so.new")
    shutil.copyfile(folder / "_zokernels_cuda.so", fresh)
    os.replace(fresh, output)
    return Check(what, "passed", str(output), spent)


def _digest(backend: str, device: str) -> str:
    """Of everything a pass depends on."""
    files = [p for kind in ("*.py", "*.json") for p in (ROOT / "zokernels").rglob(kind)]
    files += [ROOT / suite for suite in SUITES] + [ROOT / "tests" / "conftest.py"]
    if backend == "cuda":
        files += [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
        files += [LIBRARY] if LIBRARY.is_file() else []
    given = (backend, device, torch.__version__, setting())
    found = hashlib.sha256("\0".join(given).encode())
    for path in sorted(files):
        found.update(f"\0{path.relative_to(ROOT)}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _kept() -> dict[str, str]:
    try:
        found = json.loads(KEPT.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def missing() -> list[str]:
    """Packages the suites need that are not installed."""
    return [name for name in ("pytest", "hypothesis") if find_spec(name) is None]


def conformance(backend: str, device: str, limit: float, *, keep: bool = True) -> Check:
    """The suites with one backend on the device; pytest's output is printed.

    Args:
        backend: name; device: the part's name.
        limit: seconds.
        keep: take an earlier pass for this one, and remember a pass.
    """
    what = f"conformance of {backend}"
    if absent := missing():
        return Check(what, "not run", f"{', '.join(absent)} missing: pip install them")
    digest, key = _digest(backend, device), f"{backend} {setting()}".strip()
    before = _kept().get(key, "")
    if keep and before.partition(" ")[0] == digest:
        return Check(what, "passed", f"{before.partition(' ')[2]} in an earlier run, same sources")
    workers = min(14, cores() - 2)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--maxfail=5", "-p", "no:cacheprovider"),
            *("-k", backend, "-o", "timeout=600", f"--junitxml={report}", *SUITES),
        ]
        if workers > 1 and find_spec("xdist"):
            # Triton's compiler takes most of the time, and unequally.
            command += ["-n", str(workers), "--dist", "worksteal"]
        require = {"ZOKERNELS_TEST_REQUIRE": f"reference,{backend}"}
        status, seconds = run(command, limit, require)
        counts = _counts(report)
    if status is None:
        return Check(what, "no time", f"not done after {limit:.0f} s", seconds)
    if status != 0 or counts["passed"] == 0:
        return Check(what, "failed", _text(counts), seconds)
    if keep:
        kept = {**_kept(), key: f"{digest} {_text(counts)}"}
        with contextlib.suppress(OSError):  # a checkout that cannot be written to
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    return Check(what, "passed", _text(counts), seconds)


def _counts(report: Path) -> dict[str, int]:
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    if report.is_file():
        for suite in ElementTree.parse(report).iter("testsuite"):
            tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            found["failed"] += failed
            found["skipped"] += skipped
            found["passed"] += tests - failed - skipped
    return found


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in counts.items())


def sanitize(backend: str, tool: str, limit: float) -> Check:
    """A small part of the suites under compute-sanitizer."""
    what = f"{tool} of {backend}"
    found = _program("compute-sanitizer")
    if found is None:
        return Check(what, "not run", "compute-sanitizer is not installed")
    if absent := missing():
        return Check(what, "not run", f"{', '.join(absent)} missing: pip install them")
    command = [
        *(found, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all"),
        *("--launch-timeout", "60", "--print-limit", "20"),
        # torch asks the driver what it may not have; errors of launches raise in the tests.
        *("--report-api-errors", "no"),
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        *("-k", f"{backend} and ({SANITIZED})", "-o", "timeout=600", *SUITES[:2]),
    ]
    env = {
        "ZOKERNELS_TEST_REQUIRE": f"reference,{backend}",
        # An access beyond a tensor must not fall into a neighbour of the same allocation.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    status, seconds = run(command, limit, env)
    if status is None:
        return Check(what, "no time", f"not done after {limit:.0f} s", seconds)
    detail = "clean" if status == 0 else "errors" if status == 86 else f"exit status {status}"
    return Check(what, "passed" if status == 0 else "failed", detail, seconds)
