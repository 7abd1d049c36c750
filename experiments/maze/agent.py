"""An agent of tables that pretrains in one maze without reward, in a single scan.

It uses two facts. States are few, so features, rewards and values are tables over all
cells. Moves are deterministic, so the replay is the set of transitions met, and an
update learns from all of them, for every task, in place of a sample.

One iteration plays `num_envs` episodes under tasks of a fixed codebook, computes the
entropy reward of every cell, and updates the successor features and the features.

Letters: `S` cells, `A` actions, `D` feature dimension, `E` environments, `T` steps of
an episode, `H` tasks of an episode, `I` iterations, `K` tasks, each with a head.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from aps_jax import options
from aps_jax.agents.aps import TD_FORMS
from aps_jax.envs import maze
from aps_jax.networks import modules
from aps_jax.ops import knn, losses, rewards, sphere
from aps_jax.options import option
from aps_jax.types import Params, PRNGKey

# Weights of the skill and of the entropy reward: the only difference between agents.
AGENTS = {"aps": (1.0, 1.0), "visr": (1.0, 0.0), "entropy": (0.0, 1.0)}

_HIDDEN_UNITS = 128  # Of the feature network.
_OBSERVATION_SCALE = 3.0  # Of the one-hot observation: features then differ early.
_TABLE_SCALE = 0.01  # Of the first values in a table: no action is preferred by much.
_STEP_SIZE = 0.5  # Share of its error by which an update moves an entry of a table.
_FEATURE_UPDATES = 4  # In an iteration.
_FEATURE_RATE = 1e-3  # Adam's, falling by a cosine ...
_FINAL_SHARE = 0.02  # ... to this share of it.
_FEATURE_DECAY = 0.98  # Per iteration, of the visits that the features learn from.
_DISTANCE_DECAY = 0.99


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Options of pretraining. The two weights may be traced arrays."""

    skill_weight: float | jax.Array = 1.0  # Of the skill reward in behaviour.
    entropy_weight: float | jax.Array = 1.0  # Of the entropy reward in behaviour.
    td_form: str = option("off_policy", "What psi learns.", choices=TD_FORMS)
    feature_dim: int = option(40, "Dimension of features and tasks.", low=1)
    num_heads: int = option(32, "Tasks, each with a table of psi.", low=1)
    unit_values: bool = option(
        True, "Whether cumulants are multiplied by 1 - discount: psi then has size 1."
    )
    discount: float = option(0.97, "Of one agent step.", low=0.0, high=1.0)
    num_steps: int = option(
        9, "Of a return along greedy actions: 1, or 1 more than a power of 2.", low=1
    )
    episode_length: int = option(40, "Agent steps of an episode.", low=1)
    task_hold: int = option(40, "Agent steps for which a task is obeyed.", low=1)
    num_envs: int = option(64, "Episodes of an iteration.", low=1)
    num_iterations: int = option(150, "Updates of psi, with play before each.", low=1)
    epsilon: float = option(0.2, "Probability of a random action.", low=0.0, high=1.0)
    target_period: int = option(1, "Iterations between copies of psi.", low=1)
    num_neighbors: int = option(16, "Of the entropy reward.", low=1)
    num_particles: int = option(256, "Among which neighbours are sought.", low=1)

    def __post_init__(self) -> None:
        options.check(self)
        if self.episode_length % self.task_hold:
            raise ValueError(
                f"task_hold must divide an episode of {self.episode_length} steps, got "
                f"{self.task_hold}."
            )
        if self.num_steps > 1 and not math.log2(self.num_steps - 1).is_integer():
            wrong = f"1, or 1 more than a power of 2, got {self.num_steps}."
            raise ValueError(f"num_steps must be {wrong}")
        if self.num_neighbors > self.num_particles:
            raise ValueError(
                f"num_neighbors must be at most the {self.num_particles} particles, "
                f"got {self.num_neighbors}."
            )


class Pretrained(NamedTuple):
    """What pretraining leaves behind."""

    feature_params: Params
    table: modules.Successor  # psi [S, K, A, D], exploration [S, K, A] or None.
    tasks: jax.Array  # [K, D], one for each head.
    visits: jax.Array  # [I, S] float32, how often each iteration reached each cell.


class Episodes(NamedTuple):
    """A batch of episodes, time-major."""

    cell: jax.Array  # [T, E] int32.
    action: jax.Array  # [T, E] int32.
    next_cell: jax.Array  # [T, E] int32.


class _State(NamedTuple):
    """What an iteration changes."""

    feature_params: Params
    feature_opt: optax.OptState
    table: modules.Successor
    target: modules.Successor
    is_met: jax.Array  # [S, A] bool, the replay.
    reached: jax.Array  # [S] float32, visits of each cell: where particles come from.
    task_sum: jax.Array  # [S, D] float32, decayed sum of the tasks that led there.
    task_count: jax.Array  # [S] float32, decayed number of them.
    scale: rewards.DistanceScale


