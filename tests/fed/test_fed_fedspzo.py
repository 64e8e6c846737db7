"""FedSPZO: the cut through a model, both estimators, their bias and variance on a toy network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fed_zoo as zoo
import model_zoo
import pytest
import torch
from torch import Tensor, nn

import zokernels as zo
from fedzo.methods import FedSPZO
from fedzo.split import BlockSplit, SplitError, flop_shares, layers_of

FAMILIES = ["opt", "llama", "gpt2", "qwen3", "gemma2", "phi3", "roberta", "mixtral"]


def build(family: str, layers: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of a family with a few layers, moved off its initial weights, and a batch."""
    import transformers as tf

    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if family == "opt":
        config: Any = tf.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32)
        model: nn.Module = tf.OPTForCausalLM(config)
    elif family == "gpt2":
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=layers, n_head=4, n_positions=64)
        )
    elif family == "roberta":
        keep = {k: v for k, v in shape.items() if k not in ("num_key_value_heads", "head_dim")}
        model = tf.RobertaForMaskedLM(tf.RobertaConfig(**keep))
    else:
        model = tf.AutoModelForCausalLM.from_config(
            tf.AutoConfig.for_model(family, **shape, tie_word_embeddings=family != "llama")
        )
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval(), model_zoo.lm_batch()


def split_of(model: nn.Module, batch: dict[str, Tensor], at: int = 2) -> tuple[BlockSplit, Any]:
    keywords = {} if "Masked" in type(model).__name__ else {"use_cache": False}

    def loss() -> Tensor:
        return model(**batch, **keywords).loss

    return BlockSplit(model, at, loss), loss


# --- the cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_two_blocks_are_the_model(family):
    """Both blocks displaced along one seed, one after the other: the whole model displaced."""
    model, batch = build(family)
    before = zoo.weights(model)
    split, loss = split_of(model, batch)
    names = {p.name for p in (*split.first.params, *split.second.params)}
    assert names == set(before)  # every parameter in exactly one block
    assert len(split.first.params) + len(split.second.params) == len(before)
    table = [[0.05], [-0.05], [0.0], [0.2]]
    want = zo.branches(model, [11], table)(loss)
    kept = split.activations(loss, [11], table)
    got = split.losses(loss, kept, range(4), [11], table, early_seeds=[11], early_coeffs=table)
    torch.testing.assert_close(torch.tensor(got), want.float(), rtol=1e-5, atol=1e-5)
    assert want.unique().numel() == 4
    split.check(loss, 5, 1e-2)
    assert not zoo.differing(zoo.weights(model), before)
    assert all("forward" not in layer.__dict__ for layer in split.layers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in split.layers)


@pytest.mark.parametrize("at", [1, 2])
def test_parameters_are_in_the_block_that_uses_them(at):
    model, batch = build("llama")
    split, _ = split_of(model, batch, at)
    first = {p.name for p in split.first.params}
    assert not split.tied and "model.embed_tokens.weight" in first
    for p in (*split.first.params, *split.second.params):
        if p.name.startswith("model.layers."):
            assert (int(p.name.split(".")[2]) < at) == (p.name in first)
    assert "lm_head.weight" not in first and "model.norm.weight" not in first


def test_a_tied_embedding_moves_in_both_blocks():
    model, batch = build("opt")
    split, loss = split_of(model, batch)
    assert split.tied == ["model.decoder.embed_tokens.weight"]
    assert split.tied[0] in {p.name for p in split.first.params}
    # In block 2 it follows block 1's seeds alone.
    kept = split.activations(loss, [11], [[0.0], [0.0]])
    moved = split.losses(
        loss, kept, [0, 1], [12], [[0.0], [0.0]], early_seeds=[11], early_coeffs=[[0.1], [0.0]]
    )
    assert abs(moved[0] - moved[1]) > 1e-4
    z = zo.directions(model, seed=11)[split.tied[0]]
    head = model.get_output_embeddings()
    plain = head.weight.detach().clone()
    with (
        torch.no_grad(),
        split._skipping(
            lambda *a, **k: kept[0] if isinstance(kept, Tensor) else tuple(x[0] for x in kept)
        ),
    ):
        head.weight.add_(z, alpha=0.1)
        want = float(loss())
        head.weight.copy_(plain)
    assert moved[0] == pytest.approx(want, rel=1e-5)


