"""Schedules against closed forms (float64 NumPy, SciPy), under every transformation, at every legal extreme."""

import inspect
import itertools
import math
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from helpers import ROOT

import gompertz_jax as gj
from gompertz_jax.schedules import product, value_at

STEPS = np.array([-50, 0, 1, 37, 201, 500, 999, 1000, 1500])


def gompertz(tau, a, b, c):
    return a * np.exp(-b * np.exp(-c * np.asarray(tau, np.float64)))


def cases():
    tau = STEPS / 1000.0
    held = np.clip(tau, 0.0, 1.0)
    rate = -math.log(-math.log(0.9)) / 0.6
    return {
        "gompertz": (gj.gompertz_schedule(1000), gompertz(tau, 1.0, 5.0, 8.0)),
        "gompertz shaped": (
            gj.gompertz_schedule(1000, asymptote=2.5, displacement=0.5, rate=3.0),
            gompertz(tau, 2.5, 0.5, 3.0),
        ),
        "through": (
            gj.gompertz_through(1000, inflection=0.4, final=0.9, asymptote=0.5),
            gompertz(tau, 0.5, math.exp(rate * 0.4), rate),
        ),
        "logistic": (
            gj.logistic_schedule(1000, asymptote=3.0, midpoint=0.25, rate=7.0),
            3.0 / (1.0 + np.exp(-7.0 * (tau - 0.25))),
        ),
        "linear": (gj.linear_schedule(1000, start=2.0, end=-1.0), 2.0 - 3.0 * held),
        "cosine": (gj.cosine_schedule(1000, start=0.5, end=2.0), 0.5 + 1.5 * (1.0 - np.cos(np.pi * held)) / 2.0),
        "linear warm-up": (gj.linear_schedule(1000, until=0.25), np.clip(tau / 0.25, 0.0, 1.0)),
        "cosine warm-up": (
            gj.cosine_schedule(1000, end=3.0, until=0.5),
            1.5 * (1.0 - np.cos(np.pi * np.clip(2.0 * tau, 0.0, 1.0))),
        ),
        "late cosine": (
            gj.cosine_schedule(1000, start=1.0, end=0.0, since=0.4, until=0.9),
            0.5 * (1.0 + np.cos(np.pi * np.clip((tau - 0.4) / 0.5, 0.0, 1.0))),
        ),
        "constant": (gj.constant_schedule(0.3), np.full(len(STEPS), 0.3)),
        "reversed": (gj.reversed_schedule(gj.gompertz_schedule(1000), 1000), gompertz((999 - STEPS) / 1000, 1, 5, 8)),
    }


NAMES = list(cases())


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_formula(name):
    schedule, expected = cases()[name]
    np.testing.assert_allclose(schedule(STEPS), expected, rtol=3e-6, atol=1e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule(STEPS.astype(np.float64)), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_step_gives_the_same_weight(name):
    schedule, expected = cases()[name]
    expected = expected[3]
    for step in (37, np.int64(37), np.uint8(37), np.int32(37), 37.0, jnp.asarray(37), jnp.asarray(37, jnp.uint8)):
        weight = schedule(step)
        assert weight.shape == () and weight.dtype == jnp.float32
        np.testing.assert_allclose(weight, expected, rtol=3e-6)
    steps = jnp.asarray(STEPS)
    eager = schedule(steps)
    assert schedule(steps.reshape(3, 3)).shape == (3, 3)
    np.testing.assert_allclose(jax.jit(schedule)(steps), eager, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), eager, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda step, _: (step + 1, schedule(step)), jnp.asarray(0), None, length=40)
    np.testing.assert_allclose(scanned[37], expected, rtol=3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8])
def test_a_narrow_step_is_raised_to_float32(dtype):
    weight = gj.gompertz_schedule(1000)(jnp.asarray(64, dtype))
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, gompertz(0.064, 1, 5, 8), rtol=1e-6)


