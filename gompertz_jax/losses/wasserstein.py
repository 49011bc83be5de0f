"""Distances between clouds of feature vectors: entropic optimal transport (OTT-JAX) and its cheap relatives.

A cloud is `[n, d]`, for instance the positions of a feature map in channel space; all of its points weigh the same.
Importing this module imports OTT-JAX, and with it Flax: `gompertz_jax` loads it on first use.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.acceleration import Momentum
from ott.solvers.linear.sinkhorn import Sinkhorn

from .._numerics import Scalar, matmul, positive_count, positive_number, raised

# Looking at the error costs half an iteration, looking too rarely costs iterations that were not needed.
_ITERATIONS_BETWEEN_CHECKS = 5

# Potentials are known to one machine epsilon of the cost, and the plan is the exponential of their difference over the
# regularisation: with less regularisation than this the plan would be rounding error, or overflow.
_MACHINE_EPSILONS_RESOLVED = 64


class SinkhornDiagnostics(NamedTuple):
    """How the Sinkhorn iterations ended, per example; of the worst of its three problems where `debiased`.

    Attributes:
      converged: whether the marginal error fell below the threshold, `[...]`.
      iterations: number of iterations that were run, `[...]`.
      marginal_error: how far the plan's marginals are from uniform: the larger one of the two absolute differences,
        each summed over the points; 0 to 2, `[...]`.
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
    debiased: bool = ...,
    return_diagnostics: Literal[True],
    threshold: Scalar = ...,
    max_iterations: int = ...,
) -> tuple[Float[Array, "*batch"], SinkhornDiagnostics]: ...


