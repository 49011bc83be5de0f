"""`gompertz-jax`: comparisons, and what is done before and after a run. Single runs are `train.py`."""

import argparse
import difflib
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand; what its user can change is reported in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a terminal that is not UTF-8
    parser = argparse.ArgumentParser(prog="gompertz-jax", description=__doc__, allow_abbrev=False)
    # Without abbreviations: `--seed=7` would be taken for `--seeds`.
    exact: Any = partial(argparse.ArgumentParser, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=exact)
    _add_import_torch(commands)
    _add_export(commands)
    _add_preview(commands)
    _add_compare(commands)
    _add_tune(commands)
    _add_report(commands)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    parsed, overrides = parser.parse_known_args(arguments)
    if "config" in parsed:
        parsed.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    from .training.stop import as_program

    with as_program((ValueError, OSError)):
        parsed.run(parsed)


def _add_import_torch(commands: Any) -> None:
    parser = commands.add_parser("import-torch", help="a PyTorch checkpoint -> a directory for --config.teacher.dir")
    parser.add_argument("file", type=Path, help=".pth, .pt or .safetensors; nothing in it is executed")
    parser.add_argument("--model", required=True, help="its name here, for instance resnet56")
    parser.add_argument("--out", required=True, type=Path, help="the directory to write; must not hold a network")
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs="+", help="per channel, of images in [0, 1]")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic: float32 or bfloat16")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the model, for instance stem=cifar"
    )
    parser.set_defaults(run=_import_torch)


def _import_torch(parsed: argparse.Namespace) -> None:
    from .models import CARD, names, tensor_files, torch_layouts
    from .training.networks import save_network

    if (parsed.out / CARD).exists():
        raise ValueError(f"{parsed.out} holds a network already; give another --out")
    if not parsed.file.is_file():
        raise ValueError(f"there is no {parsed.file}")
    if parsed.model not in names():
        near = difflib.get_close_matches(parsed.model, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"--model {parsed.model}: is unknown; {hint}")
    if (parsed.mean is None) != (parsed.std is None):
        raise ValueError(f"--{'mean' if parsed.mean is None else 'std'} is missing: give both or neither")
    options = {}
    for option in parsed.option:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--option {option}: is written KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    imported = torch_layouts.from_state_dict(
        tensor_files.read_state_dict(parsed.file),
        parsed.model,
        mean=parsed.mean,
        std=parsed.std,
        dtype=parsed.dtype,
        options=options,
    )
    with parsed.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = {"file": parsed.file.name, "sha256": digest, "layout": imported.layout}
    save_network(parsed.out, imported.network, imported.card | {"dataset": None, "imported": source})
    print(
        f"{parsed.model} of {imported.card['num_classes']} classes, layout of {imported.layout}, "
        f"mean {imported.card['mean']}, std {imported.card['std']}\n"
        f"written to {parsed.out}: teach with --config.teacher.dir={parsed.out}"
    )


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="the student of a run, alone, with a card")
    parser.add_argument("workdir", type=Path, help="of a run, which may still be going")
    parser.add_argument("--format", required=True, help="stablehlo, onnx, safetensors or torch")
    parser.add_argument("--step", type=int, help="of a checkpoint; default: the selected network, or the newest")
    parser.add_argument("--out", type=Path, help="the directory to write; default WORKDIR/export/FORMAT-STEP")
    parser.add_argument("--fold-normalisation", action="store_true", help="stablehlo, onnx: take images in [0, 1]")
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> None:
    from .export import export_student

    out = export_student(
        parsed.workdir,
        parsed.out,
        format=parsed.format,
        step=parsed.step,
        fold_normalisation=parsed.fold_normalisation,
    )
    compared = json.loads((out / "card.json").read_text())["compared"]
    print(
        f"written to {out}; read again, its logits on {compared['images']} images differ by "
        f"{compared['largest_difference_relative_to_largest_logit']:.1e} of the largest"
    )


def _add_preview(commands: Any) -> None:
    parser = commands.add_parser("preview", help="the schedules of a config, drawn and in numbers, before a run")
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="changed by --config.any.key=value")
    parser.add_argument("--control", metavar="FILE[:VARIANT]", help="a config whose areas are to be the same")
    parser.add_argument("--png", type=Path, help="a picture to write")
    parser.set_defaults(run=_preview)


def _preview(parsed: argparse.Namespace) -> None:
    from . import preview
    from .training.files import writing

    control = None if parsed.control is None else _config(parsed.control, [], "--control")
    shown = preview.preview(_config(parsed.config, parsed.overrides), control=control)
    if parsed.png is not None:
        with writing(parsed.png, "give another --png"):
            preview.plot(shown, parsed.png)
    print(preview.as_text(shown))


