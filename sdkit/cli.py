"""The command line: `sdkit demo` tells the whole story, `sdkit doctor` checks up on the machine.

What a command needs is imported inside it, so that `sdkit --help` answers at once. Every error is
one sentence and a next step; exit 1 means that something was found bad, 2 that a command cannot
be carried out as it was given.
"""

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm")
BAD, UNUSABLE = 1, 2

app = typer.Typer(
    name="sdkit",
    help="Find why Stable Diffusion images come out black, fix it, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main():
    """Find why Stable Diffusion images come out black, fix it, and prove it."""
    # A file name may hold bytes that no encoding knows; it must not end in a traceback.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")


@app.command()
def check(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Image files, and folders to search for images."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
):
    """Tell valid images from black, flat, damaged and unreadable ones.

    Files are judged whatever their name; in folders, and the folders in them, all files with the
    ending of an image. Exits with 1 if any is bad.
    """
    files = find_image_files(paths)
    from sdkit.verdict import judge_image_file

    verdicts = {file: judge_image_file(file) for file in files}
    bad_count = sum(not verdict.valid for verdict in verdicts.values())
    if as_json:
        images = [{"path": str(file), **asdict(v)} for file, v in verdicts.items()]
        typer.echo(
            json.dumps({"checked": len(files), "bad": bad_count, "images": images}, indent=2)
        )
    else:
        _print_verdicts(verdicts)
        typer.echo(f"{len(files)} checked, {bad_count} bad")
    raise typer.Exit(BAD if bad_count else 0)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the executed notebooks, images and index.html.")
    ] = Path("runs/demo"),
    steps: Annotated[
        int, typer.Option(help="Denoising steps an image; fewer is a quicker look.", min=1)
    ] = 25,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
):
    """Run the notebooks in order on the bundled model, offline, and print one verdict table.

    Exits with 1 if a notebook failed or a verdict is not the one that the story tells.
    """
    from sdkit.demo import format_table, run_demo
    from sdkit.validation import ValidationError

    try:
        runs = run_demo(output, parameters={"num_inference_steps": steps})
    except (ValidationError, OSError) as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
    else:
        typer.echo(format_table(runs))
        typer.echo(f"\n{output / 'index.html'}: the whole story on one page")
    if not all(run.is_good for run in runs):
        raise typer.Exit(BAD)


@app.command()
def doctor(
    backend: Annotated[str, typer.Option(help="auto, mps, cuda, cuda:1 or cpu.")] = "auto",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Probe at the sizes of Stable Diffusion 1.5.")
    ] = False,
    emulate: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="Show an emulated Mac with this fault; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Choose dtypes for this model on disk, not for SD 1.5.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run the probes again, whatever is kept of them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not text.")] = False,
):
    """Check up on this machine: versions, device, what it computes wrongly, what to do.

    Exits with 1 if a probe failed.
    """
    from sdkit.diagnosis.doctor import check_up
    from sdkit.diagnosis.doctor_text import format_checkup
    from sdkit.validation import ValidationError

    try:
        checkup = check_up(
            backend, thorough=thorough, faults=tuple(emulate or ()), model=model, fresh=fresh,
            progress=True,
        )  # fmt: skip
    except (ValidationError, OSError) as error:
        _fail(error)
    typer.echo(checkup.to_json() if as_json else _colour(format_checkup(checkup)))
    raise typer.Exit(BAD if checkup.failed else 0)