def sinkhorn_distance(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    *,
    epsilon: Scalar = 0.05,
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
    `epsilon` at 64 machine epsilons, 8e-6 in float32). The value is in squared units of the points. It is that of the
    dual problem: a lower bound, flat at the optimum, and so more exact than the plan.

    The gradient with respect to `x` is :math:`\langle P, \partial C / \partial x \rangle` at the optimal `P` (envelope
    theorem), without differentiation through the iterations. In it `e` is a constant: the term that is left out is
    :math:`\epsilon \, \mathrm{KL}(P \,\|\, a b^\top) \, \partial \overline{C} / \partial x`. Neither `y` (the
    teacher's cloud) nor `epsilon` receives a gradient. Second derivatives are not defined and raise: keep transport
    outside an inner gradient.

    :math:`W_e(x, x)` is not 0. With `debiased`, the result is the Sinkhorn divergence
    :math:`W_e(x, y) - W_e(x, x) / 2 - W_e(y, y) / 2`, all three at the `e` of the first, which is 0 for equal clouds
    up to the threshold (so it can come out slightly below 0).

    Args:
      x: the student's clouds, `[..., n, d]`.
      y: the teacher's clouds, `[..., m, d]`, with the same leading axes.
      epsilon: regularisation relative to the mean cost, positive; may be a traced scalar (a schedule inside the step).
        A smaller one is closer to unregularised transport and takes many more iterations; below about 1e-3 float32
        does not resolve the plan.
      debiased: subtract the self terms.
      return_diagnostics: also return a `SinkhornDiagnostics`.
      threshold: marginal error at which an example is done, positive. At the default, the value is within 1e-4 and the
        gradient within .3 % of the limit (measured: 64 points in 64 dimensions, `epsilon` .05 and .01).
      max_iterations: iterations after which an example is given up, in steps of 5; its value is then a lower bound
        and `converged` is False.

    Returns:
      One value per example, `[...]`, in at least float32; with `return_diagnostics` a pair of it and the diagnostics.

    Raises:
      ValueError: if the shapes do not fit, a cloud is empty, or `epsilon`, `threshold` or `max_iterations` is not
        positive.
      NotImplementedError: if it is differentiated twice with respect to `x`.

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
      Transport and MMD using Sinkhorn Divergences, 2019, https://arxiv.org/abs/1810.08278. Cuturi et al., Optimal
      Transport Tools (OTT), 2022, https://arxiv.org/abs/2201.12324.
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must have the shapes [..., n, d] and [..., m, d], got {x.shape} and {y.shape}")
    if 0 in x.shape[-2:] or 0 in y.shape[-2:]:
        raise ValueError(f"x and y must have at least one point and one dimension, got {x.shape} and {y.shape}")
    epsilon = positive_number("epsilon", epsilon)
    threshold = positive_number("threshold", threshold)
    max_iterations = positive_count("max_iterations", max_iterations)

    x, y = raised(x, y)
    batch = x.shape[:-2]
    value, gradient, diagnostics = _transport(
        jax.lax.stop_gradient(x).reshape(-1, *x.shape[-2:]),
        jax.lax.stop_gradient(y).reshape(-1, *y.shape[-2:]),
        jax.lax.stop_gradient(jnp.maximum(epsilon, _MACHINE_EPSILONS_RESOLVED * jnp.finfo(x.dtype).eps)).astype(
            x.dtype
        ),
        jax.lax.stop_gradient(jnp.asarray(threshold, x.dtype)),
        debiased=bool(debiased),
        max_iterations=max_iterations,
    )
    value = _with_gradient(x, value.reshape(batch), gradient.reshape(x.shape))
    if not return_diagnostics:
        return value
    return value, SinkhornDiagnostics(*(field.reshape(batch) for field in diagnostics))


@jax.custom_jvp
def _with_gradient(x: Array, value: Array, gradient: Array) -> Array:
    """The value, whose gradient with respect to `x` is declared to be `gradient`."""
    return value


@_with_gradient.defjvp
def _with_gradient_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, value, gradient = primals
    return value, jnp.sum(_first_order(gradient, x) * tangents[0], axis=(-2, -1))


@jax.custom_jvp
def _first_order(gradient: Array, x: Array) -> Array:
    """The gradient, which is no differentiable function of `x`: it would look constant, and be wrong in silence."""
    return gradient


@_first_order.defjvp
def _first_order_jvp(primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(
        "second derivatives of sinkhorn_distance are not defined; keep transport outside the inner gradient"
    )


# Compiled on its own, so that calls outside of jit do not trace and compile the iterations anew.
@partial(jax.jit, static_argnames=("debiased", "max_iterations"))
def _transport(
    x: Array, y: Array, epsilon: Array, threshold: Array, *, debiased: bool, max_iterations: int
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Value `[B]`, gradient with respect to x `[B, n, d]`, and diagnostics of clouds `[B, n, d]` and `[B, m, d]`."""
    # A shift common to both clouds changes nothing but the rounding of |x|^2 + |y|^2 - 2 <x, y>.
    center = 0.5 * (jnp.mean(x, axis=-2, keepdims=True) + jnp.mean(y, axis=-2, keepdims=True))
    x, y = x - center, y - center
    cost = _squared_distances(x, y)
    # Dividing by the mean cost makes epsilon the absolute strength, and the iterations blind to the scale.
    scale = jnp.maximum(jnp.mean(cost, axis=(-2, -1)), jnp.finfo(cost.dtype).tiny)
    solve = partial(_solve, scale=scale, epsilon=epsilon, threshold=threshold, max_iterations=max_iterations)

    value, plan, diagnostics = solve(cost)
    gradient = 2.0 * (jnp.sum(plan, axis=-1, keepdims=True) * x - matmul(plan, y))
    if debiased:
        student, student_plan, student_diagnostics = solve(_squared_distances(x, x), symmetric=True)
        teacher, _, teacher_diagnostics = solve(_squared_distances(y, y), symmetric=True)
        value = value - 0.5 * (student + teacher)
        # x is both arguments of its self term, and the plan is symmetric: twice the gradient, halved.
        gradient = gradient - 2.0 * (jnp.sum(student_plan, axis=-1, keepdims=True) * x - matmul(student_plan, x))
        converged, iterations, error = zip(diagnostics, student_diagnostics, teacher_diagnostics, strict=True)
        diagnostics = (
            jnp.all(jnp.stack(converged), axis=0),
            jnp.max(jnp.stack(iterations), axis=0),
            jnp.max(jnp.stack(error), axis=0),
        )
    return value, gradient, diagnostics


def _squared_distances(x: Array, y: Array) -> Array:
    squared_norms = jnp.sum(jnp.square(x), axis=-1)[..., :, None] + jnp.sum(jnp.square(y), axis=-1)[..., None, :]
    return jnp.maximum(squared_norms - 2.0 * matmul(x, jnp.swapaxes(y, -1, -2)), 0.0)


def _solve(
    cost: Array,
    *,
    scale: Array,
    epsilon: Array,
    threshold: Array,
    max_iterations: int,
    symmetric: bool = False,
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Value, plan and diagnostics at `e = epsilon * scale` for costs `[B, n, m]` and scales `[B]`."""
    solver = Sinkhorn(
        lse_mode=True,
        threshold=threshold,  # pyright: ignore[reportArgumentType] (a leaf of OTT's solver; any scalar)
        inner_iterations=min(_ITERATIONS_BETWEEN_CHECKS, max_iterations),
        max_iterations=max_iterations,
        # Both potentials of a cloud against itself are equal: averaging the parallel updates converges in a few steps
        # (Feydy et al., section 3.3; the setting of OTT's sinkhorn_divergence).
        parallel_dual_updates=symmetric,
        momentum=Momentum(value=0.5 if symmetric else 1.0),
    )

    cost = cost / scale[:, None, None]
    # On a CPU one example after the other is two to seven times as fast as all in lockstep, where every example pays
    # for the slowest and for a marginal error at each iteration. An accelerator needs the whole batch at once.
    f, g, converged, iterations = jax.lax.platform_dependent(
        cost, epsilon, cpu=partial(_iterate_in_turn, solver), default=partial(_iterate_in_lockstep, solver)
    )
    n, m = cost.shape[-2:]
    plan = jnp.exp((f[:, :, None] + g[:, None, :] - cost) / epsilon)
    rows, columns = jnp.sum(plan, axis=-1), jnp.sum(plan, axis=-2)
    error = jnp.maximum(
        jnp.sum(jnp.abs(rows - 1.0 / n), axis=-1),
        jnp.sum(jnp.abs(columns - 1.0 / m), axis=-1),
    )
    # The dual value. OTT's potentials contain the weights, e ln a and e ln b: its plan is exp((f + g - C) / e).
    dual = (
        jnp.mean(f, axis=-1)
        + jnp.mean(g, axis=-1)
        + epsilon * (jnp.log(jnp.asarray(n * m, cost.dtype)) + 1.0 - jnp.sum(rows, axis=-1))
    )
    return scale * dual, plan, (converged, iterations, error)


def _iterate(solver: Sinkhorn, cost: Array, epsilon: Array) -> tuple[Array, Array, Array, Array]:
    # OTT annotates for the untraced case only.
    output: Any = solver(LinearProblem(Geometry(cost, epsilon=epsilon)))  # pyright: ignore[reportArgumentType]
    return output.f, output.g, output.converged, output.n_iters


def _iterate_in_turn(solver: Sinkhorn, cost: Array, epsilon: Array) -> tuple[Array, Array, Array, Array]:
    return jax.lax.map(lambda one: _iterate(solver, one, epsilon), cost)


def _iterate_in_lockstep(solver: Sinkhorn, cost: Array, epsilon: Array) -> tuple[Array, Array, Array, Array]:
    return jax.vmap(lambda one: _iterate(solver, one, epsilon))(cost)


def gaussian_wasserstein(x: Float[Array, "*batch points width"], y: Float[Array, "..."]) -> Float[Array, "*batch"]:
    r"""Squared 2-Wasserstein distance between two clouds, taken as Gaussians with diagonal covariance.

    .. math:: |\mu_x - \mu_y|^2 + |\sigma_x - \sigma_y|^2

    with the mean and the standard deviation of every dimension over the points. The variance is the biased one, so that
    a cloud of one point has a standard deviation of 0. A dimension in which `x` is constant has no derivative of its
    standard deviation: 0 is used. The teacher's cloud `y` receives no gradient.

    Args:
      x: the student's clouds, `[..., n, d]`.
      y: the teacher's clouds, the same shape.

    Returns:
      One value per example, `[...]`, in squared units of the points, in at least float32.

    Raises:
      ValueError: if the shapes differ, or a cloud is empty.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> x = jnp.array([[0.0], [2.0]])
      >>> print(gj.gaussian_wasserstein(x, 3.0 * x))
      8.0

    References:
      Dowson and Landau, The Frechet Distance between Multivariate Normal Distributions, 1982. In distillation: Lv, Yang
      and Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation, 2024,
      https://arxiv.org/abs/2412.08139.
    """
    _check_same_clouds(x, y)
    return gaussian_distance(x, y)


def gaussian_distance(
    x: Float[Array, "*batch points width"], y: Float[Array, "*batch others width"]
) -> Float[Array, "*batch"]:
    """`gaussian_wasserstein` of clouds whose numbers of points may differ: maps of two networks, `[..., n or m, d]`."""
    x, y = raised(x, jax.lax.stop_gradient(y))
    means = jnp.mean(x, axis=-2) - jnp.mean(y, axis=-2)
    deviations = _standard_deviation(x) - _standard_deviation(y)
    return jnp.sum(jnp.square(means) + jnp.square(deviations), axis=-1)


def _standard_deviation(x: Array) -> Array:
    variance = jnp.var(x, axis=-2)
    # The derivative of the square root is infinite at 0, and 0 * infinity is NaN also in a branch not taken.
    is_constant = variance <= 0
    return jnp.where(is_constant, 0.0, jnp.sqrt(jnp.where(is_constant, 1.0, variance)))


def sliced_wasserstein(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    *,
    key: Array,
    num_projections: int = 64,
) -> Float[Array, "*batch"]:
    r"""Mean over random directions of the squared 2-Wasserstein distance between the projected clouds.

    .. math:: \frac{1}{L} \sum_l \frac{1}{n} \sum_i
       \left( \text{sort}(X \theta_l)_i - \text{sort}(Y \theta_l)_i \right)^2, \qquad |\theta_l| = 1

    The directions are drawn uniformly from the unit sphere and shared by the whole batch. In `d` dimensions a shift of
    the whole cloud by `v` costs about :math:`|v|^2 / d`. The teacher's cloud `y` receives no gradient.

    Args:
      x: the student's clouds, `[..., n, d]`.
      y: the teacher's clouds, the same shape: the same number of points.
      key: a PRNG key; the same key gives the same directions.
      num_projections: number `L` of directions, a positive integer.

    Returns:
      One value per example, `[...]`, in squared units of the points, in at least float32.

    Raises:
      ValueError: if the shapes differ, a cloud is empty, or `num_projections` is not a positive integer.

    Examples:
      >>> import jax, jax.numpy as jnp, gompertz_jax as gj
      >>> x = jnp.array([[0.0], [1.0], [2.0]])
      >>> print(gj.sliced_wasserstein(x, x[::-1] + 3.0, key=jax.random.key(0)))
      9.0

    References:
      Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, 2015,
      https://doi.org/10.1007/s10851-014-0506-3.
    """
    _check_same_clouds(x, y)
    num_projections = positive_count("num_projections", num_projections)
    x, y = raised(x, jax.lax.stop_gradient(y))
    directions = jax.random.normal(key, (num_projections, x.shape[-1]), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    projected_x, projected_y = (jnp.sort(matmul(directions, jnp.swapaxes(cloud, -1, -2)), axis=-1) for cloud in (x, y))
    return jnp.mean(jnp.square(projected_x - projected_y), axis=(-2, -1))


def _check_same_clouds(x: Array, y: Array) -> None:
    if x.ndim < 2 or x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape [..., n, d], got {x.shape} and {y.shape}")
    if 0 in x.shape[-2:]:
        raise ValueError(f"x and y must have at least one point and one dimension, got {x.shape}")
