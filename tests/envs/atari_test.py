"""Tests `envs` on scripted pools, and the fake environments themselves.

What EnvPool itself does is the subject of `envs_envpool_test`.
"""

import inspect
import os

import fakes
import jax
import numpy as np
import pytest
from scripts import run_python

from aps_jax import types
from aps_jax.envs import atari

STEP = fakes.ScriptedStep
TRANSFORMS = pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit], ids=["eager", "jit"]
)


def make_pool(*tapes, row_order=None, **options):
    make = fakes.scripted_make(*tapes, row_order=row_order)
    pool = atari.AtariPool(
        "Fake", len(tapes), seeds=range(len(tapes)), make=make, **options
    )
    return pool, make.pool


def play(pool, num_steps, action=0):
    """Resets and steps; returns a TimeStep of NumPy arrays [T, E, ...], copied."""
    steps = [pool.reset()]
    for _ in range(num_steps):
        pool.send(np.full(pool.num_envs, action, np.int32))
        steps.append(pool.recv())
    return types.TimeStep(*(np.stack(field) for field in zip(*steps, strict=True)))


def test_every_option_is_handed_over():
    make = fakes.scripted_make([STEP()], [STEP()])
    atari.AtariPool(
        "MsPacman",
        2,
        seeds=np.array([7, 11]),
        num_threads=3,
        noop_max=9,
        max_frames=1_000,
        sticky=0.25,
        fire_reset=True,
        make=make,
    )
    assert make.pool.task_id == "MsPacman-v5"
    assert make.pool.options == {
        "num_envs": 2,
        "batch_size": 2,
        "num_threads": 3,
        "thread_affinity_offset": -1,
        "seed": [7, 11],
        "max_episode_steps": 250,
        "stack_num": 1,
        "frame_skip": 4,
        "noop_max": 9,
        "episodic_life": False,
        "zero_discount_on_life_loss": False,
        "reward_clip": False,
        "use_fire_reset": True,
        "img_height": 84,
        "img_width": 84,
        "mode": -1,
        "difficulty": -1,
        "full_action_space": False,
        "repeat_action_probability": 0.25,
        "use_inter_area_resize": True,
        "gray_scale": True,
        "render_mode": "rgb_array",
    }
    assert all(type(seed) is int for seed in make.pool.options["seed"])


def test_default_protocol_is_the_papers():
    _, fake = make_pool([STEP()])
    expected = {
        "max_episode_steps": 27_000,
        "frame_skip": 4,
        "noop_max": 30,
        "repeat_action_probability": 0.0,
        "use_fire_reset": False,
    }
    assert {name: fake.options[name] for name in expected} == expected


@pytest.mark.parametrize("num_envs, num_cores, expected", [(4, 2, 2), (1, 2, 1)])
def test_threads_are_limited_to_the_cores_of_the_process(
    monkeypatch, num_envs, num_cores, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)  # The machine has more.
    _, fake = make_pool(*[[STEP()]] * num_envs)
    assert fake.options["num_threads"] == expected


def test_attributes():
    pool, _ = make_pool([STEP()], [STEP()])
    assert (pool.game, pool.num_envs, pool.num_actions) == ("Fake", 2, 4)
    assert type(pool.num_actions) is int


def test_time_step_has_the_declared_shapes_and_dtypes():
    pool, _ = make_pool([STEP(reward=2.5, lives=4)], [STEP()], [STEP()])
    for step in (pool.reset(), types.TimeStep(*(x[1] for x in play(pool, 1)))):
        assert {
            name: (value.shape, value.dtype) for name, value in step._asdict().items()
        } == {
            "frame": ((3, 84, 84), np.uint8),
            "reward": ((3,), np.float32),
            "terminated": ((3,), np.bool_),
            "truncated": ((3,), np.bool_),
            "is_first": ((3,), np.bool_),
            "lives": ((3,), np.int32),
            "ram": ((3, 128), np.uint8),
        }


