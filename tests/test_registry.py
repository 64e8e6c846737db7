"""Which backend serves what: order, forcing, and failing loudly."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zokernels import _choice, _ops, _registry, reference

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Give the registry other backends for one test: name -> kernels, or its import error."""
    nothing = tmp_path / "nothing.json"
    nothing.write_text("{}")
    monkeypatch.setattr(_choice, "FILE", nothing)

    def install(
        known: dict[str, tuple[dict[str, Any] | Exception, tuple[str, ...]]], env: str | None = None
    ) -> None:
        table = {name: (f"fake.{name}", devices) for name, (_, devices) in known.items()}
        real = _registry.importlib.import_module

        def load(module: str, package: str | None = None) -> Any:
            if not module.startswith("fake."):
                return real(module, package)
            kernels = known[module.removeprefix("fake.")][0]
            if isinstance(kernels, Exception):
                raise kernels
            return types.SimpleNamespace(KERNELS=kernels)

        monkeypatch.setattr(_registry, "_KNOWN", table)
        monkeypatch.setattr(_registry, "_backends", {})
        monkeypatch.setattr(_registry, "_table", {})
        monkeypatch.setattr(_registry, "_forced", None)
        monkeypatch.setattr(_registry, "_FASTER", {})
        monkeypatch.setattr(_registry.importlib, "import_module", load)
        if env is None:
            monkeypatch.delenv("ZOKERNELS_BACKEND", raising=False)
        else:
            monkeypatch.setenv("ZOKERNELS_BACKEND", env)

    yield install


def sample_as(value: float) -> dict[str, Callable[..., torch.Tensor]]:
    return {"sample": lambda rows, cols, *rest: torch.full((rows, cols), value)}


def sample() -> float:
    return float(torch.ops.zokernels.sample(1, 1, torch.tensor(0), 0, 0, 0, "gaussian"))


def test_reference_has_every_op_and_serves_every_device():
    found = _registry.backends()["reference"]
    assert found.reason is None
    assert set(found.kernels) == set(_ops.SCHEMAS)
    assert found.serves("cpu") and found.serves("cuda") and found.serves("xpu")


def test_no_backend_has_an_op_that_does_not_exist():
    for name, found in _registry.backends().items():
        assert set(found.kernels) <= set(_ops.SCHEMAS), name


def test_the_first_backend_that_has_the_op_serves(fresh):
    fresh(
        {
            "elsewhere": (sample_as(1.0), ("cuda",)),
            "partial": ({"project": None}, ("cpu",)),
            "fast": (sample_as(2.0), ("cpu",)),
            "slow": (sample_as(3.0), ("*",)),
        }
    )
    assert _registry.serving("sample", "cpu") == "fast"
    assert _registry.serving("sample", "cuda") == "elsewhere"
    assert _registry.serving("sample", "xpu") == "slow"
    assert sample() == 2.0
    with pytest.raises(RuntimeError, match="no backend serves 'linear' on 'cpu'"):
        _registry.serving("linear", "cpu")


def test_use_backend_nests_and_comes_back(fresh):
    fresh({"fast": (sample_as(2.0), ("cpu",)), "slow": (sample_as(3.0), ("*",))})
    assert sample() == 2.0
    with _registry.use_backend("slow"):
        assert sample() == 3.0
        with _registry.use_backend("fast"):
            assert sample() == 2.0
        assert sample() == 3.0
    assert sample() == 2.0
    with pytest.raises(KeyError), _registry.use_backend("slow"):
        raise KeyError
    assert sample() == 2.0


def test_a_backend_that_is_off_keeps_its_reason_and_the_next_one_serves(fresh):
    fresh(
        {
            "fast": (ImportError("libfast.so: cannot open shared object file"), ("cpu",)),
            "slow": (sample_as(3.0), ("*",)),
        }
    )
    found = _registry.backends()["fast"]
    assert found.reason == "ImportError: libfast.so: cannot open shared object file"
    assert not found.serves("cpu") and not found.kernels
    assert sample() == 3.0


@pytest.mark.parametrize("error", [ImportError("a"), OSError("b"), RuntimeError("c")])
def test_asked_for_but_off_is_an_error(fresh, error):
    fresh({"fast": (error, ("cpu",)), "slow": (sample_as(3.0), ("*",))})
    message = rf"backend 'fast' was asked for but is off: {type(error).__name__}: {error}"
    with pytest.raises(RuntimeError, match=message), _registry.use_backend("fast"):
        pass
    assert sample() == 3.0
    with pytest.raises(RuntimeError, match=r"backend 'fast' is off: "):
        _registry.kernel("fast", "sample")


def test_a_broken_backend_is_not_taken_for_a_missing_one(fresh):
    """Only failures to load turn a backend off; a bug in its module is raised, every time."""
    fresh({"fast": (AttributeError("bug"), ("cpu",)), "slow": (sample_as(3.0), ("*",))})
    for _ in range(2):
        with pytest.raises(AttributeError, match="bug"):
            sample()


def test_asked_for_but_without_the_op_is_an_error(fresh):
    fresh({"fast": ({"project": None}, ("cpu",)), "slow": (sample_as(3.0), ("*",))})
    message = "'fast' was asked for but does not serve 'sample'"
    with _registry.use_backend("fast"), pytest.raises(RuntimeError, match=message):
        sample()
    assert sample() == 3.0


