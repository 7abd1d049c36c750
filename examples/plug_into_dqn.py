"""Somebody's small JAX DQN in a corridor; the lines marked APS make it an APS agent.

python examples/plug_into_dqn.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import aps_jax  # APS

CELLS, ACTIONS, DIM, ENVS, GAMMA, EPSILON = 15, 2, 5, 64, 0.9, 0.2
Q = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(ACTIONS * DIM)])
H = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(DIM)])  # APS


def psi(params, cell, w):  # APS: Q becomes psi^T w, which knows the task.
    x = jnp.concatenate([jax.nn.one_hot(cell, CELLS), w], axis=-1)
    return Q.apply(params, x).reshape(-1, ACTIONS, DIM)


def act(params, cell, w):
    values = jax.vmap(aps_jax.q_values)(psi(params["q"], cell, w), w)
    return jnp.argmax(values, axis=1)


def loss(params, target, scale, s_tm1, a_tm1, s_t, w):
    h = H.apply(params["h"], jax.nn.one_hot(s_t, CELLS))  # APS: reward and features.
    frozen, ids = jax.lax.stop_gradient(h), jnp.arange(ENVS)
    near = aps_jax.knn_distances(frozen, frozen, k=12, query_ids=ids, particle_ids=ids)
    scale = aps_jax.update_distance_scale(scale, near)
    new = jax.vmap(aps_jax.particle_entropy_reward, (0, None))(near, scale.mean)
    reward = aps_jax.normalize(frozen) + 0.1 * new[:, None] * w  # [ENVS, DIM]
    skill = jax.vmap(aps_jax.feature_loss)(aps_jax.normalize(h), w)  # To here.
    before, after = psi(params["q"], s_tm1, w), psi(target, s_t, w)
    td_error = jax.vmap(aps_jax.vector_td_error)  # APS: a DQN's error, of vectors.
    error = td_error(before, a_tm1, reward, jnp.full(ENVS, GAMMA), after, w)
    return jnp.mean(skill) + 0.5 * jnp.mean(jnp.square(error)), scale


def train(key, num_steps):
    params = {
        "q": Q.init(jax.random.fold_in(key, 1), jnp.zeros(CELLS + DIM)),
        "h": H.init(jax.random.fold_in(key, 2), jnp.zeros(CELLS)),  # APS
    }
    optimizer = optax.adam(1e-3)

    def step(carry, t):
        params, target, opt_state, scale, cell, w = carry
        keys = jax.random.split(jax.random.fold_in(key, t + 3), 3)
        begins = t % CELLS == 0
        cell = jnp.where(begins, CELLS // 2, cell)
        drawn = aps_jax.sample_uniform(keys[0], (ENVS,), dim=DIM)  # APS
        w = jnp.where(begins, drawn, w)  # APS: a new task for each episode.
        at_random = jax.random.randint(keys[1], (ENVS,), 0, ACTIONS)
        explores = jax.random.uniform(keys[2], (ENVS,)) < EPSILON
        action = jnp.where(explores, at_random, act(params, cell, w))
        reached = jnp.clip(cell + 2 * action - 1, 0, CELLS - 1)
        batch = (cell, action, reached, w)
        grads, scale = jax.grad(loss, has_aux=True)(params, target, scale, *batch)
        changes, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, changes)
        target = optax.incremental_update(params["q"], target, 0.02)
        return (params, target, opt_state, scale, reached, w), None

    begin = (jnp.zeros(ENVS, jnp.int32), jnp.zeros((ENVS, DIM)))
    scale = aps_jax.init_distance_scale()  # APS
    carry = (params, params["q"], optimizer.init(params), scale, *begin)
    return jax.lax.scan(step, carry, jnp.arange(num_steps))[0][0]


def main(num_steps=3_000):
    """Pretrains without any reward, then asks for each end of the corridor in turn."""
    params = jax.jit(train, static_argnums=1)(jax.random.key(0), num_steps)
    phi, ends = aps_jax.normalize(H.apply(params["h"], jnp.eye(CELLS))), {}
    for goal in (0, CELLS - 1):
        reward = jnp.float32(abs(jnp.arange(CELLS) - goal) < CELLS // 3)
        moments = aps_jax.update_regression_moments(  # APS: which task is this reward?
            aps_jax.init_regression_moments(DIM), phi, reward, jnp.ones(CELLS, bool)
        )
        w = aps_jax.infer_task(moments, fallback_task=jnp.ones(DIM)).task
        cell = jnp.full(1, CELLS // 2)
        for _ in range(CELLS):
            cell = jnp.clip(cell + 2 * act(params, cell, w[None]) - 1, 0, CELLS - 1)
        ends[goal] = int(cell[0])
        print(f"asked for cell {goal}, it went from {CELLS // 2} to {ends[goal]}")
    return ends


if __name__ == "__main__":
    main()
