"""bench --device cuda, without a GPU: its model, and its measurements with a stopped clock on CPU tensors."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsekern import ops, reference, triton
from sparsekern.triton import tuning
from sparsekern.triton.model import A100, GPUS, H100, TOKENS, expected

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is no part of the installed package

from bench.__main__ import main
from bench.cuda import candidates, model, run, timing, tune
from bench.cuda.cases import BLOCKS, PRODUCTS, Case

LAYER, SMALL = Case(8192, 4096, 4096), Case(24, 64, 96)
PEAKS = {"bfloat16": 1e12, "tf32": 5e11, "memory": 1e10}


def stopped(call: Any) -> timing.Timing:
    call()
    return timing.Timing(1e-6, 2e-6, 3e-6)


# ---- the model ------------------------------------------------------------------------------------------------------


def test_floors_are_those_of_the_data_sheets() -> None:
    microseconds = {1.0: (278, 881), 0.5: (139, 440), 0.25: (69, 220), 0.1: (41, 88), 0.05: (41, 67)}
    for density, known in microseconds.items():
        floors = [1e6 * model.floor(gpu, LAYER, density, "bfloat16") for gpu in GPUS]
        assert floors == pytest.approx(list(known), abs=1)


@pytest.mark.parametrize("product", ["forward", "dgrad"])
def test_modelled_rates(product: Any) -> None:
    """Per executed FLOP of stored blocks, against the dense kernel of the same model; below, of the memory's floor."""
    wanted = {"H100-SXM5": (0.85, 0.55, 0.34, 0.18), "A100-SXM-80": (0.9, 0.8, 0.6, 0.345)}
    for gpu in GPUS:
        dense = max(model.dense(gpu, LAYER, "bfloat16").values())
        for block, share in zip(BLOCKS, wanted[gpu.name], strict=True):
            for density in (0.5, 0.25, 0.1)[: 2 if gpu is H100 else 3]:
                pattern = LAYER.pattern(block, density)
                times = model.predict(gpu, LAYER, pattern, product, "bfloat16")
                assert pattern.density * dense / max(times.values()) >= share, (gpu.name, block, density)
                assert model.floor(gpu, LAYER, pattern.density, "bfloat16") <= max(times.values()) * (1 + 1e-9)


def test_modelled_times_of_few_blocks() -> None:
    """Of the memory's floor. Smaller blocks miss it up to fourfold: the cache or products with zeros bind."""
    reached = ((H100, 0.1, (128,)), (H100, 0.05, (128, 64)), (A100, 0.05, (128, 64, 32)))
    for gpu, density, sides in reached:
        for side in sides:
            pattern = LAYER.pattern((side, side), density)
            seconds = max(model.predict(gpu, LAYER, pattern, "forward", "bfloat16").values())
            assert model.floor(gpu, LAYER, pattern.density, "bfloat16") >= 0.85 * seconds, (gpu.name, density, side)


def test_what_binds_is_named() -> None:
    pattern = LAYER.pattern((128, 128), 0.5)
    assert model.binding(model.predict(A100, LAYER, pattern, "forward", "bfloat16")) == "tensor"
    assert model.binding(model.predict(A100, LAYER, pattern, "forward", "float32")) == "FMA"
    assert model.binding(model.predict(H100, LAYER, pattern, "forward", "bfloat16")) == "L2"
    few = Case(16, 4096, 4096)
    assert model.binding(model.predict(H100, few, few.pattern((128, 128), 0.5), "forward", "bfloat16")) == "HBM"


def test_the_expected_layer_is_like_a_drawn_one() -> None:
    """`expected` knows only the density; patterns drawn at random cost about as much."""
    for side, density in ((16, 0.1), (16, 0.5), (64, 0.1), (128, 0.25)):
        case = Case(TOKENS, 4096, 4096)
        pattern = case.pattern((side, side), density)
        for gpu in GPUS:
            drawn = sum(max(model.predict(gpu, case, pattern, p, "bfloat16").values()) for p in PRODUCTS)
            dense, sparse = expected(gpu, "bfloat16", pattern.shape, pattern.blocksize, density)
            assert sparse == pytest.approx(drawn, rel=0.1)
            assert dense == pytest.approx(3 * max(model.dense(gpu, case, "bfloat16").values()))


