"""The trainer: recipe, counts, results on disk, reproducibility, and clean ends."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern import checkpoint, data, models, plots
from sparsekern.convert import sparsify_
from sparsekern.pattern import BlockPattern
from sparsekern.timing import Timing
from sparsekern.train import Interrupted, Settings, measure, output, run
from sparsekern.train.loop import Recipe, Trainer, one_cycle

RECIPE = Recipe(epochs=1, batch_size=100, lr=0.1, seed=3)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset():
    return data.load("synthetic")


def lenet(seed=0):
    return models.build("lenet-300-100", generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    settings = Settings(threads=1, out=out, dataset="synthetic", epochs=1, compare_dense=True, rounds=2, seed=5)
    return run(settings, ["sparsekern", "train", "--out", "a folder"]), out


def test_loop_equals_a_plain_torch_loop(dataset):
    """Same weights, batches and schedule through torch's own scheduler and its plain SGD give the same network."""
    trainer = Trainer(lenet(), dataset, RECIPE)
    trainer.fit()
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60, cycle_momentum=False)
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(3)).split(100)
    for index in order:
        optimizer.zero_grad()
        F.cross_entropy(model(dataset.train_images[index]), dataset.train_labels[index]).backward()
        optimizer.step()
        schedule.step()
    for ours, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    expected = (model(dataset.test_images).argmax(1) == dataset.test_labels).float().mean().item()
    assert trainer.accuracy() == pytest.approx(expected, abs=3e-3)
    assert trainer.steps == 60
    assert trainer.seconds > 0
    assert trainer.model.training


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_one_cycle_peaks_and_ends_low(steps):
    rates = one_cycle(0.1, steps)
    assert len(rates) == steps
    assert all(0 < rate <= 0.1 for rate in rates)
    assert rates[0] == pytest.approx(0.004)
    if steps >= 10:
        assert max(rates) == pytest.approx(0.1, rel=0.02)
        assert rates[-1] < 1e-4


def test_loss_that_is_not_finite_stops_the_run(dataset):
    trainer = Trainer(lenet(), dataset, Recipe(epochs=1, batch_size=100, lr=1e9, seed=0))
    with pytest.raises(FloatingPointError, match=r"epoch 1; try a smaller lr"):
        trainer.fit()


def test_memory_format_reaches_the_layers(dataset):
    model = models.build("simple-cnn")
    seen = []
    model.pool1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    trainer = Trainer(model, dataset, RECIPE, torch.channels_last)
    trainer.step()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


def test_multiply_adds_by_hand():
    image = torch.zeros(1, 1, 28, 28)
    assert measure.macs_per_layer(models.build("lenet-300-100"), image) == {
        "fc1": 784 * 300, "fc2": 300 * 100, "fc3": 1000,
    }  # fmt: skip
    conv = {"conv1": 24 * 24 * 20 * 25, "conv2": 8 * 8 * 50 * 500, "fc1": 800 * 500, "fc2": 5000}
    model = models.build("lenet-5-caffe")
    assert measure.macs_per_layer(model, image) == conv

    mask = torch.zeros(50, 500, dtype=torch.bool)
    mask[3, 7] = mask[49, 499] = mask[0, 0] = True
    sparsify_(model, {"conv2": BlockPattern.from_dense(mask, (1, 1))})
    assert measure.macs_per_layer(model, image) == conv | {"conv2": 8 * 8 * 3}


def test_multiply_adds_of_a_sequence():
    assert measure.macs_per_layer(nn.Sequential(nn.Linear(4, 5)), torch.zeros(1, 7, 4)) == {"0": 140}


