"""One pretrained agent, many tasks of its game: inferred and played without learning.

The agent plays once under random task vectors, as the first part of fine-tuning does, and
every task's rewards of that same play are regressed on the features of the states
reached. Then it plays full games for each task found, by generalised policy improvement.
Letters: `K` tasks, `E` environments, `D` feature dimension.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import aps as agent_lib
from aps_jax.envs import atari, reward_functions
from aps_jax.ops import tasks
from aps_jax.parallel import devices, interrupts
from aps_jax.runs import progress as progress_lib
from aps_jax.train import evaluation, loop, stages


class TaskResult(NamedTuple):
    """What a pretrained agent does on one task at once, beside random play."""

    name: str
    inferred: stages.Inferred
    played: evaluation.Evaluation
    random: evaluation.Evaluation  # Uniformly random actions, the same protocol.


class _ManyTasksPool(reward_functions.TaskPool):
    """Environments with the game's reward that keep several tasks' beside it."""

    def __init__(self, pool: Any, functions: dict[str, reward_functions.TaskFunction]):
        super().__init__(pool, reward_functions.SCORE, reward_functions.score)
        self._functions = functions
        self.rewards = np.zeros((len(functions), pool.num_envs), np.float32)  # [K, E]

    def _rewarded(self, after: types.TimeStep) -> types.TimeStep:
        before = after if self._before is None else self._before
        self.rewards = np.stack(
            [
                reward_functions.task_reward(name, function, before, after)
                for name, function in self._functions.items()
            ]
        )
        return super()._rewarded(after)


def evaluate_tasks(
    trained: stages.Trained,
    config: config_lib.Config,
    names: Sequence[str],
    *,
    constructor: loop.MakePool = atari.AtariPool,
    progress: progress_lib.Progress | None = None,
    stop: interrupts.StopRequests | None = None,
) -> list[TaskResult]:
    """Infers and plays tasks with one agent and no gradient step.

    Rollouts, regression and games are those of `stages.finetune` before its first
    update: for a task alone, both give the same `w` and the same returns.

    Args:
      trained: The pretrained agent.
      config: The run's values; `config.finetune` has the budget of the rollouts,
        `config.evaluation` is the protocol.
      names: Tasks, as for `game_tasks.load`.
      constructor: Makes the environments.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      A result for each task, in their order.

    Raises:
      ValueError: There is no such task, or its function cannot work.
      loop.EnvironmentFailure: The environments raised, or a task's function did.
    """
    makers = {name: reward_functions.load(name) for name in names}
    found = _infer_tasks(
        trained, config, makers, constructor=constructor, progress=progress, stop=stop
    )
    play = functools.partial(
        evaluation.evaluate,
        agent=trained.agent,
        params=trained.state.params,
        progress=progress,
        stop=stop,
    )
    at_random = config_lib.replace_options(config, eval_epsilon=1.0)
    results = []
    for name, inferred in found.items():
        task = jnp.asarray(inferred.task, jnp.float32)
        games = {"constructor": reward_functions.constructor_for(name, constructor)}
        played = play(config, task=task, use_gpi=True, **games)
        random = play(at_random, task=task, use_gpi=False, **games)
        results.append(TaskResult(name, inferred, played, random))
    return results


def _infer_tasks(
    trained: stages.Trained,
    config: config_lib.Config,
    makers: dict[str, Any],
    *,
    constructor: loop.MakePool,
    progress: progress_lib.Progress | None,
    stop: interrupts.StopRequests | None,
) -> dict[str, stages.Inferred]:
    """Plays under random tasks and regresses the rewards of all given ones."""
    values = config.finetune
    num_envs = values.finetune_num_envs
    key = loop.stream_key(config.seed, loop.Stream.INFER_ACT)
    agent = trained.agent

    def act(
        params: types.Params,
        actor: agent_lib.ActorState,
        moments: tasks.RegressionMoments,  # each [K, ...]
        timestep: types.TimeStep,
        rewards: jax.Array,  # [K, E]
    ):
        actor, step = agent.act(
            params,
            actor,
            timestep,
            key,
            epsilon=config.pretrain.pretrain_epsilon,
            explore=True,
            use_gpi=False,
        )
        phi = agent.features(params, actor.stack).phi
        clipped = agent_lib.clip_rewards(rewards, values.reward_clip)
        moments = jax.vmap(tasks.update_regression_moments, (0, None, 0, None))(
            moments, phi, clipped, ~timestep.is_first
        )
        return actor, moments, step.action

    act = jax.jit(act, donate_argnames=("actor", "moments"))
    actor = devices.put(agent.init_actor(num_envs))
    one = tasks.init_regression_moments(config.learner.feature_dim)
    moments = devices.put(
        jax.tree.map(lambda x: jnp.zeros((len(makers), *x.shape), x.dtype), one)
    )
    functions = {name: make() for name, make in makers.items()}
    inner = loop.make_pool(config, num_envs, loop.Stream.FINETUNE_ACT, constructor)
    pool = _ManyTasksPool(inner, functions)
    total = -(-values.infer_agent_steps // num_envs)
    num_games = num_steps = 0
    try:
        if progress is not None:
            progress.start("infer", total=total * num_envs, unit="agent steps")
        timestep = pool.reset()
        while num_steps < total and num_games < values.infer_episodes:
            if stop is not None:
                stop.check()
            actor, moments, action = act(
                trained.state.params,
                actor,
                moments,
                devices.put(timestep),
                devices.put(pool.rewards),
            )
            action = jax.device_get(action)
            with loop.blaming_environment():
                pool.send(action)
                timestep = pool.recv()
            num_steps += 1
            num_games += int(np.sum(timestep.terminated | timestep.truncated))
            if progress is not None:
                progress.tick(num_steps * num_envs)
    finally:
        pool.close()
    found = {}
    for index, name in enumerate(makers):
        one = jax.tree.map(operator.itemgetter(index), moments)
        found[name] = stages.infer_from(config, one, num_steps * num_envs)
    return found


def to_dict(result: TaskResult) -> dict[str, Any]:
    """Returns a task's result as plain values for JSON."""

    def of(played: evaluation.Evaluation) -> dict[str, Any]:
        return {
            "returns": played.returns.tolist(),
            "return_mean": float(played.returns.mean()),
            "score_mean": float(played.score_returns.mean()),
            "length_mean": float(played.lengths.mean()),
        }

    return {
        "name": result.name,
        "inferred": result.inferred.to_facts(),
        "zero_shot": of(result.played),
        "random": of(result.random),
    }
