"""A federation: determinism, participation, failures, checkpoints, a killed process, memory."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fed_zoo as zoo
import pytest
import torch

from fedzo.checkpoint import CheckpointError
from fedzo.records import RoundRecord, ScalarStats
from fedzo.sampling import EXAMPLES, Examples, generator, happens, participants
from fedzo.task import Task

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT / "tests"), str(ROOT / "tests" / "fed")]
TROUBLE = {"clients": 6, "clients_per_round": 3, "dropout": 0.2, "stragglers": 0.3}


def told(record: RoundRecord) -> str:
    """A record without its time, as text (in which NaN equals NaN)."""
    return json.dumps({**record.to_dict(), "seconds": 0.0})


def test_the_toy_task_is_a_task():
    assert isinstance(zoo.ToyTask(), Task)


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["meerkat_vp", "fedmezo", "fedspzo", "fedkseed", "fedavg"])
def test_one_seed_one_run(name):
    """Same seed: same records and weights, whatever torch's random state; another seed differs."""
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(runs))
        fed = zoo.federation(name, seed=seed, **TROUBLE)
        records = [told(r) for r in fed.run(3)]
        runs.append((records, zoo.weights(fed.model)))
    assert runs[0][0] == runs[1][0] and not zoo.differing(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_participants_are_drawn_by_round_without_repeats():
    drawn = [participants(3, r, range(10), 4) for r in range(200)]
    assert all(len(set(d)) == 4 and list(d) == sorted(d) for d in drawn)
    counts = [sum(k in d for d in drawn) for k in range(10)]
    assert min(counts) > 50 and max(counts) < 110  # 80 each, deviation 7
    assert drawn == [participants(3, r, range(10), 4) for r in range(200)]
    assert participants(3, 1, [4, 2], 2) == (2, 4)
    with pytest.raises(ValueError, match=r"count must be in \[1, 2\]; got 3"):
        participants(3, 1, [4, 2], 3)


def test_events_have_their_probability():
    hits = sum(happens(1, 2, r, k, 0.3) for r in range(40) for k in range(25))
    assert 240 < hits < 360
    assert not any(happens(1, 2, r, 0, 0.0) for r in range(20))
    assert all(happens(1, 2, r, 0, 1.0) for r in range(20))


def test_examples_come_in_epochs():
    """Every epoch is a new order of all examples; a position picks up where another stopped."""
    shard = [10, 11, 12, 13, 14]
    stream = Examples(shard, 2, seed=1, client=0)
    taken = [i for _ in range(10) for i in next(stream)]
    for epoch in range(4):
        assert sorted(taken[5 * epoch : 5 * epoch + 5]) == shard
    assert len({tuple(taken[5 * e : 5 * e + 5]) for e in range(4)}) > 1
    later = Examples(shard, 2, seed=1, client=0, position=7)
    assert next(later) == taken[14:16] and later.position == 8
    assert sorted(next(Examples(shard, 9, seed=1, client=0))) == shard
    with pytest.raises(ValueError, match="no examples"):
        Examples([], 2, seed=1, client=3)
    assert generator(1, EXAMPLES, 0, 0).random() != generator(1, EXAMPLES, 0, 1).random()


# --- participation and failures -------------------------------------------------------------------


def test_who_was_invited_and_what_became_of_them():
    fed = zoo.federation("meerkat", **TROUBLE)
    records = list(fed.run(8))
    late_before: tuple[int, ...] = ()
    for record in records:
        assert len(record.invited) == 3
        groups = [*record.accepted, *record.dropped, *record.late]
        assert sorted(groups) == sorted(record.invited)
        assert set(record.losses) == {*record.accepted, *record.late}
        assert set(record.rejected) >= set(late_before) - set(record.accepted)
        late_before = record.late
    assert any(r.dropped for r in records) and any(r.late for r in records)
    assert fed.rejections == {"late": sum(len(r.late) for r in records[:-1])}
    assert fed.bytes_up == sum(r.bytes_up for r in records)
    assert fed.last is records[-1]


def test_a_round_without_reports_moves_nothing():
    fed = zoo.federation("meerkat", dropout=1.0)
    before = zoo.weights(fed.model)
    (record,) = list(fed.run(1))
    assert record.accepted == () and record.dropped == record.invited and record.bytes_up == 0
    assert record.scalars.count == 0 and not zoo.differing(zoo.weights(fed.model), before)
    assert len(fed.updates(0)) == 1  # the round counts


@pytest.mark.parametrize("name", ["meerkat", "decomfl", "fedspzo", "fedkseed", "fedmezo"])
def test_a_client_whose_loss_is_not_finite_is_refused(name):
    fed = zoo.federation(name)
    loss = fed.task.loss
    fed.task.loss = lambda m, b: (
        loss(m, b)
        * (  # type: ignore[method-assign]
            float("nan") if int(b["input_ids"][0, 0]) == sick else 1.0
        )
    )
    sick = int(zoo.ToyTask().tokens[0, 0])
    before = zoo.weights(fed.model)
    records = list(fed.run(2))
    refused = {c for r in records for c in r.rejected}
    assert refused and all("not finite" in w for r in records for w in r.rejected.values())
    assert any(set(r.accepted) and not set(r.accepted) & set(r.rejected) for r in records)
    after = zoo.weights(fed.model)
    assert zoo.differing(before, after)
    assert all(bool(torch.isfinite(v).all()) for v in after.values())


def test_clients_without_examples_are_never_invited():
    task = zoo.ToyTask()
    fed = zoo.Federation(
        zoo.build(), task, zoo.method("random_mask"), [[], [1, 2], [], [3]], batch_size=2
    )
    (record,) = list(fed.run(1))
    assert record.invited == (1, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clients_per_round": 0}, r"clients_per_round must be in \[1, 4\]; got 0"),
        ({"clients_per_round": 5}, "clients_per_round"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"dropout": 1.5}, "dropout must be in"),
        ({"stragglers": -0.1}, "stragglers must be in"),
        ({"aggregate": "mode"}, "aggregate must be one of"),
        ({"weights": "size"}, "weights must be one of"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"trim": 0.5}, "trim must be in"),
    ],
)
def test_arguments_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        zoo.federation("random_mask", **given)


