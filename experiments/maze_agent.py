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
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.envs import maze
from aps_jax.networks import modules
from aps_jax.ops import knn, losses, rewards, sphere
from aps_jax.types import Params, PRNGKey

_HEAD_SCALE = 0.01  # Of the first values in a table: no action is preferred by much.
_FINAL_RATE = 0.02  # Learning rates fall by a cosine to this share of the first one.


class TDForm(enum.Enum):
    """What the successor features learn from; see `aps_jax.ops.losses`."""

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
    feature_dim: int = 40
    feature_hidden: int = 128
    num_heads: int = 32  # Tasks with a head of their own; 0: one network of any task.
    hidden: int = 128  # Of that network.
    observation_scale: float = 3.0  # Of the one-hot observation, see docs/maze.md.
    unit_values: bool = True  # Cumulants times (1 - discount): psi stays near 1.
    discount: float = 0.97
    num_steps: int = 9  # Of a return, along greedy actions that the replay holds.
    episode_length: int = 40
    task_hold: int = 40  # Agent steps for which behaviour keeps a task.
    num_envs: int = 64
    num_iterations: int = 150
    num_updates: int = 1  # Of the successor features, an iteration.
    num_feature_updates: int = 4  # Of the features, for each of those.
    num_tasks: int = 8  # Of an update without heads; those learn all their tasks.
    epsilon: float = 0.2
    head_rate: float = 0.5  # Share of its error that an update takes from a head.
    learning_rate: float = 2e-3  # Of Adam, without heads.
    feature_learning_rate: float = 1e-3
    feature_decay: float = (
        0.98  # Per iteration, of the visits that features learn from.
    )
    replay_exponent: float = 0.0  # 0 weighs transitions equally, 1 by their visits.
    replay_decay: float = 1.0  # Per iteration, of the replay's counts.
    target_period: int = 1  # Updates.
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
            "num_feature_updates",
            "num_tasks",
            "num_steps",
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
        if self.num_heads < 0:
            raise ValueError(f"num_heads must be at least 0, got {self.num_heads}.")
        if self.num_steps != 1 and not math.log2(self.num_steps - 1).is_integer():
            raise ValueError(
                f"num_steps must be 1, or 1 more than a power of 2, got "
                f"{self.num_steps}."
            )
        if self.num_neighbors > self.num_particles:
            raise ValueError(
                f"num_neighbors must be at most the {self.num_particles} particles, "
                f"got {self.num_neighbors}."
            )


def agent_config_from(settings: Sequence[str]) -> AgentConfig:
    """Builds the default agent with some fields set.

    Args:
      settings: of the form `field=value`.

    Raises:
      ValueError: if a setting has another form, a field does not exist, or a value is
        not of its type or out of range.
    """
    default = AgentConfig()
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"expected FIELD=VALUE, got {setting!r}.")
        if name not in vars(default):
            raise ValueError(
                f"no field {name!r}; there are {', '.join(vars(default))}."
            )
        kind = type(getattr(default, name))
        if kind is bool:
            if text not in ("true", "false"):
                raise ValueError(f"{name} needs true or false, got {text!r}.")
            values[name] = text == "true"
            continue
        try:
            values[name] = kind(text)
        except ValueError as error:
            choices = [form.value for form in TDForm]
            needed = {
                int: "a whole number",
                float: "a number",
                TDForm: f"one of {', '.join(choices)}",
            }[kind]
            raise ValueError(f"{name} needs {needed}, got {text!r}.") from error
    return dataclasses.replace(default, **values)


class Networks(NamedTuple):
    """The library's two networks, with an encoder for one-hot cells."""

    features: modules.FeatureNetwork
    successor: modules.SuccessorNetwork  # Used without heads.


class Pretrained(NamedTuple):
    """What pretraining leaves behind."""

    feature_params: Params
    successor_params: Params
    tasks: jax.Array  # [K, D], whose successor features were learnt, if by heads.
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
    return Networks(
        features=modules.FeatureNetwork(
            modules.MlpEncoder((config.feature_hidden,)), config.feature_dim
        ),
        successor=modules.SuccessorNetwork(
            modules.MlpEncoder((config.hidden,)),
            num_actions=maze.NUM_ACTIONS,
            feature_dim=config.feature_dim,
            hidden=config.hidden,
            exploration_head=has_exploration(config),
        ),
    )


