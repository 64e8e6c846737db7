"""The conformance suite of the ops under a mask over the CUDA kernels' emulation."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulated
import pytest
import test_sparse_conformance as suite
from test_sparse_conformance import *  # noqa: F403

from zokernels import _registry


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kernels = cuda_emulated.native().kernels()
    backend = _registry.Backend("cuda_emulated", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    yield backend.name


# The suite's own loop over the backends.
@pytest.fixture(autouse=True)
def only_this_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BACKENDS", [name])


def test_the_backend_has_every_op_under_a_mask() -> None:
    assert set(suite.SPARSE) <= set(cuda_emulated.native().kernels())
