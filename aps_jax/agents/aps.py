"""The agent: its state, how it acts, and how it learns with and without reward.

`make_agent` binds a config to pure functions. Letters: `E` environments, `B` windows,
`T = m + n` states of a window, `m` its TD targets, `n` steps of a return, `P`
particles, `A` actions, `D` feature dimension.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax import types
from aps_jax.config import AgentConfig, FinetuneConfig
from aps_jax.networks import modules
from aps_jax.ops import knn, losses, rewards, sphere, tasks, whitening
from aps_jax.replay import buffer, frames

# `steps_left` of a task that is never redrawn; counted down once per agent step, it
# lasts longer than any run.
_FOREVER = jnp.iinfo(jnp.int32).max

# Rows that `apply_where` computes together on a CPU: enough for fast matrix products,
# and on average half of them computed for nothing.
_ROWS_PER_CHUNK = 16


class AgentState(NamedTuple):
    """All that is learned. `init` creates it, the updates alone change it."""

    params: types.Params  # {"features": ..., "successor": ..., "whitening": ...}
    target_params: types.Params  # of the successor network
    opt_state: optax.OptState
    distance_scale: rewards.DistanceScale  # running mean distance of the kNN reward
    num_updates: jax.Array  # [] int32, since this stage began


class Particles(NamedTuple):
    """What the entropy reward needs to know of replayed states."""

    h: jax.Array  # [P, D] float32, output of the feature encoder, not whitened.
    id: jax.Array  # [P] int32, of the steps.


class ActorState(NamedTuple):
    """What acting remembers of each environment."""

    stack: jax.Array  # [E, 84, 84, STACK_SIZE] uint8, newest frame last.
    task: jax.Array  # [E, D] float32, unit vectors.
    steps_left: jax.Array  # [E] int32, agent steps until the task is redrawn.
    lives: jax.Array  # [E] int32, lives at the step before.
    num_steps: jax.Array  # [] int32, time steps acted; numbers the random stream.


class Agent(NamedTuple):
    """Pure functions of one agent; see `make_agent` for their arguments."""

    init: Callable[[types.PRNGKey], AgentState]
    init_finetune: Callable[[AgentState], AgentState]
    init_actor: Callable[[int], ActorState]
    act: Callable[..., tuple[ActorState, buffer.Step]]
    features: Callable[[types.Params, jax.Array], modules.Features]
    calibrate: Callable[[types.Params, jax.Array], types.Params]
    particles: Callable[[types.Params, buffer.Window], Particles]
    update: Callable[..., tuple[AgentState, dict[str, jax.Array]]]
    finetune_update: Callable[..., tuple[AgentState, dict[str, jax.Array]]]


class Targets(NamedTuple):
    """How the TD targets of one window are put together."""

    is_valid: jax.Array  # [m] float32, 0 where the start is no transition.
    rewarded: jax.Array  # [m, n] int32, places of the states that are summed.
    weight: jax.Array  # [m, n] float32, 1 up to the first cut, 0 after it.
    discount: jax.Array  # [m, n] float32, 1 after the first cut.
    bootstrap: jax.Array  # [m] int32, place of the state that is bootstrapped from.


def make_encoder(config: AgentConfig):
    """Returns the encoder module that a config names."""
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    encoders = {
        "small": modules.SmallEncoder,
        "nature": modules.NatureEncoder,
        "paper": modules.PaperEncoder,
    }
    return encoders[config.encoder](dtype=dtype)


def pin_task(actor: ActorState, task: jax.Array) -> ActorState:
    """Gives every environment one task and keeps it.

    Args:
      actor: State of `E` environments.
      task: `[D]` float, unit vector.

    Returns:
      The state, with a task that is never redrawn.
    """
    return actor._replace(
        task=jnp.broadcast_to(task[None, :], actor.task.shape),
        steps_left=jnp.full_like(actor.steps_left, _FOREVER),
    )


def epsilon_greedy(key: types.PRNGKey, values: jax.Array, epsilon: float) -> jax.Array:
    """Draws the best action, or with probability epsilon any; equally good ones alike.

    Distrax's `EpsilonGreedy`, whose import of TensorFlow Probability is a fifth of the
    time in which a run starts.

    Args:
      key: Consumed.
      values: `[..., A]` float.
      epsilon: Probability of an action drawn from all.

    Returns:
      `[...]` int32.
    """
    is_best = values == jnp.max(values, axis=-1, keepdims=True)
    greedy = is_best.astype(values.dtype)
    greedy = greedy / jnp.sum(greedy, axis=-1, keepdims=True)
    probabilities = (1.0 - epsilon) * greedy + epsilon / values.shape[-1]
    return jax.random.categorical(key, jnp.log(probabilities)).astype(jnp.int32)


def clip_rewards(r_t: jax.Array, bound: float) -> jax.Array:
    """Clips rewards of any shape to [-bound, bound]; a bound of 0 leaves them alone."""
    return jnp.clip(r_t, -bound, bound) if bound else r_t


def lay_out_targets(
    window: buffer.Window,
    *,
    num_targets: int,
    n_steps: int,
    discount: float,
    cut_at_task_change: bool,
    cut_at_life_loss: bool,
) -> Targets:
    """Finds the states that each n-step target of a window sums and bootstraps from.

    A sum ends at the end of an episode. After game over nothing is bootstrapped; at
    the time limit, and where the task changes, the sum is cut and bootstraps there.

    Args:
      window: `T >= num_targets + n_steps` states, without batch axis.
      num_targets: `m`, targets; they start at the window's first states.
      n_steps: `n`, steps summed.
      discount: Discount gamma of one step.
      cut_at_task_change: Whether a return for one task ends where the behaviour
        starts to follow another.
      cut_at_life_loss: Whether a lost life counts as game over.

    Returns:
      `Targets`.
    """
    # An episode ends where the next frame is a reset's, whatever ended it: game over,
    # the time limit, or a resumed run whose emulators started anew. (Of the last state
    # the next is not known, nor needed: a cut there changes nothing.)
    is_end = jnp.append(window.is_first[1:], False)
    starts = jnp.arange(num_targets)
    rewarded = starts[:, None] + 1 + jnp.arange(n_steps)[None, :]  # [m, n]
    has_no_future = window.terminated
    if cut_at_life_loss:
        has_no_future = has_no_future | window.life_lost
    is_cut = is_end[rewarded] | has_no_future[rewarded]
    if cut_at_task_change:
        is_other_task = jnp.any(
            window.task[rewarded] != window.task[starts][:, None, :], axis=-1
        )
        is_cut = is_cut | is_other_task
    horizon, weight = jax.vmap(losses.mask_after_cut)(is_cut)
    step_discount = discount * (1.0 - has_no_future[rewarded].astype(jnp.float32))
    return Targets(
        is_valid=1.0 - is_end[starts].astype(jnp.float32),
        rewarded=rewarded,
        weight=weight,
        discount=jnp.where(weight > 0.0, step_discount, 1.0),
        bootstrap=starts + horizon,
    )


class _Mean(NamedTuple):
    """A mean that is not divided yet, so that devices can add up their shares of it."""

    total: jax.Array  # [...] float32
    count: jax.Array  # [] float32

    def divided(self) -> jax.Array:
        """Returns the mean; 0 if nothing counts."""
        return self.total / jnp.maximum(self.count, 1.0)


def _mean_of_valid(values: jax.Array, is_valid: jax.Array) -> _Mean:
    """Averages over the entries that count."""
    chex.assert_equal_shape([values, is_valid])
    return _Mean(jnp.sum(values * is_valid), jnp.sum(is_valid))


def _mean_of_all(values: jax.Array, *, num_axes: int) -> _Mean:
    """Averages over the leading axes."""
    count = jnp.float32(math.prod(values.shape[:num_axes]))
    return _Mean(jnp.sum(values, axis=tuple(range(num_axes))), count)


def _divided(grads: types.Params, count: jax.Array) -> types.Params:
    """Divides the gradient of a sum by the number of its terms."""
    return jax.tree.map(lambda x: _Mean(x, count).divided(), grads)


def _add_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Adds up a pytree of float32 over the devices of an axis, in one collective."""
    if axis_name is None:
        return tree
    flat, to_tree = jax.flatten_util.ravel_pytree(tree)
    return to_tree(jax.lax.psum(flat, axis_name))


