"""``backend="dense"``, and layers whose "auto" has chosen it: still ordinary sparse layers."""

import copy
import pickle

import pytest
import torch
from samples import BLOCKSIZES, small_problems
from test_nn import conv, linear, random_pattern
from torch import nn

import sparsekern as sk
from sparsekern import cost, dense
from sparsekern.cost.model import NAMES
from sparsekern.cost.table import Table, machine
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.weights import weight_matrix


def prices(per_unit):
    """A table whose coefficients are what ``per_unit`` says of their names."""
    return Table({name: float(per_unit(name)) for name in NAMES}, machine(), 0.0, 0.0, 1.0)


@pytest.fixture
def dense_wins(monkeypatch):
    monkeypatch.setattr(cost, "current", lambda: prices(lambda name: ".sparse." in name))


@pytest.fixture
def density_decides(monkeypatch):
    """The kernels win below a density of 1/2."""
    table = prices(
        lambda name: 1.0 if name.endswith(".dense.forward.weight") else 2.0 * name.endswith(".sparse.forward.value")
    )
    monkeypatch.setattr(cost, "current", lambda: table)


@pytest.mark.parametrize("kernel", [None, (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
def test_the_weight_is_the_scattered_pattern(blocksize, kernel):
    pattern = random_pattern((6, 28), blocksize)
    values = torch.randn(pattern.values_shape)
    weight = dense.weight(values, pattern, kernel)
    assert torch.equal(weight_matrix(weight), pattern.scatter(values))
    assert weight.is_contiguous()


@pytest.mark.parametrize("p", list(small_problems()), ids=lambda p: p.name)
def test_gradients_of_first_and_second_order(p):
    leaves = [t.nan_to_num(0).clone().requires_grad_() for t in (p.x, p.values, p.bias) if t is not None]

    def function(x, values, bias=None):
        return p.call(x, values, bias, "dense")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("make", [linear, conv])
def test_an_explicit_choice_is_taken_at_its_word(make):
    layer, twin = make(backend="dense", dtype=torch.float64), make(backend="cpu", dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert (layer.runs, twin.runs) == ("dense", "cpu")
    x = torch.randn((5, 10) if make is linear else (2, 4, 6, 5), dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(x))
    twin.backend = "dense"
    assert twin.runs == "dense"
    assert torch.equal(layer(x), twin(x))
    with pytest.raises(ValueError, match=r"backend must be one of auto, cpu, .*dense, reference, got 'cuda'"):
        twin.backend = "cuda"
    assert (twin.backend, twin.runs) == ("dense", "dense")


@pytest.mark.parametrize("make", [linear, conv])
def test_auto_runs_dense_where_that_is_faster(make, dense_wins):
    layer = make()
    assert (layer.backend, layer.runs) == ("auto", "dense")
    assert None not in layer.pattern._plans  # the plans of the kernels were not made
    assert set(layer.state_dict()) == {"values", "bias", "crow_indices", "col_indices"}
    x = torch.randn((5, 10) if make is linear else (2, 4, 6, 5), requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    assert not layer.values.grad[~layer.pattern.edge_mask()].any()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.runs == "dense"
        assert torch.equal(twin(x), layer(x))
    assert layer.double().runs == "cpu"  # which the model does not know
    assert layer.float().runs == "dense"


def test_auto_is_chosen_again_with_the_pattern(density_decides):
    low, high = (random_pattern((7, 10), (1, 1), density=density) for density in (0.2, 0.8))
    layer = SparseLinear(10, 7, pattern=high)
    assert layer.runs == "dense"
    layer.load_state_dict(SparseLinear(10, 7, pattern=low).state_dict())
    assert layer.runs == "cpu"
    x = torch.randn(3, 10)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_a_choice_is_not_saved(density_decides, monkeypatch):
    layer = SparseLinear(10, 7, pattern=random_pattern((7, 10), (1, 1), density=0.8))
    saved = pickle.dumps(layer)
    monkeypatch.setattr(cost, "current", lambda: prices(lambda name: ".sparse." not in name))
    assert layer.runs == "dense"  # made when it was built
    assert pickle.loads(saved).runs == "cpu"


def test_the_report_says_what_runs(density_decides):
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 8), nn.Linear(8, 4).double(), nn.Conv2d(2, 4, 3, groups=2))
    patterns = {
        "0": random_pattern((7, 10), (1, 1), density=0.2), "1": random_pattern((8, 7), (1, 1), density=0.8),
        "2": random_pattern((4, 8), (1, 1)), "3": random_pattern((4, 9), (1, 1)),
    }  # fmt: skip
    report = sk.sparsify_(model, patterns)
    assert [row.backend for row in report.converted] == ["cpu", "dense", "cpu", "cpu"]
    first, second, *rest = (row.speedup for row in report.converted)
    assert first == pytest.approx(0.5 / patterns["0"].density)
    assert second == pytest.approx(1.0)
    assert rest == [None, None]
    lines = str(report).splitlines()
    assert lines[1].endswith(f"cpu      {first:.2f}x")
    assert lines[2].endswith("dense    1.00x")
    assert lines[3].endswith("cpu      -")
    assert "speed-up: of a training step against torch's dense layer, with 128 rows" in lines[-1]
    model[1].backend = "cpu"
    assert sk.densify_(model).converted[1].speedup is None


def test_the_report_explains_what_is_slower_than_a_dense_layer(monkeypatch):
    """A dense layer takes 1 s a weight, writing the dense weight 1 s more, the kernels 1.6 s for each stored one."""
    costs = {".dense.forward.weight": 1.0, ".scatter.forward.value": 1.0, ".sparse.forward.value": 1.6}
    holds = prices(lambda name: sum(cost for end, cost in costs.items() if name.endswith(end)))
    monkeypatch.setattr(cost, "current", lambda: holds)
    for density, expected in ((0.5, False), (1.0, True)):
        model = nn.Sequential(nn.Linear(10, 7))
        report = sk.sparsify_(model, {"0": random_pattern((7, 10), (1, 1), density=density)})
        assert report.converted[0].backend == "cpu"
        assert (report.converted[0].speedup < 1) == expected
        assert ("below 1x" in str(report)) == expected


@pytest.mark.parametrize("make", [linear, conv])
def test_it_compiles_to_one_graph(make):
    layer = make(backend="dense")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn((5, 10) if make is linear else (2, 4, 6, 5))
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, layer(x))
    layer(x).square().sum().backward()
    torch.testing.assert_close(compiled.values.grad, layer.values.grad)


def test_training_continues_dense_as_with_the_kernels():
    layers = [
        SparseConv2d(4, 6, 3, pattern=random_pattern((6, 36), (4, 4)), backend=backend, dtype=torch.float64)
        for backend in ("dense", "cpu")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    data = torch.randn(5, 2, 4, 6, 6, dtype=torch.float64)
    for layer in layers:
        optimizer = torch.optim.Adam(layer.parameters(), 0.01)
        for x in data:
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
