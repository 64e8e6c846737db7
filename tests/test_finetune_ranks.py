"""The command on two ranks: real processes, each in a folder of its own, against one process."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
import torch.distributed as dist
from rich.console import Console

import zokernels as zo
from zokernels import cli
from zokernels.finetune import data as data_
from zokernels.finetune import folder, models, objective, presets, report, train
from zokernels.finetune import ranks as ranks_
from zokernels.finetune.config import Config, UserError, build
from zokernels.finetune.models import device_of, load_model, load_tokenizer
from zokernels.finetune.objective import Objective
from zokernels.finetune.ranks import Ranks
from zokernels.trajectory import Trajectory

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "data": "data.csv",  # in each rank's own folder
    "output": "out",
    "device": "cpu",
    "steps": 8,
    "batch_size": 3,
    "max_length": 16,
    "lr": 1e-3,
    "checkpoint_every": 3,
    "compare_mezo": False,
}
CLASSIFY: dict[str, Any] = {
    "label_column": "label",
    "verbalizers": {"0": " bad", "1": " good"},
}
# A server that has imported what the command needs, and forks: a rank starts in no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "zokernels.cli",
        "zokernels.finetune.train",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "peft",
        "test_finetune_ranks",
    ]
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@dataclass
class Ended:
    """How a rank ended: its exit code, and what it printed."""

    code: int | None
    out: str
    err: str


def _beside_mezo(rank: int) -> list[Any]:
    assert rank == 0 and not dist.is_initialized()
    print("measured alone")
    return []


def _rank(
    rank: int, port: int, root: str, arguments: list[str], sabotage: Callable[[int], None] | None
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is not looked through again
    os.environ.update(
        WORLD_SIZE="2",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the test holds the store, as torchrun does
    )
    os.chdir(f"{root}/{rank}")
    for name, number in (("out", 1), ("err", 2)):
        with open(f"{root}/{rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), number)
    ranks_._GRACE = 0.1
    # These two cost more than all the rest, and are the first rank's alone.
    report.picture = lambda _, path: path.touch()
    train._compare = lambda _: _beside_mezo(rank)
    if sabotage is not None:
        sabotage(rank)
    sys.argv = ["zokernels", *arguments]
    cli.main()


def places(root: Path) -> None:
    """A folder for each rank, with the data."""
    for rank in range(2):
        (root / str(rank)).mkdir(exist_ok=True)
        tiny_lm.save_labelled(root / str(rank) / "data.csv")


def command(
    root: Path, arguments: list[str], sabotage: Callable[[int], None] | None = None
) -> list[Ended]:
    """``zokernels`` on two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)
    ranks: list[BaseProcess] = [
        SERVER.Process(target=_rank, args=(r, port, str(root), arguments, sabotage), daemon=True)
        for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(50)
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
    assert not hanging
    del store
    return [
        Ended(p.exitcode, (root / f"{r}.out").read_text(), (root / f"{r}.err").read_text())
        for r, p in enumerate(ranks)
    ]


def run_on_ranks(
    root: Path, options: dict[str, Any], sabotage: Callable[[int], None] | None = None, *more: str
) -> list[Ended]:
    places(root)
    (root / "0" / "run.json").write_text(json.dumps(options))
    return command(root, ["finetune", "--config", "run.json", *more], sabotage)


def alone(root: Path, options: dict[str, Any]) -> train.Summary:
    """One process that takes the ranks' batches as micro-batches."""
    places(root)
    data, output = str(root / "0" / "data.csv"), str(root / "alone")
    config = build(options, {"data": data, "output": output, "accumulate": 2})
    return train.finetune(config, Console(quiet=True))


def summary(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "0/out" / folder.SUMMARY).read_text())
    return found


def assert_same_runs(root: Path, whole: train.Summary) -> None:
    """Bit for bit, and in files that the first rank alone wrote."""
    theirs, ours = summary(root), json.loads(json.dumps(whole.to_dict()))
    assert theirs["before"] == ours["before"]
    assert len(theirs["runs"]) == len(ours["runs"])
    for a, b in zip(theirs["runs"], ours["runs"], strict=True):
        for name in ("weights_sha256", "curve", "after", "evaluations", "skipped"):
            assert a[name] == b[name], name
        journals = [
            Trajectory.load(root / place / f"seed-{a['seed']}" / folder.JOURNAL)
            for place in ("0/out", "alone")
        ]
        assert journals[0] == journals[1]
        assert len(journals[0]) == len(a["curve"])
    assert not (root / "1/out").exists()


