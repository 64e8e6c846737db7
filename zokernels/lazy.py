"""Lazily displaced parameters: tensors that stand for ``W + sum_k C[g, k] z(s_k)`` and are never formed.

While a model is evaluated at branches, every moving parameter is replaced by a
:class:`LazyParameter`. It has the shape, dtype and device of the parameter and no data.
``__torch_function__`` sends the uses a transformer makes of a weight (``linear``, ``addmm``,
``embedding``, norms, elementwise arithmetic) to the ops; any other use gets the displaced tensor,
formed for that call and counted.

Branches are the examples of one ``torch.func.vmap``. A handler therefore takes the physical
``[G, ...]`` tensor out of vmap's wrapper, calls the multi-branch op, and puts the wrapper back. Rules
registered with ``torch.library.register_vmap`` would do the same for 66 us a call; by hand it is 2 us.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from zokernels._checks import DTYPES
from zokernels.binding import Binding, BoundParameter
from zokernels.losses import linear_cross_entropy

# Parameters of at most this many elements (norm weights, biases, small tables) are displaced in
# float32 whatever their dtype: eps * z is below one bfloat16 ulp of a norm weight near 1.
SMALL = 1 << 16

_ops = torch.ops.zokernels


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
        self.scale: Mapping[str, float] = {}
        self.distribution = "gaussian"
        self.touched: set[str] = set()
        self.materialised: Counter[str] = Counter()
        self.low_precision = False
        self._terms: dict[tuple[torch.device, float], tuple[Tensor, Tensor]] = {}
        self._kept: list[Tensor] = []

    def begin(
        self,
        seeds: Tensor,
        coeffs: Tensor,
        scale: Mapping[str, float],
        distribution: str,
    ) -> None:
        self.seeds, self.coeffs, self.scale = seeds, coeffs, scale
        self.distribution = distribution
        self.touched = set()
        self.materialised = Counter()
        self.low_precision = False

    def end(self) -> None:
        self.seeds = self.coeffs = self.level = None
        self._terms.clear()
        self._kept.clear()

    def keep(self, tensor: Tensor) -> Tensor:
        """Keep a tensor alive until the evaluation ends (its raw pointer was handed out)."""
        self._kept.append(tensor)
        return tensor

    def terms(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds and coefficients of a parameter, on its device."""
        if self.seeds is None or self.coeffs is None:
            raise RuntimeError(
                f"parameter {name!r} is a displaced view that was kept after its evaluation ended: "
                f"do not store parameters inside the evaluated function"
            )
        self.touched.add(name)
        scale = self.scale.get(name, 1.0)
        found = self._terms.get((device, scale))
        if found is None:
            coeffs = self.coeffs if scale == 1.0 else self.coeffs * scale
            found = self._terms[device, scale] = (self.seeds.to(device), coeffs.to(device))
        return found

    def lift(self, branches: Tensor) -> Tensor:
        """``[G, ...]`` as the tensor the evaluated function sees."""
        if self.level is None:
            return branches[0]
        lifted: Tensor = functorch._add_batch_dim(branches, 0, self.level)
        return lifted

    def lower(self, x: Tensor) -> tuple[Tensor, bool]:
        """Physical tensor of ``x`` and whether all branches share it (it has no branch dimension)."""
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
        handler = _HANDLERS.get(func)
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
            found = self.views[key] = LazyParameter(
                self.state,
                self.parameter,
                self.param_id,
                source,
                matrix,
                self.row_offset + row,
                self.transposed ^ flip,
            )
        return found


def lazy_parameter(state: State, bound: BoundParameter) -> LazyParameter:
    """The lazy stand-in of a bound parameter."""
    source = bound.tensor.detach()
    return LazyParameter(state, bound.name, bound.id, source, source.reshape(bound.matrix))


