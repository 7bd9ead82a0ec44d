"""The binary version of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), unpacked or as its archive.

The Python version is not read: its files are pickles, which can run any code that whoever made them put there.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NAME = "cifar-10"
ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
UNPACKED = "cifar-10-batches-bin"
FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")  # the last are the test images
PICKLES = ("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1")
RECORDS = 10_000  # in each file
IMAGE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then red, green and blue, each row by row


def find(folder: Path) -> list[Path]:
    """The archive, or else the six files unpacked, in ``folder``, its subfolder NAME, or UNPACKED in either.

    Raises:
        FileNotFoundError: not there, or not all six; the message says so where it is the Python version that is there.
    """
    places = [place / sub for place in (folder / NAME, folder) for sub in ("", UNPACKED)]
    for place in places:
        if (place / ARCHIVE).is_file():
            return [place / ARCHIVE]
        missing = [file for file in FILES if not (place / file).is_file()]
        if not missing:
            return [place / file for file in FILES]
        if len(missing) < len(FILES):
            raise FileNotFoundError(f"{place} lacks {', '.join(missing)}")
    message = f"{folder} holds neither {ARCHIVE} nor {UNPACKED} nor {FILES[0]}, nor does its subfolder {NAME}"
    for path in (place / pickle for place in places for pickle in PICKLES):
        if path.exists():
            message += f"; {path} is the Python version, pickled, which is not read since that could run any code"
            break
    raise FileNotFoundError(message)


def read(paths: list[Path]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images [N, 3, 32, 32] and labels [N], train then test, of what :func:`find` found.

    Raises:
        ValueError: a file that is damaged or another one.
    """
    contents = read_archive(paths[0]) if len(paths) == 1 else {path.name: path.read_bytes() for path in paths}
    parts = [_parse(contents[file], f"{file} of {paths[0].parent}") for file in FILES]
    train_images, train_labels = (torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    return train_images, train_labels, *parts[-1]


def read_archive(path: Path) -> dict[str, bytes]:
    """The content of the six files of the archive, once its checksum holds. Nothing is unpacked to disk."""
    content = path.read_bytes()
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != ARCHIVE_MD5:
        raise ValueError(f"{path} has the wrong content: MD5 is {found}, expected {ARCHIVE_MD5}")
    contents = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None and (name := Path(member.name).name) in FILES:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole archive: {error}") from error
    if missing := [file for file in FILES if file not in contents]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return contents


def _parse(content: bytes, what: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and labels [N] of one file."""
    if len(content) != RECORDS * RECORD_BYTES:
        raise ValueError(
            f"{what} is cut off or another file: it has {len(content)} bytes, expected {RECORDS} records of "
            f"{RECORD_BYTES}"
        )
    records = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(RECORDS, RECORD_BYTES).copy())
    labels = records[:, 0].clone()
    if (largest := int(labels.max())) > 9:
        raise ValueError(f"{what} is damaged or another file: it has label {largest}, expected 0 to 9")
    return records[:, 1:].reshape(RECORDS, *IMAGE), labels
