"""Data parallelism: every rank evaluates its own batches, and only losses travel.

A step exchanges one float32 a branch. Seeds, coefficients and so the updates are the same on every
rank, and weights that were equal stay equal, bit for bit: nothing else needs to be sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zokernels.subset import BoundParameter

# Elements of a weight that are summed at a time: bounds the memory of a checksum.
_CHUNK = 1 << 22
_INTEGERS = {2: torch.int16, 4: torch.int32}


class RankMismatchError(RuntimeError):
    """The ranks of a process group would not make the same updates."""


def check_process_group(group: Any) -> dist.ProcessGroup | None:
    """A process group of which this process is a member, or None.

    Raises:
        TypeError: not a process group.
        ValueError: this process is not a member of the group.
    """
    if group is None:
        return None
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must have this process as a member")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup (such as "
            f"torch.distributed.group.WORLD after init_process_group) or None; got {group!r}"
        )
    return group


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean of equally shaped tensors of all ranks.

    Gathered and summed in the order of the ranks, so that every rank has the same bits whatever
    the backend does, and those of one process that takes the ranks' batches one after another.
    """
    count = dist.get_world_size(group)
    parts = [torch.empty_like(values) for _ in range(count)]
    dist.all_gather(parts, values.contiguous(), group=group)
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total / count


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bits and their places, computed where it is."""
    flat = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].long()
        places = torch.arange(start, start + bits.numel(), device=bits.device) % 65521 + 1
        total += torch.stack([bits.sum(), (bits * places).sum()])
    low, high = total.tolist()
    return int(low * 0x9E3779B97F4A7C15 + high) & 0xFFFFFFFFFFFFFFFF


def check_same(
    groups: Sequence[Iterable[BoundParameter]], facts: dict[str, Any], group: dist.ProcessGroup
) -> None:
    """Compare parameters, their values and other facts with the other ranks'.

    Args:
        groups: what moves, by parameter group.
        facts: whatever else an update depends on, by name.
        group: the ranks.

    Raises:
        RankMismatchError: on every rank; the message names what differs first, and where.
    """
    mine = dict(facts)
    for index, members in enumerate(groups):
        for p in members:
            held = [f"{tuple(p.shape)} {p.dtype} {checksum(p.tensor):016x}"]
            if p.masked is not None:
                held += [p.masked.digest, f"{checksum(p.masked.shadow):016x}"]
            mine[f"parameter {p.name!r} of group {index}"] = " ".join(held)
    digest = hashlib.sha256(repr(list(mine.items())).encode()).hexdigest()
    count = dist.get_world_size(group)
    digests: list[Any] = [None] * count
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) == 1:
        return
    theirs: list[Any] = [None] * count
    dist.all_gather_object(theirs, mine, group=group)
    rank = next(r for r, d in enumerate(digests) if d != digests[0])
    for name in {**theirs[0], **theirs[rank]}:
        first, other = theirs[0].get(name), theirs[rank].get(name)
        if first != other:
            raise RankMismatchError(
                f"ranks must move the same weights in the same way; {name} differs: {first} on "
                f"rank 0, {other} on rank {rank}"
            )
    raise RankMismatchError(f"ranks 0 and {rank} list what moves in another order")
