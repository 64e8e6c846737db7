"""PTX text as kernels: parameters, registers, shared variables and basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bytes of a fundamental type.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}
SIZES |= {"b128": 16, "bf16": 2, "bf16x2": 4, "f16x2": 4, "tf32": 4, "pred": 1}


class PTXError(Exception):
    """PTX that this emulator does not know, or that does what the manual forbids."""


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    guard: str | None  # the predicate it stands under
    negated: bool
    opcode: str
    operands: tuple[str, ...]


@dataclass
class Kernel:
    """One ``.entry``.

    Attributes:
        blocks: basic blocks in program order; only their last instruction may branch, and only the
            first try whether a barrier in memory has opened.
        targets: label -> number of the block it begins.
        registers: name -> type, or prefix -> type for ``%r<17>``.
        shared: static variable -> offset; dynamic: name of the ``.extern`` array, behind them;
            shared_align: what all of them are promised.
    """

    name: str
    parameters: list[Parameter]
    blocks: list[list[Instruction]]
    targets: dict[str, int]
    registers: dict[str, str]
    prefixes: dict[str, str]
    shared: dict[str, int]
    shared_bytes: int
    dynamic: str | None = None
    shared_align: int = 16
    threads: int | None = None
    code: dict[str, object] = field(default_factory=dict)  # what the machine compiled

    @property
    def parameter_bytes(self) -> int:
        last = self.parameters[-1] if self.parameters else Parameter("", 0, 0)
        return last.offset + last.size


_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*(\([^)]*\))?([^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*?\s)?\s*([\w$]+)(?:\[(\d+)\])?\s*$"
)
_VARIABLE = re.compile(
    r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?$"
)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([\w$%.]+):(?!:)")
_TRIES = ("mbarrier.try_wait", "mbarrier.test_wait")
_ENDS = ("bra", "ret", "exit", "bar", "barrier", "brx", "call", "trap")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module.

    Raises:
        PTXError: the text has something this parser does not know.
    """
    keep_lines = lambda m: re.sub(r"[^\n]", " ", m.group(0))  # noqa: E731
    text = re.sub(r"/\*.*?\*/", keep_lines, text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.M)
    text = re.sub(r"\.section\s+\.debug\w*\s*\{[^}]*\}", keep_lines, text)
    outside, kernels, end = [], [], 0
    for found in _ENTRY.finditer(text):
        outside.append(text[end : found.start()])
        end = _closing(text, found.end())
        kernels.append((found, text[found.end() : end - 1]))
    outside.append(text[end:])
    module = _Scope()
    for statement in re.split(r";|\n", "".join(outside)):
        _global(statement.strip(), module)
    return {
        found.group(1): _kernel(found, body, module, text.count("\n", 0, found.end()) + 1)
        for found, body in kernels
    }


def _closing(text: str, start: int) -> int:
    depth = 1
    for at in re.finditer(r"[{}]", text[start:]):
        depth += 1 if at.group() == "{" else -1
        if not depth:
            return start + at.end()
    raise PTXError("a kernel has no end")


