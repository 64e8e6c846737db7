"""Training under a mask: the optimizer, journals, resume, and the trained subset's own verbs."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import textwrap

import model_zoo as zoo
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zokernels as zo
from zokernels import noise
from zokernels.trajectory_format import ModelMismatchError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPT = {"lr": 2e-2, "eps": 1e-2, "seed": 3}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 5)).to(dtype)


def half_of(model: nn.Module) -> zo.Mask:
    return zo.Mask.random(model, 0.5, seed=2, params=lambda n, p: True)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(16, 6, generator=generator).to(dtype),
        torch.randn(16, 5, generator=generator).to(dtype),
    )


def mse(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]).float(), data[1].float())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


# --- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_masked_elements_move_and_the_loss_falls(dtype: torch.dtype) -> None:
    model = net(dtype)
    mask = half_of(model)
    start = weights(model)
    opt = zo.MeZO(model, mask=mask, num_directions=8, **OPT)
    losses = [float(opt.step(batch(dtype), mse)) for _ in range(60)]
    assert sum(losses[-5:]) / 5 < 0.9 * sum(losses[:5]) / 5
    for name, p in model.named_parameters():
        changed = (p != start[name]).view(-1)
        still = torch.ones(p.numel(), dtype=torch.bool)
        still[mask.indices[name]] = False
        assert not changed[still].any(), name
        assert changed[~still].float().mean() > 0.9, name


def test_a_step_is_the_formula() -> None:
    model = net()
    mask = half_of(model)
    start = weights(model)
    opt = zo.MeZO(model, mask=mask, weight_decay=0.1, **OPT)
    z = zo.directions(model, seed=noise.derive_seed(3, 0), mask=mask)
    opt.step(batch(), mse)
    ((g,),) = opt.projected_gradients
    for name, p in model.named_parameters():
        moves = z[name] != 0
        want = start[name] * (1 - 2e-2 * 0.1) - 2e-2 * g * z[name]
        torch.testing.assert_close(p[moves], want[moves], rtol=1e-5, atol=1e-6)
        assert torch.equal(p[~moves], start[name][~moves])


def test_the_optimizer_shares_its_shadow_with_the_model() -> None:
    """Masked values of a bfloat16 model are one thing, whoever evaluates or updates them."""
    model = net(torch.bfloat16)
    mask = half_of(model)
    opt = zo.MeZO(model, mask=mask, **OPT)
    opt.step(batch(torch.bfloat16), mse)
    binding = zo.bind(model, mask=mask)
    lag = [p.values() - p.tensor.detach().view(-1)[p.masked.indices] for p in binding.params]
    assert any(bool((part != 0).any()) for part in lag)
    assert zo.bind(model, mask=half_of(model)) is binding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_far_below_a_units_last_place_add_up(dtype: torch.dtype) -> None:
    model = net(dtype)
    mask = half_of(model)
    start, binding = weights(model), zo.bind(model, mask=mask)
    unit = torch.finfo(dtype).eps
    for _ in range(64):
        binding.apply_([9], [unit / 64], distribution="rademacher")
    moved = torch.cat([p.values() for p in binding.params])
    before = torch.cat([start[p.name].view(-1)[p.masked.indices].float() for p in binding.params])
    torch.testing.assert_close(
        (moved - before).abs(), torch.full_like(moved, unit), rtol=1e-2, atol=1e-5
    )
    for p in binding.params:  # the weights hold the rounding
        assert torch.equal(p.tensor.detach().view(-1)[p.masked.indices], p.values().to(dtype))


def test_closures_groups_momentum_and_schedulers_work_as_without_a_mask() -> None:
    model = net()
    mask = half_of(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.startswith("0")], "lr": 1e-2},
        {"params": [p for n, p in model.named_parameters() if n.startswith("2")], "eps": 1e-3},
    ]
    opt = zo.MeZO(groups, model=model, mask=mask, momentum=0.5, lr=1e-3)
    before = weights(model)
    for _ in range(3):
        opt.step(lambda: mse(model, batch()))
    assert all(bool((p != before[n]).any()) for n, p in model.named_parameters())
    with pytest.raises(
        ValueError, match=r"mask moves parameters that no group lists: \['2.weight'"
    ):
        zo.MeZO(groups[:1], model=model, mask=mask)
    named = zo.MeZO(model.named_parameters(), mask=mask, lr=1e-3)  # without the module: closures
    before = weights(model)
    named.step(lambda: mse(model, batch()))
    assert not equal(before, weights(model))


def test_frozen_parameters_move_when_the_mask_says_so() -> None:
    model = net().requires_grad_(False)
    before = weights(model)
    zo.MeZO(model, mask=half_of(model), **OPT).step(batch(), mse)
    assert not equal(before, weights(model))


def test_a_binding_under_a_mask_is_all_an_optimizer_needs() -> None:
    one, other = net(), net()
    mask = half_of(one)
    a = zo.MeZO(one, mask=mask, **OPT)
    b = zo.MeZO(zo.bind(other, mask=mask), **OPT)
    for _ in range(3):
        assert float(a.step(batch(), mse)) == float(b.step(batch(), mse))
    assert equal(weights(one), weights(other))
    with pytest.raises(ValueError, match="mask must be None when params is a Binding"):
        zo.MeZO(zo.bind(other, mask=mask), mask=mask)


def test_bad_masks_and_bindings() -> None:
    model = net()
    mask = half_of(model)
    with pytest.raises(TypeError, match="mask must be a Mask or None; got dict"):
        zo.MeZO(model, mask={})
    with pytest.raises(TypeError, match="mask must be a Mask or None; got str"):
        zo.bind(model, mask="mask.safetensors")
    with pytest.raises(ValueError, match="params must be None when a mask is given"):
        zo.bind(model, params=["0.weight"], mask=mask)
    with pytest.raises(ValueError, match="mask must be None when a Binding is given"):
        zo.bind(zo.bind(model), mask=mask)
    assert zo.bind(model) is not zo.bind(model, mask=mask)
    assert zo.bind(model).numel == sum(p.numel() for p in model.parameters())
    assert zo.bind(model, mask=mask).numel == mask.nnz


# --- journals and resume --------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_replays_bit_for_bit(dtype: torch.dtype, distribution: str, tmp_path) -> None:
    model, fresh, third = net(dtype), net(dtype), net(dtype)
    mask = half_of(model)
    run = zo.Trajectory()
    opt = zo.MeZO(
        model, mask=mask, journal=run, weight_decay=0.1, momentum=0.9, distribution=distribution,
        **OPT,
    )  # fmt: skip
    for _ in range(7):
        opt.step(batch(dtype), mse)
    run.save(tmp_path / "run.zot")
    loaded = zo.Trajectory.load(tmp_path / "run.zot")
    assert loaded == run
    loaded.replay_(fresh, mask=mask)
    assert equal(weights(model), weights(fresh))
    binding = zo.bind(third, mask=mask)
    loaded.replay_(binding)
    assert equal(weights(model), weights(third))
    for p, q in zip(binding.params, zo.bind(model, mask=mask).params, strict=True):
        assert torch.equal(p.values(), q.values())  # the shadow too
    state = net(dtype).state_dict()
    loaded.replay_(state, mask=mask)
    assert all(torch.equal(state[n], w) for n, w in weights(model).items())


def test_a_sparse_run_cannot_be_taken_for_a_dense_one_or_anothers() -> None:
    model = net()
    mask = half_of(model)
    run, dense = zo.Trajectory(), zo.Trajectory()
    zo.MeZO(model, mask=mask, journal=run, **OPT).step(batch(), mse)
    zo.MeZO(net(), journal=dense, **OPT).step(batch(), mse)
    fresh = net()
    before = weights(fresh)
    other = zo.Mask.random(fresh, 0.5, seed=77, params=lambda n, p: True)
    for trajectory, target in (
        (run, {}),
        (run, {"mask": other}),
        (dense, {"mask": mask}),
    ):
        with pytest.raises(ModelMismatchError, match="under mask"):
            trajectory.replay_(fresh, **target)
    with pytest.raises(ModelMismatchError, match="under mask"):
        run.replay_(zo.bind(fresh, mask=other))
    with pytest.raises(ValueError, match="mask must be None"):
        run.replay_(zo.bind(fresh, mask=mask), mask=mask)
    assert equal(before, weights(fresh))


def test_a_layout_with_a_damaged_mask_entry_is_refused(tmp_path) -> None:
    from zokernels.trajectory_format import CorruptTrajectoryError, as_json, decode_layout

    pid = noise.parameter_id("w")
    for entry in (["w", pid, [2], "float32", ""], ["w", pid, [2], "float32", 3],
                  ["w", pid, [2], "float32", "a", "b"]):  # fmt: skip
        with pytest.raises(CorruptTrajectoryError, match="bad parameter"):
            decode_layout(memoryview(as_json({"groups": [[entry]]}, "layout")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_from_a_journal_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path) -> None:
    whole, mask = net(dtype), half_of(net())
    steps = zo.MeZO(whole, mask=mask, momentum=0.5, **OPT)
    for _ in range(6):
        steps.step(batch(dtype), mse)
    path = tmp_path / "run.zot"
    first = net(dtype)
    with zo.Trajectory.open(path) as journal:
        opt = zo.MeZO(first, mask=mask, momentum=0.5, journal=journal, **OPT)
        for _ in range(3):
            opt.step(batch(dtype), mse)
    second = net(dtype)
    with zo.Trajectory.open(path) as journal:
        opt = zo.MeZO(second, mask=mask, momentum=0.5, journal=journal, **OPT)
        opt.resume()
        assert opt.num_steps == 3
        for _ in range(3):
            opt.step(batch(dtype), mse)
    assert equal(weights(whole), weights(second))


@pytest.mark.parametrize("order", ["weights first", "state first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_from_state_dicts_goes_on_bit_for_bit(dtype: torch.dtype, order: str) -> None:
    """The weights alone have lost what the shadow knows; the optimizer's state has it."""
    model = net(dtype)
    mask = half_of(model)
    opt = zo.MeZO(model, mask=mask, **OPT)
    for _ in range(4):
        opt.step(batch(dtype), mse)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = net(dtype)
    other = zo.MeZO(fresh, mask=mask, **OPT)
    loads = [
        lambda: fresh.load_state_dict(saved["model"]),
        lambda: other.load_state_dict(saved["opt"]),
    ]
    for load in loads if order == "weights first" else reversed(loads):
        load()
    for _ in range(4):
        assert float(opt.step(batch(dtype), mse)) == float(other.step(batch(dtype), mse))
    assert equal(weights(model), weights(fresh))


