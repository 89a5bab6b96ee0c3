"""What `generate` was asked for, checked whole before anything is computed or written."""

import difflib
import inspect
import math
import os
import shutil
import unicodedata
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from PIL import Image, ImageOps

from sdkit.generation.incident import INCIDENT_FOLDER
from sdkit.generation.provenance import hash_pixels
from sdkit.generation.record import RECORD_NAME
from sdkit.generation.step_record import STEPS_PATTERN
from sdkit.guarding import find_denoisers
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

# What generate() passes to the pipeline itself.
RESERVED = (
    "prompt", "negative_prompt", "height", "width", "latents", "generator", "image",
    "num_images_per_prompt", "output_type", "return_dict",
)  # fmt: skip
# What a pipeline must take for a record to be true: `generate` says all of it.
NEEDED = (
    "prompt", "num_inference_steps", "guidance_scale", "generator", "output_type",
)  # fmt: skip
# StableDiffusionPipeline takes these two, deprecated, through its own **kwargs.
LEGACY = ("callback", "callback_steps")
MAXIMUM_SEED = 2**63 - 1
SLUG_LENGTH = 60


@dataclass(frozen=True)
class Request:
    """One image each: prompts, negative prompts, seeds and, for image-to-image, input images."""

    prompts: list[str]
    negative_prompts: list[str | None]
    seeds: list[int]
    height: int
    width: int
    input_images: list | None
    input_origins: list[dict] | None  # as `ImageRecord.input_image`

    def __len__(self):
        """Number of images asked for."""
        return len(self.prompts)

    def file_name(self, index):
        """A name that depends on nothing but the request: 002_brown-boot_seed7.png."""
        ascii_prompt = unicodedata.normalize("NFKD", self.prompts[index]).encode("ascii", "ignore")
        letters = [c if c.isalnum() else " " for c in ascii_prompt.decode().lower()]
        slug = "-".join("".join(letters).split())[:SLUG_LENGTH].strip("-") or "image"
        return f"{index:03d}_{slug}_seed{self.seeds[index]}.png"


