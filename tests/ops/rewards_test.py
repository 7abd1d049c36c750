"""Tests for the intrinsic reward and the running scale of the distances."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_rewards
from hypothesis import strategies

from aps_jax.ops import rewards

PROPERTY = hypothesis.settings(
    derandomize=True, max_examples=25, deadline=None, database=None
)


def transforms():
    return pytest.mark.parametrize(
        "transform", [lambda f: f, jax.jit], ids=["eager", "jit"]
    )


# Compiled once per shape; `decay` is traced.
update_distance_scale = jax.jit(rewards.update_distance_scale)


def scale_of(batches, decay):
    update = functools.partial(update_distance_scale, decay=decay)
    return functools.reduce(update, batches, rewards.init_distance_scale())


def reward_of(distances, sigma, **kwargs):
    return rewards.particle_entropy_reward(
        np.float32(distances), np.float32(sigma), **kwargs
    )


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 5, 12)])
@transforms()
def test_scale_matches_float64(decay, shape, transform):
    rng = np.random.default_rng(0)
    batches = rng.exponential(size=(6, *shape)).astype(np.float32)
    batches[2, ..., -1] = np.inf
    update = transform(functools.partial(rewards.update_distance_scale, decay=decay))
    scale = functools.reduce(update, batches, rewards.init_distance_scale())
    weight, mean = references_rewards.decayed_mean(batches, decay)
    np.testing.assert_allclose(scale.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(scale.mean, mean, rtol=1e-6)


def test_scale_by_hand():
    # (1, 3): weight 2, mean 2. Then decay 0.5 and (8, inf): weight 0.5 * 2 + 1 = 2,
    # mean (0.5 * (1 + 3) + 8) / 2 = 5.
    scale = rewards.init_distance_scale()
    np.testing.assert_array_equal(scale, [0.0, 0.0])
    scale = rewards.update_distance_scale(scale, np.float32([1.0, 3.0]), decay=0.5)
    np.testing.assert_allclose(scale, [2.0, 2.0])
    scale = rewards.update_distance_scale(scale, np.float32([8.0, np.inf]), decay=0.5)
    np.testing.assert_allclose(scale, [2.0, 5.0])


@PROPERTY
@hypothesis.given(
    seed=strategies.integers(0, 2**31),
    cuts=strategies.lists(strategies.integers(0, 60), max_size=5),
    share_missing=strategies.sampled_from([0.0, 0.3, 1.0]),
)
def test_without_decay_any_split_gives_the_mean(seed, cuts, share_missing):
    rng = np.random.default_rng(seed)
    distances = rng.exponential(size=60).astype(np.float32)
    distances[rng.uniform(size=60) < share_missing] = np.inf
    batches = []
    for batch in np.split(distances, sorted(cuts)):
        # Filled up with what does not count: every batch has the shape compiled for.
        batches.append(np.append(batch, np.full(60 - batch.size, np.inf, np.float32)))
    scale = scale_of(batches, 1.0)
    finite = np.float64(distances[np.isfinite(distances)])
    np.testing.assert_allclose(scale.weight, finite.size)
    np.testing.assert_allclose(
        scale.mean, np.mean(finite) if finite.size else 0.0, rtol=1e-6
    )


def test_a_batch_without_neighbours_changes_only_the_weight():
    scale = rewards.DistanceScale(jnp.float32(10), jnp.float32(3))
    scale = rewards.update_distance_scale(scale, np.float32([np.inf]), decay=0.9)
    np.testing.assert_allclose(scale, [9.0, 3.0], rtol=1e-6)
    nothing = rewards.update_distance_scale(
        rewards.init_distance_scale(), np.float32([np.inf]), decay=0.9
    )
    np.testing.assert_array_equal(nothing, [0.0, 0.0])


def test_the_scale_forgets():
    # After 200 updates at 0.9, what the norm of the features was before is gone.
    scale = scale_of([np.full((4, 3), 100.0, np.float32)] * 10, 0.9)
    for _ in range(200):
        scale = update_distance_scale(scale, np.ones((4, 3), np.float32), decay=0.9)
    np.testing.assert_allclose(scale.mean, 1.0, rtol=1e-5)


@pytest.mark.parametrize("offset, spread", [(10.0, 1e-3), (1e-3, 1e-5), (1e4, 1.0)])
def test_scale_stays_exact_for_many_similar_distances(offset, spread):
    rng = np.random.default_rng(0)
    batches = (offset + spread * rng.normal(size=(20, 4096, 12))).astype(np.float32)
    scale = scale_of(batches, 1.0)
    np.testing.assert_allclose(scale.mean, np.mean(np.float64(batches)), rtol=5e-7)


def test_scale_runs_under_scan():
    batches = np.random.default_rng(0).exponential(size=(9, 4, 3)).astype(np.float32)
    scanned, _ = jax.lax.scan(
        lambda scale, batch: (rewards.update_distance_scale(scale, batch), None),
        rewards.init_distance_scale(),
        batches,
    )
    weight, mean = references_rewards.decayed_mean(batches, 0.99)
    np.testing.assert_allclose(scanned, [weight, mean], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("c, clip", [(1.0, 1e-4), (0.5, 0.3)])
@transforms()
def test_reward_matches_float64(k, c, clip, transform):
    rng = np.random.default_rng(k)
    distances = rng.exponential(size=k).astype(np.float32)
    distances[k // 2 + 1 :] = np.inf
    sigma = np.float32(0.7)
    reward = transform(
        functools.partial(rewards.particle_entropy_reward, c=c, clip=clip)
    )(distances, sigma)
    expected = references_rewards.particle_entropy_reward(distances, sigma, c, clip)
    np.testing.assert_allclose(reward, expected, rtol=1e-5, atol=1e-6)


def test_reward_by_hand():
    # sigma 2: (1, 3, 0.5) / 2 - 0.5 = (0, 1, -0.25 -> 0); log(1 + 1 / 3).
    reward = reward_of([1.0, 3.0, 0.5], 2.0, clip=0.5)
    np.testing.assert_allclose(reward, np.log(4 / 3), rtol=1e-6)


def test_reward_of_usual_distances_is_near_log_two():
    np.testing.assert_allclose(reward_of([3.0] * 4, 3.0), np.log(2), atol=1e-4)


def test_reward_counts_existing_neighbours_only():
    with_missing = reward_of([1.0, 3.0, np.inf, np.inf], 2.0)
    np.testing.assert_allclose(with_missing, reward_of([1.0, 3.0], 2.0), rtol=1e-6)


@pytest.mark.parametrize(
    "distances, sigma",
    [([0.0, 0.0], 0.0), ([np.inf, np.inf], 1.0), ([np.inf], 0.0), ([2.0], 0.0)],
)
@pytest.mark.parametrize("c", [1.0, 2.0])
@transforms()
def test_reward_without_scale_or_neighbours_is_log_c(distances, sigma, c, transform):
    reward = functools.partial(rewards.particle_entropy_reward, c=c)
    value, gradients = transform(jax.value_and_grad(reward, argnums=(0, 1)))(
        np.float32(distances), np.float32(sigma)
    )
    np.testing.assert_allclose(value, np.log(c), rtol=1e-6)
    np.testing.assert_array_equal(gradients[0], np.zeros(len(distances)))
    np.testing.assert_array_equal(gradients[1], 0.0)


def test_gradient_of_the_reward_by_hand():
    # log(1 + ((d_1 + d_2) / sigma - 2 clip) / 2) with d = (1, 3), sigma = 2, clip = 0:
    # the argument is 2, so 1 / (2 * 2 * 2) for each distance.
    gradient = jax.grad(functools.partial(rewards.particle_entropy_reward, clip=0.0))(
        np.float32([1.0, 3.0, np.inf]), np.float32(2.0)
    )
    np.testing.assert_allclose(gradient, [0.125, 0.125, 0.0], rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_reward_does_not_depend_on_the_norm_of_the_features(factor):
    distances = np.random.default_rng(0).exponential(size=(8, 5)).astype(np.float32)

    def rewards_of(distances):
        scale = scale_of([distances], 1.0)
        reward = jax.vmap(rewards.particle_entropy_reward, in_axes=(0, None))
        return reward(distances, scale.mean)

    np.testing.assert_allclose(
        rewards_of(np.float32(factor) * distances), rewards_of(distances), rtol=1e-5
    )


def test_a_distance_that_is_not_a_number_shows():
    distances = np.float32([1.0, np.nan])
    assert np.isnan(reward_of(distances, 1.0))
    scale = rewards.update_distance_scale(rewards.init_distance_scale(), distances)
    assert np.isnan(scale.mean)


def test_skill_reward_by_hand():
    # 0.6 * 1 + 0.8 * 0 = 0.6, and for the task that points the other way -0.6.
    phi_t = np.float32([0.6, 0.8])
    for w, expected in [([1.0, 0.0], 0.6), ([-1.0, 0.0], -0.6)]:
        np.testing.assert_allclose(
            rewards.skill_reward(phi_t, np.float32(w)), expected, rtol=1e-6
        )


def test_skill_reward_matches_float64_in_a_batch():
    rng = np.random.default_rng(0)
    phi_t, w = rng.normal(size=(2, 6, 5)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(rewards.skill_reward))(phi_t, w),
        [np.float64(p) @ np.float64(v) for p, v in zip(phi_t, w)],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "skill_weight, entropy_weight, expected",
    [(1.0, 1.0, 1.25), (1.0, 0.0, 0.5), (0.0, 1.0, 0.75), (2.0, 4.0, 4.0)],
    ids=["aps", "visr", "apt", "other"],
)
def test_intrinsic_reward_weighs_both_parts(skill_weight, entropy_weight, expected):
    reward = rewards.intrinsic_reward(
        jnp.float32(0.5),
        jnp.float32(0.75),
        skill_weight=skill_weight,
        entropy_weight=entropy_weight,
    )
    np.testing.assert_allclose(reward, expected)


def test_without_skill_weight_the_reward_ignores_the_task():
    phi_t, w = np.float32([0.6, 0.8]), np.float32([[1.0, 0.0], [0.0, -1.0]])
    first, second = (
        rewards.intrinsic_reward(
            rewards.skill_reward(phi_t, task),
            jnp.float32(0.3),
            skill_weight=0.0,
            entropy_weight=1.0,
        )
        for task in w
    )
    np.testing.assert_array_equal(first, second)


def test_shapes_and_types_are_checked():
    with pytest.raises(AssertionError):
        rewards.particle_entropy_reward(np.float32([1.0]), np.float32([1.0]))
    with pytest.raises(AssertionError):
        rewards.skill_reward(np.ones(2, np.float32), np.ones(3, np.float32))
    with pytest.raises(AssertionError):
        rewards.intrinsic_reward(
            jnp.float32(1), jnp.ones(2), skill_weight=1.0, entropy_weight=1.0
        )
    with pytest.raises(AssertionError):
        rewards.update_distance_scale(rewards.init_distance_scale(), np.array([1, 2]))
