"""Everything random outside the noise: who takes part, who fails, which examples come next.

Every draw depends on the run's seed, the round and the client alone, so a run that stops in the
middle of a round starts that round again with the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from zokernels.noise import derive_seed

# What a draw is for. No round has such a number, so no direction has such a seed.
PARTICIPANTS, DROPOUT, STRAGGLER, EXAMPLES, RATES, CANDIDATES = (1 << 32 | k for k in range(6))

_MASK64 = (1 << 64) - 1


def generator(seed: int, purpose: int, round: int, client: int = 0) -> np.random.Generator:
    """A random generator of its own for every purpose, round and client."""
    key = derive_seed(derive_seed(seed, purpose, round), client)
    return np.random.Generator(np.random.Philox(key=key & _MASK64))


def participants(seed: int, round: int, clients: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` distinct clients of a round, in increasing order.

    Raises:
        ValueError: ``count`` is not in [1, number of clients].
    """
    if not 1 <= count <= len(clients):
        raise ValueError(f"count must be in [1, {len(clients)}]; got {count}")
    if count == len(clients):
        return tuple(sorted(clients))
    chosen = generator(seed, PARTICIPANTS, round).choice(len(clients), count, replace=False)
    return tuple(sorted(clients[i] for i in chosen))


def happens(seed: int, purpose: int, round: int, client: int, probability: float) -> bool:
    """Whether an event of this probability happens to a client in a round."""
    return probability > 0 and generator(seed, purpose, round, client).random() < probability


class Examples:
    """A client's way through its examples: epoch after epoch, each in a new order.

    Batch ``i`` is examples ``i B`` to ``(i + 1) B`` of the concatenated epochs, so every example is
    seen equally often; ``B`` is at most the number of examples.

    Args:
        shard: the client's examples.
        batch_size: ``B``, at least 1.
        seed, client: of the run and the client.
        position: number of the next batch: the persistent data pointer.
    """

    def __init__(
        self, shard: Sequence[int], batch_size: int, *, seed: int, client: int, position: int = 0
    ) -> None:
        if not len(shard):
            raise ValueError(f"client {client} has no examples")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.shard, self.size = shard, min(batch_size, len(shard))
        self.seed, self.client, self.position = seed, client, position
        self._epoch = -1
        self._order: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        start = self.position * self.size
        self.position += 1
        return [self._at(i) for i in range(start, start + self.size)]

    def _at(self, index: int) -> int:
        epoch, place = divmod(index, len(self.shard))
        if epoch != self._epoch:
            random = generator(self.seed, EXAMPLES, epoch, self.client)
            self._order = random.permutation(len(self.shard)).tolist()
            self._epoch = epoch
        return int(self.shard[self._order[place]])
