"""Which parameters of a model move, under which names and ids; when a binding no longer fits."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import tempfile
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel

import zokernels as zo
from zokernels import binding, noise

COLLIDING = (
    "model.layers.2239.experts.7.self_attn.v_proj.weight",
    "model.layers.2387.experts.1.self_attn.v_proj.weight",
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.stack = nn.Parameter(torch.ones(2, 3, 4))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_parameter("absent", None)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)) * self.scale)


NAMES = [
    "scale",
    "stack",
    "embed.weight",
    "body.0.weight",
    "body.0.bias",
    "body.1.weight",
    "body.1.bias",
]


def test_names_ids_shapes_and_places():
    model = Tied()
    bound = zo.bind(model)
    assert [p.name for p in bound.params] == NAMES
    assert bound.by_name.keys() == set(NAMES)
    for p in bound.params:
        assert p.id == noise.parameter_id(p.name)
        assert p.tensor is dict(model.named_parameters())[p.name]
        assert (p.shape, p.dtype, p.device) == (p.tensor.shape, torch.float32, torch.device("cpu"))
        assert all(holder[key] is p.tensor for holder, key in p.places)
    assert len(bound.by_name["embed.weight"].places) == 2, "a tied weight has one id and two places"
    assert bound.by_name["stack"].matrix == (6, 4)
    assert bound.by_name["scale"].matrix == (1, 1)
    assert bound.by_name["body.0.bias"].matrix == (1, 4)
    assert bound.numel == sum(p.numel() for p in model.parameters())
    assert bound.device == torch.device("cpu")


def test_equal_shapes_get_different_noise():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    z = zo.directions(model, seed=1)
    assert not torch.equal(z["0.weight"], z["1.weight"])
    assert not torch.equal(z["0.bias"], z["1.bias"])


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (None, NAMES),
        (["body.1.bias", "scale"], ["scale", "body.1.bias"]),
        (iter(["scale", "scale"]), ["scale"]),
        ("stack", ["stack"]),
        (lambda n, p: p.dim() == 1, ["body.0.bias", "body.1.weight", "body.1.bias"]),
        (lambda n, p: "embed" in n, ["embed.weight"]),
    ],
)
def test_selections(params, names):
    """In the model's order, whatever the order asked for: noise does not depend on it anyway."""
    assert [p.name for p in binding.Binding(Tied(), params).params] == names


def test_requires_grad_selects_and_params_overrides():
    model = Tied()
    for n, p in model.named_parameters():
        p.requires_grad_("bias" in n)
    assert [p.name for p in zo.bind(model).params] == ["body.0.bias", "body.1.bias"]
    assert [p.name for p in zo.bind(model, ["scale"]).params] == ["scale"]


def test_names_do_not_depend_on_wrappers():
    model = Tied()
    names = [p.name for p in zo.bind(model).params]
    wrapped = [DataParallel(model), torch.compile(model), torch.compile(DataParallel(model))]
    for wrapper in wrapped:
        bound = zo.bind(wrapper)
        assert [p.name for p in bound.params] == names
        assert bound.model is model
        assert binding.unwrap(wrapper) is model


def test_no_parameter():
    model = Tied().requires_grad_(False)
    for bad in (lambda: zo.bind(model), lambda: zo.bind(model, []), lambda: zo.bind(nn.ReLU())):
        with pytest.raises(ValueError, match="params selects no parameter"):
            bad()
    with pytest.raises(ValueError, match="params selects no parameter"):
        zo.bind(model, lambda n, p: False)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"params must name parameters of the model.*\['body\.9'\]"
    ):
        zo.bind(Tied(), ["scale", "body.9"])


def test_not_a_module():
    with pytest.raises(
        TypeError, match=r"model must be a torch\.nn\.Module or a Binding; got dict"
    ):
        zo.bind({"w": torch.zeros(1)})


def test_colliding_names_are_refused():
    model = nn.Module()
    for name in COLLIDING:
        *path, leaf = name.split(".")
        holder = model
        for part in path:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.register_parameter(leaf, nn.Parameter(torch.zeros(2)))
    assert {n for n, _ in model.named_parameters()} == set(COLLIDING)
    with pytest.raises(
        ValueError, match="share the id 0x7e7911c4, so they would get the same noise"
    ):
        zo.bind(model)
    assert len(zo.bind(model, [COLLIDING[0]]).params) == 1


