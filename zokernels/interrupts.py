"""Ctrl-C between two steps, and not in the middle of one."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Held:
    """SIGINT is kept until the end; a second one is not.

    Python may raise KeyboardInterrupt between any two lines, also where a lock is held, a model's
    parameters are exchanged, or an update is made and not yet counted. Handlers other than Python's
    own are left alone, and so are other threads, which are never interrupted.
    """

    def __init__(self) -> None:
        self._mine = self._came = False

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._mine = True
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            signal.default_int_handler(number, frame)
        self._came = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._came and not isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt


def whole(function: Callable[P, T]) -> Callable[P, T]:
    """The function, after which a KeyboardInterrupt that came meanwhile is raised."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _Held():
            return function(*args, **kwargs)

    return call
