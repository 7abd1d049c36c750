"""Tests of aps_jax.train.stages on the chain: transfer, resumption, refusals."""

import concurrent.futures
import csv
import errno
import functools
import json
import math
import shutil

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.agents import AGENTS, aps, base
from aps_jax.envs import atari
from aps_jax.runs import checkpoints, metrics
from aps_jax.train import evaluation, loop, recorders, stages

pytestmark = pytest.mark.usefixtures("few_states")

pretrain = functools.partial(stages.pretrain, constructor=fakes.PlanesPool)
finetune = functools.partial(stages.finetune, constructor=fakes.PlanesPool)


def make_config(**options):
    """The smoke preset on the chain, smaller still."""
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "pretrain_frames": 4 * 240,
        "replay_size": 240,
        "warmup_agent_steps": 60,
        "report_agent_steps": 80,
        "checkpoint_agent_steps": 120,
        "finetune_agent_steps": 120,
        "infer_agent_steps": 60,
        "pretrain_epsilon": 0.5,  # Else it stays where it starts, all states alike.
        **options,
    }
    base = config_lib.preset_config("smoke", options.pop("agent", "aps"))
    return config_lib.replace_options(base, **options)


def assert_same(left, right):
    left, right = jax.device_get((left, right))
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_states):
    """A pretraining and a fine-tuning of it, each once for all tests."""
    folder = tmp_path_factory.mktemp("run")
    pretrained = pretrain(make_config(), folder / "pretrain")
    finetuned = finetune(make_config(), folder / "finetune", folder / "pretrain")
    return folder, pretrained, finetuned


def test_pretraining_ends_with_features_white_over_its_replay(run):
    """Measured at once over many states: a weight of 1, not that of the updates."""
    folder, _, _ = run
    stats = stages.load_pretrained(folder / "pretrain").state.stats
    assert float(stats.calibrated.weight) == 1.0


def test_result_files_keep_their_contract(run):
    folder, pretrained, finetuned = run
    assert pretrained == json.loads((folder / "pretrain/result.json").read_text())
    assert finetuned == json.loads((folder / "finetune/result.json").read_text())
    assert finetuned["schema"] == 1
    assert finetuned["stage"] == "finetune"
    expected = {
        "game": fakes.PLANES,
        "agent": "aps",
        "seed": 0,
        "preset": "smoke",
        "pretrain_frames": 960,
        "finetune_agent_steps": 120,
        "init": str(folder / "pretrain"),
        "human_normalized_score": None,  # The chain is in no table.
        "protocol": {
            "episodes": 2,
            "epsilon": 0.001,
            "noop_max": 30,
            "sticky": 0.0,
            "max_frames": 400,
        },
        "device": "cpu",
    }
    assert {name: finetuned[name] for name in expected} == expected
    assert len(finetuned["returns"]) == 2
    assert finetuned["return_mean"] == np.mean(finetuned["returns"])
    assert finetuned["wall_seconds"] > 0 and finetuned["frames_per_second"] > 0
    assert [e["agent_steps"] for e in finetuned["evaluations"]] == [60, 120]
    # Sixty steps of each of 4 environments, less the reset frames.
    assert 50 <= finetuned["adapted"]["num_samples"] < 60


def test_metrics_rows_stand_where_they_are_due(run):
    folder, _, _ = run
    columns = metrics.read_metrics(folder / "pretrain" / "metrics.csv")
    assert tuple(columns) == metrics.pretrain_columns(base.LEARNING + aps.METRICS)
    assert columns["agent_steps"] == [80.0, 160.0, 240.0]
    assert columns["frames"] == [320.0, 640.0, 960.0]
    # (240 - 60) steps, half a sample each, 8 samples an update.
    assert columns["updates"] == [1.0, 6.0, 11.0]
    assert all(math.isfinite(value) for value in columns["loss_td"])
    assert columns["episodes"][-1] >= 4 and math.isfinite(columns["episode_return"][-1])
    columns = metrics.read_metrics(folder / "finetune" / "metrics.csv")
    assert tuple(columns) == metrics.finetune_columns(base.LEARNING)
    assert columns["agent_steps"] == [60.0, 80.0, 120.0]
    evaluated = [not math.isnan(value) for value in columns["eval_return_mean"]]
    assert evaluated == [True, False, True]