def test_the_state_of_another_mask_is_refused() -> None:
    model = net(torch.bfloat16)
    mask = half_of(model)
    other = zo.Mask.random(model, 0.1, seed=9)
    state = zo.MeZO(model, mask=mask, **OPT).state_dict()
    for opt in (zo.MeZO(model, mask=other, **OPT), zo.MeZO(model, **OPT)):
        with pytest.raises(ValueError, match=r"under mask|another model|group"):
            opt.load_state_dict(state)
    wide = zo.MeZO(net(), mask=mask, **OPT)
    with pytest.raises(ValueError, match="shadow does not fit the masked parameters"):
        wide.load_state_dict(state)


def test_copies_and_pickles_go_on_alike() -> None:
    model = net(torch.bfloat16)
    opt = zo.MeZO(model, mask=half_of(model), **OPT)
    for _ in range(3):
        opt.step(batch(torch.bfloat16), mse)
    pairs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    opt.step(batch(torch.bfloat16), mse)
    for twin, copied in pairs:
        copied.step(batch(torch.bfloat16), mse)
        assert equal(weights(model), weights(twin))


def test_resume_after_a_kill(tmp_path) -> None:
    """A process killed in the middle of its steps leaves a journal that is a checkpoint."""
    script = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(zoo.__file__).rsplit("/", 1)[0]!r})
        import torch
        torch.set_num_threads(1)
        import zokernels as zo
        from test_sparse_training import OPT, batch, half_of, mse, net
        model = net(torch.bfloat16)
        journal = zo.Trajectory.open({str(tmp_path / "run.zot")!r})
        opt = zo.MeZO(model, mask=half_of(model), journal=journal, **OPT)
        for step in range(100):
            if step == 5:
                os.kill(os.getpid(), 9)
            opt.step(batch(torch.bfloat16), mse)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    model, whole = net(torch.bfloat16), net(torch.bfloat16)
    journal = zo.Trajectory.open(tmp_path / "run.zot", recover=True)
    opt = zo.MeZO(model, mask=half_of(model), journal=journal, **OPT)
    opt.resume()
    assert opt.num_steps == 5
    steps = zo.MeZO(whole, mask=half_of(whole), **OPT)
    for _ in range(5):
        steps.step(batch(torch.bfloat16), mse)
    assert equal(weights(model), weights(whole))


