"""Every pure function in every mode of JAX, with the values that break arithmetic."""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_knn
import references_losses
import references_rewards
import references_sphere
import references_tasks

import aps_jax
from aps_jax.ops import losses

PARTICLES = np.random.default_rng(7).normal(size=(9, 17))
WEIGHTS = {"skill_weight": 0.7, "entropy_weight": 1.3}
TRANSITION = {
    "psi_tm1": (3, 4),
    "exploration_tm1": (3,),
    "phi_t": (4,),
    "r_entropy_t": (),
    "discount_t": (),
    "psi_t": (3, 4),
    "exploration_t": (3,),
    "w": (4,),
}
SCALAR = {name: TRANSITION[name] for name in ("psi_tm1", "discount_t", "psi_t", "w")}


class Case(NamedTuple):
    """A function of a batch, and what it must return."""

    function: Callable[..., Any]  # of arrays [N, ...]
    shapes: dict[str, tuple[int, ...]]  # of its arguments, without N
    twin: Callable[..., Any]  # of float64 arrays [N, ...]
    partial: tuple[str, ...] = ()  # arguments on which not all results depend


def mapped(function):
    return lambda **arguments: jax.vmap(lambda one: function(**one))(arguments)


def each(twin):
    """Calls a slow function for one sample after the other."""

    def call(**arguments):
        num = len(next(iter(arguments.values())))
        rows = [
            twin(**{name: x[i] for name, x in arguments.items()}) for i in range(num)
        ]
        if rows and isinstance(rows[0], tuple):
            return tuple(np.array(column) for column in zip(*rows, strict=True))
        return np.array(rows)

    return call


def td_case(name, shapes):
    """A case of a TD error, for action 1 and, where it takes them, the weights."""
    weights = WEIGHTS if "exploration_t" in shapes else {}

    def function(**arguments):
        return getattr(losses, name)(**arguments, a_tm1=jnp.int32(1), **weights)

    twin = functools.partial(getattr(references_losses, name), a_tm1=1, **weights)
    partial = ["psi_tm1", "exploration_tm1", "phi_t", "r_entropy_t"]
    if name == "off_policy_td_error":
        partial.append("exploration_t")
    return Case(mapped(function), shapes, each(twin), tuple(partial))


def knn_case(dim):
    def function(queries):
        particles = jnp.asarray(PARTICLES[:, :dim], queries.dtype)
        return aps_jax.knn_distances(queries, particles, k=3)

    def twin(queries):
        # The particles are rounded as the queries are.
        particles = PARTICLES[:, :dim].astype(queries.dtype)
        if not len(queries):
            return np.zeros((0, 3))
        return references_knn.knn_distances(queries, particles, 3)

    return Case(function, {"queries": (dim,)}, twin)


def whitened(h):
    moments = aps_jax.update_whitening(aps_jax.init_whitening(h.shape[1]), h)
    return moments.covariance, aps_jax.whiten(moments, h)


def whitened_twin(h):
    h = np.float64(h)
    if not len(h):
        return np.zeros((2, 2)), h
    deviation = h - np.mean(h, axis=0)
    covariance = deviation.T @ deviation / len(h)
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, max(1e-3 * np.mean(values), 1e-12))
    return covariance, deviation @ (vectors / np.sqrt(values)) @ vectors.T


def regressed(phi, r):
    moments = aps_jax.init_regression_moments(phi.shape[1])
    moments = aps_jax.update_regression_moments(
        moments, phi, r, jnp.ones(r.shape, bool)
    )
    fallback_task = jnp.asarray([0.0, 2.0], phi.dtype)
    found = aps_jax.infer_task(
        moments, fallback_task=fallback_task, ridge=0.0, intercept=True
    )
    return moments.mean, found.task, found.scale, found.r_squared


def regressed_twin(phi, r):
    samples = np.float64(np.column_stack([phi, r]))
    if len(np.unique(r)) < 2:
        mean = samples[0] if len(r) else np.zeros(3)
        return mean, np.array([0.0, 1.0]), 1.0, 0.0
    w, b = references_tasks.least_squares(phi, r, True)
    scale = np.linalg.norm(w)
    explained = references_tasks.r_squared(phi, r, w, b, True)
    return np.mean(samples, axis=0), w / scale, scale, explained


def scaled(distances):
    return aps_jax.update_distance_scale(aps_jax.init_distance_scale(), distances)


def intrinsic(r_skill, r_entropy):
    return aps_jax.intrinsic_reward(r_skill, r_entropy, **WEIGHTS)


