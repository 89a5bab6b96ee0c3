"""`diagnose`: one guarded run, one replay of the call that broke, experiments, one answer."""

from dataclasses import replace

from sdkit.device import describe_environment
from sdkit.diagnosis.bad_call import examine_finding
from sdkit.diagnosis.bad_images import examine_images
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.guarded_run import (
    check_arguments,
    check_pipeline,
    check_prompts,
    run_guarded,
)
from sdkit.diagnosis.module_watch import uncompiled
from sdkit.diagnosis.remedy import prove_remedy
from sdkit.emulate import active as find_emulation
from sdkit.guarding import unguarded


def diagnose(pipe, prompts=None, *, seed=0, prove=False, **pipe_kwargs) -> Diagnosis:
    """Runs a pipeline once and says what is wrong with its images, where, and why.

    The images are made in one batch, from the noise that `generate` draws for the same seeds.

    Args:
        pipe: A diffusers pipeline with a UNet or a transformer, of images or of videos.
        prompts: One prompt or a list of them; None if `prompt_embeds` are given, or where the
            pipeline takes no prompt.
        seed: Image i is drawn from seed + i, on the CPU.
        prove: Run again with the remedy; it must come out valid.
        **pipe_kwargs: Handed on to the pipeline call (`num_inference_steps=10`, `latents=...`).

    Returns:
        A Diagnosis. Afterwards the pipeline is as it was: no hook, no mode, no changed weight.

    Raises:
        ValidationError: The pipeline or the arguments cannot work; nothing was run.
    """
    check_pipeline(pipe)
    prompts = check_prompts(pipe, prompts, pipe_kwargs)
    check_arguments(pipe, seed, pipe_kwargs)

    def call(without=()):
        kept = {name: value for name, value in pipe_kwargs.items() if name not in without}
        return run_guarded(pipe, prompts, seed, kept)

    with unguarded(pipe):  # a replay must reach the op, whatever guard the pipeline carries
        run = call()
        examine = examine_finding if run.finding else examine_images
        with uncompiled(pipe) as compiled:
            diagnosis = examine(pipe, run, call)
        if (diagnosis.module or "").partition(".")[0] in compiled:
            note = "found in eager replays; what was compiled was not looked into"
            diagnosis = replace(diagnosis, evidence={**diagnosis.evidence, "compiled": note})
        if prove:
            diagnosis = prove_remedy(pipe, diagnosis, call)
    return replace(
        diagnosis,
        environment=describe_environment(str(pipe._execution_device)),
        emulated=find_emulation(),
    )
