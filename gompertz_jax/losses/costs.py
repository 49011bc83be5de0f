"""Transport costs between the points of two clouds, and between classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import Scalar, checked, positive_number
from .._numerics import matmul, unit_vectors, upcast

Cost = str | Callable[[Array, Array], Array]


@checked
def class_distances(class_vectors: Float[Array, "..."], *, sharpness: Scalar = 1.0) -> Float[Array, "classes classes"]:
    r"""How far apart classes are for a teacher: the cost for `wasserstein_logits`.

    .. math:: C_{kl} = 1 - e^{-\kappa (1 - \mathrm{IR}_{kl})}, \qquad C_{kk} = 0

    where the interrelation :math:`\mathrm{IR}` of two classes is, as published, the linear centred kernel alignment
    (CKA) of what the teacher returns for `b` training images of either, or the cosine of the classes' vectors. CKA
    pairs the images of two classes in the order they come in; in the reference code these are the teacher's logits for
    the training images, in the order of the data set, with :math:`\kappa = 1`. Its alternative is the cosine of the
    rows of the teacher's last layer.

    Args:
      class_vectors: the teacher's, `[K, b, d]` for CKA (logits or features of the same number of images for every
        class), or `[K, d]` for the cosine (rows of the last layer's weights, class means). A class whose vectors are
        zero (for CKA: do not vary) is unrelated to every other, :math:`\mathrm{IR} = 0`.
      sharpness: :math:`\kappa`, positive.

    Returns:
      Costs from 0 up to 1, symmetric, zero on the diagonal, `[K, K]`, in at least float32.

    Raises:
      ValueError: if `class_vectors` has neither shape or an empty axis, or `sharpness` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.class_distances(jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])).round(2))
      [[0.   0.25 0.63]
       [0.25 0.   0.25]
       [0.63 0.25 0.  ]]

    References:
      Lv, Yang and Li, 2024, https://arxiv.org/abs/2412.08139; `tools/generate_cost_matrix.py` and
      `mdistiller/distillers/WKD.py` of its code. CKA: Kornblith et al., Similarity of Neural Network Representations
      Revisited, 2019, https://arxiv.org/abs/1905.00414.
    """
    if class_vectors.ndim not in (2, 3) or 0 in class_vectors.shape:
        raise ValueError(f"class_vectors must have the shape [K, d] or [K, b, d], got {class_vectors.shape}")
    sharpness = positive_number("sharpness", sharpness)
    (vectors,) = upcast(class_vectors)
    if vectors.ndim == 3:
        # Linear CKA is the cosine between the Gram matrices of the centred vectors.
        vectors = vectors - jnp.mean(vectors, axis=1, keepdims=True)
        vectors = vectors / jnp.maximum(
            jnp.max(jnp.abs(vectors), axis=(1, 2), keepdims=True), jnp.finfo(vectors.dtype).tiny
        )
        vectors = matmul(vectors, jnp.swapaxes(vectors, 1, 2)).reshape(len(vectors), -1)
    return jnp.where(
        jnp.eye(len(vectors), dtype=bool), 0.0, -jnp.expm1(-sharpness * _cosine_distances(vectors, vectors))
    )


def pairwise_costs(cost: Cost, x: Array, y: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Costs `[B, n, m]`, and the function that turns a plan into the gradient of its cost with respect to x."""
    if cost == "squared_euclidean":

        def gradient(plan: Array) -> Array:
            return 2.0 * (jnp.sum(plan, axis=-1, keepdims=True) * x - matmul(plan, y))

        return _squared_distances(x, y), gradient
    function = _cosine_distances if cost == "cosine" else jax.vmap(cost)  # pyright: ignore[reportArgumentType]
    costs, pull_back = jax.vjp(lambda x: function(x, y).astype(x.dtype), x)
    return costs, lambda plan: pull_back(plan)[0]


def _squared_distances(x: Array, y: Array) -> Array:
    squared_norms = jnp.sum(jnp.square(x), axis=-1)[..., :, None] + jnp.sum(jnp.square(y), axis=-1)[..., None, :]
    return jnp.maximum(squared_norms - 2.0 * matmul(x, jnp.swapaxes(y, -1, -2)), 0.0)


def _cosine_distances(x: Array, y: Array) -> Array:
    return jnp.maximum(1.0 - matmul(unit_vectors(x), jnp.swapaxes(unit_vectors(y), -1, -2)), 0.0)


def check_cost(cost: Cost, x: Array, y: Array) -> None:
    """Refuse anything that is not a cost of clouds `x` and `y`, `[..., n, d]` and `[..., m, d]`."""
    if isinstance(cost, str):
        if cost not in ("squared_euclidean", "cosine"):
            raise ValueError(f"cost must be 'squared_euclidean', 'cosine' or a function, got {cost!r}")
        return
    clouds = (jax.ShapeDtypeStruct(cloud.shape[-2:], cloud.dtype) for cloud in (x, y))
    shape, expected = getattr(jax.eval_shape(cost, *clouds), "shape", None), (x.shape[-2], y.shape[-2])
    if shape != expected:
        raise ValueError(f"cost must return one array of the shape [n, m], here {expected}, got {shape}")
