"""`explore_run`: a run step by step, from what it left behind.

The map is drawn once an image and dtype. A move of the slider sends a marker, a line of numbers and
two small pictures, whatever the size of the network.
"""

import html
from dataclasses import replace

import ipywidgets
import numpy as np

from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.exploration.evidence import tell_evidence
from sdkit.exploration.latent_picture import (
    draw_channels,
    draw_reading,
    find_scale,
    fit_reading,
)
from sdkit.exploration.material import NO_MAP, Material, gather, read
from sdkit.exploration.network_map import NetworkMap, make_legend
from sdkit.exploration.view import Tile, View, make_style
from sdkit.validation import ValidationError

SIDE = 190  # pixels of a picture
MAP_HEIGHT = 330
WIDE = {"width": "100%", "max_width": "940px"}


def explore_run(source, *, diagnosis=None):
    """Shows a run step by step: latents and image as they form, room in each module, the first NaN.

    Nothing is computed again and no model is needed. What was not recorded is said: `generate(...,
    record_steps=True)` keeps the most.

    Args:
        source: A RunRecord, a Diagnosis or a Headroom; the folder, the path or the text of the JSON
            of one; or a folder `incident_...`.
        diagnosis: A Diagnosis of the same run, or its JSON: its evidence is at its module.

    Returns:
        A widget. `step`, `module`, `picture` and `dtype` are its controls, which can be set from
        code as well; its text form tells the run.

    Raises:
        ValidationError: A source that is none of these, or is damaged; a diagnosis that is none.
    """
    material = gather(source)
    if diagnosis is not None:
        diagnosis = read(diagnosis)
        if not isinstance(diagnosis, Diagnosis):
            raise ValidationError(
                f"diagnosis: got a {type(diagnosis).__name__}, expected the Diagnosis of the same "
                "run, or its JSON. To see two runs use compare_runs."
            )
        material = join(material, gather(diagnosis))
    return RunExplorer(material)


def join(material: Material, diagnosed: Material) -> Material:
    """A run with the evidence of its diagnosis, and with its modules where there is no map."""
    steps = material.steps or diagnosed.steps
    if NO_MAP in material.missing and diagnosed.steps:
        around = diagnosed.steps[0]
        steps = [
            replace(around, images=s.images, latents=s.latents) if s.modules else s for s in steps
        ]
    return replace(
        material,
        account=f"{material.account}\n\n{diagnosed.account}",
        steps=tuple(steps),
        notes={**material.notes, **diagnosed.notes},
        focus=diagnosed.focus,
    )


