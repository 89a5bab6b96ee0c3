"""The page of a sweep: what each run drew and found, to filter and to open, in one file."""

import base64
import html
import io
import json
import re
from pathlib import Path

from sdkit.batch.execution import PAGE_NAME
from sdkit.batch.results import list_rows
from sdkit.batch.sheet import FIGURE_NAME, describe_problem, open_picture
from sdkit.run_folder import replace_file

INDEX_NAME = "index.html"
SOURCE_LETTERS = 2000
OPTION_LETTERS = 80


def save_page(table, folder):
    """Writes `index.html`: cards with filters; pictures are inside, nothing is fetched.

    Args:
        table: What `load_results` returned.
        folder: The sweep's.

    Returns:
        Its path.
    """
    folder, varied = Path(folder), table.attrs["varied"]
    rows = list_rows(table)
    words = {name: _words(rows, name) for name in ("status", *varied)}
    tags = ["\n".join(f"{name}\t{words[name][i]}" for name in words) for i in range(len(rows))]
    cards = [_card(folder, row, tag, varied) for row, tag in zip(rows, tags, strict=True)]
    fixed = [f"{name} = {table[name].iloc[0]}" for name in _parameters(table) if name not in varied]
    parts = {
        "title": html.escape(table.attrs["notebook"].removesuffix(".ipynb")),
        "count": str(len(table)),
        "good": str(int(table["good"].sum())),
        "fixed": html.escape(" · ".join(fixed)),
        "figure": FIGURE_NAME,
        "filters": "".join(_filter(name, found) for name, found in words.items()),
        "cards": "\n".join(cards),
    }
    page = re.sub(rf"\{{({'|'.join(parts)})\}}", lambda found: parts[found[1]], PAGE)
    path = folder / INDEX_NAME
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _parameters(table):
    names = list(table.columns)
    return names[names.index("good") + 1 : names.index("verdicts")]


def _filter(name, words):
    options = "".join(
        f'<option value="{html.escape(word)}">{html.escape(word[:OPTION_LETTERS])}</option>'
        for word in dict.fromkeys(words)
    )
    return (
        f'<label>{html.escape(name)} <select data-name="{html.escape(name)}">'
        f'<option value="">all</option>{options}</select></label>'
    )


def _words(rows, name):
    """What a filter compares in each row, on one line, for tags are told apart by theirs.

    A run that is done and found something invalid is "invalid". A value is JSON where its plain
    text is empty, or means another value too, as of 1 and "1".
    """
    if name == "status":
        return [describe_problem(row) or "good" for row in rows]
    plain = [" ".join(str(row[name]).split()) for row in rows]
    exact = [json.dumps(row[name], ensure_ascii=False) for row in rows]
    means = {}
    for word, value in zip(plain, exact, strict=True):
        means.setdefault(word, set()).add(value)
    return [
        word if word and len(means[word]) == 1 else value
        for word, value in zip(plain, exact, strict=True)
    ]


def _card(folder, row, tags, varied):
    lines = [f"<b>{html.escape(name)}</b> {html.escape(str(row[name]))}" for name in varied]
    lines += [
        f"{html.escape(name.partition(': ')[2])} <b>{html.escape(_number(value))}</b>"
        for name, value in row.items()
        if name.startswith(("verdict: ", "metric: ")) and value is not None
    ]
    if row["images"] and row["verdicts"] is None:
        lines.append(f"{row['images_valid']:.0f} of {row['images']:.0f} images valid")
    problem = describe_problem(row)
    return (
        f'<article data-tags="{html.escape(tags)}">{_picture(folder, row)}'
        f'<p class="{"bad" if problem else "good"}">{problem or "good"}</p>'
        f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>{_error(row)}{_link(folder, row)}"
        "</article>"
    )


def _number(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _picture(folder, row):
    picture = open_picture(folder, row)
    if picture is None:
        return ""
    opened = io.BytesIO()
    picture.save(opened, format="JPEG", quality=85)
    data = base64.b64encode(opened.getvalue()).decode()
    return f'<img loading="lazy" alt="what this run drew" src="data:image/jpeg;base64,{data}">'


def _error(row):
    if row["error"] is None:
        return ""
    told = f'<p class="bad">{html.escape(row["error"])}</p>'
    if row["failed_source"]:
        source = html.escape(row["failed_source"][:SOURCE_LETTERS])
        told += (
            f"<details><summary>cell {row['failed_cell']}</summary><pre>{source}</pre></details>"
        )
    return told


def _link(folder, row):
    if row["path"] is None or not (folder / row["path"] / PAGE_NAME).is_file():
        return ""
    link = f'<a href="{row["path"]}/{PAGE_NAME}">The executed notebook</a>'
    took = "" if row["seconds"] is None else f", {row['seconds']:.1f} s"
    return f"<p>{link}{took}</p>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {count} runs</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; margin: 1rem 0; }
label { max-width: 100%; }
select { font: inherit; max-width: 100%; padding: .2rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
article { border: 1px solid #8886; border-radius: .6rem; padding: .8rem; overflow-wrap: anywhere; }
article[hidden] { display: none; }
article img { width: 100%; height: auto; border-radius: .3rem; background: white; }
article p, article ul { margin: .4rem 0 0; padding: 0; list-style: none; }
pre { overflow-x: auto; font-size: .8rem; }
.good { color: #1b7f5c; font-weight: 600; } .bad { color: #c81e1e; font-weight: 600; }
@media (prefers-color-scheme: dark) { .good { color: #4cc38a; } .bad { color: #ff7b72; } }
</style>
<h1>{title}</h1>
<p><b>{good} of {count} runs are good.</b> {fixed}</p>
<p>The same as one <a href="{figure}">figure</a> and as a table:
<a href="results.csv">CSV</a>, <a href="results.parquet">parquet</a>.</p>
<form>{filters} <output aria-live="polite"></output></form>
<main>
{cards}
</main>
<script>
const cards = [...document.querySelectorAll("article")];
const selects = [...document.querySelectorAll("select")];
function filter() {
  const wanted = selects.filter(s => s.value).map(s => s.dataset.name + "\\t" + s.value);
  for (const card of cards) {
    const tags = card.dataset.tags.split("\\n");
    card.hidden = !wanted.every(tag => tags.includes(tag));
  }
  document.querySelector("output").value =
    cards.filter(card => !card.hidden).length + " of " + cards.length + " shown";
}
document.querySelector("form").addEventListener("change", filter);
filter();
</script>
</html>
"""
