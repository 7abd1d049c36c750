"""Worlds: environments of pure functions that step on the device, and pools of them.

A world is made of any environment in gymnax's interface: `minatar/NAME` by gymnax,
`maze/NAME` by this project. At the end of an episode it does what a pool of Atari games
does (see `atari`): the true last observation, then a reset step that ignores the action
and is no transition. Letters: `E` environments, `M` bytes.
"""

import base64
import contextlib
import difflib
import functools
import importlib
import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from aps_jax import types
from aps_jax.envs import atari, maze
from aps_jax.ops import hashing

# The planes of each MinAtar game: configs are read where gymnax is not installed.
MINATAR = {
    "Asterix": 4,
    "Breakout": 4,
    "Freeway": 7,
    "Seaquest": 10,
    "SpaceInvaders": 6,
}
NAMES = (
    *(f"minatar/{name}" for name in MINATAR),
    *(f"maze/{name}{way}" for name in maze.MAPS for way in ("", "/pixels")),
)
_MAZE_SCALE = 2  # sides of a video's pixel in those of what the agent sees
_RAM_BYTES = 16  # A longer state is hashed to as many.


class WorldState(NamedTuple):
    """All that the next steps of `E` environments depend on."""

    environment: Any  # the environments' own states, each [E, ...]
    key: jax.Array  # [E, 2] uint32, from which each draws all that is random
    num_steps: jax.Array  # [E] int32, steps so far; numbers the random stream
    is_done: jax.Array  # [E] bool, whether the next step begins an episode


class World(NamedTuple):
    """One kind of environment: pure functions of `E` of them."""

    num_actions: int
    observation: types.ObservationSpec
    # A key [E] for each environment -> state, reset observations.
    reset: Callable[[jax.Array], tuple[WorldState, types.TimeStep]]
    # state, action [E] int32 -> state, time step; `ram` tells states apart, but for the
    # time: it holds their bytes, or a hash of more than 16 of them.
    step: Callable[[WorldState, types.Array], tuple[WorldState, types.TimeStep]]
    # On the host: state, index of an environment -> picture [H, W, 3] uint8.
    render: Callable[[WorldState, int], np.ndarray]


