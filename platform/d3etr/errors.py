"""The exceptions that commands show as text: a user's mistake, and a run that broke."""

from d3etr.text import redacted


class _ShownError(Exception):
    """An exception whose text is made to be shown: credentials never get into it."""

    def __init__(self, text: object) -> None:
        super().__init__(redacted(str(text)))


class UserError(_ShownError):
    """A mistake in what the user gave: shown as its text alone, without a traceback.

    The text says what was found, where, what was expected and what to do. Commands
    print it to standard error and exit with code 2.
    """


class RunFailedError(_ShownError):
    """A run broke for a reason that is no user mistake; the text says what and where.

    Commands print it to standard error and exit with code 1.
    """
