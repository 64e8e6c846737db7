"""FedMeZO and its learning-rate signals against FedAvg(LoRA) by backprop.

Same clients, rounds and local steps; FedMeZO's learning rate is searched for with the default
signal, and kept for the others as the paper does; FedAvg's is searched for on its own.

Source: FedMeZO (arXiv 2402.05926), figures of convergence and table of the signals.
"""

from __future__ import annotations

from typing import Any

from bench.fed.bed import Bed, arguments, spread
from fedzo.methods.fedmezo import SIGNALS

KEY = ("case", "phase", "lr", "seed")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="H")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    args = parser.parse_args()
    bed = Bed("fed_fedmezo", args, KEY)
    common: dict[str, Any] = {
        "steps": args.steps,
        "lora_rank": args.rank,
        "lora_alpha": 2 * args.rank,
    }
    zo = bed.tuned({"case": "default"}, "fedmezo", common, (3e-4, 1e-3, 3e-3), rounds=args.rounds)
    sgd = bed.tuned(
        {"case": "fedavg"}, "fedavg_lora", common, (3e-2, 1e-1, 3e-1), rounds=args.rounds
    )
    cases = {s: ("fedmezo", {**common, "signal": s, "lr": zo}) for s in SIGNALS}
    cases["fedavg"] = ("fedavg_lora", {**common, "lr": sgd})
    for seed in range(args.seeds):
        for case, (method, options) in cases.items():
            key = {"case": case, "phase": "final", "lr": f"{options['lr']:.2e}", "seed": seed}
            bed.run(key, method, options, rounds=args.rounds, seed=seed)
    report(bed)


def report(bed: Bed) -> None:
    """The table; differences to the default signal are taken seed by seed."""
    rows = [row for row in bed.rows() if row["phase"] == "final"]
    default = {row["seed"]: float(row["loss"]) for row in rows if row["case"] == "default"}
    print("| case | lr | loss before | loss after | minus default, by seed | uplink |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        mean, deviation = spread([float(row["loss"]) for row in own])
        gap, gap_deviation = spread([float(r["loss"]) - default[r["seed"]] for r in own])
        print(
            f"| {case} | {own[0]['lr']} | {float(own[0]['loss_before']):.4f} | "
            f"{mean:.4f} ± {deviation:.4f} | {gap:+.4f} ± {gap_deviation:.4f} | "
            f"{own[0]['uplink']} B |"
        )


if __name__ == "__main__":
    main()
