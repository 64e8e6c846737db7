"""Registers of a warpgroup's product in flight, in machine code for compute capability 9.0.

Assemblers have given registers of a left factor to something else while a product still read them
(CUDA 12.9; fixed in 13.3, as its release notes say).
"""

from __future__ import annotations

import re

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;", re.M)
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\S* R(\d+), (?:R(\d+)|gdesc)")
_GUARD = re.compile(r"^@!?U?P\w+ ")
_WIDE = ((r"\.128|\.M88", 4), (r"\.64|\.WIDE", 2))  # registers that a name may stand for


def used_in_flight(listing: str) -> list[str]:
    """Instructions between a product and a wait that name a register of it.

    Args:
        listing: one kernel, as ``cuobjdump -sass`` prints it.
    """
    code = [(int(at, 16), text) for at, text in _LINE.findall(listing)]
    number = {at: i for i, (at, _) in enumerate(code)}
    found = []
    for i, (_, text) in enumerate(code):
        product = _PRODUCT.search(text)
        if not product:
            continue
        width, sums, left = product.groups()
        held = set(range(int(sums), int(sums) + int(width) // 2))
        held |= set(range(int(left), int(left) + 4)) if left else set()
        found += [f"{code[j][1]}  (behind {text})" for j in _behind(code, number, i, held)]
    return found


def _named(text: str) -> set[int]:
    name = _GUARD.sub("", text).split()[0]
    each = next((n for pattern, n in _WIDE if re.search(pattern, name)), 1)
    names = [int(r) for r in re.findall(r"\bR(\d+)", text)]
    if ".WIDE" in name:  # the factors are of 32 bits
        wide = re.findall(r"\.WIDE\S* R(\d+)|, R(\d+)$", text)
        return {*names, *(int(a or b) + 1 for a, b in wide)}
    pairs = {int(r) + 1 for r in re.findall(r"\bR(\d+)\.64\b", text)}  # addresses
    data = re.findall(r"\bR(\d+)", re.sub(r"\[.*?\]", "", text))
    return {*names, *(int(r) + i for r in data for i in range(each))} | pairs


def _behind(
    code: list[tuple[int, str]], number: dict[int, int], start: int, held: set[int]
) -> list[int]:
    """Where ``held`` is named on any way from ``start`` to a wait; other products may."""
    found, seen, ways = [], set(), [start + 1]
    while ways:
        j = ways.pop()
        while j < len(code) and j not in seen:
            seen.add(j)
            text = code[j][1]
            name = _GUARD.sub("", text).split()[0]
            if name.startswith("WARPGROUP.DEPBAR"):
                break
            if not name.startswith("HGMMA") and held & _named(text):
                found.append(j)
            target = re.search(r"\b(0x[0-9a-f]+)$", text) if name.startswith("BRA") else None
            if target:
                ways.append(number[int(target.group(1), 16)])
            if name.startswith(("BRA", "EXIT")) and not re.search(r"\bU?P\d", text):
                break
            j += 1
    return found
