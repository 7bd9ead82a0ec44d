"""The benchmark measures what it says: right products only, complete files, tables that show what is in them."""

import csv
import functools
import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsekern.timing import interleaved

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "cases", "ceilings", "compare", "cover", "networks", "peers", "pictures", "plot", "run", "table",
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which is no part of the installed package; nothing is compiled, nor timed for long."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: module)
    modules = {name: importlib.import_module(f"bench.{name}") for name in MODULES}
    for name in ("compare", "networks"):
        monkeypatch.setattr(modules[name], "interleaved", functools.partial(interleaved, sample_seconds=1e-4))
    return SimpleNamespace(command=importlib.import_module("bench.__main__"), **modules)


def tiny(bench, monkeypatch, *cases, blocksizes=((1, 1), (4, 1)), networks=(), **options):
    """Empty results of a table of these cases alone."""
    for case in cases:
        monkeypatch.setitem(bench.cases.CASES, case.name, case)
    names = tuple(case.name for case in cases)
    part = bench.cover.Part(names, blocksizes, (0.5, 0.75), bench.cover.PRODUCTS, **options)
    cover = bench.cover.Cover((part,), networks, (1,), rounds=2, limit_seconds=0.01)
    return bench.table.Results(cover, bench.ceilings.Ceilings("none"), {})


def linear(bench):
    return bench.cases.Case("a linear", (12, 20), (6, 20))


def conv(bench):
    return bench.cases.Case("a conv", (10, 6, 3, 3), (2, 6, 7, 5), padding=1)


def grouped(bench):
    return bench.cases.Case("strided, grouped", (8, 3, 3, 3), (2, 6, 7, 6), padding=1, stride=2, groups=2)


# ---- the table ----------------------------------------------------------------------------------------------------


def test_every_row_is_there(bench, monkeypatch):
    results = tiny(bench, monkeypatch, linear(bench), conv(bench), peers=True, compiled=True)
    results.ceilings = bench.ceilings.Ceilings("made up", {1: 50.0}, {1: {1 << 10: 20.0, 1 << 30: 10.0}})
    assert len(list(bench.run.measure(results))) == bench.run.count(results.cover) == 2 * 2 * 4
    assert results.complete and results.refused == []
    ours = [row for row in results.rows if row.implementation == "sparsekern"]
    keys = {(row.case, row.product, row.blocksize, row.sparsity) for row in ours}
    assert len(ours) == len(keys) == 2 * 4 * 2 * 2
    shapes = {"a linear": (12 * 20, 6, 6 * 20 + 6 * 12), "a conv": (10 * 54, 2 * 7 * 5, 2 * 7 * 5 * (6 + 10))}
    for row in ours:
        assert row.ideal == pytest.approx(1 / row.density)
        assert abs(row.density - (1 - row.sparsity)) < 0.05
        assert row.speedup_p20 <= row.speedup_p50 <= row.speedup_p80
        weights, positions, activations = shapes[row.case]
        products = 3 if row.product == "layer" else 1
        assert row.gflops * row.sparse_us_p50 * 1e3 == pytest.approx(products * 2 * row.density * weights * positions)
        moved = row.gb_s * row.sparse_us_p50 * 1e3 / products / 4
        assert activations + row.density * weights < moved < activations + 2.1 * weights + 13  # values and indices
        assert row.peak_percent == pytest.approx(2 * row.gflops)
        assert row.bandwidth_percent == pytest.approx(10 * row.gb_s)  # it fits the larger buffer only
        assert (row.dense_layout in ("nchw", "channels_last")) == (row.case == "a conv")
    assert {row.layout for row in ours if row.case == "a conv"} <= {"nchw", "channels_last"}


