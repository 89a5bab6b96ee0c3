"""Did it learn: the same prompts and seeds with and without an adapter, and what that changed."""

# N pictures, H W pixels

from pathlib import Path

import torch

from sdkit.device import describe_environment
from sdkit.emulate import active as find_emulation
from sdkit.finetuning.adapter_file import (
    find_adapter_file,
    load_adapter,
    read_metadata,
    read_weights,
)
from sdkit.finetuning.checkpoints import ADAPTER_FILE
from sdkit.finetuning.dataset import MINI, ImageCaptionDataset
from sdkit.finetuning.evaluation_prompts import base_prompts, studio_prompts
from sdkit.finetuning.evaluation_report import REPORT_FILE, LoRAEvaluation
from sdkit.finetuning.picture_groups import measure_drift, measure_pictures, read_pictures
from sdkit.generation import generate
from sdkit.loading import load_pipeline
from sdkit.loading.checkpoint import MINI_ID
from sdkit.mini.classifier import load_classifier
from sdkit.validation import ValidationError, check_is_writable

MAXIMUM_PROMPTS = 32  # of a folder's captions


def evaluate_lora(
    adapter,
    model="mini",
    *,
    dataset=MINI,
    prompts=None,
    kept_prompts=None,
    seed=0,
    num_inference_steps=25,
    guidance_scale=2.0,
    batch_size=8,
    image_size=None,
    backend="auto",
    dtype="auto",
    output_folder=None,
    pipe=None,
    progress=True,
) -> LoRAEvaluation:
    """Draws fixed prompts and seeds with and without an adapter, and measures what it changed.

    Every picture goes through the guard: one that is NaN, black or flat is counted and left out.
    Colours, kinds, backgrounds and the distance are judged by the bundled classifier, which knows
    the drawings of the bundled model alone; for anything else these are None, and `notes` says so.

    Args:
        adapter: Its file, or the folder of a run.
        model: What it was trained on: mini, a folder, a .safetensors file or a Hub id.
        dataset: What it learnt from, for the held-out pictures: mini or a folder.
        prompts: What it shall have learnt, at least two; by default studio pictures of the
            catalogue, or the first captions of the folder's validation split.
        kept_prompts: What shall not have changed; by default the base model's own backgrounds where
            it is the bundled one, else none.
        seed: Picture i is drawn from seed + i, those to be kept after those to be learnt.
        num_inference_steps: Denoising steps.
        guidance_scale: 2 suits the bundled model; Stable Diffusion 1.5 is used with 7.5.
        batch_size: Pictures in one pipeline call.
        image_size: Side in pixels of what is drawn and of the held-out pictures; None is what the
            model was made for.
        backend: auto, mps, cuda or cpu.
        dtype: As for `load_pipeline`.
        output_folder: Where the pictures and `evaluation.json` go; None keeps them in memory.
        pipe: A loaded pipeline of the base to use instead of `model`; it is given back without the
            adapter.
        progress: Whether to show progress bars.

    Returns:
        A LoRAEvaluation.

    Raises:
        ValidationError: There is no adapter, it holds NaN or Inf, or it was made for another base
            model; the pipeline has an adapter already; the dataset or a setting is not fit.
    """
    path = check_adapter(adapter)
    if pipe is None:
        pipe, _ = load_pipeline(model, backend=backend, dtype=dtype, progress=progress)
    check_is_base(pipe)
    real, held_out = load_held_out(pipe, dataset, image_size=image_size, progress=progress)
    prompts = _choose_prompts(prompts, dataset, real)
    is_mini = pipe.config.get("_name_or_path") == MINI_ID
    kept_prompts = _choose_kept_prompts(kept_prompts, is_mini)
    settings = {
        "seed": seed, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "batch_size": batch_size, "image_size": image_size,
    }  # fmt: skip
    runs = draw_before_and_after(
        pipe, path, [*prompts, *kept_prompts], output_folder, progress=progress, **settings
    )
    pictures = [read_pictures(run) for run in runs]
    judge = load_classifier() if is_mini else None
    own_judge = judge if dataset == MINI else None
    before, after = (
        measure_pictures(drawn[: len(prompts)], prompts, own_judge, held_out) for drawn in pictures
    )
    kept = [drawn[len(prompts) :] for drawn in pictures]
    kept_before, kept_after = (
        measure_pictures(drawn, kept_prompts, judge) if kept_prompts else None for drawn in kept
    )
    report = LoRAEvaluation(
        adapter=str(path),
        model=str(pipe.config.get("_name_or_path") or model),
        dataset=str(dataset),
        before=before,
        after=after,
        held_out=measure_pictures(list(held_out), real.captions, own_judge),
        kept_before=kept_before,
        kept_after=kept_after,
        drift=measure_drift(*kept),
        settings={**settings, "prompts": list(prompts), "kept_prompts": list(kept_prompts)},
        notes=tuple(_find_notes(path, *runs, is_mini, dataset, kept_prompts)),
        environment=describe_environment(str(pipe.device)),
        emulated=find_emulation(),
        run_before=runs[0],
        run_after=runs[1],
    )
    if output_folder:
        report.save(output_folder)
    return report


