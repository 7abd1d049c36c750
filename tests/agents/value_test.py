"""Tests of aps_jax.agents.value: targets, losses, gradients, resets, options."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_agent
import rlax
from dqn_test import NUM_ACTIONS, make_windows

from aps_jax import config as config_lib
from aps_jax.agents import auxiliary, base, value
from aps_jax.envs.atari import OBSERVATION
from aps_jax.networks import value_heads

ATOMS = np.linspace(-10, 10, 51, dtype=np.float32)
# Nothing random: what an update makes of a batch can be computed again.
PLAIN = {"noisy_sigma": 0.0, "shift_pad": 0, "intensity_scale": 0.0}


def make_config(agent, **options):
    return config_lib.replace_options(
        config_lib.preset_config("smoke", agent), discount=0.9, **options
    )


# ------------------------------------------------------------ a distribution's target


@jax.jit
def target_of(atoms, p_t, r_t, discount_t):
    """The projected target, out of the gradient of the loss: softmax - target."""
    logits = jnp.log(jnp.maximum(p_t, 1e-30))[None]

    def loss(logits_tm1):
        selector = jnp.zeros(1)
        return value.categorical_loss(
            atoms, logits_tm1, jnp.int32(0), r_t, discount_t, logits, selector
        )[0]

    return 1.0 / len(p_t) - jax.grad(loss)(jnp.zeros((1, len(p_t))))[0]


def all_at(place):
    return np.where(np.isclose(ATOMS, place), 1.0, 0.0)


@pytest.mark.parametrize(
    "atoms, p_t, r_t, discount_t, expected",
    [
        ([-1, 0, 1], [0.2, 0.3, 0.5], 0.5, 0.5, {0: 0.0, 1: 0.35, 2: 0.65}),
        (ATOMS, all_at(0), 0.5, 0.99**10, {26: 0.75, 27: 0.25}),
        (ATOMS, all_at(10), 1.0, 0.9, {50: 1.0}),
        (ATOMS, all_at(0), -0.3, 0.0, {24: 0.75, 25: 0.25}),
        (ATOMS, all_at(-10), 0.4, 0.0, {26: 1.0}),
    ],
)
def test_targets_are_projected_onto_the_atoms(atoms, p_t, r_t, discount_t, expected):
    target = target_of(*map(np.float32, (atoms, p_t, r_t, discount_t)))
    dense = np.zeros(len(atoms))
    dense[list(expected)] = list(expected.values())
    np.testing.assert_allclose(target, dense, atol=5e-6)


def test_losses_of_a_target_known_by_hand():
    atoms = np.float32([-1.0, 0.0, 1.0])
    logits_tm1 = np.float32([[5.0, 5.0, 5.0], [0.0, 1.0, 2.0]])
    logits_t = np.float32([[1.0, 1.0, 3.0], [9.0, 0.0, 0.0]])
    selector_t = np.float32([2.0, 1.0])  # The target is of action 0.

    def losses(logits_tm1):
        return value.categorical_loss(
            atoms,
            logits_tm1,
            jnp.int32(1),
            jnp.float32(0.0),
            jnp.float32(1.0),
            logits_t,
            selector_t,
        )

    cross_entropy, divergence, error = losses(logits_tm1)
    np.testing.assert_allclose(cross_entropy, 0.727127, rtol=1e-5)
    np.testing.assert_allclose(divergence, 0.061554, rtol=1e-4)
    p, t = (np.exp(x) / np.sum(np.exp(x)) for x in (logits_tm1[1], logits_t[0]))
    np.testing.assert_allclose(error, np.dot(t - p, atoms), rtol=1e-5)
    for index in (0, 1):
        grads = jax.grad(lambda x, i=index: losses(x)[i])(jnp.asarray(logits_tm1))
        np.testing.assert_allclose(grads, [[0, 0, 0], p - t], atol=1e-6)


def test_the_loss_of_a_distribution_is_rlaxs():
    rng = np.random.default_rng(0)
    logits_tm1, logits_t = rng.normal(size=(2, 4, 51)).astype(np.float32)
    selector = rng.normal(size=4).astype(np.float32)
    args = (jnp.int32(2), jnp.float32(0.7), jnp.float32(0.8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a function that RLax will drop.
        expected = rlax.categorical_double_q_learning(
            ATOMS, logits_tm1, *args, ATOMS, logits_t, selector
        )
    found = value.categorical_loss(ATOMS, logits_tm1, *args, logits_t, selector)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


@pytest.mark.parametrize("is_time_limit", [False, True])
def test_returns_of_three_steps_known_by_hand(is_time_limit):
    """Rewards 1, 0, 2, then the game ends, or only time does; the value is 5."""
    config = make_config("der")
    is_first = np.zeros((3, 7), bool)
    terminated = np.zeros((3, 7), bool)
    rewards = np.zeros((3, 7), np.float32)
    for window, end in enumerate((3, 2, 1)):  # States until the last.
        rewards[window, 1 : end + 1] = [1.0, 0.0, 2.0][-end:]
        terminated[window, end] = not is_time_limit
        is_first[window, end + 1] = True
    windows = make_windows(np.random.default_rng(0), 3, 7)._replace(
        is_first=is_first,
        terminated=terminated,
        life_lost=np.zeros((3, 7), bool),
        reward=rewards,
    )

    @jax.jit
    def returns_of(windows):
        targets = base.reward_targets(config.learner, windows)
        sums, discount = base.sum_steps(windows.reward[:, 1:], targets)
        return sums + discount * 5.0

    returns = returns_of(windows._replace(observation=None))
    expected = [2.62, 1.80, 2.00]
    if is_time_limit:
        expected = [2.62 + 0.729 * 5, 1.80 + 0.81 * 5, 2.00 + 0.9 * 5]
        assert expected[0] == pytest.approx(6.265)
    np.testing.assert_allclose(returns[:, 0], expected, rtol=1e-6)


# ------------------------------------------------------------------- the whole update


@functools.cache
def parts(name, **options):
    """An agent, its update jitted, and a state whose target is another network."""
    config = make_config(name, **dict(options))
    agent = config.make_agent(NUM_ACTIONS, OBSERVATION)
    state = jax.jit(agent.init)(jax.random.key(0))
    other = jax.jit(agent.init)(jax.random.key(1))
    state = state._replace(target_params=other.params["values"])
    learner = agent.finetune.learner

    def update(state, batch, key):  # Of a batch with the observations of all states.
        windows = batch.windows
        seen = base.take_states(windows.observation, learner.batch.states(windows))
        batch = batch._replace(windows=windows._replace(observation=seen))
        return learner.update(state, batch, key)

    return config.learner, agent, jax.jit(update), state


def make_batch(config, seed=0, weight=None):
    windows = make_windows(
        np.random.default_rng(seed), config.batch_size, config.window_states
    )
    return base.Batch(windows, None, weight)


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def projected(atoms, places, p):
    """C51's projection with floor and ceil, one atom at a time."""
    out = np.zeros(len(atoms))
    step = atoms[1] - atoms[0]
    for place, mass in zip(np.clip(places, atoms[0], atoms[-1]), p, strict=True):
        b = (place - atoms[0]) / step
        low = int(np.floor(b + 1e-9))
        out[low] += mass * (1 - (b - low))
        if low + 1 < len(atoms):
            out[low + 1] += mass * (b - low)
    return out


