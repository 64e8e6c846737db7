"""A federation's state in one file, replaced only by a complete new one."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as encode
from torch import Tensor

from zokernels._files import write_atomically
from zokernels.noise import CONTRACT_VERSION

_KIND = "fedzo.checkpoint"
_FORMAT = 1
_VALUE = "value/"


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or belongs to another run."""


def save(
    path: str | os.PathLike[str],
    *,
    values: Mapping[str, Tensor],
    state: Mapping[str, Any],
    messages: Mapping[str, Sequence[bytes]],
) -> None:
    """Write a safetensors file: values as tensors, messages as bytes, the rest as JSON.

    Args:
        values: what moves, by parameter name.
        state: JSON-compatible.
        messages: lists of encoded messages by name.

    Raises:
        OSError: the file cannot be written; an existing one is then untouched.
    """
    tensors = {_VALUE + name: t.contiguous().cpu() for name, t in values.items()}
    for name, listed in messages.items():
        tensors[f"{name}/bytes"] = _bytes(b"".join(listed))
        tensors[f"{name}/sizes"] = torch.tensor([len(m) for m in listed], dtype=torch.int64)
    metadata = {
        "kind": _KIND,
        "format": str(_FORMAT),
        "contract_version": str(CONTRACT_VERSION),
        "state": json.dumps(state),
        "checksums": json.dumps({name: _checksum(t) for name, t in tensors.items()}),
    }
    write_atomically(path, encode(tensors, metadata))


def load(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, list[bytes]]]:
    """Read what :func:`save` wrote: values, state, messages.

    Raises:
        CheckpointError: no checkpoint, damaged, or of an unknown version.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        tensors = parse(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    for key, known in (
        ("kind", _KIND),
        ("format", str(_FORMAT)),
        ("contract_version", str(CONTRACT_VERSION)),
    ):
        if metadata.get(key) != known:
            raise CheckpointError(f"{path}: {key} must be {known!r}; got {metadata.get(key)!r}")
    try:
        state = json.loads(metadata["state"])
        if json.loads(metadata["checksums"]) != {n: _checksum(t) for n, t in tensors.items()}:
            raise ValueError("a checksum is wrong")
        messages: dict[str, list[bytes]] = {}
        for key in [k for k in tensors if k.endswith("/sizes") and not k.startswith(_VALUE)]:
            name = key.removesuffix("/sizes")
            joined = tensors[f"{name}/bytes"].numpy().tobytes()
            sizes = tensors[key].tolist()
            if sum(sizes) != len(joined):
                raise ValueError(f"the sizes of {name} do not fit")
            messages[name] = []
            for size in sizes:
                messages[name].append(joined[:size])
                joined = joined[size:]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    values = {k.removeprefix(_VALUE): t for k, t in tensors.items() if k.startswith(_VALUE)}
    return values, state, messages


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _bytes(data: bytes) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
