"""What other zeroth-order implementations get wrong, each as a test that this one passes.

Where it is cheap, a test also shows that the defect is there in the common way of doing it, so that
it is known to notice.
"""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zokernels as zo
from zokernels import noise
from zokernels.groups import param_groups
from zokernels.optim import MeZO
from zokernels.trajectory import Trajectory

transformers = pytest.importorskip("transformers")

LOW = [torch.bfloat16, torch.float16]
IDS = torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=48,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval().to(dtype)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    a, b = (weights(x) if isinstance(x, nn.Module) else x for x in (a, b))
    return list(a) == list(b) and all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def drift(net: nn.Module, start: dict[str, Tensor]) -> float:
    """Relative L2 distance from the start, over all weights."""
    now = weights(net)
    moved = sum((now[n].double() - w.double()).square().sum() for n, w in start.items())
    size = sum(w.double().square().sum() for w in start.values())
    return float((moved / size).sqrt())


# --- restoring the weights (MeZO#42) --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_probes_leave_no_drift(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 4)).to(dtype)
    start = weights(net)
    opt = MeZO(net, lr=0.0, eps=1e-3)
    x = torch.randn(3, 16, dtype=dtype)
    for _ in range(100):
        opt.step(x, lambda m, b: m(b).float().square().mean())
    assert same(net, start)
    if dtype in LOW:
        # The in-place loop: +eps z, -2 eps z, +eps z.
        params = list(net.named_parameters())
        with torch.no_grad():
            for step in range(100):
                z = zo.directions(net, seed=noise.derive_seed(0, step))
                for scale, (name, p) in itertools.product((1, -2, 1), params):
                    p.add_(z[name].to(dtype), alpha=scale * 1e-3)
        assert drift(net, start) > 1e-3


# --- the update's z is the probe's z (PyPI mezo, LOZO) --------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1003, 101), (101, 1003), (7, 15001), (33, 3, 7, 151), (100_003,)], ids=str
)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_update_and_probe_draw_the_same_z(shape: tuple[int, ...], distribution: str) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(shape))
    probes: list[Tensor] = []

    def closure() -> Tensor:
        probes.append(net.weight.detach() * 1.0)
        return torch.tensor(1.5 - len(probes))  # 0.5, -0.5: with eps 1/2, g is 1

    MeZO(net, lr=0.25, eps=0.5, distribution=distribution, seed=4).step(closure)
    z = zo.directions(net, seed=noise.derive_seed(4, 0), distribution=distribution)["weight"]
    # From zero and with powers of two, every product is exact.
    assert torch.equal(probes[0], 0.5 * z)
    assert torch.equal(probes[1], -0.5 * z)
    assert torch.equal(net.weight, -0.25 * z)
    assert z.std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("size", [(101, 1003), (1003, 101)])
def test_stacked_linear_layers_draw_it_too(size: tuple[int, int]) -> None:
    net = nn.Linear(*size, bias=False)
    net.weight.data.zero_()
    x = torch.eye(size[0])
    both = zo.branches(net, [11], [[0.5], [-0.5]], sequential=False)(lambda: net(x))
    z = zo.directions(net, seed=11)["weight"]
    torch.testing.assert_close(both[0], 0.5 * z.T, atol=0, rtol=0)
    torch.testing.assert_close(both[1], -0.5 * z.T, atol=0, rtol=0)


# --- one z per parameter (es-at-scale#46, zo2) ----------------------------------------------------


def test_equal_shaped_layers_get_different_noise() -> None:
    z = zo.directions(llama(), seed=3)
    pairs = [(a, b) for a, b in itertools.combinations(z, 2) if z[a].shape == z[b].shape]
    assert len(pairs) > 20
    for a, b in pairs:
        same_sign = (z[a].sign() == z[b].sign()).double().mean().item()
        limit = 5 / (2 * z[a].numel() ** 0.5)  # five standard deviations
        assert abs(same_sign - 0.5) < limit, (a, b)


def test_a_tied_weight_gets_one_z() -> None:
    net, eps = gpt2(), 1e-2
    assert net.lm_head.weight is net.transformer.wte.weight
    start = weights(net)
    assert "lm_head.weight" not in start
    opt = MeZO(net, lr=1e-3, eps=eps, sequential=False)
    opt.step(BATCH)
    z = zo.directions(net, seed=noise.derive_seed(0, 0))
    moved = gpt2()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.copy_(start[name] + sign * eps * z[name])
            losses.append(moved(**BATCH).loss.item())
    assert opt.last.losses == pytest.approx(losses, rel=1e-5)
    assert net.lm_head.weight is net.transformer.wte.weight


# --- streams that collide (ZOTitan, DeComFL) ------------------------------------------------------