# --- the trained subset ---------------------------------------------------------------------------

SELECTIONS = ["dense", "masked"]


def subset(model: nn.Module, kind: str) -> zo.Binding:
    return zo.bind(model, mask=half_of(model)) if kind == "masked" else zo.bind(model)


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_is_its_terms_one_by_one(dtype: torch.dtype, kind: str) -> None:
    one, many = net(dtype), net(dtype)
    seeds, coeffs, decay = [5, -1, 2**63 - 1], [1e-2, -3e-3, 1e-4], [0.99, 1.0, 0.5]
    subset(one, kind).apply_(seeds, coeffs, decay=decay)
    for s, c, d in zip(seeds, coeffs, decay, strict=True):
        subset(many, kind).apply_([s], [c], decay=[d])
    assert equal(weights(one), weights(many))
    assert not equal(weights(one), weights(net(dtype)))


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_snapshot_puts_back_every_bit(dtype: torch.dtype, kind: str) -> None:
    model = net(dtype)
    with torch.no_grad():
        model[0].weight.view(-1)[:40] = -0.0
    binding = subset(model, kind)
    binding.apply_([1], [1e-3])
    before = weights(model)
    values = [p.values() for p in binding.params]
    kept = binding.snapshot()
    size = sum(v.numel() for v in kept.values.values())
    assert size == binding.numel == (half_of(model).nnz if kind == "masked" else size)
    binding.apply_([2, 3], [0.1, -0.2])
    assert not equal(before, weights(model))
    binding.restore_(kept)
    for name, p in model.named_parameters():
        raw = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(p.detach().view(raw), before[name].view(raw))
    for p, v in zip(binding.params, values, strict=True):
        assert torch.equal(p.values(), v)
    # What comes after is what came after.
    twin = net(dtype)
    with torch.no_grad():
        twin[0].weight.view(-1)[:40] = -0.0
    other = subset(twin, kind)
    other.apply_([1], [1e-3])
    for b in (binding, other):
        b.apply_([7], [1e-3])
    assert equal(weights(model), weights(twin))