def test_meta_parameters_are_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match=r"parameter 'weight' is on the meta device.*load it before"
    ):
        zo.bind(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    model = nn.Linear(3, 3)
    model.bias = nn.Parameter(torch.zeros(3).to(dtype))
    with pytest.raises(TypeError, match=rf"parameter 'bias' has dtype {dtype}"):
        zo.bind(model)
    assert [p.name for p in zo.bind(model, ["weight"]).params] == ["weight"]


def test_sparse_parameters_are_refused():
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="parameter 'weight' must be a strided tensor"):
        zo.bind(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parameters_without_a_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter '0.weight' has no shape yet"):
        zo.bind(nn.Sequential(nn.LazyLinear(3)))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_parameters_are_refused(alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    for original in (False, True):
        wrapped = FullyShardedDataParallel(
            nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=original
        )
        with pytest.raises(TypeError, match="is FullyShardedDataParallel, which holds shards"):
            zo.MeZO(wrapped)
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"parameter 'weight' is a DTensor; .* no shards"):
        zo.MeZO(model)


def test_a_model_that_is_being_evaluated_says_so() -> None:
    model = nn.Linear(4, 3)
    optimizer, binding = zo.MeZO(model, lr=0.1), zo.bind(model)
    batch = torch.randn(2, 4)
    uses = [
        lambda: zo.MeZO(model),
        lambda: zo.bind(model),
        lambda: optimizer.step(batch, lambda m, x: m(x).sum()),
        lambda: optimizer.step(lambda: model(batch).sum()),
        lambda: binding.apply_([1], [0.1]),
        lambda: binding.snapshot(),
        lambda: zo.Displacement([1], [0.1]).apply_(model),
    ]
    before = copy.deepcopy(model.state_dict())
    with zo.displaced(model, [1], [0.1]):
        for use in uses:
            with pytest.raises(RuntimeError, match="is already active"):
                use()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert optimizer.num_steps == 0


def test_scripted_modules_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"module '1' is TorchScript.*before scripting"):
        zo.bind(model)


# --- the model changes ----------------------------------------------------------------------------


def replace(model: nn.Module) -> None:
    model.body[0].weight = nn.Parameter(torch.zeros(4, 4))


def convert(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def resize(model: nn.Module) -> None:
    model.scale.data = torch.zeros(3)


def untie(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def drop(model: nn.Module) -> None:
    del model.body[0].weight


@pytest.mark.parametrize("change", [replace, convert, resize, untie, drop])
def test_a_changed_model_is_an_error_for_a_held_binding(change):
    model = Tied()
    held = zo.bind(model)
    assert zo.bind(held) is held
    change(model)
    with pytest.raises(zo.ModelChangedError, match="bind the model again"):
        held.check()
    with pytest.raises(zo.ModelChangedError):
        zo.bind(held)
    fresh = zo.bind(model)  # by module: bound again
    assert fresh is not held
    fresh.check()


def test_new_values_are_no_change():
    model = Tied()
    held = zo.bind(model)
    with torch.no_grad():
        model.scale.add_(1)
    model.body[0].weight.data = torch.zeros(4, 4)
    model.load_state_dict(Tied().state_dict())
    model.train(False)
    assert zo.bind(held) is held
    assert zo.bind(model) is held


def test_default_selection_is_cached_until_it_changes():
    model = Tied()
    first = zo.bind(model)
    assert zo.bind(model) is first
    model.scale.requires_grad_(False)
    second = zo.bind(model)
    assert second is not first
    assert "scale" not in second.by_name
    model.add_module("extra", nn.Linear(2, 2))
    assert "extra.weight" in zo.bind(model).by_name


def test_selections_are_kept_too():
    """What the first evaluation learnt about a selection is not learnt again at every step."""
    model = Tied()
    first = zo.bind(model, ["stack", "scale"])
    assert zo.bind(model, lambda n, p: n in ("scale", "stack")) is first
    assert zo.bind(model, ["stack"]) is not first
    model.scale = nn.Parameter(torch.ones(()))
    second = zo.bind(model, ["stack", "scale"])
    assert second is not first
    second.check()
    tied = zo.bind(model, ["embed.weight"])
    model.head.weight = nn.Parameter(torch.zeros(10, 4))
    untied = zo.bind(model, ["embed.weight"])
    assert [len(b.params[0].places) for b in (tied, untied)] == [2, 1]
    model.to(torch.bfloat16)
    assert zo.bind(model, ["stack", "scale"]).params[0].dtype == torch.bfloat16


def test_kept_selections_are_bounded():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    for i in range(20):
        zo.bind(model, [f"{i}.weight"])
    assert len(model.__dict__[binding._Slot.KEY].selections) == binding._KEPT


def test_params_and_a_binding_do_not_go_together():
    with pytest.raises(ValueError, match="params must be None when a Binding is given"):
        zo.bind(zo.bind(Tied()), ["scale"])


def test_binding_does_not_keep_a_model_alive():
    model = Tied()
    zo.bind(model)
    zo.dual_loss(model, torch.tensor([1]), seed=1, eps=0.1, loss_fn=lambda m, b: m(b).sum())
    gone = weakref.ref(model)
    weight = weakref.ref(model.stack)
    del model
    gc.collect()
    assert gone() is None and weight() is None


def test_a_bound_model_copies_pickles_and_saves_like_any_other():
    model = Tied()
    keys = list(model.state_dict())
    held = zo.bind(model)
    x = torch.tensor([1, 2])
    zo.dual_loss(model, x, seed=1, eps=0.1, loss_fn=lambda m, b: m(b).sum())
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.copy(model),
    ]
    for twin in twins:
        assert torch.equal(twin(x), model(x))
        bound = zo.bind(twin)
        assert bound.model is twin
        assert [p.name for p in bound.params] == NAMES
        assert zo.bind(model).model is model
    assert zo.bind(twins[0]) is not held


def test_a_replaced_module_is_noticed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2)))
    binding = zo.bind(model)
    model[1][0] = nn.Linear(4, 2)
    with pytest.raises(zo.ModelChangedError, match="module '0' was replaced"):
        binding.check()
    assert zo.bind(model) is not binding
