"""Losses between gradients: how both networks' scores react to the same change of the image, or of a stage's map.

A gradient is the pull-back of a cotangent of the logits, `[B, K]`. `top_class`, `label_class`, `random_direction` and
`cross_entropy_direction` make such cotangents: one forward pass under `jax.vjp` serves all of them.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._checks import checked, positive_count, shown
from .._numerics import compute_dtype, cosine_distance, upcast
from .logits import check_labels, positions

ScoreFn: TypeAlias = Callable[[Float[Array, "batch height width channels"]], Float[Array, " batch"]]
LogitsFn: TypeAlias = Callable[[Float[Array, "batch height width channels"]], Float[Array, "batch classes"]]

_KINDS = ("cosine", "l2", "normalized_l2")


@checked
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
    return _score_gradient("score_fn", score_fn, images)


def _score_gradient(name: str, score_fn: ScoreFn, images: Array) -> Array:
    (images,) = upcast(images)

    def total_score(images: Array) -> Array:
        scores = _float_output(name, score_fn(images))
        if scores.shape != images.shape[:1]:
            raise ValueError(
                f"{name} must return one score per image, shape {images.shape[:1]}, got shape {scores.shape}"
            )
        return jnp.sum(scores)

    return jax.grad(total_score)(images)


@checked
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
    (gradient,) = upcast(gradient)
    windows = gradient.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.mean(windows, axis=(2, 4))


@checked
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
    overflows float32 above about 1e19 (its derivative does not).

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
    student, teacher = upcast(student_gradient, jax.lax.stop_gradient(teacher_gradient))
    batch = student.shape[0]
    student, teacher = student.reshape(batch, -1), teacher.reshape(batch, -1)
    if kind == "l2":
        return jnp.sum(jnp.square(student - teacher), axis=-1)
    cosine = cosine_distance(student, teacher)
    return cosine if kind == "cosine" else 2.0 * cosine


def _check_kind(kind: str) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")


@checked
def gradient_matching(
    student_score_fn: ScoreFn,
    teacher_score_fn: ScoreFn,
    images: Float[Array, "batch height width channels"],
    *,
    kind: str = "cosine",
) -> Float[Array, " batch"]:
    """Distance between the input gradients of both networks' scores, one value per image.

    `gradient_distance(input_gradient(student), input_gradient(teacher))`. It can be used inside an outer `jax.grad`
    with respect to what `student_score_fn` closes over; the teacher's gradient is a constant there.

    The Gompertz-CNN paper's abstract says that teacher and student are matched in their backward pass; the choice of
    the input gradient, of the score and of the cosine is our reconstruction.

    Args:
      student_score_fn: images `[B, h, w, c]` -> scores `[B]`.
      teacher_score_fn: the same for the teacher.
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
    teacher_gradient = jax.lax.stop_gradient(_score_gradient("teacher_score_fn", teacher_score_fn, images))
    student_gradient = _score_gradient("student_score_fn", student_score_fn, images)
    return gradient_distance(student_gradient, teacher_gradient, kind=kind)


