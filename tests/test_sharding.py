"""Devices and processes: however many there are, the same training; and what the shell says when they do not fit."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import CASES, MEASURED, comparison
from helpers import ROOT, config_source, small_config, tiny_config, until

from gompertz_jax.data_parallel import shard_batch
from gompertz_jax.step import TELEMETRY
from gompertz_jax.training import loop, sharding
from gompertz_jax.training.errors import RunError
from gompertz_jax.training.networks import load_network
from gompertz_jax.training.writer import read_metrics

FLAGS = os.environ["XLA_FLAGS"]  # conftest's
TOLERANCE = 2e-5  # relative, of losses and of the norm of all weights; seen: 1e-5 and 5e-6
SMALL = ("batch_correlation", "probabilistic_transfer")  # losses that begin under 1e-3: 4e-4 and 2e-4


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What tests/eight_devices.py found."""
    directory = tmp_path_factory.mktemp("eight")
    flags = f"{FLAGS} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, str(ROOT / "tests" / "eight_devices.py"), str(directory)]
    subprocess.run(command, check=True, env=environment, timeout=400)
    return directory


def arrays(file):
    with np.load(file) as found:
        return dict(found)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(a)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_train_as_one(eight, case):
    """Losses and weights after three steps of each term, and of the mean of all."""
    one, several = arrays(eight / "one.npz"), arrays(eight / "eight.npz")
    np.testing.assert_allclose(several[f"{case}/losses"], one[f"{case}/losses"], rtol=TOLERANCE)
    assert distance(one[f"{case}/weights"], several[f"{case}/weights"]) < TOLERANCE
    assert one[f"{case}/losses"][0] > (1e-4 if case in SMALL else 1e-3)
    if case != "all":
        # The case is what it says it is: its loss is that term's alone.
        np.testing.assert_allclose(one[f"{case}/losses"], one[f"{case}/{case}/raw"], rtol=1e-6)


def test_gradients_measured_of_divided_batches_are_those_of_one_device(eight):
    one, several = arrays(eight / "measured_one.npz"), arrays(eight / "measured_eight.npz")
    assert {f"all/{term}{end}" for term in MEASURED for end in TELEMETRY} <= {*one.keys()}
    for name in one.keys() - {"all/weights"}:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_comparison_on_eight_devices_is_that_of_one_also_with_images_from_the_host(eight, tmp_path):
    comparison(tmp_path, str(eight / "comparison" / "teacher"))
    one, several = (
        {
            (line["arm"], line["seed"], line["split"], line["step"]): line
            for line in read_metrics(directory / "metrics.jsonl")
        }
        for directory in (tmp_path, eight / "comparison")
    )
    assert one.keys() == several.keys() and len(one) > 50
    for place, line in one.items():
        if place[2] == "train":
            assert several[place]["loss"] == pytest.approx(line["loss"], rel=1e-3), place
        assert several[place]["accuracy"] == pytest.approx(line["accuracy"], abs=0.021), place


def test_normalising_each_device_s_images_alone_would_be_noticed(eight):
    one, wrong = arrays(eight / "one.npz"), arrays(eight / "per_device.npz")
    ours, theirs = one["cross_entropy/losses"], wrong["cross_entropy/losses"]
    assert distance(ours, theirs) > 100 * TOLERANCE
    assert abs(ours[0] - theirs[0]) > 100 * TOLERANCE


