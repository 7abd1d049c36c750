"""Full games under a fixed policy, apart from training: the only source of scores."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.envs import games, reward_functions
from aps_jax.parallel import devices, interrupts
from aps_jax.runs import progress as progress_lib
from aps_jax.scores import protocol, scores
from aps_jax.train import loop

VIDEO_AGENT_STEPS = 900  # one minute of play

# Games of one pool of emulators. A pool steps all of its environments, those whose
# game has ended with the others, until its last game has ended.
_POOL_GAMES = 10


class Evaluation(NamedTuple):
    """Results of full games and, where recorded, the pictures of the first ones."""

    returns: np.ndarray  # [episodes] float64, sums of the unclipped reward.
    score_returns: np.ndarray  # [episodes] float64, of the game's reward, always.
    lengths: np.ndarray  # [episodes] int64, agent steps.
    pictures: list[list[np.ndarray]]  # of each recorded game, each [H, W, 3] uint8
    extras: dict[str, np.ndarray]  # of the first decision, each [episodes, ...]

    def to_lists(self) -> dict[str, list[float]]:
        """Returns the results as JSON values, which float64 survives."""
        return {
            name: getattr(self, name).tolist()
            for name in ("returns", "score_returns", "lengths")
        }


def from_lists(values: dict[str, list[float]]) -> Evaluation:
    """Returns the evaluation, without pictures, of which these are the lists."""
    arrays = {name: np.array(numbers) for name, numbers in values.items()}
    return Evaluation(**arrays, pictures=[], extras={})


class Player(NamedTuple):
    """A policy to be evaluated, compiled once for all evaluations and seeds."""

    init: Callable[[int], loop.ActorState]  # from the number of games
    act: Callable[..., tuple[loop.ActorState, base.Decision]]


@functools.lru_cache(maxsize=8)
def compile_player(play: Callable[[float], base.Policy], epsilon: float) -> Player:
    """Compiles a policy.

    Args:
      play: `Agent.play` or one of its siblings.
      epsilon: Probability of a random action.
    """
    policy = play(epsilon)
    init = jax.jit(functools.partial(loop.init_actor, policy), static_argnums=0)
    act = jax.jit(functools.partial(loop.act_once, policy), donate_argnums=2)
    return Player(init, act)


def make_player(
    config: config_lib.Config, agent: base.Agent, *, adapted: bool = False
) -> Player:
    """Makes the player of an agent under the run's protocol.

    Args:
      config: The run's values.
      agent: The agent.
      adapted: Whether it has adapted and not yet learned from reward.
    """
    play = agent.play_adapted if adapted else agent.play
    return compile_player(play, config.evaluation.eval_epsilon)


def evaluate(
    config: config_lib.Config,
    player: Player,
    state: base.AgentState,
    *,
    record_games: int = 0,
    record_agent_steps: int = VIDEO_AGENT_STEPS,
    only_record: bool = False,
    constructor: loop.MakePool = games.make_pool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> Evaluation:
    """Plays full games, epsilon-greedily and without learning.

    One game per environment and all games counted, so that short games are not
    favoured; the seeds are those of the evaluation stream, the same for every agent of
    the same seed.

    Args:
      config: The run's values; `config.evaluation` is the protocol.
      player: The policy.
      state: What the agent has learned, on one device.
      record_games: How many games to keep pictures of, from the first on.
      record_agent_steps: Pictures to keep of each, at most.
      only_record: Whether to stop when all pictures are taken. What has not ended by
        then is no full game, and its sums are no scores.
      constructor: Makes the environments.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      An `Evaluation`.
    """
    num_games = config.evaluation.eval_episodes
    size = num_games if games.is_world(config.game) else _POOL_GAMES
    returns, score_returns = np.zeros(num_games), np.zeros(num_games)
    lengths = np.zeros(num_games, np.int64)
    is_playing = np.ones(num_games, bool)
    pictures: list[list[np.ndarray]] = [[] for _ in range(record_games)]
    extras: list[dict[str, np.ndarray]] = []
    with contextlib.ExitStack() as open_pools:
        progress.start("evaluate", total=num_games, unit="games")
        groups = []
        for part in _split(num_games, size):
            pool = loop.make_pool(
                config, num_games, loop.Stream.EVALUATE, constructor, part=part
            )
            open_pools.callback(pool.close)
            groups.append(_Group(config.seed, player, state, pool, part))
        while groups:
            if stop is not None:
                stop.check()
            is_taking = False
            for group in groups:
                playing = is_playing[group.part]
                for row, taken in enumerate(pictures[group.part]):
                    if len(taken) < record_agent_steps and playing[row]:
                        taken.append(group.pool.render(row))
                        is_taking = True
            if only_record and not is_taking:
                break
            decisions = [group.act() for group in groups]
            if not extras:
                extras = [jax.device_get(dict(chosen.extras)) for chosen in decisions]
            for group, decision in zip(groups, decisions, strict=True):
                action = jax.device_get(decision.action)
                with loop.environment_errors():
                    group.pool.send(action)
            for group in groups:
                with loop.environment_errors():
                    group.timestep = timestep = group.pool.recv()
                score = reward_functions.game_reward(group.pool, timestep)
                rows, still = group.part, is_playing[group.part]
                returns[rows] += np.where(still, timestep.reward, 0.0)
                score_returns[rows] += np.where(still, score, 0.0)
                lengths[rows] += still
                is_playing[rows] &= ~(timestep.terminated | timestep.truncated)
            groups = [group for group in groups if is_playing[group.part].any()]
            finished = returns[~is_playing]
            mean = float(finished.mean()) if finished.size else None
            progress.tick(num_games - int(is_playing.sum()), mean)
    together = (
        jax.tree.map(lambda *rows: np.concatenate(rows), *extras) if extras else {}
    )
    return Evaluation(returns, score_returns, lengths, pictures, together)


class _Group:
    """Some of an evaluation's games: a pool of their own, and what acting remembers."""

    def __init__(
        self,
        seed: int,
        player: Player,
        state: base.AgentState,
        pool: loop.Pool,
        part: slice,
    ):
        key = loop.stream_key(seed, loop.Stream.EVALUATE)
        # The first acts as it would if there were no others.
        key = jax.random.fold_in(key, part.start) if part.start else key
        self.pool, self.part = pool, part
        self._act = functools.partial(player.act, devices.device_put(key), state)
        self._actor = devices.device_put(player.init(part.stop - part.start))
        with loop.environment_errors():
            self.timestep = pool.reset()

    def act(self) -> base.Decision:
        """Starts to choose the next actions."""
        timestep = devices.device_put(self.timestep)
        self._actor, decision = self._act(self._actor, timestep)
        return decision


