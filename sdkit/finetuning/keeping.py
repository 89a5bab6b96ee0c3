"""What shall be drawn as before: on some samples the base, not the noise, is the teacher.

Pictures of white studios alone teach an adapter to whiten whatever is asked for. A prompt of
another kind beside each few of them, on a picture that the base draws of it, and the base's own
answer to that as the target, tell the two apart, where the base's text encoder does: so captions
should say what is new in words that the base does not take for something it knows.
"""

# B batch, K kept samples, C channels, h w latent, U captions, L tokens, D width

from contextlib import contextmanager
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from sdkit.finetuning.keyed_random import keyed_generator
from sdkit.generation.quiet import without_progress_bar
from sdkit.validation import ValidationError, check_finite


@torch.no_grad()
def add_kept_prompts(pipe, encoded, config, *, progress=True):
    """Returns an EncodedDataset with prompts that belong to no image, and what the base draws.

    One that has them already is returned as it is.

    Args:
        pipe: Before it has an adapter.
        encoded: The EncodedDataset of the images.
        config: Of the training: its kept prompts, seed, and steps and guidance of pictures.
        progress: Whether to show a progress bar.

    Raises:
        ValidationError: It has others.
    """
    prompts = config.kept_prompts
    input_ids = pipe.tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt",
        max_length=encoded.input_ids.shape[1],
    ).input_ids  # fmt: skip
    if encoded.kept_rows:
        if not torch.equal(encoded.input_ids[list(encoded.kept_rows)], input_ids):
            raise ValidationError(
                f"kept_prompts: the data has {len(encoded.kept_rows)} kept prompts, and not those "
                "of the configuration. Expected the same; pass data without any."
            )
        return encoded
    prompt_embeds = torch.cat(
        [pipe.text_encoder(row[None].to(pipe.text_encoder.device))[0] for row in input_ids]
    )
    prompt_embeds = check_finite(prompt_embeds.float().cpu(), "prompt_embeds of kept_prompts")
    first = len(encoded.input_ids)
    return replace(
        encoded,
        input_ids=torch.cat([encoded.input_ids, input_ids]),
        prompt_embeds=torch.cat([encoded.prompt_embeds, prompt_embeds]),
        kept_rows=tuple(range(first, first + len(input_ids))),
        kept_latents=draw_kept(
            pipe, config, tuple(encoded.latent_mean.shape[1:]), progress=progress
        ),
    )


@torch.no_grad()
def draw_kept(pipe, config, shape, *, progress=True) -> torch.Tensor:
    """Returns latents that the base draws of kept prompts: (prompts, C, h, w), scaled."""
    prompts, drawn = config.kept_prompts, []
    with without_progress_bar(pipe):
        for i, prompt in enumerate(
            tqdm(prompts, "kept prompts", unit="prompt", disable=not progress)
        ):
            # A prompt that comes twice is drawn twice, otherwise.
            key = keyed_generator(config.seed, "kept", prompt, prompts[:i].count(prompt))
            drawn.append(
                pipe(
                    prompt, latents=torch.randn(1, *shape, generator=key).to(pipe.device),
                    num_inference_steps=config.validation_inference_steps,
                    guidance_scale=config.validation_guidance_scale, output_type="latent",
                ).images.float().cpu()
            )  # fmt: skip
    return check_finite(torch.cat(drawn), "latents of kept_prompts")


@torch.no_grad()
def keep_base(unet, batch, noisy_latents, target):
    """Returns the targets (B, C, h, w), those of kept samples replaced by the base's prediction.

    Args:
        unet: The UNet, with its adapter.
        batch: With `timesteps` (B,), `prompt_embeds` (B, L, D) of the frozen text encoder, and
            `is_kept` (B,), or None.
        noisy_latents: (B, C, h, w).
        target: (B, C, h, w).

    References:
        Ruiz et al. 2023, DreamBooth, arXiv 2208.12242, section 3.3: prior preservation. There the
        noise is the target; here it is the base's prediction, which is less noisy.
    """
    kept = batch.is_kept
    if kept is None or not kept.any():
        return target
    with without_adapter(unet):
        base_pred = unet(
            noisy_latents[kept].to(unet.dtype), batch.timesteps[kept],
            batch.prompt_embeds[kept].to(unet.dtype), return_dict=False,
        )[0]  # (K, C, h, w)  # fmt: skip
    target = target.clone()
    target[kept] = base_pred.to(target.dtype)
    return target


@contextmanager
def without_adapter(unet):
    """Inside, a UNet computes as its base does; one without an adapter does anyway."""
    if not getattr(unet, "peft_config", None):
        yield
        return
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
