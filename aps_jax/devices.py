"""The devices of a run, and what of it lies on each of them.

One mesh axis: what belongs to an environment (its memory, its part of the replay) and to a
window of a batch is sharded over it, all else lies on every device alike. One device has
no mesh, so that a run on it is compiled without any.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

AXIS = "devices"

Mesh = jax.sharding.Mesh | None

EVERYWHERE = PartitionSpec()
SHARDED = PartitionSpec(AXIS)  # along the leading axis


def make_mesh(num_devices: int) -> Mesh:
    """Takes the first devices of this process.

    Raises:
      ValueError: There are not as many.
    """
    there = jax.local_devices()
    if num_devices > len(there):
        raise ValueError(
            f"num_devices is {num_devices}, and this machine has {len(there)} "
            f"({there[0].device_kind})."
        )
    if num_devices == 1:
        return None
    return jax.make_mesh(
        (num_devices,),
        (AXIS,),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=there[:num_devices],
    )


def sharding(mesh: Mesh, spec: PartitionSpec = EVERYWHERE) -> Sharding:
    """Returns where arrays of a spec lie."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, spec)


def round_up(count: int, mesh: Mesh) -> int:
    """Returns the least number from `count` on of which every device gets as many."""
    num_devices = 1 if mesh is None else mesh.size
    return -(-count // num_devices) * num_devices


def put(tree: Any, mesh: Mesh = None, specs: Any = EVERYWHERE) -> Any:
    """Copies a pytree to the devices on which a stage runs, and commits it there.

    All that enters a jitted step is committed alike: a mixture (restored arrays are
    committed, computed ones are not) would compile the same step twice.

    Args:
      tree: Arrays of the host or of any device.
      mesh: The stage's devices.
      specs: A spec for all, or a pytree prefix of specs.
    """
    return jax.device_put(tree, shardings(mesh, specs))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Returns a pytree of shardings for one of specs."""
    return jax.tree.map(
        lambda spec: sharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def spread(
    function: Callable[..., Any], mesh: Mesh, *, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Makes a function of a device's share one of the whole.

    Args:
      function: Takes `axis_name`, by which it reduces and gathers; None on one device.
      mesh: The stage's devices.
      in_specs: A spec per positional argument, or a pytree prefix of specs.
      out_specs: The same for what it returns; what is `EVERYWHERE` it must compute alike
        on every device.

    Returns:
      The function without `axis_name`.
    """
    if mesh is None:
        return function

    def share(*args: Any) -> Any:
        return function(*args, axis_name=AXIS)

    # What is gathered is the same everywhere, which JAX's check does not know.
    return jax.shard_map(
        share, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
