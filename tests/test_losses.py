"""The language-model loss without logits against transformers' own."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import model_zoo as mz
import pytest
import torch
import torch.nn.functional as F

import zokernels as zo

CAUSAL = ["opt", "opt_untied", "gpt2", "llama", "qwen3", "phi3", "mixtral", "qwen3_moe", "mamba"]
# Relative. float32: the order of sums; bfloat16: transformers rounds each logit, as the chunks do.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CAUSAL, "opt_lora", "llama_lora"])
def test_equals_the_models_own_loss_plain_and_at_branches(name: str, dtype: torch.dtype) -> None:
    model, batch = mz.build(name, dtype), mz.lm_batch()
    with torch.no_grad():
        own, fused = model(**batch).loss, zo.causal_lm_loss(model, batch)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, own.float(), rtol=TOLERANCE[dtype], atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        probes = zo.dual_loss(model, batch, seed=4, eps=1e-2)
        fused_probes = zo.dual_loss(
            model, batch, seed=4, eps=1e-2, loss_fn=zo.causal_lm_loss, sequential=False
        )
    assert probes[0] != probes[1]
    for own, fused in zip(probes, fused_probes, strict=True):
        torch.testing.assert_close(fused, own.float(), rtol=TOLERANCE[dtype], atol=0)


def test_fixed_head_under_moving_layers() -> None:
    model, batch = mz.build("opt_untied"), mz.lm_batch()
    model.lm_head.requires_grad_(False)
    ours = zo.dual_loss(model, batch, seed=1, eps=1e-2, loss_fn=zo.causal_lm_loss)
    own = zo.dual_loss(model, batch, seed=1, eps=1e-2)
    torch.testing.assert_close(ours, own, rtol=2e-6, atol=0)


def test_bias_ignored_targets_and_autocast() -> None:
    x, w, b = torch.randn(7, 16), torch.randn(33, 16), torch.randn(33)
    y = torch.tensor([3, -100, 32, 0, 7, -100, 5])
    torch.testing.assert_close(zo.linear_cross_entropy(x, w, y, b), F.cross_entropy(x @ w.T + b, y))
    assert zo.linear_cross_entropy(x, w, torch.full_like(y, -100)).isnan()
    with torch.autocast("cpu", torch.bfloat16):
        low = zo.linear_cross_entropy(x, w, y, b)
        expected = F.cross_entropy(F.linear(x, w, b).float(), y)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2", "final_logit_softcapping=30.0"),
        ("t5", "is_encoder_decoder"),
        ("roberta_cls", "linear head"),
    ],
)
def test_refuses_heads_that_are_more_than_a_linear_layer(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zo.causal_lm_loss(mz.build(name), mz.lm_batch())


def test_refuses_a_batch_without_labels_and_targets_outside_the_vocabulary() -> None:
    model, batch = mz.build("opt"), mz.lm_batch()
    with pytest.raises(ValueError, match="batch must have labels"):
        zo.causal_lm_loss(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(IndexError, match="targets must be in"):
        zo.linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 5]))


def test_a_models_own_loss_goes_without_logits_once_both_agreed() -> None:
    model, batch = mz.build("opt"), mz.lm_batch()
    ops = [call.op for call in zo.explain(model, batch).calls]
    assert ops.count("linear_cross_entropy") == 1
    hooked = mz.build("opt")
    hooked.register_forward_hook(lambda module, args, output: None)
    assert "linear_cross_entropy" not in [c.op for c in zo.explain(hooked, batch).calls]


def test_a_loss_of_ones_own_is_kept() -> None:
    class Doubled(type(mz.build("opt"))):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.loss = 2 * output.loss
            return output

    model, batch = mz.build("opt"), mz.lm_batch()
    plain = zo.dual_loss(model, batch, seed=3, eps=1e-2)
    model.__class__ = Doubled
    doubled = zo.dual_loss(model, batch, seed=3, eps=1e-2)
    torch.testing.assert_close(torch.stack(doubled), 2 * torch.stack(plain), rtol=1e-5, atol=0)


class _Scaled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _own_head(model: Any) -> None:
    head = _Scaled(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def _twice(module: object, args: object, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return 2 * output
    output.loss = 2 * output.loss
    return output


CHANGES = {
    "loss function": lambda m: setattr(
        m, "loss_function", lambda logits, labels, vocab_size, **_: logits.float().square().mean()
    ),
    "hook of the head": lambda m: m.lm_head.register_forward_hook(_twice),
    "head": _own_head,
    "hook under adapters": lambda m: m.get_base_model().register_forward_hook(_twice),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_loss_that_changes_later_is_seen(change: str) -> None:
    model = mz.build("llama_lora" if "adapters" in change else "llama")
    batch = mz.lm_batch()
    before = zo.dual_loss(model, batch, seed=3, eps=1e-3)
    CHANGES[change](model)
    after = zo.dual_loss(model, batch, seed=3, eps=1e-3)
    expected = []
    for eps in (1e-3, -1e-3):
        with zo.displaced(model, [3], [eps]):
            expected.append(model(**batch).loss)
    assert not torch.allclose(torch.stack(before), torch.stack(after), rtol=0.05)
    torch.testing.assert_close(torch.stack(after), torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "convert", [lambda t: t.numpy(), lambda t: t.to("meta")], ids=["numpy", "meta"]
)
def test_labels_of_another_kind_get_the_models_own_error(
    convert: Callable[[torch.Tensor], Any],
) -> None:
    model, batch = mz.build("llama"), mz.lm_batch()
    batch["labels"] = convert(batch["labels"])
    with pytest.raises(Exception) as own:
        model(**batch)
    with pytest.raises(type(own.value), match=re.escape(str(own.value)[:40])):
        zo.dual_loss(model, batch, seed=1, eps=1e-3)


def test_the_comparison_leaves_the_random_state_alone() -> None:
    model, batch = mz.build("opt").train(), mz.lm_batch()
    before = torch.get_rng_state()
    from zokernels.losses import loss_of

    loss_of(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
