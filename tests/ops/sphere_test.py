"""Tests for points on the unit sphere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_sphere
import scipy.stats

from aps_jax.ops import sphere

# With fixed seeds these tests are deterministic: either they pass for ever or never. A
# correct sampler draws a p-value below this one once in a thousand seeds.
SMALLEST_P_VALUE = 1e-3


def key_of(seed):
    return jax.random.key(seed)


# Compiled once per dimension and number of samples; `kappa` is traced.
sample_von_mises_fisher = jax.jit(sphere.sample_von_mises_fisher, static_argnames="num")


def transforms():
    return pytest.mark.parametrize(
        "transform", [lambda f: f, jax.jit], ids=["eager", "jit"]
    )


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 1), (2, 3, 5), (4, 512)])
@transforms()
def test_normalize_matches_float64(shape, transform):
    vectors = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(
        transform(sphere.normalize)(vectors),
        references_sphere.normalize(vectors),
        rtol=1e-6,
    )


def test_normalize_by_hand():
    # norm((3, -4)) = 5.
    np.testing.assert_allclose(
        sphere.normalize(np.array([3.0, -4.0], np.float32)), [0.6, -0.8], rtol=1e-7
    )


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_normalize_does_not_depend_on_the_norm(size):
    vector = np.array([3.0, 0.0, -4.0], np.float32) * np.float32(size)
    np.testing.assert_allclose(sphere.normalize(vector), [0.6, 0.0, -0.8], rtol=1e-6)


@transforms()
def test_zero_has_zero_direction_and_zero_gradient(transform):
    vectors = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    value, gradient = transform(
        jax.value_and_grad(lambda v: jnp.sum(sphere.normalize(v)[:, 0]))
    )(vectors)
    np.testing.assert_allclose(value, 0.6, rtol=1e-6)
    # The second row: (I - u u^T) e_1 / norm with u = (0.6, 0.8): (0.64, -0.48) / 5.
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.128, -0.096]], rtol=1e-5)


def test_gradient_of_normalize_is_tangent():
    rng = np.random.default_rng(1)
    vector, direction = rng.normal(size=(2, 5)).astype(np.float32)
    gradient = jax.grad(lambda v: jnp.sum(sphere.normalize(v) * direction))(vector)
    unit = references_sphere.normalize(vector)
    expected = (direction - unit * (unit @ direction)) / np.linalg.norm(vector)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_uniform_samples_are_unit_vectors(shape, dim):
    samples = sphere.sample_uniform(key_of(0), shape, dim)
    assert samples.shape == (*shape, dim)
    assert samples.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(samples, axis=-1), 1.0, rtol=1e-6)


def test_uniform_in_one_dimension_is_a_fair_coin():
    samples = sphere.sample_uniform(key_of(2), (10_000,), 1)
    assert set(np.unique(samples)) == {-1.0, 1.0}
    assert scipy.stats.binomtest(int(np.sum(samples > 0)), 10_000).pvalue > 1e-3


def test_uniform_heights_on_the_ordinary_sphere_are_uniform():
    # Archimedes: a slice of the sphere has the area of a slice of the cylinder.
    samples = np.asarray(sphere.sample_uniform(key_of(3), (20_000,), 3))
    for column in samples.T:
        test = scipy.stats.kstest(column, scipy.stats.uniform(-1, 2).cdf)
        assert test.pvalue > SMALLEST_P_VALUE
    covariance = samples.T @ samples / len(samples)
    np.testing.assert_allclose(covariance, np.eye(3) / 3, atol=0.01)


def test_a_gaussian_sample_of_exact_zeros_still_gives_a_unit_vector(monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))
    samples = sphere.sample_uniform(key_of(0), (4,), 5)
    np.testing.assert_allclose(jnp.linalg.norm(samples, axis=-1), 1.0, rtol=1e-6)


def test_uniform_rejects_an_empty_sphere():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        sphere.sample_uniform(key_of(0), (), 0)


@pytest.mark.parametrize("kappa", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("dim", [2, 5, 10])
def test_von_mises_fisher_matches_scipy(dim, kappa):
    num = 20_000
    mean = references_sphere.normalize(np.linspace(-1.0, 0.5, dim)).astype(np.float32)
    samples = np.float64(
        sample_von_mises_fisher(key_of(dim), mean, kappa=kappa, num=num)
    )
    assert samples.shape == (num, dim)
    np.testing.assert_allclose(np.linalg.norm(samples, axis=1), 1.0, rtol=1e-6)

    # The chord keeps its digits where the cosine is near 1.
    chord = np.linalg.norm(samples - mean, axis=1)
    angles = 2 * np.arcsin(np.minimum(chord / 2, 1.0))
    test = scipy.stats.kstest(angles, references_sphere.angle_cdf(dim, kappa))
    assert test.pvalue > SMALLEST_P_VALUE

    cosines = samples @ mean
    standard_error = np.std(cosines) / np.sqrt(num)
    expected = references_sphere.mean_cosine(dim, kappa)
    assert abs(np.mean(cosines) - expected) < 4 * standard_error

    # Around the mean every direction is as likely: no mean, and an isotropic
    # covariance.
    tangents = samples - cosines[:, None] * mean
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    projector = np.eye(dim) - np.outer(mean, mean)
    np.testing.assert_allclose(np.mean(tangents, axis=0), 0.0, atol=4 / np.sqrt(num))
    np.testing.assert_allclose(
        tangents.T @ tangents / num, projector / (dim - 1), atol=5 / np.sqrt(num)
    )


@pytest.mark.parametrize("kappa", [1e6, 1e12])
def test_von_mises_fisher_keeps_its_shape_at_huge_concentration(kappa):
    # kappa (1 - cosine) tends to a Gamma variable of shape (D - 1) / 2. Around a mean
    # on an axis, 1 - cosine is half the square of the remaining coordinates.
    mean = np.array([0.0, -1.0, 0.0, 0.0], np.float32)
    samples = np.float64(
        sample_von_mises_fisher(key_of(1), mean, kappa=kappa, num=10_000)
    )
    one_minus_cosine = np.sum(samples[:, [0, 2, 3]] ** 2, axis=1) / 2
    test = scipy.stats.kstest(kappa * one_minus_cosine, scipy.stats.gamma(1.5).cdf)
    assert test.pvalue > SMALLEST_P_VALUE
    np.testing.assert_allclose(samples[:, 1], -1.0, atol=1e-4)


def test_von_mises_fisher_on_two_points_is_a_coin():
    # P(+mean) = exp(kappa) / (exp(kappa) + exp(-kappa)) = sigmoid(2 kappa).
    mean = np.array([-3.0], np.float32)
    samples = sphere.sample_von_mises_fisher(key_of(0), mean, kappa=0.5, num=10_000)
    assert samples.shape == (10_000, 1)
    assert set(np.unique(samples)) == {-1.0, 1.0}
    num_at_mean = int(np.sum(samples < 0))
    probability = 1 / (1 + np.exp(-1.0))
    assert scipy.stats.binomtest(num_at_mean, 10_000, probability).pvalue > 1e-3


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_mean_may_be_a_coordinate_axis_of_any_length(sign):
    mean = np.array([sign * 7.0, 0.0, 0.0], np.float32)
    samples = sample_von_mises_fisher(key_of(0), mean, kappa=1e4, num=100)
    np.testing.assert_allclose(samples[:, 0], sign, atol=1e-2)


def test_von_mises_fisher_is_the_same_eagerly():
    mean = np.array([1.0, 2.0, 3.0], np.float32)
    np.testing.assert_allclose(
        sphere.sample_von_mises_fisher(key_of(0), mean, kappa=5.0, num=50),
        sample_von_mises_fisher(key_of(0), mean, kappa=5.0, num=50),
        atol=1e-6,
    )


def test_von_mises_fisher_vmaps_over_keys_means_and_concentrations():
    keys = jax.random.split(key_of(0), 3)
    means = sphere.sample_uniform(key_of(1), (3,), 4)
    kappas = jnp.array([0.0, 5.0, 1000.0])

    def sample(key, mean, kappa):
        return sample_von_mises_fisher(key, mean, kappa=kappa, num=20)

    batched = jax.jit(jax.vmap(sample))(keys, means, kappas)
    single = [sample(*arguments) for arguments in zip(keys, means, kappas)]
    np.testing.assert_allclose(batched, np.stack(single), atol=1e-6)


def test_samples_are_distinct_and_depend_on_the_key():
    mean = np.array([1.0, 0.0], np.float32)
    first, second = (
        sample_von_mises_fisher(key_of(seed), mean, kappa=5.0, num=100)
        for seed in (0, 1)
    )
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 200


def test_von_mises_fisher_rejects_no_samples():
    mean = np.array([1.0, 0.0], np.float32)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        sphere.sample_von_mises_fisher(key_of(0), mean, kappa=5.0, num=0)


def test_shapes_and_types_are_checked():
    with pytest.raises(AssertionError):
        sphere.normalize(np.array([1, 2]))
    with pytest.raises(AssertionError):
        sphere.sample_von_mises_fisher(
            key_of(0), np.ones((1, 2), np.float32), kappa=5.0, num=2
        )
