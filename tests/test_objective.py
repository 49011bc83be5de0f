"""The objective: terms as data, their weights by the clock and by progress, and the metrics that they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import record

import gompertz_jax as gj
from gompertz_jax import objective as room
from gompertz_jax import record as records
from gompertz_jax import terms
from gompertz_jax.training.config import get_default
from gompertz_jax.training.objectives import build_objective, sampled


def test_evaluate_weights_each_term_and_logs_schedules_and_diagnostics():
    listed = (
        gj.Term("ce", gj.constant_schedule(1.0), terms.cross_entropy, distils=False),
        gj.Term(
            "kd", gj.linear_schedule(10), terms.soft_targets, {"temperature": gj.linear_schedule(10, start=8, end=2)}
        ),
        gj.Term("w", gj.constant_schedule(0.5), terms.wasserstein, {"epsilon": gj.constant_schedule(0.1)}),
    )
    r = record()
    evaluation = room.evaluate(gj.Objective(listed), r, 5)
    np.testing.assert_allclose(evaluation.weights, [1.0, 0.5, 0.5])
    np.testing.assert_allclose(evaluation.metrics["kd/temperature"], 5.0)
    np.testing.assert_allclose(evaluation.metrics["w/epsilon"], 0.1)
    np.testing.assert_allclose(evaluation.metrics["kd/raw"], terms.soft_targets(r, temperature=5.0).mean(), rtol=1e-6)
    np.testing.assert_allclose(evaluation.metrics["kd/weighted"], 0.5 * evaluation.raw[1], rtol=1e-6)
    assert evaluation.metrics["w/converged"] == 1.0


def test_evaluate_accepts_a_traced_step():
    objective = gj.Objective((gj.Term("kd", gj.gompertz_schedule(10), terms.soft_targets),))
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


def test_progress_is_the_smoothed_measure_from_zero_and_never_falls_where_told():
    """n and d by hand: d starts at 1, n at 0; agreement has d_t = 1, relative accuracy the teacher's accuracy."""
    labels = np.arange(6) % 3
    right, wrong = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]
    half = np.where(np.arange(6)[:, None] < 3, right, wrong)
    # student, teacher: agreements of 1/2, 1, 0 and 1/2, and a teacher that is right on all or half
    logits = np.float32([(half, right), (half, half), (wrong, right), (right, half)])
    records = [
        record(labels=jnp.asarray(labels), student=outputs_of(ours), teacher=outputs_of(theirs))
        for ours, theirs in logits
    ]
    classes = logits.argmax(-1)
    agreed = [np.mean(pair[0] == pair[1]) for pair in classes]
    accuracies = [[np.mean(network == labels) for network in pair] for pair in classes]
    for measure, pairs in (
        (gj.agreement, [(value, 1.0) for value in agreed]),
        (gj.relative_accuracy, accuracies),
    ):
        expected, largest, n, d = [], [], 0.0, 1.0
        for ours, theirs in pairs:
            n, d = 0.5 * n + 0.5 * ours, 0.5 * d + 0.5 * theirs
            expected.append(min(n / d, 1.0))
            largest.append(max(expected))
        assert expected != largest  # it falls somewhere
        for monotone, values in ((False, expected), (True, largest)):
            progress = gj.Progress(measure, decay=0.5, monotone=monotone)
            state = progress.start()
            assert state["progress"] == 0.0
            for one, value in zip(records, values, strict=True):
                state = progress.update(state, one)
                np.testing.assert_allclose(state["progress"], value, rtol=1e-6)


def outputs_of(logits):
    return gj.Outputs(jnp.asarray(logits), (jnp.zeros((6, 1, 1, 1)),), jnp.zeros((6, 1)))


def test_weights_and_temperatures_by_progress_are_read_at_the_progress():
    curve = gj.by_progress(gj.gompertz_schedule(1))
    objective = gj.Objective(
        (
            gj.Term(
                "kd", curve, terms.soft_targets, {"temperature": gj.by_progress(gj.linear_schedule(1, start=8, end=2))}
            ),
        ),
        progress=gj.Progress(),
    )
    evaluation = room.evaluate(objective, record(), 3, jnp.float32(0.5))
    np.testing.assert_allclose(evaluation.metrics["kd/weight"], np.exp(-5 * np.exp(-4)), rtol=1e-5)
    np.testing.assert_allclose(evaluation.metrics["kd/temperature"], 5.0)
    with pytest.raises(ValueError, match="progress=None"):
        room.evaluate(objective, record(), 3)


def test_the_default_objective_can_be_indexed_by_progress():
    objective = gj.gompertz_objective(100, curve=gj.by_progress(gj.gompertz_schedule(1)))
    assert objective.progress == gj.Progress()
    assert [term.reads_progress() for term in objective.terms] == [False, True, True, True]
    assert gj.gompertz_objective(100).progress is None