def _gather_from_devices(
    arrays: tuple[jax.Array, ...], axis_name: str | None
) -> tuple[jax.Array, ...]:
    """Stacks 32-bit arrays of all devices of an axis, `[N, ...]`, in one collective."""
    if axis_name is None:
        return tuple(x[None] for x in arrays)
    # As integers the bits of every type travel unchanged.
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32).reshape(-1) for x in arrays]
    gathered = jax.lax.all_gather(jnp.concatenate(bits), axis_name)
    ends = np.cumsum([x.size for x in bits])[:-1].tolist()
    return tuple(
        jax.lax.bitcast_convert_type(part, x.dtype).reshape(-1, *x.shape)
        for part, x in zip(jnp.split(gathered, ends, axis=1), arrays, strict=True)
    )


def apply_where(function: Callable[[jax.Array], Any], is_needed: jax.Array) -> Any:
    """Computes the rows that are needed, and leaves the others 0.

    On a CPU the other rows cost nothing: the needed ones are computed a chunk at a time,
    as many chunks as it takes. An accelerator, which would have to ask the device how
    many, computes all rows together. Not differentiable.

    Args:
      function: Maps `[C]` int32 numbers of rows to a pytree with leading axis `[C]`.
      is_needed: `[N]` bool.

    Returns:
      The pytree, with leading axis `[N]`.
    """
    num_rows = is_needed.shape[0]
    if jax.default_backend() != "cpu" or num_rows <= _ROWS_PER_CHUNK:
        results = function(jnp.arange(num_rows, dtype=jnp.int32))
    else:
        needed_first = jnp.argsort(~is_needed, stable=True).astype(jnp.int32)

        def add_chunk(number: jax.Array, results: Any) -> Any:
            # The last chunk starts earlier if it would not be full, and repeats rows.
            rows = jax.lax.dynamic_slice_in_dim(
                needed_first, number * _ROWS_PER_CHUNK, _ROWS_PER_CHUNK
            )
            return jax.tree.map(
                lambda all_rows, some: all_rows.at[rows].set(some),
                results,
                function(rows),
            )

        shapes = jax.eval_shape(function, needed_first[:_ROWS_PER_CHUNK])
        zeros = jax.tree.map(
            lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), shapes
        )
        num_needed = jnp.sum(is_needed, dtype=jnp.int32)
        num_chunks = (num_needed + _ROWS_PER_CHUNK - 1) // _ROWS_PER_CHUNK
        results = jax.lax.fori_loop(0, num_chunks, add_chunk, zeros)
    return jax.tree.map(
        lambda x: jnp.where(
            jnp.expand_dims(is_needed, tuple(range(1, x.ndim))), x, jnp.zeros_like(x)
        ),
        results,
    )