@pytest.fixture(scope="module")
def frozen(run):
    """A fine-tuning that learns nothing, evaluated at set steps."""
    folder, _, _ = run
    config = make_config(
        finetune_learning_rate=0.0, target_period=10_000, eval_agent_steps="8, 90,100"
    )
    return finetune(config, folder / "frozen", folder / "pretrain")


def test_finetuning_takes_over_all_that_was_learned(run, frozen):
    """Features and their scale stay bit for bit; psi and its target begin there."""
    folder, _, _ = run
    before = stages.load_pretrained(folder / "pretrain")
    after = stages.load_finetuned(folder / "finetune")
    assert_same(before.state.params["features"], after.state.params["features"])
    before_stats, after_stats = before.state.stats, after.state.stats
    assert_same(before_stats.distance_scale, after_stats.distance_scale)
    assert_same(before_stats.calibrated, after_stats.calibrated)
    assert float(before_stats.distance_scale.mean) > 0.0
    untaught = stages.load_finetuned(folder / "frozen")
    assert int(untaught.state.num_updates) == frozen["updates"] > 0
    assert_same(before.state.params, untaught.state.params)
    assert_same(before.state.target_params, untaught.state.target_params)


def test_the_checkpoint_holds_the_agent_that_was_trained(run):
    folder, pretrained, _ = run
    trained = stages.load_pretrained(folder / "pretrain")
    assert int(trained.state.num_updates) == pretrained["updates"] == 11
    assert trained.config == make_config()
    untrained = loop.init_state(trained.agent, seed=0)
    kernel = jax.tree.leaves(trained.state.params["successor"])[1]
    assert np.any(kernel != jax.tree.leaves(untrained.params["successor"])[1])


def test_the_inferred_task_is_the_one_that_is_evaluated(run):
    folder, _, finetuned = run
    trained = stages.load_finetuned(folder / "finetune")
    task = np.asarray(trained.state.stats.task)
    np.testing.assert_array_equal(task, np.float32(finetuned["adapted"]["task"]))
    np.testing.assert_allclose(np.linalg.norm(task), 1.0, rtol=1e-6)
    played = evaluation.evaluate(
        trained.config,
        evaluation.make_player(trained.config, trained.agent),
        trained.state,
        constructor=fakes.PlanesPool,
    )
    np.testing.assert_array_equal(played.returns, finetuned["returns"])


def test_scratch_learns_from_reward_for_all_of_the_budget(run, tmp_path):
    _, _, finetuned = run
    scratch = finetune(make_config(), tmp_path / "scratch", None)
    assert scratch["init"] is None and scratch["pretrain_frames"] == 0
    for name in ("finetune_agent_steps", "protocol"):
        assert scratch[name] == finetuned[name]
    # From the first window on (5 states of 4 environments), and no inference before.
    assert scratch["updates"] == (120 - 20) // 16 and finetuned["updates"] == 3
    assert [e["agent_steps"] for e in scratch["evaluations"]] == [0, 120]


def test_a_finished_run_is_not_run_again(run):
    folder, pretrained, finetuned = run
    config = make_config()
    assert pretrain(config, folder / "pretrain") == pretrained
    again = finetune(config, folder / "finetune", folder / "pretrain")
    assert again == finetuned


class Stop(BaseException):
    """Stands for whatever ends a process."""


def interrupted(num_steps):
    """A chain whose process dies after some steps of all environments."""

    class Interrupted(fakes.PlanesPool):
        steps = 0

        def send(self, actions):
            if self.steps == num_steps:
                raise Stop
            self.steps += 1
            super().send(actions)

    return Interrupted


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, few_states):
    """A pretraining that died: checkpoints of steps 72 and 144, a row of 160."""
    workdir = tmp_path_factory.mktemp("broken") / "p"
    with pytest.raises(Stop):
        stages.pretrain(BROKEN_OFF, workdir, constructor=interrupted(42))
    return workdir


