"""What every formula here agrees on: the dtype it is computed in, and which static numbers are legal.

A number that is known before tracing (a Python or NumPy number, a concrete array) is checked and becomes a Python
float, so that no closure captures an array. A traced number (a schedule evaluated inside the step, a parameter that is
differentiated) cannot be checked and is passed on as it is.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

Scalar = int | float | np.generic | np.ndarray | Array

# A legal number is one that float32 holds as a normal number: results are computed in float32 unless the inputs are
# wider, and 1e-300 would reach a division there as 0.
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def compute_dtype(*values: Any) -> Any:
    """The dtype to compute in: that of the values together, and at least float32."""
    return jnp.promote_types(jnp.result_type(*values), jnp.float32)


def raised(*arrays: Any) -> tuple[Array, ...]:
    """The arrays in one common dtype, at least float32."""
    dtype = compute_dtype(*arrays)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def matmul(x: Array, y: Array) -> Array:
    """Matrix product in full precision.

    The default on an accelerator rounds to bfloat16 or TF32, too coarse for a difference of large numbers.
    """
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


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


def is_traced(value: Any) -> bool:
    """Whether the value is known only inside a transformation, so that nothing can be asked of it."""
    return isinstance(value, Tracer)


def finite_number(
    name: str, value: Scalar, *, legal: str = "a finite number", accept: Callable[[float], bool] | None = None
) -> float | Array:
    """Check a scalar argument and return it as a Python float; a traced one is returned as it is.

    Raises:
      ValueError: if `value` is no scalar, or is concrete and not finite or not accepted.
    """
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be {legal}, got an array of shape {jnp.shape(value)}")
    if is_traced(value):
        return value  # pyright: ignore[reportReturnType]
    number = float(value)
    if not abs(number) <= _LARGEST or (accept is not None and not accept(number)):
        raise ValueError(f"{name} must be {legal}, got {number!r}")
    return number


def positive_number(name: str, value: Scalar) -> float | Array:
    """`finite_number`, and positive."""
    return finite_number(
        name, value, legal="a positive number within float32's range", accept=lambda number: number >= _SMALLEST
    )


def fraction(name: str, value: Scalar, low: float, high: float, *, legal: str) -> float | Array:
    """`finite_number`, strictly between `low` and `high`."""
    return finite_number(name, value, legal=legal, accept=lambda number: low < number < high)


def positive_count(name: str, value: Any) -> int:
    """Check an argument that counts something and return it as a Python int.

    Raises:
      ValueError: if `value` is not an integer, or is below 1.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return count
