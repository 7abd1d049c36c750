"""Tests of aps_jax.agents.auxiliary: the losses of CURL and SPR, and their masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.agents import auxiliary


def test_two_states_that_find_their_own_view():
    unit = np.eye(2, dtype=np.float32)
    losses = auxiliary.contrast_losses(unit, unit, unit)
    np.testing.assert_allclose(losses, 0.644397, rtol=1e-5)  # ln(1 + e^-0.1)


def test_contrast_is_cross_entropy_written_slowly():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 4, 3)).astype(np.float32)
    bilinear = rng.normal(size=(3, 3)).astype(np.float32)
    expected = []
    for i in range(4):
        logits = [0.1 * np.float64(query[i]) @ bilinear @ key[j] for j in range(4)]
        expected.append(np.log(np.sum(np.exp(logits))) - logits[i])
    losses = auxiliary.contrast_losses(query, key, bilinear)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "degrees, distance", [(0, 0.0), (60, 1.0), (90, 2.0), (120, 3.0), (180, 4.0)]
)
def test_predictions_are_compared_by_their_angle(degrees, distance):
    angle = np.deg2rad(degrees)
    predicted = 3.0 * np.float32([[np.cos(angle), np.sin(angle)]])
    loss = auxiliary.prediction_loss(
        predicted, np.float32([[5.0, 0.0]]), np.zeros(1, bool)
    )
    np.testing.assert_allclose(loss, distance, atol=1e-5)


def test_jumps_count_until_an_episode_ends():
    angles = np.deg2rad([0, 60, 90, 120, 180])
    predicted = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    reached = np.tile(np.float32([[1.0, 0.0]]), (5, 1))
    loss = auxiliary.prediction_loss
    assert 5.0 * loss(predicted, reached, np.zeros(5, bool)) == pytest.approx(10.0)
    # An end at the second state: the first alone counts, an angle of 60 degrees.
    is_end = np.array([False, True, False, False, False])
    turned = predicted[[1, 2, 3, 4, 0]]
    assert 5.0 * loss(turned, reached, is_end) == pytest.approx(1.0, abs=1e-5)
    # Nothing counts after an end at the first.
    is_end = np.array([True, False, False, False, False])
    assert loss(turned, reached, is_end) == 0.0


def test_a_vector_of_zeros_has_a_finite_gradient_and_targets_have_none():
    zeros, ones = jnp.zeros((2, 3)), jnp.ones((2, 3))
    is_end = jnp.zeros(2, bool)
    loss, grads = jax.value_and_grad(auxiliary.prediction_loss, argnums=(0, 1))(
        zeros, ones, is_end
    )
    assert np.isfinite(loss) and np.all(np.isfinite(grads[0]))
    assert np.any(grads[0] != 0.0)
    np.testing.assert_array_equal(grads[1], 0.0)
