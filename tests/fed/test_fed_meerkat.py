"""Meerkat and Meerkat-vp: mask, virtual path, GradIP, VPCS, early stopping with a data pointer."""

from __future__ import annotations

import math
import statistics
from typing import Any

import fed_zoo as zoo
import pytest
import torch

import zokernels as zo
from fedzo.gradients import pretraining_gradient
from fedzo.messages import Order, Report
from fedzo.methods import Meerkat, MeerkatVP, RandomMask, WeightMagnitude
from fedzo.methods.meerkat_vp import vpcs
from zokernels.masks import Mask, linear_weights


def scores(model: torch.nn.Module, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Mean squared gradient of every linear weight, by plain autograd."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in linear_weights(model).items():
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad.square() / len(batches)
    model.zero_grad(set_to_none=True)
    return total


# --- the mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_mask_is_the_top_of_the_squared_gradients(scope):
    task = zoo.ToyTask()
    batches = [task.batch(range(k, k + 4)) for k in (0, 4, 8)]
    fed = zoo.federation("meerkat", calibration=batches, options={"scope": scope, "density": 0.01})
    model = zoo.build()
    want = scores(model, batches)
    (binding,) = fed.space.groups
    chosen = {p.name: set(p.masked.indices.tolist()) for p in binding.params}
    if scope == "global":
        flat = torch.cat([s.flatten() for s in want.values()])
        count = math.floor(0.01 * flat.numel() + 0.5)
        limit = flat.topk(count).values.min()
        assert sum(map(len, chosen.values())) == count
        for name, s in want.items():
            top = set((s.flatten() >= limit).nonzero().flatten().tolist())
            assert chosen.get(name, set()) == top
    else:
        for name, s in want.items():
            count = math.floor(0.01 * s.numel() + 0.5)
            assert chosen[name] == set(s.flatten().topk(count).indices.tolist())


def test_other_masks():
    model = zoo.build()
    big = torch.cat([p.detach().abs().flatten() for p in linear_weights(model).values()])
    fed = zoo.federation("weight_magnitude", options={"density": 0.01})
    values = torch.cat([v.abs() for v in fed.space.values().values()])
    assert values.min() >= big.topk(values.numel()).values.min()
    one, same = (zoo.federation("random_mask") for _ in range(2))
    other = zoo.federation("random_mask", seed=6)
    assert one.method.fingerprint == same.method.fingerprint != other.method.fingerprint


@pytest.mark.parametrize("name", ["meerkat", "weight_magnitude", "random_mask"])
@pytest.mark.parametrize("part", ["layers.0", "norm"])
def test_a_mask_is_chosen_from_what_may_move(name, part):
    model = zoo.build()
    for key, p in model.named_parameters():
        p.requires_grad_(part in key)
    mask = zoo.method(name, density=0.02).choose(zoo.setting(model, zoo.ToyTask()))
    free = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    linear = {n: shape for n, shape in free.items() if n in linear_weights(model)}
    assert mask.shapes == (linear or free)


def test_a_given_mask_is_taken(tmp_path):
    mask = Mask.random(zoo.build(), 0.01, seed=99)
    mask.save(tmp_path / "mask.safetensors")
    for given in (mask, tmp_path / "mask.safetensors", str(tmp_path / "mask.safetensors")):
        for name in ("meerkat", "weight_magnitude", "random_mask", "meerkat_vp"):
            fed = zoo.federation(name, options={"mask": given})
            assert fed.space.groups[0].mask == mask


def test_a_mask_needs_calibration_text():
    with pytest.raises(ValueError, match="meerkat needs calibration"):
        zoo.federation("meerkat", calibration=())
    with pytest.raises(ValueError, match="at least one batch"):
        zoo.federation("random_mask", calibration=(), options={"track_gradip": True})


@pytest.mark.parametrize("frozen", [False, True])
def test_only_masked_values_move_and_frozen_weights_may_be_masked(frozen):
    model = zoo.build().requires_grad_(not frozen)
    before = zoo.weights(model)
    fed = zoo.federation("meerkat", model=model, options={"track_gradip": True})
    list(fed.run(2))
    assert any(p.requires_grad for p in model.parameters()) != frozen
    masked = {p.name: p.masked.indices for p in fed.space.params}
    for name, p in model.named_parameters():
        changed = (p.detach() != before[name]).flatten().nonzero().flatten().tolist()
        assert set(changed) <= set(masked[name].tolist() if name in masked else [])
    assert zoo.differing(before, zoo.weights(model))


# --- the virtual path -----------------------------------------------------------------------------


def test_the_server_replays_the_mean_path():
    """w^r = w - lr sum_t mean_k(g_k^t) z(s^t), on the mask, from the reports alone."""
    got: dict[int, tuple[float, ...]] = {}

    def up(client: int, data: bytes) -> list[bytes]:
        got[client] = Report.decode(data).scalars
        return [data]

    fed = zoo.federation("meerkat", channel=up)
    start = {n: v.double() for n, v in fed.space.values().items()}
    list(fed.run(1))
    order = fed.method.order(1, 0)
    for p in fed.space.params:
        want = start[p.name].clone()
        for t in range(3):
            z = torch.ops.zokernels.sample(
                1, p.moving, torch.tensor(fed.method.direction(order, t)), p.id, 0, 0, "gaussian"
            )
            want -= 0.1 * statistics.fmean(g[t] for g in got.values()) * z[0].double()
        torch.testing.assert_close(p.values().double(), want, rtol=1e-5, atol=1e-6)


def test_high_frequency_is_exact_with_one_step():
    """T = 1 and shared seeds: the round is one step along the mean of the clients' scalars."""
    fed = zoo.federation("meerkat", options={"steps": 1})
    shared = {fed.method.direction(fed.method.order(1, k), 0) for k in range(4)}
    assert len(shared) == 1
    own = zoo.federation("meerkat", options={"steps": 1, "seeds": "client"})
    assert len({own.method.direction(own.method.order(1, k), 0) for k in range(4)}) == 4


# --- GradIP ---------------------------------------------------------------------------------------


def test_the_pretraining_gradient_is_autograds_mean():
    task = zoo.ToyTask()
    batches = [task.batch([0, 1, 2]), task.batch([3, 4, 5])]
    fed = zoo.federation("meerkat", calibration=batches, options={"track_gradip": True})
    model = zoo.build()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for n, p in model.named_parameters():
            total[n] += p.grad / 2
    for p in fed.space.params:
        want = total[p.name].flatten()[p.masked.indices]
        torch.testing.assert_close(fed.method.pretraining[p.name], want)
    whole = zoo.federation("full_fedzo")
    for n, g in pretraining_gradient(whole.space, batches).items():
        torch.testing.assert_close(g, total[n])
    assert all(p.grad is None for p in whole.model.parameters())


@pytest.mark.parametrize("seeds", ["shared", "client"])
def test_gradip_is_the_inner_product_with_the_estimate(seeds):
    """``<grad_p, g_k^t z(s_k^t)>`` with everything written out."""
    got: dict[int, tuple[float, ...]] = {}

    def up(client: int, data: bytes) -> list[bytes]:
        got[client] = Report.decode(data).scalars
        return [data]

    fed = zoo.federation("meerkat", channel=up, options={"track_gradip": True, "seeds": seeds})
    (record,) = list(fed.run(1))
    assert set(record.gradip) == set(record.accepted)
    for client, trajectory in record.gradip.items():
        order = fed.method.order(1, client)
        for t, value in enumerate(trajectory):
            want = 0.0
            for p in fed.space.params:
                seed = torch.tensor(fed.method.direction(order, t))
                z = torch.ops.zokernels.sample(1, p.moving, seed, p.id, 0, 0, "gaussian")[0]
                estimate = got[client][t] * z.double()
                want += float(fed.method.pretraining[p.name].double() @ estimate)
            assert value == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_each_seed_is_projected_once(monkeypatch):
    fed = zoo.federation("meerkat", options={"track_gradip": True})
    asked: list[int] = []
    project = fed.space.project
    monkeypatch.setattr(
        fed.space, "project", lambda v, seeds: (asked.append(len(seeds)), project(v, seeds))[1]
    )
    list(fed.run(2))
    assert asked == [3, 3]  # T, whatever the number of clients


# --- VPCS -----------------------------------------------------------------------------------------


def plain_vpcs(path: list[float], init: int, later: int) -> tuple[float, float]:
    first = [abs(x) for x in path[:init]]
    last = [abs(x) for x in path[-later:]]
    a_init, a_later = sum(first) / init, sum(last) / later
    sigma = 0.1 * statistics.median(first)
    return a_init / a_later, sum(x < sigma for x in last) / later


def test_the_statistics_are_the_formulas():
    g = torch.Generator().manual_seed(0)
    path = torch.randn(100, generator=g).mul(torch.linspace(3, 0.01, 100)).tolist()
    s = vpcs(path, initial=20, later=50)
    later, quiet = plain_vpcs(path, 20, 50)
    assert s.later == pytest.approx(later) and s.quiet == pytest.approx(quiet)


def test_a_decaying_trajectory_is_flagged_and_an_oscillating_one_is_not():
    """The paper's two kinds: one label (dies down within 100 steps), IID (keeps oscillating)."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(100, generator=g)
    dying = (noise * torch.exp(-torch.arange(100) / 10)).tolist()
    steady = noise.tolist()
    assert vpcs(dying, initial=20, later=50).flagged
    assert not vpcs(steady, initial=20, later=50).flagged


def test_the_rule_and_the_thresholds():
    # rho_later = 1 / 0.5 = 2; all later values are quiet for sigma 0.6, none for 0.4.
    path = [1.0, -1.0, 0.5, -0.5]
    options: dict[str, Any] = {"initial": 2, "later": 2}
    s = vpcs(path, sigma=0.6, tau_later=1.9, **options)
    assert (s.later, s.quiet, s.flagged) == (pytest.approx(2.0), 1.0, True)
    assert not vpcs(path, sigma=0.6, tau_later=2.1, **options).flagged
    assert vpcs(path, sigma=0.6, tau_later=2.1, rule="any", **options).flagged
    assert not vpcs(path, sigma=0.4, tau_later=1.9, **options).flagged
    assert vpcs(path, sigma=0.4, tau_later=1.9, rule="any", **options).flagged
    assert not vpcs(path, sigma=0.6, tau_later=1.9, tau_quiet=1.0, **options).flagged
    assert vpcs(path, sigma_share=0.51, tau_later=1.9, **options).quiet == 1.0
    assert vpcs(path, sigma_share=0.5, tau_later=1.9, **options).quiet == 0.0  # strictly below


def test_silence_is_no_division_by_zero():
    s = vpcs([1.0] * 4 + [0.0] * 4, initial=4, later=4)
    assert math.isfinite(s.later) and s.flagged
    silent = vpcs([0.0] * 8, initial=4, later=4)
    assert silent.later == 0.0 and silent.quiet == 0.0 and not silent.flagged
    with pytest.raises(ValueError, match="at least 50 steps; got 10"):
        vpcs([1.0] * 10, initial=20, later=50)


def test_gradip_with_its_sign():
    """``absolute=False`` is the same formulas on the signed values; a zero mean is no crash."""
    s = vpcs([4.0, 2.0, 1.0, -0.5], initial=2, later=2, sigma=0.0, absolute=False)
    assert s.later == pytest.approx(3.0 / 0.25) and s.quiet == 0.5
    zero = vpcs([4.0, 2.0, 1.0, -1.0], initial=2, later=2, absolute=False)
    assert zero.later > 1e9
    exactly = vpcs([1.0, -1.0, -1e-30, -1e-30], initial=2, later=2, absolute=False)
    assert not math.isnan(exactly.later)


def test_the_limit_of_quiet_has_no_sign():
    """sigma = sigma_share * median |GradIP| of the initial window, whatever ``absolute`` says."""
    path = [-4.0, -2.0, -4.0, 1.0, 1.0, 3.0]
    for absolute in (True, False):
        s = vpcs(path, initial=3, later=3, sigma_share=0.5, absolute=absolute)
        assert s.quiet == pytest.approx(2 / 3)


def test_calibration_moves_nothing_and_comes_once(tmp_path):
    file = tmp_path / "run.safetensors"
    fed = zoo.federation("meerkat_vp", clients_per_round=2, checkpoint=file)
    before = zoo.weights(fed.model)
    rounds = fed.run(2)
    first = next(rounds)
    assert (first.round, first.phase) == (0, "calibration")
    assert first.invited == first.accepted == (0, 1, 2, 3)
    assert not zoo.differing(zoo.weights(fed.model), before)
    assert first.steps == dict.fromkeys(range(4), 6)
    for client, path in first.gradip.items():
        assert len(path) == 6
        want = vpcs(path, initial=2, later=3)
        assert fed.method.signatures[client] == want
    assert first.flagged == tuple(c for c, s in fed.method.signatures.items() if s.flagged)
    assert [(r.round, r.phase) for r in rounds] == [(1, "train"), (2, "train")]
    again = zoo.federation("meerkat_vp", clients_per_round=2)
    again.load(file)
    assert again.method.flagged == fed.method.flagged
    assert [r.round for r in again.run(3)] == [3]


def test_flagged_clients_make_one_step_and_walk_on_through_their_data():
    """One step a round, each on the next batch; the others make T."""
    fed = zoo.federation("meerkat_vp", options={"tau_later": 1e-9, "tau_quiet": 0.5}, batch_size=1)
    used: dict[int, list[int]] = {}
    batch = fed.task.batch
    working: list[int] = []
    work = fed.transport.work

    def at_work(request: Any) -> Any:
        working[:] = [request.client, Order.decode(request.order).round]
        return work(request)

    def taken(indices: Any) -> Any:
        if working[1]:
            used.setdefault(working[0], []).extend(indices)
        return batch(indices)

    fed.transport.work, fed.task.batch = at_work, taken  # type: ignore[method-assign]
    rounds = fed.run(6)
    next(rounds)
    fed.method.signatures = {}
    fed.method.flagged = (2,)
    records = list(rounds)
    for r in records:
        assert r.steps == {0: 3, 1: 3, 2: 1, 3: 3} and r.flagged == (2,)
        assert r.scalars.count == 10 and len(r.gradip[2]) == 1
    expected = zoo.Examples(fed.shards[2], 1, seed=5, client=2)
    assert used[2] == [i for _ in range(6) for i in next(expected)]
    assert len(used[0]) == 18


def test_a_flagged_client_counts_in_the_first_step_only():
    """The mean is over the clients' weights: a client that stopped adds nothing to later steps."""
    reports: dict[int, tuple[float, ...]] = {}

    def up(client: int, data: bytes) -> list[bytes]:
        reports[client] = Report.decode(data).scalars
        return [data]

    fed = zoo.federation("meerkat_vp", channel=up)
    rounds = fed.run(1)
    next(rounds)
    fed.method.flagged = (1, 3)
    next(rounds)
    from fedzo.messages import Merged

    (block,) = Merged.decode(fed.updates(0)[0]).blocks
    want = [-0.1 * sum(g[t] for g in reports.values() if len(g) > t) / 4 for t in range(3)]
    assert block.values == pytest.approx(want, rel=1e-6)
    assert [len(reports[k]) for k in range(4)] == [3, 1, 3, 1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Meerkat, {"density": 0.0}, r"density must be in \(0, 1\]"),
        (Meerkat, {"scope": "row"}, "scope must be"),
        (Meerkat, {"track_gradip": True, "payload": "tensors"}, "track_gradip"),
        (MeerkatVP, {"rule": "most"}, "rule must be one of"),
        (MeerkatVP, {"initial_steps": 101}, "at most calibration_steps"),
        (MeerkatVP, {"later_steps": 101}, "at most calibration_steps"),
        (MeerkatVP, {"flagged_steps": 0}, "flagged_steps"),
        (MeerkatVP, {"track_gradip": False}, "track_gradip must be True"),
    ],
)
def test_options_out_of_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_papers_and_reconstructed_defaults():
    method = MeerkatVP()
    assert method.density == 1e-3 and method.scope == "global" and method.seeds == "shared"
    assert (method.calibration_steps, method.initial_steps, method.later_steps) == (100, 20, 50)
    assert (method.tau_later, method.tau_quiet, method.sigma_share) == (3.0, 0.8, 0.1)
    assert method.rule == "all" and method.flagged_steps == 1
    assert issubclass(RandomMask, Meerkat) and issubclass(WeightMagnitude, Meerkat)


def test_a_masked_model_answers_like_the_servers():
    """Evaluation between rounds sees the weights of the round: the mask hides nothing."""
    fed = zoo.federation("meerkat", options={"lr": 1.0})
    losses = [fed.task.evaluate(fed.model)["loss"]]
    for _ in fed.run(2):
        losses.append(fed.task.evaluate(fed.model)["loss"])
    assert len(set(losses)) == 3
    copied = zoo.build()
    copied.load_state_dict(fed.model.state_dict())
    assert fed.task.evaluate(copied)["loss"] == losses[-1]
    assert zo.bind(fed.model, mask=fed.space.groups[0].mask) is fed.space.groups[0]