def make_agent(
    config: AgentConfig, finetune: FinetuneConfig, *, num_actions: int
) -> Agent:
    """Binds the networks, the objective and the optimisers of a config.

    Args:
      config: Networks, objective and optimiser.
      finetune: Values of the stage with reward.
      num_actions: `A`, actions of the game.

    Returns:
      An `Agent`:
      `init(key)` creates the state of an untrained agent; the key is consumed.
      `init_finetune(state)` keeps all that was learned and starts a new optimiser that
      leaves the feature network as it is.
      `init_actor(num_envs)` creates the memory of that many environments.
      `act(params, actor, timestep, key, step_id, *, epsilon, explore, use_gpi)` chooses
      an action per environment and returns the new actor and the `replay.Step` to store;
      `explore` adds the value of the entropy reward (split forms), `use_gpi` maximises
      over further tasks.
      `features(params, observation)` are those of `[..., 84, 84, STACK_SIZE]` states.
      `calibrate(params, observation)` takes the features' mean and covariance anew from
      `[N, 84, 84, STACK_SIZE]` states: those of the updates are a step behind.
      `particles(params, windows)` encodes `[P]` windows of one state, each by itself.
      `update(state, windows, particles)` makes one reward-free update from `[B]` windows
      of `config.window_states` states and `[P]` particles, encoded by the same params.
      `finetune_update(state, windows, task, reward_scale)` makes one update from the
      game's reward for one task `[D]`: `psi^T w` learns the value of
      `config.value_unit / reward_scale` times the reward. With the norm of the inferred
      w as `reward_scale` that is the unit of the pretrained psi, with
      `config.value_unit` it is the reward's own.
      Both updates return the new state and scalar metrics.
      `calibrate` and both updates take an `axis_name`: within `jax.shard_map` over an
      axis of devices, each with its share of the observations, windows and particles,
      they return on every device what one device would with all of them.
    """
    m, n = config.window_targets, config.n_steps
    has_exploration = config.has_exploration_value
    two_headed_td_error = (
        losses.off_policy_td_error
        if config.td_form == "off_policy"
        else losses.split_td_error
    )
    feature_network = modules.FeatureNetwork(make_encoder(config), config.feature_dim)
    successor_network = modules.SuccessorNetwork(
        make_encoder(config),
        num_actions,
        config.feature_dim,
        hidden=config.hidden_units,
        exploration_head=has_exploration,
    )

    def adam(learning_rate: float, unit: float = 1.0) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.max_gradient_norm),
            # A TD error's gradient has the unit of the values; so has epsilon, else it
            # would swallow the small gradients of unit values.
            optax.adam(learning_rate, eps=config.adam_epsilon * unit),
        )

    def by_network(
        features: optax.GradientTransformation, successor: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        return optax.partition(
            {
                "features": features,
                "successor": successor,
                # Follows the features by itself.
                "whitening": optax.set_to_zero(),
            },
            {name: name for name in ("features", "successor", "whitening")},
        )

    optimizer = by_network(
        adam(config.feature_learning_rate),
        adam(config.learning_rate, config.value_unit),
    )
    finetune_optimizer = by_network(
        optax.set_to_zero(), adam(finetune.finetune_learning_rate, config.value_unit)
    )

    def init(key: types.PRNGKey) -> AgentState:
        features_key, successor_key = jax.random.split(key)
        observation = frames.init_stack(1)
        task = jnp.zeros((1, 1, config.feature_dim))
        params = {
            "features": feature_network.init(features_key, observation),
            "successor": successor_network.init(successor_key, observation, task),
            "whitening": whitening.init_whitening(config.feature_dim),
        }
        return AgentState(
            params=params,
            # A copy, not the same arrays: donated buffers must not be aliased.
            target_params=jax.tree.map(jnp.copy, params["successor"]),
            opt_state=optimizer.init(params),
            distance_scale=rewards.init_distance_scale(),
            num_updates=jnp.zeros((), jnp.int32),
        )

    def init_finetune(state: AgentState) -> AgentState:
        return state._replace(
            opt_state=finetune_optimizer.init(state.params),
            num_updates=jnp.zeros((), jnp.int32),
        )

    def init_actor(num_envs: int) -> ActorState:
        return ActorState(
            stack=frames.init_stack(num_envs),
            task=jnp.zeros((num_envs, config.feature_dim)),
            steps_left=jnp.zeros((num_envs,), jnp.int32),
            lives=jnp.zeros((num_envs,), jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
        )

    def raw_features(params: types.Params, observation: jax.Array) -> jax.Array:
        return feature_network.apply(params["features"], observation).h

    def finished_features(
        moments: whitening.Whitening, h: jax.Array
    ) -> modules.Features:
        h = whitening.whiten(moments, h)
        return modules.Features(h=h, phi=sphere.normalize(h))

    def features(params: types.Params, observation: jax.Array) -> modules.Features:
        return finished_features(params["whitening"], raw_features(params, observation))

    def calibrate(
        params: types.Params, observation: jax.Array, axis_name: str | None = None
    ) -> types.Params:
        if not config.whiten_features:
            return params
        moments = whitening.init_whitening(config.feature_dim)
        (h,) = _gather_from_devices((raw_features(params, observation),), axis_name)
        h = h.reshape(-1, config.feature_dim)
        return {**params, "whitening": whitening.update_whitening(moments, h)}

    def particles_of(params: types.Params, windows: buffer.Window) -> Particles:
        return Particles(
            raw_features(params, windows.observation[:, 0]), windows.id[:, 0]
        )

    def successor(
        params: types.Params, observation: jax.Array, task: jax.Array
    ) -> modules.Successor:
        """Applies the successor network for one task per state, without the K axis."""
        output = successor_network.apply(params, observation, task[..., None, :])
        return jax.tree.map(lambda x: jnp.squeeze(x, axis=task.ndim - 1), output)

    def behaviour_values(output: modules.Successor, w: jax.Array) -> jax.Array:
        """Values `[A]` of one state that include the exploration still to come."""
        q = losses.q_values(output.psi, w)
        if not has_exploration:
            return q
        return config.skill_weight * q + config.entropy_weight * output.exploration

    def act(
        params: types.Params,
        actor: ActorState,
        timestep: types.TimeStep,
        key: types.PRNGKey,
        *,
        epsilon: float,
        explore: bool,
        use_gpi: bool,
    ) -> tuple[ActorState, buffer.Step]:
        num_envs = timestep.frame.shape[0]
        key = jax.random.fold_in(key, actor.num_steps)
        task_key, candidate_key, action_key = jax.random.split(key, 3)

        is_due = actor.steps_left <= 0
        drawn = sphere.sample_uniform(task_key, (num_envs,), config.feature_dim)
        task = jnp.where(is_due[:, None], drawn, actor.task)
        steps_left = jnp.where(is_due, config.task_steps, actor.steps_left) - 1
        stack = frames.push_frame(actor.stack, timestep.frame, timestep.is_first)

        if use_gpi and config.gpi_tasks:
            draw = functools.partial(
                tasks.candidate_tasks,
                num=config.gpi_tasks,
                kappa=config.gpi_concentration,
            )
            candidates = jax.vmap(draw)(jax.random.split(candidate_key, num_envs), task)
            output = successor_network.apply(params["successor"], stack, candidates)
            values = jax.vmap(tasks.gpi_action_values)(output.psi, task)
        else:
            output = successor(params["successor"], stack, task)
            value_function = behaviour_values if explore else _task_values
            values = jax.vmap(value_function)(output, task)
        action = epsilon_greedy(action_key, values, epsilon)

        step = buffer.Step(
            frame=timestep.frame,
            action=action,
            reward=timestep.reward,
            terminated=timestep.terminated,
            is_first=timestep.is_first,
            life_lost=(timestep.lives < actor.lives) & ~timestep.is_first,
            task=task,
            id=actor.num_steps * num_envs + jnp.arange(num_envs, dtype=jnp.int32),
        )
        actor = ActorState(
            stack=stack,
            task=task,
            steps_left=steps_left,
            lives=timestep.lives,
            num_steps=actor.num_steps + 1,
        )
        return actor, step

    def distances_to_particles(
        h_t: jax.Array,
        ids_t: jax.Array,
        is_used: jax.Array,
        particle_h: jax.Array,
        particle_ids: jax.Array,
    ) -> jax.Array:
        """Returns `[N, k]` distances of `[N, D]` states.

        States that are not used have no neighbours: distances of +inf, which do not count.
        """
        distances = knn.knn_distances(
            h_t,
            particle_h,
            k=config.num_neighbors,
            query_ids=ids_t,
            particle_ids=particle_ids,
        )
        return jnp.where(is_used[:, None], distances, jnp.inf)

    def entropy_rewards(
        distance_scale: rewards.DistanceScale, distances: jax.Array
    ) -> jax.Array:
        """Returns `[N]` rewards of `[N, k]` distances."""
        reward = functools.partial(
            rewards.particle_entropy_reward,
            sigma=distance_scale.mean,
            c=config.distance_offset,
            clip=config.distance_clip,
        )
        return jax.vmap(reward)(distances)

    def td_errors(
        output_tm1: modules.Successor,
        a_tm1: jax.Array,
        phi_t: jax.Array,
        r_entropy_t: jax.Array,
        discount_t: jax.Array,
        output_t: modules.Successor,
        w: jax.Array,
    ) -> jax.Array:
        """Returns the errors of one target in the config's form, as one vector."""
        if has_exploration:
            error = two_headed_td_error(
                output_tm1.psi,
                output_tm1.exploration,
                a_tm1,
                phi_t,
                r_entropy_t,
                discount_t,
                output_t.psi,
                output_t.exploration,
                w,
                skill_weight=config.skill_weight,
                entropy_weight=config.entropy_weight,
            )
            return jnp.append(error.successor, error.exploration)
        if config.td_form == "vector":
            cumulant_t = (
                config.skill_weight * phi_t + config.entropy_weight * r_entropy_t * w
            )
            return losses.vector_td_error(
                output_tm1.psi, a_tm1, cumulant_t, discount_t, output_t.psi, w
            )
        r_t = rewards.intrinsic_reward(
            rewards.skill_reward(phi_t, w),
            r_entropy_t,
            skill_weight=config.skill_weight,
            entropy_weight=config.entropy_weight,
        )
        error = losses.scalar_td_error(
            output_tm1.psi, a_tm1, r_t, discount_t, output_t.psi, w
        )
        return error[None]

    def lay_out(windows: buffer.Window, **cuts: bool) -> Targets:
        lay_out_one = functools.partial(
            lay_out_targets,
            num_targets=m,
            n_steps=n,
            discount=config.discount,
            **cuts,
        )
        return jax.vmap(lay_out_one)(windows)

    def bootstrap_outputs(
        target_params: types.Params,
        windows: buffer.Window,
        targets: Targets,
        w: jax.Array,
    ) -> modules.Successor:
        """Predicts at the states that targets bootstrap from, for tasks `[B, m, D]`.

        Where the sum is cut, consecutive targets of a window bootstrap from the same
        state, which is encoded once. (They also have the same task: a return that ends
        where the task changes ends between targets of different tasks.)
        """
        num_windows, num_states = windows.action.shape
        place = targets.bootstrap  # [B, m]
        is_new = jnp.any(w[:, 1:] != w[:, :-1], axis=-1) | (
            place[:, 1:] != place[:, :-1]
        )
        is_new = jnp.pad(is_new, ((0, 0), (1, 0)), constant_values=True)
        observations = windows.observation.reshape(-1, *windows.observation.shape[2:])
        first_row = num_states * jnp.arange(num_windows, dtype=jnp.int32)
        row = (first_row[:, None] + place).reshape(-1)
        flat_w = w.reshape(-1, w.shape[-1])
        outputs = apply_where(
            lambda i: successor(target_params, observations[row[i]], flat_w[i]),
            is_new.reshape(-1),
        )
        number = jnp.arange(num_windows * m, dtype=jnp.int32).reshape(num_windows, m)
        source = jax.lax.cummax(jnp.where(is_new, number, 0), axis=1)
        return jax.tree.map(lambda x: x[source], outputs)

    def is_summed(targets: Targets) -> jax.Array:
        """Returns `[B, T - 1]` which reached states a valid target sums."""

        def of_window(target: Targets) -> jax.Array:
            is_used = (target.weight > 0.0) & (target.is_valid > 0.0)[:, None]
            never = jnp.zeros((m + n - 1,), bool)
            return never.at[target.rewarded - 1].max(is_used)

        return jax.vmap(of_window)(targets)

    def skill_reward_mean(phi: jax.Array, task: jax.Array, targets: Targets) -> _Mean:
        """Averages phi_t^T w over the states that valid targets sum."""

        def of_window(phi, task, target: Targets):
            reward = jax.vmap(jax.vmap(rewards.skill_reward, (0, None)))
            return reward(phi[target.rewarded - 1], task[:m])

        weight = targets.weight * targets.is_valid[..., None]
        return _mean_of_valid(jax.vmap(of_window)(phi, task, targets), weight)

    def pretrain_loss(
        params: types.Params,
        state: AgentState,
        windows: buffer.Window,
        particles: Particles,
        axis_name: str | None,
    ) -> tuple[
        jax.Array,
        tuple[rewards.DistanceScale, whitening.Whitening, dict[str, _Mean]],
    ]:
        """Returns a sum whose gradient is that of the device's own losses, not yet means.

        Of the value itself no use is made. Only the feature losses have a gradient with
        respect to the feature network, and only the TD losses with respect to psi's.
        """
        targets = lay_out(windows, cut_at_task_change=True, cut_at_life_loss=False)

        # Each reached state is encoded once, for the feature loss (which needs the
        # gradient of the first m alone), the skill reward and the entropy reward; those
        # that no target sums are not encoded.
        frozen = jax.lax.stop_gradient(params)
        num_windows, num_states = windows.action.shape
        is_used = is_summed(targets)
        observations = windows.observation.reshape(-1, *windows.observation.shape[2:])
        w = windows.task[:, :m]
        all_h, all_ids, last_w = _gather_from_devices(
            (particles.h, particles.id, w[-1]), axis_name
        )
        particle_h = all_h.reshape(-1, config.feature_dim)
        learned_h = raw_features(params, windows.observation[:, 1 : m + 1])
        first_row = num_states * jnp.arange(num_windows, dtype=jnp.int32)
        further = jnp.arange(m + 1, num_states, dtype=jnp.int32)
        row = (first_row[:, None] + further[None, :]).reshape(-1)
        further_h = apply_where(
            lambda i: raw_features(frozen, observations[row[i]]),
            is_used[:, m:].reshape(-1),
        )
        further_h = further_h.reshape(num_windows, -1, config.feature_dim)
        moments = frozen["whitening"]
        if config.whiten_features:
            moments = whitening.update_whitening(
                moments, particle_h, decay=config.scale_decay
            )
        is_reached = 1.0 - windows.is_first[:, 1 : m + 1].astype(jnp.float32)

        def feature_loss_of(h: jax.Array) -> tuple[jax.Array, Any]:
            learned = finished_features(moments, h)
            each = jax.vmap(jax.vmap(losses.feature_loss))(learned.phi, w)
            mean = _mean_of_valid(each, is_reached)
            return mean.total, (mean, learned)

        gradient_h, (feature_loss, learned) = jax.grad(feature_loss_of, has_aux=True)(
            jax.lax.stop_gradient(learned_h)
        )
        unlearned = finished_features(moments, further_h)
        particle_h = finished_features(moments, particle_h).h
        reached: modules.Features = jax.lax.stop_gradient(
            jax.tree.map(
                lambda x, y: jnp.concatenate([x, y], axis=1), learned, unlearned
            )
        )

        distances = distances_to_particles(
            reached.h.reshape(-1, reached.h.shape[-1]),
            windows.id[:, 1:].reshape(-1),
            is_used.reshape(-1),
            particle_h,
            all_ids.reshape(-1),
        )
        # What the losses need of all devices before their gradient is known: a second,
        # tiny reduction.
        distance_sums, common = _add_over_devices(
            (
                rewards.sum_distances(state.distance_scale, distances),
                _mean_of_all(gradient_h, num_axes=2),
            ),
            axis_name,
        )
        distance_scale = rewards.move_distance_scale(
            state.distance_scale, distance_sums, decay=config.scale_decay
        )
        r_entropy = entropy_rewards(distance_scale, distances)
        r_entropy = r_entropy.reshape(num_windows, num_states - 1)
        if config.whiten_features:
            # As if the mean over the batch were subtracted from the features with
            # gradient, as batch normalisation does: moving all of them alike changes
            # nothing once they are white. Else the noise of each batch would move them
            # all much faster than apart.
            gradient_h = gradient_h - common.divided()[None, None, :]

        def sum_cumulants(phi, r, target: Targets):
            """Sums `[T-1, D]` features and `[T-1]` rewards over each target's steps."""
            place = target.rewarded - 1  # `reached` starts at the window's state 1.
            phi_sum, discount = jax.vmap(losses.n_step_cumulant)(
                phi[place] * target.weight[..., None], target.discount
            )
            r_sum, _ = jax.vmap(losses.n_step_cumulant)(
                r[place] * target.weight, target.discount
            )
            return phi_sum, r_sum, discount

        phi_t, r_entropy_t, discount_t = jax.vmap(sum_cumulants)(
            config.value_unit * reached.phi, config.value_unit * r_entropy, targets
        )
        is_finite = jnp.isfinite(distances)

        # Of each state also for another's task, that of the window before it: does what
        # to do depend on the task?
        device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
        other_w = jnp.concatenate([last_w[device - 1][None], w[:-1]])
        both = jnp.stack([w, other_w], axis=2)
        outputs = successor_network.apply(
            params["successor"], windows.observation[:, :m], both
        )
        greedy = jnp.argmax(
            jax.vmap(jax.vmap(jax.vmap(behaviour_values)))(
                jax.lax.stop_gradient(outputs), both
            ),
            axis=-1,
        )
        output_tm1 = jax.tree.map(lambda x: x[:, :, 0], outputs)
        output_t = bootstrap_outputs(state.target_params, windows, targets, w)
        errors = jax.vmap(jax.vmap(td_errors))(
            output_tm1,
            windows.action[:, :m],
            phi_t,
            r_entropy_t,
            discount_t,
            output_t,
            w,
        )
        td_losses = 0.5 * jnp.sum(jnp.square(errors), axis=-1)
        td_loss = _mean_of_valid(td_losses, targets.is_valid)

        chosen_q = jax.vmap(jax.vmap(lambda o, a, w: losses.q_values(o.psi, w)[a]))(
            output_tm1, windows.action[:, :m], w
        )
        means = {
            "reward_skill": skill_reward_mean(reached.phi, windows.task, targets),
            "reward_entropy": _mean_of_valid(r_entropy, is_used.astype(jnp.float32)),
            "task_dependence": _mean_of_all(
                (greedy[..., 0] != greedy[..., 1]).astype(jnp.float32), num_axes=2
            ),
            "mean_phi": _mean_of_all(learned.phi, num_axes=2),
            "loss_feature": feature_loss,
            "loss_td": td_loss,
            "td_error": _mean_of_valid(
                jnp.sqrt(jnp.sum(jnp.square(errors), axis=-1)), targets.is_valid
            ),
            "q_value": _mean_of_valid(chosen_q, targets.is_valid),
            "knn_distance": _mean_of_valid(
                jnp.where(is_finite, distances, 0.0), is_finite.astype(jnp.float32)
            ),
        }
        to_features = jnp.sum(jax.lax.stop_gradient(gradient_h) * learned_h)
        return to_features + td_loss.total, (distance_scale, moments, means)

    def apply_gradients(
        state: AgentState,
        grads: types.Params,
        transform: optax.GradientTransformation,
    ) -> AgentState:
        # Optax raises a Python float to the power of an integer array.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        num_updates = state.num_updates + 1
        return state._replace(
            params=params,
            target_params=optax.periodic_update(
                params["successor"],
                state.target_params,
                num_updates,
                config.target_period,
            ),
            opt_state=opt_state,
            num_updates=num_updates,
        )

    def update(
        state: AgentState,
        windows: buffer.Window,
        particles: Particles,
        axis_name: str | None = None,
    ) -> tuple[AgentState, dict[str, jax.Array]]:
        grads, (distance_scale, moments, means) = jax.grad(pretrain_loss, has_aux=True)(
            state.params, state, windows, particles, axis_name
        )
        unlearned = grads.pop("whitening")  # zeros
        grads, means = _add_over_devices((grads, means), axis_name)
        grads = {
            "features": _divided(grads["features"], means["loss_feature"].count),
            "successor": _divided(grads["successor"], means["loss_td"].count),
            "whitening": unlearned,
        }
        metrics = {name: mean.divided() for name, mean in means.items()}
        metrics["cosine_phi_task"] = -metrics["loss_feature"]
        metrics["mean_phi_norm"] = optax.tree.norm(metrics.pop("mean_phi"))
        metrics["distance_scale"] = distance_scale.mean
        metrics["gradient_norm"] = optax.tree.norm(grads)
        state = apply_gradients(state, grads, optimizer)
        params = {**state.params, "whitening": moments}
        return state._replace(params=params, distance_scale=distance_scale), metrics

    def finetune_loss(
        successor_params: types.Params,
        state: AgentState,
        windows: buffer.Window,
        task: jax.Array,
        reward_scale: jax.Array,
    ) -> tuple[jax.Array, dict[str, _Mean]]:
        """Returns the sum of the device's own losses, not yet a mean."""
        targets = lay_out(
            windows,
            cut_at_task_change=False,
            cut_at_life_loss=finetune.cut_at_life_loss,
        )
        rewards_t = clip_rewards(windows.reward, finetune.reward_clip)
        rewards_t = (config.value_unit / reward_scale) * rewards_t

        def sum_rewards(r, target: Targets):
            return jax.vmap(losses.n_step_cumulant)(
                r[target.rewarded] * target.weight, target.discount
            )

        r_t, discount_t = jax.vmap(sum_rewards)(rewards_t, targets)
        w = jnp.broadcast_to(
            task[None, None, :], (*windows.action[:, :m].shape, config.feature_dim)
        )
        output_tm1 = successor(successor_params, windows.observation[:, :m], w)
        output_t = bootstrap_outputs(state.target_params, windows, targets, w)
        a_tm1 = windows.action[:, :m]
        errors = jax.vmap(jax.vmap(losses.scalar_td_error))(
            output_tm1.psi, a_tm1, r_t, discount_t, output_t.psi, w
        )
        loss = _mean_of_valid(0.5 * jnp.square(errors), targets.is_valid)
        chosen_q = jax.vmap(jax.vmap(lambda o, a, w: losses.q_values(o.psi, w)[a]))(
            output_tm1, a_tm1, w
        )
        means = {
            "loss_td": loss,
            "td_error": _mean_of_valid(jnp.abs(errors), targets.is_valid),
            "q_value": _mean_of_valid(chosen_q, targets.is_valid),
        }
        return loss.total, means

    def finetune_update(
        state: AgentState,
        windows: buffer.Window,
        task: jax.Array,
        reward_scale: jax.Array,
        axis_name: str | None = None,
    ) -> tuple[AgentState, dict[str, jax.Array]]:
        grads, means = jax.grad(finetune_loss, has_aux=True)(
            state.params["successor"], state, windows, task, reward_scale
        )
        grads, means = _add_over_devices((grads, means), axis_name)
        grads = _divided(grads, means["loss_td"].count)
        metrics = {name: mean.divided() for name, mean in means.items()}
        metrics["gradient_norm"] = optax.tree.norm(grads)
        grads = {
            "features": jax.tree.map(jnp.zeros_like, state.params["features"]),
            "successor": grads,
            "whitening": jax.tree.map(jnp.zeros_like, state.params["whitening"]),
        }
        return apply_gradients(state, grads, finetune_optimizer), metrics

    return Agent(
        init=init,
        init_finetune=init_finetune,
        init_actor=init_actor,
        act=act,
        features=features,
        calibrate=calibrate,
        particles=particles_of,
        update=update,
        finetune_update=finetune_update,
    )


def _task_values(output: modules.Successor, w: jax.Array) -> jax.Array:
    """Values `[A]` of one state for the task alone."""
    return losses.q_values(output.psi, w)
