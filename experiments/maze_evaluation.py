"""Tests a pretrained maze agent: zero-shot, few-shot, and what its score is made of.

All returns are exact: the maze is a table, and so are the successor features of one
task. A score is (return - random) / (optimal - random), so 0 is random play and 1 the
best that any policy can do in the steps of one episode.

Letters: `S` cells, `A` actions, `D` feature dimension, `R` reward functions, `N` sizes
of the reward sample, `K` candidate tasks, `T` steps of an episode, `F` episodes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.envs import maze
from aps_jax.ops import losses, sphere, tasks
from aps_jax.types import Params
from experiments import maze_agent


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """What is asked of a pretrained agent."""

    num_rewards: int = 50
    sample_sizes: tuple[int, ...] = (10, 30, 100, 300)
    num_candidates: int = 10
    kappa: float = 5.0
    intercept: bool = True
    ridge: float = 1e-3
    few_shot_rewards: int = 4
    few_shot_episodes: int = 30
    few_shot_inference_episodes: int = 10
    few_shot_updates: int = 10
    few_shot_learning_rate: float = 3e-4

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

    alone: jax.Array  # [N + 1] by one policy's psi^T w; last: all cells rewarded.
    improved: jax.Array  # [N + 1] with generalised policy improvement.
    bound: jax.Array  # [N + 1] acting optimally on the inferred reward.
    fallbacks: jax.Array  # [N + 1] share of rewards for which no task was inferred.
    r_squared: jax.Array  # [N + 1] of the regression.


class Example(NamedTuple):
    """One reward function and what the agent made of it."""

    reward: jax.Array  # [S]
    inferred: jax.Array  # [S] reward that the inferred task stands for.
    policy: jax.Array  # [S] int32, greedy actions.
    score: jax.Array  # [], of that policy.


def _table(policy_values: jax.Array, horizon: int) -> jax.Array:
    """Repeats the values `[S, A]` of a stationary policy for every step to go."""
    return jnp.broadcast_to(policy_values, (horizon, *policy_values.shape))


def _score(world: maze.Maze, values: jax.Array, reward: jax.Array) -> jax.Array:
    """Scores being greedy in `values` `[T, S, A]`."""
    horizon = values.shape[0]
    return maze.normalized_return(
        maze.greedy_return(world, values, reward),
        maze.random_return(world, reward, horizon=horizon),
        maze.optimal_return(world, reward, horizon=horizon),
    )


def _infer(
    phi: jax.Array, reward: jax.Array, mask: jax.Array, key: jax.Array, c: TestConfig
) -> tasks.InferredTask:
    """Regresses the samples' rewards `[M]` on their features `[M, D]`."""
    dim = phi.shape[1]
    moments = tasks.update_regression_moments(
        tasks.init_regression_moments(dim), phi, reward, mask
    )
    return tasks.infer_task(
        moments,
        fallback_task=sphere.sample_uniform(key, (), dim),
        ridge=c.ridge,
        intercept=c.intercept,
    )