@pytest.fixture(scope="module")
def done(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[Ended]]:
    """A run on two ranks: its folders, its options, and what was printed."""
    root = tmp_path_factory.mktemp("done")
    options = {**COMMON, **CLASSIFY, "model": str(model_dir), "num_directions": 2}
    options |= {"eval_batch_size": 2, "eval_every": 4, "eval_fraction": 0.4}
    options |= {"compare_mezo": True, "save_weights": True}
    ended = run_on_ranks(root, options)
    assert [e.code for e in ended] == [0, 0], ended
    return root, options, ended


def test_two_ranks_are_one_process_with_micro_batches(
    done: tuple[Path, dict[str, Any], list[Ended]],
) -> None:
    root, options, _ = done
    assert_same_runs(root, alone(root, options | {"compare_mezo": False}))


def test_the_first_rank_alone_writes_and_prints(
    done: tuple[Path, dict[str, Any], list[Ended]],
) -> None:
    root, _, (first, second) = done
    assert "batch 6 (2 ranks x 3)" in first.out and "memory of rank 0" in first.out
    assert "measured alone" in first.out and "in MeZO's loop" in first.out
    assert (second.out, second.err) == ("", "")
    assert [p.name for p in (root / "1").iterdir()] == ["data.csv"]
    assert sorted(p.name for p in (root / "0/out").iterdir()) == sorted(
        [folder.BEFORE, folder.CONFIG, folder.PICTURE, folder.SUMMARY, "seed-0"]
    )
    assert sorted(p.name for p in (root / "0/out/seed-0").iterdir()) == sorted(
        [folder.CHECKPOINT, folder.JOURNAL, folder.METRICS, folder.RESULT, folder.WEIGHTS]
    )
    found = summary(root)
    assert (found["ranks"], found["effective_batch_size"]) == (2, 6)
    lines = (root / "0/out/seed-0" / folder.METRICS).read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(8))
    assert {(line["ranks"], line["examples"]) for line in steps} == {(2, 6)}


def test_two_ranks_are_a_loop_over_their_batches(
    done: tuple[Path, dict[str, Any], list[Ended]],
) -> None:
    """Against the library alone; and the journal on the base model is the result."""
    root, options, _ = done
    config = build(options, {"data": str(root / "0/data.csv")})
    prepared = data_.prepare(config, load_tokenizer(config.model))
    model = load_model(config, 0)
    loss_fn = Objective(model, "candidates")
    loss_fn.settle(model, data_.collate(prepared, prepared.train[:2], CPU))
    opt = zo.MeZO(model, lr=1e-3, eps=config.eps, num_directions=2, seed=0)
    size, losses = config.batch_size, []
    for step in range(config.steps):
        order = data_.order(len(prepared.train), 2 * size, 0, step)
        batches = [
            data_.collate(prepared, [prepared.train[i] for i in share], CPU)
            for share in (order[:size], order[size:])
        ]
        losses.append(float(opt.step(batches, loss_fn)))
    run = summary(root)["runs"][0]
    assert run["curve"] == losses
    assert run["weights_sha256"] == train.weights_sha256(model)
    base = load_model(config, 0)
    Trajectory.load(root / "0/out/seed-0" / folder.JOURNAL).replay_(base)
    assert train.weights_sha256(base) == run["weights_sha256"]


# --- trouble --------------------------------------------------------------------------------------


def _at_step(step: int, act: Callable[[], object], of_seed: int = 0) -> None:
    order = data_.order

    def acts(count: int, batch_size: int, seed: int, at: int) -> list[int]:
        if (seed, at) == (of_seed, step):
            act()
        return order(count, batch_size, seed, at)

    data_.order = acts


def _first_killed(rank: int) -> None:
    if rank == 0:
        _at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _second_killed_in_second_seed(rank: int) -> None:
    if rank == 1:
        _at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL), of_seed=1)


def _interrupted(rank: int) -> None:
    # As torchrun does it: once by the terminal, and once more when it ends.
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    _at_step(5, twice)