class Lazy:
    """The state of a binding and one lazy parameter per distinct parameter."""

    def __init__(self, binding: Binding) -> None:
        self.state = State()
        self.params: dict[str, LazyParameter] = {}
        self._layouts: dict[str, tuple[int, tuple[int, ...]] | None] = {}
        self.follow(binding)

    @property
    def copied(self) -> list[str]:
        """Names of the parameters whose matrix is a copy."""
        return [name for name, layout in self._layouts.items() if layout is None]

    def follow(self, binding: Binding) -> None:
        """Renew the stand-ins of parameters that changed storage or layout (``p.data = ...``).

        A parameter that cannot be viewed as its matrix (a channels-last convolution) is copied, so its
        stand-in is renewed every time.
        """
        for p in binding.params:
            layout = (p.tensor.data_ptr(), p.tensor.stride())
            if self._layouts.get(p.name) != layout:
                lazy = self.params[p.name] = lazy_parameter(self.state, p)
                shares = lazy.matrix.data_ptr() == layout[0]
                self._layouts[p.name] = layout if shares else None


# --- handlers: (func, args, kwargs) -> result, or NotImplemented for the generic path -----------------

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*funcs: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for func in funcs:
            _HANDLERS[func] = handler
        return handler

    return register


def _no_derivative(handler: Handler) -> Handler:
    """The handler, for inputs that nothing is differentiated by: the ops have no derivative."""

    def guarded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracked = torch.is_grad_enabled() or forward_ad._current_level >= 0
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not isinstance(value, LazyParameter):
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
            f"{name} changes parameter {args[0].parameter!r} in place inside an evaluation at branches"
        )

    def form(lazy: LazyParameter) -> Tensor:
        return lazy.form(lazy.dtype)

    args = tree_map_only(LazyParameter, form, args)
    kwargs = tree_map_only(LazyParameter, form, kwargs)
    return func(*args, **kwargs)