def _split(count: int, size: int) -> list[slice]:
    """Splits a range into parts of at most a size, which differ by one at most."""
    ends = np.linspace(0, count, -(-count // size) + 1).astype(int)
    return [slice(first, end) for first, end in itertools.pairwise(ends)]


def protocol_of(config: config_lib.Config) -> dict[str, Any]:
    """Returns how games are evaluated, as `result.json` holds it."""
    values = {
        "episodes": config.evaluation.eval_episodes,
        "epsilon": config.evaluation.eval_epsilon,
    }
    if games.is_world(config.game):
        return values | {"world": True}
    values |= {
        "noop_max": config.environment.noop_max,
        "sticky": config.environment.sticky,
        "max_frames": config.environment.max_frames,
    }
    # No published protocol has it, so that it is named only where it is used.
    return values | ({"fire_reset": True} if config.environment.fire_reset else {})


def summary(config: config_lib.Config, played: Evaluation) -> dict[str, float]:
    """Returns the metrics of an evaluation.

    Games under a protocol that is not comparable give no human-normalized score.
    """
    score = float(np.mean(played.score_returns))
    is_comparable = scores.find_reference_scores(
        config.game
    ) is not None and protocol.is_comparable(protocol_of(config))
    return {
        "eval_return_mean": float(np.mean(played.returns)),
        "eval_return_std": float(np.std(played.returns)),
        "eval_score_mean": score,
        "eval_length_mean": float(np.mean(played.lengths)),
        "eval_human_normalized": (
            float(scores.human_normalized_score(config.game, score))
            if is_comparable
            else math.nan
        ),
    }
