"""Atari games: pools of EnvPool's emulators, and statistics of their episodes.

Letters: `E` environments. EnvPool is imported here alone, when a pool is made.

How a pool behaves at the end of an episode (EnvPool's convention, kept as it is):

  step t      action a        -> the last frame, `terminated` or `truncated`
  step t + 1  action ignored  -> the reset frame, reward 0, `is_first`

The pair (t, t + 1) is not a transition, and `t + 1` is not an agent step. Rewards,
lives and memory of the last frame are true. Its picture may be a step old: where the
game is over in the first two of the four emulator frames, EnvPool shows the frame of
step t - 1 again (in 11 of 28 games of RoadRunner).

An emulator's state can be neither saved nor restored: a run that resumes from a
checkpoint continues its learning exactly, but in new episodes.
"""

import difflib
import importlib.util
import math
import os
import pathlib
import sys
import types as python_types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import types
from aps_jax.ops import hashing

_ROMS = pathlib.Path("atari", "roms")

# One agent step repeats its action for this many emulator frames, as in every published
# Atari protocol that the project compares with.
FRAME_SKIP = 4
_NUM_BITS = 2**20  # that count visited states
OBSERVATION = types.ObservationSpec((84, 84), 4, FRAME_SKIP)


def games() -> tuple[str, ...]:
    """Lists the games that the installed EnvPool can play, without importing it.

    Returns:
      Names in CamelCase and alphabetical order, such as `MontezumaRevenge`: those of
      EnvPool's tasks, less the version suffix `-v5`.

    Raises:
      ModuleNotFoundError: if EnvPool or its package of ROMs is not installed.
    """
    # EnvPool registers one task per ROM file, from the first of these folders that
    # has any (envpool/registration.py, asset_base_path). Reading the folder takes a
    # millisecond; importing EnvPool takes two seconds.
    folders = [
        pathlib.Path(folder)
        for package in ("envpool", "envpool_assets")
        if (spec := importlib.util.find_spec(package)) is not None
        for folder in spec.submodule_search_locations or ()
    ]
    if override := os.environ.get("ENVPOOL_ASSETS_PATH"):
        folders = [pathlib.Path(override)]
    for folder in folders:
        roms = sorted(rom.stem for rom in (folder / _ROMS).glob("*.bin"))
        if roms:
            return tuple(
                "".join(word.capitalize() for word in rom.split("_")) for rom in roms
            )
    raise ModuleNotFoundError(
        "EnvPool's Atari ROMs were not found: `pip install envpool` brings them."
    )


def check_game(name: str) -> None:
    """Raises an error that names the nearest games unless EnvPool has this one.

    Raises:
      ValueError: if `name` is not one of `games()`, exactly as written there.
    """
    known = games()
    if name in known:
        return
    by_lower = {game.lower(): game for game in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.0)
    names = ", ".join(by_lower[game] for game in nearest)
    raise ValueError(
        f"Unknown game {name!r}; the nearest of EnvPool's {len(known)} are {names}."
    )


