"""Adapters on a base that bitsandbytes quantised (QLoRA): it stays as it is, and branches stack."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import zokernels as zo

PAIR = [[1e-2], [-1e-2]]
CONFIGURATIONS = {
    "4 bits": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(params=CONFIGURATIONS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    # bitsandbytes' products on a CPU want multiples of 64.
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=CONFIGURATIONS[request.param],
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    kinds = {p.dtype for p in base.parameters()}
    assert (torch.uint8 if request.param == "4 bits" else torch.int8) in kinds
    base = prepare_model_for_kbit_training(base)  # checkpointing, hooks on the embeddings
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, adapters).eval()
    with torch.no_grad():
        model(**batch())  # bitsandbytes packs its weights for this CPU
    return model


def batch() -> dict[str, Any]:
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_adapters_on_a_quantised_base(model: Any) -> None:
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = zo.MeZO(model, lr=0.5, eps=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        losses = [float(opt.step(batch())) for _ in range(6)]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if "lora_" in n}
    assert opt.skipped == 0 and len(set(losses)) == 6


def test_stacked_is_one_by_one(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    losses = [
        zo.branches(model, [1], PAIR, sequential=sequential)(lambda: model(**batch()).loss)
        for sequential in (False, True)
    ]
    torch.testing.assert_close(*losses, atol=5e-3, rtol=0)
    assert abs(losses[0][0] - losses[0][1]) > 0
