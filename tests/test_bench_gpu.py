"""The GPU benchmark without a GPU: all of its timing at tiny shapes, its plan, checks and sums."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

import zokernels as zo
from bench import harness, models, peak
from bench.gpu import __main__ as command
from bench.gpu import checks, choice, cli, floors, machine, ops, report, session, sizes, steps, warm
from zokernels import _choice, _ops, _registry, graphs

ROOT = Path(__file__).resolve().parents[1]
SMALL = dataclasses.replace(
    sizes.TINY,
    models=("tiny-opt",),
    batches=((1, 4), (2, 4)),
    wanted=(("tiny-opt", (2, 4)),),
)
RATES = floors.Floors(1e12, 1e14, {"gaussian": 1e11, "rademacher": 1e12})


def words(text: str) -> str:
    """The text on one line, whatever the console's width."""
    return " ".join(text.split())


# --- the command line -----------------------------------------------------------------------------


def test_a_dry_run_lists_every_step_with_its_plan() -> None:
    out = CliRunner().invoke(cli.app, ["--dry-run", "--model", "opt-125m,opt-13b"])
    assert out.exit_code == 0, out.output
    lines = [line for line in out.output.splitlines() if line.startswith("  opt-")]
    assert len(lines) == 8
    assert "opt-13b 16x256, weights 23.9 GiB" in out.output
    assert "fused" in lines[0] and "tiles" in lines[-1]
    assert "not measured" in out.output


def test_a_dry_run_says_what_comes_first() -> None:
    out = CliRunner().invoke(cli.app, ["--dry-run", "--model", "opt-1.3b"])
    first, _, rest = words(out.output).partition("more cases of ops")
    for wanted in (
        "update_ 1 seed, bf16 gaussian 65536x4096",
        "update_ 1 seed, fp32 gaussian",
        "update_ 64 seeds, bf16 gaussian",
        "step opt-1.3b 1x32",
        "step opt-1.3b 16x256",
    ):
        assert wanted in first
    assert "opt-1.3b 16x64" in rest and "opt-1.3b 16x64" not in first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    out = CliRunner().invoke(cli.app, ["--model", "opt-125m", "--size", "1x32"])
    assert out.exit_code == 2
    assert "needs a CUDA device" in out.output
    assert "--dry-run" in out.output and "--rehearse" in out.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "gpt-5"],
        ["--size", "8"],
        ["--budget", "0"],
        ["--rounds", "0"],
        ["--architecture", "7"],
        ["--ops-only", "--steps-only"],
        ["--op", "conv"],
    ],
)
def test_bad_arguments(arguments: list[str]) -> None:
    out = CliRunner().invoke(cli.app, ["--dry-run", *arguments])
    assert out.exit_code == 2
    assert "Invalid value" in out.output


def test_a_missing_package_is_named_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command.missing() == []
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "rich" else 1)
    with pytest.raises(SystemExit, match=r"bench\.gpu needs rich: pip install rich"):
        command.main()


def test_imports_count_towards_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []
    monkeypatch.setattr(cli, "BEGIN", None)
    monkeypatch.setattr(cli, "app", lambda prog_name: seen.append(cli.BEGIN))
    command.main()
    assert seen == [command.BEGIN]


def test_the_shapes_are_the_published_ones() -> None:
    published = {"opt-125m": 0.125, "opt-1.3b": 1.316, "llama-3.2-1b": 1.236}
    for name, billions in published.items():
        assert steps.weights_of(name) / 2e9 == pytest.approx(billions, rel=0.01)
        count = sum(r * c for r, c in ops.parameter_shapes(name))
        assert 2 * count == steps.weights_of(name)


# --- a rehearsal ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run at tiny shapes."""
    folder = tmp_path_factory.mktemp("rehearsal")
    given = session.time.perf_counter()
    cli._rehearse(given, 600.0, folder, SMALL)
    return folder / harness.device_slug()


@pytest.mark.timeout(600)
def test_a_rehearsal_times_every_op_on_every_backend(rehearsed: Path) -> None:
    rows = harness.read_rows(rehearsed / "gpu_ops.csv")
    timed = {(r["op"], r["backend"]) for r in rows}
    apart = {"sample", "displace_", "displace_vectors"}  # parts of the others
    backends = machine.Rehearsal().backends()
    assert "reference" in backends and "cpp" in backends
    for name in backends:
        kernels = set(_registry.backends()[name].kernels)
        assert {op for op, b in timed if b == name} == (kernels & set(_ops.SCHEMAS)) - apart
    for row in rows:
        assert float(row["ms"]) > 0 and float(row["floor_ms"]) >= 0
        assert row["checked"] == "no" and row["commit"] and row["torch"] == torch.__version__
    cases = {tuple(r[k] for k in ops.KEY) for r in rows}
    assert len(cases) == len(rows)
    assert {r["case"] for r in rows if r["op"] == "update_"} >= {"1 seed", "3 seeds"}
    few = {r["shape"] for r in rows if r["op"] == "linear"}
    assert {f"{t}x64x24" for t in (*SMALL.few, *SMALL.tokens)} == few


