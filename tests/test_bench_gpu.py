"""The GPU benchmark as far as it goes without one: its plan, its sums, its refusal."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from bench import gpu, harness, models


def test_a_dry_run_lists_every_step_with_its_plan() -> None:
    out = CliRunner().invoke(gpu.app, ["--dry-run", "--model", "opt-125m,opt-13b"])
    assert out.exit_code == 0, out.output
    lines = [line for line in out.output.splitlines() if line.startswith("  opt-")]
    assert len(lines) == 8
    assert "opt-13b 16x256, weights 23.9 GiB" in out.output
    assert "fused" in lines[0] and "tiles" in lines[-1]
    assert "not measured" in out.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    out = CliRunner().invoke(gpu.app, ["--model", "opt-125m", "--size", "1x32"])
    assert out.exit_code == 2
    assert "needs a CUDA device" in out.output and "--dry-run" in out.output


@pytest.mark.parametrize(
    "arguments", [["--model", "gpt-5"], ["--size", "8"], ["--budget", "0"], ["--architecture", "7"]]
)
def test_bad_arguments(arguments: list[str]) -> None:
    out = CliRunner().invoke(gpu.app, ["--dry-run", *arguments])
    assert out.exit_code == 2
    assert "Invalid value" in out.output


def test_the_shapes_are_the_published_ones() -> None:
    sizes = {"opt-125m": 0.125, "opt-1.3b": 1.316, "llama-3.2-1b": 1.236}
    for name, billions in sizes.items():
        assert gpu.weights_of(name) / 2e9 == pytest.approx(billions, rel=0.01)


def test_a_floor_is_the_largest_of_its_parts() -> None:
    floors = gpu.Floors(1e12, 1e14, {"gaussian": 1e11, "rademacher": 1e12})
    assert floors.seconds(moved=1e9) == 1e-3
    assert floors.seconds(moved=1e9, flops=1e12) == 1e-2
    assert floors.seconds(moved=1e9, noise=1e10, distribution="gaussian") == 0.1
    case = gpu.OpCase("update_", "bf16", "gaussian", "x", lambda: None, moved=1e9, noise=1e9)
    row = case.row(harness.Stat(20.0, 19.0, 21.0, 5), floors)
    assert (row["floor_ms"], row["of_floor"]) == (10.0, 0.5)
    assert (row["of_bandwidth"], row["of_generator"]) == (0.05, 0.5)


def test_rows_of_a_step() -> None:
    seconds = {
        gpu.FORWARDS: [2.0, 2.0],
        gpu.FORWARDS_GRAPH: [1.0, 1.0],
        gpu.STEP: [3.0, 3.0],
        gpu.STEP_GRAPH: [1.5, 1.5],
        "mezo plain": [12.0, 12.0],
        "mezo add_": [9.0, 9.0],
    }
    memory = {"weights": 100 << 20, gpu.STEP: 52 << 20, "stacked forward": 50 << 20, "forward": 1}
    rows = {r["case"]: r for r in gpu.step_rows({"model": "m"}, harness.Timings(seconds), memory)}
    assert rows[gpu.STEP]["speedup"] == 3.0 and rows[gpu.STEP]["best_mezo"] == "mezo add_"
    assert rows[gpu.STEP]["vs_two_forwards"] == 1.5
    assert rows[gpu.STEP_GRAPH]["vs_two_forwards"] == 1.5  # against forwards in a graph
    assert rows[gpu.STEP]["peak_vs_stacked_forward"] == pytest.approx(152 / 150, abs=1e-4)
    assert rows[gpu.FORWARDS]["peak_mib"] == ""


def test_the_cases_of_a_step_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a plain call in place of a graph."""
    model = models.build("tiny-opt", "bf16")
    batch = models.random_batch(model, 1, 8)
    monkeypatch.setattr(gpu.zo, "GraphedStep", lambda opt, batch: lambda b: opt.step(b))
    monkeypatch.setattr(gpu, "graph_of", lambda run: run)
    cases = gpu.step_cases(model, batch)
    assert set(cases) == {gpu.FORWARDS, gpu.FORWARDS_GRAPH, gpu.STEP, gpu.STEP_GRAPH, *gpu.MEZO}
    for run in cases.values():
        run()
