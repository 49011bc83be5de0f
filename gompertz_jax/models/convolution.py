"""The convolution rules per backend, and the rectifiers between convolutions. Models know nothing of what is below.

On CPU, XLA has a fast kernel for the plain forward convolution only. The gradients that JAX derives are convolutions
with permuted dimensions and dilations; inside `scan`, `cond` and `map` those leave the fast path and cost 15 to 100
times as much (https://github.com/jax-ml/jax/issues/12868). So the three maps of one convolution (its output, its input
gradient, its weight gradient) are written out here, each as plain forward convolutions.

Each of the three is bilinear, and the derivatives of any of them are the other two:

    <g, output(x, w)> = <input_gradient(g, w), x> = <weight_gradient(x, g), w>

so the rules are closed under reverse-mode differentiation of every order. Forward mode (`jax.jvp`, `jax.jacfwd`,
`jax.hessian`) is not defined, as for every `jax.custom_vjp`.
"""

import functools
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Pair = tuple[int, int]


class _Geometry(NamedTuple):
    """The static sizes of one convolution, each (height, width); padding is ((top, bottom), (left, right))."""

    image: Pair
    kernel: Pair
    strides: Pair
    padding: tuple[Pair, Pair]
    groups: int = 1
    winograd: bool = False

    @property
    def output(self) -> Pair:
        height, width = (
            (size + low + high - taps) // stride + 1
            for size, taps, stride, (low, high) in zip(self.image, self.kernel, self.strides, self.padding, strict=True)
        )
        return height, width


def conv(
    x: Float[Array, "batch height width channels"],
    w: Float[Array, "kernel_height kernel_width channels filters"],
    *,
    strides: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
) -> Float[Array, "batch _ _ filters"]:
    """Two-dimensional cross-correlation, fast in gradients of every order and inside `jax.lax.scan`, also on CPU.

        y[b, i, j, o] = sum_{u, v, c} x[b, s i + u - p, s j + v - p, c] w[u, v, c, o]

    The padding is explicit, so with `((1, 1), (1, 1))` a 3x3 kernel reads the same positions as PyTorch's `padding=1`,
    also at stride 2 (where "SAME" would not).

    Args:
      x: images, `[B, H, W, C]`.
      w: kernel, `[kh, kw, C, O]`, in the dtype of x.
      strides: (vertical, horizontal) step in pixels.
      padding: ((top, bottom), (left, right)) rows and columns of zeros.

    Returns:
      `[B, H', W', O]` in the dtype of x, with `H' = (H + top + bottom - kh) // stride + 1`.

    Raises:
      ValueError: the kernel is larger than the padded image.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gompertz_jax.models.convolution import conv
      >>> x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> conv(x, w, strides=(2, 2), padding=((1, 1), (1, 1)))[0, :, :, 0].tolist()
      [[4.0, 6.0], [6.0, 9.0]]
    """
    geometry = _geometry(x, w, strides, padding)
    if geometry.kernel == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        # A matrix product, whose derivatives are matrix products: nothing is left to choose on any backend.
        return jnp.einsum("bhwc,co->bhwo", x[:, :: strides[0], :: strides[1]], w[0, 0])
    return _output(geometry._replace(winograd=_winograd_pays(geometry, x, w)), x, w)


