"""One run: what is timed in which order, within a budget. Files are written as numbers come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

import zokernels as zo
from bench import harness, models
from bench.gpu import choice, floors, ops, report, steps
from bench.gpu.machine import Machine, setting
from bench.gpu.sizes import Shape, Sizes
from zokernels import _choice, _registry

Todo = tuple[str, Shape]
T = TypeVar("T")

# Seconds under which no further case is begun.
LEAST = 3.0


class DeviceLost(RuntimeError):
    """The device answers nothing any more, as after an illegal access."""


@dataclass
class Session:
    """Timing on one machine.

    Attributes:
        machine, sizes: on what, how large.
        checked: backends to time, in the registry's order -> what was checked before.
        budget: seconds from ``begin``.
        results: folder instead of ``bench/results``.
        rounds: most rounds of a step.
        notes: further entries of the JSON files.
        only: ops to time; none: all.
        missing: leave out what the results already hold.
        left_out, failed: labels with reasons.
    """

    machine: Machine
    sizes: Sizes
    checked: dict[str, str]
    budget: float
    results: Path | None = None
    rounds: int = 5
    notes: harness.Row = field(default_factory=dict)
    only: tuple[str, ...] = ()
    missing: bool = False
    begin: float = field(default_factory=time.perf_counter)
    op_rows: list[harness.Row] = field(default_factory=list)
    step_rows: list[harness.Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    floors: floors.Floors | None = None
    _model: tuple[str, PreTrainedModel] | None = None
    _held: set[tuple[str, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.missing:
            for stem, key in (("gpu_ops", ops.KEY), ("gpu_steps", steps.KEY)):
                rows = harness.read_rows(self.folder / f"{stem}.csv")
                self._held |= {tuple(row.get(k, "") for k in key) for row in rows}

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return (self.results or harness.RESULTS) / harness.device_slug(self.machine.device)

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.budget - (time.perf_counter() - self.begin)

    def everything(self, todo: Sequence[Todo], *, with_ops: bool, with_steps: bool) -> None:
        """All there is, most wanted first; what there is no time for is named.

        Args:
            todo: models and batches of the steps.
            with_ops, with_steps: what of it.
        """
        self.notes = {**self.machine.facts(), **self.notes}
        todo = [one for one in todo if with_steps and not self._holds(*one)]
        first = [one for one in todo if one in self.sizes.wanted]
        rest = [one for one in todo if one not in first]
        cases = ops.cases(self.sizes, self.machine.device) if with_ops else []
        cases = [c for c in cases if self._backends(c) and (not self.only or c.op in self.only)]
        wanted = [case for case in cases if case.wanted == 0]
        later = [case for case in cases if case.wanted > 0]
        try:
            if with_ops:
                self.measure_floors()
                later = [*self.time_ops(wanted), *later]
            self.time_steps(first, reserve=self.left() / 3)
            share = 0.4 if rest else 1.0
            remaining = self.time_ops(later, until=self.left() * (1 - share))
            self.time_steps(rest)
            self.left_out += [f"{c.label} (budget)" for c in self.time_ops(remaining)]
        except DeviceLost as error:
            self.failed.append(str(error))
        finally:
            self._model = None
            self.write()

    # --- ops --------------------------------------------------------------------------------------

    def measure_floors(self) -> None:
        """The rates everything is held against."""
        found = self._guarded("floors", lambda: floors.measure(self.machine, self.sizes))
        if found is None:
            return
        for distribution in zo.noise.DISTRIBUTIONS:
            rate = self._guarded(
                f"bare generator, {distribution}",
                lambda d=distribution: floors.generator(self.machine, self.sizes, d),
            )
            if rate is not None:
                found.noise[distribution] = rate
        self.floors = found
        report.console.print(
            f"copy {found.bandwidth / 1e12:.3g} TB/s, bf16 {found.flops / 1e12:.3g} TFLOP/s, "
            + ", ".join(f"{d} {r / 1e9:.3g} G/s" for d, r in found.noise.items())
        )
        self.notes["bandwidth"], self.notes["flops"] = found.bandwidth, found.flops
        self.notes["noise"] = found.noise

    def time_ops(self, cases: Sequence[ops.OpCase], until: float = 0.0) -> list[ops.OpCase]:
        """Every case on every backend that has the op.

        Args:
            cases: in this order.
            until: seconds of the budget to leave.

        Returns:
            The cases there was no time for.
        """
        if self.floors is None:
            self.left_out += [f"{case.label} (no floors)" for case in cases]
            return []
        done = 0
        fresh: list[harness.Row] = []
        try:
            for case in cases:
                if self.left() < max(until, 0.0) + LEAST:
                    break
                fresh += self._guarded(case.label, lambda case=case: self._op(case)) or []
                done += 1
                if len(fresh) >= 40:
                    self._keep(fresh)
        finally:
            self._keep(fresh)
        return list(cases[done:])

    def _keep(self, fresh: list[harness.Row]) -> None:
        """Show and store rows, and empty the list."""
        if fresh:
            self.op_rows += fresh
            report.show("ops", fresh, report.OP_COLUMNS)
            fresh.clear()
            self.write()

    def _backends(self, case: ops.OpCase) -> list[str]:
        """Those that have the op and are to be timed at it."""
        known = _registry.backends()
        having = [name for name in self.checked if case.op in known[name].kernels]
        return [name for name in having if case.key(name) not in self._held]

    def _op(self, case: ops.OpCase) -> list[harness.Row]:
        assert self.floors is not None
        arguments = case.arguments()
        found = []
        for backend in self._backends(case):
            kernel = _registry.kernel(backend, case.op)
            timed = self._guarded(
                f"{case.label} [{backend}]",
                lambda kernel=kernel: self.machine.time(lambda: kernel(*arguments)),
            )
            if timed is not None:
                row = case.row(backend, timed, self.floors)
                found.append({**row, "checked": self.checked[backend]})
        return found

    # --- steps ------------------------------------------------------------------------------------

    def time_steps(self, todo: Sequence[Todo], reserve: float = 0.0) -> None:
        """Whole steps; the budget is shared by those that remain, ``reserve`` seconds kept."""
        for i, (name, size) in enumerate(todo):
            label = f"{name} {size[0]}x{size[1]}"
            limit = (self.left() - reserve) / (len(todo) - i)
            if self.left() - reserve < LEAST:
                self.left_out.append(f"{label} (budget)")
                continue
            fresh = self._guarded(label, lambda n=name, s=size, t=limit: self._step(n, s, t))
            if fresh:
                self.step_rows += fresh
                report.show(label, fresh, report.STEP_COLUMNS)
                self.write()

    def _holds(self, name: str, size: Shape) -> bool:
        """Whether the results hold the steps of a model and a batch."""
        mine = (name, str(size[0]), str(size[1]), steps.STEP)
        return all((*mine, backend, setting()) in self._held for backend in self.checked)

    def model(self, name: str) -> PreTrainedModel | None:
        """The model, made when it is another than the last; None: there is no room."""
        if self._model is None or self._model[0] != name:
            self._model = None
            self.machine.release()
            if self.machine.free() < 1.2 * steps.weights_of(name):
                return None
            self._model = name, steps.build(name, self.machine.device)
        return self._model[1]

    def _step(self, name: str, size: Shape, limit: float) -> list[harness.Row]:
        begin = time.perf_counter()
        model = self.model(name)
        if model is None:
            self.left_out.append(f"{name} {size[0]}x{size[1]} (memory)")
            return []
        backends = list(self.checked)
        batch = models.random_batch(model, *size)
        memory, failed = steps.peaks(self.machine, model, batch, backends)
        usable = [b for b in backends if (steps.STEP, b) in memory]
        density = self.sizes.density if name in self.sizes.masked_models else None
        found = steps.cases(self.machine, model, batch, usable, density)
        self.failed += [f"{name} {size[0]}x{size[1]}, {t}" for t in (*failed, *found.left_out)]
        timings = harness.interleave(
            found.runs,
            rounds=self.rounds,
            min_rounds=min(2, self.rounds),
            chunk=0.1,
            budget=limit - (time.perf_counter() - begin),
            sync=self.machine.synchronize,
            after=found.after,
        )
        base: harness.Row = {"model": name, "dtype": "bf16", "batch": size[0], "length": size[1]}
        rows = steps.rows(base, found.names, found.each(timings), steps.weight_bytes(model), memory)
        return [{**r, "checked": self.checked.get(str(r["backend"]), "")} for r in rows]

    # --- both -------------------------------------------------------------------------------------

    def _guarded(self, label: str, run: Callable[[], T]) -> T | None:
        """What ``run`` returns, or None with the reason noted.

        Raises:
            DeviceLost: the device fails from here on.
        """
        reason = None
        try:
            return run()
        except torch.OutOfMemoryError:
            reason = "memory"
        except DeviceLost:
            raise
        except Exception as error:
            reason = steps.brief(error)
        # Outside the handler: the traceback that holds the tensors is gone.
        if reason == "memory":
            self.left_out.append(f"{label} (memory)")
        else:
            self.failed.append(f"{label}: {reason}")
            report.console.print(f"failed: {label}: {reason}", style="red", markup=False)
        try:
            if self.machine.synchronize:
                self.machine.synchronize()
            self.machine.release()
        except Exception as error:
            raise DeviceLost(f"the device is lost after {label}: {error}") from error
        return None

    def comparisons(self) -> list[choice.Comparison]:
        """The backends held against each other, op by op: the stored rows of the last commit."""
        rows = harness.read_rows(self.folder / "gpu_ops.csv")
        rows = [row for row in rows if row["setting"] == setting()]
        if rows:
            last = max(rows, key=lambda row: row["utc"])["commit"]
            rows = [row for row in rows if row["commit"] == last]
        return choice.compare(rows, self.machine.backends())

    def proposal(self, table: _choice.Table) -> _choice.Table:
        """The registry's table with what was measured here."""
        return choice.updated(table, self.machine.architecture, self.comparisons())

    def write(self) -> None:
        """The files as far as there are numbers."""
        notes = {**self.notes, "left_out": self.left_out, "failed": self.failed}
        device, results = self.machine.device, self.results
        written: list[Path] = []
        if self.op_rows:
            written.append(report.write_ops(self.op_rows, device, results, notes))
        if self.step_rows:
            written.append(report.write_steps(self.step_rows, device, results, notes))
        self.files = written

    def plot(self) -> Iterable[Path]:
        """Plots beside the files."""
        for path in self.files:
            yield (report.plot_ops if path.stem == "gpu_ops" else report.plot_steps)(path)
