"""Tests of aps_jax.agents.aps: acting, the layout of targets, and both updates."""

import functools

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_agent

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import aps as agent_lib
from aps_jax.networks import modules
from aps_jax.replay import buffer

NUM_ACTIONS = 3
DIM = 2


def make_config(**options):
    """A small agent: 2 targets a window, 3 steps, 7 particles."""
    options = {
        "encoder": "small",
        "hidden_units": 8,
        "feature_dim": DIM,
        "num_neighbors": 2,
        "num_particles": 7,
        "n_steps": 3,
        "batch_size": 6,
        "window_targets": 2,
        "discount": 0.9,
        "gpi_tasks": 3,
        **options,
    }
    return config_lib.replace_options(config_lib.Config(), **options)


@functools.cache
def make_agent(config):
    return agent_lib.make_agent(
        config.learner, config.finetune, num_actions=NUM_ACTIONS
    )


@functools.cache
def make_update(config):
    """The jitted update, compiled once for all tests of a config.

    It takes particles as windows of one state, and encodes them.
    """
    agent = make_agent(config)

    @jax.jit
    def update(state, windows, particles):
        encoded = agent.particles(state.params, particles)
        return agent.update(state, windows, encoded)

    return update


def make_windows(rng, num_windows, num_states, *, first_id=0):
    """Windows of random pixels in which episodes end and tasks change."""
    shape = (num_windows, num_states)
    is_first = rng.random(shape) < 0.2
    # Half of the episodes end by game over, the others by the time limit.
    terminated = np.zeros(shape, bool)
    terminated[:, :-1] = is_first[:, 1:] & (rng.random(shape) < 0.5)[:, 1:]
    task = rng.normal(size=(num_windows, 2, DIM))
    task /= np.linalg.norm(task, axis=-1, keepdims=True)
    changes = np.cumsum(rng.random(shape) < 0.2, axis=1) > 0
    return buffer.Window(
        observation=rng.integers(0, 256, (*shape, 84, 84, 4), dtype=np.uint8),
        action=rng.integers(0, NUM_ACTIONS, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32) * 2,
        terminated=terminated,
        is_first=is_first,
        life_lost=rng.random(shape) < 0.2,
        task=np.where(changes[..., None], task[:, 1:], task[:, :1]).astype(np.float32),
        id=(first_id + np.arange(num_windows * num_states, dtype=np.int32)).reshape(
            shape
        ),
    )


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    learner = config.learner
    windows = make_windows(rng, learner.num_windows, learner.window_states)
    particles = make_windows(rng, learner.num_particles, 1, first_id=1000)
    # One particle is a state of the first window: it is no neighbour of itself.
    particles.observation[0, 0] = windows.observation[0, 1]
    particles.id[0, 0] = windows.id[0, 1]
    return windows, particles


