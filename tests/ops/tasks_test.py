"""Tests for inferring tasks and for acting by many of them."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
import references_tasks
from hypothesis import strategies

from aps_jax.ops import tasks

PROPERTY = hypothesis.settings(
    derandomize=True, max_examples=25, deadline=None, database=None
)
update_regression_moments = jax.jit(tasks.update_regression_moments)
infer_task = jax.jit(tasks.infer_task, static_argnames="intercept")
candidate_tasks = jax.jit(tasks.candidate_tasks, static_argnames="num")


def transforms():
    return pytest.mark.parametrize(
        "transform", [lambda f: f, jax.jit], ids=["eager", "jit"]
    )


def first_axis(dim):
    return np.eye(dim, dtype=np.float32)[0]


def correlated_features(rng, num, dim, correlation):
    """Unit features that share a direction, the more the higher the correlation."""
    features = rng.normal(size=(num, dim))
    shared = np.sqrt(correlation) * rng.normal(size=(num, 1))
    features = np.sqrt(1 - correlation) * features + shared * np.linspace(1, 2, dim)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32)


def moments_of(phi, r, mask=None):
    mask = np.ones(len(phi), bool) if mask is None else mask
    moments = tasks.init_regression_moments(phi.shape[1])
    return update_regression_moments(moments, phi, r, mask)


def scanned_moments_of(phi, r, batch_size):
    batches = (phi, r, np.ones(len(r), bool))
    moments, _ = jax.lax.scan(
        lambda moments, batch: (tasks.update_regression_moments(moments, *batch), None),
        tasks.init_regression_moments(phi.shape[1]),
        jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), batches),
    )
    return moments


def infer(phi, r, **kwargs):
    kwargs.setdefault("fallback_task", first_axis(phi.shape[1]))
    return infer_task(moments_of(phi, r), **kwargs)


@pytest.mark.parametrize(
    "num, dim, infer",
    [
        (5, 1, infer_task),
        (400, 5, infer_task),
        (400, 5, tasks.infer_task),
        (2000, 32, infer_task),
    ],
)
@pytest.mark.parametrize("intercept", [False, True])
def test_inference_matches_numpy(num, dim, infer, intercept):
    rng = np.random.default_rng(dim)
    phi = correlated_features(rng, num, dim, 0.2) * np.float32(0.5)
    phi += rng.normal(size=(num, dim)).astype(np.float32)
    r = (phi @ rng.normal(size=dim) + rng.normal(size=num)).astype(np.float32)
    moments = moments_of(phi, r)
    inferred = infer(
        moments, fallback_task=first_axis(dim), ridge=0.0, intercept=intercept
    )
    w, b = references_tasks.least_squares(phi, r, intercept)
    np.testing.assert_allclose(inferred.task, w / np.linalg.norm(w), atol=2e-4)
    np.testing.assert_allclose(inferred.scale, np.linalg.norm(w), rtol=2e-4)
    np.testing.assert_allclose(inferred.intercept, b, atol=2e-4)
    np.testing.assert_allclose(
        inferred.r_squared,
        references_tasks.r_squared(phi, r, w, b, intercept),
        atol=1e-4,
    )
    assert not inferred.is_fallback
    assert inferred.num_samples == num
    assert inferred.num_nonzero == num


def test_inference_by_hand():
    # Rewards 3 phi_1 + 4 phi_2 of the features (1, 0), (0, 1), (1, 0): w = (3, 4), of
    # norm 5 and direction (0.6, 0.8).
    phi = np.float32([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    inferred = infer(phi, np.float32([3.0, 4.0, 3.0]), ridge=0.0, intercept=False)
    np.testing.assert_allclose(inferred.task, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(inferred.scale, 5.0, rtol=1e-6)
    np.testing.assert_allclose(inferred.r_squared, 1.0, rtol=1e-6)


def test_ridge_by_hand():
    # Without an intercept: the sum of phi phi^T is diag(2, 1), that of phi r (6, 4),
    # and with a ridge of 3, w = (6 / (2 + 3), 4 / (1 + 3)) = (1.2, 1).
    phi, r = np.float32([[1, 0], [0, 1], [1, 0]]), np.float32([3, 4, 3])
    without = infer(phi, r, ridge=3.0, intercept=False)
    np.testing.assert_allclose(without.task * without.scale, [1.2, 1.0], rtol=1e-6)
    # With it: deviations (1/3, -1/3), (-2/3, 2/3), (1/3, -1/3) and -1/3, 2/3, -1/3,
    # hence the sums 2/3 [[1, -1], [-1, 1]] and 2/3 (-1, 1), an eigenvector of value
    # 4/3: w = 2/3 (-1, 1) / (4/3 + 1) by the default ridge of 1, = 2/7 (-1, 1).
    found = infer(phi, r)
    np.testing.assert_allclose(found.task * found.scale, [-2 / 7, 2 / 7], rtol=1e-5)
    # What is left, of a sum of squares of 2/3: (1/3 - 4/21)^2 (1 + 4 + 1) = 6 / 49.
    np.testing.assert_allclose(found.r_squared, 1 - 6 / 49 / (2 / 3), rtol=1e-5)


def test_intercept_by_hand():
    # Rewards 1 + 2 phi. Without the constant: sum(phi r) / sum(phi^2) = 22 / 10 = 2.2,
    # which explains (2 * 2.2 * 22 - 2.2^2 * 10) / 50.
    phi = np.float32([[0.0], [1.0], [3.0]])
    r = np.float32([0.0, 3.0, 7.0]) + np.float32([1.0, 0.0, 0.0])
    inferred = infer(phi, r, ridge=0.0, intercept=True)
    np.testing.assert_allclose(inferred.scale, 2.0, rtol=1e-5)
    np.testing.assert_allclose(inferred.intercept, 1.0, rtol=1e-5)
    np.testing.assert_allclose(inferred.r_squared, 1.0, rtol=1e-5)
    without = infer(phi, r, ridge=0.0, intercept=False)
    np.testing.assert_allclose(without.scale, 2.4, rtol=1e-5)
    np.testing.assert_array_equal(without.intercept, 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_correlated_features_do_not_turn_the_task(seed):
    rng = np.random.default_rng(seed)
    phi = correlated_features(rng, 2000, 5, 0.7)
    w = rng.normal(size=5)
    r = (phi @ w).astype(np.float32)
    assert references_tasks.cosine(infer(phi, r).task, w) > 0.9999
    # The direction of the regression the wrong way round, of features on rewards.
    assert references_tasks.cosine(np.float64(phi).T @ r, w) < 0.95


def test_sparse_noisy_rewards_still_show_the_task():
    rng = np.random.default_rng(0)
    phi = correlated_features(rng, 40_000, 5, 0.3)
    w = np.float64([1.0, -1.0, 0.5, 0.0, 2.0])
    is_rewarded = rng.uniform(size=40_000) < 0.1 * (1 + phi @ w / 4)
    inferred = infer(phi, is_rewarded.astype(np.float32), intercept=True)
    assert references_tasks.cosine(inferred.task, w) > 0.97
    assert inferred.num_nonzero == np.sum(is_rewarded)


@pytest.mark.parametrize("batch_size", [1, 32, 40_000])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_moments_of_forty_thousand_samples_suffice(batch_size, offset):
    rng = np.random.default_rng(0)
    phi = correlated_features(rng, 40_000, 5, 0.7) + np.float32(offset)
    r = (phi @ rng.normal(size=5) + 0.1).astype(np.float32)
    moments = scanned_moments_of(phi, r, batch_size)
    samples = np.float64(np.column_stack([phi, r]))
    exact = 39_999 * np.cov(samples.T)
    mean = np.mean(samples, axis=0)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.comoment, exact, atol=1e-4 * np.max(exact))
    w, _ = references_tasks.least_squares(phi, r, True)
    inferred = infer_task(moments, fallback_task=first_axis(5), intercept=True)
    np.testing.assert_allclose(inferred.task * inferred.scale, w, rtol=3e-3, atol=1e-3)
    np.testing.assert_allclose(inferred.r_squared, 1.0, atol=1e-4)


@pytest.mark.parametrize("offsets", [(0.0, 0.0, 0.0), (2000.0, 3.0, -500.0)])
@pytest.mark.parametrize("r_offset", [0.0, 3000.0])
def test_offsets_of_features_and_rewards_lose_nothing(offsets, r_offset):
    phi = np.random.default_rng(0).normal(size=(2000, 3)) + np.array(offsets)
    r = phi @ [1.0, 2.0, 3.0] + r_offset
    arguments = {"fallback_task": first_axis(3), "ridge": 0.0, "intercept": True}
    expected = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    inferred = infer(np.float32(phi), np.float32(r), **arguments)
    np.testing.assert_allclose(inferred.task, expected, atol=1e-5)
    np.testing.assert_allclose(inferred.scale, np.sqrt(14), rtol=1e-5)
    on_host = tasks.regress_task(phi, r, **arguments)
    np.testing.assert_allclose(on_host.task, expected, atol=1e-12)
    np.testing.assert_allclose(on_host.intercept, r_offset, atol=1e-8)


def test_regression_on_the_host_is_that_of_the_moments_in_float64():
    rng = np.random.default_rng(0)
    phi, r = rng.normal(size=(60, 4)), rng.normal(size=60)
    mask = np.arange(60) % 3 > 0
    phi[0] = np.nan
    found = tasks.regress_task(
        phi, r, mask, fallback_task=first_axis(4), ridge=0.0, intercept=True
    )
    w, b = references_tasks.least_squares(phi[mask], r[mask], True)
    assert {type(value) for value in found} == {np.ndarray}
    assert found.task.dtype == found.r_squared.dtype == np.float64
    np.testing.assert_allclose(found.task * found.scale, w, rtol=1e-12)
    np.testing.assert_allclose(found.intercept, b, rtol=1e-12)
    np.testing.assert_allclose(
        found.r_squared,
        references_tasks.r_squared(phi[mask], r[mask], w, b, True),
        rtol=1e-12,
    )
    assert (found.num_samples, found.is_fallback) == (40, False)


def test_the_host_may_lack_a_cpu_backend(monkeypatch):
    def local_devices(backend):
        raise RuntimeError(f"Unknown backend: {backend!r} requested")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    found = tasks.regress_task(np.eye(2), np.arange(2.0), fallback_task=first_axis(2))
    np.testing.assert_allclose(found.task, np.sqrt([0.5, 0.5]) * [-1, 1], rtol=1e-12)


def test_rewards_in_half_precision_are_summed_in_float32():
    rng = np.random.default_rng(0)
    phi = correlated_features(rng, 300, 5, 0.0).astype(np.float16)
    r = np.float16(400.0) * (phi[:, 0] > 0)
    moments = moments_of(phi, r)
    assert moments.mean.dtype == moments.comoment.dtype == np.float32
    inferred = infer_task(moments, fallback_task=first_axis(5))
    w = references_tasks.ridge(phi, r, 1.0, True)
    assert not inferred.is_fallback
    np.testing.assert_allclose(inferred.task, w / np.linalg.norm(w), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 40_000])
def test_forty_thousand_equal_rewards_fall_back_to_a_constant(batch_size):
    phi = correlated_features(np.random.default_rng(0), 40_000, 5, 0.3)
    r = np.full(40_000, 0.1, np.float32)
    moments = scanned_moments_of(phi, r, batch_size)
    np.testing.assert_array_equal(moments.mean[-1], np.float32(0.1))
    assert infer_task(moments, fallback_task=first_axis(5), intercept=True).is_fallback


@PROPERTY
@hypothesis.given(
    seed=strategies.integers(0, 2**31),
    intercept=strategies.booleans(),
    step=strategies.floats(1e-3, 10.0),
)
def test_no_other_task_fits_better(seed, intercept, step):
    rng = np.random.default_rng(seed)
    phi = correlated_features(rng, 20, 3, rng.uniform(0, 0.8))
    r = rng.normal(size=20).astype(np.float32)
    inferred = infer(phi, r, ridge=0.0, intercept=intercept)
    assert not inferred.is_fallback

    def squared_error(w, b):
        return np.sum((np.float64(r) - np.float64(phi) @ w - b) ** 2)

    w = np.float64(inferred.task) * float(inferred.scale)
    b = float(inferred.intercept)
    other = w + step * rng.normal(size=3)
    other_b = b + step * rng.normal() * intercept
    assert squared_error(w, b) <= squared_error(other, other_b) * (1 + 1e-6)


@pytest.mark.parametrize("intercept", [False, True])
def test_zero_rewards_fall_back(intercept):
    phi = correlated_features(np.random.default_rng(0), 50, 5, 0.3)
    fallback_task = np.float32([0.0, 3.0, 0.0, 4.0, 0.0])
    inferred = infer(
        phi,
        np.zeros(50, np.float32),
        fallback_task=fallback_task,
        intercept=intercept,
    )
    assert inferred.is_fallback
    np.testing.assert_allclose(inferred.task, fallback_task / 5, rtol=1e-6)
    np.testing.assert_array_equal(
        [inferred.scale, inferred.intercept, inferred.r_squared], [1.0, 0.0, 0.0]
    )
    assert inferred.num_samples == 50
    assert inferred.num_nonzero == 0


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("num", [0, 1, 2, 3, 10])
def test_few_samples_already_give_a_direction(num, intercept):
    rng = np.random.default_rng(3)
    phi, r = correlated_features(rng, 10, 20, 0.2), np.float32(rng.normal(size=10))
    mask = np.arange(10) < num
    moments = moments_of(phi, r, mask)
    inferred = infer_task(moments, fallback_task=first_axis(20), intercept=intercept)
    # From one sample alone nothing can be told about what varies.
    assert inferred.is_fallback == (num < 1 + intercept)
    assert inferred.num_samples == num
    if inferred.is_fallback:
        np.testing.assert_array_equal(inferred.task, first_axis(20))
    else:
        w = references_tasks.ridge(phi[:num], r[:num], 1.0, intercept)
        np.testing.assert_allclose(inferred.task * inferred.scale, w, atol=1e-6)


def test_few_rewards_find_a_task_of_many_features():
    # Fewer samples than features, and half of the rewards' variance is noise. The
    # cosine of a random task has mean 0 and standard deviation 0.16, here of 20 tasks
    # 0.035.
    cosines = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        phi = correlated_features(rng, 30, 40, 0.0)
        w = rng.normal(size=40)
        r = phi @ w + rng.normal(size=30)
        found = tasks.regress_task(phi, r, fallback_task=first_axis(40))
        cosines.append(references_tasks.cosine(found.task, w))
    assert np.mean(cosines) > 0.4


def test_equal_rewards_leave_nothing_to_an_intercept():
    phi = correlated_features(np.random.default_rng(0), 50, 5, 0.3)
    inferred = infer(phi, np.full(50, 0.1, np.float32), intercept=True)
    assert inferred.is_fallback
    np.testing.assert_array_equal(inferred.r_squared, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["phi", "r"])
def test_what_is_not_finite_falls_back(bad, where):
    rng = np.random.default_rng(0)
    phi, r = np.float32(rng.normal(size=(20, 5))), np.float32(rng.normal(size=20))
    (phi[0] if where == "phi" else r)[0] = bad
    inferred = infer(phi, r)
    assert inferred.is_fallback
    np.testing.assert_array_equal(inferred.task, first_axis(5))
    np.testing.assert_array_equal([inferred.scale, inferred.r_squared], [1.0, 0.0])


@pytest.mark.parametrize("intercept", [False, True])
def test_features_that_never_differ_are_harmless(intercept):
    phi = np.tile(np.float32([0.6, 0.8]), (30, 1))
    r = np.random.default_rng(0).normal(size=30).astype(np.float32)
    inferred = infer(phi, r, intercept=intercept)
    assert np.all(np.isfinite(inferred.task))
    np.testing.assert_allclose(np.linalg.norm(inferred.task), 1.0, rtol=1e-6)
    if intercept:
        assert inferred.is_fallback
    else:
        # Only their own direction can be told.
        np.testing.assert_allclose(np.abs(inferred.task @ phi[0]), 1.0, rtol=1e-4)


def test_zero_features_fall_back():
    r = np.ones(30, np.float32)
    assert infer(np.zeros((30, 3), np.float32), r).is_fallback


def test_features_that_are_copies_share_the_weight():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(1000, 2)).astype(np.float32)
    r = (phi @ [2.0, 1.0]).astype(np.float32)
    inferred = infer(phi[:, [0, 0, 1]], r, ridge=1e-3)
    np.testing.assert_allclose(
        inferred.task * inferred.scale, [1.0, 1.0, 1.0], rtol=1e-3
    )


def test_masked_samples_do_not_count_whatever_they_hold():
    rng = np.random.default_rng(0)
    phi, r = np.float32(rng.normal(size=(20, 3))), np.float32(rng.normal(size=20))
    mask = np.arange(20) % 2 == 0
    phi[1::4], r[1::4], r[3::4] = np.nan, np.nan, 7.0
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        moments_of(phi, r, mask),
        moments_of(phi[mask], r[mask]),
    )


def test_moments_run_under_scan_and_do_not_depend_on_the_split():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(6, 4, 3)).astype(np.float32)
    r = rng.normal(size=(6, 4)).astype(np.float32)
    r[0] = 0.0
    scanned = scanned_moments_of(phi.reshape(24, 3), r.reshape(24), 4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        scanned,
        moments_of(phi.reshape(24, 3), r.reshape(24)),
    )
    assert scanned.num_samples == 24
    assert scanned.num_nonzero == 20


def test_scale_is_in_units_of_the_reward():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(100, 3)).astype(np.float32)
    r = rng.normal(size=100).astype(np.float32)
    small, large = infer(phi, r), infer(phi, np.float32(100) * r)
    np.testing.assert_allclose(large.task, small.task, atol=1e-5)
    np.testing.assert_allclose(large.scale, 100 * small.scale, rtol=1e-5)
    np.testing.assert_allclose(large.r_squared, small.r_squared, rtol=1e-4)


def test_inference_vmaps():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(4, 30, 3)).astype(np.float32)
    r = rng.normal(size=(4, 30)).astype(np.float32)
    r[2] = 0.0
    each = [moments_of(*pair) for pair in zip(phi, r)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    infer_one = functools.partial(infer_task, fallback_task=first_axis(3))
    batched = jax.jit(jax.vmap(infer_one))(stacked)
    np.testing.assert_array_equal(batched.is_fallback, [False, False, True, False])
    for i, moments in enumerate(each):
        np.testing.assert_allclose(
            batched.task[i], infer_one(moments).task, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "num_policies, num_actions, dim", [(1, 1, 1), (3, 4, 2), (11, 18, 5)]
)
@transforms()
def test_gpi_matches_float64(num_policies, num_actions, dim, transform):
    rng = np.random.default_rng(0)
    psi = rng.normal(size=(num_policies, num_actions, dim)).astype(np.float32)
    w = rng.normal(size=dim).astype(np.float32)
    np.testing.assert_allclose(
        transform(tasks.gpi_action_values)(psi, w),
        references_tasks.gpi_action_values(psi, w),
        rtol=1e-5,
    )


def test_gpi_scores_policies_by_the_task_that_counts():
    # By w = (1, 0) the policies are worth ((1, 0), (0, 3)): values (1, 3). By their own
    # tasks (1, 0) and (0, 1), the second would be worth (9, 0), and action 0 the best.
    psi = np.float32([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 9.0], [3.0, 0.0]]])
    values = tasks.gpi_action_values(psi, np.float32([1.0, 0.0]))
    np.testing.assert_array_equal(values, [1.0, 3.0])


def test_more_policies_never_lower_a_value():
    rng = np.random.default_rng(0)
    psi = rng.normal(size=(5, 4, 3)).astype(np.float32)
    w = rng.normal(size=3).astype(np.float32)
    all_five = tasks.gpi_action_values(psi, w)
    assert np.all(all_five >= tasks.gpi_action_values(psi[:1], w))
    np.testing.assert_array_equal(all_five, tasks.gpi_action_values(psi[::-1], w))


@pytest.mark.parametrize("kappa", [0.0, 5.0])
def test_candidates_start_with_the_task_itself(kappa):
    w = np.float32([0.6, 0.8])
    candidates = candidate_tasks(jax.random.key(0), w, num=10, kappa=kappa)
    assert candidates.shape == (11, 2)
    np.testing.assert_array_equal(candidates[0], w)
    np.testing.assert_allclose(np.linalg.norm(candidates, axis=1), 1.0, rtol=1e-6)
    assert len(np.unique(candidates, axis=0)) == 11


def test_candidates_gather_around_the_task_as_kappa_grows():
    w = np.float32([0.6, 0.0, 0.8])
    cosines = [
        np.mean(candidate_tasks(jax.random.key(0), w, num=4000, kappa=kappa)[1:] @ w)
        for kappa in (0.0, 5.0, 1000.0)
    ]
    # In three dimensions the mean cosine is coth(kappa) - 1 / kappa.
    np.testing.assert_allclose(cosines, [0.0, 1 / np.tanh(5) - 0.2, 0.999], atol=0.03)


def test_no_further_candidates():
    w = np.float32([0.6, 0.8])
    candidates = tasks.candidate_tasks(jax.random.key(0), w, num=0, kappa=5.0)
    np.testing.assert_array_equal(candidates, w[None, :])


def test_bad_sizes_are_rejected():
    with pytest.raises(ValueError, match="num must be at least 0, got -1"):
        tasks.candidate_tasks(
            jax.random.key(0), np.ones(2, np.float32), num=-1, kappa=5.0
        )
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        tasks.init_regression_moments(0)


def test_shapes_and_types_are_checked():
    moments = tasks.init_regression_moments(3)
    phi, r, mask = np.ones((4, 3), np.float32), np.ones(4, np.float32), np.ones(4, bool)
    for bad in [(phi[:, :2], r, mask), (phi, r[:3], mask), (phi, r, r), (r, r, mask)]:
        with pytest.raises(AssertionError):
            tasks.update_regression_moments(moments, *bad)
    with pytest.raises(AssertionError):
        tasks.infer_task(moments, fallback_task=first_axis(2))
    with pytest.raises(AssertionError):
        tasks.gpi_action_values(np.ones((2, 3), np.float32), np.ones(3, np.float32))