def _metadata(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


for _name in (
    "shape dtype device ndim is_cuda is_cpu is_meta is_sparse is_quantized is_nested layout names "
    "requires_grad grad grad_fn is_leaf itemsize nbytes is_xpu is_mps is_mkldnn is_xla is_hpu is_ipu "
    "is_vulkan is_maia is_sparse_csr _backward_hooks _version output_nr retains_grad name"
).split():
    if isinstance(getattr(Tensor, _name, None), property) or hasattr(
        getattr(Tensor, _name, None), "__get__"
    ):
        _HANDLERS[getattr(Tensor, _name).__get__] = _metadata
for _name in (
    "size dim stride numel nelement element_size is_floating_point is_complex is_signed is_contiguous "
    "storage_offset get_device __len__ __hash__ ndimension is_shared is_inference has_names "
    "is_same_size __format__ __repr__"
).split():
    if hasattr(Tensor, _name):
        _HANDLERS[getattr(Tensor, _name)] = _metadata
for _name in "is_floating_point is_complex numel is_inference".split():
    _HANDLERS[getattr(torch, _name)] = _metadata


@_handles(Tensor.data_ptr, Tensor.untyped_storage)
def _storage(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy = args[0]
    if lazy.state.level is not None:
        raise UnsupportedUse(f"{func.__name__} of parameter {lazy.parameter!r}")
    return func(lazy.state.keep(lazy.form(lazy.dtype)), *args[1:], **kwargs)


@_handles(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def _detach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # With one branch this is how state_dict reads a parameter: give it the displaced weights.
    lazy = args[0]
    return lazy.form(lazy.dtype) if lazy.state.level is None else lazy


@_handles(Tensor.contiguous)
def _contiguous(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy = args[0]
    return NotImplemented if lazy.transposed or kwargs or len(args) > 1 else lazy


_CASTS = {Tensor.float: torch.float32, Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16}


@_handles(*_CASTS, Tensor.to, Tensor.type)
def _cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy, rest = args[0], args[1:]
    if not isinstance(lazy, LazyParameter) or kwargs:
        return NotImplemented
    if func in _CASTS and not rest:
        dtype = _CASTS[func]
    elif len(rest) == 1 and isinstance(rest[0], torch.dtype):
        dtype = rest[0]
    elif len(rest) == 1 and func is Tensor.to and torch.device(lazy.device) == rest[0]:
        return lazy
    else:
        return NotImplemented
    if dtype == lazy.dtype:
        return lazy
    return lazy.form(dtype) if dtype in DTYPES else NotImplemented


def _flip(lazy: LazyParameter) -> Any:
    """The last two dimensions exchanged."""
    source = lazy.matrix.view(lazy.stored_shape)
    if not lazy.transposed:
        source = source.transpose(-1, -2)
    return lazy.view_of("t", source, lazy.matrix, 0, True)


@_handles(
    Tensor.t,
    torch.t,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
)
def _t(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _flip(args[0]) if args[0].dim() == 2 else NotImplemented


@_handles(Tensor.transpose, torch.transpose, Tensor.permute, torch.permute)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lazy, dims = args[0], args[1:]
    if kwargs or not isinstance(lazy, LazyParameter) or lazy.dim() < 2:
        return NotImplemented
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if not all(isinstance(d, int) for d in dims):
        return NotImplemented
    rank = lazy.dim()
    order = [d % rank for d in dims]
    if func in (Tensor.permute, torch.permute):
        swaps = order == [*range(rank - 2), rank - 1, rank - 2]
    else:
        swaps = sorted(order) == [rank - 2, rank - 1]
    return _flip(lazy) if swaps else NotImplemented


@_handles(Tensor.__getitem__)
def _getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leading index or slice of a contiguous parameter: a lazy view of its rows."""
    lazy, key = args
    if not isinstance(lazy, LazyParameter) or lazy.dim() < (3 if lazy.transposed else 2):
        return NotImplemented
    stored = lazy.stored_shape
    each = lazy.matrix.shape[0] // stored[0] if stored[0] else 0  # matrix rows per leading index
    if isinstance(key, Tensor) and key.dim() == 0 and lazy.state.lower(key)[1]:
        if key.dtype not in (torch.int64, torch.int32):
            return NotImplemented
        key = int(key)
    if isinstance(key, slice) and key.step in (None, 1):
        start, stop, _ = key.indices(stored[0])
        count = max(stop - start, 0)
        rest: tuple[int, ...] = (count, *stored[1:])
        identity: object = (start, stop)
    elif isinstance(key, int) and not isinstance(key, bool):
        if not -stored[0] <= key < stored[0]:
            return NotImplemented  # let torch raise its own error
        start, count = key % stored[0], 1
        rest, identity = stored[1:], start
    else:
        return NotImplemented
    matrix = lazy.matrix[start * each : (start + count) * each]
    source = matrix.view(rest)
    if lazy.transposed:
        source = source.transpose(-1, -2)
    return lazy.view_of(identity, source, matrix, start * each, False)


def _autocast(lazy: LazyParameter) -> torch.dtype | None:
    """The dtype autocast computes in, if it is on."""
    kind = lazy.matrix.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    lazy.state.low_precision = True
    return torch.get_autocast_dtype(kind)


def _vector(bias: Any, state: State) -> Any:
    """A bias as ``[G, out]``, None, or NotImplemented when it is neither lazy nor plain."""
    if bias is None:
        return None
    if isinstance(bias, LazyParameter):
        return bias.branches(torch.float32) if bias.dim() == 1 else NotImplemented
    if bias.dim() != 1:
        return NotImplemented
    physical, shared = state.lower(bias)
    if not shared:
        return physical
    assert state.coeffs is not None
    return physical.expand(state.coeffs.shape[0], -1)


def _linear(x: Any, weight: LazyParameter, bias: Any, flip: bool) -> Any:
    """``x @ weight^T + bias`` (``x @ weight + bias`` with ``flip``) through the op."""
    if isinstance(x, LazyParameter) or weight.matrix.dim() != 2 or weight.dim() != 2:
        return NotImplemented
    if (low := _autocast(weight)) is not None and weight.dtype == torch.float32:
        formed = weight.form(low)  # one rounding, and half the memory of float32
        if flip and bias is not None:
            return torch.addmm(bias, x, formed)
        return F.linear(x, formed.mT if flip else formed, bias)
    if low is not None or x.dtype != weight.dtype or x.device != weight.device:
        return NotImplemented
    if x.dim() == 0 or x.shape[-1] != weight.shape[0 if flip else 1]:
        return NotImplemented  # let torch raise its own error
    state = weight.state
    with DisableTorchFunctionSubclass():
        rows = _vector(bias, state)
        if rows is NotImplemented:
            return NotImplemented
        physical, shared = state.lower(x)
        seeds, coeffs = state.terms(weight.parameter, weight.matrix.device)
        y = _ops.linear(
            physical,
            weight.matrix,
            rows,
            seeds,
            coeffs,
            weight.param_id,
            weight.row_offset,
            0,
            state.distribution,
            shared,
            weight.transposed ^ flip,
        )
        return state.lift(y)


@_handles(F.linear)
@_no_derivative
def _f_linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(input: Any, weight: Any, bias: Any = None) -> Any:
        if isinstance(weight, LazyParameter):
            return _linear(input, weight, bias, False)
        return NotImplemented

    return call(*args, **kwargs)


@_handles(torch.addmm, Tensor.addmm)
@_no_derivative
def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or not isinstance(args[2], LazyParameter):
        return NotImplemented
    bias, x, weight = args
    if isinstance(x, LazyParameter) or x.dim() != 2:
        return NotImplemented
    return _linear(x, weight, bias, True)


@_handles(
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
)
@_no_derivative
def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2 or not isinstance(args[1], LazyParameter):
        return NotImplemented
    if isinstance(args[0], LazyParameter):
        return NotImplemented
    return _linear(args[0], args[1], None, True)


@_handles(Tensor.__rmatmul__)
@_no_derivative
def _rmatmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _matmul(func, (args[1], args[0]), kwargs)


@_handles(F.embedding)
def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(
        input: Any,
        weight: Any,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        if not isinstance(weight, LazyParameter) or weight.transposed or max_norm is not None:
            return NotImplemented
        if isinstance(input, LazyParameter) or weight.dim() != 2:
            return NotImplemented
        state = weight.state
        with DisableTorchFunctionSubclass():
            ids, shared = state.lower(input)
            if ids.dtype not in (torch.int64, torch.int32):
                return NotImplemented
            seeds, coeffs = state.terms(weight.parameter, weight.matrix.device)
            rows = _ops.embedding(
                ids,
                weight.matrix,
                seeds,
                coeffs,
                weight.param_id,
                weight.row_offset,
                0,
                state.distribution,
                shared,
            )
            return state.lift(rows)

    return call(*args, **kwargs)


@_handles(F.grouped_mm, torch._grouped_mm)
@_no_derivative
def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens sorted by expert, ``[S, in]``, times expert weights ``[E, in, out]``, one expert at a time."""

    def call(
        x: Any, weight: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> Any:
        if not isinstance(weight, LazyParameter) or isinstance(x, LazyParameter) or offs is None:
            return NotImplemented
        if weight.dim() != 3 or x.dim() != 2 or bias is not None or _autocast(weight) is not None:
            return NotImplemented
        if x.dtype != weight.dtype or out_dtype not in (None, x.dtype):
            return NotImplemented
        state = weight.state
        experts, _, fan_out = weight.shape
        with DisableTorchFunctionSubclass():
            physical, x_shared = state.lower(x)
            stops, stops_shared = state.lower(offs)
            count = state.terms(weight.parameter, weight.matrix.device)[1].shape[0]
            table = (stops[None].expand(count, -1) if stops_shared else stops).tolist()
            y = physical.new_zeros((count, x.shape[0], fan_out))
            for e in range(experts):
                spans = [(row[e - 1] if e else 0, row[e]) for row in table]
                if all(start == stop for start, stop in spans):
                    continue
                formed = _getitem(None, (weight, e), {}).branches(weight.dtype)  # [G, in, out]
                for g, (start, stop) in enumerate(spans):
                    rows = (physical if x_shared else physical[g])[start:stop]
                    y[g, start:stop] = rows @ formed[g]
            return state.lift(y)

    return call(*args, **kwargs)


def _norm(
    state: State, x: Tensor, weight: Any, bias: Any, run: Callable[[Tensor, Any, Any], Tensor]
) -> Tensor:
    """A norm branch by branch, with float32 affine parameters: equal to the norm of one branch."""

    def affine(value: Any) -> tuple[Any, bool]:
        if value is None:
            return None, True
        if isinstance(value, LazyParameter):
            return value.branches(torch.float32), False
        return state.lower(value)

    with DisableTorchFunctionSubclass():
        physical, shared = state.lower(x)
        (w, w_shared), (b, b_shared) = affine(weight), affine(bias)
        assert state.coeffs is not None
        wide = physical.dtype != torch.float32
        parts = []
        for g in range(state.coeffs.shape[0]):
            xg = physical if shared else physical[g]
            wg = w if w_shared else w[g]
            bg = b if b_shared else b[g]
            if wide:
                xg = xg.float()
                wg = None if wg is None else wg.float()
                bg = None if bg is None else bg.float()
            parts.append(run(xg, wg, bg).to(physical.dtype))
        return state.lift(parts[0][None] if len(parts) == 1 else torch.stack(parts))


@_handles(F.layer_norm, torch.layer_norm)
@_no_derivative
def _layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        lazy = next((p for p in (weight, bias) if isinstance(p, LazyParameter)), None)
        if lazy is None or isinstance(input, LazyParameter) or _autocast(lazy):
            return NotImplemented
        return _norm(
            lazy.state,
            input,
            weight,
            bias,
            lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps),
        )

    return call(*args, **kwargs)


@_handles(F.rms_norm, torch.rms_norm)
@_no_derivative
def _rms_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
        if not isinstance(weight, LazyParameter) or isinstance(input, LazyParameter):
            return NotImplemented
        if _autocast(weight):
            return NotImplemented
        if eps is None:
            eps = torch.finfo(input.dtype).eps
        return _norm(
            weight.state,
            input,
            weight,
            None,
            lambda x, w, b: F.rms_norm(x, normalized_shape, w, eps),
        )

    return call(*args, **kwargs)


@_handles(linear_cross_entropy)
@_no_derivative
def _linear_cross_entropy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, targets, bias = args
    if not isinstance(weight, LazyParameter) or weight.dim() != 2 or weight.transposed:
        return NotImplemented
    state = weight.state
    if isinstance(x, LazyParameter) or _autocast(weight) is not None or x.dtype != weight.dtype:
        return NotImplemented
    with DisableTorchFunctionSubclass():
        labels, same = state.lower(targets)
        rows = _vector(bias, state)
        if not same or rows is NotImplemented:
            return NotImplemented
        physical, shared = state.lower(x)
        seeds, coeffs = state.terms(weight.parameter, weight.matrix.device)
        losses = _ops.linear_cross_entropy(
            physical,
            weight.matrix,
            rows,
            labels,
            seeds,
            coeffs,
            weight.param_id,
            weight.row_offset,
            0,
            state.distribution,
            shared,
            kwargs["ignore_index"],
        )
        return state.lift(losses)


_ARITHMETIC = [
    getattr(holder, name)
    for holder in (torch, Tensor)
    for name in (
        "add mul sub div multiply subtract divide true_divide rsub __add__ __radd__ __mul__ __rmul__ "
        "__sub__ __rsub__ __truediv__ __rtruediv__ __rdiv__ __div__"
    ).split()
    if hasattr(holder, name)
]


@_handles(*_ARITHMETIC)
def _arithmetic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Elementwise arithmetic with a small parameter: in float32, result in torch's dtype."""
    if kwargs or len(args) != 2:
        return NotImplemented
    lazies = [a for a in args if isinstance(a, LazyParameter)]
    if not all(p.small() for p in lazies):
        return NotImplemented
    if all(p.dtype == torch.float32 for p in lazies):
        return NotImplemented  # the generic path is already float32
    with DisableTorchFunctionSubclass():
        dtype = torch.result_type(
            *(
                torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a
                for a in args
            )
        )
    formed = [a.form(torch.float32) if isinstance(a, LazyParameter) else a for a in args]
    result = func(*formed)
    return result.to(dtype) if isinstance(result, Tensor) else result
