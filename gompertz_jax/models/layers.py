"""The layers of the networks here: parameters in float32, arithmetic in the dtype of the images they receive."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .._numerics import matmul
from . import convolution

_FEWEST_IN_LOOP = 3


class Draws:
    """The random numbers of a whole network, drawn at once and dealt out parameter by parameter.

    XLA on CPU takes about a second to compile a draw of each new shape, and a network has up to thirty: MobileNetV2
    took 23 s to create with a draw for each parameter, and takes 2 s with one for all.

    Args:
      numbers: independent standard normal numbers; None deals out zeros and only counts.
    """

    def __init__(self, numbers: Float[Array, " count"] | None = None):
        self.used = 0
        self._numbers = numbers

    def normal(self, shape: tuple[int, ...], stddev: float) -> Array:
        """Normal numbers of mean 0."""
        start, self.used = self.used, self.used + math.prod(shape)
        if self._numbers is None:
            return jnp.zeros(shape, jnp.float32)
        return stddev * self._numbers[start : self.used].reshape(shape)

    def uniform(self, shape: tuple[int, ...], bound: float) -> Array:
        """Uniform numbers between plus and minus `bound`: erf(z / sqrt 2) of a standard normal z is uniform in ±1."""
        return bound * jax.lax.erf(self.normal(shape, 0.5**0.5))


def he_normal(draws: Draws, shape: tuple[int, ...]) -> Array:
    """A kernel `[kh, kw, C, O]` of variance 2 / (kh kw O).

    He et al., "Delving Deep into Rectifiers", ICCV 2015, https://arxiv.org/abs/1502.01852, equation 14.
    """
    return draws.normal(shape, (2 / (shape[0] * shape[1] * shape[3])) ** 0.5)


class Conv(nnx.Module):
    """A square convolution, without bias unless requested, padded by `kernel_size // 2` on every side."""

    def __init__(
        self, channels: int, filters: int, kernel_size: int, *, stride: int = 1, bias: bool = False, draws: Draws
    ):
        self.kernel = nnx.Param(he_normal(draws, (kernel_size, kernel_size, channels, filters)))
        if bias:
            self.bias = nnx.Param(jnp.zeros(filters, jnp.float32))
        self.strides = (stride, stride)
        edges = (kernel_size // 2, kernel_size // 2)
        self.padding = (edges, edges)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch _ _ filters"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = convolution.conv(x, kernel, strides=self.strides, padding=self.padding)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class DepthwiseConv(nnx.Module):
    """A square convolution without bias that keeps the channels apart."""

    def __init__(self, channels: int, kernel_size: int, *, stride: int = 1, draws: Draws):
        self.kernel = nnx.Param(he_normal(draws, (kernel_size, kernel_size, 1, channels)))
        self.strides = (stride, stride)
        edges = (kernel_size // 2, kernel_size // 2)
        self.padding = (edges, edges)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch _ _ channels"]:
        kernel = self.kernel[...].astype(x.dtype)
        return convolution.depthwise_conv(x, kernel, strides=self.strides, padding=self.padding)


class GroupedPointwise(nnx.Module):
    """A 1x1 convolution without bias in which each group of filters reads its own group of channels."""

    def __init__(self, channels: int, filters: int, groups: int, *, draws: Draws):
        self.kernel = nnx.Param(he_normal(draws, (1, 1, channels // groups, filters)))
        self.groups = groups

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width filters"]:
        # One matrix product per group, whose derivatives are matrix products.
        kernel = self.kernel[0, 0].astype(x.dtype)
        grouped = x.reshape(*x.shape[:3], self.groups, -1)
        filters = kernel.reshape(kernel.shape[0], self.groups, -1)
        return jnp.einsum("bhwgc,cgo->bhwgo", grouped, filters).reshape(*x.shape[:3], kernel.shape[1])


class BatchNorm(nnx.Module):
    """Batch normalisation over everything but the channels, with PyTorch's constants and its unbiased running variance.

    Not `nnx.BatchNorm`: that one rounds the running statistics to the compute dtype in evaluation, and tracks the
    biased variance. Here both statistics and the normalisation itself are in float32 for bfloat16 images.

    Ioffe and Szegedy, "Batch Normalization", ICML 2015, https://arxiv.org/abs/1502.03167
    """

    momentum = 0.9  # PyTorch counts from the other end: its 0.1
    epsilon = 1e-5

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width channels"]:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        raised = x.astype(dtype)
        if train:
            mean = raised.mean((0, 1, 2))
            var = jnp.square(raised - mean).mean((0, 1, 2))
            count = x.size // x.shape[-1]
            self._track(self.mean, mean)
            self._track(self.var, var * (count / max(count - 1, 1)))
        else:
            mean, var = self.mean[...].astype(dtype), self.var[...].astype(dtype)
        gain = self.scale[...].astype(dtype) * jax.lax.rsqrt(var + self.epsilon)
        return ((raised - mean) * gain + self.bias[...].astype(dtype)).astype(x.dtype)

    def _track(self, running: nnx.BatchStat, batch: Array) -> None:
        batch = jax.lax.stop_gradient(batch)
        updated = self.momentum * running[...] + (1 - self.momentum) * batch
        running[...] = updated.astype(running[...].dtype)


class Linear(nnx.Module):
    """An affine map in at least float32, so that logits are never rounded to the compute dtype."""

    def __init__(self, features: int, classes: int, *, stddev: float | None = None, draws: Draws):
        """Draw from PyTorch's uniform ±1/sqrt(features); with `stddev`, a normal kernel and a zero bias instead."""
        shape = (features, classes)
        if stddev is None:
            bound = features**-0.5
            kernel, bias = draws.uniform(shape, bound), draws.uniform((classes,), bound)
        else:
            kernel, bias = draws.normal(shape, stddev), jnp.zeros(classes, jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return matmul(x.astype(dtype), self.kernel[...].astype(dtype)) + self.bias[...].astype(dtype)


def in_turn(
    module: Any, names: Sequence[str], x: Float[Array, "batch height width channels"], *, train: bool
) -> Float[Array, "batch _ _ filters"]:
    """Apply a module's blocks of these names to a map, one after the other.

    Where `module.loops` is true, three or more equal blocks in a row become a loop: the program then holds one of them
    instead of all.
    """
    blocks = [getattr(module, name) for name in names]
    for _, row in itertools.groupby(blocks, _form if getattr(module, "loops", False) else id):
        equal = list(row)
        if len(equal) < _FEWEST_IN_LOOP:
            for block in equal:
                x = block(x, train=train)
        else:
            x = _in_loop(equal, x)
    return x


def loops_pay() -> bool:
    """Whether a program is better off with a loop over equal blocks than with all of them.

    On CPU the time to load a program from the compilation cache grows with the square of its size: for the full step
    of resnet56 -> resnet20, 4 to 6 s without loops in the teacher and 2 with them (JAX 0.12), while the step is as
    fast. Not so for blocks that are trained: with their residuals stacked, resnet56 takes 1.46 of the time. Elsewhere
    it has not been measured, and blocks that follow one another leave the compiler the most freedom.
    """
    return jax.default_backend() == "cpu"


def _form(block: nnx.Module) -> Any:
    """What blocks have in common if they differ only in the values of their arrays."""
    return nnx.graphdef(block), jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), _arrays(block))


