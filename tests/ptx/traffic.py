"""What a kernel asks of the memory pipes, counted as the emulator runs it.

A warp's access to global memory is served in sectors of 32 bytes, one to shared memory in
wavefronts: of the 32 banks, four bytes wide, each gives one word a wavefront. Eight bytes a thread
are taken a half warp at a time, sixteen a quarter; threads that read the same word share it. Both
counts stand beside the fewest that the same bytes can do with.

Source: CUDA C++ Best Practices Guide, 10.2 (coalescing, bank conflicts).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from ptx.machine import Machine
from ptx.parser import Instruction

Array = Any

SECTOR = 32  # bytes
BANKS = 32  # four bytes each
# Leave no trace in machine code, or nearly.
_FREE = ("mov", "cvta", "ld.param")


@dataclass
class Access:
    """One static load, store or copy; a copy to shared memory is two of them.

    Attributes:
        used: sectors (global) or wavefronts (shared) of all its executions, summed over warps.
        least: the fewest that these bytes need.
    """

    kernel: str
    line: int
    text: str
    space: str
    warps: int = 0
    used: int = 0
    least: int = 0

    @property
    def factor(self) -> float:
        return self.used / self.least


@dataclass
class Traffic:
    """Of all launches since counting began.

    Attributes:
        instructions: PTX instructions that warps went through, by kernel, without moves, changes of
            address space and loads of arguments.
    """

    accesses: dict[tuple[str, int, str], Access] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)

    def of(self, kernel: str, space: str) -> list[Access]:
        """Those of the kernels whose name has ``kernel`` in it, the worst first.

        Raises:
            KeyError: there is none.
        """
        found = [a for (name, _, s), a in self.accesses.items() if kernel in name and s == space]
        if not found:
            raise KeyError(f"no {space} access of {kernel}; ran: {sorted(self.instructions)}")
        return sorted(found, key=lambda a: (-a.factor, a.line))

    def factor(self, kernel: str, space: str) -> float:
        """Sectors or wavefronts over the fewest possible, of all accesses together."""
        found = self.of(kernel, space)
        return sum(a.used for a in found) / sum(a.least for a in found)

    def per_element(self, kernel: str, elements: int) -> float:
        """Instructions of a thread for each of ``elements``."""
        return 32 * sum(n for name, n in self.instructions.items() if kernel in name) / elements

    def record(self, m: Machine, space: str, address: Array, size: int, lanes: Array) -> None:
        at = m.at
        assert at is not None
        if not at.opcode.startswith(("ld", "st", "cp.async.c", "atom", "red.")) or not len(lanes):
            return  # a copy lands; it was counted when it was asked for
        key = (m.kernel.name, at.line, space)
        found = self.accesses.setdefault(key, Access(m.kernel.name, at.line, at.text, space))
        block, thread = np.divmod(lanes, m.threads)
        warp = block * -(-m.threads // 32) + thread // 32
        count = _sectors if space == "global" else _wavefronts
        used, least = count(warp, thread % 32, address.astype(np.int64), size)
        found.warps += len(np.unique(warp))
        found.used += used
        found.least += least

    def issued(self, m: Machine, instruction: Instruction) -> None:
        if not instruction.opcode.startswith(_FREE):
            lanes = m.active()
            block, thread = np.divmod(lanes, m.threads)
            warps = np.zeros((m.blocks, -(-m.threads // 32)), bool)
            warps[block, thread // 32] = True
            self.instructions[m.kernel.name] += int(warps.sum())


def _pairs(group: Array, value: Array) -> tuple[Array, Array]:
    """The different (group, value), in order."""
    both = np.unique(np.stack([group.ravel(), value.ravel()]), axis=1)
    return both[0], both[1]


def _sectors(warp: Array, lane: Array, address: Array, size: int) -> tuple[int, int]:
    owner, place = _pairs(warp, address)
    ends = np.concatenate([place // SECTOR, (place + size - 1) // SECTOR])
    used = len(_pairs(np.tile(owner, 2), ends)[0])
    asked = np.unique(owner, return_counts=True)[1] * size
    return used, int((-(-asked // SECTOR)).sum())


def _wavefronts(warp: Array, lane: Array, address: Array, size: int) -> tuple[int, int]:
    together = 128 // max(size, 4)  # lanes
    words = np.arange(max(size // 4, 1))
    group = warp * 32 + lane // together
    owner, word = _pairs(
        np.broadcast_to(group[:, None], (len(group), len(words))), address[:, None] // 4 + words
    )
    slot, counts = np.unique(owner * BANKS + word % BANKS, return_counts=True)
    most = np.zeros(int(slot.max()) // BANKS + 1, np.int64)
    np.maximum.at(most, slot // BANKS, counts)
    asked = np.unique(owner, return_counts=True)[1]
    return int(most.sum()), int((-(-asked // BANKS)).sum())


@contextlib.contextmanager
def measured() -> Iterator[Traffic]:
    """Count what runs meanwhile."""
    traffic = Traffic()
    load_global, store_global = Machine.load_global, Machine.store_global
    load_shared, store_shared, copy = Machine.load_shared, Machine.store_shared, Machine.copy

    def loads_global(m: Machine, address: Array, unit: int, count: int, lanes: Array) -> Array:
        traffic.record(m, "global", address, unit * count, lanes)
        return load_global(m, address, unit, count, lanes)

    def stores_global(m: Machine, address: Array, x: Array, unit: int, lanes: Array) -> None:
        traffic.record(m, "global", address, unit * x.shape[1], lanes)
        store_global(m, address, x, unit, lanes)

    def loads_shared(m: Machine, address: Array, unit: int, count: int, lanes: Array) -> Array:
        traffic.record(m, "shared", address, unit * count, lanes)
        return load_shared(m, address, unit, count, lanes)

    def stores_shared(m: Machine, address: Array, x: Array, unit: int, lanes: Array) -> None:
        traffic.record(m, "shared", address, unit * x.shape[1], lanes)
        store_shared(m, address, x, unit, lanes)

    def copies(m: Machine, to: Array, start: Array, size: int, valid: Array, lanes: Array) -> None:
        some = valid > 0
        traffic.record(m, "global", start[some], size, lanes[some])
        traffic.record(m, "shared", to, size, lanes)
        copy(m, to, start, size, valid, lanes)

    def reached(m: Machine, instruction: Instruction | None) -> None:
        vars(m)["at"] = instruction
        if instruction is not None:
            traffic.issued(m, instruction)

    with mock.patch.multiple(
        Machine,
        load_global=loads_global,
        store_global=stores_global,
        load_shared=loads_shared,
        store_shared=stores_shared,
        copy=copies,
        at=property(lambda m: vars(m)["at"], reached),
        create=True,
    ):
        yield traffic
