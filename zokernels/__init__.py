"""Zeroth-order fine-tuning with noise computed inside the kernels."""

from zokernels import _ops as _ops
from zokernels import _registry as _registry

__version__ = "0.1.0"
