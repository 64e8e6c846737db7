"""Custom ``torch.autograd.Function`` classes in a stacked evaluation: their forward pass alone.

torch's vmap refuses those that have no rule for it: checkpointed layers, products with quantised
weights and losses in chunks are such. Where no gradient can be asked for, ``forward`` is all they
do, and its operations have rules of their own. One that has an operation without a rule, or reads
memory by address (a Triton kernel), is called once a branch, with plain tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd.function import Function, FunctionCtx
from torch.utils._pytree import tree_flatten, tree_unflatten

from zokernels.lazy import LazyParameter

_lock = threading.Lock()
_users = 0
_here = threading.local()
_apply = Function.__dict__["apply"]  # what was there before the evaluations


class _Context(FunctionCtx):
    """What ``forward`` is given: it may keep things for a backward pass that will not come."""

    saved_tensors = ()  # as torch has it until then

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
        return _apply.__get__(None, cls)(*args, **kwargs)

    def forward(*given: Any, **named: Any) -> Any:
        context = () if own_context else (_Context(len(given)),)
        return cls.forward(*context, *given, **named)

    try:
        return forward(*args, **kwargs)
    except RuntimeError:
        leaves, _ = tree_flatten((args, kwargs))
        if any(isinstance(leaf, LazyParameter) for leaf in leaves):
            raise  # it is displaced for all branches at once
        return _one_by_one(forward, args, kwargs)


def _one_by_one(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The outputs of every branch, stacked; what is no tensor is the last one's."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    level, count = interpreter.level(), interpreter.batch_size()
    leaves, spec = tree_flatten((args, kwargs))
    held = [
        functorch._unwrap_batched(leaf, level) if isinstance(leaf, Tensor) else (leaf, None)
        for leaf in leaves
    ]
    found = []
    with interpreter.lower():
        for branch in range(count):
            own = [x if dim is None else x.select(dim, branch) for x, dim in held]
            given, named = tree_unflatten(own, spec)
            found.append(tree_flatten(forward(*given, **named)))
        outputs = [
            torch.stack(same) if isinstance(same[0], Tensor) else same[-1]
            for same in zip(*(flat for flat, _ in found), strict=True)
        ]
    batched = [
        functorch._add_batch_dim(x, 0, level) if isinstance(x, Tensor) else x for x in outputs
    ]
    return tree_unflatten(batched, found[0][1])


def _only_vmap() -> bool:
    stack = functorch.get_interpreter_stack()
    return bool(stack) and all(level.key() == functorch.TransformType.Vmap for level in stack)


@contextlib.contextmanager
def forward_alone() -> Iterator[None]:
    """Let custom functions of this thread run under vmap.

    ``Function.apply`` is one for the process, so the first of several evaluations replaces it and
    the last puts it back.
    """
    global _users, _apply
    before = getattr(_here, "stacking", False)
    with _lock:
        if _users == 0:
            _apply = Function.__dict__["apply"]
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
