"""A step whose numbers stay on the device: what is done there, and what is fetched later.

Between the losses and the update stand a few numbers: projected gradients, coefficients, whether
all of them are finite. On the host they cost a synchronisation a step, in which the GPU idles and
which no CUDA graph can hold. Here they are computed on the device, in float64 and in the same order
as the host does, so that both agree bit for bit; a step that is not finite gets coefficients of 0
and decays of 1, which change nothing. The host fetches the losses when they are ready and makes the
same numbers from them, for the journal, the momentum window and the counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def placed(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on a device, without waiting for it."""
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def recording(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Fetch:
    """Values on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            # Of the values' device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.clone()

    @property
    def ready(self) -> bool:
        """Whether :meth:`get` would not wait."""
        return self._event is None or self._event.query()

    def get(self) -> tuple[float, ...]:
        """The values; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return tuple(self._host.tolist())


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the device needs besides the losses.

    Attributes:
        seeds: int64 ``[K]``, those of this step last.
        eps: float64 ``[groups, 1]``.
        weights: float64 ``[groups, K]``, factors of the projected gradients in the coefficients.
        decay: float32 ``[groups, K]``.
        past: float64 ``[groups, K - n]`` projected gradients of earlier steps.
        ends: bool ``[K]``, True for the last term.
    """

    seeds: Tensor
    eps: Tensor
    weights: Tensor
    decay: Tensor
    past: Tensor
    ends: Tensor


def coefficients(
    losses: Tensor, inputs: Inputs, *, central: bool, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients and decay of an update, and the projected gradients that later steps remember.

    Args:
        losses: float32 ``[G]``.
        inputs: of this step.
        central: plus and minus of each direction, or the unmoved weights first.
        clip: limit of the projected gradient's size.

    Returns:
        float32 ``[groups, K]``, float32 ``[groups, K]``, float64 ``[groups, n]``. Where a loss, a
        gradient or a coefficient is not finite: 0, 1, 0 everywhere.
    """
    values = losses.double()
    differences = (values[0::2] - values[1::2]) / 2 if central else values[1:] - values[:1]
    gradients = differences / inputs.eps
    kept = gradients if clip is None else gradients.clamp(-clip, clip)
    coeffs = (inputs.weights * torch.cat([inputs.past, kept], dim=1)).float()
    finite = (
        torch.isfinite(values).all()
        & torch.isfinite(gradients).all()
        & torch.isfinite(coeffs).all()
    )
    # Made on the device: a Python scalar here would be copied to it.
    return (
        torch.where(finite, coeffs, torch.zeros_like(coeffs)),
        torch.where(finite, inputs.decay, torch.ones_like(inputs.decay)),
        torch.where(finite, kept, torch.zeros_like(kept)),
    )


def table(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Nested numbers as a tensor on the device."""
    values = torch.tensor([list(row) for row in rows], dtype=dtype)
    return placed(values.reshape(len(rows), -1), device)