def feature_table(
    params: Params, world: maze.Maze, config: AgentConfig
) -> modules.Features:
    """Computes the features h and phi `[S, D]` of every cell."""
    features = _feature_network(config).apply(params, _observations(world))
    assert isinstance(features, modules.Features)
    return features


def init_params(
    key: PRNGKey, world: maze.Maze, config: AgentConfig
) -> tuple[Params, modules.Successor]:
    """Draws fresh parameters of the features and tables; the key is consumed."""
    k_features, k_table = jax.random.split(key)
    k_psi, k_exploration = jax.random.split(k_table)
    shape = (world.is_free.shape[0], config.num_heads, maze.NUM_ACTIONS)
    exploration = None
    if config.td_form in ("split", "off_policy"):
        exploration = _TABLE_SCALE * jax.random.normal(k_exploration, shape)
    psi = _TABLE_SCALE * jax.random.normal(k_psi, (*shape, config.feature_dim))
    feature_params = _feature_network(config).init(k_features, _observations(world))
    return feature_params, modules.Successor(psi=psi, exploration=exploration)


def play(
    key: PRNGKey, world: maze.Maze, greedy: jax.Array, *, epsilon: float, num_steps: int
) -> Episodes:
    """Plays epsilon-greedy episodes; the key is consumed.

    Args:
      greedy: `[S, E, H]` int32, the greedy action under each task of an episode, which
        are held equally long, one after the other.
      num_steps: `T`, a multiple of `H`.
    """
    num_envs, num_tasks = greedy.shape[1:]
    k_explore, k_action = jax.random.split(key)
    explores = jax.random.uniform(k_explore, (num_steps, num_envs)) < epsilon
    drawn = jax.random.randint(k_action, explores.shape, 0, maze.NUM_ACTIONS)
    task_index = jnp.arange(num_steps) * num_tasks // num_steps

    def act(cell, inputs):
        index, explores, drawn = inputs
        action = jnp.where(explores, drawn, greedy[cell, jnp.arange(num_envs), index])
        next_cell = jax.vmap(maze.step, (None, 0, 0))(world, cell, action)
        return next_cell, Episodes(cell, action, next_cell)

    start = jnp.full((num_envs,), world.start)
    return jax.lax.scan(act, start, (task_index, explores, drawn))[1]


def random_visits(key: PRNGKey, world: maze.Maze, config: AgentConfig) -> jax.Array:
    """Counts the cells `[I, S]` that uniformly random episodes reach; key consumed."""
    num_cells = world.is_free.shape[0]
    greedy = jnp.zeros((num_cells, config.num_envs, 1), jnp.int32)

    def count(key: PRNGKey) -> jax.Array:
        episodes = play(
            key, world, greedy, epsilon=1.0, num_steps=config.episode_length
        )
        return jnp.zeros(num_cells).at[episodes.next_cell].add(1.0)

    return jax.lax.map(count, jax.random.split(key, config.num_iterations))


def follow(
    greedy: jax.Array,
    cumulant: jax.Array,
    values: jax.Array,
    world: maze.Maze,
    is_met: jax.Array,
    *,
    num_steps: int,
    discount: float,
) -> jax.Array:
    """Computes the return of greedy actions from every cell, under every task.

    It takes `num_steps` at most, ends before a transition that the replay lacks, and
    bootstraps from the value of the greedy action there.

    Args:
      greedy: `[S, K]` int, the action in each cell under each task.
      cumulant: `[S, K, X]`, what reaching a cell gives under each task.
      values: `[S, K, A, X]`, what is bootstrapped from.
      is_met: `[S, A]` bool, the transitions of the replay.
      num_steps: 0 or a power of 2.

    Returns:
      `[S, K, X]`.
    """
    columns = jnp.arange(greedy.shape[1])
    cell = jnp.broadcast_to(jnp.arange(greedy.shape[0])[:, None], greedy.shape)
    total, gamma = jnp.zeros_like(cumulant), jnp.ones(greedy.shape)
    if num_steps:
        met = jnp.take_along_axis(is_met, greedy, axis=1)
        reached = jnp.take_along_axis(world.next_cell, greedy, axis=1)
        cell = jnp.where(met, reached, cell)
        gamma = jnp.where(met, discount, 1.0)
        total = jnp.where(met[..., None], cumulant[cell, columns], 0.0)
        for _ in range(num_steps.bit_length() - 1):  # Twice as many steps each time.
            total += gamma[..., None] * total[cell, columns]
            gamma *= gamma[cell, columns]
            cell = cell[cell, columns]
    last = jnp.take_along_axis(values, greedy[..., None, None], axis=2)[..., 0, :]
    return total + gamma[..., None] * last[cell, columns]


