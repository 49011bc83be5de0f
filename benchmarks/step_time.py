"""One training step here and the same mathematics in PyTorch, eager and under torch.compile, on the same weights.

    python benchmarks/step_time.py                                                   # every cell; hours on two cores
    python benchmarks/step_time.py --pairs resnet56-resnet20 --rows full --batches 128
    python benchmarks/step_time.py --torch-python ../torch/bin/python                # PyTorch lives in another place
    python benchmarks/step_time.py --json step_time.json --resume                    # resume an interrupted run
    python benchmarks/step_time.py --rows full --roofline                            # and what bounds our program

A step is augmentation-free: both forward passes, the row's terms, their gradient, and SGD with Nesterov momentum and
weight decay, on one batch of 32x32x3 images that stays on the device. Rows: the student alone (cross-entropy), with
soft targets, with transport of the last maps or matched input gradients besides, and the full objective.

Each side of a cell is a separate process; they take turns, one repetition each, while the others sleep, so that a drift
of the machine falls on all. `images/s` is the median over the repetitions; a ratio is the median of those of
neighbouring repetitions, with the smallest and the largest: above 1, this package is faster. `MiB` is the peak while
stepping, of resident memory, and `+` what compiling adds to it; on an accelerator the allocator's, ours since the
process began. `others` is how many cores other programs kept busy meanwhile: a figure with more than a tenth is marked
`?`, for sharing the cores slows the sides unequally (PyTorch's threads wait for each other at every operation).

Before anything is timed, the raw losses and the norm of the gradient are compared over the first steps on the same
weights and images; a cell in which eager PyTorch differs by more than `TOLERANCES` is marked DIFFERS, and the exit
status is 1. Where torch.compile differs, it is not timed, and `wrong` stands in its column.
`--dtype float64` shows how little of the difference is not rounding.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from _common import commit, spread, versions
from _worker import Worker, WorkerError

HERE = os.path.dirname(os.path.abspath(__file__))

PAIRS = {
    f"{teacher}-{student}": {"teacher": teacher, "student": student}
    for teacher, student in (("resnet56", "resnet20"), ("resnet32x4", "resnet8x4"), ("resnet50", "mobilenetv2"))
}
ROWS = {
    "alone": ("ce",),
    "kd": ("ce", "kd"),
    "wasserstein": ("ce", "kd", "wasserstein"),
    "gradient": ("ce", "kd", "gradient"),
    "full": ("ce", "kd", "wasserstein", "gradient"),
}
WEIGHTS = {"ce": 1.0, "kd": 1.0, "wasserstein": 4.0, "gradient": 0.7}

# What both sides are given; epsilon to pool are this package's own defaults.
TASK = {
    "classes": 100,
    "mean": 0.5,
    "std": 0.25,
    "seed": 0,
    "temperature": 4.0,
    "epsilon": 0.05,
    "threshold": 1e-3,
    "check_every": 5,
    "max_iterations": 1000,
    "pool": 4,
    # Small, so that rounding does not grow between the steps that are compared: at 1e-3 the gradient norms of the two
    # sides' MobileNetV2 are 2e-3 apart at the first step, on the same weights, and 2e-2 at the third.
    "learning_rate": 1e-4,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "checked_steps": 3,
}

# Largest relative difference of a loss, and of what holds input gradients (rounding is amplified by every BatchNorm
# behind which a gradient passes twice): the matching term, and the norm of the gradient of everything.
TOLERANCES = {"float64": (1e-6, 1e-6), "float32": (1e-4, 1e-2), "bfloat16": (5e-2, 5e-1)}
ACCELERATOR_TOLERANCES = {**TOLERANCES, "float32": (1e-2, 1e-1)}  # both sides multiply in TF32

# A repetition is one dispatch of ours. On a CPU its scratch memory, gigabytes, is mapped anew at every dispatch: a step
# of resnet56 -> resnet20 takes .73 s alone and .59 s as one of four. The training loop takes up to 50.
FEWEST_STEPS = 4

ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # three processes share one accelerator
    # An idle OpenMP pool must not burn the cores of the side whose turn it is. GNU's, in PyTorch's wheels, spins for
    # some milliseconds, which is left as it is: asleep between two operations (OMP_WAIT_POLICY=PASSIVE), PyTorch is a
    # tenth slower on an idle machine. Intel's would spin for 200 ms.
    "KMP_BLOCKTIME": "5",
}


# --- one cell ---------------------------------------------------------------------------------------------------------


def our_side(dtype="float32", **variables):
    environment = {**ENVIRONMENT, "JAX_ENABLE_X64": str(dtype == "float64"), **variables}
    return Worker(sys.executable, os.path.join(HERE, "jax_step.py"), environment)


def torch_side(options, folder):
    # A separate folder for compiled code, so that each cell pays for its compilation.
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor")}
    return Worker(options.torch_python, os.path.join(HERE, "torch_step.py"), environment)


def measure(task, weights, options):
    """Everything that is known of one cell, as JSON."""
    cell = {"task": task, "prepared": {}, "refused": {}, "seconds": {}, "others": {}, "finished": {}}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sides = {}
        steps = options.steps
        if options.torch_python:
            sides["eager"] = stack.enter_context(torch_side(options, folder))
            cell["prepared"]["eager"] = eager = sides["eager"].ask("prepare_eager", task=task, path=weights)
            steps = steps or max(FEWEST_STEPS, round(options.seconds / eager["step_seconds"]))
        sides["ours"] = stack.enter_context(our_side(task["dtype"]))
        cell["prepared"]["ours"] = ours = sides["ours"].ask(
            "prepare", task=task, path=weights, steps_per_dispatch=steps or 1
        )
        if options.torch_python and eager["platform"] != ours["platform"]:
            raise WorkerError(f"JAX is on {ours['platform']}, PyTorch on {eager['platform']}: no comparison")
        cell["steps"] = steps = steps or max(FEWEST_STEPS, round(options.seconds / ours["step_seconds"]))
        if options.torch_python and options.compile:
            side = stack.enter_context(torch_side(options, folder))
            try:
                compiled = side.ask("prepare_compiled", task=task, path=weights, memory_format=eager["memory_format"])
                cell["prepared"]["compiled"], sides["compiled"] = compiled, side
            except WorkerError as error:
                cell["refused"]["compiled"] = {"reason": reason(error), "traceback": error.traceback}
        cell["differences"] = {
            name: differences(ours["checked"], cell["prepared"][name]["checked"]) for name in sides if name != "ours"
        }
        if "compiled" in sides and not agrees(cell, "compiled"):
            del sides["compiled"]
            cell["refused"]["compiled"] = {"reason": "wrong", "traceback": ""}
        alternate(sides, steps, options.repetitions, cell)
        cell["finished"] = {name: side.ask("finish") for name, side in sides.items()}
        if options.roofline:
            cell["roofline"] = sides["ours"].ask("measure_peaks", dtype=task["dtype"])
            # In a compiled program XLA counts no operation of a library's kernel, such as a GPU's convolution, and one
            # turn of a loop.
            counter = stack.enter_context(our_side(task["dtype"], JAX_PLATFORMS="cpu"))
            platform = "cuda" if ours["platform"] == "gpu" else ours["platform"]
            ours["flops"] = counter.ask("count", task=task, path=weights, platform=platform)
    return cell


def alternate(sides, steps, repetitions, cell):
    """Fill in seconds per step and what other programs did meanwhile, repetition by repetition."""
    names = list(sides)
    cell["seconds"], cell["others"] = {name: [] for name in names}, {name: [] for name in names}
    for repetition in range(repetitions):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            busy = machine_cpu_seconds()
            run = sides[name].ask("run", steps=steps)
            cell["seconds"][name].append(run["seconds"] / steps)
            if busy is not None:
                others = (machine_cpu_seconds() - busy - run["cpu_seconds"]) / run["seconds"]
                cell["others"][name].append(max(0.0, others))


def machine_cpu_seconds():
    """CPU seconds that the whole machine has worked, or that were stolen from it; None where that is not known."""
    try:
        with open("/proc/stat") as lines:
            user, nice, system, _, _, interrupt, soft_interrupt, stolen = map(int, next(lines).split()[1:9])
    except (OSError, ValueError):
        return None
    ticks = user + nice + system + interrupt + soft_interrupt + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def reason(error):
    """Why torch.compile gave up, in a word."""
    text = f"{error} {error.traceback}"
    known = {"double backward": "double-backward", "compiler": "no-compiler", "OutOfMemory": "memory"}
    return next((word for sign, word in known.items() if sign in text), str(error).split(":")[0])


def differences(ours, theirs):
    """Largest relative difference of each quantity over the checked steps."""
    return {
        name: max(abs(mine[name] - other[name]) / abs(other[name]) for mine, other in zip(ours, theirs, strict=True))
        for name in ours[0]
    }


def agrees(cell, side="eager"):
    """Whether that side computed the same as ours, to rounding; True where it is missing."""
    platform = cell["prepared"]["ours"]["platform"]
    loss, second_order = (TOLERANCES if platform == "cpu" else ACCELERATOR_TOLERANCES)[cell["task"]["dtype"]]
    loose = ("gradient/raw", "gradient_norm")
    return all(
        difference <= (second_order if name in loose else loss)
        for name, difference in cell["differences"].get(side, {}).items()
    )


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = (
    f"{'':<12} {'images/s':^32} {'ratio of speeds, median (range)':^41} {'compile s':^14} {'MiB':^35}\n"
    f"{'':<12} {'ours':>9}{'eager':>9}{'compiled':>16} {'ours / eager':>19}{'ours / compiled':>22} "
    f"{'ours':>7}{'torch':>7} {'ours':>13}{'eager':>8}{'compiled':>14} {'differs by':>11} {'others':>7}"
)


def line(row, cell):
    """The cell as a line of the table."""
    batch, seconds = cell["task"]["batch"], cell["seconds"]
    speeds = {name: f"{batch / statistics.median(values):.1f}" for name, values in seconds.items()}
    ratios = {name: ratio_text(seconds, name) for name in ("eager", "compiled")}
    refused = cell["refused"].get("compiled", {}).get("reason", "")
    compiled = speeds.get("compiled", refused)
    prepared = cell["prepared"]
    compile_seconds = [
        f"{prepared[name]['compile_seconds']:.1f}" if name in prepared else "" for name in ("ours", "compiled")
    ]
    memory = {name: memory_text(prepared[name], end) for name, end in cell["finished"].items()}
    worst = max(cell["differences"].get("eager", {}).values(), default=None)
    others = max((statistics.median(values) for values in cell["others"].values() if values), default=0.0)
    text = (
        f"{row:<12} {speeds['ours']:>9}{speeds.get('eager', ''):>9}{compiled:>16} "
        f"{ratios['eager']:>19}{ratios['compiled']:>22} {compile_seconds[0]:>7}{compile_seconds[1]:>7} "
        f"{memory['ours']:>13}{memory.get('eager', ''):>8}{memory.get('compiled', ''):>14} "
        f"{'' if worst is None else f'{worst:.0e}':>11} {f'{others:.1f}' + '?' * (others > 0.1):>7}"
    )
    notes = ["DIFFERS"] * (not agrees(cell)) + ["NOT FINITE"] * (not cell["finished"]["ours"]["sound"])
    return " ".join([text, *notes])


def ratio_text(seconds, other):
    if other not in seconds:
        return ""
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[other], strict=True)]
    return spread(ratios)


def memory_text(prepared, finished):
    if finished["peak_bytes"] is None:
        return "?"
    compiling = max(0, (prepared.get("peak_bytes") or 0) - finished["peak_bytes"]) >> 20
    return f"{finished['peak_bytes'] >> 20}" + (f" + {compiling}" if "compile_seconds" in prepared else "")


def roofline_text(cell):
    """How near the step is to what the machine can do, by the compiler's count and peaks that were measured here.

    The traffic is at least this: on a GPU what a library's kernel reads is not counted, and only one turn of a loop is.
    """
    counted, peaks = cell["prepared"]["ours"], cell["roofline"]
    if not (counted["flops"] and counted["bytes"]):
        return f"{'':<12} this compiler does not count operations and bytes: no roofline"
    arithmetic, traffic = counted["flops"] / peaks["flops_per_second"], counted["bytes"] / peaks["bytes_per_second"]
    bound, by = max((arithmetic, "arithmetic"), (traffic, "memory traffic"))
    return (
        f"{'':<12} {counted['flops'] / 1e9:.3g} GFLOP and {counted['bytes'] / 1e9:.3g} GB a step; peaks "
        f"{peaks['flops_per_second'] / 1e9:.3g} GFLOP/s, {peaks['bytes_per_second'] / 1e9:.3g} GB/s; bound by {by}: "
        f"{1e3 * bound:.3g} ms, {bound / statistics.median(cell['seconds']['ours']):.0%} of roofline"
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS))
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--batches", nargs="+", type=int, default=(64, 128))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a repetition, which is four steps at least")
    parser.add_argument("--steps", type=int, default=0, help="of a repetition, instead")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32", help="bfloat16: PyTorch by autocast")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has PyTorch (default: this)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--roofline", action="store_true", help="set our step against what the machine can do")
    parser.add_argument("--json", metavar="FILE", help="written after every cell")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the file has")
    options = parser.parse_args()
    if options.resume and not options.json:
        parser.error("--resume needs --json")
    if options.repetitions < 1 or min(options.batches) < 2:
        parser.error("--repetitions must be at least 1 and --batches at least 2")
    return options


def find_torch(interpreter):
    """PyTorch's version as that interpreter sees it, or None."""
    program = "import importlib.metadata; print(importlib.metadata.version('torch'))"
    try:
        found = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def open_record(options, identity):
    """The record of this run: that of the file when it is resumed, which must be of the same code and machine."""
    if not (options.resume and os.path.exists(options.json)):
        return {**identity, "commands": [], "cells": {}}
    with open(options.json) as file:
        record = json.load(file)
    for name, value in identity.items():
        if record[name] != value:
            sys.exit(f"--resume: {options.json} is of another {name}: {record[name]}, now {value}")
    return record


