"""What nvcc makes of the product for Hopper, run by the emulator of PTX, under its own launch."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import pytest
import test_conformance as conformance
import test_cuda_hopper as hopper
import torch
from ptx import cuda_gpu
from ptx.parser import parse
from torch import Tensor

from zokernels import _cuda_ops, _registry

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(cuda_gpu.NVCC is None, reason="nvcc is not installed"),
]


def native(*, multiprocessors: int = 1, **_: object) -> _cuda_ops.Native:
    return cuda_gpu.native(multiprocessors, hopper.EVERY)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of ``test_cuda_hopper`` run here."""
    monkeypatch.setattr(hopper, "native", native)


@pytest.mark.parametrize(
    "case",
    [
        hopper.Case(9, 600, 20),
        hopper.Case(3, 304, 136, 3, torch.float16, "rademacher", terms=2, bias=True),
        hopper.Case(130, 40, 5, 1, shared=True, offset=(0, 768)),
        hopper.Case(5, 600, 5, 2, distribution="rademacher", multiprocessors=8),
    ],
    ids=["steps", "branches", "tokens", "parts"],
)
def test_product(case: hopper.Case) -> None:
    """As near to the exact product as the one by ``mma``."""
    cuda_gpu.built().launched.clear()
    case.check()
    assert any("linear_sm90_kernel" in name for name in cuda_gpu.built().launched)


def test_the_conformance_suites_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_ops, "FUSED_TOKENS", 1)
    backend = _registry.Backend("hopper_ptx", ("cpu",), native().kernels())
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    cuda_gpu.built().launched.clear()
    conformance.test_linear_cross_entropy(backend.name, torch.float16, "rademacher")
    assert any("linear_sm90_kernel" in name for name in cuda_gpu.built().launched)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.fixture
def kernels() -> Iterator[dict[str, cuda_gpu.Kernel]]:
    """Those of the backend; changes are undone."""
    with cuda_gpu.changeable() as found:
        yield found


def product() -> Tensor:
    """One block, whose half panels come into each stage three times."""
    return hopper.Case(3, 776, 5, distribution="rademacher", offset=(0, 0)).result()


@functools.cache
def launched() -> str:
    """The kernel that ``product`` launches."""
    backend = cuda_gpu.built()
    backend.launched.clear()
    product()
    (found,) = {n for n in backend.launched if "linear_sm90_kernel" in n}
    return found


def without(chosen: str, opcode: str) -> Iterator[str]:
    """Modules of this kernel alone, without one of these instructions each."""
    text = (cuda_gpu.built().folder / "linear_sm90.ptx").read_text()
    head, *entries = re.split(r"(?=^(?:\.visible )?\.entry )", text, flags=re.M)
    (entry,) = [e for e in entries if cuda_gpu.plain(re.split(r"[ (]", e)[1]) == chosen]
    for place in re.finditer(rf"(?:@!?%?\w+\s+)?\b{re.escape(opcode)}[^;]*;", entry):
        yield head + entry[: place.start()] + entry[place.end() :]


# Which of an instruction's places, if not all; what is left out there must be found.
PLACES: dict[str, slice] = {
    "bar.sync": slice(None),
    # The others bring a warp together for instructions that need all of it, and order nothing.
    "bar.warp.sync": slice(1, 2),
    "fence.mbarrier_init": slice(None),
    "fence.proxy.async": slice(None),
    "mbarrier.init": slice(None),
    "mbarrier.arrive": slice(None),
    "mbarrier.try_wait": slice(None),
    "cp.async.bulk.tensor": slice(0, None, 4),
    "wgmma.fence": slice(None),
    "wgmma.commit_group": slice(None),
    "wgmma.wait_group": slice(None),
}
FOUND = (
    "a race|not waited for|in flight|no fence.proxy.async|not fenced|no barrier has been made|"
    "a phase that never ends|no wgmma.fence|do not take part"
)


@pytest.mark.parametrize("opcode", PLACES)
def test_each_is_needed(kernels: dict[str, cuda_gpu.Kernel], opcode: str) -> None:
    """Any barrier, fence, copy, arrival or wait that is left out is found."""
    chosen = launched()
    changed = list(without(chosen, opcode))[PLACES[opcode]]
    assert changed
    for text in changed:
        (kernels[chosen],) = parse(text).values()
        with pytest.raises(RuntimeError, match=FOUND):
            product()


def test_a_tensor_that_the_driver_refuses() -> None:
    """What the encoder is given is checked by the driver's rules."""
    ops, (x, w, _, rest) = native(), hopper.Case(3, 64, 5).inputs()
    with pytest.raises(RuntimeError, match="refuses a tensor"):
        ops.wgmma.linear(torch.empty(x.numel() + 4).to(x)[4:].view_as(x), w, None, *rest, False)
    assert "a multiple of 16 bytes" in cuda_gpu.built().refused
