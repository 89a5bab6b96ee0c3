"""`sdkit sweep`: a notebook over a grid of parameters."""

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import BAD, AsJson

LINE_LETTERS = 300  # of an error; the table has it all


def sweep(
    notebook: Annotated[
        str,
        typer.Argument(
            metavar="NOTEBOOK",
            help="A notebook with a parameters cell; in the package: draw_images, train_adapter.",
        ),
    ],
    grid: Annotated[
        str,
        typer.Argument(
            metavar="GRID",
            help="A grid in YAML, or one of the package: report_ablation, dtype_scheduler_steps, "
            "lora_rank_learning_rate.",
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Notebooks at a time; by default one a core, at most 4."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Dask scheduler, such as tcp://127.0.0.1:8786."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the results; by default runs/sweeps/GRID."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is done.")] = False,
    retry: Annotated[
        int, typer.Option(metavar="K", help="Further attempts for a run that fails.")
    ] = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds after which a run is stopped.")
    ] = None,
    as_json: AsJson = False,
):
    """Run a notebook for every combination of a grid; what is done already is skipped.

    Writes a table, a figure and index.html. Exits with 1 if a run failed or drew something invalid.
    """
    from sdkit.batch.results import list_rows
    from sdkit.batch.sweep import choose_folder, run_sweep
    from sdkit.generation.record import plain

    folder = output or choose_folder(grid, notebook)
    table = run_sweep(
        notebook, grid, output=folder, jobs=jobs, scheduler=scheduler, force=force, retry=retry,
        timeout=timeout, progress=not as_json,
    )  # fmt: skip
    rows = list_rows(table)
    if as_json:
        typer.echo(json.dumps(plain({"folder": str(folder), "runs": rows}), indent=2))
    else:
        for row in rows:
            if row["error"] or not row["good"]:
                values = ", ".join(f"{name}={row[name]}" for name in table.attrs["varied"])
                said = row["error"] or f"invalid: {row['verdicts'] or 'images'}"
                said = textwrap.shorten(said, LINE_LETTERS, placeholder=" ...")
                where = "" if row["failed_cell"] is None else f" (cell {row['failed_cell']})"
                typer.echo(f"{row['status']:<12} {values}: {said}{where}")
        typer.echo(f"{table['good'].sum()} of {len(rows)} runs are good")
        typer.echo(f"{folder / 'index.html'}: what each of them drew and found")
    raise typer.Exit(0 if table["good"].all() else BAD)
