"""Tests of aps_jax.train.seeds: many at once do what each of them does alone."""

import functools
import json
import pathlib
import shutil

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.parallel import interrupts
from aps_jax.runs import checkpoints, machine, metrics
from aps_jax.train import loop, preflight, seeds, stages

SEEDS = (4, 5, 6)

pretrain_seeds = functools.partial(stages.pretrain_seeds, constructor=fakes.ChainPool)
pretrain = functools.partial(stages.pretrain, constructor=fakes.ChainPool)


def make_config(**options):
    """The smoke preset on the chain, smaller still.

    A mapped product of matrices rounds differently. Features of two dimensions that
    move slowly keep updates from amplifying that, as in the tests of devices; with the
    usual rate an action can fall on the other side of a tie.
    """
    options = {
        "game": "Chain",
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
        **options,
    }
    return config_lib.replace_options(config_lib.preset_config("smoke"), **options)


def configs_of(folder, some=SEEDS, **options):
    return {folder / f"seed_{seed}": make_config(seed=seed, **options) for seed in some}


@pytest.fixture(scope="module", autouse=True)
def few_states():
    """Measures and draws fewer states at a row: they are most of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_CALIBRATION_STATES", 64)
        patch.setattr(loop, "_EMBEDDED_STATES", 16)
        yield


class StopAt:
    """Asks to stop after a number of looks."""

    def __init__(self, looks):
        self._looks = looks

    def check(self):
        self._looks -= 1
        if self._looks == 0:
            raise interrupts.Interrupted("stopped as asked")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds at once, stopped after step 140 and continued, and each alone."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(interrupts.Interrupted) as caught:
        pretrain_seeds(configs_of(folder / "at_once"), stop=StopAt(35))
    assert str(caught.value) == (
        "stopped as asked; seed 4, 5, 6: a checkpoint of agent step 140 was saved"
    )
    results = pretrain_seeds(configs_of(folder / "at_once"))
    alone = configs_of(folder / "alone")
    singles = [pretrain(config, workdir) for workdir, config in alone.items()]
    return folder, results, singles


def newest(workdir):
    """Returns number and facts of the newest checkpoint, and its arrays."""
    checkpointer = checkpoints.Checkpointer(workdir / "checkpoints")
    config = config_lib.from_dict(
        json.loads((workdir / "config.json").read_text())["config"]
    )
    pool = loop.make_pool(config, 4, loop.Stream.PRETRAIN_ACT, fakes.ChainPool)
    agent = config.make_agent(pool.num_actions, atari.OBSERVATION)
    session = loop.start(
        config,
        loop.pretrain_plan(config, agent),
        pool,
        loop.init_state(agent, config.seed),
    )
    rollout = session.rollout
    templates = {
        "agent": session.state,
        "loop": (rollout.actor, rollout.episodes, session.sums),
        "replay": rollout.replay,
    }
    facts, parts, *_ = checkpointer.restore_newest(templates)
    numbers = checkpointer.steps()
    checkpointer.close()
    return numbers, facts, jax.device_get(parts)


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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_among_many_is_the_seed_alone(runs, seed):
    folder, _, _ = runs
    among, alone = (folder / name / f"seed_{seed}" for name in ("at_once", "alone"))
    numbers, facts, parts = newest(among)
    expected_numbers, expected_facts, expected = newest(alone)
    assert numbers == [120, 140, 240] and expected_numbers == [120, 240]
    # What was played and stored is the same to the bit, with the state of the games.
    assert facts["environment"] == expected_facts["environment"]
    assert_equal(parts["replay"], expected["replay"])
    actor, episodes, sums = parts["loop"]
    expected_actor, expected_episodes, expected_sums = expected["loop"]
    assert_equal((actor, episodes), (expected_actor, expected_episodes))
    assert int(sums.num_updates) == int(expected_sums.num_updates) == 0
    # What was learned agrees to rounding.
    assert int(parts["agent"].num_updates) == 11
    assert_learned_equal(parts["agent"], expected["agent"])
    for name in ("num_rows", "config", "versions", "agent_steps"):
        assert facts[name] == expected_facts[name]


@pytest.mark.parametrize("seed", SEEDS)
def test_its_folder_looks_like_any_other(runs, seed):
    folder, _, _ = runs
    among, alone = (folder / name / f"seed_{seed}" for name in ("at_once", "alone"))

    def names(workdir):
        paths = (path.relative_to(workdir).parts for path in workdir.rglob("*"))
        return {
            parts[:3]
            for parts in paths
            # Events are numbered by process, and 140 is where one run was stopped.
            if not (parts[0].startswith("events") or parts[1:2] == ("140",))
        }

    def read(workdir, name):
        values = json.loads((workdir / name).read_text())
        for changing in ("run_id", "command", "wall_seconds", "frames_per_second"):
            values.pop(changing, None)
        return values

    assert len(names(among)) > 20
    assert names(among) == names(alone)
    assert read(among, "config.json") == read(alone, "config.json")
    result, expected = read(among, "result.json"), read(alone, "result.json")
    last, expected_last = result.pop("last_metrics"), expected.pop("last_metrics")
    assert result == expected
    assert last.keys() == expected_last.keys()
    rows = metrics.read_metrics(among / "metrics.csv")
    expected_rows = metrics.read_metrics(alone / "metrics.csv")
    assert list(rows) == list(expected_rows) and len(rows["agent_steps"]) == 3
    for name in rows:
        first, expected_first = rows[name][0], expected_rows[name][0]
        np.testing.assert_allclose(first, expected_first, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows[name], expected_rows[name], rtol=1e-2)
    for path in sorted((alone / "features").iterdir()):
        with np.load(among / "features" / path.name) as there, np.load(path) as here:
            assert set(there) == set(here) == {"phi", "task"}
            for name in here:  # Numbers of 16 bits.
                np.testing.assert_allclose(there[name], here[name], atol=2e-3)


def test_the_seeds_are_not_one(runs):
    folder, results, singles = runs
    assert [result["seed"] for result in results] == list(SEEDS)
    for given in (results, singles):
        assert len({result["last_metrics"]["loss_td"] for result in given}) == 3
    replays = [newest(folder / "at_once" / f"seed_{s}")[2]["replay"] for s in SEEDS]
    assert np.any(replays[0].experience.action != replays[1].experience.action)


def unfinished(runs, tmp_path):
    """Copies the folders of three seeds at once, less what they ended with."""
    folder, _, _ = runs
    for seed in SEEDS:
        shutil.copytree(folder / "at_once" / f"seed_{seed}", tmp_path / f"seed_{seed}")
        (tmp_path / f"seed_{seed}" / "result.json").unlink()


def test_a_damaged_checkpoint_is_told_and_the_next_try_goes_back(
    runs, tmp_path, caplog
):
    unfinished(runs, tmp_path)
    (tmp_path / "seed_5" / "checkpoints" / "240" / "facts.json").write_text("{}")
    with pytest.raises(ValueError, match="agent steps 240, 140, 240.*tries again"):
        pretrain_seeds(configs_of(tmp_path))
    assert "seed 5: " in caplog.text and "cannot be read" in caplog.text
    with pytest.raises(interrupts.Interrupted):
        pretrain_seeds(configs_of(tmp_path), stop=StopAt(1))
    for seed in (4, 6):
        assert f"seed {seed}: goes back to agent step 140, where all" in caplog.text
    assert "that of 240 is deleted" in caplog.text
    for seed in SEEDS:
        numbers, _, _ = newest(tmp_path / f"seed_{seed}")
        assert numbers == [120, 140, 144]


def test_seeds_far_apart_are_not_taken_back(runs, tmp_path):
    unfinished(runs, tmp_path)
    shutil.rmtree(tmp_path / "seed_6" / "checkpoints")
    words = "seeds 4, 5, 6 are at agent steps 240, 240, 0, too far apart.*--seeds"
    with pytest.raises(ValueError, match=words):
        pretrain_seeds(configs_of(tmp_path))
    assert (tmp_path / "seed_4" / "checkpoints" / "240").exists()


def test_a_reward_that_is_not_finite_names_its_seed_and_the_others_are_saved(
    runs, tmp_path
):
    """Another goes on alone, and then that seed, at once with none but itself."""

    class Poisoned(fakes.ChainPool):
        steps = 0

        def recv(self):
            self.steps += 1
            timestep = super().recv()
            if self.steps == 45:
                timestep.reward[4 + 2] = np.nan
            return timestep

    with pytest.raises(loop.NonFinite) as caught:
        stages.pretrain_seeds(configs_of(tmp_path), constructor=Poisoned)
    path = tmp_path / "seed_5" / "nonfinite_180.npz"
    assert str(caught.value) == (
        "Seed 5: The game's reward of environment 2 is nan at agent step 180. The "
        f"batch is in {path}. The last good checkpoint is of agent step 120.; seed 4, "
        "6: a checkpoint of agent step 180 was saved"
    )
    with np.load(path, allow_pickle=False) as batch:
        assert np.isnan(batch["reward"]).tolist() == [False, False, True, False]
    assert stages.load_pretrained(tmp_path / "seed_6").facts["agent_steps"] == 180

    first, second, _ = configs_of(tmp_path).items()
    alone = pretrain(first[1], first[0])
    results = pretrain_seeds(dict([first, second]))
    assert results[0] == alone
    folder, _, _ = runs
    for seed in SEEDS[:2]:
        _, _, parts = newest(tmp_path / f"seed_{seed}")
        _, _, expected = newest(folder / "alone" / f"seed_{seed}")
        assert_equal(parts["replay"], expected["replay"])
        assert_learned_equal(parts["agent"], expected["agent"])
    # Both are finished: nothing is played any more.
    assert pretrain_seeds(dict([first, second])) == results


def test_an_update_that_is_not_finite_names_its_seed():
    config = make_config()
    pool = loop.make_pool(
        config, 4, loop.Stream.PRETRAIN_ACT, fakes.ChainPool, run_seeds=SEEDS
    )
    session, _ = seeds.start_pretraining(config, SEEDS, pool)
    first, second, third = session.of_seeds()
    session.check_finite()
    # As the first update of a row leaves it.
    sums, names = second.sums, second.sums.bad.names
    bad = sums.bad._replace(
        update=np.int32(6), names={name: np.bool_(name == "loss_td") for name in names}
    )
    second.sums = sums._replace(num_updates=np.int32(1), bad=bad)
    words = "Seed 5: Not finite in update 6, noticed at agent step 0: loss_td."
    with pytest.raises(loop.NonFinite, match=words) as caught:
        session.check_finite()
    assert caught.value.seed == 5
    assert caught.value.batch["windows.action"].shape == (4, 5)
    first.check_finite()
    third.check_finite()


def test_environments_are_dealt_out_by_hand():
    """Two seeds of two environments: rows 0 and 1 are the first's, 2 and 3 not."""
    everyone = fakes.ChainPool("Chain", 4, seeds=[0, 1, 2, 3])
    pool = seeds.SeedsPool(everyone, 2)
    assert (pool.num_seeds, pool.num_envs, pool.num_actions) == (2, 2, 3)
    assert pool.reset().frame.shape == (2, 2, 84, 84)
    # The last goes right, all others stay.
    pool.send(np.array([[0, 0], [0, 1]], np.int32))
    timestep = pool.recv()
    assert timestep.ram[:, :, 0].tolist() == [[0, 0], [0, 1]]
    second = pool.of_seed(1)
    state = second.get_state()
    assert state["_state"] == [0, 1] and len(state["rngs"]) == 2
    resumed = second.set_state({**state, "_state": [3, 2]})
    assert resumed.ram[:, 0].tolist() == [3, 2]
    assert everyone.get_state()["_state"] == [0, 0, 3, 2]


