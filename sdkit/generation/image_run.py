"""Batch by batch: noise, one guarded pipeline call, a verdict on the floats, a file.

The pipeline hands out floats, which are judged before the cast to 8 bits: a NaN that is cast
becomes a black pixel, and nothing can tell any more.

Noise is drawn on the CPU in float32, one generator an image, so text-to-image starts from the same
latents on every device, in every dtype and in every batch size. What is drawn later (by ancestral
schedulers, and by image-to-image) comes from the same generators, but diffusers draws it in the
model's dtype: with torch 2.13 that is the float32 noise, rounded; no version promises it. The same
holds for all noise of pipelines that pack their latents, as Flux does, in forms of their own.

# B batch, h w latent
"""

import inspect
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdkit.device import MemoryMeter, synchronize
from sdkit.finding import NonFiniteError
from sdkit.generation.caught_warnings import CaughtWarnings
from sdkit.generation.incident import INCIDENT_FOLDER, save_incident
from sdkit.generation.provenance import hash_pixels, save_png
from sdkit.generation.record import (
    RECORD_NAME,
    ImageRecord,
    RunRecord,
    plain,
)
from sdkit.generation.request import packs_latents
from sdkit.generation.rescue import Rescuer
from sdkit.generation.step_record import STEPS_NAME
from sdkit.generation.step_recorder import StepRecorder
from sdkit.guarding import find_components, find_denoisers, guard
from sdkit.validation import ValidationError, judge_image


