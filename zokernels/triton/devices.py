"""GPU architectures as data: what the planner's cost model knows about a device.

Figures are the vendor's data sheets of one typical part each (A100 SXM 80 GB, RTX 3090, RTX 4090,
H100 SXM, B200); a device that is present replaces its number of multiprocessors, second-level cache
and clock by its own. They are leads for a choice between two plans, not measurements.

``ZOKERNELS_GPU`` overrides entries, for all architectures: ``"bandwidth=4.3e12,crossover=96"``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a plan depends on.

    Attributes:
        name: such as ``"sm_90"``; part: whose data sheet.
        multiprocessors: number; clock: Hz; shared: bytes of shared memory a block may take.
        bandwidth: bytes a second of device memory; cache: bytes of the second-level cache.
        matrix16: FLOP a second of the matrix units in bf16 and fp16 (dense); matrix32: of float32.
        crossover: stacked rows of activations up to which a product is fused; None: by the model.
        wgmma: tokens a branch up to which the CUDA backend multiplies by wgmma (compute capability
            9.0; csrc/cuda/linear_sm90.cu, which has not been measured); 0: never.
    """

    name: str
    part: str
    multiprocessors: int
    clock: float
    shared: int
    bandwidth: float
    cache: int
    matrix16: float
    matrix32: float
    crossover: int | None = None
    wgmma: int = 0

    @property
    def instructions(self) -> float:
        """Instructions of one thread a second: 4 schedulers of 32 lanes a multiprocessor."""
        return self.multiprocessors * 128 * self.clock


KIB, MIB = 1 << 10, 1 << 20

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "A100", 108, 1.41e9, 163 * KIB, 2.04e12, 40 * MIB, 312e12, 19.5e12),
        Architecture("sm_86", "RTX 3090", 82, 1.70e9, 99 * KIB, 0.94e12, 6 * MIB, 71e12, 35.6e12),
        Architecture(
            "sm_89", "RTX 4090", 128, 2.52e9, 99 * KIB, 1.01e12, 72 * MIB, 165e12, 82.6e12
        ),
        Architecture("sm_90", "H100", 132, 1.76e9, 227 * KIB, 3.35e12, 50 * MIB, 989e12, 67e12),
        Architecture("sm_100", "B200", 148, 1.85e9, 227 * KIB, 8.0e12, 126 * MIB, 2250e12, 75e12),
    )
}

OLDEST = 80


def architecture(name: str) -> Architecture:
    """The entry of ``"sm_90"`` and so on; an unlisted one gets the nearest older entry's figures.

    Raises:
        ValueError: not of that form, older than sm_80, or ``ZOKERNELS_GPU`` is malformed.
    """
    number = name.removeprefix("sm_")
    if not name.startswith("sm_") or not number.isdigit():
        raise ValueError(f"device must be cpu, cuda or an architecture such as sm_90; got {name!r}")
    capability = int(number)
    if capability < OLDEST:
        raise ValueError(f"the Triton backend needs sm_{OLDEST} or newer; got {name!r}")
    best = max(
        (a for a in ARCHITECTURES.values() if int(a.name[3:]) <= capability),
        key=lambda a: int(a.name[3:]),
    )
    return _overridden(dataclasses.replace(best, name=name))


def _overridden(found: Architecture) -> Architecture:
    text = os.environ.get("ZOKERNELS_GPU", "")
    kinds = {f.name: f.type for f in dataclasses.fields(Architecture)}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = entry.partition("=")
        if key not in kinds or key in ("name", "part"):
            raise ValueError(
                f"ZOKERNELS_GPU must be entries key=number with keys among "
                f"{sorted(set(kinds) - {'name', 'part'})}; got {entry!r}"
            )
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"ZOKERNELS_GPU: {key} must be a number; got {value!r}") from None
        whole = "int" in str(kinds[key])
        changed: dict[str, Any] = {key: int(number) if whole else number}
        found = dataclasses.replace(found, **changed)
    return found


@functools.cache
def present(index: int) -> Architecture:
    """The architecture of a CUDA device of this machine."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    found = architecture(f"sm_{properties.major}{properties.minor}")
    clock = getattr(properties, "clock_rate", 0) * 1e3
    return _overridden(
        dataclasses.replace(
            found,
            part=properties.name,
            multiprocessors=properties.multi_processor_count,
            cache=getattr(properties, "L2_cache_size", found.cache) or found.cache,
            clock=clock or found.clock,
        )
    )


def of_device(device: str) -> Architecture:
    """The architecture of a torch device; of the interpreter's (``"cpu"``) an H100's."""
    import torch

    where = torch.device(device)
    if where.type != "cuda":
        return architecture("sm_90")
    return present(where.index if where.index is not None else torch.cuda.current_device())


def tf32_allowed() -> bool:
    """Whether float32 products may round to TF32, however torch was told so.

    Reading the older ``allow_tf32`` is an error once the newer setting was written.
    """
    import torch

    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
