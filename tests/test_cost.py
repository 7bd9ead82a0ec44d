"""The cost model: what it predicts and chooses from fixed tables, its files, its fit, and its commands."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from test_dense import prices
from torch import nn

import sparsekern as sk
from sparsekern import cli, cost, models, ops
from sparsekern.cost import calibrate, check, show, table, timer
from sparsekern.cost.fit import Measurement, fit, nonnegative_least_squares
from sparsekern.cost.model import NAMES, PRODUCTS, Work

FLOAT = torch.float32


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """An empty place for this machine's calibration, and no memory of another one."""
    file = tmp_path / "cache" / "calibration.json"
    monkeypatch.setenv("SPARSEKERN_CALIBRATION", str(file))
    table.current.cache_clear()
    yield file
    table.current.cache_clear()


def priced(**prices):
    """A table of zeros but for the given coefficients, with _ for the dots of their names."""
    wanted = {name.replace("_", "."): price for name, price in prices.items()}
    assert wanted.keys() <= NAMES
    return table.Table({name: wanted.get(name, 0.0) for name in NAMES}, table.machine(), 0.0, 0.0, 1.0)


# ---- the model and the choice -----------------------------------------------------------------------------------


def test_terms_count_what_a_layer_does():
    work = Work.conv2d(20, 3, (5, 5), 4, (28, 28), (24, 24), strided=False)
    pixels = 4 * 24 * 24
    dense = work.dense(("forward", "wgrad"))
    assert dense["conv2d.dense.forward.thin"] == 24 * 75 * pixels
    assert dense["conv2d.dense.wgrad.fma"] == 24 * 8 * 25 * pixels
    assert dense["conv2d.dense.backward.call"] == 1
    assert not any("dgrad" in name for name in dense)
    sparse = work.sparse((8, 3), 0.1)
    assert sparse["conv2d.sparse.forward.fma4"] == pytest.approx(0.1 * 1500 * pixels)
    assert sparse["conv2d.sparse.dgrad.fma2"] == pytest.approx(0.1 * 1500 * pixels)
    assert sparse["conv2d.sparse.wgrad.value"] == pytest.approx(150)
    linear = Work.linear(300, 784, 100)
    assert linear.sparse((16, 32), 0.5, ("forward",))["linear.sparse.forward.wide"] == 78400
    assert linear.sparse((24, 1), 0.5, ("forward",)).keys() >= {"linear.sparse.forward.fma4"}
    assert linear.dense(("forward",)).keys() & {"linear.dense.backward.call"} == set()
    assert linear.scatter(0.5)["linear.scatter.wgrad.value"] == 117600


def test_the_choice_is_the_smaller_prediction():
    holds = priced(linear_dense_forward_weight=1e-6, linear_scatter_forward_value=5e-7, linear_sparse_dgrad_value=2e-6)
    # Dense: 1 + 0.5 density, kernels: 2 density, in seconds of a layer of a million weights. Even at 2/3.
    for density, backend, seconds in ((0.6, "cpu", 1.2), (0.7, "dense", 1.35)):
        choice = cost.choose("cpu", FLOAT, (4, 4), (1000, 1000), density, table=holds)
        assert choice == (backend, None, pytest.approx(seconds), pytest.approx(1.0))


def test_the_choice_is_for_a_whole_step_at_the_nominal_batch():
    for product in PRODUCTS:
        holds = priced(**{f"linear_sparse_{product}_out": 1.0, f"linear_dense_{product}_call": 1.0})
        choice = cost.choose("cpu", FLOAT, (1, 1), (30, 20), 0.5, table=holds)
        assert choice == ("dense", None, 1.0, 1.0)
        assert holds.predict(cost.nominal((30, 20), None).sparse((1, 1), 0.5)) == 128 * 30
    assert cost.nominal((30, 18), (3, 3, 1)) == Work.conv2d(30, 2, (3, 3), 32, (16, 16), (16, 16), False)


def test_the_choice_knows_what_it_does_not_know():
    dense = prices(lambda name: ".sparse." in name)
    choose = cost.choose
    assert choose("cpu", FLOAT, (1, 1), (8, 18), 1.0, (3, 3, 1), dense).backend == "dense"
    assert choose("cpu", FLOAT, (1, 1), (8, 18), 1.0, (3, 3, 2), dense) == ("cpu", None, None, None)
    assert choose("cpu", torch.float64, (1, 1), (8, 18), 1.0, None, dense) == ("cpu", None, None, None)
    assert choose("cpu", torch.bfloat16, (1, 1), (8, 18), 1.0, None, dense) == ("cpu", None, None, None)
    assert choose("mps", FLOAT, (1, 1), (8, 18), 1.0, None, dense).backend == "reference"
    assert choose("cpu", FLOAT, (1, 1), (0, 18), 1.0, None, dense) == ("cpu", None, None, None)


