"""The picture and the tables of a run."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from zokernels.finetune.config import Config
from zokernels.finetune.folder import PICTURE
from zokernels.finetune.objective import Score
from zokernels.finetune.train import Summary


def picture(summary: Summary, path: Path) -> None:
    """Training loss (running mean) and held-out scores over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    accuracy = summary.before.accuracy is not None
    figure, axes = pyplot.subplots(
        1, 2 if accuracy else 1, figsize=(10 if accuracy else 6, 3.8), squeeze=False
    )
    losses = axes[0][0]
    for run in summary.runs:
        width = max(1, len(run.curve) // 5)
        smooth = [
            statistics.mean(run.curve[max(0, i - width + 1) : i + 1]) for i in range(len(run.curve))
        ]
        (line,) = losses.plot(range(1, len(smooth) + 1), smooth, alpha=0.5, linewidth=1)
        points = [(0, summary.before), *run.evaluations, (len(run.curve), run.after)]
        steps = [step for step, _ in points]
        losses.errorbar(
            steps,
            [score.loss for _, score in points],
            yerr=[score.loss_se for _, score in points],
            marker="o",
            color=line.get_color(),
            label=f"seed {run.seed}",
            capsize=2,
        )
        if accuracy:
            axes[0][1].errorbar(
                steps,
                [score.accuracy or 0.0 for _, score in points],
                yerr=[score.accuracy_se or 0.0 for _, score in points],
                marker="o",
                color=line.get_color(),
                label=f"seed {run.seed}",
                capsize=2,
            )
    losses.set_title("loss: held out (points), training, running mean (lines)", fontsize=9)
    losses.set_ylabel("cross entropy")
    if accuracy:
        axes[0][1].set_title("held-out accuracy", fontsize=9)
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(summary: Summary, console: Console) -> None:
    """Print before and after per seed, the improvement, time and memory."""
    config, before = summary.config, summary.before
    accuracy = before.accuracy is not None
    say(
        console,
        f"{summary.trainable_parameters:,} of {summary.parameters:,} parameters moved "
        f"({config.trainable}), {config.steps} steps, batch {_batch(config)}, "
        f"{config.num_directions} {config.distribution} direction"
        f"{'s' if config.num_directions > 1 else ''} a step, lr {config.lr:g} ({config.schedule}), "
        f"eps {config.eps:g}",
    )
    several = len(summary.runs) > 1
    spread = "examples; last row: seeds" if several else "examples"
    table = Table(
        title=f"Held out: {before.examples} examples (± standard error over {spread})",
        caption=None if accuracy else "ppl.: perplexity",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in ("loss", "acc." if accuracy else "ppl."):
        for when in ("before", "after"):
            table.add_column(f"{name} {when}", justify="right", no_wrap=True)
    for run in summary.runs:
        table.add_row(f"seed {run.seed}", *_cells(before, run.after))
    if several:
        table.add_section()
        loss, loss_se = summary.spread([run.after.loss for run in summary.runs])
        cells = [f"{before.loss:.4f}", _plus_minus(loss, loss_se)]
        if accuracy:
            right, right_se = summary.spread([r.after.accuracy or 0.0 for r in summary.runs])
            cells += [f"{before.accuracy:.3f}", _plus_minus(right, right_se, 3)]
        else:
            perplexity, error = summary.spread([r.after.perplexity for r in summary.runs])
            cells += [f"{before.perplexity:.2f}", _plus_minus(perplexity, error, 2)]
        table.add_row("mean", *cells)
    console.print(table)
    say(console, _verdict(summary))
    if summary.comparisons:
        console.print(_beside_mezo(summary))
    for line in _costs(summary):
        say(console, line)


def say(console: Console, text: str) -> None:
    """Print a line as it is: not wrapped, brackets no markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _batch(config: Config) -> str:
    """The examples of a step, and what they are made of: ``16 (2 ranks x 8)``."""
    parts = [f"{config.ranks} ranks"] if config.ranks > 1 else []
    parts += [f"{config.accumulate} micro-batches"] if config.accumulate > 1 else []
    made = " x ".join([*parts, str(config.batch_size)])
    return f"{config.effective_batch_size} ({made})" if parts else made


def _cells(before: Score, after: Score) -> list[str]:
    cells = [_plus_minus(before.loss, before.loss_se), _plus_minus(after.loss, after.loss_se)]
    if before.accuracy is not None:
        cells += [_plus_minus(s.accuracy or 0.0, s.accuracy_se, 3) for s in (before, after)]
    else:
        cells += [f"{s.perplexity:.2f}" for s in (before, after)]
    return cells


def _plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _verdict(summary: Summary) -> str:
    """The improvement beside its standard errors, in words."""
    parts = []
    gains = [("loss", -1.0, summary.loss_gain)]
    if summary.accuracy_gain is not None:
        gains.append(("accuracy", 1.0, summary.accuracy_gain))
    for name, sign, (mean, error) in gains:
        text = f"held-out {name} {sign * mean:+.4f}"
        if error is not None:
            beyond = "more than" if mean > error else "NOT more than"
            seeds = f"{len(summary.runs)} seeds"
            text += f" ± {error:.4f} over {seeds} (better by {beyond} its standard error)"
        parts.append(text)
    return "; ".join(parts)


def _costs(summary: Summary) -> list[str]:
    run = summary.runs[-1]
    whose = " of rank 0" if summary.config.ranks > 1 else ""
    lines = [
        (
            f"time per step {1e3 * run.seconds_per_step:.0f} ms; memory{whose} "
            f"{_mib(run.memory_before)} before the first step, peak {_mib(run.memory_peak)} during "
            f"steps (+{_mib(max(run.memory_peak - run.memory_before, 0))})"
        )
    ]
    if any(r.skipped for r in summary.runs):
        lines.append(f"steps skipped, loss not finite: {[r.skipped for r in summary.runs]}")
    if summary.mezo_drift is not None:
        lines.append(
            f"10 probing steps without an update move the weights by {summary.mezo_drift:.1e} of "
            f"their norm in MeZO's loop; ours never writes them"
        )
    folder = Path(summary.config.output)
    lines.append(f"total {summary.seconds:.0f} s; results in {folder}, picture {folder / PICTURE}")
    return lines


def _beside_mezo(summary: Summary) -> Table:
    """Time and memory of a step beside MeZO's own loop."""
    first = summary.comparisons[0]
    caption = f"medians of {first.rounds} rounds or more; the faster variant of MeZO's loop"
    if any(not row.measured for row in summary.comparisons):
        caption += "; * one direction's time, times the directions"
    table = Table(
        title="A step beside MeZO's own loop (same model and batch, measured in turns)",
        caption=caption,
        box=box.SIMPLE_HEAD,
    )
    table.add_column("moving", no_wrap=True)
    for name in ("parameters", "dirs", "ours", "MeZO's", "ratio", "+MiB ours", "MeZO's"):
        table.add_column(name, justify="right", no_wrap=name != "+MiB ours")
    for row in summary.comparisons:
        table.add_row(
            "all" if row.what == "full" else "trained",
            f"{row.parameters:,}",
            str(row.directions),
            _seconds(row.ours),
            _seconds(row.mezo) + ("" if row.measured else "*"),
            f"{row.ratio:.2f}x",
            f"{row.peak_ours / 2**20:,.0f}",
            f"{row.peak_mezo / 2**20:,.0f}",
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
