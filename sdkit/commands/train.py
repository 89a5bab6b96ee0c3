"""`sdkit train`: a LoRA training; every setting of LoRAConfig is an option."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import BAD, INTERRUPTED, AsJson
from sdkit.finetuning.config import LoRAConfig, read_settings


def train(config_file, resume, overwrite, as_json, **options):
    """Train a LoRA adapter that no NaN can reach; Ctrl-C saves, and --resume goes on exactly.

    Settings come from a YAML or JSON file, and from options, which win. Exits with 1 if the run
    gave up, with 130 if it was interrupted.
    """
    from accelerate import PartialState

    from sdkit.finetuning.report import INTERRUPTED as WAS_INTERRUPTED
    from sdkit.finetuning.training import train_lora

    config = _read_config(config_file, resume, {**options, "overwrite": overwrite or None})
    try:
        report = train_lora(
            config, resume=resume is not None, overwrite=overwrite, progress=not as_json
        )
    except KeyboardInterrupt:  # before the first step, or a second one
        typer.echo(_say_how_to_go_on(config), err=True)
        raise typer.Exit(INTERRUPTED) from None
    if PartialState().is_main_process:
        typer.echo(report.to_json() if as_json else str(report))
    if report.stopped == WAS_INTERRUPTED:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if report.is_good else BAD)


def _say_how_to_go_on(config):
    from sdkit.finetuning.run_start import CONFIG_FILE

    if (Path(config.output_folder) / CONFIG_FILE).exists():
        return f"interrupted; to go on: sdkit train --resume {config.output_folder}"
    return "interrupted before the first step; the same command goes on where the encoding was"


def _read_config(config_file, resume, options):
    from sdkit.finetuning.run_start import CONFIG_FILE
    from sdkit.validation import ValidationError

    given = {name: value for name, value in options.items() if value is not None and value != []}
    if resume is None:
        given.pop("overwrite", None)
        return LoRAConfig.from_dict(
            {**(read_settings(config_file) if config_file else {}), **given}
        )
    if config_file or given:
        raise ValidationError(
            f"--resume: goes on with the settings of the run, and {next(iter(given), config_file)} "
            "was given beside it. Leave it out, or train anew into another folder."
        )
    if not (resume / CONFIG_FILE).exists():
        raise ValidationError(
            f"{resume}: no training to resume there. Expected the output folder of one, with "
            f"{CONFIG_FILE} in it."
        )
    return LoRAConfig.load(resume / CONFIG_FILE).replace(output_folder=resume)


def _make_options():
    """One option a field, with its text from the docstring: there is one list of settings."""
    help_texts = _read_help(LoRAConfig.__doc__)
    for field in fields(LoRAConfig):
        flag = f"--{field.name.replace('_', '-')}"
        kind, metavar = str | None, "TEXT"
        if isinstance(field.default, bool):
            kind, metavar, flag = bool | None, None, f"{flag}/--no-{flag[2:]}"
        elif field.default == ():
            kind, metavar = list[str] | None, "PROMPT"
        elif isinstance(field.default, int | float):
            metavar = "NUMBER"
        default = _show(field.default)
        text = f"{help_texts[field.name]} [default: {default}]"
        yield field.name, Annotated[kind, typer.Option(flag, metavar=metavar, help=text)], None


def _show(default):
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return str({None: "none", True: "yes", False: "no"}.get(default, default))


def _read_help(docstring):
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", docstring, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _take_options(function):
    """Gives a function the parameters that typer shall read."""
    parameters = [
        (
            "config_file",
            Annotated[
                Path | None,
                typer.Argument(
                    metavar="[CONFIG]", help="A YAML or JSON file of settings, or studio_white."
                ),
            ],
            None,
        ),
        (
            "resume",
            Annotated[
                Path | None,
                typer.Option(metavar="RUN", help="Go on with the run in this folder, exactly."),
            ],
            None,
        ),
        (
            "overwrite",
            Annotated[
                bool, typer.Option("--overwrite", help="Remove the run in the output folder.")
            ],
            False,
        ),
        ("as_json", AsJson, False),
        *_make_options(),
    ]
    function.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in parameters
    )
    function.__annotations__ = {name: kind for name, kind, _ in parameters}
    return function


_take_options(train)
