"""Entropic optimal transport on given costs: the iterations, and what is read off their potentials.

The only module that imports OTT-JAX. Costs come divided by their scale, so that `epsilon`, the penalty and the
threshold mean the same at every scale; the losses in `wasserstein.py` make the costs and turn plans into gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int
from ott.geometry.geometry import Geometry
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.acceleration import Momentum
from ott.solvers.linear.sinkhorn import Sinkhorn

# Looking at the error costs half an iteration, looking too rarely costs iterations that were not needed.
_ITERATIONS_BETWEEN_CHECKS = 5

# Potentials are known to one machine epsilon of the cost, and the plan is the exponential of their difference over the
# regularisation: with less regularisation than this the plan would be rounding error, or overflow.
_MACHINE_EPSILONS_RESOLVED = 64


class Transport(NamedTuple):
    """The solution for every example of the batch, in the units of the costs.

    Attributes:
      value: value of the dual problem, `[B]`: a lower bound.
      plan: how much goes from where to where, `[B, n, m]`.
      potentials: derivative of the value with respect to the weights of the rows, up to a constant, `[B, n]`.
      column_potentials: the same for the weights of the columns, `[B, m]`.
      converged: whether the marginal error fell below the threshold, `[B]`.
      iterations: number of iterations that were run, `[B]`.
      marginal_error: the larger one of the two distances of the plan's marginals from what they should be, each summed
        over the points, `[B]`.
    """

    value: Float[Array, " batch"]
    plan: Float[Array, "batch n m"]
    potentials: Float[Array, "batch n"]
    column_potentials: Float[Array, "batch m"]
    converged: Bool[Array, " batch"]
    iterations: Int[Array, " batch"]
    marginal_error: Float[Array, " batch"]


def resolvable(epsilon: Array) -> Array:
    """The strength itself, or the smallest one that its dtype resolves."""
    return jnp.maximum(epsilon, _MACHINE_EPSILONS_RESOLVED * jnp.finfo(epsilon.dtype).eps)


def solve(
    cost: Float[Array, "_ n m"],
    *,
    epsilon: Array,
    threshold: Array,
    max_iterations: int,
    weights: tuple[Float[Array, "batch n"], Float[Array, "batch m"]] | None = None,
    penalty: Array | None = None,
    symmetric: bool = False,
) -> Transport:
    r"""Minimise `<P, C> + e KL(P || a b^T)` over the plans P with the marginals a and b.

    With a penalty rho the marginals are not prescribed but paid for: `rho (KL(P 1 || a) + KL(P^T 1 || b))`, and the
    solution has the marginals `a exp(-f / rho)` and `b exp(-g / rho)` for its potentials f and g.

    Args:
      cost: costs with a mean of about 1, `[B, n, m]`, or `[1, n, m]` for the whole batch. Infinity forbids a pair;
        every row and column needs one that is allowed.
      epsilon: strength e of the regularisation, a scalar that is `resolvable`.
      threshold: marginal error at which an example is done, a scalar.
      max_iterations: iterations after which it is given up, in steps of 5.
      weights: a `[B, n]` and b `[B, m]`, each of sum 1; None: uniform.
      penalty: rho, a scalar; None: the marginals are prescribed.
      symmetric: whether the costs are symmetric and both weights equal.
    """
    n, m = cost.shape[-2:]
    if weights is None:
        weights = jnp.full(cost.shape[:-1], 1.0 / n, cost.dtype), jnp.full((len(cost), m), 1.0 / m, cost.dtype)
    # The logarithm of a weight must be finite; what lies on a point of this weight is below rounding error.
    a, b = (jnp.maximum(weight, jnp.finfo(cost.dtype).tiny) for weight in weights)
    if penalty is None:
        iterate = partial(
            _balanced,
            Sinkhorn(
                lse_mode=True,
                threshold=threshold,  # pyright: ignore[reportArgumentType] (a leaf of OTT's solver; any scalar)
                inner_iterations=min(_ITERATIONS_BETWEEN_CHECKS, max_iterations),
                max_iterations=max_iterations,
                # Both potentials of a cloud against itself are equal: averaging the parallel updates converges in a
                # few steps (Feydy et al., section 3.3; the setting of OTT's sinkhorn_divergence).
                parallel_dual_updates=symmetric,
                momentum=Momentum(value=0.5 if symmetric else 1.0),
            ),
            epsilon,
        )
    else:
        # Above this bound the potentials' rounding error would be multiplied up; the marginals are as good as given.
        penalty = jnp.minimum(resolvable(penalty), 1e-3 / jnp.finfo(cost.dtype).eps)
        iterate = partial(_unbalanced, epsilon, penalty, threshold, max_iterations)
    # On a CPU one example after the other is two to seven times as fast as all in lockstep, where every example pays
    # for the slowest and for a marginal error at each iteration. An accelerator needs the whole batch at once.
    f, g, converged, iterations = jax.lax.platform_dependent(
        cost, a, b, cpu=partial(_in_turn, iterate), default=partial(_in_lockstep, iterate)
    )
    plan = jnp.exp((f[:, :, None] + g[:, None, :] - cost) / epsilon)
    rows, columns = jnp.sum(plan, axis=-1), jnp.sum(plan, axis=-2)
    # OTT's potentials contain the weights, e ln a and e ln b, so that its plan is exp((f + g - C) / e).
    f, g = f - epsilon * jnp.log(a), g - epsilon * jnp.log(b)
    if penalty is None:
        wanted_rows, wanted_columns, paid = a, b, jnp.sum(a * f, axis=-1) + jnp.sum(b * g, axis=-1)
    else:
        wanted_rows, wanted_columns = a * jnp.exp(-f / penalty), b * jnp.exp(-g / penalty)
        paid = -penalty * (
            jnp.sum(a * jnp.expm1(-f / penalty), axis=-1) + jnp.sum(b * jnp.expm1(-g / penalty), axis=-1)
        )
    return Transport(
        value=paid + epsilon * (1.0 - jnp.sum(rows, axis=-1)),
        plan=plan,
        potentials=f,
        column_potentials=g,
        converged=converged,
        iterations=iterations,
        marginal_error=jnp.maximum(
            jnp.sum(jnp.abs(rows - wanted_rows), axis=-1), jnp.sum(jnp.abs(columns - wanted_columns), axis=-1)
        ),
    )


def _balanced(solver: Sinkhorn, epsilon: Array, cost: Array, a: Array, b: Array) -> tuple[Array, Array, Array, Array]:
    # OTT mixes ranks and dtypes, which a code base around this one may refuse.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # OTT annotates for the untraced case only.
        output: Any = solver(
            LinearProblem(Geometry(cost, epsilon=epsilon), a=a, b=b)  # pyright: ignore[reportArgumentType]
        )
    return output.f, output.g, output.converged, output.n_iters


def _unbalanced(
    epsilon: Array, penalty: Array, threshold: Array, max_iterations: int, cost: Array, a: Array, b: Array
) -> tuple[Array, Array, Array, Array]:
    """Damped iterations; OTT's take the damping as a Python number only, here it follows `epsilon`.

    After each pair of updates both potentials are shifted by the best constant. Without it a penalty far above epsilon
    needs penalty / epsilon iterations (Sejourne, Vialard, Peyre, 2022, https://arxiv.org/abs/2201.00730).
    """
    log_a, log_b = jnp.log(a), jnp.log(b)
    damping = penalty / (penalty + epsilon)

    def improve(_: Any, potentials: tuple[Array, Array]) -> tuple[Array, Array]:
        f, _g = potentials
        g = -damping * epsilon * logsumexp((f[:, None] - cost) / epsilon + log_a[:, None], axis=0)
        f = -damping * epsilon * logsumexp((g[None, :] - cost) / epsilon + log_b[None, :], axis=1)
        shift = 0.5 * penalty * (logsumexp(log_a - f / penalty) - logsumexp(log_b - g / penalty))
        return f + shift, g - shift

    def error(f: Array, g: Array) -> Array:
        plan = jnp.exp((f[:, None] + g[None, :] - cost) / epsilon + log_a[:, None] + log_b[None, :])
        rows = jnp.sum(plan, axis=1) - a * jnp.exp(-f / penalty)
        columns = jnp.sum(plan, axis=0) - b * jnp.exp(-g / penalty)
        return jnp.maximum(jnp.sum(jnp.abs(rows)), jnp.sum(jnp.abs(columns)))

    every = min(_ITERATIONS_BETWEEN_CHECKS, max_iterations)

    def body(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        f, g, iterations, _ = state
        f, g = jax.lax.fori_loop(0, every, improve, (f, g))
        return f, g, iterations + every, error(f, g)

    f, g, iterations, last = jax.lax.while_loop(
        lambda state: (state[2] < max_iterations) & (state[3] >= threshold),
        body,
        (jnp.zeros_like(a), jnp.zeros_like(b), jnp.int32(0), jnp.full((), jnp.inf, cost.dtype)),
    )
    return f + epsilon * log_a, g + epsilon * log_b, last < threshold, iterations


_Iterate = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]


def _in_turn(iterate: _Iterate, cost: Array, a: Array, b: Array) -> tuple[Array, Array, Array, Array]:
    if len(cost) < len(a):
        return jax.lax.map(lambda one: iterate(cost[0], *one), (a, b))
    return jax.lax.map(lambda one: iterate(*one), (cost, a, b))


def _in_lockstep(iterate: _Iterate, cost: Array, a: Array, b: Array) -> tuple[Array, Array, Array, Array]:
    if len(cost) < len(a):
        return jax.vmap(partial(iterate, cost[0]))(a, b)
    return jax.vmap(iterate)(cost, a, b)
