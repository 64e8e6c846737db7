"""GradIP of single-label and of IID clients, and whether VPCS flags the right ones.

Of ``--clients`` clients the first ``--single`` hold one label each, the others all labels. Each
makes the calibration run of Meerkat-vp from the same weights. Reported: the two statistics of
every client, and how many single-label clients are flagged (recall) and how many of the flagged are
single-label (precision), at the default thresholds.

Source: Meerkat (arXiv 2506.03337), the GradIP phenomenon and virtual-path client selection.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

from bench.fed.bed import Bed, arguments, spread
from bench.harness import listed
from bench.plots import COLOURS, panels, save
from fedzo.methods import MeerkatVP

KEY = ("task", "lr", "seed", "client")


def main() -> None:
    parser = arguments(__doc__, clients=8)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--lr", default="1e-3,3e-3,1e-2")
    parser.add_argument("--steps", type=int, default=100, help="T_cali")
    args = parser.parse_args()
    args.split = f"label:{args.single}"
    bed = Bed("fed_vpcs", args, KEY)
    task = bed.config.resolved_task
    for lr in listed(args.lr):
        for seed in range(args.seeds):
            key = {"task": task, "lr": lr, "seed": seed}
            if bed.find({**key, "client": args.clients - 1}) is None:
                one(bed, key, args.single, args.steps)
    report(bed, task)


def one(bed: Bed, key: dict[str, object], single: int, steps: int) -> None:
    """The calibration of one seed: a row for every client, and its GradIP trajectory."""
    begin = time.process_time()
    options = {"lr": float(str(key["lr"])), "calibration_steps": steps}
    federation = bed.federation("meerkat_vp", options, seed=int(str(key["seed"])))
    method = federation.method
    assert isinstance(method, MeerkatVP)
    record = next(iter(federation.run(1)))
    for client, path in sorted(record.gradip.items()):
        signature = method.signatures[client]
        sizes = [abs(x) for x in path]
        bed.store(
            {
                **key,
                "client": client,
                "single": int(client < single),
                "rho_later": round(signature.later, 4),
                "rho_quiet": round(signature.quiet, 4),
                "flagged": int(signature.flagged),
                "loss": round(record.losses[client], 5),
                "first": f"{statistics.mean(sizes[: method.initial_steps]):.4g}",
                "last": f"{statistics.mean(sizes[-method.later_steps :]):.4g}",
                "cpu_seconds": round(time.process_time() - begin, 2),
                "gradip": " ".join(f"{x:.4g}" for x in path),
            }
        )
    print(key, "flagged", record.flagged, flush=True)


def report(bed: Bed, task: str) -> Path:
    """Tables of the statistics and of who is flagged, and the trajectories of the first seed.

    Thresholds other than the default are looked at after the fact: they say whether the statistics
    separate the clients, not that a threshold was predicted.
    """
    rows = [row for row in bed.rows() if row["task"] == task]
    rates = list(dict.fromkeys(row["lr"] for row in rows))
    print("| lr | rho_later single | IID | rho_quiet single | IID |")
    print("| --- | --- | --- | --- | --- |")
    for lr in rates:
        cells = []
        for name in ("rho_later", "rho_quiet"):
            for single in ("1", "0"):
                own = [r for r in rows if r["lr"] == lr and r["single"] == single]
                mean, deviation = spread([float(row[name]) for row in own])
                cells.append(f"{mean:.2f} ± {deviation:.2f}")
        print(f"| {lr} | " + " | ".join(cells) + " |")
    later = MeerkatVP().tau_later
    print("| lr | tau_quiet | single-label clients flagged | IID clients flagged |")
    print("| --- | --- | --- | --- |")
    for lr in rates:
        for quiet in (MeerkatVP().tau_quiet, 0.5, 0.4, 0.3):
            counts = []
            for single in ("1", "0"):
                own = [r for r in rows if r["lr"] == lr and r["single"] == single]
                flagged = [
                    r
                    for r in own
                    if float(r["rho_later"]) > later and float(r["rho_quiet"]) > quiet
                ]
                counts.append(f"{len(flagged)} of {len(own)}")
            print(f"| {lr} | {quiet} | " + " | ".join(counts) + " |")
    figure, axes = panels(len(rates), columns=len(rates))
    for ax, lr in zip(axes, rates, strict=True):
        for row in rows:
            if row["lr"] == lr and row["seed"] == "0":
                path = [abs(float(x)) or math.nan for x in row["gradip"].split()]
                single = row["single"] == "1"
                ax.plot(path, color=COLOURS[0 if single else 1], linewidth=0.8, alpha=0.8)
        ax.set(title=f"lr {lr}", xlabel="local step", yscale="log")
    axes[0].set_ylabel("|GradIP|: single label blue, IID orange")
    return save(figure, bed.path.with_name(f"fed_vpcs_{task}"))


if __name__ == "__main__":
    main()
