"""Where the training images live, and how each dispatch gets its own.

On the device, where they are copied once, batches are gathered inside the step. A set that would take too much of the
device's memory stays on the host: the images of each dispatch are gathered there by the same permutation while the one
before it runs, and cropped and mirrored inside the step by the same numbers. Batches are equal to the bit.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..data_parallel import AXIS, REPLICATED
from .augment import batch_indices, make_batch
from .config import Config
from .data import Dataset, Split
from .sharding import replicate

PART = 10_000  # test images that are on the device at a time


class Labelled(NamedTuple):
    """Images on the devices, and their labels."""

    images: jax.Array
    labels: jax.Array


def in_parts(function: Callable[..., jax.Array], split: Split, mesh: Mesh) -> np.ndarray:
    """A function of images and labels on a split, which may be larger than a device's memory.

    Args:
      function: `(images, labels) -> [..., images]`.
      split: goes to every device one part after another.
      mesh: the devices.

    Returns:
      The values of all parts, joined along the last axis.
    """
    starts = range(0, len(split.labels), PART)
    parts = (replicate((split.images[at : at + PART], split.labels[at : at + PART]), mesh) for at in starts)
    return np.concatenate([np.asarray(function(*part)) for part in parts], axis=-1)


class Supply(NamedTuple):
    """What a dispatch reads.

    Attributes:
      images: the training set, or where that is on the host the images of each of the dispatch's steps.
      labels: their labels.
      outputs: a teacher's outputs on every view of every image, by name; empty where the step runs the teacher.
    """

    images: jax.Array
    labels: jax.Array
    outputs: Mapping[str, jax.Array]


class Images(NamedTuple):
    """Training and held-out images as uint8, and labels. The held-out ones are always on the device.

    Attributes:
      images: `[N, h, w, c]`; a `jax.Array` on every device, or NumPy's on the host.
      labels: `[N]`, of the same kind.
      validation: held-out images and labels, None if there are none.
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    validation: Labelled | None

    @classmethod
    def of(cls, dataset: Dataset, options: Config, mesh: Mesh) -> "Images":
        """Put a data set where `options` (the config's `data`) want it."""
        (images, labels), validation = dataset.train, dataset.validation
        if not stays_on_host(images.nbytes, options, mesh.local_devices[0].memory_stats()):
            images, labels = replicate((images, labels), mesh)
        return cls(images, labels, None if validation is None else Labelled(*replicate(tuple(validation), mesh)))


def stays_on_host(size: int, options: Config, memory: Mapping[str, int] | None) -> bool:
    """Whether a training set of `size` bytes is gathered on the host.

    Args:
      size: bytes of its images.
      options: the config's `data`: `placement` and `device_fraction`.
      memory: statistics of a device. One that does not know its own limit, such as a CPU, takes every set.

    Returns:
      True for the host.
    """
    if options.placement != "auto":
        return options.placement == "host"
    return size > device_room(options, memory)


def device_room(options: Config, memory: Mapping[str, int] | None) -> float:
    """How many bytes one kind of data may take on a device; see `stays_on_host`."""
    limit = (memory or {}).get("bytes_limit")
    return math.inf if limit is None else options.device_fraction * limit


class Feed:
    """What a dispatch reads, by its first step, and how a step makes its batch from that.

    Used as a context manager: one thread gathers ahead. Images from the host are divided among the devices, batch by
    batch, or with `divided=False` whole on each.
    """

    def __init__(
        self,
        data: Images,
        *,
        seed: int,
        batch_size: int,
        augment: Config,
        steps_per_dispatch: int,
        mesh: Mesh,
        divided: bool = True,
        views: int = 0,
        outputs: Mapping[str, jax.Array] | None = None,
    ):
        self._data, self._outputs = data, outputs or {}
        self._sharding = NamedSharding(mesh, PartitionSpec(None, AXIS) if divided else REPLICATED)
        self._steps = steps_per_dispatch
        self._gathered: dict[int, Future[Labelled]] = {}
        self._thread = ThreadPoolExecutor(1, "gather")
        of_step = partial(batch_indices, seed=seed, batch_size=batch_size, size=len(data.labels))
        self._order = jax.jit(jax.vmap(of_step))
        self._on_device = isinstance(data.images, jax.Array)
        self._make_batch = partial(
            make_batch,
            seed=seed,
            batch_size=batch_size,
            padding=augment.padding,
            flip=augment.flip,
            views=views,
            gathered_from=None if self._on_device else len(data.labels),
            mesh=mesh if divided else None,
        )

    def make_batch(self, supply: Supply, step: jax.Array) -> Mapping[str, jax.Array]:
        """The batch of a step, inside the compiled program: `make_train_step`'s argument."""
        images, labels = supply.images, supply.labels
        if not self._on_device:
            images, labels = (array[step % self._steps] for array in (images, labels))  # dispatches begin at multiples
        return self._make_batch(images, labels, step, outputs=supply.outputs)

    def __call__(self, step: int) -> Supply:
        """What the dispatch that begins at `step` reads; on the host the next one is then gathered ahead."""
        if self._on_device:
            return Supply(self._data.images, self._data.labels, self._outputs)  # pyright: ignore[reportArgumentType]
        wanted = step, step + self._steps
        self._gathered = {
            first: self._gathered.get(first) or self._thread.submit(self._gather, first) for first in wanted
        }
        return Supply(*self._gathered[step].result(), self._outputs)

    def _gather(self, step: int) -> Labelled:
        # On the CPU, where there is one: an accelerator would answer only after the dispatches before it.
        with jax.default_device(_cpu()):
            order = np.asarray(self._order(np.arange(step, step + self._steps)))

        def spread(source: Any) -> jax.Array:
            def share(part: Any) -> np.ndarray:  # of one device; no process reads what is another's
                return source[order[part[:2]]]

            return jax.make_array_from_callback((*order.shape, *source.shape[1:]), self._sharding, share)

        return Labelled(spread(self._data.images), spread(self._data.labels))

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
