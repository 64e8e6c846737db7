"""Where a warning points to: the user's line."""

from __future__ import annotations

import sys
from types import FrameType


def stacklevel() -> int:
    """The ``stacklevel`` of a warning given where this is called: past this package and torch."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("zokernels", "torch", "contextlib"):
            break
        frame, level = frame.f_back, level + 1
    return level