CASES = {
    "q_values": Case(
        mapped(aps_jax.q_values),
        {"psi": (3, 4), "w": (4,)},
        lambda psi, w: np.einsum("nad,nd->na", np.float64(psi), np.float64(w)),
    ),
    "feature_loss": Case(
        mapped(aps_jax.feature_loss),
        {"phi_t": (4,), "w_tm1": (4,)},
        each(lambda phi_t, w_tm1: -np.float64(phi_t) @ np.float64(w_tm1)),
    ),
    "n_step_target": Case(
        mapped(aps_jax.n_step_target),
        {"r_t": (5,), "discount_t": (5,), "v_t": (5,)},
        each(references_losses.n_step_target),
    ),
    "n_step_cumulant": Case(
        mapped(aps_jax.n_step_cumulant),
        {"cumulant_t": (5, 2), "discount_t": (5,)},
        each(references_losses.n_step_cumulant),
        partial=("cumulant_t",),
    ),
    "scalar_td_error": td_case("scalar_td_error", {**SCALAR, "r_t": ()}),
    "vector_td_error": td_case("vector_td_error", {**SCALAR, "cumulant_t": (4,)}),
    "split_td_error": td_case("split_td_error", TRANSITION),
    "off_policy_td_error": td_case("off_policy_td_error", TRANSITION),
    "skill_reward": Case(
        mapped(aps_jax.skill_reward),
        {"phi_t": (4,), "w": (4,)},
        each(lambda phi_t, w: np.float64(phi_t) @ np.float64(w)),
    ),
    "intrinsic_reward": Case(
        mapped(intrinsic),
        {"r_skill": (), "r_entropy": ()},
        lambda r_skill, r_entropy: (
            0.7 * np.float64(r_skill) + 1.3 * np.float64(r_entropy)
        ),
    ),
    "particle_entropy_reward": Case(
        mapped(aps_jax.particle_entropy_reward),
        {"distances": (4,), "sigma": ()},
        each(
            functools.partial(
                references_rewards.particle_entropy_reward, c=1.0, clip=1e-4
            )
        ),
    ),
    "update_distance_scale": Case(
        scaled,
        {"distances": (4,)},
        lambda distances: references_rewards.decayed_mean([distances], 0.99),
        partial=("distances",),
    ),
    "normalize": Case(
        aps_jax.normalize,
        {"vectors": (4,)},
        lambda vectors: (
            references_sphere.normalize(vectors) if len(vectors) else vectors
        ),
    ),
    "knn_distances": knn_case(5),
    "knn_distances of many features": knn_case(17),
    "whitening": Case(whitened, {"h": (2,)}, whitened_twin),
    "regression": Case(regressed, {"phi": (2,), "r": ()}, regressed_twin, ("phi", "r")),
    "gpi_action_values": Case(
        mapped(aps_jax.gpi_action_values),
        {"psi": (2, 3, 4), "w": (4,)},
        lambda psi, w: np.max(
            np.einsum("nkad,nd->nka", np.float64(psi), np.float64(w)), axis=1
        ),
    ),
}
knn_distances = jax.jit(aps_jax.knn_distances, static_argnames="k")
JITTED = {
    name: jax.jit(lambda arguments, f=case.function: f(**arguments))
    for name, case in CASES.items()
}


def all_cases():
    return pytest.mark.parametrize("name", CASES)


def arguments_of(case, num, dtype, change=lambda x: x):
    """Draws positive arguments, as distances and scales are."""
    rng = np.random.default_rng(0)
    return {
        name: change(0.1 + rng.exponential(size=(num, *shape))).astype(dtype)
        for name, shape in case.shapes.items()
    }


