"""Pretrains one agent in one maze without reward, as a single jitted scan."""

import dataclasses
import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax import knn, losses, maze, networks, rewards, sphere


class TDForm(enum.Enum):
    SCALAR = "scalar"
    VECTOR = "vector"
    SPLIT = "split"
    OFF_POLICY = "off_policy"
    OFF_SCALAR = "off_scalar"


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    skill_weight: float = 1.0
    entropy_weight: float = 1.0
    td_form: TDForm = TDForm.OFF_POLICY
    feature_dim: int = 10
    feature_hidden: int = 128
    hidden: int = 128
    discount: float = 0.95
    episode_length: int = 40
    task_hold: int = 40
    num_envs: int = 8
    num_iterations: int = 1000
    num_updates: int = 4
    num_tasks: int = 8
    epsilon: float = 0.1
    learning_rate: float = 1e-3
    feature_learning_rate: float = 1e-3
    lr_decay: bool = True
    feature_lr_decay: bool = True
    feature_decay: float = 0.98
    feature_exponent: float = 0.0
    replay_exponent: float = 0.0
    replay_decay: float = 1.0
    particle_decay: float = 1.0
    target_period: int = 10
    num_neighbors: int = 16
    num_particles: int = 256
    distance_decay: float = 0.99
    unit_values: bool = True
    whiten: float = 0.0
    exploration_loss: float = 1.0
    whiten_ridge: float = 1e-2


class Networks(NamedTuple):
    features: networks.FeatureNetwork
    successor: networks.SuccessorNetwork


class Pretrained(NamedTuple):
    feature_params: dict
    successor_params: dict
    visits: jax.Array  # [I, S] float32
    metrics: dict


def make_networks(config: AgentConfig) -> Networks:
    return Networks(
        features=networks.FeatureNetwork(
            networks.MlpEncoder((config.feature_hidden,)), config.feature_dim
        ),
        successor=networks.SuccessorNetwork(
            networks.MlpEncoder((config.hidden,)),
            num_actions=maze.NUM_ACTIONS,
            feature_dim=config.feature_dim,
            hidden=config.hidden,
            exploration_head=config.td_form not in (TDForm.SCALAR, TDForm.VECTOR),
        ),
    )


class _State(NamedTuple):
    feature_params: dict
    successor_params: dict
    target_params: dict
    feature_opt: tuple
    successor_opt: tuple
    replay: jax.Array  # [S, A] visit counts of transitions
    particles: jax.Array  # [S] decayed visits
    task_sum: jax.Array  # [S, D]
    task_count: jax.Array  # [S]
    scale: rewards.DistanceScale


