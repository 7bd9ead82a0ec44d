"""Pruning to a speed-up: the search, by clocks that are made up, and what is refused."""

import copy

import pytest
import torch
from test_prune_methods import batch, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekern import prune
from sparsekern.prune import by_time
from sparsekern.timing import Timing


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_speed_up_is_met_by_a_clock_that_counts_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock: 1 for what no layer does, and 9 for all weights, whatever the cost model thinks of them."""
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    pair = torch.randn(64, 300), torch.randint(10, (64,))
    total = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    networks: dict[str, nn.Module] = {}

    def runner(network: nn.Module, *rest: object) -> nn.Module:
        return network

    def clock(candidates: dict[str, nn.Module], **rest: object) -> dict[str, Timing]:
        networks.update(candidates)
        seconds = {}
        for name, network in candidates.items():
            kept = sum(p.numel() for p in network.parameters() if p.dim() > 1) if isinstance(network, nn.Module) else 0
            seconds[name] = Timing((1 + 9 * kept / total,) * 5)
        return seconds

    monkeypatch.setattr(by_time, "runner", runner)
    monkeypatch.setattr(by_time, "interleaved", clock)
    before = copy.deepcopy(model.state_dict())
    for asked in (2.0, 4.0):
        patterns = prune.snip(model, pair, cross_entropy, blocksize=(8, 8), speedup=asked, of="eval")
        assert patterns.in_time is not None and patterns.in_time.measured == pytest.approx(asked, rel=0.1)
        assert f"{asked:g}x asked" in str(patterns.in_time)
        sparse = sum(p.nnz for p in patterns.values())
        left = sum(model.get_submodule(name).weight.numel() for name in "024" if name not in patterns)
        assert 10 / (1 + 9 * (sparse + left) / total) == pytest.approx(asked, rel=0.1)
    with pytest.raises(ValueError, match="speedup 50 of eval cannot be had from these layers: nearest"):
        prune.snip(model, pair, cross_entropy, speedup=50.0, of="eval")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_negative_scores_are_worth_nothing_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are signed gates, whose size counts."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    scores = {"0.weight": torch.full((64, 64), -1.0), "2.weight": torch.full((64, 64), 0.5)}
    seen: list[dict[str, Tensor]] = []

    def stop(budget: float, costs: object, ranked: dict[str, Tensor], floor: object) -> None:
        seen.append(ranked)
        raise InterruptedError

    monkeypatch.setattr(by_time, "_within", stop)
    pair = torch.randn(8, 64), torch.randint(64, (8,))
    for block_score in ("mean", "gate"):
        with pytest.raises(InterruptedError):
            prune.in_time(model, scores, 2.0, (8, 8), pair, block_score=block_score)
        assert bool(seen[-1]["0"].any()) == (block_score == "gate")
        assert (seen[-1]["2"] > 0).all()


def test_layers_that_the_cost_model_does_not_know_are_named() -> None:
    pair = torch.randn(2, 4, 6, 6), torch.randint(4, (2,))
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 10))
    with pytest.raises(ValueError, match="layer '0' cannot be pruned by time: it has groups"):
        prune.snip(grouped, pair, cross_entropy, speedup=2.0)
    with pytest.raises(ValueError, match=r"layer '0' cannot be pruned by time: it is torch\.float64"):
        prune.snip(mlp(20, 10, 4), batch(20, 4), cross_entropy, speedup=2.0)


def test_scoring_draws_no_further_batch() -> None:
    """A loader that shuffles would move torch's generator on."""
    x, y = batch(6, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    model = mlp(6, 5, 3)
    passes = 0

    class Counted:
        def __iter__(self) -> object:
            nonlocal passes
            passes += 1
            return iter(loader)

    prune.force(model, Counted(), cross_entropy, 0.5, (1, 1), rounds=3)
    assert passes == 3
    prune.grasp(model, Counted(), cross_entropy, 0.5, (1, 1))
    assert passes == 5


def test_bad_speed_ups_are_named() -> None:
    model, pair = mlp(20, 10, 4).float(), (torch.randn(8, 20), torch.randint(4, (8,)))
    for keywords, words in [
        ({"speedup": 0.5}, "speedup must be above 1, got 0.5"),
        ({"speedup": 2.0, "sparsity": 0.9}, "sparsity and speedup cannot both be given"),
        ({"speedup": 2.0, "of": "lunch"}, "of must be one of"),
        ({"speedup": 2.0, "allocation": "erk"}, "allocation cannot be given with speedup"),
        ({"speedup": 2.0, "placement": "global"}, "placement 'global' cannot be given with speedup"),
        ({"of": "step"}, "of goes with speedup"),
        ({"blocksize": None}, "blocksize=None goes with speedup"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune.snip(model, pair, cross_entropy, **keywords)
    with pytest.raises(ValueError, match="example must be given with speedup"):
        prune.magnitude(model, speedup=2.0)
    with pytest.raises(ValueError, match="loss_fn must be given for of='step'"):
        prune.magnitude(model, speedup=2.0, of="step", example=pair)


def test_equal_scores_are_split_and_weights_without_score_fill_a_budget() -> None:
    costs = {name: by_time._Layer(1000, (1, 1), 0.0, 1e-3, 0.99) for name in ("a", "b")}
    floor = {"a": 10, "b": 10}
    for scores in (torch.ones(1000), torch.cat([torch.zeros(900), torch.ones(100)])):
        ranked = {name: scores.double().sort().values for name in costs}
        for budget in (0.1, 0.5, 1.5):
            kept = by_time._within(budget, costs, ranked, floor)
            assert by_time._spent(kept, costs) == pytest.approx(budget, rel=0.02)
    assert by_time._within(0.0, costs, ranked, floor) == floor


def test_the_search_by_time_keeps_between_what_was_too_fast_and_too_slow() -> None:
    """Whatever the clock says, budgets stay in range; with a true clock they close in."""

    def clock(budget: float) -> float:
        return 1 / (0.05 + 0.9 * budget)

    tried = [(0.5, clock(0.5))]
    for _ in range(6):
        tried.append((budget := by_time._next(tried, 4.0, 0.01, 1.0), clock(budget)))
    assert tried[-1][1] == pytest.approx(4, rel=0.01)
    noisy = [(0.3, 12.0)]  # a disturbed first try
    for _ in range(7):
        noisy.append((budget := by_time._next(noisy, 4.0, 0.01, 1.0), clock(budget)))
        assert 0.01 <= budget <= 1.0
    assert min(abs(found / 4 - 1) for _, found in noisy) < 0.1
