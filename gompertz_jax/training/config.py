"""What a run is made of: every key with its default and meaning, and the checks that need no data."""

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_collections
import numpy as np

from .. import objective as terms
from .. import schedules
from ..objective import Objective, Projection, Term
from ..schedules import Schedule
from .errors import RunError

Config = Any  # an ml_collections.ConfigDict: what its keys hold is known to get_default, not to a type checker

# Keys that may differ between the first start of a workdir and a later one: they change no number of the run.
CHANGEABLE = (
    "data.data_dir",
    "data.placement",
    "data.device_fraction",
    "compilation_cache",
    "evaluate_every_epochs",  # changes which steps the best may be chosen from, and no training: told, and recorded
    "logging",
    "checkpoint",
    "teacher.min_accuracy",
)

LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": terms.cross_entropy,
    "soft_targets": terms.soft_targets,
    "wasserstein": terms.wasserstein,
    "gaussian": terms.gaussian,
    "gradient_match": terms.gradient_match,
}
SCHEDULED_ARGUMENTS = ("temperature", "epsilon")


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
            "data": {
                "name": "cifar10",  # "cifar10", "cifar100", "digits"
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
                "recipe": get_recipe(),
            },
            "recipe": get_recipe() | {"projection_rate": 1.0},  # projections: factor on the learning rate
            "objective": {
                "curve": "gompertz(displacement=5, rate=8)",
                # The weights of transport and gradients were measured once on training images and then frozen: see
                # configs/cifar10_small.py.
                # NAME: the loss, its weight and its options. Weights, temperature and epsilon are schedules in text:
                # a number, a curve such as "linear(start=8, end=2)", `curve` for the one above, or a product of these.
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
                        "every_k_steps": 1,
                    },
                },
                # NAME: which stages a projection joins; -1 is the map that is pooled
                "projections": {"last": {"student_stage": -1, "teacher_stage": -1}},
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
                # Batches over which, at each evaluation, every raw term's gradient norm and cosine with the first's
                # are measured; 0: none
                "term_gradients": 0,
                "progress": True,
            },
        }
    )
    config.lock()
    for open_ended in (config.student.options, config.teacher.options, config.objective.terms):
        open_ended.unlock()  # their keys are the user's; what they may be is checked where they are built
    config.objective.projections.unlock()
    return config


# --- schedules in text ------------------------------------------------------------------------------------------------

_CURVES = {
    "gompertz": schedules.gompertz_schedule,
    "gompertz_through": schedules.gompertz_through,
    "logistic": schedules.logistic_schedule,
    "linear": schedules.linear_schedule,
    "cosine": schedules.cosine_schedule,
}


