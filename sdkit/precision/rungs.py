"""The rungs of the ladder: what each changes, put on for the length of a block and taken off again.

Each is a context manager. It yields None, or a function that tells, once the images are drawn,
what there is to say: fields of a `Rung`.
"""

import copy
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from sdkit.attention import find_unsafe_processors
from sdkit.emulate import active as find_emulation
from sdkit.emulate.again import emulate_again
from sdkit.emulate.mode import find_settings
from sdkit.generation.record import describe_rescue
from sdkit.generation.rescue import Rescuer
from sdkit.loading.lifting import in_float32
from sdkit.loading.modules import find_models
from sdkit.loading.recipe import count_bytes, mixed_precision
from sdkit.precision.plan import plan_precision
from sdkit.precision.rebalancing import rebalance
from sdkit.slicing import REPLACEABLE, use_sliced_attention

AS_IT_IS = "float16 as it is"
NEWER_TORCH = "newer torch (emulated)"
PLANNED = "planned float16"
FLOAT32 = "float32"
HOW = {  # what to type to stay on a rung
    AS_IT_IS: 'load_pipeline(model, dtype="float16")',
    NEWER_TORCH: "pip install -U 'torch>=2.14'",
    "float16, SDPA": 'load_pipeline(model, dtype="float16", attention="sdpa")',
    "float16, safe slicing": 'load_pipeline(model, dtype="float16", attention="sliced")',
    "bfloat16": 'load_pipeline(model, dtype="bfloat16")',
    "float16, VAE float32": 'load_pipeline(model, dtype={"default": "float16", "vae": "float32"})',
    "rebalanced float16": 'load_pipeline("{folder}/model", dtype="float16")',
    PLANNED: 'load_pipeline(model, recipe="{folder}/recipe.json")',
    "float16, rescued": 'generate(pipe, prompts, on_nonfinite="rescue")',
    FLOAT32: 'load_pipeline(model, dtype="float32")',
}


def list_steps(pipe, prompts, seed, pipe_kwargs, every_rung=False):
    """(name, change, how to put it on) of each rung that there is for this pipeline here.

    Args:
        pipe: The pipeline, in float32.
        prompts: For the plan.
        seed: For the plan.
        pipe_kwargs: For the plan.
        every_rung: Change the attention too where it is safe already.
    """
    half, brain = torch.float16, torch.bfloat16
    settings = find_settings()
    steps = [(AS_IT_IS, "Nothing.", lambda: mixed_precision(pipe, [], half))]
    if settings and settings["faults"]:
        steps.append(
            (
                NEWER_TORCH,
                "Upgrade torch: the kernel keeps its contract.",
                lambda: honest_kernel(pipe, settings),
            )
        )
    if every_rung or find_unsafe_processors(pipe):
        steps += [
            ("float16, SDPA", "Fused attention.", lambda: with_attention(pipe, fused_attention)),
            ("float16, safe slicing", "Slices that read no fresh memory.",
             lambda: with_attention(pipe, sliced_attention)),
        ]  # fmt: skip
    vae = ["vae"] if getattr(pipe, "vae", None) is not None else []
    return [
        *steps,
        ("bfloat16", "float32's range, 8 bits.", lambda: mixed_precision(pipe, [], brain)),
        ("float16, VAE float32", "The VAE in float32.", lambda: mixed_precision(pipe, vae, half)),
        ("rebalanced float16", "Powers of two moved within.", lambda: rebalanced(pipe)),
        (PLANNED, "The least float32 that draws right.",
         lambda: planned(pipe, prompts, seed, pipe_kwargs)),
        ("float16, rescued", "Bad calls again in float32.", lambda: rescued(pipe)),
        (FLOAT32, "Everything in float32.", lambda: in_float32(pipe)),
    ]  # fmt: skip


@contextmanager
def restored_processors(pipe):
    """Yields the attention layers that may be given another processor; the old ones come back."""
    layers = [
        module
        for model in find_models(pipe).values()
        for module in model.modules()
        if isinstance(module, Attention) and type(module.processor) in REPLACEABLE
    ]
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.set_processor, layer.processor)
        yield layers


@contextmanager
def fused_attention(pipe):
    """SDPA in place of what slices or spells attention out."""
    with restored_processors(pipe) as layers:
        for layer in layers:
            layer.set_processor(AttnProcessor2_0())
        yield


@contextmanager
def sliced_attention(pipe):
    """Our own slices, which read no fresh memory."""
    with restored_processors(pipe):
        use_sliced_attention(pipe)
        yield


@contextmanager
def with_attention(pipe, attention):
    """float16 with another attention."""
    with attention(pipe), mixed_precision(pipe, [], torch.float16):
        yield


@contextmanager
def honest_kernel(pipe, settings):
    """float16 on the same emulated backend without its faults."""
    honest = {**settings, "faults": []}
    with mixed_precision(pipe, [], torch.float16), emulate_again(honest):
        yield


@contextmanager
def rebalanced(pipe):
    """Copies of UNet and VAE, rebalanced, in float16; tells what was moved."""
    with ExitStack() as undo:
        notes = []
        for name in ("unet", "vae"):
            model = getattr(pipe, name, None)
            if model is None:
                continue
            ours = copy.deepcopy(model)
            report = rebalance(ours)
            notes.append(f"{name}: {len(report.exponents)} streams moved")
            undo.callback(setattr, pipe, name, model)
            setattr(pipe, name, ours)
        undo.enter_context(mixed_precision(pipe, [], torch.float16))
        yield lambda: {"note": "; ".join(notes)}


@contextmanager
def planned(pipe, prompts, seed, pipe_kwargs):
    """The least float32; tells its recipe."""
    recipe = plan_precision(pipe, prompts, seed=seed, progress=False, **pipe_kwargs)
    note = f"float32: {', '.join(recipe.float32) or 'nothing'}; found in {recipe.trials} runs"
    with mixed_precision(pipe, recipe.float32, torch.float16):
        yield lambda: {"note": note, "recipe": recipe}


@contextmanager
def rescued(pipe):
    """float16 with somebody standing by; tells what was rescued.

    What is rescued holds its float32 copy beside its float16 weights: both count.
    """
    rescuer = Rescuer(pipe, is_emulated=find_emulation() is not None)

    def tell():
        lifted = {rescue.component.partition(".")[0] for rescue in log.rescues}
        copies = sum(4 * p.numel() for name in lifted for p in getattr(pipe, name).parameters())
        return {"note": describe_rescue(log.to_dict()), "weight_bytes": at_rest + copies}

    with mixed_precision(pipe, [], torch.float16):
        at_rest = count_bytes(pipe)
        with rescuer.installed() as log:
            yield tell
