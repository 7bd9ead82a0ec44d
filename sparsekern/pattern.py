"""Which blocks of a matrix exist: :class:`BlockPattern`, which pruning, layers, checkpoints and kernels share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .weights import weight_matrix

if TYPE_CHECKING:
    import scipy.sparse

INT32_MAX = 2**31 - 1


class BlockPattern:
    """The stored blocks of a block-sparse matrix, without their values. Immutable, validated, hashable.

    The matrix has ``shape`` (rows, columns) and is tiled by blocks of ``blocksize`` (bh, bw) from its top left corner,
    exactly as ``torch.sparse_bsr_tensor`` does; unlike there, blocks may overhang the bottom and right edges, where
    their entries are not weights. Block (1, 1) is plain unstructured sparsity (CSR).

    A layer's values go with it as a tensor of shape [nnz_blocks, bh, bw], in the order of ``col_indices``.

    Args:
        crow_indices: int32 or int64, [block_rows + 1]: block row ``i`` owns blocks ``crow[i]`` to ``crow[i + 1]``.
        col_indices: int32 or int64, [nnz_blocks]: block column of each stored block, increasing within a block row.
        shape: (rows, columns) of the matrix, in elements.
        blocksize: (bh, bw), both at least 1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: indices that do not describe a matrix: unsorted, duplicate or out-of-range columns, rows that
            decrease, wrong lengths, other devices, or more than int32 can count.

    The indices are checked once, here, in time linear in their number; they are narrowed to int32 and copied, so later
    changes to the tensors given do not matter.
    """

    shape: tuple[int, int]
    blocksize: tuple[int, int]
    grid: tuple[int, int]  # (block rows, block columns)
    values_shape: tuple[int, int, int]  # (nnz_blocks, bh, bw), the shape of the values that go with this pattern
    device: torch.device
    _crow: Tensor
    _col: Tensor
    _plans: dict[Any, Any]  # kept here by functional.prepare, so that they live as long as the pattern

    def __init__(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        shape: tuple[int, int],
        blocksize: tuple[int, int],
    ) -> None:
        shape = _int_pair("shape", shape, minimum=0)
        blocksize = _int_pair("blocksize", blocksize, minimum=1)
        grid = (-(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1]))
        crow, col = _validate(crow_indices, col_indices, grid, blocksize)
        fields = {
            "shape": shape,
            "blocksize": blocksize,
            "grid": grid,
            "values_shape": (col.numel(), *blocksize),
            "device": crow.device,
            "_crow": crow,
            "_col": col,
            "_plans": {},
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BlockPattern is immutable; cannot set {name!r}")

    # ---- sizes and statistics -------------------------------------------------------------------------------------

    @property
    def crow_indices(self) -> Tensor:
        """int32 [block_rows + 1], a copy."""
        return self._crow.clone()

    @property
    def col_indices(self) -> Tensor:
        """int32 [nnz_blocks], a copy."""
        return self._col.clone()

    @property
    def nnz_blocks(self) -> int:
        """Number of stored blocks."""
        return self._col.numel()

    @property
    def nnz(self) -> int:
        """Number of stored weights; the overhang of edge blocks is not counted."""
        (rows, cols), (bh, bw), (grid_rows, grid_cols) = self.shape, self.blocksize, self.grid
        total = self.nnz_blocks * bh * bw
        over_h, over_w = grid_rows * bh - rows, grid_cols * bw - cols
        if over_h == over_w == 0 or total == 0:
            return total
        in_last_row = int(self._crow[-1] - self._crow[-2])
        in_last_col = int((self._col == grid_cols - 1).sum())
        in_corner = int(self._col[-1] == grid_cols - 1) if in_last_row else 0
        return total - in_last_row * over_h * bw - in_last_col * over_w * bh + in_corner * over_h * over_w

    @property
    def density(self) -> float:
        """Stored weights / weights of the dense matrix (1.0 for an empty matrix)."""
        total = self.shape[0] * self.shape[1]
        return self.nnz / total if total else 1.0

    def effective_density(self, live_columns: Tensor | None = None, live_rows: Tensor | None = None) -> float:
        """Density of the weights that can matter: those between a live input (column) and a live output (row).

        Args:
            live_columns: bool [columns], inputs that are not constant (default: all).
            live_rows: bool [rows], outputs that something reads (default: all).

        Source: Vysogorets & Kempe, "Connectivity matters", 2023 (effective sparsity), one layer of it.
        """
        mask = self.to_element_mask()
        if live_columns is not None:
            mask &= live_columns.to(device=mask.device, dtype=torch.bool)
        if live_rows is not None:
            mask &= live_rows.to(device=mask.device, dtype=torch.bool)[:, None]
        return float(mask.sum()) / mask.numel() if mask.numel() else 1.0

    def blocks_per_row(self) -> Tensor:
        """int64 [block_rows]: number of stored blocks in each block row."""
        return self._crow.diff().long()

    def row_histogram(self) -> Tensor:
        """int64 [max blocks per row + 1]: entry k counts the block rows that store k blocks."""
        return torch.bincount(self.blocks_per_row())

    def dead_rows(self) -> Tensor:
        """Rows (outputs) that no stored block covers, int64, ascending."""
        return _cover(self.blocks_per_row() == 0, self.blocksize[0], self.shape[0]).nonzero().flatten()

    def dead_columns(self) -> Tensor:
        """Columns (inputs) that no stored block covers, int64, ascending."""
        used = torch.zeros(self.grid[1], dtype=torch.bool, device=self.device)
        used[self._col.long()] = True
        return _cover(~used, self.blocksize[1], self.shape[1]).nonzero().flatten()

    # ---- building -------------------------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls, block_mask: Tensor, blocksize: tuple[int, int], shape: tuple[int, int] | None = None
    ) -> BlockPattern:
        """From the boolean grid of blocks, [block_rows, block_cols]; ``shape`` tells where blocks overhang the edge.

        Raises:
            ValueError: the grid does not belong to ``shape``. An elementwise mask is refused by name; use
                :meth:`from_dense` for those.
        """
        _check_tensor("block_mask", block_mask, 2)
        if block_mask.dtype != torch.bool:
            raise TypeError(f"block_mask must be bool, got {block_mask.dtype}")
        bh, bw = _int_pair("blocksize", blocksize, minimum=1)
        rows, cols = block_mask.shape
        if shape is None:
            shape = (rows * bh, cols * bw)
        shape = _int_pair("shape", shape, minimum=0)
        grid = (-(-shape[0] // bh), -(-shape[1] // bw))
        if (rows, cols) != grid:
            if (rows, cols) == shape:
                raise ValueError(
                    f"block_mask is elementwise ({rows}x{cols}, the shape of the matrix); expected one entry per "
                    f"{bh}x{bw} block, {grid[0]}x{grid[1]}. BlockPattern.from_dense takes elementwise masks"
                )
            raise ValueError(
                f"block_mask must be {grid[0]}x{grid[1]} for shape {shape} and blocksize {(bh, bw)}, got {rows}x{cols}"
            )
        if block_mask.numel() and int(block_mask.sum()) > INT32_MAX:
            raise ValueError(f"block_mask stores more than {INT32_MAX} blocks, which int32 indices cannot count")
        crow = torch.zeros(rows + 1, dtype=torch.int64, device=block_mask.device)
        torch.cumsum(block_mask.sum(1), 0, out=crow[1:])
        return cls(crow, block_mask.nonzero()[:, 1], shape, (bh, bw))

    @classmethod
    def from_dense(cls, weight: Tensor, blocksize: tuple[int, int]) -> BlockPattern:
        """The blocks of a weight that hold anything but zero.

        Args:
            weight: weights or an elementwise mask, [rows, columns], or [C_out, C_in / groups, kh, kw] of a convolution.
            blocksize: (bh, bw).
        """
        if isinstance(weight, Tensor) and weight.dim() == 4:
            weight = weight_matrix(weight)
        _check_tensor("weight", weight, 2)
        bh, bw = _int_pair("blocksize", blocksize, minimum=1)
        rows, cols = weight.shape
        return cls.from_mask(tile(weight.detach() != 0, (bh, bw)).flatten(2).any(-1), (bh, bw), (rows, cols))

    @classmethod
    def from_scores(
        cls, scores: Tensor, n_blocks: int, blocksize: tuple[int, int], shape: tuple[int, int] | None = None
    ) -> BlockPattern:
        """The ``n_blocks`` best of a grid of block scores, [block_rows, block_cols]; the earlier block wins a tie."""
        _check_tensor("scores", scores, 2)
        if torch.isnan(scores).any():
            raise ValueError("scores holds NaN")
        if not 0 <= n_blocks <= scores.numel():
            raise ValueError(f"n_blocks must be in [0, {scores.numel()}], got {n_blocks}")
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[scores.flatten().sort(descending=True, stable=True).indices[:n_blocks]] = True
        return cls.from_mask(mask.view_as(scores), blocksize, shape)

    @classmethod
    def from_bsr(cls, matrix: Tensor | scipy.sparse.spmatrix) -> BlockPattern:
        """The pattern of a ``torch.sparse_bsr_tensor`` / ``torch.sparse_csr_tensor`` or a SciPy BSR / CSR matrix."""
        if isinstance(matrix, Tensor):
            if matrix.layout not in (torch.sparse_bsr, torch.sparse_csr) or matrix.dim() != 2:
                raise TypeError(f"matrix must be a 2-D sparse BSR or CSR tensor, got {matrix.layout}, {matrix.dim()}-D")
            (rows, cols), (bh, bw) = matrix.shape, matrix.values().shape[1:] or (1, 1)
            return cls(matrix.crow_indices(), matrix.col_indices(), (rows, cols), (bh, bw))
        kind = getattr(matrix, "format", None)
        if kind not in ("bsr", "csr"):
            raise TypeError(f"matrix must be a sparse BSR or CSR matrix of torch or SciPy, got {type(matrix).__name__}")
        blocksize = matrix.blocksize if kind == "bsr" else (1, 1)
        return cls(torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices), matrix.shape, blocksize)

    # ---- other forms ----------------------------------------------------------------------------------------------

    def to_mask(self) -> Tensor:
        """bool [block_rows, block_cols]: the grid of blocks."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.device)
        mask[self.block_rows(), self._col.long()] = True
        return mask

    def to_element_mask(self) -> Tensor:
        """bool [rows, columns]: the weights that exist."""
        return _untile(self.to_mask()[:, :, None, None].expand(*self.grid, *self.blocksize), self.shape)

    def to_torch(self, values: Tensor) -> Tensor:
        """``torch.sparse_bsr_tensor`` of this pattern and ``values``; its shape must be a multiple of the blocks."""
        self.check_values(values)
        if any(n % b for n, b in zip(self.shape, self.blocksize, strict=True)):
            raise ValueError(
                f"torch BSR has no overhang: shape {self.shape} is no multiple of blocksize {self.blocksize}"
            )
        return torch.sparse_bsr_tensor(self._crow.clone(), self._col.clone(), values, self.shape, check_invariants=True)

    def to_scipy(self, values: Tensor) -> scipy.sparse.bsr_matrix:
        """``scipy.sparse.bsr_matrix`` of this pattern and a copy of ``values``; the blocks must divide its shape."""
        import scipy.sparse

        self.check_values(values)
        if any(n % b for n, b in zip(self.shape, self.blocksize, strict=True)):
            raise ValueError(
                f"SciPy BSR has no overhang: shape {self.shape} is no multiple of blocksize {self.blocksize}"
            )
        parts = (values.detach().cpu().numpy().copy(), self._col.cpu().numpy().copy(), self._crow.cpu().numpy().copy())
        return scipy.sparse.bsr_matrix(parts, shape=self.shape)

    def gather(self, weight: Tensor) -> Tensor:
        """Values [nnz_blocks, bh, bw] of the matrix ``weight`` [rows, columns] at stored blocks; 0 beyond the edge."""
        _check_tensor("weight", weight, 2)
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"weight must have shape {self.shape}, got {tuple(weight.shape)}")
        return tile(weight, self.blocksize)[self.block_rows(), self._col.long()].contiguous()

    def scatter(self, values: Tensor) -> Tensor:
        """Dense matrix [rows, columns] that holds ``values`` at the stored blocks and 0 elsewhere. Differentiable."""
        self.check_values(values)
        tiles = values.new_zeros((*self.grid, *self.blocksize))
        return _untile(tiles.index_put((self.block_rows(), self._col.long()), values), self.shape)

    def edge_mask(self) -> Tensor:
        """bool [nnz_blocks, bh, bw]: which entries of the values are weights; those beyond the edge are not."""
        (bh, bw), (rows, cols), device = self.blocksize, self.shape, self.device
        row = self.block_rows()[:, None] * bh + torch.arange(bh, device=device)
        col = self._col.long()[:, None] * bw + torch.arange(bw, device=device)
        return (row < rows)[:, :, None] & (col < cols)[:, None, :]

    def block_rows(self) -> Tensor:
        """int64 [nnz_blocks]: block row of each stored block."""
        index = torch.arange(self.grid[0], device=self.device)
        return torch.repeat_interleave(index, self.blocks_per_row(), output_size=self.nnz_blocks)

    def transposed(self) -> tuple[BlockPattern, Tensor]:
        """The pattern of the transposed matrix, and where its blocks stand among this one's values.

        Returns:
            (pattern, index): stored block ``i`` of the transposed matrix is ``values[index[i]].T``; index is int64.
            No values are copied.
        """
        index = torch.sort(self._col, stable=True).indices
        counts = torch.bincount(self._col, minlength=self.grid[1])
        crow = torch.zeros(self.grid[1] + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=crow[1:])
        shape, blocksize = (self.shape[1], self.shape[0]), (self.blocksize[1], self.blocksize[0])
        return BlockPattern(crow, self.block_rows()[index], shape, blocksize), index

    def to(self, device: torch.device | str | int) -> BlockPattern:
        """This pattern with its indices on ``device``; itself when they are there already."""
        probe = torch.empty(0, device=device).device
        if probe == self.device:
            return self
        return BlockPattern(self._crow.to(probe), self._col.to(probe), self.shape, self.blocksize)

    def check_values(self, values: Tensor, name: str = "values") -> None:
        """Raise ValueError unless ``values`` has the shape and device this pattern asks for."""
        if values.shape != self.values_shape:
            raise ValueError(
                f"{name} must have shape {self.values_shape} (nnz_blocks, bh, bw), got {tuple(values.shape)}"
            )
        if values.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, where the pattern is, got {values.device}")

    # ---- an ordinary value ----------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPattern):
            return NotImplemented
        same = self.shape == other.shape and self.blocksize == other.blocksize and self.nnz_blocks == other.nnz_blocks
        if not same:
            return False
        return torch.equal(self._crow.cpu(), other._crow.cpu()) and torch.equal(self._col.cpu(), other._col.cpu())

    def __hash__(self) -> int:
        return hash((self.shape, self.blocksize, self.nnz_blocks))

    def __reduce__(self) -> tuple[Any, ...]:
        return (BlockPattern, (self._crow, self._col, self.shape, self.blocksize))

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPattern:
        return self

    def __repr__(self) -> str:
        return (
            f"BlockPattern(shape={self.shape}, blocksize={self.blocksize}, nnz_blocks={self.nnz_blocks}, "
            f"density={self.density:.4g})"
        )


