"""Tests of experiments.sweep: commands, what runs at a time, restarts, one table."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import fake_runs
import pytest
from absl import flags
from absl.testing import flagsaver
from scripts import run_script

from aps_jax import config as config_lib
from aps_jax.parallel import interrupts
from aps_jax.report import figures
from aps_jax.runs import folders, machine
from experiments import evaluate, finetune, pretrain, run_aps, sweep

SCRIPTS = {
    f"experiments.{module.__name__.split('.')[-1]}"
    for module in (evaluate, finetune, pretrain, run_aps)
}

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_updates_of_jax(parsed_flags, monkeypatch):
    # The suite's JAX is on the CPU already, and cannot be told so again once in use.
    monkeypatch.setattr("jax.config.update", lambda name, value: None)


def run_sweep(*words):
    with flagsaver.flagsaver():
        flags.FLAGS(["sweep", *words])
        sweep.main(["sweep"])


def commands(capsys, *words):
    """The commands that a dry run prints, split into words."""
    run_sweep(*words)
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if " -m " in line]


def test_a_dry_run_prints_a_command_for_each_game_agent_and_seed(tmp_path, capsys):
    given = commands(
        capsys,
        "--games=atari26",
        "--seeds=5",
        "--agents=aps,visr,entropy",
        "--preset=cpu",
        "--batch_size=64",
        "--max_minutes=5",
        f"--workdir={tmp_path / 'a b'}",
    )
    assert len(given) == 26 * 3 * 5
    assert given[5][1:] == [
        "-m",
        "experiments.run_aps",
        f"--workdir={tmp_path / 'a b'}/Alien/visr/seed_0",
        "--preset=cpu",
        "--arms=pretrained,scratch",
        "--agent=visr",
        "--batch_size=64",
        "--game=Alien",
        "--seed=0",
        "--max_minutes=5.0",
    ]
    assert not (tmp_path / "a b").exists()


def test_worlds_are_swept_like_games(tmp_path, capsys):
    worlds = ("maze/snake", "minatar/Breakout")
    words = (f"--games={','.join(worlds)}", "--preset=maze", f"--workdir={tmp_path}")
    for game, command in zip(worlds, commands(capsys, *words), strict=True):
        assert f"--game={game}" in command
        assert f"--workdir={tmp_path}/{game}/aps/seed_0" in command
    with pytest.raises(ValueError, match="Unknown world 'maze/snakes'"):
        run_sweep("--games=maze/snakes", "--preset=maze", f"--workdir={tmp_path}")


def test_an_agent_without_pretraining_is_swept_from_scratch(tmp_path, capsys):
    words = ["--agents=aps,dqn", "--preset=cpu", f"--workdir={tmp_path}"]
    aps, dqn = commands(capsys, *words)
    assert "--arms=pretrained,scratch" in aps and "--agent=aps" in aps
    assert "--arms=scratch" in dqn and "--agent=dqn" in dqn
    assert dqn[3] == f"--workdir={tmp_path}/Pong/dqn/seed_0"
    _, dqn = commands(capsys, *words, "--stage=scratch")
    assert dqn[3] == f"--workdir={tmp_path}/Pong/dqn/seed_0/scratch"
    for more in ("--stage=pretrain", "--stage=finetune", "--arms=pretrained"):
        with pytest.raises(ValueError, match="Agent dqn learns from reward alone"):
            run_sweep(*words, more)
    with pytest.raises(ValueError, match="dqn has no option feature_dim; these have"):
        run_sweep(*words, "--feature_dim=3")


STAGES = {
    "pretrain": ["pretrain", "pretrain", "--preset=cpu"],
    "scratch": ["finetune", "scratch", "--preset=cpu"],
    "finetune": ["finetune", "pretrained", "--init={}/pretrain"],
    "rewards": ["evaluate", "rewards", "--checkpoint={}/pretrain"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_alone_share_the_folders_of_the_main_job(stage, tmp_path, capsys):
    (command,) = commands(
        capsys, f"--stage={stage}", "--preset=cpu", f"--workdir={tmp_path}"
    )
    root = tmp_path / "Pong" / "aps" / "seed_0"
    script, folder, word = STAGES[stage]
    assert command[2] == f"experiments.{script}"
    assert command[3] == f"--workdir={root / folder}"
    assert word.format(root) in command
    # Each of them is a command that the script understands.
    assert command[2] in SCRIPTS
    with flagsaver.flagsaver():
        assert flags.FLAGS(["script", *command[3:]]) == ["script"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--games=Pnog"], "Unknown game 'Pnog'"),
        (
            ["--agents=aps,apt"],
            "--agents must be some of aps, visr, entropy, dqn, der, ",
        ),
        (["--seeds=a"], "--seeds must be a number, or numbers, got"),
        (["--seeds=0"], "--seeds=0 asks for no seed"),
        (["--seed=3"], "--seed cannot be given to a sweep: give --seeds"),
        (["--arms=random"], "--arms must be some of pretrained, scratch"),
        (["--batch_size=0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_sweep(*words, "--preset=cpu", f"--workdir={tmp_path}")


def write_finished(folder, **options):
    """A run of the cpu preset that is finished, as far as its files tell."""
    config = config_lib.replace_options(config_lib.preset_config("cpu"), **options)
    folders.open_run(folder, stage="run_aps", config=config)
    (folder / "result.json").write_text(json.dumps(fake_runs.result()))


def test_what_is_finished_is_skipped_and_other_values_are_refused(tmp_path, capsys):
    write_finished(tmp_path / "Pong" / "aps" / "seed_1", seed=1)
    words = ["--seeds=2", "--preset=cpu", f"--workdir={tmp_path}"]
    (command,) = commands(capsys, *words)
    assert "--seed=0" in command
    with pytest.raises(ValueError, match="seed_1 holds a finished run of other values"):
        run_sweep(*words, "--batch_size=16")


# What runs at a time.


def slots_with(monkeypatch, *, cores, gib, gpus=0, **values):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(machine, "available_bytes", lambda: int(gib * 2**30))
    monkeypatch.setattr(
        sweep.glob, "glob", lambda pattern: [f"/dev/nvidia{i}" for i in range(gpus)]
    )
    with flagsaver.flagsaver(**values):
        return sweep.slots(config_lib.preset_config("cpu"))


def test_what_learned_another_reward_is_no_score(tmp_path, capsys):
    """Its sweep ends well, without a report of scores, of which there are none."""
    write_finished(tmp_path / "Pong/aps/seed_0/pretrained_survival", reward="survival")
    words = ["--stage=finetune", "--reward=survival", "--preset=cpu", "--run=local"]
    run_sweep(*words, f"--workdir={tmp_path}")
    assert "1 runs, 1 of them finished." in capsys.readouterr().out
    assert not (tmp_path / "report").exists()


def test_as_many_processes_as_cores_and_memory_hold(monkeypatch):
    found = slots_with(monkeypatch, cores=4, gib=100)
    assert found == [{"cores": [i]} for i in range(4)]
    found = slots_with(monkeypatch, cores=4, gib=100, processes=2)
    assert found == [{"cores": [0, 1]}, {"cores": [2, 3]}]
    # Twice 50,000 frames of 7 kB (one copy for checkpoints) and 700 MiB for what any
    # run takes are 1.4 GiB; of 10 GiB nine are used.
    assert len(slots_with(monkeypatch, cores=64, gib=10)) == 6
    assert len(slots_with(monkeypatch, cores=4, gib=0.1)) == 1
    assert len(slots_with(monkeypatch, cores=2, gib=100, processes=3)) == 3


def test_each_gpu_has_one_process(monkeypatch):
    found = slots_with(monkeypatch, cores=4, gib=100, gpus=2)
    assert found == [{"cores": [0, 1], "gpu": 0}, {"cores": [2, 3], "gpu": 1}]


# Running. Each job is a little program in place of a run.

PROGRAM = """
import os, pathlib, signal, sys, time
folder, kind, result = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
tries = folder.with_name(folder.name + ".tries")
count = int(tries.read_text()) if tries.exists() else 0
tries.write_text(str(count + 1))
print("cores", sorted(os.sched_getaffinity(0)), flush=True)
if kind == "broken":
    sys.exit(3)
