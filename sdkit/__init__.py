"""sdkit: finds, proves and fixes the cause of black Stable Diffusion images.

Names are resolved when first used, so that `import sdkit` costs nothing.
"""

import importlib

__version__ = "0.1.0"

EXPORTS = {
    "load_pipeline": "sdkit.loading",
    "LoadReport": "sdkit.loading",
    "generate": "sdkit.generation",
    "RunRecord": "sdkit.generation",
    "guard": "sdkit.guarding",
    "check_finite": "sdkit.validation",
    "check_image": "sdkit.validation",
    "check_image_file": "sdkit.validation",
    "validate_image_array": "sdkit.validation",
    "ValidationError": "sdkit.validation",
    "describe_environment": "sdkit.device",
    "diagnose": "sdkit.diagnosis",
    "Diagnosis": "sdkit.diagnosis",
    "run_probes": "sdkit.diagnosis",
    "measure_headroom": "sdkit.precision",
    "rebalance": "sdkit.precision",
    "amplify": "sdkit.precision",
    "plan_precision": "sdkit.precision",
    "predict_memory": "sdkit.precision",
    "explore_run": "sdkit.exploration",
    "compare_runs": "sdkit.exploration",
    "run_sweep": "sdkit.batch.sweep",
    "load_results": "sdkit.batch.results",
    "LoRAConfig": "sdkit.finetuning",
    "ImageCaptionDataset": "sdkit.finetuning",
    "prepare_fashion_products": "sdkit.finetuning.fashion",
    "train_lora": "sdkit.finetuning",
    "evaluate_lora": "sdkit.finetuning.evaluation",
}
__all__ = [*EXPORTS, "__version__"]


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module 'sdkit' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
