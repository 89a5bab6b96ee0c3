"""No component gave NaN, and an image is bad all the same: who swallowed, flushed or blackened it?

The run is repeated under the op-level trace, to find a NaN that an op lost again, and in float32,
to find what reduced precision lost. An image that float32 draws as dark is dark, not broken.
"""

from dataclasses import replace

import numpy as np
import torch

from sdkit.diagnosis.cause import Cause, find_cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.experiments import ATTENTION
from sdkit.diagnosis.place import describe, place_of, stage_of
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.diagnosis.whole_run import find_in_whole_run, list_modules
from sdkit.emulate.float16 import HALVES
from sdkit.guarding import find_components
from sdkit.loading.lifting import in_float32
from sdkit.validation import is_finite, judge_image

# Of an image in [0, 1]. Pictures of a night have a mean above this; the report's were 0.
DARK_MEAN = 0.06


def examine_images(pipe, run, call) -> Diagnosis:
    """Nothing NaN came out of any component: is an image bad all the same, and why?"""
    verdicts = [judge_image(image) for image in run.images]
    is_black = [verdict.problem == "all-black" for verdict in verdicts]
    means = [float(np.mean(image)) for image in run.images]
    evidence = {
        "images": len(verdicts),
        "valid_images": sum(verdict.valid for verdict in verdicts),
        "mean_brightness": min(means),
        "brightest_pixel": float(np.max(run.images)),
    }
    if any(run.is_censored):
        return Diagnosis(
            "safety_checker", None, "safety_checker", None, "safety-checker",
            {**evidence, "flagged_images": sum(run.is_censored), "black_images": sum(is_black)},
            "No number is broken: another prompt, or safety_checker=None where that is allowed.",
        )  # fmt: skip
    if any(verdict.problem in ("nan", "inf") for verdict in verdicts):
        return examine_after_decoding(pipe, call, evidence)
    is_bright = all(verdict.valid for verdict in verdicts) and min(means) >= DARK_MEAN
    hidden = (run.has_hidden or not is_bright) and find_swallowed(pipe, call, is_bright)
    if hidden:
        return hidden
    if run.has_hidden:
        evidence["within_a_component"] = "NaN or Inf, of which no op lost one in a second run"
    evidence.update(find_unread_weights(pipe))
    if is_bright:
        return Diagnosis(
            "none", None, None, None, "healthy", {**evidence, **find_hidden_overflow(pipe, call)}
        )
    evidence["problems"] = sorted({v.problem for v in verdicts if not v.valid})
    return examine_dark(pipe, call, evidence)


def examine_after_decoding(pipe, call, evidence) -> Diagnosis:
    """NaN in an image although no component gave one: what runs after the VAE made it."""
    bad = find_first_bad_op(call, find_components(pipe), outside_only=True)
    if bad:
        return describe("vae", None, None, bad, find_cause(bad))
    remedy = (
        "Look at what runs after the VAE: the image processor, a callback, a decoder of its own."
    )
    return Diagnosis("vae", None, None, None, "undecided", evidence, remedy)


def find_swallowed(pipe, call, is_bright) -> Diagnosis | None:
    """A NaN that an op made and another lost, so that the guard at the borders saw nothing.

    A bad weight is named as such where the images are valid all the same and nobody meant to repair
    it: attention on the CPU takes a NaN in its queries and gives a number.
    """
    bad, step = find_in_whole_run(pipe, call, "swallowed")
    if bad is None:
        return None
    made = find_cause(bad)
    is_repair = not is_bright or ATTENTION not in bad.swallowed_by
    name = made.name if made.name == "bad-weights" and not is_repair else "hidden-nan"
    evidence = {"made_by": made.name, **made.evidence, "swallowed_by": bad.swallowed_by}
    stage = stage_of(place_of(bad))
    return describe(stage, step, bad.module, bad, replace(made, name=name, evidence=evidence))


def find_unread_weights(pipe) -> dict:
    """Weights with NaN or Inf that this run did not read, for another prompt or image may."""
    bad = [
        f"{root}.{name}"
        for root, module in list_modules(pipe).items()
        for name, weight in module.named_parameters()
        if weight.is_floating_point() and not weight.is_meta and not is_finite(weight)
    ]
    return {"bad_weights_not_read": bad} if bad else {}


def examine_dark(pipe, call, evidence) -> Diagnosis:
    """Black, flat or dark without a NaN anywhere: float32 tells lost precision from the model."""
    components = find_components(pipe)
    if any(component.dtype in HALVES for component in components.values()):
        with in_float32(pipe):
            twin = call()
        if twin.is_valid and float(np.mean(twin.images)) >= DARK_MEAN:
            evidence["float32_mean_brightness"] = float(np.mean(twin.images))
            return describe_underflow(*find_in_whole_run(pipe, call, "flushed"), evidence)
        evidence["float32_is_no_better"] = True
    if evidence["valid_images"] == evidence["images"]:
        return Diagnosis(
            "none", None, None, None, "dark-but-valid", evidence,
            "Nothing is broken: another seed, prompt or scheduler makes a brighter image.",
        )  # fmt: skip
    return Diagnosis(
        "none", None, None, None, "undecided", evidence,
        "Every number is finite, and precision is not what makes it so: look at the VAE's weights "
        "and at the latents it is given (output_type='latent').",
    )  # fmt: skip


def describe_underflow(bad, step, evidence) -> Diagnosis:
    """float32 draws an image where float16 drew none, and nothing overflowed."""
    if bad is None:
        remedy = "Load the pipeline in float32, then component by component in float16."
        return Diagnosis("none", None, None, None, "undecided", evidence, remedy)
    component = place_of(bad).partition(".")[0]
    output = bad.outputs[0]
    cause = Cause(
        "underflow",
        {**evidence, "float16_largest": output.largest},
        f'Load {component} in float32: `load_pipeline(dtype={{"{component}": "float32"}})`; its '
        "values are too small for this dtype.",
    )
    stage = stage_of(place_of(bad))
    return describe(stage, step, bad.module, bad, cause)


def find_hidden_overflow(pipe, call) -> dict:
    """Whether diffusers' own rescue hides a fault: SDXL lifts a float16 VAE to float32.

    It does so while `vae.config.force_upcast` is set. The same latents are decoded once more in
    float16 to see what the rescue spares.
    """
    vae = getattr(pipe, "vae", None)
    is_lifted = vae is not None and getattr(vae.config, "force_upcast", False)
    if not is_lifted or vae.dtype is not torch.float16 or "XL" not in type(pipe).__name__:
        return {}
    decoded = []
    handle = vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    try:
        call()
    finally:
        handle.remove()

    def decode_in_float16():
        with torch.no_grad():
            return vae.decoder(decoded[-1].half())

    bad = find_first_bad_op(decode_in_float16, {"vae": vae})
    if bad is None:
        return {"force_upcast": "diffusers decoded in float32; float16 would have been finite too"}
    found = find_cause(bad)
    return {
        "force_upcast": "diffusers decoded in float32, which hides a fault of this VAE in float16",
        "hidden_cause": found.name,
        "hidden_module": bad.module,
        "hidden_op": bad.op,
    }
