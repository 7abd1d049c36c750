"""Stacks of frames: pushed one frame at a time, or looked up in a window.

Both follow EnvPool's own `stack_num=4`: oldest frame first, and at a reset all places
hold the reset frame, so no stack reaches over a reset. `E` environments, `T` states of
a window, `L = T + STACK_SIZE - 1` its frames.
"""

import chex
import jax
import jax.numpy as jnp

from aps_jax.types import FRAME_SHAPE, STACK_SIZE, Array


def init_stack(num_envs: int) -> jax.Array:
    """Returns `[E, 84, 84, STACK_SIZE]` uint8 zeros, to be filled by a reset frame."""
    return jnp.zeros((num_envs, *FRAME_SHAPE, STACK_SIZE), jnp.uint8)


def push_frame(stack: Array, frame: Array, is_first: Array) -> jax.Array:
    """Appends the newest frame of each environment to its stack.

    Args:
      stack: `[E, 84, 84, STACK_SIZE]` uint8, newest frame last.
      frame: `[E, 84, 84]` uint8.
      is_first: `[E]` bool, reset frames, which fill the whole stack.

    Returns:
      `[E, 84, 84, STACK_SIZE]` uint8.
    """
    chex.assert_rank([stack, frame, is_first], [4, 3, 1])
    chex.assert_equal_shape([stack[..., 0], frame])

    newest = frame[..., None]
    pushed = jnp.concatenate([stack[..., 1:], newest], axis=-1)
    filled = jnp.broadcast_to(newest, stack.shape)
    return jnp.where(jnp.expand_dims(is_first, (1, 2, 3)), filled, pushed)


def stack_places(is_first: Array) -> jax.Array:
    """Returns where in a window the frames of each state's stack lie.

    Args:
      is_first: `[L]` bool, which frames of the window are reset frames.

    Returns:
      `[T, STACK_SIZE]` int32 indices into the window's frames, oldest first; those of
      state `t` end at frame `t + STACK_SIZE - 1` and never precede its reset frame.
    """
    chex.assert_rank(is_first, 1)

    index = jnp.arange(is_first.shape[0])
    latest_reset = jax.lax.cummax(jnp.where(is_first, index, 0))
    offsets = jnp.arange(STACK_SIZE - 1, -1, -1)
    places = jnp.maximum(index[:, None] - offsets[None, :], latest_reset[:, None])
    return places[STACK_SIZE - 1 :]
