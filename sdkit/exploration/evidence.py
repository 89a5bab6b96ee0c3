"""What is known of one module at one step, in words, with its numbers over all steps as a line."""

import html
import math

import numpy as np

from sdkit.exploration.network_map import NAN_COLOUR, NetworkMap

LINE_WIDTH, LINE_HEIGHT = 290, 60


def tell_evidence(network_map: NetworkMap, notes, step, module) -> str:
    """The evidence as HTML: the op's own record where there is one."""
    steps = network_map.steps
    path, kind = steps.modules[module], steps.kinds[module]
    told = [f"<b>{html.escape(path)}</b> {html.escape(kind)}"]
    told.append(html.escape(tell_cell(network_map, step, module)))
    if network_map.bits.shape[0] > 1 and not steps.runs_once[module]:
        told.append(draw_line(network_map, step, module))
    for owner, note in notes.items():
        if path == owner or path.startswith(f"{owner}."):
            whose = "" if path == owner else f"of {html.escape(owner)}: "
            told.append(f"<pre>{whose}{html.escape(note)}</pre>")
    return "<br>".join(told).replace("<br><pre>", "<pre>").replace("</pre><br>", "</pre>")


def tell_cell(network_map: NetworkMap, step, module) -> str:
    """One cell of the map in a sentence."""
    steps = network_map.steps
    runs_once = steps.runs_once[module]
    place = (0 if runs_once else step), module
    when = "outside of the loop" if runs_once else f"step {step}"
    total = int(steps.total[place])
    if steps.is_bad[place]:
        counts = [(int(steps.nan_count[place]), "NaN"), (int(steps.inf_count[place]), "Inf")]
        bad = " and ".join(f"{count} are {name}" for count, name in counts if count)
        return f"{when}: of {total} values {bad}"
    largest = float(steps.largest[place])
    if math.isnan(largest):
        return f"{when}: " + ("its range was not measured" if total else "it did not run")
    if largest == 0:
        return f"{when}: every value is 0"
    bits = network_map.bits[place]
    room = f"{bits:.1f} bits left in" if bits > 0 else f"{-bits:.1f} bits too large for"
    return f"{when}: greatest |x| {largest:.4g}, {room} {network_map.dtype}"


def draw_line(network_map: NetworkMap, step, module) -> str:
    """The bits left over the steps as SVG: the limit is dashed, NaN a mark, the step a bar."""
    bits = network_map.bits[:, module]
    count = len(bits)
    finite = bits[np.isfinite(bits)]
    low, high = min(0.0, *finite, 0.0), max(1.0, *finite, 1.0)

    def at(i, value):
        x = 4 + (LINE_WIDTH - 8) * (i / (count - 1))
        return x, 4 + (LINE_HEIGHT - 8) * (1 - (value - low) / (high - low))

    shown = np.where(bits == np.inf, high, bits)  # of an output of zeros alone
    points = " ".join("{:.1f},{:.1f}".format(*at(i, b)) for i, b in enumerate(shown) if b == b)
    x_step, y_limit = at(step, 0)[0], at(0, 0)[1]
    marks = "".join(
        f'<circle cx="{at(i, low)[0]:.1f}" cy="{at(i, low)[1]:.1f}" r="3" fill="{NAN_COLOUR}"/>'
        for i in np.flatnonzero(network_map.steps.is_bad[:, module])
    )
    return (
        f'<svg role="img" aria-label="bits left over the steps" width="{LINE_WIDTH}" '
        f'height="{LINE_HEIGHT}" style="color:inherit">'
        f'<line x1="0" x2="{LINE_WIDTH}" y1="{y_limit:.1f}" y2="{y_limit:.1f}" '
        'stroke="currentColor" stroke-dasharray="4 4" opacity=".6"/>'
        f'<line x1="{x_step:.1f}" x2="{x_step:.1f}" y1="0" y2="{LINE_HEIGHT}" '
        'stroke="currentColor" opacity=".5"/>'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f"{marks}</svg><small> bits left, step by step; dashed: none left</small>"
    )
