"""save and load_: round trips into any model of the same build, and files that must not get in."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_convert import Net, Patterns, assert_unchanged, batches, patterns_for, snapshot, sparse_step
from test_nn import linear, random_pattern
from torch import nn

from sparsekern.checkpoint import load_, save
from sparsekern.convert import densify_, sparsify_
from sparsekern.nn import SparseLinear
from sparsekern.pattern import BlockPattern


def trained(dtype=torch.float64):
    model = Net(dtype)
    patterns = patterns_for(model)
    sparsify_(model, patterns)
    sparse_step(model, torch.optim.SGD(model.parameters(), 0.01), batches(1, dtype=dtype)[0])
    return model.eval(), patterns


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def dense(model, patterns):
    pass


def same_pattern(model, patterns):
    sparsify_(model, patterns)


def other_patterns(model, patterns):
    """Another blocksize, another layer sparse, one layer dense."""
    sparsify_(model, patterns_for(model, ("head.1", "head.3"), (2, 3)))


def other_places(model, patterns):
    twins = {name: random_pattern(pattern.shape, pattern.blocksize, seed=9) for name, pattern in patterns.items()}
    sparsify_(model, twins)


@pytest.mark.parametrize("prepare", [dense, same_pattern, other_patterns, other_places])
def test_round_trip(tmp_path, prepare):
    saved, patterns = trained()
    save(saved, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    model = Net()
    prepare(model, patterns)
    values = model.conv.values if prepare is same_pattern else None
    load_(model.eval(), str(tmp_path / "model.safetensors"))
    assert_unchanged(model, snapshot(saved))
    assert model.conv.pattern == patterns["conv"]
    assert values is None or model.conv.values is values
    x = batches(1)[0]
    assert torch.equal(model(x), saved(x))


def test_the_file_is_plain(tmp_path):
    saved, _ = trained()
    save(saved, tmp_path / "m")
    tensors, metadata = read(tmp_path / "m")
    assert tensors.keys() == saved.state_dict().keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in saved.state_dict().items())
    assert metadata["format_version"] == "1"
    layer = {"type": "conv2d", "shape": [6, 18], "blocksize": [4, 4], "kernel_size": [3, 3], "groups": 1, "bias": True}
    assert json.loads(metadata["layers"])["conv"] == layer
    assert json.loads(metadata["layers"])["head.1"]["kernel_size"] is None


def test_dtype_follows_the_model(tmp_path):
    saved, _ = trained()
    save(saved, tmp_path / "m")
    model = Net(torch.float32)
    load_(model, tmp_path / "m")
    assert model.conv.values.dtype == torch.float32
    torch.testing.assert_close(model.conv.values.double(), saved.conv.values, rtol=1e-6, atol=1e-6)


def test_a_dense_model_and_a_dropped_bias(tmp_path):
    save(Net(), tmp_path / "dense")
    model, _ = trained()
    load_(model, tmp_path / "dense")
    assert type(model.conv) is nn.Conv2d

    saved = Net()
    sparsify_(saved, Patterns(patterns_for(saved)))
    save(saved, tmp_path / "no-bias")
    load_(model, tmp_path / "no-bias")
    assert model.head[1].bias is None
    assert_unchanged(model, snapshot(saved))


def test_tied_tensors_and_views(tmp_path):
    def build():
        model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False), "fc": nn.Linear(10, 7)})
        model["out"].weight = model["embed"].weight
        model.register_buffer("view", torch.arange(10.0)[::3])
        return model

    saved = build()
    sparsify_(saved, {"fc": random_pattern((7, 10), (4, 3))})
    save(saved, tmp_path / "m")
    tensors, metadata = read(tmp_path / "m")
    assert json.loads(metadata["aliases"]) == {"out.weight": "embed.weight"}
    assert "out.weight" not in tensors
    model = build()
    load_(model, tmp_path / "m")
    assert model["out"].weight is model["embed"].weight
    assert_unchanged(model, snapshot(saved))


def test_a_layer_by_itself(tmp_path):
    layer = linear()
    save(layer, tmp_path / "m")
    twin = linear()
    load_(twin, tmp_path / "m")
    assert torch.equal(twin.values, layer.values)
    for model in (nn.Linear(10, 7), linear(seed=1)):
        with pytest.raises(ValueError, match="cannot be done in place"):
            load_(model, tmp_path / "m")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model, _ = trained()
    save(model, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    densify_(model)
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


class Stateful(nn.Module):
    def get_extra_state(self):
        return {"steps": 3}


def test_extra_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'0\._extra_state' is a dict"):
        save(nn.Sequential(Stateful()), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def tensor(key, change):
    def edit(tensors, metadata):
        tensors[key] = change(tensors[key].clone()).contiguous()

    return edit


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def drop(key):
    return lambda tensors, metadata: tensors.pop(key)


def meta(name, value):
    return lambda tensors, metadata: metadata.update({name: value})


def layer(name, **fields):
    def edit(tensors, metadata):
        layers = json.loads(metadata["layers"])
        layers[name] = layers.get(name, layers["head.1"]) | fields
        metadata["layers"] = json.dumps(layers)

    return edit


def no_metadata(tensors, metadata):
    metadata.clear()


def no_field(tensors, metadata):
    layers = json.loads(metadata["layers"])
    del layers["conv"]["groups"]
    metadata["layers"] = json.dumps(layers)


HOSTILE = {
    "no metadata": (no_metadata, "format_version must be '1', got None"),
    "future version": (meta("format_version", "2"), "format_version must be '1', got '2'"),
    "broken JSON": (meta("layers", "{"), "'layers' is missing or no JSON"),
    "JSON bomb": (meta("layers", "[" * 100_000), "'layers' is missing or no JSON"),
    "JSON list": (meta("layers", "[]"), "'layers' must be a JSON object"),
    "layer is a list": (meta("layers", '{"conv": []}'), "'conv' must be an object"),
    "field missing": (no_field, "'conv' must be an object with the keys"),
    "field unknown": (layer("conv", colour=1), "'conv' must be an object with the keys"),
    "kind unknown": (layer("conv", type="conv3d"), "'conv' is neither"),
    "kind of another layer": (layer("head.1", type="conv2d", kernel_size=[1, 1], groups=1), "'head.1' must be"),
    "groups": (layer("conv", groups=2), "'conv' must be"),
    "groups as text": (layer("conv", groups="1"), "'conv' is neither"),
    "kernel size": (layer("conv", kernel_size=[9, 1]), "'conv' must be"),
    "kernel size missing": (layer("conv", kernel_size=None), "'conv' must be"),
    "bias as number": (layer("conv", bias=1), "'conv' is neither"),
    "negative blocksize": (layer("conv", blocksize=[-4, 4]), "'conv': blocksize must be at least 1"),
    "zero blocksize": (layer("conv", blocksize=[4, 0]), "'conv': blocksize must be at least 1"),
    "huge blocksize": (layer("conv", blocksize=[2**31, 4]), "'conv': blocksize must fit int32"),
    "huge count": (layer("conv", shape=[2**31 - 1, 2**31 - 1]), "'conv': crow_indices must have"),
    "beyond 64 bits": (layer("conv", shape=[10**30, 18]), "'conv': shape must fit int32"),
    "float size": (layer("conv", shape=[6.0, 18]), "two integers for a size"),
    "true as size": (layer("conv", blocksize=[True, 4]), "two integers for a size"),
    "three sizes": (layer("conv", blocksize=[4, 4, 1]), "two integers for a size"),
    "other shape": (layer("head.1", shape=[32, 96]), "'head.1' must be"),
    "other blocksize": (layer("head.1", blocksize=[4, 2]), "'head.1': col_indices|head.1.values must have shape"),
    "no such layer": (meta("layers", "{}"), "lacks conv.weight, head.1.weight"),
    "unknown layer": (layer("nose"), "lacks nose.crow_indices"),
    "dense layer": (layer("head.3"), "lacks head.3.crow_indices"),
    "columns out of range": (tensor("conv.col_indices", put(0, 1000)), "'conv': col_indices must be in"),
    "columns negative": (tensor("conv.col_indices", put(0, -1)), "'conv': col_indices must be in"),
    "columns float": (tensor("conv.col_indices", torch.Tensor.float), "'conv': col_indices must be int32 or int64"),
    "columns 2-D": (tensor("conv.col_indices", lambda t: t[None]), "'conv': col_indices must be 1-D"),
    "rows decrease": (tensor("conv.crow_indices", put(1, 99)), "'conv': crow_indices must not decrease"),
    "rows missing": (drop("conv.crow_indices"), "lacks conv.crow_indices"),
    "values missing": (drop("conv.values"), "lacks conv.values"),
    "values flat": (tensor("conv.values", torch.Tensor.flatten), "conv.values must have shape"),
    "overhang NaN": (tensor("conv.values", put((-1, -1, -1), torch.nan)), "conv.values is not 0 where"),
    "overhang 1": (tensor("head.1.values", put((-1, -1, -1), 1.0)), "head.1.values is not 0 where"),
    "bias missing": (drop("conv.bias"), "lacks conv.bias"),
    "bias of another size": (tensor("conv.bias", lambda t: t[:-1]), "conv.bias must have shape"),
    "dense weight missing": (drop("head.3.weight"), "lacks head.3.weight"),
    "dense weight of another shape": (tensor("head.3.weight", torch.t), "head.3.weight must have shape"),
    "buffer as float": (tensor("norm.num_batches_tracked", torch.Tensor.float), "norm.num_batches_tracked must be"),
    "extra tensor": (lambda tensors, metadata: tensors.update(x=torch.ones(1)), "has unknown x"),
    "alias to nothing": (meta("aliases", '{"a": "b"}'), "'a' cannot stand for 'b'"),
    "alias of a list": (meta("aliases", '{"a": ["b"]}'), "'a' cannot stand for"),
    "alias over a tensor": (meta("aliases", '{"conv.bias": "norm.bias"}'), "'conv.bias' cannot stand for"),
}


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "m"
    save(trained()[0], path)
    return path


@pytest.mark.parametrize("edit,message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_change_nothing(tmp_path, good_file, edit, message):
    tensors, metadata = read(good_file)
    edit(tensors, metadata)
    save_file(tensors, tmp_path / "m", metadata)
    for prepare in (dense, other_patterns):
        model = Net()
        prepare(model, None)
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_(model, tmp_path / "m")
        assert_unchanged(model, before)


def test_damaged_files(tmp_path, good_file):
    data = good_file.read_bytes()
    for name, content in (("empty", b""), ("text", b"hello world"), ("cut", data[:-9]), ("header", data[:50])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a readable safetensors file"):
            load_(Net(), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_(Net(), tmp_path / "nowhere")


def test_a_model_that_cannot_take_the_file(tmp_path, good_file):
    model = Net()
    model.conv.padding_mode = "reflect"
    with pytest.raises(ValueError, match="'conv' cannot be sparse in this model: padding_mode"):
        load_(model, good_file)
    model = Net()
    model.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match="'conv' must be"):
        load_(model, good_file)
    model = Net()
    sparsify_(model, patterns_for(model, blocksize=(2, 2)))
    model.again = model.head[1]
    with pytest.raises(ValueError, match="several names"):
        load_(model, good_file)
    assert type(model.again) is SparseLinear


def test_layers_and_their_optimizers_survive_a_failure_half_way(tmp_path, monkeypatch):
    torch.manual_seed(0)
    saved, model = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)) for _ in range(2))
    pattern = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), (4, 4))
    sparsify_(saved, {"0": pattern})
    save(saved, tmp_path / "m")
    layers, optimizer = list(model), torch.optim.SGD(model.parameters(), lr=0.1)

    def fail(state):
        raise MemoryError

    monkeypatch.setattr(model, "load_state_dict", fail)
    with pytest.raises(MemoryError):
        load_(model, tmp_path / "m")
    assert list(model) == layers
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
