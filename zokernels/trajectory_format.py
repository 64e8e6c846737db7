"""Records of a run's updates, and the bytes of a trajectory file.

File format (little-endian), the same for a finished file and for a journal that is being written::

    magic      "ZOtr", uint16 format version, uint16 noise contract version
    record     uint32 payload length, uint8 kind, payload, uint32 checksum
    checksum   CRC-32 of the record's other bytes, started from the checksum before it
               (for the first record: the CRC-32 of the 8 bytes of magic)
    kind 1     header, once and first: JSON {distribution, rounding, metadata}
    kind 2     layout, before the first step and when the parameter groups change:
               JSON {groups: [[[name, id, shape, dtype], ...], ...]}, with a fifth entry for a
               parameter under a mask: the digest of its indices (the mask is a file of its own)
    kind 3     step: uint64 step, uint32 K, uint16 groups G, uint16 flags (1: decay present),
               int64 seeds[K], float32 coeffs[G, K], float32 decay[G, K], uint8 ends[K],
               JSON metadata

A record is one write, and the checksums are chained: a process that is killed leaves at most one
incomplete record at the end, which a reader detects.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zokernels.binding import BoundParameter
from zokernels.displacement import (
    UnknownVersionError,
    _native,
    _pack,
    check_distribution,
    check_rounding,
)
from zokernels.noise import CONTRACT_VERSION, parameter_id

_MAGIC = struct.Struct("<4sHH")
_SIGNATURE = b"ZOtr"
_FORMAT = 1
_RECORD = struct.Struct("<IB")
_CHECKSUM = struct.Struct("<I")
_STEP = struct.Struct("<QIHH")
_HAS_DECAY = 1
HEADER, LAYOUT, STEP = 1, 2, 3  # kinds of records


class TrajectoryError(ValueError):
    """A trajectory that cannot be read, written, or replayed on a model."""


class ForeignFileError(TrajectoryError):
    """The file is not a trajectory."""


class TruncatedTrajectoryError(TrajectoryError):
    """The file ends inside a record, as a killed process leaves it."""


class CorruptTrajectoryError(TrajectoryError):
    """A record's checksum or content is wrong."""


class TrajectoryVersionError(TrajectoryError, UnknownVersionError):
    """A format or noise contract version this package does not know."""


class ModelMismatchError(TrajectoryError):
    """The model does not have the parameters the run moved."""


