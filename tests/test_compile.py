"""The ops under ``torch.compile``: one graph, no break, one compilation for all seeds.

Seeds and coefficients are tensors in every schema for this reason: a Python integer would be a
constant of the graph and recompile it at every step. (Whole models go through ``zo.capture``, which
has tests of its own.)
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zokernels as zo
from zokernels import noise

ops = torch.ops.zokernels
ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VOCAB, HIDDEN, BRANCHES = 17, 12, 2
IDS = [noise.parameter_id(n) for n in ("embed", "norm", "up", "down")]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def weights() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(VOCAB, HIDDEN), (HIDDEN,), (20, HIDDEN), (HIDDEN, 20)]
    return [torch.randn(s, generator=g) * 0.3 for s in shapes]


def losses(params: list[Tensor], ids: Tensor, seeds: Tensor, coeffs: Tensor) -> Tensor:
    """A small network of ops: lookup, norm, two products, the fused loss. ``[G]``."""
    embed, norm, up, down = params
    rest = (0, 0, "gaussian")
    x = ops.embedding(ids, embed, seeds, coeffs, IDS[0], *rest, True)
    scale = ops.displace(norm[None], seeds, coeffs, IDS[1], *rest, "nearest", None)
    x = F.layer_norm(x, (HIDDEN,)) * scale
    h = ops.linear(x, up, None, seeds, coeffs, IDS[2], *rest, False, False)
    x = x + ops.linear(F.gelu(h), down, None, seeds, coeffs, IDS[3], *rest, False, False)
    return ops.linear_cross_entropy(
        x[:, :-1], embed, None, ids[1:], seeds, coeffs, IDS[0], *rest, False, -100
    )


def step(params: list[Tensor], ids: Tensor, seed: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
    """One MeZO step with nothing read back: the projected gradient stays a tensor."""
    seeds = seed[None]
    both = losses(params, ids, seeds, torch.stack([eps, -eps])[:, None])
    g = (both[0] - both[1]) / (2 * eps)
    coeffs = (-lr * g)[None]
    ops.update_(params, seeds, coeffs, None, None, IDS, [], [], "gaussian", "nearest")
    back = ops.project(params, seeds, IDS, [], [], "gaussian")
    return torch.cat([both, g[None], back, ops.sample(2, 3, seed, IDS[0], 0, 0, "gaussian")[0]])


SEEDS = [3, -1, 2**40, -(2**63), 0]


def arguments(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.arange(9) * 5 % VOCAB
    return ids, torch.tensor(seed), torch.tensor(1e-2), torch.tensor(1e-2)


def run(fn: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
    params = weights()
    with torch.no_grad():
        out = [fn(params, *arguments(seed)) for seed in SEEDS]
    return torch.stack(out), params


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_step_is_one_graph_for_all_seeds(compiler):
    want, end = run(step)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got, params = run(compiled)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # Same kernels on the same values; Inductor may contract or reorder what lies between them.
    exact = compiler == "eager"
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4)
    for a, b, before in zip(params, end, weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)
        assert not torch.equal(a, before)
    assert len({tuple(row.tolist()) for row in got}) == len(SEEDS), "a seed was baked in"


def test_no_recompilation_for_a_new_learning_rate_or_eps():
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for eps in (1e-3, 1e-2, 0.5):
            ids, seed, _, lr = arguments(1)
            compiled(weights(), ids, seed, torch.tensor(eps), lr * eps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dynamic_lengths_compile_once():
    """Shapes of the batch may be symbolic in every op."""
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=True)
    seeds, coeffs = torch.tensor([5]), torch.tensor([[0.1], [-0.1]])
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 8, 13):
            ids = torch.arange(length) % VOCAB
            want = losses(weights(), ids, seeds, coeffs)
            got = compiled(weights(), ids, seeds, coeffs)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_update_under_inductor_touches_nothing_else():
    """In-place ops are functionalised and written back: to the parameter, once."""
    params = weights()
    pointers = [p.data_ptr() for p in params]

    def fn(params: list[Tensor], seeds: Tensor, coeffs: Tensor) -> Tensor:
        ops.update_(params, seeds, coeffs, None, None, IDS, [], [], "rademacher", "nearest")
        return params[0].sum()

    seeds, coeffs = torch.tensor([1, 2]), torch.tensor([0.5, -0.25])
    want = weights()
    fn(want, seeds, coeffs)
    with torch.no_grad():
        torch.compile(fn, fullgraph=True)(params, seeds, coeffs)
    assert [p.data_ptr() for p in params] == pointers
    assert all(torch.equal(a, b) for a, b in zip(params, want, strict=True))


def test_displace_into_scratch_under_inductor():
    scratch = torch.zeros(2, VOCAB, HIDDEN)
    w = weights()[0]
    seeds, coeffs = torch.tensor([1]), torch.tensor([[0.5], [-0.25]])

    def fn(out: Tensor, w: Tensor) -> Tensor:
        ops.displace_(out, w, seeds, coeffs, IDS[0], 0, 0, "rademacher", "nearest")
        return out.sum()

    with torch.no_grad():
        total = torch.compile(fn, fullgraph=True)(scratch, w)
    want = ops.displace(w, seeds, coeffs, IDS[0], 0, 0, "rademacher", "nearest", None)
    assert torch.equal(scratch, want)
    torch.testing.assert_close(total, want.sum(), rtol=1e-5, atol=1e-4)


def test_a_bad_argument_fails_while_tracing():
    def fn(x: Tensor, w: Tensor, seeds: Tensor, coeffs: Tensor) -> Tensor:
        return ops.linear(x, w, None, seeds, coeffs, 0, 0, 0, "gaussian", False, False)

    compiled = torch.compile(fn, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="x must end in a dimension of 12"):
        compiled(torch.zeros(2, 5, 11), weights()[2], torch.tensor([1]), torch.zeros(2, 1))


def test_a_compiled_model_is_evaluated_as_the_model_itself():
    """``torch.compile(model)`` and ``model.compile()``: same parameters, names and losses."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
    x = torch.randn(5, 6)

    def fn(m: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        return m(b).square().mean()

    want = zo.dual_loss(model, x, seed=1, eps=0.1, loss_fn=fn)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    got = zo.dual_loss(compiled, x, seed=1, eps=0.1, loss_fn=lambda _, b: fn(compiled, b))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    model.compile(backend="aot_eager")
    again = zo.dual_loss(model, x, seed=1, eps=0.1, loss_fn=fn)
    torch.testing.assert_close(again, want, rtol=1e-6, atol=1e-7)
    with torch.no_grad():  # the compiled code still reads the real weights
        before = compiled(x)
        model[0].weight.zero_()
        assert not torch.equal(compiled(x), before)


def small() -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return net, (torch.randn(4, 6), torch.tensor([0, 1, 2, 1]))


def cross_entropy(net: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def test_steps_and_evaluations_inside_compiled_functions() -> None:
    plain, batch = small()
    net, _ = small()
    opt, ours = zo.MeZO(plain, lr=0.1), zo.MeZO(net, lr=0.1)

    @torch.compile(backend="eager")
    def train(x: Tensor, y: Tensor) -> Tensor:
        return ours.step((2 * x, y), cross_entropy) + 1

    @torch.compile(backend="eager")
    def probe(x: Tensor, y: Tensor) -> Tensor:
        plus, minus = zo.dual_loss(net, (x, y), seed=3, eps=0.1, loss_fn=cross_entropy)
        return plus - minus

    compiled_step = torch.compile(ours.step, backend="eager")
    for _ in range(3):
        want = opt.step((2 * batch[0], batch[1]), cross_entropy)
        torch.testing.assert_close(train(*batch), want + 1)
        torch.testing.assert_close(
            compiled_step(batch, cross_entropy), opt.step(batch, cross_entropy)
        )
    plus, minus = zo.dual_loss(plain, batch, seed=3, eps=0.1, loss_fn=cross_entropy)
    torch.testing.assert_close(probe(*batch), plus - minus, rtol=1e-4, atol=1e-5)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_refusal_inside_a_compiled_function_leaves_compiled_models_alone() -> None:
    net, batch = small()

    @torch.compile(backend="eager")
    def inside(x: Tensor) -> Tensor:
        with zo.displaced(net, [1], [0.1]):
            return net(x)

    with pytest.raises(RuntimeError, match="compile"):
        inside(batch[0])
    compiled = torch.compile(net, backend="eager")
    want = zo.dual_loss(net, batch, seed=3, eps=0.1, loss_fn=cross_entropy)
    for _ in range(2):
        got = zo.dual_loss(
            net, batch, seed=3, eps=0.1, loss_fn=lambda _, b: cross_entropy(compiled, b)
        )
        torch.testing.assert_close(got, want)
        compiled(batch[0])


def test_the_ops_export():
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, w in zip(("embed", "norm", "up", "down"), weights(), strict=True):
                self.register_buffer(name, w)

        def forward(self, ids: Tensor, seeds: Tensor, coeffs: Tensor) -> Tensor:
            return losses([self.embed, self.norm, self.up, self.down], ids, seeds, coeffs)

    args = (torch.arange(9) % VOCAB, torch.tensor([4]), torch.tensor([[0.1], [-0.1]]))
    program = torch.export.export(Network(), args)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "zokernels.linear_cross_entropy.default" in targets
    for seed in (4, 9):
        args = (args[0], torch.tensor([seed]), args[2])
        torch.testing.assert_close(program.module()(*args), losses(weights(), *args))


def test_importing_starts_no_compiler_and_builds_no_tensor_library():
    """Import stays light: no Dynamo, no Inductor, no transformers."""
    code = (
        "import sys, torch; before = set(sys.modules); import zokernels; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] in ('transformers', 'peft', 'datasets', 'triton')"
        " or m.startswith(('torch._inductor', 'matplotlib'))])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]"
