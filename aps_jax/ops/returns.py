"""Which states of a replayed window an n-step target sums and bootstraps from.

Letters: `T` states of a window, `m` its TD targets, `n` steps of a return.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.ops import losses
from aps_jax.types import Array


class Targets(NamedTuple):
    """How the TD targets of one window are put together."""

    is_valid: jax.Array  # [m] float32, 0 where the start is no transition.
    rewarded: jax.Array  # [m, n] int32, indices of the states that are summed.
    weight: jax.Array  # [m, n] float32, 1 up to the first cut, 0 after it.
    discount: jax.Array  # [m, n] float32, 1 after the first cut.
    bootstrap: jax.Array  # [m] int32, index of the state that is bootstrapped from.


def window_targets(
    is_first: Array,
    is_terminal: Array,
    task: Array | None = None,
    *,
    num_targets: int,
    n_steps: int,
    discount: float,
) -> Targets:
    """Finds the states that each n-step target of a window sums and bootstraps from.

    A sum ends at the end of an episode. After a terminal state nothing is bootstrapped;
    at the time limit, and where the task changes, the sum is cut and bootstraps there.

    Args:
      is_first: `[T]` bool, reset frames; `T` is at least `num_targets + n_steps`.
      is_terminal: `[T]` bool, states without a future: game over, or a lost life where
        that counts.
      task: `[T, D]` float, the task that was followed. A return for one task ends where
        the behaviour starts to follow another. None cuts nowhere.
      num_targets: `m`, targets; they start at the window's first states.
      n_steps: `n`, steps summed.
      discount: Discount gamma of one step.
    """
    # An episode ends where the next frame is a reset's, whatever ended it: game over,
    # the time limit, or a resumed run whose emulators started anew. (The last state's
    # successor is not known, nor needed: a cut there changes nothing.)
    is_end = jnp.append(is_first[1:], False)
    starts = jnp.arange(num_targets)
    rewarded = starts[:, None] + 1 + jnp.arange(n_steps)[None, :]  # [m, n]
    is_cut = is_end[rewarded] | is_terminal[rewarded]
    if task is not None:
        is_cut |= jnp.any(task[rewarded] != task[starts][:, None, :], axis=-1)
    horizon, weight = jax.vmap(losses.mask_after_cut)(is_cut)
    step_discount = discount * (1.0 - is_terminal[rewarded].astype(jnp.float32))
    return Targets(
        is_valid=1.0 - is_end[starts].astype(jnp.float32),
        rewarded=rewarded,
        weight=weight,
        discount=jnp.where(weight > 0.0, step_discount, 1.0),
        bootstrap=starts + horizon,
    )


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages the entries whose mask is 1; 0 if there is none.

    Args:
      values: `[...]` float.
      mask: `[...]` float, 0 or 1.
    """
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