BROKEN_OFF = make_config(checkpoint_agent_steps=72, keep_checkpoints=9)


def test_an_interrupted_pretraining_goes_on_from_its_checkpoint(
    run, broken_off, tmp_path
):
    folder, pretrained, _ = run
    workdir = shutil.copytree(broken_off, tmp_path / "p")
    assert [row[0] for row in read_rows(workdir / "metrics.csv")[1:]] == ["80", "160"]
    resumed = pretrain(BROKEN_OFF, workdir)
    assert resumed["updates"] == pretrained["updates"]
    rows = read_rows(workdir / "metrics.csv")
    whole = read_rows(folder / "pretrain" / "metrics.csv")
    # The chain's state is in the checkpoint, so that it is the same run.
    assert rows == whole


def test_a_game_that_raises_is_saved_first(run, tmp_path):
    folder, pretrained, _ = run

    class Broken(fakes.PlanesPool):
        steps = 0

        def recv(self):
            self.steps += 1
            if self.steps == 50:
                raise OSError("the emulator is gone")
            return super().recv()

    words = "raised OSError: the emulator is gone; a checkpoint of agent step 200 was"
    with pytest.raises(loop.EnvironmentFailure, match=words):
        stages.pretrain(make_config(), tmp_path / "p", constructor=Broken)
    assert stages.load_pretrained(tmp_path / "p").facts["agent_steps"] == 200
    resumed = pretrain(make_config(), tmp_path / "p")
    # The games are new ones, the updates and the rows are those that were due.
    assert resumed["updates"] == pretrained["updates"]
    rows = read_rows(tmp_path / "p" / "metrics.csv")
    whole = read_rows(folder / "pretrain" / "metrics.csv")
    assert [row[0] for row in rows] == [row[0] for row in whole]


def test_a_reward_that_is_not_finite_leaves_its_batch_and_the_last_good(tmp_path):
    class Poisoned(fakes.PlanesPool):
        steps = 0

        def recv(self):
            self.steps += 1
            timestep = super().recv()
            if self.steps == 45:
                timestep.reward[2] = np.nan
            return timestep

    with pytest.raises(loop.NonFinite) as caught:
        stages.pretrain(make_config(), tmp_path / "p", constructor=Poisoned)
    path = tmp_path / "p" / "nonfinite_180.npz"
    assert str(caught.value) == (
        "The game's reward of environment 2 is nan at agent step 180. The batch is in "
        f"{path}. The last good checkpoint is of agent step 120."
    )
    with np.load(path, allow_pickle=False) as batch:
        assert np.isnan(batch["reward"]).tolist() == [False, False, True, False]
    assert stages.load_pretrained(tmp_path / "p").facts["agent_steps"] == 120


def test_an_update_that_is_not_finite_leaves_its_batch_and_the_last_good(
    tmp_path, monkeypatch
):
    """The loss of one update is spoilt on the device, as by an overflow."""
    entry = AGENTS["aps"]

    def spoilt(config, num_actions, observation):
        agent = entry.make(config, num_actions, observation)
        learner = agent.pretrain.learner

        def update(state, batch, key):
            is_bad = state.num_updates == 7
            updated = learner.update(state, batch, key)
            loss = jax.numpy.where(is_bad, np.inf, updated.metrics["loss_td"])
            return updated._replace(metrics={**updated.metrics, "loss_td": loss})

        spoilt_learner = learner._replace(update=update)
        return agent._replace(pretrain=agent.pretrain._replace(learner=spoilt_learner))

    monkeypatch.setitem(AGENTS, "aps", entry._replace(make=spoilt))
    config = make_config(report_agent_steps=240, checkpoint_agent_steps=80)
    with pytest.raises(loop.NonFinite) as caught:
        pretrain(config, tmp_path / "p")
    # Update 7 is made at agent step 60 + 8 * 8 / 0.5 = 188; the next look is the save.
    words = str(caught.value)
    assert "Not finite in update 7, noticed at agent step 240: loss_td." in words
    assert "The last good checkpoint is of agent step 160." in words
    with np.load(tmp_path / "p" / "nonfinite_240.npz", allow_pickle=False) as batch:
        # Windows of what had been played by then; ids count the steps.
        assert batch["windows.id"].max() < 192
        assert batch["windows.observation"].shape == (4, 5, 1, 5, 1)
        assert batch["particles.id"].shape == (8,)


