"""One pipeline call as the user makes it, under the guard, and what may be called at all."""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from sdkit.diagnosis.loss_watch import LossWatch
from sdkit.diagnosis.module_watch import ModuleWatch
from sdkit.diagnosis.whole_run import list_modules
from sdkit.finding import ComponentCall, Finding, NonFiniteError
from sdkit.generation import request
from sdkit.guarding import find_components, guard
from sdkit.validation import ValidationError, judge_image


@dataclass
class Run:
    """One pipeline call under the guard.

    Attributes:
        images: Float images (N, H, W, 3), or None if the guard stopped it.
        is_censored: What the safety checker says of each image.
        finding: The guard's first, or None.
        call: The component call it is about.
        suspect: Path of the first module whose output was bad in that call.
        has_hidden: Whether NaN or Inf was within a component, though what each put out was finite.
    """

    images: np.ndarray | None = None
    is_censored: tuple[bool, ...] = ()
    finding: Finding | None = None
    call: ComponentCall | None = None
    suspect: str | None = None
    has_hidden: bool = False

    @property
    def is_valid(self) -> bool:
        """Whether it ended with images that are all valid."""
        return self.images is not None and all(judge_image(image).valid for image in self.images)


def check_prompts(pipe, prompts, pipe_kwargs) -> list[str] | None:
    """The prompts as a list of at least one; empty words where embeddings stand for them.

    None for a pipeline that takes no prompt, such as an unconditional one.
    """
    if not takes(pipe, "prompt"):
        if prompts:
            raise ValidationError(
                f"prompts: {type(pipe).__name__} takes none. Expected None, and what it takes by "
                f"name: {', '.join(name_required(pipe)) or 'nothing is needed'}."
            )
        return None
    if prompts is None and pipe_kwargs.get("prompt_embeds") is not None:
        return [""] * len(pipe_kwargs["prompt_embeds"])
    return request.check_prompts(prompts, allow_empty=True)


def takes(pipe, argument) -> bool:
    """Whether a pipeline's call takes an argument of this name."""
    return argument in inspect.signature(pipe.__call__).parameters


def name_required(pipe) -> list[str]:
    """Names of the arguments that a pipeline's call must be given."""
    parameters = inspect.signature(pipe.__call__).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def check_arguments(pipe, seed, pipe_kwargs):
    """Raises for names and numbers with which the pipeline cannot be called."""
    if "prompt" in pipe_kwargs:
        raise ValidationError("prompt: expected as the second argument, prompts.")
    request.check_known(pipe, pipe_kwargs)
    request.check_number("seed", seed, minimum=0, maximum=request.MAXIMUM_SEED)
    for name in ("num_inference_steps", "num_images_per_prompt", "num_videos_per_prompt"):
        if pipe_kwargs.get(name) is not None:
            request.check_number(name, pipe_kwargs[name], minimum=1)
    if pipe_kwargs.get("guidance_scale") is not None:
        request.check_number("guidance_scale", pipe_kwargs["guidance_scale"], kind=float)


def check_pipeline(pipe):
    """Returns the pipeline if it can be diagnosed.

    Raises:
        ValidationError: No UNet or transformer, a scheduler that diffusers would not know, or
            components on different devices that no offloading hook moves.
    """
    components = find_components(pipe)
    if not callable(pipe):
        raise ValidationError(f"pipe: {type(pipe).__name__} cannot be called.")
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(scheduler, type):
        raise ValidationError(
            f"scheduler: got the class {scheduler.__name__}, expected one of its kind: "
            f"{scheduler.__name__}.from_config(pipe.scheduler.config)."
        )
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise ValidationError(
                f"scheduler: {type(scheduler).__name__} has no {method}(), expected one of "
                "diffusers' schedulers. Set pipe.scheduler."
            )
    devices = {
        name: parameter.device
        for name, component in components.items()
        if not hasattr(component, "_hf_hook")  # offloaded: moved when it is called
        for parameter in component.parameters()
    }
    if len(set(devices.values())) > 1:
        seen = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValidationError(f"pipe: {seen}. Expected one device: say pipe.to(device) first.")
    return pipe


def run_guarded(pipe, prompts, seed, pipe_kwargs) -> Run:
    """One pipeline call as the user makes it, under the guard."""
    generators = make_generators(prompts, seed, pipe_kwargs)
    ours = {"generator": generators, "output_type": "np", "return_dict": True}
    arguments = {
        **{name: value for name, value in ours.items() if takes(pipe, name)},
        **pipe_kwargs,
        **{name: ours[name] for name in ("output_type", "return_dict") if takes(pipe, name)},
    }
    if prompts and "prompt_embeds" not in pipe_kwargs:
        arguments["prompt"] = prompts
        # diffusers wants a negative prompt to be a list where the prompt is one.
        words = {name: v for name, v in pipe_kwargs.items() if name.startswith("negative_prompt")}
        arguments |= {n: [v] * len(prompts) for n, v in words.items() if isinstance(v, str)}
    modules = list_modules(pipe)
    watch, losses = ModuleWatch(), LossWatch()
    try:
        with (
            kept_state(arguments.get("generator")),
            guard(pipe) as report,
            watch.installed(modules),
            losses.installed(modules),
        ):
            output = pipe(**arguments)
    except NonFiniteError:
        suspect = watch.find_first_bad(report[0].component.partition(".")[0])
        return Run(finding=report[0], call=report.bad_call, suspect=suspect)
    censored = getattr(output, "nsfw_content_detected", None)
    return Run(
        images=read_images(output),
        is_censored=tuple(censored or ()),
        has_hidden=watch.has_seen_bad or losses.has_seen_bad,
    )


def make_generators(prompts, seed, pipe_kwargs):
    """One generator an image, as `generate` draws; one for all where no prompts are counted."""
    if prompts is None:
        return torch.Generator("cpu").manual_seed(seed)
    each = ("num_images_per_prompt", "num_videos_per_prompt")
    count = len(prompts) * next((n for name in each if (n := pipe_kwargs.get(name))), 1)
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]


def read_images(output) -> np.ndarray:
    """The images of a pipeline's output as floats (N, H, W, C); of a video every frame is one.

    Raises:
        ValidationError: The pipeline makes neither images nor frames.
    """
    found = getattr(output, "images", getattr(output, "frames", None))
    if found is None:
        raise ValidationError(
            f"pipe: it gives {type(output).__name__}, expected images or the frames of a video."
        )
    images = np.asarray(found)
    images = images / np.float32(255) if images.dtype == np.uint8 else images
    return images.reshape(-1, *images.shape[-3:])


@contextmanager
def kept_state(generators):
    """Gives generators back the state they had: every run of a diagnosis draws the same noise."""
    generators = generators if isinstance(generators, list) else [generators]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
