"""The command line: ``fedzo run``, ``compare``, ``flower-app``, ``plot``, ``methods``."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedzo.config import RUN, CompareConfig, RunConfig, build, parse_pairs, read_file
from zokernels.finetune.config import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated zeroth-order fine-tuning: only seeds and scalars travel.",
)

# Fields whose option has another name, because it takes one entry at a time.
_OPTIONS = {"options": "--set", "words": "--word"}


def _parameters(kind: type[RunConfig], leave_out: frozenset[str]) -> list[inspect.Parameter]:
    """An option for every field of a configuration, in the field's own words."""
    made = [_config_parameter()]
    for name, field in kind.model_fields.items():
        if name not in leave_out:
            made.append(_parameter(name, field))
    return made


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config", rich_help_panel=RUN, help="TOML, YAML or JSON file; the command line wins."
    )
    return inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, option],
    )


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    extra = field.json_schema_extra
    panel = str(extra.get("panel")) if isinstance(extra, dict) else RUN
    text = field.description or ""
    if not field.is_required() and field.default not in (None, {}, [], False):
        shown = field.default
        text += f" (Default {','.join(map(str, shown)) if isinstance(shown, list) else shown}.)"
    flag = _OPTIONS.get(name, "--" + name.replace("_", "-"))
    kind = _plain_type(field.annotation)
    annotation: Any
    if kind is dict:
        annotation = list[str] | None
    elif kind is bool:
        flag = f"{flag}/--no-{flag[2:]}" if field.default else flag
        annotation = bool | None
    else:
        annotation = (kind if kind in (int, float) else str) | None
    option = typer.Option(flag, rich_help_panel=panel, help=escape(text), show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation, option],
    )


def _plain_type(annotation: Any) -> Any:
    """``int`` of ``int | None``, ``str`` of a Literal, ``dict`` of ``dict[str, str]``."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    origin = get_origin(annotation)
    return str if origin is Literal else origin or annotation


def _takes(
    kind: type[RunConfig], *leave_out: str, folder: str | None = None
) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options of a configuration; it gets those that were given, after the
    folder of its argument where ``folder`` says what it is."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapper(**given: Any) -> None:
            from_file = given.pop("config")
            first = [] if folder is None else [given.pop("folder")]
            try:
                fields = read_file(from_file) if from_file is not None else {}
                command(*first, fields, _given(kind, given))
            except UserError as error:
                _fail(str(error))
            except KeyboardInterrupt:
                _fail("interrupted; the same command with --resume goes on from here", 130)

        parameters = _parameters(kind, frozenset(leave_out))
        if folder is not None:
            argument = Annotated[Path, typer.Argument(help=folder)]
            parameters.insert(
                0,
                inspect.Parameter("folder", inspect.Parameter.KEYWORD_ONLY, annotation=argument),
            )
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _given(kind: type[RunConfig], given: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value in (None, [], ()):
            continue
        plain = _plain_type(kind.model_fields[name].annotation)
        if plain is dict:
            value = parse_pairs(value, _OPTIONS[name])
        elif plain is list:
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif name == "prompt":
            value = value.replace("\\n", "\n")
        values[name] = value
    return values


@app.command()
@_takes(RunConfig)
def run(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Fine-tune a model over simulated clients."""
    from fedzo import experiment

    base: dict[str, Any] = {}
    output = given.get("output") or fields.get("output")
    if given.get("resume") or fields.get("resume"):
        base = experiment.resumed(output or RunConfig.model_fields["output"].default)
    config = build(RunConfig, base, fields, given)
    console = Console()
    result = _watched(config, console)
    _show_result(result, console)
    if config.plots:
        _plots(Path(config.output), console)


