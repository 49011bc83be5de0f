"""Losses between the images of a batch: which of them the teacher finds alike, and whether the student agrees.

All of them are batch-relational: each value belongs to the row of an image (or of a class) in a matrix over the whole
batch, and changes with the other images. The mean of the values is the published loss. Features are `[B, ...]`,
flattened to one vector per image; only relations within each network are compared, so their widths may differ.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._checks import Scalar, checked, positive_count, positive_number
from .._numerics import matmul, safe_sqrt, unit_vectors, upcast
from .logits import correlation_distance, softened

# Anchors whose differences from the whole batch are held in memory at a time.
_ANCHORS_AT_ONCE = 16

# What the reference code of probabilistic_transfer adds to both probabilities before the logarithm.
_PROBABILITY_FLOOR = 1e-7


@checked
def intraclass_correlation(
    student_logits: Float[Array, "*batch classes"], teacher_logits: Float[Array, "..."], *, temperature: Scalar = 4.0
) -> Float[Array, " classes"]:
    r"""How far the student's probability of a class is from a linear function of the teacher's, over the batch.

    .. math:: T^2 \left( 1 - \rho(q_{\cdot k}, p_{\cdot k}) \right), \qquad
       p = \mathrm{softmax}(\text{teacher} / T), \quad q = \mathrm{softmax}(\text{student} / T)

    with Pearson's correlation :math:`\rho` over the images: the intra-class part of DIST, one value per **class**. The
    part over the classes is `interclass_correlation`. A class whose probability is the same for all images, as in a
    batch of one, correlates with nothing: the value is then :math:`T^2`, its derivative 0. The teacher receives no
    gradient.

    Args:
      student_logits: unnormalised log-probabilities, `[B, K]`.
      teacher_logits: the same for the teacher, `[B, K]`.
      temperature: `T`, positive; a traced scalar is accepted unchecked.

    Returns:
      One value per class, `[K]`, from 0 to 2 T^2, in at least float32.

    Raises:
      ValueError: if the shapes differ or `temperature` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([[1.0, 0.0], [0.0, 0.0]])
      >>> print(gj.intraclass_correlation(student, student[::-1], temperature=1.0).round(4))
      [2. 2.]

    References:
      Huang et al., Knowledge Distillation from A Stronger Teacher, 2022, https://arxiv.org/abs/2205.10536. Published
      weight and the factor T^2: as for `interclass_correlation`.
    """
    student, teacher, temperature = _probabilities(student_logits, teacher_logits, temperature)
    return jnp.square(temperature) * correlation_distance(student.T, teacher.T)


@checked
def batch_correlation(
    student_logits: Float[Array, "*batch classes"], teacher_logits: Float[Array, "..."], *, temperature: Scalar = 4.0
) -> Float[Array, "*batch"]:
    r"""Distance between both networks' agreement of images: the batch level of multi-level logit distillation.

    .. math:: \sum_j \left( q_i^\top q_j - p_i^\top p_j \right)^2, \qquad
       p = \mathrm{softmax}(\text{teacher} / T), \quad q = \mathrm{softmax}(\text{student} / T)

    Batch-relational: i is the image, j runs over the batch. There is no factor T^2. The teacher receives no gradient.

    Args:
      student_logits: unnormalised log-probabilities, `[B, K]`.
      teacher_logits: the same for the teacher, `[B, K]`.
      temperature: `T`, positive; a traced scalar is accepted unchecked.

    Returns:
      One value per image, its row, `[B]`, from 0 to B, in at least float32.

    Raises:
      ValueError: if the shapes differ or `temperature` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.zeros((2, 2)), jnp.array([[1000.0, 0.0], [0.0, 1000.0]])
      >>> print(gj.batch_correlation(student, teacher))
      [0.5 0.5]

    References:
      Jin, Wang and Lin, Multi-Level Logit Distillation, 2023. Published weight: 0.9 on the sum over T = 2, 3, 4, 5, 6;
      see `multi_temperature_kl`. The authors' code keeps this level for the weakly augmented view alone, halved.
    """
    student, teacher, _ = _probabilities(student_logits, teacher_logits, temperature)
    return _gram_distance(student, teacher)


@checked
def class_correlation(
    student_logits: Float[Array, "*batch classes"], teacher_logits: Float[Array, "..."], *, temperature: Scalar = 4.0
) -> Float[Array, " classes"]:
    r"""Distance between both networks' confusion of classes: the class level of multi-level logit distillation.

    .. math:: \sum_l \Big( \sum_i q_{ik} q_{il} - \sum_i p_{ik} p_{il} \Big)^2, \qquad
       p = \mathrm{softmax}(\text{teacher} / T), \quad q = \mathrm{softmax}(\text{student} / T)

    Batch-relational, one value per **class** k; i runs over the batch. The inner sums are not means, so the value grows
    with the square of the batch. There is no factor T^2. The teacher receives no gradient.

    Args:
      student_logits: unnormalised log-probabilities, `[B, K]`.
      teacher_logits: the same for the teacher, `[B, K]`.
      temperature: `T`, positive; a traced scalar is accepted unchecked.

    Returns:
      One value per class, its row, `[K]`, in at least float32.

    Raises:
      ValueError: if the shapes differ or `temperature` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.zeros((2, 2)), jnp.array([[1000.0, 0.0], [0.0, 1000.0]])
      >>> print(gj.class_correlation(student, teacher))
      [0.5 0.5]

    References:
      Jin, Wang and Lin, Multi-Level Logit Distillation, 2023. Published weight: 0.9 on the sum over T = 2, 3, 4, 5, 6,
      at a batch of 64; see `multi_temperature_kl`. The authors' code keeps this level for the weakly augmented view
      alone, halved.
    """
    student, teacher, _ = _probabilities(student_logits, teacher_logits, temperature)
    return _gram_distance(student.T, teacher.T)


@checked
def similarity_preserving(
    student_features: Float[Array, "batch *shape"], teacher_features: Float[Array, "..."]
) -> Float[Array, " batch"]:
    r"""Distance between both networks' similarities of an image to all images of the batch.

    .. math:: \frac{1}{B} \left| \frac{g_i}{|g_i|} - \frac{h_i}{|h_i|} \right|^2, \qquad
       g_{ij} = \langle a_i, a_j \rangle, \quad h_{ij} = \langle b_i, b_j \rangle

    Batch-relational: i is the image, j runs over the batch. The student's features a and the teacher's b may have any
    shape. The teacher receives no gradient. Features of zeros are similar to nothing, with a derivative of exactly 0.

    Args:
      student_features: a, `[B, ...]`, flattened.
      teacher_features: b, `[B, ...]`, flattened.

    Returns:
      One value per image, its row, `[B]`, from 0 to 4 / B, in at least float32.

    Raises:
      ValueError: if the features are empty or not of the same number of images.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(gj.similarity_preserving(student, teacher).round(4))
      [0.2929 0.2929]

    References:
      Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019, https://arxiv.org/abs/1907.09682. Published
      weight: 3000, on the last maps before the pooling (the paper, RepDistiller's script, mdistiller's defaults). In
      MobileNetV2 and ShuffleNetV2 those two take the map before the last 1x1 convolution, stage -2 here; in the wide
      residual networks that before the last normalisation and ReLU, which is no stage here.
    """
    student, teacher = _vectors(student_features, teacher_features)
    student, teacher = (unit_vectors(matmul(a, a.T)) for a in (_to_unit_scale(student), _to_unit_scale(teacher)))
    return jnp.sum(jnp.square(student - teacher), axis=-1) / student.shape[0]


@checked
def correlation_congruence(
    student_features: Float[Array, "batch *shape"],
    teacher_features: Float[Array, "..."],
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
) -> Float[Array, " batch"]:
    r"""Distance between both networks' Gaussian kernels of an image with all images of the batch.

    .. math:: \frac{1}{B} \sum_j \left( k(a_i, a_j) - k(b_i, b_j) \right)^2, \qquad
       k(x, y) = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} \langle x, y \rangle^p
       \approx e^{-\gamma |x - y|^2}

    of features at unit norm. Batch-relational: i is the image, j runs over the batch. The student's features a and the
    teacher's b may have any shape. The teacher receives no gradient. Features of zeros have no direction and are taken
    as orthogonal to all others, with a derivative of exactly 0.

    Args:
      student_features: a, `[B, ...]`, flattened.
      teacher_features: b, `[B, ...]`, flattened.
      gamma: inverse width of the kernel, positive; a traced scalar is accepted unchecked.
      order: P, the order of the Taylor expansion, a positive integer.

    Returns:
      One value per image, its row, `[B]`, in at least float32.

    Raises:
      ValueError: if the features are empty or not of the same number of images, `gamma` is not positive, or `order` is
        not a positive integer.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(gj.correlation_congruence(student, teacher).round(4))
      [0.1266 0.1266]

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, 2019, https://arxiv.org/abs/1904.01802. Weight in
      use for this formula: 100, gamma 0.4, order 2 (Knowledge-Distillation-Zoo's script, CIFAR-10). The weight of 0.02
      in RepDistiller's script is that of another formula, which its author was sent: the mean over neighbouring images
      i and i + 1 of :math:`\sum_c |a_{ic} - b_{ic}| \, |a_{i+1,c} - b_{i+1,c}|` of learned embeddings.
    """
    gamma = positive_number("gamma", gamma)
    order = positive_count("order", order)
    student, teacher = (unit_vectors(a) for a in _vectors(student_features, teacher_features))
    gamma = jnp.asarray(gamma, student.dtype)

    def kernel(a: Array) -> Array:
        cosines = matmul(a, a.T)
        term = jnp.full_like(cosines, jnp.exp(-2.0 * gamma))
        terms = [term]
        for power in range(1, order + 1):
            term = term * (2.0 * gamma * cosines) / power
            terms.append(term)
        return sum(terms[1:], start=terms[0])

    return jnp.mean(jnp.square(kernel(student) - kernel(teacher)), axis=-1)


@checked
def relational_distance(
    student_features: Float[Array, "batch *shape"], teacher_features: Float[Array, "..."]
) -> Float[Array, " batch"]:
    r"""Difference between both networks' distances of an image from all images of the batch.

    .. math:: \frac{1}{B} \sum_j \ell \left( \frac{|a_i - a_j|}{\mu_a}, \frac{|b_i - b_j|}{\mu_b} \right), \qquad
       \mu_a = \frac{1}{B (B - 1)} \sum_{i \ne j} |a_i - a_j|

    with the Huber loss :math:`\ell`, quadratic up to a difference of 1. Batch-relational: i is the image, j runs over
    the batch, and the mean distance is the whole batch's. The student's features a and the teacher's b may have any
    shape. The teacher receives no gradient. The derivative of a distance of 0 is taken as 0; where all images coincide
    all distances are 0. Distances are computed from differences, not from scalar products, which cancel, for 16 images
    at a time and again for the derivative, so that :math:`B^2 d` numbers are never held in memory.

    Args:
      student_features: a, `[B, ...]`, flattened.
      teacher_features: b, `[B, ...]`, flattened.

    Returns:
      One value per image, its row, `[B]`, in at least float32.

    Raises:
      ValueError: if the features are empty or not of the same number of images.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0, 3.0], [0.0, 4.0], [0.0, 3.0]])
      >>> print(gj.relational_distance(student, teacher).round(4))
      [0.4271 0.1875 0.4271]

    References:
      Park et al., Relational Knowledge Distillation, 2019, https://arxiv.org/abs/1904.05068. Published weight: 25, on
      pooled features, together with 50 on `relational_angle` (the paper's 1 to 2; the figures are those of RepDistiller
      and mdistiller). They are the authors' defaults for classification too, where the features are brought to unit
      norm first and soft targets are added (T 4, weight 16 without a factor T^2). The reference code takes the mean
      over all B^2 pairs, as here, those of an image with itself included.
    """
    student, teacher = _vectors(student_features, teacher_features)
    student, teacher = _relative_distances(_to_unit_scale(student)), _relative_distances(_to_unit_scale(teacher))
    return jnp.mean(optax.losses.huber_loss(student - teacher), axis=-1)


@checked
def relational_angle(
    student_features: Float[Array, "batch *shape"], teacher_features: Float[Array, "..."]
) -> Float[Array, " batch"]:
    r"""Difference between both networks' angles at an image, between all pairs of images of the batch.

    .. math:: \frac{1}{B^2} \sum_{jk} \ell \left( \langle e_{ij}, e_{ik} \rangle,
       \langle f_{ij}, f_{ik} \rangle \right), \qquad
       e_{ij} = \frac{a_j - a_i}{|a_j - a_i|}, \quad f_{ij} = \frac{b_j - b_i}{|b_j - b_i|}

    with the Huber loss :math:`\ell` of cosines, quadratic up to a difference of 1. Batch-relational: i is the image at
    the vertex of the angle, j and k run over the batch. The student's features a and the teacher's b may have any
    shape. The teacher receives no gradient. Two images that coincide have no direction between them: a cosine of 0,
    with a derivative of exactly 0.

    It costs :math:`B^3` cosines of :math:`d` multiplications each: 1 GFLOP per network for 128 images of 256 numbers,
    and three times that with the derivative. They are computed for 16 images at a time and again for the derivative, so
    that the memory grows as :math:`16 (B^2 + B d)` and not as :math:`B^3 + B^2 d`: 12 MB in this example, for value and
    gradient.

    Args:
      student_features: a, `[B, ...]`, flattened.
      teacher_features: b, `[B, ...]`, flattened.

    Returns:
      One value per image, its row, `[B]`, from 0 to 1.5, in at least float32.

    Raises:
      ValueError: if the features are empty or not of the same number of images.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
      >>> print(gj.relational_angle(student, teacher).round(4))
      [0.1111 0.0095 0.0095]

    References:
      Park et al., Relational Knowledge Distillation, 2019, https://arxiv.org/abs/1904.05068. Published weight: 50, on
      pooled features; see `relational_distance`. The reference code takes the mean over all B^3 triplets, as here,
      degenerate ones included.
    """
    return _angle_differences(*_vectors(student_features, teacher_features))


@checked
def probabilistic_transfer(
    student_features: Float[Array, "batch *shape"], teacher_features: Float[Array, "..."]
) -> Float[Array, " batch"]:
    r"""Divergence of the student's similarities of an image to all images from the teacher's, as probabilities.

    .. math:: \frac{1}{B} \sum_j p_{ij} \ln \frac{p_{ij} + \epsilon}{q_{ij} + \epsilon}, \qquad
       q_{ij} = \frac{1 + \cos(a_i, a_j)}{\sum_l 1 + \cos(a_i, a_l)}, \quad \epsilon = 10^{-7}

    and p is the same for the teacher's features b. Batch-relational: i is the image, j runs over the batch, the image
    itself included. Both may have any shape. The teacher receives no gradient. Features of zeros have no direction and
    are taken as orthogonal to all others, with a derivative of exactly 0.

    Args:
      student_features: a, `[B, ...]`, flattened.
      teacher_features: b, `[B, ...]`, flattened.

    Returns:
      One value per image, its row over B, `[B]`, in nats over B, in at least float32.

    Raises:
      ValueError: if the features are empty or not of the same number of images.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> student, teacher = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(gj.probabilistic_transfer(student, teacher).round(4))
      [0.0283 0.0283]

    References:
      Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, 2018,
      https://arxiv.org/abs/1803.10837. Published weight: 30000, on pooled features (RepDistiller's script, mdistiller's
      defaults). Their code, the authors', takes the mean over all B^2 pairs where the paper sums: hence the 1 / B here
      and the size of the weight. It adds epsilon to the norms of the features, too; here they are divided by as they
      are.
    """
    student, teacher = (unit_vectors(a) for a in _vectors(student_features, teacher_features))

    def probabilities(a: Array) -> Array:
        similarities = jnp.maximum(1.0 + matmul(a, a.T), 0.0)  # rounding may go below a cosine of -1
        return similarities / jnp.sum(similarities, axis=-1, keepdims=True)

    q, p = probabilities(student), probabilities(teacher)
    return jnp.mean(p * (jnp.log(p + _PROBABILITY_FLOOR) - jnp.log(q + _PROBABILITY_FLOOR)), axis=-1)


@checked
def contrastive_representation(
    student_embeddings: Float[Array, "batch *width"],
    teacher_embeddings: Float[Array, "..."],
    *,
    labels: Int[Array, "..."] | None = None,
    temperature: Scalar = 0.07,
) -> Float[Array, " batch"]:
    r"""Noise-contrastive estimation of which of the batch's embeddings are two views of the same image.

    .. math:: -\ln h(s_i, t_i) - \sum_{j \in N_i} \ln(1 - h(s_i, t_j))
       - \ln h(s_i, t_i) - \sum_{j \in N_i} \ln(1 - h(s_j, t_i)), \qquad
       h(s, t) = \frac{e^{\cos(s, t) / T}}{e^{\cos(s, t) / T} + |N_i| \, c}

    Batch-relational. :math:`N_i` are the negatives of image i. First the student's embedding is the anchor, then the
    teacher's. c is the mean of :math:`e^{\cos(s_j, t_k) / T}` over all pairs of the batch that are negatives, a
    constant in differentiation.

    **The teacher's embeddings receive a gradient**, unlike any other teacher argument in this package: both embeddings
    are learned linear maps of the pooled features, trained with the student. If you pass features of the teacher
    itself, stop the gradient before that map.

    This is the in-batch form. The negatives are the B - 1 other images of the batch, not 16,384 from a memory bank. So
    there is no state to keep, and the negatives are embedded by the current networks and receive gradients, whereas the
    bank's are running means of earlier epochs. But the bound on the mutual information, which is at most the logarithm
    of the number of negatives, is lower (4.1 nats at a batch of 64, 9.7 with the bank), the value is smaller (about
    :math:`2 \ln B + 2` where nothing is learned yet), and a large batch helps. Without `labels` the negatives include
    images of the same class. With `labels` those are left out, as in the reference's sampling of negatives. An image
    without negatives (a batch of one, or all labels equal) has the value 0 and no gradient.

    Args:
      student_embeddings: s, `[B, d]`; normalised here. Zeros count as orthogonal to all others.
      teacher_embeddings: t, `[B, d]`, the same width.
      labels: classes of the images, `[B]`; None: every other image is a negative.
      temperature: `T`, positive; a traced scalar is accepted unchecked.

    Returns:
      One value per image, `[B]`, in nats, in at least float32.

    Raises:
      ValueError: if the shapes differ, `labels` is not one per image, or `temperature` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> embeddings = jnp.eye(4)
      >>> print(gj.contrastive_representation(embeddings, embeddings).round(4))
      [1.7261 1.7261 1.7261 1.7261]
      >>> print(gj.contrastive_representation(jnp.ones((4, 4)), embeddings).round(2))
      [4.5 4.5 4.5 4.5]

    References:
      Tian, Krishnan and Isola, Contrastive Representation Distillation, 2020, https://arxiv.org/abs/1910.10699.
      Published weight: 0.8 beside a cross-entropy of weight 1, embeddings of width 128, T 0.07 (RepDistiller's script
      and defaults, mdistiller's), with the bank. The reference code measures c on the first batch of the run, over
      positives too, and keeps it, one for each direction.
    """
    shape = student_embeddings.shape
    if len(shape) != 2 or 0 in shape or shape != teacher_embeddings.shape:
        raise ValueError(
            f"student_embeddings and teacher_embeddings must have the same shape [B, d], not empty, "
            f"got {shape} and {teacher_embeddings.shape}"
        )
    batch = shape[0]
    if labels is None:
        labels = jnp.arange(batch)
    if labels.shape != (batch,):
        raise ValueError(f"labels must be one per image, shape {(batch,)}, got {labels.shape}")
    temperature = positive_number("temperature", temperature)

    student, teacher = upcast(student_embeddings, teacher_embeddings)
    scores = matmul(unit_vectors(student), unit_vectors(teacher).T) / jnp.asarray(temperature, student.dtype)
    is_negative = labels[:, None] != labels[None, :]
    negatives = jnp.sum(is_negative, axis=-1)
    at_least_one = jnp.maximum(negatives, 1).astype(scores.dtype)
    log_total = jax.nn.logsumexp(jax.lax.stop_gradient(scores), where=is_negative)
    log_c = jnp.where(jnp.any(is_negative), log_total - jnp.log(jnp.sum(at_least_one)), 0.0)

    def anchored(scores: Array) -> Array:
        log_odds = scores - log_c - jnp.log(at_least_one)[:, None]  # of h against 1 - h
        repelled = jnp.sum(jnp.where(is_negative, jax.nn.softplus(log_odds), 0.0), axis=-1)
        return jnp.where(negatives > 0, jax.nn.softplus(-jnp.diagonal(log_odds)) + repelled, 0.0)

    return anchored(scores) + anchored(scores.T)


def _probabilities(
    student_logits: Array, teacher_logits: Array, temperature: Scalar
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"], Float[Array, ""]]:
    """Both networks' softened probabilities, the teacher's without gradient, and the temperature in their dtype."""
    student, teacher, temperature = softened(student_logits, teacher_logits, temperature)
    if student.ndim != 2:
        raise ValueError(f"student_logits must have the shape [B, K], got {student.shape}")
    return jax.nn.softmax(student), jax.nn.softmax(teacher), temperature


def _vectors(
    student_features: Array, teacher_features: Array
) -> tuple[Float[Array, "batch _"], Float[Array, "batch _"]]:
    """Both networks' features, one vector per image, in one dtype, the teacher's without gradient.

    Raises:
      ValueError: if the features are empty or not of the same number of images.
    """
    shapes = student_features.shape, teacher_features.shape
    if any(len(shape) == 0 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"student_features and teacher_features must be features [B, ...] of the same images, not empty, "
            f"got {shapes[0]} and {shapes[1]}"
        )
    student, teacher = upcast(student_features, jax.lax.stop_gradient(teacher_features))
    return student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)


def _to_unit_scale(x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    """Divided by the largest magnitude as a constant, for functions that do not depend on the scale."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    return x / jnp.where(largest < jnp.finfo(x.dtype).tiny, 1.0, largest)


def _gram_distance(student: Float[Array, "rows width"], teacher: Float[Array, "rows width"]) -> Float[Array, " rows"]:
    """Squared distance between the rows of both matrices of scalar products."""
    return jnp.sum(jnp.square(matmul(student, student.T) - matmul(teacher, teacher.T)), axis=-1)


# This and the next are compiled on their own: outside of jit a loop over new closures is compiled at every call.
@jax.jit
def _relative_distances(x: Float[Array, "batch width"]) -> Float[Array, "batch batch"]:
    """Distances between all vectors over their mean; 0 where all of them coincide."""

    def distances_from(anchor: Array) -> Array:
        return safe_sqrt(jnp.sum(jnp.square(x - anchor[None]), axis=-1))

    distances = _over_anchors(distances_from, x)
    mean = jnp.sum(distances) / max(len(x) * (len(x) - 1), 1)
    return distances / jnp.where(mean == 0.0, 1.0, mean)


@jax.jit
def _angle_differences(
    student: Float[Array, "batch width"], teacher: Float[Array, "batch other_width"]
) -> Float[Array, " batch"]:
    """Mean difference between both networks' cosines at every vector."""

    def value_at(student_anchor: Array, teacher_anchor: Array) -> Array:
        student_cosines, teacher_cosines = (
            matmul(directions, directions.T)
            for directions in (
                unit_vectors(student - student_anchor[None]),
                unit_vectors(teacher - teacher_anchor[None]),
            )
        )
        return jnp.mean(optax.losses.huber_loss(student_cosines - teacher_cosines))

    return _over_anchors(value_at, student, teacher)


def _over_anchors(function: Callable[..., Array], *vectors: Float[Array, "batch _"]) -> Float[Array, "batch ..."]:
    """The function applied to every row, a few rows at a time; it is computed again for the derivative."""
    return jax.lax.map(
        lambda rows: jax.checkpoint(function)(*rows), vectors, batch_size=min(len(vectors[0]), _ANCHORS_AT_ONCE)
    )
