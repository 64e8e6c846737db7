"""Every Triton kernel compiled for every supported architecture, without a GPU.

What ``ptxas`` and ``cuobjdump`` say bounds what a kernel may take: no spills and no slow path (a
stack), registers, shared memory of the smallest GPU, and noise drawn once: the number of logarithms
in the machine code is that of the normals of one tile.
"""

from __future__ import annotations

import re

import pytest
import triton_variants as tv

# Warps that stay on a multiprocessor: what was compiled, by registers alone. Registers as such vary
# with the compiler, and many numbers mean the same: 113 to 128 are four blocks of four warps.
RESIDENT = {
    "sample": 32,
    "displace": 20,
    "embedding": 32,
    "update": 16,
    "vectors": 32,
    "project": 8,
    "linear": 8,
    "conv1d": 8,
    "reduce": 32,
    "logits": 20,
    "join": 32,
    "sparse_displace": 20,
    "sparse_update": 24,
    "sparse_correct": 16,
    "sparse_rows": 32,
}
SHARED = 99 * 1024  # of a block on sm_86 and sm_89, the least
VARIANTS = {v.name: v for v in tv.variants()}
# One a kernel for the other architectures.
FIRST = [
    "sample",
    "displace-bf16-gaussian",
    "update-bf16-gaussian",
    "update-fp16-gaussian",
    "vectors",
    "project",
    "project-sum",
    "linear-bf16-64rows-1terms",
    "linear-bf16-32rows-1terms-1pending",
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
    if "pending_seeds" in v.types:
        groups = 2
    return counters * 4 * groups // (32 * v.warps)


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_compiles_within_bounds(name: str, capability: int) -> None:
    variant = VARIANTS[name]
    machine = tv.compile_for(variant, capability)
    variant = machine.variant
    assert machine.stack == 0
    assert machine.local == 0
    assert machine.resident >= RESIDENT[re.split(r"-", name)[0]]
    assert machine.shared <= SHARED
    # On sm_100 products may be pipelined so that the first step's noise stands before the loop too.
    drawn = normals(variant) // 2
    copies = (1, 2) if capability == 100 and {"OUT", "INPUTS"} & set(variant.constants) else (1,)
    assert machine.count(r"MUFU\.LG2") in [drawn * n for n in copies]
    assert machine.count(r"MUFU\.(SIN|COS)") == 0
    if re.match("displace|embedding|update|vectors", name):
        assert machine.shared == 0  # noise is drawn where the weights are
    if re.match("sparse_(displace|update|rows)", name):
        assert machine.shared <= 2048  # gathered weights: Triton before 3.8 turns their tiles


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


def test_a_product_that_updates_uses_the_same_unit() -> None:
    """Sums of the same products in the same order: the same bits as the update and the product."""
    for name in ("bf16-32rows-1terms", "bf16-64rows-1terms"):
        for capability in (80, 90):
            both = [
                tv.compile_for(VARIANTS[f"linear-{name}{pending}"], capability)
                for pending in ("", "-1pending")
            ]
            units = [sorted(i for i in m.instructions if re.match("H?G?MMA", i)) for m in both]
            assert units[0] == units[1]


def test_products_use_the_matrix_units() -> None:
    machine = tv.compile_for(VARIANTS["linear-bf16-64rows-1terms"], 90)
    assert machine.count("H?G?MMA") > 0
    assert machine.count("LDGSTS") > 0  # weights arrive while noise is drawn


def test_a_turned_element_reads_sixteen_bytes_of_tokens() -> None:
    machine = tv.compile_for(VARIANTS["sparse_correct-bf16-turned"], 90)
    # Four elements of two outputs a thread, and the tile of the product it corrects.
    assert machine.count(r"LDG\.E\.128") >= 8
    assert machine.count(r"RED\.|REDG|ATOM") == 0  # one order
