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
