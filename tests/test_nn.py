"""The layers by themselves: numbers against dense torch, and what a module has to survive."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsekern.nn import SparseConv2d, SparseLayer, SparseLinear, ddp_ignore_
from sparsekern.pattern import BlockPattern
from sparsekern.weights import weight_matrix

CONVS = {
    "plain": {},
    "grouped": {"groups": 2, "stride": 2, "padding": (1, 0)},
    "same": {"padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid", "bias": False},
}


def random_pattern(shape, blocksize, seed=0, density=0.5):
    rows, cols = (-(-n // b) for n, b in zip(shape, blocksize, strict=True))
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    mask[0, 0] = mask[-1, -1] = True  # the corner is where blocks overhang on both sides
    return BlockPattern.from_mask(mask, blocksize, shape)


def linear(blocksize=(4, 3), seed=0, **kwargs):
    return SparseLinear(10, 7, pattern=random_pattern((7, 10), blocksize, seed), **kwargs)


def conv(**kwargs):
    groups = kwargs.get("groups", 1)
    return SparseConv2d(4, 6, 3, pattern=random_pattern((6, 36 // groups), (4, 4)), **kwargs)


def masked(dense, pattern):
    """A copy of ``dense`` whose weights outside ``pattern`` are 0."""
    dense = copy.deepcopy(dense)
    with torch.no_grad():
        dense.weight.copy_(dense.weight * (weight_mask(pattern, dense.weight)))
    return dense


def weight_mask(pattern, weight):
    mask = pattern.to_element_mask()
    if weight.dim() == 2:
        return mask
    out, per_group, kh, kw = weight.shape
    return mask.view(out, kh, kw, per_group).permute(0, 3, 1, 2)


def same_gradients(layer, dense, x):
    pairs = []
    for module in (layer, dense):
        x_ = x.clone().requires_grad_()
        y = module(x_)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        pairs.append((y, x_.grad, None if module.bias is None else module.bias.grad))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(layer.values.grad, layer.pattern.gather(weight_matrix(dense.weight.grad)))


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 3), (7, 10)])
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10)])
def test_linear_equals_masked_dense(blocksize, shape):
    pattern = random_pattern((7, 10), blocksize)
    dense = nn.Linear(10, 7, dtype=torch.float64)
    layer = SparseLinear.from_dense(dense, pattern)
    same_gradients(layer, masked(dense, pattern), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("shape", [(4, 9, 8), (3, 4, 9, 8)])
def test_conv_equals_masked_dense(options, shape):
    dense = nn.Conv2d(4, 6, 3, dtype=torch.float64, **options)
    pattern = random_pattern(tuple(weight_matrix(dense.weight).shape), (4, 4))
    layer = SparseConv2d.from_dense(dense, pattern)
    same_gradients(layer, masked(dense, pattern), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_conv_takes_the_arguments_of_torch(options):
    dense = nn.Conv2d(4, 6, 3, **options)
    layer = conv(**options)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert [getattr(layer, name) for name in names] == [getattr(dense, name) for name in names]
    assert (layer.bias is None) == (dense.bias is None)
    assert repr(dense).removeprefix("Conv2d(").split(",")[0] in repr(layer)


def test_nothing_beyond_the_edge_is_read_or_written():
    layer = linear()
    edge = layer.pattern.edge_mask()
    assert not edge.all()
    assert not layer.values[~edge].any()
    x = torch.randn(5, 10)
    expected = layer(x)
    with torch.no_grad():
        layer.values[~edge] = torch.nan
    y = layer(x.requires_grad_())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert not layer.values.grad[~edge].any()
    assert layer.values.grad.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.to_dense().weight.isfinite().all()


def test_fresh_weights_are_those_of_a_masked_dense_layer():
    pattern = random_pattern((400, 300), (8, 8), density=0.2)
    torch.manual_seed(0)
    layer, dense = SparseLinear(300, 400, pattern=pattern), nn.Linear(300, 400)
    kept = layer.values[pattern.edge_mask()]
    bound = 300**-0.5
    for mine, theirs in ((kept, dense.weight), (layer.bias, dense.bias)):
        assert mine.abs().max() <= bound
        torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.1, atol=0)


def test_constructor_errors():
    pattern = random_pattern((7, 10), (4, 3))
    with pytest.raises(TypeError, match="pattern must be a BlockPattern, got Tensor"):
        SparseLinear(10, 7, pattern=torch.ones(7, 10))
    with pytest.raises(ValueError, match=r"pattern must have shape \(7, 11\)"):
        SparseLinear(11, 7, pattern=pattern)
    with pytest.raises(ValueError, match="backend must be one of"):
        SparseLinear(10, 7, pattern=pattern, backend="cuda")
    with pytest.raises(ValueError, match="padding_mode"):
        conv(padding_mode="reflect")
    with pytest.raises(ValueError, match="divisible by groups"):
        SparseConv2d(4, 6, 3, groups=3, pattern=pattern)
    with pytest.raises(AttributeError):
        linear().pattern = pattern


def test_from_dense_keeps_what_belongs_to_a_layer_and_refuses_others():
    dense = nn.Linear(10, 7, dtype=torch.float64).eval()
    dense.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(dense, random_pattern((7, 10), (4, 3)), backend="reference")
    assert (layer.training, layer.values.requires_grad, layer.bias.requires_grad) == (False, False, True)
    assert (layer.values.dtype, layer.backend) == (torch.float64, "reference")
    assert layer.bias is not dense.bias
    back = layer.to_dense()
    assert (back.training, back.weight.requires_grad, back.bias.requires_grad) == (False, False, True)
    assert torch.equal(back.weight, masked(dense, layer.pattern).weight)
    assert type(back) is nn.Linear

    with pytest.raises(TypeError, match=r"torch\.nn\.Conv2d, got Linear"):
        SparseConv2d.from_dense(dense, layer.pattern)
    with pytest.raises(ValueError, match="parametrised"):
        SparseLinear.from_dense(nn.utils.parametrizations.weight_norm(nn.Linear(10, 7)), layer.pattern)


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_conv_to_dense_inverts_from_dense(options):
    dense = nn.Conv2d(4, 6, 3, **options)
    pattern = random_pattern(tuple(weight_matrix(dense.weight).shape), (4, 4))
    back = SparseConv2d.from_dense(dense, pattern).to_dense()
    assert torch.equal(back.weight, masked(dense, pattern).weight)
    assert back.__getstate__().keys() == dense.__getstate__().keys()
    assert repr(back) == repr(dense)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
@pytest.mark.parametrize("make", [linear, conv])
def test_copies(make, copied):
    layer = make()
    x = torch.randn(10) if make is linear else torch.randn(4, 8, 8)
    twin = copied(layer)
    assert twin.pattern == layer.pattern
    assert twin.pattern._plans.keys() == layer.pattern._plans.keys() != set()  # planned at once, not in forward
    assert torch.equal(twin(x), layer(x))
    if copied is not copy.copy:
        with torch.no_grad():
            twin.values.zero_()
        assert layer.values.any()


def test_dtype_and_device_moves_leave_indices_alone():
    layer = linear()
    values = layer.values
    for move, dtype in (
        (nn.Module.double, torch.float64),
        (nn.Module.half, torch.float16),
        (lambda m: m.type(torch.float64), torch.float64),  # would cast the index buffers too
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ):
        move(layer)
        assert layer.values is values
        assert layer.values.dtype == dtype
        assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
        assert torch.equal(layer.col_indices, layer.pattern.col_indices)
        assert layer(torch.ones(10, dtype=dtype)).dtype == dtype
    layer.to_empty(device="cpu")
    assert torch.equal(layer.crow_indices, layer.pattern.crow_indices)


def test_meta_device():
    layer = linear(device="meta")
    assert layer.values.is_meta
    assert layer.crow_indices.is_meta
    full = linear()
    layer.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), full(x))
    assert torch.equal(layer.crow_indices, full.crow_indices)
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.col_indices, full.col_indices)


def test_ordinary_parameters():
    layer = linear()
    vector = nn.utils.parameters_to_vector(layer.parameters())
    assert vector.numel() == layer.values.numel() + 7
    nn.utils.vector_to_parameters(vector * 2, layer.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(layer.parameters()), vector * 2)
    assert layer.requires_grad_(False).values.requires_grad is False
    replaced = {"values": torch.zeros_like(layer.values), "bias": torch.ones(7)}
    assert torch.equal(torch.func.functional_call(layer, replaced, torch.randn(10)), torch.ones(7))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("other_seed", [0, 1])
def test_state_dict_round_trip_also_to_another_pattern(assign, other_seed):
    layer, other = linear(), linear(seed=other_seed)
    assert (layer.pattern == other.pattern) == (other_seed == 0)
    assert list(layer.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    values = other.values
    other(torch.randn(10)).sum().backward()
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert other.pattern == layer.pattern
    assert torch.equal(other.values, layer.values)
    assert (other.values is values) == (not assign and other_seed == 0)
    assert other_seed == 0 or other.values.grad is None
    assert torch.equal(other.col_indices, layer.col_indices)
    assert other.col_indices.data_ptr() != layer.col_indices.data_ptr()
    x = torch.randn(2, 10)
    assert torch.equal(other(x), layer(x))
    other.zero_grad()
    other(x).sum().backward()
    assert other.values.grad.shape == layer.values.shape


@pytest.mark.parametrize("assign", [False, True])
def test_loading_another_pattern_leaves_the_old_parameter_to_its_holders(assign):
    layer, other = linear(), linear(seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
    layer(torch.randn(3, 10)).sum().backward()
    optimizer.step()
    x = torch.randn(3, 10, requires_grad=True)
    y, old, before = layer(x).sum(), layer.values, layer.values.detach().clone()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(old, before)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)
    with pytest.raises(RuntimeError, match="still holds parameters"):
        optimizer.step()


def test_values_that_cannot_be_copied_change_nothing():
    layer, other = linear(), linear(seed=1)
    pattern, before = layer.pattern, layer.values.detach().clone()
    state = other.state_dict()
    state["values"] = state["values"].to("meta")
    with pytest.raises(RuntimeError, match="values cannot be copied"):
        layer.load_state_dict(state)
    assert layer.pattern is pattern
    assert torch.equal(layer.values, before)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(grad):
    """Not answered with zeros, which is what an op without a rule gives."""
    layer = linear()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
        torch.func.jvp(layer, (torch.randn(2, 10),), (torch.ones(2, 10),))


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("make", [linear, conv])
def test_a_bias_that_is_no_parameter_of_the_layer_any_more(make):
    layer, x = make(), torch.randn((10,) if make is linear else (4, 8, 8))
    expected, bias = layer(x), layer.bias.detach().clone()
    shape = (-1,) if make is linear else (-1, 1, 1)
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    assert "bias" not in layer._parameters
    torch.testing.assert_close(layer(x), expected + bias.view(shape))
    pruned = make()
    pruned.load_state_dict({**pruned.state_dict(), "bias": bias})
    prune.custom_from_mask(pruned, "bias", torch.zeros_like(bias))
    y = pruned(x)
    prune.remove(pruned, "bias")
    assert torch.equal(pruned(x), y)


def test_load_state_dict_takes_int64_and_other_dtypes():
    layer = linear()
    state = {key: t.long() if "indices" in key else t.double() for key, t in layer.state_dict().items()}
    other = linear(seed=1)
    other.load_state_dict(state, assign=True)
    assert other.col_indices.dtype == torch.int32
    assert other.values.dtype == torch.float64
    assert other.pattern == layer.pattern


def broken(state, name, change):
    return state | {name: change(state[name].clone())}


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


BROKEN = {
    "column out of range": ("col_indices", put(0, 99), r"fc\.col_indices.*must be in \[0, 4\)"),
    "negative column": ("col_indices", put(0, -1), r"fc\.col_indices.*must be in \[0, 4\)"),
    "rows decrease": ("crow_indices", put(1, 99), r"fc\.crow_indices.*must not decrease"),
    "float indices": ("col_indices", torch.Tensor.float, r"fc\.col_indices.*int32 or int64, got torch\.float32"),
    "indices cut short": ("col_indices", lambda t: t[:-1], r"fc\.crow_indices.*must end with"),
    "values cut short": ("values", lambda t: t[:-1], r"fc\.values must have shape"),
    "values of another block": ("values", lambda t: t.transpose(1, 2), r"fc\.values must have shape"),
    "overhang not 0": ("values", put((-1, -1, -1), 1.0), r"fc\.values is not 0 where blocks overhang"),
    "overhang NaN": ("values", put((-1, -1, -1), torch.nan), r"fc\.values is not 0 where blocks overhang"),
    "bias of another size": ("bias", lambda t: t[:-1], r"fc\.bias must have shape \(7,\), got \(6,\)"),
    "no tensor": ("values", torch.Tensor.tolist, r"fc\.values must be a tensor, got list"),
}


@pytest.mark.parametrize("name,change,message", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_broken_state_dict_changes_nothing(name, change, message, seed):
    model = nn.ModuleDict({"fc": linear(seed=seed)})
    before = copy.deepcopy(model.state_dict())
    state = nn.ModuleDict({"fc": linear()}).state_dict()
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(broken(state, f"fc.{name}", change))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert torch.equal(model["fc"].pattern.col_indices, before["fc.col_indices"])


def test_a_pattern_changes_only_as_a_whole():
    layer, other = linear(), linear(seed=1)
    state = other.state_dict()
    for lacking in ("values", "crow_indices", "col_indices"):
        part = {key: tensor for key, tensor in state.items() if key != lacking}
        with pytest.raises(RuntimeError, match=r"come together|crow_indices|overhang"):
            layer.load_state_dict(part, strict=False)
    assert layer.pattern != other.pattern
    own = {"values": torch.zeros_like(layer.values)}
    missing = layer.load_state_dict(own, strict=False).missing_keys
    assert missing == ["bias", "crow_indices", "col_indices"]
    assert not layer.values.any()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(own)


def test_ddp_ignore_lists_the_index_buffers_once():
    model = nn.Sequential(linear(), nn.Sequential(conv()), nn.BatchNorm2d(6))
    model._ddp_params_and_buffers_to_ignore = ["2.running_mean"]
    ddp_ignore_(model)
    ddp_ignore_(model)
    names = ["0.crow_indices", "0.col_indices", "1.0.crow_indices", "1.0.col_indices"]
    assert model._ddp_params_and_buffers_to_ignore == ["2.running_mean", *names]
    buffers = dict(model.named_buffers())
    assert set(names) <= buffers.keys()
    assert set(SparseLayer._ddp_params_and_buffers_to_ignore) == dict(linear().named_buffers()).keys()


def test_repr_states_density():
    layer = linear()
    assert f"density={layer.pattern.density:.4g}" in repr(layer)
    assert "blocksize=(4, 3)" in repr(layer)


@pytest.mark.parametrize("shape, kernel", [((3, 6), 3), ((3, 6), 1), ((8, 1), 3), ((8, 1), 1)])
def test_memory_format_is_that_of_torchs_layer(shape, kernel):
    """Whether it is asked for before the layer is sparse or after, of grey images, too, which are in both formats."""
    (outputs, inputs), last = shape, torch.channels_last
    plain = nn.Conv2d(inputs, outputs, kernel, padding=1)
    pattern = BlockPattern.from_dense(torch.ones(outputs, inputs * kernel**2), (2, 1))
    dense = copy.deepcopy(plain).to(memory_format=last)
    before, after = SparseConv2d.from_dense(dense, pattern), SparseConv2d.from_dense(plain, pattern)
    after.to(memory_format=last)
    x = torch.randn(2, inputs, 5, 5)
    wanted = dense(x).stride()
    copies = (copy.deepcopy(after), pickle.loads(pickle.dumps(after)), after.double().float(), after.to_dense())
    for layer in (before, after, *copies):
        assert layer(x).stride() == wanted and layer(x[0]).stride() == dense(x[0]).stride()
        torch.testing.assert_close(layer(x), before(x))
    for backend in ("dense", "reference"):
        before.backend = backend
        assert before(x).stride() == wanted
    after.to(memory_format=torch.contiguous_format)
    assert after(x).is_contiguous()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(before(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(after(x).square().sum(), x)[0])
