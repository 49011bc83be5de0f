"""What every formula here agrees on: the dtype it is computed in, and the few operations that need care."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def compute_dtype(*values: Any) -> Any:
    """The dtype to compute in: that of the values together, and at least float32."""
    # A code base around this one may have promotion set to "strict".
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.result_type(*values), jnp.float32)


def upcast(*arrays: Any) -> tuple[Array, ...]:
    """The arrays in one common dtype, at least float32."""
    dtype = compute_dtype(*arrays)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def matmul(x: Array, y: Array) -> Array:
    """Matrix product in full precision.

    The default on an accelerator rounds to bfloat16 or TF32, too coarse for a difference of large numbers.
    """
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def safe_sqrt(x: Array) -> Array:
    """Square root of numbers that are not negative; its derivative at 0 is exactly 0."""
    # The derivative of the square root is infinite at 0, and 0 * infinity is NaN also in a branch not taken.
    is_zero = x <= 0.0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))


def unit_vectors(vectors: Array) -> Array:
    """Vectors at unit norm without overflow or underflow; zero stays zero, with a derivative of exactly 0."""
    # A direction does not depend on the scale, so no derivative is lost by holding the scale constant.
    largest = largest_magnitude(vectors, axis=-1)
    is_zero = largest == 0.0
    scaled = jnp.where(is_zero, 0.0, vectors / jnp.where(is_zero, 1.0, largest))
    squared_norm = jnp.where(is_zero, 1.0, jnp.sum(jnp.square(scaled), axis=-1, keepdims=True))
    return scaled / jnp.sqrt(squared_norm)


def cosine_distance(x: Array, y: Array) -> Array:
    """One minus the cosine over the last axis; 1, with a derivative of 0, where either side is zero."""
    x, y = unit_vectors(x), unit_vectors(y)
    have_directions = jnp.any(x != 0.0, axis=-1) & jnp.any(y != 0.0, axis=-1)
    # |u - v|^2 / 2 is 1 - cos of unit vectors without the cancellation where they agree, and never negative.
    return jnp.where(have_directions, 0.5 * jnp.sum(jnp.square(x - y), axis=-1), 1.0)


def largest_magnitude(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Largest magnitude as a constant, with 0 for what is below the smallest normal number everywhere."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    return jnp.where(largest < jnp.finfo(x.dtype).tiny, 0.0, largest)  # NaN is kept and does not pass for zero
