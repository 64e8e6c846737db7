"""FedSPZO: the saving in forward FLOPs against n-SPSA, and the variance of its estimator.

With P1 = n and P2 = 1 the nested estimator is n-SPSA on the whole model: n directions of both
blocks. With P1 = 1 and P2 = n block 1 is evaluated for one direction only. A step costs
``2 P1 c1 + 2 P1 P2 (1 - c1)`` forwards of the model.

``variance``: on one batch, mean squared error of the estimate of each block against the gradient by
backprop, relative to the gradient's squared norm, for P1 = 1 and growing P2.

Source: FedSPZO (arXiv 2502.10239): saving of 1.6 to 3 times. Derived: 1 / P2 for block 2, a
floor for block 1.
"""

from __future__ import annotations

from typing import Any

import torch

import zokernels as zo
from bench.fed.bed import Bed, arguments, spread
from bench.harness import listed
from fedzo.gradients import gradients
from fedzo.methods import FedSPZO
from fedzo.methods.base import Site

KEY = ("kind", "P1", "P2", "share", "phase", "lr", "seed")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--directions", default="5", help="n, comma separated")
    parser.add_argument("--share", type=float, default=0.75, help="block 1's share of the layers")
    parser.add_argument("--steps", type=int, default=5, help="H")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--trials", type=int, default=60, help="of the variance")
    args = parser.parse_args()
    bed = Bed("fed_fedspzo", args, KEY)
    for p2 in (1, 2, 4, 8, 16):
        key = {"kind": "variance", "P1": 1, "P2": p2, "share": args.share, "phase": "",
               "lr": "", "seed": 0}  # fmt: skip
        if bed.find(key) is None:
            bed.store({**key, **variance(bed, p2, args.share, args.trials)})
    c1 = flop_share(bed, args.share)
    for n in map(int, listed(args.directions)):
        # After as many steps; then n-SPSA and plain SPSA after as many forwards as FedSPZO took.
        for kind, p1, p2 in (
            ("training", n, 1),
            ("training", 1, n),
            ("equal forwards", n, 1),
            ("equal forwards", 1, 1),
        ):
            rounds = args.rounds
            if kind != "training":
                rounds = round(args.rounds * forwards(c1, 1, n) / forwards(c1, p1, p2))
            options: dict[str, Any] = {
                "block1": p1,
                "block2": p2,
                "split_share": args.share,
                "steps": args.steps,
            }
            key = {"kind": kind, "P1": p1, "P2": p2, "share": args.share}
            lr = bed.tuned(key, "fedspzo", options, (1e-4, 3e-4, 1e-3), rounds=rounds)
            for seed in range(args.seeds):
                row = {**key, "phase": "final", "lr": f"{lr:.2e}", "seed": seed}
                bed.run(row, "fedspzo", {**options, "lr": lr}, rounds=rounds, seed=seed)
    report(bed, c1, args.steps)


def flop_share(bed: Bed, share: float) -> float:
    """c1 of the split."""
    method = bed.federation("fedspzo", {"split_share": share}, seed=0).method
    assert isinstance(method, FedSPZO)
    return float(method.flop_share)


def forwards(c1: float, p1: int, p2: int) -> float:
    """Forwards of the whole model that a step costs: ``2 P1 c1 + 2 P1 P2 (1 - c1)``."""
    return 2 * p1 * (c1 + p2 * (1 - c1))


def variance(bed: Bed, p2: int, share: float, trials: int) -> dict[str, float]:
    """Relative mean squared error of both blocks' estimates over ``trials`` draws."""
    federation = bed.federation("fedspzo", {"block2": p2, "split_share": share, "lr": 1.0}, seed=0)
    method, space, task = federation.method, federation.space, federation.task
    assert isinstance(method, FedSPZO)
    examples = federation.shards[0][: bed.config.batch_size]
    blocks = [
        {p.name for p in binding.params} for binding in (method.split.first, method.split.second)
    ]
    for p in space.params:
        p.tensor.requires_grad_(True)
    with torch.enable_grad():
        truth = gradients(space, task.loss(federation.model, task.batch(examples)))
    for p in space.params:
        p.tensor.requires_grad_(False)
    errors = torch.zeros(2, dtype=torch.float64)
    for trial in range(trials):
        order = method.order(trial + 1, 0, steps=1)
        site = Site(space, task, iter(lambda: examples, None))
        losses = method.nested(site, order, 0)
        pairs = zip(losses[::2], losses[1::2], strict=True)
        g = [(plus - minus) / (2 * method.eps) for plus, minus in pairs]
        seeds = [method.direction(order, 0, i) for i in range(1 + p2)]
        estimate = [
            add(method.split.first, seeds[:1], [sum(g) / p2]),
            add(method.split.second, seeds[1:], [x / p2 for x in g]),
        ]
        for block in (0, 1):
            errors[block] += sum(
                float((estimate[block][n] - truth[n]).square().sum())
                for n in blocks[block]
                if n in truth
            )
    norms = [sum(float(truth[n].square().sum()) for n in names if n in truth) for names in blocks]
    return {
        "mse_block1": round(float(errors[0]) / trials / norms[0], 3),
        "mse_block2": round(float(errors[1]) / trials / norms[1], 3),
        "trials": trials,
    }


def add(binding: zo.Binding, seeds: list[int], coeffs: list[float]) -> dict[str, torch.Tensor]:
    """``sum_k coeffs[k] z(seeds[k])`` by parameter."""
    total: dict[str, torch.Tensor] = {}
    for seed, c in zip(seeds, coeffs, strict=True):
        for name, z in zo.directions(binding, seed=seed).items():
            total[name] = total[name] + c * z if name in total else c * z
    return total


def report(bed: Bed, c1: float, steps: int) -> None:
    """Both tables."""
    rows = bed.rows()
    print(f"block 1 has {c1:.3f} of the forward FLOPs")
    print("| P2 | block 1: error / |g1|^2 | block 2: error / |g2|^2 | times P2 |")
    print("| --- | --- | --- | --- |")
    for row in (r for r in rows if r["kind"] == "variance"):
        scaled = float(row["mse_block2"]) * int(row["P2"])
        print(f"| {row['P2']} | {row['mse_block1']} | {row['mse_block2']} | {scaled:.1f} |")
    print("| P1 | P2 | steps | forwards a step | in all | lr | loss before | loss after |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    final = [row for row in rows if row["phase"] == "final"]
    for case in dict.fromkeys((row["kind"], row["P1"], row["P2"]) for row in final):
        own = [row for row in final if (row["kind"], row["P1"], row["P2"]) == case]
        mean, deviation = spread([float(row["loss"]) for row in own])
        cost = forwards(c1, int(case[1]), int(case[2]))
        count = int(own[0]["rounds"]) * steps
        print(
            f"| {case[1]} | {case[2]} | {count} | {cost:.2f} | {cost * count:.0f} | "
            f"{own[0]['lr']} | {float(own[0]['loss_before']):.4f} | {mean:.4f} ± {deviation:.4f} |"
        )


if __name__ == "__main__":
    main()
