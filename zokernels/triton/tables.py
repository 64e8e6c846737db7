"""Tables that let one launch serve many tensors: who owns a tile, and where its data is.

A table depends on addresses and shapes alone and is kept: an update of the same parameters copies
nothing. The kernels say what its columns are (``FIELDS``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernels.deferred import recording
from zokernels.triton.launch import cdiv

# Rows of a tile of displace, update_ and project.
TILE_ROWS = 8
# Tables of the tensors used last: a pending update that no product makes has one for each weight.
_KEPT = 1024


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and layout class, as one launch takes them.

    Attributes:
        table: int64, a row a tensor.
        owners: int32, the row of every tile's tensor.
        tiles: their number.
        like: an empty tensor of the dtype. The tensors themselves are not kept alive.
        dense: the layout class.
    """

    table: Tensor
    owners: Tensor
    tiles: int
    like: Tensor
    dense: bool


def group(
    entries: Sequence[tuple[int, ...]], counts: Sequence[int], like: Tensor, dense: bool
) -> Group:
    """A group of tensors whose rows of the table are ``entries``, with ``counts`` tiles each."""
    device = like.device
    index = torch.arange(len(counts), dtype=torch.int32, device=device)
    total = sum(counts)
    owners = torch.repeat_interleave(
        index, _to_device(torch.tensor(counts), device), output_size=total
    )
    table = _to_device(torch.tensor(entries, dtype=torch.int64), device)
    return Group(table, owners, total, like.new_empty(0), dense)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copied without waiting for the device."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


_groups: dict[Hashable, list[Group]] = {}
# Tables that CUDA graphs read: they must outlive every replay.
_captured: list[list[Group]] = []


def kept(key: Hashable, device: torch.device, make: Callable[[], list[Group]]) -> list[Group]:
    """The groups of a key (addresses, shapes, ids), made once.

    Raises:
        RuntimeError: they would have to be copied to the device in a CUDA graph.
    """
    found = _groups.get(key)
    graph = recording(device)
    if found is None and graph:
        raise RuntimeError(
            "update_, sparse_update_, project and displace_vectors copy a table of their tensors "
            "to the device: call them once with the same tensors before capturing a CUDA graph"
        )
    if found is None:
        found = make()
        while len(_groups) >= _KEPT:
            del _groups[next(iter(_groups))]
        _groups[key] = found
    if graph and all(found is not known for known in _captured):
        _captured.append(found)
    return found


def grouped(
    matrices: Sequence[Tensor],
    param_ids: Sequence[int],
    row_offsets: Sequence[int],
    col_offsets: Sequence[int],
    *,
    tile_rows: int = TILE_ROWS,
) -> list[Group]:
    """Groups of whole matrices; rows as :mod:`zokernels.triton.update` has them."""
    key = (
        tile_rows,
        tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in matrices),
        tuple(param_ids),
        tuple(row_offsets),
        tuple(col_offsets),
        matrices[0].device,
    )

    def make() -> list[Group]:
        classes: dict[tuple[torch.dtype, bool], list[tuple[Tensor, int, int, int, int]]] = {}
        start = 0
        for i, matrix in enumerate(matrices):
            if matrix.numel():
                col0 = col_offsets[i] if col_offsets else 0
                row0 = row_offsets[i] if row_offsets else 0
                kind = matrix.dtype, _dense(matrix, col0) and tile_rows > 1
                classes.setdefault(kind, []).append((matrix, param_ids[i], row0, col0, start))
                start += matrix.numel()
        return [_matrices(members, dense, tile_rows) for (_, dense), members in classes.items()]

    return kept(key, matrices[0].device, make)


def _dense(tensor: Tensor, col0: int) -> bool:
    """Whether rows can be read sixteen bytes at a time."""
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) % 16 == 0
        and tensor.shape[1] % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and col0 % 512 == 0
    )


def _matrices(
    members: Sequence[tuple[Tensor, int, int, int, int]], dense: bool, tile_rows: int
) -> Group:
    entries, counts, first = [], [], 0
    for tensor, param_id, row0, col0, start in members:
        rows, cols = tensor.shape
        pairs = cdiv(col0 % 512 + cols, 512)
        place = (row0, col0 // 512, col0 % 512, pairs, first, start)
        entries.append((tensor.data_ptr(), rows, cols, *tensor.stride(), param_id, *place))
        counts.append(cdiv(rows, tile_rows) * pairs)
        first += counts[-1]
    return group(entries, counts, members[0][0], dense)
