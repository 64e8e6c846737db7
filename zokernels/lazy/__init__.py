"""Lazily displaced parameters: what a model sees in place of its weights at branches.

``parameter`` is the tensor subclass and what it stands for; ``views``, ``products`` and ``vectors``
register how torch's functions use it. Anything not registered gets the displaced tensor itself.
"""

from zokernels.lazy import products as products
from zokernels.lazy import vectors as vectors
from zokernels.lazy import views as views
from zokernels.lazy.parameter import Lazy, LazyParameter, State, UnsupportedUse

__all__ = ["Lazy", "LazyParameter", "State", "UnsupportedUse"]