def test_without_the_replay_learning_waits_for_a_refill(tmp_path, caplog):
    config = make_config(checkpoint_replay=False)
    with pytest.raises(Stop):
        stages.pretrain(config, tmp_path / "p", constructor=interrupted(40))
    saved = tmp_path / "p" / "checkpoints" / "120"
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["agent", "loop"]
    # What is kept may change when a run is resumed.
    resumed = pretrain(
        make_config(
            checkpoint_replay=False, checkpoint_agent_steps=40, keep_checkpoints=7
        ),
        tmp_path / "p",
    )
    kept = sorted(int(p.name) for p in saved.parent.iterdir())
    assert kept == [120, 160, 200, 240]
    # A quarter of the 120 agent steps that are left is less than the 60 of the warm-up.
    assert "learning goes on after 30 agent steps, at 150" in caplog.text
    # (120 - 60) / 16 = 3 updates before, (240 - 60) / 16 - (150 - 60) / 16 = 6 after.
    assert resumed["updates"] == 9


def wait_for_saves(monkeypatch):
    """Makes every save end before the next step, so that a test knows when it was."""
    begin = checkpoints.Checkpointer.save

    def save(self, *args):
        begin(self, *args)
        concurrent.futures.wait([self._saving])

    monkeypatch.setattr(checkpoints.Checkpointer, "save", save)


def test_a_disk_that_fails_ends_no_run(run, tmp_path, monkeypatch, caplog):
    """The first checkpoint and the first two tries of the last cannot be written."""
    folder, pretrained, _ = run
    to_disk, tries = checkpoints._to_disk, []

    def full(path):
        step = path.name.removesuffix(".orbax-checkpoint-tmp")
        if step != path.name:
            tries.append(step)
            if step == "120" or 1 <= tries.count("240") <= 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        to_disk(path)

    monkeypatch.setattr(checkpoints, "_to_disk", full)
    monkeypatch.setattr(recorders, "_RETRY_SECONDS", 0.0)
    wait_for_saves(monkeypatch)
    result = pretrain(make_config(), tmp_path / "p")
    assert tries[0] == "120" and tries.count("240") == 3
    assert result["updates"] == pretrained["updates"]
    assert "No space left on device" in caplog.text
    assert "the last good checkpoint does not exist" in caplog.text
    assert "trying again every" in caplog.text
    assert read_rows(tmp_path / "p" / "metrics.csv") == read_rows(
        folder / "pretrain" / "metrics.csv"
    )
    assert stages.load_pretrained(tmp_path / "p").facts["agent_steps"] == 240


def test_a_folder_deleted_meanwhile_is_made_anew(run, tmp_path, monkeypatch, caplog):
    folder, pretrained, _ = run
    wait_for_saves(monkeypatch)
    workdir = tmp_path / "p"

    class Deleting(fakes.PlanesPool):
        steps = 0

        def send(self, actions):
            self.steps += 1
            if self.steps == 35:
                shutil.rmtree(workdir)
            super().send(actions)

    result = stages.pretrain(make_config(), workdir, constructor=Deleting)
    # The same seed gives the same files, to the bit.
    assert result["updates"] == pretrained["updates"]
    assert f"{workdir} was deleted, and has been made anew" in caplog.text
    assert (workdir / "metrics.csv").read_bytes() == (
        folder / "pretrain" / "metrics.csv"
    ).read_bytes()
    assert_same(
        stages.load_pretrained(workdir).state,
        stages.load_pretrained(folder / "pretrain").state,
    )


