"""What a run survives: damage to what it saved, and whatever else docs/reliability.md promises."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, config_source, differences, small_config, until
from jax.experimental.compilation_cache import compilation_cache

import gompertz_jax as gj
from gompertz_jax.intact import fault
from gompertz_jax.training import loop
from gompertz_jax.training.checkpoint import Checkpoints
from gompertz_jax.training.data import load
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.networks import load_network, save_network
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
    assert "resumes from step 27 of 39" in out
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


def test_a_finished_run_whose_network_is_gone_says_so_and_how_to_get_it_back(whole, copy, capsys):
    shutil.copy(whole / "result.json", copy / "result.json")
    shutil.rmtree(copy / "network")
    loop.train_and_evaluate(small_config(), copy)
    said = capsys.readouterr().out
    assert "test accuracy" in said and f"remove {copy / 'result.json'} and start again" in said
    (copy / "result.json").unlink()
    loop.train_and_evaluate(small_config(), copy)
    assert_same(whole, copy)
    loop.train_and_evaluate(small_config(), copy)
    assert "warning" not in capsys.readouterr().out


def test_a_damaged_teacher_of_one_s_own_is_made_again_from_its_checkpoint(whole, copy, capsys):
    for name in ("teacher.json", "network.json", "network/state/manifest.ocdbt"):
        cut(copy / "teacher" / name)
    loop.train_and_evaluate(small_config(), copy)
    assert "teacher.json is damaged and kept as" in capsys.readouterr().out
    assert (copy / "teacher" / "set_aside" / "network").is_dir()
    assert_same(whole, copy)


def test_only_logging_evaluation_and_retention_may_change(whole, copy, capsys):
    with pytest.raises(RunError, match=re.escape("recipe.epochs: 3 -> 4")):
        loop.train_and_evaluate(small_config(**{"recipe.epochs": 4}), copy)
    changed = {"logging.every_steps": 5, "checkpoint.keep": 5, "evaluate_every_epochs": 2}
    result = loop.train_and_evaluate(small_config(**changed), copy)
    assert result["evaluation_changes"] == ["evaluate_every_epochs: 1 -> 2"]
    assert "evaluated otherwise than at its first start" in capsys.readouterr().out
    again = json.loads((whole / "result.json").read_text())
    assert again["evaluation_changes"] == []
    assert result["test_accuracy_last"] == again["test_accuracy_last"]


def test_a_new_run_begins_with_the_weights_of_a_finished_one(whole, tmp_path, monkeypatch):
    changes = {"init_from": str(whole), "teacher.dir": str(whole / "teacher"), "recipe.learning_rate": 1e-30}
    taught = {path: path.read_bytes() for path in (whole / "teacher").rglob("*") if path.is_file()}
    loop.train_and_evaluate(small_config(**changes), tmp_path / "run")
    assert {path: path.read_bytes() for path in (whole / "teacher").rglob("*") if path.is_file()} == taught
    networks = [load_network(directory) for directory in (whole, tmp_path / "run")]
    jax.tree.map(np.testing.assert_array_equal, networks[0].params, networks[1].params)
    with pytest.raises(RunError, match=r"init_from = '.*teacher': its network has \("):
        loop.init_from(whole / "teacher", networks[0])
    monkeypatch.setattr(loop, "of_config", None)  # what follows is said before the data are read
    for other, message in (
        ({"init_from": "nowhere"}, "init_from = 'nowhere': directory nowhere holds no trained network"),
        ({"init_from": str(whole / "teacher")}, r"init_from = '.*': its network is a \w+ and the student a \w+; give"),
    ):
        with pytest.raises(RunError, match=message):
            loop.train_and_evaluate(small_config(**changes | other), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_compiled_program_that_a_kill_cut_short_is_compiled_again(tmp_path):
    """Each training step made below is another one to JAX, and the same program to the cache."""

    def apply(params, stats, images, *, train, key=None):
        pooled = jnp.tanh(images).mean((1, 2))
        return gj.Outputs(pooled @ params, (images,), pooled), stats

    student, teacher = (gj.Network(apply, jnp.eye(3) * scale, {}, 0.5, 0.25) for scale in (1.0, 2.0))
    objective = gj.gompertz_objective(10, wasserstein_weight=0.0, gradient_weight=0.0)
    batch = {"image": jnp.linspace(0.0, 1.0, 96).reshape(2, 4, 4, 3), "label": jnp.arange(2)}

    def trained():
        """What two steps from the beginning give."""
        state = gj.init_state(student, optax.sgd(0.1), objective, (4, 4, 3))
        step = gj.make_train_step(student, optax.sgd(0.1), objective, steps_per_dispatch=2)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(step(state, teacher, batch))]

    directory = jax.config.jax_compilation_cache_dir
    try:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        expected = trained()
        (entry,) = tmp_path.glob("jit_dispatch*-cache")
        for size in (entry.stat().st_size // 2, 0):
            with entry.open("r+b") as file:
                file.truncate(size)
            with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry for 'jit_dispatch'"):
                assert trained() == expected
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", directory)


# --- teachers ---------------------------------------------------------------------------------------------------------


def edited(folder, **changes):
    card = json.loads((folder / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps(card | changes))


def rewritten(folder, change):
    """The same teacher with other arrays, saved as a run would."""
    dataset = load("digits", validation=100)
    network = change(load_network(folder), dataset)
    shutil.rmtree(folder / "network")
    save_network(folder, network, json.loads((folder / "network.json").read_text()))


def untrained(network, dataset):
    return loop.network_from(small_config().teacher.to_dict(), dataset, seed=7)


def with_nan(network, dataset):
    params = jax.tree.map(np.array, network.params)
    jax.tree.leaves(params)[-1].flat[0] = np.nan
    return network.replace(params=params)


def no_checkpoint(folder):
    shutil.rmtree(folder / "network")
    (folder / "network").mkdir()
    (folder / "network" / "model.pt").write_bytes(b"PK\x03\x04 of another program")


BAD_TEACHERS = {
    "class count": (lambda folder: edited(folder, num_classes=12), "the teacher has 12 classes, digits has 10: choose"),
    "normalisation": (
        lambda folder: edited(folder, mean=[0.9], std=[0.05]),
        r"own normalisation \(mean \[0.9\], std \[0.05\]\) and .* with that of digits .* into its network.json",
    ),
    "random weights": (
        lambda folder: rewritten(folder, untrained),
        r"classifies \d+.\d% of the held-out images, and guessing 1\d.\d%: its weights are untrained, .* teacher.dir",
    ),
    "NaN weights": (
        lambda folder: rewritten(folder, with_nan),
        r"is broken: 1 of [\d,]+ numbers of \['params'\].* are NaN or infinite; train it again",
    ),
    "no checkpoint": (no_checkpoint, "network is damaged or no checkpoint: it has no SHA256SUMS; restore it"),
}


@pytest.mark.parametrize("kind", BAD_TEACHERS)
def test_a_bad_teacher_is_refused_before_the_first_step_with_a_message_of_its_own(whole, tmp_path, kind):
    harm, message = BAD_TEACHERS[kind]
    shutil.copytree(whole / "teacher", tmp_path / "teacher")
    harm(tmp_path / "teacher")
    with pytest.raises(RunError, match=message) as caught:
        loop.train_and_evaluate(small_config(**{"teacher.dir": str(tmp_path / "teacher")}), tmp_path / "run")
    assert str(tmp_path / "teacher") in str(caught.value) or kind == "class count"
    assert not {"metrics.jsonl", "checkpoints"} & {path.name for path in (tmp_path / "run").iterdir()}


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Orbax's threads say it too,
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # and what they leave behind
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_is_full_or_read_only_costs_nothing_that_was_saved(
    whole, small_disk, tmp_path, monkeypatch, trouble
):
    """From the student's first checkpoint on; with room again the run ends in the same bits."""
    workdir, original = small_disk / "run", Checkpoints.save
    shutil.copytree(whole / "teacher", workdir / "teacher")

    def save(self, step, *arguments):
        if step == 27:
            self.wait()
            if trouble == "full":
                with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
                    while file.write(bytes(1024)):
                        pass
            else:
                saved = workdir / "checkpoints"
                for options in (["--bind", saved, saved], ["-o", "remount,ro,bind", saved]):
                    subprocess.run(["mount", *options], check=True)
        original(self, step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"cannot be written .*start again"):
        patch.setattr(Checkpoints, "save", save)
        loop.train_and_evaluate(small_config(), workdir)
    assert fault(workdir / "checkpoints" / "15") is None
    if trouble == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["umount", workdir / "checkpoints"], check=True)
    loop.train_and_evaluate(small_config(), workdir)
    assert_same(whole, workdir)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A config file of the same run."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(config_source())
    return path


