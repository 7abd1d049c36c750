"""Hashes of bytes on the device, by which states are told apart."""

import chex
import jax
import jax.numpy as jnp


def hash_bytes(data: jax.Array) -> jax.Array:
    """Hashes bytes `[M]` uint8 to 16, `[16]` uint8: four sums of mixed 32-bit words.

    Each of the four mixes the words with salts of its own, which depend on their
    places, so that two inputs agree in all four by chance alone.
    """
    chex.assert_type(data, jnp.uint8)
    words = jax.lax.bitcast_convert_type(
        jnp.pad(data, (0, -data.size % 4)).reshape(-1, 4), jnp.uint32
    )
    salts = _mix(jnp.arange(1, 1 + 4 * words.size, dtype=jnp.uint32)).reshape(4, -1)
    sums = jnp.sum(_mix(_mix(words[None, :] ^ salts) + salts), axis=1)
    return jax.lax.bitcast_convert_type(sums, jnp.uint8).reshape(-1)


def _mix(x: jax.Array) -> jax.Array:
    """Maps words one to one and far apart (MurmurHash3's last step)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
