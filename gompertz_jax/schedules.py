"""Schedules: a constructor takes `total_steps` and shape parameters and returns a pure function from step to weight.

Every schedule accepts a Python or NumPy integer, a traced step, or an array of steps of any shape, and returns weights
of that shape, in at least float32. It is safe under `jax.jit`, `jax.vmap` and `jax.grad`, with respect to the step and
to the parameters of the curve. Parameters that are known before tracing are kept as Python floats.
"""

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import (
    Scalar,
    check_real,
    checked,
    finite_number,
    fraction,
    is_traced,
    positive_count,
    positive_number,
    shown,
)
from ._numerics import compute_dtype

Schedule: TypeAlias = Callable[[Any], Any]
"""step -> coefficient. Any function that JAX can trace with a scalar step will do, for instance one of Optax's."""

# exp(-exp(u)) is 0 in float32 and in float64 for u >= 7; the bound only keeps exp(u), and with it the derivative,
# finite.
_LARGEST_INNER_EXPONENT = 80.0

# A Gompertz curve that starts above this fraction of its asymptote has no slow start.
_SLOW_START = 0.05

_STEPS_AT_ONCE = 1 << 16


@checked
def gompertz_schedule(
    total_steps: int | np.integer, *, asymptote: Scalar = 1.0, displacement: Scalar = 5.0, rate: Scalar = 8.0
) -> Schedule:
    r"""Weight that follows a Gompertz curve: slow start, fast middle, late saturation.

    .. math:: w(t) = a \exp(-b \exp(-c \, t / T))

    with asymptote `a`, displacement `b`, rate `c` and `T = total_steps`. It starts at :math:`a e^{-b}`, not at 0; it is
    steepest at :math:`t / T = \ln(b) / c`, where it has reached :math:`a / e`; its mean over [0, T] is
    :math:`a (E_1(b e^{-c}) - E_1(b)) / c`. The curve is not clamped outside [0, T]. It is evaluated as
    :math:`a \exp(-\exp(\ln b - c \, t / T))`, whose value and derivatives are finite for every legal parameter.

    That the distillation weight follows this curve is the idea of the Gompertz-CNN paper's abstract; the parameters,
    and that the curve is indexed by the step, are our reconstruction.

    Args:
      total_steps: number of training steps `T`, a positive integer. The unit of `rate` is one over this whole run: the
        same curve over raw steps has the rate `c / T`.
      asymptote: the weight that is approached late, finite.
      displacement: `b`, positive, without unit. 5 starts the curve at .7 % of its asymptote.
      rate: `c`, positive, per `total_steps`.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `total_steps`, `displacement` or `rate` is not positive, or a parameter is not finite.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> weight = gj.gompertz_schedule(1000)
      >>> print(np.asarray(weight(np.array([0, 201, 500, 1000]))).round(3))
      [0.007 0.367 0.912 0.998]

    References:
      Gompertz, On the Nature of the Function Expressive of the Law of Human Mortality, 1825,
      https://doi.org/10.1098/rstl.1825.0026. Yang and Qin, Gompertz-CNN, 2025, https://arxiv.org/abs/2510.21649.
    """
    displacement = positive_number("displacement", displacement)
    return _gompertz(
        positive_count("total_steps", total_steps),
        finite_number("asymptote", asymptote),
        math.log(displacement) if isinstance(displacement, float) else jnp.log(displacement),
        positive_number("rate", rate),
    )


