"""Forms of a convolution that agree in value and differ in speed, and their choice.

Every form computes the same valid (unpadded) strided correlation, the "convolution"
of deep learning,

    y[b, i, j, o] = sum_{u, v, c} x[b, s i + u, s j + v, c] kernel[u, v, c, o],

with stride `s`, so a checkpoint made with one form works with every other. `choose`
is the only place that decides which form a backend uses.

Letters: `B` batch, `H`/`W` height and width, `C`/`O` channels in and out, `P`/`Q`
kernel height and width.
"""

from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp

Convolution: TypeAlias = Callable[..., jax.Array]


def convolve_xla(images: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """Convolves by XLA's own operation.

    Args:
      images: `[B, H, W, C]` float.
      kernel: `[P, Q, C, O]` of the same dtype.
      stride: pixels between neighbouring outputs, the same in both directions.

    Returns:
      `[B, (H - P) // stride + 1, (W - Q) // stride + 1, O]`.
    """
    chex.assert_rank([images, kernel], 4)
    chex.assert_type([images, kernel], float)

    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convolve_patches(images: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """Convolves by gathering every window into a row of one matrix product (im2col).

    Args and result as in `convolve_xla`.
    """
    chex.assert_rank([images, kernel], 4)
    chex.assert_type([images, kernel], float)

    rows, columns, channels, features = kernel.shape
    batch, height, width, _ = images.shape
    out_height = (height - rows) // stride + 1
    out_width = (width - columns) // stride + 1
    shifted = [
        jax.lax.slice(
            images,
            (0, u, v, 0),
            (
                batch,
                u + stride * (out_height - 1) + 1,
                v + stride * (out_width - 1) + 1,
                channels,
            ),
            (1, stride, stride, 1),
        )
        for u in range(rows)
        for v in range(columns)
    ]
    patches = jnp.concatenate(shifted, axis=-1)  # [B, h, w, P * Q * C]
    return patches @ kernel.reshape(rows * columns * channels, features)


def convolve_blocks(images: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """Convolves disjoint windows by a reshape and a matrix product.

    Args and result as in `convolve_xla`; pixels after the last whole window are
    dropped.

    Raises:
      ValueError: if the kernel's sides differ from the stride.
    """
    chex.assert_rank([images, kernel], 4)
    chex.assert_type([images, kernel], float)
    rows, columns, channels, features = kernel.shape
    if (rows, columns) != (stride, stride):
        raise ValueError(
            f"kernel sides must equal the stride, got {rows}x{columns} and {stride}."
        )

    batch, height, width, _ = images.shape
    out_height, out_width = height // stride, width // stride
    images = images[:, : out_height * stride, : out_width * stride]
    blocks = images.reshape(batch, out_height, rows, out_width, columns * channels)
    blocks = blocks.swapaxes(2, 3)  # [B, h, w, P, Q * C]
    blocks = blocks.reshape(batch, out_height, out_width, rows * columns * channels)
    return blocks @ kernel.reshape(rows * columns * channels, features)


def choose(backend: str, kernel_shape: tuple[int, ...], stride: int) -> Convolution:
    """Chooses the form for one layer on one backend.

    Args:
      backend: as `jax.default_backend()` names it.
      kernel_shape: `(P, Q, C, O)`.
      stride: of the layer.

    Returns:
      One of this module's forms.
    """
    if backend != "cpu":
        return convolve_xla
    if kernel_shape[:2] == (stride, stride):
        return convolve_blocks
    return convolve_patches


def convolve(images: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """Convolves by the form that `choose` gives for the default backend.

    Args and result as in `convolve_xla`.
    """
    form = choose(jax.default_backend(), kernel.shape, stride)
    return form(images, kernel, stride=stride)
