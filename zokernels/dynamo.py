"""Dynamo (``torch.compile``) and evaluations at branches: neither sees the other."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which Dynamo calls and does not trace: it exchanges a model's parameters.

    Where Dynamo is not loaded nothing is compiled, and loading it takes a second.
    """
    disabled: Any = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        result: T = disabled(*args, **kwargs)
        return result

    return call


_lock = threading.Lock()
_users = 0
_stance: Any = None


@contextlib.contextmanager
def compiled_models_run_eagerly() -> Iterator[None]:
    """Keep Dynamo from tracing into lazy parameters.

    The stance is one value for the process, so the first of several evaluations sets it and the
    last restores it.

    Raises:
        RuntimeError: inside a function that is being compiled.
    """
    global _users, _stance
    with _lock:
        if _users == 0 and "torch._dynamo" in sys.modules:
            stance = torch.compiler.set_stance("force_eager")
            stance.__enter__()
            _stance = stance
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None