_DEFAULT_ARMS = "student,kd,constant,matched,linear,cosine,logistic,gompertz,reversed,progress,full"


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="arms of a config, each with several seeds, as one program")
    _add_trials(parser, arms=_DEFAULT_ARMS, seeds=5)
    parser.add_argument("--baseline", default="", help="the arm to compare with; default matched, or student")
    parser.set_defaults(run=_compare)


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser("tune", help="the same number of trials for every arm, by validation")
    _add_trials(parser, arms="matched,gompertz,full", seeds=1)
    parser.add_argument("--trials", type=int, default=16, help="of every arm; default 16")
    parser.add_argument("--search", default="sobol", help="sobol or random")
    parser.set_defaults(run=_tune)


def _add_trials(parser: Any, *, arms: str, seeds: int) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="changed by --config.any.key=value")
    parser.add_argument(
        "--arms",
        default=arms,
        help=f"names, and NAME=FILE[:VARIANT] for the objective of another config; default {arms}",
    )
    parser.add_argument("--seeds", type=int, default=seeds, help=f"from the config's seed on; default {seeds}")
    parser.add_argument("--workdir", required=True, type=Path, help="where everything is kept; the same again goes on")
    parser.add_argument(
        "--layout", default="devices", help="of a group's students: devices, map, vmap or unroll; default devices"
    )
    parser.add_argument("--distributed", action="store_true", help="several processes, found by JAX")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several processes by hand: of process 0")
    parser.add_argument("--processes", type=int, help="how many; with --coordinator")
    parser.add_argument("--process", type=int, help="which one this is, from 0; with --coordinator")


def _trials(parsed: argparse.Namespace) -> dict[str, Any]:
    """The config and the arms that were named, for `compare` and `tune`, once the processes are joined."""
    from .arms import arm
    from .training.sharding import connect

    connect(parsed.coordinator, parsed.processes, parsed.process, detect=parsed.distributed)
    config, arms = _config(parsed.config, parsed.overrides), {}
    for text in filter(None, (text.strip() for text in parsed.arms.split(","))):
        name, own, file = text.partition("=")
        if name in arms:
            raise ValueError(f"--arms: {name} is there twice")
        if not own:
            arms[name] = arm(config, name)
            continue
        arms[name] = config.copy_and_resolve_references()
        with arms[name].unlocked():
            arms[name].objective = _config(file, [], "--arms").objective
    return {"config": config, "arms": arms, "seeds": parsed.seeds, "layout": parsed.layout, "workdir": parsed.workdir}


def _compare(parsed: argparse.Namespace) -> None:
    from .compare import compare

    compare(**_trials(parsed), baseline=parsed.baseline)


def _tune(parsed: argparse.Namespace) -> None:
    from .tune import tune

    tune(**_trials(parsed), trials=parsed.trials, search=parsed.search)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="a run or a comparison as one HTML page that needs no network")
    parser.add_argument("workdir", type=Path, help="of a run or comparison, which may still be going")
    parser.add_argument("--out", type=Path, help="the page to write; default WORKDIR/report.html")
    parser.set_defaults(run=_report)


def _report(parsed: argparse.Namespace) -> None:
    from . import page
    from .training.writer import METRICS

    out = parsed.out or parsed.workdir / "report.html"
    page.write(parsed.workdir, out)
    lacks = "" if (parsed.workdir / METRICS).exists() else f", without curves: {parsed.workdir} holds no {METRICS}"
    print(f"written to {out}{lacks}")


def _config(file: str, overrides: Sequence[str], flag: str = "--config") -> Any:
    """The config of a file, changed as train.py changes it; `flag` is with which it was given."""
    import ml_collections
    from absl import flags, logging
    from ml_collections import config_flags

    from .training.config_file import config_error, config_fault

    logging.set_verbosity(logging.FATAL)  # of a get_config that returns nothing it warns in its own words
    values, arguments = flags.FlagValues(), ["gompertz-jax", f"--config={file}", *overrides]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        rest = values(arguments)[1:]
    except Exception as error:  # whatever a config file leads to
        raise ValueError(config_error(error, file, flag=flag)) from error
    if not isinstance(config.value, ml_collections.ConfigDict):
        raise ValueError(config_fault(file, flag=flag))
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; overrides are written --config.key=value")
    return config.value


if __name__ == "__main__":
    main()
