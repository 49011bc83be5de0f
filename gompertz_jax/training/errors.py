"""The one exception a user is meant to read: what is wrong, with which value, and the way out."""

import re


class RunError(ValueError):
    """A run cannot start or continue for a reason that its user can change; shown without a traceback."""


class DataError(RunError):
    """Data that is missing, damaged or not what was asked for; the message names it and the way out."""


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def config_error(error: Exception) -> str:
    """One line on a config that cannot be read, or not be changed as the command line says."""
    if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        error = error.args[0]  # as ConfigDict wraps it where no other key is like the one that is missing
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if meant := re.search(r'Did you mean "(\S+)" instead of "(\S+)"', text):  # as ConfigDict says it
        text = f"there is no key {meant[2]!r}; did you mean {meant[1]!r}?"
    elif isinstance(error, KeyError) and (name := text.strip("\"'")).isidentifier():  # all that ConfigDict says
        text = f"there is no key {name!r}; the command line changes keys of the config file, new ones go into the file"
    return f"--config: {text}"
