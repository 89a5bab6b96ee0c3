"""The images of a training, read, checked and encoded once for all processes and all runs."""

from pathlib import Path

from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.dataset import ImageCaptionDataset
from sdkit.finetuning.encoding import encode_dataset


def load_data(pipe, config: LoRAConfig, accelerator, progress):
    """Reads, checks and encodes the images, once for all processes and all runs.

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
    encoded, found = {}, []
    for split in ("train", "validation") if config.validation_steps else ("train",):
        dataset = ImageCaptionDataset(config.dataset, split=split, **options)
        found.append(dataset.report.summary())
        encode = lambda dataset=dataset: encode_dataset(  # noqa: E731
            pipe, dataset, cache_folder, flip=config.random_flip, progress=options["progress"]
        )
        # One process fills the cache; then one of each machine, which may have a disk of its own.
        for is_turn in (accelerator.is_main_process, accelerator.is_local_main_process):
            if is_turn:
                encode()
            accelerator.wait_for_everyone()
        encoded[split] = encode()
    return encoded["train"], encoded.get("validation"), found
