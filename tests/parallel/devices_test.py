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


@pytest.mark.parametrize("num_devices", [8])
def test_a_hundred_updates_are_those_of_one_device(left, num_devices):
    """Losses, parameters and metrics; the windows drawn are the same to the bit."""
    folder, _ = left
    one = load(folder / "pretrain_1.npz")
    other = load(folder / f"pretrain_{num_devices}.npz")
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
    names = [n for n in one if "['calibrated']['whitening']" in n]
    assert len(names) == 4
    for name in names:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-3, err_msg=name)


def test_a_hundred_updates_from_reward_are_those_of_one_device(left):
    folder, _ = left
    one, other = (load(folder / f"finetune_{n}.npz") for n in (1, 8))
    assert_near(one, other, rtol=2e-5, atol=1e-5)


def test_an_update_communicates_gradients_particles_and_a_few_sums(left):
    """And nothing else, above all no part of the replay."""
    _, facts = left
    assert facts["pretrain_1"] == facts["finetune_1"] == []
    # Of 8 particles, one on each device: its 2 features and its id. And the 2 tasks of
    # 2 components of the device's last window.
    gathered = (DIM + 1) + 2 * DIM
    # 9 means: 8 scalars and that of phi, each with its count.
    summed = facts["num_params"] + 8 * 2 + (DIM + 1)
    # Count and deviation of the distances; mean gradient of the features.
    early = 2 + DIM + 1
    assert facts["pretrain_8"] == [
        ["all-gather", f"s32[8,{gathered}]"],
        ["all-reduce", f"f32[{early}]"],
        ["all-reduce", f"f32[{summed}]"],
    ]
    assert [kind for kind, _ in facts["finetune_8"]] == ["all-reduce"]


def test_acting_communicates_nothing_but_sums_of_the_regression(left):
    folder, facts = left
    one, other = (load(folder / f"act_{n}.npz") for n in (1, 8))
    for name in one:
        if "replay" in name:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        else:
            np.testing.assert_allclose(
                one[name], other[name], rtol=1e-4, atol=1e-4, err_msg=name
            )
    assert facts["where_8"] == {"replay": [1, 30, 84, 84], "stack": [1, 84, 84, 4]}
    assert facts["where_1"] == {"replay": [8, 30, 84, 84], "stack": [8, 84, 84, 4]}
    assert facts["traces_8"] == 1
    for _, shape in facts["act_8"]:
        sizes = [
            int(size) for size in shape[shape.index("[") + 1 : -1].split(",") if size
        ]
        assert np.prod(sizes) <= 64, shape


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
        return buffer.draw_places(
            key, num_envs=2, num_starts=jnp.int32(5), num_windows=3
        )

    envs, starts = jax.vmap(draw)(jax.random.split(jax.random.key(0), 600))
    # Window 0 draws (0 + 0) // 3 or (0 + 1) // 3, window 2 (4 + 0) // 3 or (4 + 1) // 3;
    # only window 1 has a choice, of (2 + 0) // 3 and (2 + 1) // 3.
    np.testing.assert_array_equal(envs[:, 0], 0)
    np.testing.assert_array_equal(envs[:, 2], 1)
    # 600 fair coins: a deviation of 80 has a probability of 7e-11.
    assert abs(int(np.sum(envs[:, 1])) - 300) < 80
    counts = np.bincount(np.asarray(starts).reshape(-1), minlength=5)
    # 360 expected in each of 5: chi-square of 4 degrees, below 18.5 in 0.999.
    assert np.sum((counts - 360.0) ** 2 / 360.0) < 18.5
