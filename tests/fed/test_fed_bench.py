"""The experiments' helpers: conversion of models, mixtures of text, the search for rates."""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import torch

from bench.fed import bed, llama2c, mixture, vpcs

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = 8, 12, 2, 2, 1, 11, 16


def reference_logits(values: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """llama2.c's forward pass in float64: rotary pairs are neighbours."""
    size = DIM // HEADS

    def norm(x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w

    def rotate(x):
        out = x.copy()
        for t in range(x.shape[0]):
            for i in range(0, size, 2):
                angle = t * 10000.0 ** (-i / size)
                a, b = x[t, :, i].copy(), x[t, :, i + 1].copy()
                out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, :, i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = values["embedding"][tokens]
    n = len(tokens)
    for i in range(LAYERS):
        h = norm(x, values["norm1"][i])
        q = rotate((h @ values["q"][i].T).reshape(n, HEADS, size))
        k = rotate((h @ values["k"][i].T).reshape(n, KV_HEADS, size))
        v = (h @ values["v"][i].T).reshape(n, KV_HEADS, size)
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weights, v).reshape(n, DIM) @ values["o"][i].T
        h = norm(x, values["norm2"][i])
        gate, up = h @ values["gate"][i].T, h @ values["up"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ values["down"][i].T
    return norm(x, values["last"]) @ values["embedding"].T


def test_a_llama2c_checkpoint_gives_the_same_logits(tmp_path):
    random = np.random.default_rng(0)
    kv = KV_HEADS * DIM // HEADS
    shapes = {
        "embedding": (VOCAB, DIM),
        "norm1": (LAYERS, DIM),
        "q": (LAYERS, DIM, DIM),
        "k": (LAYERS, kv, DIM),
        "v": (LAYERS, kv, DIM),
        "o": (LAYERS, DIM, DIM),
        "norm2": (LAYERS, DIM),
        "gate": (LAYERS, HIDDEN, DIM),
        "down": (LAYERS, DIM, HIDDEN),
        "up": (LAYERS, HIDDEN, DIM),
        "last": (DIM,),
        "rotary": (LENGTH, DIM // HEADS),
    }
    values = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    header = struct.pack("7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH)
    path = tmp_path / "model.bin"
    path.write_bytes(header + b"".join(v.tobytes() for v in values.values()))
    model = llama2c.model_of(path).eval()
    tokens = [1, 5, 3, 9, 2]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits, reference_logits(values, tokens), rtol=1e-4, atol=1e-4)


def test_a_llama2c_tokenizer_merges_the_best_pair_first(tmp_path):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]
    pieces += [b" a", b"bc", b" ab", b" ", b"a", b"b", b"c"]
    data = struct.pack("i", 7)
    for rank, piece in enumerate(pieces):
        data += struct.pack("fi", -float(rank), len(piece)) + piece
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    tokenizer = llama2c.tokenizer_of(path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc ab\n").input_ids) == [
        "▁a", "bc", "▁ab", "<0x0A>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("abc ab\n").input_ids) == "abc ab\n"


def test_a_play_gives_speeches_by_speaker():
    text = f"ROMEO:\n{'a' * 50}\n\nJULIET:\nshort\n\nJULIET:\n{'b' * 50}\n"
    assert llama2c.play(text) == [
        {"text": "a" * 50, "speaker": "ROMEO"},
        {"text": "b" * 50, "speaker": "JULIET"},
    ]


def test_a_mixture_keeps_kinds_and_no_text_is_on_both_sides(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(f"play {i} " * 12 for i in range(30)))
    rows = [{"q": f"why {i} " * 6, "a": f"so {i} " * 6} for i in range(30)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [f"plays={tmp_path / 'a.txt'}", f"maths={tmp_path / 'b.jsonl'}:q,a"]
    out = ["--out", str(tmp_path / "out"), "--per-kind", "12", "--held-out", "5"]
    monkeypatch.setattr(sys, "argv", ["mixture", *sources, *out])
    mixture.main()
    parts = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()]
        for name in ("train", "test")
    }
    for name, count in (("train", 12), ("test", 5)):
        kinds = [row["kind"] for row in parts[name]]
        assert kinds.count("plays") == kinds.count("maths") == count
    assert not {r["text"] for r in parts["train"]} & {r["text"] for r in parts["test"]}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bed")
    tiny_lm.save(folder / "model")
    rows = [{"text": ("xx" if i % 2 else "yy") * 9, "kind": f"k{i % 3}"} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c4.jsonl").write_text(json.dumps({"text": "the cat sat " * 500}) + "\n")
    parser = bed.arguments("", model=str(folder / "model"))
    args = parser.parse_args(
        ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--task", "text",
         "--split", "natural:kind", "--clients", "3", "--calibration", str(folder / "c4.jsonl"),
         "--results", str(folder / "results"), "--batch-size", "2"]
    )  # fmt: skip
    assert isinstance(args, argparse.Namespace)
    return bed.Bed("test", args, ("case", "phase", "lr", "seed"))


def test_a_finished_run_is_not_run_again(table: bed.Bed, monkeypatch):
    key = {"case": "a", "phase": "final", "lr": "1.00e-03", "seed": 0}
    options = {"lr": 1e-3, "steps": 1, "density": 0.05}
    row = table.run(key, "meerkat", options, rounds=2, seed=0)
    assert row["uplink"] <= 4 + 64 and row["dense_uplink"] > 100 * row["uplink"]
    assert row["loss"] != row["loss_before"] and Path(table.path).is_file()

    def fail(*_args, **_options):
        raise AssertionError("ran again")

    monkeypatch.setattr(table, "federation", fail)
    again = table.run(key, "meerkat", options, rounds=2, seed=0)
    assert float(again["loss"]) == row["loss"]


def test_held_out_losses_along_the_way_end_with_the_last(table: bed.Bed):
    key = {"case": "curve", "phase": "final", "lr": "1.00e-03", "seed": 0}
    options = {"lr": 1e-3, "steps": 1, "density": 0.05}
    row = table.run(key, "meerkat", options, rounds=4, seed=0, every=2)
    curve = [float(x) for x in row["curve"].split()]
    assert len(curve) == 2 and curve[0] != curve[1]
    assert curve[1] == pytest.approx(row["loss"], abs=1e-4)
    assert table.find(key)["curve"] == row["curve"]


def test_quiet_at_the_median_follows_the_fall_that_rho_later_asks_for():
    """A path that falls 5 times is flagged at the median, not at a tenth; a steady one never."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(2, 400)).prod(0)
    flagged = []
    for size in (np.ones(100), np.r_[np.ones(50), np.full(50, 0.2)]):
        rows = [
            {"gradip": " ".join(f"{x:.4g}" for x in path * size)} for path in noise.reshape(4, 100)
        ]
        flagged.append([sum(vpcs.flagged(row, share) for row in rows) for share in (0.1, 1.0)])
    assert flagged[0] == [0, 0] and flagged[1][0] == 0 and flagged[1][1] >= 3


def test_a_rate_that_wins_at_an_end_makes_the_grid_longer(table: bed.Bed, monkeypatch):
    tried = []

    def loss(key, method, options, *, rounds, seed, tuning):
        assert tuning and seed == bed.TUNING_SEED
        tried.append(options["lr"])
        return {"loss": abs(math.log10(options["lr"]) + 4.4)}

    monkeypatch.setattr(table, "run", loss)
    best = table.tuned({"case": "x"}, "meerkat", {}, (1e-3, 1e-2), rounds=1)
    assert best == pytest.approx(10**-4.5)
    assert sorted(tried) == pytest.approx([10**-4.5, 1e-4, 10**-3.5, 1e-3, 1e-2])
