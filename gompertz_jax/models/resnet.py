"""Residual networks: the thin CIFAR family of distillation tables, and the ImageNet family with either stem.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385. Widths and
shortcuts of the thin family follow RepDistiller (Tian et al., ICLR 2020, https://arxiv.org/abs/1910.10699): where the
shape changes, the shortcut is a 1x1 convolution with normalisation.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from ..network import Outputs
from .convolution import relu
from .layers import BatchNorm, Conv, Draws, Linear, global_mean, in_turn, max_pool_3x3, one_per_map, shifted

STEMS = ("cifar", "imagenet")


class ConvNorm(nnx.Module):
    """Convolution, then normalisation."""

    def __init__(
        self, channels: int, filters: int, kernel_size: int, *, stride: int = 1, bias: bool = False, draws: Draws
    ):
        self.conv = Conv(channels, filters, kernel_size, stride=stride, bias=bias, draws=draws)
        self.norm = BatchNorm(filters)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        return self.norm(self.conv(x), train=train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, *, stride: int, draws: Draws):
        self.first = ConvNorm(channels, width, 3, stride=stride, draws=draws)
        self.second = ConvNorm(width, width, 3, draws=draws)
        if stride != 1 or channels != width:
            self.shortcut = ConvNorm(channels, width, 1, stride=stride, draws=draws)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        residual = self.shortcut(x, train=train) if hasattr(self, "shortcut") else x
        x = relu(self.first(x, train=train))
        return relu(self.second(x, train=train) + residual)


class Bottleneck(nnx.Module):
    """1x1, 3x3 (which takes the stride) and 1x1 convolutions beside a shortcut; four times as wide at its ends."""

    expansion = 4

    def __init__(self, channels: int, width: int, *, stride: int, draws: Draws):
        filters = self.expansion * width
        self.reduce = ConvNorm(channels, width, 1, draws=draws)
        self.middle = ConvNorm(width, width, 3, stride=stride, draws=draws)
        self.expand = ConvNorm(width, filters, 1, draws=draws)
        if stride != 1 or channels != filters:
            self.shortcut = ConvNorm(channels, filters, 1, stride=stride, draws=draws)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        residual = self.shortcut(x, train=train) if hasattr(self, "shortcut") else x
        x = relu(self.reduce(x, train=train))
        x = relu(self.middle(x, train=train))
        return relu(self.expand(x, train=train) + residual)


def add_stages(
    network: nnx.Module,
    block: Any,
    channels: int,
    depths: Sequence[int],
    widths: Sequence[int],
    *,
    draws: Draws,
) -> tuple[tuple[str, ...], ...]:
    """Give a network its residual blocks, all stages but the first beginning at stride 2; returns their names by stage.

    `block` is a class of blocks, with its `expansion` of the width.
    Names rather than an nnx.List: params then nest by strings only, which every checkpoint and optax label takes.
    """
    stages = []
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        names = [f"stage{stage}_block{index}" for index in range(1, depth + 1)]
        for name in names:
            stride = 2 if stage > 1 and name == names[0] else 1
            setattr(network, name, block(channels, width, stride=stride, draws=draws))
            channels = block.expansion * width
        stages.append(tuple(names))
    return tuple(stages)


class ResNet(nnx.Module):
    """A stem, then stages of residual blocks; every stage but the first halves height and width.

    Its maps are the stem's (after max pooling, where there is one) and one per stage, all after their ReLU.

    Args:
      block: BasicBlock or Bottleneck.
      depths: blocks in each stage.
      widths: the stem's channels, then each stage's (of its 3x3 convolutions).
      stem: "cifar", a 3x3 convolution at stride 1; or "imagenet", a 7x7 one at stride 2, then
        3x3 max pooling at stride 2.
      num_classes: classes of the head.
      in_channels: channels of the images.
      draws: initialises the parameters.

    Raises:
      ValueError: an unknown stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: str,
        num_classes: int,
        in_channels: int,
        draws: Draws,
    ):
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {stem!r}")
        channels, *stage_widths = widths
        self.pool_stem = stem == "imagenet"
        kernel_size, stride = (7, 2) if self.pool_stem else (3, 1)
        self.stem = ConvNorm(in_channels, channels, kernel_size, stride=stride, draws=draws)
        self.stages = add_stages(self, block, channels, depths, stage_widths, draws=draws)
        self.head = Linear(block.expansion * stage_widths[-1], num_classes, draws=draws)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
    ) -> Outputs:
        stem_offset, *stage_offsets = one_per_map(offsets, 1 + len(self.stages))
        x = relu(self.stem(x, train=train))
        if self.pool_stem:
            x = max_pool_3x3(x)
        x = shifted(x, stem_offset)
        features = [x]
        for names, offset in zip(self.stages, stage_offsets, strict=True):
            x = in_turn(self, names, x, train=train)
            x = shifted(x, offset)
            features.append(x)
        pooled = global_mean(x)
        return Outputs(self.head(pooled), tuple(features), pooled)
