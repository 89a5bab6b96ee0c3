"""`sdkit diagnose`: from a broken image to its cause."""

from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import (
    BAD,
    AsJson,
    Attention,
    Backend,
    Emulate,
    Memory,
    Prompts,
    Seed,
    Steps,
)


def diagnose(
    prompts: Prompts = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="mini (the bundled one), a folder, a file or a Hub id."),
    ] = None,
    backend: Backend = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="auto, float16, bfloat16 or float32.")
    ] = "auto",
    attention: Attention = "sdpa",
    steps: Steps = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; by default the pipeline's own.")
    ] = None,
    seed: Seed = 0,
    incident: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A folder incident_... that generate left: replay it."),
    ] = None,
    emulate: Emulate = None,
    memory: Memory = None,
    prove: Annotated[bool, typer.Option(help="Run again with the remedy.")] = True,
    reproduction: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write the script that shows a backend fault."),
    ] = None,
    as_json: AsJson = False,
):
    """Name the stage, step, module, op and cause behind a broken image, and prove the remedy.

    Exits with 1 if something is broken, with 0 if the images are healthy.
    """
    from sdkit.diagnosis.incident_replay import diagnose_incident
    from sdkit.diagnosis.model import diagnose_model
    from sdkit.run_folder import replace_file
    from sdkit.validation import ValidationError, check_is_writable

    if incident and prompts:
        raise ValidationError("--incident brings its own prompt: leave the other out.")
    if reproduction:
        check_is_writable(reproduction.resolve().parent)  # before the long work, not after
        if reproduction.is_dir():
            raise ValidationError(f"{reproduction}: is a folder, expected the name of a file.")
    if incident:
        found = diagnose_incident(incident, model=model, backend=backend, prove=prove)
    else:
        found = diagnose_model(
            model or "mini", prompts, backend=backend, dtype=dtype, attention=attention,
            memory=memory, faults=emulate, seed=seed, prove=prove,
            num_inference_steps=steps,
            **({} if guidance is None else {"guidance_scale": guidance}),
        )  # fmt: skip
    typer.echo(found.to_json() if as_json else str(found))
    if reproduction and not found.reproduction:
        typer.echo(f"{reproduction}: not written, this cause needs none", err=True)
    elif reproduction:
        with replace_file(reproduction) as temporary:
            temporary.write_text(found.reproduction)
    raise typer.Exit(0 if found.is_healthy else BAD)