def environment_seeds(seed: int, num_envs: int, *, stream: int = 0) -> list[int]:
    """Draws a seed for each environment of one stage of one run.

    EnvPool seeds environment `i` with `seed + i` when it is given one number, so that
    runs 0 and 1 would share all environments but one. A `SeedSequence` hashes the
    run's seed and the stream together instead.

    Args:
      seed: the run's seed, at least 0.
      num_envs: how many seeds to draw.
      stream: which of the run's streams of games this is, at least 0.

    Returns:
      `num_envs` numbers in [0, 2^31), as EnvPool's 32-bit seeds must be.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(stream,))
    return [int(word) >> 1 for word in sequence.generate_state(num_envs, np.uint32)]


# The module in which EnvPool's package registers the tasks of all its families.
_REGISTRATION = "envpool.entry"


def _import_envpool() -> python_types.ModuleType:
    """Imports EnvPool with its Atari games alone, unless it was imported before.

    Atari takes a twentieth of the 0.7 seconds that all families take. Where a library
    of another family is missing, EnvPool also keeps the exception for good, and with it
    every frame that led to the import: those of a stage hold its replay.
    `import envpool.entry` registers the other families, before or after.
    """
    if "envpool" not in sys.modules:
        sys.modules[_REGISTRATION] = python_types.ModuleType(_REGISTRATION)
        try:
            importlib.import_module("envpool")
        finally:
            del sys.modules[_REGISTRATION]
        importlib.import_module("envpool.atari.registration")
    return sys.modules["envpool"]


class AtariPool:
    """Steps `E` copies of one game together, in EnvPool's synchronous mode.

    Single grey frames of 84x84 (the larger of the last two emulator frames, pixel by
    pixel), the game's minimal action set, unclipped rewards, and no episode ends at
    the loss of a life. The calls are `reset` once, then `send` and `recv` in turn.
    """

    observation = OBSERVATION

    def __init__(
        self,
        game: str,
        num_envs: int,
        *,
        seeds: Sequence[int],
        num_threads: int = 0,
        noop_max: int = 30,
        max_frames: int = 108_000,
        sticky: float = 0.0,
        fire_reset: bool = False,
        make: Callable[..., Any] | None = None,
    ):
        """Starts the emulators and their threads.

        Args:
          game: one of `games()`.
          num_envs: number of environments `E`. At least 8 per thread keep synchronous
            mode as fast as asynchronous mode, and it is deterministic.
          seeds: a seed per environment, from `environment_seeds`.
          num_threads: emulator threads; 0 is one per environment, up to the cores
            that this process may use.
          noop_max: an episode begins after 1 to `noop_max` emulator frames without
            action, drawn uniformly, which no counter shows.
          max_frames: emulator frames after which an episode is cut, a multiple of
            `FRAME_SKIP`; EnvPool counts from the reset frame on, in agent steps.
          sticky: probability that an emulator frame repeats the action before.
          fire_reset: whether the last frame before an episode presses FIRE, in games
            that have it.
          make: stands in for `envpool.make`; the name of the game is then not checked.

        `config.EnvironmentConfig` checks the other numbers.

        Raises:
          ValueError: for an unknown game, a wrong number of seeds or of frames.
        """
        if num_envs < 1 or len(seeds) != num_envs:
            raise ValueError(
                "num_envs must be at least 1 and have a seed each, got "
                f"num_envs={num_envs} and {len(seeds)} seeds."
            )
        if max_frames % FRAME_SKIP:
            raise ValueError(
                f"max_frames must be a multiple of {FRAME_SKIP}, the frames of "
                f"an agent step, got {max_frames}."
            )
        if make is None:
            check_game(game)
            make = _import_envpool().make

        self.game = game
        self.num_envs = num_envs
        self._env_ids = np.arange(num_envs, dtype=np.int32)
        self._pool = make(
            f"{game}-v5",
            env_type="gymnasium",
            num_envs=num_envs,
            batch_size=num_envs,  # Synchronous: recv waits for all environments.
            # Its own 0 counts the machine's cores, whatever a batch system or taskset
            # has left to this process.
            num_threads=num_threads or min(num_envs, len(os.sched_getaffinity(0))),
            thread_affinity_offset=-1,  # Threads are not pinned to cores.
            seed=[int(seed) for seed in seeds],
            max_episode_steps=max_frames // FRAME_SKIP,  # In agent steps.
            stack_num=1,  # Single frames; `frames.push_frame` makes the stacks.
            frame_skip=FRAME_SKIP,
            noop_max=noop_max,
            # True would play up to 30 uncounted no-ops after every life.
            episodic_life=False,
            zero_discount_on_life_loss=False,
            reward_clip=False,
            use_fire_reset=fire_reset,
            img_height=OBSERVATION.frame_shape[0],
            img_width=OBSERVATION.frame_shape[1],
            mode=-1,  # The game's own default mode and difficulty.
            difficulty=-1,
            full_action_space=False,
            repeat_action_probability=sticky,
            use_inter_area_resize=True,
            gray_scale=True,
            render_mode="rgb_array",  # Costs nothing until `render` is called.
        )
        self.num_actions = int(self._pool.action_space.n)
        self._is_in_flight = False

    def reset(self) -> types.TimeStep:
        """Begins a new episode in every environment.

        Returns:
          The reset frames, as `recv` would return them: every row is `is_first`.
        """
        self._check_call("reset", in_flight=False)
        observation, info = self._pool.reset()
        never = np.zeros(self.num_envs, np.bool_)
        return self._to_time_step(observation, never, never, info)

    def send(self, actions: types.Array) -> None:
        """Starts the emulators on the next actions, and returns at once.

        Args:
          actions: `[E]` int32, each in [0, num_actions). The action of a row that
            ended an episode in the last time step is ignored.

        Raises:
          RuntimeError: if the answer to the actions before was not yet received. (In
            flight together, EnvPool would let one overwrite the other silently.)
          ValueError: if an action is not one of the game's.
        """
        self._check_call("send", in_flight=False)
        # EnvPool looks the action up without a check of its bounds.
        actions = check_actions(actions, self.num_envs, self.num_actions)
        self._pool.send(actions)  # Copies them, so the caller's array is free again.
        self._is_in_flight = True

    def recv(self) -> types.TimeStep:
        """Waits for the time step that the actions sent led to.

        Returns:
          A `TimeStep` whose row `i` is environment `i`. Its arrays belong to the
          caller: EnvPool gives every batch memory of its own, which lives as long as
          an array that shows it, and does not write to it again (seen in
          `StateBufferQueue::Wait`, and tested).
        """
        self._check_call("recv", in_flight=True)
        observation, _, terminated, truncated, info = self._pool.recv()
        self._is_in_flight = False
        return self._to_time_step(observation, terminated, truncated, info)

    def render(self, index: int) -> np.ndarray:
        """Draws environment `index` in colour, as it stands, without changing it.

        Returns:
          `[210, 160, 3]` uint8 (taller in the few games with a taller screen).
        """
        self._check_call("render", in_flight=False)
        if not 0 <= index < self.num_envs:
            raise ValueError(f"index must be in [0, {self.num_envs}), got {index}.")
        return self._pool.render(env_ids=index)[0]

    def close(self) -> None:
        """Ends the emulators and their threads; the pool cannot be used afterwards."""
        if self._pool is not None:
            self._pool.close()
        # EnvPool's own close() leaves the threads alone; losing the last reference
        # joins them.
        self._pool = None

    def _check_call(self, name: str, *, in_flight: bool) -> None:
        """Raises a RuntimeError unless the pool is in the state that a call needs."""
        if self._pool is None:
            raise RuntimeError(f"{name}() was called on a closed pool.")
        check_turn(name, self._is_in_flight, in_flight)

    def _to_time_step(
        self,
        observation: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        info: dict[str, Any],
    ) -> types.TimeStep:
        """Converts one of EnvPool's answers to a `TimeStep`."""
        is_done = terminated | truncated
        # The time limit hides a game over in the same step from `terminated`, never
        # from `info`. `info["reward"]` is the one that no option clips.
        is_game_over = info["terminated"] != 0
        # In synchronous mode the rows come in the order of the actions sent, which is
        # that of the environments; asynchronous mode would return any order.
        if not np.array_equal(info["env_id"], self._env_ids):
            raise RuntimeError(
                f"Expected a row for each environment in turn, got {info['env_id']}."
            )
        return types.TimeStep(
            frame=observation[:, 0],
            reward=info["reward"],
            terminated=is_done & is_game_over,
            truncated=is_done & ~is_game_over,
            is_first=info["elapsed_step"] == 0,
            lives=info["lives"],
            ram=info["ram"],
        )


