"""Masks: how they are chosen, what they refuse, and that a file is the mask or an error."""

from __future__ import annotations

import json
import math

import model_zoo as zoo
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import zokernels as zo
from zokernels.calibration import _groups
from zokernels.masks import _Top, linear_weights


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def everything(name: str, p: nn.Parameter) -> bool:
    return True


def flat(mask: zo.Mask, model: nn.Module) -> Tensor:
    """One bool per element of the candidates, in the model's order."""
    parts = []
    for name, shape in mask.shapes.items():
        part = torch.zeros(math.prod(shape), dtype=torch.bool)
        part[mask.indices[name]] = True
        parts.append(part)
    return torch.cat(parts)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator))
        for _ in range(count)
    ]


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


# --- what a mask is -------------------------------------------------------------------------------


def test_counts_and_density() -> None:
    mask = zo.Mask({"a": torch.tensor([0, 3]), "b": torch.tensor([], dtype=torch.int64)},
                   {"a": (2, 3), "b": (4,)})  # fmt: skip
    assert (mask.nnz, mask.numel, mask.density, mask.scope) == (2, 10, 0.2, "given")
    assert mask.touches("a") and not mask.touches("b") and not mask.touches("c")


@pytest.mark.parametrize(
    ("indices", "shapes", "error", "message"),
    [
        ({"a": torch.tensor([0])}, {"b": (2,)}, ValueError, "same names; differing: ['a', 'b']"),
        ({"a": torch.tensor([0.0])}, {"a": (2,)}, TypeError, "must be an int64 vector; got"),
        ({"a": torch.tensor([[0]])}, {"a": (2,)}, TypeError, "of shape (1, 1)"),
        ({"a": [0, 1]}, {"a": (2,)}, TypeError, "must be an int64 vector; got list"),
        ({"a": torch.tensor([2])}, {"a": (2,)}, ValueError, "must be in [0, 2), sorted; got 2"),
        ({"a": torch.tensor([-1])}, {"a": (2,)}, ValueError, "must be in [0, 2), sorted; got -1"),
        ({"a": torch.tensor([1, 0])}, {"a": (2,)}, ValueError, "must be strictly increasing"),
        ({"a": torch.tensor([1, 1])}, {"a": (2,)}, ValueError, "must be strictly increasing"),
        ({"a": torch.tensor([0, 9, 1])}, {"a": (4,)}, ValueError, "must be strictly increasing"),
        ({"a": torch.tensor([], dtype=torch.int64)}, {"a": (2,)}, ValueError, "at least one"),
        ({}, {}, ValueError, "at least one element"),
    ],
)
def test_bad_indices_are_refused(indices, shapes, error, message) -> None:
    with pytest.raises(error) as caught:
        zo.Mask(indices, shapes)
    assert message in str(caught.value)


def test_the_fingerprint_is_of_names_shapes_and_indices() -> None:
    base = {"a": torch.tensor([0, 3]), "b": torch.tensor([1])}
    shapes = {"a": (2, 3), "b": (4,)}
    mask = zo.Mask(base, shapes)
    turned = zo.Mask(dict(reversed(base.items())), shapes, scope="global")
    assert mask == turned and hash(mask) == hash(turned)
    others = [
        zo.Mask({**base, "a": torch.tensor([0, 4])}, shapes),
        zo.Mask(base, {**shapes, "a": (3, 2)}),
        zo.Mask({"a": base["a"], "c": base["b"]}, {"a": (2, 3), "c": (4,)}),
    ]
    assert len({m.fingerprint() for m in [mask, *others]}) == 4
    assert mask != "mask"


def test_a_mask_keeps_its_own_copy() -> None:
    indices = torch.tensor([0, 3])
    mask = zo.Mask({"a": indices}, {"a": (5,)})
    indices[0] = 2
    assert mask.indices["a"].tolist() == [0, 3]


# --- choosing -------------------------------------------------------------------------------------


