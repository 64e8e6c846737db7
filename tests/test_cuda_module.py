"""zokernels/cuda.py, which only a CUDA torch with a device imports, over stand-ins for both."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator

import cuda_emulated
import pytest
import torch

import zokernels
from zokernels import _load

Import = Callable[[bytes | None], types.ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports the module anew; its library answers the probe as given."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    raw = {0: 0, 1: 0xABC, 2: 0xDEF}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw.__getitem__, raising=False)
    cuda_emulated.library()
    monkeypatch.setattr(
        torch.ops, "zokernels_cuda", torch.ops.zokernels_cuda_emulated, raising=False
    )
    before = sys.modules.pop("zokernels.cuda", None)

    def imported(answer: bytes | None) -> types.ModuleType:
        def probe() -> bytes | None:
            return answer

        library = types.SimpleNamespace(zokernels_cuda_probe=probe)
        monkeypatch.setattr(_load, "native_library", lambda name: library)
        return importlib.import_module("zokernels.cuda")

    yield imported
    sys.modules.pop("zokernels.cuda", None)
    vars(zokernels).pop("cuda", None)
    if before is not None:
        sys.modules["zokernels.cuda"] = before
        vars(zokernels)["cuda"] = before


def test_a_device_without_code_is_named(load: Import) -> None:
    error = b"no kernel image is available for execution on the device"
    with pytest.raises(ImportError, match=r"Tesla T4 \(sm_75; .* sm_80 and newer\): no kernel im"):
        load(error)


def test_the_stream_is_that_of_the_tensors_device(load: Import) -> None:
    module = load(None)
    assert module._stream(torch.device("cuda", 1)) == 0xABC
    assert module._stream(torch.device("cuda", 0)) == 0  # the default stream
    assert module._stream(torch.device("cuda")) == 0xDEF  # of the current device
    assert set(module.KERNELS) == set(cuda_emulated.native().kernels())


def test_wgmma_is_for_one_capability(load: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(None)
    monkeypatch.setattr(module, "of_device", lambda name: types.SimpleNamespace(wgmma=128))
    for index, capability, tokens in ((0, (8, 0), 0), (1, (9, 0), 128), (2, (10, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert module._wgmma_tokens(torch.device("cuda", index)) == tokens