def test_gompertz_has_the_properties_that_its_document_names():
    a, b, c, total = 1.7, 5.0, 8.0, 1_000_000
    schedule = gj.gompertz_schedule(total, asymptote=a, displacement=b, rate=c)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule(0), a * math.exp(-b), rtol=1e-6)
        inflection = total * math.log(b) / c
        np.testing.assert_allclose(schedule(inflection), a / math.e, rtol=1e-12)
        slope = jax.grad(lambda tau: schedule(tau * total))
        np.testing.assert_allclose(slope(inflection / total), a * c / math.e, rtol=1e-12)
        for tau in (0.05, 0.6):
            w = gompertz(tau, a, b, c)
            np.testing.assert_allclose(slope(tau), c * w * math.log(a / w), rtol=1e-12)


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 5.0, 8.0), (2.0, 1.5, 3.0), (0.3, 40.0, 20.0)])
def test_mean_of_gompertz_is_the_exponential_integral(a, b, c):
    total = 200_000  # the sum over steps is a left Riemann sum: it is off by (w(0) - w(T)) / 2T
    mean = gj.mean_weight(gj.gompertz_schedule(total, asymptote=a, displacement=b, rate=c), total)
    expected = a * (scipy.special.exp1(b * math.exp(-c)) - scipy.special.exp1(b)) / c
    riemann = (gompertz(0, a, b, c) - gompertz(1, a, b, c)) / (2 * total)
    assert mean == pytest.approx(expected + riemann, rel=1e-7)


def test_mean_weight_is_the_sum_over_all_steps_in_float64():
    total = 70_001  # more than one chunk
    schedule = gj.cosine_schedule(total, start=3.0, end=1.0)
    values = np.asarray(schedule(np.arange(total)), np.float64)
    assert gj.mean_weight(schedule, total) == pytest.approx(values.mean(), rel=1e-7)
    rate = optax.piecewise_constant_schedule(0.1, {100: 0.1, 60_000: 0.1})
    rates = np.where(np.arange(total) < 100, 0.1, np.where(np.arange(total) < 60_000, 0.01, 0.001))
    expected = (rates * values).sum() / rates.sum()
    assert gj.mean_weight(schedule, total, weights=rate) == pytest.approx(expected, rel=1e-6)
    assert type(gj.mean_weight(schedule, 3)) is float
    # The product of two float32 is rounded in float32, so that a constant would not be its own mean.
    constant, emphasis = (gj.constant_schedule(value) for value in (0.3, 0.1))
    for total in (1, 1000):
        mean = gj.mean_weight(constant, total, weights=emphasis)
        assert mean == pytest.approx(float(np.float32(0.3)), rel=1e-12)


def test_matched_constant_has_equal_area():
    total = 1000
    schedule = gj.gompertz_schedule(total)
    rate = gj.cosine_schedule(total, start=0.05, end=0.0)
    for weights in (None, rate):
        control = gj.matched_constant(schedule, total, weights=weights)
        assert float(control(0)) == float(control(999))
        expected = gj.mean_weight(schedule, total, weights=weights)
        assert gj.mean_weight(control, total, weights=weights) == pytest.approx(expected, rel=1e-6)
    # Reversed, the same area meets the large steps of the learning rate.
    backwards = gj.reversed_schedule(schedule, total)
    assert gj.mean_weight(backwards, total) == pytest.approx(gj.mean_weight(schedule, total), rel=1e-7)
    assert gj.mean_weight(backwards, total, weights=rate) > gj.mean_weight(schedule, total, weights=rate) + 0.3


def test_mean_weight_of_foreign_schedules_and_inside_a_traced_function():
    assert gj.mean_weight(lambda step: 0.25, 10) == 0.25
    assert gj.mean_weight(lambda step: jax.lax.cond(step < 2, lambda: 1.0, lambda: 0.0), 8) == 0.25
    schedule = gj.linear_schedule(4)
    np.testing.assert_allclose(jax.jit(lambda x: x * gj.matched_constant(schedule, 4)(0))(2.0), 0.75)


def test_reversed_takes_the_same_weights_backwards():
    schedule = gj.gompertz_schedule(300)
    steps = np.arange(300)
    np.testing.assert_array_equal(gj.reversed_schedule(schedule, 300)(steps), schedule(steps)[::-1])
    # 299 - 7 does not fit into eight bits, nor 99,999 - 7 into sixteen
    np.testing.assert_array_equal(gj.reversed_schedule(schedule, 300)(np.uint8(7)), schedule(292))
    for narrow in (np.uint8, np.int8, np.uint16, np.int16):
        assert int(gj.reversed_schedule(lambda step: step, 100_000)(narrow(7))) == 99_992
    np.testing.assert_array_equal(
        gj.reversed_schedule(lambda step: step, 3)(jnp.arange(4, dtype=jnp.uint32)), [2, 1, 0, -1]
    )


