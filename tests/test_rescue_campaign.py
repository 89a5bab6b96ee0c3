"""Rescue over the fault matrix: what float32 can save is saved, as well as a plan would; else told.

The short campaign runs always, all of it with `make test-all`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from planted import PLANTED
from planted_mini import PLANTED_IN_MINI

from sdkit import generate
from sdkit.finding import NonFiniteError
from sdkit.generation.rescue import Rescuer
from sdkit.guarding import unguarded
from sdkit.precision.drawing import check_reference, draw_images, measure_psnr
from sdkit.precision.ladder import DECENT_DB
from sdkit.precision.plan import measure_healthy_db
from sdkit.precision.rounding import GRIDS, MORE_GRIDS

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")
TOLERANCE_DB = 1.0  # as plan_precision's
# float16 that breaks where float32 would not: too large a number, or a kernel.
CAUSES = ("range-overflow", "backend-fault")
IN_VAIN = "a guidance scale of a million"  # the scheduler's sum overflows, which is no component
FAST = {
    "UNet conv1, exact scaling", "VAE decoder conv1, exact scaling", "text encoder stream",
    "a step drawn by lot, one element",
}  # fmt: skip
FAST_BROKEN = {"a NaN weight in the UNet", "a weight that overflows to -Inf in the cast"}


def choose(causes, fast):
    """The cases of these causes in float16, all but the short campaign's marked slow."""
    cases = [
        case for case in (*PLANTED, *PLANTED_IN_MINI)
        if case.cause in causes and case.dtype is torch.float16 and case.name != IN_VAIN
    ]  # fmt: skip
    assert fast <= {case.name for case in cases}
    return [
        pytest.param(case, id=case.name, marks=[] if case.name in fast else pytest.mark.slow)
        for case in cases
    ]


def without_faults(case, dtype):
    """The same model on an honest backend."""
    return replace(case, dtype=dtype, memory=None, faults=lambda pipe: ())


def measure_healthy(case, tokenizer_folder):
    """(float32 images, dB that float16 reaches where nothing is broken): drawn, or by rounding."""
    with without_faults(case, torch.float32).build(tokenizer_folder) as (pipe, pipe_kwargs):

        def draw():
            return draw_images(pipe, ["a shoe"], 0, pipe_kwargs)

        with unguarded(pipe):
            reference = check_reference(draw())
            # Four roundings, as a plan asks where it is a near thing: one image is half chance.
            grids = (*GRIDS, *MORE_GRIDS)
            healthy_db = measure_healthy_db(pipe, draw, reference, torch.float16, grids)
    if case.cause == "backend-fault":  # else float16 itself is what is broken
        with without_faults(case, torch.float16).build(tokenizer_folder) as (pipe, pipe_kwargs):
            honest = draw_images(pipe, ["a shoe"], 0, pipe_kwargs)
        healthy_db = min(healthy_db, measure_psnr(honest, reference))
    assert healthy_db > DECENT_DB
    return reference, healthy_db


def as_pictures(pipe_kwargs):
    """The arguments with their arrays as pictures, which `generate` takes."""
    image = pipe_kwargs.get("image")
    if not isinstance(image, np.ndarray):
        return pipe_kwargs
    return {**pipe_kwargs, "image": Image.fromarray((255 * image.squeeze()).astype(np.uint8))}


@pytest.mark.parametrize("case", choose(CAUSES, FAST))
def test_what_float32_can_save_is_saved(case, tokenizer_folder):
    reference, healthy_db = measure_healthy(case, tokenizer_folder)
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        record = generate(
            pipe, "a shoe", on_nonfinite="rescue", progress=False, **as_pictures(pipe_kwargs)
        )
    assert record.valid_count == 1
    assert record.rescue["rescues"] and all(r["rescued"] for r in record.rescue["rescues"])
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):  # again, for the floats
        with Rescuer(pipe, is_emulated=True).installed():
            images = draw_images(pipe, ["a shoe"], 0, pipe_kwargs)
    assert measure_psnr(images, reference) >= healthy_db - TOLERANCE_DB


@pytest.mark.parametrize("case", choose(("bad-weights",), FAST_BROKEN))
def test_what_float32_cannot_save_is_told_with_its_incident(case, tokenizer_folder, tmp_path):
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        with pytest.raises(NonFiniteError) as caught:
            generate(
                pipe, "a shoe", on_nonfinite="rescue", progress=False, output_folder=tmp_path,
                **pipe_kwargs,
            )  # fmt: skip
    assert not any(rescue["rescued"] for rescue in caught.value.record.rescue["rescues"])
    assert (tmp_path / "incident_000" / "call.safetensors").is_file()
    assert not list(tmp_path.glob("*.png"))
