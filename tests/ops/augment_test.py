"""Tests of aps_jax.ops.augment: every offset, alike for the frames of a stack."""

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.ops import augment


def coordinates(side=12):
    """An image whose pixels say their place, and the frame."""
    rows, columns = np.indices((side, side))
    stack = np.stack([rows, columns, rows, columns], axis=-1)
    return stack.astype(np.uint8)


def test_a_shift_takes_every_offset_alike_and_repeats_the_edge():
    image, pad, count = coordinates(), 2, 5000
    shift = jax.jit(
        jax.vmap(lambda key: augment.random_shift(key, jnp.asarray(image), pad=pad))
    )
    shifted = np.asarray(shift(jax.random.split(jax.random.key(0), count)))
    assert shifted.shape == (count, 12, 12, 4) and shifted.dtype == np.uint8
    # The middle pixel comes from (6, 6) and says by how much it was moved.
    offsets = shifted[:, 6, 6, :2].astype(int) - 6
    seen, counts = np.unique(offsets, axis=0, return_counts=True)
    assert len(seen) == (2 * pad + 1) ** 2 and np.all(np.abs(seen) <= pad)
    expected = count / len(seen)
    assert np.sum((counts - expected) ** 2 / expected) < 51.2  # chi2(24), p = 0.001
    for dy, dx in seen:
        rows = np.clip(np.arange(12) + dy, 0, 11)
        columns = np.clip(np.arange(12) + dx, 0, 11)
        (first, *_) = np.flatnonzero(np.all(offsets == (dy, dx), axis=1))
        np.testing.assert_array_equal(shifted[first], image[rows][:, columns])
    np.testing.assert_array_equal(
        augment.random_shift(jax.random.key(0), image, pad=0), image
    )


def test_an_intensity_is_one_number_per_stack_near_one():
    image = np.array([[[0, 100, 255]]], np.uint8)
    keys = jax.random.split(jax.random.key(0), 200_000)
    scale = jax.jit(
        jax.vmap(lambda key: augment.random_intensity(key, image, scale=0.05))
    )
    changed = np.asarray(scale(keys))[:, 0, 0]
    factor = changed[:, 1] / 100
    np.testing.assert_allclose(changed[:, 2], 255 * factor, rtol=1e-5)
    assert np.all(changed[:, 0] == 0)
    np.testing.assert_allclose([factor.min(), factor.max()], [0.9, 1.1], rtol=1e-5)
    np.testing.assert_allclose(factor.mean(), 1.0, atol=5e-4)
    # Of a normal number cut at 2: 0.9594.
    np.testing.assert_allclose(factor.std(), 0.04797, atol=2e-4)


def test_a_cropped_view_moves_by_the_sum_of_two_offsets():
    image, count = coordinates(20), 4000
    view = jax.jit(
        jax.vmap(lambda key: augment.crop_pad_crop(key, jnp.asarray(image), pad=4))
    )
    views = np.asarray(view(jax.random.split(jax.random.key(1), count)))
    assert views.shape == (count, 20, 20, 4)
    # 0..4 from the crop, -4..0 from the shift.
    offsets = views[:, 10, 10, :2].astype(int) - 10
    values, counts = np.unique(offsets, return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    chances = np.convolve(np.full(5, 1 / 5), np.full(5, 1 / 5))
    np.testing.assert_allclose(counts / (2 * count), chances, atol=0.015)
    # All four frames alike, and no pixel from outside of the image.
    np.testing.assert_array_equal(views[..., :2], views[..., 2:])