def test_the_first_block_is_computed_once():
    """P2 directions of block 2 cost no further pass through block 1, and one stacked pass each."""
    model, batch = build("llama")
    split, loss = split_of(model, batch)
    counts = [0] * 3

    def count(index: int) -> Any:
        return lambda *_: counts.__setitem__(index, counts[index] + 1)

    pair = [[0.1], [-0.1]]
    rows = [0, 1] * 4
    table = [
        [(0.1 if r == 0 else -0.1) if k == i // 2 else 0.0 for k in range(4)]
        for i, r in enumerate(rows)
    ]
    split.losses(loss, split.activations(loss, [1], pair), rows, [2, 3, 4, 5], table)
    for i, layer in enumerate(split.layers):
        layer.mlp.register_forward_pre_hook(count(i))
    kept = split.activations(loss, [1], pair)
    assert counts == [1, 1, 0] and kept.shape[0] == 2
    losses = split.losses(loss, kept, rows, [2, 3, 4, 5], table)
    assert counts == [1, 1, 1] and len(set(losses)) == 8


class Leaky(nn.Module):
    """What the first layer is given reaches the end past the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.embed(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x + first).square().mean()


def test_what_passes_the_cut_unseen_is_found():
    torch.manual_seed(0)
    model, x = Leaky(), torch.randn(5, 4)
    split = BlockSplit(model, 2, lambda: model(x))
    with pytest.raises(SplitError, match="besides the layers' outputs passes the cut"):
        split.check(lambda: model(x), 1, 1e-2)


def test_what_cannot_be_cut():
    model, batch = build("llama")
    for at in (0, 3, -1):
        with pytest.raises(SplitError, match=r"at must be in \[1, 3\)"):
            split_of(model, batch, at)
    with pytest.raises(SplitError, match="no list of layers"):
        layers_of(nn.Linear(2, 2))
    t5 = model_zoo.build("t5")
    with pytest.raises(SplitError, match="both"):
        layers_of(t5)
    for p in model.model.layers[2].parameters():
        p.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(SplitError, match="no parameter that moves"):
        split_of(model, batch, 2)


@pytest.mark.parametrize("logits", [True, False])
def test_flop_shares(logits):
    """Every layer: its weights once a token, and attention; the head has the rest."""
    model, batch = build("llama", layers=4)
    tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]

    def loss() -> Tensor:
        return model(**batch).loss if logits else zo.causal_lm_loss(model, batch)

    shares = flop_shares(model, loss)
    assert len(shares) == 5 and shares[0] == 0
    weights = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    layer = 2 * tokens * weights + 2 * 2 * tokens * length * 32
    # Without logits the last token of each text has none.
    counted = tokens if logits else tokens - len(batch["input_ids"])
    head = 2 * counted * model.lm_head.weight.numel()
    want = [i * layer / (4 * layer + head) for i in range(5)]
    assert shares == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"split_layer": 1}, 1),
        ({"split_share": 0.75}, 3),
        ({"split_share": 0.01}, 1),
        ({"split_share": 0.99}, 3),
        ({"split_share": 0.5, "split_by": "flops"}, None),
    ],
)
def test_where_the_cut_is(options, at):
    model, _ = build("llama", layers=4)
    task = zoo.ToyTask()
    method = FedSPZO(**options)
    method.prepare(zoo.setting(model, task))
    assert method.split.at == at or at is None
    shares = flop_shares(model, lambda: task.loss(model, task.batch([0])))
    assert method.flop_share == shares[method.split.at]
    if at is None:
        assert abs(method.flop_share - 0.5) == min(abs(s - 0.5) for s in shares[1:-1])


# --- the estimators -------------------------------------------------------------------------------


class Tanh(nn.Module):
    """Two layers and nothing else: block 1 is the first, block 2 the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x - y).square().mean()


