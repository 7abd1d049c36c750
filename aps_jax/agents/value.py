"""Value agents of Atari-100k, one backbone: Rainbow's parts and what came after them.

DER, DrQ, CURL, SPR and SR-SPR are dictionaries of its options, at the end of the file;
docs/value_agents.md has the sources. Letters: `B` windows, `T` states of a window, `E`
environments, `A` actions, `N` atoms.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rlax

from aps_jax.agents import auxiliary as auxiliary_lib
from aps_jax.agents import base
from aps_jax.agents.base import AgentState, Batch, Decision, Observation, take_states
from aps_jax.networks import value_heads
from aps_jax.ops import acting, augment
from aps_jax.ops.returns import masked_mean
from aps_jax.options import option
from aps_jax.replay import frames
from aps_jax.replay.buffer import Window
from aps_jax.types import Metric, ObservationSpec, Params, PRNGKey

AUXILIARIES = ("none", "curl", "curl_published", "spr")
PRIORITIES = ("cross_entropy", "kl", "total")

METRICS = (
    Metric(
        "loss_value",
        "-",
        "Loss of the values: Huber's, or the cross-entropy of their distribution.",
    ),
    *base.LEARNING[1:],
    Metric("loss_auxiliary", "-", "Loss of CURL or SPR before its weight; 0 for none."),
)


@dataclasses.dataclass(frozen=True)
class Config(base.Config):
    """Options of the value agents."""

    encoder: str = option(
        "small_valid",
        "Convolutional encoder of the networks.",
        choices=tuple(name for name in base.ENCODERS if name != "mlp"),
    )
    window_targets: int = option(
        1, "Consecutive TD targets of one replayed window.", low=1, high=1
    )
    atoms: int = option(
        51, "Atoms of the distribution of returns; 1 learns the mean.", low=1, high=4096
    )
    value_min: float = option(-10.0, "The least atom, in units of the reward.")
    value_max: float = option(10.0, "The greatest atom, in units of the reward.")
    dueling: str = option(
        "apart",
        "Whether values and advantages are added: none, from one hidden layer (last), "
        "or from two (apart).",
        choices=value_heads.DUELING,
    )
    noisy_sigma: float = option(
        0.0,
        "Initial scale of the noise in the layers of the head; 0 for none.",
        low=0.0,
    )
    head_gradient_scale: float = option(
        1.0,
        "Factor of the gradient that the head sends into the encoder.",
        low=0.0,
        high=1.0,
    )
    priority_exponent: float = option(
        0.0, "Power alpha of replay's priorities; 0 replays uniformly.", low=0.0
    )
    priority: str = option(
        "cross_entropy",
        "What a window's priority is: the cross-entropy or the divergence (kl) of its "
        "target, or the whole loss (total).",
        choices=PRIORITIES,
    )
    importance_start: float = option(
        0.4, "Power beta of the importance weights at first.", low=0.0
    )
    importance_end: float = option(1.0, "The same after importance_updates.", low=0.0)
    importance_updates: int = option(
        98_400, "Updates over which beta goes from the first to the last.", low=1
    )
    target_tau: float = option(
        1.0,
        "Rate at which the target network follows, every target_period updates; 1 "
        "copies.",
        low=0.0,
        high=1.0,
    )
    act_by_target: bool = option(
        False, "Whether actions are those of the target network."
    )
    epsilon_start: float = option(
        1.0,
        "Probability of a random action before the first update.",
        low=0.0,
        high=1.0,
    )
    epsilon_updates: int = option(
        1, "Updates over which it falls to finetune_epsilon.", low=1
    )
    shift_pad: int = option(
        0,
        "Pixels by which replayed images are moved at most.",
        low=0,
    )
    intensity_scale: float = option(
        0.0, "Standard deviation of the factor of replayed images.", low=0.0
    )
    auxiliary: str = option(
        "none",
        "What is learned besides values: none, curl, curl_published (as its code), or "
        "spr.",
        choices=AUXILIARIES,
    )
    auxiliary_weight: float = option(1.0, "Weight of that loss.", low=0.0)
    curl_tau: float = option(
        0.001, "Rate of the moving average that makes CURL's keys.", low=0.0, high=1.0
    )
    spr_jumps: int = option(5, "Agent steps that SPR predicts.", low=1, high=1000)
    spr_batch_norm: bool = option(
        True, "Whether SPR's transition has batch normalisation."
    )
    reset_period: int = option(
        0,
        "Updates between two resets of the head; 0 never resets it.",
        low=0,
    )
    reset_keep: float = option(
        0.8, "Weight of the old encoder and transition in a reset.", low=0.0, high=1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_min >= self.value_max:
            raise ValueError(
                "value_min must be less than value_max, got "
                f"{self.value_min} and {self.value_max}."
            )
        if self.atoms == 1 and (self.noisy_sigma or self.priority_exponent):
            raise ValueError(
                "noisy_sigma and priority_exponent need a distribution: give atoms=51, "
                f"or 0 for both; got {self.noisy_sigma} and {self.priority_exponent}."
            )

    def check_fits(self, observation: ObservationSpec) -> None:
        """Checks encoder and augmentation; see `base.Config`."""
        super().check_fits(observation)
        side = min(observation.shape[:2])
        if self.shift_pad >= side:
            raise ValueError(
                f"shift_pad must be less than an image's side of {side}, got "
                f"{self.shift_pad}."
            )

    @property
    def window_states(self) -> int:
        """States of one window, for its target and for what SPR predicts."""
        return 1 + max(self.n_steps, self.predicted_states)

    @property
    def predicted_states(self) -> int:
        """States after the first that are predicted."""
        return self.spr_jumps if self.auxiliary == "spr" else 0


def make_network(
    config: Config, num_actions: int, observation: ObservationSpec
) -> value_heads.DistributionalNetwork:
    """Returns the network of the values that a config describes."""
    return value_heads.DistributionalNetwork(
        base.make_encoder(config, observation).clone(hidden=None),
        value_heads.ValueHead(
            num_actions,
            config.atoms,
            config.hidden_units,
            config.dueling,
            config.noisy_sigma,
        ),
        is_renormalised=config.auxiliary == "spr",
        gradient_scale=config.head_gradient_scale,
    )


def seen_states(config: Config, windows: Window) -> jax.Array:
    """Returns the states `[B, K]` that are looked at: the last is bootstrapped from."""
    bootstrap = base.reward_targets(config, windows).bootstrap  # [B, 1]
    first = jnp.arange(1 + config.predicted_states, dtype=bootstrap.dtype)
    first = jnp.broadcast_to(first, (bootstrap.shape[0], first.shape[0]))
    return jnp.concatenate([first, bootstrap], axis=1)


def make_atoms(config: Config) -> np.ndarray:
    """Returns the values `[N]` float32 of the atoms."""
    return np.linspace(
        config.value_min, config.value_max, config.atoms, dtype=np.float32
    )


def mean_values(atoms: np.ndarray, logits: jax.Array) -> jax.Array:
    """Returns the values `[..., A]` of logits `[..., A, N]`."""
    if len(atoms) == 1:
        return logits[..., 0]
    return jax.nn.softmax(logits) @ jnp.asarray(atoms)


def epsilon_schedule(config: Config) -> optax.Schedule:
    """Returns the probability of a random action by the number of the update."""
    return optax.linear_schedule(
        config.epsilon_start, config.finetune_epsilon, config.epsilon_updates
    )


def make(config: Config, num_actions: int, observation: ObservationSpec) -> base.Agent:
    """Binds a value agent to a config; see `base.Agent`."""
    network: Any = make_network(config, num_actions, observation)
    optimizer = base.adam(config, config.learning_rate)
    change = functools.partial(augmented, config)
    auxiliary = _make_auxiliary(config, network, num_actions)
    atoms = make_atoms(config)
    epsilon_of = epsilon_schedule(config)

    def untrained(key: PRNGKey) -> dict[str, Params]:
        values_key, auxiliary_key = jax.random.split(key)
        blank = frames.init_stack(observation, 1)
        values = network.init(values_key, blank, {})
        encoded = network.apply(values, blank, method="encode")
        return {"values": values, "auxiliary": auxiliary.init(auxiliary_key, encoded)}

    def init(key: PRNGKey) -> AgentState:
        params = untrained(key)
        return AgentState(
            params,
            # A copy, not the same arrays: donated buffers must not be aliased.
            target_params=jax.tree.map(jnp.copy, params["values"]),
            opt_state=optimizer.init(params),
            stats=auxiliary.start(params["values"], params["auxiliary"]),
            num_updates=jnp.zeros((), jnp.int32),
        )

    def draw_noise(key: PRNGKey, params: Params) -> dict[str, value_heads.Noise]:
        return value_heads.draw_noise(key, params["params"]["head"])

    value_of = functools.partial(mean_values, atoms)

    def policy(epsilon: float | None) -> base.Policy:
        """Makes a policy: noisy and scheduled where no epsilon is given."""

        def act(
            state: AgentState, memory: Any, seen: Observation, key: PRNGKey
        ) -> tuple[Any, Decision]:
            params = state.params["values"]
            if config.act_by_target:
                params = state.target_params
            noise_key, action_key = jax.random.split(key)
            noise = draw_noise(noise_key, params) if epsilon is None else {}
            q = value_of(network.apply(params, seen.frames, noise))
            chance = epsilon_of(state.num_updates) if epsilon is None else epsilon
            return memory, Decision(acting.epsilon_greedy(action_key, q, chance), {})

        return base.Policy(lambda num_envs: (), act, observation)

    def loss(
        params: Mapping[str, Params], state: AgentState, batch: Batch, key: PRNGKey
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        """Returns the loss, its metrics, and the priorities `[B]`."""
        keys = dict(
            zip(
                ("s_tm1", "s_t", "online", "target", "auxiliary"),
                jax.random.split(key, 5),
                strict=True,
            )
        )
        windows, values = batch.windows, params["values"]
        targets = base.reward_targets(config, windows)
        reward = base.clip_rewards(windows.reward, config.reward_clip)
        r_t, discount_t = base.sum_steps(reward[:, 1:], targets)  # [B, 1]
        s_tm1 = change(keys["s_tm1"], windows.observation[:, 0])
        s_t = change(keys["s_t"], windows.observation[:, -1])

        online_noise = draw_noise(keys["online"], values)
        encoded = network.apply(values, s_tm1, method="encode")
        logits_tm1 = network.apply(values, encoded, online_noise, method="values")
        frozen = jax.lax.stop_gradient(values)
        selector_t = value_of(network.apply(frozen, s_t, online_noise))
        target_noise = draw_noise(keys["target"], state.target_params)
        logits_t = network.apply(state.target_params, s_t, target_noise)
        a_tm1 = windows.action[:, 0]
        of_one = scalar_loss
        if config.atoms > 1:
            of_one = functools.partial(categorical_loss, atoms)
        losses, divergence, errors = jax.vmap(of_one)(
            logits_tm1, a_tm1, r_t[:, 0], discount_t[:, 0], logits_t, selector_t
        )
        others = auxiliary.loss(
            auxiliary_lib.Inputs(
                values=values,
                target_values=state.target_params,
                own=params["auxiliary"],
                slow=state.stats,
                windows=windows,
                encoded=encoded,
            ),
            keys["auxiliary"],
        )
        total = losses + config.auxiliary_weight * others
        is_valid = targets.is_valid[:, 0]
        weight = is_valid if batch.weight is None else is_valid * batch.weight
        chosen = take_states(value_of(logits_tm1), a_tm1)
        metrics = {
            "loss_value": masked_mean(losses, is_valid),
            "td_error": masked_mean(jnp.abs(errors), is_valid),
            "q_value": masked_mean(chosen, is_valid),
            "loss_auxiliary": masked_mean(others, is_valid),
        }
        priorities = {
            "cross_entropy": losses,
            "kl": divergence,
            "total": total,
        }[config.priority]
        mean = jnp.sum(weight * total) / jnp.maximum(jnp.sum(is_valid), 1.0)
        return mean, (metrics, priorities)

    def update(state: AgentState, batch: Batch, key: PRNGKey) -> base.Updated:
        loss_key, reset_key = jax.random.split(key)
        grads, (metrics, priorities) = jax.grad(loss, has_aux=True)(
            state.params, state, batch, loss_key
        )
        metrics["gradient_norm"] = base.norm(grads)
        state = base.apply_gradients(
            optimizer,
            grads,
            state,
            target="values",
            target_period=config.target_period,
            target_tau=config.target_tau,
        )
        params = state.params
        slow = auxiliary.follow(state.stats, params["values"], params["auxiliary"])
        state = state._replace(stats=slow)
        if config.reset_period:
            is_due = state.num_updates % config.reset_period == 0
            state = jax.lax.cond(
                is_due, reset, lambda key, state: state, reset_key, state
            )
        return base.Updated(
            state, metrics, priorities if config.priority_exponent else None
        )

    def reset(key: PRNGKey, state: AgentState) -> AgentState:
        """Makes head and optimiser new, and the encoders in part."""
        fresh = untrained(key)
        params = mixed(state.params, fresh, config.reset_keep)
        target = mixed(state.target_params, fresh["values"], config.reset_keep)
        return state._replace(
            params=params, target_params=target, opt_state=optimizer.init(params)
        )

    spec = base.BatchSpec(
        config.batch_size,
        config.batch_size,
        config.window_states,
        priorities=_priorities(config),
        states=functools.partial(seen_states, config),
    )
    learner = base.Learner(spec, update, METRICS)
    agent = base.from_reward_alone(init, policy, config.finetune_epsilon, learner)
    return agent._replace(finetune=base.Phase(policy(None), learner))


def augmented(config: Config, key: PRNGKey, images: jax.Array) -> jax.Array:
    """Changes each image of a batch `[B, H, W, C]` in its own way."""

    def change(key: PRNGKey, image: jax.Array) -> jax.Array:
        shift_key, intensity_key = jax.random.split(key)
        if config.shift_pad:
            image = augment.random_shift(shift_key, image, pad=config.shift_pad)
        if config.intensity_scale:
            image = augment.random_intensity(
                intensity_key, image, scale=config.intensity_scale
            )
        return image

    return jax.vmap(change)(jax.random.split(key, images.shape[0]), images)


def _make_auxiliary(
    config: Config, network: value_heads.DistributionalNetwork, num_actions: int
) -> auxiliary_lib.Auxiliary:
    if config.auxiliary == "none":
        return auxiliary_lib.none()
    if config.auxiliary == "spr":
        encoder: Any = network.encoder
        return auxiliary_lib.spr(
            network,
            num_actions=num_actions,
            channels=encoder.layers[-1].features,
            jumps=config.spr_jumps,
            is_batch_normalised=config.spr_batch_norm,
            change=functools.partial(augmented, config),
            cut_at_life_loss=config.cut_at_life_loss,
        )
    return auxiliary_lib.curl(
        network,
        hidden=config.hidden_units,
        tau=config.curl_tau,
        is_published=config.auxiliary == "curl_published",
    )


def _priorities(config: Config) -> base.Prioritised | None:
    if not config.priority_exponent:
        return None
    return base.Prioritised(
        config.priority_exponent,
        optax.linear_schedule(
            config.importance_start, config.importance_end, config.importance_updates
        ),
    )


def scalar_loss(
    logits_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array,
    logits_t: jax.Array,
    selector_t: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Huber's loss of double Q-learning of one target; see `categorical_loss`."""
    error = rlax.double_q_learning(
        logits_tm1[:, 0], a_tm1, r_t, discount_t, logits_t[:, 0], selector_t
    )
    loss = optax.losses.huber_loss(error)
    return loss, loss, error