def start(config, workdir, log, *more, **environment):
    """`python train.py` in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}", *more]
    with log.open("a") as output:
        environment = {**os.environ, **environment}
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


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


ENDS = [
    # signal, the file at whose appearance it is sent, what is said
    (signal.SIGTERM, "lock", ""),  # compilation, in which nothing is there to be saved
    (signal.SIGKILL, "teacher/metrics.jsonl", ""),
    (signal.SIGTERM, "teacher/checkpoints/13", r"teacher: saved at step \d+ of 65"),
    (signal.SIGKILL, "metrics.jsonl", ""),
    (signal.SIGINT, "checkpoints/15", r"student: saved at step \d+ of 39"),
    (signal.SIGKILL, "checkpoints/27", ""),
]


def test_a_run_that_is_killed_and_stopped_again_and_again_ends_in_the_same_bits(small_file, whole, tmp_path):
    """SIGKILL comes up to .3 s after its moment: that is another one each time the suite runs."""
    workdir, rng = tmp_path / "run", np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    for number, moment, said in ENDS:
        log = tmp_path / f"{moment.replace('/', '-')}.log"
        process = start(small_file, workdir, log, SECONDS_A_DISPATCH="0.1")
        until((workdir / moment).exists, process)
        if number == signal.SIGKILL:
            time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        code, text = process.wait(timeout=30), log.read_text()
        if number == signal.SIGKILL:
            assert code == -number, text
        else:
            assert code == 128 + number, text
            assert "the same command resumes from the last checkpoint" in text
        assert re.search(said, text), text
        assert "Traceback" not in text
    log = tmp_path / "end.log"
    assert start(small_file, workdir, log).wait(timeout=240) == 0, log.read_text()
    assert "best by validation" in log.read_text()
    assert_same(whole, workdir)
