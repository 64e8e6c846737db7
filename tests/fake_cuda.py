"""CUDA tensors without a GPU: shapes, dtypes and devices without data.

torch's ``FakeTensorMode`` runs every op as on a device, but for the numbers. What it refuses is
what a device would refuse or wait for: operands on different devices, and reading a value
(``.item()``, ``if tensor``, ``nonzero``). So a step that passes here mixes no devices and has no
host synchronisation in it. transformers takes the way here that it takes while a CUDA graph is
recorded; else it reads its causal mask once.

The ops of this package are answered by their fakes, or by a backend's own adapters
(:meth:`FakeDevice.adapters`), and ``torch.cuda.graph`` refuses what a graph would hold wrongly
(:class:`Captured`).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import cuda_emulated
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from zokernels import _cuda_ops, _registry, optim, verify
from zokernels._late import Flags
from zokernels.triton import devices

# Without it torch looks for a driver whenever an op enters a CUDA device.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


def enter_devices(folder: Path) -> None:
    """Let ops enter a CUDA device that is not there. For this process, for good."""
    if torch.version.cuda is not None:
        return  # torch does it itself
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(_GUARD)
    torch_dir = Path(torch.__file__).parent
    cuda_emulated.compile_host(
        [source],
        library,
        f"-isystem{torch_dir / 'include'}",
        libraries=(f"-L{torch_dir / 'lib'}", "-lc10"),
    )
    torch.ops.load_library(library)


class FakeDevice:
    """Models and batches on a fake CUDA device."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def tensor(self, value: Any) -> Any:
        """A tensor of this shape, stride and dtype; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        with self.mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )

    def batch(self, batch: Any) -> Any:
        return tree_map(self.tensor, batch)

    def model(self, model: nn.Module) -> nn.Module:
        """The model with its parameters and buffers replaced."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # holds the originals: an id is one of these
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is None:
                        continue
                    if id(value) not in moved:
                        fake = self.tensor(value)
                        if isinstance(value, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                        moved[id(value)] = (value, fake)
                    held[name] = moved[id(value)][1]
        return model

    @contextlib.contextmanager
    def __call__(self, kernels: Kernels | None = None) -> Iterator[None]:
        """On the device; the package's ops go to ``kernels`` where these are given."""
        ops = contextlib.nullcontext() if kernels is None else _Adapters(kernels)
        with self.mode, torch.no_grad(), ops:
            yield


class NeverFetched:
    """Losses on their way to a host that never asks."""

    ready = False

    def __init__(self, values: Tensor) -> None:
        assert values.device.type == "cuda"
        _refuse_while_recording("values are fetched")


@contextlib.contextmanager
def fake_device(
    monkeypatch: pytest.MonkeyPatch, *, own_loss: bool, compared: bool = True
) -> Iterator[FakeDevice]:
    """A fake device.

    Args:
        own_loss: what the comparison of :func:`zokernels.causal_lm_loss` with the model's own
            loss came to.
        compared: first uses of models have been checked; else they are, and all is well.
    """
    branches = sys.modules["zokernels.branches"]
    remembered = branches._Memory.__init__

    def checked(self: Any, binding: Any) -> None:
        remembered(self, binding)
        self.checked = self.looked = compared

    monkeypatch.setattr(branches._Memory, "__init__", checked)
    monkeypatch.setattr(verify, "difference", lambda *a: None)
    monkeypatch.setattr(verify, "has_nan", lambda *a: False)
    monkeypatch.setattr(sys.modules["zokernels.losses"], "logits_can_go", lambda *a: own_loss)
    _serve(monkeypatch, "triton")
    monkeypatch.setattr(optim, "Fetch", NeverFetched)
    # Every tensor has memory of its own, aligned as the allocator's is.
    monkeypatch.setattr(FakeTensor, "data_ptr", _address)
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    for name, stand_in in _cuda().items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, stand_in)
    yield FakeDevice()


def _serve(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ops on a CUDA device are those of a backend."""
    serving = _registry.serving
    monkeypatch.setattr(
        _registry,
        "serving",
        lambda op, device: name if device == "cuda" else serving(op, device),
    )


def _pinned(tensor: Tensor, device: object = None) -> Tensor:
    _refuse_while_recording("pinned memory is taken")
    # Torch follows the numbers of tensors made on the host and would compute with them: not these.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _address(tensor: Tensor) -> int:
    within = tensor.storage_offset() * tensor.element_size()
    return tensor.untyped_storage()._cdata % (1 << 40) * 512 + within


# --- a backend's own adapters ---------------------------------------------------------------------

Kernels = Mapping[str, Callable[..., Any]]


class _Adapters(TorchDispatchMode):
    """The package's ops go to a backend's functions, as a device's would."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "zokernels":
            return self.kernels[func._schema.name.split("::")[1]](*args)
        return func(*args, **(kwargs or {}))


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # with a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0


Compiled = dict[str, set[str]]


@contextlib.contextmanager
def triton_adapters(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Kernels, Compiled]]:
    """Those of the Triton backend, on an H100, and what launches would have compiled, by kernel."""
    compiled: Compiled = {}

    def compile_nothing(self: Any, key: str, signature: Any, device: int, *rest: Any) -> Any:
        _refuse_while_recording(f"{self.fn.__name__} is compiled")
        compiled.setdefault(self.fn.__name__, set()).add(key)
        self.device_caches[device][0][key] = nothing = MagicMock()
        return nothing

    name = "zokernels.triton.backend"
    assert name not in sys.modules, "without a GPU the backend is off"
    monkeypatch.setattr(devices, "present", lambda index: devices.architecture("sm_90"))
    _host_flags(monkeypatch)
    monkeypatch.setattr(driver, "_active", _Driver())
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        kernels = dict(importlib.import_module(name).KERNELS)
    monkeypatch.setattr(_registry.backends()["triton"], "kernels", kernels)
    tables = importlib.import_module("zokernels.triton.tables")
    modules = [m for name, m in sys.modules.items() if name.startswith("zokernels.triton.")]
    for found in [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]:
        found.device_caches.pop(-1, None)
    try:
        yield kernels, compiled
    finally:
        tables._groups.clear()
        tables._captured.clear()
        del sys.modules[name], vars(sys.modules["zokernels.triton"])["backend"]


