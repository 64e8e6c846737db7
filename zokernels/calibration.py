"""Squared gradients of a model over calibration batches, in little memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokernels.losses import own_loss, scalar


def squared_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    max_elements: int | None,
) -> Iterator[tuple[str, Tensor]]:
    """Mean over batches of the squared gradient, float32, parameter by parameter in order.

    Args:
        model: the module that holds ``parameters``.
        parameters: by name.
        batches, loss_fn, max_elements: see :meth:`zokernels.Mask.calibrate`.
    """
    if max_elements is not None:
        if max_elements < 1:
            raise ValueError(f"max_elements must be at least 1 or None; got {max_elements}")
        if not isinstance(batches, Sequence):
            raise TypeError(
                f"batches must be a sequence when max_elements is given, because they are read "
                f"several times; got {type(batches).__name__}"
            )
    for group in _groups(parameters, max_elements):
        squares = _sweep(model, group, batches, loss_fn)
        for name in group:
            yield name, squares.pop(name)


def _groups(
    parameters: Mapping[str, nn.Parameter], limit: int | None
) -> Iterator[dict[str, nn.Parameter]]:
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, p in parameters.items():
        if group and limit is not None and size + p.numel() > limit:
            yield group
            group, size = {}, 0
        group[name] = p
        size += p.numel()
    yield group


def _sweep(
    model: nn.Module,
    group: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            # Whole in the batch's backward pass: a hook runs once all uses have been added up.
            square = gradient.detach().float().square_()
            if not bool(torch.isfinite(square).all()):
                raise ValueError(f"the squared gradient of parameter {name!r} is not finite")
            found = squares.get(name)
            squares[name] = square if found is None else found.add_(square)
            parameter.grad = None

        return hook

    count = 0
    with _only(model, group), contextlib.ExitStack() as stack, torch.enable_grad():
        for name, p in group.items():
            handle = p.register_post_accumulate_grad_hook(collect(name))
            stack.callback(handle.remove)
        for batch in batches:
            count += 1
            if loss_fn is None:
                if not isinstance(batch, Mapping):
                    raise TypeError(
                        f"a batch must be a mapping of the model's keyword arguments when there is "
                        f"no loss_fn; got {type(batch).__name__}"
                    )
                loss = own_loss(model, batch)
            else:
                loss = scalar(loss_fn(model, batch), "loss_fn")
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"the loss of batch {count - 1} is {float(loss.detach())}")
            if not loss.requires_grad:
                raise ValueError(
                    f"the loss does not depend differentiably on {next(iter(group))!r}: was it "
                    f"taken without gradients?"
                )
            loss.backward()
    if count == 0:
        raise ValueError("batches must have at least one batch")
    untouched = [name for name in group if name not in squares]
    if untouched:
        raise ValueError(f"no batch gave these parameters a gradient: {untouched[:5]}")
    return {name: square.div_(count) for name, square in squares.items()}


@contextlib.contextmanager
def _only(model: nn.Module, group: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only a group's parameters require gradients, and none has one yet."""
    every = list(model.parameters())
    kept = [(p.requires_grad, p.grad) for p in every]
    wanted = {id(p) for p in group.values()}
    try:
        for p in every:
            p.grad = None
            # Quantised and integer parameters cannot require gradients.
            if p.is_floating_point():
                p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, (flag, gradient) in zip(every, kept, strict=True):
            if p.is_floating_point():
                p.requires_grad_(flag)
            p.grad = gradient