def test_unknown_backend(fresh):
    fresh({"slow": (sample_as(3.0), ("*",))})
    message = r"backend must be one of \['slow'\]; got 'quick'"
    with pytest.raises(ValueError, match=message), _registry.use_backend("quick"):
        pass
    with pytest.raises(ValueError, match=message):
        _registry.kernel("quick", "sample")


def test_kernel():
    assert _registry.kernel("reference", "linear") is reference.linear
    with pytest.raises(RuntimeError, match="backend 'reference' has no op 'conv'"):
        _registry.kernel("reference", "conv")


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        ("quick", ValueError, "backend must be one of .*; got 'quick'"),
        ("fast", RuntimeError, "'fast' was asked for but is off: ImportError: no"),
    ],
)
def test_a_bad_environment_fails_on_every_call(fresh, env, error, message):
    known = {"fast": (ImportError("no"), ("cpu",)), "slow": (sample_as(3.0), ("*",))}
    fresh(known, env)
    for _ in range(3):
        with pytest.raises(error, match=message):
            sample()
        with pytest.raises(error, match=message):
            _registry.backends()


def test_the_environment_chooses(fresh):
    known = {"fast": (sample_as(2.0), ("cpu",)), "slow": (sample_as(3.0), ("*",))}
    fresh(known, "slow")
    assert sample() == 3.0
    assert _registry.serving("sample", "cpu") == "slow"
    fresh(known, "")
    assert sample() == 2.0


# --- measured choices -----------------------------------------------------------------------------

GPU = {
    "triton": (sample_as(1.0), ("cuda",)),
    "cuda": (sample_as(2.0), ("cuda",)),
    "slow": (sample_as(3.0), ("*",)),
}


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_what_was_measured_faster_serves_first(fresh, capability, tmp_path, monkeypatch):
    monkeypatch.setattr(_choice, "FILE", tmp_path / "measured.json")
    for architecture, serves in (("sm_80", "triton"), ("sm_90", "cuda")):
        _choice.write(_choice.FILE, {architecture: {"sample": "cuda"}})
        fresh(GPU)
        assert _registry.serving("sample", "cuda") == serves
        assert _registry.serving("sample", "cpu") == "slow"
    with _registry.use_backend("triton"):
        assert _registry.serving("sample", "cuda") == "triton"
    # A backend that is off, or has no such op, is passed over.
    _registry.backends()["cuda"].kernels.clear()
    assert _registry.serving("sample", "cuda") == "triton"


def test_the_environment_overrides_what_was_measured(fresh, capability, monkeypatch):
    monkeypatch.setenv(_choice.VARIABLE, " sample = cuda ,")
    fresh(GPU)
    assert _registry.serving("sample", "cuda") == "cuda"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample", "ZOKERNELS_CHOICE must be entries op=backend; got 'sample'"),
        ("conv=cuda", "ZOKERNELS_CHOICE: op must be one of .*; got 'conv'"),
        (
            "sample=cpp",
            r"backend of 'sample' must be one of \['cuda', 'slow', 'triton'\]; got 'cpp'",
        ),
    ],
)
def test_a_bad_override_fails_on_every_call(fresh, monkeypatch, text, message):
    monkeypatch.setenv(_choice.VARIABLE, text)
    fresh({**GPU, "slow": (sample_as(3.0), ("*", "cuda"))})
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            sample()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object of architectures"),
        ('{"hopper": {}}', "architecture must have the form sm_90; got 'hopper'"),
        ('{"sm_90": ["linear"]}', "sm_90 must be an object of ops"),
        ('{"sm_90": {"conv": "cuda"}}', "sm_90: op must be one of .*; got 'conv'"),
        ('{"sm_90": {"linear": "cpp"}}', "backend of 'linear' must be one of .*; got 'cpp'"),
        ('{"sm_90": {"linear": 3}}', "backend of 'linear' must be one of .*; got 3"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _choice.read(path, ops=_ops.SCHEMAS, names=["cuda", "triton"])


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        _choice.read(tmp_path / "none.json", ops=_ops.SCHEMAS, names=["cuda"])


def test_the_packages_table_is_valid_and_tables_come_back_as_written(tmp_path):
    allowed = {"ops": _ops.SCHEMAS, "names": _registry.choosable()}
    assert set(allowed["names"]) == {"cuda", "triton"}
    _choice.read(_choice.FILE, **allowed)
    table = {"sm_90": {"linear": "cuda"}, "sm_80": {"project": "triton"}, "sm_100": {}}
    _choice.write(tmp_path / "a" / "t.json", table)
    del table["sm_100"]
    assert _choice.read(tmp_path / "a" / "t.json", **allowed) == table


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_variable_in_a_new_process():
    code = (
        "import torch, zokernels\n"
        "from zokernels import _registry\n"
        "print(_registry.serving('linear', 'cpu'))\n"
        "print(torch.ops.zokernels.sample(1, 4, torch.tensor(1), 2, 0, 0, 'rademacher').tolist())\n"
    )
    good = run(code, ZOKERNELS_BACKEND="reference")
    assert good.returncode == 0, good.stderr
    want = torch.ops.zokernels.sample(1, 4, torch.tensor(1), 2, 0, 0, "rademacher").tolist()
    assert good.stdout.split("\n")[:2] == ["reference", str(want)]
    bad = run(code, ZOKERNELS_BACKEND="quick")
    assert bad.returncode != 0
    assert "backend must be one of" in bad.stderr and "'quick'" in bad.stderr
