"""Tests for the errors and losses of one transition."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_losses
import rlax
from hypothesis import strategies

from aps_jax.ops import losses

PROPERTY = hypothesis.settings(
    derandomize=True, max_examples=25, deadline=None, database=None
)
SPLIT_WEIGHTS = {"skill_weight": 0.7, "entropy_weight": 1.3}


def make_transition(num_actions=4, dim=5, discount_t=0.9, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "psi_tm1": draw(num_actions, dim),
        "exploration_tm1": draw(num_actions),
        "a_tm1": np.int32(rng.integers(num_actions)),
        "phi_t": draw(dim),
        "r_t": np.float32(rng.normal()),
        "r_entropy_t": np.float32(rng.normal()),
        "discount_t": np.float32(discount_t),
        "psi_t": draw(num_actions, dim),
        "exploration_t": draw(num_actions),
        "w": draw(dim),
    }


def scalar_arguments(t):
    return [t[x] for x in ("psi_tm1", "a_tm1", "r_t", "discount_t", "psi_t", "w")]


def vector_arguments(t):
    return [t[x] for x in ("psi_tm1", "a_tm1", "phi_t", "discount_t", "psi_t", "w")]


def split_arguments(t):
    names = ("psi_tm1", "exploration_tm1", "a_tm1", "phi_t", "r_entropy_t")
    return [t[x] for x in (*names, "discount_t", "psi_t", "exploration_t", "w")]


def transforms():
    return pytest.mark.parametrize(
        "transform", [lambda f: f, jax.jit], ids=["eager", "jit"]
    )


def shapes():
    return pytest.mark.parametrize(
        "num_actions, dim", [(1, 1), (18, 1), (1, 5), (6, 5)]
    )


@shapes()
@transforms()
def test_q_values_match_float64(num_actions, dim, transform):
    t = make_transition(num_actions, dim)
    expected = [references_losses.dot(row, t["w"]) for row in t["psi_t"]]
    np.testing.assert_allclose(
        transform(losses.q_values)(t["psi_t"], t["w"]), expected, rtol=1e-5
    )


def test_q_values_by_hand():
    # 1 * 3 + 2 * (-1) = 1 and 0 * 3 + 5 * (-1) = -5.
    psi = np.float32([[1.0, 2.0], [0.0, 5.0]])
    np.testing.assert_allclose(losses.q_values(psi, np.float32([3.0, -1.0])), [1, -5])


def test_feature_loss_by_hand():
    # -(0.6 * 0.8 + 0.8 * (-0.6)) = 0, and -1 where the features point at the task.
    phi_t = np.float32([0.6, 0.8])
    np.testing.assert_allclose(
        losses.feature_loss(phi_t, np.float32([0.8, -0.6])), 0.0, atol=1e-7
    )
    np.testing.assert_allclose(losses.feature_loss(phi_t, phi_t), -1.0, rtol=1e-6)


def test_feature_loss_teaches_the_features_only():
    t = make_transition()
    gradients = jax.grad(losses.feature_loss, argnums=(0, 1))(t["phi_t"], t["w"])
    np.testing.assert_allclose(gradients[0], -t["w"])
    np.testing.assert_array_equal(gradients[1], np.zeros(5))


@shapes()
@pytest.mark.parametrize("discount_t", [0.0, 0.9])
@transforms()
def test_scalar_td_error_matches_float64(num_actions, dim, discount_t, transform):
    arguments = scalar_arguments(make_transition(num_actions, dim, discount_t))
    np.testing.assert_allclose(
        transform(losses.scalar_td_error)(*arguments),
        references_losses.scalar_td_error(*arguments),
        rtol=1e-5,
        atol=1e-6,
    )


@shapes()
@pytest.mark.parametrize("discount_t", [0.0, 0.9])
@transforms()
def test_vector_td_error_matches_float64(num_actions, dim, discount_t, transform):
    arguments = vector_arguments(make_transition(num_actions, dim, discount_t))
    np.testing.assert_allclose(
        transform(losses.vector_td_error)(*arguments),
        references_losses.vector_td_error(*arguments),
        rtol=1e-5,
        atol=1e-6,
    )


@shapes()
@pytest.mark.parametrize("form", ["split_td_error", "off_policy_td_error"])
@pytest.mark.parametrize("discount_t", [0.0, 0.9])
@transforms()
def test_two_headed_td_errors_match_float64(
    num_actions, dim, form, discount_t, transform
):
    arguments = split_arguments(make_transition(num_actions, dim, discount_t))
    error = transform(functools.partial(getattr(losses, form), **SPLIT_WEIGHTS))(
        *arguments
    )
    expected = getattr(references_losses, form)(*arguments, **SPLIT_WEIGHTS)
    np.testing.assert_allclose(error.successor, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(error.exploration, expected[1], rtol=1e-5, atol=1e-6)


def hand_worked_transition():
    """Three actions, of which 2 is greedy by psi^T w, and 0 by exploration."""
    return {
        "psi_tm1": np.float32([[1.0, 0.0], [2.0, -1.0], [0.0, 0.0]]),
        "exploration_tm1": np.float32([0.0, 0.25, 0.0]),
        "a_tm1": np.int32(1),
        "phi_t": np.float32([0.6, 0.8]),
        "r_t": np.float32(2.0),
        "r_entropy_t": np.float32(0.5),
        "discount_t": np.float32(0.5),
        "psi_t": np.float32([[0.0, 1.0], [-4.0, 2.0], [2.0, 3.0]]),
        "exploration_t": np.float32([9.0, 1.0, 2.0]),
        "w": np.float32([1.0, 1.0]),
    }


def test_td_errors_by_hand():
    # psi_t^T w = (1, -2, 5), so a* = 2. psi_tm1[1]^T w = 1.
    t = hand_worked_transition()
    # 2 + 0.5 * 5 - 1 = 3.5.
    np.testing.assert_allclose(losses.scalar_td_error(*scalar_arguments(t)), 3.5)
    # (0.6, 0.8) + 0.5 * (2, 3) - (2, -1) = (-0.4, 3.3).
    np.testing.assert_allclose(
        losses.vector_td_error(*vector_arguments(t)), [-0.4, 3.3], rtol=1e-6
    )


@pytest.mark.parametrize(
    "skill_weight, entropy_weight, successor, exploration",
    [
        # a* = 2: the same vector error; 0.5 + 0.5 * 2 - 0.25 = 1.25.
        (1.0, 0.0, [-0.4, 3.3], 1.25),
        # a* = 0: (0.6, 0.8) + 0.5 * (0, 1) - (2, -1); 0.5 + 0.5 * 9 - 0.25 = 4.75.
        (0.0, 1.0, [-1.4, 2.3], 4.75),
        # The sum is (10, -1, 7): a* = 0 again.
        (1.0, 1.0, [-1.4, 2.3], 4.75),
        # (11, -3, 12): a* = 2.
        (2.0, 1.0, [-0.4, 3.3], 1.25),
    ],
)
def test_split_td_error_is_greedy_in_the_weighted_sum(
    skill_weight, entropy_weight, successor, exploration
):
    error = losses.split_td_error(
        *split_arguments(hand_worked_transition()),
        skill_weight=skill_weight,
        entropy_weight=entropy_weight,
    )
    np.testing.assert_allclose(error.successor, successor, rtol=1e-6)
    np.testing.assert_allclose(error.exploration, exploration, rtol=1e-6)


def test_off_policy_td_error_follows_two_policies():
    # psi obeys the task, a* = 2; exploration follows the sum (10, -1, 7), a* = 0.
    error = losses.off_policy_td_error(
        *split_arguments(hand_worked_transition()), skill_weight=1.0, entropy_weight=1.0
    )
    # (0.6, 0.8) + 0.5 * (2, 3) - (2, -1) and 0.5 + 0.5 * 9 - 0.25.
    np.testing.assert_allclose(error.successor, [-0.4, 3.3], rtol=1e-6)
    np.testing.assert_allclose(error.exploration, 4.75, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_off_policy_form_without_entropy_is_the_split_form(seed):
    arguments = split_arguments(make_transition(seed=seed))
    weights = {"skill_weight": 0.7, "entropy_weight": 0.0}
    off_policy = losses.off_policy_td_error(*arguments, **weights)
    split = losses.split_td_error(*arguments, **weights)
    np.testing.assert_array_equal(off_policy.successor, split.successor)
    np.testing.assert_array_equal(off_policy.exploration, split.exploration)


@pytest.mark.parametrize("form", ["split_td_error", "off_policy_td_error"])
def test_values_and_cumulants_in_another_unit_choose_alike(form):
    """Errors scale with the unit, so the same greedy actions were bootstrapped from."""
    t, unit = make_transition(), np.float32(0.25)
    scaled = {
        k: v if k in ("a_tm1", "discount_t", "w") else unit * v for k, v in t.items()
    }
    error, small = (
        getattr(losses, form)(*split_arguments(x), **SPLIT_WEIGHTS) for x in (t, scaled)
    )
    np.testing.assert_allclose(small.successor, unit * error.successor, rtol=1e-6)
    np.testing.assert_allclose(small.exploration, unit * error.exploration, rtol=1e-6)


def test_one_feature_and_task_one_is_q_learning():
    t = make_transition(dim=1)
    t["w"] = np.float32([1.0])
    expected = rlax.q_learning(
        t["psi_tm1"][:, 0], t["a_tm1"], t["r_t"], t["discount_t"], t["psi_t"][:, 0]
    )
    scalar = losses.scalar_td_error(*scalar_arguments(t))
    np.testing.assert_allclose(scalar, expected, rtol=1e-6)
    t["phi_t"] = t["r_t"][None]
    vector = losses.vector_td_error(*vector_arguments(t))
    np.testing.assert_allclose(vector, [expected], rtol=1e-6)


def test_vector_error_along_a_unit_task_is_the_scalar_error():
    t = make_transition()
    t["w"] /= np.linalg.norm(t["w"])
    skill_weight, entropy_weight = np.float32(0.7), np.float32(1.3)
    r_skill = t["phi_t"] @ t["w"]
    t["r_t"] = skill_weight * r_skill + entropy_weight * t["r_entropy_t"]
    t["phi_t"] = skill_weight * t["phi_t"] + entropy_weight * t["r_entropy_t"] * t["w"]
    np.testing.assert_allclose(
        losses.vector_td_error(*vector_arguments(t)) @ t["w"],
        losses.scalar_td_error(*scalar_arguments(t)),
        rtol=1e-5,
    )


def test_split_form_without_entropy_is_the_vector_form():
    t = make_transition()
    split = losses.split_td_error(
        *split_arguments(t), skill_weight=1.0, entropy_weight=0.0
    )
    np.testing.assert_array_equal(
        split.successor, losses.vector_td_error(*vector_arguments(t))
    )


def test_exploration_alone_ignores_the_task():
    first, second = make_transition(), make_transition()
    second["w"] = -first["w"]
    errors = [
        losses.split_td_error(*split_arguments(t), skill_weight=0.0, entropy_weight=1.0)
        for t in (first, second)
    ]
    np.testing.assert_array_equal(errors[0].exploration, errors[1].exploration)
    np.testing.assert_array_equal(errors[0].successor, errors[1].successor)


def test_equal_values_choose_the_first_action():
    t = make_transition(num_actions=3, dim=2)
    t["psi_t"] = np.float32([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    t["w"] = np.float32([1.0, 1.0])
    np.testing.assert_allclose(
        losses.vector_td_error(*vector_arguments(t)) + t["psi_tm1"][t["a_tm1"]],
        t["phi_t"] + 0.9 * np.float32([0.0, 1.0]),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "error, arguments",
    [
        (losses.scalar_td_error, scalar_arguments),
        (losses.vector_td_error, vector_arguments),
        (functools.partial(losses.split_td_error, **SPLIT_WEIGHTS), split_arguments),
        (
            functools.partial(losses.off_policy_td_error, **SPLIT_WEIGHTS),
            split_arguments,
        ),
    ],
    ids=["scalar", "vector", "split", "off_policy"],
)
def test_td_errors_teach_the_prediction_only(error, arguments):
    t = make_transition()
    names = [n for n in t if n != "a_tm1"]

    def loss(floats):
        leaves = jax.tree.leaves(error(*arguments({**t, **floats})))
        return sum(jnp.sum(leaf) for leaf in leaves)

    gradients = jax.jit(jax.grad(loss))({name: t[name] for name in names})
    taught = {"psi_tm1", "exploration_tm1"} & {
        name for name in names if np.any(gradients[name])
    }
    is_split = arguments is split_arguments
    assert taught == ({"psi_tm1", "exploration_tm1"} if is_split else {"psi_tm1"})
    for name in set(names) - taught:
        np.testing.assert_array_equal(gradients[name], np.zeros_like(t[name]))
    # Only the action that was taken: -w for the scalar form, -1 for the others.
    expected = np.zeros_like(t["psi_tm1"])
    expected[t["a_tm1"]] = -t["w"] if arguments is scalar_arguments else -1.0
    np.testing.assert_allclose(gradients["psi_tm1"], expected)


def test_errors_vmap_over_a_batch():
    transitions = [make_transition(seed=seed) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *transitions)
    error = functools.partial(losses.split_td_error, **SPLIT_WEIGHTS)
    batched = jax.jit(jax.vmap(error))(*split_arguments(batch))
    single = [error(*split_arguments(t)) for t in transitions]
    jax.tree.map(
        lambda x, *y: np.testing.assert_allclose(x, np.stack(y), rtol=1e-5),
        batched,
        *single,
    )


def test_errors_vmap_over_tasks_and_actions_alone():
    # What is not batched stays a NumPy array, indexed by a traced action.
    t = make_transition()
    w = make_transition(num_actions=3, seed=1)["psi_t"]
    a_tm1 = np.int32([0, 3, 1])

    @jax.jit
    @jax.vmap
    def errors(w, a_tm1):
        return losses.vector_td_error(*vector_arguments({**t, "w": w, "a_tm1": a_tm1}))

    batched = errors(w, a_tm1)
    for row, task, action in zip(batched, w, a_tm1):
        expected = references_losses.vector_td_error(
            *vector_arguments({**t, "w": task, "a_tm1": action})
        )
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 10])
@transforms()
def test_n_step_target_matches_float64(n, transform):
    rng = np.random.default_rng(n)
    r_t, v_t = rng.normal(size=(2, n)).astype(np.float32)
    discount_t = rng.uniform(size=n).astype(np.float32)
    np.testing.assert_allclose(
        transform(losses.n_step_target)(r_t, discount_t, v_t),
        references_losses.n_step_target(r_t, discount_t, v_t),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("dim", [None, 1, 5])
@transforms()
def test_n_step_cumulant_matches_float64(n, dim, transform):
    rng = np.random.default_rng(n)
    shape = (n,) if dim is None else (n, dim)
    cumulant_t = rng.normal(size=shape).astype(np.float32)
    discount_t = rng.uniform(size=n).astype(np.float32)
    total, product = transform(losses.n_step_cumulant)(cumulant_t, discount_t)
    expected = references_losses.n_step_cumulant(cumulant_t, discount_t)
    np.testing.assert_allclose(total, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product, expected[1], rtol=1e-5)


def test_n_step_sums_by_hand():
    # 1 + 0.5 * (2 + 0.5 * (4 + 0.5 * 8)) = 4; without the value 1 + 1 + 1 = 3.
    r_t, discount_t = np.float32([1.0, 2.0, 4.0]), np.full(3, 0.5, np.float32)
    v_t = np.float32([99.0, 99.0, 8.0])
    np.testing.assert_allclose(losses.n_step_target(r_t, discount_t, v_t), 4.0)
    total, product = losses.n_step_cumulant(r_t, discount_t)
    np.testing.assert_allclose([total, product], [3.0, 0.125])


def test_ten_steps_bootstrap_with_gamma_to_the_tenth():
    gamma = np.full(10, 0.99, np.float32)
    zeros, ones = np.zeros(10, np.float32), np.ones(10, np.float32)
    np.testing.assert_allclose(
        losses.n_step_cumulant(zeros, gamma)[1], 0.99**10, rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.n_step_target(zeros, gamma, ones), 0.99**10, rtol=1e-6
    )


def test_cumulant_and_value_make_the_target():
    rng = np.random.default_rng(0)
    r_t, v_t = rng.normal(size=(2, 7)).astype(np.float32)
    discount_t = rng.uniform(size=7).astype(np.float32)
    total, product = losses.n_step_cumulant(r_t, discount_t)
    np.testing.assert_allclose(
        total + product * v_t[-1],
        losses.n_step_target(r_t, discount_t, v_t),
        rtol=1e-5,
    )


def test_game_over_stops_the_sum_and_the_value():
    # The second step ends the game: its reward counts, nothing after it does.
    r_t = np.float32([1.0, 2.0, 77.0])
    discount_t = np.float32([0.5, 0.0, 0.5])
    total, product = losses.n_step_cumulant(r_t, discount_t)
    np.testing.assert_allclose([total, product], [2.0, 0.0])
    np.testing.assert_allclose(losses.n_step_target(r_t, discount_t, r_t), 2.0)


@pytest.mark.parametrize(
    "cut_t, horizon, weights",
    [
        ([0, 0, 0, 0], 4, [1, 1, 1, 1]),
        ([0, 1, 0, 0], 2, [1, 1, 0, 0]),
        ([0, 1, 0, 1], 2, [1, 1, 0, 0]),
        ([1, 0, 0, 0], 1, [1, 0, 0, 0]),
        ([0, 0, 0, 1], 4, [1, 1, 1, 1]),
        ([1], 1, [1]),
        ([0], 1, [1]),
    ],
)
@transforms()
def test_a_window_ends_with_its_first_cut(cut_t, horizon, weights, transform):
    window = transform(losses.mask_after_cut)(np.array(cut_t, bool))
    np.testing.assert_array_equal(window.horizon, horizon)
    np.testing.assert_array_equal(window.weights, weights)
    assert window.horizon.dtype == jnp.int32
    assert window.weights.dtype == jnp.float32


@jax.jit
def padded_sum(cut_t, cumulant_t, discount_t):
    window = losses.mask_after_cut(cut_t)
    cumulant_t = window.weights[:, None] * cumulant_t
    discount_t = jnp.where(window.weights > 0, discount_t, 1.0)
    return losses.n_step_cumulant(cumulant_t, discount_t)


@PROPERTY
@hypothesis.given(
    seed=strategies.integers(0, 2**31),
    cut_t=strategies.lists(strategies.booleans(), min_size=6, max_size=6),
)
def test_a_padded_window_sums_like_its_used_part(seed, cut_t):
    rng = np.random.default_rng(seed)
    cumulant_t = rng.normal(size=(6, 2)).astype(np.float32)
    discount_t = rng.uniform(0.5, 1.0, size=6).astype(np.float32)

    total, product = padded_sum(np.array(cut_t), cumulant_t, discount_t)
    used = cut_t.index(True) + 1 if any(cut_t) else 6
    expected = references_losses.n_step_cumulant(cumulant_t[:used], discount_t[:used])
    np.testing.assert_allclose(total, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product, expected[1], rtol=1e-5)


def test_n_step_sums_run_under_scan():
    rng = np.random.default_rng(0)
    cumulants = rng.normal(size=(4, 3, 2)).astype(np.float32)
    discounts = rng.uniform(size=(4, 3)).astype(np.float32)
    _, (totals, products) = jax.lax.scan(
        lambda carry, window: (carry, losses.n_step_cumulant(*window)),
        None,
        (cumulants, discounts),
    )
    for cumulant_t, discount_t, total, product in zip(
        cumulants, discounts, totals, products
    ):
        expected = references_losses.n_step_cumulant(cumulant_t, discount_t)
        np.testing.assert_allclose(total, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(product, expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"a_tm1": np.float32(1)},
        {"w": np.ones(4, np.float32)},
        {"psi_t": np.ones((3, 5), np.float32)},
        {"discount_t": np.ones(1, np.float32)},
        {"psi_tm1": np.ones((4, 5), np.int32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_shapes_and_types_of_td_errors_are_checked(change):
    t = {**make_transition(), **change}
    with pytest.raises(AssertionError):
        losses.scalar_td_error(*scalar_arguments(t))
    with pytest.raises(AssertionError):
        losses.vector_td_error(*vector_arguments(t))
    with pytest.raises(AssertionError):
        losses.split_td_error(*split_arguments(t), **SPLIT_WEIGHTS)
    with pytest.raises(AssertionError):
        losses.off_policy_td_error(*split_arguments(t), **SPLIT_WEIGHTS)


def test_shapes_and_types_of_sums_are_checked():
    ones = np.ones(3, np.float32)
    with pytest.raises(AssertionError):
        losses.n_step_cumulant(ones, ones[:2])
    with pytest.raises(AssertionError):
        losses.n_step_target(ones, ones, ones[:2])
    with pytest.raises(AssertionError):
        losses.mask_after_cut(ones)
    with pytest.raises(AssertionError):
        losses.feature_loss(ones, ones[:2])
    with pytest.raises(AssertionError):
        losses.q_values(ones[None, :], ones[:2])
    exploration = {"exploration_t": np.ones(3, np.float32)}
    with pytest.raises(AssertionError):
        losses.split_td_error(
            *split_arguments({**make_transition(), **exploration}), **SPLIT_WEIGHTS
        )
