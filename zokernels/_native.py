"""What the adapters of the compiled backends share."""

from __future__ import annotations

import torch
from torch import Tensor

# As in csrc/cpu/kernels.h and csrc/cuda/kernels.h.
DISTRIBUTION = {"gaussian": 0, "rademacher": 1}


def written(tensors: list[Tensor]) -> None:
    """Tell torch what was written behind its back, as an in-place operator would."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def check_index(name: str, index: Tensor, size: int, also: str = "") -> None:
    """Raise the reference's IndexError when an index is out of range."""
    if index.numel() == 0:
        return
    low, high = torch.stack(index.aminmax()).tolist()  # one transfer from a device
    if low < 0 or high >= size:
        raise IndexError(
            f"{name} must be in [0, {size}){also}; got values from {low} to {high}"
        ) from None
