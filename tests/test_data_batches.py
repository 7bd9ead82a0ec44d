"""Batches and what changes their images; held-out and inverted data sets."""

from functools import partial

import pytest
import torch

from sparsekern import data


def numbered(n: int, shape: tuple[int, ...] = (1,)) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that all hold their label + 1."""
    return torch.arange(1.0, n + 1).view(n, *[1] * len(shape)).expand(n, *shape).contiguous(), torch.arange(n)


def test_batches_are_a_new_permutation_each_epoch_and_repeatable():
    images, labels = torch.arange(23.0).view(23, 1), torch.arange(23)
    batches = data.Batches(images, labels, 5, torch.Generator().manual_seed(1))
    again = data.Batches(images, labels, 5, torch.Generator().manual_seed(1))
    epochs = [list(batches), list(batches)]
    assert [len(y) for _, y in epochs[0]] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    orders = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    assert all(order.sort().values.equal(labels) for order in orders)
    assert not orders[0].equal(orders[1])
    assert all(x.flatten().equal(y.float()) for epoch in epochs for x, y in epoch)
    assert all(a[1].equal(b[1]) for a, b in zip(epochs[0], again, strict=True))


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size"):
        data.Batches(torch.zeros(3, 1), torch.zeros(3), 0, torch.Generator())
    with pytest.raises(ValueError, match="equally many"):
        data.Batches(torch.zeros(3, 1), torch.zeros(4), 1, torch.Generator())


def moved(image: torch.Tensor, mirrored: bool, down: int, right: int) -> torch.Tensor:
    """One image [C, H, W], pixel by pixel."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                source = column - right
                result[:, row, column] = image[:, row - down, width - 1 - source if mirrored else source]
    return result


@pytest.mark.parametrize(("shift", "flip"), [(0, True), (1, False), (2, True)])
def test_every_image_is_one_of_the_moves_and_all_occur_equally_often(shift, flip):
    n, image = 3000, torch.rand(2, 4, 5) + 1
    found = data.flip_and_shift(image.expand(n, -1, -1, -1), torch.Generator().manual_seed(0), shift, flip)
    assert found.shape == (n, 2, 4, 5)
    steps = range(-shift, shift + 1)
    moves = [moved(image, m, d, r) for m in ((False, True) if flip else (False,)) for d in steps for r in steps]
    counts = torch.tensor([sum(f.equal(move) for f in found) for move in moves])
    assert counts.sum() == n  # the moves differ, so each image is exactly one of them
    mean = n / len(moves)
    assert ((counts - mean) ** 2 / mean).sum() < len(moves) + 4 * (2 * len(moves)) ** 0.5


def test_images_of_a_batch_stay_their_own():
    images = torch.rand(50, 3, 6, 6)
    before = images.clone()
    found = data.flip_and_shift(images, torch.Generator().manual_seed(0), 2)
    assert images.equal(before)
    steps = range(-2, 3)
    for image, result in zip(images, found, strict=True):
        assert any(result.equal(moved(image, m, d, r)) for m in (False, True) for d in steps for r in steps)
    assert not found.equal(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_flip_and_shift_keeps_the_dtype(dtype):
    images = torch.arange(1, 33).view(2, 1, 4, 4).to(dtype)
    found = data.flip_and_shift(images, torch.Generator().manual_seed(0), 3)
    assert found.dtype == dtype
    assert set(found.flatten().tolist()) <= {*images.flatten().tolist(), 0}


@pytest.mark.parametrize(
    ("shape", "shift", "message"),
    [
        ((3, 4, 4), 1, r"images must be \[B, C, H, W\], got shape \(3, 4, 4\)"),
        ((2, 3, 5, 4), 4, "shift must be from 0 to less than the images' 5x4 pixels, got 4"),
        ((2, 3, 4, 4), -1, "shift must be .* got -1"),
    ],
)
def test_bad_flip_and_shift(shape, shift, message):
    with pytest.raises(ValueError, match=message):
        data.flip_and_shift(torch.zeros(shape), torch.Generator(), shift)


def test_augmented_batches_are_repeatable_and_keep_labels():
    images, labels = numbered(20, (1, 6, 6))
    plain = images.clone()

    def epochs(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        augment = partial(data.flip_and_shift, shift=2)
        batches = data.Batches(images, labels, 8, torch.Generator().manual_seed(seed), augment)
        return [*batches, *batches]

    first = epochs(0)
    assert all(a.equal(c) and b.equal(d) for (a, b), (c, d) in zip(first, epochs(0), strict=True))
    assert images.equal(plain)
    for x, y in first:
        assert x.amax((1, 2, 3)).equal(y + 1.0)  # each with its label
    assert torch.cat([y for _, y in first[:3]]).sort().values.equal(labels)
    by_label = [
        torch.cat([x for x, _ in part])[torch.cat([y for _, y in part]).argsort()] for part in (first[:3], first[3:])
    ]
    assert not by_label[0].equal(by_label[1])  # drawn anew in each epoch
    assert not all(a.equal(c) for (a, _), (c, _) in zip(first, epochs(1), strict=True))


@pytest.fixture
def dataset() -> data.Dataset:
    images, labels = numbered(40, (1, 2, 2))
    return data.Dataset("some", "here", (0.25,), (0.5,), images, labels, images[:7], labels[:7])


def test_held_out_examples_are_a_seeded_tenth(dataset):
    def held(seed: int) -> set[int]:
        rest, images, labels = data.hold_out(dataset, torch.Generator().manual_seed(seed))
        assert len(labels) == 4
        assert images[:, 0, 0, 0].equal(labels + 1.0)
        assert rest.train_images[:, 0, 0, 0].equal(rest.train_labels + 1.0)
        assert sorted(rest.train_labels.tolist() + labels.tolist()) == list(range(40))
        assert rest.test_labels.equal(dataset.test_labels) and rest.mean == dataset.mean
        return set(labels.tolist())

    assert held(0) == held(0) != held(1)
    assert set.union(*(held(seed) for seed in range(60))) == set(range(40))  # any of them
    assert len(dataset.train_labels) == 40


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.001, 0.999, float("nan")])
def test_bad_fraction(dataset, fraction):
    with pytest.raises(ValueError, match=f"fraction must take some of the 40 .* got {fraction}"):
        data.hold_out(dataset, torch.Generator(), fraction)


def test_inverted_images_are_those_of_inverted_files():
    raw = torch.randint(256, (30, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.zeros(30)
    found = data.invert(data._standardise("some", "here", raw[:20], labels[:20], raw[20:], labels[20:]))
    expected = data._standardise("some", "here", 255 - raw[:20], labels[:20], 255 - raw[20:], labels[20:])
    torch.testing.assert_close(found.train_images, expected.train_images)
    torch.testing.assert_close(found.test_images, expected.test_images)
    assert found.mean == pytest.approx(expected.mean) and found.std == pytest.approx(expected.std)