def _arrays(block: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(block))


def _in_loop(blocks: Sequence[Any], x: Array) -> Array:
    graph = nnx.graphdef(blocks[0])

    def turn(x: Array, arrays: Any) -> tuple[Array, None]:
        return nnx.merge(graph, arrays)(x, train=False), None

    return jax.lax.scan(turn, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_arrays, blocks)))[0]


def one_per_map(offsets: Sequence[Array | None] | None, maps: int) -> Sequence[Array | None]:
    """The offset of every map that a network records, None where there is none; see `gompertz_jax.Network`."""
    if offsets is None:
        return (None,) * maps
    if len(offsets) != maps:
        raise ValueError(f"offsets must have one entry per map, {maps}, got {len(offsets)}")
    return offsets


def shifted(
    x: Float[Array, "batch height width channels"], offset: Float[Array, "..."] | None
) -> Float[Array, "batch height width channels"]:
    """A map with its offset; without one nothing is traced."""
    if offset is None:
        return x
    if offset.shape != x.shape:
        raise ValueError(f"an offset must have the shape of its map, {x.shape}, got {offset.shape}")
    return x + offset.astype(x.dtype)


def max_pool_3x3(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch _ _ channels"]:
    """Maximum over 3x3 windows at stride 2, padded by one pixel of minus infinity."""
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)


def max_pool_2x2(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch _ _ channels"]:
    """Maximum over 2x2 windows at stride 2; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def mean_pool_3x3(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch _ _ channels"]:
    """Mean over 3x3 windows at stride 2, padded by one pixel of zeros that count."""
    ninths = jnp.full((3, 3, 1, x.shape[3]), 1 / 9, x.dtype)
    return convolution.depthwise_conv(x, ninths, strides=(2, 2), padding=((1, 1), (1, 1)))


def channel_shuffle(
    x: Float[Array, "batch height width channels"], groups: int
) -> Float[Array, "batch height width channels"]:
    """The channels of every group dealt out in turn: `g` groups of `n` become `n` groups of `g`."""
    grouped = x.reshape(*x.shape[:3], groups, x.shape[3] // groups)
    return grouped.swapaxes(3, 4).reshape(x.shape)


def global_mean(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch channels"]:
    """Mean over the positions, in at least float32."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
