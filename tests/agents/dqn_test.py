"""Tests of aps_jax.agents.dqn: its loss, and that a stage of reward alone works."""

import functools

import fakes
import jax
import numpy as np
import pytest
import references_agent

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.envs import atari
from aps_jax.networks import modules
from aps_jax.replay import buffer
from aps_jax.train import stages

NUM_ACTIONS = 3


def make_config(**options):
    options = {"game": "Chain", "discount": 0.9, **options}
    return config_lib.replace_options(
        config_lib.preset_config("smoke", "dqn"), **options
    )


def make_windows(rng, num_windows, num_states):
    shape = (num_windows, num_states)
    is_first = rng.random(shape) < 0.2
    terminated = np.zeros(shape, bool)
    terminated[:, :-1] = is_first[:, 1:] & (rng.random(shape) < 0.5)[:, 1:]
    return buffer.Window(
        observation=rng.integers(0, 256, (*shape, 84, 84, 4), dtype=np.uint8),
        action=rng.integers(0, NUM_ACTIONS, shape).astype(np.int32),
        reward=2 * rng.normal(size=shape).astype(np.float32),
        terminated=terminated,
        is_first=is_first,
        life_lost=rng.random(shape) < 0.2,
        id=np.arange(num_windows * num_states, dtype=np.int32).reshape(shape),
        extras={},
    )


@pytest.mark.parametrize("life_cut", [True, False])
def test_the_loss_is_that_of_double_q_learning_written_slowly(life_cut):
    config = make_config(cut_at_life_loss=life_cut, window_targets=2)
    agent = config.make_agent(NUM_ACTIONS, atari.OBSERVATION)
    state = agent.init(jax.random.key(0))
    state = state._replace(target_params=agent.init(jax.random.key(1)).params["values"])
    windows = make_windows(np.random.default_rng(0), 4, 5)
    batch = base.Batch(windows, None)
    update = jax.jit(agent.finetune.learner.update)
    metrics = update(state, batch, jax.random.key(2)).metrics
    network = modules.ValueNetwork(
        base.make_encoder(config.learner, atari.OBSERVATION), NUM_ACTIONS, 16
    )
    online, slow = (
        np.float64(network.apply(params, windows.observation))
        for params in (state.params["values"], state.target_params)
    )
    errors, chosen = [], []
    for b in range(4):
        window = jax.tree.map(lambda x, b=b: x[b], windows)
        for start in range(2):
            walk = references_agent.walk_target(
                window, start, n_steps=3, discount=0.9, task=None, life_cut=life_cut
            )
            if walk is None:
                continue
            places, discounts, last, product = walk
            reward = np.clip(np.float64(window.reward[places]), -1, 1)
            greedy = np.argmax(online[b, last])
            target = np.sum(discounts * reward) + product * slow[b, last, greedy]
            chosen.append(online[b, start, window.action[start]])
            errors.append(target - chosen[-1])
    assert 0 < len(errors) < 8
    expected = {
        "loss_td": np.mean(0.5 * np.square(errors)),
        "td_error": np.mean(np.abs(errors)),
        "q_value": np.mean(chosen),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5)


def test_a_stage_of_reward_alone_learns_resumes_and_is_noticed_when_finished(tmp_path):
    config = make_config(
        finetune_agent_steps=240, checkpoint_agent_steps=120, report_agent_steps=120
    )
    started = []

    def constructor(*args, **options):
        started.append(1)
        return fakes.ChainPool(*args, **options)

    finetune = functools.partial(stages.finetune, constructor=constructor)
    result = finetune(config, tmp_path / "run", None)
    assert result["agent"] == "dqn" and result["init"] is None
    assert result["finetune_agent_steps"] == 240
    # Learning begins with the first window (3 + 4 frames of 4 environments).
    assert result["updates"] == (240 - 28) // 16
    count = len(started)
    assert finetune(config, tmp_path / "run", None) == result
    assert len(started) == count  # No emulator starts for a finished run.
    trained = stages.load_finetuned(tmp_path / "run")
    assert int(trained.state.num_updates) == result["updates"]


def test_there_is_no_reward_free_stage(tmp_path):
    with pytest.raises(ValueError, match="dqn learns from reward alone"):
        stages.pretrain(make_config(), tmp_path / "run", constructor=fakes.ChainPool)
    assert not (tmp_path / "run").exists()