def test_without_a_gpu_a_model_is_shown_and_called_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "QUICK", (Case(512, 512, 512),))
    assert main(["--device", "cuda", "--quick", "--tune", "--out", str(tmp_path)]) == 1
    assert "--tune needs a GPU" in capsys.readouterr().out
    assert main(["--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "a MODEL's" in text and "MODEL, not measured" in text
    assert "H100-SXM5 (model)" in text and "A100-SXM-80 (model)" in text
    assert list(tmp_path.iterdir()) == []  # nothing that could be taken for a measurement


# ---- measurements ---------------------------------------------------------------------------------------------------


# torch's beta of sparse layouts, and its 2:4, say that they may change.
pytestmark = pytest.mark.filterwarnings("ignore:.*(beta|prototype):UserWarning")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[run.Row]:
    monkeypatch.setattr(candidates, "compiled", candidates.dense)
    complaints: list[str] = []
    rows = list(
        run.measured(SMALL, "bfloat16", stopped, PEAKS, "none", complaints.append, "cpu", "reference", ((16, 16),))
    )
    assert all("torch" in line for line in complaints), complaints  # no 2:4 and no blocks of 16 bits on the CPU
    return rows


def test_a_measurement_has_every_product(rows: list[run.Row]) -> None:
    ours = [row for row in rows if row.implementation == candidates.OURS]
    assert len(ours) == 4 * 3
    dense = next(row for row in rows if row.implementation == candidates.DENSE and row.product == "forward")
    assert dense.speedup == 1 and dense.rate == pytest.approx(2 * 24 * 64 * 96 / 2e-6)
    row = ours[0]
    assert row.rate == pytest.approx(dense.rate * row.density, rel=1e-3)
    assert row.of_peak == pytest.approx(row.rate / 1e12)
    moved = 2 * (24 * 96 + 24 * 64 + row.density * 64 * 96)
    assert row.of_floor == pytest.approx(moved / 1e10 / 2e-6, rel=1e-3)


def test_a_wrong_result_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: candidates.Problem, backend: Any) -> dict[Any, Any]:
        return {"forward": lambda: (problem.x @ problem.weight.t()).index_fill_(1, torch.tensor([3]), torch.nan)}

    monkeypatch.setattr(candidates, "compiled", candidates.dense)
    monkeypatch.setattr(candidates, "ours", wrong)
    complaints: list[str] = []
    args = (SMALL, "bfloat16", stopped, PEAKS, "none", complaints.append, "cpu", "reference", ((16, 16),))
    assert candidates.OURS not in {row.implementation for row in run.measured(*args)}
    assert sum("the result is wrong" in line for line in complaints) == 4


def test_one_table_one_plot_one_file(rows: list[run.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.Console(width=run.WIDTH).print(run.table(rows))
    text = capsys.readouterr().out
    assert "MODEL" not in text and "24x96x64, bfloat16" in text
    assert text.count("sparsekern") == 3 and text.count("compiled dense torch") == 3
    run.save(rows, tmp_path / "gpu")
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_options_of_one_device_are_not_for_the_other() -> None:
    for wrong in (["--tune"], ["--device", "cuda", "--only", "lenet-5-conv2"], ["--device", "cuda", "--name", "x"]):
        with pytest.raises(SystemExit):
            main(wrong)


# ---- the tuning table -----------------------------------------------------------------------------------------------


def test_the_tuning_table_is_refreshed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that likes 8 warps and 5 stages, and kernels that are wrong with 6 stages and fail with 2."""
    kernels, last = SimpleNamespace(_arch=lambda: 90, choose_config=tuning.choose_config), []

    def kernel(product: str, compute: Any) -> Any:
        def call(*args: Any) -> Any:
            blocksize = tuple(args[5] if product == "wgrad" else args[1].shape[1:])
            config = kernels.choose_config(product, blocksize, args[0].shape[0], "bfloat16", 90, 1)
            last.append(config)
            if config.stages == 2:
                raise RuntimeError("out of resources")
            result = compute(*args[:-1])
            return result if config.stages < 6 else tuple(r + 1 for r in result) if product == "wgrad" else result + 1

        return call

    for name, product in (("linear", "forward"), ("linear_dgrad", "dgrad"), ("linear_wgrad", "wgrad")):
        setattr(kernels, name, kernel(product, getattr(reference, f"bsr_{name}")))

    def clock(call: Any) -> timing.Timing:
        call()
        config = last[-1]
        seconds = 9e-6 - (config.warps == 8) * 1e-6 - config.stages * 1e-6
        return timing.Timing(seconds, seconds, seconds)

    table = tmp_path / "tuning.json"
    other = {"product": "forward", "blocksize": [16, 16], "group": 1, "kind": "bfloat16", "arch": 80, "tokens": [1, 9]}
    other |= {"config": tuning.Config(16, 64, 2, 3)._asdict(), "source": "another GPU"}
    table.write_text(json.dumps({"provenance": "", "entries": [other]}))
    for module in (tune, tuning):
        monkeypatch.setattr(module, "TABLE", table)
    monkeypatch.setattr(ops, "triton_kernels", lambda: kernels)
    monkeypatch.setattr(ops, "triton_device", lambda: "cpu")
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of the test")
    monkeypatch.setattr(tune.importlib.metadata, "version", lambda name: "1.2.3")
    for name, value in (("KINDS", ("bfloat16",)), ("TOKENS", ((32, 32), (2**31 - 1, 48))), ("SIZE", 64)):
        monkeypatch.setattr(tune, name, value)
    tuning._table.cache_clear()
    tuning.choose_config.cache_clear()
    try:
        assert tune.refresh(clock, ((16, 16),), lambda text: None, "cpu") == 6
        entries = json.loads(table.read_text())["entries"]
        assert entries[0] == other and len(entries) == 7
        assert [entry["tokens"] for entry in entries[1::3]] == [[1, 32], [33, 2**31 - 1]]
        assert "GPU of the test" in entries[1]["source"] and "triton 1.2.3" in entries[1]["source"]
        for product in ("forward", "dgrad", "wgrad"):
            config = tuning.choose_config(product, (16, 16), 48, "bfloat16", 90, entries[1]["group"])
            assert (config.warps, config.stages) == (8, 5)
    finally:
        tuning._table.cache_clear()
        tuning.choose_config.cache_clear()


ENTRY = {
    "product": "forward", "blocksize": [16, 16], "group": 4, "kind": "float16", "arch": 80, "tokens": [1, 32],
    "config": {"tile_t": 64, "tile_k": 64, "warps": 4, "stages": 2, "order": 8}, "source": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"config": {**ENTRY["config"], "tile_k": 128}}, "tile_k 16 to 64"),
        ({"blocksize": [16, 128], "config": {**ENTRY["config"], "tile_k": 128}}, None),
        ({"product": "dgrad", "blocksize": [16, 128], "config": {**ENTRY["config"], "tile_k": 128}}, "tile_k 16 to 64"),
        *[
            ({"config": {**ENTRY["config"], **wrong}}, words)
            for wrong, words in (
                ({"order": 0}, "at least 1"), ({"order": -1}, "at least 1"), ({"tile_t": 48}, "powers of two"),
                ({"tile_t": "64"}, "whole numbers"), ({"tile_t": 8}, "tile_t from 16"), ({"warps": 64}, "up to 32"),
                ({"stages": 0}, "at least 1"), ({"speed": 1}, "TypeError"),
            )
        ],
        ({"config": None}, "TypeError"),
        ({"tokens": None}, "TypeError"),
        ({"tokens": [5, 4]}, "tokens, got"),
        ({"product": "backward"}, "product, got"),
        ({"kind": "float8"}, "kind, got"),
        ({"blocksize": [8, 8]}, "blocksize"),
    ],
)  # fmt: skip
def test_entries_that_no_kernel_can_run_with_are_named(
    changes: dict[str, object], words: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "tuning.json"
    table.write_text(json.dumps({"entries": [ENTRY, ENTRY | changes]}))
    monkeypatch.setattr(tuning, "TABLE", table)
    if words is None:
        assert len(tuning._table.__wrapped__()) == 2
    else:
        with pytest.raises(ValueError, match=rf"tuning\.json, entry 1: .*{words}"):
            tuning._table.__wrapped__()
