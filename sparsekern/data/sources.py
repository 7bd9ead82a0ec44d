"""Where the data sets' files come from: a folder, Debian's package, or the official address; always checked."""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..info import cache_folder
from . import cifar
from .idx import read_idx

logger = logging.getLogger("sparsekern")

# SHA-256 of the decompressed files: Debian's .gz files differ from the official ones, their content does not.
CHECKSUMS: dict[str, dict[str, str]] = {
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}
ADDRESSES = {
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    cifar.NAME: "https://www.cs.toronto.edu/~kriz",
}
DEBIAN_PACKAGES = {"fashion-mnist": "dataset-fashion-mnist"}
DEBIAN_FOLDER = Path("/usr/share/datasets")
TIMEOUT_SECONDS = 60.0
APT_TIMEOUT_SECONDS = 300.0
# Downloading as the calling user: apt's own user cannot write to our temporary folder.
APT_GET = ("apt-get", "-q", "-o", "APT::Sandbox::User=", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1")

Files = list[Path]


class _Unavailable(Exception):
    """This way of getting the files does not work here; the message says why."""


def locate(name: str, folder: Path | None = None) -> tuple[Files, str]:
    """The files of a data set (four idx files, or those of :func:`.cifar.find`), and the way they were found.

    Tried in order: a folder (``folder``, else the environment variable SPARSEKERN_DATA), where Debian's package
    installs itself, the cache, fetching Debian's package without root, the official address. What is fetched goes
    to the cache.

    Raises:
        FileNotFoundError: none worked; the message says why for each. A folder that is given is the only way tried.
    """
    folder = folder or (Path(value) if (value := os.environ.get("SPARSEKERN_DATA")) else None)
    if folder is not None:
        return _in_folder(name, folder), f"folder {folder}"
    cache = cache_folder() / name
    ways: list[tuple[str, Callable[[], Files]]] = [
        (f"Debian's package in {DEBIAN_FOLDER / name}", lambda: _in_folder(name, DEBIAN_FOLDER)),
        (f"cache {cache}", lambda: _in_folder(name, cache)),
        ("Debian's package, fetched with apt-get download", lambda: _fetch_package(name, cache)),
        (f"official address {ADDRESSES[name]}", lambda: _download(name, cache)),
    ]
    failures = ["a data folder (--data DIR or SPARSEKERN_DATA): none given"]
    for way, get in ways:
        try:
            files = get()
        except (_Unavailable, OSError, ValueError) as error:
            logger.info("%s: %s: %s", name, way, error)
            failures.append(f"{way}: {error}")
        else:
            return files, way
    raise FileNotFoundError(f"cannot find {name}. Tried:\n" + "\n".join(f"  - {failure}" for failure in failures))


def _in_folder(name: str, folder: Path) -> Files:
    """The four idx files, raw or .gz, in ``folder`` or its subfolder ``name``; or CIFAR-10's."""
    if name == cifar.NAME:
        return cifar.find(folder)
    for place in (folder / name, folder):
        candidates = {file: (place / file, place / f"{file}.gz") for file in CHECKSUMS[name]}
        found = {file: next((p for p in paths if p.is_file()), None) for file, paths in candidates.items()}
        if all(found.values()):
            return [path for path in found.values() if path is not None]
        if any(found.values()):
            missing = ", ".join(file for file, path in found.items() if path is None)
            raise FileNotFoundError(f"{place} lacks {missing} (raw or .gz)")
    raise FileNotFoundError(
        f"{folder} holds no {next(iter(CHECKSUMS[name]))} (raw or .gz), nor does its subfolder {name}"
    )


def _fetch_package(name: str, cache: Path) -> Files:
    """Fetch and unpack Debian's package in a temporary folder, as any user, and keep its four files in the cache."""
    package = DEBIAN_PACKAGES.get(name)
    if package is None:
        raise _Unavailable(f"Debian has no package of {name}")
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise _Unavailable("apt-get and dpkg are not installed")
    with tempfile.TemporaryDirectory(prefix="sparsekern-") as scratch:
        folder = Path(scratch)
        download = [*APT_GET, "download", package]
        if _run(download, folder):
            # No package list here, or an old one: read a fresh one into the temporary folder, which needs no root.
            (folder / "lists" / "partial").mkdir(parents=True)
            private = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
            for command in ([*APT_GET, "update"], download):
                if failure := _run([*command, *private], folder):
                    raise _Unavailable(failure)
        archive = next(folder.glob(f"{package}_*.deb"))
        if failure := _run(["dpkg", "-x", archive.name, "unpacked"], folder):
            raise _Unavailable(failure)
        files = _in_folder(name, folder / "unpacked" / DEBIAN_FOLDER.relative_to("/"))
        return [_keep(name, path.read_bytes(), path.name, cache) for path in files]


def _run(command: list[str], folder: Path) -> str | None:
    """Run a command in ``folder``; None when it succeeds, else why not."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=APT_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took longer than {APT_TIMEOUT_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return f"{command[0]} failed: {lines[-1] if lines else f'exit code {done.returncode}'}"


def _download(name: str, cache: Path) -> Files:
    """Download the files into the cache, packed as they are offered."""
    files = []
    for file in [cifar.ARCHIVE] if name == cifar.NAME else [f"{file}.gz" for file in CHECKSUMS[name]]:
        try:
            with urllib.request.urlopen(f"{ADDRESSES[name]}/{file}", timeout=TIMEOUT_SECONDS) as response:
                content = response.read()
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise _Unavailable(f"{file}: {getattr(error, 'reason', error)}") from error
        files.append(_keep(name, content, file, cache))
    return files


def _keep(name: str, content: bytes, file: str, cache: Path) -> Path:
    """Write a fetched file to the cache once its checksum holds; whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        part = Path(scratch) / file
        part.write_bytes(content)
        if name == cifar.NAME:
            cifar.read([part])
        else:
            read_checked(name, part)
        return part.replace(cache / file)


def read_checked(name: str, path: Path) -> Tensor:
    """What an idx file of a data set holds.

    Raises:
        ValueError: its checksum is wrong, or it is damaged.
    """
    return read_idx(path, CHECKSUMS[name][path.name.removesuffix(".gz")])
