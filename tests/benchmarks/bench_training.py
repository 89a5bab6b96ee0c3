"""The trainer against a plain loop in the report's setting: same model, images, draws and losses.

The baseline is `tests/plain_training.py`: 2 images at a time, 8 times, gradient checkpointing,
every image and caption encoded in every step. Both take their steps in turn, on all cores by the
wall clock, for that is what a user waits for. Each lever then stands alone beside its arithmetic
bound, which comes from the parts as they were timed between its steps: on one thread and by the
process's own clock, which other programs' load does not reach.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import StableDiffusionPipeline
from pairs import summarize

sys.path.insert(0, str(Path(__file__).parent.parent))
from plain_training import PlainTraining

from sdkit import ImageCaptionDataset, LoRAConfig, load_pipeline, train_lora
from sdkit.finetuning.batches import draw_batch
from sdkit.finetuning.dataset import Example
from sdkit.finetuning.encoding import EncodedDataset, encode_dataset
from sdkit.finetuning.gradient_step import compute_gradients, take_step
from sdkit.finetuning.training_run import begin_run
from sdkit.guarding import remove_guard
from sdkit.memory import build_architecture
from sdkit.mini.recipe import make_scheduler

STEPS, PAIRS = 20, 5
SPEEDUP, LOSS_DIFFERENCE, OF_BOUND = ">= 3", "<= 1e-05", 0.95
CLOCK = time.process_time
# Without it glibc keeps what is freed, and the mark shows the allocator instead of the training.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure() -> list[dict]:
    """Rows: the whole and its losses, the way to the first step, each lever, SD 1.5's size."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        rows = measure_whole(Path(name))
        torch.set_num_threads(1)
        try:
            return [*rows, *measure_levers(Path(name)), *measure_sd15(Path(name))]
        finally:
            torch.set_num_threads(threads)


def make_config(folder, name, **changes) -> LoRAConfig:
    """The defaults, which are the report's, for a few steps and without looks on the way."""
    return LoRAConfig(
        backend="cpu", max_train_steps=STEPS, validation_steps=None, checkpointing_steps=1000,
        output_folder=folder / name, cache_folder=folder / "encoded",
    ).replace(**changes)  # fmt: skip


def load_mini():
    """The bundled model without a guard, which the plain loop would not have."""
    pipe, _ = load_pipeline("mini", dtype="float32", backend="cpu", progress=False)
    remove_guard(pipe)
    return pipe


def begin_plain(config) -> PlainTraining:
    pipe = load_mini()
    resolution = pipe.unet.config.sample_size * 8
    examples = ImageCaptionDataset("mini", resolution=resolution, progress=False)
    return PlainTraining(pipe, examples, config, clock=CLOCK)


def measure_whole(folder) -> list[dict]:
    """Twenty steps of both in turn: seconds, losses, peak memory, and the way to the first step."""
    config, plain_losses, seconds = make_config(folder, "whole"), [], []
    started = time.perf_counter()
    plain = begin_plain(config)
    plain_start = time.perf_counter() - started
    clock = SimpleNamespace(at=time.perf_counter())

    def take_plain_step(record):
        ours, begun = time.perf_counter() - clock.at, time.perf_counter()
        plain_losses.append(plain.step(record.step))
        seconds.append((time.perf_counter() - begun, ours))
        clock.at = time.perf_counter()

    report = train_lora(config, on_step=take_plain_step, progress=False)
    assert report.steps_done == STEPS, report
    encoded_before = measure_seconds_to_first_step(make_config(folder, "again"))
    case = f"mini, 2 x 8, {STEPS} steps, float32, cpu"
    sides = {"baseline": "plain loop", "ours": "train_lora"}
    first_plain, first_ours = plain_start + seconds[0][0], seconds[0][1]
    differences = [
        abs(ours - theirs) / theirs
        for theirs, (_, ours) in zip(plain_losses, report.losses, strict=True)
    ]
    peaks = {f"{who}_peak_gib": measure_peak_gib(who) for who in sides}
    whole = summarize(seconds[1:], speedup=True)
    return [
        {
            "benchmark": "training", "case": f"{case}, a step", **sides, **whole, **peaks,
            "limit": SPEEDUP,
            **{f"{who}_images_per_second": config.effective_batch / whole[f"{who}_seconds"]
               for who in sides},
        },
        {
            "benchmark": "training", "case": f"{case}, greatest relative difference of a loss",
            **sides, "ratio": max(differences), "limit": LOSS_DIFFERENCE,
        },
        *(
            {
                "benchmark": "training", "case": f"mini, from start to first step, {what}",
                **sides, **summarize([(first_plain, ours)]),
            }
            for what, ours in (
                ("200 images to encode", first_ours), ("encoded by an earlier run", encoded_before)
            )
        ),
    ]  # fmt: skip


def measure_seconds_to_first_step(config) -> float:
    """From the call to the end of the first step."""
    times, started = [], time.perf_counter()
    config = config.replace(max_train_steps=1)
    train_lora(config, on_step=lambda record: times.append(time.perf_counter()), progress=False)
    return times[0] - started


