"""Images and captions encoded once: latents as mean and std, so that sampling stays random."""

# N images, B batch, U captions that differ, C channels, h w latent, L tokens, D width

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from sdkit.finetuning.latent_cache import (
    hash_model,
    load_tensors,
    make_key,
    open_cache,
    save_tensors,
)
from sdkit.loading.lifting import in_float32
from sdkit.validation import ValidationError, check_finite

SHARD_IMAGES = 32  # what an interrupted run loses at most
BATCH_IMAGES = 8  # always the same, for a batch's size shows in the last bits
BATCH_CAPTIONS = 32
NEEDED_COMPONENTS = {"vae", "text_encoder", "tokenizer", "unet"}
OTHER_COMPONENTS = {"text_encoder_2", "tokenizer_2", "image_encoder"}  # of SDXL and others
LATENT_NAMES, CAPTION_NAMES = ("mean", "std"), ("input_ids", "prompt_embeds")
ENCODER_PARTS = ("encoder.", "quant_conv.")


@dataclass(frozen=True)
class EncodedDataset:
    """What a training needs of its images.

    Attributes:
        names: Of the images.
        captions: Of the images.
        latent_mean: (N, C, h, w) float32, of the VAE's posterior, not scaled.
        latent_std: (N, C, h, w) float32.
        flipped_mean: The same of the mirrored images, or None.
        flipped_std: The same of the mirrored images, or None.
        caption_index: (N,) long: rows of prompt_embeds and input_ids.
        prompt_embeds: (U, L, D) float32; row 0 is that of the empty caption.
        input_ids: (U, L) long.
        fingerprint: A hash of the data and of the models that encoded it.
        scaling_factor: The VAE's.
        shift_factor: The VAE's; 0 if it has none.
        kept_rows: Rows of prompts that belong to no image, see `add_kept_prompts`.
        kept_latents: (prompts, C, h, w) float32, scaled: what the base draws of them.
    """

    names: tuple
    captions: tuple
    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    flipped_mean: torch.Tensor | None
    flipped_std: torch.Tensor | None
    caption_index: torch.Tensor
    prompt_embeds: torch.Tensor
    input_ids: torch.Tensor
    fingerprint: str
    scaling_factor: float
    shift_factor: float = 0.0
    kept_rows: tuple = ()
    kept_latents: torch.Tensor | None = None

    def __len__(self):
        """How many images there are."""
        return len(self.names)

    def sample_latents(self, indices, generator, *, flip=None) -> torch.Tensor:
        """Draws latents from the posterior, as the UNet takes them.

        Args:
            indices: (B,) long.
            generator: Of the CPU.
            flip: (B,) bool, which of them mirrored; None is none.

        Returns:
            (B, C, h, w) float32, scaled.

        Raises:
            ValidationError: One is to be mirrored, but was not encoded so.
        """
        mean, std = self.latent_mean[indices], self.latent_std[indices]
        if flip is not None and flip.any():
            if self.flipped_mean is None:
                raise ValidationError(
                    "flip: mirrored images were not encoded. Expected encode_dataset(flip=True)."
                )
            where = flip[:, None, None, None]
            mean = torch.where(where, self.flipped_mean[indices], mean)
            std = torch.where(where, self.flipped_std[indices], std)
        noise = torch.randn(mean.shape, generator=generator)
        return (mean + std * noise - self.shift_factor) * self.scaling_factor


def encode_dataset(pipe, dataset, cache_folder, *, flip=False, progress=True) -> EncodedDataset:
    """Encodes a data set, or reads what was encoded before of the same content.

    In float32 whatever the pipeline's dtype, on its device. What is written is whole or not there:
    an interrupted run goes on where it was.

    Args:
        pipe: A StableDiffusionPipeline.
        dataset: An ImageCaptionDataset.
        cache_folder: Where encoded images are kept; those of many data sets may be in one.
        flip: Whether the mirrored images are encoded too.
        progress: Whether to show a progress bar.

    Returns:
        An EncodedDataset, on the CPU.

    Raises:
        ValidationError: The pipeline or the resolution does not suit; a latent is not finite: the
            message names its image; the folder cannot be used.
    """
    check_pipeline(pipe)
    check_resolution(pipe.vae, dataset.resolution)
    folder = open_cache(cache_folder)
    with torch.no_grad(), in_float32(pipe, ("vae", "text_encoder")):
        keys = {
            "vae": hash_model(pipe.vae, ENCODER_PARTS),
            "text_encoder": hash_model(pipe.text_encoder),
        }
        latents = encode_images(pipe.vae, dataset, folder, keys["vae"], progress=progress)
        flipped = {"mean": None, "std": None}
        if flip:
            flipped = encode_images(
                pipe.vae, dataset, folder, keys["vae"], flip=True, progress=progress
            )
        captions = ("", *sorted(set(dataset.captions)))
        texts = encode_captions(pipe, captions, folder, keys["text_encoder"])
    row = {caption: index for index, caption in enumerate(captions)}
    config = pipe.vae.config
    return EncodedDataset(
        names=dataset.names,
        captions=dataset.captions,
        latent_mean=latents["mean"],
        latent_std=latents["std"],
        flipped_mean=flipped["mean"],
        flipped_std=flipped["std"],
        caption_index=torch.tensor([row[caption] for caption in dataset.captions]),
        prompt_embeds=texts["prompt_embeds"],
        input_ids=texts["input_ids"],
        fingerprint=make_key(dataset=dataset.fingerprint, flip=flip, **keys),
        scaling_factor=config.scaling_factor,
        shift_factor=getattr(config, "shift_factor", None) or 0.0,
    )


