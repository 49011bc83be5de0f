"""Wasserstein distances in closed form: between Gaussians, and along directions.

No solver and no iterations: cheap, and none of them loads OTT-JAX.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import Scalar, checked, positive_count, positive_number
from .._numerics import matmul, safe_sqrt, upcast


@checked
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
    x: Float[Array, "*batch points width"], y: Float[Array, "*batch others width"], *, mean_weight: Scalar = 1.0
) -> Float[Array, "*batch"]:
    """`gaussian_wasserstein` of clouds whose numbers of points may differ: maps of two networks, `[..., n or m, d]`.

    `mean_weight` is the weight of the means' part; that of the standard deviations' is 1.
    """
    x, y = upcast(x, jax.lax.stop_gradient(y))
    means = jnp.mean(x, axis=-2) - jnp.mean(y, axis=-2)
    deviations = safe_sqrt(jnp.var(x, axis=-2)) - safe_sqrt(jnp.var(y, axis=-2))
    return jnp.sum(jnp.asarray(mean_weight, x.dtype) * jnp.square(means) + jnp.square(deviations), axis=-1)


@checked
def wasserstein_gaussians(
    student_map: Float[Array, "batch h w c"],
    teacher_map: Float[Array, "..."],
    *,
    mean_weight: Scalar = 4.0,
    grid: int = 1,
) -> Float[Array, " batch"]:
    r"""WKD-F: squared 2-Wasserstein distance between the Gaussians of both maps, the means weighted against the rest.

    .. math:: \frac{1}{g^2} \sum_{\text{cells}} \gamma \, |\mu_s - \mu_t|^2 + |\sigma_s - \sigma_t|^2

    with the mean and the standard deviation of every channel over the positions of a cell of the `g x g` grid, summed
    over the channels (`gaussian_wasserstein` for one cell and :math:`\gamma = 1`). The teacher receives no gradient.

    Published: :math:`\gamma` 4, one cell and the weight .08 (ResNet-32x4 to ResNet-8x4 on CIFAR-100, the last map, the
    student's through a 1 x 1 convolution, BatchNorm and ReLU; the weight decays by a half cosine after epoch 150 of
    240); for ImageNet :math:`\gamma` 2. Where the number of channels differs, such a projection has to come first.
    Heights and widths may differ here; the reference code's projection gives the student's map the teacher's size
    (`Regressor`). Its last map in MobileNetV2 and ShuffleNetV2 is that before the last 1x1 convolution, stage -2 here;
    in the wide residual networks it is that before the last normalisation and ReLU, no stage here. It takes the
    unbiased variance and adds 1e-5 to it; here it is the biased one with nothing added, and a channel constant over a
    cell has the derivative 0 there.

    Args:
      student_map: the student's maps, `[B, h, w, c]`.
      teacher_map: the teacher's, `[B, h', w', c]`.
      mean_weight: :math:`\gamma`, positive.
      grid: cells `g` along either side, a positive integer, at most the smaller map's height and width. Where it does
        not divide them, neighbouring cells overlap by one position (as in adaptive pooling).

    Returns:
      One value per example, `[B]`, in squared units of the maps, in at least float32.

    Raises:
      ValueError: if batch or channels differ, `grid` does not fit, or `mean_weight` is not positive.

    Examples:
      >>> import jax.numpy as jnp, gompertz_jax as gj
      >>> teacher = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> print(gj.wasserstein_gaussians(teacher + 1.0, teacher))
      [4.]

    References:
      Lv, Yang and Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation, 2024,
      https://arxiv.org/abs/2412.08139. The authors' repository could not be read, only copies of it. The numbers are
      those of `configs/cifar100/wkd_f` in Changhy26/WKL. hanna6666/wassterin_dill has .08, :math:`\gamma` 8, where
      WKD-L is added, and :math:`\gamma` 2 for ImageNet; hainn2803/WKD has .006 and .008 under names of its own runs.
    """
    shape, other = student_map.shape, teacher_map.shape
    if len(other) != 4 or (shape[0], shape[3]) != (other[0], other[3]):
        raise ValueError(
            f"student_map and teacher_map must have the shapes [B, h, w, c] and [B, h', w', c], got {shape} and {other}"
        )
    grid = positive_count("grid", grid)
    smallest = min(*shape[1:3], *other[1:3])
    if grid > smallest:
        raise ValueError(f"grid must be at most {smallest}, the smallest side of both maps, got {grid}")
    mean_weight = positive_number("mean_weight", mean_weight)

    def cell(maps: Array, row: int, column: int) -> Array:
        # From the floor to the ceiling, so that every position is in a cell.
        (top, bottom), (left, right) = (
            (index * size // grid, -(-(index + 1) * size // grid))
            for index, size in zip((row, column), maps.shape[1:3], strict=True)
        )
        return maps[:, top:bottom, left:right].reshape(len(maps), -1, maps.shape[-1])

    cells = [
        gaussian_distance(cell(student_map, row, column), cell(teacher_map, row, column), mean_weight=mean_weight)
        for row in range(grid)
        for column in range(grid)
    ]
    return jnp.mean(jnp.stack(cells), axis=0)


@checked
def sliced_wasserstein(
    x: Float[Array, "*batch points width"],
    y: Float[Array, "..."],
    *,
    key: PRNGKeyArray,
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
    x, y = upcast(x, jax.lax.stop_gradient(y))
    directions = jax.random.normal(key, (num_projections, x.shape[-1]), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    projected_x, projected_y = (jnp.sort(matmul(directions, jnp.swapaxes(cloud, -1, -2)), axis=-1) for cloud in (x, y))
    return jnp.mean(jnp.square(projected_x - projected_y), axis=(-2, -1))


def _check_same_clouds(x: Array, y: Array) -> None:
    if x.ndim < 2 or x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape [..., n, d], got {x.shape} and {y.shape}")
    if 0 in x.shape[-2:]:
        raise ValueError(f"x and y must have at least one point and one dimension, got {x.shape}")
