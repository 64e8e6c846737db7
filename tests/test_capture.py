"""A whole step as one graph: no break, no recompilation per seed, the same numbers."""

from collections.abc import Callable

import model_zoo as mz
import pytest
import torch
from torch import Tensor, nn

import zokernels as zo


def _step(model: nn.Module, keys: list[str]) -> Callable[..., Tensor]:
    binding = zo.bind(model)
    tensors = [p.tensor for p in binding.params]
    ids = [p.id for p in binding.params]

    def step(seeds: Tensor, eps: Tensor, lr: Tensor, *values: Tensor) -> Tensor:
        batch = dict(zip(keys, values, strict=True))
        coeffs = torch.stack([eps, -eps])[:, None]
        losses = zo.branches(binding, seeds, coeffs)(lambda: model(**batch).loss)
        g = (losses[0] - losses[1]) / (2 * eps)
        torch.ops.zokernels.update_(
            tensors, seeds, (-lr * g)[None], None, None, ids, [], [], "gaussian", "stochastic"
        )
        return losses

    return step


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        ("opt", "aot_eager", torch.float32),
        ("llama", "aot_eager", torch.bfloat16),
        ("gpt2", "aot_eager", torch.float32),
        ("vit", "aot_eager", torch.float32),
        ("opt", "inductor", torch.float32),
    ],
)
def test_compiled_step_follows_the_eager_one(name: str, backend: str, dtype: torch.dtype) -> None:
    model = mz.build(name, dtype)
    batch = mz.image_batch() if name == "vit" else {**mz.lm_batch()}
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    zo.dual_loss(model, batch, seed=0, eps=1e-2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = _step(model, list(batch))
    fixed = (torch.tensor(1e-2), torch.tensor(1e-3), *batch.values())
    graph = zo.capture(step, torch.tensor([1]), *fixed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    torch._dynamo.reset()
    compiled = torch.compile(graph, fullgraph=True, backend=backend)
    runs = []
    for run in (step, compiled):
        model.load_state_dict(before)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            losses = [run(torch.tensor([seed]), *fixed) for seed in (7, 2**40, -3)]
        runs.append((torch.stack(losses), {k: v.clone() for k, v in model.state_dict().items()}))
    (eager, eager_end), (fast, fast_end) = runs
    assert any(not torch.equal(eager_end[k], before[k]) for k in before)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(fast, eager, rtol=tolerance, atol=0)
    for key, value in eager_end.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                fast_end[key], value, rtol=0, atol=1e-2 * 1e-3 + 0.01 * (dtype != torch.float32)
            )


def test_reads_the_weights_where_they_are() -> None:
    model, batch = mz.build("opt"), mz.lm_batch()
    zo.dual_loss(model, batch, seed=0, eps=1e-2)

    def losses(seeds: Tensor, coeffs: Tensor, ids: Tensor) -> Tensor:
        return zo.branches(model, seeds, coeffs)(lambda: model(input_ids=ids, labels=ids).loss)

    args = (torch.tensor([3]), torch.tensor([[0.01], [-0.01]]), batch["input_ids"])
    graph = zo.capture(losses, *args)
    first = graph(*args)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    assert not torch.equal(graph(*args), first)
    torch.testing.assert_close(graph(*args), losses(*args))
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = [getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    copies = [t for t in held if t.numel() > 64 and t.untyped_storage().data_ptr() not in storages]
    assert not copies


def test_errors_name_the_cause() -> None:
    model, batch = mz.build("opt"), mz.lm_batch()

    def losses(seeds: Tensor) -> Tensor:
        coeffs = torch.tensor([[0.01], [-0.01]])
        return zo.branches(model, seeds, coeffs)(lambda: model(**batch).loss)

    with pytest.raises(RuntimeError, match="evaluate it once before"):
        zo.capture(losses, torch.tensor([1]))
    with pytest.raises(TypeError, match=r"example\[0\] must be a tensor; got int"):
        zo.capture(losses, 1)  # type: ignore[arg-type]
    assert not torch.compiler.is_compiling()
    lstm, tokens = mz.build("lstm"), mz.plain_token_batch()
    with pytest.warns(zo.StackingWarning, match="one after another"):
        zo.dual_loss(lstm, tokens, seed=0, eps=1e-2, loss_fn=mz.plain_loss)

    def recurrent(seeds: Tensor) -> Tensor:
        return zo.branches(lstm, seeds, [[0.1], [-0.1]])(lambda: mz.plain_loss(lstm, tokens))

    with pytest.raises(RuntimeError, match=r"cannot be captured: .*lstm"):
        zo.capture(recurrent, torch.tensor([1]))


def test_refuses_parameters_that_would_be_copied_into_the_graph() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 6, 6)

    def fn(seeds: Tensor) -> Tensor:
        return zo.branches(model, seeds, [[0.1], [-0.1]])(lambda: model(images).mean())

    fn(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="'weight' has no matrix view; make it contiguous"):
        zo.capture(fn, torch.tensor([1]))
