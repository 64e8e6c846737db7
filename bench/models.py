"""Models and batches of the benchmarks: random weights from configurations, nothing downloaded."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = dict[str, Tensor]


def _opt(**kwargs: int) -> PreTrainedConfig:
    return OPTConfig(use_cache=False, **kwargs)


def _smollm(**kwargs: object) -> PreTrainedConfig:
    sizes: dict[str, object] = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    return LlamaConfig(**{**sizes, **kwargs})


def config(name: str, **overrides: int) -> PreTrainedConfig:
    """Configuration of a benchmark model.

    Names: ``opt-125m``, ``opt-1.3b``, ``opt-6.7b``, ``opt-13b``, ``llama-3.2-1b``,
    ``smollm2-135m`` (their published shapes), ``tiny-opt``, ``tiny-llama``, and
    ``<name>-skeleton`` of the two smallest: the same depth at width 16, where all that is left is
    dispatch.

    Raises:
        ValueError: unknown name.
    """
    tiny = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    thin = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 1}
    match name:
        case "opt-125m":
            return _opt(**overrides)
        case "smollm2-135m":
            return _smollm(**overrides)
        case "opt-1.3b" | "opt-6.7b" | "opt-13b":
            hidden, layers, heads = {"1.3b": (2048, 24, 32), "6.7b": (4096, 32, 32)}.get(
                name.removeprefix("opt-"), (5120, 40, 40)
            )
            sizes = {
                "hidden_size": hidden,
                "word_embed_proj_dim": hidden,
                "ffn_dim": 4 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
            }
            return _opt(**{**sizes, **overrides})
        case "llama-3.2-1b":
            sizes = {
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            }
            return _smollm(**{**sizes, **overrides})
        case "tiny-opt":
            extra = {
                "ffn_dim": 64,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 128,
            }
            return _opt(**{**tiny, **extra, **overrides})
        case "tiny-llama":
            return _smollm(
                **{
                    **tiny,
                    "intermediate_size": 64,
                    "num_key_value_heads": 1,
                    **overrides,
                }
            )
        case "opt-125m-skeleton":
            return _opt(**{**thin, "ffn_dim": 16, "word_embed_proj_dim": 16, **overrides})
        case "smollm2-135m-skeleton":
            return _smollm(
                **{
                    **thin,
                    "intermediate_size": 16,
                    "num_key_value_heads": 1,
                    **overrides,
                }
            )
    raise ValueError(f"model must be opt-125m, smollm2-135m, tiny-opt or tiny-llama; got {name!r}")


def build(
    name: str,
    dtype: str = "fp32",
    *,
    seed: int = 0,
    device: str = "cpu",
    **overrides: int,
) -> PreTrainedModel:
    """A causal language model with random weights, in eval mode.

    Raises:
        ValueError: unknown name or dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}; got {dtype!r}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **overrides), dtype=DTYPES[dtype])
    return model.eval().to(device)


def cast_(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Convert the parameters of a model; buffers (rotary frequencies) stay in float32."""
    for p in model.parameters():
        p.data = p.data.to(DTYPES[dtype])
    return model


def random_batch(model: PreTrainedModel, size: int, length: int, *, seed: int = 0) -> Batch:
    """Random tokens in the ``labels=`` convention: int64 ``[size, length]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, model.config.vocab_size, (size, length), generator=generator)
    ids = ids.to(model.device)
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Text:
    """Characters of a text as token ids, split into a training and a held-out part."""

    train: Tensor
    held_out: Tensor
    vocab: int

    @classmethod
    def of(cls, text: str, vocab: str) -> Text:
        """Encode ``text``; characters outside ``vocab`` are dropped."""
        index = {c: i for i, c in enumerate(vocab)}
        ids = torch.tensor([index[c] for c in text if c in index])
        cut = int(ids.numel() * 0.9)
        return cls(ids[:cut], ids[cut:], len(vocab))

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random windows of the training part."""
        start = torch.randint(0, self.train.numel() - length, (size,), generator=generator)
        ids = torch.stack([self.train[s : s + length] for s in start.tolist()])
        return {"input_ids": ids, "labels": ids}

    def evaluation(self, size: int, length: int) -> Batch:
        """Evenly spaced windows of the held-out part."""
        starts = torch.linspace(0, self.held_out.numel() - length, size).long().tolist()
        ids = torch.stack([self.held_out[s : s + length] for s in starts])
        return {"input_ids": ids, "labels": ids}


# Printable ASCII; the code below relies on nothing else.
VOCAB = "\n" + "".join(map(chr, range(32, 127)))


def english() -> Text:
    """The Python language reference the interpreter ships: 460,000 characters of prose."""
    return Text.of("\n".join(pydoc_data.topics.topics.values()), VOCAB)


def capitals() -> Text:
    """The same prose in capital letters: far enough from :func:`english` for a large gradient."""
    return Text.of("\n".join(pydoc_data.topics.topics.values()).upper(), VOCAB)


def text_model(*, seed: int = 0, hidden: int = 64, layers: int = 2) -> PreTrainedModel:
    """An untrained character model (Llama blocks) over :data:`VOCAB`."""
    return build(
        "tiny-llama",
        seed=seed,
        vocab_size=len(VOCAB),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


def pretrain(
    model: PreTrainedModel,
    text: Text,
    *,
    steps: int,
    size: int = 16,
    length: int = 64,
    seed: int = 0,
) -> float:
    """Train with backpropagation (AdamW), so that fine-tuning starts from a model that has learnt.

    Returns:
        Mean loss of the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = model(**text.batch(size, length, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