def test_game_over_is_followed_by_a_reset_frame():
    # The tape ends each game at its second agent step, so that every third answer is
    # a reset frame; that one is no step of the tape.
    tape = [STEP(reward=1.0), STEP(reward=5.0, game_over=True, lives=0)]
    pool, _ = make_pool(tape)
    steps = play(pool, 6)
    np.testing.assert_array_equal(steps.is_first[:, 0], [1, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(steps.terminated[:, 0], [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(steps.truncated[:, 0], np.zeros(7))
    np.testing.assert_array_equal(steps.reward[:, 0], [0, 1, 5, 0, 1, 5, 0])
    np.testing.assert_array_equal(steps.lives[:, 0], [3, 3, 0, 3, 3, 0, 3])
    # Frames and memory are those of the same answer, none lost and none repeated.
    np.testing.assert_array_equal(steps.frame[:, 0, 5, 7], [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(steps.ram[:, 0, 9], steps.lives[:, 0])


def test_time_limit_is_truncation_without_game_over():
    pool, _ = make_pool([STEP(reward=1.0)], max_frames=12)  # 3 steps of 4 frames.
    steps = play(pool, 7)
    np.testing.assert_array_equal(steps.truncated[:, 0], [0, 0, 0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(steps.terminated[:, 0], np.zeros(8))
    np.testing.assert_array_equal(steps.is_first[:, 0], [1, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(steps.reward[:, 0], [0, 1, 1, 1, 0, 1, 1, 1])


def test_game_over_on_the_limit_step_is_game_over():
    tape = [STEP(), STEP(), STEP(game_over=True)]
    pool, fake = make_pool(tape, max_frames=12)
    steps = play(pool, 3)
    np.testing.assert_array_equal(steps.terminated[:, 0], [0, 0, 0, 1])
    np.testing.assert_array_equal(steps.truncated[:, 0], np.zeros(4))
    # The fake hides it as EnvPool does: there, the same step is truncation alone.
    fake.reset()
    answers = []
    for _ in range(3):
        fake.send(np.zeros(1, np.int32))
        answers.append(fake.recv())
    _, _, terminated, truncated, info = answers[-1]
    assert not terminated[0] and truncated[0] and info["terminated"][0] == 1


def test_life_loss_ends_nothing():
    tape = [STEP(lives=3), STEP(lives=2), STEP(lives=1)]
    pool, _ = make_pool(tape)
    steps = play(pool, 3)
    np.testing.assert_array_equal(steps.lives[:, 0], [3, 3, 2, 1])
    assert not steps.terminated.any()
    assert not steps.truncated.any()
    np.testing.assert_array_equal(steps.is_first[:, 0], [1, 0, 0, 0])


def test_game_over_flag_of_a_running_game_ends_nothing():
    pool, fake = make_pool([STEP()])
    observation, info = fake.reset()
    info["terminated"][:] = 1
    fake.reset = lambda: (observation, info)
    step = pool.reset()
    assert step.is_first[0] and not step.terminated[0] and not step.truncated[0]


def test_rewards_are_the_unclipped_ones():
    pool, fake = make_pool([STEP(reward=-400.0)])
    fake.options["reward_clip"] = True
    np.testing.assert_array_equal(play(pool, 2).reward[:, 0], [0.0, -400.0, -400.0])
    fake.send(np.zeros(1, np.int32))
    assert fake.recv()[1] == -1.0  # What the fake's option does, as in EnvPool.


def test_environments_are_independent():
    short = [STEP(reward=1.0, game_over=True)]
    long = [STEP(reward=2.0), STEP(reward=2.0), STEP(reward=2.0, game_over=True)]
    steps = play(make_pool(short, long)[0], 4)
    np.testing.assert_array_equal(
        steps.terminated, [[0, 0], [1, 0], [0, 0], [1, 1], [0, 0]]
    )
    np.testing.assert_array_equal(
        steps.is_first, [[1, 1], [0, 0], [1, 0], [0, 0], [1, 1]]
    )
    np.testing.assert_array_equal(
        steps.reward, [[0, 0], [1, 2], [0, 2], [1, 2], [0, 0]]
    )
    np.testing.assert_array_equal(
        steps.frame[:, :, 0, 0], [[1, 51], [2, 52], [3, 53], [4, 54], [5, 55]]
    )


@pytest.mark.parametrize("row_order", [[1, 1], [1, 0]])
def test_missing_rows_and_another_order_are_errors(row_order):
    pool, _ = make_pool([STEP()], [STEP()], row_order=row_order)
    with pytest.raises(
        RuntimeError, match=rf"environment in turn.*\[1 {row_order[1]}\]"
    ):
        pool.reset()


@pytest.mark.parametrize("to_array", [np.int32, np.int64, jax.numpy.asarray])
def test_actions_arrive_as_sent(to_array):
    pool, fake = make_pool([STEP()], [STEP()], [STEP()])
    pool.reset()
    pool.send(to_array(np.array([3, 0, 2], np.int32)))
    np.testing.assert_array_equal(fake.sent[0], [3, 0, 2])
    assert fake.sent[0].dtype == np.int32


def test_actions_are_fetched_explicitly(monkeypatch):
    # On an accelerator an implicit transfer would trip jax.transfer_guard; on the CPU
    # the guard sees none, hence the spy.
    pool, fake = make_pool([STEP()], [STEP()])
    pool.reset()
    actions = jax.device_put(np.array([1, 2], np.int32))
    fetched = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or fetch(x))
    pool.send(actions)
    assert len(fetched) == 1 and fetched[0] is actions
    np.testing.assert_array_equal(fake.sent[0], [1, 2])


@pytest.mark.parametrize("actions", [[0, -1], [4, 0]])
def test_actions_outside_the_games_are_refused(actions):
    pool, fake = make_pool([STEP()], [STEP()])
    pool.reset()
    with pytest.raises(ValueError, match=r"in \[0, 4\), got \["):
        pool.send(np.array(actions, np.int32))
    assert fake.sent == []
    pool.send(np.array([3, 0], np.int32))  # The refusal left the pool usable.
    pool.recv()


@pytest.mark.parametrize(
    "actions",
    [np.zeros(3, np.int32), np.zeros((2, 1), np.int32), np.zeros(2, np.float32)],
    ids=["count", "rank", "dtype"],
)
def test_actions_of_another_shape_or_dtype_are_refused(actions):
    pool, fake = make_pool([STEP()], [STEP()])
    pool.reset()
    with pytest.raises(AssertionError):
        pool.send(actions)
    assert fake.sent == []


def test_calls_out_of_order_are_refused():
    pool, fake = make_pool([STEP()])
    actions = np.zeros(1, np.int32)
    pool.reset()
    with pytest.raises(RuntimeError, match=r"recv\(\) needs a send\(\)"):
        pool.recv()
    pool.send(actions)
    with pytest.raises(RuntimeError, match=r"send\(\) must wait for recv\(\)"):
        pool.send(actions)
    with pytest.raises(RuntimeError, match=r"reset\(\) must wait for recv\(\)"):
        pool.reset()
    with pytest.raises(RuntimeError, match=r"render\(\) must wait for recv\(\)"):
        pool.render(0)
    assert len(fake.sent) == 1
    pool.recv()
    pool.send(actions)


def test_close_is_final_and_may_be_repeated():
    pool, fake = make_pool([STEP()])
    pool.close()
    pool.close()
    assert fake.is_closed
    with pytest.raises(RuntimeError, match=r"reset\(\) was called on a closed pool"):
        pool.reset()


def test_render_shows_the_environment_asked_for():
    tapes = [[STEP(game_over=True)], [STEP()]]
    pool, fake = make_pool(*tapes)
    play(pool, 2)
    fake.render = lambda env_ids: np.full((1, 210, 160, 3), env_ids, np.uint8)
    picture = pool.render(1)
    assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
    assert (picture == 1).all()
    for index in (-1, 2):
        with pytest.raises(ValueError, match=rf"\[0, 2\), got {index}"):
            pool.render(index)


@pytest.mark.parametrize("max_frames", [3, 10])
def test_part_of_an_agent_step_is_refused(max_frames):
    with pytest.raises(ValueError, match=f"multiple of 4.*got {max_frames}"):
        make_pool([STEP()], max_frames=max_frames)


@pytest.mark.parametrize("num_envs, num_seeds", [(0, 0), (2, 1), (2, 3)])
def test_environments_need_a_seed_each(num_envs, num_seeds):
    with pytest.raises(ValueError, match=f"num_envs={num_envs} and {num_seeds} seeds"):
        atari.AtariPool("Pong", num_envs, seeds=range(num_seeds), make=make_pool)


def test_seeds_are_fixed_for_ever():
    # SeedSequence's stream is promised not to change (NEP 19); ours must not either.
    words = np.random.SeedSequence(3, spawn_key=(1,)).generate_state(4, np.uint32)
    expected = [int(word) // 2 for word in words]
    assert atari.environment_seeds(3, 4, stream=1) == expected
    assert atari.environment_seeds(0, 2) == [1878776328, 1009188246]


def test_seeds_of_neighbouring_runs_and_processes_share_nothing():
    seeds = [
        seed
        for run in range(20)
        for stream in range(4)
        for seed in atari.environment_seeds(run, 64, stream=stream)
    ]
    assert len(set(seeds)) == 20 * 4 * 64
    assert min(seeds) >= 0 and max(seeds) < 2**31
    # They fill the range: the largest of 5,120 lies in its last hundredth.
    assert max(seeds) > 0.99 * 2**31


def test_games_are_read_from_the_folder_of_roms(tmp_path, monkeypatch):
    roms = tmp_path / "atari" / "roms"
    roms.mkdir(parents=True)
    for letter in "hbfdgaec":  # Enough for a folder not to be in order by accident.
        (roms / f"game_{letter}.bin").touch()
    for name in ("up_n_down.bin", "pong.bin", "tic_tac_toe_3d.bin", "notes.txt"):
        (roms / name).touch()
    monkeypatch.setenv("ENVPOOL_ASSETS_PATH", str(tmp_path))
    assert atari.games() == (
        *(f"Game{letter}" for letter in "ABCDEFGH"),
        "Pong",
        "TicTacToe3d",
        "UpNDown",
    )


def test_games_without_roms_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ENVPOOL_ASSETS_PATH", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="pip install envpool"):
        atari.games()


def test_games_without_envpool_are_an_error(monkeypatch):
    monkeypatch.delenv("ENVPOOL_ASSETS_PATH", raising=False)
    monkeypatch.setattr(atari.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install envpool"):
        atari.games()


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("Pnog", "Pong"),
        ("pong", "Pong"),
        ("QBERT", "Qbert"),
        ("ALE/Pong-v5", "Pong"),
        ("MsPacman-v4", "MsPacman"),
        ("montezuma_revenge", "MontezumaRevenge"),
        ("MontezumasRevenge", "MontezumaRevenge"),
        ("Brakout", "Breakout"),
        ("Upndown", "UpNDown"),
        ("", "Zaxxon"),
    ],
)
def test_unknown_game_is_refused_with_the_nearest_names(name, nearest):
    with pytest.raises(ValueError, match=rf"{name!r}; the nearest") as raised:
        atari.check_game(name)
    named = str(raised.value).removesuffix(".").split(" are ")[1].split(", ")
    assert named[0] == nearest
    assert len(set(named)) == 3 and set(named) < set(atari.games())


def test_known_games_pass():
    for game in atari.games():
        atari.check_game(game)


def test_unknown_game_is_refused_by_the_pool():
    with pytest.raises(ValueError, match="Unknown game 'Pnog'"):
        atari.AtariPool("Pnog", 1, seeds=[0])


def test_importing_envs_and_listing_games_does_not_import_envpool():
    code = (
        "import sys; from aps_jax.envs import atari; atari.games();"
        "assert 'Pong' in atari.games(); atari.environment_seeds(0, 2);"
        "print([m for m in sys.modules if m.split('.')[0] == 'envpool'])"
    )
    shown = run_python("-c", code)
    assert shown.strip() == "[]"


def summarise_episodes(reward, is_last, is_first):
    """Cuts one environment's time steps [T] into episodes, one at a time."""
    finished, current = [], []
    for r, last, first in zip(reward, is_last, is_first, strict=True):
        if first:
            current = []
        else:
            current.append(np.float64(r))
        if last:
            finished.append(list(current))
    return finished, current


@TRANSFORMS
@pytest.mark.parametrize("num_envs", [1, 5])
def test_episode_stats_match_a_list_of_episodes(transform, num_envs):
    rng = np.random.default_rng(seed=num_envs)
    tapes = [
        [
            STEP(reward=float(reward), game_over=bool(over))
            for reward, over in zip(
                rng.integers(-9, 10, 97), rng.random(97) < 0.1, strict=True
            )
        ]
        for _ in range(num_envs)
    ]
    pool, _ = make_pool(*tapes, max_frames=4 * 15)
    update = transform(atari.update_episode_stats)
    stats = atari.init_episode_stats(num_envs)
    seen = []
    for step_index in range(160):
        if step_index in (0, 70):  # The second reset falls into running episodes.
            step = pool.reset()
        else:
            pool.send(np.zeros(num_envs, np.int32))
            step = pool.recv()
        stats = update(stats, step)
        seen.append(step)
        if step_index not in (0, 1, 14, 15, 16, 69, 70, 71, 159):
            continue
        for i in range(num_envs):
            finished, current = summarise_episodes(
                [s.reward[i] for s in seen],
                [s.terminated[i] or s.truncated[i] for s in seen],
                [s.is_first[i] for s in seen],
            )
            last = finished[-1] if finished else None
            assert stats.num_episodes[i] == len(finished)
            assert stats.running_return[i] == sum(current)
            assert stats.running_length[i] == len(current)
            np.testing.assert_array_equal(
                stats.last_return[i], np.nan if last is None else sum(last)
            )
            np.testing.assert_array_equal(
                stats.last_length[i], np.nan if last is None else len(last)
            )
    assert min(stats.num_episodes) >= 8


def test_episode_stats_by_hand():
    # One environment: reset, +100, -3 (game over), reset, +7.
    # The first episode returned 100 - 3 = 97 in 2 agent steps; the second stands at 7.
    tape = [STEP(reward=100.0), STEP(reward=-3.0, game_over=True), STEP(reward=7.0)]
    steps = play(make_pool(tape)[0], 4)
    stats = atari.init_episode_stats(1)
    history = []
    for t in range(5):
        stats = atari.update_episode_stats(
            stats, types.TimeStep(*(value[t] for value in steps))
        )
        history.append([float(value[0]) for value in stats[:5]])
    nan = float("nan")
    np.testing.assert_array_equal(
        history,
        [
            # running_return, running_length, last_return, last_length, num_episodes
            [0, 0, nan, nan, 0],
            [100, 1, nan, nan, 0],
            [97, 2, 97, 2, 1],
            [0, 0, 97, 2, 1],
            [7, 1, 97, 2, 1],
        ],
    )


def test_episode_stats_have_the_declared_dtypes_before_and_after():
    pool, _ = make_pool([STEP()], [STEP()])
    before = atari.init_episode_stats(2)
    after = atari.update_episode_stats(before, pool.reset())
    for stats in (before, after):
        assert {name: str(x.dtype) for name, x in stats._asdict().items()} == {
            "running_return": "float32",
            "running_length": "int32",
            "last_return": "float32",
            "last_length": "float32",
            "num_episodes": "int32",
            "visited": "uint8",
        }
        assert all(x.shape == (2,) for x in stats[:5])


def test_episode_stats_refuse_another_number_of_environments():
    pool, _ = make_pool([STEP()], [STEP()])
    step = pool.reset()
    with pytest.raises(AssertionError):
        atari.update_episode_stats(atari.init_episode_stats(1), step)
    for name in ("terminated", "truncated"):
        odd = step._replace(**{name: np.zeros(1, np.bool_)})
        with pytest.raises(AssertionError):
            atari.update_episode_stats(atari.init_episode_stats(2), odd)


def test_chain_pool_has_the_interface_of_the_atari_pool():
    wanted = inspect.signature(atari.AtariPool).parameters
    offered = inspect.signature(fakes.ChainPool).parameters
    for name, parameter in wanted.items():
        assert offered[name].kind == parameter.kind, name
        assert offered[name].default == parameter.default, name
    for name in ("reset", "send", "recv", "render", "close"):
        assert list(inspect.signature(getattr(atari.AtariPool, name)).parameters) == (
            list(inspect.signature(getattr(fakes.ChainPool, name)).parameters)
        )
    chain = fakes.ChainPool("Chain", 3, seeds=range(3))
    game, _ = make_pool([STEP()], [STEP()], [STEP()])
    for attribute in ("game", "num_envs", "num_actions"):
        assert type(getattr(chain, attribute)) is type(getattr(game, attribute))
    for mine, theirs in zip(chain.reset(), game.reset(), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert chain.render(0).shape == (84, 84, 3)
    assert chain.render(0).dtype == np.uint8


def test_chain_best_play_by_hand():
    # Right four times reaches the far end at steps 4, 9 and 14 (step 5 and 10 lead
    # back to the start); the third arrival is game over; step 15 is the reset.
    steps = play(fakes.ChainPool("Chain", 1, seeds=[0]), 15, action=1)
    np.testing.assert_array_equal(np.flatnonzero(steps.reward[:, 0]), [4, 9, 14])
    np.testing.assert_array_equal(np.flatnonzero(steps.terminated[:, 0]), [14])
    np.testing.assert_array_equal(np.flatnonzero(steps.is_first[:, 0]), [0, 15])
    assert not steps.truncated.any()
    np.testing.assert_array_equal(
        steps.ram[:, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    )
    assert fakes.ChainPool("Chain", 1, seeds=[0]).optimal_return == 3.0


@pytest.mark.parametrize("action", [0, 2])
def test_chain_without_going_right_is_cut_after_twenty_steps(action):
    steps = play(fakes.ChainPool("Chain", 1, seeds=[0]), 21, action=action)
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 0]), [20])
    np.testing.assert_array_equal(np.flatnonzero(steps.is_first[:, 0]), [0, 21])
    assert not steps.terminated.any()
    assert not steps.reward.any()


def test_chain_left_goes_back_one_state():
    pool = fakes.ChainPool("Chain", 1, seeds=[0])
    pool.reset()
    states = []
    for action in (1, 1, 2, 0, 1, 1, 1, 0):
        pool.send(np.array([action], np.int32))
        states.append(int(pool.recv().ram[0, 0]))
    assert states == [1, 2, 1, 1, 2, 3, 4, 0]


def test_chain_limit_may_be_shorter():
    # Within 8 agent steps best play arrives once: at step 4; the next would be 9.
    pool = fakes.ChainPool("Chain", 1, seeds=[0], max_frames=32)
    steps = play(pool, 8, action=1)
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 0]), [8])
    assert pool.optimal_return == 1.0


def test_chain_game_over_on_the_limit_step_is_game_over():
    pool = fakes.ChainPool("Chain", 1, seeds=[0], max_frames=4 * 14)
    steps = play(pool, 14, action=1)
    assert steps.terminated[14, 0] and not steps.truncated.any()


def test_chain_states_look_different():
    steps = play(fakes.ChainPool("Chain", 1, seeds=[0]), 4, action=1)
    frames = steps.frame[:, 0].astype(np.int64)
    for i in range(5):
        assert frames[i].sum() == 255 * 16 * 84
        for j in range(i):
            assert (frames[i] != frames[j]).sum() == 2 * 16 * 84


def test_chain_random_return_is_that_of_random_play():
    num_envs = 512
    pool = fakes.ChainPool("Chain", num_envs, seeds=range(num_envs))
    rng = np.random.default_rng(seed=0)
    stats = atari.init_episode_stats(num_envs)
    update = jax.jit(atari.update_episode_stats)
    stats = update(stats, pool.reset())
    returns = []
    for _ in range(4 * 21):
        pool.send(rng.integers(0, 3, num_envs).astype(np.int32))
        step = pool.recv()
        stats = update(stats, step)
        returns.extend(np.asarray(stats.last_return)[step.terminated | step.truncated])
    assert len(returns) >= 4 * num_envs
    standard_error = np.std(returns) / np.sqrt(len(returns))
    assert abs(np.mean(returns) - pool.random_return) < 4 * standard_error
    assert standard_error < 0.02


def test_chain_repeats_itself_and_sticky_actions_come_from_the_seeds():
    def states(seeds, sticky):
        pool = fakes.ChainPool("Chain", 8, seeds=seeds, sticky=sticky)
        rng = np.random.default_rng(seed=1)
        pool.reset()
        visited = []
        for _ in range(60):
            pool.send(rng.integers(0, 3, 8).astype(np.int32))
            visited.append(pool.recv().ram[:, 0])
        return np.stack(visited)

    np.testing.assert_array_equal(states(range(8), 0.0), states(range(8, 16), 0.0))
    np.testing.assert_array_equal(states(range(8), 0.5), states(range(8), 0.5))
    assert (states(range(8), 0.5) != states(range(8, 16), 0.5)).any()


def test_chain_sticky_action_repeats_the_one_before():
    # Sent right for ever, each environment stays until its first action that is not
    # a repetition of the beginning; from there on, repeating makes no difference.
    steps = play(
        fakes.ChainPool("Chain", 16, seeds=range(16), sticky=0.5), 12, action=1
    )
    states = steps.ram[:, :, 0].astype(np.int64)
    starts = (states > 0).argmax(axis=0)
    assert starts.min() == 1 and starts.max() > 2
    for i, start in enumerate(starts):
        np.testing.assert_array_equal(
            states[start:, i], (np.arange(1, 14 - start) % 5)[: 13 - start]
        )


def test_chain_arrays_are_not_used_again():
    pool = fakes.ChainPool("Chain", 2, seeds=[0, 1])
    kept = [pool.reset()]
    copies = [[field.copy() for field in kept[0]]]
    for _ in range(30):
        pool.send(np.ones(2, np.int32))
        kept.append(pool.recv())
        copies.append([field.copy() for field in kept[-1]])
    for step, copy in zip(kept, copies, strict=True):
        for field, expected in zip(step, copy, strict=True):
            np.testing.assert_array_equal(field, expected)


def test_visited_states_are_counted_by_their_memory():
    """Exact for few, to 1 % for many; what differs in no byte is one state."""
    stats = atari.init_episode_stats(2)
    assert atari.num_visited(jax.device_get(stats)) == 0.0
    pool = fakes.ChainPool("Chain", 2, seeds=[0, 1])
    update = jax.jit(atari.update_episode_stats)
    stats = update(stats, pool.reset())  # Both at the start: one state.
    assert atari.num_visited(jax.device_get(stats)) == 1.0
    pool.send(np.array([1, 0], np.int32))  # One goes right.
    stats = update(stats, pool.recv())
    assert atari.num_visited(jax.device_get(stats)) == 2.0
    # 100,000 states, of two environments in turn.
    memory = np.arange(100_000, dtype=np.uint32).view(np.uint8).reshape(-1, 2, 4)
    step = pool.reset()

    def visit(stats, ram):
        return atari.update_episode_stats(stats, step._replace(ram=ram)), None

    stats, _ = jax.jit(lambda stats: jax.lax.scan(visit, stats, memory))(
        atari.init_episode_stats(2)
    )
    visited = atari.num_visited(jax.device_get(stats))
    np.testing.assert_allclose(visited, 100_000, rtol=0.01)