def check(name: str) -> None:
    """Raises an error that names the nearest worlds unless there is this one.

    Raises:
      ValueError: There is no such world.
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.0)
        raise ValueError(
            f"Unknown world {name!r}; the nearest are {', '.join(nearest)}. There are "
            f"minatar/NAME for {', '.join(MINATAR)}, and maze/NAME or maze/NAME/pixels "
            f"for {', '.join(maze.MAPS)}."
        )


@functools.cache
def observation_of(name: str) -> types.ObservationSpec:
    """Returns what a world shows; gymnax is not needed.

    Raises:
      ValueError: There is no such world.
    """
    check(name)
    family, of_family = name.split("/", 1)
    if family == "minatar":
        return types.ObservationSpec((10, 10, MINATAR[of_family]), 1, 1)
    return _maze_environment(of_family).observation


@functools.cache
def make(name: str) -> World:
    """Makes a world: the same object for the same name, so that it compiles once.

    Raises:
      ValueError: There is no such world, or gymnax is needed and not installed.
    """
    observation = observation_of(name)
    family, of_family = name.split("/", 1)
    if family == "minatar":
        environment, params = _import_gymnax().make(f"{of_family}-MinAtar")
        return from_gymnax(environment, params, observation)
    environment = _maze_environment(of_family)
    params = maze.MazeParams(maze.HORIZONS[of_family.partition("/")[0]])

    def draw(state: maze.MazeState) -> np.ndarray:
        picture = np.asarray(environment.draw(state.place))
        picture = picture.repeat(_MAZE_SCALE, axis=0).repeat(_MAZE_SCALE, axis=1)
        return np.repeat(picture[..., None], 3, axis=-1)

    return from_gymnax(environment, params, observation, draw)


@functools.cache
def _maze_environment(name: str) -> maze.MazeEnvironment:
    name, _, way = name.partition("/")
    return maze.MazeEnvironment(
        maze.parse_maze(maze.MAPS[name]), has_pictures=bool(way)
    )


def _import_gymnax() -> Any:
    try:
        return importlib.import_module("gymnax")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"MinAtar needs gymnax, and {error.name} is not installed: "
            "`pip install gymnax six`."
        ) from error


def from_gymnax(
    environment: Any,
    params: Any,
    observation: types.ObservationSpec,
    draw: Callable[[Any], np.ndarray] | None = None,
) -> World:
    """Makes a world of an environment in gymnax's interface (gymnax 1.0 or newer).

    Args:
      environment: Has `num_actions`, `reset_env(key, params)`, `step_env(key, state,
        action, params)` and `is_truncated(state, params)`. Its state has a `time`, the
        steps of the episode, and holds numbers alone.
      params: The environment's.
      observation: What it shows: whole numbers from 0 to 255 of this `frame_shape`.
      draw: One environment's state -> picture `[H, W, 3]` uint8; by default the
        planes of `environment.observe(key, state, None, params)`.
    """
    with _rules_of_jax():
        own = jax.eval_shape(
            lambda key: environment.reset_env(key, params)[1], _example()
        )

    def step_one(
        state: WorldState, action: jax.Array
    ) -> tuple[WorldState, types.TimeStep]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.num_steps)
        reset_key, step_key = jax.random.split(key)
        first_frame, first = environment.reset_env(reset_key, params)
        next_frame, after, reward, terminated, _ = environment.step_env(
            step_key, state.environment, action, params
        )
        is_first = state.is_done
        terminated = jnp.asarray(terminated, bool) & ~is_first
        truncated = environment.is_truncated(after, params) & ~terminated & ~is_first

        def choose(x: Any, y: Any) -> jax.Array:
            return jnp.where(is_first, x, y)

        # Numbers of Python in a state would have another type than those computed.
        inner = jax.tree.map(
            lambda x, y, like: choose(x, y).astype(like.dtype), first, after, own
        )
        frame = choose(first_frame, next_frame).astype(jnp.uint8)
        timestep = types.TimeStep(
            frame=frame.reshape(observation.frame_shape),
            reward=choose(0.0, reward).astype(jnp.float32),
            terminated=terminated,
            truncated=truncated,
            is_first=is_first,
            lives=jnp.int32(0),
            ram=_ram(inner.replace(time=jnp.zeros_like(inner.time))),
        )
        is_done = terminated | truncated
        return WorldState(inner, state.key, state.num_steps + 1, is_done), timestep

    def step(
        state: WorldState, action: types.Array
    ) -> tuple[WorldState, types.TimeStep]:
        with _rules_of_jax():
            return jax.vmap(step_one)(state, jnp.asarray(action))

    def reset(keys: jax.Array) -> tuple[WorldState, types.TimeStep]:
        zeros = jnp.zeros(keys.shape, jnp.int32)
        blank = jax.tree.map(lambda x: jnp.zeros((*keys.shape, *x.shape), x.dtype), own)
        state = WorldState(blank, jax.random.key_data(keys), zeros, zeros == 0)
        return step(state, zeros)

    def render(state: WorldState, index: int) -> np.ndarray:
        one = jax.tree.map(lambda x: x[index], state.environment)
        if draw is not None:
            return draw(one)
        with _rules_of_jax():
            frame = environment.observe(_example(), one, None, params)
        return _draw_planes(np.asarray(frame))

    return World(environment.num_actions, observation, reset, step, render)


@contextlib.contextmanager
def _rules_of_jax() -> Iterator[None]:
    """Allows promotions: environments of others are written for JAX's own rules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _example() -> types.PRNGKey:
    return jax.random.key(0)


def _ram(state: Any) -> jax.Array:
    """Returns the bytes `[M]` uint8 of one environment's state, hashed if many."""
    as_bytes = [
        jax.lax.bitcast_convert_type(
            x.astype(jnp.uint8) if x.dtype == bool else x, jnp.uint8
        ).reshape(-1)
        for x in jax.tree.leaves(state)
    ]
    data = jnp.concatenate(as_bytes)
    return data if data.size <= _RAM_BYTES else hashing.hash_bytes(data)


_COLOURS = np.array(
    [
        *((255, 255, 255), (255, 80, 80), (90, 160, 255), (255, 210, 60)),
        *((90, 220, 120), (220, 120, 255), (80, 230, 230), (255, 150, 60)),
        *((170, 170, 170), (150, 110, 70)),
    ],
    np.uint8,
)
_SQUARE = 16  # pixels of a cell's side