def test_a_method_is_for_one_run():
    method, task = zoo.method("random_mask"), zoo.ToyTask()
    zoo.Federation(zoo.build(), task, method, [[0, 1]])
    with pytest.raises(ValueError, match="method must be a fresh one"):
        zoo.Federation(zoo.build(), task, method, [[0, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_and_scalars_are_float32_in_low_precision(dtype):
    """The official code logs float16 losses, which are all equal when they matter."""
    fed = zoo.federation("fedmezo", model=zoo.build(dtype), options={"signal": "loss"})
    fed.task.tokens = fed.task.tokens[:1].expand(60, -1) + torch.arange(60)[:, None] % 2
    (record,) = list(fed.run(1))
    values = [*record.losses.values(), record.scalars.mean, record.scalars.maximum]
    coarse = [float(torch.tensor(v).to(dtype)) for v in values]
    assert sum(v != c for v, c in zip(values, coarse, strict=True)) >= 4


def test_shards_must_be_examples():
    task = zoo.ToyTask()
    for shards, message in (([[], []], "at least one client"), ([[0, 60]], r"shards\[0\]")):
        with pytest.raises(ValueError, match=message):
            zoo.Federation(zoo.build(), task, zoo.method("random_mask"), shards)


def test_records_survive_json():
    fed = zoo.federation("meerkat_vp", **TROUBLE)
    for record in fed.run(2):
        again = RoundRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        assert again == record
    assert ScalarStats.of([1.0, 3.0]) == ScalarStats(2, 2.0, 1.0, 1.0, 3.0)


# --- checkpoints ----------------------------------------------------------------------------------

CHECKED = ["meerkat", "meerkat_vp", "fedmezo-loss", "fedspzo", "fedkseed-pro", "decomfl", "fedavg"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_resumed_run_is_the_run(name, tmp_path):
    whole = zoo.federation(name, **TROUBLE)
    records = [told(r) for r in whole.run(5)]
    file = tmp_path / "run.safetensors"
    first = zoo.federation(name, checkpoint=file, **TROUBLE)
    head = [told(r) for r in first.run(3)]
    rest = zoo.federation(name, **TROUBLE)
    rest.load(file)
    assert rest.round == 3 and rest.last is not None and told(rest.last) == head[-1]
    tail = [told(r) for r in rest.run(5)]
    assert head + tail == records
    assert not zoo.differing(zoo.weights(rest.model), zoo.weights(whole.model))
    assert rest.updates(0) == whole.updates(0)
    for attribute in ("bytes_up", "bytes_down", "rejections"):
        assert getattr(rest, attribute) == getattr(whole, attribute)


def test_a_bfloat16_run_under_a_mask_resumes(tmp_path):
    """The float32 values under the weights are what continues, not their roundings."""
    file = tmp_path / "run.safetensors"
    options = {"lr": 1e-4}  # below a rounding step of most weights
    whole = zoo.federation("meerkat", model=zoo.build(torch.bfloat16), options=options)
    list(whole.run(4))
    first = zoo.federation(
        "meerkat", model=zoo.build(torch.bfloat16), options=options, checkpoint=file
    )
    list(first.run(2))
    rest = zoo.federation("meerkat", model=zoo.build(torch.bfloat16), options=options)
    rest.load(file)
    list(rest.run(4))
    assert not zoo.differing(rest.space.values(), whole.space.values())
    assert not zoo.differing(zoo.weights(rest.model), zoo.weights(whole.model))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 6}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"options": {"lr": 0.5}}, "method.lr"),
        ({"options": {"density": 0.03}}, "fingerprint"),
        ({"clients": 5}, "shards"),
        ({"aggregate": "median"}, "aggregate"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, word, tmp_path):
    file = tmp_path / "run.safetensors"
    fed = zoo.federation("meerkat")
    list(fed.run(1))
    fed.save(file)
    other = zoo.federation("meerkat", **change)
    before = zoo.weights(other.model)
    with pytest.raises(CheckpointError, match=word):
        other.load(file)
    assert other.round == 0 and not zoo.differing(zoo.weights(other.model), before)


def test_another_first_model_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    fed = zoo.federation("random_mask")
    fed.save(file)
    model = zoo.build()
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match="first weights"):
        zoo.federation("random_mask", model=model).load(file)