def test_malformed_parts_of_an_objective_are_told():
    term = gj.student_alone().terms[0]
    for changes, error, message in (
        ({"terms": 3}, ValueError, "objective: terms must be a tuple of at least one Term, got 3"),
        ({"terms": (term, "x")}, TypeError, "objective: a term must be a Term with a name and a loss, got 'x'"),
        ({"terms": (term._replace(weight=0.5),)}, TypeError, "weight or schedule of the term 'ce' must be a function"),
        ({"terms": (term._replace(schedules=[1]),)}, TypeError, "schedules of the term 'ce' must be schedules by name"),
        ({"terms": (term._replace(gradient_stages=(1,)),)}, TypeError, "gradient_stages of the term 'ce' must be"),
        ({"projections": 3}, TypeError, "objective: projections must be projections by name, got 3"),
        ({"projections": {"last": gj.Projection}}, TypeError, "the projection 'last' must be one of"),
        ({"terms": (term, term)}, ValueError, r"objective: term names must differ, got \['ce', 'ce'\]"),
        (
            {"terms": (term._replace(every_k_steps=0),)},
            ValueError,
            "objective: every_k_steps of the term 'ce' must be a positive integer, got 0",
        ),
        ({"progress": gj.Progress(decay=1.0)}, ValueError, r"objective: progress\.decay must be .*, got 1\.0"),
        ({"progress": 3}, TypeError, "objective: progress must be a Progress with a function to measure, got 3"),
    ):
        with pytest.raises(error, match=message):
            room.check_objective(gj.student_alone()._replace(**changes))
    with pytest.raises(TypeError, match=r"the loss of the term 'ce' must return values, .* got None for the values"):
        room.evaluate(gj.Objective((term._replace(loss=lambda record: None),)), record(), 0)
    pair = lambda record: (jnp.zeros(3), jnp.ones(3))  # noqa: E731
    with pytest.raises(TypeError, match=r"'ce' must return values, .* or a pair of them and {name: array}, got Array"):
        room.evaluate(gj.Objective((term._replace(loss=pair),)), record(), 0)
    two = lambda step: jnp.ones(2)  # noqa: E731
    for changes, name in (({"weight": two}, "weight"), ({"schedules": {"label_smoothing": two}}, "label_smoothing")):
        message = rf"'{name}' of the term 'ce' must be one number at a step, got an array of shape \(2,\)"
        with pytest.raises(ValueError, match=message):
            room.evaluate(gj.Objective((term._replace(**changes),)), record(), 0)
    with pytest.raises(TypeError, match=r"what the schedule returns must be a real number .* got 'x'"):
        room.evaluate(gj.Objective((term._replace(weight=lambda step: "x"),)), record(), 0)


def test_a_record_of_outputs_that_do_not_fit_is_refused():
    r = record()
    with pytest.raises(ValueError, match=r"student, for labels \(2,\), must have logits of floats .* B = 2, got "):
        record(labels=r.labels[:2])
    two = jax.tree.map(lambda array: array[:2], r.teacher)
    for teacher, part in ((two, "logits"), (r.teacher._replace(pooled=two.pooled), "pooled")):
        with pytest.raises(ValueError, match=rf"teacher, for labels \(3,\), must have {part} of floats .* B = 3, got "):
            record(teacher=teacher)


def test_what_is_not_stored_of_a_teacher_is_told_by_its_name():
    logits, pooled = jnp.zeros((3, 5)), jnp.ones((3, 2))
    stored = records.StoredOutputs.of(logits)
    for what, read in (
        ("maps", lambda: stored.features),
        ("pooled vectors", lambda: stored.pooled),
        ("gradients", lambda: records.no_pullback(logits)),
    ):
        with pytest.raises(records.NotStored, match=f"the teacher's {what} are read, and are not among") as told:
            read()
        assert told.value.what == what
    assert records.StoredOutputs.of(logits, pooled).pooled is pooled


def test_a_term_reads_the_progress_also_where_only_its_temperature_does():
    driven = gj.by_progress(gj.linear_schedule(1, start=8, end=2))
    term = gj.Term("kd", gj.constant_schedule(1.0), terms.soft_targets, {"temperature": driven})
    assert term.reads_progress() and not term._replace(schedules={}).reads_progress()


def test_the_objectives_defaults_are_those_of_the_configs():
    ours = {term.name: term for term in gj.gompertz_objective(40).terms}
    theirs = {term.name: term for term in build_objective(get_default(), 40).terms}
    assert ours.keys() == theirs.keys()
    for name, term in ours.items():
        np.testing.assert_allclose(sampled(term.weight, 40), sampled(theirs[name].weight, 40), rtol=1e-6)
        for key, schedule in term.schedules.items():
            values = sampled(theirs[name].schedules[key], 40)
            np.testing.assert_allclose(sampled(schedule, 40), values, rtol=1e-6, err_msg=f"{name}.{key}")
    config = get_default()
    config.objective.curve = "progress(gompertz())"
    assert build_objective(config, 40).progress == gj.Progress()
