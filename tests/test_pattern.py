"""BlockPattern: what it accepts, what it refuses and in which words, its statistics and its other forms."""

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.pattern import INT32_MAX, BlockPattern, tile

#     columns of blocks 0 1 2 3        7 x 10 in blocks of 3 x 3: both edges overhang
MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
SHAPE, BLOCKSIZE = (7, 10), (3, 3)


def example() -> BlockPattern:
    return BlockPattern(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 0, 2, 3]), SHAPE, BLOCKSIZE)


@st.composite
def patterns(draw: st.DrawFn, min_side: int = 0) -> BlockPattern:
    shape = draw(st.tuples(st.integers(min_side, 12), st.integers(min_side, 12)))
    blocksize = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    grid = tuple(-(-n // b) for n, b in zip(shape, blocksize, strict=True))
    bits = draw(st.lists(st.booleans(), min_size=math.prod(grid), max_size=math.prod(grid)))
    return BlockPattern.from_mask(torch.tensor(bits, dtype=torch.bool).reshape(grid), blocksize, shape)


def elements(pattern: BlockPattern) -> torch.Tensor:
    """The elementwise mask, block by block from the indices."""
    mask = torch.zeros(pattern.shape, dtype=torch.bool)
    crow, col, (bh, bw) = pattern.crow_indices, pattern.col_indices, pattern.blocksize
    for row in range(pattern.grid[0]):
        for column in col[crow[row] : crow[row + 1]].tolist():
            mask[row * bh : (row + 1) * bh, column * bw : (column + 1) * bw] = True
    return mask


# ---- building and going back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_describe_the_mask(dtype: torch.dtype) -> None:
    p = BlockPattern(
        torch.tensor([0, 2, 2, 5], dtype=dtype), torch.tensor([0, 3, 0, 2, 3], dtype=dtype), SHAPE, BLOCKSIZE
    )
    assert p.crow_indices.dtype == p.col_indices.dtype == torch.int32
    assert (p.shape, p.blocksize, p.grid, p.nnz_blocks, p.values_shape) == (SHAPE, BLOCKSIZE, (3, 4), 5, (5, 3, 3))
    assert p.device == torch.device("cpu")
    assert torch.equal(p.to_mask(), MASK)
    assert p == BlockPattern.from_mask(MASK, BLOCKSIZE, SHAPE)
    assert repr(p) == "BlockPattern(shape=(7, 10), blocksize=(3, 3), nnz_blocks=5, density=0.2714)"


@given(patterns())
def test_all_forms_agree(p: BlockPattern) -> None:
    mask = elements(p)
    assert torch.equal(p.to_element_mask(), mask)
    assert p.nnz == int(mask.sum())
    assert p.density == (p.nnz / mask.numel() if mask.numel() else 1.0)
    assert BlockPattern.from_mask(p.to_mask(), p.blocksize, p.shape) == p
    assert BlockPattern.from_dense(mask, p.blocksize) == p
    assert BlockPattern.from_dense(mask.float() * -0.5, p.blocksize) == p
    assert int(p.edge_mask().sum()) == p.nnz
    assert p.edge_mask().shape == p.values_shape
    # gather and scatter
    matrix = torch.arange(1.0, mask.numel() + 1).view(p.shape)
    values = p.gather(matrix)
    assert values.is_contiguous()
    assert torch.equal(values != 0, p.edge_mask())
    poisoned = values.masked_fill(~p.edge_mask(), torch.nan)
    assert torch.equal(p.scatter(poisoned), matrix * mask)
    # statistics
    assert p.dead_rows().tolist() == [i for i in range(p.shape[0]) if not mask[i].any()]
    assert p.dead_columns().tolist() == [j for j in range(p.shape[1]) if not mask[:, j].any()]
    assert p.blocks_per_row().tolist() == p.to_mask().sum(1).tolist()
    counts = p.to_mask().sum(1).tolist()
    assert p.row_histogram().tolist() == [counts.count(k) for k in range(max(counts, default=-1) + 1)]
    # transposed, without copying values
    turned, index = p.transposed()
    assert torch.equal(turned.to_mask(), p.to_mask().t())
    assert (turned.shape, turned.blocksize) == (p.shape[::-1], p.blocksize[::-1])
    assert torch.equal(turned.scatter(values[index].transpose(1, 2)), p.scatter(values).t())


def test_scatter_and_gather_are_differentiable() -> None:
    p = example()
    values = torch.randn(p.values_shape, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(p.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(p.scatter, values)
    assert torch.autograd.gradcheck(p.gather, matrix)


def test_tile() -> None:
    tiles = tile(torch.arange(6).view(2, 3), (2, 2))
    assert tiles.tolist() == [[[[0, 1], [3, 4]], [[2, 0], [5, 0]]]]


def test_from_scores_keeps_the_best_and_the_earlier_of_equals() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0], [3.0, 0.0, 3.0]])
    kept = BlockPattern.from_scores(scores, 3, (2, 2)).to_mask()
    assert kept.tolist() == [[False, True, True], [True, False, False]]
    assert BlockPattern.from_scores(scores, 0, (2, 2)).nnz_blocks == 0
    assert BlockPattern.from_scores(scores, 6, (2, 2), (3, 5)).density == 1
    assert BlockPattern.from_scores(torch.tensor([[-math.inf, -1.0]]), 1, (1, 1)).to_mask().tolist() == [[False, True]]


def test_effective_density_counts_weights_between_live_neurons() -> None:
    p = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), (2, 2))
    assert p.effective_density() == p.density == 0.5
    columns, rows = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])
    assert p.effective_density(columns) == 6 / 16
    assert p.effective_density(live_rows=rows) == 6 / 16
    assert p.effective_density(columns, rows) == 4 / 16


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_matrices_without_entries(shape: tuple[int, int]) -> None:
    p = BlockPattern.from_dense(torch.ones(shape), (2, 3))
    assert (p.shape, p.nnz_blocks, p.nnz, p.density, p.effective_density()) == (shape, 0, 0, 1.0, 1.0)
    assert p.to_element_mask().shape == p.scatter(torch.ones(p.values_shape)).shape == shape
    assert p.transposed()[0].shape == shape[::-1]
    assert len(p.dead_rows()) == shape[0]
    assert len(p.dead_columns()) == shape[1]


