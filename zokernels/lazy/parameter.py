"""Lazily displaced parameters: tensors that stand for ``W + sum_k C[g, k] z(s_k)``, never formed.

While a model is evaluated at branches, every moving parameter is replaced by a
:class:`LazyParameter`. It has the shape, dtype and device of the parameter and no data.
``__torch_function__`` sends the uses a transformer makes of a weight (``linear``, ``addmm``,
``embedding``, norms, elementwise arithmetic) to the ops; any other use gets the displaced tensor,
formed for that call and counted.

Branches are the examples of one ``torch.func.vmap``. A handler therefore takes the physical
``[G, ...]`` tensor out of vmap's wrapper, calls the multi-branch op, and puts the wrapper back.
Rules registered with ``torch.library.register_vmap`` would do the same for 66 us a call; by hand it
is 2 us.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from zokernels.pending import PendingTerm, PendingUpdate

# Parameters of at most this many elements (norm weights, biases, small tables) are displaced in
# float32 whatever their dtype: eps * z is below one bfloat16 ulp of a norm weight near 1.
SMALL = 1 << 16
# Elements of all vector parameters at all branches that are held during an evaluation (16 MiB).
VECTORS = 1 << 22

_ops = torch.ops.zokernels


# Factor of a parameter's coefficients, or K factors, one a seed.
Scale = float | tuple[float, ...]


def scaled(seeds: Tensor, coeffs: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Seeds ``[K]`` and coefficients ``[G, K]`` of a parameter, without seeds of factor 0."""
    if not isinstance(scale, tuple):
        return seeds, coeffs if scale == 1.0 else coeffs * scale
    used = [k for k, factor in enumerate(scale) if factor]
    return seeds[used], coeffs[:, used] * coeffs.new_tensor([scale[k] for k in used])


class UnsupportedUse(RuntimeError):
    """A use of a parameter that cannot be evaluated at several branches at once."""


