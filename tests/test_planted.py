"""The truths of `planted.py`, proved without `sdkit.diagnosis`: plain hooks, twins, the guard."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from campaign import parametrize
from other_pipelines import controlled, embed_an_image, give_edges, kandinsky
from planted import PLANTED
from planted_mini import PLANTED_IN_MINI
from planting import HALF, add_safety_checker, draw, image_to_image, nothing, start_from_grey

from sdkit.finding import find_tensors
from sdkit.guarding import guard
from sdkit.validation import is_finite, judge_image

pytestmark = pytest.mark.filterwarnings(
    "ignore::sdkit.emulate.EmulationWarning", "ignore:invalid value encountered in cast"
)
STAGES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "unet": "unet",
    "transformer": "unet",
    "vae": "vae",
    "movq": "vae",
    "controlnet": "unet",
}
WITHOUT_A_FAULT = {
    image_to_image: start_from_grey,
    controlled: give_edges,
    kandinsky: embed_an_image,
}
SILENT = ("hidden-nan", "underflow", "dark-but-valid", "safety-checker")


def generate(pipe, pipe_kwargs, prompts=("a shoe",)):
    """The images, and whether the safety checker flagged one."""
    return draw(pipe, prompts, **pipe_kwargs)


def watch(pipe, look):
    """Calls look(event, path, module, tensors, step) before and after each call of any module."""
    step = [-1]

    def attach(path, module):
        def before(module, args, kwargs):
            if path in ("unet", "transformer"):
                step[0] += 1
            unmasked = [value for name, value in kwargs.items() if "mask" not in name]
            look("enter", path, list(find_tensors([args, unmasked])), step[0])

        def after(module, args, output):
            look("leave", path, list(find_tensors(output)), step[0])

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    for component, root in pipe.components.items():
        if isinstance(root, torch.nn.Module) and component != "safety_checker":
            for name, module in root.named_modules():
                attach(f"{component}.{name}".rstrip("."), module)


def find_first_bad(pipe, pipe_kwargs, prompts=("a shoe",)):
    """(stage, step, module) of the first NaN or Inf that crosses any module's border.

    What a module was given whole and returns, or hands to a module inside it, spoilt, it spoilt
    itself: in its own code, for of the modules inside it none did.
    """
    running, found = [], []

    def look(event, path, tensors, step):
        if event == "leave":
            running.remove(path)
        if not found and not all(map(is_finite, tensors)):
            culprit = running[-1] if event == "enter" and running else path
            stage = STAGES[culprit.partition(".")[0]]
            # A ControlNet runs before the UNet does.
            found.append((stage, max(step, 0) if stage == "unet" else None, culprit))
        if event == "enter":
            running.append(path)

    watch(pipe, look)
    images, _ = generate(pipe, pipe_kwargs, prompts)
    return (found or [("none", None, None)])[0], images


def accepted(case):
    """All (stage, step, module) that are the truth."""
    return [(case.stage, step, module) for step, module in ((case.step, case.module), *case.also)]


def heal(case):
    """The same case without what makes it fail, and nothing else changed."""
    if case.cause in ("range-overflow", "underflow"):
        return replace(case, dtype=torch.float32)
    if case.cause == "uninitialised-memory":
        return replace(case, memory="zeros")
    if case.cause == "backend-fault":
        return replace(case, faults=lambda pipe: (), memory="zeros")
    return replace(case, plant=WITHOUT_A_FAULT.get(case.base, nothing))


def generate_guarded(case, tokenizer_folder):
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        with guard(pipe, on_nonfinite="record") as report:
            images, is_flagged = generate(pipe, pipe_kwargs)
    return SimpleNamespace(images=images, is_flagged=is_flagged, report=report)


def test_there_are_enough_and_their_names_differ():
    assert len(PLANTED) >= 30
    assert len({case.name for case in PLANTED}) == len(PLANTED)
    assert {case.stage for case in PLANTED} == {
        "text_encoder", "unet", "vae", "safety_checker", "none",
    }  # fmt: skip
    assert {case.cause for case in PLANTED if case.fast} == {case.cause for case in PLANTED}


EVERYTHING = (*PLANTED, *PLANTED_IN_MINI)
LOUD = [case for case in EVERYTHING if case.cause not in SILENT]


@parametrize(LOUD)
def test_the_first_bad_module_is_the_named_one(case, tokenizer_folder):
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        found, images = find_first_bad(pipe, pipe_kwargs, case.prompts)
    assert found in accepted(case)
    assert not judge_image(images).valid


@parametrize(EVERYTHING)
def test_weights_are_bad_where_the_truth_says_so_and_nowhere_else(case, tokenizer_folder):
    with case.build(tokenizer_folder) as (pipe, _):
        bad = [
            f"{root}.{name}".rpartition(".")[0]
            for root, component in pipe.components.items()
            if isinstance(component, torch.nn.Module)
            for name, tensor in component.state_dict().items()
            if not is_finite(tensor)
        ]
    is_weight = case.cause == "bad-weights" or "a bad weight" in case.name
    assert bad == [case.module] * is_weight


@parametrize(LOUD)
def test_without_the_plant_it_is_healthy(case, tokenizer_folder):
    healed = generate_guarded(heal(case), tokenizer_folder)
    assert len(healed.report) == 0, str(healed.report)
    assert judge_image(healed.images).valid


@parametrize([case for case in PLANTED if case.cause == "hidden-nan"])
def test_the_hidden_nan_is_there_and_nothing_tells(case, tokenizer_folder):
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        found, _ = find_first_bad(pipe, pipe_kwargs)
    assert found in accepted(case)
    seen = generate_guarded(case, tokenizer_folder)
    assert len(seen.report) == 0
    assert judge_image(seen.images).problem in ("flat", "all-black")


@parametrize([case for case in PLANTED if case.cause == "underflow"])
def test_the_named_module_is_the_first_to_flush(case, tokenizer_folder):
    """Call by call beside the float32 twin: the first output that is all zeros in float16 alone."""
    outputs, images = [], []
    for twin in (case, heal(case)):
        calls = []

        def look(event, path, tensors, step, calls=calls):
            if event == "leave" and tensors:
                calls.append((path, step, bool(tensors[0].any())))

        with twin.build(tokenizer_folder) as (pipe, pipe_kwargs):
            watch(pipe, look)
            images.append(generate(pipe, pipe_kwargs)[0])
        outputs.append(calls)
    flushed = [half[:2] for half, single in zip(*outputs, strict=True) if half[2] < single[2]]
    step = flushed[0][1] if case.stage == "unet" else None
    assert (case.stage, step, flushed[0][0]) in accepted(case)
    assert [judge_image(image).problem for image in images] == ["flat", None]
    assert len(generate_guarded(case, tokenizer_folder).report) == 0


@parametrize([case for case in PLANTED if case.cause == "dark-but-valid"])
def test_the_dark_picture_is_one_in_float32_too(case, tokenizer_folder):
    dark = generate_guarded(case, tokenizer_folder)
    twin = generate_guarded(replace(case, dtype=torch.float32), tokenizer_folder)
    assert len(dark.report) == 0 and not dark.is_flagged
    assert judge_image(dark.images).valid
    assert dark.images.std() > 0.001 and dark.images.max() < 0.15
    assert abs(dark.images - twin.images).max() < 0.01


@parametrize([case for case in PLANTED if case.cause == "safety-checker"])
def test_the_checker_blackens_what_was_valid(case, tokenizer_folder):
    flagged = generate_guarded(case, tokenizer_folder)
    assert flagged.is_flagged and len(flagged.report) == 0
    assert (flagged.images == 0).all()
    passed = generate_guarded(replace(case, plant=add_safety_checker(2.0)), tokenizer_folder)
    assert not passed.is_flagged and judge_image(passed.images).valid


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_pipe_itself_is_healthy(dtype, tokenizer_folder):
    case = replace(PLANTED[0], plant=nothing, dtype=dtype)
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        found, images = find_first_bad(pipe, pipe_kwargs)
    assert found == ("none", None, None) and judge_image(images).valid


def test_a_call_drawn_by_lot_is_clean_when_its_step_alone_is_made_again(tokenizer_folder):
    (case,) = [case for case in PLANTED if case.name == "a call drawn by lot"]
    kept = []
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        pipe.unet.register_forward_hook(
            lambda module, args, kwargs, output: kept.append((args, kwargs, output[0])),
            with_kwargs=True,
        )
        generate(pipe, pipe_kwargs)
        args, kwargs, output = kept[case.step]
        with torch.no_grad():
            again = pipe.unet(*args, **kwargs)[0]
    assert not is_finite(output) and is_finite(again)
