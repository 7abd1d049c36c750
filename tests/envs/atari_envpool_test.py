"""Tests `envs` on EnvPool itself, and the facts about EnvPool that it relies on.

A fact's test plays EnvPool without our pool (`make_raw`) where our pool hides the
fact, so that a release of EnvPool that behaves otherwise turns it red.
"""

import functools
import os
import pickle
from typing import NamedTuple

import envpool
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import run_python

from aps_jax import types
from aps_jax.envs import atari
from aps_jax.replay import frames


class Answer(NamedTuple):
    """What EnvPool itself returned, [T, E, ...] or one time step of it."""

    observation: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info_reward: np.ndarray
    info_terminated: np.ndarray
    elapsed_step: np.ndarray
    lives: np.ndarray
    ram: np.ndarray
    env_id: np.ndarray


def make_raw(game, num_envs, *, seed, **options):
    """Makes EnvPool's own pool with our options, but for those given."""
    defaults = {
        "batch_size": num_envs,
        "num_threads": 1,
        "stack_num": 1,
        "max_episode_steps": 27_000,
        "noop_max": 30,
        "use_fire_reset": False,
        "render_mode": "rgb_array",
    }
    return envpool.make(
        f"{game}-v5",
        env_type="gymnasium",
        num_envs=num_envs,
        seed=seed,
        **{**defaults, **options},
    )


def to_answer(observation, reward, terminated, truncated, info):
    names = ("reward", "terminated", "elapsed_step", "lives", "ram", "env_id")
    return Answer(
        observation, reward, terminated, truncated, *(info[name] for name in names)
    )


def reset_raw(raw):
    observation, info = raw.reset()
    none = np.zeros(len(observation), np.bool_)
    return to_answer(observation, info["reward"], none, none, info)


def play_raw(raw, actions):
    """Plays actions [T, E]; returns an Answer [T + 1, E, ...], the reset first."""
    answers = [reset_raw(raw)]
    answers += [to_answer(*raw.step(action)) for action in actions]
    return Answer(*(np.stack(field) for field in zip(*answers, strict=True)))


def make_pool(game, num_envs, *, seed=0, **options):
    options = {"num_threads": 1, **options}
    seeds = atari.environment_seeds(seed, num_envs)
    return atari.AtariPool(game, num_envs, seeds=seeds, **options)


def play(pool, actions):
    """Plays actions [T, E]; returns a TimeStep [T + 1, E, ...], the reset first."""
    steps = [pool.reset()]
    for action in actions:
        pool.send(action)
        steps.append(pool.recv())
    return types.TimeStep(*(np.stack(field) for field in zip(*steps, strict=True)))


def random_actions(num_steps, num_envs, num_actions=4, *, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, num_actions, (num_steps, num_envs)).astype(np.int32)


def assert_same(one, other):
    for name, value in one._asdict().items():
        np.testing.assert_array_equal(getattr(other, name), value, err_msg=name)


@functools.cache
def breakout():
    """Random Breakout under our pool: 4 environments, 600 agent steps, no limit."""
    pool = make_pool("Breakout", 4)
    actions = random_actions(600, 4)
    steps = play(pool, actions)
    pool.close()
    return actions, steps


def breakout_of_two(num_steps):
    """The first steps of its first two environments, and their actions.

    A pool of two has the same seeds, and starts in half the time.
    """
    actions, steps = breakout()
    steps = types.TimeStep(*(field[: num_steps + 1, :2] for field in steps))
    return actions[:num_steps, :2], steps


def test_every_option_of_envpool_is_set():
    made = {}

    def make(task_id, **options):
        made.update(options)
        return envpool.make(task_id, **options)

    atari.AtariPool("Pong", 2, seeds=[1, 2], make=make)
    left_to_envpool = {
        "base_path",  # Where the ROMs lie.
        "env_seed",  # Set by a `seed` that is a list.
        "gym_reset_return_info",  # Must be true.
        "max_num_players",  # Atari has one.
        "task",  # Set by the name.
    }
    known = set(envpool.make_spec("Pong-v5").config._fields)
    assert known - set(made) == left_to_envpool
    assert set(made) - known == {"env_type", "render_mode"}


