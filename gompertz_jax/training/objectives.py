"""From a config's text to an objective: schedules, losses by name, projections."""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from .. import projections as kinds
from .. import schedules, terms
from ..objective import Objective, Progress, Term, agreement, relative_accuracy
from ..schedules import AnySchedule, ByProgress, Schedule
from .config import Config
from .errors import RunError
from .optim import rate_by_step


class Loss(NamedTuple):
    """A loss that a term of a config can name.

    Attributes:
      term: the function of a record; its keywords are the term's options.
      weight: the published weight as a schedule in text, the term's default; "" where there is none to cite. The source
        is in the docstring of the loss that the term calls.
      projection: the projection that it reads, if any: its kind and its default options.
      bridge: how maps that differ are made comparable, where no projection does it.
    """

    term: Callable[..., Any]
    weight: str = ""
    projection: kinds.AnyProjection | None = None
    bridge: str = ""


# DKD and ReviewKD raise their weight over the first 20 of 240 epochs, WKD lowers it after epoch 150.
_WARM_UP = "linear(until=0.0833)"
_DECAY = "cosine(start=1, end=0, since=0.625)"
_SMALLER = "the larger map averaged to the size of the smaller"

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(terms.cross_entropy, "1"),
    "soft_targets": Loss(terms.soft_targets, "0.9"),
    "decoupled": Loss(terms.decoupled, _WARM_UP),
    "multi_temperature": Loss(terms.multi_temperature, "0.9"),
    "batch_correlation": Loss(terms.batch_correlation, "0.9"),
    "class_correlation": Loss(terms.class_correlation, "0.9"),
    "interclass_correlation": Loss(terms.interclass_correlation, "2"),
    "intraclass_correlation": Loss(terms.intraclass_correlation, "2"),
    "hint": Loss(terms.hint, "100", kinds.Regressor()),
    "attention_transfer": Loss(terms.attention_transfer, "1000", bridge=f"channels summed, {_SMALLER}"),
    "neuron_selectivity": Loss(terms.neuron_selectivity, "50", bridge=f"over channels, {_SMALLER}"),
    "variational_information": Loss(terms.variational_information, "1", kinds.VariationalRegressor()),
    "review": Loss(terms.review, f"5 * {_WARM_UP}", kinds.Review()),
    "similarity_preserving": Loss(
        terms.similarity_preserving, "3000", bridge="similarities between images, of any channels and sizes"
    ),
    "correlation_congruence": Loss(
        terms.correlation_congruence, "100", bridge="correlations between images, of any widths"
    ),
    "relational_distance": Loss(terms.relational_distance, "25", bridge="distances between images, of any widths"),
    "relational_angle": Loss(terms.relational_angle, "50", bridge="angles between images, of any widths"),
    "probabilistic_transfer": Loss(
        terms.probabilistic_transfer, "30000", bridge="similarities between images, of any widths"
    ),
    "contrastive_representation": Loss(terms.contrastive_representation, "0.8", kinds.Embedding()),
    "wasserstein": Loss(terms.wasserstein, "", kinds.Projection()),
    "gaussian": Loss(terms.gaussian, "", kinds.Projection()),
    "wasserstein_features": Loss(terms.wasserstein_features, f"0.08 * {_DECAY}", kinds.Regressor(-1, -1, resize=False)),
    "wasserstein_logits": Loss(terms.wasserstein_logits, f"600 * {_DECAY}", kinds.ClassDistances()),
    "target_cross_entropy": Loss(terms.target_cross_entropy, "1"),
    "gradient_match": Loss(terms.gradient_match, ""),
    "jacobian": Loss(terms.jacobian, "0.0065"),
    "sobolev": Loss(terms.sobolev, "1"),
    "gradient_attention": Loss(terms.gradient_attention, ""),
}

SCHEDULED_ARGUMENTS = ("temperature", "epsilon")
MEASURES = {"agreement": agreement, "relative_accuracy": relative_accuracy}


# --- schedules in text ------------------------------------------------------------------------------------------------

_CURVES = {
    "gompertz": schedules.gompertz_schedule,
    "gompertz_through": schedules.gompertz_through,
    "logistic": schedules.logistic_schedule,
    "linear": schedules.linear_schedule,
    "cosine": schedules.cosine_schedule,
}


