"""Pretrains one agent in one maze without reward, as a single scan.

The agent is made of the library's parts; only the loop is written here. It leans on two
facts: states are few, so features, rewards and values are tables over all cells; and
moves are deterministic, so a transition is known by its cell and action, and the replay
is a table of how often each was met. An update then uses the exact expectation over the
replay in place of a sample from it: every distinct transition weighs the same, for
tasks drawn afresh (the tasks of the behaviour are uniform too, so nothing is lost).

One iteration plays `num_envs` episodes under random tasks, values every cell's entropy,
and makes `num_updates` updates of the features and of the successor features.

Letters: `S` cells, `A` actions, `D` feature dimension, `E` environments, `T` steps of
an episode, `I` iterations, `K` tasks of one update.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax import knn, losses, maze, networks, rewards, sphere
from aps_jax.types import Params, PRNGKey

_FINAL_RATE = 0.02  # Learning rates fall by a cosine to this share of the first one.


class TDForm(enum.Enum):
    """What the successor features learn from; see `aps_jax.losses`."""

    SCALAR = "scalar"  # psi^T w learns the whole reward.
    VECTOR = "vector"  # psi learns phi + r_entropy * w.
    SPLIT = "split"  # psi learns phi under the policy that also explores.
    OFF_POLICY = "off_policy"  # psi learns phi under the policy of its task alone.


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Everything that defines a pretraining run but the maze and the seed.

    Fields that enter only as numbers (weights, rates, discount) may be traced arrays.
    """

    skill_weight: float = 1.0  # APS (1, 1), VISR (1, 0), entropy alone (0, 1).
    entropy_weight: float = 1.0
    task_following: float = 1.0  # Weight of psi^T w in behaviour; 0 only explores.
    td_form: TDForm = TDForm.OFF_POLICY
    feature_dim: int = 20
    feature_hidden: int = 128
    hidden: int = 128
    observation_scale: float = 3.0  # Of the one-hot observation, see docs/maze.md.
    unit_values: bool = True  # Cumulants times (1 - discount): psi stays near 1.
    discount: float = 0.95
    episode_length: int = 40
    task_hold: int = 40  # Agent steps for which behaviour keeps a task.
    num_envs: int = 8
    num_iterations: int = 1000
    num_updates: int = 4
    num_tasks: int = 8
    epsilon: float = 0.2
    learning_rate: float = 2e-3
    feature_learning_rate: float = 1e-3
    feature_decay: float = (
        0.98  # Per iteration, of the visits that features learn from.
    )
    replay_exponent: float = 0.0  # 0 weighs transitions equally, 1 by their visits.
    replay_decay: float = 1.0  # Per iteration, of the replay's counts.
    target_period: int = 10  # Updates.
    num_neighbors: int = 16
    num_particles: int = 256
    distance_decay: float = 0.99

    def __post_init__(self) -> None:
        positive = (
            "feature_dim",
            "feature_hidden",
            "hidden",
            "episode_length",
            "task_hold",
            "num_envs",
            "num_iterations",
            "num_updates",
            "num_tasks",
            "target_period",
            "num_neighbors",
            "num_particles",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.episode_length % self.task_hold:
            raise ValueError(
                f"task_hold must divide an episode of {self.episode_length} steps, got "
                f"{self.task_hold}."
            )
        if self.num_neighbors > self.num_particles:
            raise ValueError(
                f"num_neighbors must be at most the {self.num_particles} particles, "
                f"got {self.num_neighbors}."
            )


class Networks(NamedTuple):
    """The library's two networks, with an encoder for one-hot cells."""

    features: networks.FeatureNetwork
    successor: networks.SuccessorNetwork


class Pretrained(NamedTuple):
    """What pretraining leaves behind."""

    feature_params: Params
    successor_params: Params
    visits: jax.Array  # [I, S] float32, how often each iteration reached each cell.
    td_loss: jax.Array  # [I], mean over the iteration's updates.
    feature_loss: jax.Array  # [I], mean over the iteration's updates.


class _Learner(NamedTuple):
    """What an update changes."""

    feature_params: Params
    successor_params: Params
    target_params: Params
    feature_opt: optax.OptState
    successor_opt: optax.OptState
    num_updates: jax.Array  # [] int32.


class _Memory(NamedTuple):
    """What an iteration remembers of its episodes."""

    replay: jax.Array  # [S, A] float32, (decayed) visits of each transition.
    reached: jax.Array  # [S] float32, visits of each cell: where particles come from.
    task_sum: jax.Array  # [S, D] float32, decayed sum of the tasks that led there.
    task_count: jax.Array  # [S] float32, decayed number of them.
    scale: rewards.DistanceScale


class _Episodes(NamedTuple):
    """A batch of episodes, time-major."""

    cell: jax.Array  # [T, E] int32.
    action: jax.Array  # [T, E] int32.
    next_cell: jax.Array  # [T, E] int32.


def make_networks(config: AgentConfig) -> Networks:
    """Builds the two networks; they have no parameters of their own."""
    has_exploration = config.td_form in (TDForm.SPLIT, TDForm.OFF_POLICY)
    return Networks(
        features=networks.FeatureNetwork(
            networks.MlpEncoder((config.feature_hidden,)), config.feature_dim
        ),
        successor=networks.SuccessorNetwork(
            networks.MlpEncoder((config.hidden,)),
            num_actions=maze.NUM_ACTIONS,
            feature_dim=config.feature_dim,
            hidden=config.hidden,
            exploration_head=has_exploration,
        ),
    )


def observations(world: maze.Maze, config: AgentConfig) -> jax.Array:
    """Returns the scaled one-hot observation of every cell, `[S, S]` float32."""
    num_cells = world.is_free.shape[0]
    return config.observation_scale * maze.observe(world, jnp.arange(num_cells))


def init_params(
    key: PRNGKey, world: maze.Maze, config: AgentConfig
) -> tuple[Params, Params]:
    """Draws fresh parameters of the feature and successor networks; consumes the key."""
    k_features, k_successor = jax.random.split(key)
    cells = observations(world, config)
    nets = make_networks(config)
    tasks = jnp.zeros((cells.shape[0], 1, config.feature_dim))
    return (
        nets.features.init(k_features, cells),
        nets.successor.init(k_successor, cells, tasks),
    )


def successor_table(
    params: Params, world: maze.Maze, tasks: jax.Array, config: AgentConfig
) -> networks.Successor:
    """Predicts psi `[S, K, A, D]` of every cell for tasks `[K, D]`."""
    cells = observations(world, config)
    tasks = jnp.broadcast_to(tasks, (cells.shape[0], *tasks.shape))
    return make_networks(config).successor.apply(params, cells, tasks)


def feature_table(
    params: Params, world: maze.Maze, config: AgentConfig
) -> networks.Features:
    """Computes the features h and phi `[S, D]` of every cell."""
    return make_networks(config).features.apply(params, observations(world, config))


def random_actions(
    key: PRNGKey, shape: tuple[int, ...], epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Draws whether to explore `[*shape]` bool, and with which action, int32."""
    k_explore, k_action = jax.random.split(key)
    explores = jax.random.uniform(k_explore, shape) < epsilon
    return explores, jax.random.randint(k_action, shape, 0, maze.NUM_ACTIONS)


def random_visits(key: PRNGKey, world: maze.Maze, config: AgentConfig) -> jax.Array:
    """Counts the cells `[I, S]` that uniformly random episodes reach; key consumed."""
    num_cells = world.is_free.shape[0]
    greedy = jnp.zeros((num_cells, config.num_envs, 1), jnp.int32)

    def iteration(_: None, key: PRNGKey) -> tuple[None, jax.Array]:
        reached = _play(key, world, greedy, 1.0, config.episode_length).next_cell
        return None, jnp.zeros(num_cells).at[reached].add(1.0)

    keys = jax.random.split(key, config.num_iterations)
    return jax.lax.scan(iteration, None, keys)[1]


def _play(
    key: PRNGKey, world: maze.Maze, greedy: jax.Array, epsilon: float, num_steps: int
) -> _Episodes:
    """Plays epsilon-greedy episodes; `greedy` `[S, E, H]` has an action per task."""
    num_envs, num_tasks = greedy.shape[1:]
    explores, drawn = random_actions(key, (num_steps, num_envs), epsilon)
    task_index = jnp.arange(num_steps) * num_tasks // num_steps

    def act(cell, inputs):
        index, explores, drawn = inputs
        action = jnp.where(explores, drawn, greedy[cell, jnp.arange(num_envs), index])
        next_cell = jax.vmap(maze.step, (None, 0, 0))(world, cell, action)
        return next_cell, _Episodes(cell, action, next_cell)

    start = jnp.full((num_envs,), world.start)
    return jax.lax.scan(act, start, (task_index, explores, drawn))[1]


def descend(
    optimiser: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
) -> tuple[Params, optax.OptState]:
    """Takes one step of the optimiser; returns the new parameters and its new state."""
    # Optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _td_error_square(
    psi_tm1: jax.Array,
    exploration_tm1: jax.Array | None,
    a_tm1: jax.Array,
    phi_t: jax.Array,
    r_entropy_t: jax.Array,
    psi_t: jax.Array,
    exploration_t: jax.Array | None,
    w: jax.Array,
    *,
    config: AgentConfig,
) -> jax.Array:
    """Computes the squared TD error `[]` of one transition and task, in any form."""
    c = config
    discount_t = jnp.float32(c.discount)
    # The greedy policy is the same in any unit, but psi of a unit size is much easier
    # to learn than one of size 1 / (1 - discount).
    unit = 1.0 - discount_t if c.unit_values else jnp.float32(1.0)
    phi_t, r_entropy_t = unit * phi_t, unit * r_entropy_t

    if c.td_form is TDForm.SCALAR:
        r_t = rewards.intrinsic_reward(
            rewards.skill_reward(phi_t, w),
            r_entropy_t,
            skill_weight=c.skill_weight,
            entropy_weight=c.entropy_weight,
        )
        error = losses.scalar_td_error(psi_tm1, a_tm1, r_t, discount_t, psi_t, w)
        return jnp.square(error)
    if c.td_form is TDForm.VECTOR:
        cumulant_t = c.skill_weight * phi_t + c.entropy_weight * r_entropy_t * w
        error = losses.vector_td_error(psi_tm1, a_tm1, cumulant_t, discount_t, psi_t, w)
        return jnp.sum(jnp.square(error))
    split = losses.split_td_error(
        psi_tm1,
        exploration_tm1,
        a_tm1,
        phi_t,
        r_entropy_t,
        discount_t,
        psi_t,
        exploration_t,
        w,
        skill_weight=c.task_following * c.skill_weight,
        entropy_weight=c.entropy_weight,
    )
    successor = split.successor
    if c.td_form is TDForm.OFF_POLICY:
        # Without the skill reward there is nothing for psi to learn.
        successor = losses.vector_td_error(
            psi_tm1, a_tm1, c.skill_weight * phi_t, discount_t, psi_t, w
        )
    return jnp.sum(jnp.square(successor)) + jnp.square(split.exploration)


def make_pretrain(
    config: AgentConfig,
) -> Callable[[PRNGKey, maze.Maze], Pretrained]:
    """Returns `pretrain(key, world)`, which is pure; jit and vmap it at will."""
    c = config
    num_actions, dim = maze.NUM_ACTIONS, c.feature_dim
    num_held = c.episode_length // c.task_hold
    total = c.num_iterations * c.num_updates

    def optimiser(rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rate, total, _FINAL_RATE))

    feature_optimiser = optimiser(c.feature_learning_rate)
    successor_optimiser = optimiser(c.learning_rate)

    def td_loss(params, target_params, world, tasks, phi, r_entropy, weight):
        """Averages over transitions, as `weight` [S, A] says, and over the tasks."""
        before = successor_table(params, world, tasks, c)
        after = successor_table(target_params, world, tasks, c)

        def square(*arguments):
            return _td_error_square(*arguments, config=c)

        over_tasks = jax.vmap(square, (0, 0, None, None, None, 0, 0, 0))
        over_cells = jax.vmap(over_tasks, (0, 0, None, 0, 0, 0, 0, None))
        total = jnp.float32(0)
        for action in range(num_actions):  # Indexing by a constant has a fast gradient.
            reached = world.next_cell[:, action]
            exploration = after.exploration
            squares = over_cells(
                before.psi,
                before.exploration,
                np.int32(action),
                phi[reached],
                r_entropy[reached],
                after.psi[reached],
                None if exploration is None else exploration[reached],
                tasks,
            )
            total += jnp.sum(weight[:, action] * jnp.mean(squares, axis=1))
        return 0.5 * total

    def feature_loss(params, world, mean_task, weight):
        phi = feature_table(params, world, c).phi
        return jnp.sum(weight * jax.vmap(losses.feature_loss)(phi, mean_task))

    def play(key, world, params, tasks):
        """Plays one episode per environment under tasks [E, num_held, D]."""
        tasks = tasks.reshape(-1, dim)
        predicted = successor_table(params, world, tasks, c)
        q = jax.vmap(jax.vmap(losses.q_values), (0, None))(predicted.psi, tasks)
        if predicted.exploration is not None:
            q = rewards.intrinsic_reward(
                q,
                predicted.exploration,
                skill_weight=c.task_following * c.skill_weight,
                entropy_weight=c.entropy_weight,
            )
        greedy = jnp.argmax(q, axis=-1).astype(jnp.int32)
        greedy = greedy.reshape(-1, c.num_envs, num_held)
        return _play(key, world, greedy, c.epsilon, c.episode_length)

    def remember(memory, episodes, tasks):
        """Adds the episodes' visits, and the tasks [E, num_held, D] they obeyed."""
        obeyed = jnp.repeat(tasks.swapaxes(0, 1), c.task_hold, axis=0)  # [T, E, D]
        visits = jnp.zeros_like(memory.reached).at[episodes.next_cell].add(1.0)
        replay = c.replay_decay * memory.replay
        return visits, memory._replace(
            replay=replay.at[episodes.cell, episodes.action].add(1.0),
            reached=memory.reached + visits,
            task_sum=(c.feature_decay * memory.task_sum)
            .at[episodes.next_cell]
            .add(obeyed),
            task_count=c.feature_decay * memory.task_count + visits,
        )

    def value_entropy(key, h, memory, reached):
        """Computes the entropy reward [S] of every cell, and the distances' scale."""
        cumulative = jnp.cumsum(memory.reached)
        drawn = cumulative[-1] * jax.random.uniform(key, (c.num_particles,))
        particles = jnp.searchsorted(cumulative, drawn, side="right")
        distances = knn.knn_distances(h, h[particles], k=c.num_neighbors)
        scale = rewards.update_distance_scale(
            memory.scale, distances[reached], decay=c.distance_decay
        )
        reward = jax.vmap(rewards.particle_entropy_reward, (0, None))
        return reward(distances, scale.mean), memory._replace(scale=scale)

    def update(learner, tasks, *, world, r_entropy, memory):
        is_met = memory.replay > 0
        weight = jnp.where(
            is_met, jnp.where(is_met, memory.replay, 1.0) ** c.replay_exponent, 0.0
        )
        phi = feature_table(learner.feature_params, world, c).phi
        td, grads = jax.value_and_grad(td_loss)(
            learner.successor_params,
            learner.target_params,
            world,
            tasks,
            phi,
            r_entropy,
            weight / jnp.sum(weight),
        )
        successor_params, successor_opt = descend(
            successor_optimiser, grads, learner.successor_opt, learner.successor_params
        )

        # Every cell that was reached lately counts the same, with its mean task.
        count = memory.task_count
        mean_task = memory.task_sum / jnp.maximum(count, 1e-6)[:, None]
        is_recent = (count > 1e-3).astype(jnp.float32)
        error, grads = jax.value_and_grad(feature_loss)(
            learner.feature_params, world, mean_task, is_recent / jnp.sum(is_recent)
        )
        feature_params, feature_opt = descend(
            feature_optimiser, grads, learner.feature_opt, learner.feature_params
        )

        num_updates = learner.num_updates + 1
        is_due = num_updates % c.target_period == 0
        target_params = jax.tree.map(
            lambda new, old: jnp.where(is_due, new, old),
            successor_params,
            learner.target_params,
        )
        learner = _Learner(
            feature_params=feature_params,
            successor_params=successor_params,
            target_params=target_params,
            feature_opt=feature_opt,
            successor_opt=successor_opt,
            num_updates=num_updates,
        )
        return learner, (td, error)

    def iteration(carry, key, *, world):
        learner, memory = carry
        k_behaviour, k_play, k_particles, k_updates = jax.random.split(key, 4)
        behaviour = sphere.sample_uniform(k_behaviour, (c.num_envs, num_held), dim)
        episodes = play(k_play, world, learner.successor_params, behaviour)
        visits, memory = remember(memory, episodes, behaviour)
        h = feature_table(learner.feature_params, world, c).h
        r_entropy, memory = value_entropy(k_particles, h, memory, episodes.next_cell)
        tasks = sphere.sample_uniform(k_updates, (c.num_updates, c.num_tasks), dim)
        learner, (td, error) = jax.lax.scan(
            lambda learner, tasks: update(
                learner, tasks, world=world, r_entropy=r_entropy, memory=memory
            ),
            learner,
            tasks,
        )
        return (learner, memory), (visits, jnp.mean(td), jnp.mean(error))

    def pretrain(key: PRNGKey, world: maze.Maze) -> Pretrained:
        num_cells = world.is_free.shape[0]
        k_init, k_iterations = jax.random.split(key)
        feature_params, successor_params = init_params(k_init, world, c)
        learner = _Learner(
            feature_params=feature_params,
            successor_params=successor_params,
            target_params=successor_params,
            feature_opt=feature_optimiser.init(feature_params),
            successor_opt=successor_optimiser.init(successor_params),
            num_updates=jnp.int32(0),
        )
        memory = _Memory(
            replay=jnp.zeros((num_cells, num_actions)),
            reached=jnp.zeros((num_cells,)),
            task_sum=jnp.zeros((num_cells, dim)),
            task_count=jnp.zeros((num_cells,)),
            scale=rewards.init_distance_scale(),
        )
        (learner, _), (visits, td, error) = jax.lax.scan(
            lambda carry, key: iteration(carry, key, world=world),
            (learner, memory),
            jax.random.split(k_iterations, c.num_iterations),
        )
        return Pretrained(
            feature_params=learner.feature_params,
            successor_params=learner.successor_params,
            visits=visits,
            td_loss=td,
            feature_loss=error,
        )

    return pretrain
