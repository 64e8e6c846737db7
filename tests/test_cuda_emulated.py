"""The conformance suite over the CUDA kernels' emulation, where no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulated
import pytest
from test_conformance import *  # noqa: F403

from zokernels import _registry


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kernels = cuda_emulated.native().kernels()
    backend = _registry.Backend("cuda_emulated", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    yield backend.name
