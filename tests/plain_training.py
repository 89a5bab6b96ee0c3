"""A plain LoRA training, written as diffusers' `train_text_to_image_lora.py` goes: the baseline.

Every step reads its images, tokenizes their captions and encodes both; blocks are computed again in
the backward pass. Only what is drawn at random is given, so that it meets the trainer's own draws.
"""

import time
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import DDPMScheduler

from sdkit.finetuning.adapter import add_adapter
from sdkit.finetuning.batches import choose_indices, draw_batch
from sdkit.finetuning.encoding import EncodedDataset
from sdkit.finetuning.optimizer import learning_rate_at


class PlainTraining:
    """The baseline: `step(n)` takes one step of the optimiser and returns its loss.

    Attributes:
        encode_seconds: Spent so far in reading, tokenizing and encoding.
    """

    def __init__(self, pipe, examples, config, *, clock=time.perf_counter):
        """Gives the pipeline an adapter.

        Args:
            pipe: With `vae`, `text_encoder`, `unet`, `tokenizer` and `scheduler`.
            examples: A dataset whose items have `image` (3, H, W) in [-1, 1] and `caption`.
            config: A LoRAConfig; `micro_batch` is not looked at: this is the report's setting.
            clock: Of `encode_seconds`.
        """
        self.pipe, self.examples, self.config, self.clock = pipe, examples, config, clock
        self.parameters = list(add_adapter(pipe, config).values())
        pipe.unet.train()
        if config.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay, eps=config.adam_epsilon,
        )  # fmt: skip
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.encode_seconds = 0.0

    def step(self, number) -> float:
        """Takes a step; returns the mean loss of its images."""
        config, total = self.config, 0.0
        draws = self._draw(number)
        indices = choose_indices(len(self.examples), config, number)
        for start in range(0, config.effective_batch, config.train_batch_size):
            part = slice(start, start + config.train_batch_size)
            begun = self.clock()
            latents, prompt_embeds = self._encode(indices[part], draws.latents[part])
            self.encode_seconds += self.clock() - begun
            noise, timesteps = draws.noise[part], draws.timesteps[part]
            noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
            noise_pred = self.pipe.unet(noisy_latents, timesteps, prompt_embeds).sample
            loss = F.mse_loss(noise_pred.float(), noise.float(), reduction="mean")
            (loss / config.gradient_accumulation_steps).backward()
            total += loss.item() / config.gradient_accumulation_steps
        torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(number, config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _encode(self, indices, posterior_noise):
        chosen = [self.examples[index] for index in indices]
        pixel_values = torch.stack([example.image for example in chosen])
        input_ids = self.pipe.tokenizer(
            [example.caption for example in chosen], padding="max_length", truncation=True,
            max_length=self.pipe.tokenizer.model_max_length, return_tensors="pt",
        ).input_ids  # fmt: skip
        posterior = self.pipe.vae.encode(pixel_values).latent_dist
        latents = posterior.mean + posterior.std * posterior_noise
        prompt_embeds = self.pipe.text_encoder(input_ids, return_dict=False)[0]
        return latents * self.pipe.vae.config.scaling_factor, prompt_embeds

    def _draw(self, number):
        """The trainer's Batch of this step; its `latents` are the noise of the posterior."""
        count, unet = len(self.examples), self.pipe.unet.config
        image = torch.zeros(1, unet.in_channels, unet.sample_size, unet.sample_size)
        blank = EncodedDataset(
            names=range(count), captions=(), latent_mean=image.expand(count, -1, -1, -1),
            latent_std=torch.ones_like(image).expand(count, -1, -1, -1), flipped_mean=None,
            flipped_std=None, caption_index=torch.zeros(count, dtype=torch.long),
            prompt_embeds=torch.zeros(1, 1, 1), input_ids=torch.zeros(1, 1, dtype=torch.long),
            fingerprint="", scaling_factor=1.0,
        )  # fmt: skip
        plain = replace(self.config, random_flip=False, caption_dropout=0.0)
        return draw_batch(blank, plain, self.noise_scheduler.config.num_train_timesteps, number)
