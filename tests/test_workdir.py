"""A workdir belongs to one config, and says what computed in it."""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import tiny_config

from gompertz_jax.training import workdir as room
from gompertz_jax.training.errors import RunError


def test_a_frozen_config_equals_its_json():
    config = tiny_config()
    assert room.frozen(config) == room.frozen(tiny_config())
    assert room.frozen(config)["recipe"]["boundaries"] == [150, 180, 210]


def test_a_workdir_belongs_to_its_config(tmp_path):
    content = room.frozen(tiny_config())
    room.check_workdir(tmp_path / "run", content)
    assert list((tmp_path / "run").iterdir()) == []
    room.claim_workdir(tmp_path / "run", content)
    room.check_workdir(tmp_path / "run", room.frozen(tiny_config(**{"logging.every_steps": 3, "checkpoint.keep": 5})))
    with pytest.raises(RunError, match=re.escape("student.model: 'resnet8' -> 'resnet14'")):
        room.check_workdir(tmp_path / "run", room.frozen(tiny_config(**{"student.model": "resnet14"})))


def test_runs_and_comparisons_keep_apart_and_arms_that_differ_are_told_by_name(tmp_path):
    run = room.frozen(tiny_config())
    cohort = run | {"arms": {"kd": run["objective"], "full": run["objective"]}, "seeds": 2}
    room.claim_workdir(tmp_path, run)
    with pytest.raises(RunError, match=r"holds a single run; a comparison or a search needs its own --workdir$"):
        room.check_workdir(tmp_path, cohort)
    room.write_json(tmp_path / room.CONFIG, cohort)
    with pytest.raises(RunError, match=r"holds a comparison or a search; a single run needs its own --workdir$"):
        room.check_workdir(tmp_path, run)
    other = cohort | {"arms": {"kd": run["objective"], "student": run["objective"]}, "seeds": 3}
    told = r"Changed: arms\.full: missing; arms\.student: new; seeds: 2 -> 3; seeds cannot be added to a comparison$"
    with pytest.raises(RunError, match=told):
        room.check_workdir(tmp_path, other)


def test_a_config_older_than_a_key_has_it_at_its_default(tmp_path):
    """Of a whole run and of a teacher's part of one; what the user named is not filled up."""
    for name, groups in (("run", None), ("teacher", ("teacher", "data"))):
        content = {key: group for key, group in room.frozen(tiny_config()).items() if not groups or key in groups}
        old = {**content, "data": {key: value for key, value in content["data"].items() if key != "image_size"}}
        room.check_workdir(tmp_path / name, old)
        room.claim_workdir(tmp_path / name, old)
        room.check_workdir(tmp_path / name, content)
        with pytest.raises(RunError, match=re.escape("Changed: data.image_size: 0 -> 8")):
            room.check_workdir(tmp_path / name, {**content, "data": {**content["data"], "image_size": 8}})
    assert room.evaluation_changes(tmp_path / "run", room.frozen(tiny_config())) == []
    assert room.begun_with(tmp_path / "run", "evaluate_every_epochs") == 1
    assert room.begun_with(tmp_path / "none", "evaluate_every_epochs") is None
    alone = {"objective": {"terms": {"ce": {"loss": "cross_entropy"}}}}
    assert room.with_defaults(alone)["objective"]["terms"] == alone["objective"]["terms"]


def test_every_change_of_evaluation_is_kept_also_when_it_is_taken_back(tmp_path):
    once, thrice = (room.frozen(tiny_config(evaluate_every_epochs=every)) for every in (1, 3))
    room.claim_workdir(tmp_path, once)
    found = [room.evaluation_changes(tmp_path, content) for content in (once, thrice, once)]
    assert found == [[], ["evaluate_every_epochs: 1 -> 3"], ["evaluate_every_epochs: 1 -> 3"]]
    floor = room.frozen(tiny_config(**{"teacher.min_accuracy": 0.25}))
    assert room.evaluation_changes(tmp_path, floor) == [
        "evaluate_every_epochs: 1 -> 3",
        f"teacher.min_accuracy: {once['teacher']['min_accuracy']} -> 0.25",
    ]


def test_two_starts_at_once_probe_a_workdir(tmp_path, monkeypatch):
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: [touch(path), path.unlink()])  # by the other start
    room.check_workdir(tmp_path / "run", {})


def test_checkpoints_without_a_config_and_unreadable_configs_are_refused(tmp_path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match="holds checkpoints but no config"):
        room.check_workdir(tmp_path / "a", {})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").touch()
    with pytest.raises(RunError, match=r"holds metrics\.jsonl but no config"):
        room.check_workdir(tmp_path / "c", {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        room.check_workdir(tmp_path / "b", {})
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        room.check_workdir(tmp_path / "file" / "run", {})


def test_provenance_names_versions_device_and_commit():
    found = room.provenance()
    assert {"jax", "flax", "optax", "ott-jax", "orbax-checkpoint", "python"} <= found["versions"].keys()
    assert found["device"].endswith(" x 1")
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])


def test_a_workdir_in_use_names_who_uses_it_and_one_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    with room.sole_use(tmp_path):
        for _ in range(2):  # asking changes nothing
            with (
                pytest.raises(RunError, match=f"is in use by process {os.getpid()} on .*: wait for it"),
                room.sole_use(tmp_path),
            ):
                pass

    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(room.fcntl, "flock", unsupported)
    with room.sole_use(tmp_path):
        assert "is on a file system without locks (No locks available)" in capsys.readouterr().out


def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(room, "__file__", str(tmp_path / "workdir.py"))
    (tmp_path / "workdir.py").write_text("1")
    assert room.provenance()["commit"] is None  # no checkout
    git("init", "-q")
    assert room.provenance()["commit"] is None  # one of something else
    git("add", "workdir.py")
    git("commit", "-q", "-m", "x")
    (tmp_path / "notes").touch()
    assert room.provenance()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "workdir.py").write_text("2")
    assert room.provenance()["commit"] == git("rev-parse", "HEAD") + "-dirty"
