"""The records that travel between server and clients: typed, versioned, checked before use.

All little-endian. Every message::

    magic "ZOfm", uint8 format, uint8 kind, uint16 noise contract version,
    uint32 round, uint32 client, uint64 model fingerprint, uint32 size     28 bytes
    payload, ``size`` bytes
    uint32 CRC-32 of everything before it                                   4 bytes

=======  ========  ==========================================================================
kind     way       payload
=======  ========  ==========================================================================
order    down      int64 seed root, uint32 local steps, float32 learning rate, float32[n]
report   up        float32[n]: the projected gradients
merged   down      uint16 blocks, then by block uint32 client, uint32 n, float32[n]
dense    both      the moving values as they lie in memory, for baselines that send weights
=======  ========  ==========================================================================

A report costs 4 bytes a scalar and 32 bytes. Seeds never travel one by one: they derive from the
root, the round, the client and the step. Sizes are checked against the bytes at hand before
anything is allocated.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import ClassVar, Self

from zokernels.displacement import (
    EncodingError,
    NonFiniteError,
    TrailingBytesError,
    TruncatedError,
    UnknownVersionError,
    _native,
    _pack,
)
from zokernels.noise import CONTRACT_VERSION

__all__ = [
    "SHARED",
    "Block",
    "CorruptError",
    "Dense",
    "EncodingError",
    "Merged",
    "Message",
    "NonFiniteError",
    "Order",
    "Report",
    "TrailingBytesError",
    "TruncatedError",
    "UnknownVersionError",
]

_MAGIC = b"ZOfm"
_FORMAT = 1
_HEADER = struct.Struct("<4sBBHIIQI")
_CHECKSUM = struct.Struct("<I")
_ORDER = struct.Struct("<qIf")
_BLOCKS = struct.Struct("<I")
_BLOCK = struct.Struct("<II")

OVERHEAD = _HEADER.size + _CHECKSUM.size

# The client number of what all clients share.
SHARED = 0xFFFFFFFF


class CorruptError(EncodingError):
    """A checksum that does not fit its message, or fields that contradict each other."""


def floats(data: memoryview, what: str) -> tuple[float, ...]:
    """The finite float32 numbers in ``data``.

    Raises:
        TruncatedError: the length is no multiple of 4.
        NonFiniteError: one is NaN or infinite.
    """
    if len(data) % 4:
        raise TruncatedError(f"{what} must be float32 values, 4 bytes each; got {len(data)} bytes")
    values = tuple(_native("f", data))
    for k, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteError(f"{what}[{k}] must be finite; got {value!r}")
    return values


@dataclass(frozen=True, kw_only=True)
class Message:
    """What every message says.

    Attributes:
        round: in [0, 2**32).
        client: sender or receiver, in [0, 2**32 - 1); ``SHARED`` where it is for all.
        fingerprint: of the parameters that move, 64 bits (:attr:`fedzo.space.Space.fingerprint`).
    """

    KIND: ClassVar[int]

    round: int
    client: int
    fingerprint: int

    def _payload(self) -> bytes:
        raise NotImplementedError

    @classmethod
    def _read(cls, header: tuple[int, int, int], data: memoryview) -> Self:
        raise NotImplementedError

    def encode(self) -> bytes:
        """The message as bytes.

        Raises:
            struct.error: a number does not fit its field.
        """
        payload = self._payload()
        head = _HEADER.pack(
            _MAGIC,
            _FORMAT,
            self.KIND,
            CONTRACT_VERSION,
            self.round,
            self.client,
            self.fingerprint,
            len(payload),
        )
        checksum = zlib.crc32(payload, zlib.crc32(head))
        return b"".join((head, payload, _CHECKSUM.pack(checksum)))

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """Read what :meth:`encode` of this class wrote.

        Raises:
            EncodingError: not a message, or one of another kind.
            UnknownVersionError: a format or noise contract version this package does not know.
            TruncatedError, TrailingBytesError: fewer or more bytes than announced.
            CorruptError: wrong checksum, or fields that contradict each other.
            NonFiniteError: a number is NaN or infinite.
        """
        view = memoryview(data).cast("B")
        if len(view) < OVERHEAD:
            raise TruncatedError(f"a message needs at least {OVERHEAD} bytes; got {len(view)}")
        magic, form, kind, contract, round_, client, fingerprint, size = _HEADER.unpack_from(view)
        if magic != _MAGIC:
            raise EncodingError(f"a message must start with {_MAGIC!r}; got {magic!r}")
        if form != _FORMAT:
            raise UnknownVersionError(f"message format must be {_FORMAT}; got {form}")
        if contract != CONTRACT_VERSION:
            raise UnknownVersionError(
                f"noise contract version must be {CONTRACT_VERSION}; got {contract}"
            )
        if len(view) < OVERHEAD + size:
            raise TruncatedError(f"the message needs {OVERHEAD + size} bytes; got {len(view)}")
        if len(view) > OVERHEAD + size:
            raise TrailingBytesError(
                f"the message has {OVERHEAD + size} bytes; got {len(view)}: more after it"
            )
        (checksum,) = _CHECKSUM.unpack_from(view, _HEADER.size + size)
        if zlib.crc32(view[: _HEADER.size + size]) != checksum:
            raise CorruptError("the message's checksum is wrong")
        if kind != cls.KIND:
            raise EncodingError(f"a {cls.__name__} must have kind {cls.KIND}; got {kind}")
        payload = view[_HEADER.size : _HEADER.size + size]
        return cls._read((round_, client, fingerprint), payload)


@dataclass(frozen=True, kw_only=True)
class Order(Message):
    """What a client is to do in a round.

    Attributes:
        root: of every seed of the run, signed 64 bits.
        steps: local steps.
        lr: learning rate, a float32.
        values: further float32 numbers of a method.
    """

    KIND = 1

    root: int
    steps: int
    lr: float
    values: tuple[float, ...] = ()

    def _payload(self) -> bytes:
        return _ORDER.pack(self.root, self.steps, self.lr) + _pack("f", self.values)

    @classmethod
    def _read(cls, header: tuple[int, int, int], data: memoryview) -> Self:
        if len(data) < _ORDER.size:
            raise TruncatedError(f"an order needs {_ORDER.size} bytes; got {len(data)}")
        root, steps, lr = _ORDER.unpack_from(data)
        if not (math.isfinite(lr) and lr >= 0):
            raise NonFiniteError(f"lr must be finite and not negative; got {lr!r}")
        round_, client, fingerprint = header
        return cls(
            round=round_,
            client=client,
            fingerprint=fingerprint,
            root=root,
            steps=steps,
            lr=lr,
            values=floats(data[_ORDER.size :], "values"),
        )

    def received(self) -> Order:
        """The order as the client reads it: its numbers rounded to float32."""
        return Order.decode(self.encode())


@dataclass(frozen=True, kw_only=True)
class Report(Message):
    """What a client found: its scalars, float32."""

    KIND = 2

    scalars: tuple[float, ...]

    def _payload(self) -> bytes:
        return _pack("f", self.scalars)

    @classmethod
    def _read(cls, header: tuple[int, int, int], data: memoryview) -> Self:
        round_, client, fingerprint = header
        return cls(
            round=round_,
            client=client,
            fingerprint=fingerprint,
            scalars=floats(data, "scalars"),
        )


@dataclass(frozen=True)
class Block:
    """Coefficients of one client's directions, or of shared ones (client ``SHARED``)."""

    client: int
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Merged(Message):
    """The server's update of a round: coefficients whose seeds every client can derive."""

    KIND = 3

    client: int = SHARED
    blocks: tuple[Block, ...]

    def _payload(self) -> bytes:
        parts = [_BLOCKS.pack(len(self.blocks))]
        for block in self.blocks:
            parts += (_BLOCK.pack(block.client, len(block.values)), _pack("f", block.values))
        return b"".join(parts)

    @classmethod
    def _read(cls, header: tuple[int, int, int], data: memoryview) -> Self:
        if len(data) < _BLOCKS.size:
            raise TruncatedError(f"an update needs {_BLOCKS.size} bytes; got {len(data)}")
        (count,) = _BLOCKS.unpack_from(data)
        at = _BLOCKS.size
        blocks: list[Block] = []
        for _ in range(count):
            if len(data) < at + _BLOCK.size:
                raise TruncatedError(f"block {len(blocks)} of {count} is missing")
            client, numbers = _BLOCK.unpack_from(data, at)
            at += _BLOCK.size
            if len(data) < at + 4 * numbers:
                raise TruncatedError(f"block {len(blocks)} needs {numbers} numbers")
            blocks.append(Block(client, floats(data[at : at + 4 * numbers], "values")))
            at += 4 * numbers
        if at != len(data):
            raise CorruptError(f"{len(data) - at} bytes after the last block")
        if len({b.client for b in blocks}) != len(blocks):
            raise CorruptError("a client has two blocks")
        round_, client, fingerprint = header
        return cls(round=round_, client=client, fingerprint=fingerprint, blocks=tuple(blocks))


@dataclass(frozen=True, kw_only=True)
class Dense(Message):
    """Every moving value, in the order and dtype of the parameters: what the baselines send."""

    KIND = 4

    data: bytes | memoryview

    def _payload(self) -> bytes:
        return bytes(self.data)

    @classmethod
    def _read(cls, header: tuple[int, int, int], data: memoryview) -> Self:
        round_, client, fingerprint = header
        return cls(round=round_, client=client, fingerprint=fingerprint, data=data)
