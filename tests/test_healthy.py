"""The healthy runs are healthy: no NaN at any border, a valid picture, finite at every module."""

import pytest
from campaign import parametrize
from healthy import HEALTHY
from planting import draw

from sdkit.guarding import guard
from sdkit.validation import judge_image

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")


def test_there_are_enough_and_their_names_differ():
    assert len(HEALTHY) >= 50
    assert len({case.name for case in HEALTHY}) == len(HEALTHY)
    assert sum(case.fast for case in HEALTHY) == 6


@parametrize(HEALTHY)
def test_it_is_finite_and_shows_a_picture(case, tokenizer_folder):
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        with guard(pipe) as report:
            images, is_flagged = draw(pipe, case.prompts, seed=case.seed, **pipe_kwargs)
    assert sum(report.calls.values()) >= 3
    assert judge_image(images).valid
    assert not is_flagged
