"""Distil a teacher into a student: `python train.py --config FILE [--workdir DIR] [--config.any.key=value]`."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from gompertz_jax.training.errors import RunError
from gompertz_jax.training.loop import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; default runs/<config's name>.")
flags.mark_flag_as_required("config")


def parse(arguments: list[str]) -> list[str]:
    """Parse flags; a key that the config does not have is told in one line."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError, TypeError, OSError) as error:
        sys.exit(f"error: --config: {' '.join(str(error).split())}")


def main(arguments: list[str]) -> None:
    """Run the experiment that the flags name."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every phase of every save; the run says what it saved
    if arguments[1:]:
        sys.exit(f"error: unexpected argument {arguments[1]!r}; overrides are written --config.key=value")
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not file.is_file():
        sys.exit(f"error: --config: there is no file {file}; the experiments that come with this are in configs/")
    try:
        train_and_evaluate(_CONFIG.value, _WORKDIR.value or f"runs/{file.stem}")
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
