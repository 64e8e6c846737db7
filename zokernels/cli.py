"""The command line: ``zokernels info`` and ``zokernels finetune``."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from zokernels.finetune.config import Config, UserError, build, read_file

if TYPE_CHECKING:
    from zokernels.finetune.ranks import Ranks

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Zeroth-order fine-tuning with noise computed inside the kernels.",
)


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        info(as_json=False)


def collect() -> dict[str, Any]:
    """Versions, devices, backends (and why one is off) and which of them serves which op."""
    import torch

    import zokernels
    from zokernels import _ops, _registry

    devices: list[dict[str, Any]] = [
        {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "type": "cuda",
                    "index": index,
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory": properties.total_memory,
                }
            )
    return {
        "versions": {
            "zokernels": zokernels.__version__,
            "noise contract": zokernels.CONTRACT_VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "devices": devices,
        "backends": {
            name: {
                "devices": list(backend.devices),
                "on": backend.reason is None,
                "reason": backend.reason,
                "ops": sorted(backend.kernels),
            }
            for name, backend in _registry.backends().items()
        },
        "serving": {
            device: {op: _serving(op, device) for op in _ops.SCHEMAS}
            for device in _registry.device_types()
        },
    }


def _serving(op: str, device: str) -> str | None:
    from zokernels import _registry

    try:
        return _registry.serving(op, device)
    except RuntimeError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, devices, and which backend serves which op."""
    try:
        facts = collect()
    except (RuntimeError, ValueError) as error:  # a backend asked for by name that cannot be had
        _fail(f"ZOKERNELS_BACKEND: {error}")
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = Console()
    versions = Table(box=box.SIMPLE_HEAD, show_header=False)
    for name, value in facts["versions"].items():
        versions.add_row(name, str(value))
    for device in facts["devices"]:
        extra = f"{device['threads']} threads" if device["type"] == "cpu" else device["capability"]
        label = device["type"] + (f":{device['index']}" if "index" in device else "")
        versions.add_row(label, f"{device['name']}, {extra}")
    console.print(versions)
    backends = Table("backend", "devices", "state", box=box.SIMPLE_HEAD)
    for name, backend in facts["backends"].items():
        state = "on" if backend["on"] else f"off: {backend['reason']}"
        backends.add_row(name, ", ".join(backend["devices"]).replace("*", "any"), state)
    console.print(backends)
    serving = Table("op", *facts["serving"], box=box.SIMPLE_HEAD)
    for op in next(iter(facts["serving"].values())):
        serving.add_row(op, *(table[op] or "none" for table in facts["serving"].values()))
    console.print(serving)


DATA, TRAINING, RUN = "Model and data", "Training", "Run"