@checked
def gompertz_through(
    total_steps: int | np.integer, *, inflection: Scalar, final: Scalar = 0.99, asymptote: Scalar = 1.0
) -> Schedule:
    r"""Gompertz curve, given by where it is steepest and by how much of its asymptote it reaches at the end.

    The same curve as `gompertz_schedule` with

    .. math:: c = -\ln(-\ln \text{final}) / (1 - \text{inflection}), \qquad b = \exp(c \cdot \text{inflection}).

    A curve with an early inflection has little room for a slow start: there is a warning if it starts above 5 % of its
    asymptote.

    Args:
      total_steps: number of training steps, a positive integer.
      inflection: where the curve is steepest, as a fraction of `total_steps`, between 0 and 1.
      final: the fraction of the asymptote that is reached at `step = total_steps`, between 1/e and 1.
      asymptote: the weight that is approached late, finite.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `total_steps` is not positive, `inflection` or `final` is outside its interval, or `asymptote` is
        not finite.

    Warns:
      UserWarning: if the curve starts above 5 % of its asymptote.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> weight = gj.gompertz_through(1000, inflection=0.4, final=0.95)
      >>> print(np.asarray(weight(np.array([0, 400, 1000]))).round(3))
      [0.001 0.368 0.95 ]

    References:
      Parametrisation: our own. Curve: see `gompertz_schedule`.
    """
    steps = positive_count("total_steps", total_steps)
    inflection = fraction("inflection", inflection, 0.0, 1.0, legal="between 0 and 1, a fraction of total_steps")
    final = fraction("final", final, math.exp(-1.0), 1.0, legal="between 1/e and 1, a fraction of the asymptote")
    asymptote = finite_number("asymptote", asymptote)
    log = math.log if isinstance(final, float) else jnp.log
    rate = -log(-log(final)) / (1.0 - inflection)
    log_displacement = rate * inflection
    # Compared by its logarithm: the displacement itself overflows for a late inflection.
    if not is_traced(log_displacement) and log_displacement < math.log(-math.log(_SLOW_START)):
        start = math.exp(-math.exp(log_displacement))
        warnings.warn(
            f"the Gompertz curve with inflection={inflection:g} and final={final:g} starts at {start:.0%} of its "
            f"asymptote, so it has no slow start: raise inflection or final",
            UserWarning,
            stacklevel=3,  # the caller's line: `checked` is in between
        )
    return _gompertz(steps, asymptote, log_displacement, rate)


def _gompertz(
    total_steps: int, asymptote: float | Array, log_displacement: float | Array, rate: float | Array
) -> Schedule:
    def weight(step: Scalar) -> Float[Array, "..."]:
        tau = _progress(step, total_steps, asymptote, log_displacement, rate)
        return asymptote * jnp.exp(-jnp.exp(jnp.minimum(log_displacement - rate * tau, _LARGEST_INNER_EXPONENT)))

    return weight


@checked
def logistic_schedule(
    total_steps: int | np.integer, *, asymptote: Scalar = 1.0, midpoint: Scalar = 0.5, rate: Scalar = 10.0
) -> Schedule:
    r"""Weight that follows a logistic curve, symmetric about its midpoint.

    .. math:: w(t) = \frac{a}{1 + \exp(-c \, (t / T - m))}

    Not clamped outside [0, T].

    Args:
      total_steps: number of training steps `T`, a positive integer.
      asymptote: the weight `a` that is approached late, finite.
      midpoint: `m`, where the weight is half the asymptote, as a fraction of `total_steps`, finite.
      rate: `c`, positive, per `total_steps`.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `total_steps` or `rate` is not positive, or a parameter is not finite.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> print(np.asarray(gj.logistic_schedule(100)(np.array([0, 50, 100]))).round(3))
      [0.007 0.5   0.993]

    References:
      Verhulst, Notice sur la loi que la population suit dans son accroissement, 1838.
    """
    steps = positive_count("total_steps", total_steps)
    asymptote = finite_number("asymptote", asymptote)
    midpoint = finite_number("midpoint", midpoint)
    rate = positive_number("rate", rate)

    def weight(step: Scalar) -> Float[Array, "..."]:
        tau = _progress(step, steps, asymptote, midpoint, rate)
        return asymptote * jax.nn.sigmoid(rate * (tau - midpoint))

    return weight


