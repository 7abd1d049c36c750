"""Tests of many seeds at once: each of them does what it does alone."""

import functools
import json
import pathlib

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.parallel import interrupts
from aps_jax.runs import checkpoints, machine, metrics
from aps_jax.train import loop, preflight, recorders, stages
from aps_jax.train import sums as sums_lib

pytestmark = pytest.mark.usefixtures("few_states")

SEEDS = (4, 5)

pretrain_runs = functools.partial(stages.pretrain_runs, constructor=fakes.PlanesPool)
finetune_runs = functools.partial(stages.finetune_runs, constructor=fakes.PlanesPool)


def make_config(**options):
    """The smoke preset on the chain, smaller still.

    A mapped product of matrices rounds differently. Features of two dimensions that
    move slowly keep updates from amplifying that, as in the tests of devices; with the
    usual rate an action can fall on the other side of a tie.
    """
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "feature_dim": 2,
        "num_particles": 32,
        "feature_learning_rate": 1e-6,
        "sticky": 0.25,  # So that the seeds play different games.
        "pretrain_frames": 4 * 240,
        "replay_size": 160,  # Goes around.
        "warmup_agent_steps": 60,
        "report_agent_steps": 80,
        "checkpoint_agent_steps": 120,
        "keep_checkpoints": 3,
        "finetune_agent_steps": 120,
        "infer_agent_steps": 60,
        "evaluations": 2,
        "eval_episodes": 2,
        **options,
    }
    return config_lib.replace_options(config_lib.preset_config("smoke"), **options)


class StopAt:
    """Asks to stop after a number of looks."""

    def __init__(self, looks):
        self._looks = looks

    def is_requested(self):
        self._looks -= 1
        return self._looks == 0

    def obey(self):
        raise interrupts.Interrupted("stopped as asked")

    def check(self):
        """Lets games be played whole."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few_states):
    """Two seeds at once, stopped and continued, and the second alone."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config()
    pretraining = recorders.make_runs(config, folder / "pretrain", SEEDS)
    tuning = recorders.make_runs(config, folder / "finetune", SEEDS)
    inits = list(pretraining.configs)
    with pytest.raises(interrupts.Interrupted) as caught:
        pretrain_runs(pretraining, stop=StopAt(35))
    assert str(caught.value) == (
        "stopped as asked; a checkpoint of agent step 140 was saved"
    )
    pretrained = pretrain_runs(pretraining)
    at_once = {"pretrain": pretrained, "finetune": finetune_runs(tuning, inits)}
    one = config_lib.replace_options(config, seed=SEEDS[1])
    own = [recorders.make_runs(one, folder / "alone" / stage) for stage in at_once]
    # Of the same agent, so that rounding in pretraining does not matter.
    alone = (pretrain_runs(own[0]), finetune_runs(own[1], inits[1:]))
    return folder, at_once, dict(zip(at_once, alone, strict=True))


@functools.cache
def newest(workdir, stage, seeds):
    """Returns number and facts of the newest checkpoint, and its arrays."""
    checkpointer = checkpoints.Checkpointer(workdir / "checkpoints")
    config = config_lib.from_dict(
        json.loads((workdir / "config.json").read_text())["config"]
    )
    is_pretraining = stage == "pretrain"
    make_plan = loop.pretrain_plan if is_pretraining else loop.finetune_plan
    agent = config.make_agent(3, fakes.PlanesPool.observation)
    plan = make_plan(config, agent)
    pool = loop.make_pool(
        config, plan.num_envs, plan.act_stream, fakes.PlanesPool, run_seeds=seeds
    )
    start = agent.start_finetune if stage == "finetune" else lambda state: state
    states = [start(loop.init_state(agent, seed)) for seed in seeds]
    state = loop.stack_seeds(states)
    session = loop.start(config, plan, pool, state, seeds=seeds)
    rollout = session.rollout
    templates = {
        "agent": session.state,
        "loop": (rollout.actor, rollout.episodes, session.sums),
        "replay": rollout.replay,
    }
    facts, parts, *_ = checkpointer.restore_newest(templates)
    numbers = checkpointer.steps()
    checkpointer.close()
    return numbers, facts, session.parts(jax.device_get(parts))