@dataclass
class _Scope:
    shared: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    dynamic: str | None = None
    align: int = 16

    def variable(self, statement: str) -> bool:
        found = _VARIABLE.match(statement)
        if not found:
            return False
        extern, align, kind, name, count = found.groups()
        self.align = max(self.align, int(align or 1))
        if extern:
            self.dynamic = name
        else:
            unit = int(align or SIZES[kind])
            self.shared[name] = -(-self.bytes // unit) * unit
            self.bytes = self.shared[name] + SIZES[kind] * int(count or 1)
        return True


def _global(statement: str, module: _Scope) -> None:
    # Nothing here reads a global variable: its name is then unknown to the machine.
    known = (".version", ".target", ".address_size", ".global")
    if statement and not statement.startswith(known) and not module.variable(statement):
        raise PTXError(f"outside of kernels: {statement!r}")


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for part in filter(None, (p.strip() for p in text.strip("()").split(","))):
        match = _PARAMETER.match(part)
        if not match:
            raise PTXError(f"parameter {part!r}")
        align, kind, name, count = match.groups()
        unit = int(align or SIZES[kind])
        offset = -(-offset // unit) * unit
        found.append(Parameter(name, offset, SIZES[kind] * int(count or 1)))
        offset += found[-1].size
    return found


def _kernel(header: re.Match[str], body: str, module: _Scope, line: int) -> Kernel:
    own = _Scope(dict(module.shared), module.bytes, module.dynamic, module.align)
    name = header.group(1)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", header.group(3))
    kernel = Kernel(
        name=name,
        parameters=_parameters(header.group(2) or ""),
        blocks=[[]],
        targets={},
        registers={},
        prefixes={},
        shared={},
        shared_bytes=0,
        threads=int(threads.group(1)) if threads else None,
    )
    scopes: list[dict[str, str]] = [{}]  # registers of inner braces get names of their own
    inner = at = 0
    while True:
        space = _SPACE.match(body, at)
        assert space is not None
        line += space.group().count("\n")
        at = space.end()
        if at == len(body):
            break
        here = line
        label = _LABEL.match(body, at)
        if body[at] == "{":
            inner += 1
            at += 1
            labels = _own_labels(body[at : _closing(body, at) - 1])
            scopes.append({name: f"{name}.{inner}" for name in labels})
        elif body[at] == "}":
            scopes.pop()
            at += 1
        elif label:
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            target = label.group(1)
            for renamed in scopes[1:]:
                target = renamed.get(target, target)
            kernel.targets[target] = len(kernel.blocks) - 1
            at = label.end()
        else:
            stop = body.index(";", at)
            statement = " ".join(body[at:stop].split())
            line += body.count("\n", at, stop)
            at = stop + 1
            if statement:
                _statement(kernel, statement, here, scopes, inner, own)
    kernel.shared, kernel.dynamic, kernel.shared_align = own.shared, own.dynamic, own.align
    kernel.shared_bytes = -(-own.bytes // 16) * 16
    if kernel.dynamic:
        kernel.shared[kernel.dynamic] = kernel.shared_bytes
    return kernel


def _own_labels(inside: str) -> list[str]:
    """Labels of a pair of braces, without those of inner ones and of braces around operands."""
    flat = inside
    while (once := re.sub(r"\{[^{}]*\}", "", flat)) != flat:
        flat = once
    return re.findall(r"(?:^|[;\s])([\w$%.]+):(?!:)", flat)


def _statement(
    kernel: Kernel,
    statement: str,
    line: int,
    scopes: list[dict[str, str]],
    inner: int,
    own: _Scope,
) -> None:
    if statement.startswith(".reg"):
        _, kind, names = statement.split(None, 2)
        for name in (n.strip() for n in names.split(",")):
            many = re.match(r"(\S+)<\d+>$", name)
            if many:
                kernel.prefixes[many.group(1)] = kind[1:]
            elif len(scopes) > 1:
                scopes[-1][name] = f"{name}.{inner}"
                kernel.registers[f"{name}.{inner}"] = kind[1:]
            else:
                kernel.registers[name] = kind[1:]
        return
    if statement.startswith(".pragma") or own.variable(statement):
        return
    if statement.startswith("."):
        raise PTXError(f"{kernel.name}, line {line}: {statement!r}")
    for renamed in scopes[1:]:
        for old, new in renamed.items():
            statement = re.sub(rf"(?<![\w$%.]){re.escape(old)}(?![\w$.])", new, statement)
    guard = re.match(r"@(!?)(\S+)\s+", statement)
    rest = statement[guard.end() :] if guard else statement
    opcode, _, operands = rest.partition(" ")
    if opcode.startswith(_TRIES) and kernel.blocks[-1]:
        kernel.blocks.append([])
    kernel.blocks[-1].append(
        Instruction(
            line,
            statement,
            guard.group(2) if guard else None,
            bool(guard and guard.group(1)),
            opcode,
            tuple(split(operands)),
        )
    )
    if opcode.split(".")[0] in _ENDS:
        kernel.blocks.append([])


def split(operands: str) -> list[str]:
    """Operands at the commas that are in no brackets."""
    found, depth, last = [], 0, 0
    for i, c in enumerate(operands):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            found.append(operands[last:i].strip())
            last = i + 1
    found.append(operands[last:].strip())
    return [f for f in found if f]
