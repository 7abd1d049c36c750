"""Stacks of frames: pushed one frame at a time, or looked up in a window.

Both follow EnvPool's own `stack_num`: oldest frame first, and at a reset all places
hold the reset frame, so no stack reaches over a reset. `E` environments, `S` frames of
a stack, `C` channels of a frame, `T` states of a window, `L = T + S - 1` its frames.
"""

import chex
import jax
import jax.numpy as jnp

from aps_jax.types import Array, ObservationSpec


def init_stack(observation: ObservationSpec, num_envs: int) -> jax.Array:
    """Returns `[E, H, W, S C]` uint8 zeros, to be filled by a reset frame."""
    return jnp.zeros((num_envs, *observation.shape), jnp.uint8)


def push_frame(stack: Array, frame: Array, is_first: Array) -> jax.Array:
    """Appends the newest frame of each environment to its stack.

    Args:
      stack: `[E, H, W, S C]` uint8, newest frame last.
      frame: `[E, H, W]` uint8, where `C` is 1, or `[E, H, W, C]`.
      is_first: `[E]` bool, reset frames, which fill the whole stack.

    Returns:
      `[E, H, W, S C]` uint8.
    """
    chex.assert_rank([stack, frame, is_first], [4, {3, 4}, 1])

    newest = frame[..., None] if frame.ndim == 3 else frame
    num_channels = newest.shape[-1]
    pushed = jnp.concatenate([stack[..., num_channels:], newest], axis=-1)
    filled = jnp.tile(newest, (1, 1, 1, stack.shape[-1] // num_channels))
    chex.assert_equal_shape([stack, pushed, filled])
    return jnp.where(jnp.expand_dims(is_first, (1, 2, 3)), filled, pushed)


def stack_places(is_first: Array, stack: int) -> jax.Array:
    """Returns where in a window the frames of each state's stack lie.

    Args:
      is_first: `[L]` bool, which frames of the window are reset frames.
      stack: `S`.

    Returns:
      `[T, S]` int32 indices into the window's frames, oldest first; those of state `t`
      end at frame `t + S - 1` and never precede its reset frame.
    """
    chex.assert_rank(is_first, 1)

    index = jnp.arange(is_first.shape[0])
    latest_reset = jax.lax.cummax(jnp.where(is_first, index, 0))
    offsets = jnp.arange(stack - 1, -1, -1)
    places = jnp.maximum(index[:, None] - offsets[None, :], latest_reset[:, None])
    return places[stack - 1 :]