@checked
def linear_schedule(
    total_steps: int | np.integer,
    *,
    start: Scalar = 0.0,
    end: Scalar = 1.0,
    since: Scalar = 0.0,
    until: Scalar = 1.0,
) -> Schedule:
    r"""Weight on a straight line from `start` to `end` between two fractions of `total_steps`, constant outside.

    .. math:: w(t) = (1 - \tau) \, \text{start} + \tau \, \text{end}, \qquad
       \tau = \min(\max((t / T - a) / (b - a), 0), 1)

    Args:
      total_steps: number of training steps `T`, a positive integer.
      start: the weight up to the step `since * total_steps`, finite.
      end: the weight at the step `until * total_steps` and after, finite.
      since: the fraction `a` of `total_steps` up to which the weight stays at `start`, at least 0.
      until: the fraction `b` at which `end` is reached, above `since`; a warm-up has a small one.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `total_steps` is not positive, `start` or `end` is not finite, or `since` and `until` do not fit.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> print(gj.linear_schedule(100, start=1.0, end=0.0)(np.array([-5, 25, 100, 200])))
      [1.   0.75 0.   0.  ]
      >>> warm_up = gj.linear_schedule(100, until=0.1)
      >>> print(warm_up(np.array([0, 5, 10, 100])))
      [0.  0.5 1.  1. ]
    """
    return _between(total_steps, start, end, since, until, lambda tau: tau)


@checked
def cosine_schedule(
    total_steps: int | np.integer,
    *,
    start: Scalar = 0.0,
    end: Scalar = 1.0,
    since: Scalar = 0.0,
    until: Scalar = 1.0,
) -> Schedule:
    r"""Weight along half a cosine from `start` to `end` between two fractions of `total_steps`, constant outside.

    .. math:: w(t) = (1 - s) \, \text{start} + s \, \text{end}, \qquad s = (1 - \cos \pi \tau) / 2,
       \quad \tau = \min(\max((t / T - a) / (b - a), 0), 1)

    Args:
      total_steps: number of training steps `T`, a positive integer.
      start: the weight up to the step `since * total_steps`, finite.
      end: the weight at the step `until * total_steps` and after, finite.
      since: the fraction `a` of `total_steps` up to which the weight stays at `start`, at least 0.
      until: the fraction `b` at which `end` is reached, above `since`; a warm-up has a small one.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `total_steps` is not positive, `start` or `end` is not finite, or `since` and `until` do not fit.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> print(np.asarray(gj.cosine_schedule(100)(np.array([0, 25, 50, 100]))).round(3))
      [0.    0.146 0.5   1.   ]

    References:
      Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017,
      https://arxiv.org/abs/1608.03983 (the shape; there it lowers a learning rate).
    """
    # sin^2 of half the angle is (1 - cos) / 2 without the cancellation near tau = 0.
    return _between(total_steps, start, end, since, until, lambda tau: jnp.square(jnp.sin(0.5 * math.pi * tau)))


def _between(
    total_steps: int | np.integer,
    start: Scalar,
    end: Scalar,
    since: Scalar,
    until: Scalar,
    part_of: Callable[[Array], Array],
) -> Schedule:
    steps = positive_count("total_steps", total_steps)
    start = finite_number("start", start)
    end = finite_number("end", end)
    since = finite_number("since", since, legal="a fraction of at least 0", accept=lambda number: number >= 0.0)
    until = positive_number("until", until)
    if isinstance(since, float) and isinstance(until, float) and until <= since:
        raise ValueError(f"until must be above since, got {until!r} and {since!r}")

    def weight(step: Scalar) -> Float[Array, "..."]:
        moved = jnp.asarray(step, _weight_dtype(step, start, end, since, until)) - since * steps
        part = part_of(jnp.clip(moved / (until * steps - since * steps), 0.0, 1.0))
        return (1.0 - part) * start + part * end

    return weight


@checked
def constant_schedule(value: Scalar) -> Schedule:
    """Weight that is the same at every step.

    Args:
      value: the weight, finite.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `value` is not finite.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> print(gj.constant_schedule(0.5)(np.arange(3)))
      [0.5 0.5 0.5]
    """
    value = finite_number("value", value)

    def weight(step: Scalar) -> Float[Array, "..."]:
        return jnp.broadcast_to(jnp.asarray(value, _weight_dtype(step, value)), jnp.shape(step))

    return weight


