"""APS: explore by particle entropy, learn successor features of random tasks, adapt.

Liu & Abbeel 2021, https://arxiv.org/abs/2108.13956. VISR (the skill reward alone) and
`entropy` (the entropy reward alone) are the same agent with other weights. Letters: `E`
environments, `B` windows, `T = m + n` states of a window, `m` its TD targets, `n` steps
of a return, `P` particles, `A` actions, `D` feature dimension.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax.agents import base
from aps_jax.agents.base import AgentState, Batch, Observation, take_states
from aps_jax.networks import modules
from aps_jax.ops import acting, knn, losses, rewards, sphere, tasks, whitening
from aps_jax.ops.returns import masked_mean
from aps_jax.options import option
from aps_jax.replay import frames
from aps_jax.replay.buffer import Window
from aps_jax.types import Metric, ObservationSpec, Params, PRNGKey

TD_FORMS = ("off_policy", "split", "vector", "scalar")

METRICS = (
    Metric("reward_skill", "-", "phi(s_t)^T w over the states that targets sum."),
    Metric(
        "reward_entropy", "-", "log(c + mean scaled distance to k nearest particles)."
    ),
    Metric("loss_feature", "-", "-phi(s_t)^T w_tm1: the skill's likelihood."),
    Metric(
        "replayed_cosine",
        "-",
        "Cosine between phi(s_t) and the task under which s_t was reached, over the "
        "replay that phi is trained on.",
    ),
    Metric(
        "task_dependence",
        "-",
        "Share of states in which the greedy action of behaviour is another for "
        "another state's task; 0 if the task does not matter.",
    ),
    Metric(
        "mean_phi_norm",
        "-",
        "Norm of the mean of phi over a batch; 1 if all states have the same features.",
    ),
    Metric("knn_distance", "feature units", "Mean distance to the k nearest."),
    Metric(
        "distance_scale",
        "feature units",
        "Running mean of those distances, by which they are divided.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Config(base.Config):
    """Options of APS."""

    feature_dim: int = option(
        5, "Dimension D of features, task vectors and successors.", low=1, high=4096
    )
    skill_weight: float = option(
        1.0, "Weight of phi(s)^T w in the intrinsic reward.", low=0.0
    )
    entropy_weight: float = option(
        1.0, "Weight of the particle entropy in the intrinsic reward.", low=0.0
    )
    td_form: str = option(
        "off_policy",
        "Target of the successor features: off_policy (phi and exploration apart, phi "
        "greedy for the task alone), split (greedy for both), vector, or scalar.",
        choices=TD_FORMS,
    )
    unit_values: bool = option(
        True,
        "Whether cumulants are multiplied by 1 - discount, so that values have the "
        "size of a mean reward; no greedy action changes.",
    )
    whiten_features: bool = option(
        True,
        "Whether features are made of mean 0 and covariance 1 over the replay before "
        "they are projected onto the sphere.",
    )
    num_neighbors: int = option(
        12, "Nearest particles k that measure how new a state is.", low=1
    )
    num_particles: int = option(
        256, "Replayed states that serve as particles in an update.", low=2
    )
    distance_offset: float = option(
        1.0, "Constant c inside the logarithm of the entropy reward.", low=1e-6
    )
    distance_clip: float = option(
        1e-4, "Scaled distance under which two states count as one.", low=0.0
    )
    scale_decay: float = option(
        0.99,
        "Decay per update of the running mean distance; 1 never forgets.",
        low=0.0,
        high=1.0,
    )
    task_steps: int = option(
        10, "Agent steps for which an environment keeps its task.", low=1
    )
    further_tasks: int = option(
        0,
        "Other windows' tasks for which every target teaches psi too, beside the one "
        "that was obeyed.",
        low=0,
        high=64,
    )
    permuted: str = option(
        "none",
        "For controls: what of a replayed window is another window's, its entropy "
        "reward or its task.",
        choices=("none", "entropy", "task"),
    )
    gpi_tasks: int = option(
        10,
        "Further task vectors over which zero-shot acting maximises (generalised "
        "policy improvement); 0 for none.",
        low=0,
        high=4096,
    )
    gpi_concentration: float = option(
        5.0,
        "Concentration kappa of those task vectors around the task; 0 is uniform.",
        low=0.0,
    )
    feature_learning_rate: float = option(
        1e-4, "Adam's rate for the feature network.", low=0.0
    )
    pretrain_epsilon: float = option(
        0.05,
        "Probability of a random action while pretraining and inferring.",
        low=0.0,
        high=1.0,
    )
    finetune_learning_rate: float = option(
        1e-4, "Adam's rate for the successor network while fine-tuning.", low=0.0
    )
    finetune_batch_size: int = option(
        32, "TD targets in one update of fine-tuning.", low=1
    )
    ridge: float = option(
        1.0,
        "Ridge penalty of task inference, added to the diagonal of sum phi phi^T.",
        low=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_neighbors >= self.num_particles:
            raise ValueError(
                "num_neighbors must be less than num_particles, because a state is "
                f"no neighbour of itself; got {self.num_neighbors} and "
                f"{self.num_particles}."
            )
        num_windows = self.batch_size // self.window_targets
        if self.further_tasks and self.further_tasks >= num_windows:
            raise ValueError(
                "further_tasks must be less than batch_size / window_targets, the "
                f"windows of an update; got {self.further_tasks} and {num_windows}."
            )
        if self.finetune_batch_size % self.window_targets:
            raise ValueError(
                "finetune_batch_size must be a multiple of window_targets, got "
                f"{self.finetune_batch_size} and {self.window_targets}."
            )
        if self.unit_values and self.discount == 1.0:
            raise ValueError("unit_values needs a discount below 1, got 1.")
        if self.skill_weight == 0.0 and self.entropy_weight == 0.0:
            raise ValueError("skill_weight and entropy_weight must not both be 0.")

    @property
    def has_exploration_value(self) -> bool:
        """Whether a value of the entropy reward is learned apart from psi."""
        return self.td_form in ("off_policy", "split")

    @property
    def value_unit(self) -> float:
        """What cumulants are multiplied by before values are learned from them."""
        return 1.0 - self.discount if self.unit_values else 1.0

    def sharded_sizes(self) -> dict[str, int]:
        """Returns what every device gets an equal part of, by the option's name."""
        return super().sharded_sizes() | {
            "num_particles": self.num_particles,
            "finetune_batch_size / window_targets (replayed windows)": (
                self.finetune_batch_size // self.window_targets
            ),
        }


