"""The benchmarks' own code: faithful peers, statistics, result files, tiny runs end to end."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import (
    breakdown,
    drift,
    fidelity,
    fused,
    harness,
    models,
    peak,
    precision,
    sparse,
    step,
    trainer,
)
from bench.peers import torchzero_peer
from bench.peers.mezo import VARIANTS, MeZOLoop


class FakeClock:
    """A clock that only moves when a case says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, log: list[str], seconds: list[float]):
        values = itertools.cycle(seconds)

        def run() -> None:
            log.append(name)
            self.now += next(values)

        return run


def test_rounds_rotate_and_ratios_are_taken_inside_a_round():
    clock, log = FakeClock(), []
    # The machine is three times slower in the second round, for both cases.
    cases = {"a": clock.case("a", log, [2, 6, 2]), "b": clock.case("b", log, [1, 3, 1])}
    timings = harness.interleave(cases, rounds=3, warmup=0, clock=clock)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert timings.seconds["a"] == [2, 6, 2]
    ratio = timings.ratio("a", "b")
    assert (ratio.low, ratio.median, ratio.high, ratio.rounds) == (2, 2, 2, 3)
    assert timings.fastest(["a", "b"]) == "b"
    assert timings.stat("a").median == 2
    assert timings.stat("a").high > 2


def test_a_fast_case_repeats_and_its_round_value_is_a_median():
    clock, log = FakeClock(), []
    cases = {
        "fast": clock.case("fast", log, [0.1, 0.1, 0.1, 9.0]),
        "slow": lambda: None,
    }
    timings = harness.interleave(cases, rounds=1, min_rounds=1, chunk=0.35, clock=clock)
    assert log.count("fast") == 1 + 3
    assert timings.seconds["fast"] == [pytest.approx(0.1)]


def test_budget_ends_the_rounds_but_not_before_the_least():
    clock, log = FakeClock(), []
    timings = harness.interleave(
        {"a": clock.case("a", log, [10.0])},
        rounds=9,
        min_rounds=2,
        budget=1.0,
        clock=clock,
    )
    assert timings.stat("a").rounds == 2
    timings = harness.interleave(
        {"a": clock.case("a", log, [10.0])},
        rounds=9,
        min_rounds=2,
        budget=35.0,
        clock=clock,
    )
    assert timings.stat("a").rounds == 3  # and one warm-up


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="cases"):
        harness.interleave({})
    with pytest.raises(ValueError, match="min_rounds=4, rounds=3"):
        harness.interleave({"a": lambda: None}, rounds=3, min_rounds=4)
    with pytest.raises(ValueError, match="values"):
        harness.Stat.of([])


def test_percentiles():
    stat = harness.Stat.of([5, 1, 2, 4, 3, 6])
    assert (stat.low, stat.median, stat.high) == (2, 3.5, 5)


def test_csv_round_trip_replaces_rows_of_the_same_key(tmp_path: Path):
    path = tmp_path / "deep" / "x.csv"
    harness.write_rows(path, [{"k": 1, "v": 2.5}, {"k": 2, "v": "a,b"}], key=["k"])
    harness.write_rows(path, [{"k": 2, "v": 7, "new": "n"}, {"k": 3, "v": 8}], key=["k"])
    assert harness.read_rows(path) == [
        {"k": "1", "v": "2.5", "new": ""},
        {"k": "2", "v": "7", "new": "n"},
        {"k": "3", "v": "8", "new": ""},
    ]
    assert harness.read_rows(tmp_path / "none.csv") == []
    with pytest.raises(ValueError, match=r"missing \['k'\]"):
        harness.write_rows(path, [{"v": 1}], key=["k"])


def test_record_says_where_numbers_come_from(tmp_path: Path):
    path = harness.record("x", [{"k": 1}], key=["k"], results=tmp_path, notes={"why": "test"})
    (row,) = harness.read_rows(path)
    assert row["torch"] == torch.__version__
    assert row["device"] and row["commit"] and row["backend"]
    header = json.loads(path.with_suffix(".json").read_text())
    assert header["why"] == "test"
    assert header["threads"] == 1
    assert path.parent.name.endswith("cores")
    with harness.threads(2):
        harness.record("x", [{"k": 2}, {"k": 3, "threads": 7}], key=["k"], results=tmp_path)
    assert [r["threads"] for r in harness.read_rows(path)] == ["1", "2", "7"]


def test_peak_memory_of_a_known_block():
    before, top = peak.peak_of("bench.peak:hold", mib=96)
    assert before > 0
    assert 96 <= top / 2**20 < 104


