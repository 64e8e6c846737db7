"""The conformance suite over the PTX that Triton compiles for a GPU, run by the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ptx import triton_gpu
from test_conformance import *  # noqa: F403

from zokernels import _registry

Kernels = dict[str, Callable[..., object]]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with triton_gpu.backend() as found:
        yield found


@pytest.fixture
def name(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> str:
    backend = _registry.Backend("triton_ptx", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    return backend.name