if kind == "stopped" and count == 0:
    sys.exit(75)
if kind == "timed" and count == 0:
    def save(*_):
        time.sleep(0.2)
        folder.with_name(folder.name + ".saved").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    os.kill(os.getppid(), signal.SIGUSR2)  # as Slurm before a time limit
    time.sleep(600)
folder.mkdir()
(folder / "result.json").write_text(result)
"""


def make_jobs(root, *kinds):
    """A job of each kind: done, broken, stopped (once, with exit code 75), or timed.

    A timed one reaches the time limit of its submitit job once, and takes a while to
    save.
    """
    (root / "logs").mkdir(exist_ok=True)
    return [
        sweep.Job(
            name=f"{kind} {seed}",
            command=(
                *(sys.executable, "-c", PROGRAM, str(root / f"run_{seed}"), kind),
                json.dumps(fake_runs.result(seed=seed)),
            ),
            folder=root / f"run_{seed}",
            log=root / "logs" / f"{seed}.log",
        )
        for seed, kind in enumerate(kinds)
    ]


def test_a_local_sweep_goes_on_past_failures_and_makes_one_table(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(figures, "draw_all", lambda *_: [])
    jobs = make_jobs(tmp_path, "done", "broken", "done")
    monkeypatch.setattr(sweep, "make_jobs", lambda workdir: jobs)
    words = ["--preset=cpu", f"--workdir={tmp_path}", "--run=local", "--processes=2"]
    with pytest.raises(ValueError, match="1 of 3 runs failed"):
        run_sweep(*words)
    said = capsys.readouterr().out
    assert f"FAILED with exit code 3: broken 1, see {jobs[1].log}" in said.replace(
        "\n", " "
    )
    # One table of what there is: two seeds of Pong.
    assert "Scores per game" in said and "2 seeds" in said
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["games"][0]["cells"]["aps"]["num_seeds"] == 2

    # Once more: what is done is left alone.
    with pytest.raises(ValueError, match="1 of 3 runs failed"):
        run_sweep(*words)
    assert "3 runs, 2 of them finished." in capsys.readouterr().out
    assert (tmp_path / "run_0.tries").read_text() == "1"
    assert (tmp_path / "run_1.tries").read_text() == "2"


def test_runs_that_stop_at_their_time_limit_have_not_failed(
    tmp_path, capsys, monkeypatch
):
    (job,) = make_jobs(tmp_path, "stopped")
    monkeypatch.setattr(sweep, "make_jobs", lambda workdir: [job])
    words = ["--stage=pretrain", f"--workdir={tmp_path}", "--run=local"]
    with pytest.raises(interrupts.Interrupted, match="1 of 1 runs stopped before"):
        run_sweep(*words)
    said = capsys.readouterr().out
    assert "stopped: stopped 0" in said and "FAILED" not in said
    run_sweep(*words)
    assert job.is_done


def test_results_are_kept_with_their_commands_and_machine(tmp_path):
    jobs = make_jobs(tmp_path, "done", "broken")
    fake_runs.write(jobs[0].folder, fake_runs.result())
    sweep._write_summary(tmp_path, jobs, 90.0)
    # A second call that ran nothing, and a third that finished the other.
    sweep._write_summary(tmp_path, jobs, 0.2)
    fake_runs.write(jobs[1].folder, fake_runs.result())
    sweep._write_summary(tmp_path, jobs, 30.0)
    arm = tmp_path / "Pong" / "aps" / "seed_0" / "pretrained"
    fake_runs.write(arm, fake_runs.result(), metrics="agent_steps\n1\n", options={})
    (arm / "checkpoints").mkdir()
    (arm / "checkpoints" / "result.json").write_text("{}")

    kept = tmp_path / "results" / "kept"
    sweep.keep(tmp_path, kept)
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*.*")) == [
        "Pong/aps/seed_0/pretrained/metrics.csv",
        "Pong/aps/seed_0/pretrained/result.json",
        "sweep.json",
    ]
    made = json.loads((kept / "sweep.json").read_text())
    assert made["wall_seconds"] == 120.2
    assert [shlex.split(command)[0] for command in made["commands"]] == ["python"] * 2
    assert made["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert made["machine"]["cpu"] and made["versions"]["jax"]
    assert len(made["git_commits"]) == 1


@pytest.mark.usefixtures("hangup_is_noticed")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_stopped_stops_its_runs(tmp_path, monkeypatch, number):
    (job,) = make_jobs(tmp_path, "done")
    waits = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    job = sweep.dataclasses.replace(job, command=(sys.executable, "-c", waits))
    started = []
    start = sweep._start

    def record(job, slot):
        started.append(start(job, slot))
        return started[-1]

    def pause(seconds):
        if "ready" in job.log.read_text():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(sweep, "_start", record)
    monkeypatch.setattr(sweep.time, "sleep", pause)
    with flagsaver.flagsaver(preset="cpu"), pytest.raises(interrupts.Interrupted):
        sweep._run_local([job])
    assert [process.returncode for process in started] == [75]


@pytest.mark.parametrize("kind", ["stopped", "timed"])
def test_submitit_runs_jobs_and_begins_stopped_ones_again(tmp_path, kind):
    # In a process of its own: submitit closes what pytest captures.
    program = (
        "import pathlib, sys, sweep_test\n"
        "from experiments import common_flags, sweep\n"
        "jobs = sweep_test.make_jobs(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "sweep.make_jobs = lambda workdir: jobs\n"
        "sweep.report.report = sweep.tables.show = lambda *_, **__: None\n"
        "sys.argv[1:] = sys.argv[3:]\n"
        "common_flags.run(sweep.main, short=())\n"
    )
    places = [ROOT, ROOT / "tests", ROOT / "tests/experiments"]
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, str(tmp_path), kind),
            f"--workdir={tmp_path}",
            *("--run=slurm", "--slurm_cluster=local", "--slurm=timeout_min=5"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
    )
    assert done.returncode == 0, done.stderr
    assert f"finished: {kind} 0" in done.stdout
    assert (tmp_path / "run_0.tries").read_text() == "2"
    assert (tmp_path / "run_0.saved").exists() == (kind == "timed")


def test_without_submitit_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(sweep, "make_jobs", lambda _: make_jobs(tmp_path, "done"))
    with pytest.raises(ValueError, match=r"pip install 'aps_jax\[sweep\]'"):
        run_sweep(f"--workdir={tmp_path}", "--run=slurm")


@pytest.mark.parametrize("word", ["partition", "=5", "a b=1"])
def test_parameters_of_slurm_are_checked(word):
    with pytest.raises(ValueError, match="--slurm takes name=value"):
        list(sweep._slurm_parameters([word]))


def test_the_script_runs_by_itself(tmp_path):
    done = run_script("sweep", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "experiments.run_aps" in done.stdout