def test_peers_do_what_they_can(bench, monkeypatch):
    monkeypatch.setattr(bench.run, "PEERS_FROM", 0.6)
    results = tiny(bench, monkeypatch, linear(bench), conv(bench), blocksizes=((1, 1), (4, 1), (4, 4)), peers=True)
    list(bench.run.measure(results))
    assert results.refused == []
    peers = [row for row in results.rows if row.implementation != "sparsekern"]
    found = {(row.implementation, row.case, row.product, row.blocksize) for row in peers}
    expected = {("torch CSR", "a linear", product, "1x1") for product in bench.cover.PRODUCTS}
    expected |= {("torch BSR", "a linear", product, "4x4") for product in ("forward", "dgrad")}
    installed = {name for name, version in bench.peers.versions().items() if not version.startswith("missing")}
    for name in {"scipy", "sparse_dot_mkl"} & installed:
        blocks = ("1x1", "4x4", "4x1") if name == "scipy" else ("1x1", "4x4")
        pairs = itertools.product(("forward", "dgrad"), blocks)
        expected |= {(f"{name} {'CSR' if b == '1x1' else 'BSR'}", "a linear", product, b) for product, b in pairs}
    if "SparseProp" in installed:
        pairs = itertools.product(("a linear", "a conv"), ("forward", "layer"))
        expected |= {("SparseProp", case, product, "1x1") for case, product in pairs}
    if "onnxruntime" in installed:
        expected |= {("onnxruntime, dense", case, "forward", "dense") for case in ("a linear", "a conv")}
    assert found == expected
    assert {row.sparsity for row in peers if "dense" not in row.implementation} == {0.75}  # not 0.5


def test_missing_peers_are_named_and_left_out(bench, monkeypatch):
    def nothing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(bench.run, "PEERS_FROM", 0.0)

    monkeypatch.setattr(bench.peers, "importlib", SimpleNamespace(import_module=nothing, metadata=None))
    bench.peers._module.cache_clear()
    try:
        versions = bench.peers.versions()
        results = tiny(bench, monkeypatch, linear(bench), conv(bench), peers=True)
        list(bench.run.measure(results))
    finally:
        bench.peers._module.cache_clear()
    assert versions.pop("torch") == torch.__version__
    assert set(versions) == {"scipy", "sparse_dot_mkl", "SparseProp", "onnxruntime"}
    assert all(version.startswith("missing: No module named") for version in versions.values())
    assert {row.implementation for row in results.rows} == {"sparsekern", "torch CSR"}


@pytest.mark.parametrize("build", [linear, conv, grouped])
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
        theirs = bench.cases.dense_calls(case, dense, *inputs)
        assert tuple(theirs) == bench.cover.PRODUCTS
        for product, call in (*theirs.items(), *bench.cases.compiled_calls(dense, *inputs).items()):
            for mine, their in zip(ours[product](), call(), strict=True):
                if their.shape == dense.weight.shape:
                    their = bench.cases.weight_matrix(their).reshape(-1, 1, 1)
                torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y / 0], ids=["slightly wrong", "not finite"])
def test_wrong_results_give_no_figure(bench, monkeypatch, wrong):
    right = bench.cases.functional.bsr_linear
    monkeypatch.setattr(bench.cases.functional, "bsr_linear", lambda *args, **kw: wrong(right(*args, **kw)))
    results = tiny(bench, monkeypatch, linear(bench), blocksizes=((4, 1),))
    list(bench.run.measure(results))
    # The module calls the same function, so the layer is wrong with it; the gradients of the ops are right.
    assert {row.product for row in results.rows} == {"dgrad", "wgrad"}
    assert len(results.refused) == 4


def test_compiled_torch_is_left_out_where_it_does_not_work(bench, monkeypatch):
    class Fails(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: Fails())
    results = tiny(bench, monkeypatch, linear(bench), blocksizes=((4, 1),), compiled=True)
    list(bench.run.measure(results))
    assert results.peers == {"torch.compile": "missing: no C++ compiler"} and results.refused == []
    assert {row.dense_mode for row in results.rows} == {"eager"} and len(results.rows) == 4 * 2


def test_compiled_torch_is_left_out_where_it_is_wrong(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: lambda x: 1.001 * module(x))
    results = tiny(bench, monkeypatch, linear(bench), blocksizes=((4, 1),), compiled=True)
    list(bench.run.measure(results))
    assert [line.split(":")[0] for line in results.refused] == [
        "a linear/forward/1/dense/row-major/compiled", "a linear/layer/1/dense/row-major/compiled",
    ]  # fmt: skip
    assert len(results.rows) == 4 * 2


