"""Files that are whole and the same each time; tiles that show what is wrong."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from sdkit.figures import BAD, figure_style, plot_bars, plot_image, plot_images, save_figure  # noqa: E402

GREEN = np.zeros((16, 16, 3), np.uint8) + np.array([0, 200, 0], np.uint8)


def pixels_of(figure, tmp_path):
    return np.asarray(Image.open(save_figure(figure, tmp_path / "figure.png")).convert("RGB"))


def share_of(pixels, colour):
    return (pixels == np.array(colour, np.uint8)).all(axis=-1).mean()


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, ending):
    def draw():
        return plot_images([GREEN, None], ["green", "a caption"], problems=[None, "nan"])

    first = save_figure(draw(), tmp_path / "new" / f"first.{ending}")
    figure = draw()
    second = save_figure(figure, tmp_path / f"second.{ending}")
    again = save_figure(figure, tmp_path / f"again.{ending}")
    assert first.read_bytes() == second.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again." + ending,
        "new",
        "second." + ending,
    ]


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(plot_images([GREEN]), tmp_path / "figure.nonsense")
    assert list(tmp_path.iterdir()) == []


def test_valid_images_show_and_invalid_ones_have_a_red_border(tmp_path):
    red = [int(BAD[i : i + 2], 16) for i in (1, 3, 5)]
    valid = pixels_of(plot_images([GREEN]), tmp_path)
    assert share_of(valid, (0, 200, 0)) > 0.5 and share_of(valid, red) == 0
    invalid = pixels_of(plot_images([None], problems=["nan"]), tmp_path)
    assert share_of(invalid, (0, 0, 0)) > 0.5
    for pixels in (invalid, pixels_of(plot_images([None]), tmp_path)):
        is_red = (pixels == np.array(red)).all(axis=-1)
        assert is_red.mean(axis=0).max() > 0.8 and is_red.mean(axis=1).max() > 0.8  # whole sides


def test_floats_and_pil_images_look_alike_and_nan_is_black(tmp_path):
    forms = [GREEN, GREEN / 255, Image.fromarray(GREEN)]
    drawn = [pixels_of(plot_images([form]), tmp_path) for form in forms]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    assert share_of(pixels_of(plot_images([GREEN * np.nan]), tmp_path), (0, 0, 0)) > 0.5


def test_the_grid_leaves_no_open_figure():
    before = plt.get_fignums()
    figure = plot_images([GREEN] * 5, columns=2, heading="Five")
    assert len(figure.axes) == 5 and plt.get_fignums() == before


def test_counts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 images, 1 titles"):
        plot_images([GREEN, GREEN], ["one"])
    with pytest.raises(ValueError, match="got none"):
        plot_images([])


def test_bars_say_their_number_or_that_there_is_none():
    with figure_style():
        ax = plt.figure().subplots()
    plot_bars(ax, ["a", "b"], [1.5, None], unit="GiB")
    assert [text.get_text().strip() for text in ax.texts] == ["1.5 GiB", "not measured"]
    assert plot_image(ax, GREEN, title="caption") is ax and ax.get_xlabel() == "caption"
    plt.close(ax.figure)
