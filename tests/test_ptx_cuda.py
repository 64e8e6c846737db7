"""The conformance suite over the PTX that nvcc compiles from csrc/cuda, run by the emulator."""

from __future__ import annotations

import pytest
from ptx import cuda_gpu
from test_conformance import *  # noqa: F403

from zokernels import _registry

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(cuda_gpu.NVCC is None, reason="nvcc is not installed"),
]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    backend = _registry.Backend("cuda_ptx", ("cpu",), cuda_gpu.native().kernels())
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    return backend.name
