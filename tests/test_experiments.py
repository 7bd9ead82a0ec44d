"""Experiments: cells and their keys, results that survive interruption, tables, and the command."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekern import cli, prune
from sparsekern.experiments import (
    EXPERIMENTS,
    blocks,
    cell,
    connections,
    equal_time,
    frontier,
    grid,
    initial,
    propagation,
    signals,
    studies,
    study,
)
from sparsekern.experiments.cell import Cell
from sparsekern.experiments.study import Study
from sparsekern.timing import Timing

SMALL = Cell("lenet-300-100", width=0.1, dataset="synthetic", epochs=1, images=100)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ---- cells ----------------------------------------------------------------------------------------------------------


def test_a_key_says_what_differs_and_leads_back() -> None:
    given = SMALL.but(sparsity=0.9, blocksize=(8, 8), seed=3)
    assert json.loads(given.key) == {
        "model": "lenet-300-100", "width": 0.1, "dataset": "synthetic", "epochs": 1, "images": 100, "sparsity": 0.9,
        "blocksize": [8, 8], "seed": 3,
    }  # fmt: skip
    assert Cell.from_key(given.key) == given


def test_a_cell_prunes_trains_and_tests() -> None:
    dense, sparse = cell.run(SMALL.but(method="dense")), cell.run(SMALL.but(sparsity=0.8, blocksize=(4, 4)))
    assert dense["accuracy"] > 0.6 and sparse["accuracy"] > 0.3
    assert sparse["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert sparse["macs_kept"] == pytest.approx(0.2, abs=1e-3)
    assert set(sparse["densities"]) == {"fc1", "fc2", "fc3"} and sparse["collapsed"] == []
    assert sparse["curve"] == [sparse["accuracy"]] and not sparse["diverged"]
    assert cell.run(SMALL.but(sparsity=0.8, blocksize=(4, 4)))["accuracy"] == sparse["accuracy"]
    json.dumps([dense, sparse])


@pytest.mark.parametrize(
    "changes",
    [
        {"method": name}
        for name in (
            "grasp", "grasp-absolute", "synflow", "iterative_snip", "force", "magnitude", "random", "snip-shuffled",
        )
    ]
    + [
        {"labels": "uniform"}, {"labels": "predicted"}, {"prune_on": "synthetic"},
        {"init": "orthogonal", "fresh": True},
        {"isometry": True}, {"rescaled": True}, {"init": "delta-orthogonal"}, {"init": "block-orthogonal"},
        {"allocation": "erk"}, {"granularity": "channel"}, {"placement": "draw", "balance": "rows"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)  # fmt: skip
def test_every_field_changes_what_is_built(changes: dict[str, object]) -> None:
    base = SMALL.but(sparsity=0.7, blocksize=(2, 2))
    model, facts = cell.prepared(base.but(**changes))
    # A row of the first layer is a sixth of what is to be kept.
    assert facts["sparsity"] == pytest.approx(0.7, abs=0.05 if "granularity" in changes else 0.02)
    other, _ = cell.prepared(base)
    same = [
        torch.equal(a, b) if a.shape == b.shape else False
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    ]
    assert all(same) == ("prune_on" in changes)  # the same data set under its name
    if "isometry" in changes:
        before, after, _ = facts["isometry"]
        assert after < before


def test_shuffled_labels_and_a_diverging_rate() -> None:
    learnt = cell.run(SMALL.but(method="dense", shuffled=True))
    assert learnt["accuracy"] < 0.3
    assert cell.run(SMALL.but(method="dense", lr=1e30))["diverged"]


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match=r"method must be .*, got 'snap'"):
        cell.run(SMALL.but(method="snap", sparsity=0.5))
    for wrong in ({"images": 0}, {"epochs": -3}, {"labels": "q"}, {"isometry": True, "rescaled": True}):
        with pytest.raises(ValueError, match="|".join(wrong)):
            SMALL.but(**wrong)
    with pytest.raises(ValueError, match="schedule must be one of"):
        cell.run(SMALL.but(method="dense", schedule="q"))
    for name in ("nothing", "normal", "normal:x"):
        with pytest.raises(ValueError, match=name):
            initial.fill_(torch.nn.Linear(3, 3), name)


@pytest.mark.parametrize(
    "name, variance",
    [("lecun", 1 / 400), ("lecun-normal", 1 / 400), ("glorot", 2 / 700), ("he", 2 / 400), ("normal:0.3", 0.3)],
)
def test_initial_weights_have_their_variance(name: str, variance: float) -> None:
    model = torch.nn.Linear(400, 300)
    initial.fill_(model, name, torch.Generator().manual_seed(0))
    assert float(model.weight.detach().var()) == pytest.approx(variance, rel=0.03)
    assert not model.bias.any()
    initial.fill_(model, "truncated:0.01")
    assert float(model.weight.detach().abs().max()) <= 0.2


# ---- equal time -----------------------------------------------------------------------------------------------------


def weights_clock(candidates: dict[str, torch.nn.Module], **rest: object) -> dict[str, Timing]:
    """Seconds: 1 and the weights that are kept."""
    kept = {name: sum(p.numel() for p in network.parameters() if p.dim() > 1) for name, network in candidates.items()}
    return {name: Timing((1.0 + number,) * 5) for name, number in kept.items()}


@pytest.mark.parametrize(
    "changes", [{"method": "dense"}, {"by": "sparsity", "blocksize": (2, 2)}, {"by": "sparsity", "method": "random"}]
)
def test_an_equal_time_is_searched_by_the_clock(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_time, "interleaved", weights_clock)
    monkeypatch.setattr(equal_time, "runner", lambda model, *rest: model)
    monkeypatch.setattr(equal_time, "dense_runner", lambda model, *rest: model)
    given = SMALL.but(width=0.5, speedup=4.0, **changes)
    model, facts = cell.prepared(given)
    assert facts["speedup"]["p50"] == pytest.approx(4, rel=0.1)
    dense = sum(p.numel() for p in cell.built(given, torch.Generator()).parameters() if p.dim() > 1)
    kept = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert dense / kept == pytest.approx(4, rel=0.1)
    assert (facts["width"] < 0.3) == (given.method == "dense")
    with pytest.raises(ValueError, match=r"no scale gives 1e\+06x of inference: 0\.00.* gives"):
        cell.prepared(given.but(speedup=1e6))


def test_how_a_speed_up_is_reached_must_be_known() -> None:
    with pytest.raises(ValueError, match="by must be 'time' or 'sparsity', got 'luck'"):
        cell.prepared(SMALL.but(speedup=2.0, by="luck"))


def test_what_is_measured_for_inference_is_frozen_and_nothing_changes() -> None:
    dense = cell.built(SMALL, torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    batch = cell._step(SMALL)
    for of in ("inference", "step"):
        found = equal_time.measured(dense, dense, batch, of)
        assert 0.2 < found["p50"] < 20
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


# ---- many cells -----------------------------------------------------------------------------------------------------


def fake(key: str) -> dict[str, object]:
    """In a worker: what a cell gives, or a death."""
    seed = Cell.from_key(key).seed
    if seed == 13:
        os._exit(9)
    if seed == 12:
        raise ZeroDivisionError("at seed 12")
    if seed == 14:
        time.sleep(100)
    return {"accuracy": seed / 100}


def test_results_are_kept_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runs" / "a.jsonl"
    monkeypatch.setattr(grid, "_run", fake)
    cells = [SMALL.but(seed=seed) for seed in (1, 2, 3)]
    first = grid.fill(cells[:2], file, 1)
    assert first == {c.key: {"accuracy": c.seed / 100} for c in cells[:2]}
    file.write_bytes(file.read_bytes() + b'{"cell": "cut o')
    assert grid.read(file) == first
    monkeypatch.setattr(grid, "_computed", lambda keys, jobs: ((key, {"accuracy": len(keys)}) for key in keys))
    assert grid.fill(cells, file, 2)[cells[2].key] == {"accuracy": 1}  # one was missing
    assert len(grid.read(file)) == len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize("seed, words", [(12, "failed: at seed 12"), (13, "terminated abruptly")])
def test_a_failure_is_named_and_the_rest_is_kept(
    seed: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    monkeypatch.setattr(grid, "_run", fake)
    with pytest.raises(ChildProcessError, match=words):
        grid.fill([SMALL.but(seed=1), SMALL.but(seed=seed)], file, 1)
    assert list(grid.read(file)) == [SMALL.but(seed=1).key]


def test_a_failure_ends_the_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_run", fake)
    start = time.perf_counter()
    with pytest.raises(ChildProcessError, match="at seed 12"):
        grid.fill([SMALL.but(seed=14), SMALL.but(seed=12)], tmp_path / "a.jsonl", 2)
    assert time.perf_counter() - start < 60


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed by /proc")
def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    words = ["experiment", "scores", "--jobs", "2", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "sparsekern", *words], start_new_session=True) as command:
        workers = wait_for(lambda: children(command.pid) if len(children(command.pid)) >= 3 else None)
        command.kill()
    # Two workers, and multiprocessing's tracker of resources.
    wait_for(lambda: not any(is_running(pid) for pid in workers) or None)


def children(pid: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(look: Callable[[], Any]) -> Any:
    for _ in range(600):
        if (found := look()) is not None:
            return found
        time.sleep(0.1)
    raise TimeoutError


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for bad in (b'{"cell": "x"}', b'{"cell": "x", "result": 3}', b"\xff\xfe", b"nonsense"):
        file.write_bytes(bad + b'\n{"cell": "y", "result": {}}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1, is no result"):
            grid.read(file)
    file.write_bytes(b'{"cell": "y", "result": {}}\n{"cell": "z", "result": {}}')  # cut off before its newline
    assert list(grid.read(file)) == ["y"]
    grid._append(file, "w", {})
    assert list(grid.read(file)) == ["y", "w"]


def test_several_commands_can_write_to_one_file(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sparsekern.experiments import grid\n"
        "for n in range(40): grid._append(Path(sys.argv[1]), sys.argv[2] + str(n), {'x': 'y' * 3000})"
    )
    file = tmp_path / "a.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(file), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(grid.read(file)) == 120


def test_a_folder_that_cannot_be_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_computed", lambda keys, jobs: pytest.fail("computed before the folder was looked at"))
    (tmp_path / "file").touch()
    assert cli.main(["experiment", "scores", "--quick", "--out", str(tmp_path / "file")]) == 1
    assert "--out must be a folder" in capsys.readouterr().err


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_the_table_shows_means_spreads_and_the_paper(tmp_path: Path) -> None:
    places = {("a", "x"): SMALL, ("a", "y"): SMALL.but(sparsity=0.5), ("b", "y"): SMALL.but(sparsity=0.6)}
    made = Study("A title", "A paper", places, "row \\ column", {("a", "y"): "error 3.1"}, metrics={"y": "curve:1"})
    places["b", "fast"], made.metrics["fast"] = places["b", "y"], "speedup:p50"
    file = tmp_path / "name-quick.jsonl"
    for seed, offset in ((1, -0.1), (2, 0.1)):
        for value, of in zip((0.5, 0.6, 0.7), list(places.values())[:3], strict=True):
            found = {"accuracy": value + offset, "curve": [0, value - offset], "speedup": {"p50": 5 + offset}}
            grid._append(file, study.small(of).but(seed=seed).key, found)
    table = study.run(made, "name", tmp_path, 2, 1, True, lambda *args: None)
    text = table.read_text()
    assert (
        "| a | 50.00 ± 14.14 | 60.00 ± 14.14 [error 3.1] |" in text
        and "| b |  | 70.00 ± 14.14 | 5.00 ± 0.14x |" in text
    )
    assert "These figures mean nothing" in text
    facts = json.loads((tmp_path / "name-quick.json").read_text())
    assert facts["cells"][1]["values"] == pytest.approx([0.7, 0.5]) and facts["cells"][1]["paper"] == "error 3.1"
    assert (tmp_path / "name-quick.png").read_bytes()[:4] == b"\x89PNG"


OTHERS = ("connections", "propagation", "signals", *(name for name in EXPERIMENTS if name.startswith("time-")))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in OTHERS])
def test_every_study_can_be_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its cells prune, at a fraction of their width, on synthetic data."""
    seen: list[Study] = []
    monkeypatch.setattr(studies, "run", lambda made, *rest: seen.append(made))
    EXPERIMENTS[name](name, Path(), 1, 1, True, print)
    for place in seen[0].paper:
        assert place in seen[0].cells
    kinds = {(c.method, c.placement, c.balance, c.labels, c.init): c for c in seen[0].cells.values()}
    for of in list(kinds.values())[:12]:
        if of.method != "dense" and of.speedup is None:
            tiny = study.small(of).but(images=20, width=0.5 * of.width)
            generator = torch.Generator().manual_seed(1)
            model = cell.built(tiny, generator)
            initial.fill_(model, tiny.init, generator)
            patterns = cell.prune_(model, tiny)
            assert isinstance(patterns, prune.Patterns)
            assert patterns.achieved == pytest.approx(of.sparsity, abs=1e-2)


