"""The ladder of "not enough memory": what each rung saves, and which are not there on a Mac.

The report's rungs (a batch of 1, gradient checkpointing, CPU offloading, the CPU itself) with those
that it lacks: attention and VAE in slices, VAE tiles, bfloat16. Each stands on those above it,
except where it says that it is another way.
"""

from dataclasses import dataclass, replace

import pandas as pd

from sdkit.device import GIB
from sdkit.memory import LoraTraining
from sdkit.precision.machines import judge
from sdkit.precision.memory import measure_memory, predict_memory
from sdkit.precision.memory_case import MemoryCase
from sdkit.precision.shapes import open_shapes

REPORT_BATCH_SIZE = 2  # its train_batch_size
# The report's estimate of what is in use, in GB: weights, working memory, both (for 512x512).
REPORTED_GB = {
    "float16": {"weights": (2, 3), "activations": (1.5, 1.5), "total": (4, 5)},
    "float32": {"weights": (4, 5), "activations": (2, 3), "total": (6, 8)},
}
UNIFIED = "runs, saves little or nothing: CPU and GPU share this memory"


@dataclass(frozen=True)
class Rung:
    """One thing to try.

    Attributes:
        name: For people.
        how: The call or argument.
        case: What is predicted with it, on those above; None where it does not exist.
        on_mps: What becomes of it on a Mac.
        offload: "", "model" or "layer": what is alone on a GPU of its own at a time.
    """

    name: str
    how: str
    case: MemoryCase | None
    on_mps: str = "works"
    offload: str = ""


START = MemoryCase(dtype="float32", batch_size=REPORT_BATCH_SIZE)
SLICED = replace(START, attention="sliced")
VAE_SLICED = replace(SLICED, vae_slicing=True)
SINGLE = replace(VAE_SLICED, batch_size=1)
TILED = replace(SINGLE, vae_tiling=True)
HALF = replace(TILED, dtype={"default": "bfloat16", "vae": "float32"})
INFERENCE = (
    Rung("float32, batch of 2", "load_pipeline(dtype='float32')", START),
    Rung(
        "sliced attention", "load_pipeline(attention='sliced')", SLICED,
        "works; diffusers' own slicing is black with torch < 2.14 (pytorch#187521)",
    ),
    Rung(
        "VAE slicing", "pipe.vae.enable_slicing()", VAE_SLICED,
        "works; nothing to gain with a batch of 1",
    ),
    Rung("batch of 1", "generate(pipe, one prompt)", SINGLE),
    Rung(
        "VAE tiling", "pipe.vae.enable_tiling()", TILED,
        "works; nothing to gain up to the VAE's own size (512 for SD 1.5)",
    ),
    Rung(
        "bfloat16, VAE float32",
        "load_pipeline(dtype={'default': 'bfloat16', 'vae': 'float32'})", HALF,
        "needs macOS 14",
    ),
    Rung(
        "CPU offload", "pipe.enable_model_cpu_offload()", HALF,
        f"{UNIFIED}; with slicing it was reported black (diffusers#14438)", "model",
    ),
    Rung(
        "sequential CPU offload", "pipe.enable_sequential_cpu_offload()", HALF,
        f"{UNIFIED}, and copies each layer for each call", "layer",
    ),
    Rung(
        "another way: the CPU", "load_pipeline(backend='cpu')",
        replace(TILED, attention="sdpa", device_type="cpu"),
        "works, slowly, in float32: the same memory, only without Metal's limit on it",
    ),
)  # fmt: skip
TRAINING = LoraTraining()
TRAINING_START = replace(START, training=TRAINING)
TRAINING_SINGLE = replace(TRAINING_START, batch_size=1)
CHECKPOINTED = replace(TRAINING_SINGLE, training=replace(TRAINING, gradient_checkpointing=True))
TRAINING_SLICED = replace(CHECKPOINTED, attention="sliced")
LORA = (
    Rung("float32, batch of 2", "batch_size=2", TRAINING_START),
    Rung("batch of 1", "batch_size=1, gradient_accumulation_steps=2", TRAINING_SINGLE),
    Rung("gradient checkpointing", "unet.enable_gradient_checkpointing()", CHECKPOINTED),
    Rung(
        "sliced attention", "use_sliced_attention(pipe)", TRAINING_SLICED,
        "works; the scores are kept for the backward pass, of one block at a time",
    ),
    Rung(
        "8-bit optimiser", "bitsandbytes.optim.AdamW8bit", None,
        "does not exist: bitsandbytes has none for MPS; a LoRA's state is small in any case",
    ),
    Rung(
        "CPU offload", "pipe.enable_model_cpu_offload()", None,
        "does not exist: for generating only, and weights that train must stay",
    ),
    Rung(
        "another way: the CPU", "backend='cpu'",
        replace(CHECKPOINTED, device_type="cpu"),
        "works, slowly: SDPA keeps no scores there, and Metal sets no limit",
    ),
)  # fmt: skip
RUNGS = {"inference": INFERENCE, "LoRA training": LORA}


