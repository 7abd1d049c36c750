"""Distances from queries to their k nearest particles.

No reward, no state. Exact: few particles are chosen by a cheap lower bound of their
distance, and these are measured again by subtraction, which loses no digits however
close together or far from the origin the points are. In three forms:

- few features: the bound is the squared distance itself, unrolled over the features;
- many features: the bound is a matrix product, and a query whose candidates it cannot
  prove complete is compared again from nearby (`_search_by_product`);
- many queries or particles: tiles of both, so that memory does not grow with them.

Letters: `N` queries, `M` particles, `D` feature dimension, `k` neighbours, `C`
candidates.
Inside, arrays of distances are `[M, N]`: reductions over the first axis are vectorised
over the queries, those over the last are not, on a CPU.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.ops import precision
from aps_jax.types import Array

# Up to this many features, subtracting beats a matrix product, and is exact.
_MAX_UNROLLED_FEATURES = 16

# Candidates beyond k, so that the bound of the last one exceeds the k-th distance.
_NUM_SPARE_CANDIDATES = 4

# Queries compared again at a time.
_NUM_RETRIED_QUERIES = 64

# Relative error of a squared distance that needs no second comparison, in units of
# rounding: 2e-6 of the distance in float32, below the 1e-5 that is asked of the reward.
_TOLERANCE = 32

# Up to this many neighbours, repeated minima beat XLA's `top_k` on a CPU.
_MAX_REPEATED_MINIMA = 64

# Particles whose minimum is kept while minima are repeated.
_BLOCK_SIZE = 16


def knn_distances(
    queries: Array,
    particles: Array,
    *,
    k: int,
    query_ids: Array | None = None,
    particle_ids: Array | None = None,
) -> jax.Array:
    """Computes the Euclidean distances from each query to its k nearest particles.

    The relative error is a few units in the last place of float32, and with many
    features at worst 5e-6, whatever the mean and the spread of the points; distances
    below 1e-18 may be 0. The gradient is the unit vector from the particle to the
    query, and zero where they coincide. A query or particle that is not a number makes
    the distances that depend on it NaN; an infinite particle is infinitely far.

    Args:
      queries: `[N, D]` float, components below 1e18.
      particles: `[M, D]` float, likewise.
      k: number of neighbours, in [1, M].
      query_ids: `[N]` int, or None. A particle whose id equals the query's is the query
        itself, and is no neighbour of it.
      particle_ids: `[M]` int of the same type, or None; given if and only if
        `query_ids` are.

    Returns:
      `[N, k]` float32 (float64 if an input is), ascending; +inf in the last places if
      fewer than k particles are not the query itself. The distance to the k-th
      neighbour is at index k-1.

    Raises:
      ValueError: if `k` is out of range, or only one side has ids.
    """
    chex.assert_rank([queries, particles], 2)
    chex.assert_type([queries, particles], float)
    chex.assert_equal_shape_suffix([queries, particles], 1)
    chex.assert_axis_dimension_gt(queries, 1, 0)
    num_particles = particles.shape[0]
    if not 1 <= k <= num_particles:
        raise ValueError(f"k must be in [1, {num_particles}], got {k}.")
    if (query_ids is None) != (particle_ids is None):
        raise ValueError("query_ids and particle_ids must be given together.")
    if query_ids is not None:
        chex.assert_type(query_ids, int)
        chex.assert_type(particle_ids, query_ids.dtype)
        chex.assert_equal_shape([queries[:, 0], query_ids])
        chex.assert_equal_shape([particles[:, 0], particle_ids])

    queries, particles = precision.widen(queries, particles)
    # Not NumPy arrays, which traced indices cannot index.
    ids = jax.tree.map(jnp.asarray, (query_ids, particle_ids))
    if queries.shape[0] == 0:
        return jnp.zeros((0, k), queries.dtype)
    distances, _ = _nearest(k, queries, particles, ids)
    return distances.T


class _Points(NamedTuple):
    """Queries or particles."""

    vectors: jax.Array  # [N or M, D] float.
    ids: jax.Array | None  # [N or M] int.


class _Neighbors(NamedTuple):
    """The particles nearest to each query, in the order of the squares."""

    squares: jax.Array  # [k, N] float, of distances, +inf where there is no particle.
    indices: jax.Array  # [k, N] int32, of particles.


# Finds the k smallest values of each column of [M, N], and their rows.
_FindSmallest = Callable[[jax.Array, int], _Neighbors]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nearest(k, queries, particles, ids):
    """Finds distances and indices `[k, N]`; the derivative leaves out the search."""
    nearest = jax.lax.platform_dependent(
        *map(_Points, (queries, particles), ids),
        cpu=functools.partial(_search, _CPU, k),
        default=functools.partial(_search, _ACCELERATOR, k),
    )
    return jnp.sqrt(nearest.squares), nearest.indices


@_nearest.defjvp
def _nearest_jvp(k, primals, tangents):
    queries, particles, ids = primals
    queries_dot, particles_dot, _ = tangents
    distances, indices = _nearest(k, queries, particles, ids)
    is_flat = (distances == 0) | (distances == jnp.inf)
    inverse = jnp.where(is_flat, 0.0, 1 / jnp.where(is_flat, 1.0, distances))
    directions = (queries[None, :, :] - particles[indices]) * inverse[:, :, None]
    differences_dot = queries_dot[None, :, :] - particles_dot[indices]
    distances_dot = jnp.sum(directions * differences_dot, axis=-1)
    return (distances, indices), (
        distances_dot,
        np.zeros(indices.shape, jax.dtypes.float0),
    )


class _Tuning(NamedTuple):
    """What is fastest on one kind of machine."""

    tile_size: int  # particles compared at a time
    workspace: int  # entries of a tile's distances, which bounds the queries of a tile
    # Finds the k smallest values of each column of [M, N], and their rows, [k, N].
    smallest: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


def _search(
    tuning: _Tuning, k: int, queries: _Points, particles: _Points
) -> _Neighbors:
    """Finds the k nearest particles, for a tile of the queries at a time."""
    num_queries, dim = queries.vectors.shape
    num_particles = particles.vectors.shape[0]
    # The running best of a tile must fit into it.
    tile_size = max(tuning.tile_size, k + _NUM_SPARE_CANDIDATES)
    tile_size = min(tile_size, num_particles)
    num_tiles = math.ceil(num_queries / max(tuning.workspace // tile_size, 1))
    query_tile_size = math.ceil(num_queries / num_tiles)

    smallest = functools.partial(_smallest, tuning)
    if dim <= _MAX_UNROLLED_FEATURES:
        method = functools.partial(_smallest_over_tiles, smallest, _squares)
    else:
        method = functools.partial(_search_by_product, smallest)
    search = functools.partial(method, particles, k=k, tile_size=tile_size)
    if num_tiles == 1:
        return search(queries)
    tiles = jax.tree.map(
        # What is found for the rows that fill up the last tile is thrown away.
        lambda x: jnp.resize(x, (num_tiles, query_tile_size, *x.shape[1:])),
        queries,
    )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(k, -1)[:, :num_queries],
        jax.lax.map(search, tiles),
    )


def _squares(queries, particles):
    """Computes the squared distances, unrolled over the features, `[M, N]`."""
    return sum(
        jnp.square(particles[:, d][:, None] - queries[:, d][None, :])
        for d in range(queries.shape[1])
    )


def _search_by_product(
    smallest: _FindSmallest,
    particles: _Points,
    queries: _Points,
    *,
    k: int,
    tile_size: int,
) -> _Neighbors:
    """Finds the k nearest particles by a matrix product, and checks that they are.

    `norm(q)^2 + norm(p)^2 - 2 q^T p` loses the digits that the terms have in common. So
    the points are taken relative to a centre, the bound of the rounding error is
    subtracted, and the C particles of the smallest such bounds are measured by
    subtraction. If the k-th distance found is below the C-th bound, no other particle
    can be nearer. A query for which this fails lies in a cluster that is small against
    its distance from the centre: it becomes the centre of a new comparison, for itself
    and for the queries near it, which settles it and nearly always them.
    """
    vectors, num_particles = particles.vectors, particles.vectors.shape[0]
    num_candidates = min(k + _NUM_SPARE_CANDIDATES, num_particles)
    num_retried = min(_NUM_RETRIED_QUERIES, queries.vectors.shape[0])

    def search_from(centre, queries):
        bounds_to = functools.partial(_product_bounds, centre)
        bounds, candidates = _smallest_over_tiles(
            smallest, bounds_to, particles, queries, num_candidates, tile_size
        )
        differences = queries.vectors[None, :, :] - vectors[candidates]
        squares = jnp.sum(jnp.square(differences), axis=-1)
        squares = jnp.where(bounds == jnp.inf, jnp.inf, squares)
        squares, order = smallest(squares, k)
        nearest = _Neighbors(squares, jnp.take_along_axis(candidates, order, axis=0))
        if num_candidates == num_particles:
            return nearest, jnp.ones(squares.shape[1], bool)
        tolerance = _TOLERANCE * jnp.finfo(squares.dtype).eps
        # Not `<=`: what is not a number must not be retried.
        return nearest, ~(squares[-1] * (1 - tolerance) > bounds[-1])

    def has_unsettled(state):
        _, is_settled = state
        return ~jnp.all(is_settled)

    def retry(state):
        nearest, is_settled = state
        centre = queries.vectors[jnp.argmin(is_settled)]
        squares = jnp.sum(jnp.square(queries.vectors - centre[None, :]), axis=-1)
        # The centre comes first, at distance 0, whose bounds are exact: it is settled.
        unsettled_squares = jnp.where(is_settled, jnp.inf, squares)
        rows = smallest(unsettled_squares[:, None], num_retried).indices[:, 0]
        retried = jax.tree.map(lambda x: x[rows], queries)
        again, is_settled_again = search_from(centre, retried)
        # Rows settled before only fill up the number, and may lie far from this centre.
        is_kept = is_settled[rows]
        nearest = jax.tree.map(
            lambda x, y: x.at[:, rows].set(jnp.where(is_kept[None, :], x[:, rows], y)),
            nearest,
            again,
        )
        is_settled_again = is_settled_again.at[0].set(True)
        return nearest, is_settled.at[rows].set(is_kept | is_settled_again)

    # A mean of differences: a plain sum of many equal offsets would lose their digits.
    reference = vectors[0]
    centre = reference + jnp.mean(vectors - reference[None, :], axis=0)
    # One particle that is not a number must show, and not spoil the choice of others.
    centre = jnp.where(jnp.isfinite(centre), centre, 0.0)
    state = search_from(centre, queries)
    return jax.lax.while_loop(has_unsettled, retry, state)[0]


def _product_bounds(centre, queries, particles) -> jax.Array:
    """Bounds the squared distances from below by a matrix product, `[M, N]`.

    Rounding moves `norm(q)^2 + norm(p)^2 - 2 q^T p` by at most `gamma` times the sum of
    the squared norms. In the worst case gamma is near 2 D units of rounding; sums of D
    terms whose rounding errors are not all of one sign stay within a multiple of
    sqrt(D) (Higham and Mary 2019, https://doi.org/10.1137/18M1226312).
    """
    queries = queries - centre[None, :]
    particles = particles - centre[None, :]
    unit = float(jnp.finfo(queries.dtype).eps) / 2
    gamma = (16 + 4 * math.sqrt(queries.shape[1])) * unit
    query_squares = (1 - gamma) * jnp.sum(jnp.square(queries), axis=-1)
    particle_squares = (1 - gamma) * jnp.sum(jnp.square(particles), axis=-1)
    # An infinite particle is infinitely far, not a NaN of 0 times infinity.
    is_far = particle_squares == jnp.inf
    particles = jnp.where(is_far[:, None], 0.0, particles)
    # Without `HIGHEST`, GPUs and TPUs would round the factors to 10 bits or fewer.
    products = jnp.matmul(particles, queries.T, precision=jax.lax.Precision.HIGHEST)
    return particle_squares[:, None] + query_squares[None, :] - 2 * products


def _smallest_over_tiles(
    smallest: _FindSmallest,
    squares_to: Callable[[jax.Array, jax.Array], jax.Array],
    particles: _Points,
    queries: _Points,
    k: int,
    tile_size: int,
) -> _Neighbors:
    """Finds the k particles of the smallest squares, one tile after the other."""
    num_queries, num_particles = queries.vectors.shape[0], particles.vectors.shape[0]
    offsets = np.arange(0, num_particles, tile_size)
    # The last tile starts earlier if it would not be full, and leaves out what the
    # one before it had: padding the particles would copy them.
    starts = np.minimum(offsets, num_particles - tile_size)

    def search_tile(start, offset):
        tile = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile_size), particles
        )
        squares = squares_to(queries.vectors, tile.vectors)
        if num_particles % tile_size:
            is_repeated = start + jnp.arange(tile_size, dtype=jnp.int32) < offset
            squares = jnp.where(is_repeated[:, None], jnp.inf, squares)
        if queries.ids is not None:
            is_self = tile.ids[:, None] == queries.ids[None, :]
            squares = jnp.where(is_self, jnp.inf, squares)
        nearest = smallest(squares, k)
        return nearest._replace(indices=start + nearest.indices)

    def merge_tile(best, start_and_offset):
        both = jax.tree.map(
            lambda x, y: jnp.concatenate([x, y]), best, search_tile(*start_and_offset)
        )
        squares, rows = smallest(both.squares, k)
        indices = jnp.take_along_axis(both.indices, rows, axis=0)
        return _Neighbors(squares, indices), None

    if len(offsets) == 1:
        return search_tile(jnp.int32(0), jnp.int32(0))
    shape = (k, num_queries)
    nothing = _Neighbors(
        jnp.full(shape, jnp.inf, queries.vectors.dtype), jnp.zeros(shape, jnp.int32)
    )
    tiles = (jnp.asarray(starts, jnp.int32), jnp.asarray(offsets, jnp.int32))
    best, _ = jax.lax.scan(merge_tile, nothing, tiles)
    return best


def _smallest(tuning: _Tuning, values: jax.Array, k: int) -> _Neighbors:
    """Finds the k smallest values of each column, smallest first, and their rows.

    NaN counts as the smallest value, so that it is chosen and seen.
    """
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    find = tuning.smallest if k <= _MAX_REPEATED_MINIMA else _top_k
    smallest, rows = find(values, k)
    return _Neighbors(jnp.where(smallest == -jnp.inf, jnp.nan, smallest), rows)


def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    negated, rows = jax.lax.top_k(-values.T, k)
    return -negated.T, rows.T


def _repeated_minima(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Takes the minimum k times, from the minima of blocks of rows.

    Each time only the block that the minimum was in is looked at again. On a CPU this
    is several times faster than XLA's `top_k`, because every step is vectorised over
    the columns. Equal values are taken in the order of their rows; so what was taken is
    what does not come after the last (value, row).
    """
    num_rows, num_columns = values.shape
    num_blocks = math.ceil(num_rows / _BLOCK_SIZE)
    padding = num_blocks * _BLOCK_SIZE - num_rows
    values = jnp.pad(values, ((0, padding), (0, 0)), constant_values=jnp.inf)
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)[:, None]
    members = jnp.arange(_BLOCK_SIZE, dtype=jnp.int32)[:, None]
    least = functools.partial(jnp.min, axis=0, keepdims=True)

    def take_minimum(state, _):
        minima, last_value, last_row = state
        value = least(minima)
        # Minima, because XLA does not vectorise `argmin` on a CPU.
        block = least(jnp.where(minima == value, blocks, num_blocks - 1))
        rows = _BLOCK_SIZE * block + members
        block_values = jnp.take_along_axis(values, rows, axis=0, mode="clip")
        is_left = (block_values > last_value) | (rows > last_row)
        # If nothing is left but +inf, any row will do.
        row = least(jnp.where((block_values == value) & is_left, rows, num_rows - 1))
        is_next = (block_values > value) | ((block_values == value) & (rows > row))
        minimum = least(jnp.where(is_next, block_values, jnp.inf))
        minima = jnp.where(blocks == block, minimum, minima)
        return (minima, value, row), (value[0], row[0])

    minima = jnp.min(values.reshape(num_blocks, _BLOCK_SIZE, num_columns), axis=1)
    nothing = (
        jnp.full((1, num_columns), -jnp.inf, values.dtype),
        jnp.full((1, num_columns), -1, jnp.int32),
    )
    _, smallest = jax.lax.scan(take_minimum, (minima, *nothing), length=k)
    return smallest


# A CPU is fastest while a tile's distances stay in its cache, an accelerator while they
# fill the machine.
_CPU = _Tuning(tile_size=2**12, workspace=2**20, smallest=_repeated_minima)
_ACCELERATOR = _Tuning(tile_size=2**14, workspace=2**26, smallest=_top_k)