def test_damaged_checkpoints_are_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    fed = zoo.federation("random_mask")
    list(fed.run(1))
    fed.save(file)
    good = file.read_bytes()
    other = zoo.federation("random_mask")
    for bad in (b"", b"junk" * 9, good[:-1], good[: len(good) // 2]):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            other.load(file)
    for place in range(len(good) - 40, len(good), 7):
        raw = bytearray(good)
        raw[place] ^= 4
        file.write_bytes(bytes(raw))
        with pytest.raises(CheckpointError, match="checksum"):
            other.load(file)
    file.write_bytes(good.replace(b"fedzo.checkpoint", b"fedzo.checkpaint"))
    with pytest.raises(CheckpointError, match="kind"):
        other.load(file)
    file.write_bytes(good)
    other.load(file)
    assert other.round == 1


# --- a killed process -----------------------------------------------------------------------------

VICTIM = """
import sys, time
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import fed_zoo as zoo

def up(client, data):
    if fed.round == 2 and client >= 2:  # in the middle of round 3
        print("middle", flush=True)
        time.sleep(600)
    return [data]

fed = zoo.federation({name!r}, checkpoint={file!r}, channel=up)
for record in fed.run(5):
    print("round", record.round, flush=True)
"""


def test_kill_9_in_the_middle_of_a_round(tmp_path):
    """The process is gone with a client half way; the run goes on from the last round, exactly."""
    name, file = "meerkat", tmp_path / "run.safetensors"
    code = VICTIM.format(paths=PATHS, name=name, file=str(file))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
    ) as victim:
        assert victim.stdout is not None
        lines = []
        for line in victim.stdout:
            lines.append(line.strip())
            if line.startswith("middle"):
                break
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(60) == -signal.SIGKILL
    assert lines == ["round 1", "round 2", "middle"]
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]

    whole = zoo.federation(name)
    records = [told(r) for r in whole.run(5)]
    rest = zoo.federation(name)
    rest.load(file)
    assert rest.round == 2
    assert [told(r) for r in rest.run(5)] == records[2:]
    assert not zoo.differing(zoo.weights(rest.model), zoo.weights(whole.model))


