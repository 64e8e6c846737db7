"""What each opcode means.

A function of the table below takes apart one instruction (its modifiers, its operands) and returns
a step: a function that a machine calls. A modifier nobody asked for is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import numeric
from ptx.machine import PARAMETER_WINDOW, SHARED_WINDOW, Compiler, Machine, Read, Step
from ptx.parser import SIZES, Instruction, PTXError, split

Array = Any

_KINDS = {
    **{f"{k}{n}": getattr(np, f"uint{n}") for k in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": getattr(np, f"int{n}") for n in (8, 16, 32, 64)},
    **{"f32": np.float32, "f64": np.float64, "pred": np.bool_},
    # Numbers that NumPy does not have stay bits.
    **{"f16": np.uint16, "bf16": np.uint16},
    **{"f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32},
}
_BITS = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # of a register
_AXES = {"x": 0, "y": 1, "z": 2}
_ONE = np.uint64(1)


def _bits_of(kind: str) -> Any:
    return np.bool_ if kind == "pred" else _BITS[max(SIZES[kind], 2)]


def _is_float(kind: str) -> bool:
    return kind in ("f32", "f64")


class Parts:
    """An instruction while it is taken apart: every modifier must be taken."""

    def __init__(self, compiler: Compiler, instruction: Instruction, block: int) -> None:
        self.compiler, self.block = compiler, block
        self.name, *self.modifiers = instruction.opcode.split(".")
        self.operands = instruction.operands

    def take(self, *names: str) -> str | None:
        """The first modifier among ``names``, if any."""
        for m in self.modifiers:
            if m in names:
                self.modifiers.remove(m)
                return m
        return None

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise PTXError(f"needs one of {names}")
        return found

    def kind(self) -> str:
        """The next type."""
        found = next((m for m in self.modifiers if m in _KINDS), None)
        if found is None:
            raise PTXError("needs a type")
        self.modifiers.remove(found)
        return found

    # --- operands ---------------------------------------------------------------------------------

    def source(self, text: str, kind: str) -> Read:
        """Reads a register, a number, a special register or the address of a variable."""
        dtype, bits = _KINDS[kind], _bits_of(kind)
        if kind == "pred" and text.startswith("!"):
            inner = self.source(text[1:], kind)
            return lambda m: ~inner(m)
        register = self.compiler.register(text)
        if register:
            slot, own = register
            has = _bits_of(own)
            if np.dtype(has).itemsize < np.dtype(dtype).itemsize:
                raise PTXError(f"{text} is narrower than {kind}")
            if has is dtype:
                return lambda m: m.get(slot, has)
            if np.dtype(has).itemsize == np.dtype(dtype).itemsize:
                return lambda m: m.get(slot, has).view(dtype)
            if self.name not in ("st", "cvt", "mov"):
                raise PTXError(f"{text} is wider than {kind}")
            narrow = _KINDS[f"u{8 * np.dtype(dtype).itemsize}"]
            return lambda m: m.get(slot, has).astype(narrow).view(dtype)
        special = re.match(r"%(tid|ntid|ctaid|nctaid)\.([xyz])$", text)
        if special:
            return _special(special.group(1), _AXES[special.group(2)], bits)
        if text == "%laneid":
            return lambda m: (m.lane % m.threads % 32).astype(bits)
        number = _number(text, kind)
        if number is not None:
            return lambda m: number
        if text in self.compiler.kernel.shared:
            at = self.compiler.kernel.shared[text]
            return lambda m: bits(m.shared_start + at)
        for p in self.compiler.kernel.parameters:
            if p.name == text:
                offset = bits(p.offset)
                return lambda m: offset
        raise PTXError(f"unknown operand {text!r}")

    def target(self, text: str, kind: str) -> Callable[[Machine, Array], None]:
        """Writes a register from values of every lane; a wider one is extended."""
        if text == "_":
            return lambda m, x: None
        slot, has, wide = self._register(text, kind)
        return lambda m, x: m.set(slot, wide(x), has)

    def target_active(self, text: str, kind: str) -> Callable[[Machine, Array], None]:
        """The same from values of the active lanes."""
        if text == "_":
            return lambda m, x: None
        slot, has, wide = self._register(text, kind)
        return lambda m, x: m.set_active(slot, wide(x), has)

    def _register(self, text: str, kind: str) -> tuple[int, Any, Callable[[Array], Array]]:
        register = self.compiler.register(text)
        if not register:
            raise PTXError(f"{text!r} is no register")
        slot, own = register
        has, dtype = _bits_of(own), _KINDS[kind]
        size, needed = np.dtype(has).itemsize, np.dtype(dtype).itemsize
        if size < needed or (size > needed and self.name not in ("ld", "cvt")):
            raise PTXError(f"{text} does not hold {kind}")
        if size == needed:
            return slot, has, (lambda x: x) if dtype is has else (lambda x: x.view(has))
        signed = np.dtype(f"i{size}") if kind[0] == "s" else np.dtype(has)
        return slot, has, lambda x: np.asarray(x, dtype).astype(signed).view(has)

    def address(self, text: str) -> Read:
        """``[register + n]``, ``[variable + n]`` or ``[n]``."""
        found = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]$", text)
        if not found:
            raise PTXError(f"address {text!r}")
        base, offset = found.group(1), int(found.group(2) or "0", 0)
        register = self.compiler.register(base)
        wide = np.uint32 if register and _bits_of(register[1]) is np.uint32 else np.uint64
        read = self.source(base, "u32" if wide is np.uint32 else "u64")
        moved = wide(offset % (1 << 8 * wide().itemsize))
        return (lambda m: read(m) + moved) if offset else read


def _number(text: str, kind: str) -> Array | None:
    dtype, bits = _KINDS[kind], _bits_of(kind)
    exact = re.match(r"0([fFdD])([0-9A-Fa-f]+)$", text)
    if exact and exact.group(1) in "fF" and len(exact.group(2)) == 8:
        x = np.uint32(int(exact.group(2), 16))
        return x.view(np.float32) if dtype is np.float32 else x
    if exact and exact.group(1) in "dD" and len(exact.group(2)) == 16:
        x = np.uint64(int(exact.group(2), 16))
        return x.view(np.float64) if dtype is np.float64 else x
    if re.match(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?$", text):
        value = int(text.rstrip("U"), 0)
        if _is_float(kind):
            raise PTXError(f"integer {text} for {kind}")
        if kind == "pred":
            return np.bool_(value)
        return bits(value % (1 << 8 * np.dtype(bits).itemsize)).astype(dtype)
    if _is_float(kind) and re.match(r"-?\d+\.\d*(e[+-]?\d+)?$", text):
        return dtype(float(text))
    return None


def _special(name: str, axis: int, dtype: Any) -> Read:
    def read(m: Machine) -> Array:
        if name == "tid":
            return (m.lane % m.threads).astype(dtype) if axis == 0 else dtype(0)
        if name == "ntid":
            return dtype(m.threads if axis == 0 else 1)
        if name == "nctaid":
            return dtype(m.grid[axis])
        block = m.lane // m.threads + m.first
        for a in range(axis):
            block = block // m.grid[a]
        return (block % m.grid[axis]).astype(dtype)

    return read


TABLE: dict[str, Callable[[Parts], Step]] = {}


def meaning(*names: str) -> Callable[[Callable[[Parts], Step]], Callable[[Parts], Step]]:
    def register(f: Callable[[Parts], Step]) -> Callable[[Parts], Step]:
        TABLE.update(dict.fromkeys(names, f))
        return f

    return register


def compile_instruction(
    compiler: Compiler, instruction: Instruction, block: int
) -> tuple[Read | None, Step]:
    """The guard, if any, and the step.

    Raises:
        PTXError: an opcode, modifier or operand is unknown.
    """
    parts = Parts(compiler, instruction, block)
    known = [name for name in TABLE if f"{instruction.opcode}.".startswith(f"{name}.")]
    if not known:
        raise PTXError(f"unknown opcode {parts.name!r}")
    step = TABLE[max(known, key=len)](parts)
    if parts.modifiers:
        raise PTXError(f"unknown modifiers {parts.modifiers}")
    if instruction.guard is None:
        return None, step
    return parts.source(("!" if instruction.negated else "") + instruction.guard, "pred"), step


def _pure(p: Parts, result: str, kinds: list[str], f: Callable[..., Array]) -> Step:
    """d = f(sources), lane by lane."""
    if len(p.operands) != len(kinds) + 1:
        raise PTXError(f"takes {len(kinds) + 1} operands")
    write = p.target(p.operands[0], result)
    reads = [p.source(t, k) for t, k in zip(p.operands[1:], kinds, strict=True)]
    if len(reads) == 1:
        (one,) = reads
        return lambda m: write(m, f(one(m)))
    if len(reads) == 2:
        one, two = reads
        return lambda m: write(m, f(one(m), two(m)))
    return lambda m: write(m, f(*[r(m) for r in reads]))


# --- arithmetic -----------------------------------------------------------------------------------


def _unsigned(kind: str) -> str:
    return f"u{8 * SIZES[kind]}"


def _round(kind: str, p: Parts) -> Callable[[Array], Array]:
    """What follows a correctly rounded operation."""
    ftz = p.take("ftz")
    if kind == "f64":
        return lambda x: x
    return (lambda x: numeric.flush(numeric.canonical(x))) if ftz else numeric.canonical


def _input(kind: str, p: Parts) -> Callable[[Array], Array]:
    return numeric.flush if kind == "f32" and "ftz" in p.modifiers else (lambda x: x)


@meaning("add", "sub", "mul")
def _arithmetic(p: Parts) -> Step:
    kind = p.kind()
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[p.name]
    if _is_float(kind):
        p.take("rn")
        into = _input(kind, p)
        out = _round(kind, p)
        return _pure(p, kind, [kind] * 2, lambda a, b: out(operation(into(a), into(b))))
    if p.name == "mul":
        return _product(p, kind)
    u = _unsigned(kind)
    return _pure(p, u, [u] * 2, operation)


def _wide(kind: str) -> str:
    return f"{kind[0]}{16 * SIZES[kind]}"


def _high(kind: str) -> Callable[[Array, Array], Array]:
    """The upper half of a product."""
    bits = 8 * SIZES[kind]
    if bits < 64:
        wide, dtype = _KINDS[_wide(kind)], _KINDS[kind]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(dtype)

    def high(a: Array, b: Array) -> Array:
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        a, b = np.asarray(a), np.asarray(b)
        x, y = a.view(np.uint64), b.view(np.uint64)
        x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
        middle = x1 * y0 + (x0 * y0 >> half)
        other = (middle & low) + x0 * y1
        top = x1 * y1 + (middle >> half) + (other >> half)
        if kind[0] == "s":
            top = top - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
        return top.view(_KINDS[kind])

    return high


def _product(p: Parts, kind: str) -> Step:
    part = p.need("lo", "hi", "wide")
    if part == "lo":
        u = _unsigned(kind)
        return _pure(p, u, [u] * 2, np.multiply)
    if part == "hi":
        return _pure(p, kind, [kind] * 2, _high(kind))
    wide = _KINDS[_wide(kind)]
    return _pure(p, _wide(kind), [kind] * 2, lambda a, b: a.astype(wide) * b.astype(wide))


@meaning("mad")
def _mad(p: Parts) -> Step:
    kind = p.kind()
    part = p.need("lo", "hi", "wide")
    if part == "lo":
        u = _unsigned(kind)
        return _pure(p, u, [u] * 3, lambda a, b, c: a * b + c)
    if part == "hi":
        high = _high(kind)
        return _pure(p, kind, [kind] * 3, lambda a, b, c: high(a, b) + c)
    wide = _KINDS[_wide(kind)]
    return _pure(
        p,
        _wide(kind),
        [kind, kind, _wide(kind)],
        lambda a, b, c: a.astype(wide) * b.astype(wide) + c,
    )


@meaning("fma")
def _fma(p: Parts) -> Step:
    kind = p.kind()
    p.need("rn")
    into = _input(kind, p)
    out = _round(kind, p)
    fma = {"f32": numeric.fma32, "f64": numeric.fma64}[kind]
    return _pure(p, kind, [kind] * 3, lambda a, b, c: out(fma(into(a), into(b), into(c))))


def _divided(a: Array, b: Array) -> Array:
    """Integer quotient toward zero."""
    if a.dtype.kind == "u":
        return a // b
    u = np.dtype(f"u{a.dtype.itemsize}")
    quotient = np.abs(a).view(u) // np.abs(b).view(u)
    return np.where((a < 0) != (b < 0), np.negative(quotient.view(a.dtype)), quotient.view(a.dtype))


@meaning("div", "rem")
def _div(p: Parts) -> Step:
    kind = p.kind()
    if kind == "f32" and p.take("full", "approx"):
        into = _input(kind, p)
        out = _round(kind, p)
        return _pure(p, kind, [kind] * 2, lambda a, b: out(numeric.div(into(a), into(b))))
    if _is_float(kind):
        p.need("rn")
        into = _input(kind, p)
        out = _round(kind, p)
        return _pure(p, kind, [kind] * 2, lambda a, b: out(into(a) / into(b)))
    if p.name == "div":
        return _pure(p, kind, [kind] * 2, lambda a, b: _divided(np.asarray(a), np.asarray(b)))
    return _pure(p, kind, [kind] * 2, lambda a, b: a - _divided(np.asarray(a), np.asarray(b)) * b)


@meaning("lg2", "ex2", "rsqrt", "rcp", "sqrt")
def _approximation(p: Parts) -> Step:
    kind = p.kind()
    into = _input(kind, p)
    if p.name in ("sqrt", "rcp") and p.take("rn"):
        out = _round(kind, p)
        if p.name == "sqrt":
            return _pure(p, kind, [kind], lambda a: out(np.sqrt(into(a))))
        one = _KINDS[kind](1)
        return _pure(p, kind, [kind], lambda a: out(one / into(a)))
    p.need("approx")
    if kind != "f32":
        raise PTXError(f"no {p.name} for {kind}")
    out = _round(kind, p)
    f = getattr(numeric, p.name)
    return _pure(p, kind, [kind], lambda a: out(f(into(a))))


@meaning("neg", "abs")
def _sign(p: Parts) -> Step:
    kind = p.kind()
    f = {"neg": np.negative, "abs": np.abs}[p.name]
    if _is_float(kind):
        into = _input(kind, p)
        p.take("ftz")
        return _pure(p, kind, [kind], lambda a: f(into(a)))
    return _pure(p, kind, [kind], f)


@meaning("min", "max")
def _extreme(p: Parts) -> Step:
    kind, most = p.kind(), p.name == "max"
    if not _is_float(kind):
        return _pure(p, kind, [kind] * 2, np.maximum if most else np.minimum)
    into = _input(kind, p)
    out = _round(kind, p)
    # A number beside a NaN is the result, unless NaN is asked for.
    names = ("minimum", "maximum") if p.take("NaN") else ("fmin", "fmax")
    pick = getattr(np, names[most])
    u = _KINDS[_unsigned(kind)]

    def f(a: Array, b: Array) -> Array:
        a, b = into(a), into(b)
        # -0 is less than +0.
        zero = a.view(u) & b.view(u) if most else a.view(u) | b.view(u)
        return out(np.where((a == 0) & (b == 0), zero.view(a.dtype), pick(a, b)))

    return _pure(p, kind, [kind] * 2, f)


# --- bits -----------------------------------------------------------------------------------------


@meaning("and", "or", "xor")
def _logic(p: Parts) -> Step:
    kind = p.kind()
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[p.name]
    return _pure(p, kind, [kind] * 2, f)


@meaning("not")
def _not(p: Parts) -> Step:
    kind = p.kind()
    return _pure(p, kind, [kind], np.invert)


@meaning("shl", "shr")
def _shift(p: Parts) -> Step:
    """Amounts are 32 bits and stop at the width."""
    kind = p.kind()
    bits, dtype = 8 * SIZES[kind], _KINDS[kind]

    def f(a: Array, amount: Array) -> Array:
        most = np.minimum(amount, np.uint32(bits - 1)).astype(dtype)
        moved = a << most if p.name == "shl" else a >> most
        beyond = dtype(0) if p.name == "shl" or kind[0] != "s" else a >> dtype(bits - 1)
        return np.where(amount >= bits, beyond, moved)

    return _pure(p, kind, [kind, "u32"], f)


@meaning("shf")
def _funnel(p: Parts) -> Step:
    kind, way, mode = p.kind(), p.need("l", "r"), p.need("wrap", "clamp")

    def f(a: Array, b: Array, c: Array) -> Array:
        n = (c & np.uint32(31) if mode == "wrap" else np.minimum(c, np.uint32(32))).astype(
            np.uint64
        )
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        moved = both >> n if way == "r" else (both << n) >> np.uint64(32)
        return moved.astype(np.uint32)

    return _pure(p, kind, ["b32", "b32", "u32"], f)


@meaning("bfe")
def _extract(p: Parts) -> Step:
    kind = p.kind()
    if SIZES[kind] != 4:
        raise PTXError(f"no bfe for {kind}")

    def f(a: Array, start: Array, length: Array) -> Array:
        # The field is read out of 64 bits that continue the sign (or zeros).
        long = a.astype(np.int64)
        start = np.minimum(start & np.uint32(255), 63).astype(np.int64)
        left = 64 - np.minimum(length & np.uint32(255), 64).astype(np.int64)
        at = np.minimum(left, 63)
        if kind == "s32":
            field = ((long >> start) << at) >> at
        else:
            u = (long >> start).view(np.uint64)
            field = (u << at.view(np.uint64)) >> at.view(np.uint64)
        return np.where(left == 64, 0, field).astype(np.int64).astype(_KINDS[kind])

    return _pure(p, kind, [kind, "u32", "u32"], f)


@meaning("bfi")
def _insert(p: Parts) -> Step:
    p.kind()

    def f(a: Array, b: Array, start: Array, length: Array) -> Array:
        start = np.minimum(start & np.uint32(255), 32).astype(np.uint64)
        length = np.minimum(length & np.uint32(255), 32).astype(np.uint64)
        field = ((np.uint64(1) << length) - np.uint64(1)) << start
        return (b & ~field | a.astype(np.uint64) << start & field).astype(np.uint32)

    return _pure(p, "b32", ["b32", "b32", "u32", "u32"], f)


@meaning("prmt")
def _permute(p: Parts) -> Step:
    """The default mode: each nibble of c chooses a byte of {b, a}, or spreads its sign."""
    p.kind()

    def f(a: Array, b: Array, c: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        result = np.uint32(0)
        for i in range(4):
            chosen = c >> np.uint32(4 * i)
            byte = (both >> ((chosen & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(
                np.uint32
            )
            byte = byte & np.uint32(255)
            spread = (byte >> np.uint32(7)) * np.uint32(255)
            byte = np.where(chosen & np.uint32(8), spread, byte)
            result = result | byte << np.uint32(8 * i)
        return result

    return _pure(p, "b32", ["b32"] * 3, f)


@meaning("lop3")
def _lop3(p: Parts) -> Step:
    p.kind()
    *operands, table = p.operands
    p.operands = tuple(operands)
    look = int(table, 0)

    def f(a: Array, b: Array, c: Array) -> Array:
        result = np.uint32(0)
        for i in range(8):
            if look >> i & 1:
                x = a if i & 4 else ~a
                y = b if i & 2 else ~b
                result = result | (x & y & (c if i & 1 else ~c))
        return result

    return _pure(p, "b32", ["b32"] * 3, f)


@meaning("popc")
def _popc(p: Parts) -> Step:
    kind = p.kind()
    return _pure(p, "u32", [kind], lambda a: np.bitwise_count(a).astype(np.uint32))


# --- choices and conversions ----------------------------------------------------------------------

_COMPARE: dict[str, Any] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def _comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    if not floating:
        return _COMPARE[name]  # type: ignore[no-any-return]
    nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if name in ("num", "nan"):
        return nan if name == "nan" else lambda a, b: ~nan(a, b)
    if name in _COMPARE:
        return lambda a, b: _COMPARE[name](a, b) & ~nan(a, b)
    return lambda a, b: _COMPARE[name[:-1]](a, b) | nan(a, b)


@meaning("setp")
def _setp(p: Parts) -> Step:
    name = p.modifiers.pop(0)
    combine = p.take("and", "or", "xor")
    kind = p.kind()
    into = _input(kind, p)
    p.take("ftz")
    compare = _comparison(name, _is_float(kind))
    first, _, second = p.operands[0].partition("|")
    write = p.target(first.strip(), "pred")
    other = p.target(second.strip() or "_", "pred")
    one, two = (p.source(t, kind) for t in p.operands[1:3])
    if combine is None:

        def step(m: Machine) -> None:
            is_true = compare(into(one(m)), into(two(m)))
            write(m, is_true)
            other(m, ~is_true)

        return step
    third = p.source(p.operands[3], "pred")
    f = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]

    def combined(m: Machine) -> None:
        is_true, c = compare(into(one(m)), into(two(m))), third(m)
        write(m, f(is_true, c))
        other(m, f(~is_true, c))

    return combined


@meaning("selp")
def _selp(p: Parts) -> Step:
    kind = "b" + str(8 * SIZES[p.kind()])
    return _pure(p, kind, [kind, kind, "pred"], lambda a, b, c: np.where(c, a, b))


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_NARROW = {"bf16": numeric.to_bf16, "f16": numeric.to_f16}
_WIDEN = {"bf16": numeric.from_bf16, "f16": numeric.from_f16}


@meaning("cvt")
def _convert(p: Parts) -> Step:
    to, start = p.kind(), p.kind()
    rounding = p.take("rn", "rna", *_TO_INTEGER)
    into = _input(start, p)
    p.take("ftz")
    if to in ("bf16x2", "f16x2"):
        narrow = _NARROW[to[:-2]]
        # The first source is the upper half.
        return _pure(
            p,
            to,
            ["f32"] * 2,
            lambda a, b: (
                narrow(a).astype(np.uint32) << np.uint32(16) | narrow(b).astype(np.uint32)
            ).astype(np.uint32),
        )
    return _pure(p, to, [start], _conversion(to, start, rounding, into))


def _conversion(
    to: str, start: str, rounding: str | None, into: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    dtype = _KINDS[to]
    if to in _NARROW and start == "f32" and rounding == "rn":
        return _NARROW[to]
    if to == "f32" and start in _WIDEN and rounding is None:
        return _WIDEN[start]
    if to == "f32" and start == "f32" and rounding in _TO_INTEGER:
        return lambda a: numeric.canonical(_TO_INTEGER[rounding](into(a)))
    if to == "tf32" and start == "f32" and rounding == "rna":
        half, keep = np.uint32(0x1000), np.uint32(0xFFFFE000)  # ties away from zero
        return lambda a: np.where(
            np.isfinite(a), (a.view(np.uint32) + half) & keep, a.view(np.uint32)
        )
    if to == "f64" and start in _WIDEN and rounding is None:
        return lambda a: _WIDEN[start](a).astype(np.float64)
    if to == "f64" and start == "f32" and rounding is None:
        return lambda a: a.astype(np.float64)
    if to == "f32" and start == "f64" and rounding == "rn":
        return lambda a: numeric.canonical(a.astype(np.float32))
    if _is_float(to) and start[0] in "us" and rounding == "rn":
        return lambda a: a.astype(dtype)
    if to[0] in "us" and _is_float(start) and rounding in _TO_INTEGER:
        limits = np.iinfo(dtype)

        def whole(a: Array) -> Array:
            x = _TO_INTEGER[rounding](into(a)).astype(np.longdouble)
            return np.where(np.isnan(x), 0, np.clip(x, limits.min, limits.max)).astype(dtype)

        return whole
    if to[0] in "us" and start[0] in "us" and rounding is None:
        # Extended by the sign of the source, or cut.
        return lambda a: a.astype(dtype)
    raise PTXError(f"no conversion from {start} to {to} by {rounding}")


@meaning("mov")
def _mov(p: Parts) -> Step:
    kind = p.kind()
    to, start = p.operands
    if start.startswith("{"):
        return _pack(p, kind, to, [s.strip() for s in start[1:-1].split(",")])
    if to.startswith("{"):
        return _unpack(p, kind, [s.strip() for s in to[1:-1].split(",")], start)
    return _pure(p, kind, [kind], lambda a: a)


def _pack(p: Parts, kind: str, to: str, parts: list[str]) -> Step:
    bits = 8 * SIZES[kind] // len(parts)
    reads = [p.source(t, f"b{bits}") for t in parts]
    dtype, write = _KINDS[kind], p.target(to, kind)

    def step(m: Machine) -> None:
        x = dtype(0)
        for i, read in enumerate(reads):
            x = x | read(m).astype(dtype) << dtype(bits * i)
        write(m, x)

    return step


def _unpack(p: Parts, kind: str, parts: list[str], start: str) -> Step:
    bits = 8 * SIZES[kind] // len(parts)
    part, dtype, read = _KINDS[f"b{bits}"], _KINDS[kind], p.source(start, kind)
    writes = [p.target(t, f"b{bits}") for t in parts]

    def step(m: Machine) -> None:
        x = read(m)
        for i, write in enumerate(writes):
            write(m, (x >> dtype(bits * i)).astype(part))

    return step


# --- memory ---------------------------------------------------------------------------------------


@meaning("cvta")
def _cvta(p: Parts) -> Step:
    kind, to = p.kind(), p.take("to")
    space = p.need("global", "shared", "param")
    window = np.uint64({"global": 0, "shared": SHARED_WINDOW, "param": PARAMETER_WINDOW}[space])
    return _pure(p, kind, [kind], lambda a: a - window if to else a + window)


def _elements(p: Parts, text: str) -> list[str]:
    """Registers of a vector."""
    count = int((p.take("v2", "v4") or "v1")[1:])
    found = split(text.strip()[1:-1]) if text.startswith("{") else [text]
    if len(found) != count:
        raise PTXError(f"{len(found)} registers for {count} elements")
    return found


def _hints(p: Parts) -> None:
    """How a cache is used changes no value."""
    p.take("ca", "cg", "cs", "wb", "wt", "nc")
    p.modifiers = [m for m in p.modifiers if not re.match(r"L[12]::(evict_\w+|\d+B)$", m)]


def _by_space(
    m: Machine, space: str | None, address: Array, lanes: Array
) -> list[tuple[bool, Array]]:
    """(is shared, which of the active lanes) for an access; generic addresses show it."""
    if space:
        return [(space == "shared", np.ones(len(lanes), bool))]
    shared = address >= np.uint64(SHARED_WINDOW)
    return [(kind, which) for kind, which in ((True, shared), (False, ~shared)) if which.any()]


@meaning("ld")
def _load(p: Parts) -> Step:
    _hints(p)
    space = p.take("global", "shared", "param")
    kind = p.kind()
    names = _elements(p, p.operands[0])
    unit, count, dtype = SIZES[kind], len(names), _KINDS[kind]
    writes = [p.target_active(n, kind) for n in names]
    address = p.address(p.operands[1])
    if space == "param":
        return _load_parameter(p, kind, names, address)

    def step(m: Machine) -> None:
        lanes, at = m.active(), m.spread(address(m))
        data = np.empty((len(lanes), count), f"u{unit}")
        for shared, which in _by_space(m, space, at, lanes):
            if shared:
                inside = at[which] if space else at[which] - np.uint64(SHARED_WINDOW)
                data[which] = m.load_shared(inside, unit, count, lanes[which])
            else:
                data[which] = m.load_global(at[which], unit, count, lanes[which])
        for i, write in enumerate(writes):
            write(m, np.ascontiguousarray(data[:, i]).view(dtype))

    return step


def _load_parameter(p: Parts, kind: str, names: list[str], address: Read) -> Step:
    unit, dtype = SIZES[kind], _KINDS[kind]
    writes = [p.target(n, kind) for n in names]

    def step(m: Machine) -> None:
        start = np.asarray(address(m)).astype(np.int64)
        for i, write in enumerate(writes):
            at = start + i * unit
            used = m.spread(at)
            if (used % unit != 0).any() or (used + unit > len(m.parameters)).any():
                raise m.error("a parameter out of bounds or not aligned")
            at = np.clip(at, 0, len(m.parameters) - unit)
            x = m.parameters[at[..., None] + np.arange(unit)]
            write(m, np.ascontiguousarray(x).view(dtype)[..., 0])

    return step


@meaning("st")
def _store(p: Parts) -> Step:
    _hints(p)
    space = p.take("global", "shared")
    kind = p.kind()
    unit = SIZES[kind]
    reads = [p.source(n, f"b{8 * unit}") for n in _elements(p, p.operands[1])]
    address = p.address(p.operands[0])

    def step(m: Machine) -> None:
        lanes, at = m.active(), m.spread(address(m))
        data = np.stack([m.spread(r(m)) for r in reads], 1)
        for shared, which in _by_space(m, space, at, lanes):
            if shared:
                inside = at[which] if space else at[which] - np.uint64(SHARED_WINDOW)
                m.store_shared(inside, data[which], unit, lanes[which])
            else:
                m.store_global(at[which], data[which], unit, lanes[which])

    return step


@meaning("cp")
def _copy(p: Parts) -> Step:
    p.need("async")
    if p.take("commit_group"):
        return Machine.commit
    if p.take("wait_all"):
        return lambda m: m.wait(-1)
    if p.take("wait_group"):
        newest = int(p.operands[0], 0)
        return lambda m: m.wait(newest)
    through = p.need("ca", "cg")
    p.need("shared")
    p.need("global")
    _hints(p)
    to, start = p.address(p.operands[0]), p.address(p.operands[1])
    size = int(p.operands[2], 0)
    if size not in ((16,) if through == "cg" else (4, 8, 16)):
        raise PTXError(f"no copy of {size} bytes")
    valid = p.source(p.operands[3], "u32") if len(p.operands) > 3 else (lambda m: np.uint32(size))

    def step(m: Machine) -> None:
        some = m.spread(valid(m)).astype(np.int64)
        if (some > size).any():
            raise m.error("a copy of more bytes than its size")
        m.copy(m.spread(to(m)), m.spread(start(m)), size, some, m.active())

    return step


# --- control --------------------------------------------------------------------------------------


@meaning("bra")
def _branch(p: Parts) -> Step:
    p.take("uni")
    targets, (label,) = p.compiler.kernel.targets, p.operands
    if label not in targets:
        raise PTXError(f"no label {label}")

    def step(m: Machine) -> bool:
        m.go(targets[label], m.here())
        return False

    return step  # type: ignore[return-value]


@meaning("ret", "exit")
def _end(p: Parts) -> Step:
    return lambda m: False  # type: ignore[return-value]


@meaning("bar")
def _barrier(p: Parts) -> Step:
    if p.take("warp"):
        p.need("sync")
        members = p.source(p.operands[0], "b32")
        behind = p.block + 1

        def meet(m: Machine) -> bool | None:
            if m.order:  # some may wait elsewhere
                m.wait_for_warp(behind, m.spread(members(m)))
                return False
            _members(m, members)
            m.clock.warp[np.unique(m.clock.place(m.number[m.active()])[1])] += 1
            return None

        return meet  # type: ignore[return-value]
    p.need("sync")
    if p.operands != ("0",):
        raise PTXError(f"only barrier 0 of all threads is known; got {p.operands}")
    behind = p.block + 1

    def step(m: Machine) -> bool:
        m.wait_at_barrier(behind, m.here())
        return False

    return step  # type: ignore[return-value]


# --- warps ----------------------------------------------------------------------------------------


def _members(m: Machine, members: Read) -> tuple[Array, Array]:
    """Active lanes and, of each, the members; all of them must be there.

    Lanes are where the program has the warp together, so a member that is missing has ended or
    would have to be waited for.
    """
    lanes = m.active()
    asked = m.spread(members(m)).astype(np.uint32)
    within = (lanes % m.threads % 32).astype(np.uint32)
    together = np.zeros(m.count + 32, np.uint32)
    np.bitwise_or.at(together, lanes - within, np.uint32(1) << within)
    here = together[lanes - within]
    exists = np.minimum(m.threads - (lanes % m.threads - within), 32).astype(np.uint64)
    asked = asked & ((_ONE << exists) - _ONE).astype(np.uint32)
    missing = (asked & ~here) != 0
    if missing.any():
        raise m.error("some threads that are named do not take part", lanes[missing])
    outside = (asked >> within & np.uint32(1)) == 0
    if outside.any():
        raise m.error("a thread takes part that is not named", lanes[outside])
    return lanes, asked


@meaning("shfl")
def _shuffle(p: Parts) -> Step:
    p.need("sync")
    mode = p.need("up", "down", "bfly", "idx")
    p.kind()
    first, _, second = p.operands[0].partition("|")
    write = p.target_active(first.strip(), "b32")
    inside = p.target_active(second.strip() or "_", "pred")
    value, b, c, members = (p.source(t, "b32") for t in p.operands[1:])

    def step(m: Machine) -> None:
        lanes, asked = _members(m, members)
        within = lanes % m.threads % 32
        by = m.spread(b(m)).astype(np.int64) & 31
        control = m.spread(c(m)).astype(np.int64)
        clamp, segment = control & 31, control >> 8 & 31
        lowest = within & segment
        highest = lowest | (clamp & ~segment)
        if mode == "up":
            j = within - by
            valid = j >= highest
        elif mode == "down":
            j = within + by
            valid = j <= highest
        elif mode == "bfly":
            j = within ^ by
            valid = j <= highest
        else:
            j = lowest | (by & ~segment)
            valid = j <= highest
        j = np.where(valid, j, within)
        absent = (asked >> j.astype(np.uint32) & np.uint32(1)) == 0
        if absent.any():
            raise m.error("a value of a thread that does not take part", lanes[absent])
        whole = np.broadcast_to(value(m), m.count)
        write(m, whole[lanes - within + j])
        inside(m, valid)

    return step


@meaning("vote")
def _vote(p: Parts) -> Step:
    p.need("sync")
    p.need("ballot")
    p.kind()
    write = p.target_active(p.operands[0], "b32")
    yes, members = p.source(p.operands[1], "pred"), p.source(p.operands[2], "b32")

    def step(m: Machine) -> None:
        lanes, asked = _members(m, members)
        within = (lanes % m.threads % 32).astype(np.uint32)
        ballots = np.zeros(m.count, np.uint32)
        np.bitwise_or.at(ballots, lanes - within, m.spread(yes(m)).astype(np.uint32) << within)
        write(m, ballots[lanes - within] & asked)

    return step


@meaning("redux")
def _reduce(p: Parts) -> Step:
    p.need("sync")
    name, kind = p.need("add", "min", "max", "and", "or", "xor"), p.kind()
    f: Any = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(name)
    f = f or {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    write = p.target_active(p.operands[0], kind)
    value, members = p.source(p.operands[1], kind), p.source(p.operands[2], "b32")

    def step(m: Machine) -> None:
        _, asked = _members(m, members)
        if (asked != 0xFFFFFFFF).any():
            raise m.error("only whole warps are known")
        warps = m.whole_warps()
        x = np.broadcast_to(value(m), m.count)[warps]
        write(m, np.repeat(f.reduce(x, axis=1), 32).astype(_KINDS[kind]))

    return step


@meaning("ldmatrix")
def _ldmatrix(p: Parts) -> Step:
    for name in ("sync", "aligned", "m8n8", "shared", "b16"):
        p.need(name)
    count, turned = int(p.need("x1", "x2", "x4")[1:]), p.take("trans")
    names = split(p.operands[0][1:-1])
    writes = [p.target_active(n, "b32") for n in names]
    address = p.address(p.operands[1])
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2

    def step(m: Machine) -> None:
        warps = m.whole_warps()
        # Lane i gives the address of row i % 8 of matrix i / 8.
        rows = warps[:, : 8 * count].ravel()
        at = np.broadcast_to(address(m), m.count)[rows]
        data = m.load_shared(at, 2, 8, rows).reshape(len(warps), count, 8, 8)
        # 16-byte rows.
        if (at % 16 != 0).any():
            raise m.error("not aligned to 16 bytes")
        for i, write in enumerate(writes):
            matrix = data[:, i].transpose(0, 2, 1) if turned else data[:, i]
            low, high = matrix[:, row, column], matrix[:, row, column + 1]
            write(m, (low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)).ravel())

    return step


@meaning("stmatrix")
def _stmatrix(p: Parts) -> Step:
    for name in ("sync", "aligned", "m8n8", "shared", "b16"):
        p.need(name)
    count, turned = int(p.need("x1", "x2", "x4")[1:]), p.take("trans")
    address = p.address(p.operands[0])
    reads = [p.source(n, "b32") for n in split(p.operands[1][1:-1])]
    if len(reads) != count:
        raise PTXError(f"{len(reads)} registers for {count} matrices")
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2

    def step(m: Machine) -> None:
        warps = m.whole_warps()
        data = np.empty((len(warps), count, 8, 8), np.uint16)
        for i, read in enumerate(reads):
            x = np.broadcast_to(read(m), m.count)[warps]
            for half in range(2):
                at = (column + half, row) if turned else (row, column + half)
                data[:, i, *at] = (x >> np.uint32(16 * half)).astype(np.uint16)
        # Lane i gives the address of row i % 8 of matrix i / 8.
        rows = warps[:, : 8 * count].ravel()
        at = np.broadcast_to(address(m), m.count)[rows]
        if (at % 16 != 0).any():
            raise m.error("not aligned to 16 bytes")
        m.store_shared(at, data.reshape(-1, 8), 2, rows)

    return step


def halves(kind: str) -> Callable[[Array], Array]:
    """[..] of registers -> [.., elements] of numbers."""
    if kind == "tf32":
        # The lower 13 bits are not looked at.
        return lambda u: (u & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    widen = _WIDEN[kind]
    return lambda u: np.stack(
        [
            widen((u & np.uint32(0xFFFF)).astype(np.uint16)),
            widen((u >> np.uint32(16)).astype(np.uint16)),
        ],
        -1,
    )


@meaning("mma")
def _mma(p: Parts) -> Step:
    """d = a b + c over a warp; sums are exact and then cut, the least accurate that hardware is."""
    for name in ("sync", "aligned", "row", "col"):
        p.need(name)
    shape = p.need("m16n8k16", "m16n8k8")
    result, kind, second, third = p.kind(), p.kind(), p.kind(), p.kind()
    if (result, third) != ("f32", "f32") or kind != second:
        raise PTXError(f"no product of {kind} and {second} plus {third}")
    d, a, b, c = (split(t[1:-1]) for t in p.operands)
    pair = 1 if kind == "tf32" else 2
    depth = int(shape[-2:].lstrip("k"))
    steps = depth // (4 * pair)  # fragments side by side along k
    if (len(d), len(a), len(b), len(c)) != (4, 2 * steps, steps, 4):
        raise PTXError("a wrong number of registers")
    writes = [p.target_active(t, "f32") for t in d]
    left, right = [p.source(t, "b32") for t in a], [p.source(t, "b32") for t in b]
    start, numbers = [p.source(t, "f32") for t in c], halves(kind)
    lane = np.arange(32)
    group, own = lane // 4, lane % 4

    def step(m: Machine) -> None:
        warps = m.whole_warps()

        def fragment(read: Read) -> Array:
            return np.broadcast_to(read(m), m.count)[warps]

        A = np.zeros((len(warps), 16, depth))
        B = np.zeros((len(warps), depth, 8))
        for i in range(steps):
            for e in range(pair):
                k = own * pair + e + i * 4 * pair
                A[:, group, k] = numbers(fragment(left[2 * i]))[..., e]
                A[:, group + 8, k] = numbers(fragment(left[2 * i + 1]))[..., e]
                B[:, k, group] = numbers(fragment(right[i]))[..., e]
        product = A @ B
        for i, write in enumerate(writes):
            x = product[:, group + i // 2 * 8, own * 2 + i % 2] + fragment(start[i])
            write(m, numeric.canonical(numeric.toward_zero(x)).ravel())

    return step
