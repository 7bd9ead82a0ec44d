"""Running many cells, in several processes, and keeping each result as soon as it is there."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from ..timing import keep_freed_memory
from .cell import Cell, run

Results = dict[str, dict[str, Any]]  # {key of a cell: what it gave}
Progress = Callable[[str, int, int, str], object]


def read(file: Path) -> Results:
    """The results in ``file``, a line of JSON each; a last line that was cut off is left out.

    Raises:
        ValueError: a line that is no result.
    """
    if not file.exists():
        return {}
    found: Results = {}
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off, or is nothing
        try:
            entry = json.loads(line)
            found[entry["cell"]] = dict(entry["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is no result of an experiment: {error}") from error
    return found


def fill(
    cells: Iterable[Cell], file: Path, jobs: int, progress: Progress = lambda what, done, total, note: None
) -> Results:
    """Run the cells that ``file`` does not hold yet, ``jobs`` at a time on one thread each, and add what they give.

    Returns:
        The results of all ``cells``.

    Raises:
        ChildProcessError: a cell that failed, or a process that died; what others gave by then is kept.
    """
    wanted = list(dict.fromkeys(cell.key for cell in cells))
    results = read(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("ab").close()  # now, not after an hour, if it cannot be written
    missing = [key for key in wanted if key not in results]
    done = len(wanted) - len(missing)
    progress("cells", done, len(wanted), "")
    for key, result in _computed(missing, jobs):
        results[key] = result
        _append(file, key, result)
        done += 1
        progress("cells", done, len(wanted), f"{result['accuracy']:.2%} {key}")
    return {key: results[key] for key in wanted}


def _computed(keys: list[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if not keys:
        return
    others = set(active_children())
    # Fresh processes: forked ones would share the threads of torch's pool, which they do not have.
    with ProcessPoolExecutor(min(jobs, len(keys)), get_context("spawn"), _start) as pool:
        futures = {pool.submit(_run, key): key for key in keys}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except Exception as error:  # whatever a worker raised, or that it died: only the cell's name is added
                    raise ChildProcessError(f"cell {futures[future]} failed: {error}") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(active_children()) - others:
                worker.terminate()  # or this would wait, for minutes, for cells that nobody asks for any more
            raise


def _start() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()


def _end_with_parent() -> None:
    """A killed command must not leave its cells running."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(key: str) -> dict[str, Any]:
    return run(Cell.from_key(key))


def _append(file: Path, key: str, result: dict[str, Any]) -> None:
    """One whole line at the end of the file, which other commands may write to; a cut-off line before it goes."""
    line = json.dumps({"cell": key, "result": result}) + "\n"
    with file.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.seek(0)
                whole = stream.read().rfind(b"\n") + 1
                stream.truncate(whole)
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())
