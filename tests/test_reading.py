"""An executed notebook as a page: what a widget looked like is in it, and nothing is fetched."""

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from sdkit.batch.reading import save_reading


def test_of_a_widget_the_still_form_is_shown(tmp_path):
    data = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "1", "version_major": 2},
        "text/html": "<p>a still page</p>",
        "text/plain": "plain words",
    }
    output = new_output("display_data", data=data)
    path = tmp_path / "executed.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("show()", outputs=[output])]), path)
    page = save_reading(path, tmp_path / "page.html", title="a <title>").read_text()
    assert "<p>a still page</p>" in page and "model_id" not in page
    assert "<title>a &lt;title&gt;</title>" in page
    assert 'src="http' not in page and 'href="http' not in page