def test_peak_memory_reports_the_childs_error():
    with pytest.raises(RuntimeError, match="mib must be positive; got -1"):
        peak.peak_of("bench.peak:hold", mib=-1)


class Toy(nn.Module):
    """Names that MeZO decays and names that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.layer_norm = nn.LayerNorm(3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer_norm(self.fc(x)) * self.frozen).square().sum() + self.fc.weight.sum()


def toy() -> tuple[Toy, Tensor]:
    torch.manual_seed(3)
    return Toy(), torch.randn(4, 5)


def formula_step(model: nn.Module, x: Tensor, seed: int, lr: float, eps: float, wd: float) -> float:
    """MeZO in one expression per weight, float64, with the whole direction written out."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    theta = {n: p.detach().double() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    z = {n: torch.normal(0.0, 1.0, theta[n].shape, generator=generator) for n in names}
    twin = Toy().double()

    def loss(scale: float) -> float:
        moved = {n: t + scale * z[n].double() if n in z else t for n, t in theta.items()}
        return float(torch.func.functional_call(twin, moved, (x.double(),)))

    g = (loss(eps) - loss(-eps)) / (2 * eps)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in z:
                decay = 0.0 if "bias" in n or "layer_norm" in n else wd
                p.copy_(theta[n] - lr * (g * z[n].double() + decay * theta[n]))
    return g


