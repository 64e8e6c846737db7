"""Attention under vmap in one call, and never by torch's rules for its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

import zokernels as zo
from zokernels.attention import stacked_attention
from zokernels.branches import _Memory
from zokernels.precision import CompositeOps

G, B, H, T, D = 3, 2, 4, 5, 8


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def causal(*lead: int) -> Tensor:
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    padded = torch.ones(*lead, T, T, dtype=torch.bool)
    if lead:
        padded[0, ..., 1] = False
    return (allowed & padded) | torch.eye(T, dtype=torch.bool)


class Calls:
    """torch's attention, and the shapes it was called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not torch._C._functorch.is_batchedtensor(query)
        self.shapes.append(tuple(query.shape))
        return F.scaled_dot_product_attention(query, *args, **kwargs)


# Mask of all branches, mask of each branch, other arguments.
CASES: dict[str, tuple[Tensor | None, Tensor | None, dict[str, Any]]] = {
    "no mask": (None, None, {}),
    "causal": (None, None, {"is_causal": True}),
    "scale": (None, None, {"scale": 0.3}),
    "one mask": (causal(), None, {}),
    "one 4-D mask": (causal(1, 1), None, {}),
    "a mask an example": (causal(B, 1), None, {}),
    "a mask an example and head": (causal(B, H), None, {}),
    "a bias": (rand(1, H, T, T, seed=9), None, {}),
    "a bias a branch": (None, rand(G, T, T, seed=9), {}),
    "a bias a branch and head": (None, rand(G, H, T, T, seed=9), {}),
    "a bias a branch and example": (None, rand(G, B, 1, T, T, seed=9), {}),
    "a bias a branch, all examples": (None, rand(G, 1, 1, T, T, seed=9), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", ["", "query", "key and value"])
def test_it_is_the_attention_of_every_branch(case: str, shared: str) -> None:
    mask, own, options = CASES[case]
    q, k, v = (rand(G, B, H, T, D, seed=i) for i in range(3))
    if shared == "query":
        q = q[0]
    if shared == "key and value":
        k, v = k[0], v[0]
    calls = Calls()

    def body(q: Tensor, k: Tensor, v: Tensor, own: Tensor | None) -> Tensor:
        return stacked_attention(calls, q, k, v, mask if own is None else own, **options)

    every = [0 if t is not None and t.dim() == 5 else None for t in (q, k, v)]
    got = torch.func.vmap(body, in_dims=(*every, None if own is None else 0))(q, k, v, own)
    assert calls.shapes == [(G * B, H, T, D)]
    for g in range(G):
        args = [t[g] if t.dim() == 5 else t for t in (q, k, v)]
        bias = mask if own is None else own[g]
        want = F.scaled_dot_product_attention(*args, attn_mask=bias, **options)
        torch.testing.assert_close(got[g], want, rtol=1e-6, atol=1e-6)


def test_branches_in_any_dimension_and_fewer_heads_of_keys() -> None:
    q, k, v = rand(B, H, G, T, D), rand(B, 2, T, D, G, seed=1), rand(G, B, 2, T, D, seed=2)
    calls = Calls()

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stacked_attention(calls, q, k, v, is_causal=True, enable_gqa=True)

    got = torch.func.vmap(body, in_dims=(2, 4, 0))(q, k, v)
    assert calls.shapes == [(G * B, H, T, D)]
    for g in range(G):
        want = F.scaled_dot_product_attention(
            q[:, :, g], k[..., g], v[g], is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(got[g], want, rtol=1e-6, atol=1e-6)


def test_what_it_leaves_to_torch() -> None:
    given: list[tuple[object, ...]] = []

    def attend(*args: object, **kwargs: object) -> Tensor:
        given.append(args)
        return F.scaled_dot_product_attention(*args, **kwargs)  # type: ignore[arg-type]

    q = rand(B, H, T, D)
    stacked_attention(attend, q, q, q, is_causal=True)  # no vmap
    assert given[-1][0] is q
    many = rand(G, H, T, D)
    seen: list[tuple[int, ...]] = []

    def three(x: Tensor) -> Tensor:
        y = stacked_attention(attend, x, x, x)
        seen.append(tuple(given[-1][0].shape))  # type: ignore[attr-defined]
        return y

    got = torch.func.vmap(three)(many)  # no dimension of examples
    assert seen == [(H, T, D)]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(many, many, many))


class _Attentions(TorchDispatchMode):
    """Batch sizes of the attention kernels below vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.sizes.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_stacked_evaluation_attends_once_a_layer(family: str, padded: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16).eval()
    ids = torch.arange(4 * 7).reshape(4, 7) % 60 + 3
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        batch["attention_mask"][:2, 5:] = 0
    view = zo.branches(model, [1], [[1e-2], [-1e-2]])
    view(lambda: model(**batch).loss)  # compared with one branch at a time
    assert view.stacked
    with _Attentions() as seen:
        view(lambda: model(**batch).loss)
    assert seen.sizes == [2 * 4] * 2


def test_it_is_on_for_every_model_on_cuda() -> None:
    model = torch.nn.Linear(3, 3)
    assert not _Memory(zo.bind(model)).composite
    assert _Memory(zo.bind(torch.nn.Linear(3, 3).bfloat16())).composite
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        model.weight = torch.nn.Parameter(torch.empty(3, 3, device="cuda"))
    binding = zo.bind(torch.nn.Linear(3, 3))
    binding.model.frozen = model.weight
    assert _Memory(binding).composite


def test_dropout_in_attention_is_not_stacked() -> None:
    """Its masks would differ between branches; what is refused runs one branch at a time."""
    q = rand(G, B, H, T, D)

    def body(x: Tensor) -> Tensor:
        with CompositeOps():
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(body, randomness="error")(q)