def test_overhang_of_edge_blocks_is_never_counted(dataset):
    """300 x 784 in blocks of 32 x 32: the last row of blocks has 12 rows, the last column 16 columns."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 300))
    sparsify_(model, {"1": BlockPattern.from_mask(torch.ones(10, 25, dtype=torch.bool), (32, 32), (300, 784))})
    assert measure.parameters(model) == 300 * 784 + 300
    assert measure.macs_per_layer(model, torch.zeros(1, 1, 28, 28)) == {"1": 300 * 784}


def test_bytes_by_hand(dataset):
    trainer = Trainer(lenet(), dataset, RECIPE)
    size = 4 * 266_610
    assert measure.bytes_held(trainer) == {"weights": size, "indices": 0, "gradients": size, "optimizer": size}


def test_measuring_changes_nothing(dataset):
    trainer = Trainer(lenet(), dataset, RECIPE)
    before = [p.clone() for p in trainer.model.parameters()]
    measure.time_steps({"one": trainer}, rounds=1)
    measure.time_inference({"one": trainer}, 10, rounds=1)
    measure.split_step(trainer)
    measure.bytes_held(trainer)
    assert all(p.equal(q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.steps == 0
    assert trainer.model.training


def test_result_holds_every_figure(finished):
    result, out = finished
    assert json.loads(json.dumps(result)) == json.loads((out / "result.json").read_text())
    assert result["complete"] is True
    assert isinstance(result["trustworthy"], bool)
    assert result["command"] == "sparsekern train --out 'a folder'"
    assert result["seed"] == 5
    assert result["threads"] >= 1
    assert result["environment"]["torch"] == torch.__version__
    for name in plots.NETWORKS:
        column = result[name]
        assert column["test_accuracy"] > 0.5
        assert column["train_steps"] == 60
        assert column["train_seconds"] > 0
        assert column["step_seconds"].keys() == {"p20", "p50", "p80", "data", "forward", "backward", "optimizer"}
        assert column["inference"].keys() == {"latency_seconds", "images_per_second", "batch_seconds"}
        assert set(column["bytes"]) == {"weights", "indices", "gradients", "optimizer"}
        assert {"train_step", "train_total", "inference"} <= column["speedup"].keys()
    assert result["speedup"] == result["sparse"]["speedup"]
    assert result["macs_kept"] == pytest.approx(0.1, abs=0.002) == 1 / result["ceiling"]
    assert result["dense"]["macs_kept"] == 1
    assert result["dense"]["speedup"]["train_step"] == 1
    assert 0 < result["small_dense"]["width"] <= 1
    assert result["small_dense"]["step_ratio"] > 0
    assert result["sparse"]["bytes"]["gradients"] == result["sparse"]["bytes"]["weights"] < 0.2 * 4 * 266_610


def test_random_mask_has_the_densities_of_sparse(finished):
    result, _ = finished
    assert result["random_mask"]["macs"] == pytest.approx(result["sparse"]["macs"], rel=0.01)
    assert [layer["name"] for layer in result["layers"]] == ["fc1", "fc2", "fc3"]


def test_files_of_a_run(finished):
    result, out = finished
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == list(plots.NETWORKS)
    assert rows[1].keys() == {"model", "epoch", "step", "seconds", "loss", "accuracy"}
    assert float(rows[1]["accuracy"]) == result["sparse"]["test_accuracy"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in plots.NAMES)
    expected = {"result.json", "history.csv", "model.safetensors", *plots.NAMES}
    assert {path.name for path in out.iterdir()} == expected


def test_saved_model_is_the_one_measured(finished, dataset):
    result, out = finished
    model = lenet(seed=1)
    checkpoint.load_(model, out / "model.safetensors")
    assert Trainer(model, dataset, RECIPE).accuracy() == result["sparse"]["test_accuracy"]


def test_same_seed_same_run(tmp_path):
    def accuracies(seed: int, folder: str) -> list[float]:
        out = tmp_path / folder
        settings = Settings(out, dataset="synthetic", epochs=1, seed=seed, pruner="random", threads=1, rounds=1)
        result = run(settings, [])
        return [result["sparse"]["test_accuracy"], result["sparse"]["train_loss"]]

    first = accuracies(1, "a")
    assert first == accuracies(1, "b") != accuracies(2, "c")


def test_convolutions_with_isometry_and_unstructured(tmp_path):
    settings = Settings(
        tmp_path, "simple-cnn", "synthetic", 0.8, blocksize=(1, 1), isometry=True, epochs=1, threads=1, rounds=1
    )
    result = run(settings, [])
    assert result["sparse"]["test_accuracy"] > 0.3
    assert result["isometry_seconds"] > 0
    assert result["sparsity_achieved"] == pytest.approx(0.8, abs=1e-4)
    assert result["dense"] is None
    assert result["speedup"] is None
    assert 0 < result["macs_kept"] < 1
    assert not (tmp_path / plots.SPEEDUP).exists()
    assert (tmp_path / plots.FIRST_LAYER).exists()


@pytest.mark.parametrize("model, blocksize", [("resnet-8", (8, 8)), ("alexnet-s", (8, 8)), ("mlp-3", (4, 4))])
def test_networks_for_images_in_colour(model, blocksize, tmp_path, monkeypatch):
    """Whose training images are mirrored and shifted; grey ones are not."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(200, 3, 32, 32, generator=generator), torch.arange(200) % 10
    colour = data.Dataset("cifar-10", "made up", (0.5,) * 3, (0.2,) * 3, images, labels, images[:50], labels[:50])
    monkeypatch.setattr(data, "load", lambda name, folder=None: colour)
    settings = Settings(tmp_path, model, "cifar-10", 0.8, blocksize=blocksize, epochs=1, threads=1, rounds=1)
    result = run(settings, [])
    assert result["dataset"]["image_shape"] == [3, 32, 32]
    assert result["sparsity_achieved"] == pytest.approx(0.8, abs=1e-2)
    assert (tmp_path / plots.FIRST_LAYER).exists()
    trainer = Trainer(models.build(model, image_shape=(3, 32, 32)), colour, RECIPE)
    of_training = {image.numpy().tobytes() for image in images}
    moved = [image.numpy().tobytes() not in of_training for image in trainer.batch()[0]]
    assert sum(moved) > 90


EARLIER = ("result.json", "history.csv", "model.safetensors", plots.SPEEDUP)