def test_a_checkpoint_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    """A failure while writing leaves the old file and no litter."""
    file = tmp_path / "run.safetensors"
    fed = zoo.federation("random_mask", checkpoint=file)
    next(fed.run(1))
    good = file.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        list(fed.run(2))
    assert file.read_bytes() == good and list(tmp_path.iterdir()) == [file]


def test_checkpoints_every_few_rounds_and_at_the_end(tmp_path):
    file = tmp_path / "run.safetensors"
    fed = zoo.federation("random_mask", checkpoint=file, checkpoint_every=3)
    seen = []
    for _ in fed.run(4):
        other = zoo.federation("random_mask")
        if file.exists():
            other.load(file)
        seen.append(other.round)
    assert seen == [0, 0, 3, 4]


# --- memory ---------------------------------------------------------------------------------------

CROWD = """
import sys
sys.path[:0] = {paths!r}
import resource, torch
torch.set_num_threads(1)
import fed_zoo as zoo
from torch import nn


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4096, 256), nn.Linear(256, 3)

    def forward(self, input_ids, labels):
        logits = self.head(self.table(input_ids).mean(1))
        return nn.functional.cross_entropy(logits, labels[:, 0] % 3)


class Task(zoo.ToyTask):
    def loss(self, model, batch):
        return model(**batch)


def peak(clients, rounds):
    task = Task(4 * clients)
    fed = zoo.Federation(
        model, task, zoo.method("full_fedzo", steps=2),
        [range(4 * k, 4 * k + 4) for k in range(clients)], batch_size=1, seed=3,
    )
    for record in fed.run(rounds):
        assert len(record.accepted) == clients
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


torch.manual_seed(0)
model = Bag()
print(peak(10, 20), peak(1000, 1), sum(p.numel() * 4 for p in model.parameters()))
"""


def test_a_thousand_clients_fit_where_ten_do():
    """Peak resident memory with 1000 clients is within 10% of that with 10, every weight moving.

    The model is small beside the interpreter, so the growth is held against the model too: less
    than one more copy.
    """
    out = subprocess.run(
        [sys.executable, "-c", CROWD.format(paths=PATHS)],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    ten, thousand, size = map(int, out.stdout.split())
    assert thousand <= 1.1 * ten, (ten, thousand)
    assert thousand - ten < size, (ten, thousand, size)


def test_the_notes_python_runs(tmp_path, monkeypatch, capsys):
    """The block in fedzo/README.md, and the names in its table."""
    from fedzo.methods import METHODS

    text = (ROOT / "fedzo" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("rounds=100", "rounds=2")
    monkeypatch.chdir(tmp_path)
    task = zoo.ToyTask()
    exec(
        code,
        {
            "model": zoo.build(),
            "task": task,
            "shards": zoo.shards(4, task),
            "texts": [task.batch([0, 1])],
        },
    )
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (tmp_path / "run.safetensors").exists()
    assert all(f"`{name}`" in text for name in METHODS)


def test_options_are_fields_with_defaults():
    """Every method can be made without arguments, and every option has a default."""
    from fedzo.methods import METHODS

    for kind in METHODS.values():
        made = kind()
        for f in dataclasses.fields(kind):
            assert f.default is not dataclasses.MISSING and f.kw_only
        assert made.options().keys() == {f.name for f in dataclasses.fields(kind)}