def slow_losses(config, state, windows):
    """Losses of the values of all windows, None where there is no transition."""
    network = value.make_network(config, NUM_ACTIONS, OBSERVATION)
    apply = jax.jit(lambda params, x: network.apply(params, x, {}))
    online = np.float64(apply(state.params["values"], windows.observation))
    slow = np.float64(apply(state.target_params, windows.observation))
    atoms = np.linspace(-10, 10, config.atoms)
    losses = []
    for b in range(config.batch_size):
        window = jax.tree.map(lambda x, b=b: x[b], windows)
        walk = references_agent.walk_target(
            window, 0, n_steps=config.n_steps, discount=0.9, task=None, life_cut=True
        )
        if walk is None:
            losses.append(None)
            continue
        places, discounts, last, product = walk
        reward = np.sum(
            np.array(discounts) * np.clip(np.float64(window.reward[places]), -1, 1)
        )
        chosen = online[b, 0, window.action[0]]
        if config.atoms == 1:
            greedy = np.argmax(online[b, last, :, 0])
            error = reward + product * slow[b, last, greedy, 0] - chosen[0]
            losses.append(0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5)
            continue
        greedy = np.argmax(softmax(online[b, last]) @ atoms)
        target = projected(
            atoms, reward + product * atoms, softmax(slow[b, last, greedy])
        )
        losses.append(-np.sum(target * np.log(softmax(chosen))))
    return losses