def assert_matches(name, arguments, returned, rtol):
    expected = CASES[name].twin(**arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    returned = jax.tree.leaves(returned)
    assert len(returned) == len(expected)
    for value, number in zip(returned, expected, strict=True):
        np.testing.assert_allclose(value, number, rtol=rtol, atol=rtol)


def of_type(leaves, dtype):
    return {leaf.dtype for leaf in jax.tree.leaves(leaves)} == {np.dtype(dtype)}


@all_cases()
@pytest.mark.parametrize("num, dtype", [(1, np.float16), (6, np.float64)])
def test_values_and_types_whatever_type_comes_in(name, num, dtype):
    arguments = arguments_of(CASES[name], num, dtype)
    is_double = dtype == np.float64
    with jax.enable_x64(is_double), jax.debug_nans(True):
        results = JITTED[name](arguments)
    assert of_type(results, np.float64 if is_double else np.float32)
    assert_matches(name, arguments, results, 1e-9 if is_double else 1e-4)


@all_cases()
def test_mixed_types_and_a_batch_of_none(name):
    # Every other argument in bfloat16, which is an error to mix for JAX itself.
    arguments = arguments_of(CASES[name], 0, np.float32)
    for key in list(arguments)[::2]:
        arguments[key] = arguments[key].astype(jnp.bfloat16)
    assert of_type(jax.eval_shape(JITTED[name], arguments), np.float32)
    with jax.debug_nans(True):
        for leaf in jax.tree.leaves(JITTED[name](arguments)):
            assert np.all(np.isfinite(leaf))


@all_cases()
def test_no_nan_is_made_on_the_way(name):
    arguments = arguments_of(CASES[name], 6, np.float32)
    with jax.debug_nans(True):
        assert_matches(name, arguments, CASES[name].function(**arguments), 1e-4)


@all_cases()
@pytest.mark.parametrize("change", [np.zeros_like, np.ones_like, np.round])
def test_zeros_and_duplicates(name, change):
    arguments = arguments_of(CASES[name], 6, np.float32, change)
    with jax.debug_nans(True):
        assert_matches(name, arguments, JITTED[name](arguments), 1e-4)


@all_cases()
def test_what_is_not_a_number_shows(name):
    for argument in CASES[name].shapes:
        arguments = arguments_of(CASES[name], 6, np.float32)
        arguments[argument][0] = np.nan
        results = jax.tree.leaves(JITTED[name](arguments))
        shows = [np.any(np.isnan(x)) for x in results]
        if argument in CASES[name].partial:
            assert any(shows), argument
        else:
            assert all(shows), argument


# Those that treat a part of what they compute as constant have tests of their
# gradients.
@pytest.mark.parametrize(
    "name",
    [
        "q_values",
        "n_step_cumulant",
        "particle_entropy_reward",
        "update_distance_scale",
        "normalize",
        "knn_distances",
        "knn_distances of many features",
        "gpi_action_values",
    ],
)
def test_first_and_second_derivatives(name):
    rng = np.random.default_rng(1)
    arguments = arguments_of(CASES[name], 3, np.float64)
    along = {key: rng.normal(size=x.shape) for key, x in arguments.items()}

    def value(step):
        moved = jax.tree.map(lambda x, y: x + step * y, arguments, along)
        results = jax.tree.leaves(CASES[name].function(**moved))
        return sum(jnp.sum(jnp.sin(x)) for x in results)

    @jax.jit
    def derivatives(step):
        slope = jax.grad(value)
        return value(step), slope(step), jax.grad(slope)(step)

    with jax.enable_x64(True), jax.debug_nans(True):
        before, here, after = (
            np.array(derivatives(step)) for step in (-1e-5, 0.0, 1e-5)
        )
    numerical = (after - before)[:2] / 2e-5
    np.testing.assert_allclose(here[1:], numerical, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_states_keep_their_types_under_scan(dtype):
    rng = np.random.default_rng(0)
    h, r = rng.exponential(size=(4, 6, 2)).astype(dtype), rng.normal(size=(4, 6))
    batches = (h, r.astype(dtype), np.ones((4, 6), bool))

    def update(states, batch):
        scale, moments, regression = states
        return (
            aps_jax.update_distance_scale(scale, batch[0]),
            aps_jax.update_whitening(moments, batch[0]),
            aps_jax.update_regression_moments(regression, *batch),
        ), None

    with jax.enable_x64(dtype == np.float64), jax.debug_nans(True):
        states = (
            aps_jax.init_distance_scale(),
            aps_jax.init_whitening(2),
            aps_jax.init_regression_moments(2),
        )
        (scale, moments, regression), _ = jax.lax.scan(update, states, batches)
    rtol = 1e-12 if dtype == np.float64 else 1e-5
    expected = references_rewards.decayed_mean(h, 0.99)
    np.testing.assert_allclose([scale.weight, scale.mean], expected, rtol=rtol)
    samples = np.column_stack([np.float64(h).reshape(24, 2), r.astype(dtype).ravel()])
    np.testing.assert_allclose(regression.mean, np.mean(samples, axis=0), rtol=rtol)
    np.testing.assert_allclose(regression.comoment, 23 * np.cov(samples.T), rtol=rtol)
    covariances = [np.cov(np.float64(x).T, ddof=0) for x in h]
    weights = 0.99 ** np.arange(3, -1, -1)
    covariance = np.average(covariances, axis=0, weights=weights)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=rtol)


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e20, 3e38])
def test_directions_of_extreme_vectors(size):
    vectors = np.float32(size) * np.float32([[1.0, -1.0, 0.5], [0.0, 0.0, -1.0]])
    with jax.debug_nans(True):
        directions = aps_jax.normalize(vectors)
    np.testing.assert_allclose(
        directions, [[2 / 3, -2 / 3, 1 / 3], [0, 0, -1]], rtol=1e-6
    )


