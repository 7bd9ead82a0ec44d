"""What is kept and where: exact counts, ties, floors, rows, draws, block sizes and biases."""

import copy
import itertools
import logging
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekern import BlockPattern, prune, sparsify_
from sparsekern.prune.allocation import best, top_k, whole_blocks
from sparsekern.prune.placement import drawn_order

PLACEMENTS = ("auto", "global", "best", "draw", "random")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Many tiny tensors run faster so, above all beside other test processes; conftest puts it back."""
    torch.set_num_threads(1)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(a, b, bias) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def data(features: int, classes: int, n: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(n, features), torch.randint(classes, (n,))


def sizes_of(patterns: dict[str, BlockPattern]) -> tuple[int, int]:
    """(weights kept, weights)"""
    kept = sum(int(pattern.to_element_mask().sum()) for pattern in patterns.values())
    return kept, sum(math.prod(pattern.shape) for pattern in patterns.values())


def rows_are_even(pattern: BlockPattern) -> bool:
    counts = pattern.blocks_per_row()
    return int(counts.max() - counts.min()) <= 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- counts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    last=st.sampled_from(["same", (1, 1), (2, 3)]),
    sparsity=st.floats(0, 0.999),
    placement=st.sampled_from(PLACEMENTS),
    values=st.integers(1, 5),
)
def test_counts_hold(
    shapes: list[tuple[int, int]],
    block: tuple[int, int],
    last: str | tuple[int, int],
    sparsity: float,
    placement: str,
    values: int,
) -> None:
    """1x1 exactly, larger blocks to half a block, whatever the shapes and however many scores are equal."""
    model = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in shapes)
    scores = {
        f"{i}.weight": torch.randint(values, shape, generator=generator(i)).double() for i, shape in enumerate(shapes)
    }
    scores["0.weight"][0, 0] = 1  # scores that are all zero are refused
    pairs = {str(i): block for i in range(len(shapes))}
    if last != "same":
        pairs[str(len(shapes) - 1)] = last
    patterns = prune.from_scores(model, scores, sparsity, pairs, placement=placement, min_blocks=0)
    kept, total = sizes_of(patterns)
    largest = max(bh * bw for bh, bw in pairs.values())
    assert abs(kept - round(total * (1 - sparsity))) <= largest / 2
    if set(pairs.values()) == {(1, 1)}:
        assert kept == round(total * (1 - sparsity))
    for name, pattern in patterns.items():
        if placement in ("draw", "random") or (placement == "auto" and pairs[name] != (1, 1)):
            assert rows_are_even(pattern)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_snip_keeps_the_number_asked_for(placement: str, sparsity: float) -> None:
    model = mlp(50, 33, 21, 4)
    unstructured = prune.snip(model, data(50, 4), cross_entropy, sparsity, (1, 1), placement=placement)
    total = 50 * 33 + 33 * 21 + 21 * 4
    assert sizes_of(unstructured) == (round(total * (1 - sparsity)), total)
    assert unstructured.achieved == pytest.approx(1 - round(total * (1 - sparsity)) / total, abs=1e-12)
    blocks = prune.snip(model, data(50, 4), cross_entropy, sparsity, (4, 4), placement=placement)
    assert abs(sizes_of(blocks)[0] - total * (1 - sparsity)) <= 8.5
    assert blocks.requested == sparsity


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_best_breaks_ties_by_index(values: list[int], choose: st.DataObject) -> None:
    k = choose.draw(st.integers(0, len(values)))
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(-np.array(values), kind="stable")[:k]] = True
    assert best(torch.tensor(values, dtype=torch.float64), k).tolist() == expected.tolist()


def test_top_k_floors_hold_and_the_total_stays() -> None:
    scores = {
        "a": torch.arange(10, 20).double(),
        "b": torch.arange(6).double().view(2, 3),
        "c": torch.zeros(4).double(),
    }
    masks = top_k(scores, 6, {"b": 2, "c": 1})
    assert masks["a"].nonzero().flatten().tolist() == [7, 8, 9]
    assert masks["b"].tolist() == [[False] * 3, [False, True, True]]
    assert masks["c"].tolist() == [True, False, False, False]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 16), min_size=1, max_size=8), st.floats(0, 1)), min_size=1, max_size=5)
)
def test_whole_blocks_come_close_together(layers: list[tuple[list[int], float]]) -> None:
    sizes = {str(i): torch.tensor(blocks) for i, (blocks, _) in enumerate(layers)}
    targets = {str(i): int(sum(blocks) * share) for i, (blocks, share) in enumerate(layers)}
    counts = whole_blocks(sizes, targets)
    kept = sum(int(sizes[name][:count].sum()) for name, count in counts.items())
    assert abs(kept - sum(targets.values())) <= max(max(blocks) for blocks, _ in layers) / 2
    for name, count in counts.items():  # no layer strays from its own target by more than a block
        fits = int((sizes[name].cumsum(0) <= targets[name]).sum())
        assert count in (fits, fits + 1)


def test_whole_blocks_go_to_the_largest_remainder() -> None:
    sizes = {name: torch.full((9,), 4) for name in "abc"}
    assert whole_blocks(sizes, {"a": 5, "b": 11, "c": 8}) == {"a": 1, "b": 3, "c": 2}


# ---- the paper ------------------------------------------------------------------------------------------------------


def test_unstructured_is_the_global_top_k() -> None:
    model, pair = mlp(20, 15, 6), data(20, 6)
    scores = prune.scores.snip(model, pair, cross_entropy)
    flat = np.concatenate([matrix.numpy().ravel() for matrix in scores.values()])
    expected = np.zeros(flat.size, dtype=bool)
    expected[np.argsort(-flat, kind="stable")[: round(flat.size * 0.3)]] = True
    for placement in ("auto", "best", "global"):
        patterns = prune.snip(model, pair, cross_entropy, 0.7, (1, 1), placement=placement)
        found = np.concatenate([pattern.to_mask().numpy().ravel() for pattern in patterns.values()])
        assert (found == expected).all(), placement


def test_lenet_300_100_counts_weights_and_biases_as_the_authors_do() -> None:
    model, pair = mlp(784, 300, 100, 10), data(784, 10, 100)
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    paper = {"blocksize": (1, 1), "placement": "global", "biases": "score", "min_blocks": 0}
    patterns = prune.snip(model, pair, cross_entropy, 0.9, **paper)
    assert sum(parameter.numel() for parameter in model.parameters()) == 266_610
    assert sizes_of(patterns) == (26_661, 266_200)
    assert patterns.drop_bias == {"0", "2", "4"}
    assert "0: density" in patterns.summary()
    assert patterns.summary().count("bias dropped") == 3
    kept = prune.snip(model, pair, cross_entropy, 0.9, (1, 1))
    assert sizes_of(kept) == (26_620, 266_200)
    assert not kept.drop_bias


def test_global_blocks_compete_by_their_mean_score() -> None:
    model, pair = mlp(12, 10, 8), data(12, 8)
    scores = prune.scores.snip(model, pair, cross_entropy)
    pairs = {"0": (4, 4), "2": (2, 5)}
    blocks = []
    for key, matrix in scores.items():
        name = key.removesuffix(".weight")
        bh, bw = pairs[name]
        for i in range(0, matrix.shape[0], bh):
            for j in range(0, matrix.shape[1], bw):
                block = matrix[i : i + bh, j : j + bw]
                blocks.append((float(block.mean()), name, i // bh, j // bw, block.numel()))
    blocks.sort(key=lambda block: -block[0])
    wanted, kept, expected = round(200 * 0.4), 0, set()
    for _, name, i, j, size in blocks:
        if abs(kept + size - wanted) >= abs(kept - wanted):
            break
        kept += size
        expected.add((name, i, j))
    patterns = prune.snip(model, pair, cross_entropy, 0.6, pairs, placement="global", min_blocks=0)
    found = {(name, i, j) for name, pattern in patterns.items() for i, j in pattern.to_mask().nonzero().tolist()}
    assert found == expected


# ---- layers that would die ------------------------------------------------------------------------------------------


class Faint(nn.Module):
    """The scores of layer "faint" are far below all others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.faint = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + 1e-9 * self.faint(x)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_min_blocks_keeps_every_layer_alive(placement: str, block: tuple[int, int]) -> None:
    model, pair = Faint(), data(32, 32)
    pairs = dict.fromkeys(("first", "second", "faint"), block)
    bare = prune.snip(model, pair, cross_entropy, 0.8, pairs, placement=placement, min_blocks=0)
    assert bare["faint"].nnz_blocks == 0
    wanted = round(3 * 1024 * 0.2)
    for floor in (1, 3):
        guarded = prune.snip(model, pair, cross_entropy, 0.8, pairs, placement=placement, min_blocks=floor)
        assert guarded["faint"].nnz_blocks == floor
        assert abs(sizes_of(guarded)[0] - wanted) <= (0 if block == (1, 1) else 8)