@pytest.mark.timeout(600)
def test_a_rehearsal_times_every_step(rehearsed: Path) -> None:
    rows = harness.read_rows(rehearsed / "gpu_steps.csv")
    backends = machine.Rehearsal().backends()
    for b, t in SMALL.batches:
        found = {(r["case"], r["backend"]): r for r in rows if r["batch"] == str(b)}
        kinds = (steps.STEP, steps.STEP_GRAPH)
        options = ("", steps.MASKED, steps.FUSED)
        ours = {(case + option, n) for case in kinds for option in options for n in backends}
        others = {(c, "torch") for c in (steps.FORWARDS, steps.FORWARDS_GRAPH, *steps.MEZO)}
        assert set(found) == ours | others, (b, t)
        assert float(found[steps.STEP, "cpp"]["peak_vs_stacked_forward"]) > 0


@pytest.mark.timeout(600)
def test_a_rehearsal_leaves_notes_plots_and_a_choice(rehearsed: Path) -> None:
    for stem in ("gpu_ops", "gpu_steps"):
        notes = json.loads((rehearsed / f"{stem}.json").read_text())
        assert notes["rehearsal"] is True
        assert notes["left_out"] == [] and notes["failed"] == []
        assert notes["bandwidth"] > 0 and set(notes["noise"]) == {"gaussian", "rademacher"}
        assert (rehearsed / f"{stem}.png").stat().st_size > 1000
    table = _choice.read(
        rehearsed / "gpu_choice.json", ops=_ops.SCHEMAS, names=list(_registry.backends())
    )
    # The first backend of the order is the compiled one: nothing is won by the reference.
    assert table == {}


def test_a_rehearsal_by_hand_says_that_its_numbers_mean_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session.Session, "everything", lambda self, todo, **what: None)
    out = CliRunner().invoke(cli.app, ["--rehearse"])
    assert out.exit_code == 0, out.output
    assert "none of these numbers says anything about a GPU" in words(out.output)