@app.command()
def finetune(
    context: typer.Context,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            rich_help_panel=RUN,
            help="Fine-tune SmolLM2-135M on movie-review sentiment; both are fetched once.",
        ),
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RUN, help="JSON or TOML file of options; the command line wins."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(rich_help_panel=DATA, help="transformers model id or folder.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="File (.txt, .jsonl, .json, .csv, .tsv) or name[:config] of a dataset.",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(rich_help_panel=DATA, help="Held-out examples; default: a part of --data."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(rich_help_panel=DATA, help="auto, text, completion or classify.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(rich_help_panel=DATA, help="Column of the text (default text).")
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(rich_help_panel=DATA, help="Column of the prompt (default prompt)."),
    ] = None,
    completion_column: Annotated[
        str | None,
        typer.Option(rich_help_panel=DATA, help="Column of the completion (default completion)."),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(rich_help_panel=DATA, help="Column of the label: classification.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Classification prompt with columns in braces: '{text} It was' (\\n: line end).",
        ),
    ] = None,
    verbalizer: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=DATA,
            help="LABEL=WORD, once per label; the word with its leading space: '1= great'.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            help="candidates: cross entropy among the label words; label: over the vocabulary.",
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(rich_help_panel=DATA, help="Tokens per example (default 128).")
    ] = None,
    train_limit: Annotated[
        int | None,
        typer.Option(rich_help_panel=DATA, help="Most training examples; 0: all (default 0)."),
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option(rich_help_panel=DATA, help="Part of --data held out (default 0.1)."),
    ] = None,
    eval_limit: Annotated[
        int | None,
        typer.Option(rich_help_panel=DATA, help="Most held-out examples; 0: all (default 1000)."),
    ] = None,
    trainable: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TRAINING,
            help="full, lora, norms, biases, layers:SLICE, regex:PATTERN; + joins, & intersects.",
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(rich_help_panel=TRAINING, help="Default 8.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(rich_help_panel=TRAINING, help="Default 16.")
    ] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=TRAINING, help="Module name to adapt; repeat for several."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(rich_help_panel=TRAINING, help="Default 1000.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(rich_help_panel=TRAINING, help="Learning rate (default 1e-6).")
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(rich_help_panel=TRAINING, help="Size of the probes (default 1e-3)."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TRAINING, help="Examples a rank takes at a time (default 16)."
        ),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TRAINING, help="Batches a rank takes for each step (default 1)."
        ),
    ] = None,
    distribution: Annotated[
        str | None, typer.Option(rich_help_panel=TRAINING, help="gaussian or rademacher.")
    ] = None,
    num_directions: Annotated[
        int | None, typer.Option(rich_help_panel=TRAINING, help="Directions a step (default 1).")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(rich_help_panel=TRAINING, help="constant, linear or cosine.")
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(rich_help_panel=TRAINING, help="Steps of linear warm-up (default 0)."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(rich_help_panel=TRAINING, help="Default 0.")
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(rich_help_panel=TRAINING, help="Default 0.")
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=TRAINING, help="Limit of the projected gradient (default none)."
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(rich_help_panel=TRAINING, help="stochastic or nearest, for 16-bit weights."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(rich_help_panel=TRAINING, help="float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TRAINING,
            help="auto, cpu or cuda[:N] (default auto); under torchrun each rank has its own GPU.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=RUN, help="First seed (default 0).")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(rich_help_panel=RUN, help="Runs, with seeds one after another (default 1)."),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUN, help="Steps between held-out scores; 0: only at the end."
        ),
    ] = None,
    eval_batch_size: Annotated[
        int | None, typer.Option(rich_help_panel=RUN, help="Default 32.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(rich_help_panel=RUN, help="Folder of the results (default runs/finetune)."),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume", rich_help_panel=RUN, help="Go on with the run in --output."),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(rich_help_panel=RUN, help="Steps between checkpoints (default 20)."),
    ] = None,
    compare_mezo: Annotated[
        bool | None,
        typer.Option(
            "--compare-mezo/--no-compare-mezo",
            rich_help_panel=RUN,
            help="Afterwards, measure MeZO's own loop on the same model and batch.",
        ),
    ] = None,
    save_weights: Annotated[
        bool | None,
        typer.Option(
            "--save-weights", rich_help_panel=RUN, help="Also save the model with save_pretrained."
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RUN,
            help="Where --demo keeps its files (default $ZOKERNELS_CACHE or ~/.cache/zokernels).",
        ),
    ] = None,
) -> None:
    """Fine-tune a causal language model with forward passes only (MeZO).

    Data parallel: torchrun --nproc-per-node 2 -m zokernels finetune ...
    """
    given = {
        name: value
        for name, value in context.params.items()
        if value not in (None, [], ())
        and name not in ("demo", "config", "verbalizer", "lora_target")
    }
    if lora_target:
        given["lora_targets"] = lora_target
    if prompt is not None:
        given["prompt"] = prompt.replace("\\n", "\n")
    import torch

    from zokernels.finetune.ranks import OtherRankError, Ranks

    try:
        with Ranks.join() as ranks:
            console = Console(quiet=not ranks.first)
            given["ranks"] = ranks.count
            if verbalizer:
                given["verbalizers"] = _verbalizers(verbalizer)
            settled = ranks.from_first(
                lambda: _configuration(
                    demo, read_file(config) if config is not None else {}, given, console
                )
            )
            _run(settled, console, ranks)
    except UserError as error:
        _fail(str(error))
    except OtherRankError:
        raise typer.Exit(1) from None
    except torch.OutOfMemoryError as error:
        _fail(
            "out of memory: give a smaller --batch-size (--accumulate makes up for it), "
            f"--max-length or --num-directions: {error}",
            1,
        )
    except KeyboardInterrupt:
        _fail("interrupted; if steps were made, the same command with --resume goes on", 130)


def _configuration(
    demo: bool, from_file: dict[str, Any], given: dict[str, Any], console: Console
) -> Config:
    from zokernels.finetune import folder, presets

    base: dict[str, Any] = {}
    output = given.get("output") or from_file.get("output")
    if given.get("resume") or from_file.get("resume"):
        if demo and not output:
            output = presets.last_folder()
        if not output:
            raise UserError("--resume needs the --output folder of the run")
        base = folder.resumed_options(str(output))
    elif demo:
        # Mistakes on the command line show before anything is downloaded.
        build({**presets.DEMO, "model": "demo", "data": "demo"}, from_file, given)
        if not output:
            given = {**given, "output": presets.fresh_folder()}
        base = presets.demo(
            given.get("cache_dir") or from_file.get("cache_dir"),
            _plain(console),
        )
    return build(base, from_file, given)


def _run(config: Config, console: Console, ranks: Ranks) -> None:
    from zokernels.finetune import folder, report, train

    summary = train.finetune(config, console, ranks)
    if ranks.first:
        report.picture(summary, Path(config.output) / folder.PICTURE)
        report.show(summary, console)


def _plain(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _verbalizers(entries: list[str]) -> dict[str, str]:
    words = {}
    for entry in entries:
        label, equals, word = entry.partition("=")
        if not equals or not word:
            raise UserError(f"--verbalizer must be LABEL=WORD; got {entry!r}")
        words[label] = word
    return words


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of ``zokernels`` and ``python -m zokernels``."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        explain = getattr(error, "format_message", None)  # a usage error: unknown option, no number
        if explain is None:
            raise
        from zokernels.finetune.ranks import OtherRankError, Ranks

        try:
            with Ranks.join():  # all ranks were told the same: one says so
                raise UserError(explain()) from None
        except UserError as said:
            print(f"error: {' '.join(str(said).split())}", file=sys.stderr)
        except OtherRankError:
            pass
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)
