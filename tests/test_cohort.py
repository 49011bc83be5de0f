"""All students of a comparison at once: what is measured for them, and which arms are the same."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config

from gompertz_jax import cohort as room
from gompertz_jax.arms import arm
from gompertz_jax.students import grouped
from gompertz_jax.training.data import load
from gompertz_jax.training.drive import Plan
from gompertz_jax.training.errors import RunError
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


@pytest.mark.parametrize(
    ("changes", "others"),
    [({"loss": "decoupled"}, {}), ({}, {"temperature": "linear(start=8, end=2)"})],
    ids=["in what a term computes", "in a schedule other than the weight"],
)
def test_arms_of_equal_weights_may_differ(changes, others):
    """In the first case there are two groups of one arm each; in the second, one group of two."""
    arms = {name: small_config() for name in ("a", "b")}
    arms["b"].objective.terms.kd.update({"weight": "1 * curve", "temperature": "4"} | changes | others)
    objectives = {name: build_objective(config, 39) for name, config in arms.items()}
    room.check_differ(objectives, grouped(list(objectives.values())), 39)
    again = {"a": objectives["a"], "b": objectives["b"], "c": objectives["b"]}
    with pytest.raises(RunError, match=r"the same objective at every step: 'b' = 'c'\. Keep one"):
        room.check_differ(again, grouped(list(again.values())), 39)


def test_the_table_of_an_arm_s_schedules_is_that_of_its_weights():
    steps = 40
    config = small_config(**{"recipe.epochs": 4, "recipe.warmup_epochs": 0.0, "recipe.decay": "cosine"})
    config.objective.terms.kd.weight = "linear(start=0, end=2)"
    rows = room.schedule_rows(build_objective(config, steps), config, steps)
    t = np.arange(steps)
    weight, rate = 2 * t / steps, 1 + np.cos(np.pi * t / steps)
    found = rows["kd"]
    assert [found[key] for key in ("start", "middle", "end")] == pytest.approx(weight[[0, 20, 39]].tolist(), rel=1e-6)
    assert found["area"] == pytest.approx(weight.mean(), rel=1e-6)
    assert found["weighted_area"] == pytest.approx((weight * rate).sum() / rate.sum(), rel=1e-5)
    assert found["curve"] == pytest.approx(weight.tolist(), rel=1e-6) and found["by_progress"] is False
    assert rows["ce"]["area"] == rows["ce"]["weighted_area"] == 1.0


def test_every_student_is_told_its_own_numbers(tmp_path):
    """Two groups of two students, one of which failed, with a data set that has a checksum."""
    config = small_config(order_seed=5)
    cohort = room.Cohort.of(config, {name: arm(config, name) for name in ("student", "gompertz")}, 2, "map")
    students = [room.Student(*student) for student in (("student", 0, 0, 0), ("student", 1, 0, 1),
                                                       ("gompertz", 0, 1, 0), ("gompertz", 1, 1, 1))]  # fmt: skip
    lines = [
        {"step": 9, "split": split, "arm": student.arm, "seed": student.seed, "accuracy": 0.1 * place + extra}
        for place, student in enumerate(students)
        for split, extra in (("train", 0.5), ("validation", 0.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    driven = SimpleNamespace(
        state=SimpleNamespace(groups=tuple(SimpleNamespace(failed_step=np.array(x)) for x in ([-1, -1], [-1, 7]))),
        best=tuple(
            SimpleNamespace(correct=np.array(correct), step=np.array(step))
            for correct, step in (([10, 20], [1, 2]), ([30, 40], [3, 4]))
        ),
        not_converged={"gompertz/1/wasserstein": 6, "gompertz/0/kd": 2},
        clock=SimpleNamespace(total_seconds=1.0, images_per_second=2.0),
    )
    dataset = dataclasses.replace(load("digits", validation=100), sha256="0123")
    trained = room.Trained(
        cohort, tuple(students), None, (), driven, dataset, None, SimpleNamespace(steps=39),
        {"student": {"ce": {}}, "gompertz": {"ce": {}, "kd": {}}}, None, ["a change"],
    )  # fmt: skip
    tested = room.Tested(0.75, {student: {"test_accuracy_last": 0.5 + place} for place, student in enumerate(students)})
    results = trained.results(tmp_path, tested)
    assert (results["data_sha256"], results["order_seed"], results["seeds"]) == ("0123", 5, [0, 1])
    assert results["teacher_test_accuracy"] == 0.75 and results["evaluation_changes"] == ["a change"]
    found = [student for of_arm in results["arms"].values() for student in of_arm["students"]]
    assert [one["best_validation_accuracy"] for one in found] == [0.1, 0.2, 0.3, 0.4]
    assert [one["best_step"] for one in found] == [1, 2, 3, 4]
    assert [one["failed_at_step"] for one in found] == [None, None, None, 7]
    assert [one.get("test_accuracy_last") for one in found] == [0.5, 1.5, 2.5, None]
    assert [one["not_converged_steps"] for one in found] == [{}, {}, {"kd": 2}, {"wasserstein": 6}]
    assert [one["validation"] for one in found] == [[[9, pytest.approx(0.1 * place)]] for place in range(4)]


def test_what_is_wrong_is_told_before_anything_is_loaded(tmp_path):
    config = small_config()
    wrong = config.copy_and_resolve_references()
    wrong.objective.curve = "gompetz()"
    with pytest.raises(RunError, match=r"^the arm 'mine': objective\.curve = 'gompetz\(\)'"):
        room.Cohort.of(config, {"kd": arm(config, "kd"), "mine": wrong}, 1, "map")
    config = small_config(**{"teacher.dir": str(tmp_path)})
    with pytest.raises(RunError, match=f"{tmp_path} holds no trained network"):
        room.Cohort.of(config, {"kd": arm(config, "kd")}, 1, "map")
