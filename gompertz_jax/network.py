"""What the objective and the step know of a network: one pure function, its arrays, and the images' normalisation."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from ._numerics import checked

PyTree = Any


class Outputs(NamedTuple):
    """What one forward pass returns.

    Attributes:
      logits: class scores, `[B, K]`.
      features: one map per stage, each `[B, h, w, c]`; the last is the map that is pooled.
      pooled: the vector that the classifier sees, `[B, d]`.
    """

    logits: Float[Array, "batch classes"]
    features: tuple[Float[Array, "batch _ _ _"], ...]
    pooled: Float[Array, "batch _"]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "stats", "mean", "std"], meta_fields=["apply"])
@dataclass(frozen=True)
class Network:
    """A network as data: a pure `apply` and the arrays it reads. Any framework fits behind it.

    `apply(params, stats, images, *, train, key=None) -> (Outputs, stats)` reads images that are already normalised.
    Callers that hold common images in [0, 1] go through `forward`, which normalises by this network's own `mean` and
    `std`, so that a teacher and a student trained with different statistics can share one batch.

    A Network is a pytree whose leaves are its arrays (`apply` is static), so it can be an argument of `jax.jit`.

    For gradients at a stage, `apply` also takes `offsets=None`: a tuple with one entry per map of `Outputs.features`,
    each an array of that map's shape or None for none. It adds an offset to its map right where that map is recorded,
    so that all that follows sees the sum, and `features` holds it. The derivative by an offset, at zero, is then the
    gradient at that map. The networks of `gompertz_jax.models` take offsets; for any other loss no network needs to.

    Attributes:
      apply: the pure function above; `stats` comes back unchanged when `train` is False.
      params: what the optimiser changes.
      stats: what a forward pass in training mode changes (running means and variances); may be empty.
      mean: per-channel mean of images in [0, 1], `[c]` or a scalar.
      std: per-channel standard deviation of images in [0, 1], `[c]` or a scalar.

    Examples:
      A plain function is a network:

      >>> import jax, jax.numpy as jnp, gompertz_jax as gj
      >>> def apply(params, stats, images, *, train, key=None):
      ...     pooled = images.mean((1, 2))
      ...     return gj.Outputs(pooled @ params, (images,), pooled), stats
      >>> network = gj.Network(apply, jnp.ones((3, 10)), {}, mean=jnp.full(3, 0.5), std=jnp.full(3, 0.25))
      >>> outputs, _ = network.forward(jnp.full((2, 8, 8, 3), 0.75), train=False)
      >>> outputs.logits.shape, float(outputs.pooled[0, 0])
      ((2, 10), 1.0)

      With `offsets` it has gradients at its stage:

      >>> def apply(params, stats, images, *, train, key=None, offsets=None):
      ...     if offsets is not None and offsets[0] is not None:
      ...         images = images + offsets[0]
      ...     pooled = images.mean((1, 2))
      ...     return gj.Outputs(pooled @ params, (images,), pooled), stats
      >>> network = gj.Network(apply, jnp.ones((3, 10)), {}, mean=0.5, std=0.25)
      >>> def score(offset):
      ...     outputs, _ = network.forward(jnp.ones((2, 8, 8, 3)), train=False, offsets=(offset,))
      ...     return outputs.logits[:, 0].sum()
      >>> print(jax.grad(score)(jnp.zeros((2, 8, 8, 3)))[0, 0, 0] * 64)
      [1. 1. 1.]
    """

    apply: Callable[..., tuple[Outputs, PyTree]]
    params: PyTree
    stats: PyTree
    mean: Any
    std: Any

    @checked
    def forward(
        self,
        images: Shaped[Array, "batch height width channels"],
        *,
        train: bool,
        key: PRNGKeyArray | None = None,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
    ) -> tuple[Outputs, PyTree]:
        """Apply the network to common images in [0, 1], normalised by its own mean and std.

        Raises:
          ValueError: the images are integers, or have other channels than mean and std; `offsets` has not one entry per
            map, or `apply` does not take it.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}; divide uint8 images by 255")
        mean, std = (jnp.asarray(numbers, images.dtype) for numbers in (self.mean, self.std))
        for name, numbers in (("mean", mean), ("std", std)):
            if numbers.size not in (1, images.shape[-1]):
                raise ValueError(
                    f"images have {images.shape[-1]} channels and this network's {name} {numbers.size}: "
                    "it is one of other images"
                )
        images = (images - mean) / std
        if offsets is None:
            return self.apply(self.params, self.stats, images, train=train, key=key)
        parameters = inspect.signature(self.apply).parameters.values()
        if not any(p.name == "offsets" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            raise ValueError(
                "offsets: this network's apply does not take them, so it has no gradients at a stage; give it the "
                "keyword offsets=None that gompertz_jax.Network describes, or take the gradient at the images"
            )
        outputs, stats = self.apply(self.params, self.stats, images, train=train, key=key, offsets=tuple(offsets))
        if len(offsets) != len(outputs.features):
            raise ValueError(f"offsets must have one entry per map, {len(outputs.features)}, got {len(offsets)}")
        return outputs, stats

    def replace(self, **changes: Any) -> "Network":
        """The network with other arrays, for instance `network.replace(params=new_params)`."""
        return Network(**{**vars(self), **changes})
