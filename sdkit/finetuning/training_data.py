"""The images of a training, read, checked and encoded once for all processes and all runs."""

from dataclasses import replace
from pathlib import Path

import torch

from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.dataset import ImageCaptionDataset
from sdkit.finetuning.encoding import EncodedDataset, encode_dataset
from sdkit.finetuning.keeping import add_kept_prompts
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError, check_finite


def open_data(data, pipe, config: LoRAConfig, accelerator, progress):
    """Makes the images of a training ready: loaded if need be, looked through, kept prompts added.

    Args:
        data: (train, validation or None), EncodedDatasets; None loads those of the settings.
        pipe: The pipeline, before it has an adapter.
        config: Of the training.
        accelerator: Of the training.
        progress: Whether to show progress bars.

    Returns:
        (train, validation or None, what to say about them).

    Raises:
        ValidationError: They cannot be trained on so.
    """
    found = []
    if data is None:
        *data, found = load_data(pipe, config, accelerator, progress)
    train, (validation, left_out) = data[0], leave_out_bad(data[1])
    if config.early_stopping_patience and validation is None:
        raise ValidationError(
            f"early_stopping_patience={config.early_stopping_patience}: there is nothing to hold "
            f"out{': ' if left_out else ''}{'; '.join(left_out)}. Expected held-out images whose "
            "loss tells when to stop; leave it out, or give some."
        )
    if config.kept_prompts:
        train = add_kept_prompts(pipe, train, config, progress=progress)
    _check_shared(train, config)
    return train, validation, [*found, *left_out, *_check_size(train, config, accelerator)]


def load_data(pipe, config: LoRAConfig, accelerator, progress):
    """Reads, checks and encodes the images, once for all processes and all runs.

    What was found in each file is written into the run's folder, as `dataset_train.json` and
    `dataset_validation.json`.

    Returns:
        (train, validation or None, what was found in the files).
    """
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    options = {
        "resolution": config.resolution or pipe.unet.config.sample_size * factor,
        "strict": config.strict,
        "tokenizer": pipe.tokenizer,
        "progress": progress and accelerator.is_main_process,
    }
    cache_folder = config.cache_folder or Path(config.output_folder).parent / "encoded"
    datasets, encoded = {}, {}
    for split in ("train", "validation") if config.validation_steps else ("train",):
        dataset = datasets[split] = ImageCaptionDataset(config.dataset, split=split, **options)
        if accelerator.is_main_process:
            with replace_file(Path(config.output_folder) / f"dataset_{split}.json") as temporary:
                temporary.write_text(dataset.report.to_json() + "\n", encoding="utf-8")
        encode = lambda dataset=dataset: encode_dataset(  # noqa: E731
            pipe, dataset, cache_folder, flip=config.random_flip, progress=options["progress"]
        )
        if accelerator.num_processes > 1:
            # One process fills the cache; then one of each machine, whose disk may be its own.
            for is_turn in (accelerator.is_main_process, accelerator.is_local_main_process):
                if is_turn:
                    encode()
                accelerator.wait_for_everyone()
        encoded[split] = encode()
    found = [dataset.report.summary() for dataset in datasets.values()]
    return encoded["train"], encoded.get("validation"), [*found, *_find_shared(datasets)]


def _find_shared(datasets) -> list:
    """What to say of pictures that are trained on and held out: their loss shows no learning."""
    known = set(datasets["train"].digests)
    held_out = datasets.get("validation")
    pairs = zip(held_out.names, held_out.digests, strict=True) if held_out else ()
    shared = [name for name, digest in pairs if digest in known]
    if not shared:
        return []
    return [f"{len(shared)} held-out images are also trained on, such as {shared[0]}"]


def leave_out_bad(encoded: EncodedDataset | None):
    """Leaves held-out images out whose own numbers are not finite: each would spoil every loss.

    Returns:
        (the rest, or None; what to say about it).
    """
    if encoded is None:
        return None, []
    latents = torch.stack([encoded.latent_mean, encoded.latent_std], dim=1).flatten(1)
    embeds = encoded.prompt_embeds.flatten(1).isfinite().all(dim=1)[encoded.caption_index]
    is_good = latents.isfinite().all(dim=1) & embeds
    if is_good.all():
        return encoded, []
    kept = is_good.nonzero().flatten().tolist()
    bad = [name for name, good in zip(encoded.names, is_good.tolist(), strict=True) if not good]
    notice = f"held out no more, for their numbers are NaN or Inf: {', '.join(bad)}"
    if not kept:
        return None, [notice]
    flipped = {
        name: None if getattr(encoded, name) is None else getattr(encoded, name)[kept]
        for name in ("flipped_mean", "flipped_std")
    }
    rest = replace(
        encoded, names=tuple(encoded.names[i] for i in kept),
        captions=tuple(encoded.captions[i] for i in kept),
        latent_mean=encoded.latent_mean[kept], latent_std=encoded.latent_std[kept],
        caption_index=encoded.caption_index[kept], **flipped,
    )  # fmt: skip
    return rest, [notice]


def _check_shared(train, config):
    """Raises if what belongs to no image is not finite: it would be laid at the door of each."""
    if config.caption_dropout:
        check_finite(train.prompt_embeds[0], "prompt_embeds of the empty caption")
    if train.kept_rows:
        check_finite(train.prompt_embeds[list(train.kept_rows)], "prompt_embeds of kept_prompts")
        check_finite(train.kept_latents, "latents of kept_prompts")


def _check_size(train, config, accelerator):
    """Returns what to say about the number of images."""
    if accelerator.num_processes > config.effective_batch:
        raise ValidationError(
            f"{accelerator.num_processes} processes for an effective batch of "
            f"{config.effective_batch}: expected at least one image for each. Use fewer, or more "
            "gradient_accumulation_steps."
        )
    count = len(train.names)
    if count == 0:
        raise ValidationError(
            f"{config.dataset}: no image to train on. Expected at least one; see the dataset's "
            "report for those that were left out."
        )
    if count >= config.effective_batch:
        return []
    images = "1 image is" if count == 1 else f"{count} images are"
    return [f"{images} fewer than the {config.effective_batch} of a step: each comes several times"]
