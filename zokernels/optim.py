"""MeZO as a ``torch.optim.Optimizer``: gradients from forward passes only, weights exact.

The two probes of a step are branches of one stacked forward pass (:mod:`zokernels.branches`); the
weights are written once a step, by one fused update that draws the direction again from its seed.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zokernels import _registry, _targets, deferred
from zokernels._targets import NamedTensors
from zokernels.binding import Binding, BoundParameter, bind
from zokernels.caller import stacklevel
from zokernels.deferred import Fetch, Inputs, placed
from zokernels.displacement import check_distribution, check_rounding
from zokernels.distributed import check_process_group, check_same, mean_over_ranks
from zokernels.dynamo import untraced
from zokernels.interrupts import whole
from zokernels.masks import Mask
from zokernels.noise import derive_seed, signed_seed
from zokernels.optim_arguments import (
    ESTIMATORS,
    NONFINITE,
    check_choice,
    check_count,
    check_group,
    check_positive,
    named_tensors,
    sources,
)
from zokernels.optim_state import OPTIONS, Resumable
from zokernels.pending import PendingTerm
from zokernels.probes import Evaluation, Probes, Tables
from zokernels.spsa import Past, Rates, Spsa
from zokernels.subset import on
from zokernels.trajectory import Trajectory
from zokernels.trajectory_format import TrajectoryError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Steps in a row with equal losses at all branches that are worth a word.
FLAT = 3


class NonFiniteLossError(ArithmeticError):
    """A loss, or what follows from it, is NaN or infinite (``nonfinite="raise"``)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last step saw.

    Attributes:
        step: the step's number, from 0.
        seeds: one seed per direction.
        losses: of every branch: plus and minus of each direction (``"central"``), or the unmoved
            weights and then each direction (``"forward"``).
        projected_gradients: ``[groups][directions]``, before clipping.
        skipped: whether the update was left out because something was not finite.
    """

    step: int
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    projected_gradients: tuple[tuple[float, ...], ...]
    skipped: bool


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step that was made on the device and not yet written down here."""

    step: int
    seeds: tuple[int, ...]
    rates: tuple[Rates, ...]
    losses: Fetch
    gradients: Tensor  # float64 [groups, directions] on the device; 0 where the step was skipped


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What :meth:`MeZO.accumulate` has evaluated for the next step."""

    losses: Tensor  # [G], summed
    keys: Sequence[int] | Tensor
    facts: dict[str, Any]  # what the probes depend on


class MeZO(Resumable):
    r"""Zeroth-order SGD (MeZO): each step costs forward passes and one write of the weights.

    With the direction ``z`` of a fresh seed, every step does::

        g = (L(w + eps z) - L(w - eps z)) / (2 eps)          projected gradient, a number
        w = round((1 - lr weight_decay) w - lr g z)

    and with ``n = num_directions`` it takes the mean of ``g_i z_i`` (n-SPSA). The one-sided
    ``estimator="forward"`` uses ``g_i = (L(w + eps z_i) - L(w)) / eps`` and costs ``n + 1`` losses
    in place of ``2 n``. With ``momentum=mu`` the step is along ``v_t = sum_i mu**(t - i) g_i z_i``
    over the last ``momentum_window`` steps: seeds and numbers, no buffer.

    The probes are evaluated on weights that are never written, so they cost no accuracy at any
    dtype. Directions depend on ``seed``, the number of the step and the parameters' names alone:
    not on torch's random state, the order of the parameters, their device or dtype.

    On a CUDA device a step does not wait for the GPU (``nonfinite="raise"`` and the reference
    backend do): the projected gradient, the clipping and the skipping of steps that are not finite
    happen there, and the journal, :attr:`last`, :attr:`skipped` and the warning follow when the
    losses have arrived, at the latest when they are asked for.

    Losses come from the model as it is: call ``model.eval()`` to evaluate without dropout, as MeZO
    does. In training mode all branches see the same dropout masks, and whatever else the global
    random states of torch, NumPy and Python decide.

    Args:
        params: a module (its parameters with ``requires_grad``), a :class:`~zokernels.Binding` (the
            parameters it selects), named parameters ``(name, parameter)``, or groups (dicts with
            ``"params"`` and own ``lr``, ``eps``, ``weight_decay``, ``momentum``). Bare parameters
            need ``model``. Listed parameters without ``requires_grad`` stay fixed until it is set.
        lr: learning rate, >= 0.
        eps: size of the probes, > 0.
        weight_decay: decoupled weight decay, >= 0. The factor ``1 - lr * weight_decay`` is a
            float32: it is 1 when ``lr * weight_decay`` is below 3e-8.
        distribution: ``"gaussian"`` or ``"rademacher"``.
        num_directions: directions a step, n.
        estimator: ``"central"`` or ``"forward"``.
        clip: limit of ``|g|``, or None.
        momentum: decay ``mu`` of past steps, in [0, 1).
        momentum_window: number of steps the momentum looks back; an update costs as many terms.
        rounding: of updates in bfloat16 and float16: ``"stochastic"`` (an update of a hundredth of
            an ulp still counts on average) or ``"nearest"`` (it is lost).
        nonfinite: what to do when a loss or an update is NaN or infinite: ``"skip"`` leaves the
            weights alone, counts it in :attr:`skipped` and warns once; ``"raise"``.
        seed: root of all directions, 64 bits.
        model: the module that holds ``params``, where those are bare or only named.
        mask: a :class:`~zokernels.Mask`: only its elements move, whatever requires gradients; None
            for a Binding, which has its own. Every parameter it touches must be listed in
            ``params``. Masked elements are trained in float32: ``rounding`` is of no consequence.
        journal: a :class:`~zokernels.Trajectory` that records every update; see :meth:`resume`.
        fuse_update: let the update of a step wait for the next step's forward pass, which makes it
            as it reads each weight (where a backend has ``update_linear_``: weights are then read
            and written once a step; elsewhere it is made first). The numbers are the same. Whatever
            uses the model makes it too; call :meth:`flush` before parameters are read directly or
            the model is copied. Updates of more than one direction or with momentum do not wait,
            nor do steps with a closure.
        process_group: ranks that train together, such as ``torch.distributed.group.WORLD`` after
            ``init_process_group``, or None. Every rank has the same weights and options and steps
            on batches of its own; losses are averaged over the ranks, one float32 a branch, so all
            make the same update. Before the first step they compare what they have
            (:meth:`check_ranks`). A journal is for one of them.
        sequential: how batches are evaluated, see :class:`~zokernels.Branches`.
        max_branches: most branches in one stacked evaluation, to bound its memory; None: all.

    Raises:
        ValueError: an argument out of range, no trainable parameter, parameters without names.
        TypeError: an argument of the wrong type, a parameter of another dtype than float32,
            bfloat16 and float16.

    Source: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", Algorithm 1
    (n-SPSA: Algorithm 2); Spall 1992.
    """

    estimator: str
    nonfinite: str
    clip: float | None
    fuse_update: bool
    process_group: ProcessGroup | None
    max_branches: int | None
    sequential: bool | None
    _explicit: bool  # a Binding or a mask chose the parameters, whatever their requires_grad
    _given: Binding | None
    _groups: list[list[BoundParameter]]
    _agreed: list[list[BoundParameter]] | None  # the groups the ranks have compared
    _flags: tuple[tuple[bool, ...], ...]  # requires_grad when the parameters were bound
    _warned: bool
    _flat: int  # steps in a row whose branches had equal losses
    _told: bool
    _last: StepResult | None
    _pending: list[_Pending]  # oldest first
    _settling: bool
    _tables: Tables
    _gathered: _Gathered | None

    def __init__(
        self,
        params: nn.Module | Binding | Iterable[Any],
        lr: float | Tensor = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        distribution: str = "gaussian",
        num_directions: int = 1,
        estimator: str = "central",
        clip: float | None = None,
        momentum: float = 0.0,
        momentum_window: int = 16,
        rounding: str = "stochastic",
        nonfinite: str = "skip",
        seed: int = 0,
        model: nn.Module | None = None,
        mask: Mask | None = None,
        journal: Trajectory | None = None,
        fuse_update: bool = False,
        process_group: ProcessGroup | None = None,
        sequential: bool | None = None,
        max_branches: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        check_group(defaults)
        self.distribution = check_distribution(distribution)
        self.rounding = check_rounding(rounding)
        self.estimator = check_choice("estimator", estimator, ESTIMATORS)
        self.nonfinite = check_choice("nonfinite", nonfinite, NONFINITE)
        self.num_directions = check_count("num_directions", num_directions)
        self.momentum_window = check_count("momentum_window", momentum_window)
        self.max_branches = (
            None if max_branches is None else check_count("max_branches", max_branches)
        )
        self.clip = None if clip is None else check_positive("clip", clip)
        if sequential is not None and not isinstance(sequential, bool):
            raise TypeError(f"sequential must be True, False or None; got {sequential!r}")
        self.sequential = sequential
        if not isinstance(fuse_update, bool):
            raise TypeError(f"fuse_update must be True or False; got {fuse_update!r}")
        self.fuse_update = fuse_update
        self.process_group = check_process_group(process_group)
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an integer; got {seed!r}")
        self.seed = signed_seed(int(seed))
        if journal is not None and not isinstance(journal, Trajectory):
            raise TypeError(f"journal must be a Trajectory or None; got {type(journal).__name__}")

        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"mask must be a Mask or None; got {type(mask).__name__}")
        self._given = params if isinstance(params, Binding) else None
        if self._given is not None and mask is not None:
            raise ValueError("mask must be None when params is a Binding: it has its own")
        self._mask = mask if self._given is None else self._given.mask
        self._model, groups = sources(params, model, mask)
        self._explicit = self._given is not None or mask is not None
        self._bound = None
        self._groups, self._announced, self._flags = [], [], ()
        self._step, self._skipped, self._warned = 0, 0, False
        self._window, self._last = (), None
        self._incoming, self._journal = None, None
        self._begin()
        super().__init__(groups, defaults)
        self._bind()
        self.journal = journal

    def _begin(self) -> None:
        """What an optimizer has only while it is at work, and no copy of it has."""
        self.__dict__.setdefault("_given", None)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("_told", False)
        self._flat = 0
        self._agreed = self._gathered = None
        self._pending, self._settling, self._tables = [], False, {}

    # --- what a run looks like --------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The module that holds the parameters, if it was given."""
        return self._model

    @property
    def num_steps(self) -> int:
        """Steps made so far, skipped ones included: the number of the next step."""
        return self._step

    @property
    def skipped(self) -> int:
        """Steps without an update because something was not finite."""
        self._settle()
        return self._skipped

    @property
    def last(self) -> StepResult | None:
        """Losses, seeds and projected gradients of the last step; None before the first."""
        self._settle()
        return self._last

    @property
    def projected_gradients(self) -> tuple[tuple[float, ...], ...]:
        """``[groups][directions]`` of the last step, before clipping; empty before the first."""
        return self.last.projected_gradients if self.last is not None else ()

    @property
    def journal(self) -> Trajectory | None:
        """The trajectory that records the updates."""
        return self._journal

    @journal.setter
    def journal(self, journal: Trajectory | None) -> None:
        self._settle()
        if journal is not None:
            journal.begin(self._groups, distribution=self.distribution, rounding=self.rounding)
        self._journal = journal
        self._announced = self._groups

    def flush(self) -> None:
        """Make the update that waits for the next step (``fuse_update=True``), if there is one."""
        bound = self.__dict__.get("_bound")
        if isinstance(bound, Binding):
            bound.pending.make()

    def check_ranks(self) -> None:
        """Compare weights, options, hyperparameters and the step with the other ranks'.

        The first step of :attr:`process_group` does this; later it can find a rank that went its
        own way (a weight that something else wrote, another learning rate schedule). Every rank
        must call it.

        Raises:
            RankMismatchError: on every rank, with the first difference.
        """
        if self.process_group is None:
            return
        self._settle()
        self.flush()
        facts = {name: getattr(self, name) for name in OPTIONS}
        facts |= {"step": self._step, "hyperparameters": self._rates(), "window": self._window}
        check_same(self._groups, facts, self.process_group)
        self._agreed = self._groups

    # --- parameter groups -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in ``torch.optim``: parameters with names, or held by the model.

        Raises:
            TypeError, ValueError: as the constructor. Nothing is changed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict; got {type(param_group).__name__}")
        if "params" not in param_group:
            raise ValueError("a parameter group must have the key 'params'")
        group = {**param_group, "params": named_tensors(param_group["params"], self._model)}
        group.pop("param_names", None)
        check_group({**self.defaults, **group})
        super().add_param_group(group)
        if self._bound is not None:  # else the constructor binds all groups at once
            try:
                self._bind()
            except BaseException:
                self.param_groups.pop()
                self._bind()
                raise

    def _bind(self) -> None:
        """Bind the parameters that require a gradient now."""
        self._settle()  # what is pending was made with the groups of its time
        self.flush()
        flags = self._requires_grad()
        names = [
            [n for n, moves in zip(group["param_names"], row, strict=True) if moves]
            for group, row in zip(self.param_groups, flags, strict=True)
        ]
        listed = [n for row in names for n in row]
        if not listed:
            raise ValueError(
                "no parameter requires a gradient: MeZO moves those with requires_grad=True"
            )
        bound: Binding | NamedTensors
        if self._model is None:
            bound = NamedTensors(
                (
                    (name, p)
                    for group, row in zip(self.param_groups, flags, strict=True)
                    for name, p, moves in zip(
                        group["param_names"], group["params"], row, strict=True
                    )
                    if moves
                ),
                self._mask,
            )
        elif self._mask is not None and self._given is None:
            bound = bind(self._model, mask=self._mask)  # shared with zo.branches and zo.dual_loss
            absent = [n for n in bound.by_name if n not in listed]
            if absent:
                raise ValueError(f"the mask moves parameters that no group lists: {absent[:5]}")
        else:
            chosen = set(listed)
            trainable = {n for n, p in self._model.named_parameters() if p.requires_grad}
            if self._given is not None and chosen == set(self._given.by_name):
                bound = self._given
            elif chosen == trainable:
                bound = bind(self._model)  # shared with zo.branches and zo.dual_loss
            else:
                bound = Binding(self._model, listed)
        groups = [[bound.by_name[n] for n in row if n in bound.by_name] for row in names]
        self._bound, self._groups, self._flags = bound, groups, flags

    def _requires_grad(self) -> tuple[tuple[bool, ...], ...]:
        """Which listed parameters move."""
        return tuple(
            tuple(self._explicit or p.requires_grad for p in g["params"]) for g in self.param_groups
        )

    # --- a step -----------------------------------------------------------------------------------

    @untraced
    @whole
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        batch: Any = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        closure: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """One step.

        ``step()`` makes the update of what :meth:`accumulate` has evaluated. Otherwise
        ``step(batch)`` evaluates ``model(**batch).loss`` (a dict with labels) and
        ``step(batch, loss_fn)`` evaluates ``loss_fn(model, batch)``, all branches in one stacked
        pass. ``step(closure)`` calls a function without arguments once per branch: any code that
        uses the model and returns the loss (no ``backward()``), of the same batch in every call.

        Gradient accumulation: ``step([batch1, batch2, ...])`` takes the mean of the micro-batches'
        losses at the same directions. A list of tensors alone is one batch (it is what a DataLoader
        over a TensorDataset gives).

        Args:
            batch: a batch, a list of micro-batches, or the closure.
            loss_fn: ``loss_fn(model, batch) ->`` scalar tensor.
            closure: the closure, by name.

        Returns:
            Mean loss over the evaluated branches, float32, 0-d.

        Raises:
            TypeError, ValueError: a bad argument, hyperparameter or loss.
            NonFiniteLossError: with ``nonfinite="raise"``.
            ModelChangedError: the model's parameters are not those that were given.
            TrajectoryError: the journal already has this step.
            Whatever the model or the closure raises. After an error the weights, the step counter
            and the journal are what they were before. Ctrl-C waits for the end of the step; a
            second one does not.
        """
        gathered = self._gathered
        given = batch is not None or loss_fn is not None or closure is not None
        evaluation = None
        if gathered is None or given:
            evaluation = self._evaluation(batch, loss_fn, closure, "step")
        if gathered is not None:
            if evaluation is not None:
                raise ValueError(
                    "step() takes no batch after accumulate(): it makes the update of what was "
                    "evaluated; zero_grad() drops that"
                )
            self._check_gathered(gathered)
        self._ready()
        if self.process_group is not None and self._agreed is not self._groups:
            self.check_ranks()

        seeds, rates = self._seeds(self._step), self._rates()
        if self._stays_on_device():
            inputs = self._inputs(seeds, rates)
            keys = inputs.seeds[inputs.seeds.numel() - len(seeds) :]
            losses = self._probed(gathered, evaluation, keys)
            gradients = self._update_on_device(losses, inputs, rates)
            self._note(seeds, rates, losses, gradients)
        else:
            self._settle()
            losses = self._probed(gathered, evaluation, seeds)
            self._conclude(self._step, seeds, rates, tuple(losses.tolist()), made=False)
            self._step += 1
        self._gathered = None
        return losses.mean()

    @untraced
    @whole
    @torch.no_grad()
    def accumulate(
        self,
        batch: Any = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        closure: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Evaluate a micro-batch at the directions of the next step; ``step()`` makes the update.

        For loops that have ``backward()`` and ``step()`` apart::

            for part in parts:
                opt.accumulate(part, lambda model, batch: model(**batch).loss / len(parts))
            opt.step()

        Losses add up as gradients do: the update is that of their sum. :meth:`zero_grad` drops
        what was evaluated, and so does loading a state; a state dict does not hold it.

        Args:
            batch, loss_fn, closure: as in :meth:`step`.

        Returns:
            Mean loss of this call over the evaluated branches, float32, 0-d.

        Raises:
            TypeError, ValueError: a bad argument, hyperparameter or loss, or another ``eps`` or
                option than in the calls before, for the same step.
            Whatever the model or the closure raises. After an error nothing was added.
        """
        evaluation = self._evaluation(batch, loss_fn, closure, "accumulate")
        gathered = self._gathered
        if gathered is not None:
            self._check_gathered(gathered)
        self._ready()
        if gathered is None:
            seeds: Sequence[int] | Tensor = self._seeds(self._step)
            if self._stays_on_device():
                assert self._bound is not None
                device = self._bound.params[0].device
                seeds = placed(torch.tensor(seeds, dtype=torch.int64), device)
            losses = self._losses(evaluation, seeds)
            self._gathered = _Gathered(losses, seeds, self._probe_facts())
        else:
            losses = self._losses(evaluation, gathered.keys)
            self._gathered = _Gathered(gathered.losses + losses, gathered.keys, gathered.facts)
        return losses.mean()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what :meth:`accumulate` evaluated, and gradients that something else left."""
        super().zero_grad(set_to_none)
        self._gathered = None

    def _evaluation(self, batch: Any, loss_fn: Any, closure: Any, caller: str) -> Evaluation:
        return Evaluation.of(self._model, batch, loss_fn, closure, self.sequential, caller)

    def _ready(self) -> None:
        """Check what a step needs, and bind again when other parameters move."""
        for group in self.param_groups:
            check_group(group)
        if self._requires_grad() != self._flags:
            self._bind()
        self._settle(wait=False)
        journal = self._journal
        # Pending steps are this optimizer's own, and asking the journal would wait for them.
        if journal is not None and not self._pending and journal.next_step > self._step:
            raise TrajectoryError(
                f"the journal already has steps up to {journal.next_step - 1}, and this is step "
                f"{self._step}: journal.truncate({self._step}) drops those from here on"
            )

    def _probe_facts(self) -> dict[str, Any]:
        names = ("seed", "distribution", "estimator", "num_directions")
        return {
            "the step": self._step,
            "eps": [float(group["eps"]) for group in self.param_groups],
            "requires_grad": self._requires_grad(),
            **{name: getattr(self, name) for name in names},
        }

    def _check_gathered(self, gathered: _Gathered) -> None:
        for name, now in self._probe_facts().items():
            if now != gathered.facts[name]:
                raise ValueError(
                    f"{name} changed from {gathered.facts[name]} to {now} since accumulate(): "
                    f"zero_grad() drops what it evaluated"
                )

    def _probed(
        self,
        gathered: _Gathered | None,
        evaluation: Evaluation | None,
        seeds: Sequence[int] | Tensor,
    ) -> Tensor:
        """The losses of a step, equal on all ranks: evaluated before or now."""
        if gathered is not None:
            return self._reduce_losses(gathered.losses)
        assert evaluation is not None
        return self._reduce_losses(self._losses(evaluation, seeds))

    def _conclude(
        self,
        step: int,
        seeds: tuple[int, ...],
        rates: tuple[Rates, ...],
        values: tuple[float, ...],
        *,
        made: bool,
    ) -> None:
        """From the losses of a step: its update, unless the device made it, and what is kept."""
        spsa = self._spsa
        gradients = spsa.project(values, rates)
        past = Past(step, seeds, spsa.clipped(gradients))
        finite = all(map(math.isfinite, values)) and all(
            math.isfinite(g) for row in gradients for g in row
        )
        terms, coeffs, decay = spsa.terms(self._window, past, rates) if finite else ((), (), ())
        finite = finite and all(math.isfinite(c) for row in coeffs for c in row)
        if not finite:
            message = (
                f"step {step}: losses {list(values)}, projected gradients "
                f"{[list(row) for row in gradients]}: not finite, or the update is beyond float32"
            )
            if self.nonfinite == "raise":
                raise NonFiniteLossError(message)
            if not self._warned:
                warnings.warn(f"{message}; such steps are skipped", stacklevel=stacklevel())
                self._warned = True
            terms, coeffs, decay = (), ((),) * len(rates), ()
        self._flat = self._flat + 1 if finite and len(set(values)) == 1 else 0
        if self._flat == FLAT and not self._told:
            self._told = True
            warnings.warn(
                f"the last {FLAT} steps had equal losses at all branches, so no direction counted: "
                f"does the loss come from another model than this optimizer's, or is eps too small "
                f"for its precision?",
                stacklevel=stacklevel(),
            )

        keeps = any(rate.momentum for rate in rates)
        meta: dict[str, Any] = {"loss": math.fsum(values) / len(values) if finite else None}
        if keeps and finite:
            meta["gradients"] = [list(row) for row in past.gradients]
        self._update(step, terms, coeffs, decay, meta, made=made)
        if finite:
            self._window = (*spsa.recent(self._window, step), past) if keeps else ()
        else:
            self._skipped += 1
        self._last = StepResult(step, seeds, values, gradients, not finite)

    # --- a step that stays on the device ----------------------------------------------------------

    def _stays_on_device(self) -> bool:
        """Whether the numbers of a step need not come to the host before the update."""
        bound = self._bound
        return (
            isinstance(bound, Binding)
            and self.nonfinite == "skip"
            and all(p.device.type == "cuda" for p in bound.params)
            and len({p.device for p in bound.params}) == 1
            and all(
                _registry.serving(op, "cuda") != "reference"
                for op in {
                    "update_" if p.masked is None else "sparse_update_" for p in bound.params
                }
            )
        )

    def _inputs(self, seeds: tuple[int, ...], rates: tuple[Rates, ...]) -> Inputs:
        """What the device needs for this step, on its way there."""
        assert self._bound is not None
        device = self._bound.params[0].device
        keeps = any(rate.momentum for rate in rates)
        if keeps and not all(any(rate.momentum for rate in p.rates) for p in self._pending):
            self._settle()  # momentum was switched on: what such a step leaves is known later
        first = self._step - self.momentum_window + 1
        settled = self._spsa.recent(self._window, self._step) if keeps else ()
        flying = [p for p in self._pending if p.step >= first] if keeps else []
        steps = [(p.step, p.seeds) for p in settled] + [(p.step, p.seeds) for p in flying]
        steps.append((self._step, seeds))
        counts = [(at, len(own)) for at, own in steps]
        keys = [s for _, own in steps for s in own]
        groups = len(rates)
        earlier = [
            deferred.table(
                [
                    p.gradients[i] if i < len(p.gradients) else [0.0] * len(p.seeds)
                    for i in range(groups)
                ],
                torch.float64,
                device,
            )
            for p in settled
        ] + [p.gradients for p in flying]
        nothing = torch.empty((groups, 0), dtype=torch.float64, device=device)
        weights = [rate.weights(self._step, counts) for rate in rates]
        decay = [rate.decay(len(keys)) for rate in rates]
        return Inputs(
            seeds=placed(torch.tensor(keys, dtype=torch.int64), device),
            eps=deferred.table([[rate.eps] for rate in rates], torch.float64, device),
            weights=deferred.table(weights, torch.float64, device),
            decay=deferred.table(decay, torch.float32, device),
            past=torch.cat([nothing, *earlier], dim=1),
            ends=placed(torch.tensor([*[False] * (len(keys) - 1), True]), device),
        )

    def _update_on_device(
        self,
        losses: Tensor,
        inputs: Inputs,
        rates: tuple[Rates, ...] | None,
        move: Callable[..., None] | None = None,
    ) -> Tensor:
        """Make the update of these losses; the projected gradients, for later steps.

        Without ``rates`` nothing is taken to be constant: the update of a graph. ``move`` stands
        in for :meth:`_move`.
        """
        spsa = self._spsa
        coeffs, decay, gradients = deferred.coefficients(
            losses, inputs, central=spsa.central, clip=spsa.clip
        )
        for index, members in enumerate(self._groups):
            moves = decays = True
            if rates is not None:
                decays = rates[index].decay(1) != (1.0,)
                moves = decays or rates[index].lr != 0
            if members and moves:
                (move or self._move)(
                    members,
                    inputs.seeds,
                    coeffs[index],
                    decay[index] if decays else None,
                    inputs.ends,
                )
        return gradients

    def _move(
        self,
        members: list[BoundParameter],
        seeds: Sequence[int] | Tensor,
        coeffs: Sequence[float] | Tensor,
        decay: Sequence[float] | Tensor | None,
        ends: Sequence[bool] | Tensor,
    ) -> None:
        """Make the update of a group, or let it wait."""
        bound = self._bound
        waits = self.fuse_update and len(seeds) == 1 and all(p.masked is None for p in members)
        if not waits or not isinstance(bound, Binding):
            _targets.update_(members, seeds, coeffs, decay, ends, self.distribution, self.rounding)
            return
        by_device: dict[torch.device, list[BoundParameter]] = {}
        for p in members:
            by_device.setdefault(p.tensor.device, []).append(p)
        for device, params in by_device.items():
            term = PendingTerm(
                on(seeds, torch.int64, device),
                on(coeffs, torch.float32, device),
                None if decay is None else on(decay, torch.float32, device),
                self.distribution,
                self.rounding,
            )
            bound.pending.add(params, term)

    def _note(
        self, seeds: tuple[int, ...], rates: tuple[Rates, ...], losses: Tensor, gradients: Tensor
    ) -> None:
        """A step was made on the device: it is written down when its losses have arrived."""
        self._pending.append(_Pending(self._step, seeds, rates, Fetch(losses), gradients))
        if self._journal is not None:
            self._journal.pending = self._settle
        self._step += 1

    def _settle(self, *, wait: bool = True) -> None:
        """Write down the steps whose losses have arrived, or all of them."""
        if self._settling or not self.__dict__.get("_pending"):
            return
        self._settling = True
        try:
            while self._pending and (wait or self._pending[0].losses.ready):
                p = self._pending[0]
                self._conclude(p.step, p.seeds, p.rates, p.losses.get(), made=True)
                del self._pending[0]
        finally:
            self._settling = False
        if not self._pending and self._journal is not None:
            self._journal.pending = None

    @property
    def _spsa(self) -> Spsa:
        return Spsa(self.estimator == "central", self.clip, self.momentum_window)

    def _rates(self) -> tuple[Rates, ...]:
        return tuple(
            Rates(*(float(g[k]) for k in ("lr", "eps", "weight_decay", "momentum")))
            for g in self.param_groups
        )

    def _seeds(self, step: int) -> tuple[int, ...]:
        return tuple(derive_seed(self.seed, step, k) for k in range(self.num_directions))

    def _losses(self, evaluation: Evaluation, seeds: Sequence[int] | Tensor) -> Tensor:
        """Of all branches, float32 ``[G]``, on this rank. Makes the update that is pending."""
        assert self._bound is not None
        eps = {p.name: float(group["eps"]) for p, group in self._members()}
        probes = Probes(
            self._bound, eps, self._spsa, self.distribution, self.max_branches, self._tables
        )
        return probes.losses(evaluation, seeds)

    def _reduce_losses(self, losses: Tensor) -> Tensor:
        """The branches' losses (``[G]``), equal on all ranks."""
        return losses if self.process_group is None else mean_over_ranks(losses, self.process_group)

    def _members(self) -> Iterator[tuple[BoundParameter, dict[str, Any]]]:
        for members, group in zip(self._groups, self.param_groups, strict=True):
            for p in members:
                yield p, group

    def _update(
        self,
        step: int,
        seeds: tuple[int, ...],
        coeffs: tuple[tuple[float, ...], ...],
        decay: tuple[tuple[float, ...], ...],
        meta: Mapping[str, Any],
        *,
        made: bool,
    ) -> None:
        """Journal the update, then make it, unless it is made."""
        journal = self._journal
        if journal is not None:
            if self._announced is not self._groups:
                self.journal = journal
            journal.append(step, seeds, coeffs, decay=decay, meta=meta)
        if made:
            return
        ends = [k == len(seeds) - 1 for k in range(len(seeds))]
        try:
            for index, members in enumerate(self._groups):
                factors = decay[index] if decay and any(d != 1.0 for d in decay[index]) else None
                if members and not _targets.idle(coeffs[index], factors):
                    self._move(members, seeds, coeffs[index], factors, ends)
        except BaseException:
            if journal is not None:
                journal.undo()
            raise
