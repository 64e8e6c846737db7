"""Plans of products and the explanation of an evaluation."""

import model_zoo as mz
import pytest
import torch

import zokernels as zo
from zokernels import cpp
from zokernels.planner import plan_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5000])
@pytest.mark.parametrize(
    ("rows", "cols"), [(768, 768), (3072, 768), (50272, 768), (1, 5), (300, 1)]
)
def test_tiles_cover_the_outputs_in_bounded_scratch(
    rows: int, cols: int, tokens: int, transposed: bool, dtype: torch.dtype
) -> None:
    plan = plan_linear(
        rows, cols, tokens=tokens, dtype=dtype, transposed=transposed, threads=2, branches=2
    )
    outputs = cols if transposed else rows
    assert plan.kind == "tiles"
    assert plan.tiles * plan.tile_outputs >= outputs > (plan.tiles - 1) * plan.tile_outputs
    assert plan.flops == 2 * 2 * tokens * rows * cols
    assert plan.noise == rows * cols * plan.token_blocks
    # The least tile (64 or 256 outputs) of a long row may exceed the target of 8 MiB a thread.
    least = 2 * (rows if transposed else cols) * 4 * (256 if transposed else 64)
    assert plan.scratch_bytes <= 2 * max(8 << 20, least)


@pytest.mark.skipif(cpp.instruction_set() == "portable", reason="no fused kernel is compiled")
def test_few_tokens_are_fused_in_less_than_a_cache() -> None:
    for rows, cols in ((768, 768), (50272, 768), (4096, 14336), (5, 3)):
        plan = plan_linear(rows, cols, tokens=64, threads=2)
        assert plan.kind == "fused"
        assert plan.tiles * plan.tile_outputs >= rows > (plan.tiles - 1) * plan.tile_outputs
        assert (plan.noise, plan.weight_bytes) == (rows * cols, rows * cols * 4)
        assert plan.scratch_bytes <= 2 * (1 << 17)
    assert plan_linear(768, 768, tokens=64, transposed=True).kind == "tiles"


def test_the_reference_forms_a_branch_whole() -> None:
    with zo.use_backend("reference"):
        plan = plan_linear(30, 20, tokens=7, branches=3, terms=2)
    assert (plan.kind, plan.tiles, plan.scratch_bytes) == ("whole", 1, 30 * 20 * 4)
    assert plan.noise == 30 * 20 * 2 * 3
    with pytest.raises(ValueError, match="tokens must be positive; got 0"):
        plan_linear(3, 2, tokens=0)


def test_explanation_accounts_for_every_weight() -> None:
    model, batch = mz.build("opt"), mz.lm_batch()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = zo.explain(model, batch)
    assert found.stacked and found.branches == 2 and not found.formed
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    products = [c for c in found.calls if c.op in ("linear", "linear_cross_entropy")]
    assert len(products) == len(layers)
    # The head's loss has one target less a row.
    rows, tokens = batch["input_ids"].shape[0], batch["input_ids"].numel()
    flops = sum(2 * 2 * tokens * m.weight.numel() for m in layers)
    assert found.flops == flops - 2 * 2 * rows * model.lm_head.weight.numel()
    assert {c.parameter for c in found.calls} == {n for n, _ in model.named_parameters()}
    drawn = sum(c.noise for c in found.calls if c.op != "embedding")
    assert drawn == sum(p.numel() for n, p in model.named_parameters() if "embed_pos" not in n)
    assert str(found).count("\n") == len(found.calls) + 1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_explanation_of_formed_parameters_and_the_fused_loss() -> None:
    vit = zo.explain(mz.build("vit"), mz.image_batch())
    assert any("projection.weight" in name for name in vit.formed)
    assert "formed whole: " in str(vit)
    fused = zo.explain(mz.build("llama"), mz.lm_batch(), loss_fn=zo.causal_lm_loss)
    assert fused.calls[-1].op == "linear_cross_entropy" and fused.calls[-1].plan is None
    with pytest.raises(ValueError, match="num_branches must be at least 1; got 0"):
        zo.explain(mz.build("opt"), mz.lm_batch(), num_branches=0)
