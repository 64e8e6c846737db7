"""What the adapters of the compiled backends share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

# As in csrc/cpu/kernels.h and csrc/cuda/kernels.h.
DISTRIBUTION = {"gaussian": 0, "rademacher": 1}


def written(tensors: list[Tensor]) -> None:
    """Tell torch what was written behind its back, as an in-place operator would."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def put_back(tensors: list[Tensor], copies: list[Tensor]) -> None:
    """Tensors as the kernels left them: from their copies, where these have other memory."""
    for tensor, copy in zip(tensors, copies, strict=True):
        if copy.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(copy.view(tensor.shape))
    written(tensors)


def plain_product(
    x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """torch's product with a weight as it is, and the bias that is added after a correction.

    A bias ``[out]`` is in the product, one ``[G, out]`` is left.
    """
    early, late = (bias, None) if bias is None or bias.dim() == 1 else (None, bias.contiguous())
    return F.linear(x, w.t() if transposed else w, early), late


def remembered(plan: Callable[..., T]) -> Callable[..., T]:
    """A native function of sizes alone; a call through the dispatcher takes two microseconds."""
    return functools.lru_cache(maxsize=4096)(plan)


def check_index(name: str, index: Tensor, size: int, also: str = "") -> None:
    """Raise the reference's IndexError when an index is out of range."""
    if index.numel() == 0:
        return
    low, high = torch.stack(index.aminmax()).tolist()  # one transfer from a device
    if low < 0 or high >= size:
        raise IndexError(
            f"{name} must be in [0, {size}){also}; got values from {low} to {high}"
        ) from None


class ByList:
    """What was worked out from lists of indices, as long as they live and are not written to."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, indices: Tensor, key: object, make: Callable[[], T], *, keep: bool) -> T:
        """``make()``, or what it gave for this list and ``key`` before.

        Args:
            keep: False while a CUDA graph is recorded: what is made then lives in its memory.

        Writes to inference tensors are not counted, so nothing is kept of them.
        """
        if indices.is_inference():
            return make()
        values: dict[object, Any] = {}
        known = self._known.get(indices)
        if known is not None and known[0] == indices._version:
            values = known[1]
        if key not in values:
            value = make()
            if not keep:
                return value
            values[key] = value
            self._known[indices] = (indices._version, values)
        found: T = values[key]
        return found
