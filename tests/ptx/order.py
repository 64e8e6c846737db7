"""What each thread of a block has seen of the others, and who touched shared memory when.

For kernels with barriers in memory or with units that work beside the threads (the async proxy): a
count of barriers, as in :mod:`ptx.memory`, does not order those. Vector clocks (Mattern 1989) do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
BARRIERS = 32  # in the shared memory of a block


@dataclass
class Seen:
    """Times of all sources of a block, up to which what they did is visible.

    ``generic``: to ordinary accesses. ``fenced``: to the async proxy, since a proxy fence came
    between.
    """

    generic: Array
    fenced: Array

    def join(self, generic: Array, fenced: Array) -> None:
        np.maximum(self.generic, generic, out=self.generic)
        np.maximum(self.fenced, fenced, out=self.fenced)


class Order:
    """Vector clocks of the threads of some blocks.

    The sources of a block are its threads, and behind them its barriers in memory: copies that such
    a barrier tracks are its own doing, at the time of its phase. A thread's time goes on whenever
    it tells others how far it is.
    """

    def __init__(self, blocks: int, threads: int) -> None:
        self.threads, self.sources = threads, threads + BARRIERS
        self.time = np.ones((blocks, threads), np.int32)
        self.barriers = np.zeros(blocks, np.int32)  # of whole blocks
        self.generic = np.zeros((blocks, threads, self.sources), np.int32)
        self.fenced = np.zeros((blocks, threads, self.sources), np.int32)
        own = np.arange(threads)
        self.generic[:, own, own] = 1

    def nothing(self) -> Seen:
        return Seen(*np.zeros((2, self.sources), np.int32))

    def place(self, lanes: Array) -> tuple[Array, Array]:
        """Block and thread of lanes."""
        return lanes // self.threads, lanes % self.threads

    def advance(self, lanes: Array) -> None:
        """What these threads do from now on is later than what they did."""
        block, thread = self.place(lanes)
        self.time[block, thread] += 1
        self.generic[block, thread, thread] = self.time[block, thread]

    def meet(self, groups: Array) -> None:
        """Threads [groups, n], each group at a barrier of its own, see all that the others saw."""
        block, thread = self.place(groups)
        for clock in (self.generic, self.fenced):
            together = clock[block, thread].max(1, keepdims=True)
            clock[block, thread] = together
        self.advance(groups.ravel())

    def meet_blocks(self, blocks: Array) -> None:
        self.barriers[blocks] += 1
        self.meet(blocks[:, None] * self.threads + np.arange(self.threads))

    def release(self, lane: int, into: Seen) -> None:
        block, thread = divmod(lane, self.threads)
        into.join(self.generic[block, thread], self.fenced[block, thread])
        self.advance(np.array([lane]))

    def acquire(self, lanes: Array, seen: Seen) -> None:
        at = self.place(lanes)
        self.generic[at] = np.maximum(self.generic[at], seen.generic)
        self.fenced[at] = np.maximum(self.fenced[at], seen.fenced)

    def fence(self, lanes: Array) -> None:
        """A proxy fence: what is visible to these threads is, through them, to the async proxy."""
        at = self.place(lanes)
        self.fenced[at] = np.maximum(self.fenced[at], self.generic[at])
        self.advance(lanes)

    def of_warp(self, lanes: Array) -> Seen:
        """What all of these threads of one block have seen."""
        at = self.place(lanes)
        return Seen(self.generic[at].min(0), self.fenced[at].min(0))


class SharedWatch:
    """Finds accesses to a cell of shared memory that nothing orders.

    Takes numbers of lanes, as :class:`ptx.memory.Watch` those of threads in the grid.
    """

    def __init__(self, cells: int, order: Order, first_thread: int, proxies: bool) -> None:
        self.order, self._first, self._proxies = order, first_thread, proxies
        self.writer = np.full(cells, -1, np.int32)  # a source
        self.stamp = np.zeros(cells, np.int32)
        # Times of each thread's last read, and of its last product that read.
        self.reads = np.zeros((cells, order.threads), np.int32)
        self.products = np.zeros((cells, order.threads), np.int32)
        self.busy = np.zeros(cells, np.int32)  # products that read the cell now
        # Barriers of the block before the last read: a further one orders all of them.
        self.read_at = np.full(cells, -1, np.int32)

    def read(self, cells: Array, thread: Array) -> Array:
        block, own = self.order.place(thread - self._first)
        self.reads[cells, own] = self.order.time[block, own]
        self.read_at[cells] = self.order.barriers[block]
        writer = self.writer[cells]
        return (writer >= 0) & (self.order.generic[block, own, writer] < self.stamp[cells])

    def write(self, cells: Array, thread: Array, changes: Array) -> Array:
        block, own = self.order.place(thread - self._first)
        writer = self.writer[cells]
        loose = (writer >= 0) & (self.order.generic[block, own, writer] < self.stamp[cells])
        loose = (loose & changes) | (self.busy[cells] > 0)
        late = np.flatnonzero(self.read_at[cells] == self.order.barriers[block])
        if len(late):
            seen = self.order.generic[block[late], own[late], : self.order.threads]
            for readers in (self.reads, self.products):
                loose[late] |= (readers[cells[late]] > seen).any(1)
        self.writer[cells], self.stamp[cells] = own, self.order.time[block, own]
        return loose

    # --- the async proxy --------------------------------------------------------------------------

    def taken(self, cells: Array, seen: Seen) -> str:
        """What is wrong with a read by the async proxy on behalf of threads that saw this."""
        writer, stamp = self.writer[cells], self.stamp[cells]
        written = writer >= 0
        if (written & (seen.generic[writer] < stamp)).any():
            return "a race: nothing orders this and a write of another thread"
        ordinary = written & (writer < self.order.threads)
        if self._proxies and (ordinary & (seen.fenced[writer] < stamp)).any():
            return "no fence.proxy.async since an ordinary write of what is read"
        return ""

    def replaced(self, cells: Array, seen: Seen) -> str:
        """What is wrong with a write by the async proxy on behalf of a thread that saw this."""
        if self.busy[cells].any():
            return "what a product reads is replaced before it was waited for"
        n = self.order.threads
        writer, stamp = self.writer[cells], self.stamp[cells]
        loose = (writer >= 0) & (seen.generic[writer] < stamp)
        loose |= (self.reads[cells] > seen.generic[:n]).any(1)
        loose |= (self.products[cells] > seen.generic[:n]).any(1)
        if loose.any():
            return "a race: nothing orders this and an access of another thread"
        close = (writer >= 0) & (writer < n) & (seen.fenced[writer] < stamp)
        close |= (self.reads[cells] > seen.fenced[:n]).any(1)
        if self._proxies and close.any():
            return "no fence.proxy.async since an ordinary access to what is replaced"
        return ""

    def landed(self, cells: Array, source: int, stamp: int) -> None:
        self.writer[cells], self.stamp[cells] = source, stamp

    def done(self, cells: Array, lanes: Array) -> None:
        """A product of a warp no longer reads these."""
        self.busy[cells] -= 1
        block, thread = self.order.place(lanes)
        self.products[np.ix_(cells, thread)] = self.order.time[block, thread]
        self.read_at[cells] = self.order.barriers[block[0]]