def td_errors(
    table: modules.Successor,
    target: modules.Successor,
    tasks: jax.Array,
    phi: jax.Array,
    r_entropy: jax.Array,
    world: maze.Maze,
    is_met: jax.Array,
    config: AgentConfig,
) -> modules.Successor:
    """Computes the TD errors of all entries: the library's, with `num_steps` steps.

    psi learns the features in the two forms with an exploration value, whatever the
    weights: they say how behaviour acts. In the forms without, psi stands for the value
    of behaviour, and its cumulant is weighted.

    Args:
      table: psi `[S, K, A, D]` and exploration values `[S, K, A]` or None.
      target: of the same shapes, what is bootstrapped from.
      tasks: `[K, D]`.
      phi: `[S, D]`, features of the cells.
      r_entropy: `[S]`, entropy rewards of the cells.
      is_met: `[S, A]` bool, the transitions of the replay.

    Returns:
      Errors, of the shapes of `table`.
    """
    c = config
    unit = 1.0 - c.discount if c.unit_values else 1.0
    shape = (*table.psi.shape[:2], c.feature_dim)
    cumulant = jnp.broadcast_to(unit * phi[:, None, :], shape)
    entropy = jnp.broadcast_to(unit * r_entropy[:, None, None], (*shape[:2], 1))
    own, behaviour = (jnp.argmax(v, -1) for v in _action_values(target, tasks, c))

    def error(greedy, cumulant, values, prediction):
        policy, num = (greedy, cumulant, values), c.num_steps - 1
        ahead = follow(*policy, world, is_met, num_steps=num, discount=c.discount)
        reached = (cumulant + c.discount * ahead)[world.next_cell]  # [S, A, K, X]
        return reached.swapaxes(1, 2) - prediction

    if table.exploration is None or target.exploration is None:
        cumulant = c.skill_weight * cumulant + c.entropy_weight * entropy * tasks[None]
        psi = error(own, cumulant, target.psi, table.psi)
        if c.td_form == "scalar":  # Only psi^T w is in error.
            w = tasks[None, :, None, :]
            psi = jnp.sum(psi * w, axis=-1, keepdims=True) * w
        return modules.Successor(psi=psi, exploration=None)
    greedy = behaviour if c.td_form == "split" else own
    values, prediction = (x[..., None] for x in (target.exploration, table.exploration))
    return modules.Successor(
        psi=error(greedy, cumulant, target.psi, table.psi),
        exploration=error(behaviour, entropy, values, prediction)[..., 0],
    )


def pretrain(key: PRNGKey, world: maze.Maze, config: AgentConfig) -> Pretrained:
    """Explores a maze without reward; pure. The key is consumed."""
    num_cells, num_actions = world.next_cell.shape
    k_init, k_iterations, k_tasks = jax.random.split(key, 3)
    tasks = sphere.sample_uniform(k_tasks, (config.num_heads,), config.feature_dim)
    feature_params, table = init_params(k_init, world, config)
    state = _State(
        feature_params=feature_params,
        feature_opt=_optimiser(config).init(feature_params),
        table=table,
        target=table,
        is_met=jnp.zeros((num_cells, num_actions), bool),
        reached=jnp.zeros((num_cells,)),
        task_sum=jnp.zeros((num_cells, config.feature_dim)),
        task_count=jnp.zeros((num_cells,)),
        scale=rewards.init_distance_scale(),
    )

    def iteration(state: _State, inputs) -> tuple[_State, jax.Array]:
        index, key = inputs
        k_tasks, k_play, k_particles, _ = jax.random.split(key, 4)
        state, episodes, visits = _explore(k_tasks, k_play, state, tasks, world, config)
        features = feature_table(state.feature_params, world, config)
        r_entropy, scale = _entropy_rewards(
            k_particles, features.h, state, episodes.next_cell, config
        )
        tables, rewarded = (state.table, state.target), (features.phi, r_entropy)
        errors = td_errors(*tables, tasks, *rewarded, world, state.is_met, config)

        def move(values, error):
            shape = (num_cells, 1, num_actions, *[1] * (error.ndim - 3))
            met = state.is_met.reshape(shape)
            return values + _STEP_SIZE * jnp.where(met, error, 0.0)

        table = jax.tree.map(move, state.table, errors)
        copy = functools.partial(jnp.where, (index + 1) % config.target_period == 0)
        target = jax.tree.map(copy, table, state.target)
        state = _update_features(state, world, config)
        return state._replace(table=table, target=target, scale=scale), visits

    keys = jax.random.split(k_iterations, config.num_iterations)
    indices = jnp.arange(config.num_iterations)
    state, visits = jax.lax.scan(iteration, state, (indices, keys))
    return Pretrained(state.feature_params, state.table, tasks, visits)


