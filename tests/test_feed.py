"""Training images on the device or gathered on the host: the same batches, and at any step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from gompertz_jax.training import augment
from gompertz_jax.training import feed as room
from gompertz_jax.training.data import Split, load
from gompertz_jax.training.feed import Feed, Images, stays_on_host
from gompertz_jax.training.sharding import data_mesh, replicate

SEED, BATCH, STEPS = 5, 48, 4
make_batch = jax.jit(augment.make_batch, static_argnames=("seed", "batch_size", "padding", "flip", "views"))


# What a teacher would say: twice the view, and the image.
OUTPUTS = {"logits": np.stack(np.broadcast_arrays(2.0 * np.arange(3)[:, None], np.arange(1338.0)), -1).astype("f4")}


def feed(placement, *, views=0):
    config = tiny_config(**{"data.placement": placement, "augment.padding": 2, "augment.flip": True})
    mesh = data_mesh()
    data = Images.of(load("digits", validation=100), config.data, mesh)
    return data, Feed(
        data, seed=SEED, batch_size=BATCH, augment=config.augment, steps_per_dispatch=STEPS, mesh=mesh, views=views,
        outputs=replicate(OUTPUTS, mesh) if views else None,
    )  # fmt: skip


@pytest.mark.parametrize("views", [0, 3])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_batches_are_those_of_seed_and_step_wherever_the_images_live(placement, views):
    """Over the end of the first epoch, and after a jump to another step, as after a resume."""
    train = jax.tree.map(jnp.asarray, load("digits", validation=100).train)
    data, source = feed(placement, views=views)
    assert isinstance(data.images, jax.Array) == (placement == "device")
    with source:
        inside = jax.jit(source.make_batch)
        for first in (0, 4, 24, 28, 8):
            arrays = source(first)
            for step in range(first, first + STEPS):
                expected = make_batch(
                    train.images, train.labels, step, seed=SEED, batch_size=BATCH, padding=2, flip=True, views=views,
                     outputs=jax.tree.map(jnp.asarray, OUTPUTS) if views else None,
                )  # fmt: skip
                assert ("teacher_logits" in expected) == bool(views)
                got = inside(arrays, jnp.int32(step))
                jax.tree.map(np.testing.assert_array_equal, dict(got), expected)


def test_the_next_dispatch_is_gathered_while_this_one_runs():
    _, source = feed("host")
    with source:
        source(0)
        ahead = source._gathered[STEPS]
        arrays = ahead.result(timeout=30)
        assert source(STEPS).images is arrays[0]


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


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_a_function_of_images_in_parts_is_that_of_all_of_them(monkeypatch, count):
    monkeypatch.setattr(room, "PART", 7)
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2, 1)
    labels = np.arange(count, dtype=np.int32)[::-1].copy()
    seen = []

    def function(images, labels):
        seen.append(len(labels))
        return jnp.stack([images.sum((1, 2, 3), dtype=jnp.int32), 10 * labels])

    found = room.in_parts(function, Split(images, labels), data_mesh())
    np.testing.assert_array_equal(found, [images.sum((1, 2, 3)), 10 * labels])
    assert max(seen) <= 7


@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_held_out_images_are_on_the_device_wherever_the_others_are(placement):
    data, dataset = feed(placement)[0], load("digits", validation=100)
    assert isinstance(data.validation.images, jax.Array)
    np.testing.assert_array_equal(data.validation.images, dataset.validation.images)
    np.testing.assert_array_equal(data.validation.labels, dataset.validation.labels)


def test_of_gathered_images_only_two_dispatches_are_kept():
    _, source = feed("host")
    with source:
        for first in range(0, 5 * STEPS, STEPS):
            source(first)
            assert set(source._gathered) == {first, first + STEPS}
