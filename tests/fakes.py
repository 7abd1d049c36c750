"""Environments for tests: a pool that plays a script, and a chain to be learned.

`scripted_make` stands in for `envpool.make` behind `envs.AtariPool`. `ChainPool` stands
in for `envs.AtariPool` itself: the same constructor, attributes and methods.
"""

import functools
import types as python_types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax import types
from aps_jax.envs import atari, games


class ScriptedStep(NamedTuple):
    """What one agent step of a scripted environment leads to."""

    reward: float = 0.0
    game_over: bool = False
    lives: int = 3


class ScriptedEnvPool:
    """Plays tapes in the manner of EnvPool's synchronous gymnasium pool.

    Environment `i` plays `tapes[i]`, one `ScriptedStep` per agent step, over and over.
    Episodes end where the tape says game over and after `max_episode_steps`. Every
    pixel of a frame of environment `i` is `50 * i + n % 50` for its n-th answer, the
    reset frames included (so that 5 environments are the most); `ram` is all lives.

    Attributes:
      options: the keyword arguments that it was made with.
      sent: actions that arrived, in order.
    """

    def __init__(
        self,
        tapes: Sequence[Sequence[ScriptedStep]],
        row_order: Sequence[int],
        task_id: str,
        options: dict[str, Any],
    ):
        self.task_id = task_id
        self.options = options
        self.sent: list[np.ndarray] = []
        self.is_closed = False
        self.action_space = python_types.SimpleNamespace(n=np.int64(4))
        self._tapes = tapes
        self._row_order = np.asarray(row_order)
        num_envs = len(tapes)
        self._position = np.zeros(num_envs, np.int64)
        self._answers = np.zeros(num_envs, np.int64)
        self._elapsed = np.zeros(num_envs, np.int32)
        self._is_done = np.ones(num_envs, np.bool_)
        self._pending: np.ndarray | None = None

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Resets every environment."""
        self._is_done[:] = True
        self._pending = np.zeros(len(self._tapes), np.int32)
        observation, *_, info = self.recv()
        return observation, info

    def send(self, actions: np.ndarray) -> None:
        """Records the actions; a second send overwrites the first, as in EnvPool."""
        self.sent.append(np.array(actions))
        self._pending = actions

    def recv(self):
        """Answers in the order of rows that the pool was made with."""
        assert self._pending is not None, "EnvPool would wait for ever."
        self._pending = None
        rows = [self._step(env_id) for env_id in self._row_order]
        observation, reward, terminated, truncated, *info = map(
            np.stack, zip(*rows, strict=True)
        )
        names = ("reward", "terminated", "elapsed_step", "lives", "ram")
        info = dict(zip(names, info, strict=True))
        info["env_id"] = self._row_order.astype(np.int32)
        return observation, reward, terminated, truncated, info

    def render(self, env_ids: int) -> np.ndarray:
        """Paints the number of answers so far."""
        return np.full((1, 210, 160, 3), self._answers[env_ids], np.uint8)

    def close(self) -> None:
        """Notes the call."""
        self.is_closed = True

    def _step(self, i: int) -> tuple[Any, ...]:
        self._answers[i] += 1
        frame = np.full((1, 84, 84), 50 * i + self._answers[i] % 50, np.uint8)
        if self._is_done[i]:
            self._is_done[i] = False
            self._elapsed[i] = 0
            play = ScriptedStep()
            is_limit = False
        else:
            play = self._tapes[i][self._position[i] % len(self._tapes[i])]
            self._position[i] += 1
            self._elapsed[i] += 1
            is_limit = bool(self._elapsed[i] >= self.options["max_episode_steps"])
            self._is_done[i] = play.game_over or is_limit
        reward = np.float32(play.reward)
        return (
            frame,
            np.clip(reward, -1, 1) if self.options["reward_clip"] else reward,
            np.bool_(play.game_over and not is_limit),
            np.bool_(is_limit),
            reward,
            np.int32(play.game_over),
            np.int32(self._elapsed[i]),
            np.int32(play.lives),
            np.full(128, play.lives, np.uint8),
        )


def scripted_make(
    *tapes: Sequence[ScriptedStep], row_order: Sequence[int] | None = None
) -> Callable[..., ScriptedEnvPool]:
    """Returns a stand-in for `envpool.make` whose pools play the given tapes.

    The last pool made is found under the function's attribute `pool`.

    Args:
      *tapes: for each environment, what its agent steps lead to.
      row_order: environments in the order of the rows of each answer; by default
        0, 1, 2, as in EnvPool's synchronous mode.
    """
    row_order = range(len(tapes)) if row_order is None else row_order

    def make(task_id: str, env_type: str, **options: Any) -> ScriptedEnvPool:
        assert env_type == "gymnasium"
        assert options["num_envs"] == len(tapes)
        make.pool = ScriptedEnvPool(tapes, row_order, task_id, options)
        return make.pool

    return make


class ChainPool:
    """A corridor to be learned: reward waits at its far end only.

    The states are 0 (the start) to `num_states - 1` (the far end), drawn as a bright
    bar that moves from left to right. Actions: 0 stays, 1 goes right, 2 goes left.
    Arriving at the far end gives reward 1; the step after that leads back to the
    start, whatever the action. The third arrival is game over; an episode is cut
    after 20 agent steps, or `max_frames / frame_skip` where that is less. After an
    episode comes a reset frame, as in EnvPool.

    A no-op at the start changes nothing, so that `noop_max` plays no part; nor do
    `num_threads`, `fire_reset` and `make`. With `sticky` 0 nothing is random, else
    each environment draws from its own seed. `ram` holds the state in byte 0 and the
    arrivals of the episode in byte 1.
    """

    num_actions = 3
    observation = atari.OBSERVATION
    max_agent_steps = 20
    max_arrivals = 3

    _SAVED = (
        "_state",
        "_arrivals",
        "_elapsed",
        "_last_actions",
        "_is_done",
        "_is_first",
    )

    def __init__(
        self,
        game: str,
        num_envs: int,
        *,
        seeds: Sequence[int],
        num_threads: int = 0,
        frame_skip: int = 4,
        noop_max: int = 30,
        max_frames: int = 108_000,
        sticky: float = 0.0,
        fire_reset: bool = False,
        make: Callable[..., Any] | None = None,
        num_states: int = 5,
    ):
        del num_threads, noop_max, fire_reset, make
        if len(seeds) != num_envs:
            raise ValueError(f"{num_envs} environments need a seed each, got {seeds}.")
        self.game = game
        self.num_envs = num_envs
        self.num_states = num_states
        self._limit = min(self.max_agent_steps, max_frames // frame_skip)
        self._sticky = sticky
        self._rngs = [np.random.default_rng(seed) for seed in seeds]
        self._state = np.zeros(num_envs, np.int64)
        self._arrivals = np.zeros(num_envs, np.int64)
        self._elapsed = np.zeros(num_envs, np.int64)
        self._last_actions = np.zeros(num_envs, np.int64)
        self._is_done = np.ones(num_envs, np.bool_)
        self._is_first = np.ones(num_envs, np.bool_)
        self._pending: np.ndarray | None = None

    @property
    def optimal_return(self) -> float:
        """Mean return of an episode under the best policy, exact where sticky is 0."""
        return self._mean_return(lambda values: max(values))

    @property
    def random_return(self) -> float:
        """Mean return of an episode under uniformly random actions, exact."""
        return self._mean_return(lambda values: sum(values) / len(values))

    def reset(self) -> types.TimeStep:
        """Begins a new episode in every environment."""
        assert self._pending is None, "reset() must wait for recv()."
        self._is_done[:] = True
        return self._advance(np.zeros(self.num_envs, np.int64))

    def send(self, actions: types.Array) -> None:
        """Takes the next actions, `[E]` int32."""
        assert self._pending is None, "send() must wait for recv()."
        actions = np.array(actions)
        assert actions.shape == (self.num_envs,), actions.shape
        assert actions.dtype == np.int32, actions.dtype
        assert actions.min() >= 0 and actions.max() < self.num_actions, actions
        self._pending = actions

    def recv(self) -> types.TimeStep:
        """Returns what the actions led to, in arrays that are not used again."""
        assert self._pending is not None, "recv() needs a send() before it."
        actions, self._pending = self._pending, None
        return self._advance(actions.astype(np.int64))

    def render(self, index: int) -> np.ndarray:
        """Draws environment `index`, `[84, 84, 3]` uint8."""
        assert self._pending is None, "render() must wait for recv()."
        return np.repeat(ChainPool._frames(self)[index][:, :, None], 3, axis=2)

    def close(self) -> None:
        """Has nothing to free."""

    def get_state(self) -> dict[str, Any]:
        """Returns all that the next steps depend on, as `loop.ResumablePool`."""
        assert self._pending is None, "get_state() must wait for recv()."
        state = {name: getattr(self, name).tolist() for name in self._SAVED}
        return {**state, "rngs": [rng.bit_generator.state for rng in self._rngs]}

    def set_state(self, state: dict[str, Any]) -> types.TimeStep:
        """Goes on from a state, and returns the time step at which it was taken."""
        for name in self._SAVED:
            kind = getattr(self, name).dtype
            setattr(self, name, np.array(state[name], kind))
        for rng, rng_state in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state
        return self._timestep()

    def _advance(self, actions: np.ndarray) -> types.TimeStep:
        is_first = self._is_done
        if self._sticky > 0:
            repeats = [rng.random() < self._sticky for rng in self._rngs]
            actions = np.where(repeats, self._last_actions, actions)
        self._last_actions = np.where(is_first, 0, actions)
        self._is_first = is_first
        self._state = np.where(is_first, 0, self._moved(actions))
        is_arrival = self._state == self.num_states - 1
        self._arrivals = np.where(is_first, 0, self._arrivals + is_arrival)
        self._elapsed = np.where(is_first, 0, self._elapsed + 1)
        timestep = self._timestep()
        self._is_done = timestep.terminated | timestep.truncated
        return timestep

    def _timestep(self) -> types.TimeStep:
        terminated = self._arrivals >= self.max_arrivals
        ram = np.zeros((self.num_envs, 128), np.uint8)
        ram[:, 0] = self._state
        ram[:, 1] = self._arrivals
        return types.TimeStep(
            frame=self._frames(),
            reward=(self._state == self.num_states - 1).astype(np.float32),
            terminated=terminated,
            truncated=(self._elapsed >= self._limit) & ~terminated,
            is_first=self._is_first,
            lives=np.zeros(self.num_envs, np.int32),
            ram=ram,
        )

    def _moved(self, actions: np.ndarray) -> np.ndarray:
        """Where the actions lead; from the far end, back to the start."""
        end = self.num_states - 1
        moved = np.clip(self._state + np.array([0, 1, -1])[actions], 0, end)
        return np.where(self._state == end, 0, moved)

    def _frames(self) -> np.ndarray:
        width = 84 // self.num_states
        is_bar = np.arange(84)[None, :] // width == self._state[:, None]
        rows = np.where(is_bar, 255, 0).astype(np.uint8)
        return np.repeat(rows[:, None, :], 84, axis=1)

    def _mean_return(self, choose: Callable[[list[float]], float]) -> float:
        end = self.num_states - 1

        @functools.cache
        def value(state: int, arrivals: int, elapsed: int) -> float:
            if arrivals >= self.max_arrivals or elapsed >= self._limit:
                return 0.0
            returns = []
            for move in (0, 1, -1):
                next_state = 0 if state == end else min(max(state + move, 0), end)
                reward = int(next_state == end)
                rest = value(next_state, arrivals + reward, elapsed + 1)
                returns.append(reward + rest)
            return choose(returns)

        return value(0, 0, 0)


PLANES = "ChainPlanes"  # the game that `PlanesPool` plays
_of_planes = types.ObservationSpec((1, 5, 1), 1, 4)
_of_others = games.observation_of
games.observation_of = lambda game: _of_planes if game == PLANES else _of_others(game)


class PlanesPool(ChainPool):
    """The chain of `num_states=5` as planes of 0 and 1, for the encoder `mlp`.

    What does not depend on pictures is tested on it: a stage takes a quarter of the
    time that it takes on images.
    """

    observation = _of_planes

    def _frames(self) -> np.ndarray:
        return np.eye(5, dtype=np.uint8)[self._state][:, None, :, None]


class CornersPool(PlanesPool):
    """Four corners to choose from: the action says which one is reached next.

    The reward is 1 for reaching the last corner, so an episode of `max_agent_steps`
    is worth that many points at best, and a quarter of it at random. It plays the game
    `PLANES`, of whose five states there are four; resets, seeds and options are as in
    `ChainPool`.
    """

    num_actions = 4
    max_agent_steps = 10
    max_arrivals = 1000  # Only time ends an episode.

    @property
    def optimal_return(self) -> float:
        """Return of an episode under the best policy."""
        return float(self.max_agent_steps)

    @property
    def random_return(self) -> float:
        """Mean return of an episode under uniformly random actions."""
        return self.max_agent_steps / self.num_actions

    def _moved(self, actions: np.ndarray) -> np.ndarray:
        return actions