def tile(matrix: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """[rows, columns] -> [block_rows, block_cols, bh, bw]; entries beyond the edge are 0."""
    bh, bw = blocksize
    rows, cols = matrix.shape
    pad = (0, -cols % bw, 0, -rows % bh)
    if any(pad):
        matrix = torch.nn.functional.pad(matrix, pad)
    return matrix.reshape(matrix.shape[0] // bh, bh, matrix.shape[1] // bw, bw).transpose(1, 2)


def _untile(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of :func:`tile`."""
    rows, cols, bh, bw = tiles.shape
    return tiles.transpose(1, 2).reshape(rows * bh, cols * bw)[: shape[0], : shape[1]].contiguous()


def _cover(flags: Tensor, size: int, length: int) -> Tensor:
    return flags.repeat_interleave(size)[:length]


def _int_pair(name: str, pair: Any, minimum: int) -> tuple[int, int]:
    try:
        first, second = (int(n.__index__()) for n in pair)
    except (TypeError, ValueError, AttributeError):
        raise TypeError(f"{name} must be two integers, got {pair!r}") from None
    if min(first, second) < minimum:
        raise ValueError(f"{name} must be at least {minimum} in both dimensions, got {(first, second)}")
    if max(first, second) > INT32_MAX:
        raise ValueError(f"{name} must fit int32 in both dimensions, got {(first, second)}")
    return first, second


def _check_tensor(name: str, tensor: Any, dim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {tensor.layout}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must be {dim}-D, got shape {tuple(tensor.shape)}")


def _validate(crow: Tensor, col: Tensor, grid: tuple[int, int], blocksize: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Check the contract that every kernel relies on and return int32 copies of the indices."""
    for name, index in (("crow_indices", crow), ("col_indices", col)):
        _check_tensor(name, index, 1)
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {index.dtype}")
    if crow.device != col.device:
        raise ValueError(f"col_indices must be on the device of crow_indices, {crow.device}, got {col.device}")
    if crow.is_meta:
        raise ValueError("crow_indices must hold numbers to be checked, got a tensor on the meta device")
    crow, col = crow.detach(), col.detach()
    nnz, (rows, cols) = col.numel(), grid
    if crow.numel() != rows + 1:
        raise ValueError(f"crow_indices must have {rows + 1} entries (block rows + 1), got {crow.numel()}")
    if nnz * blocksize[0] * blocksize[1] > INT32_MAX:
        raise ValueError(f"the values of {nnz} blocks of {blocksize} are more than int32 can count ({INT32_MAX})")
    if int(crow[0]) != 0:
        raise ValueError(f"crow_indices must start with 0, got {int(crow[0])}")
    falls = crow[1:] < crow[:-1]
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        raise ValueError(
            f"crow_indices must not decrease: entry {row + 1} is {int(crow[row + 1])} after {int(crow[row])}"
        )
    if int(crow[-1]) != nnz:
        raise ValueError(f"crow_indices must end with the number of stored blocks, {nnz}, got {int(crow[-1])}")
    if nnz:
        low, high = int(col.min()), int(col.max())
        if low < 0 or high >= cols:
            raise ValueError(f"col_indices must be in [0, {cols}), got {low if low < 0 else high}")
        starts_row = torch.zeros(nnz, dtype=torch.bool, device=col.device)
        inner = crow[1:-1].long()
        starts_row[inner[inner < nnz]] = True
        bad = (col[1:] <= col[:-1]) & ~starts_row[1:]
        if bool(bad.any()):
            at = int(bad.nonzero()[0]) + 1
            row = int(torch.searchsorted(crow, torch.tensor(at, dtype=crow.dtype, device=crow.device), right=True)) - 1
            here, last = int(col[at]), int(col[at - 1])
            what = f"duplicate column {here}" if here == last else f"unsorted, {here} after {last}"
            raise ValueError(f"col_indices must strictly increase within a block row: block row {row} has {what}")
    return crow.to(torch.int32, copy=True).contiguous(), col.to(torch.int32, copy=True).contiguous()