@pytest.mark.parametrize("name", ["der", "drq"])
def test_losses_and_priorities_are_those_written_slowly(name):
    config, _, update, state = parts(name, **PLAIN)
    batch = make_batch(config)
    losses = slow_losses(config, state, batch.windows)
    valid = [x for x in losses if x is not None]
    assert 0 < len(valid) < len(losses)
    updated = update(state, batch, jax.random.key(2))
    np.testing.assert_allclose(updated.metrics["loss_value"], np.mean(valid), rtol=1e-5)
    assert updated.metrics["loss_auxiliary"] == 0.0
    if name == "drq":
        assert updated.priorities is None
        return
    for found, expected in zip(updated.priorities, losses, strict=True):
        assert expected is None or found == pytest.approx(expected, rel=1e-5)


def test_importance_weights_weigh_gradients_and_not_priorities():
    config, _, update, state = parts("der", **PLAIN)
    weight = np.linspace(0.2, 1.0, config.batch_size, dtype=np.float32)
    key = jax.random.key(2)
    one, half = (
        update(state, make_batch(config, weight=scale * weight), key)
        for scale in (1.0, 0.5)
    )
    np.testing.assert_allclose(
        half.metrics["gradient_norm"], 0.5 * one.metrics["gradient_norm"], rtol=1e-5
    )
    np.testing.assert_array_equal(one.priorities, half.priorities)
    # Only what has a weight teaches.
    single = np.zeros(config.batch_size, np.float32)
    losses = slow_losses(config, state, make_batch(config).windows)
    single[losses.index(None)] = 1.0
    none = update(state, make_batch(config, weight=single), key)
    assert none.metrics["gradient_norm"] == 0.0


@pytest.mark.parametrize("name", ["curl", "spr"])
def test_targets_keys_and_moving_averages_receive_no_gradient(name):
    config, agent, _, state = parts(name)
    windows = make_batch(config).windows

    def losses(params, target_params, stats):
        given = state._replace(params=params, target_params=target_params, stats=stats)
        updated = agent.finetune.learner.update(
            given, base.Batch(windows, None), jax.random.key(3)
        )
        metrics = updated.metrics
        return jnp.sum(updated.priorities) + metrics["loss_auxiliary"]

    grads = jax.jit(jax.grad(losses, argnums=(0, 1, 2)))(
        state.params, state.target_params, state.stats
    )
    learned, *constant = grads
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), constant)
    zero = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(learned)
        if not np.any(x)
    ]
    assert not zero  # The noise's scales, the auxiliary networks and all else learn.


