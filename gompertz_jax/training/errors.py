"""The one exception a user is meant to read: what is wrong, with which value, and the way out."""


class RunError(ValueError):
    """A run cannot start or continue for a reason that its user can change; shown without a traceback."""


class DataError(RunError):
    """Data that is missing, damaged or not what was asked for; the message names it and the way out."""


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