def test_time_is_measured_and_shown_beside_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies come from the block study's file, whose cells are the same; what has none is left out."""
    base = Cell("lenet-300-100", width=0.2)
    few = {line: frontier.LINES[line] for line in ("1x1, global SNIP", "8x8")}
    monkeypatch.setattr(frontier, "LINES", few)
    monkeypatch.setattr(frontier, "WIDTHS", (1.0, 0.5))
    monkeypatch.setattr(blocks, "SPARSITIES", (0.9, 0.5))
    cells, of_blocks = frontier.cells(base), blocks.cells(base)
    assert cells["8x8", "90%"] == of_blocks["90%, default", "8x8"]
    assert cells["1x1, global SNIP", "50%"] == of_blocks["50%, global", "1x1"]
    assert cells[frontier.NARROW, "width 0.5"].width == 0.1
    for accuracy, one in zip((0.8, 0.7, 0.6, 0.5, 0.4), cells.values(), strict=False):
        grid._append(tmp_path / "blocks-a-quick.jsonl", study.small(one).but(seed=1).key, {"accuracy": accuracy})
    threads: list[int] = []
    table = frontier.run(base, "time-a", tmp_path, 2, 0, True, lambda *args: threads.append(torch.get_num_threads()))
    assert set(threads) == {1}
    rows = json.loads((tmp_path / "time-a-quick.json").read_text())["rows"]
    assert [row["accuracies"] for row in rows] == [[0.8], [0.7], [0.6], [0.5], [0.4]]
    assert [row["line"] for row in rows] == [frontier.NARROW] * 2 + ["1x1, global SNIP"] * 2 + ["8x8"]
    for row in rows:
        assert all(0.05 < row[of]["p20"] <= row[of]["p50"] <= row[of]["p80"] < 50 for of in ("step", "inference"))
    assert "| 8x8, 50% | 40.00 |" in table.read_text()
    assert (tmp_path / "time-a-quick.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"blocks-b-quick\.jsonl holds no result"):
        frontier.run(base, "time-b", tmp_path, 1, 0, True, lambda *args: None)


def test_connections_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SPARSITIES", (0.9,))
    table = connections.run("connections", tmp_path, 1, 1, True, lambda *args: None)
    facts = json.loads(table.with_suffix(".json").read_text())
    as_they_are = facts["correlation"]["as they are"]
    assert len(as_they_are) == 10 and min(value for row in as_they_are for value in row) > 0.3
    assert (tmp_path / "connections-quick.png").read_bytes()[:4] == b"\x89PNG"


def test_propagation_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "SCALES", (1e-2,))
    monkeypatch.setattr(propagation, "EXAMPLES", 20)
    table = propagation.run("propagation", tmp_path, 1, 1, True, lambda *args: None)
    rows = json.loads(table.with_suffix(".json").read_text())["rows"]
    # Orthogonal layers of tanh pass small signals on nearly as they are; masks do not; isometry brings that back.
    assert rows["LDI"][0][0] > 0.2
    for method in ("snip", "magnitude", "random"):
        assert rows[f"LDI, {method}"][0][0] < 0.5 * rows["LDI"][0][0] < rows[f"LDI, {method}, AI"][0][0]
    assert "| SG(0.01) |" in table.read_text() and "[0.449]" in table.read_text()


