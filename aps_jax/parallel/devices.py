"""The devices of a run, and what of it lies on each of them.

One mesh axis: what belongs to an environment (its memory, its part of the replay) and to a
window of a batch is sharded over it, all else lies on every device alike. One device has
no mesh, so that a run on it is compiled without any. Of several processes (`processes`) each
has as many devices of the mesh, in the order of the processes, and plays the environments
that lie on its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from aps_jax.parallel import processes

AXIS = "devices"

Mesh = jax.sharding.Mesh | None

EVERYWHERE = PartitionSpec()
SHARDED = PartitionSpec(AXIS)  # along the leading axis


def make_mesh(num_devices: int) -> Mesh:
    """Takes the first devices of every process, as many of each.

    Args:
      num_devices: Of all processes together.

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
        return jax.make_mesh(
            (num_devices,), (AXIS,), axis_types=axis_types, devices=taken
        )
    # In the order of the processes, whatever a topology would prefer: the shards of a
    # process are its own environments.
    mesh = jax.sharding.Mesh(np.array(taken), (AXIS,), axis_types=axis_types)
    _acquaint(mesh)
    return mesh


def _acquaint(mesh: Mesh) -> None:
    """Connects the devices of several processes, while all of them are here.

    Gloo gives up on a process that comes 30 seconds late to the first collective, such as
    one that compiles for longer; to later ones all may come as late as they like.
    """
    processes.all_gather(None)
    nothing = np.zeros(len(mesh.local_devices), np.int32)
    jax.block_until_ready(_largest(sharding(mesh))(put(nothing, mesh, SHARDED)))


@functools.cache
def num_processes(mesh: Mesh) -> int:
    """Returns over how many processes a mesh extends."""
    return 1 if mesh is None else len({d.process_index for d in mesh.devices.flat})


def share(count: int, mesh: Mesh) -> slice:
    """Returns which of `count` environments, rows or windows are this process's."""
    own = count // num_processes(mesh)
    first = own * jax.process_index() if num_processes(mesh) > 1 else 0
    return slice(first, first + own)


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
      tree: Arrays of the host or of any device. Of several processes each gives its own
        `share` of what is sharded, and the same of all else.
      mesh: The stage's devices.
      specs: A spec for all, or a pytree prefix of specs.
    """
    wanted = shardings(mesh, specs)
    if num_processes(mesh) == 1:
        return jax.device_put(tree, wanted)
    return jax.tree.map(
        lambda where, part: jax.tree.map(lambda x: place(x, where), part), wanted, tree
    )


def place(value: Any, where: Sharding) -> jax.Array:
    """Makes an array of all processes from this one's `share`, sending nothing."""
    own = np.asarray(value)
    if where.is_fully_replicated:
        return jax.make_array_from_callback(own.shape, where, lambda index: own[index])
    shape = (own.shape[0] * num_processes(where.mesh), *own.shape[1:])
    return jax.make_array_from_process_local_data(where, own, shape)


def own(array: jax.Array) -> np.ndarray:
    """Copies this process's `share` of an array to the host, or all of a replicated one."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    first_row = {shard.index[0].start: shard for shard in array.addressable_shards}
    return np.concatenate(
        [np.asarray(shard.data) for _, shard in sorted(first_row.items())]
    )


def get(tree: Any, mesh: Mesh = None) -> Any:
    """Copies a whole pytree to the host of every process; all must call it."""
    if num_processes(mesh) > 1:
        tree = _gather(sharding(mesh))(tree)
    return jax.device_get(tree)


@functools.cache
def _gather(everywhere: Sharding) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=everywhere)


def local(tree: Any) -> Any:
    """Copies what lies on every device to the first of this process alone."""

    def first(x: Any) -> Any:
        is_spread = isinstance(x, jax.Array) and not x.is_fully_addressable
        return x.addressable_data(0) if is_spread else x

    return put(jax.tree.map(first, tree))


class Vote:
    """Whether any process wishes something: the same answer in all, at the same call.

    A wish is told by a collective of one number, and read some calls later, so that
    nobody waits for it.
    """

    def __init__(self, mesh: Mesh, *, every: int = 4):
        """Asks nothing yet.

        Args:
          mesh: The stage's devices.
          every: Calls from one vote to the next. A wish is heard after two at most.
        """
        self._mesh = mesh
        self._every = every
        self._calls = 0
        self._outcome: jax.Array | None = None
        self.is_needed = num_processes(mesh) > 1

    def ask(self, wish: bool) -> bool:
        """Returns whether any process wished it; all must call as often."""
        if not self.is_needed:
            return wish
        self._calls += 1
        if self._calls % self._every:
            return False
        before, devices_here = self._outcome, len(self._mesh.local_devices)
        wishes = put(np.full(devices_here, wish, np.int32), self._mesh, SHARDED)
        self._outcome = _largest(sharding(self._mesh))(wishes)
        return before is not None and bool(jax.device_get(before))


@functools.cache
def _largest(everywhere: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=everywhere)


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
