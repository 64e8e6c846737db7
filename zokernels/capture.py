"""Capture a function of tensors that evaluates branches as one graph, for ``torch.compile``.

Dynamo does not trace the swapping of parameters that :mod:`zokernels.branches` does. ``make_fx``
does not need to: it runs the function once and records the ops it ends in, torch's and ours, with
seeds and coefficients as inputs. What comes out is an ordinary graph that ``torch.compile`` takes
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx


def capture(fn: Callable[..., Any], *example: Tensor) -> fx.GraphModule:
    """The graph of ``fn`` for inputs shaped like ``example``.

    ::

        def step(seeds, coeffs, input_ids, labels):          # a whole step, update included
            losses = zo.branches(model, seeds, coeffs)(
                lambda: model(input_ids=input_ids, labels=labels).loss)
            ...
        fast = torch.compile(zo.capture(step, seeds, coeffs, ids, labels), fullgraph=True)

    The graph reads the parameters where they are, so updates to them are seen; it is valid for
    these shapes, this train or eval mode and these Python values. ``fn`` runs once, on fake
    tensors: nothing is computed and nothing is changed. Evaluate the model at branches once before,
    so that stacking has been checked on real numbers.

    Args:
        fn: takes tensors, returns tensors; seeds and coefficients must be among its inputs,
            as tensors, or they are constants of the graph.
        example: one tensor per argument.

    Raises:
        TypeError: an example is not a tensor.
        RuntimeError: ``fn`` reads values of its inputs (data-dependent control flow), or the
            model's branches are not stacked.
    """
    for i, value in enumerate(example):
        if not isinstance(value, Tensor):
            raise TypeError(f"example[{i}] must be a tensor; got {type(value).__name__}")
    flag = torch.compiler._is_compiling_flag
    # transformers then avoids the shortcuts it takes after looking at a mask's values.
    torch.compiler._is_compiling_flag = True
    try:
        with torch.no_grad():
            graph = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
    finally:
        torch.compiler._is_compiling_flag = flag
    return _one_constant_per_storage(graph)


def _one_constant_per_storage(module: fx.GraphModule) -> fx.GraphModule:
    """Reach every tensor of a storage through one constant.

    A parameter enters the graph as itself (where it is updated) and as a matrix view (where it is
    displaced); compilers refuse to mutate one of two inputs that alias.
    """
    owners: dict[int, fx.Node] = {}
    constants = [node for node in module.graph.nodes if node.op == "get_attr"]

    def value(node: fx.Node) -> Tensor:
        found: Tensor = getattr(module, str(node.target))
        return found

    # A parameter owns its storage; otherwise the constant that spans most of it does.
    for node in sorted(
        constants,
        key=lambda n: (isinstance(value(n), torch.nn.Parameter), value(n).numel()),
        reverse=True,
    ):
        owners.setdefault(value(node).untyped_storage().data_ptr(), node)
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    with module.graph.inserting_before(first):
        moved = {owner: module.graph.get_attr(str(owner.target)) for owner in set(owners.values())}
    for node in constants:
        tensor = value(node)
        owner = owners[tensor.untyped_storage().data_ptr()]
        source = moved[owner]
        if node is owner or tensor is value(owner):
            node.replace_all_uses_with(source)
        else:
            with module.graph.inserting_before(node):
                view = module.graph.call_function(
                    torch.ops.aten.as_strided.default,
                    (source, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()),
                )
            node.replace_all_uses_with(view)
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]:
        if name not in used:
            delattr(module, name)
    return module