def test_without_kernels_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(ops, "CPU_KERNELS_MISSING", "it is not built")
    assert cost.choose("cpu", FLOAT, (1, 1), (8, 8), 1.0, table=prices(lambda name: 1.0)).backend == "reference"


def test_threads_do_not_decide():
    before = cost.choose("cpu", FLOAT, (8, 8), (512, 512), 0.3)
    torch.set_num_threads(torch.get_num_threads() % 2 + 1)
    assert cost.choose("cpu", FLOAT, (8, 8), (512, 512), 0.3) == before


# ---- tables as files --------------------------------------------------------------------------------------------


def test_the_package_brings_a_sensible_table(calibration):
    shipped = table.current()
    assert shipped == table.load(table.SHIPPED)
    assert shipped.error < 0.2
    for shape, kernel in (((1024, 1024), None), ((128, 1152), (3, 3, 1))):
        for blocksize in ((1, 1), (4, 1), (8, 8), (16, 16)):
            assert cost.choose("cpu", FLOAT, blocksize, shape, 0.05, kernel).backend == "cpu"
        assert cost.choose("cpu", FLOAT, (1, 1), shape, 1.0, kernel).backend == "dense"


def test_a_calibration_is_saved_found_and_followed(calibration):
    mine = prices(lambda name: name.endswith("call"))
    table.save(mine, calibration)
    assert table.load(calibration, table.machine()) == mine
    assert table.current() == mine
    assert mine.source() == "the calibration of this machine"
    assert [file.name for file in calibration.parent.iterdir()] == ["calibration.json"]
    assert cost.choose("cpu", FLOAT, (1, 1), (9, 9), 1.0)[2:] == (4.0, 4.0)