# ---- torch and SciPy --------------------------------------------------------------------------------------------

beta = pytest.mark.filterwarnings("ignore:Sparse (BSR|CSR):UserWarning")


@beta
@given(patterns(min_side=1))
def test_round_trip_through_torch_and_scipy(p: BlockPattern) -> None:
    values = torch.arange(1.0, math.prod(p.values_shape) + 1).view(p.values_shape)
    if any(n % b for n, b in zip(p.shape, p.blocksize, strict=True)):
        with pytest.raises(ValueError, match="torch BSR has no overhang"):
            p.to_torch(values)
        with pytest.raises(ValueError, match="SciPy BSR has no overhang"):
            p.to_scipy(values)
        return
    bsr, matrix = p.to_torch(values), p.to_scipy(values)
    assert torch.equal(bsr.to_dense(), p.scatter(values))
    assert np.array_equal(matrix.toarray(), p.scatter(values).numpy())
    assert BlockPattern.from_bsr(bsr) == BlockPattern.from_bsr(matrix) == p
    assert BlockPattern.from_bsr(scipy.sparse.bsr_array(matrix)) == p
    matrix.data[:] = 0
    assert (values > 0).all(), "SciPy gets a copy"


@beta
def test_from_csr() -> None:
    dense = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    expected = BlockPattern.from_dense(dense, (1, 1))
    assert BlockPattern.from_bsr(dense.to_sparse_csr()) == expected
    assert BlockPattern.from_bsr(scipy.sparse.csr_matrix(dense.numpy())) == expected
    assert BlockPattern.from_bsr(scipy.sparse.csr_array(dense.numpy())) == expected


