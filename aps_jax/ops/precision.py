"""Float types: sums and states are float32 or wider, whatever type comes in."""

import jax
import jax.numpy as jnp

from aps_jax.types import Array


def widen(*values: Array | float) -> tuple[jax.Array, ...]:
    """Converts arrays and numbers to their widest float type, float32 at least.

    Sums of half-precision numbers overflow and lose digits, and operations on two types
    are errors where JAX promotes strictly.

    Args:
      *values: float arrays of any shapes, or numbers.

    Returns:
      The values in float32; in float64 if one of them is, where JAX has that type.
    """
    is_double = any(getattr(x, "dtype", None) == jnp.float64 for x in values)
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64 if is_double else jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in values)
