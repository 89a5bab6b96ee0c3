"""AdamW, and the learning rate of each step as a function of the step alone."""

import importlib.util
import math

import torch

from sdkit.finetuning.config import LoRAConfig
from sdkit.validation import ValidationError


def make_optimizer(parameters, config: LoRAConfig, device_type):
    """Returns AdamW over some parameters, in 8 bits if that is asked for and can be had.

    Args:
        parameters: What is trained.
        config: Of the training.
        device_type: "mps", "cuda" or "cpu".

    Raises:
        ValidationError: 8-bit Adam where there is none.
    """
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **options)
    check_8bit_adam(device_type)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def check_8bit_adam(device_type):
    """Raises if bitsandbytes cannot keep the optimiser's states in 8 bits here.

    Raises:
        ValidationError: The device is not CUDA, or the package is not there.
    """
    reasons = {
        "mps": "bitsandbytes has no 8-bit optimiser for MPS",
        "cpu": "bitsandbytes' 8-bit optimisers run on CUDA alone",
    }
    if device_type in reasons:
        raise ValidationError(
            f"use_8bit_adam on {device_type}: {reasons[device_type]}. Expected false there; the "
            "states of an adapter take a few MiB."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValidationError(
            "use_8bit_adam: bitsandbytes is not installed. Install it, or use AdamW as it is."
        )


def learning_rate_at(step, config: LoRAConfig, scale=1.0) -> float:
    """Returns the learning rate of a step.

    Args:
        step: From 0.
        config: Its peak, schedule and warm-up.
        scale: What roll-backs have left of it.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return scale * config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.max_train_steps - warmup)  # in [0, 1)
    share = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[config.lr_scheduler]
    return scale * config.learning_rate * share
