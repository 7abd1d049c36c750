"""Errors and losses of one transition, for successor features and for features.

`psi(s, a, w)` predicts the discounted sum of the cumulants met from `s` on, after
taking `a` and then obeying `w`; `Q = psi^T w`. There are four forms of its
temporal-difference error:

- scalar: `psi^T w` learns the whole reward, and psi itself is free to be anything;
- vector: psi learns the features, plus the exploration reward along `w`;
- split: psi learns the features alone, and a second output the exploration reward, both
  under the policy that obeys and explores;
- off-policy: as split, but psi learns the features under the policy that only obeys.

Everything is written for one transition: `jax.vmap` it over a batch, and average there.
Errors are target minus prediction; gradient reaches the prediction (`psi_tm1`,
`exploration_tm1`) and nothing else. What is not a number shows in the error. Results
are float32 or wider (`precision.widen`). The errors' arguments are

- `psi_tm1`, `psi_t`: `[A, D]` float, successor features at time t-1, and those of the
  target network at time t;
- `exploration_tm1`, `exploration_t`: `[A]` float, likewise exploration values;
- `a_tm1`: `[]` int, action taken at time t-1;
- `discount_t`: `[]` float, product of the n discounts of a window: `gamma^n`, or 0
  where the game was over;
- `w`: `[D]` float, task vector;

and the n-step sum of a cumulant.

Letters: `A` actions, `D` feature dimension, `n` steps of a window.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aps_jax.ops import precision
from aps_jax.types import Array


class SplitTDError(NamedTuple):
    """The errors of the two outputs of the split form."""

    successor: Array  # [D] float, of the successor features of the action taken.
    exploration: Array  # [] float, of the exploration value of the action taken.


class UsedSteps(NamedTuple):
    """The steps of an n-step window that may be used."""

    horizon: jax.Array  # [] int32 in [1, n], steps up to and including the first cut.
    weights: jax.Array  # [n] float, 1 for these steps and 0 after them.


def q_values(psi: Array, w: Array) -> jax.Array:
    """Computes `Q(s, a, w) = psi(s, a, w)^T w` for every action.

    Args:
      psi: `[A, D]` float, successor features.
      w: `[D]` float, task vector.

    Returns:
      `[A]` float.
    """
    chex.assert_rank([psi, w], [2, 1])
    chex.assert_type([psi, w], float)
    chex.assert_equal_shape([psi[0], w])

    psi, w = precision.widen(psi, w)
    # Not a matrix product, which accelerators would round to fewer than 24 bits.
    return jnp.sum(psi * w[None, :], axis=-1)


def feature_loss(phi_t: Array, w_tm1: Array) -> jax.Array:
    """Computes `-phi(s_t)^T w_tm1`, by which features learn to tell the task.

    Maximum likelihood of a von Mises-Fisher distribution of the task around the
    features (VISR, https://arxiv.org/abs/1906.05030, section 4; APS,
    https://arxiv.org/abs/2108.13956, section 4.3). Gradient reaches the features only.

    Args:
      phi_t: `[D]` float, unit features of the state reached.
      w_tm1: `[D]` float, unit task vector that led there.

    Returns:
      `[]` float in [-1, 1].
    """
    chex.assert_rank([phi_t, w_tm1], 1)
    chex.assert_type([phi_t, w_tm1], float)
    chex.assert_equal_shape([phi_t, w_tm1])

    phi_t, w_tm1 = precision.widen(phi_t, w_tm1)
    return -jnp.sum(phi_t * jax.lax.stop_gradient(w_tm1))


def n_step_target(r_t: Array, discount_t: Array, v_t: Array) -> jax.Array:
    """Computes `r_1 + d_1 (r_2 + d_2 (... (r_n + d_n v_n)))` of one window.

    Args:
      r_t: `[n]` float, rewards of the window.
      discount_t: `[n]` float, discounts of the window, 0 where the game was over.
      v_t: `[n]` float, values of the states reached; only the last is used.

    Returns:
      `[]` float.
    """
    chex.assert_rank([r_t, discount_t, v_t], 1)
    chex.assert_type([r_t, discount_t, v_t], float)
    chex.assert_equal_shape([r_t, discount_t, v_t])

    # Imported here because RLax brings in TensorFlow Probability, which takes seconds.
    import rlax

    r_t, discount_t, v_t = precision.widen(r_t, discount_t, v_t)
    n = r_t.shape[0]
    return rlax.n_step_bootstrapped_returns(r_t, discount_t, v_t, n)[0]


def n_step_cumulant(
    cumulant_t: Array, discount_t: Array
) -> tuple[jax.Array, jax.Array]:
    """Sums the cumulants of one window, and multiplies its discounts.

    `sum_j (prod_{i<j} discount_i) cumulant_j` and `prod_i discount_i`, which is
    `gamma^n` (not gamma) for a window without a cut: what stands before the
    bootstrapped value.

    Args:
      cumulant_t: `[n, D]` or `[n]` float, cumulants of the window: features or rewards.
      discount_t: `[n]` float, discounts of the window, 0 where the game was over.

    Returns:
      The `[D]` or `[]` float sum, and the `[]` float product.
    """
    chex.assert_rank([cumulant_t, discount_t], [{1, 2}, 1])
    chex.assert_type([cumulant_t, discount_t], float)
    chex.assert_equal_shape_prefix([cumulant_t, discount_t], 1)

    cumulant_t, discount_t = precision.widen(cumulant_t, discount_t)
    products = jnp.cumprod(discount_t)
    before = jnp.concatenate([jnp.ones_like(products[:1]), products[:-1]])
    weights = jnp.expand_dims(before, tuple(range(1, cumulant_t.ndim)))
    return jnp.sum(weights * cumulant_t, axis=0), products[-1]


def mask_after_cut(cut_t: Array) -> UsedSteps:
    """Finds the steps of a window that belong to one episode and task.

    Steps after the first cut must not be learnt from. Give them cumulant 0 and discount
    1: then `n_step_cumulant` of the whole window is that of its used part,

        used = mask_after_cut(cut_t)
        reward_t = used.weights * r_t
        discount_t = jnp.where(used.weights > 0, discount_t, 1.0)

    and the state to bootstrap from is the one reached by step `horizon`, at index
    `horizon - 1`. The step of the cut itself is used; its discount is 0 if the game was
    over, and stays gamma if only time ran out.

    Args:
      cut_t: `[n]` bool, whether nothing may be used after this step.
    """
    chex.assert_rank(cut_t, 1)
    chex.assert_type(cut_t, bool)

    num_cuts = jnp.cumsum(cut_t, dtype=jnp.int32)
    is_used = num_cuts - cut_t.astype(jnp.int32) == 0
    return UsedSteps(
        horizon=jnp.sum(is_used, dtype=jnp.int32), weights=is_used.astype(float)
    )


def scalar_td_error(
    psi_tm1: Array, a_tm1: Array, r_t: Array, discount_t: Array, psi_t: Array, w: Array
) -> jax.Array:
    """Computes the TD error of `psi^T w`, Q-learning on the reward.

    `r_t + discount_t * max_a psi_t[a]^T w - psi_tm1[a_tm1]^T w` (APS,
    https://arxiv.org/abs/2108.13956, the loss L_APS).

    Args:
      psi_tm1, a_tm1, discount_t, psi_t, w: as in the module's list.
      r_t: `[]` float, n-step reward.

    Returns:
      `[]` float.
    """
    chex.assert_rank([psi_tm1, a_tm1, r_t, discount_t, psi_t, w], [2, 0, 0, 0, 2, 1])
    chex.assert_type([psi_tm1, r_t, discount_t, psi_t, w], float)
    chex.assert_type(a_tm1, int)
    chex.assert_equal_shape([psi_tm1, psi_t])

    w = jax.lax.stop_gradient(w)
    q_tm1, q_t = q_values(psi_tm1, w), q_values(psi_t, w)
    return _td_error(q_tm1, a_tm1, r_t, discount_t, q_t, q_t)


def vector_td_error(
    psi_tm1: Array,
    a_tm1: Array,
    cumulant_t: Array,
    discount_t: Array,
    psi_t: Array,
    w: Array,
) -> jax.Array:
    """Computes the TD error of the successor features.

    `cumulant_t + discount_t * psi_t[a*] - psi_tm1[a_tm1]` with
    `a* = argmax_a psi_t[a]^T w` (Barreto et al. 2017,
    https://arxiv.org/abs/1606.05312, section 3).
    With the cumulant `skill_weight * phi_t + entropy_weight * r_entropy_t * w`, its
    product with a unit `w` is the scalar form.

    Args:
      psi_tm1, a_tm1, discount_t, psi_t, w: as in the module's list.
      cumulant_t: `[D]` float, n-step cumulant, in place of a reward.

    Returns:
      `[D]` float.
    """
    chex.assert_rank(
        [psi_tm1, a_tm1, cumulant_t, discount_t, psi_t, w], [2, 0, 1, 0, 2, 1]
    )
    chex.assert_type([psi_tm1, cumulant_t, discount_t, psi_t, w], float)
    chex.assert_type(a_tm1, int)
    chex.assert_equal_shape([psi_tm1, psi_t])
    chex.assert_equal_shape([cumulant_t, w])

    q_t = q_values(psi_t, w)
    return _td_error(psi_tm1, a_tm1, cumulant_t, discount_t, psi_t, q_t)


def split_td_error(
    psi_tm1: Array,
    exploration_tm1: Array,
    a_tm1: Array,
    phi_t: Array,
    r_entropy_t: Array,
    discount_t: Array,
    psi_t: Array,
    exploration_t: Array,
    w: Array,
    *,
    skill_weight: float | Array,
    entropy_weight: float | Array,
) -> SplitTDError:
    """Computes the TD errors of the successor features and of the exploration value.

    Both follow the action that is greedy in the sum of the two values,
    `a* = argmax_a skill_weight * psi_t[a]^T w + entropy_weight * exploration_t[a]`:

        phi_t + discount_t * psi_t[a*] - psi_tm1[a_tm1]
        r_entropy_t + discount_t * exploration_t[a*] - exploration_tm1[a_tm1]

    Neither target is weighted, so that without exploration `psi^T w` is the value of
    the task alone.

    Args:
      psi_tm1, exploration_tm1, a_tm1, discount_t, psi_t, exploration_t, w: as in the
        module's list.
      phi_t: `[D]` float, n-step sum of the features.
      r_entropy_t: `[]` float, n-step sum of the entropy rewards.
      skill_weight, entropy_weight: weights of the two rewards in behaviour.
    """
    chex.assert_rank(
        [psi_tm1, exploration_tm1, a_tm1, phi_t, r_entropy_t], [2, 1, 0, 1, 0]
    )
    chex.assert_rank([discount_t, psi_t, exploration_t, w], [0, 2, 1, 1])
    chex.assert_type([psi_tm1, exploration_tm1, phi_t, r_entropy_t], float)
    chex.assert_type([discount_t, psi_t, exploration_t, w], float)
    chex.assert_type(a_tm1, int)
    chex.assert_equal_shape([psi_tm1, psi_t])
    chex.assert_equal_shape([psi_tm1[:, 0], exploration_tm1, exploration_t])
    chex.assert_equal_shape([phi_t, w])

    parts = (q_values(psi_t, w), exploration_t, skill_weight, entropy_weight)
    q_t, q_exploration_t, skill_weight, entropy_weight = precision.widen(*parts)
    values_t = skill_weight * q_t + entropy_weight * q_exploration_t
    return SplitTDError(
        successor=_td_error(psi_tm1, a_tm1, phi_t, discount_t, psi_t, values_t),
        exploration=_td_error(
            exploration_tm1, a_tm1, r_entropy_t, discount_t, exploration_t, values_t
        ),
    )


def off_policy_td_error(
    psi_tm1: Array,
    exploration_tm1: Array,
    a_tm1: Array,
    phi_t: Array,
    r_entropy_t: Array,
    discount_t: Array,
    psi_t: Array,
    exploration_t: Array,
    w: Array,
    *,
    skill_weight: float | Array,
    entropy_weight: float | Array,
) -> SplitTDError:
    """Computes the TD errors of `split_td_error`, with psi greedy for its own task.

    Behaviour explores, and its exploration value is learned as in the split form. The
    successor features follow `a* = argmax_a psi_t[a]^T w` instead, Q-learning for the
    task alone (Barreto et al. 2017, https://arxiv.org/abs/1606.05312, section 3): at
    test time `psi^T w` is then the value of a policy that no longer explores. Without
    entropy reward the two forms are the same.

    Arguments and result are those of `split_td_error`.
    """
    split = split_td_error(
        *(psi_tm1, exploration_tm1, a_tm1, phi_t, r_entropy_t),
        *(discount_t, psi_t, exploration_t, w),
        skill_weight=skill_weight,
        entropy_weight=entropy_weight,
    )
    successor = vector_td_error(psi_tm1, a_tm1, phi_t, discount_t, psi_t, w)
    return split._replace(successor=successor)


def _td_error(
    prediction_tm1: Array,
    a_tm1: Array,
    cumulant_t: Array,
    discount_t: Array,
    prediction_t: Array,
    values_t: Array,
) -> jax.Array:
    """Computes target minus prediction, `[...]`, under the action greedy in `values_t`.

    The predictions are `[A, ...]`. NaN if a value is: then no action is greedy.
    """
    prediction_tm1, cumulant_t, discount_t, prediction_t, values_t = precision.widen(
        prediction_tm1, cumulant_t, discount_t, prediction_t, values_t
    )
    bootstrap_t = prediction_t[jnp.argmax(values_t)]
    bootstrap_t = jnp.where(jnp.any(jnp.isnan(values_t)), jnp.nan, bootstrap_t)
    target_tm1 = jax.lax.stop_gradient(cumulant_t + discount_t * bootstrap_t)
    return target_tm1 - prediction_tm1[a_tm1]
