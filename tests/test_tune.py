"""Trials: what is drawn of an arm, where, and what the winner's config is."""

import importlib.util
import json
import re

import numpy as np
import pytest
from helpers import small_config

from gompertz_jax import report
from gompertz_jax import tune as room
from gompertz_jax.arms import arm
from gompertz_jax.training.data import Dataset
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.workdir import frozen


def test_what_is_drawn_of_an_arm_is_its_own():
    config = small_config()
    names = {name: [knob.name for knob in room.knobs(arm(config, name))] for name in ("gompertz", "matched", "student")}
    scores = ["kd.weight", "kd.temperature"]
    assert names == {
        "gompertz": ["gompertz.displacement", "gompertz.rate", *scores],
        "matched": scores,  # of the curve only the mean counts, which the weight's factor says
        "student": [],
    }


@pytest.mark.parametrize("nothing", ["0", "0.0", "0 * curve"])
def test_a_term_of_weight_0_has_nothing_to_draw(nothing):
    config = small_config(**{f"objective.terms.{name}.weight": nothing for name in ("kd", "gradient")})
    config.objective.terms.wasserstein.weight = "0.5"
    assert [knob.name for knob in room.knobs(config)] == ["wasserstein.weight", "wasserstein.epsilon"]
    # A cross-entropy that is left out gives up nothing for the scores.
    config = small_config(**{"objective.terms.ce.weight": "0 * curve"})
    assert "kd.weight" in [knob.name for knob in room.knobs(config)]


def test_a_knob_changes_its_parameter_and_no_other():
    config = arm(small_config(), "reversed")
    for knob, value in zip(room.knobs(config), (4.0, 6.0, 0.5, 2.0), strict=True):
        knob.set(config, value)
    assert config.objective.curve == "reversed(gompertz(displacement=4.0, rate=6.0))"
    assert config.objective.terms.kd.to_dict() == {
        "loss": "soft_targets",
        "weight": "0.5 * (1 * curve)",
        "temperature": "2",
    }


def test_a_knob_changes_a_number_as_it_changes_a_text():
    config = arm(small_config(), "constant")
    with config.ignore_type():
        config.objective.terms.kd.update({"weight": 1, "temperature": 4})
    for knob, value in zip(room.knobs(config), (0.5, 2.5), strict=True):
        knob.set(config, value)
    assert config.objective.terms.kd.to_dict() == {"loss": "soft_targets", "weight": "0.5 * (1)", "temperature": "2.5"}


def test_ranges_are_walked_by_the_logarithm_or_in_a_line():
    assert [room.Range(1.0, 100.0).at(share) for share in (0.0, 0.5, 1.0)] == [1.0, 10.0, 100.0]
    assert [room.Range(1.0, 3.0, linear=True).at(share) for share in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]


def test_sobol_points_fill_the_cube_and_both_searches_are_of_the_seed():
    points = room.shares("sobol", 16, 3, seed=1)
    for column in points.T:  # one in every sixteenth
        np.testing.assert_array_equal(np.sort((column * 16).astype(int)), np.arange(16))
    for search in ("sobol", "random"):
        first, again, other = (room.shares(search, 5, 2, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert first.shape == (5, 2) and not np.array_equal(first, other)


def test_a_factor_leaves_a_fixed_sum_fixed():
    names = [knob.name for knob in room.knobs(arm(small_config(), "budget"))]
    assert names == ["gompertz.displacement", "gompertz.rate", "kd.temperature"]


def test_an_arm_of_which_no_trial_stayed_finite_has_no_best(tmp_path, capsys):
    config = small_config()
    students = {f"{name}-{i}": {"students": [{"failed_at_step": step, "best_validation_accuracy": 0.5}]}
                for name, step in (("lost", 3), ("whole", None)) for i in range(2)}  # fmt: skip
    drawn = [{"kd.weight": 0.5}, {"kd.weight": 2.0}]
    result = {"search": "sobol", "trials": 2, "seeds": [0]}
    result["tuned"] = {name: room._ranked(name, drawn, {"arms": students}) for name in ("lost", "whole")}
    room._write(tmp_path, result, {name: config for name in students})
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["whole.py"]
    assert "no trial of the arm 'lost' stayed finite" in capsys.readouterr().out
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "tune.md").read_text().split("\n")
    ]
    assert ["lost", "0", "not finite", "kd.weight 0.5"] in cells
    assert (tmp_path / "tune.json").exists()