def test_no_two_steps_directions_or_runs_share_a_seed() -> None:
    seeds = [
        noise.derive_seed(root, step, direction)
        for root in range(4)
        for step in range(400)
        for direction in range(8)
    ]
    assert len(set(seeds)) == len(seeds)


def test_directions_of_neighbouring_steps_are_independent() -> None:
    net = nn.Linear(64, 64, bias=False)
    opt = MeZO(net, num_directions=3, lr=0.0)
    drawn = []
    for _ in range(3):
        opt.step(torch.ones(1, 64), lambda m, b: m(b).mean())
        drawn += opt.last.seeds
    z = torch.stack([zo.directions(net, seed=s)["weight"].flatten() for s in drawn])
    gram = z @ z.T / z.shape[1]
    torch.testing.assert_close(gram, torch.eye(9), atol=5 / 64, rtol=0)


def test_directions_and_rounding_do_not_share_bits() -> None:
    key, name = torch.tensor(9), noise.parameter_id("w")
    bits = noise.rounding_bits(64, 512, key, name, noise.STREAM_UPDATE_ROUNDING)
    for distribution in noise.DISTRIBUTIONS:
        z = noise.direction(64, 512, key, name, distribution=distribution)
        joined = torch.stack([z.flatten(), bits.flatten().float()])
        assert abs(torch.corrcoef(joined)[0, 1].item()) < 5 / z.numel() ** 0.5


# --- groups that leak into each other (FATE-LLM) --------------------------------------------------


def test_group_options_do_not_leak() -> None:
    def run(reverse: bool) -> dict[str, Tensor]:
        net = llama()
        named = dict(net.named_parameters())
        attention = [(n, p) for n, p in named.items() if "self_attn" in n]
        rest = [(n, p) for n, p in named.items() if "self_attn" not in n]
        groups: list[dict[str, Any]] = [
            {"params": attention, "lr": 1e-2, "weight_decay": 0.5},
            {"params": rest},
        ]
        opt = MeZO(groups[::-1] if reverse else groups, lr=0.0, model=net)
        for _ in range(2):
            opt.step(BATCH)
        return weights(net)

    start, forwards, backwards = weights(llama()), run(False), run(True)
    assert same(forwards, backwards)
    for name, w in forwards.items():
        assert torch.equal(w, start[name]) == ("self_attn" not in name)


# --- the user's seed, and no forward that nobody asked for (torchzero) ----------------------------


def test_directions_follow_the_seed_and_only_two_forwards_run() -> None:
    trained = {}
    for run, seed in (("a", 1), ("again", 1), ("b", 2)):
        net = gpt2()
        calls: list[None] = []
        net.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        opt = MeZO(net, lr=1e-3, seed=seed)
        for _ in range(2):
            opt.step(lambda net=net: net(**BATCH).loss)
        assert len(calls) == 4
        torch.randn(3)
        opt.step(BATCH)  # the first stacked use compares with one branch at a time
        calls.clear()
        opt.step(BATCH)
        assert len(calls) == 1
        trained[run] = weights(net)
    assert same(trained["a"], trained["again"])
    assert not same(trained["a"], trained["b"])


# --- weight decay by substring of the name --------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, llama])
def test_norms_are_found_by_type(build: Any) -> None:
    net = build()
    decayed, spared = ([n for n, _ in g["params"]] for g in param_groups(net, weight_decay=0.1))
    norms = [n for n in spared if ".ln_" in n or "norm" in n]
    assert len(norms) == (10 if build is gpt2 else 5)
    by_substring = [n for n in norms if "layer_norm" in n or "layernorm" in n]
    assert len(by_substring) < len(norms)  # what a search in names would miss
    assert not [n for n in decayed if n.endswith("bias") or "ln_" in n or "norm" in n]
    modules = dict(net.named_modules())
    assert all(
        isinstance(modules[n.rpartition(".")[0]], (nn.Linear, transformers.pytorch_utils.Conv1D))
        for n in decayed
    )
    start = weights(net)
    # So small a clip that the decay is left alone to act.
    opt = MeZO(param_groups(net, weight_decay=0.5), lr=1e-3, model=net, clip=1e-44)
    opt.step(BATCH)
    factor = torch.tensor(1 - 5e-4)
    for name, p in net.named_parameters():
        assert torch.equal(p, start[name] * factor if name in decayed else start[name]), name


# --- gradient accumulation (MeZO#44) --------------------------------------------------------------


def test_gradient_accumulation() -> None:
    whole, parts = gpt2(), gpt2()
    a, b = MeZO(whole, lr=1e-3, eps=1e-2), MeZO(parts, lr=1e-3, eps=1e-2)
    micro = [{"input_ids": IDS[i : i + 1], "labels": IDS[i : i + 1]} for i in range(2)]
    for _ in range(2):
        assert a.step(BATCH).item() == pytest.approx(b.step(micro).item(), rel=1e-5)
        assert a.projected_gradients[0] == pytest.approx(b.projected_gradients[0], abs=1e-3)
    assert drift(parts, weights(whole)) < 1e-4 < drift(parts, weights(gpt2()))


