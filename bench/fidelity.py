"""Fidelity of the projected gradient with bfloat16 weights, by the form the probe takes.

    python -m bench.fidelity

The truth is ``g = (L(W + eps z) - L(W - eps z)) / (2 eps)`` with the same (bfloat16) weights
``W`` taken to float32 and everything computed in float32. Against it, for the same ``z``:

``nearest``     the probe ``W +/- eps z`` rounded to bfloat16;
``stochastic``  the same rounded stochastically, the two probes with the same bits;
``split``       ``x W^T + eps x Z^T``, ``Z`` in bfloat16, added before the output is rounded;
``vectors``     matrices rounded to nearest, vectors (norm weights, biases) displaced in float32;
``package``     what ``zo.dual_loss`` does on the bfloat16 model.

Two computations: ``fp32`` activations (what the form of the weights alone costs) and ``bf16``
activations (products accumulate in float32, each output is rounded, as a bfloat16 matrix product
does).

Over the directions: ``correlation`` with the truth, ``slope`` ``<g, g32> / <g32, g32>`` (1: no
bias) and ``error`` ``|g - g32| / |g32|``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import zokernels as zo
from bench import harness, models, plots, precision
from zokernels import noise

FORMS = ("nearest", "stochastic", "split", "vectors")
PACKAGE = "package"
COMPUTE = ("fp32", "bf16")
KEY = ("model", "eps", "compute", "form")

Weights = dict[str, Tensor]


def probe(w: Tensor, z: Tensor, step: float, form: str, bits: Tensor | None = None) -> Tensor:
    """One parameter of the probe ``w + step z``, in float32, as a form represents it.

    Args:
        w: bfloat16 weight of any shape.
        z: float32 direction of the same shape.
        step: ``eps`` or ``-eps``.
        form: one of :data:`FORMS`.
        bits: int64 in [0, 65535] of ``w``'s shape, for ``"stochastic"``.

    Raises:
        ValueError: unknown form.
    """
    wide = w.float()
    match form:
        case "nearest":
            return (wide + step * z).to(torch.bfloat16).float()
        case "stochastic":
            return noise.round_to(wide + step * z, torch.bfloat16, bits).float()
        case "split":
            return wide + step * z.to(torch.bfloat16).float()
        case "vectors":
            moved = wide + step * z
            return moved.to(torch.bfloat16).float() if w.dim() > 1 else moved
    raise ValueError(f"form must be one of {FORMS}; got {form!r}")


class LowPrecisionProducts(TorchFunctionMode):
    """Linear, embedding and layer norm with float32 weights and bfloat16 inputs and outputs.

    Every product accumulates in float32 and its output is rounded once, so a float32 weight can
    stand for a form of a bfloat16 one that is not itself a bfloat16 number.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, w, *rest = args
            bias = rest[0] if rest else kwargs.get("bias")
            y = F.linear(x.to(torch.bfloat16).float(), w, bias)
            return y.to(torch.bfloat16)
        if func is F.layer_norm:
            x, *rest = args
            return func(x.float(), *rest, **kwargs).to(torch.bfloat16)
        if func is F.embedding:
            return func(*args, **kwargs).to(torch.bfloat16)
        return func(*args, **kwargs)


@torch.inference_mode()
def loss_at(model: PreTrainedModel, weights: Weights, batch: models.Batch, compute: str) -> float:
    """Loss with float32 ``weights`` in place of the model's."""

    def evaluate() -> float:
        return float(torch.func.functional_call(model, weights, (), dict(batch)).loss.double())

    if compute == "fp32":
        return evaluate()
    with LowPrecisionProducts():
        return evaluate()


def projected(at: Callable[[float], float], eps: float) -> float:
    """The two-point estimate."""
    return (at(eps) - at(-eps)) / (2 * eps)


