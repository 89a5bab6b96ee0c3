"""Ops that forget the strides or the offset of a view, and so read or write elsewhere."""

import torch

from sdkit.emulate.faults.fault import PYTORCH, Fault

NORMS = ("aten.native_group_norm", "aten.native_layer_norm")


def read_as_contiguous(tensor):
    """Reads a view's memory in the order of its shape, from its own offset on."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    needed = tensor.storage_offset() + tensor.numel()
    if (
        tensor.is_contiguous()
        or needed > tensor.untyped_storage().nbytes() // tensor.element_size()
    ):
        return tensor
    return tensor.as_strided(tensor.shape, strides)


def forget_offset(func, args, kwargs, compute):
    """Read a slice from the start of the storage that it is a slice of."""
    tensor, *others = args
    return compute(func, (tensor.as_strided(tensor.shape, tensor.stride(), 0), *others), kwargs)


def forget_strides(func, args, kwargs, compute):
    """Read a transposed tensor in the order of its shape."""
    tensor, *others = args
    return compute(func, (read_as_contiguous(tensor), *others), kwargs)


def misread_chunk(func, args, kwargs, compute):
    """Take the second image of a chunk of channels from right behind the first."""
    image, *others = args
    if image.dim() == 4 and image.stride(3) == 1:
        image = read_as_contiguous(image)
    return compute(func, (image, *others), kwargs)


def misread_channels_last_slice(func, args, kwargs, compute):
    """Read a slice of channels of a channels_last tensor as if the others were not there."""
    image, *others = args
    channels = image.shape[1]
    if image.dim() == 4 and image.stride(1) == 1 and image.stride(3) > channels > 1:
        strides = (image[0].numel(), 1, image.shape[3] * channels, channels)
        image = image.as_strided(image.shape, strides)
    return compute(func, (image, *others), kwargs)


def skip_strided_output(func, args, kwargs, compute):
    """Leave a tensor as it was if its memory is not in the order of its shape."""
    return compute(func, args, kwargs) if args[0].is_contiguous() else args[0]


FAULTS = (
    Fault(
        name="norm-slice-offset",
        ops=NORMS,
        threads=(f"{PYTORCH}/131750", f"{PYTORCH}/133520"),
        affects=(
            "MPS, layer norm (and batch norm in torch 2.4) of slices. That group norm did it too"
            " is inferred."
        ),
        apply=forget_offset,
    ),
    Fault(
        name="norm-transposed",
        ops=NORMS,
        threads=(f"{PYTORCH}/175189", f"{PYTORCH}/133520"),
        affects=(
            "Inferred: MPS lost the strides of a batch norm's gradient in channels_last and the"
            " offset of sliced ones; a layer norm that loses strides is the same defect."
        ),
        apply=forget_strides,
    ),
    Fault(
        name="conv-chunk",
        ops=("aten.convolution",),
        threads=(f"{PYTORCH}/169342",),
        affects="MPS in torch 2.9 and 2.10, macOS 26.2, M5; one report, not confirmed by others.",
        apply=misread_chunk,
    ),
    Fault(
        name="conv-channels-last-slice",
        ops=("aten.convolution",),
        threads=(f"{PYTORCH}/180984",),
        affects="MPS, a slice of the channels of a channels_last tensor.",
        apply=misread_channels_last_slice,
    ),
    Fault(
        name="inplace-strided",
        ops=("aten.addcdiv_", "aten.addcmul_"),
        threads=(f"{PYTORCH}/118115",),
        affects="MPS, fixed about torch 2.4; weights of models froze without a word.",
        apply=skip_strided_output,
    ),
)
