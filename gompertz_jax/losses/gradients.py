"""Losses between input gradients: how both networks' scores react to the same change of the image."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import positive_count, raised

ScoreFn: TypeAlias = Callable[[Float[Array, "batch height width channels"]], Float[Array, " batch"]]

_KINDS = ("cosine", "l2", "normalized_l2")


def input_gradient(
    score_fn: ScoreFn, images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    r"""Gradient of a score of every image with respect to the images.

    .. math:: g_i = \frac{\partial}{\partial x_i} \sum_j \text{score}_j(x_1, \dots, x_B)

    Where the score of an image depends on that image alone, this is the gradient of its own score. BatchNorm in train
    mode couples the images of a batch, and the sum then has cross terms.

    Args:
      score_fn: images `[B, h, w, c]` -> one score per image `[B]`, for instance the logit of the teacher's top class.
      images: `[B, h, w, c]`; handed to `score_fn` in at least float32.

    Returns:
      The gradient, `[B, h, w, c]`, in units of the score per unit of the images.

    Raises:
      ValueError: if `score_fn` does not return one score per image.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> images = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> print(gj.input_gradient(lambda x: (x**2).sum((1, 2, 3)), images).ravel())
      [0. 2. 4. 6.]

    References:
      Simonyan, Vedaldi and Zisserman, Deep Inside Convolutional Networks, 2014, https://arxiv.org/abs/1312.6034.
    """
    (images,) = raised(images)

    def total_score(images: Array) -> Array:
        (scores,) = raised(score_fn(images))
        if scores.shape != images.shape[:1]:
            raise ValueError(
                f"score_fn must return one score per image, shape {images.shape[:1]}, got shape {scores.shape}"
            )
        return jnp.sum(scores)

    return jax.grad(total_score)(images)


def pool_gradient(
    gradient: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "batch pooled_height pooled_width channels"]:
    """Mean of an input gradient over windows of `size` x `size` pixels that do not overlap.

    Pixel by pixel, the gradients of two independently trained networks hardly agree; averaged over small windows they
    do, so they are pooled before they are compared (our reconstruction; the size is a choice to measure).

    Args:
      gradient: `[B, h, w, c]`.
      size: side of a window in pixels, a positive integer that divides h and w; 1 changes nothing.

    Returns:
      The pooled gradient, `[B, h / size, w / size, c]`, in at least float32.

    Raises:
      ValueError: if `size` is not a positive integer or does not divide both h and w.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gompertz_jax.losses.gradients import pool_gradient
      >>> print(pool_gradient(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0])
      [[ 2.5  4.5]
       [10.5 12.5]]
    """
    size = positive_count("size", size)
    batch, height, width, channels = gradient.shape
    if height % size or width % size:
        raise ValueError(f"size must divide the height and the width of the gradient, got {size} for {height}x{width}")
    (gradient,) = raised(gradient)
    windows = gradient.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.mean(windows, axis=(2, 4))


def gradient_distance(
    student_gradient: Float[Array, "batch *shape"],
    teacher_gradient: Float[Array, "..."],
    *,
    kind: str = "cosine",
) -> Float[Array, " batch"]:
    r"""Distance between two gradients of the same shape, one value per example.

    With :math:`g` the student's and :math:`h` the teacher's gradient of one example, over all its axes:

    .. math::
       \text{cosine} &: 1 - \frac{\langle g, h \rangle}{|g| \, |h|} \\
       \text{l2} &: |g - h|^2 \\
       \text{normalized\_l2} &: \left| \frac{g}{|g|} - \frac{h}{|h|} \right|^2 = 2 \, \text{cosine}

    The teacher receives no gradient. A gradient that is zero has no direction: if either side is zero (below the
    smallest normal number everywhere), the cosine distance is 1, the normalised one 2, and the derivative is exactly 0.
    Both are computed without overflow or underflow at any other magnitude; "l2" is quadratic in the gradients and
    overflows float32 from about 1e19 on (its derivative does not).

    Args:
      student_gradient: `[B, ...]`.
      teacher_gradient: `[B, ...]`, the same shape.
      kind: "cosine" (0 to 2), "l2" (squared units of the gradients) or "normalized_l2" (0 to 4).

    Returns:
      One value per example, `[B]`, in at least float32.

    Raises:
      ValueError: if the shapes differ or `kind` is unknown.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
      >>> teacher = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
      >>> print(gj.gradient_distance(student, teacher).round(4))
      [0.     0.2929 1.    ]

    References:
      Srinivas and Fleuret, Knowledge Transfer with Jacobian Matching, 2018, https://arxiv.org/abs/1803.00443
      (normalised squared error). Zagoruyko and Komodakis, Paying More Attention to Attention, 2017,
      https://arxiv.org/abs/1612.03928 (squared error of input gradients).
    """
    _check_kind(kind)
    if student_gradient.ndim == 0 or student_gradient.shape != teacher_gradient.shape:
        raise ValueError(
            f"student_gradient and teacher_gradient must have the same shape [B, ...], "
            f"got {student_gradient.shape} and {teacher_gradient.shape}"
        )
    student, teacher = raised(student_gradient, jax.lax.stop_gradient(teacher_gradient))
    batch = student.shape[0]
    student, teacher = student.reshape(batch, -1), teacher.reshape(batch, -1)
    if kind == "l2":
        return jnp.sum(jnp.square(student - teacher), axis=-1)
    student_direction, student_is_zero = _direction(student)
    teacher_direction, teacher_is_zero = _direction(teacher)
    # |u - v|^2 / 2 is 1 - cos of unit vectors without the cancellation where they agree, and never negative.
    squared = jnp.sum(jnp.square(student_direction - teacher_direction), axis=-1)
    cosine = jnp.where(student_is_zero | teacher_is_zero, 1.0, 0.5 * squared)
    return cosine if kind == "cosine" else 2.0 * cosine


def _check_kind(kind: str) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")


def _direction(vectors: Float[Array, "batch size"]) -> tuple[Float[Array, "batch size"], Array]:
    """Unit vectors, and which vectors were zero and have none (zeros stand in for their direction)."""
    # A direction does not depend on the scale, so no derivative is lost by holding the scale constant.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, initial=0.0))
    is_zero = largest < jnp.finfo(vectors.dtype).tiny  # False for NaN, which must not pass for zero
    scaled = jnp.where(is_zero[:, None], 0.0, vectors / jnp.where(is_zero, 1.0, largest)[:, None])
    squared_norm = jnp.where(is_zero, 1.0, jnp.sum(jnp.square(scaled), axis=-1))
    return scaled / jnp.sqrt(squared_norm)[:, None], is_zero


def gradient_matching(
    student_score_fn: ScoreFn,
    teacher_score_fn: ScoreFn,
    images: Float[Array, "batch height width channels"],
    *,
    kind: str = "cosine",
) -> Float[Array, " batch"]:
    """Distance between the input gradients of both networks' scores, one value per image.

    `gradient_distance(input_gradient(student), input_gradient(teacher))`. It is ready to sit inside an outer `jax.grad`
    with respect to what `student_score_fn` closes over; the teacher's gradient is a constant there.

    That teacher and student are matched in their backward pass is in the Gompertz-CNN paper's abstract; that it is the
    input gradient, of which score, and compared by the cosine, is our reconstruction.

    Args:
      student_score_fn: images `[B, h, w, c]` -> scores `[B]`.
      teacher_score_fn: the same of the teacher.
      images: the common images of both, `[B, h, w, c]`.
      kind: see `gradient_distance`.

    Returns:
      One value per image, `[B]`.

    Raises:
      ValueError: if a score function does not return one score per image, or `kind` is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, gompertz_jax as gj
      >>> images = jnp.ones((2, 4, 4, 3))
      >>> def loss(weight):
      ...     return gj.gradient_matching(
      ...         lambda x: (weight * x).sum((1, 2, 3)), lambda x: x.sum((1, 2, 3)), images
      ...     ).mean()
      >>> print(loss(jnp.ones((4, 4, 3))).round(4), loss(-jnp.ones((4, 4, 3))).round(4))
      0.0 2.0
      >>> jax.grad(loss)(jnp.ones((4, 4, 3))).shape
      (4, 4, 3)

    References:
      Czarnecki et al., Sobolev Training for Neural Networks, 2017, https://arxiv.org/abs/1706.04859. Yang and Qin,
      Gompertz-CNN, 2025, https://arxiv.org/abs/2510.21649.
    """
    _check_kind(kind)
    teacher_gradient = jax.lax.stop_gradient(input_gradient(teacher_score_fn, images))
    return gradient_distance(input_gradient(student_score_fn, images), teacher_gradient, kind=kind)
