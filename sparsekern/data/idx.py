"""The idx file format of MNIST and Fashion-MNIST, raw or gzipped (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UINT8 = 0x08


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """A uint8 tensor of the file's own shape, e.g. [60000, 28, 28].

    Args:
        path: the file; gzipped where its name ends in ".gz".
        sha256: expected checksum of the content after decompression, so that both forms are held to the same one.

    Raises:
        ValueError: not the file expected, cut off, or not an idx file of bytes.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} has the wrong content: SHA-256 (decompressed) is {found}, expected {sha256}")
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> Tensor:
    if len(content) < 4 or content[:3] != bytes([0, 0, UINT8]):
        raise ValueError(f"{path} is not an idx file of bytes: it starts with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    data = np.frombuffer(content[start:], dtype=np.uint8)
    if len(content) < start or data.size != math.prod(shape):
        raise ValueError(f"{path} is cut off or damaged: its header says {shape}, its data are {data.size} bytes")
    return torch.from_numpy(data.copy()).view(shape)
