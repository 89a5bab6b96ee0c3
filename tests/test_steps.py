"""A step is what diffusers' loop counts, however often the denoiser is called in it."""

import pytest
import torch
from diffusers import DDIMScheduler

from sdkit.steps import StepCounter, name_denoiser_arguments


class Pipeline:
    """All that is asked of one: its scheduler's timesteps."""

    def __init__(self, timesteps):
        self.scheduler = DDIMScheduler()
        self.scheduler.timesteps = torch.tensor(timesteps)


def count(timesteps, calls):
    pipe = Pipeline(timesteps)
    counter = StepCounter(pipe)
    found = []
    for timestep in calls:
        is_new = counter.advance(timestep)
        found.append((counter.step, is_new))
    return found


@pytest.mark.parametrize(
    ("timesteps", "calls", "steps"),
    [
        ([9, 5, 1], [9, 5, 1], [0, 1, 2]),
        ([9, 5, 1], [9, 9, 5, 5, 1, 1], [0, 0, 1, 1, 2, 2]),  # once for each half of the guidance
        ([9, 5, 5, 1], [9, 5, 5, 1], [0, 1, 2, 3]),  # second-order schedulers list it twice
        ([9, 5, 1], [5, 1], [0, 1]),  # image-to-image starts later
        ([900, 500], [0.9, 0.9, 0.5], [0, 0, 1]),  # Flux divides by 1000
        ([9, 5], [torch.tensor([9, 9]), torch.tensor([5, 5])], [0, 1]),
    ],
)
def test_steps_are_counted_as_the_loop_does(timesteps, calls, steps):
    assert [step for step, _ in count(timesteps, calls)] == steps


def test_a_second_run_begins_anew():
    assert count([9, 5], [9, 5, 9, 5]) == [(0, True), (1, False), (0, True), (1, False)]


def test_the_arguments_of_a_denoiser_have_names():
    assert name_denoiser_arguments((1, 2), {"encoder_hidden_states": 3}) == {
        "sample": 1, "timestep": 2, "encoder_hidden_states": 3,
    }  # fmt: skip


def test_following_leaves_nothing_behind(tiny_pipe):
    with StepCounter(tiny_pipe).following([tiny_pipe.unet]) as steps:
        tiny_pipe("a shoe", num_inference_steps=3, guidance_scale=1.0)
    assert steps.step == len(tiny_pipe.scheduler.timesteps) - 1
    assert not tiny_pipe.unet._forward_pre_hooks
