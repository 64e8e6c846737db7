"""The server's door: which messages of a round count, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedzo.messages import (
    CorruptError,
    Dense,
    EncodingError,
    NonFiniteError,
    Order,
    Report,
    TrailingBytesError,
    TruncatedError,
    UnknownVersionError,
)

# Why a message does not count.
DAMAGED = "damaged"
VERSION = "unknown version"
FINGERPRINT = "foreign model"
LATE = "late"
EARLY = "early"
UNINVITED = "uninvited"
SENDER = "another's name"
DUPLICATE = "duplicate"
LENGTH = "wrong length"
NOT_FINITE = "not finite"
FAILED = "failed"


class Rejected(Exception):
    """A message that does not count.

    Attributes:
        reason: one of the constants of this module.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Expected:
    """What an invited client may send.

    Attributes:
        order: what it was asked.
        size: how many scalars, or bytes of values in a dense message.
    """

    order: Order
    size: int


class Server:
    """Takes the messages of one round after another.

    Nothing a message contains changes anything but the counters until it has passed every check,
    and then only the list of what was received.

    Args:
        fingerprint: of the parameters that move.

    Attributes:
        rejections: how many messages were refused in the whole run, by reason.
    """

    def __init__(self, fingerprint: int) -> None:
        self.fingerprint = fingerprint
        self.rejections: Counter[str] = Counter()
        self.round = -1
        self.expected: dict[int, Expected] = {}
        self.received: dict[int, tuple[float, ...]] = {}
        self.rejected: dict[int, str] = {}
        self.dense = False
        self._take: Callable[[int, memoryview], None] | None = None

    def open(
        self,
        round: int,
        expected: Iterable[Expected],
        take: Callable[[int, memoryview], None] | None = None,
    ) -> None:
        """Begin a round.

        Args:
            round: its number.
            expected: what may come.
            take: for a round of dense messages: gets the values of each, and raises
                :class:`Rejected` where they are unusable.
        """
        self.round = round
        self.expected = {e.order.client: e for e in expected}
        self.received, self.rejected = {}, {}
        self._take, self.dense = take, take is not None

    def receive(self, sender: int, data: bytes) -> str | None:
        """A message from a client, as the transport knows it.

        Args:
            sender: who sent it.
            data: anything at all.

        Returns:
            None when it counts, else why it does not; then it is counted, and nothing else changes.
        """
        try:
            self._accept(sender, data)
        except Rejected as refusal:
            self._count(sender, refusal)
            return str(refusal)
        return None

    def refuse(self, sender: int, reason: str, detail: str) -> None:
        """Count a message that the transport knows to be none, such as a client's failure."""
        self._count(sender, Rejected(reason, detail))

    def _count(self, sender: int, refusal: Rejected) -> None:
        self.rejections[refusal.reason] += 1
        self.rejected[sender] = str(refusal)

    def _accept(self, sender: int, data: bytes) -> None:
        message: Report | Dense
        try:
            message = Dense.decode(data) if self.dense else Report.decode(data)
        except UnknownVersionError as error:
            raise Rejected(VERSION, str(error)) from error
        except NonFiniteError as error:
            raise Rejected(NOT_FINITE, str(error)) from error
        except (TruncatedError, TrailingBytesError, CorruptError, EncodingError) as error:
            raise Rejected(DAMAGED, str(error)) from error
        if message.fingerprint != self.fingerprint:
            raise Rejected(
                FINGERPRINT, f"{message.fingerprint:016x} in place of {self.fingerprint:016x}"
            )
        if message.round != self.round:
            reason = LATE if message.round < self.round else EARLY
            raise Rejected(reason, f"of round {message.round} in round {self.round}")
        if message.client != sender:
            raise Rejected(SENDER, f"client {message.client} in a message of client {sender}")
        expected = self.expected.get(sender)
        if expected is None:
            raise Rejected(UNINVITED, f"client {sender} has no order in round {self.round}")
        if sender in self.received:
            raise Rejected(DUPLICATE, f"client {sender} was heard in round {self.round}")
        if isinstance(message, Report):
            if len(message.scalars) != expected.size:
                raise Rejected(
                    LENGTH, f"{len(message.scalars)} scalars in place of {expected.size}"
                )
            self.received[sender] = message.scalars
        else:
            if len(message.data) != expected.size:
                raise Rejected(LENGTH, f"{len(message.data)} bytes in place of {expected.size}")
            if self._take is not None:
                self._take(sender, memoryview(message.data))
            self.received[sender] = ()
