"""Did it learn: the same prompts and seeds with and without an adapter, and what that changed."""

# N pictures, H W pixels, D features

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from sdkit.device import describe_environment
from sdkit.emulate import active as find_emulation
from sdkit.finetuning.adapter_file import find_adapter_file, load_adapter, read_metadata
from sdkit.finetuning.checkpoints import ADAPTER_FILE
from sdkit.finetuning.dataset import MINI, ImageCaptionDataset
from sdkit.finetuning.evaluation_prompts import base_prompts, find_product, studio_prompts
from sdkit.finetuning.evaluation_report import LoRAEvaluation, PictureMeasures
from sdkit.finetuning.picture_measures import (
    measure_change,
    measure_diversity,
    measure_kernel_distance,
    measure_white_border,
)
from sdkit.generation import generate
from sdkit.loading import load_pipeline
from sdkit.loading.checkpoint import MINI_ID
from sdkit.mini.classifier import QUESTIONS, classify, load_classifier, shrink_images
from sdkit.validation import ValidationError, check_finite

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
    if kept_prompts is None:
        kept_prompts = base_prompts() if is_mini else ()
    elif isinstance(kept_prompts, str):
        kept_prompts = (kept_prompts,)
    settings = {
        "seed": seed, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "batch_size": batch_size, "image_size": image_size,
    }  # fmt: skip

    def draw(name):
        folder = Path(output_folder) / name if output_folder else None
        return generate(
            pipe, [*prompts, *kept_prompts], output_folder=folder, on_nonfinite="skip",
            progress=progress, **settings,
        )  # fmt: skip

    load_adapter(pipe, path)  # first, so that one of another base is refused before any work
    try:
        after = draw("after")
    finally:
        pipe.unload_lora_weights()
    before = draw("before")
    judge = load_classifier() if is_mini else None
    own_judge = judge if dataset == MINI else None
    learnt, kept = slice(0, len(prompts)), slice(len(prompts), None)
    kept_groups = [
        measure_pictures(read_pictures(run)[kept], kept_prompts, judge) if kept_prompts else None
        for run in (before, after)
    ]
    report = LoRAEvaluation(
        adapter=str(path),
        model=str(pipe.config.get("_name_or_path") or model),
        dataset=str(dataset),
        before=measure_pictures(read_pictures(before)[learnt], prompts, own_judge, held_out),
        after=measure_pictures(read_pictures(after)[learnt], prompts, own_judge, held_out),
        held_out=measure_pictures(list(held_out), real.captions, own_judge),
        kept_before=kept_groups[0],
        kept_after=kept_groups[1],
        drift=measure_drift(read_pictures(before)[kept], read_pictures(after)[kept]),
        settings={**settings, "prompts": list(prompts), "kept_prompts": list(kept_prompts)},
        notes=tuple(_find_notes(path, before, after, is_mini, dataset, kept_prompts)),
        environment=describe_environment(str(pipe.device)),
        emulated=find_emulation(),
        run_before=before,
        run_after=after,
    )
    if output_folder:
        report.save(output_folder)
    return report


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
    for name, weight in safetensors.torch.load_file(path).items():
        check_finite(weight, f"{path.name}: {name}")
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


def read_pictures(run) -> list:
    """Returns each picture of a RunRecord, (3, H, W) in [0, 1], or None where it was bad."""
    return [
        None
        if image.pil_image is None
        else torch.from_numpy(np.array(image.pil_image)).permute(2, 0, 1).float() / 255
        for image in run.images
    ]


def measure_pictures(pictures, prompts, judge=None, held_out=None) -> PictureMeasures:
    """Measures a group of pictures.

    Args:
        pictures: N of (3, H, W) in [0, 1], or None where one was bad.
        prompts: N, what they shall show.
        judge: The bundled classifier, or None where it knows nothing of such pictures.
        held_out: (M, 3, H, W), what they shall be like; None measures no distance.
    """
    pairs = [(x, prompt) for x, prompt in zip(pictures, prompts, strict=True) if x is not None]
    if not pairs:
        return PictureMeasures(asked=len(pictures), valid=0)
    images = torch.stack([picture for picture, _ in pairs])
    shares = measure_white_border(images)
    has_distance = judge is not None and held_out is not None
    return PictureMeasures(
        asked=len(pictures),
        valid=len(images),
        white_border=float(shares.mean()),
        white_border_least=float(shares.min()),
        white_border_253=float(measure_white_border(images, 253).mean()),
        white_border_255=float(measure_white_border(images, 255).mean()),
        distance=measure_kernel_distance(
            find_features(judge, images), find_features(judge, held_out)
        )
        if has_distance
        else None,
        diversity=measure_diversity(images),
        **_judge_answers(judge, images, [prompt for _, prompt in pairs]),
    )


def _judge_answers(judge, images, prompts):
    """The share of right answers to each question, over the prompts that the catalogue knows."""
    products = [find_product(prompt) for prompt in prompts]
    if judge is None or not any(products):
        return {}
    answers = classify(judge, images)
    return {
        f"{question}_right": float(
            np.mean(
                [
                    answer[question] == getattr(product, question)
                    for answer, product in zip(answers, products, strict=True)
                    if product
                ]
            )
        )
        for question in QUESTIONS
    }


@torch.no_grad()
def find_features(judge, images) -> torch.Tensor:
    """Returns what the classifier sees in pictures (N, 3, H, W), before it answers: (N, D)."""
    return judge[:-1](shrink_images(images))


def measure_drift(before, after) -> float | None:
    """Returns the mean change of pictures that are valid on both sides, in 8-bit levels."""
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    if not pairs:
        return None
    return float(measure_change(*(torch.stack(side) for side in zip(*pairs, strict=True))).mean())


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
