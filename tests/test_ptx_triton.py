"""What Triton compiles for compute capability 8.0, run by the emulator of PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ptx import triton_gpu
from ptx.cases import Case, conformance
from ptx.parser import Kernel

from zokernels import _registry, reference

Kernels = dict[str, Callable[..., object]]

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with triton_gpu.backend() as found:
        yield found


@pytest.fixture
def name(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> str:
    backend = _registry.Backend("triton_ptx", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    return backend.name


@conformance
def test_conformance(name: str, case: Case) -> None:
    test, values = case
    test(name, *values)


# --- products -------------------------------------------------------------------------------------

BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
TF32 = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("dtype", "tokens", "used"),
    [
        (torch.bfloat16, 5, [BF16]),
        (torch.bfloat16, 48, [BF16, "cp.async.commit_group"]),
        (torch.float32, 5, [TF32, "cp.async.commit_group"]),
    ],
    ids=["bf16-5", "bf16-48", "tf32-5"],
)
def test_a_product_by_matrix_units(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tokens: int,
    used: list[str],
) -> None:
    """Fused, over several steps of the inner dimension; float32 as tf32, where that is allowed."""
    opcodes: set[str] = set()
    real = triton_gpu.launch

    def recorded(kernel: Kernel, *args: Any, **how: Any) -> None:
        opcodes.update(i.opcode for block in kernel.blocks for i in block)
        real(kernel, *args, **how)

    monkeypatch.setattr(triton_gpu, "launch", recorded)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, 608, generator=generator).to(dtype)
    w = torch.randn(70, 608, generator=generator).to(dtype)
    terms = (torch.tensor([5]), torch.tensor([[0.1], [-0.1]]), 77, 0, 0, "rademacher")
    got = kernels["linear"](x, w, None, *terms, False, False)
    want = reference.linear(x, w, None, *terms, False, False)
    assert opcodes.issuperset(used)
    # Products of numbers cut to 8 and to 11 bits, summed over 608.
    loose = 0.5 if dtype == torch.bfloat16 else 0.1
    torch.testing.assert_close(got, want, rtol=2**-7, atol=loose)