def depthwise_conv(
    x: Float[Array, "batch height width channels"],
    w: Float[Array, "kernel_height kernel_width 1 channels"],
    *,
    strides: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
) -> Float[Array, "batch _ _ channels"]:
    """Cross-correlation of every channel with its own kernel.

        y[b, i, j, c] = sum_{u, v} x[b, s i + u - p, s j + v - p, c] w[u, v, 0, c]

    Args:
      x: images, `[B, H, W, C]`.
      w: kernels, `[kh, kw, 1, C]`, in the dtype of x.
      strides: (vertical, horizontal) step in pixels.
      padding: ((top, bottom), (left, right)) rows and columns of zeros.

    Returns:
      `[B, H', W', C]` in the dtype of x, with `H' = (H + top + bottom - kh) // stride + 1`.

    Raises:
      ValueError: the kernel is larger than the padded image.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gompertz_jax.models.convolution import depthwise_conv
      >>> x, w = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1))
      >>> depthwise_conv(x, w, padding=((1, 1), (1, 1)))[0, :, :, 0].tolist()
      [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    return _output(_geometry(x, w, strides, padding)._replace(groups=x.shape[3]), x, w)


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The rectifier, whose derivative at 0 is 0.

        y = max(x, 0),    dy = dx where y > 0, else 0

    What `jax.nn.relu` computes, in forward and reverse mode and of every order, but the derivative reads the output,
    which the next convolution keeps anyway. On CPU the compiler has to write output and derivative to memory.

    Args:
      x: any map.

    Returns:
      The same shape and dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from gompertz_jax.models.convolution import relu
      >>> x = jnp.array([-1.0, 0.0, 2.0])
      >>> relu(x).tolist(), jax.grad(lambda x: relu(x).sum())(x).tolist()
      ([0.0, 0.0, 2.0], [0.0, 0.0, 1.0])
    """
    return _rectified(None, x)


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The rectifier that is capped at 6, whose derivative at 0 and at 6 is 0; otherwise as `relu`.

        y = min(max(x, 0), 6),    dy = dx where 0 < y < 6, else 0

    Examples:
      >>> import jax.numpy as jnp
      >>> from gompertz_jax.models.convolution import relu6
      >>> relu6(jnp.array([-1.0, 2.0, 7.0])).tolist()
      [0.0, 2.0, 6.0]
    """
    return _rectified(6.0, x)


def _geometry(x: Array, w: Array, strides: Pair, padding: tuple[Pair, Pair]) -> _Geometry:
    (_, height, width, _), (kernel_height, kernel_width, _, _) = x.shape, w.shape
    geometry = _Geometry((height, width), (kernel_height, kernel_width), strides, padding)
    if min(geometry.output) < 1:
        raise ValueError(f"a kernel of {geometry.kernel} does not fit images of {geometry.image} padded by {padding}")
    return geometry


# The three maps and their derivatives. `platform_dependent` is resolved when a program is lowered for one platform, so
# no branch is left at run time; and inside these custom rules it is never differentiated itself, which would make it
# carry the residuals of every branch.
# `jit` around each traces and lowers a shape once, and networks have few shapes: half of the time before compiling
# (the full step of resnet56 -> resnet20, JAX 0.12, two cores: 6.6 -> 3.3 s). XLA inlines the calls, so that
# the program is the same.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _output(geometry: _Geometry, x: Array, w: Array) -> Array:
    cpu = _shifted_sum if geometry.groups > 1 else _winograd if geometry.winograd else _stock
    return lax.platform_dependent(x, w, cpu=partial(cpu, geometry), default=partial(_stock, geometry))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _input_gradient(geometry: _Geometry, g: Array, w: Array) -> Array:
    if geometry.groups > 1:
        cpu = _shifted_sum_input_gradient
    else:
        cpu = _winograd_input_gradient if geometry.winograd else _plain_input_gradient
    return lax.platform_dependent(g, w, cpu=partial(cpu, geometry), default=partial(_stock_input_gradient, geometry))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
    if geometry.groups > 1:
        cpu = _shifted_sum_weight_gradient
    else:
        cpu = _winograd_weight_gradient if geometry.winograd else _plain_weight_gradient
    return lax.platform_dependent(x, g, cpu=partial(cpu, geometry), default=partial(_stock_weight_gradient, geometry))


def _define_rule(f, backward):
    """Give `f(geometry, a, b)` the reverse rule `backward(geometry, a, b, cotangent)`."""

    # Through f, not through its body: a gradient taken of this function must find f's own rule again.
    # Keep the residuals under a different shape. JAX 0.10 to 0.12 recognises residuals that are plain arguments and
    # looks them up by position; when a scan's gradient is differentiated again, a constant has been prepended to that
    # list and the lookup is off by one.
    def forward(geometry, a, b):
        return f(geometry, a, b), (a[None], b[None])

    f.defvjp(forward, lambda geometry, kept, g: backward(geometry, *(jnp.squeeze(array, 0) for array in kept), g))


def _output_bwd(geometry, x, w, g):
    return _input_gradient(geometry, g, w), _weight_gradient(geometry, x, g)


def _input_gradient_bwd(geometry, g, w, x):
    return _output(geometry, x, w), _weight_gradient(geometry, x, g)


def _weight_gradient_bwd(geometry, x, g, w):
    return _input_gradient(geometry, g, w), _output(geometry, x, w)


_define_rule(_output, _output_bwd)
_define_rule(_input_gradient, _input_gradient_bwd)
_define_rule(_weight_gradient, _weight_gradient_bwd)


# XLA on CPU computes a cheap producer again in each of its readers. A rectifier has many: the convolution, both
# gradients, the shortcut; and through the shortcuts of a stage a reader would repeat the normalisation of every block
# before it. So what is rectified, and its cotangent, are kept.


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rectified(ceiling: float | None, x: Array) -> Array:
    return _kept(jnp.clip(x, 0, ceiling))


@_rectified.defjvp
def _rectified_jvp(ceiling, primals, tangents):
    (x,), (tangent,) = primals, tangents
    y = _rectified(ceiling, x)
    passes = y > 0 if ceiling is None else (y > 0) & (y < ceiling)
    return y, _kept(jnp.where(passes, tangent, 0))


def _kept(x: Array) -> Array:
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


# Every backend but the CPU: XLA's own convolution and the gradients that JAX derives from it.


def _stock(geometry: _Geometry, x: Array, w: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.padding,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=geometry.groups,
    )


def _stock_input_gradient(geometry: _Geometry, g: Array, w: Array) -> Array:
    channels = w.shape[2] * geometry.groups
    x = jax.ShapeDtypeStruct((g.shape[0], *geometry.image, channels), g.dtype)
    (gradient,) = jax.linear_transpose(lambda x: _stock(geometry, x, w), x)(g)
    return gradient


def _stock_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
    w = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3] // geometry.groups, g.shape[3]), x.dtype)
    (gradient,) = jax.linear_transpose(lambda w: _stock(geometry, x, w), w)(g)
    return gradient


# CPU, dense kernels.


def _plain_input_gradient(geometry: _Geometry, g: Array, w: Array) -> Array:
    """The gradient with respect to the image, as one plain convolution per residue of the position modulo the stride.

    Pixel i = s a + r is read by the taps t that are congruent to r + p modulo s, from the outputs (i + p - t) / s.
    """
    (image_h, image_w), (out_h, out_w) = geometry.image, geometry.output
    (stride_h, stride_w), (pad_h, pad_w) = geometry.strides, geometry.padding
    transposed = w.transpose(0, 1, 3, 2)
    phases_h = [_phase(r, image_h, out_h, w.shape[0], stride_h, pad_h[0]) for r in range(stride_h)]
    phases_w = [_phase(r, image_w, out_w, w.shape[1], stride_w, pad_w[0]) for r in range(stride_w)]
    rows = []
    for taps_h, edges_h in phases_h:
        columns = []
        for taps_w, edges_w in phases_w:
            kernel = transposed[taps_h, taps_w][::-1, ::-1]
            if kernel.size == 0:  # a stride longer than the kernel skips these pixels
                steps = (-(-image_h // stride_h), -(-image_w // stride_w))
                columns.append(jnp.zeros((g.shape[0], *steps, kernel.shape[3]), g.dtype))
                continue
            columns.append(
                lax.conv_general_dilated(g, kernel, (1, 1), (edges_h, edges_w), dimension_numbers=_DIMENSIONS)
            )
        rows.append(jnp.stack(columns, 3))
    interleaved = jnp.stack(rows, 2)
    batch, steps_h, _, steps_w, _, channels = interleaved.shape
    full = interleaved.reshape(batch, steps_h * stride_h, steps_w * stride_w, channels)
    return full[:, :image_h, :image_w]


def _phase(residue: int, image: int, output: int, kernel: int, stride: int, padding: int) -> tuple[slice, Pair]:
    """Along one axis: the taps that read the pixels of this residue, and the padding of the cotangent they need."""
    first = (residue + padding) % stride
    count = len(range(first, kernel, stride))
    newest = (residue + padding - first) // stride
    oldest = newest - (count - 1)
    steps = -(-image // stride)
    return slice(first, None, stride), (-oldest, steps - output + newest)


def _plain_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
    """The gradient with respect to the kernel.

    At stride 1, as one plain convolution of image and cotangent, in which input channels take the place of the batch
    and the batch that of the channels. At other strides, as one matrix product per tap.
    """
    if geometry.strides != (1, 1):
        # In scan, batch 128, 16x16x32 -> 64 at stride 2: 4.9 and 2.4 ms (JAX 0.10 and 0.12); as a dilated convolution
        # 7.0 and 7.4 ms. At stride 1 the products lose: 32x32x16 -> 16 takes 19 and 16 ms, the convolution 12 and 8.
        cotangent = g.reshape(-1, g.shape[3])
        shifted = _shifted(x, geometry.kernel, geometry.strides, geometry.padding)
        gradient = jnp.stack([image.reshape(-1, x.shape[3]).T @ cotangent for image in shifted])
        return gradient.reshape(*geometry.kernel, x.shape[3], g.shape[3])
    rows, columns = (
        (low, output + taps - 1 - size - low)
        for size, taps, _, (low, _), output in zip(*geometry[:4], geometry.output, strict=True)
    )
    return _correlate_over_batch(x, g, (rows, columns))


def _correlate_over_batch(x: Array, g: Array, padding: tuple[Pair, Pair]) -> Array:
    """Image and cotangent correlated over batch and positions: a kernel, from one plain convolution."""
    gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), padding, dimension_numbers=_DIMENSIONS
    )
    return gradient.transpose(1, 2, 0, 3)


# CPU, 3x3 kernels at stride 1 on many channels: Winograd's F(4, 3) along the rows, which gets four rows of the output
# from six products of rows instead of twelve; along the columns everything is as before. Lavin and Gray, "Fast
# Algorithms for Convolutional Neural Networks", CVPR 2016, https://arxiv.org/abs/1509.09308.
#
# With the matrices below, output = A [(G w) * (B x)], where * is a plain convolution along the columns, and the
# weight gradient is the same identity read from the other side. In scan, batch 64, milliseconds of one core (JAX 0.12),
# direct -> Winograd: 16x16x128 output 53 -> 32, weight gradient 110 -> 53; 8x8x256 58 -> 32 and 78 -> 39; 8x8x64
# 3.8 -> 2.6 and 5.9 -> 3.5; 16x16x32 4.3 -> 3.3 and 5.5 -> 4.5. On fewer channels the additions cost what the products
# save (32x32x32 16.7 -> 17.8 and 24 -> 33). Along both axes it is no faster, and five times less exact.

_WINOGRAD_ROWS = 4
_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _winograd_pays(geometry: _Geometry, x: Array, w: Array) -> bool:
    # In half precision the transforms would round away what the products are exact to.
    same = geometry.kernel == (3, 3) and geometry.strides == (1, 1) and geometry.padding == ((1, 1), (1, 1))
    height, fewest = geometry.image[0], min(w.shape[2:])
    return same and height % _WINOGRAD_ROWS == 0 and fewest >= max(32, 2 * height) and x.dtype.itemsize >= 4


def _winograd(_: _Geometry, x: Array, w: Array) -> Array:
    products = [
        lax.conv_general_dilated(rows, taps[None], (1, 1), ((0, 0), (1, 1)), dimension_numbers=_DIMENSIONS)
        for rows, taps in zip(_row_windows(x), _combinations(_G, list(w)), strict=True)
    ]
    return jnp.stack(_combinations(_A, products), 2).reshape(*x.shape[:3], w.shape[3])


def _winograd_input_gradient(geometry: _Geometry, g: Array, w: Array) -> Array:
    return _winograd(geometry, g, w[::-1, ::-1].transpose(0, 1, 3, 2))


def _winograd_weight_gradient(_: _Geometry, x: Array, g: Array) -> Array:
    cotangents = _combinations(list(zip(*_A, strict=True)), [g[:, i::_WINOGRAD_ROWS] for i in range(_WINOGRAD_ROWS)])
    products = [
        _correlate_over_batch(rows, cotangent, ((0, 0), (1, 1)))[0]
        for rows, cotangent in zip(_row_windows(x), cotangents, strict=True)
    ]
    return jnp.stack(_combinations(list(zip(*_G, strict=True)), products))


def _row_windows(x: Array) -> list[Array]:
    """The image padded by one row on either side, in windows of six rows that overlap by two, transformed by B."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    last = x.shape[1] - _WINOGRAD_ROWS + 1
    return _combinations(_B, [padded[:, i : i + last : _WINOGRAD_ROWS] for i in range(_WINOGRAD_ROWS + 2)])


