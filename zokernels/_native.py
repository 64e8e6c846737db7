"""What the adapters of the C++ backend share."""

from __future__ import annotations

import torch
from torch import Tensor

# As in csrc/cpu/kernels.h.
DISTRIBUTION = {"gaussian": 0, "rademacher": 1}


def written(tensors: list[Tensor]) -> None:
    """Tell torch what was written behind its back, as an in-place operator would."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def check_index(name: str, index: Tensor, size: int, also: str = "") -> None:
    """Raise the reference's IndexError when an index is out of range."""
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
        raise IndexError(
            f"{name} must be in [0, {size}){also}; got values from {int(index.min())} to "
            f"{int(index.max())}"
        ) from None
