"""Prompts to checked, saved images and one record: nothing invalid reaches the disk.

Here the call is put together and undone again; `request.py` says what may be asked for, and
`image_run.py` makes the images.
"""

import inspect
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from tqdm.auto import tqdm

from sdkit.attention import refuse_unsafe_attention
from sdkit.device import describe_environment
from sdkit.emulate import active as find_emulation
from sdkit.generation.image_run import ImageRun
from sdkit.generation.quiet import without_progress_bar
from sdkit.generation.record import RECORD_VERSION, RunRecord, plain
from sdkit.generation.request import (
    check_number,
    check_pipe_kwargs,
    check_pipeline,
    check_request,
    prepare_folder,
)
from sdkit.guarding import find_components, find_denoisers
from sdkit.validation import ValidationError

ON_NONFINITE = ("raise", "skip", "rescue")
EMULATED_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} (emulated: no seconds)"


def generate(
    pipe,
    prompts,
    *,
    negative_prompt=None,
    seed=0,
    num_inference_steps=25,
    guidance_scale=7.5,
    image_size=None,
    batch_size=1,
    image=None,
    strength=0.8,
    output_folder=None,
    on_nonfinite="raise",
    record_steps=False,
    progress=True,
    **pipe_kwargs,
):
    """Generates one checked image a prompt, and saves the valid ones.

    Args:
        pipe: A diffusers pipeline for Stable Diffusion 1.x, 2.x, XL or 3, or for Flux.
        prompts: One prompt or a list of them; repeat a prompt for several images of it.
        negative_prompt: One for all, or a list with one each.
        seed: Image i is drawn from seed + i; or a list with one seed each.
        num_inference_steps: Denoising steps; with an image, strength times as many are done.
        guidance_scale: At most 1 is no guidance.
        image_size: Pixels, one number or (height, width), multiples of 8 (Flux and Stable Diffusion
            3: of 16). By default what the model was made for, or the size of the input image.
        batch_size: Images in one pipeline call.
        image: PIL image or file to start from (image-to-image), or a list with one each.
        strength: How far to leave the input image, above 0 and at most 1.
        output_folder: Where the images and `record.json` go; None keeps them in memory alone. Use
            one folder a run: what this run would write is removed from it first.
        on_nonfinite: "raise" stops at the first NaN, Inf or invalid image (black or flat ones too);
            "skip" records and drops it and goes on, within a batch as well. "rescue" makes a
            component call that came out NaN or Inf again in float32, before the scheduler has used
            it, and raises only if that does not help; the record tells what was done.
        record_steps: Whether to keep for `explore_run` the greatest |x| and the NaN count of each
            module at each step, and to save them with the latents after each step beside the
            images: one small `steps_NNN.npz` a pipeline call. Without it the record holds small
            latents, and only in memory.
        progress: Whether to show a progress bar.
        **pipe_kwargs: Handed on to the pipeline call.

    Returns:
        A RunRecord; its images hold the valid `pil_image`s.

    Raises:
        NonFiniteError: An image would have been NaN or Inf (on_nonfinite="raise").
        ValidationError: Another invalid image; or, before anything runs, arguments that cannot work
            and attention that is known to break on this device (see `sdkit.attention`).

        Every error, an interrupt too, carries the unfinished RunRecord as `error.record`. It is
        saved as well, with `complete` false, beside the images that were saved before.

    Warnings during the run (Python's, and what diffusers and transformers log) are kept in the
    record and shown once each when it ends. Python's filters are the process's, so do not generate
    in two threads at once.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise ValidationError(
            f"on_nonfinite: got {on_nonfinite!r}, expected one of {', '.join(ON_NONFINITE)}."
        )
    find_components(pipe)
    pipe = _choose_pipeline(pipe, image)
    check_pipeline(pipe, image=image, negative_prompt=negative_prompt)
    check_pipe_kwargs(pipe, pipe_kwargs)
    refuse_unsafe_attention(pipe, pipe._execution_device)
    num_inference_steps = check_number("num_inference_steps", num_inference_steps, minimum=1)
    guidance_scale = check_number("guidance_scale", guidance_scale, kind=float)
    batch_size = check_number("batch_size", batch_size, minimum=1)
    request = check_request(
        pipe,
        prompts,
        negative_prompt=negative_prompt,
        seed=seed,
        image_size=image_size,
        image=image,
    )
    call = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        **({} if image is None else {"strength": _check_strength(strength, num_inference_steps)}),
        **pipe_kwargs,
    }
    folder = None if output_folder is None else prepare_folder(output_folder, request)
    settings = {
        "height": request.height,
        "width": request.width,
        "batch_size": batch_size,
        "on_nonfinite": on_nonfinite,
        "image_to_image": image is not None,
        **plain(call),
    }
    record = _describe_run(pipe, settings)
    run = ImageRun(
        pipe,
        request,
        call,
        folder,
        raises=on_nonfinite != "skip",
        rescues=on_nonfinite == "rescue",
        records_steps=record_steps,
        record=record,
    )
    return _make_images(run, batch_size, progress)


def _make_images(run, batch_size, progress):
    """Makes the images batch by batch, the record saved after each, and returns the final one."""
    count = len(run.request)
    try:
        with run.listening(), _progress_bar(run.pipe, count, progress) as bar:
            for start in range(0, count, batch_size):
                indices = range(start, min(start + batch_size, count))
                run.make_batch(indices)
                run.save()
                bar.update(len(indices))
        record = run.finish()
        run.save()
    except BaseException as error:  # an interrupt too: what was made is told
        error.record = run.finish(error=str(error) or type(error).__name__)
        for tell in (run.save, run.caught.show):
            with suppress(ValidationError, Warning):  # neither may hide the error itself
                tell()
        raise
    run.caught.show()
    return record


def _choose_pipeline(pipe, image):
    """The pipeline itself, or an image-to-image pipeline of the very same components."""
    makes_images_of_images = "strength" in inspect.signature(pipe.__call__).parameters
    if makes_images_of_images == (image is not None):
        return pipe
    if makes_images_of_images:
        raise ValidationError(
            f"image: {type(pipe).__name__} starts from an image, expected image=. "
            "Hand over a text-to-image pipeline to start from noise."
        )
    from diffusers import AutoPipelineForImage2Image  # imports every pipeline, with their notices

    try:
        return AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValidationError(
            f"image: {type(pipe).__name__} has no image-to-image form in diffusers ({error})."
        ) from error


def _check_strength(strength, num_inference_steps):
    strength = check_number("strength", strength, kind=float, minimum=0, maximum=1)
    if int(strength * num_inference_steps) < 1:
        raise ValidationError(
            f"strength: {strength} of {num_inference_steps} steps leaves none. Expected at least "
            f"{1 / num_inference_steps:.3g}, or more num_inference_steps."
        )
    return strength


def _describe_run(pipe, settings):
    """The record as it is before the first image."""
    components = find_components(pipe)
    processors = getattr(find_denoisers(pipe)[0], "attn_processors", {}).values()
    return RunRecord(
        version=RECORD_VERSION,
        complete=False,
        error=None,
        images=(),
        settings=settings,
        model=_name_model(pipe),
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__,
        device=str(pipe._execution_device),  # pipe.device says cpu while a model is offloaded
        dtypes={n: str(c.dtype).removeprefix("torch.") for n, c in components.items()},
        attention=tuple(sorted({type(processor).__name__ for processor in processors})),
        warnings=(),
        cast_warning=False,
        first_seconds=None,
        rest_mean_seconds=None,
        memory=None,
        rescue=None,
        environment=plain(describe_environment(str(pipe._execution_device))),
        emulated=find_emulation(),
    )


def _name_model(pipe):
    """What the model is called; of a folder that diffusers read, its own name alone."""
    path = Path(str(pipe.config.get("_name_or_path") or "unnamed"))
    return path.name if path.is_absolute() else str(path)


@contextmanager
def _progress_bar(pipe, count, progress):
    """One bar over the images, or the pipeline's own over the steps of a single one."""
    emulated = find_emulation() is not None
    own_is_shown = progress and count == 1 and not emulated
    bar_format = EMULATED_BAR if emulated else None
    with (
        nullcontext() if own_is_shown else without_progress_bar(pipe),
        tqdm(
            total=count, unit="image", disable=own_is_shown or not progress, bar_format=bar_format
        ) as bar,
    ):
        yield bar
