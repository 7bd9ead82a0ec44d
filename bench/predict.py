"""``python -m bench.predict``: how far the cost model is off for the layers of this benchmark, new to calibration."""

from __future__ import annotations

import sys
from collections import OrderedDict

import torch
from rich.console import Console
from torch import nn

from sparsekern.cost import advise, check, show, table
from sparsekern.timing import keep_freed_memory

from .cases import CASES

SAMPLE = 4  # of each case, drawn from blocksizes x sparsities
MOST_MULTIPLY_ADDS = 2e9  # of a forward; larger cases take minutes


def main() -> int:
    console, holds = Console(), table.current()
    keep_freed_memory()
    checked: list[check.Checked] = []
    for seed, case in enumerate(CASES.values()):
        rows = case.output[0] * (case.output[2] * case.output[3] if case.is_conv else 1)
        if case.matrix[0] * case.matrix[1] * rows > MOST_MULTIPLY_ADDS:
            continue
        torch.manual_seed(seed)
        layer = case.dense(case.layouts[0])
        # As a hidden layer: its input needs a gradient, and it is not the classifier, which has blocks of 1x1.
        model = nn.Sequential(OrderedDict({case.name: layer, "classifier": nn.Linear(case.output[-1], 1)}))
        advice = advise.advise(model, torch.randn(case.input, requires_grad=True), table=holds)
        checked += check.check(model, [row for row in advice if row.name == case.name], holds, SAMPLE, seed)
    console.print(show.check_table(checked), f"Predicted by {holds.source()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
