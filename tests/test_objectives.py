"""From a config's text to an objective: schedules, losses by name, projections, and each refusal."""

import ml_collections
import numpy as np
import pytest

import gompertz_jax as gj
from gompertz_jax.projections import ClassDistances, Regressor
from gompertz_jax.training import objectives as room
from gompertz_jax.training.config import get_default
from gompertz_jax.training.errors import RunError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", lambda n: 2.0),
        ("0.25", lambda n: 0.25),
        ("-1", lambda n: -1.0),
        ("linear(start=8, end=2)", lambda n: 8 - 6 * n / 40),
        ("0.5 * curve", lambda n: 0.5 * (n / 40)),
        ("cosine(start=1, end=0)", lambda n: 0.5 * (1 + np.cos(np.pi * n / 40))),
        ("gompertz(displacement=5, rate=8)", lambda n: np.exp(-5 * np.exp(-8 * n / 40))),
        ("logistic(midpoint=0.5, rate=10)", lambda n: 1 / (1 + np.exp(-10 * (n / 40 - 0.5)))),
        ("reversed(curve)", lambda n: (39 - n) / 40),
        ("2 * matched(curve)", lambda n: 2 * np.mean(np.arange(40) / 40)),
        ("gompertz_through(inflection=0.2)", None),
    ],
)
def test_schedules_in_text(text, expected):
    curve = gj.linear_schedule(40)
    schedule = room.parse_schedule(text, 40, curve=curve)
    expected = expected or gj.gompertz_through(40, inflection=0.2)
    for n in (0, 7, 39):
        np.testing.assert_allclose(schedule(n), expected(n), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gompertz",
        "gompertz(8)",
        "gompertz(slope=3)",
        "__import__('os')",
        "1 +",
        "1 / 2",
        "gompertz(rate=-1)",
        "curve",
        "linear(start=open('x'))",
    ],
)
def test_text_that_is_no_schedule_is_refused_with_its_key(text):
    with pytest.raises(RunError, match=r"recipe\.thing"):
        room.parse_schedule(text, 40, where="recipe.thing")


def test_objective_of_a_config_carries_weights_schedules_and_projections():
    config = get_default()
    config.objective.curve = "linear()"
    config.objective.terms.kd.weight = "3 * curve"
    config.objective.terms.kd.temperature = "linear(start=8, end=2)"
    config.objective.terms.gradient.weight = "0"
    config.objective.terms.wasserstein.epsilon = "0.1"
    config.objective.terms.wasserstein.every_k_steps = 3
    config.recipe.label_smoothing = 0.1
    objective = room.build_objective(config, 10)
    terms = {term.name: term for term in objective.terms}
    assert set(terms) == {"ce", "kd", "wasserstein"}
    np.testing.assert_allclose(terms["kd"].weight(5), 1.5)
    np.testing.assert_allclose(terms["kd"].schedules["temperature"](5), 5.0)
    np.testing.assert_allclose(terms["wasserstein"].schedules["epsilon"](5), 0.1, rtol=1e-6)
    assert [terms[name].every_k_steps for name in ("ce", "kd", "wasserstein")] == [1, 1, 3]
    assert terms["ce"].loss.keywords == {"label_smoothing": 0.1}
    assert objective.projections == {"last": gj.Projection(-1, -1)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective.terms.kd.temperature", "linear(start=4, end=-1)", "objective.terms.kd.temperature"),
        ("objective.terms.kd.temperature", "-1", "must stay above 0"),
        ("objective.terms.wasserstein.epsilon", "0", "must stay above 0"),
        ("objective.terms.kd.loss", "soft_target", "soft_targets"),
        ("objective.terms.gradient.kind_", "l2", "is no option of gradient_match"),
        ("objective.terms.wasserstein.projection", "middle", "not among objective.projections"),
        ("objective.curve", "gompertz(displacement=-2)", "displacement"),
        ("objective.curve", "gompertz(rate=x)", "must be numbers"),
        (
            "objective.projections.last",
            {"student": -1},
            "last.student = -1: what wasserstein reads has the keys student_st",
        ),
        ("objective.projections.last", {"student_stage": 0.5}, "last.student_stage = 0.5 must be of type int"),
        (
            "objective.terms.gradient.stages",
            (1,),
            r"gradient.stages = \(1,\) must be empty or \(student stage, teacher",
        ),
        ("objective.terms.extra", {"weight": "1"}, "objective.terms.extra lacks loss"),
        ("objective.terms.extra", {"loss": "gaussian"}, "lacks a weight, and gaussian has no published one"),
        (
            "objective.terms.extra",
            {"loss": "hint", "projection": "last"},
            "'last' is read by a loss of another kind too",
        ),
        ("objective.curve", "matched(progress(linear()))", "what a run's progress will be is not known beforehand"),
        ("objective.curve", "progress(reversed(linear()))", "what a run's progress will be is not known beforehand"),
        ("objective.curve", "progress(curve)", "cannot read 'curve'"),
        ("objective.terms.kd.temperature", "progress(linear(start=4, end=0))", "must stay above 0"),
        ("objective.terms.extra", 3, "must be a group of keys"),
        ("objective.terms.gradient.every_k_steps", 0, "every_k_steps = 0 must be a whole number of at least 1"),
        ("objective.terms.kd.every_k_steps", 1.5, "every_k_steps = 1.5 must be a whole number"),
        ("objective.terms.kd.every_k_steps", True, "every_k_steps = True must be a whole number"),
        ("objective.terms.kd.weight", "3e38 * 3e38 * linear(since=0.5)", "kd.weight = .* is not finite at step 0"),
        ("objective.terms.ce.every_k_steps", 2, "the cross-entropy is computed at every step"),
    ],
)
def test_objectives_that_cannot_be_are_refused(key, value, message):
    config = get_default()
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.unlocked():
        node[last] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(RunError, match=message):
        room.build_objective(config, 100)


