"""What a run survives: damage to what it saved, and whatever else docs/reliability.md promises."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import smallest_networks, tiny_config

from gompertz_jax.training import loop
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.teacher import load_network
from gompertz_jax.training.writer import read_metrics


def small_config(**changes):
    """A whole run, teacher and evaluations included, that compiles in a few seconds: 39 steps in three dispatches."""
    student, teacher = smallest_networks()
    off = {f"objective.terms.{term}.weight": "0" for term in ("wasserstein", "gradient")}
    return tiny_config(
        **{
            "student.model": student,
            "teacher.model": teacher,
            "steps_per_dispatch": 13,
            "teacher.recipe.epochs": 5,
            **off,
        }
        | changes
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.train_and_evaluate(small_config(), workdir)
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it that never came to its end, so that it is gone on with."""
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    (workdir / "result.json").unlink()
    return workdir


def without_timing(value):
    if isinstance(value, dict):
        return {key: without_timing(item) for key, item in value.items() if key != "timing"}
    return value


def assert_same(one, other):
    """Two workdirs, in everything that is no time: results, every line of metrics, weights."""
    for name in ("result.json", "teacher/teacher.json"):
        first, second = (json.loads((workdir / name).read_text()) for workdir in (one, other))
        assert without_timing(first) == without_timing(second)
    for part in (".", "teacher"):
        lines = [[without_timing(line) for line in read_metrics(run / part / "metrics.jsonl")] for run in (one, other)]
        assert lines[0] == lines[1]
        networks = [load_network(run / part) for run in (one, other)]
        jax.tree.map(np.testing.assert_array_equal, networks[0].params, networks[1].params)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_costs_an_interval_and_no_number(whole, copy, capsys):
    cut(next(path for path in (copy / "checkpoints" / "39").rglob("d/*") if path.stat().st_size > 1000))
    loop.train_and_evaluate(small_config(), copy)
    out = capsys.readouterr().out
    assert f"the checkpoint {copy / 'checkpoints' / '39'} is left out (" in out
    assert "goes on from step 26 of 39" in out
    assert_same(whole, copy)


def test_without_an_intact_checkpoint_nothing_starts_from_scratch(copy):
    for step in (26, 39):
        shutil.rmtree(copy / "checkpoints" / str(step))
    before = sorted(copy.rglob("*"))
    with pytest.raises(RunError, match=f"no checkpoint of the workdir {copy} is intact"):
        loop.train_and_evaluate(small_config(), copy)
    assert sorted(copy.rglob("*")) == before


def test_a_torn_line_of_metrics_is_written_again_from_the_checkpoint_before_it(whole, copy, capsys):
    with (copy / "metrics.jsonl").open("r+") as file:
        file.truncate((copy / "metrics.jsonl").stat().st_size - 20)
    loop.train_and_evaluate(small_config(), copy)
    assert "metrics.jsonl lost lines" in capsys.readouterr().out
    assert_same(whole, copy)


def test_lines_that_no_checkpoint_can_give_again_are_missed_and_told(copy, capsys):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[5:]))
    loop.train_and_evaluate(small_config(), copy)
    assert "lost lines that no checkpoint is old enough to write again" in capsys.readouterr().out


def test_a_result_that_was_cut_in_half_is_made_again(whole, copy, capsys):
    shutil.copy(whole / "result.json", copy / "result.json")
    cut(copy / "result.json")
    half = (copy / "result.json").read_bytes()
    loop.train_and_evaluate(small_config(), copy)
    assert f"{copy / 'result.json'} is damaged and kept as" in capsys.readouterr().out
    assert (copy / "set_aside" / "result.json").read_bytes() == half
    assert_same(whole, copy)


def test_a_damaged_teacher_of_one_s_own_is_made_again_from_its_checkpoint(whole, copy, capsys):
    for name in ("teacher.json", "network.json", "network/state/manifest.ocdbt"):
        cut(copy / "teacher" / name)
    loop.train_and_evaluate(small_config(), copy)
    assert "teacher.json is damaged and kept as" in capsys.readouterr().out
    assert (copy / "teacher" / "set_aside" / "network").is_dir()
    assert_same(whole, copy)
