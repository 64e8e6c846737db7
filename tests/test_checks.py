"""Each bad argument of each op: one specific error that names it, before anything changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from zokernels import _checks, _ops

ops = torch.ops.zokernels


def good(op: str) -> dict[str, Any]:
    """Valid arguments by name."""
    torch.manual_seed(3)
    w = torch.randn(4, 6)
    terms = {"seeds": torch.tensor([1, 2]), "coeffs": torch.tensor([[0.1, 0.2], [0.3, 0.4]])}
    place = {"param_id": 5, "row_offset": 0, "col_offset": 0, "distribution": "gaussian"}
    x = torch.randn(2, 3, 6)
    many = {"param_ids": [1, 2], "row_offsets": [], "col_offsets": []}
    tensors = [torch.randn(4, 6), torch.randn(3)]
    masked = {"indices": torch.tensor([1, 7, 23]), "shadow": torch.zeros(3)}
    compact = {"param_id": 5, "offset": 0, "distribution": "gaussian"}
    return {
        "sample": {"rows": 2, "cols": 3, "seed": torch.tensor(1), **place},
        "displace": {"w": w, **terms, **place, "rounding": "nearest", "dtype": None},
        "displace_": {
            "out": torch.randn(2, 4, 6), "w": w, **terms, **place, "rounding": "nearest",
        },
        "displace_vectors": {
            "vectors": [torch.randn(6), torch.randn(3)], **terms, "param_ids": [1, 2],
            "distribution": "gaussian",
        },
        "update_": {
            "params": tensors, "seeds": terms["seeds"], "coeffs": torch.tensor([0.1, 0.2]),
            "decay": torch.ones(2), "ends": torch.tensor([False, True]), **many,
            "distribution": "gaussian", "rounding": "nearest",
        },
        "project": {
            "vectors": tensors, "seeds": terms["seeds"], **many, "distribution": "gaussian",
        },
        "linear": {
            "x": x, "w": w, "bias": torch.randn(2, 4), **terms, **place, "shared": False,
            "transposed": False,
        },
        "update_linear_": {
            "x": x, "w": w, "bias": torch.randn(2, 4), **terms,
            "pending_seeds": torch.tensor([7]), "pending_coeffs": torch.tensor([0.1]),
            "pending_decay": torch.ones(1), "rounding": "nearest", **place, "shared": False,
        },
        "embedding": {
            "ids": torch.tensor([[0, 1], [2, 3]]), "w": w, **terms, **place, "shared": False,
        },
        "linear_cross_entropy": {
            "x": x, "w": w, "bias": None, "targets": torch.tensor([0, 1, 3]), **terms, **place,
            "shared": False, "ignore_index": -100,
        },
        "sparse_displace": {"w": w, **masked, **terms, **compact},
        "sparse_update_": {
            "params": [torch.randn(4, 6), torch.randn(3)],
            "indices": [torch.tensor([1, 7]), torch.tensor([0])],
            "shadows": [torch.zeros(2), torch.zeros(1)], "seeds": terms["seeds"],
            "coeffs": torch.tensor([0.1, 0.2]), "decay": torch.ones(2), "param_ids": [1, 2],
            "distribution": "gaussian",
        },
        "sparse_linear": {
            "x": x, "w": w, "bias": torch.randn(2, 4), **masked, **terms, **compact,
            "shared": False, "transposed": False,
        },
        "sparse_embedding": {
            "ids": torch.tensor([[0, 1], [2, 3]]), "w": w, **masked, **terms, **compact,
            "shared": False,
        },
    }[op]  # fmt: skip


META = {"device": "meta"}
PRODUCTS = ["linear", "update_linear_", "linear_cross_entropy"]
WEIGHTED = ["displace", "displace_", "embedding", *PRODUCTS]
PLACED = ["sample", *WEIGHTED]
MANY = ["update_", "project"]
MASKED = ["sparse_displace", "sparse_linear", "sparse_embedding"]
SPARSE = [*MASKED, "sparse_update_"]
EVERY = list(_ops.SCHEMAS)

Bad = tuple[list[str], dict[str, Any], type[Exception], str]

BAD: list[Bad] = [
    # --- shared by several ops
    (EVERY, {"distribution": "cauchy"}, ValueError,
     "distribution must be one of ['gaussian', 'rademacher']; got 'cauchy'"),
    (["displace", "displace_", "update_", "update_linear_"], {"rounding": "up"}, ValueError,
     "rounding must be one of ['nearest', 'stochastic']; got 'up'"),
    (WEIGHTED + MANY, {"seeds": torch.tensor([1, 2], dtype=torch.int32)}, TypeError,
     "seeds must be an int64 vector; got torch.int32 of shape (2,)"),
    (WEIGHTED + MANY, {"seeds": torch.tensor([[1, 2]])}, TypeError,
     "seeds must be an int64 vector; got torch.int64 of shape (1, 2)"),
    (WEIGHTED + MANY, {"seeds": torch.zeros(2, dtype=torch.int64, **META)}, ValueError,
     "seeds must be on cpu like the weights; got meta"),
    (WEIGHTED, {"coeffs": torch.zeros(2, 2, dtype=torch.float64)}, TypeError,
     "coeffs must be float32 of shape [branches, 2]; got torch.float64 of shape (2, 2)"),
    (WEIGHTED, {"coeffs": torch.zeros(2, 3)}, TypeError,
     "coeffs must be float32 of shape [branches, 2]; got torch.float32 of shape (2, 3)"),
    (WEIGHTED, {"coeffs": torch.zeros(2)}, TypeError,
     "coeffs must be float32 of shape [branches, 2]; got torch.float32 of shape (2,)"),
    (WEIGHTED, {"coeffs": torch.zeros(2, 2, **META)}, ValueError,
     "coeffs must be on cpu like the weights; got meta"),
    (WEIGHTED, {"coeffs": torch.zeros(0, 2)}, ValueError,
     "coeffs must have at least one branch"),
    (WEIGHTED, {"w": torch.zeros(4, 6, dtype=torch.float64)}, TypeError,
     "w must be float32, bfloat16 or float16; got torch.float64"),
    (WEIGHTED, {"w": torch.zeros(4, 6, 1)}, ValueError,
     "w must be a matrix; got shape (4, 6, 1)"),
    (PLACED, {"param_id": -1}, ValueError, "param_id must be in [0, 2**32); got -1"),
    (PLACED, {"param_id": 2**32}, ValueError, "param_id must be in [0, 2**32); got 4294967296"),
    (PLACED, {"row_offset": -1}, ValueError, "rows must stay in [0, 2**32); got row_offset -1"),
    (PLACED, {"row_offset": 2**32}, ValueError, "rows must stay in [0, 2**32)"),
    (PLACED, {"col_offset": -2}, ValueError, "columns must stay in [0, 2**34); got col_offset -2"),
    (PLACED, {"col_offset": 2**34}, ValueError, "columns must stay in [0, 2**34)"),
    # --- displace_vectors
    (["displace_vectors"], {"vectors": []}, ValueError, "vectors must not be empty"),
    (["displace_vectors"], {"vectors": [torch.zeros(6), torch.zeros(3, 1)]}, ValueError,
     "vectors[1] must be a vector; got shape (3, 1)"),
    (["displace_vectors"], {"vectors": [torch.zeros(6), torch.zeros(3, dtype=torch.int32)]},
     TypeError, "vectors[1] must be float32, bfloat16 or float16; got torch.int32"),
    (["displace_vectors"], {"vectors": [torch.zeros(6), torch.zeros(3, **META)]}, ValueError,
     "vectors[1] must be on cpu like the weights; got meta"),
    (["displace_vectors"], {"param_ids": [1]}, ValueError,
     "param_ids must have 2 entries; got 1"),
    (["displace_vectors"], {"coeffs": torch.zeros(2, 3)}, TypeError,
     "coeffs must be float32 of shape [branches, 2]; got torch.float32 of shape (2, 3)"),
    (["displace_vectors"], {"coeffs": torch.zeros(0, 2)}, ValueError,
     "coeffs must have at least one branch"),
    # --- under a mask
    (SPARSE, {"seeds": torch.tensor([1, 2], dtype=torch.int32)}, TypeError,
     "seeds must be an int64 vector; got torch.int32 of shape (2,)"),
    (MASKED, {"coeffs": torch.zeros(2, 3)}, TypeError,
     "coeffs must be float32 of shape [branches, 2]; got torch.float32 of shape (2, 3)"),
    (MASKED, {"coeffs": torch.zeros(0, 2)}, ValueError, "coeffs must have at least one branch"),
    (MASKED, {"w": torch.zeros(4, 6, dtype=torch.float64)}, TypeError,
     "w must be float32, bfloat16 or float16; got torch.float64"),
    (["sparse_linear", "sparse_embedding"], {"w": torch.zeros(24)}, ValueError,
     "w must be a matrix; got shape (24,)"),
    (MASKED, {"indices": torch.zeros(3, dtype=torch.int32)}, TypeError,
     "indices must be an int64 vector; got torch.int32 of shape (3,)"),
    (MASKED, {"indices": torch.zeros(25, dtype=torch.int64), "shadow": torch.zeros(25)},
     ValueError, "indices must have at most 24 entries; got 25"),
    (MASKED, {"indices": torch.zeros(3, dtype=torch.int64, **META)}, ValueError,
     "indices must be on cpu like the weights; got meta"),
    (MASKED, {"shadow": torch.zeros(2)}, TypeError,
     "shadow must be float32 of shape (3,); got torch.float32 of shape (2,)"),
    (MASKED, {"shadow": torch.zeros(3, dtype=torch.float64)}, TypeError,
     "shadow must be float32 of shape (3,); got torch.float64 of shape (3,)"),
    (MASKED, {"offset": -1}, ValueError, "the vector must stay in [0, 2**34); got offset -1"),
    (MASKED, {"offset": 2**34 - 2}, ValueError, "the vector must stay in [0, 2**34); got offset"),
    (MASKED, {"param_id": 2**32}, ValueError, "param_id must be in [0, 2**32); got 4294967296"),
    (MASKED, {"indices": torch.tensor([1, 7, 24])}, IndexError,
     "indices must be in [0, 24); got values from 1 to 24"),
    (MASKED, {"indices": torch.tensor([-1, 7, 8])}, IndexError,
     "indices must be in [0, 24); got values from -1 to 8"),
    (["sparse_update_"], {"params": []}, ValueError, "params must not be empty"),
    (["sparse_update_"], {"indices": [torch.tensor([1, 7])]}, ValueError,
     "indices must have 2 entries; got 1"),
    (["sparse_update_"], {"shadows": []}, ValueError, "shadows must have 2 entries; got 0"),
    (["sparse_update_"], {"param_ids": [1]}, ValueError, "param_ids must have 2 entries; got 1"),
    (["sparse_update_"], {"shadows": [torch.zeros(2), torch.zeros(2)]}, TypeError,
     "shadow[1] must be float32 of shape (1,); got torch.float32 of shape (2,)"),
    (["sparse_update_"], {"indices": [torch.tensor([1, 7]), torch.tensor([3])]}, IndexError,
     "indices must be in [0, 3); got values from 3 to 3"),
    (["sparse_update_"], {"coeffs": torch.zeros(3)}, TypeError,
     "coeffs must be float32 of shape [2]; got torch.float32 of shape (3,)"),
    (["sparse_update_"], {"decay": torch.zeros(3)}, TypeError,
     "decay must be float32 of shape [2]; got torch.float32 of shape (3,)"),
    (["sparse_linear"], {"x": torch.zeros(2, 3, 6, dtype=torch.bfloat16)}, TypeError,
     "x must have the dtype of w, torch.float32; got torch.bfloat16"),
    (["sparse_linear"], {"x": torch.zeros(2, 3, 5)}, ValueError,
     "x must end in a dimension of 6; got shape (2, 3, 5)"),
    (["sparse_linear"], {"x": torch.zeros(3, 3, 6)}, ValueError,
     "x must start with 2 branches; got shape (3, 3, 6)"),
    (["sparse_linear"], {"bias": torch.zeros(3)}, ValueError,
     "bias must have shape (4,) or (2, 4); got shape (3,)"),
    (["sparse_linear"], {"bias": torch.zeros(4, dtype=torch.bfloat16)}, TypeError,
     "bias must have the dtype of w, torch.float32; got torch.bfloat16"),
    (["sparse_embedding"], {"ids": torch.zeros(2, 2)}, TypeError,
     "ids must be int64 or int32; got torch.float32"),
    (["sparse_embedding"], {"ids": torch.tensor([[0, 1], [2, 4]])}, IndexError,
     "ids must be in [0, 4); got values from 0 to 4"),
    # --- sample
    (["sample"], {"seed": torch.tensor([1])}, TypeError,
     "seed must be a 0-d int64 tensor; got torch.int64 (1,)"),
    (["sample"], {"seed": torch.tensor(1.0)}, TypeError,
     "seed must be a 0-d int64 tensor; got torch.float32 ()"),
    (["sample"], {"rows": -1}, ValueError, "rows and cols must not be negative; got -1 and 3"),
    (["sample"], {"cols": -3}, ValueError, "rows and cols must not be negative; got 2 and -3"),
    # --- displace
    (["displace"], {"dtype": torch.float64}, TypeError,
     "dtype must be float32, bfloat16 or float16; got torch.float64"),
    (["displace_"], {"out": torch.zeros(2, 4, 6, dtype=torch.float64)}, TypeError,
     "dtype must be float32, bfloat16 or float16; got torch.float64"),
    (["displace_"], {"out": torch.zeros(3, 4, 6)}, ValueError,
     "out must have shape (2, 4, 6); got (3, 4, 6)"),
    (["displace_"], {"out": torch.zeros(2, 4, 6, **META)}, ValueError,
     "out must be on cpu like the weights; got meta"),
    # --- many tensors
    (["update_"], {"params": []}, ValueError, "params must not be empty"),
    (["project"], {"vectors": []}, ValueError, "vectors must not be empty"),
    (MANY, {"param_ids": [1]}, ValueError, "param_ids must have 2 entries; got 1"),
    (MANY, {"param_ids": [1, 2**32]}, ValueError, "param_id must be in [0, 2**32); got 4294967296"),
    (MANY, {"row_offsets": [1]}, ValueError,
     "row_offsets must be empty or have 2 entries; got 1"),
    (MANY, {"col_offsets": [1, 2, 3]}, ValueError,
     "col_offsets must be empty or have 2 entries; got 3"),
    (MANY, {"row_offsets": [0, -1]}, ValueError, "rows must stay in [0, 2**32); got row_offset -1"),
    (["update_"], {"params": [torch.zeros(4, 6), torch.zeros(3, dtype=torch.int64)]}, TypeError,
     "params[1] must be float32, bfloat16 or float16; got torch.int64"),
    (["project"], {"vectors": [torch.zeros(4, 6), torch.zeros(3, dtype=torch.float64)]}, TypeError,
     "vectors[1] must be float32, bfloat16 or float16; got torch.float64"),
    (["update_"], {"params": [torch.zeros(4, 6), torch.zeros(3, **META)]}, ValueError,
     "params[1] must be on cpu like the weights; got meta"),
    (["update_"], {"coeffs": torch.zeros(3)}, TypeError,
     "coeffs must be float32 of shape [2]; got torch.float32 of shape (3,)"),
    (["update_"], {"coeffs": torch.zeros(1, 2)}, TypeError,
     "coeffs must be float32 of shape [2]; got torch.float32 of shape (1, 2)"),
    (["update_"], {"decay": torch.ones(3)}, TypeError,
     "decay must be float32 of shape [2]; got torch.float32 of shape (3,)"),
    (["update_"], {"decay": torch.ones(2, dtype=torch.float64)}, TypeError,
     "decay must be float32 of shape [2]; got torch.float64"),
    (["update_"], {"decay": torch.ones(2, **META)}, ValueError,
     "decay must be on cpu like the weights; got meta"),
    (["update_"], {"ends": torch.ones(2)}, TypeError,
     "ends must be bool of shape [2]; got torch.float32"),
    (["update_"], {"ends": torch.ones(1, dtype=torch.bool)}, TypeError,
     "ends must be bool of shape [2]; got torch.bool of shape (1,)"),
    (["update_"], {"ends": torch.ones(2, dtype=torch.bool, **META)}, ValueError,
     "ends must be on cpu like the weights; got meta"),
    # --- products
    (PRODUCTS, {"x": torch.zeros(2, 3, 6).to(torch.bfloat16)}, TypeError,
     "x must have the dtype of w, torch.float32; got torch.bfloat16"),
    (PRODUCTS, {"x": torch.zeros(2, 3, 5)}, ValueError,
     "x must end in a dimension of 6; got shape (2, 3, 5)"),
    (["linear"], {"transposed": True}, ValueError,
     "x must end in a dimension of 4; got shape (2, 3, 6)"),
    (PRODUCTS, {"x": torch.zeros(6)}, ValueError,
     "x must end in a dimension of 6; got shape (6,)"),
    (PRODUCTS, {"x": torch.zeros(3, 3, 6)}, ValueError,
     "x must start with 2 branches; got shape (3, 3, 6)"),
    (PRODUCTS, {"x": torch.zeros(2, 3, 6, **META)}, ValueError,
     "x must be on cpu like the weights; got meta"),
    (PRODUCTS, {"bias": torch.zeros(4)}, ValueError,
     "bias must have shape (2, 4); got shape (4,)"),
    (PRODUCTS, {"bias": torch.zeros(2, 6)}, ValueError,
     "bias must have shape (2, 4); got shape (2, 6)"),
    (PRODUCTS, {"bias": torch.zeros(2, 4, dtype=torch.int64)}, TypeError,
     "bias must be float32, bfloat16 or float16; got torch.int64"),
    (PRODUCTS, {"bias": torch.zeros(2, 4, **META)}, ValueError,
     "bias must be on cpu like the weights; got meta"),
    (["update_linear_"], {"pending_seeds": torch.tensor([7.0])}, TypeError,
     "pending_seeds must be an int64 vector; got torch.float32 of shape (1,)"),
    (["update_linear_"], {"pending_seeds": torch.zeros(1, dtype=torch.int64, **META)}, ValueError,
     "pending_seeds must be on cpu like the weights; got meta"),
    (["update_linear_"], {"pending_coeffs": torch.ones(2)}, TypeError,
     "pending_coeffs must be float32 of shape [1]; got torch.float32 of shape (2,)"),
    (["update_linear_"], {"pending_decay": torch.ones(2)}, TypeError,
     "pending_decay must be float32 of shape [1]; got torch.float32 of shape (2,)"),
    (["embedding"], {"ids": torch.zeros(2, 2)}, TypeError,
     "ids must be int64 or int32; got torch.float32"),
    (["embedding"], {"ids": torch.zeros(3, 2, dtype=torch.int64)}, ValueError,
     "ids must start with 2 branches; got shape (3, 2)"),
    (["embedding"], {"ids": torch.tensor(0)}, ValueError,
     "ids must start with 2 branches; got shape ()"),
    (["embedding"], {"ids": torch.zeros(2, 2, dtype=torch.int64, **META)}, ValueError,
     "ids must be on cpu like the weights; got meta"),
    (["linear_cross_entropy"], {"targets": torch.tensor([0, 1])}, ValueError,
     "targets must be int64 of shape [tokens] = (3,); got torch.int64 of shape (2,)"),
    (["linear_cross_entropy"], {"targets": torch.tensor([0, 1, 2], dtype=torch.int32)}, ValueError,
     "targets must be int64 of shape [tokens] = (3,); got torch.int32"),
    (["linear_cross_entropy"], {"targets": torch.zeros(3, dtype=torch.int64, **META)}, ValueError,
     "targets must be on cpu like the weights; got meta"),
    (["linear_cross_entropy"],
     {"x": torch.zeros(2, 2, 3, 6), "targets": torch.zeros(2, 3, dtype=torch.int64)}, ValueError,
     "targets must be int64 of shape [tokens]"),
]  # fmt: skip

EACH = [
    pytest.param(op, change, error, message, id=f"{op}-{'+'.join(change)}-{i}")
    for i, (names, change, error, message) in enumerate(BAD)
    for op in names
]


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    found = []
    for value in arguments.values():
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, Tensor) and v.device.type != "meta"]
    return found


@pytest.mark.parametrize(("op", "change", "error", "message"), EACH)
def test_a_bad_argument_is_named_and_changes_nothing(op, change, error, message):
    arguments = {**good(op), **change}
    before = [t.clone() for t in tensors_of(arguments)]
    with pytest.raises(error, match=re.escape(message)):
        getattr(ops, op)(*arguments.values())
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(arguments), before, strict=True))


@pytest.mark.parametrize("op", [*WEIGHTED, *MANY])
def test_tracing_checks_too(op):
    arguments = {**good(op), "seeds": torch.tensor([1.0, 2.0])}
    with FakeTensorMode() as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, tuple(arguments.values()))
        with pytest.raises(TypeError, match="seeds must be an int64 vector"):
            getattr(ops, op)(*fake)


@pytest.mark.parametrize("op", EVERY)
def test_good_arguments_pass_and_say_the_device(op):
    assert list(good(op)) == [a.name for a in getattr(ops, op).default._schema.arguments], (
        "the test names arguments as the schema does"
    )
    assert _checks.CHECKS[op](*good(op).values()) == "cpu"
    getattr(ops, op)(*good(op).values())


def test_every_op_has_a_check():
    assert set(_checks.CHECKS) == set(_ops.SCHEMAS)


def test_the_edges_of_the_ranges_are_allowed():
    arguments = good("sample")
    arguments |= {"row_offset": 2**32 - 2, "col_offset": 2**34 - 3, "param_id": 2**32 - 1}
    assert ops.sample(*arguments.values()).shape == (2, 3)
