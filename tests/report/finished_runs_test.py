"""Tests of `aps_jax.report.finished_runs`."""

import fake_runs
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.report import finished_runs

# Options as `config.json` nests them.
OPTIONS = {
    "game": "Pong",
    "seed": 0,
    "learner": {"td_form": "split", "batch_size": 32},
    "pretrain": {"num_envs": 16},
    "report": {"report_agent_steps": 100},
}


def only_run(folder):
    (run,) = finished_runs.collect([folder]).runs
    return run


def test_reads_a_run(tmp_path):
    folder = fake_runs.write(tmp_path / "run", fake_runs.result(seed=3))
    collection = finished_runs.collect([folder])
    (run,) = collection.runs
    assert collection.notices == ()
    assert run.path == folder
    assert (run.game, run.agent, run.arm, run.seed) == ("pong", "aps", "pretrained", 3)
    np.testing.assert_array_equal(run.returns, [1.0, 2.0, 3.0, 6.0])
    assert run.settings == {
        "preset": "cpu",
        "finetune_agent_steps": 12_000,
        "pretrain_frames": 400_000,
        "protocol.episodes": 4,
        "protocol.epsilon": 0.001,
        "protocol.noop_max": 30,
        "protocol.sticky": 0.0,
        "protocol.max_frames": 108_000,
    }


def test_scratch_has_no_pretraining(tmp_path):
    run = only_run(fake_runs.write(tmp_path, fake_runs.result(init=None)))
    assert run.arm == "scratch"
    assert "pretrain_frames" not in run.settings


def test_other_stages_are_an_arm_of_their_own(tmp_path):
    values = fake_runs.result(stage="evaluate", init=None)
    assert only_run(fake_runs.write(tmp_path, values)).arm == "evaluate"


def test_games_without_a_table_keep_their_name(tmp_path):
    values = fake_runs.result(game="Tetris", human_normalized_score=None)
    assert only_run(fake_runs.write(tmp_path, values)).game == "Tetris"


def test_finds_runs_at_any_depth_and_each_once(tmp_path):
    for seed in (1, 0):
        fake_runs.write(tmp_path / "a" / str(seed), fake_runs.result(seed=seed))
    arms = tmp_path / "b"
    fake_runs.write(arms / "pretrained", fake_runs.result(seed=2))
    fake_runs.write(arms / "scratch", fake_runs.result(seed=2, init=None))
    given = [tmp_path, arms, arms / "scratch"]
    collection = finished_runs.collect(given)
    assert [(run.seed, run.arm) for run in collection.runs] == [
        (0, "pretrained"),
        (1, "pretrained"),
        (2, "pretrained"),
        (2, "scratch"),
    ]
    assert collection.notices == ()


def test_does_not_look_into_checkpoints(tmp_path):
    fake_runs.write(tmp_path, fake_runs.result())
    fake_runs.write(tmp_path / "checkpoints" / "7", fake_runs.result(seed=1))
    assert len(finished_runs.collect([tmp_path]).runs) == 1


def write_run_of_arms(folder):
    """Writes what `run_aps` leaves: its arms, and their results at its top."""
    pretrained = fake_runs.result(seed=4)
    scratch = fake_runs.result(seed=4, init=None)
    arms = {"pretrained": pretrained, "scratch": scratch}
    top = {**pretrained, "stage": "run_aps", "arms": arms}
    fake_runs.write(folder, top, options=OPTIONS)
    fake_runs.write(folder / "pretrain", {"schema": 1, "stage": "pretrain"})
    for name, arm in arms.items():
        fake_runs.write(folder / name, arm, options=OPTIONS, metrics="a\n")
    return folder


def test_arms_count_once(tmp_path):
    folder = write_run_of_arms(tmp_path)
    collection = finished_runs.collect([folder])
    assert [run.path for run in collection.runs] == [
        folder / "pretrained",
        folder / "scratch",
    ]
    assert collection.notices == ()


def test_duplicates_are_named_and_left_out(tmp_path):
    first = fake_runs.write(tmp_path / "a", fake_runs.result())
    second = fake_runs.write(tmp_path / "b", fake_runs.result(wall_seconds=9.0))
    collection = finished_runs.collect([tmp_path])
    assert [run.path for run in collection.runs] == [first]
    (notice,) = collection.notices
    assert notice.startswith(f"{second}: duplicate of {first} (pong, aps pretrained")


