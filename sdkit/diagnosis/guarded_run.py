"""One pipeline call as the user makes it, under the guard, and what may be called at all."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from sdkit.diagnosis.module_watch import ModuleWatch
from sdkit.finding import ComponentCall, Finding, NonFiniteError
from sdkit.generation.request import MAXIMUM_SEED, check_number
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
    """

    images: np.ndarray | None = None
    is_censored: tuple[bool, ...] = ()
    finding: Finding | None = None
    call: ComponentCall | None = None
    suspect: str | None = None

    @property
    def is_valid(self) -> bool:
        """Whether it ended with images that are all valid."""
        return self.images is not None and all(judge_image(image).valid for image in self.images)


def check_prompts(prompts, pipe_kwargs) -> list[str]:
    """The prompts as a list of at least one; empty words where embeddings stand for them."""
    if prompts is None and pipe_kwargs.get("prompt_embeds") is not None:
        return [""] * len(pipe_kwargs["prompt_embeds"])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValidationError(f"prompts: got {prompts!r}, expected a prompt or a list of prompts.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValidationError(f"prompts[{index}]: got {prompt!r}, expected words.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(f"prompts[{index}]: is no valid Unicode ({error}).") from error
    return list(prompts)


def check_arguments(seed, pipe_kwargs):
    """Raises for numbers with which no pipeline can be called."""
    check_number("seed", seed, minimum=0, maximum=MAXIMUM_SEED)
    for name in ("num_inference_steps", "num_images_per_prompt"):
        if pipe_kwargs.get(name) is not None:
            check_number(name, pipe_kwargs[name], minimum=1)
    if pipe_kwargs.get("guidance_scale") is not None:
        check_number("guidance_scale", pipe_kwargs["guidance_scale"], kind=float)


def check_pipeline(pipe):
    """Returns the pipeline if it can be diagnosed.

    Raises:
        ValidationError: No UNet or transformer, a scheduler that diffusers would not know, or
            components on different devices that no offloading hook moves.
    """
    components = find_components(pipe)
    scheduler = getattr(pipe, "scheduler", None)
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
    count = len(prompts) * pipe_kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
    arguments = {"generator": generators, **pipe_kwargs, "output_type": "np", "return_dict": True}
    if "prompt_embeds" not in pipe_kwargs:
        arguments["prompt"] = prompts
    watch = ModuleWatch()
    try:
        with (
            kept_state(arguments["generator"]),
            guard(pipe) as report,
            watch.installed(find_components(pipe)),
        ):
            output = pipe(**arguments)
    except NonFiniteError:
        suspect = watch.find_first_bad(report[0].component.partition(".")[0])
        return Run(finding=report[0], call=report.bad_call, suspect=suspect)
    censored = getattr(output, "nsfw_content_detected", None)
    return Run(images=np.asarray(output.images), is_censored=tuple(censored or ()))


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
