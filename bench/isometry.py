"""``python -m bench.isometry``: approximate isometry, the paper's gradient descent beside the default of L-BFGS.

LeNet-300-100 with orthogonal weights, pruned by SNIP on 1,000 synthetic images: seconds and orthogonality score of the
paper's mode (rate 0.1, 10,000 steps unless ``--steps`` says otherwise) and of the fast one with its own stop, and the
seconds in which the fast one reaches the paper's score, in steps of 5; one thread. A minute for each row.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern import data
from sparsekern.isometry import Mode

STEPS = 5
CASES = ((0.9, (1, 1)), (0.9, (8, 8)), (0.98, (1, 1)))


def row(sparsity: float, blocksize: tuple[int, int], steps: int) -> dict[str, float]:
    """Scores before and after both modes, their seconds, and those of the fast mode to the paper's score."""
    dataset = data.load("synthetic")
    model = sk.models.build("lenet-300-100")
    sk.isometry.orthogonal_(model, generator=torch.Generator().manual_seed(1))
    batch = dataset.train_images[:1000], dataset.train_labels[:1000]
    generator = torch.Generator().manual_seed(1)
    sk.sparsify_(model, sk.prune.snip(model, batch, F.cross_entropy, sparsity, blocksize, generator=generator))
    found = {"before": sk.isometry.orthogonality_score(model)}

    def timed(mode: Mode, most: int | None) -> tuple[float, float]:
        twin = copy.deepcopy(model)
        start = time.perf_counter()
        report = sk.isometry.approximate_isometry_(twin, mode=mode, steps=most)
        return report.after, time.perf_counter() - start

    found["fast score"], found["fast seconds"] = timed("fast", None)
    found["paper score"], found["paper seconds"] = timed("paper", steps)
    reached, most = math.inf, 0
    while reached > found["paper score"]:
        most += STEPS
        reached, found["seconds to the same"] = timed("fast", most)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.isometry", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="of the paper's mode (%(default)s)")
    steps = parser.parse_args(argv).steps
    torch.set_num_threads(1)
    print("| sparsity, blocks | score before | paper: score, seconds | fast: score, seconds | to the same score |")
    print("|---|---|---|---|---|")
    for sparsity, (bh, bw) in CASES:
        f = row(sparsity, (bh, bw), steps)
        print(
            f"| {sparsity:.0%}, {bh}x{bw} | {f['before']:.3f} | {f['paper score']:.4f}, {f['paper seconds']:.1f} | "
            f"{f['fast score']:.4f}, {f['fast seconds']:.1f} | {f['seconds to the same']:.2f}, "
            f"{f['paper seconds'] / f['seconds to the same']:.0f} times faster |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