@pytest.mark.parametrize(
    "change",
    [
        {"game": "Breakout"},
        {"agent": "visr"},
        {"init": None},
        {"seed": 1},
        {"preset": "gpu"},
        {"pretrain_frames": 7},
        {"finetune_agent_steps": 8},
        {"protocol": {**fake_runs.PROTOCOL, "sticky": 0.25}},
    ],
)
def test_what_differs_is_no_duplicate(tmp_path, change):
    fake_runs.write(tmp_path / "a", fake_runs.result())
    fake_runs.write(tmp_path / "b", fake_runs.result(**change))
    collection = finished_runs.collect([tmp_path])
    assert len(collection.runs) == 2
    assert collection.notices == ()


def test_options_set_methods_apart(tmp_path):
    other = {**OPTIONS, "learner": {"td_form": "vector", "batch_size": 32}}
    fake_runs.write(tmp_path / "a", fake_runs.result(), options=OPTIONS)
    fake_runs.write(tmp_path / "b", fake_runs.result(), options=other)
    first, second = finished_runs.collect([tmp_path]).runs
    assert first.settings["td_form"] == "split"
    assert second.settings["td_form"] == "vector"
    assert first.settings["batch_size"] == 32
    assert first.settings["num_envs"] == 16
    assert "seed" not in first.settings and "game" not in first.settings
    assert "report_agent_steps" not in first.settings


def test_options_say_themselves_whether_they_are_compared():
    fields = config_lib.all_option_fields()
    assert finished_runs.compared_options({"seed": 1, "td_form": "split"}) == {
        "td_form": "split"
    }
    # An agent's own option that the config does not declare sets methods apart.
    assert finished_runs.compared_options({"unheard_of": 1}) == {"unheard_of": 1}
    # What `result.json` tells, and what cannot change a result.
    assert {
        name for name in fields if not finished_runs.compared_options({name: 0})
    } == {
        *("agent", "game", "preset", "seed"),
        *("finetune_agent_steps", "pretrain_frames"),
        *("eval_episodes", "eval_epsilon", "max_frames", "noop_max", "sticky"),
        *("checkpoint_agent_steps", "env_threads", "report_agent_steps", "wandb"),
        *("num_devices", "skill_steps"),
        *("eval_agent_steps", "evaluations"),
    }


def test_options_of_pretraining_do_not_concern_scratch(tmp_path):
    values = fake_runs.result(init=None)
    run = only_run(fake_runs.write(tmp_path, values, options=OPTIONS))
    assert run.settings["td_form"] == "split"
    assert "num_envs" not in run.settings


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_options_are_compared_only_where_all_runs_tell_them(tmp_path, text):
    fake_runs.write(tmp_path / "a", fake_runs.result(), options=OPTIONS)
    fake_runs.write(tmp_path / "b", fake_runs.result(seed=1))
    broken = fake_runs.write(tmp_path / "c", fake_runs.result(seed=2))
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    collection = finished_runs.collect([tmp_path])
    assert all("td_form" not in run.settings for run in collection.runs)
    (notice,) = collection.notices
    assert notice.startswith("2 of 3 runs have no readable config.json")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"schema": 2}, "schema 2, this report reads schema 1"),
        ({"schema": None}, "schema None"),
        ({"game": 3}, "game must be of type str, got 3"),
        ({"agent": None}, "agent must be of type str"),
        ({"stage": None}, "stage must be of type str"),
        ({"reward": None, "task": "survival"}, "reward must be of type str, got None"),
        ({"seed": "0"}, "seed must be of type int, got '0'"),
        ({"seed": True}, "seed must be of type int, got True"),
        ({"returns": 3.0, "return_mean": 3.0}, "returns must be of type list"),
        ({"protocol": []}, "protocol must be of type dict"),
        ({"returns": [], "return_mean": None}, "returns must be finite numbers"),
        ({"returns": [1.0, float("nan")]}, "finite numbers, at least one, got [1.0"),
        ({"returns": [float("inf")]}, "returns must be finite numbers"),
        ({"returns": ["1"], "return_mean": 1}, "returns must be finite numbers"),
        ({"returns": [True]}, "returns must be finite numbers"),
    ],
)
def test_unusable_results_are_named_and_left_out(tmp_path, change, reason):
    bad = tmp_path / "bad"
    values = {**fake_runs.result(), **change}
    fake_runs.write(bad, values)
    fake_runs.write(tmp_path / "good", fake_runs.result(seed=5))
    collection = finished_runs.collect([tmp_path])
    assert [run.seed for run in collection.runs] == [5]
    (notice,) = collection.notices
    assert notice.startswith(f"{bad / 'result.json'}: ")
    assert reason in notice
    assert notice.endswith("; left out.")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\xff"])
