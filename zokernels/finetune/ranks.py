"""The processes of a run: those that torchrun started, or this one alone.

Every rank steps on batches of its own and only losses travel (:mod:`zokernels.distributed`). The
first rank reads and writes the folder of the run, and prints. When something goes wrong, the first
rank that noticed says so; those that then find it gone end without a word.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist

from zokernels.finetune.config import UserError, _one_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# One rank may download, load or save for long while the others wait. A rank that died does not make
# them wait: its connections close.
_PATIENCE = timedelta(days=1)
# What the rank that failed first has to end first, in seconds: torchrun names the first that ends.
_GRACE = 1.0
_FAILED = "zokernels/failed"


class OtherRankError(Exception):
    """Another rank failed, and says why."""


class Ranks:
    """The processes that train together.

    A context manager: leaving it after an error settles which rank reports it.

    Attributes:
        rank, count: of this process, and how many there are.
        local, local_count: the same on this machine.

    Raises:
        OtherRankError: on leaving after an error, where another rank failed before.
        UserError: on leaving after an error, where the error is that another rank died.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        local: int = 0,
        local_count: int = 1,
        store: Store | None = None,
    ) -> None:
        self.rank, self.count = rank, count
        self.local, self.local_count = local, local_count
        self._store = store

    @classmethod
    def join(cls, environ: Mapping[str, str] = os.environ) -> Ranks:
        """Meet the ranks that the environment names (``torchrun`` sets it); alone without any.

        Raises:
            UserError: a variable is missing or malformed, this torch has no
                ``torch.distributed``, or the others cannot be reached.
        """
        count = _variable(environ, "WORLD_SIZE", 1, least=1)
        if count == 1:
            return cls()
        rank, local = (_variable(environ, n, None, below=count) for n in ("RANK", "LOCAL_RANK"))
        local_count = _variable(environ, "LOCAL_WORLD_SIZE", local + 1, least=local + 1)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise UserError(_without(name, count))
        if not dist.is_available():
            raise UserError(
                f"WORLD_SIZE is {count}, and this torch was built without torch.distributed: start "
                f"one process, without torchrun"
            )
        from torch.distributed.rendezvous import rendezvous

        try:
            store, _, _ = next(rendezvous("env://", rank, count))
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"rank {rank} cannot reach the others at MASTER_ADDR {environ['MASTER_ADDR']}, "
                f"MASTER_PORT {environ['MASTER_PORT']}: {_one_line(error)}"
            ) from error
        return cls(rank, count, local, local_count, store)

    @property
    def first(self) -> bool:
        """Whether this rank reads, writes and prints."""
        return self.rank == 0

    def group(self, device: torch.device) -> ProcessGroup | None:
        """The process group that exchanges losses: NCCL's for CUDA, gloo's otherwise.

        Every rank must call it.
        """
        if self.count == 1:
            return None
        if device.type != "cuda":
            return dist.group.WORLD
        torch.cuda.set_device(device)
        group: ProcessGroup = dist.new_group(backend="nccl")
        return group

    def from_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank (which alone calls it), on every rank."""
        if self.count == 1:
            return function()
        held: list[Any] = [function() if self.first else None]
        dist.broadcast_object_list(held, src=0)
        value: T = held[0]
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        held: list[Any] = [None] * self.count
        dist.all_gather_object(held, value)
        return held

    def leave(self) -> None:
        """End the process group; this rank is on its own from here on."""
        if self._store is not None:
            self._store = None
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.leave()
        if error is None or self._store is None:
            return
        # The process ends now, and its connections with it. To destroy the group here could wait
        # for what is in flight, and would let others end before the one that failed.
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on a second time
        if not self._fails_first():
            time.sleep(_GRACE)
            raise OtherRankError from error
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise UserError(
                f"rank {self.rank} of {self.count} lost another rank, which was killed or cannot "
                f"be reached (--resume goes on from the last checkpoint): {_one_line(error)}"
            ) from error
        if not isinstance(error, UserError | KeyboardInterrupt):
            error.add_note(f"on rank {self.rank} of {self.count}")

    def _fails_first(self) -> bool:
        assert self._store is not None
        me = str(self.rank)
        try:
            found: bytes = self._store.compare_set(_FAILED, "", me)
        except RuntimeError:  # the store is gone with the rank that held it
            return True
        return found.decode() == me


ALONE = Ranks()


def _variable(
    environ: Mapping[str, str],
    name: str,
    default: int | None,
    *,
    least: int = 0,
    below: int | None = None,
) -> int:
    text = environ.get(name)
    if not text:
        if default is None:
            raise UserError(_without(name, environ["WORLD_SIZE"]))
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (below is not None and value >= below):
        limit = "" if below is None else f" and below WORLD_SIZE, {below}"
        raise UserError(
            f"the environment variable {name} must be an integer of at least {least}{limit}; got "
            f"{text!r}"
        )
    return value


def _without(name: str, count: int | str) -> str:
    return (
        f"the environment variable WORLD_SIZE is {count}, but {name} is not set: start the ranks "
        f"with torchrun, or unset WORLD_SIZE"
    )
