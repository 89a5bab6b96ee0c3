"""How large the numbers get: every module's output in one run, and Q.K^T before it is scaled.

Hooks look and change nothing; one number an output stays on the device until the run is over.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from sdkit.diagnosis.place import stage_of
from sdkit.emulate.mode import suspended
from sdkit.finding import find_tensors
from sdkit.guarding import find_components, find_denoisers, unguarded
from sdkit.steps import StepCounter

# B batch, L tokens, D width of all heads, H heads


@dataclass(frozen=True)
class Activation:
    """One output of one module.

    Attributes:
        stage: "text_encoder", "unet" (a transformer too) or "vae".
        step: Index of the denoising loop, None outside of it.
        module: Dotted path from the pipeline.
        largest: Greatest magnitude; Inf or NaN where there was one.
    """

    stage: str
    step: int | None
    module: str
    largest: float


@dataclass(frozen=True)
class Score:
    """The greatest Q.K^T of one attention in a run, signed.

    One that is too negative for float16 is harmless: -Inf leaves softmax as a weight of 0. +Inf
    makes its whole row NaN.

    Attributes:
        module: Dotted path from the pipeline.
        unscaled: Greatest Q.K^T, at least 0.
        scaled: The same after the division by the square root of a head's width.
    """

    module: str
    unscaled: float
    scaled: float


def measure_activations(pipe, prompts, *, seed=0, **pipe_kwargs) -> tuple[Activation, ...]:
    """Runs a pipeline and measures what every module of it puts out, in the order of execution.

    In float32 this tells which module would not fit float16, without anything breaking.

    Args:
        pipe: A diffusers pipeline.
        prompts: One prompt or a list of them.
        seed: Image i is drawn from seed + i, on the CPU.
        **pipe_kwargs: Handed on to the pipeline call.

    Returns:
        One Activation an output. Afterwards the pipeline is as it was.
    """
    seen, steps = [], StepCounter(pipe)
    components = find_components(pipe)

    def look_from(path):
        stage = stage_of(path)

        def look(module, args, output):
            step = steps.step if stage == "unet" else None
            with suspended():
                seen.extend((stage, step, path, t.abs().amax()) for t in find_tensors(output))

        return look

    with ExitStack() as undo:
        undo.enter_context(steps.following(find_denoisers(pipe)))
        for root, component in components.items():
            for name, module in component.named_modules():
                path = f"{root}.{name}".rstrip(".")
                undo.callback(module.register_forward_hook(look_from(path)).remove)
        run_once(pipe, prompts, seed, pipe_kwargs)
    return tuple(Activation(stage, step, path, float(x)) for stage, step, path, x in seen)


def measure_scores(pipe, prompts, *, seed=0, **pipe_kwargs) -> tuple[Score, ...]:
    """Runs a pipeline and measures the greatest Q.K^T of every attention that diffusers made.

    A backend that rounds Q.K^T to float16 before it scales needs the unscaled one to fit.

    Args:
        pipe: A diffusers pipeline, in float32.
        prompts: One prompt or a list of them.
        seed: Image i is drawn from seed + i, on the CPU.
        **pipe_kwargs: Handed on to the pipeline call.

    Returns:
        One Score an attention, in the order of execution. Afterwards the pipeline is as it was.
    """
    latest, largest, scales = {}, {}, {}

    def keep(path, name):
        def note(module, args, output):
            latest[path, name] = output.detach()  # B, L, D

        return note

    def multiply(path):
        def look(module, args, output):
            scales[path] = module.scale
            query, key = (latest.pop((path, name)) for name in ("to_q", "to_k"))
            with suspended():
                found = [largest.get(path, query.new_zeros(()))]
                heads = (tensor.chunk(module.heads, -1) for tensor in (query, key))
                for q, k in zip(*heads, strict=True):
                    found.append((q.float() @ k.float().mT).amax())
                largest[path] = torch.stack(found).amax()

        return look

    with ExitStack() as undo:
        for root, component in find_components(pipe).items():
            for name, module in component.named_modules():
                if hasattr(module, "to_q") and hasattr(module, "heads"):
                    path = f"{root}.{name}"
                    hooks = [(module.to_q, keep(path, "to_q")), (module.to_k, keep(path, "to_k"))]
                    for inner, hook in (*hooks, (module, multiply(path))):
                        undo.callback(inner.register_forward_hook(hook).remove)
        run_once(pipe, prompts, seed, pipe_kwargs)
    return tuple(Score(p, float(x), float(x) * scales[p]) for p, x in largest.items())


def run_once(pipe, prompts, seed, pipe_kwargs):
    """The pipeline call as a user makes it, with no guard to stop it."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    with unguarded(pipe):
        pipe(prompts, **{"generator": generators, **pipe_kwargs, "output_type": "np"})