@pytest.mark.parametrize("dim", [5, 17])
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_distances_of_extreme_features(dim, size):
    particles = np.float32(size) * np.float32(PARTICLES[:, :dim])
    with jax.debug_nans(True):
        distances = knn_distances(particles, particles, k=4)
    expected = references_knn.knn_distances(particles, particles, 4)
    np.testing.assert_allclose(distances / size, expected / size, rtol=1e-5)


@pytest.mark.parametrize("dim", [5, 17])
def test_infinite_particles_are_infinitely_far(dim):
    # More of them than there are spare candidates.
    particles = np.float32(PARTICLES[:, :dim])
    particles[1:7] = np.inf
    queries = np.float32(PARTICLES[:2, :dim] + 0.1)
    distances = knn_distances(queries, particles, k=4)
    expected = references_knn.knn_distances(queries, particles, 4)
    np.testing.assert_array_equal(np.isinf(expected), [[False] * 3 + [True]] * 2)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


@pytest.mark.parametrize("num_queries", [0, 1])
def test_distances_of_no_queries(num_queries):
    queries, particles = np.zeros((num_queries, 5)), np.ones((4, 5))
    distances = aps_jax.knn_distances(queries, particles, k=2)
    np.testing.assert_allclose(distances, np.full((num_queries, 2), np.sqrt(5.0)))


@pytest.mark.parametrize(
    "dim, dtype, transform",
    [(3, np.float32, lambda f: f)]
    + [(dim, dtype, jax.jit) for dim in (1, 3) for dtype in (np.float16, np.float64)],
)
def test_samples_are_unit_vectors_in_every_type(dim, dtype, transform):
    @transform
    def sample(key, w, kappa):
        return (
            aps_jax.sample_uniform(key, (6,), dim),
            aps_jax.sample_von_mises_fisher(key, w, kappa=kappa, num=6),
            aps_jax.candidate_tasks(key, w, num=6, kappa=kappa)[1:],
        )

    w, kappa = np.full(dim, 2.0, dtype), np.array(5.0, dtype)
    is_double = dtype == np.float64
    with jax.enable_x64(is_double), jax.debug_nans(True):
        samples = sample(jax.random.key(0), w, kappa)
    assert of_type(samples, np.float64 if is_double else np.float32)
    rtol = 1e-14 if is_double else 1e-6
    np.testing.assert_allclose(np.linalg.norm(samples, axis=-1), 1.0, rtol=rtol)


@pytest.mark.parametrize(
    "kappa",
    [
        np.float32(-1),
        np.int64(-3),
        jnp.float32(-5),
        np.float32("nan"),
        np.array(np.inf),
        -1,
    ],
    ids=repr,
)
def test_concentrations_of_all_number_types_are_checked(kappa):
    key, w = jax.random.key(0), np.ones(3, np.float32)
    with pytest.raises(ValueError, match="kappa must be finite and at least 0"):
        aps_jax.sample_von_mises_fisher(key, w, kappa=kappa, num=2)
    with pytest.raises(ValueError, match="kappa must be finite and at least 0"):
        aps_jax.candidate_tasks(key, w, kappa=kappa, num=2)


def test_concentrations_that_cannot_be_checked():
    @jax.jit
    def sample(kappa):
        key, w = jax.random.key(0), np.ones(3, np.float32)
        return aps_jax.sample_von_mises_fisher(key, w, kappa=kappa, num=4)

    for kappa in (-5.0, np.nan, np.inf):
        assert np.all(np.isnan(sample(kappa))), kappa
    for kappa in (0.0, 1e-30, 2e38):
        norms = np.linalg.norm(sample(kappa), axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-6, err_msg=f"{kappa}")


@pytest.mark.parametrize("kappa", [2e38, 1e300, np.float64(1e39), 10**20])
def test_the_largest_concentrations_give_the_mean(kappa):
    samples = aps_jax.sample_von_mises_fisher(
        jax.random.key(0), np.ones(3, np.float32), kappa=kappa, num=4
    )
    np.testing.assert_allclose(samples, np.sqrt(1 / 3), rtol=1e-6)


def test_the_example_of_the_readme_runs_in_every_mode(capsys):
    # In those of conftest.py too: strict promotion of types and ranks.
    text = pathlib.Path(aps_jax.__file__).parents[1].joinpath("README.md").read_text()
    (example,) = re.findall(r"```python\n(import jax\n.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    with jax.enable_x64(True), jax.debug_nans(True):
        exec(example, names)  # noqa: S102  The project's own text.
    assert names["found"].task.dtype == np.float64
    np.testing.assert_allclose(names["found"].task, np.eye(5)[0], atol=0.2)
    assert capsys.readouterr().out
