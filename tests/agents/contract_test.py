"""The contract of every agent in `AGENTS`, on grey images and on planes of a world."""

import functools
import json

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.agents import AGENTS, base
from aps_jax.replay import buffer
from aps_jax.train import loop

NUM_ENVS, NUM_ACTIONS = 4, fakes.ChainPool.num_actions


# Agents whose updates differ little from one that is compiled here (value_test.py).
ALIKE = ("der_dopamine", "drq_eps", "curl", "curl_clean", "sr_spr")
# An agent's name and a preset, which decides what it sees.
CASES = [
    (name, preset)
    for name in AGENTS
    for preset in (("smoke",) if name in ALIKE else ("smoke", "maze"))
]
# Whose updates are compiled; those of all other presets are traced.
COMPILED = {
    "aps": "maze",
    "visr": "maze",
    "entropy": "maze",
    "dqn": "maze",
    "der": "maze",
    "drq": "smoke",
    "spr": "smoke",
}


@functools.cache
def make_agent(case):
    name, preset = case
    config = config_lib.preset_config(preset, name)
    return config.make_agent(NUM_ACTIONS, config.observation)


@functools.cache
def initial_state(case):
    return jax.jit(make_agent(case).init)(jax.random.key(0))


def phases(case):
    """The agent's phases, each with whether it is reward-free."""
    agent = make_agent(case)
    found = [(agent.finetune, False)]
    return found if agent.pretrain is None else [*found, (agent.pretrain, True)]


def random_pixels(rng, spec, shape):
    return rng.integers(0, 256 if spec.is_image else 2, shape, dtype=np.uint8)


def observation(case):
    spec = make_agent(case).finetune.policy.observation
    rng = np.random.default_rng(0)
    frames = random_pixels(rng, spec, (NUM_ENVS, *spec.shape))
    return base.Observation(jnp.asarray(frames), jnp.zeros((NUM_ENVS,), bool))


