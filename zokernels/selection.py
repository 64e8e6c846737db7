"""Which parameters of a model are meant: names, a predicate, or those that require gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

Selection = Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def unwrap(model: nn.Module) -> nn.Module:
    """The module under DistributedDataParallel, DataParallel and ``torch.compile`` wrappers.

    Names, and so noise, do not depend on how a model is wrapped.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def selected(model: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
    """The selected parameters by qualified name, in the model's order; shared ones once.

    Args:
        model: an unwrapped module.
        params: names, a predicate ``(name, parameter) -> bool``, or None for those with
            ``requires_grad``.

    Raises:
        ValueError: a name is unknown, or nothing is selected.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {n: p for n, p in named.items() if p.requires_grad}
    elif callable(params):
        chosen = {n: p for n, p in named.items() if params(n, p)}
    else:
        asked = [params] if isinstance(params, str) else list(params)
        unknown = [n for n in asked if n not in named]
        if unknown:
            raise ValueError(f"params must name parameters of the model; unknown: {unknown[:5]}")
        wanted = set(asked)
        chosen = {n: p for n, p in named.items() if n in wanted}
    if not chosen:
        raise ValueError(
            "params selects no parameter: the model has no trainable parameter "
            "(requires_grad), or the selection matches none"
        )
    return chosen
