"""Runs the scripts of examples/scripts with stand-ins for what machines would start.

`srun` and `gcloud` run what they are given, `python` writes down its words and ends as
it is told to; the words must be flags of the real scripts, and make a valid config.
"""

import importlib
import os
import pathlib
import re
import subprocess

import pytest
from absl import flags
from absl.testing import flagsaver

from aps_jax.scores import scores
from experiments import common_flags

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "scripts"
NAMES = sorted(path.name for path in FOLDER.iterdir())
STAND_INS = {
    "python": 'printf "%s\\t" "$@" >> $LOG/python; echo >> $LOG/python; exit $CODE',
    "scontrol": 'echo "$@" >> $LOG/scontrol',
    "srun": 'while [[ $1 == --* ]]; do echo "$1" >> $LOG/srun; shift; done; "$@"',
    "gcloud": 'echo "$@" >> $LOG/gcloud; last="${@: -1:1}"; bash -c "${last#*=}"',
    "curl": 'case "${@: -1:1}" in *endpoints) echo "$HOSTS" ;; *number) echo 2 ;; esac',
}


@pytest.fixture
def run(tmp_path):
    """Runs a script; returns its exit code, and the words of each stand-in's call."""
    stand_ins, log = tmp_path / "bin", tmp_path / "log"
    stand_ins.mkdir()
    log.mkdir()
    (tmp_path / "bin" / "activate").write_text("")
    for name, body in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_ins / name).chmod(0o755)

    def run_script(name, *words, code=0, **environment):
        done = subprocess.run(
            ["bash", FOLDER / name, *words],
            cwd=ROOT,
            env={
                "PATH": f"{stand_ins}:{os.environ['PATH']}",
                "LOG": str(log),
                "VENV": str(tmp_path),
                "CODE": str(code),
                "SLURM_SUBMIT_DIR": str(ROOT),
                "SLURM_JOB_ID": "77",
                **environment,
            },
            check=False,
            capture_output=True,
            text=True,
        )
        calls = {
            path.name: [
                re.split(r"[\t ]", line.strip())
                for line in path.read_text().splitlines()
            ]
            for path in log.iterdir()
        }
        return done.returncode, calls, done.stderr

    return run_script


def config_of(words):
    """Parses the words of a call of python as the script would; returns its config."""
    dash_m, module, *rest = words
    assert dash_m == "-m"
    importlib.import_module(module)
    given = dict(word.removeprefix("--").split("=", 1) for word in rest if "=" in word)
    with flagsaver.flagsaver():
        assert flags.FLAGS(["script", *rest]) == ["script"]
        assert given["workdir"] == str(common_flags.workdir_from_flags())
        # Here there is none.
        with flagsaver.flagsaver(require_accelerator=False):
            return common_flags.config_from_flags(), given


@pytest.mark.parametrize("name", NAMES)
def test_each_is_bash_and_named_in_the_docs(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    assert f"examples/scripts/{name}" in (ROOT / "docs/scaling.md").read_text()
    text = (FOLDER / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert f"examples/scripts/{name}" in text


def test_one_gpu(run):
    code, calls, _ = run("one_gpu.sh", "Breakout", "3")
    first, second = calls["python"]
    assert code == 0 and first == [*second, "--preflight"]
    config, _ = config_of(second)
    assert (config.game, config.seed, config.preset) == ("Breakout", 3, "gpu")


def test_ten_minutes_on_a_gpu(run, tmp_path):
    code, calls, _ = run("ten_minutes_gpu.sh", "out", "--dry", WORK=str(tmp_path))
    expected = f"-m experiments.gpu_minutes --workdir={tmp_path} --files=out --dry"
    assert code == 0 and calls["python"] == [expected.split()]


def test_eight_gpus(run):
    code, calls, _ = run("eight_gpus.sh", "one")
    assert code == 0 and len(calls["python"]) == 2
    assert config_of(calls["python"][1])[0].num_devices == 8


def test_eight_gpus_with_a_run_each(run):
    code, calls, _ = run("eight_gpus.sh")
    (words,) = calls["python"]
    _, given = config_of(words)
    assert code == 0 and (given["processes"], given["games"]) == ("8", "atari26")


def test_unknown_words_are_refused(run):
    for name in ("eight_gpus.sh", "tpu_slice.sh"):
        code, calls, said = run(name, "quickly")
        assert code == 2 and calls == {} and "quickly" in said


# 0: finished; 75: to be queued again; another: failed.
@pytest.mark.parametrize("code", [0, 75, 1])
def test_a_task_of_the_array(run, code):
    found, calls, _ = run("slurm_array.sbatch", code=code, SLURM_ARRAY_TASK_ID="13")
    (words,) = calls["python"]
    config, given = config_of(words)
    assert (config.game, config.seed) == ("Assault", 3)  # The third game.
    # Where a sweep would put it.
    assert given["workdir"] == "runs/atari57/Assault/aps/seed_3"
    assert found == code
    assert calls.get("scontrol") == ([["requeue", "77"]] if code == 75 else None)


def test_the_array_has_each_game_and_seed_once():
    script = FOLDER / "slurm_array.sbatch"
    (last,) = re.findall(r"^#SBATCH --array=0-(\d+)", script.read_text(), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", f'source {script}; for i in {{0..{last}}}; do pair "$i"; done'],
        check=True,
        capture_output=True,
        text=True,
    )
    games = [scores.camel_case(name) for name in scores.atari57_games()]
    expected = [f"{game} {seed}" for game in games for seed in range(5)]
    assert done.stdout.splitlines() == expected and len(expected) == 285


@pytest.mark.parametrize("code", [0, 75])
def test_a_job_on_several_nodes(run, code):
    found, calls, _ = run("slurm_multi_node.sbatch", code=code, SLURM_JOB_NUM_NODES="2")
    (words,) = calls["python"]
    config, _ = config_of(words)
    assert config.num_devices == 16
    assert calls["srun"] == [["--kill-on-bad-exit=0"]]
    assert found == code
    assert calls.get("scontrol") == ([["requeue", "77"]] if code == 75 else None)


def test_signals_reach_the_processes_before_the_time_limit():
    for name in NAMES:
        if name.endswith(".sbatch"):
            text = (FOLDER / name).read_text()
            # A signal that `interrupts.StopRequests` listens for, to steps, not to the
            # script (`B:`); and output that a requeue does not erase.
            assert "\n#SBATCH --signal=TERM@300\n" in text
            assert "\n#SBATCH --open-mode=append\n" in text
            assert re.search(r"^ *srun .*python", text, re.MULTILINE)


@pytest.mark.parametrize("hosts", ["h0,h1,h2,h3", "a:1:h0,b:2:h1,c:3:h2,d:4:h3"])
def test_a_tpu_slice(run, hosts):
    code, calls, said = run(
        "tpu_slice.sh", "run", TPU="t", ZONE="z", FOLDER=str(ROOT), HOSTS=hosts
    )
    assert code == 0, said
    assert "--worker=all" in calls["gcloud"][0]
    (words,) = calls["python"]
    # Which process this is: told apart, because the config does not depend on it.
    place = ["--coordinator_address=h0:8476", "--num_processes=4", "--process_id=2"]
    assert [word for word in words if word in place] == place
    config, _ = config_of([word for word in words if word not in place])
    assert config.num_devices == 16
