"""What both views share: a widget that reads as text and as a still page, and picture tiles."""

import html
from dataclasses import dataclass

import ipywidgets
from PIL import Image

from sdkit.exploration.network_map import NAN_COLOUR, embed
from sdkit.figures import BAD

# JupyterLab 4 takes arrow keys of what has the focus in an output for its own, to move between
# cells, and a list could not be walked. Lumino leaves alone what is marked, if the very element
# that has the focus is. Guarded by tests/test_browser.py.
OURS = (
    "this.closest('.sdkit-explorer').addEventListener('focusin', "
    "(event) => event.target.setAttribute('data-lm-suppress-shortcuts', 'true'))"
)
STYLE = f"""<style onload="{OURS}">
.sdkit-explorer, .sdkit-explorer .widget-html-content {{ color: var(--jp-ui-font-color1, inherit);
  font-size: 13px; line-height: 1.45; height: auto; }}
.sdkit-explorer pre {{ white-space: pre-wrap; margin: 4px 0; font-size: 12px;
  color: inherit; background: none; padding: 0; }}
.sdkit-explorer figure {{ display: inline-block; margin: 0 14px 6px 0; vertical-align: top; }}
.sdkit-explorer figcaption {{ font-size: 12px; opacity: .85; max-width: 260px; }}
.sdkit-explorer .sdkit-bad {{ display: flex; align-items: center; justify-content: center;
  box-sizing: border-box; background: #000; color: #fff; border: 3px solid {BAD};
  font-weight: bold; font-size: 15px; }}
.sdkit-explorer .sdkit-pixels {{ image-rendering: pixelated; }}
.sdkit-marker {{ position: relative; cursor: crosshair; }}
.sdkit-band, .sdkit-ring {{ position: absolute; box-sizing: border-box; pointer-events: none; }}
.sdkit-band {{ box-shadow: 0 0 0 1px #fff, 0 0 0 2px #000; }}
.sdkit-ring {{ width: 14px; height: 14px; margin: -7px 0 0 -7px; border-radius: 50%;
  border: 3px solid {NAN_COLOUR}; background: #fff; box-shadow: 0 0 0 1px #000; }}
.sdkit-explorer table {{ border-collapse: collapse; }}
.sdkit-explorer td, .sdkit-explorer th {{ padding: 4px 8px 4px 0; text-align: left;
  vertical-align: top; }}
</style>"""


class View(ipywidgets.VBox):
    """A VBox that says what it shows where no widget can be drawn: a shell, a page, a diff."""

    def __init__(self, account, children):
        """Takes the plain text and the widgets."""
        super().__init__(children)
        self.account = account
        self.add_class("sdkit-explorer")

    def __repr__(self):
        """The account, not the tree of widgets."""
        return self.account

    def to_html(self) -> str:
        """The view as it stands now, as a still page."""
        return f'<div class="sdkit-explorer">{STYLE}{"".join(find_html(self))}</div>'

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": self.to_html(), "text/plain": self.account}


def find_html(widget):
    """Yields what the HTML widgets within one say, in order; markers need their map below them."""
    for child in widget.children:
        if isinstance(child, ipywidgets.HTML):
            if "sdkit-style" not in child._dom_classes:
                yield f"<div>{child.value}</div>"
        elif "sdkit-stack" in child._dom_classes:
            yield f"<div>{child.children[0].value}</div>"
        elif isinstance(child, ipywidgets.Box):
            yield from find_html(child)


def make_style() -> ipywidgets.HTML:
    """The look of both views, as a widget among the others."""
    style = ipywidgets.HTML(STYLE, layout={"margin": "0", "height": "0"})
    style.add_class("sdkit-style")
    return style


@dataclass(frozen=True)
class Tile:
    """An image with a caption, or a black tile that says what is wrong.

    Attributes:
        pil_image: None where there is none.
        caption: Plain text.
        problem: What is wrong, or None.
        alt: For those who cannot see it.
        pixelated: Whether it is smaller than it is shown.
    """

    pil_image: Image.Image | None
    caption: str
    problem: str | None = None
    alt: str = ""
    pixelated: bool = False

    def to_html(self, side, width=None) -> str:
        """The tile, `side` pixels high; `width` where it is not square."""
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        alt = html.escape(self.alt or self.caption)
        if self.pil_image is None or self.problem:
            told = html.escape(self.problem or "not kept")
            return (
                f'<figure><div class="sdkit-bad" role="img" aria-label="{alt}: {told}" '
                f'style="width:{side}px;height:{side}px">{told}</div>{caption}</figure>'
            )
        wide, high = self.pil_image.size
        shown = self.pil_image
        if not self.pixelated and high > 2 * side:
            shown = shown.resize((round(2 * side * wide / high), 2 * side), Image.Resampling.BOX)
        kind = ' class="sdkit-pixels"' if self.pixelated else ""
        return (
            f'<figure><img{kind} alt="{alt}" src="{embed(shown)}" '
            f'style="height:{side}px;width:{width or round(side * wide / high)}px;max-width:none">'
            f"{caption}</figure>"
        )