@beta
def test_from_bsr_refuses_other_formats_and_bad_indices() -> None:
    dense = torch.eye(4)
    for wrong in (dense, dense.to_sparse(), dense.to_sparse_csc(), scipy.sparse.coo_matrix(dense.numpy()), [[1]], None):
        with pytest.raises(TypeError, match="matrix must be a"):
            BlockPattern.from_bsr(wrong)
    batch = torch.stack([dense, dense]).to_sparse_bsr((2, 2))
    with pytest.raises(TypeError, match="2-D"):
        BlockPattern.from_bsr(batch)
    unsorted = scipy.sparse.csr_matrix((np.ones(2), np.array([1, 0]), np.array([0, 2])), shape=(1, 2))
    with pytest.raises(ValueError, match="block row 0 has unsorted, 0 after 1"):
        BlockPattern.from_bsr(unsorted)
    # torch takes this without a word
    out_of_range = torch.sparse_bsr_tensor([0, 1], [7], torch.ones(1, 2, 2), (2, 4), check_invariants=False)
    with pytest.raises(ValueError, match=r"col_indices must be in \[0, 2\), got 7"):
        BlockPattern.from_bsr(out_of_range)


def test_to_torch_and_scipy_check_the_values() -> None:
    p = BlockPattern.from_mask(MASK, BLOCKSIZE)
    for convert in (p.to_torch, p.to_scipy, p.scatter):
        with pytest.raises(ValueError, match=r"values must have shape \(5, 3, 3\).*got \(5, 9\)"):
            convert(torch.ones(5, 9))
        with pytest.raises(ValueError, match="values must be on cpu, where the pattern is, got meta"):
            convert(torch.ones(5, 3, 3, device="meta"))


# ---- errors -----------------------------------------------------------------------------------------------------

INDICES = {
    "row too few": ([0, 2, 5], [0, 3, 0, 2, 3], "crow_indices must have 4 entries .*got 3"),
    "row too many": ([0, 2, 2, 5, 5], [0, 3, 0, 2, 3], "crow_indices must have 4 entries .*got 5"),
    "no row": ([], [0], "crow_indices must have 4 entries .*got 0"),
    "start": ([1, 2, 2, 5], [0, 3, 0, 2, 3], "crow_indices must start with 0, got 1"),
    "negative start": ([-1, 2, 2, 5], [0, 3, 0, 2, 3], "crow_indices must start with 0, got -1"),
    "falls": ([0, 3, 2, 5], [0, 1, 3, 2, 3], "crow_indices must not decrease: entry 2 is 2 after 3"),
    "beyond": ([0, 6, 6, 5], [0, 3, 0, 2, 3], "crow_indices must not decrease: entry 3 is 5 after 6"),
    "wraps": ([0, 2**32, 2, 5], [0, 3, 0, 2, 3], "crow_indices must not decrease"),
    "short end": ([0, 2, 2, 4], [0, 3, 0, 2, 3], "crow_indices must end with the number of stored blocks, 5, got 4"),
    "long end": ([0, 2, 2, 2**32 + 5], [0, 3, 0, 2, 3], "must end with the number of stored blocks, 5, got 4294967301"),
    "too wide": ([0, 2, 2, 5], [0, 4, 0, 2, 3], r"col_indices must be in \[0, 4\), got 4"),
    "negative": ([0, 2, 2, 5], [-1, 3, 0, 2, 3], r"col_indices must be in \[0, 4\), got -1"),
    "wraps to 0": ([0, 2, 2, 5], [2**32, 3, 0, 2, 3], r"col_indices must be in \[0, 4\), got 4294967296"),
    "unsorted": ([0, 2, 2, 5], [0, 3, 2, 0, 3], "block row 2 has unsorted, 0 after 2"),
    "unsorted at the end": ([0, 2, 2, 5], [0, 3, 0, 3, 2], "block row 2 has unsorted, 2 after 3"),
    "duplicate": ([0, 2, 2, 5], [3, 3, 0, 2, 3], "block row 0 has duplicate column 3"),
}  # fmt: skip


