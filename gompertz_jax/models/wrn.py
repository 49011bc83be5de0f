"""Wide residual networks, thin enough for distillation tables: normalisation and ReLU come before each convolution.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146; widths and shortcuts as
in RepDistiller (Tian et al., ICLR 2020, https://arxiv.org/abs/1910.10699).
"""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from ..network import Outputs
from .convolution import relu
from .layers import BatchNorm, Conv, Draws, Linear, global_mean, in_turn, one_per_map, shifted
from .resnet import add_stages


class PreactivationBlock(nnx.Module):
    """Normalisation, ReLU and a 3x3 convolution, twice, beside a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, *, stride: int, draws: Draws):
        self.first_norm = BatchNorm(channels)
        self.first = Conv(channels, width, 3, stride=stride, draws=draws)
        self.second_norm = BatchNorm(width)
        self.second = Conv(width, width, 3, draws=draws)
        if channels != width:
            self.shortcut = Conv(channels, width, 1, stride=stride, draws=draws)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch _ _ filters"]:
        activated = relu(self.first_norm(x, train=train))
        # Where the width changes, the shortcut too starts from the activated map.
        residual = self.shortcut(activated) if hasattr(self, "shortcut") else x
        x = relu(self.second_norm(self.first(activated), train=train))
        return self.second(x) + residual


class WideResNet(nnx.Module):
    """A 3x3 convolution, three stages of blocks, normalisation, ReLU, and the classifier.

    Its maps are the stem's and one per stage. All but the last are what the next stage receives, before any
    normalisation, as in the tables' feature losses; the last is the one that is pooled, after its ReLU.

    Args:
      depth: 6n + 4, with n blocks in each stage.
      widen: multiplier of the stages' 16, 32 and 64 channels.
      num_classes: classes of the head.
      in_channels: channels of the images.
      draws: initialises the parameters.
    """

    def __init__(self, depth: int, widen: int, *, num_classes: int, in_channels: int, draws: Draws):
        channels = 16
        self.stem = Conv(in_channels, channels, 3, draws=draws)
        depths, widths = ((depth - 4) // 6,) * 3, (16 * widen, 32 * widen, 64 * widen)
        self.stages = add_stages(self, PreactivationBlock, channels, depths, widths, draws=draws)
        self.last_norm = BatchNorm(widths[-1])
        self.head = Linear(widths[-1], num_classes, draws=draws)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
    ) -> Outputs:
        ahead = iter(one_per_map(offsets, 1 + len(self.stages)))
        features = []
        x = self.stem(x)
        for names in self.stages:
            x = shifted(x, next(ahead))
            features.append(x)
            x = in_turn(self, names, x, train=train)
        x = shifted(relu(self.last_norm(x, train=train)), next(ahead))
        pooled = global_mean(x)
        return Outputs(self.head(pooled), (*features, x), pooled)
