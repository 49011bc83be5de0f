"""A comparison from its config to its tables: students as in separate runs, fairness, resuming, refusals."""

import json
import shutil
import signal

import numpy as np
import pytest
from helpers import ROOT, differences_of_metrics, small_config
from ml_collections import ConfigDict

from gompertz_jax import cohort, tune
from gompertz_jax import compare as room
from gompertz_jax.arms import arm
from gompertz_jax.cli import main
from gompertz_jax.training.drive import drive
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.loop import train_and_evaluate
from gompertz_jax.training.stop import Stop, Stopped
from gompertz_jax.training.writer import read_metrics

ARMS = ("matched", "gompertz")


def arms_of(config):
    """Two arms of one kind, with a projection beside the soft targets, by the names of known ones."""
    arms = {name: arm(config, name) for name in ARMS}
    for of_arm in arms.values():
        of_arm.objective.terms.crd = ConfigDict({"loss": "contrastive_representation", "weight": "0.1 * curve"})
    return arms


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compared")
    changes = {
        "recipe.learning_rate": 0.2,  # learns something; a larger one magnifies rounding
        "recipe.moving_average": 0.9,
        "teacher.cache.views": 2,
        "order_seed": 3,
    }
    config = small_config(**changes)
    return config, workdir, room.compare(config, workdir, arms=arms_of(config), seeds=2)


def test_the_student_alone_is_always_there_and_every_arm_has_every_seed(compared):
    _, workdir, results = compared
    assert list(results["arms"]) == ["student", *ARMS]
    assert {name: arm["about"] for name, arm in results["arms"].items()} == {
        "student": "the student alone",
        **dict.fromkeys(ARMS, "an objective of its own"),
    }
    for of_arm in results["arms"].values():
        assert [student["seed"] for student in of_arm["students"]] == [0, 1]
        for student in of_arm["students"]:
            assert [step for step, _ in student["validation"]] == [15, 27, 39]
            best = max(accuracy for _, accuracy in student["validation"])
            assert student["best_validation_accuracy"] == pytest.approx(best, abs=1e-12)
    assert json.loads((workdir / "results.json").read_text()) == results
    assert (workdir / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_student_is_that_of_a_run_of_its_own(compared, tmp_path):
    """The run has the student's seed, the comparison's order, and its teacher."""
    config, workdir, results = compared
    alone = arms_of(config)["gompertz"]
    alone.seed, alone.teacher.dir = 1, str(workdir / "teacher")
    result = train_and_evaluate(alone, tmp_path)
    student = results["arms"]["gompertz"]["students"][1]
    for key in ("last", "best"):
        assert student[f"test_accuracy_{key}"] == pytest.approx(result[f"test_accuracy_{key}"], abs=0.006)  # two of 359
    for key in ("test_agreement_last", "best_validation_accuracy", "best_step"):
        assert student[key] == pytest.approx(result[key], abs=0.006), key
    assert results["teacher_test_accuracy"] == result["teacher_test_accuracy"]
    assert results["order_seed"] == 3
    theirs = [
        line
        for line in read_metrics(workdir / "metrics.jsonl")
        if (line.pop("arm"), line.pop("seed")) == ("gompertz", 1)
    ]
    ours = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["split"], line.keys()) for line in ours] == [
        (line["step"], line["split"], line.keys()) for line in theirs
    ]
    for name in ("loss", "kd/weight", "crd/raw", "gradient_norm", "agreement"):
        values = [[line[name] for line in lines if name in line] for lines in (ours, theirs)]
        assert values[0]
        np.testing.assert_allclose(*values, rtol=2e-3, err_msg=name)


def test_all_arms_of_a_seed_begin_alike_and_seeds_do_not(compared):
    _, workdir, _ = compared
    first = {
        (line["arm"], line["seed"]): line["ce/raw"]
        for line in read_metrics(workdir / "metrics.jsonl")
        if line["step"] == 0
    }
    np.testing.assert_allclose([first[arm, 0] for arm in ARMS], first["student", 0], rtol=1e-5)
    assert abs(first["student", 0] - first["student", 1]) > 1e-3


