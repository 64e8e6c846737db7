"""Losses: of a batch, as a function; of a language model, without its logits.

For OPT-125M and 2 x 2048 tokens the logits are 823 MB and transformers makes several copies of
them; here a chunk of the vocabulary exists at a time.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.overrides import handle_torch_function, has_torch_function

from zokernels.pending import only_settles

# Settings of transformers configurations that put something between the head and the loss.
_MORE_THAN_A_HEAD = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_scale",
    "lm_head_multiplier",
    "output_logits_soft_cap",
    "output_router_logits",
    "is_encoder_decoder",
)


def loss_of(
    model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
) -> Callable[[], Tensor]:
    """The scalar loss of a batch, as a function without arguments.

    Without ``loss_fn`` it is ``model(**batch).loss``. A causal language model of transformers gets
    it by :func:`causal_lm_loss`, which needs no logits, after both agreed on a first batch.

    Raises:
        TypeError: without ``loss_fn``, ``batch`` is not a mapping. The returned function raises
            ValueError when the loss is missing or not a scalar, TypeError when it is no float
            tensor.
    """
    if loss_fn is not None:
        return lambda: scalar(loss_fn(model, batch), "loss_fn")
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping of the model's keyword arguments when there is no loss_fn; "
            f"got {type(batch).__name__}"
        )
    if logits_can_go(model, batch):
        return lambda: causal_lm_loss(model, batch)
    return lambda: own_loss(model, batch)


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    keywords = dict(batch)
    if "use_cache" not in keywords and _takes_use_cache(model):
        keywords["use_cache"] = False  # a loss needs no key-value cache; transformers keeps one
    output = model(**keywords)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None:
        raise ValueError(
            "the model's output has no loss: put labels into the batch, or give a loss_fn"
        )
    return scalar(value, "the model's loss")


# Whether causal_lm_loss equals a model's own loss, by what the comparison depends on.
_equal: weakref.WeakKeyDictionary[nn.Module, dict[object, bool]] = weakref.WeakKeyDictionary()

# Arguments that go to the decoder as they are.
_PLAIN_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels"}


def logits_can_go(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether :func:`causal_lm_loss` is this model's loss, from one comparison on real numbers."""
    if not _PLAIN_ARGUMENTS.issuperset(batch) or not isinstance(batch.get("labels"), Tensor):
        return False
    try:
        head = _linear_head(model)
    except ValueError:
        return False
    inner = _under_peft(model)
    if (
        any(map(_intercepted, (model, inner, head)))
        or hasattr(inner, "_loss_function")  # of the user's own
        or torch.is_autocast_enabled(head.weight.device.type)
    ):
        return False
    key = (model.training, head.weight.dtype, type(model), type(head), tuple(sorted(batch)))
    known = _equal.setdefault(model, {})
    if key not in known:
        if torch.compiler.is_compiling():
            return False
        devices = [head.weight.device] if head.weight.device.type == "cuda" else []
        losses = []
        with torch.no_grad():
            for loss in (own_loss, causal_lm_loss):
                with torch.random.fork_rng(devices):
                    losses.append(float(loss(model, batch)))
        if not all(map(math.isfinite, losses)):
            return False  # says nothing: compare again next time
        tolerance = 1e-5 if head.weight.dtype == torch.float32 else 2e-3
        known[key] = abs(losses[0] - losses[1]) <= tolerance * max(abs(losses[0]), 1e-3)
    return known[key]


def _intercepted(module: nn.Module) -> bool:
    """Whether something of the user's sees what a module is given or gives."""
    return bool(
        module._forward_hooks
        or not only_settles(module._forward_pre_hooks.values())
        or "forward" in module.__dict__
    )


