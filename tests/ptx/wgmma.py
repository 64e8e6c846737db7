"""Products of a warpgroup that run beside its threads (``wgmma``).

Each warp has its sixteen of the 64 rows, so the emulator goes by warps; that the four warps of a
group ask for the same is checked at the end. Until a product is waited for, its registers may not
be touched and its operands in shared memory not replaced.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import numeric
from ptx.instructions import Parts, halves, meaning
from ptx.machine import Machine, Step
from ptx.parser import PTXError, split
from ptx.tma import swizzled

Array = Any
_SPANS = (0, 128, 64, 32)  # by the descriptor's field
_TMA_MODE = {0: 0, 32: 1, 64: 2, 128: 3}


def addresses(descriptor: int, rows: int, depth: int, unit: int, turned: bool) -> Array:
    """Where in shared memory elements [rows, depth] of a factor are.

    The canonical layouts of the manual, in bytes (T = 16 / unit elements are a chunk): K-major
    ``((8, m), (T, 2k)) : ((span, stride), (1, leading or T))``, M- or N-major (``turned``)
    ``((T, span / 16, m), (8, k)) : ((1, T, leading), (span, stride))``, and without swizzle
    ``((T, m), (8, k)) : ((1, stride), (T, leading))``.
    """
    field = lambda at: (descriptor >> at & 0x3FFF) << 4  # noqa: E731
    start, leading, stride = field(0), field(16), field(32)
    span = _SPANS[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise PTXError("a base offset is not known")
    if span and start % (8 * span) >= span and not turned:
        raise PTXError(f"the pattern of {8 * span} bytes does not begin at a multiple of them")
    chunk = 16 // unit
    r, k = np.arange(rows)[:, None], np.arange(depth)[None]
    if turned and span:
        wide = span // unit
        at = r % wide * unit + r // wide * leading + k % 8 * span + k // 8 * stride
    elif turned:
        at = r % chunk * unit + r // chunk * stride + k % 8 * 16 + k // 8 * leading
    elif span:
        at = r % 8 * span + r // 8 * stride + k * unit
    else:
        at = r % 8 * 16 + r // 8 * stride + k % chunk * unit + k // chunk * leading
    return swizzled(start + at, _TMA_MODE[span])


@dataclass
class Product:
    """In flight for one warp."""

    lanes: Array
    group: int
    sums: list[int]  # slots
    factors: list[int]
    cells: Array  # of shared memory, that are read

    @property
    def warp(self) -> int:
        """Its first lane."""
        return int(self.lanes[0])


class Products:
    """Of all warps, and the state of registers that they use."""

    def __init__(self, m: Machine, operands: set[int]) -> None:
        self.rows = {slot: i for i, slot in enumerate(sorted(operands))}
        self.slots = sorted(operands)
        # Accesses by other instructions since wgmma.fence; products in flight that write, read.
        self.touched = np.zeros((len(operands), m.count), bool)
        self.writing, self.reading = np.zeros((2, len(operands), m.count), np.int32)
        self.value = np.zeros((len(operands), m.count), np.float32)  # of sums in flight
        self.shape = np.zeros((len(operands), m.count), np.int32)
        self.fenced = np.zeros(m.count, bool)
        self.flying: list[Product] = []
        self.group: dict[int, int] = defaultdict(int)  # the open one, by first lane
        self.asked: dict[int, list[tuple[object, ...]]] = defaultdict(list)

    def touch(self, m: Machine, slots: list[int]) -> None:
        """Another instruction uses these registers."""
        rows = [self.rows[s] for s in slots]
        lanes = m.active()
        if self.flying:
            at = np.ix_(rows, lanes)
            busy = ((self.writing[at] > 0) | (self.reading[at] > 0)).any(0)
            if busy.any():
                raise m.error("a register of a product that was not waited for", lanes[busy])
        if m.mask is None:
            self.touched[rows] = True
        else:
            self.touched[np.ix_(rows, lanes)] = True

    def fence(self, m: Machine) -> None:
        lanes = m.whole_warps().ravel()
        self.touched[:, lanes] = False
        self.fenced[lanes] = True

    def commit(self, m: Machine) -> None:
        for warp in m.whole_warps():
            self.group[int(warp[0])] += 1

    def wait(self, m: Machine, newest: int) -> None:
        waits = {int(warp[0]) for warp in m.whole_warps()}
        ends = [p.group + newest < self.group[p.warp] and p.warp in waits for p in self.flying]
        done = [p for p, end in zip(self.flying, ends, strict=True) if end]
        self.flying = [p for p, end in zip(self.flying, ends, strict=True) if not end]
        written: dict[int, list[Array]] = defaultdict(list)
        for p in done:
            self.reading[np.ix_([self.rows[s] for s in p.factors], p.lanes)] -= 1
            self.writing[np.ix_([self.rows[s] for s in p.sums], p.lanes)] -= 1
            m.watch.done(p.cells, p.lanes)  # type: ignore[union-attr]
            for slot in p.sums:
                written[slot].append(p.lanes)
        for slot, lanes in written.items():
            row, at = self.rows[slot], np.concatenate(lanes)
            at = at[self.writing[row, at] == 0]
            whole = np.array(np.broadcast_to(m.get(slot, np.uint32), m.count))
            whole[at] = self.value[row, at].view(np.uint32)
            m.registers[slot] = whole

    def check(self, m: Machine, lanes: Array, sums: Array, factors: Array, shape: int) -> None:
        """Whether a product of these registers (rows of the tables) may start."""
        if not self.fenced[lanes].all():
            raise m.error("no wgmma.fence before the first product", lanes)
        at, into = np.ix_(factors, lanes), np.ix_(sums, lanes)
        if self.touched[at].any() or self.touched[into].any():
            raise m.error("no wgmma.fence since another use of a register", lanes)
        if self.writing[at].any() or self.reading[into].any():
            raise m.error("a register of a product that was not waited for", lanes)
        if (self.shape[into] != shape)[self.writing[into] > 0].any():
            raise m.error("sums of a product of another shape, not waited for", lanes)

    def finish(self, m: Machine) -> None:
        if self.flying:
            raise m.error("threads ended with products in flight")
        for first in range(0, m.count, 128):
            if any(self.asked[first] != self.asked[first + 32 * i] for i in range(4)):
                raise m.error("warps of a group ask for different products")


@meaning("wgmma")
def _wgmma(p: Parts) -> Step:
    what = p.need("fence", "commit_group", "wait_group", "mma_async")
    p.need("sync")
    p.need("aligned")
    if what == "fence":
        return lambda m: m.products.fence(m)
    if what == "commit_group":
        return lambda m: m.products.commit(m)
    if what == "wait_group":
        newest = int(p.operands[0], 0)
        return lambda m: m.products.wait(m, newest)
    return _product(p)


def _number(text: str, allowed: tuple[int, ...]) -> int:
    value = int(text, 0)
    if value not in allowed:
        raise PTXError(f"{text} is none of {allowed}")
    return value


def _product(p: Parts) -> Step:
    """d = a b + d; sums are exact and then cut, the least accurate that hardware is."""
    shape = next(x for x in p.modifiers if x.startswith("m64n"))
    p.need(shape)
    width, depth = (int(x) for x in shape[4:].split("k"))
    result, kind, second = p.kind(), p.kind(), p.kind()
    unit = {"bf16": 2, "f16": 2, "tf32": 4}.get(kind)
    if result != "f32" or kind != second or unit is None or depth * unit != 32:
        raise PTXError(f"no product of {kind} and {second} into {result} by {shape}")
    if width % 8 or not 8 <= width <= 256:
        raise PTXError(f"no product of {width} columns")
    d, a, b, scale, *rest = p.operands
    sums = split(d[1:-1])
    factors = split(a[1:-1]) if a.startswith("{") else []
    signs, turns = [_number(t, (1, -1)) for t in rest[:2]], [_number(t, (0, 1)) for t in rest[2:]]
    if len(turns) != (0 if unit == 4 else 1 if factors else 2):
        raise PTXError("a wrong number of operands")
    turned_a, turned_b = [0, 0, *turns][-2:]
    if len(sums) != width // 2 or (factors and len(factors) != 4):
        raise PTXError("a wrong number of registers")
    slots = [_slots(p, names) for names in (sums, factors)]
    parts = [p.source(t, "b32") for t in factors]
    start = [p.source(t, "f32") for t in sums]
    left = None if factors else p.source(a, "b64")
    right, adds = p.source(b, "b64"), p.source(scale, "pred")
    numbers = halves(kind)
    lane = np.arange(32)
    group, own = lane // 4, lane % 4
    pair = 4 // unit
    i = np.arange(len(sums))[:, None]
    place = group + i // 2 % 2 * 8, i // 4 * 8 + own * 2 + i % 2  # of sums

    def fragment(m: Machine, warp: Array) -> Array:
        A = np.zeros((16, depth))
        for i, read in enumerate(parts):
            x = numbers(np.broadcast_to(read(m), m.count)[warp])
            for e in range(pair):
                A[group + i % 2 * 8, own * pair + e + i // 2 * 4 * pair] = x[:, e]
        return A

    def shared(m: Machine, flat: Array) -> Array:
        view = m.shared.view(np.uint32 if unit == 4 else np.uint16)
        return numbers(view[flat // unit].astype(np.uint32))[..., 0].astype(np.float64)

    @dataclass
    class Factor:
        at: Array  # bytes of all blocks' shared memory
        values: Array

    def factor(m: Machine, block: int, descriptor: int, rows: int, turned: int) -> Factor:
        try:
            at = addresses(descriptor, rows, depth, unit, bool(turned))
        except PTXError as error:
            raise m.error(str(error)) from None
        if at.min() < m.shared_start or at.max() + unit > m.shared_bytes:
            raise m.error("a factor outside of shared memory")
        flat = at + block * m.shared_bytes
        return Factor(flat, shared(m, flat))

    def step(m: Machine) -> None:
        products, warps = m.products, m.whole_warps()
        into, out_of = ([products.rows[s] for s in names] for names in slots)
        adding = np.broadcast_to(adds(m), m.count)
        before = np.stack([np.broadcast_to(read(m), m.count) for read in start])
        descriptors = [np.broadcast_to(r(m), m.count) for r in (right, left) if r is not None]
        found: dict[tuple[int, ...], tuple[list[Factor], Array]] = {}
        for warp in warps:
            block, thread = divmod(int(warp[0]), m.threads)
            products.check(m, warp, into, out_of, width << 8 | depth)
            if any((d[warp] != d[warp[0]]).any() for d in descriptors):
                raise m.error("a descriptor that is not one for the warp")
            key = (block, *(int(d[warp[0]]) for d in descriptors))
            if key not in found:
                factors = [factor(m, block, key[1], width, turned_b)]
                if left is not None:
                    factors.append(factor(m, block, key[2], 64, turned_a))
                found[key] = factors, _cells(m, [f.at for f in factors])
            factors, cells = found[key]
            _take(m, cells, warp)
            row = thread // 32 % 4 * 16
            A = fragment(m, warp) if left is None else factors[1].values[row : row + 16]
            x = (signs[0] * A) @ (signs[1] * factors[0].values).T
            at = np.ix_(into, warp)
            added = np.where(products.writing[at] > 0, products.value[at], before[:, warp])
            whole = np.where(adding[warp], x[place] + added, x[place])
            products.value[at] = numeric.canonical(numeric.toward_zero(whole))
            products.shape[at] = width << 8 | depth
            products.writing[at] += 1
            products.reading[np.ix_(out_of, warp)] += 1
            products.asked[int(warp[0])].append((m.at, *key[1:]))
            products.flying.append(Product(warp, products.group[int(warp[0])], *slots, cells))

    return step


def _slots(p: Parts, names: list[str]) -> list[int]:
    found = []
    for name in names:
        register = p.compiler.register(name)
        if register is None:
            raise PTXError(f"{name!r} is no register")
        found.append(register[0])
    p.compiler.operands.update(found)
    return found


def _cells(m: Machine, at: list[Array]) -> Array:
    """Cells of shared memory; what is to come there has landed."""
    flat = np.concatenate([a.ravel() for a in at])
    if m.flying[flat].any():
        raise m.error("an asynchronous copy to this place was not waited for")
    return np.unique(flat // m.shared_granule)


def _take(m: Machine, cells: Array, warp: Array) -> None:
    """A product of a warp begins to read cells; the async proxy may see them."""
    if m.races:
        wrong = m.watch.taken(cells, m.order.of_warp(warp))  # type: ignore[union-attr]
        if wrong:
            raise m.error(wrong, warp)
    m.watch.busy[cells] += 1  # type: ignore[union-attr]
