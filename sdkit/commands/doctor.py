"""`sdkit doctor`: a check-up of this machine."""

import re
from typing import Annotated

import typer

from sdkit.commands.options import BAD, AsJson, Backend


def doctor(
    backend: Backend = "auto",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Probe at the sizes of Stable Diffusion 1.5.")
    ] = False,
    emulate: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="Show an emulated Mac with this fault; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Choose dtypes for this model on disk, not for SD 1.5."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run the probes again, whatever is kept of them.")
    ] = False,
    as_json: AsJson = False,
):
    """Check up on this machine: versions, device, what it computes wrongly, what to do.

    Exits with 1 if a probe failed.
    """
    from sdkit.diagnosis.doctor import check_up
    from sdkit.diagnosis.doctor_text import format_checkup

    checkup = check_up(
        backend, thorough=thorough, faults=tuple(emulate or ()), model=model, fresh=fresh,
        progress=True,
    )  # fmt: skip
    typer.echo(checkup.to_json() if as_json else _colour(format_checkup(checkup)))
    raise typer.Exit(BAD if checkup.failed else 0)


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
