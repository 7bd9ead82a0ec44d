"""CIFAR-10: its files, unpacked and as the archive, whole and damaged; and how it is found."""

import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekern import data
from sparsekern.data import cifar, sources

N = 12  # records in a file, in place of 10,000


def record(label: int, image: np.ndarray) -> bytes:
    """Label, then red, green and blue planes, each row by row; ``image`` is [row, column, colour]."""
    planes = [bytes([image[row, column, colour] for row in range(32) for column in range(32)]) for colour in range(3)]
    return bytes([label]) + b"".join(planes)


@pytest.fixture(scope="module")
def arrays():
    """{file: (labels [N], images [N, row, column, colour])}, each colour with a mean of its own."""
    rng = np.random.default_rng(0)
    high = np.array([256, 128, 64])
    return {
        file: (rng.integers(0, 10, N), (rng.random((N, 32, 32, 3)) * high).astype(np.uint8)) for file in cifar.FILES
    }


@pytest.fixture(scope="module")
def contents(arrays):
    return {
        file: b"".join(record(int(label), image) for label, image in zip(labels, images, strict=True))
        for file, (labels, images) in arrays.items()
    }


def packed(contents: dict[str, bytes]) -> bytes:
    """As the official archive: the files in a folder, among others."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for file, content in {"readme.html": b"<html>", **contents}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def expect(monkeypatch, archive: bytes) -> None:
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(archive).hexdigest())


@pytest.fixture
def folder(tmp_path, monkeypatch, contents):
    """A folder with the six files, of N records each; nothing else is to be found."""
    monkeypatch.setattr(cifar, "RECORDS", N)
    monkeypatch.delenv("SPARSEKERN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setitem(sources.ADDRESSES, "cifar-10", (tmp_path / "server").as_uri())
    place = tmp_path / "files"
    place.mkdir()
    for file, content in contents.items():
        (place / file).write_bytes(content)
    return place


def test_standardised_per_channel_like_numpy_in_float64(folder, arrays):
    found = data.load("cifar-10", folder)
    train = np.concatenate([arrays[f"data_batch_{i}.bin"][1] for i in range(1, 6)]) / 255
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, std, rtol=1e-12)
    assert found.train_images.shape == (5 * N, 3, 32, 32) and found.train_images.dtype == torch.float32
    assert found.train_images.is_contiguous()
    test = arrays["test_batch.bin"][1] / 255
    for images, raw in ((found.train_images, train), (found.test_images, test)):
        np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), (raw - mean) / std, atol=2e-6)
    assert found.train_labels.dtype == found.test_labels.dtype == torch.int64
    labels = np.concatenate([arrays[f"data_batch_{i}.bin"][0] for i in range(1, 6)])
    assert found.train_labels.tolist() == labels.tolist()
    assert found.test_labels.tolist() == arrays["test_batch.bin"][0].tolist()


@pytest.mark.parametrize("place", ["", "cifar-10", "cifar-10-batches-bin", "cifar-10/cifar-10-batches-bin"])
@pytest.mark.parametrize("archive", [False, True])
def test_folder_layouts(folder, tmp_path, monkeypatch, contents, place, archive):
    expected = data.load("cifar-10", folder)
    root = tmp_path / "root"
    (root / place).mkdir(parents=True)
    if archive:
        expect(monkeypatch, content := packed(contents))
        (root / place / cifar.ARCHIVE).write_bytes(content)
    else:
        shutil.copytree(folder, root / place, dirs_exist_ok=True)
    monkeypatch.setenv("SPARSEKERN_DATA", str(root))
    found = data.load("cifar-10")
    assert found.source == f"folder {root}"
    assert found.train_images.equal(expected.train_images) and found.test_images.equal(expected.test_images)
    assert found.train_labels.equal(expected.train_labels) and found.test_labels.equal(expected.test_labels)
    assert sorted(path.suffix for path in (root / place).iterdir()) == ([".gz"] if archive else [".bin"] * 6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is cut off or another file: it has 36875 bytes, expected 12 records of 3073"),
        (lambda content: content[:-3073], "cut off"),
        (lambda content: content + b"\0", "another file"),
        (lambda content: b"", "it has 0 bytes"),
        # The records of CIFAR-100 have two labels.
        (lambda content: b"".join(b"\1" + content[i : i + 3073] for i in range(0, len(content), 3073)), "another file"),
        (lambda content: content[:3073] + b"\x0a" + content[3074:], "it has label 10, expected 0 to 9"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_3.bin", "test_batch.bin"])
def test_damaged_files(folder, contents, file, damage, message):
    (folder / file).write_bytes(damage(contents[file]))
    with pytest.raises(ValueError, match=f"^{file} of .*{message}"):
        data.load("cifar-10", folder)


def test_missing_file_is_named(folder):
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"files lacks data_batch_4\.bin$"):
        data.load("cifar-10", folder)
    with pytest.raises(FileNotFoundError, match=r"holds neither cifar-10-binary\.tar\.gz nor"):
        data.load("cifar-10", folder.parent)


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py", "cifar-10/cifar-10-batches-py"])
def test_python_version_is_refused_and_not_read(folder, tmp_path, place):
    root, sprung = tmp_path / "root", tmp_path / "sprung"
    (root / place).mkdir(parents=True)
    for file in cifar.FILES:
        (root / place / file.removesuffix(".bin")).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(FileNotFoundError, match="is the Python version, pickled, which is not read"):
        data.load("cifar-10", root)
    assert not sprung.exists()
    pickle.loads((root / place / "test_batch").read_bytes())
    assert sprung.exists()  # the trap works


def test_archive_is_held_to_its_checksum(folder, tmp_path, contents):
    (tmp_path / cifar.ARCHIVE).write_bytes(packed(contents))
    with pytest.raises(
        ValueError, match=r"has the wrong content: MD5 is .*, expected c32a1d4ab5d03f1284b67883e8d87530"
    ):
        data.load("cifar-10", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda archive: archive[: len(archive) // 2], "is not a whole archive"),
        (lambda archive: b"something else", "is not a whole archive"),
        (lambda archive: b"", "is not a whole archive"),
        (lambda archive: packed({"data_batch_1.bin": b"x"}), r"lacks data_batch_2\.bin, .*, test_batch\.bin"),
    ],
)
def test_damaged_archive(folder, tmp_path, monkeypatch, contents, change, message):
    expect(monkeypatch, archive := change(packed(contents)))
    (tmp_path / cifar.ARCHIVE).write_bytes(archive)
    with pytest.raises(ValueError, match=message):
        data.load("cifar-10", tmp_path)


def test_links_in_the_archive_are_not_followed(folder, tmp_path, monkeypatch, contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "data_batch_1.bin")
        archive.addfile(link)
    expect(monkeypatch, buffer.getvalue())
    (tmp_path / cifar.ARCHIVE).write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"lacks data_batch_1\.bin"):
        data.load("cifar-10", tmp_path)


def test_download_fills_the_cache_and_a_wrong_one_does_not(folder, tmp_path, monkeypatch, contents):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar-10")
    ways = ("--data DIR or SPARSEKERN_DATA", "cache", "Debian has no package of cifar-10", "official address")
    assert all(way in str(caught.value) for way in ways)

    server, cache = tmp_path / "server", tmp_path / "cache" / "sparsekern" / "cifar-10"
    server.mkdir()
    expect(monkeypatch, archive := packed(contents))
    (server / cifar.ARCHIVE).write_bytes(archive[:-1])
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary\.tar\.gz has the wrong content"):
        data.load("cifar-10")
    assert not list(cache.iterdir())

    (server / cifar.ARCHIVE).write_bytes(archive)
    first = data.load("cifar-10")
    assert "official address" in first.source
    assert [path.name for path in cache.iterdir()] == [cifar.ARCHIVE]
    shutil.rmtree(server)
    again = data.load("cifar-10")
    assert "cache" in again.source
    assert again.train_images.equal(first.train_images)


def test_official_address():
    assert f"{sources.ADDRESSES['cifar-10']}/{cifar.ARCHIVE}" == (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    )