def draw_before_and_after(pipe, path, prompts, output_folder, *, progress=True, **settings):
    """Draws the same prompts and seeds without and with an adapter; a bad picture is left out.

    Args:
        pipe: Without an adapter, and without one afterwards.
        path: The adapter's file.
        prompts: What to draw.
        output_folder: For the folders `before` and `after`, or None.
        progress: Whether to show progress bars.
        **settings: As for `generate`.

    Returns:
        (RunRecord of the base, RunRecord with the adapter).

    Raises:
        ValidationError: The adapter is not for this pipeline, or a setting is not fit.
    """

    def draw(name):
        folder = Path(output_folder) / name if output_folder else None
        return generate(
            pipe, prompts, output_folder=folder, on_nonfinite="skip", progress=progress, **settings
        )

    load_adapter(pipe, path)  # first, so that one of another base is refused before any work
    try:
        if output_folder:  # an earlier report does not tell of the pictures that come now
            (check_is_writable(output_folder) / REPORT_FILE).unlink(missing_ok=True)
        after = draw("after")
    finally:
        pipe.unload_lora_weights()
    return draw("before"), after


def check_adapter(adapter) -> Path:
    """Returns the path of an adapter's file.

    Args:
        adapter: It, or the folder of a run.

    Raises:
        ValidationError: There is none, it is no safetensors file, or holds NaN or Inf.
    """
    path = find_adapter_file(adapter)
    if not path.is_file():
        raise ValidationError(
            f"{adapter}: no adapter there. Expected {ADAPTER_FILE}, or the folder of a training "
            "that came to its end; one that was interrupted goes on with sdkit train --resume."
        )
    read_metadata(path)
    read_weights(path)
    return path


def check_is_base(pipe):
    """Returns a pipeline unchanged if it has no adapter, for the pictures before would have it too.

    Raises:
        ValidationError: It has one.
    """
    for name in ("unet", "text_encoder"):
        if getattr(getattr(pipe, name, None), "peft_config", None):
            raise ValidationError(
                f"{name}: has an adapter already. Expected the base model alone: "
                "pipe.unload_lora_weights(), or load it anew."
            )
    return pipe


def load_held_out(pipe, dataset, *, image_size=None, progress=True):
    """Reads the validation split of a dataset at the size that is drawn.

    Returns:
        The ImageCaptionDataset, and its images (N, 3, H, W) in [0, 1].
    """
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    real = ImageCaptionDataset(
        dataset, split="validation",
        resolution=image_size or pipe.unet.config.sample_size * factor, progress=progress,
    )  # fmt: skip
    return real, torch.stack([real[i].image for i in range(len(real))]) / 2 + 0.5


def _choose_prompts(prompts, dataset, real):
    if prompts is None:
        found = dict.fromkeys(real.captions)
        return studio_prompts() if dataset == MINI else tuple(found)[:MAXIMUM_PROMPTS]
    if isinstance(prompts, str) or len(prompts) < 2:
        raise ValidationError(
            f"prompts: got {prompts!r}, expected a list of at least two, for one picture has no "
            "diversity."
        )
    return tuple(prompts)


def _choose_kept_prompts(kept_prompts, is_mini):
    if kept_prompts is None:
        return base_prompts() if is_mini else ()
    return (kept_prompts,) if isinstance(kept_prompts, str) else tuple(kept_prompts)


def _find_notes(path, before, after, is_mini, dataset, kept_prompts):
    """What the numbers do not say by themselves."""
    if not is_mini:
        yield (
            "colour, kind, background and distance are not judged: the bundled classifier knows "
            "the bundled model's drawings alone"
        )
    elif dataset != MINI:
        yield (
            f"colour, kind, background and distance to {dataset} are not judged: the bundled "
            "classifier knows the rendered catalogue alone"
        )
    if not kept_prompts:
        yield "no drift: there are no prompts that shall be kept; give kept_prompts"
    for name, run in (("before", before), ("after", after)):
        bad = [f"{i.index} ({i.problem})" for i in run.images if not i.valid]
        if bad:
            yield f"{name}: {len(bad)} of {len(run.images)} pictures are bad: {', '.join(bad)}"
    if not any(name.startswith("base") for name in read_metadata(path)):
        yield f"{path.name} does not say what it was trained on; its layers fit this model"
