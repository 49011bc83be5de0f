"""Checkpoints: what is saved comes back to the bit, and nothing saved is overwritten."""

import re
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gompertz_jax as gj
from gompertz_jax.training.checkpoint import Checkpoints, load_arrays, save_arrays, saved_steps
from gompertz_jax.training.errors import RunError


def state(value):
    params = {"w": jnp.full((3, 2), value), "b": {}}
    opt_state = optax.sgd(0.1, momentum=0.9).init(params)
    return gj.TrainState(jnp.int32(value), params, {}, {}, {}, {}, opt_state, None, jnp.int32(-1), jnp.int32(-1))


def test_the_newest_state_comes_back_to_the_bit(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step / 3), {"timing": {"seconds": step}})
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == ["2", "3"]
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        restored, record = checkpoints.restore(state(0.0))
    assert record == {"timing": {"seconds": 3}}
    assert jax.tree.structure(restored) == jax.tree.structure(state(0.0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(1.0))


def test_a_step_that_is_saved_is_not_overwritten(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, state(1.0), {})
        checkpoints.save(1, state(2.0), {})
        assert checkpoints.restore(state(0.0))[0].params["w"][0, 0] == 1.0


def test_a_save_goes_on_while_the_state_is_given_away_and_counts_once_it_is_on_disk(tmp_path):
    give_away = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        given = {"w": jnp.arange(1e6)}
        checkpoints.save(1, given, {})
        jax.block_until_ready(give_away(given))
        assert checkpoints.latest_step is None
        checkpoints.wait()
        assert checkpoints.latest_step == 1
        np.testing.assert_array_equal(checkpoints.restore({"w": jnp.zeros(1_000_000)})[0]["w"], np.arange(1e6))


@pytest.fixture
def no_room():
    """Files of more than 100 kB cannot be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_is_told_and_the_one_before_it_stays_the_newest(tmp_path, no_room):
    told = pytest.raises(RunError, match=r"c/2 cannot be written .*; make room and start again")
    with told, Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, state(1.0), {})
        checkpoints.save(2, {"w": jax.random.bits(jax.random.key(0), (1_000_000,))}, {})
        assert checkpoints.latest_step == 1
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step == 1
        assert checkpoints.restore(state(0.0))[0].params["w"][0, 0] == 1.0
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_a_save_that_fails_does_not_hide_what_the_run_ends_with(tmp_path, no_room, capsys):
    with pytest.raises(RunError, match="not finite"), Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, {"w": jax.random.bits(jax.random.key(0), (1_000_000,))}, {})
        raise RunError("the gradient was not finite")
    assert re.search(r"besides: .*c/1 cannot be written .*; make room and start again", capsys.readouterr().out)


def saved(directory, *steps):
    """A directory of checkpoints whose weights are their step."""
    with Checkpoints(directory, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step})
    return directory


def restored(directory, **options):
    with Checkpoints(directory, keep=2, **options) as checkpoints:
        tree, record = checkpoints.restore(state(0.0))
    assert record == {"step": int(tree.step)}
    return int(tree.step)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    directory = path.parents[[parent.name for parent in path.parents].index("2")]
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), empty], ids=["cut", "flip", "gone", "empty"])
def test_whatever_file_is_damaged_the_state_before_it_is_taken_and_the_damaged_one_is_kept(tmp_path, capsys, damage):
    """Every file of a checkpoint in turn, empty ones apart from cutting and flipping; ours are among them."""
    whole = saved(tmp_path / "whole", 1, 2)
    tried = 0
    for number, path in enumerate(files(whole / "2")):
        if damage in (cut, flip) and path.stat().st_size == 0:
            continue
        copy = tmp_path / str(number) / "c"
        shutil.copytree(whole, copy)
        shutil.copy(whole.with_suffix(".json"), copy.with_suffix(".json"))
        damage(copy / path.relative_to(whole))
        left = {file.relative_to(copy / "2"): file.read_bytes() for file in files(copy / "2")}
        assert restored(copy) == 1
        told = capsys.readouterr().out
        assert f"the checkpoint {copy / '2'} is left out (" in told
        assert f"kept as {copy / 'set_aside' / '2'}" in told
        aside = copy / "set_aside" / "2"
        assert {file.relative_to(aside): file.read_bytes() for file in files(aside)} == left
        tried += 1
    assert tried >= 8


def test_without_an_intact_state_the_workdir_is_named_and_nothing_is_touched(tmp_path):
    directory = saved(tmp_path / "c", 1, 2)
    for step in ("1", "2"):
        flip(next(path for path in files(directory / step) if path.parent.name == "d"))
    before = [(path, path.read_bytes()) for path in files(tmp_path)]
    with pytest.raises(RunError, match=f"no checkpoint of the workdir {tmp_path} is intact .*altered or cut off"):
        restored(directory)
    assert [(path, path.read_bytes()) for path in files(tmp_path)] == before
    for step in ("1", "2"):
        shutil.rmtree(directory / step)
    with pytest.raises(RunError, match=r"is intact \(they are gone\)"):
        restored(directory)


def test_a_save_that_was_cut_off_before_it_was_sealed_never_counted(tmp_path, capsys):
    """A kill between Orbax's rename and the list of sums: also of the first save, which is no loss."""
    directory = saved(tmp_path / "c", 1)
    (directory / "1" / "SHA256SUMS").unlink()
    directory.with_suffix(".json").unlink()
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(1, state(1.0), {"step": 1})
    assert "it was never finished" in capsys.readouterr().out
    assert restored(directory) == 1
    # The same files once the state had counted: that is damage.
    (directory / "1" / "SHA256SUMS").unlink()
    with pytest.raises(RunError, match="it has no SHA256SUMS"):
        restored(directory)


def test_a_ledger_that_was_cut_in_half_is_no_reason_to_stop(tmp_path):
    directory = saved(tmp_path / "c", 1, 2)
    cut(directory.with_suffix(".json"))
    assert restored(directory) == 2


def test_of_intact_states_the_newest_that_agrees_with_the_rest_is_taken(tmp_path):
    directory = saved(tmp_path / "c", 1, 2)
    assert restored(directory, agrees=lambda step, record: False) == 2
    assert restored(directory, agrees=lambda step, record: record["step"] < 2) == 1
    assert (directory / "set_aside" / "2").is_dir()


def test_the_sums_are_those_of_sha256sum(tmp_path):
    directory = saved(tmp_path / "c", 1)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=directory / "1").returncode == 0
    flip(directory / "1" / "record.json")
    assert subprocess.run(check, cwd=directory / "1", capture_output=True).returncode == 1


