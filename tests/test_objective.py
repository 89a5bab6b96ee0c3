"""Targets by the scheduler, Min-SNR where the signal is zero, noise offset, and draws by key."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from tiny_training import make_config, make_encoded

from sdkit.finetuning.batches import choose_indices, draw_batch
from sdkit.finetuning.keyed_random import keyed_generator
from sdkit.finetuning.objective import (
    add_noise,
    check_weights,
    make_noise_scheduler,
    measure_losses,
    weigh_timesteps,
)
from sdkit.validation import ValidationError

TIMESTEPS = 1000


def use_scheduler(pipe, **config):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    return make_noise_scheduler(pipe)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_model_has_no_loss(tiny_pipe, tmp_path, prediction_type):
    schedule = use_scheduler(tiny_pipe, prediction_type=prediction_type)
    batch = draw_batch(make_encoded(tiny_pipe), make_config(tmp_path), TIMESTEPS, 0)
    noisy_latents, target = add_noise(schedule, batch.latents, batch.noise, batch.timesteps)
    for i, t in enumerate(batch.timesteps):  # diffusers itself must get the latents back
        x0 = DDIMScheduler.from_config(schedule.config, clip_sample=False)
        x0.set_timesteps(TIMESTEPS)
        found = x0.step(target[i], int(t), noisy_latents[i]).pred_original_sample
        assert torch.allclose(found, batch.latents[i], atol=2e-3)


def test_other_predictions_are_refused(tiny_pipe):
    with pytest.raises(ValidationError, match="prediction_type='sample'"):
        use_scheduler(tiny_pipe, prediction_type="sample")


def test_what_was_set_later_counts(tiny_pipe):
    """As diffusers' own scripts set it."""
    tiny_pipe.scheduler.register_to_config(
        prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    schedule = make_noise_scheduler(tiny_pipe)
    assert schedule.config.prediction_type == "v_prediction"
    assert float(schedule.alphas_cumprod[-1]) == 0


def test_a_schedule_of_flow_matching_is_refused(tiny_pipe):
    tiny_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValidationError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        make_noise_scheduler(tiny_pipe)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_the_paper_s(tiny_pipe, prediction_type):
    schedule = use_scheduler(tiny_pipe, prediction_type=prediction_type)
    timesteps = torch.arange(0, TIMESTEPS, 37)
    snr = compute_snr(schedule, timesteps)
    below = snr if prediction_type == "epsilon" else snr + 1
    expected = snr.clamp(max=5) / below
    assert torch.allclose(weigh_timesteps(schedule, timesteps, snr_gamma=5.0), expected, rtol=1e-3)
    assert torch.equal(weigh_timesteps(schedule, timesteps), torch.ones(len(timesteps)))


@pytest.mark.parametrize(("prediction_type", "limit"), [("epsilon", 1), ("v_prediction", 0)])
def test_min_snr_where_there_is_no_signal(tiny_pipe, prediction_type, limit):
    schedule = use_scheduler(
        tiny_pipe, prediction_type=prediction_type, rescale_betas_zero_snr=True
    )
    assert schedule.alphas_cumprod[-1] < 1e-7
    schedule.alphas_cumprod[-1] = 0
    weights = weigh_timesteps(schedule, torch.arange(TIMESTEPS), snr_gamma=5.0)
    assert torch.isfinite(weights).all()
    assert weights[-1] == limit


def test_an_error_of_noise_is_counted_as_that_of_velocity(tiny_pipe, tmp_path):
    schedule = use_scheduler(tiny_pipe, prediction_type="epsilon")
    batch = draw_batch(make_encoded(tiny_pipe), make_config(tmp_path), TIMESTEPS, 0)
    noisy_latents, _ = add_noise(schedule, batch.latents, batch.noise, batch.timesteps)
    wrong = batch.noise + 0.1 * torch.randn(
        batch.noise.shape, generator=torch.Generator().manual_seed(0)
    )
    signal = schedule.alphas_cumprod[batch.timesteps][:, None, None, None]
    meant = (noisy_latents - (1 - signal).sqrt() * wrong) / signal.sqrt()  # latents, were it right
    velocities = [
        schedule.get_velocity(*pair, batch.timesteps)
        for pair in ((batch.latents, batch.noise), (meant, wrong))
    ]
    expected = (velocities[0] - velocities[1]).square().mean(dim=(1, 2, 3))
    weights = weigh_timesteps(schedule, batch.timesteps, velocity_weight=1e6)
    found = weights * (batch.noise - wrong).square().mean(dim=(1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-3)
    assert float(weights.max()) > 50


def test_the_weight_has_its_limit_where_there_is_no_signal_too(tiny_pipe):
    schedule = use_scheduler(tiny_pipe, rescale_betas_zero_snr=True)
    schedule.alphas_cumprod[-1] = 0
    weights = weigh_timesteps(schedule, torch.arange(TIMESTEPS), velocity_weight=5.0)
    assert float(weights.min()) >= 1 and weights[-1] == weights.max() == 5
    assert torch.equal(weights, weights.sort().values)


def test_a_model_of_velocity_is_not_weighed_twice(tiny_pipe, tmp_path):
    schedule = use_scheduler(tiny_pipe, prediction_type="v_prediction")
    check_weights(schedule, make_config(tmp_path))
    with pytest.raises(ValidationError, match="velocity_weight=5.0: the model predicts velocity"):
        check_weights(schedule, make_config(tmp_path, velocity_weight=5))


def test_a_loss_is_a_mean_over_samples(tiny_pipe, tmp_path):
    schedule = make_noise_scheduler(tiny_pipe)
    batch = draw_batch(make_encoded(tiny_pipe), make_config(tmp_path), TIMESTEPS, 0)
    with torch.no_grad():
        together = measure_losses(tiny_pipe.unet, schedule, batch, batch.prompt_embeds)
        alone = [
            measure_losses(tiny_pipe.unet, schedule, sample, sample.prompt_embeds)
            for sample in batch.split(1)
        ]
    assert together.shape == (16,)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5)


@pytest.mark.parametrize("bias", [1.0, 2.0, 3.0])
def test_noisy_timesteps_are_drawn_more_where_that_is_asked_for(tiny_pipe, tmp_path, bias):
    encoded = make_encoded(tiny_pipe)
    config = make_config(tmp_path, timestep_bias=bias)
    drawn = torch.cat(
        [draw_batch(encoded, config, TIMESTEPS, step).timesteps for step in range(80)]
    )
    assert int(drawn.min()) >= 0 and int(drawn.max()) <= 999
    for mark in (250, 500, 900):  # P(t >= mark) = (1 - mark / T)^(1 / bias), four standard errors
        expected = (1 - mark / 1000) ** (1 / bias)
        error = 4 * (expected * (1 - expected) / len(drawn)) ** 0.5
        assert float((drawn >= mark).float().mean()) == pytest.approx(expected, abs=error)


def test_noise_offset_moves_whole_channels(tiny_pipe, tmp_path):
    encoded = make_encoded(tiny_pipe)
    plain, moved = (
        draw_batch(encoded, make_config(tmp_path, noise_offset=offset), TIMESTEPS, 3)
        for offset in (0.0, 0.5)
    )
    difference = moved.noise - plain.noise
    assert float(difference.flatten(2).std(dim=2).max()) < 1e-6
    assert 0.3 < float(difference.mean(dim=(2, 3)).std()) < 0.7
    assert torch.equal(moved.latents, plain.latents)


def test_captions_are_dropped_at_their_share(tiny_pipe, tmp_path):
    encoded = make_encoded(tiny_pipe)
    config = make_config(tmp_path, caption_dropout=0.25, gradient_accumulation_steps=400)
    batch = draw_batch(encoded, config, TIMESTEPS, 0)
    is_empty = (batch.prompt_embeds == encoded.prompt_embeds[0]).flatten(1).all(dim=1)
    assert 0.2 < float(is_empty.float().mean()) < 0.3
    assert torch.equal(batch.input_ids[is_empty][0], encoded.input_ids[0])


def test_every_image_comes_once_before_any_comes_again(tmp_path):
    config = make_config(tmp_path)
    shown = [i for step in range(6) for i in choose_indices(24, config, step)]
    epochs = [shown[start : start + 24] for start in range(0, 96, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert choose_indices(24, config.replace(seed=1), 0) != choose_indices(24, config, 0)


def test_excluded_images_are_shown_no_more(tmp_path):
    shown = {
        i for step in range(6) for i in choose_indices(24, make_config(tmp_path), step, (3, 4))
    }
    assert shown == set(range(24)) - {3, 4}


def test_one_image_fills_the_batch(tmp_path):
    assert choose_indices(1, make_config(tmp_path), 5) == (0,) * 16


def test_a_sample_does_not_depend_on_who_draws_it(tiny_pipe, tmp_path):
    encoded, config = make_encoded(tiny_pipe), make_config(tmp_path, random_flip=True)
    whole = draw_batch(encoded, config, TIMESTEPS, 7)
    half = draw_batch(encoded, config, TIMESTEPS, 7, positions=range(1, 16, 2))
    for name, tensor in half.tensors.items():
        assert torch.equal(tensor, whole.tensors[name][1::2]), name
    assert half.names == whole.names[1::2]


def test_keys_draw_different_numbers():
    draws = {
        float(torch.rand((), generator=keyed_generator(*key)))
        for key in ((1, "train", 0, 0), (1, "train", 0, 1), (1, "train", 1, 0), (2, "train", 0, 0))
    }
    assert len(draws) == 4