def test_games_are_envpools():
    registry = envpool.registration.registry
    registered = {
        name.removesuffix("-v5")
        for name in envpool.list_all_envs()
        if registry.specs[name][0] == "envpool.atari"
    }
    assert set(atari.games()) == registered
    assert len(atari.games()) == len(registered) > 50
    assert "Pong" in registered


def test_action_sets_are_minimal():
    counts = {
        game: make_pool(game, 1).num_actions for game in ("Pong", "Breakout", "Alien")
    }
    assert counts == {"Pong": 6, "Breakout": 4, "Alien": 18}


# Fact 1: the reset comes with the call after the last step.


def test_reset_frames_follow_last_frames_and_nothing_else():
    _, steps = breakout()
    is_last = steps.terminated | steps.truncated
    assert steps.terminated.sum() > 8 and not steps.truncated.any()
    assert steps.is_first[0].all()
    np.testing.assert_array_equal(steps.is_first[1:], is_last[:-1])
    assert not (steps.is_first & is_last).any()
    np.testing.assert_array_equal(steps.reward[steps.is_first], 0.0)
    np.testing.assert_array_equal(steps.lives[steps.is_first], 5)
    np.testing.assert_array_equal(steps.lives[is_last], 0)
    assert (steps.lives[~is_last] > 0).all()


def test_last_memory_is_the_true_one_not_the_resets():
    # Breakout's lives lie in byte 57 of its memory.
    _, steps = breakout()
    np.testing.assert_array_equal(steps.ram[..., 57], steps.lives)
    assert (steps.ram[steps.terminated][:, 57] == 0).all()


def test_action_of_a_reset_is_ignored():
    actions, steps = breakout_of_two(400)
    changed = np.where(steps.is_first[1:], (actions + 1) % 4, actions)
    assert (changed != actions).sum() >= 2
    assert_same(play(make_pool("Breakout", 2), changed), steps)


def test_elapsed_step_counts_agent_steps_from_the_reset():
    answers = play_raw(make_raw("Breakout", 2, seed=[1, 2]), random_actions(400, 2))
    is_last = answers.terminated | answers.truncated
    assert is_last.any()
    np.testing.assert_array_equal(answers.elapsed_step[0], 0)
    np.testing.assert_array_equal(
        answers.elapsed_step[1:],
        np.where(is_last[:-1], 0, answers.elapsed_step[:-1] + 1),
    )


def test_last_picture_is_a_step_old_if_the_game_ends_in_its_first_half():
    # A twin that steps single emulator frames shows in which of the four the game is
    # over: after frame 1 or 2 EnvPool repeats the picture of the step before.
    num_envs, seed = 5, list(range(1, 6))
    actions = random_actions(104, num_envs, 3, seed=1)
    raw = play_raw(make_raw("RoadRunner", num_envs, seed=seed), actions)
    twin = play_raw(
        make_raw("RoadRunner", num_envs, seed=seed, frame_skip=1),
        np.repeat(actions, 4, axis=0),
    )
    is_repeated = {1: [], 2: [], 3: [], 4: []}
    for i in range(num_envs):
        ends = np.flatnonzero(raw.terminated[:, i])
        if ends.size == 0:
            continue
        end = ends[0]  # The twin has lost step with the pool in later games.
        over = np.flatnonzero(twin.terminated[:, i])[0] - 4 * (end - 1)
        is_repeated[over].append(
            np.array_equal(raw.observation[end, i], raw.observation[end - 1, i])
        )
    assert is_repeated[1] + is_repeated[2], "No game ended in the first half."
    assert is_repeated[3] + is_repeated[4], "No game ended in the second half."
    assert all(is_repeated[1] + is_repeated[2])
    assert not any(is_repeated[3] + is_repeated[4])


# Fact 2: game over and time limit.


def test_time_limit_counts_agent_steps():
    steps = play(make_pool("Pong", 2, max_frames=80), random_actions(45, 2))
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 0]), [20, 41])
    np.testing.assert_array_equal(np.flatnonzero(steps.is_first[:, 0]), [0, 21, 42])
    assert not steps.terminated.any()