def test_a_checkpoint_says_where_it_comes_from(run):
    folder, _, _ = run
    facts = stages.load_pretrained(folder / "pretrain").facts
    assert facts["format"] == checkpoints.FORMAT
    assert config_lib.from_dict(facts["config"]) == make_config()
    assert facts["versions"]["jax"] == jax.__version__
    assert "git_commit" in facts


def test_an_interrupted_finetuning_keeps_its_task(run, tmp_path):
    folder, _, _ = run
    config = make_config(checkpoint_agent_steps=20)
    with pytest.raises(Stop):
        stages.finetune(
            config,
            tmp_path / "f",
            folder / "pretrain",
            constructor=interrupted(27),
        )
    (before,) = stages.load_finetuned(tmp_path / "f").facts["adapted"]
    resumed = finetune(config, tmp_path / "f", folder / "pretrain")
    del before["summary"]  # A sentence for those who watch.
    assert resumed["adapted"] == before
    assert [e["agent_steps"] for e in resumed["evaluations"]] == [60, 120]
    assert resumed["updates"] == 3  # (120 - 60) / 2 samples, 8 an update, rounded down.


def test_an_unfinished_or_damaged_init_is_warned_of_and_named(broken_off, tmp_path):
    workdir = shutil.copytree(broken_off, tmp_path / "p")
    newest = workdir / "checkpoints" / "144" / "agent"
    warnings = []
    trained = stages.load_pretrained(workdir, warn=warnings.append)
    assert trained.step == 144
    (text,) = warnings  # 576 of 960 frames.
    assert "144" in text and "240" in text and str(workdir) in text
    damaged = max(newest.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    warnings.clear()
    assert stages.load_pretrained(str(workdir), warn=warnings.append).step == 72
    assert any("144" in text and "72" in text for text in warnings)
    result = finetune(make_config(), tmp_path / "f", workdir)
    assert result["init_agent_steps"] == 72 and result["pretrain_frames"] == 288


def test_the_best_is_not_kept_where_it_would_be_chosen_by_a_hidden_reward(tmp_path):
    with pytest.raises(ValueError, match="keep_best"):
        pretrain(make_config(keep_best=True), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_an_agent_that_does_not_fit_is_refused_with_both_sides(run, tmp_path):
    folder, _, _ = run
    for options, words in (
        (
            {"game": "Pong", "encoder": "small"},
            f"game is '{fakes.PLANES}' there and 'Pong' here",
        ),
        ({"feature_dim": 3}, "feature_dim is 5 there and 3 here"),
        ({"encoder": "minatar"}, "encoder is 'mlp' there and 'minatar' here"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(make_config(**options), tmp_path / "f", folder / "pretrain")
    assert not (tmp_path / "f").exists()


def test_a_folder_of_another_run_is_refused_untouched(run, tmp_path):
    folder, _, _ = run
    before = sorted((folder / "pretrain").rglob("*"))
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        pretrain(make_config(seed=1), folder / "pretrain")
    with pytest.raises(ValueError, match="stage is 'pretrain' there"):
        finetune(make_config(), folder / "pretrain", None)
    assert sorted((folder / "pretrain").rglob("*")) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no config.json"):
        pretrain(make_config(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_checkpoint_says_what_is_there(run, tmp_path):
    folder, _, _ = run
    with pytest.raises(ValueError, match="does not exist"):
        stages.load_pretrained(tmp_path / "nowhere")
    (tmp_path / "some.txt").write_text("")
    with pytest.raises(ValueError, match="holds some.txt"):
        stages.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stage 'pretrain', and none of .*'finetune'"):
        stages.load_finetuned(folder / "pretrain")


def test_all_zero_rewards_fall_back_to_a_random_task(run, tmp_path):
    folder, _, _ = run

    class Barren(fakes.PlanesPool):
        def recv(self):
            timestep = super().recv()
            return timestep._replace(reward=np.zeros_like(timestep.reward))

    result = stages.finetune(
        make_config(), tmp_path / "f", folder / "pretrain", constructor=Barren
    )
    assert result["adapted"]["is_fallback"] and result["adapted"]["num_nonzero"] == 0
    np.testing.assert_allclose(
        np.linalg.norm(result["adapted"]["task"]), 1.0, rtol=1e-6
    )
    assert result["returns"] == [0.0, 0.0]


def test_evaluation_counts_the_first_game_of_each_environment(run):
    """Uniformly random play on the chain scores what its dynamics say."""
    folder, _, _ = run
    trained = stages.load_finetuned(folder / "finetune")
    config = config_lib.replace_options(
        make_config(), eval_episodes=500, eval_epsilon=1.0
    )
    played = evaluation.evaluate(
        config,
        evaluation.make_player(config, trained.agent, adapted=True),
        trained.state,
        constructor=fakes.PlanesPool,
    )
    expected = fakes.PlanesPool(fakes.PLANES, 1, seeds=[0]).random_return
    standard_error = played.returns.std() / math.sqrt(500)
    assert abs(played.returns.mean() - expected) < 4 * standard_error
    assert played.returns.shape == played.lengths.shape == (500,)
    assert played.lengths.max() == 20  # The chain's limit.
    assert played.pictures == []


def test_ended_games_are_stepped_no_longer_than_their_pool(run):
    """Twelve games are two pools of six, which end apart; rows keep their seeds."""
    folder, _, _ = run
    trained = stages.load_finetuned(folder / "finetune")
    pools = []

    class Counted(fakes.PlanesPool):
        def __init__(self, *args, seeds, **options):
            super().__init__(*args, seeds=seeds, **options)
            # The second pool's games are the longer ones.
            self._limit = 5 + 5 * len(pools)
            self.seeds, self.num_sent = seeds, 0
            pools.append(self)

        def send(self, actions):
            self.num_sent += 1
            super().send(actions)

    config = make_config(eval_episodes=12, eval_epsilon=1.0)
    player = evaluation.make_player(config, trained.agent)
    played = evaluation.evaluate(
        config, player, trained.state, constructor=Counted, record_games=8
    )
    np.testing.assert_array_equal(played.lengths, [5] * 6 + [10] * 6)
    assert [len(taken) for taken in played.pictures] == [5] * 6 + [10] * 2
    assert [pool.num_sent for pool in pools] == [5, 10]
    assert pools[0].seeds + pools[1].seeds == atari.environment_seeds(
        config.seed, 12, stream=int(loop.Stream.EVALUATE)
    )
    assert player.act._cache_size() == 1


def test_a_recorded_game_has_a_picture_per_step(run):
    folder, _, _ = run
    trained = stages.load_finetuned(folder / "finetune")
    played = evaluation.evaluate(
        make_config(),
        evaluation.make_player(make_config(), trained.agent),
        trained.state,
        record_games=1,
        constructor=fakes.PlanesPool,
    )
    (pictures,) = played.pictures
    assert len(pictures) == played.lengths[0]
    assert pictures[0].shape == (84, 84, 3)


def test_a_film_stops_when_its_pictures_are_taken(run):
    """Each game has its own task, and its own pictures until it ends."""
    folder, _, _ = run
    trained = stages.load_finetuned(folder / "finetune")
    config = make_config(eval_episodes=3)
    played = evaluation.evaluate(
        config,
        evaluation.compile_player(trained.agent.play_skills, 0.0),
        trained.state,
        record_games=2,
        record_agent_steps=4,
        only_record=True,
        constructor=fakes.PlanesPool,
    )
    assert [len(pictures) for pictures in played.pictures] == [4, 4]
    np.testing.assert_array_equal(played.lengths, [4, 4, 4])
    assert len(np.unique(played.extras["task"], axis=0)) == 3


def test_evaluations_at_set_steps(frozen):
    """Steps before inference is over are covered by zero-shot; 90 is rounded up."""
    assert [e["agent_steps"] for e in frozen["evaluations"]] == [60, 92, 100, 120]


def play_nothing(*_, **__):
    """Stands for `evaluation.evaluate` where scores are given."""
    return evaluation.Evaluation(*[np.zeros(2)] * 3, [], {})


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_checkpoint_is_the_one_that_was_evaluated(
    run, tmp_path, monkeypatch, best
):
    """Also the last, whose checkpoint was written before its games were played."""
    folder, _, _ = run
    scores = [0.0, 0.0, 0.0]
    scores[best] = 9.0
    summary, played = evaluation.summary, []

    def numbered(config, result):
        played.append(None)
        score = scores[len(played) - 1]
        return summary(config, result) | {"eval_return_mean": score}

    monkeypatch.setattr(stages.evaluation, "evaluate", play_nothing)
    monkeypatch.setattr(stages.evaluation, "summary", numbered)
    monkeypatch.setattr(stages, "_score", lambda *_: {})
    config = make_config(
        evaluations=3, keep_best=True, keep_checkpoints=1, checkpoint_agent_steps=40
    )
    result = finetune(config, tmp_path / "f", folder / "pretrain")
    steps = [at["agent_steps"] for at in result["evaluations"]]
    assert len(steps) == 3
    kept = checkpoints.Checkpointer(tmp_path / "f" / "checkpoints").steps()
    assert kept == sorted({steps[best], steps[-1]})
    facts = checkpoints.read_metadata(tmp_path / "f" / "checkpoints" / str(steps[best]))
    assert facts["score"] == 9.0


def test_an_evaluation_without_a_score_is_saved_without_one(
    run, tmp_path, monkeypatch, caplog
):
    """NaN is no JSON: as a score it would keep every checkpoint from being written."""
    folder, _, _ = run
    summary = evaluation.summary
    monkeypatch.setattr(stages.evaluation, "evaluate", play_nothing)
    monkeypatch.setattr(
        stages.evaluation,
        "summary",
        lambda *given: summary(*given) | {"eval_return_mean": math.nan},
    )
    monkeypatch.setattr(stages, "_score", lambda *_: {})
    monkeypatch.setattr(recorders, "patiently", lambda write, *_: write())
    config = make_config(keep_best=True)
    finetune(config, tmp_path / "f", folder / "pretrain")
    facts = checkpoints.read_metadata(tmp_path / "f" / "checkpoints" / "120")
    assert facts.get("score") is None or math.isfinite(facts["score"])
    assert "cannot write" not in caplog.text


@pytest.mark.parametrize(
    "steps, message",
    [
        ("8,,9", "positive numbers separated by commas, got '8,,9'"),
        ("0", "positive numbers"),
        ("-5", "positive numbers"),
        ("121", "must not exceed the 120 of finetune_agent_steps, got 121"),
    ],
)
def test_set_steps_are_checked(steps, message):
    with pytest.raises(ValueError, match=message):
        make_config(eval_agent_steps=steps)


@pytest.mark.parametrize("max_frames, expected", [(108_000, 0.0), (400, math.nan)])
def test_only_whole_games_are_normalised(max_frames, expected):
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"), game="Pong", max_frames=max_frames
    )
    scores = np.array([-20.7, -20.7])
    # Returns of another reward do not count.
    played = evaluation.Evaluation(
        np.array([3.0, 3.0]), scores, np.array([9, 9]), [], {}
    )
    summary = evaluation.summary(config, played)
    np.testing.assert_allclose(summary["eval_human_normalized"], expected, atol=1e-6)
    assert summary["eval_return_mean"] == 3.0 and summary["eval_return_std"] == 0.0


def test_evaluations_of_a_player_compile_once(run):
    folder, _, _ = run
    trained = stages.load_finetuned(folder / "finetune")
    player = evaluation.make_player(trained.config, trained.agent)
    counts = []
    for _ in range(2):
        evaluation.evaluate(
            trained.config, player, trained.state, constructor=fakes.PlanesPool
        )
        counts.append((player.act._cache_size(), player.init._cache_size()))
    assert counts == [(1, 1), (1, 1)]


def test_an_unfinished_pretraining_is_calibrated_too(broken_off):
    """Every checkpoint that may be evaluated has its features' moments."""
    trained = stages.load_pretrained(broken_off)
    assert trained.facts["agent_steps"] == 144
    assert float(trained.state.stats.calibrated.weight) == 1.0
