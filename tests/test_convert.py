"""sparsify_, densify_, their report, what they leave out, and optimizers that go on or are stopped."""

import copy
import gc
import json

import pytest
import torch
from test_nn import random_pattern, weight_mask
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsekern.convert import densify_, sparsify_
from sparsekern.eligible import convertible
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.optimizer import _replaced
from sparsekern.pattern import BlockPattern

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
}


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, dtype=dtype)
        self.norm = nn.BatchNorm2d(6, dtype=dtype)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(96, 30, dtype=dtype), nn.ReLU(), nn.Linear(30, 5, dtype=dtype)
        )

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu())


def patterns_for(model, names=("conv", "head.1"), blocksize=(4, 4)):
    shapes = {"conv": (6, 18), "head.1": (30, 96), "head.3": (5, 30)}
    return {name: random_pattern(shapes[name], blocksize) for name in names}


def snapshot(model):
    return copy.deepcopy(model.state_dict()), [(name, type(module)) for name, module in model.named_modules()]


def assert_unchanged(model, before):
    state, modules = before
    assert modules == [(name, type(module)) for name, module in model.named_modules()]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def mask_(model, patterns):
    """Make ``model`` the masked dense twin of its sparse form."""
    with torch.no_grad():
        for name, pattern in patterns.items():
            weight = model.get_submodule(name).weight
            weight.mul_(weight_mask(pattern, weight))


def masked_step(model, optimizer, patterns, x):
    """A training step in which masked weights do not exist: no gradient, no state, no value."""
    optimizer.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    for name, pattern in patterns.items():
        weight = model.get_submodule(name).weight
        weight.grad.mul_(weight_mask(pattern, weight))
    optimizer.step()
    mask_(model, patterns)
    return loss.detach()


def sparse_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


def batches(count, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 4, 4, generator=generator, dtype=dtype) for _ in range(count)]


def test_there_and_back():
    model = Net().eval()
    patterns = patterns_for(model)
    twin = copy.deepcopy(model)
    mask_(twin, patterns)
    order = [name for name, _ in model.named_modules()]
    bias = model.conv.bias
    sparsify_(model, patterns)
    assert (type(model.conv), type(model.head[1]), type(model.head[3])) == (SparseConv2d, SparseLinear, nn.Linear)
    assert [name for name, _ in model.named_modules()] == order
    assert model.conv.bias is bias
    x = batches(1)[0]
    torch.testing.assert_close(model(x), twin(x))

    report = densify_(model)
    assert [row.name for row in report.converted] == ["conv", "head.1"]
    assert model.conv.bias is bias
    assert_unchanged(model, snapshot(twin))
    assert densify_(model).converted == ()


def test_report():
    model = Net()
    patterns = patterns_for(model, ("conv", "head.1"))
    report = sparsify_(model, patterns)
    kept, weights = sum(p.nnz for p in patterns.values()), 6 * 18 + 30 * 96
    assert report.sparsity == pytest.approx(1 - kept / weights)
    assert report.left_out == {"head.3": "not in patterns"}
    (conv, linear) = report.converted
    assert (conv.name, conv.kind, conv.shape, conv.blocksize) == ("conv", "conv2d", (6, 18), (4, 4))
    assert (linear.kind, linear.bias, linear.backend) == ("linear", True, "cpu")
    assert conv.density == patterns["conv"].density
    data = json.loads(json.dumps(report.as_dict()))
    assert data["sparsity"] == report.sparsity
    assert data["converted"][1]["density"] == patterns["head.1"].density
    text = str(report)
    assert "2 converted" in text
    assert "left out: head.3: not in patterns" in text
    assert f"{patterns['conv'].nnz:,} of 108" in text


def test_flags_hooks_and_modes_are_kept():
    model = Net()
    model.conv.eval().weight.requires_grad_(False)
    calls = []
    handle = model.head[1].register_forward_hook(lambda module, args, out: calls.append(type(module)))
    sparsify_(model, patterns_for(model))
    assert model.conv.training is False
    assert model.head[1].training is True
    assert model.conv.values.requires_grad is False
    model(batches(1)[0])
    assert calls == [SparseLinear]
    handle.remove()
    model(batches(1)[0])
    assert len(calls) == 1


class Patterns(dict):
    drop_bias = frozenset({"head.1"})


