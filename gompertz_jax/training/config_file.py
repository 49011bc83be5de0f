"""What is wrong with a config file, or with what the command line changes in it, in one line for its user."""

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from .errors import RunError, first_line

# What absl says of a value on the command line, and the rule behind it.
_RULES = {
    "invalid literal for int": "must be an integer",
    "could not convert string to float": "must be a number",
    "Non-boolean argument": "must be True or False",
}


def arguments_error(error: Exception, arguments: Sequence[str]) -> str:
    """One line on a command line that Abseil's flags refuse."""
    given = re.findall(r"(?:^|\n)--?config[=\n](.*)", "\n".join(arguments))
    if isinstance(error, flags.Error) and not any(argument.startswith("--config") for argument in arguments):
        return "--config=FILE is missing; the experiments that come with this are in configs/"
    return config_error(error, given[-1] if given else "")


def config_error(error: Exception, file: str = "", *, flag: str = "--config") -> str:
    """One line on a config that cannot be read, or not be changed as the command line says.

    Args:
      error: what came of reading it.
      file: FILE or FILE:VARIANT, as it was given; "" if that is not known.
      flag: with which it was given.
    """
    if file and (fault := config_fault(file, flag=flag)):
        return fault
    if isinstance(error, flags.Error):
        text = _plain(error)
        if changed := re.match(r"flag (--\S+?=.*?): (.*)", text):
            return f"{changed[1]}: {next((rule for start, rule in _RULES.items() if start in changed[2]), changed[2])}"
        return text
    return f"{flag}: {_plain(error)}"


def config_fault(file: str, *, flag: str = "--config") -> str | None:
    """What is wrong with a config file, which is read once more for that; None if it gives a config."""
    path, *variant = file.split(":", 1)
    if not Path(path).is_file():
        return f"{flag}: there is no file {path}; the experiments that come with this are in configs/"
    content: dict[str, Any] = {"__name__": "config", "__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), content)
        if "get_config" not in content:
            return f"{path} has no get_config(), the function that returns the config"
        config = content["get_config"](*variant)
    except RunError as error:  # meant to be read
        return f"{flag}: {error}"
    except SyntaxError as error:
        return f"{error.filename or path}, line {error.lineno}: {error.msg}"
    except Exception as error:
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if places:
            return f"{path}, line {places[-1].lineno}, {places[-1].line}: {_plain(error, kind=True)}"
        if isinstance(error, TypeError):  # the call of get_config itself
            return (
                f"{path} takes no variant, got ':{variant[0]}'" if variant else f"{path} needs a variant: {path}:NAME"
            )
        return f"{path}: {first_line(error)}"
    if not isinstance(config, ml_collections.ConfigDict):
        return f"{path}: get_config() must return a ConfigDict, got {config!r:.80}"
    return None


def _plain(error: Exception, *, kind: bool = False) -> str:
    """An error's text in one line, after its kind where that is asked for; what ConfigDict says, in plain words."""
    if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        error = error.args[0]  # as ConfigDict wraps it where no other key is like the one that is missing
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if meant := re.search(r'Did you mean "(\S+)" instead of "(\S+)"', text):
        return f"there is no key {meant[2]!r}; did you mean {meant[1]!r}?"
    if unknown := re.match(r'Key "(\S+)" does not exist and cannot be added', text):
        return f"there is no key {unknown[1]!r}"
    if cast := re.match(
        r"Could not override field '(\S+)'.*?\. (.*) is of original type <class '(\S+)'>.*[ '.](\w+)'>", text
    ):
        return f"{cast[1]} must be of type {cast[4]}, got {cast[2]} ({cast[3]})"
    if not kind and isinstance(error, KeyError) and (name := text.strip("\"'")).isidentifier():  # all that it says
        return f"there is no key {name!r}; the command line changes keys of the config file, new ones go into the file"
    return f"{type(error).__name__}: {text}" if kind else text