class TanhTask(zoo.ToyTask):
    """One batch: the estimate, not the data, is what varies."""

    def batch(self, indices: Any) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(2)
        return {"x": torch.randn(8, 4, generator=g), "y": torch.randn(8, 3, generator=g)}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch)


def toy(**options: Any) -> tuple[FedSPZO, Any, list[Tensor]]:
    """The method on the toy network, a client's site, and the two blocks' gradients."""
    torch.manual_seed(1)
    model, task = Tanh(), TanhTask()
    method = FedSPZO(eps=1e-2, split_layer=1, **options)
    method.prepare(zoo.setting(model, task))
    batch = task.batch([0])
    model(**batch).backward()
    gradient = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in model.layers]
    site = SimpleNamespace(
        next_batch=lambda: batch, loss_of=lambda b: lambda: model(**b), model=model
    )
    return method, site, gradient


def directions(model: nn.Module, seeds: list[int], layer: int) -> Tensor:
    """``z`` of many seeds on one block, ``[K, d]``."""
    keys = torch.tensor(seeds, dtype=torch.int64)
    parts = []
    for p in zo.bind(model).params:
        if p.name.startswith(f"layers.{layer}."):
            z = torch.ops.zokernels.displace(
                torch.zeros(p.matrix), keys, torch.eye(len(seeds)), p.id, 0, 0,
                "gaussian", "nearest", None,
            )  # fmt: skip
            parts.append(z.flatten(1))
    return torch.cat(parts, dim=1)


def block(z: dict[str, Tensor], layer: int) -> Tensor:
    return torch.cat([v.flatten() for n, v in z.items() if n.startswith(f"layers.{layer}.")])


def samples(p2: int, estimator: str, runs: int = 20, p1: int = 25) -> tuple[Any, list[Tensor]]:
    """Many independent estimates with P1 = 1: the P1 directions of a few larger ones, one by one.

    Returns:
        ``[runs * p1, d]`` estimates of both blocks' gradients, and the gradients.
    """
    method, site, gradient = toy(block1=p1, block2=p2, estimator=estimator)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for run in range(runs):
        order = method.order(1, run)
        probe = method.nested if estimator == "nested" else method.separate
        losses = torch.tensor(probe(site, order, 0))
        g = (losses[::2] - losses[1::2]) / 2e-2
        seeds = [method.direction(order, 0, k) for k in range(p1 + len(g))]
        z1 = directions(site.model, seeds[:p1], 0)
        if estimator == "nested":
            g = g.view(p1, p2)
            z2 = directions(site.model, seeds[p1 : p1 + p1 * p2], 1).view(p1, p2, -1)
            found[0].append(g.mean(1)[:, None] * z1)
            found[1].append((g[..., None] * z2).mean(1))
        else:
            z2 = directions(site.model, seeds[p1 : p1 + p2], 1)
            found[0].append(g[:p1, None] * z1)
            found[1].append((g[p1:, None] * z2).mean(0, keepdim=True))
    return (torch.cat(found[0]), torch.cat(found[1])), gradient


def mse(estimates: Tensor, gradient: Tensor) -> float:
    return float((estimates - gradient).square().sum(1).mean())


def test_no_bias_and_the_variance_of_the_papers():
    """Nested, P1 = 1. To first order ``g_ij = <G1, z1_i> + <G2, z2_ij>``, so

    ``MSE_2 = (d2 |G1|^2 + (d2 + 1) |G2|^2) / P2`` falls as 1/P2, and
    ``MSE_1 = (d1 + 1) |G1|^2 + d1 |G2|^2 / P2`` falls to the floor ``(d1 + 1) |G1|^2``.
    """
    measured: dict[int, tuple[float, float]] = {}
    for p2 in (1, 4, 16):
        estimates, gradient = samples(p2, "nested")
        d = [g.numel() for g in gradient]
        s = [float(g.square().sum()) for g in gradient]
        one, two = (mse(e, g) for e, g in zip(estimates, gradient, strict=True))
        measured[p2] = (one, two)
        for e, g, m in zip(estimates, gradient, (one, two), strict=True):
            error = float((e.mean(0) - g).square().sum())
            assert error < 3 * m / len(e), p2  # its expectation without bias is m / n
        assert two == pytest.approx((d[1] * s[0] + (d[1] + 1) * s[1]) / p2, rel=0.3)
        assert one == pytest.approx((d[0] + 1) * s[0] + d[0] * s[1] / p2, rel=0.3)
    floor = (d[0] + 1) * s[0]
    assert measured[1][1] / measured[16][1] == pytest.approx(16, rel=0.3)
    assert measured[1][0] > 1.5 * measured[16][0] > 0.7 * floor


