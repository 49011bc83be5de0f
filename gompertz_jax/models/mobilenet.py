"""MobileNetV2 in the three forms that distillation tables and CIFAR code call by that name.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, https://arxiv.org/abs/1801.04381
"""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from ..network import Outputs
from .convolution import relu, relu6
from .layers import BatchNorm, DepthwiseConv, Draws, Linear, global_mean, in_turn, one_per_map, shifted
from .resnet import ConvNorm

# (expansion, channels at width 1, blocks) of the seven groups; table 2 of the paper
GROUPS = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
_HEAD_CHANNELS = 1280

# stem -> strides of the stem and of each group's first block
_STRIDES = {
    "strided": (2, (1, 1, 2, 2, 1, 2, 1)),
    "cifar": (1, (1, 1, 2, 2, 1, 2, 1)),
    "imagenet": (2, (1, 2, 2, 2, 1, 2, 1)),
}

# A stage ends where the next group halves the map (or the head follows), as in the tables' feature losses.
_STAGE_ENDS = (1, 2, 4, 6)


class InvertedResidual(nnx.Module):
    """Widen by a 1x1 convolution, filter each channel by itself, narrow again without a nonlinearity."""

    def __init__(self, channels: int, filters: int, *, expansion: int, stride: int, relu6: bool, draws: Draws):
        hidden = channels * expansion
        # The "imagenet" network has no expansion layer where it would not widen; the CIFAR ones have it.
        if expansion != 1 or not relu6:
            self.expand = ConvNorm(channels, hidden, 1, draws=draws)
        self.depthwise = DepthwiseConv(hidden, 3, stride=stride, draws=draws)
        self.depthwise_norm = BatchNorm(hidden)
        self.project = ConvNorm(hidden, filters, 1, draws=draws)
        self.residual = stride == 1 and channels == filters
        self.relu6 = relu6

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        rectify = relu6 if self.relu6 else relu
        hidden = rectify(self.expand(x, train=train)) if hasattr(self, "expand") else x
        hidden = rectify(self.depthwise_norm(self.depthwise(hidden), train=train))
        projected = self.project(hidden, train=train)
        return x + projected if self.residual else projected


class MobileNetV2(nnx.Module):
    """A stem, seven groups of inverted residual blocks, a 1x1 convolution to 1280 channels, and the classifier.

    Its maps are the stem's, those after groups 2, 3, 5 and 7 (linear bottlenecks: no ReLU), and the one that is pooled.

    Args:
      width: multiplier of all channels but the head's 1280.
      stem: "strided", the distillation tables' network (RepDistiller): stem at stride 2, second group at stride 1, a
        32x32 image ends at 2x2; "cifar", the same with a stem at stride 1, which ends at 4x4; "imagenet", the
        network of the paper and of torchvision: strides 2 and 2 (ends at 1x1), ReLU6, channels in multiples of eight,
        no expansion layer in the first block. Torchvision's dropout of 0.2 before the classifier is left out.
      num_classes: classes of the head.
      in_channels: channels of the images.
      draws: initialises the parameters.

    Raises:
      ValueError: an unknown stem, or a width out of [1/16, 16].
    """

    def __init__(self, *, width: float, stem: str, num_classes: int, in_channels: int, draws: Draws):
        if stem not in _STRIDES:
            raise ValueError(f"stem must be one of {tuple(_STRIDES)}, got {stem!r}")
        if not 1 / 16 <= width <= 16:  # below 1/16 the first group's 16 channels would round to none
            raise ValueError(f"width must lie in [1/16, 16], got {width!r}")
        self.relu6 = stem == "imagenet"
        scale = _multiple_of_eight if self.relu6 else int
        stem_stride, strides = _STRIDES[stem]
        channels = scale(32 * width)
        self.stem = ConvNorm(in_channels, channels, 3, stride=stem_stride, draws=draws)
        groups = []
        for group, ((expansion, base, blocks), stride) in enumerate(zip(GROUPS, strides, strict=True), start=1):
            names = []
            for index in range(1, blocks + 1):
                names.append(f"group{group}_block{index}")
                filters = scale(base * width)
                block = InvertedResidual(
                    channels,
                    filters,
                    expansion=expansion,
                    stride=stride if index == 1 else 1,
                    relu6=self.relu6,
                    draws=draws,
                )
                setattr(self, names[-1], block)
                channels = filters
            groups.append(tuple(names))
        self.groups = tuple(groups)
        # Above width 1 the paper widens the head too.
        last = scale(_HEAD_CHANNELS * max(1.0, width))
        self.last = ConvNorm(channels, last, 1, draws=draws)
        self.head = Linear(last, num_classes, stddev=0.01, draws=draws)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
    ) -> Outputs:
        ahead = iter(one_per_map(offsets, 2 + len(_STAGE_ENDS)))
        rectify = relu6 if self.relu6 else relu
        x = shifted(rectify(self.stem(x, train=train)), next(ahead))
        features = [x]
        for index, names in enumerate(self.groups):
            x = in_turn(self, names, x, train=train)
            if index in _STAGE_ENDS:
                x = shifted(x, next(ahead))
                features.append(x)
        x = shifted(rectify(self.last(x, train=train)), next(ahead))
        pooled = global_mean(x)
        return Outputs(self.head(pooled), (*features, x), pooled)


def _multiple_of_eight(channels: float) -> int:
    """The nearest multiple of eight that is not more than a tenth below, as in the authors' code."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
