"""What Triton compiles for compute capability 8.0, run by the emulator of PTX: conformance."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ptx import triton_gpu
from ptx.cases import Case, conformance

from zokernels import _registry

Kernels = dict[str, Callable[..., object]]

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with triton_gpu.backend() as found:
        yield found


@pytest.fixture
def name(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> str:
    backend = _registry.Backend("triton_ptx", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    return backend.name


@conformance
def test_conformance(name: str, case: Case) -> None:
    test, values = case
    test(name, *values)
