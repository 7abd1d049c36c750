"""Tests a pretrained maze agent: zero-shot, few-shot, and what its score is made of.

All returns are exact: the maze is a table, and so are the successor features of one
task. A score is (return - random) / (optimal - random), so 0 is random play and 1 the
best that any policy can do in the steps of one episode.

Letters: `S` cells, `A` actions, `D` feature dimension, `R` reward functions, `N` sizes
of the reward sample, `K` heads, `T` steps of an episode, `F` episodes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.envs import maze
from aps_jax.networks import modules
from aps_jax.ops import losses, sphere, tasks
from aps_jax.types import Array, Params, PRNGKey
from experiments.maze import agent

_STEP_SIZE = 0.5  # Share of its error by which an update of fine-tuning moves a value.


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """What is asked of a pretrained agent."""

    num_rewards: int = 50
    sample_sizes: tuple[int, ...] = (10, 30, 100, 300)
    few_shot_rewards: int = 4
    few_shot_episodes: int = 30
    few_shot_inference_episodes: int = 10
    few_shot_updates: int = 10  # After each episode.

    def __post_init__(self) -> None:
        if self.num_rewards < 1:
            raise ValueError(f"num_rewards must be positive, got {self.num_rewards}.")
        if self.few_shot_episodes < self.few_shot_inference_episodes:
            raise ValueError(
                f"of {self.few_shot_episodes} few-shot episodes "
                f"{self.few_shot_inference_episodes} are for inference."
            )


class ZeroShot(NamedTuple):
    """Scores of acting on the inferred task without learning, means over rewards."""

    alone: Array  # [N + 1] by one policy's psi^T w; last: all cells rewarded.
    improved: Array  # [N + 1] with generalised policy improvement.
    bound: Array  # [N + 1] acting optimally on the inferred reward.
    fallbacks: Array  # [N + 1] share of rewards for which no task was inferred.
    r_squared: Array  # [N + 1] of the regression.


class Example(NamedTuple):
    """One reward function and what the agent made of it."""

    reward: jax.Array  # [S]
    inferred: jax.Array  # [S] reward that the inferred task stands for.
    policy: jax.Array  # [S] int32, greedy actions.
    score: jax.Array  # [], of that policy.


def improved_values(psi: jax.Array, w: jax.Array) -> jax.Array:
    """Values actions `[S, A]` by the best of the policies of psi `[S, K, A, D]`."""
    return jax.vmap(tasks.gpi_action_values, (0, None))(psi, w)


def score(world: maze.Maze, values: jax.Array, reward: jax.Array) -> jax.Array:
    """Scores being greedy in `values` `[T, S, A]`, row h with h + 1 steps to go."""
    horizon = values.shape[0]
    return maze.normalized_return(
        maze.greedy_return(world, values, reward),
        maze.random_return(world, reward, horizon=horizon),
        maze.optimal_return(world, reward, horizon=horizon),
    )


def score_of_greedy(
    world: maze.Maze, values: jax.Array, reward: jax.Array, horizon: int
) -> jax.Array:
    """Scores being greedy in the values `[S, A]` of a stationary policy."""
    return score(world, jnp.broadcast_to(values, (horizon, *values.shape)), reward)


def _infer(
    phi: jax.Array, reward: jax.Array, mask: jax.Array, key: PRNGKey
) -> tasks.InferredTask:
    """Regresses the samples' rewards `[M]` on their features `[M, D]`."""
    dim = phi.shape[1]
    moments = tasks.init_regression_moments(dim)
    moments = tasks.update_regression_moments(moments, phi, reward, mask)
    fallback = sphere.sample_uniform(key, (), dim)
    return tasks.infer_task(moments, fallback_task=fallback)


def zero_shot(
    key: PRNGKey,
    world: maze.Maze,
    boxes: jax.Array,
    result: agent.Pretrained,
    agent_config: agent.AgentConfig,
    config: TestConfig,
) -> tuple[ZeroShot, Example]:
    """Scores the agent on random rewards; the example is the first of them.

    The reward samples are cells drawn from the last tenth of pretraining, that is from
    what the agent does under random tasks; a larger sample contains the smaller ones.
    The last size is every free cell once, visited or not.

    Args:
      key: is consumed.
      world: the maze.
      boxes: `[P, S]`, as `maze.box_masks` makes them.
      result: the agent, pretrained with `agent_config`.
      config: the test.
    """
    horizon, psi = agent_config.episode_length, result.table.psi
    phi = agent.feature_table(result.feature_params, world, agent_config).phi
    num_recent = max(1, result.visits.shape[0] // 10)
    recent = jnp.sum(result.visits[-num_recent:], axis=0)
    most = max(config.sample_sizes)

    def evaluate(w: jax.Array, reward: jax.Array) -> tuple[jax.Array, ...]:
        nearest = jnp.argmax(jnp.sum(result.tasks * w[None, :], axis=1))
        alone = jax.vmap(losses.q_values, (0, None))(psi[:, nearest], w)
        improved = improved_values(psi, w)
        inferred = jnp.sum(phi * w[None, :], axis=1)
        planned = maze.optimal_action_values(world, inferred, horizon=horizon)
        return (
            score_of_greedy(world, alone, reward, horizon),
            score_of_greedy(world, improved, reward, horizon),
            score(world, planned, reward),
            jnp.argmax(improved, axis=1).astype(jnp.int32),
        )

    def one_reward(key: PRNGKey) -> tuple[ZeroShot, Example]:
        k_reward, k_cells, k_task, _ = jax.random.split(key, 4)
        reward = maze.sample_reward(k_reward, world, boxes)
        cells = jax.random.categorical(k_cells, jnp.log(recent), shape=(most,))
        # All regressions at once: the eigenvalue solvers of several, run side by side,
        # can wait for one another's threads for ever (JAX 0.10 on a CPU of two cores).
        seen = jnp.concatenate([cells, jnp.arange(phi.shape[0])])
        sizes = jnp.array([*config.sample_sizes, 0])
        drawn = jnp.arange(most)[None, :] < sizes[:, None]
        free = world.is_free[None, :] & (sizes == 0)[:, None]
        inferred = jax.vmap(lambda mask: _infer(phi[seen], reward[seen], mask, k_task))(
            jnp.concatenate([drawn, free], axis=1)
        )
        alone, improved, bound, policies = jax.lax.map(
            lambda w: evaluate(w, reward), inferred.task
        )
        fallbacks = inferred.is_fallback.astype(jnp.float32)
        scores = ZeroShot(alone, improved, bound, fallbacks, inferred.r_squared)
        last = jax.tree.map(lambda leaf: leaf[-1], inferred)
        along = jnp.sum(phi * last.task[None, :], axis=1)
        believed = last.intercept + last.scale * along
        return scores, Example(reward, believed, policies[-1], improved[-1])

    scores, examples = jax.lax.map(
        one_reward, jax.random.split(key, config.num_rewards)
    )
    first = jax.tree.map(lambda leaf: leaf[0], examples)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), scores), first


