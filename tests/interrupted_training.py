"""Trains in processes that are killed: one import for all, a fork for each try.

python interrupted_training.py TOKENIZER_FOLDER OUTPUT_FOLDER SEED: prints one JSON line a try.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config, make_data

from sdkit.finetuning.run_start import CONFIG_FILE
from sdkit.finetuning.training import train_lora
from sdkit.validation import ValidationError

STEPS = 6


def train(tokenizer_folder, folder, on_step=None):
    """Begins, or goes on."""
    pipe = build_tiny_pipe(tokenizer_folder)
    config = make_config(
        folder, max_train_steps=STEPS, checkpointing_steps=1, checkpoints_total_limit=2,
        micro_batch=2, gradient_accumulation_steps=2, validation_steps=2, caption_dropout=0.2,
        noise_offset=0.1,
    )  # fmt: skip
    return train_lora(
        config, pipe=pipe, data=make_data(pipe), resume=(folder / CONFIG_FILE).exists(),
        on_step=on_step, progress=False,
    )  # fmt: skip


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds):
    """Somewhere: in a step, between two, in a save."""
    threading.Thread(target=lambda: (time.sleep(seconds), kill_self()), daemon=True).start()


def kill_at_file_operation(count):
    """Just before the n-th change on the disk, which saves make alone."""
    left = [count]

    def before(event, args):
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
        writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if changes or writes:
            left[0] -= 1
            if left[0] == 0:
                kill_self()

    sys.addaudithook(before)


def interrupt_after_step(step):
    def watch(record):
        if record.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


def fill_disk_after_step(step):
    def watch(record):
        if record.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    return watch


def attempt(tokenizer_folder, folder, prepare=None, on_step=None):
    """One try in a process of its own."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        if prepare:
            prepare()
        try:
            report = train(tokenizer_folder, folder, on_step)
            result = {"stopped": report.stopped, "losses": report.losses}
        except ValidationError as error:
            result = {"error": str(error)}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reader, "rb") as pipe_end:
        result = json.loads(pipe_end.read() or b"{}")
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, **result}


def main(tokenizer_folder, output_folder, seed):
    output_folder = Path(output_folder)
    chance = random.Random(int(seed))

    def run(name, **how):
        result = attempt(tokenizer_folder, output_folder / name, **how)
        print(json.dumps({"name": name, **result}), flush=True)
        return result

    begun = time.monotonic()
    run("whole")
    seconds = time.monotonic() - begun
    for name, kill, least, most in (
        ("killed_in_saves", kill_at_file_operation, 1, 16),
        ("killed_any_time", kill_after, 0.4 * seconds, 0.8 * seconds),
    ):
        for _ in range(6):
            draw = chance.randint if isinstance(least, int) else chance.uniform
            count = draw(least, most)
            result = run(name, prepare=lambda kill=kill, count=count: kill(count))
            if not result["killed"]:
                break
        run(name)
    run("interrupted", on_step=interrupt_after_step(2))
    run("interrupted")
    run("disk_full", on_step=fill_disk_after_step(3))
    run("disk_full")


if __name__ == "__main__":
    main(*sys.argv[1:])