@dataclass
class ImageRun:
    """The images of one `generate` call while they are made.

    Attributes:
        pipe: The pipeline that makes them.
        request: What was asked for.
        call: Further arguments of the pipeline call.
        folder: Where to save, or None.
        raises: Whether the first bad image ends the run.
        rescues: Whether bad calls are made again in float32.
        records_steps: Whether to keep what every module put out, and to save the steps.
        record: What is known before the first image.
        images: The ImageRecord of each image so far.
        seconds: (seconds, images) of each pipeline call so far.
        steps: The StepRecord of each pipeline call so far.
    """

    pipe: object
    request: object
    call: dict
    folder: Path | None
    raises: bool
    rescues: bool
    records_steps: bool
    record: RunRecord
    images: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    steps: list = field(default_factory=list)

    def __post_init__(self):
        """Prepares what listens to the warnings and what measures the memory."""
        self.caught = CaughtWarnings()
        self.meter = MemoryMeter(self.record.device)
        self.rescuer = Rescuer(self.pipe, is_emulated=self.record.emulated is not None)

    @contextmanager
    def listening(self):
        """Catches warnings, measures memory and stands by to rescue while images are made."""
        with self.caught, self.meter, ExitStack() as stack:
            if self.rescues:
                stack.enter_context(self.rescuer.installed())
            yield

    def make_batch(self, indices):
        """Makes, judges and saves some images; raises at the first bad one if that was asked."""
        started = self._read_clock()
        self.rescuer.begin_pipeline_call()
        try:
            with (
                guard(self.pipe, on_nonfinite="raise" if self.raises else "record") as report,
                self._recording_steps(indices),
            ):
                output = self.pipe(**self._arguments(indices))
        except NonFiniteError as error:
            unfinished = self._describe_unfinished(indices, error.finding)
            self.images += unfinished
            try:
                self._save_incidents(unfinished, report)
            except ValidationError as problem:  # a full disk must not hide what was found
                raise self._failure(unfinished[0], f" No incident was kept: {problem}") from error
            raise self._failure(unfinished[0]) from error
        self.seconds.append((self._read_clock() - started, len(indices)))
        images = self._judge(indices, output, report)
        for image in images:
            self.images.append(self._save_image(image) if image.valid else image)
        self._save_incidents(images, report)
        for image in images:
            if self.raises and not image.valid:
                raise self._failure(image)

    @contextmanager
    def _recording_steps(self, indices):
        """Keeps the steps of one pipeline call, of one that fails too."""
        recorder = StepRecorder(
            self.pipe, indices, height=self.request.height, width=self.request.width,
            with_modules=self.records_steps,
        )  # fmt: skip
        try:
            with recorder.installed():
                yield
        finally:
            self.steps.append(recorder.finish())
            if self.folder and self.records_steps:
                path = self.folder / STEPS_NAME.format(indices[0])
                with _explain_failure_to_write(path):
                    self.steps[-1].save(path)

    def save(self):
        """Writes the record of what is done so far, if there is a folder."""
        if self.folder:
            with _explain_failure_to_write(self.folder / RECORD_NAME):
                self._describe().save(self.folder / RECORD_NAME)

    def finish(self, *, error=None):
        """Returns the final record: complete, or with the error that ended the run."""
        self.record = replace(self.record, complete=error is None, error=error)
        return self._describe()

    def _describe(self):
        emulated = self.record.emulated is not None
        seconds = [] if emulated else self.seconds
        first, rest = seconds[:1], seconds[1:]
        memory = {
            "peak_process_gib": self.meter.peak_process_gib,
            "peak_device_gib": self.meter.peak_device_gib,
        }
        return replace(
            self.record,
            folder=self.folder,
            steps=tuple(self.steps),
            images=tuple(self.images),
            rescue=self.rescuer.log.to_dict() if self.rescues else None,
            warnings=self.caught.count(),
            cast_warning=self.caught.has_cast_warning,
            first_seconds=_mean_seconds(first),
            rest_mean_seconds=_mean_seconds(rest),
            memory=None if emulated else memory,
        )

    def _read_clock(self):
        synchronize(self.record.device)
        return time.perf_counter()

    def _arguments(self, indices):
        """The keyword arguments of one pipeline call."""
        request = self.request
        generators = [torch.Generator("cpu").manual_seed(request.seeds[i]) for i in indices]
        arguments = {
            "prompt": [request.prompts[i] for i in indices],
            "generator": generators,
            "output_type": "np",  # floats: what is wrong can still be seen
            **self.call,
        }
        if any(request.negative_prompts):
            arguments["negative_prompt"] = [request.negative_prompts[i] or "" for i in indices]
        if "height" in inspect.signature(self.pipe.__call__).parameters:
            arguments |= {"height": request.height, "width": request.width}
        if request.input_images:
            arguments["image"] = [request.input_images[i] for i in indices]
        elif not packs_latents(self.pipe):
            size = (request.height, request.width)
            arguments["latents"] = _draw_latents(self.pipe, generators, *size)
        return arguments

    def _describe_unfinished(self, indices, finding):
        """Records of the images that the guard stopped; the others of the batch were innocent."""
        causes = _blame([finding], len(indices), [False] * len(indices))
        problem = "nan" if finding.nan_count else "inf"
        return [
            self._describe_image(index, problem=problem, message=finding.message, finding=finding)
            for index, cause in zip(indices, causes, strict=True)
            if cause
        ]

    def _judge(self, indices, output, report):
        """Returns the ImageRecord of each image of a batch; a bad one's has the problem in it."""
        count = len(indices)
        verdicts = [judge_image(image) for image in output.images]
        censored = getattr(output, "nsfw_content_detected", None) or [False] * count
        causes = _blame(report.findings, count, [not verdict.valid for verdict in verdicts])
        images = []
        for index, image, verdict, cause, is_censored in zip(
            indices, output.images, verdicts, causes, censored, strict=True
        ):
            problem, message = verdict.problem, verdict.message
            if cause:  # also where the image looks valid: diffusers has clamped an Inf to 1 by now
                problem = "nan" if cause.nan_count or verdict.nan_count else "inf"
                message = cause.message
            elif is_censored:
                problem = "safety-checker"
                message = "blacked out by the safety checker; this is no numerical fault"
            images.append(
                self._describe_image(
                    index,
                    problem=problem,
                    message=message,
                    finding=cause,
                    seconds=None if self.record.emulated else _mean_seconds(self.seconds[-1:]),
                    minimum=verdict.minimum,
                    maximum=verdict.maximum,
                    nan_count=verdict.nan_count,
                    inf_count=verdict.inf_count,
                    pil_image=None if problem else _to_pil(image),
                )
            )
        return images

    def _describe_image(self, index, *, problem, finding, **found):
        return ImageRecord(
            index=index,
            prompt=self.request.prompts[index],
            negative_prompt=self.request.negative_prompts[index],
            seed=self.request.seeds[index],
            input_image=self.request.input_origins and self.request.input_origins[index],
            valid=problem is None,
            problem=problem,
            finding=finding and plain({**asdict(finding), "message": finding.message}),
            **found,
        )

    def _save_image(self, image):
        """Returns the record of a valid image with its hash and, if there is a folder, its file."""
        image = replace(image, pixels_sha256=hash_pixels(image.pil_image))
        if not self.folder:
            return image
        path = self.folder / self.request.file_name(image.index)
        with _explain_failure_to_write(path):
            save_png(image.pil_image, path, self._describe_origin(image))
        return replace(image, path=path.name)

    def _save_incidents(self, images, report):
        """Writes a bundle for each invalid image, if there is a folder."""
        for image in images if self.folder else ():
            if not image.valid:
                found = image.finding["message"] if image.finding else None
                call = report.bad_call if report and found == report[0].message else None
                folder = self.folder / INCIDENT_FOLDER.format(image.index)
                with _explain_failure_to_write(folder):
                    run = self._describe()
                    save_incident(
                        folder, run=run, image=image, pipe=self.pipe, call=call,
                        call_kwargs=self.call,
                    )  # fmt: skip

    def _describe_origin(self, image):
        """What the PNG says about itself."""
        made_by = ("settings", "model", "pipeline", "scheduler", "device", "dtypes", "attention")
        return {
            "prompt": image.prompt,
            "negative_prompt": image.negative_prompt,
            "seed": image.seed,
            "input_image": image.input_image,
            **{name: getattr(self.record, name) for name in made_by},
            "environment": self.record.environment,
            "emulated": self.record.emulated,
        }

    def _failure(self, image, addition=""):
        message = f"image {image.index} ({image.prompt[:60]!r}): {image.message}{addition}"
        if image.problem in ("nan", "inf"):
            return NonFiniteError(message, image.finding)
        return ValidationError(message)


