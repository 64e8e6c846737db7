"""Representative variants of every Triton kernel, compiled ahead of time without a GPU."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zokernels.triton import displace, linear, loss, sparse, update
from zokernels.triton.plan import fused_tiles, updating_tiles

ARCHITECTURES = (80, 86, 89, 90, 100)
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Types of the arguments that mean the same in every kernel.
_TYPES = {
    "seed": "*i64",
    "seeds": "*i64",
    "coeffs": "*fp32",
    "decay": "*fp32",
    "ends": "*i8",
    "ids": "*i64",
    "targets": "*i64",
    "flag": "*i64",
    "table": "*i64",
    "owners": "*i32",
    "statistics": "*fp32",
    "losses": "*fp32",
    "bias": "*fp32",
    "indices": "*i64",
    "shadow": "*fp32",
    "rank": "*i64",
    "difference": "*fp32",
    "source": "*i32",
    "starts": "*i64",
    "values": "*fp32",
}
_ALIGNED = set("x_m x_g x_c w_r out_g out_r plain_g fan_in fan_out cols skip width".split())
_UNIT = {"w_c", "out_c"}


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants, the types of its data and its launch options."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int = 4
    stages: int = 1
    otherwise: Variant | None = None  # what is launched where this does not fit


@dataclass(frozen=True)
class Machine:
    """What ``cuobjdump`` says of a compiled kernel."""

    variant: Variant
    registers: int
    stack: int
    local: int
    shared: int
    instructions: list[str]
    listing: str

    @property
    def resident(self) -> int:
        """Warps of whole blocks whose registers a multiprocessor has (65536 of 32 bits)."""
        each = 32 * -(-self.registers // 8) * 8
        return 65536 // each // self.variant.warps * self.variant.warps

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i)) for i in self.instructions)


def compile_for(variant: Variant, capability: int) -> Machine:
    """Compile and read the resources and the machine code."""
    signature, constants, attributes = {}, dict(variant.constants), {}
    for i, name in enumerate(variant.kernel.arg_names):
        default = variant.kernel.params[i].default
        if default is not inspect.Parameter.empty and name not in variant.types:
            constants.setdefault(name, default)
        if name in constants:
            signature[name] = "constexpr"
        elif name in _UNIT:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = variant.types.get(name, _TYPES.get(name, "i32"))
            free = variant.kernel.params[i].do_not_specialize
            if (signature[name].startswith("*") or name in _ALIGNED) and not free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, attributes)
    options = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": False,
    }
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if (getattr(binary.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY:
        # A launch raises OutOfResources.
        assert variant.otherwise is not None, f"{variant.name} does not fit sm_{capability}"
        return compile_for(variant.otherwise, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def dump(*flags: str) -> str:
            return subprocess.run(
                [os.fspath(_BIN / "cuobjdump"), *flags, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
        listing = dump("-sass")
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    return Machine(
        variant,
        int(usage["REG"]),
        int(usage["STACK"]),
        int(usage["LOCAL"]),
        binary.metadata.shared,
        code,
        listing,
    )


# Of an update that a product makes first; one term is a constant of its own specialisation.
_PENDING = {"pending_seeds": "*i64", "pending_coeffs": "*fp32", "pending_decay": "*fp32"}


def _product(
    name: str, kind: str, stacked: int, *, terms: int = 1, pending: int = 0, **extra: Any
) -> Variant:
    transposed = name == "conv1d"
    constants: dict[str, Any] = {
        "COEFFS": 0 if terms == 1 else 16,
        "SHARED": False,
        "BIAS": True,
        "MODE": 0,
        "GAUSSIAN": True,
        "PRECISION": "tf32" if kind == "fp32" else "ieee",
        **extra,
    }
    pointer = f"*{kind}"
    types = {"x": pointer, "w": pointer, "y": pointer if constants["MODE"] == 0 else "*fp32"}
    label = "-".join(f"{k.lower()}{v}" for k, v in extra.items())
    if pending:
        constants["STOCHASTIC"] = kind != "fp32"
        constants |= {"pending_terms": 1} if pending == 1 else {}
        types |= _PENDING | ({"pending_terms": "i32"} if pending > 1 else {})
        label = f"{pending}pending-{label}"
    found = None
    # The next smaller tiles are for where these do not fit.
    for tiles in reversed(fused_tiles(stacked, 4 if kind == "fp32" else 2, transposed)):
        if pending and tiles.rows < stacked:
            continue
        sizes = {"INPUTS": tiles.columns} if transposed else {"OUT": tiles.outputs}
        sizes |= {} if transposed else {"COLUMNS": tiles.columns}
        found = Variant(
            f"{name}-{kind}-{stacked}rows-{terms}terms-{label}".rstrip("-"),
            linear.conv1d_kernel if transposed else linear.linear_kernel,
            {**constants, **sizes, "TOKENS": tiles.rows},
            types,
            tiles.warps,
            updating_tiles(tiles).stages if pending else tiles.stages,
            found,
        )
    assert found is not None
    return found


# Triton compiles an integer argument that is 1 into the kernel.
_ONES = (
    "count rows cols groups group0 skip row0 param_id terms branches out_g out_r w_r x_m tokens "
    "fan_in fan_out steps run size splits chunk chunks start width vocab pieces tiles "
    "programs numel stride_r plain_g x_g x_t x_c ids_g"
).split()


def with_ones(variant: Variant) -> Variant:
    """The same kernel where every integer argument is 1."""
    kernel = variant.kernel
    ones = {p.name: 1 for p in kernel.params if p.name in _ONES and not p.do_not_specialize}
    constants = {**variant.constants, **ones}
    return dataclasses.replace(variant, name=f"{variant.name}-ones", constants=constants)


def variants() -> list[Variant]:
    """Every kernel; the paths of a MeZO step in every dtype and distribution."""
    found = [
        Variant(
            "sample",
            displace.sample_kernel,
            {"ROWS": 8, "GAUSSIAN": True},
            {"out": "*fp32"},
        )
    ]
    for kind in ("bf16", "fp16", "fp32"):
        for gaussian in (True, False):
            if kind == "fp16" and not gaussian:
                continue
            name = f"{kind}-{'gaussian' if gaussian else 'rademacher'}"
            data = {"w": f"*{kind}", "out": f"*{kind}", "like": f"*{kind}"}
            flags = {"GATHER": 0, "GAUSSIAN": gaussian, "STOCHASTIC": False}
            one = {"ROWS": 8, "BRANCHES": 0, **flags}
            found.append(Variant(f"displace-{name}", displace.displace_kernel, one, data))
            rows = 4 if kind == "fp16" else 8
            constants = {
                "ROWS": rows,
                "GAUSSIAN": gaussian,
                "STOCHASTIC": kind != "fp32",
                "DECAY": False,
                "ENDS": True,
                "DENSE": True,
            }
            found.append(
                Variant(
                    f"update-{name}",
                    update.update_kernel,
                    constants,
                    data,
                    8 if gaussian and kind == "fp32" else 4,
                )
            )
    data = {"w": "*bf16", "out": "*bf16", "like": "*bf16", "partial": "*fp64"}
    flags = {"GAUSSIAN": True}
    many = {"ROWS": 4, "BRANCHES": 4, "GATHER": 0, "STOCHASTIC": True, **flags}
    found += [
        Variant("displace-4-branches-many-terms", displace.displace_kernel, many, data),
        Variant(
            "embedding",
            displace.displace_kernel,
            {"ROWS": 8, "BRANCHES": 0, "GATHER": 1, "STOCHASTIC": False, **flags},
            data,
        ),
        Variant(
            "update-strided-decay",
            update.update_kernel,
            {"ROWS": 8, "STOCHASTIC": True, "DECAY": True, "ENDS": False, "DENSE": False, **flags},
            data,
            8,
        ),
        Variant(
            "vectors",
            update.vectors_kernel,
            flags,
            {**data, "out": "*fp32"},
            2,
        ),
        Variant(
            "project",
            update.project_kernel,
            {"ROWS": 8, "SEEDS": 2, "DENSE": True, **flags},
            data,
            8,
        ),
        Variant(
            "project-sum", update.project_sum_kernel, {"BLOCK": 1024}, {**data, "out": "*fp32"}
        ),
        _product("linear", "bf16", 64),
        _product("linear", "bf16", 32),
        _product("linear", "bf16", 16, MODE=1),
        _product("linear", "bf16", 32, GAUSSIAN=False),
        _product("linear", "bf16", 32, MODE=2),
        _product("linear", "fp16", 64, SHARED=True),
        _product("linear", "fp32", 32),
        _product("linear", "bf16", 32, terms=4),
        _product("linear", "bf16", 64, pending=1),
        _product("linear", "bf16", 32, pending=1),
        _product("linear", "bf16", 16, pending=1, MODE=1),
        _product("linear", "bf16", 32, pending=1, GAUSSIAN=False),
        _product("linear", "fp16", 32, pending=3),
        _product("linear", "fp32", 32, pending=1),
        _product("conv1d", "bf16", 32),
        _product("conv1d", "fp32", 32, BIAS=False),
        Variant(
            "reduce",
            linear.reduce_kernel,
            {"BLOCK": 128, "BIAS": True},
            {"y": "*bf16", "partial": "*fp32"},
        ),
        Variant(
            "logits",
            loss.logits_kernel,
            {"BLOCK": 1024, "BIAS": True},
            {"logits": "*fp32"},
        ),
        Variant("join", loss.join_kernel, {"BLOCK": 128}, {}),
        *_sparse(),
    ]
    return found


def _sparse() -> list[Variant]:
    """The ops under a mask, as a GPU gets them (zokernels/triton/sparse_ops.py)."""
    found = []
    for kind in ("bf16", "fp16", "fp32"):
        data = {name: f"*{kind}" for name in ("w", "out", "like", "x", "plain", "bias")}
        for flat in (True, False):
            if kind == "fp16" and not flat:
                continue
            label = f"{kind}-{'flat' if flat else 'strided'}"
            drawn = {"ROWS": 4, "FLAT": flat, "GAUSSIAN": True}
            found.append(
                Variant(
                    f"sparse_displace-{label}",
                    sparse.sparse_displace_kernel,
                    {**drawn, "LESS": True, "RANKED": not flat},
                    {**data, "out": "*fp32"},
                )
            )
            found.append(
                Variant(
                    f"sparse_update-{label}",
                    sparse.sparse_update_kernel,
                    {**drawn, "DECAY": not flat},
                    data,
                )
            )
        for turned in (True, False):
            found.append(
                Variant(
                    f"sparse_correct-{kind}-{'turned' if turned else 'few'}",
                    sparse.correct_kernel,
                    {
                        "OUT": 32,
                        "TOKENS": 64 if turned else 16,
                        "STEP": 4,
                        "TURNED": turned,
                        "BIAS": not turned,
                    },
                    data,
                )
            )
        found.append(
            Variant(f"sparse_rows-{kind}", sparse.rows_kernel, {"BLOCK": 1024, "PATCH": 128}, data)
        )
    found.append(
        Variant(
            "sparse_update-bf16-rademacher",
            sparse.sparse_update_kernel,
            {"ROWS": 4, "FLAT": True, "DECAY": False, "GAUSSIAN": False},
            {"like": "*bf16"},
        )
    )
    return found
