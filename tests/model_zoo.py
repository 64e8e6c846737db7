"""Tiny randomly initialised models of many families, each with a batch that fits it.

Nothing is downloaded. Initial weights of most families leave every logit near zero and norms at
exactly one, where a wrong displacement hides; :func:`build` moves every parameter by noise of the
size of a trained model's spread, so that each one matters to the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

VOCAB, BATCH, LENGTH, CLASSES = 96, 3, 10, 3

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = dict(_DECODER, num_key_value_heads=2)
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


class Recurrent(nn.Module):
    """Embedding, one recurrent layer in both directions, mean over time, classes."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.rnn = kind(16, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0].mean(1))


def _conv() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, CLASSES),
    )
    model[1].running_mean.normal_(0, 0.3)
    model[1].running_var.uniform_(0.5, 2.0)
    return model


def _lora(base: nn.Module, **extra: Any) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **extra)
    return get_peft_model(base, config)


def _tokens(padded: bool = True) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
        mask[2, -1:] = 0
    return ids, mask


def lm_batch() -> dict[str, Tensor]:
    """Language modelling with right padding that is masked and left out of the loss."""
    ids, mask = _tokens()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def class_batch() -> dict[str, Tensor]:
    ids, mask = _tokens()
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "labels": torch.tensor([0, 2, 1]),
    }


def image_batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=g)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}


def plain_image_batch() -> tuple[Tensor, Tensor]:
    batch = image_batch()
    return batch["pixel_values"], batch["labels"]


def plain_token_batch() -> tuple[Tensor, Tensor]:
    return _tokens()[0], torch.tensor([0, 2, 1])


def plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The ``loss_fn`` of the models that are not of transformers."""
    inputs, labels = batch
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(inputs).float(), labels)


@dataclass(frozen=True)
class Case:
    """A family: how to build it, what it eats, and whether its branches stack."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    stacks: bool = True
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None


CASES: dict[str, Case] = {
    "opt": Case(lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)), lm_batch),
    "opt_untied": Case(
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT, tie_word_embeddings=False)),
        lm_batch,
    ),
    "opt_cls": Case(
        lambda: tf.OPTForSequenceClassification(
            tf.OPTConfig(**_OPT, num_labels=CLASSES, pad_token_id=0)
        ),
        class_batch,
    ),
    "gpt2": Case(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)), lm_batch),
    "gpt2_cls": Case(
        lambda: tf.GPT2ForSequenceClassification(
            tf.GPT2Config(**_GPT2, num_labels=CLASSES, pad_token_id=0)
        ),
        class_batch,
    ),
    "llama": Case(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)), lm_batch),
    "llama_tied": Case(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
        lm_batch,
    ),
    "qwen3": Case(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=8)), lm_batch),
    "gemma2": Case(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GROUPED, head_dim=8)), lm_batch),
    "phi3": Case(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED, pad_token_id=0)), lm_batch),
    "roberta": Case(lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_DECODER)), lm_batch),
    "roberta_cls": Case(
        lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(**_DECODER, num_labels=CLASSES)
        ),
        class_batch,
    ),
    "bert": Case(lambda: tf.BertForMaskedLM(tf.BertConfig(**_DECODER)), lm_batch),
    "t5": Case(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)), lm_batch),
    "t5_untied": Case(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        lm_batch,
    ),
    "mixtral": Case(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GROUPED, num_local_experts=4)),
        lm_batch,
    ),
    "qwen3_moe": Case(
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(
                **_GROUPED,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
            )
        ),
        lm_batch,
    ),
    "mamba": Case(
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
        ),
        lm_batch,
    ),
    "vit": Case(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=4,
                num_labels=CLASSES,
            )
        ),
        image_batch,
    ),
    "conv": Case(_conv, plain_image_batch, loss_fn=plain_loss),
    "lstm": Case(lambda: Recurrent(nn.LSTM), plain_token_batch, stacks=False, loss_fn=plain_loss),
    "gru": Case(lambda: Recurrent(nn.GRU), plain_token_batch, stacks=False, loss_fn=plain_loss),
    "opt_lora": Case(lambda: _lora(tf.OPTForCausalLM(tf.OPTConfig(**_OPT))), lm_batch),
    "llama_lora": Case(
        lambda: _lora(tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)), use_rslora=True),
        lm_batch,
    ),
    "opt_dora": Case(
        lambda: _lora(tf.OPTForCausalLM(tf.OPTConfig(**_OPT)), use_dora=True), lm_batch
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model of a family in evaluation mode, every parameter moved off its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CASES[name].make()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.to(dtype).eval()


def loss_of(name: str, model: nn.Module, batch: Any) -> Tensor:
    """The plain loss, with no displacement involved."""
    loss_fn = CASES[name].loss_fn
    return model(**batch).loss if loss_fn is None else loss_fn(model, batch)
