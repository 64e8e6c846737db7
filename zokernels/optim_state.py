"""What a :class:`~zokernels.MeZO` run needs to go on: a state of plain numbers, a journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zokernels._targets import NamedTensors
from zokernels.binding import Binding, BoundParameter
from zokernels.displacement import UnknownVersionError, check_distribution, check_rounding
from zokernels.masks import Mask
from zokernels.noise import CONTRACT_VERSION, signed_seed
from zokernels.optim_arguments import (
    ESTIMATORS,
    NONFINITE,
    check_choice,
    check_count,
    check_group,
    check_positive,
    pairs,
)
from zokernels.spsa import Past
from zokernels.trajectory import Trajectory

STATE_KEY = "mezo"
_STATE_FORMAT = 1


OPTIONS = (
    "seed",
    "distribution",
    "rounding",
    "estimator",
    "num_directions",
    "clip",
    "nonfinite",
    "momentum_window",
)
COUNTERS = ("_step", "_skipped", "_window")
KEPT = (
    *OPTIONS,
    *COUNTERS,
    "fuse_update",
    "sequential",
    "max_branches",
    "_model",
    "_explicit",
    "_mask",
    "_journal",
    "_warned",
    "_last",
)


class Resumable(torch.optim.Optimizer):
    """An optimizer whose runs go on from a state dict, a copy of it, or a journal, bit for bit.

    What it does between two steps is its subclass's.
    """

    seed: int
    distribution: str
    rounding: str
    num_directions: int
    momentum_window: int
    _model: nn.Module | None
    _mask: Mask | None
    _bound: Binding | NamedTensors | None
    _announced: list[list[BoundParameter]]  # the groups the journal knows
    _journal: Trajectory | None
    _step: int
    _skipped: int
    _window: tuple[Past, ...]
    _incoming: dict[str, Any] | None  # of a state dict that torch is about to take

    def flush(self) -> None:
        """Make the update that is pending."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Write down the steps whose losses have not been looked at."""
        raise NotImplementedError

    def _bind(self) -> None:
        """Bind the parameters that move."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Forget what only an optimizer at work has."""
        raise NotImplementedError

    def _seeds(self, step: int) -> tuple[int, ...]:
        """The directions of a step."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as plain numbers, strings, lists and dicts.

        Besides torch's ``state`` (empty) and ``param_groups`` it has ``mezo``: the step counter,
        the root seed, the options and the momentum window, everything a run needs to go on bit for
        bit. Under a mask, also its fingerprint and, for bfloat16 and float16, the float32 values of
        the masked elements (tensors).
        """
        self._settle()
        self.flush()
        handle = self.register_state_dict_post_hook(
            lambda _, saved: saved.update({STATE_KEY: self._run_state()}), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, the options of the run included.

        Raises:
            ValueError: not the state of a MeZO optimizer, or of one with other parameters; the
                message names the first. Nothing is changed.
            UnknownVersionError: a format or noise contract version this package does not know.
        """
        self._settle()
        self.flush()

        def accept(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            self._incoming = self._accepted(saved)

        handle = self.register_load_state_dict_pre_hook(accept)
        try:
            super().load_state_dict(state_dict)
        finally:
            self._incoming = None
            handle.remove()

    def resume(self) -> None:
        """Go on where the journal ends: replay it, and take over the counters and the momentum.

        A journal file and the weights a run began with are a checkpoint of its last step, also
        after a kill::

            journal = zo.Trajectory.open("run.zo", recover=True)
            opt = zo.MeZO(model, ..., journal=journal)      # model: as the run began
            opt.resume()                                    # bit for bit as it was

        Learning rate schedulers keep their own state.

        Raises:
            ValueError: there is no journal, this optimizer has made steps already, or the journal
                was made with another ``seed`` or ``num_directions``.
            ModelMismatchError: the journal is of another model. Nothing is changed.
        """
        journal = self._journal
        if journal is None:
            raise ValueError("resume needs a journal")
        if self._step:
            raise ValueError(f"resume must come before the first step; {self._step} were made")
        window: list[Past] = []
        for record in journal:
            if not record.seeds:
                continue
            fresh = record.seeds[-self.num_directions :]
            if fresh != self._seeds(record.step):
                raise ValueError(
                    f"step {record.step} of the journal was made with another seed or "
                    f"num_directions than {self.seed} and {self.num_directions}"
                )
            gradients = record.meta.get("gradients")
            if not gradients:
                window.clear()  # a step without momentum forgets those before
            elif record.step >= journal.next_step - self.momentum_window:
                window.append(Past(record.step, fresh, tuple(map(tuple, gradients))))
        if self._mask is not None and self._bound is not None:
            journal.replay_(self._bound)
        else:
            held = {n: p for g in self.param_groups for n, p in pairs(g)}
            journal.replay_(held if self._model is None else self._model)
        self._step = journal.next_step
        self._skipped = sum(not record.seeds for record in journal)
        self._window = tuple(window)

    def _shadows(self) -> dict[str, Tensor]:
        """What low-precision weights under a mask are, in float32, by name."""
        params = self._bound.params if self._bound is not None else ()
        return {
            p.name: p.values() for p in params if p.masked is not None and p.dtype != torch.float32
        }

    def __getstate__(self) -> dict[str, Any]:
        # The binding is made again: it belongs to this model object.
        self._settle()
        self.flush()
        kept = {name: self.__dict__[name] for name in KEPT}
        return super().__getstate__() | kept | {"_incoming": {"_shadow": self._shadows()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling and copying, and the last act of torch's ``load_state_dict``."""
        super().__setstate__(state)
        self._begin()
        incoming = dict(self.__dict__.get("_incoming") or {})
        shadow: Mapping[str, Tensor] = incoming.pop("_shadow", {})
        for name, value in incoming.items():
            setattr(self, name, value)
        self._incoming = None
        if "_model" in state:
            self._bind()
            self._announced = []
        for name, values in shadow.items():
            masked = self._bound.by_name[name].masked if self._bound is not None else None
            if masked is not None:
                masked.shadow.copy_(values)

    def _run_state(self) -> dict[str, Any]:
        """The entry ``STATE_KEY`` of a state dict."""
        return {
            "format": _STATE_FORMAT,
            "contract_version": CONTRACT_VERSION,
            "step": self._step,
            "skipped": self._skipped,
            **{name: getattr(self, name) for name in OPTIONS},
            "mask": None if self._mask is None else self._mask.fingerprint(),
            "shadow": self._shadows(),
            "window": [
                {
                    "step": past.step,
                    "seeds": list(past.seeds),
                    "gradients": [list(row) for row in past.gradients],
                }
                for past in self._window
            ],
        }

    def _accepted(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Check a state dict before torch takes it; the attributes that torch does not know.

        Raises:
            ValueError, UnknownVersionError: as :meth:`zokernels.MeZO.load_state_dict`.
        """
        if STATE_KEY not in state_dict:
            raise ValueError(f"the state dict has no {STATE_KEY!r}: it is of another optimizer")
        saved = state_dict[STATE_KEY]
        try:
            for label, known in (("format", _STATE_FORMAT), ("contract_version", CONTRACT_VERSION)):
                if saved[label] != known:
                    raise UnknownVersionError(f"{label} must be {known}; got {saved[label]!r}")
            clip = saved["clip"]
            incoming: dict[str, Any] = {
                "seed": signed_seed(int(saved["seed"])),
                "distribution": check_distribution(saved["distribution"]),
                "rounding": check_rounding(saved["rounding"]),
                "estimator": check_choice("estimator", saved["estimator"], ESTIMATORS),
                "num_directions": check_count("num_directions", saved["num_directions"]),
                "clip": None if clip is None else check_positive("clip", clip),
                "nonfinite": check_choice("nonfinite", saved["nonfinite"], NONFINITE),
                "momentum_window": check_count("momentum_window", saved["momentum_window"]),
                "_step": int(saved["step"]),
                "_skipped": int(saved["skipped"]),
                "_window": tuple(
                    Past(
                        int(past["step"]),
                        tuple(signed_seed(int(s)) for s in past["seeds"]),
                        tuple(tuple(map(float, row)) for row in past["gradients"]),
                    )
                    for past in saved["window"]
                ),
            }
            mask = None if self._mask is None else self._mask.fingerprint()
            if saved.get("mask") != mask:
                raise ValueError(
                    f"the state dict is of a run under mask {saved.get('mask')}; this optimizer "
                    f"has {mask}"
                )
            incoming["_shadow"] = dict(saved.get("shadow", {}))
            expected = {n: tuple(v.shape) for n, v in self._shadows().items()}
            if mask is not None and {n: tuple(v.shape) for n, v in incoming["_shadow"].items()} != (
                expected
            ):
                raise ValueError(
                    "the state dict's shadow does not fit the masked parameters: another dtype?"
                )
            groups = state_dict["param_groups"]
            for group in groups:
                check_group(group)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the state dict is damaged: {error!r}") from error
        for i, (ours, theirs) in enumerate(zip(self.param_groups, groups, strict=False)):
            names = theirs.get("param_names", ours["param_names"])
            for mine, name in zip(ours["param_names"], names, strict=False):
                if mine != name:
                    raise ValueError(
                        f"the state dict is of another model: group {i} has {name!r} where this "
                        f"optimizer has {mine!r}"
                    )
        journal = self._journal
        for label in ("distribution", "rounding"):
            if journal is not None and getattr(journal, label) != incoming[label]:
                raise ValueError(
                    f"the state dict has {label} {incoming[label]!r}, but the journal has "
                    f"{getattr(journal, label)!r}: attach another journal"
                )
        return incoming
