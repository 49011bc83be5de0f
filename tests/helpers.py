"""The real configs, shrunk: what the tests of whole runs share."""

import subprocess
import sys
from pathlib import Path

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


def train(*arguments, timeout=300, **options):
    """Run train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