# --- what the compiled programs say -----------------------------------------------------------------------------------

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def computations(text):
    """The lines of each computation of an HLO module, by name; the entry's name is ENTRY."""
    found, name = {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def reached(found, start):
    """The lines of a computation and of all that it calls."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in found and name not in seen:
            seen.add(name)
            # An operation names what it calls as it names its operands; only the former are computations.
            waiting += re.findall(r"%([\w.\-]+)", "\n".join(found[name]))
    return [line for name in seen for line in found[name]]


def loops(text, *, inner):
    """What every loop computes, conditions too; `inner` ones are not in the program's outermost computation."""
    found = computations(text)
    for name, lines in found.items():
        for line in lines:
            if " while(" in line and inner == (name != "ENTRY"):
                parts = re.search(r"condition=%([\w.\-]+), body=%([\w.\-]+)", line)
                yield [line for part in parts.groups() for line in reached(found, part)]


def collectives(lines):
    return [line for line in lines if COLLECTIVE.search(line)]


def test_students_divided_among_devices_are_those_of_one_and_do_not_wait_for_each_other(eight):
    one, several = arrays(eight / "students_one.npz"), arrays(eight / "students_eight.npz")
    assert one.keys() == several.keys() and len(one.keys()) > 50
    for path, values in one.items():
        np.testing.assert_allclose(several[path], values, rtol=1e-4, atol=1e-6, err_msg=path)
    text = (eight / "students_eight.hlo").read_text()
    every = [lines for inner in (True, False) for lines in loops(text, inner=inner)]
    assert every and not any(map(collectives, every))
    assert collectives(text.splitlines()), "every device has all students after a dispatch"


def test_no_device_waits_for_another_within_the_transport(eight):
    step, alone = (eight / "eight.hlo").read_text(), (eight / "transport.hlo").read_text()
    training, *others = list(loops(step, inner=False))
    assert collectives(training)
    assert not others
    for text in (step, alone):
        within = list(loops(text, inner=True))
        assert len(within) >= 2
        assert not any(map(collectives, within))
    # The one meeting is for the mean over the batch: nothing is gathered before or after the loop either.
    assert {COLLECTIVE.search(line)[1] for line in collectives(alone.splitlines())} == {"all-reduce"}


def test_no_device_waits_for_another_to_look_up_a_batch(eight):
    text = (eight / "batches.hlo").read_text()
    (dispatch,) = loops(text, inner=False)
    assert collectives(dispatch)  # the mean
    walks = list(loops(text, inner=True))
    assert walks and not any(map(collectives, walks))


def test_a_device_that_waited_would_be_noticed(eight):
    (within,) = loops((eight / "meeting.hlo").read_text(), inner=False)
    assert collectives(within)


# --- one device -------------------------------------------------------------------------------------------------------


def test_copies_are_on_every_device_and_share_no_memory_with_a_donated_one():
    mesh = sharding.data_mesh()
    tree = {"a": jnp.arange(1000.0), "b": np.float64(0.5), "c": np.arange(3, dtype=np.uint8)}
    copies = sharding.replicate(tree, mesh)
    assert [leaf.dtype for leaf in jax.tree.leaves(copies)] == [jnp.float32, jnp.float32, jnp.uint8]
    assert all(leaf.sharding.is_fully_replicated and leaf.committed for leaf in jax.tree.leaves(copies))
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(copies))
    np.testing.assert_array_equal(tree["a"], np.arange(1000.0))
    np.testing.assert_array_equal(tree["c"], [0, 1, 2])


def test_with_one_process_work_is_done_here_and_its_failure_is_its_own():
    assert sharding.is_main()
    assert sharding.on_main(lambda: [1]) == sharding.together(lambda: [1]) == [1]
    with pytest.raises(ZeroDivisionError):
        sharding.on_main(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("batch", "devices", "message"),
    [
        (96, 8, None),
        (7, 1, None),
        (100, 8, "recipe.batch_size = 100 cannot be divided equally among 8 devices: take 96 or 104, or let the run"),
        (5, 8, "among 8 devices: take 8, or let the run"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch, devices, message):
    if message is None:
        sharding.check_batch_size(batch, devices, "recipe.batch_size")
    else:
        with pytest.raises(RunError, match=re.escape(message)):
            sharding.check_batch_size(batch, devices, "recipe.batch_size")


def test_an_entry_of_a_batch_without_rows_is_told():
    mesh = jax.sharding.Mesh(np.array([jax.devices()[0]] * 8), ("data",))  # refused before the devices matter
    batch = {"image": jnp.zeros((8, 2, 2, 1)), "temperature": jnp.float32(4.0)}
    with pytest.raises(ValueError, match=r"temperature of a batch must have one row per image .*, got a scalar"):
        shard_batch(batch, mesh)


@pytest.mark.parametrize("key", ["recipe.batch_size", "teacher.recipe.batch_size"])
def test_a_run_refuses_such_a_batch_before_any_work(key, tmp_path, monkeypatch):
    class Mesh:
        size = 5

    monkeypatch.setattr(loop, "data_mesh", Mesh)
    batches = {"recipe.batch_size": 20, "teacher.recipe.batch_size": 20} | {key: 21}
    with pytest.raises(RunError, match=f"^{key} = 21 cannot be divided equally among 5 devices: take 20 or 25"):
        loop.train_and_evaluate(tiny_config(**batches), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "here:1"}, "--coordinator was given without --processes and --process: all three"),
        ({"process": 0}, "--process was given without --coordinator and --processes"),
        ({"coordinator": "here:1", "processes": 2}, "--coordinator was given without --process:"),
        ({"coordinator": "here", "processes": 2, "process": 0}, "--coordinator=here: must be HOST:PORT"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, "--process=2: must lie in [0, 2)"),
        ({"coordinator": "here:1", "detect": True}, "--distributed finds out by itself what --coordinator says"),
    ],
)
def test_half_given_processes_are_refused(arguments, message):
    with pytest.raises(RunError, match=re.escape(message)):
        sharding.connect(**arguments)


