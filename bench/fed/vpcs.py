"""GradIP of single-label and of IID clients, and whether VPCS flags the right ones.

Of ``--clients`` clients the first ``--single`` hold one label each, the others all labels; 0 is the
control, IID clients alone. Each makes the calibration run of Meerkat-vp from the same weights.
Reported: the two statistics of every client, and how many of either kind are flagged, with the
limit of quiet, sigma, at 0.1 of the initial median (the default) and at the median itself.

The second does not come from these data: were GradIP a product of two Gaussians of shrinking size,
a fall by ``tau_later`` = 3 would leave 0.82 of the later steps below the initial median, about
``tau_quiet`` = 0.8. Below a tenth of the median as many lie only after a fall by 28.

Source: Meerkat (arXiv 2506.03337), the GradIP phenomenon and virtual-path client selection.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.fed.bed import Bed, arguments, spread
from bench.harness import listed
from bench.plots import COLOURS, panels, save
from fedzo.methods import MeerkatVP

KEY = ("task", "split", "lr", "seed", "client")
Row = dict[str, str]


def main() -> None:
    parser = arguments(__doc__, clients=8)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--lr", default="1e-3,1e-2")
    parser.add_argument("--steps", type=int, default=100, help="T_cali")
    args = parser.parse_args()
    args.split = f"label:{args.single}" if args.single else "iid"
    bed = Bed("fed_vpcs", args, KEY)
    head = {"task": bed.config.resolved_task, "split": args.split}
    for lr in listed(args.lr):
        for seed in range(args.seeds):
            key = {**head, "lr": lr, "seed": seed}
            if bed.find({**key, "client": args.clients - 1}) is None:
                one(bed, key, args.single, args.steps)
    report(bed)


def one(bed: Bed, key: dict[str, Any], single: int, steps: int) -> None:
    """The calibration of one seed: a row for every client, and its GradIP trajectory."""
    begin = time.process_time()
    options = {"lr": float(key["lr"]), "calibration_steps": steps}
    federation = bed.federation("meerkat_vp", options, seed=key["seed"])
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


def report(bed: Bed) -> Path:
    """Tables of the statistics and of who is flagged, and the trajectories of the first seed."""
    rows = bed.rows()
    print(
        "| task | split | lr | rho_later, single-label | IID | flagged, single-label | IID |",
        end="",
    )
    print(" at the median, single-label | IID |\n|" + " --- |" * 9)
    for (task, split, lr), own in groups(rows):
        kinds = [[row for row in own if row["single"] == single] for single in ("1", "0")]
        falls = [spread([float(row["rho_later"]) for row in kind]) for kind in kinds if kind]
        cells = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in falls]
        counts = [
            f"{sum(flagged(row, share) for row in kind)} of {len(kind)}" if kind else ""
            for share in (MeerkatVP().sigma_share, 1.0)
            for kind in kinds
        ]
        cells = [""] * (2 - len(cells)) + cells + counts
        print(f"| {task} | {split} | {lr} | " + " | ".join(cells) + " |")
    columns = len({row["lr"] for row in rows})
    figure, axes = panels(len(list(groups(rows))), columns=columns, width=4, height=2.8)
    for ax, ((task, split, lr), own) in zip(axes, groups(rows), strict=True):
        for row in own:
            if row["seed"] == "0":
                path = [abs(x) or math.nan for x in trajectory(row)]
                colour = COLOURS[0 if row["single"] == "1" else 1]
                ax.plot(path, color=colour, linewidth=0.8, alpha=0.8)
        ax.set(title=f"{task}, {split}, lr {lr}", xlabel="local step", yscale="log")
    axes[0].set_ylabel("|GradIP|: single label blue, IID orange")
    return save(figure, bed.path)


def groups(rows: list[Row]) -> Iterator[tuple[tuple[str, str, str], list[Row]]]:
    """Rows of every task, split and learning rate."""
    for key in dict.fromkeys((row["task"], row["split"], row["lr"]) for row in rows):
        yield key, [row for row in rows if (row["task"], row["split"], row["lr"]) == key]


def trajectory(row: Row) -> list[float]:
    """GradIP by step."""
    return [float(x) for x in row["gradip"].split()]


def flagged(row: Row, sigma_share: float) -> bool:
    """Whether VPCS with this limit of quiet, and defaults otherwise, singles the client out."""
    return MeerkatVP(sigma_share=sigma_share).signature(trajectory(row)).flagged


if __name__ == "__main__":
    main()
