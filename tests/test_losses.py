"""The language-model loss without logits against transformers' own."""

import warnings

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


def test_the_comparison_leaves_the_random_state_alone() -> None:
    model, batch = mz.build("opt").train(), mz.lm_batch()
    before = torch.get_rng_state()
    from zokernels.losses import loss_of

    loss_of(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