def test_a_first_process_that_never_appears_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sharding, "START_SECONDS", 0.3)
    with pytest.raises(RunError, match=r"--coordinator=localhost:\d+ cannot be reached .*is process 0 running there"):
        sharding.connect(f"localhost:{free_port()}", 2, 1)


# --- two processes ----------------------------------------------------------------------------------------------------

# Larger rates magnify rounding.
CHANGES = {"recipe.learning_rate": 0.05, "teacher.recipe.learning_rate": 0.05, "steps_per_dispatch": 13}
LIVE = {"objective.terms.gradient.weight": "0.7 * curve", "recipe.epochs": 5}  # every step asks the teacher


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


TRAIN = (str(ROOT / "train.py"),)


def start_two(config, workdir, log, *, program=TRAIN, **environment):
    """The same command on two processes, as on two hosts."""
    address = f"--coordinator=localhost:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, **environment}
    started = []
    for process in range(2):
        command = [sys.executable, *program, f"--config={config}", f"--workdir={workdir}"]
        with (log / f"{process}.log").open("a") as output:
            command += [address, "--processes=2", f"--process={process}"]
            started.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
    return started


def ended(processes, *, timeout):
    """Their exit codes; what still runs after that long is killed."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("stopped", "changes"),
    [
        ("teacher", {"teacher.cache.views": 2, "recipe.epochs": 2}),
        ("student", LIVE),
    ],
)
def test_two_processes_train_stop_and_resume_together_as_one(stopped, changes, tmp_path):
    """The second one is asked to stop while a network trains: both do, at the same step, and go on to the end."""
    changes = CHANGES | changes
    config, log, run = tmp_path / "config.py", tmp_path / "log", tmp_path / "two"
    of_stopped = run / "teacher" if stopped == "teacher" else run
    config.write_text(config_source(**changes))
    log.mkdir()
    started = start_two(config, run, log, SECONDS_A_DISPATCH="0.5")
    until((of_stopped / "checkpoints/13/SHA256SUMS").exists, started[0])
    started[1].send_signal(signal.SIGTERM)
    codes = ended(started, timeout=30)
    said = [(log / f"{process}.log").read_text() for process in range(2)]
    assert codes == [128 + signal.SIGTERM] * 2, said
    (step,) = re.findall(rf"{stopped}: saved at step (\d+) of 65", said[0])
    assert int(step) < 65
    assert (of_stopped / "checkpoints" / step / "SHA256SUMS").exists()
    assert max(line["step"] for line in read_metrics(of_stopped / "metrics.jsonl")) <= int(step)

    codes = ended(start_two(config, run, log), timeout=240)
    said = [(log / f"{process}.log").read_text() for process in range(2)]
    assert codes == [0, 0], said
    assert f"{stopped}: resumes from step {step} of 65" in said[0]
    assert "x 2 in 2 processes" in said[0]
    # One process speaks and writes, but for the one that was asked; what both say is said by JAX's network library.
    spoken = [line for line in said[1].splitlines() if "[Gloo]" not in line]
    assert len(spoken) == 1 and spoken[0].startswith("SIGTERM: finishing and saving")

    one = loop.train_and_evaluate(small_config(**changes), tmp_path / "one")
    two = json.loads((run / "result.json").read_text())
    for key in ("teacher_test_accuracy", "test_accuracy_last", "test_accuracy_best"):
        assert two[key] == pytest.approx(one[key], abs=0.01)
    assert two["config"] == one["config"]
    for part in ("", "teacher"):
        lines = [read_metrics(tmp_path / name / part / "metrics.jsonl") for name in ("one", "two")]
        assert len({str([(line["step"], line["split"]) for line in run]) for run in lines}) == 1
        for first, second in zip(*lines, strict=True):
            for name in first.keys() & {"loss", "cross_entropy", "gradient_norm"}:
                assert second[name] == pytest.approx(first[name], rel=1e-4), (part, first["step"], name)
        networks = [jax.tree.leaves(load_network(tmp_path / name / part).params) for name in ("one", "two")]
        weights = [np.concatenate([np.asarray(leaf).ravel() for leaf in leaves]) for leaves in networks]
        assert distance(*weights) < 1e-4


FAILS = """
import jax

