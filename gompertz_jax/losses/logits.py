"""Losses between class scores, image by image: soft targets, their variants, and the cross-entropy beside them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._checks import Scalar, checked, finite_number, fraction_from_zero, positive_number, temperature_number
from .._numerics import cosine_distance, upcast

# Ten terms of the exponential series are exact to float64 below it, and nothing much cancels above.
_SERIES_BELOW = 0.1


@checked
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
      teacher_logits: the same for the teacher, `[..., K]`.
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
    student, teacher, temperature = softened(student_logits, teacher_logits, temperature)
    return jnp.square(temperature) * _divergence(student, teacher)


@checked
def multi_temperature_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "... _"],
    *,
    temperatures: Sequence[Scalar] = (2.0, 3.0, 4.0, 5.0, 6.0),
) -> Float[Array, "*batch"]:
    r"""Sum of `soft_target_kl` over several temperatures: the instance level of multi-level logit distillation.

    .. math:: \sum_T T^2 \, \mathrm{KL}(p^{(T)} \,\|\, q^{(T)})

    It is a sum, not a mean: five temperatures weigh five times as much as one. The teacher receives no gradient. The
    other two levels are `batch_correlation` and `class_correlation`, which the method adds at the same temperatures.

    Args:
      student_logits: unnormalised log-probabilities, `[..., K]`.
      teacher_logits: the same for the teacher, `[..., K]`.
      temperatures: the temperatures T, positive, at least one; traced scalars are accepted unchecked.

    Returns:
      One value per example, `[...]`, in nats, in at least float32.

    Raises:
      ValueError: if the shapes differ, there is no temperature, or one is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0])
      >>> print(gj.multi_temperature_kl(student, teacher).round(4))
      2.3854

    References:
      Jin, Wang and Lin, Multi-Level Logit Distillation, 2023,
      https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html.
      Published weight: 0.9 on each level, beside 0.1 on the cross-entropy (the authors' code, CIFAR-100). The code
      trains on a weakly and a strongly augmented view of every image. Of this level, it has the strong view at T = 3,
      4, 5 alone, whole, and the weak view at half weight there and at 1.5 at T = 2 and 6: a mask over the half of the
      batch of which the teacher is less sure multiplies a value that is a mean already, and two of the strong view's
      terms read the weak view's logits.
    """
    if len(temperatures) == 0:
        raise ValueError(f"temperatures must have at least one number, got {temperatures!r}")
    numbers = [temperature_number("temperatures", temperature) for temperature in temperatures]
    first, *rest = (soft_target_kl(student_logits, teacher_logits, temperature=number) for number in numbers)
    return sum(rest, start=first)


@checked
def decoupled_kl(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "... _"],
    labels: Int[Array, "..."],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
) -> Float[Array, "*batch"]:
    r"""Divergence of the student from the teacher, with a separate weight on its part about the other classes.

    .. math:: T^2 \left( \alpha \, \mathrm{KL}(b \,\|\, \hat b) + \beta \, \mathrm{KL}(r \,\|\, \hat r) \right),
       \qquad b = (p_y, \, 1 - p_y), \quad r = \left( \frac{p_k}{1 - p_y} \right)_{k \ne y}

    with the teacher's probabilities :math:`p = \mathrm{softmax}(\text{teacher} / T)` and the label y; hats are the
    student's. The first part compares how sure the networks are of the label, the second how they see the other
    classes, which plain soft targets weigh by :math:`1 - p_y`: with :math:`\alpha = 1` and :math:`\beta = 1 - p_y` this
    is `soft_target_kl`. With two classes the second part is 0. :math:`1 - p_y` is summed from the other classes in log
    space, so that nothing cancels where the label has probability 1. The teacher receives no gradient.

    Args:
      student_logits: unnormalised log-probabilities, `[..., K]`, K at least 2. Some class other than the label must
        have a score above minus infinity.
      teacher_logits: the same for the teacher, `[..., K]`.
      labels: classes, integers from 0 to K - 1, `[...]`. Any other label gives NaN.
      alpha: weight of the label's part, at least 0; a traced scalar is accepted unchecked.
      beta: weight of the other classes' part, at least 0; a traced scalar is accepted unchecked.
      temperature: `T`, positive; a traced scalar is accepted unchecked.

    Returns:
      One value per example, `[...]`, in nats, in at least float32.

    Raises:
      ValueError: if the shapes do not fit, there are fewer than two classes, a weight is negative, or `temperature` is
        not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[4.0, 2.0, 0.0]])
      >>> print(gj.decoupled_kl(student, teacher, jnp.array([0]), alpha=1.0, beta=0.0).round(2))
      [1.02]
      >>> print(gj.decoupled_kl(student, teacher, jnp.array([0]), alpha=0.0, beta=1.0).round(2))
      [0.48]

    References:
      Zhao et al., Decoupled Knowledge Distillation, 2022, https://arxiv.org/abs/2203.08679. Published weight: 1 beside
      a cross-entropy of weight 1, reached linearly over the first 20 epochs (as a weight,
      `linear_schedule(total_steps, until=20 / epochs)`); alpha 1, T 4, and beta 8 (by pair: 8 for ResNet50 ->
      MobileNetV2 and ResNet32x4 -> ResNet8x4, 6 for VGG13 -> MobileNetV2 and WRN40-2 -> WRN16-2, 2 for ResNet56 ->
      ResNet20; mdistiller, CIFAR-100). mdistiller takes the label out of the second part by lowering its score by 1000,
      and takes the logarithm of the first part in probability space.
    """
    student, teacher, temperature = softened(student_logits, teacher_logits, temperature)
    check_labels(labels, student)
    if student.shape[-1] < 2:
        raise ValueError(f"student_logits must have at least two classes, got shape {student.shape}")
    alpha, beta = (
        jnp.asarray(
            finite_number(name, value, legal="a finite number of at least 0", accept=lambda number: number >= 0.0),
            student.dtype,
        )
        for name, value in (("alpha", alpha), ("beta", beta))
    )
    student_label, student_others = _label_and_others(student, labels)
    teacher_label, teacher_others = _label_and_others(teacher, labels)
    return jnp.square(temperature) * (
        alpha * _divergence(student_label, teacher_label) + beta * _divergence(student_others, teacher_others)
    )


def _label_and_others(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits of "the label or not", `[..., 2]`, and of the classes other than the label, `[..., K - 1]`."""
    label = positions(labels, logits.shape[-1])[..., None]
    position = jnp.broadcast_to(
        jnp.arange(logits.shape[-1] - 1, dtype=label.dtype), (*logits.shape[:-1], logits.shape[-1] - 1)
    )
    others = jnp.take_along_axis(logits, jnp.where(position >= label, position + 1, position), axis=-1)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logits, label, axis=-1), rest], axis=-1), others


