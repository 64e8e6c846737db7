"""The command line: see :mod:`bench.gpu`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import harness
from bench.gpu import checks, ops, steps, warm
from bench.gpu.checks import Check
from bench.gpu.machine import Cuda, Machine, Rehearsal
from bench.gpu.report import console, summary
from bench.gpu.session import Session, Todo
from bench.gpu.sizes import FULL, TINY, Sizes
from bench.harness import cores
from zokernels import _choice, _ops, _registry
from zokernels.triton import devices

# When the process began, where it is this program's: imports count too.
BEGIN: float | None = None
# Of the budget: what building and conformance may take together when numbers are to follow.
CHECKS = 0.4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Shapes, comma separated.")] = ",".join(FULL.models),
    size: Annotated[str, typer.Option(help="BATCHxLENGTH, comma separated.")] = ",".join(
        f"{b}x{t}" for b, t in FULL.batches
    ),
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 540.0,
    rounds: Annotated[int, typer.Option(help="Most rounds of a step.")] = 5,
    backend: Annotated[str, typer.Option(help="Backends, comma separated; all by default.")] = "",
    op: Annotated[str, typer.Option(help="Ops, comma separated; all by default.")] = "",
    build_cuda: Annotated[
        bool, typer.Option("--build-cuda", help="Build csrc/cuda for this GPU first.")
    ] = False,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Conformance, and no numbers.")
    ] = False,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="A part of it under compute-sanitizer as well.")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Numbers without conformance; rows say so.")
    ] = False,
    ops_only: Annotated[bool, typer.Option("--ops-only", help="Leave out steps.")] = False,
    steps_only: Annotated[bool, typer.Option("--steps-only", help="Leave out ops.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Leave out what the results already hold.")
    ] = False,
    write_choice: Annotated[
        bool,
        typer.Option(
            "--write-choice", help="Write the faster backends to zokernels/backends.json."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; needs no GPU.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The timing at tiny shapes on this CPU.")
    ] = False,
    architecture: Annotated[str, typer.Option(help="For the plans of a dry run.")] = "sm_90",
    device: Annotated[str, typer.Option()] = "cuda",
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Conformance, floors, ops and steps on a CUDA device."""
    begin = time.perf_counter() if BEGIN is None else BEGIN
    if budget <= 0:
        raise typer.BadParameter(f"budget must be positive; got {budget}")
    if rounds < 1:
        raise typer.BadParameter(f"rounds must be at least 1; got {rounds}")
    if ops_only and steps_only:
        raise typer.BadParameter("--ops-only and --steps-only leave nothing")
    only = tuple(harness.listed(op))
    if unknown := [name for name in only if name not in _ops.SCHEMAS]:
        raise typer.BadParameter(f"op must be among {sorted(_ops.SCHEMAS)}; got {unknown}")
    todo = _todo(model, size, architecture)
    if dry_run:
        _describe(todo, budget, architecture)
        return
    if rehearse:
        _rehearse(begin, budget, results)
        return
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        console.print(
            "bench.gpu needs a CUDA device and a torch built for it; there is none here. "
            "--dry-run says what it would do, --rehearse does it at tiny shapes on this CPU."
        )
        raise typer.Exit(2)

    def left() -> float:
        return budget - (time.perf_counter() - begin)

    share = 1.0 if check_only else CHECKS
    made: list[Check] = []
    if build_cuda:
        # Before the registry looks for the library.
        built = checks.build_cuda(torch.cuda.get_device_capability(device), share * left())
        made.append(_said(built))
    machine = Cuda(device)
    asked = _backends(backend, machine)
    checked = {}
    # The compiled backend first: what it leaves of its share is for Triton's compiler.
    for i, name in enumerate(reversed(asked)):
        if unchecked:
            checked[name] = "no"
            continue
        limit = (left() - (1 - share) * budget) / (len(asked) - i)
        made.append(_said(checks.conformance(name, machine.name, limit)))
        if made[-1].passed:
            checked[name] = "conformance"
    checked = {name: checked[name] for name in asked if name in checked}
    if sanitize:
        # The compiled backend first: its memory accesses are our own.
        jobs = [(name, tool) for name in reversed(checked) for tool in checks.TOOLS]
        for i, (name, tool) in enumerate(jobs):
            limit = (left() - (1 - share) * budget - 5) / (len(jobs) - i)
            made.append(_said(checks.sanitize(name, tool, limit)))
    if "triton" in checked and not (check_only or only or missing):
        # A process holds a few GiB; of what is left numbers get the most.
        workers = min(8, cores() - 2, machine.free() // (8 << 30))
        if workers > 1:
            made.append(_said(warm.ahead(workers, left() / 5)))
    bad = [check for check in made if check.state in ("failed", "no time")]
    if not check_only and checked:
        notes: harness.Row = {"checks": [str(check) for check in made]}
        session = Session(
            *(machine, FULL, checked, budget, results, rounds, notes, only, missing, begin)
        )
        session.everything(todo, with_ops=not steps_only, with_steps=not ops_only)
        _finish(session, write_choice)
        bad += [Check(text, "failed", "") for text in session.failed]
    elif not check_only:
        console.print("[red]no backend passed: no numbers (--unchecked takes them all the same)")
    if bad or not (checked or check_only):
        raise typer.Exit(1)


def _said(check: Check) -> Check:
    console.print(str(check), style="green" if check.passed else "yellow", markup=False)
    return check


def _todo(model: str, size: str, architecture: str) -> list[Todo]:
    try:
        devices.architecture(architecture)
        sizes = [harness.parse_size(text) for text in harness.listed(size)]
        names = harness.listed(model)
        for name in names:
            steps.weights_of(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return [(name, one) for name in names for one in sizes]


def _describe(todo: list[Todo], budget: float, architecture: str) -> None:
    console.print(f"{budget:.0f} s: conformance up to {budget * CHECKS:.0f} s, floors, then")
    cases = ops.cases(FULL, "meta")
    for case in cases:
        if case.wanted == 0:
            console.print(f"  {case.label}")
    first = [one for one in todo if one in FULL.wanted]
    for name, (b, t) in first:
        console.print(f"  step {name} {b}x{t}")
    console.print(f"then {sum(c.wanted > 0 for c in cases)} more cases of ops and all steps:")
    for name, (b, t) in todo:
        held, plans = steps.weights_of(name), steps.describe(name, (b, t), architecture)
        console.print(f"  {name} {b}x{t}, weights {held / 2**30:.1f} GiB; {plans}")
    console.print(f"plans and times by the model for {architecture}, not measured")


def _backends(text: str, machine: Machine) -> list[str]:
    there = machine.backends()
    for name, found in _registry.backends().items():
        if found.reason is not None and name in _registry.choosable():
            console.print(f"backend {name} is off: {found.reason}", style="yellow", markup=False)
    asked = harness.listed(text) or there
    if absent := [name for name in asked if name not in there]:
        raise typer.BadParameter(f"backend must be among {there}; got {absent}")
    return [name for name in there if name in asked]


def _finish(session: Session, write_choice: bool) -> None:
    for line in summary(session.op_rows, session.step_rows):
        console.print(line, markup=False)
    compared = session.comparisons()
    for found in compared:
        console.print(
            f"{found.op}: {found.first} takes {found.ratio:.3f} of {found.other}'s time in "
            f"{found.cases} cases, spread {found.spread:.3f}: {found.winner or 'neither'}"
        )
    allowed = {"ops": _ops.SCHEMAS, "names": _registry.choosable()}
    if compared:
        proposed = session.proposal(_choice.read(_choice.FILE, **allowed))
        _choice.write(session.folder / "gpu_choice.json", proposed)
        if write_choice:
            _choice.write(_choice.FILE, proposed)
    for title, lines in (("left out", session.left_out), ("failed", session.failed)):
        for line in lines:
            console.print(f"{title}: {line}", style="yellow", markup=False)
    for path in [*session.files, *session.plot()]:
        console.print(f"wrote {path}", markup=False)


def _rehearse(begin: float, budget: float, results: Path | None, sizes: Sizes = TINY) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        where = results or Path(folder)
        machine = Rehearsal()
        checked = dict.fromkeys(machine.backends(), "no")
        notes: harness.Row = {"rehearsal": True}
        session = Session(machine, sizes, checked, budget, where, 2, notes, begin=begin)
        todo = [(name, one) for name in sizes.models for one in sizes.batches]
        session.everything(todo, with_ops=True, with_steps=True)
        _finish(session, write_choice=False)
        console.print(
            "a rehearsal at tiny shapes on this CPU: none of these numbers says anything about a "
            "GPU" + ("" if results else "; its files are deleted")
        )
        if session.failed:
            raise typer.Exit(1)
