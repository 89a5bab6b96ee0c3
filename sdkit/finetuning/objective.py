"""The objective: noise is added to latents, and the UNet is asked for what was added.

Everything here is a function of tensors. `NoiseSchedule` is diffusers' own DDPM scheduler.
"""

# B batch, C channels, h w latent, L tokens, D width

import torch
from diffusers import DDPMScheduler

from sdkit.finetuning.keeping import keep_base
from sdkit.validation import ValidationError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def make_noise_scheduler(pipe) -> DDPMScheduler:
    """Returns the schedule that the pipeline's model was trained with, whatever it samples with.

    Raises:
        ValidationError: The model predicts neither noise (epsilon) nor velocity (v_prediction), or
            its scheduler has no such schedule, as that of flow matching.
    """
    if not {"beta_start", "beta_end", "beta_schedule"} <= pipe.scheduler.config.keys():
        raise ValidationError(
            f"scheduler: {type(pipe.scheduler).__name__} has no betas. Expected one of the DDPM "
            "family (DDIM, PNDM, Euler, ...), as Stable Diffusion 1.x and 2.x come with."
        )
    # Symptom: prediction_type="v_prediction", set by a scheduler's register_to_config, is epsilon
    # again. Versions: diffusers 0.42.1, whose from_config of another class leaves out what the
    # first was made without, though it was set since. Source: extract_init_dict in its
    # configuration_utils.py. Guarded by test_what_was_set_later_counts in test_objective.py.
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "_use_default_values"}
    noise_scheduler = DDPMScheduler.from_config(config)
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ValidationError(
            f"scheduler: prediction_type={prediction_type!r}. Expected one of "
            f"{', '.join(PREDICTION_TYPES)}."
        )
    return noise_scheduler


def add_noise(noise_scheduler, latents, noise, timesteps):
    """Returns noisy latents and what the model shall predict from them.

    Args:
        noise_scheduler: From `make_noise_scheduler`.
        latents: (B, C, h, w), scaled.
        noise: (B, C, h, w).
        timesteps: (B,), long.

    Returns:
        The noisy latents and the target, both (B, C, h, w).
    """
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "epsilon":
        return noisy_latents, noise
    return noisy_latents, noise_scheduler.get_velocity(latents, noise, timesteps)


def check_weights(noise_scheduler, config):
    """Refuses a weighting that a model of this prediction type cannot have.

    Raises:
        ValidationError: `velocity_weight` where velocity is what the model predicts.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if config.velocity_weight > 1 and prediction_type == "v_prediction":
        raise ValidationError(
            f"velocity_weight={config.velocity_weight}: the model predicts velocity, so its loss "
            "is weighed like that already. Expected 1."
        )


def weigh_timesteps(noise_scheduler, timesteps, *, snr_gamma=None, velocity_weight=1.0):
    """Returns the weight of each sample's loss: 1, Min-SNR's, or that of the error of velocity.

    Where the signal is zero (a schedule of zero terminal SNR) the weight is the limit, so it is
    finite everywhere: Min-SNR's is 1 for epsilon and 0 for v_prediction.

    Args:
        noise_scheduler: From `make_noise_scheduler`.
        timesteps: (B,), long.
        snr_gamma: Gamma of Min-SNR, or None.
        velocity_weight: The most that a weight may be where an error of epsilon is counted as the
            error of velocity that it makes, which is 1 / alphas_cumprod larger; 1 leaves it.

    Returns:
        (B,), float32.

    References:
        Hang et al. 2023, arXiv 2303.09556: min(SNR, gamma) on the loss of x0, which is SNR times
        smaller than that of epsilon and (SNR + 1) times smaller than that of v.
        Salimans and Ho 2022, arXiv 2202.00512, section 4: SNR + 1 on the loss of x0.
    """
    signal = noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    if snr_gamma is None:
        return (1 / signal).clamp(max=velocity_weight)
    # SNR = signal / (1 - signal), multiplied through so that nothing is divided by zero.
    noise = 1 - signal
    clipped = torch.minimum(signal, snr_gamma * noise)  # min(SNR, gamma) * noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        return clipped  # / (SNR + 1), and noise * (SNR + 1) is 1
    return torch.where(signal > 0, clipped / signal, torch.ones_like(signal))


def measure_losses(unet, noise_scheduler, batch, prompt_embeds):
    """Returns the loss of each sample, unweighted.

    A mean over a batch of any size is a mean of these: that is why a micro-batch changes nothing.

    Args:
        unet: The UNet, with its adapter.
        noise_scheduler: From `make_noise_scheduler`.
        batch: With `latents`, `noise` (B, C, h, w) and `timesteps` (B,); what the base predicts is
            the target of those that `is_kept` (B,) marks.
        prompt_embeds: (B, L, D).

    Returns:
        (B,), float32.
    """
    noisy_latents, target = add_noise(noise_scheduler, batch.latents, batch.noise, batch.timesteps)
    target = keep_base(unet, batch, noisy_latents, target)
    noise_pred = unet(
        noisy_latents.to(unet.dtype), batch.timesteps, prompt_embeds.to(unet.dtype),
        return_dict=False,
    )[0]  # (B, C, h, w)  # fmt: skip
    return (noise_pred.float() - target.float()).square().mean(dim=(1, 2, 3))
