"""Tests of aps_jax.replay.buffer against a list of everything that was added."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from aps_jax.envs import atari
from aps_jax.replay import buffer, frames


def random_step(rng, num_envs, time, is_first=None):
    """A step whose frame, id and reward all say which one it is."""
    number = time * num_envs + np.arange(num_envs)
    frame = np.zeros((num_envs, 84, 84), np.uint8)
    frame[:, 0, 0], frame[:, 0, 1] = number % 256, number // 256
    return buffer.Step(
        frame=frame,
        action=rng.integers(0, 6, num_envs).astype(np.int32),
        reward=number.astype(np.float32),
        terminated=rng.random(num_envs) < 0.1,
        is_first=rng.random(num_envs) < 0.15 if is_first is None else is_first,
        life_lost=rng.random(num_envs) < 0.2,
        id=number.astype(np.int32),
        extras={"task": rng.normal(size=(num_envs, 3)).astype(np.float32)},
    )


EXTRAS = {"task": jax.ShapeDtypeStruct((3,), np.float32)}


def filled(num_envs, size, num_steps, seed=0):
    """Adds steps to a buffer and to a list."""
    rng = np.random.default_rng(seed)
    state, steps = (
        buffer.init(atari.OBSERVATION, EXTRAS, num_envs=num_envs, size=size),
        [],
    )
    add = jax.jit(buffer.add, donate_argnums=0)
    for time in range(num_steps):
        first = np.ones(num_envs, bool) if time == 0 else None
        steps.append(random_step(rng, num_envs, time, first))
        state = add(state, steps[-1])
    return state, steps


def sample(state, seed, *, num_windows, num_states, pixels=False):
    """Samples jitted; without pixels XLA leaves the work of stacking out."""

    def draw(state, key):
        window = buffer.sample(
            state,
            key,
            observation=atari.OBSERVATION,
            num_windows=num_windows,
            num_states=num_states,
        )
        return window if pixels else window._replace(observation=None)

    return jax.device_get(jax.jit(draw)(state, jax.random.key(seed)))


FIELDS = ("action", "reward", "terminated", "is_first", "life_lost", "id")


def field(steps, name):
    """A field of a step or window, or one of its extras."""
    return steps.extras[name] if name in steps.extras else getattr(steps, name)


# Half full, exactly full, just past the end, and several times around.
@pytest.mark.parametrize("num_steps", [10, 20, 21, 67])
@pytest.mark.parametrize("num_states", [1, 5])
def test_windows_are_pieces_of_what_was_added(num_steps, num_states):
    num_envs, length = 2, 20
    state, steps = filled(num_envs, num_envs * length, num_steps)
    windows = sample(state, 1, num_windows=300, num_states=num_states)
    ids = np.asarray(windows.id)
    envs, times = ids % num_envs, ids // num_envs
    np.testing.assert_array_equal(np.diff(times, axis=1), 1)
    np.testing.assert_array_equal(envs, np.repeat(envs[:, :1], num_states, axis=1))
    # Every place that leaves room for the stack's history is drawn, and no other.
    oldest = max(0, num_steps - length)
    starts = set(range(oldest + 3, num_steps - num_states + 1))
    assert set(times[:, 0]) == starts
    for name in (*FIELDS, "task"):
        expected = [
            [field(steps[t], name)[e] for t, e in zip(ts, es, strict=True)]
            for ts, es in zip(times, envs, strict=True)
        ]
        np.testing.assert_array_equal(field(windows, name), expected)


# Compiled once for all examples.
MODEL_ENVS, MODEL_LENGTH, MODEL_STATES = 2, 9, 3
model_add = jax.jit(buffer.add, donate_argnums=0)
model_sample = jax.jit(
    functools.partial(
        buffer.sample,
        observation=atari.OBSERVATION,
        num_windows=8,
        num_states=MODEL_STATES,
    )
)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=15, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    # How many steps are added before each sample.
    adds=st.lists(st.integers(0, 13), min_size=1, max_size=5),
)
def test_random_adds_and_samples_agree_with_a_list(seed, adds):
    rng = np.random.default_rng(seed)
    state = buffer.init(
        atari.OBSERVATION, EXTRAS, num_envs=MODEL_ENVS, size=MODEL_ENVS * MODEL_LENGTH
    )
    steps = []
    for count, key in zip(adds, range(len(adds)), strict=True):
        for _ in range(count):
            steps.append(random_step(rng, MODEL_ENVS, len(steps)))
            state = model_add(state, steps[-1])
        if len(steps) < MODEL_STATES + 3:
            continue
        window = jax.device_get(model_sample(state, jax.random.key(key)))
        for row, ids in enumerate(window.id):
            times, envs = ids // MODEL_ENVS, ids % MODEL_ENVS
            first, last = times[0], times[-1]
            assert times.tolist() == list(range(first, last + 1))
            assert set(envs) == {envs[0]}
            assert max(0, len(steps) - MODEL_LENGTH) <= first - 3 and last < len(steps)
            for place, time in enumerate(times):
                for name in (*FIELDS, "task"):
                    np.testing.assert_array_equal(
                        field(window, name)[row, place],
                        field(steps[time], name)[envs[0]],
                    )
                np.testing.assert_array_equal(
                    window.observation[row, place, ..., -1], steps[time].frame[envs[0]]
                )


def test_stacks_equal_those_that_acting_saw():
    num_envs, num_states = 2, 6
    state, steps = filled(num_envs, 60, 45)
    seen, stack = [], frames.init_stack(atari.OBSERVATION, num_envs)
    for step in steps:
        stack = frames.push_frame(stack, step.frame, step.is_first)
        seen.append(np.asarray(stack))
    windows = sample(state, 0, num_windows=40, num_states=num_states, pixels=True)
    assert windows.observation.shape == (40, num_states, 84, 84, 4)
    for observation, ids in zip(windows.observation, windows.id, strict=True):
        for pixels, number in zip(observation, ids, strict=True):
            time, env = divmod(int(number), num_envs)
            np.testing.assert_array_equal(pixels, seen[time][env])


def test_only_the_states_that_are_asked_for_are_stacked():
    """Each window names its own, by what its other fields say."""
    state, _ = filled(2, 48, 30)
    shape = {"num_windows": 5, "num_states": 6, "observation": atari.OBSERVATION}
    key = jax.random.key(3)
    whole = buffer.sample(state, key, **shape)
    chosen = buffer.sample(
        state,
        key,
        **shape,
        states=lambda windows: jnp.stack(
            [jnp.zeros(5, jnp.int32), windows.id[:, -1] % 6], axis=1
        ),
    )
    last = np.asarray(whole.id[:, -1]) % 6
    assert len(set(last)) > 1
    expected = [whole.observation[i, [0, place]] for i, place in enumerate(last)]
    np.testing.assert_array_equal(chosen.observation, np.stack(expected))
    np.testing.assert_array_equal(chosen.action, whole.action)


def test_sampling_is_uniform_and_follows_its_key():
    state, _ = filled(2, 40, 20)
    windows = sample(state, 3, num_windows=6800, num_states=1)
    counts = np.bincount(np.asarray(windows.id)[:, 0], minlength=40)[6:]
    # 34 places, 200 expected in each: a chi-square of 33 degrees of freedom is below
    # 63.9 with probability 0.999.
    assert np.sum((counts - 200.0) ** 2 / 200.0) < 63.9
    again = sample(state, 3, num_windows=6800, num_states=1)
    np.testing.assert_array_equal(windows.id, again.id)
    other = sample(state, 4, num_windows=6800, num_states=1)
    assert np.any(np.asarray(windows.id) != np.asarray(other.id))


# Of 11: 3 full chunks and 2 windows more; 2 chunks of 6 and 5; one; all at once.
@pytest.mark.parametrize("chunk_size", [3, 10, 11, 1024])
def test_mapping_in_chunks_is_mapping_what_is_sampled(monkeypatch, chunk_size):
    monkeypatch.setattr(buffer, "CHUNK_SIZE", chunk_size)
    state, _ = filled(2, 40, 33)
    seen = []

    def function(window):
        seen.append(window.id.shape[0])
        return {"ids": window.id, "sum": jnp.sum(window.reward, axis=1)}

    draw = {"observation": atari.OBSERVATION, "num_windows": 11, "num_states": 4}
    key = jax.random.key(5)
    found = jax.jit(lambda state, key: buffer.map_sample(function, state, key, **draw))(
        state, key
    )
    expected = function(buffer.sample(state, key, **draw))
    assert max(seen[:-1]) <= chunk_size
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_mapping_over_all_keeps_the_order_and_rebuilds_each_stack(
    monkeypatch, chunk_size
):
    monkeypatch.setattr(buffer, "CHUNK_SIZE", chunk_size)
    state, steps = filled(2, 60, 25)
    seen, stack = [], frames.init_stack(atari.OBSERVATION, 2)
    for step in steps:
        stack = frames.push_frame(stack, step.frame, step.is_first)
        seen.append(np.asarray(stack))

    def function(window):
        assert window.id.shape[1] == 1
        return window.id[:, 0], window.observation[:, 0]

    ids, stacks = jax.jit(
        lambda state: buffer.map_all(
            function, state, observation=atari.OBSERVATION, num_steps=25
        )
    )(state)
    np.testing.assert_array_equal(ids, np.stack([step.id for step in steps]))
    np.testing.assert_array_equal(stacks, np.stack(seen))


def test_a_step_takes_three_percent_more_than_its_frame_at_most():
    extras = {"task": jax.ShapeDtypeStruct((5,), np.float32)}
    num_bytes = buffer.num_bytes(atari.OBSERVATION, extras, num_envs=8, size=1_000_000)
    assert 7056 <= num_bytes / 1_000_000 <= 1.03 * 7056
    make = functools.partial(buffer.init, atari.OBSERVATION, num_envs=8, size=1_000_000)
    state = jax.eval_shape(make, extras)
    stored = sum(
        np.prod(leaf.shape, dtype=np.int64) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state.experience)
    )
    assert stored == num_bytes


def test_adding_is_in_place():
    make = functools.partial(buffer.init, atari.OBSERVATION, num_envs=4, size=4000)
    state = jax.eval_shape(make, EXTRAS)
    step = jax.eval_shape(lambda: random_step(np.random.default_rng(0), 4, 0))
    compiled = jax.jit(buffer.add, donate_argnums=0).lower(state, step).compile()
    memory = compiled.memory_analysis()
    num_bytes = buffer.num_bytes(atari.OBSERVATION, EXTRAS, num_envs=4, size=4000)
    assert memory.alias_size_in_bytes >= num_bytes
    assert memory.temp_size_in_bytes <= 0.01 * num_bytes


def test_size_is_rounded_down_to_whole_steps_of_all_environments():
    state = buffer.init(atari.OBSERVATION, {}, num_envs=3, size=11)
    assert state.experience.id.shape == (3, 3) and state.length == 3
    with pytest.raises(ValueError, match="at least num_envs, got 2 and 3"):
        buffer.init(atari.OBSERVATION, {}, num_envs=3, size=2)
