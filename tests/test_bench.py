"""The benchmark measures what it says: right products only, complete files, tables that show what is in them."""

import csv
import importlib
import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which is no part of the installed package."""
    monkeypatch.syspath_prepend(ROOT)
    modules = {name: importlib.import_module(f"bench.{name}") for name in ("cases", "run", "table", "plot")}
    return SimpleNamespace(command=importlib.import_module("bench.__main__"), **modules)


def tiny(bench, *cases, blocksizes=((1, 1), (4, 1))):
    settings = bench.table.Settings(blocksizes, (0.5, 0.75), (1,), rounds=2, limit_seconds=0.01)
    return bench.table.Results(settings, cases)


def linear(bench):
    return bench.cases.Case("a linear", (12, 20), (6, 20))


def conv(bench):
    return bench.cases.Case("a conv", (10, 6, 3, 3), (2, 6, 7, 5), padding=1)


def test_every_row_is_there(bench):
    results = tiny(bench, linear(bench), conv(bench))
    assert len(list(bench.run.measure(results))) == bench.run.count(results) == 2 * 2 * 4
    assert results.complete and results.refused == []
    ours = [row for row in results.rows if row.implementation == "sparsekern"]
    peers = [row for row in results.rows if row.implementation != "sparsekern"]
    keys = {(row.case, row.product, row.blocksize, row.sparsity) for row in ours}
    assert len(ours) == len(keys) == 2 * 4 * 2 * 2
    assert {(row.implementation, row.case, row.product, row.blocksize) for row in peers} == {
        ("torch CSR", "a linear", "forward", "1x1"),
        ("scipy CSR", "a linear", "forward", "1x1"),
    }
    for row in results.rows:
        assert row.ideal == pytest.approx(1 / row.density)
        assert abs(row.density - (1 - row.sparsity)) < 0.05
        assert row.speedup_p20 <= row.speedup_p50 <= row.speedup_p80
        weights = row.density * (12 * 20 if row.case == "a linear" else 10 * 54)
        positions = 6 if row.case == "a linear" else 2 * 7 * 5
        flops = 2 * weights * positions * (3 if row.product == "layer" else 1)
        assert row.gflops * row.sparse_us_p50 * 1e3 == pytest.approx(flops)
    assert {row.layout for row in results.rows if row.case == "a conv"} <= {"nchw", "channels_last"}


@pytest.mark.parametrize("build", [linear, conv])
def test_dense_baseline_computes_the_same_products(bench, build):
    """With every block stored, dense torch and the sparse layer are one layer: else the baseline is another job."""
    case = build(bench)
    x, grad = torch.randn(case.input), torch.randn(case.output)
    for layout in case.layouts:
        dense = case.dense(layout)
        matrix = bench.cases.weight_matrix(dense.weight.detach())
        layer = case.sparse(bench.cases.BlockPattern.from_mask(torch.ones(case.matrix, dtype=torch.bool), (1, 1)))
        layer.load_state_dict({"values": matrix.reshape(-1, 1, 1), "bias": dense.bias}, strict=False)
        inputs = (case.to_layout(x, layout), case.to_layout(grad, layout))
        ours = bench.cases.sparse_calls(case, layer, *inputs)
        for product, call in bench.cases.dense_calls(case, dense, *inputs).items():
            for mine, theirs in zip(ours[product](), call(), strict=True):
                if theirs.shape == dense.weight.shape:
                    theirs = bench.cases.weight_matrix(theirs).reshape(-1, 1, 1)
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y / 0], ids=["slightly wrong", "not finite"])
def test_wrong_results_give_no_figure(bench, monkeypatch, wrong):
    right = bench.cases.functional.bsr_linear
    monkeypatch.setattr(bench.cases.functional, "bsr_linear", lambda *args, **kw: wrong(right(*args, **kw)))
    results = tiny(bench, linear(bench), blocksizes=((4, 1),))
    list(bench.run.measure(results))
    # The module calls the same function, so the layer is wrong with it; the gradients of the ops are right.
    assert {row.product for row in results.rows} == {"dgrad", "wgrad"}
    assert len(results.refused) == 4


def test_command_writes_table_and_picture(bench, monkeypatch, tmp_path, capsys):
    main = bench.command
    monkeypatch.setattr(main, "QUICK", tiny(bench).settings)
    monkeypatch.setattr(main, "CASES", {"a-linear": replace(linear(bench), name="a-linear"), "a-conv": conv(bench)})
    monkeypatch.setattr(main, "machine", main.info.collect)  # leaves malloc as it is
    command = ["--quick", "--only", "a-linear", "--out", str(tmp_path), "--name", "here"]
    assert main.main(command) == 0
    with (tmp_path / "here.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(bench.table.Row)]
    assert len(rows) == 2 * 2 * 4 + 2 * 2
    header = json.loads((tmp_path / "here.json").read_text())
    assert header["complete"] is True and header["refused"] == []
    assert header["machine"]["torch"] == torch.__version__
    assert header["cases"]["a-linear"]["weight"] == [12, 20]
    capsys.readouterr()

    plot = [str(tmp_path / "here.csv"), "--sparsity", "0.75"]
    assert bench.plot.main(plot) == 0
    printed = capsys.readouterr().out
    assert "| a-linear |" in printed and "4.0x |" in printed
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    assert bench.plot.main([*plot, "--product", "forward", "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| a-linear |" in text


def test_interrupted_run_is_marked(bench, monkeypatch, tmp_path):
    main = bench.command

    def measure(results):
        yield "first"
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "measure", measure)
    monkeypatch.setattr(main, "machine", main.info.collect)
    assert main.main(["--quick", "--out", str(tmp_path), "--name", "here"]) == 130
    assert json.loads((tmp_path / "here.json").read_text())["complete"] is False


def test_table_shows_losses(bench):
    row = {"case": "a", "blocksize": "8x8", "ideal": "10.0"}
    rows = [row | {"product": "forward", "speedup_p50": "3.14"}, row | {"product": "layer", "speedup_p50": "0.52"}]
    assert bench.plot.table(rows).splitlines()[-1] == "| a | 3.1x / 0.5x | 10.0x |"


def test_markers_must_be_there(bench, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing to replace\n")
    with pytest.raises(ValueError, match="must have one"):
        bench.plot.replace_marked(path, "bench", "text")
    assert path.read_text() == "nothing to replace\n"


def test_table_of_networks(bench):
    accuracies = {"dense": 0.9, "sparse": 0.8, "small_dense": 0.7, "random_mask": 0.6}
    settings = {"model": "net", "blocksize": [8, 8], "epochs": 3, "dataset": "data", "sparsity": 0.9, "batch_size": 100}
    result = {name: {"test_accuracy": value} for name, value in accuracies.items()}
    result |= {"settings": settings, "threads": 2, "macs_kept": 0.25, "speedup": {"train_step": 0.5, "inference": 2.0}}
    row = bench.plot.network_table([result]).splitlines()[-1]
    assert row == "| net, 8x8, 3 | 90.0 % | 80.0 % | 70.0 % | 60.0 % | 0.50x | 2.00x | 4.0x |"