@checked
def interclass_correlation(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "... _"],
    *,
    temperature: Scalar = 4.0,
) -> Float[Array, "*batch"]:
    r"""How far the student's softened probabilities are from a linear function of the teacher's, over the classes.

    .. math:: T^2 \left( 1 - \rho(q, p) \right), \qquad
       p = \mathrm{softmax}(\text{teacher} / T), \quad q = \mathrm{softmax}(\text{student} / T)

    with Pearson's correlation :math:`\rho` over the classes of one image: the inter-class part of DIST. The part over
    the batch is `intraclass_correlation`. Probabilities that are equal for all classes correlate with nothing: the
    value is then :math:`T^2`, its derivative 0. The teacher receives no gradient.

    Args:
      student_logits: unnormalised log-probabilities, `[..., K]`.
      teacher_logits: the same for the teacher, `[..., K]`.
      temperature: `T`, positive; a traced scalar is accepted unchecked.

    Returns:
      One value per example, `[...]`, from 0 to 2 T^2, in at least float32.

    Raises:
      ValueError: if the shapes differ or `temperature` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
      >>> print(gj.interclass_correlation(student, 3.0 * student[:1].repeat(2, 0), temperature=1.0).round(4))
      [0. 2.]

    References:
      Huang et al., Knowledge Distillation from A Stronger Teacher, 2022, https://arxiv.org/abs/2205.10536. Published
      weight: 2 on this part and 2 on the part over the batch, beside a cross-entropy of weight 1, T 4 (as a port of the
      authors' code has it for CIFAR-100; their ImageNet code has T 1). The factor T^2 is their code's; the paper's
      listing has none. The code adds 1e-8 to the product of the norms.
    """
    student, teacher, temperature = softened(student_logits, teacher_logits, temperature)
    return jnp.square(temperature) * correlation_distance(jax.nn.softmax(student), jax.nn.softmax(teacher))


