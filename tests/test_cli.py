"""The command line: arguments, exit codes, signals, tables, and the example script."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsekern import __version__, cli, report, train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A finished run, by way of the command line but with short timings."""
    out = tmp_path_factory.mktemp("cli") / "deep" / "run"
    whole = train.Settings.__init__

    def short(self, **fields):
        whole(self, **fields, rounds=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Settings, "__init__", short)
        words = "train --dataset synthetic --epochs 1 --compare-dense --threads 1 --out"
        assert cli.main([*words.split(), str(out)]) == 0
    return out


def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_train_writes_and_summary_reads(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    result = json.loads((small_run / "result.json").read_text())
    assert result["complete"]
    assert result["command"].startswith("sparsekern train --dataset synthetic")
    assert cli.main(["summary", str(small_run), str(small_run)]) == 0
    text = capsys.readouterr().out
    assert text.count(f"{result['sparse']['test_accuracy']:.2%}") >= 2
    assert f"{result['speedup']['train_step']:.2f}x" in text
    assert "synthetic" in text
    assert "learning_curves.png" in text
    assert str(small_run) in text


def test_table_says_everything(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    cli.Console().print(report.run_table(report.read_result(small_run)))
    text = capsys.readouterr().out
    for label, *_ in report._ROWS:
        assert label.strip() in text
    for word in ("dense", "sparse", "small_dense", "random_mask", "Synthetic data", "best speed-up", "hidden width"):
        assert word in text


def test_table_warns_of_a_busy_machine(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    for trusted in (True, False):
        cli.Console().print(report.run_table(report.read_result(small_run) | {"trustworthy": trusted}))
        assert ("the machine was busy: figures are not to be trusted" in capsys.readouterr().out) is not trusted


def test_table_names_the_real_blocks(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    cli.Console().print(report.run_table(report.read_result(small_run)))
    assert "blocks: fc1 8x8, fc2 8x8, fc3 1x1 (the classifier" in capsys.readouterr().out


def test_an_earlier_run_is_not_overwritten(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    before = {path.name: path.read_bytes() for path in small_run.iterdir()}
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--out", str(small_run)])
    assert caught.value.code == 2
    assert f"{small_run} holds an earlier run; give --overwrite or another --out" in capsys.readouterr().err
    words = ["--overwrite", "--dataset", "synthetic", "--sparsity", "0.9999", "--blocksize", "8X8"]
    assert cli.main(["train", "--out", str(small_run), *words]) == 1
    assert "cannot prune with --sparsity 0.9999 --blocksize 8x8: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in small_run.iterdir()} == before


def test_summary_of_a_folder_of_runs(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    assert cli.main(["summary", str(small_run.parent)]) == 0
    assert str(small_run) in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sparsekern {__version__}\n"


def test_table_of_a_run_stopped_at_once(small_run, capsys, monkeypatch):
    wide(monkeypatch)
    result = report.read_result(small_run)
    empty = result | {"complete": False, "macs_kept": None, "speedup": None}
    empty |= dict.fromkeys(("dense", "sparse", "small_dense", "random_mask"))
    cli.Console().print(report.run_table(empty))
    assert "INCOMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "1.5"], "sparsity must be the fraction removed"),
        (["--sparsity", "x"], "--sparsity"),
        (["--blocksize", "8x"], "must be two whole numbers such as 8x8, got '8x'"),
        (["--blocksize", "8"], "must be two whole numbers"),
        (["--blocksize", "0x8"], "blocksize must be at least 1"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, got 0"),
        (["--model", "resnet"], "--model"),
        (["--pruner", "magic"], "--pruner"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--data", "/no/such/folder"], "data must be a folder that exists"),
    ],
)
def test_bad_arguments_exit_2_before_any_work(words, message, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--out", str(out), *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_out_that_is_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--out", str(file)])
    assert caught.value.code == 2
    assert "is a file" in capsys.readouterr().err
    assert file.read_text() == "kept"


def test_missing_data_exits_1_with_the_reason(tmp_path, capsys, monkeypatch):
    wide(monkeypatch)
    code = cli.main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--epochs", "1"])
    assert code == 1
    assert "holds no train-images-idx3-ubyte" in capsys.readouterr().err


def test_summary_of_something_else(tmp_path, capsys):
    assert cli.main(["summary", str(tmp_path)]) == 1
    (tmp_path / "result.json").write_text("{}")
    assert cli.main(["summary", str(tmp_path)]) == 1
    (tmp_path / "result.json").write_text("{")
    assert cli.main(["summary", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "no result.json" in error
    assert "needs the keys" in error
    assert "is not JSON" in error


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)
    assert cli.main(["info"]) == 0
    assert "torch: " in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_cleanly(number, tmp_path):
    """A long run, stopped once its first epoch is recorded; the second signal must not disturb the end."""
    words = ["train", "--dataset", "synthetic", "--epochs", "1000", "--threads", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsekern", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    try:
        history, deadline = tmp_path / "history.csv", time.monotonic() + 60
        while not history.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED, error
    assert "INCOMPLETE" in out
    assert "Traceback" not in error
    assert f"of 1000: {tmp_path / 'model.safetensors'}" in out
    assert (tmp_path / "model.safetensors").is_file()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is False
    assert result["sparse"]["test_accuracy"] > 0
    assert (tmp_path / "learning_curves.png").exists()


def test_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_lenet.py", "synthetic", "1"])
    runpy.run_path(str(ROOT / "examples" / "train_lenet.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "3 converted" in text
    assert "synthetic test accuracy" in text
    assert "loaded again" in text