def test_a_dropped_bias_leaves_model_and_optimizer():
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)
    sparse_step(model, optimizer, batches(1)[0])
    model.head[1].bias.data.zero_()
    bias = model.head[1].bias
    report = sparsify_(model, Patterns(patterns_for(model)), optimizer)
    assert model.head[1].bias is None
    assert [row.bias for row in report.converted] == [True, False]
    names = [name for name, _ in model.named_parameters()]
    assert "head.1.bias" not in names
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert bias not in optimizer.state
    sparse_step(model, optimizer, batches(1)[0])
    with pytest.raises(RuntimeError, match=r"head\.1\.bias"):
        torch.optim.SGD([bias], 0.1).step()


@pytest.mark.parametrize(
    "patterns,error,message",
    [
        ({"nose": (30, 96)}, ValueError, "'nose', which is no module"),
        ({"head.1": (96, 30)}, ValueError, r"patterns\['head.1'\] must have shape \(30, 96\)"),
        ({"conv": (6, 2)}, ValueError, r"patterns\['conv'\] must have shape \(6, 18\)"),
        ({"": (6, 2)}, ValueError, "the model itself"),
    ],
)
def test_bad_patterns_change_nothing(patterns, error, message):
    model = Net()
    before = snapshot(model)
    given = patterns_for(model) | {name: random_pattern(shape, (1, 1)) for name, shape in patterns.items()}
    with pytest.raises(error, match=message):
        sparsify_(model, given)
    assert_unchanged(model, before)


def test_bad_arguments():
    model = Net()
    with pytest.raises(TypeError, match="patterns must be a mapping"):
        sparsify_(model, [random_pattern((6, 18), (1, 1))])
    with pytest.raises(TypeError, match=r"patterns\['conv'\] must be a BlockPattern"):
        sparsify_(model, {"conv": torch.ones(6, 18)})
    with pytest.raises(TypeError, match="model must be"):
        sparsify_(torch.relu, {})
    with pytest.raises(TypeError, match="optimizer must be"):
        sparsify_(model, patterns_for(model), "sgd")
    with pytest.raises(ValueError, match="no sparse layer"):
        densify_(model, names=["conv"])
    assert type(model.conv) is nn.Conv2d
    sparsify_(model, patterns_for(model))
    with pytest.raises(ValueError, match="'conv', which is sparse already"):
        sparsify_(model, patterns_for(model))
    assert sparsify_(model, {}).left_out["conv"] == "it is sparse already"
    with pytest.raises(ValueError, match="itself a sparse layer"):
        densify_(model.conv)


class Scaled(nn.Linear):
    pass


def odd_layers():
    """{name: (layer, what its reason says)}"""
    reflect = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    replaced, buffered, hooked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    replaced.forward = torch.relu
    buffered.register_buffer("scale", torch.ones(4))
    hooked.register_state_dict_pre_hook(lambda *args: None)
    integer = nn.Linear(4, 4)
    integer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return {
        "subclass": (Scaled(4, 4), "a Scaled, a subclass"),
        "lazy": (nn.LazyLinear(4), "lazy"),
        "parametrised": (parametrizations.orthogonal(nn.Linear(4, 4)), "parametrised"),
        "new_weight_norm": (parametrizations.weight_norm(nn.Linear(4, 4)), "parametrised"),
        "spectral": (nn.utils.spectral_norm(nn.Linear(4, 4)), "spectral-normed"),
        "pruned": (pruned, "pruned"),
        "reflect": (reflect, "padding_mode is 'reflect'"),
        "one_d": (nn.Conv1d(2, 2, 3), "a Conv1d; only"),
        "bilinear": (nn.Bilinear(2, 2, 2), "a Bilinear; only"),
        "replaced": (replaced, "forward is replaced"),
        "buffered": (buffered, "more than weight and bias: scale"),
        "hooked": (hooked, "state_dict hooks"),
        "integer": (integer, "torch.int8"),
    }


@pytest.mark.parametrize("name", odd_layers())
def test_what_is_left_out_and_why(name):
    layer, reason = odd_layers()[name]
    model = nn.ModuleDict({name: layer, "plain": nn.Linear(4, 4)})
    layers, reasons = convertible(model)
    assert list(layers) == ["plain"]
    assert reason in reasons[name]
    report = sparsify_(model, {name: random_pattern((4, 4), (2, 2)), "plain": random_pattern((4, 4), (2, 2))})
    assert reason in report.left_out[name]
    assert model[name] is layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_weight_norm_is_left_out():
    _, reasons = convertible(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))))
    assert "weight-normed" in reasons["0"]


