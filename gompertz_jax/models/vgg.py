"""VGG without its fully connected layers, with batch normalisation, as in distillation tables.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
https://arxiv.org/abs/1409.1556; the form for small images as in RepDistiller (Tian et al., ICLR 2020,
https://arxiv.org/abs/1910.10699).
"""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from ..network import Outputs
from .convolution import relu
from .layers import Draws, Linear, global_mean, max_pool_2x2, one_per_map, shifted
from .resnet import ConvNorm

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE = 64  # images of at least so many pixels are halved once more, before the last stage


class VGG(nnx.Module):
    """Five stages of 3x3 convolutions (with bias), normalisation and ReLU; between them, 2x2 maxima at stride 2.

    The first three pools are always present, the fourth for images of at least 64 pixels, so that 32x32 ends at 4x4 and
    64x64 too. Its maps are one per stage, after the last ReLU and before the pool; the last one is pooled by its mean.

    Args:
      depths: convolutions in each of the five stages.
      num_classes: classes of the head.
      in_channels: channels of the images.
      draws: initialises the parameters.

    Raises:
      ValueError: images smaller than 8x8, of which nothing would be left.
    """

    def __init__(self, depths: Sequence[int], *, num_classes: int, in_channels: int, draws: Draws):
        channels, stages = in_channels, []
        for stage, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True), start=1):
            names = []
            for index in range(1, depth + 1):
                names.append(f"stage{stage}_conv{index}")
                setattr(self, names[-1], ConvNorm(channels, width, 3, bias=True, draws=draws))
                channels = width
            stages.append(tuple(names))
        self.stages = tuple(stages)
        self.head = Linear(channels, num_classes, stddev=0.01, draws=draws)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
    ) -> Outputs:
        shortest = min(x.shape[1:3])
        if shortest < 8:
            raise ValueError(f"images must be at least 8x8 for VGG, got {x.shape[1]}x{x.shape[2]}")
        features = []
        for index, (names, offset) in enumerate(zip(self.stages, one_per_map(offsets, len(self.stages)), strict=True)):
            if 0 < index < 4 or (index == 4 and shortest >= _LARGE):
                x = max_pool_2x2(x)
            for name in names:
                x = relu(getattr(self, name)(x, train=train))
            x = shifted(x, offset)
            features.append(x)
        pooled = global_mean(x)
        return Outputs(self.head(pooled), tuple(features), pooled)