# --- an update left pending when the model is saved (zo2) -----------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_nothing_is_pending_when_a_run_is_saved(dtype: torch.dtype) -> None:
    net, journal = llama(dtype), Trajectory()
    opt = MeZO(net, lr=1e-3, momentum=0.5, momentum_window=2, journal=journal)
    for step in range(3):
        opt.step(BATCH)
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        fresh = llama(dtype)
        journal[: step + 1].replay_(fresh)
        saved = llama(dtype)
        saved.load_state_dict(torch.load(file, weights_only=True))
        assert same(saved, fresh) and same(saved, net)
        assert not same(saved, llama(dtype))


# --- what z must not depend on --------------------------------------------------------------------


def two_steps(net: nn.Module, params: Any = None) -> dict[str, Tensor]:
    opt = MeZO(net if params is None else params, lr=1e-2, model=None if params is None else net)
    for _ in range(2):
        opt.step(BATCH)
    return weights(net)


def test_the_order_of_the_parameters_does_not_matter() -> None:
    net = llama()
    backwards = two_steps(net, list(net.named_parameters())[::-1])
    assert same(backwards, two_steps(llama()))


def test_other_parameters_do_not_matter() -> None:
    net = llama()
    alone = zo.directions(net, seed=5, params=["model.norm.weight"])
    assert torch.equal(alone["model.norm.weight"], zo.directions(net, seed=5)["model.norm.weight"])


def test_the_global_random_state_does_not_matter_and_does_not_move() -> None:
    net = gpt2()
    torch.manual_seed(77)
    torch.randn(1000)
    state = torch.get_rng_state()
    first = two_steps(net)
    assert torch.equal(torch.get_rng_state(), state)
    net = gpt2()
    torch.manual_seed(78)
    assert same(first, two_steps(net))


def test_threads_do_not_matter() -> None:
    net, journal = gpt2(torch.bfloat16), Trajectory()
    opt = MeZO(net, lr=1e-2, weight_decay=0.1, journal=journal, num_directions=2)
    opt.step(BATCH)
    z = zo.directions(net, seed=1)
    replayed = gpt2(torch.bfloat16)
    torch.set_num_threads(2)
    try:
        assert same(z, zo.directions(net, seed=1))
        journal.replay_(replayed)
    finally:
        torch.set_num_threads(1)
    assert same(replayed, net)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("device", DEVICES)
def test_device_and_dtype_do_not_matter(device: str, dtype: torch.dtype) -> None:
    net = nn.Linear(300, 5).to(device=device, dtype=dtype)
    for p in net.parameters():
        p.data.zero_()
    reference = zo.directions(nn.Linear(300, 5), seed=noise.derive_seed(0, 0))
    z = zo.directions(net, seed=noise.derive_seed(0, 0))
    for name in reference:
        assert z[name].dtype == torch.float32
        torch.testing.assert_close(z[name].cpu(), reference[name], atol=4e-6, rtol=0)
    probes: list[Tensor] = []

    def closure() -> Tensor:
        probes.append((net.weight.detach() * 1.0).float().cpu())
        return torch.tensor(1.5 - len(probes))

    MeZO(net, lr=0.5, eps=0.5, rounding="nearest").step(closure)
    rounded = (0.5 * reference["weight"]).to(dtype).float()
    torch.testing.assert_close(probes[0], rounded, atol=4e-6, rtol=1e-2 if dtype in LOW else 0)
    torch.testing.assert_close(
        net.weight.float().cpu(), -rounded, atol=4e-6, rtol=1e-2 if dtype in LOW else 0
    )


# --- half precision that is safe (MeZO#42) --------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
def test_small_updates_survive_in_half_precision(dtype: torch.dtype) -> None:
    """A hundred updates of a thirtieth of an ulp each: nearest rounding loses all of them."""
    moved = {}
    for rounding in noise.ROUNDINGS:
        net = nn.Linear(256, 128, bias=False).to(dtype)
        net.weight.data.fill_(1.0)
        exact = copy.deepcopy(net).float()
        ulp = torch.finfo(dtype).eps
        journal = Trajectory()
        journal.begin([zo.bind(net).params], distribution="rademacher", rounding=rounding)
        for step in range(100):
            journal.append(step, [noise.derive_seed(1, step)], [[ulp / 60]])
        journal.replay_(net)
        journal.to_displacement().apply_(exact)
        target = exact.weight - 1
        moved[rounding] = ((net.weight.float() - 1) * target).sum() / target.square().sum()
    assert moved["nearest"] == 0
    assert moved["stochastic"].item() == pytest.approx(1, abs=0.1)
