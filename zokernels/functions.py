"""Custom ``torch.autograd.Function`` classes in a stacked evaluation: their forward pass alone.

torch's vmap refuses those that have no rule for it: checkpointed layers, products with quantised
weights and losses in chunks are such. Where no gradient can be asked for, ``forward`` is all they
do, and its operations have rules of their own. (One that reads memory by address still fails, and
the branches then run one after another.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch.autograd.function import Function, FunctionCtx

_lock = threading.Lock()
_users = 0
_here = threading.local()
_apply = Function.__dict__["apply"]


class _Context(FunctionCtx):
    """What ``forward`` is given: it may keep things for a backward pass that will not come."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs


def _forward_alone(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    own_context = cls.setup_context is not Function.setup_context
    ruled = own_context and (cls.generate_vmap_rule or cls.vmap is not Function.vmap)
    if (
        ruled
        or not getattr(_here, "stacking", False)
        or torch.is_grad_enabled()
        or not _only_vmap()
    ):
        return _apply.__func__(cls, *args, **kwargs)
    if own_context:
        return cls.forward(*args, **kwargs)
    return cls.forward(_Context(len(args)), *args, **kwargs)


def _only_vmap() -> bool:
    stack = functorch.get_interpreter_stack() or []
    return all(level.key() == functorch.TransformType.Vmap for level in stack)


@contextlib.contextmanager
def forward_alone() -> Iterator[None]:
    """Let custom functions of this thread run under vmap.

    ``Function.apply`` is one for the process, so the first of several evaluations replaces it and
    the last puts it back.
    """
    global _users
    before = getattr(_here, "stacking", False)
    with _lock:
        if _users == 0:
            Function.apply = classmethod(_forward_alone)  # type: ignore[method-assign,assignment]
        _users += 1
    _here.stacking = True
    try:
        yield
    finally:
        _here.stacking = before
        with _lock:
            _users -= 1
            if _users == 0:
                Function.apply = _apply  # type: ignore[method-assign]