def test_every_arm_gets_its_trials_and_the_best_by_validation_is_a_config(tmp_path, capsys, monkeypatch):
    def read(dataset):
        raise AssertionError("the test images were read")

    monkeypatch.setattr(Dataset, "test", read)
    config = small_config()
    arms = {name: arm(config, name) for name in ("matched", "gompertz")}
    result = room.tune(config, tmp_path, arms=arms, trials=2)
    assert not re.search(r"test_accuracy_|teacher_test_accuracy\": [0-9]", json.dumps(result))
    for name, ranked in result["tuned"].items():
        accuracies = [trial["validation_accuracy"] for trial in ranked]
        assert len(ranked) == 2 and accuracies == sorted(accuracies, reverse=True)
        spec = importlib.util.spec_from_file_location("best", tmp_path / "best" / f"{name}.py")
        best = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(best)
        winner = result["config"]["arms"][f"{name}-{ranked[0]['trial']}"]
        assert frozen(best.get_config()) == frozen(arms[name]) | {"objective": winner}
    assert room.tune(config, tmp_path, arms=arms, trials=2) == result
    assert "holds a finished search" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "arms", "options", "message"),
    [
        ({}, ["gompertz"], {"trials": 0}, "--trials=0"),
        ({}, ["gompertz"], {"search": "grid"}, "--search=grid: must be sobol or random"),
        ({}, [], {}, "--arms: there is nothing to tune"),
        ({}, ["student"], {}, "the arm 'student' has no parameters to tune"),
        ({"data.validation": 0}, ["gompertz"], {}, "data.validation = 0: trials are chosen by validation"),
    ],
)
def test_mistakes_are_told_before_any_work(changes, arms, options, message, tmp_path):
    config = small_config(**changes)
    with pytest.raises(RunError, match=message):
        room.tune(config, tmp_path / "x", arms={name: arm(config, name) for name in arms}, **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["a/b", "../a", "", ".", "a" * 300, "é" * 150])
def test_an_arm_whose_best_could_not_be_written_is_refused_before_any_work(name, tmp_path):
    config = small_config()
    with pytest.raises(RunError, match="is no name for a file, and the arm's best is written to best"):
        room.tune(config, tmp_path / "x", arms={name: arm(config, "gompertz")})
    assert not (tmp_path / "x").exists()


def test_the_accuracy_of_a_trial_is_the_mean_over_its_seeds():
    students = [
        [{"failed_at_step": None, "best_validation_accuracy": value} for value in values]
        for values in ((0.1, 0.9), (0.5, 0.7))
    ]
    results = {"arms": {f"kd-{number}": {"students": found} for number, found in enumerate(students)}}
    ranked = room._ranked("kd", [{"kd.weight": 1.0}, {"kd.weight": 2.0}], results)
    assert [(trial["trial"], trial["validation_accuracy"]) for trial in ranked] == [(1, pytest.approx(0.6)), (0, 0.5)]
    failed = [{"failed_at_step": None, "best_validation_accuracy": 0.9}, {"failed_at_step": 3}]
    results["arms"]["kd-0"]["students"] = failed  # of one seed only, which is not what the others are compared by
    ranked = room._ranked("kd", [{"kd.weight": 1.0}, {"kd.weight": 2.0}], results)
    assert [(trial["trial"], trial["validation_accuracy"]) for trial in ranked] == [(1, pytest.approx(0.6)), (0, None)]


def test_what_is_tried_is_drawn_for_each_arm_from_its_own_points_of_the_seed(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    given = []

    def of(*arguments):
        given.append(arguments)
        raise Reached

    monkeypatch.setattr(room.Cohort, "of", of)
    for seed in (5, 6):
        config = small_config(seed=seed)
        arms = {name: arm(config, "constant") for name in ("one", "other")}
        with pytest.raises(Reached):
            room.tune(config, tmp_path, arms=arms, trials=3, seeds=2, layout="vmap", search="random")
    (_, tried, seeds, layout), (_, of_another_seed, _, _) = given
    assert (seeds, layout) == (2, "vmap")
    assert list(tried) == [f"{name}-{trial}" for name in ("one", "other") for trial in range(3)]
    found = [
        (terms.kd.weight, terms.kd.temperature)
        for listed in (tried, of_another_seed)
        for terms in (trial.objective.terms for trial in listed.values())
    ]
    # The second arm's points are those of the next seed.
    assert found[3:6] == found[6:9] and len(set(found)) == 9
    bounds = np.log([[room.FACTOR.low, room.FACTOR.high], list(room.OPTIONS["temperature"][:2])])
    for share, pair in zip(np.random.default_rng(5).random((3, 2)), found, strict=False):
        numbers = float(pair[0].partition(" *")[0]), float(pair[1])
        np.testing.assert_allclose(np.log(numbers), bounds[:, 0] + share * (bounds[:, 1] - bounds[:, 0]), atol=1e-3)


def test_a_search_tells_every_arm_s_three_best_and_the_best_config_its_accuracy():
    ranked = [{"trial": n, "values": {"kd.weight": 0.5}, "validation_accuracy": 0.9 - 0.1 * n} for n in range(5)]
    result = {"tuned": {"kd": ranked}, "trials": 5, "search": "sobol", "seeds": [0]}
    assert [row[1:3] for row in report.best_trials(result)[1:]] == [("0", "90.00"), ("1", "80.00"), ("2", "70.00")]
    source = room.config_source("kd", ranked, small_config())
    assert source.startswith('"""The arm \'kd\': the best of 5 trials by validation (90.00%).')
