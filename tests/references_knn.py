"""Slow float64 version of `aps_jax.ops.knn`, and features that make it hard."""

import numpy as np

# Features as they are met: spread out; almost constant and far from the origin, as
# those of a new network; in a few tight clusters, as those of a game with a few rooms,
# around the origin and far from it; on a grid, with many equal distances; repeated.
KINDS = ("spread", "constant", "offset", "clusters", "far_clusters", "grid", "repeated")


def features(kind, num, dim, seed=0):
    """Draws `[num, dim]` float32 features of one of `KINDS`."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(num, dim))
    centres = 3 * rng.normal(size=(8, dim))[rng.integers(0, 8, num)]
    drawn = {
        "spread": spread,
        "constant": 10 + 1e-3 * spread,
        "offset": 1000 * np.sign(rng.normal(size=dim)) + spread,
        "clusters": centres + 1e-4 * spread,
        "far_clusters": 100 + centres + 1e-3 * spread,
        "grid": rng.integers(0, 3, size=(num, dim)),
        "repeated": spread[rng.integers(0, num // 8, num)],
    }
    return drawn[kind].astype(np.float32)


def knn_distances(queries, particles, k, query_ids=None, particle_ids=None):
    """Sorts every distance, one query at a time, in float64."""
    queries, particles = np.float64(queries), np.float64(particles)
    rows = []
    for i, query in enumerate(queries):
        distances = np.sqrt(np.sum((particles - query) ** 2, axis=1))
        if query_ids is not None:
            distances[particle_ids == query_ids[i]] = np.inf
        rows.append(np.sort(distances)[:k])
    return np.stack(rows)
