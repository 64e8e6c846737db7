"""What the documentation says runs: code blocks, commands, links, names, make targets."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_zoo as zoo
import pytest
import torch
from torch import Tensor

import zokernels as zo

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "csrc/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """Code of one language, each block preceded by its line number in empty lines."""
    text = path.read_text()
    return [
        "\n" * text.count("\n", 0, m.start(2)) + m.group(2)
        for m in FENCE.finditer(text)
        if m.group(1) == language
    ]


def prose(path: Path) -> str:
    """The text outside code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", path.read_text()))


def namespace() -> dict[str, Any]:
    """What a reader of the README has at hand: a model, batches, a schedule."""
    model, batch = zoo.build("opt"), zoo.lm_batch()
    keys = list(batch)

    def step(seeds: Tensor, coeffs: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(keys, values, strict=True))
        return zo.branches(model, seeds, coeffs)(lambda: model(**given).loss)

    seeds, coeffs = torch.tensor([1, 2]), torch.tensor([[1e-3, 0.0], [0.0, -1e-3]])
    return {
        "torch": torch,
        "model": model,
        "fresh_model": zoo.build("opt"),
        "batch": batch,
        "prompt": {
            "input_ids": batch["input_ids"][:, :4],
            "max_new_tokens": 3,
            "pad_token_id": 0,
        },
        "batch1": batch,
        "batch2": batch,
        "loader": [batch, batch],
        "examples": [{k: v[0] for k, v in batch.items()}] * 4,
        "scheduler": SimpleNamespace(step=lambda: None),
        "loss_fn": lambda m, b: m(**b).loss,
        "closure": lambda: model(**batch).loss,
        "seeds": seeds,
        "coeffs": coeffs,
        "step": step,
        "example": (seeds, coeffs, *batch.values()),
    }


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    known = namespace()
    found = blocks(README, "python")
    assert found
    for code in found:
        exec(compile(code, str(README), "exec"), known)
    plus, minus = known["plus"], known["minus"]
    assert plus.shape == minus.shape == () and float(plus) != float(minus)
    assert known["losses"].shape == (2,)
    assert set(known["z"]) == {n for n, _ in known["model"].named_parameters()}
    compiled = known["step"](*known["example"])
    torch.testing.assert_close(compiled, known["losses"], rtol=1e-4, atol=1e-5)


def test_the_ways_to_step_that_the_readme_names():
    """A batch, a batch with loss_fn, a closure, a list of batches; frozen parameters stay."""
    known = namespace()
    model, batch = known["model"], known["batch"]
    frozen = model.model.decoder.final_layer_norm.weight.requires_grad_(False)
    before = frozen.clone()
    opt = zo.MeZO(model, lr=1e-4, eps=1e-3)
    for arguments in ((batch,), (batch, known["loss_fn"]), (known["closure"],), ([batch, batch],)):
        weight = model.model.decoder.layers[0].fc1.weight.clone()
        loss = opt.step(*arguments)
        assert loss.shape == () and bool(torch.isfinite(loss))
        assert not torch.equal(weight, model.model.decoder.layers[0].fc1.weight)
    assert torch.equal(frozen, before)


def test_a_journal_replays_to_the_same_weights(tmp_path):
    """The README's "the same weights, bit for bit"."""
    known = namespace()
    run = zo.Trajectory()
    opt = zo.MeZO(known["model"], lr=1e-3, journal=run)
    for batch in known["loader"]:
        opt.step(batch)
    run.save(tmp_path / "run.zot")
    zo.Trajectory.load(tmp_path / "run.zot").replay_(known["fresh_model"])
    start = zoo.build("opt").state_dict()
    for name, tensor in known["model"].state_dict().items():
        assert torch.equal(known["fresh_model"].state_dict()[name], tensor), name
    assert any(not torch.equal(start[n], t) for n, t in known["model"].state_dict().items())


def test_causal_lm_loss_is_the_models_loss():
    known = namespace()
    model, batch = known["model"], known["batch"]
    with torch.no_grad():
        torch.testing.assert_close(zo.causal_lm_loss(model, batch), model(**batch).loss)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_the_text_exist(path):
    for name in re.findall(r"\bzo\.([A-Za-z_]\w*)", path.read_text()):
        assert hasattr(zo, name), f"zo.{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"[a-z]+://|#|mailto:", target):
            continue
        assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(path):
    left = re.findall(r"\b(?:TODO|FIXME|TBD|XXX)\b|\b[A-Z]{2,}_[A-Z_]+\b", prose(path))
    left += re.findall(r"^[A-Z_]{4,}$", prose(path), re.MULTILINE)
    assert not left


def shell_lines() -> list[str]:
    code = "\n".join(c for lang in ("", "sh", "bash", "console") for c in blocks(README, lang))
    return [line.split(" # ")[0].strip().removeprefix("$ ") for line in code.splitlines()]


def test_make_targets_exist():
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", README.read_text()))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named and named <= targets, named - targets


def test_command_lines_use_options_that_exist():
    lines = [line for line in shell_lines() if line.startswith("zokernels ")]
    assert lines
    for line in lines:
        command, *arguments = shlex.split(line)[1:]
        out = subprocess.run(
            [sys.executable, "-m", "zokernels", command, "--help"],
            cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
            env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        for option in (a.split("=")[0] for a in arguments if a.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", out.stdout), option


def test_python_m_zokernels_says_what_it_promises():
    """Versions, devices, which backend serves what, and why one is off."""
    out = subprocess.run(
        [sys.executable, "-m", "zokernels"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    for word in (zo.__version__, torch.__version__, "reference", "linear_cross_entropy", "cpu"):
        assert word in out.stdout
