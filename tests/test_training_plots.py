"""Pictures of a training: live losses, one step, its gradients, before and after, on the way."""

import dataclasses

import matplotlib.pyplot as plt
import pytest
import torch
from tiny_training import make_config, make_data, spoil

from sdkit import ValidationError
from sdkit.finetuning.adapter import find_parameters
from sdkit.finetuning.batches import draw_batch
from sdkit.finetuning.evaluation_plots import plot_on_the_way, shorten, spread
from sdkit.finetuning.evaluation_prompts import find_product, studio_prompts
from sdkit.finetuning.live_plot import LivePlot, plot_training
from sdkit.finetuning.objective import add_noise, make_noise_scheduler
from sdkit.finetuning.step_plots import (
    decode,
    measure_gradients,
    plot_gradients,
    plot_step,
    remove_noise,
)
from sdkit.finetuning.training import train_lora
from sdkit.finetuning.training_run import begin_run


@pytest.fixture
def drawn(monkeypatch):
    """Figures that a notebook would have shown, the live one drawn over."""
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(("update", figure))

    def display(figure, display_id):
        shown.append(("new", figure))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    return shown


def test_the_live_plot_follows_a_training_and_marks_what_was_dropped(tiny_pipe, tmp_path, drawn):
    train, validation = make_data(tiny_pipe)
    with LivePlot(every_seconds=0) as live:
        report = train_lora(
            make_config(tmp_path / "run"), pipe=tiny_pipe, data=(spoil(train, 5), validation),
            on_step=live.note, progress=False,
        )  # fmt: skip
    assert tuple(live.losses) == report.losses
    assert tuple(live.validation_losses) == report.validation_losses[1:]  # the first is before all
    assert live.dropped == [report.dropped_steps[0].step]
    assert [kind for kind, _ in drawn] == ["new"] + ["update"] * 6
    (ax,) = drawn[-1][1].axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["one step", "held out", "dropped"]


def test_the_live_plot_is_drawn_to_its_end_after_an_error(drawn):
    with pytest.raises(RuntimeError):
        with LivePlot():
            raise RuntimeError("planted")
    assert len(drawn) == 1


def test_a_running_mean_is_that_of_the_steps_before_it():
    losses = [(step, float(step)) for step in range(30)]
    _, mean = plot_training(losses).axes[0].lines
    assert mean.get_xdata()[0] == 19 and mean.get_ydata()[0] == pytest.approx(9.5)
    assert mean.get_xdata()[-1] == 29 and mean.get_ydata()[-1] == pytest.approx(19.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_answer_gives_the_picture_back(tiny_pipe, prediction_type):
    tiny_pipe.scheduler.register_to_config(prediction_type=prediction_type)
    schedule = make_noise_scheduler(tiny_pipe)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([10, 500, 999])
    noisy_latents, target = add_noise(schedule, latents, noise, timesteps)
    cleaned = remove_noise(schedule, noisy_latents, target, timesteps)
    # The signal at timestep 999 is 0.07 of the whole, so rounding is 15 times as large there.
    assert torch.allclose(cleaned, latents, atol=1e-4)


def test_one_step_is_drawn_from_the_least_noise_to_the_most(tiny_pipe, tmp_path):
    config = make_config(tmp_path / "run", targets="attention,convolution")
    run, _ = begin_run(config, pipe=tiny_pipe, data=make_data(tiny_pipe), progress=False)
    batch = draw_batch(run.train, config, 1000, 0)
    noisy_latents, target = add_noise(
        run.noise_scheduler, batch.latents, batch.noise, batch.timesteps
    )
    noise_pred = tiny_pipe.unet(noisy_latents, batch.timesteps, batch.prompt_embeds).sample
    losses = (noise_pred - target).square().mean(dim=(1, 2, 3))
    losses.mean().backward()
    figure = plot_step(
        tiny_pipe.vae, run.noise_scheduler, batch, noisy_latents, noise_pred, losses, rows=3
    )
    told = [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel().startswith("timestep")]
    steps = [int(label.split()[1]) for label in told]
    assert len(steps) == 3 and steps == sorted(steps)
    pictures = decode(tiny_pipe.vae, batch.latents)
    assert pictures.min() >= 0 and pictures.max() <= 1
    gradients = measure_gradients(find_parameters(tiny_pipe))
    assert "mid_block" in gradients and "down_blocks.0" in str(gradients)
    lengths = list(gradients.values())
    assert all(a == 0 for a, _ in lengths) and all(b > 0 for _, b in lengths)  # B starts at zero
    total = sum(p.grad.square().sum() for p in find_parameters(tiny_pipe).values())
    assert sum(b**2 for _, b in lengths) == pytest.approx(float(total), rel=1e-5)
    _, ax = plt.subplots()
    assert len(plot_gradients(ax, gradients).patches) == 2 * len(gradients)
    plt.close("all")


def test_pictures_on_the_way_are_those_of_the_run(tiny_pipe, tmp_path):
    report = train_lora(
        make_config(
            tmp_path / "run", max_train_steps=2, validation_prompts=("a shoe",),
            validation_image_steps=1, validation_inference_steps=2,
        ),
        pipe=tiny_pipe, data=make_data(tiny_pipe), progress=False,
    )  # fmt: skip
    figure = plot_on_the_way(report)
    titles = [ax.get_xlabel() for ax in figure.axes]
    assert titles == ["after 0 steps", "after 1 steps", "after 2 steps"]
    first, *_, last = (ax.images[0].get_array() for ax in figure.axes)
    assert first.std() > 0 and (first != last).any()
    gone = dataclasses.replace(report, validation_images=report.validation_images[:1])
    assert len(plot_on_the_way(gone).axes) == 1
    with pytest.raises(ValidationError, match="Set validation_prompts"):
        plot_on_the_way(dataclasses.replace(report, validation_images=()))


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, [0]), (2, [0, 5]), (8, list(range(8))), (99, list(range(8)))]
)
def test_prompts_are_chosen_all_over(count, chosen):
    assert spread(range(8), count) == chosen
    assert spread(range(0), count) == []


@pytest.mark.parametrize("count", [4, 8, 16])
def test_some_prompts_of_a_grid_have_each_kind_and_as_many_colours_as_can_be(count):
    products = [find_product(prompt) for prompt in spread(studio_prompts(), count)]
    assert len({product.kind for product in products}) == 4
    assert len({product.colour for product in products}) == min(count, 8)
    assert len(set(products)) == count


def test_a_prompt_is_shortened_to_what_is_its_own():
    long = "A professional product photo of red boots on grass, high quality, product photography"
    assert shorten(long) == "red boots on grass"
    assert shorten("a cat") == "a cat"
