"""What a generation or a LoRA training will take, before any weight is loaded, and whether it fits.

Nothing is fitted: every stage is run once on tensors without values, and what is alive is counted
op by op (`sdkit.memory`). Left out are what PyTorch itself takes (0.3 to 0.5 GiB), what an op takes
and gives back before it returns, and what an allocator keeps.
"""

from dataclasses import dataclass

from sdkit.device import GIB
from sdkit.loading import load_pipeline
from sdkit.loading.dtype_policy import dtype_name
from sdkit.loading.modules import find_models
from sdkit.loading.weights import count_weight_bytes
from sdkit.memory import ARCHITECTURES, build_architecture, trace_inference, trace_training
from sdkit.precision.machines import Verdict, judge
from sdkit.precision.memory_case import (
    MemoryCase,
    apply_case,
    find_scale,
    read_case,
    read_size,
)
from sdkit.precision.shapes import open_shapes
from sdkit.validation import ValidationError


@dataclass(frozen=True)
class MemoryPrediction:
    """What a run takes, in bytes.

    Attributes:
        task: "inference", or "LoRA training, rank 8" and such.
        model: What was predicted.
        dtypes: {component: dtype name}.
        image_size: (height, width) in pixels.
        batch_size: Images at a time.
        attention: "sdpa", "sliced", "diffusers-sliced" or "plain".
        device_type: As which device attention was counted.
        weight_bytes: {component: bytes of weights, adapters among them}.
        stage_bytes: {stage: peak of what is alive besides the weights, gradients included}.
        gradient_bytes: Of the weights that are trained.
        optimizer_bytes: State of the optimiser.
        notices: What is not as it might be expected.
    """

    task: str
    model: str
    dtypes: dict
    image_size: tuple
    batch_size: int
    attention: str
    device_type: str
    weight_bytes: dict
    stage_bytes: dict
    gradient_bytes: int
    optimizer_bytes: int
    notices: tuple = ()

    @property
    def peak_stage(self):
        """The stage that needs most."""
        return max(self.stage_bytes, key=self.stage_bytes.get)

    @property
    def activation_bytes(self):
        """What is alive in that stage besides weights and gradients."""
        return max(0, self.stage_bytes[self.peak_stage] - self.gradient_bytes)

    @property
    def total_weight_bytes(self):
        """Of all components."""
        return sum(self.weight_bytes.values())

    @property
    def total_bytes(self):
        """Weights, activations, gradients and optimiser at the peak."""
        return (
            self.total_weight_bytes
            + self.activation_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
        )

    @property
    def total_gib(self):
        """The same in GiB."""
        return self.total_bytes / GIB

    def verdict(self, machine="here") -> Verdict:
        """Whether it fits.

        Args:
            machine: A name in `sdkit.precision.machines.MACHINES`, such as "M2 Max, 32 GB", a
                `Machine`, or "here".
        """
        return judge(self.total_gib, machine)

    def __str__(self):
        """A short table in GiB."""
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in self.dtypes.items())
        rows = [
            ("weights", self.total_weight_bytes, dtypes),
            ("activations", self.activation_bytes, f"peak, in {self.peak_stage}"),
            ("gradients", self.gradient_bytes, ""),
            ("optimiser", self.optimizer_bytes, ""),
            ("total", self.total_bytes, "without PyTorch itself"),
        ]
        height, width = self.image_size
        title = (
            f"{self.model}: {self.task}, {width}x{height}, batch {self.batch_size}, "
            f"{self.attention} attention as on {self.device_type}"
        )
        lines = [f"{name:<12}{size / GIB:7.2f} GiB  {text}" for name, size, text in rows if size]
        return "\n".join([title, *(line.rstrip() for line in lines), *self.notices])