@pytest.mark.parametrize("inflection", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("final", [0.95, 0.999])
def test_through_goes_through(inflection, final):
    total = 1000
    with jax.enable_x64(True):
        schedule = gj.gompertz_through(total, inflection=inflection, final=final, asymptote=2.0)
        np.testing.assert_allclose(schedule(float(total)), 2.0 * final, rtol=1e-12)
        np.testing.assert_allclose(schedule(inflection * total), 2.0 / math.e, rtol=1e-12)
        curvature = jax.grad(jax.grad(schedule))
        assert abs(curvature(inflection * total)) < 1e-12
        assert curvature(inflection * total - 1) > 1e-9 > -1e-9 > curvature(inflection * total + 1)


def test_through_warns_of_a_curve_without_a_slow_start():
    with pytest.warns(UserWarning, match=r"inflection=0.1 .* starts at 19% of its asymptote"):
        gj.gompertz_through(10, inflection=0.1)
    # rate * inflection = ln(-ln(start)); just on either side of 5 %
    inflection = 0.25
    for start, warns in ((0.0501, True), (0.0499, False)):
        rate = math.log(-math.log(start)) / inflection
        final = math.exp(-math.exp(-rate * (1 - inflection)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule = gj.gompertz_through(10, inflection=inflection, final=final)
        assert bool(caught) is warns
        assert float(schedule(0)) == pytest.approx(start, rel=1e-5)


def test_the_warning_is_of_the_line_that_made_the_curve(tmp_path):
    """In a process of its own: here the suite's type checker is in between."""
    script = tmp_path / "mine.py"
    script.write_text("import gompertz_jax as gj\ngj.gompertz_through(10, inflection=0.1)\n")
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.startswith(f"{script}:2: UserWarning: the Gompertz curve with inflection=0.1 ")


CONSTRUCTORS = {
    "gompertz": (lambda p: gj.gompertz_schedule(100, asymptote=p[0], displacement=p[1], rate=p[2]), (2.0, 5.0, 8.0)),
    "through": (lambda p: gj.gompertz_through(100, asymptote=p[0], inflection=p[1], final=p[2]), (2.0, 0.4, 0.9)),
    "logistic": (lambda p: gj.logistic_schedule(100, asymptote=p[0], midpoint=p[1], rate=p[2]), (2.0, 0.4, 9.0)),
    "linear": (lambda p: gj.linear_schedule(100, start=p[0], end=p[1]), (2.0, 3.0)),
    "cosine": (lambda p: gj.cosine_schedule(100, start=p[0], end=p[1]), (2.0, 3.0)),
    "constant": (lambda p: gj.constant_schedule(p[0]), (2.0,)),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_derivatives_by_the_parameters_and_the_step(name):
    make, parameters = CONSTRUCTORS[name]
    with jax.enable_x64(True):
        point = np.array([*parameters, 33.0])
        gradient = jax.grad(lambda p: make(p[:-1])(p[-1]))(jnp.asarray(point))
        for i, unit in enumerate(np.eye(len(point))):
            h = 1e-5 * point[i]
            up, down = point + h * unit, point - h * unit
            difference = (float(make(list(up[:-1]))(up[-1])) - float(make(list(down[:-1]))(down[-1]))) / (2 * h)
            np.testing.assert_allclose(gradient[i], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("x64", [False, True])
def test_gompertz_and_its_derivatives_are_finite_for_every_legal_parameter(x64):
    steps = [-1e30, -1e9, -3.0, 0.0, 50.0, 1e9, 1e30]
    extremes = [1e-37, 1e-30, 1.0, 5.0, 70.0, 1e5, 1e30, 3e38]
    with jax.enable_x64(x64):
        traced = jax.jit(
            jax.value_and_grad(lambda b, c, t: gj.gompertz_schedule(100, displacement=b, rate=c)(t), argnums=(0, 1, 2))
        )
        for displacement, rate, step in itertools.product(extremes, extremes, steps):
            weight, gradients = traced(displacement, rate, step)
            assert 0.0 <= weight <= 1.0, (displacement, rate, step)
            assert all(np.isfinite(gradient) for gradient in gradients), (displacement, rate, step)
        for displacement, rate in itertools.product((1e-37, 3e38), repeat=2):
            static = gj.gompertz_schedule(100, displacement=displacement, rate=rate)
            for step in steps:
                weight, slope = jax.value_and_grad(static)(step)
                assert 0.0 <= weight <= 1.0 and np.isfinite(slope)


@pytest.mark.parametrize(
    ("inflection", "final"), [(1e-6, 0.999999), (0.999999, 0.999999), (0.5, 0.36788), (0.999, 0.4)]
)
def test_through_is_finite_at_the_edges_of_its_parameters(inflection, final):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = gj.gompertz_through(100, inflection=inflection, final=final)
    for step in (-10.0, 0.0, 50.0, 100.0, 1e9):
        weight, slope = jax.value_and_grad(schedule)(step)
        assert np.isfinite(weight) and np.isfinite(slope) and 0.0 <= weight <= 1.0


ILLEGAL = [
    (lambda: gj.gompertz_schedule(0), "total_steps must be a positive integer, got 0"),
    (lambda: gj.gompertz_schedule(-3), "total_steps must be a positive integer, got -3"),
    (lambda: gj.gompertz_schedule(10, displacement=0.0), "displacement must be a positive .*, got 0.0"),
    (lambda: gj.gompertz_schedule(10, displacement=-1), "displacement must be a positive .*, got -1.0"),
    (lambda: gj.gompertz_schedule(10, displacement=1e300), r"displacement must be a positive .*, got 1e\+300"),
    (lambda: gj.gompertz_schedule(10, rate=0), "rate must be a positive .*, got 0.0"),
    (lambda: gj.gompertz_schedule(10, rate=math.inf), "rate must be a positive .*, got inf"),
    (lambda: gj.gompertz_schedule(10, rate=np.ones(3)), r"rate must be a positive .*, got an array of shape \(3,\)"),
    (lambda: gj.gompertz_schedule(10, asymptote=math.nan), "asymptote must be a finite number, got nan"),
    (lambda: gj.gompertz_through(0, inflection=0.5), "total_steps must be a positive integer, got 0"),
    (lambda: gj.gompertz_through(10, inflection=0.0), "inflection must be between 0 and 1.*, got 0.0"),
    (lambda: gj.gompertz_through(10, inflection=1.0), "inflection must be between 0 and 1.*, got 1.0"),
    (lambda: gj.gompertz_through(10, inflection=math.nan), "inflection must be between 0 and 1.*, got nan"),
    (lambda: gj.gompertz_through(10, inflection=0.5, final=1.0), "final must be between 1/e and 1.*, got 1.0"),
    (lambda: gj.gompertz_through(10, inflection=0.5, final=0.36), "final must be between 1/e and 1.*, got 0.36"),
    (lambda: gj.gompertz_through(10, inflection=0.5, asymptote=-math.inf), "asymptote must be a finite .*, got -inf"),
    (lambda: gj.logistic_schedule(0), "total_steps must be a positive integer, got 0"),
    (lambda: gj.logistic_schedule(10, rate=-1.0), "rate must be a positive .*, got -1.0"),
    (lambda: gj.logistic_schedule(10, midpoint=math.inf), "midpoint must be a finite number, got inf"),
    (lambda: gj.logistic_schedule(10, asymptote=math.nan), "asymptote must be a finite number, got nan"),
    (lambda: gj.linear_schedule(0), "total_steps must be a positive integer, got 0"),
    (lambda: gj.linear_schedule(10, start=math.nan), "start must be a finite number, got nan"),
    (lambda: gj.linear_schedule(10, until=0.0), "until must be a positive .*, got 0.0"),
    (lambda: gj.linear_schedule(10, since=-0.1), "since must be a fraction of at least 0, got -0.1"),
    (lambda: gj.linear_schedule(10, since=0.5, until=0.5), "until must be above since, got 0.5 and 0.5"),
    (lambda: gj.cosine_schedule(10, end=math.inf), "end must be a finite number, got inf"),
    (lambda: gj.gompertz_schedule(10)(2**40), "step must lie within 32 bits, got an integer of 41 bits"),
    (lambda: gj.reversed_schedule(gj.linear_schedule(10), 10)(np.int64(2**40)), "step must lie within 32 bits, got "),
    (lambda: gj.constant_schedule(math.nan), "value must be a finite number, got nan"),
    (lambda: gj.reversed_schedule(gj.constant_schedule(1.0), 0), "total_steps must be a positive integer, got 0"),
    (lambda: gj.mean_weight(gj.constant_schedule(1.0), 0), "total_steps must be a positive integer, got 0"),
    (
        lambda: gj.mean_weight(gj.constant_schedule(1.0), 5, weights=gj.constant_schedule(0.0)),
        "weights must have a finite sum other than 0 over total_steps=5, got 0.0",
    ),
    (
        lambda: gj.matched_constant(gj.constant_schedule(1.0), 5, weights=lambda step: step * math.nan),
        "weights must have a finite sum .*, got nan",
    ),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda: call()(0))()


def test_total_steps_must_be_an_integer():
    # Annotated as an int, so the suite's type checker speaks first; without it the constructor does.
    with pytest.raises(ValueError, match=r"total_steps must be a positive integer, got 12.5"):
        inspect.unwrap(gj.gompertz_schedule)(12.5)
    assert float(gj.linear_schedule(np.int64(4))(2)) == 0.5


@pytest.mark.parametrize("step", ["x", None, 1j, np.array([None]), jax.random.key(0), [1, 2], object()])
def test_a_step_is_a_number_or_an_array_of_numbers(step):
    # The closures are annotated, too, so the suite's type checker is taken off.
    curves = (gj.gompertz_schedule(9), gj.logistic_schedule(9), gj.linear_schedule(9), gj.cosine_schedule(9))
    for curve in (*curves, gj.constant_schedule(1.0), gj.reversed_schedule(curves[0], 9)):
        with pytest.raises(TypeError, match="step must be a real number or an array of real numbers, got "):
            inspect.unwrap(curve)(step)
    with pytest.raises(TypeError, match="step must be a real number"):
        value_at(gj.by_progress(curves[0]), step, 0.5)
    with pytest.raises(TypeError, match="progress must be a real number"):
        value_at(gj.by_progress(curves[0]), 3, "x" if step is None else step)


def test_no_array_is_captured():
    schedule = gj.gompertz_schedule(10, displacement=jnp.asarray(5.0), rate=np.float64(8.0))
    captured = [cell.cell_contents for cell in schedule.__closure__ or ()]
    assert captured and not any(isinstance(value, (jax.Array, np.ndarray, np.generic)) for value in captured)


def test_a_curve_by_progress_is_the_curve_over_the_fraction_and_not_over_the_step():
    weight = gj.by_progress(gj.gompertz_schedule(1, displacement=3.0, rate=4.0))
    for progress in (0.0, 0.2, 0.75, 1.0):
        for step in (0, 10_000):
            value = value_at(weight, step, jnp.float32(progress))
            np.testing.assert_allclose(value, gompertz(progress, 1.0, 3.0, 4.0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"progress=None: give it a gj.Progress\(\)"):
        value_at(weight, 3)


@pytest.mark.parametrize("function", [gj.mean_weight, gj.matched_constant])
def test_the_mean_of_a_schedule_that_is_not_known_yet_is_refused(function):
    def mean_at(rate):
        weight = function(gj.gompertz_schedule(10, rate=rate), 10)
        return weight(0) if callable(weight) else weight

    for transform in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match="a parameter of schedule or weights is traced"):
            transform(mean_at)(5.0)


def test_a_product_reads_the_progress_if_either_side_does():
    clock, driven = gj.linear_schedule(10), gj.by_progress(gj.linear_schedule(1))
    np.testing.assert_allclose(product(clock, gj.constant_schedule(3.0))(5), 1.5)
    for pair in ((clock, driven), (driven, clock)):
        both = product(*pair)
        assert isinstance(both, gj.ByProgress)
        np.testing.assert_allclose(value_at(both, 5, 0.25), 0.125)
    np.testing.assert_allclose(value_at(product(driven, driven), 0, 0.5), 0.25)