def test_where_a_calibration_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSEKERN_CALIBRATION")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.path() == tmp_path / "sparsekern" / "calibration.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "is damaged: Expecting property name"),
        (lambda data: [data], "is damaged or of another version: expected an object with format 1"),
        (lambda data: data | {"format": 2}, "is damaged or of another version: expected an object with format 1"),
        (lambda data: data | {"machine": {}}, "is damaged or of another version: machine must hold cpu, isa"),
        (lambda data: data | {"seconds": None}, "version: seconds, error and yardstick must be numbers"),
        (lambda data: data | {"busy": 1}, "is damaged or of another version: busy must be a text"),
        (lambda data: data | {"coefficients": {}}, "is damaged or of another version: its coefficients"),
        (lambda data: with_price(data, -1.0), "call must be a number of at least 0, got -1.0"),
        (lambda data: with_price(data, math.nan), "call must be a number of at least 0, got nan"),
        (lambda data: with_price(data, "1"), "call must be a number of at least 0, got '1'"),
        *(
            (lambda data, key=key: data | {"machine": data["machine"] | {key: "?"}}, f"is stale: its {key} is '\\?'")
            for key in table.MACHINE
        ),
    ],
)
def test_other_calibrations_are_refused_and_left_alone(change, message, calibration, caplog):
    table.save(prices(lambda name: 1.0), calibration)
    changed = change(json.loads(calibration.read_text()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    calibration.write_text(text)
    with pytest.raises(ValueError, match=message):
        table.load(calibration, table.machine())
    with caplog.at_level(logging.WARNING, "sparsekern"):
        assert table.current() == table.load(table.SHIPPED)
    assert "`sparsekern calibrate` writes a new one" in caplog.text
    assert calibration.read_text() == text


def with_price(data, price):
    return data | {"coefficients": data["coefficients"] | {"linear.dense.forward.call": price}}


# ---- the fit ----------------------------------------------------------------------------------------------------


def test_nonnegative_least_squares():
    a = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(nonnegative_least_squares(a, a @ [2.0, 3.0]), [2.0, 3.0])
    # Unconstrained (2, -1), so the second is 0 and the first the mean of what is left.
    np.testing.assert_allclose(nonnegative_least_squares(a, a @ [2.0, -1.0]), [1.5, 0.0])
    np.testing.assert_array_equal(nonnegative_least_squares(a, -a @ [2.0, 3.0]), [0.0, 0.0])
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.normal(size=(30, 12)), generator.normal(size=30)
        np.testing.assert_allclose(nonnegative_least_squares(a, b), optimize.nnls(a, b)[0], atol=1e-9)


def test_the_fit_finds_the_coefficients_that_measurements_come_from():
    generator = np.random.default_rng(0)
    true = {name: generator.uniform(1, 2) for name in NAMES}
    measurements = []
    for i in range(4 * len(NAMES)):
        terms = {name: generator.uniform(0, 1) for name in NAMES}
        slow = 5.0 if i % 20 == 0 else 1.0  # the machine was busy
        measurements.append(Measurement(terms, slow * sum(true[name] * amount for name, amount in terms.items())))
    found, error = fit(measurements)
    assert error < 0.01
    for name, value in true.items():
        assert found[name] == pytest.approx(value, rel=0.15), name


def test_a_coefficient_that_nothing_was_measured_for_is_refused():
    missing = "linear.dense.forward.call"
    terms = dict.fromkeys(NAMES - {missing}, 1.0)
    with pytest.raises(ValueError, match=f"say nothing about {missing}"):
        fit([Measurement(terms, 1.0)])


# ---- measuring --------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_quiet_machine(monkeypatch):
    """The machine is three times slower half of the time; the yardstick takes 1 ms on the quiet one."""
    now = [0.0]

    def takes(seconds):
        def call():
            now[0] += seconds * (3 if now[0] % 0.2 > 0.1 else 1)

        return call

    def yardstick():
        start = now[0]
        takes(1e-3)()
        return now[0] - start

    monkeypatch.setattr(timer.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(timer, "_yardstick", lambda: yardstick)
    calls = {"a": takes(0.02), "b": takes(0.0005)}
    times, seconds, spread, _ = timer.time_calls(calls, rounds=40, sample_seconds=0.002, limit_seconds=60)
    assert seconds == pytest.approx(1e-3)
    assert spread == pytest.approx(3)
    assert times == {"a": pytest.approx(20), "b": pytest.approx(0.5)}


def test_calibrating_measures_every_coefficient(monkeypatch):
    """Of a set of tiny layers, for real; threads and random numbers are put back."""
    monkeypatch.setattr(calibrate, "LINEAR", [(16 + n, 17, 3) for n in range(6)])
    convs = [(1, 5, 3), (3, 8, 3), (8, 16, 1), (9, 4, 3), (10, 5, 3), (16, 16, 1)]
    monkeypatch.setattr(calibrate, "CONV", [(*conv, 4, 2, 1 + i % 2) for i, conv in enumerate(convs)])
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    monkeypatch.setattr(calibrate, "SAMPLE_SECONDS", 0.0)
    torch.set_num_threads(2)
    state, notes = torch.get_rng_state(), []
    found = calibrate.calibrate(notes.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    assert found.machine == table.machine()
    assert found.coefficients.keys() == NAMES
    assert found.predict(Work.linear(16, 17, 3).dense()) > 0
    assert 0 < found.yardstick < 1
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("spread", "switches", "busy"),
    [
        (1.1, 5.0, ""),
        (1.5, 5.0, "the same product took 50% longer at times"),
        (1.1, 90.0, "other programs took the processor 90 times a second"),
    ],
)
def test_a_busy_machine_is_told_and_kept(spread, switches, busy, calibration, monkeypatch, capsys):
    """The clock is a made-up one: every call takes a yardstick."""

    def time_calls(calls, **options):
        return timer.Times(dict.fromkeys(calls, 1.0), 1e-3, spread, switches)

    monkeypatch.setattr(calibrate, "_jobs", lambda: iter([(dict.fromkeys(NAMES, 1.0), None)]))
    monkeypatch.setattr(calibrate, "time_calls", time_calls)
    assert cli.main(["calibrate", "--out", str(calibration)]) == 0
    assert ("WARNING: the machine was busy" in capsys.readouterr().out) == bool(busy)
    assert table.current().busy == busy
    assert table.current().source().removeprefix("the calibration of this machine") == (
        f" (busy when measured: {busy})" if busy else ""
    )


def test_without_kernels_nothing_is_calibrated(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ops, "CPU_KERNELS_MISSING", "it is not built")
    assert cli.main(["calibrate", "--out", str(tmp_path / "table.json")]) == 1
    assert "nothing to calibrate: it is not built" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_calibration_of_this_machine(tmp_path, capsys):
    file = tmp_path / "new" / "table.json"
    assert cli.main(["calibrate", "--out", str(file)]) == 0
    found = table.load(file, table.machine())
    assert found.error < 0.5
    assert "median error of the fit" in capsys.readouterr().out


# ---- advice -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.hidden = nn.Linear(16, 16)
        self.idle = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 8, dtype=torch.float64)
        self.last = nn.Linear(8, 4)

    def forward(self, x, scale):
        y = self.grouped(self.norm(self.conv(x))).mean((2, 3))
        y = self.hidden(self.hidden(y * scale))
        return self.last(self.wide(y.double()).float())


def test_advice_adds_up():
    """Prices by hand: 1 s a weight of a dense product, 2 s for each stored one of a sparse product, 40 s for each
    sparse call, be it of a product or of autograd."""
    holds = prices(
        lambda name: (
            1.0 * (".dense." in name and name.endswith("weight"))
            or 2.0 * (".sparse." in name and name.endswith("value"))
            or 40.0 * (".sparse." in name and name.endswith("d.call"))
        )
    )
    model = Net()
    model.norm.eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    example = (torch.randn(5, 8, 6, 6), torch.tensor(2.0))
    rows = sk.advise(model, example, blocksizes=[(1, 1), (4, 4)], sparsities=[0.5, 0.75], table=holds)
    by_name = {row.name: row for row in rows}
    assert list(by_name) == ["conv", "grouped", "hidden", "idle", "wide", "last"]
    assert {name: row.reason for name, row in by_name.items() if row.reason} == {
        "grouped": "it has groups, which the cost model does not know",
        "idle": "the model did not call it",
        "wide": "it is torch.float64 on cpu; the cost model knows float32 on the CPU",
    }
    # The convolution takes forward and wgrad, of 1152 weights, and no dgrad: its input is the model's.
    conv = by_name["conv"]
    assert conv.shape == (16, 72)
    assert conv.calls[0].products == ("forward", "wgrad")
    assert conv.dense_ms == pytest.approx(1e3 * 2 * 1152)
    assert conv.sparse_ms[4, 4][0.75] == pytest.approx(1e3 * (2 * 2 * 0.25 * 1152 + 3 * 40))
    assert conv.break_even[4, 4] == pytest.approx(0.5 + 3 * 40 / (2 * 2 * 1152), abs=1e-3)
    # The hidden layer is called twice.
    hidden = by_name["hidden"]
    assert len(hidden.calls) == 2
    assert hidden.calls[0].products == PRODUCTS
    assert hidden.dense_ms == pytest.approx(1e3 * 2 * 3 * 256)
    assert hidden.sparse_ms[1, 1][0.5] == pytest.approx(1e3 * 2 * (3 * 256 + 4 * 40))
    # The last layer, a classifier, keeps blocks of 1x1, and calls alone cost more than it does dense.
    last = by_name["last"]
    assert dict(last.blocksizes) == {(1, 1): (1, 1), (4, 4): (1, 1)}
    assert last.break_even == {(1, 1): None, (4, 4): None}

    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in (model, model.conv, model.norm)] == [True, True, False]
    assert not model.conv._forward_hooks

    console = Console(width=200, record=True, file=None)
    with console.capture() as captured:
        console.print(show.advice_table(rows, holds))
    text = captured.get()
    for words in ("conv", "16x72", "4x4", "never", "all", "idle: no prediction: the model did not call it"):
        assert words in text


def test_break_even_at_the_ends():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    always, never = (prices(lambda name, kind=kind: kind in name) for kind in (".dense.", ".sparse."))
    x = torch.zeros(2, 32)
    assert sk.advise(model, x, table=always)[0].break_even[8, 8] == 0
    assert sk.advise(model, x, table=never)[0].break_even[8, 8] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"sparsities": [0.5, 1.0]}, ValueError, r"sparsities must be fractions removed, in \[0, 1\), got 1.0"),
        ({"sparsities": 0.9}, TypeError, r"sparsities must be a sequence of numbers such as \[0.9\], got 0.9"),
        ({"sparsities": 1.5}, TypeError, "sparsities must be a sequence of numbers .* got 1.5"),
        ({"sparsities": ["a"]}, TypeError, r"sparsities must be a sequence of numbers .* got \['a'\]"),
        ({"sparsities": []}, ValueError, "sparsities must hold at least one"),
        ({"blocksizes": [(1, 1), (0, 1)]}, ValueError, r"blocksizes\[1\] must be at least 1 .* got \(0, 1\)"),
        ({"blocksizes": 5}, TypeError, r"blocksizes must be a sequence of pairs such as \[\(8, 8\)\], got 5"),
        ({"blocksizes": (0, 4)}, TypeError, r"blocksizes must be a sequence of pairs .* got \(0, 4\)"),
        ({"blocksizes": "4by1"}, TypeError, "blocksizes must be a sequence of pairs .* got '4by1'"),
        ({"blocksizes": ["4x1"]}, TypeError, r"blocksizes\[0\] must be a tuple of two integers \(bh, bw\), got '4x1'"),
        (
            {"example": torch.zeros(1, 5)},
            ValueError,
            r"example must be .* got \(1, 5\) of torch.float32; the model says",
        ),
        ({"example": None}, ValueError, "example must be what the model can be called with, got NoneType"),
    ],
)
def test_bad_questions(change, error, message):
    arguments = {"model": nn.Linear(4, 4), "example": torch.zeros(1, 4), **change}
    with pytest.raises(error, match=message):
        sk.advise(**arguments)


