"""Tests of aps_jax.ops.whitening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.ops import whitening


def draw(num, dim, seed=0):
    """Correlated features far from the origin, in float32."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) * 0.1
    return np.float32(3.0 + rng.normal(size=(num, dim)) @ mixing)


def test_two_points_by_hand():
    # Mean 3; deviations -2 and 2, variance 4, transform 1/2: whitened -1 and 1.
    h = np.float32([[1.0], [5.0]])
    moments = whitening.update_whitening(whitening.init_whitening(1), h)
    np.testing.assert_allclose(moments.mean, [3.0])
    np.testing.assert_allclose(moments.covariance, [[4.0]])
    np.testing.assert_allclose(moments.transform, [[0.5]], rtol=1e-6)
    np.testing.assert_allclose(whitening.whiten(moments, h), [[-1.0], [1.0]], 1e-6)


def test_moments_decay_by_hand():
    # Weights 1, then 0.5 + 1: the second batch counts 1 / 1.5 = 2/3. Variances 4 and 1:
    # 4 - 2/3 * 3 = 2 (not more, although the mean has moved). The mean is the second's.
    moments = whitening.init_whitening(1)
    for h in ([[1.0], [5.0]], [[5.0], [7.0]]):
        moments = whitening.update_whitening(moments, np.float32(h), decay=0.5)
    np.testing.assert_allclose(moments.weight, 1.5)
    np.testing.assert_allclose(moments.mean, [6.0], rtol=1e-6)
    np.testing.assert_allclose(moments.covariance, [[2.0]], rtol=1e-6)


@pytest.mark.parametrize("num, dim", [(50, 1), (50, 2), (500, 5)])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_batch_is_white_under_its_own_moments(num, dim, transform):
    h = draw(num, dim)
    moments = transform(whitening.update_whitening)(whitening.init_whitening(dim), h)
    white = np.float64(transform(whitening.whiten)(moments, h))
    np.testing.assert_allclose(white.mean(axis=0), 0.0, atol=1e-3)
    np.testing.assert_allclose(white.T @ white / num, np.eye(dim), atol=2e-3)
    # Against NumPy, in float64; and symmetric, so that no feature becomes another.
    covariance = np.atleast_2d(np.cov(np.float64(h).T, ddof=0))
    values, vectors = np.linalg.eigh(covariance)
    expected = vectors @ np.diag(values**-0.5) @ vectors.T
    np.testing.assert_allclose(moments.transform, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num", [300, 65_536])
def test_a_large_offset_loses_no_digits(num):
    h = np.float32(1e5 + np.random.default_rng(0).normal(size=(num, 3)))
    moments = whitening.update_whitening(whitening.init_whitening(3), h)
    expected = np.cov(np.float64(h).T, ddof=0)
    np.testing.assert_allclose(moments.covariance, expected, atol=2e-6)
    np.testing.assert_allclose(moments.mean, np.mean(np.float64(h), axis=0), atol=4e-3)


def test_before_any_batch_nothing_changes():
    h = draw(4, 3)
    np.testing.assert_array_equal(
        whitening.whiten(whitening.init_whitening(3), h[:, None]), h[:, None]
    )


def test_distances_do_not_depend_on_the_units_of_the_features():
    h = draw(300, 4)
    other = np.float32(7.0 * h @ np.triu(np.ones((4, 4))) - 2.0)
    distances = []
    for features in (h, other):
        moments = whitening.update_whitening(whitening.init_whitening(4), features)
        white = np.asarray(whitening.whiten(moments, features))
        distances.append(np.linalg.norm(white[1:] - white[:-1], axis=1))
    np.testing.assert_allclose(*distances, rtol=2e-2)


@pytest.mark.parametrize(
    "h", [np.ones((8, 3)), np.zeros((8, 3)), np.arange(8)[:, None] * np.ones((1, 3))]
)
def test_features_that_say_nothing_stay_finite_and_quiet(h):
    h = np.float32(h)
    moments = whitening.update_whitening(whitening.init_whitening(3), h)
    white = np.asarray(whitening.whiten(moments, h))
    assert np.all(np.isfinite(moments.transform)) and np.all(np.isfinite(white))
    assert np.max(np.abs(white)) < 4.0


def covariances(dim):
    """Of full rank, at the floor, and degenerate: twice the same, one direction, 0."""
    rng = np.random.default_rng(dim)
    turn, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    one = rng.normal(size=dim)
    wide = np.logspace(0, -6, dim)
    return [
        turn @ np.diag(variances) @ turn.T
        for variances in (np.linspace(1.0, 3.0, dim), wide, 1e20 * wide, 1e-20 * wide)
    ] + [np.ones((dim, dim)), np.outer(one, one), np.zeros((dim, dim))]


@pytest.mark.parametrize("dim", [1, 2, 5, 10])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-4), ("float64", 1e-6)])
def test_roots_without_eigenvalues_are_those_with_them(dim, dtype, tolerance):
    """What accelerators compute, against NumPy's eigenvalues with the same floor."""
    with jax.enable_x64(dtype == "float64"):
        root = jax.jit(whitening._by_resolvents)
        for covariance in covariances(dim):
            values, vectors = np.linalg.eigh(covariance)
            floor = max(1e-3 * values.mean(), 1e-12)
            scale = np.maximum(values, floor) ** -0.5
            expected = vectors @ np.diag(scale) @ vectors.T
            found = root(covariance.astype(dtype))
            assert found.dtype == dtype
            atol = tolerance * scale.max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_roots_without_eigenvalues_are_nan_where_the_moments_are():
    covariance = np.float32([[1.0, np.nan], [np.nan, 2.0]])
    assert np.all(np.isnan(whitening._by_resolvents(covariance)))


def test_gradient_reaches_the_features_alone():
    h = draw(6, 2)
    moments = whitening.update_whitening(whitening.init_whitening(2), h)

    def loss(moments, h):
        return jnp.sum(jnp.square(whitening.whiten(moments, h)))

    to_moments, to_h = jax.grad(loss, argnums=(0, 1))(moments, h)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_moments))
    # Of |T (h - mean)|^2 with the moments fixed: 2 T^T T (h - mean).
    transform = np.float64(moments.transform)
    expected = 2.0 * (h - np.asarray(moments.mean)) @ transform @ transform.T
    np.testing.assert_allclose(to_h, expected, rtol=1e-4, atol=1e-4)


def test_shapes_and_types_are_checked():
    moments = whitening.init_whitening(2)
    for h in (np.zeros(2, np.float32), np.zeros((3, 1), np.float32)):
        with pytest.raises(AssertionError):
            whitening.update_whitening(moments, h)
    with pytest.raises(AssertionError):
        whitening.whiten(moments, np.zeros((3, 2), np.int32))