@checked
def reversed_schedule(schedule: Schedule, total_steps: int | np.integer) -> Schedule:
    """The same weights in the opposite order: step `t` gets the weight of step `total_steps - 1 - t`.

    Over the steps 0 to `total_steps - 1` it takes exactly the values of `schedule`, so both have the same mean weight.

    Args:
      schedule: the schedule to reverse.
      total_steps: number of training steps, a positive integer.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: if `total_steps` is not positive.

    Examples:
      >>> import numpy as np, gompertz_jax as gj
      >>> weight = gj.reversed_schedule(gj.linear_schedule(4), 4)
      >>> print(weight(np.arange(4)))
      [0.75 0.5  0.25 0.  ]
    """
    last = positive_count("total_steps", total_steps) - 1

    def weight(step: Scalar) -> Any:
        check_real("step", step)
        steps = jnp.asarray(step)
        if jnp.issubdtype(steps.dtype, jnp.integer):
            # A difference of unsigned or 8-bit steps would wrap around.
            steps = steps.astype(jnp.promote_types(steps.dtype, jnp.int32))
        return schedule(last - steps)

    return weight


@dataclass(frozen=True)
class ByProgress:
    """A weight that reads the student's progress instead of the clock.

    A schedule is a function of the step, which says how much of the training is over, not how far the student is. This
    one is a function of progress and step, and the objective's `Progress` defines progress.

    Attributes:
      value: `(progress, step) -> coefficient`, a pure function; progress lies in [0, 1].
    """

    value: Callable[[Any, Any], Any]

    def __post_init__(self):
        if not callable(self.value):
            raise TypeError(f"value must be a function (progress, step) -> coefficient, got {shown(self.value)}")


AnySchedule: TypeAlias = Schedule | ByProgress
"""A weight, or another quantity that changes over training: by the clock or by the student's progress."""


@checked
def by_progress(curve: Schedule) -> ByProgress:
    """The weight that `curve` has at the student's progress: a curve over one "step" is a curve over progress.

    The Gompertz-CNN paper's abstract says that the curve is meant to reflect the student's learning progression; that
    it is indexed by a measured one is our reading.

    Args:
      curve: progress in [0, 1] -> coefficient: a schedule made with `total_steps=1`.

    Returns:
      What a `Term` takes as its weight, or as one of its schedules, in an objective that measures progress.

    Examples:
      >>> import gompertz_jax as gj
      >>> weight = gj.by_progress(gj.gompertz_schedule(1))
      >>> round(float(weight.value(0.5, 1234)), 3)
      0.912

    References:
      Yang and Qin, Gompertz-CNN, 2025, https://arxiv.org/abs/2510.21649.
    """

    def value(progress: Scalar, step: Scalar) -> Any:
        check_real("progress", progress)
        return curve(progress)

    return ByProgress(value)


@checked
def value_at(schedule: AnySchedule, step: Any, progress: Any = None) -> Any:
    """The coefficient at a step, and at the student's progress if the schedule reads it.

    Raises:
      TypeError: step or progress is not a number, or the schedule returns something else.
      ValueError: it reads the progress, and none is measured.
    """
    check_real("step", step)
    if not isinstance(schedule, ByProgress):
        value = schedule(step)
    elif progress is None:
        raise ValueError("a weight is by_progress(...), and the objective has progress=None: give it a gj.Progress()")
    else:
        check_real("progress", progress)
        value = schedule.value(progress, step)
    check_real("what the schedule returns", value)
    return value


def product(first: AnySchedule, second: AnySchedule) -> AnySchedule:
    """The product of two schedules, which reads the progress if either does."""
    return _combined(operator.mul, first, second)


def total(first: AnySchedule, second: AnySchedule) -> AnySchedule:
    """The sum of two schedules, which reads the progress if either does."""
    return _combined(operator.add, first, second)


@checked
def _combined(operation: Callable[[Any, Any], Any], first: AnySchedule, second: AnySchedule) -> AnySchedule:
    def both(progress: Scalar | None, step: Scalar) -> Any:
        return operation(value_at(first, step, progress), value_at(second, step, progress))

    if isinstance(first, ByProgress) or isinstance(second, ByProgress):
        return ByProgress(both)
    return lambda step: both(None, step)


