"""The journal of a run: exact replay, slices, files that survive a kill, and every refusal."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zokernels as zo
from zokernels import _targets, noise
from zokernels.displacement import UnknownVersionError
from zokernels.optim import MeZO
from zokernels.trajectory import Trajectory
from zokernels.trajectory_format import (
    CorruptTrajectoryError,
    ForeignFileError,
    ModelMismatchError,
    TrajectoryError,
    TrajectoryVersionError,
    TruncatedTrajectoryError,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model(dtype: torch.dtype = torch.float32, width: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 3))
    return layers.to(dtype)


BATCH = (
    torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 0, 1]),
)


def loss_fn(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    dtype = next(net.parameters()).dtype
    return nn.functional.cross_entropy(net(x.to(dtype)).float(), y)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(net.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(
            (t.reshape(-1) for t in a.values()), (t.reshape(-1) for t in b.values()), strict=True
        )
    )


def two_groups(net: nn.Module) -> list[dict[str, object]]:
    named = list(net.named_parameters())
    return [
        {"params": named[:3], "lr": 3e-2, "weight_decay": 0.05},
        {"params": named[3:], "lr": 1e-2, "eps": 2e-3},
    ]


def run(
    dtype: torch.dtype = torch.float32, steps: int = 4, journal: Trajectory | None = None, **options
) -> tuple[nn.Module, dict[str, Tensor], Trajectory]:
    """A short run: the trained model, the weights it began with, its journal."""
    net = model(dtype)
    start = weights(net)
    journal = Trajectory() if journal is None else journal
    opt = MeZO(two_groups(net), model=net, seed=5, journal=journal, **options)
    for _ in range(steps):
        opt.step(BATCH, loss_fn)
    return net, start, journal


def bare(count: int = 5) -> Trajectory:
    """A trajectory without an optimizer."""
    journal = Trajectory(metadata={"base": "tiny"})
    journal.begin([zo.bind(model()).params], distribution="rademacher", rounding="nearest")
    for i in range(count):
        journal.append(i, [noise.derive_seed(1, i)], [[0.125 * (i + 1)]], meta={"loss": i / 4})
    return journal


# --- replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", noise.ROUNDINGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_directions": 3, "distribution": "rademacher"},
        {"momentum": 0.8, "momentum_window": 2},
        {"momentum": 0.5, "num_directions": 2, "estimator": "forward", "clip": 0.5},
    ],
    ids=["plain", "directions", "momentum", "all"],
)
def test_replay_is_bit_identical(dtype: torch.dtype, rounding: str, options: dict) -> None:
    net, start, journal = run(dtype, rounding=rounding, **options)
    assert len(journal) == 4
    assert not same(weights(net), start)
    fresh = model(dtype)
    journal.replay_(fresh)
    assert same(weights(fresh), weights(net))
    state = copy.deepcopy(start)
    journal.replay_(state)  # no module needed
    assert same(state, weights(net))


def test_replay_makes_one_call_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    _, start, journal = run(steps=9)
    calls = []
    plain = _targets.update_
    monkeypatch.setattr(_targets, "update_", lambda *a: (calls.append(len(a[1])), plain(*a)))
    journal.replay_(start)
    assert calls == [9, 9]


def test_replay_in_slices() -> None:
    net, start, journal = run(torch.bfloat16)
    for part in (journal[:2], journal[2:3], journal[3:3], journal[3:]):
        part.replay_(start)
    assert same(start, weights(net))
    assert len(journal[2:4]) == 2
    assert journal[2:4][0] == journal[2]
    assert [s.step for s in journal[-2:]] == [2, 3]
    with pytest.raises(ValueError, match="step 1"):
        journal[::2]
    with pytest.raises(IndexError):
        journal[6]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=3),
            st.floats(-0.5, 0.5, width=32),
            st.sampled_from([1.0, 0.5, 0.99]),
            st.booleans(),
        ),
        max_size=5,
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(noise.DISTRIBUTIONS),
    st.sampled_from(noise.ROUNDINGS),
)
@settings(max_examples=40)
def test_replay_equals_separate_updates(
    steps: list[tuple[list[int], float, float, bool]],
    dtype: torch.dtype,
    distribution: str,
    rounding: str,
) -> None:
    net = model(dtype)
    start = weights(net)
    params = zo.bind(net).params
    journal = Trajectory()
    journal.begin([params], distribution=distribution, rounding=rounding)
    for i, (keys, coeff, decay, inner) in enumerate(steps):
        ends = [inner] * (len(keys) - 1) + [True]
        values = [coeff / (k + 1) for k in range(len(keys))]
        step = journal.append(
            i, keys, [values], decay=[[decay] + [1.0] * (len(keys) - 1)], ends=ends
        )
        row, factors = step.terms(0)
        if not _targets.idle(row, factors):
            _targets.update_(params, keys, row, factors, ends, distribution, rounding)
    journal.replay_(start)
    assert same(start, weights(net))
    assert through_bytes(journal) == journal


def through_bytes(journal: Trajectory) -> Trajectory:
    """Through the file format and back."""
    read = Trajectory()
    read._parse(memoryview(journal._encode()), Path("memory"))
    return read


def test_groups_that_change_during_the_run() -> None:
    net = model(torch.bfloat16)
    start = weights(net)
    named = list(net.named_parameters())
    journal = Trajectory()
    opt = MeZO(named[:2], lr=1e-2, model=net, journal=journal, momentum=0.5)
    opt.step(BATCH, loss_fn)
    opt.add_param_group({"params": named[2:], "lr": 2e-2, "weight_decay": 0.1})
    opt.step(BATCH, loss_fn)
    named[0][1].requires_grad_(False)
    opt.step(BATCH, loss_fn)
    named[0][1].requires_grad_(True)
    opt.step(BATCH, loss_fn)
    assert len(journal.layouts) == 4
    journal = through_bytes(journal)
    journal.replay_(start)
    assert same(start, weights(net))


def test_skipped_and_idle_steps_are_recorded_and_change_nothing() -> None:
    net = model()
    journal = Trajectory()
    opt = MeZO(net, lr=0.0, journal=journal)
    opt.step(BATCH, loss_fn)
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(lambda: torch.tensor(math.nan))
    start = weights(net)
    assert [s.step for s in journal] == [0, 1]
    assert journal[1].seeds == ()
    journal.replay_(net)
    assert same(weights(net), start)


def test_to_displacement() -> None:
    net = model()
    start = weights(net)
    journal = Trajectory()
    opt = MeZO(net, lr=1e-2, journal=journal, num_directions=2)
    for _ in range(4):
        opt.step(BATCH, loss_fn)
    moved = journal.to_displacement()
    assert len(moved) == 8
    moved.apply_(start)
    assert same(start, weights(net))  # float32: the same sums in the same order

    _, _, groups = run(steps=2)
    with pytest.raises(TrajectoryError, match="weight decay"):
        groups.to_displacement()
    plain = MeZO([{**g, "weight_decay": 0.0} for g in two_groups(net)], model=net, lr=1e-2)
    plain.journal = journal = Trajectory()
    plain.step(BATCH, loss_fn)
    with pytest.raises(TrajectoryError, match="groups differ"):
        journal.to_displacement()
    ratio = journal.to_displacement(group=1).coeffs[0] / journal.to_displacement(group=0).coeffs[0]
    assert ratio == pytest.approx(1 / 3 / 2, rel=1e-6)  # lr over eps
    with pytest.raises(TrajectoryError, match=r"group must be in \[0, 2\)"):
        journal.to_displacement(group=2)


# --- another model --------------------------------------------------------------------------------


def wider() -> nn.Module:
    return model(width=9)


def renamed() -> nn.Module:
    return nn.ModuleDict({"x": model()})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (wider, r"moved '0.weight' \(8, 6\) float32, but the model's is \(9, 6\) float32"),
        (renamed, r"no parameter '0.weight' \(8, 6\) float32"),
        (lambda: model(torch.bfloat16), r"'0.weight' .*is \(8, 6\) bfloat16"),
        (dict, "no parameter '0.weight'"),
        (
            lambda: {k: v for k, v in weights(model()).items() if k != "2.bias"},
            "no parameter '2.bias'",
        ),
        (lambda: zo.Binding(model(), ["0.bias"]), "no parameter '0.weight'"),
    ],
)
def test_another_model_is_refused(other, message: str) -> None:
    target = other()
    before = copy.deepcopy(target.state_dict() if isinstance(target, nn.Module) else {})
    with pytest.raises(ModelMismatchError, match=message):
        bare().replay_(target)
    if isinstance(target, nn.Module):
        assert same(target.state_dict(), before)


def test_a_model_that_ties_what_the_run_moved_apart_is_refused() -> None:
    apart = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    journal = Trajectory()
    journal.begin([zo.bind(apart).params], distribution="gaussian", rounding="nearest")
    journal.append(0, [1], [[1.0]])
    shared = torch.zeros(3, 3)
    with pytest.raises(ModelMismatchError, match=r"'1.weight' .*shares its memory"):
        journal.replay_({"0.weight": shared, "1.weight": shared})
    assert not shared.any()
    with pytest.raises(TypeError, match="model must be"):
        journal.replay_([shared])


def test_frozen_and_wrapped_models_replay() -> None:
    net, _, journal = run()
    fresh = model().requires_grad_(False)
    journal.replay_(nn.DataParallel(fresh))
    assert same(weights(fresh), weights(net))
    extra = nn.Sequential(*model(), nn.Linear(3, 1))
    kept = weights(extra[3])
    journal.replay_(extra)
    assert same(weights(extra[3]), kept)


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 4}, "at least 5"),
        ({"step": -1}, "at least 5"),
        ({"coeffs": [[0.5]]}, r"coeffs must be \[1\]\[2\]"),
        ({"coeffs": [[0.5, 1.0], [0.5, 1.0]]}, r"coeffs must be \[1\]\[2\]"),
        ({"coeffs": [[0.5, math.nan]]}, "coeffs must be finite"),
        ({"coeffs": [[0.5, 1e39]]}, "coeffs must be finite"),
        ({"decay": [[0.5]]}, r"decay must be \[1\]\[2\]"),
        ({"decay": [[0.5, math.inf]]}, "decay must be finite"),
        ({"ends": [True]}, "ends must be 2 flags"),
        ({"ends": [True, False]}, "the last of them True"),
        ({"meta": {"x": object()}}, "JSON"),
        ({"seeds": [1 << 64, 1]}, "64 bits"),
    ],
)
def test_bad_records_add_nothing(tmp_path: Path, arguments: dict, message: str) -> None:
    path = tmp_path / "run.zo"
    bare().save(path)
    with Trajectory.open(path) as journal:
        before = path.read_bytes()
        good = {"step": 5, "seeds": [1, 2], "coeffs": [[0.5, 1.0]]}
        with pytest.raises(ValueError, match=message):
            journal.append(**{**good, **arguments})
        assert len(journal) == 5
        assert path.read_bytes() == before
        journal.append(**good)
    assert len(Trajectory.load(path)) == 6


def test_misuse() -> None:
    with pytest.raises(TrajectoryError, match="begin"):
        Trajectory().append(0, [], [])
    with pytest.raises(TrajectoryError, match="nothing was recorded"):
        Trajectory().save("unused")
    with pytest.raises(TrajectoryError, match="JSON"):
        Trajectory(metadata={"x": {1, 2}})
    with pytest.raises(TrajectoryError, match="no step"):
        Trajectory().undo()
    params = zo.bind(model()).params
    journal = bare()
    with pytest.raises(TrajectoryError, match="distribution 'rademacher'; got 'gaussian'"):
        journal.begin([params], distribution="gaussian", rounding="nearest")
    with pytest.raises(TrajectoryError, match="rounding 'nearest'; got 'stochastic'"):
        journal.begin([params], distribution="rademacher", rounding="stochastic")
    with pytest.raises(ModelMismatchError, match=r"knows '0.weight' .*bfloat16"):
        journal.begin(
            [zo.bind(model(torch.bfloat16)).params], distribution="rademacher", rounding="nearest"
        )
    with pytest.raises(TrajectoryError, match=r"'0\.weight' stands in two groups"):
        journal.begin([params, params], distribution="rademacher", rounding="nearest")
    assert len(journal.layouts) == 1
    assert len({journal.next_step, len(journal), 5}) == 1


def test_equality_copies_and_repr() -> None:
    journal = bare()
    assert journal == bare() and journal != bare(4) and journal != 1
    assert copy.deepcopy(journal) == journal == pickle.loads(pickle.dumps(journal))
    assert "5 steps, 5 terms, 6 parameters" in repr(journal)
    assert [r.name for r in journal.fingerprint][:2] == ["0.weight", "0.bias"]
    with pytest.raises(TypeError):
        hash(journal)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    net, start, journal = run(torch.float16, momentum=0.5)
    path = tmp_path / "run.zo"
    path.write_bytes(b"an older file")
    journal.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.zo"]
    loaded = Trajectory.load(path)
    assert loaded == journal
    assert loaded[0].meta == journal[0].meta
    loaded.replay_(start)
    assert same(start, weights(net))
    assert through_bytes(bare()).metadata == {"base": "tiny"}


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.zo"
    bare(2).save(path)
    before = path.read_bytes()

    def broken(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        bare(3).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.zo"]


def test_the_journal_is_the_saved_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.zo"
    with Trajectory.open(path) as journal:
        with pytest.raises(TrajectoryError, match="already open as a journal"):
            Trajectory.open(path)
        net, start, _ = run(torch.bfloat16, journal=journal)
        assert Trajectory.load(path) == journal  # on disk before close
        journal.save(tmp_path / "copy.zo")
        assert path.read_bytes() == (tmp_path / "copy.zo").read_bytes()
    with Trajectory.open(path) as journal, pytest.raises(TrajectoryError, match="already has"):
        run(torch.bfloat16, journal=journal)
    with Trajectory.open(path, sync=True) as journal:
        before = len(journal)
        opt = MeZO(two_groups(net), model=net, seed=5, journal=journal)
        opt._step = before
        opt.step(BATCH, loss_fn)
    whole = Trajectory.load(path)
    assert len(whole) == before + 1
    whole.replay_(start)
    assert same(start, weights(net))


def test_a_closed_journal_takes_no_steps(tmp_path: Path) -> None:
    net = model()
    with Trajectory.open(tmp_path / "journal.zo") as journal:
        opt = MeZO(net, lr=1e-2, journal=journal)
        opt.step(BATCH, loss_fn)
    start = weights(net)
    with pytest.raises(TrajectoryError, match=r"journal.zo is closed: open it again"):
        opt.step(BATCH, loss_fn)
    with pytest.raises(TrajectoryError, match="is closed"):
        journal.truncate(0)
    net[0].requires_grad_(False)
    with pytest.raises(TrajectoryError, match="is closed"):
        MeZO(net, journal=journal)  # a layout of its own
    net[0].requires_grad_(True)
    assert same(start, weights(net)) and opt.num_steps == len(journal) == 1
    assert journal == Trajectory.load(tmp_path / "journal.zo")
    opt.journal = copy.deepcopy(journal)  # lives in memory
    opt.step(BATCH, loss_fn)
    with Trajectory.open(tmp_path / "journal.zo") as again:
        again.append(1, opt.journal[1].seeds, opt.journal[1].coeffs)
        opt.journal = again
        opt.step(BATCH, loss_fn)
    assert len(Trajectory.load(tmp_path / "journal.zo")) == 3


def test_truncate_and_undo(tmp_path: Path) -> None:
    path = tmp_path / "journal.zo"
    net = model(torch.bfloat16)
    start = weights(net)
    named = list(net.named_parameters())
    with Trajectory.open(path) as journal:
        opt = MeZO(named[:2], lr=1e-2, model=net, journal=journal)
        opt.step(BATCH, loss_fn)
        opt.step(BATCH, loss_fn)
        checkpoint, state = weights(net), opt.state_dict()
        sizes = path.stat().st_size
        opt.add_param_group({"params": named[2:]})
        opt.step(BATCH, loss_fn)
        journal.truncate(2)
        assert len(journal) == 2
        # The new layout precedes the dropped step and may stay.
        assert path.stat().st_size >= sizes
        journal.truncate(7)
        assert len(journal) == 2
        net.load_state_dict(checkpoint)
        again = MeZO(named[:2], lr=1e-2, model=net, journal=journal)
        again.load_state_dict(state)
        again.step(BATCH, loss_fn)
        again.step(BATCH, loss_fn)
        journal.append(4, [1], [[1.0]])
        journal.undo()
    read = Trajectory.load(path)
    assert read == journal and len(read) == 4
    read.replay_(start)
    assert same(start, weights(net))


def test_truncate_over_a_change_of_groups(tmp_path: Path) -> None:
    path = tmp_path / "journal.zo"
    params = zo.bind(model()).params
    options = {"distribution": "gaussian", "rounding": "nearest"}
    with Trajectory.open(path) as journal:
        journal.begin([params[:2]], **options)
        journal.append(0, [1], [[1.0]])
        journal.append(1, [2], [[1.0]])
        journal.begin([params[:2], params[2:]], **options)
        journal.append(2, [3], [[1.0], [1.0]])
        journal.truncate(1)
        assert len(journal.layouts) == 1
        journal.begin([params], **options)
        journal.append(1, [4], [[1.0]])
    assert Trajectory.load(path) == journal
    assert journal[1].layout == 1


def test_idle_terms_keep_the_sign_of_zero() -> None:
    journal = Trajectory()
    net = nn.Linear(2, 2, bias=False)
    net.weight.data.fill_(-0.0)
    journal.begin([zo.bind(net).params], distribution="gaussian", rounding="nearest")
    journal.append(0, [1], [[0.0]])
    journal.replay_(net)
    assert net.weight.signbit().all()


def test_recover_keeps_whole_steps_for_every_cut(tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    whole = bare(3)
    whole.save(path)
    data = path.read_bytes()
    ends = {}  # end of each record -> steps so far
    offset, steps = 8, 0
    while offset < len(data):
        length, kind = struct.unpack_from("<IB", data, offset)
        offset += 5 + length + 4
        steps += kind == 3
        ends[offset] = steps
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        if cut in ends:
            assert len(Trajectory.load(path)) == ends[cut]
            continue
        with pytest.raises(TruncatedTrajectoryError):
            Trajectory.load(path)
        with pytest.raises(TruncatedTrajectoryError):
            Trajectory.open(path)
        assert path.read_bytes() == data[:cut]  # refusing changes nothing
        kept = max((n for end, n in ends.items() if end <= cut), default=0)
        with pytest.warns(UserWarning, match=f"keeping {kept} whole steps"):
            loaded = Trajectory.load(path, recover=True)
        assert loaded.steps == whole.steps[:kept]
        with pytest.warns(UserWarning, match="leaving out"):
            journal = Trajectory.open(path, recover=True)
        with journal:
            journal.begin([zo.bind(model()).params], distribution="rademacher", rounding="nearest")
            for step in whole.steps[kept:]:
                journal.append(step.step, step.seeds, step.coeffs, meta=step.meta)
        assert Trajectory.load(path) == whole


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    bare(2).save(path)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(TrajectoryError):
            Trajectory.load(path)


def sealed(*records: tuple[int, bytes], magic: bytes = b"ZOtr\x01\0\x01\0") -> bytes:
    """A file with right checksums, whatever the records say."""
    data, chain = magic, zlib.crc32(magic)
    for kind, payload in records:
        record = struct.pack("<IB", len(payload), kind) + payload
        chain = zlib.crc32(record, chain)
        data += record + struct.pack("<I", chain)
    return data


HEADER = (1, b'{"distribution":"gaussian","rounding":"nearest","metadata":{}}')
NAME = ["w", noise.parameter_id("w"), [2, 3], "float32"]
LAYOUT = (2, json.dumps({"groups": [[NAME]]}).encode())


def step_record(
    step: int = 0, count: int = 1, groups: int = 1, flags: int = 0, rest: bytes | None = None
) -> tuple[int, bytes]:
    body = struct.pack("<qfB", 7, 0.5, 1) + b"{}" if rest is None else rest
    return 3, struct.pack("<QIHH", step, count, groups, flags) + body


def test_the_hand_made_file_is_right() -> None:
    read = Trajectory()
    read._parse(memoryview(sealed(HEADER, LAYOUT, step_record())), Path("memory"))
    assert read[0].seeds == (7,) and read[0].coeffs == ((0.5,),) and read[0].ends == (True,)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", ForeignFileError, "no trajectory"),
        (b"\x89PNG and more", ForeignFileError, "must start with b'ZOtr'"),
        (b"ZOtr\x02\0\x01\0", TrajectoryVersionError, "format must be 1; got 2"),
        (b"ZOtr\x01\0\x09\0", TrajectoryVersionError, "contract version must be 1; got 9"),
        (b"ZOtr\x01\0\x01\0", TruncatedTrajectoryError, "before the header"),
        (sealed(LAYOUT), CorruptTrajectoryError, "header must be the first"),
        (sealed(HEADER, HEADER), CorruptTrajectoryError, "header must be the first"),
        (sealed((1, b"{}")), CorruptTrajectoryError, "keys"),
        (sealed((1, b"not json")), CorruptTrajectoryError, "Expecting value"),
        (
            sealed((1, b'{"distribution":"x","rounding":"nearest","metadata":{}}')),
            CorruptTrajectoryError,
            "distribution must be",
        ),
        (sealed(HEADER, step_record()), CorruptTrajectoryError, "before the first layout"),
        (sealed(HEADER, (9, b"")), CorruptTrajectoryError, "unknown record kind 9"),
        (
            sealed(HEADER, (2, json.dumps({"groups": [[["v", *NAME[1:]]]]}).encode())),
            CorruptTrajectoryError,
            "bad parameter",
        ),
        (
            sealed(HEADER, (2, json.dumps({"groups": [[[*NAME[:3], "nn"]]]}).encode())),
            CorruptTrajectoryError,
            "bad parameter",
        ),
        (sealed(HEADER, (2, b'{"groups":7}')), CorruptTrajectoryError, "iterable"),
        (sealed(HEADER, LAYOUT, (3, b"short")), CorruptTrajectoryError, "record at byte"),
        (
            sealed(HEADER, LAYOUT, step_record(count=4_000_000_000)),
            CorruptTrajectoryError,
            "4000000000 terms need",
        ),
        (sealed(HEADER, LAYOUT, step_record(groups=2)), CorruptTrajectoryError, "need"),
        (sealed(HEADER, LAYOUT, step_record(flags=4)), CorruptTrajectoryError, "unknown flags"),
        (
            sealed(HEADER, LAYOUT, step_record(rest=struct.pack("<qfB", 7, math.nan, 1) + b"{}")),
            CorruptTrajectoryError,
            "finite",
        ),
        (
            sealed(HEADER, LAYOUT, step_record(rest=struct.pack("<qfB", 7, 0.5, 0) + b"{}")),
            CorruptTrajectoryError,
            "ends must be",
        ),
        (
            sealed(HEADER, LAYOUT, step_record(rest=struct.pack("<qfB", 7, 0.5, 7) + b"{}")),
            CorruptTrajectoryError,
            "ends must be 0 or 1",
        ),
        (
            sealed(HEADER, LAYOUT, step_record(rest=struct.pack("<qfB", 7, 0.5, 1) + b"[]")),
            CorruptTrajectoryError,
            "must be an object",
        ),
        (sealed(HEADER, LAYOUT, step_record(3), step_record(3)), CorruptTrajectoryError, "step"),
    ],
)
def test_bad_files(tmp_path: Path, data: bytes, error: type[Exception], message: str) -> None:
    path = tmp_path / "bad.zo"
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        Trajectory.load(path)
    assert type(caught.value) is error and isinstance(caught.value, TrajectoryError)
    if error in (ForeignFileError, TrajectoryVersionError) and data:
        with pytest.raises(error):
            Trajectory.open(path, recover=True)
        assert path.read_bytes() == data
    if error is TrajectoryVersionError:
        assert isinstance(caught.value, UnknownVersionError)
    if error is CorruptTrajectoryError:
        with pytest.warns(UserWarning, match="keeping"):
            Trajectory.load(path, recover=True)


@given(
    record=st.integers(0, 2),
    at=st.integers(0, 200),
    junk=st.binary(min_size=1, max_size=12),
    cut=st.booleans(),
)
@settings(max_examples=300)
def test_arbitrary_records_load_or_raise(record: int, at: int, junk: bytes, cut: bool) -> None:
    records = [HEADER, LAYOUT, step_record()]
    kind, payload = records[record]
    at %= len(payload) + 1
    records[record] = kind, payload[:at] + junk + (b"" if cut else payload[at + len(junk) :])
    read = Trajectory()
    try:
        read._parse(memoryview(sealed(*records)), Path("memory"))
    except TrajectoryError:
        return
    assert through_bytes(read) == read


def test_deeply_nested_json_is_no_stack_overflow(tmp_path: Path) -> None:
    path = tmp_path / "deep.zo"
    path.write_bytes(sealed((1, b"[" * 200_000)))
    with pytest.raises(CorruptTrajectoryError):
        Trajectory.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "none.zo")
    with pytest.raises(FileNotFoundError):
        Trajectory.open(tmp_path / "no folder" / "none.zo")


def test_a_write_that_fails_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    journal = Trajectory.open(path)
    params = zo.bind(model()).params
    journal.begin([params], distribution="gaussian", rounding="nearest")
    journal.append(0, [1], [[1.0]])
    file = journal._file
    assert file is not None

    class HalfFull:
        """Writes ten bytes and then fails."""

        def write(self, data: memoryview) -> int:
            if len(data) <= 10:
                raise OSError("disk full")
            file.write(data[:10])
            return len(data) - 10

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    journal._file = HalfFull()
    with pytest.raises(OSError, match="disk full"):
        journal.append(1, [2], [[1.0]])
    assert len(journal) == 1
    assert len(Trajectory.load(path)) == 1  # the ten bytes are gone
    journal._file = file
    journal.append(1, [3], [[2.0]])
    journal.close()
    journal.close()
    assert Trajectory.load(path) == journal and journal[1].seeds == (3,)


def test_a_copy_of_a_journal_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    with Trajectory.open(path) as journal:
        params = zo.bind(model()).params
        journal.begin([params], distribution="gaussian", rounding="nearest")
        twin = copy.deepcopy(journal)
        twin.append(0, [1], [[1.0]])
        assert len(Trajectory.load(path)) == 0 and len(twin) == 1


CHILD = """
import sys, torch
sys.path.insert(0, {root!r})
import test_trajectory as t
from zokernels.trajectory import Trajectory
from zokernels.optim import MeZO
torch.set_num_threads(1)
net = t.model(torch.bfloat16)
opt = MeZO(
    t.two_groups(net), model=net, seed=5, momentum=0.5, journal=Trajectory.open({path!r})
)
print("ready", flush=True)
while True:
    opt.step(t.BATCH, t.loss_fn)
    print(opt.num_steps, flush=True)