def test_a_directory_that_is_gone_is_told(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        (tmp_path / "c").rmdir()
        (tmp_path / "c").touch()
        with pytest.raises(RunError, match="c/1 cannot be written"):
            checkpoints.save(1, state(1.0), {})
        assert checkpoints.latest_step is None


def test_a_checkpoint_of_another_shape_or_none_at_all_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        with pytest.raises(RunError, match="holds no checkpoint"):
            checkpoints.restore(state(0.0))
        checkpoints.save(1, state(1.0), {})
        with pytest.raises(RunError, match="cannot be read"):
            checkpoints.restore({"other": jnp.zeros(3)})


def test_arrays_are_saved_once_and_read_back(tmp_path):
    tree = {"params": {"w": jnp.linspace(0, 1, 5)}, "stats": {}}
    save_arrays(tmp_path / "network", tree)
    save_arrays(tmp_path / "network", {"params": {"w": jnp.zeros(5)}, "stats": {}})
    jax.tree.map(np.testing.assert_array_equal, load_arrays(tmp_path / "network", tree), tree)
    with pytest.raises(RunError, match="does not exist"):
        load_arrays(tmp_path / "nothing", tree)
    flip(next(path for path in files(tmp_path / "network") if path.parent.name == "d"))
    with pytest.raises(
        RunError, match=r"network is damaged or no checkpoint: .* was altered or cut off; restore it from a copy"
    ):
        load_arrays(tmp_path / "network", tree)
    (tmp_path / "network" / "SHA256SUMS").unlink()
    save_arrays(tmp_path / "network", tree)  # as after a kill before the sums were written
    with pytest.raises(RunError, match="cannot be read"):
        load_arrays(tmp_path / "network", {"params": {"v": jnp.zeros(5)}})


def test_steps_are_numbers(tmp_path):
    """As text, 9 would come after 10 and 11."""
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (8, 9, 10, 11):
            checkpoints.save(step, state(step), {"step": step})
    assert saved_steps(tmp_path / "c") == [10, 11]
    assert restored(tmp_path / "c") == 11


def test_what_orbax_had_not_finished_is_removed_and_what_is_not_sealed_is_not_listed(tmp_path):
    directory = saved(tmp_path / "c", 1, 2)
    (directory / "3.orbax-checkpoint-tmp-1").mkdir()
    (directory / "2" / "SHA256SUMS").unlink()
    assert saved_steps(directory) == [1]
    assert restored(directory) == 1
    assert not (directory / "3.orbax-checkpoint-tmp-1").exists()


def test_where_it_is_not_known_what_was_saved_nothing_starts_from_scratch(tmp_path):
    directory = saved(tmp_path / "c", 1)
    (directory / "1" / "SHA256SUMS").unlink()
    cut(directory.with_suffix(".json"))
    with pytest.raises(RunError, match=r"no checkpoint of the workdir .* is intact .*it has no SHA256SUMS"):
        restored(directory)
    assert (directory / "1").is_dir()