def test_game_over_on_the_limit_step_is_game_over():
    # The length of the shortest first game, from play without a limit, as limit.
    actions, steps = breakout_of_two(400)
    length = int(np.flatnonzero(steps.terminated.any(axis=1))[0])
    is_over = steps.terminated[length]
    assert is_over.sum() == 1
    limited = play(make_pool("Breakout", 2, max_frames=4 * length), actions[:length])
    np.testing.assert_array_equal(limited.terminated[length], is_over)
    np.testing.assert_array_equal(limited.truncated[length], ~is_over)
    # EnvPool itself: truncation alone, but for `info`.
    seed = atari.environment_seeds(0, 2)
    raw = make_raw("Breakout", 2, seed=seed, max_episode_steps=length)
    answers = play_raw(raw, actions[:length])
    assert not answers.terminated[length].any()
    assert answers.truncated[length].all()
    np.testing.assert_array_equal(answers.info_terminated[length], is_over)


def test_game_over_and_time_limit_exclude_each_other():
    steps = play(make_pool("Breakout", 2, max_frames=600), random_actions(310, 2))
    assert steps.terminated.any() and steps.truncated.any()
    assert not (steps.terminated & steps.truncated).any()


# Fact 3: the loss of a life.


def test_life_loss_ends_no_episode():
    _, steps = breakout()
    is_loss = (steps.lives[1:] < steps.lives[:-1]) & ~steps.is_first[1:]
    assert (is_loss & ~steps.terminated[1:]).sum() > 4 * steps.terminated.sum() > 0


def test_episodic_life_of_envpool_hides_a_reset():
    # Why it stays off: the call after a life loss plays up to 30 no-ops, and its
    # elapsed_step neither moves on nor begins at 0.
    raw = make_raw("Breakout", 2, seed=[1, 2], episodic_life=True)
    answers = play_raw(raw, random_actions(200, 2))
    is_life_loss = answers.terminated.astype(bool) & (answers.info_terminated == 0)
    time, env = np.nonzero(is_life_loss[:-1])
    assert time.size > 5
    np.testing.assert_array_equal(
        answers.elapsed_step[time + 1, env], answers.elapsed_step[time, env]
    )
    assert (answers.elapsed_step[time + 1, env] > 0).all()
    np.testing.assert_array_equal(
        answers.lives[time + 1, env], answers.lives[time, env]
    )
    # Memory has moved on, in spite of the counter.
    changed = (answers.ram[time + 1, env] != answers.ram[time, env]).any(axis=-1)
    assert changed.all()


# Fact 4: rewards.


