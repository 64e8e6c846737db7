"""Whole steps on the device of every backend: on a GPU where there is one, else on the CPU.

The conformance suites check op by op. Here a model makes steps, as they are and as a CUDA graph,
and what it ends with is what the reference makes of the journal, bit for bit: updates by Rademacher
directions are the same on every device. On the CPU a graph is the same work again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, masking_utils

import zokernels as zo
from zokernels import _registry, deferred, graphs

ON_GPU = torch.cuda.is_available()
BACKENDS = [
    name
    for name, backend in _registry.backends().items()
    if backend.reason is None
    and name != "reference"
    and ("cuda" in backend.devices) == ON_GPU  # where a GPU is, it is what is tested
]
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not ON_GPU:

        def again(run: Any, warm_up: Any) -> tuple[Any, Tensor]:
            warm_up()
            output = torch.empty(0)

            def replay() -> None:
                losses = run()
                output.resize_(losses.shape).copy_(losses)

            return replay, output

        monkeypatch.setattr(zo.MeZO, "_stays_on_device", lambda self: True)
        monkeypatch.setattr(deferred.Fetch, "ready", property(lambda self: False))
        monkeypatch.setattr(graphs, "record", again)
    with _registry.use_backend(request.param):
        yield str(request.param)


def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


class Net(nn.Module):
    """Products of several shapes, norms, biases; no ids."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 256)
        self.norm = nn.LayerNorm(256)
        self.last = nn.Linear(256, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


def build(kind: str, dtype: torch.dtype) -> nn.Module:
    """A small model on the CPU."""
    torch.manual_seed(0)
    if kind == "net":
        return Net().to(dtype).eval()
    config: Any = (
        OPTConfig(ffn_dim=128, word_embed_proj_dim=64, **SHAPE)
        if kind == "opt"
        else LlamaConfig(intermediate_size=128, num_key_value_heads=2, **SHAPE)
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batches(kind: str, dtype: torch.dtype, count: int) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    if kind == "net":
        return [torch.randn(4, 64, generator=g).to(device(), dtype) for _ in range(count)]
    found = []
    for i in range(count):
        ids = torch.randint(3, SHAPE["vocab_size"], (3, 8), generator=g)
        mask = torch.ones_like(ids)
        mask[i % 3, 5:] = 0
        one = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        found.append({k: v.to(device()) for k, v in one.items()})
    return found


def net_loss(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).float().square().mean()


def loss_fn(kind: str) -> Any:
    return net_loss if kind == "net" else None


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "num_directions": 2},
    "fused": {"fuse_update": True},
    "mask": {"mask": 0.3},
}


@pytest.mark.parametrize("graphed", [False, True], ids=["step", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["net", "opt", "llama"])
def test_steps_are_what_the_reference_makes_of_their_journal(
    backend: str, kind: str, options: str, dtype: torch.dtype, graphed: bool
) -> None:
    model, alone = build(kind, dtype).to(device()), build(kind, dtype)
    given = dict(OPTIONS[options])
    mask = None
    if "mask" in given:
        mask = given["mask"] = zo.Mask.random(model, given["mask"], seed=2)
    journal = zo.Trajectory()
    opt = zo.MeZO(
        model, lr=1e-2, eps=1e-2, distribution="rademacher", journal=journal, clip=1.0, **given
    )
    data, loss = batches(kind, dtype, 4), loss_fn(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        step = graphs.GraphedStep(opt, data[0], loss) if graphed else None
        losses = []
        for i, batch in enumerate(data):
            opt.param_groups[0]["lr"] = 1e-2 / (i + 1)
            losses.append(opt.step(batch, loss) if step is None or i == 2 else step(batch))
        opt.flush()
        steps = list(journal)
    assert len(steps) == 4 and opt.skipped == 0
    assert all(bool(torch.isfinite(value)) for value in losses)
    with _registry.use_backend("reference"):
        zo.Trajectory.replay_(journal, alone, mask=mask)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.detach().cpu(), q.detach()), name


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("kind", ["net", "opt", "llama"])
def test_losses_are_those_of_the_reference(
    backend: str, kind: str, distribution: str, padded: bool
) -> None:
    model, (batch,) = build(kind, torch.float32), batches(kind, torch.float32, 1)
    here: Any = batch.cpu() if kind == "net" else {k: v.cpu() for k, v in batch.items()}
    if kind != "net" and not padded:
        del batch["attention_mask"], here["attention_mask"]
    options = {"seed": 5, "eps": 1e-2, "distribution": distribution, "loss_fn": loss_fn(kind)}
    with _registry.use_backend("reference"):
        want = zo.dual_loss(model, here, **options)
    got = zo.dual_loss(model.to(device()), batch, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=0)


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """torch raises where the host waits for the GPU."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["net", "llama"])
def test_a_step_does_not_wait(
    backend: str, kind: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else transformers reads masks, also those it makes.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    model, given = build(kind, torch.bfloat16).to(device()), dict(OPTIONS[options])
    if "mask" in given:
        given["mask"] = zo.Mask.random(model, given["mask"], seed=2)
    opt = zo.MeZO(model, lr=1e-2, eps=1e-2, journal=zo.Trajectory(), **given)
    (batch,) = batches(kind, torch.bfloat16, 1)
    for _ in range(2):  # comparisons and tables
        opt.step(batch, loss_fn(kind))
    with waits_are_errors():
        for _ in range(3):
            opt.step(batch, loss_fn(kind))
        for _ in range(2):
            opt.accumulate(batch, loss_fn(kind))
        opt.step()
    opt.flush()
    assert opt.num_steps == 6 and opt.skipped == 0


def test_random_masks_of_dropout_are_the_same_in_both_probes(backend: str) -> None:
    """eps is tiny and the masks are large: other masks would give another loss."""
    net = nn.Sequential(Net(), nn.Dropout(0.5)).to(device()).train()
    (x,) = batches("net", torch.float32, 1)
    plus, minus = zo.dual_loss(net, x, seed=1, eps=1e-6, loss_fn=net_loss)
    torch.testing.assert_close(plus, minus, rtol=1e-3, atol=0)
    again = zo.dual_loss(net, x, seed=1, eps=1e-6, loss_fn=net_loss)[0]
    assert abs(float(again) - float(plus)) > 1e-3 * float(plus)  # other masks


def test_a_run_goes_on_from_a_saved_state(backend: str) -> None:
    data = batches("opt", torch.bfloat16, 6)
    whole, part = (build("opt", torch.bfloat16).to(device()) for _ in range(2))
    options = {"lr": 1e-2, "eps": 1e-2, "momentum": 0.5, "distribution": "rademacher"}
    one, two = zo.MeZO(whole, **options), zo.MeZO(part, **options)
    for batch in data:
        one.step(batch)
    for batch in data[:3]:
        two.step(batch)
    saved = two.state_dict(), {k: v.cpu() for k, v in part.state_dict().items()}
    fresh = build("opt", torch.bfloat16)
    fresh.load_state_dict(saved[1])
    three = zo.MeZO(fresh.to(device()), lr=1.0, momentum=0.9)
    three.load_state_dict(saved[0])
    for batch in data[3:]:
        three.step(batch)
    assert three.num_steps == one.num_steps == 6
    torch.testing.assert_close(three.last.losses, one.last.losses, rtol=1e-2, atol=0)