@pytest.mark.parametrize("crow, col, message", INDICES.values(), ids=INDICES)
def test_bad_indices(crow: list[int], col: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockPattern(torch.tensor(crow, dtype=torch.int64), torch.tensor(col), SHAPE, BLOCKSIZE)


CROW, COL = torch.tensor([0, 1]), torch.tensor([0])
ARGUMENTS = {
    "float rows": ((CROW.float(), COL, (2, 2), (2, 2)), TypeError, "crow_indices must be int32 or int64, got"),
    "short cols": ((CROW, COL.short(), (2, 2), (2, 2)), TypeError, "col_indices must be int32 or int64, got"),
    "bool": ((CROW, COL.bool(), (2, 2), (2, 2)), TypeError, "col_indices must be int32 or int64, got torch.bool"),
    "list": (([0, 1], COL, (2, 2), (2, 2)), TypeError, "crow_indices must be a tensor, got list"),
    "sparse": ((CROW, COL.to_sparse(), (2, 2), (2, 2)), TypeError, r"col_indices must be a dense \(strided\) tensor"),
    "2-D": ((CROW, COL[None], (2, 2), (2, 2)), ValueError, r"col_indices must be 1-D, got shape \(1, 1\)"),
    "0-D": ((CROW[0], COL, (2, 2), (2, 2)), ValueError, r"crow_indices must be 1-D, got shape \(\)"),
    "devices": ((CROW, COL.to("meta"), (2, 2), (2, 2)), ValueError, "on the device of crow_indices, cpu, got meta"),
    "one side": ((CROW, COL, (2,), (2, 2)), TypeError, "shape must be two integers"),
    "three sides": ((CROW, COL, (2, 2, 2), (2, 2)), TypeError, "shape must be two integers"),
    "no sides": ((CROW, COL, 2, (2, 2)), TypeError, "shape must be two integers, got 2"),
    "real": ((CROW, COL, (2, 2.0), (2, 2)), TypeError, "shape must be two integers"),
    "negative shape": ((CROW, COL, (-2, 2), (2, 2)), ValueError, r"shape must be at least 0 .*got \(-2, 2\)"),
    "empty block": ((CROW, COL, (2, 2), (2, 0)), ValueError, r"blocksize must be at least 1 .*got \(2, 0\)"),
    "text": ((CROW, COL, (2, 2), "88"), TypeError, "blocksize must be two integers, got '88'"),
    "huge": ((CROW, COL, (2**31, 2), (2**31 - 1, 2)), ValueError, "shape must fit int32"),
    "values": ((CROW, COL, (2, 2), (2**16, 2**15)), ValueError, "are more than int32 can count"),
}  # fmt: skip


@pytest.mark.parametrize("args, error, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockPattern(*args)


def test_indices_on_the_meta_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crow_indices.*meta"):
        BlockPattern(CROW.to("meta"), COL.to("meta"), (2, 2), (2, 2))


def test_bad_masks_and_scores() -> None:
    with pytest.raises(TypeError, match=r"block_mask must be bool, got torch.float32"):
        BlockPattern.from_mask(MASK.float(), BLOCKSIZE)
    with pytest.raises(TypeError, match="block_mask must be a tensor, got list"):
        BlockPattern.from_mask(MASK.tolist(), BLOCKSIZE)
    with pytest.raises(ValueError, match="block_mask must be 2-D"):
        BlockPattern.from_mask(MASK[0], BLOCKSIZE)
    with pytest.raises(
        ValueError, match=r"block_mask must be 4x4 for shape \(12, 12\) and blocksize \(3, 3\), got 3x4"
    ):
        BlockPattern.from_mask(MASK, BLOCKSIZE, (12, 12))
    with pytest.raises(ValueError, match=r"block_mask is elementwise \(7x10.*expected.*3x4.*from_dense"):
        BlockPattern.from_mask(torch.ones(SHAPE, dtype=torch.bool), BLOCKSIZE, SHAPE)
    with pytest.raises(ValueError, match="scores holds NaN"):
        BlockPattern.from_scores(torch.tensor([[math.nan]]), 1, (1, 1))
    for n in (-1, 2):
        with pytest.raises(ValueError, match=rf"n_blocks must be in \[0, 1\], got {n}"):
            BlockPattern.from_scores(torch.ones(1, 1), n, (1, 1))
    with pytest.raises(ValueError, match=r"weight must have shape \(7, 10\), got \(10, 7\)"):
        example().gather(torch.ones(10, 7))
    with pytest.raises(ValueError, match="weight must be 2-D"):
        BlockPattern.from_dense(torch.ones(2, 2, 1), (1, 1))


def test_from_dense_takes_the_weight_of_a_convolution() -> None:
    weight = torch.zeros(4, 3, 2, 2)
    weight[1, 2, 1, 0] = 1  # tap 2, channel 2
    pattern = BlockPattern.from_dense(weight, (1, 1))
    assert pattern.shape == (4, 12)
    assert pattern.to_mask().nonzero().tolist() == [[1, 2 * 3 + 2]]


@settings(max_examples=300)
@given(patterns(), st.data())
def test_mutated_indices_are_refused_or_right(p: BlockPattern, data: st.DataObject) -> None:
    """Whatever is accepted obeys the contract that the kernels rely on; all else raises ValueError."""
    lists = [p.crow_indices.tolist(), p.col_indices.tolist()]
    number = st.integers(-2, 14) | st.sampled_from([INT32_MAX, -INT32_MAX - 1, 2**32, 2**63 - 1, -(2**63)])
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from(lists))
        at = data.draw(st.integers(0, len(target)))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "swap"])):
            case "insert":
                target.insert(at, data.draw(number))
            case "replace" if at < len(target):
                target[at] = data.draw(number)
            case "delete" if at < len(target):
                del target[at]
            case "swap" if at + 1 < len(target):
                target[at], target[at + 1] = target[at + 1], target[at]
    crow, col = lists
    rows = [col[low:high] for low, high in pairwise(crow)]
    right = (
        len(crow) == p.grid[0] + 1
        and crow[0] == 0
        and crow[-1] == len(col)
        and all(low <= high for low, high in pairwise(crow))
        and all(0 <= c < p.grid[1] for c in col)
        and all(a < b for row in rows for a, b in pairwise(row))
    )
    args = torch.tensor(crow, dtype=torch.int64), torch.tensor(col, dtype=torch.int64), p.shape, p.blocksize
    if right:
        accepted = BlockPattern(*args)
        assert accepted.crow_indices.tolist() == crow
        assert accepted.col_indices.tolist() == col
    else:
        with pytest.raises(ValueError, match=r"crow_indices|col_indices"):
            BlockPattern(*args)


