"""What a model keeps of an evaluation: attributes and buffers that its forward pass sets.

Inside a stacked evaluation such a tensor holds the values of all branches, and outside it cannot be
used, copied or saved. It is put back on the first use of a model, and later replaced by the values
of the first branch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch as functorch


class Kept:
    """The places where a model keeps what it computed.

    It holds no module: what is known about a model must not keep it alive.
    """

    def __init__(self) -> None:
        self._places: list[tuple[weakref.ref[nn.Module], str, str]] = []

    def look(self, model: nn.Module) -> Callable[[], None]:
        """Note what the modules hold now; the function that is returned finds what a stacked
        evaluation has left in them, and puts back what was there."""
        before = [
            (module, slot, dict(getattr(module, slot)))
            for module in model.modules()
            for slot in ("__dict__", "_buffers")
        ]

        def put_back() -> None:
            for module, slot, values in before:
                holder: dict[str, Any] = getattr(module, slot)
                for name in [n for n, value in holder.items() if _stacked(value)]:
                    place = (weakref.ref(module), slot, name)
                    if place not in self._places:
                        self._places.append(place)
                    if name in values:
                        holder[name] = values[name]
                    else:
                        del holder[name]

        return put_back

    def settle(self) -> None:
        """Replace what a stacked evaluation has left by the values of its first branch."""
        for reference, slot, name in self._places:
            holder: dict[str, Any] = getattr(reference(), slot, {})
            value = holder.get(name)
            if value is not None and _stacked(value):
                branches = functorch.get_unwrapped(value)
                holder[name] = branches.select(functorch.maybe_get_bdim(value), 0)


def _stacked(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(functorch.is_batchedtensor(value))