@checked
def standardize_logits(
    logits: Float[Array, "*batch classes"], *, epsilon: Scalar = 1e-7
) -> Float[Array, "*batch classes"]:
    r"""Logits with mean 0 and standard deviation 1 over the classes, for any loss between logits.

    .. math:: \frac{z_k - \mu}{\sigma + \epsilon}, \qquad
       \mu = \frac{1}{K} \sum_k z_k, \quad \sigma^2 = \frac{1}{K} \sum_k (z_k - \mu)^2

    Student and teacher, each standardised by its own mean and deviation, need to agree only in the relations between
    classes, no longer in their spread: it is as if each image and network had its own temperature :math:`\sigma T`.
    What the paper calls the base temperature is the T of the loss that follows, in units of standard deviations: 2,
    with a weight of 9. Logits that are all equal become 0, with a derivative of exactly 0.

    Args:
      logits: finite scores, `[..., K]`.
      epsilon: keeps the denominator from 0; positive, in units of the logits; a traced scalar is accepted unchecked.

    Returns:
      The standardised logits, `[..., K]`, in at least float32.

    Raises:
      ValueError: if `epsilon` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.standardize_logits(jnp.array([[1.0, 3.0], [5.0, 5.0]])).round(4))
      [[-1.  1.]
       [ 0.  0.]]
      >>> student, teacher = (gj.standardize_logits(jnp.array(z)) for z in ([0.0, 1.0, 2.0], [0.0, 30.0, 20.0]))
      >>> print(f"{gj.soft_target_kl(student, teacher, temperature=2.0):.2f}")
      0.43

    References:
      Sun et al., Logit Standardization in Knowledge Distillation, 2024, https://arxiv.org/abs/2403.01427. Published for
      CIFAR-100: `soft_target_kl` at base temperature 2 (3 for some pairs) with weight 9 beside a cross-entropy of
      weight 0.1 (the authors' commands, mdistiller's default). Their code divides by K - 1 in the variance.
    """
    epsilon = positive_number("epsilon", epsilon)
    (logits,) = upcast(logits)
    centered = _centered(logits)
    # Divided by its largest element first, so that no square overflows. The result does not depend on this scale, and
    # no derivative is lost by holding it constant.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(centered), axis=-1, keepdims=True))
    is_constant = largest < jnp.finfo(logits.dtype).tiny
    largest = jnp.where(is_constant, 1.0, largest)
    scaled = jnp.where(is_constant, 0.0, centered / largest)
    variance = jnp.mean(jnp.square(scaled), axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.where(is_constant, 1.0, variance))
    return scaled / (deviation + jnp.asarray(epsilon, logits.dtype) / largest)


@checked
def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "..."], *, label_smoothing: Scalar = 0.0
) -> Float[Array, "*batch"]:
    r"""Cross-entropy of the predicted class probabilities with integer labels.

    .. math:: -(1 - s) \ln q_y - \frac{s}{K} \sum_k \ln q_k, \qquad q = \mathrm{softmax}(\text{logits})

    In nats, computed in at least float32.

    Args:
      logits: unnormalised log-probabilities, `[..., K]`.
      labels: classes, integers from 0 to K - 1, `[...]`. Any other label gives NaN.
      label_smoothing: `s`, the part of the target that is spread over all classes, from 0 up to, not including, 1.

    Returns:
      One value per example, `[...]`.

    Raises:
      ValueError: if `labels` does not have the shape of `logits` without its last axis, or `label_smoothing` is outside
        [0, 1).

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> logits = jnp.array([[0.0, 0.0], [2.0, 0.0]])
      >>> print(gj.cross_entropy(logits, jnp.array([0, 0])).round(4))
      [0.6931 0.1269]

    References:
      Label smoothing: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016,
      https://arxiv.org/abs/1512.00567.
    """
    check_labels(labels, logits)
    smoothing = fraction_from_zero("label_smoothing", label_smoothing)
    (logits,) = upcast(logits)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, positions(labels, logits.shape[-1]))
    if isinstance(smoothing, float) and smoothing == 0.0:
        return hard
    spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    smoothing = jnp.asarray(smoothing, logits.dtype)
    return (1.0 - smoothing) * hard + smoothing * spread


@checked
def target_cross_entropy(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "..."],
    labels: Int[Array, "..."],
) -> Float[Array, "*batch"]:
    r"""The target class's part of WKD-L: the student's log-probability of it, weighted by the teacher's probability.

    .. math:: - p_\ell \ln q_\ell, \qquad
       p = \mathrm{softmax}(\text{teacher}), \quad q = \mathrm{softmax}(\text{student})

    Published weight 1, at temperature 1, next to the cross-entropy and `wasserstein_logits` with `labels`. The teacher
    receives no gradient. In nats, computed in at least float32.

    Args:
      student_logits: unnormalised log-probabilities, `[..., K]`.
      teacher_logits: the same for the teacher, `[..., K]`.
      labels: target classes, integers from 0 to K - 1, `[...]`. Any other label gives NaN.

    Returns:
      One value per example, `[...]`.

    Raises:
      ValueError: if the shapes do not fit or there are fewer than two classes.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> print(gj.target_cross_entropy(jnp.zeros(2), jnp.zeros(2), jnp.array(0)).round(4))
      0.3466

    References:
      Lv, Yang and Li, 2024, https://arxiv.org/abs/2412.08139; as in `mdistiller/distillers/WKD.py` of its code.
    """
    check_pair(student_logits, teacher_logits, labels)
    student, teacher = upcast(student_logits, jax.lax.stop_gradient(teacher_logits))
    label = positions(labels, student.shape[-1])[..., None]
    log_probs, probs = (
        jnp.take_along_axis(scores, label, axis=-1)[..., 0]
        for scores in (jax.nn.log_softmax(student), jax.nn.softmax(teacher))
    )
    return -probs * log_probs