@dataclass(frozen=True, slots=True)
class ParameterRecord:
    """What a trajectory knows about a parameter; ``mask``: digest of the indices that moved."""

    name: str
    id: int
    shape: tuple[int, ...]
    dtype: str
    mask: str = ""

    @classmethod
    def of(cls, parameter: BoundParameter) -> ParameterRecord:
        """The record of a bound parameter."""
        mask = "" if parameter.masked is None else parameter.masked.digest
        return cls.of_tensor(parameter.name, parameter.tensor, mask)

    @classmethod
    def of_tensor(cls, name: str, tensor: Tensor, mask: str = "") -> ParameterRecord:
        """The record of a named tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, parameter_id(name), tuple(tensor.shape), dtype, mask)

    @property
    def kind(self) -> str:
        """Shape, dtype and mask in words."""
        return f"{self.shape} {self.dtype}" + (f" under mask {self.mask[:12]}" if self.mask else "")

    def __str__(self) -> str:
        return f"{self.name!r} {self.kind}"


Layout = tuple[tuple[ParameterRecord, ...], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The update of one step.

    Attributes:
        step: the optimizer's step counter.
        seeds: K signed 64-bit seeds.
        coeffs: ``[groups][K]`` float32 coefficients.
        decay: ``[groups][K]`` float32 factors on the weight before each term; empty means 1.
        ends: K flags: the weight is rounded to its dtype after this term.
        meta: whatever was noted about the step.
        layout: index of the trajectory's layout that says what the groups are.
    """

    step: int
    seeds: tuple[int, ...]
    coeffs: tuple[tuple[float, ...], ...]
    decay: tuple[tuple[float, ...], ...] = ()
    ends: tuple[bool, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    layout: int = 0

    def terms(self, group: int) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        """Coefficients and decay of a group."""
        return self.coeffs[group], self.decay[group] if self.decay else None


# --- framing --------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A place between two records: the offset in the file, and the checksum chain there."""

    offset: int
    chain: int


class Record(NamedTuple):
    """A record as it stands in a file."""

    kind: int
    payload: memoryview
    start: Mark
    end: Mark
    where: str  # for messages


def magic() -> tuple[bytes, Mark]:
    """What a file starts with, and the mark after it."""
    start = _MAGIC.pack(_SIGNATURE, _FORMAT, CONTRACT_VERSION)
    return start, Mark(len(start), zlib.crc32(start))


def seal(kind: int, payload: bytes, start: Mark) -> tuple[bytes, Mark]:
    """A record written at ``start``, and the mark after it."""
    record = _RECORD.pack(len(payload), kind) + payload
    chain = zlib.crc32(record, start.chain)
    record += _CHECKSUM.pack(chain)
    return record, Mark(start.offset + len(record), chain)


def records(data: memoryview, path: Path) -> Iterator[Record]:
    """The records of a file, checked up to their checksums; ``path`` is for messages.

    Raises:
        TrajectoryError: as :meth:`zokernels.Trajectory.load`, after the whole records before.
    """
    start = bytes(data[: _MAGIC.size])
    if start[:4] != _SIGNATURE[: len(start)] or not start:
        raise ForeignFileError(
            f"{path} is no trajectory: it must start with {_SIGNATURE!r}; got {start[:4]!r}"
        )
    if len(start) < _MAGIC.size:
        raise TruncatedTrajectoryError(f"{path} ends inside the magic, at byte {len(start)}")
    _, form, version = _MAGIC.unpack(start)
    if form != _FORMAT:
        raise TrajectoryVersionError(f"{path}: format must be {_FORMAT}; got {form}")
    if version != CONTRACT_VERSION:
        raise TrajectoryVersionError(
            f"{path}: noise contract version must be {CONTRACT_VERSION}; got {version}"
        )
    mark, first = Mark(_MAGIC.size, zlib.crc32(start)), True
    while mark.offset < len(data):
        where = f"{path}, record at byte {mark.offset}"
        body = mark.offset + _RECORD.size
        if body > len(data):
            raise TruncatedTrajectoryError(f"{where}: the file ends inside it")
        length, kind = _RECORD.unpack_from(data, mark.offset)
        end = body + length + _CHECKSUM.size
        if end > len(data):
            raise TruncatedTrajectoryError(f"{where}: the file ends inside it")
        chain = zlib.crc32(data[mark.offset : body + length], mark.chain)
        if _CHECKSUM.unpack_from(data, body + length) != (chain,):
            raise CorruptTrajectoryError(f"{where}: wrong checksum")
        if first != (kind == HEADER):
            raise CorruptTrajectoryError(f"{where}: the header must be the first record")
        after = Mark(end, chain)
        yield Record(kind, data[body : body + length], mark, after, where)
        mark, first = after, False
    if first:
        raise TruncatedTrajectoryError(f"{path} ends before the header")


# --- payloads -------------------------------------------------------------------------------------


def encode_header(distribution: str, rounding: str, metadata: Mapping[str, Any]) -> bytes:
    fields = {"distribution": distribution, "rounding": rounding, "metadata": metadata}
    return as_json(fields, "metadata")


def decode_header(payload: memoryview) -> tuple[str, str, dict[str, Any]]:
    """Distribution, rounding, metadata."""
    fields = _object(payload, {"distribution", "rounding", "metadata"})
    if not isinstance(fields["metadata"], dict):
        raise CorruptTrajectoryError("metadata must be an object")
    return (
        check_distribution(fields["distribution"]),
        check_rounding(fields["rounding"]),
        fields["metadata"],
    )


def encode_layout(layout: Layout) -> bytes:
    groups = [
        [[r.name, r.id, list(r.shape), r.dtype, *([r.mask] if r.mask else [])] for r in group]
        for group in layout
    ]
    return as_json({"groups": groups}, "layout")


def decode_layout(payload: memoryview) -> Layout:
    groups = []
    for group in _object(payload, {"groups"})["groups"]:
        records = []
        for name, number, shape, dtype, *mask in group:
            if (
                not isinstance(name, str)
                or number != parameter_id(name)
                or not all(isinstance(n, int) and n >= 0 for n in shape)
                or not isinstance(getattr(torch, dtype, None), torch.dtype)
                or len(mask) > 1
                or not all(isinstance(m, str) and m for m in mask)
            ):
                raise CorruptTrajectoryError(f"bad parameter {[name, number, shape, dtype, *mask]}")
            records.append(ParameterRecord(name, number, tuple(shape), dtype, *mask))
        groups.append(tuple(records))
    return tuple(groups)


def encode_step(step: Step) -> bytes:
    return b"".join(
        [
            _STEP.pack(
                step.step, len(step.seeds), len(step.coeffs), _HAS_DECAY if step.decay else 0
            ),
            _pack("q", step.seeds),
            *(_pack("f", row) for row in step.coeffs),
            *(_pack("f", row) for row in step.decay),
            bytes(step.ends),
            as_json(dict(step.meta), "meta"),
        ]
    )


def decode_step(payload: memoryview, layout: int) -> Step:
    number, count, groups, flags = _STEP.unpack_from(payload)
    if flags & ~_HAS_DECAY:
        raise CorruptTrajectoryError(f"unknown flags {flags:#x}")
    tables = 2 if flags & _HAS_DECAY else 1
    size = _STEP.size + 8 * count + 4 * tables * groups * count + count
    if len(payload) < size:
        raise CorruptTrajectoryError(f"{count} terms need {size} bytes; got {len(payload)}")
    at = _STEP.size

    def take(code: str, width: int) -> tuple[Any, ...]:
        nonlocal at
        part = payload[at : at + width * count]
        at += width * count
        return tuple(_native(code, part))

    seeds = take("q", 8)
    coeffs = tuple(take("f", 4) for _ in range(groups))
    decay = tuple(take("f", 4) for _ in range(groups)) if tables == 2 else ()
    ends = take("B", 1)
    if any(e > 1 for e in ends):
        raise CorruptTrajectoryError("ends must be 0 or 1")
    meta = json.loads(bytes(payload[at:]))
    if not isinstance(meta, dict):
        raise CorruptTrajectoryError("a step's metadata must be an object")
    return Step(number, seeds, coeffs, decay, tuple(map(bool, ends)), meta, layout)


def as_json(value: object, label: str) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"{label} must be JSON-compatible: {error}") from error


def _object(payload: bytes | memoryview, keys: set[str]) -> dict[str, Any]:
    fields = json.loads(bytes(payload))
    if not isinstance(fields, dict) or set(fields) != keys:
        raise CorruptTrajectoryError(f"expected an object with the keys {sorted(keys)}")
    return fields