def check_pipeline(pipe):
    """Returns a pipeline whose images and captions can be encoded here.

    Raises:
        ValidationError: It is not a StableDiffusionPipeline, or has parts missing.
    """
    names = {name for name, component in pipe.components.items() if component is not None}
    if not names >= NEEDED_COMPONENTS or names & OTHER_COMPONENTS:
        raise ValidationError(
            f"{type(pipe).__name__}: cannot be trained here. Expected a StableDiffusionPipeline "
            "(SD 1.x or 2.x) with VAE, text encoder and tokenizer."
        )
    return pipe


def check_resolution(vae, resolution) -> int:
    """Returns a resolution that the VAE can halve as often as it does.

    Raises:
        ValidationError: It cannot.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise ValidationError(
            f"resolution={resolution}: the VAE divides it by {factor}. Expected a multiple, such "
            f"as {max(1, round(resolution / factor)) * factor}."
        )
    return resolution


def encode_images(vae, dataset, folder, vae_key, *, flip=False, progress=True) -> dict:
    """Encodes the images that are not in the cache.

    Args:
        vae: In float32.
        dataset: An ImageCaptionDataset.
        folder: Of the cache.
        vae_key: A hash of the VAE.
        flip: Whether they are mirrored first.
        progress: Whether to show a progress bar.

    Returns:
        {"mean", "std"}: (N, C, h, w) float32 each.

    Raises:
        ValidationError: A latent is not finite.
    """
    digests, shards = dataset.digests, []
    what = "encoding mirrored" if flip else "encoding"
    with tqdm(
        total=len(dataset), desc=f"{what} {dataset.split}", unit="image", disable=not progress,
        delay=1,
    ) as bar:  # fmt: skip
        for start in range(0, len(dataset), SHARD_IMAGES):
            indices = range(len(dataset))[start : start + SHARD_IMAGES]
            images = [digests[index] for index in indices]
            key = make_key(images=images, vae=vae_key, flip=flip, resolution=dataset.resolution)
            path = folder / f"latents-{key}.safetensors"
            shard = load_tensors(path, LATENT_NAMES, len(indices))
            if shard is None:
                shard = encode_shard(vae, dataset, indices, flip=flip)
                save_tensors(path, shard)
            shards.append(shard)
            bar.update(len(indices))
    return {name: torch.cat([shard[name] for shard in shards]) for name in LATENT_NAMES}


def encode_shard(vae, dataset, indices, *, flip=False) -> dict:
    """Encodes some images; see `encode_images`."""
    pixels = torch.from_numpy(dataset.read_pixels(indices))  # B H W 3
    pixels = pixels.flip(2) if flip else pixels
    means, stds = [], []
    for batch in pixels.split(BATCH_IMAGES):
        images = batch.permute(0, 3, 1, 2).float() / 127.5 - 1  # B 3 H W
        posterior = vae.encode(images.to(vae.device)).latent_dist
        means.append(posterior.mean.float().cpu())
        stds.append(posterior.std.float().cpu())
    shard = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
    for position, index in enumerate(indices):
        for name, values in shard.items():
            where = f"{dataset.folder}: latent {name} of {dataset.names[index]}"
            check_finite(values[position], where)
    return shard


def encode_captions(pipe, captions, folder, text_encoder_key) -> dict:
    """Encodes captions that are not in the cache.

    Args:
        pipe: With the text encoder in float32.
        captions: U of them, each once.
        folder: Of the cache.
        text_encoder_key: A hash of the text encoder.

    Returns:
        {"input_ids": (U, L) long, "prompt_embeds": (U, L, D) float32}.

    Raises:
        ValidationError: An embedding is not finite.
    """
    input_ids = pipe.tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt",
        max_length=pipe.tokenizer.model_max_length, return_attention_mask=True,
    )  # fmt: skip
    # The very tokens, so another tokenizer is another key.
    key = make_key(tokens=input_ids.input_ids.tolist(), text_encoder=text_encoder_key)
    path = folder / f"captions-{key}.safetensors"
    texts = load_tensors(path, CAPTION_NAMES, len(captions))
    if texts is None:
        embeds = [
            _encode_texts(pipe.text_encoder, ids, mask)
            for ids, mask in zip(
                input_ids.input_ids.split(BATCH_CAPTIONS),
                input_ids.attention_mask.split(BATCH_CAPTIONS),
                strict=True,
            )
        ]
        texts = {"input_ids": input_ids.input_ids, "prompt_embeds": torch.cat(embeds)}
        for caption, embed in zip(captions, texts["prompt_embeds"], strict=True):
            check_finite(embed, f"prompt_embeds of the caption {caption!r}")
        save_tensors(path, texts)
    return texts


def _encode_texts(text_encoder, input_ids, attention_mask):
    is_masked = getattr(text_encoder.config, "use_attention_mask", False)  # as diffusers asks it
    mask = attention_mask.to(text_encoder.device) if is_masked else None
    embeds = text_encoder(input_ids.to(text_encoder.device), attention_mask=mask)[0]
    return embeds.float().cpu()
