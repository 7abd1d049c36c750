"""Tests of aps_jax.train.loop on the chain: what it stores, learns and moves."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.parallel import devices
from aps_jax.replay import buffer
from aps_jax.train import loop

NUM_ENVS = 3
IMAGES = {"game": "Chain", "encoder": "small"}


def make_config(**options):
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "hidden_units": 8,
        "feature_dim": 2,
        "num_neighbors": 2,
        "num_particles": 8,
        "n_steps": 3,
        "batch_size": 8,
        "window_targets": 2,
        "gpi_tasks": 0,
        "pretrain_epsilon": 0.5,
        **options,
    }
    return config_lib.replace_options(config_lib.Config(), **options)


@functools.cache
def make_parts(config):
    agent = config.make_agent(fakes.PlanesPool.num_actions, config.observation)
    plan = loop.pretrain_plan(config, agent)
    draw = loop.make_draw(plan.phase, reward_free=True)
    act = loop.jit_act(plan.phase.policy)
    learn = loop.jit_learn(plan.phase, reward_free=True)
    return agent, plan, act, learn, draw


KEY = jax.random.key(7)
SCHEDULE = loop.Schedule(start=60, samples_per_step=8 / 3, batch_size=8)


def make_session(config, *, learns=True):
    agent, plan, act, learn, draw = make_parts(config)
    state = loop.init_state(agent, 0)
    return loop.Session(
        pool=loop.make_pool(
            config,
            NUM_ENVS,
            loop.Stream.PRETRAIN_ACT,
            fakes.ChainPool if config.observation.is_image else fakes.PlanesPool,
        ),
        state=state,
        rollout=loop.init_rollout(
            plan.phase.policy, state, num_envs=NUM_ENVS, replay_size=NUM_ENVS * 40
        ),
        sums=devices.device_put(
            loop.init_sums(loop.names_of(plan.phase.learner.metrics))
        ),
        act=act,
        act_key=devices.device_put(KEY),
        learn_key=devices.device_put(KEY),
        learn=learn if learns else None,
        schedule=SCHEDULE,
        draw=draw,
        seeds=(0,),
    )


def test_schedule_replays_the_samples_asked_for():
    schedule = loop.Schedule(start=100, samples_per_step=3.2, batch_size=32)
    assert [schedule.num_due(steps) for steps in (0, 100, 109, 110, 1100)] == [
        0,
        0,
        0,
        1,
        100,
    ]


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_reports_are_due_once_per_interval(num_envs):
    steps = range(num_envs, 121, num_envs)
    due = [step for step in steps if loop.is_due(10, step, num_envs)]
    # The first step at or after each multiple of 10 that the steps reach.
    expected = [
        min(step for step in steps if step >= multiple)
        for multiple in range(10, 121, 10)
        if multiple <= steps[-1]
    ]
    assert due == expected


def test_streams_differ():
    keys = [
        tuple(jax.random.key_data(loop.stream_key(seed, stream)).tolist())
        for seed in (0, 1)
        for stream in loop.Stream
    ]
    assert len(set(keys)) == 2 * len(loop.Stream)


def test_stages_play_different_games():
    """Pools of two stages of a run, and of two runs, share no environment's seed."""
    seeds = []

    def constructor(game, num_envs, *, seeds: list[int], **options):
        del game, num_envs, options
        seen.append(tuple(seeds))

    seen = seeds
    for seed in (0, 1):
        config = make_config(seed=seed)
        for stream in (loop.Stream.PRETRAIN_ACT, loop.Stream.EVALUATE):
            loop.make_pool(config, 4, stream, constructor)
    assert len({seed for group in seen for seed in group}) == 16


def test_what_is_stored_is_what_was_played():
    session = make_session(make_config(), learns=False)
    told = []
    for _ in range(35):
        before = session.timestep
        session.step()
        told.append(before)
    stored = jax.device_get(session.rollout.replay.experience)
    assert session.agent_steps == 35 * NUM_ENVS
    for time, timestep in enumerate(told):
        if timestep is None:  # The reset that begins the run.
            assert np.all(stored.is_first[:, time])
            continue
        for name in ("frame", "reward", "terminated", "is_first"):
            told_field = getattr(timestep, name)
            np.testing.assert_array_equal(
                getattr(stored, name)[:, time].reshape(told_field.shape), told_field
            )
    # A chain episode lasts 20 steps at most, so each environment has been reset.
    assert np.all(np.sum(stored.is_first[:, :35], axis=1) >= 2)