def has_exploration(config: AgentConfig) -> bool:
    """Returns whether the value of the entropy reward is an output of its own."""
    return config.td_form in (TDForm.SPLIT, TDForm.OFF_POLICY)


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
    feature_params = nets.features.init(k_features, cells)
    if not config.num_heads:
        tasks = jnp.zeros((cells.shape[0], 1, config.feature_dim))
        return feature_params, nets.successor.init(k_successor, cells, tasks)
    shape = (cells.shape[0], config.num_heads, maze.NUM_ACTIONS)
    k_psi, k_exploration = jax.random.split(k_successor)
    exploration = None
    if has_exploration(config):
        exploration = _HEAD_SCALE * jax.random.normal(k_exploration, shape)
    psi = _HEAD_SCALE * jax.random.normal(k_psi, (*shape, config.feature_dim))
    return feature_params, modules.Successor(psi=psi, exploration=exploration)


def successor_table(
    params: Params, world: maze.Maze, tasks: jax.Array, config: AgentConfig
) -> modules.Successor:
    """Predicts psi `[S, K, A, D]` of every cell for tasks `[K, D]`.

    With heads the tasks must be the pretrained ones, in their order: the parameters are
    then the table itself.
    """
    if config.num_heads:
        chex.assert_shape(tasks, (config.num_heads, config.feature_dim))
        return params
    cells = observations(world, config)
    tasks = jnp.broadcast_to(tasks, (cells.shape[0], *tasks.shape))
    return make_networks(config).successor.apply(params, cells, tasks)


def feature_table(
    params: Params, world: maze.Maze, config: AgentConfig
) -> modules.Features:
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


class _Window(NamedTuple):
    """What follows, up to the state from which values are bootstrapped."""

    phi: jax.Array  # [D] float32, discounted sum of the features.
    r_entropy: jax.Array  # [] float32, discounted sum of the entropy rewards.
    discount: jax.Array  # [] float32, what stands before the bootstrapped values.
    psi: jax.Array  # [1, D] float32, of the greedy action where the window ends.
    exploration: jax.Array | None  # [1], the same.


def _follow(
    greedy: jax.Array,
    predicted: modules.Successor,
    phi: jax.Array,
    r_entropy: jax.Array,
    world: maze.Maze,
    is_met: jax.Array,
    num_steps: int,
    discount: float,
) -> _Window:
    """Follows greedy actions `[S, K]` from every cell, for `num_steps` at most.

    A window ends before the first transition that is not met in the replay.

    Args:
      greedy: `[S, K]` int, an action for each cell and task.
      predicted: what is bootstrapped from, for `S` cells and `K` tasks.
      phi: `[S, D]`, features of the cells.
      r_entropy: `[S]`, entropy rewards of the cells.
      world: the maze.
      is_met: `[S, A]` bool, which transitions the replay holds.
      num_steps: 0 or a power of 2.
      discount: of one step.

    Returns:
      Windows, every field with `[S, K]` before its own shape.
    """
    num_cells, num_tasks = greedy.shape
    columns = jnp.arange(num_tasks)

    met = jnp.take_along_axis(is_met, greedy, axis=1)
    here = jnp.broadcast_to(jnp.arange(num_cells)[:, None], greedy.shape)
    cell, gamma = here, jnp.ones(greedy.shape)
    phi_sum, r_sum = jnp.zeros((*greedy.shape, phi.shape[1])), jnp.zeros(greedy.shape)
    if num_steps:
        cell = jnp.where(
            met, jnp.take_along_axis(world.next_cell, greedy, axis=1), here
        )
        gamma = jnp.where(met, jnp.float32(discount), 1.0)
        phi_sum = jnp.where(met[..., None], phi[cell], 0.0)
        r_sum = jnp.where(met, r_entropy[cell], 0.0)
        for _ in range(num_steps.bit_length() - 1):  # Twice as many steps each time.
            phi_sum += gamma[..., None] * phi_sum[cell, columns]
            r_sum += gamma * r_sum[cell, columns]
            gamma *= gamma[cell, columns]
            cell = cell[cell, columns]

    psi = jnp.take_along_axis(predicted.psi, greedy[..., None, None], axis=2)
    exploration = predicted.exploration
    if exploration is not None:
        exploration = jnp.take_along_axis(exploration, greedy[..., None], axis=2)
        exploration = exploration[cell, columns]
    return _Window(
        phi=phi_sum,
        r_entropy=r_sum,
        discount=gamma,
        psi=psi[cell, columns],
        exploration=exploration,
    )


def _prepend(
    window: _Window, phi: jax.Array, r_entropy: jax.Array, discount: float
) -> _Window:
    """Puts a step with features `[D]` and entropy reward `[]` before a window."""
    return window._replace(
        phi=phi + discount * window.phi,
        r_entropy=r_entropy + discount * window.r_entropy,
        discount=discount * window.discount,
    )