def test_snapshots_of_another_subset_are_refused() -> None:
    model = net()
    kept = zo.bind(model).snapshot()
    before = weights(model)
    for other in (zo.bind(model, mask=half_of(model)), zo.bind(net(torch.bfloat16)),
                  zo.bind(model, ["0.weight"])):  # fmt: skip
        with pytest.raises(zo.SnapshotError, match="the snapshot is of the trained subset"):
            other.restore_(kept)
    assert equal(before, weights(model))


def test_fingerprints_are_of_names_shapes_dtypes_and_masks() -> None:
    model = net()
    other = zo.Mask.random(model, 0.5, seed=3, params=lambda n, p: True)
    subsets = [
        zo.bind(model), zo.bind(model, ["0.weight"]), zo.bind(net(torch.bfloat16)),
        zo.bind(model, mask=half_of(model)), zo.bind(model, mask=other),
        zo.bind(nn.Sequential(nn.Linear(6, 41), nn.Tanh(), nn.Linear(41, 5))),
    ]  # fmt: skip
    assert len({s.fingerprint() for s in subsets}) == len(subsets)
    assert zo.bind(net()).fingerprint() == subsets[0].fingerprint()
    assert zo.bind(net(), mask=half_of(net())).fingerprint() == subsets[3].fingerprint()


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_project_is_the_inner_product(kind: str, distribution: str) -> None:
    model = net()
    binding = subset(model, kind)
    mask = half_of(model) if kind == "masked" else None
    vectors = {p.name: torch.randn(p.shape) for p in binding.params}
    seeds = [3, 2**64 - 9, 0]
    got = binding.project(vectors, seeds, distribution=distribution)
    for value, seed in zip(got, seeds, strict=True):
        z = zo.directions(model, seed=seed, mask=mask, distribution=distribution)
        want = sum(float((vectors[n].double() * z[n].double()).sum()) for n in vectors)
        assert math.isclose(float(value), want, rel_tol=1e-5, abs_tol=1e-4)
    assert torch.equal(
        got, binding.project(vectors, torch.tensor([3, -9, 0]), distribution=distribution)
    )
    if mask is not None:
        compact = {n: v.view(-1)[mask.indices[n]] for n, v in vectors.items()}
        assert torch.equal(got, binding.project(compact, seeds, distribution=distribution))
    part = binding.project({"0.weight": vectors["0.weight"]}, seeds[:1], distribution=distribution)
    assert not torch.equal(part, got[:1])
    assert binding.project({}, seeds).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1], [0.1, 0.2]), {}, "coeffs must have 1 entries, one a seed; got 2"),
        (([1], [0.1]), {"decay": []}, "decay must have 1 entries, one a seed; got 0"),
        (([1], [0.1]), {"ends": [True, True]}, "ends must have 1 entries, one a seed; got 2"),
        (([1], [0.1]), {"ends": [False]}, "ends[-1] must be True"),
        (([1], [math.nan]), {}, "coeffs[0] must be finite in float32; got nan"),
        (([1, 2], [0, 1e39]), {}, "coeffs[1] must be finite in float32; got inf"),
        (([1], [0.1]), {"decay": [math.inf]}, "decay[0] must be finite in float32; got inf"),
        (([2**64], [0.1]), {}, "seed must fit in 64 bits"),
        (([1], [0.1]), {"distribution": "cauchy"}, "distribution must be one of"),
        (([1], [0.1]), {"rounding": "up"}, "rounding must be one of"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", SELECTIONS)
def test_bad_updates_change_nothing(kind, arguments, options, message) -> None:
    model = net()
    binding, before = subset(model, kind), weights(model)
    with pytest.raises(ValueError) as caught:
        binding.apply_(*arguments, **options)
    assert message in str(caught.value)
    assert equal(before, weights(model))
    binding.apply_([], [])
    assert equal(before, weights(model))


def test_bad_projections() -> None:
    binding = subset(net(), "masked")
    with pytest.raises(ValueError, match=r"vectors must name parameters that move; unknown: \['x'"):
        binding.project({"x": torch.zeros(3)}, [1])
    with pytest.raises(ValueError, match=r"vectors\['0.bias'\] must have shape \(40,\) or"):
        binding.project({"0.bias": torch.zeros(3)}, [1])
    with pytest.raises(
        ValueError, match=r"vectors\['0.bias'\] must be floating point; got torch.i"
    ):
        binding.project({"0.bias": torch.zeros(40, dtype=torch.int64)}, [1])
    with pytest.raises(ValueError, match="distribution must be one of"):
        binding.project({}, [1], distribution="cauchy")


def test_a_changed_model_is_noticed() -> None:
    model = net()
    binding = subset(model, "masked")
    kept = binding.snapshot()
    model[0] = nn.Linear(6, 40)
    for act in (
        lambda: binding.apply_([1], [0.1]),
        lambda: binding.project({}, [1]),
        binding.snapshot,
        lambda: binding.restore_(kept),
    ):
        with pytest.raises(zo.ModelChangedError):
            act()


@pytest.mark.parametrize("write", ["copy_", "data", "load_state_dict"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_written_from_outside_count(dtype: torch.dtype, write: str) -> None:
    """Whoever writes a weight, and however: the shadow never brings an old value back."""
    model, other = net(dtype), net(dtype)
    mask = half_of(model)
    binding = zo.bind(model, mask=mask)
    binding.apply_([1], [1e-2])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape).to(dtype))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            if write == "copy_":
                p.copy_(q)
            elif write == "data":
                p.data.copy_(q)
    if write == "load_state_dict":
        model.load_state_dict(other.state_dict())
    fresh = zo.bind(other, mask=mask)
    a = zo.dual_loss(model, batch(dtype), seed=3, eps=1e-2, loss_fn=mse, mask=mask)
    b = zo.dual_loss(other, batch(dtype), seed=3, eps=1e-2, loss_fn=mse, mask=mask)
    torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=1e-6, atol=0)
    for subset_ in (binding, fresh):
        subset_.apply_([4], [1e-2])
    assert equal(weights(model), weights(other))


