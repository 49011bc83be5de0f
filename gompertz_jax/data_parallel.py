"""One program over a mesh of devices: each has a share of the batch and a copy of everything else.

The step is written for one device. Under `jax.jit` XLA's partitioner makes the program of each device from it, once the
batch is declared to be spread; means over the batch (losses, BatchNorm) become means over the global batch by
themselves. What the partitioner would do badly is written out here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXIS = "data"
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()


def check_mesh(mesh: Mesh | None) -> None:
    """Refuse a mesh that is not one axis called `data` that XLA's partitioner divides.

    Raises:
      ValueError: it has other axes, or of another type.
    """
    if mesh is None:
        return
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"mesh must have one axis, {AXIS!r}, got {mesh.axis_names}")
    if mesh.axis_types != (AxisType.Auto,):
        raise ValueError(f"mesh must be made with axis_types=(jax.sharding.AxisType.Auto,), got {mesh.axis_types}")


def shard_batch(batch: Mapping[str, Array], mesh: Mesh | None) -> Mapping[str, Array]:
    """Declare that a batch's leading axis is sharded over the devices.

    Raises:
      ValueError: an entry of the batch has no leading axis, or one that does not divide by the number of devices.
    """
    if mesh is None or mesh.size == 1:
        return batch
    for name, values in batch.items():
        if values.ndim == 0:
            raise ValueError(f"{name} of a batch must have one row per image to be spread over devices, got a scalar")
        if values.shape[0] % mesh.size:
            raise ValueError(
                f"a batch of {values.shape[0]} ({name}) does not divide by {mesh.size} devices: "
                f"take a multiple of {mesh.size}, or fewer devices"
            )
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, SHARDED))


def per_image(mesh: Mesh | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper that runs a function of per-image arrays on each device's images alone; see `Record.per_image`.

    The partitioner would gather the whole batch for a loop over its images, or synchronise the devices in every
    iteration to check whether all of them are done.
    """
    return _mapped(mesh, SHARDED)


def whole_batch(mesh: Mesh | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper that runs a function on the gathered batch, the same on every device; see `Record.whole_batch`."""
    return _mapped(mesh, REPLICATED)


def each_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function that every device runs by itself on its parts of the arguments."""
    # Loops that start from constants, such as OTT's, do not pass the check.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _mapped(mesh: Mesh | None, spec: PartitionSpec) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if mesh is None or mesh.size == 1:
        return lambda function: function

    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arrays: Array, **scalars: Any) -> Any:
            traced = {name: value for name, value in scalars.items() if isinstance(value, jax.Array)}
            fixed = {name: value for name, value in scalars.items() if name not in traced}
            alone = each_device(
                lambda arrays, traced: function(*arrays, **traced, **fixed), mesh, (spec, REPLICATED), spec
            )
            return alone(arrays, traced)

        return run

    return mapped


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of what every device has; None where there is one device."""
    return None if mesh is None else NamedSharding(mesh, REPLICATED)