def scalar(value: Any, source: str) -> Tensor:
    """A loss as a 0-d tensor.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: more than one element.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{source} must be a tensor, the loss; got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(
            f"{source} must be a scalar; got shape {tuple(value.shape)}: reduce it, with mean() say"
        )
    if not value.is_floating_point():
        raise TypeError(f"{source} must be floating point; got {value.dtype}")
    return value.reshape(())


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether ``model.forward`` names a ``use_cache`` argument (peft models forward theirs)."""
    return "use_cache" in inspect.signature(_under_peft(model).forward).parameters


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """Mean cross-entropy of ``softmax(x weight^T + bias)`` against ``targets``; forward only.

    Args:
        x: ``[tokens, hidden]``, of the dtype of ``weight``.
        weight: ``[vocabulary, hidden]``.
        targets: int64 ``[tokens]`` in [0, vocabulary), or ``ignore_index``.
        bias: ``[vocabulary]`` or None.
        ignore_index: target that does not count.

    Returns:
        0-d float32; NaN when no target counts, as in torch.

    Raises:
        ValueError, TypeError: a wrong shape or dtype.
        IndexError: a target outside the vocabulary.
    """
    if has_torch_function((x, weight, bias)):
        result: Tensor = handle_torch_function(
            linear_cross_entropy,
            tuple(t for t in (x, weight, bias) if t is not None),
            x,
            weight,
            targets,
            bias,
            ignore_index=ignore_index,
        )
        return result
    if torch.is_autocast_enabled(weight.device.type) or any(
        t is not None and functorch.is_batchedtensor(t) for t in (weight, bias, targets)
    ):
        return F.cross_entropy(
            F.linear(x, weight, bias).float(), targets, ignore_index=ignore_index
        )
    # A fixed head under moving layers: x alone carries the branches.
    physical, level = x, None
    if functorch.is_batchedtensor(x):
        level = functorch.maybe_get_level(x)
        physical = functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0)
    count = 1 if level is None else physical.shape[0]
    losses: Tensor = torch.ops.zokernels.linear_cross_entropy(
        physical,
        weight.detach(),
        None if bias is None else bias.detach()[None].expand(count, -1),
        targets,
        torch.empty(0, dtype=torch.int64, device=weight.device),
        torch.empty((count, 0), dtype=torch.float32, device=weight.device),
        0,
        0,
        0,
        "gaussian",
        level is None,
        ignore_index,
    )
    return losses[0] if level is None else functorch._add_batch_dim(losses, 0, level)


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a transformers causal language model, ``model(**batch).loss``, without logits.

    A ``loss_fn`` for :meth:`zokernels.MeZO.step` and :func:`zokernels.dual_loss`.

    Args:
        model: a ``...ForCausalLM`` model whose logits are a linear layer of the last hidden
            state; a peft model of one.
        batch: its keyword arguments, with ``labels`` ``[batch, tokens]`` (-100 does not count).

    Returns:
        0-d float32: mean over tokens ``t`` of the cross-entropy of the logits at ``t - 1`` against
        ``labels[:, t]``.

    Raises:
        ValueError: no labels in the batch, or a model whose logits are more than that linear layer
            (soft-capped, scaled).
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("batch must have labels")
    head = _linear_head(model)
    inner = _under_peft(model)
    rest = {key: value for key, value in batch.items() if key != "labels"}
    hidden = inner.base_model(**rest, use_cache=False).last_hidden_state[:, :-1]
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(head.weight.dtype),
        head.weight,
        labels[:, 1:].reshape(-1),
        head.bias,
    )


def _under_peft(model: nn.Module) -> Any:
    peft: Any = getattr(model, "get_base_model", None)
    return peft() if peft is not None else model


def _linear_head(model: nn.Module) -> nn.Linear:
    """The layer whose output is the logits of a causal language model.

    Raises:
        ValueError: there is none, or the logits are more than its output.
    """
    inner = _under_peft(model)
    config: Any = getattr(inner, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for setting in _MORE_THAN_A_HEAD:
        value = getattr(config, setting, None)
        if value is True or value not in (None, False, 0, 1):
            raise ValueError(
                f"causal_lm_loss needs logits that are a linear layer of the hidden state; "
                f"{type(inner).__name__} has {setting}={value}"
            )
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear) or getattr(inner, "base_model", inner) is inner:
        raise ValueError(
            f"causal_lm_loss needs a transformers causal language model with a linear head; got "
            f"{type(inner).__name__}"
        )
    return head
