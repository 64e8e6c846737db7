"""Low-rank adapters on a model, in place: the few parameters that then move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from zokernels.noise import derive_seed

# Query and value projections by the names model families give them; GPT-2 and others fuse them.
TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
)


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def ensure_lora_(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: int = 16,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Freeze the model and add LoRA, unless it has adapters already.

    ``W x + (alpha / rank) B A x``: ``A`` as peft draws it, from ``seed`` and not from torch's
    global state; ``B`` zero, so the model starts where it was.

    Args:
        model: a transformers model.
        rank, alpha: of the adapters.
        targets: names of the linear layers; None: query and value projections.
        seed: of ``A``; the same on every machine that runs the same torch.

    Raises:
        ValueError: no layer has such a name.

    Source: LoRA (Hu et al. 2021).
    """
    if has_lora(model):
        return
    from peft import LoraConfig, inject_adapter_in_model

    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if targets is None:
        targets = next((t for t in TARGETS if leaves.issuperset(t)), None)
        if targets is None:
            raise ValueError(f"targets must be given: no query and value layers among {TARGETS}")
    elif not leaves.intersection(targets):
        raise ValueError(f"targets must name layers of the model; got {list(targets)}")
    chosen = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in targets]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in chosen),
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, rank))
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