LORA: dict[str, Any] = {"trainable": "lora", "lora_targets": ["v_proj"], "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("sabotage", "changes", "codes", "message"),
    [
        (
            _first_killed,
            {**CLASSIFY, "eval_every": 2},
            [-signal.SIGKILL, 2],
            "rank 1 of 2 lost another rank",
        ),
        (
            _second_killed_in_second_seed,
            {**LORA, "repeats": 2, "weight_decay": 0.1, "eval_batch_size": 3},
            [2, -signal.SIGKILL],
            "rank 0 of 2 lost another rank",
        ),
        (
            _interrupted,
            {"momentum": 0.9, "save_weights": True},
            [1, 130],
            "interrupted; if steps were made, the same command with --resume",
        ),
    ],
    ids=["first killed", "second killed, second seed", "interrupted"],
)
def test_a_broken_run_resumes_bit_for_bit(
    sabotage: Callable[[int], None],
    changes: dict[str, Any],
    codes: list[int],
    message: str,
    model_dir: Path,
    tmp_path: Path,
) -> None:
    options = {**COMMON, **changes, "model": str(model_dir)}
    ended = run_on_ranks(tmp_path, options, sabotage)
    assert sorted(e.code or 0 for e in ended) == sorted(codes), ended
    said = "".join(e.err for e in ended)
    assert said.count("error: ") == 1 and f"error: {message}" in said, said
    assert "Traceback" not in said
    place = tmp_path / "0/out" / f"seed-{changes.get('repeats', 1) - 1}"
    done = json.loads((place / folder.CHECKPOINT).read_text())["optimizer"]["mezo"]["step"]
    assert 3 <= done <= 5 and not (place / folder.RESULT).exists()
    config = build(
        folder.resumed_options(str(tmp_path / "0/out")),
        {"ranks": 1, "resume": True, "output": str(tmp_path / "0/out")},
    )
    with pytest.raises(UserError, match="--resume: the number of ranks was 2 and is 1 now"):
        folder.Folder(Path(config.output), Ranks()).open(config)
    ended = command(tmp_path, ["finetune", "--resume", "--output", "out"])
    assert [e.code for e in ended] == [0, 0], ended
    assert_same_runs(tmp_path, alone(tmp_path, options))


def _raises(rank: int) -> None:
    def fail() -> None:
        raise LookupError("a token beyond the vocabulary")

    if rank == 1:
        _at_step(3, fail)


def _other_data(rank: int) -> None:
    if rank == 1:
        Path("data.csv").write_text(Path("data.csv").read_text().replace("xx", "zz"))


def _other_weights(rank: int) -> None:
    load = models.load_model

    def loads(config: Config, seed: int, device: torch.device) -> torch.nn.Module:
        model = load(config, seed, device)
        next(model.parameters()).data[0, 0] += 1
        return model

    if rank == 1:
        models.load_model = loads


def _no_data(rank: int) -> None:
    if rank == 1:
        Path("data.csv").unlink()


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (_raises, "LookupError: a token beyond the vocabulary\non rank 1 of 2\n"),
        (_other_data, "error: --data: the examples of rank 1 are not those of rank 0\n"),
        (_other_weights, "error: ranks must move the same weights in the same way; parameter"),
        (_no_data, "error: --data: no such file: data.csv\n"),
    ],
)
def test_an_error_on_one_rank_ends_all_with_one_message(
    sabotage: Callable[[int], None], message: str, model_dir: Path, tmp_path: Path
) -> None:
    options = {**COMMON, **CLASSIFY, "model": str(model_dir)}
    ended = run_on_ranks(tmp_path, options, sabotage)
    assert all(ended_.code for ended_ in ended), ended
    said = [e.err for e in ended if e.err]
    assert len(said) == 1 and message in said[0], ended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--stepz", "3"], "--stepz"),
        (["finetune", "--model", "m", "--data", "none.csv", "--steps", "0"], "--steps must be"),
        (["finetune", "--resume", "--output", "out"], "--resume: out holds no run"),
    ],
)
def test_a_mistake_costs_one_line_not_one_a_rank(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    places(tmp_path)
    ended = command(tmp_path, arguments)
    assert all(e.code for e in ended)
    said = "".join(e.err for e in ended)
    assert said.count("\n") == 1 and message in said and said.startswith("error: ")


def _nan_on_second(rank: int) -> None:
    if rank == 1:
        call = Objective.__call__

        def nan(self: Objective, model: torch.nn.Module, batch: data_.Batch) -> torch.Tensor:
            return call(self, model, batch) * (torch.nan if holds[0] else 1)

        holds = [False]
        _at_step(4, lambda: holds.__setitem__(0, True))
        _at_step(5, lambda: holds.__setitem__(0, False))
        objective.Objective.__call__ = nan


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    model_dir: Path, tmp_path: Path
) -> None:
    options = {**COMMON, **CLASSIFY, "model": str(model_dir)}
    ended = run_on_ranks(tmp_path, options, _nan_on_second)
    assert [e.code for e in ended] == [0, 0], ended
    assert "steps skipped, loss not finite: [1]" in ended[0].out
    run = summary(tmp_path)["runs"][0]
    assert run["skipped"] == 1 and [loss != loss for loss in run["curve"]].index(True) == 4
    base = load_model(build(options), 0)
    Trajectory.load(tmp_path / "0/out/seed-0" / folder.JOURNAL).replay_(base)
    assert train.weights_sha256(base) == run["weights_sha256"]