def test_each_action_leads_where_the_next_frame_shows():
    """Replays what was stored in a chain of its own, action by action."""
    session = make_session(make_config(), learns=False)
    for _ in range(35):
        session.step()
    stored = jax.device_get(session.rollout.replay.experience)
    twin = fakes.PlanesPool(fakes.PLANES, NUM_ENVS, seeds=[0] * NUM_ENVS)
    timestep = twin.reset()
    for time in range(34):
        shown = stored.frame[:, time].reshape(timestep.frame.shape)
        np.testing.assert_array_equal(shown, timestep.frame)
        twin.send(stored.action[:, time])
        timestep = twin.recv()


def test_rollouts_hold_every_step_with_its_stack():
    """As an agent adapts to them: in order, from the first step on."""
    session = make_session(make_config(), learns=False)
    played = []
    for _ in range(30):
        session.step()
        played.append(np.asarray(session.rollout.actor.stack))
    rollouts = loop.play_rollouts(session)
    stored = jax.device_get(session.rollout.replay.experience)
    np.testing.assert_array_equal(rollouts.reward, stored.reward[:, :30].T.ravel())
    np.testing.assert_array_equal(rollouts.is_first, stored.is_first[:, :30].T.ravel())
    stacks = rollouts.encode(lambda state, w: w.observation[:, 0], session.state)
    np.testing.assert_array_equal(stacks, np.concatenate(played))


def test_a_reward_free_phase_is_traced_without_reward():
    _, plan, *_ = make_parts(make_config())
    agent, draw = make_parts(make_config())[0], make_parts(make_config())[-1]
    state = agent.init(jax.random.key(0))
    rollout = loop.init_rollout(
        plan.phase.policy, state, num_envs=NUM_ENVS, replay_size=NUM_ENVS * 40
    )
    batch = jax.eval_shape(draw, KEY, state, rollout.replay, np.int32(0))
    assert batch.windows.reward is None
    learner = plan.phase.learner._replace(
        update=lambda state, batch, key: base.Updated(
            state, {"loss": jnp.sum(batch.windows.reward)}
        )
    )
    learn = loop.make_learn(learner, draw)
    with pytest.raises(TypeError, match="NoneType"):
        jax.eval_shape(learn, KEY, state, loop.init_sums(["loss"]), rollout.replay)


def test_a_row_averages_the_updates_since_the_one_before():
    session = make_session(make_config())
    for _ in range(20):
        session.step()
    assert np.isnan(session.rows()[0]["loss_td"])
    singles = []
    for _ in range(4):
        session.step()
        (row,) = session.rows()
        singles.append(row["loss_td"])
        assert row["updates"] == len(singles)
    # The same four updates again, read at once.
    again = make_session(make_config())
    for _ in range(24):
        again.step()
    (row,) = again.rows()
    np.testing.assert_allclose(row["loss_td"], np.mean(singles), rtol=1e-5)
    assert row["agent_steps"] == 72
    assert row["frames"] == 288


def spoil(session):
    """Makes all parameters NaN."""
    session.state = session.state._replace(
        params=jax.tree.map(lambda x: x * np.nan, session.state.params)
    )


_OTHER = ("reward", "extras")  # hidden, and a dictionary


def test_a_loss_that_is_not_finite_is_named_with_its_update_and_batch():
    session = make_session(make_config())
    for _ in range(23):
        session.step()
    session.rows()
    session.step()  # Update 3 is as it should be.
    spoil(session)
    replay_then = jax.tree.map(np.array, session.rollout.replay)
    for number in range(3):
        session.step()
        if number == 0:  # What update 4 learned from.
            replay_then = jax.tree.map(np.array, session.rollout.replay)
    with pytest.raises(loop.NonFinite) as caught:
        session.rows()
    words = str(caught.value)
    assert "in update 4, noticed at agent step 81" in words
    # Spread over everything but the distances that do not exist.
    assert "loss_td" in words and "knn_distance" not in words
    assert "features/params/encoder/hidden/bias" in words
    draw = jax.jit(session.draw)
    windows, particles, *_ = draw(KEY, session.state, replay_then, np.int32(4))
    assert {name for name in caught.value.batch if name.startswith("windows.")} == {
        *(f"windows.{name}" for name in windows._fields if name not in _OTHER),
        "windows.extras.task",
    }
    np.testing.assert_array_equal(caught.value.batch["windows.id"], windows.id)
    np.testing.assert_array_equal(caught.value.batch["particles.id"], particles.id)
    np.testing.assert_array_equal(
        caught.value.batch["windows.observation"], windows.observation
    )


