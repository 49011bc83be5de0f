"""All students of a comparison at once: what is measured for them, and which arms are the same."""

import jax.numpy as jnp
import numpy as np
from helpers import small_config

from gompertz_jax import cohort as room
from gompertz_jax.arms import arm
from gompertz_jax.students import grouped
from gompertz_jax.training.data import load
from gompertz_jax.training.drive import Plan
from gompertz_jax.training.feed import Images
from gompertz_jax.training.networks import network_from
from gompertz_jax.training.objectives import build_objective
from gompertz_jax.training.sharding import data_mesh


def test_progress_is_not_the_clock():
    """Arms that differ in what their curve is read at are not the same."""
    config = small_config()
    objectives = {name: build_objective(arm(config, name), 39) for name in ("gompertz", "progress", "matched")}
    room.check_differ(objectives, grouped(list(objectives.values())), 39)


def test_the_teachers_channels_are_measured_for_every_student():
    config = small_config(**{"objective.terms.wasserstein.weight": "1 * curve"})
    arms = {"full": arm(config, "full")}
    cohort = room.Cohort.of(config, arms, 2, "map")
    dataset, mesh = load("digits", validation=100), data_mesh()
    plan = Plan.of(config.recipe, config, len(dataset.train.labels))
    groups = grouped([build_objective(arms["full"], plan.steps)])
    networks = [network_from(config.student.to_dict(), dataset, seed=seed) for seed in (1, 2)]
    teacher = network_from(config.teacher.to_dict(), dataset, seed=3)
    images = Images.of(dataset, config.data, mesh)
    program = room._program(cohort, plan, groups, (), networks, teacher, images, mesh)
    found = program.measured(program.begin()[0], teacher).groups[0].projection_stats["last"]
    seen = jnp.asarray(dataset.train.images[:200] / 255.0, jnp.float32)
    maps = np.asarray(teacher.forward(seen, train=False)[0].features[-1], np.float64)
    for student in range(2):
        np.testing.assert_allclose(found["teacher_mean"][student], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
