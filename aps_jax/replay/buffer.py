"""Replay of single frames on the device: added in place, sampled as stacked windows.

The buffer is Flashbax's trajectory buffer; sampling is our own, so that it does not
depend on how many devices hold a part. Letters: `E` environments, `B` windows,
`S` frames of an observation, `T` states of a window, `L = T + S - 1` its frames.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flashbax.buffers import trajectory_buffer
from jax.sharding import PartitionSpec

from aps_jax.replay import frames
from aps_jax.replay import priorities as priorities_lib
from aps_jax.types import Array, ObservationSpec, PRNGKey

# A TPU copies the whole replay before it reads a row, unless rows are whole numbers of
# its 128 lanes. Small frames would be mostly zeros.
_LANES = 128
_SMALL_FRAME = 1024  # bytes

# Windows that `map_sample` and `map_all` hold at a time.
CHUNK_SIZE = 1024

Extras = Mapping[str, jax.Array]


class Step(NamedTuple):
    """One agent step of one environment, as stored (leading axes are added outside).

    `action` and `extras` were chosen after seeing `frame`; the other fields tell how
    `frame` was reached. The buffer holds frames as rows `[R]`, zeros at the end.
    """

    frame: Array  # [*frame_shape] uint8
    action: Array  # [] int32
    reward: Array  # [] float32, unclipped reward.
    terminated: Array  # [] bool, game over.
    is_first: Array  # [] bool, a reset frame: the step before it ended a game.
    life_lost: Array  # [] bool, fewer lives than one step before.
    id: Array  # [] int32, differs between steps of a run.
    extras: Extras  # each [...], what the agent wants replayed with the step


class Window(NamedTuple):
    """`T` consecutive agent steps with their stacked observations.

    Fields other than `observation` are those of `Step`, time on the leading axis.
    """

    observation: jax.Array  # [T, *observation.shape] uint8, newest frame last.
    action: jax.Array  # [T] int32
    reward: jax.Array | None  # [T] float32; None in a reward-free phase
    terminated: jax.Array  # [T] bool
    is_first: jax.Array  # [T] bool
    life_lost: jax.Array  # [T] bool
    id: jax.Array  # [T] int32
    extras: Extras  # each [T, ...]


# Windows without observations [B, T, ...] -> [B, K] int, the states whose observations
# alone are stacked.
States = Callable[[Window], jax.Array]


class Buffer(NamedTuple):
    """Steps of `E` environments: a pytree of device arrays."""

    experience: Step  # [E, length, ...]
    current_index: jax.Array  # [] int32, where the next step is written
    is_full: jax.Array  # [] bool
    # None where windows are drawn uniformly.
    priorities: priorities_lib.Priorities | None = None

    @property
    def length(self) -> int:
        """Steps held of each environment."""
        return self.experience.action.shape[1]


def specs(sharded: PartitionSpec) -> Buffer:
    """Returns which fields are sharded with the environments, the others replicated."""
    whole: Any = PartitionSpec()
    return Buffer(sharded, whole, whole, sharded)  # type: ignore[arg-type]


def init(
    observation: ObservationSpec,
    extras: Extras,
    *,
    num_envs: int,
    size: int,
    is_prioritised: bool = False,
) -> Buffer:
    """Allocates an empty buffer.

    Args:
      observation: What an agent sees.
      extras: Examples of what an agent wants replayed, without leading axis.
      num_envs: `E`, environments that add a step together.
      size: Agent steps held of all together; rounded down to a multiple of `num_envs`.
      is_prioritised: Whether it has priorities, for `sample_prioritised`.

    Raises:
      ValueError: The buffer would hold less than one step of each environment.
    """
    length = size // num_envs
    if length < 1:
        raise ValueError(f"size must be at least num_envs, got {size} and {num_envs}.")
    state = trajectory_buffer.init(_example(observation, extras), num_envs, length)
    return Buffer(
        state.experience,
        state.current_index,
        state.is_full,
        priorities_lib.init(num_envs, length) if is_prioritised else None,
    )


def num_bytes(
    observation: ObservationSpec, extras: Extras, *, num_envs: int, size: int
) -> int:
    """Returns the bytes of a buffer, counted from its shapes."""
    example = jax.eval_shape(functools.partial(_example, observation, extras))
    of_step = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(example))
    return of_step * num_envs * (size // num_envs)


def _example(observation: ObservationSpec, extras: Extras) -> Step:
    length = math.prod(observation.frame_shape)
    if length >= _SMALL_FRAME:
        length = math.ceil(length / _LANES) * _LANES
    return Step(
        frame=jnp.zeros(length, jnp.uint8),
        action=jnp.zeros((), jnp.int32),
        reward=jnp.zeros((), jnp.float32),
        terminated=jnp.zeros((), bool),
        is_first=jnp.zeros((), bool),
        life_lost=jnp.zeros((), bool),
        id=jnp.zeros((), jnp.int32),
        extras=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), extras),
    )


def add(buffer: Buffer, step: Step) -> Buffer:
    """Adds a step `[E]` of every environment; in place where the buffer is donated."""
    given, index = buffer.priorities, buffer.current_index
    state = trajectory_buffer.TrajectoryBufferState(
        experience=buffer.experience, current_index=index, is_full=buffer.is_full
    )
    row = jnp.reshape(step.frame, (step.frame.shape[0], -1))
    zeros = buffer.experience.frame.shape[-1] - row.shape[-1]
    step = step._replace(frame=jnp.pad(row, ((0, 0), (0, zeros))))
    state = trajectory_buffer.add(state, jax.tree.map(lambda x: x[:, None], step))
    return Buffer(
        state.experience,
        state.current_index,
        state.is_full,
        None if given is None else priorities_lib.add(given, index),
    )


class Indices(NamedTuple):
    """Where windows of one length lie in the buffer."""

    env: jax.Array  # [B] int32, counted from the device's first.
    time: jax.Array  # [B] int32, of the window's first frame, modulo the length.


def sample(
    buffer: Buffer,
    key: PRNGKey,
    *,
    observation: ObservationSpec,
    num_windows: int,
    num_states: int,
    states: States | None = None,
    axis_name: str | None = None,
) -> Window:
    """Draws windows uniformly over all that lie in the buffer: see `sample_indices`.

    Args:
      buffer: With `axis_name` this device's: that of its `E / N` environments.
      key: Is consumed.
      observation: What an agent sees, `S` frames.
      num_windows: `B`.
      num_states: `T`.
      states: Whose observations are wanted; None: those of all.
      axis_name: Axis of the `N` devices on each of which this runs; None on one.

    Returns:
      A `Window` with leading axis `[B]`, or of this device `[B / N]`. The windows are
      the same for every number of devices.
    """
    num_frames = num_states + observation.stack - 1
    indices = _sample(buffer, key, num_windows, num_frames, axis_name)
    return _read(buffer, indices, num_frames, observation, states)


def sample_prioritised(
    buffer: Buffer,
    key: PRNGKey,
    *,
    observation: ObservationSpec,
    num_windows: int,
    num_states: int,
    importance: float | jax.Array,
    states: States | None = None,
) -> tuple[Window, Indices, jax.Array]:
    """Draws windows by the priorities of their first states, on one device.

    They are those of `sample`, without the windows whose first step is no transition
    because a game begins at the second.

    Args:
      buffer: With priorities.
      key: Is consumed.
      observation: What an agent sees, `S` frames.
      num_windows: `B`.
      num_states: `T`.
      importance: `[]` float, beta: how far the importance weights undo the priorities.
      states: As `sample`.

    Returns:
      The `Window` with leading axis `[B]`, where their first states lie, and their
      importance weights `[B]`, at most 1.
    """
    assert buffer.priorities is not None
    history = observation.stack - 1
    num_frames = num_states + history
    oldest, num_starts = _starts(buffer, num_frames)
    # How much newer than the oldest each place is.
    age = (jnp.arange(buffer.length, dtype=jnp.int32) - oldest) % buffer.length
    is_start = (age >= history) & (age < history + num_starts)
    is_last = jnp.roll(buffer.experience.is_first, -1, axis=1)
    weight = jnp.where(is_start[None, :] & ~is_last, buffer.priorities.weight, 0.0)
    env, place, weight = priorities_lib.draw(
        key, weight, num_windows=num_windows, importance=importance
    )
    first = Indices(env, place - history)
    windows = _read(buffer, first, num_frames, observation, states)
    return windows, Indices(env, place), weight


def map_sample(
    function: Callable[[Window], Any],
    buffer: Buffer,
    key: PRNGKey,
    *,
    observation: ObservationSpec,
    num_windows: int,
    num_states: int,
    axis_name: str | None = None,
) -> Any:
    """Returns `function(sample(...))`, for at most `CHUNK_SIZE` windows at a time.

    The function must treat each window by itself.
    """
    num_frames = num_states + observation.stack - 1
    indices = _sample(buffer, key, num_windows, num_frames, axis_name)
    return _map_in_chunks(
        lambda some: function(_read(buffer, some, num_frames, observation)), indices
    )


def map_all(
    function: Callable[[Window], Any],
    buffer: Buffer,
    *,
    observation: ObservationSpec,
    num_steps: int,
) -> Any:
    """Maps a function over the first steps held, as windows of one state.

    Args:
      function: Maps a `Window` `[N, 1, ...]` to a pytree `[N, ...]`; it must treat each
        window by itself, and sees no more than about `CHUNK_SIZE` at a time.
      buffer: Holds at least `num_steps` steps of each environment and is not full, so
        that the first is the oldest of a run.
      observation: What an agent sees, `S` frames.
      num_steps: Steps of each environment.

    Returns:
      The pytree, `[num_steps, E, ...]`.
    """
    num_envs = buffer.experience.action.shape[0]
    steps_at_once = max(1, CHUNK_SIZE // num_envs)

    def of_steps(time: jax.Array) -> Any:  # [S] -> [S, E, ...]
        # What lies before the first step is not seen: that is a reset's.
        first = Indices(jnp.zeros_like(time), time - (observation.stack - 1))

        def of_env(steps: Step) -> Window:  # So that each device reads its own.
            alone = jax.tree.map(lambda x: x[None], steps)
            one = buffer._replace(experience=alone)
            return _read(one, first, observation.stack, observation)

        windows = jax.vmap(of_env)(buffer.experience)
        result = function(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), windows))
        return jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(num_envs, -1, *x.shape[1:]), 0, 1), result
        )

    return _map_in_chunks(
        of_steps, jnp.arange(num_steps, dtype=jnp.int32), size=steps_at_once
    )


def _sample(
    buffer: Buffer,
    key: PRNGKey,
    num_windows: int,
    num_frames: int,
    axis_name: str | None,
) -> Indices:
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    oldest, num_starts = _starts(buffer, num_frames)
    env, start = sample_indices(
        key,
        num_envs=buffer.experience.action.shape[0] * num_devices,
        num_starts=num_starts,
        num_windows=num_windows,
        axis_name=axis_name,
    )
    return Indices(env, oldest + start)


def _starts(buffer: Buffer, num_frames: int) -> tuple[jax.Array, jax.Array]:
    """Returns the oldest place, and from how many on a window can begin."""
    num_held = jnp.where(buffer.is_full, buffer.length, buffer.current_index)
    oldest = jnp.where(buffer.is_full, buffer.current_index, 0)
    return oldest, jnp.maximum(num_held - num_frames + 1, 0)


def _read(
    buffer: Buffer,
    indices: Indices,
    num_frames: int,
    observation: ObservationSpec,
    states: States | None = None,
) -> Window:
    """Reads windows, and rebuilds the stacked observations of their single frames.

    As EnvPool's own `stack_num`: no stack reaches over a reset. At and after it, the
    reset frame fills the places of the frames that do not exist.
    """
    stack, shape = observation.stack, observation.frame_shape
    time = (indices.time[:, None] + jnp.arange(num_frames)[None, :]) % buffer.length
    fields = buffer.experience._asdict()
    frame = fields.pop("frame")
    fields = jax.tree.map(lambda x: x[indices.env[:, None], time], fields)
    place = functools.partial(frames.stack_places, stack=stack)
    places = jax.vmap(place)(fields["is_first"])  # [B, T, S]
    fields = jax.tree.map(lambda x: x[:, stack - 1 :], fields)
    windows = Window(observation=None, **fields)  # type: ignore[arg-type]
    if states is not None:
        places = _pick(places, states(windows))
    rows = frame[indices.env[:, None, None], _pick(time, places)]  # [B, T, S, lanes]
    stacks = rows[..., : math.prod(shape)].reshape(*rows.shape[:3], *shape)
    stacks = jnp.moveaxis(stacks, 2, 4)  # [B, T, H, W, S..]
    return windows._replace(observation=stacks.reshape(*stacks.shape[:4], -1))


_pick = jax.vmap(lambda x, i: x[i])


def _map_in_chunks(
    function: Callable[[Any], Any], items: Any, *, size: int | None = None
) -> Any:
    """Returns `function(items)`, computed for at most `size` items at a time."""
    size = CHUNK_SIZE if size is None else size
    num_items = jax.tree.leaves(items)[0].shape[0]
    num_chunks = math.ceil(num_items / size)
    if num_chunks <= 1:
        return function(items)
    size = math.ceil(num_items / num_chunks)
    # The last chunk is filled up with repeated items, whose results are dropped.
    chunks = jax.tree.map(lambda x: jnp.resize(x, (num_chunks, size)), items)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:num_items],
        jax.lax.map(function, chunks),
    )


def sample_indices(
    key: PRNGKey,
    *,
    num_envs: int,
    num_starts: jax.Array,
    num_windows: int,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws where windows lie: environments in strata, starts uniformly.

    Window `b` lies in environment `floor((b E + r) / B)`, `r` uniform in `[0, E)`, from
    a key of its own. Over all `b` that is uniform over the environments, with less
    variance than independent draws; and the windows `[k B / N, (k + 1) B / N)` lie in
    the environments `[k E / N, (k + 1) E / N)`, those of device `k` of `N`.

    Args:
      key: Is consumed.
      num_envs: `E`, environments of all devices.
      num_starts: `[]` int, steps of an environment at which a window can begin.
      num_windows: `B`, windows of all devices.
      axis_name: Axis of the devices, each of which draws its part; None on one.

    Returns:
      `[B / N]` int32 environments, counted from the device's first, and `[B / N]` int32
      starts, counted from the oldest step.
    """
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    num_own = num_windows // num_devices
    # b E = whole * B + rest, exact on the host; on the device it might overflow.
    whole, rest = np.divmod(np.arange(num_own) * num_envs, num_windows)

    def draw(window: jax.Array) -> tuple[jax.Array, jax.Array]:
        env_key, start_key = jax.random.split(jax.random.fold_in(key, window))
        return (
            jax.random.randint(env_key, (), 0, num_envs),
            jax.random.randint(start_key, (), 0, num_starts),
        )

    offset, start = jax.vmap(draw)(
        device * num_own + jnp.arange(num_own, dtype=jnp.int32)
    )
    env = (offset + rest.astype(np.int32)) // num_windows + whole.astype(np.int32)
    return env, start