def assert_equal(left, right, **tolerance):
    left, right = jax.device_get((left, right))
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def assert_learned_equal(left, right):
    """Compares what an agent does to rounding; Adam's moments are not of unit size."""
    assert_equal(
        left._replace(opt_state=None),
        right._replace(opt_state=None),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_seed_among_many_is_the_seed_alone(runs, stage):
    folder, _, _ = runs
    is_free = stage == "pretrain"
    numbers, facts, parts = newest(folder / stage, stage, SEEDS)
    assert numbers[-1] == (240 if is_free else 120)
    alone = folder / "alone" / stage
    _, expected_facts, (expected,) = newest(alone, stage, SEEDS[1:])
    # What was played and stored is the same to the bit.
    assert_equal(parts[1]["replay"], expected["replay"])
    actor, episodes, sums = parts[1]["loop"]
    expected_actor, expected_episodes, expected_sums = expected["loop"]
    assert_equal((actor, episodes), (expected_actor, expected_episodes))
    assert int(sums.num_updates) == int(expected_sums.num_updates)
    # What was learned agrees to rounding.
    assert int(parts[1]["agent"].num_updates) == (11 if is_free else 3)
    assert int(expected["agent"].num_updates) == (11 if is_free else 3)
    assert_learned_equal(parts[1]["agent"], expected["agent"])
    assert facts["agent_steps"] == expected_facts["agent_steps"]
    assert facts["num_rows"][1:] == expected_facts["num_rows"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_each_seed_has_rows_and_result_of_its_own(runs, stage):
    folder, at_once, alone = runs
    (expected,) = alone[stage]
    result = at_once[stage][1]
    assert [r["seed"] for r in at_once[stage]] == list(SEEDS)
    assert result.keys() == expected.keys()
    among = folder / stage / "seed_5"
    assert json.loads((among / "result.json").read_text()) == result
    rows = metrics.read_metrics(among / "metrics.csv")
    expected_rows = metrics.read_metrics(folder / "alone" / stage / "metrics.csv")
    assert list(rows) == list(expected_rows)
    for name in ("agent_steps", "updates", "episodes", "episode_return"):
        np.testing.assert_array_equal(rows[name], expected_rows[name])
    for name in rows:
        np.testing.assert_allclose(
            rows[name], expected_rows[name], rtol=1e-2, atol=1e-4, err_msg=name
        )
    if stage == "finetune":
        for name in ("returns", "lengths", "updates", "init_agent_steps"):
            assert result[name] == expected[name]
        points = [[e["agent_steps"] for e in r["evaluations"]] for r in at_once[stage]]
        assert points == [[60, 120]] * 2
        for name in ("num_samples", "num_nonzero", "agent_steps"):
            assert result["adapted"][name] == expected["adapted"][name]


def test_visited_states_are_drawn_of_each_seed(runs):
    folder, _, _ = runs
    alone = folder / "alone" / "pretrain" / "features"
    among = folder / "pretrain" / "seed_5" / "features"
    paths = sorted(alone.iterdir())
    assert [p.name for p in paths] == [p.name for p in sorted(among.iterdir())]
    for path in paths:
        with np.load(among / path.name) as there, np.load(path) as here:
            assert set(there) == set(here) == {"phi", "task"}
            for name in here:  # Numbers of 16 bits.
                np.testing.assert_allclose(there[name], here[name], atol=2e-3)


def test_the_seeds_are_not_one(runs):
    folder, at_once, _ = runs
    losses = {result["last_metrics"]["loss_td"] for result in at_once["pretrain"]}
    assert len(losses) == len(SEEDS)
    _, _, parts = newest(folder / "pretrain", "pretrain", SEEDS)
    left, right = (part["replay"].experience.action for part in parts)
    assert np.any(left != right)


def test_a_finished_seed_has_its_agent_and_names_its_companions(runs):
    folder, _, _ = runs
    _, _, parts = newest(folder / "pretrain", "pretrain", SEEDS)
    for place, seed in enumerate(SEEDS):
        own = folder / "pretrain" / f"seed_{seed}"
        trained = stages.load_pretrained(own)
        assert (trained.config.seed, trained.step) == (seed, 240)
        assert_equal(trained.state, parts[place]["agent"])
        tuned = stages.load_finetuned(folder / "finetune" / f"seed_{seed}")
        assert len(tuned.facts["adapted"]) == 1
    with pytest.raises(ValueError, match=r"the seeds \[4, 5\] share: name the folder"):
        stages.load_pretrained(folder / "pretrain")
    alone = config_lib.replace_options(make_config(), seed=4)
    with pytest.raises(ValueError, match=r"seeds is \[4, 5\] there and None here"):
        pretrain_runs(recorders.make_runs(alone, folder / "pretrain" / "seed_4"))
    # Nothing is played any more.
    finished = recorders.make_runs(make_config(), folder / "pretrain", SEEDS)
    results = stages.pretrain_runs(finished, constructor=None)
    assert [result["seed"] for result in results] == list(SEEDS)


def test_a_reward_that_is_not_finite_names_its_seed(tmp_path):
    class Poisoned(fakes.PlanesPool):
        steps = 0

        def recv(self):
            self.steps += 1
            timestep = super().recv()
            if self.steps == 45:
                timestep.reward[4 + 2] = np.nan
            return timestep

    runs = recorders.make_runs(make_config(), tmp_path, SEEDS)
    with pytest.raises(loop.NonFinite) as caught:
        stages.pretrain_runs(runs, constructor=Poisoned)
    path = tmp_path / "nonfinite_180.npz"
    assert str(caught.value) == (
        "Seed 5: The game's reward of environment 2 is nan at agent step 180. The "
        f"batch is in {path}. The last good checkpoint is of agent step 120."
    )
    with np.load(path, allow_pickle=False) as batch:
        assert np.isnan(batch["reward"]).tolist() == [*[False] * 6, True, False]


def test_an_update_that_is_not_finite_names_its_seed():
    config = make_config()
    agent = config.make_agent(3, fakes.PlanesPool.observation)
    plan = loop.pretrain_plan(config, agent)
    pool = loop.make_pool(
        config, 4, loop.Stream.PRETRAIN_ACT, fakes.PlanesPool, run_seeds=SEEDS
    )
    state = loop.stack_seeds([loop.init_state(agent, seed) for seed in SEEDS])
    session = loop.start(config, plan, pool, state, seeds=SEEDS)
    assert (session.num_envs, pool.num_envs) == (4, 8)
    session.check_finite()
    # As the first update of a row leaves it, for the second seed alone.
    bad = session.sums.bad
    is_td = np.array([name == "loss_td" for name in bad.names])
    bad = bad._replace(
        update=np.int32([-1, 6]),
        names=sums_lib.Named(
            np.array([np.zeros(len(bad.names), bool), is_td]), bad.names.names
        ),
    )
    session.sums = session.sums._replace(bad=bad)
    words = "Seed 5: Not finite in update 6, noticed at agent step 0: loss_td."
    with pytest.raises(loop.NonFinite, match=words) as caught:
        session.check_finite()
    assert caught.value.batch["windows.action"].shape == (4, 5)


def test_a_step_is_mapped_with_the_key_of_each_seed():
    def step(key, x, y):
        return x + y * jax.random.uniform(key)

    keys = loop.stream_keys(SEEDS, loop.Stream.INIT)
    draw = loop.map_seeds(step, 2, in_axes=(0, 0, None))
    drawn = draw(keys, np.float32([0.0, 10.0]), np.float32(2.0))
    expected = [
        10.0 * i + 2.0 * jax.random.uniform(loop.stream_key(seed, loop.Stream.INIT))
        for i, seed in enumerate(SEEDS)
    ]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    key = loop.stream_keys(SEEDS[:1], loop.Stream.INIT)
    alone = loop.map_seeds(step, 1)(key, np.float32(0), np.float32(2))
    np.testing.assert_allclose(alone, expected[0])


@pytest.mark.parametrize(
    "seeds, options, message",
    [
        ((1, 1), {}, r"must differ, got \[1, 1\]"),
        ((1, 2), {"num_devices": 2}, "--num_devices, since they share one device"),
        ((1, 2), {"wandb": True}, "--wandb, since it takes one run"),
        ((1, 2), {"keep_best": True}, "--keep_best, since they share"),
    ],
)
def test_what_cannot_run_at_once_is_refused(seeds, options, message):
    with pytest.raises(ValueError, match=message):
        recorders.make_runs(make_config(**options), "nowhere", seeds)


def test_memory_counts_every_replay():
    """On a CPU: S replays, one taken out, and S copies that are being written."""
    config = make_config(replay_size=10**6)
    memory = stages.memory_of(config, is_pretraining=True)
    ring = memory["replay_bytes"]
    assert ring == 10**6 * 20  # Of a step without the agent's extras.
    one, four = (machine.needed_bytes(**memory, num_seeds=count) for count in (1, 4))
    assert four - one == (4 + 1 + 4 - 2) * ring
    large = recorders.make_runs(make_config(replay_size=2 * 10**9), "nowhere", SEEDS)
    with pytest.raises(
        ValueError, match="replays of 2 seeds need .*num_seeds or --rep"
    ):
        pretrain_runs(large)
    assert not pathlib.Path("nowhere").exists()


def test_preflight_counts_and_measures_all_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_play", lambda *_: 500.0)
    config = make_config(pretrain_frames=7_200_000, replay_size=10**6)
    checks = preflight.run_checks(
        recorders.make_runs(config, tmp_path, (1, 2, 3)),
        ["pretrain"],
        seconds=20.0,
        constructor=fakes.PlanesPool,
    )
    found = {check.name: check.found for check in checks}
    ring = 3 * 10**6 * 20 / 2**20
    assert f"{ring:.1f} MiB of it the replay" in found["memory, pretrain"]
    # Three times 7.2 million frames, at three times 500.
    assert found["rate, pretrain"] == (
        "1,500 frames/s over 20 s: 21,600,000 frames take 4.00 hours"
    )