class RunExplorer(View):
    """The view that `explore_run` returns."""

    def __init__(self, material: Material):
        """Lays the controls out and shows the first image."""
        self.material, self.map, self.latents, self.reading = material, None, None, None
        self._is_filling = False
        pictures = [(f"{p.index}: {p.label[:60]}", p.index) for p in material.pictures]
        self.picture = ipywidgets.Dropdown(
            options=pictures or [("the run", 0)], description="image", layout=WIDE
        )
        self.dtype = ipywidgets.Dropdown(
            options=["float16", "bfloat16"], value=material.dtype, description="room in"
        )
        self.step = ipywidgets.IntSlider(description="step", min=0, max=0, layout=WIDE)
        self.play = ipywidgets.Play(interval=300, max=0)
        self.first = ipywidgets.Button(icon="crosshairs", layout={"width": "auto"})
        self.find = ipywidgets.Text(
            description="find", placeholder="part of a module's name, or NaN: Enter",
            continuous_update=False, layout={"width": "500px"},
        )  # fmt: skip
        self.module = ipywidgets.Select(
            description="module", rows=11, layout={"width": "500px", "height": "auto"}
        )
        self.click = ipywidgets.Text(layout={"display": "none"})
        self.click.add_class("sdkit-click")
        self.told = ipywidgets.HTML()
        self.forming, self.finished = ipywidgets.HTML(), ipywidgets.HTML()
        self.names, self.drawn, self.marker = (ipywidgets.HTML() for _ in range(3))
        self.legend, self.evidence = ipywidgets.HTML(), ipywidgets.HTML()
        missing = "".join(f"\n{text}" for text in material.missing)
        super().__init__(material.account + missing, self._lay_out())
        ipywidgets.jslink((self.play, "value"), (self.step, "value"))
        self._listen()
        self._show_picture()

    def _listen(self):
        self.picture.observe(lambda _: self._show_picture(), "value")
        self.dtype.observe(lambda _: self._show_picture(), "value")
        self.step.observe(lambda _: self._show_step(), "value")
        self.module.observe(lambda _: self._show_step(), "value")
        self.find.observe(lambda _: self._fill_modules(), "value")
        self.click.observe(lambda _: self._take_click(), "value")
        self.first.on_click(lambda _: self._go_to_first_bad())

    def _show_picture(self):
        """Another image or dtype: its map, its latents, and the step where to look first."""
        found = self.material.find_steps(self.picture.value)
        steps, row = found or (None, 0)
        keeps_place = self.map is not None and steps is self.map.steps
        place = (self.step.value, self.module.value) if keeps_place else None
        has_modules = steps is not None and bool(steps.modules)
        self.map = NetworkMap.of(steps, self.dtype.value) if has_modules else None
        self.latents = steps.latents[row] if found and steps.latents is not None else None
        self.scale = None if self.latents is None else find_scale(self.latents)
        self.reading = self._find_reading()
        self._is_filling = True
        self.step.max = self.play.max = steps.step_count - 1 if steps else 0
        first = steps.first_bad if steps else None
        self.step.value = place[0] if place else first[0] if first else self.step.max
        self._is_filling = False
        self._tell(steps, first)
        self._draw_map()
        self._fill_modules(place[1] if place else self._choose_module(first))

    def _lay_out(self):
        """The widgets that have something to show, from top to bottom."""
        rows = [make_style(), self.told]
        if len(self.material.pictures) > 1:
            rows.append(self.picture)
        if self.material.steps:
            rows.append(ipywidgets.HBox([self.play, self.step], layout=WIDE))
        rows.append(
            ipywidgets.HBox([self.forming, self.finished], layout={"flex_flow": "row wrap"})
        )
        if any(steps.modules for steps in self.material.steps):
            stack = ipywidgets.Box([self.drawn, self.marker], layout={"display": "grid"})
            stack.add_class("sdkit-stack")
            for layer in stack.children:
                layer.layout = {"grid_area": "1 / 1", "margin": "0"}
            scrolled = ipywidgets.VBox(
                [self.names, stack],
                layout={"overflow": "auto", "max_height": f"{MAP_HEIGHT}px", "flex": "0 0 auto"},
            )
            left = ipywidgets.VBox([self.find, self.module])
            self.evidence.layout = {"flex": "1 1 300px", "min_width": "0", "margin": "0 0 0 12px"}
            below = ipywidgets.HBox([left, self.evidence], layout={"flex_flow": "row wrap"})
            rows += [ipywidgets.HBox([self.dtype, self.first]), scrolled, self.legend, below]
        return [*rows, self.click]

    def _find_reading(self):
        """From latents to colours, by this image or, if it is not valid, by another of the run."""
        if self.latents is None:
            return None
        this = self.picture.value
        for picture in sorted(self.material.pictures, key=lambda p: p.index != this):
            found = self.material.find_steps(picture.index)
            if picture.pil_image and not picture.problem and found and found[0].latents is not None:
                reading = fit_reading(found[0].latents[found[1]][-1], picture.pil_image)
                if reading:
                    return reading
        return None

    def _find_picture(self):
        return next((p for p in self.material.pictures if p.index == self.picture.value), None)

    def _tell(self, steps, first):
        """The run in a line, where NaN starts, and what is not there."""
        title, _, rest = self.material.account.partition("\n")
        told = [f"<b>{html.escape(title)}</b>"]
        if rest and not self.material.pictures:
            told.append(f"<details><summary>the whole account</summary><pre>{html.escape(rest)}"
                        "</pre></details>")  # fmt: skip
        if first:
            step, module = first
            when = "outside of the loop" if steps.runs_once[module] else f"at step {step}"
            told.append(f"NaN or Inf starts {when}, in <b>{html.escape(steps.modules[module])}</b>")
        elif steps and steps.modules:
            told.append("No NaN and no Inf in what was recorded.")
        told += [f"<small>{html.escape(text)}</small>" for text in self.material.missing]
        self.told.value = "<br>".join(told).replace("</details><br>", "</details>")
        self.first.description = "Go to the first NaN"
        self.first.disabled = first is None
        picture = self._find_picture()
        caption = f"finished: {picture.message}" if picture else ""
        self.finished.value = (
            Tile(picture.pil_image, caption, picture.problem, picture.label).to_html(SIDE)
            if picture
            else ""
        )

    def _draw_map(self):
        self.drawn.value = self.map.to_html() if self.map else ""
        self.names.value = self.map.name_components() if self.map else "no map of this image"
        self.legend.value = make_legend(self.dtype.value) if self.map else ""

    def _choose_module(self, first):
        """The one that was diagnosed, else the first bad one, else the one with the least room."""
        if self.map is None:
            return None
        if self.material.focus in self.map.steps.modules:
            return self.map.steps.modules.index(self.material.focus)
        if first:
            return first[1]
        least = np.where(np.isnan(self.map.bits), np.inf, self.map.bits).min(axis=0)
        return int(least.argmin())

    def _fill_modules(self, chosen=None):
        """The list of modules, those whose name or state has what is looked for."""
        chosen = self.module.value if chosen is None else chosen
        words = self.find.value.lower().split()
        options = [
            (label, m)
            for m, label in enumerate(self._label_modules() if self.map else ())
            if all(word in label.lower() for word in words)
        ]
        self._is_filling = True
        self.module.options = options or [(f"no module has {self.find.value!r}", -1)]
        values = [value for _, value in self.module.options]
        self.module.value = chosen if chosen in values else values[0]
        self._is_filling = False
        self._show_step()

    def _label_modules(self):
        """Each module's name with its least room, or with the step of its first NaN."""
        bad = self.map.steps.is_bad
        least = np.where(np.isnan(self.map.bits), np.inf, self.map.bits).min(axis=0)
        return [
            f"NaN from {int(bad[:, m].argmax())} · {path}"
            if bad[:, m].any()
            else f"overflows · {path}"
            if least[m] <= 0
            else f"{least[m]:.1f} bits · {path}"
            if np.isfinite(least[m])
            else f"no range · {path}"
            for m, path in enumerate(self.map.steps.modules)
        ]

    def _show_step(self):
        """Another step or module: what moves is small."""
        if self._is_filling:
            return
        self.forming.value = self._draw_latents()
        module = self.module.value
        if self.map is None or module is None or module < 0:
            self.marker.value = self.evidence.value = ""
            return
        place = self.step.value, module
        self.marker.value = self.map.to_marker(*place)
        self.evidence.value = tell_evidence(self.map, self.material.notes, *place)

    def _draw_latents(self):
        """The picture so far and the channels, after the step of the slider."""
        step = self.step.value
        if self.latents is None:
            return ""
        if step >= len(self.latents):
            return f"The run was stopped in step {step}: there are no latents after it.<br>"
        now = self.latents[step]
        channels = draw_channels(now, self.scale)
        wide, high = channels.size
        tiles = [
            Tile(
                channels, f"latents after step {step}: {len(now)} channels"
                + ("" if np.isfinite(now).all() else ", with NaN"), pixelated=True,
            ).to_html(SIDE, round(SIDE * wide / high))
        ]  # fmt: skip
        if self.reading:
            caption = (
                f"the image after step {step}, a linear reading of the latents "
                f"(R² {self.reading.share:.2f} at the end)"
            )
            picture = Tile(draw_reading(now, self.reading), caption, pixelated=True)
            tiles.insert(0, picture.to_html(SIDE))
        return "".join(tiles)

    def _take_click(self):
        """A click on the map: shares of its width and height, and when."""
        try:
            x, y, _ = map(float, self.click.value.split())
        except ValueError:
            return  # the field is anybody's to write in
        if self.map is None or not (np.isfinite(x) and np.isfinite(y)):
            return
        self._go_to(*self.map.find_cell(x, y))

    def _go_to_first_bad(self):
        if self.map and self.map.steps.first_bad:
            self._go_to(*self.map.steps.first_bad)

    def _go_to(self, step, module):
        if module not in [value for _, value in self.module.options]:
            self.find.value = ""
        self._is_filling = True
        self.step.value, self.module.value = step, module
        self._is_filling = False
        self._show_step()