def test_the_default_candidates_are_the_linear_weights_of_a_transformer() -> None:
    opt = set(linear_weights(zoo.build("opt")))  # its output layer is tied to the embedding
    assert opt and all(".layers." in n and n.endswith("weight") for n in opt)
    assert not any("embed" in n or "layer_norm" in n for n in opt)
    untied = set(linear_weights(zoo.build("opt_untied")))
    assert untied and not any("lm_head" in n or "embed" in n for n in untied)
    assert len(linear_weights(zoo.build("gpt2"))) == 8  # Conv1D
    experts = linear_weights(zoo.build("mixtral"))
    assert any(p.dim() == 3 for p in experts.values())
    assert set(linear_weights(net())) == {"0.weight", "2.weight"}
    with pytest.raises(ValueError, match="no linear weight to put into a mask: give params"):
        zo.Mask.magnitude(nn.LayerNorm(4), 0.5)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_random_has_the_density_it_was_asked_for(scope: str, density: float) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    mask = zo.Mask.random(model, density, seed=3, params=everything, scope=scope)
    again = zo.Mask.random(model, density, seed=3, params=everything, scope=scope)
    other = zo.Mask.random(model, density, seed=4, params=everything, scope=scope)
    assert mask == again and mask.scope == scope
    assert (mask != other) == (density < 1)
    if scope == "global":
        assert mask.nnz == math.floor(density * mask.numel + 0.5)
    for name, shape in mask.shapes.items():
        share = mask.indices[name].numel() / math.prod(shape)
        if scope == "layer":
            assert abs(share - density) <= 0.5 / math.prod(shape)
        elif math.prod(shape) > 1000 and density < 1:
            assert abs(share - density) < 5 * math.sqrt(density / math.prod(shape))


def test_random_does_not_depend_on_the_random_state_or_the_values() -> None:
    torch.manual_seed(1)
    one = zo.Mask.random(nn.Linear(40, 40), 0.05, seed=-7)
    torch.manual_seed(2)
    model = nn.Linear(40, 40, dtype=torch.bfloat16)
    state = torch.get_rng_state()
    other = zo.Mask.random(model, 0.05, seed=2**64 - 7)
    assert one == other
    assert torch.equal(state, torch.get_rng_state())


def test_random_draws_every_element_equally_often() -> None:
    counts = torch.zeros(100)
    for seed in range(400):
        counts[zo.Mask.random(nn.Linear(10, 10), 0.2, seed=seed).indices["weight"]] += 1
    # 400 draws of 20 out of 100: 80 each, standard deviation 8.
    assert counts.sum() == 400 * 20
    assert float((counts - 80).abs().max()) < 5 * 8


def test_one_element_at_least() -> None:
    assert zo.Mask.random(net(), 1e-9, seed=0).nnz == 1
    assert zo.Mask.magnitude(net(), 1e-9).nnz == 1


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan, "0.1", True])
def test_bad_densities(density) -> None:
    for make in (
        lambda: zo.Mask.random(net(), density, seed=0),
        lambda: zo.Mask.random(net(), density, seed=0, scope="layer"),
        lambda: zo.Mask.magnitude(net(), density),
        lambda: zo.Mask.calibrate(net(), batches(), density, loss_fn=mse),
    ):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]; got"):
            make()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"scope must be one of \['global', 'layer'\]; got 'row'"):
        zo.Mask.magnitude(net(), 0.5, scope="row")
    with pytest.raises(ValueError, match=r"unknown: \['3.weight'\]"):
        zo.Mask.random(net(), 0.5, seed=0, params=["3.weight"])
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module; got dict"):
        zo.Mask.magnitude({}, 0.5)


def test_full_has_every_element() -> None:
    mask = zo.Mask.full(net(), params=everything)
    assert mask.density == 1 and mask.nnz == sum(p.numel() for p in net().parameters())


@pytest.mark.parametrize("density", [0.03, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitude_takes_the_largest(density: float, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    mask = zo.Mask.magnitude(model, density)
    weights = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    weights = weights.detach().abs().float()
    # Ties, which bfloat16 has, go to the first.
    order = sorted(range(weights.numel()), key=lambda i: (-float(weights[i]), i))
    wanted = torch.zeros(weights.numel(), dtype=torch.bool)
    wanted[order[: math.floor(density * weights.numel() + 0.5)]] = True
    assert torch.equal(flat(mask, model), wanted)


def test_magnitude_per_layer() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1000)  # a global ranking would take it all
    mask = zo.Mask.magnitude(model, 0.25, scope="layer")
    assert {n: t.numel() for n, t in mask.indices.items()} == {"0.weight": 12, "2.weight": 10}
    assert zo.Mask.magnitude(model, 0.25).indices["0.weight"].numel() == 0


def test_ties_go_to_the_first_element() -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    mask = zo.Mask.magnitude(model, 0.5, params=everything)
    chosen = flat(mask, model)
    assert chosen[: mask.nnz].all() and not chosen[mask.nnz :].any()


def test_weights_that_are_nan_cannot_be_ranked() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"parameter '2.weight' has scores that are NaN"):
        zo.Mask.magnitude(model, 0.5)


@given(
    parts=st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=6),
    count=st.integers(1, 20),
)
def test_the_running_top_k_is_the_top_k(parts: list[list[int]], count: int) -> None:
    """Whatever the pieces the scores arrive in, and however many of them are equal."""
    top = _Top(count)
    start = 0
    for part in parts:
        top.add(torch.tensor(part, dtype=torch.float32), start)
        start += len(part)
    scores = [s for part in parts for s in part]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert top.places.tolist() == sorted(order)


