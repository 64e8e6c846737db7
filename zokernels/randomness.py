"""torch's random state: branches that run one after another draw the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def rewinder(devices: Iterable[torch.device]) -> Callable[[], None]:
    """A function that sets the random state of the CPU and of ``devices`` to what it is now."""
    cpu = torch.get_rng_state()
    accelerators = [
        (torch.get_device_module(device), device)
        for device in dict.fromkeys(devices)
        if device.type != "cpu"
    ]
    states = [module.get_rng_state(device) for module, device in accelerators]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for (module, device), state in zip(accelerators, states, strict=True):
            module.set_rng_state(state, device)

    return rewind