@app.command()
def diagnose(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="mini (the bundled one), a folder, a file or a Hub id.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, mps, cuda, cuda:1 or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    attention: Annotated[str, typer.Option(help="sdpa, sliced or diffusers-sliced.")] = "sdpa",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Image i is drawn from seed + i.")] = 0,
    incident: Annotated[
        Path | None, typer.Option(help="A folder incident_... that generate left: replay it.")
    ] = None,
    emulate: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="On an emulated Mac with this fault; repeatable."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Fresh memory of the emulated Mac: zeros, nan, stale_float32, ..."),
    ] = None,
    prove: Annotated[bool, typer.Option(help="Run again with the remedy.")] = True,
    reproduction: Annotated[
        Path | None, typer.Option(help="Where to write the script that shows a backend fault.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not text.")] = False,
):
    """Name the stage, step, module, op and cause behind a broken image, and prove the remedy.

    Exits with 1 if something is broken, with 0 if the images are healthy.
    """
    from sdkit.diagnosis.incident_replay import diagnose_incident
    from sdkit.diagnosis.model import diagnose_model
    from sdkit.run_folder import replace_file
    from sdkit.validation import ValidationError

    if incident and prompts:
        _fail("--incident brings its own prompt: leave the other out.")
    try:
        if incident:
            found = diagnose_incident(incident, model=model, backend=backend, prove=prove)
        else:
            found = diagnose_model(
                model or "mini", prompts, backend=backend, dtype=dtype, attention=attention,
                memory=memory, faults=emulate, seed=seed, prove=prove,
                num_inference_steps=steps, guidance_scale=guidance,
            )  # fmt: skip
    except (ValidationError, OSError) as error:
        _fail(error)
    typer.echo(found.to_json() if as_json else str(found))
    if reproduction and not found.reproduction:
        typer.echo(f"{reproduction}: not written, this cause needs none", err=True)
    elif reproduction:
        try:
            with replace_file(reproduction) as temporary:
                temporary.write_text(found.reproduction)
        except OSError as error:
            _fail(f"{reproduction}: cannot be written ({error.strerror}).")
    raise typer.Exit(0 if found.is_healthy else BAD)


@app.command()
def fix(
    model: Annotated[str, typer.Argument(help="mini, a folder, a file or a Hub id.")] = "mini",
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the recipe or model, fix.json and the picture.")
    ] = Path("runs/fix"),
    backend: Annotated[str, typer.Option(help="auto, mps, cuda, cuda:1 or cpu.")] = "auto",
    attention: Annotated[str, typer.Option(help="sdpa, sliced or diffusers-sliced.")] = "sdpa",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 10,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Image i is drawn from seed + i.")] = 0,
    emulate: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="On an emulated Mac with this fault; repeatable."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Fresh memory of the emulated Mac: zeros, nan, stale_float32, ..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not text.")] = False,
):
    """Find the smallest change with which a model draws right in float16, prove it, and keep it.

    Exits with 1 if nothing cures.
    """
    from sdkit.diagnosis.model import PROMPT, choose_emulation
    from sdkit.precision.fixing import fix_model
    from sdkit.validation import ValidationError

    try:
        emulation = choose_emulation(memory, emulate)
        found = fix_model(
            model, prompts or [PROMPT], output, backend="cpu" if emulation else backend,
            attention=attention, emulation=emulation, seed=seed,
            num_inference_steps=steps, guidance_scale=guidance,
        )  # fmt: skip
    except (ValidationError, OSError) as error:
        _fail(error)
    typer.echo(found.to_json() if as_json else str(found))
    raise typer.Exit(0 if found.chosen else BAD)


def _colour(text):
    """Titles bold, verdicts green and red; `typer.echo` drops that where no terminal is."""
    text = re.sub(r"(?m)^\S.*", lambda title: typer.style(title[0], bold=True), text)
    for word, colour in (
        ("ok", "green"),
        ("FAIL", "red"),
        ("n/a", "yellow"),
        ("EMULATED", "yellow"),
    ):
        text = re.sub(rf"(?m)^(  (?:mps +)?){word}\b", rf"\1{typer.style(word, fg=colour)}", text)
    return text


def find_image_files(paths):
    """Returns the files to check, each once: those named, and the images in the folders named.

    Raises:
        typer.Exit: There is nothing to check in a folder.
    """
    files = {}
    for path in paths:
        if path.is_dir():
            found = _search_folder(path)
            if not found:
                _fail(f"{path}: no image in this folder. Expected {', '.join(IMAGE_ENDINGS)}.")
            files.update(dict.fromkeys(found))
        else:
            files[path] = None  # a missing one gets its verdict in its line, beside the others
    return list(files)


def _search_folder(folder):
    def refuse(error):
        _fail(f"{error.filename}: cannot be searched ({error.strerror}). Check its permissions.")

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(IMAGE_ENDINGS)
    )


def _print_verdicts(verdicts):
    words = {file: "ok" if v.valid else v.problem for file, v in verdicts.items()}
    word_width = max(map(len, words.values()))
    path_width = max(len(_printable(file)) for file in verdicts)
    for file, verdict in verdicts.items():
        typer.echo(
            f"{words[file]:{word_width}}  {_printable(file):{path_width}}  {verdict.message}"
        )


def _printable(path):
    """A path on one line, whatever characters are in its name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def _fail(message):
    typer.echo(message, err=True)
    raise typer.Exit(UNUSABLE)
