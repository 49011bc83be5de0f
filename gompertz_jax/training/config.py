"""What a run is made of: every key with its default and meaning, and the checks that need no data."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from .errors import RunError
from .objectives import build_objective

Config = Any  # an ml_collections.ConfigDict: what its keys hold is known to get_default, not to a type checker

# Keys that may differ between the first start of a workdir and a later one: they change no number of the run.
CHANGEABLE = (
    "data.data_dir",
    "data.placement",
    "data.device_fraction",
    "compilation_cache",
    "evaluate_every_epochs",  # changes which steps the best may be chosen from, and no training: told, and recorded
    "logging.every_steps",
    "logging.progress",
    "logging.term_gradients",  # of older workdirs
    "checkpoint",
    "teacher.min_accuracy",
)


def get_recipe() -> dict[str, Any]:
    """How one network is trained."""
    return {
        "epochs": 240,
        "batch_size": 64,
        "learning_rate": 0.05,
        "decay": "cosine",  # after the warm-up: "cosine" to 0, "multistep", or "constant"
        "boundaries": (150, 180, 210),  # multistep: epochs at which the rate is multiplied by `factor`
        "factor": 0.1,
        "warmup_epochs": 0.0,  # linear from 0
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "decoupled_decay": False,  # False: added to the gradient, as in PyTorch's SGD; True: rate x decay x weight
        "decay_everything": True,  # as the field's recipes do; False: kernels only, no biases and BatchNorm
        "clip_norm": 0.0,  # global gradient norm; 0: no clipping
        "label_smoothing": 0.0,
        "moving_average": 0.0,  # decay of an average of the weights, which is then what is evaluated; 0: none
    }


def get_default() -> Config:
    """Every key of an experiment. Configs change values; unknown keys and other types are refused."""
    config: Config = ml_collections.ConfigDict(
        {
            # The student begins with the weights of the network in this workdir, or `teacher` folder; "": drawn
            "init_from": "",
            "seed": 0,  # the student's weights, data order, augmentation; nothing of it is the teacher's, also if equal
            "order_seed": -1,  # of data order, augmentation and what losses draw, if another than `seed`; -1: `seed`
            "data": {
                "name": "cifar10",  # "cifar10", "cifar100", "digits", "folder:PATH", "arrays:FILE.npz", "tfds:NAME"
                "image_size": 0,  # the side that images are brought to; 0: as they are, all of one size
                "train_images": 0,  # how many to train on, of those that are not held out; 0: all
                "data_dir": "",  # where TFDS keeps data sets; "": its own default
                "validation": 5000,  # images held out of the training set to select by; 0: none, the last step counts
                "split_seed": 0,  # which images those are
                # Where training images live: "device", a copy on each; "host", gathered there by the same permutation
                # and sent ahead of the step; "auto": on the device if they take at most `device_fraction` of its memory
                "placement": "auto",
                "device_fraction": 0.25,
            },
            "augment": {"padding": 4, "flip": True},  # random crop after zero padding, horizontal flip
            "student": {"model": "resnet8", "options": {}, "dtype": "float32"},
            "teacher": {
                "model": "resnet20",
                "options": {},
                "dtype": "float32",
                "dir": "",  # a workdir whose trained network teaches; "": train one into WORKDIR/teacher
                "seed": 0,
                "min_accuracy": 0.0,  # on validation images, before the first step; below it the run is refused
                # How many augmented views of an image the student sees, one an epoch in turn. What the teacher says of
                # them is computed once and kept in WORKDIR/outputs, so that no step runs it: for terms that read its
                # logits and pooled vectors only. 0: another view in every epoch, and the teacher in every step
                "cache": {"views": 0},
                "recipe": get_recipe(),
            },
            "recipe": get_recipe() | {"projection_rate": 1.0},  # projections: factor on the learning rate
            "objective": {
                "curve": "gompertz(displacement=5, rate=8)",
                # The weights of transport and gradients were measured once on training images and then frozen: see
                # configs/cifar10_small.py.
                # NAME: the loss, its weight and its options; docs/losses.md lists them. Without a weight it is the
                # published one. Weights, temperature and epsilon are schedules in text: a number, a curve such as
                # "linear(start=8, end=2)", `curve` for the one above, or a product of these.
                # Every term may have `every_k_steps`: it is then computed at every k-th step only, at the same weight.
                "terms": {
                    "ce": {"loss": "cross_entropy", "weight": "1"},
                    "kd": {"loss": "soft_targets", "weight": "1 * curve", "temperature": "4"},
                    "wasserstein": {
                        "loss": "wasserstein",
                        "weight": "4 * curve",
                        "projection": "last",
                        "epsilon": "0.05",
                        "debiased": False,
                        "cloud": "image",
                    },
                    "gradient": {
                        "loss": "gradient_match",
                        "weight": "0.7 * curve",
                        "pool": 4,
                        "kind": "cosine",
                        "images": 0,
                        "stages": (),
                        "every_k_steps": 1,
                    },
                },
                # NAME: options of a projection, whose kind is that of the loss that reads it; what a loss reads by
                # default need not be here. -1 is the map that is pooled.
                "projections": {"last": {"student_stage": -1, "teacher_stage": -1}},
                # What a weight under `progress(...)`, for instance the curve "progress(gompertz())", is indexed by: the
                # share of the training batch that the student puts into the teacher's class ("agreement") or labels
                # rightly, over the teacher's ("relative_accuracy"); smoothed over about 1 / (1 - decay) steps.
                "progress": {"measure": "agreement", "decay": 0.99, "monotone": False},
                # While every distillation weight is smaller than this, teacher and distillation are not computed
                "skip_below": 0.0,
            },
            "steps_per_dispatch": 50,  # at most; the largest divisor of the number of steps is taken
            "evaluate_every_epochs": 1,
            # Compiled programs are kept here for the next start; "": $JAX_COMPILATION_CACHE_DIR or nowhere
            "compilation_cache": "~/.cache/gompertz_jax",
            "teacher_statistics_images": 2000,  # from which the teacher's channel statistics are measured, once
            "checkpoint": {"keep": 2},
            "logging": {
                "every_steps": 10,  # lines in metrics.jsonl
                # Every raw term's gradient norm, and its cosine with the first term's, at each n-th step; 0: never
                "term_gradients_every": 0,
                "progress": True,
            },
        }
    )
    config.lock()
    for open_ended in (config.student.options, config.teacher.options, config.objective.terms):
        open_ended.unlock()  # their keys are the user's; what they may be is checked where they are built
    config.objective.projections.unlock()
    return config


# --- checks -----------------------------------------------------------------------------------------------------------


def check_recipe(recipe: Config, where: str) -> None:
    """Refuse a recipe with a value out of range, or with a schedule that reaches beyond its epochs."""

    def require(condition: bool, key: str, rule: str) -> None:
        if not condition:
            raise RunError(f"{where}.{key} = {recipe[key]!r}: {rule}")

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


# Groups whose keys are the user's.
OPEN = ("student.options", "teacher.options", "objective.terms", "objective.projections")


def _is_group(value: Any) -> bool:
    return isinstance(value, ml_collections.ConfigDict)


def check_types(config: Config, default: Config, prefix: str = "") -> None:
    """Refuse a config with a key too few, a key too many, or one of another type than its default."""
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
    """Refuse what JSON cannot hold: a config is kept with its run, and compared with that."""
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
    """Refuse a path that the system cannot even look for; whether something is there is asked where it is needed."""
    try:
        os.stat(Path(place).expanduser() / "teacher" / "network.json")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null in it, a user without a home
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{key} = {place!r:.200}: is no path: {reason}") from None


def check(config: Config) -> None:
    """Refuse a config whose values cannot be right, before anything is loaded or computed."""
    from ..models import names
    from .data import check_name

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
    if config.data.train_images < 0:
        raise RunError(f"data.train_images = {config.data.train_images}: must not be negative; 0 takes all")
    if config.data.image_size < 0:
        raise RunError(f"data.image_size = {config.data.image_size}: must not be negative; 0 leaves images as they are")
    for key, seed in (("seed", config.seed), ("teacher.seed", config.teacher.seed)):
        if not 0 <= seed < 2**31:
            raise RunError(f"{key} = {seed}: must lie in [0, 2^31)")
    if not -1 <= config.order_seed < 2**31:
        raise RunError(f"order_seed = {config.order_seed}: must lie in [0, 2^31), or be -1 for `seed`")
    check_recipe(config.recipe, "recipe")
    build_objective(config, 1000)  # for its refusals; the true number of steps is known once the data are there
    if not config.teacher.dir:
        check_recipe(config.teacher.recipe, "teacher.recipe")
    for role in ("student", "teacher"):
        network = config[role]
        if network.model not in names() and not (role == "teacher" and config.teacher.dir):
            raise RunError(f"{role}.model = {network.model!r} is unknown; there are {', '.join(names())}")
        if network.dtype not in ("float32", "bfloat16"):
            raise RunError(f"{role}.dtype = {network.dtype!r}: must be float32 or bfloat16")
    for key, least in (
        ("steps_per_dispatch", 1),
        ("evaluate_every_epochs", 1),
        ("teacher_statistics_images", 1),
    ):
        if config[key] < least:
            raise RunError(f"{key} = {config[key]}: must be at least {least}")
    if config.logging.every_steps < 1:
        raise RunError(f"logging.every_steps = {config.logging.every_steps}: must be at least 1")
    if (every := config.logging.term_gradients_every) < 0:
        raise RunError(f"logging.term_gradients_every = {every}: must not be negative; 0 means never")
    if config.checkpoint.keep < 1:
        raise RunError(f"checkpoint.keep = {config.checkpoint.keep}: must be at least 1")
    if config.teacher.cache.views < 0:
        raise RunError(f"teacher.cache.views = {config.teacher.cache.views}: must not be negative; 0 stores nothing")
    if not 0 <= config.teacher.min_accuracy <= 1:
        raise RunError(f"teacher.min_accuracy = {config.teacher.min_accuracy}: is a fraction, in [0, 1]")
    if config.data.placement not in ("auto", "device", "host"):
        raise RunError(f"data.placement = {config.data.placement!r}: must be auto, device or host")
    if not 0 <= config.data.device_fraction <= 1:
        raise RunError(f"data.device_fraction = {config.data.device_fraction}: is a fraction, in [0, 1]")
    if config.objective.skip_below < 0:
        raise RunError(f"objective.skip_below = {config.objective.skip_below}: must not be negative; 0 never skips")
    if config.augment.padding < 0:
        raise RunError(f"augment.padding = {config.augment.padding}: must not be negative")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_keys(
    old: dict[str, Any], new: dict[str, Any], *, without: tuple[str, ...] = CHANGEABLE, prefix: str = ""
) -> list[str]:
    """Dotted keys at which two configs differ, as `key: old -> new`; by default without those that may change."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        if path in without:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differing_keys(before, after, without=without, prefix=f"{path}.")
        elif before != after:
            changes.append(f"{path}: {before!r} -> {after!r}")
    return changes
