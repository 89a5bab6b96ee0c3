"""The page of `sdkit demo`: the whole story, one chapter a notebook, in one file."""

import base64
import html
from pathlib import Path

from PIL import Image

from sdkit.batch.reading import save_reading
from sdkit.figures import DESCRIPTION
from sdkit.run_folder import replace_file

CHAPTERS = {  # by the notebook's number
    "01": "What went wrong, and why",
    "02": "The cure, and its proof",
    "03": "What the LoRA learnt",
    "04": "Many runs, one question",
}


def save_page(runs, output_folder: Path) -> Path:
    """Writes `index.html`: a card a chapter, then verdicts, figures and the executed notebooks.

    Args:
        runs: NotebookRuns, in order.
        output_folder: Where their folders are.
    """
    parts = {
        "{cards}": "\n".join(card_of(run) for run in runs),
        "{chapters}": "\n".join(chapter_of(run, output_folder) for run in runs),
    }
    page = PAGE
    for name, text in parts.items():
        page = page.replace(name, text)
    path = output_folder / "index.html"
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def title_of(run) -> str:
    return CHAPTERS.get(run.name[:2], run.name[3:].replace("_", " ").capitalize())


def find_headline(run) -> dict | None:
    """What did not come out as told, else the verdict marked as the answer, else the first."""
    unexpected = [verdict for verdict in run.verdicts if not verdict["as_expected"]]
    marked = [verdict for verdict in run.verdicts if verdict.get("headline")]
    return next(iter([*unexpected, *marked, *run.verdicts]), None)


def card_of(run) -> str:
    """The answer of a chapter in a few words, to tap on."""
    headline = find_headline(run)
    if run.error or headline is None:
        answer, question = "failed", run.error or "it wrote no verdicts"
    else:
        answer, question = headline["answer"], headline["question"]
    return (
        f'<a class="card" href="#{run.name}"><small>{html.escape(title_of(run))}</small>'
        f'<b class="{"good" if run.is_good else "bad"}">{html.escape(answer)}</b>'
        f"<span>{html.escape(question)}</span></a>"
    )


def chapter_of(run, output_folder) -> str:
    """A chapter: its verdicts, its figures, and the notebook that was executed."""
    head = f'<section id="{run.name}"><h2>{html.escape(title_of(run))}</h2>'
    if run.error:
        page = f"{run.name}.failed.ipynb"
        return (
            f'{head}<p class="bad">{html.escape(run.error)}</p>'
            f'<p><a href="{page}">The notebook as far as it came</a></p></section>'
        )
    verdicts = "".join(
        f"<li><span>{html.escape(v['question'])}</span> "
        f'<b class="{"good" if v["as_expected"] else "bad"}">{html.escape(v["answer"])}</b>'
        f"<small>{html.escape(v['evidence'])}</small></li>"
        for v in run.verdicts
    )
    figures = "".join(
        figure_of(path) for path in sorted((output_folder / run.name / "figures").glob("*.png"))
    )
    return (
        f"{head}<ul>{verdicts}</ul>{figures}"
        f'<p><a href="{run.name}.html">The executed notebook</a>, {run.seconds:.0f} s</p></section>'
    )


def figure_of(path) -> str:
    """A figure with what it says of itself; a wide one may be scrolled on a phone."""
    with Image.open(path) as picture:
        told = html.escape(picture.info.get(DESCRIPTION, ""))
    name = html.escape(path.stem[3:].replace("_", " ").capitalize())
    caption = f"<figcaption>{told}</figcaption>" if told else ""
    return f'<figure><div><img alt="{told or name}" src="{embed(path)}"></div>{caption}</figure>'


def save_reading_with_figures(executed: Path, figures_folder: Path) -> Path:
    """Writes the notebook as one self-contained page, its reference figure the run's own."""
    path = save_reading(executed, executed.with_suffix(".html"), title=executed.stem)
    page = path.read_text("utf-8")
    for figure in figures_folder.glob("*.png"):
        page = page.replace(f"../figures/{figure.name}", embed(figure))
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def embed(figure: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdkit demo: black images</title>
<style>
:root { color-scheme: light dark; --good: #1b7f5c; --bad: #c81e1e; --line: #8885; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.15; } h2 { margin: 3rem 0 .5rem; }
nav { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem; }
.card { display: flex; flex-direction: column; gap: .2rem; padding: .8rem 1rem;
  border: 1px solid var(--line); border-radius: .6rem; color: inherit; text-decoration: none; }
.card:hover, .card:focus-visible { border-color: currentColor; }
.card b { font-size: 1.15rem; line-height: 1.25; }
small, .card span, figcaption { opacity: .75; font-size: .85rem; }
ul { list-style: none; padding: 0; margin: 0; }
li { display: grid; grid-template-columns: 2fr 2fr 3fr; gap: .2rem 1.2rem; padding: .5rem 0;
  border-bottom: 1px solid var(--line); }
figure { margin: 1.5rem 0; } figure div { overflow-x: auto; }
img { max-width: 100%; height: auto; background: white; border-radius: .4rem; display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
@media (max-width: 40rem) { li { grid-template-columns: 1fr; } figure img { min-width: 34rem; }
  figcaption::after { content: " Swipe the figure to see all of it."; } }
</style>
<h1>Black images: the cause, the cure, the proof</h1>
<p>Three prompts, three black images, one ignored warning, and a script that reported success.
What follows was run on this machine a moment ago; where Apple's MPS backend was emulated,
it says so.</p>
<nav>
{cards}
</nav>
{chapters}
</html>
"""
