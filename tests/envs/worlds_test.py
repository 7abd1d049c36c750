"""Tests of worlds against gymnax stepped by hand, and of their pools."""

import functools
import json

import chex
import fakes
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.envs import games, maze, worlds
from aps_jax.ops import hashing
from aps_jax.runs import metrics
from aps_jax.train import loop, stages

KEYS = jax.random.split(jax.random.key(3), 2)


def make_pool(name, num_envs=2):
    return games.make_pool(name, num_envs, seeds=list(range(5, 5 + num_envs)))


def random_actions(pool, num_steps, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_steps, pool.num_envs)
    return rng.integers(0, pool.num_actions, shape).astype(np.int32)


def play(pool, actions):
    """Returns the time steps, the reset's first, stacked on the leading axis."""
    steps = [pool.reset()]
    for action in actions:
        pool.send(action)
        steps.append(pool.recv())
    return jax.tree.map(lambda *x: np.stack(x), *steps)


def step_gymnax(environment, params, keys, actions):
    """Environments after gymnax's own functions, for actions [T, E]."""

    def step(key, state, inputs):
        (inner, is_done), (number, action) = state, inputs
        reset_key, step_key = jax.random.split(jax.random.fold_in(key, number))
        first = environment.reset_env(reset_key, params)
        seen, after, reward, over, _ = environment.step_env(
            step_key, inner, action, params
        )
        late = environment.is_truncated(after, params)
        result = {
            "frame": jnp.where(is_done, first[0], seen),
            "reward": jnp.where(is_done, 0.0, reward),
            "terminated": ~is_done & over,
            "truncated": ~is_done & late & ~over,
            "is_first": is_done,
        }
        inner = jax.tree.map(lambda x, y: jnp.where(is_done, x, y), first[1], after)
        return (inner, result["terminated"] | result["truncated"]), result

    def run(key, actions):
        # Any state will do before the first reset.
        inner = jax.tree.map(jnp.asarray, environment.reset_env(key, params)[1])
        inputs = jnp.arange(len(actions)), actions
        one_step = functools.partial(step, key)
        return jax.lax.scan(one_step, (inner, jnp.bool_(True)), inputs)[1]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        in_axes, out_axes = (0, 1), 1
        return jax.device_get(jax.jit(jax.vmap(run, in_axes, out_axes))(keys, actions))


@pytest.mark.parametrize("name", worlds.MINATAR)
def test_minatar_is_gymnax_stepped_by_hand(name):
    world = worlds.make(f"minatar/{name}")
    environment, params = gymnax.make(f"{name}-MinAtar")
    assert world.num_actions == environment.num_actions
    assert world.observation.frame_shape == environment.obs_shape
    rng = np.random.default_rng(0)
    actions = rng.integers(0, world.num_actions, (150, 2)).astype(np.int32)

    @jax.jit
    def run(actions):
        state, first = world.reset(KEYS)
        _, rest = jax.lax.scan(world.step, state, actions[1:])
        return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rest)

    found = jax.device_get(run(actions))
    expected = step_gymnax(environment, params, KEYS, actions)
    for field, values in expected.items():
        np.testing.assert_array_equal(getattr(found, field), values, err_msg=field)
    assert found.frame.dtype == np.uint8 and set(found.frame.ravel()) == {0, 1}
    if name != "Freeway":  # Whose episodes end by time alone.
        assert found.terminated.any() and found.is_first[1:].any()


POOLS = {
    "minatar": lambda: make_pool("minatar/Breakout"),
    "one-hot": lambda: make_pool("maze/locked"),
    "pixels": lambda: make_pool("maze/comb/pixels"),
    "chain": lambda: fakes.ChainPool("Chain", 2, seeds=[0, 1]),
}


@pytest.mark.parametrize("name", POOLS)
def test_every_pool_keeps_the_contract_of_time_steps(name):
    pool = POOLS[name]()
    num_steps = 350 if name == "one-hot" else 100
    steps = play(pool, random_actions(pool, num_steps))
    shape = (num_steps + 1, 2)
    assert steps.frame.shape == (*shape, *pool.observation.frame_shape)
    assert steps.frame.dtype == steps.ram.dtype == np.uint8
    assert steps.reward.dtype == np.float32 and steps.lives.dtype == np.int32
    for field in steps[1:-1]:
        assert field.shape == shape
    for flags in (steps.terminated, steps.truncated, steps.is_first):
        assert flags.dtype == bool
    is_last = steps.terminated | steps.truncated
    assert is_last.any() and steps.is_first[0].all()
    assert not (steps.terminated & steps.truncated).any()
    # A reset follows each last step and nothing else, and is no transition.
    np.testing.assert_array_equal(steps.is_first[1:], is_last[:-1])
    assert not (steps.is_first & is_last).any()
    assert not steps.reward[steps.is_first].any()


