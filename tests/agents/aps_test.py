"""Tests of aps_jax.agents.aps: acting, adapting, and both updates."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_agent

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import base
from aps_jax.networks import modules
from aps_jax.ops import whitening
from aps_jax.replay import buffer

NUM_ACTIONS = 3
DIM = 2
OBSERVATION = types.ObservationSpec((4, 4, 2), 1, 1)


def make_config(**options):
    """A small agent: 2 targets a window, 3 steps, 7 particles."""
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "hidden_units": 8,
        "feature_dim": DIM,
        "num_neighbors": 2,
        "num_particles": 7,
        "n_steps": 3,
        "batch_size": 6,
        "window_targets": 2,
        "discount": 0.9,
        "gpi_tasks": 3,
        "target_period": 3,
        **options,
    }
    return config_lib.replace_options(config_lib.Config(), **options)


@functools.cache
def make_agent(config):
    return config.make_agent(NUM_ACTIONS, OBSERVATION)


@functools.cache
def make_update(config):
    """The jitted update, compiled once for all tests of a config.

    It takes particles as windows of one state, and encodes them.
    """
    return jax.jit(functools.partial(apply_update, make_agent(config)))


def apply_update(agent, state, windows, particles):
    learner = agent.pretrain.learner
    batch = base.Batch(windows._replace(reward=None), learner.encode(state, particles))
    return learner.update(state, batch, jax.random.key(9))[:2]


@functools.cache
def make_finetune_update(config):
    """The jitted update from reward, for a task and a scale of the reward."""
    update = make_agent(config).finetune.learner.update

    @jax.jit
    def of_task(state, windows, task, reward_scale):
        stats = state.stats._replace(task=task, reward_scale=reward_scale)
        state = state._replace(stats=stats)
        return update(state, base.Batch(windows, None), jax.random.key(9))[:2]

    return of_task


def make_windows(rng, num_windows, num_states, *, first_id=0):
    """Windows of random planes in which episodes end and tasks change."""
    shape = (num_windows, num_states)
    is_first = rng.random(shape) < 0.2
    # Half of the episodes end by game over, the others by the time limit.
    terminated = np.zeros(shape, bool)
    terminated[:, :-1] = is_first[:, 1:] & (rng.random(shape) < 0.5)[:, 1:]
    task = rng.normal(size=(num_windows, 2, DIM))
    task /= np.linalg.norm(task, axis=-1, keepdims=True)
    changes = np.cumsum(rng.random(shape) < 0.2, axis=1) > 0
    return buffer.Window(
        observation=rng.integers(0, 2, (*shape, *OBSERVATION.shape), dtype=np.uint8),
        action=rng.integers(0, NUM_ACTIONS, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32) * 2,
        terminated=terminated,
        is_first=is_first,
        life_lost=rng.random(shape) < 0.2,
        id=(first_id + np.arange(num_windows * num_states, dtype=np.int32)).reshape(
            shape
        ),
        extras={
            "task": np.where(changes[..., None], task[:, 1:], task[:, :1]).astype(
                np.float32
            )
        },
    )


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    learner = config.learner
    num_windows = learner.batch_size // learner.window_targets
    windows = make_windows(rng, num_windows, learner.window_states)
    particles = make_windows(rng, learner.num_particles, 1, first_id=1000)
    # One particle is a state of the first window: it is no neighbour of itself.
    particles.observation[0, 0] = windows.observation[0, 1]
    particles.id[0, 0] = windows.id[0, 1]
    return windows, particles


def with_task(windows, task):
    return windows._replace(extras={"task": task})


def features_of(config, state, observation):
    network = modules.FeatureNetwork(
        base.make_encoder(config.learner, OBSERVATION), DIM
    )
    return jax.device_get(network.apply(state.params["features"], observation))


def pick(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def trained_state(agent, seed=0):
    """A state whose target differs from its network and whose moments are not empty."""
    state = agent.init(jax.random.key(seed))
    other = agent.init(jax.random.key(seed + 1))
    return state._replace(target_params=other.params["successor"])


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
        ("off_policy", (0.7, 0.3), {"further_tasks": 2}),
        ("scalar", (0.7, 0.3), {"further_tasks": 1}),
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

    features = features_of(config, state, windows.observation)
    particle_h = features_of(config, state, particles.observation).h
    if learner.whiten_features:
        white = references_agent.whitened(features.h, particle_h[:, 0])
        features = features._replace(
            h=white, phi=white / np.linalg.norm(white, axis=-1, keepdims=True)
        )
        particle_h = references_agent.whitened(particle_h, particle_h[:, 0])
    # Features that differ by little lose digits when their mean is subtracted.
    rtol = 1e-3 if learner.whiten_features else 2e-5
    successor = modules.SuccessorNetwork(
        base.make_encoder(learner, OBSERVATION),
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
            task=windows.extras["task"][b],
            life_cut=False,
        )
        for b in range(windows.action.shape[0])
        for start in range(learner.window_targets)
    }
    # The states that targets sum, and no others, have a reward and count in its scale.
    states = sorted({(b, p) for (b, _), walk in walks.items() if walk for p in walk[0]})
    assert len(states) < windows.action.shape[0] * (learner.window_states - 1)
    distances = [rewarder(features.h[i], windows.id[i], sigma=1.0)[1] for i in states]
    sigma = np.mean(distances)
    r_entropy = {
        i: rewarder(features.h[i], windows.id[i], sigma=sigma)[0] for i in states
    }

    mean_entropy = np.mean(list(r_entropy.values()))

    td_losses, feature_losses, skills = [], [], []
    for b in range(windows.action.shape[0]):
        window = pick(windows, b)
        for start in range(learner.window_targets):
            reached = start + 1
            if not window.is_first[reached]:
                cosine = features.phi[b, reached] @ window.extras["task"][start]
                feature_losses.append(-np.float64(cosine))
            walk = walks[b, start]
            if walk is None:
                continue
            places, discounts, bootstrap, product = walk
            skills += [
                features.phi[b, p] @ window.extras["task"][start] for p in places
            ]
            of_tasks = []
            # Its own task, and those of the windows before it.
            for other in range(1 + learner.further_tasks):
                w = windows.extras["task"][b - other, start]
                observation = window.observation
                before = predict(state.params["successor"], observation[start], w)
                after = predict(state.target_params, observation[bootstrap], w)
                of_tasks.append(
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
            td_losses.append(np.mean(of_tasks))
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
    turned = with_task(windows, windows.extras["task"][..., ::-1].copy())
    update = make_update(config)
    _, one = update(state, windows, particles)
    _, other = update(state, turned, particles)
    np.testing.assert_allclose(one["td_error"], other["td_error"], rtol=1e-6)
    assert one["loss_feature"] != other["loss_feature"]


def test_permuted_tasks_are_those_of_another_window():
    config = make_config(permuted="task")
    state = trained_state(make_agent(config))
    windows, particles = make_batch(config)
    rolled = with_task(windows, np.roll(windows.extras["task"], 1, axis=0))
    after, found = make_update(config)(state, windows, particles)
    expected, metrics = make_update(make_config())(state, rolled, particles)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    assert not changed(after.params, expected.params)


def test_a_permuted_bonus_is_as_large_and_of_another_window():
    """Where psi is 0 the TD error is the bonus; permuted, its mean is the same."""
    options = {"td_form": "scalar", "skill_weight": 0.0, "entropy_weight": 1.0}
    config, plain = make_config(permuted="entropy", **options), make_config(**options)
    state = trained_state(make_agent(config))
    zeros = jax.tree.map(jnp.zeros_like, state.params["successor"])
    blank = state._replace(
        params={**state.params, "successor": zeros}, target_params=zeros
    )
    windows, particles = make_batch(config)
    none = np.zeros_like(windows.is_first)
    windows = windows._replace(is_first=none, terminated=none)
    task = windows.extras["task"]
    windows = with_task(windows, np.broadcast_to(task[:, :1], task.shape).copy())
    found, expected = (
        [make_update(one)(before, windows, particles)[1] for before in (blank, state)]
        for one in (config, plain)
    )
    np.testing.assert_allclose(found[0]["td_error"], expected[0]["td_error"], rtol=1e-5)
    # Beside values that differ between windows, the squares of the errors tell.
    assert abs(found[1]["loss_td"] / expected[1]["loss_td"] - 1.0) > 1e-4


def test_the_td_loss_does_not_move_the_features():
    """Features learn from their own loss: with opposite tasks the gradient flips."""
    config = make_config()
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
    # The moments are those of the particles.
    moments = after.stats.whitening
    assert moments.weight == 1.0 and np.any(moments.mean != 0.0)


def test_calibrated_features_are_white_over_the_states_given():
    rng = np.random.default_rng(3)
    config = make_config()
    agent = make_agent(config)
    state = agent.init(jax.random.key(0))
    windows = make_windows(rng, 200, 1)
    calibrated = agent.calibrate(state, windows)
    h = features_of(config, state, windows.observation[:, 0]).h
    white = np.asarray(whitening.whiten(calibrated.stats.calibrated, h))
    np.testing.assert_allclose(np.mean(white, axis=0), np.zeros(DIM), atol=1e-3)
    np.testing.assert_allclose(np.cov(white.T, ddof=0), np.eye(DIM), atol=1e-2)
    embedded = agent.embed(calibrated, windows)
    np.testing.assert_allclose(
        embedded["phi"],
        white / np.linalg.norm(white, axis=-1, keepdims=True),
        rtol=1e-3,
        atol=1e-5,
    )
    np.testing.assert_array_equal(embedded["task"], windows.extras["task"][:, 0])
    # What is learned does not change, and plain features stay as they are.
    assert calibrated._replace(stats=state.stats) == state
    plain = make_agent(make_config(whiten_features=False))
    assert plain.calibrate(state, windows) is state


def test_features_stay_raw_unless_they_are_whitened():
    config = make_config(  # Compiled above.
        td_form="split",
        skill_weight=0.7,
        entropy_weight=0.3,
        unit_values=False,
        whiten_features=False,
    )
    state = trained_state(make_agent(config))
    after, _ = make_update(config)(state, *make_batch(config))
    assert not changed(state.stats.whitening, after.stats.whitening)


def test_the_share_of_actions_that_depend_on_the_task():
    config = make_config(td_form="off_policy", skill_weight=1.0, entropy_weight=0.0)
    agent = make_agent(config)
    state = trained_state(agent)
    windows, particles = make_batch(config)
    ones = np.ones_like(windows.extras["task"])
    same = with_task(windows, ones / np.sqrt(np.float32(DIM)))
    _, metrics = make_update(config)(state, same, particles)
    assert metrics["task_dependence"] == 0.0
    # Opposite tasks never share a greedy action, if there is no tie.
    sign = np.where(np.arange(3) % 2, -1, 1).astype(np.float32)[:, None, None]
    opposite = with_task(windows, same.extras["task"] * sign)
    _, metrics = make_update(config)(state, opposite, particles)
    # Three windows with signs +, -, + and the window before them -- +, +, -.
    successor = modules.SuccessorNetwork(
        base.make_encoder(config.learner, OBSERVATION),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=True,
    )
    differ = []
    for b in range(3):
        tasks = opposite.extras["task"][np.array([b, b - 1])][:, :2].swapaxes(0, 1)
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
    config = make_config()
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


# The update with reward.


@pytest.mark.parametrize("unit_values", [False, True])
def test_finetuning_minimises_the_td_error_of_the_reward(unit_values):
    config = make_config(
        reward_clip=1.0, cut_at_life_loss=True, unit_values=unit_values
    )
    unit = 0.1 if unit_values else 1.0
    learner = config.learner
    agent = make_agent(config)
    state = agent.start_finetune(trained_state(agent))
    windows, _ = make_batch(config)
    w, scale = np.float32([0.6, -0.8]), np.float32(0.25)
    _, metrics = make_finetune_update(config)(state, windows, w, scale)
    successor = modules.SuccessorNetwork(
        base.make_encoder(learner, OBSERVATION),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=True,
    )

    def q_values(params, observation):
        output = successor.apply(params, observation[None], w[None, None])
        return np.float64(output.psi[0, 0]) @ np.float64(w)

    td_errors = []
    for b in range(windows.action.shape[0]):
        window = pick(windows, b)
        for start in range(learner.window_targets):
            walk = references_agent.walk_target(
                window, start, n_steps=3, discount=0.9, task=None, life_cut=True
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
    config = make_config(
        reward_clip=1.0, cut_at_life_loss=True, unit_values=True
    )  # Compiled above.
    agent = make_agent(config)
    state = agent.start_finetune(trained_state(agent))
    windows, _ = make_batch(config)
    w = np.float32([1.0, 0.0])
    after, _ = make_finetune_update(config)(state, windows, w, np.float32(1))
    assert not changed(state.params["features"], after.params["features"])
    assert not changed(state.stats.distance_scale, after.stats.distance_scale)
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
        state = agent.start_finetune(trained_state(agent))
        windows, _ = make_batch(config)
        w = np.float32([1.0, 0.0])
        after, _ = make_finetune_update(config)(state, windows, w, np.float32(scale))
        kernels = [
            x.params["successor"]["params"]["psi"]["kernel"] for x in (after, state)
        ]
        steps.append(np.asarray(kernels[0] - kernels[1]))
    assert np.max(np.abs(steps[1])) > 1e-4
    np.testing.assert_allclose(steps[0], 10 * steps[1], rtol=1e-2, atol=1e-5)


def test_start_finetune_keeps_all_that_was_learned():
    agent = make_agent(make_config())
    state = trained_state(agent)._replace(num_updates=jnp.int32(7))
    kept = agent.start_finetune(state)
    for name in ("params", "target_params", "stats"):
        assert not changed(getattr(state, name), getattr(kept, name))
    assert int(kept.num_updates) == 0


@pytest.mark.parametrize(
    "bound, expected", [(1.0, [-1, -0.5, 0, 1]), (0.0, [-9, -0.5, 0, 30])]
)
def test_rewards_are_clipped_unless_the_bound_is_zero(bound, expected):
    rewards = jnp.float32([-9, -0.5, 0, 30])
    np.testing.assert_array_equal(base.clip_rewards(rewards, bound), expected)


# Adapting.


def make_rollouts(state, rng, *, num_steps=60, is_first=None):
    """Rollouts of random states, with a reward along a direction of the features."""
    windows = make_windows(rng, num_steps, 1)

    def encode(function, state):
        return np.asarray(function(state, windows))

    agent = make_agent(make_config())
    phi = encode(lambda s, w: agent.embed(s, w)["phi"], state)
    reward = np.float32(0.5 * phi @ np.float32([0.6, -0.8]))
    if is_first is None:
        is_first = np.zeros(num_steps, bool)
    return base.Rollouts(reward, is_first, encode)


def calibrated_state(agent):
    windows = make_windows(np.random.default_rng(4), 100, 1)
    return agent.calibrate(agent.init(jax.random.key(0)), windows)


def test_adapting_finds_the_direction_of_the_reward():
    agent = make_agent(make_config(ridge=0.0))
    state = calibrated_state(agent)
    rollouts = make_rollouts(state, np.random.default_rng(5))
    adapted, facts = agent.adapt(jax.random.key(1), state, rollouts)
    np.testing.assert_allclose(adapted.stats.task, [0.6, -0.8], atol=1e-4)
    np.testing.assert_allclose(adapted.stats.reward_scale, 0.5, rtol=1e-3)
    assert facts["num_samples"] == 60 and not facts["is_fallback"]
    np.testing.assert_allclose(facts["task"], adapted.stats.task)
    assert facts["r_squared"] > 0.999
    assert not changed(state.params, adapted.params)


def test_adapting_leaves_reset_frames_out():
    agent = make_agent(make_config(ridge=0.0))
    state = calibrated_state(agent)
    is_first = np.arange(60) % 7 == 0
    rollouts = make_rollouts(state, np.random.default_rng(5), is_first=is_first)
    # Had their rewards counted, they would decide everything.
    reward = np.where(is_first, 1e3, rollouts.reward).astype(np.float32)
    adapted, facts = agent.adapt(
        jax.random.key(1), state, rollouts._replace(reward=reward)
    )
    np.testing.assert_allclose(adapted.stats.task, [0.6, -0.8], atol=1e-4)
    assert facts["num_samples"] == 60 - int(is_first.sum())


def test_an_untrained_agent_learns_in_the_unit_of_the_reward():
    config = make_config()
    agent = make_agent(config)
    state = agent.init(jax.random.key(0))
    adapted, facts = agent.adapt(jax.random.key(1), state, None)
    np.testing.assert_allclose(np.linalg.norm(adapted.stats.task), 1.0, rtol=1e-6)
    # So the reward is learned as it is: value_unit / reward_scale is 1.
    assert facts["is_fallback"]
    np.testing.assert_allclose(
        adapted.stats.reward_scale, config.learner.value_unit, rtol=1e-6
    )
    # Adam's epsilon is in that unit too, and in psi's for a pretrained agent.
    assert adapted.stats.unit == 1.0
    np.testing.assert_allclose(state.stats.unit, config.learner.value_unit)


# Acting.


def make_observation(rng, num_envs):
    """First observations of an episode."""
    return base.Observation(
        rng.integers(0, 2, (num_envs, *OBSERVATION.shape), dtype=np.uint8),
        np.ones(num_envs, bool),
    )


def test_tasks_are_held_and_redrawn_at_other_steps_in_each_environment():
    agent = make_agent(make_config(task_steps=3))
    policy = agent.pretrain.policy
    state, memory = agent.init(jax.random.key(0)), policy.init(4)
    act, rng = jax.jit(policy.act), np.random.default_rng(0)
    drawn = []
    for time, key in enumerate(jax.random.split(jax.random.key(5), 9)):
        # A new episode begins in environment 1 at step 4.
        is_first = np.array([False, time == 4, False, False])
        observation = make_observation(rng, 4)._replace(is_first=is_first)
        memory, decision = act(state, memory, observation, key)
        np.testing.assert_array_equal(decision.extras["task"], memory.task)
        drawn.append(np.asarray(memory.task))
    drawn = np.stack(drawn)  # [9, 4, D]
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1.0, rtol=1e-6)
    changed_at = [
        [t for t in range(9) if t == 0 or np.any(drawn[t, e] != drawn[t - 1, e])]
        for e in range(4)
    ]
    # Held for 3 steps each; environments 2 and 3 begin 1 and 2 steps ahead.
    assert changed_at == [[0, 3, 6], [0, 3, 4, 7], [0, 2, 5, 8], [0, 1, 4, 7]]


def test_the_tasks_of_policy_improvement_are_held_for_a_game():
    agent = make_agent(make_config(gpi_tasks=3))
    policy = agent.play_adapted(0.0)
    state = agent.init(jax.random.key(0))
    task = jnp.float32([0.6, 0.8])
    state = state._replace(stats=state.stats._replace(task=task))
    act, rng = jax.jit(policy.act), np.random.default_rng(0)
    memory, held = policy.init(2), []
    for time, key in enumerate(jax.random.split(jax.random.key(5), 4)):
        is_first = np.array([time == 0, time in (0, 2)])
        observation = make_observation(rng, 2)._replace(is_first=is_first)
        memory, _ = act(state, memory, observation, key)
        held.append(np.asarray(memory.candidates))
    first, second = np.stack(held, axis=1)  # each [time, 1 + 3, D]
    np.testing.assert_array_equal(first, np.repeat(first[:1], 4, axis=0))
    np.testing.assert_array_equal(second[0], second[1])
    np.testing.assert_array_equal(second[2], second[3])
    assert np.any(second[1] != second[2])
    np.testing.assert_allclose(first[0, 0], task, rtol=1e-6)  # Its own is one of them.


def test_the_inferred_task_is_followed_and_a_skill_is_kept():
    agent = make_agent(make_config(task_steps=1))
    w = jnp.float32([0.0, -1.0])
    state = agent.init(jax.random.key(0))
    state = state._replace(stats=state.stats._replace(task=w))
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(5), 4)
    for make in (agent.play, agent.play_adapted, lambda _: agent.finetune.policy):
        policy = make(0.0)
        memory, decision = jax.jit(policy.act)(
            state, policy.init(2), make_observation(rng, 2), keys[0]
        )
        np.testing.assert_array_equal(decision.extras["task"], [w, w])
    policy = agent.play_skills(0.0)
    act, memory, drawn = jax.jit(policy.act), policy.init(2), []
    for time, key in enumerate(keys):
        observation = make_observation(rng, 2)._replace(is_first=np.full(2, time == 0))
        memory, decision = act(state, memory, observation, key)
        drawn.append(np.asarray(decision.extras["task"]))
    np.testing.assert_array_equal(np.stack(drawn), np.stack(drawn[:1] * 4))
    assert np.any(drawn[0][0] != drawn[0][1])


@pytest.mark.parametrize("form", ["off_policy", "split", "vector"])
@pytest.mark.parametrize("explore", [True, False])
def test_greedy_actions_maximise_the_value(form, explore):
    config = make_config(
        td_form=form, skill_weight=0.5, entropy_weight=4.0, pretrain_epsilon=0.0
    )
    agent = make_agent(config)
    state = agent.init(jax.random.key(3))
    policy = agent.pretrain.policy if explore else agent.play_skills(0.0)
    observation = make_observation(np.random.default_rng(0), 40)
    memory, decision = jax.jit(policy.act)(
        state, policy.init(40), observation, jax.random.key(5)
    )
    successor = modules.SuccessorNetwork(
        base.make_encoder(config.learner, OBSERVATION),
        NUM_ACTIONS,
        DIM,
        hidden=8,
        exploration_head=form in ("split", "off_policy"),
    )
    output = successor.apply(
        state.params["successor"], observation.frames, memory.task[:, None]
    )
    psi = np.float64(output.psi[:, 0])
    values = np.einsum("ead,ed->ea", psi, np.float64(memory.task))
    windows = make_windows(np.random.default_rng(1), 40, 1)
    windows = with_task(windows, memory.task[:, None])
    windows = windows._replace(observation=observation.frames[:, None])
    # In the unit of phi^T w itself.
    predicted = agent.predict(state, windows)
    unit = config.learner.value_unit
    np.testing.assert_allclose(predicted, values.max(axis=1) / unit, rtol=1e-4)
    if form != "vector" and explore:
        values = 0.5 * values + 4.0 * np.float64(output.exploration[:, 0])
    np.testing.assert_array_equal(decision.action, np.argmax(values, axis=1))
    assert len(np.unique(decision.action)) > 1


def test_improvement_over_policies_values_each_by_the_task_itself():
    """With kappa huge the candidates are the task itself, so nothing changes."""
    same = make_agent(make_config(gpi_concentration=1e6))
    wide = make_agent(make_config(gpi_concentration=0.0, gpi_tasks=64))
    state = same.init(jax.random.key(3))
    observation = make_observation(np.random.default_rng(0), 40)
    angles = np.linspace(0.0, 6.0, 7)
    tasks = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def actions(policy):
        @jax.jit
        def action(task):
            of_task = state._replace(stats=state.stats._replace(task=task))
            _, decision = policy.act(
                of_task, policy.init(40), observation, jax.random.key(5)
            )
            return decision.action

        return np.stack([action(task) for task in tasks])

    plain = actions(same.play(0.0))
    same_actions = actions(same.play_adapted(0.0))
    wide_actions = actions(wide.play_adapted(0.0))
    assert np.mean(plain == same_actions) > 0.9
    assert np.any(plain != wide_actions)
