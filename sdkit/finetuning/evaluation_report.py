"""What an evaluation found: the LoRAEvaluation that `evaluate_lora` returns."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sdkit.run_folder import replace_file

REPORT_FILE = "evaluation.json"
# How each measure is shown: its name, and how its number is written.
ROWS = {
    "valid": ("valid pictures", "{:.0f}"),
    "white_border": ("border white (250 of 255 and up)", "{:.1%}"),
    "white_border_least": ("the same, least of any picture", "{:.1%}"),
    "white_border_253": ("border white (253 and up)", "{:.1%}"),
    "white_border_255": ("border white (255)", "{:.1%}"),
    "colour_right": ("colour right", "{:.1%}"),
    "kind_right": ("kind right", "{:.1%}"),
    "background_right": ("background right", "{:.1%}"),
    "distance": ("kernel distance to held-out", "{:.3f}"),
    "diversity": ("diversity (levels of 255)", "{:.1f}"),
}


@dataclass(frozen=True)
class PictureMeasures:
    """What was measured on a group of pictures; None where there is nothing to measure with.

    Attributes:
        asked: How many were asked for.
        valid: How many came out finite, and neither black nor flat; the rest is measured on these.
        white_border: Mean share of border pixels whose channels are all at least 250 of 255.
        white_border_least: The same of the picture that has least.
        white_border_253: As `white_border`, from 253.
        white_border_255: As `white_border`, 255 alone.
        colour_right: Share of pictures that show the colour of the prompt.
        kind_right: Share that show the kind of shoe.
        background_right: Share that show the background.
        distance: Kernel distance to the held-out pictures; 0 is none, see
            `measure_kernel_distance`.
        diversity: Mean difference of two pictures of the group in 8-bit levels; 0 is collapse.
    """

    asked: int
    valid: int
    white_border: float | None = None
    white_border_least: float | None = None
    white_border_253: float | None = None
    white_border_255: float | None = None
    colour_right: float | None = None
    kind_right: float | None = None
    background_right: float | None = None
    distance: float | None = None
    diversity: float | None = None


@dataclass(frozen=True)
class LoRAEvaluation:
    """An adapter, before and after: what it learnt, and what it changed that it should not.

    Attributes:
        adapter: Its file.
        model: What it was put on.
        dataset: Where the held-out pictures are from.
        before: Of the prompts to learn, drawn by the base.
        after: The same prompts and seeds, with the adapter.
        held_out: Of the real pictures: what `after` can reach.
        kept_before: Of the prompts that shall not change, by the base; None without such prompts.
        kept_after: The same with the adapter.
        drift: Mean difference between both in 8-bit levels, same prompt and seed; beside the
            diversity of `kept_before`, which is that of two pictures that have nothing in common.
        settings: Prompts, seed, steps, guidance.
        notes: What could not be measured, and why; images that were bad.
        environment: Versions, chip and such.
        emulated: The emulation that was active, or None.
        run_before: The RunRecord of all pictures of the base, those to learn first; not in JSON.
        run_after: The same with the adapter.
    """

    adapter: str
    model: str
    dataset: str
    before: PictureMeasures
    after: PictureMeasures
    held_out: PictureMeasures
    kept_before: PictureMeasures | None
    kept_after: PictureMeasures | None
    drift: float | None
    settings: dict
    notes: tuple
    environment: dict
    emulated: str | None
    run_before: object = field(default=None, repr=False, compare=False)
    run_after: object = field(default=None, repr=False, compare=False)

    def to_json(self) -> str:
        """Everything but the pictures as JSON; NaN cannot be in it."""
        content = {
            f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("run_")
        }
        content = {
            k: asdict(v) if isinstance(v, PictureMeasures) else v for k, v in content.items()
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder) -> Path:
        """Writes `evaluation.json` into a folder."""
        path = Path(folder) / REPORT_FILE
        with replace_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        return path

    def to_frame(self):
        """Returns a pandas DataFrame of text: a row a measure, a column a group of pictures."""
        import pandas as pd

        groups = {
            "before": self.before, "after": self.after, "held out": self.held_out,
            "kept, before": self.kept_before, "kept, after": self.kept_after,
        }  # fmt: skip
        columns = {
            title: [_show(getattr(group, name), form) for name, (_, form) in ROWS.items()]
            for title, group in groups.items()
            if group is not None
        }
        return pd.DataFrame(columns, index=[label for label, _ in ROWS.values()])

    def __str__(self):
        """The table, and below it what a table does not hold."""
        lines = [self.to_frame().to_string()]
        if self.drift is not None:
            lines.append(
                f"drift of what shall not change: {self.drift:.1f} levels of 255; two different "
                f"pictures of it differ by {_show(self.kept_before.diversity, '{:.1f}')}"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"emulated: {self.emulated}"] if self.emulated else []
        return "\n".join(lines)


def _show(value, form):
    return "" if value is None else form.format(value)
