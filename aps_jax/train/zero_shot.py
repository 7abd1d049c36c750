"""One pretrained agent, many reward functions of its game, without learning.

The agent plays once as in pretraining, as the first part of fine-tuning does, and
adapts to each reward function by the rewards that it gives to that same play. Then it
plays full games for each. Letters: `K` reward functions, `E` environments.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.envs import games, reward_functions
from aps_jax.parallel import devices, interrupts
from aps_jax.runs import progress as progress_lib
from aps_jax.train import evaluation, loop, stages


class RewardResult(NamedTuple):
    """How a pretrained agent does on one reward function at once, and random play."""

    name: str
    adapted: dict[str, Any]  # facts of `Agent.adapt`
    state: Any  # the adapted agent
    played: evaluation.Evaluation
    random: evaluation.Evaluation  # Uniformly random actions, the same protocol.
    # Skills of random tasks, one a game; None for an agent without skills.
    random_tasks: evaluation.Evaluation | None


class _ManyRewardsPool(reward_functions.RewardPool):
    """Environments with the game's reward that keep those of several functions."""

    def __init__(
        self, pool: Any, functions: dict[str, reward_functions.RewardFunction]
    ):
        super().__init__(pool, reward_functions.SCORE, reward_functions.score)
        self._functions = functions
        self.rewards: list[np.ndarray] = []  # a [K, E] for each time step

    def _rewarded(self, after: types.TimeStep) -> types.TimeStep:
        before = after if self._before is None else self._before
        rewards = [
            reward_functions.reward_of(name, function, before, after)
            for name, function in self._functions.items()
        ]
        self.rewards.append(np.stack(rewards))
        return super()._rewarded(after)


def evaluate_rewards(
    trained: stages.Trained,
    config: config_lib.Config,
    names: Sequence[str],
    *,
    constructor: loop.MakePool = games.make_pool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> list[RewardResult]:
    """Adapts to reward functions and plays, with one agent and no gradient step.

    Play, adaptation and games are those of `stages.finetune` before its first update:
    for one reward function alone, both give the same returns.

    Args:
      trained: The pretrained agent.
      config: The run's values; `config.finetune` has the budget of the play,
        `config.evaluation` is the protocol.
      names: Reward functions, as for `reward_functions.load`.
      constructor, progress, stop: As of `stages.finetune_runs`.

    Returns:
      A result for each reward function, in their order.

    Raises:
      ValueError: There is no such reward function, or it cannot work.
      loop.EnvironmentFailure: The environments raised, or a reward function did.
    """
    makers = {name: reward_functions.load(name, config.observation) for name in names}
    agent = trained.agent
    functions = {name: make() for name, make in makers.items()}
    num_envs = config.finetune.finetune_num_envs
    inner = loop.make_pool(config, num_envs, loop.Stream.FINETUNE_ACT, constructor)
    pool = _ManyRewardsPool(inner, functions)
    try:
        plan = loop.finetune_plan(config, agent)
        state = devices.device_put(agent.start_finetune(trained.state))
        session = loop.start(config, plan, pool, state)
        check = None if stop is None else stop.check
        stages.roll_out(config, agent, session, progress=progress, check=check)
        rollouts = loop.play_rollouts(session)
    finally:
        pool.close()
    rewards = np.stack(pool.rewards[: session.iteration])  # [T, K, E]
    player = evaluation.make_player(config, agent, adapted=True)
    at_random = config_lib.replace_options(config, eval_epsilon=1.0)
    random_player = evaluation.make_player(at_random, agent)
    skills_player = None
    if agent.play_skills is not None:
        skills_player = evaluation.compile_player(
            agent.play_skills, config.evaluation.eval_epsilon
        )
    results = []
    for index, name in enumerate(names):
        seen = rollouts._replace(reward=rewards[:, index].reshape(-1))
        adapted_state, adapted = stages.adapt(agent, session, seen)
        games: dict[str, Any] = {
            "constructor": reward_functions.constructor_for(
                name, constructor, config.observation
            ),
            "progress": progress,
            "stop": stop,
        }
        played = evaluation.evaluate(config, player, adapted_state, **games)
        random = evaluation.evaluate(at_random, random_player, adapted_state, **games)
        skilled = None
        if skills_player is not None:
            skilled = evaluation.evaluate(config, skills_player, adapted_state, **games)
        results.append(
            RewardResult(name, adapted, adapted_state, played, random, skilled)
        )
    return results


def to_dict(result: RewardResult) -> dict[str, Any]:
    """Returns a reward function's result as plain values for JSON."""

    def of(played: evaluation.Evaluation) -> dict[str, Any]:
        return {
            "returns": played.returns.tolist(),
            "return_mean": float(played.returns.mean()),
            "score_mean": float(played.score_returns.mean()),
            "length_mean": float(played.lengths.mean()),
        }

    found = {
        "reward": result.name,
        "adapted": result.adapted,
        "zero_shot": of(result.played),
        "random": of(result.random),
    }
    if result.random_tasks is not None:
        found["random_tasks"] = of(result.random_tasks)
    return found
