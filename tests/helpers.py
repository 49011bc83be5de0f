"""The real configs, shrunk, and records of random outputs: what several tests share."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import gompertz_jax as gj
from gompertz_jax import models
from gompertz_jax.models.resnet import BasicBlock, ResNet
from gompertz_jax.training.config import get_default

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


def smallest_networks():
    """Two models with every layer of the real ones, a stem and a block: where compiling is what a test waits for."""
    widths = {"smallest": 4, "smallest_wide": 8}
    for name, width in widths.items():
        models._RECIPES[name] = models._Recipe(partial(ResNet, BasicBlock, (1,), (4, width), stem="cifar"))
    return tuple(widths)


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