class Stats(NamedTuple):
    """What of the agent no gradient trains."""

    whitening: whitening.Whitening  # running moments of h, as the updates see them
    calibrated: whitening.Whitening  # moments over the replay, for use after learning
    distance_scale: rewards.DistanceScale  # running mean distance of the kNN reward
    task: jax.Array  # [D] float32, the inferred unit task vector
    reward_scale: jax.Array  # [] float32, turns psi^T task into units of the reward
    unit: jax.Array  # [] float32, of the values that are learned from reward


class Memory(NamedTuple):
    """What acting remembers of each environment."""

    task: jax.Array  # [E, D] float32, unit vectors
    steps_left: jax.Array  # [E] int32, agent steps until the task is redrawn
    candidates: jax.Array  # [E, 1 + K, D] float32, tasks that GPI maximises over


class Particles(NamedTuple):
    """What the entropy reward needs of replayed states."""

    h: jax.Array  # [P, D] float32, output of the feature encoder, not whitened
    id: jax.Array  # [P] int32, of the steps


class Networks(NamedTuple):
    """The networks bound to a config: functions of their parameters."""

    init: Callable[[PRNGKey], dict[str, Params]]
    h: Callable[[Params, jax.Array], jax.Array]  # observation [..., H, W, C]
    successor: Callable[[Params, jax.Array, jax.Array], modules.Successor]


