"""Data parallelism: ranks on the CPU, against one process that takes their batches in turn."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import zokernels as zo
from zokernels.distributed import checksum

STEPS, RANKS = 4, 2
DTYPES = (torch.float32, torch.bfloat16)
OPT: dict[str, Any] = {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "seed": 3}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 6, generator=g).to(dtype), torch.randn(5, 3, generator=g).to(dtype)


def mse(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).float().square().mean()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _rank(rank: int, folder: str, body: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    try:
        found: Any = body(rank)
    except Exception:  # for the parent to show
        found = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_ranks(tmp_path: Path, body: Callable[[int], Any]) -> list[Any]:
    """What ``body(rank)`` returned on every rank."""
    mp.spawn(_rank, (str(tmp_path), body), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for one in found:
        assert not isinstance(one, str), one
    return found


def _runs(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    for dtype in DTYPES:
        for name, options in VARIANTS.items():
            model, journal = net(dtype), zo.Trajectory() if rank == 0 else None
            opt = zo.MeZO(model, process_group=group, journal=journal, **OPT, **options)
            losses = [_step(opt, name, batch(s, rank, dtype)) for s in range(STEPS)]
            opt.check_ranks()
            found[f"{name} {dtype}"] = (weights(model), losses, journal)
    model = net()
    opt = zo.MeZO(model, process_group=group, **OPT)
    losses = [opt.step(lambda s=s: mse(model, batch(s, rank))) for s in range(STEPS)]
    found["closure"] = (weights(model), losses, None)
    return found


def _step(opt: zo.MeZO, name: str, data: tuple[Tensor, Tensor]) -> Tensor:
    if name != "accumulated":
        return opt.step(data, mse)
    for _ in range(2):
        opt.accumulate(data, lambda model, batch: mse(model, batch) / 2)
    return opt.step()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {},
    "directions": {"num_directions": 3, "estimator": "forward"},
    "momentum": {"momentum": 0.9, "momentum_window": 3},
    "fused": {"fuse_update": True},
}


def test_ranks_are_one_process_that_accumulates(tmp_path):
    """Losses, weights and journal, bit for bit, on every rank."""
    found = on_ranks(tmp_path, _runs)
    cases = {f"{n} {d}": (o, d) for n, o in VARIANTS.items() for d in DTYPES}
    for name, (options, dtype) in {**cases, "closure": ({}, torch.float32)}.items():
        model = net(dtype)
        opt = zo.MeZO(model, **OPT, **options)
        start = weights(model)
        losses = [
            opt.step([batch(s, rank, dtype) for rank in range(RANKS)], mse) for s in range(STEPS)
        ]
        opt.flush()
        assert not equal(start, weights(model))
        for held, seen, journal in (one[name] for one in found):
            if name == "closure":  # one branch at a time: other sums than stacked
                torch.testing.assert_close(seen, losses, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(held, weights(model), rtol=1e-4, atol=1e-5)
            else:
                assert seen == losses, name
                assert equal(held, weights(model)), name
            if journal is not None:
                again = net(dtype)
                journal.replay_(again)
                assert equal(weights(again), weights(model)), name
    assert equal(found[0]["closure"][0], found[1]["closure"][0])


def _trouble(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    # One rank's loss is NaN: no rank moves.
    model = net()
    opt = zo.MeZO(model, process_group=group, **OPT)
    start = weights(model)
    x, y = batch(0, rank)
    with pytest.warns(UserWarning, match="not finite"):
        opt.step((x, y * (torch.nan if rank else 1)), mse)
    found["nan"] = (equal(start, weights(model)), opt.skipped, opt.num_steps)
    opt.step((x, y), mse)
    found["after"] = weights(model)
    # Ranks that differ are found before anything moves.
    for name, options in {
        "weights": {},
        "seed": {"seed": rank},
        "lr": {"lr": 0.1 + rank},
        "clip": {"clip": 1.0 if rank else None},
    }.items():
        model = net()
        if name == "weights" and rank:
            model[0].bias.data[2] += 1e-3
        opt = zo.MeZO(model, process_group=group, **{**OPT, **options})
        start = weights(model)
        with pytest.raises(zo.RankMismatchError) as caught:
            opt.step(batch(0, rank), mse)
        assert equal(start, weights(model)) and opt.num_steps == 0
        found[name] = str(caught.value).split(";")[1]
    # A weight that somebody else wrote on one rank later.
    model = net()
    opt = zo.MeZO(model, process_group=group, **OPT)
    opt.step(batch(0, rank), mse)
    if rank:
        model[2].weight.data[0, 0] += 1
    with pytest.raises(zo.RankMismatchError) as caught:
        opt.check_ranks()
    found["later"] = str(caught.value)
    # The float32 values of a bfloat16 weight under a mask, of which it holds the rounding.
    model = net(torch.bfloat16)
    mask = zo.Mask.random(model, 0.5, seed=1)
    opt = zo.MeZO(model, process_group=group, mask=mask, **OPT)
    opt.step(batch(0, rank, torch.bfloat16), mse)
    opt.check_ranks()
    if rank:
        bound = zo.bind(model, mask=mask).params[0]
        bound.masked.shadow[0] = torch.nextafter(bound.masked.shadow[0], torch.tensor(9.0))
    with pytest.raises(zo.RankMismatchError, match=r"'0.weight'"):
        opt.check_ranks()
    # A state dict is compared again.
    model = net()
    opt = zo.MeZO(model, process_group=group, **OPT)
    opt.step(batch(0, rank), mse)
    state = opt.state_dict()
    state["mezo"]["seed"] = rank
    opt.load_state_dict(state)
    with pytest.raises(zo.RankMismatchError, match="seed differs"):
        opt.step(batch(0, rank), mse)
    alone = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="member"):
            zo.MeZO(model, process_group=alone)
    return found


def test_trouble_on_one_rank_is_known_on_all(tmp_path):
    found = on_ranks(tmp_path, _trouble)
    for one in found:
        assert one["nan"] == (True, 1, 1)
        assert "'0.bias' of group 0 differs" in one["weights"]
        assert "seed differs: 0 on rank 0, 1 on rank 1" in one["seed"]
        assert "hyperparameters differs" in one["lr"]
        assert "clip differs: None on rank 0, 1.0 on rank 1" in one["clip"]
        assert "'2.weight'" in one["later"]
    assert equal(found[0]["after"], found[1]["after"])
    assert not equal(found[0]["after"], weights(net()))


@pytest.mark.parametrize("group", ["nccl", 1, object()])
def test_a_process_group_must_be_one(group):
    with pytest.raises(TypeError, match="process_group must be"):
        zo.MeZO(net(), process_group=group)


def test_a_copy_trains_alone():
    opt = zo.MeZO(net(), **OPT)
    opt.__dict__["process_group"] = "stands in for one"
    assert copy.deepcopy(opt).process_group is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_checksum_sees_every_bit_and_place(dtype):
    x = torch.randn(7, 9).to(dtype)
    want = checksum(x)
    assert checksum(x.t().contiguous().t()) == want
    flipped, moved = x.clone(), x.clone()
    bits = flipped.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[3, 4] ^= 1
    moved[0, 0], moved[0, 1] = x[0, 1], x[0, 0]
    assert len({want, checksum(flipped), checksum(moved), checksum(x[:, :8])}) == 4
    assert checksum(x[:0]) == 0
