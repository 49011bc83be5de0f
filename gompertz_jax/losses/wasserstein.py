"""Entropic optimal transport between clouds, between the images of a batch, and between classes.

A cloud is `[n, d]`, for instance the positions of a feature map in channel space; all of its points weigh the same.
Importing this module imports OTT-JAX, and with it Flax: `gompertz_jax` loads it on first use.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, overload

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from .._checks import Scalar, checked, positive_count, positive_number
from .._numerics import upcast
from ._sinkhorn import Transport, resolvable, solve
from .costs import Cost, check_cost, pairwise_costs
from .logits import check_pair


class SinkhornDiagnostics(NamedTuple):
    r"""How the Sinkhorn iterations ended, per example; with `debiased`, for the worst of its three problems.

    Attributes:
      converged: whether the marginal error fell below the threshold, `[...]`.
      iterations: number of iterations that were run, `[...]`.
      marginal_error: how far the plan's marginals are from the given ones: the larger one of the two absolute
        differences, each summed over the points; 0 to 2, `[...]`. With a `marginal_penalty` no marginals are given: it
        is then how far they are from those of the exact minimum at the same potentials, :math:`a e^{-f / \rho}` and
        :math:`b e^{-g / \rho}`, of which the given ones are the limit.
    """

    converged: Bool[Array, "*batch"]
    iterations: Int[Array, "*batch"]
    marginal_error: Float[Array, "*batch"]


@overload
def sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    *,
    epsilon: Scalar = ...,
    cost: Cost = ...,
    marginal_penalty: Scalar | None = ...,
    debiased: bool = ...,
    return_diagnostics: Literal[False] = ...,
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> Float[Array, "*batch"]: ...


@overload
def sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    *,
    epsilon: Scalar = ...,
    cost: Cost = ...,
    marginal_penalty: Scalar | None = ...,
    debiased: bool = ...,
    return_diagnostics: Literal[True],
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> tuple[Float[Array, "*batch"], SinkhornDiagnostics]: ...


@checked
def sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    *,
    epsilon: Scalar = 0.05,
    cost: Cost = "squared_euclidean",
    marginal_penalty: Scalar | None = None,
    debiased: bool = False,
    return_diagnostics: bool = False,
    threshold: Scalar = 1e-3,
    max_iterations: int = 1000,
) -> Float[Array, "*batch"] | tuple[Float[Array, "*batch"], SinkhornDiagnostics]:
    r"""Entropic optimal transport cost between two clouds of points, for every example.

    .. math:: W_e(x, y) = \min_P \, \langle P, C \rangle + e \, \mathrm{KL}(P \,\|\, a b^\top), \qquad
       C_{ij} = |x_i - y_j|^2, \quad P 1 = a = 1/n, \quad P^\top 1 = b = 1/m

    where the strength of the regularisation is relative to the cost of the example at hand,
    :math:`e = \epsilon \, \overline{C}`, so that one `epsilon` means the same on every layer and all through training
    (:math:`\overline{C}` is floored at the smallest normal number, so that two clouds in one point cost 0, and
    `epsilon` at 64 machine epsilons, 8e-6 in float32). The value is in squared units of the points, or the units of
    `cost`. It is that of the dual problem: a lower bound, flat at the optimum, and so more exact than the plan.

    The gradient with respect to `x` is :math:`\langle P, \partial C / \partial x \rangle` at the optimal `P` (envelope
    theorem), without differentiation through the iterations. In it `e` is a constant: the term that is left out is
    :math:`\epsilon \, \mathrm{KL}(P \,\|\, a b^\top) \, \partial \overline{C} / \partial x`. Neither `y` (the
    teacher's cloud) nor `epsilon` receives a gradient. Second derivatives are not defined and raise: keep transport
    outside an inner gradient.

    With a `marginal_penalty` :math:`\rho` the transport is unbalanced: the plan need not use up either cloud, and an
    outlier that is far from everything is given up for about :math:`\rho \, \overline{C}` times its weight,

    .. math:: \min_{P \ge 0} \, \langle P, C \rangle + e \, \mathrm{KL}(P \,\|\, a b^\top)
       + \rho \, \overline{C} \, (\mathrm{KL}(P 1 \,\|\, a) + \mathrm{KL}(P^\top 1 \,\|\, b)), \qquad
       \mathrm{KL}(p \,\|\, q) = \sum_i p_i \ln (p_i / q_i) - p_i + q_i

    The gradient has the same form, at the smaller plan, and the term that is left out includes the penalty's part. As
    :math:`\rho` grows, the value rises to the balanced one; as :math:`\rho` vanishes, the value tends to
    :math:`e \, (1 - \sum_{ij} a_i b_j e^{-C_{ij} / e})`, the cost of deviating from the product, less than `e`.

    :math:`W_e(x, x)` is not 0. With `debiased`, the result is the Sinkhorn divergence
    :math:`W_e(x, y) - W_e(x, x) / 2 - W_e(y, y) / 2`, all three at the `e` (and the penalty) of the first, which is 0
    for equal clouds up to the threshold (so it can come out slightly below 0). The unbalanced divergence has one more
    term, :math:`e \, (m_x - m_y)^2 / 2` in the clouds' masses; here both are 1, so it is 0.

    Args:
      x: the student's clouds, `[..., n, d]`.
      y: the teacher's clouds, `[..., m, d]`, with the same leading axes.
      epsilon: regularisation relative to the mean cost, positive; may be a traced scalar (a schedule inside the step).
        A smaller one is closer to unregularised transport and takes many more iterations; below about 1e-3 float32
        does not resolve the plan.
      cost: "squared_euclidean"; "cosine", :math:`C_{ij} = 1 - \cos(x_i, y_j)`, where a zero vector has the cost 1 and
        the gradient 0; or a function of one pair of clouds, `cost(x [n, d], y [m, d]) -> [n, m]`, without a batch,
        non-negative, and depending on nothing else that changes or is differentiated. It is compiled once for each
        function object: pass the same one again. A bound method counts as the same function, so its object must not
        change. `debiased` needs a symmetric one.
      marginal_penalty: :math:`\rho` relative to the mean cost, positive, or None for balanced transport; may be traced.
        Values above 1e-3 / machine epsilon (8e3 in float32) are reduced to that.
      debiased: subtract the self terms.
      return_diagnostics: also return a `SinkhornDiagnostics`.
      threshold: marginal error at which an example is done, positive. At the default, the value is within 1e-4 and the
        gradient within .3 % of the limit (measured: 64 points in 64 dimensions, `epsilon` .05 and .01); at .01, within
        3e-4 and 1 % (`epsilon` .05).
      max_iterations: iterations after which an example is given up, in steps of 5; its value is then a lower bound
        and `converged` is False.

    Returns:
      One value per example, `[...]`, in at least float32; with `return_diagnostics` a pair of it and the diagnostics.

    Raises:
      ValueError: if the shapes do not fit, a cloud is empty, `cost` is unknown or returns another shape, or `epsilon`,
        `marginal_penalty`, `threshold` or `max_iterations` is not positive.
      NotImplementedError: if it is differentiated twice with respect to `x`, or with respect to an array that `cost`
        reads.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0]])
      >>> y = jnp.array([[0.0, 2.0], [1.0, 2.0], [0.5, 2.0]])
      >>> print(gj.sinkhorn_distance(x, y, epsilon=0.01).round(3))
      4.104
      >>> print(gj.sinkhorn_distance(x, x + 2.0, debiased=True).round(3))
      8.0

    References:
      Cuturi, Sinkhorn Distances, 2013, https://arxiv.org/abs/1306.0895. Feydy et al., Interpolating between Optimal
      Transport and MMD using Sinkhorn Divergences, 2019, https://arxiv.org/abs/1810.08278. Sejourne et al., Sinkhorn
      Divergences for Unbalanced Optimal Transport, 2019, https://arxiv.org/abs/1910.12958. Cuturi et al., Optimal
      Transport Tools (OTT), 2022, https://arxiv.org/abs/2201.12324.
    """
    return _distance(
        x,
        y,
        None,
        epsilon=epsilon,
        cost=cost,
        marginal_penalty=marginal_penalty,
        debiased=debiased,
        return_diagnostics=return_diagnostics,
        threshold=threshold,
        max_iterations=max_iterations,
    )


@overload
def class_sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    labels: Int[Array, "..."],
    *,
    epsilon: Scalar = ...,
    cost: Cost = ...,
    return_diagnostics: Literal[False] = ...,
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> Float[Array, "*batch"]: ...


@overload
def class_sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    labels: Int[Array, "..."],
    *,
    epsilon: Scalar = ...,
    cost: Cost = ...,
    return_diagnostics: Literal[True],
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> tuple[Float[Array, "*batch"], SinkhornDiagnostics]: ...


@checked
def class_sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    labels: Int[Array, "..."],
    *,
    epsilon: Scalar = 0.05,
    cost: Cost = "squared_euclidean",
    return_diagnostics: bool = False,
    threshold: Scalar = 1e-3,
    max_iterations: int = 1000,
) -> Float[Array, "*batch"] | tuple[Float[Array, "*batch"], SinkhornDiagnostics]:
    r"""Transport between the images of a batch inside every class: which image is matched is free, its class is not.

    .. math:: \sum_c \frac{n_c}{n} \, W_e(x_c, y_c), \qquad x_c = \{x_i : \ell_i = c\}, \quad y_c = \{y_i : \ell_i = c\}

    the transport cost of `sinkhorn_distance` inside each class, weighted by the share of the class in the batch. All
    classes are regularised by the same :math:`e = \epsilon \, \overline{C}`, relative to the mean cost over the pairs
    of one class; a single block-diagonal plan is solved for, whatever the number of classes. If all labels differ,
    image i is compared with image i, and the value is the mean of `cost` over these pairs (mean squared distance); if
    all are equal, it is `sinkhorn_distance`. Batch-relational: one value for the whole batch. The gradient is that of
    `sinkhorn_distance`. Label-aware matching of the images of a batch is this project's own form, not a published loss.

    Args:
      x: the student's clouds, one vector per image, `[..., n, d]`.
      y: the teacher's vectors of the same images, the same shape.
      labels: their classes, any integers, `[..., n]`; may be traced.
      epsilon: see `sinkhorn_distance`.
      cost: see `sinkhorn_distance`.
      return_diagnostics: also return a `SinkhornDiagnostics`.
      threshold: see `sinkhorn_distance`; the error is summed over all classes.
      max_iterations: see `sinkhorn_distance`.

    Returns:
      One value per batch, `[...]`, in at least float32; with `return_diagnostics` a pair of it and the diagnostics.

    Raises:
      ValueError: as `sinkhorn_distance`, or if `labels` does not have the shape of `x` without its last axis, or the
        clouds' shapes differ.
      NotImplementedError: if it is differentiated twice with respect to `x`.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> x = jnp.array([[0.0], [1.0], [5.0]])
      >>> y = jnp.array([[1.0], [0.0], [7.0]])
      >>> print(f"{gj.class_sinkhorn_distance(x, y, jnp.array([0, 0, 1]), epsilon=0.01):.2f}")
      1.34
      >>> print(gj.class_sinkhorn_distance(x, y, jnp.array([0, 1, 2])).round(3))
      2.0

    References:
      See `sinkhorn_distance`.
    """
    if x.ndim < 2 or x.shape != y.shape or labels.shape != x.shape[:-1]:
        raise ValueError(
            "x, y and labels must have the shapes [..., n, d], the same and [..., n], "
            f"got {x.shape}, {y.shape} and {labels.shape}"
        )
    return _distance(
        x,
        y,
        labels,
        epsilon=epsilon,
        cost=cost,
        marginal_penalty=None,
        debiased=False,
        return_diagnostics=return_diagnostics,
        threshold=threshold,
        max_iterations=max_iterations,
    )


def _distance(
    x: Array,
    y: Array,
    labels: Array | None,
    *,
    epsilon: Scalar,
    cost: Cost,
    marginal_penalty: Scalar | None,
    debiased: bool,
    return_diagnostics: bool,
    threshold: Scalar,
    max_iterations: int,
) -> Array | tuple[Array, SinkhornDiagnostics]:
    """Check, flatten the leading axes, solve, and declare the gradient."""
    if x.ndim < 2 or y.ndim < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must have the shapes [..., n, d] and [..., m, d], got {x.shape} and {y.shape}")
    if 0 in x.shape[-2:] or 0 in y.shape[-2:]:
        raise ValueError(f"x and y must have at least one point and one dimension, got {x.shape} and {y.shape}")
    epsilon = positive_number("epsilon", epsilon)
    threshold = positive_number("threshold", threshold)
    max_iterations = positive_count("max_iterations", max_iterations)
    if marginal_penalty is not None:
        marginal_penalty = positive_number("marginal_penalty", marginal_penalty)

    x, y = upcast(x, y)
    check_cost(cost, x, y)
    constant = partial(_constant, dtype=x.dtype)
    batch = x.shape[:-2]
    value, gradient, diagnostics = _transport(
        jax.lax.stop_gradient(x).reshape(-1, *x.shape[-2:]),
        jax.lax.stop_gradient(y).reshape(-1, *y.shape[-2:]),
        None if labels is None else labels.reshape(-1, labels.shape[-1]),
        constant(epsilon),
        constant(threshold),
        None if marginal_penalty is None else constant(marginal_penalty),
        cost=cost,
        debiased=bool(debiased),
        max_iterations=max_iterations,
    )
    value = _with_gradient(x, value.reshape(batch), gradient.reshape(x.shape))
    return _with_diagnostics(value, diagnostics) if return_diagnostics else value


def _with_diagnostics(value: Array, diagnostics: tuple[Array, ...]) -> tuple[Array, SinkhornDiagnostics]:
    return value, SinkhornDiagnostics(*(field.reshape(value.shape) for field in diagnostics))


def _constant(value: Scalar, dtype: Any) -> Array:
    return jax.lax.stop_gradient(jnp.asarray(value, dtype))


@jax.custom_jvp
def _with_gradient(x: Array, value: Array, gradient: Array) -> Array:
    """The value, whose gradient with respect to `x` is declared to be `gradient`."""
    return value


def _with_gradient_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Any]:
    x, value, gradient = primals
    to_x, *others = tangents
    if not all(isinstance(tangent, SymbolicZero) for tangent in others):
        raise NotImplementedError(
            "the cost function of an entropic transport reads an array that is differentiated, and would silently get "
            "no gradient for it: keep it constant, jax.lax.stop_gradient(array), or make it part of the points x"
        )
    if isinstance(to_x, SymbolicZero):
        return value, jnp.zeros_like(value)
    return value, jnp.sum(_first_order(gradient, x) * to_x, axis=tuple(range(value.ndim, x.ndim)))


_with_gradient.defjvp(_with_gradient_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _first_order(gradient: Array, x: Array) -> Array:
    """The gradient, marked as not differentiable in `x`: otherwise it would look constant, and be silently wrong."""
    return gradient


@_first_order.defjvp
def _first_order_jvp(primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(
        "second derivatives of sinkhorn_distance are not defined, nor those of the other entropic transport costs; "
        "keep transport outside the inner gradient"
    )


# Compiled on its own, so that calls outside of jit do not trace and compile the iterations anew.
@partial(jax.jit, static_argnames=("cost", "debiased", "max_iterations"))
def _transport(
    x: Array,
    y: Array,
    labels: Array | None,
    epsilon: Array,
    threshold: Array,
    penalty: Array | None,
    *,
    cost: Cost,
    debiased: bool,
    max_iterations: int,
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Value `[B]`, gradient with respect to x `[B, n, d]`, and diagnostics of clouds `[B, n, d]` and `[B, m, d]`."""
    epsilon = resolvable(epsilon)
    if cost == "squared_euclidean":
        # A shift common to both clouds changes nothing but the rounding of |x|^2 + |y|^2 - 2 <x, y>.
        center = 0.5 * (jnp.mean(x, axis=-2, keepdims=True) + jnp.mean(y, axis=-2, keepdims=True))
        x, y = x - center, y - center
    costs, pull_back = pairwise_costs(cost, x, y)
    tiny = jnp.finfo(costs.dtype).tiny
    if labels is None:
        scale = jnp.maximum(jnp.mean(costs, axis=(-2, -1)), tiny)
        between_classes = 0.0
    else:
        same = labels[:, :, None] == labels[:, None, :]
        members = jnp.sum(same, axis=-1, dtype=costs.dtype)
        scale = jnp.maximum(jnp.sum(jnp.where(same, costs, 0.0), axis=(-2, -1)) / jnp.sum(members, axis=-1), tiny)
        costs = jnp.where(same, costs, jnp.inf)
        # The solver's KL is from the product over the whole batch. It exceeds the KL from the products of the classes
        # by the entropy of their shares, whatever the plan.
        between_classes = epsilon * jnp.mean(jnp.log(labels.shape[-1] / members), axis=-1)

    # Dividing by the mean cost makes epsilon the absolute strength, and the iterations independent of the scale.
    def solve_for(costs: Array, *, symmetric: bool = False) -> Transport:
        return solve(
            costs / scale[:, None, None],
            epsilon=epsilon,
            threshold=threshold,
            penalty=penalty,
            max_iterations=max_iterations,
            symmetric=symmetric,
        )

    problems = [solve_for(costs)]
    value, gradient = problems[0].value - between_classes, pull_back(problems[0].plan)
    if debiased:
        student_costs, student_pull_back = pairwise_costs(cost, x, x)
        student = solve_for(student_costs, symmetric=True)
        teacher = solve_for(pairwise_costs(cost, y, y)[0], symmetric=True)
        value = value - 0.5 * (student.value + teacher.value)
        # x is both arguments of its self term, and the plan is symmetric: twice the gradient, halved.
        gradient = gradient - student_pull_back(student.plan)
        problems += [student, teacher]
    diagnostics = (
        jnp.all(jnp.stack([problem.converged for problem in problems]), axis=0),
        jnp.max(jnp.stack([problem.iterations for problem in problems]), axis=0),
        jnp.max(jnp.stack([problem.marginal_error for problem in problems]), axis=0),
    )
    return scale * value, gradient, diagnostics


