"""An update that waits for the next evaluation of its model, which makes it as it reads a weight.

Between two steps a weight is read and written by the update and read again by the probe. Where one
kernel does both (the op ``update_linear_``), the update of the last step may wait, and every weight
is read and written once a step. The numbers are those of an update made at once: it is elementwise,
and each weight meets it before anything else reads it.

Whatever uses the model otherwise makes the update first: its state dict, the ``forward`` of it and
of its modules down to the third level, and every evaluation, copy or update through this package.
What reads a parameter directly sees the weights of one update ago until then.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernels import _registry
from zokernels.subset import BoundParameter, update_


@dataclass(frozen=True, eq=False, slots=True)
class PendingTerm:
    """One term of an update: ``w = round(decay w + coeff z(seed))``.

    Attributes:
        seed: int64 ``[1]``.
        coeff: float32 ``[1]``.
        decay: float32 ``[1]``, or None for 1.
        distribution, rounding: as in ``update_``.
    """

    seed: Tensor
    coeff: Tensor
    decay: Tensor | None
    distribution: str
    rounding: str


class _Settle:
    """A hook that makes a pending update; it holds no optimizer, and a copied model's does nothing.

    It changes nothing that a module computes.
    """

    def __init__(self, update: PendingUpdate | None = None) -> None:
        self._update = (lambda: None) if update is None else weakref.ref(update)

    def __call__(self, *_: object) -> None:
        update = self._update()
        if update is not None:
            update.settle()

    def __reduce__(self) -> tuple[type[_Settle], tuple[()]]:
        return _Settle, ()


def only_settles(hooks: Iterable[object]) -> bool:
    """Whether hooks are at most those of a pending update."""
    return all(isinstance(hook, _Settle) for hook in hooks)


class PendingUpdate:
    """The update that waits for a model's next evaluation, by parameter.

    Args:
        model: whose forward and state dict must not be seen without it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._waiting: dict[str, tuple[BoundParameter, PendingTerm]] = {}
        self._hooks: list[Callable[[], None]] = []
        self._evaluating = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def add(self, params: Iterable[BoundParameter], term: PendingTerm) -> None:
        """Let a term wait for parameters, after what waits for them is made."""
        params = list(params)
        self.make({p.name for p in params})
        self._waiting |= {p.name: (p, term) for p in params}
        model = self._model()
        if self._waiting and not self._hooks and model is not None:
            settle = _Settle(self)
            self._hooks = [
                model.register_state_dict_pre_hook(settle).remove,
                model.register_load_state_dict_pre_hook(settle).remove,
                *(m.register_forward_pre_hook(settle).remove for m in _upper(model)),
            ]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Evaluations inside make the update as they go, and the end makes what is left of it."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False
            self.make()

    @property
    def fuses(self) -> bool:
        """Whether evaluations may make it now, in the kernels that their products use anyway."""
        kinds = {p.device.type for p, _ in self._waiting.values()}
        return self._evaluating and all(_fuses(kind) for kind in kinds)

    def taken_by(
        self, x: Tensor, w: Tensor, coeffs: Tensor, shared: bool, distribution: str
    ) -> bool:
        """Whether a product of these, as for the op ``linear``, makes the update on its way.

        As far as its backend says; one that does not say always may.
        """
        if not self._evaluating or not _fuses(w.device.type):
            return False
        backend = _registry.backends()[_registry.serving("update_linear_", w.device.type)]
        takes = backend.takes_update
        return takes is None or takes(x, w, coeffs, shared, distribution)

    def get(self, name: str) -> PendingTerm | None:
        """The term that waits for a parameter. Who makes it says so by :meth:`done`."""
        found = self._waiting.get(name)
        return None if found is None else found[1]

    def done(self, names: Iterable[str]) -> None:
        """The update of these parameters is made."""
        for name in names:
            del self._waiting[name]
        if not self._waiting:
            for remove in self._hooks:
                remove()
            self._hooks = []

    def holds(self, terms: Mapping[str, PendingTerm]) -> bool:
        """Whether it is exactly this update."""
        return len(terms) == len(self._waiting) and all(
            name in self._waiting and self._waiting[name][1] is term for name, term in terms.items()
        )

    def make(self, names: Collection[str] | None = None, *, but: Collection[str] = ()) -> None:
        """Make the update of some parameters, one launch a group, or of all."""
        if not self._waiting:
            return
        groups: dict[int, tuple[PendingTerm, list[BoundParameter]]] = {}
        for name, (p, term) in self._waiting.items():
            if (names is None or name in names) and name not in but:
                groups.setdefault(id(term), (term, []))[1].append(p)
        for term, params in groups.values():
            update_(
                params,
                term.seed,
                term.coeff,
                term.decay,
                None,
                term.distribution,
                term.rounding,
            )
            self.done(p.name for p in params)

    def settle(self) -> None:
        """Make the update, unless an evaluation is making it.

        Raises:
            RuntimeError: while a graph is traced: the update would be a part of it.
        """
        if self._waiting and not self._evaluating:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "an update of this model is pending: call flush() of its optimizer before the "
                    "model is compiled or captured"
                )
            self.make()


def _fuses(device: str) -> bool:
    """Whether the backend of products has the op that updates too: with its own, same numbers."""
    name = _registry.serving("linear", device)
    op = "update_linear_"
    return op in _registry.backends()[name].kernels and _registry.serving(op, device) == name


def _upper(model: nn.Module, levels: int = 3) -> list[nn.Module]:
    """A model and its modules down to some level, each once."""
    found = {id(model): model}
    last = [model]
    for _ in range(levels):
        last = [child for module in last for child in module.children() if id(child) not in found]
        found |= {id(child): child for child in last}
    return list(found.values())