def predict_memory(
    model="mini",
    *,
    dtype=None,
    recipe=None,
    image_size=None,
    batch_size=1,
    training=None,
    attention="sdpa",
    device_type="mps",
    vae_slicing=False,
    vae_tiling=False,
):
    """Predicts the peak memory of text-to-image generation, or of LoRA training of the UNet.

    Nothing is loaded and nothing computed: it takes under a second for Stable Diffusion 1.5.

    Args:
        model: "sd15", "sdxl" (known configurations), "mini", a folder, a .safetensors file, a Hub
            id in the local cache, a pipeline, or a UNet2DConditionModel or AutoencoderKL; or a
            configuration: such as `unet.config`, a config.json, or {component: configuration}.
        dtype: As in `load_pipeline`; None is what a pipeline has, else float32.
        recipe: A `Recipe` or its file instead of a dtype.
        image_size: In pixels, a number or (height, width); None is the model's own.
        batch_size: Images at a time; guidance doubles the UNet's batch in a generation.
        training: None for a generation, or a `LoRAConfig`, a `LoraTraining`, or anything with its
            attributes; a dict of some of them, True for its defaults.
        attention: "sdpa", "sliced", "diffusers-sliced" or "plain".
        device_type: "mps", where SDPA makes the scores of all heads, or "cuda" or "cpu", where it
            does not. The verdicts are about Macs, so MPS it is if nothing is said.
        vae_slicing: Whether images are decoded one by one.
        vae_tiling: Whether an image is decoded in tiles.

    Returns:
        A MemoryPrediction.

    Raises:
        ValidationError: A model that is no Stable Diffusion 1.x, 2.x or XL, or an argument that
            makes no sense.
    """
    case = read_case(
        MemoryCase(
            dtype, recipe, image_size, batch_size, training, attention, device_type,
            vae_slicing, vae_tiling,
        )
    )  # fmt: skip
    return count_memory(*open_shapes(model), case)


def measure_memory(model, case):
    """Does on real tensors, on the CPU, what `predict_memory` does without: for comparison.

    Args:
        model: As in `predict_memory`; known configurations get random weights.
        case: A `MemoryCase`; attention is the CPU's whatever its `device_type`.

    Returns:
        A MemoryPrediction of what was alive; see `LiveBytes` for what that leaves out.
    """
    if model in ARCHITECTURES:
        return count_memory(model, build_architecture(model, device="cpu"), read_case(case))
    pipe, report = load_pipeline(model, backend="cpu", dtype="float32", progress=False)
    return count_memory(report.resolved, find_models(pipe), read_case(case))


def count_memory(name, components, case):
    """Runs the stages of a case and counts; changes the components.

    Args:
        name: Of the model.
        components: {name: module}, real or of the meta device.
        case: A MemoryCase.

    Returns:
        A MemoryPrediction.
    """
    notices = apply_case(components, case)
    notices += [
        f"{name}: its weights are counted, its calls are not"
        for name in components
        if name not in ("unet", "vae") and not name.startswith("text_encoder")
    ]
    image_size, scale = read_size(case.image_size, components), find_scale(components)
    options = {
        "latent_size": tuple(side // scale for side in image_size),
        "batch_size": case.batch_size,
        "device_type": case.device_type,
    }
    trained_bytes = 0
    if case.training is None:
        stage_bytes = trace_inference(components, **options)
    elif "unet" in components:
        frozen_bytes = _count_bytes(components)
        try:
            stage_bytes = trace_training(components, case.training, **options)
        except ValueError as error:  # peft's, where the names fit no layer that it can adapt
            reason = " ".join(str(error).split())
            raise ValidationError(
                f"training.target_modules={case.training.target_modules!r}: {reason}"
            ) from error
        trained_bytes = _count_bytes(components) - frozen_bytes
    else:
        raise ValidationError(f"{name}: has no UNet to train.")
    return MemoryPrediction(
        task=case.task,
        model=name,
        dtypes={part: dtype_name(_main_dtype(module)) for part, module in components.items()},
        image_size=image_size,
        batch_size=case.batch_size,
        attention=case.attention,
        device_type=case.device_type,
        weight_bytes={part: count_weight_bytes(module) for part, module in components.items()},
        stage_bytes=stage_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=case.states * trained_bytes,
        notices=tuple(notices),
    )


def _count_bytes(components):
    return sum(map(count_weight_bytes, components.values()))


def _main_dtype(module):
    sizes = {}
    for parameter in module.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.get)