def zero_shot(
    key: jax.Array,
    world: maze.Maze,
    boxes: jax.Array,
    result: maze_agent.Pretrained,
    agent_config: maze_agent.AgentConfig,
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
      result: the pretrained agent.
      agent_config: what it was pretrained with.
      config: the test.
    """
    horizon = agent_config.episode_length
    phi = maze_agent.feature_table(result.feature_params, world, agent_config).phi
    num_recent = max(1, result.visits.shape[0] // 10)
    recent = jnp.sum(result.visits[-num_recent:], axis=0)
    most = max(config.sample_sizes)

    if agent_config.num_heads:
        heads = maze_agent.successor_table(
            result.successor_params, world, result.tasks, agent_config
        ).psi

    def policies(key: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns psi `[S, A, D]` of one policy for w, and `[S, K, A, D]` of many."""
        if agent_config.num_heads:  # The policy of the nearest task that has a head.
            nearest = jnp.argmax(jnp.sum(result.tasks * w[None, :], axis=1))
            return heads[:, nearest], heads
        candidates = tasks.candidate_tasks(
            key, w, num=config.num_candidates, kappa=config.kappa
        )
        psi = maze_agent.successor_table(
            result.successor_params, world, candidates, agent_config
        ).psi
        return psi[:, 0], psi

    def evaluate(w: jax.Array, key: jax.Array, reward: jax.Array):
        one, many = policies(key, w)
        alone = jax.vmap(losses.q_values, (0, None))(one, w)
        improved = jax.vmap(tasks.gpi_action_values, (0, None))(many, w)
        inferred = jnp.sum(phi * w[None, :], axis=1)
        planned = maze.optimal_action_values(world, inferred, horizon=horizon)
        return (
            _score(world, _table(alone, horizon), reward),
            _score(world, _table(improved, horizon), reward),
            _score(world, planned, reward),
            jnp.argmax(improved, axis=1),
        )

    def one_reward(key: jax.Array):
        k_reward, k_cells, k_task, k_candidates = jax.random.split(key, 4)
        reward = maze.sample_reward(k_reward, world, boxes)
        cells = jax.random.categorical(k_cells, jnp.log(recent), shape=(most,))
        # All regressions at once: the eigenvalue solvers of several, run side by side,
        # can wait for one another's threads for ever (JAX 0.10 on a CPU of two cores).
        seen = jnp.concatenate([cells, jnp.arange(phi.shape[0])])
        drawn = [jnp.arange(most) < size for size in config.sample_sizes]
        drawn.append(jnp.zeros(most, bool))
        free = [jnp.zeros_like(world.is_free)] * len(config.sample_sizes)
        free.append(world.is_free)
        masks = jnp.concatenate([jnp.stack(drawn), jnp.stack(free)], axis=1)
        inferred = jax.vmap(
            lambda mask: _infer(phi[seen], reward[seen], mask, k_task, config)
        )(masks)
        alone, improved, bound, policies = jax.lax.map(
            lambda w: evaluate(w, k_candidates, reward), inferred.task
        )
        scores = ZeroShot(
            alone=alone,
            improved=improved,
            bound=bound,
            fallbacks=inferred.is_fallback.astype(jnp.float32),
            r_squared=inferred.r_squared,
        )
        last = jax.tree.map(lambda leaf: leaf[-1], inferred)
        example = Example(
            reward=reward,
            inferred=last.intercept
            + last.scale * jnp.sum(phi * last.task[None, :], axis=1),
            policy=policies[-1].astype(jnp.int32),
            score=improved[-1],
        )
        return scores, example

    scores, examples = jax.lax.map(
        one_reward, jax.random.split(key, config.num_rewards)
    )
    first = jax.tree.map(lambda leaf: leaf[0], examples)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), scores), first


class UnseenCells(NamedTuple):
    """What cells never met in pretraining cost; mean scores over rewards, and a share."""

    share: jax.Array  # [], free cells never visited.
    known: jax.Array  # [] planning on the true reward of seen cells, 0 elsewhere.
    believed: jax.Array  # [] planning on what seen cells' rewards say of all cells.
    silent: jax.Array  # [] the same, unseen cells taken to give no reward.
    acted: jax.Array  # [] psi for the task that seen cells say, with GPI over heads.


def unseen_cells(
    key: jax.Array,
    world: maze.Maze,
    boxes: jax.Array,
    result: maze_agent.Pretrained,
    agent_config: maze_agent.AgentConfig,
    config: TestConfig,
) -> UnseenCells:
    """Measures what is lost in cells that pretraining never visited.

    The task is regressed on every visited cell once. `known` is then the bound of
    coverage alone; `known - silent` is lost by the features of seen cells, and
    `silent - believed` by what the features say of cells that they were never trained
    on.

    Args:
      key: is consumed; the rewards are those of `zero_shot` with the same key.
      world: the maze.
      boxes: `[P, S]`, as `maze.box_masks` makes them.
      result: the pretrained agent, which must have heads.
      agent_config: what it was pretrained with.
      config: the test.
    """
    horizon = agent_config.episode_length
    phi = maze_agent.feature_table(result.feature_params, world, agent_config).phi
    heads = maze_agent.successor_table(
        result.successor_params, world, result.tasks, agent_config
    ).psi
    is_seen = (jnp.sum(result.visits, axis=0) > 0) & world.is_free

    def one_reward(key: jax.Array) -> tuple[jax.Array, ...]:
        k_reward, _, k_task, _ = jax.random.split(key, 4)
        reward = maze.sample_reward(k_reward, world, boxes)
        task = _infer(phi, reward, is_seen, k_task, config)
        believed = jnp.sum(phi * task.task[None, :], axis=1)
        nothing = -task.intercept / task.scale
        improved = jax.vmap(tasks.gpi_action_values, (0, None))(heads, task.task)

        def plan(reward_of_cells: jax.Array) -> jax.Array:
            values = maze.optimal_action_values(world, reward_of_cells, horizon=horizon)
            return _score(world, values, reward)

        return (
            plan(jnp.where(is_seen, reward, 0.0)),
            plan(believed),
            plan(jnp.where(is_seen, believed, nothing)),
            _score(world, _table(improved, horizon), reward),
        )

    scores = jax.lax.map(one_reward, jax.random.split(key, config.num_rewards))
    share = 1.0 - jnp.sum(is_seen) / jnp.sum(world.is_free)
    return UnseenCells(share, *(jnp.mean(score) for score in scores))


