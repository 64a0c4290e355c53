"""The command line: ``d3etr COMMAND``. Each command is a file; nothing here is slow to import."""

from d3etr.cli.main import main, program

__all__ = ["main", "program"]
