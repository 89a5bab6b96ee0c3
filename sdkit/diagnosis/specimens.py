"""Broken pipelines whose cause is known, to try a diagnosis on: each plants one fault, exactly.

Scaling by a power of two is exact. What a ResNet writes between its two norms is read by the second
norm alone, which divides by its size; so weights may be scaled up there if the norm's eps is scaled
by the square. In float32 the image stays the same to the last bit. In float16 the numbers between
the norms no longer fit.
"""

import math

import torch

from sdkit.loading.modules import find_module

VAE_RESNET = "vae.decoder.up_blocks.1.resnets.0"
UNET_RESNET = "unet.up_blocks.1.resnets.0"
WEIGHT = "unet.mid_block.resnets.0.conv2"
WEIGHT_LIMIT = 2.0**15  # the largest power of two that float16 holds: weights must still fit
FLOAT16_MAXIMUM = torch.finfo(torch.float16).max


def overflow_vae(pipe) -> str:
    """Makes the VAE's decoder overflow in float16, and change nothing in float32.

    Args:
        pipe: A Stable Diffusion pipeline; it is changed in place.

    Returns:
        Dotted path of the module whose output no longer fits.
    """
    return amplify_between_norms(pipe, VAE_RESNET)


def overflow_unet(pipe) -> str:
    """Makes the UNet overflow in float16, and change nothing in float32.

    Args:
        pipe: A Stable Diffusion pipeline; it is changed in place.

    Returns:
        Dotted path of the module whose output no longer fits.
    """
    return amplify_between_norms(pipe, UNET_RESNET)


def amplify_between_norms(pipe, path: str) -> str:
    """Scales what a ResNet writes between its norms, as far as float16 still holds its weights.

    Args:
        pipe: The pipeline; it is changed in place.
        path: Of a `ResnetBlock2D`, from the pipeline.

    Returns:
        Dotted path of its first convolution.
    """
    resnet = find_module(pipe, path)
    writers = [module for module in (resnet.conv1, resnet.time_emb_proj) if module is not None]
    parameters = [parameter for writer in writers for parameter in writer.parameters()]
    largest = max(float(parameter.detach().abs().max()) for parameter in parameters)
    factor = 2.0 ** math.floor(math.log2(WEIGHT_LIMIT / largest))
    with torch.no_grad():
        for parameter in parameters:
            parameter *= factor
    resnet.norm2.eps *= factor**2
    return f"{path}.conv1"


def spoil_weight(pipe) -> str:
    """Makes one weight of the UNet NaN, as a torn download or a bad merge may.

    Args:
        pipe: A Stable Diffusion pipeline; it is changed in place.

    Returns:
        Dotted path of the module whose weight it is.
    """
    with torch.no_grad():
        find_module(pipe, WEIGHT).weight.view(-1)[0] = float("nan")
    return WEIGHT


def raise_scores(pipe, score) -> str:
    """Makes Q.K^T too large for float16 before it is scaled, and fit after.

    float32, and kernels that scale before they round, have no trouble with it. Unlike the others
    this changes the picture: attention becomes harder.

    Args:
        pipe: The pipeline; it is changed in place.
        score: A `Score` of this model: which attention, and how large its scores are now.

    Returns:
        Dotted path of the attention.
    """
    attention = find_module(pipe, score.module)
    # As far above the limit before the scale as below it after: room for other seeds and steps.
    wanted = FLOAT16_MAXIMUM * math.sqrt(score.unscaled / score.scaled)
    factor = math.sqrt(wanted / score.unscaled)  # shared, so that neither Q nor K overflows alone
    with torch.no_grad():
        attention.to_q.weight *= factor
        attention.to_k.weight *= factor
    return score.module
