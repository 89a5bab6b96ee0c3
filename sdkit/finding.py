"""A finding: where NaN or Inf arose in a pipeline run, and what to do about it, in one line."""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdkit.validation import ValidationError, count_nonfinite

NEXT_STEP = {
    "latents": "Check latents=, the input image and the scheduler's sigmas.",
    "prompt_embeds": "Check the prompt_embeds= that were passed in.",
    "conditioning": "Check what the pipeline was given beside the prompt.",
    "image": "Check image=: expected finite values in [0, 1].",
    "scheduler": "Check guidance_scale, callbacks and the scheduler itself.",
}


@dataclass(frozen=True)
class Finding:
    """Where NaN or Inf arose.

    Attributes:
        stage: Who made it: "text_encoder", "unet" (a transformer too), "vae", or "scheduler" (all
            that lies between two UNet calls: guidance, `scheduler.step`, callbacks); or what the
            caller brought: "latents", "prompt_embeds", "image" (to `vae.encode`) or "conditioning"
            (any other argument of the UNet).
        step: Index of the denoising loop; None outside of it.
        timestep: The scheduler's value at that step; None outside of the loop.
        component: Who was called: "text_encoder_2", "unet", "transformer", "vae.decode".
        tensor: "output", or the argument that arrived bad.
        nan_count: Number of NaN values.
        inf_count: Number of infinite values.
        total: Number of values in the tensor.
        rows: Bad indices along the first dimension. With guidance the first half of a UNet's batch
            is the unconditional one.
        row_count: Length of the first dimension.
        dtype: Such as "float16".
        device: Such as "mps".
    """

    stage: str
    step: int | None
    timestep: float | None
    component: str
    tensor: str
    nan_count: int
    inf_count: int
    total: int
    rows: tuple[int, ...]
    row_count: int
    dtype: str
    device: str

    @property
    def message(self):
        """One line: where, what was seen, when, and the next step."""
        made = self.tensor == "output"
        where = self.component if made else self.stage
        nan = f"{self.nan_count} of {self.total} values are NaN"
        inf = f"{self.inf_count} of {self.total} values are Inf"
        counts = " and ".join([nan] * bool(self.nan_count) + [inf] * bool(self.inf_count))
        source = "" if made else f" in what {self.component} was given as {self.tensor}"
        relation = "after" if self.stage == "scheduler" else "at"
        step = "" if self.step is None else f" {relation} step {self.step}"
        timestep = "" if self.timestep is None else f" (timestep {self.timestep:g})"
        return (
            f"{where} ({self.dtype}, {self.device}): {counts}{source}{step}{timestep}. "
            f"{self._next_step}"
        )

    @property
    def _next_step(self):
        if self.stage in NEXT_STEP:
            return NEXT_STEP[self.stage]
        if self.dtype in ("float16", "bfloat16"):
            return 'Load with dtype="float32", or see notebooks/02_fix_precision.ipynb.'
        return "See notebooks/01_diagnose_black_images.ipynb to find the cause."

    def follows_from(self, causes):
        """Returns True if each bad row of this output was bad in what the call was given."""
        if any(cause.row_count != self.row_count for cause in causes):
            return True  # one value for a whole batch, as a timestep is
        return set(self.rows) <= {row for cause in causes for row in cause.rows}


@dataclass(frozen=True)
class ComponentCall:
    """One call of a component, so that it can be made again.

    Attributes:
        component: As in `Finding`: "unet", "text_encoder_2", "vae.decode".
        args: Positional arguments, the very objects.
        kwargs: Keyword arguments, the very objects.
    """

    component: str
    args: tuple
    kwargs: dict


class NonFiniteError(ValidationError):
    """A NaN or an Inf where none may be; `finding` says where."""

    def __init__(self, message, finding=None):
        """Takes the finding beside its message, so that the error survives pickling."""
        super().__init__(message)
        self.finding = finding


@dataclass
class GuardReport:
    """What a guard has seen so far; it iterates over its findings.

    Attributes:
        findings: In the order in which they arose; empty if all was finite.
        calls: Number of judged calls by component. Without calls nothing was looked at.
        bad_call: The call of the first finding, with what it was given, for a replay; else None.
    """

    findings: list[Finding] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    bad_call: ComponentCall | None = None

    def __iter__(self):
        """Iterates over the findings."""
        return iter(self.findings)

    def __len__(self):
        """Number of findings."""
        return len(self.findings)

    def __getitem__(self, index):
        """Returns one finding."""
        return self.findings[index]

    def __str__(self):
        """The findings' messages, and how many calls were judged."""
        calls = ", ".join(f"{name} {count}" for name, count in self.calls.items())
        found = "\n".join(finding.message for finding in self) or "no NaN, no Inf"
        return f"{found} (calls judged: {calls or 'none'})"


def find_tensors(value):
    """Yields the floating-point tensors in what a module takes or returns, however it is nested."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not value.is_meta:
            yield value
    elif isinstance(value, Mapping):  # the outputs of diffusers and transformers are mappings too
        for item in value.values():
            yield from find_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from find_tensors(item)
    elif is_dataclass(value):
        yield from find_tensors(vars(value))
    elif isinstance(value, DiagonalGaussianDistribution):  # what vae.encode returns
        yield value.parameters


def describe_bad(tensor, stage, step, timestep, component, argument):
    """Returns the Finding of a tensor that is known to hold NaN or Inf."""
    tensor = tensor.detach()
    rows = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    nan_count, inf_count = count_nonfinite(tensor)
    return Finding(
        stage=stage,
        step=step,
        timestep=timestep,
        component=component,
        tensor=argument,
        nan_count=nan_count,
        inf_count=inf_count,
        total=tensor.numel(),
        rows=tuple((~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()),
        row_count=len(rows),
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=tensor.device.type,
    )
