"""Shared fixtures: which backends are under test, and poisoned memory.

``ZOKERNELS_TEST_REQUIRE`` names the backends that must be usable, ``reference,cpp,triton`` by
default: a run without one of them stops with an error instead of passing on what is left. Where
there is no GPU, Triton must be installed: its interpreter and its compiler are what is tested.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

# Set before transformers is imported: nothing in the tests may reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from zokernels import _registry

# Fixed examples: a red test stays red on the next run, and a green one is not luck.
settings.register_profile("zokernels", derandomize=True, deadline=None, database=None)
settings.load_profile("zokernels")

REQUIRED = [
    name.strip()
    for name in os.environ.get("ZOKERNELS_TEST_REQUIRE", "reference,cpp,triton").split(",")
    if name.strip()
]


def _interpreter_takes_any_numpy() -> None:
    """Triton 3.6's interpreter makes a number of an array of one element, as NumPy 2.5 refuses."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def available_backends() -> list[str]:
    """Names of the backends that can run here."""
    return [name for name, backend in _registry.backends().items() if backend.reason is None]


def pytest_configure(config: pytest.Config) -> None:
    # Shapes are tiny: a second thread only waits (20 times slower on a busy machine). Tests of
    # thread independence ask for threads themselves.
    torch.set_num_threads(1)
    _interpreter_takes_any_numpy()
    known = _registry.backends()
    for name in REQUIRED:
        if name not in known:
            raise pytest.UsageError(
                f"ZOKERNELS_TEST_REQUIRE names the unknown backend {name!r}; known: {sorted(known)}"
            )
        if name == "triton" and not torch.cuda.is_available() and find_spec("triton"):
            continue
        if known[name].reason is not None:
            raise pytest.UsageError(f"required backend {name!r} is off: {known[name].reason}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"backend {name}: {backend.reason or 'on'}"
        for name, backend in _registry.backends().items()
    ]


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every usable backend, with that backend forced."""
    with _registry.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh memory (``torch.empty`` at every level) with NaN or the largest integer.

    A kernel that forgets an element then gives a wrong number and not, by luck, a zero.
    """
    previous = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(previous, warn_only=warn_only)


def _compiler_stance() -> str:
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames._stance.stance if frames is not None else "default"


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Every test starts from the same global random state and leaves torch's settings alone."""
    torch.manual_seed(0)
    before = {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "thread count": torch.get_num_threads(),
        "compiler stance": "default",
    }
    yield
    after = {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "thread count": torch.get_num_threads(),
        "compiler stance": _compiler_stance(),
    }
    torch.set_grad_enabled(before["grad mode"])
    torch.set_default_dtype(before["default dtype"])
    torch.set_num_threads(before["thread count"])
    if after["compiler stance"] != "default":
        torch.compiler.set_stance("default")
    leaked = [what for what in before if before[what] != after[what]]
    assert not leaked, f"the test changed global state: {leaked}"
