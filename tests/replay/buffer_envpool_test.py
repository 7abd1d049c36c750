"""Tests that nothing learned from EnvPool crosses a reset, over eighty resets."""

import functools

import envpool
import jax
import numpy as np
import pytest

from aps_jax.envs import atari
from aps_jax.ops import returns
from aps_jax.replay import buffer

NUM_ENVS = 8
NUM_STEPS = 160
# Games are cut after 15 agent steps, so 1,280 steps hold some 80 resets.
MAX_FRAMES = 60


@pytest.fixture(scope="module")
def played():
    """A replay of random play, and what EnvPool itself stacked at each step."""
    options = {"seeds": atari.environment_seeds(3, NUM_ENVS), "max_frames": MAX_FRAMES}
    pool = atari.AtariPool("Breakout", NUM_ENVS, **options)
    stacking = envpool.make(
        "Breakout-v5",
        env_type="gymnasium",
        num_envs=NUM_ENVS,
        seed=options["seeds"],
        max_episode_steps=MAX_FRAMES // 4,
        stack_num=4,
        use_fire_reset=False,
        noop_max=30,
    )
    add = jax.jit(buffer.add, donate_argnums=0)
    state = buffer.init(
        atari.OBSERVATION, {}, num_envs=NUM_ENVS, size=NUM_ENVS * NUM_STEPS
    )
    rng = np.random.default_rng(0)
    timestep, stacks = pool.reset(), [stacking.reset()[0]]
    firsts, lives = [], timestep.lives
    for time in range(NUM_STEPS):
        action = rng.integers(0, pool.num_actions, NUM_ENVS).astype(np.int32)
        step = buffer.Step(
            frame=timestep.frame,
            action=action,
            reward=timestep.reward,
            terminated=timestep.terminated,
            is_first=timestep.is_first,
            life_lost=(timestep.lives < lives) & ~timestep.is_first,
            id=(time * NUM_ENVS + np.arange(NUM_ENVS)).astype(np.int32),
            extras={},
        )
        lives = timestep.lives
        state = add(state, step)
        firsts.append(timestep.is_first)
        pool.send(action)
        timestep = pool.recv()
        stacks.append(stacking.step(action)[0])
    pool.close()
    return state, np.stack(firsts), stacks


def test_stacks_out_of_the_replay_equal_envpools_own(played):
    state, firsts, stacks = played
    assert firsts.sum() > 60
    draw = functools.partial(
        buffer.sample, observation=atari.OBSERVATION, num_windows=150, num_states=12
    )
    windows = jax.jit(draw)(state, jax.random.key(0))
    for observation, ids in zip(
        np.asarray(windows.observation), np.asarray(windows.id), strict=True
    ):
        for pixels, number in zip(observation, ids, strict=True):
            time, env = divmod(int(number), NUM_ENVS)
            np.testing.assert_array_equal(np.moveaxis(pixels, -1, 0), stacks[time][env])


def test_no_target_crosses_a_reset(played):
    state, firsts, _ = played

    def draw(key):
        windows = buffer.sample(
            state, key, observation=atari.OBSERVATION, num_windows=3000, num_states=12
        )
        lay_out = functools.partial(
            returns.window_targets, num_targets=2, n_steps=10, discount=0.99
        )
        targets = jax.vmap(lay_out)(windows.is_first, windows.terminated)
        return windows.id, targets

    ids, targets = jax.device_get(jax.jit(draw)(jax.random.key(1)))
    times, env = ids // NUM_ENVS, ids[:, :1] % NUM_ENVS
    episode = np.cumsum(firsts, axis=0)  # [time, E]: which game a step belongs to
    game = episode[times, env]  # [windows, states]
    num_valid = num_invalid = num_cut = 0
    for window in range(len(ids)):
        for start in range(2):
            same_game = game[window, start + 1] == game[window, start]
            assert targets.is_valid[window, start] == same_game
            num_invalid += not same_game
            if not same_game:
                continue
            num_valid += 1
            used = targets.rewarded[window, start][targets.weight[window, start] > 0]
            assert np.all(game[window, used] == game[window, start])
            assert targets.bootstrap[window, start] == used[-1]
            # Nothing of the game that could be used is left out.
            left = np.sum(game[window, start + 1 : start + 11] == game[window, start])
            assert len(used) == left
            num_cut += left < 10
    assert num_valid > 5000 and num_invalid > 50 and num_cut > 500