@app.command()
@_takes(CompareConfig, "method", "entries", "seed")
def compare(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Run several methods under several seeds: one table, one plot. Finished runs are kept."""
    from fedzo import experiment, metrics, plots, summary

    config = build(CompareConfig, fields, given)
    console = Console()
    runs = config.runs()
    results: dict[str, list[experiment.Result]] = {}
    for number, (name, seed, one) in enumerate(runs, 1):
        _say(console, f"{number}/{len(runs)} {name}, seed {seed}")
        started = (Path(one.output) / experiment.CONFIG).is_file()
        if started and not config.resume:
            raise UserError(
                f"--output {config.output} already holds a comparison: add --resume to go on with "
                f"it, or name another folder"
            )
        one = one.model_copy(update={"resume": started})
        results.setdefault(name, []).append(_watched(one, console))
    folder = Path(config.output)
    table = summary.table(results)
    summary.write(folder, table)
    console.print(summary.rendered(table))
    if config.plots:
        rows = {
            name: [metrics.read(Path(one.output)) for other, _, one in runs if other == name]
            for name in results
        }
        _say(console, f"plot: {plots.plot_compare(folder / 'compare.png', rows)}")


@app.command("flower-app")
@_takes(RunConfig, "transport", folder="Folder to write.")
def flower_app(folder: Path, fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Write a run as a folder for `flwr run`, to be run on a Flower SuperLink."""
    config = build(RunConfig, {"transport": "flower"}, fields, given)
    _flower().write(folder, config)
    _say(Console(), f"written: {folder}; run it with: flwr run {folder} SUPERLINK")


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[
        Path | None, typer.Option(help="One picture that compares the runs, in this file.")
    ] = None,
) -> None:
    """Draw the plots of runs again, or compare runs in one picture."""
    from fedzo import metrics, plots

    console = Console()
    try:
        if output is None:
            for folder in folders:
                _plots(folder, console)
        else:
            rows = {str(folder): [metrics.read(folder)] for folder in folders}
            missing = [name for name, found in rows.items() if not found[0]]
            if missing:
                raise UserError(f"{missing[0]} holds no run")
            _say(console, f"plot: {plots.plot_compare(output, rows)}")
    except UserError as error:
        _fail(str(error))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.")] = None,
) -> None:
    """The methods, or the options of one."""
    from fedzo.methods import METHODS
    from fedzo.options import method_class, options_of

    console = Console()
    try:
        if name is None:
            table = Table("method", "what it is", box=box.SIMPLE_HEAD)
            for key, kind in METHODS.items():
                table.add_row(key, escape((kind.__doc__ or "").strip().splitlines()[0]))
            console.print(table)
            return
        print(inspect.cleandoc(method_class(name).__doc__ or "").split("\n\nArgs:")[0] + "\n")
        table = Table("option (--set NAME=VALUE)", "default", "what it is", box=box.SIMPLE_HEAD)
        for option in options_of(name).values():
            table.add_row(option.name, escape(str(option.default)), escape(option.text))
        console.print(table)
    except UserError as error:
        _fail(str(error))


def _watched(config: RunConfig, console: Console) -> Any:
    """Run with a progress bar; a line at every held-out score."""
    from fedzo import experiment

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(config.method, total=config.rounds, note="")

        def watch(row: dict[str, Any]) -> None:
            progress.update(task, completed=row["round"], note=_short(row))
            if row.get("eval_loss") is not None or row["phase"] == "calibration":
                _say(progress.console, _line(row))

        if config.transport == "flower":
            return _flower().run(config, watch)
        return experiment.run(config, watch)


def _flower() -> Any:
    """The module of Flower's apps.

    Raises:
        UserError: Flower is not installed.
    """
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise UserError("--transport flower needs: pip install 'flwr>=1.40,<1.43'") from error
    from fedzo import flower_app as module

    return module


def _short(row: dict[str, Any]) -> str:
    loss = row.get("loss")
    return (f"loss {loss:.4f}  " if loss is not None else "") + f"up {decimal(row['total_up'])}"


def _line(row: dict[str, Any]) -> str:
    parts = [f"round {row['round']:>4}"]
    if row["phase"] == "calibration":
        flagged = ", ".join(map(str, row["flagged"])) or "none"
        parts = [f"calibration: clients flagged: {flagged}"]
    for name, label in (("eval_loss", "loss"), ("accuracy", "accuracy"), ("perplexity", "ppl")):
        if row.get(name) is not None:
            parts.append(f"{label} {row[name]:.4f}")
    parts.append(f"up {decimal(row['total_up'])}")
    parts.append(f"down {decimal(row['total_down'])}")
    parts.append(f"{row['total_seconds']:.1f} s")
    parts.append(f"memory {decimal(row['memory'])}")
    return "  ".join(parts)


def _show_result(result: Any, console: Console) -> None:
    table = Table(box=box.SIMPLE, show_header=False)
    for name in result.after:
        if name != "examples":
            table.add_row(
                f"held-out {name}", f"{result.before[name]:.4f} -> {result.after[name]:.4f}"
            )
    table.add_row("values that move", f"{result.moving:,} of {result.parameters:,}")
    table.add_row("bytes up, down", f"{decimal(result.bytes_up)}, {decimal(result.bytes_down)}")
    if result.bytes_up:
        table.add_row(
            "a client's message",
            f"{result.uplink:,.0f} bytes; the whole model {result.dense:,} ({result.saving:,.0f}x)",
        )
    if result.flagged:
        table.add_row("clients flagged", ", ".join(map(str, result.flagged)))
    if result.rejections:
        table.add_row("messages refused", str(result.rejections))
    table.add_row("time in rounds", f"{result.seconds:.1f} s")
    table.add_row("peak memory", decimal(result.memory))
    console.print(table)


def _plots(folder: Path, console: Console) -> None:
    from fedzo import plots

    for path in plots.plot_run(folder):
        _say(console, f"plot: {path}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of ``fedzo``."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        explain = getattr(error, "format_message", None)  # a usage error
        if explain is None:
            raise
        if message := " ".join(explain().split()):  # none where help was shown instead
            print(f"error: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)
