"""In which order threads that parted go on: where paths meet again the first wait for the last."""

from __future__ import annotations

from ptx.parser import Kernel


def _successors(kernel: Kernel) -> list[list[int]]:
    found = []
    for number, block in enumerate(kernel.blocks):
        last = block[-1] if block else None
        ends = last.opcode.split(".")[0] if last else ""
        after = [number + 1] if number + 1 < len(kernel.blocks) else []
        if last and ends == "bra":
            after = [kernel.targets[last.operands[0]]] + (after if last.guard else [])
        elif last and ends in ("ret", "exit", "trap") and not last.guard:
            after = []
        found.append(after)
    return found


def _loops(successors: list[list[int]]) -> dict[int, int]:
    """Head of a loop -> its blocks, as bits. A head is on every way to the end of its loop."""
    n = len(successors)
    before: list[list[int]] = [[] for _ in range(n)]
    for block, after in enumerate(successors):
        for b in after:
            before[b].append(block)
    everything = (1 << n) - 1
    dominators = [1] + [everything] * (n - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, n):
            common = everything
            for b in before[block]:
                common &= dominators[b]
            common |= 1 << block
            changed |= common != dominators[block]
            dominators[block] = common
    loops: dict[int, int] = {}
    for block, after in enumerate(successors):
        for head in after:
            if dominators[block] >> head & 1:
                inside, left = 1 << head, [block]
                while left:
                    b = left.pop()
                    if not inside >> b & 1:
                        inside |= 1 << b
                        left += before[b]
                loops[head] = loops.get(head, 0) | inside
    return loops


def ranks(kernel: Kernel) -> list[float]:
    """Of each block: threads at the lowest go first.

    Blocks stand behind all that lead to them (reverse postorder, a loop before what follows it);
    the head of a loop stands behind the loop, so that nobody goes round before the others.
    """
    successors = _successors(kernel)
    loops = _loops(successors)

    def shared(a: int, b: int) -> int:
        """How many loops hold both."""
        return sum(body >> a & body >> b & 1 for body in loops.values())

    order: list[int] = []
    seen = {0}
    # What leaves most loops is visited first, so it is finished first, so it comes last.
    stack = [(0, sorted(successors[0], key=lambda b: -shared(0, b)))]
    while stack:
        block, left = stack[-1]
        while left and left[-1] in seen:
            left.pop()
        if left:
            b = left.pop()
            seen.add(b)
            stack.append((b, sorted(successors[b], key=lambda c, b=b: -shared(b, c))))
        else:
            order.append(block)
            stack.pop()
    found = [float("inf")] * len(kernel.blocks)
    for rank, block in enumerate(reversed(order)):
        found[block] = float(rank)
    behind = {
        head: max(found[b] for b in range(len(found)) if body >> b & 1 and found[b] < float("inf"))
        for head, body in loops.items()
    }
    for head, rank in behind.items():
        found[head] = rank + 0.5
    return found