def feature_bound(
    world: maze.Maze, rewards: jax.Array, *, feature_dim: int, horizon: int
) -> jax.Array:
    """Scores the best linear features of `feature_dim`, with optimal planning.

    The features are the constant and the leading principal components of the reward
    functions themselves, which no agent knows: no other features of this dimension
    explain them with a smaller squared error.

    Args:
      world: the maze.
      rewards: `[R, S]` float.
      feature_dim: `D`, number of components besides the constant.
      horizon: steps of an episode.

    Returns:
      `[]`, mean score over the rewards.
    """
    free = world.is_free.astype(jnp.float32)
    mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.sum(free)
    centred = (rewards - mean) * free[None, :]
    _, components = jnp.linalg.eigh(centred.T @ centred)  # Ascending.
    leading = components[:, -feature_dim:]
    believed = centred @ leading @ leading.T

    def one(believed: jax.Array, reward: jax.Array) -> jax.Array:
        values = maze.optimal_action_values(world, believed, horizon=horizon)
        return _score(world, values, reward)

    return jnp.mean(jax.vmap(one)(believed, rewards))


def discount_bound(
    world: maze.Maze, rewards: jax.Array, *, discount: float, horizon: int
) -> jax.Array:
    """Scores the optimal stationary policy of the discounted problem, mean over R."""

    def one(reward: jax.Array) -> jax.Array:
        values = maze.optimal_action_values(
            world, reward, horizon=10 * horizon, discount=discount
        )
        return _score(world, _table(values[-1], horizon), reward)

    return jnp.mean(jax.vmap(one)(rewards))


