"""Every Triton kernel compiled for every supported architecture, without a GPU.

What ``ptxas`` and ``cuobjdump`` say bounds what a kernel may take: no spills and no slow path (a
stack), registers, shared memory of the smallest GPU, and noise drawn once: the number of logarithms
in the machine code is that of the normals of one tile.
"""

from __future__ import annotations

import re

import pytest
import triton_variants as tv

# Registers by kernel: what was compiled, and a little.
REGISTERS = {
    "sample": 64,
    "displace": 96,
    "embedding": 96,
    "update": 140,
    "vectors": 96,
    "project": 140,
    "linear": 240,
    "conv1d": 255,
    "reduce": 64,
    "logits": 96,
    "join": 64,
    "sparse_displace": 96,
    "sparse_update": 72,
    "sparse_correct": 112,
    "sparse_rows": 48,
}
SHARED = 99 * 1024  # of a block on sm_86 and sm_89, the least
VARIANTS = {v.name: v for v in tv.variants()}
# One a kernel for the other architectures.
FIRST = [
    "sample",
    "displace-bf16-gaussian",
    "update-bf16-gaussian",
    "vectors",
    "project",
    "project-sum",
    "linear-bf16-64rows-1terms",
    "conv1d-bf16-32rows-1terms",
    "reduce",
    "logits",
    "join",
    "sparse_displace-bf16-flat",
    "sparse_update-bf16-flat",
    "sparse_correct-bf16-turned",
    "sparse_rows-bf16",
]
CASES = [(name, 90) for name in VARIANTS] + [
    (name, capability) for capability in tv.ARCHITECTURES if capability != 90 for name in FIRST
]


def normals(v: tv.Variant) -> int:
    """Gaussian values one thread draws for a tile (every term's, where SEEDS are unrolled)."""
    c = v.constants
    if not c.get("GAUSSIAN"):
        return 0
    if "INPUTS" in c:
        counters = 64 * c["INPUTS"]
    elif "OUT" in c:
        counters = c["OUT"] * c["COLUMNS"]
    else:
        counters = c.get("ROWS", 1) * 64
    groups = 1
    if v.kernel in (tv.update.update_kernel, tv.update.vectors_kernel, tv.update.project_kernel):
        groups = 2 * c.get("SEEDS", 1)
    return counters * 4 * groups // (32 * v.warps)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_compiles_within_bounds(name: str, capability: int) -> None:
    variant = VARIANTS[name]
    machine = tv.compile_for(variant, capability)
    assert machine.stack == 0
    assert machine.local == 0
    assert machine.registers <= REGISTERS[re.split(r"-", name)[0]]
    assert machine.shared <= SHARED
    # On sm_100 products are pipelined so that the first step's noise stands before the loop too.
    copies = 2 if capability == 100 and "OUT" in variant.constants else 1
    copies = 2 if capability == 100 and "INPUTS" in variant.constants else copies
    assert machine.count(r"MUFU\.LG2") == copies * normals(variant) // 2
    assert machine.count(r"MUFU\.(SIN|COS)") == 0
    if re.match("displace|embedding|update|vectors|sparse_(displace|update|rows)", name):
        assert machine.shared == 0  # noise is drawn where the weights are


@pytest.mark.parametrize("name", FIRST)
def test_arguments_that_are_one(name: str) -> None:
    """Such an argument is a constant of its own specialisation, not a tensor."""
    assert tv.compile_for(tv.with_ones(VARIANTS[name]), 90).stack == 0


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    kernels = {v.kernel for v in VARIANTS.values()}
    for capability in tv.ARCHITECTURES:
        assert {VARIANTS[name].kernel for name, c in CASES if c == capability} == kernels
    modules = (tv.displace, tv.linear, tv.loss, tv.sparse, tv.update)
    written = {
        getattr(module, name)
        for module in modules
        for name in dir(module)
        if name.endswith("_kernel")
    }
    assert kernels == written


def test_products_use_the_matrix_units() -> None:
    machine = tv.compile_for(VARIANTS["linear-bf16-64rows-1terms"], 90)
    assert machine.count("H?G?MMA") > 0
    assert machine.count("LDGSTS") > 0  # weights arrive while noise is drawn


def test_a_turned_element_reads_sixteen_bytes_of_tokens() -> None:
    machine = tv.compile_for(VARIANTS["sparse_correct-bf16-turned"], 90)
    # Four elements of two outputs a thread, and the tile of the product it corrects.
    assert machine.count(r"LDG\.E\.128") >= 8
    assert machine.count(r"RED\.|REDG|ATOM") == 0  # one order
