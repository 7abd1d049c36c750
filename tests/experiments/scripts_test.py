"""Tests of the experiment scripts: each to its end in seconds, and wrong input."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import weakref

import fake_runs
import hypothesis
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st
from PIL import Image
from scripts import run_script, set_flags

from aps_jax import config as config_lib
from aps_jax.runs import folders
from aps_jax.train import loop, stages
from experiments import (
    common_flags,
    evaluate,
    finetune,
    pretrain,
    run_aps,
    summary,
)

ROOT = pathlib.Path(__file__).parents[2]

# A run of the real Pong that takes seconds, all its stages included.
TINY = {
    "preset": "smoke",
    "pretrain_frames": 4 * 160,
    "warmup_agent_steps": 80,
    "max_frames": 200,
    "finetune_agent_steps": 80,
    "infer_agent_steps": 40,
}


pytestmark = pytest.mark.usefixtures("parsed_flags")


def test_the_main_job_and_its_stages_run_on_pong(tmp_path, capsys, monkeypatch):
    """run_aps, then evaluate and finetune from its folder with no other flag."""
    monkeypatch.setattr(loop, "CALIBRATION_STATES", 16)
    monkeypatch.setattr(loop, "EMBEDDED_STATES", 16)
    workdir = tmp_path / "run"
    with flagsaver.flagsaver():
        set_flags(workdir=str(workdir), arms=["pretrained", "scratch"], **TINY)
        run_aps.main(["run_aps"])
    said = capsys.readouterr().out
    result = json.loads((workdir / "result.json").read_text())
    assert result["game"] == "Pong" and result["stage"] == "run_aps"
    assert list(result["arms"]) == ["pretrained", "scratch"]
    assert result["arms"]["scratch"]["init"] is None
    # The score, the protocol, and where things are. Games of 200 frames are other games
    # than those of random and human scores.
    for words in ("2 full games", "small: it shows that the machine"):
        assert words in said
    assert "-20.7" not in said and result["human_normalized_score"] is None
    assert "Did pretraining help?" in said and "single seeds have no" in said
    for name in ("result.json", "curves.png", "game.gif", "features.png"):
        assert str(workdir / name) in said.replace("\n", "")
        assert (workdir / name).stat().st_size > 1000

    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path / "eval"), checkpoint=str(workdir), video=True)
        evaluate.main(["evaluate"])
    again = json.loads((tmp_path / "eval" / "result.json").read_text())
    # The same agent on the same games: the same scores.
    assert again["returns"] == result["returns"]
    assert again["checkpoint_step"] == result["finetune_agent_steps"] == 80
    assert (tmp_path / "eval" / "game.gif").exists()

    # Of a damaged checkpoint and of an earlier one there is a warning.
    damaged = workdir / "pretrain" / "checkpoints" / "200"
    shutil.copytree(damaged.parent / "160", damaged)
    (damaged / "metadata.json").write_text("{}")
    capsys.readouterr()
    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path / "zero"), checkpoint=str(workdir), video=True)
        set_flags(reward="score, examples.rewards:pong_high", infer_agent_steps=40)
        evaluate.main(["evaluate"])
    shutil.rmtree(damaged)
    zero = json.loads((tmp_path / "zero" / "result.json").read_text())
    assert zero["checkpoint_step"] == 160 and zero["pretrain_frames"] == 640
    score, high = zero["rewards"]
    assert high["reward"] == "examples.rewards:pong_high"
    assert high["random"]["return_mean"] >= 0 > high["random"]["score_mean"] - 1
    assert high["random_tasks"]["score_mean"] == score["random_tasks"]["score_mean"]
    with Image.open(tmp_path / "zero" / "rewards.gif") as image:
        assert image.width == 2 * 160 and image.n_frames > 10
    # What fine-tuning inferred and scored before it learned.
    first = result["evaluations"][0]
    assert score["zero_shot"]["return_mean"] == first["eval_return_mean"]
    assert score["adapted"]["r_squared"] == result["adapted"]["r_squared"]
    said, complained = capsys.readouterr()
    assert "one pretrained agent, no gradient step" in said
    assert "not Atari-100k: episodes 2" in said
    (line,) = [x for x in complained.splitlines() if x.startswith("warning: ")]
    assert str(damaged) in line and "step 160" in line

    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path / "grid"), checkpoint=str(workdir))
        set_flags(video_tasks=3)
        evaluate.main(["evaluate"])
    with Image.open(tmp_path / "grid" / "tasks.gif") as image:
        assert image.size == (2 * 160, 2 * (210 + 14)) and image.n_frames > 10

    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path / "ft"), init=str(workdir), evaluations=1)
        finetune.main(["finetune"])
    tuned = json.loads((tmp_path / "ft" / "result.json").read_text())
    assert tuned["init"] == str(workdir / "pretrain")
    assert tuned["pretrain_frames"] == result["pretrain_frames"] == 640
    assert len(tuned["evaluations"]) == 1


def test_several_seeds_end_with_the_gain_and_its_interval(
    tmp_path, capsys, monkeypatch
):
    """Pretrained scores 3, 4, 5 against 1, 1, 1: a gain of 3, whatever the resample."""
    held = []

    def fill_replay(*_, **__):
        assert not any(replay() is not None for replay in held)
        replay, cycle = np.zeros(10), []
        cycle += [cycle, replay]
        held.append(weakref.ref(replay))

    def fake_finetune(runs, inits, **_):
        fill_replay()
        values = fake_runs.result(
            [1.0 if inits is None else 3.0 + runs.config.seed] * 4,
            seed=runs.config.seed,
            init=inits and str(inits[0]),
        )
        fake_runs.write(runs.workdir, values)
        return [{**values, "human_normalized_score": None}]

    monkeypatch.setattr(stages, "pretrain_runs", fill_replay)
    monkeypatch.setattr(stages, "finetune_runs", fake_finetune)
    monkeypatch.setattr(run_aps, "_draw", lambda *_, **__: None)
    monkeypatch.setattr(
        run_aps.report.report,
        "__kwdefaults__",
        {**run_aps.report.report.__kwdefaults__, "num_resamples": 200},
    )
    set_flags(workdir=str(tmp_path / "r"), arms=["pretrained", "scratch"])
    set_flags(seeds=["3"], **TINY)
    run_aps.main(["run_aps"])
    said = capsys.readouterr().out
    for seed in range(3):
        assert (tmp_path / "r" / f"seed_{seed}" / "result.json").exists()
    (line,) = [line for line in said.splitlines() if "aps over aps scratch" in line][1:]
    assert " ".join(line.split()) == (
        "Pong aps over aps scratch +3.0 [+2.0, +4.0] 1.00 [1.00, 1.00]"
    )
    assert "with 3 seeds, 95 % intervals are too narrow" in said


def test_results_are_shown_beside_random_and_human_scores(capsys):
    result = {**fake_runs.result([-3.0, 0.0]), "human_normalized_score": 0.5453}
    result["evaluations"] = [{"eval_return_mean": -20.5}, {"eval_return_mean": -1.5}]
    config = config_lib.preset_config("cpu")
    summary.print_results(config, {"pretrained": result})
    said = capsys.readouterr().out
    cells = [line.split() for line in said.splitlines()]
    assert ["pretrained", "-1.5", "-3", "to", "0", "0.545", "-20.5"] in cells
    assert ["random", "-20.7", "0"] in cells and ["human", "14.6", "1"] in cells


def test_results_of_another_reward_are_not_shown_as_scores(capsys):
    config = config_lib.replace_options(
        config_lib.preset_config("cpu"), reward="survival"
    )
    result = {
        **fake_runs.result([100.0, 200.0]),
        "score_returns": [-20.0, -21.0],
        "human_normalized_score": 0.5,
    }
    summary.print_results(config, {"pretrained": result})
    said = capsys.readouterr().out
    assert "return of the reward function survival per game" in said
    (line,) = [line for line in said.splitlines() if "pretrained" in line]
    for words in ("150.0", "100 to 200", "-20.5"):
        assert words in line
    assert "human" not in said and "0.500" not in said


def test_a_row_per_reward_tells_all_of_it(capsys):
    games = {"return_mean": 1234.5, "score_mean": 2.0, "length_mean": 600.0}
    adapted = {"r_squared": 0.301, "num_samples": 1592, "num_nonzero": 313}
    results = [
        {
            "reward": "my.rewards:middle",
            "adapted": {**adapted, "is_fallback": True},
            "zero_shot": games,
            "random": {**games, "return_mean": 0.3},
            "random_tasks": {**games, "return_mean": 0.4},
        }
    ]
    summary.print_rewards(config_lib.preset_config("paper"), results)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "my.rewards:middle" in line]
    assert " ".join(line.split()) == (
        "my.rewards:middle (random w) 1,234.5 0.4 0.3 2.0 600 0.301 1,592 (313)"
    )
    assert "(Atari-100k protocol)" in said


def test_pretrain_runs_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "pretrain_runs", fake_pretrain)
    set_flags(workdir=str(tmp_path / "p"), **TINY)
    pretrain.main(["pretrain"])
    assert f"--init={tmp_path / 'p'}" in capsys.readouterr().out


def test_seeds_at_once_have_a_folder_each_and_meet_again_in_fine_tuning(
    tmp_path, capsys, monkeypatch
):
    """In a maze: pretrain at once, then the stages that start from a seed."""
    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path / "p"), seed=3, num_seeds=2, preset="smoke")
        set_flags(game="maze/open", encoder="mlp", pretrain_frames=160)
        pretrain.main(["pretrain"])
    said = capsys.readouterr().out
    for seed in (3, 4):
        folder = tmp_path / "p" / f"seed_{seed}"
        assert f"--init={folder}" in said
        trained = stages.load_pretrained(folder)
        assert trained.config.seed == seed
        assert trained.facts["agent_steps"] == 160

    tuned = []

    def fake_finetune(runs, inits, **_):
        tuned.append((runs, inits))
        return [{**fake_runs.result(), "human_normalized_score": None}] * 2

    monkeypatch.setattr(stages, "finetune_runs", fake_finetune)
    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path / "f"), init=str(tmp_path / "p"))
        set_flags(seed=3, num_seeds=2)
        finetune.main(["finetune"])
    ((runs, inits),) = tuned
    assert runs.workdir == tmp_path / "f" and runs.seeds == [3, 4]
    assert list(runs.configs) == [tmp_path / "f" / f"seed_{seed}" for seed in (3, 4)]
    assert inits == [tmp_path / "p" / f"seed_{seed}" for seed in (3, 4)]


def test_the_main_job_runs_its_seeds_at_once(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        stages, "pretrain_runs", lambda runs, **_: order.append(("pretrain", runs))
    )

    def fake_finetune(runs, inits, **_):
        order.append(("finetune", runs, inits))
        return [{**fake_runs.result(), "human_normalized_score": None}] * 2

    monkeypatch.setattr(stages, "finetune_runs", fake_finetune)
    monkeypatch.setattr(run_aps, "_draw", lambda *_, **__: None)
    with flagsaver.flagsaver():
        set_flags(workdir=str(tmp_path), num_seeds=2, seed=5, **TINY)
        run_aps.main(["run_aps"])
    (_, pretrained), (_, tuned, inits) = order
    assert pretrained.workdir == tmp_path / "pretrain"
    assert pretrained.seeds == tuned.seeds == [5, 6]
    pretrained_folders = [tmp_path / f"seed_{seed}" / "pretrain" for seed in (5, 6)]
    assert list(pretrained.configs) == inits == pretrained_folders
    assert list(tuned.configs) == [
        tmp_path / f"seed_{seed}" / "pretrained" for seed in (5, 6)
    ]
    result = json.loads((tmp_path / "seed_6" / "result.json").read_text())
    assert result["stage"] == "run_aps" and list(result["arms"]) == ["pretrained"]


def test_an_agent_without_pretraining_has_the_scratch_arm_alone(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(stages, "pretrain_runs", None)
    monkeypatch.setattr(run_aps, "_run", lambda runs, arms, **_: order.append(arms))
    for arms in (None, ["pretrained", "scratch"]):
        with flagsaver.flagsaver():
            set_flags(workdir=str(tmp_path), agent="dqn", preset="smoke")
            if arms is not None:
                set_flags(arms=arms)
            run_aps.main(["run_aps"])
    assert order == [["scratch"]] * 2


def test_a_tilde_in_a_flag_is_the_home_folder(tmp_path, monkeypatch):
    tuned = []

    def fake_finetune(runs, inits, **_):
        tuned.append((runs.workdir, *inits))
        return [{**fake_runs.result(), "human_normalized_score": None}]

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(stages, "finetune_runs", fake_finetune)
    folders.open_run(
        tmp_path / "p", stage="pretrain", config=config_lib.preset_config("smoke")
    )
    set_flags(workdir="~/f", init="~/p")
    finetune.main(["finetune"])
    set_flags(workdir="~/e", checkpoint="~/p", reward="score")
    with pytest.raises(ValueError, match=f"The run in {tmp_path}/p has no checkpoint"):
        evaluate.main(["evaluate"])
    assert tuned == [(tmp_path / "f", tmp_path / "p")]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def fake_pretrain(runs, **_):
    frames = runs.config.pretrain.pretrain_frames
    return [{"game": runs.config.game, "pretrain_frames": frames}]


# Flags.


def test_every_option_is_a_flag_of_its_type():
    for name, field in config_lib.all_option_fields().items():
        flag = flags.FLAGS[name]
        assert flag.help.endswith("."), name
        if name != "preset":
            assert flag.default is None, name
            assert flag.flag_type().startswith(
                {"str": ("string", "enum"), "int": "int", "float": "float"}.get(
                    field.type.__name__, "bool"
                )
            ), name


def test_flags_change_the_preset_and_nothing_else():
    set_flags(preset="cpu", batch_size=64, game="Breakout", agent="entropy")
    config = common_flags.config_from_flags()
    expected = config_lib.replace_options(
        config_lib.preset_config("cpu", "entropy"), batch_size=64, game="Breakout"
    )
    assert config == expected
    assert config.learner.skill_weight == 0.0


def test_flags_change_the_run_that_is_taken_over():
    base = config_lib.replace_options(config_lib.preset_config("cpu"), game="Freeway")
    set_flags(finetune_epsilon=0.5)
    config = common_flags.config_from_flags(base)
    assert config.game == "Freeway" and config.preset == "cpu"
    assert config.learner.finetune_epsilon == 0.5
    set_flags(preset="gpu")
    with pytest.raises(ValueError, match="--preset cannot be given here"):
        common_flags.config_from_flags(base)


def test_options_of_emulators_are_refused_for_a_world_in_one_line():
    set_flags(preset="minatar")
    assert common_flags.config_from_flags().game == "minatar/Breakout"
    set_flags(sticky=0.25, noop_max=3)
    with pytest.raises(ValueError, match="--noop_max, --sticky: .*minatar/Breakout"):
        common_flags.config_from_flags()
    set_flags(game="Pong", encoder="small")  # The same flags on Atari.
    assert common_flags.config_from_flags().environment.sticky == 0.25


WHOLE_NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 12, 256, 2**31 - 1, 2**31, 2**63, 10**30]),
    st.integers(-(10**4), 10**8),
)
NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "-0.0", "nan", "inf", "-inf", "1e308", "1e-320", "x"]),
    st.floats(-2.0, 2.0).map(str),
)
WORDS = st.sampled_from(["", "Pong", "pong", "aps", "small", "split", "true", "2", "é"])


def given_values(name):
    """Draws what might be typed for an option, right or wrong."""
    field = config_lib.all_option_fields()[name]
    values = {bool: WORDS, int: WHOLE_NUMBERS, float: NUMBERS, str: WORDS}[field.type]
    if field.metadata["choices"] is not None:
        values = st.one_of(values, st.sampled_from(field.metadata["choices"]))
    return values.map(lambda value: f"--{name}={value}")


@hypothesis.settings(derandomize=True, deadline=None, max_examples=120, database=None)
@hypothesis.given(
    words=st.lists(
        st.sampled_from(sorted(config_lib.all_option_fields())).flatmap(given_values),
        min_size=1,
        max_size=3,
    ),
    preset=st.sampled_from(sorted(config_lib.PRESETS)),
)
def test_no_value_of_a_flag_ends_in_a_traceback(words, preset):
    """What is accepted has streams, schedules and estimates; the rest is one line."""
    with flagsaver.flagsaver():
        try:
            flags.FLAGS(["test", f"--preset={preset}", *words])
            config = common_flags.config_from_flags()
            for is_pretraining in (True, False):
                stages.check_memory(config, is_pretraining=is_pretraining)
        except (flags.Error, ValueError) as error:
            assert str(error)
            return
    assert config_lib.from_dict(config_lib.to_dict(config)) == config
    loop.stream_key(config.seed, loop.Stream.EVALUATE)
    agent = config.make_agent(2, config.observation)
    plans = [loop.finetune_plan(config, agent)]
    if config.has_pretraining:
        plans.append(loop.pretrain_plan(config, agent))
    for plan in plans:
        schedule = plan.schedule()
        assert schedule.num_due(2**31) >= schedule.num_due(10) >= 0


def test_a_game_that_raises_ends_a_script_with_code_1(monkeypatch, capsys):
    def broken(argv):
        raise loop.EnvironmentFailure(
            "the environment raised X; a checkpoint was saved"
        )

    monkeypatch.setattr(sys, "argv", ["test"])
    with pytest.raises(SystemExit) as ended:
        common_flags.run(broken)
    assert ended.value.code == 1
    assert (
        "raised X; a checkpoint was saved; the same command" in capsys.readouterr().err
    )


# Wrong input, each in a process of its own as a user would type it.

WRONG = {
    "unknown game": (
        ["run_aps", "--game=Pnog", "--workdir={new}"],
        r"Unknown game 'Pnog'; the nearest of EnvPool's \d+ are Pong",
    ),
    "unknown flag": (
        ["run_aps", "--gmae=Pong", "--workdir={new}"],
        r"Unknown command line flag 'gmae'",
    ),
    "stray word": (
        ["pretrain", "Pong", "--workdir={new}"],
        r"Unexpected words 'Pong': every value needs a flag, such as --game=Pong",
    ),
    "no workdir": (["run_aps"], r"--workdir=DIR is needed"),
    "a folder of something else": (
        ["run_aps", "--preset=smoke", "--workdir={full}"],
        r"is not empty and holds no config.json",
    ),
    "a missing pretraining": (
        ["finetune", "--init={new}", "--workdir={new}2"],
        r"is not a run's folder: it has no config.json; it does not exist",
    ),
    "a foreign folder to evaluate": (
        ["evaluate", "--checkpoint={full}", "--workdir={new}"],
        r"is not a run's folder.*it holds notes.txt",
    ),
    "k larger than the particles": (
        ["pretrain", "--num_neighbors=300", "--workdir={new}"],
        r"num_neighbors must be less than num_particles.*300 and 256",
    ),
    "a negative count": (
        ["pretrain", "--pretrain_frames=-4", "--workdir={new}"],
        r"pretrain_frames must be at least 1, got -4",
    ),
    "zero environments": (
        ["pretrain", "--num_envs=0", "--workdir={new}"],
        r"num_envs must be at least 1, got 0",
    ),
    "no number": (
        ["pretrain", "--seed=one", "--workdir={new}"],
        r"flag --seed=one: invalid literal for int",
    ),
    "more than fits memory": (
        ["pretrain", "--replay_size=2000000000", "--workdir={new}"],
        r"needs about \d+\.\d GiB.*GiB of memory are free",
    ),
    "no accelerator": (
        ["pretrain", "--require_accelerator", "--workdir={new}"],
        r"JAX sees no GPU or TPU",
    ),
    "seeds that are no numbers": (
        ["run_aps", "--seeds=a,b", "--workdir={new}"],
        r"--seeds must be a number, or numbers, got \['a', 'b'\]",
    ),
    "no seeds at once": (
        ["run_aps", "--num_seeds=0", "--workdir={new}"],
        r"--num_seeds must be at least 1, got 0",
    ),
    "seeds by two flags": (
        ["pretrain", "--num_seeds=2", "--seeds=3", "--workdir={new}"],
        r"--num_seeds pretrains .* give one of the two",
    ),
    "seeds at once on several devices": (
        ["run_aps", "--num_seeds=2", "--num_devices=2", "--workdir={new}"],
        r"cannot have --num_devices, since they share one device",
    ),
    "a reward that cannot be imported": (
        ["run_aps", "--reward=gone:f", "--preset=smoke", "--workdir={new}"],
        r"module of the reward 'gone:f' cannot be imported: ModuleNotFoundError",
    ),
    "an option of other agents": (
        ["pretrain", "--agent=dqn", "--feature_dim=3", "--workdir={new}"],
        r"Agent dqn has no option feature_dim; these have: aps, visr, entropy\.",
    ),
    "a pretraining of an agent without one": (
        ["pretrain", "--agent=dqn", "--preset=smoke", "--workdir={new}"],
        r"Agent dqn learns from reward alone",
    ),
    "a pretrained arm of an agent without one": (
        ["run_aps", "--agent=dqn", "--arms=pretrained", "--workdir={new}"],
        r"Agent dqn learns from reward alone: give --arms=scratch",
    ),
    "a folder in a bucket": (
        ["pretrain", "--preset=smoke", "--workdir=gs://bucket/x"],
        r"gs://bucket/x is a URL",
    ),
    "a pretraining in a bucket": (
        ["finetune", "--init=s3://bucket/x", "--workdir={new}"],
        r"s3://bucket/x is a URL",
    ),
    "a checkpoint in a bucket": (
        ["evaluate", "--checkpoint=gs://bucket/x", "--workdir={new}"],
        r"gs://bucket/x is a URL",
    ),
    "a preflight of a file": (
        ["pretrain", "--preflight", "--preset=smoke", "--workdir={full}/notes.txt/x"],
        r"notes.txt is a file; a run needs a folder",
    ),
    "a preflight of a folder of something else": (
        ["run_aps", "--preflight", "--preset=smoke", "--workdir={full}"],
        r"is not empty and holds no config.json",
    ),
    "no seconds for a preflight": (
        ["run_aps", "--preflight", "--preflight_seconds=0", "--workdir={new}"],
        r"flag --preflight_seconds=0: ",
    ),
    "an unknown arm": (
        ["run_aps", "--arms=random", "--workdir={new}"],
        r"--arms must be some of pretrained, scratch, got \['random'\]",
    ),
}


@pytest.mark.parametrize("words, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_clear_line_and_writes_nothing(words, message, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    script, *arguments = (
        word.format(new=tmp_path / "new", full=tmp_path / "full") for word in words
    )
    done = run_script(script, *arguments)
    assert done.returncode not in (0, -9), done.stderr
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert "Traceback" not in done.stderr
    # absl adds one line of its own to errors in flags.
    assert len(lines) <= 2, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes.txt"]


def test_short_help_fits_a_screen():
    done = run_script("run_aps", "--helpshort")
    lines = done.stdout.splitlines()
    assert len(lines) < 50
    for flag in ("--game", "--seed", "--workdir", "--preset", "--agent", "--arms"):
        assert any(flag in line for line in lines), flag


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["test"])
    with pytest.raises(RuntimeError, match="a bug"):
        common_flags.run(broken)


def test_pure_modules_need_no_environment_and_no_flags():
    """`import aps_jax` and what it exports work without EnvPool and absl."""
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('envpool', 'matplotlib', 'tensorboardX'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import aps_jax\n"
        "from aps_jax import losses, rewards, tasks, knn, networks\n"
        "from aps_jax.ops import sphere\n"
        "assert 'envpool' not in sys.modules\n"
        "import jax\n"
        "assert not jax._src.xla_bridge._backends, 'importing started a device'\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True
    )
