"""The Triton backend without a GPU: conformance in Triton's interpreter, in its own process.

The interpreter runs the kernels as written, on CPU tensors, one program after the other. It has no
bfloat16 arithmetic: there the kernels upcast first and round by integers
(:func:`zokernels.triton.noise.nearest`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zokernels import _registry

ROOT = Path(__file__).resolve().parents[1]

# The interpreter takes its time: bfloat16 products and replays that differ from another test in the
# distribution or the layout only go without. Float32 and float16 run in full.
_TWICE = (
    "bfloat16 and ((rademacher and (test_linear or cross_entropy or many_seeds)) "
    "or (test_linear and conv1d))"
)
_TWICE_MASKED = (
    "bfloat16 and (int32 or (test_displace and not bfloat16-0]) "
    "or (test_linear and (shared-transposed or stacked-])))"
)


def interpreted(*arguments: str, **environment: str) -> int:
    """Run pytest with the interpreter; how many tests passed. None may fail or be skipped."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout=900",
            *arguments,
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "ZOKERNELS_TEST_REQUIRE": "reference,triton",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary
    found = re.search(r"(\d+) passed", summary)
    assert found is not None, summary
    return int(found.group(1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_conformance() -> None:
    assert interpreted("tests/test_conformance.py", "-k", f"triton and not ({_TWICE})") >= 80


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_conformance_of_displaced_tiles() -> None:
    """The plan for many tokens, at the shapes of the suite."""
    chosen = "triton and float32 and gaussian and (test_linear or cross_entropy)"
    files = ("tests/test_conformance.py", "-k", chosen)
    assert interpreted(*files, ZOKERNELS_GPU="crossover=0") == 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_conformance_under_a_mask() -> None:
    chosen = f"triton and not ({_TWICE_MASKED})"
    assert interpreted("tests/test_sparse_conformance.py", "-k", chosen) >= 50


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_steps_with_a_pending_update() -> None:
    assert interpreted("tests/test_pending.py", "-k", "same_run and triton-opt-dtype0") == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rest() -> None:
    assert interpreted("tests/triton_interpreted.py", "tests/triton_interpreted_sparse.py") >= 25


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is on")
def test_without_a_gpu_the_backend_says_why_it_is_off() -> None:
    found = _registry.backends()["triton"]
    assert found.reason == "ImportError: torch sees no CUDA device"
    with pytest.raises(RuntimeError, match="'triton' was asked for but is off: ImportError: torch"):
        _registry._force("triton")
