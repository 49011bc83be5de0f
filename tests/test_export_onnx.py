"""ONNX graphs: what is taken out of a network for the converter, and where that is installed, the whole zoo."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import smallest_networks

import gompertz_jax as gj
from gompertz_jax import export_onnx, models
from gompertz_jax.models.layers import max_pool_3x3

INSTALLED = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnx", "onnxruntime"))
STEMS = {
    "resnet18": ["imagenet"],
    "resnet34": ["imagenet"],
    "resnet50": ["imagenet"],
    "mobilenetv2": ["cifar", "imagenet"],
}
ZOO = [(name, stem) for name in models.names() for stem in ["", *STEMS.get(name, [])]]


def lively(network, seed=0):
    """Weights whose layers keep the size of what passes through, and statistics that are not those of a fresh network.

    With those of initialisation, deep networks give logits so small that all of them are alike.
    """
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1:
            return rng.normal(size=leaf.shape) * np.sqrt((2 if leaf.ndim == 4 else 1) / np.prod(leaf.shape[:-1]))
        return rng.uniform(0.5, 1.5, leaf.shape) if "scale" in name else 0.1 * rng.normal(size=leaf.shape)

    params = jax.tree.map(jnp.float32, jax.tree_util.tree_map_with_path(drawn, network.params))
    network = network.replace(params=params)
    images = jnp.asarray(rng.uniform(size=(8, 32, 32, 3)), jnp.float32)
    _, moved = jax.jit(lambda network, images: network.forward(images, train=True))(network, images)
    # What training-mode statistics moved towards, and not quite.
    stats = jax.tree.map(
        lambda new, old: ((new - 0.9 * old) / 0.1 * rng.uniform(0.8, 1.2, old.shape)).astype(np.float32),
        moved,
        network.stats,
    )
    return network.replace(stats=stats), images


def logits_of(network):
    return lambda images: network.forward(images, train=False)[0].logits


def test_a_portable_network_is_the_same_function_without_the_choice_of_a_platform():
    _, name = smallest_networks()
    network, images = lively(models.create(name, num_classes=10, key=jax.random.key(0), mean=[0.5] * 3, std=[0.25] * 3))
    portable = export_onnx.portable(logits_of(network))
    expected = logits_of(network)(images)
    np.testing.assert_allclose(jax.jit(portable)(images), expected, rtol=1e-4, atol=1e-5)
    texts = [str(jax.make_jaxpr(function)(images)) for function in (logits_of(network), portable)]
    assert [("platform_index" in text, "custom_vjp_call" in text) for text in texts] == [(True, True), (False, False)]


def test_a_portable_maximum_over_windows_is_the_same_for_odd_and_even_sizes():
    rng = np.random.default_rng(0)
    for size in (7, 8):
        x = jnp.asarray(rng.normal(size=(2, size, size + 1, 3)) - 5, jnp.float32)
        np.testing.assert_array_equal(export_onnx.portable(max_pool_3x3)(x), max_pool_3x3(x))

    def dilated(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (1,), "VALID", window_dilation=(2,))

    with pytest.raises(NotImplementedError, match="dilated windows"):
        export_onnx.portable(dilated)(jnp.arange(5.0))


@pytest.mark.skipif(not INSTALLED, reason=f"jax2onnx is not installed: {export_onnx.INSTALL}")
@pytest.mark.filterwarnings("ignore")  # of the converter
@pytest.mark.parametrize(("name", "stem"), ZOO)
def test_every_network_gives_its_logits_in_onnxruntime_at_any_batch_size(name, stem, tmp_path):
    options = {"stem": stem} if stem else {}
    network = gj.models.create(name, num_classes=10, key=jax.random.key(0), mean=[0.5] * 3, std=[0.25] * 3, **options)
    network, images = lively(network)
    expected = np.asarray(jax.jit(logits_of(network))(images))
    assert expected.std(0).mean() > 0.03 and np.abs(expected).max() < 100  # something depends on the image
    export_onnx.write_onnx(tmp_path / "it.onnx", logits_of(network), (32, 32, 3))
    read = export_onnx.read_onnx(tmp_path / "it.onnx")
    got = np.concatenate([read(images[:3]), read(images[3:])])
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
