"""Data sets: parsing, checksums, the search for files and its errors; CIFAR-10 and batches have files of their own."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekern import data
from sparsekern.data import sources
from sparsekern.data.idx import read_idx

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a tiny "mnist" of random bytes whose checksums are the expected ones; and its arrays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for file, n in zip(FILES, (20, 20, 10, 10), strict=True):
        arrays[file] = rng.integers(0, 256, (n, 28, 28)) if "images" in file else rng.integers(0, 10, n)
    sums = {file: hashlib.sha256(idx_bytes(array)).hexdigest() for file, array in arrays.items()}
    monkeypatch.setitem(sources.CHECKSUMS, "mnist", sums)
    monkeypatch.delenv("SPARSEKERN_DATA", raising=False)
    folder = tmp_path / "files"
    folder.mkdir()
    for file, array in arrays.items():
        (folder / file).write_bytes(idx_bytes(array))
    return folder, arrays


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """No data set on this machine, no network, no apt; the cache is an empty folder."""
    monkeypatch.delenv("SPARSEKERN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(sources, "ADDRESSES", dict.fromkeys(sources.ADDRESSES, (tmp_path / "absent").as_uri()))
    return tmp_path


def test_standardised_like_numpy_in_float64(tiny):
    folder, arrays = tiny
    found = data.load("mnist", folder)
    raw = arrays[FILES[0]].astype(np.float64) / 255
    expected = (raw - raw.mean()) / raw.std()
    assert found.train_images.shape == (20, 1, 28, 28)
    np.testing.assert_allclose((found.mean, found.std), ([raw.mean()], [raw.std()]), rtol=1e-12)
    assert found.train_images.dtype == torch.float32
    np.testing.assert_allclose(found.train_images[:, 0].numpy(), expected, atol=2e-6)
    test = (arrays[FILES[2]] / 255 - raw.mean()) / raw.std()
    np.testing.assert_allclose(found.test_images[:, 0].numpy(), test, atol=2e-6)
    assert found.train_labels.dtype == torch.int64
    assert found.train_labels.tolist() == arrays[FILES[1]].tolist()
    assert found.test_labels.tolist() == arrays[FILES[3]].tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("subfolder", [False, True])
def test_folder_layouts(tiny, tmp_path, packed, subfolder):
    _folder, arrays = tiny
    root = tmp_path / "root"
    place = root / "mnist" if subfolder else root
    place.mkdir(parents=True)
    for file, array in arrays.items():
        content = idx_bytes(array)
        (place / (file + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    assert data.load("mnist", root).train_labels.tolist() == arrays[FILES[1]].tolist()


def test_environment_variable_names_the_folder(tiny, monkeypatch):
    folder, _ = tiny
    monkeypatch.setenv("SPARSEKERN_DATA", str(folder))
    assert str(folder) in data.load("mnist").source


def test_wrong_content_is_refused_and_named(tiny):
    folder, _ = tiny
    path = folder / FILES[2]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{FILES[2]} has the wrong content"):
        data.load("mnist", folder)


def test_folder_given_is_the_only_one_looked_at(tiny):
    folder, _ = tiny
    (folder / FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {FILES[1]}"):
        data.load("mnist", folder)
    with pytest.raises(FileNotFoundError, match="holds no train-images"):
        data.load("mnist", folder.parent)


def test_error_names_every_way(isolated):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("fashion-mnist")
    message = str(caught.value)
    ways = ("--data DIR or SPARSEKERN_DATA", "Debian's package in", "cache", "apt-get download", "official address")
    assert all(way in message for way in ways)
    assert "apt-get and dpkg are not installed" in message


def test_download_fills_the_cache_and_a_wrong_one_does_not(tiny, isolated, monkeypatch):
    _folder, arrays = tiny
    server = isolated / "server"
    server.mkdir()
    monkeypatch.setitem(sources.ADDRESSES, "mnist", server.as_uri())
    for file, array in arrays.items():
        (server / f"{file}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    labels = server / f"{FILES[3]}.gz"
    good = labels.read_bytes()
    labels.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(FileNotFoundError, match=rf"{FILES[3]}.gz has the wrong content"):
        data.load("mnist")
    cache = isolated / "cache" / "sparsekern" / "mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{file}.gz" for file in FILES[:3])

    labels.write_bytes(good)
    assert "official address" in data.load("mnist").source
    assert "cache" in data.load("mnist").source


def test_package_is_fetched_without_root(tiny, isolated, monkeypatch):
    """Stand-ins for apt-get and dpkg: the first download fails, as it does without a package list."""
    _folder, arrays = tiny
    calls = []

    def stand_in(command: list[str], scratch: Path) -> str | None:
        calls.append(command[0] + " " + next(word for word in command if word in ("download", "update", "-x")))
        if calls == ["apt-get download"]:
            return "apt-get failed: Unable to locate package"
        if "download" in command:
            (scratch / "some-mnist_1_all.deb").touch()
        if "-x" in command:
            place = scratch / "unpacked" / str(sources.DEBIAN_FOLDER)[1:] / "mnist"
            place.mkdir(parents=True)
            for file, array in arrays.items():
                (place / f"{file}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        return None

    monkeypatch.setattr(sources, "_run", stand_in)
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setitem(sources.DEBIAN_PACKAGES, "mnist", "some-mnist")
    assert "apt-get download" in data.load("mnist").source
    assert calls == ["apt-get download", "apt-get update", "apt-get download", "dpkg -x"]
    assert "cache" in data.load("mnist").source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x1f\x8b\x08\x00", "not an idx file"),
        (b"\x00\x00\x0d\x01" + b"\x00" * 8, "not an idx file"),
        (idx_bytes(np.zeros((2, 3)))[:-1], "cut off"),
        (idx_bytes(np.zeros((2, 3))) + b"x", "cut off"),
        (b"\x00\x00\x08\x03\x00\x00", "cut off"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_cut_gzip(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(200)))[:-20])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(path)


def test_unknown_name():
    with pytest.raises(ValueError, match="fashion-mnist, mnist, synthetic, cifar-10"):
        data.load("cifar")


def test_synthetic_is_seeded_named_and_learnable():
    found, again = data.load("synthetic"), data.load("synthetic")
    assert found.name == "synthetic"
    assert found.train_images.equal(again.train_images)
    assert found.test_labels.equal(again.test_labels)
    assert abs(float(found.train_images.mean())) < 1e-4
    assert abs(float(found.train_images.std()) - 1) < 1e-4
    assert torch.bincount(found.train_labels, minlength=10).min() > 400
    # Nearest class mean: far above the 10 % of chance, so a smoke run can tell learning from none.
    means = torch.stack([found.train_images[found.train_labels == c].mean(0) for c in range(10)]).flatten(1)
    guesses = torch.cdist(found.test_images.flatten(1), means).argmin(1)
    assert (guesses == found.test_labels).float().mean() > 0.6
