"""Each planted fault is named by stage, step, module and cause; no healthy run is accused.

The short campaign runs always, all of it with `make test-all`; `fault_matrix.py` prints and draws.
"""

import pytest
from campaign import parametrize
from fault_matrix import HEALTH, Mark, Truth, draw_matrix, make_table, mark_healthy, mark_planted
from healthy import HEALTHY
from planted import PLANTED
from planted_mini import PLANTED_IN_MINI

from sdkit.figures import save_figure

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")


@parametrize((*PLANTED, *PLANTED_IN_MINI))
def test_a_planted_fault_is_named(case, tokenizer_folder):
    mark = mark_planted(case, tokenizer_folder)
    assert mark.is_right, f"planted {mark.truth}\nfound {mark.found}\n{case.note}"


@parametrize(HEALTHY)
def test_a_healthy_run_is_not_accused(case, tokenizer_folder):
    assert mark_healthy(case, tokenizer_folder).found == HEALTH


PLACE = ("unet", 2, "unet.conv_in", "bad-input", ((1, None),))
WRONG = {
    "stage": ("vae", 2, "unet.conv_in", "bad-input"),
    "step": ("unet", 3, "unet.conv_in", "bad-input"),
    "module": ("unet", 2, "unet.conv_out", "bad-input"),
    "cause": ("unet", 2, "unet.conv_in", "bad-weights"),
}


@pytest.mark.parametrize("aspect", WRONG)
def test_a_wrong_answer_is_marked_where_it_is_wrong(aspect):
    mark = Mark("a case", Truth(*PLACE), Truth(*WRONG[aspect]))
    assert [name for name, is_right in mark.right.items() if not is_right] == [aspect]
    assert not mark.is_right


def test_another_true_place_counts_as_a_whole_only():
    assert Mark("a case", Truth(*PLACE), Truth("unet", 1, None, "bad-input")).is_right
    assert not Mark("a case", Truth(*PLACE), Truth("unet", 1, "vae", "bad-input")).is_right


def test_the_matrix_is_drawn_with_wrong_answers_too(tmp_path):
    marks = [
        Mark("right", Truth(*PLACE), Truth(*PLACE)),
        Mark("wrong", Truth(*PLACE), Truth(*WRONG["cause"])),
        Mark("false alarm", HEALTH, Truth("none", None, None, "undecided")),
    ]
    assert save_figure(draw_matrix(marks), tmp_path / "matrix.png").stat().st_size > 5000
    assert make_table(marks)["right"].tolist() == [True, False, False]
