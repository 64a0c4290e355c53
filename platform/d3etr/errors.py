"""The exceptions that commands show as text: a user's mistake, and a run that broke."""


class UserError(Exception):
    """A mistake in what the user gave: shown as its text alone, without a traceback.

    The text says what was found, where, what was expected and what to do. Commands
    print it to standard error and exit with code 2.
    """


class RunFailedError(Exception):
    """A run broke for a reason that is no user mistake; the text says what and where.

    Commands print it to standard error and exit with code 1.
    """
