"""Replay of single frames on the device: added in place, sampled as stacked windows.

The ring is Flashbax's trajectory buffer; what is drawn from it is ours, so that it does
not depend on how many devices hold a part of the ring. Letters: `E` environments, `B`
windows, `T` states of a window, `L = T + STACK_SIZE - 1` its frames, `D` feature dimension.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flashbax.buffers import trajectory_buffer

from aps_jax import types
from aps_jax.config import STACK_SIZE
from aps_jax.replay import frames

ReplayState = trajectory_buffer.TrajectoryBufferState

FRAME_SHAPE = (84, 84)

# Windows that `map_sample` holds at a time.
CHUNK_SIZE = 1024


class Step(NamedTuple):
    """One agent step of one environment, as stored (leading axes are added outside).

    `action` and `task` were chosen after seeing `frame`; the other fields tell how
    `frame` was reached. 7,091 bytes at D = 5, of which 7,056 are the frame.
    """

    frame: jax.Array  # [84, 84] uint8
    action: jax.Array  # [] int32
    reward: jax.Array  # [] float32, unclipped game reward.
    terminated: jax.Array  # [] bool, game over.
    is_first: jax.Array  # [] bool, a reset frame: the step before it ended a game.
    life_lost: jax.Array  # [] bool, fewer lives than one step before.
    task: jax.Array  # [D] float32
    id: jax.Array  # [] int32, differs between steps of a run.


class Window(NamedTuple):
    """`T` consecutive agent steps with their stacked observations.

    Fields other than `observation` are those of `Step`, time on the leading axis.
    """

    observation: jax.Array  # [T, 84, 84, STACK_SIZE] uint8, newest frame last.
    action: jax.Array  # [T] int32
    reward: jax.Array  # [T] float32
    terminated: jax.Array  # [T] bool
    is_first: jax.Array  # [T] bool
    life_lost: jax.Array  # [T] bool
    task: jax.Array  # [T, D] float32
    id: jax.Array  # [T] int32


class Places(NamedTuple):
    """Where windows of one length lie in the ring."""

    env: jax.Array  # [B] int32, counted from the device's first.
    time: jax.Array  # [B] int32, of the window's first frame, modulo the ring's length.


class Replay(NamedTuple):
    """The verbs of a replay; `make_replay` binds its sizes."""

    init: Callable[[], ReplayState]
    add: Callable[[ReplayState, Step], ReplayState]
    sample: Callable[..., Window]
    map_sample: Callable[..., Any]
    num_bytes: int  # of the ring, counted from the shapes.


def make_replay(*, num_envs: int, size: int, feature_dim: int) -> Replay:
    """Makes a replay for `size` agent steps of `num_envs` environments together.

    Args:
      num_envs: `E`, environments that add a step together.
      size: Agent steps held; rounded down to a multiple of `num_envs`.
      feature_dim: `D` of the stored task vectors.

    Returns:
      A `Replay` of pure functions. `init()` allocates the ring; `add(state, step)` takes
      a `Step` with leading axis `[E]` and is in place where the state is donated;
      `sample(state, key, num_windows=B, num_states=T)` returns a `Window` with leading
      axis `[B]`, windows uniform over all that lie in the ring: see `draw_places`. The
      key is consumed. With `axis_name` the function runs on each device of that axis:
      `state` holds the ring of its `E / N` environments, and it returns its `B / N` of
      the `B` windows, which are the same for every number `N` of devices.
      `map_sample(function, state, key, ...)` returns `function(sample(state, key, ...))`
      for a function that treats each window by itself, but never holds more than
      `CHUNK_SIZE` of the windows.

    Raises:
      ValueError: The replay would hold less than one step of each environment.
    """
    length = size // num_envs
    if length < 1:
        raise ValueError(f"size must be at least num_envs, got {size} and {num_envs}.")
    example = Step(
        frame=jnp.zeros(FRAME_SHAPE, jnp.uint8),
        action=jnp.zeros((), jnp.int32),
        reward=jnp.zeros((), jnp.float32),
        terminated=jnp.zeros((), bool),
        is_first=jnp.zeros((), bool),
        life_lost=jnp.zeros((), bool),
        task=jnp.zeros((feature_dim,), jnp.float32),
        id=jnp.zeros((), jnp.int32),
    )

    def init() -> ReplayState:
        return trajectory_buffer.init(example, num_envs, length)

    def add(state: ReplayState, step: Step) -> ReplayState:
        return trajectory_buffer.add(state, jax.tree.map(lambda x: x[:, None], step))

    def draw(
        state: ReplayState,
        key: types.PRNGKey,
        num_windows: int,
        num_states: int,
        axis_name: str | None,
    ) -> Places:
        num_frames = num_states + STACK_SIZE - 1
        num_held = jnp.where(state.is_full, length, state.current_index)
        oldest = jnp.where(state.is_full, state.current_index, 0)
        env, start = draw_places(
            key,
            num_envs=num_envs,
            num_starts=jnp.maximum(num_held - num_frames + 1, 0),
            num_windows=num_windows,
            axis_name=axis_name,
        )
        return Places(env, oldest + start)

    def read(state: ReplayState, places: Places, num_states: int) -> Window:
        num_frames = num_states + STACK_SIZE - 1
        time = places.time[:, None] + jnp.arange(num_frames)[None, :]
        steps = jax.tree.map(
            lambda x: x[places.env[:, None], time % length], state.experience
        )
        return jax.vmap(stack_window)(steps)

    def sample(
        state: ReplayState,
        key: types.PRNGKey,
        *,
        num_windows: int,
        num_states: int,
        axis_name: str | None = None,
    ) -> Window:
        places = draw(state, key, num_windows, num_states, axis_name)
        return read(state, places, num_states)

    def map_sample(
        function: Callable[[Window], Any],
        state: ReplayState,
        key: types.PRNGKey,
        *,
        num_windows: int,
        num_states: int,
        axis_name: str | None = None,
    ) -> Any:
        places = draw(state, key, num_windows, num_states, axis_name)
        return _map_in_chunks(
            lambda some: function(read(state, some, num_states)), places
        )

    num_bytes = sum(x.nbytes for x in jax.tree.leaves(example)) * num_envs * length
    return Replay(init, add, sample, map_sample, num_bytes)


def _map_in_chunks(function: Callable[[Places], Any], places: Places) -> Any:
    """Returns `function(places)`, computed for at most `CHUNK_SIZE` places at a time."""
    num_places = places.env.shape[0]
    num_chunks = math.ceil(num_places / CHUNK_SIZE)
    if num_chunks <= 1:
        return function(places)
    size = math.ceil(num_places / num_chunks)
    # What is computed for the places that fill up the last chunk is thrown away.
    chunks = jax.tree.map(lambda x: jnp.resize(x, (num_chunks, size)), places)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:num_places],
        jax.lax.map(function, chunks),
    )


def draw_places(
    key: types.PRNGKey,
    *,
    num_envs: int,
    num_starts: jax.Array,
    num_windows: int,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws where windows lie: environments in strata, starts uniformly.

    Window `b` lies in environment `floor((b E + r) / B)`, `r` uniform in `[0, E)`, from a
    key of its own. Over all `b` that is uniform over the environments, with less variance
    than independent draws; and the windows `[k B / N, (k + 1) B / N)` lie in the
    environments `[k E / N, (k + 1) E / N)`, those of device `k` of `N`.

    Args:
      key: Is consumed.
      num_envs: `E`, environments of all devices.
      num_starts: `[]` int, places of an environment at which a window can begin.
      num_windows: `B`, windows of all devices.
      axis_name: Axis of the devices, each of which draws its share; None on one.

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
    env = whole.astype(np.int32) + (rest.astype(np.int32) + offset) // num_windows
    return env, start


def stack_window(steps: Step) -> Window:
    """Rebuilds the stacked observations of a window of single frames.

    As EnvPool's own `stack_num=4`: no stack reaches over a reset, at and after which the
    reset frame fills the places of the frames that do not exist.

    Args:
      steps: A `Step` with leading axis `[L]`, `L = T + STACK_SIZE - 1` in time order.

    Returns:
      The `Window` of the last `T` steps.
    """
    places = frames.stack_places(steps.is_first)  # [T, STACK_SIZE]
    stacks = steps.frame[places]  # [T, STACK_SIZE, 84, 84]
    fields = {
        name: value[STACK_SIZE - 1 :]
        for name, value in steps._asdict().items()
        if name != "frame"
    }
    return Window(observation=jnp.moveaxis(stacks, 1, -1), **fields)