def fails(self, step, call=Feed.__call__):
    if jax.process_index() == 1 and step >= 8:  # both have computed together, and nothing is being saved
        raise ValueError("no memory on this host")
    return call(self, step)

Feed.__call__ = fails
"""


@pytest.mark.parametrize(
    ("fails", "changes", "said"),
    [
        pytest.param(FAILS, {}, ["", "ValueError: no memory on this host"], id="one process"),
        pytest.param("", {"recipe.batch_size": 97}, ["error: recipe.batch_size = 97 cannot"] * 2, id="both"),
    ],
)
def test_an_error_ends_two_processes_that_say_what_they_met(fails, changes, said, tmp_path):
    """JAX alone would hold them for five minutes, the failed one waiting for the other at its exit."""
    config = tmp_path / "config.py"
    config.write_text(config_source(**changes) + fails)
    found = ended(start_two(config, tmp_path / "two", tmp_path), timeout=100)
    for process, text in enumerate(said):
        assert text in (tmp_path / f"{process}.log").read_text()
    assert found == [1, 1]


def test_two_processes_compare_together(tmp_path):
    config, log = tmp_path / "config.py", tmp_path / "log"
    config.write_text(config_source(**{"recipe.epochs": 2}))
    log.mkdir()
    program = ("-m", "gompertz_jax.cli", "compare", "--arms=student,kd", "--seeds=2")
    codes = ended(start_two(config, tmp_path / "two", log, program=program), timeout=240)
    said = [(log / f"{process}.log").read_text() for process in range(2)]
    assert codes == [0, 0], said
    assert "x 2 in 2 processes" in said[0] and "next      gompertz-jax report" in said[0]
    assert [line for line in said[1].splitlines() if "[Gloo]" not in line] == []
    assert {*json.loads((tmp_path / "two" / "results.json").read_text())["arms"]} == {"student", "kd"}


def test_processes_that_are_not_connected_are_told_how(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)  # what JAX says on a TPU pod at once
    with pytest.raises(RunError, match="sees 4 processes, which are not connected: give --distributed to each"):
        sharding.on_main(lambda: 1)


def test_what_a_cluster_lacks_is_said_in_full(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Pods need a headless service in order to\ncommunicate:\n  clusterIP: None")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(RunError, match=r"not found\. Pods need a headless service in order to\n.*\n  clusterIP: None$"):
        sharding.connect(detect=True)


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_waits_a_bounded_time_for_the_others(process, monkeypatch):
    """The third never says that it leaves."""
    posted, asked = [], []

    class Client:
        def key_value_set(self, key, value):
            posted.append(key)

        def blocking_key_value_get(self, key, milliseconds):
            asked.append(key)
            assert milliseconds <= 1000 * sharding.LEAVE_SECONDS
            if key.endswith("2"):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return "true"

    state = SimpleNamespace(client=Client(), num_processes=3, process_id=process)
    monkeypatch.setattr(sharding.distributed, "global_state", state)
    sharding.first_leaves_last()
    assert posted == ([] if process == 0 else ["gompertz_jax/left/1"])
    assert asked == (["gompertz_jax/left/1", "gompertz_jax/left/2"] if process == 0 else [])


def test_a_frozen_teacher_of_loops_is_stored_on_eight_devices_as_it_speaks_on_one(eight):
    found = arrays(eight / "stored.npz")
    assert found["loops"] == 1 and found["found"].shape == (1338, 10)
    np.testing.assert_allclose(found["found"], found["plain"], rtol=1e-4, atol=1e-5)


def test_what_the_output_cannot_show_ends_no_run(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    sharding.say("┌ 5 ± 1 ┐")
    assert output.buffer.getvalue() == b"? 5 ? 1 ?\n"