def make(config: Config, num_actions: int, observation: ObservationSpec) -> base.Agent:
    """Binds APS to a config; see `base.Agent`."""
    networks = _make_networks(config, num_actions, observation)
    optimizer, finetune_optimizer = (
        optax.partition(
            {"features": features, "successor": base.adam(config, rate)},
            {"features": "features", "successor": "successor"},
        )
        for features, rate in (
            (
                _in_own_unit(base.adam(config, config.feature_learning_rate)),
                config.learning_rate,
            ),
            (optax.set_to_zero(), config.finetune_learning_rate),
        )
    )

    def init(key: PRNGKey) -> AgentState:
        params = networks.init(key)
        stats = Stats(
            whitening=whitening.init_whitening(config.feature_dim),
            calibrated=whitening.init_whitening(config.feature_dim),
            distance_scale=rewards.init_distance_scale(),
            task=jnp.zeros((config.feature_dim,)),
            reward_scale=jnp.float32(1.0),
            unit=jnp.float32(config.value_unit),
        )
        return AgentState(
            params=params,
            # A copy, not the same arrays: donated buffers must not be aliased.
            target_params=jax.tree.map(jnp.copy, params["successor"]),
            opt_state=optimizer.init(params),
            stats=stats,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def start_finetune(state: AgentState) -> AgentState:
        return state._replace(
            opt_state=finetune_optimizer.init(state.params),
            num_updates=jnp.zeros((), jnp.int32),
        )

    def features(state: AgentState, windows: Window) -> modules.Features:
        """Returns calibrated features of windows of one state, `[N, D]`."""
        h = networks.h(state.params["features"], windows.observation[:, 0])
        return _finish_features(state.stats.calibrated, h)

    def calibrate(state: AgentState, windows: Window) -> AgentState:
        """Measures the features' moments: those of the updates are a step behind."""
        if not config.whiten_features:
            return state
        h = networks.h(state.params["features"], windows.observation[:, 0])
        moments = whitening.init_whitening(config.feature_dim)
        moments = whitening.update_whitening(moments, h)
        return state._replace(stats=state.stats._replace(calibrated=moments))

    def embed(state: AgentState, windows: Window) -> dict[str, jax.Array]:
        return {
            "phi": features(state, windows).phi,
            "task": windows.extras["task"][:, 0],
        }

    def predict(state: AgentState, windows: Window) -> jax.Array:
        task = windows.extras["task"][:, 0]
        output = _for_one_task(
            networks, state.params["successor"], windows.observation[:, 0], task
        )
        values = jax.vmap(losses.q_values)(output.psi, task)
        return jnp.max(values, axis=-1) / config.value_unit

    def adapt(
        key: PRNGKey, state: AgentState, rollouts: base.Rollouts | None
    ) -> tuple[AgentState, dict[str, Any]]:
        """Regresses rewards on features (APS, section 4.4)."""
        fallback: Any = np.asarray(jax.random.normal(key, (config.feature_dim,)))
        phi: Any = np.zeros((1, config.feature_dim))
        r_t: Any = np.zeros(1)
        mask = np.zeros(1, bool)
        if rollouts is not None:
            phi = rollouts.encode(lambda s, w: features(s, w).phi, state)
            r_t = base.clip_rewards(rollouts.reward, config.reward_clip)
            mask = ~rollouts.is_first
        found = tasks.regress_task(
            phi, r_t, mask, fallback_task=fallback, ridge=config.ridge
        )
        # An untrained psi is in no unit, so it learns in the reward's own.
        is_scratch = rollouts is None
        scale = config.value_unit if is_scratch else found.scale
        unit = 1.0 if is_scratch else config.value_unit
        stats = state.stats._replace(
            task=np.asarray(found.task, np.float32),
            reward_scale=np.asarray(scale, np.float32),
            unit=np.asarray(unit, np.float32),
        )
        facts = {
            "task": [float(value) for value in found.task],
            "scale": float(scale),
            "intercept": float(found.intercept),
            "r_squared": float(found.r_squared),
            "num_samples": int(found.num_samples),
            "num_nonzero": int(found.num_nonzero),
            "is_fallback": bool(found.is_fallback),
        }
        facts["summary"] = _summary(facts, is_scratch=is_scratch)
        return state._replace(stats=stats), facts

    def policy(choose: "Chooser", epsilon: float, hold: int | None) -> base.Policy:
        return _make_policy(config, choose, observation, epsilon=epsilon, hold=hold)

    inferred = functools.partial(policy, hold=None)
    return base.Agent(
        init=init,
        pretrain=base.Phase(
            policy(
                _make_exploring(config, networks),
                config.pretrain_epsilon,
                config.task_steps,
            ),
            _make_pretrain_learner(config, networks, optimizer),
        ),
        finetune=base.Phase(
            inferred(_make_greedy(networks), config.finetune_epsilon),
            _make_finetune_learner(config, networks, finetune_optimizer),
        ),
        play=lambda epsilon: inferred(_make_greedy(networks), epsilon),
        play_adapted=lambda epsilon: inferred(_make_gpi(config, networks), epsilon),
        play_skills=lambda epsilon: policy(
            _make_greedy(networks), epsilon, jnp.iinfo(jnp.int32).max
        ),
        calibrate=calibrate,
        start_finetune=start_finetune,
        adapt=adapt,
        embed=embed,
        predict=predict,
    )


def _in_own_unit(
    transform: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Keeps from the features' optimiser in which unit values are learned."""

    def update(updates, state, params=None, **others):
        del others
        return transform.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _make_networks(
    config: Config, num_actions: int, shown: ObservationSpec
) -> Networks:
    feature_network: Any = modules.FeatureNetwork(
        base.make_encoder(config, shown), config.feature_dim
    )
    successor_network: Any = modules.SuccessorNetwork(
        base.make_encoder(config, shown),
        num_actions,
        config.feature_dim,
        hidden=config.hidden_units,
        exploration_head=config.has_exploration_value,
    )

    def init(key: PRNGKey) -> dict[str, Params]:
        features_key, successor_key = jax.random.split(key)
        observation = frames.init_stack(shown, 1)
        task = jnp.zeros((1, 1, config.feature_dim))
        return {
            "features": feature_network.init(features_key, observation),
            "successor": successor_network.init(successor_key, observation, task),
        }

    return Networks(
        init=init,
        h=lambda params, observation: feature_network.apply(params, observation).h,
        successor=successor_network.apply,
    )


def _finish_features(moments: whitening.Whitening, h: jax.Array) -> modules.Features:
    h = whitening.whiten(moments, h)
    return modules.Features(h=h, phi=sphere.normalize(h))


def _summary(facts: dict[str, Any], *, is_scratch: bool) -> str:
    if is_scratch:
        return "Nothing was pretrained: psi^T w learns from reward for a random task."
    seen = f"{facts['num_samples']:,} rewards, {facts['num_nonzero']:,} of them not 0"
    if facts["is_fallback"]:
        return f"No task could be inferred from {seen}: a random task is used."
    return (
        f"Task inferred from {seen}: R^2 {facts['r_squared']:.3f}, norm of w "
        f"{facts['scale']:.3g}."
    )


# ---------------------------------------------------------------------------- acting

# state, observation, memory, key -> memory, action values [E, A]
Chooser = Callable[[AgentState, Observation, Memory, PRNGKey], tuple[Memory, jax.Array]]


def _make_policy(
    config: Config,
    choose: Chooser,
    shown: ObservationSpec,
    *,
    epsilon: float,
    hold: int | None,
) -> base.Policy:
    """Makes an epsilon-greedy policy for a task per environment.

    Args:
      config: The agent's options.
      choose: Values actions.
      shown: What it sees.
      epsilon: Probability of a random action.
      hold: Agent steps for which a random task is kept, or until the episode ends; the
        environments redraw theirs at different steps. None follows the inferred task.
    """

    def init(num_envs: int) -> Memory:
        # Less than 0 by as many steps as an environment redraws before the others.
        stagger = np.arange(num_envs) * (hold or 0) // num_envs
        shape = (num_envs, 1 + config.gpi_tasks, config.feature_dim)
        return Memory(
            task=jnp.zeros((num_envs, config.feature_dim)),
            steps_left=-jnp.asarray(stagger, jnp.int32),
            candidates=jnp.zeros(shape),
        )

    def act(
        state: AgentState, memory: Memory, observation: Observation, key: PRNGKey
    ) -> tuple[Memory, base.Decision]:
        task_key, choice_key, action_key = jax.random.split(key, 3)
        if hold is None:
            task = jnp.broadcast_to(state.stats.task[None, :], memory.task.shape)
            memory = memory._replace(task=task)
        else:
            num_envs = memory.task.shape[0]
            is_due = (memory.steps_left <= 0) | observation.is_first
            drawn = sphere.sample_uniform(task_key, (num_envs,), config.feature_dim)
            first_hold = hold + jnp.minimum(memory.steps_left, 0)
            memory = memory._replace(
                task=jnp.where(is_due[:, None], drawn, memory.task),
                steps_left=jnp.where(is_due, first_hold, memory.steps_left) - 1,
            )
        memory, values = choose(state, observation, memory, choice_key)
        action = acting.epsilon_greedy(action_key, values, epsilon)
        return memory, base.Decision(action, {"task": memory.task})

    return base.Policy(init, act, shown)


def _for_one_task(
    networks: Networks, params: Params, observation: jax.Array, task: jax.Array
) -> modules.Successor:
    """Predicts for one task per state, without the axis of tasks."""
    output = networks.successor(params, observation, task[..., None, :])
    return jax.tree.map(lambda x: jnp.squeeze(x, axis=task.ndim - 1), output)


def _behaviour_values(
    config: Config, output: modules.Successor, w: jax.Array
) -> jax.Array:
    """Values `[A]` of one state that include the exploration still to come."""
    q = losses.q_values(output.psi, w)
    if output.exploration is None:
        return q
    return config.skill_weight * q + config.entropy_weight * output.exploration


def _make_exploring(config: Config, networks: Networks) -> Chooser:
    value = functools.partial(_behaviour_values, config)

    def choose(state, observation, memory, key):
        del key
        output = _for_one_task(
            networks, state.params["successor"], observation.frames, memory.task
        )
        return memory, jax.vmap(value)(output, memory.task)

    return choose


def _make_greedy(networks: Networks) -> Chooser:
    def choose(state, observation, memory, key):
        del key
        output = _for_one_task(
            networks, state.params["successor"], observation.frames, memory.task
        )
        return memory, jax.vmap(losses.q_values)(output.psi, memory.task)

    return choose


def _make_gpi(config: Config, networks: Networks) -> Chooser:
    """Makes generalised policy improvement over tasks around the environment's own.

    The tasks are drawn at the start of an episode, and held for it.
    """
    draw = functools.partial(
        tasks.candidate_tasks, num=config.gpi_tasks, kappa=config.gpi_concentration
    )

    def choose(state, observation, memory, key):
        keys = jax.random.split(key, memory.task.shape[0])
        drawn = jax.vmap(draw)(keys, memory.task)
        is_first = observation.is_first[:, None, None]
        candidates = jnp.where(is_first, drawn, memory.candidates)
        output = networks.successor(
            state.params["successor"], observation.frames, candidates
        )
        values = jax.vmap(tasks.gpi_action_values)(output.psi, memory.task)
        return memory._replace(candidates=candidates), values

    return choose


# -------------------------------------------------------------------------- learning


def _make_pretrain_learner(
    config: Config, networks: Networks, optimizer: optax.GradientTransformation
) -> base.Learner:
    """Makes the reward-free update (APS, Alg. 1)."""
    m = config.window_targets

    def loss(
        params: Mapping[str, Params], state: AgentState, batch: Batch, moments: Any
    ) -> tuple[jax.Array, tuple[rewards.DistanceScale, dict[str, jax.Array]]]:
        """Returns both losses' sum: phi learns from the first, psi from the second."""
        windows = batch.windows
        task = windows.extras["task"]
        if config.permuted == "task":
            task = jnp.roll(task, 1, axis=0)
        w = task[:, :m]
        targets = base.window_targets(config, windows, windows.terminated, task)
        used = targets.weight * targets.is_valid[..., None]  # [B, m, n]
        is_used = jax.vmap(  # [B, T - 1], whether a target sums the state
            lambda i, x: jnp.zeros(config.window_states - 1, bool).at[i].max(x > 0)
        )(targets.rewarded - 1, used)

        # The feature loss needs the gradient of the first m states reached alone.
        h = networks.h(params["features"], windows.observation[:, 1 : m + 1])
        if config.whiten_features:
            # The gradient that moves all features alike is taken out, as in batch
            # normalisation: once they are white, it changes nothing but adds noise.
            mean_h = jnp.mean(h, axis=(0, 1))
            h = h - (mean_h - jax.lax.stop_gradient(mean_h))[None, None, :]
        further = networks.h(
            jax.lax.stop_gradient(params["features"]), windows.observation[:, m + 1 :]
        )
        reached = _finish_features(moments, jnp.concatenate([h, further], axis=1))
        loss_feature = masked_mean(
            jax.vmap(jax.vmap(losses.feature_loss))(reached.phi[:, :m], w),
            1.0 - windows.is_first[:, 1 : m + 1].astype(jnp.float32),
        )
        reached = jax.lax.stop_gradient(reached)

        distances, distance_scale, r_entropy = entropy_rewards(
            state.stats.distance_scale, batch, moments, reached.h, is_used
        )
        if config.permuted == "entropy":
            r_entropy = jnp.roll(r_entropy, 1, axis=0)
        phi_t, discount_t = base.sum_steps(config.value_unit * reached.phi, targets)
        r_t, _ = base.sum_steps(config.value_unit * r_entropy, targets)

        # Each state also for other windows' tasks: psi is off-policy, and may learn
        # from what another task did. The first also tells whether the task matters.
        num_taught = 1 + config.further_tasks
        rolled = [jnp.roll(w, i, axis=0) for i in range(max(2, num_taught))]
        every = jnp.stack(rolled, axis=2)  # [B, m, K, D]
        outputs = networks.successor(
            params["successor"], windows.observation[:, :m], every
        )
        taught = every[:, :, :num_taught]
        output_t = networks.successor(
            state.target_params,
            take_states(windows.observation, targets.bootstrap),
            taught,
        )
        a_tm1 = windows.action[:, :m]
        td_errors = jax.vmap(
            functools.partial(_td_errors, config), in_axes=(0, *4 * (None,), 0, 0)
        )
        errors = jax.vmap(jax.vmap(td_errors))(
            jax.tree.map(lambda x: x[:, :, :num_taught], outputs),
            *(a_tm1, phi_t, r_t, discount_t, output_t, taught),
        )
        squares = jnp.sum(jnp.square(errors), axis=-1)  # [B, m, K]
        loss_td = masked_mean(0.5 * jnp.mean(squares, axis=-1), targets.is_valid)
        # The metrics are of the task that was obeyed.
        own_error = jnp.sqrt(squares[:, :, 0])
        own_output = jax.tree.map(lambda x: x[:, :, 0], outputs)

        values = jax.vmap(
            jax.vmap(jax.vmap(functools.partial(_behaviour_values, config)))
        )
        greedy = jnp.argmax(values(jax.lax.stop_gradient(outputs), every), axis=-1)
        cosines = jnp.sum(
            take_states(reached.phi, targets.rewarded - 1) * w[:, :, None, :], axis=-1
        )
        exists = jnp.isfinite(distances)
        metrics = {
            "loss_feature": loss_feature,
            "loss_td": loss_td,
            "replayed_cosine": -loss_feature,
            "reward_skill": masked_mean(cosines, used),
            "reward_entropy": masked_mean(r_entropy, is_used.astype(jnp.float32)),
            "task_dependence": jnp.mean(
                (greedy[..., 0] != greedy[..., 1]).astype(jnp.float32)
            ),
            "mean_phi_norm": optax.tree.norm(jnp.mean(reached.phi[:, :m], axis=(0, 1))),
            "td_error": masked_mean(own_error, targets.is_valid),
            "q_value": masked_mean(_chosen_q(own_output, a_tm1, w), targets.is_valid),
            "knn_distance": masked_mean(
                jnp.where(exists, distances, 0.0), exists.astype(jnp.float32)
            ),
            "distance_scale": distance_scale.mean,
        }
        return loss_feature + loss_td, (distance_scale, metrics)

    def entropy_rewards(
        scale: rewards.DistanceScale,
        batch: Batch,
        moments: whitening.Whitening,
        h: jax.Array,
        is_used: jax.Array,
    ) -> tuple[jax.Array, rewards.DistanceScale, jax.Array]:
        """Returns `[N, k]` distances, their running mean, and `[B, T - 1]` rewards."""
        distances = knn.knn_distances(
            h.reshape(-1, config.feature_dim),
            whitening.whiten(moments, batch.particles.h),
            k=config.num_neighbors,
            query_ids=batch.windows.id[:, 1:].reshape(-1),
            particle_ids=batch.particles.id,
        )
        # +inf stands for no neighbour: states that no target sums do not count.
        distances = jnp.where(is_used.reshape(-1)[:, None], distances, jnp.inf)
        scale = rewards.update_distance_scale(
            scale, distances, decay=config.scale_decay
        )
        reward = functools.partial(
            rewards.particle_entropy_reward,
            sigma=scale.mean,
            c=config.distance_offset,
            clip=config.distance_clip,
        )
        return distances, scale, jax.vmap(reward)(distances).reshape(is_used.shape)

    def update(state: AgentState, batch: Batch, key: PRNGKey) -> base.Updated:
        del key
        moments = state.stats.whitening
        if config.whiten_features:
            moments = whitening.update_whitening(
                moments, batch.particles.h, decay=config.scale_decay
            )
        grads, (distance_scale, metrics) = jax.grad(loss, has_aux=True)(
            state.params, state, batch, moments
        )
        metrics["gradient_norm"] = base.norm(grads)
        state = base.apply_gradients(
            optimizer,
            grads,
            state,
            target="successor",
            target_period=config.target_period,
            unit=config.value_unit,
        )
        stats = state.stats._replace(whitening=moments, distance_scale=distance_scale)
        return base.Updated(state._replace(stats=stats), metrics)

    def encode(state: AgentState, windows: Window) -> Particles:
        h = networks.h(state.params["features"], windows.observation[:, 0])
        return Particles(h, windows.id[:, 0])

    spec = base.BatchSpec(
        num_samples=config.batch_size,
        num_windows=config.batch_size // m,
        num_states=config.window_states,
        num_particles=config.num_particles,
    )
    return base.Learner(spec, update, base.LEARNING + METRICS, encode)


def _td_errors(
    config: Config,
    output_tm1: modules.Successor,
    a_tm1: jax.Array,
    phi_t: jax.Array,
    r_entropy_t: jax.Array,
    discount_t: jax.Array,
    output_t: modules.Successor,
    w: jax.Array,
) -> jax.Array:
    """Returns the errors of one target in the config's form, as one vector."""
    weights = {
        "skill_weight": config.skill_weight,
        "entropy_weight": config.entropy_weight,
    }
    if output_tm1.exploration is not None and output_t.exploration is not None:
        form = {
            "off_policy": losses.off_policy_td_error,
            "split": losses.split_td_error,
        }[config.td_form]
        both = form(
            output_tm1.psi,
            output_tm1.exploration,
            a_tm1,
            phi_t,
            r_entropy_t,
            discount_t,
            output_t.psi,
            output_t.exploration,
            w,
            **weights,
        )
        return jnp.append(both.successor, both.exploration)
    if config.td_form == "vector":
        cumulant_t = (
            config.skill_weight * phi_t + config.entropy_weight * r_entropy_t * w
        )
        return losses.vector_td_error(
            output_tm1.psi, a_tm1, cumulant_t, discount_t, output_t.psi, w
        )
    r_t = rewards.intrinsic_reward(
        rewards.skill_reward(phi_t, w), r_entropy_t, **weights
    )
    error = losses.scalar_td_error(
        output_tm1.psi, a_tm1, r_t, discount_t, output_t.psi, w
    )
    return error[None]


def _chosen_q(output: modules.Successor, action: jax.Array, w: jax.Array) -> jax.Array:
    """Returns `[B, m]` values of the actions taken."""
    return jax.vmap(jax.vmap(lambda o, a, w: losses.q_values(o.psi, w)[a]))(
        output, action, w
    )


def _make_finetune_learner(
    config: Config, networks: Networks, optimizer: optax.GradientTransformation
) -> base.Learner:
    """Makes the update from the game's reward for the inferred task; phi is frozen.

    `psi^T w` learns the value of `value_unit / reward_scale` times the reward: with the
    norm of the inferred w as the scale, that is the unit of the pretrained psi.
    """
    m = config.window_targets

    def loss(
        params: Mapping[str, Params], state: AgentState, windows: Window
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = base.reward_targets(config, windows)
        reward = base.clip_rewards(windows.reward, config.reward_clip)
        unit = config.value_unit / state.stats.reward_scale
        r_t, discount_t = base.sum_steps(unit * reward[:, 1:], targets)
        a_tm1 = windows.action[:, :m]
        w = jnp.broadcast_to(
            state.stats.task[None, None, :], (*a_tm1.shape, config.feature_dim)
        )
        output_tm1 = _for_one_task(
            networks, params["successor"], windows.observation[:, :m], w
        )
        output_t = _for_one_task(
            networks,
            state.target_params,
            take_states(windows.observation, targets.bootstrap),
            w,
        )
        errors = jax.vmap(jax.vmap(losses.scalar_td_error))(
            output_tm1.psi, a_tm1, r_t, discount_t, output_t.psi, w
        )
        loss_td = masked_mean(0.5 * jnp.square(errors), targets.is_valid)
        return loss_td, {
            "loss_td": loss_td,
            "td_error": masked_mean(jnp.abs(errors), targets.is_valid),
            "q_value": masked_mean(_chosen_q(output_tm1, a_tm1, w), targets.is_valid),
        }

    def update(state: AgentState, batch: Batch, key: PRNGKey) -> base.Updated:
        del key
        grads, metrics = jax.grad(loss, has_aux=True)(
            state.params, state, batch.windows
        )
        metrics["gradient_norm"] = base.norm(grads)
        state = base.apply_gradients(
            optimizer,
            grads,
            state,
            target="successor",
            target_period=config.target_period,
            unit=state.stats.unit,
        )
        return base.Updated(state, metrics)

    spec = base.BatchSpec(
        num_samples=config.finetune_batch_size,
        num_windows=config.finetune_batch_size // m,
        num_states=config.window_states,
    )
    return base.Learner(spec, update, base.LEARNING)


# What is set by a preset of the run, in this agent's own options.
# Without both of these tasks are not obeyed in Ms. Pac-Man (docs/learning.md). A short
# discount makes the values of actions differ by more than they err. Taught for its own
# task alone, psi may know the task by the frame, and need not look at w.
_OBEYED = {"discount": 0.95, "further_tasks": 1}
_WORLD = {
    **base.WORLD_VALUES,
    "hidden_units": 128,
    "num_particles": 128,
    "task_steps": 40,
    "feature_learning_rate": 5e-4,
    "finetune_learning_rate": 5e-4,
    "window_targets": 4,
}
PRESETS = {
    "smoke": {
        "encoder": "small",
        "hidden_units": 16,
        "num_particles": 8,
        "num_neighbors": 3,
        "n_steps": 3,
        "gpi_tasks": 2,
        "batch_size": 8,
        "finetune_batch_size": 8,
        "window_targets": 2,
        "target_period": 5,
    },
    "cpu": {
        **_OBEYED,
        "encoder": "small",
        "hidden_units": 128,
        "num_particles": 64,
        "task_steps": 40,
        "learning_rate": 5e-4,
        "feature_learning_rate": 5e-4,
        "batch_size": 64,
        "window_targets": 8,
        "finetune_learning_rate": 5e-4,
    },
    "gpu": {
        **_OBEYED,
        "encoder": "nature",
        "bfloat16": True,
        "num_particles": 1024,
        "batch_size": 1024,
        "window_targets": 4,
        "learning_rate": 3e-4,
        "feature_learning_rate": 3e-4,
    },
    "minatar": {"encoder": "minatar", **_WORLD, **_OBEYED},
    # Chosen on four_rooms, seeds 100 and 101; further tasks change nothing there.
    "maze": {
        "encoder": "mlp",
        "feature_dim": 20,
        **_WORLD,
        "n_steps": 5,
        "discount": 0.95,
        "pretrain_epsilon": 0.2,
    },
}


def _entry(about: str, **weights: float) -> base.Entry:
    return base.Entry(
        make=make,
        config=Config,
        about=about,
        options=weights,
        presets=PRESETS,
        transferred=(
            *("encoder", "hidden_units", "feature_dim", "td_form", "unit_values"),
        ),
    )


# (APS, section 4.) VISR is the skill half alone.
APS = _entry("skills and exploration: APS", skill_weight=1.0, entropy_weight=1.0)
VISR = _entry("skills alone: VISR", skill_weight=1.0, entropy_weight=0.0)
ENTROPY = _entry("exploration alone", skill_weight=0.0, entropy_weight=1.0)