def test_an_episode_of_a_maze_is_cut_at_its_horizon_and_begins_anew():
    pool = make_pool("maze/spiral", 1)
    steps = play(pool, np.zeros((82, 1), np.int32))
    assert np.flatnonzero(steps.truncated).tolist() == [40, 81]
    assert np.flatnonzero(steps.is_first).tolist() == [0, 41, 82]
    assert not steps.terminated.any()


def test_the_optimal_player_of_a_maze_gets_the_optimal_return():
    name, horizon = "four_rooms", maze.HORIZONS["four_rooms"]
    tables = maze.parse_maze(maze.MAPS[name])
    values = maze.optimal_action_values(tables, horizon=horizon)
    pool = make_pool(f"maze/{name}", 1)
    place, total = int(pool.reset().ram[0, :4].view(np.int32)[0]), 0.0
    for left in reversed(range(horizon)):
        pool.send(np.int32([values[left, place].argmax()]))
        timestep = pool.recv()
        place = int(timestep.ram[0, :4].view(np.int32)[0])
        total += timestep.reward[0]
    assert timestep.truncated[0]
    assert total == maze.optimal_return(tables, horizon=horizon) == 25.0


def test_ram_tells_states_apart_and_knows_no_time():
    steps = play(make_pool("maze/open"), random_actions(make_pool("maze/open"), 80))
    cells = steps.frame.reshape(*steps.frame.shape[:2], -1).argmax(-1)
    pairs = {(int(c), bytes(r)) for c, r in zip(cells.flat, steps.ram.reshape(-1, 8))}
    assert len(pairs) == len(set(cells.flat)) == len({ram for _, ram in pairs}) > 10


def test_hashed_ram_differs_where_states_do():
    pool = make_pool("minatar/Freeway")
    steps = play(pool, random_actions(pool, 60))
    assert steps.ram.shape == (61, 2, 16)
    hashes = {ram.tobytes() for ram in steps.ram.reshape(-1, 16)}
    frames = {frame.tobytes() for frame in steps.frame.reshape(122, -1)}
    assert len(hashes) >= len(frames) > 50


def test_hashes_of_all_small_inputs_differ_in_every_lane():
    """A few bits in any places: a weak hash lets their changes cancel."""
    rng = np.random.default_rng(0)
    data = np.zeros((4000, 23), np.uint8)
    for row in data[1:]:
        row[rng.integers(0, 23, 2)] = 1 << rng.integers(0, 8, 2)
    data = np.unique(data, axis=0)
    hashes = np.asarray(jax.jit(jax.vmap(hashing.hash_bytes))(data))
    lanes = hashes.reshape(len(data), 4, 4)
    assert len(data) > 3000
    for lane in range(4):
        assert len(np.unique(lanes[:, lane], axis=0)) == len(data)
    # Half of the bits are set, whatever the input.
    assert abs(np.unpackbits(hashes).mean() - 0.5) < 0.01


def test_an_environment_does_the_same_alone_and_among_others():
    together = make_pool("minatar/Breakout", 3)
    actions = random_actions(together, 60)
    alone = games.make_pool("minatar/Breakout", 1, seeds=[6])
    steps, single = play(together, actions), play(alone, actions[:, 1:2])
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[:, 1:2], steps), single)
    assert not np.array_equal(steps.frame[:, 0], steps.frame[:, 1])
    chex.assert_trees_all_equal(steps, play(together, actions))  # Reset anew.


@pytest.mark.parametrize("name", ["minatar/SpaceInvaders", "maze/locked/pixels"])
def test_a_restored_pool_goes_on_as_the_saved_one(name):
    pool = make_pool(name)
    actions = random_actions(pool, 60)
    play(pool, actions[:40])
    saved = json.loads(json.dumps(pool.get_state()))
    assert [len(rows) for rows in saved.values()] == [2]
    pool.send(actions[39])
    pool.recv()
    at_save = play(pool, actions[:40])
    other = make_pool(name)
    chex.assert_trees_all_equal(
        other.set_state(saved), jax.tree.map(lambda x: x[-1], at_save)
    )
    for action in actions[40:]:
        pool.send(action)
        other.send(action)
        chex.assert_trees_all_equal(pool.recv(), other.recv())
    assert isinstance(pool, loop.ResumablePool)


@pytest.mark.parametrize(
    "name", ["minatar/Seaquest", "maze/locked", "maze/open/pixels"]
)
def test_pictures_are_of_the_environment_that_is_asked_for(name):
    pool = make_pool(name)
    play(pool, np.int32([[1, 2], [1, 2]]))
    pictures = [pool.render(index) for index in (0, 1)]
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.shape[-1] == 3
        assert picture.min() == 0 and picture.max() == 255
    assert not np.array_equal(*pictures)