def _td_error_square(
    psi_tm1: jax.Array,
    exploration_tm1: jax.Array | None,
    own: _Window,
    behaviour: _Window,
    w: jax.Array,
    *,
    config: AgentConfig,
) -> jax.Array:
    """Computes the squared TD error `[]` of one action and task, in any form.

    The greedy action is already chosen where the window ends, so that the library's
    errors are given the values of one action only.

    Args:
      psi_tm1: `[1, D]`, successor features of the action.
      exploration_tm1: `[1]`, its exploration value; None in the forms without.
      own: the return of the action if the task alone is obeyed.
      behaviour: its return if behaviour, which also explores, goes on.
      w: `[D]`, the task.
      config: of the agent.
    """
    c, action = config, np.int32(0)
    if c.td_form is TDForm.SCALAR:
        r_t = rewards.intrinsic_reward(
            rewards.skill_reward(own.phi, w),
            own.r_entropy,
            skill_weight=c.skill_weight,
            entropy_weight=c.entropy_weight,
        )
        return jnp.square(
            losses.scalar_td_error(psi_tm1, action, r_t, own.discount, own.psi, w)
        )
    if c.td_form is TDForm.VECTOR:
        cumulant_t = c.skill_weight * own.phi + c.entropy_weight * own.r_entropy * w
        error = losses.vector_td_error(
            psi_tm1, action, cumulant_t, own.discount, own.psi, w
        )
        return jnp.sum(jnp.square(error))
    split = losses.split_td_error(
        psi_tm1,
        exploration_tm1,
        action,
        behaviour.phi,
        behaviour.r_entropy,
        behaviour.discount,
        behaviour.psi,
        behaviour.exploration,
        w,
        skill_weight=c.task_following * c.skill_weight,
        entropy_weight=c.entropy_weight,
    )
    successor = split.successor
    if c.td_form is TDForm.OFF_POLICY:
        # Without the skill reward there is nothing for psi to learn.
        successor = losses.vector_td_error(
            psi_tm1, action, c.skill_weight * own.phi, own.discount, own.psi, w
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

    def optimiser(rate: float, repeats: int = 1) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(rate, repeats * total, _FINAL_RATE)
        return optax.adam(schedule)

    feature_optimiser = optimiser(c.feature_learning_rate, c.num_feature_updates)
    successor_optimiser = optimiser(c.learning_rate)
    if c.num_heads:
        successor_optimiser = optax.sgd(c.head_rate)

    def action_values(predicted, tasks):
        """Values actions `[S, K, A]` by the task alone, and as behaviour does."""
        own = jax.vmap(jax.vmap(losses.q_values), (0, None))(predicted.psi, tasks)
        if predicted.exploration is None:
            return own, own
        return own, rewards.intrinsic_reward(
            own,
            predicted.exploration,
            skill_weight=c.task_following * c.skill_weight,
            entropy_weight=c.entropy_weight,
        )

    def returns(target_params, world, tasks, phi, r_entropy, is_met):
        """Computes what follows each action, `_Window`s of `[S, A, K]`, both ways."""
        # The greedy policy is the same in any unit, but psi of a unit size is much
        # easier to learn than one of size 1 / (1 - discount).
        gamma = jnp.float32(c.discount)
        unit = 1.0 - gamma if c.unit_values else jnp.float32(1.0)
        phi, r_entropy = unit * phi, unit * r_entropy
        predicted = successor_table(target_params, world, tasks, c)

        def follow(values):
            window = _follow(
                jnp.argmax(values, axis=-1),
                predicted,
                phi,
                r_entropy,
                world,
                is_met,
                c.num_steps - 1,
                gamma,
            )
            prepend = jax.vmap(
                jax.vmap(_prepend, (0, None, None, None)), (0, 0, 0, None)
            )
            window = prepend(window, phi, r_entropy, gamma)
            return jax.tree.map(lambda leaf: leaf[world.next_cell], window)

        return [follow(values) for values in action_values(predicted, tasks)]

    def step_unit(weight):
        """Scales the loss so that a step of rate 1 sets a table to its targets."""
        if not c.num_heads:
            return jnp.float32(1)
        return jnp.sum(weight) * c.num_heads

    def td_loss(params, world, tasks, own, behaviour, weight):
        """Averages over transitions, as `weight` [S, A] says, and over the tasks."""
        predicted = successor_table(params, world, tasks, c)
        psi = predicted.psi.swapaxes(1, 2)[..., None, :]  # [S, A, K, 1, D]
        exploration = predicted.exploration
        if exploration is not None:
            exploration = exploration.swapaxes(1, 2)[..., None]

        def square(*arguments):
            return _td_error_square(*arguments, config=c)

        for axis in (0, None, None):  # Tasks, then actions, then cells.
            square = jax.vmap(square, (0, 0, 0, 0, axis))
        squares = square(psi, exploration, own, behaviour, tasks)
        loss = 0.5 * jnp.sum(weight * jnp.mean(squares, axis=2)) / jnp.sum(weight)
        return loss * step_unit(weight), loss

    def feature_loss(params, world, mean_task, weight):
        phi = feature_table(params, world, c).phi
        return jnp.sum(weight * jax.vmap(losses.feature_loss)(phi, mean_task))

    def play(key, world, params, tasks, chosen):
        """Plays one episode per environment under the chosen tasks [E, num_held]."""
        if c.num_heads:
            _, q = action_values(successor_table(params, world, tasks, c), tasks)
            q = q[:, chosen.reshape(-1)]
        else:
            tasks = tasks[chosen.reshape(-1)]
            _, q = action_values(successor_table(params, world, tasks, c), tasks)
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
        # One and the same table, if the target is never old.
        targets = learner.target_params
        if c.target_period == 1:
            targets = learner.successor_params
        windows = returns(targets, world, tasks, phi, r_entropy, is_met)
        (_, td), grads = jax.value_and_grad(td_loss, has_aux=True)(
            learner.successor_params, world, tasks, *windows, weight
        )
        successor_params, successor_opt = descend(
            successor_optimiser, grads, learner.successor_opt, learner.successor_params
        )

        # Every cell that was reached lately counts the same, with its mean task.
        count = memory.task_count
        mean_task = memory.task_sum / jnp.maximum(count, 1e-6)[:, None]
        is_recent = (count > 1e-3).astype(jnp.float32)

        def update_features(carry, _):
            error, grads = jax.value_and_grad(feature_loss)(
                carry[0], world, mean_task, is_recent / jnp.sum(is_recent)
            )
            return descend(feature_optimiser, grads, carry[1], carry[0]), error

        (feature_params, feature_opt), errors = jax.lax.scan(
            update_features,
            (learner.feature_params, learner.feature_opt),
            None,
            length=c.num_feature_updates,
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
        return learner, (td, jnp.mean(errors))

    def iteration(carry, key, *, world, codebook):
        learner, memory = carry
        k_behaviour, k_play, k_particles, k_updates = jax.random.split(key, 4)
        num_played = c.num_envs * num_held
        played, chosen = codebook, jnp.arange(num_played)
        if c.num_heads:  # Each task once before any comes twice.
            order = jax.random.permutation(k_behaviour, c.num_heads)
            chosen = order[chosen % c.num_heads]
        else:
            played = sphere.sample_uniform(k_behaviour, (num_played,), dim)
        chosen = chosen.reshape(c.num_envs, num_held)
        behaviour = played[chosen]
        episodes = play(k_play, world, learner.successor_params, played, chosen)
        visits, memory = remember(memory, episodes, behaviour)
        h = feature_table(learner.feature_params, world, c).h
        r_entropy, memory = value_entropy(k_particles, h, memory, episodes.next_cell)
        drawn = None
        if not c.num_heads:
            drawn = sphere.sample_uniform(k_updates, (c.num_updates, c.num_tasks), dim)
        learner, (td, error) = jax.lax.scan(
            lambda learner, tasks: update(
                learner,
                codebook if tasks is None else tasks,
                world=world,
                r_entropy=r_entropy,
                memory=memory,
            ),
            learner,
            drawn,
            length=c.num_updates,
        )
        return (learner, memory), (visits, jnp.mean(td), jnp.mean(error))

    def pretrain(key: PRNGKey, world: maze.Maze) -> Pretrained:
        num_cells = world.is_free.shape[0]
        k_init, k_iterations, k_tasks = jax.random.split(key, 3)
        codebook = sphere.sample_uniform(k_tasks, (c.num_heads,), dim)
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
            lambda carry, key: iteration(carry, key, world=world, codebook=codebook),
            (learner, memory),
            jax.random.split(k_iterations, c.num_iterations),
        )
        return Pretrained(
            feature_params=learner.feature_params,
            successor_params=learner.successor_params,
            tasks=codebook,
            visits=visits,
            td_loss=td,
            feature_loss=error,
        )

    return pretrain
