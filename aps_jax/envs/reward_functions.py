"""Reward functions of a game besides its score: survival, and the user's own.

A pretrained agent has never seen a score, so it may be asked for any function of what
the game shows. `score` is the game's own reward. `survival` pays, in each agent
step, the share of the first lives that are left. `module:function` names the user's own
Python function of two time steps, called on the host once per step for all
environments. Letters: `E` environments.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from aps_jax import types

SCORE = "score"
SURVIVAL = "survival"

# (the time step before, the time step reached) -> [E] rewards of reaching it.
RewardFunction = Callable[[types.TimeStep, types.TimeStep], Any]


def score(before: types.TimeStep, after: types.TimeStep) -> types.Array:
    """Returns the game's own reward."""
    del before
    return after.reward


def make_survival() -> RewardFunction:
    """Makes the reward for staying alive: `lives_t / lives_0`, in every agent step.

    `lives_0` are those on the first frame of the game, so that an extra life pays more
    than 1. Where a game shows no lives it has one: 1 in each step, 0 for game over.
    The return of a game is the number of agent steps survived, each weighted by the
    lives kept. (Counting lost lives would not help: a finished game has lost all.)
    """
    first: types.Array | None = None

    def survival(before: types.TimeStep, after: types.TimeStep) -> np.ndarray:
        nonlocal first
        is_new = True if first is None else before.is_first
        first = np.where(is_new, before.lives, 0 if first is None else first)
        shares = np.where(first > 0, after.lives / np.maximum(first, 1), 1.0)
        return np.where(after.terminated, 0.0, shares)

    return survival


def load(name: str, observation: types.ObservationSpec) -> Callable[[], RewardFunction]:
    """Finds a reward function, and tries a user's own on two blank environments.

    Args:
      name: `score`, `survival` or `module:function`. The function takes two
        `types.TimeStep`s of `E` environments, the one before and the one reached, and
        returns `[E]` numbers; `frame` and `ram` show what the game does.
      observation: What the game shows.

    Returns:
      A factory: the function that it returns follows one pool of environments.

    Raises:
      ValueError: There is no such function, or it does not do what it must.
    """
    if name == SCORE:
        return lambda: score
    if name == SURVIVAL:
        return make_survival
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ValueError(
            f"A reward is {SCORE}, {SURVIVAL} or module:function, got {name!r}."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"The module of the reward {name!r} cannot be imported: {_format(error)}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        wrong = f"The module {module_name} has no function {function_name}."
        raise ValueError(wrong)  # noqa: TRY004  A wrong value of the caller's.
    never = np.zeros(2, np.bool_)
    blank = types.TimeStep(
        frame=np.zeros((2, *observation.frame_shape), np.uint8),
        reward=np.zeros(2, np.float32),
        terminated=never,
        truncated=never,
        is_first=never,
        lives=np.zeros(2, np.int32),
        ram=np.zeros((2, 128), np.uint8),
    )
    _call(name, function, blank, blank)
    return lambda: function


class RewardPool:
    """Environments with another reward function than the game's; else the pool's own.

    The game's reward stays visible as `game_reward`, `[E]` float32 of the newest time
    step.
    """

    def __init__(self, pool: Any, name: str, function: RewardFunction):
        """Wraps a pool, as `atari.AtariPool`.

        The function is from a factory that `load` returned, for this pool alone; its
        name is for error messages.
        """
        self._pool = pool
        self._name = name
        self._function = function
        self._before: types.TimeStep | None = None
        self.num_actions = pool.num_actions
        self.num_envs = pool.num_envs
        self.observation = pool.observation
        self.send, self.render, self.close = pool.send, pool.render, pool.close
        self.game_reward: types.Array = np.zeros(pool.num_envs, np.float32)

    def reset(self) -> types.TimeStep:
        """Begins a new episode in every environment."""
        return self._rewarded(self._pool.reset())

    def recv(self) -> types.TimeStep:
        """Waits for the next time step, with its reward.

        Raises:
          ValueError: The function fails or does not return `[E]` finite numbers.
        """
        return self._rewarded(self._pool.recv())

    def _rewarded(self, after: types.TimeStep) -> types.TimeStep:
        before, self._before = self._before, after
        self.game_reward = after.reward
        reward = reward_of(self._name, self._function, before or after, after)
        return after._replace(reward=reward)


def reward_of(
    name: str, function: RewardFunction, before: types.TimeStep, after: types.TimeStep
) -> np.ndarray:
    """Returns a function's rewards `[E]` float32 of the step; 0 where a game begins.

    Raises:
      ValueError: The function fails or does not return `[E]` finite numbers.
    """
    reward = _call(name, function, before, after)
    reward = np.where(after.is_first, 0.0, reward).astype(np.float32)
    if not np.isfinite(reward).all():
        raise ValueError(
            f"The reward {name!r} returned a number that is not finite: {reward}."
        )
    return reward


def constructor_for(
    name: str, constructor: Callable[..., Any], observation: types.ObservationSpec
) -> Callable[..., Any]:
    """Returns a constructor of pools with a reward function, as `games.make_pool`.

    Raises:
      ValueError: As `load`, which says how functions are named.
    """
    if name == SCORE:
        return constructor
    make_function = load(name, observation)

    @functools.wraps(constructor, updated=())
    def construct(*args: Any, **options: Any) -> RewardPool:
        return RewardPool(constructor(*args, **options), name, make_function())

    return construct


def game_reward(pool: Any, timestep: types.TimeStep) -> types.Array:
    """Returns the game's own reward of a time step, whatever its pool pays."""
    return getattr(pool, "game_reward", timestep.reward)


def _call(
    name: str, function: RewardFunction, before: types.TimeStep, after: types.TimeStep
) -> np.ndarray:
    """Calls a function and checks what it returns."""
    try:
        reward = np.asarray(function(before, after))
    except Exception as error:
        raise ValueError(f"The reward {name!r} failed: {_format(error)}.") from error
    expected = after.reward.shape
    is_number = np.issubdtype(reward.dtype, np.number) or reward.dtype == bool
    if reward.shape != expected or not is_number:
        raise ValueError(
            f"The reward {name!r} must return {expected[0]} numbers, one for each "
            f"environment, got {reward.dtype} of shape {reward.shape}."
        )
    return reward.astype(np.float64)


def _format(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