def list_memory_rungs(
    model="mini", *, image_size=None, task=None, machine="M2 Max, 32 GB", measure=False
):
    """Lists the rungs in their order, with what each needs.

    Args:
        model: As in `predict_memory`.
        image_size: In pixels; None is the model's own.
        task: "inference", "LoRA training", or None for both.
        machine: For whom to judge; see `judge`.
        measure: Whether to run each rung on the CPU as well, on real tensors: seconds on the
            bundled model, minutes on a full-size one, which gets random weights.

    Returns:
        A DataFrame with a row a rung: `needed_gib` as on MPS (on the CPU where that is the rung);
        `saved_gib` against the rung above; `gpu_gib`, on a GPU with memory of its own, where
        offloading frees some; `verdict`; `on_mps`; and, measured, `cpu_predicted_gib` beside
        `cpu_measured_gib`, both of live tensors.
    """
    rows, predictions = [], {}

    def predict(case):  # rungs share cases, and a full-size step takes seconds
        if str(case) not in predictions:
            predictions[str(case)] = predict_memory(model, **vars(case))
        return predictions[str(case)]

    for name in [task] if task else list(RUNGS):
        above = None
        for rung in RUNGS[name]:
            row = {"task": name, "rung": rung.name, "how": rung.how}
            if rung.case:
                case = replace(rung.case, image_size=image_size)
                without_scores = predict(replace(case, device_type="cpu"))
                needed_gib = predict(case).total_gib
                row |= {
                    "needed_gib": needed_gib,
                    "saved_gib": above - needed_gib if above else 0.0,
                    "peak_stage": predict(case).peak_stage,
                    "verdict": judge(needed_gib, machine).answer,
                    "gpu_gib": _find_gpu_gib(model, without_scores, rung.offload),
                }
                above = needed_gib
                if measure and not rung.offload:
                    row["cpu_predicted_gib"] = without_scores.total_gib
                    row["cpu_measured_gib"] = measure_memory(model, case).total_gib
            rows.append(row | {"on_mps": rung.on_mps})
    return pd.DataFrame(rows)


def _find_gpu_gib(model, predicted, offload):
    """What a GPU with memory of its own holds: all, or one component or layer at a time."""
    if not offload:
        return predicted.total_gib
    largest = predicted.weight_bytes
    if offload == "layer":
        largest = dict.fromkeys(largest, _find_largest_layer(model, predicted))
    stages = predicted.stage_bytes.items()
    return max(size + largest[stage.split()[0]] for stage, size in stages) / GIB


def _find_largest_layer(model, predicted):
    """Bytes of the largest weight, in the dtype of the component that has it."""
    itemsizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    return max(
        parameter.numel() * itemsizes[predicted.dtypes[name]]
        for name, module in open_shapes(model)[1].items()
        for parameter in module.parameters()
    )


def compare_with_report(model="sd15"):
    """Returns the report's estimates beside what is predicted, 512x512, one image, as on MPS.

    Returns:
        A DataFrame with a row a dtype and part: `reported_gb` as the report writes it, and
        `predicted_gb` in the same unit (10^9 bytes), by SDPA and by sliced attention.
    """
    rows = []
    for dtype, parts in REPORTED_GB.items():
        predictions = {
            attention: predict_memory(model, dtype=dtype, image_size=512, attention=attention)
            for attention in ("sdpa", "sliced")
        }
        for part, (least, most) in parts.items():
            row = {"dtype": dtype, "part": part}
            row["reported_gb"] = f"{least:g}" if least == most else f"{least:g}-{most:g}"
            for attention, predicted in predictions.items():
                sizes = {
                    "weights": predicted.total_weight_bytes,
                    "activations": predicted.activation_bytes,
                    "total": predicted.total_bytes,
                }
                row[f"predicted_gb_{attention}"] = sizes[part] / 1e9
            rows.append(row)
    return pd.DataFrame(rows)
