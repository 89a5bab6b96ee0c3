"""An executed notebook as a page that opens on any machine, a phone too, and fetches nothing."""

import html
import logging
from pathlib import Path

from sdkit.run_folder import replace_file

logging.getLogger("sdkit.batch.reading").addHandler(logging.NullHandler())


def save_reading(notebook_path, path, title=None):
    """Writes an executed notebook as one HTML file and returns its `Path`.

    The title is by default the name of the notebook's folder.

    nbconvert's own full templates ask servers for MathJax and RequireJS; its body does not.
    """
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    # In a kernel its remarks on missing alternative texts would be printed for every run.
    quiet = logging.getLogger("sdkit.batch.reading")
    # A page has no kernel: of a widget it shows the still form that comes with it.
    kinds = HTMLExporter().default_config["NbConvertBase"]["display_data_priority"]
    still = Config({"NbConvertBase": {"display_data_priority": [
        kind for kind in kinds if "widget" not in kind
    ]}})  # fmt: skip
    exporter = HTMLExporter(template_name="basic", log=quiet, config=still)
    body, _ = exporter.from_filename(str(notebook_path))
    title = html.escape(title or Path(notebook_path).parent.name)
    with replace_file(path) as temporary:
        temporary.write_text(
            PAGE.replace("{title}", title).replace("{body}", body), encoding="utf-8"
        )
    return Path(path)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; font-size: .85rem; margin: .2rem 0; }
.cell { margin: 1rem 0; }
.input_area { border-left: 3px solid #8886; padding-left: .8rem; }
.prompt, .anchor-link { display: none; }
.output_subarea { overflow-x: auto; }
.output_stderr { opacity: .6; }
img { max-width: 100%; height: auto; background: white; }
table { border-collapse: collapse; } th, td { padding: .2rem .6rem; text-align: right; }
</style>
{body}
</html>
"""