def test_a_wrong_call_is_an_error_that_says_so():
    pool = make_pool("maze/open")
    with pytest.raises(RuntimeError, match="needs a reset"):
        pool.send(np.int32([0, 0]))
    pool.reset()
    with pytest.raises(RuntimeError, match="recv.. needs a send"):
        pool.recv()
    with pytest.raises(ValueError, match=r"in \[0, 4\), got \[0 4\]"):
        pool.send(np.int32([0, 4]))
    with pytest.raises(ValueError, match=r"in \[0, 2\), got 2"):
        pool.render(2)
    pool.send(np.int32([0, 3]))
    for call in (pool.reset, pool.get_state, lambda: pool.send(np.int32([0, 3]))):
        with pytest.raises(RuntimeError, match="must wait for recv"):
            call()


@pytest.mark.parametrize(
    "name, nearest", [("minatar/Pong", "minatar/"), ("maze/spirals", "maze/spiral")]
)
def test_an_unknown_world_is_named_with_the_known_ones(name, nearest):
    for refuse in (games.check, games.observation_of, make_pool):
        with pytest.raises(ValueError, match="Unknown world") as caught:
            refuse(name)
        words = str(caught.value)
        assert nearest in words and "SpaceInvaders" in words and "locked" in words
        assert "\n" not in words


def test_without_gymnax_minatar_is_refused_in_one_line_and_mazes_play(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(worlds.importlib, "import_module", missing)
    worlds.make.cache_clear()
    with pytest.raises(
        ValueError, match="gymnax is not installed: `pip install gymnax"
    ):
        make_pool("minatar/Breakout")
    assert games.observation_of("minatar/Breakout").frame_shape == (10, 10, 4)
    assert make_pool("maze/open").reset().is_first.all()


def test_only_names_with_a_slash_are_worlds():
    assert games.observation_of("Pong") == types.ObservationSpec((84, 84), 4, 4)
    assert not games.is_world("Pong") and games.is_world("maze/open")
    pixels = games.observation_of("maze/open/pixels")
    assert pixels.is_image and pixels.shape == (84, 84, 1)
    planes = games.observation_of("maze/locked")
    assert not planes.is_image and planes.shape == (20, 20, 2)


OPTIONS = {
    "game": "maze/four_rooms",
    "hidden_units": 8,
    "feature_dim": 3,
    "num_particles": 16,
    "num_neighbors": 3,
    "gpi_tasks": 2,
    "pretrain_frames": 400,
    "num_envs": 4,
    "replay_size": 400,
    "warmup_agent_steps": 100,
    "samples_per_step": 8.0,
    "infer_agent_steps": 100,
    "finetune_agent_steps": 300,
    "finetune_num_envs": 4,
    "eval_episodes": 2,
    "report_agent_steps": 100,
    "checkpoint_agent_steps": 200,
}


class Stopped(BaseException):
    """Ends a process in the midst of a run."""


def test_both_stages_run_on_a_world_and_a_run_that_broke_off_is_the_same(tmp_path):
    config = config_lib.replace_options(config_lib.preset_config("maze"), **OPTIONS)
    result = stages.pretrain(config, tmp_path / "whole")
    assert result["pretrain_frames"] == 400  # A frame is an agent step.
    rows = metrics.read_metrics(tmp_path / "whole" / "metrics.csv")
    assert rows["frames"] == rows["agent_steps"] == [100, 200, 300, 400]

    def breaking(*args, **options):
        pool = games.make_pool(*args, **options)
        lend, count = pool.lend, 0

        def breaking_lend():
            nonlocal count
            count += 1
            if count == 3:
                raise Stopped
            return lend()

        pool.lend = breaking_lend
        return pool

    with pytest.raises(Stopped):
        stages.pretrain(config, tmp_path / "broken", constructor=breaking)
    stages.pretrain(config, tmp_path / "broken")
    one, other = (
        stages.load_pretrained(tmp_path / name).state for name in ("whole", "broken")
    )
    chex.assert_trees_all_equal(one.params, other.params)

    result = stages.finetune(config, tmp_path / "tuned", tmp_path / "whole")
    assert result["protocol"] == {"episodes": 2, "epsilon": 0.001, "world": True}
    assert result["human_normalized_score"] is None
    assert result["lengths"] == [40, 40]
    assert result["pretrain_frames"] == 400
    trained = stages.load_finetuned(tmp_path / "tuned")
    assert trained.agent.play(0.0).observation == config.observation