def test_a_sparsity_that_leaves_less_than_the_floor_is_refused() -> None:
    model, pair = Faint(), data(32, 32)
    for placement in PLACEMENTS:
        with pytest.raises(ValueError, match=r"leaves 31 weights, but min_blocks=1 .* 3 layers need 129"):
            prune.snip(model, pair, cross_entropy, 0.99, placement=placement)


# ---- draws ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20), st.data())
def test_every_prefix_of_a_draw_has_even_rows(rows: int, columns: int, seed: int, choose: st.DataObject) -> None:
    scores = torch.rand(rows, columns, dtype=torch.float64, generator=generator(seed))
    order = drawn_order(scores, generator(seed))
    assert sorted(order.tolist()) == list(range(rows * columns))
    count = choose.draw(st.integers(0, rows * columns))
    per_row = torch.bincount(order[:count] // columns, minlength=rows)
    assert int(per_row.max() - per_row.min()) <= 1


def test_draws_are_in_proportion_to_the_score() -> None:
    scores = torch.tensor([[8.0, 4.0, 3.0, 1.0, 0.0]], dtype=torch.float64).expand(4000, 5)
    order = drawn_order(scores, generator(1))
    drawn_first = torch.bincount(order[:4000] % 5, minlength=5) / 4000
    # Four standard deviations of 4,000 draws.
    torch.testing.assert_close(drawn_first, torch.tensor([8, 4, 3, 1, 0]) / 16, rtol=0, atol=0.032)
    second = order[4000:8000][order[4000:8000].argsort()] % 5
    after_8 = second[(order[:4000][order[:4000].argsort()] % 5) == 0]
    torch.testing.assert_close(
        torch.bincount(after_8, minlength=5) / len(after_8), torch.tensor([0, 4, 3, 1, 0]) / 8, rtol=0, atol=0.045
    )
    assert (order[16000:] % 5 == 4).all()  # score 0 comes last in every row


def test_draws_repeat_and_follow_the_generator() -> None:
    model, pair = mlp(64, 64, 10), data(64, 10)
    default = prune.snip(model, pair, cross_entropy)
    torch.manual_seed(99)
    assert prune.snip(model, pair, cross_entropy) == default
    assert prune.snip(model, pair, cross_entropy, generator=generator(0)) == default
    other = prune.snip(model, pair, cross_entropy, generator=generator(5))
    assert other["0"] != default["0"]
    assert other["0"].nnz_blocks == default["0"].nnz_blocks


def test_layers_take_their_density_from_the_unstructured_ranking() -> None:
    model, pair = mlp(64, 64, 32, 10), data(64, 10)
    with torch.no_grad():
        model[2].weight.mul_(3)
    unstructured = prune.snip(model, pair, cross_entropy, 0.8, (1, 1))
    assert unstructured["0"].density < 0.8 * unstructured["2"].density
    for placement in ("auto", "draw", "best", "random"):
        blocks = prune.snip(model, pair, cross_entropy, 0.8, (4, 4), placement=placement)
        for name, pattern in unstructured.items():
            assert abs(blocks[name].nnz - pattern.nnz) <= 16
    # Single weights of the classifier fill up what blocks of 16 leave over.
    assert prune.snip(model, pair, cross_entropy, 0.8, (4, 4))["4"].nnz - unstructured["4"].nnz in (0, 1)


# ---- block sizes ----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3)
        self.wide = nn.Conv2d(64, 64, 3)
        self.odd = nn.Conv2d(20, 64, 5)
        self.grouped = nn.Conv2d(32, 48, 3, groups=4)
        self.depthwise = nn.Conv2d(48, 48, 3, groups=48)
        self.few = nn.Linear(200, 24)
        self.fc = nn.Linear(200, 25)
        self.head = nn.Linear(64, 64)


def test_one_blocksize_gives_way_where_it_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsekern")
    assert prune.blocksizes(Mixed(), (8, 8)) == {
        "stem": (8, 1),  # one input channel a block at most would span taps otherwise: gcd(8, 3)
        "wide": (8, 8),
        "odd": (8, 4),
        "grouped": (4, 8),
        "depthwise": (1, 1),
        "few": (1, 1),  # three block rows
        "fc": (8, 8),  # four, the last one overhanging
        "head": (1, 1),
    }
    assert "layer 'odd', 64 x 500, gets blocks of (8, 4) instead of (8, 8)" in caplog.text
    assert "'wide'" not in caplog.text


def test_the_classifier_is_the_last_layer_even_if_it_stays_dense() -> None:
    model = mlp(64, 64, 64)
    assert prune.blocksizes(model, (4, 4)) == {"0": (4, 4), "2": (1, 1)}
    nn.utils.parametrizations.weight_norm(model[2])
    assert prune.blocksizes(model, (4, 4)) == {"0": (4, 4)}


def test_a_dictionary_of_blocksizes_is_taken_at_its_word() -> None:
    model = Mixed()
    given_sizes = {"odd": (8, 8), "head": (16, 16), "few": (8, 8)}
    assert prune.blocksizes(model, given_sizes) == dict.fromkeys(prune.blocksizes(model, (1, 1)), (1, 1)) | given_sizes
    patterns = prune.random(mlp(64, 64, 64), 0.5, {"2": (16, 8)})
    assert [pattern.blocksize for pattern in patterns.values()] == [(1, 1), (16, 8)]


def test_bad_blocksizes_are_named() -> None:
    model = mlp(16, 16, 16)
    nn.utils.parametrizations.weight_norm(model[2])
    for blocksize, error, match in [
        ((0, 8), ValueError, r"blocksize must be at least 1 in both dimensions, got \(0, 8\)"),
        (8, TypeError, "tuple of two integers"),
        ((8, 8.0), TypeError, "tuple of two integers"),
        ({"0": (4, -1)}, ValueError, r"blocksize\['0'\] must be at least 1"),
        ({"5": (4, 4)}, ValueError, "'5': no Linear"),
        ({"2": (4, 4)}, ValueError, "'2': it is parametrised"),
    ]:
        with pytest.raises(error, match=match):
            prune.blocksizes(model, blocksize)


# ---- biases ---------------------------------------------------------------------------------------------------------


def test_biases_fall_whole_or_stay_whole_or_are_refused() -> None:
    model, pair = mlp(20, 16, 12, 5), data(20, 5, 200)
    score = {"blocksize": (1, 1), "biases": "score"}
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].bias.fill_(1e-9)
        model[4].bias.copy_(torch.linspace(500, 900, 5))
    patterns = prune.snip(model, pair, cross_entropy, 0.5, **score)
    assert patterns.drop_bias == {"0", "2"}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sizes_of(patterns)[0] + 5 == round(total * 0.5)
    report_model = copy.deepcopy(model)
    sparsify_(report_model, patterns)
    assert report_model[0].bias is None
    assert torch.equal(report_model[4].bias, model[4].bias)

    with torch.no_grad():
        model[4].bias[2] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="bias of layer '4' would keep 4 of 5 entries"):
        prune.snip(model, pair, cross_entropy, 0.5, **score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert prune.snip(model, pair, cross_entropy, 0.5, (1, 1), biases="keep").drop_bias == frozenset()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scored_biases_go_with_every_placement(placement: str) -> None:
    model = mlp(32, 32, 8)
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    patterns = prune.snip(model, data(32, 8), cross_entropy, 0.5, (4, 4), placement=placement, biases="score")
    assert patterns.drop_bias == {"0", "2"}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert abs(sizes_of(patterns)[0] - round(total * 0.5)) <= 8


def test_layers_without_bias_are_no_trouble() -> None:
    patterns = prune.snip(mlp(20, 16, 5, bias=False), data(20, 5), cross_entropy, 0.5, (1, 1), biases="score")
    assert sizes_of(patterns) == (200, 400)
    assert not patterns.drop_bias


# ---- convolution, other methods, bad calls --------------------------------------------------------------------------


def test_convolutions_and_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10)
    )
    pair = (torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    patterns = prune.snip(model, pair, cross_entropy, 0.8, (4, 4))
    assert {name: (p.shape, p.blocksize) for name, p in patterns.items()} == {
        "0": ((16, 27), (4, 1)),
        "2": ((24, 72), (4, 4)),
        "5": ((10, 384), (1, 1)),
    }
    sparsify_(model, patterns)
    assert model(pair[0]).shape == (4, 10)


def test_random_is_uniform_over_layers_and_needs_no_data() -> None:
    model = mlp(100, 60, 40, 10)
    for block, slack in [((1, 1), 1), ((8, 4), 32)]:
        patterns = prune.random(model, 0.9, block)
        kept, total = sizes_of(patterns)
        assert abs(kept - total * 0.1) <= (0.5 if block == (1, 1) else 16)
        for pattern in patterns.values():
            assert abs(pattern.nnz - math.prod(pattern.shape) * 0.1) <= slack
            assert rows_are_even(pattern)
        assert prune.random(model, 0.9, block) == patterns
        assert prune.random(model, 0.9, block, generator=generator(1)) != patterns
    assert prune.random(model, 0.97, (8, 8), min_blocks=2)["2"].nnz_blocks == 2


def test_random_blocks_are_everywhere_alike() -> None:
    draws = generator(0)
    times = sum(prune.random(mlp(16, 8, 8), 0.75, {"0": (2, 4)}, generator=draws)["0"].to_mask() for _ in range(800))
    assert times.shape == (4, 4)
    torch.testing.assert_close(times / 800, torch.full((4, 4), 0.25), rtol=0, atol=0.065)


def test_shuffle_keeps_counts_and_rows_and_biases() -> None:
    model, pair = mlp(61, 50, 40, 10), data(61, 10)
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    patterns = prune.snip(model, pair, cross_entropy, 0.8, {"0": (4, 4), "2": (4, 4)}, biases="score")
    twins = prune.shuffle(patterns)
    assert (twins.requested, twins.drop_bias) == (0.8, {"0", "2", "4"})
    for name, pattern in patterns.items():
        twin = twins[name]
        same = ("shape", "blocksize", "nnz_blocks", "device")
        assert [getattr(twin, key) for key in same] == [getattr(pattern, key) for key in same]
        assert twin != pattern
    assert rows_are_even(twins["0"])
    assert not rows_are_even(patterns["4"])
    assert not rows_are_even(twins["4"])  # the rule holds only where the original has it
    assert prune.shuffle(patterns) == twins
    assert prune.shuffle(dict(patterns), generator(3)) != twins
    empty = {"a": BlockPattern.from_mask(torch.zeros(0, 3, dtype=torch.bool), (1, 1))}
    assert prune.shuffle(empty) == empty


def test_patterns_survive_copies() -> None:
    patterns = prune.Patterns({"a": BlockPattern.from_mask(torch.eye(2).bool(), (2, 2))}, 0.5, frozenset("a"))
    for twin in (copy.deepcopy(patterns), pickle.loads(pickle.dumps(patterns))):
        assert type(twin) is prune.Patterns
        assert twin == patterns
        assert (twin.requested, twin.drop_bias, twin.achieved) == (0.5, {"a"}, 0.5)
    assert prune.Patterns({}).achieved == 0


def test_bad_arguments_are_named() -> None:
    model, pair = mlp(16, 16, 4), data(16, 4)
    for keywords, error, match in [
        ({"sparsity": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, r"in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, ValueError, r"in \[0, 1\), got nan"),
        ({"sparsity": "0.9"}, TypeError, "sparsity must be a number, got str"),
        ({"placement": "here"}, ValueError, "placement must be one of .*'global'.*, got 'here'"),
        ({"biases": "drop"}, ValueError, "biases must be one of .*, got 'drop'"),
        ({"min_blocks": -1}, ValueError, "min_blocks must not be negative, got -1"),
        ({"min_blocks": 1.5}, TypeError, "min_blocks must be an integer, got float"),
    ]:
        with pytest.raises(error, match=match):
            prune.snip(model, pair, cross_entropy, **keywords)
    for call in (lambda m: prune.snip(m, pair, cross_entropy), prune.random):
        with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Conv2d that can be sparse; '0': it is a Conv1d"):
            call(nn.Sequential(nn.Conv1d(3, 3, 1)))