def test_separate_estimators():
    """Each block's variance is that of plain SPSA in its own dimension; block 2's falls as 1/P2."""
    for p2 in (1, 8):
        estimates, gradient = samples(p2, "separate", runs=60, p1=8)
        for e, g, p in zip(estimates, gradient, (1, p2), strict=True):
            m = mse(e, g)
            assert m == pytest.approx((g.numel() + 1) * float(g.square().sum()) / p, rel=0.45)
            assert float((e.mean(0) - g).square().sum()) < 3 * m / len(e)


@pytest.mark.parametrize("estimator", ["nested", "separate"])
def test_a_step_is_the_estimate(estimator):
    """``theta1 -= lr G1, theta2 -= lr G2`` from the scalars sent, against all written out."""
    p1, p2, lr = 2, 3, 0.5
    method, site, _ = toy(block1=p1, block2=p2, estimator=estimator, lr=lr)
    order = method.order(1, 0, steps=1)
    start = zoo.weights(site.model)
    one, two = torch.zeros(25), torch.zeros(18)
    batch = site.next_batch()

    def loss(c1: float, z1: Any, c2: float, z2: Any) -> float:
        model = site.model
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n] + (c1 * z1[n] if n.startswith("layers.0") else c2 * z2[n]))
            value = float(model(**batch))
            for n, p in model.named_parameters():
                p.copy_(start[n])
        return value

    z = [zo.directions(site.model, seed=method.direction(order, 0, k)) for k in range(8)]
    g, e = [], 1e-2
    if estimator == "nested":
        for i in range(p1):
            for j in range(p2):
                z2 = z[p1 + i * p2 + j]
                g.append((loss(e, z[i], e, z2) - loss(-e, z[i], -e, z2)) / (2 * e))
                one += g[-1] * block(z[i], 0) / (p1 * p2)
                two += g[-1] * block(z2, 1) / (p1 * p2)
    else:
        for i in range(p1):
            g.append((loss(e, z[i], 0, z[i]) - loss(-e, z[i], 0, z[i])) / (2 * e))
            one += g[-1] * block(z[i], 0) / p1
        for j in range(p2):
            z2 = z[p1 + j]
            g.append((loss(0, z2, e, z2) - loss(0, z2, -e, z2)) / (2 * e))
            two += g[-1] * block(z2, 1) / p2

    real = zoo.Site(method.space, TanhTask(), iter(lambda: [0], None))
    scalars = method.client(real, order)
    assert scalars == pytest.approx(g, rel=1e-3, abs=1e-4)
    assert len(scalars) == method.scalars(order) == (6 if estimator == "nested" else 5)
    real.settle()
    after = dict(site.model.named_parameters())
    for layer, estimate in ((0, one), (1, two)):
        moved = block({n: after[n].detach() - start[n] for n in start}, layer)
        torch.testing.assert_close(moved, -lr * estimate, rtol=1e-2, atol=1e-3)
    method.space.restore_()
    assert not zoo.differing(zoo.weights(site.model), start)


def test_the_reconstructed_defaults():
    method = FedSPZO()
    assert (method.block1, method.block2, method.split_share) == (1, 4, 0.75)
    assert (method.eps, method.lr, method.steps) == (1e-3, 1e-6, 10)
    assert method.estimator == "nested" and method.seeds == "client"
    for options, message in (
        ({"block2": 0}, "block2 must be an integer of at least 1"),
        ({"estimator": "mixed"}, "estimator must be one of"),
        ({"split_by": "size"}, "split_by must be one of"),
        ({"split_share": 1.0}, r"split_share must be in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FedSPZO(**options)
