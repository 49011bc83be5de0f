"""Losses between feature maps: attention, hints, neuron selectivity, variational information, hierarchical context.

No value depends on the other images of the batch. A loss that joins maps of different channels or sizes says how; the
others read what a projection (`gompertz_jax.projections`) has made comparable.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import Scalar, checked, finite_number, positive_count
from .._numerics import largest_magnitude, matmul, unit_vectors, upcast


@checked
def pool_map(
    feature_map: Float[Array, "batch height width channels"], size: int | Sequence[int]
) -> Float[Array, "batch pooled_height pooled_width channels"]:
    r"""Mean of a feature map over a given number of windows.

    .. math:: \text{window } i \text{ of } n \text{ over } h \text{ rows}: \quad
       \lfloor i h / n \rfloor \le \text{row} < \lceil (i + 1) h / n \rceil

    This is PyTorch's adaptive average pooling: where n does not divide h, neighbouring windows share rows or differ in
    size. Computed as two products with constant matrices, so that its derivatives are products of the same kind.

    Args:
      feature_map: `[B, h, w, c]`.
      size: n rows and n columns of the result, or (rows, columns); at most h and w.

    Returns:
      The pooled map, `[B, rows, columns, c]`, in at least float32.

    Raises:
      ValueError: if `size` is not one or two positive integers, or is larger than the map.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.pool_map(jnp.arange(3.0).reshape(1, 1, 3, 1), (1, 2)).ravel())
      [0.5 1.5]
    """
    rows, columns = _rows_and_columns(size)
    _, height, width, _ = feature_map.shape
    if rows > height or columns > width:
        raise ValueError(f"size must be at most that of the map, {height}x{width}, got {size!r}")
    return resample(feature_map, _windows(height, rows), _windows(width, columns))


@checked
def attention_map(
    feature_map: Float[Array, "batch height width channels"], *, power: Scalar = 2.0
) -> Float[Array, "batch height width"]:
    r"""Where a map is active: the mean over its channels of a power of the activation, at unit norm.

    .. math:: \frac{q}{\|q\|_2}, \qquad q_{yx} = \frac{1}{C} \sum_c |a_{yxc}|^p

    Computed without overflow or underflow at any magnitude of the map. A map of zeros has no direction: it stays zero,
    with a derivative of exactly 0.

    Args:
      feature_map: activations a, `[B, h, w, c]`.
      power: p, at least 1; a larger one weighs the largest activations more.

    Returns:
      One map of norm 1 per image, `[B, h, w]`, in at least float32.

    Raises:
      ValueError: if `power` is below 1.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.attention_map(jnp.array([[3.0, 3.0], [3.0, -3.0]]).reshape(1, 2, 2, 1))[0])
      [[0.5 0.5]
       [0.5 0.5]]

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, https://arxiv.org/abs/1612.03928.
    """
    power = finite_number("power", power, legal="a number of at least 1", accept=lambda number: number >= 1.0)
    (activations,) = upcast(feature_map)
    batch, height, width, _ = activations.shape
    # The result does not depend on the scale, so no derivative is lost by holding it constant.
    largest = largest_magnitude(activations, axis=(1, 2, 3))
    scaled = activations / jnp.where(largest > 0, largest, 1.0)
    powers = jnp.square(scaled) if isinstance(power, float) and power == 2.0 else jnp.abs(scaled) ** power
    return unit_vectors(jnp.mean(powers, axis=-1).reshape(batch, -1)).reshape(batch, height, width)


@checked
def attention_transfer(
    student_map: Float[Array, "batch height width channels"], teacher_map: Float[Array, "..."], *, power: Scalar = 2.0
) -> Float[Array, " batch"]:
    r"""Mean squared difference between both networks' attention maps.

    .. math:: \frac{1}{h w} \left\| \frac{q_s}{\|q_s\|_2} - \frac{q_t}{\|q_t\|_2} \right\|_2^2

    q as in `attention_map`. Channels may differ. Where height or width differ, the larger map is averaged to the
    smaller size (`pool_map`) before its attention is taken. The teacher receives no gradient.

    Args:
      student_map: `[B, h, w, c]`.
      teacher_map: `[B, h', w', c']`.
      power: see `attention_map`.

    Returns:
      One value per image, `[B]`, from 0 to 2 / (h w).

    Raises:
      ValueError: if the maps are not of the same number of images, or `power` is below 1.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
      >>> teacher = jnp.array([[0.0, 0.0], [3.0, 3.0]]).reshape(1, 1, 2, 2)
      >>> print(gj.attention_transfer(student, teacher))
      [1.]

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, https://arxiv.org/abs/1612.03928. Published
      weight: 1000, on the sum over all stages after the stem (the paper's beta; RepDistiller's script and mdistiller's
      defaults too). The paper has beta / 2 times the norms, without a square; its code takes the mean of the squares,
      as here. The paper writes the absolute value, its code the bare power: they differ for odd powers of maps
      that can be negative.
    """
    student, teacher = to_one_size(student_map, jax.lax.stop_gradient(teacher_map))
    difference = attention_map(student, power=power) - attention_map(teacher, power=power)
    return jnp.mean(jnp.square(difference), axis=(1, 2))


@checked
def hint_distance(
    student_map: Float[Array, "batch height width channels"], teacher_map: Float[Array, "..."]
) -> Float[Array, " batch"]:
    r"""Mean squared error between two maps of the same shape.

    .. math:: \frac{1}{h w C} \sum_{yxc} (a_{yxc} - b_{yxc})^2

    A projection brings the student's map to the shape of the teacher's (`Regressor`). The teacher receives no gradient.

    Args:
      student_map: a, the student's map after the regressor, `[B, h, w, c]`.
      teacher_map: b, the teacher's, `[B, h, w, c]`.

    Returns:
      One value per image, `[B]`, in squared units of the maps.

    Raises:
      ValueError: if the shapes differ.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.hint_distance(jnp.zeros((2, 4, 4, 3)), jnp.full((2, 4, 4, 3), 2.0)))
      [4. 4.]

    References:
      Romero et al., FitNets: Hints for Thin Deep Nets, 2015, https://arxiv.org/abs/1412.6550. Published weight: 100, at
      stage 2 of both networks, trained together with the other terms (RepDistiller's script, mdistiller's defaults).
      The paper itself trains on the hint alone first, on half the summed squared error.
    """
    _check_same_shape(student_map, teacher_map)
    student, teacher = upcast(student_map, jax.lax.stop_gradient(teacher_map))
    return jnp.mean(jnp.square(student - teacher), axis=(1, 2, 3))


@checked
def neuron_selectivity(
    student_map: Float[Array, "batch height width channels"], teacher_map: Float[Array, "..."]
) -> Float[Array, " batch"]:
    r"""Distance between the distributions of both networks' channels, each channel seen as a point in space.

    .. math:: \frac{1}{C_s^2} \sum_{ij} (a_i^\top a_j)^2 + \frac{1}{C_t^2} \sum_{ij} (b_i^\top b_j)^2
       - \frac{2}{C_s C_t} \sum_{ij} (a_i^\top b_j)^2
       = \left\| \frac{A^\top A}{C_s} - \frac{B^\top B}{C_t} \right\|_F^2

    The squared maximum mean discrepancy under the kernel :math:`(a^\top b)^2`, within an image. Row i of
    :math:`A \in \mathbb{R}^{C \times h w}` is the student's channel i over all positions at unit norm, B the teacher's.
    Channels may differ. Where height or width differ, the larger map is averaged to the smaller size (`pool_map`). The
    teacher receives no gradient. A channel of zeros has no direction: it stays zero, with a derivative of exactly 0.

    Args:
      student_map: `[B, h, w, c]`.
      teacher_map: `[B, h', w', c']`.

    Returns:
      One value per image, `[B]`, from 0 to 2, up to rounding.

    Raises:
      ValueError: if the maps are not of the same number of images.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
      >>> teacher = jnp.array([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
      >>> print(gj.neuron_selectivity(student, teacher), gj.neuron_selectivity(teacher, teacher))
      [0.5] [0.]

    References:
      Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017,
      https://arxiv.org/abs/1707.01219. Published weight: 50, on the sum over all stages after the stem (RepDistiller's
      script, mdistiller's defaults).
    """
    student, teacher = (
        unit_vectors(jnp.swapaxes(a.reshape(a.shape[0], -1, a.shape[-1]), 1, 2))
        for a in to_one_size(student_map, jax.lax.stop_gradient(teacher_map))
    )
    (_, ours, positions), theirs = student.shape, teacher.shape[1]
    # mean_ij (a_i . b_j)^2 = <A'A / C_s, B'B / C_t>: second moments of positions, or the Gram matrices of channels as
    # the formula has them, whichever takes fewer multiplications. 2048 channels of 4x4 are 16x16 and not 2048x2048.
    if positions * (ours + theirs) <= ours**2 + ours * theirs + theirs**2:
        moments = [matmul(jnp.swapaxes(a, 1, 2), a) / a.shape[1] for a in (student, teacher)]
        return jnp.sum(jnp.square(moments[0] - moments[1]), axis=(1, 2))

    def kernel(a: Array, b: Array) -> Array:
        return jnp.mean(jnp.square(matmul(a, jnp.swapaxes(b, 1, 2))), axis=(1, 2))

    return kernel(student, student) + kernel(teacher, teacher) - 2.0 * kernel(student, teacher)


@checked
def variational_information(
    student_mean: Float[Array, "batch height width channels"],
    student_variance: Float[Array, "..."],
    teacher_map: Float[Array, "..."],
) -> Float[Array, " batch"]:
    r"""Negative log-likelihood of the teacher's map under a Gaussian that the student predicts.

    .. math:: \frac{1}{h w C} \sum_{yxc} \frac{1}{2} \left( \frac{(\mu_{yxc} - b_{yxc})^2}{\sigma_c^2}
       + \ln \sigma_c^2 \right)

    The constant :math:`\ln(2 \pi) / 2` is left out. With its sign reversed, this is a lower bound of the mutual
    information. Mean and variance come from a projection (`VariationalRegressor`), which also averages the larger map
    to the smaller size. The teacher receives no gradient.

    Args:
      student_mean: the predicted mean, `[B, h, w, c]`.
      student_variance: the variance of every channel, `[c]`, positive.
      teacher_map: b, the teacher's map, `[B, h, w, c]`.

    Returns:
      One value per image, `[B]`, in nats per element of the map; may be negative.

    Raises:
      ValueError: if `teacher_map` does not have the shape of `student_mean`, or `student_variance` is not one per
        channel.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> mean, variance = jnp.zeros((1, 2, 2, 3)), jnp.full(3, 4.0)
      >>> print(gj.variational_information(mean, variance, jnp.full((1, 2, 2, 3), 2.0)).round(4))
      [1.1931]

    References:
      Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019, https://arxiv.org/abs/1904.05835.
      Published weight: 1, on the sum over all stages after the stem (RepDistiller's script, mdistiller's defaults).
    """
    _check_same_shape(student_mean, teacher_map, name="student_mean")
    if student_variance.shape != student_mean.shape[-1:]:
        raise ValueError(
            f"student_variance must have one value per channel, shape {student_mean.shape[-1:]}, "
            f"got {student_variance.shape}"
        )
    mean, variance, teacher = upcast(student_mean, student_variance, jax.lax.stop_gradient(teacher_map))
    variance = variance.reshape(1, 1, 1, -1)
    return 0.5 * jnp.mean(jnp.square(mean - teacher) / variance + jnp.log(variance), axis=(1, 2, 3))


@checked
def hierarchical_context(
    student_map: Float[Array, "batch height width channels"],
    teacher_map: Float[Array, "..."],
    *,
    levels: Sequence[int] = (4, 2, 1),
) -> Float[Array, " batch"]:
    r"""Mean squared error between two maps at several resolutions, with halving weights.

    .. math:: \frac{\sum_{k=0}^{K} 2^{-k} \, \mathrm{mse}(a^{(k)}, b^{(k)})}{\sum_{k=0}^{K} 2^{-k}}

    :math:`a^{(0)}` is the student's map as it is, :math:`a^{(k)}` the map averaged to the k-th level's size
    (`pool_map`), b the teacher's. Levels that are not smaller than the map are left out. A projection brings the
    student's map to the shape of the teacher's (`Review`). The teacher receives no gradient.

    Args:
      student_map: the student's map after the projection, `[B, h, w, c]`.
      teacher_map: the teacher's, `[B, h, w, c]`.
      levels: sides of the pooled maps, from the finest to the coarsest.

    Returns:
      One value per image, `[B]`, in squared units of the maps.

    Raises:
      ValueError: if the shapes differ, or a level is not a positive integer.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([1.0, -1.0, 1.0, -1.0]).reshape(1, 2, 2, 1)
      >>> print(gj.hierarchical_context(student, jnp.zeros((1, 2, 2, 1))).round(4))
      [0.6667]

    References:
      Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, 2021, https://arxiv.org/abs/2104.09044.
      Published weight, on the sum over all stages after the stem and the pooled vector, on CIFAR-100: 0.6 for
      ResNet-20, 1 for ResNet-32, 5 for ResNet-8x4, WRN and ShuffleNetV1, 8 for ShuffleNetV2 (the authors' script),
      reached linearly over the first 20 epochs (mdistiller's default).
    """
    _check_same_shape(student_map, teacher_map)
    levels = [positive_count("levels", level) for level in levels]
    student, teacher = upcast(student_map, jax.lax.stop_gradient(teacher_map))
    # Pooling is linear: the difference is pooled once instead of both maps.
    difference = student - teacher
    smaller = [level for level in levels if level < min(difference.shape[1:3])]
    scales = [difference, *(pool_map(difference, level) for level in smaller)]
    weights = [0.5**k for k in range(len(scales))]
    errors = [weight * jnp.mean(jnp.square(a), axis=(1, 2, 3)) for weight, a in zip(weights, scales, strict=True)]
    return sum(errors[1:], start=errors[0]) / sum(weights)


def to_one_size(
    student_map: Float[Array, "batch _ _ _"], teacher_map: Float[Array, "..."]
) -> tuple[Float[Array, "batch height width _"], Float[Array, "batch height width _"]]:
    """Both maps at the smaller height and the smaller width of the two, by `pool_map`; at least float32.

    Raises:
      ValueError: if the maps are not of the same number of images.
    """
    if student_map.ndim != 4 or teacher_map.ndim != 4 or student_map.shape[0] != teacher_map.shape[0]:
        raise ValueError(
            f"student_map and teacher_map must be maps [B, h, w, c] of the same images, "
            f"got {student_map.shape} and {teacher_map.shape}"
        )
    student, teacher = upcast(student_map, teacher_map)
    size = tuple(min(sides) for sides in zip(student.shape[1:3], teacher.shape[1:3], strict=True))
    return pool_map(student, size), pool_map(teacher, size)


def resample(
    feature_map: Float[Array, "batch height width channels"], rows: np.ndarray | None, columns: np.ndarray | None
) -> Float[Array, "batch _ _ channels"]:
    """Linear combinations of a map's rows, then of its columns, by constant matrices; None leaves them as they are."""
    (x,) = upcast(feature_map)
    batch, height, width, channels = x.shape
    if rows is not None:
        x = matmul(jnp.asarray(rows, x.dtype), x.reshape(batch, height, -1)).reshape(batch, -1, width, channels)
    if columns is not None:
        x = matmul(jnp.asarray(columns, x.dtype), x)
    return x


def _rows_and_columns(size: int | Sequence[int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size must be an integer or (rows, columns), got {size!r}")
    return positive_count("size", sides[0]), positive_count("size", sides[1])


def _windows(length: int, count: int) -> np.ndarray | None:
    """Row i averages window i; None where every window is one element."""
    if length == count:
        return None
    positions, i = np.arange(length), np.arange(count)[:, None]
    inside = (positions >= i * length // count) & (positions < -(-(i + 1) * length // count))
    return inside / inside.sum(axis=1, keepdims=True)


def _check_same_shape(student: Array, teacher_map: Array, *, name: str = "student_map") -> None:
    if student.ndim != 4 or student.shape != teacher_map.shape:
        raise ValueError(
            f"{name} and teacher_map must have the same shape [B, h, w, c], got {student.shape} and {teacher_map.shape}"
        )
