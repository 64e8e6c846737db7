"""Bad indices that kernels find.

A kernel cannot raise, and to ask it means to wait for the device. It makes what it computes from
such an index NaN and leaves the index in pinned host memory; the next op that takes indices on that
device raises. So an ``IndexError`` comes late, as CUDA's own errors do, but it comes, and no step
waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = -(1 << 62)  # no index has this value


class Flags:
    """Of every device, where its kernels leave a bad index and its limit.

    Args:
        what: the indices, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._of: dict[torch.device, Tensor] = {}

    def of(self, device: torch.device) -> Tensor:
        """int64 ``[2]`` on the host, for the kernels of a device."""
        found = self._of.get(device)
        if found is None:
            found = torch.tensor([_NOTHING, 0], device="cpu")
            self._of[device] = found = found if device.type == "cpu" else found.pin_memory()
        return found

    def look(self, device: torch.device, what: str | None = None) -> None:
        """Raise what an earlier call left, without waiting for the device.

        Raises:
            IndexError: an index was outside its range. The results of that call are NaN there.
        """
        found = self._of.get(device)
        if found is None:
            return
        value, limit = found.tolist()
        if value != _NOTHING:
            found.numpy()[0] = _NOTHING  # it may be an inference tensor
            late = "" if device.type == "cpu" else " (of an earlier call: kernels run late)"
            raise IndexError(f"{what or self._what} must be in [0, {limit}); got {value}{late}")

    def wait(self, device: torch.device) -> None:
        """Wait for a device and raise what its kernels left.

        Raises:
            IndexError: as :meth:`look`.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
        self.look(device)