def filled_replay(policy, state, *, is_prioritised=False):
    """A replay of 30 random steps of each environment."""
    rng = np.random.default_rng(1)
    extras = loop.replayed_extras(policy, state)
    spec = policy.observation
    replay = buffer.init(
        spec,
        extras,
        num_envs=NUM_ENVS,
        size=NUM_ENVS * 40,
        is_prioritised=is_prioritised,
    )
    add = jax.jit(buffer.add)
    for time in range(30):
        step = buffer.Step(
            frame=random_pixels(rng, spec, (NUM_ENVS, *spec.frame_shape)),
            action=rng.integers(0, NUM_ACTIONS, NUM_ENVS).astype(np.int32),
            reward=rng.normal(size=NUM_ENVS).astype(np.float32),
            terminated=rng.random(NUM_ENVS) < 0.1,
            is_first=np.full(NUM_ENVS, time == 0),
            life_lost=rng.random(NUM_ENVS) < 0.1,
            id=np.arange(NUM_ENVS, dtype=np.int32) + time * NUM_ENVS,
            extras={
                name: rng.normal(size=(NUM_ENVS, *x.shape)).astype(x.dtype)
                for name, x in extras.items()
            },
        )
        replay = add(replay, step)
    return replay


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("case", COMPILED.items(), ids="-".join)
def test_updates_keep_the_state_and_return_what_is_declared(case):
    """Run twice: traced once, and the same for the same keys."""
    state = initial_state(case)
    for phase, reward_free in phases(case):
        learner = phase.learner
        is_prioritised = learner.batch.priorities is not None
        replay = filled_replay(phase.policy, state, is_prioritised=is_prioritised)
        start = state
        if not reward_free:
            agent = make_agent(case)
            start, _ = agent.adapt(jax.random.key(2), agent.start_finetune(state), None)
        draw = loop.make_draw(phase, reward_free=reward_free)
        traces = []

        @jax.jit
        def update(state, replay, draw=draw, learner=learner, traces=traces):
            traces.append(1)
            batch = draw(jax.random.key(3), state, replay, state.num_updates)
            return learner.update(state, batch, jax.random.key(4))

        after, metrics, _ = update(start, replay)
        again, *_ = update(start, replay)
        last, *_ = update(after, replay)
        assert len(traces) == 1
        assert_same(after, again)
        assert shapes(after) == shapes(start)
        assert set(metrics) == set(loop.names_of(learner.metrics))
        assert all(np.isfinite(value) for value in metrics.values())
        assert [int(s.num_updates) for s in (start, after, last)] == [0, 1, 2]
        moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), start, after)
        assert any(jax.tree.leaves(moved.params))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_all_policies_share_a_memory_and_what_is_replayed(case):
    agent = make_agent(case)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    policies = [phase.policy for phase, _ in phases(case)]
    policies += [agent.play(0.5), agent.play_adapted(0.5)]
    if agent.play_skills is not None:
        policies.append(agent.play_skills(0.5))
    seen = []
    for policy in policies:
        memory = policy.init(NUM_ENVS)
        act = jax.eval_shape(
            policy.act, state, memory, observation(case), jax.random.key(0)
        )
        assert shapes(act[0]) == shapes(memory)
        assert act[1].action.shape == (NUM_ENVS,)
        assert act[1].action.dtype == jnp.int32
        seen.append((shapes(memory), shapes(act[1].extras)))
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_random_actions_come_with_epsilon_one_alone(case):
    agent = make_agent(case)
    start = agent.start_finetune(initial_state(case))
    state, _ = agent.adapt(jax.random.key(2), start, None)

    @jax.jit
    def actions(state, seen, keys):
        def action(epsilon, key):
            policy = agent.play(epsilon)
            return policy.act(state, policy.init(NUM_ENVS), seen, key)[1].action

        of_keys = jax.vmap(action, in_axes=(None, 0))
        return jax.vmap(of_keys, in_axes=(0, None))(np.float32([0.0, 1.0]), keys)

    keys = jax.random.split(jax.random.key(1), 8)
    greedy, random = np.asarray(actions(state, observation(case), keys))
    assert np.all(greedy == greedy[:1])
    assert set(random.ravel()) == set(range(NUM_ACTIONS))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_calibrating_and_adapting_keep_the_state_and_what_is_learned(case):
    agent, state = make_agent(case), initial_state(case)
    policy = agent.finetune.policy
    draw = loop.make_draw_states(16, policy.observation)
    windows = draw(filled_replay(policy, state), jax.random.key(0))
    calibrated = agent.calibrate(state, windows)
    assert shapes(calibrated) == shapes(state)
    assert_same(calibrated.params, state.params)
    started = agent.start_finetune(calibrated)
    assert int(started.num_updates) == 0
    assert_same(started.params, state.params)

    def encode(function, state):
        return jax.tree.map(np.asarray, function(state, windows))

    rollouts = base.Rollouts(
        np.arange(16, dtype=np.float32), np.zeros(16, bool), encode
    )
    for given in (None, rollouts) if agent.pretrain else (None,):
        adapted, facts = agent.adapt(jax.random.key(1), started, given)
        assert shapes(adapted) == shapes(started)
        assert_same(adapted.params, state.params)
        assert isinstance(facts["summary"], str)
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def agents_presets():
    """Presets that no test here compiles, one for each that changes the options."""
    for name, compiled in COMPILED.items():
        if name in ("visr", "entropy"):
            continue  # What their presets set is what those of aps set.
        presets = [p for p in config_lib.PRESETS if p != compiled]
        of = {config_lib.preset_config(p, name).learner: p for p in presets}
        yield from ((name, preset) for preset in of.values())


@pytest.mark.parametrize("name, preset", list(agents_presets()))
def test_every_preset_updates_a_state_of_its_own_shape(name, preset):
    """Traced, not run: the networks of the large presets take long on a CPU."""
    agent = make_agent((name, preset))
    state = jax.eval_shape(agent.init, jax.random.key(0))
    for phase, reward_free in [(agent.finetune, False), (agent.pretrain, True)]:
        if phase is None:
            continue
        start = state if reward_free else jax.eval_shape(agent.start_finetune, state)
        extras = loop.replayed_extras(phase.policy, state)
        replay = jax.eval_shape(
            functools.partial(
                buffer.init,
                phase.policy.observation,
                num_envs=8,
                size=800,
                is_prioritised=phase.learner.batch.priorities is not None,
            ),
            extras,
        )
        draw, key = loop.make_draw(phase, reward_free=reward_free), jax.random.key(0)
        batch = jax.eval_shape(draw, key, start, replay, np.int32(0))
        after, *_ = jax.eval_shape(phase.learner.update, start, batch, key)
        assert shapes(after) == shapes(start)


@pytest.mark.parametrize("name", AGENTS)
def test_an_entry_names_options_that_exist(name):
    entry = AGENTS[name]
    fields = config_lib.option_fields(name)
    assert set(entry.options) <= set(fields) and set(entry.transferred) <= set(fields)
    assert set(entry.presets) <= set(config_lib.PRESETS)
    for values in entry.presets.values():
        assert set(values) <= set(fields)
    assert entry.about
