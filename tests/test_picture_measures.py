"""Measures on pictures: each tells the planted fault, and is right where the answer is known."""

import numpy as np
import pytest
import torch

from sdkit.finetuning.picture_measures import (
    WHITE_LEVEL,
    border_mask,
    measure_change,
    measure_diversity,
    measure_kernel_distance,
    measure_white_border,
)


def paint(count, level):
    return torch.full((count, 3, 64, 64), level / 255)


def test_the_border_is_a_sixteenth_on_each_side():
    mask = border_mask(64, 32)
    assert mask.shape == (64, 32)
    assert mask[:4].all() and mask[-4:].all() and mask[:, :2].all() and mask[:, -2:].all()
    assert not mask[4:-4, 2:-2].any()


@pytest.mark.parametrize(("level", "share"), [(255, 1), (WHITE_LEVEL, 1), (WHITE_LEVEL - 1, 0)])
def test_white_begins_at_its_level(level, share):
    assert measure_white_border(paint(2, level)).tolist() == [share, share]


def test_white_needs_all_three_channels():
    images = paint(1, 255)
    images[:, 2] = 240 / 255  # a yellow tinge
    assert measure_white_border(images).item() == 0


def test_only_the_border_counts():
    images = paint(1, 255)
    images[:, :, 4:-4, 4:-4] = 0
    assert measure_white_border(images).item() == 1
    images[:, :, 0] = 0  # one row of 64, of a border of 64^2 - 56^2
    assert measure_white_border(images).item() == pytest.approx(1 - 64 / (64**2 - 56**2))


def test_white_is_judged_as_8_bits_show_it():
    assert measure_white_border(torch.full((1, 3, 64, 64), 249.6 / 255)).item() == 1


def test_change_is_in_levels():
    assert measure_change(paint(2, 100), paint(2, 110)).tolist() == pytest.approx([10, 10])


def test_diversity_of_a_collapsed_group_is_zero():
    one = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert measure_diversity(one.repeat(5, 1, 1, 1)) == pytest.approx(0, abs=1e-3)


def test_diversity_is_the_mean_difference_of_pairs():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = [float((images[i] - images[j]).abs().mean()) * 255 for i in range(4) for j in range(i)]
    assert measure_diversity(images) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert measure_diversity(images[:1]) is None


def draw(count, shift, seed):
    return np.random.default_rng(seed).normal(shift, 1, (count, 16))


def test_kernel_distance_is_unbiased_for_few_pictures():
    distances = [
        measure_kernel_distance(draw(8, 0, 2 * i), draw(8, 0, 2 * i + 1)) for i in range(400)
    ]
    error = np.std(distances) / np.sqrt(len(distances))
    assert abs(np.mean(distances)) < 3 * error
    assert min(distances) < 0  # what an unbiased estimate of nothing must be at times


def test_kernel_distance_grows_with_the_difference():
    distances = [measure_kernel_distance(draw(32, 0, 1), draw(40, s, 2)) for s in (0, 0.5, 1, 2)]
    assert distances == sorted(distances)
    assert distances[1] > 5 * abs(distances[0])


def test_kernel_distance_by_hand():
    x, y = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0]])
    within = (1 * 2 + 1) ** 3 + (0 * 3 + 1) ** 3
    between = np.mean([(a * b + 1) ** 3 for a in (1, 2) for b in (0, 3)])
    assert measure_kernel_distance(x, y) == pytest.approx(within - 2 * between)
    assert measure_kernel_distance(x[:1], y) is None
