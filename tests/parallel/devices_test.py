"""Tests of aps_jax.parallel.devices: a run on 8 virtual devices is that on one.

What they look at is made by tests/devices_program.py, in a process that has 8.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from aps_jax import config as config_lib
from aps_jax.parallel import devices
from aps_jax.replay import buffer

DIM = 2


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder that the program leaves, and its facts."""
    folder = tmp_path_factory.mktemp("devices")
    scripts.run_devices_program(folder, "steps")
    return folder, json.loads((folder / "facts.json").read_text())


def load(path):
    with np.load(path) as file:
        return dict(file)


def assert_near(one, other, *, rtol, atol):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(
            one[name], other[name], rtol=rtol, atol=atol, err_msg=name
        )


def test_a_hundred_updates_are_those_of_one_device(left):
    """Losses, parameters and metrics; the windows drawn are the same to the bit."""
    folder, _ = left
    one, other = (load(folder / f"pretrain_{n}.npz") for n in (1, 8))
    names = [name for name in one if "['calibrated']" not in name]
    assert sum("params" in name for name in names) > 30
    for name in names:
        rtol, atol = (0.0, 0.0) if "['ids']" in name else (2e-5, 2e-6)
        np.testing.assert_allclose(
            one[name], other[name], rtol=rtol, atol=atol, err_msg=name
        )
    # Much less than what was learned.
    assert one["['moved']['features']"] > 3e-4
    assert one["['moved']['successor']"] > 3e-3


def test_measured_moments_are_those_of_one_device(left):
    folder, _ = left
    one, other = (load(folder / f"pretrain_{n}.npz") for n in (1, 8))
    names = [n for n in one if "['calibrated']" in n]
    assert len(names) == 4
    for name in names:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("name", ["finetune", "dqn"])
def test_a_hundred_updates_from_reward_are_those_of_one_device(left, name):
    folder, _ = left
    one, other = (load(folder / f"{name}_{n}.npz") for n in (1, 8))
    assert_near(one, other, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "dqn"])
def test_an_update_never_gathers_the_replay(left, name):
    """Devices send less than twice the parameters, and besides sums not one image, or
    the planes of one environment."""
    _, facts = left
    assert facts[f"{name}_1"] == []
    sent = sum(num_bytes for _, num_bytes in facts[f"{name}_8"])
    assert 0 < sent < 2 * facts[f"params_bytes_{name}"]
    others = [size for kind, size in facts[f"{name}_8"] if kind != "all-reduce"]
    assert sum(others) < (36 * 36 if name == "pretrain" else 30 * 5)


def test_acting_communicates_nothing(left):
    folder, facts = left
    one, other = (load(folder / f"act_{n}.npz") for n in (1, 8))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert facts["where_8"] == {"replay": [1, 30, 7168], "stack": [1, 84, 84, 4]}
    assert facts["where_1"] == {"replay": [8, 30, 7168], "stack": [8, 84, 84, 4]}
    assert facts["traces_8"] == 1
    assert facts["act_8"] == []


@pytest.mark.parametrize(
    "options, name",
    [
        ({"num_envs": 6}, "num_envs"),
        ({"finetune_num_envs": 6}, "finetune_num_envs"),
        ({"num_particles": 30}, "num_particles"),
        ({"batch_size": 12, "window_targets": 2}, "batch_size / window_targets"),
    ],
)
def test_what_cannot_be_divided_is_refused(options, name):
    with pytest.raises(ValueError, match=rf"^{name}.* multiple of num_devices.* 4\.$"):
        config_lib.replace_options(
            config_lib.preset_config("gpu"), num_devices=4, **options
        )


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match="num_devices is 2, and this machine has 1 "):
        devices.make_mesh(2)
    assert devices.make_mesh(1) is None


def test_places_by_hand():
    """3 windows of 2 environments: the strata are [0, 2/3), [2/3, 4/3) and [4/3, 2)."""

    def draw(key):
        return buffer.sample_indices(
            key, num_envs=2, num_starts=jnp.int32(5), num_windows=3
        )

    envs, starts = jax.vmap(draw)(jax.random.split(jax.random.key(0), 600))
    # Window 0 draws (0 + 0) // 3 or (0 + 1) // 3, window 2 (4 + 0) // 3 or
    # (4 + 1) // 3; only window 1 has a choice, of (2 + 0) // 3 and (2 + 1) // 3.
    np.testing.assert_array_equal(envs[:, 0], 0)
    np.testing.assert_array_equal(envs[:, 2], 1)
    # 600 fair coins: a deviation of 80 has a probability of 7e-11.
    assert abs(int(np.sum(envs[:, 1])) - 300) < 80
    counts = np.bincount(np.asarray(starts).reshape(-1), minlength=5)
    # 360 expected in each of 5: chi-square of 4 degrees, below 18.5 in 0.999.
    assert np.sum((counts - 360.0) ** 2 / 360.0) < 18.5
