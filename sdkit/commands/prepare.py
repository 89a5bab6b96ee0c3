"""`sdkit prepare`: photographs of products become a folder to train on."""

from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import AsJson


def prepare(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help='The unpacked "Fashion Product Images" download.'),
    ],
    output_folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Is made; nothing may be there yet.")
    ],
    article_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE", help="Which products, by articleType; repeatable. Casual Shoes if none."
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(metavar="PIXELS", help="Side of the pictures in pixels, at most.")
    ] = 512,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="At most so many products.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the split.")] = 42,
    as_json: AsJson = False,
):
    """Make captioned square pictures, split 70, 15 and 15 %, of a download of products."""
    from sdkit.finetuning.fashion import prepare_fashion_products

    prepared = prepare_fashion_products(
        source,
        output_folder,
        article_types=article_type or ["Casual Shoes"],
        size_pixels=size,
        limit=limit,
        seed=seed,
        progress=not as_json,
    )
    typer.echo(prepared.to_json() if as_json else str(prepared))
