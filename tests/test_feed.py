"""Training images on the device or gathered on the host: the same batches, and at any step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from gompertz_jax.training.augment import make_batch
from gompertz_jax.training.data import load
from gompertz_jax.training.feed import Feed, Images, stays_on_host
from gompertz_jax.training.sharding import data_mesh

SEED, BATCH, STEPS = 5, 48, 4


def feed(placement):
    config = tiny_config(**{"data.placement": placement, "augment.padding": 2, "augment.flip": True})
    mesh = data_mesh()
    data = Images.of(load("digits", validation=100), config.data, mesh)
    return data, Feed(data, seed=SEED, batch_size=BATCH, augment=config.augment, steps_per_dispatch=STEPS, mesh=mesh)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_batches_are_those_of_seed_and_step_wherever_the_images_live(placement):
    """Over the end of the first epoch, and after a jump to another step, as after a resume."""
    train = load("digits", validation=100).train
    data, source = feed(placement)
    assert isinstance(data.images, jax.Array) == (placement == "device")
    with source:
        inside = jax.jit(source.make_batch)
        for first in (0, 4, 24, 28, 8):
            arrays = source(first)
            for step in range(first, first + STEPS):
                expected = make_batch(
                    jnp.asarray(train.images), jnp.asarray(train.labels), step, seed=SEED, batch_size=BATCH, padding=2,
                    flip=True,
                )  # fmt: skip
                got = inside(arrays, jnp.int32(step))
                jax.tree.map(np.testing.assert_array_equal, dict(got), expected)


def test_the_next_dispatch_is_gathered_while_this_one_runs():
    _, source = feed("host")
    with source:
        source(0)
        ahead = source._gathered[STEPS]
        arrays = ahead.result(timeout=30)
        assert source(STEPS)[0] is arrays[0]


@pytest.mark.parametrize(
    ("placement", "stats", "host"),
    [
        ("auto", None, False),  # a CPU: its memory is the host's
        ("auto", {"bytes_in_use": 1}, False),
        ("auto", {"bytes_limit": 4000}, False),
        ("auto", {"bytes_limit": 3999}, True),
        ("device", {"bytes_limit": 1}, False),
        ("host", None, True),
    ],
)
def test_a_set_beyond_the_fraction_of_device_memory_stays_on_the_host(placement, stats, host):
    config = tiny_config(**{"data.placement": placement, "data.device_fraction": 0.25})
    assert stays_on_host(1000, config.data, stats) == host


def test_a_failure_while_gathering_reaches_the_loop():
    data, source = feed("host")
    broken = Feed(
        data._replace(images=data.images[:10]), seed=SEED, batch_size=BATCH, augment=tiny_config().augment,
        steps_per_dispatch=STEPS, mesh=data_mesh(),
    )  # fmt: skip
    with source, broken, pytest.raises(IndexError):
        broken(0)
