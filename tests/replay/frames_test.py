"""Tests of aps_jax.replay.frames."""

import jax
import numpy as np
import pytest

from aps_jax.envs import atari
from aps_jax.replay import frames


def stack_by_hand(pixels, is_first, time):
    """Walks back from `time`, stopping at the reset frame of its episode."""
    stack = []
    place = time
    for _ in range(4):
        stack.append(pixels[place])
        if not is_first[place] and place > 0:
            place -= 1
    return np.stack(stack[::-1], axis=-1)


def random_episode_starts(rng, length):
    is_first = rng.random(length) < 0.3
    is_first[0] = True
    return is_first


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_pushed_frames_follow_the_walk_back(transform):
    rng = np.random.default_rng(0)
    num_envs, length = 3, 12
    pixels = rng.integers(0, 256, (length, num_envs, 84, 84), dtype=np.uint8)
    is_first = np.stack(
        [random_episode_starts(rng, length) for _ in range(num_envs)], axis=1
    )
    push = transform(frames.push_frame)
    stack = frames.init_stack(atari.OBSERVATION, num_envs)
    for time in range(length):
        stack = push(stack, pixels[time], is_first[time])
        for env in range(num_envs):
            expected = stack_by_hand(pixels[:, env], is_first[:, env], time)
            np.testing.assert_array_equal(stack[env], expected)


@pytest.mark.parametrize("num_states", [1, 2, 9])
@pytest.mark.parametrize("seed", range(5))
def test_places_follow_the_walk_back(num_states, seed):
    rng = np.random.default_rng(seed)
    history = rng.integers(0, 50)  # what lies before the window
    length = history + 3 + num_states
    pixels = np.arange(length)
    is_first = random_episode_starts(rng, length)
    window = slice(history, None)
    places = np.asarray(frames.stack_places(is_first[window], 4))
    assert places.shape == (num_states, 4)
    for state in range(num_states):
        expected = stack_by_hand(pixels, is_first, history + 3 + state)
        np.testing.assert_array_equal(pixels[window][places[state]], expected)


def test_places_by_hand():
    # Frames 0 to 6, a reset at 4: stacks of frames 3, 4, 5 and 6.
    is_first = np.array([False, False, False, False, True, False, False])
    np.testing.assert_array_equal(
        frames.stack_places(is_first, 4),
        [[0, 1, 2, 3], [4, 4, 4, 4], [4, 4, 4, 5], [4, 4, 5, 6]],
    )
