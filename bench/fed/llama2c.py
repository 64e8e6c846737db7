"""A llama2.c checkpoint and tokenizer as a transformers model; a play as records by speaker.

::

    python -m bench.fed.llama2c --checkpoint stories260K.bin --tokenizer tok512.bin --out MODEL
    python -m bench.fed.llama2c --play tiny_shakespeare.txt --out DATA
"""

from __future__ import annotations

import argparse
import json
import re
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def model_of(path: Path) -> LlamaForCausalLM:
    """The model of a version-0 checkpoint: seven int32 of configuration, then float32 tensors."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, dtype=np.float32, offset=28).copy())
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return values[at - count : at].view(shape)

    size = dim // heads
    kv = kv_heads * size
    embedding = take(abs(vocab), dim)
    norm1, q = take(layers, dim), take(layers, dim, dim)
    k, v, o = take(layers, kv, dim), take(layers, kv, dim), take(layers, dim, dim)
    norm2 = take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    last = take(dim)
    take(length, size)  # rotary tables
    head = embedding if vocab > 0 else take(-vocab, dim)

    def halves(w: Tensor, count: int) -> Tensor:
        """Rotary pairs (0, 1), (2, 3), ... as transformers has them: (0, n/2), (1, n/2 + 1), ..."""
        return w.view(count, size // 2, 2, dim).transpose(1, 2).reshape(w.shape)

    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": last}
    state["lm_head.weight"] = head
    for i in range(layers):
        block = f"model.layers.{i}."
        state |= {
            block + "input_layernorm.weight": norm1[i],
            block + "self_attn.q_proj.weight": halves(q[i], heads),
            block + "self_attn.k_proj.weight": halves(k[i], kv_heads),
            block + "self_attn.v_proj.weight": v[i],
            block + "self_attn.o_proj.weight": o[i],
            block + "post_attention_layernorm.weight": norm2[i],
            block + "mlp.gate_proj.weight": gate[i],
            block + "mlp.down_proj.weight": down[i],
            block + "mlp.up_proj.weight": up[i],
        }
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer: SentencePiece's byte pair encoding, merges in the order of the scores."""
    data = path.read_bytes()
    pieces: list[str] = []
    at = 4
    while at < len(data):
        _, length = struct.unpack("fi", data[at : at + 8])
        piece = data[at + 8 : at + 8 + length].decode("utf-8")
        pieces.append(piece.replace(" ", "▁"))
        at += 8 + length
    pieces[1:3] = ["<s>", "</s>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def play(text: str, least: int = 40) -> list[dict[str, str]]:
    """Speeches of at least ``least`` characters, with their speakers."""
    speeches = []
    for block in re.split(r"\n\s*\n", text):
        speaker, _, speech = block.strip().partition(":\n")
        if len(speech) >= least and len(speaker) < 30:
            speeches.append({"text": speech.strip(), "speaker": speaker})
    return speeches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--play", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint is not None:
        model_of(args.checkpoint).save_pretrained(args.out)
        tokenizer_of(args.tokenizer).save_pretrained(args.out)
    if args.play is not None:
        speeches = play(args.play.read_text(encoding="utf-8"))
        held = [s for i, s in enumerate(speeches) if i % 10 == 9]
        kept = [s for i, s in enumerate(speeches) if i % 10 != 9]
        for name, rows in (("train", kept), ("test", held)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
