"""``python -m d3etr`` is ``d3etr``."""

from d3etr.cli import program

program()
