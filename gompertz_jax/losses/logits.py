"""Losses between class scores: soft targets and the cross-entropy they are added to."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._numerics import Scalar, finite_number, positive_number, raised


def soft_target_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "... _"],
    *,
    temperature: Scalar = 4.0,
) -> Float[Array, "*batch"]:
    r"""Divergence of the student's softened class probabilities from the teacher's.

    .. math:: T^2 \, \mathrm{KL}(p \,\|\, q) = T^2 \sum_k p_k (\ln p_k - \ln q_k), \qquad
       p = \mathrm{softmax}(\text{teacher} / T), \quad q = \mathrm{softmax}(\text{student} / T)

    The gradient with respect to the student's logits is :math:`T (q - p)`; the factor :math:`T^2` keeps its size about
    the same at every temperature. The teacher receives no gradient. In nats, computed in at least float32.

    Args:
      student_logits: unnormalised log-probabilities, `[..., K]`. A score of minus infinity masks a class, provided the
        teacher masks it too.
      teacher_logits: the same of the teacher, `[..., K]`.
      temperature: `T`, positive, in units of the logits; a traced scalar (a schedule inside the step) is accepted
        unchecked.

    Returns:
      One value per example, `[...]`.

    Raises:
      ValueError: if the shapes differ or `temperature` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([[0.0, 0.0], [2.0, 0.0]])
      >>> teacher = jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> print(gj.soft_target_kl(student, teacher, temperature=2.0).round(4))
      [0.4438 0.    ]

    References:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531.
    """
    if student_logits.ndim == 0 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape [..., K], "
            f"got {student_logits.shape} and {teacher_logits.shape}"
        )
    temperature = positive_number("temperature", temperature)
    student, teacher = raised(student_logits, jax.lax.stop_gradient(teacher_logits))
    temperature = jnp.asarray(temperature, student.dtype)
    student_log_probs = jax.nn.log_softmax(student / temperature)
    teacher_log_probs = jax.nn.log_softmax(teacher / temperature)
    teacher_probs = jnp.exp(teacher_log_probs)
    # 0 ln 0 = 0, also where a class is masked and the logarithm is minus infinity.
    log_ratio = jnp.where(teacher_probs > 0, teacher_log_probs - student_log_probs, 0.0)
    return jnp.square(temperature) * jnp.sum(teacher_probs * log_ratio, axis=-1)


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "..."], *, label_smoothing: Scalar = 0.0
) -> Float[Array, "*batch"]:
    r"""Cross-entropy of the predicted class probabilities with integer labels.

    .. math:: -(1 - s) \ln q_y - \frac{s}{K} \sum_k \ln q_k, \qquad q = \mathrm{softmax}(\text{logits})

    In nats, computed in at least float32.

    Args:
      logits: unnormalised log-probabilities, `[..., K]`.
      labels: classes, integers from 0 to K - 1, `[...]`. A label of K or more gives NaN.
      label_smoothing: `s`, the part of the target that is spread over all classes, from 0 up to, not including, 1.

    Returns:
      One value per example, `[...]`.

    Raises:
      ValueError: if `labels` has not the shape of `logits` less its last axis, or `label_smoothing` is outside [0, 1).

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> logits = jnp.array([[0.0, 0.0], [2.0, 0.0]])
      >>> print(gj.cross_entropy(logits, jnp.array([0, 0])).round(4))
      [0.6931 0.1269]

    References:
      Label smoothing: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016,
      https://arxiv.org/abs/1512.00567.
    """
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without its last axis, got {labels.shape} and {logits.shape}"
        )
    smoothing = finite_number(
        "label_smoothing", label_smoothing, legal="in [0, 1)", accept=lambda number: 0.0 <= number < 1.0
    )
    (logits,) = raised(logits)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    if isinstance(smoothing, float) and smoothing == 0.0:
        return hard
    spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    smoothing = jnp.asarray(smoothing, logits.dtype)
    return (1.0 - smoothing) * hard + smoothing * spread