def softened(
    student_logits: Float[Array, "*batch classes"], teacher_logits: Float[Array, "..."], temperature: Scalar
) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch classes"], Float[Array, ""]]:
    """Both networks' `(logits - maximum) / temperature`, and the temperature; the teacher's are constant.

    Raises:
      ValueError: if the shapes differ, `temperature` is not positive, or its square is not finite in float32.
    """
    if student_logits.ndim == 0 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape [..., K], "
            f"got {student_logits.shape} and {teacher_logits.shape}"
        )
    temperature = temperature_number("temperature", temperature)
    student, teacher = upcast(student_logits, jax.lax.stop_gradient(teacher_logits))
    temperature = jnp.asarray(temperature, student.dtype)
    # No loss here depends on a shift. Compilers fuse the division with the subtraction of the maximum inside the
    # softmax, whose rounding error is large where the logits are large, unless the maximum is already 0.
    student, teacher = (z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True)) for z in (student, teacher))
    return student / temperature, teacher / temperature, temperature


def correlation_distance(x: Float[Array, "*batch size"], y: Float[Array, "*batch size"]) -> Float[Array, "*batch"]:
    """One minus Pearson's correlation over the last axis; 1, with a derivative of 0, where either side is constant."""
    return cosine_distance(_centered(x), _centered(y))


def _centered(x: Array) -> Array:
    """Minus the mean over the last axis. Constants become exactly 0: their mean may be rounded, that of 0 is not."""
    x = x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    return x - jnp.mean(x, axis=-1, keepdims=True)


def _divergence(student: Array, teacher: Array) -> Array:
    """KL(teacher || student) of the distributions with these logits over the last axis; never negative."""
    student_total, teacher_total = (jax.nn.logsumexp(z, axis=-1, keepdims=True) for z in (student, teacher))
    student_probs, teacher_probs = jnp.exp(student - student_total), jnp.exp(teacher - teacher_total)
    # p ln(p / q) has either sign and cancels in the sum where p and q are nearly equal. Since p and q both sum to 1,
    # p (ln(p / q) + q / p - 1) has the same sum, and none of its terms is negative.
    is_negligible = teacher_probs < jnp.finfo(teacher.dtype).tiny  # NaN is not, and is kept
    # Differences first: they are exact where the logits nearly agree, and of an error in the totals' only the square
    # enters the sum.
    log_ratio = jnp.where(is_negligible, 0.0, teacher - student) - (teacher_total - student_total)
    terms = teacher_probs * _above_tangent(jnp.where(is_negligible, 0.0, log_ratio))
    return jnp.sum(jnp.where(is_negligible, student_probs, terms), axis=-1)


def _above_tangent(x: Array) -> Array:
    """`x + exp(-x) - 1`, which is about x^2 / 2 near 0, to full relative precision there."""
    is_small = jnp.abs(x) < _SERIES_BELOW
    small, large = jnp.where(is_small, x, 0.0), jnp.where(is_small, 1.0, x)
    series = 1.0 - small / 10
    for n in range(9, 2, -1):
        series = 1.0 - small / n * series
    return jnp.where(is_small, 0.5 * jnp.square(small) * series, large + jnp.expm1(-large))


def check_labels(labels: Array, logits: Array) -> None:
    """Refuse labels that are not one per row of logits."""
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without its last axis, got {labels.shape} and {logits.shape}"
        )


def positions(labels: Array, classes: int) -> Array:
    """Labels as indices of an axis of that many classes; one that is no class becomes the first index out of range.

    A negative index would count from the end of the axis and read the score of another class. Out of range,
    `take_along_axis` gives NaN.
    """
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)  # which holds the number of classes
    # Before the conversion of wider labels, which would wrap around.
    return jnp.where((labels < 0) | (labels >= classes), classes, labels).astype(jnp.int32)


def check_pair(student: Array, teacher: Array, labels: Array | None) -> None:
    """Refuse logits of two networks, and labels, that do not belong together."""
    if student.ndim == 0 or student.shape != teacher.shape or student.shape[-1] < 2:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., K] with at least two classes, "
            f"got {student.shape} and {teacher.shape}"
        )
    if labels is not None and labels.shape != student.shape[:-1]:
        raise ValueError(
            "labels must have the shape of student_logits without its last axis, "
            f"got {labels.shape} and {student.shape}"
        )
