"""The journal of a run: every update as seeds and scalars, and its exact replay.

A :class:`Trajectory` holds, step by step, the terms of the fused updates a zeroth-order run made:
seeds, coefficients and weight decay per parameter group, where the roundings were. With the weights
the run started from it is a checkpoint of every step of the run in some dozens of bytes a step, and
:meth:`Trajectory.replay_` rebuilds the weights bit for bit in one pass over them.

The file is described in :mod:`zokernels.trajectory_format`.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from torch import Tensor, nn

from zokernels import _targets
from zokernels._files import write_atomically
from zokernels._targets import NamedTensors, Target, fp32
from zokernels.binding import Binding, BoundParameter, unwrap
from zokernels.displacement import Displacement, check_distribution, check_rounding
from zokernels.masks import Mask
from zokernels.noise import CONTRACT_VERSION, signed_seed
from zokernels.trajectory_format import (
    HEADER,
    LAYOUT,
    STEP,
    CorruptTrajectoryError,
    Layout,
    Mark,
    ModelMismatchError,
    ParameterRecord,
    Record,
    Step,
    TrajectoryError,
    TrajectoryVersionError,
    TruncatedTrajectoryError,
    as_json,
    decode_header,
    decode_layout,
    decode_step,
    encode_header,
    encode_layout,
    encode_step,
    magic,
    records,
    seal,
)


class Trajectory:
    """The updates of a run, in memory or also in a journal file.

    An optimizer fills it (``zo.MeZO(model, journal=trajectory)``); :meth:`begin` and :meth:`append`
    are for other writers.

    Args:
        metadata: JSON-compatible facts about the run, such as the name of the base model.

    Attributes:
        distribution: of every direction; None until :meth:`begin`.
        rounding: of every update; None until :meth:`begin`.
        layouts: the parameter groups, one entry for each time they changed.
        steps: the records.
    """

    def __init__(self, *, metadata: Mapping[str, Any] | None = None) -> None:
        self.metadata: dict[str, Any] = dict(metadata or {})
        as_json(self.metadata, "metadata")
        self.contract_version = CONTRACT_VERSION
        self.distribution: str | None = None
        self.rounding: str | None = None
        self.layouts: list[Layout] = []
        self._steps: list[Step] = []
        # Of an optimizer whose last steps are still on the device: makes it append them.
        self.pending: Callable[[], None] | None = None
        self.path: Path | None = None
        self._file: FileIO | None = None
        self._closed = False  # a journal whose file takes no more records
        self._sync = False
        # Where the file ends and the checksum there; and the same before each step's record.
        self._tail = Mark(0, 0)
        self._marks: list[Mark] = []

    # --- reading and writing records --------------------------------------------------------------

    def begin(
        self, groups: Sequence[Sequence[BoundParameter]], *, distribution: str, rounding: str
    ) -> None:
        """Say which parameters move, in which groups. Repeated calls add a layout when it changed.

        Args:
            groups: bound parameters by group.
            distribution: ``"gaussian"`` or ``"rademacher"``.
            rounding: ``"nearest"`` or ``"stochastic"``.

        Raises:
            TrajectoryError: the trajectory was begun with another distribution or rounding, or
                knows one of the parameters with another shape or dtype.
        """
        check_distribution(distribution)
        check_rounding(rounding)
        layout: Layout = tuple(tuple(ParameterRecord.of(p) for p in group) for group in groups)
        for label, had, now in (
            ("distribution", self.distribution or distribution, distribution),
            ("rounding", self.rounding or rounding, rounding),
        ):
            if had != now:
                raise TrajectoryError(f"the trajectory has {label} {had!r}; got {now!r}")
        self._check_layout(layout)
        if not self.layouts or self.layouts[-1] != layout:
            self._check_open()
        if self.distribution is None:
            if self._file is not None:
                self._start_file(encode_header(distribution, rounding, self.metadata))
            self.distribution, self.rounding = distribution, rounding
        if not self.layouts or self.layouts[-1] != layout:
            self._write(LAYOUT, encode_layout(layout))
            self.layouts.append(layout)

    def append(
        self,
        step: int,
        seeds: Sequence[int],
        coeffs: Sequence[Sequence[float]],
        *,
        decay: Sequence[Sequence[float]] | None = None,
        ends: Sequence[bool] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Step:
        """Add the update of one step; in a journal it is on its way to disk when this returns.

        Args:
            step: the optimizer's step counter, larger than the last one.
            seeds: K seeds.
            coeffs: ``[groups][K]`` numbers, rounded to float32.
            decay: ``[groups][K]`` numbers, or None for 1.
            ends: K flags, or None for one rounding after the last term. The last must be True.
            meta: JSON-compatible notes.

        Raises:
            TrajectoryError: before :meth:`begin`; a step not after the last; sizes that do not fit;
                a number that is not finite; a journal that was closed. Nothing is added.
            OSError: the file cannot be written. Nothing is added.
        """
        if not self.layouts:
            raise TrajectoryError("call begin() before append(): the parameter groups are unknown")
        count = len(seeds)
        record = Step(
            int(step),
            tuple(signed_seed(int(s)) for s in seeds),
            tuple(fp32(row) for row in coeffs),
            _decay(decay),
            tuple(bool(e) for e in ends) if ends is not None else _one_end(count),
            dict(meta or {}),
            len(self.layouts) - 1,
        )
        self._check_step(record)
        self._check_open()
        mark = self._tail
        self._write(STEP, encode_step(record))
        self._marks.append(mark)
        self._steps.append(record)
        return record

    def undo(self) -> None:
        """Take back the last record: its update was not made after all."""
        if not self.steps:
            raise TrajectoryError("there is no step to take back")
        self.truncate(self.steps[-1].step)

    def truncate(self, step: int) -> None:
        """Drop every record from optimizer step ``step`` on, from the file too.

        What a run that resumes from an older checkpoint does with the steps after it.

        Args:
            step: the first step to drop.

        Raises:
            TrajectoryError: the journal was closed.
        """
        keep = sum(1 for s in self.steps if s.step < step)
        if keep == len(self.steps):
            return
        self._check_open()
        if self._file is not None:
            self._tail = self._marks[keep]
            self._file.truncate(self._tail.offset)
            self._file.seek(self._tail.offset)
        # A step's layout was written right before it at the latest.
        del self.layouts[self.steps[keep].layout + 1 :]
        del self.steps[keep:]
        del self._marks[keep:]

    @property
    def steps(self) -> list[Step]:
        """The records."""
        if self.pending is not None:
            self.pending()
        return self._steps

    @steps.setter
    def steps(self, steps: list[Step]) -> None:
        self._steps = steps

    # --- the list of steps ------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> Trajectory: ...
    def __getitem__(self, index: int | slice) -> Step | Trajectory:
        """One step, or the trajectory of consecutive steps (in memory)."""
        if not isinstance(index, slice):
            return self.steps[index]
        if index.step not in (None, 1):
            raise ValueError(f"a trajectory's slice must have step 1; got {index.step}")
        part = Trajectory(metadata=self.metadata)
        part.distribution, part.rounding = self.distribution, self.rounding
        part.steps = self.steps[index]
        part._marks = [Mark(0, 0)] * len(part.steps)
        part.layouts = self.layouts[: part.steps[-1].layout + 1 if part.steps else 1]
        return part

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("contract_version", "distribution", "rounding", "layouts", "steps")
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        terms = sum(len(s.seeds) for s in self.steps)
        return (
            f"Trajectory({len(self)} steps, {terms} terms, {len(self.fingerprint)} parameters, "
            f"distribution={self.distribution!r}, rounding={self.rounding!r})"
        )

    @property
    def fingerprint(self) -> tuple[ParameterRecord, ...]:
        """Every parameter the run moved, in the order of first appearance."""
        known: dict[str, ParameterRecord] = {}
        for layout in self.layouts:
            for group in layout:
                for record in group:
                    known.setdefault(record.name, record)
        return tuple(known.values())

    @property
    def next_step(self) -> int:
        """The step after the last recorded one; 0 when there is none."""
        return self.steps[-1].step + 1 if self.steps else 0

    # --- use --------------------------------------------------------------------------------------

    def replay_(self, model: Target, *, mask: Mask | None = None) -> None:
        """Apply every update to the weights the run started from: one fused pass.

        Each weight is loaded once, goes through every step's arithmetic and rounding, and is stored
        once. The result equals the run's weights bit for bit, also in bfloat16 and float16, with
        stochastic rounding, weight decay, momentum and several groups.

        Args:
            model: module, Binding, or mapping of names to tensors (a state dict). Parameters the
                run did not move stay untouched.
            mask: that of the run, if it had one; a Binding brings its own.

        Raises:
            ModelMismatchError: a parameter of the run is missing, has another shape or dtype, or
                moved under another mask; the message names the first. Nothing is changed.
        """
        bound = self._match(model, mask)
        # Parameters with the same groups in every layout have the same terms.
        place: dict[str, list[int]] = {}
        for i, layout in enumerate(self.layouts):
            for g, group in enumerate(layout):
                for record in group:
                    place.setdefault(record.name, [-1] * len(self.layouts))[i] = g
        alike: dict[tuple[int, ...], list[BoundParameter]] = {}
        for p in bound:
            alike.setdefault(tuple(place[p.name]), []).append(p)
        for groups, members in alike.items():
            seeds: list[int] = []
            coeffs: list[float] = []
            decay: list[float] = []
            ends: list[bool] = []
            for step in self.steps:
                index = groups[step.layout]
                if index < 0:
                    continue
                values, factors = step.terms(index)
                if _targets.idle(values, factors):
                    continue
                seeds += step.seeds
                coeffs += values
                decay += factors or (1.0,) * len(values)
                ends += step.ends
            if seeds:
                _targets.update_(
                    members,
                    seeds,
                    coeffs,
                    None if all(d == 1.0 for d in decay) else decay,
                    ends,
                    str(self.distribution),
                    str(self.rounding),
                )

    def to_displacement(self, group: int | None = None) -> Displacement:
        """The run as one displacement of the weights it started from.

        Exact for float32 weights; for lower precision it leaves out the roundings between the steps
        (:meth:`replay_` keeps them).

        Args:
            group: index of a parameter group; None when all groups have the same terms.

        Raises:
            TrajectoryError: the run has weight decay (then it is no displacement); ``group`` is
                None and the groups differ, or it does not exist in every layout.
        """
        indices = {len(layout) for layout in self.layouts}
        if group is not None and any(not 0 <= group < n for n in indices):
            raise TrajectoryError(f"group must be in [0, {min(indices)}); got {group}")
        seeds: list[int] = []
        coeffs: list[float] = []
        for step in self.steps:
            if any(d != 1.0 for row in step.decay for d in row):
                raise TrajectoryError(
                    f"step {step.step} has weight decay, so the run is no displacement; use replay_"
                )
            if group is None and len(set(step.coeffs)) > 1:
                raise TrajectoryError(
                    f"the parameter groups differ at step {step.step}: ask for one with group="
                )
            seeds += step.seeds
            coeffs += step.coeffs[group or 0] if step.coeffs else ()
        return Displacement(seeds, coeffs, distribution=self.distribution or "gaussian")

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trajectory to a file; an existing one is replaced only by a complete new one.

        Raises:
            TrajectoryError: nothing was recorded yet (no :meth:`begin`).
            OSError: the file cannot be written.
        """
        write_atomically(path, self._encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, recover: bool = False) -> Trajectory:
        """Read a saved trajectory or the journal of a run into memory; the file is not changed.

        Args:
            path: the file.
            recover: keep the whole records before a truncated or damaged one (with a warning that
                says how much is lost) where this would raise.

        Raises:
            ForeignFileError: the file is no trajectory.
            TrajectoryVersionError: unknown format or contract version.
            TruncatedTrajectoryError: the file ends inside a record.
            CorruptTrajectoryError: a wrong checksum, or a record that makes no sense.
            OSError: the file cannot be read.
        """
        trajectory = cls()
        trajectory._read(Path(path), recover)
        trajectory.path = Path(path)
        return trajectory

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        recover: bool = False,
        sync: bool = False,
    ) -> Trajectory:
        """A journal: a trajectory whose file grows with every step. Records in it are read first.

        Each record is handed to the operating system before :meth:`append` returns, so a killed
        process loses nothing it recorded.

        Args:
            path: the file; created when missing.
            metadata: for a new file, see :class:`Trajectory`.
            recover: cut a truncated or damaged end off the file (with a warning) where this would
                raise.
            sync: wait for the disk at every record, which survives a power failure too.

        Raises:
            TrajectoryError: another open journal writes this file.
            Otherwise as :meth:`load`.
        """
        trajectory = cls(metadata=metadata)
        trajectory.path = Path(path)
        trajectory._sync = sync
        # Unbuffered: one record is one write.
        file = FileIO(os.open(trajectory.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            _lock(file, trajectory.path)
            if os.fstat(file.fileno()).st_size:
                trajectory._read(trajectory.path, recover)
            file.truncate(trajectory._tail.offset)
            file.seek(trajectory._tail.offset)
        except BaseException:
            file.close()
            raise
        trajectory._file = file
        return trajectory

    def close(self) -> None:
        """Close the journal's file; the trajectory can still be read, and takes no more records."""
        if self.pending is not None:
            self.pending()
        if self._file is not None:
            self._file.close()
            self._file, self._closed = None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy lives in memory: two writers of one file would destroy it.
        return {
            **self.__dict__,
            "_steps": self.steps,
            "_file": None,
            "_closed": False,
            "pending": None,
        }

    # --- inside -----------------------------------------------------------------------------------

    def _match(self, model: Target, mask: Mask | None) -> list[BoundParameter]:
        """The model's parameters that the run moved, checked."""
        wanted = self.fingerprint
        if mask is not None or isinstance(model, (Binding, NamedTensors)):
            held = _targets.resolve(model, mask).by_name
            records = {name: ParameterRecord.of(p) for name, p in held.items()}
            _same_records(wanted, records)
            return [held[record.name] for record in wanted]
        tensors: Mapping[str, Tensor]
        if isinstance(model, nn.Module):
            tensors = dict(unwrap(model).named_parameters())
        elif isinstance(model, Mapping):
            tensors = model
        else:
            raise TypeError(
                f"model must be a torch.nn.Module, a Binding or a mapping of names to tensors; got "
                f"{type(model).__name__}"
            )
        tensors = {r.name: tensors[r.name] for r in wanted if r.name in tensors}
        _same_records(wanted, {n: ParameterRecord.of_tensor(n, t) for n, t in tensors.items()})
        if not wanted:
            return []
        bound = NamedTensors(tensors.items())
        twice = next((record for record in wanted if record.name not in bound.by_name), None)
        if twice is not None:
            raise ModelMismatchError(
                f"the run moved {twice} on its own, but the model shares its memory with another "
                f"parameter of the run"
            )
        return list(bound.params)

    def _check_open(self) -> None:
        if self._closed:
            raise TrajectoryError(
                f"the journal {self.path} is closed: open it again, or give the optimizer another "
                f"one (or None)"
            )

    def _check_layout(self, layout: Layout) -> None:
        known = {record.name: record for record in self.fingerprint}
        seen: set[str] = set()
        for group in layout:
            for record in group:
                if record.name in seen:
                    raise TrajectoryError(f"parameter {record.name!r} stands in two groups")
                seen.add(record.name)
                if known.get(record.name, record) != record:
                    raise ModelMismatchError(
                        f"the trajectory knows {known[record.name]}; got {record}"
                    )

    def _check_step(self, record: Step) -> None:
        count, groups = len(record.seeds), len(self.layouts[-1])
        if not self.next_step <= record.step < 1 << 64:
            raise TrajectoryError(
                f"step must be at least {self.next_step}, the one after the last record; got "
                f"{record.step} (truncate({record.step}) drops the records from there on)"
            )
        for label, rows in (("coeffs", record.coeffs), ("decay", record.decay)):
            if (label == "coeffs" or rows) and [len(r) for r in rows] != [count] * groups:
                raise TrajectoryError(
                    f"{label} must be [{groups}][{count}] numbers; got rows of "
                    f"{[len(r) for r in rows]}"
                )
            for row in rows:
                for value in row:
                    if not math.isfinite(value):
                        raise TrajectoryError(f"{label} must be finite in float32; got {value!r}")
        if len(record.ends) != count or (count and not record.ends[-1]):
            raise TrajectoryError(
                f"ends must be {count} flags, the last of them True; got {record.ends}"
            )

    def _start_file(self, header: bytes) -> None:
        assert self._file is not None
        self._file.seek(0)
        start, mark = magic()
        record, mark = seal(HEADER, header, mark)
        self._put(start + record, 0)
        self._tail = mark

    def _write(self, kind: int, payload: bytes) -> None:
        if self._file is not None:
            record, mark = seal(kind, payload, self._tail)
            self._put(record, self._tail.offset)
            self._tail = mark

    def _put(self, data: bytes, offset: int) -> None:
        assert self._file is not None
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if self._sync:
                os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(offset)
            self._file.seek(offset)
            raise

    def _encode(self) -> bytes:
        if self.distribution is None or self.rounding is None:
            raise TrajectoryError("nothing was recorded yet: there is nothing to save")
        start, mark = magic()
        parts, written = [start], 0

        def add(kind: int, payload: bytes) -> None:
            nonlocal mark
            record, mark = seal(kind, payload, mark)
            parts.append(record)

        add(HEADER, encode_header(self.distribution, self.rounding, self.metadata))
        for step in self.steps:
            for layout in self.layouts[written : step.layout + 1]:
                add(LAYOUT, encode_layout(layout))
            written = max(written, step.layout + 1)
            add(STEP, encode_step(step))
        for layout in self.layouts[written:]:
            add(LAYOUT, encode_layout(layout))
        return b"".join(parts)

    def _read(self, path: Path, recover: bool) -> None:
        data = memoryview(path.read_bytes())
        try:
            self._parse(data, path)
        except (TruncatedTrajectoryError, CorruptTrajectoryError) as error:
            if not recover:
                raise
            warnings.warn(
                f"{error}; keeping {len(self)} whole steps and leaving out the last "
                f"{len(data) - self._tail.offset} bytes",
                stacklevel=3,
            )

    def _parse(self, data: memoryview, path: Path) -> None:
        for record in records(data, path):
            self._take(record)
            self._tail = record.end

    def _take(self, record: Record) -> None:
        try:
            if record.kind == HEADER:
                self.distribution, self.rounding, self.metadata = decode_header(record.payload)
            elif record.kind == LAYOUT:
                layout = decode_layout(record.payload)
                self._check_layout(layout)
                self.layouts.append(layout)
            elif record.kind == STEP:
                if not self.layouts:
                    raise CorruptTrajectoryError("a step before the first layout")
                step = decode_step(record.payload, len(self.layouts) - 1)
                self._check_step(step)
                self.steps.append(step)
                self._marks.append(record.start)
            else:
                raise CorruptTrajectoryError(f"unknown record kind {record.kind}")
        except (CorruptTrajectoryError, TrajectoryVersionError):
            raise
        except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
            raise CorruptTrajectoryError(f"{record.where}: {error}") from error


def _lock(file: FileIO, path: Path) -> None:
    """Keep a second writer, such as another rank, off a journal."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrajectoryError(f"{path} is already open as a journal") from error
    except OSError:  # a file system without locks
        return


def _same_records(wanted: Sequence[ParameterRecord], held: Mapping[str, ParameterRecord]) -> None:
    for record in wanted:
        if record.name not in held:
            raise ModelMismatchError(f"the model has no parameter {record}")
        if held[record.name] != record:
            raise ModelMismatchError(
                f"the run moved {record}, but the model's is {held[record.name].kind}"
            )


def _one_end(count: int) -> tuple[bool, ...]:
    return tuple(k == count - 1 for k in range(count))


def _decay(rows: Sequence[Sequence[float]] | None) -> tuple[tuple[float, ...], ...]:
    """Rows in float32; nothing when all are 1."""
    rounded = tuple(fp32(row) for row in rows or ())
    return rounded if any(d != 1.0 for row in rounded for d in row) else ()
