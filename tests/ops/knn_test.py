"""Tests for the distances to the k nearest particles."""

import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_knn
import references_rewards
from hypothesis import strategies

from aps_jax.ops import knn, rewards

PROPERTY = hypothesis.settings(
    derandomize=True, max_examples=15, deadline=None, database=None
)


@functools.cache  # Compiled once per shape.
def tiled(tile_size=None):
    """Returns the search with so many particles at a time, by default the usual."""
    size = tile_size or knn._CPU.tile_size

    def search(*points, **options):
        tuning = knn._CPU._replace(tile_size=size)
        with mock.patch.object(knn, "_CPU", tuning):
            return knn.knn_distances(*points, **options)

    return jax.jit(search, static_argnames="k")


knn_distances = tiled()

# Features of the forms: unrolled subtraction, and the matrix product.
DIMS = (5, 48)


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "num_queries, num_particles, dim, k",
    [
        (1, 1, 1, 1),
        (5, 7, 3, 3),
        (3, 200, 16, 70),
        (1, 1, 17, 1),
        (5, 7, 48, 7),
        (30, 90, 48, 3),
    ],
)
def test_matches_brute_force(num_queries, num_particles, dim, k):
    queries = uniform(num_queries, dim)
    particles = uniform(num_particles, dim, seed=1)
    distances = knn_distances(queries, particles, k=k)
    assert distances.dtype == jnp.float32
    np.testing.assert_allclose(
        distances, references_knn.knn_distances(queries, particles, k), rtol=1e-6
    )


@pytest.mark.parametrize("dim", DIMS)
def test_is_the_same_eagerly(dim):
    queries, particles = uniform(3, dim), uniform(40, dim, seed=1)
    np.testing.assert_allclose(
        knn.knn_distances(queries, particles, k=2),
        references_knn.knn_distances(queries, particles, 2),
        rtol=1e-6,
    )