@checked
def top_class(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""The score of the class that a network finds most likely, as a cotangent of the logits.

    .. math:: v_k = [k = \arg\max_j z_j]

    The teacher's direction serves both networks, so that both gradients are of the same class. It is a constant in
    differentiation.

    Args:
      logits: the teacher's, `[..., K]`; of equal logits the first counts as the largest.

    Returns:
      One one-hot vector per example, `[..., K]`, in at least float32.

    Raises:
      ValueError: if `logits` is a scalar.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.top_class(jnp.array([[1.0, 3.0, 2.0]])))
      [[0. 1. 0.]]

    References:
      Srinivas and Fleuret, Knowledge Transfer with Jacobian Matching, 2018, https://arxiv.org/abs/1803.00443.
    """
    _check_logits(logits)
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=compute_dtype(logits))


@checked
def label_class(logits: Float[Array, "*batch classes"], labels: Int[Array, "..."]) -> Float[Array, "*batch classes"]:
    r"""The score of the labelled class, as a cotangent of the logits.

    .. math:: v_k = [k = y]

    Args:
      logits: either network's, `[..., K]`: only their shape and dtype are read.
      labels: classes y, integers from 0 to K - 1, `[...]`. Any other label gives NaN.

    Returns:
      One one-hot vector per example, `[..., K]`, in at least float32.

    Raises:
      ValueError: if `labels` does not have the shape of `logits` without its last axis.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.label_class(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2])))
      [[0. 0. 1.]]

    References:
      Simonyan, Vedaldi and Zisserman, Deep Inside Convolutional Networks, 2014, https://arxiv.org/abs/1312.6034.
    """
    check_labels(labels, logits)
    classes = logits.shape[-1]
    label = positions(labels, classes)
    one_hot = jax.nn.one_hot(label, classes, dtype=compute_dtype(logits))
    # Zeros would make a gradient of zero, which the cosine takes for one without a direction.
    return jnp.where((label < classes)[..., None], one_hot, jnp.nan)


@checked
def cross_entropy_direction(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "..."]
) -> Float[Array, "*batch classes"]:
    r"""The cross-entropy with the labels, as a cotangent of the logits.

    .. math:: v_k = \frac{\partial}{\partial z_k} (-\ln q_y) = q_k - [k = y], \qquad q = \mathrm{softmax}(z)

    Differentiable in the logits: a loss of the student's input gradient also changes the student through this factor.
    Exact to a few roundings also where the labelled class is almost certain, as with most teachers: its entry is the
    sum of the others' probabilities, not one minus its own. There the vector is nearly zero, and so is the gradient.

    Args:
      logits: those of the network whose gradient is taken, `[..., K]`.
      labels: classes y, integers from 0 to K - 1, `[...]`. Any other label gives NaN.

    Returns:
      One vector of sum 0 per example, `[..., K]`, in at least float32.

    Raises:
      ValueError: if `labels` does not have the shape of `logits` without its last axis.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.cross_entropy_direction(jnp.array([[0.0, 0.0], [9.0, 9.0]]), jnp.array([0, 1])))
      [[-0.5  0.5]
       [ 0.5 -0.5]]

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, https://arxiv.org/abs/1612.03928, section 3.2.
    """
    label = label_class(logits, labels)
    (logits,) = upcast(logits)
    others = jax.nn.softmax(logits) * (1.0 - label)
    return others - label * jnp.sum(others, axis=-1, keepdims=True)


@checked
def random_direction(logits: Float[Array, "..."], *, key: PRNGKeyArray) -> Float[Array, "..."]:
    r"""A projection of the logits onto a random vector, as a cotangent of the logits.

    .. math:: v = \frac{n}{|n|}, \quad n \sim \mathcal{N}(0, I_K), \qquad E[v v^\top] = I / K

    Uniform on the unit sphere, and drawn anew for every example. Averaged over draws, the squared norm of
    :math:`J^\top v` is the squared Frobenius norm of the Jacobian J, divided by K.

    Args:
      logits: either network's, `[..., K]`: only their shape and dtype are read.
      key: random key; equal keys give equal vectors.

    Returns:
      One unit vector per example, `[..., K]`, in at least float32.

    Raises:
      ValueError: if `logits` is a scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, gompertz_jax as gj
      >>> direction = gj.random_direction(jnp.zeros((2, 10)), key=jax.random.key(0))
      >>> print(jnp.square(direction).sum(-1).round(5))
      [1. 1.]

    References:
      Czarnecki et al., Sobolev Training for Neural Networks, 2017, https://arxiv.org/abs/1706.04859.
    """
    _check_logits(logits)
    normal = jax.random.normal(key, logits.shape, compute_dtype(logits))
    norm = jnp.linalg.norm(normal, axis=-1, keepdims=True)
    return normal / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)


def _check_logits(logits: Array) -> None:
    if logits.ndim == 0:
        raise ValueError(f"logits must have the shape [..., K], got {logits.shape}")


@checked
def jacobian_matching(
    student_fn: LogitsFn, teacher_fn: LogitsFn, images: Float[Array, "batch height width channels"]
) -> Float[Array, " batch"]:
    r"""Distance between both networks' normalised input gradients of the logit of the teacher's top class.

    .. math:: \left| \frac{g}{|g|} - \frac{h}{|h|} \right|^2, \qquad
       g = \nabla_x z^S_m, \quad h = \nabla_x z^T_m, \quad m = \arg\max_k z^T_k

    One row of the Jacobian stands for all K, which would cost K backward passes. It can be used inside an outer
    `jax.grad` with respect to what `student_fn` closes over; the teacher is a constant there. BatchNorm in training
    mode couples the images of a batch, see `input_gradient`. `gradient_distance` says what a zero gradient gives.

    Args:
      student_fn: images `[B, h, w, c]` -> logits `[B, K]`.
      teacher_fn: the same for the teacher.
      images: the common images of both, `[B, h, w, c]`; handed on in at least float32.

    Returns:
      One value per image, `[B]`, 0 to 4.

    Raises:
      ValueError: if a function does not return logits `[B, K]`, or K differs.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> images = jnp.ones((1, 1, 2, 1))
      >>> student, teacher = jnp.array([[1.0, 5.0], [1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]])
      >>> loss = gj.jacobian_matching(
      ...     lambda x: x.reshape(1, 2) @ student, lambda x: x.reshape(1, 2) @ teacher, images
      ... )
      >>> print(loss.round(4))  # between (1, 1) and (1, 0): 2 - 2 cos 45°
      [0.5858]

    References:
      Srinivas and Fleuret, Knowledge Transfer with Jacobian Matching, 2018, https://arxiv.org/abs/1803.00443. The
      public figure for its weight is that of AberHu's Knowledge-Distillation-Zoo (example_train_script.sh, "sobolev"):
      20 on CIFAR-10 for the mean over the 3,072 entries of an image, which is 20 / 3072 = 0.0065 for the sum here; it
      takes the class of the label where the class here is the teacher's.
    """

    def direction(_: Array, teacher_logits: Array) -> tuple[Array, Array]:
        top = top_class(teacher_logits)
        return top, top

    return _distance_of_pullbacks(student_fn, teacher_fn, images, direction, kind="normalized_l2")


@checked
def sobolev_matching(
    student_fn: LogitsFn,
    teacher_fn: LogitsFn,
    images: Float[Array, "batch height width channels"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, " batch"]:
    r"""Squared distance between both networks' Jacobians, projected onto one random direction of the logits.

    .. math:: |\nabla_x \langle z^S, v \rangle - \nabla_x \langle z^T, v \rangle|^2, \qquad
       v \text{ uniform on the unit sphere}, \qquad E_v = \frac{1}{K} \|J^S - J^T\|_F^2

    The stochastic form of Sobolev training: one backward pass per network stands for the K of a whole Jacobian. Each
    image has its own direction, the same for both networks (`random_direction`). The logits are projected, not the
    log-probabilities: the latter differ by the gradient of the normaliser, which puts the whole softmax into every
    projection. In squared units of logits per unit of the images; smaller images give larger values. It can be used
    inside an outer `jax.grad` with respect to what `student_fn` closes over; the teacher is a constant there.

    Args:
      student_fn: images `[B, h, w, c]` -> logits `[B, K]`.
      teacher_fn: the same for the teacher.
      images: the common images of both, `[B, h, w, c]`; handed on in at least float32.
      key: random key, a new one at every step.

    Returns:
      One value per image, `[B]`.

    Raises:
      ValueError: if a function does not return logits `[B, K]`, or K differs.

    Examples:
      >>> import jax, jax.numpy as jnp, gompertz_jax as gj
      >>> images = jnp.ones((1, 1, 2, 1))
      >>> loss = gj.sobolev_matching(
      ...     lambda x: 3.0 * x.reshape(1, 2), lambda x: x.reshape(1, 2), images, key=jax.random.key(0)
      ... )
      >>> print(loss.round(4))  # the Jacobians differ by 2 I: 4 |v|^2
      [4.]

    References:
      Czarnecki et al., Sobolev Training for Neural Networks, 2017, https://arxiv.org/abs/1706.04859: added with weight
      1 to the loss between the networks' outputs, by any distance; the squared one here.
    """

    def direction(_: Array, teacher_logits: Array) -> tuple[Array, Array]:
        projection = random_direction(teacher_logits, key=key)
        return projection, projection

    return _distance_of_pullbacks(student_fn, teacher_fn, images, direction, kind="l2")


@checked
def gradient_attention_transfer(
    student_fn: LogitsFn,
    teacher_fn: LogitsFn,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, "..."],
) -> Float[Array, " batch"]:
    r"""Squared distance between the input gradients of each network's own cross-entropy with the labels.

    .. math:: |J_S - J_T|^2, \qquad J = \nabla_x (-\ln q_y), \quad q = \mathrm{softmax}(z)

    The teacher's gradient vanishes where it is certain of the label: there the loss is the squared norm of the
    student's. It can be used inside an outer `jax.grad` with respect to what `student_fn` closes over; the teacher is a
    constant there. BatchNorm in training mode couples the images of a batch, see `input_gradient`.

    Args:
      student_fn: images `[B, h, w, c]` -> logits `[B, K]`.
      teacher_fn: the same for the teacher.
      images: the common images of both, `[B, h, w, c]`; handed on in at least float32.
      labels: classes y, integers from 0 to K - 1, `[B]`. Any other label gives NaN.

    Returns:
      One value per image, `[B]`, in squared nats per unit of the images.

    Raises:
      ValueError: if a function does not return logits `[B, K]`, K differs, or `labels` is not `[B]`.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> images = jnp.zeros((1, 1, 2, 1))
      >>> loss = gj.gradient_attention_transfer(
      ...     lambda x: 3.0 * x.reshape(1, 2), lambda x: x.reshape(1, 2), images, jnp.array([0])
      ... )
      >>> print(loss.round(4))  # J_S = 3 (-1/2, 1/2), J_T = (-1/2, 1/2)
      [2.]

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, https://arxiv.org/abs/1612.03928, section 3.2:
      weight beta / 2. The norm is printed there without its square, and differentiated to beta (J_S - J_T), as the
      squared one is. The released code (szagoruyko/attention-transfer) has the activation-based form alone, and so no
      beta for this one.
    """
    if labels.shape != images.shape[:1]:
        raise ValueError(f"images and labels must be of the same number, got {images.shape} and {labels.shape}")

    def direction(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array]:
        return cross_entropy_direction(student_logits, labels), cross_entropy_direction(teacher_logits, labels)

    return _distance_of_pullbacks(student_fn, teacher_fn, images, direction, kind="l2")


def _distance_of_pullbacks(
    student_fn: LogitsFn,
    teacher_fn: LogitsFn,
    images: Array,
    directions: Callable[[Array, Array], tuple[Array, Array]],
    *,
    kind: str,
) -> Array:
    """Distance between the input gradients along `directions(student logits, teacher logits)`, one forward each."""
    (images,) = upcast(images)
    student_logits, pull_student = jax.vjp(lambda images: _logits("student_fn", student_fn, images), images)
    teacher_logits, pull_teacher = jax.vjp(lambda images: _logits("teacher_fn", teacher_fn, images), images)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_fn and teacher_fn must return logits of the same shape [B, K], "
            f"got {student_logits.shape} and {teacher_logits.shape}"
        )
    student, teacher = directions(student_logits, teacher_logits)
    (student_gradient,) = pull_student(student.astype(student_logits.dtype))
    (teacher_gradient,) = pull_teacher(teacher.astype(teacher_logits.dtype))
    return gradient_distance(student_gradient, teacher_gradient, kind=kind)


def _logits(name: str, logits_fn: LogitsFn, images: Array) -> Array:
    logits = _float_output(name, logits_fn(images))
    if logits.ndim != 2 or logits.shape[0] != images.shape[0]:
        raise ValueError(f"{name} must return logits of the shape ({images.shape[0]}, K), got {logits.shape}")
    return logits


def _float_output(name: str, returned: Any) -> Array:
    if not isinstance(returned, jax.Array) or not jnp.issubdtype(returned.dtype, jnp.floating):
        raise TypeError(f"{name} must return an array of floats, got {shown(returned)}")
    return upcast(returned)[0]


@checked
def contribution_map(
    feature_map: Float[Array, "batch height width channels"], gradient: Float[Array, "..."]
) -> Float[Array, "batch height width"]:
    r"""How much each position of a stage's map adds to a score, to first order.

    .. math:: m_{yx} = \sum_c a_{yxc} \, \frac{\partial s}{\partial a_{yxc}}

    The sum over the channels of activation times gradient, with its sign. To first order, it is what the score would
    lose if the position were set to zero, in units of the score whatever the width of the map: so two networks of
    different widths can be compared at a stage, by `gradient_distance` (and `pool_gradient` of `m[..., None]`). Both
    maps must then have the same size: pool the larger one's contributions first, `pool_map(m[..., None], size)`.
    Between the last map and a linear classifier after the mean, the contributions of all positions add up to the logit
    minus its bias. Neither argument is held constant: the student's part of a loss is differentiated through both.

    Matching two networks by it at a stage is our reconstruction; we know of no paper that does this.

    Args:
      feature_map: the map a of a stage, `[B, h, w, c]`.
      gradient: the gradient of a score at that map, the same shape; `Network.forward` takes `offsets` for it.

    Returns:
      One map per image, `[B, h, w]`, in units of the score and at least float32.

    Raises:
      ValueError: if the shapes differ.

    Examples:
      >>> import jax, jax.numpy as jnp, gompertz_jax as gj
      >>> weight = jnp.array([1.0, -1.0])
      >>> feature_map = jnp.array([[2.0, 1.0], [0.0, 3.0]]).reshape(1, 1, 2, 2)
      >>> gradient = jax.grad(lambda a: (a @ weight).sum())(feature_map)
      >>> print(gj.contribution_map(feature_map, gradient))
      [[[ 1. -3.]]]

    References:
      Related, as explanations: Shrikumar et al., Not Just a Black Box, 2016, https://arxiv.org/abs/1605.01713 (gradient
      times input); Selvaraju et al., Grad-CAM, 2017, https://arxiv.org/abs/1610.02391 (gradients averaged over the
      positions first, negative sums cut off).
    """
    if feature_map.shape != gradient.shape:
        raise ValueError(
            f"feature_map and gradient must have the same shape [B, h, w, c], "
            f"got {feature_map.shape} and {gradient.shape}"
        )
    feature_map, gradient = upcast(feature_map, gradient)
    return jnp.sum(feature_map * gradient, axis=-1)
