"""Evaluate an unmodified model at several displaced copies of its weights that never exist.

Branch ``g`` sees ``W + sum_k C[g, k] z(s_k)`` (:mod:`zokernels.noise`). All branches are evaluated
at once, as the examples of one ``torch.func.vmap`` in which the moving parameters are lazy
(:mod:`zokernels.lazy`): a linear layer draws its noise once for all branches and reads each weight
once, everything that no moving parameter has touched yet is computed once, and every other
operation runs on the stack. Where a model cannot be stacked the branches run one after another,
with one warning that says why. The weights themselves are never written.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.utils._pytree import tree_flatten, tree_unflatten

from zokernels import verify
from zokernels.binding import BUSY, Binding, BoundParameter, Selection, bind, exchanged
from zokernels.caller import stacklevel
from zokernels.deferred import placed, recording
from zokernels.dynamo import compiled_models_run_eagerly, untraced
from zokernels.functions import forward_alone
from zokernels.interrupts import whole
from zokernels.kept import Kept
from zokernels.lazy import Lazy, LazyParameter, Scale, scaled
from zokernels.lazy.masked import displaced as displaced_under_mask
from zokernels.losses import loss_of
from zokernels.masks import Mask
from zokernels.noise import DISTRIBUTIONS, signed_seed
from zokernels.pending import PendingUpdate
from zokernels.precision import CompositeOps
from zokernels.randomness import rewinder

Seeds = Tensor | Sequence[int]
Coeffs = Tensor | Sequence[Sequence[float]]

_warn_of_loops: Callable[[bool], None] = functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]

# Parameters formed whole are worth a word from this size on.
_LARGE = 1 << 22


class StackingWarning(UserWarning):
    """A model's branches run one after another, or one of its parameters is formed whole."""


class _Memory:
    """What is known about a binding after its first evaluation."""

    def __init__(self, binding: Binding) -> None:
        self.lazy = Lazy(binding)
        self.kept = Kept()
        self.checked = False
        self.looked = False  # for readers of the original weights
        self.sequential: str | None = None  # the reason, when stacking was given up
        self.aliases: tuple[BoundParameter, ...] = ()  # used behind the module tree's back
        self.reported = False
        self.autocast = False  # seen inside the evaluated function
        # vmap needs help (:class:`CompositeOps`): always on CUDA, for the sake of attention.
        self.composite = any(
            p.device.type == "cuda" or (p.is_floating_point() and p.dtype.itemsize < 4)
            for p in binding.model.parameters()
        )


_memories: weakref.WeakKeyDictionary[Binding, _Memory] = weakref.WeakKeyDictionary()


