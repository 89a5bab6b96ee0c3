"""`sdkit evaluate`: did an adapter learn, and what did it change that it should not."""

from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import BAD, AsJson, Backend, Guidance, Seed, Steps


def evaluate(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="The folder of a training, or the adapter's file."),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="What it was trained on: mini, a folder, a file or a Hub id."
        ),
    ] = "mini",
    dataset: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="What it learnt from, for held-out pictures: mini or a folder."
        ),
    ] = "mini",
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT", help="What it shall have learnt; at least two."),
    ] = None,
    kept_prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT", help="What shall not have changed; repeatable."),
    ] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    image_size: Annotated[
        int | None, typer.Option(metavar="N", help="Side in pixels; by default the model's own.")
    ] = None,
    backend: Backend = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder for pictures, before_after.png and evaluation.json."
        ),
    ] = None,
    as_json: AsJson = False,
):
    """Draw the same prompts and seeds with and without an adapter, and measure the difference.

    Exits with 1 if a picture is NaN, black or flat.
    """
    from sdkit.figures import save_figure
    from sdkit.finetuning.evaluation import evaluate_lora
    from sdkit.finetuning.evaluation_plots import plot_before_after

    evaluation = evaluate_lora(
        adapter, model, dataset=dataset, prompts=prompt or None, kept_prompts=kept_prompt or None,
        seed=seed, num_inference_steps=steps, guidance_scale=guidance, image_size=image_size,
        backend=backend, output_folder=output, progress=not as_json,
    )  # fmt: skip
    if output:
        save_figure(
            plot_before_after(evaluation), output / "before_after.png",
            "The same prompts and seeds, drawn by the base and with the adapter.",
        )  # fmt: skip
    typer.echo(evaluation.to_json() if as_json else str(evaluation))
    groups = (evaluation.after, evaluation.kept_after)
    raise typer.Exit(BAD if any(g and g.valid < g.asked for g in groups) else 0)