def few_shot(
    key: PRNGKey,
    world: maze.Maze,
    boxes: jax.Array,
    feature_params: Params,
    table: modules.Successor,
    agent_config: agent.AgentConfig,
    config: TestConfig,
    *,
    is_pretrained: bool,
) -> jax.Array:
    """Fine-tunes on rewards, and scores the greedy policy after every episode.

    The first episodes follow random tasks; then the task is inferred from all
    transitions met so far. From then on a table of action values, which begins as
    `psi^T w` with generalised policy improvement, learns the reward by Q-learning on
    every transition met, while acting epsilon-greedily.

    A pretrained agent infers the task anew after every further episode, and begins anew
    from its psi: a task inferred from few cells is wrong, and values learnt for it stay
    wrong where nothing is met that corrects them. An untrained agent has nothing to
    begin anew from; it keeps its task and goes on learning.

    Args:
      key: is consumed.
      world: the maze.
      boxes: `[P, S]`, as `maze.box_masks` makes them.
      feature_params, table: of an agent of `agent_config`, pretrained or fresh.
      config: the test.
      is_pretrained: whether they are.

    Returns:
      `[F + 1]`, mean over rewards of the score after 0, 1, ... episodes. Before the
      inference it is the score of a random task.
    """
    num_cells, num_actions = world.next_cell.shape
    horizon, gamma = agent_config.episode_length, agent_config.discount
    phi = agent.feature_table(feature_params, world, agent_config).phi
    unit = 1.0 - gamma if agent_config.unit_values else 1.0
    last_random = config.few_shot_inference_episodes - 1

    def one_reward(key: PRNGKey) -> jax.Array:
        k_reward, k_task, k_episodes = jax.random.split(key, 3)
        reward = maze.sample_reward(k_reward, world, boxes)

        def learn(values: jax.Array, scale: jax.Array, met: jax.Array) -> jax.Array:
            # In the units of psi^T w, which pretraining learnt for a unit task.
            reached = unit * reward / scale + gamma * jnp.max(values, axis=1)
            errors = jnp.where(met, reached[world.next_cell] - values, 0.0)
            return values + _STEP_SIZE * errors

        def episode(carry, inputs):
            values, scale, met = carry
            index, key = inputs
            k_play, k_random = jax.random.split(key)
            greedy = jnp.argmax(values, axis=1).astype(jnp.int32)[:, None, None]
            played = agent.play(
                k_play, world, greedy, epsilon=agent_config.epsilon, num_steps=horizon
            )
            met = met.at[played.cell, played.action].set(True)

            # What was reached, once for every transition that reaches it.
            reached = world.next_cell.reshape(-1)
            found = _infer(phi[reached], reward[reached], met.reshape(-1), k_random)
            is_random = index < last_random
            is_inferred = (index == last_random) | (~is_random & is_pretrained)
            w = sphere.sample_uniform(k_random, (), agent_config.feature_dim)
            w = jnp.where(is_random, w, found.task)
            begun = improved_values(table.psi, w)
            values = jnp.where(is_random | is_inferred, begun, values)
            # Kept with the values: that of a later regression would not fit them.
            scale = jnp.where(is_inferred, found.scale, scale)
            learnt = jax.lax.fori_loop(
                0,
                config.few_shot_updates,
                lambda _, values: learn(values, scale, met),
                values,
            )
            values = jnp.where(is_random, values, learnt)
            return (values, scale, met), score_of_greedy(world, values, reward, horizon)

        w = sphere.sample_uniform(k_task, (), agent_config.feature_dim)
        values = improved_values(table.psi, w)
        met = jnp.zeros((num_cells, num_actions), bool)
        num = config.few_shot_episodes
        episodes = (jnp.arange(num), jax.random.split(k_episodes, num))
        _, scores = jax.lax.scan(episode, (values, jnp.float32(1), met), episodes)
        first = score_of_greedy(world, values, reward, horizon)
        return jnp.concatenate([first[None], scores])

    keys = jax.random.split(key, config.few_shot_rewards)
    return jnp.mean(jax.lax.map(one_reward, keys), axis=0)
