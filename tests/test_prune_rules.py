"""Rules of selection that are easy to break: paths, rounds, limits, and arguments."""

import pytest
import torch
from test_prune_methods import batch, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekern import prune
from sparsekern.prune.blocksizes import covering


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_default_blocks_reach_every_output() -> None:
    """A layer that would keep fewer blocks than block rows gets smaller ones; paths lead through all layers then."""
    model = mlp(128, 128, 128, 128, 10).float()
    patterns = prune.random(model, 0.98, (16, 16), placement="auto", balance="auto")
    assert {p.blocksize for name, p in patterns.items() if name != "6"} == {(2, 2)}  # 327 weights, 128 rows
    assert all(p.blocks_per_row().min() >= 1 for p in patterns.values() if p.blocksize != (1, 1))
    assert prune.connectivity(model, patterns, (128,)).collapsed == []
    named = dict.fromkeys(("0", "2", "4"), (16, 16))
    for keywords in ({"placement": "draw"}, {"blocksize": named}):
        asked = {"blocksize": (16, 16), "placement": "auto", "allocation": "uniform"} | keywords
        pairs = prune.magnitude(model, 0.98, **asked).values()
        assert (16, 16) in {p.blocksize for p in pairs}


@pytest.mark.parametrize(
    "pair, kept, rows, expected",
    [((16, 16), 2048, 128, (16, 16)), ((16, 16), 2047, 128, (8, 8)), ((8, 1), 128, 128, (8, 1)),
     ((6, 3), 20, 12, (3, 1)), ((6, 3), 40, 12, (6, 3)), ((4, 4), 3, 100, (1, 1)), ((1, 8), 100, 50, (1, 2))],
)  # fmt: skip
def test_the_largest_block_that_covers(pair, kept, rows, expected) -> None:
    assert covering(pair, kept, rows) == expected


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "igq"])
@pytest.mark.parametrize("method", ["synflow", "iterative_snip", "force"])
def test_rounds_follow_the_allocation_and_leave_what_is_excluded(method: str, allocation: str) -> None:
    """No weight that the rounds gave up is kept while another of its layer goes."""
    torch.manual_seed(0)
    model, (x, y) = mlp(30, 60, 60, 10), batch(30, 10, 40)
    seen: list[dict[str, Tensor]] = []
    take = getattr(prune.scores, method)

    def spy(*args: object, **keywords: object) -> dict[str, Tensor]:
        seen.append(take(*args, **keywords))
        return seen[-1]

    setattr(prune.scores, method, spy)
    try:
        data = ((30,),) if method == "synflow" else ((x, y), cross_entropy)
        patterns = getattr(prune, method)(
            model, *data, sparsity=0.95, blocksize=(1, 1), allocation=allocation, exclude=["0"], rounds=5
        )
    finally:
        setattr(prune.scores, method, take)
    assert set(patterns) == {"2", "4"} and patterns.achieved == pytest.approx(0.95, abs=1e-3)
    if method != "force":  # whose scores are of weights that are gone as well, and 0 for units that are dead
        for name, pattern in patterns.items():
            assert (seen[0][f"{name}.weight"][pattern.to_element_mask()] > 0).all()
    with pytest.raises(ValueError, match="allocation must be a rule, not densities"):
        getattr(prune, method)(model, *data, allocation={"0": 0.5, "2": 0.5, "4": 0.5}, blocksize=(1, 1))


def test_layers_that_cannot_be_sparse_are_whole_for_paths() -> None:
    """Weights of both signs, or of 0, would let their paths cancel."""

    class Other(nn.Linear):
        pass

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.zeros(10)), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.inner(x)

    torch.manual_seed(0)
    for middle in (Other(10, 10), nn.RMSNorm(10), Scaled()):
        model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), middle, nn.ReLU(), nn.Linear(10, 3))
        patterns = prune.magnitude(model, 0.0, (1, 1))
        assert prune.connectivity(model, patterns, (10,)).effective_sparsity == 0


def test_what_was_let_through_in_silence_is_refused() -> None:
    model, pair = mlp(20, 30, 4), batch(20, 4)
    with pytest.raises(ValueError, match="min_density and max_density cannot be given with placement 'global'"):
        prune.magnitude(model, 0.5, (1, 1), placement="global", min_density=0.2)
    with pytest.raises(TypeError, match="min_density must be one number for all layers, got dict"):
        prune.magnitude(model, 0.5, (1, 1), min_density={"0": 0.2})
    with pytest.raises(TypeError, match=r"allocation\['2'\] must be a density in \[0, 1\], got str"):
        prune.magnitude(model, None, (1, 1), allocation={"0": 0.2, "2": "x"})
    for method in (prune.magnitude, prune.random):
        with pytest.raises(TypeError, match="unexpected keyword argument 'max_desnity'"):
            method(model, 0.5, (1, 1), max_desnity=0.3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        prune.synflow(model, (20,), foo=1)
    half = mlp(20, 30, 4).half()
    with pytest.raises(ValueError, match=r"'0\.weight' must not be float16"):
        prune.grasp(half, [(pair[0].half(), pair[1])], cross_entropy)
    patterns = prune.magnitude(model, 0.9, (1, 1))
    with pytest.raises(ValueError, match="patterns must hold the pattern of a layer"):
        prune.connectivity(model, {}, (20,))
    for wrong in (torch.rand(2, 1), torch.full((30, 20), float("nan")), -torch.rand(30, 20)):
        with pytest.raises(ValueError, match=r"0\.weight"):
            prune.reconnect(model, patterns, (20,), {"0.weight": wrong, "2.weight": torch.rand(4, 30)})


def test_densities_by_name_stay_when_a_limit_changes_another() -> None:
    model = mlp(32, 32, 32, 10)
    patterns = prune.magnitude(
        model, None, (1, 1), allocation={"0": 0.9, "2": 0.1, "4": 0.1}, max_density=0.5, placement="best"
    )
    assert [round(p.density, 3) for p in patterns.values()] == pytest.approx([0.5, 0.1, 0.1], abs=2e-3)


def test_signed_bias_scores_count_by_their_size_where_gates_do() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    scores = {f"{i}.weight": torch.rand(4, 4) for i in range(2)} | {"0.bias": torch.full((4,), -100.0)}
    found = prune.from_scores(model, scores, 0.5, (1, 1), placement="global", block_score="gate")
    assert not found.drop_bias


def test_a_layer_without_score_can_be_left_where_others_are_excluded() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    found = prune.scores.magnitude(model)
    found["1.weight"].zero_()
    assert prune.from_scores(model, found, 0.5, (1, 1), exclude=["0"]).achieved == 0.5
    found["0.weight"].zero_()
    with pytest.raises(ValueError, match="must not all be zero"):
        prune.from_scores(model, found, 0.5, (1, 1), exclude=["0"])