@given(
    seeds=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=5),
    density=st.floats(0.01, 1.0),
    scale=st.floats(1e-6, 1.0),
    dtype=st.sampled_from(DTYPES),
)
def test_any_update_moves_masked_elements_only_and_can_be_undone(
    seeds: list[int], density: float, scale: float, dtype: torch.dtype
) -> None:
    model = net(dtype)
    mask = zo.Mask.random(model, density, seed=len(seeds), params=lambda n, p: True)
    binding, before = zo.bind(model, mask=mask), weights(model)
    kept = binding.snapshot()
    binding.apply_(seeds, [scale] * len(seeds), distribution="rademacher")
    for name, p in model.named_parameters():
        still = torch.ones(p.numel(), dtype=torch.bool)
        still[mask.indices[name]] = False
        assert torch.equal(p.detach().view(-1)[still], before[name].view(-1)[still])
    binding.restore_(kept)
    assert equal(before, weights(model))


def test_displacements_apply_under_a_mask() -> None:
    one, other = net(), net()
    mask = half_of(one)
    displacement = zo.Displacement([1, 2], [0.1, -0.2])
    displacement.apply_(one, mask=mask)
    zo.bind(other, mask=mask).apply_([1, 2], [0.1, -0.2])
    assert equal(weights(one), weights(other))
    with zo.displaced(net(), displacement, mask=mask) as view:
        inside = {n: t.clone() for n, t in view.state_dict().items()}
    for n, p in one.named_parameters():
        torch.testing.assert_close(inside[n], p.detach(), rtol=0, atol=1e-6)
