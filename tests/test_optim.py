"""Optimiser and learning rate against the recurrences written out in NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gompertz_jax.training import config, optim

RNG = np.random.default_rng(0)


def recipe(**changes):
    made = config.get_default().recipe
    made.update(changes)
    return made


def run(made, gradients, start, rate=0.1):
    optimizer = optim.make_optimizer(made, optax.constant_schedule(rate))
    params = {"student": jnp.asarray(start), "projections": jnp.asarray(start)}
    state = optimizer.init(params)
    for gradient in gradients:
        tree = {"student": jnp.asarray(gradient), "projections": jnp.asarray(gradient)}
        updates, state = optimizer.update(tree, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(value) for name, value in params.items()}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_sgd_is_the_fields(nesterov, decoupled):
    """Coupled: v = mu v + g + wd w (PyTorch); decoupled: w -= lr (momentum part + wd w)."""
    gradients, w = RNG.normal(size=(4, 3, 2)).astype(np.float32), RNG.normal(size=(3, 2)).astype(np.float32)
    made = recipe(momentum=0.9, nesterov=nesterov, weight_decay=0.01, decoupled_decay=decoupled)
    got = run(made, gradients, w)
    v, expected = 0.0, w.astype(np.float64)
    for g in gradients.astype(np.float64):
        g = g if decoupled else g + 0.01 * expected
        v = 0.9 * v + g
        move = g + 0.9 * v if nesterov else v
        expected = expected - 0.1 * (move + (0.01 * expected if decoupled else 0.0))
    np.testing.assert_allclose(got["student"], expected, rtol=1e-5)
    np.testing.assert_allclose(got["projections"], expected, rtol=1e-5)


def test_projections_have_their_own_rate():
    w, g = np.ones((2, 2), np.float32), np.ones((1, 2, 2), np.float32)
    got = run(recipe(weight_decay=0.0, momentum=0.0, projection_rate=0.5), g, w)
    np.testing.assert_allclose(got["student"], 0.9)
    np.testing.assert_allclose(got["projections"], 0.95)


def test_decay_touches_everything_or_kernels_only():
    w, g = np.ones(3, np.float32), np.zeros((1, 3), np.float32)
    np.testing.assert_allclose(run(recipe(weight_decay=0.1, momentum=0.0), g, w)["student"], 0.99)
    np.testing.assert_allclose(
        run(recipe(weight_decay=0.1, momentum=0.0, decay_everything=False), g, w)["student"], 1.0
    )


def test_clipping_is_by_the_global_norm():
    g = np.full((1, 2), 3.0, np.float32)  # with both halves of the tree: norm 6
    got = run(recipe(clip_norm=1.0, weight_decay=0.0, momentum=0.0), g, np.zeros(2, np.float32))
    np.testing.assert_allclose(got["student"], -0.1 * 3.0 / 6.0, rtol=1e-6)


@pytest.mark.parametrize("decoupled", [False, True])
def test_clipping_is_of_the_gradient_alone_before_decay_and_momentum(decoupled):
    gradients, w = np.float32([[3.0, 3.0], [0.1, 0.2]]), np.float32([2.0, -1.0])
    made = recipe(clip_norm=1.0, momentum=0.9, nesterov=False, weight_decay=0.5, decoupled_decay=decoupled)
    v, expected = 0.0, w.astype(np.float64)
    for g in gradients.astype(np.float64):
        g = g * min(1.0, 1.0 / np.linalg.norm([*g, *g]))  # of both halves of the tree; the second is short enough
        decay = 0.5 * expected
        v = 0.9 * v + (g if decoupled else g + decay)
        expected = expected - 0.1 * (v + (decay if decoupled else 0.0))
    np.testing.assert_allclose(run(made, gradients, w)["student"], expected, rtol=1e-6)


def test_multistep_rate_with_warmup():
    made = recipe(epochs=10, learning_rate=0.5, decay="multistep", boundaries=(4, 8), warmup_epochs=2.0)
    rate = optim.learning_rate(made, steps_per_epoch=5)
    steps = np.arange(50)
    expected = np.select([steps < 10, steps < 20, steps < 40], [0.05 * steps, 0.5, 0.05], 0.005)
    np.testing.assert_allclose([rate(n) for n in steps], expected, rtol=1e-5)


def test_cosine_rate_falls_to_zero_at_the_end():
    rate = optim.learning_rate(recipe(epochs=10, learning_rate=0.5, warmup_epochs=1.0), steps_per_epoch=5)
    steps = np.arange(5, 51)
    np.testing.assert_allclose([rate(n) for n in steps], 0.25 * (1 + np.cos(np.pi * (steps - 5) / 45)), atol=1e-6)
    np.testing.assert_allclose([rate(n) for n in range(5)], 0.1 * np.arange(5), atol=1e-6)


def test_boundaries_lower_the_rate_by_the_factor_and_a_constant_rate_stays():
    steps = np.arange(50)
    made = recipe(epochs=10, learning_rate=0.5, decay="multistep", boundaries=(4, 8), factor=0.2, warmup_epochs=0.0)
    rate = optim.learning_rate(made, steps_per_epoch=5)
    expected = np.select([steps < 20, steps < 40], [0.5, 0.1], 0.02)
    np.testing.assert_allclose([rate(n) for n in steps], expected, rtol=1e-5)
    # 0.75 epochs are 3.75 steps, of which the nearest number is 4
    made = recipe(epochs=10, learning_rate=0.5, decay="constant", warmup_epochs=0.75)
    rate = optim.learning_rate(made, steps_per_epoch=5)
    np.testing.assert_allclose([rate(n) for n in steps], np.minimum(0.5 * steps / 4, 0.5), rtol=1e-6)


@pytest.mark.parametrize("steps", [1000, 1001, 30])
def test_the_rate_over_a_number_of_steps_is_the_recipe_s_whether_or_not_they_are_whole_epochs(steps):
    made = recipe(epochs=3, learning_rate=0.5, decay="cosine", warmup_epochs=0.3)
    found = np.asarray(optim.rate_by_step(made, steps)(np.arange(steps)))
    tau = np.arange(steps) / steps
    expected = np.where(tau < 0.1, 0.5 * tau / 0.1, 0.25 * (1 + np.cos(np.pi * (tau - 0.1) / 0.9)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
