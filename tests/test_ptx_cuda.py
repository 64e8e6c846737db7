"""What nvcc compiles from csrc/cuda, run by the emulator of PTX: conformance, and mistakes made."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from ptx import cuda_gpu, triton_gpu
from ptx.cases import Case, conformance
from ptx.parser import parse
from torch import Tensor

from zokernels import _registry, reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(cuda_gpu.NVCC is None, reason="nvcc is not installed"),
]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    backend = _registry.Backend("cuda_ptx", ("cpu",), cuda_gpu.native().kernels())
    monkeypatch.setitem(_registry.backends(), backend.name, backend)
    return backend.name


@conformance
def test_conformance(name: str, case: Case) -> None:
    test, values = case
    test(name, *values)


# --- the product of 16-bit types ------------------------------------------------------------------


def product() -> tuple[Tensor, Tensor]:
    """Through the matrix units, over several steps of asynchronous copies; and the reference's."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 600, generator=generator).bfloat16()
    w = torch.randn(70, 600, generator=generator).bfloat16()
    rest = (None, torch.tensor([5]), torch.tensor([[0.1], [-0.1]]), 77, 0, 0, "rademacher")
    rest = (*rest, False, False)  # type: ignore[assignment]
    got = cuda_gpu.native().kernels()["linear"](x, w, *rest)
    return got, reference.linear(x, w, *rest)  # type: ignore[return-value,arg-type]


@pytest.fixture
def kernels() -> Iterator[dict[str, cuda_gpu.Kernel]]:
    """Those of the backend; changes are undone."""
    with cuda_gpu.changeable() as found:
        yield found


def launched() -> str:
    """The kernel that ``product`` launches."""
    backend = cuda_gpu.built()
    backend.launched.clear()
    product()
    (found,) = {n for n in backend.launched if "linear_kernel" in n}
    return found


def test_a_product_uses_the_matrix_units(kernels: dict[str, cuda_gpu.Kernel]) -> None:
    opcodes = {i.opcode for block in kernels[launched()].blocks for i in block}
    assert any(o.startswith("mma.sync") for o in opcodes)
    assert any(o.startswith("cp.async.cg") for o in opcodes)
    got, want = product()
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0.5)


def without(chosen: str, opcode: str) -> Iterator[str]:
    """Modules of this kernel alone, without one of these instructions each."""
    text = (cuda_gpu.built().folder / "linear.ptx").read_text()
    head, *entries = re.split(r"(?=^\.entry )", text, flags=re.M)
    (entry,) = [e for e in entries if cuda_gpu.plain(e[7 : e.index("(")]) == chosen]
    for place in re.finditer(rf"\b{re.escape(opcode)}[^;]*;", entry):
        yield head + entry[: place.start()] + entry[place.end() :]


@pytest.mark.parametrize("opcode", ["bar.sync", "cp.async.wait_group", "cp.async.commit_group"])
def test_a_product_needs_each_of_its_waits(
    kernels: dict[str, cuda_gpu.Kernel], opcode: str
) -> None:
    """Any barrier, wait or end of a group that is left out is found."""
    chosen = launched()
    changed = list(without(chosen, opcode))
    assert changed
    for text in changed:
        (kernels[chosen],) = parse(text).values()
        with pytest.raises(RuntimeError, match=r"a race|not waited for|in flight"):
            product()


# --- bits -----------------------------------------------------------------------------------------


def test_normals_are_the_contracts() -> None:
    """With `lg2.approx` and `sqrt.approx` as far off as the manual allows."""
    mine = cuda_gpu.native().kernels()
    for seed in (1, -5):
        place = (torch.tensor(seed), 77, 3, 0)
        got = mine["sample"](16, 8192, *place, "gaussian")
        want = reference.sample(16, 8192, *place, "gaussian")
        assert float((got - want).abs().max()) < 2e-6
        assert float((got - want).abs().max()) > 5e-7  # the approximations are felt


def test_both_gpu_backends_draw_and_round_the_same_bits() -> None:
    """The same operations in the same order, so a GPU's approximations do not part them."""
    mine, seed = cuda_gpu.native().kernels(), torch.tensor(3)
    w = torch.randn(5, 800, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    seeds, coeffs = torch.tensor([4, 5]), torch.tensor([0.1, -0.01])
    with triton_gpu.backend() as theirs:
        drawn = [k["sample"](9, 1500, seed, 7, 3, 300, "gaussian") for k in (mine, theirs)]
        assert torch.equal(*drawn)
        taken = [w.clone() for _ in range(2)]
        for kernels, weight in zip((mine, theirs), taken, strict=True):
            places = ([7], [3], [256], "gaussian", "stochastic")
            kernels["update_"]([weight], seeds, coeffs, None, None, *places)
        assert not torch.equal(taken[0], w)
        assert torch.equal(*taken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings_are_the_cpp_backends_bit_for_bit(dtype: torch.dtype) -> None:
    mine, cpp = cuda_gpu.native().kernels(), _registry.backends()["cpp"].kernels
    generator = torch.Generator().manual_seed(1)
    w = [torch.randn(3, 700, generator=generator).to(dtype) for _ in range(2)]
    w[0][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    terms = (torch.tensor([4, 5]), torch.tensor([0.1, -0.01]))
    places = ([7, 8], [], [], "rademacher", "stochastic")
    taken = [[t.clone() for t in w] for _ in range(2)]
    for backend, weights in zip((mine, cpp), taken, strict=True):
        backend["update_"](weights, *terms, None, None, *places)
    for got, want in zip(*taken, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
