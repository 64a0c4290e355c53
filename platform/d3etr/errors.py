"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave: shown as its text alone, without a traceback.

    The text says what was found, where, what was expected and what to do. Commands
    print it to standard error and exit with code 2.
    """
