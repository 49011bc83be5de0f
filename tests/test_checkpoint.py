"""Checkpoints: what is saved comes back to the bit, and nothing saved is overwritten."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gompertz_jax as gj
from gompertz_jax.training.checkpoint import Checkpoints, load_arrays, save_arrays
from gompertz_jax.training.errors import RunError


def state(value):
    params = {"w": jnp.full((3, 2), value), "b": {}}
    opt_state = optax.sgd(0.1, momentum=0.9).init(params)
    return gj.TrainState(jnp.int32(value), params, {}, {}, {}, opt_state, None, jnp.int32(-1), jnp.int32(-1))


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
    with pytest.raises(RunError, match="cannot be read"):
        load_arrays(tmp_path / "network", {"params": {"v": jnp.zeros(5)}})