def test_a_step_is_mapped_with_the_key_of_each_seed():
    keys = seeds.stream_keys(SEEDS, loop.Stream.INIT)
    draw = seeds.over_seeds(
        lambda key: lambda x, y: x + y * jax.random.uniform(key),
        keys,
        in_axes=(0, None),
    )
    drawn = draw(np.float32([0.0, 10.0, 20.0]), np.float32(2.0))
    expected = [
        10.0 * i + 2.0 * jax.random.uniform(loop.stream_key(seed, loop.Stream.INIT))
        for i, seed in enumerate(SEEDS)
    ]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ([{"seed": 1}, {"seed": 1}], r"must differ, got \[1, 1\]"),
        ([{"seed": 1}, {"seed": 2, "discount": 0.5}], "differ in their seed alone"),
        ([{"seed": 1, "num_devices": 2}], "share one device, got num_devices=2"),
        ([{"seed": 1, "wandb": True}], "--nowandb"),
    ],
)
def test_what_cannot_run_at_once_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        seeds.check_configs([make_config(**values) for values in options])


def test_memory_counts_every_replay():
    """On a CPU: S replays, one taken out, and S copies that are being written."""
    config = make_config(replay_size=10**6)
    memory = stages.memory_of(config, is_pretraining=True)
    ring = memory["replay_bytes"]
    assert ring == 10**6 * 7071  # Of a step without the agent's extras.
    one, four = (machine.needed_bytes(**memory, num_seeds=count) for count in (1, 4))
    assert four - one == (4 + 1 + 4 - 2) * ring
    with pytest.raises(
        ValueError, match="replays of 3 seeds need .*num_seeds or --rep"
    ):
        pretrain_seeds(configs_of(pathlib.Path("nowhere"), replay_size=2 * 10**9))


def test_preflight_counts_and_measures_all_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_play", lambda *_: 500.0)
    checks = preflight.run_checks(
        make_config(pretrain_frames=7_200_000),
        tmp_path,
        ["pretrain"],
        seconds=20.0,
        constructor=fakes.ChainPool,
        num_seeds=3,
    )
    found = {check.name: check.found for check in checks}
    ring = 3 * 160 * 7071 / 2**20
    assert f"{ring:.1f} MiB of it the replay" in found["memory, pretrain"]
    # Three times 7.2 million frames, at three times 500.
    assert found["rate, pretrain"] == (
        "1,500 frames/s over 20 s: 21,600,000 frames take 4.00 hours"
    )