def _mean_seconds(calls):
    """Seconds an image over calls of (seconds, images), or None without a call."""
    return sum(s for s, _ in calls) / sum(n for _, n in calls) if calls else None


@contextmanager
def _explain_failure_to_write(path):
    try:
        yield
    except OSError as error:
        raise ValidationError(
            f"{path}: cannot be written ({error.strerror or error}); nothing half-written is left. "
            "Free some space, or choose another output_folder."
        ) from error


def _draw_latents(pipe, generators, height, width):
    """Noise (B, C, h, w) in the dtype of the prompt embeddings, as diffusers itself would.

    The pipeline multiplies it by the scheduler's init_noise_sigma.
    """
    scale, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
    shape = (1, channels, height // scale, width // scale)
    noise = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
    components = find_components(pipe)
    encoders = [c for name, c in components.items() if name.startswith("text_encoder")]
    dtype = (encoders or find_denoisers(pipe))[-1].dtype
    return torch.cat(noise).to(dtype)


def _blame(findings, count, is_bad):
    """Returns for each of `count` images the finding that explains it, or None.

    A batch with guidance has a multiple of `count` rows. Where the rows say nothing about images
    (`vae.encode` is called once for each), the finding belongs to the images that are bad, and to
    all of them if none is: better one image too few than one that is wrong.
    """
    causes = [None] * count
    unclear = None
    for finding in findings:
        if finding.row_count % count:
            unclear = unclear or finding
            continue
        for row in finding.rows:
            causes[row % count] = causes[row % count] or finding
    if unclear and not any(causes):
        causes = [unclear if bad or not any(is_bad) else None for bad in is_bad]
    return causes


def _to_pil(image):
    """A valid float image (H, W, 3) in 8 bits, rounded as diffusers does."""
    return Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