class State:
    """What the lazy parameters of one binding stand for now.

    Attributes:
        level: vmap level of the stacked evaluation; None outside one, when there is one branch.
        seeds: int64 ``[K]``; coeffs: float32 ``[G, K]``; None when no evaluation is active.
        touched: names of the parameters that were used.
        materialised: how often each parameter was formed whole, by name.
        low_precision: autocast was on.
    """

    def __init__(self) -> None:
        self.level: int | None = None
        self.seeds: Tensor | None = None
        self.coeffs: Tensor | None = None
        self.scale: Mapping[str, Scale] = {}
        self.distribution = "gaussian"
        self.touched: set[str] = set()
        self.materialised: Counter[str] = Counter()
        self.low_precision = False
        # Whole one-dimensional parameters and their data.
        self.vectors: list[tuple[LazyParameter, Tensor]] = []
        self._formed: dict[str, Tensor] | None = None
        self._terms: dict[tuple[torch.device, Scale], tuple[Tensor, Tensor]] = {}
        self._kept: list[Tensor] = []
        self._pending: PendingUpdate | None = None
        # Parameters that the last evaluation with a pending update, and this one, read first by a
        # product that takes an update along.
        self._fusable: set[str] = set()
        self._seen: set[str] = set()

    def begin(
        self,
        seeds: Tensor,
        coeffs: Tensor,
        scale: Mapping[str, Scale],
        distribution: str,
        pending: PendingUpdate | None = None,
    ) -> None:
        """Start an evaluation; ``pending``: an update that it makes as it reads the weights."""
        self._pending = None
        if pending:
            self._fusable, self._seen = self._seen, set()
            # One launch for all that no product will take.
            pending.make(but=self._fusable if pending.fuses else ())
            self._pending = pending
        self.seeds, self.coeffs, self.scale = seeds, coeffs, scale
        self.distribution = distribution
        self.touched = set()
        self.materialised = Counter()
        self.low_precision = False

    def end(self) -> None:
        self.seeds = self.coeffs = self.level = self._pending = None
        self._terms.clear()
        self._formed = None
        self._kept.clear()

    def keep(self, tensor: Tensor) -> Tensor:
        """Keep a tensor alive until the evaluation ends (its raw pointer was handed out)."""
        self._kept.append(tensor)
        return tensor

    def terms(
        self, name: str, device: torch.device, *, updated: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Seeds and coefficients of a parameter, on its device.

        A pending update of it is made first, unless the caller does that (``updated=False``).
        """
        if self.seeds is None or self.coeffs is None:
            raise RuntimeError(
                f"parameter {name!r} is a displaced view that was kept after its evaluation ended: "
                f"do not store parameters inside the evaluated function"
            )
        if updated and self._pending is not None and name in self._pending:
            self._pending.make({name})
        self.touched.add(name)
        return self._scaled_terms(device, self.scale.get(name, 1.0))

    def pending_term(self, name: str, x: Tensor, w: Tensor, shared: bool) -> PendingTerm | None:
        """What a product ``x @ w^T`` is to apply to the whole ``w`` first; asked before
        :meth:`terms`.

        Where it would not save the update's pass, all that waits is made at once: the products of
        one evaluation are of a size.
        """
        if self._pending is None:
            return None
        if name not in self.touched:
            assert self.coeffs is not None
            if self._pending.taken_by(x, w, self.coeffs, shared, self.distribution):
                self._seen.add(name)
            elif name in self._pending:
                self._pending.make()
        return self._pending.get(name)

    def made(self, name: str) -> None:
        """A parameter's pending update is made."""
        assert self._pending is not None
        self._pending.done([name])

    def _scaled_terms(self, device: torch.device, scale: Scale) -> tuple[Tensor, Tensor]:
        assert self.seeds is not None and self.coeffs is not None
        found = self._terms.get((device, scale))
        if found is None:
            seeds, coeffs = scaled(self.seeds, self.coeffs, scale)
            found = self._terms[device, scale] = (seeds.to(device), coeffs.to(device))
        return found

    def vector(self, name: str) -> Tensor | None:
        """A parameter of ``vectors`` at every branch, float32 ``[G, numel]``.

        All of them are displaced by one op when the first is used: one by one they would cost a
        tenth of a short step. None where they are too many to hold.
        """
        if self._formed is None:
            self._formed = self._form_vectors()
        return self._formed.get(name)

    def _form_vectors(self) -> dict[str, Tensor]:
        together: dict[tuple[torch.device, Scale], list[tuple[LazyParameter, Tensor]]] = {}
        for lazy, data in self.vectors:
            key = (data.device, self.scale.get(lazy.parameter, 1.0))
            together.setdefault(key, []).append((lazy, data))
        formed: dict[str, Tensor] = {}
        for (device, scale), members in together.items():
            seeds, coeffs = self._scaled_terms(device, scale)
            branches = coeffs.shape[0]
            sizes = [branches * data.shape[0] for _, data in members]
            if sum(sizes) > VECTORS:
                continue
            flat = _ops.displace_vectors(
                [data for _, data in members],
                seeds,
                coeffs,
                [lazy.param_id for lazy, _ in members],
                self.distribution,
            )
            for (lazy, _), part in zip(members, flat.split(sizes), strict=True):
                formed[lazy.parameter] = part.view(branches, -1)
        return formed

    def lift(self, branches: Tensor) -> Tensor:
        """``[G, ...]`` as the tensor the evaluated function sees."""
        if self.level is None:
            return branches[0]
        lifted: Tensor = functorch._add_batch_dim(branches, 0, self.level)
        return lifted

    def lower(self, x: Tensor) -> tuple[Tensor, bool]:
        """Physical tensor of ``x``, and whether all branches share it (no branch dimension)."""
        if self.level is None or (level := functorch.maybe_get_level(x)) == -1:
            return x, True
        if level != self.level or (dim := functorch.maybe_get_bdim(x)) == -1:
            raise UnsupportedUse("a function transform inside the evaluated function")
        physical: Tensor = functorch.get_unwrapped(x)
        return (physical if dim == 0 else physical.movedim(dim, 0)), False


class LazyParameter(Tensor):
    """A parameter, or a view of its rows, at all branches of an evaluation.

    ``matrix`` is the stored ``[rows, cols]`` tensor; its first row is row ``row_offset`` of the
    parameter. The lazy tensor is ``matrix`` reshaped to its shape, or its transpose.
    """

    is_stand_in = True  # see zokernels.binding

    state: State
    parameter: str
    param_id: int
    matrix: Tensor
    row_offset: int
    transposed: bool
    views: dict[object, LazyParameter]
    whole_vector = False  # one of state.vectors
    whole_matrix = False  # a matrix, and the parameter's own memory

    @staticmethod
    def __new__(
        cls,
        state: State,
        name: str,
        param_id: int,
        source: Tensor,
        matrix: Tensor,
        row_offset: int = 0,
        transposed: bool = False,
    ) -> LazyParameter:
        self: LazyParameter = Tensor._make_wrapper_subclass(
            cls,
            source.size(),
            strides=source.stride(),
            dtype=source.dtype,
            device=source.device,
            requires_grad=False,
        )
        self._is_param = True
        self.state, self.parameter, self.param_id = state, name, param_id
        self.matrix, self.row_offset, self.transposed = matrix, row_offset, transposed
        self.views = {}
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        with DisableTorchFunctionSubclass():
            return (
                f"LazyParameter({self.parameter!r}, shape={tuple(self.shape)}, dtype={self.dtype})"
            )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _generic(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Reached only where __torch_function__ is off (scripted code, C++ callers).
        def form(lazy: LazyParameter) -> Tensor:
            if lazy.state.level is not None:
                raise UnsupportedUse(f"{func} on parameter {lazy.parameter!r} below torch function")
            return lazy.form(lazy.dtype)

        with DisableTorchFunctionSubclass():
            args = tree_map_only(LazyParameter, form, args)
            kwargs = tree_map_only(LazyParameter, form, kwargs or {})
        return func(*args, **kwargs)

    def branches(self, dtype: torch.dtype) -> Tensor:
        """The displaced tensor of every branch, ``[G, *shape]``."""
        with DisableTorchFunctionSubclass():
            seeds, coeffs = self.state.terms(self.parameter, self.matrix.device)
            if self.whole_vector and dtype == torch.float32:
                together = self.state.vector(self.parameter)
                if together is not None:
                    return together
            formed: Tensor = _ops.displace(
                self.matrix,
                seeds,
                coeffs,
                self.param_id,
                self.row_offset,
                0,
                self.state.distribution,
                "nearest",
                dtype,
            )
            formed = formed.view(coeffs.shape[0], *self.stored_shape)
            return formed.transpose(-1, -2) if self.transposed else formed

    def product(self, x: Tensor, bias: Tensor | None, shared: bool, flip: bool) -> Tensor:
        """``x @ W_g^T + bias_g`` for every branch (``x @ W_g`` with ``flip``), ``[G, ..., out]``.

        Args:
            x: physical, ``[G, ..., in]`` or, ``shared``, ``[..., in]``.
            bias: ``[out]`` for all branches, ``[G, out]`` or None.
            shared: all branches have the same ``x``.
            flip: in addition to the view's own transposition.
        """
        transposed = self.transposed ^ flip
        term = None
        if not transposed and self.whole_matrix:
            term = self.state.pending_term(self.parameter, x, self.matrix, shared)
        seeds, coeffs = self.state.terms(self.parameter, self.matrix.device, updated=term is None)
        if bias is not None and bias.dim() == 1:
            bias = bias.expand(coeffs.shape[0], -1)
        place = (self.param_id, self.row_offset, 0, self.state.distribution)
        y: Tensor
        if term is None:
            y = _ops.linear(x, self.matrix, bias, seeds, coeffs, *place, shared, transposed)
        else:
            last = (term.seed, term.coeff, term.decay, term.rounding)
            y = _ops.update_linear_(x, self.matrix, bias, seeds, coeffs, *last, *place, shared)
            self.state.made(self.parameter)
        return y

    def lookup(self, ids: Tensor, shared: bool) -> Tensor:
        """Rows ``ids`` (``[...]`` or ``[G, ...]``) of every branch: ``[G, ..., cols]``."""
        seeds, coeffs = self.state.terms(self.parameter, self.matrix.device)
        rows: Tensor = _ops.embedding(
            ids,
            self.matrix,
            seeds,
            coeffs,
            self.param_id,
            self.row_offset,
            0,
            self.state.distribution,
            shared,
        )
        return rows

    def form(self, dtype: torch.dtype) -> Tensor:
        """The displaced tensor as the evaluated function sees it; counted."""
        self.state.materialised[self.parameter] += 1
        return self.state.lift(self.branches(dtype))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape before the transposition."""
        with DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def small(self) -> bool:
        return self.matrix.numel() <= SMALL

    def view_of(self, key: object, source: Tensor, matrix: Tensor, row: int, flip: bool) -> Tensor:
        """A cached lazy view."""
        found = self.views.get(key)
        if found is None:
            found = self.views[key] = self._view(source, matrix, row, self.transposed ^ flip)
        return found

    def _view(self, source: Tensor, matrix: Tensor, row: int, transposed: bool) -> LazyParameter:
        """A view whose first row is ``row`` of this one's."""
        return LazyParameter(
            self.state,
            self.parameter,
            self.param_id,
            source,
            matrix,
            self.row_offset + row,
            transposed,
        )


# (func, args, kwargs) -> result, or NotImplemented for the generic path.
Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {}


def handles(*funcs: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for func in funcs:
            HANDLERS[func] = handler
        return handler

    return register


def no_derivative(handler: Handler) -> Handler:
    """The handler, for inputs that nothing is differentiated by: the ops have no derivative."""

    def guarded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracked = torch.is_grad_enabled() or forward_ad._current_level >= 0
        for value in (*args, *kwargs.values()):
            if not isinstance(value, Tensor) or isinstance(value, LazyParameter):
                continue
            if functorch.is_gradtrackingtensor(value) or (tracked and _has_derivative(value)):
                return NotImplemented
        return handler(func, args, kwargs)

    return guarded


def _has_derivative(value: Tensor) -> bool:
    if torch.is_grad_enabled() and value.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def _generic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    if (
        name.endswith("_")
        and not name.startswith("_")
        and args
        and isinstance(args[0], LazyParameter)
    ):
        raise RuntimeError(
            f"{name} changes parameter {args[0].parameter!r} in place inside an evaluation at "
            f"branches"
        )

    def form(lazy: LazyParameter) -> Tensor:
        return lazy.form(lazy.dtype)

    args = tree_map_only(LazyParameter, form, args)
    kwargs = tree_map_only(LazyParameter, form, kwargs)
    return func(*args, **kwargs)


def autocast_dtype(lazy: LazyParameter) -> torch.dtype | None:
    """The dtype autocast computes in, if it is on."""
    kind = lazy.matrix.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    lazy.state.low_precision = True
    return torch.get_autocast_dtype(kind)