def earlier_run(folder):
    for name in EARLIER:
        (folder / name).write_text("of an earlier run")


def is_untouched(folder):
    texts = {path.name: path.read_bytes() for path in folder.iterdir()}
    return texts == dict.fromkeys(EARLIER, b"of an earlier run")


def stop_at(stage, error):
    def progress(what: str, done: int, total: int, note: str) -> None:
        if what == stage and (done or not total):
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_stopped_run_keeps_what_it_has(tmp_path, error):
    earlier_run(tmp_path)
    settings = Settings(
        threads=1, out=tmp_path, dataset="synthetic", epochs=1, rounds=1, compare_dense=True, overwrite=True
    )
    with pytest.raises((Interrupted, FloatingPointError)) as caught:
        run(settings, [], stop_at("training small_dense", error))
    result = json.loads((tmp_path / "result.json").read_text())
    if error is KeyboardInterrupt:
        assert result == json.loads(json.dumps(caught.value.result))
    assert result["complete"] is False
    assert result["dense"]["test_accuracy"] > 0.5
    assert result["sparse"]["train_steps"] == 60
    assert "test_accuracy" not in result["random_mask"]
    assert result["speedup"] is None
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3
    assert (tmp_path / plots.CURVES).exists()
    assert not (tmp_path / plots.SPEEDUP).exists()
    checkpoint.load_(lenet(), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "progress", "error"),
    [
        ({"sparsity": 0.9999}, None, ValueError),
        ({"lr": 1e9}, None, FloatingPointError),
        ({}, stop_at("training sparse", KeyboardInterrupt), KeyboardInterrupt),
    ],
)
def test_earlier_run_survives_one_without_results(tmp_path, change, progress, error):
    earlier_run(tmp_path)
    settings = Settings(tmp_path, dataset="synthetic", epochs=1, rounds=1, threads=1, overwrite=True, **change)
    with pytest.raises(error):
        run(settings, [], progress or (lambda *news: None))
    assert is_untouched(tmp_path)


def test_network_is_saved_after_every_epoch(tmp_path, dataset):
    """What lies in the folder when the second epoch is at work, as a killed process would leave it."""
    seen = []

    def progress(what: str, done: int, total: int, note: str) -> None:
        if what == "training sparse" and 60 < done < total:
            model = lenet(seed=1)
            checkpoint.load_(model, tmp_path / "model.safetensors")
            result = json.loads((tmp_path / "result.json").read_text())
            seen.append((Trainer(model, dataset, RECIPE).accuracy(), result["sparse"]["test_accuracy"]))
            assert result["model_file"] == {"name": "model.safetensors", "epoch": 1}
            assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "result.json", "history.csv"}

    run(Settings(tmp_path, dataset="synthetic", epochs=2, rounds=1, threads=1), [], progress)
    assert seen
    assert all(loaded == written for loaded, written in seen)


def test_leftovers_of_a_killed_run_go(tmp_path):
    for name in (plots.CURVES, f"{plots.CURVES}.part", "result.json.part", "model.safetensors.1a.tmp", "notes.txt"):
        (tmp_path / name).touch()
    output.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_trustworthy_figures():
    quiet, noisy = Timing((1.0,) * 9 + (9.0,)), Timing((1.0,) * 5 + (1.6,) * 5)
    assert measure.trustworthy({"dense": quiet, "sparse": quiet, "small_dense": noisy}, (10.9, 1.0), 10.0)
    assert not measure.trustworthy({"dense": quiet, "sparse": quiet}, (1.0, 11.1), 10.0)
    assert not measure.trustworthy({"dense": noisy, "sparse": quiet}, (), 10.0)
    assert not measure.trustworthy({"sparse": noisy}, (), 10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be the fraction removed, in \[0, 1\), got 1.0"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"blocksize": (0, 8)}, "blocksize"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads"),
        ({"model": "lenet"}, "model must be one of"),
        ({"dataset": "cifar"}, "dataset must be one of"),
        ({"pruner": "x"}, "pruner"),
        ({"backend": "x"}, "backend"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**({"out": tmp_path} | change))


def test_out_must_not_be_or_be_below_a_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(ValueError, match="out must be a folder"):
            Settings(threads=1, out=out)


def test_width_of_equal_time_follows_the_clock(dataset, monkeypatch):
    """With a step time proportional to width**2, half the time is a width of 0.707."""

    class Fake:
        def __init__(self, median: float) -> None:
            self.median = median

    monkeypatch.setattr(measure, "time_steps", lambda pair, rounds: {k: Fake(v) for k, v in pair.items()})
    width = measure.equal_time_width(0.5, lambda width: width**2, rounds=1)
    assert width == pytest.approx(0.5**0.5, rel=0.01)
    assert measure.equal_time_width(7.0, lambda width: width**2, rounds=1) == pytest.approx(1, rel=0.01)
    tried = []
    measure.equal_time_width(0.5, lambda width: tried.append(width) or width**2, rounds=1, limit_seconds=0.0)
    assert len(tried) == 1
