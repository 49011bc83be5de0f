"""Where the training images live, and how each dispatch gets at its own.

On the device, where they are copied once, batches are gathered inside the step. A set that would take too much of the
device's memory stays on the host: the images of each dispatch are gathered there by the same permutation while the one
before it runs, and cropped and mirrored inside the step by the same numbers. Batches are equal to the bit.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..data_parallel import AXIS
from .augment import augmented, batch_indices, make_batch
from .config import Config
from .data import Dataset
from .sharding import replicate

Held = tuple[jax.Array, jax.Array]


class Images(NamedTuple):
    """Training and held-out images as uint8, and labels. The held-out ones are always on the device.

    Attributes:
      images: `[N, h, w, c]`; a `jax.Array` on every device, or NumPy's on the host.
      labels: `[N]`, likewise.
      validation: held-out images and labels, None if there are none.
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    validation: Held | None

    @classmethod
    def of(cls, dataset: Dataset, options: Config, mesh: Mesh) -> "Images":
        """Put a data set where `options` (the config's `data`) want it."""
        (images, labels), held = dataset.train, dataset.validation
        if not stays_on_host(images.nbytes, options, mesh.local_devices[0].memory_stats()):
            images, labels = replicate((images, labels), mesh)
        return cls(images, labels, None if held is None else replicate(tuple(held), mesh))


def stays_on_host(size: int, options: Config, memory: Mapping[str, int] | None) -> bool:
    """Whether a training set of `size` bytes is gathered on the host.

    Args:
      size: of its images.
      options: the config's `data`: `placement` and `device_fraction`.
      memory: statistics of a device. One that does not know its own limit, such as a CPU, takes every set.

    Returns:
      True for the host.
    """
    if options.placement != "auto":
        return options.placement == "host"
    limit = (memory or {}).get("bytes_limit")
    return limit is not None and size > options.device_fraction * limit


class Feed:
    """What a dispatch reads, by its first step, and how a step makes its batch from that.

    Used as a context manager: one thread gathers ahead.
    """

    def __init__(
        self, data: Images, *, seed: int, batch_size: int, augment: Config, steps_per_dispatch: int, mesh: Mesh
    ):
        self._data, self._batch_size, self._mesh = data, batch_size, mesh
        self._steps = steps_per_dispatch
        self._augment = {"seed": seed, "padding": augment.padding, "flip": augment.flip}
        self._gathered: dict[int, Future[Held]] = {}
        self._thread = ThreadPoolExecutor(1, "gather")
        of_step = partial(batch_indices, seed=seed, batch_size=batch_size, size=len(data.labels))
        self._order = jax.jit(jax.vmap(of_step))
        self._on_device = isinstance(data.images, jax.Array)

    def make_batch(self, arrays: Held, step: jax.Array) -> Mapping[str, jax.Array]:
        """The batch of a step, inside the compiled program: `make_train_step`'s argument."""
        if self._on_device:
            return make_batch(*arrays, step, batch_size=self._batch_size, **self._augment)
        # Dispatches begin at multiples of their length.
        images, labels = (array[step % self._steps] for array in arrays)
        return augmented(images, labels, jnp.arange(self._batch_size), step, **self._augment)

    def __call__(self, step: int) -> Held:
        """What the dispatch that begins at `step` reads; on the host the next one is then gathered ahead."""
        if self._on_device:
            return self._data.images, self._data.labels  # pyright: ignore[reportReturnType]
        wanted = step, step + self._steps
        self._gathered = {
            first: self._gathered.get(first) or self._thread.submit(self._gather, first) for first in wanted
        }
        return self._gathered[step].result()

    def _gather(self, step: int) -> Held:
        # On the CPU, where there is one: an accelerator would answer only after the dispatches before it.
        with jax.default_device(_cpu()):
            order = np.asarray(self._order(np.arange(step, step + self._steps)))
        sharding = NamedSharding(self._mesh, PartitionSpec(None, AXIS))

        def spread(source: Any) -> jax.Array:
            def share(part: Any) -> np.ndarray:  # of one device; no process reads what is another's
                return source[order[part[:2]]]

            return jax.make_array_from_callback((*order.shape, *source.shape[1:]), sharding, share)

        return spread(self._data.images), spread(self._data.labels)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