@checked
def mean_weight(schedule: Schedule, total_steps: int | np.integer, *, weights: Schedule | None = None) -> float:
    r"""Mean of a schedule over the steps 0 to `total_steps - 1`.

    .. math:: \bar w = \frac{\sum_t v(t) \, w(t)}{\sum_t v(t)}

    with `v = 1` unless `weights` is given. Every step is evaluated as the training step evaluates it, and summed in
    float64.

    Args:
      schedule: the schedule `w`.
      total_steps: number of training steps, a positive integer.
      weights: another schedule `v`, for instance the learning rate: a weight that comes when the steps are small moves
        the parameters less.

    Returns:
      The mean weight.

    Raises:
      ValueError: if `total_steps` is not positive, or the sum of `weights` is 0 or not finite.

    Examples:
      >>> import gompertz_jax as gj
      >>> curve = gj.gompertz_schedule(1000)
      >>> round(gj.mean_weight(curve, 1000), 3)
      0.726
      >>> learning_rate = gj.cosine_schedule(1000, start=0.05, end=0.0)
      >>> round(gj.mean_weight(curve, 1000, weights=learning_rate), 3)
      0.517
    """
    steps = positive_count("total_steps", total_steps)
    numerator = denominator = 0.0
    for first in range(0, steps, _STEPS_AT_ONCE):
        chunk = np.arange(first, min(first + _STEPS_AT_ONCE, steps))
        emphasis = np.ones(len(chunk)) if weights is None else _values(weights, chunk)
        numerator += float(np.sum(emphasis * _values(schedule, chunk)))
        denominator += float(np.sum(emphasis))
    if denominator == 0.0 or not math.isfinite(denominator):
        raise ValueError(f"weights must have a finite sum other than 0 over total_steps={steps}, got {denominator!r}")
    return numerator / denominator


@checked
def matched_constant(schedule: Schedule, total_steps: int | np.integer, *, weights: Schedule | None = None) -> Schedule:
    """The constant schedule with the same mean weight: the control of equal area.

    A schedule can help by its shape or by its area. Against this control only the shape can matter. With `weights`, for
    instance the learning rate, the weighted areas are equal instead.

    Args:
      schedule: the schedule to match.
      total_steps: number of training steps, a positive integer.
      weights: another schedule, see `mean_weight`.

    Returns:
      The schedule: step `[...]` -> weight `[...]`.

    Raises:
      ValueError: as `mean_weight`.

    Examples:
      >>> import gompertz_jax as gj
      >>> control = gj.matched_constant(gj.linear_schedule(5), 5)
      >>> round(float(control(0)), 3)
      0.4
    """
    return constant_schedule(mean_weight(schedule, total_steps, weights=weights))


def _weight_dtype(step: Any, *parameters: Any) -> Any:
    check_real("step", step)
    # Python floats are constants of the curve and follow the step's dtype; a traced parameter has its own dtype.
    return compute_dtype(step, *(parameter for parameter in parameters if not isinstance(parameter, float)))


def _progress(step: Any, total_steps: int, *parameters: Any) -> Array:
    """Step / total_steps, in the dtype in which the curve with these parameters is computed."""
    return jnp.asarray(step, _weight_dtype(step, *parameters)) / total_steps


def _values(schedule: Schedule, steps: np.ndarray) -> np.ndarray:
    # vmap shows the schedule the scalar step that the training step shows it; compile-time evaluation makes this work
    # inside a function that is being traced, too.
    with jax.ensure_compile_time_eval():
        values = jax.vmap(partial(_one_value, schedule))(jnp.asarray(steps))
    if is_traced(values):
        raise ValueError(
            "the mean of a schedule is a number known before tracing, and a parameter of schedule or weights is traced"
        )
    return np.asarray(values, np.float64)


def _one_value(schedule: Schedule, step: Array) -> Array:
    weight = schedule(step)
    if not isinstance(weight, int | float | np.generic | np.ndarray | jax.Array) or jnp.ndim(weight) != 0:
        raise ValueError(f"schedule and weights must each return one number at a step, got {shown(weight)}")
    return jnp.asarray(weight)
