"""How much memory a generation needs besides the weights, asked only where it decides something.

A trace of Stable Diffusion 1.5 takes 0.4 s of one core (torch 2.13), of which a load should not
spend more than it must. At a model's own size what is needed was 1.22 (bundled model) to 1.28
(SD 1.5) times the float32 weights; so where less than the weights is free, or more than twice, the
answer is known.
"""

from functools import cache
from types import SimpleNamespace

from sdkit.device import GIB
from sdkit.memory import read_architecture, trace_inference
from sdkit.memory.architectures import find_own_size, is_traceable
from sdkit.slicing import use_sliced_attention

CERTAIN = 2


def find_activations_gib(checkpoint, device_type, *, weights_gib, available_gib, itemsizes, sliced):
    """Predicts what one image at the model's own size takes besides the weights.

    Args:
        checkpoint: A Checkpoint.
        device_type: "mps", "cuda" or "cpu"; memory decides on "mps" alone.
        weights_gib: What the weights take in these dtypes.
        available_gib: Memory that is free.
        itemsizes: {component: bytes of one value}.
        sliced: Whether attention is sliced by `sdkit.slicing`.

    Returns:
        GiB, or None where it would decide nothing, or the model is none that can be traced.
    """
    if device_type != "mps" or not weights_gib <= available_gib < CERTAIN * weights_gib:
        return None
    stages = _trace(checkpoint.config_folder, checkpoint.components, sliced)
    sizes = (size * itemsizes[name] / 4 for name, size in stages.items())
    return max(sizes) / GIB if stages else None


@cache
def _trace(folder, components, sliced):
    """{component: peak bytes in float32}, empty for a model that is not Stable Diffusion."""
    if not {"unet", "vae"} <= set(components):
        return {}
    shapes = read_architecture(folder, ("unet", "vae"))  # text encoders never take the most
    latent_size = find_own_size(shapes["unet"]) if is_traceable(shapes) else None
    if latent_size is None:
        return {}
    if sliced:
        use_sliced_attention(SimpleNamespace(components=shapes))
    return trace_inference(shapes, latent_size=latent_size, device_type="mps")
