"""Networks by name, as data: `create` returns a `Network`, a pure function and its arrays.

Flax is imported here and nowhere else in the package. A network is an NNX module whose static part is built once per
name and options; `apply` merges it with plain nested dicts inside the caller's `jit`. That costs the least per step of
the ways to call an NNX module, and leaves optimisers and checkpoints nothing but arrays in dicts.
"""

import difflib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import LARGEST_COUNT, checked, finite_number, positive_count, shown
from ..intact import SUMS, fault
from ..network import Network, Outputs, PyTree
from .layers import Draws, loops_pay
from .mobilenet import MobileNetV2
from .resnet import BasicBlock, Bottleneck, ResNet
from .shufflenet import ShuffleNet
from .vgg import VGG
from .wrn import WideResNet

CARD, ARRAYS = "network.json", "network"  # of a directory that `load` reads


class _Recipe(NamedTuple):
    """A module class with its fixed arguments, and the defaults of those that the caller may choose."""

    build: Callable[..., nnx.Module]
    options: Mapping[str, Any] = {}


def _cifar_resnet(depth: int, widths: tuple[int, ...]) -> _Recipe:
    return _Recipe(functools.partial(ResNet, BasicBlock, ((depth - 2) // 6,) * 3, widths, stem="cifar"))


def _imagenet_resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...]) -> _Recipe:
    return _Recipe(functools.partial(ResNet, block, depths, (64, 64, 128, 256, 512)), {"stem": "cifar"})


_RECIPES: dict[str, _Recipe] = {
    **{f"resnet{depth}": _cifar_resnet(depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _cifar_resnet(depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "resnet18": _imagenet_resnet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _imagenet_resnet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _imagenet_resnet(Bottleneck, (3, 4, 6, 3)),
    "mobilenetv2": _Recipe(MobileNetV2, {"width": 0.5, "stem": "strided"}),
    **{
        f"wrn_{depth}_{widen}": _Recipe(functools.partial(WideResNet, depth, widen))
        for depth in (16, 40)
        for widen in (1, 2)
    },
    "vgg8": _Recipe(functools.partial(VGG, (1, 1, 1, 1, 1))),
    "vgg13": _Recipe(functools.partial(VGG, (2, 2, 2, 2, 2))),
    "shufflenetv1": _Recipe(functools.partial(ShuffleNet, 1)),
    "shufflenetv2": _Recipe(functools.partial(ShuffleNet, 2)),
}


def names() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_RECIPES)


@checked
def create(
    name: str,
    *,
    num_classes: int,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.float32,
    in_channels: int = 3,
    mean: ArrayLike | Sequence[float] = 0.0,
    std: ArrayLike | Sequence[float] = 1.0,
    **options: Any,
) -> Network:
    """A freshly initialised network.

    Parameters (scale and bias of normalisation included) at 100 classes, and maps `channels@size` of a 32x32 image:

    | name           | parameters | maps                                          |
    |----------------|-----------:|-----------------------------------------------|
    | `resnet8`      |     83,892 | 16@32, 16@32, 32@16, 64@8                     |
    | `resnet14`     |    181,108 | as resnet8                                    |
    | `resnet20`     |    278,324 | as resnet8                                    |
    | `resnet32`     |    472,756 | as resnet8                                    |
    | `resnet44`     |    667,188 | as resnet8                                    |
    | `resnet56`     |    861,620 | as resnet8                                    |
    | `resnet110`    |  1,736,564 | as resnet8                                    |
    | `resnet8x4`    |  1,233,540 | 32@32, 64@32, 128@16, 256@8                   |
    | `resnet32x4`   |  7,433,860 | as resnet8x4                                  |
    | `resnet18`     | 11,220,132 | 64@32, 64@32, 128@16, 256@8, 512@4            |
    | `resnet34`     | 21,328,292 | as resnet18                                   |
    | `resnet50`     | 23,705,252 | 64@32, 256@32, 512@16, 1024@8, 2048@4         |
    | `mobilenetv2`  |    812,836 | 16@16, 12@16, 16@8, 48@4, 160@2, 1280@2       |
    | `wrn_16_1`     |    180,916 | 16@32, 16@32, 32@16, 64@8                     |
    | `wrn_16_2`     |    703,284 | 16@32, 32@32, 64@16, 128@8                    |
    | `wrn_40_1`     |    569,780 | as wrn_16_1                                   |
    | `wrn_40_2`     |  2,255,156 | as wrn_16_2                                   |
    | `vgg8`         |  3,965,028 | 64@32, 128@16, 256@8, 512@4, 512@4            |
    | `vgg13`        |  9,462,180 | as vgg8                                       |
    | `shufflenetv1` |    949,258 | 24@32, 240@16, 480@8, 960@4                   |
    | `shufflenetv2` |  1,355,528 | 24@32, 116@16, 232@8, 464@4, 1024@4           |

    Any height and width will do (VGG: from 8x8). Parameters and statistics are float32 in plain nested dicts; `dtype`
    is that of the arithmetic and of the maps, except that statistics, normalisation, `pooled` and `logits` are in at
    least float32 (and that a float32 network computes in float64 for float64 images). Networks of one name and the same
    options share one `apply`, so that `jax.jit` compiles a function of them once. All take `offsets`, for gradients at
    a stage.

    Args:
      name: one of `names()`.
      num_classes: classes K of the head, at least 2.
      key: initialises the parameters; equal keys give equal parameters.
      dtype: floating dtype of the arithmetic.
      in_channels: channels of the images.
      mean: per-channel mean of images in [0, 1], `[in_channels]` or a scalar; 0 leaves images as they are.
      std: per-channel standard deviation of images in [0, 1], `[in_channels]` or a scalar; 1 leaves images as they are.
      **options: `stem` of resnet18, 34 and 50: "cifar" (3x3 at stride 1) or "imagenet" (7x7 at stride 2, then max
        pooling at stride 2, as in torchvision). `width` of mobilenetv2, the multiplier of its channels; and its `stem`:
        "strided" (the distillation tables' network, ends at 2x2), "cifar" (the same with a stem at stride 1, ends at
        4x4) or "imagenet" (the paper's and torchvision's, ends at 1x1; 2,351,972 parameters at width 1).

    Returns:
      A Network; under `jax.eval_shape` one of `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: an unknown name or option, or a value out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from gompertz_jax import models
      >>> network = models.create("resnet8", num_classes=10, key=jax.random.key(0), mean=0.5, std=0.25)
      >>> outputs, _ = network.forward(jnp.zeros((2, 32, 32, 3)), train=False)
      >>> outputs.logits.shape, [feature.shape[1:] for feature in outputs.features]
      ((2, 10), [(32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64)])

      Shapes alone, without drawing a single number:

      >>> big = jax.eval_shape(lambda key: models.create("resnet50", num_classes=100, key=key), jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(big.params))
      23705252
    """
    if name not in _RECIPES:
        close = difflib.get_close_matches(str(name), _RECIPES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"name: unknown network {name!r}; {hint}known names: {', '.join(_RECIPES)}")
    defaults = _RECIPES[name].options
    for option, value in options.items():
        if option not in defaults:
            legal = ", ".join(defaults) or "none"
            raise ValueError(f"{option}: {name} has no such option (got {shown(value)}); its options: {legal}")
        if not isinstance(defaults[option], str):
            options[option] = finite_number(option, value)
        elif not isinstance(value, str):
            raise TypeError(f"{option} must be a word such as {defaults[option]!r}, got {shown(value)}")
    if positive_count("num_classes", num_classes) < 2:
        raise ValueError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
    num_classes, in_channels = int(num_classes), positive_count("in_channels", in_channels)
    try:
        dtype = jnp.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"dtype must be a floating dtype such as float32 or bfloat16, got {shown(dtype)}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as float32 or bfloat16, got {dtype.name!r}")
    chosen = tuple(sorted({**defaults, **options}.items()))
    apply, init = _functional(name, num_classes, in_channels, dtype, chosen)
    mean = _per_channel("mean", mean, in_channels)
    std = _per_channel("std", std, in_channels)
    if not (std > 0).all():
        raise ValueError(f"std must be positive, got {std.tolist()}")
    params, stats = init(key)
    return Network(apply, params, stats, jnp.asarray(mean), jnp.asarray(std))


@checked
def from_card(card: Mapping[str, Any]) -> Network:
    """The network that a card describes, as shapes: nothing is drawn or compiled.

    Args:
      card: `model`, `options`, `dtype`, `num_classes`, `in_channels`, `mean` and `std`, as in a `network.json`.

    Returns:
      A Network of `jax.ShapeDtypeStruct`s with its normalisation as NumPy arrays.

    Raises:
      ValueError: a key is missing, or `create` refuses what it says.
    """
    try:
        mean, std = (tuple(card[name]) for name in ("mean", "std"))
        shapes = jax.eval_shape(
            lambda key: create(
                card["model"],
                num_classes=card["num_classes"],
                key=key,
                dtype=card["dtype"],
                in_channels=card["in_channels"],
                mean=mean,
                std=std,
                **card["options"],
            ),
            jax.random.key(0),
        )
    except (LookupError, TypeError) as error:
        raise ValueError(f"the card lacks a key, or one has a value of the wrong kind: {error}") from error
    return shapes.replace(mean=np.asarray(mean, np.float32), std=np.asarray(std, np.float32))


def read_card(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of the network in a directory; see `load`.

    Raises:
      ValueError: no network is there, or its card cannot be read.
    """
    try:
        path = Path(directory).expanduser() / CARD
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that is not known
        raise ValueError(f"directory {shown(directory)} cannot be read: {error}") from error
    if not found:
        raise ValueError(
            f"directory {path.parent} holds no trained network (no {CARD}): give the workdir of a finished run, its "
            "'teacher' folder, or what import-torch wrote"
        )
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy") from error


@checked
def load(
    directory: str | os.PathLike[str], *, abstract: bool = False, sharding: jax.sharding.Sharding | None = None
) -> Network:
    """A network that was trained or imported: what `config.teacher.dir` takes, in your own code.

    Args:
      directory: a finished run's workdir, its `teacher` folder, or what `gompertz-jax import-torch` wrote.
      abstract: give shapes instead of arrays, and read the card only.
      sharding: where the parameters and statistics go; None for the default device.

    Returns:
      A Network with its own normalisation.

    Raises:
      ValueError: no network is there, it is damaged, or it does not fit its card.
    """
    card = read_card(directory)
    directory = Path(directory).expanduser().absolute()
    try:
        shapes = from_card(card)
    except ValueError as error:
        raise ValueError(f"{directory / CARD} describes no known network: {error}") from error
    if abstract:
        return shapes
    if reason := fault(directory / ARRAYS):
        raise ValueError(
            f"{directory / ARRAYS} is damaged or no checkpoint: {reason}; restore it from a copy, with its {SUMS}"
        )
    from orbax.checkpoint import v1  # takes longer to import than all of this package

    there = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        {"params": shapes.params, "stats": shapes.stats},
    )
    read: Any = v1.load
    try:
        arrays = read(directory / ARRAYS, template)
    except Exception as error:  # Orbax has no exception class for what does not fit
        raise ValueError(f"{directory / ARRAYS} does not fit its card: {error}") from error
    return shapes.replace(**arrays, mean=jnp.asarray(shapes.mean), std=jnp.asarray(shapes.std))


@functools.cache
def _functional(
    name: str, num_classes: int, in_channels: int, dtype: jnp.dtype, options: tuple[tuple[str, Any], ...]
) -> tuple[Callable[..., tuple[Outputs, PyTree]], Callable[[Array], tuple[PyTree, PyTree]]]:
    """The pure functions of one network. Cached: `apply` is static in a Network, and jit compares it by identity."""
    build = functools.partial(_RECIPES[name].build, num_classes=num_classes, in_channels=in_channels, **dict(options))
    counted = Draws()
    graphdef, *_ = nnx.split(nnx.eval_shape(lambda: build(draws=counted)), nnx.Param, nnx.BatchStat)
    if counted.used > LARGEST_COUNT:
        raise ValueError(
            f"num_classes={num_classes} and in_channels={in_channels} give {name} {counted.used:,} parameters, "
            "more than 32 bits count"
        )

    def apply(
        params: PyTree,
        stats: PyTree,
        images: Float[Array, "batch height width channels"],
        *,
        train: bool,
        key: Array | None = None,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
        frozen: bool = False,
    ) -> tuple[Outputs, PyTree]:
        """The forward pass; `key` is unused, as none of these networks draws random numbers."""
        del key
        raised = jnp.promote_types(dtype, images.dtype) if dtype == jnp.float32 else dtype
        module: Any = nnx.merge(graphdef, params, stats)
        module.loops = frozen and not train and loops_pay()
        outputs = module(images.astype(raised), train=train, offsets=offsets)
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)) if train else stats

    @jax.jit
    def deal(numbers: Float[Array, " count"]) -> tuple[PyTree, PyTree]:
        _, params, stats = nnx.split(build(draws=Draws(numbers)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def init(key: Array) -> tuple[PyTree, PyTree]:
        # Two programs: in one, XLA would repeat the draw in every parameter that is cut from it.
        return deal(jax.random.normal(key, (counted.used,), jnp.float32))

    return apply, init


def _per_channel(argument: str, value: ArrayLike | Sequence[float], channels: int) -> np.ndarray:
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{argument} must be a number or one for each channel, got {shown(value)}") from error
    if array.shape not in ((), (channels,)) or not np.isfinite(array).all():
        raise ValueError(f"{argument} must be a finite number or one for each of {channels} channels, got {value!r}")
    return array
