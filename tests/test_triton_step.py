"""How many Triton kernels a user waits for at the first step, and that further layers add none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from fake_cuda import Compiled, FakeDevice, Kernels, enter_devices, fake_device, triton_adapters

import zokernels as zo

pytestmark = pytest.mark.filterwarnings("error::zokernels.StackingWarning")

# Published widths, and vocabularies that are multiples of 16 and not.
MODELS: dict[str, tf.PreTrainedConfig] = {
    **{
        f"opt-{hidden}": tf.OPTConfig(
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=4 * hidden,
            num_attention_heads=hidden // 64,
            num_hidden_layers=1,
            use_cache=False,
        )
        for hidden in (768, 2048, 5120)
    },
    **{
        f"llama-{hidden}": tf.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=wide,
            num_attention_heads=hidden // 64,
            num_key_value_heads=3 if hidden == 576 else 8,
            num_hidden_layers=1,
            vocab_size=vocab,
            tie_word_embeddings=hidden < 4096,
            use_cache=False,
        )
        for hidden, wide, vocab in ((576, 1536, 49152), (2048, 8192, 128256), (4096, 14336, 128256))
    },
    **{
        f"gpt2-{hidden}": tf.GPT2Config(
            n_embd=hidden, n_head=hidden // 64, n_layer=1, use_cache=False
        )
        for hidden in (768, 1600)
    },
}
FAMILIES = {
    family: [name for name in MODELS if name.startswith(family)]
    for family in ("opt", "llama", "gpt2")
}


@pytest.fixture(scope="module", autouse=True)
def _devices(tmp_path_factory: pytest.TempPathFactory) -> None:
    enter_devices(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    with fake_device(monkeypatch, own_loss=True, compared=False) as made:
        yield made


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> Iterator[Any]:
    with triton_adapters(monkeypatch) as made:
        yield made


def steps(
    device: FakeDevice,
    kernels: Kernels,
    name: str,
    dtype: torch.dtype,
    size: tuple[int, int],
    **options: Any,
) -> None:
    """The first use of a model, which evaluates the branches one by one too, and two more steps."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(MODELS[name], dtype=dtype).eval()
    model = device.model(model)
    ids = device.tensor(torch.empty(size, dtype=torch.int64))
    with device(kernels):
        opt = zo.MeZO(model, lr=1e-3, eps=1e-3, **options)
        for _ in range(3):
            opt.step({"input_ids": ids, "labels": ids})


def counts(compiled: Compiled) -> dict[str, int]:
    return dict(Counter({name: len(keys) for name, keys in compiled.items()}))


# Of a step with few tokens: products in the tiles of two branches and of one, and the loss's.
FEW = {
    "displace_kernel": 1,  # rows that are looked up
    "vectors_kernel": 1,
    "linear_kernel": 4,
    "reduce_kernel": 1,
    "join_kernel": 1,
    "update_kernel": 1,
}
MANY = {
    "displace_kernel": 2,
    "vectors_kernel": 1,
    "logits_kernel": 1,
    "join_kernel": 1,
    "update_kernel": 1,
}
FIRST: dict[tuple[str, torch.dtype, tuple[int, int]], dict[str, int]] = {
    ("opt-2048", torch.bfloat16, (1, 32)): FEW,
    ("llama-2048", torch.bfloat16, (1, 32)): FEW,
    # Position embeddings are formed whole; one tile size for weights stored [in, out].
    ("gpt2-768", torch.bfloat16, (1, 32)): FEW
    | {"displace_kernel": 2, "conv1d_kernel": 1, "linear_kernel": 2},
    ("opt-768", torch.bfloat16, (16, 64)): MANY,
    **{(name, torch.float32, (1, 32)): MANY for name in ("opt-2048", "llama-576", "gpt2-768")},
}


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_kernels_of_the_first_step(device: FakeDevice, triton: Any, case: Any) -> None:
    kernels, compiled = triton
    steps(device, kernels, *case)
    assert counts(compiled) == FIRST[case]


# Over all widths and batches, in both dtypes, with and without fused updates.
ALL = {
    "displace_kernel": 4,  # looked up or not, two dtypes
    "vectors_kernel": 2,
    "update_kernel": 2,
    "join_kernel": 1,
    "logits_kernel": 1,
}
PRODUCTS = {"opt": [5, 0, 1], "llama": [5, 0, 1], "gpt2": [2, 1, 1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_further_widths_and_batches_add_few(device: FakeDevice, triton: Any, family: str) -> None:
    kernels, compiled = triton
    first, *others = FAMILIES[family]
    for name in others:
        steps(device, kernels, name, torch.bfloat16, (2, 31))
    for size in ((1, 32), (1, 33), (16, 255)):
        steps(device, kernels, first, torch.bfloat16, size)
        steps(device, kernels, first, torch.bfloat16, size, fuse_update=True)
    steps(device, kernels, first, torch.float32, (1, 33))
    steps(device, kernels, first, torch.float32, (1, 33), fuse_update=True)
    found = counts(compiled)
    # Products of weights stored [out, in] and [in, out], and of their parts.
    products = [found.pop(f"{kind}_kernel", 0) for kind in ("linear", "conv1d", "reduce")]
    assert found == ALL
    assert products == PRODUCTS[family]