def cuda_adapters(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Those of the native CUDA backend. Kernels do nothing but look at where their tensors are."""
    # A list of indices is read once.
    read = _refusing("a list is read")
    monkeypatch.setattr("zokernels._cuda_sparse.check_index", read)
    cuda_emulated.library()
    emulated = torch.ops.zokernels_cuda_emulated
    _host_flags(monkeypatch)

    def native(name: str) -> Callable[..., Any]:
        found = getattr(emulated, name).default
        if found._schema.returns:
            return found  # a number, of sizes

        def run(*args: object) -> None:
            given = zip(found._schema.arguments, args, strict=True)
            for argument, value in given:
                for leaf in value if isinstance(value, list) else [value]:
                    if isinstance(leaf, Tensor) and argument.name != "flag":
                        assert leaf.device.type == "cuda", f"{name}: {argument.name} on the host"

        return run

    class Ops:
        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(default=native(name))

    kernels = _cuda_ops.Native(
        Ops(),
        stream=lambda device: 0,
        multiprocessors=lambda device: 132,
        capturing=_capturing,
    ).kernels()
    _serve(monkeypatch, "cuda")
    monkeypatch.setattr(_registry.backends()["cuda"], "kernels", kernels)
    return kernels


def _host_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad indices are real tensors of the host, in pinned memory from their first use."""
    of = Flags.of

    def real(self: Flags, device: torch.device) -> Tensor:
        if device not in self._of:
            _refuse_while_recording("pinned memory is taken")
        with unset_fake_temporarily(), monkeypatch.context() as patch:
            patch.setattr(Tensor, "pin_memory", lambda self: self)
            return of(self, device)

    monkeypatch.setattr(Flags, "of", real)
    look = Flags.look

    def looked(self: Flags, device: torch.device, what: str | None = None) -> None:
        with unset_fake_temporarily():
            look(self, device, what)

    monkeypatch.setattr(Flags, "look", looked)


# --- graphs ---------------------------------------------------------------------------------------

_recording: list[Captured] = []


def _capturing() -> bool:
    return bool(_recording)


class CaptureError(RuntimeError):
    """What a CUDA graph would refuse, or hold as it was at the capture."""


def _refuse_while_recording(what: str) -> None:
    if _recording:
        place = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if "zokernels/" in frame.filename
        ]
        raise CaptureError(f"{what} while a graph is recorded, in {' < '.join(place[:-4:-1])}")


def _refusing(what: str, answer: object = None) -> Callable[..., object]:
    """A function that may not be called while a graph is recorded."""

    def call(*args: object, **kwargs: object) -> object:
        _refuse_while_recording(what)
        return answer

    return call


class Captured(TorchDispatchMode):
    """What a recorded graph may not do, besides what :class:`FakeTensorMode` refuses.

    A tensor of the host has one value in a graph, that of the capture, and its copy to the device
    waits (pageable) or reads memory that is gone at a replay (pinned); a copy to the host waits.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        kinds = {t.device.type for t in given}, {t.device.type for t in made}
        if "cpu" in kinds[0] and "cuda" in kinds[0] | kinds[1]:
            _refuse_while_recording(f"{func}: a tensor of the host goes to the device")
        if "cuda" in kinds[0] and "cpu" in kinds[1]:
            _refuse_while_recording(f"{func}: a tensor of the device goes to the host")
        return out


class _Graph:
    """Replays nothing."""

    def replay(self) -> None:
        assert not _recording


class _Stream:
    def __init__(self, device: object = 0) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None:
        _refuse_while_recording("a stream is waited for")


def _cuda() -> dict[str, Any]:
    """What is asked of torch.cuda."""
    main = _Stream()

    @contextlib.contextmanager
    def graph(
        graph: _Graph, *, stream: _Stream, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert stream is not main, "the legacy stream cannot be captured"
        captured = Captured()
        with captured:
            _recording.append(captured)
            try:
                yield
            finally:
                _recording.remove(captured)

    return {
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": _refusing("random state is read", torch.empty(0)),
        "set_rng_state": _refusing("random state is set"),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: main,
        "set_stream": lambda stream: None,
        "device": lambda device: contextlib.nullcontext(),
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": graph,
        "synchronize": _refusing("the device is waited for"),
        "is_current_stream_capturing": _capturing,
    }