def test_checking_compares_with_measurements():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), torch.zeros(2, 32)
    rows = sk.advise(model, x, blocksizes=[(4, 4)], sparsities=[0.5])
    checked = list(check.check(model, rows))
    assert [(c.name, c.blocksize) for c in checked] == [("0", (4, 4)), ("1", (1, 1))]
    assert all(c.dense_measured > 0 and c.sparse_measured > 0 for c in checked)
    assert checked[0].dense_predicted == rows[0].dense_ms
    assert len(list(check.check(model, rows, sample=1))) == 1
    made_up = [check.Checked("x", (1, 1), 0.5, 1.0, 2.0, 3.0, 2.0), check.Checked("x", (1, 1), 0.5, 2.0, 2.0, 2.0, 2.0)]
    assert check.errors(made_up) == {
        "dense": pytest.approx((0.25, 0.45)), "sparse": pytest.approx((0.25, 0.45)),
        "speed-up": pytest.approx((1 / 3, 0.6)),
    }  # fmt: skip


def test_advise_on_the_command_line(calibration, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # nothing is cut, as the output is no terminal
    table.save(prices(lambda name: 1e-9), calibration)
    words = "advise --model lenet-300-100 --batch 7 --blocksizes 1x1 8x8 --sparsities 0.5 0.9 --check"
    assert cli.main(words.split()) == 0
    text = capsys.readouterr().out
    for expected in ("fc1", "300x784", "0.9 sparse", "break-even", "the calibration of this machine", "median"):
        assert expected in text
    assert text.startswith("lenet-300-100, batch size 7, images of 1x28x28\n")
    assert "…" not in text


@pytest.mark.parametrize("width", [30, 80])
def test_a_narrow_terminal_breaks_lines_but_cuts_nothing(width):
    model = nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 10))
    rows = sk.advise(model, torch.zeros(100, 784))
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        cli._print_whole(console, show.advice_table(rows, table.load(table.SHIPPED)))
    text = captured.get()
    assert "…" not in text
    for row in rows:
        for number in (row.dense_ms, *row.sparse_ms[8, 8].values()):
            assert f"{number:.3f}" in text
    if width == 80:
        assert all(len(line.rstrip()) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("name", (*models.NAMES, "vgg-d", "resnet-18", "alexnet-s", "resnet-20"))
def test_advice_for_every_model(name, capsys):
    assert cli.main(["advise", "--model", name, "--batch", "1", "--sparsities", "0.9"]) == 0
    text = capsys.readouterr().out
    assert f"batch size 1, images of {'3x32x32' if name in models.COLOUR_NAMES else '1x28x28'}" in text
    assert "no prediction" not in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--sparsities", "1.5"], 1, "sparsities must be fractions removed"),
        (["--blocksizes", "0x8"], 1, "blocksizes[0] must be at least 1"),
        (["--batch", "0"], 2, "must be a whole number of at least 1, got '0'"),
        (["--model", "resnet"], 2, "--model"),
    ],
)
def test_bad_commands(words, code, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    try:
        found = cli.main(["advise", *words])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err
