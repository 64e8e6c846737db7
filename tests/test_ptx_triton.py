"""What Triton compiles for compute capability 8.0 and 9.0, run by the emulator of PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_variants
from ptx import triton_gpu
from ptx.cases import Case, conformance
from ptx.machine_code import used_in_flight
from ptx.parser import Kernel, PTXError

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


@pytest.fixture
def opcodes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Those of the kernels that are launched."""
    found: set[str] = set()
    real = triton_gpu.launch

    def recorded(kernel: Kernel, *args: Any, **how: Any) -> None:
        found.update(i.opcode for block in kernel.blocks for i in block)
        real(kernel, *args, **how)

    monkeypatch.setattr(triton_gpu, "launch", recorded)
    return found


def check(kernels: Kernels, dtype: torch.dtype, tokens: int, transposed: bool = False) -> None:
    """A fused product over several steps of the inner dimension."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, 608, generator=generator).to(dtype)
    w = torch.randn(72, 608, generator=generator).to(dtype)
    w = w.mT.contiguous().mT if transposed else w
    terms = (torch.tensor([5]), torch.tensor([[0.1], [-0.1]]), 77, 0, 0, "rademacher")
    got = kernels["linear"](x, w, None, *terms, False, False)
    want = reference.linear(x, w, None, *terms, False, False)
    # Products of numbers cut to 8 and to 11 bits, summed over 608.
    loose = 0.5 if dtype == torch.bfloat16 else 0.1
    torch.testing.assert_close(got, want, rtol=2**-7, atol=loose)


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
    kernels: Kernels, opcodes: set[str], dtype: torch.dtype, tokens: int, used: list[str]
) -> None:
    """float32 as tf32, where that is allowed."""
    check(kernels, dtype, tokens)
    assert opcodes.issuperset(used)


# --- compute capability 9.0 -----------------------------------------------------------------------

WARPGROUP = "wgmma.mma_async.sync.aligned"


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("dtype", "tokens", "transposed", "used"),
    [
        (torch.bfloat16, 5, False, "m64n32k16.f32.bf16.bf16"),
        (torch.float16, 48, False, "m64n64k16.f32.f16.f16"),
        (torch.bfloat16, 5, True, "m64n32k16.f32.bf16.bf16"),
        (torch.float32, 5, False, "m64n32k8.f32.tf32.tf32"),
    ],
    ids=["bf16-5", "f16-48", "bf16-5-transposed", "tf32-5"],
)
def test_a_product_by_warpgroups(
    opcodes: set[str], dtype: torch.dtype, tokens: int, transposed: bool, used: str
) -> None:
    """Behind copies and stores to shared memory, both fenced, with fragments and without."""
    with triton_gpu.backend(90) as kernels:
        check(kernels, dtype, tokens, transposed)
    assert f"{WARPGROUP}.{used}" in opcodes
    assert any(o.startswith("stmatrix") for o in opcodes)


def test_a_product_by_warpgroups_needs_its_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the fences; what is left out everywhere is found."""
    real = triton_gpu._kernel.__wrapped__
    for left_out, found in [
        ("fence.proxy.async.shared::cta;", "no fence.proxy.async"),
        ("wgmma.fence.sync.aligned;", "no wgmma.fence"),
        ("wgmma.wait_group.sync.aligned 0;", "not waited for|a race"),
        ("bar.sync \t0;", "a race"),
    ]:
        if "proxy" in left_out and not triton_gpu.PROXY_FENCES:
            continue

        def changed(ptx: str, left_out: str = left_out) -> Kernel:
            assert "reduce_kernel" in ptx or left_out in ptx
            return real(ptx.replace(left_out, ""))  # type: ignore[no-any-return]

        monkeypatch.setattr(triton_gpu, "_kernel", changed)
        with triton_gpu.backend(90) as kernels, pytest.raises(PTXError, match=found):
            check(kernels, torch.bfloat16, 5)


PRODUCTS = {v.name: v for v in triton_variants.variants() if v.name.startswith(("lin", "conv"))}


@pytest.mark.parametrize(
    "name",
    [
        "linear-bf16-64rows-1terms",
        "linear-bf16-32rows-1terms-gaussianFalse",
        "linear-fp32-32rows-1terms",
        "conv1d-bf16-32rows-1terms",
    ],
)
def test_machine_code_leaves_products_in_flight_alone(name: str) -> None:
    """By Triton's own assembler."""
    listing = triton_variants.compile_for(PRODUCTS[name], 90).listing
    assert "HGMMA" in listing
    assert used_in_flight(listing) == []
    assert used_in_flight(listing.replace("WARPGROUP.DEPBAR", "NOP"))  # the sums, at the end
