"""Zeroth-order fine-tuning with noise computed inside the kernels.

::

    import zokernels as zo

    opt = zo.MeZO(model, lr=1e-6, eps=1e-3)       # a torch.optim.Optimizer
    loss = opt.step(batch)                        # two probes in one stacked forward pass

Underneath: :func:`dual_loss` and :func:`branches` evaluate an unmodified model at displaced copies
of its weights that never exist; a :class:`Displacement` is a list of seeds and coefficients; a
:class:`Trajectory` is a run, and replays bit for bit.
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
from zokernels.displacement import Displacement, UnknownVersionError
from zokernels.distributed import RankMismatchError
from zokernels.explain import Explanation, explain
from zokernels.graphs import GraphedStep
from zokernels.groups import param_groups
from zokernels.losses import causal_lm_loss, linear_cross_entropy
from zokernels.masks import Mask, MaskFileError, MaskMismatchError
from zokernels.noise import CONTRACT_VERSION, derive_seed
from zokernels.optim import MeZO, NonFiniteLossError
from zokernels.subset import Snapshot, SnapshotError
from zokernels.trajectory import Trajectory
from zokernels.trajectory_format import TrajectoryError

__version__ = "0.1.0"

__all__ = [
    "CONTRACT_VERSION",
    "Binding",
    "BoundParameter",
    "Branches",
    "Displacement",
    "Explanation",
    "GraphedStep",
    "Mask",
    "MaskFileError",
    "MaskMismatchError",
    "MeZO",
    "ModelChangedError",
    "NonFiniteLossError",
    "RankMismatchError",
    "Snapshot",
    "SnapshotError",
    "StackingWarning",
    "Trajectory",
    "TrajectoryError",
    "UnknownVersionError",
    "__version__",
    "bind",
    "branches",
    "capture",
    "causal_lm_loss",
    "derive_seed",
    "directions",
    "displaced",
    "dual_loss",
    "explain",
    "linear_cross_entropy",
    "param_groups",
    "use_backend",
]
