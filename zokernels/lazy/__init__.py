"""Lazily displaced parameters: what a model sees in place of its weights at branches.

``parameter`` is the tensor subclass and what it stands for (``masked`` under a mask, ``stand_ins``
all of a binding); ``views``, ``products`` and ``vectors`` register how torch's functions use it.
Anything not registered gets the displaced tensor itself.
"""

from zokernels.lazy import products as products
from zokernels.lazy import vectors as vectors
from zokernels.lazy import views as views
from zokernels.lazy.parameter import LazyParameter, Scale, State, UnsupportedUse, scaled
from zokernels.lazy.stand_ins import Lazy

__all__ = ["Lazy", "LazyParameter", "Scale", "State", "UnsupportedUse", "scaled"]