def _demo(rank: int) -> None:
    def demo(cache_dir: str | None, log: Callable[[str], None]) -> dict[str, Any]:
        assert rank == 0, "the others wait for what the first one fetches"
        log("fetching")
        assert cache_dir is not None
        return {**COMMON, **CLASSIFY, "output": "runs/demo", "model": cache_dir}

    presets.demo = demo


def test_the_first_rank_fetches_the_demo(model_dir: Path, tmp_path: Path) -> None:
    places(tmp_path)
    (tmp_path / "1/runs/demo").mkdir(parents=True)  # would be another number, were it asked
    arguments = ["finetune", "--demo", "--cache-dir", str(model_dir), "--steps", "2"]
    ended = command(tmp_path, arguments, _demo)
    assert [e.code for e in ended] == [0, 0], ended
    assert ended[0].out.startswith("fetching\n") and not ended[1].out
    assert json.loads((tmp_path / "0/runs/demo" / folder.CONFIG).read_text())["ranks"] == 2
    assert not list((tmp_path / "1/runs/demo").iterdir())


# --- the environment ------------------------------------------------------------------------------

GOOD = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set: start the ranks with torchrun"),
        ({"LOCAL_RANK": ""}, "but LOCAL_RANK is not set"),
        ({"MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer of at least 1; got 'two'"),
        ({"RANK": "2"}, "RANK must be an integer of at least 0 and below WORLD_SIZE, 2; got '2'"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE must be an integer of at least 2; got '1'"),
        ({"MASTER_PORT": "99999"}, "rank 1 cannot reach the others at MASTER_ADDR 127.0.0.1"),
    ],
)
def test_a_broken_environment(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        Ranks.join({**GOOD, **changes})
    assert message in str(error.value)


def test_ranks_need_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, and this torch .* without torch.distr"):
        Ranks.join(GOOD)
    assert Ranks.join({"WORLD_SIZE": "1"}).count == Ranks.join({}).count == 1


def test_a_configuration_is_of_as_many_ranks_as_there_are(tmp_path: Path) -> None:
    config = build(COMMON, {"model": "m", "output": str(tmp_path / "out"), "ranks": 2})
    with pytest.raises(UserError, match="ranks must be the number of processes, 1; got 2"):
        train.finetune(config, Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(ranks: Ranks, name: str = "auto") -> torch.device:
        return device_of(build(COMMON, {"model": "m", "device": name}), ranks)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = Ranks(3, 4, local=1, local_count=2)
    assert device(second) == device(second, "cuda") == torch.device("cuda:1")
    assert device(second, "cpu") == CPU
    assert device(Ranks(), "cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:1 is one GPU for 4 ranks"):
        device(second, "cuda:1")
    for local in (0, 2):  # also those that would find one
        with pytest.raises(UserError, match=r"3 ranks .* torch sees 2 CUDA .*--nproc-per-node 2"):
            device(Ranks(local, 3, local=local, local_count=3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cuda: torch sees 0 CUDA devices"):
        device(second, "cuda")


def test_gpus_exchange_losses_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(dist, "new_group", lambda **options: asked.append(options) or "nccl's")
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert Ranks(1, 2, local=1).group(torch.device("cuda:1")) == "nccl's"
    assert asked == [torch.device("cuda:1"), {"backend": "nccl"}]
    assert Ranks().group(CPU) is None
