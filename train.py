"""Distil a teacher into a student: `python train.py --config FILE [--workdir DIR] [--config.any.key=value]`."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gompertz_jax.training.config_file import arguments_error, config_fault
from gompertz_jax.training.loop import train_and_evaluate
from gompertz_jax.training.sharding import connect
from gompertz_jax.training.stop import as_program

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config(), FILE[:VARIANT].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; default runs/<config's name>[-<its variant>].")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes, found by JAX (Slurm, Kubernetes, TPU pod).")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes by hand: HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many; with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0; with --coordinator.")
flags.mark_flag_as_required("config")


def parse(arguments: list[str]) -> list[str]:
    """Parse flags; what is wrong with them, or with the config file, is reported in one line."""
    logging.set_verbosity(logging.FATAL)  # Orbax reports every phase of every save, and failures with tracebacks
    try:
        rest = flags.FLAGS(arguments)
    except Exception as error:  # whatever a config file leads to
        sys.exit(f"error: {arguments_error(error, arguments)}")
    if not isinstance(_CONFIG.value, ConfigDict):
        sys.exit(f"error: {config_fault(config_flags.get_config_filename(flags.FLAGS['config']))}")
    return rest


def main(arguments: list[str]) -> None:
    """Run the experiment that the flags name."""
    if arguments[1:]:
        sys.exit(f"error: unexpected argument {arguments[1]!r}; overrides are written --config.key=value")
    file, *variant = config_flags.get_config_filename(flags.FLAGS["config"]).split(":", 1)
    workdir = _WORKDIR.value or f"runs/{'-'.join([Path(file).stem, *variant])}"
    with as_program():
        connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, detect=_DISTRIBUTED.value)
        train_and_evaluate(_CONFIG.value, workdir)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
