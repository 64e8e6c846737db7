"""A model bound for zeroth-order evaluation: which parameters move, under which ids.

A :class:`Binding` fixes the trainable parameters of a model: their qualified names, their ids in
the noise contract, and every place in the module tree that holds them (a tied weight has several
places and one id). It is checked before every use, so that a model changed since then is an error
and not a wrong number.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernels._checks import DTYPES
from zokernels.noise import matrix_shape, parameter_ids

Selection = Iterable[str] | Callable[[str, nn.Parameter], bool] | None


BUSY = (
    "an evaluation at branches of this model is already active: evaluations of one model do not "
    "nest and do not run on several threads"
)


class ModelChangedError(RuntimeError):
    """A bound model's parameters were replaced, resized, moved or converted."""


@dataclass(frozen=True)
class BoundParameter:
    """One trainable parameter and where the module tree holds it."""

    name: str
    id: int
    tensor: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    places: tuple[tuple[dict[str, nn.Parameter | None], str], ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns in the noise contract."""
        return matrix_shape(self.shape)


def unwrap(model: nn.Module) -> nn.Module:
    """The module under DistributedDataParallel, DataParallel and ``torch.compile`` wrappers.

    Names, and so noise, do not depend on how a model is wrapped.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


class Binding:
    """The trainable parameters of ``model``, checked and identified.

    Args:
        model: any module; parameters that are shared count once, under their first name.
        params: which parameters move: names, a predicate ``(name, parameter) -> bool``, or None for
            those with ``requires_grad``.

    Raises:
        ValueError: no parameter is selected, a name is unknown, two names share an id, or a
            selected parameter is on the meta device (not loaded, or offloaded).
        TypeError: a selected parameter is not float32, bfloat16 or float16, or a module is
            TorchScript.
    """

    def __init__(self, model: nn.Module, params: Selection = None) -> None:
        self.model = unwrap(model)
        self.lock = _slot(self.model).lock  # held while the parameters are replaced
        if self.lock.locked():
            raise RuntimeError(BUSY)
        named = dict(self.model.named_parameters())
        if params is None:
            names = [n for n, p in named.items() if p.requires_grad]
        elif callable(params):
            names = [n for n, p in named.items() if params(n, p)]
        else:
            asked = [params] if isinstance(params, str) else list(params)
            unknown = [n for n in asked if n not in named]
            if unknown:
                raise ValueError(
                    f"params must name parameters of the model; unknown: {unknown[:5]}"
                )
            chosen = set(asked)
            names = [n for n in named if n in chosen]
        if not names:
            raise ValueError(
                "params selects no parameter: the model has no trainable parameter "
                "(requires_grad), or the selection matches none"
            )
        for name in names:
            _check_parameter(name, named[name])
        ids = parameter_ids(names)

        places: dict[int, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"module {path or type(self.model).__name__!r} is TorchScript, whose "
                    f"parameters cannot be exchanged: bind the model before scripting"
                )
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module._parameters, key))
        self.params: tuple[BoundParameter, ...] = tuple(
            BoundParameter(
                name,
                ids[name],
                named[name],
                named[name].shape,
                named[name].dtype,
                named[name].device,
                tuple(places[id(named[name])]),
            )
            for name in names
        )
        self.by_name = {p.name: p for p in self.params}
        # What hangs where in the module tree, to notice an exchanged module.
        self._children = tuple(
            (module._modules, key, child)
            for module in self.model.modules()
            for key, child in module._modules.items()
        )
        # Recurrent modules keep a second list of their parameters.
        self.recurrent = tuple(
            m for m in self.model.modules() if isinstance(getattr(m, "_flat_weights", None), list)
        )

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return sum(p.tensor.numel() for p in self.params)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.params[0].device

    def check(self) -> None:
        """Raise when the model is no longer the one that was bound.

        Raises:
            ModelChangedError: a parameter was replaced, resized, moved or converted.
        """
        for holder, key, child in self._children:
            if holder.get(key) is not child:
                raise ModelChangedError(
                    f"module {key!r} was replaced after the model was bound: bind the model again"
                )
        for p in self.params:
            if (
                p.tensor.shape != p.shape
                or p.tensor.dtype != p.dtype
                or p.tensor.device != p.device
            ):
                raise ModelChangedError(
                    f"parameter {p.name!r} was {tuple(p.shape)} {p.dtype} on {p.device} when the "
                    f"model was bound and is {tuple(p.tensor.shape)} {p.tensor.dtype} on "
                    f"{p.tensor.device} now: bind the model again"
                )
            for place, key in p.places:
                if place.get(key) is not p.tensor:
                    raise ModelChangedError(
                        f"parameter {p.name!r} was replaced after the model was bound: bind the "
                        f"model again"
                    )

    def groups(self) -> list[list[BoundParameter]]:
        """Parameters split by device, as the multi-tensor ops take them."""
        groups: dict[torch.device, list[BoundParameter]] = {}
        for p in self.params:
            groups.setdefault(p.device, []).append(p)
        return list(groups.values())