# --- calibration ----------------------------------------------------------------------------------


def squared(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The definition: whole gradients, one batch at a time."""
    total: dict[str, Tensor] = {}
    for batch in data:
        grads = torch.autograd.grad(mse(model, batch), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            total[name] = total.get(name, 0) + g.float() ** 2 / len(data)
    return total


@pytest.mark.parametrize("limit", [None, 1, 50, 10**6])
def test_calibration_takes_the_largest_mean_squared_gradients(limit: int | None) -> None:
    model = net()
    scores = squared(model, batches())
    mask = zo.Mask.calibrate(
        model, batches(), 0.2, loss_fn=mse, params=everything, max_elements=limit
    )
    every = torch.cat([s.flatten() for s in scores.values()])
    chosen = flat(mask, model)
    assert int(chosen.sum()) == math.floor(0.2 * every.numel() + 0.5)
    assert float(every[chosen].min()) >= float(every[~chosen].max()) * (1 - 1e-5)


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones(5, 8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    zo.Mask.calibrate(model, iter(batches()), 0.2, loss_fn=mse)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert torch.equal(model[2].weight.grad, torch.ones(5, 8))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(ZeroDivisionError):
        zo.Mask.calibrate(model, batches(), 0.2, loss_fn=lambda m, b: mse(m, b) / (1 // 0))
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_live_one_parameter_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    held: list[int] = []

    def count(_: Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))

    data = torch.randn(3, 64)
    handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
    zo.Mask.calibrate(model, [data, data], 0.1, loss_fn=lambda m, b: m(b).square().mean())
    for handle in handles:
        handle.remove()
    assert len(held) == 12 and set(held) == {1}


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 60))
def test_max_elements_bounds_the_scores_that_are_held(sizes: list[int], limit: int) -> None:
    """Groups in order, as large as the limit allows; above it only a parameter on its own."""
    parameters = {str(i): nn.Parameter(torch.zeros(n)) for i, n in enumerate(sizes)}
    groups = list(_groups(parameters, limit))
    assert [n for group in groups for n in group] == list(parameters)
    held = [sum(p.numel() for p in group.values()) for group in groups]
    assert all(h <= limit or len(g) == 1 for h, g in zip(held, groups, strict=True))
    for before, group in zip(held, groups[1:], strict=False):
        assert before + next(iter(group.values())).numel() > limit
    assert len(list(_groups(parameters, None))) == 1


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral", "roberta_cls"])
def test_calibration_of_transformers_models(name: str) -> None:
    model, case = zoo.build(name), zoo.CASES[name]
    mask = zo.Mask.calibrate(model, [case.batch()], 0.02)
    assert mask.nnz == math.floor(0.02 * mask.numel + 0.5)
    parts = zo.Mask.calibrate(model, [case.batch()], 0.02, max_elements=1500)
    overlap = (flat(mask, model) & flat(parts, model)).sum() / mask.nnz
    assert overlap > 0.99  # the same sums, up to the order of a kernel's reduction
    loss = model(**case.batch()).loss
    names = list(mask.shapes)
    grads = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
    every = torch.cat([g.float().flatten() ** 2 for g in grads])
    chosen = flat(mask, model)
    assert float(every[chosen].min()) >= float(every[~chosen].max()) * 0.999


def test_calibration_in_bfloat16_sums_in_float32() -> None:
    model = net().bfloat16()
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches()]
    mask = zo.Mask.calibrate(model, data, 0.3, loss_fn=mse)
    scores = squared(model, data)
    every = torch.cat([scores[n].flatten() for n in mask.shapes])
    chosen = flat(mask, model)
    assert float(every[chosen].min()) >= float(every[~chosen].max()) * (1 - 1e-5)


def test_bad_calibrations() -> None:
    model = net()
    with pytest.raises(ValueError, match="batches must have at least one batch"):
        zo.Mask.calibrate(model, [], 0.1, loss_fn=mse)
    with pytest.raises(TypeError, match="batch must be a mapping"):
        zo.Mask.calibrate(model, batches(), 0.1)
    with pytest.raises(TypeError, match="batches must be a sequence when max_elements is given"):
        zo.Mask.calibrate(model, iter(batches()), 0.1, loss_fn=mse, max_elements=10)
    with pytest.raises(ValueError, match="max_elements must be at least 1 or None; got 0"):
        zo.Mask.calibrate(model, batches(), 0.1, loss_fn=mse, max_elements=0)
    with pytest.raises(ValueError, match=r"gave these parameters a gradient: \['2.weight'\]"):
        zo.Mask.calibrate(model, batches(), 0.1, loss_fn=lambda m, b: m[0](b[0]).sum())
    with pytest.raises(ValueError, match="does not depend differentiably on"):
        zo.Mask.calibrate(model, batches(), 0.1, loss_fn=lambda m, b: mse(m, b).detach())
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        zo.Mask.calibrate(model, batches(), 0.1, loss_fn=lambda m, b: mse(m, b) * math.nan)
    with pytest.raises(ValueError, match=r"squared gradient of parameter '2.weight' is not finite"):
        zo.Mask.calibrate(model, batches(), 0.1, loss_fn=lambda m, b: mse(m, b) * 1e30)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    mask = zo.Mask.magnitude(zoo.build("opt"), 0.05)
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    return mask, path


def test_a_mask_survives_its_file(saved) -> None:
    mask, path = saved
    loaded = zo.Mask.load(path)
    assert loaded == mask and loaded.scope == mask.scope and loaded.shapes == mask.shapes
    assert all(torch.equal(loaded.indices[n], mask.indices[n]) for n in mask.indices)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_a_truncated_file_is_refused(saved) -> None:
    _, path = saved
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 20, len(data) // 2, len(data) - 8, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(zo.MaskFileError):
            zo.Mask.load(path)


def test_a_changed_file_is_refused(saved) -> None:
    """Any single changed byte of the indices, and a sample of the header's."""
    mask, path = saved
    data = path.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(8, body, 41), *range(body, len(data), 97)]:
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            loaded = zo.Mask.load(path)
        except zo.MaskFileError:
            continue
        assert loaded == mask  # a byte that carries nothing, such as padding


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "mask"
    header = json.dumps({"__metadata__": {"kind": "zokernels.mask"}}).encode()
    for content in (data, len(header).to_bytes(8, "little") + header + data):
        path.write_bytes(content)
        with pytest.raises(zo.MaskFileError):
            zo.Mask.load(path)