def make_pretrain(world: maze.Maze, config: AgentConfig) -> Callable:
    c = config
    S, A = world.next_cell.shape
    T, E, D, K = c.episode_length, c.num_envs, c.feature_dim, c.num_tasks
    H = T // c.task_hold
    nets = make_networks(c)
    all_cells = maze.observe(world, jnp.arange(S))
    total = c.num_iterations * c.num_updates

    def sched(lr, decay):
        return optax.cosine_decay_schedule(lr, total, 0.02) if decay else lr

    f_opt = optax.adam(sched(c.feature_learning_rate, c.feature_lr_decay))
    s_opt = optax.adam(sched(c.learning_rate, c.lr_decay))

    def successor_table(params, w):  # [K, D] -> [S, K, A, D]
        return nets.successor.apply(
            params, all_cells, jnp.broadcast_to(w, (S, *w.shape))
        )

    def rollout(key, params, tasks):  # [E, H, D]
        out = successor_table(params, tasks.reshape(E * H, D))
        q = jax.vmap(jax.vmap(losses.q_values), (0, None))(
            out.psi, tasks.reshape(E * H, D)
        )
        if out.exploration is not None:
            q = c.skill_weight * q + c.entropy_weight * out.exploration
        greedy = jnp.argmax(q, axis=-1).astype(jnp.int32).reshape(S, E, H)
        u = jax.random.uniform(key, (T, E))
        # u < eps: random action from the same uniform number.
        rand = jnp.minimum(jnp.floor(u / c.epsilon * A), A - 1).astype(jnp.int32)

        def act(cell, inputs):
            t, u, rand = inputs
            g = greedy[cell, jnp.arange(E), t // c.task_hold]
            a = jnp.where(u < c.epsilon, rand, g)
            nxt = jax.vmap(maze.step, (None, 0, 0))(world, cell, a)
            return nxt, (cell, a, nxt)

        start = jnp.full((E,), world.start)
        _, (s, a, n) = jax.lax.scan(act, start, (jnp.arange(T), u, rand))
        return s, a, n

    def td_loss(params, target_params, w, phi_table, r_table, weight):
        out0 = successor_table(params, w)
        out1 = successor_table(target_params, w)
        gamma = jnp.float32(c.discount)

        c1 = 1 - gamma if c.unit_values else jnp.float32(1)

        def one(psi0, e0, a, phi, r_e, psi1, e1, w):
            if c.td_form is TDForm.SCALAR:
                r = rewards.intrinsic_reward(
                    rewards.skill_reward(phi, w),
                    r_e,
                    skill_weight=c.skill_weight,
                    entropy_weight=c.entropy_weight,
                )
                d = losses.scalar_td_error(psi0, a, r, gamma, psi1, w)
                return 0.5 * d**2
            if c.td_form is TDForm.VECTOR:
                cum = c.skill_weight * phi + c.entropy_weight * r_e * w
                d = losses.vector_td_error(psi0, a, cum, gamma, psi1, w)
                return 0.5 * jnp.sum(d**2)
            d = losses.split_td_error(
                psi0,
                e0,
                a,
                phi,
                r_e,
                gamma,
                psi1,
                e1,
                w,
                skill_weight=c.skill_weight,
                entropy_weight=c.entropy_weight,
            )
            succ = d.successor
            if c.td_form is TDForm.OFF_POLICY:
                succ = losses.vector_td_error(psi0, a, phi, gamma, psi1, w)
            if c.td_form is TDForm.OFF_SCALAR:
                succ = losses.scalar_td_error(
                    psi0, a, rewards.skill_reward(phi, w), gamma, psi1, w
                )
            return 0.5 * jnp.sum(succ**2) + 0.5 * c.exploration_loss * d.exploration**2

        total = 0.0
        for a in range(A):
            s1 = world.next_cell[:, a]
            f = jax.vmap(one, (0, 0, None, None, None, 0, 0, 0))  # tasks
            f = jax.vmap(f, (0, 0, None, 0, 0, 0, 0, None))  # cells
            e1 = None if out1.exploration is None else out1.exploration[s1]
            l = f(out0.psi, out0.exploration, np.int32(a), c1 * phi_table[s1],
                  c1 * r_table[s1], out1.psi[s1], e1, w)
            total += jnp.sum(l * weight[:, a, None]) / K
        return total

    def feature_loss(params, w_table):
        phi = nets.features.apply(params, all_cells).phi
        return jnp.sum(jax.vmap(losses.feature_loss)(phi, w_table))

    def iteration(state, inputs):
        i, key = inputs
        k_task, k_roll, k_part, k_upd = jax.random.split(key, 4)
        tasks = sphere.sample_uniform(k_task, (E, H), D)
        s, a, n = rollout(k_roll, state.successor_params, tasks)  # [T, E]
        w = jnp.repeat(tasks, c.task_hold, axis=1).swapaxes(0, 1)  # [T, E, D]
        visits = jnp.zeros(S).at[n].add(1.0)
        replay = (c.replay_decay * state.replay).at[s, a].add(1.0)
        particles = c.particle_decay * state.particles + visits
        task_sum = (c.feature_decay * state.task_sum).at[n].add(w)
        task_count = c.feature_decay * state.task_count + visits

        p = jnp.cumsum(particles)
        part = jnp.searchsorted(p, jax.random.uniform(k_part, (c.num_particles,)) * p[-1])
        h = nets.features.apply(state.feature_params, all_cells).h
        distances = knn.knn_distances(h, h[part], k=c.num_neighbors)
        scale = rewards.update_distance_scale(
            state.scale, distances[n], decay=c.distance_decay
        )
        r_table = jax.vmap(rewards.particle_entropy_reward, (0, None))(
            distances, scale.mean
        )
        state = state._replace(
            scale=scale,
            replay=replay,
            particles=particles,
            task_sum=task_sum,
            task_count=task_count,
        )
        weight = jnp.where(
            replay > 1e-3, jnp.maximum(replay, 1e-3) ** c.replay_exponent, 0.0
        )
        weight = weight / jnp.sum(weight)
        ok = task_count > 1e-3
        safe = jnp.where(ok, task_count, 1.0)
        w_table = jnp.where(
            ok[:, None],
            task_sum / safe[:, None] * (safe**c.feature_exponent)[:, None],
            0.0,
        )
        w_table = w_table / jnp.sum(jnp.where(ok, safe**c.feature_exponent, 0.0))
        fresh = sphere.sample_uniform(k_upd, (c.num_updates * K,), D)
        seen = (jnp.sum(replay, axis=1) > 0).astype(jnp.float32)  # [S]
        phi0 = nets.features.apply(state.feature_params, all_cells).phi
        mean = seen @ phi0 / jnp.sum(seen)
        cent = (phi0 - mean) * seen[:, None]
        cov = cent.T @ cent
        cov = cov + c.whiten_ridge * jnp.trace(cov) / D * jnp.eye(D)
        k_r, k_m = jax.random.split(jax.random.fold_in(k_upd, 1))
        noise = jax.random.normal(k_r, (S, c.num_updates * K))
        white = sphere.normalize(jnp.linalg.solve(cov, cent.T @ noise).T)
        use = jax.random.uniform(k_m, (c.num_updates * K, 1)) < c.whiten
        fresh = jnp.where(use, white, fresh).reshape(c.num_updates, K, D)

        def update(state, inputs):
            j, w = inputs
            phi_table = nets.features.apply(state.feature_params, all_cells).phi
            l, g = jax.value_and_grad(td_loss)(
                state.successor_params,
                state.target_params,
                w,
                phi_table,
                r_table,
                weight,
            )
            u, s_o = s_opt.update(g, state.successor_opt)
            sp = optax.apply_updates(state.successor_params, u)
            lf, g = jax.value_and_grad(feature_loss)(state.feature_params, w_table)
            u, f_o = f_opt.update(g, state.feature_opt)
            fp = optax.apply_updates(state.feature_params, u)
            sync = (i * c.num_updates + j + 1) % c.target_period == 0
            tp = jax.tree.map(
                lambda new, old: jnp.where(sync, new, old), sp, state.target_params
            )
            return state._replace(
                feature_params=fp,
                successor_params=sp,
                target_params=tp,
                feature_opt=f_o,
                successor_opt=s_o,
            ), (l, lf)

        state, (l, lf) = jax.lax.scan(update, state, (jnp.arange(c.num_updates), fresh))
        metrics = dict(
            td_loss=l.mean(), feature_loss=lf.mean(), r_entropy=r_table[n].mean()
        )
        return state, (visits, metrics)

    def pretrain(key) -> Pretrained:
        kf, ks, kr = jax.random.split(key, 3)
        fp = nets.features.init(kf, all_cells)
        sp = nets.successor.init(ks, all_cells, jnp.zeros((S, 1, D)))
        I = c.num_iterations
        state = _State(
            fp,
            sp,
            sp,
            f_opt.init(fp),
            s_opt.init(sp),
            jnp.zeros((S, A)),
            jnp.zeros((S,)),
            jnp.zeros((S, D)),
            jnp.zeros((S,)),
            rewards.init_distance_scale(),
        )
        state, (visits, metrics) = jax.lax.scan(
            iteration, state, (jnp.arange(I), jax.random.split(kr, I))
        )
        return Pretrained(state.feature_params, state.successor_params, visits, metrics)

    return pretrain
