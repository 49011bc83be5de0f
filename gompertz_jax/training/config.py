"""What a run is made of: every key with its default and meaning."""

from typing import Any

import ml_collections

Config = Any  # an ml_collections.ConfigDict: what its keys hold is known to get_default, not to a type checker

# Keys that may differ between the first start of a workdir and a later one: they change no number of the run.
CHANGEABLE = (
    "data.data_dir",
    "data.placement",
    "data.device_fraction",
    "compilation_cache",
    "evaluate_every_epochs",  # changes which steps the best is chosen from, not training; reported and recorded
    "logging.every_steps",
    "logging.progress",
    "logging.term_gradients",  # of older workdirs
    "checkpoint",
    "teacher.min_accuracy",
)

# Groups whose keys are the user's.
OPEN = ("student.options", "teacher.options", "objective.terms", "objective.projections")


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
            # The student's weights, data order and augmentation; independent of the teacher's seed, even if the numbers
            # are equal
            "seed": 0,
            "order_seed": -1,  # of data order, augmentation and what losses draw, if not `seed`; -1: `seed`
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
                # How many augmented views of an image the student sees, one per epoch in turn. The teacher's outputs on
                # them are computed once and kept in WORKDIR/outputs, so that no step runs the teacher: for terms that
                # read only its logits and pooled vectors. 0: a new view in every epoch, and the teacher in every step
                "cache": {"views": 0},
                "recipe": get_recipe(),
            },
            "recipe": get_recipe() | {"projection_rate": 1.0},  # projections: factor on the learning rate
            "objective": {
                "curve": "gompertz(displacement=5, rate=8)",
                # The weights of transport and gradients were measured once on training images and then frozen: see
                # configs/cifar10_small.py.
                # NAME: the loss (docs/losses.md), its weight and its options (gompertz_jax/terms.py). Without a weight
                # it is the published one. Weights, temperature and epsilon are schedules in text: a number, a curve
                # such as "linear(start=8, end=2)", `curve` for the one above, or sums, differences and products.
                # Every term but the cross-entropy may have `every_k_steps`: it is then computed at every k-th step
                # only, at the same weight.
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
                # share of the training batch that the student puts into the teacher's class ("agreement") or classifies
                # correctly, over the teacher's ("relative_accuracy"); smoothed over about 1 / (1 - decay) steps.
                "progress": {"measure": "agreement", "decay": 0.99, "monotone": False},
                # While every distillation weight is smaller than this, teacher and distillation are not computed
                "skip_below": 0.0,
            },
            "steps_per_dispatch": 50,  # at most; the largest divisor of the number of steps is taken
            "evaluate_every_epochs": 1,
            # Compiled programs are kept here for the next start; "": $JAX_COMPILATION_CACHE_DIR or nowhere. Several
            # processes keep nothing in this default: name another place, which all of them see.
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


def differing_keys(
    old: dict[str, Any], new: dict[str, Any], *, without: tuple[str, ...] = CHANGEABLE, prefix: str = ""
) -> list[str]:
    """Dotted keys at which two configs differ, as `key: old -> new`; by default without those that may change.

    A group that only one of them has is `key: missing` in the new one, or `key: new`.
    """
    changes = []
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        if path in without:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differing_keys(before, after, without=without, prefix=f"{path}.")
        elif isinstance(after if before is None else before, dict) and None in (before, after):
            changes.append(f"{path}: {'new' if before is None else 'missing'}")
        elif before != after:
            changes.append(f"{path}: {_shown(before)} -> {_shown(after)}")
    return changes


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:77]}..." if len(text) > 80 and not isinstance(value, str) else text
