"""The objective: terms as data, projections, and what each term computes from a record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax, softmax

import gompertz_jax as gj
from gompertz_jax import objective as room
from gompertz_jax.network import Outputs

RNG = np.random.default_rng(0)


def outputs(*, batch=3, classes=5, maps=((4, 6), (2, 8)), rng=RNG):
    features = tuple(jnp.asarray(rng.normal(size=(batch, size, size, width)), jnp.float32) for size, width in maps)
    logits = jnp.asarray(rng.normal(size=(batch, classes)), jnp.float32)
    return Outputs(logits, features, features[-1].mean((1, 2)))


def record(**changes):
    student, teacher = outputs(), outputs(maps=((8, 6), (4, 10)))
    maps = {
        "student_maps": {"last": jnp.asarray(RNG.normal(size=(3, 2, 2, 10)), jnp.float32)},
        "teacher_maps": {"last": jnp.asarray(RNG.normal(size=(3, 4, 4, 10)), jnp.float32)},
    }
    return gj.Record(**{"labels": jnp.array([0, 1, 4]), "student": student, "teacher": teacher, **maps, **changes})


def test_cross_entropy_term_is_the_negative_log_probability_of_the_label():
    r = record()
    expected = -log_softmax(np.asarray(r.student.logits, np.float64), -1)[np.arange(3), np.asarray(r.labels)]
    np.testing.assert_allclose(room.cross_entropy(r), expected, rtol=1e-5)


def test_soft_targets_term_is_scaled_kl_from_teacher_to_student():
    r, t = record(), 3.0
    p = softmax(np.asarray(r.teacher.logits, np.float64) / t, -1)
    q = log_softmax(np.asarray(r.student.logits, np.float64) / t, -1)
    np.testing.assert_allclose(room.soft_targets(r, temperature=t), t**2 * (p * (np.log(p) - q)).sum(-1), rtol=1e-4)


def test_wasserstein_term_takes_maps_of_different_size_and_is_per_channel():
    r = record()
    value, health = room.wasserstein(r, epsilon=0.05)
    x, y = (np.asarray(m["last"]).reshape(3, -1, 10) for m in (r.student_maps, r.teacher_maps))
    direct = gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(y), epsilon=0.05) / 10
    np.testing.assert_allclose(value, direct, rtol=1e-4)
    assert set(health) == {"converged", "iterations", "marginal_error"}
    assert np.asarray(health["converged"]).all()


def test_wasserstein_over_the_batch_is_the_assignment_of_images_whichever_is_which():
    """At small epsilon, the exact assignment between the mean vectors of the images (SciPy), for any order of them."""
    r = record()
    x, y = (np.asarray(m["last"], np.float64).mean((1, 2)) for m in (r.student_maps, r.teacher_maps))
    cost = ((x[:, None] - y) ** 2).sum(-1) / 10
    # A plan that is a permutation has KL(P || ab) = ln n.
    exact = cost[linear_sum_assignment(cost)].mean() + 1e-3 * cost.mean() * np.log(3)
    value, health = room.wasserstein(r, epsilon=1e-3, cloud="batch")
    np.testing.assert_allclose(value, exact, rtol=1e-4)
    assert bool(health["converged"])
    shuffled = record(student_maps=r.student_maps, teacher_maps={"last": r.teacher_maps["last"][jnp.array([2, 0, 1])]})
    np.testing.assert_allclose(room.wasserstein(shuffled, epsilon=1e-3, cloud="batch")[0], value, rtol=1e-4)
    assert abs(room.wasserstein(shuffled)[0].mean() - room.wasserstein(r)[0].mean()) > 1e-3
    with pytest.raises(ValueError, match="cloud must be 'image' or 'batch', got 'both'"):
        room.wasserstein(r, cloud="both")


def test_gaussian_term_compares_moments_of_maps_of_different_size():
    r = record()
    x, y = (np.asarray(m["last"], np.float64).reshape(3, -1, 10) for m in (r.student_maps, r.teacher_maps))
    expected = ((x.mean(1) - y.mean(1)) ** 2 + (x.std(1) - y.std(1)) ** 2).mean(-1)
    np.testing.assert_allclose(room.gaussian(r), expected, rtol=1e-4)


def test_gradient_term_pulls_back_the_teachers_top_class():
    """With linear networks of weights v and w, the input gradients are v and w of the teacher's top class."""
    v, w = (jnp.asarray(RNG.normal(size=(4, 4, 2, 5)), jnp.float32) for _ in range(2))
    r = record(
        student_pullback=lambda c: jnp.einsum("bk,hwck->bhwc", c, v),
        teacher_pullback=lambda c: jnp.einsum("bk,hwck->bhwc", c, w),
    )
    top = np.asarray(r.teacher.logits).argmax(-1)

    def pooled(a):
        return np.asarray(a, np.float64).reshape(2, 2, 2, 2, 2, 5).mean((1, 3)).reshape(-1, 5)[:, top]

    a, b = pooled(v), pooled(w)
    cosine = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(room.gradient_match(r, pool=2), 1 - cosine, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(room.gradient_match(r, pool=2, images=3), room.gradient_match(r, pool=2))
    for images in (-1, 4):
        with pytest.raises(ValueError, match=rf"images must lie in \[0, 3\], the batch, got {images}"):
            room.gradient_match(r, pool=2, images=images)


def test_a_term_that_needs_a_teacher_says_so():
    with pytest.raises(ValueError, match="needs a teacher"):
        room.soft_targets(record(teacher=None))


def test_evaluate_weights_each_term_and_logs_schedules_and_diagnostics():
    terms = (
        gj.Term("ce", gj.constant_schedule(1.0), room.cross_entropy, distils=False),
        gj.Term(
            "kd", gj.linear_schedule(10), room.soft_targets, {"temperature": gj.linear_schedule(10, start=8, end=2)}
        ),
        gj.Term("w", gj.constant_schedule(0.5), room.wasserstein, {"epsilon": gj.constant_schedule(0.1)}),
    )
    r = record()
    evaluation = room.evaluate(gj.Objective(terms), r, 5)
    np.testing.assert_allclose(evaluation.weights, [1.0, 0.5, 0.5])
    np.testing.assert_allclose(evaluation.metrics["kd/temperature"], 5.0)
    np.testing.assert_allclose(evaluation.metrics["w/epsilon"], 0.1)
    np.testing.assert_allclose(evaluation.metrics["kd/raw"], room.soft_targets(r, temperature=5.0).mean(), rtol=1e-6)
    np.testing.assert_allclose(evaluation.metrics["kd/weighted"], 0.5 * evaluation.raw[1], rtol=1e-6)
    assert evaluation.metrics["w/converged"] == 1.0


def test_evaluate_accepts_a_traced_step():
    objective = gj.Objective((gj.Term("kd", gj.gompertz_schedule(10), room.soft_targets),))
    r = record()
    jitted = jax.jit(lambda step: room.evaluate(objective, r, step).metrics["kd/weight"])
    for step in (0, 3, 10):
        np.testing.assert_allclose(jitted(step), np.exp(-5 * np.exp(-8 * step / 10)), rtol=1e-5)


def test_default_objective_follows_the_curve_and_leaves_out_what_has_no_weight():
    objective = gj.gompertz_objective(100, wasserstein_weight=0.0, gradient_weight=0.25)
    assert [term.name for term in objective.terms] == ["ce", "kd", "gradient"]
    assert objective.projections == {}
    np.testing.assert_allclose(objective.terms[2].weight(50), 0.25 * np.exp(-5 * np.exp(-4)), rtol=1e-5)
    assert [term.distils for term in objective.terms] == [False, True, True]


def test_projection_matches_a_numpy_linear_map_and_batch_norm():
    objective = gj.Objective((), {"last": gj.Projection()})
    student, teacher = outputs(), outputs(maps=((8, 6), (4, 10)))
    params, stats = room.init_projections(objective, student, teacher, jax.random.key(1))
    params["last"] |= {"scale": jnp.linspace(0.5, 2, 10), "bias": jnp.linspace(-1, 1, 10)}
    stats = room.measure_teacher(objective, stats, [teacher.features])
    x, y, new = room.project(objective, params, stats, student, teacher)

    kernel = np.asarray(params["last"]["kernel"], np.float64)
    z = np.asarray(student.features[-1], np.float64) @ kernel
    mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
    expected = (z - mean) / np.sqrt(var + 1e-5) * np.linspace(0.5, 2, 10) + np.linspace(-1, 1, 10)
    np.testing.assert_allclose(x["last"], expected, rtol=1e-4, atol=1e-5)
    t = np.asarray(teacher.features[-1], np.float64)
    np.testing.assert_allclose(y["last"], (t - t.mean((0, 1, 2))) / t.std((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["last"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["last"]["var"], 0.9 + 0.1 * var, rtol=1e-4)
    np.testing.assert_array_equal(new["last"]["teacher_std"], stats["last"]["teacher_std"])

    x, _, unchanged = room.project(objective, params, new, student, teacher, train=False)
    expected = (z - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5) * np.linspace(0.5, 2, 10) + np.linspace(-1, 1, 10)
    np.testing.assert_allclose(x["last"], expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, unchanged, new)


def test_teacher_statistics_are_those_of_all_batches_together_and_survive_a_dead_channel():
    objective = gj.Objective((), {"last": gj.Projection()})
    stats = {
        "last": {"mean": jnp.zeros(3), "var": jnp.ones(3), "teacher_mean": jnp.zeros(3), "teacher_std": jnp.ones(3)}
    }
    maps = RNG.normal(3.0, 2.0, size=(7, 2, 2, 3)).astype(np.float32)
    maps[..., 1] = 0.0
    measured = room.measure_teacher(objective, stats, [(jnp.asarray(maps[:4]),), (jnp.asarray(maps[4:]),)])["last"]
    np.testing.assert_allclose(measured["teacher_mean"], maps.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(measured["teacher_std"][jnp.array([0, 2])], maps.std((0, 1, 2))[[0, 2]], rtol=1e-5)
    floor = 1e-2 * np.sqrt(maps.var((0, 1, 2)).mean())
    np.testing.assert_allclose(measured["teacher_std"][1], floor, rtol=1e-5)


def test_teacher_maps_receive_no_gradient():
    objective = gj.Objective((), {"last": gj.Projection()})
    student, teacher = outputs(), outputs(maps=((8, 6), (4, 10)))
    params, stats = room.init_projections(objective, student, teacher, jax.random.key(1))

    def total(teacher):
        return room.project(objective, params, stats, student, teacher)[1]["last"].sum()

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(total)(teacher)))