def _observations(world: maze.Maze) -> jax.Array:
    """Returns the scaled one-hot observation of every cell, `[S, S]` float32."""
    cells = jnp.arange(world.is_free.shape[0])
    return _OBSERVATION_SCALE * maze.observe(world, cells)


def _feature_network(config: AgentConfig) -> modules.FeatureNetwork:
    encoder = modules.MlpEncoder((_HIDDEN_UNITS,))
    return modules.FeatureNetwork(encoder, config.feature_dim)


def _optimiser(config: AgentConfig) -> optax.GradientTransformation:
    num = _FEATURE_UPDATES * config.num_iterations
    return optax.adam(optax.cosine_decay_schedule(_FEATURE_RATE, num, _FINAL_SHARE))


def _action_values(
    table: modules.Successor, tasks: jax.Array, config: AgentConfig
) -> tuple[jax.Array, jax.Array]:
    """Values actions `[S, K, A]` by the task alone, and as behaviour does."""
    own = jax.vmap(jax.vmap(losses.q_values), (0, None))(table.psi, tasks)
    if table.exploration is None:
        return own, own
    return own, config.skill_weight * own + config.entropy_weight * table.exploration


def _explore(
    k_tasks: PRNGKey,
    k_play: PRNGKey,
    state: _State,
    tasks: jax.Array,
    world: maze.Maze,
    config: AgentConfig,
) -> tuple[_State, Episodes, jax.Array]:
    """Plays episodes under random tasks, and adds them to the replay."""
    c = config
    # Each task once before any comes twice.
    shape = (c.num_envs, c.episode_length // c.task_hold)
    order = jax.random.permutation(k_tasks, c.num_heads)
    chosen = order[jnp.arange(math.prod(shape)) % c.num_heads].reshape(shape)
    values = _action_values(state.table, tasks, c)[1]
    greedy = jnp.argmax(values, axis=-1).astype(jnp.int32)[:, chosen]
    episodes = play(
        k_play, world, greedy, epsilon=c.epsilon, num_steps=c.episode_length
    )
    obeyed = jnp.repeat(tasks[chosen].swapaxes(0, 1), c.task_hold, axis=0)  # [T, E, D]
    visits = jnp.zeros_like(state.reached).at[episodes.next_cell].add(1.0)
    task_sum = _FEATURE_DECAY * state.task_sum
    state = state._replace(
        is_met=state.is_met.at[episodes.cell, episodes.action].set(True),
        reached=state.reached + visits,
        task_sum=task_sum.at[episodes.next_cell].add(obeyed),
        task_count=_FEATURE_DECAY * state.task_count + visits,
    )
    return state, episodes, visits


def _entropy_rewards(
    key: PRNGKey, h: jax.Array, state: _State, reached: jax.Array, config: AgentConfig
) -> tuple[jax.Array, rewards.DistanceScale]:
    """Computes the entropy reward `[S]` of every cell, and the distances' scale."""
    cumulative = jnp.cumsum(state.reached)
    drawn = cumulative[-1] * jax.random.uniform(key, (config.num_particles,))
    particles = jnp.searchsorted(cumulative, drawn, side="right")
    distances = knn.knn_distances(h, h[particles], k=config.num_neighbors)
    scale = rewards.update_distance_scale(
        state.scale, distances[reached], decay=_DISTANCE_DECAY
    )
    reward = jax.vmap(rewards.particle_entropy_reward, (0, None))
    return reward(distances, scale.mean), scale


def _update_features(state: _State, world: maze.Maze, config: AgentConfig) -> _State:
    """Moves the features of every cell reached lately towards its mean task."""
    mean_task = state.task_sum / jnp.maximum(state.task_count, 1e-6)[:, None]
    is_recent = (state.task_count > 1e-3).astype(jnp.float32)
    weight = is_recent / jnp.sum(is_recent)

    def loss(params: Params) -> jax.Array:
        phi = feature_table(params, world, config).phi
        return jnp.sum(weight * jax.vmap(losses.feature_loss)(phi, mean_task))

    def update(carry, _):
        params, opt_state = carry
        # Optax raises a Python float to the power of an integer array.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = _optimiser(config).update(
                jax.grad(loss)(params), opt_state, params
            )
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(
        update, (state.feature_params, state.feature_opt), None, length=_FEATURE_UPDATES
    )
    return state._replace(feature_params=params, feature_opt=opt_state)
