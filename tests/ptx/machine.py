"""Runs a grid: every thread is a lane of NumPy vectors, the one that is furthest behind goes first.

Threads at the same basic block go together, and where their ways meet the first wait for the last
(:mod:`ptx.flow`), until all have ended or wait at a barrier. That is one order of those the manual
allows; what another order would change is found by :class:`ptx.memory.Watch`, or for kernels with
asynchronous units and barriers in memory by :class:`ptx.order.SharedWatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import flow
from ptx.memory import Clock, GlobalMemory, Watch
from ptx.order import Order, SharedWatch
from ptx.parser import SIZES, Instruction, Kernel, PTXError

if TYPE_CHECKING:
    from ptx.barriers import Barriers
    from ptx.tma import Boxes
    from ptx.wgmma import Products

Array = Any
# None: go on; False: these threads leave the block; lanes that leave it.
Step = Callable[["Machine"], Any]
Read = Callable[["Machine"], Array]

SHARED_WINDOW = 1 << 62  # generic addresses of shared memory begin here
PARAMETER_WINDOW = 1 << 61
_LANES = 1 << 13  # about as many threads run at a time
_LANES_ORDERED = 1 << 10  # the same where everything that each has seen is kept


@dataclass
class Copy:
    """An asynchronous copy of some threads, in flight."""

    lanes: Array
    to: Array  # bytes of shared memory, from the first lane's block on
    start: Array  # global addresses
    size: int
    valid: Array  # bytes that are copied; zeros follow
    group: Array


@dataclass
class Parked:
    """Threads that wait at the beginning of a block until something comes about."""

    block: int
    lanes: Array
    ready: Callable[[], bool]


class Machine:
    """The threads of some blocks of a grid.

    Attributes:
        order: None for a kernel without asynchronous units and barriers in memory.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        first: int,
        blocks: int,
        parameters: bytes,
        shared: tuple[int, int],
        memory: GlobalMemory,
        clock: Clock,
        races: bool,
        proxies: bool,
    ) -> None:
        self.kernel, self.grid, self.threads, self.blocks = kernel, grid, threads, blocks
        self.memory, self.clock, self.races = memory, clock, races
        self.parameters = np.frombuffer(parameters, np.uint8)
        n = self.count = blocks * threads
        self.lane = np.arange(n, dtype=np.int64)
        self.number = (self.lane + first * threads).astype(np.int32)  # in the whole grid
        self.first = first
        self.registers: list[Array] = [None] * len(_registers(kernel))
        self.mask: Array | None = None  # None: all
        self._active: Array | None = None
        self.shared_start, end = shared
        bytes_ = -(-end // 16) * 16
        self.shared_bytes = bytes_  # from address 0 on
        # Not a number, whatever the type.
        self.shared = np.full(blocks * bytes_, 0xFF, np.uint8)
        self.flying = np.zeros(blocks * bytes_, bool)  # targets of asynchronous copies
        self.granule = kernel.code["granule"]
        self.shared_granule = kernel.code["shared_granule"]
        cells = blocks * bytes_ // self.shared_granule + 1
        self.order: Order | None = None
        self.watch: Watch | SharedWatch
        self.parked: list[Parked] = []
        self.half_warps: dict[int, tuple[Array, Array]] = {}  # block -> lanes that wait, for whom
        if kernel.code["units"]:
            self.order = Order(blocks, threads)
            self.watch = SharedWatch(cells, self.order, first * threads, proxies)
            self.barriers: Barriers
            self.boxes: Boxes
            self.products: Products
            kernel.code["units"](self)
            self.opaque = np.zeros(blocks * bytes_, bool)  # barriers
            self.tried = np.zeros(n, bool)
            self._parked_now = np.zeros(n, bool)
        else:
            self.watch = Watch(cells, clock)
        self.copies: list[Copy] = []
        self.group = np.zeros(n, np.int64)  # the open one of each thread
        self.pending: dict[int, Array] = {0: np.ones(n, bool)}
        self.waiting: dict[int, Array] = {}
        self.at: Instruction | None = None

    # --- lanes ------------------------------------------------------------------------------------

    def narrow(self, mask: Array | None) -> None:
        self.mask, self._active = mask, None

    def active(self) -> Array:
        """Numbers of the lanes that take part."""
        if self._active is None:
            self._active = self.lane if self.mask is None else np.flatnonzero(self.mask)
        return self._active

    def spread(self, x: Array) -> Array:
        """A value of each active lane."""
        x = np.asarray(x)
        return np.broadcast_to(x, self.count)[self.active()] if x.ndim == 0 else x[self.active()]

    def get(self, slot: int, dtype: Any) -> Array:
        x = self.registers[slot]
        if x is None:
            # An undefined value: one that shows.
            x = (
                np.ones(self.count, bool)
                if dtype is bool
                else dtype(0x7FF7FF7FF7FF7FF7 & _top(dtype))
            )
            self.registers[slot] = x
        return x

    def set(self, slot: int, x: Array, dtype: Any) -> None:
        if self.mask is not None:
            x = np.where(self.mask, x, self.get(slot, dtype))
        self.registers[slot] = x

    def set_active(self, slot: int, x: Array, dtype: Any) -> None:
        """From values of the active lanes."""
        if self.mask is None:
            self.registers[slot] = x
        else:
            whole = np.array(np.broadcast_to(self.get(slot, dtype), self.count))
            whole[self.active()] = x
            self.registers[slot] = whole

    def whole_warps(self) -> Array:
        """Active lanes, by warps; all of a warp take part."""
        lanes = self.active()
        if len(lanes) % 32 or (lanes.reshape(-1, 32) != lanes[::32, None] + np.arange(32)).any():
            raise self.error("some threads of a warp do not take part")
        if (lanes[::32] % self.threads % 32).any():
            raise self.error("a warp is incomplete")
        return lanes.reshape(-1, 32)

    # --- memory -----------------------------------------------------------------------------------

    def error(self, what: str, lanes: Array | None = None) -> PTXError:
        who = ""
        if lanes is not None and len(lanes):
            lane = int(lanes[0])
            who = f", block {self.first + lane // self.threads}, thread {lane % self.threads}"
        line = f", line {self.at.line}: {self.at.text}" if self.at else ""
        return PTXError(f"{self.kernel.name}{line}{who}: {what}")

    def _aligned(self, address: Array, size: int) -> None:
        wrong = address % address.dtype.type(size) != 0
        if wrong.any():
            raise self.error(f"not aligned to {size} bytes", self.active()[wrong])

    def _found(self, address: Array, size: int) -> Array:
        self._aligned(address, size)
        try:
            return self.memory.check(address, size)
        except PTXError as error:
            raise self.error(str(error)) from None

    def _watched(
        self,
        watch: Watch | SharedWatch,
        at: Array,
        size: int,
        lanes: Array,
        changes: Array | None,
    ) -> None:
        """Record bytes ``at`` on as read, or as written where they change."""
        granule = self.shared_granule if watch is self.watch else self.granule
        n = max(size // granule, 1)
        cells = (at // granule)[:, None] + np.arange(n)
        thread = np.broadcast_to(self.number[lanes][:, None], cells.shape)
        if changes is None:
            loose = watch.read(cells.ravel(), thread.ravel())
        else:
            changed = changes.reshape(len(at), n, -1).any(2)
            loose = watch.write(cells.ravel(), thread.ravel(), changed.ravel())
        if loose.any():
            where = int(np.flatnonzero(loose)[0])
            raise self.error(
                "a race: nothing orders this and an access of another thread",
                lanes[where // n : where // n + 1],
            )

    def load_global(self, address: Array, unit: int, count: int, lanes: Array) -> Array:
        """[lanes, count] of ``unit`` bytes."""
        found = self._found(address, unit * count)
        if self.races:
            for watch, own, start in self.memory.watches(found, self.granule, self.clock):
                at = (address[own] - np.uint64(start)).astype(np.int64)
                self._watched(watch, at, unit * count, lanes[own], None)
        at = (address - np.uint64(self.memory.low)).astype(np.int64) // unit
        return self.memory.views[unit][at[:, None] + np.arange(count)]

    def store_global(self, address: Array, x: Array, unit: int, lanes: Array) -> None:
        count = x.shape[1]
        found = self._found(address, unit * count)
        at = (address - np.uint64(self.memory.low)).astype(np.int64) // unit
        cells = at[:, None] + np.arange(count)
        view = self.memory.views[unit]
        changes = view[cells] != x
        view[cells] = x
        if (view[cells] != x).any():
            raise self.error("two threads write different values to one place")
        if self.races:
            changed = np.repeat(changes, unit, 1).reshape(len(x), -1)
            for watch, own, start in self.memory.watches(found, self.granule, self.clock):
                to = (address[own] - np.uint64(start)).astype(np.int64)
                self._watched(watch, to, unit * count, lanes[own], changed[own])

    def shared_at(self, address: Array, size: int, lanes: Array) -> Array:
        """Where in ``self.shared`` these lanes' addresses are."""
        at = address.astype(np.int64)
        outside = (at < self.shared_start) | (at + size > self.shared_bytes)
        if outside.any():
            raise self.error(
                f"shared address {int(at[outside][0]) - self.shared_start} is outside"
                f" {self.shared_bytes - self.shared_start} bytes",
                lanes[outside],
            )
        self._aligned(address, size)
        return at + lanes // self.threads * self.shared_bytes

    def load_shared(self, address: Array, unit: int, count: int, lanes: Array) -> Array:
        at = self.shared_at(address, unit * count, lanes)
        self._landed(at, unit * count, lanes)
        if self.races:
            self._watched(self.watch, at, unit * count, lanes, None)
        return self.shared.view(f"u{unit}")[(at // unit)[:, None] + np.arange(count)]

    def store_shared(self, address: Array, x: Array, unit: int, lanes: Array) -> None:
        count = x.shape[1]
        at = self.shared_at(address, unit * count, lanes)
        self._landed(at, unit * count, lanes)
        view = self.shared.view(f"u{unit}")
        cells = (at // unit)[:, None] + np.arange(count)
        changes = view[cells] != x
        view[cells] = x
        if (view[cells] != x).any():
            raise self.error("two threads write different values to one place")
        if self.races:
            self._watched(self.watch, at, unit * count, lanes, np.repeat(changes, unit, 1))

    def _landed(self, at: Array, size: int, lanes: Array) -> None:
        if not self.copies and not self.order:
            return
        cells = at[:, None] + np.arange(size)
        early = self.flying[cells].any(1)
        if early.any():
            raise self.error("an asynchronous copy to this place was not waited for", lanes[early])
        if self.order and self.opaque[cells].any():
            raise self.error("an ordinary access to a barrier")

    # --- asynchronous copies ----------------------------------------------------------------------

    def copy(self, to: Array, start: Array, size: int, valid: Array, lanes: Array) -> None:
        at = self.shared_at(to, size, lanes)
        self._landed(at, size, lanes)
        self._aligned(start, size)
        some = valid > 0
        if some.any():
            self._found(start[some], size)
        cells = at[:, None] + np.arange(size)
        if self.races:
            self._watched(self.watch, at, size, lanes, np.ones(cells.shape, bool))
        self.shared[cells] = 0xFF
        self.flying[cells] = True
        self.copies.append(Copy(lanes, at, start, size, valid, self.group[lanes]))

    def commit(self) -> None:
        self.group[self.active()] += 1

    def wait(self, newest: int) -> None:
        """Land all but the ``newest`` groups of each active thread; -1: uncommitted ones too."""
        waits = np.zeros(self.count, bool)
        waits[self.active()] = True
        left = []
        for c in self.copies:
            lands = waits[c.lanes] & (c.group + newest < self.group[c.lanes])
            if lands.any():
                self._land(c, lands)
            if not lands.all():
                stays = ~lands
                left.append(
                    Copy(
                        c.lanes[stays],
                        c.to[stays],
                        c.start[stays],
                        c.size,
                        c.valid[stays],
                        c.group[stays],
                    )
                )
        self.copies = left

    def _land(self, c: Copy, lands: Array) -> None:
        lanes, at, valid = c.lanes[lands], c.to[lands], c.valid[lands]
        data = np.zeros((len(lanes), c.size), np.uint8)
        some = valid > 0
        if some.any():
            data[some] = self.load_global(c.start[lands][some], 1, c.size, lanes[some])
        data[np.arange(c.size) >= valid[:, None]] = 0
        cells = at[:, None] + np.arange(c.size)
        self.shared[cells] = data
        self.flying[cells] = False
        if self.races:
            # Others see it after the next barrier.
            self._watched(self.watch, at, c.size, lanes, np.ones(cells.shape, bool))

    # --- control ----------------------------------------------------------------------------------

    def go(self, block: int, mask: Array) -> None:
        if mask.any():
            found = self.pending.get(block)
            self.pending[block] = mask if found is None else found | mask

    def wait_at_barrier(self, behind: int, mask: Array) -> None:
        warps = mask.reshape(self.blocks, -1)
        for start in range(0, self.threads, 32):
            warp = warps[:, start : start + 32]
            if (warp.any(1) != warp.all(1)).any():
                raise self.error("a barrier that some threads of a warp do not reach")
        found = self.waiting.get(behind)
        self.waiting[behind] = mask if found is None else found | mask

    def release(self) -> None:
        """Every thread of a block waits: the barrier opens."""
        waits = np.zeros(self.count, bool)
        for mask in self.waiting.values():
            waits |= mask
        here = waits.reshape(self.blocks, -1)
        if (here.any(1) != here.all(1)).any():
            block = self.first + int(np.flatnonzero(here.any(1) != here.all(1))[0])
            raise self.error(f"block {block}: a barrier that some threads never reach")
        whole = np.flatnonzero(here.all(1))
        self.clock.block[whole + self.first] += 1
        if self.order:
            self.order.meet_blocks(whole)
        for block, mask in self.waiting.items():
            self.go(block, mask)
        self.waiting = {}

    def wait_for_warp(self, behind: int, members: Array) -> None:
        """Active lanes wait for the members of their warps, and go on behind."""
        assert self.order
        lanes = self.active()
        waits, asked = self.half_warps.pop(behind, (np.zeros(0, np.int64), np.zeros(0, np.uint32)))
        lanes = np.concatenate([waits, lanes])
        asked = np.concatenate([asked, np.broadcast_to(members, len(lanes) - len(asked))])
        by = np.argsort(lanes)
        lanes, asked = lanes[by], asked[by].astype(np.uint32)
        warp = lanes // self.threads * (self.threads + 31) + lanes % self.threads // 32
        left = np.ones(len(lanes), bool)
        for w in np.unique(warp):
            own = np.flatnonzero(warp == w)
            within = (lanes[own] % self.threads % 32).astype(np.uint32)
            exist = min(32, self.threads - int(lanes[own[0]] % self.threads) // 32 * 32)
            named = asked[own[0]] & np.uint32((1 << exist) - 1)
            if named == np.bitwise_or.reduce(np.uint32(1) << within):
                self.order.meet(lanes[own][None])
                left[own] = False
        released = np.zeros(self.count, bool)
        released[lanes[~left]] = True
        self.go(behind, released)
        if left.any():
            self.half_warps[behind] = lanes[left], asked[left]

    def park(self, block: int, lanes: Array, ready: Callable[[], bool]) -> None:
        """Lanes wait at the beginning of a block."""
        self.parked.append(Parked(block, lanes, ready))
        self._parked_now[lanes] = True

    def parked_now(self) -> Array | None:
        """Lanes that the current instruction parked."""
        if not self._parked_now.any():
            return None
        now = self._parked_now
        self._parked_now = np.zeros(self.count, bool)
        return now

    def _unpark(self) -> bool:
        """Let those go on whose wait is over."""
        waits, self.parked = self.parked, []
        for p in waits:
            if p.ready():
                mask = np.zeros(self.count, bool)
                mask[p.lanes] = True
                self.go(p.block, mask)
            else:
                self.parked.append(p)
        return bool(self.pending)

    def _next(self) -> None:
        """No thread can go on: let time pass, then open barriers."""
        while not self.pending and self.parked:
            if self._unpark():
                return
            if not self.boxes.land_one(self):
                break
        if not self.pending and self.waiting:
            self.release()
        if not self.pending and self.half_warps:
            raise self.error("some threads that are named do not take part")
        if not self.pending and self.parked:
            lanes = self.parked[0].lanes
            raise self.error("threads wait for a phase that never ends", lanes)

    def run(self) -> None:
        code, ranks = self.kernel.code["blocks"], self.kernel.code["ranks"]
        while self.pending or self.waiting or self.parked or self.half_warps:
            if not self.pending:
                self._next()
            number = min(self.pending, key=ranks.__getitem__)
            mask = self.pending.pop(number)
            mask_or_all = None if mask.all() else mask
            self.narrow(mask_or_all)
            going = True
            for instruction, guard, step, uses in code[number]:
                self.at = instruction
                if uses:
                    self.products.touch(self, uses)
                if guard is None:
                    result = step(self)
                    if result is None:
                        continue
                    rest = np.zeros(0, bool) if result is False else mask & ~result
                else:
                    kept = guard(self)
                    kept = (
                        np.array(np.broadcast_to(kept, self.count)) if np.ndim(kept) == 0 else kept
                    )
                    taken = kept if mask_or_all is None else kept & mask
                    if not taken.any():
                        continue
                    self.narrow(taken)
                    result = step(self)
                    self.narrow(mask_or_all)
                    if result is None:
                        continue
                    rest = mask & ~(taken if result is False else result)
                going = bool(rest.any())
                if not going:
                    break
                mask = mask_or_all = rest  # the others go on
                self.narrow(mask)
            if going:
                if number + 1 >= len(code):
                    raise self.error("threads run past the end")
                self.go(number + 1, mask)
        if self.copies:
            raise self.error("threads ended with asynchronous copies in flight")
        if self.order:
            self.boxes.finish(self)
            self.products.finish(self)

    def here(self) -> Array:
        """The active lanes as a mask."""
        return np.ones(self.count, bool) if self.mask is None else self.mask


def _top(dtype: Any) -> int:
    return (1 << 8 * np.dtype(dtype).itemsize) - 1


# --- compilation ----------------------------------------------------------------------------------


@dataclass
class Compiler:
    """Turns the instructions of a kernel into functions of a machine, once."""

    kernel: Kernel
    slots: dict[str, tuple[int, str]] = field(default_factory=dict)
    operands: set[int] = field(default_factory=set)  # slots that asynchronous products use
    used: set[int] = field(default_factory=set)  # slots of the current instruction

    def register(self, name: str) -> tuple[int, str] | None:
        """Slot and type."""
        if name not in self.slots:
            kind = self.kernel.registers.get(name)
            if kind is None:
                prefix = name.rstrip("0123456789")
                kind = self.kernel.prefixes.get(prefix) if prefix != name else None
            if kind is None:
                return None
            self.slots[name] = (len(self.slots), kind)
        self.used.add(self.slots[name][0])
        return self.slots[name]


_UNITS = ("mbarrier", "fence", "wgmma", "cp.async.bulk")


def _units(compiler: Compiler, kernel: Kernel) -> Callable[[Machine], None] | None:
    """Sets up what works beside the threads, if the kernel has any of it."""
    from ptx import barriers, tma, wgmma

    if not any(i.opcode.startswith(_UNITS) for block in kernel.blocks for i in block):
        return None

    def set_up(m: Machine) -> None:
        m.barriers = barriers.Barriers()
        m.boxes = tma.Boxes()
        m.products = wgmma.Products(m, compiler.operands)

    return set_up


def _sizes(instruction: Instruction) -> tuple[list[int], list[int]]:
    """Bytes that an access to global and to shared memory moves together."""
    kinds = instruction.opcode.split(".")
    copy = kinds[:2] == ["cp", "async"] and "bulk" not in kinds
    if kinds[0] not in ("ld", "st", "ldmatrix", "stmatrix") and not copy:
        return [], []
    if kinds[0] in ("ldmatrix", "stmatrix"):
        return [], [16]
    found = [4] if copy else [SIZES[k] for k in kinds if k in SIZES]
    return (
        found if kinds[1] not in ("shared", "param") else [],
        found if kinds[1] not in ("global", "param") else [],
    )


def _registers(kernel: Kernel) -> dict[str, tuple[int, str]]:
    return kernel.code["registers"]  # type: ignore[return-value]


def compiled(kernel: Kernel) -> None:
    """Give each instruction its meaning.

    Raises:
        PTXError: an instruction is unknown; which one.
    """
    from ptx import barriers, tma, wgmma  # noqa: F401  (their opcodes)
    from ptx.instructions import compile_instruction

    if kernel.code:
        return
    compiler = Compiler(kernel)
    blocks, sizes, shared = [], [16], [16]
    for number, block in enumerate(kernel.blocks):
        steps = []
        for instruction in block:
            compiler.used = set()
            try:
                guard, step = compile_instruction(compiler, instruction, number)
            except PTXError as error:
                raise PTXError(
                    f"{kernel.name}, line {instruction.line}: {instruction.text}: {error}"
                ) from None
            # Asynchronous products look after their registers themselves.
            used = set() if instruction.opcode.startswith("wgmma") else compiler.used
            steps.append((instruction, guard, step, used))
            of_global, of_shared = _sizes(instruction)
            sizes += of_global
            shared += of_shared
        blocks.append(steps)
    kernel.code.update(
        # Which registers products use is known at the end.
        blocks=[
            [(i, guard, step, sorted(used & compiler.operands)) for i, guard, step, used in block]
            for block in blocks
        ],
        registers=compiler.slots,
        ranks=flow.ranks(kernel),
        granule=min(sizes),
        shared_granule=min(shared),
        units=_units(compiler, kernel),
    )


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    parameters: bytes,
    memory: GlobalMemory,
    *,
    dynamic_shared: int = 0,
    loose: bool = False,
    races: bool = True,
    proxies: bool = True,
) -> None:
    """Run a grid.

    Args:
        parameters: the bytes of ``.param`` space.
        dynamic_shared: bytes of the ``.extern`` array.
        loose: shared memory is aligned to what its variables ask for and not more; else it begins
            at 0, as compilers rely on that know how a GPU places it.
        races: look for accesses to shared and global memory that nothing orders.
        proxies: ask for a fence between ordinary accesses and those of asynchronous units.

    Raises:
        PTXError: the kernel does something that is forbidden or unknown.
    """
    if len(parameters) < kernel.parameter_bytes:
        raise PTXError(
            f"{kernel.name} takes {kernel.parameter_bytes} parameter bytes, not {len(parameters)}"
        )
    if kernel.threads is not None and threads > kernel.threads:
        raise PTXError(f"{kernel.name} allows {kernel.threads} threads; got {threads}")
    compiled(kernel)
    total = grid[0] * grid[1] * grid[2]
    clock = Clock(total, threads)
    each = max(1, (_LANES_ORDERED if kernel.code["units"] else _LANES) // threads)
    start = 1024 + kernel.shared_align if loose else 0
    shared = start, start + kernel.shared_bytes + dynamic_shared
    with np.errstate(all="ignore"):
        for first in range(0, total, each):
            blocks = min(each, total - first)
            Machine(
                *(kernel, grid, threads, first, blocks, parameters, shared, memory, clock),
                *(races, proxies),
            ).run()
