"""ShuffleNet and ShuffleNetV2 for small images, as in distillation tables (RepDistiller): a 1x1 stem, no first pool.

Zhang et al., "ShuffleNet", CVPR 2018, https://arxiv.org/abs/1707.01083. Ma et al., "ShuffleNet V2", ECCV 2018,
https://arxiv.org/abs/1807.11164. The tables' forms: Tian et al., ICLR 2020, https://arxiv.org/abs/1910.10699.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..network import Outputs
from .convolution import relu
from .layers import (
    BatchNorm,
    DepthwiseConv,
    Draws,
    GroupedPointwise,
    Linear,
    channel_shuffle,
    global_mean,
    in_turn,
    mean_pool_3x3,
    one_per_map,
    shifted,
)
from .resnet import ConvNorm

_STEM = 24
_V1_STAGES, _V1_GROUPS = ((240, 4), (480, 8), (960, 4)), 3  # (channels, blocks)
_V2_STAGES, _V2_LAST = ((116, 4), (232, 8), (464, 4)), 1024


class ShuffleUnit(nnx.Module):
    """Grouped 1x1 convolution, shuffle, depthwise 3x3 convolution, grouped 1x1 convolution, beside a shortcut.

    At stride 2 the shortcut is a 3x3 mean, and is appended rather than added.
    """

    def __init__(self, channels: int, filters: int, *, stride: int, draws: Draws):
        hidden = filters // 4
        self.groups = 1 if channels == _STEM else _V1_GROUPS
        self.reduce = GroupedPointwise(channels, hidden, self.groups, draws=draws)
        self.reduce_norm = BatchNorm(hidden)
        self.depthwise = DepthwiseConv(hidden, 3, stride=stride, draws=draws)
        self.depthwise_norm = BatchNorm(hidden)
        self.expand = GroupedPointwise(hidden, filters, _V1_GROUPS, draws=draws)
        self.expand_norm = BatchNorm(filters)
        self.halves = stride == 2

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        hidden = relu(self.reduce_norm(self.reduce(x), train=train))
        hidden = self.depthwise(channel_shuffle(hidden, self.groups))
        hidden = relu(self.depthwise_norm(hidden, train=train))
        hidden = self.expand_norm(self.expand(hidden), train=train)
        joined = jnp.concatenate([hidden, mean_pool_3x3(x)], -1) if self.halves else hidden + x
        return relu(joined)


class SplitUnit(nnx.Module):
    """Half of the channels pass, the others go through 1x1, depthwise 3x3 and 1x1 convolutions; then a shuffle."""

    def __init__(self, channels: int, *, draws: Draws):
        half = channels // 2
        self.first = ConvNorm(half, half, 1, draws=draws)
        self.depthwise = DepthwiseConv(half, 3, draws=draws)
        self.depthwise_norm = BatchNorm(half)
        self.second = ConvNorm(half, half, 1, draws=draws)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width channels"]:
        kept, changed = jnp.split(x, 2, -1)
        changed = relu(self.first(changed, train=train))
        changed = self.depthwise_norm(self.depthwise(changed), train=train)
        changed = relu(self.second(changed, train=train))
        return channel_shuffle(jnp.concatenate([kept, changed], -1), 2)


class HalvingUnit(nnx.Module):
    """Two branches at stride 2, each giving half of the channels, then a shuffle."""

    def __init__(self, channels: int, filters: int, *, draws: Draws):
        half = filters // 2
        self.left_depthwise = DepthwiseConv(channels, 3, stride=2, draws=draws)
        self.left_depthwise_norm = BatchNorm(channels)
        self.left = ConvNorm(channels, half, 1, draws=draws)
        self.first = ConvNorm(channels, half, 1, draws=draws)
        self.depthwise = DepthwiseConv(half, 3, stride=2, draws=draws)
        self.depthwise_norm = BatchNorm(half)
        self.second = ConvNorm(half, half, 1, draws=draws)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        left = self.left_depthwise_norm(self.left_depthwise(x), train=train)
        left = relu(self.left(left, train=train))
        right = relu(self.first(x, train=train))
        right = self.depthwise_norm(self.depthwise(right), train=train)
        right = relu(self.second(right, train=train))
        return channel_shuffle(jnp.concatenate([left, right], -1), 2)


class ShuffleNet(nnx.Module):
    """A 1x1 stem, three stages of shuffle units, each beginning at stride 2, and the classifier.

    Its maps are the stem's and one per stage, after their ReLU. For version 2, whose last stage is followed by a 1x1
    convolution to 1024 channels, the map that is pooled is added.

    Args:
      version: 1, with 3 groups and 240, 480 and 960 channels; or 2, with 116, 232 and 464 (the paper's 1x).
      num_classes: classes of the head.
      in_channels: channels of the images.
      draws: initialises the parameters.
    """

    def __init__(self, version: int, *, num_classes: int, in_channels: int, draws: Draws):
        self.stem = ConvNorm(in_channels, _STEM, 1, draws=draws)
        channels, stages = _STEM, []
        for stage, (filters, blocks) in enumerate(_V1_STAGES if version == 1 else _V2_STAGES, start=1):
            names = [f"stage{stage}_block{index}" for index in range(1, blocks + 1)]
            for name in names:
                if version == 2:
                    unit = (
                        HalvingUnit(channels, filters, draws=draws)
                        if channels != filters
                        else SplitUnit(filters, draws=draws)
                    )
                elif channels != filters:  # what the unit itself adds to the channels that pass
                    unit = ShuffleUnit(channels, filters - channels, stride=2, draws=draws)
                else:
                    unit = ShuffleUnit(filters, filters, stride=1, draws=draws)
                setattr(self, name, unit)
                channels = filters
            stages.append(tuple(names))
        self.stages = tuple(stages)
        if version == 2:
            self.last = ConvNorm(channels, _V2_LAST, 1, draws=draws)
            channels = _V2_LAST
        self.head = Linear(channels, num_classes, draws=draws)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
    ) -> Outputs:
        has_last = hasattr(self, "last")
        ahead = iter(one_per_map(offsets, 1 + len(self.stages) + has_last))
        x = shifted(relu(self.stem(x, train=train)), next(ahead))
        features = [x]
        for names in self.stages:
            x = in_turn(self, names, x, train=train)
            x = shifted(x, next(ahead))
            features.append(x)
        if has_last:
            x = shifted(relu(self.last(x, train=train)), next(ahead))
            features.append(x)
        pooled = global_mean(x)
        return Outputs(self.head(pooled), tuple(features), pooled)