# ---- an immutable value -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nothing_given_or_handed_out_changes_the_pattern(dtype: torch.dtype) -> None:
    crow, col = torch.tensor([0, 2, 2, 5], dtype=dtype), torch.tensor([0, 3, 0, 2, 3], dtype=dtype)
    p = BlockPattern(crow, col, SHAPE, BLOCKSIZE)
    for tensor in (crow, col, p.crow_indices, p.col_indices, p.to_mask(), p.blocks_per_row(), p.to_element_mask()):
        tensor.fill_(1)
    assert p == example()
    assert torch.equal(p.to_mask(), MASK)
    with pytest.raises(AttributeError, match="immutable; cannot set 'shape'"):
        p.shape = (1, 1)
    with pytest.raises(AttributeError):
        p.anything = 1


@beta
def test_converted_matrices_share_no_indices() -> None:
    p = BlockPattern.from_mask(MASK, BLOCKSIZE)
    values = torch.ones(p.values_shape)
    p.to_torch(values).col_indices().fill_(1)
    p.to_scipy(values).indices[:] = 1
    assert torch.equal(p.to_mask(), MASK)


def test_copies_and_equality() -> None:
    p = example()
    for other in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p)), p.to("cpu"), example()):
        assert other == p
        assert hash(other) == hash(p)
        assert torch.equal(other.to_mask(), MASK)
    different = [
        BlockPattern.from_mask(MASK, BLOCKSIZE, (8, 10)),
        BlockPattern.from_mask(MASK, (3, 4), (7, 16)),
        BlockPattern.from_mask(MASK.flip(0), BLOCKSIZE, SHAPE),
        BlockPattern.from_mask(MASK.flip(1), BLOCKSIZE, SHAPE),
        BlockPattern.from_mask(~MASK, BLOCKSIZE, SHAPE),
    ]
    assert all(p != q for q in different)
    assert len({p, example(), *different}) == 6
    assert p != "pattern"


def test_unpickling_validates() -> None:
    make, (crow, col, shape, blocksize) = example().__reduce__()
    with pytest.raises(ValueError, match="col_indices must be in"):
        make(crow, col + 1, shape, blocksize)