def test_results_that_are_no_json_objects_are_named(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="No finished run.*(JSON)"):
        finished_runs.collect([tmp_path])


@pytest.mark.parametrize(
    "change",
    [{"reward": "survival"}, {"reward": "m:f", "adapted": {}}, {"rewards": []}],
)
def test_results_of_other_rewards_are_counted_and_left_out(tmp_path, change):
    for name in ("a", "b"):
        fake_runs.write(tmp_path / name, {**fake_runs.result(), **change})
    with pytest.raises(ValueError, match="No finished run.*2 results are of other"):
        finished_runs.collect([tmp_path])
    fake_runs.write(tmp_path / "good", fake_runs.result(seed=5))
    collection = finished_runs.collect([tmp_path])
    assert [run.seed for run in collection.runs] == [5]
    (notice,) = collection.notices
    assert notice.startswith("2 results are of other reward functions")
    assert str(tmp_path / "a" / "result.json") in notice


def test_unfinished_runs_are_named(tmp_path):
    fake_runs.write(tmp_path / "done", fake_runs.result(), options=OPTIONS)
    running = fake_runs.write(tmp_path / "running", options=OPTIONS)
    # A run of several stages whose last one is done is itself done.
    fake_runs.write(tmp_path / "staged", options=OPTIONS)
    fake_runs.write(
        tmp_path / "staged" / "scratch", fake_runs.result(init=None), options=OPTIONS
    )
    collection = finished_runs.collect([tmp_path])
    assert len(collection.runs) == 2
    assert collection.notices == (f"{running}: unfinished (no result.json); left out.",)


def test_pretraining_without_a_score_beside_it_is_named(tmp_path):
    pretraining = {"schema": 1, "stage": "pretrain"}
    fake_runs.write(tmp_path / "a" / "pretrain", pretraining)
    fake_runs.write(tmp_path / "a" / "finetune", fake_runs.result())
    fake_runs.write(tmp_path / "b" / "pretrain", pretraining)
    fake_runs.write(tmp_path / "c" / "pretrain", pretraining)
    (notice,) = finished_runs.collect([tmp_path]).notices
    assert notice.startswith("2 pretraining folders hold no score")
    assert str(tmp_path / "b" / "pretrain") in notice


def test_missing_folders_and_empty_ones_are_errors(tmp_path):
    with pytest.raises(ValueError, match="score in no folder at all"):
        finished_runs.collect([])
    with pytest.raises(ValueError, match="No such folder: .*nowhere"):
        finished_runs.collect([tmp_path / "nowhere"])
    other = tmp_path / "notes.txt"
    other.write_text("")
    with pytest.raises(ValueError, match="No such folder: .*notes.txt"):
        finished_runs.collect([other])
    with pytest.raises(ValueError, match="No finished run with a score in .*"):
        finished_runs.collect([tmp_path])
    fake_runs.write(tmp_path / "run", options=OPTIONS)
    with pytest.raises(ValueError, match=r"unfinished \(no result.json\)"):
        finished_runs.collect([tmp_path])


def read_curves(folder, metrics, **changes):
    fake_runs.write(folder, fake_runs.result(**changes), metrics=metrics)
    return finished_runs.read_curves(only_run(folder))


def test_curves_are_the_known_returns(tmp_path):
    training, evaluated = read_curves(
        tmp_path,
        "agent_steps,frames,episode_return,eval_return_mean\n"
        "10,40,nan,nan\n"
        "20,80,2.5,nan\n"
        "30,120,4,7\n",
    )
    np.testing.assert_array_equal(training.agent_steps, [20, 30])
    np.testing.assert_array_equal(training.returns, [2.5, 4.0])
    np.testing.assert_array_equal(evaluated.agent_steps, [30])
    np.testing.assert_array_equal(evaluated.returns, [7.0])


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "agent_steps,loss\n1,2\n",
        "agent_steps,episode_return\n1,x\n",
        "agent_steps,episode_return\n1\n",
        "agent_steps,episode_return\n1,nan\n",
    ],
)
def test_no_curve_without_returns(tmp_path, text):
    assert read_curves(tmp_path, text) == (None, None)
