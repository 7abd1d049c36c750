"""Tests of aps_jax.ops.returns: the layout of targets against a slow walk."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
import references_agent

from aps_jax.ops import returns


class Window(NamedTuple):
    """What decides where a return is cut."""

    terminated: np.ndarray
    is_first: np.ndarray
    life_lost: np.ndarray
    task: np.ndarray


def make_window(rng, num_states):
    """A window in which episodes end and tasks change."""
    is_first = rng.random(num_states) < 0.2
    terminated = np.zeros(num_states, bool)
    terminated[:-1] = is_first[1:] & (rng.random(num_states) < 0.5)[1:]
    task = rng.normal(size=(2, 2)).astype(np.float32)
    changes = np.cumsum(rng.random(num_states) < 0.2) > 0
    return Window(
        terminated=terminated,
        is_first=is_first,
        life_lost=rng.random(num_states) < 0.2,
        task=np.where(changes[:, None], task[1:], task[:1]),
    )


def lay_out(window, *, task_cut=True, life_cut=False, m=2, n=3):
    return returns.window_targets(
        window.is_first,
        window.terminated | window.life_lost if life_cut else window.terminated,
        window.task if task_cut else None,
        num_targets=m,
        n_steps=n,
        discount=0.9,
    )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("task_cut", [True, False])
@pytest.mark.parametrize("life_cut", [True, False])
def test_targets_follow_the_walk(seed, task_cut, life_cut):
    window = make_window(np.random.default_rng(seed), 5)
    targets = jax.device_get(lay_out(window, task_cut=task_cut, life_cut=life_cut))
    for start in range(2):
        walk = references_agent.walk_target(
            window,
            start,
            n_steps=3,
            discount=0.9,
            task=window.task if task_cut else None,
            life_cut=life_cut,
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
    window = Window(
        terminated=np.zeros(5, bool),
        is_first=np.zeros(5, bool),
        life_lost=np.zeros(5, bool),
        task=np.tile(np.float32([[1.0, 0.0]]), (5, 1)),
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


def test_masked_mean_of_nothing_is_zero():
    values = np.float32([[1.0, 5.0], [3.0, 7.0]])
    mask = np.float32([[1.0, 0.0], [1.0, 0.0]])
    assert returns.masked_mean(values, mask) == 2.0
    assert returns.masked_mean(values, 0.0 * mask) == 0.0