@pytest.mark.parametrize("variant", VARIANTS)
def test_mezo_loop_is_the_formula(variant: str):
    (model, x), (twin, _) = toy(), toy()
    loop = MeZOLoop(model, lr=1e-3, eps=1e-2, weight_decay=0.1, variant=variant)
    for seed in range(1, 6):
        plus, g = loop.step(lambda: model(x), seed)
        expected = formula_step(twin, x, seed, 1e-3, 1e-2, 0.1)
        assert g == pytest.approx(expected, rel=2e-3, abs=1e-3)
        assert plus.shape == ()
        for (name, p), (_, q) in zip(
            model.named_parameters(), twin.named_parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(model.frozen, torch.ones(3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mezo_loop_restores_approximately(variant: str, dtype: torch.dtype):
    model = nn.Linear(64, 64).to(dtype)
    start = model.weight.detach().clone()
    loop = MeZOLoop(model, eps=1e-3, variant=variant)
    loop.perturb(7, 1)
    moved = (model.weight.detach() - start).float()
    assert float(moved.std()) == pytest.approx(1e-3, rel=0.15)
    loop.perturb(7, -2)
    loop.perturb(7, 1)
    left = (model.weight.detach() - start).float().norm() / start.float().norm()
    assert left < (1e-6 if dtype == torch.float32 else 1e-2)
    if dtype == torch.bfloat16:
        assert left > 0  # the drift that bench.drift measures


def test_mezo_loop_refuses_an_unknown_variant():
    with pytest.raises(ValueError, match="'fast'"):
        MeZOLoop(nn.Linear(2, 2), variant="fast")


def test_torchzero_runs_or_says_why_not():
    reason = torchzero_peer.unavailable()
    model, x = toy()
    if importlib.util.find_spec("torchzero") is None:
        assert reason is not None and "pip install" in reason
        with pytest.raises(ImportError):
            torchzero_peer.stepper(model)
        return
    assert reason is None
    calls = []
    before = model.fc.weight.detach().clone()

    def loss() -> Tensor:
        calls.append(1)
        return model(x)

    torchzero_peer.stepper(model, lr=1e-2)(loss)
    assert len(calls) == 2
    assert not torch.equal(model.fc.weight, before)


def test_published_shapes():
    counts = {}
    for name in ("opt-125m", "smollm2-135m"):
        with torch.device("meta"):
            model = models.AutoModelForCausalLM.from_config(models.config(name))
        counts[name] = sum(p.numel() for p in model.parameters())
        thin = models.config(f"{name}-skeleton")
        assert thin.num_hidden_layers == model.config.num_hidden_layers
    assert counts == {"opt-125m": 125_239_296, "smollm2-135m": 134_515_008}
    with pytest.raises(ValueError, match="'gpt'"):
        models.config("gpt")
    with pytest.raises(ValueError, match="'int4'"):
        models.build("tiny-opt", "int4")


def test_texts_are_real_and_reproducible():
    text = models.english()
    assert text.train.numel() > 200_000
    assert int(text.train.max()) < text.vocab
    letters = "".join(models.VOCAB[i] for i in text.train.tolist())
    assert "the" in letters and "Python" in letters
    capitals = "".join(models.VOCAB[i] for i in models.capitals().train.tolist())
    assert "THE" in capitals and capitals == capitals.upper()
    batch = text.batch(3, 16, torch.Generator().manual_seed(0))
    assert batch["input_ids"].shape == (3, 16)
    again = text.batch(3, 16, torch.Generator().manual_seed(0))
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_pretraining_learns():
    model = models.text_model(hidden=32, layers=1)
    text = models.english()
    loss = models.pretrain(model, text, steps=40, size=8, length=32)
    assert loss < np.log(text.vocab) - 0.5


def run(app, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_step_end_to_end(tmp_path: Path):
    arguments = (
        "--model",
        "tiny-opt",
        "--size",
        "1x8",
        "--rounds",
        2,
        "--results",
        tmp_path,
    )
    run(step.app, *arguments, "--dtype", "fp32,bf16", "--torchzero-size", "")
    (path,) = tmp_path.rglob("step.csv")
    rows = harness.read_rows(path)
    cases = (step.FORWARDS, *step.OURS, *step.MEZO)
    assert sorted((r["dtype"], r["case"]) for r in rows) == sorted(
        itertools.product(("fp32", "bf16"), cases)
    )
    for r in rows:
        assert float(r["ms_p20"]) <= float(r["ms"]) <= float(r["ms_p80"])
        assert r["rounds"] == "2"
        if r["case"] == r["best_mezo"]:
            assert float(r["speedup"]) == 1.0
        if r["case"] == step.FORWARDS:
            assert float(r["vs_two_forwards"]) == 1.0
    assert path.with_suffix(".png").stat().st_size > 1000
    run(step.app, *arguments, "--dtype", "fp32", "--torchzero-size", "")
    assert len(harness.read_rows(path)) == len(rows)


def test_fused_update_end_to_end(tmp_path: Path):
    arguments = ("--model", "tiny-opt", "--size", "1x16", "--rounds", 2, "--steps", 3)
    run(fused.app, *arguments, "--results", tmp_path)
    (path,) = tmp_path.rglob("fused.csv")
    rows = harness.read_rows(path)
    assert len(rows) == 2 * 2 * 2
    assert all(float(r["vs_apart"]) == 1.0 for r in rows if r["case"] == fused.APART)
    assert all(float(r["ms"]) > 0 for r in rows)


def test_trainer_end_to_end(tmp_path: Path):
    arguments = ("--model", "tiny-opt", "--dtype", "fp32", "--size", "2x8", "--rounds", 2)
    run(trainer.app, *arguments, "--steps", 2, "--results", tmp_path)
    (path,) = tmp_path.rglob("trainer.csv")
    rows = {row["case"]: row for row in harness.read_rows(path)}
    assert set(rows) == {trainer.LOOP, trainer.TRAINER, trainer.ADAMW, trainer.PLAIN}
    assert float(rows[trainer.LOOP]["vs_loop"]) == 1.0
    assert all(float(row["ms"]) > 0 for name, row in rows.items() if name != trainer.PLAIN)
    assert all(float(row["peak_mib"]) >= 0 for row in rows.values())


def test_step_refuses_bad_names():
    with pytest.raises(ValueError, match="'8by64'"):
        step.parse_size("8by64")
    model = models.build("tiny-opt")
    with pytest.raises(ValueError, match="'magic'"):
        step.case("magic", model, models.random_batch(model, 1, 4))


def test_breakdown_accounts_for_the_step():
    model = models.build("tiny-llama", num_hidden_layers=1)
    batch = models.random_batch(model, 1, 4)
    assert len(breakdown.linear_calls(model, batch)) == 7 + 1  # projections of the layer, head
    rows = breakdown.rows(model, "tiny-llama", "fp32", batch, {}, rounds=2)
    for distribution in ("gaussian", "rademacher"):
        part = {r["part"]: r for r in rows if r["distribution"] == distribution}
        assert set(breakdown.PARTS) <= set(part)
        assert all(part[p]["ms"] >= 0 for p in breakdown.PARTS)
        assert sum(part[p]["share"] for p in breakdown.PARTS) == pytest.approx(1, abs=0.3)
        assert part["update"]["ms"] > 0


def test_drift_is_zero_for_ours_and_not_for_mezo():
    for dtype in ("fp32", "bf16"):
        (ours,) = drift.run("zokernels", dtype, 3, 3)
        assert ours["drift"] == 0.0
    mezo = drift.run("mezo add_", "bf16", 4, 2)
    assert [r["step"] for r in mezo] == [2, 4]
    assert 0 < mezo[0]["drift"] < mezo[1]["drift"] < 0.1
    with pytest.raises(ValueError, match="'magic'"):
        drift.stepper("magic", nn.Linear(2, 2), {})


def test_nearest_rounding_keeps_more_weights_where_they_are():
    start = precision.start_model(5)
    assert all(torch.equal(p, p.bfloat16().float()) for p in start.parameters())
    first, end = {}, {}
    for arm in precision.ARMS:
        rows = precision.train(
            start, arm, 1, steps=2, every=1, lr=1e-5, eps=1e-3, size=2, length=16
        )
        assert [r["step"] for r in rows] == [0, 1, 2]
        assert rows[0]["unchanged"] == 1.0
        first[arm] = rows[0]["loss"]
        end[arm] = rows[-1]
    assert len(set(first.values())) == 1  # all arms start from the same weights
    steps, loss = precision.curves([{**r} for r in end.values()], "fp32")
    assert steps == [2] and loss.shape == (1, 1)
    assert end["bf16 nearest"]["unchanged"] > end["bf16 stochastic"]["unchanged"]
    assert end["fp32"]["unchanged"] < end["bf16 stochastic"]["unchanged"]


def test_probe_forms():
    w = torch.tensor([[1.0, -0.75]], dtype=torch.bfloat16)
    z = torch.tensor([[1.0, 1.001]])
    step_ = 2.0**-10  # an eighth of the distance between bfloat16 numbers above 1
    assert torch.equal(fidelity.probe(w, z, step_, "nearest"), w.float())
    up = fidelity.probe(w, z, step_, "stochastic", torch.full((1, 2), 65535))
    assert up[0, 0] == 1 + 2.0**-7
    down = fidelity.probe(w, z, step_, "stochastic", torch.zeros(1, 2, dtype=torch.int64))
    assert down[0, 0] == 1
    split = fidelity.probe(w, z, step_, "split")
    assert torch.equal(split, torch.tensor([[1 + step_, -0.75 + step_]]))  # 1.001 is 1 in bfloat16
    vector = fidelity.probe(w[0], z[0], step_, "vectors")
    assert torch.equal(vector, w[0].float() + step_ * z[0])
    assert torch.equal(fidelity.probe(w, z, step_, "vectors"), w.float())
    with pytest.raises(ValueError, match="'magic'"):
        fidelity.probe(w, z, step_, "magic")


def test_fidelity_scores_and_tiny_run():
    truth = np.array([1.0, -2.0, 0.5])
    assert fidelity.scores(truth, truth) == pytest.approx(
        {"correlation": 1, "slope": 1, "error": 0}
    )
    assert fidelity.scores(2 * truth, truth) == pytest.approx(
        {"correlation": 1, "slope": 2, "error": 1}
    )
    model = models.build("tiny-llama", "bf16")
    values = fidelity.projected_gradients(
        model, models.random_batch(model, 2, 8), eps=1e-2, seeds=3
    )
    truth = values["fp32", "truth"]
    split = fidelity.scores(values["fp32", "split"], truth)
    nearest = fidelity.scores(values["fp32", "nearest"], truth)
    assert split["error"] < 0.02
    assert split["error"] < nearest["error"]
    assert set(values) == {
        ("fp32", "truth"),
        ("bf16", fidelity.PACKAGE),
        *itertools.product(fidelity.COMPUTE, fidelity.FORMS),
    }


def test_sparse_end_to_end(tmp_path: Path):
    arguments = ("--model", "tiny-opt", "--size", "1x8", "--rounds", 2, "--density", "0.1")
    run(sparse.app, *arguments, "--cpu-time", "--results", tmp_path)
    (path,) = tmp_path.rglob("sparse.csv")
    rows = harness.read_rows(path)
    cases = (sparse.FORWARDS, sparse.DUAL, sparse.STEP, sparse.DENSE)
    assert sorted((r["dtype"], r["case"]) for r in rows) == sorted(
        itertools.product(("fp32", "bf16"), cases)
    )
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert {r["moving"] for r in rows} == {str(round(0.1 * linear))}
    assert all(r["clock"] == "processor time" for r in rows)
    assert {r["vs_two_forwards"] for r in rows if r["case"] == sparse.FORWARDS} == {"1.0"}
    with pytest.raises(ValueError, match="'magic'"):
        sparse.case("magic", nn.Linear(2, 2), {}, None)
