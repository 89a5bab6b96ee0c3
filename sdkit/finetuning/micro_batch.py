"""How many images go through at a time: the most that the memory of this machine allows.

The step itself is run on tensors without values (`sdkit.memory`), with these adapters, at this
size; nothing is fitted. The effective batch and its gradients stay as they are, but for rounding.
"""

# B batch, C channels, h w latent, L tokens, D width

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sdkit.device import GIB
from sdkit.finetuning.batches import Batch
from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.objective import make_noise_scheduler, measure_losses
from sdkit.loading.dtype_policy import MARGIN
from sdkit.memory import LiveBytes
from sdkit.memory.architectures import copy_onto_meta
from sdkit.memory.live_bytes import sdpa_as_on

ADAM_STATES = 2  # values that AdamW keeps for each trained weight


@dataclass(frozen=True)
class MicroBatch:
    """How a step is cut.

    Attributes:
        size: Images at a time.
        gradient_checkpointing: Whether blocks are computed again in the backward pass.
        needed_gib: What a step is predicted to take besides the weights; None if it was not asked.
        available_gib: What is free for it; None likewise.
        reason: Why, with the numbers.
    """

    size: int
    gradient_checkpointing: bool
    needed_gib: float | None
    available_gib: float | None
    reason: str

    def __str__(self):
        """One line."""
        checkpointing = "with" if self.gradient_checkpointing else "without"
        return f"{self.size} at a time, {checkpointing} gradient checkpointing ({self.reason})"


def choose_micro_batch(
    pipe, config: LoRAConfig, *, shapes, available_gib, device_type="cpu", processes=1
) -> MicroBatch:
    """Chooses how many images go through at a time, and whether blocks are computed twice.

    Computing twice costs a third to a half more time and is the last resort: it is considered only
    where not even the report's micro-batch fits without it.

    Args:
        pipe: The pipeline with its adapter; real, or of the meta device.
        config: Of the training.
        shapes: {"latents": (C, h, w), "prompt_embeds": (L, D)} of one sample.
        available_gib: Memory that is free, the weights being loaded already.
        device_type: As which device attention allocates: "mps", "cuda" or "cpu".
        processes: Among how many the effective batch is shared out.

    Returns:
        A MicroBatch.
    """
    share = -(-config.effective_batch // processes)
    if config.micro_batch != "auto":
        is_given = config.micro_batch == "given"
        size = config.train_batch_size if is_given else config.micro_batch
        reason = "as train_batch_size says" if is_given else "asked for"
        return MicroBatch(min(size, share), config.gradient_checkpointing, None, None, reason)
    needs = {}
    for size, checkpointing in list_candidates(config, share):
        # Half a batch takes at least half: what cannot fit by that is not looked at.
        whole_gib = needs.get((share, checkpointing), 0.0)
        if whole_gib * size / share * MARGIN > available_gib:
            continue
        needs[size, checkpointing] = predict_step_gib(
            pipe, config, size, checkpointing, shapes=shapes, device_type=device_type
        )
        if needs[size, checkpointing] * MARGIN <= available_gib:
            break
    (size, checkpointing), needed_gib = list(needs.items())[-1]
    reason = f"{needed_gib:.2f} GiB predicted, {available_gib:.2f} GiB free"
    if needed_gib * MARGIN > available_gib:
        size, checkpointing = 1, config.gradient_checkpointing
        needed_gib = predict_step_gib(
            pipe, config, size, checkpointing, shapes=shapes, device_type=device_type
        )
        reason = (
            f"{needed_gib:.2f} GiB predicted, {available_gib:.2f} GiB free: the least there is "
            "does not fit; expect swapping or a stop"
        )
    elif (share, False) in needs and (size, checkpointing) != (share, False):
        reason += f"; {share} at a time would take {needs[share, False]:.2f} GiB"
    return MicroBatch(size, checkpointing, needed_gib, available_gib, reason)


def list_candidates(config: LoRAConfig, share) -> list:
    """Returns [(images at a time, whether with checkpointing)], the fastest first."""
    sizes = [share]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    least = min(config.train_batch_size, share)
    candidates = [(size, False) for size in sizes if size >= least]
    if not config.gradient_checkpointing:
        return [(size, False) for size in sizes]
    return candidates + [(size, True) for size in sizes]


def predict_step_gib(pipe, config, size, checkpointing, *, shapes, device_type) -> float:
    """Returns what a forward and backward pass take besides the weights, and the optimiser."""
    unet, encoder = copy_onto_meta(pipe.unet), copy_onto_meta(pipe.text_encoder)
    set_training_mode(unet, encoder, config, checkpointing)
    parameters = [p for module in (unet, encoder) for p in module.parameters() if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in parameters)
    noise_scheduler = deepcopy(make_noise_scheduler(pipe))  # it moves its tables to the meta device
    batch = _make_batch(size, shapes)
    # An emulation of numbers around this has no say in what is counted.
    with _disable_current_modes(), sdpa_as_on(device_type), LiveBytes(unet, encoder) as live:
        prompt_embeds = encode_prompts(encoder, batch, config)
        measure_losses(unet, noise_scheduler, batch, prompt_embeds).mean().backward()
    return (live.peak_bytes + (1 + ADAM_STATES) * trained_bytes) / GIB


def encode_prompts(text_encoder, batch, config: LoRAConfig):
    """Returns (B, L, D): what was encoded once, or, if the text encoder is trained, now."""
    if config.trains_text_encoder:
        return text_encoder(batch.input_ids)[0]
    return batch.prompt_embeds


def set_training_mode(unet, text_encoder, config: LoRAConfig, checkpointing):
    """Puts what is trained into training mode, with or without gradient checkpointing."""
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    if config.trains_text_encoder:
        text_encoder.train()
        # transformers 5 renamed the methods and warns of the old ones, which 4 has alone.
        is_new = hasattr(text_encoder, "activation_checkpointing_enable")
        kind, verb = (
            "activation" if is_new else "gradient",
            "enable" if checkpointing else "disable",
        )
        getattr(text_encoder, f"{kind}_checkpointing_{verb}")()


def _make_batch(size, shapes):
    latents = torch.empty(size, *shapes["latents"], device="meta")
    length, width = shapes["prompt_embeds"]
    return Batch(
        names=("",) * size,
        positions=tuple(range(size)),
        latents=latents,
        noise=torch.empty_like(latents),
        timesteps=torch.empty(size, dtype=torch.long, device="meta"),
        prompt_embeds=torch.empty(size, length, width, device="meta"),
        input_ids=torch.empty(size, length, dtype=torch.long, device="meta"),
    )