def check_actions(actions: types.Array, num_envs: int, num_actions: int) -> np.ndarray:
    """Returns actions `[E]` int32 on the host, which a pool can send.

    Raises:
      ValueError: One of them is not in [0, num_actions).
    """
    chex.assert_shape(actions, (num_envs,))
    chex.assert_type(actions, int)
    actions = np.asarray(jax.device_get(actions), np.int32)
    if actions.min() < 0 or actions.max() >= num_actions:
        raise ValueError(f"Actions must be in [0, {num_actions}), got {actions}.")
    return actions


def check_turn(name: str, is_in_flight: bool, in_flight: bool) -> None:
    """Raises a `RuntimeError` unless a step is in flight where a call needs one."""
    if is_in_flight != in_flight:
        needs = "needs a send() before it" if in_flight else "must wait for recv()"
        raise RuntimeError(f"{name}() {needs}.")


class EpisodeStats(NamedTuple):
    """Returns and lengths of the episodes of `E` environments.

    A reset in the midst of an episode drops the episode: it is not counted.
    """

    running_return: jax.Array  # [E] float32, unclipped reward since the reset.
    running_length: jax.Array  # [E] int32, agent steps since the reset.
    last_return: jax.Array  # [E] float32, of the last whole episode; NaN before.
    last_length: jax.Array  # [E] float32, agent steps; NaN before an episode ends.
    num_episodes: jax.Array  # [E] int32, episodes that have ended.
    visited: jax.Array  # [E, 2^17] uint8, a bit for each hash of a state's memory