def test_a_comparison_that_was_stopped_goes_on_to_the_bit(compared, tmp_path, monkeypatch, capsys):
    config, workdir, whole = compared
    shutil.copytree(workdir / "teacher", tmp_path / "teacher")  # which would be trained to the same bits
    asked = []

    def requested(self):
        asked.append(1)
        self._asked = signal.SIGTERM if len(asked) == 7 else 0
        return self._asked > 0

    monkeypatch.setattr(Stop, "requested", requested)
    with pytest.raises(Stopped):
        room.compare(config, tmp_path, arms=arms_of(config), seeds=2)
    assert not (tmp_path / "results.json").exists()
    reversed_arms = dict(reversed(arms_of(config).items()))  # which change nothing: a name is a name
    again = room.compare(config, tmp_path, arms=reversed_arms, seeds=2)
    assert "resumes from step 21 of 39" in capsys.readouterr().out
    assert list(again["arms"]) == list(whole["arms"])
    assert again["arms"] == whole["arms"] and again["comparison"] == whole["comparison"]
    assert differences_of_metrics(tmp_path, workdir) == []
    # The same command once more reads what is there; another baseline is told without training.
    other = room.compare(config, tmp_path, arms=arms_of(config), seeds=2, baseline="student")
    assert other["comparison"]["baseline"] == "student" and other["arms"] == whole["arms"]


def test_a_student_that_fails_is_left_out_and_said_and_the_others_are_as_without_it(
    compared, tmp_path, monkeypatch, capsys
):
    config, workdir, whole = compared
    shutil.copytree(workdir / "teacher", tmp_path / "teacher")
    config = config.copy_and_resolve_references()
    config.logging.term_gradients_every = 2
    short = {"matched/1/crd": 4}  # as if a transport had not converged
    monkeypatch.setattr(cohort, "drive", lambda *given, **named: drive(*given, **named)._replace(not_converged=short))
    broken = arms_of(config)["gompertz"]
    broken.objective.terms.kd.weight = "linear(start=0, end=3e38)"
    results = room.compare(config, tmp_path, arms=arms_of(config) | {"broken": broken}, seeds=2)
    for seed, student in enumerate(results["arms"]["broken"]["students"]):
        assert student["seed"] == seed and 0 < student["failed_at_step"] < 39
        assert {key for key, value in student.items() if key.startswith("test_") and value is not None} == set()
    assert results["comparison"]["last"]["broken"]["n"] == 0
    assert "Not finite, and left out: broken, seed 0, at step" in (tmp_path / "results.md").read_text()
    assert "broken/1: the gradient was not finite at step" in capsys.readouterr().out
    for name, of_arm in whole["arms"].items():
        for ours, theirs in zip(results["arms"][name]["students"], of_arm["students"], strict=True):
            assert ours["failed_at_step"] is None
            assert ours["not_converged_steps"] == ({"crd": 4} if (name, ours["seed"]) == ("matched", 1) else {})
            assert ours["test_accuracy_last"] == pytest.approx(theirs["test_accuracy_last"], abs=0.006)
    of_crd = [line["crd/gradient_norm"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["step"] % 2 == 0
              and line.get("split") == "train" and (line["arm"], line["seed"]) == ("matched", 1)]  # fmt: skip
    assert len(of_crd) == 20 and min(of_crd) > 0


def test_images_other_than_those_it_began_with_are_refused(tmp_path):
    (tmp_path / "data.json").write_text('{"sha256": "0123"}')
    config = small_config()
    with pytest.raises(RunError, match=r"the training images of digits .* are not those that the run in .* began with"):
        room.compare(config, tmp_path, arms={"matched": arm(config, "matched")}, seeds=1)


def test_a_comparison_ends_also_where_lines_were_lost_and_says_how_it_was_evaluated(compared, tmp_path):
    """The tail of metrics.jsonl is lost in the middle of an evaluation, when training is over."""
    config, workdir, whole = compared
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "27")  # which could write the lines again
    metrics = tmp_path / "copy" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-2]))
    rarely = config.copy_and_resolve_references()
    rarely.evaluate_every_epochs = 3
    results = room.compare(rarely, tmp_path / "copy", arms=arms_of(rarely), seeds=2)
    assert results["evaluation_changes"] == ["evaluate_every_epochs: 1 -> 3"] and whole["evaluation_changes"] == []
    lengths = [len(student["validation"]) for arm in results["arms"].values() for student in arm["students"]]
    assert sorted(lengths) == [2, 2, 3, 3, 3, 3]
    assert results["comparison"] == whole["comparison"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"seeds": 0}, "--seeds=0: must be at least 1"),
        ({}, {"layout": "rows"}, "--layout=rows: must be one of devices, map, vmap, unroll"),
        ({}, {"baseline": "kd"}, "--baseline=kd is not among the arms student, matched"),
        ({"init_from": "x"}, {}, "init_from = 'x': the seeds would all begin with the same weights"),
        ({"objective.skip_below": 0.1}, {}, "the arm 'student': objective.skip_below = 0.1"),
        ({"recipe.epochs": 0}, {}, "recipe.epochs = 0: must be at least 1"),
    ],
)
def test_mistakes_are_told_before_any_work(changes, options, message, tmp_path):
    config = small_config(**changes)
    with pytest.raises(RunError, match=message):
        room.compare(config, tmp_path / "x", arms={"matched": arm(config, "matched")}, **options)
    assert not (tmp_path / "x").exists()