def measure_peak_gib(who) -> float:
    """The most resident memory of a process that trains two steps, above what imports take."""
    result = subprocess.run(
        [sys.executable, __file__, who],
        capture_output=True, text=True, check=True, env=os.environ | ALLOCATOR,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def train_two_steps(who, folder) -> float:
    """What the process of `measure_peak_gib` does."""
    config = make_config(folder, "memory", max_train_steps=2)
    begun = read_status("VmRSS:")
    if who == "ours":
        train_lora(config, progress=False)
    else:
        plain = begin_plain(config)
        for number in range(2):
            plain.step(number)
    return (read_status("VmHWM:") - begun) / 2**20


def read_status(name) -> int:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_levers(folder) -> list[dict]:
    """Each lever alone, the others as the report has them or as they were before it."""
    plain = begin_plain(make_config(folder, "plain"))
    data = encode_dataset(plain.pipe, plain.examples, folder / "encoded", progress=False), None
    given, without = {"micro_batch": "given"}, {"gradient_checkpointing": False}
    ways = {
        "cached": given,
        "no checkpointing": given | without,
        "16": {"micro_batch": 16} | without,
    }
    steps = {
        name: make_stepper(make_config(folder, name, **changes), data)
        for name, changes in ways.items()
    }
    unet = steps["no checkpointing"].run.pipe.unet
    seconds = []
    for number in range(PAIRS + 1):
        encoded_before = plain.encode_seconds
        found = {"plain": measure_seconds(plain.step, number)}
        found["encode"] = plain.encode_seconds - encoded_before
        found |= {name: measure_seconds(step) for name, step in steps.items()}
        found["forward 8 x 2"], found["both 8 x 2"] = measure_passes(unet, data[0], 8, 2)
        _, found["both 16"] = measure_passes(unet, data[0], 1, 16)
        seconds.append(found)
    del seconds[0]  # warm-up
    return [
        make_lever_row(
            f"mini, {name}",
            [(found[before], found[after]) for found in seconds],
            statistics.median(find_bound(found) for found in seconds),
        )
        for name, before, after, find_bound in (
            ("cached latents and embeddings", "plain", "cached",
             lambda t: t["plain"] / (t["plain"] - t["encode"])),
            ("no checkpointing", "cached", "no checkpointing",
             lambda t: 1 + t["forward 8 x 2"] / t["no checkpointing"]),
            ("16 at a time", "no checkpointing", "16", lambda t: t["both 8 x 2"] / t["both 16"]),
        )
    ]  # fmt: skip


def make_lever_row(case, measured, bound) -> dict:
    return {
        "benchmark": "training, one lever", "case": case, "baseline": "without it", "ours": "with",
        **summarize(measured, speedup=True), "bound": bound, "limit": f">= {OF_BOUND * bound:.4f}",
    }  # fmt: skip


def make_stepper(config, data, pipe=None):
    """A function that takes the trainer's next step, with its gates; `run` is the TrainingRun."""
    run, _ = begin_run(config, pipe=pipe or load_mini(), data=data, progress=False)
    numbers = count()

    def step():
        batch = draw_batch(run.train, config, 1000, next(numbers))
        _, norm, gate = compute_gradients(run, batch)
        assert not (gate or take_step(run, 1e-4, norm))

    step.run = run
    return step


def measure_passes(unet, encoded, count, size) -> tuple:
    """Seconds of `count` forward passes, and of both, of the bare UNet on `size` images."""
    latents = encoded.latent_mean[:size]
    prompt_embeds = encoded.prompt_embeds[encoded.caption_index[:size]]
    forward, begun = 0.0, CLOCK()
    for _ in range(count):
        forward_begun = CLOCK()
        output = unet(latents, torch.full((size,), 500), prompt_embeds).sample
        forward += CLOCK() - forward_begun
        output.square().mean().backward()
    return forward, CLOCK() - begun


def measure_sd15(folder) -> list[dict]:
    """SD 1.5's exact configuration, random weights: caching alone, one micro-batch of each."""
    config = make_config(folder, "sd15", gradient_accumulation_steps=1, micro_batch="given")
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 512, 512, generator=noise) * 2 - 1
    examples = [Example("", image, "black casual shoes") for image in images]
    plain = PlainTraining(build_sd15(), examples, config, clock=CLOCK)
    plain_seconds, encode_seconds = measure_seconds(plain.step, 0), plain.encode_seconds
    del plain  # two such models would not fit everywhere
    step = make_stepper(config, (make_random_data(noise), None), build_sd15())
    measured = [(plain_seconds, measure_seconds(step))]
    bound = plain_seconds / (plain_seconds - encode_seconds)
    return [make_lever_row("SD 1.5 at 512, cached latents and embeddings", measured, bound)]


def build_sd15() -> StableDiffusionPipeline:
    """Random weights; the bundled model's tokenizer, whose tokens are among SD 1.5's."""
    return StableDiffusionPipeline(
        **build_architecture("sd15", device="cpu"), scheduler=make_scheduler(),
        tokenizer=load_mini().tokenizer, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def make_random_data(noise) -> EncodedDataset:
    """Two images as SD 1.5's VAE and text encoder would have encoded them, in shape."""
    mean = torch.randn(2, 4, 64, 64, generator=noise)
    return EncodedDataset(
        names=("a", "b"), captions=("", "a shoe"), latent_mean=mean,
        latent_std=torch.ones_like(mean), flipped_mean=None, flipped_std=None,
        caption_index=torch.ones(2, dtype=torch.long),
        prompt_embeds=torch.randn(2, 77, 768, generator=noise),
        input_ids=torch.zeros(2, 77, dtype=torch.long), fingerprint="random", scaling_factor=0.18,
    )  # fmt: skip


def measure_seconds(function, *args) -> float:
    begun = CLOCK()
    function(*args)
    return CLOCK() - begun


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own_folder:
        print(json.dumps(train_two_steps(sys.argv[1], Path(own_folder))))
