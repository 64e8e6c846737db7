"""What an evaluation of a model at branches does: every product, its plan and its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zokernels import _registry
from zokernels.binding import Binding, Selection, bind
from zokernels.branches import Branches
from zokernels.losses import loss_of
from zokernels.planner import LinearPlan, plan_linear
from zokernels.triton.devices import architecture


@dataclass(frozen=True, slots=True)
class Call:
    """One op of an evaluation.

    Attributes:
        parameter: name of the weight; op: name of the op; backend: who serves it.
        shape: stored shape of the weight's matrix; tokens: rows of activations of one branch.
        noise: values drawn; flops: of a product; plan: of a linear layer, else None (the loss head
            goes through the vocabulary in chunks of its own).
    """

    parameter: str
    op: str
    backend: str
    shape: tuple[int, int]
    tokens: int
    noise: int
    flops: int
    plan: LinearPlan | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The calls of one evaluation; ``str()`` is a table."""

    branches: int
    stacked: bool
    calls: tuple[Call, ...]
    formed: dict[str, int]

    @property
    def noise(self) -> int:
        """Values drawn in all."""
        return sum(call.noise for call in self.calls)

    @property
    def flops(self) -> int:
        """Floating-point operations of the products."""
        return sum(call.flops for call in self.calls)

    def __str__(self) -> str:
        how = "stacked" if self.stacked else "one after another"
        lines = [
            f"{self.branches} branches {how}: {self.noise / 1e6:.1f} M values of noise, "
            f"{self.flops / 1e9:.2f} GFLOP in products",
            f"{'parameter':50} {'op':22} {'backend':10} {'shape':>14} {'tokens':>7} "
            f"{'noise M':>8}  plan",
        ]
        for c in self.calls:
            plan = ""
            if c.plan is not None:
                plan = (
                    f"{c.plan.kind}: {c.plan.tiles} x {c.plan.tile_outputs} outputs, "
                    f"{c.plan.token_blocks} token blocks, "
                    f"scratch {c.plan.scratch_bytes / 2**20:.2f} MiB"
                )
                if c.plan.instructions is not None and c.plan.seconds is not None:
                    plan += (
                        f", reads {c.plan.weight_bytes / 2**20:.2f} MiB, "
                        f"{c.flops / 1e9:.2f} GFLOP, {c.plan.instructions / 1e9:.3f} G noise "
                        f"instructions, {c.plan.seconds * 1e6:.0f} us by the model"
                    )
            lines.append(
                f"{c.parameter:50} {c.op:22} {c.backend:10} {c.shape[0]:>7}x{c.shape[1]:<6} "
                f"{c.tokens:>7} {c.noise / 1e6:>8.3f}  {plan}"
            )
        if self.formed:
            lines.append(
                "formed whole: " + ", ".join(f"{n} ({k}x)" for n, k in self.formed.items())
            )
        return "\n".join(lines)


class _Record(TorchDispatchMode):
    """Notes every op of ours that an evaluation ends in."""

    def __init__(self, names: dict[int, str], device: str | None) -> None:
        super().__init__()
        self.names = names
        self.device = device
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "zokernels":
            self.calls += self._read(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _read(self, op: str, args: tuple[Any, ...]) -> list[Call]:
        plan, flops = None, 0
        if op == "displace_vectors":
            vectors, seeds, _, ids = args[:4]
            return [
                self._call(i, op, v[None], 0, v.numel() * seeds.numel(), 0, None)
                for v, i in zip(vectors, ids, strict=True)
            ]
        if op == "displace":
            w, seeds, coeffs, param_id = args[:4]
            tokens, noise = 0, w.numel() * seeds.numel()
        elif op == "embedding":
            ids, w, seeds, coeffs, param_id = args[:5]
            tokens = ids.numel() if args[8] else ids[0].numel()
            noise = min(ids.unique().numel(), w.shape[0]) * w.shape[1] * seeds.numel()
        elif op == "sparse_linear":
            x, w, _, indices, _, seeds, coeffs, param_id = args[:8]
            tokens = (x.numel() if args[10] else x[0].numel()) // x.shape[-1]
            flops = 2 * coeffs.shape[0] * tokens * (w.numel() + indices.numel())
            noise = indices.numel() * seeds.numel()
        elif op in ("linear", "linear_cross_entropy"):
            x, w = args[:2]
            seeds, coeffs, param_id = args[3:6] if op == "linear" else args[4:7]
            shared = args[9] if op == "linear" else args[10]
            tokens = (x.numel() if shared else x[0].numel()) // x.shape[-1]
            flops = 2 * coeffs.shape[0] * tokens * w.numel()
            noise = w.numel() * seeds.numel()
            gpu = self.device or _registry.serving(op, w.device.type) == "triton"
            if op == "linear" or gpu:
                plan = plan_linear(
                    *w.shape,
                    tokens=max(tokens, 1),
                    branches=coeffs.shape[0],
                    terms=seeds.numel(),
                    dtype=w.dtype,
                    device=self.device or w.device.type,
                    transposed=op == "linear" and args[10],
                    distribution=args[8] if op == "linear" else args[9],
                )
                noise = plan.noise
        else:
            return []
        return [self._call(param_id, op, w, tokens, noise, flops, plan)]

    def _call(
        self,
        param_id: int,
        op: str,
        w: Tensor,
        tokens: int,
        noise: int,
        flops: int,
        plan: LinearPlan | None,
    ) -> Call:
        return Call(
            self.names.get(param_id, "(fixed)"),
            op,
            "triton" if self.device else _registry.serving(op, w.device.type),
            (w.shape[0], w.shape[1]),
            tokens,
            noise,
            flops,
            plan,
        )


def explain(
    model: nn.Module | Binding,
    batch: Any,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    num_branches: int = 2,
    params: Selection = None,
    distribution: str = "gaussian",
    device: str | None = None,
) -> Explanation:
    """Evaluate a batch once at branches around the weights and say what was done.

    With ``device="sm_90"`` (or another architecture) it says what a GPU of that kind would do:
    plans, bytes, operations and noise instructions are those of :mod:`zokernels.triton.plan`.

    Args:
        model, batch, loss_fn, params, distribution: as :func:`zokernels.dual_loss`.
        num_branches: G, an even number gives ``+`` and ``-`` of one direction.
        device: a GPU architecture, present or not; None: the one that evaluates.

    Returns:
        An :class:`Explanation`; print it for a table.

    Raises:
        ValueError: ``num_branches`` < 1, no such architecture, and as :func:`zokernels.dual_loss`.
    """
    if num_branches < 1:
        raise ValueError(f"num_branches must be at least 1; got {num_branches}")
    if device is not None:
        architecture(device)
    binding = bind(model, params)
    table = [[1e-3 * (-1) ** g] for g in range(num_branches)]
    view = Branches(binding, [0], table, distribution=distribution)
    fn = loss_of(binding.model, batch, loss_fn)
    view(fn)  # the first use runs a model several times
    with _Record({p.id: p.name for p in binding.params}, device) as record, torch.no_grad():
        view(fn)
    return Explanation(num_branches, view.stacked, tuple(record.calls), view.formed)