def test_rewards_are_unclipped_and_sum_to_the_score():
    # MsPacman's pellets are 10 points, its score binary-coded decimal in memory.
    pool = make_pool("MsPacman", 2)
    steps = play(pool, random_actions(250, 2, 9, seed=3))
    digits = steps.ram[..., [122, 121, 120]].astype(np.int64)
    score = ((digits // 16 * 10 + digits % 16) * [10_000, 100, 1]).sum(axis=-1)
    assert not (steps.terminated | steps.truncated).any()
    np.testing.assert_array_equal(np.cumsum(steps.reward, axis=0), score)
    assert score[-1].min() > 50
    update = jax.jit(atari.update_episode_stats)
    stats = atari.init_episode_stats(2)
    for t in range(len(steps.reward)):
        step = types.TimeStep(*(field[t] for field in steps))
        stats = update(stats, step)
    np.testing.assert_array_equal(stats.running_return, score[-1])


def test_info_reward_of_envpool_is_never_clipped():
    raw = make_raw("MsPacman", 2, seed=[1, 2], reward_clip=True)
    answers = play_raw(raw, random_actions(100, 2, 9))
    assert answers.reward.max() == 1.0
    assert answers.info_reward.max() >= 10.0
    np.testing.assert_array_equal(answers.reward, np.sign(answers.info_reward))


# Fact 5: seeds.


def reset_streams(reset, num_resets=6):
    """Plays resets alone; returns the memories that each environment began with.

    A seed's stream is the numbers of no-ops, and Breakout's memory shows each: 6 of
    1 to 30 make two streams equal by accident in 1 of 7e8.
    """
    rams = np.stack([reset().ram for _ in range(num_resets)], axis=1)
    return [stream.tobytes() for stream in rams]


def test_plain_seeds_of_envpool_share_environments():
    first, second = (
        reset_streams(functools.partial(reset_raw, make_raw("Breakout", 3, seed=seed)))
        for seed in (0, 1)
    )
    assert len(set(first)) == 3
    assert first[1:] == second[:-1]


def test_adjacent_seeds_and_processes_share_no_environment():
    streams = []
    for seed, stream in ((0, 0), (1, 0), (0, 1)):
        seeds = atari.environment_seeds(seed, 2, stream=stream)
        pool = atari.AtariPool("Breakout", 2, seeds=seeds, num_threads=1)
        streams += reset_streams(pool.reset)
    assert len(set(streams)) == 3 * 2


def test_same_seeds_are_the_same_environments_whatever_the_batch():
    seeds = atari.environment_seeds(0, 2)
    together = atari.AtariPool("Breakout", 2, seeds=seeds, num_threads=1)
    alone = atari.AtariPool("Breakout", 1, seeds=seeds[1:], num_threads=1)
    assert reset_streams(together.reset)[1] == reset_streams(alone.reset)[0]


@pytest.mark.parametrize(
    "seeds, sticky, is_same",
    [([5, 5], 0.25, True), ([5, 6], 0.25, False), ([5, 6], 0.0, True)],
    ids=["same seeds", "other seeds", "not sticky"],
)
def test_sticky_actions_come_from_the_seeds(seeds, sticky, is_same):
    # Both environments are sent the same; with one no-op, nothing else is random.
    actions = np.repeat(random_actions(80, 1, 6), 2, axis=1)
    pool = atari.AtariPool(
        "Pong", 2, seeds=seeds, num_threads=1, noop_max=1, sticky=sticky
    )
    ram = play(pool, actions).ram
    assert np.array_equal(ram[:, 0], ram[:, 1]) == is_same


def test_noop_max_bounds_the_no_ops():
    # Breakout's memory is another after each no-op; 40 resets draw all of 1 to 5.
    def beginnings(noop_max):
        pool = make_pool("Breakout", 1, noop_max=noop_max)
        return {ram.tobytes() for _ in range(40) for ram in pool.reset().ram}

    one, five = beginnings(1), beginnings(5)
    assert len(one) == 1 and len(five) == 5
    assert one < five


# Fact 6: frames and stacks.


@pytest.mark.parametrize(
    "game, num_envs, num_steps, max_frames",
    [("Breakout", 2, 400, 108_000), ("Pong", 2, 80, 100), ("Freeway", 1, 30, 32)],
)
def test_own_stacks_equal_envpools(game, num_envs, num_steps, max_frames):
    pool = make_pool(game, num_envs, max_frames=max_frames)
    raw = make_raw(
        game,
        num_envs,
        seed=atari.environment_seeds(0, num_envs),
        stack_num=4,
        max_episode_steps=max_frames // 4,
    )
    actions = random_actions(num_steps, num_envs, 3)
    expected = play_raw(raw, actions).observation
    steps = play(pool, actions)
    assert steps.is_first[1:].sum() >= 2

    def push(stack, step):
        stack = frames.push_frame(stack, *step)
        return stack, stack

    # Overwritten by the reset.
    stack = np.full((num_envs, *atari.OBSERVATION.shape), 7, np.uint8)
    _, stacks = jax.lax.scan(push, stack, (steps.frame, steps.is_first))
    np.testing.assert_array_equal(stacks, np.moveaxis(expected, 2, -1))
    # The same from a window of frames, as the replay looks them up.
    stack_places = jax.jit(frames.stack_places, static_argnames="stack")
    for i in range(num_envs):
        places = stack_places(steps.is_first[:, i], stack=4)
        np.testing.assert_array_equal(steps.frame[:, i][places], expected[3:, i])


def test_frame_is_the_larger_of_the_last_two_emulator_frames():
    # At the console's own size, where nothing is resized; a twin shows every frame.
    size = {"img_height": 210, "img_width": 160, "noop_max": 1}
    actions = random_actions(40, 1, 6)
    skipping = play_raw(make_raw("SpaceInvaders", 1, seed=[1], **size), actions)
    every = play_raw(
        make_raw("SpaceInvaders", 1, seed=[1], frame_skip=1, **size),
        np.repeat(actions, 4, axis=0),
    )
    third, fourth = every.observation[3::4], every.observation[4::4]
    np.testing.assert_array_equal(skipping.observation[0], every.observation[0])
    np.testing.assert_array_equal(skipping.observation[1:], np.maximum(third, fourth))
    assert (third != fourth).any()


# Fact 7: the synchronous mode.


@pytest.mark.parametrize("num_threads", [0, 2, 3])
def test_play_does_not_depend_on_the_threads(num_threads):
    actions, steps = breakout_of_two(100)
    pool = make_pool("Breakout", 2, num_threads=num_threads)
    assert_same(play(pool, actions), steps)


def test_rows_are_in_the_order_of_the_environments():
    raw = make_raw("Pong", 4, seed=list(range(4)), num_threads=3)
    answers = play_raw(raw, random_actions(80, 4))
    np.testing.assert_array_equal(answers.env_id, np.tile(np.arange(4), (81, 1)))


def test_partial_sends_of_envpool_overwrite_each_other():
    # Why send() refuses a second call: both fill the rows from 0 on.
    raw = make_raw("Breakout", 4, seed=[1, 2, 3, 4])
    raw.reset()
    actions = np.zeros(2, np.int32)
    raw.send(actions, env_id=np.array([0, 1], np.int32))
    raw.send(actions, env_id=np.array([2, 3], np.int32))
    answer = to_answer(*raw.recv())
    assert sorted(answer.env_id) != [0, 1, 2, 3]


def test_send_copies_the_actions():
    actions, steps = breakout_of_two(60)
    pool = make_pool("Breakout", 2)
    buffer = np.empty(2, np.int32)
    pool.reset()
    for t in range(60):
        buffer[:] = actions[t]
        pool.send(buffer)
        buffer[:] = 0
        np.testing.assert_array_equal(pool.recv().ram, steps.ram[t + 1])


def test_received_arrays_are_not_used_again():
    pool = make_pool("Breakout", 2)
    actions = random_actions(200, 2)
    kept = [pool.reset()]
    copies = [[field.copy() for field in kept[0]]]
    on_device = [jnp.asarray(kept[0].frame)]
    for action in actions:
        pool.send(action)
        kept.append(pool.recv())
        copies.append([field.copy() for field in kept[-1]])
        on_device.append(jnp.asarray(kept[-1].frame))
    addresses = {step.frame.__array_interface__["data"][0] for step in kept}
    assert len(addresses) == len(kept)
    for step, copy, frame in zip(kept, copies, on_device, strict=True):
        for field, expected in zip(step, copy, strict=True):
            np.testing.assert_array_equal(field, expected)
        np.testing.assert_array_equal(frame, copy[0])
    assert kept[0].frame.flags.c_contiguous


# Fact 8: an emulator cannot be saved.


def test_emulators_cannot_be_saved():
    raw = make_raw("Breakout", 1, seed=[1])
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(raw)
    words = ("save", "load", "clone", "restore", "snapshot", "state_dict")
    assert [name for name in dir(raw) if any(word in name for word in words)] == []


def test_a_new_pool_begins_new_episodes():
    # The nearest to a resumed run: same seeds, and every environment at its start.
    _, steps = breakout_of_two(0)
    pool = make_pool("Breakout", 2)
    play(pool, random_actions(20, 2))
    pool.close()
    step = make_pool("Breakout", 2).reset()
    assert step.is_first.all()
    np.testing.assert_array_equal(step.ram, steps.ram[0])


# Fact 9: EnvPool inside a jitted function.


def test_pool_works_without_envpools_xla(monkeypatch):
    def refuse(self):
        raise AssertionError("env.xla() blocks the device while emulators run.")

    raw_class = type(make_raw("Breakout", 1, seed=[1]))
    monkeypatch.setattr(raw_class, "xla", refuse)
    actions, steps = breakout_of_two(5)
    assert_same(play(make_pool("Breakout", 2), actions), steps)


# The pool itself.


def test_reset_in_the_midst_of_play_begins_new_episodes():
    pool = make_pool("Breakout", 2)
    play(pool, random_actions(20, 2))
    step = pool.reset()
    assert step.is_first.all()
    assert not (step.terminated | step.truncated).any()
    np.testing.assert_array_equal(step.reward, 0.0)
    np.testing.assert_array_equal(step.lives, 5)
    # A game that was over is not reset twice.
    pool.send(np.zeros(2, np.int32))
    assert not pool.recv().is_first.any()


def test_rendering_changes_nothing():
    actions, steps = breakout_of_two(40)
    pool = make_pool("Breakout", 2)
    pool.reset()
    for t in range(40):
        pool.send(actions[t])
        step = pool.recv()
        picture = pool.render(t % 2)
        assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
        np.testing.assert_array_equal(step.ram, steps.ram[t + 1])
        np.testing.assert_array_equal(step.frame, steps.frame[t + 1])
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 4


def test_render_shows_the_environment_asked_for():
    # Environment 1 alone fires and moves; a pool of it alone draws the same.
    pool = atari.AtariPool("Breakout", 2, seeds=[1, 2], num_threads=1)
    alone = atari.AtariPool("Breakout", 1, seeds=[2], num_threads=1)
    actions = random_actions(20, 1)
    play(pool, np.concatenate([np.zeros_like(actions), actions], axis=1))
    play(alone, actions)
    np.testing.assert_array_equal(pool.render(1), alone.render(0))
    assert (pool.render(0) != pool.render(1)).any()


def test_fire_reset_presses_fire():
    # Breakout serves its ball on FIRE: without it the ball's byte stays 0.
    states = {
        fire_reset: play(
            make_pool("Breakout", 2, fire_reset=fire_reset),
            np.zeros((10, 2), np.int32),
        )
        for fire_reset in (False, True)
    }
    np.testing.assert_array_equal(states[False].ram[:, :, 101], 0)
    assert (states[True].ram[:, :, 101] > 0).all()


def test_close_ends_the_threads():
    def num_threads():
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    pool = make_pool("Pong", 4, num_threads=3)
    assert num_threads() >= before + 3
    pool.reset()
    pool.send(np.zeros(4, np.int32))  # In flight when it is closed.
    pool.close()
    assert num_threads() == before


def test_what_a_stage_held_when_envpool_was_imported_is_freed():
    code = (
        "import gc, weakref\n"
        "import numpy as np\n"
        "from aps_jax.envs import atari\n"
        "def stage():\n"
        "    held = np.zeros(10)\n"
        "    atari.AtariPool('Pong', 1, seeds=[0]).close()\n"
        "    return weakref.ref(held)\n"
        "held = stage()\n"
        "gc.collect()\n"
        "print(held() is None)\n"
    )
    shown = run_python("-c", code)
    assert shown == "True\n"


def test_only_atari_is_imported_and_the_rest_can_be():
    code = (
        "import sys\n"
        "from aps_jax.envs import atari\n"
        "atari.AtariPool('Pong', 1, seeds=[0]).close()\n"
        "import envpool\n"
        "print([f for f in ('envpool.mujoco', 'matplotlib') if f in sys.modules])\n"
        "print('CartPole-v1' in envpool.list_all_envs())\n"
        "import envpool.entry\n"
        "print('CartPole-v1' in envpool.list_all_envs())\n"
        "atari.AtariPool('Pong', 1, seeds=[0]).close()\n"
    )
    assert run_python("-c", code).splitlines() == ["[]", "False", "True"]


def test_a_programs_own_import_of_envpool_stays_whole():
    code = (
        "import envpool\n"
        "from aps_jax.envs import atari\n"
        "atari.AtariPool('Pong', 1, seeds=[0]).close()\n"
        "print('CartPole-v1' in envpool.list_all_envs())\n"
    )
    assert run_python("-c", code) == "True\n"


def test_unknown_game_is_refused_before_envpool_is_imported():
    code = (
        "import sys\n"
        "from aps_jax.envs import atari\n"
        "try:\n"
        "    atari.AtariPool('Pnog', 1, seeds=[0])\n"
        "except ValueError as error:\n"
        "    print(error, 'envpool' in sys.modules)\n"
    )
    shown = run_python("-c", code)
    assert shown.startswith("Unknown game 'Pnog'")
    assert "Pong" in shown and shown.strip().endswith("False")