def projected_gradients(
    low: PreTrainedModel, batch: models.Batch, *, eps: float, seeds: int
) -> Mapping[tuple[str, str], np.ndarray]:
    """``g`` of every direction: ``("fp32", "truth")`` and every (compute, form).

    Args:
        low: model in bfloat16.
        batch: tokens and labels.
        eps: step of the difference.
        seeds: number of directions.
    """
    wide = type(low)(low.config).eval().float()
    start = dict(low.named_parameters())
    values: dict[tuple[str, str], list[float]] = {}
    for seed in range(1, seeds + 1):
        z = zo.directions(low, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        bits = {
            n: torch.randint(0, 1 << 16, p.shape, generator=generator) for n, p in start.items()
        }

        def truth(step: float, z: Weights = z) -> float:
            moved = {n: p.detach().float() + step * z[n] for n, p in start.items()}
            return loss_at(wide, moved, batch, "fp32")

        values.setdefault(("fp32", "truth"), []).append(projected(truth, eps))
        for form in FORMS:
            for compute, model in zip(COMPUTE, (wide, low), strict=True):

                def at(
                    step: float,
                    z: Weights = z,
                    bits: Weights = bits,
                    form: str = form,
                    compute: str = compute,
                    model: PreTrainedModel = model,
                ) -> float:
                    moved = {
                        n: probe(p.detach(), z[n], step, form, bits[n]) for n, p in start.items()
                    }
                    return loss_at(model, moved, batch, compute)

                values.setdefault((compute, form), []).append(projected(at, eps))
        plus, minus = zo.dual_loss(low, batch, seed=seed, eps=eps)
        g = float(plus.double() - minus.double()) / (2 * eps)
        values.setdefault(("bf16", PACKAGE), []).append(g)
    return {k: np.array(v) for k, v in values.items()}


def scores(g: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Correlation, slope and relative error of estimates against the truth."""
    both = np.std(g) > 0 and np.std(truth) > 0
    return {
        "correlation": float(np.corrcoef(g, truth)[0, 1]) if both else float("nan"),
        "slope": float(g @ truth / (truth @ truth)),
        "error": float(np.linalg.norm(g - truth) / np.linalg.norm(truth)),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(help="Directions, text model.", min=2)] = 64,
    large_seeds: Annotated[int, typer.Option(help="Directions, OPT-125M; 0 leaves it out.")] = 8,
    eps: Annotated[str, typer.Option(help="Comma separated.")] = "1e-3,1e-2",
    pretraining: Annotated[int, typer.Option(help="Backpropagation steps, text model.")] = 600,
    results: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
) -> None:
    """Compare the forms a bfloat16 probe can take."""
    console = Console(width=120)
    every = torch.get_num_threads()
    with harness.threads(1):
        text = models.cast_(precision.start_model(pretraining), "bf16")
    todo = [("text", text, models.english().evaluation(8, 64), seeds, 1)]
    if large_seeds:
        opt = models.build("opt-125m", "bf16")
        todo.append(("opt-125m", opt, models.random_batch(opt, 1, 64), large_seeds, every))
    rows: list[harness.Row] = []
    for name, model, batch, count, threads in todo:
        for step in map(float, harness.listed(eps)):
            with harness.threads(threads):
                values = projected_gradients(model, batch, eps=step, seeds=count)
            truth = values["fp32", "truth"]
            table = Table(title=f"{name}, eps {step:g}, {count} directions", title_justify="left")
            for column in ("activations", "form", "correlation", "slope", "error"):
                table.add_column(column)
            for (compute, form), g in values.items():
                if form == "truth":
                    continue
                s = scores(g, truth)
                base: harness.Row = {
                    "model": name,
                    "eps": step,
                    "compute": compute,
                    "form": form,
                }
                rows.append(
                    {
                        **base,
                        "seeds": count,
                        "threads": threads,
                        **{k: round(v, 5) for k, v in s.items()},
                    }
                )
                table.add_row(compute, form, *(f"{v:.4f}" for v in s.values()))
            console.print(table)
    path = harness.record("fidelity", rows, key=KEY, results=results)
    plot(rows, path)
    console.print(f"results: {path}")


def plot(rows: list[harness.Row], path: Path) -> None:
    """Relative error of ``g`` by form, a panel a model and eps."""
    groups = list(dict.fromkeys((r["model"], r["eps"]) for r in rows))
    figure, axes = plots.panels(len(groups))
    forms = (*FORMS, PACKAGE)
    for ax, (model, eps) in zip(axes, groups, strict=True):
        error = {
            (r["compute"], r["form"]): float(str(r["error"]))
            for r in rows
            if (r["model"], r["eps"]) == (model, eps)
        }
        series = {
            f"{c} activations": [error.get((c, f), float("nan")) for f in forms] for c in COMPUTE
        }
        plots.grouped_bars(ax, forms, series, fmt="{:.2f}")
        ax.set_title(f"{model}, eps {eps:g}", fontsize=10)
        ax.set_ylabel("relative error of g")
    axes[0].legend(fontsize=7)
    plots.save(figure, path)


if __name__ == "__main__":
    app()
