"""Which block, and which placement of blocks, costs how much accuracy at equal density?

No published table compares pruning at initialisation in blocks; here every block size meets every way to place blocks.
"""

from __future__ import annotations

from typing import Any

from .cell import Cell

BLOCKS = ((1, 1), (4, 1), (1, 8), (4, 4), (8, 8), (16, 16), (8, 1), (16, 1), (32, 32))
SPARSITIES = (0.9, 0.95, 0.98, 0.8)
# Name in tables and plots: the fields of a cell.
PLACEMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "global": {"placement": "global"},
    "best": {"placement": "best"},
    "draw": {"placement": "draw", "balance": "none"},
    "draw, rows even": {"placement": "draw", "balance": "rows"},
    "draw, rows and columns even": {"placement": "draw", "balance": "both"},
    "random, rows even": {"placement": "random", "balance": "rows"},
    "random, rows and columns even": {"placement": "random", "balance": "both"},
    "draw, rows and columns even, isometry": {"placement": "draw", "balance": "both", "isometry": True},
}
# At 0.1 dense LeNet-5, which has no ReLU after its convolutions, diverges.
NETWORKS = {
    "lenet-300-100": Cell("lenet-300-100"),
    "lenet-300-100-wide": Cell("lenet-300-100", width=4.0),
    "lenet-5": Cell("lenet-5-caffe", epochs=3, lr=0.05),
    "simple-cnn": Cell("simple-cnn", epochs=3),
    "vgg": Cell("vgg-like", width=0.25, epochs=1, lr=0.05),
    "resnet": Cell("resnet-20", width=0.5, epochs=1),
}


def cells(base: Cell) -> dict[tuple[str, str], Cell]:
    """{(row, column): cell}: dense, and every sparsity and placement by every block."""
    found = {("dense", "dense"): base.but(method="dense")}
    for sparsity in SPARSITIES:
        for name, rules in PLACEMENTS.items():
            for block in BLOCKS:
                if block == (1, 1) and rules.get("placement", "best") == "best":
                    continue  # for single weights that is "global"
                cell = base.but(sparsity=sparsity, blocksize=block, **rules)
                found[f"{sparsity:.0%}, {name}", f"{block[0]}x{block[1]}"] = cell
    return found