def test_foreign_files_are_refused(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(zo.MaskFileError, match=r"is no mask: its metadata must have kind"):
        zo.Mask.load(path)
    path.write_bytes(b"ZOtr not a mask at all, but long enough to have a header")
    with pytest.raises(zo.MaskFileError, match="is no whole safetensors file"):
        zo.Mask.load(path)
    with pytest.raises(FileNotFoundError):
        zo.Mask.load(tmp_path / "missing")


@pytest.mark.parametrize("key", ["format", "contract_version", "fingerprint", "shapes", "scope"])
def test_other_versions_and_damaged_metadata_are_refused(saved, key: str) -> None:
    mask, path = saved
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][key] = "999"
    metadata = header["__metadata__"]
    save_file(dict(mask.indices), path, metadata)
    with pytest.raises(zo.MaskFileError, match=r"must be 1; got '999'|is damaged"):
        zo.Mask.load(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(saved) -> None:
    mask, path = saved
    before = path.read_bytes()
    with pytest.raises(OSError):
        mask.save(path.parent / "no" / "folder")
    assert path.read_bytes() == before


# --- fitting a model ------------------------------------------------------------------------------


def test_a_mask_that_does_not_fit_names_what_differs() -> None:
    mask = zo.Mask.magnitude(net(), 0.5)
    with pytest.raises(zo.MaskMismatchError, match=r"the model has not: \['0.weight', '2.weight'"):
        zo.bind(nn.Linear(6, 8), mask=mask)
    wider = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    with pytest.raises(zo.MaskMismatchError, match=r"'0.weight' \(8, 6\) in the mask, \(9, 6\) in"):
        zo.bind(wider, mask=mask)
    with pytest.raises(zo.MaskMismatchError):
        zo.MeZO(wider, mask=mask)
    with pytest.raises(zo.MaskMismatchError):
        zo.dual_loss(wider, batches()[0], seed=1, eps=1e-3, loss_fn=mse, mask=mask)


def test_a_mask_of_one_machine_serves_another(tmp_path) -> None:
    """Only names and shapes matter: another dtype, other values, other file order."""
    path = tmp_path / "m"
    zo.Mask.magnitude(net(), 0.3).save(path)
    model = net().half()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-2)
    assert zo.bind(model, mask=zo.Mask.load(path)).numel == zo.Mask.load(path).nnz