def test_signals_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ACTIVATIONS", ("tanh",))
    monkeypatch.setattr(signals, "EXAMPLES", 5)
    table = signals.run("signals", tmp_path, 1, 1, True, lambda *args: None)
    rows = json.loads(table.with_suffix(".json").read_text())["rows"]
    dense, pruned, restored, rescaled = (rows[f"tanh, {stage}"] for stage in signals.STAGES)
    assert dense["score"][0] < 1e-5 < restored["score"][0] < 0.5 * pruned["score"][0]
    for better in (restored, rescaled):
        assert better["end to end"][0] > 2 * pruned["end to end"][0]
    layers = [what for what in dense if what not in ("score", "end to end")]
    assert len(layers) == 7 and all(0.5 < dense[layer][0] <= 1 for layer in layers)
    assert "| tanh, fan-in rescaling |" in table.read_text()


def test_the_command_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_computed", lambda keys, jobs: ((key, {"accuracy": 0.5}) for key in keys))
    words = ["experiment", "pruning-batch", "--quick", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert "50.00 ± 0.00 [error 1.40]" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".jsonl", ".md", ".png"]
    assert cli.main([*words[:4], "3", *words[5:], "--jobs", "0"]) == 0  # a table of what there is
    assert "over 2 seeds;" in capsys.readouterr().out
    assert cli.main([*words[:1], "scores", *words[2:], "--jobs", "0"]) == 1
    assert cli.main([*words, "--jobs", "-1"]) == 1
    asked: list[str] = []
    monkeypatch.setattr(grid, "_computed", lambda keys, jobs: asked.extend(keys) or ())
    assert cli.main(words) == 0
    assert asked == []  # nothing is left to compute


def test_sparsity_zero_and_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["nothing"], ["scores", "--seeds", "0"], ["scores", "--jobs", "x"]):
        with pytest.raises(SystemExit):
            cli.main(["experiment", *words])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