def interpreted(code: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cases_are_what_the_triton_kernels_take() -> None:
    """In Triton's interpreter: every case of the GPU, at tiny shapes."""
    interpreted(
        """
        from bench.gpu import ops, sizes
        from zokernels import _registry
        kernels = _registry.backends()["triton"].kernels
        served = {case.op for case in ops.cases(sizes.TINY, "cpu") if case.op in kernels}
        for case in ops.cases(sizes.TINY, "cpu"):
            if case.op in kernels and case.dtype == "bf16":
                kernels[case.op](*case.arguments())
        assert {"update_", "displace", "project", "linear", "embedding"} <= served
        """,
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_bare_generator_draws_the_noise_of_the_contract() -> None:
    """In Triton's interpreter; and compiled, none of it is optimised away."""
    interpreted(
        """
        import torch
        from bench import generator
        from zokernels import noise
        for distribution in noise.DISTRIBUTIONS:
            run, count = generator.drawing(2 * 8 * 512, distribution, "cpu", programs=2)
            assert count == 2 * 8 * 512
            z = noise.direction(16, 512, torch.tensor(1), 0, 0, 0, distribution).double()
            torch.testing.assert_close(run().double(), z.view(2, -1).sum(1), rtol=0, atol=0.02)
        """,
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    compiled(90)


def compiled(capability: int) -> None:
    import triton_variants as tv

    from bench import generator

    special = {}
    for distribution in ("gaussian", "rademacher"):
        constants = {"ROWS": 8, "GAUSSIAN": distribution == "gaussian"}
        variant = tv.Variant("generate", generator.generate_kernel, constants, {"out": "*fp32"})
        found = tv.compile_for(variant, capability)
        assert (found.stack, found.local) == (0, 0)
        # Two 32-bit products for each of Philox's rounds after the first two, which neighbours
        # share; a thread has four counters.
        assert sum(code.startswith("IMAD.WIDE") for code in found.instructions) >= 4 * 2 * 8
        special[distribution] = sum(code.startswith("MUFU") for code in found.instructions)
    # At least a logarithm and a root for every two normals.
    assert special["gaussian"] >= 4 * 2 * 2 and special["rademacher"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cases_are_what_the_cuda_kernels_take() -> None:
    """On the emulated backend: every case of the GPU, at tiny shapes."""
    from cuda_emulated import native

    kernels = native().kernels()
    served = {case.op for case in ops.cases(sizes.TINY, "cpu") if case.op in kernels}
    assert {"update_", "displace", "project", "linear", "embedding", "sparse_update_"} <= served
    for case in ops.cases(sizes.TINY, "cpu"):
        if case.op in kernels:
            kernels[case.op](*case.arguments())


# --- CUDA's answers -------------------------------------------------------------------------------


class FakeEvent:
    """An event whose clock is the log of what was queued."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: int | None = None

    def record(self) -> None:
        self.log.append("event")
        self.at = len(self.log)

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.at is not None and end.at is not None
        return float(end.at - self.at)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What `machine.Cuda` calls of torch.cuda, answered by the CPU; the log of the calls."""
    log: list[str] = []
    monkeypatch.setattr(FakeEvent, "log", log)
    properties = SimpleNamespace(
        name="Fake H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=1 << 37,
        L2_cache_size=1 << 10,
    )

    def noted(name: str, answer: Any = None) -> Callable[..., Any]:
        assert hasattr(torch.cuda, name), name

        def call(*args: object) -> Any:
            log.append(name)
            return answer

        return call

    answers = {
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "get_device_properties": properties,
        "mem_get_info": (5 << 30, 9 << 30),
        "memory_reserved": 3 << 30,
        "memory_allocated": 1 << 30,
        "max_memory_allocated": 4 << 30,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, noted(name, answer))
    for method in ("record", "synchronize", "elapsed_time"):
        assert hasattr(torch.cuda.Event, method)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(machine, "MIB", 1 << 10)
    yield log


def test_an_op_is_timed_between_events_behind_a_full_queue(fake_cuda: list[str]) -> None:
    here = machine.Cuda("cpu")
    assert (here.name, here.architecture) == ("Fake H200", "sm_90")
    monkey = here._flush

    def flush() -> None:
        fake_cuda.append("flush")
        monkey()

    here._flush = flush  # type: ignore[method-assign]
    fake_cuda.clear()
    stat = here.time(lambda: fake_cuda.append("op"), seconds=0.0, least=3)
    # Once to compile and once for the time of its launch, then three times between events.
    assert stat.rounds == 3 and stat.median == 2.0
    text = " ".join(fake_cuda)
    assert text.startswith("op synchronize op synchronize flush")
    assert text.count("flush event op event") == 3


def test_memory_as_cuda_reports_it(fake_cuda: list[str]) -> None:
    here = machine.Cuda("cpu")
    assert here.free() == (5 << 30) + (2 << 30)
    assert peak.measure(lambda: fake_cuda.append("work"), "cuda") == (1 << 30, 3 << 30)
    tail = fake_cuda[fake_cuda.index("reset_peak_memory_stats") :]
    assert tail.index("work") < tail.index("max_memory_allocated")
    ran: list[int] = []
    assert here.peak(lambda: ran.append(1)) >= 0
    assert len(ran) == 2  # once before, so that what is made once does not count
    assert here.facts()["multiprocessors"] == 132


def test_without_triton_there_is_no_bare_generator(fake_cuda: list[str]) -> None:
    here = machine.Cuda("cpu")
    if _registry.backends()["triton"].reason is not None:
        assert here.drawing(100, "gaussian") is None
    case = ops.OpCase("update_", "1 seed", "bf16", "gaussian", "x", tuple, moved=1e9, noise=1e9)
    row = case.row("cuda", harness.Stat(20.0, 19.0, 21.0, 5), floors.Floors(1e12, 1e14, {}))
    assert row["floor_ms"] == 1.0 and row["of_generator"] == ""


# --- a session: order, budget, failures -----------------------------------------------------------


class Told(machine.Rehearsal):
    """A machine that answers at once."""

    def time(self, run: Callable[[], object], **how: Any) -> harness.Stat:
        run()
        return harness.Stat(1.0, 0.9, 1.1, 3)


def told(tmp_path: Path, **what: Any) -> session.Session:
    given: dict[str, Any] = {"budget": 1e6, "results": tmp_path, "rounds": 1, **what}
    return session.Session(Told(), SMALL, {"cpp": "conformance"}, **given)


def order(s: session.Session, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def op(self: session.Session, case: ops.OpCase) -> list[harness.Row]:
        seen.append("wanted op" if case.wanted == 0 else "op")
        return []

    def step(self: session.Session, name: str, size: sizes.Shape, limit: float) -> list[Any]:
        seen.append("wanted step" if (name, size) in SMALL.wanted else "step")
        return []

    monkeypatch.setattr(session.Session, "_op", op)
    monkeypatch.setattr(session.Session, "_step", step)
    todo = [(name, size) for name in SMALL.models for size in SMALL.batches]
    s.everything(todo, with_ops=True, with_steps=True)
    return list(dict.fromkeys(seen))


def test_the_most_wanted_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = order(told(tmp_path), monkeypatch)
    assert seen == ["wanted op", "wanted step", "op", "step"]


def test_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = told(tmp_path, budget=session.LEAST - 1)
    assert order(s, monkeypatch) == []
    assert "tiny-opt 1x4 (budget)" in s.left_out and "tiny-opt 2x4 (budget)" in s.left_out
    labels = {case.label for case in ops.cases(SMALL, "cpu")}
    assert labels <= {text.removesuffix(" (budget)") for text in s.left_out}


def test_only_what_is_missing_is_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZOKERNELS_GPU", raising=False)
    todo = [("tiny-opt", (1, 4))]
    what = {"only": ("project",), "missing": True}
    first = told(tmp_path, **what)
    first.everything(todo, with_ops=True, with_steps=True)
    assert {r["op"] for r in first.op_rows} == {"project"} and first.step_rows
    again = told(tmp_path, **{**what, "only": ("project", "embedding")})
    again.everything([*todo, ("tiny-opt", (2, 4))], with_ops=True, with_steps=True)
    assert {r["op"] for r in again.op_rows} == {"embedding"}
    assert {(r["batch"], r["length"]) for r in again.step_rows} == {(2, 4)}
    rows = rows_of(tmp_path, "gpu_ops")
    assert {r["op"] for r in rows} == {"project", "embedding"}
    # With other plans it is another measurement.
    monkeypatch.setenv("ZOKERNELS_GPU", "crossover=0")
    other = told(tmp_path, **what)
    other.everything([], with_ops=True, with_steps=False)
    assert len(other.op_rows) == len(first.op_rows)
    assert len(rows_of(tmp_path, "gpu_ops")) == len(rows) + len(other.op_rows)


def test_one_failure_takes_nothing_else_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = _registry.backends()["cpp"].kernels

    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(kernels, "project", broken)
    monkeypatch.setitem(kernels, "embedding", full)
    s = told(tmp_path)
    s.everything([], with_ops=True, with_steps=False)
    assert len(s.failed) == 4
    assert all("project" in f and "RuntimeError: no kernel image" in f for f in s.failed)
    assert len(s.left_out) == 1 and "embedding" in s.left_out[0] and "(memory)" in s.left_out[0]
    assert {"update_", "linear", "displace"} <= {r["op"] for r in s.op_rows}
    assert json.loads(s.files[0].with_suffix(".json").read_text())["failed"] == s.failed


def test_a_generator_that_does_not_compile_costs_the_noise_floor_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompilationError(Exception):
        """As Triton's: of no common base."""

    def refuse(self: Told, count: int, distribution: str) -> None:
        raise CompilationError(f"at 1:1: {distribution}")

    monkeypatch.setattr(Told, "drawing", refuse)
    s = told(tmp_path, only=("update_",))
    s.everything([], with_ops=True, with_steps=False)
    assert s.floors is not None and s.floors.noise == {}
    assert s.failed[0] == "bare generator, gaussian: CompilationError: at 1:1: gaussian"
    assert s.op_rows and {r["of_generator"] for r in s.op_rows} == {""}


def test_without_floors_there_are_still_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(here: machine.Machine, how: sizes.Sizes) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(floors, "measure", refuse)
    s = told(tmp_path)
    s.everything([("tiny-opt", (1, 4))], with_ops=True, with_steps=True)
    assert "floors (memory)" in s.left_out and s.step_rows and not s.op_rows
    assert sum("(no floors)" in text for text in s.left_out) == len(ops.cases(SMALL, "cpu"))


def test_a_lost_device_ends_the_run_and_keeps_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = told(tmp_path)

    def gone(*args: object) -> None:
        s.machine.synchronize = dead
        raise RuntimeError("an illegal memory access was encountered")

    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(_registry.backends()["cpp"].kernels, "linear", gone)
    s.everything([("tiny-opt", (2, 4))], with_ops=True, with_steps=True)
    assert "the device is lost after linear" in s.failed[-1]
    assert {r["op"] for r in s.op_rows} == {"update_", "displace", "project"}
    assert {r["case"] for r in s.step_rows} >= {steps.STEP}
    assert len(harness.read_rows(s.files[0])) == len(s.op_rows)


def test_a_model_without_room_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = told(tmp_path)
    monkeypatch.setattr(Told, "free", lambda self: 1000)
    s.time_steps([("tiny-opt", (1, 4))])
    assert s.left_out == ["tiny-opt 1x4 (memory)"] and not s.step_rows


def test_mezos_plain_spelling_leaves_the_weights_where_graphs_expect_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.build("tiny-opt", "bf16")
    batch = models.random_batch(model, 1, 4)
    places = [p.data_ptr() for p in model.parameters()]
    found = steps.cases(Told(), model, batch, ["cpp"])
    key = "mezo plain [torch]"
    harness.interleave({key: found.runs[key]}, rounds=1, min_rounds=1, after=found.after)
    assert [p.data_ptr() for p in model.parameters()] == places
    found.runs[key]()
    assert [p.data_ptr() for p in model.parameters()] != places
    monkeypatch.setattr(Told, "free", lambda self: 1000)
    short = steps.cases(Told(), model, batch, ["cpp"])
    assert key not in short.runs and "mezo add_ [torch]" in short.runs
    assert "second set of weights" in short.left_out[0]


def test_a_backend_whose_step_fails_is_left_out_of_that_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = _registry.backends()["reference"].kernels
    monkeypatch.delitem(kernels, "update_")
    monkeypatch.delitem(kernels, "sparse_update_")
    monkeypatch.setattr(_registry.backends()["reference"], "table", {})
    s = told(tmp_path)
    s.checked = {"cpp": "conformance", "reference": "conformance"}
    s.time_steps([("tiny-opt", (1, 4))])
    assert {r["backend"] for r in s.step_rows} == {"cpp", "torch"}
    assert len(s.failed) == 1 and "does not serve 'update_'" in s.failed[0]


def test_a_run_of_fused_steps_counts_as_its_steps() -> None:
    model = models.build("tiny-opt", "bf16")
    found = steps.cases(Told(), model, models.random_batch(model, 1, 4), ["cpp"])
    fused, plain = f"step{steps.FUSED} [cpp]", "step [cpp]"
    assert found.steps[fused] == steps.RUN and found.steps[plain] == 1
    each = found.each(harness.Timings({fused: [8.0, 4.0], plain: [8.0], "mezo": [3.0]}))
    assert each.seconds == {fused: [8.0 / steps.RUN, 4.0 / steps.RUN], plain: [8.0], "mezo": [3.0]}


def test_a_graph_that_cannot_be_recorded_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("tiny-opt", "bf16")
    batch = models.random_batch(model, 1, 4)

    def refuse(self: Told, *args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Told, "graph", refuse)
    monkeypatch.setattr(Told, "graphed_step", refuse)
    here = Told()
    found = steps.cases(here, model, batch, ["cpp"])
    ours = {steps.STEP, steps.STEP + steps.FUSED}
    assert {case for case, _ in found.names.values()} == {steps.FORWARDS, *ours, *steps.MEZO}
    assert len(found.left_out) == 3 and "not permitted" in found.left_out[0]
    memory, failed = steps.peaks(here, model, batch, ["cpp"])
    assert not failed
    timings = harness.interleave(found.runs, rounds=1, min_rounds=1, after=found.after)
    rows = steps.rows({"model": "m"}, found.names, timings, steps.weight_bytes(model), memory)
    assert {r["against"] for r in rows} == {steps.FORWARDS}


class NothingFromTheHost(TorchFunctionMode):
    """Refuses what a recording cannot hold: data of the host, and values that the host reads."""

    REFUSED = (
        *(torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray, torch.Tensor.item),
        *(torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__, torch.Tensor.__float__),
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func not in self.REFUSED, f"{func} cannot be recorded"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_what_is_recorded_takes_nothing_from_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []

    def record(
        run: Callable[[], object], warm_up: Callable[[], object]
    ) -> tuple[Callable[[], object], object]:
        warm_up()
        with torch.no_grad(), NothingFromTheHost():
            output = run()
        recorded.append("one")
        return run, output

    class Recording(Told):
        graph = machine.Cuda.graph
        graphed_step = machine.Cuda.graphed_step

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(zo.MeZO, "_stays_on_device", lambda self: True)
    monkeypatch.setattr(graphs, "record", record)
    model = steps.build(name, "cpu")
    found = steps.cases(Recording(), model, models.random_batch(model, 2, 4), ["cpp"], 0.05)
    assert not found.left_out
    assert len(recorded) == 4  # two forwards; a step, with a fused update, under a mask


# --- compiled ahead -------------------------------------------------------------------------------


def test_what_is_compiled_ahead_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(op: str, kernel: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: called.append(op) or kernel(*args)

    own = _registry.backends()["cpp"].kernels
    kernels = {op: noted(op, kernel) for op, kernel in own.items()}
    monkeypatch.setattr(_registry.backends()["cpp"], "kernels", kernels)
    monkeypatch.setattr(_registry.backends()["cpp"], "table", {})
    every = warm.calls(SMALL, "cpu", "cpp")
    assert [label for label, _ in every if label not in {c.label for c in ops.cases(SMALL, "cpu")}]
    shares = [every[i::3] for i in range(3)]
    assert sorted(label for some in shares for label, _ in some) == sorted(n for n, _ in every)
    assert not [line for some in shares for line in warm.make(some, "cpp")]
    assert {case.op for case in ops.cases(SMALL, "cpu")} <= set(called)
    failing = [("one", lambda: 1 / 0), ("two", lambda: called.append("two"))]
    assert warm.make(failing, "cpp") == ["one: ZeroDivisionError: division by zero"]
    assert called[-1] == "two"


def test_processes_that_compile_ahead_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Child:
        def __init__(self, command: list[str], **options: Any) -> None:
            assert command[1:3] == ["-m", "bench.gpu.warm"] and options["start_new_session"]
            self.slow, self.returncode, self.pid = command[3] == "1", None, 4

        def wait(self, timeout: float) -> None:
            if self.slow:
                raise subprocess.TimeoutExpired("warm", timeout)
            self.returncode = 0

    killed: list[int] = []
    monkeypatch.setattr(warm.subprocess, "Popen", Child)
    monkeypatch.setattr(warm.os, "killpg", lambda pid, signal: killed.append(pid))
    found = warm.ahead(3, 5.0)
    assert (found.state, found.detail) == ("not run", "2 of 3 processes came to their end")
    assert killed == [4]


# --- sums -----------------------------------------------------------------------------------------


def test_a_floor_is_the_largest_of_its_parts() -> None:
    assert RATES.seconds(moved=1e9) == 1e-3
    assert RATES.seconds(moved=1e9, flops=1e12) == 1e-2
    assert RATES.seconds(moved=1e9, noise=1e10, distribution="gaussian") == 0.1
    case = ops.OpCase("update_", "1 seed", "bf16", "gaussian", "x", tuple, moved=1e9, noise=1e9)
    row = case.row("triton", harness.Stat(20.0, 19.0, 21.0, 5), RATES)
    assert (row["floor_ms"], row["of_floor"]) == (10.0, 0.5)
    assert (row["of_bandwidth"], row["of_generator"]) == (0.05, 0.5)


def test_rows_of_a_step() -> None:
    names = {
        "f": (steps.FORWARDS, "torch"),
        "fg": (steps.FORWARDS_GRAPH, "torch"),
        "s": (steps.STEP, "triton"),
        "sg": (steps.STEP_GRAPH, "triton"),
        "mp": ("mezo plain", "torch"),
        "ma": ("mezo add_", "torch"),
    }
    seconds = dict(zip(names, ([2.0], [1.0], [3.0], [1.5], [12.0], [9.0]), strict=True))
    memory = {(steps.STEP, "triton"): 52 << 20, ("stacked forward", "torch"): 50 << 20}
    found = steps.rows({"model": "m"}, names, harness.Timings(seconds), 100 << 20, memory)
    rows = {(r["case"], r["backend"]): r for r in found}
    step, graph = rows[steps.STEP, "triton"], rows[steps.STEP_GRAPH, "triton"]
    assert step["speedup"] == 3.0 and step["best_mezo"] == "mezo add_"
    assert step["vs_two_forwards"] == 1.5
    assert graph["vs_two_forwards"] == 1.5  # against forwards in a graph
    assert step["peak_vs_stacked_forward"] == pytest.approx(152 / 150, abs=1e-4)
    assert rows[steps.FORWARDS, "torch"]["peak_mib"] == ""
    lines = report.summary([], [{**r, "batch": 1, "length": 32} for r in found])
    assert lines[0].startswith("triton: m 1x32, step: 1.5 of two forwards, 3.0 x faster than mezo")
    assert "peak 1.0133" in lines[0] and len(lines) == 2


def op_row(backend: str, ms: float, spread: float = 0.0, **what: str) -> harness.Row:
    row = {"op": "linear", "case": "c", "dtype": "bf16", "distribution": "gaussian", "shape": "s"}
    low, high = ms * (1 - spread), ms * (1 + spread)
    return {**row, **what, "backend": backend, "ms": ms, "ms_p20": low, "ms_p80": high}


def test_a_backend_wins_beyond_the_spread_only() -> None:
    order = ["triton", "cuda"]

    def only(*rows: harness.Row) -> choice.Comparison:
        (found,) = choice.compare(rows, order)
        return found

    clear = only(op_row("triton", 2.0, 0.01), op_row("cuda", 1.0, 0.01))
    assert clear.ratio == pytest.approx(2.0) and clear.winner == "cuda"
    assert only(op_row("triton", 1.0, 0.01), op_row("cuda", 2.0, 0.01)).winner == "triton"
    assert only(op_row("triton", 1.05, 0.1), op_row("cuda", 1.0, 0.1)).winner is None
    # A geometric mean: twice as fast at one size and half as fast at another is neither.
    mixed = [op_row(b, ms, 0.01, shape=s) for s, b, ms in (
        ("a", "triton", 2.0), ("a", "cuda", 1.0), ("b", "triton", 1.0), ("b", "cuda", 2.0),
    )]  # fmt: skip
    found = only(*mixed)
    assert found.cases == 2 and found.ratio == pytest.approx(1.0) and found.winner is None
    # Cases that only one has do not count.
    alone = only(op_row("triton", 2.0), op_row("cuda", 1.0), op_row("cuda", 9.0, shape="other"))
    assert alone.cases == 1 and alone.winner == "cuda"
    assert choice.compare([op_row("cuda", 1.0)], order) == []


def test_the_table_keeps_what_was_not_measured() -> None:
    def found(op: str, ratio: float) -> choice.Comparison:
        return choice.Comparison(op, "triton", "cuda", ratio, 1.05, 3)

    before = {
        "sm_80": {"linear": "cuda"},
        "sm_90": {"project": "cuda", "linear": "cuda", "embedding": "cuda"},
    }
    measured = [found("linear", 0.5), found("update_", 1.5), found("embedding", 1.01)]
    after = choice.updated(before, "sm_90", measured)
    assert after == {"sm_80": {"linear": "cuda"}, "sm_90": {"project": "cuda", "update_": "cuda"}}
    assert before["sm_90"]["linear"] == "cuda"


# --- checks before the numbers --------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put one small suite in the place of the conformance suites."""
    path = tmp_path / "test_small.py"
    monkeypatch.setattr(checks, "SUITES", (str(path),))
    monkeypatch.setattr(checks, "KEPT", tmp_path / "build" / "kept.json")
    monkeypatch.setattr(checks, "_digest", lambda b, d: f"of-{d}-{machine.setting()}")
    monkeypatch.delenv("ZOKERNELS_GPU", raising=False)

    def write(body: str) -> None:
        path.write_text(
            "import os, time, pytest\n"
            "@pytest.mark.parametrize('name', ['reference', 'other'])\n"
            f"def test_update_bfloat16(name):\n    {body}\n"
        )

    return write


@pytest.mark.timeout(300)
def test_a_pass_counts_until_something_changes(
    suite: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite("assert name == 'reference' and os.environ['ZOKERNELS_TEST_REQUIRE'].endswith(name)")
    first = checks.conformance("reference", "gpu", 200.0)
    assert first.passed and first.detail == "1 passed, 0 failed, 0 skipped"
    suite("assert False")
    again = checks.conformance("reference", "gpu", 200.0)
    assert again.passed and "in an earlier run" in again.detail
    monkeypatch.setenv("ZOKERNELS_GPU", "crossover=0")
    assert checks.conformance("reference", "gpu", 200.0).state == "failed"
    monkeypatch.delenv("ZOKERNELS_GPU")
    assert checks.conformance("reference", "gpu", 200.0).passed
    other = checks.conformance("reference", "another gpu", 200.0)
    assert other.state == "failed" and other.detail == "0 passed, 1 failed, 0 skipped"


@pytest.mark.timeout(300)
def test_a_suite_that_runs_nothing_or_too_long_is_no_pass(suite: Callable[[str], None]) -> None:
    suite("pytest.skip('nothing here')")
    assert checks.conformance("reference", "gpu", 200.0).state == "failed"
    assert checks.conformance("nobody", "gpu", 200.0).state == "failed"
    suite("time.sleep(600)")
    slow = checks.conformance("reference", "gpu", 12.0)
    assert slow.state == "no time" and slow.detail == "not done after 12 s"


def test_conformance_without_pytest_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    found = checks.conformance("triton", "gpu", 10.0)
    assert found.state == "not run" and "pytest, hypothesis missing" in found.detail
    assert not found.passed


def test_a_digest_changes_with_the_device_and_the_backend() -> None:
    found = {checks._digest(b, d) for b in ("triton", "cuda") for d in ("a", "b")}
    assert len(found) == 4
    assert checks._digest("triton", "a") == checks._digest("triton", "a")


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, subprocess, sys\n{textwrap.dedent(body)}")
    path.chmod(0o755)


@pytest.mark.timeout(300)
def test_the_sanitizer_runs_a_part_of_the_suite(
    suite: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(
        tmp_path / "bin",
        "compute-sanitizer",
        """
        at = sys.argv.index(sys.executable)
        options = sys.argv[1:at]
        assert options[:2] == ["--tool", "memcheck"] and "--error-exitcode" in options
        assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        sys.exit(subprocess.run(sys.argv[at:]).returncode and 86)
        """,
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    suite("assert name == 'reference'")
    clean = checks.sanitize("reference", "memcheck", 200.0)
    assert clean.passed and clean.detail == "clean"
    suite("assert False")
    bad = checks.sanitize("reference", "memcheck", 200.0)
    assert bad.state == "failed" and bad.detail == "errors"


def test_without_the_sanitizer_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.sanitize("cuda", "racecheck", 10.0).state == "not run"
    built = checks.build_cuda((9, 0), 10.0)
    assert built.state == "not run" and "cmake is missing" in built.detail


def test_what_is_sanitized_exists() -> None:
    """Every kind of kernel, and no test that is not there any more."""
    text = "".join((ROOT / name).read_text() for name in checks.SUITES)
    for word in checks.SANITIZED.replace("(", " ").replace(")", " ").split():
        if word.startswith("test_"):
            assert f"def {word}" in text, word


@pytest.mark.timeout(300)
def test_the_library_is_built_for_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.architecture_option((9, 0)) == "90a"
    assert checks.architecture_option((8, 6)) == "86"
    assert checks.architecture_option((12, 0)) == "120"
    tool(
        tmp_path / "bin",
        "cmake",
        f"""
        with open({str(tmp_path / "log")!r}, "a") as log:
            print(*sys.argv[1:], file=log)
        if sys.argv[1] == "--build":
            os.makedirs(sys.argv[2], exist_ok=True)
            open(sys.argv[2] + "/_zokernels_cuda.so", "w").write("library")
        """,
    )
    tool(tmp_path / "bin", "nvcc", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(checks, "BUILD", tmp_path / "build")
    output = tmp_path / "package.so"
    built = checks.build_cuda((9, 0), 100.0, output)
    assert built.passed, built
    assert output.read_text() == "library"
    configured, compiled = (tmp_path / "log").read_text().splitlines()
    assert "-DZOKERNELS_CUDA=ON" in configured
    assert "-DZOKERNELS_CUDA_ARCHITECTURES=90a" in configured
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'bin' / 'nvcc'}" in configured
    assert compiled.startswith("--build") and "--parallel" in compiled
    tool(tmp_path / "bin", "cmake", "sys.exit(3)")
    assert checks.build_cuda((9, 0), 100.0, output).state == "failed"


# --- the whole command, with a CPU in the place of the GPU ----------------------------------------


@pytest.fixture
def as_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command with a CPU in the place of the CUDA device, and checks that are told."""
    states = {"cpp": "passed", "reference": "failed"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cli, "Cuda", lambda device: Told())
    monkeypatch.setattr(cli, "FULL", SMALL)
    monkeypatch.setattr(_choice, "FILE", tmp_path / "backends.json")
    (tmp_path / "backends.json").write_text("{}")
    monkeypatch.setattr(_registry, "choosable", lambda: ["reference", "cpp"])
    monkeypatch.setattr(
        checks,
        "conformance",
        lambda name, device, limit: checks.Check(f"conformance of {name}", states[name], "told"),
    )

    def invoke(*arguments: str, **changed: str) -> Any:
        states.update(changed)
        given = ["--model", "tiny-opt", "--size", "2x4", "--results", str(tmp_path), *arguments]
        return CliRunner().invoke(cli.app, given)

    return invoke


def rows_of(tmp_path: Path, stem: str) -> list[dict[str, str]]:
    return harness.read_rows(tmp_path / harness.device_slug() / f"{stem}.csv")


def test_a_backend_that_fails_conformance_gets_no_numbers(
    as_gpu: Callable[..., Any], tmp_path: Path
) -> None:
    out = as_gpu()
    assert out.exit_code == 1, out.output
    assert "conformance of reference: failed" in out.output
    rows = rows_of(tmp_path, "gpu_ops")
    assert {r["backend"] for r in rows} == {"cpp"} and {r["checked"] for r in rows} == {
        "conformance"
    }
    assert {r["backend"] for r in rows_of(tmp_path, "gpu_steps")} == {"cpp", "torch"}
    assert "cpp: update_ 1 seed, bf16 gaussian" in out.output
    notes = json.loads((tmp_path / harness.device_slug() / "gpu_ops.json").read_text())
    assert any("reference: failed" in text for text in notes["checks"])


def test_no_backend_that_passes_no_numbers(as_gpu: Callable[..., Any], tmp_path: Path) -> None:
    out = as_gpu(cpp="no time")
    assert out.exit_code == 1
    assert "no backend passed: no numbers" in words(out.output)
    assert not rows_of(tmp_path, "gpu_ops")


def test_all_passed_and_the_choice_is_written_when_asked_for(
    as_gpu: Callable[..., Any], tmp_path: Path
) -> None:
    out = as_gpu("--ops-only", reference="passed")
    assert out.exit_code == 0, out.output
    assert not rows_of(tmp_path, "gpu_steps")
    assert _choice.FILE.read_text() == "{}"
    assert (tmp_path / harness.device_slug() / "gpu_choice.json").is_file()
    out = as_gpu("--ops-only", "--write-choice", "--unchecked")
    assert out.exit_code == 0, out.output
    assert {r["checked"] for r in rows_of(tmp_path, "gpu_ops")} == {"no"}
    # Every time is told to be the same: neither wins.
    assert json.loads(_choice.FILE.read_text()) == {}


def test_compiled_kernels_are_checked_first_and_the_order_of_the_registry_stays(
    as_gpu: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def told(name: str, device: str, limit: float) -> checks.Check:
        seen.append(name)
        return checks.Check(name, "passed", "told")

    monkeypatch.setattr(checks, "conformance", told)
    out = as_gpu("--ops-only", "--op", "project")
    assert out.exit_code == 0, out.output
    there = Told().backends()
    assert seen == there[::-1] and len(there) > 1
    assert list(dict.fromkeys(r["backend"] for r in rows_of(tmp_path, "gpu_ops"))) == there
    monkeypatch.setattr(cli, "BEGIN", session.time.perf_counter() - 1e6)
    late = as_gpu("--ops-only", "--op", "project", "--unchecked")
    assert "(budget)" in late.output or "no floors" in late.output


def test_only_checks_build_and_sanitizer(
    as_gpu: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note(what: str, state: str = "passed") -> checks.Check:
        seen.append(what)
        return checks.Check(what, state, "told")

    monkeypatch.setattr(checks, "build_cuda", lambda capability, limit: note(f"build {capability}"))
    monkeypatch.setattr(checks, "sanitize", lambda name, tool, limit: note(f"{tool} {name}"))
    out = as_gpu("--build-cuda", "--check-only", "--sanitize", "--backend", "cpp")
    assert out.exit_code == 0, out.output
    assert seen == ["build (9, 0)", "memcheck cpp", "racecheck cpp"]
    assert not rows_of(tmp_path, "gpu_ops")
    monkeypatch.setattr(checks, "build_cuda", lambda capability, limit: note("build", "failed"))
    assert as_gpu("--build-cuda", "--check-only", "--backend", "cpp").exit_code == 1
    bad = as_gpu("--backend", "cudnn")
    assert bad.exit_code == 2 and "must be among" in words(bad.output)