def few_shot(
    key: jax.Array,
    world: maze.Maze,
    boxes: jax.Array,
    feature_params: Params,
    successor_params: Params,
    agent_config: maze_agent.AgentConfig,
    config: TestConfig,
    *,
    is_pretrained: bool | jax.Array,
) -> jax.Array:
    """Fine-tunes on rewards, and scores the greedy policy after every episode.

    The first episodes follow random tasks; then the task is inferred from all
    transitions met so far. From then on `psi^T w` learns the game reward by Q-learning
    with frozen features, on every distinct transition met, while acting
    epsilon-greedily. With heads one table learns, which starts from psi of the policy
    that values an action most, as generalised policy improvement has it.

    A pretrained agent infers the task anew after every further episode, and begins to
    learn anew from what its psi says of it: a task inferred from few cells is wrong, and
    values learnt for it stay wrong where nothing is met that corrects them. An untrained
    agent has nothing to begin anew from; it keeps its task and goes on learning.

    Args:
      key: is consumed.
      world: the maze.
      boxes: `[P, S]`, as `maze.box_masks` makes them.
      feature_params: of the feature network, pretrained or fresh.
      successor_params: of the successor network, pretrained or fresh.
      agent_config: of both networks.
      config: the test.
      is_pretrained: `[]` bool, whether the parameters are.

    Returns:
      `[F + 1]`, mean over rewards of the score after 0, 1, ... episodes. Before the
      inference it is the score of a random task.
    """
    num_cells, num_actions = world.next_cell.shape
    horizon, dim = agent_config.episode_length, agent_config.feature_dim
    phi = maze_agent.feature_table(feature_params, world, agent_config).phi
    gamma = jnp.float32(agent_config.discount)
    unit = 1.0 - gamma if agent_config.unit_values else jnp.float32(1.0)
    optimiser = optax.adam(config.few_shot_learning_rate)
    if agent_config.num_heads:
        optimiser = optax.sgd(agent_config.head_rate)

    def begin(w: jax.Array) -> Params:
        """Returns what learning for w starts from."""
        if not agent_config.num_heads:
            return successor_params
        psi = successor_params.psi  # [S, K, A, D]
        best = jnp.argmax(jnp.sum(psi * w[None, None, None], axis=-1), axis=1)
        return jnp.take_along_axis(psi, best[:, None, :, None], axis=1)[:, 0]

    def psi_of(params: Params, w: jax.Array) -> jax.Array:  # [S, A, D]
        if agent_config.num_heads:
            return params
        table = maze_agent.successor_table(params, world, w[None], agent_config)
        return table.psi[:, 0]

    def values(params: Params, w: jax.Array) -> jax.Array:
        return jax.vmap(losses.q_values, (0, None))(psi_of(params, w), w)

    def play(key: jax.Array, params: Params, w: jax.Array) -> jax.Array:
        """Returns which transitions `[S, A]` one epsilon-greedy episode met."""
        greedy = jnp.argmax(values(params, w), axis=1)
        explore, drawn = maze_agent.random_actions(
            key, (horizon,), agent_config.epsilon
        )

        def act(cell, inputs):
            explores, random = inputs
            action = jnp.where(explores, random, greedy[cell]).astype(jnp.int32)
            return maze.step(world, cell, action), (cell, action)

        _, (cells, actions) = jax.lax.scan(act, world.start, (explore, drawn))
        return jnp.zeros((num_cells, num_actions), bool).at[cells, actions].set(True)

    def loss(params, target_params, w, reward, met):
        psi_tm1, psi = psi_of(params, w), psi_of(target_params, w)
        error = jax.vmap(losses.scalar_td_error, (0, None, 0, None, 0, None))
        total = jnp.float32(0)
        for action in range(num_actions):
            reached = world.next_cell[:, action]
            errors = error(
                psi_tm1,
                np.int32(action),
                unit * reward[reached],
                gamma,
                psi[reached],
                w,
            )
            total += jnp.sum(jnp.square(errors) * met[:, action])
        if agent_config.num_heads:  # Every entry of the table is a loss of its own.
            return 0.5 * total
        return 0.5 * total / jnp.maximum(jnp.sum(met), 1)

    def one_reward(key: jax.Array) -> jax.Array:
        k_reward, k_task, k_episodes = jax.random.split(key, 3)
        reward = maze.sample_reward(k_reward, world, boxes)

        def score(params, w):
            return _score(world, _table(values(params, w), horizon), reward)

        def episode(carry, inputs):
            params, target_params, opt_state, met, task = carry
            index, key = inputs
            w = task.task
            k_play, k_fallback = jax.random.split(key)
            met = met | play(k_play, params, w)

            # What was reached, once for every transition that reaches it.
            reached = world.next_cell.reshape(-1)
            inferred = _infer(
                phi[reached], reward[reached], met.reshape(-1), k_fallback, config
            )
            is_random = index + 1 < config.few_shot_inference_episodes
            is_later = index + 1 > config.few_shot_inference_episodes
            is_inferred = ~is_random & (is_pretrained | ~is_later)
            # The scale is kept with w: that of a later regression would not fit the
            # values that were learnt.
            task = jax.tree.map(
                lambda new, old: jnp.where(is_inferred, new, old), inferred, task
            )
            w = sphere.sample_uniform(k_fallback, (), dim)
            task = task._replace(task=jnp.where(is_random, w, task.task))
            w = task.task
            params, target_params = jax.tree.map(
                lambda new, old: jnp.where(is_random | is_inferred, new, old),
                (begin(w), begin(w)),
                (params, target_params),
            )
            # In the units of psi^T w, which pretraining learnt for a unit task.
            unit_reward = reward / task.scale
            weight = met.astype(jnp.float32)

            def update(carry, _):
                params, target_params, opt_state = carry
                grads = jax.grad(loss)(params, target_params, w, unit_reward, weight)
                params, opt_state = maze_agent.descend(
                    optimiser, grads, opt_state, params
                )
                if agent_config.target_period == 1:
                    target_params = params
                return (params, target_params, opt_state), None

            (learnt, _, learnt_opt), _ = jax.lax.scan(
                update,
                (params, target_params, opt_state),
                None,
                length=config.few_shot_updates,
            )
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(is_random, old, new),
                (learnt, learnt_opt),
                (params, opt_state),
            )
            # A target network is renewed once an episode, if not every update.
            return (params, params, opt_state, met, task), score(params, w)

        w = sphere.sample_uniform(k_task, (), dim)
        met = jnp.zeros((num_cells, num_actions), bool)
        params = begin(w)
        # Nothing was inferred yet: an inference from no rewards is the random task.
        nobody = _infer(phi[:1], jnp.zeros(1), jnp.zeros(1, bool), k_task, config)
        task = nobody._replace(task=w)
        carry = (params, params, optimiser.init(params), met, task)
        first = score(params, w)
        num = config.few_shot_episodes
        _, scores = jax.lax.scan(
            episode, carry, (jnp.arange(num), jax.random.split(k_episodes, num))
        )
        return jnp.concatenate([first[None], scores])

    keys = jax.random.split(key, config.few_shot_rewards)
    return jnp.mean(jax.lax.map(one_reward, keys), axis=0)
