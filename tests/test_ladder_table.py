"""The ladder's numbers as one table and one figure."""

import numpy as np
import pytest

from sdkit.precision.failures import HEALTHY
from sdkit.precision.ladder import Rung
from sdkit.precision.ladder_table import plot_ladder, tabulate_ladder
from sdkit.precision.rungs import AS_IT_IS, FLOAT32

IMAGE = np.random.default_rng(0).random((16, 16, 3))


def drawn(name, size, psnr_db, **fields):
    return Rung(name, "", 1, 1, size, psnr_db, 0.99, problems=(None,), images=(IMAGE,), **fields)


def broken(name, size):
    return Rung(name, "", 0, 1, size, problems=("NaN in the unet, step 0",), images=(None,))


CLIMBED = {
    HEALTHY.name: [drawn(AS_IT_IS, 50, 55.0), drawn(FLOAT32, 100, float("inf"))],
    "overflow": [broken(AS_IT_IS, 50), drawn(FLOAT32, 100, 70.0, only_hides=True)],
    "weights": [Rung(AS_IT_IS, "", 0, 1, None, note="no"), broken(FLOAT32, 100)],
}


def test_a_row_tells_what_a_rung_gave():
    table = tabulate_ladder(CLIMBED).set_index(["failure", "rung"])
    assert len(table) == 6
    healthy = table.loc[(HEALTHY.name, AS_IT_IS)]
    assert (healthy["weight share"], healthy["PSNR dB"], healthy["proven"]) == (0.5, 55.0, True)
    assert not table.loc[("overflow", FLOAT32), "proven"]  # it is not like the reference by itself
    assert table.loc[("overflow", FLOAT32), "only hides"]
    assert table.loc[("overflow", AS_IT_IS), "problem"] == "NaN in the unet, step 0"
    refused = table.loc[("weights", AS_IT_IS)]
    assert np.isnan(refused["weight share"]) and refused["note"] == "no"


def test_the_figure_has_a_tile_for_each_failure_and_rung():
    figure = plot_ladder(CLIMBED, heading="Ladder")
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "1/1 · 0.50x\n55 dB · 0.990",
        "1/1 · 1.00x\nequal",
        "0/1 · 0.50x",
        "1/1 · 1.00x\n70 dB · 0.990\nonly hides it",
        "0/1",  # it was not put on, so it has no weight
        "0/1 · 1.00x",
    ]
    said = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert said == [[], [], ["NaN\nunet\nstep 0"], [], ["not possible"], ["NaN\nunet\nstep 0"]]


@pytest.mark.parametrize("missing", [AS_IT_IS])
def test_a_rung_that_is_not_there_leaves_an_empty_tile(missing):
    climbed = {**CLIMBED, "overflow": [r for r in CLIMBED["overflow"] if r.name != missing]}
    assert plot_ladder(climbed).axes[2].get_xlabel() == "not here"