def test_a_loss_that_is_not_finite_is_noticed_soon_and_not_waited_for():
    session = make_session(make_config())
    for _ in range(25):
        session.step()
    spoil(session)
    with pytest.raises(loop.NonFinite, match="in update 5"):
        for _ in range(3 * loop._LOOK_EVERY):
            session.step()
    assert session.iteration < 25 + 2.5 * loop._LOOK_EVERY


def test_a_game_whose_reward_is_not_finite_is_named():
    session = make_session(make_config(), learns=False)
    session.step()
    session.pool.recv = lambda: session.timestep._replace(
        reward=np.float32([0.0, np.inf, 0.0])
    )
    with pytest.raises(loop.NonFinite, match="environment 1 is inf at agent step 6"):
        session.step()


@pytest.mark.parametrize("overlaps", [False, True])
def test_updates_are_enqueued_before_or_after_the_environments_stepped(overlaps):
    """Beside the emulators where they have a device of their own, else after them."""
    session = make_session(make_config())
    assert not session.overlaps  # These tests run on a CPU.
    session.overlaps = overlaps
    called = []

    def noting(name, function):
        def call(*arguments):
            called.append(name)
            return function(*arguments)

        return call

    session.pool.send = noting("send", session.pool.send)
    session.pool.recv = noting("recv", session.pool.recv)
    session.schedule = loop.Schedule(0, samples_per_step=1.0, batch_size=NUM_ENVS)
    session.learn = noting("learn", session.learn)
    session.step()
    assert called == ["send", *(["learn", "recv"] if overlaps else ["recv", "learn"])]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("place", ["reset", "send", "recv"])
def test_an_environment_that_raises_loses_no_step_and_no_update(place, overlaps):
    session = make_session(make_config())
    session.overlaps = overlaps
    for _ in range(0 if place == "reset" else 25):
        session.step()

    def broken(*arguments):
        raise KeyError("paddle")

    setattr(session.pool, place, broken)
    with pytest.raises(loop.EnvironmentFailure, match="raised KeyError: 'paddle'"):
        session.step()
    expected = 0 if place == "reset" else 26
    assert session.iteration == int(session.rollout.actor.num_steps) == expected
    assert int(session.state.num_updates) == SCHEDULE.num_due(session.agent_steps)


def test_after_a_checkpoint_without_replay_learning_waits():
    session = make_session(make_config())
    session.learn_from = 70
    for _ in range(24):
        session.step()
    # Of agent steps 61 to 72 those from 71 on: one update of the due four.
    assert int(session.state.num_updates) == 1


def test_the_loop_compiles_once_and_moves_nothing_unasked():
    """After warm-up: no tracing, and no transfer that the loop does not name."""
    session = make_session(make_config())
    for _ in range(25):
        session.step()
    session.rows()
    _, _, act, learn, _ = make_parts(make_config())
    sizes = act._cache_size(), learn._cache_size()
    with jax.transfer_guard("disallow"):
        for _ in range(300):
            session.step()
    assert (act._cache_size(), learn._cache_size()) == sizes
    session.rows()
    session.step()
    assert (act._cache_size(), learn._cache_size()) == sizes


def test_another_seed_finds_the_programs_of_the_first():
    """Keys are arguments; else each seed of a sweep would compile everything anew."""
    sessions = []
    for seed in (0, 1):
        config = make_config(seed=seed)
        agent = config.make_agent(fakes.PlanesPool.num_actions, config.observation)
        plan = loop.pretrain_plan(config, agent)
        pool = loop.make_pool(config, plan.num_envs, plan.act_stream, fakes.PlanesPool)
        session = loop.start(config, plan, pool, loop.init_state(agent, seed))
        while not int(session.state.num_updates):
            session.step()
        sessions.append(session)
    first, second = sessions
    assert first.act is second.act and first.learn is second.learn
    assert first.act._cache_size() == first.learn._cache_size() == 1
    actions = [np.asarray(x.rollout.replay.experience.action) for x in sessions]
    assert (actions[0] != actions[1]).any()


