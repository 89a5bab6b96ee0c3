"""The views and the notebooks in JupyterLab, in headless Chromium, with keyboard and mouse."""

import re

import nbformat
import pytest
import torch
from lab import CHROMIUM, OUTPUT, run_all, running_lab, write_notebook
from test_notebooks import SMALL
from tiny_pipelines import build_tiny_pipe

from sdkit import diagnose, generate
from sdkit.demo import find_notebooks

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or .ci/run as root"
    ),
]
VIEW = f"{OUTPUT} .sdkit-explorer"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with running_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def page(lab, tokenizer_folder):
    """A notebook that was run in the browser: a spoilt run, diagnosed, beside a healthy one."""
    pipe = build_tiny_pipe(tokenizer_folder)
    call = {"num_inference_steps": 6, "guidance_scale": 2}
    generate(pipe, "a", output_folder=lab.folder / "good", progress=False, **call)
    conv, calls = pipe.unet.mid_block.resnets[0].conv1, []

    def spoil(module, args, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 4 else output

    hook = conv.register_forward_hook(spoil)
    generate(
        pipe, "a", output_folder=lab.folder / "bad", record_steps=True, progress=False,
        on_nonfinite="skip", **call,
    )  # fmt: skip
    hook.remove()
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = torch.nan
    (lab.folder / "diagnosis.json").write_text(diagnose(pipe, "a", **call).to_json())
    name = write_notebook(
        lab.folder / "views.ipynb",
        "from sdkit import compare_runs, explore_run\n"
        'explore_run("bad", diagnosis="diagnosis.json")',
        'compare_runs(["good", "bad"])',
    )
    with lab.opened(name) as page:
        run_all(page, timeout_seconds=180)
        page.locator(f"{VIEW} .sdkit-map").wait_for(timeout=60_000)
        page.locator(f"{VIEW} table").wait_for(timeout=60_000)
        yield page


def wait_until(page, look, was):
    """Waits until what `look()` sees differs from what it was, and returns it."""
    for _ in range(150):
        now = look()
        if now != was:
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing moved in 15 s: still {str(was)[:200]}")


def test_keyboard_and_mouse_move_the_pictures(page):
    view = page.locator(VIEW).first
    evidence = view.locator("text=/step \\d+: /").last
    latents = view.locator(".sdkit-pixels:not(.sdkit-map)").first

    def source():
        return latents.get_attribute("src")

    assert "at step 3" in view.inner_text() and "conv1" in view.inner_text()
    before = source()
    slider = view.locator(".noUi-handle").first
    slider.focus()
    page.keyboard.press("ArrowLeft")
    after = wait_until(page, source, before)
    page.keyboard.press("ArrowLeft")
    assert wait_until(page, source, after) not in (before, after)

    marker = view.locator(".sdkit-marker")
    marked, told = marker.screenshot(), evidence.inner_text()
    box = marker.bounding_box()
    marker.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.9})
    assert "step 6: " in wait_until(page, evidence.inner_text, told)
    assert marker.screenshot() != marked
    assert float(slider.get_attribute("aria-valuenow")) == 6

    view.get_by_role("button", name=re.compile("first NaN")).press("Enter")
    wait_until(page, lambda: "step 3: of " in view.inner_text(), False)
    assert page.foreign == []


def test_tab_reaches_every_control(page):
    view = page.locator(VIEW).first
    view.locator(".noUi-handle").first.focus()
    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.tagName"))
    assert {"SELECT", "BUTTON", "INPUT"} <= reached
    assert not view.locator(".sdkit-click input").is_visible()


def test_arrow_keys_walk_the_list_of_modules(page):
    view = page.locator(VIEW).first
    told = view.inner_text()
    view.locator("select[size]").focus()
    page.keyboard.press("ArrowDown")
    wait_until(page, view.inner_text, told)


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_words_can_be_read_in_either_theme(page, theme):
    change = "(theme) => { window.jupyterapp.commands.execute('apputils:change-theme', {theme}); }"
    page.evaluate(change, f"JupyterLab {theme}")
    wait_until(page, lambda: (measure_paper(page) < 0.1) == (theme == "Dark"), False)
    paper = measure_paper(page)
    for part in ("b", "small", "figcaption", "pre", "th", "select"):
        ink = luminance(page, f"{VIEW} {part}", "color")
        lighter, darker = max(ink, paper) + 0.05, min(ink, paper) + 0.05
        assert lighter / darker >= 4.5, (part, ink, paper)  # WCAG 2.1, 1.4.3


def measure_paper(page):
    return luminance(page, ".jp-Notebook", "backgroundColor")


def luminance(page, selector, name):
    """Relative luminance of a colour as the browser computes it, as WCAG 2.1 defines it."""
    text = page.locator(selector).first.evaluate(f"(e) => getComputedStyle(e).{name}")
    channels = [int(c) / 255 for c in re.findall(r"\d+", text)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_every_notebook_runs_in_the_browser(lab, path):
    notebook = nbformat.read(path, as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names = re.findall(r"^(\w+):", parameters.source, flags=re.M)
    output_folder = str(lab.folder / "out" / path.stem)
    chosen = {**SMALL, "num_inference_steps": 2, "output_folder": output_folder}
    for name in filter(chosen.__contains__, names):
        parameters.source += f"\n{name} = {chosen[name]!r}"
    nbformat.write(notebook, lab.folder / path.name)
    with lab.opened(path.name) as page:
        run_all(page, timeout_seconds=900)
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(2000)
        executed = nbformat.read(lab.folder / path.name, as_version=4)
        outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
        assert [out.evalue for out in outputs if out.output_type == "error"] == []
        assert executed.cells[-1].cell_type == "markdown" and outputs
        for view in page.locator(VIEW).all():
            view.scroll_into_view_if_needed()
            if view.locator(".noUi-handle").count():
                look = view.inner_html
                before = look()
                view.locator(".noUi-handle").first.focus()
                page.keyboard.press("ArrowRight")
                wait_until(page, look, before)
        assert page.foreign == []
