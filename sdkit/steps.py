"""Counts the steps of a denoising loop from the timesteps that the denoiser is called with.

A step is the index i of diffusers' denoising loop (`for i, t in enumerate(timesteps)`), from 0 in
every pipeline call. Second-order schedulers (Heun, KDPM2) list their half-steps in `timesteps`, so
n inference steps give about 2n steps here. Image-to-image counts from its own first step, and two
calls at one timestep, one for each half of the guidance, are one step.
"""

import weakref
from contextlib import ExitStack, contextmanager

import torch

# The first parameters of UNet2DConditionModel.forward; pipelines pass all others by name.
DENOISER_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")


def name_denoiser_arguments(args, kwargs) -> dict:
    """{name: value} of what a UNet or transformer was called with."""
    return {**dict(zip(DENOISER_ARGUMENTS, args, strict=False)), **kwargs}


class StepCounter:
    """Where in the denoising loop a pipeline is.

    Attributes:
        position: Index into `scheduler.timesteps`; None before the first call of the denoiser.
        step: Index of the denoising loop; None before the first call.
        timestep: What the denoiser was called with last; None before.
    """

    def __init__(self, pipe):
        """Takes the pipeline, of which it keeps a weak reference."""
        self._find_pipe = weakref.ref(pipe)
        self.begin_run()

    def begin_run(self):
        """Forgets the run so far: another pipeline call begins."""
        self.position = self.step = self.timestep = None

    def advance(self, timestep) -> bool:
        """Moves to the step of a denoiser call; returns True if a new run begins with it."""
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.flatten()[0].item()  # one for the batch, or one a row
        position = find_position(self._find_pipe(), timestep, self.position)
        if position is None:  # not in the schedule (Flux divides by 1000): count the changes
            previous = -1 if self.position is None else self.position
            rises = None not in (timestep, self.timestep) and timestep > self.timestep
            position = 0 if rises else previous + (timestep != self.timestep)
        if self.position is not None and position < self.position:
            self.begin_run()
        is_new = self.position is None
        # Counted, not subtracted: image-to-image may start at the second of two equal timesteps.
        self.step = 0 if is_new else self.step + (position > self.position)
        self.position, self.timestep = position, timestep
        return is_new

    @contextmanager
    def following(self, denoisers):
        """Yields itself and advances before each call of a denoiser."""

        def note(module, args, kwargs):
            self.advance(name_denoiser_arguments(args, kwargs).get("timestep"))

        with ExitStack() as undo:
            for denoiser in denoisers:
                hook = denoiser.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
                undo.callback(hook.remove)
            yield self


def find_position(pipe, timestep, previous):
    """Index into scheduler.timesteps of a call at this timestep, after a call at `previous`.

    The next index comes first, for second-order schedulers list a timestep twice; then the same
    index, for some pipelines call the UNet once for each half of the guidance; then a later one.
    Only a new run goes back.
    """
    schedule = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    values = [] if schedule is None else schedule.tolist()
    matches = [i for i, value in enumerate(values) if value == timestep]
    if previous in matches and previous + 1 not in matches:
        return previous
    later = [i for i in matches if previous is None or i > previous]
    return next(iter(later or matches), None)
