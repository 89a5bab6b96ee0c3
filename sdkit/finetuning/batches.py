"""What a step is made of: which images, and every draw that belongs to them.

All of it depends on (seed, step, position in the effective batch) alone: on no earlier step, on no
micro-batch, on no number of processes. That is what makes a run resume exactly.
"""

# B batch, C channels, h w latent, L tokens, D width, N images

from dataclasses import dataclass

import torch

from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.keyed_random import keyed_generator


@dataclass(frozen=True)
class Batch:
    """Samples of one step, or a part of them.

    Attributes:
        names: Of the images, one a sample.
        positions: Their places in the effective batch.
        latents: (B, C, h, w), float32, scaled.
        noise: (B, C, h, w), float32.
        timesteps: (B,), long.
        prompt_embeds: (B, L, D), float32: of the frozen text encoder.
        input_ids: (B, L), long: for one that is trained.
        is_kept: (B,), bool: what the base predicts is asked for; None where nothing is kept.
    """

    names: tuple
    positions: tuple
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    input_ids: torch.Tensor
    is_kept: torch.Tensor | None = None

    def __len__(self):
        """Samples in it."""
        return len(self.names)

    @property
    def tensors(self) -> dict:
        """{name: tensor} of what is fed to the model."""
        tensors = {
            "latents": self.latents, "noise": self.noise, "timesteps": self.timesteps,
            "prompt_embeds": self.prompt_embeds, "input_ids": self.input_ids,
            "is_kept": self.is_kept,
        }  # fmt: skip
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def take(self, start: int, count: int) -> "Batch":
        """Samples `start` to `start + count`."""
        part = slice(start, start + count)
        tensors = {name: tensor[part] for name, tensor in self.tensors.items()}
        return Batch(self.names[part], self.positions[part], **tensors)

    def split(self, micro_batch: int) -> list:
        """The batch in parts of at most `micro_batch` samples."""
        return [self.take(start, micro_batch) for start in range(0, len(self), micro_batch)]

    def to(self, device) -> "Batch":
        """The batch on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Batch(self.names, self.positions, **tensors)


def choose_indices(image_count, config: LoRAConfig, step, excluded=()) -> tuple:
    """Returns which images a step shows: every image once, in a new order, before any comes again.

    Args:
        image_count: N.
        config: Its seed and effective batch.
        step: From 0.
        excluded: Indices that are shown no more; the next one takes the place of each.

    Returns:
        One index for each position of the effective batch.
    """
    indices = []
    for position in range(config.effective_batch):
        epoch, place = divmod(step * config.effective_batch + position, image_count)
        index = int(_shuffle(image_count, config.seed, epoch)[place])
        while index in excluded:
            index = (index + 1) % image_count
        indices.append(index)
    return tuple(indices)


def _shuffle(image_count, seed, epoch):
    return torch.randperm(image_count, generator=keyed_generator(seed, "order", epoch))


def draw_batch(
    encoded, config: LoRAConfig, timestep_count, step, *, positions=None, excluded=()
) -> Batch:
    """Draws the samples of a step.

    Args:
        encoded: An EncodedDataset.
        config: Its seed, effective batch, noise offset, timestep bias, caption dropout and flip.
        timestep_count: Of the noise schedule.
        step: From 0.
        positions: Of the effective batch; None is all of them.
        excluded: See `choose_indices`.

    Returns:
        A Batch on the CPU.
    """
    positions = range(config.effective_batch) if positions is None else positions
    indices = choose_indices(len(encoded.names), config, step, excluded)
    samples = [
        draw_sample(
            encoded, indices[p], keyed_generator(config.seed, "train", step, p), timestep_count,
            noise_offset=config.noise_offset, caption_dropout=config.caption_dropout,
            random_flip=config.random_flip, kept_share=config.kept_share,
            timestep_bias=config.timestep_bias,
        )
        for p in positions
    ]  # fmt: skip
    return gather_samples(encoded, [indices[p] for p in positions], positions, samples)


def draw_sample(
    encoded, index, generator, timestep_count, *, noise_offset=0.0, caption_dropout=0.0,
    random_flip=False, kept_share=0.0, timestep_bias=1.0,
):  # fmt: skip
    """Draws everything that belongs to one sample, always in the same order.

    Returns:
        (latents (1, C, h, w), noise (1, C, h, w), timestep, row of the caption).
    """
    is_flipped = random_flip & bool(torch.rand((), generator=generator) < 0.5)
    is_dropped = bool(torch.rand((), generator=generator) < caption_dropout)
    calm = float(torch.rand((), generator=generator, dtype=torch.float64)) ** timestep_bias
    timestep = timestep_count - 1 - int(timestep_count * calm)
    flip = torch.tensor([True]) if is_flipped else None
    latents = encoded.sample_latents(torch.tensor([index]), generator, flip=flip)
    noise = torch.randn(latents.shape, generator=generator)
    noise = noise + noise_offset * torch.randn((*latents.shape[:2], 1, 1), generator=generator)
    caption = 0 if is_dropped else int(encoded.caption_index[index])  # row 0: the empty caption
    if encoded.kept_rows and float(torch.rand((), generator=generator)) < kept_share:
        which = int(torch.randint(len(encoded.kept_rows), (), generator=generator))
        caption = encoded.kept_rows[which]
        latents = encoded.kept_latents[which][None]
    return latents, noise, timestep, caption


def gather_samples(encoded, indices, positions, samples) -> Batch:
    """Returns a Batch of what `draw_sample` returned for each index."""
    latents, noise, timesteps, captions = zip(*samples, strict=True)
    rows = torch.tensor(captions)
    return Batch(
        names=tuple(encoded.names[index] for index in indices),
        positions=tuple(positions),
        latents=torch.cat(latents),
        noise=torch.cat(noise),
        timesteps=torch.tensor(timesteps),
        prompt_embeds=encoded.prompt_embeds[rows],
        input_ids=encoded.input_ids[rows],
        is_kept=torch.isin(rows, torch.tensor(encoded.kept_rows)) if encoded.kept_rows else None,
    )
