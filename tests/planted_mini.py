"""A few of the planted faults in the bundled model, whose weights are trained ones."""

from broken_kernels import at_step, documented, everything, kernel
from planted import LATE, Planted
from planting import (
    NAN,
    SELF_ATTENTION,
    TEXT,
    scale_inside,
    set_weight,
    slice_attention,
    with_ddim,
)

from sdkit.loading import load_pipeline


def load_mini(tokenizer_folder):
    """The bundled model in float32; it brings its own tokenizer."""
    return load_pipeline("mini", backend="cpu", dtype="float32", progress=False)[0]


PLANTED_IN_MINI = (
    Planted(
        "mini: slicing on stale float32", slice_attention,
        "unet", 0, SELF_ATTENTION, "uninitialised-memory", "the report's leading candidate",
        memory="stale_float32", faults=documented("baddbmm-beta-zero"), base=load_mini,
    ),
    Planted(
        "mini: VAE decoder conv1, exact scaling",
        scale_inside("vae.decoder.up_blocks.1.resnets.0", 2.0**12),
        "vae", None, "vae.decoder.up_blocks.1.resnets.0.conv1", "range-overflow",
        "float32 is unchanged", base=load_mini,
    ),
    Planted(
        "mini: a NaN weight in the text encoder",
        set_weight(TEXT + "encoder.layers.2.mlp.fc2", NAN),
        "text_encoder", None, TEXT + "encoder.layers.2.mlp.fc2", "bad-weights",
        "one weight of the last layer", base=load_mini,
    ),
    Planted(
        "mini: a step drawn by lot, everything", with_ddim(),
        "unet", LATE, "unet.up_blocks.2.resnets.1.conv2", "backend-fault", "told by the timestep",
        faults=kernel(
            "aten.convolution", on="unet.up_blocks.2.resnets.1.conv2",
            spoil=everything(), when=at_step(LATE),
        ),
        base=load_mini,
    ),
)  # fmt: skip
