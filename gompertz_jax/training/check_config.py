"""What a config is refused for before anything is loaded or computed."""

import functools
import math
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from ..models import names
from .config import OPEN, Config, get_default
from .data import LARGEST_SIDE, check_name
from .errors import RunError
from .objectives import build_objective

# Steps of an objective that is built before the data set, and with it their true number, is known. Schedules are
# functions of the fraction of training: this only says how finely they are sampled.
PREVIEWED = 1000


def _requirement(group: Config, prefix: str = "") -> Callable[[bool, str, str], None]:
    """`require(condition, key, rule)`, which refuses the value of a dotted key of a group where it breaks a rule."""

    def require(condition: bool, key: str, rule: str) -> None:
        if not condition:
            raise RunError(f"{prefix}{key} = {functools.reduce(operator.getitem, key.split('.'), group)!r}: {rule}")

    return require


def check_recipe(recipe: Config, where: str) -> None:
    """Refuse a recipe with a value out of range, or with a schedule that reaches beyond its epochs."""
    require = _requirement(recipe, f"{where}.")
    require(recipe.epochs >= 1, "epochs", "must be at least 1")
    require(recipe.batch_size >= 1, "batch_size", "must be at least 1")
    require(0 < recipe.learning_rate < math.inf, "learning_rate", "must be above 0")
    require(recipe.decay in ("cosine", "multistep", "constant"), "decay", "must be cosine, multistep or constant")
    require(0 <= recipe.warmup_epochs <= recipe.epochs, "warmup_epochs", f"must lie in [0, epochs = {recipe.epochs}]")
    require(0 <= recipe.momentum < 1, "momentum", "must lie in [0, 1)")
    require(recipe.weight_decay >= 0, "weight_decay", "must not be negative")
    require(recipe.clip_norm >= 0, "clip_norm", "must not be negative; 0 means no clipping")
    require(0 <= recipe.label_smoothing < 1, "label_smoothing", "must lie in [0, 1)")
    if "projection_rate" in recipe:
        require(recipe.projection_rate >= 0, "projection_rate", "must not be negative")
    require(0 <= recipe.moving_average < 1, "moving_average", "must lie in [0, 1); 0 means none")
    if recipe.decay == "multistep":
        boundaries = tuple(recipe.boundaries)
        require(all(isinstance(epoch, int) for epoch in boundaries), "boundaries", "must be whole epochs")
        require(list(boundaries) == sorted(set(boundaries)), "boundaries", "must increase")
        beyond = [epoch for epoch in boundaries if not 0 < epoch < recipe.epochs]
        require(not beyond, "boundaries", f"{beyond} lie beyond training, which has {recipe.epochs} epochs")
        require(0 < recipe.factor <= 1, "factor", "must lie in (0, 1]")


def _is_group(value: Any) -> bool:
    return isinstance(value, ml_collections.ConfigDict)


def check_types(config: Config, default: Config, prefix: str = "") -> None:
    """Refuse a config with a missing key, an unknown key, or a value of another type than its default."""
    if unknown := [key for key in config if key not in default]:
        raise RunError(f"{prefix}{unknown[0]} is no key of a config; there are {', '.join(default)}")
    for key, usual in default.items():
        place = f"{prefix}{key}"
        if key not in config:
            raise RunError(f"{place} is missing: begin with gompertz_jax.training.config.get_default()")
        value, wanted = config[key], type(usual)
        if _is_group(usual):
            if not _is_group(value):
                raise RunError(f"{place} = {value!r:.200}: must be a group of keys")
            if place not in OPEN:
                check_types(value, usual, f"{place}.")
        elif type(value) not in {float: (float, int), tuple: (tuple, list)}.get(wanted, (wanted,)):
            raise RunError(f"{place} = {value!r:.200}: must be of type {wanted.__name__}")


def check_values(key: str, value: Any) -> None:
    """Refuse what JSON cannot hold: a config is saved with its run, and compared with it at later starts."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            check_values(key, inner)
    elif type(value) not in (bool, int, float, str, type(None)):
        raise RunError(f"{key} = {value!r:.200}: must be a number, a text, or a tuple of these")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{key} = {value}: must be finite")
    elif type(value) is int and abs(value) >= 2**63:
        raise RunError(f"{key} is an integer of {value.bit_length()} bits: must lie within 64")


def check_place(key: str, place: str) -> None:
    """Refuse a path that the system cannot even look for; whether something is there is checked where it is needed."""
    try:
        os.stat(Path(place).expanduser() / "teacher" / "network.json")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null in it, a user without a home
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{key} = {place!r:.200}: is no path: {reason}") from None


def check_config(config: Config) -> None:
    """Refuse a config whose values cannot be right, before anything is loaded or computed."""
    if not _is_group(config):
        raise RunError(f"config = {config!r:.200}: must be a ConfigDict from get_default()")
    check_types(config, get_default())
    for key, value in _leaves(config.to_dict()):
        check_values(key, value)
    check_name(config.data.name)
    for key, place in (
        ("data.name", config.data.name.partition(":")[2]),
        ("data.data_dir", config.data.data_dir),
        ("init_from", config.init_from),
        ("teacher.dir", config.teacher.dir),
        ("compilation_cache", config.compilation_cache),
    ):
        check_place(key, place)
    require = _requirement(config)
    data, checkpoint, logging, teacher = config.data, config.checkpoint, config.logging, config.teacher
    require(data.train_images >= 0, "data.train_images", "must not be negative; 0 takes all")
    sides = f"must lie in [0, {LARGEST_SIDE}]; 0 leaves images as they are"
    require(0 <= data.image_size <= LARGEST_SIDE, "data.image_size", sides)
    require(0 <= config.seed < 2**31, "seed", "must lie in [0, 2^31)")
    require(0 <= teacher.seed < 2**31, "teacher.seed", "must lie in [0, 2^31)")
    require(-1 <= config.order_seed < 2**31, "order_seed", "must lie in [0, 2^31), or be -1 for `seed`")
    check_recipe(config.recipe, "recipe")
    build_objective(config, PREVIEWED)  # for its checks
    if not teacher.dir:
        check_recipe(teacher.recipe, "teacher.recipe")
    for role in ("student", "teacher"):
        model = config[role].model
        if model not in names() and not (role == "teacher" and teacher.dir):
            raise RunError(f"{role}.model = {model!r} is unknown; there are {', '.join(names())}")
        require(config[role].dtype in ("float32", "bfloat16"), f"{role}.dtype", "must be float32 or bfloat16")
    for key in ("steps_per_dispatch", "evaluate_every_epochs", "teacher_statistics_images"):
        require(config[key] >= 1, key, "must be at least 1")
    require(logging.every_steps >= 1, "logging.every_steps", "must be at least 1")
    require(logging.term_gradients_every >= 0, "logging.term_gradients_every", "must not be negative; 0 means never")
    require(checkpoint.keep >= 1, "checkpoint.keep", "must be at least 1")
    require(teacher.cache.views >= 0, "teacher.cache.views", "must not be negative; 0 stores nothing")
    require(0 <= teacher.min_accuracy <= 1, "teacher.min_accuracy", "is a fraction, in [0, 1]")
    require(data.placement in ("auto", "device", "host"), "data.placement", "must be auto, device or host")
    require(0 <= data.device_fraction <= 1, "data.device_fraction", "is a fraction, in [0, 1]")
    require(config.objective.skip_below >= 0, "objective.skip_below", "must not be negative; 0 never skips")
    require(config.augment.padding >= 0, "augment.padding", "must not be negative")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
