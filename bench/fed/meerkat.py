"""Meerkat against Full-FedZO, Weight-Magnitude, random mask and LoRA-FedZO at T = 1, 10, 30.

All methods see the same clients, batches and number of rounds; T local steps a round, T times
rounds constant. The learning rate of every method and every T is searched for on its own, in
half-decades, on other held-out examples and another seed than the reported ones. With ``--every``
the held-out loss along the way is kept too.

Source: Meerkat (arXiv 2506.03337), its main comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.fed.bed import Bed, arguments, spread
from bench.harness import listed
from bench.plots import COLOURS, band, panels, save

Row = dict[str, str]

# Case -> method, its options, the first grid of learning rates.
CASES: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "meerkat": ("meerkat", {}, (1e-3, 1e-3 * 10**0.5, 1e-2)),
    "full": ("full_fedzo", {"payload": "scalars"}, (1e-4, 1e-4 * 10**0.5, 1e-3)),
    "magnitude": ("weight_magnitude", {}, (0.1, 0.1 * 10**0.5, 1.0)),
    "random": ("random_mask", {}, (0.1, 0.1 * 10**0.5, 1.0)),
    "lora": ("lora_fedzo", {}, (1e-4 * 10**0.5, 1e-3, 1e-3 * 10**0.5)),
    "meerkat-1%": ("meerkat", {"density": 0.01}, (1e-4 * 10**0.5, 1e-3, 1e-3 * 10**0.5)),
    "meerkat-layer": ("meerkat", {"scope": "layer"}, (1e-3 * 10**0.5, 1e-2, 1e-2 * 10**0.5)),
}
KEY = ("case", "T", "phase", "lr", "seed")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", default="1,10,30", help="T, comma separated")
    parser.add_argument("--budget", type=int, default=60, help="local steps of a client in all")
    parser.add_argument("--cases", default="meerkat,full,magnitude,random,lora")
    parser.add_argument("--every", type=int, default=0, help="rounds between held-out losses")
    parser.add_argument("--name", default="fed_meerkat", help="of the table")
    args = parser.parse_args()
    bed = Bed(args.name, args, KEY)
    for steps in map(int, listed(args.steps)):
        rounds = args.budget // steps
        chosen = {}
        for case in listed(args.cases):
            method, options, rates = CASES[case]
            key = {"case": case, "T": steps}
            chosen[case] = bed.tuned(key, method, {**options, "steps": steps}, rates, rounds=rounds)
        for seed in range(args.seeds):
            for case, lr in chosen.items():
                method, options, _ = CASES[case]
                key = {"case": case, "T": steps, "phase": "final", "lr": f"{lr:.2e}", "seed": seed}
                options = {**options, "steps": steps, "lr": lr}
                bed.run(key, method, options, rounds=rounds, seed=seed, every=args.every)
    report(bed)


def report(bed: Bed) -> None:
    """Tables and picture: mean and standard deviation over seeds."""
    rows = [row for row in bed.rows() if row["phase"] == "final"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    print(
        "| T | rounds | case | moving | lr | loss before | loss after | uplink | dense / uplink |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    ends: dict[str, list[tuple[int, float, float]]] = {case: [] for case in cases}
    for steps, case, own in groups(rows):
        mean, deviation = spread([float(row["loss"]) for row in own])
        first = own[0]
        ratio = float(first["dense_uplink"]) / float(first["uplink"])
        ends[case].append((steps, mean, deviation))
        print(
            f"| {steps} | {first['rounds']} | {case} | {first['moving']} | {first['lr']} | "
            f"{float(first['loss_before']):.4f} | {mean:.4f} ± {deviation:.4f} | "
            f"{first['uplink']} B | {ratio:,.0f}x |"
        )
    followed = [row for row in rows if row.get("curve")]
    figure, axes = panels(1)
    axes[0].axhline(float(rows[0]["loss_before"]), color="#bbbbbb", linewidth=1, label="before")
    axes[0].set_ylabel("held-out loss")
    if followed:
        curves(axes[0], followed, cases)
    else:
        for case, colour in zip(cases, COLOURS, strict=False):
            x, y, error = zip(*ends[case], strict=True)
            axes[0].errorbar(x, y, error, label=case, color=colour, marker="o", capsize=3)
        axes[0].set(xscale="log", xlabel="local steps a round, T")
    axes[0].legend(fontsize=7)
    save(figure, bed.path)


def groups(rows: list[Row]) -> Iterator[tuple[int, str, list[Row]]]:
    """Rows of every T and case, one per seed."""
    for steps in sorted({int(row["T"]) for row in rows}):
        for case in dict.fromkeys(row["case"] for row in rows):
            own = [row for row in rows if (row["T"], row["case"]) == (str(steps), case)]
            if own:
                yield steps, case, own


def curves(ax: Axes, rows: list[Row], cases: list[str]) -> None:
    """Held-out loss along the way: a line a case (band: range over seeds), and as a table."""
    for steps, case, own in groups(rows):
        runs = np.array([[float(x) for x in row["curve"].split()] for row in own])
        every = int(own[0]["rounds"]) // runs.shape[1] * steps
        x = every * np.arange(1, runs.shape[1] + 1)
        band(ax, x.tolist(), runs, label=case, colour=COLOURS[cases.index(case)])
        points = [f"{n}: {spread(at.tolist())[0]:.3f}" for n, at in zip(x, runs.T, strict=True)]
        print(f"{case}, T = {steps}, after local steps {', '.join(points)}")
    ax.set_xlabel("local steps of a client")


if __name__ == "__main__":
    main()