def test_ties_attention_and_shared_modules_are_left_out():
    model = nn.Module()
    model.embed, model.out, model.a, model.b = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 4), nn.Linear(4, 4)
    model.out.weight = model.embed.weight
    model.b.weight.data = model.a.weight.data  # two Parameters, one memory
    model.one = model.two = nn.Linear(4, 4)
    model.attention = nn.MultiheadAttention(4, 2)
    model.tied_bias = nn.Linear(4, 4)
    model.tied_bias.bias = model.a.bias
    model.attention_of_users = nn.MultiheadAttention(4, 2)
    model.attention_of_users.out_proj = nn.Linear(4, 4)
    layers, reasons = convertible(model)
    assert list(layers) == ["tied_bias"]
    assert reasons["out"] == "its weight is tied to embed.weight"
    assert reasons["a"] == "its weight is tied to b.weight"
    assert reasons["one"] == "one module under several names, also two"
    assert reasons["two"] == "one module under several names, also one"
    assert "MultiheadAttention" in reasons["attention.out_proj"]
    assert "MultiheadAttention" in reasons["attention_of_users.out_proj"]
    assert "embed" not in reasons
    report = sparsify_(model, {"embed": random_pattern((9, 4), (1, 1)), "tied_bias": random_pattern((4, 4), (2, 2))})
    assert "Embedding" in report.left_out["embed"]
    assert model.tied_bias.bias is model.a.bias


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_training_goes_on_as_a_masked_dense_run(make):
    """5 masked dense steps, then 5 sparse ones with the optimizer taken along, equal 10 masked dense steps."""
    model = Net()
    patterns = patterns_for(model)
    mask_(model, patterns)
    twin = copy.deepcopy(model)
    optimizer, reference = make(model.parameters()), make(twin.parameters())
    data = batches(10)
    for x in data[:5]:
        masked_step(model, optimizer, patterns, x)
        masked_step(twin, reference, patterns, x)
    step_entries = [list(state) for state in optimizer.state.values()]
    sparsify_(model, patterns, optimizer)
    assert [list(state) for state in optimizer.state.values()] == step_entries
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    for x in data[5:]:
        torch.testing.assert_close(sparse_step(model, optimizer, x), masked_step(twin, reference, patterns, x))

    densify_(model, optimizer)
    for key, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        for key, entry in reference.state[theirs].items():
            torch.testing.assert_close(optimizer.state[mine][key], entry)
    masked_step(model, optimizer, patterns, data[0])


def test_groups_options_and_foreign_parameters_stay():
    model = Net()
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD(
        [{"params": [model.head[1].weight, other], "lr": 0.5}, {"params": [model.conv.weight]}], 0.1
    )
    sparsify_(model, patterns_for(model), optimizer)
    first, second = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(model.head[1].values), id(other)]
    assert second["params"][0] is model.conv.values
    assert (first["lr"], second["lr"]) == (0.5, 0.1)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_state_that_cannot_follow_is_refused(make):
    model = Net()
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(batches(1)[0]).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before, params = snapshot(model), [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=r"optimizer state '.*' of 'conv' .* cannot follow"):
        sparsify_(model, patterns_for(model), optimizer)
    assert_unchanged(model, before)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == params
    optimizer.step(closure)


def test_an_optimizer_left_behind_is_stopped():
    model = Net()
    left, bystander = torch.optim.Adam(model.parameters()), torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    sparsify_(model, patterns_for(model))
    with pytest.raises(RuntimeError, match=r"still holds .*\(conv\.weight, head\.1\.weight\)"):
        left.step()
    bystander.step()
    fresh = torch.optim.Adam(model.parameters())
    sparse_step(model, fresh, batches(1)[0])
    densify_(model)
    with pytest.raises(RuntimeError, match=r"conv\.values"):
        fresh.step()


def test_the_guard_holds_no_memory():
    gc.collect()
    before = len(_replaced)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify_(model, patterns_for(model))
    assert len(_replaced) == before + 2
    del optimizer
    gc.collect()
    assert len(_replaced) == before


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)
    pattern = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), (4, 4))
    with pytest.raises(ValueError, match="optimizer holds no parameter"):
        sparsify_(model, {"0": pattern}, torch.optim.SGD(other.parameters(), lr=0.1))
    assert type(model[0]) is nn.Linear


def test_the_report_counts_outputs_without_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    mask = torch.tensor([[True, False], [False, False]])
    report = sparsify_(model, {"0": BlockPattern.from_mask(mask, (4, 4))})
    assert report.converted[0].dead_outputs == 4
    assert "0: 4 of 8 outputs have no weight left" in str(report)
