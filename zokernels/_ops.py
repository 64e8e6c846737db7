"""Schemas and fake implementations of every op, and nothing else.

The ops are the contract between the layers: backends implement them (:mod:`zokernels.reference` is
the specification), everything above calls them as ``torch.ops.zokernels.<op>``.

Notation: ``w`` a matrix ``[rows, cols]`` in the sense of :mod:`zokernels.noise`, ``seeds`` int64
``[K]``, ``coeffs`` float32 ``[G, K]`` (or ``[K]`` for updates), ``z_k`` the direction of seed
``k``, branch ``g`` the weights ``w + sum_k coeffs[g, k] z_k``. Offsets say where ``w`` starts
inside its parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zokernels import _checks

NAMESPACE = "zokernels"
library = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS = {
    # z itself, float32 [rows, cols]; seed int64, 0-d.
    "sample": "(SymInt rows, SymInt cols, Tensor seed, int param_id, SymInt row_offset, "
    "SymInt col_offset, str distribution) -> Tensor",
    # The weights of every branch: [G, rows, cols] in dtype (w's by default).
    "displace": "(Tensor w, Tensor seeds, Tensor coeffs, int param_id, SymInt row_offset, "
    "SymInt col_offset, str distribution, str rounding, ScalarType? dtype) -> Tensor",
    # The same into scratch `out` [G, rows, cols].
    "displace_": "(Tensor(a!) out, Tensor w, Tensor seeds, Tensor coeffs, int param_id, "
    "SymInt row_offset, SymInt col_offset, str distribution, str rounding) -> ()",
    # Vectors at every branch, for small parameters used in float32: for vector after vector
    # its [G, numel], in one flat float32 tensor.
    "displace_vectors": "(Tensor[] vectors, Tensor seeds, Tensor coeffs, int[] param_ids, "
    "str distribution) -> Tensor",
    # params += sum_k coeffs[k] z_k, one rounding at every True of `ends` (None: at every term);
    # decay[k] multiplies the weight before term k. A term of coefficient 0 and decay 1 is left out
    # (it could turn -0 into +0), but for its rounding.
    "update_": "(Tensor(a!)[] params, Tensor seeds, Tensor coeffs, Tensor? decay, Tensor? ends, "
    "int[] param_ids, SymInt[] row_offsets, SymInt[] col_offsets, str distribution, "
    "str rounding) -> ()",
    # <vectors, z_k> over all vectors: float32 [K].
    "project": "(Tensor[] vectors, Tensor seeds, int[] param_ids, SymInt[] row_offsets, "
    "SymInt[] col_offsets, str distribution) -> Tensor",
    # y_g = x_g W_g^T + bias_g, or x_g W_g when transposed; x [G, ..., in], [..., in] when shared.
    "linear": "(Tensor x, Tensor w, Tensor? bias, Tensor seeds, Tensor coeffs, int param_id, "
    "SymInt row_offset, SymInt col_offset, str distribution, bool shared, bool transposed) "
    "-> Tensor",
    # `update_` of w by pending terms, one rounding each, then `linear` of the new w.
    "update_linear_": "(Tensor x, Tensor(a!) w, Tensor? bias, Tensor seeds, Tensor coeffs, "
    "Tensor pending_seeds, Tensor pending_coeffs, Tensor? pending_decay, str rounding, "
    "int param_id, SymInt row_offset, SymInt col_offset, str distribution, bool shared) -> Tensor",
    # Rows ids of W_g; ids [G, ...], or [...] when shared; -> [G, ..., cols].
    "embedding": "(Tensor ids, Tensor w, Tensor seeds, Tensor coeffs, int param_id, "
    "SymInt row_offset, SymInt col_offset, str distribution, bool shared) -> Tensor",
    # Mean cross-entropy of softmax(x_g W_g^T + bias_g) against targets, float32 [G].
    "linear_cross_entropy": "(Tensor x, Tensor w, Tensor? bias, Tensor targets, Tensor seeds, "
    "Tensor coeffs, int param_id, SymInt row_offset, SymInt col_offset, str distribution, "
    "bool shared, int ignore_index) -> Tensor",
    # --- under a mask: `indices` int64 [n], flat and increasing, of the elements of w that move;
    # `shadow` float32 [n], their values as far as they round to what w holds (else w counts). The
    # noise is that of a vector of n elements whose first one is element `offset`; `project` serves
    # such a vector as it is.
    # The masked values of every branch: float32 [G, n].
    "sparse_displace": "(Tensor w, Tensor indices, Tensor shadow, Tensor seeds, Tensor coeffs, "
    "int param_id, SymInt offset, str distribution) -> Tensor",
    # shadow = shadow * decay[k] + coeffs[k] z_k for every k in order, in float32; w holds its
    # rounding to nearest.
    "sparse_update_": "(Tensor(a!)[] params, Tensor[] indices, Tensor(b!)[] shadows, Tensor seeds, "
    "Tensor coeffs, Tensor? decay, int[] param_ids, str distribution) -> ()",
    # y_g = round(x_g w^T + bias) + x_g D_g^T, D_g the masked values of branch g less what w holds;
    # x, transposed as in `linear`; bias [out] in the dtype of w, or [G, out], added last.
    "sparse_linear": "(Tensor x, Tensor w, Tensor? bias, Tensor indices, Tensor shadow, "
    "Tensor seeds, Tensor coeffs, int param_id, SymInt offset, str distribution, bool shared, "
    "bool transposed) -> Tensor",
    # Rows ids of w with the masked values of every branch in them, rounded to the dtype of w.
    "sparse_embedding": "(Tensor ids, Tensor w, Tensor indices, Tensor shadow, Tensor seeds, "
    "Tensor coeffs, int param_id, SymInt offset, str distribution, bool shared) -> Tensor",
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(fake: Callable[..., object]) -> Callable[..., object]:
        check = _checks.CHECKS[name]

        # One tensor on the meta device sends a whole call here: without the check it would answer
        # with uninitialised memory. Under tracing a bad argument fails when it is traced.
        @functools.wraps(fake)
        def checked(*args: object) -> object:
            check(*args)
            return fake(*args)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked, lib=library)
        return fake

    return register


@_fake("sample")
def _(
    rows: int, cols: int, seed: Tensor, param_id: int, row_offset: int, col_offset: int, dist: str
) -> Tensor:
    return seed.new_empty((rows, cols), dtype=torch.float32)


@_fake("displace")
def _(
    w: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    rounding: str,
    dtype: torch.dtype | None,
) -> Tensor:
    return w.new_empty((coeffs.shape[0], *w.shape), dtype=dtype or w.dtype)


@_fake("displace_")
def _(out: Tensor, w: Tensor, *rest: object) -> None:
    return None


@_fake("displace_vectors")
def _(vectors: list[Tensor], seeds: Tensor, coeffs: Tensor, *rest: object) -> Tensor:
    return coeffs.new_empty(coeffs.shape[0] * sum(v.shape[0] for v in vectors))


@_fake("update_")
def _(params: list[Tensor], *rest: object) -> None:
    return None


@_fake("project")
def _(vectors: list[Tensor], seeds: Tensor, *rest: object) -> Tensor:
    return seeds.new_empty(seeds.shape, dtype=torch.float32)


@_fake("linear")
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
    transposed: bool,
) -> Tensor:
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    return x.new_empty((coeffs.shape[0], *lead, w.shape[1 if transposed else 0]))


@_fake("update_linear_")
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    coeffs: Tensor,
    pending_seeds: Tensor,
    pending_coeffs: Tensor,
    pending_decay: Tensor | None,
    rounding: str,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
) -> Tensor:
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    return x.new_empty((coeffs.shape[0], *lead, w.shape[0]))


@_fake("embedding")
def _(
    ids: Tensor,
    w: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    row_offset: int,
    col_offset: int,
    distribution: str,
    shared: bool,
) -> Tensor:
    lead = ids.shape if shared else ids.shape[1:]
    return w.new_empty((coeffs.shape[0], *lead, w.shape[1]))


@_fake("linear_cross_entropy")
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    *rest: object,
) -> Tensor:
    return x.new_empty((coeffs.shape[0],), dtype=torch.float32)


@_fake("sparse_displace")
def _(
    w: Tensor, indices: Tensor, shadow: Tensor, seeds: Tensor, coeffs: Tensor, *rest: object
) -> Tensor:
    return shadow.new_empty((coeffs.shape[0], indices.shape[0]))


@_fake("sparse_update_")
def _(params: list[Tensor], *rest: object) -> None:
    return None


@_fake("sparse_linear")
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
    shared: bool,
    transposed: bool,
) -> Tensor:
    lead = x.shape[:-1] if shared else x.shape[1:-1]
    return x.new_empty((coeffs.shape[0], *lead, w.shape[1 if transposed else 0]))


@_fake("sparse_embedding")
def _(
    ids: Tensor,
    w: Tensor,
    indices: Tensor,
    shadow: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    param_id: int,
    offset: int,
    distribution: str,
    shared: bool,
) -> Tensor:
    lead = ids.shape if shared else ids.shape[1:]
    return w.new_empty((coeffs.shape[0], *lead, w.shape[1]))
