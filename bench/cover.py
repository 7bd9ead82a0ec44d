"""What of the product of everything is measured: tables of :class:`Part`, and nothing but tables.

All layers x 9 blocksizes x 6 sparsities x 4 products x batches x threads would take days. The full cover takes under an
hour on two cores: two layers see everything, others what sets them apart. Every line of a part is measured with dense
torch and all its sparsities in one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

PRODUCTS = ("forward", "dgrad", "wgrad", "layer")
BOTH = ("forward", "layer")
BLOCKSIZES = (1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (4, 1), (8, 1), (16, 1), (1, 8)
MAIN = (1, 1), (4, 1), (8, 8), (16, 16)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Part:
    """Names of cases, and what is measured of each: the product of the rest.

    ``peers``: other libraries too, where they can do the product, with one thread (most bring threads of their own) and
    from ``run.PEERS_FROM`` sparsity on.
    ``compiled``: ``torch.compile`` of dense torch is a candidate for the baseline.
    """

    cases: tuple[str, ...]
    blocksizes: tuple[tuple[int, int], ...] = MAIN
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    products: tuple[str, ...] = BOTH
    threads: tuple[int, ...] = (1,)
    peers: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Cover:
    """``networks`` are names of :data:`bench.networks.NETWORKS`; ``rounds`` and ``limit_seconds`` are those of one
    group (:func:`sparsekern.timing.interleaved`)."""

    parts: tuple[Part, ...]
    networks: tuple[str, ...]
    threads: tuple[int, ...]  # of networks, where they have them
    rounds: int
    limit_seconds: float


FULL = Cover(
    parts=(
        # Everything, of one linear layer and one convolution.
        Part(
            ("linear-256x1024x1024", "conv3x3-128@16"), BLOCKSIZES, SPARSITIES, PRODUCTS, peers=True, compiled=True
        ),
        # Layers with targets, and those of small networks.
        Part(
            ("lenet-300-100-fc1", "lenet-5-conv2", "conv3x3-64@32", "conv3x3-256@8", "conv3x3-256@14",
             "conv1x1-256-1024@14"),
            MAIN, (0.5, 0.8, 0.9, 0.95, 0.98), PRODUCTS, peers=True, compiled=True,
        ),
        Part(("linear-1024x4096x4096",), MAIN, (0.9, 0.95, 0.98), PRODUCTS),
        # Other batches.
        Part(("linear-1x1024x1024", "linear-32x1024x1024", "conv3x3-128@16-batch1"), compiled=True),
        Part(("conv3x3-128@16-batch256",), ((1, 1), (8, 8))),
        # Other layers of real networks.
        Part(
            ("lenet-300-100-fc2", "lenet-5-fc1", "transformer-mlp-up", "transformer-mlp-down", "vit-b-qkv",
             "vit-b-mlp-up", "vit-b-mlp-up-batch32", "conv3x3-512@4", "wrn-22-8-128@32", "wrn-22-8-256@16",
             "wrn-22-8-512@8", "resnet-50-stem7x7s2", "conv3x3s2-128@56", "conv1x1s2-256-512@56"),
            ((1, 1), (4, 1), (8, 8)),
        ),
        Part(("conv3x3g32-128@28", "depthwise3x3-256@14"), ((1, 1), (4, 1))),
        # Two threads.
        Part(
            ("lenet-300-100-fc1", "linear-256x1024x1024", "conv3x3-64@32", "conv3x3-128@16"), MAIN, threads=(2,),
            compiled=True,
        ),
    ),
    networks=("net-lenet-300-100", "net-lenet-5-caffe", "net-simple-cnn", "net-vgg-d", "net-resnet-18"),
    threads=(1, 2),
    rounds=15,
    limit_seconds=3.0,
)  # fmt: skip
QUICK = Cover(
    parts=(
        Part(("lenet-300-100-fc1", "linear-256x1024x1024"), ((1, 1), (4, 1), (8, 8)), peers=True, compiled=True),
        Part(("lenet-300-100-fc2", "lenet-5-conv2", "conv3x3-128@16"), ((1, 1), (4, 1), (8, 8))),
    ),
    networks=("net-lenet-300-100",),
    threads=(1,),
    rounds=9,
    limit_seconds=0.5,
)


def only(cover: Cover, names: Sequence[str], networks: Sequence[str]) -> Cover:
    """What ``cover`` has of these cases and networks; the first part's share of a case that it has not."""
    parts = [replace(part, cases=tuple(name for name in part.cases if name in names)) for part in cover.parts]
    covered = {name for part in parts for name in part.cases}
    missing = tuple(name for name in names if name not in covered)
    parts.append(replace(cover.parts[0], cases=missing, peers=False, compiled=False))
    return replace(cover, parts=tuple(part for part in parts if part.cases), networks=tuple(networks))


def on_cores(cover: Cover, cores: int) -> Cover:
    """``cover`` without what needs more threads than there are cores."""
    parts = (replace(part, threads=tuple(n for n in part.threads if n <= cores)) for part in cover.parts)
    return replace(
        cover,
        parts=tuple(part for part in parts if part.threads),
        threads=tuple(n for n in cover.threads if n <= cores),
    )
