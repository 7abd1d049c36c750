"""Tests of aps_jax.train.following: obedience is what permuted tasks do not explain."""

import math

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.train import following, loop, stages


def reference(phi, task, is_first):
    """A loop over states and over the environments whose tasks are compared."""
    gains, ages = [], []
    num_steps, num_envs, _ = phi.shape
    for env in range(num_envs):
        drawn = 0
        for time in range(num_steps):
            drawn = time if is_first[time, env] else drawn
            others = [
                phi[time, env] @ task[time, other]
                for other in range(num_envs)
                if other != env
            ]
            gains.append(phi[time, env] @ task[time, env] - np.mean(others))
            ages.append(time - drawn)
    return np.array(gains), np.array(ages)


def test_means_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    phi, task = rng.normal(size=(2, 40, 3, 4))
    is_first = rng.random((40, 3)) < 0.1
    is_first[0] = True
    gains, ages = reference(phi, task, is_first)
    found = following.skill_following(phi, task, is_first)
    np.testing.assert_allclose(found.mean, gains[ages > 0].mean())
    np.testing.assert_allclose(
        found.by_age["1-8"], gains[(ages >= 1) & (ages <= 8)].mean()
    )
    np.testing.assert_allclose(
        found.by_age["9-32"], gains[(ages >= 9) & (ages <= 32)].mean()
    )
    assert found.by_age["33-128"] is None  # No task was held for so long.


def test_by_hand():
    """Two environments obey opposite tasks: 1 - (-1). Features alone tell nothing."""
    task = np.array([[[1.0, 0.0], [-1.0, 0.0]]] * 3)
    is_first = np.array([[True, True], [False, False], [False, False]])
    assert following.skill_following(task, task, is_first).mean == 2.0
    same = np.broadcast_to([1.0, 0.0], task.shape)
    assert following.skill_following(same, task, is_first).mean == 0.0
    # All have one task: whatever is done, permuting tasks changes nothing.
    assert following.skill_following(same, same, is_first).mean == 0.0
    # Reset frames alone: no task has led anywhere.
    nothing = following.skill_following(task, task, np.ones((3, 2), bool))
    assert math.isnan(nothing.mean) and set(nothing.by_age.values()) == {None}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The chain, on which going right or left can be a task."""
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"),
        game=fakes.PLANES,
        encoder="mlp",
        pretrain_frames=4 * 480,
        pretrain_epsilon=0.5,
        skill_steps=12,
        report_agent_steps=80,
        checkpoint_agent_steps=240,
    )
    folder = tmp_path_factory.mktemp("run")
    return folder, stages.pretrain(config, folder, constructor=fakes.PlanesPool)


def test_it_is_measured_for_each_checkpoint_and_ends_in_the_result(pretrained):
    folder, result = pretrained
    rows = (folder / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("skill_following")
    column = [float(row.split(",")[place]) for row in rows[1:]]
    assert [math.isnan(value) for value in column] == [True, True, False] * 2
    assert column[-1] == result["skill_following"]["mean"]
    assert -2.0 <= column[-1] <= 2.0
    ages = result["skill_following"]["by_age"]
    assert list(ages) == ["1-8", "9-32", "33-128"] and ages["33-128"] is None


def test_measuring_leaves_the_agent_alone_and_repeats_itself(pretrained):
    """Twice the same games; what was measured can be measured again."""
    folder, result = pretrained
    trained = stages.load_pretrained(folder)
    config, agent = trained.config, trained.agent
    plan = loop.pretrain_plan(config, agent)
    follower = following.Follower(config, agent, plan, (config.seed,), fakes.PlanesPool)
    state = jax.device_put(trained.state)
    before = jax.device_get(state)
    measured = [follower.measure(state)[0] for _ in range(2)]
    follower.close()
    assert measured[0] == measured[1]
    assert measured[0].mean == pytest.approx(result["skill_following"]["mean"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
