"""The command line: `sdkit demo` tells the whole story, `sdkit doctor` checks up on the machine.

What a command needs is imported inside it, so that `sdkit --help` answers at once. Every error is
one sentence and a next step; exit 1 means that something was found bad, 2 that a command cannot
be carried out as it was given; an error may bring an `exit_code` of its own. With --json that
sentence is in the output too, as {"error": ...}.
"""

import json
import sys
from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperGroup

from sdkit.commands.options import INTERRUPTED, UNUSABLE

COMMANDS = {  # in the order of the story, each in a line that the list of commands does not cut
    "demo": "Tell the whole story on the bundled model, offline.",
    "check": "Tell valid image files from black and damaged ones.",
    "doctor": "Find what this machine computes wrongly, and what to do.",
    "diagnose": "Name the cause of a broken image, and prove it.",
    "fix": "Find the smallest change that makes float16 right.",
    "prepare": "Make a folder to train on from product photographs.",
    "train": "Train a LoRA that no NaN can reach.",
    "evaluate": "Tell what a LoRA learnt, and what it spoilt.",
    "sweep": "Run a notebook for every combination of a grid.",
}


AS_JSON = "sdkit.as_json"


class Commands(TyperGroup):
    """The commands; what they raise becomes one line and an exit code, for all of them alike."""

    def parse_args(self, ctx, args):
        """Takes --debug wherever it stands before a --, and notes whether JSON is asked for."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[AS_JSON] = "--json" in args[:end]
        if "--debug" in args[:end]:
            args = ["--debug", *(a for a in args[:end] if a != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Runs a command.

        Raises:
            typer.Exit: It could not be carried out, or was interrupted.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = _explain(error)
            if ctx.meta[AS_JSON] and (message or hasattr(error, "format_message")):
                # Who reads the output of --json finds JSON there, whatever happened.
                typer.echo(json.dumps({"error": message or error.format_message()}, indent=2))
            if ctx.params.get("debug") or not message:
                raise
            typer.echo(message, err=True)
            raise typer.Exit(getattr(error, "exit_code", UNUSABLE)) from error


def _explain(error) -> str | None:
    """One line for an error; None for what typer itself raises to end a command."""
    if type(error).__module__.partition(".")[0] in ("click", "typer"):
        return None
    from sdkit.validation import ValidationError

    if isinstance(error, ValidationError | OSError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (say --debug for the traceback)"


app = typer.Typer(
    name="sdkit",
    cls=Commands,
    help="Find why Stable Diffusion images come out black, fix it, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, not one line.")
    ] = False,
):
    """Find why Stable Diffusion images come out black, fix it, and prove it."""
    # A file name may hold bytes that no encoding knows; it must not end in a traceback.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")


for name, summary in COMMANDS.items():
    app.command(short_help=summary)(getattr(import_module(f"sdkit.commands.{name}"), name))
