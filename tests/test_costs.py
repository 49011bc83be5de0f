"""Costs between classes against centred kernel alignment and cosines in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused_before_tracing
from test_transport import cosine_distances

import gompertz_jax as gj


def test_class_distances_are_centred_kernel_alignment_or_cosines():
    random = np.random.default_rng(12)
    features, vectors = random.standard_normal((4, 7, 3)) + 1.0, random.standard_normal((4, 3))

    def alignment(x, y):
        center = np.eye(7) - 1 / 7
        hsic = lambda k, l: np.trace(k @ center @ l @ center)  # noqa: E731, E741
        k, l = x @ x.T, y @ y.T  # noqa: E741
        return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))

    expected = [[1 - np.exp(-2.0 * (1 - alignment(x, y))) for y in features] for x in features]
    with jax.enable_x64(True):
        found = gj.class_distances(jnp.asarray(features), sharpness=2.0)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        found = gj.class_distances(jnp.asarray(vectors))
        np.testing.assert_allclose(found, 1 - np.exp(-cosine_distances(vectors, vectors)), rtol=1e-10, atol=1e-12)
    for degenerate in (vectors, features):
        degenerate[1] = 1.0 if degenerate.ndim == 3 else 0.0
        for scale in (1e-12, 1e12):
            found = np.asarray(jax.jit(gj.class_distances)(jnp.asarray(scale * degenerate, jnp.bfloat16)))
            np.testing.assert_allclose(found[1], (1 - np.exp(-1)) * (np.arange(4) != 1), rtol=1e-5)
            assert found.dtype == np.float32 and np.isfinite(found).all() and (np.diag(found) == 0).all()
            np.testing.assert_allclose(found, found.T, atol=1e-6)


X = jnp.zeros((2, 4, 3))
ILLEGAL = [
    (lambda: gj.class_distances(X[0, 0]), r"class_vectors must have .*got \(3,\)"),
    (lambda: gj.class_distances(X[:, :0]), r"class_vectors must be .*, not empty, got .*\(2, 0, 3\)"),
    (lambda: gj.class_distances(X, sharpness=0.0), "sharpness must be a positive .*, got 0.0"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    refused_before_tracing(call, message)