@overload
def wasserstein_logits(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "..."],
    class_cost: Float[Array, "..."],
    *,
    labels: Int[Array, "..."] | None = ...,
    temperature: Scalar = ...,
    epsilon: Scalar = ...,
    return_diagnostics: Literal[False] = ...,
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> Float[Array, "*batch"]: ...


@overload
def wasserstein_logits(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "..."],
    class_cost: Float[Array, "..."],
    *,
    labels: Int[Array, "..."] | None = ...,
    temperature: Scalar = ...,
    epsilon: Scalar = ...,
    return_diagnostics: Literal[True],
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> tuple[Float[Array, "*batch"], SinkhornDiagnostics]: ...


@checked
def wasserstein_logits(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "..."],
    class_cost: Float[Array, "..."],
    *,
    labels: Int[Array, "..."] | None = None,
    temperature: Scalar = 2.0,
    epsilon: Scalar = 0.05,
    return_diagnostics: bool = False,
    threshold: Scalar = 1e-3,
    max_iterations: int = 1000,
) -> Float[Array, "*batch"] | tuple[Float[Array, "*batch"], SinkhornDiagnostics]:
    r"""WKD-L: transport from the student's class probabilities to the teacher's, at a cost between classes.

    .. math:: \min_P \, \langle P, C \rangle + e \, \mathrm{KL}(P \,\|\, q p^\top), \qquad
       P 1 = q = \mathrm{softmax}(\text{student} / T), \quad P^\top 1 = p = \mathrm{softmax}(\text{teacher} / T)

    where mass between similar classes is cheap, and :math:`e = \epsilon \, \overline{C}`. With `labels` the target
    class of every example is taken out of both distributions, which are softmaxes over the other classes, as published.
    The published loss is

    .. math:: \mathcal{L} = - p_\ell \ln q_\ell + \lambda \, W(\text{other classes})

    whose first part (at temperature 1) is `target_cross_entropy`, and whose second is this function with `labels`.

    The gradient with respect to the student's logits is :math:`q \, (f - \langle q, f \rangle) / T` with the optimal
    potential `f` (envelope theorem); that with respect to the temperature has the teacher's part too. Neither the
    teacher nor `class_cost` receives a gradient; second derivatives raise. The minimum over the student is near
    :math:`q = p` but not exactly there: transport is regularised, and its gradient is accurate only to `threshold`.

    Published: ResNet-32x4 to ResNet-8x4 on CIFAR-100 with :math:`T = 8` and :math:`\lambda = 600`, decaying by a half
    cosine after epoch 150 of 240, next to the cross-entropy of weight 1. The reference code runs 10 iterations that are
    not in the log domain, at `e` .05 in absolute terms, takes :math:`\langle P, C \rangle` alone and differentiates
    through the iterations. Chosen here: `e` relative to the mean of `class_cost`, iterations to convergence, the value
    of the dual problem and its exact gradient.

    **The published weight belongs to that unconverged loss**, and to costs from the kernel alignment of the teacher's
    logits (here: see `ClassDistances`). After 10 iterations the pull fades as the student approaches the teacher; that
    of the converged problem does so only much nearer. On synthetic logits of 100 classes, with one cost for both, its
    gradient was 28 times the reference's where the logits differed by .1, 2.3 times where by 1, and .7 times for an
    untrained student (`docs/wasserstein.md` has the table).

    Args:
      student_logits: unnormalised log-probabilities, `[..., K]`.
      teacher_logits: the same for the teacher, `[..., K]`.
      class_cost: non-negative costs between the student's class and the teacher's, `[K, K]`, for instance from
        `class_distances`.
      labels: target classes, integers from 0 to K - 1, `[...]` (any other label gives NaN); or None to transport
        between all classes.
      temperature: `T`, positive, in units of the logits; may be traced.
      epsilon: regularisation relative to the mean of `class_cost`, positive; may be traced.
      return_diagnostics: also return a `SinkhornDiagnostics`.
      threshold: marginal error at which an example is done, positive.
      max_iterations: see `sinkhorn_distance`.

    Returns:
      One value per example, `[...]`, in units of `class_cost` (without a factor :math:`T^2`), in at least float32; with
      `return_diagnostics` a pair of it and the diagnostics.

    Raises:
      ValueError: if the shapes do not fit, there are fewer than two classes, or `temperature`, `epsilon`, `threshold`
        or `max_iterations` is not positive.
      NotImplementedError: if it is differentiated twice with respect to the student's logits.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> cat_dog_car = jnp.array([[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]])
      >>> teacher = jnp.array([9.0, 0.0, 0.0])
      >>> for student in jnp.array([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]):
      ...     print(gj.wasserstein_logits(student, teacher, cat_dog_car, temperature=1.0).round(3))
      0.1
      1.0

    References:
      Lv, Yang and Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation, 2024,
      https://arxiv.org/abs/2412.08139. The authors' repository could not be read, only copies of it. Their
      `configs/cifar100/wkd_l` has 600 (Changhy26/WKL, hanna6666/wassterin_dill, hainn2803/WKD at 3829f2f) or 800
      (hainn2803/WKD at 0ef7a28), all at T 8.
    """
    check_pair(student_logits, teacher_logits, labels)
    classes = student_logits.shape[-1]
    if class_cost.shape != (classes, classes):
        raise ValueError(f"class_cost must have the shape [K, K], here {(classes, classes)}, got {class_cost.shape}")
    temperature = positive_number("temperature", temperature)
    epsilon = positive_number("epsilon", epsilon)
    threshold = positive_number("threshold", threshold)
    max_iterations = positive_count("max_iterations", max_iterations)

    student, teacher, cost = upcast(
        student_logits, jax.lax.stop_gradient(teacher_logits), jax.lax.stop_gradient(class_cost)
    )
    batch = student.shape[:-1]
    scores = jnp.stack([student, teacher], axis=-2) / jnp.asarray(temperature, student.dtype)
    is_legal: bool | Array = True
    if labels is not None:
        is_target = labels[..., None] == jnp.arange(classes)
        is_legal = jnp.any(is_target, axis=-1)
        # After the division: the derivative of minus infinity over T is not a number.
        scores = jnp.where(is_target[..., None, :], -jnp.inf, scores)
    probs = jax.nn.softmax(scores)
    constant = partial(_constant, dtype=probs.dtype)
    value, gradient, diagnostics = _transport_of_weights(
        cost,
        jax.lax.stop_gradient(probs).reshape(-1, 2, classes),
        constant(epsilon),
        constant(threshold),
        max_iterations=max_iterations,
    )
    value = jnp.where(is_legal, value.reshape(batch), jnp.nan)
    value = _with_gradient(probs, value, gradient.reshape(probs.shape))
    return _with_diagnostics(value, diagnostics) if return_diagnostics else value


@partial(jax.jit, static_argnames=("max_iterations",))
def _transport_of_weights(
    cost: Array, weights: Array, epsilon: Array, threshold: Array, *, max_iterations: int
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Value `[B]`, its derivative, and diagnostics of pairs of weights `[B, 2, K]` on common points."""
    scale = jnp.maximum(jnp.mean(cost), jnp.finfo(cost.dtype).tiny)
    solution = solve(
        (cost / scale)[None],
        epsilon=resolvable(epsilon),
        threshold=threshold,
        max_iterations=max_iterations,
        weights=(weights[:, 0], weights[:, 1]),
    )
    diagnostics = solution.converged, solution.iterations, solution.marginal_error
    potentials = jnp.stack([solution.potentials, solution.column_potentials], axis=1)
    return scale * solution.value, scale * potentials, diagnostics
