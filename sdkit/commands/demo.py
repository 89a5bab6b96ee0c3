"""`sdkit demo`: the whole story on the bundled model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import BAD, AsJson


def demo(
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder for the executed notebooks, images and index.html."
        ),
    ] = Path("runs/demo"),
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Denoising steps an image; by default what each notebook says.", min=1
        ),
    ] = None,
    as_json: AsJson = False,
):
    """Run the notebooks in order on the bundled model, offline, and print one verdict table.

    Exits with 1 if a notebook failed or a verdict is not the one that the story tells.
    """
    from sdkit.demo import format_table, run_demo

    runs = run_demo(output, parameters={"num_inference_steps": steps} if steps else {})
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
    else:
        typer.echo(format_table(runs))
        typer.echo(f"\n{output / 'index.html'}: the whole story on one page")
    if not all(run.is_good for run in runs):
        raise typer.Exit(BAD)