# ---- networks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_network(bench, monkeypatch):
    network = bench.networks.Network("net-small", "simple-cnn", 4, blocksizes=((8, 8),), sparsities=(0.9,))
    monkeypatch.setitem(bench.networks.NETWORKS, network.name, network)
    return network


def test_network_rows(bench, monkeypatch, small_network):
    results = tiny(bench, monkeypatch, networks=(small_network.name,))
    assert list(bench.run.measure(results)) == ["net-small, 1 thread(s)"]  # two threads were not asked for
    (row,) = results.rows
    assert results.refused == []
    assert (row.case, row.batch, row.product, row.blocksize, row.sparsity) == ("net-small", 4, "step", "8x8", 0.9)
    assert row.density == pytest.approx(0.1, abs=0.01)
    # 576 x 800 + 64 x 51200 + 10 x 1024 multiply-adds an image, of which so many are kept.
    macs = 576 * 800 + 64 * 51200 + 10 * 1024
    assert row.gflops * row.sparse_us_p50 * 1e3 == pytest.approx(3 * 2 * 4 * macs / row.ideal)
    assert row.gb_s is None and row.peak_percent is None


def test_a_wrong_network_gives_no_figure(bench, monkeypatch, small_network):
    right = bench.networks.sk.functional.bsr_conv2d
    monkeypatch.setattr("sparsekern.nn.functional.bsr_conv2d", lambda *args, **kw: 1.01 * right(*args, **kw))
    results = tiny(bench, monkeypatch, networks=(small_network.name,))
    list(bench.run.measure(results))
    assert results.rows == []
    assert len(results.refused) == 3 and "error of logits" in results.refused[0]  # two layouts, one of them compiled


# ---- what is covered ----------------------------------------------------------------------------------------------


def groups(bench, cover):
    for part in cover.parts:
        yield from itertools.product(part.cases, part.blocksizes, part.threads, part.products)


@pytest.mark.parametrize("name", ["FULL", "QUICK"])
def test_covers_hold_known_names_and_nothing_twice(bench, name):
    cover = getattr(bench.cover, name)
    found = list(groups(bench, cover))
    assert len(found) == len(set(found))
    assert {case for case, *_ in found} <= set(bench.cases.CASES)
    assert set(cover.networks) <= set(bench.networks.NETWORKS)


