"""`python -m sdkit` is the command `sdkit`."""

from sdkit.cli import app

app(prog_name="sdkit")
