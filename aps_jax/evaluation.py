"""Full games under a fixed policy, apart from training: the only source of scores."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from aps_jax import agent as agent_lib
from aps_jax import config as config_lib
from aps_jax import envs, interrupts, loop, scores, types
from aps_jax import progress as progress_lib

_PUBLISHED_MAX_FRAMES = 108_000  # 30 minutes at 60 frames per second


class Evaluation(NamedTuple):
    """Scores of full games and, where recorded, the pictures of the first one."""

    returns: np.ndarray  # [episodes] float64, unclipped.
    lengths: np.ndarray  # [episodes] int64, agent steps.
    pictures: list[np.ndarray]  # each [H, W, 3] uint8


def evaluate(
    config: config_lib.Config,
    agent: agent_lib.Agent,
    params: types.Params,
    task: jax.Array,
    *,
    use_gpi: bool,
    record_agent_steps: int = 0,
    constructor: loop.MakePool = envs.AtariPool,
    progress: progress_lib.Progress | None = None,
    stop: interrupts.StopRequests | None = None,
) -> Evaluation:
    """Plays full games for one task, epsilon-greedily and without learning.

    One game per environment and all games counted, so that short games are not
    favoured; the seeds are those of the evaluation stream, the same for every agent of
    the same seed.

    Args:
      config: The run's values; `config.evaluation` is the protocol.
      agent: The agent's functions.
      params: Its parameters.
      task: `[D]` float, unit task vector.
      use_gpi: Whether to maximise over further tasks (zero-shot acting).
      record_agent_steps: Pictures to keep of the first game, at most.
      constructor: Makes the environments.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      An `Evaluation`.
    """
    values = config.evaluation
    num_games = values.eval_episodes
    key = loop.stream_key(config.seed, loop.Stream.EVALUATE)

    def act(params, actor, timestep):
        actor, step = agent.act(
            params,
            actor,
            timestep,
            key,
            epsilon=values.eval_epsilon,
            explore=False,
            use_gpi=use_gpi,
        )
        return actor, step.action

    act = jax.jit(act, donate_argnames="actor")
    actor = loop.put(agent_lib.pin_task(agent.init_actor(num_games), task))
    returns = np.zeros(num_games)
    lengths = np.zeros(num_games, np.int64)
    is_playing = np.ones(num_games, bool)
    pictures: list[np.ndarray] = []
    pool = loop.make_pool(config, num_games, loop.Stream.EVALUATE, constructor)
    try:
        if progress is not None:
            progress.start("evaluate", total=num_games, unit="games")
        with loop.blaming_environment():
            timestep = pool.reset()
        while is_playing.any():
            if stop is not None:
                stop.check()
            if len(pictures) < record_agent_steps and is_playing[0]:
                pictures.append(pool.render(0))
            actor, action = act(params, actor, loop.put(timestep))
            action = jax.device_get(action)
            with loop.blaming_environment():
                pool.send(action)
                timestep = pool.recv()
            returns += np.where(is_playing, timestep.reward, 0.0)
            lengths += is_playing
            is_playing &= ~(timestep.terminated | timestep.truncated)
            if progress is not None:
                finished = returns[~is_playing]
                mean = float(finished.mean()) if finished.size else None
                progress.tick(num_games - int(is_playing.sum()), mean)
    finally:
        pool.close()
    return Evaluation(returns=returns, lengths=lengths, pictures=pictures)


def protocol(config: config_lib.Config) -> dict[str, Any]:
    """Returns how games are evaluated, as `result.json` holds it."""
    return {
        "episodes": config.evaluation.eval_episodes,
        "epsilon": config.evaluation.eval_epsilon,
        "noop_max": config.environment.noop_max,
        "sticky": config.environment.sticky,
        "max_frames": config.environment.max_frames,
    }


def protocol_text(config: config_lib.Config) -> str:
    """Returns the protocol as a line for people."""
    values = protocol(config)
    return (
        f"{values['episodes']} full games, epsilon {values['epsilon']}, up to "
        f"{values['noop_max']} no-ops, sticky actions {values['sticky']}, at most "
        f"{values['max_frames']:,} frames"
    )


def summary(config: config_lib.Config, returns: np.ndarray) -> dict[str, float]:
    """Returns the metrics of an evaluation.

    Games cut before the 30 minutes of the published protocols give no human-normalized
    score: their sums are not scores.
    """
    mean = float(np.mean(returns))
    is_comparable = (
        scores.find_reference_scores(config.game) is not None
        and config.environment.max_frames >= _PUBLISHED_MAX_FRAMES
    )
    return {
        "eval_return_mean": mean,
        "eval_return_std": float(np.std(returns)),
        "eval_human_normalized": (
            float(scores.human_normalized_score(config.game, mean))
            if is_comparable
            else math.nan
        ),
    }
