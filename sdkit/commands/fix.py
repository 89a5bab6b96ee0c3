"""`sdkit fix`: the smallest change with which a model draws right."""

from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import (
    BAD,
    AsJson,
    Attention,
    Backend,
    Emulate,
    Guidance,
    Memory,
    Prompts,
    Seed,
    Steps,
)


def fix(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="mini, a folder, a file or a Hub id.")
    ] = "mini",
    prompts: Prompts = None,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder for the recipe or model, fix.json and the picture."
        ),
    ] = Path("runs/fix"),
    backend: Backend = "auto",
    attention: Attention = "sdpa",
    steps: Steps = 10,
    guidance: Guidance = 7.5,
    seed: Seed = 0,
    emulate: Emulate = None,
    memory: Memory = None,
    as_json: AsJson = False,
):
    """Find the smallest change with which a model draws right in float16, prove it, and keep it.

    Exits with 1 if nothing cures, and where float32 itself is bad.
    """
    from sdkit.diagnosis.model import PROMPT, choose_emulation
    from sdkit.precision.drawing import BadReferenceError
    from sdkit.precision.fixing import fix_model

    emulation = choose_emulation(memory, emulate)
    try:
        found = fix_model(
            model, prompts or [PROMPT], output, backend="cpu" if emulation else backend,
            attention=attention, emulation=emulation, seed=seed,
            num_inference_steps=steps, guidance_scale=guidance,
        )  # fmt: skip
    except BadReferenceError as error:
        error.exit_code = BAD  # the command was carried out, and the model is what is bad
        raise
    typer.echo(found.to_json() if as_json else str(found))
    raise typer.Exit(0 if found.chosen else BAD)
