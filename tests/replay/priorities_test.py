"""Tests of prioritised sampling: frequencies, weights, and what is never drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buffer_test import EXTRAS, random_step

from aps_jax.envs.atari import OBSERVATION
from aps_jax.replay import buffer, priorities

P = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]], np.float32)  # 3 environments


def set_all(p, exponent):
    """Priorities of every place; 0 marks places that may not be drawn."""
    env, index = (x.ravel() for x in np.indices(p.shape))
    given = priorities.init(*p.shape)
    found = priorities.update(given, env, index, p.ravel(), exponent=exponent)
    return found, np.where(p > 0, found.weight, 0.0)


@pytest.mark.parametrize(
    "exponent, shares",
    [(1.0, [0.1, 0.2, 0.3, 0.4]), (0.5, [0.1627, 0.2301, 0.2818, 0.3254])],
)
def test_places_are_drawn_in_proportion_and_in_strata(exponent, shares):
    _, weight = set_all(P, exponent)
    draw = jax.jit(
        lambda key, weight: priorities.draw(
            key, weight, num_windows=20_000, importance=1.0
        )
    )
    env, index, _ = jax.device_get(draw(jax.random.key(0), weight))
    counts = np.bincount(2 * env + index, minlength=6) / 20_000
    np.testing.assert_allclose(counts, [*shares, 0, 0], atol=2e-4)
    assert np.all(np.diff(2 * env + index) >= 0)
    # A single draw has no strata, and the same shares.
    keys = jax.random.split(jax.random.key(1), 4_000)
    one = jax.vmap(
        lambda key: priorities.draw(key, weight, num_windows=1, importance=1.0)
    )
    env, index, _ = jax.device_get(jax.jit(one)(keys))
    counts = np.bincount(2 * env[:, 0] + index[:, 0], minlength=6) / 4_000
    np.testing.assert_allclose(counts, [*shares, 0, 0], atol=0.025)


@pytest.mark.parametrize(
    "importance, expected",
    [(0.5, [0.5, 0.7071, 1, 1]), (0.4, [0.5743, 0.7579, 1, 1]), (0.0, [1, 1, 1, 1])],
)
@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_importance_weights_undo_priorities_of_any_unit(importance, expected, unit):
    weight = unit * np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)
    _, index, weights = priorities.draw(
        jax.random.key(0), weight, num_windows=64, importance=importance
    )
    assert set(np.asarray(index)) == {0, 1, 2, 3}
    np.testing.assert_allclose(weights, np.array(expected)[index], atol=5e-5)


def test_seeds_at_once_draw_what_each_would_alone():
    weight = np.random.default_rng(0).random((2, 3, 200)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0))

    def draw(key, weight):
        return priorities.draw(key, weight, num_windows=16, importance=0.5)

    both = jax.vmap(draw)(keys, weight)
    for seed in (0, 1):
        one = draw(keys[seed], weight[seed])
        for left, right in zip(one, both, strict=True):
            np.testing.assert_allclose(left, right[seed], rtol=1e-5)


def test_where_nothing_can_be_drawn_nothing_is_learned():
    env, index, weights = priorities.draw(
        jax.random.key(0), np.zeros((2, 3), np.float32), num_windows=4, importance=0.5
    )
    assert weights.tolist() == [0.0] * 4
    assert set(env.tolist()) <= {0, 1} and set(index.tolist()) <= {0, 1, 2}


def test_a_draw_at_the_very_end_is_the_last_place_with_a_weight(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.ones(shape))
    weight = np.array([[1.0, 1.0, 0.0, 0.0]], np.float32)
    _, index, _ = priorities.draw(
        jax.random.key(0), weight, num_windows=1, importance=1.0
    )
    assert index.tolist() == [1]


def test_new_steps_have_the_largest_priority_so_far_as_a_float():
    given = priorities.add(priorities.init(2, 4), jnp.int32(0))
    assert given.weight[:, 0].tolist() == [1.0, 1.0]
    after = priorities.update(
        given, np.array([1]), np.array([0]), np.float32([2.9]), exponent=1.0
    )
    after = priorities.add(after, jnp.int32(1))
    np.testing.assert_allclose(after.weight[:, :2], [[1.0, 2.9], [2.9, 2.9]])
    lower = priorities.update(
        after, np.array([1]), np.array([0]), np.float32([0.1]), exponent=1.0
    )
    assert lower.largest == after.largest == np.float32(2.9)


def test_priorities_are_bounded_and_a_place_drawn_twice_counts_once():
    env, index = np.array([0, 0, 0, 0]), np.array([2, 2, 0, 1])
    p = np.float32([3.0, 4.0, 0.0, 1e9])
    found = priorities.update(priorities.init(1, 4), env, index, p, exponent=0.5)
    assert float(found.weight[0, 2]) in (np.sqrt(np.float32(3.0)), 2.0)
    np.testing.assert_allclose(found.weight[0, [0, 1, 3]], [1e-3, 1e3, 0.0], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [12, 20, 33])
def test_windows_begin_neither_across_the_write_head_nor_at_a_reset(num_steps):
    """Every other place of a ring, half full, full or overwritten, is drawn."""
    num_envs, length, num_states = 2, 20, 5
    rng = np.random.default_rng(0)
    state = buffer.init(
        OBSERVATION,
        EXTRAS,
        num_envs=num_envs,
        size=num_envs * length,
        is_prioritised=True,
    )
    add = jax.jit(buffer.add, donate_argnums=0)
    steps = []
    for time in range(num_steps):
        first = np.ones(num_envs, bool) if time == 0 else None
        steps.append(random_step(rng, num_envs, time, first))
        state = add(state, steps[-1])

    @jax.jit
    def sample(state, key):
        windows, indices, weight = buffer.sample_prioritised(
            state,
            key,
            observation=OBSERVATION,
            num_windows=400,
            num_states=num_states,
            importance=0.5,
        )
        after = priorities.update(
            state.priorities, *indices, jnp.full(400, 9.0, jnp.float32), exponent=0.5
        )
        return windows._replace(observation=None), weight, after

    windows, weight, after = jax.device_get(sample(state, jax.random.key(0)))
    np.testing.assert_array_equal(weight, 1.0)  # All have the priority of new steps.
    ids = windows.id
    np.testing.assert_array_equal(np.diff(ids, axis=1), num_envs)
    oldest = max(0, num_steps - length)
    expected = {
        time * num_envs + env
        for time in range(oldest + 3, num_steps - num_states + 1)
        for env in range(num_envs)
        if not steps[time + 1].is_first[env]
    }
    assert set(ids[:, 0]) == expected
    assert len(expected) < num_envs * (num_steps - num_states + 1 - oldest - 3)
    # The new priorities lie where the first states do.
    held = jax.device_get(state.experience.id)
    assert set(held[after.weight == 3.0]) == expected
    assert after.largest == 3.0