def parse_schedule(
    text: str | int | float,
    total_steps: int,
    *,
    curve: AnySchedule | None = None,
    rate: Schedule | None = None,
    where: str = "schedule",
) -> AnySchedule:
    """A schedule from its text in a config.

    Args:
      text: a number; a curve with keyword arguments, one of `gompertz`, `gompertz_through`, `logistic`, `linear`,
        `cosine`; `reversed(S)` of another schedule; `matched(S)`, the constant of its mean, and `matched_lr(S)`, of its
        mean weighted by the learning rate; `progress(S)`, the curve S read at the student's progress instead of the
        clock; `curve`; or a sum, difference or product of these.
      total_steps: what the curves are indexed by.
      curve: what the word `curve` stands for.
      rate: the learning rate, step -> rate, for `matched_lr`.
      where: the config's key, for messages.

    Returns:
      step -> value, or a `ByProgress`.

    Raises:
      RunError: the text is none of the above, or a curve refuses its arguments.

    Examples:
      >>> halved = parse_schedule("0.5 * linear(start=0, end=1)", 100)
      >>> float(halved(50))
      0.25
    """

    def fail(reason: str) -> RunError:
        return RunError(
            f"{where} = {text!r:.200}: {reason:.500}. Write a number, one of {', '.join(_CURVES)} with keyword "
            "arguments, reversed(...), matched(...), matched_lr(...), progress(...), curve, or an expression such as "
            "'1 - 0.5 * curve'"
        )

    def by_the_clock(name: str, node: ast.expr, length: int) -> Schedule:
        inner = build(node, length)
        if isinstance(inner, ByProgress) or length == 1:
            raise fail(f"{name} needs a schedule by the clock: what a run's progress will be is not known beforehand")
        return inner

    def build(node: ast.expr, length: int) -> AnySchedule:
        match node:
            case ast.Constant(value=int() | float() as value):
                return schedules.constant_schedule(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return schedules.constant_schedule(-value)
            case ast.Name(id="curve") if curve is not None and length == total_steps:
                return curve
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                return schedules.product(build(left, length), build(right, length))
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return schedules.total(build(left, length), build(right, length))
            case ast.BinOp(op=ast.Sub(), left=left, right=right):
                negative = schedules.product(schedules.constant_schedule(-1.0), build(right, length))
                return schedules.total(build(left, length), negative)
            case ast.Call(func=ast.Name(id="reversed"), args=[inner], keywords=[]):
                return schedules.reversed_schedule(by_the_clock("reversed", inner, length), length)
            case ast.Call(func=ast.Name(id="matched"), args=[inner], keywords=[]):
                return schedules.matched_constant(by_the_clock("matched", inner, length), length)
            case ast.Call(func=ast.Name(id="matched_lr"), args=[inner], keywords=[]):
                if rate is None:
                    raise fail("matched_lr needs a learning rate, and here is none")
                return schedules.matched_constant(by_the_clock("matched_lr", inner, length), length, weights=rate)
            case ast.Call(func=ast.Name(id="progress"), args=[inner], keywords=[]):
                driven = build(inner, 1)
                return driven if isinstance(driven, ByProgress) else schedules.by_progress(driven)
            case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if name in _CURVES:
                try:
                    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
                except ValueError:
                    raise fail(f"the arguments of {name} must be numbers") from None
                try:
                    return _CURVES[name](length, **arguments)
                except TypeError as error:
                    legal = list(inspect.signature(_CURVES[name]).parameters)[1:]
                    if arguments.keys() <= {*legal}:
                        raise fail(str(error)) from None
                    raise fail(f"{name} takes {', '.join(legal)}, got {', '.join(map(str, arguments))}") from None
        raise fail(f"cannot read {ast.unparse(node)!r}")

    try:
        return build(ast.parse(str(text), mode="eval").body, total_steps)
    except (SyntaxError, RecursionError, MemoryError):  # the latter two from brackets and products without end
        raise fail("is not an expression") from None
    except RunError:
        raise
    except ValueError as error:
        raise fail(str(error)) from None


def sampled(schedule: AnySchedule, total_steps: int) -> np.ndarray:
    """A schedule's value at every step of a run, on the host; progress is assumed to follow the clock."""
    steps = np.arange(total_steps)
    values = schedules.value_at(schedule, steps, np.linspace(0.0, 1.0, total_steps, dtype=np.float32))
    return np.broadcast_to(np.asarray(values), (total_steps,))


def weight_warnings(term: str, values: np.ndarray) -> Iterator[str]:
    """What of a term's weights at every step is a mistake more often than not."""
    if (values < 0).any():
        step = int(np.argmax(values < 0))
        yield f"{term}: the weight is {values[step]:.3g} at step {step:,}; below 0 the term is made larger, not smaller"


QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of training, at which a schedule is shown


def quarter_steps(total_steps: int) -> tuple[int, ...]:
    """The steps of a run that are at `QUARTERS` of it."""
    return tuple(round(quarter * (total_steps - 1)) for quarter in QUARTERS)


def at_quarters(values: np.ndarray) -> tuple[float, ...]:
    """The values of a sampled schedule at `QUARTERS` of training."""
    return tuple(float(values[step]) for step in quarter_steps(len(values)))


# --- the objective ----------------------------------------------------------------------------------------------------


def build_objective(config: Config, total_steps: int) -> Objective:
    """The objective that `config.objective` describes; terms of weight 0 are left out, with their cost.

    Raises:
      RunError: an unknown loss or option, a temperature or epsilon that is not positive at some step, a weight that is
        not finite, a projection that is not defined or of another kind, no term at all.
    """
    rate = rate_by_step(config.recipe, total_steps)
    curve = parse_schedule(config.objective.curve, total_steps, rate=rate, where="objective.curve")
    built, projections = [], {}

    def place(item: tuple[str, Any]) -> tuple[bool, str]:  # the cross-entropy first: telemetry is measured against it
        name, spec = item
        return getattr(spec, "loss", None) != "cross_entropy", name

    for name, spec in sorted(config.objective.terms.items(), key=place):
        where = f"objective.terms.{name}"
        if not isinstance(spec, ml_collections.ConfigDict):
            raise RunError(f"{where} = {spec!r} must be a group of keys with a loss")
        options = spec.to_dict()
        parse = partial(parse_schedule, total_steps=total_steps, curve=curve, rate=rate)
        term = _term(name, options, config, total_steps, parse, where)
        if term is None:
            continue
        built.append(term)
        default = LOSSES[options["loss"]].projection
        if default is not None:
            wanted = term.loss.keywords["projection"]
            projection = _projection(wanted, default, config.objective.projections, options["loss"], where)
            if projections.setdefault(wanted, projection) != projection:
                raise RunError(
                    f"{where}.projection = {wanted!r} is read by a loss of another kind too; give each its own"
                )
    if not built:
        raise RunError("objective.terms: every weight is 0, so there is nothing to learn; give one term a weight")
    progress = _progress(config.objective)
    if not any(term.reads_progress() for term in built):
        return Objective(tuple(built), projections)
    if config.objective.skip_below > 0:
        raise RunError(
            f"objective.skip_below = {config.objective.skip_below}: a step that skips the teacher cannot measure the "
            "progress that a weight reads; take 0, or a curve by the clock"
        )
    return Objective(tuple(built), projections, progress)


def switched_off(spec: Mapping[str, Any]) -> bool:
    """Whether a term's own weight is 0 throughout, whatever the objective's curve is.

    Raises:
      RunError: the weight is no schedule.
    """
    loss = LOSSES.get(spec["loss"])
    text = spec.get("weight", loss.weight if loss else "")
    if text == "":
        return False  # and refused where the objective is built
    steps = 100  # of which the number does not matter
    ramp, even = schedules.linear_schedule(steps), schedules.constant_schedule(1.0)
    return not sampled(parse_schedule(text, steps, curve=ramp, rate=even), steps).any()


def _term(
    name: str,
    spec: Mapping[str, Any],
    config: Config,
    total_steps: int,
    parse: Callable[..., AnySchedule],
    where: str,
) -> Term | None:
    """One term; None if its weight is 0 throughout."""
    options = dict(spec)
    if "loss" not in options:
        raise RunError(f"{where} lacks loss; there are {', '.join(LOSSES)}")
    loss_name = options.pop("loss")
    if not isinstance(loss_name, str) or loss_name not in LOSSES:
        raise RunError(f"{where}.loss = {loss_name!r} is unknown; there are {', '.join(LOSSES)}")
    loss = LOSSES[loss_name]
    weight_text = options.pop("weight", loss.weight)
    if weight_text == "":
        raise RunError(f"{where} lacks a weight, and {loss_name} has no published one")
    every = options.pop("every_k_steps", 1)
    if type(every) is not int or every < 1:
        raise RunError(f"{where}.every_k_steps = {every!r} must be a whole number of at least 1")
    if every > 1 and loss_name == "cross_entropy":
        raise RunError(f"{where}.every_k_steps = {every}: the cross-entropy is computed at every step")
    parameters = inspect.signature(loss.term).parameters
    legal = [parameter for parameter in parameters if parameter not in ("record", "of_teacher")]
    if unknown := [key for key in options if key not in legal]:
        raise RunError(f"{where}.{unknown[0]} is no option of {loss_name}, which takes {', '.join(legal) or 'none'}")
    weight = parse(weight_text, where=f"{where}.weight")
    weights = sampled(weight, total_steps)
    if not np.isfinite(weights).all():
        step = int(np.argmin(np.isfinite(weights)))
        raise RunError(f"{where}.weight = {weight_text!r} is not finite at step {step}")
    if not weights.any():
        return None
    scheduled = {}
    for key in [key for key in options if key in SCHEDULED_ARGUMENTS]:
        text = options.pop(key)
        scheduled[key] = parse(text, where=f"{where}.{key}")
        values = sampled(scheduled[key], total_steps)
        if not (np.isfinite(values) & (values > 0)).all():
            step = int(np.argmin(np.isfinite(values) & (values > 0)))
            raise RunError(f"{where}.{key} = {text!r} is {values[step]:g} at step {step}; it must stay above 0")
    if "projection" in legal:
        options.setdefault("projection", parameters["projection"].default)
    stages = options.get("stages", ())
    if not isinstance(stages, tuple | list) or len(stages) not in (0, 2) or any(type(i) is not int for i in stages):
        raise RunError(f"{where}.stages = {stages!r} must be empty or (student stage, teacher stage)")
    if loss_name == "cross_entropy":
        options.setdefault("label_smoothing", config.recipe.label_smoothing)
    bound = partial(loss.term, **options)
    return Term(
        name,
        weight,
        bound,
        scheduled,
        distils=loss_name != "cross_entropy",
        every_k_steps=every,
        gradient_stages=tuple(stages),
        of_teacher=partial(terms.teacher_gradient, **bound.keywords) if "of_teacher" in parameters else None,
        bridge=f"each position's contribution, {_SMALLER}" if stages else loss.bridge,
    )


def _projection(name: str, default: Any, specs: Config, loss_name: str, where: str) -> Any:
    """The projection `name`, as the loss reads it, with the config's options."""
    if not isinstance(name, str):
        raise RunError(f"{where}.projection = {name!r} must be the name of one of objective.projections")
    if name not in specs:
        if name != inspect.signature(LOSSES[loss_name].term).parameters["projection"].default:
            raise RunError(
                f"{where}.projection = {name!r} is not among objective.projections: {', '.join(specs) or 'none'}"
            )
        return default
    spec = specs[name]
    if not isinstance(spec, ml_collections.ConfigDict):
        raise RunError(f"objective.projections.{name} = {spec!r} must be a group of keys")
    options = spec.to_dict()
    for key, value in options.items():
        place = f"objective.projections.{name}.{key}"
        if key not in default._fields:
            raise RunError(f"{place} = {value!r}: what {loss_name} reads has the keys {', '.join(default._fields)}")
        wanted = type(getattr(default, key))
        if type(value) is not wanted:
            raise RunError(f"{place} = {value!r} must be of type {wanted.__name__}")
    return default._replace(**options)


def _progress(objective: Config) -> Progress:
    """How the config would measure progress for a weight that reads it."""
    options = objective.progress
    if options.measure not in MEASURES:
        raise RunError(f"objective.progress.measure = {options.measure!r} is unknown; there are {', '.join(MEASURES)}")
    if not 0 <= options.decay < 1:
        raise RunError(f"objective.progress.decay = {options.decay}: must lie in [0, 1)")
    return Progress(MEASURES[options.measure], options.decay, options.monotone)