def parse_schedule(text: str, total_steps: int, *, curve: Schedule | None = None, where: str = "schedule") -> Schedule:
    """A schedule from its text in a config.

    Args:
      text: a number; a curve with keyword arguments, one of `gompertz`, `gompertz_through`, `logistic`, `linear`,
        `cosine`; `reversed(S)` and `matched(S)` of another schedule; `curve`; or a product of these.
      total_steps: what the curves are indexed by.
      curve: what the word `curve` stands for.
      where: the config's key, for messages.

    Returns:
      step -> value.

    Raises:
      RunError: the text says nothing of the above, or a curve refuses its arguments.

    Examples:
      >>> halved = parse_schedule("0.5 * linear(start=0, end=1)", 100)
      >>> float(halved(50))
      0.25
    """

    def fail(reason: str) -> RunError:
        return RunError(
            f"{where} = {text!r}: {reason}. Write a number, one of {', '.join(_CURVES)} with keyword arguments, "
            f"reversed(...), matched(...), curve, or a product such as '0.5 * curve'"
        )

    def build(node: ast.expr) -> Schedule:
        match node:
            case ast.Constant(value=int() | float() as value):
                return schedules.constant_schedule(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return schedules.constant_schedule(-value)
            case ast.Name(id="curve") if curve is not None:
                return curve
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                first, second = build(left), build(right)
                return lambda step: first(step) * second(step)
            case ast.Call(func=ast.Name(id="reversed"), args=[inner], keywords=[]):
                return schedules.reversed_schedule(build(inner), total_steps)
            case ast.Call(func=ast.Name(id="matched"), args=[inner], keywords=[]):
                return schedules.matched_constant(build(inner), total_steps)
            case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if name in _CURVES:
                try:
                    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
                except ValueError:
                    raise fail(f"the arguments of {name} must be numbers") from None
                try:
                    return _CURVES[name](total_steps, **arguments)
                except TypeError:
                    legal = list(inspect.signature(_CURVES[name]).parameters)[1:]
                    raise fail(f"{name} takes {', '.join(legal)}, got {', '.join(map(str, arguments))}") from None
        raise fail(f"cannot read {ast.unparse(node)!r}")

    try:
        return build(ast.parse(str(text), mode="eval").body)
    except SyntaxError:
        raise fail("is not an expression") from None
    except RunError:
        raise
    except ValueError as error:
        raise fail(str(error)) from None


def sampled(schedule: Schedule, total_steps: int) -> np.ndarray:
    """A schedule's value at every step of a run, on the host."""
    return np.broadcast_to(np.asarray(schedule(np.arange(total_steps))), (total_steps,))


# --- the objective ----------------------------------------------------------------------------------------------------


def build_objective(config: Config, total_steps: int) -> Objective:
    """The objective that `config.objective` describes; terms of weight 0 are left out, with their cost.

    Raises:
      RunError: an unknown loss or option, a temperature or epsilon that is not positive at some step, a weight that is
        not finite, a projection that is not defined, no term at all.
    """
    curve = parse_schedule(config.objective.curve, total_steps, where="objective.curve")
    built = []
    for name, spec in sorted(config.objective.terms.items(), key=lambda item: (item[0] != "ce", item[0])):
        where = f"objective.terms.{name}"
        if not isinstance(spec, ml_collections.ConfigDict):
            raise RunError(f"{where} = {spec!r} must be a group of keys with a loss and a weight")
        options = spec.to_dict()
        if missing := {"loss", "weight"} - options.keys():
            raise RunError(f"{where} lacks {' and '.join(sorted(missing))}")
        loss_name, weight_text = options.pop("loss"), options.pop("weight")
        every = options.pop("every_k_steps", 1)
        if type(every) is not int or every < 1:
            raise RunError(f"{where}.every_k_steps = {every!r} must be a whole number of at least 1")
        if every > 1 and loss_name == "cross_entropy":
            raise RunError(f"{where}.every_k_steps = {every}: the cross-entropy is computed at every step")
        if loss_name not in LOSSES:
            raise RunError(f"{where}.loss = {loss_name!r} is unknown; there are {', '.join(LOSSES)}")
        loss = LOSSES[loss_name]
        legal = [parameter for parameter in inspect.signature(loss).parameters if parameter != "record"]
        if unknown := [key for key in options if key not in legal]:
            raise RunError(f"{where}.{unknown[0]} is no option of {loss_name}, which takes {', '.join(legal)}")
        weight = parse_schedule(weight_text, total_steps, curve=curve, where=f"{where}.weight")
        weights = sampled(weight, total_steps)
        if not np.isfinite(weights).all():
            step = int(np.argmin(np.isfinite(weights)))
            raise RunError(f"{where}.weight = {weight_text!r} is not finite at step {step}")
        if not weights.any():
            continue
        scheduled = {}
        for key in [key for key in options if key in SCHEDULED_ARGUMENTS]:
            text = options.pop(key)
            scheduled[key] = parse_schedule(text, total_steps, curve=curve, where=f"{where}.{key}")
            values = sampled(scheduled[key], total_steps)
            if not (np.isfinite(values) & (values > 0)).all():
                step = int(np.argmin(np.isfinite(values) & (values > 0)))
                raise RunError(f"{where}.{key} = {text!r} is {values[step]:g} at step {step}; it must stay above 0")
        if "projection" in legal and options.setdefault("projection", "last") not in config.objective.projections:
            known = ", ".join(config.objective.projections) or "none"
            raise RunError(
                f"{where}.projection = {options['projection']!r} is not among objective.projections: {known}"
            )
        if loss_name == "cross_entropy":
            options.setdefault("label_smoothing", config.recipe.label_smoothing)
        distils = loss_name != "cross_entropy"
        built.append(Term(name, weight, partial(loss, **options), scheduled, distils=distils, every_k_steps=every))
    if not built:
        raise RunError("objective.terms: every weight is 0, so there is nothing to learn; give one term a weight")
    used = sorted({term.loss.keywords["projection"] for term in built if "projection" in term.loss.keywords})
    projections = {}
    for name in used:
        spec = config.objective.projections[name]
        stages = spec.to_dict() if isinstance(spec, ml_collections.ConfigDict) else {}
        if stages.keys() != set(Projection._fields) or not all(isinstance(stage, int) for stage in stages.values()):
            raise RunError(
                f"objective.projections.{name} = {stages or spec!r} must have the integers student_stage, teacher_stage"
            )
        projections[name] = Projection(**stages)
    return Objective(tuple(built), projections)


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


def check(config: Config) -> None:
    """Refuse a config whose values cannot be right, before anything is loaded or computed."""
    from ..models import names
    from .data import NAMES

    for key, value in _leaves(config.to_dict()):
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"{key} = {value}: must be finite")
    if config.data.name not in NAMES:
        raise RunError(f"data.name = {config.data.name!r} is unknown; there are {', '.join(NAMES)}")
    for key, seed in (("seed", config.seed), ("teacher.seed", config.teacher.seed)):
        if not 0 <= seed < 2**31:
            raise RunError(f"{key} = {seed}: must lie in [0, 2^31)")
    build_objective(config, 1000)  # for its refusals; the true number of steps is known once the data are there
    check_recipe(config.recipe, "recipe")
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
    if config.logging.term_gradients < 0:
        raise RunError(f"logging.term_gradients = {config.logging.term_gradients}: must not be negative; 0 means none")
    if config.checkpoint.keep < 1:
        raise RunError(f"checkpoint.keep = {config.checkpoint.keep}: must be at least 1")
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
