"""What a run survives: damage to what it saved, and whatever else docs/reliability.md promises."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT, differences, small_config

from gompertz_jax.training import loop
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.workdir import sole_use


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


def assert_same(one, other):
    assert differences(one, other) == []


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_costs_an_interval_and_no_number(whole, copy, capsys):
    cut(next(path for path in (copy / "checkpoints" / "39").rglob("d/*") if path.stat().st_size > 1000))
    loop.train_and_evaluate(small_config(), copy)
    out = capsys.readouterr().out
    assert f"the checkpoint {copy / 'checkpoints' / '39'} is left out (" in out
    assert "goes on from step 27 of 39" in out
    assert_same(whole, copy)


def test_without_an_intact_checkpoint_nothing_starts_from_scratch(copy):
    for step in (27, 39):
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


# --- processes --------------------------------------------------------------------------------------------------------

SMALL = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import small_config
from gompertz_jax.training.feed import Feed

def slowly(self, step, call=Feed.__call__):
    time.sleep(float(os.environ.get("SECONDS_A_DISPATCH", "0")))
    return call(self, step)

Feed.__call__ = slowly

def get_config():
    return small_config()
"""


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A config file of the same run."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL)
    return path


def start(config, workdir, log, *more, **environment):
    """`python train.py` in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}", *more]
    with log.open("a") as output:
        environment = {**os.environ, **environment}
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def until(condition, process, *, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_a_workdir_is_one_run_s_alone_while_that_lives(small_file, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    first = start(small_file, workdir, log)
    try:
        until((workdir / "teacher" / "lock").exists, first)
        with pytest.raises(RunError, match=f"{workdir} is in use by process {first.pid} on {socket.gethostname()}: "):
            loop.train_and_evaluate(small_config(), workdir)
        with (
            pytest.raises(RunError, match=f"teacher is in use by process {first.pid} on "),
            sole_use(workdir / "teacher"),
        ):
            pass
        first.send_signal(signal.SIGSTOP)  # a run that sleeps is not dead
        with pytest.raises(RunError, match="is in use by"):
            loop.train_and_evaluate(small_config(), workdir)
    finally:
        first.kill()
        first.wait()
    with sole_use(workdir), sole_use(workdir / "teacher"):
        pass


@pytest.mark.parametrize(
    ("number", "moment", "said"),
    [
        (signal.SIGTERM, "teacher/checkpoints/13", r"teacher: saved at step \d+ of 65"),
        (signal.SIGINT, "checkpoints/15", r"student: saved at step \d+ of 39"),
        (signal.SIGTERM, "lock", "finishing and saving what is under way"),
    ],
    ids=["teacher", "student", "compilation"],
)
def test_a_signal_stops_a_run_that_goes_on_to_the_same_bits(small_file, whole, tmp_path, number, moment, said):
    workdir, log = tmp_path / "run", tmp_path / "log"
    process = start(small_file, workdir, log, SECONDS_A_DISPATCH="0.1")
    until((workdir / moment).exists, process)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number, log.read_text()
    text = log.read_text()
    assert re.search(said, text), text
    assert "the same command goes on from the last checkpoint" in text
    assert "Traceback" not in text
    loop.train_and_evaluate(small_config(), workdir)
    assert_same(whole, workdir)
