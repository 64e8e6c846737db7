"""Conformance tests that PTX goes through: every op, dtype and distribution, not every pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_conformance as suite
import test_sparse_conformance as masked
import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GAUSSIAN, RADEMACHER = "gaussian", "rademacher"

Case = tuple[Callable[..., None], tuple[Any, ...]]

_CASES: list[Case] = [
    (suite.test_sample, (GAUSSIAN, (2**32 - 8, 256))),
    (suite.test_sample, (RADEMACHER, (3, 17))),
    (suite.test_displace_rademacher_is_exact, (BF16, F32, "stochastic")),
    (suite.test_displace_rademacher_is_exact, (F16, F16, "nearest")),
    (suite.test_displace_rademacher_is_exact, (F32, BF16, "stochastic")),
    (suite.test_displace_gaussian, (F32,)),
    (suite.test_displace_gaussian, (BF16,)),
    (suite.test_displace_reads_any_strides, (RADEMACHER,)),
    (suite.test_displaced_vectors_are_those_of_displace, (BF16, GAUSSIAN)),
    (suite.test_non_finite_weights_stay_non_finite, ()),
    (suite.test_update_rademacher_is_exact, (BF16, "stochastic")),
    (suite.test_update_rademacher_is_exact, (F16, "stochastic")),
    (suite.test_update_rademacher_is_exact, (F32, "nearest")),
    (suite.test_update_of_many_seeds_is_the_separate_updates, (BF16, "stochastic", GAUSSIAN)),
    (suite.test_update_gaussian, (F16,)),
    (suite.test_update_leaves_out_idle_terms, (BF16,)),
    (suite.test_update_of_any_layout, ()),
    (suite.test_project, (F32, GAUSSIAN)),
    (suite.test_project, (BF16, RADEMACHER)),
    (suite.test_project, (F16, GAUSSIAN)),
    (suite.test_linear, (F32, False, GAUSSIAN)),
    (suite.test_linear, (BF16, False, GAUSSIAN)),
    (suite.test_linear, (F16, False, RADEMACHER)),
    (suite.test_linear, (BF16, True, GAUSSIAN)),
    (suite.test_linear_of_whole_groups, (F32, True, RADEMACHER)),
    (suite.test_linear_of_whole_groups, (BF16, False, GAUSSIAN)),
    (suite.test_linear_of_whole_groups, (BF16, True, GAUSSIAN)),
    (suite.test_linear_of_whole_groups, (F16, True, RADEMACHER)),
    (suite.test_linear_takes_a_float32_bias, (BF16,)),
    (suite.test_update_linear_is_its_update_and_its_product, (F32, GAUSSIAN)),
    (suite.test_update_linear_is_its_update_and_its_product, (BF16, GAUSSIAN)),
    (suite.test_update_linear_is_its_update_and_its_product, (F16, RADEMACHER)),
    (suite.test_embedding_is_rows_of_the_displaced_table, (BF16, GAUSSIAN)),
    (suite.test_embedding_refuses_an_id_outside, (2**40,)),
    (suite.test_linear_cross_entropy, (F32, RADEMACHER)),
    (suite.test_linear_cross_entropy, (BF16, GAUSSIAN)),
    (suite.test_linear_cross_entropy_of_huge_and_nan_logits, ()),
    (masked.test_displace, (BF16, 17)),
    (masked.test_update, (BF16, True)),
    (masked.test_update, (F16, False)),
    (masked.test_a_replay_is_its_steps_bit_for_bit, (F32, GAUSSIAN)),
    (masked.test_linear, (F32, True, True)),
    (masked.test_linear, (BF16, False, False)),
    (masked.test_embedding, (BF16, False, torch.int64)),
]


def _name(case: Case) -> str:
    test, values = case
    where = "masked-" if test.__module__ == masked.__name__ else ""
    return "-".join([where + test.__name__.removeprefix("test_"), *map(str, values)])


conformance = pytest.mark.parametrize("case", _CASES, ids=map(_name, _CASES))
