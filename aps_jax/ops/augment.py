"""Random changes of images under which their values should be the same.

Kostrikov et al. 2020, https://arxiv.org/abs/2004.13649. One observation at a time: all
frames of a stack are changed alike. Letters: `H`/`W` height and width, `C` frames.
"""

import chex
import jax
import jax.numpy as jnp

from aps_jax.types import Array, PRNGKey

# The normal noise of the intensity is cut at this many standard deviations.
_CUT = 2.0


def random_shift(key: PRNGKey, image: Array, *, pad: int) -> jax.Array:
    """Moves an image by up to `pad` pixels in each direction; its edge is repeated.

    Args:
      key: Is consumed.
      image: `[H, W, C]` of any type.
      pad: All of the `(2 pad + 1)^2` offsets are equally likely.
    """
    offset = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return _crop(_pad(image, pad), offset, image.shape)


def random_intensity(key: PRNGKey, image: Array, *, scale: float) -> jax.Array:
    """Multiplies an image by `1 + scale e`, `e` standard normal, cut at 2.

    Returns:
      `[H, W, C]` float32, in the unit of the image.
    """
    noise = jnp.clip(jax.random.normal(key), -_CUT, _CUT)
    return jnp.asarray(image, jnp.float32) * (1.0 + scale * noise)


def crop_pad_crop(key: PRNGKey, image: Array, *, pad: int) -> jax.Array:
    """Crops `pad` pixels of height and width off, then shifts, at the size it had.

    CURL's view of a game (its published Atari code): an image of 84x84 is cropped to
    80x80, padded to 88x88 and cropped to 84x84.

    Args:
      key: Is consumed.
      image: `[H, W, C]` of any type.
      pad: As above; 4 in CURL.
    """
    offsets = jax.random.randint(key, (2, 2), 0, pad + 1)
    height, width, channels = image.shape
    cropped = _crop(image, offsets[0], (height - pad, width - pad, channels))
    return _crop(_pad(cropped, pad), offsets[1], image.shape)


def _crop(image: Array, offset: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Cuts an image of a shape out of one, from rows and columns `[2]` on."""
    chex.assert_rank(image, 3)
    start = (offset[0], offset[1], jnp.zeros((), offset.dtype))
    return jax.lax.dynamic_slice(image, start, shape)


def _pad(image: Array, pad: int) -> jax.Array:
    """Repeats the edge of an image `pad` times on every side."""
    return jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
