"""Tests of aps_jax.train.sums: means of metrics, and the first bad update."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.train import sums

add = jax.jit(sums.add_to_sums)


def start():
    return sums.init_sums(["a", "b"], {"place": np.int32(0), "is_full": np.bool_(0)})


def step(running, number, a, b):
    return add(
        running,
        {"a": jnp.float32(a), "b": jnp.float32(b)},
        update=jnp.int32(number),
        extras={"place": jnp.int32(10 * number), "is_full": jnp.bool_(number > 6)},
    )


def test_means_are_over_the_updates_and_nan_without_any():
    running = start()
    assert all(math.isnan(value) for value in sums.means(running).values())
    running = step(step(running, 5, 1.0, 0.0), 6, 2.0, 4.0)
    assert sums.means(running) == {"a": 1.5, "b": 2.0}
    assert int(running.bad.update) == -1


def test_the_first_update_that_is_not_finite_is_remembered():
    running = start()
    for number, a, b in [(5, 1, 1), (6, 1, 1), (7, 1, math.nan), (8, math.inf, 1)]:
        running = step(running, number, a, b)
    bad = jax.device_get(running.bad)
    assert bad.update == 7
    assert dict(bad.names) == {"a": False, "b": True}
    assert bad.extras == {"place": 70, "is_full": True}


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="Expected metrics"):
        sums.add_to_sums(start(), {"a": jnp.float32(1)}, update=jnp.int32(0), extras={})
