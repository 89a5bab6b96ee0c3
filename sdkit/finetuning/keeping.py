"""What shall be drawn as before: on some samples the base, not the noise, is the teacher.

Pictures of white studios alone teach an adapter to whiten whatever is asked for. A prompt of
another kind beside each few of them, and the base's own answer to it, tells the two apart. The
latents are still those of the training pictures: what looks like them (grey beside white) drifts.
"""

# B batch, K kept samples, C channels, h w latent, U captions, L tokens, D width

from contextlib import contextmanager
from dataclasses import replace

import torch

from sdkit.validation import check_finite


@torch.no_grad()
def add_kept_prompts(pipe, encoded, prompts):
    """Returns an EncodedDataset with prompts that belong to no image in rows of their own.

    Args:
        pipe: Before it has an adapter.
        encoded: The EncodedDataset of the images.
        prompts: What shall be drawn as before; an empty text is the unconditional prompt.
    """
    input_ids = pipe.tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt",
        max_length=encoded.input_ids.shape[1],
    ).input_ids  # fmt: skip
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
    )


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
        base draws pictures first; here it is asked at each step, so none is needed.
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
    """Inside, a UNet computes as its base does."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