def test_arms_of_the_same_objective_are_refused_all_at_once(tmp_path):
    """Where no weight reads the curve, arms that change it change nothing."""
    config = small_config(**{"objective.terms.kd.weight": "0.5", "objective.terms.wasserstein.weight": "0.5"})
    arms = {name: arm(config, name) for name in ("matched", "gompertz", "transport", "linear")}
    arms["again"] = arms["transport"]
    message = "the same objective at every step: 'matched' = 'gompertz' = 'linear'; 'transport' = 'again'. Keep one"
    with pytest.raises(RunError, match=message):
        room.compare(config, tmp_path, arms=arms, seeds=1)
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}


def test_another_comparison_is_refused_in_the_same_workdir(compared):
    config, workdir, _ = compared
    with pytest.raises(RunError, match=r"belongs to a run with another config.*seeds: 2 -> 3"):
        room.compare(config, workdir, arms=arms_of(config), seeds=3)


def test_the_command_names_what_it_does_not_know(tmp_path):
    for arms, message in (("matched,matched", "matched is there twice"), ("x", "the arm 'x' is unknown")):
        with pytest.raises(SystemExit, match=message):
            main(["compare", "--config", "configs/digits.py", "--arms", arms, "--workdir", str(tmp_path / "x")])
    for command in ("compare", "tune"):  # which is no short form of --seeds
        with pytest.raises(SystemExit, match="Unknown command line flag 'seed'"):
            main([command, "--config", "configs/digits.py", "--seed=7", "--workdir", str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("command", "more"), [("compare", {"baseline": "kd"}), ("tune", {"trials": 5, "search": "random"})]
)
def test_every_argument_of_the_command_reaches_it(command, more, tmp_path, monkeypatch):
    found, own = {}, tmp_path / "own.py"
    monkeypatch.setattr({"compare": room, "tune": tune}[command], command, lambda **given: found.update(given))
    own.write_text(
        "from gompertz_jax.training.config import get_default\n\n\n"
        "def get_config():\n    config = get_default()\n    config.objective.curve = '0.3'\n    return config\n"
    )
    options = {"seeds": 3, "layout": "vmap", "workdir": tmp_path} | more
    written = (f"--{key}={value}" for key, value in options.items())
    main([command, f"--config={ROOT}/configs/digits.py", "--config.seed=7", f"--arms=kd,mine={own}", *written])
    arms = found.pop("arms")
    assert found.pop("config").seed == 7 and found == options
    assert list(arms) == ["kd", "mine"] and arms["mine"].objective.curve == "0.3" and arms["mine"].seed == 7
