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


def reference_sums(played, discount):
    """A loop over tasks: what is predicted, met, and the weights of both."""
    predicted = met = weights = 0.0
    num_steps, num_envs, _ = played.phi.shape
    for env in range(num_envs):
        starts = [t for t in range(num_steps) if played.is_first[t, env]]
        for start, end in zip(starts, [*starts[1:], num_steps], strict=True):
            last = end - 1
            if last == start:
                continue
            predicted += played.value[start, env]
            if not played.terminated[last, env]:
                predicted -= discount ** (last - start) * played.value[last, env]
            for time in range(start + 1, end):
                weight = discount ** (time - start - 1)
                met += weight * (played.phi[time, env] @ played.task[time, env])
                weights += weight
    return predicted / weights, met / weights


def as_played(phi, task, is_first, value=None, terminated=None):
    value = np.zeros(is_first.shape) if value is None else value
    ended = np.zeros(is_first.shape, bool) if terminated is None else terminated
    return following.Played(phi, task, value, is_first, ended)


def test_means_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    phi, task = rng.normal(size=(2, 40, 3, 4))
    is_first = rng.random((40, 3)) < 0.1
    is_first[0] = True
    is_first[5:7, 0] = True  # A task that leads nowhere.
    terminated = np.roll(is_first, -1, axis=0) & (rng.random((40, 3)) < 0.5)
    assert terminated.any()
    gains, ages = reference(phi, task, is_first)
    value = rng.normal(size=(40, 3))
    played = as_played(phi, task, is_first, value, terminated)
    found = following.skill_following(played, 0.9)
    np.testing.assert_allclose(
        (found.predicted, found.met), reference_sums(played, 0.9)
    )
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

    def measure(phi, task, is_first=is_first):
        return following.skill_following(as_played(phi, task, is_first), 0.5)

    found = measure(task, task)
    assert (found.mean, found.predicted, found.met) == (2.0, 0.0, 1.0)
    same = np.broadcast_to([1.0, 0.0], task.shape)
    found = measure(same, task)
    assert (found.mean, found.met) == (0.0, 0.0)
    # All have one task: whatever is done, permuting tasks changes nothing.
    found = measure(same, same)
    assert (found.mean, found.met) == (0.0, 1.0)
    # Reset frames alone: no task has led anywhere.
    nothing = measure(task, task, np.ones((3, 2), bool))
    assert set(nothing.by_age.values()) == {None}
    assert all(math.isnan(x) for x in (nothing.mean, nothing.predicted, nothing.met))


def test_predictions_by_hand():
    """Discount 0.5, two steps of 1: 1 + 0.5 are met; 2 and 0.4 are predicted."""
    task = np.ones((3, 2, 1))
    is_first = np.array([[True, True], [False, False], [False, False]])
    value = np.array([[2.0, 2.0], [9.0, 9.0], [0.4, 0.4]])
    ended = np.zeros((3, 2), bool)
    found = following.skill_following(
        as_played(task, task, is_first, value, ended), 0.5
    )
    # 2 - 0.25 * 0.4 for both.
    np.testing.assert_allclose((found.predicted, found.met), (1.9 / 1.5, 1.0))
    ended[2, 0] = True  # Nothing follows a game over.
    found = following.skill_following(
        as_played(task, task, is_first, value, ended), 0.5
    )
    np.testing.assert_allclose((found.predicted, found.met), (3.9 / 3.0, 1.0))


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
    assert -1.0 <= result["skill_following"]["met"] <= 1.0
    assert math.isfinite(result["skill_following"]["predicted"])


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