"""


def test_kill_dash_nine(tmp_path: Path) -> None:
    path = tmp_path / "killed.zo"
    root = Path(__file__).parent
    source = textwrap.dedent(CHILD).format(root=str(root), path=str(path))
    environment = {**os.environ, "PYTHONPATH": f"{root.parent}:{root}"}
    child = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        seen = [child.stdout.readline() for _ in range(12)]
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.stdout is not None
        with child.stdout as stream:
            rest = stream.read().split()
        child.wait()
    done = int((rest or [seen[-1]])[-1])
    assert done >= 12
    journal = Trajectory.load(path)
    assert done <= len(journal) <= done + 1  # every step that returned is there
    steps = len(journal)
    net, start, _ = run(torch.bfloat16, steps=steps, momentum=0.5)
    journal.replay_(start)
    assert same(start, weights(net))

    # From the file and the first weights, the run goes on.
    net = model(torch.bfloat16)
    with Trajectory.open(path) as journal:
        opt = MeZO(two_groups(net), model=net, seed=5, momentum=0.5, journal=journal)
        opt.resume()
        assert opt.num_steps == steps
        for _ in range(3):
            opt.step(BATCH, loss_fn)
    assert same(weights(net), weights(run(torch.bfloat16, steps=steps + 3, momentum=0.5)[0]))
    assert len(Trajectory.load(path)) == steps + 3
