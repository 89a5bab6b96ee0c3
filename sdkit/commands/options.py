"""What the commands share: their options and their exit codes."""

from typing import Annotated

import typer

BAD, UNUSABLE, INTERRUPTED = 1, 2, 130

Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")]
Backend = Annotated[str, typer.Option(metavar="DEVICE", help="auto, mps, cuda, cuda:1 or cpu.")]
Attention = Annotated[str, typer.Option(metavar="NAME", help="sdpa, sliced or diffusers-sliced.")]
Steps = Annotated[int, typer.Option(metavar="N", help="Denoising steps.", min=1)]
Guidance = Annotated[float, typer.Option(metavar="X", help="Guidance scale.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Image i is drawn from seed + i.")]
Emulate = Annotated[
    list[str] | None,
    typer.Option(metavar="FAULT", help="On an emulated Mac with this fault; repeatable."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="CONTENT", help="Fresh memory of the emulated Mac: zeros, nan, stale_float32, ..."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not text.")]
