"""One training step, looked at: what goes into the UNet, what comes out, and where it pulls."""

# B batch, C channels, h w latent, H W pixels

import matplotlib.pyplot as plt
import torch

from sdkit.figures import COLOURS, figure_style, plot_image

NOISE_RANGE = 3.0  # standard deviations
COLUMNS = ("picture", "noise", "noisy latents", "predicted noise", "what that makes of it")


@torch.no_grad()
def decode(vae, latents):
    """Returns the pictures (B, 3, H, W) in [0, 1] that latents (B, C, h, w), scaled, stand for."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
    return (vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1)


def remove_noise(noise_scheduler, noisy_latents, noise_pred, timesteps):
    """Returns what a prediction makes of noisy latents, in one go: the latents without the noise.

    Args:
        noise_scheduler: From `make_noise_scheduler`.
        noisy_latents: (B, C, h, w).
        noise_pred: (B, C, h, w), of its prediction type.
        timesteps: (B,), long.

    Returns:
        (B, C, h, w).
    """
    signal = noise_scheduler.alphas_cumprod[timesteps.cpu()].to(noisy_latents).view(-1, 1, 1, 1)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return signal.sqrt() * noisy_latents - (1 - signal).sqrt() * noise_pred
    return (noisy_latents - (1 - signal).sqrt() * noise_pred) / signal.sqrt()


def plot_step(vae, noise_scheduler, batch, noisy_latents, noise_pred, losses, *, rows=4):
    """Draws samples of a step, a row each: picture, noise, noisy latents, prediction, its meaning.

    From the least noise to the most.

    Latents and noise are shown by their first channel, from -3 (blue) to 3 (red).

    Args:
        vae: Of the pipeline.
        noise_scheduler: From `make_noise_scheduler`.
        batch: A Batch of B samples.
        noisy_latents: (B, C, h, w).
        noise_pred: (B, C, h, w).
        losses: (B,), of each sample.
        rows: How many of the samples are shown, at most.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    rows = min(rows, len(batch))
    by_noise = batch.timesteps.argsort()
    chosen = by_noise[[(2 * row + 1) * len(batch) // (2 * rows) for row in range(rows)]]
    cleaned = remove_noise(noise_scheduler, noisy_latents, noise_pred, batch.timesteps)
    pictures, guesses = (
        decode(vae, latents[chosen]).permute(0, 2, 3, 1).numpy()
        for latents in (batch.latents, cleaned)
    )
    maps = [
        tensor.detach()[chosen, 0].float().cpu().numpy()
        for tensor in (batch.noise, noisy_latents, noise_pred)
    ]
    told, timesteps = losses.detach()[chosen].tolist(), batch.timesteps[chosen].tolist()
    is_kept = [False] * rows if batch.is_kept is None else batch.is_kept[chosen].tolist()
    with figure_style():
        figure, axes = plt.subplots(
            rows, len(COLUMNS), figsize=(1.75 * len(COLUMNS), 2.0 * rows), squeeze=False
        )
        plt.close(figure)
        for row, tiles in enumerate(axes):
            plot_image(tiles[0], pictures[row])
            for ax, values in zip(tiles[1:4], maps, strict=True):
                ax.imshow(values[row], cmap="RdBu_r", vmin=-NOISE_RANGE, vmax=NOISE_RANGE)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            plot_image(tiles[4], guesses[row], title=f"loss {told[row]:.3f}")
            kept = ", kept" if is_kept[row] else ""
            tiles[0].set_xlabel(f"timestep {timesteps[row]}{kept}", fontsize=8)
        for ax, title in zip(axes[0], COLUMNS, strict=True):
            ax.set_title(title, fontsize=9)
        figure.tight_layout(pad=0.4, h_pad=1.0)
    return figure


def measure_gradients(named_parameters) -> dict:
    """Returns {block: (length of A's gradients, length of B's)} of an adapter.

    Args:
        named_parameters: {name: parameter}, as `find_parameters` gives them, with gradients.
    """
    squares = {}
    for name, parameter in named_parameters.items():
        block = ".".join(name.split(".")[1:4]) if ".mid_block" not in name else "mid_block"
        pair = squares.setdefault(block, [0.0, 0.0])
        if parameter.grad is not None:
            pair[".lora_B." in name] += float(parameter.grad.square().sum())
    return {block: (a**0.5, b**0.5) for block, (a, b) in squares.items()}


def plot_gradients(ax, gradients):
    """Draws what `measure_gradients` returned, two bars a block; returns the Axes."""
    for place, (which, colour) in enumerate((("A", COLOURS[4]), ("B", COLOURS[0]))):
        positions = [row + 0.2 * (2 * place - 1) for row in range(len(gradients))]
        lengths = [pair[place] for pair in gradients.values()]
        ax.barh(positions, lengths, height=0.36, color=colour, label=f"of {which}")
    ax.set_yticks(range(len(gradients)), list(gradients))
    ax.invert_yaxis()
    ax.set(xlabel="length of the gradients", title="Where the loss pulls")
    ax.legend()
    return ax
