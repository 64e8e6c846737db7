"""Plans of GPU products: from a model and data per architecture, for devices that are not there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import model_zoo as mz
import pytest
import torch

import zokernels as zo
from zokernels.planner import plan_linear
from zokernels.triton.devices import ARCHITECTURES, architecture, of_device
from zokernels.triton.plan import fused_tiles, plan

NAMES = list(ARCHITECTURES)


def of(tokens: int, device: str = "sm_90", **more: object) -> object:
    return plan_linear(2048, 2048, tokens=tokens, dtype=torch.bfloat16, device=device, **more)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_few_tokens_are_fused_and_many_go_to_the_vendor(name: str, transposed: bool) -> None:
    kinds = [of(1 << i, name, transposed=transposed).kind for i in range(13)]
    assert kinds[0] == "fused" and kinds[-1] == "tiles"
    assert kinds == sorted(kinds)  # one crossover


@pytest.mark.parametrize("name", NAMES)
def test_what_a_plan_says(name: str) -> None:
    few, many = of(8, name), of(4096, name)
    assert few.noise == 2048 * 2048 * few.token_blocks
    assert few.instructions == 24 * few.noise
    assert few.weight_bytes == 2 * 2048 * 2048
    assert many.token_blocks == 1 and many.noise == 2048 * 2048
    assert many.scratch_bytes == 2 * many.tile_outputs * 2048 * 2
    assert many.scratch_bytes <= max(16 << 20, ARCHITECTURES[name].cache // 2)
    assert many.tiles * many.tile_outputs >= 2048
    assert few.flops == 2 * 2 * 8 * 2048 * 2048
    found = ARCHITECTURES[name]
    # No faster than the bytes.
    assert few.seconds > few.weight_bytes / found.bandwidth
    assert of(8, name, distribution="rademacher").seconds <= few.seconds


def test_float32_is_fused_only_where_tf32_is_allowed() -> None:
    common = dict(tokens=4, branches=2, terms=1, itemsize=4, architecture=architecture("sm_90"))
    assert not plan(512, 512, **common).fused
    assert plan(512, 512, **common, tf32=True).fused


def test_shared_rows_count_once() -> None:
    common = dict(tokens=16, branches=8, itemsize=2, architecture=architecture("sm_80"))
    assert plan(2048, 2048, terms=1, shared=True, **common).row_blocks == 1
    assert plan(2048, 2048, terms=1, **common, scratch=1).tiles.rows == 64


def test_splits_fill_the_gpu_and_no_more() -> None:
    narrow = plan(
        256, 4096, tokens=4, branches=2, terms=1, itemsize=2, architecture=architecture("sm_90")
    )
    assert narrow.fused and 1 < narrow.splits <= 16
    wide = plan(
        65536, 4096, tokens=4, branches=2, terms=1, itemsize=2, architecture=architecture("sm_90")
    )
    assert wide.splits == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stacked", [1, 16, 17, 64, 5000])
def test_tiles_get_smaller(stacked: int, transposed: bool, itemsize: int) -> None:
    found = fused_tiles(stacked, itemsize, transposed)
    held = [t.outputs * t.rows * t.columns * t.stages for t in found]
    assert held == sorted(held, reverse=True)
    assert all(64 % t.columns == 0 and t.rows >= 16 for t in found)


def test_architectures() -> None:
    assert architecture("sm_120").bandwidth == ARCHITECTURES["sm_100"].bandwidth
    assert architecture("sm_87").part == "RTX 3090"
    assert of_device("cpu").name == "sm_90"  # the interpreter plans for one
    for bad in ("sm_75", "sm_", "gfx942"):
        with pytest.raises(ValueError, match=r"sm_80 or newer|such as sm_90"):
            architecture(bad)


def test_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOKERNELS_GPU", "crossover=0")
    assert of(1).kind == "tiles"
    monkeypatch.setenv("ZOKERNELS_GPU", "crossover=1000000, bandwidth=1e9")
    assert of(4096).kind == "fused"
    assert architecture("sm_80").bandwidth == 1e9
    for bad in ("speed=3", "bandwidth", "bandwidth=fast", "part=7"):
        monkeypatch.setenv("ZOKERNELS_GPU", bad)
        with pytest.raises(ValueError, match="ZOKERNELS_GPU"):
            of(1)
    monkeypatch.delenv("ZOKERNELS_GPU")
    slow = dataclasses.replace(architecture("sm_90"), matrix16=1e12)
    common = dict(tokens=32, branches=2, terms=1, itemsize=2)
    assert plan(2048, 2048, **common, architecture=slow).seconds > of(32).seconds


def test_explain_for_a_device_that_is_not_there() -> None:
    model, batch = mz.build("opt"), mz.lm_batch()
    found = zo.explain(model.to(torch.bfloat16), batch, device="sm_80")
    products = [c for c in found.calls if c.plan is not None]
    assert products and {c.backend for c in found.calls} == {"triton"}
    assert {c.op for c in products} == {"linear", "linear_cross_entropy"}
    assert all(c.plan.seconds for c in products)
    text = str(found)
    assert "noise instructions" in text and "GFLOP" in text and "reads" in text
    with pytest.raises(ValueError, match="sm_80 or newer"):
        zo.explain(model, batch, device="sm_70")


def test_no_triton_is_needed() -> None:
    """The package and its plans work without Triton; the backend says why it is off."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import zokernels as zo\n"
        "from zokernels import _registry\n"
        "from zokernels.planner import plan_linear\n"
        "print(plan_linear(64, 64, tokens=1, device='sm_90').kind)\n"
        "print(_registry.backends()['triton'].reason)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "Triton is not installed" in out.stdout and "pip install triton" in out.stdout