def test_spr_predicts_what_its_networks_say():
    """Of unchanged images, written with the modules one jump after the other."""
    config, _, update, state = parts("spr", **PLAIN)
    windows = make_batch(config).windows
    network = value.make_network(config, NUM_ACTIONS, OBSERVATION)
    transition = value_heads.Transition(NUM_ACTIONS, 64, is_batch_normalised=True)
    own = state.params["auxiliary"]
    encode = jax.jit(lambda p, x: network.apply(p, x, method="encode"))
    project = jax.jit(lambda p, x: network.apply(p, x, method="project"))
    encoded = encode(state.params["values"], windows.observation[:, 0])
    np.testing.assert_allclose(np.max(encoded, axis=1), 1.0, atol=1e-3)
    is_end = windows.terminated | windows.is_first | windows.life_lost
    total = np.zeros(config.batch_size)
    alive = np.ones(config.batch_size)
    for jump in range(config.spr_jumps):
        encoded = transition.apply(own["transition"], encoded, windows.action[:, jump])
        y = np.float64(project(state.params["values"], encoded))
        y = y @ own["predictor"]["kernel"] + own["predictor"]["bias"]
        t = encode(state.target_params, windows.observation[:, jump + 1])
        t = np.float64(project(state.target_params, t))
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        t /= np.linalg.norm(t, axis=1, keepdims=True)
        alive *= ~is_end[:, jump + 1]
        total += alive * np.sum((y - t) ** 2, axis=1) / config.spr_jumps
    is_valid = ~windows.is_first[:, 1]
    assert 0 < np.sum(alive) < config.batch_size
    found = update(state, base.Batch(windows, None), jax.random.key(2)).metrics
    np.testing.assert_allclose(
        found["loss_auxiliary"], np.mean(total[is_valid]), rtol=2e-4
    )


def test_published_curl_gives_every_state_the_mean_and_the_priority_of_all():
    config, _, update, state = parts("curl", **PLAIN)
    batch = make_batch(config)
    losses = slow_losses(config, state, batch.windows)
    updated = update(state, batch, jax.random.key(2))
    extra = updated.metrics["loss_auxiliary"]
    assert extra > 0.1
    for found, expected in zip(updated.priorities, losses, strict=True):
        assert expected is None or found == pytest.approx(
            expected + float(extra), rel=1e-4
        )
    # The keys' networks follow by a thousandth.
    before, after = state.stats, updated.state.stats
    now = {
        "values": {
            "params": {"encoder": updated.state.params["values"]["params"]["encoder"]}
        },
        "own": {"head": updated.state.params["auxiliary"]["head"]},
    }
    jax.tree.map(
        lambda old, new, is_now: np.testing.assert_allclose(
            new, 0.999 * old + 0.001 * is_now, rtol=1e-5, atol=1e-7
        ),
        before,
        after,
        now,
    )