def test_full_cover_has_every_value_of_every_axis(bench):
    cover = bench.cover.FULL
    cases, blocks, threads, products = (set(axis) for axis in zip(*groups(bench, cover), strict=True))
    assert cases == set(bench.cases.CASES) and set(cover.networks) == set(bench.networks.NETWORKS)
    assert blocks == {(1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (4, 1), (8, 1), (16, 1), (1, 8)}
    assert threads == {1, 2} and products == {"forward", "dgrad", "wgrad", "layer"}
    assert {s for part in cover.parts for s in part.sparsities} >= {0.5, 0.8, 0.9, 0.95, 0.98, 0.99}
    assert {bench.cases.CASES[name].batch for name in cases} >= {1, 32, 256}


def test_readme_says_how_much_that_is(bench):
    text = (ROOT / "bench" / "README.md").read_text()
    assert f"{bench.run.count(bench.cover.FULL)} groups" in text and f"({len(bench.cases.CASES)} layers" in text


def test_only(bench):
    cover, only = bench.cover.QUICK, bench.cover.only
    assert only(cover, ["lenet-300-100-fc1"], []).parts == (replace(cover.parts[0], cases=("lenet-300-100-fc1",)),)
    (part,) = only(cover, ["conv3x3-64@32"], ["net-vgg-d"]).parts  # which is in no part
    assert part == replace(cover.parts[0], cases=("conv3x3-64@32",), peers=False, compiled=False)
    assert only(cover, [], ["net-vgg-d"]).networks == ("net-vgg-d",)


def test_one_core_measures_one_thread(bench):
    cover = bench.cover.on_cores(bench.cover.FULL, 1)
    assert {n for part in cover.parts for n in part.threads} == {1} and cover.threads == (1,)
    assert len(cover.parts) == len(bench.cover.FULL.parts) - 1
    assert bench.cover.on_cores(bench.cover.FULL, 2) == bench.cover.FULL


# ---- ceilings -----------------------------------------------------------------------------------------------------


def test_native_ceilings_are_sane():
    native = pytest.importorskip("sparsekern._native", reason="built without Python's headers")
    gflops, isa = native.fma_peak(0.005)
    assert 0.1 < gflops < 2000 and isa
    for size in (4096, (1 << 20) + 5, 3 << 20):
        gb_s, read_with = native.read_bandwidth(size, 0.005)
        assert 0.05 < gb_s < 5000 and read_with == isa
    if native.cpu_features()["avx2"]:
        assert isa in ("avx2+fma", "avx512f")
    with pytest.raises(ValueError, match="seconds must be above 0 and at most 60, got 0"):
        native.fma_peak(0)
    with pytest.raises(ValueError, match="seconds must be above 0 and at most 60, got nan"):
        native.read_bandwidth(1 << 20, float("nan"))
    with pytest.raises(ValueError, match=r"bytes must be from 4096 to 2\*\*32, got 4095"):
        native.read_bandwidth(4095)


def test_ceilings_of_two_threads_add_up(bench, monkeypatch):
    native = SimpleNamespace(fma_peak=lambda s: (50.0, "isa"), read_bandwidth=lambda size, s: (1e6 / size, "isa"))
    monkeypatch.setitem(sys.modules, "sparsekern._native", native)
    found = bench.ceilings.measure_ceilings((1, 2))
    assert found.isa == "isa" and found.gflops == {1: 50.0, 2: 100.0}
    assert found.gb_s[2] == {size: 2e6 / size for size in bench.ceilings.SIZES}
    small, large = bench.ceilings.SIZES[0], bench.ceilings.SIZES[-1]
    assert found.peak_percent(25.0, 2) == 25
    assert found.bandwidth_percent(1e6 / small, 2 * small, 2) == pytest.approx(50)  # each thread has its own L1
    assert found.bandwidth_percent(1e6 / large, 99 * large, 1) == pytest.approx(100)
    assert found.peak_percent(1.0, 4) is None and found.bandwidth_percent(None, 1.0, 1) is None


def test_no_ceilings_where_nothing_is_built(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparsekern._native", None)
    found = bench.ceilings.measure_ceilings((1,))
    assert found.isa.startswith("not measured") and found.peak_percent(1.0, 1) is None


# ---- files, tables and pictures -----------------------------------------------------------------------------------


def test_command_writes_tables_and_pictures(bench, monkeypatch, tmp_path, capsys, small_network):
    main = bench.command
    named = replace(linear(bench), name="a-linear")
    monkeypatch.setattr(bench.run, "PEERS_FROM", 0.0)
    monkeypatch.setattr(main, "QUICK", tiny(bench, monkeypatch, named, conv(bench), peers=True).cover)
    monkeypatch.setattr(main, "machine", main.info.collect)  # leaves malloc as it is
    monkeypatch.setattr(bench.ceilings, "SIZES", (1 << 14, 1 << 18))
    command = ["--quick", "--only", "a-linear", "net-small", "--out", str(tmp_path), "--name", "here"]
    assert main.main(command) == 0
    with (tmp_path / "here.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(bench.table.Row)]
    assert {row["case"] for row in rows} == {"a-linear", "net-small"}
    header = json.loads((tmp_path / "here.json").read_text())
    assert header["complete"] is True and header["refused"] == []
    assert header["machine"]["torch"] == header["peers"]["torch"] == torch.__version__
    assert header["cases"] == {"a-linear": {"name": "a-linear", "weight": [12, 20], "input": [6, 20]} | GEOMETRY}
    assert header["ceilings"]["gflops"]["1"] > 0
    capsys.readouterr()

    readme = tmp_path / "docs" / "README.md"
    readme.parent.mkdir()
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    plot = [str(tmp_path / "here.csv"), "--sparsity", "0.75"]
    assert bench.plot.main([*plot, "--product", "forward", "--readme", str(readme)]) == 0
    assert capsys.readouterr().out == ""
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| a-linear |" in text and "4.0x |" in text and "| a-linear, 1x1 |" in text
    assert "| small, 4, 8x8 |" in text and "Slower than dense torch" in text
    for name in ("here", "here-break-even", "here-roofline"):
        assert f"](../{name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bench.plot, "draw", lambda *args: {})
    assert bench.plot.main(plot) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in text

    # A later run of one case takes the place of what the first has of it, all of it.
    later = [row | {"speedup_p50": "7.25"} for row in rows if row["case"] == "net-small"][:1]
    with (tmp_path / "later.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(later)
    assert bench.plot.main([*plot, "--again", str(tmp_path / "later.csv")]) == 0
    again = capsys.readouterr().out
    assert again.count("| small, ") == 1 and "7.25x of" in again
    assert again.strip().endswith("Of a later run than the rest: net-small.")


GEOMETRY = {"padding": 0, "stride": 1, "groups": 1}


def test_interrupted_run_is_marked(bench, monkeypatch, tmp_path):
    main = bench.command

    def measure(results):
        yield "first"
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "measure", measure)
    monkeypatch.setattr(main, "measure_ceilings", lambda threads: bench.ceilings.Ceilings("none"))
    monkeypatch.setattr(main, "machine", main.info.collect)
    assert main.main(["--quick", "--out", str(tmp_path), "--name", "here"]) == 130
    assert json.loads((tmp_path / "here.json").read_text())["complete"] is False


def test_table_shows_losses(bench):
    row = {"case": "a", "blocksize": "8x8", "ideal": "10.0"}
    rows = [row | {"product": "forward", "speedup_p50": "3.14"}, row | {"product": "layer", "speedup_p50": "0.52"}]
    assert bench.plot.table(rows).splitlines()[-1] == "| a | 3.1x / 0.5x | 10.0x |"


def test_losses_are_counted_by_sparsity(bench):
    points = [("0.5", "0.9"), ("0.5", "0.4"), ("0.5", "1.1"), ("0.9", "3.0"), ("0.95", "0.99")]
    rows = [{"implementation": "sparsekern", "sparsity": s, "speedup_p50": v} for s, v in points]
    rows.append({"implementation": "scipy CSR", "sparsity": "0.5", "speedup_p50": "0.1"})
    text = bench.plot.losses(rows)
    assert text.endswith("of all 5 figures of sparsekern in this run: "
                         "2 of 3 at 50 % (the worst 0.40x), 1 of 1 at 95 % (the worst 0.99x).")  # fmt: skip
    assert bench.plot.losses(rows[3:4]).endswith("this run: none.")


def test_table_of_peers(bench):
    row = {"case": "a", "blocksize": "1x1", "product": "forward", "implementation": "sparsekern", "speedup_p50": "4"}
    rows = [
        row,
        row | {"product": "layer", "speedup_p50": "3"},
        row | {"implementation": "torch CSR", "speedup_p50": "2"},
        row | {"implementation": "onnx, dense", "blocksize": "dense", "speedup_p50": "1.1"},
        row | {"blocksize": "8x8", "speedup_p50": "9"},
        row | {"case": "b"},  # which no peer has
    ]
    assert bench.plot.peer_table(rows).splitlines() == [
        "| layer, blocks | sparsekern | torch | onnx, dense |",
        "|---|---|---|---|",
        "| a, 1x1 | 4.0x / 3.0x | 2.0x / - | 1.1x / - |",
    ]


def test_table_of_networks_has_the_share_reached(bench):
    row = {"case": "net-a", "batch": "32", "blocksize": "8x8", "sparsity": "0.95", "speedup_p50": "5", "ideal": "20"}
    rows = [row, row | {"sparsity": "0.9", "speedup_p50": "2.5", "ideal": "10"}, row | {"blocksize": "1x1"}]
    assert bench.plot.network_table(rows).splitlines() == [
        "| network, batch, blocks | 90 % sparse | 95 % sparse |",
        "|---|---|---|",
        "| a, 32, 8x8 | 2.50x of 10.0x (25%) | 5.00x of 20.0x (25%) |",
        "| a, 32, 1x1 | - | 5.00x of 20.0x (25%) |",
    ]


def test_break_even_is_where_the_line_crosses(bench):
    crossing = bench.pictures.crossing
    assert crossing([(8.0, 2.0), (2.0, 0.5)]) == (pytest.approx(4), True)
    assert crossing([(2.0, 1.5), (4.0, 0.5), (16.0, 2.0)]) == (pytest.approx(8), True)  # from there on it is faster
    assert crossing([(2.0, 1.5), (4.0, 2.5)]) == (2.0, False)
    assert crossing([(2.0, 1.5), (4.0, 0.5)]) == (4.0, False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_isometry_in_both_modes(bench, capsys, monkeypatch):
    isometry = importlib.import_module("bench.isometry")
    monkeypatch.setattr(isometry, "CASES", ((0.9, (8, 8)),))
    assert isometry.main(["--steps", "3"]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    before, paper, fast = (float(cell.partition(",")[0]) for cell in cells[2:5])
    assert before > paper > fast  # three steps of the paper's do a little, L-BFGS all that can be done


def test_memory_of_a_step(bench):
    """What stays is known to the byte: weights, gradients and momentum of four bytes each."""
    memory = importlib.import_module("bench.memory")
    kept = 3 * 4 * sum(parameter.numel() for parameter in memory.build("lenet-300-100").parameters())
    assert memory.train("lenet-300-100", None, 2) == kept
    assert memory.train("lenet-300-100", (0.9, (8, 8)), 2) < 0.2 * kept
    found = memory.measure("mlp-4096", None)
    assert 0.9 * found["held"] < found["peak"] < 2 * found["held"], found
    memory.forget_peak()
    before = memory.resident(peak=True)
    torch.ones(2**22)
    assert memory.resident(peak=True) >= before + 0.9 * 2**24


def test_frozen_networks_are_compared_with_the_peak(bench, monkeypatch):
    frozen = importlib.import_module("bench.frozen")
    monkeypatch.setattr(frozen, "interleaved", functools.partial(interleaved, rounds=5, sample_seconds=1e-4))
    native = SimpleNamespace(fma_peak=lambda seconds: (1e9, "isa"))  # so fast that no network reaches 1 % of it
    monkeypatch.setitem(sys.modules, "sparsekern._native", native)
    with torch.no_grad():
        assert frozen.row("lenet-300-100", 0.9, (8, 8)).split()[-1] == "0%"
        monkeypatch.setitem(sys.modules, "sparsekern._native", None)
        assert frozen.row("lenet-300-100", 0.9, (8, 8)).split()[-1] == "-"


def test_markers_must_be_there(bench, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing to replace\n")
    with pytest.raises(ValueError, match="must have one"):
        bench.plot.replace_marked(path, "bench", "text")
    assert path.read_text() == "nothing to replace\n"


def test_table_of_trained_networks(bench):
    accuracies = {"dense": 0.9, "sparse": 0.8, "small_dense": 0.7, "random_mask": 0.6}
    settings = {"model": "net", "blocksize": [8, 8], "epochs": 3, "dataset": "data", "sparsity": 0.9, "batch_size": 100}
    result = {name: {"test_accuracy": value} for name, value in accuracies.items()}
    result |= {"settings": settings, "threads": 2, "macs_kept": 0.25, "speedup": {"train_step": 0.5, "inference": 2.0}}
    row = bench.plot.training_table([result]).splitlines()[-1]
    assert row == "| net, 8x8, 3 | 90.0 % | 80.0 % | 70.0 % | 60.0 % | 0.50x | 2.00x | 4.0x |"


@pytest.mark.slow
def test_regression_rows_pass_their_gate():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "bench/regression.py", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "40 passed" in done.stdout
