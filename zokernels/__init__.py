"""Zeroth-order fine-tuning with noise computed inside the kernels.

``import zokernels as zo``: :func:`dual_loss` and :func:`branches` evaluate an unmodified model at
displaced copies of its weights that never exist.
"""

from zokernels import _ops as _ops
from zokernels import _registry as _registry
from zokernels._registry import use_backend
from zokernels.binding import Binding, BoundParameter, ModelChangedError, bind
from zokernels.branches import (
    Branches,
    StackingWarning,
    branches,
    directions,
    displaced,
    dual_loss,
)
from zokernels.capture import capture
from zokernels.losses import causal_lm_loss, linear_cross_entropy
from zokernels.noise import CONTRACT_VERSION, derive_seed

__version__ = "0.1.0"

__all__ = [
    "CONTRACT_VERSION",
    "Binding",
    "BoundParameter",
    "Branches",
    "ModelChangedError",
    "StackingWarning",
    "bind",
    "branches",
    "capture",
    "causal_lm_loss",
    "derive_seed",
    "directions",
    "displaced",
    "dual_loss",
    "linear_cross_entropy",
    "use_backend",
]
