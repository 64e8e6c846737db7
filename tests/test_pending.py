"""Updates that wait for the next evaluation: the same run, bit for bit, and never seen undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cuda_emulated
import model_zoo as mz
import pytest
import torch
from torch import Tensor, nn

import zokernels as zo
from zokernels import _registry, deferred, graphs
from zokernels.lazy import State

BACKENDS = ["cpp", "reference", "cuda_emulated"]
if _registry.backends()["triton"].serves("cpu"):  # in its interpreter
    BACKENDS.append("triton")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend's kernels on the CPU."""
    kernels = cuda_emulated.native().kernels()
    backend = _registry.Backend("cuda_emulated", ("cpu",), kernels)
    monkeypatch.setitem(_registry.backends(), backend.name, backend)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters that products updated."""
    taken: list[str] = []
    made = State.made

    def counting(self: State, name: str) -> None:
        taken.append(name)
        made(self, name)

    monkeypatch.setattr(State, "made", counting)
    return taken


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def run(
    kind: str, dtype: torch.dtype, fuse: bool, steps: int = 3, **options: Any
) -> tuple[list[float], list[Tensor], list[str]]:
    model, batch = mz.build(kind, dtype).eval(), mz.lm_batch()
    journal = zo.Trajectory()
    options = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, **options}
    opt = zo.MeZO(model, journal=journal, fuse_update=fuse, **options)
    losses = [float(opt.step(batch)) for _ in range(steps)]
    opt.flush()
    return losses, weights(model), [repr(s) for s in journal]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_run(emulated: None, backend: str, kind: str, dtype: torch.dtype) -> None:
    with _registry.use_backend(backend):
        losses, at_once, journal = run(kind, dtype, False)
        same_losses, later, same_journal = run(kind, dtype, True)
    assert same_losses == losses
    assert same_journal == journal
    assert equal(at_once, later)


@pytest.mark.parametrize(
    "options",
    [
        {"distribution": "rademacher", "rounding": "nearest"},
        {"num_directions": 2},
        {"momentum": 0.5},
        {"max_branches": 1},
        {"sequential": True},
        {"estimator": "forward"},
        {"weight_decay": 0.0, "clip": 0.5},
    ],
    ids=str,
)
def test_the_same_run_with_options(fused: list[str], options: dict[str, Any]) -> None:
    losses, at_once, _ = run("opt", torch.bfloat16, False, **options)
    same_losses, later, _ = run("opt", torch.bfloat16, True, **options)
    assert same_losses == losses
    assert equal(at_once, later)


def test_products_make_the_update(fused: list[str]) -> None:
    """From the second step on: the first evaluation learns which parameters a product reads."""
    model, batch = mz.build("opt", torch.bfloat16).eval(), mz.lm_batch()
    opt = zo.MeZO(model, lr=1e-2, eps=1e-2, fuse_update=True)
    opt.step(batch)
    opt.step(batch)
    fused.clear()
    opt.step(batch)
    products = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name  # tied to the embedding
    }
    assert set(fused) == products
    assert len(fused) == len(products) == 12


def test_backends_that_cannot_fuse_make_it_first(
    fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, at_once, _ = run("opt", torch.float32, False)
    monkeypatch.delitem(_registry.backends()["cpp"].kernels, "update_linear_")
    same_losses, later, _ = run("opt", torch.float32, True)
    assert fused == []
    assert same_losses == losses
    assert equal(at_once, later)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of parameters of the updates that no product made."""
    found: list[int] = []
    kernels = _registry.backends()["cpp"].kernels
    update = kernels["update_"]

    def counting(params: list[Tensor], *rest: Any) -> object:
        found.append(len(params))
        return update(params, *rest)

    monkeypatch.setitem(kernels, "update_", counting)
    monkeypatch.setattr(_registry, "_table", {})
    return found