def categorical_loss(
    atoms: np.ndarray,
    logits_tm1: jax.Array,
    a_tm1: jax.Array,
    r_t: jax.Array,
    discount_t: jax.Array,
    logits_t: jax.Array,
    selector_t: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of one categorical target (C51), with the action of double Q-learning.

    Bellemare et al. 2017, https://arxiv.org/abs/1707.06887.

    Args:
      atoms: `[N]` float.
      logits_tm1: `[A, N]` float, online, at the state that was acted in.
      a_tm1: `[]` int.
      r_t: `[]` float, the discounted sum of rewards.
      discount_t: `[]` float, of what follows.
      logits_t: `[A, N]` float, of the target network, where the target bootstraps.
      selector_t: `[A]` float, online values there.

    Returns:
      The cross-entropy, the divergence, and the error of the mean, each `[]`.
    """
    p_t = jax.nn.softmax(logits_t[jnp.argmax(selector_t)])
    target = jax.lax.stop_gradient(
        rlax.categorical_l2_project(r_t + discount_t * atoms, p_t, atoms)
    )
    chosen = logits_tm1[a_tm1]
    cross_entropy = optax.losses.softmax_cross_entropy(chosen, target)
    entropy = -jnp.sum(jax.scipy.special.xlogy(target, target))
    error = jnp.dot(target - jax.nn.softmax(chosen), atoms)
    return cross_entropy, cross_entropy - entropy, error


def mixed(params: Any, fresh: Any, keep: float) -> Any:
    """Returns fresh parameters, with encoder and transition mixed from old and new."""

    def mix(path: tuple[Any, ...], old: jax.Array, new: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        is_mixed = "encoder" in names or "transition" in names
        return keep * old + (1.0 - keep) * new if is_mixed else new

    return jax.tree_util.tree_map_with_path(mix, params, fresh)


_SMOKE = {
    "encoder": "small_valid",
    "hidden_units": 16,
    "n_steps": 3,
    "batch_size": 8,
    "spr_jumps": 2,
}
_UNBOUNDED = 1e9

_DER = {
    "n_steps": 20,
    "hidden_units": 256,
    "noisy_sigma": 0.1,
    "priority_exponent": 0.5,
    "target_period": 2_000,
    "epsilon_start": 0.0,
    "finetune_epsilon": 0.0,
}
_DRQ = {
    "encoder": "nature_same",
    "dueling": "last",
    "atoms": 1,
    "target_period": 1,
    "epsilon_updates": 5_000,
    "shift_pad": 4,
    "intensity_scale": 0.05,
}
_SPR = {
    "encoder": "nature",
    "hidden_units": 256,
    "noisy_sigma": 0.5,
    "head_gradient_scale": 0.5**0.5,
    "priority_exponent": 0.5,
    "priority": "kl",
    "importance_updates": 196_000,
    "target_period": 1,
    "finetune_epsilon": 0.0,
    "shift_pad": 4,
    "intensity_scale": 0.05,
    "auxiliary": "spr",
    "auxiliary_weight": 5.0,
}


def _entry(about: str, options: Mapping[str, Any], **at_100k: float) -> base.Entry:
    in_worlds = {"encoder": "minatar"}
    presets: dict[str, Any] = {
        "smoke": _SMOKE,
        "atari100k": at_100k,
        "minatar": in_worlds,
        "maze": in_worlds,
    }
    return base.Entry(make, Config, about, options, presets, ())


DER = _entry("data-efficient Rainbow", _DER)
DER_DOPAMINE = _entry(
    "the same as Dopamine ran it",
    {
        **_DER,
        "encoder": "nature_same",
        "hidden_units": 512,
        "dueling": "last",
        "n_steps": 10,
        "importance_start": 0.5,
        "importance_end": 0.5,
        "target_period": 8_000,
        "epsilon_start": 0.01,
        "finetune_epsilon": 0.01,
        "max_gradient_norm": _UNBOUNDED,
    },
)
DRQ = _entry("augmented double DQN", {**_DRQ, "finetune_epsilon": 0.1})
DRQ_EPS = _entry("the same, less random", {**_DRQ, "finetune_epsilon": 0.01})
CURL = _entry(
    "DER with contrast, as published",
    {**_DER, "auxiliary": "curl_published", "priority": "total"},
)
CURL_CLEAN = _entry("DER with contrast", {**_DER, "auxiliary": "curl"})
SPR = _entry(
    "self-prediction",
    _SPR,
    finetune_samples_per_step=64.0,
    finetune_warmup_agent_steps=2_000,
)
SR_SPR = _entry(
    "the same with resets",
    {
        **_SPR,
        "encoder": "nature_same",
        "hidden_units": 512,
        "dueling": "last",
        "noisy_sigma": 0.0,
        "head_gradient_scale": 1.0,
        "priority": "cross_entropy",
        "importance_start": 0.5,
        "importance_end": 0.5,
        "target_tau": 0.005,
        "act_by_target": True,
        "epsilon_updates": 16_000,
        "max_gradient_norm": _UNBOUNDED,
        "spr_batch_norm": False,
        "reset_period": 40_000,
    },
    finetune_samples_per_step=256.0,
    finetune_warmup_agent_steps=2_000,
)
