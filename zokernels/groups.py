"""Parameter groups with and without weight decay, decided by module type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from zokernels.binding import unwrap

# GroupNorm, LayerNorm, RMSNorm, every BatchNorm and InstanceNorm, LocalResponseNorm has no weights.
NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    no_decay: Sequence[type[nn.Module]] = (*NORMS, *EMBEDDINGS),
    **options: Any,
) -> list[dict[str, Any]]:
    """Two named parameter groups: with weight decay and without.

    Without decay go parameters of at most one dimension (every bias, and the weights of any
    normalisation, a model's own RMSNorm class included), parameters a module holds as ``bias`` or
    ``..._bias`` (stacked biases of experts), parameters held by a module of the ``no_decay`` types,
    and those marked ``_no_weight_decay``. No qualified name is searched, so GPT-2's ``ln_1`` and
    Llama's ``norm`` are found. A tied weight counts as held by all its modules.

    Args:
        model: module; parameters without ``requires_grad`` are left out.
        weight_decay: of the first group; the second has 0.
        no_decay: module types whose parameters are not decayed: by default torch's normalisations
            and embeddings.
        options: further entries of both groups, such as ``lr=1e-6``.

    Returns:
        Groups for :class:`~zokernels.MeZO` (or any optimizer of torch 2.6 or later), with names; a
        group that would be empty is left out.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    model = unwrap(model)
    types = tuple(no_decay)
    spared: set[int] = set()
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (
                parameter.dim() <= 1
                or key == "bias"
                or key.endswith("_bias")
                or isinstance(module, types)
                or getattr(parameter, "_no_weight_decay", False)
            ):
                spared.add(id(parameter))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter (requires_grad)")
    groups = [
        {
            "params": [(n, p) for n, p in named if id(p) not in spared],
            "weight_decay": weight_decay,
            **options,
        },
        {"params": [(n, p) for n, p in named if id(p) in spared], "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]