def _combinations(matrix: Sequence[Sequence[int | float]], arrays: Sequence[Array]) -> list[Array]:
    """For every row of the matrix, the sum of the arrays under its coefficients."""
    return [
        functools.reduce(operator.add, (c * array for c, array in zip(row, arrays, strict=True) if c)) for row in matrix
    ]


# CPU, depthwise kernels. XLA's grouped convolution is 8 to 17 times slower there than this sum over shifted images
# (batch 64, 2 cores: 32x32x96 172 -> 20 ms, 8x8x384 42 -> 2.4 ms).


def _shifted_sum(geometry: _Geometry, x: Array, w: Array) -> Array:
    taps = w.reshape(-1, x.shape[3])
    shifted = _shifted(x, geometry.kernel, geometry.strides, geometry.padding)
    return functools.reduce(operator.add, (image * tap for image, tap in zip(shifted, taps, strict=True)))


def _shifted_sum_input_gradient(geometry: _Geometry, g: Array, w: Array) -> Array:
    # The outputs that read a pixel lie below and to the right of it: pad to the image's size and sum over the
    # flipped kernel.
    (kernel_h, kernel_w), (stride_h, stride_w) = geometry.kernel, geometry.strides
    (top, _), (left, _) = geometry.padding
    (image_h, image_w), (out_h, out_w) = geometry.image, geometry.output
    edges = (
        (kernel_h - 1 - top, image_h + top - 1 - (out_h - 1) * stride_h, stride_h - 1),
        (kernel_w - 1 - left, image_w + left - 1 - (out_w - 1) * stride_w, stride_w - 1),
    )
    spread = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    flipped = w[::-1, ::-1].reshape(-1, g.shape[3])
    shifted = _shifted(spread, geometry.kernel, (1, 1), ((0, 0), (0, 0)))
    return functools.reduce(operator.add, (image * tap for image, tap in zip(shifted, flipped, strict=True)))


def _shifted_sum_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
    shifted = _shifted(x, geometry.kernel, geometry.strides, geometry.padding)
    gradient = jnp.stack([(image * g).sum((0, 1, 2)) for image in shifted])
    return gradient.reshape(*geometry.kernel, 1, x.shape[3])


def _shifted(x: Array, kernel: Pair, strides: Pair, padding: tuple[Pair, Pair]) -> list[Array]:
    """For every tap of the kernel, row by row, the pixels that it reads: one `[B, H', W', C]` each."""
    _, height, width, _ = x.shape
    output_h, output_w = _Geometry((height, width), kernel, strides, padding).output
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*edges, 0) for edges in padding), (0, 0, 0)))
    reach_h, reach_w = (output_h - 1) * strides[0] + 1, (output_w - 1) * strides[1] + 1
    return [
        padded[:, row : row + reach_h : strides[0], column : column + reach_w : strides[1]]
        for row in range(kernel[0])
        for column in range(kernel[1])
    ]
