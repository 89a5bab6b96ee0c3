"""The map of a network: a column a module, a row a step, coloured by the room that is left.

Drawn once as one image; what moves over it is a marker of a few bytes.

# S steps, M modules
"""

import base64
import html
import io
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import TwoSlopeNorm, to_hex, to_rgba
from PIL import Image

from sdkit.generation.step_record import StepRecord
from sdkit.precision.headroom import MAXIMUM
from sdkit.precision.headroom_map import LEAST_BITS, MOST_BITS, ROOM

NAN_COLOUR = "#d100b1"  # of no other cell, and seen on a dark page and on a light one
HEIGHT_PIXELS, LEAST_ROW, MOST_ROW = 260, 3, 26  # of the map, and of a step in it
NORM = TwoSlopeNorm(0, LEAST_BITS, MOST_BITS)


def measure_bits(steps: StepRecord, dtype) -> np.ndarray:
    """(S, M) log2 of the distance to a dtype's maximum; NaN where nothing finite was measured."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.log2(MAXIMUM[dtype] / steps.largest.astype(np.float64))
    return np.where(np.isinf(steps.largest) | steps.is_bad, np.nan, bits)


@dataclass(frozen=True)
class NetworkMap:
    """One pixel a module and step, stretched over the page.

    Attributes:
        steps: What is drawn.
        bits: (S, M) room that is left.
        dtype: Of that room.
    """

    steps: StepRecord
    bits: np.ndarray
    dtype: str

    @classmethod
    def of(cls, steps, dtype) -> "NetworkMap":
        """The map of a StepRecord for "float16" or "bfloat16"."""
        return cls(steps, measure_bits(steps, dtype), dtype)

    @property
    def box(self) -> str:
        """As CSS: as wide as the page, a pixel a module at the least, and rows to be told apart."""
        rows, columns = self.bits.shape
        height = rows * max(LEAST_ROW, min(HEIGHT_PIXELS // rows, MOST_ROW))
        return f"width:100%;min-width:{columns}px;height:{height}px"

    def find_cell(self, x, y) -> tuple[int, int]:
        """(step, module) under a point, given as shares of width and height."""
        rows, columns = self.bits.shape
        return (min(max(int(y * rows), 0), rows - 1), min(max(int(x * columns), 0), columns - 1))

    def draw(self) -> Image.Image:
        """The map as RGBA: transparent where nothing was measured, so it fits any page."""
        bits, is_bad = self.bits.copy(), self.steps.is_bad.copy()
        for column in np.flatnonzero(self.steps.runs_once):  # one value, drawn over all rows
            bits[:, column], is_bad[:, column] = bits[0, column], is_bad[0, column]
        pixels = ROOM(NORM(np.clip(bits, LEAST_BITS, MOST_BITS)), bytes=True)
        pixels = np.ascontiguousarray(pixels)
        pixels[np.isnan(bits)] = 0
        pixels[is_bad] = np.array(to_rgba(NAN_COLOUR)) * 255
        return Image.fromarray(pixels)

    def to_html(self) -> str:
        """The map as an image."""
        rows, columns = self.bits.shape
        told = html.escape(f"Room in {self.dtype} of {columns} modules in {rows} steps")
        return (
            f'<img class="sdkit-map sdkit-pixels" alt="{told}" src="{embed(self.draw())}" '
            f'style="display:block;max-width:none;{self.box}">'
        )

    def name_components(self) -> str:
        """A row of the components' names, each over its modules."""
        roots = [path.partition(".")[0] for path in self.steps.modules]
        begins = [m for m, root in enumerate(roots) if m == 0 or root != roots[m - 1]]
        cells = []
        for begin, end in zip(begins, [*begins[1:], len(roots)], strict=True):
            name = html.escape(roots[begin])
            cells.append(
                f'<span title="{name}" style="flex:0 0 {100 * (end - begin) / len(roots):g}%;'
                "box-sizing:border-box;overflow:hidden;white-space:nowrap;border-left:2px solid;"
                f'padding-left:3px">{name}</span>'
            )
        return (
            f'<div style="display:flex;width:100%;min-width:{len(roots)}px;font-size:11px">'
            f"{''.join(cells)}</div>"
        )

    def to_marker(self, step, module) -> str:
        """The selected step and module, over the map; the first NaN has a ring of its own."""
        rows, columns = self.bits.shape
        boxes = [
            f'<div class="sdkit-band" style="left:0;width:100%;top:{100 * step / rows:g}%;'
            f'height:{100 / rows:g}%"></div>',
            f'<div class="sdkit-band" style="top:0;height:100%;left:{100 * module / columns:g}%;'
            f'width:{100 / columns:g}%"></div>',
        ]
        if first := self.steps.first_bad:
            x, y = 100 * (first[1] + 0.5) / columns, 100 * (first[0] + 0.5) / rows
            boxes.append(f'<div class="sdkit-ring" style="left:{x:g}%;top:{y:g}%"></div>')
        return (
            f'<div class="sdkit-marker" style="{self.box}" onclick="{CLICK}">{"".join(boxes)}</div>'
        )


# The one thing for which ipywidgets has no event. It tells where a click was through a text field
# that nobody sees; the time makes a second click on the same place another one.
CLICK = html.escape(
    "const box = this.getBoundingClientRect();"
    "const field = this.closest('.sdkit-explorer').querySelector('.sdkit-click input');"
    "field.value = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height,"
    " event.timeStamp].join(' ');"
    "field.dispatchEvent(new Event('input', {bubbles: true}));"
    "field.dispatchEvent(new Event('change', {bubbles: true}));"
)


def make_legend(dtype) -> str:
    """What the colours mean."""
    stops = ", ".join(
        f"{to_hex(ROOM(NORM(b)))} {(b - LEAST_BITS) / (MOST_BITS - LEAST_BITS):.0%}"
        for b in range(LEAST_BITS, MOST_BITS + 1, 2)
    )
    swatch = "display:inline-block;height:10px;vertical-align:middle;margin:0 6px"
    return (
        f"<div>bits left below {html.escape(dtype)}'s maximum: {LEAST_BITS} (overflows)"
        f'<span style="{swatch};width:160px;background:linear-gradient(90deg, {stops})"></span>'
        f'{MOST_BITS} · NaN or Inf<span style="{swatch};width:14px;background:{NAN_COLOUR}"></span>'
        "· empty: not run · columns: modules in the order of the run · rows: steps</div>"
    )


def embed(image) -> str:
    """A PIL image as the address of itself, so that nothing is fetched."""
    data = io.BytesIO()
    image.save(data, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
