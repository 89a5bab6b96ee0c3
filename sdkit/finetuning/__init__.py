"""LoRA training that resumes exactly and saves no NaN; names are resolved when first used."""

import importlib

EXPORTS = {
    "ImageCaptionDataset": "sdkit.finetuning.dataset",
    "EncodedDataset": "sdkit.finetuning.encoding",
    "encode_dataset": "sdkit.finetuning.encoding",
    "LoRAConfig": "sdkit.finetuning.config",
    "TrainedStep": "sdkit.finetuning.training",
    "TrainReport": "sdkit.finetuning.report",
    "train_lora": "sdkit.finetuning.training",
    "load_adapter": "sdkit.finetuning.adapter_file",
}
__all__ = list(EXPORTS)


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module 'sdkit.finetuning' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)