def test_what_no_product_takes_along_is_one_update(
    fused: list[str], launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, at_once, _ = run("opt", torch.bfloat16, False)
    each = sorted(set(launches))
    launches.clear()
    monkeypatch.setattr(_registry.backends()["cpp"], "takes_update", lambda *product: False)
    same_losses, later, _ = run("opt", torch.bfloat16, True)
    assert fused == [] and same_losses == losses and equal(at_once, later)
    assert len(launches) == 3 and sorted(set(launches)) == each  # a step


def test_products_that_grow_or_shrink_from_step_to_step(
    fused: list[str], launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation says what to expect of this one; where it errs the bits are the same."""

    def few(x: Tensor, w: Tensor, coeffs: Tensor, shared: bool, distribution: str) -> bool:
        return (x.shape[:-1] if shared else x.shape[1:-1]).numel() <= 15

    monkeypatch.setattr(_registry.backends()["cpp"], "takes_update", few)
    batch = mz.lm_batch()
    short = {name: t[:, :5] for name, t in batch.items()}
    found = {}
    for fuse in (False, True):
        launches.clear()
        model = mz.build("opt", torch.bfloat16).eval()
        opt = zo.MeZO(model, lr=1e-2, eps=1e-2, fuse_update=fuse)
        taken, made = [], []
        for some in (short, short, short, batch, batch, short, short):
            before = len(fused), len(launches)
            opt.step(some)
            taken.append(len(fused) - before[0])
            made.append(len(launches) - before[1])
        opt.flush()
        found[fuse] = weights(model)
    assert equal(found[False], found[True])
    #                first, learns, fused; too long; known; too short; fused
    assert taken == [0, 0, 12, 0, 0, 0, 12]
    assert made == [0, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64, 65])
@pytest.mark.parametrize("branches", [2, 4])
def test_the_cuda_backend_says_what_it_takes(
    dtype: torch.dtype, tokens: int, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = cuda_emulated.native()
    made: list[object] = []
    monkeypatch.setattr(native, "update_", lambda *args: made.append(args))
    x, w = torch.ones(branches, tokens, 64, dtype=dtype), torch.ones(8, 64, dtype=dtype)
    coeffs = torch.full((branches, 1), 1e-3)
    term = (torch.tensor([3]), torch.tensor([1e-3]), None, "nearest")
    place = (7, 0, 0, "gaussian", False)
    native.update_linear_(x, w, None, torch.tensor([1]), coeffs, *term, *place)
    assert native.takes_update(x, w, coeffs, False, "gaussian") == (not made)


# --- what must not see weights without their update -----------------------------------------------


@pytest.fixture
def waiting(fused: list[str]) -> tuple[nn.Module, zo.MeZO, list[Tensor], dict[str, Tensor]]:
    """A model with an update pending, and what its weights are with it."""
    _, want, _ = run("opt", torch.float32, False, steps=2)
    model, batch = mz.build("opt").eval(), mz.lm_batch()
    opt = zo.MeZO(model, lr=1e-2, eps=1e-2, weight_decay=0.1, fuse_update=True)
    for _ in range(2):
        opt.step(batch)
    assert not equal(weights(model), want)
    return model, opt, want, batch


def settled(model: nn.Module, want: list[Tensor]) -> bool:
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    hooks += len(model._state_dict_pre_hooks)
    hooks += len(model._load_state_dict_pre_hooks)
    return equal(weights(model), want) and hooks == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda model, opt, batch: opt.flush(),
        lambda model, opt, batch: model(**batch),
        lambda model, opt, batch: model.generate(batch["input_ids"], max_new_tokens=1),
        lambda model, opt, batch: model.state_dict(),
        lambda model, opt, batch: opt.state_dict(),
        lambda model, opt, batch: opt.load_state_dict(zo.MeZO(model).state_dict()),
        lambda model, opt, batch: pickle.dumps(opt.__getstate__()["seed"]),
        lambda model, opt, batch: zo.dual_loss(model, batch, seed=1, eps=1e-3),
        lambda model, opt, batch: zo.dual_loss(
            model, batch, seed=1, eps=1e-3, params=["model.decoder.layers.0.fc1.weight"]
        ),
        lambda model, opt, batch: zo.bind(model).snapshot(),
        lambda model, opt, batch: zo.causal_lm_loss(model, batch),
        lambda model, opt, batch: zo.Displacement([3], [0.0]).apply_(model),
    ],
    ids=range(12),
)
def test_whatever_uses_the_model_makes_it(
    waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any],
    use: Callable[[nn.Module, zo.MeZO, Any], object],
) -> None:
    model, opt, want, batch = waiting
    with torch.no_grad():
        use(model, opt, batch)
    assert settled(model, want)


def test_a_saved_model_has_it(waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any]) -> None:
    model, _, want, _ = waiting
    saved = model.state_dict()
    assert equal([saved[n] for n, _ in model.named_parameters()], want)


def test_a_copy_of_the_model_is_refused(
    waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any],
) -> None:
    model, opt, want, batch = waiting
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"pending: call flush\(\) of its optimizer"):
            attempt(model)
    opt.flush()
    assert settled(copy.deepcopy(model), want)
    assert pickle.loads(pickle.dumps(model)).__dict__["_zokernels_binding"] is None
    opt.step(batch)


def test_a_capture_is_refused(waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any]) -> None:
    model, opt, want, batch = waiting

    def losses(coeffs: Tensor) -> Tensor:
        view = zo.branches(model, torch.tensor([1]), coeffs)
        found: Tensor = view(lambda: model(**batch).loss)
        return found

    table = torch.tensor([[1e-3], [-1e-3]])
    with pytest.raises(RuntimeError, match=r"call flush\(\) of its optimizer"):
        zo.capture(losses, table)
    assert not settled(model, want)
    opt.flush()
    assert settled(model, want)
    zo.capture(losses, table)


def test_an_error_in_an_evaluation_loses_nothing(
    waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any],
) -> None:
    model, opt, want, batch = waiting

    def fails(model: nn.Module, batch: Any) -> Tensor:
        model.model.decoder.layers[0](torch.zeros(1, 2, 32))  # some weights are updated here
        raise ArithmeticError("of the loss")

    with pytest.raises(ArithmeticError, match="of the loss"):
        opt.step(batch, fails)
    assert settled(model, want)
    assert opt.num_steps == 2


def test_an_error_in_a_product_loses_nothing(
    waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt, want, batch = waiting
    kernels, calls = _registry.backends()["cpp"].kernels, []

    def fails(*args: object) -> object:
        calls.append(args)
        raise torch.OutOfMemoryError("of the device")

    with monkeypatch.context() as patched:
        patched.setitem(kernels, "update_linear_", fails)
        patched.setattr(_registry, "_table", {})
        with pytest.raises(torch.OutOfMemoryError):
            opt.step(batch)
    assert calls
    assert settled(model, want)


def test_other_selections_and_optimizers(fused: list[str]) -> None:
    def go(fuse: bool) -> tuple[list[float], list[Tensor]]:
        model, batch = mz.build("opt").eval(), mz.lm_batch()
        layers = [dict(model.model.decoder.layers[i].named_parameters()) for i in range(2)]
        opts = [
            zo.MeZO(list(part.values()), model=model, lr=1e-2, eps=1e-2, fuse_update=fuse)
            for part in layers
        ]
        losses = []
        for step in range(6):
            losses.append(float(opts[step % 2].step(batch)))
            if step == 3:
                next(iter(layers[0].values())).requires_grad_(False)
        for opt in opts:
            opt.flush()
        return losses, weights(model)

    (losses, at_once), (same, later) = go(False), go(True)
    assert same == losses
    assert equal(at_once, later)


def test_resume_from_a_checkpoint(fused: list[str]) -> None:
    _, want, _ = run("opt", torch.bfloat16, False, steps=4)
    model, batch = mz.build("opt", torch.bfloat16).eval(), mz.lm_batch()
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "fuse_update": True}
    opt = zo.MeZO(model, **options)
    for _ in range(2):
        opt.step(batch)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    other = mz.build("opt", torch.bfloat16, seed=5).eval()
    again = zo.MeZO(other, **options)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for _ in range(2):
        again.step(batch)
    again.flush()
    assert equal(weights(other), want)


def test_a_weight_loaded_over_a_pending_update_counts(
    waiting: tuple[nn.Module, zo.MeZO, list[Tensor], Any],
) -> None:
    model, opt, _, _ = waiting
    fresh = mz.build("opt", seed=9).state_dict()
    model.load_state_dict(fresh)
    opt.flush()
    assert equal([model.state_dict()[n] for n in fresh], list(fresh.values()))


def test_bad_argument() -> None:
    with pytest.raises(TypeError, match="fuse_update must be True or False; got 1"):
        zo.MeZO(nn.Linear(2, 2), fuse_update=1)  # type: ignore[arg-type]


# --- on the device --------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay on the (CPU) device; a graph is the same work again."""

    def replayed(
        work: Callable[[], Tensor], warm_up: Callable[[], None]
    ) -> tuple[Callable[[], None], Tensor]:
        warm_up()
        output = torch.empty(2)

        def replay() -> None:
            output.copy_(work())

        return replay, output

    monkeypatch.setattr(zo.MeZO, "_stays_on_device", lambda self: True)
    monkeypatch.setattr(deferred.Fetch, "ready", property(lambda self: False))
    monkeypatch.setattr(graphs, "record", replayed)


@pytest.mark.parametrize("graphed", [False, True])
def test_steps_on_the_device(on_device: None, fused: list[str], graphed: bool) -> None:
    def go(fuse: bool, graphed: bool) -> tuple[list[float], list[Tensor]]:
        model, batch = mz.build("opt", torch.bfloat16).eval(), mz.lm_batch()
        batch.pop("attention_mask", None)
        opt = zo.MeZO(model, lr=1e-2, eps=1e-2, fuse_update=fuse)
        step = graphs.GraphedStep(opt, batch) if graphed else None
        losses = []
        for i in range(6):
            if step is None or i == 2:  # both can be mixed
                losses.append(float(opt.step(batch)))
            else:
                losses.append(float(step(batch)))
            if i == 3:  # an evaluation between two steps
                with torch.no_grad():
                    losses.append(float(model(**batch).loss))
        opt.flush()
        return losses, weights(model)

    losses, at_once = go(False, False)
    same, later = go(True, graphed)
    assert same == losses
    assert equal(at_once, later)
    assert fused
