"""Bytes that kernels may reach, and who touched them since the last barrier."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.parser import PTXError

Array = Any
Ranges = list[tuple[int, int]]  # [start, end) addresses


class Clock:
    """Barriers that each block and each warp of a grid has passed."""

    def __init__(self, blocks: int, threads: int) -> None:
        self.threads = threads
        self.warps = -(-threads // 32)  # of a block
        self.block = np.zeros(blocks, np.int32)
        self.warp = np.zeros(blocks * self.warps, np.int32)

    def place(self, thread: Array) -> tuple[Array, Array]:
        """Block and warp of threads numbered through the grid."""
        block = thread // self.threads
        return block, block * self.warps + thread % self.threads // 32


class _Touch:
    """The last thread to touch each cell, and when."""

    def __init__(self, cells: int) -> None:
        self.thread = np.full(cells, -1, np.int32)
        self.block, self.warp = np.zeros((2, cells), np.int32)

    def set(self, cells: Array, thread: Array, block: Array, warp: Array) -> None:
        self.thread[cells], self.block[cells], self.warp[cells] = thread, block, warp

    def get(self, cells: Array) -> tuple[Array, Array, Array]:
        return self.thread[cells], self.block[cells], self.warp[cells]


class Watch:
    """Finds accesses of two threads to one cell, one of them a write, with no barrier between.

    A barrier of the block orders its threads, ``bar.warp.sync`` those of a warp, nothing orders
    blocks. A write of what is there already is no conflict with another write.
    """

    def __init__(self, cells: int, clock: Clock) -> None:
        self.clock = clock
        self.writer = _Touch(cells)
        # The last reader (and whether others of its warp have read since), and one of another warp.
        self.reader, self.far = _Touch(cells), _Touch(cells)
        self.many = np.zeros(cells, bool)

    def _loose(self, touch: _Touch, cells: Array, thread: Array, own: bool = False) -> Array:
        """Where nothing orders the last touch before ``thread``."""
        other, block, warp = touch.get(cells)
        (at, lane), (my_at, my_lane) = self.clock.place(other), self.clock.place(thread)
        ordered = (at == my_at) & (block < self.clock.block[my_at])
        ordered |= (lane == my_lane) & (warp < self.clock.warp[my_lane])
        return (other >= 0) & ((other != thread) | own) & ~ordered

    def read(self, cells: Array, thread: Array) -> Array:
        """Record; where a write of another thread is loose."""
        loose = self._loose(self.writer, cells, thread)
        block, warp = self.clock.place(thread)
        now = self.clock.block[block], self.clock.warp[warp]
        other, old_block, old_warp = self.reader.get(cells)
        same = (other >= 0) & (self.clock.place(other)[1] == warp)
        away = (other >= 0) & ~same
        self.far.set(cells[away], other[away], old_block[away], old_warp[away])
        still = same & (old_block == now[0]) & (old_warp == now[1])
        self.many[cells] = still & (self.many[cells] | (other != thread))
        self.reader.set(cells, thread, *now)
        last = self.reader.thread[cells]  # one of those that read the cell just now
        together = last != thread
        near = together & (self.clock.place(last)[1] == warp)
        self.many[cells[near]] = True
        away = together & ~near
        self.far.set(cells[away], thread[away], now[0][away], now[1][away])
        return loose

    def write(self, cells: Array, thread: Array, changes: Array) -> Array:
        """Record; where another thread's read, or write of something else, is loose."""
        loose = self._loose(self.writer, cells, thread) & changes
        loose |= self._loose(self.reader, cells, thread)
        loose |= self._loose(self.far, cells, thread)
        loose |= self.many[cells] & self._loose(self.reader, cells, thread, own=True)
        block, warp = self.clock.place(thread)
        self.writer.set(cells, thread, self.clock.block[block], self.clock.warp[warp])
        return loose


class GlobalMemory:
    """Memory of this process at its own addresses, but only inside the given ranges.

    Args:
        ranges: what a kernel may touch.
        more: asked for further ranges when an address is in none.
    """

    def __init__(self, ranges: Ranges, more: Callable[[], Ranges] | None = None) -> None:
        self._more = more
        self._set(ranges)

    def _set(self, ranges: Ranges) -> None:
        merged: list[list[int]] = []
        for start, end in sorted(r for r in ranges if r[1] > r[0]):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.starts = [s for s, _ in merged]
        self.ends = [e for _, e in merged]
        self._starts = np.array(self.starts, np.uint64)
        self._ends = np.array(self.ends, np.uint64)
        self.low = self.starts[0] & ~15 if merged else 0
        self._watches: dict[int, Watch] = {}
        self.views: dict[int, Array] = {}
        if merged:
            # Spans what lies between the ranges too; only what was checked is ever touched.
            span = -(-(self.ends[-1] - self.low) // 16) * 16
            raw = np.frombuffer((ctypes.c_ubyte * span).from_address(self.low), np.uint8)
            self.views = {n: raw.view(f"u{n}") for n in (1, 2, 4, 8)}

    def _find(self, address: Array, size: int) -> Array | None:
        """The range of each access, or None when one has none."""
        if not len(self._starts):
            return None
        found = np.searchsorted(self._starts, address, "right") - 1
        inside = (found >= 0) & (address + np.uint64(size) <= self._ends[found])
        return found if inside.all() else None

    def check(self, address: Array, size: int) -> Array:
        """Raise when an access leaves the ranges; the number of its range."""
        found = self._find(address, size)
        if found is None and self._more:
            watched = {self.starts[i]: w for i, w in self._watches.items()}
            self._set([*zip(self.starts, self.ends, strict=True), *self._more()])
            self._watches = {
                i: watched[s] for i, s in enumerate(self.starts) if s in watched
            }  # ranges of tensors do not grow
            found = self._find(address, size)
        if found is None:
            bad = [a for a in address.tolist() if self._find(np.uint64(a), size) is None]
            near = bisect.bisect(self.starts, bad[0]) - 1
            where = "below all tensors"
            if near >= 0:
                where = f"{bad[0] - self.starts[near]} bytes from the start of one of "
                where += f"{self.ends[near] - self.starts[near]} bytes"
            raise PTXError(f"{size} bytes at {bad[0]:#x}, {where}, are out of bounds")
        return found

    def watches(self, found: Array, granule: int, clock: Clock) -> list[tuple[Watch, Array, int]]:
        """The watch of each range that is touched, which accesses are its own, its start."""
        result = []
        for i in np.unique(found).tolist():
            if i not in self._watches:
                self._watches[i] = Watch((self.ends[i] - self.starts[i]) // granule + 1, clock)
            result.append((self._watches[i], found == i, self.starts[i]))
        return result
