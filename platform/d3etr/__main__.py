"""``python -m d3etr`` is ``d3etr``."""

from d3etr.cli.main import program

program()