def learn_shapes(config):
    """The update of a config, and the shapes that it takes."""
    agent, plan, _, learn, _ = make_parts(config)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    names = loop.names_of(plan.phase.learner.metrics)
    sums = jax.eval_shape(lambda: loop.init_sums(names))
    extras = loop.replayed_extras(plan.phase.policy, state)
    replay = jax.eval_shape(
        functools.partial(
            buffer.init,
            config.observation,
            num_envs=NUM_ENVS,
            size=NUM_ENVS * 40,
        ),
        extras,
    )
    return learn, (KEY, state, sums, replay)


def test_memory_of_an_update_does_not_grow_with_the_particles():
    """As stacks of frames 65,536 particles are 1,850 MB."""
    few, many = 1024, 65_536
    taken = []
    for num_particles in (few, many):
        learn, shapes = learn_shapes(make_config(**IMAGES, num_particles=num_particles))
        analysis = learn.lower(*shapes).compile().memory_analysis()
        taken.append(analysis.temp_size_in_bytes)
    # What grows: 2 features, the id and the place (two numbers) of each.
    assert taken[1] - taken[0] <= (many - few) * 4 * (2 + 1 + 2) + 2**20


def test_particles_encoded_in_chunks_teach_the_same(monkeypatch):
    config = make_config(**IMAGES)
    session = make_session(config)
    for _ in range(12):
        session.step()
    # Copies, because the update destroys what it is given.
    given = jax.tree.map(jnp.copy, (session.state, session.sums))
    _, plan, _, learn, draw = make_parts(config)
    whole = learn(KEY, *given, session.rollout.replay)
    monkeypatch.setattr(buffer, "CHUNK_SIZE", 3)  # Of 8 particles: 3, 3 and 2.
    learn = jax.jit(loop.make_learn(plan.phase.learner, draw))
    chunked = learn(KEY, session.state, session.sums, session.rollout.replay)
    assert float(whole[1].totals["knn_distance"]) > 0.0
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.device_get(whole),
        jax.device_get(chunked),
    )


class Hidden:
    """A pool of a world that the loop takes for one of emulators."""

    def __init__(self, pool):
        for name in ("num_envs", "num_actions", "observation", "reset", "send", "recv"):
            setattr(self, name, getattr(pool, name))


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_a_world_in_one_program_does_what_the_host_loop_does(seeds):
    """Forty iterations of three environments, in calls of 7 and one by one."""
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"),
        game="maze/spiral",
        encoder="mlp",
        num_envs=NUM_ENVS,
        warmup_agent_steps=30,
        pretrain_epsilon=1.0,  # Else rounding may decide between two actions.
        samples_per_step=3.0,
    )

    def played(hide, most):
        pool = loop.make_pool(
            config, NUM_ENVS, loop.Stream.PRETRAIN_ACT, run_seeds=seeds
        )
        agent = config.make_agent(pool.num_actions, pool.observation)
        state = loop.stack_seeds([loop.init_state(agent, seed) for seed in seeds])
        session = loop.start(
            config,
            loop.pretrain_plan(config, agent),
            Hidden(pool) if hide else pool,
            state,
            seeds=seeds,
        )
        while session.iteration < 40:
            session.step(min(most, 40 - session.iteration))
        return session

    one_by_one, at_once = played(True, 1), played(False, 7)
    assert int(np.max(at_once.state.num_updates)) == (120 - 30) * 3 // 8

    def assert_alike(left, right):
        # Tasks are drawn and divided by their norm, which rounds as it is compiled.
        rtol = 1e-5 if jnp.issubdtype(left.dtype, jnp.floating) else 0.0
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol)

    for name in ("replay", "episodes"):
        one, other = (getattr(s.rollout, name) for s in (one_by_one, at_once))
        jax.tree.map(assert_alike, one, other)
    for left, right in zip(one_by_one.rows(), at_once.rows(), strict=True):
        np.testing.assert_allclose(list(left.values()), list(right.values()), rtol=1e-3)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        one_by_one.state.params,
        at_once.state.params,
    )
