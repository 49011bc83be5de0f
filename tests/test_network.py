"""A network normalises common images by its own statistics, and is a pytree of its arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj


def apply(params, stats, images, *, train, key=None):
    return gj.Outputs(images.mean((1, 2)) @ params, (images,), images.mean((1, 2))), stats


NETWORK = gj.Network(apply, jnp.eye(3), {}, mean=jnp.array([0.1, 0.2, 0.3]), std=jnp.array([0.5, 1.0, 2.0]))


def test_images_are_normalised_by_channel():
    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 3)).astype(np.float32)
    expected = ((images - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0])).mean((1, 2))
    np.testing.assert_allclose(NETWORK.forward(jnp.asarray(images), train=False)[0].logits, expected, rtol=1e-5)


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="divide uint8 images by 255"):
        NETWORK.forward(jnp.zeros((1, 4, 4, 3), jnp.uint8), train=False)


def test_arrays_are_leaves_and_the_function_is_static():
    images = jnp.ones((1, 4, 4, 3))
    jitted = jax.jit(lambda network, images: network.forward(images, train=False)[0].logits)
    doubled = NETWORK.replace(params=2 * NETWORK.params)
    np.testing.assert_allclose(jitted(doubled, images), 2 * jitted(NETWORK, images), rtol=1e-6)
    assert jitted._cache_size() == 1
    assert len(jax.tree.leaves(NETWORK)) == 3


# Offsets: gradients at a stage


def apply_with_stages(params, stats, images, *, train, key=None, offsets=None):
    """Two maps of a network in plain jnp: tanh of a 1x1 convolution, then its square."""
    first, second = (None, None) if offsets is None else offsets
    x = jnp.tanh(images @ params["kernel"])
    x = x if first is None else x + first
    y = x**2
    y = y if second is None else y + second
    return gj.Outputs(y.mean((1, 2)) @ params["head"], (x, y), y.mean((1, 2))), stats


STAGED = gj.Network(
    apply_with_stages, {"kernel": jnp.eye(3), "head": jnp.arange(6.0).reshape(3, 2)}, {}, mean=0.5, std=0.25
)


def test_offsets_are_handed_on_and_give_the_gradient_at_a_map():
    images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3))
    zeros = jnp.zeros_like(images)
    features = STAGED.forward(images, train=False)[0].features

    def score(offsets):
        return STAGED.forward(images, train=False, offsets=offsets)[0].logits[:, 1].sum()

    first, second = jax.grad(score)((zeros, zeros))
    np.testing.assert_allclose(second, jnp.broadcast_to(STAGED.params["head"][:, 1] / 16, zeros.shape), rtol=1e-6)
    np.testing.assert_allclose(first, 2 * features[0] * STAGED.params["head"][:, 1] / 16, rtol=1e-6)
    alone = jax.grad(lambda offset: score((None, offset)))(zeros)
    np.testing.assert_array_equal(alone, second)


def test_what_is_frozen_is_said_to_networks_that_take_it():
    told = []

    def listening(params, stats, images, *, train, key=None, frozen=False):
        told.append(frozen)
        return apply(params, stats, images, train=train)

    def handing_on(params, stats, images, *, train, **keywords):
        return apply(params, stats, images, train=train, **keywords)

    images = jnp.ones((1, 4, 4, 3))
    for network in (NETWORK.replace(apply=listening), NETWORK.replace(apply=handing_on), NETWORK):
        network.forward(images, train=False)
        outputs, _ = network.forward(images, train=False, frozen=True)
        np.testing.assert_array_equal(outputs.logits, NETWORK.forward(images, train=False)[0].logits)
    assert told == [False, True]
    with pytest.raises(ValueError, match="give train=False"):
        NETWORK.forward(images, train=True, frozen=True)


def test_a_network_without_offsets_is_called_as_before():
    calls = []

    def recording(params, stats, images, **keywords):
        calls.append(set(keywords))
        return apply(params, stats, images, train=False)

    network = gj.Network(recording, jnp.eye(3), {}, mean=0.0, std=1.0)
    images = jnp.ones((1, 4, 4, 3))
    network.forward(images, train=True)
    network.forward(images, train=True, offsets=None)
    # `**keywords` counts as taking offsets
    network.forward(images, train=True, offsets=(None,))
    assert calls == [{"train", "key"}, {"train", "key"}, {"train", "key", "offsets"}]


def test_a_malformed_network_is_told():
    images = jnp.ones((1, 4, 4, 3))
    for changes, error, message in (
        ({"mean": "x"}, TypeError, "this network's mean must be numbers, one per channel, got 'x'"),
        ({"std": jnp.ones((3, 1))}, ValueError, r"images have 3 channels and this network's std the shape \(3, 1\)"),
        ({"params": jnp.eye(2)}, ValueError, "this network's apply fails with its params and stats on images float32"),
        ({"apply": lambda *_, **__: 3}, TypeError, r"apply must return \(Outputs, stats\), got 3"),
        ({"apply": lambda *_, **__: (gj.Outputs(images, (), images), {})}, ValueError, r"logits of floats \[B, K\]"),
    ):
        with pytest.raises(error, match=message):
            NETWORK.replace(**changes).forward(images, train=False)


def test_offsets_that_cannot_be_used_are_refused():
    images = jnp.ones((1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"offsets: this network's apply does not take them.*gompertz_jax.Network"):
        NETWORK.forward(images, train=False, offsets=(images,))
    tolerant = gj.Network(lambda *arrays, **_: apply(*arrays, train=False), jnp.eye(3), {}, mean=0.0, std=1.0)
    with pytest.raises(ValueError, match="offsets must have one entry per map, 1, got 2"):
        tolerant.forward(images, train=False, offsets=(None, None))
