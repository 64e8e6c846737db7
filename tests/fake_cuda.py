"""CUDA tensors without a GPU: shapes, dtypes and devices without data.

torch's ``FakeTensorMode`` runs every op as on a device, but for the numbers. What it refuses is
what a device would refuse or wait for: operands on different devices, and reading a value
(``.item()``, ``if tensor``, ``nonzero``). So a step that passes here mixes no devices and has no
host synchronisation in it. transformers takes the way here that it takes while a CUDA graph is
recorded; else it reads its causal mask once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_emulated
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from zokernels import _registry, deferred, optim

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
    def __call__(self) -> Iterator[None]:
        with self.mode, torch.no_grad():
            yield


class NeverFetched:
    """Losses on their way to a host that never asks."""

    ready = False

    def __init__(self, values: Tensor) -> None:
        assert values.device.type == "cuda"


@contextlib.contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch, *, own_loss: bool) -> Iterator[FakeDevice]:
    """A fake device on which first uses have been checked: comparisons need values.

    Args:
        own_loss: what the comparison of :func:`zokernels.causal_lm_loss` with the model's own
            loss came to.
    """
    branches = sys.modules["zokernels.branches"]
    remembered = branches._Memory.__init__

    def checked(self: Any, binding: Any) -> None:
        remembered(self, binding)
        self.checked = self.looked = True

    monkeypatch.setattr(branches._Memory, "__init__", checked)
    monkeypatch.setattr(sys.modules["zokernels.losses"], "_logits_can_go", lambda *a: own_loss)
    serving = _registry.serving
    monkeypatch.setattr(
        _registry,
        "serving",
        lambda op, device: "triton" if device == "cuda" else serving(op, device),
    )
    monkeypatch.setattr(optim, "Fetch", NeverFetched)
    monkeypatch.setattr(deferred, "recording", lambda device: False)
    monkeypatch.setattr(branches, "recording", lambda device: False, raising=False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, device=None: self)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
    yield FakeDevice()
