"""Which block, and which placement of blocks, costs how much accuracy at equal density?

No published table compares pruning at initialisation in blocks; here every block size meets every way to place blocks.
"""

from __future__ import annotations

from .cell import Cell

BLOCKS = ((1, 1), (4, 1), (1, 8), (4, 4), (8, 8), (16, 16), (8, 1), (16, 1), (32, 32))
SPARSITIES = (0.9, 0.95, 0.98, 0.8)
# Name in tables and plots: the fields of a cell.
PLACEMENTS: dict[str, dict[str, str]] = {
    "global": {"placement": "global"},
    "best": {"placement": "best"},
    "draw": {"placement": "draw", "balance": "none"},
    "draw, rows even": {"placement": "draw", "balance": "rows"},
    "draw, rows and columns even": {"placement": "draw", "balance": "both"},
    "random, rows even": {"placement": "random", "balance": "rows"},
    "random, rows and columns even": {"placement": "random", "balance": "both"},
}
EPOCHS = {"lenet-300-100": 8, "lenet-5-caffe": 3, "simple-cnn": 3}
RATES = {"lenet-5-caffe": 0.05}  # at 0.1 the dense one, which has no ReLU after its convolutions, diverges


def cells(model: str, seeds: int, width: float = 1.0) -> list[Cell]:
    """Dense and every block, sparsity and placement, seed by seed so that what is there at any time is balanced."""
    found = []
    for seed in range(1, seeds + 1):
        base = Cell(model, width, epochs=EPOCHS[model], lr=RATES.get(model, 0.1), seed=seed)
        found.append(base.but(method="dense"))
        for sparsity in SPARSITIES:
            for block in BLOCKS:
                for rules in PLACEMENTS.values():
                    if block == (1, 1) and rules["placement"] == "best":
                        continue  # for single weights that is "global"
                    found.append(base.but(sparsity=sparsity, blocksize=block, **rules))
    return found
