"""Which backend serves which op on which device.

Backends are tried in a fixed order per device type; ``reference`` serves every device. A backend
that cannot be used keeps the reason. ``ZOKERNELS_BACKEND`` (or :func:`use_backend`) asks for one by
name, and what is asked for and cannot be had is an error, never a silent fallback. Ahead of the
order goes what was measured faster on the GPU that is present (:mod:`zokernels._choice`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from zokernels import _checks, _choice, _ops

Kernel = Callable[..., object]

# Backend name -> (module with KERNELS, device types it serves), in the order they are tried.
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpp": ("zokernels.cpp", ("cpu",)),
    "triton": ("zokernels.triton.backend", ("cuda",)),
    "cuda": ("zokernels.cuda", ("cuda",)),
    "reference": ("zokernels.reference", ("*",)),
}

# Op -> backend that serves it ahead of the order above, read with the backends.
_FASTER: dict[str, str] = {}


@dataclass
class Backend:
    """A backend's kernels, or the reason why it is off."""

    name: str
    devices: tuple[str, ...]
    kernels: dict[str, Kernel] = field(default_factory=dict)
    reason: str | None = None
    # Whether its update_linear_ makes an update in the same pass: of x, w, coeffs, shared and the
    # distribution. None: it does not say.
    takes_update: Callable[..., bool] | None = None
    table: dict[tuple[str, str], Kernel] = field(default_factory=dict, repr=False)

    def serves(self, device: str) -> bool:
        return self.reason is None and ("*" in self.devices or device in self.devices)


_backends: dict[str, Backend] = {}
_forced: str | None = None
# (op, device type) -> kernel, as found before, under the backend that is asked for now.
_table: dict[tuple[str, str], Kernel] = {}


def _load(name: str) -> Backend:
    module, devices = _KNOWN[name]
    backend = Backend(name, devices)
    try:
        found = importlib.import_module(module)
        backend.kernels = dict(found.KERNELS)
        # Triton's interpreter works on CPU tensors.
        backend.devices = getattr(found, "DEVICES", devices)
        backend.takes_update = getattr(found, "takes_update", None)
    except (ImportError, OSError, RuntimeError) as error:
        backend.reason = f"{type(error).__name__}: {error}"
    return backend


def backends() -> dict[str, Backend]:
    """All known backends, loaded or with the reason why not.

    Raises:
        ValueError: ``ZOKERNELS_BACKEND`` names no backend, ``ZOKERNELS_CHOICE`` or the table of
            measured choices is malformed. RuntimeError: the backend that is asked for is off.
    """
    global _forced
    if not _backends:
        found = {name: _load(name) for name in _KNOWN}
        chosen = _chosen()
        asked = os.environ.get("ZOKERNELS_BACKEND")
        if asked:
            _require(asked, found)
            _forced = asked
        _FASTER.update(chosen)
        _backends.update(found)  # last: a request that fails does so on every call
    return _backends


def choosable() -> list[str]:
    """Names of the backends between which a measurement can choose: those for CUDA devices."""
    return [name for name, (_, devices) in _KNOWN.items() if "cuda" in devices]


def _chosen() -> dict[str, str]:
    """What was measured faster on the current CUDA device, and what the environment asks for."""
    allowed = {"ops": _ops.SCHEMAS, "names": choosable()}
    table = _choice.read(_choice.FILE, **allowed)
    found = {}
    if table and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = table.get(f"sm_{major}{minor}", {})
    return {**found, **_choice.overrides(**allowed)}


def _require(name: str, known: dict[str, Backend]) -> None:
    if name not in known:
        raise ValueError(f"backend must be one of {sorted(known)}; got {name!r}")
    if known[name].reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for but is off: {known[name].reason}")


def _force(name: str) -> None:
    global _forced, _table
    _require(name, backends())
    _forced, _table = name, _backends[name].table


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every op inside the context.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is off; the message says why.
    """
    global _forced, _table
    backends()  # may itself force one
    previous = _forced, _table
    _force(name)
    try:
        yield
    finally:
        _forced, _table = previous


def kernel(backend: str, op: str) -> Kernel:
    """One backend's implementation of an op, for tests and benchmarks.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend is off, or does not have the op.
    """
    known = backends()
    if backend not in known:
        raise ValueError(f"backend must be one of {sorted(known)}; got {backend!r}")
    if known[backend].reason is not None:
        raise RuntimeError(f"backend {backend!r} is off: {known[backend].reason}")
    if op not in known[backend].kernels:
        raise RuntimeError(f"backend {backend!r} has no op {op!r}")
    return known[backend].kernels[op]


def serving(op: str, device: str) -> str:
    """Name of the backend that serves an op on a device type."""
    known = backends()
    first = _FASTER.get(op)
    for name, backend in sorted(known.items(), key=lambda item: item[0] != first):
        if (
            (_forced is None or name == _forced)
            and backend.serves(device)
            and op in backend.kernels
        ):
            return name
    raise RuntimeError(
        f"backend {_forced!r} was asked for but does not serve {op!r} on {device!r}"
        if _forced
        else f"no backend serves {op!r} on {device!r}"
    )


def _dispatcher(op: str) -> Kernel:
    check = _checks.CHECKS[op]

    def call(*args: object) -> object:
        device = check(*args)
        found = _table.get((op, device))
        if found is None:
            found = _table[op, device] = backends()[serving(op, device)].kernels[op]
        return found(*args)

    return call


for _name in _ops.SCHEMAS:
    _ops.library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")


def device_types() -> list[str]:
    """Device types torch can use here."""
    types = ["cpu"]
    if torch.cuda.is_available():
        types.append("cuda")
    return types