def _draw_planes(frame: np.ndarray) -> np.ndarray:
    """Draws planes `[H, W, C]` of 0 and 1, the first on top, a colour each."""
    colours = _COLOURS[(frame != 0).argmax(axis=-1)]
    picture = np.where(frame.any(axis=-1, keepdims=True), colours, np.uint8(0))
    return picture.repeat(_SQUARE, axis=0).repeat(_SQUARE, axis=1)


@functools.partial(jax.jit, static_argnames="world")
def _reset(world: World, keys: jax.Array) -> tuple[WorldState, types.TimeStep]:
    return world.reset(keys)


@functools.partial(jax.jit, static_argnames="world", donate_argnames="state")
def _step(
    world: World, state: WorldState, action: types.Array
) -> tuple[WorldState, types.TimeStep]:
    return world.step(state, action)


class WorldPool:
    """Steps `E` environments of a world for a loop on the host, as `atari.AtariPool`.

    One jitted call a step; its state can be saved and restored.
    """

    def __init__(self, world: World, seeds: Sequence[int]):
        """Makes an environment for each seed, from `atari.environment_seeds`."""
        self.world = world
        self.num_envs = len(seeds)
        self.num_actions = world.num_actions
        self.observation = world.observation
        self._keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
        self._state: WorldState | None = None
        self._timestep: types.TimeStep | None = None  # of the state
        self._is_in_flight = False

    def reset(self) -> types.TimeStep:
        """Begins a new episode in every environment, and its random stream anew."""
        self._check_call("reset", in_flight=False)
        self._state, self._timestep = _reset(self.world, self._keys)
        return jax.device_get(self._timestep)

    def send(self, actions: types.Array) -> None:
        """Starts a step with actions `[E]` int32; those of ended episodes are ignored.

        Raises:
          RuntimeError: The answer to the actions before was not yet received.
          ValueError: An action is not one of the world's.
        """
        self._check_call("send", in_flight=False)
        actions = jax.device_put(
            atari.check_actions(actions, self.num_envs, self.num_actions)
        )
        self._state, self._timestep = _step(self.world, self._state, actions)
        self._is_in_flight = True

    def recv(self) -> types.TimeStep:
        """Waits for the time step that the actions led to, in arrays of the host."""
        self._check_call("recv", in_flight=True)
        self._is_in_flight = False
        return jax.device_get(self._timestep)

    def render(self, index: int) -> np.ndarray:
        """Draws environment `index`, `[H, W, 3]` uint8."""
        self._check_call("render", in_flight=False)
        if not 0 <= index < self.num_envs:
            raise ValueError(f"index must be in [0, {self.num_envs}), got {index}.")
        assert self._state is not None
        return self.world.render(self._state, index)

    def lend(self) -> tuple[WorldState | None, types.TimeStep | None]:
        """Returns state and time step on the device, for a caller who steps them."""
        self._check_call("lend", in_flight=False)
        return self._state, self._timestep

    def take_back(self, state: WorldState, timestep: types.TimeStep) -> None:
        """Goes on from where a caller has stepped to."""
        self._state, self._timestep = state, timestep

    def close(self) -> None:
        """Frees the state."""
        self._state = self._timestep = None

    def get_state(self) -> dict[str, Any]:
        """Returns all that the next steps depend on, as `loop.ResumablePool`."""
        self._check_call("get_state", in_flight=False)
        both = jax.device_get([self._state, self._timestep])
        each = [
            jax.tree.map(operator.itemgetter(index), both)
            for index in range(self.num_envs)
        ]
        rows = [zlib.compress(serialization.to_bytes(row)) for row in each]
        return {"world": [base64.b64encode(row).decode() for row in rows]}

    def set_state(self, state: dict[str, Any]) -> types.TimeStep:
        """Goes on from a state, and returns the time step at which it was taken."""
        self._check_call("set_state", in_flight=False)
        rows = [zlib.decompress(base64.b64decode(row)) for row in state["world"]]
        like = list(jax.eval_shape(self.world.reset, self._keys))
        each = [serialization.from_bytes(like, row) for row in rows]
        both = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        self._state, self._timestep = jax.device_put(both)
        return jax.device_get(self._timestep)

    def _check_call(self, name: str, *, in_flight: bool) -> None:
        """Raises a RuntimeError unless the pool is in the state that a call needs."""
        if self._state is None and name not in ("reset", "set_state"):
            raise RuntimeError(f"{name}() needs a reset() before it.")
        atari.check_turn(name, self._is_in_flight, in_flight)
