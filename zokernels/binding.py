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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zokernels._checks import DTYPES
from zokernels.masks import Mask
from zokernels.noise import parameter_ids
from zokernels.pending import PendingUpdate
from zokernels.selection import Selection, selected, unwrap
from zokernels.subset import BoundParameter, Masked, ModelChangedError, Subset

__all__ = [
    "Binding",
    "BoundParameter",
    "ModelChangedError",
    "Selection",
    "bind",
    "exchanged",
    "unwrap",
]

BUSY = (
    "an evaluation at branches of this model is already active: evaluations of one model do not "
    "nest and do not run on several threads"
)

_AGAIN = "bind the model again (a new optimizer can load the state of the old one)"


class Binding(Subset):
    """The trainable parameters of ``model``, checked and identified: the trained subset.

    Args:
        model: any module; parameters that are shared count once, under their first name.
        params: which parameters move: names, a predicate ``(name, parameter) -> bool``, or None for
            those with ``requires_grad``.
        mask: only the elements of a :class:`~zokernels.Mask` move, whatever requires gradients;
            ``params`` must then be None.

    Raises:
        ValueError: no parameter is selected, a name is unknown, two names share an id, or a
            selected parameter is on the meta device (not loaded, or offloaded).
        MaskMismatchError: the mask has parameters that the model has not, or of other shapes.
        TypeError: a selected parameter is not float32, bfloat16 or float16, or no plain tensor (a
            shard), or a module is TorchScript or FullyShardedDataParallel.
    """

    def __init__(
        self, model: nn.Module, params: Selection = None, mask: Mask | None = None
    ) -> None:
        self.model = unwrap(model)
        slot = _slot(self.model)
        self.lock = slot.lock  # held while the parameters are replaced
        if self.lock.locked():
            raise RuntimeError(BUSY)
        self.pending = slot.pending
        self.mask = mask
        if mask is None:
            named = selected(self.model, params)
        else:
            _no_params_with_mask(params)
            held = dict(self.model.named_parameters())
            mask.check(held)
            # In the model's order: the order of a mask's file means nothing.
            named = {n: p for n, p in held.items() if mask.touches(n)}
        names = list(named)
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
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
                raise TypeError(
                    f"module {path or type(self.model).__name__!r} is FullyShardedDataParallel, "
                    f"which holds shards of parameters: every process needs them whole"
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
                None if mask is None else masked_part(mask, name, named[name]),
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
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.params[0].device

    def check(self) -> None:
        """Raise when the model is no longer the one that was bound; make its pending update.

        Raises:
            ModelChangedError: a parameter was replaced, resized, moved or converted.
            RuntimeError: an evaluation of the model is active.
        """
        if self.lock.locked():
            raise RuntimeError(BUSY)
        self.pending.settle()
        for holder, key, child in self._children:
            if holder.get(key) is not child:
                raise ModelChangedError(
                    f"module {key!r} was replaced after the model was bound: {_AGAIN}"
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
                    f"{p.tensor.device} now: {_AGAIN}"
                )
            for place, key in p.places:
                if place.get(key) is not p.tensor:
                    raise ModelChangedError(
                        f"parameter {p.name!r} was replaced after the model was bound: {_AGAIN}"
                    )


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


def masked_part(mask: Mask, name: str, tensor: Tensor) -> Masked:
    """The elements of a parameter that a mask moves; the shadow begins as what they are."""
    indices = mask.indices[name].to(tensor.device)
    return Masked(indices, torch.take(tensor.detach(), indices).float(), mask.digest(name))


def _no_params_with_mask(params: Selection) -> None:
    if params is not None:
        raise ValueError("params must be None when a mask is given: the mask says what moves")


def _check_parameter(name: str, parameter: Tensor) -> None:
    if getattr(parameter, "is_stand_in", False):
        raise RuntimeError(BUSY)  # a part of a model that is being evaluated
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"parameter {name!r} has no shape yet: run the model once before binding")
    if is_traceable_wrapper_subclass(parameter):
        raise TypeError(
            f"parameter {name!r} is a {type(parameter).__name__}; trainable parameters must be "
            f"plain tensors, no shards (of FSDP or tensor parallelism) and not quantised"
        )
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
    """A model's bindings, lock and pending update, kept on the model: all die together, copies
    start empty.
    """

    KEY = "_zokernels_binding"

    def __init__(self, model: nn.Module) -> None:
        self.binding: Binding | None = None  # of the parameters that require gradients
        self.selections: OrderedDict[tuple[str, ...], Binding] = OrderedDict()
        self.masks: OrderedDict[str, Binding] = OrderedDict()  # by fingerprint
        self.lock = threading.Lock()
        self.pending = PendingUpdate(model)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Too late to make the update: the parameters may be copied already.
        if self.pending:
            raise RuntimeError(
                "an update of this model is pending: call flush() of its optimizer before the "
                "model is copied or pickled"
            )
        return type(None), ()


def _slot(model: nn.Module) -> _Slot:
    slot: _Slot | None = model.__dict__.get(_Slot.KEY)
    if slot is None:
        slot = model.__dict__[_Slot.KEY] = _Slot(model)
    return slot


def _kept(slot: _Slot, fresh: Binding) -> Binding:
    """The binding of the same selection that is already there, with all that is known about it."""
    names = tuple(fresh.by_name)
    found = slot.selections.get(names)
    if found is None or found.model is not fresh.model or not _same(found, fresh):
        found = fresh
    _remember(slot.selections, names, found)
    return found


def _under_mask(slot: _Slot, model: nn.Module, mask: Mask) -> Binding:
    """The binding of a mask: the one that is already there has the shadow of its elements."""
    key = mask.fingerprint()
    found = slot.masks.get(key)
    if found is not None:
        try:
            found.check()
        except ModelChangedError:
            found = None
    if found is None or found.model is not model:
        found = Binding(model, mask=mask)
    _remember(slot.masks, key, found)
    return found


def _remember(kept: OrderedDict[Any, Binding], key: object, binding: Binding) -> None:
    kept[key] = binding
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)


def _same(a: Binding, b: Binding) -> bool:
    return all(
        p.tensor is q.tensor
        and (p.shape, p.dtype, p.device) == (q.shape, q.dtype, q.device)
        and [(id(holder), key) for holder, key in p.places]
        == [(id(holder), key) for holder, key in q.places]
        for p, q in zip(a.params, b.params, strict=True)
    )


def bind(model: nn.Module | Binding, params: Selection = None, mask: Mask | None = None) -> Binding:
    """A binding of ``model``: given ones are checked, new ones are kept on the model.

    Args:
        model: module, or a binding (then ``params`` and ``mask`` must be None).
        params, mask: see :class:`Binding`.

    Raises:
        ModelChangedError: a given binding no longer fits its model.
        ValueError, TypeError: as :class:`Binding`.
    """
    if isinstance(model, Binding):
        for label, value in (("params", params), ("mask", mask)):
            if value is not None:
                raise ValueError(f"{label} must be None when a Binding is given: it has its own")
        model.check()
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a Binding; got {type(model).__name__}")
    model = unwrap(model)
    slot = _slot(model)
    if mask is not None:
        if not isinstance(mask, Mask):
            raise TypeError(f"mask must be a Mask or None; got {type(mask).__name__}")
        _no_params_with_mask(params)
        return _under_mask(slot, model, mask)
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
