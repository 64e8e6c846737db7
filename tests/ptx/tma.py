"""Boxes of a tensor copied to shared memory by the tensor memory accelerator, and tensor maps.

A tensor map is an opaque object of the driver. Here it is what the driver was asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.barriers import Barrier
from ptx.instructions import Parts, meaning
from ptx.machine import PARAMETER_WINDOW, Machine, Step
from ptx.order import Seen
from ptx.parser import PTXError, split

Array = Any
MAP_BYTES = 128
_MARK = b"a map\0\0\0"
_FORMAT = "<8sQ5I4Q5H5B6B"
# Bytes of the types of the driver's enumeration, those of whole bytes.
_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)
_SPANS = (0, 32, 64, 128)  # bytes within which 16-byte chunks are swizzled


@dataclass(frozen=True)
class TensorMap:
    """The arguments of ``cuTensorMapEncodeTiled``; the first dimension is the innermost."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all dimensions but the first
    box: tuple[int, ...]
    steps: tuple[int, ...]
    kind: int
    interleave: int
    swizzle: int
    promotion: int
    fill: int

    @property
    def unit(self) -> int:
        return _BYTES[self.kind]

    def wrong(self) -> str:
        """What the driver refuses (cuda.h, ``cuTensorMapEncodeTiled``), or nothing."""
        rank = len(self.sizes)
        inner = self.box[0] * self.unit
        rules = {
            "a rank of 1 to 5": 1 <= rank <= 5,
            "a tensor at a multiple of 16 bytes": self.address % 16 == 0,
            "sizes of 1 to 2**32": all(1 <= n <= 1 << 32 for n in self.sizes),
            "strides that are multiples of 16 below 2**40": all(
                n % 16 == 0 and n < 1 << 40 for n in self.strides
            ),
            "rows that do not overlap": all(
                stride >= size * self.unit if i == 0 else stride >= size
                for i, (stride, size) in enumerate(zip(self.strides, self.sizes, strict=False))
            ),
            "boxes of 1 to 256": all(1 <= n <= 256 for n in self.box),
            "a box's rows of a multiple of 16 bytes": inner % 16 == 0,
            "steps of 1 to 8": all(1 <= n <= 8 for n in self.steps),
            "no interleaving": self.interleave == 0,
            "a swizzle of 16-byte chunks": self.swizzle < len(_SPANS),
            "a box's rows within the swizzle": not self.swizzle
            or inner <= _SPANS[min(self.swizzle, 3)],
            "a fill of zeros": self.fill == 0,
        }
        return ", ".join(rule for rule, kept in rules.items() if not kept)

    def packed(self) -> bytes:
        def five(values: tuple[int, ...], n: int = 5) -> tuple[int, ...]:
            return (*values, *[0] * (n - len(values)))

        data = struct.pack(
            _FORMAT,
            *(_MARK, self.address, *five(self.sizes), *five(self.strides, 4)),
            *(*five(self.box), *five(self.steps), len(self.sizes), self.kind),
            *(self.interleave, self.swizzle, self.promotion, self.fill),
        )
        return data.ljust(MAP_BYTES, b"\0")


def unpacked(data: bytes) -> TensorMap:
    mark, address, *rest = struct.unpack(_FORMAT, data[: struct.calcsize(_FORMAT)])
    if mark != _MARK:
        raise PTXError("no tensor map, or one that was written over")
    rank, kind, *modes = rest[19:]
    return TensorMap(
        address,
        tuple(rest[:rank]),
        tuple(rest[5 : 5 + rank - 1]),
        tuple(rest[9 : 9 + rank]),
        tuple(rest[14 : 14 + rank]),
        *(kind, *modes),
    )


def swizzled(address: Array, mode: int) -> Array:
    """16-byte chunks within 32, 64 or 128 bytes are permuted by the 128-byte line they are in."""
    chunks = (address.dtype.type(0), *map(address.dtype.type, (1, 3, 7)))[mode]
    seven, four = address.dtype.type(7), address.dtype.type(4)
    return address ^ ((address >> seven & chunks) << four)


@dataclass
class Box:
    """A copy in flight."""

    map: TensorMap
    corner: tuple[int, ...]
    to: Array  # bytes of all blocks' shared memory, of the box in order
    place: int  # of its barrier
    barrier: Barrier
    lane: int


