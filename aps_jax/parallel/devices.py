"""The devices of a run, and how its arrays lie on them.

There is one mesh axis. What belongs to an environment (its rollout state, its part of
the replay) or to a window of a batch is sharded over it; everything else is replicated.
A run on one device has no mesh. Several processes (`processes`) have as many devices
of the mesh each, in their order, and play the environments on their own devices.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from aps_jax.parallel import processes

AXIS = "devices"

Mesh = jax.sharding.Mesh | None

REPLICATED = PartitionSpec()
SHARDED = PartitionSpec(AXIS)  # along the leading axis


def make_mesh(num_devices: int) -> Mesh:
    """Takes the first devices of every process, as many of each; `num_devices` in all.

    Raises:
      ValueError: There are not as many, or they cannot be shared out.
    """
    count = jax.process_count()
    if num_devices % count:
        raise ValueError(
            f"num_devices is {num_devices}, and there are {count} processes: it counts "
            f"the devices of all together. Give --num_devices={count}, or a multiple."
        )
    there: list[list[jax.Device]] = [[] for _ in range(count)]
    for device in jax.devices():
        there[device.process_index].append(device)
    fewest = min(there, key=len)
    if num_devices // count > len(fewest):
        where = "this machine" if count == 1 else f"process {there.index(fewest)}"
        raise ValueError(
            f"num_devices is {num_devices}, and {where} has {len(fewest)} "
            f"({fewest[0].device_kind})."
        )
    if num_devices == 1:
        return None
    taken = [device for own in there for device in own[: num_devices // count]]
    axis_types = (jax.sharding.AxisType.Auto,)
    if count == 1:
        shape = (num_devices,)
        return jax.make_mesh(shape, (AXIS,), axis_types=axis_types, devices=taken)
    # In the order of the processes, whatever a topology would prefer: the shards of a
    # process are its own environments.
    mesh = jax.sharding.Mesh(np.array(taken), (AXIS,), axis_types=axis_types)
    # Connects the devices. Gloo fails where a process comes 30 seconds late to their
    # first collective, such as one that compiles for longer, but not to later ones.
    processes.all_gather(None)
    fetch(device_put(np.zeros(len(mesh.local_devices), np.int32), mesh, SHARDED), mesh)
    return mesh


@functools.cache
def num_processes(mesh: Mesh) -> int:
    """Returns over how many processes a mesh extends."""
    return 1 if mesh is None else len({d.process_index for d in mesh.devices.flat})


def process_slice(count: int, mesh: Mesh) -> slice:
    """Returns which of `count` environments, rows or windows are this process's."""
    own = count // num_processes(mesh)
    first = own * jax.process_index() if num_processes(mesh) > 1 else 0
    return slice(first, first + own)


def sharding(mesh: Mesh, spec: PartitionSpec = REPLICATED) -> Sharding:
    """Returns where arrays of a spec lie."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, spec)


def round_up(count: int, mesh: Mesh) -> int:
    """Rounds a number up to a multiple of the number of devices."""
    num_devices = 1 if mesh is None else mesh.size
    return -(-count // num_devices) * num_devices


def device_put(tree: Any, mesh: Mesh = None, specs: Any = REPLICATED) -> Any:
    """Copies a pytree to the devices on which a stage runs, and commits it there.

    All that enters a jitted step is committed alike: a mixture (restored arrays are
    committed, computed ones are not) would compile the same step twice.

    Args:
      tree: Arrays of the host or of any device. Of several processes each gives its own
        `process_slice` of what is sharded, and the same of all else.
      mesh: The stage's devices.
      specs: A spec for all, or a pytree prefix of specs.
    """
    wanted = shardings(mesh, specs)
    if num_processes(mesh) == 1:
        return jax.device_put(tree, wanted)

    def put(where: Sharding, part: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), part
        )

    return jax.tree.map(put, wanted, tree)


def local_rows(array: jax.Array) -> np.ndarray:
    """Copies this process's rows of an array to the host, all if it is replicated."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    first_row = {shard.index[0].start: shard for shard in array.addressable_shards}
    return np.concatenate(
        [np.asarray(shard.data) for _, shard in sorted(first_row.items())]
    )


def fetch(tree: Any, mesh: Mesh = None) -> Any:
    """Copies a whole pytree to the host of every process. Collective."""
    if num_processes(mesh) > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def local(tree: Any) -> Any:
    """Copies replicated arrays to this process's first device alone."""

    def first(x: Any) -> Any:
        is_elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        return x.addressable_data(0) if is_elsewhere else x

    return device_put(jax.tree.map(first, tree))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Returns a pytree of shardings for one of specs."""
    return jax.tree.map(
        lambda spec: sharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
