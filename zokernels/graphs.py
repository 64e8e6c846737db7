"""A MeZO step as a CUDA graph: one launch a step, whatever the model's number of kernels.

For few tokens a forward pass takes less time on the GPU than its launches take on the host; a graph
is replayed by one call. Seeds, learning rate and weight decay are inputs of the graph, in device
memory of their own, so every replay is another step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zokernels import deferred
from zokernels.binding import Binding, BoundParameter
from zokernels.branches import Branches
from zokernels.interrupts import whole
from zokernels.optim import MeZO
from zokernels.optim_state import OPTIONS
from zokernels.pending import PendingTerm, PendingUpdate

# Options that a graph holds; a replay takes its seed anew.
_RECORDED = sorted({*OPTIONS, "fuse_update", "max_branches", "sequential"} - {"seed"})


class GraphedStep:
    """Steps of an optimizer on batches of one shape, replayed from a CUDA graph.

    ::

        step = zo.GraphedStep(opt, batch)      # evaluates the batch, changes nothing
        for batch in loader:
            loss = step(batch)                 # what opt.step(batch) does

    Journal, counters, ``state_dict`` and schedulers of the learning rate work as with ``opt.step``,
    and both can be mixed. What a graph holds cannot change: shapes, the train or eval mode,
    ``eps``, the optimizer's options, which parameters move and where they and the buffers lie,
    Python values that the model reads. The activations of the batch stay allocated for the next
    replay.

    Args:
        optimizer: a :class:`~zokernels.MeZO` whose steps stay on the device (see there), without
            momentum.
        batch: as for ``step``; tensors in tuples, lists and dicts are copied into the graph's own.
        loss_fn: as for ``step``.

    Raises:
        ValueError: the optimizer's steps do not stay on the device, have momentum, or the model's
            branches cannot be stacked.
        Whatever cannot be recorded, such as a model that reads a value on the host.
    """

    def __init__(
        self,
        optimizer: MeZO,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if not optimizer._stays_on_device():
            raise ValueError(
                "optimizer must keep its steps on one CUDA device: nonfinite='skip', a model, and "
                "a GPU backend that is on (python -m zokernels)"
            )
        if any(group["momentum"] for group in optimizer.param_groups):
            raise ValueError("optimizer must have momentum 0: its terms would grow between replays")
        optimizer.check_ranks()
        self.optimizer = optimizer
        leaves, self._spec = tree_flatten(batch)
        self._batch = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        held = tree_unflatten(self._batch, self._spec)
        self._evaluation = optimizer._evaluation(held, loss_fn, None, "step")
        self._rates = optimizer._rates()
        self._flags = optimizer._requires_grad()
        self._options = self._recorded_options()
        self._inputs = optimizer._inputs(optimizer._seeds(optimizer._step), self._rates)
        if self._evaluation.sequential:
            raise ValueError("optimizer must not be sequential: a graph holds the stacked branches")
        self._held = self._hold() if optimizer.fuse_update else []
        self._by_name = {p.name: term for members, term in self._held for p in members}
        bound = optimizer._bound
        assert isinstance(bound, Binding)
        self._tensors = [*bound.model.parameters(), *bound.model.buffers()]
        self._places = [t.data_ptr() for t in self._tensors]
        device = self._inputs.seeds.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._replay, self._losses = record(self._run, self._warm_up)
        # What the graph reads and only the optimizer holds, which may drop it.
        self._alive = (bound, *optimizer._tables.values())

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Everything that happens once: comparisons, compilation, tables. No weight changes."""
        self.optimizer.flush()
        for _ in range(3):
            self._wait()
            losses = self.optimizer._losses(self._evaluation, self._inputs.seeds)
            losses = self.optimizer._reduce_losses(losses)
        bound = self.optimizer._bound
        if isinstance(bound, Binding) and not Branches(bound, [0], [[0.0]]).stacked:
            raise ValueError("the model's branches cannot be stacked, as a graph holds them")
        self._update(torch.full_like(losses, torch.nan))
        self._wait()

    @torch.no_grad()
    def _run(self) -> Tensor:
        optimizer = self.optimizer
        losses = optimizer._losses(self._evaluation, self._inputs.seeds)
        losses = optimizer._reduce_losses(losses)
        self._update(losses)
        return losses

    def _update(self, losses: Tensor) -> None:
        move = self._keep if self._held else None
        self.optimizer._update_on_device(losses, self._inputs, None, move)

    # --- with fuse_update: the graph begins with the update of the last replay and leaves its own
    # in tensors that stay where they are ----------------------------------------------------------

    def _hold(self) -> list[tuple[list[BoundParameter], PendingTerm]]:
        """One pending term a group, that changes nothing yet."""
        optimizer, device = self.optimizer, self._inputs.seeds.device
        return [
            (
                members,
                PendingTerm(
                    torch.zeros(1, dtype=torch.int64, device=device),
                    torch.zeros(1, device=device),
                    torch.ones(1, device=device),
                    optimizer.distribution,
                    optimizer.rounding,
                ),
            )
            for members in optimizer._groups
            if members
        ]

    def _keep(
        self, members: list[BoundParameter], seeds: Any, coeffs: Any, decay: Any, ends: Any
    ) -> None:
        term = next(term for own, term in self._held if own is members)
        assert term.decay is not None
        term.seed.copy_(seeds)
        term.coeff.copy_(coeffs)
        term.decay.copy_(decay)

    def _wait(self) -> None:
        """Let the held terms wait, if they do not: what a replay takes up."""
        if self._held and not self._waits:
            for members, term in self._held:
                self._pending.add(members, term)

    def _recorded_options(self) -> dict[str, Any]:
        """What a replay would take from the capture, whatever it is now."""
        optimizer = self.optimizer
        found = {name: getattr(optimizer, name) for name in _RECORDED}
        bound = optimizer._bound
        assert isinstance(bound, Binding)
        return found | {"model.training": bound.model.training}

    @property
    def _waits(self) -> bool:
        return self._pending.holds(self._by_name)

    @property
    def _pending(self) -> PendingUpdate:
        bound = self.optimizer._bound
        assert isinstance(bound, Binding)
        return bound.pending

    def _take_over(self) -> None:
        """Leave the update of the last replay to the next one; make any other."""
        if self._held and self._waits:
            return
        self.optimizer.flush()
        for _, term in self._held:
            assert term.decay is not None
            term.coeff.zero_()
            term.decay.fill_(1)
        self._wait()

    @whole
    @torch.no_grad()
    def __call__(self, batch: Any = None) -> Tensor:
        """One step.

        Args:
            batch: of the captured structure and shapes; None: the same batch again.

        Returns:
            Mean loss over the branches, float32, 0-d.

        Raises:
            ValueError: another structure or shape, or ``eps``, an option of the optimizer, the
                moving parameters, the mode or the memory of the model's tensors changed.
        """
        optimizer = self.optimizer
        rates = optimizer._rates()
        if [r.eps for r in rates] != [r.eps for r in self._rates]:
            raise ValueError("eps was changed after the capture: make another GraphedStep")
        if optimizer._requires_grad() != self._flags:
            raise ValueError("requires_grad was changed after the capture: make another one")
        if any(r.momentum for r in rates):
            raise ValueError("momentum was set after the capture")
        for name, value in self._recorded_options().items():
            if value != self._options[name]:
                raise ValueError(
                    f"{name} was {self._options[name]!r} at the capture and is {value!r} now: make "
                    f"another GraphedStep"
                )
        if [t.data_ptr() for t in self._tensors] != self._places:
            raise ValueError(
                "a tensor of the model was given other memory after the capture: make another "
                "GraphedStep"
            )
        if batch is not None:
            self._take(batch)
        optimizer._settle(wait=False)
        seeds = optimizer._seeds(optimizer._step)
        fresh = optimizer._inputs(seeds, rates)
        for name in ("seeds", "weights", "decay"):
            getattr(self._inputs, name).copy_(getattr(fresh, name))
        self._take_over()
        self._replay()
        self._wait()
        losses = self._losses.clone()
        optimizer._note(seeds, rates, losses, fresh.past)
        return losses.mean()

    def _take(self, batch: Any) -> None:
        leaves, spec = tree_flatten(batch)
        if spec != self._spec:
            raise ValueError("batch must have the structure of the captured one")
        for mine, given in zip(self._batch, leaves, strict=True):
            same = isinstance(mine, Tensor) == isinstance(given, Tensor)
            if isinstance(mine, Tensor) and isinstance(given, Tensor):
                same = mine.shape == given.shape and mine.dtype == given.dtype
            elif same:
                same = mine == given
            if not same:
                raise ValueError(
                    "batch must have the shapes, dtypes and values besides tensors of the captured "
                    "one"
                )
        for mine, given in zip(self._batch, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(deferred.placed(given, mine.device))


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Where graphs of a device are recorded; torch's own is on whatever device came first."""
    return torch.cuda.Stream(device)


def record(
    run: Callable[[], Tensor], warm_up: Callable[[], None]
) -> tuple[Callable[[], None], Tensor]:
    """Capture ``run`` in a CUDA graph of the current device.

    Returns:
        What replays it, and its output, which every replay overwrites.

    Raises:
        What ``warm_up`` and ``run`` raise; the current stream is then what it was.
    """
    current = torch.cuda.current_stream()
    side = _stream(torch.cuda.current_device())
    side.wait_stream(current)
    with torch.cuda.stream(side):
        warm_up()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    reason: BaseException | None = None
    try:
        # Other threads (a loader that pins memory) go on meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            try:
                output = run()
            except BaseException as error:
                reason = error
                raise
    except BaseException as error:
        # A capture that cannot be ended stays on its stream and hides what went wrong in it.
        torch.cuda.set_stream(current)
        raise (reason or error) from None
    return graph.replay, output