def pick(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def trained_state(agent, seed=0):
    """A state whose target differs from its network and whose moments are not empty."""
    state = agent.init(jax.random.key(seed))
    other = agent.init(jax.random.key(seed + 1))
    return state._replace(target_params=other.params["successor"])


# The layout of targets.


def lay_out(window, *, task_cut=True, life_cut=False, m=2, n=3):
    return agent_lib.lay_out_targets(
        window,
        num_targets=m,
        n_steps=n,
        discount=0.9,
        cut_at_task_change=task_cut,
        cut_at_life_loss=life_cut,
    )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("task_cut", [True, False])
@pytest.mark.parametrize("life_cut", [True, False])
def test_targets_follow_the_walk(seed, task_cut, life_cut):
    window = pick(make_windows(np.random.default_rng(seed), 1, 5), 0)
    targets = jax.device_get(lay_out(window, task_cut=task_cut, life_cut=life_cut))
    for start in range(2):
        walk = references_agent.walk_target(
            window, start, n_steps=3, discount=0.9, task_cut=task_cut, life_cut=life_cut
        )
        assert targets.is_valid[start] == (walk is not None)
        if walk is None:
            continue
        places, discounts, bootstrap, product = walk
        weights = targets.weight[start]
        np.testing.assert_array_equal(
            weights, [1.0] * len(places) + [0.0] * (3 - len(places))
        )
        np.testing.assert_array_equal(targets.rewarded[start][weights > 0], places)
        products = np.cumprod(targets.discount[start])
        np.testing.assert_allclose(
            products[: len(places) - 1], discounts[1:], rtol=1e-6
        )
        np.testing.assert_allclose(products[-1], product, rtol=1e-6)
        assert targets.bootstrap[start] == bootstrap


def quiet_window(**fields):
    """Five states of one episode and task, but for `fields`."""
    window = buffer.Window(
        observation=np.zeros((5, 84, 84, 4), np.uint8),
        action=np.zeros(5, np.int32),
        reward=np.arange(5, dtype=np.float32),
        terminated=np.zeros(5, bool),
        is_first=np.zeros(5, bool),
        life_lost=np.zeros(5, bool),
        task=np.tile(np.float32([[1.0, 0.0]]), (5, 1)),
        id=np.arange(5, dtype=np.int32),
    )
    return window._replace(**fields)


def test_a_whole_window_bootstraps_with_the_power_of_the_discount():
    targets = lay_out(quiet_window())
    np.testing.assert_array_equal(targets.rewarded, [[1, 2, 3], [2, 3, 4]])
    np.testing.assert_allclose(np.prod(targets.discount, axis=1), 0.9**3, rtol=1e-6)
    np.testing.assert_array_equal(targets.bootstrap, [3, 4])
    np.testing.assert_array_equal(targets.is_valid, [1, 1])


def test_after_game_over_nothing_is_bootstrapped():
    # State 2 is game over, state 3 the reset frame.
    window = quiet_window(terminated=np.arange(5) == 2, is_first=np.arange(5) == 3)
    targets = lay_out(window)
    np.testing.assert_array_equal(targets.weight, [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(np.prod(targets.discount, axis=1), [0, 0])


def test_the_time_limit_cuts_the_sum_but_bootstraps():
    window = quiet_window(is_first=np.arange(5) == 3)
    targets = lay_out(window)
    np.testing.assert_array_equal(targets.weight, [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(np.prod(targets.discount, axis=1), [0.81, 0.9], 1e-6)
    np.testing.assert_array_equal(targets.bootstrap, [2, 2])


def test_the_pair_across_a_reset_is_no_transition():
    window = quiet_window(is_first=np.arange(5) == 1)
    np.testing.assert_array_equal(lay_out(window).is_valid, [0, 1])


def test_a_game_over_on_the_last_state_of_a_window_counts():
    window = quiet_window(terminated=np.arange(5) == 4)
    targets = lay_out(window)
    np.testing.assert_allclose(np.prod(targets.discount, axis=1), [0.9**3, 0], 1e-6)


# The reward-free update.


@pytest.mark.parametrize(
    "form, weights, options",
    [
        ("split", (0.7, 0.3), {}),
        ("split", (0.0, 1.0), {"unit_values": True}),
        ("off_policy", (0.7, 0.3), {"unit_values": True}),
        ("off_policy", (0.3, 9.0), {}),
        ("vector", (0.7, 0.3), {"unit_values": True}),
        ("scalar", (0.7, 0.3), {}),
        ("off_policy", (0.7, 0.3), {"whiten_features": True}),
    ],
)
def test_update_minimises_the_objective_written_slowly(form, weights, options):
    config = make_config(
        **{
            "unit_values": False,
            "whiten_features": False,
            **options,
        },
        td_form=form,
        skill_weight=weights[0],
        entropy_weight=weights[1],
    )
    # (1 - 0.9) with unit values.
    unit = 0.1 if options.get("unit_values") else 1.0
    learner = config.learner
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    _, metrics = make_update(config)(state, windows, particles)

    features = jax.device_get(agent.features(state.params, windows.observation))
    particle_h = jax.device_get(agent.features(state.params, particles.observation)).h
    if learner.whiten_features:
        white = references_agent.whitened(features.h, particle_h[:, 0])
        features = features._replace(
            h=white, phi=white / np.linalg.norm(white, axis=-1, keepdims=True)
        )
        particle_h = references_agent.whitened(particle_h, particle_h[:, 0])
    # Features that differ by little lose digits when their mean is subtracted.
    rtol = 1e-3 if learner.whiten_features else 2e-5
    successor = modules.SuccessorNetwork(
        agent_lib.make_encoder(learner),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=form in ("split", "off_policy"),
    )

    def predict(params, observation, w):
        return jax.device_get(
            pick(successor.apply(params, observation[None], w[None, None]), 0, 0)
        )

    rewarder = functools.partial(
        references_agent.entropy_reward,
        particle_h=particle_h[:, 0],
        particle_ids=particles.id[:, 0],
        k=learner.num_neighbors,
        c=learner.distance_offset,
        clip=learner.distance_clip,
    )
    walks = {
        (b, start): references_agent.walk_target(
            pick(windows, b),
            start,
            n_steps=3,
            discount=0.9,
            task_cut=True,
            life_cut=False,
        )
        for b in range(learner.num_windows)
        for start in range(learner.window_targets)
    }
    # The states that targets sum, and no others, have a reward and count in its scale.
    states = sorted({(b, p) for (b, _), walk in walks.items() if walk for p in walk[0]})
    assert len(states) < learner.num_windows * (learner.window_states - 1)
    distances = [rewarder(features.h[i], windows.id[i], sigma=1.0)[1] for i in states]
    sigma = np.mean(distances)
    r_entropy = {
        i: rewarder(features.h[i], windows.id[i], sigma=sigma)[0] for i in states
    }

    mean_entropy = np.mean(list(r_entropy.values()))

    td_losses, feature_losses, skills = [], [], []
    for b in range(learner.num_windows):
        window = pick(windows, b)
        for start in range(learner.window_targets):
            reached = start + 1
            if not window.is_first[reached]:
                cosine = features.phi[b, reached] @ window.task[start]
                feature_losses.append(-np.float64(cosine))
            walk = walks[b, start]
            if walk is None:
                continue
            places, discounts, bootstrap, product = walk
            w = window.task[start]
            before = predict(state.params["successor"], window.observation[start], w)
            after = predict(state.target_params, window.observation[bootstrap], w)
            skills += [features.phi[b, p] @ w for p in places]
            td_losses.append(
                references_agent.td_loss_of_target(
                    form,
                    before.psi,
                    before.exploration,
                    window.action[start],
                    sum(
                        d * unit * np.float64(features.phi[b, p])
                        for p, d in zip(places, discounts, strict=True)
                    ),
                    sum(
                        d * unit * r_entropy[b, p]
                        for p, d in zip(places, discounts, strict=True)
                    ),
                    product,
                    after.psi,
                    after.exploration,
                    w,
                    weights,
                )
            )
    assert 0 < len(td_losses) < learner.batch_size  # Some starts are no transitions.
    np.testing.assert_allclose(metrics["loss_td"], np.mean(td_losses), rtol=rtol)
    np.testing.assert_allclose(
        metrics["loss_feature"], np.mean(feature_losses), rtol=rtol, atol=1e-6
    )
    np.testing.assert_allclose(metrics["distance_scale"], sigma, rtol=rtol)
    np.testing.assert_allclose(metrics["knn_distance"], sigma, rtol=rtol)
    np.testing.assert_allclose(metrics["reward_entropy"], mean_entropy, rtol=rtol)
    np.testing.assert_allclose(metrics["reward_skill"], np.mean(skills), rtol=rtol)
    learned_phi = features.phi[:, 1 : learner.window_targets + 1]
    np.testing.assert_allclose(
        metrics["mean_phi_norm"],
        np.linalg.norm(learned_phi.mean(axis=(0, 1))),
        rtol=rtol,
    )


def changed(before, after):
    """Whether any array of a tree differs."""
    return any(
        bool(np.any(np.asarray(x) != np.asarray(y)))
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_pretraining_never_sees_the_reward():
    config = make_config()
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    update = make_update(config)
    one, _ = update(state, windows, particles)
    other, _ = update(state, windows._replace(reward=windows.reward * 7), particles)
    assert not changed(one, other)
    assert changed(one.params, state.params)


def test_the_entropy_agent_ignores_the_task_in_its_scalar_target():
    """With weights (0, 1) the reward of a target is the same for every task."""
    config = make_config(td_form="scalar", skill_weight=0.0, entropy_weight=1.0)
    agent = make_agent(config)
    state = trained_state(agent)
    # psi = 0 in both networks leaves the reward alone in the TD error.
    zeros = jax.tree.map(jnp.zeros_like, state.params["successor"])
    state = state._replace(
        params={**state.params, "successor": zeros}, target_params=zeros
    )
    windows, particles = make_batch(config)
    turned = windows._replace(task=windows.task[..., ::-1].copy())
    update = make_update(config)
    _, one = update(state, windows, particles)
    _, other = update(state, turned, particles)
    np.testing.assert_allclose(one["td_error"], other["td_error"], rtol=1e-6)
    assert one["loss_feature"] != other["loss_feature"]


def test_the_td_loss_does_not_move_the_features():
    """Features learn from their own loss: with opposite tasks the gradient flips."""
    config = make_config(max_gradient_norm=1e9)
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    windows = windows._replace(is_first=np.ones_like(windows.is_first))
    # No state was reached by an action, so there is no feature loss; nor a TD loss.
    after, metrics = make_update(config)(state, windows, particles)
    assert metrics["loss_feature"] == 0.0 and metrics["loss_td"] == 0.0
    for name in ("features", "successor"):
        assert not changed(state.params[name], after.params[name])


def test_white_features_do_not_move_all_together():
    """The gradient of the bias of h is the sum over the states: nothing is left."""
    config = make_config(whiten_features=True)
    agent = make_agent(config)
    state = trained_state(agent)
    after, _ = make_update(config)(state, *make_batch(config))
    before = state.params["features"]["params"]["h"]
    now = after.params["features"]["params"]["h"]
    assert np.max(np.abs(now["bias"] - before["bias"])) < 1e-6
    assert np.max(np.abs(now["kernel"] - before["kernel"])) > 3e-5
    # The moments that acting and inference use are those of the particles.
    moments = after.params["whitening"]
    assert moments.weight == 1.0 and np.any(moments.mean != 0.0)


def test_calibrated_features_are_white_over_the_states_given():
    rng = np.random.default_rng(3)
    agent = make_agent(make_config())
    params = agent.init(jax.random.key(0)).params
    states = np.uint8(rng.integers(0, 256, (200, 84, 84, 4)))
    white = agent.features(agent.calibrate(params, states), states).h
    np.testing.assert_allclose(np.mean(white, axis=0), np.zeros(DIM), atol=1e-3)
    np.testing.assert_allclose(np.cov(white.T, ddof=0), np.eye(DIM), atol=1e-2)
    plain = make_agent(make_config(whiten_features=False))
    assert plain.calibrate(params, states) is params


def test_features_stay_raw_unless_they_are_whitened():
    config = make_config(whiten_features=False)
    state = trained_state(make_agent(config))
    after, _ = make_update(config)(state, *make_batch(config))
    assert not changed(state.params["whitening"], after.params["whitening"])


def test_the_share_of_actions_that_depend_on_the_task():
    config = make_config(td_form="off_policy", skill_weight=1.0, entropy_weight=0.0)
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    same = windows._replace(task=np.ones_like(windows.task) / np.sqrt(np.float32(DIM)))
    _, metrics = make_update(config)(state, same, particles)
    assert metrics["task_dependence"] == 0.0
    # Opposite tasks never share a greedy action, if there is no tie.
    sign = np.where(np.arange(3) % 2, -1, 1).astype(np.float32)[:, None, None]
    opposite = same._replace(task=same.task * sign)
    _, metrics = make_update(config)(state, opposite, particles)
    # Three windows with signs +, -, + and the window before them -- +, +, -.
    successor = modules.SuccessorNetwork(
        agent_lib.make_encoder(config.learner),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=True,
    )
    differ = []
    for b in range(3):
        tasks = opposite.task[np.array([b, b - 1])][:, :2].swapaxes(0, 1)
        psi = successor.apply(
            state.params["successor"], opposite.observation[b, :2], tasks
        ).psi
        greedy = np.argmax(np.einsum("tkad,tkd->tka", psi, tasks), axis=-1)
        differ += list(greedy[:, 0] != greedy[:, 1])
    np.testing.assert_allclose(metrics["task_dependence"], np.mean(differ), rtol=1e-6)
    assert 0 < np.mean(differ) < 1


def test_features_move_without_any_td_target():
    config = make_config()
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    # States 1 and 2 are reached, but both starts are cut off: 0 and 1 end episodes.
    is_first = np.zeros_like(windows.is_first)
    is_first[:, 2] = True
    after, _ = make_update(config)(
        state, windows._replace(is_first=is_first), particles
    )
    assert changed(state.params["features"], after.params["features"])
    assert changed(state.params["successor"], after.params["successor"])
    assert not changed(state.target_params, after.target_params)


def test_target_is_copied_every_period():
    config = make_config(target_period=3)
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    update = make_update(config)
    target = state.target_params
    for number in range(1, 5):
        state, _ = update(state, windows, particles)
        assert int(state.num_updates) == number
        if number == 3:
            target = state.params["successor"]
        assert not changed(state.target_params, target)


def test_update_is_traced_once():
    config = make_config()
    agent = make_agent(config)
    traces = []

    @jax.jit
    def update(state, windows, particles):
        traces.append(1)
        encoded = agent.particles(state.params, particles)
        return agent.update(state, windows, encoded)

    state = agent.init(jax.random.key(0))
    for seed in range(3):
        state, _ = update(state, *make_batch(config, seed))
    assert len(traces) == 1


# The update with reward.


@pytest.mark.parametrize("unit_values", [False, True])
def test_finetuning_minimises_the_td_error_of_the_reward(unit_values):
    config = make_config(
        reward_clip=1.0, cut_at_life_loss=True, unit_values=unit_values
    )
    unit = 0.1 if unit_values else 1.0
    learner = config.learner
    agent = make_agent(config)
    state = agent.init_finetune(trained_state(agent))
    windows, _ = make_batch(config)
    w, scale = np.float32([0.6, -0.8]), np.float32(0.25)
    _, metrics = jax.jit(agent.finetune_update)(state, windows, w, scale)
    successor = modules.SuccessorNetwork(
        agent_lib.make_encoder(learner),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=True,
    )

    def q_values(params, observation):
        output = successor.apply(params, observation[None], w[None, None])
        return np.float64(output.psi[0, 0]) @ np.float64(w)

    td_errors = []
    for b in range(learner.num_windows):
        window = pick(windows, b)
        for start in range(learner.window_targets):
            walk = references_agent.walk_target(
                window, start, n_steps=3, discount=0.9, task_cut=False, life_cut=True
            )
            if walk is None:
                continue
            places, discounts, bootstrap, product = walk
            rewards = np.clip(np.float64(window.reward[places]), -1, 1)
            rewards *= unit / scale
            after = q_values(state.target_params, window.observation[bootstrap])
            before = q_values(state.params["successor"], window.observation[start])
            target = np.sum(discounts * rewards) + product * np.max(after)
            td_errors.append(target - before[window.action[start]])
    np.testing.assert_allclose(
        metrics["loss_td"], np.mean(0.5 * np.square(td_errors)), rtol=2e-5
    )
    np.testing.assert_allclose(
        metrics["td_error"], np.mean(np.abs(td_errors)), rtol=2e-5
    )


def test_finetuning_leaves_the_features_and_their_scale_alone():
    config = make_config(target_period=1000)
    agent = make_agent(config)
    state = agent.init_finetune(trained_state(agent))
    windows, _ = make_batch(config)
    w = np.float32([1.0, 0.0])
    after, _ = jax.jit(agent.finetune_update)(state, windows, w, np.float32(1))
    assert not changed(state.params["features"], after.params["features"])
    assert not changed(state.distance_scale, after.distance_scale)
    assert not changed(state.target_params, after.target_params)
    assert changed(state.params["successor"], after.params["successor"])


def test_the_epsilon_of_adam_is_in_the_unit_of_the_values():
    """Far above the gradient it divides the step; a tenth of it makes ten steps of one.

    The reward is learned in its own unit in both, so the gradients are the same.
    """
    steps = []
    for unit_values, scale in ((True, 0.1), (False, 1.0)):
        config = make_config(
            unit_values=unit_values,
            adam_epsilon=1e6,
            finetune_learning_rate=1e4,
            max_gradient_norm=1e9,
        )
        agent = make_agent(config)
        state = agent.init_finetune(trained_state(agent))
        windows, _ = make_batch(config)
        w = np.float32([1.0, 0.0])
        after, _ = jax.jit(agent.finetune_update)(state, windows, w, np.float32(scale))
        kernels = [
            x.params["successor"]["params"]["psi"]["kernel"] for x in (after, state)
        ]
        steps.append(np.asarray(kernels[0] - kernels[1]))
    assert np.max(np.abs(steps[1])) > 1e-4
    np.testing.assert_allclose(steps[0], 10 * steps[1], rtol=1e-2, atol=1e-5)


def test_init_finetune_keeps_all_that_was_learned():
    agent = make_agent(make_config())
    state = trained_state(agent)._replace(num_updates=jnp.int32(7))
    kept = agent.init_finetune(state)
    for name in ("params", "target_params", "distance_scale"):
        assert not changed(getattr(state, name), getattr(kept, name))
    assert int(kept.num_updates) == 0


@pytest.mark.parametrize(
    "bound, expected", [(1.0, [-1, -0.5, 0, 1]), (0.0, [-9, -0.5, 0, 30])]
)
def test_rewards_are_clipped_unless_the_bound_is_zero(bound, expected):
    rewards = jnp.float32([-9, -0.5, 0, 30])
    np.testing.assert_array_equal(agent_lib.clip_rewards(rewards, bound), expected)


# Acting.


def make_timestep(rng, num_envs, **fields):
    timestep = types.TimeStep(
        frame=rng.integers(0, 256, (num_envs, 84, 84), dtype=np.uint8),
        reward=np.zeros(num_envs, np.float32),
        terminated=np.zeros(num_envs, bool),
        truncated=np.zeros(num_envs, bool),
        is_first=np.zeros(num_envs, bool),
        lives=np.full(num_envs, 3, np.int32),
        ram=np.zeros((num_envs, 128), np.uint8),
    )
    return timestep._replace(**fields)


def make_act(agent, *, epsilon=0.0, explore=True, use_gpi=False):
    return jax.jit(
        functools.partial(agent.act, epsilon=epsilon, explore=explore, use_gpi=use_gpi)
    )


def test_a_task_is_held_for_its_steps_then_drawn_anew():
    agent = make_agent(make_config(task_steps=3))
    state, actor = agent.init(jax.random.key(0)), agent.init_actor(4)
    act, rng = make_act(agent), np.random.default_rng(0)
    drawn = []
    for _ in range(9):
        actor, step = act(state.params, actor, make_timestep(rng, 4), jax.random.key(5))
        np.testing.assert_array_equal(step.task, actor.task)
        drawn.append(np.asarray(step.task))
    drawn = np.stack(drawn)  # [9, 4, D]
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1.0, rtol=1e-6)
    for block in range(3):
        held = drawn[3 * block : 3 * block + 3]
        np.testing.assert_array_equal(held, np.repeat(held[:1], 3, axis=0))
    assert len(np.unique(drawn[::3].reshape(-1, DIM), axis=0)) == 12


def test_a_pinned_task_stays():
    agent = make_agent(make_config(task_steps=1))
    state = agent.init(jax.random.key(0))
    w = jnp.float32([0.0, -1.0])
    actor = agent_lib.pin_task(agent.init_actor(2), w)
    act, rng = make_act(agent), np.random.default_rng(0)
    for _ in range(4):
        actor, step = act(state.params, actor, make_timestep(rng, 2), jax.random.key(5))
        np.testing.assert_array_equal(step.task, [w, w])


def values_of(agent_config, params, step, stack, tasks_per_env):
    successor = modules.SuccessorNetwork(
        agent_lib.make_encoder(agent_config),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=agent_config.td_form in ("split", "off_policy"),
    )
    return successor.apply(params["successor"], stack, tasks_per_env)


@pytest.mark.parametrize("form", ["off_policy", "split", "vector"])
@pytest.mark.parametrize("explore", [True, False])
def test_greedy_actions_maximise_the_value(form, explore):
    config = make_config(td_form=form, skill_weight=0.5, entropy_weight=4.0)
    agent = make_agent(config)
    state, actor = agent.init(jax.random.key(3)), agent.init_actor(40)
    timestep = make_timestep(np.random.default_rng(0), 40)
    actor, step = make_act(agent, explore=explore)(
        state.params, actor, timestep, jax.random.key(5)
    )
    output = values_of(
        config.learner, state.params, step, actor.stack, step.task[:, None]
    )
    psi = np.float64(output.psi[:, 0])
    values = np.einsum("ead,ed->ea", psi, np.float64(step.task))
    if form != "vector" and explore:
        values = 0.5 * values + 4.0 * np.float64(output.exploration[:, 0])
    np.testing.assert_array_equal(step.action, np.argmax(values, axis=1))
    assert len(np.unique(step.action)) > 1


def test_improvement_over_policies_values_each_by_the_task_itself():
    """With kappa huge the candidates are the task itself, so nothing changes."""
    same = make_agent(make_config(gpi_concentration=1e6))
    wide = make_agent(make_config(gpi_concentration=0.0, gpi_tasks=64))
    state = same.init(jax.random.key(3))
    timestep = make_timestep(np.random.default_rng(0), 40)
    actions = {}
    for name, agent, use_gpi in (
        ("plain", same, False),
        ("same", same, True),
        ("wide", wide, True),
    ):
        _, step = make_act(agent, explore=False, use_gpi=use_gpi)(
            state.params, agent.init_actor(40), timestep, jax.random.key(5)
        )
        actions[name] = np.asarray(step.action)
    assert np.mean(actions["plain"] == actions["same"]) > 0.9
    assert np.any(actions["plain"] != actions["wide"])


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_draws_as_distrax_does(epsilon):
    """Also where two actions are equally good: those of every other row here."""
    values = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    values[::2, 1] = values[::2, 4] = 9.0
    key = jax.random.key(7)
    actions = agent_lib.epsilon_greedy(key, values, epsilon)
    with jax.numpy_dtype_promotion("standard"):
        policy = distrax.EpsilonGreedy(jnp.asarray(values), epsilon)
    np.testing.assert_array_equal(actions, policy.sample(seed=key))
    if epsilon == 0.0:
        assert set(np.asarray(actions[::2])) == {1, 4}


def test_random_actions_are_uniform_over_all_actions():
    agent = make_agent(make_config())
    state = agent.init(jax.random.key(0))
    _, step = make_act(agent, epsilon=1.0)(
        state.params,
        agent.init_actor(900),
        make_timestep(np.random.default_rng(0), 900),
        jax.random.key(1),
    )
    counts = np.bincount(step.action, minlength=NUM_ACTIONS)
    # 300 expected each; chi-square of 2 degrees below 13.8 with probability 0.999.
    assert np.sum((counts - 300.0) ** 2 / 300.0) < 13.8


def test_steps_say_what_was_seen():
    agent = make_agent(make_config())
    state, actor = agent.init(jax.random.key(0)), agent.init_actor(3)
    act, rng = make_act(agent), np.random.default_rng(0)
    first = make_timestep(rng, 3, is_first=np.ones(3, bool))
    actor, step = act(state.params, actor, first, jax.random.key(1))
    assert not np.any(step.life_lost)
    np.testing.assert_array_equal(step.id, [0, 1, 2])
    second = make_timestep(
        rng,
        3,
        lives=np.int32([3, 2, 2]),
        is_first=np.array([False, False, True]),
        reward=np.float32([5, 0, -2]),
        terminated=np.array([False, True, False]),
    )
    actor, step = act(state.params, actor, second, jax.random.key(1))
    np.testing.assert_array_equal(step.life_lost, [False, True, False])
    np.testing.assert_array_equal(step.id, [3, 4, 5])
    for name in ("frame", "reward", "terminated", "is_first"):
        np.testing.assert_array_equal(getattr(step, name), getattr(second, name))
    np.testing.assert_array_equal(actor.lives, second.lives)
    np.testing.assert_array_equal(actor.stack[..., -1], second.frame)


@pytest.mark.parametrize("preset", config_lib.PRESETS)
def test_every_preset_updates_a_state_of_its_own_shape(preset):
    """Traced, not run: the networks of the large presets take long on a CPU."""
    config = config_lib.preset_config(preset)
    learner = config.learner
    agent = make_agent(config)

    def windows(num_windows, num_states):
        shape = (num_windows, num_states)
        window = make_windows(np.random.default_rng(0), 1, 1)
        task = jax.ShapeDtypeStruct((*shape, learner.feature_dim), np.float32)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*shape, *x.shape[2:]), x.dtype), window
        )._replace(task=task)

    state = jax.eval_shape(agent.init, jax.random.key(0))
    batch = windows(learner.num_windows, learner.window_states)
    particles = jax.eval_shape(
        agent.particles, state.params, windows(learner.num_particles, 1)
    )
    after, _ = jax.eval_shape(agent.update, state, batch, particles)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    state = jax.eval_shape(agent.init_finetune, state)
    task = jax.ShapeDtypeStruct((learner.feature_dim,), np.float32)
    scale = jax.ShapeDtypeStruct((), np.float32)
    after, _ = jax.eval_shape(agent.finetune_update, state, batch, task, scale)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.parametrize("num_rows", [1, 16, 17, 40])
@pytest.mark.parametrize("needed", ["none", "some", "all"])
def test_rows_are_computed_where_they_are_needed(num_rows, needed):
    share = {"none": 0.0, "some": 0.5, "all": 1.0}[needed]
    is_needed = np.random.default_rng(num_rows).random(num_rows) < share
    values = {"x": np.arange(1.0, num_rows + 1, dtype=np.float32) ** 2}

    found = jax.jit(
        lambda is_needed: agent_lib.apply_where(
            lambda row: {"x": jnp.asarray(values["x"])[row]}, is_needed
        )
    )(is_needed)
    np.testing.assert_array_equal(found["x"], np.where(is_needed, values["x"], 0.0))
