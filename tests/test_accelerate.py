"""accelerate's loop, wrappers and checkpoints around the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import zokernels as zo


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loader() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 6, generator=g), torch.randn(32, 3, generator=g))
    return DataLoader(data, batch_size=4)


def mse(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def scheduler(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (step + 1))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_usual_loop_with_accumulation_and_a_checkpoint(tmp_path: Path, momentum: float) -> None:
    options: dict[str, Any] = {"lr": 0.05, "eps": 1e-2, "seed": 3, "momentum": momentum}
    alone = net()
    opt = zo.MeZO(alone, **options)
    rates = scheduler(opt)
    batches = list(loader())
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        opt.step([first, second], mse)
        rates.step()

    found, saved = [], ""
    for resumed in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        opt = zo.MeZO(net(), **options)
        # The model too, when there is one process; several step with opt's process_group.
        model, prepared, data, rates = accelerator.prepare(opt.model, opt, loader(), scheduler(opt))
        if resumed:
            accelerator.load_state(saved)
            data = accelerator.skip_first_batches(data, 4)
        for index, batch in enumerate(data):
            with accelerator.accumulate(model):
                share = accelerator.gradient_accumulation_steps
                opt.accumulate(batch, lambda m, b, share=share: mse(m, b) / share)
                prepared.step()
                rates.step()
                prepared.zero_grad()
            if index == 3 and not resumed:
                saved = str(accelerator.save_state(str(tmp_path / "state")))
        assert opt.num_steps == 4
        found.append(weights(model))
    assert equal(found[0], weights(alone))
    assert equal(found[1], weights(alone))
    assert not equal(found[0], weights(net()))


def test_a_closure_passes_through() -> None:
    accelerator = Accelerator(cpu=True)
    model, alone = net(), net()
    batch = next(iter(loader()))
    prepared = accelerator.prepare(zo.MeZO(model, lr=0.05, eps=1e-2))
    prepared.step(lambda: mse(model, batch))
    zo.MeZO(alone, lr=0.05, eps=1e-2).step(lambda: mse(alone, batch))
    assert equal(weights(model), weights(alone))