def test_noise_follows_the_key():
    config, _, update, state = parts("der")
    batch = make_batch(config)
    losses = [
        float(update(state, batch, jax.random.key(seed)).metrics["loss_value"])
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_each_image_is_augmented_in_its_own_way():
    config = make_config("drq", intensity_scale=0.0).learner
    rows = np.arange(84, dtype=np.uint8)[:, None, None] + np.zeros((84, 4), np.uint8)
    augment = jax.jit(functools.partial(value.augmented, config))
    for key in jax.random.split(jax.random.key(0)):
        changed = np.asarray(augment(key, np.stack([rows] * 40)))
        moved = changed[:, 42, 0, :].astype(int) - 42
        assert set(moved[:, 0]) == set(range(-4, 5))
        np.testing.assert_array_equal(moved, moved[:, :1] + np.zeros((1, 4), int))
    config = make_config("drq", shift_pad=0).learner
    bright = value.augmented(config, jax.random.key(0), jnp.full((9, 3, 3, 4), 100.0))
    assert len(set(np.asarray(bright)[:, 0, 0, 0].tolist())) == 9
    np.testing.assert_array_equal(
        bright, bright[:, :1, :1, :1] + np.zeros((1, 3, 3, 4))
    )


@pytest.mark.parametrize("tau, period", [(1.0, 2), (0.25, 1)])
def test_targets_are_copied_by_updates_or_follow(tau, period):
    optimizer = base.adam(make_config("drq").learner, 0.1)
    params = {"values": {"w": jnp.array([1.0, 2.0])}, "other": jnp.ones(1)}
    slow, opt_state = {"w": jnp.array([5.0, 6.0])}, optimizer.init(params)
    state = base.AgentState(params, slow, opt_state, {}, jnp.int32(0))
    step = jax.jit(
        functools.partial(
            base.apply_gradients,
            optimizer,
            target="values",
            target_period=period,
            target_tau=tau,
        )
    )
    for number in (1, 2):
        before = state.target_params["w"]
        state = step(jax.tree.map(jnp.ones_like, params), state)
        rate = tau if number % period == 0 else 0.0
        np.testing.assert_allclose(
            state.target_params["w"],
            (1 - rate) * before + rate * state.params["values"]["w"],
            rtol=1e-6,
        )


def test_a_reset_renews_heads_and_optimiser_and_mixes_the_encoder():
    never = parts("drq", **PLAIN)[2]
    config, agent, update, state = parts("drq", **PLAIN, reset_period=2)
    batch, key = make_batch(config), jax.random.key(5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        update(state, batch, key).state,
        never(state, batch, key).state,
    )  # The first update is not due.
    state = state._replace(num_updates=jnp.int32(1))
    plain = never(state, batch, key).state
    after = update(state, batch, key).state
    fresh = agent.init(jax.random.split(key)[1]).params
    for left, kept, new in (
        (after.params, plain.params, fresh),
        (after.target_params, plain.target_params, fresh["values"]),
    ):
        for (path, x), old, drawn in zip(
            jax.tree_util.tree_leaves_with_path(left),
            jax.tree.leaves(kept),
            jax.tree.leaves(new),
            strict=True,
        ):
            name = jax.tree_util.keystr(path)
            expected = 0.8 * old + 0.2 * drawn if "'encoder'" in name else drawn
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not any(np.any(x) for x in jax.tree.leaves(after.opt_state))
    assert any(np.any(x) for x in jax.tree.leaves(plain.opt_state))
    assert after.num_updates == 2


def test_a_reset_mixes_the_transition_and_renews_the_predictor():
    ones = {"auxiliary": {"transition": jnp.ones(1), "predictor": jnp.ones(1)}}
    mixed = value.mixed(ones, jax.tree.map(jnp.zeros_like, ones), 0.8)["auxiliary"]
    np.testing.assert_allclose(mixed["transition"], 0.8)
    np.testing.assert_allclose(mixed["predictor"], 0.0)


# --------------------------------------------------------------------------- acting


@pytest.mark.parametrize(
    "name, expected",
    [
        ("der", {0: 0.0, 1: 0.0}),
        ("der_dopamine", {0: 0.01, 9: 0.01}),
        ("drq", {0: 1.0, 2500: 0.55, 5000: 0.1, 9000: 0.1}),
        ("drq_eps", {0: 1.0, 2500: 0.505, 5000: 0.01}),
        ("spr", {0: 1.0, 1: 0.0, 2: 0.0}),
        ("sr_spr", {0: 1.0, 8000: 0.5, 16_000: 0.0}),
    ],
)
def test_random_actions_follow_the_number_of_updates(name, expected):
    schedule = value.epsilon_schedule(make_config(name).learner)
    for update, epsilon in expected.items():
        assert schedule(update) == pytest.approx(epsilon, abs=1e-6)


def test_noise_explores_while_learning_and_rests_in_games_that_count():
    config, agent, _, state = parts("der")
    frames = jnp.asarray(make_batch(config).windows.observation[:, 0])
    seen = base.Observation(frames, jnp.zeros(config.batch_size, bool))
    # Little is between the actions: noise changes which is best.
    state = state._replace(
        params=jax.tree_util.tree_map_with_path(
            lambda path, x: 5.0 * x if "kernel_sigma" in str(path) else x, state.params
        )
    )
    drawn = {}
    for name, policy in (("noisy", agent.finetune.policy), ("rests", agent.play(0.0))):
        act = jax.jit(lambda key, act=policy.act: act(state, (), seen, key)[1].action)
        drawn[name] = [act(key) for key in jax.random.split(jax.random.key(0), 12)]
    assert len({tuple(np.asarray(x)) for x in drawn["noisy"]}) > 1
    assert len({tuple(np.asarray(x)) for x in drawn["rests"]}) == 1


def test_sr_spr_acts_by_its_target():
    config, agent, _, state = parts("sr_spr")
    frames = jnp.asarray(make_batch(config).windows.observation[:, 0])
    seen = base.Observation(frames, jnp.zeros(config.batch_size, bool))
    network = value.make_network(config, NUM_ACTIONS, OBSERVATION)
    logits = network.apply(state.target_params, frames, {})
    q = value.mean_values(value.make_atoms(config), logits)
    found = agent.play(0.0).act(state, (), seen, jax.random.key(0))[1].action
    np.testing.assert_array_equal(found, np.argmax(q, axis=-1))


# -------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"shift_pad": 84},
            "shift_pad must be less than an image.s side of 84, got 84",
        ),
        (
            {"value_min": 10.0},
            "value_min must be less than value_max, got 10.0 and 10.0",
        ),
        ({"atoms": 1}, "need a distribution: give atoms=51, or 0 for both"),
        ({"window_targets": 2}, "window_targets must be at most 1, got 2"),
        ({"priority": "rank"}, "priority must be one of cross_entropy, kl, total"),
        ({"num_devices": 2, "num_envs": 8}, "Prioritised replay is for one device"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_config("der", **options)
    assert "\n" not in str(caught.value)


def test_agents_have_their_papers_values():
    at_100k = functools.partial(config_lib.preset_config, "atari100k")
    der = at_100k("der")
    assert (der.finetune.finetune_num_envs, der.evaluation.evaluations) == (1, 1)
    assert der.finetune.finetune_warmup_agent_steps == 1_600
    learner = der.learner
    assert (learner.n_steps, learner.hidden_units, learner.noisy_sigma) == (
        20,
        256,
        0.1,
    )
    assert (learner.target_period, learner.importance_start) == (2_000, 0.4)
    for name, updates_per_step, warmup in (
        ("der", 1, 1_600),
        ("spr", 2, 2_000),
        ("sr_spr", 8, 2_000),
    ):
        finetune = at_100k(name).finetune
        size = at_100k(name).learner.batch_size
        assert finetune.finetune_samples_per_step == updates_per_step * size
        assert finetune.finetune_warmup_agent_steps == warmup


def test_agents_that_infer_nothing_may_learn_for_fewer_steps():
    options = {"finetune_agent_steps": 3_000}
    der = config_lib.preset_config("atari100k", "der")
    assert config_lib.replace_options(der, **options).finetune.infer_agent_steps > 3_000
    with pytest.raises(ValueError, match="infer_agent_steps must be less than"):
        config_lib.replace_options(der, agent="aps", **options)


def test_changing_the_agent_changes_the_runs_values_that_are_its_own():
    spr = config_lib.preset_config("atari100k", "spr")
    der = config_lib.preset_config("atari100k", "der")
    assert config_lib.replace_options(der, agent="spr") == spr
    assert config_lib.replace_options(spr, agent="der") == der
    given = config_lib.replace_options(der, agent="spr", finetune_samples_per_step=8.0)
    assert given.finetune.finetune_samples_per_step == 8.0


def test_no_auxiliary_is_no_loss():
    none = auxiliary.none()
    assert none.init(jax.random.key(0), jnp.zeros((1, 3))) == {}
