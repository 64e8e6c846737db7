"""Whole steps on a CUDA device that is not there (tests/fake_cuda.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import model_zoo as mz
import pytest
import torch
from fake_cuda import (
    CaptureError,
    FakeDevice,
    Kernels,
    cuda_adapters,
    enter_devices,
    fake_device,
    triton_adapters,
)
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_map

import zokernels as zo

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

# Models whose loss goes without logits.
OWN_LOSS = {
    *("opt", "opt_untied", "gpt2", "llama", "llama_tied", "qwen3", "phi3", "mamba"),
    *("mixtral", "qwen3_moe"),
    *("opt_lora", "llama_lora", "opt_dora"),
}
EXPERTS = {"mixtral", "qwen3_moe"}
NO_KERNEL = {"lstm", "gru"}  # cuDNN's, which has none without data


@pytest.fixture(scope="module", autouse=True)
def _devices(tmp_path_factory: pytest.TempPathFactory) -> None:
    enter_devices(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    name = request.node.callspec.params.get("name", "opt")
    with fake_device(monkeypatch, own_loss=name in OWN_LOSS) as made:
        yield made


@pytest.fixture(params=["triton", "cuda"])
def kernels(
    request: pytest.FixtureRequest, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kernels]:
    """A backend's own adapters."""
    if request.param == "cuda":
        yield cuda_adapters(monkeypatch)
    else:
        with triton_adapters(monkeypatch) as (found, _):
            yield found


def moved(
    device: FakeDevice, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A model, its batch and the optimizer's options on the device."""
    case = mz.CASES[name]
    model = mz.build(name, dtype)
    batch = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, case.batch())
    if "mask" in options:
        options = {**options, "mask": zo.Mask.random(model, options["mask"], seed=1)}
    return device.model(model), device.batch(batch), options


def step(
    device: FakeDevice,
    name: str,
    dtype: torch.dtype,
    steps: int = 1,
    kernels: Kernels | None = None,
    accumulated: int = 0,
    **options: Any,
) -> None:
    model, batch, options = moved(device, name, dtype, options)
    with device(kernels):
        opt = zo.MeZO(model, lr=1e-3, eps=1e-3, **options)
        for _ in range(steps):
            for _ in range(accumulated):
                opt.accumulate(batch, mz.CASES[name].loss_fn)
            loss = opt.step() if accumulated else opt.step(batch, mz.CASES[name].loss_fn)
    assert loss.device.type == "cuda" and loss.shape == () and loss.dtype == torch.float32
    assert opt.num_steps == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(set(mz.CASES) - NO_KERNEL))
def test_a_step_stays_on_its_device_and_reads_nothing(device, name, dtype):
    if name in EXPERTS and dtype == torch.float32:
        # Torch's own product reads how many tokens each expert has.
        with pytest.raises(DataDependentOutputException):
            step(device, name, dtype)
    else:
        step(device, name, dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "directions": {"num_directions": 3, "estimator": "forward"},
    "rademacher": {"distribution": "rademacher", "weight_decay": 0.1, "clip": 1.0},
    "momentum": {"momentum": 0.9, "momentum_window": 3},
    "fused update": {"fuse_update": True},
    "mask": {"mask": 0.1},
    "mask and momentum": {"mask": 0.1, "momentum": 0.9},
    "in parts": {"num_directions": 2, "max_branches": 2},
    "sequential": {"sequential": True},
    "accumulated": {"accumulated": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["opt", "gpt2", "roberta", "opt_lora"])
def test_every_way_to_step_stays_on_the_device(device, name, options):
    step(device, name, torch.bfloat16, steps=4, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 32, 33, 2048])
@pytest.mark.parametrize("name", ["opt"])
def test_the_triton_backend_says_which_updates_it_takes_along(
    device, monkeypatch, name, tokens, dtype
):
    with triton_adapters(monkeypatch) as (found, compiled), device(found):
        backend = sys.modules["zokernels.triton.backend"]
        x = torch.empty((2, tokens, 768), dtype=dtype, device="cuda")
        w = torch.empty((3072, 768), dtype=dtype, device="cuda")
        seeds = torch.empty(1, dtype=torch.int64, device="cuda")
        coeffs = torch.empty((2, 1), device="cuda")
        term = (seeds, coeffs[0], None, "stochastic")
        found["update_linear_"](x, w, None, seeds, coeffs, *term, 7, 0, 0, "gaussian", False)
        takes = backend.takes_update(x, w, coeffs, False, "gaussian")
    assert takes == ("update_kernel" not in compiled)
    assert takes == (dtype == torch.bfloat16 and tokens <= 32)


NOT_GRAPHED = {"momentum", "sequential", "accumulated"}
GRAPHED = {name: o for name, o in OPTIONS.items() if not NOT_GRAPHED & set(o)}


@pytest.mark.parametrize("options", sorted(set(OPTIONS) - set(GRAPHED)))
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_the_adapters_of_a_backend_stay_on_the_device(device, kernels, name, options):
    step(device, name, torch.bfloat16, 3, kernels, **OPTIONS[options])


@pytest.mark.parametrize("options", GRAPHED)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("opt", torch.float32),
        *[(name, torch.bfloat16) for name in ("opt", "gpt2", "llama_lora")],
    ],
)
def test_a_step_can_be_recorded(device, kernels, name, dtype, options):
    model, batch, options = moved(device, name, dtype, GRAPHED[options])
    with device(kernels):
        opt = zo.MeZO(model, lr=1e-3, eps=1e-3, **options)
        graphed = zo.GraphedStep(opt, batch, mz.CASES[name].loss_fn)
        for _ in range(2):
            loss = graphed(batch)
    assert loss.device.type == "cuda" and opt.num_steps == 2


@pytest.mark.parametrize("name", ["opt"])
def test_mixed_devices_and_reads_are_noticed(device, name):
    """The instrument itself."""
    with device():
        here, there = torch.ones(3), torch.empty(3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            here + there
        for read in (bool, float, torch.nonzero):
            with pytest.raises(Exception, match=r"local_scalar_dense|nonzero|data-dependent"):
                read(there[:1])


@pytest.mark.parametrize("name", ["opt"])
def test_what_a_graph_must_not_hold_is_noticed(device, name):
    """The instrument itself."""
    with device():
        there, host = torch.empty(3, device="cuda"), torch.empty(3)
        bad: dict[str, Any] = {
            "a list": lambda: torch.tensor([1.0, 2.0, 3.0], device="cuda"),
            "a list, like another": lambda: there.new_tensor([1.0]),
            "a copy": lambda: host.to("cuda"),
            "a copy into": lambda: there.copy_(host),
            "an index": lambda: there[[0, 2]],
            "pinned": lambda: host.pin_memory(),
            "to the host": lambda: there.cpu(),
            "synchronised": lambda: torch.cuda.synchronize(),
            "random state": lambda: torch.cuda.get_rng_state(),
        }
        for what, call in bad.items():
            call()
            with pytest.raises(CaptureError), torch.cuda.graph(None, stream=torch.cuda.Stream(0)):
                call()
                pytest.fail(what)
        with torch.cuda.graph(None, stream=torch.cuda.Stream(0)):
            torch.where(there > 0, there, torch.zeros_like(there)) * 2.0 + torch.arange(
                3, device="cuda"
            )
