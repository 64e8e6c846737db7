"""A random two-layer language model with a tokenizer of single bytes, saved like a real one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# Two label words of one token each (a space becomes Ġ), so that both ways of scoring are used.
MERGES = [("Ġ", "b"), ("Ġb", "a"), ("Ġba", "d"), ("Ġ", "g"), ("Ġg", "o"), ("Ġgo", "o")]
MERGES += [("Ġgoo", "d")]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, ``<end>``, and the merges above."""
    pieces = ["<end>", *ALPHABET, *("".join(pair) for pair in MERGES)]
    raw = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def save(folder: Path, architecture: str = "llama") -> Path:
    """Write the model and its tokenizer; the weights are the same every time."""
    words = tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(words),
        hidden_size=16,
        word_embed_proj_dim=16,
        intermediate_size=32,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        init_std=0.2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_labelled(path: Path, count: int = 60) -> Path:
    """Records with a text, a label that the text gives away, and a prompt and completion."""
    rows = [
        {
            "text": ("xx" if i % 2 else "yy") + str(i),
            "label": i % 2,
            "prompt": f"{i}+{i}=",
            "completion": str(2 * i),
        }
        for i in range(count)
    ]
    columns = list(rows[0])
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif path.suffix == ".json":
        text = json.dumps(rows)
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
        text = "".join(comma.join(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path
