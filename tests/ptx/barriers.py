"""Barriers in shared memory (``mbarrier``), the fences around them, and waiting for them.

A phase ends when its arrivals and the bytes it tracks are complete. What an asynchronous copy
brings lands as late as can be: when no thread can go on without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.instructions import Parts, meaning
from ptx.machine import Machine, Read, Step
from ptx.order import BARRIERS, Seen
from ptx.parser import PTXError

Array = Any
_MOST = (1 << 20) - 1


@dataclass
class Barrier:
    """One object; ``number`` tells it from others of its block."""

    number: int
    made_by: int  # a lane
    made_at: int  # that lane's time
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0
    fenced_at: int | None = None  # when its making was fenced, in the maker's time
    arrived: Seen | None = None
    ended: Seen | None = None  # what arrivals up to the last phase had seen
    flying: int = 0  # copies of this phase


@dataclass
class Barriers:
    """Those of the blocks of a machine."""

    at: dict[int, Barrier] = field(default_factory=dict)  # byte of all blocks' shared memory
    count: dict[int, int] = field(default_factory=dict)  # made so far, by block

    def make(self, m: Machine, place: int, lane: int, count: int) -> None:
        if place in self.at:
            raise m.error("a barrier is made where there is one")
        if not 1 <= count <= _MOST:
            raise m.error(f"a barrier of {count} arrivals")
        block, thread = divmod(lane, m.threads)
        number = self.count.get(block, 0)
        if number == BARRIERS:
            raise m.error(f"more than {BARRIERS} barriers")
        self.count[block] = number + 1
        m.opaque[place : place + 8] = True
        order = m.order
        self.at[place] = Barrier(
            *(number, lane, int(order.time[block, thread]), count, count),
            arrived=order.nothing(),
            ended=order.nothing(),
        )

    def find(self, m: Machine, place: int, lanes: Array) -> Barrier:
        """The barrier there, for threads that know it has been made."""
        found = self.at.get(place)
        if found is None:
            raise m.error("no barrier has been made there", lanes)
        block, thread = m.order.place(lanes)
        early = m.order.generic[block, thread, found.made_by % m.threads] < found.made_at
        if early.any():
            raise m.error("a race: nothing orders this after the barrier was made", lanes[early])
        return found

    def settle(self, m: Machine, place: int) -> None:
        """End the phase if it is complete."""
        b = self.at[place]
        if b.pending or b.bytes:
            return
        if b.flying:
            raise m.error("a phase ends before all copies that it tracks have landed")
        assert b.arrived and b.ended
        b.arrived.generic[m.threads + b.number] = b.phase + 1
        b.arrived.fenced[m.threads + b.number] = b.phase + 1
        b.ended.join(b.arrived.generic, b.arrived.fenced)
        b.phase += 1
        b.pending = b.expected

    def arrive(self, m: Machine, place: int, lane: int) -> None:
        b = self.at[place]
        if not b.pending:
            raise m.error("more arrivals at a barrier than it expects")
        b.pending -= 1
        assert b.arrived
        m.order.release(lane, b.arrived)

    def track(self, m: Machine, place: int, count: int) -> None:
        b = self.at[place]
        b.bytes += count
        if abs(b.bytes) > _MOST:
            raise m.error(f"a barrier cannot track {b.bytes} bytes")


def _place(m: Machine, address: Read) -> tuple[Array, Array]:
    """Lanes and where their barriers are."""
    lanes = m.active()
    at = m.spread(address(m))
    return lanes, m.shared_at(at, 8, lanes)


@meaning("mbarrier")
def _mbarrier(p: Parts) -> Step:
    what = p.need("init", "arrive", "try_wait", "test_wait")
    p.need("shared::cta")
    p.need("b64")
    return {"init": _init, "arrive": _arrive}.get(what, _wait)(p)


def _init(p: Parts) -> Step:
    address, count = p.address(p.operands[0]), p.source(p.operands[1], "u32")

    def step(m: Machine) -> None:
        lanes, at = _place(m, address)
        for lane, place, n in zip(lanes, at, m.spread(count(m)), strict=True):
            m.barriers.make(m, int(place), int(lane), int(n))

    return step


def _arrive(p: Parts) -> Step:
    expects = p.take("expect_tx")
    if p.operands[0] != "_":
        raise PTXError("the state of a barrier is not known")
    address = p.address(p.operands[1])
    bytes_ = p.source(p.operands[2], "u32") if expects else (lambda m: np.uint32(0))

    def step(m: Machine) -> None:
        lanes, at = _place(m, address)
        for lane, place, n in zip(lanes, at, m.spread(bytes_(m)), strict=True):
            m.barriers.find(m, int(place), np.array([lane]))
            m.barriers.track(m, int(place), int(n))
            m.barriers.arrive(m, int(place), int(lane))
            m.barriers.settle(m, int(place))

    return step


def _wait(p: Parts) -> Step:
    """The first try fails unless the phase has ended, later ones wait for it."""
    p.need("parity")
    write = p.target(p.operands[0], "pred")
    address, parity = p.address(p.operands[1]), p.source(p.operands[2], "u32")
    here = p.block

    def step(m: Machine) -> Array:
        lanes, at = _place(m, address)
        asked = m.spread(parity(m))
        if (asked > 1).any():
            raise m.error("a parity is 0 or 1")
        done = np.zeros(m.count, bool)
        for place in np.unique(at).tolist():
            for odd in (0, 1):
                own = lanes[(at == place) & (asked == odd)]
                if len(own) == 0:
                    continue
                b = m.barriers.find(m, place, own)
                if b.phase % 2 != odd:
                    assert b.ended
                    m.order.acquire(own, b.ended)
                    done[own] = True
                elif not m.tried[own].all():
                    m.tried[own] = True
                else:
                    m.park(here, own, lambda b=b, odd=odd: b.phase % 2 != odd)
        write(m, done)
        m.tried[np.flatnonzero(done)] = False
        return m.parked_now()

    return step


@meaning("fence")
def _fence(p: Parts) -> Step:
    if p.take("mbarrier_init"):
        p.need("release")
        p.need("cluster")
        proxy = False
    else:
        p.need("proxy")
        p.need("async")
        p.take("shared::cta")
        proxy = True

    def step(m: Machine) -> None:
        lanes = m.active()
        for b in m.barriers.at.values():
            if b.fenced_at is None and (lanes == b.made_by).any():
                block, thread = divmod(b.made_by, m.threads)
                b.fenced_at = int(m.order.time[block, thread])
        if proxy:
            m.order.fence(lanes)
        else:
            m.order.advance(lanes)

    return step
