"""Memory of tensors as address ranges."""

from __future__ import annotations

import atexit
import gc
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from ptx.memory import Ranges

# Tensors older than what the collector still looks at.
_old: list[weakref.ref[Tensor]] = []
_MANY = 50_000


def ranges(tensors: Iterable[Tensor]) -> Ranges:
    """Whole storages: a kernel is given strides, not where a view ends."""
    found = []
    for t in tensors:
        storage = t.untyped_storage()
        if storage.nbytes():
            found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return found


def living() -> Ranges:
    """Every CPU tensor there is: kernels find some through tables of addresses.

    All objects of a process with torch are too many to look at for each launch, so those found
    before are frozen, and their tensors remembered.
    """
    objects = gc.get_objects()
    new = [o for o in objects if type(o) in (Tensor, Parameter)]  # others may have no memory
    if len(objects) > _MANY:
        _old.extend(map(weakref.ref, new))
        gc.freeze()
        atexit.register(gc.unfreeze)  # what is left is collected at the end, as always
        new = []
    old = [t for t in (r() for r in _old) if t is not None]
    on_cpu = (t for t in old + new if t.layout is torch.strided and t.device.type == "cpu")
    return ranges(on_cpu)