def check_request(pipe, prompts, *, negative_prompt, seed, image_size, image):
    """Returns the Request for a pipeline, or says what is wrong with it.

    Raises:
        ValidationError: Prompts, seeds, sizes or input images that cannot be used.
    """
    prompts = check_prompts(prompts)
    count = len(prompts)
    negative_prompts = _one_each(negative_prompt, (str, type(None)), count, "negative_prompt")
    input_images = input_origins = None
    if image is not None:
        images = _one_each(image, (Image.Image, str, Path), count, "image")
        input_images = [open_image(item) for item in images]
        input_origins = [
            {"file_name": _find_file_name(item), "pixels_sha256": hash_pixels(opened)}
            for item, opened in zip(images, input_images, strict=True)
        ]
        if image_size is None:
            step = _find_size_step(pipe)
            image_size = [max(side // step, 1) * step for side in input_images[0].size[::-1]]
    height, width = _check_size(pipe, image_size)
    if input_images is not None:
        input_images = [item.resize((width, height), Image.LANCZOS) for item in input_images]
    return Request(
        prompts=prompts,
        negative_prompts=negative_prompts,
        seeds=_check_seeds(seed, count),
        height=height,
        width=width,
        input_images=input_images,
        input_origins=input_origins,
    )


def check_number(name, value, *, kind=int, minimum=None, maximum=None):
    """Returns a number as an int or a float if it is one and within its bounds, ends included."""
    accepted = Integral if kind is int else Real  # numpy's numbers too
    if isinstance(value, bool) or not isinstance(value, accepted) or not math.isfinite(value):
        raise ValidationError(f"{name}: got {value!r}, expected one finite {kind.__name__}.")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValidationError(f"{name}: got {value!r}, expected {bounds}.")
    return kind(value)


def check_pipeline(pipe, *, image, negative_prompt):
    """Refuses a pipeline that cannot be told what a run needs, before anything is computed."""
    known = inspect.signature(pipe.__call__).parameters
    needed = [*NEEDED, *(("image", "strength") if image is not None else ("height", "width"))]
    if negative_prompt is not None:
        needed.append("negative_prompt")
    missing = [name for name in needed if name not in known]
    if missing or getattr(pipe, "vae", None) is None:
        raise ValidationError(
            f"{type(pipe).__name__}: takes no {', '.join(missing) or 'vae'}, which generate() "
            "needs here. Expected a pipeline of Stable Diffusion 1.x, 2.x, XL or 3, or of Flux; "
            "call another one yourself, inside `with guard(pipe):`."
        )


def packs_latents(pipe):
    """Whether the pipeline's latents are no (B, C, h, w): Flux packs 2x2 of them into a token."""
    return hasattr(pipe, "_pack_latents")


def check_pipe_kwargs(pipe, pipe_kwargs):
    """Refuses what generate() sets itself, and names that the pipeline does not know.

    StableDiffusionPipeline swallows unknown names without a word: a misspelt setting would be lost.
    """
    for name in pipe_kwargs:
        if name in RESERVED:
            raise ValidationError(
                f"{name}: generate() sets it itself. Expected one prompt an image, its size as "
                "image_size and its seed as seed."
            )
    check_known(pipe, pipe_kwargs)


def check_known(pipe, names):
    """Refuses names of arguments that the pipeline's call does not have."""
    known = set(inspect.signature(pipe.__call__).parameters) | set(LEGACY)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValidationError(
                f"{name}: {type(pipe).__name__} takes no such argument."
                + (f" Did you mean {close[0]}?" if close else "")
            )


def open_image(image):
    """Returns an RGB copy of a PIL image or image file, upright as its EXIF says."""
    try:
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                opened.load()
                return open_image(opened)
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValidationError(
            f"image: {image} cannot be opened ({error}). Expected a PIL image or an image file."
        ) from error


def _find_file_name(image):
    """The name of an image's file without its folder, which may tell the user's; or None."""
    path = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    return Path(os.fsdecode(path)).name or None


def prepare_folder(output_folder, request):
    """Makes the folder, proves that it can be written, and removes what this run would replace.

    An image of an earlier run under the same name would look done if this run failed.

    Returns:
        The folder as a `Path`.

    Raises:
        ValidationError: The folder cannot be made or written, or the disk is too full.
    """
    folder = Path(output_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / ".sdkit-trial") as temporary:
            temporary.write_bytes(b"written")
        (folder / ".sdkit-trial").unlink()
        for name in [RECORD_NAME, *map(request.file_name, range(len(request)))]:
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob(STEPS_PATTERN):
            path.unlink()
        for index in range(len(request)):
            shutil.rmtree(folder / INCIDENT_FOLDER.format(index), ignore_errors=True)
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ValidationError(
            f"output_folder: {folder} cannot be written ({reason}). "
            "Expected a folder, or a path where one can be made."
        ) from error
    needed = len(request) * request.height * request.width * 3 + 1024**2  # as if PNG saved nothing
    if free < needed:
        raise ValidationError(
            f"output_folder: {folder} has {free / 1024**2:.1f} MiB left, the images may need "
            f"{needed / 1024**2:.1f}. Free some, or choose another folder."
        )
    return folder


def check_prompts(prompts, *, allow_empty=False) -> list[str]:
    """Returns one prompt or several as a list of at least one; an empty one is words of nothing.

    Raises:
        ValidationError: None, or one that is no valid text, or is empty and must not be.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValidationError(f"prompts: got {prompts!r}, expected a prompt or a list of prompts.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not (allow_empty or prompt.strip()):
            raise ValidationError(f"prompts[{index}]: got {prompt!r}, expected words.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(f"prompts[{index}]: is no valid Unicode ({error}).") from error
    return list(prompts)


def _one_each(value, kinds, count, name):
    """Repeats one value for every image, or checks that a list has one for each."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValidationError(f"{name}: got {len(values)} for {count} prompts, expected one each.")
    for item in values:
        if not isinstance(item, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise ValidationError(f"{name}: got {type(item).__name__}, expected {expected}.")
    return values


def _check_seeds(seed, count):
    if isinstance(seed, (list, tuple)):
        seeds = _one_each(seed, (Integral,), count, "seed")
    else:
        seeds = [check_number("seed", seed) + i for i in range(count)]
    return [check_number("seed", item, minimum=0, maximum=MAXIMUM_SEED) for item in seeds]


def _check_size(pipe, image_size):
    """(height, width) in pixels; None is what the model was made for."""
    step = _find_size_step(pipe)
    if image_size is None:
        sample_size = find_denoisers(pipe)[0].config.get("sample_size") or pipe.default_sample_size
        image_size = [side * pipe.vae_scale_factor for side in _pair(sample_size)]
    sides = _pair(image_size)
    for side in sides:
        is_whole = isinstance(side, Integral) and not isinstance(side, bool)
        if len(sides) != 2 or not is_whole or side <= 0 or side % step:
            raise ValidationError(
                f"image_size: got {image_size!r}, expected pixels as one number or as "
                f"(height, width), each a multiple of {step}."
            )
    return tuple(map(int, sides))


def _find_size_step(pipe):
    """Pixels of which both sides are multiples: of what one latent, or one token, stands for."""
    patch_size = 2 if packs_latents(pipe) else find_denoisers(pipe)[0].config.get("patch_size", 1)
    return pipe.vae_scale_factor * patch_size


def _pair(size):
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
