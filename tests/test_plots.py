"""The pictures of a diagnosis are drawn from what was found, on light and wide cards."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from sdkit import diagnose  # noqa: E402
from sdkit.diagnosis.ablation import FAULTY, HONEST, Cell  # noqa: E402
from sdkit.diagnosis.plots import paint, plot_ablation, plot_bad_op, plot_timeline  # noqa: E402
from sdkit.diagnosis.timeline import Activation  # noqa: E402
from sdkit.emulate import mps  # noqa: E402
from sdkit.figures import figure_style, save_figure  # noqa: E402


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def texts(figure):
    return [t.get_text() for t in (*figure.texts, *(t for ax in figure.axes for t in ax.texts))]


def test_the_grid_has_one_tile_a_cell_and_says_where_it_broke(tmp_path):
    image = Image.new("RGB", (8, 8), (0, 200, 0))
    cells = [
        Cell(dtype, attention, kernel, memory, None, image=image)
        for dtype in ("float16", "float32")
        for attention in ("diffusers-sliced", "sdpa")
        for kernel in (FAULTY, HONEST)
        for memory in ("zeros", "stale_float16", "stale_float32", "nan")
    ]
    cells[3] = Cell("float16", "diffusers-sliced", FAULTY, "nan", "nan", "unet", 0)
    figure = plot_ablation(cells, heading="32 runs")
    width, height = figure.get_size_inches()
    assert len(figure.axes) == 32 and width > 1.8 * height
    assert "NaN\nUNet\nstep 0" in texts(figure)
    assert {"32 runs", "old float32", "the report, before", "never run"} <= set(texts(figure))
    assert save_figure(figure, tmp_path / "grid.png").stat().st_size > 1000


def test_the_timeline_marks_what_does_not_fit(tmp_path):
    healthy = [Activation("unet", step, "unet.conv_in", 3.0) for step in (0, 1)]
    loud = [healthy[0], Activation("unet", 1, "unet.conv_in", 1e6)]
    with figure_style():
        figure, ax = plt.subplots()
        assert plot_timeline(ax, {"healthy": healthy, "loud": loud}) is ax
    assert ax.get_yscale() == "log"
    assert {"step 0", "step 1", "unet.conv_in", "float16\nends here:\n65,504"} <= set(texts(figure))


def test_the_anatomy_shows_buffer_op_and_output(tiny_pipe, tmp_path):
    tiny_pipe.enable_attention_slicing("max")
    with mps(memory="stale_float32"):
        found = diagnose(tiny_pipe.to(torch.float16), "a shoe", num_inference_steps=1)
    figure = plot_bad_op(found.bad_op)
    titles = [ax.get_title(loc=where) for ax in figure.axes for where in ("left", "center")]
    assert {"self: the buffer", "batch1: queries", "batch2: keys", "output"} <= set(titles)
    assert "baddbmm" in texts(figure) and any("beta=0" in text for text in texts(figure))
    assert save_figure(figure, tmp_path / "anatomy.png").stat().st_size > 1000


def test_nan_and_inf_are_painted_red_and_the_rest_grey():
    tensor = torch.arange(12.0).reshape(1, 3, 4)
    tensor[0, 1, 2], tensor[0, 2, 0] = float("nan"), float("inf")
    image = paint(tensor)
    is_grey = (image == image[..., :1]).all(axis=-1)
    assert image.shape == (3, 4, 3)
    assert np.argwhere(~is_grey).tolist() == [[1, 2], [2, 0]]
    assert paint(torch.full((2, 2), float("nan"))).shape == (2, 2, 3)
    assert paint(torch.ones(3)).shape == (1, 3, 3)
