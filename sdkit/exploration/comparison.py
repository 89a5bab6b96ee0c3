"""`compare_runs`: the images of several runs side by side, each with its verdict."""

import html
from collections.abc import Mapping

import ipywidgets
import numpy as np
from PIL import Image

from sdkit.exploration.material import Material, gather_pictures, read
from sdkit.exploration.view import Tile, View, make_style
from sdkit.generation.record import RunRecord
from sdkit.validation import ValidationError

AMPLIFIED = 8  # a difference of 32 of 255 is then white
PICTURES, DIFFERENCE = "pictures", f"difference to the first run, {AMPLIFIED} times"


def compare_runs(records):
    """Shows the images of several runs side by side, a row a prompt, with what was found in each.

    Args:
        records: A list of RunRecords, or of the folders or paths of such; or a dict that names
            them. A run of a sweep lies in `sweep / path / "output"`, `path` as in `load_results`.

    Returns:
        A widget. `shown` (pictures, or how they differ from the first run's) and `side` (pixels)
        are its controls; its text form is a line a run.

    Raises:
        ValidationError: No run at all, or one that is none or is damaged; the message says which.
    """
    if isinstance(records, (RunRecord, str)) or not hasattr(records, "__iter__"):
        raise ValidationError(
            f"records: got {type(records).__name__}, expected a list of RunRecords or of their "
            "folders, or a dict that names them. For one run say [record], or use explore_run."
        )
    pairs = records.items() if isinstance(records, Mapping) else enumerate(records)
    runs = {}
    for name, record in pairs:
        try:
            record = read(record)
        except ValidationError as error:
            raise ValidationError(f"records[{name!r}]: {error}") from error
        if not isinstance(record, RunRecord):
            raise ValidationError(
                f"records[{name!r}]: got a {type(record).__name__}, expected a RunRecord."
            )
        runs[name] = record
    if not runs:
        raise ValidationError("records: got none, expected at least one RunRecord or folder.")
    return RunComparison({name: (record, gather_pictures(record)) for name, record in runs.items()})


class RunComparison(View):
    """The view that `compare_runs` returns."""

    def __init__(self, runs: dict[object, tuple[RunRecord, Material]]):
        """Lays out the controls and the table."""
        self.runs = {name_run(name, record): found for name, (record, found) in runs.items()}
        self.shown = ipywidgets.Dropdown(options=[PICTURES, DIFFERENCE], description="show")
        self.side = ipywidgets.IntSlider(
            150, min=60, max=400, step=10, description="size", continuous_update=False
        )
        self.table = ipywidgets.HTML(layout={"overflow": "auto"})
        account = "\n".join(f"{name}: {found.account}" for name, found in self.runs.items())
        controls = ipywidgets.HBox([self.shown, self.side], layout={"flex_flow": "row wrap"})
        super().__init__(account, [make_style(), controls, self.table])
        for control in (self.shown, self.side):
            control.observe(lambda _: self._draw(), "value")
        self._draw()

    def _draw(self):
        """The table: a column a run, a row an image."""
        heads = "".join(
            f"<th>{html.escape(name)}<br><small>{html.escape(found.account.splitlines()[0])}"
            "</small></th>"
            for name, found in self.runs.items()
        )
        indices = sorted({p.index for found in self.runs.values() for p in found.pictures})
        rows = [
            "<tr>" + "".join(f"<td>{self._draw_one(found, i)}</td>" for found in self.runs.values())
            + "</tr>"
            for i in indices
        ]  # fmt: skip
        self.table.value = f"<table><tr>{heads}</tr>{''.join(rows)}</table>"

    def _draw_one(self, found, index):
        picture = find_picture(found, index)
        if picture is None:
            return "no such image in this run"
        image, caption = picture.pil_image, f"{picture.label}: {picture.message}"
        if self.shown.value == DIFFERENCE and image is not None and not picture.problem:
            first = find_picture(next(iter(self.runs.values())), index)
            image, told = subtract(image, first)
            caption = f"{picture.label}: {told}"
            problem = None if image else told
            return Tile(image, caption, problem, picture.label).to_html(self.side.value)
        return Tile(image, caption, picture.problem, picture.label).to_html(self.side.value)


def name_run(name, record) -> str:
    """A key of a dict as it is; of a list the run's own folder or model."""
    if not isinstance(name, int):
        return str(name)
    folder = record.folder.resolve().name if record.folder else record.model
    return f"{name}: {folder}"


def find_picture(found, index):
    return next((p for p in found.pictures if p.index == index), None)


def subtract(image, first):
    """(the amplified difference to a picture or None, in words how large it is)."""
    if first is None or first.pil_image is None or first.problem:
        return None, "nothing to compare with"
    if image.size != first.pil_image.size:
        return None, "of another size"
    ours, theirs = (np.asarray(i.convert("RGB"), np.int16) for i in (image, first.pil_image))
    difference = np.abs(ours - theirs)
    amplified = (difference * AMPLIFIED).clip(0, 255).astype(np.uint8)
    told = f"differs by at most {difference.max()}, on average by {difference.mean():.2f} of 255"
    return Image.fromarray(amplified), told if difference.any() else "the same pixels"
