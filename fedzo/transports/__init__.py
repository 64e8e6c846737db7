"""What carries the bytes of :mod:`fedzo.messages` between the server and its clients.

A transport knows clients by number and messages as bytes. It decides nothing about a round: which
clients take part, what they are sent, what counts and what it does to the weights is the
federation's and the method's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# The encoded updates that bring a client from a round to the present.
Updates = Callable[[int], list[bytes]]


class TransportError(RuntimeError):
    """The clients cannot be reached, or none of them can work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client is sent in a round.

    Attributes:
        client: its number.
        order: an encoded :class:`~fedzo.messages.Order`.
        known: the last round whose update the client is taken to have; later ones go with it.
        position: number of the client's next batch.
        drops: the client's failure is simulated: it gets the message and sends nothing.
    """

    client: int
    order: bytes
    known: int
    position: int
    drops: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back from a client; nothing in it is checked but the types.

    Attributes:
        client: who sent it, by the word of the transport.
        data: its message for the server; None: none.
        position: number of its next batch; None: not said.
        loss: its mean loss, for records only; None: not said.
        known: where it has fewer updates than the request took for granted: its last round.
        error: why it could not work.
        late: an answer to an earlier round.
    """

    client: int
    data: bytes | None = None
    position: int | None = None
    loss: float | None = None
    known: int | None = None
    error: str | None = None
    late: bool = False


class Transport(Protocol):
    """Carries requests to clients and their replies back.

    Attributes:
        samples: number of examples of each client; those without any are not among them.
    """

    @property
    def samples(self) -> Mapping[int, int]: ...

    def identity(self) -> str:
        """Of the clients and their data: a run resumes with the same."""
        ...

    def open(self, common: Mapping[str, Any]) -> None:
        """Begin, given what server and clients must have in common.

        Raises:
            ValueError: a client's differs.
        """
        ...

    def exchange(self, requests: Sequence[Request], updates: Updates) -> Iterable[Reply]:
        """Send the requests of a round and give the replies, in increasing order of clients.

        Args:
            requests: one for each client.
            updates: see ``Updates``.
        """
        ...
