"""The real configs, shrunk, and records of random outputs: what several tests share."""

import json
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as orbax

import gompertz_jax as gj
from gompertz_jax import models
from gompertz_jax.models.resnet import BasicBlock, ResNet
from gompertz_jax.training.config import get_default
from gompertz_jax.training.writer import read_metrics

ROOT = Path(__file__).parent.parent


def tiny_config(**changes):
    """Digits, ResNet-8 -> ResNet-8, a few dozen steps of each: every part of a run, in seconds."""
    config = get_default()
    config.update_from_flattened_dict(
        {
            "data.name": "digits",
            "data.validation": 100,
            "augment.padding": 1,
            "augment.flip": False,
            "teacher.model": "resnet8",
            "student.model": "resnet8",
            "objective.terms.gradient.pool": 2,
            "steps_per_dispatch": 7,
            "teacher_statistics_images": 200,
            "logging.every_steps": 1,
            "logging.progress": False,
        }
        | {
            f"{recipe}.{key}": value
            for recipe in ("recipe", "teacher.recipe")
            for key, value in {"epochs": 3, "batch_size": 96, "warmup_epochs": 0.5}.items()
        }
        | changes
    )
    return config


# Without the terms that take longest to compile.
OFF = {f"objective.terms.{term}.weight": "0" for term in ("wasserstein", "gradient")}


SMALLEST = {"smallest": 4, "smallest_wide": 8}  # name -> width of the last map


def smallest_networks():
    """Two models with every layer of the real ones, a stem and a block: where compiling is what a test waits for."""
    for name, width in SMALLEST.items():
        models._RECIPES[name] = models._Recipe(partial(ResNet, BasicBlock, (1,), (4, width), stem="cifar"))
    return tuple(SMALLEST)


def small_config(**changes):
    """The same on the smallest networks, that compiles in a few seconds; it saves steps 15, 27 and 39, its last."""
    student, teacher = smallest_networks()
    return tiny_config(
        **{
            "student.model": student,
            "teacher.model": teacher,
            "steps_per_dispatch": 3,
            "recipe.learning_rate": 0.4,
            "teacher.recipe.learning_rate": 0.4,
            "teacher.recipe.epochs": 5,
        }
        | OFF
        | changes
    )


def without_timing(value):
    if isinstance(value, dict):
        return {key: without_timing(item) for key, item in value.items() if key != "timing"}
    return value


def differences(one, other):
    """Where two finished workdirs differ, to the bit, apart from times: results, metrics, and all that was saved last.

    The last checkpoint has parameters, statistics, the optimiser's state and the best weights.
    """
    found = []
    for name in ("result.json", "teacher/teacher.json"):
        first, second = (without_timing(json.loads((run / name).read_text())) for run in (one, other))
        found += [f"{name}: {key}" for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    for part in (Path("."), Path("teacher")):
        found += differences_of_metrics(one / part, other / part)
        for name in ("checkpoints/last", "network"):
            trees = [load_tree(run / part / name) for run in (one, other)]
            if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
                found.append(f"{part / name}: other arrays")
                continue
            pairs = zip(jax.tree.leaves_with_path(trees[0]), jax.tree.leaves(trees[1]), strict=True)
            found += [
                f"{part / name}: {path}" for (path, a), b in pairs if np.asarray(a).tobytes() != np.asarray(b).tobytes()
            ]
    return found


def differences_of_metrics(one, other):
    """Where the metrics.jsonl of two workdirs differ, apart from times."""
    first, second = ([without_timing(line) for line in read_metrics(run / "metrics.jsonl")] for run in (one, other))
    if len(first) != len(second):
        return [f"{one / 'metrics.jsonl'}: {len(first)} and {len(second)} lines"]
    return [f"{one / 'metrics.jsonl'}: {line}" for line, again in zip(first, second, strict=True) if line != again]


def load_tree(directory):
    """What Orbax saved there; "last" is the last one of several checkpoints."""
    if directory.name == "last":
        directory = max((path for path in directory.parent.iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a template it says that one would be better
        return orbax.load(directory.absolute())


def config_source(**changes):
    """A config file of `small_config`, whose dispatches take as long as the environment's SECONDS_A_DISPATCH says."""
    return f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import small_config
from gompertz_jax.training.feed import Feed

def get_config():
    return small_config(**{changes!r})

def slowly(self, step, call=Feed.__call__):
    time.sleep(float(os.environ.get("SECONDS_A_DISPATCH", "0")))
    return call(self, step)

Feed.__call__ = slowly
"""


def until(condition, process, *, seconds=240):
    """Wait until something holds, the process has ended, or for so long."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def train(*arguments, timeout=300, **options):
    """Run train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def outputs(rng, *, batch=3, classes=5, maps=((4, 6), (2, 8))):
    """Random outputs of a network with square maps of these (size, width)."""
    features = tuple(jnp.asarray(rng.normal(size=(batch, size, size, width)), jnp.float32) for size, width in maps)
    logits = jnp.asarray(rng.normal(size=(batch, classes)), jnp.float32)
    return gj.Outputs(logits, features, features[-1].mean((1, 2)))


def record(**changes):
    """Three images, a student and a teacher of other widths and sizes, and a projection of both last maps."""
    rng = np.random.default_rng(0)
    fields = {
        "labels": jnp.array([0, 1, 4]),
        "student": outputs(rng),
        "teacher": outputs(rng, maps=((8, 6), (4, 10))),
        "student_views": {"last": jnp.asarray(rng.normal(size=(3, 2, 2, 10)), jnp.float32)},
        "teacher_views": {"last": jnp.asarray(rng.normal(size=(3, 4, 4, 10)), jnp.float32)},
    }
    return gj.Record(**(fields | changes))


def refused_before_tracing(call, message):
    """Hold that a call is refused, outside of `jit` and inside."""
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message):
        jax.jit(call)()


def central_difference(function, point, h=1e-6):
    """The gradient of a scalar function of a float64 array, entry by entry."""
    difference = np.zeros(point.shape)
    for index in np.ndindex(*point.shape):
        up, down = point.copy(), point.copy()
        up[index] += h
        down[index] -= h
        difference[index] = (function(up) - function(down)) / (2 * h)
    return difference
