"""Random states: evaluations of one step that run one after another draw the same numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
import torch


def rewinder(devices: Iterable[torch.device]) -> Callable[[], None]:
    """A function that sets the random states to what they are now.

    They are torch's of the CPU and of ``devices``, and the global ones of Python and NumPy, which
    draw the time masks of speech models and the layers that some models drop.
    """
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    accelerators = [
        (torch.get_device_module(device), device)
        for device in dict.fromkeys(devices)
        if device.type != "cpu"
    ]
    states = [module.get_rng_state(device) for module, device in accelerators]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        for (module, device), state in zip(accelerators, states, strict=True):
            module.set_rng_state(state, device)

    return rewind