class Branches:
    """A model at ``G`` displaced copies of its weights.

    Branch ``g`` of parameter ``p`` is ``W_p + scale_p * sum_k coeffs[g, k] z_p(seeds[k])``,
    computed in float32 and rounded once to the parameter's dtype (parameters of at most 65536
    elements enter norms, biases and arithmetic in float32). Losses of torch.nn.functional are taken
    in float32.

    Args:
        model: any module, or a :class:`~zokernels.Binding`.
        seeds: ``K`` seeds: integers in [-2**63, 2**64), or an int64 tensor ``[K]``.
        coeffs: float32 ``[G, K]``, or nested numbers.
        params: which parameters move (names or predicate); None for those with ``requires_grad``.
        mask: a :class:`~zokernels.Mask`: only its elements move (in float32 whatever the dtype of
            the weights, by a product with the weights as they are and a correction), along
            directions of their own; ``params`` must be None.
        distribution: ``"gaussian"`` or ``"rademacher"``.
        scale: factor of the coefficients by parameter name, or a tuple of K factors, one a seed; 1
            where absent. A seed whose factor is 0 is not drawn.
        sequential: True runs one branch after another (any callable, memory of one branch); False
            raises where stacking fails; None stacks, and goes one by one where that fails.

    Raises:
        ValueError, TypeError: a bad argument.
        ModelChangedError: the model is not the one that was bound.
    """

    def __init__(
        self,
        model: nn.Module | Binding,
        seeds: Seeds,
        coeffs: Coeffs,
        *,
        params: Selection = None,
        mask: Mask | None = None,
        distribution: str = "gaussian",
        scale: Mapping[str, Scale] | None = None,
        sequential: bool | None = None,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution must be one of {list(DISTRIBUTIONS)}; got {distribution!r}"
            )
        self.binding = bind(model, params, mask)
        self.distribution = distribution
        self.seeds = placed(_as_seeds(seeds), self.binding.device)
        self.coeffs = placed(_as_coeffs(coeffs, self.seeds.numel()), self.binding.device)
        self.scale = dict(scale or {})
        unknown = [n for n in self.scale if n not in self.binding.by_name]
        if unknown:
            raise ValueError(f"scale must name moving parameters; unknown: {unknown[:5]}")
        for name, factor in self.scale.items():
            if isinstance(factor, tuple) and len(factor) != self.seeds.numel():
                raise ValueError(
                    f"scale[{name!r}] must be a number or {self.seeds.numel()} numbers, one a "
                    f"seed; got {len(factor)}"
                )
        self._inputs: tuple[Tensor, ...] = ()  # [G, ...] each
        self._own: tuple[Tensor, ...] = ()  # of the branch that is being evaluated
        self.sequential = sequential

    @property
    def num_branches(self) -> int:
        """G."""
        return self.coeffs.shape[0]

    @property
    def stacked(self) -> bool:
        """Whether evaluations of this model are stacked, as far as is known."""
        return not self.sequential and self._memory().sequential is None

    @property
    def formed(self) -> dict[str, int]:
        """How often parameters were formed whole in the last evaluation of this model."""
        return dict(self._memory().lazy.state.materialised)

    @untraced
    @whole
    def __call__(self, fn: Callable[..., Any], *stacked: Tensor) -> Any:
        """``fn()`` at every branch, or ``fn(*(x[g] for x in stacked))`` at branch ``g``.

        Args:
            fn: returns a tensor, or tensors in tuples, lists, dicts or transformers outputs.
                Stacked evaluation calls it once and, on the first use of a model, once more per
                branch to compare. Random numbers (dropout) are the same in all branches.
            stacked: tensors ``[G, ...]`` that differ between the branches, such as the activations
                of an earlier evaluation.

        Returns:
            The same structure, each tensor stacked to ``[G, ...]``.

        Raises:
            ValueError: a tensor of ``stacked`` has another first dimension than G.
            Whatever ``fn`` raises; RuntimeError when stacking fails and ``sequential`` is False.
        """
        for x in stacked:
            if x.dim() == 0 or x.shape[0] != self.num_branches:
                raise ValueError(
                    f"stacked must have {self.num_branches} branches in dimension 0; got shape "
                    f"{tuple(x.shape)}"
                )
        self._inputs = stacked
        if stacked:
            given = fn

            def fn() -> Any:
                return given(*self._own)

        if torch.compiler.is_compiling():
            return self._captured(fn)
        memory = self._memory()
        given_up = memory.sequential is not None and self.sequential is None
        pending = self.binding.pending
        if self.sequential or self.num_branches == 1 or given_up:
            pending.make()
            return (self._one_by_one if memory.looked else self._first_one_by_one)(memory, fn)
        if not memory.checked:
            pending.make()
            return self._first_use(memory, fn)
        try:
            outputs = self._stacked(memory, fn, pending)
            if memory.lazy.state.low_precision and not memory.autocast:
                pending.make()
                return self._first_use(memory, fn)  # autocast is another computation: check it too
            return outputs
        except Exception as error:
            if self.sequential is False or _out_of_memory(error):
                raise
            if recording(self.binding.device):
                raise  # a graph must not hold another way than the one that was compared
            pending.make()
            outputs = self._one_by_one(memory, fn)  # raises again when fn itself is at fault
            self._give_up(memory, _reason(error))
            return outputs

    @contextlib.contextmanager
    def at(self, branch: int) -> Iterator[None]:
        """Any code inside sees the weights of one branch; gradients are off.

        Args:
            branch: index in [0, G).

        Raises:
            IndexError: ``branch`` is out of range.
            RuntimeError: an evaluation of this model is already active.
        """
        if not 0 <= branch < self.num_branches:
            raise IndexError(f"branch must be in [0, {self.num_branches}); got {branch}")
        with self._active(self._memory(), self.coeffs[branch : branch + 1]):
            yield

    # --- how --------------------------------------------------------------------------------------

    def _memory(self) -> _Memory:
        memory = _memories.get(self.binding)
        if self.binding.lock.locked():
            raise RuntimeError(BUSY)
        self.binding.check()
        if memory is None:
            memory = _memories[self.binding] = _Memory(self.binding)
        memory.lazy.follow(self.binding)
        return memory

    @contextlib.contextmanager
    def _active(
        self, memory: _Memory, coeffs: Tensor, pending: PendingUpdate | None = None
    ) -> Iterator[None]:
        lazy = memory.lazy
        if not self.binding.lock.acquire(blocking=False):
            raise RuntimeError(BUSY)
        try:
            lazy.state.begin(self.seeds, coeffs, self.scale, self.distribution, pending)
            aliased = {p.name for p in memory.aliases}
            with contextlib.ExitStack() as stack:
                if memory.aliases and coeffs.shape[0] == 1:
                    stack.enter_context(
                        displaced_storage(
                            memory.aliases, self.seeds, coeffs, self.scale, self.distribution
                        )
                    )
                swapped = [p for p in self.binding.params if p.name not in aliased]
                try:
                    for p in swapped:
                        stand_in: Any = lazy.params[p.name]
                        for holder, key in p.places:
                            holder[key] = stand_in
                    _swap_flat_weights(
                        self.binding, {id(p.tensor): lazy.params[p.name] for p in swapped}
                    )
                    stack.enter_context(torch.no_grad())
                    stack.enter_context(compiled_models_run_eagerly())
                    if memory.composite or memory.autocast:
                        stack.enter_context(CompositeOps())
                    yield
                finally:
                    for p in swapped:
                        original: Any = p.tensor
                        for holder, key in p.places:
                            holder[key] = original
                    _swap_flat_weights(
                        self.binding, {id(lazy.params[p.name]): p.tensor for p in swapped}
                    )
        finally:
            lazy.state.end()
            self.binding.lock.release()

    def _stacked(
        self, memory: _Memory, fn: Callable[[], Any], pending: PendingUpdate | None = None
    ) -> Any:
        state = memory.lazy.state
        layout: list[Any] = []

        def body(branch: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            state.level = functorch.maybe_get_level(branch)
            self._own = own
            try:
                leaves, spec = _flatten(fn())
                leaves = [_plain(leaf) for leaf in leaves]
            finally:
                state.level = None
            layout[:] = [leaves, spec]
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        # Attention on CPU has no batching rule and loops over the branches, which costs
        # nothing here.
        _warn_of_loops(False)
        try:
            # Hooks for checkpointed layers call requires_grad_ on activations; nothing is recorded.
            with (
                self._active(memory, self.coeffs, pending),
                enable_inplace_requires_grad(True),
                forward_alone(),
            ):
                index = torch.arange(self.num_branches, device=self.binding.device)
                stacked = iter(torch.func.vmap(body, randomness="same")(index, *self._inputs))
        finally:
            self._own = ()
            _warn_of_loops(True)
            memory.kept.settle()
        leaves, spec = layout
        return tree_unflatten(
            [next(stacked) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )

    def _captured(self, fn: Callable[[], Any]) -> Any:
        """Stacked, for :func:`zokernels.capture`, which cannot look at values."""
        self.binding.check()
        memory = _memories.get(self.binding)
        why = None
        if memory is None or not memory.checked:
            why = "evaluate it once before, so that stacking has been checked"
        elif memory.sequential is not None or self.sequential:
            why = memory.sequential or "sequential is True"
        elif memory.lazy.copied:
            why = f"parameter {memory.lazy.copied[0]!r} has no matrix view; make it contiguous"
        if why is not None or memory is None:
            raise RuntimeError(
                f"the branches of {type(self.binding.model).__name__} cannot be captured: {why}"
            )
        return self._stacked(memory, fn)

    def _rewinder(self) -> Callable[[], None]:
        return rewinder(p.device for p in self.binding.params)

    def _one_by_one(self, memory: _Memory, fn: Callable[[], Any]) -> Any:
        every: list[list[Any]] = []
        rewind = self._rewinder()
        for g in range(self.num_branches):
            rewind()
            self._own = tuple(x[g] for x in self._inputs)
            with self._active(memory, self.coeffs[g : g + 1]):
                leaves, spec = _flatten(fn())
                every.append([_plain(leaf) for leaf in leaves])
        first = every[0]
        return tree_unflatten(
            [
                torch.stack([leaves[i] for leaves in every]) if isinstance(leaf, Tensor) else leaf
                for i, leaf in enumerate(first)
            ],
            spec,
        )

    def _first_use(self, memory: _Memory, fn: Callable[[], Any]) -> Any:
        """Stack, compare with one branch at a time, and remember which of them to trust."""
        rewind = self._rewinder()
        with _same_buffers(self.binding.model):
            stacked, failure = self._try_stacked(memory, fn)
            if memory.lazy.state.low_precision and not memory.autocast:
                memory.autocast = True  # seen now: run again under its rules for composite ops
                rewind()
                stacked, failure = self._try_stacked(memory, fn)
            if failure is not None and self.sequential is False:
                raise failure
            formed = dict(memory.lazy.state.materialised)
            rewind()
            outputs = self._first_one_by_one(memory, fn)
        if failure is not None:
            problem: str | None = _reason(failure)
        elif memory.aliases:
            problem = "parameters are used from outside the module tree: " + ", ".join(
                p.name for p in memory.aliases[:5]
            )
        else:
            dtypes = {p.dtype for p in self.binding.model.parameters() if p.is_floating_point()}
            if memory.autocast:
                dtypes.add(torch.bfloat16)
            problem = verify.difference(stacked, outputs, dtypes)
        memory.checked = True
        if problem is None:
            self._report(memory, formed)
            return stacked
        if self.sequential is False:
            raise RuntimeError(f"stacked evaluation is not exact for this model: {problem}")
        self._give_up(memory, problem)
        return outputs

    def _try_stacked(self, memory: _Memory, fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
        put_back = memory.kept.look(self.binding.model)
        try:
            return self._stacked(memory, fn), None
        except Exception as error:
            if _out_of_memory(error):
                raise
            return None, error
        finally:
            put_back()

    def _first_one_by_one(self, memory: _Memory, fn: Callable[[], Any]) -> Any:
        """One branch at a time, with a look at who reads the original weights."""
        params = self.binding.params

        def run(poison: Sequence[BoundParameter]) -> Any:
            """The outputs, or None when there is a NaN or the function fails."""
            rewind()
            try:
                with verify.poisoned(poison):
                    outputs = self._one_by_one(memory, fn)
            except Exception as error:
                if _out_of_memory(error):
                    raise
                return None
            return None if verify.has_nan(outputs) else outputs

        rewind = self._rewinder()
        with _same_buffers(self.binding.model):
            outputs = run(params)
            if outputs is None:
                rewind()
                outputs = self._one_by_one(memory, fn)  # raises where fn itself is at fault
                if verify.has_nan(outputs):
                    return outputs  # NaN losses hide what poison would show: look again next time
                memory.aliases = verify.readers(params, lambda part: run(part) is not None)
                rewind()
                outputs = self._one_by_one(memory, fn)
        memory.looked = True
        return outputs

    def _give_up(self, memory: _Memory, reason: str) -> None:
        memory.sequential = reason
        memory.checked = True
        warnings.warn(
            f"{type(self.binding.model).__name__}: branches run one after another from now on: "
            f"{reason}",
            StackingWarning,
            stacklevel=stacklevel(),
        )

    def _report(self, memory: _Memory, formed: Mapping[str, int]) -> None:
        large = [
            f"{p.name} ({p.tensor.numel() / 1e6:.1f} M elements, {formed[p.name]}x)"
            for p in self.binding.params
            if p.tensor.numel() >= _LARGE and formed.get(p.name)
        ]
        if large and not memory.reported:
            memory.reported = True
            warnings.warn(
                f"{type(self.binding.model).__name__}: parameters formed whole in an evaluation, "
                f"because they are used in a way that has no kernel: {', '.join(large[:5])}",
                StackingWarning,
                stacklevel=stacklevel(),
            )


def branches(
    model: nn.Module | Binding,
    seeds: Seeds,
    coeffs: Coeffs,
    *,
    params: Selection = None,
    mask: Mask | None = None,
    distribution: str = "gaussian",
    scale: Mapping[str, Scale] | None = None,
    sequential: bool | None = None,
) -> Branches:
    """:class:`Branches` of a model: ``zo.branches(model, [seed], [[eps], [-eps]])(fn)``."""
    return Branches(
        model,
        seeds,
        coeffs,
        params=params,
        mask=mask,
        distribution=distribution,
        scale=scale,
        sequential=sequential,
    )


@untraced
def dual_loss(
    model: nn.Module | Binding,
    batch: Any,
    *,
    seed: int | Tensor,
    eps: float,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    params: Selection = None,
    mask: Mask | None = None,
    distribution: str = "gaussian",
    sequential: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The two losses of a two-point estimate, ``L(W + eps z)`` and ``L(W - eps z)``, in one pass.

    The projected gradient of SPSA (Spall 1992; MeZO, Malladi et al. 2023, definition 1) is
    ``(loss_plus - loss_minus) / (2 eps)``.

    Args:
        model: any module, or a :class:`~zokernels.Binding`.
        batch: what ``loss_fn`` takes; without ``loss_fn`` a mapping for ``model(**batch)``, whose
            ``.loss`` is taken (the ``labels=`` convention of transformers).
        seed: the direction.
        eps: step of the finite difference, > 0.
        loss_fn: ``loss_fn(model, batch) ->`` scalar tensor.
        params, mask, distribution, sequential: see :class:`Branches`.

    Returns:
        ``(loss_plus, loss_minus)``, 0-d tensors.

    Raises:
        ValueError: ``eps`` is not positive and finite, or the loss is not a scalar.
        TypeError: ``batch`` is not a mapping and there is no ``loss_fn``.
    """
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a positive finite number; got {eps!r}")
    seeds = [seed] if isinstance(seed, int) else seed.reshape(1)
    both = Branches(
        model,
        seeds,
        [[eps], [-eps]],
        params=params,
        mask=mask,
        distribution=distribution,
        sequential=sequential,
    )
    losses = both(loss_of(both.binding.model, batch, loss_fn))
    return losses[0], losses[1]


@contextlib.contextmanager
def displaced(
    model: nn.Module | Binding,
    seeds: Any,
    coeffs: Tensor | Sequence[float] | None = None,
    *,
    params: Selection = None,
    mask: Mask | None = None,
    distribution: str = "gaussian",
    scale: Mapping[str, Scale] | None = None,
) -> Iterator[nn.Module]:
    """Any code inside sees ``W + sum_k coeffs[k] z(seeds[k])``; the weights are not touched.

    Args:
        model: any module, or a :class:`~zokernels.Binding`.
        seeds: a :class:`~zokernels.Displacement` (which brings its distribution), or seeds.
        coeffs: one number per seed; None with a displacement.
        params, mask, distribution, scale: see :class:`Branches`.

    Yields:
        The model. ``state_dict()`` inside gives the displaced weights.
    """
    if coeffs is None:
        displacement = seeds
        seeds, coeffs = displacement.seeds, displacement.coeffs
        distribution = displacement.distribution
    row = coeffs[None] if isinstance(coeffs, Tensor) else [list(coeffs)]
    view = Branches(
        model, seeds, row, params=params, mask=mask, distribution=distribution, scale=scale
    )
    with view.at(0):
        yield view.binding.model


def directions(
    model: nn.Module | Binding,
    *,
    seed: int | Tensor,
    params: Selection = None,
    mask: Mask | None = None,
    distribution: str = "gaussian",
) -> dict[str, Tensor]:
    """The direction of a seed, written out: ``{name: z}``, float32, shaped like the parameters.

    Under a mask it is zero at the elements that do not move. For tests and teaching: it costs the
    memory of the parameters, which nothing else here does.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {list(DISTRIBUTIONS)}; got {distribution!r}")
    z = {}
    for p in bind(model, params, mask).params:
        key = _as_seeds([seed] if isinstance(seed, int) else seed.reshape(1))[0].to(p.device)
        drawn = (1, p.moving) if p.masked is not None else p.matrix
        values = torch.ops.zokernels.sample(*drawn, key, p.id, 0, 0, distribution)
        if p.masked is not None:
            compact, values = values, values.new_zeros(p.shape)
            values.view(-1)[p.masked.indices] = compact[0]
        z[p.name] = values.view(p.shape)
    return z


def displaced_storage(
    params: Sequence[BoundParameter],
    seeds: Tensor,
    coeffs: Tensor,
    scale: Mapping[str, Scale],
    distribution: str,
) -> contextlib.AbstractContextManager[None]:
    """Parameters at one branch, ``coeffs`` ``[1, K]``, in storage of their own: a copy of them.

    For what reads parameters where no stand-in can be put.
    """

    def storage(p: BoundParameter, data: Tensor) -> Tensor:
        keys, table = (t.to(p.device) for t in scaled(seeds, coeffs, scale.get(p.name, 1.0)))
        if p.masked is not None:
            return displaced_under_mask(
                data.reshape(p.matrix),
                p.masked.indices,
                p.masked.shadow,
                keys,
                table,
                p.id,
                0,
                distribution,
                p.dtype,
            ).view(p.shape)
        formed: Tensor = torch.ops.zokernels.displace(
            data.reshape(p.matrix),
            keys,
            table,
            p.id,
            0,
            0,
            distribution,
            "nearest",
            None,
        )
        return formed.view(p.shape)

    return exchanged(params, storage)


# --- pieces ---------------------------------------------------------------------------------------


def _as_seeds(seeds: Seeds) -> Tensor:
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise TypeError(
                f"seeds must be an int64 vector or a list of integers; got {seeds.dtype} of shape "
                f"{tuple(seeds.shape)}"
            )
        return seeds
    values = list(seeds)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"seeds must be integers; got {value!r}")
    return torch.tensor([signed_seed(value) for value in values], dtype=torch.int64)


def _as_coeffs(coeffs: Coeffs, terms: int) -> Tensor:
    if isinstance(coeffs, Tensor):
        table = coeffs.detach().to(torch.float32)
    else:
        try:
            rows = [[float(value) for value in row] for row in coeffs]
            table = torch.tensor(rows, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"coeffs must be [branches, {terms}] numbers; got {coeffs!r}"
            ) from error
        if not all(math.isfinite(value) for row in rows for value in row):
            raise ValueError(f"coeffs must be finite; got {coeffs!r}")
        if terms == 0:
            table = table.reshape(len(coeffs), 0)
    if table.dim() != 2 or table.shape[1] != terms or table.shape[0] == 0:
        raise ValueError(
            f"coeffs must have shape [branches, {terms}] (one column per seed); got shape "
            f"{tuple(table.shape)}"
        )
    return table


def _flatten(value: Any) -> tuple[list[Any], Any]:
    leaves, spec = tree_flatten(value)
    for leaf in leaves:
        if not (leaf is None or isinstance(leaf, (Tensor, bool, int, float, str))):
            raise TypeError(
                f"the evaluated function must return tensors, alone or in tuples, lists, dicts or "
                f"model outputs; got a {type(leaf).__name__}"
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"the evaluated function must return a tensor; got {type(value).__name__}")
    return leaves, spec


def _plain(leaf: Any) -> Any:
    """A result that is itself a parameter, formed."""
    return leaf.form(leaf.dtype) if isinstance(leaf, LazyParameter) else leaf


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _swap_flat_weights(binding: Binding, swap: Mapping[int, Tensor]) -> None:
    """Recurrent modules keep their parameters in a list of their own."""
    for module in binding.recurrent:
        flat: Any = module._flat_weights
        for i, weight in enumerate(flat):
            if weight is not None and id(weight) in swap:
                flat[i] = swap[id(weight)]


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """The first use runs a model several times: running statistics end where they began."""
    saved = [
        (buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        if module.training
        for buffer in module._buffers.values()
        if buffer is not None and buffer.device.type != "meta"
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values, version in saved:
                if buffer._version != version:
                    buffer.copy_(values)
