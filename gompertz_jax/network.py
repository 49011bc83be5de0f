"""What the objective and the step know of a network: one pure function, its arrays, and the images' normalisation."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from ._checks import checked, shown

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


def check_outputs(name: str, outputs: Any, batch: Any) -> None:
    """Refuse anything that is not a network's outputs on `batch` images.

    Raises:
      TypeError: it is not an Outputs.
      ValueError: one of its arrays has the wrong shape or dtype.
    """
    if not isinstance(outputs, Outputs) or not isinstance(outputs.features, tuple | list):
        raise TypeError(f"{name} must be gompertz_jax.Outputs of arrays, got {shown(outputs)}")
    forms = [("logits", "[B, K]", 2, outputs.logits), ("pooled", "[B, d]", 2, outputs.pooled)]
    forms += [(f"features[{index}]", "[B, h, w, c]", 4, stage) for index, stage in enumerate(outputs.features)]
    for part, form, axes, array in forms:
        shape: tuple[Any, ...] = getattr(array, "shape", ())
        dtype: Any = getattr(array, "dtype", None)
        if len(shape) != axes or shape[0] != batch or 0 in shape or not jnp.issubdtype(dtype, jnp.floating):
            got = shown(array) if dtype is None else f"{dtype} {shape}"
            raise ValueError(f"{name} must have {part} of floats {form}, not empty, with B = {batch}, got {got}")


@partial(jax.tree_util.register_dataclass, data_fields=["params", "stats", "mean", "std"], meta_fields=["apply"])
@dataclass(frozen=True)
class Network:
    """A network as data: a pure `apply` and the arrays it reads. Any framework can stand behind it.

    `apply(params, stats, images, *, train, key=None) -> (Outputs, stats)` reads images that are already normalised.
    Callers that hold common images in [0, 1] go through `forward`, which normalises by this network's own `mean` and
    `std`, so that a teacher and a student trained with different statistics can share one batch.

    A Network is a pytree whose leaves are its arrays (`apply` is static), so it can be an argument of `jax.jit`.

    For gradients at a stage, `apply` also takes `offsets=None`: a tuple with one entry per map of `Outputs.features`,
    each an array of that map's shape or None for none. It adds each offset to its map where that map is recorded, so
    that all later layers see the sum, and `features` holds it. The derivative with respect to an offset, at zero, is
    then the gradient at that map. The networks of `gompertz_jax.models` take offsets; losses without gradients at a
    stage do not need them.

    `apply` may also take `frozen=False`. True declares its arrays constants of the program, as a teacher's are in its
    student's step: the network may then use the form that compiles and loads fastest, with the same outputs.

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

    def __post_init__(self):
        # JAX transformations may put anything in place of the arrays; `apply` is static, so it can be checked.
        if not callable(self.apply):
            raise TypeError(f"a network's apply must be a function, got {shown(self.apply)}")

    @checked
    def forward(
        self,
        images: Shaped[Array, "batch height width channels"],
        *,
        train: bool,
        key: PRNGKeyArray | None = None,
        offsets: Sequence[Float[Array, "..."] | None] | None = None,
        frozen: bool = False,
    ) -> tuple[Outputs, PyTree]:
        """Apply the network to common images in [0, 1], normalised by its own mean and std.

        Raises:
          TypeError: mean or std is not an array of numbers, or `apply` does not return Outputs.
          ValueError: the images are integers, or their channels do not match mean and std; `offsets` does not have one
            entry per map, or `apply` does not take it; `apply` fails with these params, stats and images; `train` and
            `frozen` are both set.
        """
        if train and frozen:
            raise ValueError("frozen: in training mode a network's statistics change; give train=False with it")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}; divide uint8 images by 255")
        images = (images - self._per_channel("mean", images)) / self._per_channel("std", images)
        options: dict[str, Any] = {"train": train, "key": key}
        # Passed only to an `apply` that names it: a wrapper with **keywords may call a function that does not.
        if frozen and "frozen" in self._parameters():
            options["frozen"] = True
        if offsets is None:
            return self._applied(images, **options)
        kinds = self._parameters()
        if "offsets" not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds.values():
            raise ValueError(
                "offsets: this network's apply does not take them, so it has no gradients at a stage; give it the "
                "keyword offsets=None that gompertz_jax.Network describes, or take the gradient at the images"
            )
        outputs, stats = self._applied(images, **options, offsets=tuple(offsets))
        if len(offsets) != len(outputs.features):
            raise ValueError(f"offsets must have one entry per map, {len(outputs.features)}, got {len(offsets)}")
        return outputs, stats

    def _parameters(self) -> dict[str, Any]:
        """The kind of each parameter of `apply`."""
        return {name: parameter.kind for name, parameter in inspect.signature(self.apply).parameters.items()}

    def _per_channel(self, name: str, images: Array) -> Array:
        numbers = getattr(self, name)
        try:
            array = jnp.asarray(numbers, images.dtype)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"this network's {name} must be numbers, one per channel, got {shown(numbers)}") from None
        if array.size not in (1, images.shape[-1]) or array.size != math.prod(array.shape[-1:]) or array.ndim > 4:
            raise ValueError(
                f"images have {images.shape[-1]} channels and this network's {name} the shape {array.shape}: "
                "it is one of other images"
            )
        return array

    def _applied(self, images: Array, **options: Any) -> tuple[Outputs, PyTree]:
        try:
            returned = self.apply(self.params, self.stats, images, **options)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise ValueError(
                f"this network's apply fails with its params and stats on images {images.dtype} {images.shape}: {error}"
            ) from error
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"this network's apply must return (Outputs, stats), got {shown(returned)}")
        check_outputs("what this network's apply returns first", returned[0], images.shape[0])
        return returned

    def replace(self, **changes: Any) -> "Network":
        """The network with other arrays, for instance `network.replace(params=new_params)`."""
        return Network(**{**vars(self), **changes})


def output_shapes(network: Network, image_shape: tuple[int, ...], *, batch_size: int = 1) -> Outputs:
    """Shapes and dtypes of a network's outputs, without computing or compiling anything."""
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    return jax.eval_shape(lambda network, images: network.forward(images, train=False)[0], network, images)