def init_episode_stats(num_envs: int) -> EpisodeStats:
    """Returns the statistics of `num_envs` environments before their first reset."""
    return EpisodeStats(
        running_return=jnp.zeros(num_envs, jnp.float32),
        running_length=jnp.zeros(num_envs, jnp.int32),
        last_return=jnp.full(num_envs, jnp.nan, jnp.float32),
        last_length=jnp.full(num_envs, jnp.nan, jnp.float32),
        num_episodes=jnp.zeros(num_envs, jnp.int32),
        visited=jnp.zeros((num_envs, _NUM_BITS // 8), jnp.uint8),
    )


def update_episode_stats(stats: EpisodeStats, step: types.TimeStep) -> EpisodeStats:
    """Counts one time step of every environment.

    A reset frame begins an episode and is no agent step; the step that is terminated
    or truncated belongs to the episode that it ends.
    """
    chex.assert_equal_shape([stats.running_return, step.reward, step.is_first])
    chex.assert_equal_shape([step.is_first, step.terminated, step.truncated])

    running_return = jnp.where(step.is_first, 0.0, stats.running_return + step.reward)
    running_length = jnp.where(step.is_first, 0, stats.running_length + 1)
    is_last = step.terminated | step.truncated
    return EpisodeStats(
        running_return=running_return,
        running_length=running_length,
        last_return=jnp.where(is_last, running_return, stats.last_return),
        last_length=jnp.where(
            is_last, running_length.astype(jnp.float32), stats.last_length
        ),
        num_episodes=stats.num_episodes + is_last.astype(jnp.int32),
        visited=jax.vmap(_mark)(stats.visited, jnp.asarray(step.ram)),
    )


def _mark(bits: jax.Array, ram: jax.Array) -> jax.Array:
    """Sets the bit of a memory `[M]` uint8 among bits `[2^17]` uint8."""
    word = jax.lax.bitcast_convert_type(hashing.hash_bytes(ram)[:4], jnp.uint32)
    place = (word % jnp.uint32(_NUM_BITS)).astype(jnp.int32)
    bit = jnp.uint8(1) << (place % 8).astype(jnp.uint8)
    return bits.at[place // 8].set(bits[place // 8] | bit)


def num_visited(stats: EpisodeStats) -> float:
    """Estimates how many states were visited that differ in their memory.

    Linear counting (Whang et al. 1990, https://doi.org/10.1145/78922.78925): of `m`
    bits `x` are set by `-m ln(1 - x / m)` states, to 1 % up to a million.
    It is exact for few; memories that agree in the hash count as one.
    """
    bits = np.unpackbits(np.bitwise_or.reduce(stats.visited, axis=0))
    share = min(float(np.mean(bits)), 1.0 - 1.0 / _NUM_BITS)
    return round(-_NUM_BITS * math.log1p(-share), 1)
