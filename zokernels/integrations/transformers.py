"""transformers' Trainer with zeroth-order steps.

::

    from transformers import TrainingArguments
    from zokernels.integrations.transformers import MeZOTrainer

    args = TrainingArguments("out", learning_rate=1e-6, lr_scheduler_type="constant")
    trainer = MeZOTrainer(model, args, train_dataset=data, mezo={"eps": 1e-3})
    trainer.train()

Trainer's ``backward()`` becomes :meth:`zokernels.MeZO.accumulate`; the rest of its loop (schedules,
callbacks, evaluation, checkpoints and resuming, accumulation, ``torchrun``) is its own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, clear_device_cache  # type: ignore[attr-defined]
from transformers.utils import logging

from zokernels.losses import causal_lm_loss, logits_can_go
from zokernels.masks import Mask
from zokernels.optim import MeZO
from zokernels.selection import unwrap

if TYPE_CHECKING:
    # The mixin comes before a class derived from Trainer.
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)

# Of MeZO's arguments, those that TrainingArguments or the trainer have.
_TRAINERS_OWN = {
    "lr": "TrainingArguments(learning_rate=...)",
    "weight_decay": "TrainingArguments(weight_decay=...)",
    "params": "the model, with requires_grad_",
    "model": "the trainer's model",
    "process_group": "torchrun, which the trainer sees",
}


class MeZOTrainerMixin(_Base):
    r"""Makes a Trainer's steps zeroth-order ones: ``class Mine(MeZOTrainerMixin, TheirTrainer)``.

    A step evaluates ``compute_loss`` of every micro-batch at ``w + eps z`` and ``w - eps z`` and
    makes one update, see :class:`zokernels.MeZO`. Parameters with ``requires_grad`` move. Losses
    are scaled as Trainer does for ``gradient_accumulation_steps``; several processes exchange one
    float32 a branch, and neither DistributedDataParallel nor a gradient scaler is set up.

    Of :class:`~transformers.TrainingArguments`, ``max_grad_norm``, ``optim`` and what else is about
    gradients mean nothing: ``mezo={"clip": ...}`` bounds the projected gradient. Note that the
    default ``learning_rate`` of 5e-5 is made for AdamW; MeZO's is 1e-6. Rather than ``bf16=True``,
    under which every weight is displaced whole, load the model in bfloat16.

    ``compute_loss`` is called on stacked branches, or once a branch where it reads numbers
    (``item()``), and again to compare both on first use. TRL's reads numbers for its metrics, and
    takes the mode of the model for "train" or "eval": ``compute_loss = Trainer.compute_loss`` in
    the class stacks its plain loss, without the metrics; ``dropout=True`` keeps them apart.

    Args:
        args: of the Trainer.
        mezo: options of :class:`zokernels.MeZO`, such as ``eps``, ``num_directions``,
            ``distribution``, ``mask``, ``clip``, ``journal`` (in one of several processes).
            ``seed`` is that of ``TrainingArguments`` unless given. A run that resumes has those of
            its checkpoint. Not with ``optimizers=(zokernels.MeZO(...), ...)``.
        dropout: whether steps are made in training mode, both probes with the same dropout; MeZO
            has none.
        kwargs: of the Trainer.

    Raises:
        TypeError, ValueError: an option that the trainer sets itself, an optimizer that is not a
            MeZO of this model, DeepSpeed, FSDP, DataParallel, tensor, context or sequence
            parallelism. From :meth:`train`: an option that MeZO does not take.

    Source: Malladi et al. 2023, Algorithm 1.
    """

    def __init__(
        self,
        *args: Any,
        mezo: Mapping[str, Any] | None = None,
        dropout: bool = False,
        **kwargs: Any,
    ) -> None:
        if mezo is not None and not isinstance(mezo, Mapping):
            raise TypeError(f"mezo must be a mapping of options or None; got {type(mezo).__name__}")
        for name, place in _TRAINERS_OWN.items():
            if name in (mezo or {}):
                raise ValueError(f"mezo must not have {name!r}: that is set by {place}")
        if not isinstance(dropout, bool):
            raise TypeError(f"dropout must be True or False; got {dropout!r}")
        self.mezo = dict(mezo or {})
        self.dropout = dropout
        super().__init__(*args, **kwargs)
        if self.optimizer_cls_and_kwargs is not None:
            raise ValueError("optimizer_cls_and_kwargs must be None: give mezo={...}")
        if self.optimizer is not None:
            if self.mezo:
                raise ValueError("mezo must be empty with optimizers=(...): it has its own options")
            self._check_optimizer(self.optimizer)
        for wrong, found in (
            ("DeepSpeed", self.is_deepspeed_enabled),
            ("FullyShardedDataParallel", self.is_fsdp_enabled),
            ("DataParallel (several GPUs in one process)", self.args.n_gpu > 1),
            ("tensor parallelism", self.get_tp_size() > 1),
            ("context or sequence parallelism", self.get_cp_size() * self.get_sp_size() > 1),
        ):
            if found:
                raise ValueError(
                    f"args must not ask for {wrong}: every process needs the whole model on one "
                    f"device; torchrun gives each GPU a process"
                )
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if getattr(self.args, name, False):
                logger.warning(f"{name} is switched off: there is no backward pass to save for")
                setattr(self.args, name, False)
        if self.neftune_noise_alpha is not None and not dropout:
            logger.warning("neftune_noise_alpha has no effect: the noise is for dropout=True")

    # --- set-up -----------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Without gradients there are no buckets to hold for them, and nothing to scale.
        accelerator = self.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.scaler = None
        accelerator.unscale_gradients = accelerator.clip_grad_norm_ = _nothing  # no grad_norm

    def create_optimizer(self, model: nn.Module | None = None) -> MeZO:
        """The optimizer that was given, or :class:`zokernels.MeZO` from ``mezo`` and ``args``."""
        if self.optimizer is not None:
            optimizer = self._check_optimizer(self.optimizer)
            optimizer.zero_grad()  # of a step that an error cut off
            return optimizer
        chosen: Any = self.model if model is None else model
        group = None
        if self.args.world_size > 1:
            group = dist.group.WORLD
            _broadcast(chosen)
        options = {"seed": self.args.seed, **self.mezo, "process_group": group}
        self.optimizer = MeZO(
            self._groups(chosen), lr=self.args.learning_rate, model=chosen, **options
        )
        return self.optimizer

    def _groups(self, model: nn.Module) -> Any:
        decay = self.args.weight_decay
        if not decay:
            return model
        model = unwrap(model)
        decayed = set(self.get_decay_parameter_names(model))
        mask = self.mezo.get("mask")
        named = [
            (name, p)
            for name, p in model.named_parameters()
            if (mask.touches(name) if isinstance(mask, Mask) else p.requires_grad)
        ]
        groups = [
            {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": decay},
            {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]] or model

    def _check_optimizer(self, optimizer: Any) -> MeZO:
        inner = getattr(optimizer, "optimizer", optimizer)  # under accelerate's wrapper
        if not isinstance(inner, MeZO):
            raise TypeError(
                f"optimizers must hold a zokernels.MeZO; got {type(inner).__name__}, which needs "
                f"gradients"
            )
        mine: Any = self.model
        if inner.model is None or unwrap(mine) is not inner.model:
            raise ValueError(
                "optimizers must hold a MeZO of the trainer's model: zokernels.MeZO(model, ...)"
            )
        if self.args.world_size > 1 and inner.process_group is None:
            raise ValueError(
                "optimizers must hold a MeZO with process_group=torch.distributed.group.WORLD: "
                f"there are {self.args.world_size} processes"
            )
        return inner

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; afterwards no update is pending (``fuse_update=True``)."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.optimizer is not None:
                self._check_optimizer(self.optimizer).flush()

    # --- steps ------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Evaluate a micro-batch at the probes of the step; the update is ``optimizer.step()``.

        Returns:
            Mean loss over the branches, 0-d.
        """
        optimizer = self._check_optimizer(self.optimizer)
        model.train(self.dropout)
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():  # under autocast, say, it is another loss
            share = self._share_of_tokens(model, inputs, num_items_in_batch)
        if share is not None:
            loss = optimizer.accumulate(inputs, partial(_share_of_loss, share=share))
        else:
            loss = optimizer.accumulate(
                inputs, lambda _, batch: self._scaled_loss(model, batch, num_items_in_batch)
            )
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def _scaled_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """This micro-batch's summand of the loss of the step."""
        given: Any = copy.copy(inputs)  # of the same type; compute_loss may take entries out
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, given, num_items_in_batch=num_items_in_batch)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        summand: Tensor = loss if scaled else loss / self.current_gradient_accumulation_steps
        return summand

    def _share_of_tokens(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor | None:
        """Tokens that count here, of those of the whole step; 0-d.

        None unless the loss is the mean over tokens that needs no logits.
        """
        if (
            type(self).compute_loss is not Trainer.compute_loss
            or self.compute_loss_func is not None
            or self.label_smoother is not None
            or num_items_in_batch is None
            or not self.model_accepts_loss_kwargs
            or not logits_can_go(model, inputs)
        ):
            return None
        counted = (inputs["labels"][..., 1:] != -100).sum()
        share: Tensor = counted / num_items_in_batch
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes
        return share

    # --- what is reported and kept ----------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the projected gradient in place of ``grad_norm``.

        ``projected_gradient`` is the mean of ``|g|`` over the directions of the last step, before
        clipping; ``skipped_steps`` counts steps without an update because of a loss that is not
        finite.
        """
        if "loss" in logs and self.optimizer is not None:
            optimizer = self._check_optimizer(self.optimizer)
            found = [abs(g) for row in optimizer.projected_gradients for g in row]
            if found:
                logs["projected_gradient"] = sum(found) / len(found)
            if optimizer.skipped:
                logs["skipped_steps"] = optimizer.skipped
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the forward passes: a third of a forward and backward pass a branch."""
        optimizer = self._check_optimizer(self.optimizer)
        n = optimizer.num_directions
        branches = 2 * n if optimizer.estimator == "central" else n + 1
        return int(super().floating_point_ops(inputs) * branches / 3)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = self._check_optimizer(self.optimizer)
        journal = optimizer.journal
        # With save_only_model=True there is no step to go back to.
        if (
            checkpoint is not None
            and journal is not None
            and os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME))
        ):
            journal.truncate(optimizer.num_steps)  # what came after the checkpoint


class MeZOTrainer(MeZOTrainerMixin, Trainer):
    __doc__ = MeZOTrainerMixin.__doc__


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _share_of_loss(model: nn.Module, batch: Mapping[str, Any], share: Tensor) -> Tensor:
    loss = causal_lm_loss(model, batch) * share
    return torch.where(share > 0, loss, 0.0)  # no token counts: the mean over none is NaN


@torch.no_grad()
def _broadcast(model: nn.Module) -> None:
    """The first rank's parameters and buffers, as DistributedDataParallel begins."""
    for tensor in [*model.parameters(), *model.buffers()]:
        held = tensor.contiguous()
        dist.broadcast(held.reshape(-1).view(torch.uint8), 0)  # gloo knows few dtypes
        if held.data_ptr() != tensor.data_ptr():
            tensor.copy_(held)
