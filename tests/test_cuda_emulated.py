"""The conformance suite over the CUDA kernels' emulation, where no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulated
import model_zoo as zoo
import pytest
import torch
from test_conformance import *  # noqa: F403

import zokernels as zo
from zokernels import _ops, _registry


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kernels = cuda_emulated.native().kernels()
    backend = _registry.Backend("cuda_emulated", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    yield backend.name


def test_every_op_of_the_backend_is_an_op() -> None:
    assert set(cuda_emulated.native().kernels()) <= set(_ops.SCHEMAS)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_steps_of_a_model(name: str, kind: str) -> None:
    """Two steps of a small language model, as the C++ backend takes them."""
    taken = {}
    for backend in ("cpp", name):
        model, batch = zoo.build(kind).eval(), zoo.lm_batch()
        with _registry.use_backend(backend):
            opt = zo.MeZO(model, lr=1e-3, eps=1e-2)
            losses = [float(opt.step(batch)) for _ in range(2)]
        taken[backend] = (losses, [p.detach() for p in model.parameters()])
    (want, weights), (got, mine) = taken.values()
    assert got == pytest.approx(want, rel=1e-5)
    for a, b in zip(mine, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