@contextlib.contextmanager
def exchanged(
    params: Sequence[BoundParameter], storage: Callable[[BoundParameter, Tensor], Tensor]
) -> Iterator[None]:
    """Give parameters other storage, ``storage(parameter, data)``, for a while.

    The weights stay where they are and come back at the end, also after an error.
    """
    kept = [p.tensor.data for p in params]
    try:
        for p, data in zip(params, kept, strict=True):
            p.tensor.data = storage(p, data)
        yield
    finally:
        for p, data in zip(params, kept, strict=True):
            p.tensor.data = data


def _check_parameter(name: str, parameter: Tensor) -> None:
    if getattr(parameter, "is_stand_in", False):
        raise RuntimeError(BUSY)  # a part of a model that is being evaluated
    if parameter.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device (not loaded, or offloaded): load it before "
            f"binding, or leave it out of params"
        )
    if parameter.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name!r} has dtype {parameter.dtype}; trainable parameters must be "
            f"float32, bfloat16 or float16 (leave quantised or integer ones out of params)"
        )
    if parameter.layout is not torch.strided:
        raise TypeError(f"parameter {name!r} must be a strided tensor; got {parameter.layout}")


# Selections of a model whose bindings are kept: a new subset at every step must not pile up.
_KEPT = 8


class _Slot:
    """A model's bindings and its lock, kept on the model: all die together, copies start empty."""

    KEY = "_zokernels_binding"

    def __init__(self) -> None:
        self.binding: Binding | None = None  # of the parameters that require gradients
        self.selections: OrderedDict[tuple[str, ...], Binding] = OrderedDict()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> _Slot:
        return _Slot()

    def __reduce__(self) -> tuple[type[_Slot], tuple[()]]:
        return _Slot, ()


def _slot(model: nn.Module) -> _Slot:
    slot: _Slot = model.__dict__.setdefault(_Slot.KEY, _Slot())
    return slot


def _kept(slot: _Slot, fresh: Binding) -> Binding:
    """The binding of the same selection that is already there, with all that is known about it."""
    names = tuple(fresh.by_name)
    found = slot.selections.get(names)
    if found is None or found.model is not fresh.model or not _same(found, fresh):
        found = slot.selections[names] = fresh
    slot.selections.move_to_end(names)
    while len(slot.selections) > _KEPT:
        slot.selections.popitem(last=False)
    return found


def _same(a: Binding, b: Binding) -> bool:
    return all(
        p.tensor is q.tensor
        and (p.shape, p.dtype, p.device) == (q.shape, q.dtype, q.device)
        and [(id(holder), key) for holder, key in p.places]
        == [(id(holder), key) for holder, key in q.places]
        for p, q in zip(a.params, b.params, strict=True)
    )


def bind(model: nn.Module | Binding, params: Selection = None) -> Binding:
    """A binding of ``model``: given ones are checked, new ones are kept on the model.

    Args:
        model: module, or a binding (then ``params`` must be None).
        params: see :class:`Binding`.

    Raises:
        ModelChangedError: a given binding no longer fits its model.
        ValueError, TypeError: as :class:`Binding`.
    """
    if isinstance(model, Binding):
        if params is not None:
            raise ValueError("params must be None when a Binding is given: it has its own")
        model.check()
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a Binding; got {type(model).__name__}")
    model = unwrap(model)
    slot = _slot(model)
    if params is not None:
        return _kept(slot, Binding(model, params))
    cached = slot.binding
    if cached is not None and cached.model is model:
        trainable = [id(p) for p in model.parameters() if p.requires_grad]
        try:
            cached.check()
        except ModelChangedError:
            pass
        else:
            if trainable == [id(p.tensor) for p in cached.params]:
                return cached
    slot.binding = Binding(model)
    return slot.binding
