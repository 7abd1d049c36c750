"""Double DQN from reward alone: the plainest agent of the protocol.

van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461. Letters as in `base`; `m`
targets of a window.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rlax

from aps_jax.agents import base
from aps_jax.agents.base import AgentState, Batch, Decision, Observation, take_states
from aps_jax.networks import modules
from aps_jax.ops import acting
from aps_jax.ops.returns import masked_mean
from aps_jax.replay import frames
from aps_jax.replay.buffer import Window
from aps_jax.types import ObservationSpec, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class Config(base.Config):
    """Options of double DQN: those that all agents share."""


def make(config: Config, num_actions: int, observation: ObservationSpec) -> base.Agent:
    """Binds double DQN to a config; see `base.Agent`."""
    m = config.window_targets
    network: Any = modules.ValueNetwork(
        base.make_encoder(config, observation), num_actions, config.hidden_units
    )
    optimizer = base.adam(config, config.learning_rate)

    def init(key: PRNGKey) -> AgentState:
        params = {"values": network.init(key, frames.init_stack(observation, 1))}
        target_params = jax.tree.map(jnp.copy, params["values"])
        zero = jnp.zeros((), jnp.int32)
        return AgentState(params, target_params, optimizer.init(params), {}, zero)

    def policy(epsilon: float) -> base.Policy:
        def act(
            state: AgentState, memory: Any, seen: Observation, key: PRNGKey
        ) -> tuple[Any, Decision]:
            q = network.apply(state.params["values"], seen.frames)
            return memory, Decision(acting.epsilon_greedy(key, q, epsilon), {})

        return base.Policy(lambda num_envs: (), act, observation)

    def loss(
        params: Mapping[str, Params], target_params: Params, windows: Window
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = base.reward_targets(config, windows)
        reward = base.clip_rewards(windows.reward, config.reward_clip)
        r_t, discount_t = base.sum_steps(reward[:, 1:], targets)
        s_t = take_states(windows.observation, targets.bootstrap)
        q_tm1 = network.apply(params["values"], windows.observation[:, :m])
        q_t, a_tm1 = network.apply(target_params, s_t), windows.action[:, :m]
        selector_t = network.apply(jax.lax.stop_gradient(params["values"]), s_t)
        errors = jax.vmap(jax.vmap(rlax.double_q_learning))(
            q_tm1, a_tm1, r_t, discount_t, q_t, selector_t
        )
        chosen = jnp.take_along_axis(q_tm1, a_tm1[..., None], axis=-1)[..., 0]
        loss_td = masked_mean(0.5 * jnp.square(errors), targets.is_valid)
        return loss_td, {
            "loss_td": loss_td,
            "td_error": masked_mean(jnp.abs(errors), targets.is_valid),
            "q_value": masked_mean(chosen, targets.is_valid),
        }

    def update(state: AgentState, batch: Batch, key: PRNGKey) -> base.Updated:
        del key
        grads, metrics = jax.grad(loss, has_aux=True)(
            state.params, state.target_params, batch.windows
        )
        metrics["gradient_norm"] = base.norm(grads)
        period = config.target_period
        state = base.apply_gradients(
            optimizer, grads, state, target="values", target_period=period
        )
        return base.Updated(state, metrics)

    spec = base.BatchSpec(config.batch_size, config.batch_size // m, m + config.n_steps)
    learner = base.Learner(spec, update, base.LEARNING)
    return base.from_reward_alone(init, policy, config.finetune_epsilon, learner)


PRESETS = {
    "smoke": {"encoder": "small", "hidden_units": 16, "n_steps": 3, "batch_size": 8},
    "cpu": {"encoder": "small", "hidden_units": 128, "learning_rate": 5e-4},
    "gpu": {"encoder": "nature", "bfloat16": True},
    "minatar": {"encoder": "minatar", "hidden_units": 128, **base.WORLD_VALUES},
    "maze": {"encoder": "mlp", "hidden_units": 128, **base.WORLD_VALUES},
}
DQN = base.Entry(make, Config, "double DQN from reward alone", {}, PRESETS, ())
