"""Peak memory of a federation against its number of clients, each case in a process of its own.

    python -m bench.fed.clients

Every client makes local steps of Meerkat (random mask, density 0.1%) or of Full-FedZO on the one
copy of the model; with Full-FedZO and two steps every weight moves, so one copy of them is held.
``total_mib`` is the peak resident set of the process, ``of_first`` its ratio to the first case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import harness, models, peak
from fedzo.methods import make
from fedzo.simulation import Federation

KEY = ("model", "dtype", "method", "steps", "clients")
PER_CLIENT = 4


class Tokens:
    """Next-token prediction on random tokens."""

    labels = None
    natural_ids = None

    def __init__(self, model: nn.Module, examples: int, length: int) -> None:
        vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocabulary, (examples, length), generator=draw)

    @property
    def train_size(self) -> int:
        """Number of examples."""
        return len(self.tokens)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Inputs and labels."""
        ids = self.tokens[list(indices)]
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's own."""
        loss: Tensor = model(**batch).loss
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nothing is held out."""
        return {}


def case(
    model: str, dtype: str, method: str, clients: int, steps: int, rounds: int, length: int
) -> Callable[[], object]:
    """Set-up of one case for :mod:`bench.peak`: the work is a run of some rounds."""
    built = models.build(model, dtype)
    task = Tokens(built, PER_CLIENT * clients, length)
    options = {"steps": steps, **({"payload": "scalars"} if method == "full_fedzo" else {})}
    shards = [range(PER_CLIENT * k, PER_CLIENT * (k + 1)) for k in range(clients)]

    def work() -> None:
        federation = Federation(built, task, make(method, **options), shards, batch_size=1)
        for record in federation.run(rounds):
            if len(record.accepted) != clients:
                raise RuntimeError(f"{record.rejected} were rejected")

    return work


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32", choices=sorted(models.DTYPES))
    parser.add_argument("--methods", default="random_mask", help="by comma")
    parser.add_argument("--clients", default="10,1000", help="by comma")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a client")
    parser.add_argument("--length", type=int, default=16, help="tokens of an example")
    parser.add_argument("--results", type=Path, help="folder instead of bench/results")
    given = parser.parse_args()
    rows: list[harness.Row] = []
    table = Table("method", "clients", "peak MiB", "of the first")
    for method in harness.listed(given.methods):
        first = 0
        for count in map(int, harness.listed(given.clients)):
            before, over = peak.peak_of(
                "bench.fed.clients:case",
                model=given.model,
                dtype=given.dtype,
                method=method,
                clients=count,
                steps=given.steps,
                rounds=3 if count < 100 else 1,
                length=given.length,
            )
            total = before + over
            first = first or total
            table.add_row(method, str(count), f"{total / 2**20:,.0f}", f"{total / first:.3f}")
            rows.append(
                {
                    "model": given.model,
                    "dtype": given.dtype,
                    "method": method,
                    "clients": count,
                    "steps": given.steps,
                    "tokens": given.length,
                    "total_mib": round(total / 2**20, 1),
                    "over_mib": round(over / 2**20, 1),
                    "of_first": round(total / first, 4),
                }
            )
    Console().print(table)
    harness.record("fed_clients", rows, key=KEY, results=given.results)


if __name__ == "__main__":
    main()
