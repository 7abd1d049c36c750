"""Tests of aps_jax.ops.acting against Distrax."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.ops import acting


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_draws_as_distrax_does(epsilon):
    """Also where two actions are equally good: those of every other row here."""
    values = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    values[::2, 1] = values[::2, 4] = 9.0
    key = jax.random.key(7)
    actions = acting.epsilon_greedy(key, values, epsilon)
    with jax.numpy_dtype_promotion("standard"):
        policy = distrax.EpsilonGreedy(jnp.asarray(values), epsilon)
    np.testing.assert_array_equal(actions, policy.sample(seed=key))
    if epsilon == 0.0:
        assert set(np.asarray(actions[::2])) == {1, 4}


def test_random_actions_are_uniform_over_all_actions():
    values = np.zeros((900, 3), np.float32)
    values[:, 0] = 1.0
    actions = acting.epsilon_greedy(jax.random.key(1), values, 1.0)
    counts = np.bincount(actions, minlength=3)
    # 300 expected each; chi-square of 2 degrees below 13.8 with probability 0.999.
    assert np.sum((counts - 300.0) ** 2 / 300.0) < 13.8