def test_by_hand():
    # From (0, 0): the particles lie at 5 and 1. From (3, 4): at 0 and sqrt(9 + 9).
    queries = np.float32([[0.0, 0.0], [3.0, 4.0]])
    particles = np.float32([[3.0, 4.0], [0.0, 1.0]])
    np.testing.assert_allclose(
        knn_distances(queries, particles, k=2),
        [[1.0, 5.0], [0.0, np.sqrt(18.0)]],
        rtol=1e-6,
    )


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
def test_the_kth_distance_is_at_index_k_minus_1(k):
    # From the middle of a grid of unit squares: 4 neighbours at 1, then 4 at sqrt(2).
    grid = np.float32([[x, y] for x in (-1, 0, 1) for y in (-1, 0, 1)])
    distances = knn_distances(
        np.zeros((1, 2), np.float32),
        grid,
        k=k,
        query_ids=np.int32([4]),
        particle_ids=np.arange(9, dtype=np.int32),
    )
    assert distances.shape == (1, k)
    expected = 1.0 if k <= 4 else np.sqrt(2.0)
    np.testing.assert_allclose(distances[0, k - 1], expected, rtol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tile_size", [None, 16])
def test_a_query_is_not_its_own_neighbour(dim, tile_size):
    particles = uniform(50, dim)
    particle_ids = np.random.default_rng(0).permutation(50).astype(np.int32) + 100
    queries, query_ids = particles[10:20], particle_ids[10:20].copy()
    query_ids[3] = -1  # Not among the particles: its own copy counts.
    distances = tiled(tile_size)(
        queries, particles, k=3, query_ids=query_ids, particle_ids=particle_ids
    )
    np.testing.assert_allclose(
        distances,
        references_knn.knn_distances(queries, particles, 3, query_ids, particle_ids),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(distances[:, 0] == 0, np.arange(10) == 3)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tile_size", [None, 4])
def test_neighbours_that_do_not_exist_are_infinitely_far(dim, tile_size):
    particles = uniform(9, dim)
    particle_ids = np.int32([7, 7, 7, 7, 0, 7, 7, 7, 1])
    distances = tiled(tile_size)(
        particles[:1],
        particles,
        k=5,
        query_ids=np.int32([7]),
        particle_ids=particle_ids,
    )
    expected = np.sort(np.linalg.norm(particles[[4, 8]] - particles[0], axis=1))
    np.testing.assert_allclose(distances[0, :2], expected, rtol=1e-6)
    np.testing.assert_array_equal(distances[0, 2:], [np.inf] * 3)


@jax.jit
def entropy_rewards(distances):
    scale = rewards.update_distance_scale(rewards.init_distance_scale(), distances)
    reward = jax.vmap(rewards.particle_entropy_reward, in_axes=(0, None))
    return reward(distances, scale.mean)


@pytest.mark.parametrize("kind", references_knn.KINDS)
@pytest.mark.parametrize(
    "dim, tile_size", [(5, None), (5, 96), (16, None), (48, None), (48, 96)]
)
def test_reward_error_is_below_1e_5(kind, dim, tile_size):
    particles = references_knn.features(kind, 300, dim)
    ids = np.arange(300, dtype=np.int32)
    distances = tiled(tile_size)(
        particles, particles, k=12, query_ids=ids, particle_ids=ids
    )
    expected = references_knn.knn_distances(particles, particles, 12, ids, ids)
    sigma = np.mean(expected)
    expected_reward = [
        references_rewards.particle_entropy_reward(row, sigma, 1.0, 1e-4)
        for row in expected
    ]
    np.testing.assert_allclose(
        entropy_rewards(distances), expected_reward, rtol=0, atol=1e-5
    )
    # And so for each distance, which is what rewards of any other form need.
    np.testing.assert_allclose(distances, expected, rtol=5e-6)
    assert np.all(np.diff(distances, axis=1) >= 0)


@pytest.mark.parametrize("dim", [32, 512])
def test_clusters_closer_than_the_product_can_tell(dim):
    # The squared norms are 1e10 times the squared distances: a matrix product alone has
    # no correct digit left.
    particles = references_knn.features("clusters", 100, dim)
    np.testing.assert_allclose(
        knn_distances(particles, particles, k=3),
        references_knn.knn_distances(particles, particles, 3),
        rtol=5e-6,
    )


def test_more_tight_clusters_than_are_compared_again_at_a_time():
    # Each query has a cluster of its own, and must become a centre itself.
    centres = references_knn.features("spread", 70, 32)
    queries = centres + np.float32(1e-4) * uniform(70, 32, seed=1)
    particles = np.repeat(centres, 3, axis=0)
    particles += np.float32(1e-4) * uniform(210, 32, seed=2)
    np.testing.assert_allclose(
        knn_distances(queries, particles, k=1),
        references_knn.knn_distances(queries, particles, 1),
        rtol=5e-6,
    )


@pytest.mark.parametrize(
    "dim, tile_size", [(5, 1), (5, 30), (5, 59), (5, 1000), (48, 1), (48, 59)]
)
def test_tiles_do_not_change_the_result(dim, tile_size):
    queries, particles = uniform(7, dim), uniform(60, dim, seed=1)
    np.testing.assert_allclose(
        tiled(tile_size)(queries, particles, k=2),
        references_knn.knn_distances(queries, particles, 2),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dim", DIMS)
def test_many_queries_are_compared_in_tiles(dim, monkeypatch):
    # Eleven queries in tiles of four: the last is filled up, and cut off again.
    monkeypatch.setattr(knn, "_CPU", knn._CPU._replace(workspace=4 * max(100, 6 * dim)))
    queries, particles = uniform(11, dim), uniform(100, dim, seed=1)
    query_ids, particle_ids = np.arange(11, dtype=np.int32), np.arange(100) + 5
    ids = {"query_ids": query_ids, "particle_ids": np.int32(particle_ids)}
    distances = jax.jit(functools.partial(knn.knn_distances, k=2))
    np.testing.assert_allclose(
        distances(queries, particles, **ids),
        references_knn.knn_distances(queries, particles, 2, **ids),
        rtol=1e-6,
    )


@PROPERTY
@hypothesis.given(
    seed=strategies.integers(0, 2**31),
    dim=strategies.sampled_from(DIMS),
    kind=strategies.sampled_from(references_knn.KINDS),
    tile_size=strategies.sampled_from([None, 20]),
)
def test_any_features_match_brute_force_in_any_order(seed, dim, kind, tile_size):
    rng = np.random.default_rng(seed)
    particles = references_knn.features(kind, 64, dim, seed)
    queries = particles[rng.integers(0, 64, size=8)]
    expected = references_knn.knn_distances(queries, particles, 3)
    order, particle_order = rng.permutation(8), rng.permutation(64)
    distances = tiled(tile_size)(queries, particles, k=3)
    np.testing.assert_allclose(distances, expected, rtol=5e-6)
    permuted = tiled(tile_size)(queries[order], particles[particle_order], k=3)
    np.testing.assert_allclose(permuted, expected[order], rtol=5e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_vmaps_over_queries_and_particles(dim):
    queries, particles = uniform(3, 6, dim), uniform(3, 20, dim, seed=1)
    particles[1] = references_knn.features("clusters", 20, dim)
    queries[1] = particles[1, :6]
    ids = np.stack([np.arange(20, dtype=np.int32)] * 3)
    batched = jax.jit(
        jax.vmap(
            lambda q, p, i: knn.knn_distances(
                q, p, k=2, query_ids=i[:6], particle_ids=i
            )
        )
    )(queries, particles, ids)
    for row, q, p, i in zip(batched, queries, particles, ids):
        expected = references_knn.knn_distances(q, p, 2, i[:6], i)
        np.testing.assert_allclose(row, expected, rtol=5e-6)


def test_runs_under_scan():
    queries, particles = uniform(3, 4, 5), uniform(3, 20, 5, seed=1)
    _, scanned = jax.lax.scan(
        lambda carry, pair: (carry, knn.knn_distances(*pair, k=2)),
        None,
        (queries, particles),
    )
    for row, q, p in zip(scanned, queries, particles):
        np.testing.assert_allclose(
            row, references_knn.knn_distances(q, p, 2), rtol=1e-6
        )


def sum_of_nearest(queries, particles, k):
    """The sum of the distances by plain operations that JAX can differentiate."""
    differences = queries[:, None, :] - particles[None, :, :]
    distances = jnp.sqrt(jnp.sum(jnp.square(differences), axis=-1))
    return jnp.sum(jnp.sort(distances, axis=-1)[:, :k])


@pytest.mark.parametrize("dim, tile_size", [(5, None), (5, 8), (48, None)])
def test_gradient_matches_that_of_plain_operations(dim, tile_size):
    queries, particles = uniform(4, dim), uniform(20, dim, seed=1)
    gradients = jax.jit(
        jax.grad(lambda q, p: jnp.sum(tiled(tile_size)(q, p, k=3)), argnums=(0, 1))
    )(queries, particles)
    plain_gradients = jax.jit(
        jax.grad(sum_of_nearest, argnums=(0, 1)), static_argnums=2
    )
    expected = plain_gradients(queries, particles, 3)
    for gradient, plain in zip(gradients, expected):
        np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-6)


def test_gradient_by_hand_where_points_coincide_or_are_missing():
    # The particle at the query pulls nowhere, the one at (3, 4) away from it by the
    # unit vector -(0.6, 0.8); the query itself is no neighbour, so that the third is
    # missing.
    queries = np.float32([[0.0, 0.0]])
    particles = np.float32([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])

    def loss(queries, particles):
        distances = knn.knn_distances(
            queries,
            particles,
            k=3,
            query_ids=np.int32([2]),
            particle_ids=np.int32([0, 1, 2]),
        )
        return jnp.sum(jnp.where(distances < jnp.inf, distances, 0.0))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    query_gradient, particle_gradient = gradients(queries, particles)
    np.testing.assert_allclose(query_gradient, [[-0.6, -0.8]], rtol=1e-6)
    np.testing.assert_allclose(
        particle_gradient, [[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]], rtol=1e-6
    )


@pytest.mark.parametrize("dim", DIMS)
def test_what_is_not_a_number_shows(dim):
    queries, particles = uniform(3, dim), uniform(70, dim, seed=1)
    queries[1, 0] = np.nan
    distances = knn_distances(queries, particles, k=2)
    np.testing.assert_array_equal(
        np.isnan(distances), [[False, False], [True, True], [False, False]]
    )
    queries[1, 0], particles[40, -1] = 0.0, np.nan
    assert np.all(np.any(np.isnan(knn_distances(queries, particles, k=2)), axis=1))


@pytest.mark.parametrize("dim", [5, 32])
def test_memory_does_not_grow_with_the_particles(dim):
    def temporary_bytes(num_particles, tile_size):
        lowered = tiled(tile_size).lower(
            jax.ShapeDtypeStruct((64, dim), jnp.float32),
            jax.ShapeDtypeStruct((num_particles, dim), jnp.float32),
            k=4,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary_bytes(num, 512) for num in (2_048, 65_536))
    assert 0 < many <= 1.01 * few + 4096
    # Far below the matrix of all distances, also by default.
    assert temporary_bytes(65_536, None) < 64 * 65_536 * 4 / 3


def test_memory_does_not_grow_with_the_queries(monkeypatch):
    monkeypatch.setattr(knn, "_CPU", knn._CPU._replace(workspace=2**14))

    def temporary_bytes(num_queries):
        lowered = jax.jit(functools.partial(knn.knn_distances, k=4)).lower(
            jax.ShapeDtypeStruct((num_queries, 5), jnp.float32),
            jax.ShapeDtypeStruct((512, 5), jnp.float32),
        )
        stats = lowered.compile().memory_analysis()
        return stats.temp_size_in_bytes - num_queries * (5 + 4 + 4) * 4

    assert temporary_bytes(16_384) <= 1.1 * temporary_bytes(1_024) + 16_384 * 4 * 4


@pytest.mark.parametrize("k", [0, -1, 4])
def test_bad_k_is_rejected(k):
    points = uniform(3, 2)
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], got {k}"):
        knn.knn_distances(points, points, k=k)


@pytest.mark.parametrize("side", ["query_ids", "particle_ids"])
def test_ids_of_one_side_alone_are_rejected(side):
    points = uniform(3, 2)
    with pytest.raises(ValueError, match="must be given together"):
        knn.knn_distances(points, points, k=1, **{side: np.arange(3, dtype=np.int32)})


def test_shapes_and_types_are_checked():
    points, ids = uniform(3, 2), np.arange(3, dtype=np.int32)
    check = functools.partial(knn.knn_distances, k=1)
    with pytest.raises(AssertionError):
        check(points, uniform(3, 4))
    with pytest.raises(AssertionError):
        check(points[0], points)
    with pytest.raises(AssertionError):
        check(points.astype(np.int32), points)
    with pytest.raises(AssertionError):
        check(points, points, query_ids=ids[:2], particle_ids=ids)
    with pytest.raises(AssertionError):
        check(points, points, query_ids=ids, particle_ids=ids[:2])
    with pytest.raises(AssertionError):
        check(points, points, query_ids=points[:, 0], particle_ids=ids)
