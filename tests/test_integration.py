"""Sparse layers inside the rest of torch: compile, autocast, transformers, DistributedDataParallel."""

import copy

import pytest
import torch
import torch.multiprocessing
from test_convert import Net, batches, patterns_for, sparse_step
from test_nn import conv, linear, random_pattern
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsekern import functional
from sparsekern.convert import densify_, sparsify_

INPUTS = {
    "linear": (linear, lambda n: torch.randn(n, 10)),
    "conv": (lambda: conv(padding=1), lambda n: torch.randn(n, 4, 6, 5)),
    "grouped": (lambda: conv(groups=2, stride=2), lambda n: torch.randn(n, 4, 7, 6)),
    "model": (lambda: sparse_net(torch.float32), lambda n: torch.randn(n, 2, 4, 4)),
}


def sparse_net(dtype=torch.float64):
    """Without batch norm: it fixes the batch size when traced, and its statistics differ between 1 and 2 processes."""
    torch.manual_seed(3)
    model = Net(dtype)
    model.norm = nn.Identity()
    sparsify_(model, patterns_for(model))
    return model


def forward_backward(call, parameters, x):
    x = x.clone().requires_grad_()
    y = call(x)
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *parameters])
    return [y, *grads]


def check_compiled(name, backend):
    make, inputs = INPUTS[name]
    torch.compiler.reset()
    layer = make()
    frames = []

    def counted(graph, example):
        frames.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=counted, dynamic=True)
    for n in (13, 2, 7, 3):  # the first equals no other size, or torch takes the two for one
        x = inputs(n)
        mine = forward_backward(compiled, list(compiled.parameters()), x)
        torch.testing.assert_close(mine, forward_backward(layer, list(layer.parameters()), x))
    assert len(frames) == 1  # one graph for every batch size


# torch's own tracing of autograd Functions warns of itself.
own_warning = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@own_warning
@pytest.mark.parametrize("name", INPUTS)
def test_compile_as_one_graph_with_a_dynamic_batch(name):
    check_compiled(name, "aot_eager")


@own_warning
@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_compile_with_inductor(name):
    check_compiled(name, "inductor")


def test_compiled_optimizer_step_passes_the_guard():
    model = sparse_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=True)
    model(batches(1)[0]).sum().backward()
    before = model.conv.values.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(model.conv.values, before)


@pytest.mark.parametrize("name", INPUTS)
def test_autocast(name):
    make, inputs = INPUTS[name]
    layer, x = make(), inputs(6)
    exact = forward_backward(layer, list(layer.parameters()), x)
    parameters = list(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    mine = [y.float(), *torch.autograd.grad((y.float() * weights).sum(), [x, *parameters])]
    assert [grad.dtype for grad in mine] == [torch.float32] * len(mine)
    for low, full in zip(mine, exact, strict=True):
        assert (low - full).norm() <= 0.05 * full.norm() + 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype):
    layer = linear()
    low = copy.deepcopy(layer).to(dtype)
    x = torch.randn(4, 10)
    low(x.to(dtype)).sum().backward()
    assert low.values.grad.dtype == dtype
    torch.testing.assert_close(low(x.to(dtype)).float(), layer(x), rtol=0.02, atol=0.02)


# ---- transformers ---------------------------------------------------------------------------------------------------


def encoder(layers=2, **kwargs):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, layers)


def encoder_patterns(*layers):
    return {
        f"layers.{i}.{name}": random_pattern(shape, (4, 4), seed=i)
        for i in layers
        for name, shape in (("linear1", (16, 8)), ("linear2", (8, 16)))
    }


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("sparse", [(0, 1), (1,)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_in_evaluation(sparse, activation, monkeypatch):
    """The fused evaluation paths read dense weights: sparse layers must not reach them, dense ones get them back."""
    model = encoder(activation=activation).eval()
    report = sparsify_(model, encoder_patterns(*sparse))
    assert len(report.converted) == 2 * len(sparse)
    assert "MultiheadAttention" in report.left_out["layers.0.self_attn.out_proj"]
    calls = []
    bsr_linear = functional.bsr_linear
    monkeypatch.setattr(functional, "bsr_linear", lambda *args, **kw: calls.append(1) or bsr_linear(*args, **kw))
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    with torch.no_grad():
        plain, padded = model(x), model(x, src_key_padding_mask=padding)
        assert len(calls) == 2 * 2 * len(sparse)
        assert torch.equal(copy.deepcopy(model)(x), plain)

    densify_(model)
    assert model.use_nested_tensor
    assert all(layer.activation_relu_or_gelu == (1 if activation == "relu" else 2) for layer in model.layers)
    with torch.no_grad():
        torch.testing.assert_close(plain, model(x))
        # The fused path writes 0 at padded places, the plain one does not.
        torch.testing.assert_close(padded[~padding], model(x, src_key_padding_mask=padding)[~padding])


def test_transformer_encoder_layer_trains():
    model = encoder(1)
    dense = copy.deepcopy(model)
    patterns = encoder_patterns(0)
    sparsify_(model, patterns)
    twin = copy.deepcopy(model)
    densify_(twin)
    x = torch.randn(3, 5, 8)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    pattern = patterns["layers.0.linear1"]
    torch.testing.assert_close(model.layers[0].linear1.values.grad, pattern.gather(twin.layers[0].linear1.weight.grad))
    assert not torch.equal(model(x), dense(x))


# ---- DistributedDataParallel ----------------------------------------------------------------------------------------


def ddp_train(model, module, share):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for x in batches(20):
        optimizer.zero_grad()
        module(torch.cat([x, -x])[share]).square().mean().backward()
        optimizer.step()


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = sparse_net()
    wrapped = DistributedDataParallel(model)
    assert not [name for name in wrapped.named_module_buffers if "indices" in name]
    buffers = dict(model.named_buffers())
    versions = {name: buffer._version for name, buffer in buffers.items()}
    ddp_train(model, wrapped, slice(rank * 3, rank * 3 + 3))
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert {name: buffer._version for name, buffer in buffers.items()} == versions
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_data_parallel_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = sparse_net()
    start = copy.deepcopy(alone.state_dict())
    ddp_train(alone, alone, slice(None))
    for key, tensor in alone.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], tensor)
    assert not torch.equal(first["conv.values"], start["conv.values"])


def test_gradient_checkpointing_and_accumulation():
    model = sparse_net()
    x = batches(1)[0]
    y = torch.utils.checkpoint.checkpoint(model.head, model.conv(x).relu(), use_reentrant=False)
    y.sum().backward()
    once = model.conv.values.grad.clone()
    model.head(model.conv(x).relu()).sum().backward()
    torch.testing.assert_close(model.conv.values.grad, 2 * once)
    sparse_step(model, torch.optim.SGD(model.parameters(), 0.1), x)
