"""A teacher's outputs on disk: where every image has a fixed number of views, they are computed once, outside the step.

A folder holds a card, which identifies the teacher, the images and the views, and a sealed directory for each view.
Whatever does not match or is damaged is set aside and computed again; a kill costs only the view in progress.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..data_parallel import replicated, shard_batch
from ..intact import fault
from ..network import Network, output_shapes
from ..students import stacked
from .augment import augmented_view
from .checkpoint import load_arrays, save_arrays
from .config import Config, differing_keys
from .errors import RunError
from .feed import Images
from .files import read_json, set_aside, write_json, writing
from .networks import fingerprint
from .sharding import on_main, replicate, say

OUTPUTS, CARD = "outputs", "card.json"
_BATCH = 500  # images per forward pass


def stored_outputs(
    directory: Path,
    teacher: Network,
    data: Images,
    *,
    parts: Sequence[str],
    views: int,
    seed: int,
    augment: Config,
    mesh: Mesh,
) -> dict[str, jax.Array]:
    """A teacher's outputs on every view of every training image, read from disk, after computing them if need be.

    Args:
      directory: for these outputs alone.
      teacher: the network, in evaluation mode.
      data: its training images are used.
      parts: which fields of `Outputs`, "logits" or "pooled".
      views: how many views an image has.
      seed: the seed of the student's batches, from which the views are drawn.
      augment: `padding` and `flip`.
      mesh: the devices that compute them, each of which gets all of them.

    Returns:
      By name, `[views, N, _]` in float32.

    Raises:
      RunError: they cannot be written.
    """
    count, shapes = len(data.labels), output_shapes(teacher, data.images.shape[1:])
    card = {
        "teacher": fingerprint(teacher),
        "images": hashlib.sha256(np.asarray(data.images).tobytes()).hexdigest(),
        "views": views,
        "seed": seed,
        "augment": {"padding": augment.padding, "flip": augment.flip},
        "parts": list(parts),
        "jax": jax.__version__,  # whose random numbers draw the views
    }
    lacking = on_main(lambda: _prepare(directory, card))
    template = {name: jax.ShapeDtypeStruct((count, getattr(shapes, name).shape[1]), jnp.float32) for name in parts}
    if lacking:
        say(f"the teacher's outputs are computed once, for {len(lacking)} x {count:,} images, into {directory}")
        of_view = asked(teacher, data, template, seed=seed, augment=augment, mesh=mesh)
        for view in lacking:
            save_arrays(directory / str(view), replicate(of_view(view), mesh))
    # Read from disk the first time too, so that a run and its continuation get the same arrays in the same way.
    by_view = [load_arrays(directory / str(view), template) for view in range(views)]
    return jax.jit(stacked, out_shardings=replicated(mesh))(by_view)


def _prepare(directory: Path, card: Mapping[str, Any]) -> list[int]:
    """Prepare the folder for this card, and list the views that it lacks."""
    if directory.exists() and (changes := differing_keys(_read_card(directory), dict(card), without=())):
        keys = ", ".join(change.partition(":")[0] for change in changes)
        say(f"{directory} holds other outputs (by {keys} in its {CARD}) and is kept as {set_aside(directory)}")
    if not directory.exists():
        with writing(directory):
            directory.mkdir(parents=True)
        write_json(directory / CARD, card)
    return [view for view in range(card["views"]) if fault(directory / str(view))]


def _read_card(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / CARD) if (directory / CARD).exists() else {}
    except RunError:  # cut in half
        return {}


def asked(
    teacher: Network,
    data: Images,
    template: Mapping[str, jax.ShapeDtypeStruct],
    *,
    seed: int,
    augment: Config,
    mesh: Mesh,
) -> Callable[[int], dict[str, np.ndarray]]:
    """The teacher's outputs on all images in one view, as a function of the view."""
    count, teacher = len(data.labels), replicate(teacher, mesh)
    size = -(-min(_BATCH, count) // mesh.size) * mesh.size

    @partial(jax.jit, out_shardings=replicated(mesh))
    def outputs_of(teacher: Network, images: jax.Array, index: jax.Array, view: jax.Array) -> dict[str, jax.Array]:
        seen = augmented_view(images, index, view, seed=seed, padding=augment.padding, flip=augment.flip)
        outputs = teacher.forward(shard_batch({"image": seen}, mesh)["image"], train=False, frozen=True)[0]
        return {name: getattr(outputs, name).astype(jnp.float32) for name in template}

    def of_view(view: int) -> dict[str, np.ndarray]:
        computed = {name: np.empty(shape.shape, np.float32) for name, shape in template.items()}
        for start in range(0, count, size):
            rows = np.arange(start, min(start + size, count), dtype=np.int32)
            index = np.pad(rows, (0, size - len(rows)), mode="edge")  # of one size, so that there is one program
            arrays = replicate((data.images[index], index, np.int32(view)), mesh)
            for name, values in outputs_of(teacher, *arrays).items():
                computed[name][rows] = np.asarray(values)[: len(rows)]
        return computed

    return of_view