def test_the_cross_entropy_comes_first_whatever_its_name():
    config = get_default()
    config.objective.terms.labels = config.objective.terms.ce
    del config.objective.terms["ce"]
    assert [term.name for term in room.build_objective(config, 100).terms] == [
        "labels",
        "gradient",
        "kd",
        "wasserstein",
    ]


def test_an_objective_of_nothing_is_refused():
    config = get_default()
    for term in config.objective.terms.values():
        term.weight = "0"
    with pytest.raises(RunError, match="nothing to learn"):
        room.build_objective(config, 100)


def test_a_curve_by_progress_brings_its_measure_along():
    config = get_default()
    assert room.build_objective(config, 100).progress is None
    config.objective.curve = "progress(gompertz(displacement=3, rate=8))"
    config.objective.progress.update({"measure": "relative_accuracy", "decay": 0.9, "monotone": True})
    config.objective.terms.kd.weight = "2 * curve * linear()"
    objective = room.build_objective(config, 100)
    assert objective.progress == gj.Progress(gj.relative_accuracy, 0.9, True)
    (kd,) = [term for term in objective.terms if term.name == "kd"]
    np.testing.assert_allclose(kd.weight.value(0.5, 25), 2 * np.exp(-3 * np.exp(-4)) * 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "loss"}, "objective.progress.measure = 'loss' is unknown; there are agreement, relative_accuracy"),
        ({"decay": 1.0}, r"objective.progress.decay = 1.0: must lie in \[0, 1\)"),
    ],
)
def test_progress_that_cannot_be_measured_is_refused(changes, message):
    for curve in ("progress(gompertz())", "gompertz()"):  # and where no weight reads it, for the day one does
        config = get_default()
        config.objective.curve = curve
        config.objective.progress.update(changes)
        with pytest.raises(RunError, match=message):
            room.build_objective(config, 100)


def test_skipping_the_teacher_and_reading_the_progress_exclude_each_other():
    config = get_default()
    config.objective.update({"curve": "progress(gompertz())", "skip_below": 0.1})
    with pytest.raises(RunError, match="cannot measure the progress"):
        room.build_objective(config, 100)


def test_a_loss_without_a_weight_has_its_published_one_and_its_own_projection():
    config = get_default()
    config.objective.terms = ml_collections.ConfigDict(
        {"hint": {"loss": "hint"}, "wkd": {"loss": "wasserstein_logits"}, "at": {"loss": "attention_transfer"}}
    )
    objective = room.build_objective(config, 240)
    weights = {term.name: room.sampled(term.weight, 240) for term in objective.terms}
    np.testing.assert_allclose(weights["hint"], 100.0)
    np.testing.assert_allclose(weights["at"], 1000.0)
    expected = 600 * 0.5 * (1 + np.cos(np.pi * np.clip((np.arange(240) - 150) / 90, 0, 1)))
    np.testing.assert_allclose(weights["wkd"], expected, rtol=1e-4, atol=1e-3)
    assert objective.projections == {"hint": Regressor(2, 2), "classes": ClassDistances()}
    config.objective.projections.hint = ml_collections.ConfigDict({"student_stage": 1})
    assert room.build_objective(config, 240).projections["hint"] == Regressor(1, 2)


def test_what_a_term_is_given_in_the_config_reaches_it():
    config = get_default()
    options = {"target": "random", "images": 2, "stages": (1, 2)}
    config.objective.terms.gradient.update(options)
    config.recipe.label_smoothing = 0.1
    config.objective.terms.own = {"loss": "cross_entropy", "label_smoothing": 0.3}
    terms = {term.name: term for term in room.build_objective(config, 10).terms}
    assert terms["gradient"].gradient_stages == (1, 2)
    assert options.items() <= terms["gradient"].loss.keywords.items()
    assert terms["gradient"].of_teacher.keywords == terms["gradient"].loss.keywords
    assert [terms[name].of_teacher for name in ("ce", "kd", "wasserstein")] == [None] * 3
    assert [terms[name].loss.keywords["label_smoothing"] for name in ("ce", "own")] == [0.1, 0.3]


def test_the_published_feature_loss_of_wkd_keeps_the_students_size():
    config = get_default()
    config.objective.terms = ml_collections.ConfigDict({"wkd": {"loss": "wasserstein_features"}})
    assert room.build_objective(config, 240).projections == {"width": Regressor(-1, -1, resize=False)}