@dataclass
class Boxes:
    flying: list[Box] = field(default_factory=list)

    def issue(
        self, m: Machine, lane: int, map_: TensorMap, corner: tuple[int, ...], to: int, place: int
    ) -> None:
        block, thread = divmod(lane, m.threads)
        barrier = m.barriers.find(m, place, np.array([lane]))
        seen = Seen(m.order.generic[block, thread], m.order.fenced[block, thread])
        made_by = barrier.made_by % m.threads
        if barrier.fenced_at is None or seen.generic[made_by] < barrier.fenced_at:
            raise m.error("a barrier that was not fenced since it was made")
        size = int(np.prod(map_.box)) * map_.unit
        if to % 128 or to < m.shared_start or to + size > m.shared_bytes:
            raise m.error(f"a box of {size} bytes to {to}, of {m.shared_bytes}; multiples of 128")
        cells = swizzled(to + np.arange(size), map_.swizzle) + block * m.shared_bytes
        if m.flying[cells].any():
            raise m.error("an asynchronous copy to this place was not waited for")
        if m.opaque[cells].any():
            raise m.error("a copy to a barrier")
        if m.races:
            wrong = m.watch.replaced(np.unique(cells // m.shared_granule), seen)  # type: ignore[union-attr]
            if wrong:
                raise m.error(wrong, np.array([lane]))
        m.shared[cells] = 0xFF
        m.flying[cells] = True
        barrier.flying += 1
        self.flying.append(Box(map_, corner, cells, place, barrier, lane))

    def land_one(self, m: Machine) -> bool:
        """The youngest copy lands, if there is one: the manual orders none."""
        if not self.flying:
            return False
        box = self.flying.pop()
        m.shared[box.to] = self._bytes(m, box)
        m.flying[box.to] = False
        stamp = box.barrier.phase + 1
        m.watch.landed(  # type: ignore[union-attr]
            np.unique(box.to // m.shared_granule), m.threads + box.barrier.number, stamp
        )
        box.barrier.flying -= 1
        m.barriers.track(m, box.place, -len(box.to))
        m.barriers.settle(m, box.place)
        return True

    def _bytes(self, m: Machine, box: Box) -> Array:
        """The box in order; zeros outside of the tensor."""
        t = box.map
        counts = [-(-n // step) for n, step in zip(t.box, (1, *t.steps[1:]), strict=True)]
        if counts != list(t.box):
            raise m.error("steps other than 1 are not known")
        axes = np.meshgrid(*[np.arange(n) for n in reversed(counts)], indexing="ij")
        at = np.zeros(axes[0].shape, np.int64)
        inside = np.ones(axes[0].shape, bool)
        strides = (t.unit, *t.strides)
        for i, axis in enumerate(reversed(axes)):
            coordinate = axis + box.corner[i]
            inside &= (coordinate >= 0) & (coordinate < t.sizes[i])
            at += coordinate * strides[i]
        data = np.zeros((at.size, t.unit), np.uint8)
        used = inside.ravel()
        if used.any():
            address = (at.ravel()[used] + t.address).astype(np.uint64)
            lanes = np.full(len(address), box.lane)
            data[used] = m.load_global(address, t.unit, 1, lanes).view(np.uint8).reshape(-1, t.unit)
        return data.ravel()

    def finish(self, m: Machine) -> None:
        if self.flying:
            raise m.error("threads ended with asynchronous copies in flight")


@meaning("cp.async.bulk")
def _bulk(p: Parts) -> Step:
    for name in ("async", "bulk", "tensor", "shared::cluster", "global", "tile"):
        p.need(name)
    p.need("mbarrier::complete_tx::bytes")
    rank = int(p.need("1d", "2d", "3d", "4d", "5d")[0])
    to, barrier = p.address(p.operands[0]), p.address(p.operands[2])
    map_, corner = split(p.operands[1].strip()[1:-1])
    where = p.address(f"[{map_}]")
    reads = [p.source(t, "s32") for t in split(corner[1:-1])]
    if len(reads) != rank:
        raise PTXError(f"{len(reads)} coordinates for {rank} dimensions")

    def step(m: Machine) -> None:
        lanes = m.active()
        place = m.shared_at(m.spread(barrier(m)), 8, lanes)
        corners = np.stack([m.spread(r(m)) for r in reads], 1)
        starts, maps = m.spread(to(m)), m.spread(where(m))
        for i, lane in enumerate(lanes.tolist()):
            found = _map(m, int(maps[i]))
            if len(found.sizes) != rank:
                raise m.error(f"a map of {len(found.sizes)} dimensions")
            m.boxes.issue(m, lane, found, tuple(corners[i].tolist()), int(starts[i]), int(place[i]))

    return step


def _map(m: Machine, address: int) -> TensorMap:
    if address % 64:
        raise m.error("a tensor map is not aligned to 64 bytes")
    start = address - PARAMETER_WINDOW
    if not 0 <= start <= len(m.parameters) - MAP_BYTES:
        raise m.error("a tensor map is a parameter of the kernel")
    try:
        return unpacked(m.parameters[start : start + MAP_BYTES].tobytes())
    except PTXError as error:
        raise m.error(str(error)) from None