def write_record(options, record):
    if options.json:
        with open(f"{options.json}.part", "w") as file:
            json.dump(record, file, indent=1)
        os.replace(f"{options.json}.part", options.json)


def main():
    """Measure every chosen cell that the record does not hold, and print the table row by row."""
    options = parse_arguments()
    torch_version = find_torch(options.torch_python)
    if torch_version is None:
        print(
            f"no PyTorch in {options.torch_python}: its columns stay empty; 'pip install torch', or name an "
            "interpreter that has it with --torch-python\n"
        )
        options.torch_python = None
    with our_side() as side:
        hardware = side.ask("hardware")
    stack = {**versions("jax", "jaxlib", "flax", "optax", "ott-jax"), "torch": torch_version}
    record = open_record(options, {"hardware": hardware, "versions": stack, "commit": commit()})
    record["commands"].append(shlex.join([os.path.basename(sys.executable), *sys.argv]))
    print(f"{hardware}; {', '.join(f'{name} {version}' for name, version in stack.items())}; {record['commit']}")
    print(f"{options.dtype}, {options.repetitions} repetitions\n\n{COLUMNS}")
    sound = True
    for pair in options.pairs:
        for batch in options.batches:
            print(f"\n{pair.replace('-', ' -> ')}, batch {batch}", flush=True)
            sound &= measure_rows({**TASK, **PAIRS[pair], "batch": batch, "dtype": options.dtype}, options, record)
    sys.exit(not sound)


def measure_rows(task, options, record):
    """The rows of one pair and batch; False if a cell failed or its sides differ."""
    sound = True
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.npz")
        for row in options.rows:
            name = "/".join([task["teacher"], task["student"], row, str(task["batch"]), task["dtype"]])
            if name not in record["cells"]:
                try:
                    if not os.path.exists(path):
                        with our_side() as side:
                            side.ask("make_weights", task=task, path=path)
                    weights = {term: WEIGHTS[term] for term in ROWS[row]}
                    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
                    record["cells"][name] = {"began": began, **measure({**task, "weights": weights}, path, options)}
                except WorkerError as error:
                    print(f"{row:<12} FAILED: {error}\n{error.traceback}", flush=True)
                    sound = False
                    continue
                write_record(options, record)
            cell = record["cells"][name]
            print(line(row, cell), flush=True)
            if "roofline" in cell:
                print(roofline_text(cell), flush=True)
            sound &= agrees(cell) and cell["finished"]["ours"]["sound"]
    return sound


if __name__ == "__main__":
    main()
